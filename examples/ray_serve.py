"""A fleet: the engine as Ray Serve replicas, each voice at home on one of them, computed prefixes shared through Redis.

Voices are the .safetensors files of a folder that all machines see, as `engine.voices.export` writes them. With
--checkpoint it speaks; without, T3's weights are random and a stand-in makes tones of its tokens.

    redis-server &
    python examples/ray_serve.py --replicas 2 --voices voices/ --made-up 8 --redis redis://localhost:6379/0
    curl http://127.0.0.1:8000/v1/audio/speech --output hello.wav --json '{"voice": "voice-0", "input": "Hello there."}'
"""

import argparse
import asyncio
import hashlib
import importlib
import math
import re
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import ray
from example_options import CLASSES, count
from fastapi import Response
from fleet_api import SpeechBody, answer, new_api
from ray import serve
from ray.exceptions import ObjectLostError, RayActorError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
from server_options import check_fleet, parser_of

from kvcache import (
    BusyError,
    CapacityError,
    ClosedError,
    InputError,
    KVCacheError,
    MemoryStore,
    PrefixKey,
    PrefixSnapshot,
    RedisStore,
    SpeakerCache,
    TieredStore,
)
from kvcache_chatterbox import ChatterboxEngine, SpeechScheduler, Voice, load_t3, stand_in
from kvcache_chatterbox.upstream import upstream_t3

MOST_VOICES = 256  # that a replica keeps loaded; their prefixes have a budget of their own
MOST_REPLICAS_LOST = 3  # by one request: it may be what kills them
LOST = (RayActorError, ObjectLostError, ClosedError)  # how a replica's death shows, its machine's, and its shutdown

_VOICE = re.compile(r"[A-Za-z0-9._-]{1,100}")  # a name is a file's name, and comes from a stranger
_ERRORS: dict[int, type[KVCacheError]] = {400: InputError, 404: InputError, 429: BusyError, 503: BusyError}
_came_from = threading.local()


class LostError(KVCacheError):
    """A replica died while it streamed: the audio ends too early, and must not be gone on with by another."""


# ---------------------------------------------------------------------- which replica


class VoiceRouter(RequestRouter):
    """Sends a voice to its home, the replica that its name and the replica's hash highest with; to the next if that is full.

    No one has to be told who holds what: every router says the same at once, and when a replica comes or goes only its
    own voices move (rendezvous hashing).
    """

    queue_len_response_deadline_s = 0.5  # by default 0.1: a replica that computes would lose its voices to the next

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        voice = "" if pending_request is None else pending_request.metadata.multiplexed_model_id
        if not voice:
            return [candidate_replicas]
        home, *others = sorted(candidate_replicas, key=lambda replica: _weight(voice, replica), reverse=True)
        return [[home], others[:1], others[1:]]  # of several the one with the shortest queue is taken


def _weight(voice: str, replica: RunningReplica) -> bytes:
    return hashlib.sha256(f"{voice} {replica.replica_id.unique_id}".encode()).digest()


# ---------------------------------------------------------------------- a replica


class _Noticed:
    """A store that notes, for the thread that asks, that it had the whole prefix."""

    def get(self, key: PrefixKey) -> PrefixSnapshot | None:
        found: PrefixSnapshot | None = super().get(key)  # type: ignore[misc]
        if found is not None and len(found) == len(key):
            _came_from.tier = self.name  # type: ignore[attr-defined]
        return found


class _Memory(_Noticed, MemoryStore):
    pass


class _Redis(_Noticed, RedisStore):
    pass


