"""Serve speech over HTTP, many requests at once, by OpenAI's API, with a page to try it on.

With --checkpoint it speaks. Without, T3's weights are random and a stand-in makes tones of its tokens: how requests share
the model, stream and end is then real, the sound is not speech.

    python examples/server.py --variant nano
    python examples/server.py --variant english --checkpoint ./chatterbox --voice sarah=sarah.wav
    curl http://127.0.0.1:8000/v1/audio/speech --output hello.wav --json \\
        '{"model": "chatterbox", "voice": "sarah", "input": "Hello. How are you?"}'
"""

import argparse
import importlib
import random
import socket
import time
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Annotated, Any, Literal

import torch
from anyio import CancelScope
from example_options import CLASSES, check_backend, check_device, count
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from rich.console import Console
from rich.markup import escape
from safetensors import SafetensorError
from server_connections import Server
from server_errors import REFUSED, Problem, closing, problem_of, some
from server_figures import Figures, Timing
from server_guard import STANDARD, Gate, Guard, Limits, first_of
from server_options import LARGEST_CHUNK, LONGEST_NAME, allow_files, check_address, check_served, parser_of, voice_file
from server_sound import pcm, wav_header
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from kvcache import InputError, KVCacheError
from kvcache.errors import said
from kvcache_chatterbox import ChatterboxEngine, SpeechRequest, SpeechScheduler, load_t3, stand_in
from kvcache_chatterbox.units import SAMPLE_RATE
from kvcache_chatterbox.upstream import beside

PAGE = Path(__file__).parent
LONGEST_TEXT = 20_000  # characters; about twenty minutes of speech
MADE_UP_VOICES = ("alba", "finn", "sarah")
TONES = "Tones, not speech"
# What files raise that are not what they should be.
UNREADABLE = (KVCacheError, OSError, RuntimeError, ValueError, LookupError, SafetensorError, UnpicklingError)
# Of the page: what it may load and talk to is this server alone, and nobody may put it into a frame.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def named(voice: Any) -> Any:
    """The name of a voice, which OpenAI's clients may also give as an object."""
    if not isinstance(voice, dict):
        return voice
    if set(voice) != {"id"}:
        raise ValueError('give the name of a voice, or {"id": name}')
    return voice["id"]


class SpeechBody(BaseModel):
    """The body of a request for speech, as OpenAI has it, and what Chatterbox can do beyond."""

    model_config = ConfigDict(strict=True)  # a number is a number of JSON: no text, no truth value

    input: str = Field(max_length=LONGEST_TEXT)
    voice: Annotated[str, BeforeValidator(named)] = Field(max_length=LONGEST_NAME)
    model: str = Field("chatterbox", max_length=200)  # one is loaded, whatever it is called here
    response_format: Literal["wav", "pcm"] = "wav"
    speed: float = 1.0
    stream_format: Literal["audio"] = "audio"
    seed: int | None = Field(None, ge=0, lt=2**63)
    language: str | None = Field(None, max_length=35)  # the longest tag that is in use
    exaggeration: float | None = Field(None, ge=0, le=2)
    chunking: Literal["auto", "fixed"] | None = None
    first_chunk: int | None = Field(None, ge=1, le=LARGEST_CHUNK)
    max_chunk: int | None = Field(None, ge=1, le=LARGEST_CHUNK)

    def request(self, seed: int, chunks: Mapping[str, Any]) -> SpeechRequest:
        """What it asks of the scheduler.

        Args:
            seed: where it has none.
            chunks: how much audio comes at once, where it says nothing about that.
        """
        own = self.model_dump(include={"chunking", "first_chunk", "max_chunk"}, exclude_none=True)
        return SpeechRequest.of(
            self.input,
            voice=self.voice,
            seed=seed,
            exaggeration=self.exaggeration,
            language_id=self.language,
            **(own or chunks),
        )


class Speech(StreamingResponse):
    """Audio as it comes. Whatever ends the response, its stream is closed, so that its rows are free."""

    def __init__(self, first: bytes, stream: Any, timing: Timing, media_type: str, headers: dict[str, str]) -> None:
        super().__init__(self._sound(first, stream), media_type=media_type, headers=headers)
        self._stream, self._timing = stream, timing

    async def _sound(self, first: bytes, stream: Any) -> AsyncIterator[bytes]:
        try:
            yield first
            async for audio in stream:
                yield pcm(audio[0].numpy())
            self._timing.outcome = "finished"
        except Exception:  # the status is sent: all that is left is to cut the response short, which a client notices
            self._timing.outcome = "failed"
            raise

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            with CancelScope(shield=True):
                await self._stream.aclose()
            self._timing.over()


# ---------------------------------------------------------------------- the app


