"""What a store that does not answer costs those who already speak: the longest gap in a running stream while others come.

    python benchmarks/slow_stores.py --json benchmarks/results/slow_stores.json

One client hears a text, and after some chunks two others come with voices that nobody knows, so that the store is asked for
both and given both. The sides are stores: one in memory, a folder and a Redis as they should be, a folder whose lock another
process holds, and a server that takes every connection and answers nothing. All take turns. What is left of a gap beside
memory's is the store's doing; the newcomers' own prefills are in all of them. Weights are random and the sound is tones.
"""

import asyncio
import multiprocessing
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from common import ROOT, arguments, chosen, finish, spread
from filelock import FileLock
from tqdm import tqdm

from kvcache import DiskStore, MemoryStore, RedisStore, SpeakerCache
from kvcache.prefixes.stores import Store
from kvcache_chatterbox import ChatterboxEngine, SpeechScheduler, Voice, load_t3, random_conditionals, stand_in

sys.path.insert(0, str(ROOT / "examples"))
from voices import redis_server

TEXT = "The birch canoe slid on the smooth planks, and nobody on the shore saw it go before the rain came in."
MEMORY = "memory"
CHUNK = 5  # tokens
HEARD = 3  # chunks, before others come
NEWCOMERS = 2
BAR = 0.1  # seconds more than behind memory


def _hold(lock: str, held: Any, end: Any) -> None:
    with FileLock(lock):
        held.set()
        end.wait()


@contextmanager
def locked(folder: Path) -> Iterator[Path]:
    """A folder whose lock another process holds for as long as the block runs."""
    processes = multiprocessing.get_context("spawn")
    held, end = processes.Event(), processes.Event()
    process = processes.Process(target=_hold, args=(str(folder / ".lock"), held, end), daemon=True)
    process.start()
    held.wait(60)
    try:
        yield folder
    finally:
        end.set()
        process.join()


@contextmanager
def silent() -> Iterator[str]:
    """The URL of a server that lets everybody connect, and says nothing."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(4096)
        yield f"redis://127.0.0.1:{server.getsockname()[1]}/0"


def stores(stack: ExitStack, quick: bool) -> dict[str, Store]:
    """All sides' stores, by name; the servers and locks live as long as the stack."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    for name in ("open", "locked"):
        (folder / name).mkdir()
    found: dict[str, Store] = {MEMORY: MemoryStore(), "folder": DiskStore(folder / "open")}
    url = None if quick else stack.enter_context(redis_server())
    if url is not None:
        found["redis"] = RedisStore(url)
    found["folder, locked"] = DiskStore(stack.enter_context(locked(folder / "locked")))
    found["redis, silent"] = RedisStore(stack.enter_context(silent()))
    return found


async def hear(stream: Any) -> list[float]:
    """When each chunk came."""
    return [time.perf_counter() async for _ in stream]


async def one_round(engine: ChatterboxEngine, known: Voice, newcomers: list[Voice], most: int) -> tuple[float, float]:
    """Seconds: the longest gap of who already speaks, from the newcomers' coming on, and the slowest newcomer's first audio."""
    options = {"segment_characters": None, "max_new_tokens": most, "chunking": [CHUNK], "seed": 0}
    async with SpeechScheduler(engine, max_rows=1 + len(newcomers)) as scheduler:
        running = scheduler.submit(TEXT, voice=known, **options)
        for _ in range(HEARD):
            await anext(running)
        came = time.perf_counter()
        others = [scheduler.submit(TEXT, voice=one, **options) for one in newcomers]
        heard, *firsts = await asyncio.gather(*map(hear, (running, *others)))
    return max(later - before for before, later in pairwise([came, *heard])), max(times[0] for times in firsts) - came


def main() -> None:
    parser = arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("--variant", default="nano", help="of T3 (default: nano)")
    parser.add_argument("--rounds", type=int, default=12, help="of all sides (default: 12)")
    parser.add_argument("--tokens", type=int, default=100, help="of speech that each client hears (default: 100)")
    parser.add_argument("--sides", metavar="NAMES", help="only these, with commas between them")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.quick:
        sys.path.insert(0, str(ROOT / "tests"))
        from support.t3_models import tiny_t3

        options.rounds, options.tokens, t3 = 1, 30, tiny_t3("gpt")
    else:
        t3 = load_t3(options.variant)
    gaps: dict[str, list[float]] = {}
    firsts: dict[str, list[float]] = {}
    with ExitStack() as stack:
        engines = {
            name: ChatterboxEngine(stand_in(t3), prefix_cache=SpeakerCache(store))
            for name, store in chosen(stores(stack, options.quick), options.sides).items()
        }
        conditionals = stand_in(t3, 1).conds
        known = Voice.of(t3, conditionals)
        for i in tqdm(range(1 + options.rounds), desc="rounds", leave=False):
            for name, engine in engines.items():
                new = [random_conditionals(t3, 2 + NEWCOMERS * i + n) for n in range(NEWCOMERS)]
                voices = [Voice.of(t3, replace(conditionals, t3=one)) for one in new]
                gap, first = asyncio.run(one_round(engine, known, voices, options.tokens))
                if i:  # the first is a warm-up
                    gaps.setdefault(name, []).append(gap)
                    firsts.setdefault(name, []).append(first)
    rows: list[dict[str, Any]] = []
    base = spread(gaps[MEMORY])["median"] if MEMORY in gaps else float("nan")
    for name in engines:
        told = {f"gap s, {key}": value for key, value in spread(gaps[name]).items() if key != "n"}
        more = spread(gaps[name])["median"] - base
        rows.append({"side": name, **told, "gap s, longest": max(gaps[name]), "more than memory's, s": more, "first audio s, median": spread(firsts[name])["median"]})  # fmt: skip
    finish("slow_stores", rows, {}, options, bar=BAR)


if __name__ == "__main__":
    main()