class Replica:
    """One engine with its scheduler, and the voices that it was asked for so far.

    Args:
        load: gives the model, such as a loaded `ChatterboxTTS`.
        voices: the folder of voices.
        redis: URL of the server that shares what was computed of them; None shares nothing.
        max_rows: segments that decode together.
        max_waiting: requests that Serve may send beyond.
        chunks: how much audio comes at once where a request says nothing of it: keywords of `SpeechRequest.of`.
        **engine: see `ChatterboxEngine`.
    """

    async def __init__(
        self,
        load: Callable[[], Any],
        voices: str,
        redis: str | None,
        max_rows: int,
        max_waiting: int,
        chunks: dict[str, Any],
        **engine: Any,
    ) -> None:
        model = load()
        memory = _Memory("1GiB", device=getattr(model, "t3", model).device)
        store = TieredStore(memory) if redis is None else TieredStore(memory, _Redis(redis))
        self._engine = ChatterboxEngine(model, prefix_cache=SpeakerCache(store), **engine)
        self._folder, self._chunks = Path(voices), chunks
        self._stamps: OrderedDict[str, tuple[int, int]] = OrderedDict()  # of the files, least recently used first
        self._id = serve.get_replica_context().replica_id.unique_id
        # Serve counts requests; those with several segments may each take several of the rows.
        self._scheduler = SpeechScheduler(self._engine, max_rows=max_rows, max_waiting=max_rows + max_waiting)
        await self._scheduler.__aenter__()

    async def __del__(self) -> None:  # Serve awaits it once the last request is through
        if hasattr(self, "_scheduler"):  # else the model could not be loaded, which Serve reports
            await self._scheduler.close()
            await asyncio.to_thread(self._engine.prefix_cache.close)  # what is still to be written for the others

    async def speak(self, text: str, voice: str | None, options: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Chunks of audio, each with who made it; or one ``status`` and ``reason``, as of HTTP.

        An error that is the client's is no exception: it is nothing for the replica's log.
        """
        try:
            speaker, prefix = (None, None) if voice is None else await self._prepare(voice)
            chunks = {} if self._chunks.keys() & options.keys() else self._chunks
            stream = self._scheduler.submit(text, voice=speaker, **chunks, **options)
            audio = await anext(stream, None)  # an error of the request comes in place of its first audio
        except FileNotFoundError as error:
            yield {"status": 404, "reason": str(error)}
            return
        except (InputError, CapacityError) as error:
            yield {"status": 400, "reason": str(error)}
            return
        except BusyError as error:
            yield {"status": 429, "reason": str(error), "retry_after": math.ceil(error.retry_after or 1)}
            return
        try:
            while audio is not None:
                yield {"audio": audio[0].cpu().numpy(), "replica": self._id, "prefix": prefix}
                audio = await anext(stream, None)
        finally:
            await stream.aclose()

    def metrics(self) -> dict[str, Any]:
        """The scheduler's figures and the speakers' statistics."""
        return {
            "replica": self._id,
            "scheduler": self._scheduler.metrics(),
            "prefix_cache": self._engine.prefix_cache.stats(),
        }

    async def _prepare(self, name: str) -> tuple[Voice, str]:
        """A voice whose prefix is in memory now, and where that was: memory, redis, or nowhere, so it was computed."""
        voice, stamp, tier = await asyncio.to_thread(self._load, name)
        self._stamps[name] = stamp
        self._stamps.move_to_end(name)
        while len(self._stamps) > MOST_VOICES:
            self._engine.voices.remove(self._stamps.popitem(last=False)[0])
        return voice, tier

    def _load(self, name: str) -> tuple[Voice, tuple[int, int], str]:
        path = self._folder / f"{name}.safetensors"
        if not _VOICE.fullmatch(name) or not path.is_file():
            raise FileNotFoundError(f"there is no voice {name!r}; export one to the folder of voices")
        found = path.stat()
        stamp = found.st_mtime_ns, found.st_size
        voice = self._engine.voices.get(name) if self._stamps.get(name) == stamp else None  # or the file was replaced
        _came_from.tier = "computed"
        if voice is None:
            voice = self._engine.voices[self._engine.voices.load(path, name)]
        else:
            self._engine.add_voice(name, conditionals=voice)  # which asks for its prefix again: it may have left memory
        return voice, stamp, _came_from.tier


# ---------------------------------------------------------------------- the ingress

api = new_api()


@serve.ingress(api)  # which copies the routes right here: what they use is above
class Ingress:
    """Takes requests, over HTTP and from handles, and asks another replica where one died before it was heard.

    Args:
        replicas: of `Replica`.
    """

    def __init__(self, replicas: DeploymentHandle) -> None:
        self._replicas = replicas

    async def speak(self, text: str, voice: str | None = None, **options: Any) -> AsyncIterator[dict[str, Any]]:
        """For handles with ``stream=True``: chunks with ``audio``, ``replica``, ``prefix`` and how often it was ``retried``.

        Raises:
            InputError, BusyError: before the first chunk.
            LostError: after it, when the replica died.
        """
        async for chunk in self._chunks(text, voice, options):
            if "status" in chunk:
                raise _ERRORS[chunk["status"]](chunk["reason"])
            yield chunk

    @api.post("/v1/audio/speech", response_class=Response)
    async def speech(self, asked: SpeechBody) -> Response:
        """Speak a text; the audio comes while it is made."""
        return await answer(asked, self._chunks(asked.input, asked.voice, asked.options()))

    async def _chunks(self, text: str, voice: str | None, options: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """What a replica answers. Once one was heard it is that one's answer to the end, or a `LostError`."""
        replicas = self._replicas.options(stream=True, multiplexed_model_id=voice or "")
        for retried in range(MOST_REPLICAS_LOST):
            answer, begun = replicas.speak.remote(text, voice, options), False
            try:
                async for chunk in answer:
                    begun = True
                    yield {**chunk, "retried": retried}
                return
            except BackPressureError:
                yield {"status": 429, "reason": "all replicas are full and too many requests wait; try again later"}
                return
            except LOST as error:
                if begun:
                    raise LostError("the replica died while it streamed; ask again for the whole text") from error
            except (asyncio.CancelledError, GeneratorExit):  # the client went away
                answer.cancel()
                raise
        yield {"status": 503, "reason": f"{retried + 1} replicas died of this request, or while it was there"}


def fleet(
    load: Callable[[], Any],
    voices: str,
    redis: str | None,
    *,
    replicas: int = 2,
    max_rows: int = 8,
    max_waiting: int = 8,
    max_queued: int = 64,
    cpus: float = 1,
    gpus: float = 0,
    chunks: dict[str, Any] | None = None,
    **engine: Any,
) -> serve.Application:
    """The application to give to `serve.run`.

    Args:
        load, voices, redis, max_rows, chunks, **engine: see `Replica`.
        replicas: how many.
        max_waiting: requests that wait on a replica; beyond them a voice's requests go to the next one.
        max_queued: requests that wait at the ingress while all replicas are full; beyond them they are refused.
        cpus, gpus: of a replica.
    """
    speech = serve.deployment(
        Replica,
        num_replicas=replicas,
        max_ongoing_requests=max_rows + max_waiting,
        max_queued_requests=max_queued,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        request_router_config=RequestRouterConfig(request_router_class=VoiceRouter),
        health_check_period_s=2,
        graceful_shutdown_timeout_s=120,  # for streams to end when a replica is replaced or taken away
    )
    ingress = serve.deployment(Ingress, max_ongoing_requests=10_000, ray_actor_options={"num_cpus": 0})
    return ingress.bind(speech.bind(load, voices, redis, max_rows, max_waiting, chunks or {}, **engine))


# ---------------------------------------------------------------------- from the command line


def parse() -> argparse.Namespace:
    """The options: what cannot work ends here, before anything is loaded."""
    parser = parser_of(__doc__)
    parser.add_argument("--device", default="cpu", help="of each replica (default: cpu); cuda takes a GPU for each")
    parser.add_argument("--voices", type=Path, required=True, metavar="DIR", help="with a .safetensors file for each")
    parser.add_argument(
        "--made-up", type=count(0), default=0, metavar="N", help="write so many made-up voices there first"
    )
    parser.add_argument("--redis", metavar="URL", help="where what is computed of voices is shared (default: nowhere)")
    parser.add_argument("--address", help="of a Ray cluster (default: start one on this machine)")
    parser.add_argument("--replicas", type=count(1), default=2)
    options = parser.parse_args()
    check_fleet(parser, options)
    return options


def load_model(variant: str, checkpoint: Path | None, device: str) -> Any:
    """The whole model where there are weights and its audio stack, else T3 with tones for a vocoder."""
    upstream_t3()
    if checkpoint is not None and variant in CLASSES:
        module, name = CLASSES[variant]
        return getattr(importlib.import_module(module), name).from_local(checkpoint, device)
    return stand_in(load_t3(variant, checkpoint, device=device))


def make_voices(model: Any, folder: Path, count: int) -> None:
    """Write made-up voices, for a try without any."""
    engine = ChatterboxEngine(model, reuse="none")
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(count):
        name = f"voice-{seed}"
        engine.add_voice(name, conditionals=stand_in(engine.t3, seed).conds)
        engine.voices.export(name, folder / f"{name}.safetensors", computed=False)  # Redis shares what is computed


def main() -> None:
    options = parse()
    checkpoint = None if options.checkpoint is None else options.checkpoint.resolve()
    load = partial(load_model, options.variant, checkpoint, options.device)
    if options.made_up:
        make_voices(load(), options.voices, options.made_up)
    ray.init(
        address=options.address, runtime_env={"working_dir": str(Path(__file__).parent)}
    )  # this module, everywhere
    gpus = 1 if options.device.startswith("cuda") else 0
    voices = str(options.voices.resolve())
    serve.start(http_options={"host": options.host, "port": options.port})
    given = {"replicas": options.replicas, "max_rows": options.max_rows, "gpus": gpus}
    app = fleet(load, voices, options.redis, chunks=options.chunks, vocoder=options.vocoder, **given)
    with suppress(KeyboardInterrupt):
        serve.run(app, name="speech", blocking=True)


if __name__ == "__main__":
    import ray_serve  # under the name that replicas import it by

    ray_serve.main()
