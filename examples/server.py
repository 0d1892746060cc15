"""Serve speech over HTTP, many requests at once, by OpenAI's API, with a page to try it on.

With --checkpoint it speaks. Without, T3's weights are random and a stand-in makes tones of its tokens: how requests share
the model, stream and end is then real, the sound is not speech.

    python examples/server.py --variant nano
    python examples/server.py --variant english --checkpoint ./chatterbox --voice sarah=sarah.wav
    curl http://127.0.0.1:8000/v1/audio/speech --output hello.wav --json \\
        '{"model": "chatterbox", "voice": "sarah", "input": "Hello. How are you?"}'
"""

import argparse
import asyncio
import importlib
import math
import random
import struct
import time
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import torch
import uvicorn
from anyio import CancelScope
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Histogram, generate_latest
from pydantic import BaseModel, Field
from rich.console import Console
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from kvcache import BusyError, CapacityError, ClosedError, InputError
from kvcache.metrics import SchedulerCollector
from kvcache_chatterbox import ChatterboxEngine, SpeechScheduler, load_t3, stand_in
from kvcache_chatterbox.audio import SAMPLE_RATE
from kvcache_chatterbox.loading import WEIGHTS, upstream_t3

PAGE = Path(__file__).with_name("server_page.html")
LONGEST_TEXT = 20_000  # characters; about twenty minutes of speech
MADE_UP_VOICES = ("alba", "finn", "sarah")
CLASSES = {
    "english": ("chatterbox.tts", "ChatterboxTTS"),
    "multilingual": ("chatterbox.mtl_tts", "ChatterboxMultilingualTTS"),
    "turbo": ("chatterbox.tts_turbo", "ChatterboxTurboTTS"),
}
TONES = "Tones, not speech"
SECONDS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 30, 60, 120)  # buckets of the histograms


class SpeechRequest(BaseModel):
    """The body of a request for speech, as OpenAI has it, and what Chatterbox can do beyond."""

    input: str = Field(max_length=LONGEST_TEXT)
    voice: str = Field(max_length=200)
    model: str = "chatterbox"  # one is loaded, whatever it is called here
    response_format: Literal["wav", "pcm"] = "wav"
    speed: float = 1.0
    stream_format: Literal["audio"] = "audio"
    seed: int | None = Field(None, ge=0, lt=2**63)
    language: str | None = None
    exaggeration: float | None = Field(None, ge=0, le=2)


class Problem(Exception):
    """A request that is answered with an error object of OpenAI's form."""

    def __init__(self, status: int, message: str, code: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = headers

    def response(self) -> JSONResponse:
        kind = "invalid_request_error" if self.status < 429 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return JSONResponse(
            {"error": {"message": str(self), "type": kind, "code": self.code}}, self.status, headers=self.headers
        )


def problem_of(error: Exception) -> Problem:
    """What a client is told of an error."""
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if isinstance(part, str) and part != "body") or "the body"
        return Problem(400, f"{where}: {first['msg']}", "invalid_request")
    if isinstance(error, HTTPException):
        return Problem(error.status_code, str(error.detail), "http_error", dict(error.headers or {}))
    if isinstance(error, InputError | CapacityError):
        return Problem(400, str(error), "invalid_request")
    if isinstance(error, BusyError):
        return Problem(429, str(error), "busy", {"Retry-After": str(math.ceil(error.retry_after or 1))})
    if isinstance(error, ClosedError):
        return Problem(503, str(error), "closing", {"Retry-After": "5"})
    if isinstance(error, Problem):
        return error
    return Problem(500, "the server failed; its log says why", "internal_error")


class Speech(StreamingResponse):
    """Audio as it comes. Whatever ends the response, its stream is closed, so that its rows are free."""

    def __init__(self, body: AsyncIterator[bytes], stream: Any, media_type: str, headers: dict[str, str]) -> None:
        super().__init__(body, media_type=media_type, headers=headers)
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            with CancelScope(shield=True):
                await self._stream.aclose()


async def unless_gone(request: Request, audio: Any) -> Any:
    """What `audio` gives; None if the client goes away first."""
    first, gone = asyncio.ensure_future(audio), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait((first, gone), return_when=asyncio.FIRST_COMPLETED)
        return await first if first.done() else None
    finally:
        for task in (first, gone):
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


