"""All that is to be measured on a GPU, in order of worth and in at most ten minutes; see docs/gpu.md.

    python benchmarks/gpu.py                 # on a bare machine with a GPU, torch and transformers; no network is needed
    python benchmarks/gpu.py --rehearse      # the same timetable on a CPU, small: it measures nothing, and says so

Each step is a process with a limit of its own. What became of it is in `gpu.json` as soon as it ends; a second run goes on
where the first one stopped. Wheels that the machine lacks come from a folder that `make gpu-wheels` filled elsewhere.
"""
# Not by `make bench`: it runs others; `make gpu` does.

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from carry import CHECKED, ROOT, carried_commit, code_digest, pinned
from timetable import Results, Step, line, run_all

LONG = 1800.0  # seconds of a rehearsal's step, whose machine may have other things to do
DEADLINE = 585  # seconds from the start
STARTING = 15  # of them until the first step: what the machine is
T3 = ("chatterbox-tts", "sentencex")
S3GEN = tuple(pinned())
FIRST_SIDES = "upstream,upstream-bf16,static-bf16,eager-bf16,graph-bf16"
COMPILED_SIDES = "graph-bf16,compile-bf16,graph+compile-bf16"
FACTS = """
import common, json, subprocess, torch, transformers
gpu = torch.cuda.is_available()
said = None
if gpu:
    asked = "--query-gpu=name,driver_version,memory.total,clocks.max.sm", "--format=csv,noheader"
    said = subprocess.run(["nvidia-smi", *asked], capture_output=True, text=True).stdout.strip()
try:
    import triton
    triton = triton.__version__
except ImportError as error:
    triton = str(error)
memory = torch.cuda.get_device_properties(0).total_memory / 2**30 if gpu else None
installed = {name: common.versions()[name] for name in ("python", "torch", "transformers")}
print(json.dumps({"machine": common.machine(), "versions": {**installed, "triton": triton, "cuda": torch.version.cuda},
                  "commit": common.commit(), "cuda": gpu, "nvidia-smi": said, "gpu_memory_gib": memory}))
"""


def timetable(results: Path, wheels: Path, site: Path, without: Sequence[str]) -> list[Step]:
    """The steps on a GPU, the most worthwhile first."""
    return [
        _install(50, wheels, site, without),
        Step("tests", 90, _pytest("-n", "8", "--timeout=80")),
        _benchmark("t3_english", "t3_decode", 90, results, T3, "--device", "cuda", "--variant", "english",
                   "--contexts", "100,900", "--sides", FIRST_SIDES, "--prepare-together"),
        _benchmark("s3gen", "s3gen", 60, results, S3GEN, "--device", "cuda"),
        _benchmark("first_audio", "first_audio", 85, results, S3GEN, "--device", "cuda"),
        _benchmark("t3_compiled", "t3_decode", 90, results, T3, "--device", "cuda", "--variant", "english",
                   "--contexts", "100,900", "--sides", COMPILED_SIDES, "--prepare-together"),
        _benchmark("t3_nano", "t3_decode", 75, results, T3, "--device", "cuda", "--variant", "nano", "--contexts", "900",
                   "--sides", f"{FIRST_SIDES},compile-bf16,graph+compile-bf16", "--prepare-together"),
        _benchmark("llm_decode", "llm_decode", 30, results, (), "--device", "cuda"),
    ]  # fmt: skip


def rehearsal(results: Path, wheels: Path, site: Path, without: Sequence[str]) -> list[Step]:
    """The same steps on a CPU, small, without what a CPU cannot do; each may take longer, since nothing is lent."""
    small = ("--device", "cpu", "--threads", "1", "--quick", "--rehearsal")
    nano = (*small, "--variant", "nano", "--sides")
    return [
        _install(LONG, wheels, site, without),
        Step("tests", LONG, _pytest("-n", "0")),
        _benchmark("t3_english", "t3_decode", LONG, results, T3, *nano, "upstream-bf16,static-bf16,graph-bf16"),
        _benchmark("s3gen", "s3gen", LONG, results, S3GEN, *small),
        _benchmark("first_audio", "first_audio", LONG, results, S3GEN, *small),
        _benchmark("t3_compiled", "t3_decode", LONG, results, T3, *nano, "compile-bf16"),
        _benchmark("t3_nano", "t3_decode", LONG, results, T3, *nano, "upstream,eager-bf16"),
        _benchmark("llm_decode", "llm_decode", LONG, results, (), *small),
    ]


def _install(limit: float, wheels: Path, site: Path, without: Sequence[str]) -> Step:
    command = (
        sys.executable,
        str(ROOT / "benchmarks/carry.py"),
        "install",
        str(wheels),
        str(site),
        "--without",
        *without,
    )
    return Step("wheels", limit, command, always=True)


def _pytest(*options: str) -> tuple[str, ...]:
    tests = (str(ROOT / "tests" / name) for name in ("test_gpu.py", "test_kernel.py"))
    return (sys.executable, "-m", "pytest", *options, "--durations=5", *tests)


def _benchmark(name: str, script: str, limit: float, results: Path, needs: tuple[str, ...], *options: str) -> Step:
    file = str(ROOT / f"benchmarks/{script}.py")
    return Step(name, limit, (sys.executable, file, *options, "--json", str(results / f"{name}.json")), needs)


def environment_of(site: Path, wheels: Path, needs: Sequence[str] = ()) -> dict[str, str]:
    """What a step sees: this tree, T3's wheels, others that it needs, and nothing that looks for a network."""
    wanted = dict.fromkeys((*T3, *needs))  # GPU tests use T3's where they are
    paths = [ROOT, ROOT / "adapters", ROOT / "benchmarks", *(site / name for name in wanted)]
    before = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    commit = carried_commit(wheels)
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*map(str, paths), *before]),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        **({} if commit is None else {"KVCACHE_COMMIT": commit}),
    }