def create_app(
    scheduler: SpeechScheduler,
    voices: Collection[str],
    *,
    model: str = "chatterbox",
    note: str = "",
    languages: Collection[str] = (),
    hosts: Collection[str] = (),
    limits: Limits = STANDARD,
    chunks: Mapping[str, Any] | None = None,
) -> FastAPI:
    """The server around a scheduler, which it starts and stops. `app.state.gate` says whether it takes requests.

    Args:
        scheduler: of the engine that speaks.
        voices: the names of its voices, such as ``engine.voices``.
        model: what the page calls the model.
        note: what the page should say of it, such as that it makes tones.
        languages: what a request may name, for the page.
        hosts: names of this server with a dot in them; see `Guard`.
        limits: of requests.
        chunks: how much audio comes at once where a request says nothing of it: keywords of `SpeechRequest.of`.
    """
    gate, figures = Gate(), Figures(scheduler)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with scheduler:
            gate.open()
            yield
            gate.shut()
        gate.state = "closed"

    async def answer(request: Request, error: Exception) -> Response:
        return problem_of(error, SpeechBody.model_fields, request).response()

    # The pages of /docs load scripts from elsewhere; /openapi.json is here.
    app = FastAPI(title="Chatterbox on kvcache", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.gate = gate
    app.add_middleware(Guard, gate=gate, limits=limits, hosts=hosts)
    for kind in (*REFUSED, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)
    app.include_router(speaking(scheduler, voices, gate, figures, chunks or {}))
    app.include_router(
        telling(scheduler, voices, gate, figures, {"model": model, "note": note, "languages": languages})
    )
    app.include_router(showing())
    return app


def speaking(
    scheduler: SpeechScheduler, voices: Collection[str], gate: Gate, figures: Figures, chunks: Mapping[str, Any]
) -> APIRouter:
    """The route that speaks."""
    router = APIRouter()

    def begin(asked: SpeechBody, seed: int) -> Any:
        if asked.speed != 1:
            raise Problem(400, f"speed={asked.speed}: only 1.0; change the speed where you play it", "invalid_request")
        if asked.voice not in voices:
            known = some(sorted(voices))
            raise Problem(404, f"there is no voice {asked.voice!r}; there are {known}", "voice_not_found")
        if gate.state != "ready":
            raise closing()
        return scheduler.submit(asked.request(seed, chunks))

    async def until_heard(stream: Any, request: Request) -> bytes | None:
        """The first audio, so that an error still is a status; None if the client goes away before."""
        try:
            first = await gate.unless_shut(first_of(anext(stream, None), request.receive()))
            sound = None if first is None else first.result()
        except BaseException:
            await stream.aclose()
            raise
        if first is None:
            await stream.aclose()
            return None
        return b"" if sound is None else pcm(sound[0].numpy())

    @router.post("/v1/audio/speech", response_class=Response)
    async def speech(asked: SpeechBody, request: Request) -> Response:
        """Speak a text; the audio comes while it is made."""
        timing, seed = figures.begin(), random.randrange(2**31) if asked.seed is None else asked.seed
        with timing.unless_heard():
            stream = begin(asked, seed)
            first = await until_heard(stream, request)
            if first is None:
                return Response(status_code=499)  # read by nobody
            timing.heard()
        head = wav_header(SAMPLE_RATE) if asked.response_format == "wav" else b""
        return Speech(head + first, stream, timing, f"audio/{asked.response_format}", {"X-Seed": str(seed)})

    return router


def telling(
    scheduler: SpeechScheduler, voices: Collection[str], gate: Gate, figures: Figures, about: dict[str, Any]
) -> APIRouter:
    """The routes that say what there is and how it goes."""
    router, since = APIRouter(), int(time.time())

    @router.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """The model that speaks."""
        found = {"id": "chatterbox", "object": "model", "created": since, "owned_by": about["model"]}
        return {"object": "list", "data": [found]}

    @router.get("/v1/voices")
    async def list_voices() -> dict[str, Any]:
        """The voices that a request can name."""
        return {"object": "list", "data": [{"id": name, "object": "voice"} for name in sorted(voices)]}

    @router.head("/health", include_in_schema=False)  # what load balancers ask
    @router.get("/health")
    async def health() -> JSONResponse:
        """Whether a request would be heard."""
        status = "closed" if gate.state == "ready" and scheduler.closed else gate.state
        found = {"status": status, **about, "languages": sorted(about["languages"])}
        if scheduler.error is not None:  # its kind alone: what it says may hold what nobody outside should read
            found["reason"] = type(scheduler.error).__name__
        return JSONResponse(found, 200 if status == "ready" else 503)

    @router.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(generate_latest(figures.registry), media_type=CONTENT_TYPE_LATEST)

    return router


def showing() -> APIRouter:
    """The page to try it on; it is read once. A part of it is not to be had: a header ``Range`` is passed over, as HTTP allows."""
    router = APIRouter(include_in_schema=False)
    html, css, js = ((PAGE / f"server_page.{kind}").read_bytes() for kind in ("html", "css", "js"))
    parts = {"css": (css, "text/css"), "js": (js, "text/javascript")}

    @router.head("/")
    @router.get("/", response_class=Response)
    async def page() -> Response:
        headers = {"Content-Security-Policy": CONTENT_SECURITY_POLICY, "Cache-Control": "no-cache"}
        return Response(html, media_type="text/html", headers=headers)

    @router.head("/server_page.{kind}")
    @router.get("/server_page.{kind}", response_class=Response)
    async def part(kind: Literal["css", "js"]) -> Response:
        content, media_type = parts[kind]
        return Response(content, media_type=media_type, headers={"Cache-Control": "no-cache"})

    return router


# ---------------------------------------------------------------------- from the command line


def parse() -> tuple[argparse.Namespace, socket.socket]:
    """The options, and the socket to listen on: what cannot work ends here, before anything is loaded."""
    parser = parser_of(__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--max-waiting", type=count(1), default=64, help="requests that may wait for a row (default: 64)"
    )
    parser.add_argument(
        "--max-connections", type=count(8), default=Limits.connections, metavar="N",
        help=f"clients that may be connected, asking or not (default: {Limits.connections})",
    )  # fmt: skip
    parser.add_argument(
        "--grace", type=count(0), default=Limits.grace_seconds, metavar="SECONDS",
        help=f"that streams have to end in when the server is told to (default: {Limits.grace_seconds})",
    )  # fmt: skip
    parser.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME",
        help="a name with a dot that clients call this server by, such as a proxy's; repeatable, and * for any",
    )  # fmt: skip
    parser.add_argument(
        "--backend", choices=("auto", "eager", "compile", "graph", "graph+compile"), default="auto",
        help="what decodes (default: auto, graph on a GPU, eager elsewhere)",
    )  # fmt: skip
    parser.add_argument(
        "--precision", choices=("fp32", "bf16", "fp16", "int8"), help="of the backbone (default: as loaded)"
    )
    parser.add_argument(
        "--voice", action="append", default=[], type=voice_file, metavar="NAME=FILE",
        help="a clip, a conds.pt, or a .safetensors file that engine.voices.export wrote; repeatable",
    )  # fmt: skip
    options = parser.parse_args()
    options.limits = Limits(connections=options.max_connections, grace_seconds=options.grace)
    options.fail = parser.error
    names = [name for name, _ in options.voice]
    if len(set(names)) < len(names):
        parser.error(f"--voice: {next(name for name in names if names.count(name) > 1)!r} is given twice")
    check_served(parser, options)
    check_device(parser, options.device)
    check_backend(parser, options.backend, options.device)
    needed = options.limits.descriptors
    if (allowed := allow_files(needed)) < needed:
        parser.error(
            f"--max-connections {options.max_connections} needs {needed} open files, and {allowed} are allowed; "
            "raise the limit (ulimit -n), or allow fewer connections"
        )
    return options, check_address(parser, options.host, options.port)


