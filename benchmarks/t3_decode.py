"""A decode step of Chatterbox's T3, in every way there is to run it: upstream's loop, a static cache, our engine.

Each side is a process of its own, and they take turns of a few tokens. Upstream's `T3.inference` (English, guided: two rows)
and `T3.inference_turbo` (Nano, one row) run unchanged, let through by the progress bar that they iterate over. "StaticCache"
is what speed-ups of Chatterbox do: transformers' static cache of 1500 slots, on a GPU a CUDA graph of the forward pass,
upstream's sampling in Python around it. Our engine runs whole steps, sampling included, and looks at its tokens once a turn.

Weights are random: they decide neither shapes nor speed. The stop token is made impossible, by a bias of the head, on every
side alike. Each side prefills a real request, then its cache is grown to the context: where caches are concatenated, by a few
made-up tokens at a time, as decoding would.

`--ablation` takes the engine's best side and leaves out one ingredient at a time.
"""

import argparse
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from common import (
    arguments,
    chosen,
    finish,
    known,
    memory_option,
    paired_ratio,
    show,
    spread,
    synchronize,
    trace_graphs,
)
from preparing import Preparing
from processes import Failure, Gate, Measured, Phase, Processes
from torch import Tensor, nn
from transformers import StaticCache
from transformers.pytorch_utils import Conv1D
from unending import unending

import kvcache.models._precision
from kvcache.cache import CacheSpec
from kvcache.decoding import BackendName, Decoding, HeadWatch, Sampler, StaticKV
from kvcache.memory import malloc_trim
from kvcache.models import decoding_arguments, geometry_of, kv_layers, new_cache
from kvcache_chatterbox import byte_tokens, load_t3, random_conditionals
from kvcache_chatterbox.prefill import Prefill, check_text, copy_conditionals, embed_speech, prefill
from kvcache_chatterbox.speech import (
    ALIGNMENT,
    AlignmentRule,
    Decoder,
    T3Step,
    aligned_heads,
    at_precision,
    draw,
    is_checked,
    order,
    processors,
    sampling_of,
)
from kvcache_chatterbox.upstream import upstream_t3

TEXT = "The quick brown fox jumps over the lazy dog, and runs away. "  # 60 letters; Nano says the first 16
GROWTH = 8  # tokens at a time
TOKENS_PER_SECOND = 25  # of speech
SLOTS = 2048  # of our caches, as the engine's default has it
STATIC_SLOTS = 1500  # as the branch `faster` of rsxdalv/chatterbox has it
NANO_CONTEXT = 400  # 376 tokens of voice and some text stand before the first token
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}


@dataclass(frozen=True)
class Case:
    """What is run: the same for all sides."""

    variant: str
    device: str
    turn: int  # tokens
    layers: int | None = None
    rehearsed: bool = False  # on a CPU, which then traces what a GPU captures


@dataclass(frozen=True)
class Side:
    """One way to run it."""

    label: str
    kind: str  # of KINDS
    precision: str = "fp32"
    backend: str = "eager"
    kv: str | None = None  # of the cache; by default as the engine chooses
    chunk: int | None = None  # tokens between two looks at the host; by default a turn's
    our_cache: bool = False
    together: bool = True  # one product for queries, keys and values, and for gate and up
    narrow_head: bool = True  # on a CPU, in bf16 where the backbone is not in fp32
    sampler: bool = True  # on the device
    cpp_wrapper: bool = True
    kernel: bool = True
    checked: bool = True  # by the alignment of the multilingual model
    variant: str | None = None  # by default the case's

    @property
    def head(self) -> Any:
        """What decides the head's precision in the engine."""
        return self.precision if self.narrow_head and self.kind == "engine" else None

    @property
    def kv_precision(self) -> str:
        """Of the cache."""
        wide = "fp32" if self.precision in ("fp32", "int8") else self.precision
        if self.kind == "engine":
            return self.kv or ("bf16" if self.precision in ("bf16", "int8") else wide)
        return wide


