"""`kvcache tune` against an exhaustive sweep of the same space: how good what it finds is, and in how much of the time.

Chatterbox Nano (random weights, which keep shapes and speed), several requests together. The two search one after the other,
each in a process of its own that begins with an empty cache of compiled code, so that neither profits from what the other has
compiled or measured. Their times are whole: loading apart, all that is set up, judged, compiled and measured.

A sweep's best is best by luck, too: of many settings that are about as fast the one that was measured on a good moment. So
what the tuner chose and the three that the sweep found fastest are measured again in a third process, in turn, and the best
of these is what the tuner's choice is held against.
"""

import argparse
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import torch
from common import arguments, finish, spread

from kvcache.decoding import Setting
from kvcache.tools import Space, SubjectBench, shown, space_of, subject, tune

_FINALISTS = 3
_TOKENS = 64


def space(model: Any, options: argparse.Namespace) -> Space:
    """What both search: all that there is on this machine, or a corner of it for a quick run."""
    found = space_of(model, "throughput", options.max_requests)
    return replace(found, backend=("eager", "off"), precision=("fp32",), requests=(1, 2)) if options.quick else found


def searched(options: argparse.Namespace, exhaustive: bool) -> dict[str, Any]:
    """One side: what it found, in what time, and what it looked at."""
    torch.set_num_threads(options.threads)
    model = subject(options.model)
    model.load()
    start = time.perf_counter()
    # The space is looked up within the time: it is part of tuning.
    chosen = space(model, options)
    tuned = tune(
        model,
        "throughput",
        context=options.context,
        time_limit=None,
        exhaustive=exhaustive,
        space=chosen,
        say=lambda line: print(line, flush=True),
    )
    profile = tuned.profile
    return {
        "seconds": time.perf_counter() - start,
        "setting": profile.setting,
        "trials": [(trial.setting, trial.milliseconds, trial.divergence, trial.refused) for trial in profile.trials],
        "explanation": list(profile.explanation),
        "settings": tuned.settings,
        "refused": [(one.axis, one.value, one.reason) for one in chosen.refused],
    }


def again(options: argparse.Namespace, finalists: list[Setting]) -> dict[Setting, list[float]]:
    """Milliseconds of a token of each finalist in each round, all in turn."""
    torch.set_num_threads(options.threads)
    model = subject(options.model)
    bench = SubjectBench(model, options.context or max(256, model.shortest + 30))
    found: dict[Setting, list[float]] = {one: [] for one in finalists}
    for i in range(options.rounds + 1):
        for one in finalists:
            median = 1e3 * statistics.median(bench.seconds(one, _TOKENS))
            if i > 0:
                found[one].append(median)
    return found


def apart(function: Any, *given: Any) -> Any:
    """The result of a function in a new process that finds nothing compiled."""
    with tempfile.TemporaryDirectory(prefix="inductor-") as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(function, *given).result()


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--model", default="chatterbox-nano")
    parser.add_argument("--context", type=int, help="tokens of a request (default: as kvcache tune has it)")
    parser.add_argument("--max-requests", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=6, help="in which the finalists are measured again")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.quick:
        options.rounds = 2

    few = apart(searched, options, False)
    every = apart(searched, options, True)
    ranked = sorted((one for one in every["trials"] if one[3] is None), key=lambda one: one[1])
    finalists = list(dict.fromkeys([few["setting"], every["setting"], *(one[0] for one in ranked[:_FINALISTS])]))
    measured = apart(again, options, finalists)

    medians = {one: statistics.median(values) for one, values in measured.items()}
    best = min(medians, key=medians.__getitem__)
    first = {one[0]: one[1] for one in every["trials"]}
    rows = []
    for one in sorted(medians, key=medians.__getitem__):
        chosen = [name for name, side in (("tune", few), ("sweep", every)) if side["setting"] == one]
        figures = spread(measured[one])
        rows.append(
            {
                "setting": shown(one),
                "chosen by": " and ".join(chosen) or "–",
                "ms/token": figures["median"],
                "q1": figures["q1"],
                "q3": figures["q3"],
                "in the sweep": first.get(one),
            }
        )
    sides = {
        name: {
            "seconds": side["seconds"],
            "looked at": len(side["trials"]),
            "of": side["settings"],
            "compiled": sum("compile" in one[0].backend and one[3] is None for one in side["trials"]),
            "chosen": shown(side["setting"]),
            "trials": [
                {"setting": shown(one[0]), "ms/token": one[1], "KL per token": one[2], "refused": one[3]}
                for one in side["trials"]
            ],
            "explanation": side["explanation"],
            "left out": [{"axis": axis, "value": value, "why": why} for axis, value, why in side["refused"]],
        }
        for name, side in (("tune", few), ("sweep", every))
    }
    ratios = {
        "the sweep's time over the tuner's": every["seconds"] / few["seconds"],
        "the tuner's setting over the best (time of a token)": medians[few["setting"]] / medians[best],
    }
    for name, side in sides.items():
        print(f"{name}: {side['seconds']:.0f} s, {side['looked at']} of {side['of']} settings, {side['chosen']}")
    finish("tune_vs_sweep", rows, ratios, options, sides=sides, weights="random")


if __name__ == "__main__":
    main()