def facts(environment: Mapping[str, str], seconds: float) -> dict[str, Any]:
    """What this machine is, from a process of its own, so that none of the GPU's memory is held here.

    Raises:
        SystemExit: if torch or transformers do not work, or take longer than so many seconds to start.
    """
    command = [sys.executable, "-c", FACTS]
    try:
        done = subprocess.run(command, env=dict(environment), cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise SystemExit(f"torch and transformers did not start within {seconds:g} s: run this again") from error
    if done.returncode:
        raise SystemExit(
            f"{sys.executable} cannot run this: {done.stderr.strip().splitlines()[-1]}; name another with make gpu PY=python3"
        )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def injected(steps: Sequence[Step], faults: str) -> list[Step]:
    """The steps with faults put in: ``fail=STEP`` and ``hang=STEP``, to see what becomes of the others."""
    kinds = dict(fault.split("=", 1) for fault in faults.split(",") if fault)
    for kind in ("fail", "hang"):
        if kind in kinds and kinds[kind] not in {step.name for step in steps}:
            raise SystemExit(f"--inject: there is no step {kinds[kind]!r} to {kind}; there are {_names(steps)}")
    child = (
        "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import threading; threading.Event().wait()'])"
    )
    broken = {
        kinds.get("fail"): {"command": (sys.executable, "-c", "raise SystemExit('a fault that was put in')")},
        kinds.get("hang"): {"command": (sys.executable, "-c", child), "limit": 3.0},
    }
    return [replace(step, **broken.get(step.name, {})) for step in steps]  # type: ignore[arg-type]


def _names(steps: Sequence[Step]) -> str:
    return ", ".join(step.name for step in steps)


def options_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, small: measures nothing")
    parser.add_argument("--results", type=Path, help="a folder for them (default: out/gpu, or out/rehearsal)")
    parser.add_argument(
        "--wheels", type=Path, default=ROOT / ".wheels", help="what was carried along (default: .wheels)"
    )
    parser.add_argument("--site", type=Path, default=ROOT / ".gpu-site", help="where they go (default: .gpu-site)")
    parser.add_argument("--only", metavar="STEPS", help="some of the steps, with commas between")
    parser.add_argument("--again", action="store_true", help="run steps that have passed as well")
    parser.add_argument("--seconds", type=float, help=f"for all (default: {DEADLINE}; of a rehearsal, two hours)")
    parser.add_argument(
        "--inject", default="", metavar="FAULTS", help="fail=STEP,hang=STEP,missing=WHEEL; rehearsals only"
    )
    options: argparse.Namespace = parser.parse_args()
    options.results = options.results or ROOT / "out" / ("rehearsal" if options.rehearse else "gpu")
    options.results, options.wheels, options.site = (
        path.resolve() for path in (options.results, options.wheels, options.site)
    )
    options.seconds = options.seconds or (4 * LONG if options.rehearse else DEADLINE)
    if options.inject and not options.rehearse:
        raise SystemExit("--inject puts faults in, which belongs into a rehearsal: add --rehearse")
    return options


def chosen(steps: list[Step], only: str | None) -> list[Step]:
    """The steps that were asked for, and the wheels, without which the others have nothing."""
    if only is None:
        return steps
    wanted = {"wheels", *only.split(",")}
    if unknown := wanted - {step.name for step in steps}:
        raise SystemExit(f"--only: there is no step {', '.join(sorted(unknown))}; there are {_names(steps)}")
    return [step for step in steps if step.name in wanted]


def main() -> None:
    options = options_of()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the step that runs is stopped on the way out
    began = time.monotonic()
    known = facts(environment_of(options.site, options.wheels), options.seconds / 4)
    if not known["cuda"] and not options.rehearse:
        raise SystemExit(
            "torch sees no CUDA device, and figures of a CPU are not to be taken for a GPU's: run this on a machine with a GPU, "
            "or add --rehearse, which marks its results"
        )
    device = known["machine"]["gpu"] or known["machine"]["cpu"]
    about = {"rehearsal": options.rehearse, "code": code_digest(), "device": device, **known}
    results = Results(options.results / "gpu.json", about, ("rehearsal", "code", "device", "versions"), options.again)
    results.write()
    without = [fault.partition("=")[2] for fault in options.inject.split(",") if fault.startswith("missing=")]
    if unknown := set(without) - set(pinned()):
        raise SystemExit(f"--inject: there is no wheel {', '.join(unknown)}; there are {', '.join(pinned())}")
    make = rehearsal if options.rehearse else timetable
    steps = chosen(make(options.results, options.wheels, options.site, without), options.only)
    print(f"{device}, torch {known['versions']['torch']}, commit {known['commit']}")

    def missing() -> dict[str, str]:
        checked = options.site / CHECKED
        return dict(json.loads(checked.read_text())) if checked.exists() else dict.fromkeys(pinned(), "not installed")

    passed = run_all(
        injected(steps, options.inject), results, environment=lambda step: environment_of(options.site, options.wheels, step.needs), log=options.results / "gpu.log",
        missing=missing, deadline=began + options.seconds, say=lambda text: print(text, flush=True),
    )  # fmt: skip
    print()
    for step in steps:
        if (outcome := results.of(step.name)) is not None:
            print(line(step, outcome))
    took = time.monotonic() - began
    print(
        f"\n{'all steps passed' if passed else 'not all steps passed'}, in {took:.0f} s; results are in {options.results}"
    )
    raise SystemExit(0 if passed else 1)


if __name__ == "__main__":
    main()