UPSTREAM = "upstream"
SIDES = {
    "upstream": Side("upstream's loop", "upstream"),
    "upstream-cache": Side("upstream's loop, our cache", "upstream", our_cache=True),
    "static": Side("StaticCache", "static"),
    **{
        f"{backend}-{precision}": Side(f"ours, {backend}", "engine", precision, backend)
        for precision in ("fp32", "bf16", "int8")
        for backend in ("eager", "compile")
    },
}
# Of the multilingual model: what its check costs, and what English takes beside it.
CHECKS = {
    f"{what}{backend}-{precision}": replace(
        SIDES[f"{backend}-{precision}"], label=f"ours, {backend}, {label}", **change
    )
    for backend, precision in (("eager", "fp32"), ("compile", "int8"))
    for what, label, change in (
        ("unchecked-", "without the check", {"checked": False}),
        ("english-", "English", {"variant": "english"}),
    )
}
GPU_SIDES = {
    "upstream": SIDES["upstream"],
    "upstream-bf16": replace(SIDES["upstream"], precision="bf16"),
    "upstream-cache-bf16": replace(SIDES["upstream-cache"], precision="bf16"),
    "static": Side("StaticCache + graph of the forward", "static"),
    "static-bf16": Side("StaticCache + graph of the forward", "static", "bf16"),
    "graph-fp32": Side("ours, graph", "engine", backend="graph"),
    **{
        f"{backend}-bf16": Side(f"ours, {backend}", "engine", "bf16", backend)
        for backend in ("eager", "graph", "compile", "graph+compile")
    },
}


def ablations(device: str) -> dict[str, Side]:
    """The best side, and what it is without each of its ingredients."""
    if device == "cpu":
        best = Side("the best: compile, int8", "engine", "int8", "compile")
        others = [
            replace(best, label="the token loop instead of the engine", kind="loop"),
            replace(best, label="eager instead of compile", backend="eager"),
            replace(best, label="bf16 instead of int8", precision="bf16"),
            replace(best, label="fp32 instead of int8", precision="fp32", kv="bf16"),
            replace(best, label="fp32 cache instead of bf16", kv="fp32"),
            replace(best, label="torch's attention instead of reductions", kernel=False),
            replace(best, label="a product each for q, k, v, gate, up", together=False),
            replace(best, label="fp32 head instead of bf16", narrow_head=False),
            replace(best, label="transformers' sampling, a look per token", sampler=False, chunk=1),
            replace(best, label="without cpp_wrapper", cpp_wrapper=False),
            replace(best, label="a look per token", chunk=1),
        ]
    else:
        best = Side("the best: graph+compile, bf16", "engine", "bf16", "graph+compile")
        others = [
            replace(best, label="the token loop instead of the engine", kind="loop"),
            replace(best, label="eager instead of graph+compile", backend="eager"),
            replace(best, label="without the compiler", backend="graph"),
            replace(best, label="without the graph", backend="compile"),
            replace(best, label="fp32 instead of bf16", precision="fp32", kv="bf16"),
            replace(best, label="fp32 cache instead of bf16", kv="fp32"),
            replace(best, label="torch's attention instead of the Triton kernel", kernel=False),
            replace(best, label="transformers' sampling, a look per token", sampler=False, chunk=1),
            replace(best, label="a look per token", chunk=1),
        ]
    return {side.label: side for side in (best, *others)}


# ---------------------------------------------------------------------- the model


@dataclass
class Model:
    """What a side works with.

    Attributes:
        t3: with a head that never stops.
        voice: not to be written to by two requests.
        text: in as many rows as it takes.
        weights: bytes of backbone and head.
        per_token: bytes of a token's keys and values, in all rows.
    """

    t3: Any
    voice: Any
    text: Tensor
    weights: int
    per_token: int

    def request(self) -> Prefill:
        with torch.inference_mode():
            return prefill(self.t3, self.t3.prepare_conditioning(self.voice), self.text)

    def is_stop(self, token: Tensor) -> bool:
        """A look at the device, as every loop takes it."""
        return bool(int(token) == self.t3.hp.stop_speech_token)


