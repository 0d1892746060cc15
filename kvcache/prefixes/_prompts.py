"""The prefixes of one language model by name: system prompts, examples, computed once and found again."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvcache.errors import CapacityError, InputError
from kvcache.events import Event, emit
from kvcache.models import check_positions, facts_of, model_fingerprint, run_prefix, trains
from kvcache.prefixes._build import cache_for_prefix, extend_prefix
from kvcache.prefixes._cache import PrefixCache
from kvcache.prefixes._snapshot import Layout, PrefixKey, PrefixSnapshot

_NEITHER = {torch.bool, torch.complex32, torch.complex64, torch.complex128}


@dataclass(frozen=True)
class _Prompt:
    content: Tensor  # as it was given
    key: PrefixKey
    pinned: bool


class PrefixRegistry(Mapping[str, Tensor]):
    """Names to token ids ``[tokens]`` or embeddings ``[tokens, dim]``.

    Args:
        model: a transformers model.
        prefix_cache: where what was computed lives.
        most: refuse prefixes of as many tokens or more; None for no limit.
        positions: the length of the model's table of learned positions; None if it has none.
    """

    def __init__(self, model: Any, prefix_cache: PrefixCache, most: int | None, positions: int | None) -> None:
        self._model = model
        self._prefix_cache = prefix_cache
        self._most = most
        self._positions = positions
        self._prompts: dict[str, _Prompt] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self._prompt(name).content

    def __contains__(self, name: object) -> bool:
        return name in self._prompts

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._prompts))

    def __len__(self) -> int:
        return len(self._prompts)

    @property
    def longest(self) -> int:
        """Tokens of the longest; 0 if there is none."""
        return max((len(prompt.content) for prompt in list(self._prompts.values())), default=0)

    def add(self, name: str, prefix: Tensor, pin: bool) -> None:
        """Compute a prefix, or find it; one of the same name is replaced. For what is refused see `KVCacheManager`."""
        self._refuse_training()
        cache_for_prefix(self._model)
        content = self._checked(name, prefix)
        key = self._key(content)
        self._compute(key)
        before = self._prompts.get(name)
        self._prompts[name] = _Prompt(content, key, pin)
        if before is not None and before.key != key:
            emit(Event("replaced", f"prefix {name!r}", {"tokens": len(key), "known": len(before.key)}))
        if pin:
            self._prefix_cache.pin(key)
        self._let_go(before)

    def remove(self, name: str) -> None:
        """Forget a name, and its pin."""
        before = self._prompt(name)
        del self._prompts[name]
        self._let_go(before)

    def snapshot(self, name: str) -> PrefixSnapshot:
        """What the model, as it is now, computes of a prefix: after a change of its weights it is computed anew."""
        prompt = self._prompt(name)
        key = self._key(prompt.content)
        if key != prompt.key:
            self._prompts[name] = replace(prompt, key=key)
            if prompt.pinned:
                self._prefix_cache.pin(key)
            self._let_go(prompt)
        return self._compute(key).to(self._model.device)

    def _prompt(self, name: str) -> _Prompt:
        if name not in self._prompts:
            known = ", ".join(map(repr, self._prompts)) or "none yet"
            raise InputError(f"there is no prefix {name!r} (known: {known}); add it with add_prefix()")
        return self._prompts[name]

    def _let_go(self, prompt: _Prompt | None) -> None:
        """Unpin what no name stands for any more."""
        if prompt is not None and prompt.pinned:
            self._prefix_cache.pin(prompt.key, any(p.pinned and p.key == prompt.key for p in self._prompts.values()))

    def _refuse_training(self) -> None:
        if self._model.training:
            raise InputError("the model is in training mode, where dropout changes what it computes; call model.eval()")
        if (name := trains(self._model)) is not None:
            raise InputError(
                f"{name} is in training mode, where dropout and statistics change what it computes, though the model is "
                "not; call model.eval() after a part was added, or eval() of that part"
            )

    def _checked(self, name: str, prefix: Tensor) -> Tensor:
        if not isinstance(prefix, Tensor) or prefix.dim() not in (1, 2, 3) or prefix.dtype in _NEITHER:
            shape = f"{prefix.dtype} {list(prefix.shape)}" if isinstance(prefix, Tensor) else repr(prefix)
            raise InputError(f"a prefix must be token ids [tokens] or embeddings [tokens, dim] of one row, got {shape}")
        if prefix.dim() == (3 if prefix.is_floating_point() else 2):
            if prefix.shape[0] != 1:
                raise InputError(f"a prefix is one row, got {prefix.shape[0]}; add each as a prefix of its own")
            prefix = prefix[0]
        tokens = prefix.shape[0]
        if self._most is not None and tokens >= self._most:
            raise CapacityError(
                f"the prefix {name!r} has {tokens} tokens, max_cache_length is {self._most}; "
                "raise max_cache_length, or shorten the prefix"
            )
        check_positions(self._positions, 0, tokens)
        table = self._model.get_input_embeddings()
        known, width = getattr(table, "num_embeddings", None), getattr(table, "embedding_dim", None)
        if prefix.is_floating_point():
            if prefix.dim() == 2 and width is not None and prefix.shape[1] != width:
                raise InputError(f"the prefix {name!r} has embeddings of {prefix.shape[1]} numbers, the model {width}")
        elif known is not None and tokens and not 0 <= int(prefix.min()) <= int(prefix.max()) < known:
            raise InputError(
                f"the prefix {name!r} has token ids from {int(prefix.min())} to {int(prefix.max())}, the model knows "
                f"0 to {known - 1}; use the tokenizer of this model"
            )
        return prefix.detach().cpu().clone()

    def _key(self, content: Tensor) -> PrefixKey:
        return PrefixKey(
            model_fingerprint(self._model),
            content.to(self._model.dtype) if content.is_floating_point() else content,
            Layout.of(facts_of(self._model).geometry),
        )

    def _compute(self, key: PrefixKey) -> PrefixSnapshot:
        return self._prefix_cache.get_or_extend(key, lambda start: self._extend(key, start))

    @torch.no_grad()
    def _extend(self, key: PrefixKey, start: PrefixSnapshot | None) -> PrefixSnapshot:
        self._refuse_training()
        cache = cache_for_prefix(self._model)
        kind = "inputs_embeds" if key.content.is_floating_point() else "input_ids"
        facts_of(self._model).clear_request_state()

        def run(rest: Tensor) -> None:
            run_prefix(self._model, {kind: rest}, cache, int(cache.get_seq_length()))

        return extend_prefix(run, key, start, cache, self._model.device)
