"""Where a text ends: at a token that ends it, at its most tokens, or where one of transformers' criteria says so.

Single streams and batches ask the same functions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

FAILED = -1
"""Stands for a token that could not be drawn, as its logits were no numbers, and for those after it."""


class Said(NamedTuple):
    """What some of a text's tokens are of it.

    Attributes:
        tokens: how many of them, from the first on, belong to the text.
        over: whether the text ends among them.
        cut_off: whether it ends at its most tokens, and not with a token that ends it.
    """

    tokens: int
    over: bool
    cut_off: bool


@dataclass(frozen=True)
class TextEnd:
    """The rule by which one text ends.

    Attributes:
        tokens: the token ids that end it.
        most: the most tokens that are drawn for it.
        first_may_end: whether it may end with its first token.
        include_stop_token: whether the token that ends it belongs to the text.
    """

    tokens: Sequence[int]
    most: int
    first_may_end: bool = True
    include_stop_token: bool = True

    def of(self, ids: Sequence[int], made: int = 0) -> Said:
        """What the next token ids of the text are of it.

        Args:
            ids: as they were drawn.
            made: tokens that were drawn before them.
        """
        left = max(0, self.most - made)
        for i, token in enumerate(ids[:left]):
            if token in self.tokens and (self.first_may_end or made + i > 0):
                return Said(i + self.include_stop_token, True, False)
        over = len(ids) >= left
        return Said(min(len(ids), left), over, over)

    def drawn(self, said: int) -> int:
        """How many tokens were drawn for a text of so many: an end that does not belong to it is one more."""
        return said + (not self.include_stop_token and said < self.most)


class Criteria:
    """Stopping criteria of transformers, asked after each token as `generate` asks them, but only once a chunk.

    Args:
        criteria: each takes token ids ``[rows, tokens]`` and scores, which here are None, and says of each row whether it ends.
        ids: of the prompts ``[rows, tokens]``.
        pad: the token behind an end; None: what is drawn there.
    """

    def __init__(self, criteria: Sequence[Any], ids: Tensor, pad: int | None = 0) -> None:
        self._criteria, self._ids, self._pad = list(criteria), ids, pad

    def cut(self, tokens: Tensor, lengths: Sequence[int], over: Sequence[bool]) -> list[tuple[int, bool]]:
        """How many of the next tokens ``[rows, n]`` belong to each row, and whether it ends with them.

        Nothing is asked from where one that belongs to a row could not be drawn.

        Args:
            tokens: as they were drawn.
            lengths: how many of them belong to each row as far as tokens that end it say.
            over: whether it ends with those.
        """
        found = list(zip(lengths, over, strict=True))
        shown = [row[: None if self._pad is None else said] for row, said in zip(tokens.tolist(), lengths, strict=True)]
        good = min((row.index(FAILED) for row in shown if FAILED in row), default=tokens.shape[1])
        for i, drawn in enumerate(tokens[:, :good].to(self._ids.device).unbind(1)):
            if self._pad is not None:
                here = torch.tensor([i < length for length, _ in found], device=drawn.device)
                drawn = torch.where(here, drawn, self._pad)  # as `generate` would have it
            self._ids = torch.cat([self._ids, drawn[:, None].to(self._ids)], 1)
            for row, stop in enumerate(self._stops()):
                if stop and i < found[row][0]:
                    found[row] = i + 1, True
            if all(ends and length <= i + 1 for length, ends in found):
                break
        return found

    def _stops(self) -> list[bool]:
        rows = self._ids.shape[0]
        said = [torch.as_tensor(one(self._ids, None), device=self._ids.device).expand(rows) for one in self._criteria]
        return torch.stack(said).any(0).tolist()