def make(case: Case, side: Side) -> Model:
    """The model of a side."""
    t3 = load_t3(side.variant or case.variant)  # type: ignore[arg-type]
    if case.layers is not None:
        name = "h" if t3.is_gpt else "layers"
        setattr(t3.tfmr, name, getattr(t3.tfmr, name)[: case.layers])
        t3.cfg.num_hidden_layers = t3.tfmr.config.num_hidden_layers = case.layers
    head = nn.Linear(t3.dim, t3.speech_head.out_features)
    with torch.no_grad():
        head.weight.copy_(t3.speech_head.weight)
        head.bias.zero_() if t3.speech_head.bias is None else head.bias.copy_(t3.speech_head.bias)
        head.bias[t3.hp.stop_speech_token] = -1e4
    t3.speech_head = head.eval()
    t3 = t3.to(case.device)
    backbone = sum(m.weight.numel() for m in t3.tfmr.modules() if isinstance(m, nn.Linear | Conv1D))
    on_cpu = case.device == "cpu"
    head_bytes = BYTES["fp32" if on_cpu and side.head in (None, "fp32") else "bf16" if on_cpu else side.precision]
    weights = backbone * BYTES[side.precision] + head.weight.numel() * head_bytes
    geometry = geometry_of(t3.tfmr)
    states = geometry.layers * geometry.kv_heads * (geometry.head_dim + geometry.value_dim)
    if side.precision != "fp32":
        t3 = at_precision(t3, side.precision)  # type: ignore[arg-type]
    voice = copy_conditionals(t3, random_conditionals(t3))
    text = check_text(t3, byte_tokens(t3, TEXT[:16] if t3.is_gpt else TEXT), guided=not t3.is_gpt)
    return Model(t3, voice, text, weights, text.shape[0] * states * BYTES[side.kv_precision])


@torch.inference_mode()
def grow(cache: Any, t3: Any, context: int) -> None:
    """Fill a cache up to `context` tokens as decoding would, a few at a time."""
    geometry = geometry_of(t3.tfmr)
    rows = 1 if t3.is_gpt else 2
    while (missing := context - int(cache.get_seq_length())) > 0:
        new = (rows, geometry.kv_heads, min(GROWTH, missing), geometry.head_dim)
        for layer in range(geometry.layers):
            states = torch.randn(2, *new, device=t3.device, dtype=geometry.dtype)
            cache.update(states[0], states[1], layer)


# ---------------------------------------------------------------------- the sides