def load(options: argparse.Namespace) -> tuple[Any, str]:
    """The model and, where it does not speak, what it does instead."""
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


def add_voices(engine: ChatterboxEngine, model: Any, given: list[tuple[str, Path]], made_up: bool) -> None:
    """Those given, and the model's own as "default", or made-up ones where nothing is real."""
    if made_up:
        make_up_voices(engine)
    elif model.conds is not None:
        engine.add_voice("default", conditionals=model.conds)
    for name, file in given:
        try:
            add_voice(engine, name, file)
        except (KVCacheError, OSError) as error:
            raise InputError(f"--voice {name}={file}: {said(error)}") from error


def add_voice(engine: ChatterboxEngine, name: str, file: Path) -> None:
    """The voice of a file, by what its name ends in."""
    if file.suffix == ".safetensors":
        engine.voices.load(file, name)
    elif file.suffix == ".pt":
        engine.add_voice(name, conditionals=file)
    else:
        engine.add_voice(name, audio_prompt_path=file)


def prepare(options: argparse.Namespace) -> FastAPI:
    """The app around the loaded model."""
    console = Console()
    with console.status(f"loading {options.variant} …"):
        model, note = load(options)
        engine = ChatterboxEngine(model, backend=options.backend, precision=options.precision, vocoder=options.vocoder)
        add_voices(engine, model, options.voice, made_up=bool(note))
        scheduler = SpeechScheduler(engine, max_rows=options.max_rows, max_waiting=options.max_waiting)
    console.print(
        f"[bold]Chatterbox {options.variant}[/bold] on {options.device}; voices: {escape(some(engine.voices))}."
    )
    if note:
        console.print(note, style="bold yellow", markup=False)
    languages = beside(model, "SUPPORTED_LANGUAGES", {})
    return create_app(
        scheduler,
        engine.voices,
        model=f"Chatterbox {options.variant}",
        note=note,
        languages=languages if engine.t3.hp.is_multilingual else (),
        hosts=options.allow_host,
        limits=options.limits,
        chunks=options.chunks,
    )


def main() -> None:
    options, bound = parse()
    with bound, suppress(KeyboardInterrupt):
        try:
            app = prepare(options)
        except UNREADABLE as error:
            options.fail(f"cannot load {options.variant}: {type(error).__name__}: {said(error)[:500]}")
        host, port = bound.getsockname()[:2]
        Console().print(f"Listening on http://{f'[{host}]' if ':' in host else host}:{port}")
        Server(app, app.state.gate, options.limits).run([bound])


if __name__ == "__main__":
    main()
