"""T3 on the decode engine: its step, and the decodings that wait between requests."""

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kvcache import CacheGeometry, CacheReport, InputError
from kvcache.decoding import (
    GREEDY,
    BackendName,
    Batch,
    Decoding,
    HeadWatch,
    Job,
    Pool,
    Prefilled,
    Programs,
    Sampler,
    Sampling,
    StaticKV,
    TextEnd,
    chunks_of,
    decoder_copy,
    unsupported_reason,
)
from kvcache.models import (
    Following,
    PackedLinear,
    Precision,
    Signature,
    geometry_of,
    has_half,
    is_plain,
    kv_layers,
    onednn_linear,
    quantize_linear,
    structural_copy,
)
from kvcache_chatterbox.speech._alignment import ALIGNMENT, AlignmentRule, aligned_heads, is_checked
from kvcache_chatterbox.speech._ending import Ending, speech_end
from kvcache_chatterbox.speech._sampling import order


def at_precision(t3: Any, precision: Precision) -> Any:
    """A copy of a T3 that computes in `precision` and shares what does not change: on a CPU all but the backbone."""
    if t3.device.type not in ("cpu", "meta"):  # on the meta device a model is planned for a CPU
        return quantize_linear(t3, precision)
    backbone = quantize_linear(t3.tfmr, precision)
    return structural_copy(t3, lambda name, module: backbone if module is t3.tfmr else None)


class T3Step(nn.Module):
    """From a speech token to the logits of the next, without a number from the host.

    Called with the tokens ``[requests]`` and how many each request has made ``[requests]``, it gives logits
    ``[requests * rows, vocabulary]``.

    Args:
        t3: whose step.
        rows: 2 with guidance.
        precision: of the backbone. The head takes as many bits on a CPU, but no fewer than 16: what it gives is compared.
        onednn: let oneDNN multiply where it is faster; see `kvcache.models.onednn_linear`.
    """

    def __init__(self, t3: Any, rows: int, precision: Precision | None = None, onednn: bool = True) -> None:
        super().__init__()
        self.tfmr = decoder_copy(t3.tfmr)
        self.embed, self.positions = t3.speech_emb, t3.speech_pos_emb
        self.head = t3.speech_head
        if precision not in (None, "fp32") and t3.device.type in ("cpu", "meta"):
            half = "fp16" if precision == "fp16" else "bf16"
            narrow = has_half(half) and is_plain(t3.speech_head)
            self.head = PackedLinear([t3.speech_head], half) if narrow else t3.speech_head
        self.rows = rows
        self._onednn = onednn and precision in (None, "fp32")

    def forward(self, tokens: Tensor, made: Tensor, given: dict[str, Any]) -> Tensor:
        embeds = self.embed(tokens)
        if self.positions is not None:
            embeds = embeds + self.positions.emb(made)
        embeds = embeds[:, None].repeat_interleave(self.rows, 0)
        faster = self._onednn and not torch.compiler.is_dynamo_compiling()
        with onednn_linear(self.tfmr, embeds.shape[0]) if faster else nullcontext():
            hidden = self.tfmr(inputs_embeds=embeds, **given)[0]
            return torch.as_tensor(self.head(hidden[:, -1]))


