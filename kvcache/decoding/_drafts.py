"""Drafts: several tokens guessed at once and judged in one step, so that a step may say more than one.

The guess is what followed the last few tokens where they stood before (n-gram or prompt lookup; Saxena, "Prompt Lookup
Decoding", 2023). One run of the model judges all of it: a guessed token stays where it is the very token that the request
draws there, with its own settings and noise, so what is said does not change (Leviathan et al., arXiv:2211.17192: the draft has
all of its probability on one token). What is behind the first wrong one is taken back: lengths do not count it.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kvcache.decoding._ends import FAILED
from kvcache.decoding._engine import Decoding
from kvcache.decoding._sampler import Drawing
from kvcache.errors import check_whole

_LOOKED_BACK = 64  # tokens of the text by which it is judged whether drafts pay
_SEARCHED = 2048  # tokens of the text in which they are looked up for that
_JUDGED = 16  # tokens after which it is judged again
_COST = 1.5  # a step with a draft beside a step without, until both have been measured
_GAIN = 1.05  # what it has to bring at least


@dataclass(frozen=True)
class Drafts:
    """How tokens are guessed.

    Attributes:
        tokens: of a guess.
        longest: how many of the last tokens are looked for; where they have not stood together before, fewer.
        cost: a step with a guess beside one without; None: as measured.
    """

    tokens: int = 7
    longest: int = 3
    cost: float | None = None

    def __post_init__(self) -> None:
        check_whole("tokens", self.tokens, 1)
        check_whole("longest", self.longest, 1)


def looked_up(ids: Tensor, known: Tensor, drafts: Drafts) -> Tensor:
    """What followed the last tokens of each row where as many of them as possible stood before, ``[rows, drafts.tokens]``.

    Of several places with as many it is the last. Where there is none, it is whatever stands there.

    Args:
        ids: token ids ``[rows, room]``.
        known: how many of them there are, ``[rows]``.
        drafts: how many are looked for, and guessed.
    """
    order, last = torch.arange(ids.shape[1], device=ids.device), known[:, None] - 1
    alike = torch.ones_like(ids, dtype=torch.bool)
    matched = torch.zeros_like(ids)
    for back in range(drafts.longest):
        wanted = ids.gather(1, (last - back).clamp(min=0))
        alike = alike & (ids.roll(back, 1) == wanted) & (order >= back) & (last >= back)
        matched = matched + alike
    matched = matched.masked_fill(order >= last, 0)  # the last ones themselves
    place = (matched * ids.shape[1] + order).argmax(-1, keepdim=True)
    follow = place + 1 + torch.arange(drafts.tokens, device=ids.device)
    return ids.gather(1, torch.minimum(follow, last))


def said_at_once(text: Sequence[int], drafts: Drafts) -> float:
    """How many tokens a step would have said of the end of a text, on average, with drafts."""
    text = text[-_SEARCHED:]
    end = len(text)
    begin = max(1, end - _LOOKED_BACK)
    if end <= begin:
        return 1.0
    ids = torch.tensor(text)
    known = torch.arange(begin, end)
    guessed = looked_up(ids.expand(len(known), -1), known, drafts)
    told = torch.cat([ids, torch.full((drafts.tokens,), -1)]).unfold(0, drafts.tokens, 1)[begin:end]
    right = (guessed == told).long().cumprod(1).sum(1).tolist()
    at, steps = begin, 0
    while at < end:
        at, steps = at + right[at - begin] + 1, steps + 1
    return (end - begin) / steps


class DraftedSteps:
    """Steps of one request that judge a guess each; a `Steps` of back ends.

    Args:
        decoding: of one request with one row, whose cache has `Drafts.tokens` slots more than its tokens need.
        drafts: how tokens are guessed.
        room: tokens of the request at most.

    Attributes:
        fresh: tokens that a step runs: the last one and a guess.
        ran: steps of this text.
    """

    def __init__(self, decoding: Decoding, drafts: Drafts, room: int) -> None:
        self._decoding, self.drafts, self._backend = decoding, drafts, decoding.other_backend()
        device = decoding.token.device
        self.fresh, self.ran = drafts.tokens + 1, 0
        with torch.inference_mode(False):
            self._ids = torch.zeros(1, room + self.fresh, dtype=torch.long, device=device)
            self._known, self._said = (torch.zeros(1, dtype=torch.long, device=device) for _ in range(2))
            self._out = torch.zeros(1, decoding.ahead + 1, dtype=torch.long, device=device)

    def tell(self, tokens: Tensor) -> None:
        """These tokens ``[n]`` come next in the text, however they were drawn."""
        known = int(self._known)
        self._ids[0, known : known + len(tokens)] = tokens
        self._known.add_(len(tokens))

    def begin(self, tokens: Tensor) -> None:
        """These token ids ``[n]`` are all of the text."""
        self.ran = 0
        self._known.zero_()
        self.tell(tokens)

    def holds(self, tokens: int) -> bool:
        """Whether there is room for a text of so many."""
        return tokens + self.fresh <= self._ids.shape[1]

    def room(self, tokens: int) -> int:
        """How many steps have room behind a text of so many tokens."""
        return max(0, self._ids.shape[1] - 1 - tokens) // self.fresh

    @torch.no_grad()
    def run(self, steps: int, drawing: Drawing | None) -> Tensor:
        """The next tokens ``[1, n]`` of the text, at least one a step; their noise is there."""
        kv, before = self._decoding.kv, list(self._decoding.kv.seen)
        self._said.zero_()
        for _ in range(steps):
            self._backend = self._decoding.attempt(self._backend, self, drawing)
            kv.advance(self.fresh)
        kv.seen[:] = before
        self.ran += steps
        said = int(self._said)  # the one look at the device
        kv.advance(said)
        return self._out[:, :said].clone()

    # ------------------------------------------------------------------ what is captured

    def step(self, order: Tensor, whole: bool, drawing: Drawing | None) -> None:  # noqa: ARG002  # as every step's
        """Guess, judge, and go on behind the last that was right."""
        one = self._decoding
        guessed = looked_up(self._ids, self._known, self.drafts)
        logits = one.judged(torch.cat([one.token[:, None], guessed], 1), order)
        state, good = one.sampler.state(), torch.ones_like(self._known, dtype=torch.bool)
        for i in range(self.fresh):
            before = [held.clone() for held in state]
            token = one.sampler(logits[:, i], one.noise(self._said), drawing)
            for held, was in zip(state, before, strict=True):  # what is behind a wrong guess has not been
                held.copy_(torch.where(good.view(-1, *[1] * (held.dim() - 1)), held, was))
            self._out.index_copy_(1, self._said, token.masked_fill(one.sampler.failed, FAILED)[:, None])
            self._ids.index_copy_(1, self._known, token[:, None])
            one.token.copy_(torch.where(good, token, one.token))
            for count in (self._said, self._known, one.made, one.kv.length):
                count.add_(good)
            if i < self.drafts.tokens:
                good = good & (token == guessed[:, i])

    def reach(self) -> tuple[int, bool]:
        """How many slots the next step has to read, and that not every row sees all of them."""
        kv = self._decoding.kv
        return min(kv.seen[0] + self.fresh, kv.slots), False

    def state(self) -> list[Tensor]:
        """See `Steps`."""
        return [self._ids, self._known, self._said, self._out, *self._decoding.state()]

    @property
    def order(self) -> Tensor:
        """See `Steps`."""
        return self._decoding.order

    @property
    def requests(self) -> int:
        """See `Steps`."""
        return 1

    def sized(self) -> Sequence[tuple[Tensor, Sequence[int]]]:
        """See `Steps`."""
        return self._decoding.sized()

    def program(self) -> tuple[nn.Module | None, str]:
        """See `Steps`."""
        model, about = self._decoding.program()
        return (
            model,
            f"{about}, judging {self.drafts.tokens} guessed by {self.drafts.longest}, {self._ids.shape[1]} remembered",
        )


def steps_of(decoding: Decoding, drafts: Drafts, room: int) -> DraftedSteps:
    """The steps that guess for a decoding, which are made once: what was captured or compiled serves the next request."""
    made = decoding.beside.get(drafts)
    if not isinstance(made, DraftedSteps) or not made.holds(room):
        made = decoding.beside[drafts] = DraftedSteps(decoding, drafts, 1 << max(8, (room - 1).bit_length()))
    return made


class Drafting:
    """Decodes one request with drafts where they pay, and without where they do not.

    Whether they do is seen in what has been said: how many tokens a step would have said of it, beside what such a step takes.
    So it costs nothing where nothing comes again.

    Args:
        decoding: of one request, whose rows have been started.
        drafts: how tokens are guessed.
        text: its prompt, and its first token.
        room: tokens of the text at most.
    """

    def __init__(self, decoding: Decoding, drafts: Drafts, text: Sequence[int], room: int) -> None:
        self._decoding, self._text = decoding, list(text)
        self._steps = steps_of(decoding, drafts, room)
        self._seconds: dict[bool, float] = {}  # of a step, with drafts and without
        self._ran: set[bool] = set()  # which of the two have run, and need not be compiled or captured any more
        self._many, self._judged = 1.0, -_JUDGED  # tokens that a step would have said, and of how many that was told
        self._steps.begin(torch.tensor(self._text))

    def chunk(self, most: int) -> Tensor:
        """The next tokens ``[1, n]``: at least one, and as many as `most` or somewhat more."""
        drafts, began = self._steps.drafts, time.perf_counter()
        if len(self._text) >= self._judged + _JUDGED:
            self._many, self._judged = said_at_once(self._text, drafts), len(self._text)
        many = self._many
        kv, fresh = self._decoding.kv, self._steps.fresh
        few = min(min(self._decoding.ahead, kv.room()) // fresh, self._steps.room(len(self._text)))
        few = 0 if kv.spare() < fresh else few
        drafted = few > 0 and many > self._cost() * _GAIN
        steps = min(few, max(1, round(most / many))) if drafted else most
        tokens = self._decoding.chunk(steps, self._steps) if drafted else self._decoding.chunk(steps)
        self._text += tokens[0].tolist()
        if not drafted:
            self._steps.tell(tokens[0])
        if drafted in self._ran:
            new = (time.perf_counter() - began) / steps
            self._seconds[drafted] = min(new, self._seconds.get(drafted, new))
        self._ran.add(drafted)
        return tokens

    def _cost(self) -> float:
        if self._steps.drafts.cost is not None:
            return self._steps.drafts.cost
        return self._seconds[True] / self._seconds[False] if len(self._seconds) == 2 else _COST
