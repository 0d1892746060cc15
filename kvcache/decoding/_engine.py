"""The decode loop: whole steps on the device, a chunk at a time.

A step runs the model on each request's last token, draws the next, writes it down and moves on, without a look at the
host. Whether a request has ended is looked at once a chunk, by whoever asked for it; what was decoded beyond the end is
thrown away.
"""

import copy
import logging
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from typing_extensions import TypedDict, Unpack

from kvcache.cache import CacheReport, LayerCache
from kvcache.decoding._backends import BUCKET, Backend, BackendName, Compiled, Eager, Steps, backend_for
from kvcache.decoding._ends import FAILED
from kvcache.decoding._programs import Programs
from kvcache.decoding._sampler import Drawing, Sampler, Sampling, default_generator
from kvcache.decoding._static_cache import StaticKV
from kvcache.decoding._wiring import DecodeInputs, HeadWatch
from kvcache.errors import GeometryError, KVCacheError
from kvcache.events import Event, emit, has_listeners

Forward = Callable[[Tensor, Tensor, dict[str, Any]], Tensor]
"""Runs a model on one token per request: token ids ``[requests]``; how many tokens each request has made so far,
``[requests]``; what else to hand to the model. Gives logits ``[rows, vocabulary]``. Where drafts are judged: token ids
``[requests, n]`` and logits ``[rows, n, vocabulary]``."""

_NOISE_BYTES = 64 * 2**20


class StepArguments(TypedDict, total=False):
    """The fields of `StepOptions`, as keyword arguments."""

    kernel: bool
    tf32: bool
    ahead: int
    bucket: int
    why_eager: str | None
    programs: Programs | None


@dataclass(frozen=True)
class StepOptions:
    """How the steps of a `Decoding` run.

    Attributes:
        kernel: read the cache with the Triton kernel where there is a GPU for it, and by reductions where steps are compiled
            for a CPU; False takes torch's own attention.
        tf32: let a CUDA GPU round the inputs of fp32 products to TF32.
        ahead: the most steps between two looks at the host.
        bucket: slots that a captured graph reads, or a multiple of so many; the Triton kernel reads as many as there are
            tokens, whatever this is.
        why_eager: why steps can only run eagerly, whatever the back end; None if they can be compiled and captured.
        programs: where compiled steps are kept; by default in the user's cache.
    """

    kernel: bool = True
    tf32: bool = False
    ahead: int = 64
    bucket: int = BUCKET
    why_eager: str | None = None
    programs: Programs | None = None


class Judging(Protocol):
    """Steps of another kind on the same requests: each judges several tokens, and says one at least."""

    @property
    def fresh(self) -> int:
        """How many tokens a step runs."""

    def run(self, steps: int, drawing: Drawing | None) -> Tensor:
        """Run so many; the tokens that they say, ``[requests, n]``."""


