"""The multilingual model's alignment check, reading three attention heads instead of all of them.

Upstream's analyzer watches where in the text three heads look, and ends or prolongs the speech. To see them it turns all
layers to eager attention for good and leaves a hook per head and call. Here the three heads' weights are computed beside
the model's own attention, from hooks that live for one forward pass.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from kvcache.models import get_cache
from kvcache_chatterbox.upstream import beside, needed_beside

_ANALYZER = "AlignmentStreamAnalyzer"
_reading: ContextVar["HeadReader | None"] = ContextVar("kvcache_chatterbox_reading", default=None)


class HeadReader:
    """Reads the attention weights of a few heads of a Llama decoder, for row 0.

    Args:
        decoder: the backbone, with ``layers[i].self_attn``.
        heads: ``(layer, head)`` pairs.
    """

    def __init__(self, decoder: Any, heads: list[tuple[int, int]]) -> None:
        self._decoder = decoder
        self._heads = heads
        self.weights: dict[tuple[int, int], Tensor] = {}  # (layer, head) -> [queries, keys]

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Within this block, forward passes of this thread leave their weights in `weights`."""
        modules = {layer: self._decoder.layers[layer].self_attn for layer, _ in self._heads}
        handles = [m.register_forward_hook(self._read, with_kwargs=True) for m in modules.values()]
        token = _reading.set(self)
        try:
            yield
        finally:
            _reading.reset(token)
            for handle in handles:
                handle.remove()

    def _read(self, module: Any, args: tuple[Any, ...], *kwargs_and_output: Any) -> None:
        # Another request's forward pass, in another thread; torch may call it without kwargs while the hook is removed.
        if _reading.get() is not self:
            return
        kwargs, _ = kwargs_and_output
        hidden: Tensor = (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])[:1]
        cos, sin = (part[:1] for part in kwargs["position_embeddings"])
        cache = get_cache(kwargs)
        for layer, head in self._heads:
            if layer == module.layer_idx:
                kv_head = head // module.num_key_value_groups
                query = _project(module, module.q_proj, head, hidden, cos, sin)
                if cache is None:
                    keys = _project(module, module.k_proj, kv_head, hidden, cos, sin)
                else:
                    keys = cache.layers[layer].keys[0, kv_head]
                self.weights[layer, head] = _weights(query, keys, module.scaling, kwargs.get("attention_mask"))


def _project(module: Any, projection: nn.Linear, head: int, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """One head's queries or keys, rotated, ``[tokens, head_dim]``."""
    rows = slice(head * module.head_dim, (head + 1) * module.head_dim)
    bias = None if projection.bias is None else projection.bias[rows]
    states = nn.functional.linear(hidden, projection.weight[rows], bias)[:, None]
    rotate = needed_beside(module, "apply_rotary_pos_emb")
    return torch.as_tensor(rotate(states, states, cos, sin)[0])[0, 0]


def _weights(query: Tensor, keys: Tensor, scaling: float, mask: Tensor | None) -> Tensor:
    """What row 0 looks at: under the layer's own mask, or where it was given none, causally."""
    scores = (query @ keys.T) * scaling
    new, total = scores.shape
    lowest = torch.finfo(scores.dtype).min
    if mask is not None:
        seen = mask[0, 0, :, :total]
        scores = scores.masked_fill(~seen, lowest) if seen.dtype == torch.bool else scores + seen
    elif new > 1:
        future = torch.ones(new, total, dtype=torch.bool, device=scores.device).triu(total - new + 1)
        scores = scores.masked_fill(future, lowest)
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)


class AlignmentCheck:
    """Upstream's `AlignmentStreamAnalyzer`, fed from a `HeadReader`.

    Args:
        t3: upstream's multilingual T3.
        text: where the text tokens stand in the prefill, from and to.
    """

    def __init__(self, t3: Any, text: tuple[int, int]) -> None:
        upstream = needed_beside(t3, _ANALYZER)
        without_hooks = type("Analyzer", (upstream,), {"_add_attention_spy": lambda *_: None})
        self._heads: list[tuple[int, int]] = list(sys.modules[upstream.__module__].LLAMA_ALIGNED_HEADS)
        self._analyzer = without_hooks(t3.tfmr, None, text_tokens_slice=text, eos_idx=t3.hp.stop_speech_token)
        self.reader = HeadReader(t3.tfmr, self._heads)

    @staticmethod
    def wanted(t3: Any) -> bool:
        """Whether this T3 is checked: the multilingual one, up to the release that dropped the analyzer."""
        return bool(t3.hp.is_multilingual) and beside(t3, _ANALYZER) is not None

    @staticmethod
    def layers(t3: Any) -> list[int]:
        """The decoder layers whose heads are read."""
        upstream = needed_beside(t3, _ANALYZER)
        return sorted({layer for layer, _ in sys.modules[upstream.__module__].LLAMA_ALIGNED_HEADS})

    def step(self, logits: Tensor, last_token: int, own: tuple[int, Tensor] | None = None) -> Tensor:
        """The logits ``[1, vocabulary]``, with the end of speech suppressed or forced where the alignment says so.

        Args:
            own: of a first pass in which rows lay side by side: how many queries and which keys are the conditional's.
        """
        first = self._analyzer.curr_frame_pos == 0
        maps = [self.reader.weights[head] for head in self._heads]
        if own is not None:
            maps = [m[: own[0], own[1]] for m in maps]
        self._analyzer.last_aligned_attns = [(_square(m) if first else m[-1:]).cpu() for m in maps]
        return torch.as_tensor(self._analyzer.step(logits, next_token=last_token))


def _square(weights: Tensor) -> Tensor:
    """With empty rows for the first queries, which were known and not run: the analyzer counts rows from the start."""
    return nn.functional.pad(weights, (0, 0, weights.shape[1] - weights.shape[0], 0))
