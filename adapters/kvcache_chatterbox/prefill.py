"""What a T3 request needs before its first token: checked text, copied conditionals, prefill embeddings."""

import dataclasses
import os
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeVar

import torch
from torch import Tensor

from kvcache import InputError, autocast
from kvcache.errors import check_whole

_T = TypeVar("_T")
_LONGEST_PAUSE = 600  # seconds: the silence is made as samples
_LARGEST = 3e38  # about the largest number of fp32


@dataclass(frozen=True)
class Prefill:
    """The embeddings that a request starts from.

    Attributes:
        embeds: ``[rows, tokens, dim]``; two rows with guidance: conditional, unconditional.
        text: where the text stands among the tokens, from and to.
    """

    embeds: Tensor
    text: tuple[int, int]


def check_count(name: str, value: Any) -> None:
    """Raise `InputError` if `value` counts nothing."""
    check_whole(name, value, 1)


def check_number(name: str, value: Any, least: float = -_LARGEST, most: float = _LARGEST, unit: str = "") -> float:
    """The number, where it is a finite one from `least` to `most`: a fraction or NumPy's, too, but no truth value.

    Raises:
        InputError: for anything else.
    """
    number = isinstance(value, Real) and not isinstance(value, bool)
    if number and least <= value <= most:
        return float(value)
    bounds = (
        "" if least == -_LARGEST else f" of at least {least:g}" if most == _LARGEST else f" from {least:g} to {most:g}"
    )
    raise InputError(f"{name}={value!r} must be a finite number{unit}{bounds}")


def check_pause(pause: Any) -> float:
    """The seconds of silence between two segments.

    Raises:
        InputError: if they cannot be.
    """
    return check_number("pause", pause, 0, _LONGEST_PAUSE, " of seconds")


def check_path(name: str, value: Any) -> None:
    """Raise `InputError` for what names no file."""
    if not isinstance(value, str | os.PathLike):
        raise InputError(f"{name}={value!r:.80} must be the path of a file, a string or a Path")


def check_language(language_id: Any) -> None:
    """Raise `InputError` for what is no language's code at all."""
    if language_id is not None and not isinstance(language_id, str):
        raise InputError(f"language_id={language_id!r:.80} must be a language's code, such as 'en', or None")


def check_conditionals(t3_cond: Any) -> None:
    """Raise `InputError` for what is no `T3Cond`."""
    fields = dataclasses.fields(t3_cond) if dataclasses.is_dataclass(t3_cond) and not isinstance(t3_cond, type) else ()
    if {"speaker_emb", "emotion_adv"} <= {field.name for field in fields}:
        return
    raise InputError(
        f"t3_cond is a {type(t3_cond).__name__} and must be upstream's T3Cond; of a Conditionals give its t3, and of a voice "
        "that was added its name, as voice"
    )


def check_seed(seed: Any, count: int = 1) -> None:
    """Raise `InputError` for what a generator of torch cannot be seeded with, or the `count` numbers from it on cannot."""
    if seed is None or (type(seed) is int and seed >= -(2**63) and seed + count <= 2**64):
        return
    raise InputError(f"seed={seed!r} must be a whole number up to {2**64 - count}, or None for torch's own generator")


def without_autocast(t3: Any) -> AbstractContextManager[Any]:
    """Within this block no autocast is in force on the model's device.

    What is computed of a voice is kept for later requests, and a cache has one dtype: neither may depend on which blocks a
    caller has entered or left in between.
    """
    return autocast.without_autocast([t3.device.type])


def autocast_on(t3: Any) -> bool:
    """Whether the caller's thread is in an autocast of the model's device."""
    return autocast.autocasts(t3.device.type)


def each_without_autocast(t3: Any, items: Generator[_T, None, None]) -> Iterator[_T]:
    """The items, each made without autocast; the caller's block is in force again wherever it has one of them."""
    return autocast.each_without_autocast([t3.device.type], items)


