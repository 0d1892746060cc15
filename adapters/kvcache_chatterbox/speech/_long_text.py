"""A text of any length as utterances: planned, decoded together, delivered in the text's order."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvcache import InputError
from kvcache.decoding import Batch, Chunk, Job, Request, Turns
from kvcache_chatterbox.speech._utterance import Utterance
from kvcache_chatterbox.text import LongTextPlan

Carry = Literal["tail"]


@dataclass(frozen=True, eq=False)
class LongText:
    """The segments of a text, ready to be spoken.

    Attributes:
        plan: what they will take.
        utterances: one for each segment.
        carry: ``"tail"``: each goes on from the end of the one before, see `Utterance.after`, so they run in sequence.
    """

    plan: LongTextPlan
    utterances: Sequence[Utterance]
    carry: Carry | None = None

    def __post_init__(self) -> None:
        check_carry(self.carry)

    def utterance(self, index: int, before: Tensor | None) -> Utterance:
        """The utterance of an index, when the one before it has said the speech tokens ``[n]``; None says nothing of them."""
        return self.utterances[index].after(before if self.carry == "tail" else None)


def check_carry(carry: str | None) -> None:
    """Raise `InputError` for an unknown one."""
    if carry not in (None, "tail"):
        raise InputError(
            f"carry={carry!r} must be None (segments by themselves, together) or 'tail' (one after another)"
        )


def seeds(seed: int | None, count: int) -> list[int | None]:
    """One for each of so many utterances, so that each has draws of its own; a single one keeps what was given."""
    if count == 1:
        return [seed]
    first = int(torch.randint(2**31, ())) if seed is None else seed
    return [first + i for i in range(count)]


Watch = Callable[[int, int, bool], None]
"""Is told of progress: which segment, how many new speech tokens, whether it has ended."""


def unwatched(index: int, tokens: int, over: bool) -> None:
    """Nobody looks."""


def in_batch(batch: Batch, jobs: Sequence[Job], size: int, watch: Watch = unwatched, alone: int = 1) -> Iterator[Chunk]:
    """What the jobs say, in order, in chunks of `size` tokens, all of them decoded together; `alone` as of `Request`."""
    said: deque[Chunk] = deque()
    turns = Turns(batch)
    request = Request(len(jobs), lambda i, _: jobs[i], size=size, alone=alone, deliver=said.append, watch=watch)
    turns.add(request)
    try:
        while not request.over:
            turns.step()
            while said:
                yield said.popleft()
    finally:
        turns.drop(request)
    if request.error is not None:
        raise request.error
