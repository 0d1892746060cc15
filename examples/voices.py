"""How soon the first speech token comes: with a voice never seen, and with one from memory, from disk and from Redis.

Upstream's real T3, with weights from --checkpoint or random ones, which decide neither shapes nor speed. For the Redis row a
server is started for the time of the run if redis-server is installed, or give --redis URL.

    python examples/voices.py
    python examples/voices.py --variant turbo --voices 5
    python examples/voices.py --variant english --export voices/
"""

import argparse
import json
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from example_options import REDIS_URLS, Parser, add_model, check_device, check_model, count, new_file, old_file, words
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from kvcache import DiskStore, MemoryStore, RedisStore, SpeakerCache
from kvcache.prefixes.stores import Store
from kvcache_chatterbox import ChatterboxEngine, Voice, byte_tokens, load_t3, random_conditionals

TEXT = "The birch canoe slid on planks."


def parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    add_model(parser)
    parser.add_argument("--text", type=words, default=TEXT)
    parser.add_argument("--voices", type=count(1), default=3, help="how many (default: 3)")
    parser.add_argument(
        "--conds", type=old_file, nargs="*", metavar="FILE", help="conds.pt files instead of made-up voices"
    )
    parser.add_argument("--rounds", type=count(1), default=5, help="requests of each voice (default: 5)")
    parser.add_argument("--redis", metavar="URL", help="a server; by default one of our own, if it is installed")
    parser.add_argument("--export", type=Path, metavar="DIR", help="write each voice there, as one file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write the table there")
    options = parser.parse_args()
    if options.redis is not None and not options.redis.startswith(REDIS_URLS):
        parser.error("--redis: give a URL such as redis://localhost:6379/0")
    if options.export is not None and options.export.exists() and not options.export.is_dir():
        parser.error(f"--export {options.export}: is a file; give a folder")
    check_model(parser, options.variant, options.checkpoint)
    check_device(parser, options.device)
    return options


@contextmanager
def redis_server() -> Iterator[str | None]:
    """The URL of a server of our own for the time of the run; None where redis-server is not installed."""
    program = shutil.which("redis-server")
    if program is None:
        yield None
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        arguments = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", folder]
        server = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
        try:
            for _ in range(100):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.05)
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            server.terminate()
            server.wait()


def first_token(engine: ChatterboxEngine, text: torch.Tensor, **who: Any) -> float:
    """Seconds until the first token."""
    begin = time.perf_counter()
    next(engine.inference_stream(text_tokens=text, max_new_tokens=2, chunk_size=1, seed=0, **who))
    return time.perf_counter() - begin


def measure(t3: Any, voices: dict[str, Any], text: torch.Tensor, rounds: int, store: Store | None) -> list[float]:
    """Seconds until the first token, over all voices and rounds; without a store everything is run each time."""
    if store is None:
        plain = ChatterboxEngine(t3, reuse="none")
        return [first_token(plain, text, t3_cond=voice) for _ in range(rounds) for voice in voices.values()]
    engine = ChatterboxEngine(t3, prefix_cache=SpeakerCache(store))
    for name, voice in voices.items():
        engine.add_voice(name, conditionals=voice)
    return [first_token(engine, text, voice=name) for _ in range(rounds) for name in voices]


def main() -> None:
    options = parse()
    console = Console()
    with console.status(f"loading {options.variant} …"):
        t3 = load_t3(options.variant, options.checkpoint, device=options.device)
    text = byte_tokens(t3, options.text)
    names = [f"voice {i + 1}" for i in range(options.voices)]
    voices: dict[str, Any] = {name: random_conditionals(t3, seed) for seed, name in enumerate(names)}
    if options.conds:
        reader = ChatterboxEngine(t3, reuse="none")
        voices = {file.stem: reader.add_voice(file.stem, conditionals=file).t3 for file in options.conds}
    console.print(
        f"[bold]Chatterbox {options.variant}[/bold] on {options.device}, {len(voices)} voices, {text.shape[1]} text tokens, "
        f"weights {'random' if options.checkpoint is None else escape(f'from {options.checkpoint}')}"
    )
    with tempfile.TemporaryDirectory() as folder, redis_server() as own:
        url = options.redis or own
        sides: dict[str, Store | None] = {
            "cold: everything is run": None,
            "warm, from memory": MemoryStore("8GiB"),
            "warm, from disk": DiskStore(folder),
        }
        if url is not None:
            sides["warm, from Redis"] = RedisStore(url, namespace="kvcache-example", ttl=600, timeout=30)
        else:
            console.print("[dim]no row for Redis: redis-server is not installed; give --redis URL[/dim]")
        for side in (sides["cold: everything is run"], sides["warm, from memory"]):
            measure(t3, voices, text, 1, side)  # the first passes of a process are slower than all others
        seconds = {
            name: measure(t3, voices, text, options.rounds, store)
            for name, store in track(list(sides.items()), description="measuring", console=console, transient=True)
        }
        table = Table(title="First speech token")
        for column in ("voice", "median, ms", "fastest", "slowest", "cold / this", "kept, MiB a voice"):
            table.add_column(column, justify="left" if column == "voice" else "right")
        rows = []
        cold = statistics.median(seconds["cold: everything is run"])
        for name, values in seconds.items():
            store = sides[name]
            median = statistics.median(values)
            size = 0.0 if store is None else store.nbytes / len(voices) / 2**20
            row = [f"{1e3 * v:.0f}" for v in (median, min(values), max(values))]
            table.add_row(name, *row, f"{cold / median:.1f}", f"{size:.1f}" if size else "")
            rows.append({"voice": name, "median_s": median, "fastest_s": min(values), "slowest_s": max(values)})
        console.print(table)
    if options.export is not None:
        options.export.mkdir(parents=True, exist_ok=True)
        engine = ChatterboxEngine(t3, prefix_cache=SpeakerCache(MemoryStore("8GiB")))
        for i, (name, voice) in enumerate(voices.items()):
            engine.voices.add(name, Voice.of(t3, voice))
            engine.voices.export(name, options.export / f"{i}.safetensors")
        console.print(f"{len(voices)} voices written to {options.export}", markup=False)
    if options.json is not None:
        options.json.write_text(json.dumps({"variant": options.variant, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
