"""Voices: what upstream makes of a clip, kept and reused."""

from kvcache_chatterbox.voices._clips import blank_reference, clip_key, encoder_of, kept_bytes, packed, unpacked
from kvcache_chatterbox.voices._reuse import FirstPass, Prepared, Reuse, VoiceReuse
from kvcache_chatterbox.voices._voices import Voice, Voices, check_name, check_voice, read_conds

__all__ = [
    "FirstPass",
    "Prepared",
    "Reuse",
    "Voice",
    "VoiceReuse",
    "Voices",
    "blank_reference",
    "check_name",
    "check_voice",
    "clip_key",
    "encoder_of",
    "kept_bytes",
    "packed",
    "read_conds",
    "unpacked",
]
