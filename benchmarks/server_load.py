"""The HTTP server under many clients: who is served, who is refused, and how soon the first audio comes.

The server of examples/server.py runs in a process of its own. Each client asks for one text after another, 1 to 4 sentences
in one of the voices, and leaves some of them midway. Afterwards some of the texts are asked for again, one at a time, with the
same seed: they have to be as long as they were among the others. Weights are random, which decides neither the order of things
nor, in the shapes of a real variant, their speed. The sound is tones, or with `--s3gen` what upstream's S3Gen makes, as exactly
as it does or with its fast settings; then what is sent depends on how the chunks were cut, and other bytes are no fault.
"""

import asyncio
import logging
import multiprocessing
import random
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import httpx
import torch
from common import ROOT, arguments, finish
from prometheus_client.parser import text_string_to_metric_families

sys.path.insert(0, str(ROOT / "examples"))
sys.path.insert(0, str(ROOT / "tests"))

SENTENCES = (
    "The birch canoe slid on the smooth planks, and nobody on the shore saw it go.",
    "Glue the sheet to the dark blue background before the rain comes in.",
    "It is easy to tell the depth of a well, if the stone that you drop is heavy enough.",
    "These days a chicken leg is a rare dish!",
    "Rice is often served in round bowls, and sometimes on a leaf.",
    "Does the juice of lemons make fine punch?",
    "The box was thrown beside the parked truck, where it lay for the whole of the winter.",
    "Four hours of steady work faced us.",
)
BYTES_PER_SECOND = 2 * 24000
REFERENCE = 10.0  # seconds of the voices' clip
LEAVING = 0.2  # of the requests, midway
AGAIN = 16  # requests that are repeated alone


# ---------------------------------------------------------------------- the server's process


def tiny() -> Any:
    """A tiny model whose texts end by themselves, after 33 tokens on average: it knows 64 sounds, and the end is likely."""
    from support.t3_models import likely_end, tiny_t3

    t3 = likely_end(tiny_t3("english"), by=0.7)
    with torch.no_grad():
        stop, bias = t3.hp.stop_speech_token, t3.speech_head.bias
        bias[64:stop] = bias[stop + 1 :] = -1e4
    return t3


def engine_with_voices(t3: Any, s3gen: str | None) -> Any:
    """An engine with made-up voices, whose vocoder makes tones, or is upstream's."""
    from server import MADE_UP_VOICES, make_up_voices

    from kvcache_chatterbox import ChatterboxEngine, stand_in

    tts = stand_in(t3)
    if s3gen is None:
        engine = ChatterboxEngine(tts)
        make_up_voices(engine)
        return engine
    from s3gen import load

    from kvcache_chatterbox.vocoder import VocoderOptions

    # Every T3 speaks through the distilled weights where it shall be fast.
    tts.s3gen, reference = load(t3.is_gpt or s3gen == "fast", "cpu", REFERENCE)
    fast = VocoderOptions(weights="meanflow", reference_seconds=3.0, precision="bf16", compiled=True)
    engine = ChatterboxEngine(tts, vocoder=fast if s3gen == "fast" else None)
    for seed, name in enumerate(MADE_UP_VOICES):
        conditionals = stand_in(t3, seed).conds
        assert conditionals is not None
        conditionals.gen = dict(reference)
        engine.add_voice(name, conditionals=conditionals)
    return engine


def serve(
    connection: Connection, variant: str, threads: int, rows: int, waiting: int, s3gen: str | None = None
) -> None:
    """Serve a variant, or a tiny model, until told to stop; sends the port first."""
    from server import create_app
    from server_connections import Server
    from server_guard import Limits

    from kvcache_chatterbox import SpeechScheduler, load_t3

    torch.set_num_threads(threads)
    logging.getLogger("chatterbox").setLevel(logging.ERROR)
    t3 = tiny() if variant == "tiny" else load_t3(variant)  # type: ignore[arg-type]
    engine = engine_with_voices(t3, s3gen)
    if s3gen is not None:
        engine.warm_up(voice=next(iter(engine.voices)), requests=rows)
    limits = Limits(grace_seconds=10)
    app = create_app(SpeechScheduler(engine, max_rows=rows, max_waiting=waiting), engine.voices, limits=limits)
    server = Server(app, app.state.gate, limits, log_level="warning")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        connection.send(listener.getsockname()[1])
        server.run([listener])