def check_text(t3: Any, text_tokens: Tensor, guided: bool) -> Tensor:
    """The text as the rows that the model runs, ``[1 or 2, tokens]`` on its device.

    Args:
        text_tokens: ``[tokens]``, ``[1, tokens]``, or ``[2, tokens]`` with two equal rows, as upstream wants for guidance.

    Raises:
        InputError: if the text is empty, has no start and stop token where the model needs them, or cannot be one request.
    """
    if not isinstance(text_tokens, Tensor) or text_tokens.is_floating_point() or text_tokens.dim() not in (1, 2):
        shape = (
            f"{text_tokens.dtype} {list(text_tokens.shape)}" if isinstance(text_tokens, Tensor) else repr(text_tokens)
        )
        raise InputError(
            f"text_tokens must be token ids, [tokens] or [rows, tokens], got {shape}; use the model's tokenizer"
        )
    text = (text_tokens[None] if text_tokens.dim() == 1 else text_tokens).to(t3.device, torch.long)
    if text.shape[0] > 2 or (text.shape[0] == 2 and not torch.equal(text[0], text[1])):
        use = "guidance runs one text in two rows" if guided else "one request runs one text"
        raise InputError(
            f"text_tokens {list(text.shape)} with cfg_weight {'above ' if guided else ''}0: {use}; "
            "give one row (or the same twice), and run other texts as requests of their own"
        )
    text = text[:1]
    hp = t3.hp
    framing = 0
    if not t3.is_gpt:
        framing = 2
        for name, token in (("start", hp.start_text_token), ("stop", hp.stop_text_token)):
            if not bool((text == token).any()):
                raise InputError(f"text_tokens lack the {name} token {token}; pad them as upstream's generate() does")
    if text.shape[1] <= framing:
        raise InputError("the text is empty: give at least one token to speak")
    if not 0 <= int(text.min()) <= int(text.max()) < t3.text_emb.num_embeddings:
        raise InputError(
            f"text_tokens go from {int(text.min())} to {int(text.max())}, the model knows 0 to {t3.text_emb.num_embeddings - 1}; "
            "use the tokenizer of this variant"
        )
    if t3.text_pos_emb is not None and text.shape[1] > (longest := t3.text_pos_emb.emb.num_embeddings):
        raise InputError(f"the text has {text.shape[1]} tokens, the model learned {longest} positions; split it")
    return text.expand(2 if guided else 1, -1)


def copy_conditionals(t3: Any, t3_cond: Any) -> Any:
    """The caller's `T3Cond` as the model needs it; upstream would write into the original.

    The prompt's embedding is always made anew from its tokens: one left there by an earlier call may belong to another
    prompt or another model.
    """
    emotion = t3_cond.emotion_adv
    if t3.hp.emotion_adv and emotion is None:
        raise InputError("t3_cond.emotion_adv is None, and this model needs an emotion; give a number such as 0.5")
    if emotion is not None and not bool(torch.isfinite(torch.as_tensor(emotion)).all()):
        raise InputError("t3_cond.emotion_adv is not finite; give a number such as 0.5")
    parts = {f.name: getattr(t3_cond, f.name) for f in dataclasses.fields(t3_cond)}
    parts["cond_prompt_speech_emb"] = None
    if emotion is not None:
        parts["emotion_adv"] = torch.as_tensor(emotion, dtype=torch.float32).reshape(1, 1, 1)
    weight = t3.speech_head.weight
    for name, value in parts.items():
        if isinstance(value, Tensor):
            parts[name] = value.to(weight.device, weight.dtype if value.is_floating_point() else None)
    return type(t3_cond)(**parts)


@torch.inference_mode()
def condition(t3: Any, t3_cond: Any) -> Tensor:
    """The voice as the beginning of the backbone's input, ``[1, tokens, dim]``."""
    with without_autocast(t3):
        return torch.as_tensor(t3.prepare_conditioning(copy_conditionals(t3, t3_cond)))


@torch.inference_mode()
def prefill(t3: Any, conditioning: Tensor, text: Tensor, double_bos: bool = True) -> Prefill:
    """Upstream's prefill: conditioning, text, start of speech; the Llama models get that last one twice.

    Args:
        conditioning: from `condition`.
        text: ``[rows, tokens]`` from `check_text`; two rows mean guidance: the second has its text embeddings zeroed.
        double_bos: keep upstream's second start-of-speech token (Llama models).
    """
    rows, tokens = text.shape
    embeds = t3.text_emb(text)
    if rows == 2:
        embeds[1].zero_()
    if t3.text_pos_emb is not None:
        embeds = embeds + t3.text_pos_emb(text)
    bos = embed_speech(t3, torch.full_like(text[:, :1], t3.hp.start_speech_token), 0)
    speech = [bos, bos] if double_bos and not t3.is_gpt else [bos]
    begin = conditioning.shape[1]
    return Prefill(torch.cat([conditioning.expand(rows, -1, -1), embeds, *speech], dim=1), (begin, begin + tokens))


def embed_speech(t3: Any, tokens: Tensor, position: int) -> Tensor:
    """Speech tokens ``[rows, 1]`` as the backbone's input ``[rows, 1, dim]``."""
    embeds: Tensor = t3.speech_emb(tokens)
    if t3.speech_pos_emb is not None:
        embeds = embeds + t3.speech_pos_emb.get_fixed_embedding(position)
    return embeds
