"""A stand-in for a whole Chatterbox model around a bare T3, where there are no weights or no audio stack.

What is heard is a gliding tone and not speech: it lets everything around the vocoder run, be listened to and be tested.
The names here are those that upstream's modules have next to their classes.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from kvcache_chatterbox.loading import byte_tokens, random_conditionals
from kvcache_chatterbox.units import SAMPLE_RATE, SAMPLES_PER_TOKEN

S3GEN_SIL = 4299  # as in s3gen/const.py; asked for the GPT-2 variants alone
SUPPORTED_LANGUAGES = {  # as in mtl_tts.py; asked for that variant alone
    "ar": "Arabic",
    "da": "Danish",
    "de": "German",
    "el": "Greek",
    "en": "English",
    "es": "Spanish",
    "fi": "Finnish",
    "fr": "French",
    "he": "Hebrew",
    "hi": "Hindi",
    "it": "Italian",
    "ja": "Japanese",
    "ko": "Korean",
    "ms": "Malay",
    "nl": "Dutch",
    "no": "Norwegian",
    "pl": "Polish",
    "pt": "Portuguese",
    "ru": "Russian",
    "sv": "Swedish",
    "sw": "Swahili",
    "tr": "Turkish",
    "zh": "Chinese",
}
_MEMORY = 3  # tokens before a token that its sound depends on
_LOUDEST = 0.3


def punc_norm(text: str) -> str:
    """The rules of `punc_norm` in chatterbox-tts 0.1.7 (MIT licence): those of tts.py, with the sentence ends of mtl_tts.py.

    Turbo's own differ in leaving ``...``, ``;`` and a dash between spaces as they are.
    """
    if not text:
        return "You need to add some text for me to talk."
    if text[0].islower():
        text = text[0].upper() + text[1:]
    text = " ".join(text.split())
    for old, new in {
        "...": ", ",
        "…": ", ",
        ":": ",",
        " - ": ", ",
        ";": ", ",
        "—": "-",
        "–": "-",
        " ,": ",",
        "“": '"',
        "”": '"',
        "‘": "'",
        "’": "'",
    }.items():
        text = text.replace(old, new)
    text = text.rstrip(" ")
    return text if text.endswith((".", "!", "?", "-", ",", "、", "，", "。", "？", "！")) else text + "."


def stand_in(t3: Any, seed: int = 0) -> "StandIn":
    """What stands in for a `ChatterboxTTS` of any variant around `t3`, with a made-up voice. It makes tones, not speech.

    Args:
        t3: a model of upstream's class, such as `load_t3` makes.
        seed: of the made-up voices.
    """
    return StandIn(t3, seed)


@dataclass
class Conditionals:
    """A voice, as upstream's class of this name has it: for T3, and for the vocoder (here its embedding alone)."""

    t3: Any
    gen: dict[str, Any]


class StandIn:
    """What `stand_in` makes: as much of a `ChatterboxTTS` as the engine uses."""

    def __init__(self, t3: Any, seed: int) -> None:
        self.t3 = t3
        self.s3gen = ToneVocoder(meanflow=t3.is_gpt)
        self.tokenizer = _Bytes(t3)
        self.sr = SAMPLE_RATE
        self.watermarker: Any = None
        self._seed = seed
        self.conds: Conditionals | None = self._voice(seed, 0.5)

    def prepare_conditionals(self, wav_fpath: str | os.PathLike[str], exaggeration: float = 0.5) -> None:
        """Take on a voice made up from the bytes of a file, whatever is in it: other bytes, another voice."""
        clip = hashlib.sha256(Path(wav_fpath).read_bytes()).digest()
        self.conds = self._voice(self._seed + int.from_bytes(clip[:4], "big"), exaggeration)

    def _voice(self, seed: int, exaggeration: float) -> Conditionals:
        t3 = random_conditionals(self.t3, seed)
        t3.emotion_adv = exaggeration * torch.ones(1, 1, 1)
        return Conditionals(t3, {"embedding": torch.randn(1, 192, generator=torch.Generator().manual_seed(seed))})


class ToneVocoder:
    """Stands in for `S3Gen`: 960 samples a token of a tone, the same for the same tokens, and nothing like speech.

    A token sets a pitch and a level, smoothed over three tokens, that the tone glides to. The voice is in the lowest
    pitch and in the overtones. Pitches are multiples of 50 Hz, so that a token's glide takes whole periods: the wave is
    at zero between any two tokens, and goes on there however the tokens are cut into chunks.

    Args:
        meanflow: as `S3Gen` says whether it is Turbo's.
    """

    def __init__(self, meanflow: bool = False) -> None:
        self.meanflow = meanflow

    def inference(
        self,
        speech_tokens: Tensor,
        ref_dict: dict[str, Any],
        n_cfm_timesteps: int | None = None,  # noqa: ARG002  # as upstream's is called
    ) -> tuple[Tensor, None]:
        """The audio ``[1, samples]`` of tokens ``[n]`` or ``[1, n]``; the steps change nothing here."""
        tokens = speech_tokens.flatten().to("cpu", torch.float64)
        timbre = ref_dict["embedding"].flatten().to("cpu", torch.float64).sigmoid()
        lowest = 2 + (timbre[0] * 4).floor()
        pitch, pitched = _glide((tokens % 7) / 7)
        level, levelled = _glide(torch.where(tokens == S3GEN_SIL, 0.0, 0.3 + 0.7 * (tokens % 11) / 10))
        # In units of 50 Hz, of which a token has two periods: from one whole number to another it has their sum.
        pitch, pitched = ((lowest + 4 * value).round()[:, None] for value in (pitch, pitched))
        t = torch.arange(SAMPLES_PER_TOKEN, dtype=torch.float64) / SAMPLES_PER_TOKEN
        phase = 2 * torch.pi * (2 * pitch * t + (pitched - pitch) * t**2)
        loud = level[:, None] + (levelled - level)[:, None] * t
        overtones = torch.tensor([1.0, 0.5, 0.3, 0.2], dtype=torch.float64) * torch.cat([torch.ones(1), timbre[1:4]])
        wave = sum(share * torch.sin((n + 1) * phase) for n, share in enumerate(overtones / overtones.sum()))
        return (_LOUDEST * loud * wave).flatten().to(torch.float32)[None], None


def _glide(targets: Tensor) -> tuple[Tensor, Tensor]:
    """Where each token's glide starts and ends: the mean target of the last tokens, of those before it and with it."""
    means = torch.nn.functional.pad(targets, (_MEMORY, 0)).unfold(0, _MEMORY, 1).mean(1)
    return means[:-1], means[1:]


class _Bytes:
    """Stands in for the tokenizer of the variant, called as upstream calls it: the text's bytes."""

    def __init__(self, t3: Any) -> None:
        self._t3 = t3

    def text_to_tokens(self, text: str, language_id: str | None = None) -> Tensor:
        tokens = byte_tokens(self._t3, text if language_id is None else f"[{language_id}]{text}")
        return tokens[:, 1:-1]  # upstream puts start and stop around them later

    def __call__(self, text: str, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(input_ids=byte_tokens(self._t3, text))
