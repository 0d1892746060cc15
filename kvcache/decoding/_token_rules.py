"""What `generate` rules about single tokens, beside how it samples: those that are out of the question, forced, or repeat.

The known ones are tensors with a row for each request, and run within a step. Any other processor of transformers' runs as it
is, once a step, on the token ids that it asks for: by Python, so that such a step is neither compiled nor captured.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvcache.decoding._sampler import TRANSFORMERS, ScoreRule
from kvcache.models import class_code

ALWAYS = 2**31 - 1
"""Until this step: for good."""

LIMITS, NGRAMS, PROCESSORS = "limits", "ngrams", "processors"
LONGEST_NGRAM = 8
"""Tokens of an n-gram that a batch can forbid."""

_FORCED = 2  # steps at which one request can be forced: its first and its last


def processor_name(one: Any) -> str:
    """What a processor or criterion is called: its class, or where it is a function its own name."""
    return getattr(one, "__name__", type(one).__name__)


class Forced(NamedTuple):
    """Tokens that a request must say one of.

    Attributes:
        at: the step: 0 draws the first token.
        tokens: their ids.
    """

    at: int
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Limits:
    """Which tokens a request cannot say, and which it must.

    Attributes:
        until: by token id, up to which step it is out of the question: from step 0, which draws the first token, to before this.
        forced: what it must say at some steps, whatever else is out of the question; two at most.
    """

    until: Mapping[int, int]
    forced: tuple[Forced, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.until or self.forced)


@dataclass(frozen=True)
class TokenRules:
    """What changes one request's scores, beside its `Sampling`.

    Attributes:
        limits: tokens that are out of the question, and forced ones.
        ngram: no n-gram of so many tokens comes twice; 0: any may.
        processors: of transformers, in order, in place of all else; none by default.
    """

    limits: Limits = Limits({})
    ngram: int = 0
    processors: tuple[Any, ...] = ()

    @property
    def why_host(self) -> str | None:
        """Why its steps can be neither compiled nor captured; None if they can."""
        return "some of its processors run once a step, by Python" if self.processors else None

    def notes(self, ids: Tensor, ends: Sequence[int] = (), pad: int | None = None) -> dict[str, Any]:
        """What the rules of a sampler have to know of it, see `Sampler.begin`.

        Args:
            ids: its prompt ``[tokens]``.
            ends: the tokens that end it.
            pad: what stands behind an end; None: what is drawn there.
        """
        notes: dict[str, Any] = {}
        if self.limits:
            notes[LIMITS] = self.limits
        if self.ngram:
            notes[NGRAMS] = NGramNote(self.ngram, ids)
        if self.processors:
            notes[PROCESSORS] = ProcessorsNote(self.processors, ids, tuple(ends), pad)
        return notes

    def room(self, tokens: int) -> "RuleRoom":
        """What a sampler needs for requests with these rules.

        Args:
            tokens: of a request at most, its prompt among them.
        """
        # Few sizes: each has a step of its own.
        longest = 1 << max(8, (tokens - 1).bit_length()) if self.ngram else 0
        ngram = max(self.ngram, LONGEST_NGRAM) if self.ngram else 0
        return RuleRoom(bool(self.limits), ngram, longest, self.why_host)


@dataclass(frozen=True)
class RuleRoom:
    """Which rules a sampler has.

    Attributes:
        limits: `TokenLimits`.
        ngram: `RepeatedNGrams` of so many tokens at most; 0: none.
        tokens: that those remember of a request.
        why_host: there are processors of transformers', and this is why steps run eagerly; None: there are none.
    """

    limits: bool = False
    ngram: int = 0
    tokens: int = 0
    why_host: str | None = None

    @property
    def order(self) -> tuple[str, ...]:
        """In which order scores are changed: as `generate` does."""
        first = [PROCESSORS] * (self.why_host is not None)
        return (
            *first,
            TRANSFORMERS[0],
            *[NGRAMS] * (self.ngram > 0),
            *[LIMITS] * self.limits,
            *TRANSFORMERS[1:],
        )

    def rules(self, requests: int, vocabulary: int, device: torch.device) -> dict[str, ScoreRule]:
        """The rules of so many requests, by name."""
        made: dict[str, ScoreRule] = {}
        if self.why_host is not None:
            made[PROCESSORS] = HostProcessors(requests)
        if self.ngram:
            made[NGRAMS] = RepeatedNGrams(requests, self.tokens, self.ngram, device)
        if self.limits:
            made[LIMITS] = TokenLimits(requests, vocabulary, device)
        return made


class _Held:
    """Tensors with a row for each request, which are cut and moved together."""

    def __init__(self, requests: int) -> None:
        self._held: dict[str, Tensor] = {}
        self._active = [False] * requests

    def first_rows(self, requests: int) -> Any:
        """See `ScoreRule`."""
        new = copy.copy(self)
        vars(new).update(_held={name: held[:requests] for name, held in self._held.items()})
        return new

    def end(self, request: int) -> None:
        """See `ScoreRule`."""
        self._active[request] = False

    def move(self, request: int, to: int) -> None:
        """See `ScoreRule`."""
        for held in self._held.values():
            held[to] = held[request].clone()
        self._active[to] = self._active[request]

    def state(self) -> list[Tensor]:
        """See `ScoreRule`: each ``[requests, …]``."""
        return list(self._held.values())

    def program(self) -> str:
        """See `ScoreRule`."""
        return class_code(type(self))

    def active(self, which: slice) -> bool:
        """See `ScoreRule`."""
        rows = next(iter(self._held.values())).shape[0]
        return any(self._active[:rows][which])

    def look(self, weights: Sequence[Tensor]) -> None:
        """See `ScoreRule`: of ``[requests, columns]`` each it looks at nothing."""


class TokenLimits(_Held):
    """Tokens that are out of the question up to some step, and steps at which one of few must be said; a `ScoreRule`.

    Args:
        requests: how many.
        vocabulary: how many tokens there are.
        device: of the scores.
    """

    def __init__(self, requests: int, vocabulary: int, device: torch.device) -> None:
        super().__init__(requests)
        with torch.inference_mode(False):
            self._held = {
                "made": torch.zeros(requests, dtype=torch.int32, device=device),
                "until": torch.zeros(requests, vocabulary, dtype=torch.int32, device=device),
                "forced_at": torch.full((requests, _FORCED), -1, dtype=torch.int32, device=device),
                "forced": torch.zeros(requests, _FORCED, vocabulary, dtype=torch.bool, device=device),
            }

    def begin(self, request: int, note: Limits | None) -> None:
        """See `ScoreRule`."""
        self._active[request] = note is not None
        held = {name: one[request] for name, one in self._held.items()}
        for name, one in held.items():
            one.fill_(-1 if name == "forced_at" else 0)
        if note is None:
            return
        said = range(held["until"].shape[0])  # other ids are out of the question anyway
        until = {token: step for token, step in note.until.items() if token in said}
        tokens = torch.tensor(list(until), dtype=torch.long)
        steps = torch.tensor(list(until.values()), dtype=torch.int32)
        held["until"].index_copy_(0, tokens.to(held["until"].device), steps.to(held["until"].device))
        for i, forced in enumerate(note.forced):
            held["forced_at"][i] = forced.at
            held["forced"][i, [token for token in forced.tokens if token in said]] = True

    def scores(self, scores: Tensor, which: slice) -> Tensor:
        """The scores ``[requests, vocabulary]``: ``-inf`` where a token is out of the question, 0 where it is forced."""
        held = {name: one[which] for name, one in self._held.items()}
        made = held["made"][:, None]
        scores = scores.masked_fill(held["until"] > made, -torch.inf)
        now = held["forced_at"] == made
        for i in range(_FORCED):
            only = scores.new_zeros(()).expand_as(scores).masked_fill(~held["forced"][:, i], -torch.inf)
            scores = torch.where(now[:, i, None], only, scores)
        return scores

    def drew(self, tokens: Tensor, which: slice) -> None:  # noqa: ARG002  # as every rule's
        """See `ScoreRule`: tokens ``[requests]``."""
        self._held["made"][which].add_(1)


class NGramNote(NamedTuple):
    """What `RepeatedNGrams` has to know of a request.

    Attributes:
        size: tokens of an n-gram.
        ids: the prompt's token ids ``[tokens]``.
    """

    size: int
    ids: Tensor


class RepeatedNGrams(_Held):
    """No n-gram comes twice in a request (Paulus et al., arXiv:1705.04304); a `ScoreRule`.

    Args:
        requests: how many.
        tokens: of a request that are remembered.
        longest: tokens of an n-gram at most.
        device: of the scores.
    """

    def __init__(self, requests: int, tokens: int, longest: int, device: torch.device) -> None:
        super().__init__(requests)
        self._longest = longest
        with torch.inference_mode(False):
            self._held = {
                "ids": torch.zeros(requests, tokens, dtype=torch.long, device=device),
                "length": torch.zeros(requests, dtype=torch.long, device=device),
                "size": torch.zeros(requests, dtype=torch.long, device=device),  # 0: whatever comes
            }
            self._order = torch.arange(tokens, device=device)

    def program(self) -> str:
        """See `ScoreRule`."""
        return f"{super().program()} {self._longest} of {len(self._order)}"

    def begin(self, request: int, note: NGramNote | None) -> None:
        """See `ScoreRule`."""
        held = {name: one[request] for name, one in self._held.items()}
        self._active[request] = note is not None
        held["size"].fill_(0 if note is None else note.size)
        if note is not None:
            held["length"].fill_(len(note.ids))
            held["ids"][: len(note.ids)] = note.ids.to(held["ids"].device)

    def scores(self, scores: Tensor, which: slice) -> Tensor:
        """The scores ``[requests, vocabulary]``: ``-inf`` where a token would end an n-gram that has been."""
        ids, length, size = (self._held[name][which][:, None] for name in ("ids", "length", "size"))
        ids, order = ids[:, 0], self._order
        most, vocabulary = order.shape[0] - 1, scores.shape[1]
        match = (size > 0) & (order <= length - size)  # an n-gram that has been begins here
        for i in range(self._longest - 1):
            last = ids.gather(1, (length - size + 1 + i).clamp(0, most))
            match = match & ((ids.roll(-i, 1) == last) | (i >= size - 1))
        ends = ids.gather(1, (order + size - 1).clamp(0, most)).clamp(max=vocabulary)
        banned = torch.zeros(scores.shape[0], vocabulary + 1, dtype=torch.bool, device=scores.device)
        banned = banned.scatter(1, torch.where(match, ends, vocabulary), True)[:, :vocabulary]
        return scores.masked_fill(banned, -torch.inf)

    def drew(self, tokens: Tensor, which: slice) -> None:
        """See `ScoreRule`: tokens ``[requests]``."""
        ids, length = self._held["ids"][which], self._held["length"][which]
        ids.scatter_(1, length.clamp(max=ids.shape[1] - 1)[:, None], tokens[:, None])
        length.add_(1)


class ProcessorsNote(NamedTuple):
    """What `HostProcessors` has to know of a request.

    Attributes:
        processors: transformers', in order.
        ids: the prompt's token ids ``[tokens]``.
        ends: the tokens that end it.
        pad: what stands behind an end, for those that look there; None: what is drawn.
    """

    processors: tuple[Any, ...]
    ids: Tensor
    ends: tuple[int, ...] = ()
    pad: int | None = None


class HostProcessors:
    """Processors of transformers' as they are, on the token ids that `generate` would give them; a `ScoreRule`.

    Requests that have the same ones, and begin together, are given to them together, as the rows of a call are in `generate`.

    Args:
        requests: how many.
    """

    def __init__(self, requests: int) -> None:
        self._notes: list[ProcessorsNote | None] = [None] * requests  # with what has been said since among the ids
        self._over = [False] * requests
        self._rows = requests

    def first_rows(self, requests: int) -> "HostProcessors":
        """See `ScoreRule`."""
        new = copy.copy(self)
        vars(new).update(_rows=requests)
        return new

    def end(self, request: int) -> None:
        """See `ScoreRule`."""
        self.begin(request, None)

    def move(self, request: int, to: int) -> None:
        """See `ScoreRule`."""
        self._notes[to], self._over[to] = self._notes[request], self._over[request]

    def state(self) -> list[Tensor]:
        """See `ScoreRule`: nothing ``[requests, …]``, as it is never captured."""
        return []

    def program(self) -> str:
        """See `ScoreRule`."""
        return class_code(type(self))

    def active(self, which: slice) -> bool:
        """See `ScoreRule`."""
        return any(note is not None for note in self._notes[: self._rows][which])

    def look(self, weights: Sequence[Tensor]) -> None:
        """See `ScoreRule`: of ``[requests, columns]`` each it looks at nothing."""

    def begin(self, request: int, note: ProcessorsNote | None) -> None:
        """See `ScoreRule`."""
        self._notes[request], self._over[request] = note, False

    def scores(self, scores: Tensor, which: slice) -> Tensor:
        """The scores ``[requests, vocabulary]`` that the processors make of them."""
        made, first = [], which.indices(self._rows)[0]
        for rows in self._alike(which):
            ours = scores[rows.start - first : rows.stop - first]
            notes = [note for note in self._notes[rows] if note is not None]
            if notes:
                ids = torch.stack([note.ids for note in notes])
                for processor in notes[0].processors:
                    ours = processor(ids, ours)
            made.append(ours)
        return torch.cat(made)

    def _alike(self, which: slice) -> list[slice]:
        """Neighbours with the same processors and as many tokens."""
        first, last, _ = which.indices(self._rows)
        notes = self._notes[first:last]
        kinds = [None if note is None else (note.processors, len(note.ids)) for note in notes]
        edges = [i for i in range(1, len(kinds)) if kinds[i] != kinds[i - 1]]
        return [slice(first + a, first + b) for a, b in zip([0, *edges], [*edges, len(kinds)], strict=True)]

    def drew(self, tokens: Tensor, which: slice) -> None:
        """See `ScoreRule`: tokens ``[requests]``."""
        for request, token in zip(range(*which.indices(self._rows)), tokens.tolist(), strict=True):
            if (note := self._notes[request]) is not None:
                shown = note.pad if self._over[request] and note.pad is not None else token
                self._notes[request] = note._replace(ids=torch.cat([note.ids, note.ids.new_tensor([shown])]))
                self._over[request] = self._over[request] or token in note.ends