class Stepper:
    """Runs requests of a T3 on the decode engine.

    Args:
        t3: upstream's T3.
        backend, tf32: see `Decoding`.
        kv_dtype: of the cache; by default the model's.
        precision: what `t3` computes in, see `at_precision`.
        onednn: see `T3Step`.
        bucket, programs: see `Decoding`.
    """

    def __init__(
        self,
        t3: Any,
        backend: BackendName,
        kv_dtype: torch.dtype | None,
        tf32: bool,
        precision: Precision | None,
        onednn: bool,
        bucket: int,
        programs: Programs | None = None,
    ) -> None:
        self._t3, self._programs = t3, programs
        self._from_model = Following(t3, lambda: (geometry_of(t3.tfmr), unsupported_reason(t3.tfmr)))
        self._onednn, self._bucket = onednn, bucket
        self._backend: BackendName = backend
        self._kv_dtype, self._tf32, self._precision = kv_dtype, tf32, precision
        self._pool = Pool(most=1)  # what a plan said is held, and nothing of an earlier text beside it

    @property
    def unsupported_reason(self) -> str | None:
        """Why this T3, as it is now, cannot decode on the engine; None if it can."""
        return self._from_model.now()[1]

    @property
    def _geometry(self) -> CacheGeometry:
        return self._from_model.now()[0]

    def release(self) -> None:
        """Let go of the memory that waits for the next request."""
        self._pool.clear()

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in one cache row, over all layers."""
        return replace(self._geometry, dtype=self._kv_dtype or self._geometry.dtype).token_bytes

    @contextmanager
    def batch(self, places: int, slots: int, compact: bool = True) -> Iterator[Batch]:
        """A batch of so many utterances that decode together, each with so many slots, guided where the model can be."""
        rows = 1 if self._t3.is_gpt else 2

        def make(slots: int) -> Decoding:
            return self.decoding(places, rows, slots)

        signature = self._from_model.watch.signature()
        with self._pool.lent(("batch", places), slots, make, exactly=True, signature=signature) as decoding:
            yield Batch(decoding, compact=compact, check=partial(self._check_same, signature))

    def _check_same(self, signature: Signature) -> None:
        if self._from_model.watch.signature() is not signature:
            raise InputError("the model has changed since this batch was made for it; let it end and make another")

    def job(self, prefill: Callable[[], Prefilled], sampling: Sampling, total: int, generator: torch.Generator) -> Job:
        """One utterance for a batch, which ends as upstream's loop does.

        Args:
            prefill: gives what it begins with.
            sampling, generator: how tokens are drawn.
            total: the most tokens.
        """
        hp, end = self._t3.hp, speech_end(self._t3, total)

        return Job(
            prefill,
            sampling,
            generator,
            end.most,
            ends=end.tokens,
            seen=torch.tensor([hp.start_speech_token]),
            first_may_end=end.first_may_end,
            reset_penalty_after_first=self._t3.is_gpt,  # the start token counts only as long as there is nothing else
            include_stop_token=end.include_stop_token,
        )

    def decoding(self, requests: int, rows: int, slots: int) -> Decoding:
        """What decodes so many requests of so many rows and slots each."""
        t3, device = self._t3, self._t3.device
        kv = StaticKV(self._geometry, requests * rows, slots, dtype=self._kv_dtype)
        rules, watch = {}, None
        if is_checked(t3):
            rules[ALIGNMENT] = AlignmentRule.of(t3, requests)
            watch = HeadWatch(aligned_heads(t3), every=rows)
        named, vocabulary = (*rules, *order(t3.is_gpt)), t3.speech_head.out_features
        sampler = Sampler(requests, vocabulary, named, device, guided=rows == 2, rules=rules)
        step = T3Step(t3, rows, self._precision, self._onednn)
        why_eager = self._from_model.watch.signature().why_no_capture
        return Decoding(
            step,
            kv,
            sampler,
            self._backend,
            watch=watch,
            tf32=self._tf32,
            bucket=self._bucket,
            why_eager=why_eager,
            programs=self._programs,
        )

    def teacher_forced_logits(self, logits: Tensor, cache: Any, ids: Tensor) -> Tensor:
        """The logits ``[n, vocabulary]`` after each of these speech tokens ``[n]``, behind what a cache of one row holds.

        Args:
            logits: of its prefill's last position, ``[1, vocabulary]``.
        """
        layers = kv_layers(cache)
        decoding = self.decoding(1, 1, layers[0].stored + len(ids))
        decoding.load(0, layers)
        decoding.start(0, logits, [GREEDY], [None], [ids[:0]])
        return decoding.teacher_forced_logits(ids)[:, 0]

    def chunks(
        self,
        begun: Prefilled,
        sampling: Sampling,
        ending: Ending,
        size: int,
        generator: torch.Generator | None,
        slots: int,
        exactly: bool,
    ) -> Generator[tuple[Tensor, CacheReport], None, None]:
        """A request's speech tokens ``[1, n]`` as upstream's loop returns them, and the account of its cache.

        Args:
            begun: what it begins with.
            sampling, generator: how tokens are drawn.
            ending: of the request, which has said nothing yet.
            size: tokens in a chunk.
            slots: of the static cache: as many as the request needs, or more.
            exactly: so many; False also takes what waits from an earlier request and has more.
        """
        logits, layers, notes = begun
        t3, rows, end = self._t3, logits.shape[0], ending.end

        def make(slots: int) -> Decoding:
            return self.decoding(1, rows, slots)

        signature = self._from_model.watch.signature()
        with self._pool.lent(rows, slots, make, exactly, signature) as decoding:
            decoding.load(0, layers)
            begin = torch.tensor([t3.hp.start_speech_token], device=logits.device)
            first = decoding.start(0, logits, [sampling], [generator], [begin], [notes])
            if t3.is_gpt:  # penalizes the start token only as long as there is nothing else
                decoding.sampler.penalize(0, first)
            del begun, layers
            for chunk in chunks_of(decoding, TextEnd(end.tokens, end.most, end.first_may_end), size):
                said = ending.take(chunk[0])
                if said.numel():
                    yield said[None], decoding.report()