def upstream(turn: Callable[[], None], told: Callable[[Callable[[int], None]], None], model: Model, side: Side) -> None:
    """Upstream's own loop, on its cache or on ours."""
    t3, caches = model.t3, []

    def given(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        cache = kwargs.get("past_key_values")
        if cache is None and side.our_cache:
            cache = our_cache(t3)
        caches.append(cache)
        return args, kwargs | {"past_key_values": cache}

    def gated(steps: Iterable[int], **_: Any) -> Iterator[int]:
        for i in steps:
            if i >= 2:  # the cache has been handed on by now
                if i == 2:
                    told(lambda context: grow(caches[-1], t3, context))
                turn()
            yield i

    t3.tfmr.register_forward_pre_hook(given, with_kwargs=True)
    upstream_t3().tqdm = gated
    run_upstream(model, 4000)


def our_cache(t3: Any) -> Any:
    return new_cache(t3.tfmr, CacheSpec(max_length=SLOTS, static=True), rows=1 if t3.is_gpt else 2)


def run_upstream(model: Model, tokens: int) -> Tensor:
    """What upstream says under seed 0."""
    t3 = model.t3
    torch.manual_seed(0)
    if t3.is_gpt:
        return torch.as_tensor(t3.inference_turbo(model.voice, model.text, max_gen_len=tokens - 1))
    return torch.as_tensor(t3.inference(t3_cond=model.voice, text_tokens=model.text.clone(), max_new_tokens=tokens))


class Static:
    """transformers' static cache under upstream's sampling; on a GPU the forward pass is a CUDA graph."""

    def __init__(self, model: Model) -> None:
        t3 = self.t3 = model.t3
        self.model = model
        self.sampling = sampling_of(t3.is_gpt, {})
        self.processors = processors(self.sampling, t3.is_gpt)
        self.rows = model.text.shape[0]
        self.cache = StaticCache(config=t3.tfmr.config, max_cache_len=STATIC_SLOTS)
        self.replay: Callable[[], None] | None = None
        self.replayed: Tensor
        self.captured: float | None = None  # seconds

    @torch.inference_mode()
    def begin(self) -> Tensor:
        """The first token."""
        t3 = self.t3
        embeds = self.model.request().embeds
        hidden = t3.tfmr(inputs_embeds=embeds, past_key_values=self.cache, use_cache=True)[0]
        self.slots = torch.arange(STATIC_SLOTS, device=t3.device)
        self.position = torch.full((self.rows, 1), embeds.shape[1], device=t3.device)
        self.embeds = torch.zeros_like(embeds[:, :1])
        self.logits: Tensor = t3.speech_head(hidden[:, -1])
        self.ids = torch.full((1, 1), t3.hp.start_speech_token, device=t3.device)
        if t3.device.type == "cuda":
            synchronize()
            start = time.perf_counter()
            self.capture()
            synchronize()
            self.captured = time.perf_counter() - start
        return self.draw()

    def forward(self) -> None:
        """From `embeds` to `logits`, nothing else of which moves in memory."""
        hidden = self.t3.tfmr(
            inputs_embeds=self.embeds,
            attention_mask=(self.slots <= self.position)[:, None, None],
            **decoding_arguments(self.cache, self.position),
        )[0]
        self.logits = self.t3.speech_head(hidden[:, -1])
        self.position.add_(1)

    def capture(self) -> None:
        first, length = self.logits, int(self.position[0])
        stream: Any = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.forward()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.forward()
        self.replay, self.replayed = graph.replay, self.logits
        self.reach(length, fill=False)
        self.logits = first

    @torch.inference_mode()
    def reach(self, context: int, fill: bool = True) -> None:
        """Hold so many tokens."""
        before = int(self.position[0])
        layer: Any
        for layer in self.cache.layers:
            if fill:
                layer.keys[:, :, before:context].normal_()
                layer.values[:, :, before:context].normal_()
            if hasattr(layer, "cumulative_length"):  # not up to 5.3
                layer.cumulative_length.fill_(context)
        self.position.fill_(context)

    @torch.inference_mode()
    def draw(self) -> Tensor:
        logits = self.logits.float()
        if self.rows == 2:
            logits = logits[:1] + self.sampling.cfg_weight * (logits[:1] - logits[1:])
        ids = self.ids[:, 1:] if self.t3.is_gpt and self.ids.shape[1] > 1 else self.ids
        for processor in self.processors:
            logits = processor(ids, logits)
        token = draw(logits, None)
        self.ids = torch.cat([self.ids, token], 1)
        self.model.is_stop(token)
        return token

    @torch.inference_mode()
    def step(self) -> Tensor:
        """The next token."""
        embeds = embed_speech(self.t3, self.ids[:, -1:], self.ids.shape[1] - 1)
        self.embeds.copy_(embeds.expand(self.rows, -1, -1))
        if self.replay is None:
            self.forward()
        else:
            self.replay()
            self.logits = self.replayed
        return self.draw()


class HostSampler(Sampler):
    """Leaves the logits to the host."""

    @property
    def draws(self) -> bool:
        return False

    def __call__(self, logits: Tensor, noise: Tensor, draws: bool = True, which: slice = slice(None)) -> Tensor:
        if not hasattr(self, "logits"):
            with torch.inference_mode(False):
                self.logits = torch.zeros_like(logits)
                self.none = torch.zeros(1, dtype=torch.long, device=logits.device)
        self.logits.copy_(logits)
        return self.none


class Engine:
    """The decode engine, as the Chatterbox adapter runs it."""

    def __init__(self, model: Model, side: Side) -> None:
        self.model, self.side = model, side
        t3 = self.t3 = model.t3
        self.sampling = sampling_of(t3.is_gpt, {})
        self.processors = processors(self.sampling, t3.is_gpt)
        rows = model.text.shape[0]
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[side.kv_precision]
        self.kv = StaticKV(geometry_of(t3.tfmr), rows, SLOTS, dtype=dtype)
        kind = Sampler if side.sampler else HostSampler
        rules: dict[str, Any] = {}
        if is_checked(t3) and side.checked:
            rules[ALIGNMENT] = AlignmentRule.of(t3, 1)
        watch = HeadWatch(aligned_heads(t3), every=rows) if rules else None
        named = (*rules, *order(t3.is_gpt))
        sampler = kind(1, t3.speech_head.out_features, named, t3.device, guided=rows == 2, rules=rules)
        step, backend = T3Step(t3, rows, side.head), cast(BackendName, side.backend)
        self.decoding = Decoding(step, self.kv, sampler, backend, watch=watch, kernel=side.kernel)
        if not side.cpp_wrapper:
            self.decoding._backend._options = {}  # type: ignore[attr-defined]
        self.ids = torch.full((1, 1), t3.hp.start_speech_token, device=t3.device)

    def begin(self) -> Tensor:
        """The first token."""
        cache = new_cache(self.t3.tfmr, CacheSpec(max_length=SLOTS), rows=self.kv.rows)
        decoder = Decoder(self.t3, self.model.request(), self.sampling, 1, cache, None)
        logits = decoder.prefill()
        self.kv.load(0, kv_layers(cache))
        sampling = self.sampling if self.side.sampler else replace(self.sampling, temperature=0)  # takes no noise
        first = self.decoding.start(0, logits, [sampling], [None], [self.ids[0]], [decoder.notes])
        if self.t3.is_gpt:
            self.decoding.sampler.penalize(0, first)
        return first if self.side.sampler else self.draw()[0]

    @torch.no_grad()
    def reach(self, context: int) -> None:
        """Hold so many tokens."""
        before = self.kv.seen[0]
        for states in (*self.kv.keys, *self.kv.values):
            states[:, :, before:context].normal_()
        self.kv.length.fill_(context)
        self.kv.seen = [context] * self.kv.rows

    def turn(self, tokens: int) -> Tensor:
        """The next tokens ``[1, n]``, with a look at the host after each chunk."""
        size = self.side.chunk or tokens
        chunks = []
        for _ in range(0, tokens, size):
            chunks.append(self.decoding.chunk(size))
            if not self.side.sampler:
                chunks[-1] = self.draw()
            self.model.is_stop(chunks[-1][0, -1])
        if self.decoding.fallback is not None:
            raise RuntimeError(f"{self.side.label}: {self.decoding.fallback}")
        return torch.cat(chunks, 1)

    @torch.inference_mode()
    def draw(self) -> Tensor:
        """What transformers' processors make of the logits, put where the next step looks for it."""
        logits = self.decoding.sampler.logits.float()  # type: ignore[attr-defined]
        if self.kv.rows == 2:
            logits = logits[:1] + self.sampling.cfg_weight * (logits[:1] - logits[1:])
        ids = self.ids[:, 1:] if self.t3.is_gpt and self.ids.shape[1] > 1 else self.ids
        for processor in self.processors:
            logits = processor(ids, logits)
        token = draw(logits, None)
        self.ids = torch.cat([self.ids, token], 1)
        self.decoding.token.copy_(token[0])
        return token


def serve(gate: Gate, case: Case, side: Side) -> None:
    """Run a side, a turn at a time."""
    logging.getLogger("chatterbox").setLevel(logging.ERROR)
    trace_graphs(case.rehearsed)
    if not side.together:
        kvcache.models._precision._TOGETHER = ()  # type: ignore[assignment]
    if case.variant == "multilingual":
        unending()
    model = make(case, side)
    if case.device != "cpu":
        torch.cuda.reset_peak_memory_stats()  # the weights' way through fp32 is not what decoding takes
    gate.notes |= {"weights": model.weights, "per token": model.per_token}
    torch.manual_seed(0)
    if side.kind == "engine":
        preparing = Preparing()
        engine = Engine(model, side)
        engine.begin()
        synchronize()
        start = time.perf_counter()
        engine.turn(side.chunk or case.turn)
        synchronize()
        gate.notes["first"] = time.perf_counter() - start
        gate.told = engine.reach
        while True:
            gate.notes |= preparing.notes()
            gate()
            engine.turn(case.turn)
    elif side.kind == "static":
        static = Static(model)
        static.begin()
        gate.notes |= {"capture, s": static.captured, "captures": static.captured and 1}
        gate.told = static.reach
        while True:
            gate()
            for _ in range(case.turn):
                static.step()
    elif side.kind == "loop":
        cache = our_cache(model.t3)
        sampling = sampling_of(model.t3.is_gpt, {})
        tokens = Decoder(model.t3, model.request(), sampling, 4000, cache, None).tokens()
        next(tokens)  # the prefill
        next(tokens)
        gate.told = lambda context: grow(cache, model.t3, context)
        while True:
            gate()
            for _ in range(case.turn):
                next(tokens)
    else:
        made = 0

        def step() -> None:
            nonlocal made
            if made % case.turn == 0:
                gate()
            made += 1

        upstream(step, lambda told: setattr(gate, "told", told), model, side)


def check(case: Case) -> None:
    """Upstream's loop, on its cache and on ours, the static cache and our engine say the same, in fp32 on a CPU."""
    tokens, side = 12, SIDES[UPSTREAM]
    expected = run_upstream(make(case, side), tokens)[0].tolist()
    model = make(case, side)
    model.t3.tfmr.register_forward_pre_hook(
        lambda module, args, kwargs: (
            (args, kwargs | {"past_key_values": our_cache(model.t3)}) if kwargs.get("past_key_values") is None else None
        ),
        with_kwargs=True,
    )
    said = {"upstream's loop, our cache": run_upstream(model, tokens)[0].tolist()}
    static = Static(make(case, side))
    torch.manual_seed(0)
    said["StaticCache"] = [int(static.begin()), *(int(static.step()) for _ in range(tokens - 1))]
    for label, ours in {
        "ours": SIDES["eager-fp32"],
        "ours, sampler on the host": replace(SIDES["eager-fp32"], sampler=False, chunk=1),
    }.items():
        engine = Engine(make(case, ours), ours)
        torch.manual_seed(0)
        said[label] = [int(engine.begin()), *engine.turn(tokens - 1)[0].tolist()]
    for name, got in said.items():
        assert got == expected, f"{case.variant}: {name} says {got}, upstream {expected}"


# ---------------------------------------------------------------------- measuring


def bandwidth(device: str) -> float:
    """Bytes per second that a large copy reads and writes: the best of several."""
    source = torch.ones(2**28, device=device)  # 1 GiB
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(8):
        start = time.perf_counter()
        target.copy_(source)
        if device != "cpu":
            torch.cuda.synchronize()
        best = max(best, 2 * source.nbytes / (time.perf_counter() - start))
    return best


def measure(
    case: Case, sides: dict[str, Side], contexts: list[int], options: argparse.Namespace, speed: float
) -> tuple[list[dict[str, Any]], Measured]:
    """A row for each side and context, and what was measured, a phase for each context."""
    base = next((key for key in (UPSTREAM, f"{UPSTREAM}-bf16") if key in sides), None)
    measured = Processes(
        {key: (serve, case, side) for key, side in sides.items()},
        options.threads,
        memory=options.memory,
        reference=base,
        together=options.prepare_together,
    ).run([Phase(options.steps, warmup=1, word=context) for context in contexts])
    rows = []
    for phase, context in enumerate(contexts):
        for key, side in sides.items():
            note = measured.notes.get(key, {})
            ms = spread([1e3 * value / case.turn for value in measured.seconds(key, phase)])
            there = ms["median"] is not None
            floor = 1e3 * (note["weights"] + note["per token"] * context) / speed if there else None
            rows.append(
                {
                    "variant": case.variant,
                    "side": side.label,
                    "precision": side.precision,
                    "context": context,
                    "ms/token": ms["median"],
                    "q1": ms["q1"],
                    "q3": ms["q3"],
                    "turns": ms["n"],
                    "tokens/s": 1e3 / ms["median"] if there else None,
                    "RTF": ms["median"] / 1e3 * TOKENS_PER_SECOND if there else None,
                    "upstream / this": None if base is None else measured.ratio(base, key, paired_ratio, phase),
                    "floor, %": None if floor is None else 100 * floor / ms["median"],
                    "peak MiB": note.get("GPU MiB, peak", note.get("MiB, peak")),
                    "resident MiB": note.get("MiB"),
                    "first turn, s": note["first"] if side.backend != "eager" and "first" in note else None,
                    **{name: note.get(name) for name in ("compile, s", "capture, s", "captures")},
                    **measured.mark(key),
                }
            )
    return rows, measured


def best_ratio(at: tuple[Measured, int] | None, keys: Iterable[str], over: str) -> float | None:
    """How many times longer `over` takes than the best of `keys`, in a phase."""
    if at is None:
        return None
    measured, phase = at
    found = known({key: measured.ratio(over, key, paired_ratio, phase) for key in keys})
    return max(found.values(), default=None)


def ratios_of(device: str, at: dict[tuple[str, int], tuple[Measured, int]]) -> dict[str, float]:
    """Of what was measured of each variant and context."""
    english, nano = at.get(("english", 900)), at.get(("nano", NANO_CONTEXT))
    multilingual = at.get(("multilingual", 900))
    if device == "cpu":
        ours = [key for key, side in SIDES.items() if side.kind == "engine"]
        return known(
            {
                "t3_520m_fp32": best_ratio(english, [key for key in ours if "fp32" in key], UPSTREAM),
                "t3_520m_best": best_ratio(english, ours, UPSTREAM),
                "nano_best": best_ratio(nano, ours, UPSTREAM),
                "multilingual_best": best_ratio(multilingual, ours, UPSTREAM),
                "multilingual_step_over_english": best_ratio(multilingual, ["english-compile-int8"], "compile-int8"),
                "multilingual_check": best_ratio(multilingual, ["unchecked-compile-int8"], "compile-int8"),
            }
        )
    graphs = ("graph-bf16", "graph+compile-bf16")
    return known(
        {
            "gpu_graph_over_upstream": best_ratio(english, graphs, "upstream-bf16"),
            "gpu_graph_over_static_graph": best_ratio(english, graphs, "static-bf16"),
            "gpu_graph_over_eager": best_ratio(english, graphs, "eager-bf16"),
            "gpu_nano_graph_over_upstream": best_ratio(nano, graphs, "upstream-bf16"),
        }
    )


def without_ingredients(rows: list[dict[str, Any]], measured: Measured) -> list[dict[str, Any]]:
    """Each row with what it takes over the best's, in the medians."""
    best = measured.reference
    over: Callable[[Sequence[float], Sequence[float]], float] = lambda a, b: median(a) / median(b)  # noqa: E731
    return [
        {name: value for name, value in row.items() if name != "upstream / this"}
        | {"cost": measured.ratio(row["side"], best, over)}
        for row in rows
    ]


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Bars of the time per token, a panel for each variant and context."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise SystemExit("--plot needs matplotlib; run pip install 'kvcache[bench]'") from error
    panels = sorted({(row["variant"], row["context"]) for row in rows})
    longest = max(sum((row["variant"], row["context"]) == panel for row in rows) for panel in panels)
    across = max(len([p for p in panels if p[0] == variant]) for variant, _ in panels)
    down = -(-len(panels) // across)
    size = 4.6 * across, down * (1.0 + 0.32 * longest)
    figure, axes = pyplot.subplots(down, across, figsize=size, squeeze=False, sharey=True, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, panel in zip(axes.flat, panels, strict=False):
        chosen = [row for row in rows if (row["variant"], row["context"]) == panel]
        names = [f"{row['side']}, {row['precision']}" for row in chosen]
        colors = ["tab:blue" if row["side"].startswith("ours") else "tab:gray" for row in chosen]
        bars = axis.barh(names, [row["ms/token"] for row in chosen], color=colors)
        axis.bar_label(bars, fmt="%.3g", padding=3)
        axis.margins(x=0.14)
        axis.set_xlabel("ms per token")
        axis.set_title(f"T3 {panel[0]}, {panel[1]} tokens of context")
    axes[0, 0].invert_yaxis()  # which they share
    figure.savefig(file, dpi=110)


def options_of() -> argparse.Namespace:
    parser = arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("--variant", choices=("english", "nano", "multilingual", "all"), default="all")
    parser.add_argument(
        "--contexts", default="100,500,900", help="tokens in the cache at the first step (default: 100,500,900)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--steps", type=int, default=8, help="timed turns of each side and context (default: 8)")
    parser.add_argument("--turn", type=int, default=10, help="tokens in a turn (default: 10)")
    parser.add_argument("--sides", help=f"some of {', '.join(SIDES)}; on a GPU {', '.join(GPU_SIDES)}")
    parser.add_argument("--ablation", action="store_true", help="also leave out one ingredient of the best at a time")
    parser.add_argument("--layers", type=int, help="only so many of the backbone's, for a quick check")
    memory_option(parser)
    parser.add_argument(
        "--prepare-together", action="store_true", help="prepare all sides at once, where cores and memory allow it"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the times there (PNG, PDF or SVG)")
    options: argparse.Namespace = parser.parse_args()
    trace_graphs(options.quick or options.rehearsal)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.quick:
        options.steps, options.turn, options.contexts = 2, 3, "110,400"
        options.layers = options.layers or (14 if options.variant == "multilingual" else 2)  # which its check looks at
        options.sides = options.sides or "upstream,upstream-cache,static,eager-fp32,compile-int8"
    return options


def main() -> None:
    options = options_of()
    torch.set_num_threads(options.threads)
    every = GPU_SIDES | SIDES if options.device == "cpu" else SIDES | GPU_SIDES
    usual = list(SIDES if options.device == "cpu" else GPU_SIDES)
    if options.variant == "multilingual":
        every, usual = every | CHECKS, [*usual, *CHECKS]
    sides = chosen(every, ",".join(usual) if options.sides is None else options.sides)
    variants = ("english", "nano") if options.variant == "all" else (options.variant,)
    contexts = sorted({int(context) for context in options.contexts.split(",")})
    speed = bandwidth(options.device)
    rows: list[dict[str, Any]] = []
    ablation: list[dict[str, Any]] = []
    at: dict[tuple[str, int], tuple[Measured, int]] = {}
    failed: dict[str, Failure] = {}
    facts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", folder)  # nothing is found compiled
        for variant in variants:
            case = Case(variant, options.device, options.turn, options.layers, options.quick or options.rehearsal)
            if options.quick:
                check(replace(case, device="cpu"))
                malloc_trim()  # its models, which glibc would keep beside the sides
            reached = contexts
            if variant == "nano":  # whose prefill alone takes nearly so many
                reached = sorted({NANO_CONTEXT, *(context for context in contexts if context > NANO_CONTEXT)})
            found, measured = measure(case, sides, reached, options, speed)
            at |= {(variant, context): (measured, phase) for phase, context in enumerate(reached)}
            rows += found
            took = {variant: measured}
            if options.ablation:
                found, measured = measure(case, ablations(options.device), reached[-1:], options, speed)
                ablation += without_ingredients(found, measured)
                took[f"{variant}, ablation"] = measured
            facts |= {what: one.facts() for what, one in took.items()}
            failed |= {f"{what}, {key}": why for what, one in took.items() for key, why in one.failed.items()}
    more: dict[str, Any] = {"copy, GB/s": speed / 1e9, "weights": "random", "sides": list(sides), "memory": facts}
    if options.device == "cpu":
        more["gpu"] = "not yet measured"
    if options.prepare_together:
        more["prepared"] = "together: compile and capture times are those of sides that share the cores"
    if ablation:
        more["ablation"] = ablation
        show("t3_decode, one ingredient of the best left out", ablation)
    # Ratios are of the whole model.
    ratios = ratios_of(options.device, at) if options.layers is None else {}
    try:
        finish("t3_decode", rows, ratios, options, failed, **more)
    finally:  # it ends the script if a side has failed
        if options.plot is not None:
            plot([row for row in rows if row["ms/token"] is not None], options.plot)


if __name__ == "__main__":
    main()
