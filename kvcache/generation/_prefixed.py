"""A call of `generate` behind a prefix that is known: the prefix before each row, as `generate` wants it."""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin

from kvcache.errors import InputError
from kvcache.generation._call import GenerateCall
from kvcache.models import BESIDE_TEXT, check_named

# ``[rows, tokens]``: which are text, which stand for a picture.
_KINDS_OF_TOKENS = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
# What can be given behind a prefix: inputs, and settings of `generate`. All else is for the model.
_KNOWN = (
    {"input_ids", "inputs_embeds", "attention_mask", "use_cache", *_KINDS_OF_TOKENS, *BESIDE_TEXT}
    | set(vars(GenerationConfig()))  # type: ignore[no-untyped-call]
    | set(inspect.signature(GenerationMixin.generate).parameters)
) - {"kwargs"}
# What brings a cache of its own, positions of its own, or weights that the prefix was not computed with.
_INSTEAD = (
    "cache", "past_key_values", "assistant_model", "prefill_chunk_size", "position_ids", "adapter_names",
)  # fmt: skip


def behind_prefix(call: GenerateCall, name: str, content: Tensor, evicts: bool) -> GenerateCall:
    """The call with a prefix before each row of its inputs, also where a cache holds that already.

    Args:
        call: with what follows the prefix.
        name: of the prefix.
        content: token ids ``[tokens]`` or embeddings ``[tokens, dim]``.
        evicts: whether tokens leave the cache: then no row may have pads.

    Raises:
        InputError: for inputs that it cannot stand before.
    """
    model = call.model
    check_named(model)
    content = content.to(model.device)
    ids, embeds, given = _what_follows(call, name)
    settings = dict(call.settings)
    for one in ("input_ids", "inputs_embeds"):
        settings.pop(one, None)
    rows = given.shape[0]
    for kind in _KINDS_OF_TOKENS:
        if (kinds := settings.get(kind)) is not None:
            settings[kind] = torch.cat([kinds.new_zeros(rows, content.shape[0]), kinds], 1)  # a prefix is text
    settings["attention_mask"] = _mask(call, content.shape[0], ids, given, evicts)
    if ids is not None and not content.is_floating_point():
        return call.given(torch.cat([content.expand(rows, -1).to(ids.device), ids], 1), settings)
    embed = model.get_input_embeddings()
    begin = content.to(model.dtype) if content.is_floating_point() else embed(content)
    rest = embed(given) if embeds is None else embeds
    settings["inputs_embeds"] = torch.cat([begin.expand(rows, -1, -1), rest.to(begin.dtype)], 1)
    return call.given(None, settings)


def check_undrafted(call: GenerateCall) -> None:
    """Raise `InputError` if a call behind a prefix asks `generate` itself for drafts, which begin with a cache of their own."""
    _check_not_both(call, "prompt_lookup_num_tokens")


def _check_not_both(call: GenerateCall, *others: str) -> None:
    for other in others:
        if call.setting(other) is not None:
            raise InputError(
                f"give prefix or {other}, not both; new_cache(prefix=…) makes a cache that begins with one, to be run "
                "in a loop of your own"
            )


def _what_follows(call: GenerateCall, name: str) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """The token ids and the embeddings that follow a prefix, of which one is None, and that which is not."""
    _check_not_both(call, *_INSTEAD)
    settings = call.settings
    unknown = sorted(one for one in settings if one not in _KNOWN and settings[one] is not None)
    if unknown:
        raise InputError(
            f"{unknown[0]} changes what the model computes, also of the prefix {name!r}, which was computed without it; give "
            "the prefix with the inputs, without prefix=…"
        )
    ids, embeds = settings.get("input_ids", call.inputs), settings.get("inputs_embeds")
    if ids is not None and embeds is not None:
        raise InputError("give what follows a prefix as token ids or as inputs_embeds, not as both")
    given: Any = ids if embeds is None else embeds
    if given is None or given.dim() != (2 if embeds is None else 3) or given.shape[1] == 0:
        raise InputError(
            f"the prefix {name!r} needs inputs to stand before: token ids [rows, tokens] or inputs_embeds "
            f"[rows, tokens, dim] with at least one token, got {None if given is None else list(given.shape)}"
        )
    return ids, embeds, given


def _mask(call: GenerateCall, prefix: int, ids: Tensor | None, given: Tensor, evicts: bool) -> Tensor:
    """The attention mask of prefix and inputs: the prefix is seen by all."""
    mask = call.settings.get("attention_mask")
    if mask is not None and mask.shape != given.shape[:2]:
        raise InputError(
            f"attention_mask {list(mask.shape)} must be that of the inputs alone, {list(given.shape[:2])}: "
            "the prefix, which all of them see, is not in it"
        )
    if mask is None:
        mask = call.guessed_mask(ids)
    if mask is None:
        mask = torch.ones(given.shape[:2], dtype=torch.long, device=given.device)
    if evicts:
        check_no_pads(mask)
    return torch.cat([torch.ones(mask.shape[0], prefix, dtype=mask.dtype, device=mask.device), mask], 1)


def check_no_pads(mask: Tensor) -> None:
    """Raise `InputError` if an attention mask ``[rows, tokens]`` hides something, behind a prefix under a policy that evicts."""
    if not bool(mask.all()):
        raise InputError(
            "rows padded behind a prefix need a policy that evicts nothing: pads would count as tokens; "
            "use KeepAll(), or run rows of different lengths apart"
        )
