"""T3 on the decode engine: its step, and the decodings that wait between requests."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from kvcache import CacheGeometry, CacheReport, SizePolicy
from kvcache.decoding import BackendName, Decoding, Pool, Sampler, Sampling, StaticKV, decoder_copy
from kvcache.hf import kv_layers
from kvcache.modules import rebuilt
from kvcache.precision import PackedLinear, Precision, has_half, with_precision
from kvcache.slots import slots_for
from kvcache_chatterbox.alignment import AlignmentCheck
from kvcache_chatterbox.sampling import order


def at_precision(t3: Any, precision: Precision) -> Any:
    """A copy of a T3 that computes in `precision` and shares what does not change: on a CPU all but the backbone."""
    if t3.device.type != "cpu":
        return with_precision(t3, precision)
    backbone = with_precision(t3.tfmr, precision)
    return rebuilt(t3, lambda name, module: backbone if module is t3.tfmr else None)


class T3Step(nn.Module):
    """From a speech token to the logits of the next, without a number from the host.

    Args:
        t3: whose step.
        rows: 2 with guidance.
        precision: of the backbone. The head takes as many bits on a CPU, but no fewer than 16: what it gives is compared.
    """

    def __init__(self, t3: Any, rows: int, precision: Precision | None = None) -> None:
        super().__init__()
        self.tfmr = decoder_copy(t3.tfmr)
        self.embed, self.positions = t3.speech_emb, t3.speech_pos_emb
        self.head = t3.speech_head
        if precision not in (None, "fp32") and t3.device.type == "cpu":
            half = "fp16" if precision == "fp16" else "bf16"
            self.head = PackedLinear([t3.speech_head], half) if has_half(half) else t3.speech_head
        self.rows = rows

    def forward(self, tokens: Tensor, made: Tensor, given: dict[str, Any]) -> Tensor:
        embeds = self.embed(tokens)
        if self.positions is not None:
            embeds = embeds + self.positions.emb(made)
        embeds = embeds[:, None].repeat_interleave(self.rows, 0)
        hidden = self.tfmr(inputs_embeds=embeds, **given)[0]
        return torch.as_tensor(self.head(hidden[:, -1]))


class Stepper:
    """Runs requests of a T3 on the decode engine.

    Args:
        t3: upstream's T3.
        backend, tf32: see `Decoding`.
        kv_dtype: of the cache; by default the model's.
        precision: what `t3` computes in, see `at_precision`.
        policy: of the speech tokens.
        max_length: the most tokens a request may hold. A cache that keeps all of them is made as long at once, so that
            what was captured serves every request.
    """

    def __init__(
        self,
        t3: Any,
        backend: BackendName,
        kv_dtype: torch.dtype | None,
        tf32: bool,
        precision: Precision | None,
        policy: SizePolicy,
        max_length: int | None,
    ) -> None:
        self._t3 = t3
        self._geometry = CacheGeometry.from_model(t3.tfmr)
        self._backend: BackendName = backend
        self._kv_dtype, self._tf32, self._precision = kv_dtype, tf32, precision
        self._policy, self._max_length = policy, max_length
        self._pool = Pool()

    @staticmethod
    def why_not(t3: Any) -> str | None:
        """Why this T3 cannot decode on the engine; None if it can."""
        if AlignmentCheck.wanted(t3):
            return "the multilingual model's alignment check looks at every token on the host"
        return None

    def release(self) -> None:
        """Let go of the memory that waits for the next request."""
        self._pool.clear()

    def chunks(
        self,
        logits: Tensor,
        cache: Any,
        sampling: Sampling,
        total: int,
        size: int,
        generator: torch.Generator | None,
    ) -> Iterator[tuple[Tensor, CacheReport]]:
        """A request's speech tokens ``[1, n]`` as upstream's loop returns them, and the account of its cache.

        Args:
            logits: of its prefill's last position, ``[rows, vocabulary]``.
            cache: what was prefilled.
            sampling, generator: how tokens are drawn.
            total: the most tokens.
            size: tokens in a chunk.
        """
        layers = kv_layers(cache)
        policy, stored = layers[0].policy, layers[0].stored
        needed = stored + total - 1 if policy.limit is None else policy.limit
        t3, rows = self._t3, logits.shape[0]

        def make(slots: int) -> Decoding:
            if not self._policy.evicts:
                room = slots_for(slots, self._max_length, preallocate=True)
            else:  # a budget in bytes is kept to the byte; prefixes of other lengths shall fit what counts tokens
                room = slots if self._policy.limit is None else slots_for(slots, None)
            kv = StaticKV(self._geometry, rows, room, dtype=self._kv_dtype)
            sampler = Sampler(1, logits.shape[1], order(t3.is_gpt), logits.device, guided=rows == 2)
            return Decoding(T3Step(t3, rows, self._precision), kv, sampler, self._backend, tf32=self._tf32)

        with self._pool.lent(rows, needed, make) as decoding:
            decoding.load(0, layers)
            begin = torch.tensor([t3.hp.start_speech_token], device=logits.device)
            first = decoding.start(0, logits, [sampling], [generator], [begin])
            if t3.is_gpt:  # penalizes the start token only as long as there is nothing else
                decoding.sampler.begin(0, first)
            del cache, layers
            stop, spoken = t3.hp.stop_speech_token, 0
            for chunk in decoding.chunks(total, size, [stop], first_may_end=not t3.is_gpt):
                # Upstream's GPT-2 loop keeps its stop token to itself, and speaks one that comes first.
                last = spoken + chunk.shape[1] - 1
                ends = t3.is_gpt and last > 0 and int(chunk[0, -1]) == stop
                spoken = last + 1
                if chunk.shape[1] > ends:
                    yield chunk[:, : chunk.shape[1] - ends], decoding.report()
