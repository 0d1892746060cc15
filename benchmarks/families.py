"""Every generative class of the installed transformers, tiny and random, with each feature of kvcache.

A feature works where the answer is the model's own, or, for a window, that of masks which say the same; else it is refused
with a reason, falls back to `generate` with a reason, is wrong, or crashes. Classes run in processes of their own, several
one after the other in each; one that dies or takes too long costs its own row.

    python benchmarks/families.py --only LlamaForCausalLM,BloomForCausalLM
"""

import argparse
import json
import multiprocessing
import os
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import common
import family_checks
import family_models
from tqdm import tqdm

QUICK = ("LlamaForCausalLM", "BloomForCausalLM", "BartForConditionalGeneration")
SECONDS = 180.0  # for one class
_EACH = 25  # classes in one process, whose memory is then given back

Row = dict[str, Any]


def work(connection: Connection) -> None:
    """A process: try the classes that it is told, until it is told None."""
    warnings.filterwarnings("ignore")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    while (order := connection.recv()) is not None:
        name, features = order
        start = time.perf_counter()
        row = family_checks.tried(name, features)
        connection.send({**row, "seconds": round(time.perf_counter() - start, 2)})


class Worker:
    """A process that tries one class after the other."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, end = context.Pipe()
        self.process = context.Process(target=work, args=(end,), daemon=True)
        self.process.start()
        end.close()
        self.name: str | None = None
        self.until = 0.0
        self.done = 0

    def order(self, name: str, features: Sequence[str], seconds: float) -> None:
        # The first one imports transformers as well.
        self.name, self.until = name, time.monotonic() + seconds + (60 if self.done == 0 else 0)
        self.connection.send((name, features))

    def answer(self) -> Row:
        """What came of its class; how it ended, if it did."""
        name, self.name = self.name, None
        self.done += 1
        try:
            row: Row = self.connection.recv()
        except EOFError:
            self.process.join(10)
            row = {"class": name, "built": f"its process ended with exit code {self.process.exitcode}", "cells": {}}
            self.done = _EACH
        return row

    def late(self, seconds: float) -> Row:
        name, self.name, self.done = self.name, None, _EACH
        return {"class": name, "built": f"took longer than {seconds:.0f} s", "cells": {}}

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def rows(
    names: Sequence[str], features: Sequence[str] = family_checks.FEATURES, jobs: int = 1, seconds: float = SECONDS
) -> Iterator[Row]:
    """Try these classes; their rows as they come."""
    waiting, workers = list(names), list[Worker]()
    try:
        while waiting or any(worker.name for worker in workers):
            for worker in [w for w in workers if w.name is None and w.done >= _EACH]:
                worker.end()
                workers.remove(worker)
            while waiting and len(workers) < jobs:
                workers.append(Worker())
            for worker in workers:
                if worker.name is None and waiting:
                    worker.order(waiting.pop(0), features, seconds)
            busy = [worker for worker in workers if worker.name is not None]
            ready = wait(
                [worker.connection for worker in busy], max(0.0, min(w.until for w in busy) - time.monotonic())
            )
            for worker in busy:
                if worker.connection in ready:
                    yield worker.answer()
                elif time.monotonic() >= worker.until:
                    yield worker.late(seconds)
    finally:
        for worker in workers:
            worker.end()


def counted(found: Sequence[Row], features: Sequence[str]) -> list[Row]:
    """How many classes are in each state, a row for each feature."""
    lines = []
    for feature in features:
        states = Counter(row["cells"][feature]["state"] for row in found if feature in row["cells"])
        lines.append({"feature": feature, **{state: states[state] for state in family_checks.STATES}})
    return lines


def arguments() -> argparse.Namespace:
    parser = common.arguments((__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--only", metavar="NAMES", help="classes, with commas between them; 'popular' for the popular ones"
    )
    parser.add_argument("--features", metavar="NAMES", help=f"some of {', '.join(family_checks.FEATURES)}")
    parser.add_argument("--part", metavar="I/N", help="the I-th of N shares of the classes, from 1 on")
    parser.add_argument(
        "--resume", type=Path, metavar="FILE", help="take what works from this file, and try the others"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time (default: 1)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for one class, before its process is ended")
    return parser.parse_args()


def chosen(options: argparse.Namespace) -> list[str]:
    """The classes that the options ask for.

    Raises:
        SystemExit: if one of them is not there.
    """
    known = family_models.names()
    if options.only == "popular":
        return [name for name in family_models.POPULAR if name in known]
    names = options.only.split(",") if options.only else list(QUICK) if options.quick else known
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"--only: there is no generative class {', '.join(unknown)} in this release")
    if options.part:
        share, shares = map(int, options.part.split("/"))
        names = names[share - 1 :: shares]
    return names


def main() -> None:
    options = arguments()
    names = chosen(options)
    features = common.chosen(dict.fromkeys(family_checks.FEATURES), options.features)
    found = kept(options.resume, names, list(features)) if options.resume else []
    names = [name for name in names if name not in {row["class"] for row in found}]
    for row in tqdm(rows(names, list(features), options.jobs, options.seconds), total=len(names), desc="classes"):
        found.append(row)
        found.sort(key=lambda row: row["class"])
        tell(row)
        table = counted(found, list(features))
        common.keep("families", found, {}, options, counts=table)  # so that a run that is ended can be resumed
    common.show(f"{sum(row['built'] is None for row in found)} classes of {len(found)}", counted(found, list(features)))


def kept(file: Path, names: Sequence[str], features: Sequence[str]) -> list[Row]:
    """The rows of a file that need not be tried again: of these classes, with all features, none of which is at fault."""
    found: list[Row] = json.loads(file.read_text())["rows"]
    return [
        row
        for row in found
        if row["class"] in names
        and set(features) <= set(row["cells"])
        and not {cell["state"] for cell in row["cells"].values()} & {"wrong", "crash"}
    ]


def tell(row: Row) -> None:
    """Say what is at fault with a class."""
    if row["built"] is not None:
        tqdm.write(f"{row['class']}: not tried: {row['built']}")
    for feature, cell in row["cells"].items():
        if cell["state"] in ("wrong", "crash"):
            tqdm.write(f"{row['class']}: {feature}: {cell['state']}: {cell['why']}")


if __name__ == "__main__":
    main()