@contextmanager
def served(*settings: Any) -> Iterator[str]:
    """The URL of a server in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, *settings), daemon=True)
    process.start()
    theirs.close()
    try:
        yield f"http://127.0.0.1:{ours.recv()}"
    finally:
        process.terminate()  # SIGTERM, on which it ends in order
        process.join(30)


# ---------------------------------------------------------------------- the clients


@dataclass
class Tally:
    """What the clients saw."""

    complete: list[tuple[dict[str, Any], bytes]] = field(default_factory=list)
    left: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    ttfa: list[float] = field(default_factory=list)
    nbytes: int = 0


def a_request(chance: random.Random, voices: list[str]) -> dict[str, Any]:
    text = " ".join(chance.sample(SENTENCES, chance.randint(1, 4)))
    return {"input": text, "voice": chance.choice(voices), "seed": chance.randrange(2**31), "response_format": "pcm"}


async def one(http: httpx.AsyncClient, asked: dict[str, Any], tally: Tally, leaves: bool) -> None:
    """One request, to its end or, for one that leaves, to its first audio."""
    begin, parts = time.perf_counter(), []
    async with http.stream("POST", "/v1/audio/speech", json=asked) as response:
        if response.status_code != 200:
            await response.aread()
            error = response.json()["error"]
            if response.status_code not in (429, 503) or not error["message"]:
                tally.errors.append(f"{response.status_code} {error}")
                return
            tally.refused[f"{response.status_code} {error['code']}"] += 1
            await asyncio.sleep(0.2)  # less than the server asks for, so that it stays full
            return
        async for piece in response.aiter_raw():
            if not parts:
                tally.ttfa.append(time.perf_counter() - begin)
            parts.append(piece)
            tally.nbytes += len(piece)
            if leaves:
                tally.left += 1
                return
    tally.complete.append((asked, b"".join(parts)))


async def client(http: httpx.AsyncClient, chance: random.Random, voices: list[str], until: float, tally: Tally) -> None:
    while time.perf_counter() < until:
        try:
            await one(http, a_request(chance, voices), tally, chance.random() < LEAVING)
        except (httpx.HTTPError, ValueError, KeyError) as error:
            tally.errors.append(f"{type(error).__name__}: {error}")


async def gauges(http: httpx.AsyncClient) -> dict[str, float]:
    """The server's own figures, by name."""
    text = (await http.get("/metrics")).text
    return {sample.name: sample.value for family in text_string_to_metric_families(text) for sample in family.samples}


async def at_rest(http: httpx.AsyncClient, seconds: float = 10.0) -> dict[str, float]:
    """The server's figures once no row is busy, or as they are after some seconds."""
    until = time.perf_counter() + seconds
    while (found := await gauges(http))["kvcache_busy"] + found["kvcache_waiting"] and time.perf_counter() < until:
        await asyncio.sleep(0.05)
    return found


async def load(url: str, clients: int, seconds: float, again: int = AGAIN) -> dict[str, Any]:
    """Put the server under load; what came of it."""
    tally = Tally()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as http:
        voices = [voice["id"] for voice in (await http.get("/v1/voices")).json()["data"]]
        begin = time.perf_counter()
        await asyncio.gather(*(client(http, random.Random(n), voices, begin + seconds, tally) for n in range(clients)))
        took = time.perf_counter() - begin
        rest = await at_rest(http)
        ttfa = torch.tensor(tally.ttfa or [float("nan")], dtype=torch.float64)
        found = {
            "clients": clients,
            "seconds": took,
            "complete": len(tally.complete),
            "left midway": tally.left,
            "refused": sum(tally.refused.values()),
            "errors": len(tally.errors),
            **{f"TTFA p{p}, s": float(torch.quantile(ttfa, p / 100)) for p in (50, 90, 99)},
            "audio s / s": tally.nbytes / BYTES_PER_SECOND / took,
            "rows busy after": int(rest["kvcache_busy"]),
            "waiting after": int(rest["kvcache_waiting"]),
        }
        sample = random.Random(0).sample(tally.complete, min(again, len(tally.complete)))
        found |= await compare(http, sample)
    return found | {"reasons": dict(tally.refused), "first errors": tally.errors[:5]}


async def compare(http: httpx.AsyncClient, sample: list[tuple[dict[str, Any], bytes]]) -> dict[str, Any]:
    """The same requests alone: as long as among the others, and the same bytes.

    Rows that decode together share matrix products, whose rounding depends on how many they are; a draw on the edge between two
    tokens can then fall the other way.
    """
    lengths = same = 0
    for asked, heard in sample:
        alone = (await http.post("/v1/audio/speech", json=asked)).content
        lengths += len(alone) == len(heard)
        same += alone == heard
    return {"asked again": len(sample), "same length": lengths, "same bytes": same}


def main() -> None:
    parser = arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("--variant", default="tiny", choices=("tiny", "nano", "turbo", "english"), help="default: tiny")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rows", type=int, default=8, help="segments that decode together (default: 8)")
    parser.add_argument(
        "--waiting", type=int, default=16, help="requests that may wait (default: 16, so that some are refused)"
    )
    parser.add_argument("--s3gen", choices=("exact", "fast"), help="with upstream's S3Gen, in place of tones")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.quick:
        options.clients, options.seconds = 8, 5.0
    with served(options.variant, options.threads, options.rows, options.waiting, options.s3gen) as url:
        found = asyncio.run(load(url, options.clients, options.seconds))
    reasons, errors = found.pop("reasons"), found.pop("first errors")
    settings = {"variant": options.variant, "rows": options.rows, "waiting": options.waiting, "leaving": LEAVING}
    settings["vocoder"] = "tones" if options.s3gen is None else f"S3Gen, {options.s3gen}"
    finish("server_load", [found], {}, options, settings=settings, refusals=reasons, errors=errors)
    print(f"refusals: {reasons}")
    if errors or found["rows busy after"] or found["same length"] < found["asked again"]:
        raise SystemExit(f"not as it should be; the first errors: {errors}")


if __name__ == "__main__":
    main()