def pcm(audio: torch.Tensor) -> bytes:
    """Audio ``[1, samples]`` as 16-bit little-endian samples."""
    return (audio[0].clamp(-1, 1) * 32767).round().to(torch.int16).numpy().astype("<i2").tobytes()


def wav_header(rate: int) -> bytes:
    """Of a mono 16-bit file whose length is not known yet: the sizes are the largest, so that players read on."""
    unknown = 0xFFFFFFFF
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, rate, 2 * rate, 2, 16)
    return struct.pack("<4sI4s", b"RIFF", unknown, b"WAVE") + form + struct.pack("<4sI", b"data", unknown)


def create_app(
    scheduler: SpeechScheduler,
    voices: Collection[str],
    *,
    model: str = "chatterbox",
    note: str = "",
    languages: Collection[str] = (),
) -> FastAPI:
    """The server around a scheduler, which it starts and stops.

    Args:
        scheduler: of the engine that speaks.
        voices: the names of its voices, such as ``engine.voices``.
        model: what the page calls the model.
        note: what the page should say of it, such as that it makes tones.
        languages: what a request may name, for the page.
    """
    state = "starting"
    registry = CollectorRegistry()
    registry.register(SchedulerCollector(scheduler))
    to_first = Histogram("kvcache_ttfa_seconds", "From request to first audio.", buckets=SECONDS, registry=registry)
    to_end = Histogram(
        "kvcache_request_seconds", "From request to its end.", ["outcome"], buckets=SECONDS, registry=registry
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        nonlocal state
        async with scheduler:
            state = "ready"
            yield
            state = "closing"
        state = "closed"

    app = FastAPI(title="Chatterbox on kvcache", lifespan=lifespan, max_body_size=16 * LONGEST_TEXT)  # all escaped

    async def answer(request: Request, error: Exception) -> Response:
        return problem_of(error).response()

    for kind in (RequestValidationError, HTTPException, InputError, CapacityError, BusyError, ClosedError, Problem):
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(Exception, answer)

    async def body(first: torch.Tensor | None, stream: Any, head: bytes, begin: float) -> AsyncIterator[bytes]:
        outcome = "cancelled"
        try:
            yield head + (b"" if first is None else pcm(first))
            async for audio in stream:
                yield pcm(audio)
            outcome = "finished"
        except Exception:  # the status is sent: all that is left is to cut the response short, which a client notices
            outcome = "failed"
            raise
        finally:
            to_end.labels(outcome).observe(time.perf_counter() - begin)

    @app.post("/v1/audio/speech", response_class=Response)
    async def speech(asked: SpeechRequest, request: Request) -> Response:
        """Speak a text; the audio comes while it is made."""
        begin = time.perf_counter()
        if asked.speed != 1:
            raise Problem(400, f"speed={asked.speed}: only 1.0; change the speed where you play it", "invalid_request")
        if asked.voice not in voices:
            known = ", ".join(map(repr, voices)) or "none"
            raise Problem(404, f"there is no voice {asked.voice!r}; there are {known}", "voice_not_found")
        seed = random.randrange(2**31) if asked.seed is None else asked.seed
        stream = scheduler.submit(
            asked.input,
            voice=asked.voice,
            seed=seed,
            exaggeration=asked.exaggeration,
            language_id=asked.language,
        )
        nothing = object()
        try:
            first = await unless_gone(request, anext(stream, nothing))  # so that an error still is a status
        except BaseException:
            await stream.aclose()
            raise
        if first is None:
            await stream.aclose()
            to_end.labels("cancelled").observe(time.perf_counter() - begin)
            return Response(status_code=499)  # read by nobody
        to_first.observe(time.perf_counter() - begin)
        head = wav_header(SAMPLE_RATE) if asked.response_format == "wav" else b""
        sound = body(None if first is nothing else first, stream, head, begin)
        return Speech(sound, stream, f"audio/{asked.response_format}", {"X-Seed": str(seed)})

    @app.get("/v1/voices")
    async def list_voices() -> dict[str, Any]:
        """The voices that a request can name."""
        return {"object": "list", "data": [{"id": name, "object": "voice"} for name in sorted(voices)]}

    @app.get("/health")
    async def health() -> JSONResponse:
        """Whether a request would be heard."""
        status = "closed" if state == "ready" and scheduler.closed else state
        about = {"status": status, "model": model, "note": note, "languages": sorted(languages)}
        return JSONResponse(about, 200 if status == "ready" else 503)

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", response_class=HTMLResponse)
    async def page() -> HTMLResponse:
        """A page to try it on."""
        return HTMLResponse(PAGE.read_text(encoding="utf-8"))

    return app


# ---------------------------------------------------------------------- from the command line


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=sorted(WEIGHTS), default="nano")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="a folder with the variant's weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--host", default="127.0.0.1", help="whom to listen to (default: this machine alone)")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max-rows", type=int, default=8, help="segments that decode together (default: 8)")
    parser.add_argument("--max-waiting", type=int, default=64, help="requests that may wait for a row (default: 64)")
    parser.add_argument(
        "--backend", choices=("auto", "eager", "compile", "graph", "graph+compile"), default="auto",
        help="what decodes (default: auto, graph on a GPU, eager elsewhere)",
    )  # fmt: skip
    parser.add_argument(
        "--precision", choices=("fp32", "bf16", "fp16", "int8"), help="of the backbone (default: as loaded)"
    )
    parser.add_argument(
        "--voice", action="append", default=[], metavar="NAME=FILE",
        help="a clip, a conds.pt, or a .safetensors file that engine.voices.export wrote; repeatable",
    )  # fmt: skip
    return parser.parse_args()


