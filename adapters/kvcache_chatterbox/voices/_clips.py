"""Voices of clips, encoded once for all processes that share a store, and kept there beside what T3 computes of them.

What is kept is what upstream's `prepare_conditionals` makes of a clip. Its key is the clip's content and all that decides what is
made of it: weights, code and settings of what encodes, and the releases of what it stands on.
"""

import dataclasses
import hashlib
import sys
import types
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from kvcache import InputError, PrefixKey, PrefixSnapshot, model_fingerprint
from kvcache.models import class_code, function_code
from kvcache_chatterbox.units import FRAMES_PER_TOKEN, MELS
from kvcache_chatterbox.voices._voices import Voice, cond_class

_ENCODES = ("tokenizer", "speaker_encoder")  # of S3Gen
_ELSEWHERE = ("t3", "s3gen", "conds", "tokenizer", "watermarker", "prepare_conditionals")  # or not asked
_PLAIN = (bool, int, float, str, bytes, type(None), torch.device)
_PACKAGES = ("chatterbox-tts", "torch", "torchaudio", "librosa", "numpy", "scipy", "soxr", "soundfile", "pyloudnorm")
_NOTHING = "none."  # before the names of what a reference has as None


def encoder_of(tts: Any) -> str | None:
    """A SHA-256, in hex, of all that decides what a model, as it is now, makes of a clip; None if it cannot be told from others.

    Args:
        tts: a `ChatterboxTTS` of any variant.
    """
    s3gen = tts.s3gen
    modules = {name: getattr(s3gen, name, None) for name in _ENCODES}
    own = {name: value for name, value in vars(tts).items() if name not in _ELSEWHERE}
    modules |= {name: value for name, value in own.items() if isinstance(value, nn.Module)}
    plain = {name: value for name, value in own.items() if name not in modules}
    plain |= {name: value for name, value in vars(s3gen).items() if isinstance(value, _PLAIN)}
    bound = {name: value for name, value in vars(s3gen).items() if callable(value) and not isinstance(value, nn.Module)}
    prepare = vars(tts).get("prepare_conditionals")
    bound |= {} if prepare is None else {"prepare_conditionals": getattr(prepare, "__func__", prepare)}
    if (
        not all(isinstance(module, nn.Module) for module in modules.values())
        or not all(isinstance(value, _PLAIN) for value in plain.values())
        or not all(isinstance(function, types.FunctionType) for function in bound.values())
    ):
        return None
    try:
        said = [
            *(f"{name} {model_fingerprint(module)}" for name, module in modules.items() if module is not None),
            *(f"{name} {value!r}" for name, value in plain.items()),
            *(f"{name} {_named(function)}" for name, function in bound.items()),
            *(f"{kind.__qualname__} {class_code(kind)}" for kind in (type(tts), type(s3gen))),
            *(f"{name} {_version(name)}" for name in _PACKAGES),
            f"prompt {tts.t3.hp.speech_cond_prompt_len} {tts.t3.hp.speaker_embed_size}",
        ]
    except InputError:  # hooks, or what has no name
        return None
    return hashlib.sha256("\n".join(sorted(said)).encode()).hexdigest()


def clip_key(encoder: str, clip: bytes) -> PrefixKey:
    """Where the voice of a clip is kept.

    Args:
        encoder: from `encoder_of`.
        clip: SHA-256 of the clip's file.
    """
    words = [int.from_bytes(clip[i : i + 8], "little", signed=True) for i in range(0, len(clip), 8)]
    return PrefixKey(encoder, torch.tensor(words))


def packed(key: PrefixKey, voice: Voice) -> PrefixSnapshot:
    """A voice as a store keeps it.

    Raises:
        InputError: if it has what is neither a tensor nor None.
    """
    parts = {f"t3.{field.name}": getattr(voice.t3, field.name) for field in dataclasses.fields(voice.t3)}
    parts |= {f"gen.{name}": value for name, value in voice.gen.items()}
    if not all(value is None or isinstance(value, Tensor) for value in parts.values()):
        raise InputError(
            "a voice with more than tensors is not kept in a store; encode its clip again for each process"
        )
    kept = {name: value.clone() for name, value in parts.items() if value is not None}
    kept |= {_NOTHING + name: torch.zeros(1, dtype=torch.bool) for name, value in parts.items() if value is None}
    return PrefixSnapshot(key, (), extra=kept)


def unpacked(t3: Any, snapshot: PrefixSnapshot) -> Voice:
    """The voice that `packed` made a snapshot of, checked for the model `t3`.

    Raises:
        InputError: if it is none, or does not fit the model.
    """
    parts: dict[str, Any] = {name: value for name, value in snapshot.extra.items() if not name.startswith(_NOTHING)}
    parts |= {name[len(_NOTHING) :]: None for name in snapshot.extra if name.startswith(_NOTHING)}
    groups: dict[str, dict[str, Any]] = {"t3": {}, "gen": {}}
    for name, value in parts.items():
        group, _, key = name.partition(".")
        if group not in groups:
            raise InputError(f"{name[:80]!r} is no part of a voice; encode its clip again")
        groups[group][key] = value
    known = {field.name for field in dataclasses.fields(cond_class(t3))}
    if snapshot.layers or groups["t3"].keys() != known or not groups["gen"]:
        raise InputError(
            f"T3's conditionals {sorted(groups['t3'])} with {len(groups['gen'])} parts of a reference are no voice, which has "
            f"{sorted(known)}; encode its clip again"
        )
    given = types.SimpleNamespace(t3=cond_class(t3)(**groups["t3"]), gen=groups["gen"])
    return dataclasses.replace(Voice.of(t3, given), kept=False)


def kept_bytes(t3_cond: Any, heard: int) -> int:
    """Bytes that the voice of a clip takes in a store's memory, of which the vocoder hears so many tokens."""
    voice = Voice(t3_cond, {**blank_reference(heard), "prompt_feat_len": None})
    kept = packed(clip_key("planned", bytes(32)), voice)
    return kept.key.content.nbytes + sum(part.nbytes for part in kept.extra.values())


def _named(function: types.FunctionType) -> str:
    """A function of upstream's by its name: what it reads of its module are caches, which fill up. Any other by what it does."""
    name = f"{function.__module__}.{function.__qualname__}"
    upstream = function.__module__.startswith("chatterbox.")
    if upstream and getattr(sys.modules.get(function.__module__), function.__qualname__, None) is function:
        return name
    return f"{name} {function_code(function)}"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def blank_reference(tokens: int) -> dict[str, Any]:
    """What upstream makes of a clip of so many speech tokens, without numbers."""
    with torch.device("meta"):
        return {
            "prompt_token": torch.zeros(1, tokens, dtype=torch.long),
            "prompt_token_len": torch.zeros(1, dtype=torch.long),
            "prompt_feat": torch.zeros(1, FRAMES_PER_TOKEN * tokens, MELS),
            "embedding": torch.zeros(1, 192),
        }
