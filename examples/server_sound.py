"""Audio as the example servers send it."""

import struct

import numpy as np


def pcm(audio: np.ndarray) -> bytes:
    """Samples from -1 to 1, ``[samples]``, as 16-bit little-endian ones."""
    return (audio.clip(-1, 1) * 32767).round().astype("<i2").tobytes()


def wav_header(rate: int) -> bytes:
    """Of a mono 16-bit file whose length is not known yet: the sizes are the largest, so that players read on."""
    unknown = 0xFFFFFFFF
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, rate, 2 * rate, 2, 16)
    return struct.pack("<4sI4s", b"RIFF", unknown, b"WAVE") + form + struct.pack("<4sI", b"data", unknown)
