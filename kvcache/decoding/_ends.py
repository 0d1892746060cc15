"""Where a text ends: at a token that ends it, or at its most tokens. Single streams and batches ask the same function."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


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