def load(options: argparse.Namespace) -> tuple[Any, str]:
    """The model and, where it does not speak, what it does instead."""
    upstream_t3()
    if options.checkpoint is None:
        return stand_in(load_t3(options.variant, device=options.device)), f"{TONES}: the weights are random."
    if options.variant in CLASSES:
        module, name = CLASSES[options.variant]
        with suppress(ImportError):  # of the audio stack
            return getattr(importlib.import_module(module), name).from_local(options.checkpoint, options.device), ""
    t3 = load_t3(options.variant, options.checkpoint, device=options.device)
    return stand_in(t3), f"{TONES}: there is no vocoder for {options.variant} here."


def make_up_voices(engine: ChatterboxEngine) -> None:
    """Give an engine around a stand-in a few voices."""
    for seed, name in enumerate(MADE_UP_VOICES):
        engine.add_voice(name, conditionals=stand_in(engine.t3, seed).conds)


def add_voices(engine: ChatterboxEngine, model: Any, given: list[str], made_up: bool) -> None:
    """Those given as NAME=FILE, and the model's own as "default", or made-up ones where nothing is real."""
    if made_up:
        make_up_voices(engine)
    elif model.conds is not None:
        engine.add_voice("default", conditionals=model.conds)
    for voice in given:
        name, _, file = voice.partition("=")
        if not file:
            raise SystemExit(f"--voice {voice}: give NAME=FILE")
        if file.endswith(".safetensors"):
            engine.voices.load(file, name)
        elif file.endswith(".pt"):
            engine.add_voice(name, conditionals=file)
        else:
            engine.add_voice(name, audio_prompt_path=file)


def main() -> None:
    options = parse()
    console = Console()
    with console.status(f"loading {options.variant} …"):
        model, note = load(options)
        engine = ChatterboxEngine(model, backend=options.backend, precision=options.precision)
        add_voices(engine, model, options.voice, made_up=bool(note))
    console.print(f"[bold]Chatterbox {options.variant}[/bold] on {options.device}; voices: {', '.join(engine.voices)}.")
    if note:
        console.print(f"[bold yellow]{note}[/bold yellow]")
    scheduler = SpeechScheduler(engine, max_rows=options.max_rows, max_waiting=options.max_waiting)
    languages = getattr(importlib.import_module(type(model).__module__), "SUPPORTED_LANGUAGES", {})
    app = create_app(
        scheduler,
        engine.voices,
        model=f"Chatterbox {options.variant}",
        note=note,
        languages=languages if engine.t3.hp.is_multilingual else (),
    )
    # Streams that run when it is told to stop have half a minute to end.
    uvicorn.run(app, host=options.host, port=options.port, timeout_graceful_shutdown=30)


if __name__ == "__main__":
    main()
