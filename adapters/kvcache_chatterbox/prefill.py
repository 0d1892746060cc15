"""What a T3 request needs before its first token: checked text, copied conditionals, prefill embeddings."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvcache import InputError
from kvcache_chatterbox.checks import without_autocast


@dataclass(frozen=True)
class Prefill:
    """The embeddings that a request starts from.

    Attributes:
        embeds: ``[rows, tokens, dim]``; two rows with guidance: conditional, unconditional.
        text: where the text stands among the tokens, from and to.
    """

    embeds: Tensor
    text: tuple[int, int]


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