class Decoding:
    """Requests that decode together on a `StaticKV`.

    Args:
        forward: the model, see `Forward`.
        kv: its cache: as many rows as requests, or twice as many with guidance.
        sampler: how tokens are drawn.
        backend: ``"eager"``; ``"compile"`` by torch's compiler, which takes a minute or so at the first chunk;
            ``"graph"`` records a step once and replays it, as a CUDA graph; ``"graph+compile"`` records the compiled step.
        watch: attention heads that the rules of the sampler look at.
        **options: the fields of `StepOptions`.

    Attributes:
        token: each request's last token, ``[requests]``.
        fallback: why something else than `backend` runs; None if it does.
        beside: steps of other kinds on the same requests, which wait with it for the next request.
    """

    def __init__(
        self,
        forward: Forward,
        kv: StaticKV,
        sampler: Sampler,
        backend: BackendName = "eager",
        *,
        watch: HeadWatch | None = None,
        **options: Unpack[StepArguments],
    ) -> None:
        self._options = asked = StepOptions(**options)
        requests, vocabulary = sampler.seen.shape
        self.rows = 2 if sampler.guided else 1
        if kv.rows != requests * self.rows:
            raise GeometryError(
                f"{requests} requests of {self.rows} rows need a cache of {requests * self.rows} rows, this one has {kv.rows}"
            )
        device = kv.length.device
        self.kv = kv
        self.sampler = sampler
        self._forward = forward
        self._inputs = DecodeInputs(kv, asked.kernel, watch)
        self._tf32 = asked.tf32 and device.type == "cuda"
        self.ahead = max(1, min(asked.ahead, _NOISE_BYTES // (4 * requests * vocabulary)))
        with torch.inference_mode(False):
            self.token, self.made, self._begun = (
                torch.zeros(requests, dtype=torch.long, device=device) for _ in range(3)
            )
            self._column = torch.zeros(1, dtype=torch.long, device=device)
            self._out = torch.zeros(requests, self.ahead, dtype=torch.long, device=device)
            self._noise = torch.ones(requests, self.ahead, vocabulary, device=device)
        self._generators: list[torch.Generator | None] = [None] * requests  # None where nothing is drawn
        self._states: dict[torch.Generator, Tensor] = {}  # as they were before the last chunk
        self._left = 0  # tokens whose noise is there already
        self._named: BackendName = backend if asked.why_eager is None else "eager"
        self._backend: Backend
        self._backend = backend_for(self._named, device, asked.bucket, asked.programs)
        self.fallback = asked.why_eager if self._named != backend else None
        if self.fallback is not None:
            emit(Event("fell_back", f"{backend} to {self.backend}", reason=self.fallback))
        self._fronts: dict[int, Decoding] = {}
        self.beside: dict[Hashable, Judging] = {}

    @property
    def backend(self) -> str:
        """What runs the steps."""
        return self._backend.name

    def other_backend(self) -> Backend:
        """One more of the kind that runs the steps, for steps of another kind."""
        return backend_for(self._named, self.token.device, self._options.bucket, self._options.programs)

    def report(self) -> CacheReport:
        """The account of the cache, and of what runs the steps."""
        if isinstance(self._backend, Compiled) and self._backend.pending:
            return replace(self.kv.report(), backend="eager", fallback="its steps are being compiled")
        whys = [one.fallback for one in (self, *self._fronts.values()) if one.fallback is not None]
        return replace(self.kv.report(), backend=self.backend, fallback=whys[0] if whys else None)

    @property
    def order(self) -> Tensor:
        """``arange(slots)``."""
        return self.kv.order

    @property
    def requests(self) -> int:
        """How many decode together."""
        return len(self.token)

    def first_rows(self, requests: int) -> "Decoding":
        """The first requests as a decoding of their own, for steps that cost only as much as they need.

        The same memory throughout; what runs the steps is captured or compiled for each number of requests.
        """
        if requests == len(self.token):
            return self
        if requests not in self._fronts:
            new = copy.copy(self)
            new._fronts = {}
            new.kv, new.sampler = self.kv.first_rows(requests * self.rows), self.sampler.first_rows(requests)
            new._inputs = DecodeInputs(new.kv, self._inputs.own, self._inputs.watch)
            new.token, new.made, new._out = self.token[:requests], self.made[:requests], self._out[:requests]
            new._begun = self._begun[:requests]
            new._noise = self._noise[:requests]
            new._backend = self.other_backend()
            new.fallback = None
            self._fronts[requests] = new
        return self._fronts[requests]

    # ------------------------------------------------------------------ requests

    def load(self, first: int, layers: Sequence[LayerCache], pads: Tensor | None = None) -> None:
        """As `StaticKV.load`, but copied only before the next step: a request's first token does not wait for it."""
        self.kv.load(first, layers, pads, later=True)

    @torch.no_grad()
    def start(
        self,
        first: int,
        logits: Tensor,
        sampling: Sequence[Sampling],
        generators: Sequence[torch.Generator | None],
        seen: Sequence[Tensor],
        notes: Sequence[Mapping[str, Any]] | None = None,
    ) -> Tensor:
        """Begin requests whose rows have been loaded: draw the first token of each, ``[requests]``.

        Args:
            first: the first of these requests.
            logits: of the last position of their prefill, ``[rows, vocabulary]``.
            sampling: their settings.
            generators: of their draws; None takes torch's default one. Requests with the same share its draws, as the
                rows of a batch do in `generate`.
            seen: the token ids that their repetition penalty is about from the start.
            notes: what the rules of the sampler have to know of each, see `Sampler.begin`.

        Returns:
            The tokens, or `FAILED`, see `check_drawn`.
        """
        which = slice(first, first + len(sampling))
        default = default_generator(self.token.device)
        for i, request in enumerate(range(*which.indices(len(self._generators)))):
            self.sampler.set(request, sampling[i])
            self.sampler.begin(request, seen[i], None if notes is None else notes[i])
            self._generators[request] = generators[i] or default
        self._states, self._left = {}, 0
        drawing = self.sampler.drawing_of(which)
        noise = self._noise[which, 0]
        if drawing is not None and drawing.draws:
            self._draw(noise, which)
        token = self.sampler(logits, noise, drawing, which)
        self.token[which] = token
        self.made[which] = self._begun[which] = 1
        return token.masked_fill(self.sampler.failed[which], FAILED)

    def free(self, first: int, requests: int) -> None:
        """End these requests. Their rows are empty, draw nothing, and take part in steps for nothing."""
        self.kv.free(first * self.rows, requests * self.rows)
        self.made[first : first + requests] = self._begun[first : first + requests] = 0
        for request in range(first, first + requests):
            self.sampler.free(request)
            self._generators[request] = None

    @torch.no_grad()
    def move(self, request: int, to: int) -> None:
        """Bring a request to another place, which must be free."""
        self.kv.move(request * self.rows, to * self.rows, self.rows)
        self.sampler.move(request, to)
        for held in (self.token, self.made, self._begun):
            held[to] = held[request].clone()
        self._generators[to] = self._generators[request]
        self.free(request, 1)

    @torch.no_grad()
    def chunk(self, steps: int, judging: "Judging | None" = None) -> Tensor:
        """The next tokens of every request, ``[requests, steps]``; `FAILED` from where one could not be drawn.

        Args:
            steps: they run `ahead` tokens of a request at most.
            judging: what says several tokens a step, as many as it finds: then there are at least `steps`.

        Raises:
            CapacityError: if a row has no room for them; nothing has changed then.
        """
        tokens = steps * (1 if judging is None else judging.fresh)
        if not 1 <= tokens <= self.ahead:
            raise GeometryError(f"a chunk of {tokens} steps: give 1 to {self.ahead}")
        self.kv.check(tokens)
        self.kv.settle()
        drawing = self.sampler.drawing
        draws = drawing is not None and drawing.draws
        if draws:
            default = default_generator(self.token.device)
            # Behind drafts there is noise that was drawn before: where the generator would be without is not known.
            self._states = {} if self._left else {g: g.get_state() for g in self._generators if g is default}
            self._fresh_noise(tokens)
        before = self.kv.evicted() if has_listeners("evicted") else None
        with _tf32(self._tf32):
            said = self._run(steps, drawing) if judging is None else judging.run(steps, drawing)
        if draws:
            self._keep_noise(tokens, said.shape[1])
        if before is not None:
            self.kv.emit_evictions(before)
        return said

    def _run(self, steps: int, drawing: Drawing | None) -> Tensor:
        self._column.zero_()
        for _ in range(steps):
            self._backend = self.attempt(self._backend, self, drawing)
            self.kv.advance(1)
        return self._out[:, :steps].clone()

    @torch.no_grad()
    def teacher_forced_logits(self, ids: Tensor) -> Tensor:
        """The logits ``[n, rows, vocabulary]`` after each of these token ids ``[n]``.

        Every request is given them in turn, whatever it would have drawn, to judge what a cache or a precision costs. Steps
        run eagerly.

        Raises:
            CapacityError: if a row has no room for them; nothing has changed then.
        """
        self.kv.check(len(ids))
        self.kv.settle()
        said = []
        for token in ids.to(self.token):
            self.token.copy_(token)
            columns, whole = self.reach()
            said.append(self._forward(self.token, self.made, self._inputs.of_step(self.order[:columns], whole)))
            self.made.add_(self._begun)
            self.kv.length.add_(self.kv.taken)
            self.kv.advance(1)
        return torch.stack(said)

    def rewind(self, steps: int) -> None:
        """Leave torch's default generator as if the last chunk had ended after so many steps."""
        for generator, state in self._states.items():
            generator.set_state(state)
        if self._states:
            for noise in self._noise[:, :steps].unbind(1):
                self._draw(noise)
        self._states = {}

    def _fresh_noise(self, tokens: int) -> None:
        """Noise for so many tokens, behind what is left of that of drafts that were wrong."""
        for noise in self._noise[:, self._left : tokens].unbind(1):
            self._draw(noise)

    def _keep_noise(self, tokens: int, used: int) -> None:
        """The next token takes the noise behind that which was used."""
        self._left = max(self._left, tokens) - used
        if self._left:
            self._noise[:, : self._left] = self._noise[:, used : used + self._left].clone()
            self._states = {}

    def _draw(self, noise: Tensor, which: slice = slice(None)) -> None:
        """Exponential noise ``[requests, vocabulary]``, as `torch.multinomial` draws it."""
        generators = self._generators[: len(self.token)][which]
        if all(generator is generators[0] for generator in generators):
            generators, noise = generators[:1], noise[None]
        for generator, row in zip(generators, noise, strict=True):
            if generator is not None:
                row.exponential_(generator=generator)

    def attempt(self, backend: Backend, steps: Steps, drawing: Drawing | None) -> Backend:
        """Run one step of these; what runs the next: the same back end, or where that has failed the eager one."""
        try:
            backend(steps, drawing)
        except KVCacheError:
            raise
        except Exception as error:
            if isinstance(backend, Eager):
                raise
            self.fallback = (
                f"{backend.name} failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            )
            reason = f"{self.fallback}; decoding goes on in eager mode"
            emit(Event("fell_back", f"{backend.name} to eager", reason=reason), logging.WARNING)
            backend = Eager()
            backend(steps, drawing)
        return backend

    # ------------------------------------------------------------------ what is captured

    def step(self, order: Tensor, whole: bool, drawing: Drawing | None) -> None:
        """One token for every request. `order` is ``arange(columns)``: so many slots are read."""
        given = self._inputs.of_step(order, whole)
        logits = self._forward(self.token, self.made, given)
        if (looks := given.get("looks")) is not None:
            for rule in self.sampler.rules.values():
                rule.look(looks.weights)
        token = self.sampler(logits, self.noise(self._column), drawing)
        self._out.index_copy_(1, self._column, token.masked_fill(self.sampler.failed, FAILED)[:, None])
        self.token.copy_(token)
        self._column.add_(1)
        self.made.add_(self._begun)
        self.kv.length.add_(self.kv.taken)

    def judged(self, tokens: Tensor, order: Tensor) -> Tensor:
        """The logits ``[rows, n, vocabulary]`` after each of these token ids ``[rows, n]``, which are not counted."""
        return self._forward(tokens, self.made, self._inputs.of_step(order, False, tokens.shape[1]))

    def noise(self, column: Tensor) -> Tensor:
        """The noise ``[requests, vocabulary]`` of one token of the chunk, ``[1]``."""
        return self._noise.index_select(1, column)[:, 0]

    def reach(self) -> tuple[int, bool]:
        """How many slots the next step has to read, and whether every row sees all of them."""
        return (self.kv.slots, False) if self._inputs.kernel else self.kv.reach()

    def sized(self) -> list[tuple[Tensor, tuple[int, ...]]]:
        """The tensors that are as large as there are slots, and in which dimension."""
        return [(held, (2,)) for held in (*self.kv.keys, *self.kv.values)]

    def program(self) -> tuple[nn.Module | None, str]:
        """What decides which operations a step runs beside its tensors: the model, None if that is none, and the rest as text."""
        kv, sampler = self.kv, self.sampler
        kind = f"{type(self).__qualname__} {self.rows} rows of {len(self.token)}, slots of {kv.keys[0].dtype}"
        rest = f"{sampler.order} {sampler.guided} {sampler.vocabulary} {self._inputs.own} {self.ahead}"
        rest += "".join(f" {name} {rule.program()}" for name, rule in sampler.rules.items()) + f" {self._inputs.watch}"
        return self._forward if isinstance(self._forward, nn.Module) else None, f"{kind}, {rest}"

    def state(self) -> list[Tensor]:
        """All that a step changes, but for keys and values, which it writes again to where it wrote them."""
        return [self.token, self.made, self._column, self._out, self.kv.length, *self.sampler.state()]


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    if not allowed:
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
