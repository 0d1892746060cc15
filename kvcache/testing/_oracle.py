"""What a cache must do, the slow and obvious way: a plain list per row, and the policy applied token by token."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kvcache.cache import SizePolicy

Token = tuple[int, Tensor, Tensor]
Turn = Callable[[Tensor, int], Tensor]


class Oracle:
    """The tokens that each row holds, oldest first, as ``(position, key [H, Dk], value [H, Dv])``; positions count pads.

    `turn(key, delta)` is how re-rotation turns a key; it is what queries see, so `rows` hold the keys as they came.
    """

    def __init__(self, policy: SizePolicy, padding: Sequence[int], turn: Turn | None = None) -> None:
        self.policy, self.padding, self.turn = policy, list(padding), turn
        self.rows: list[list[Token]] = [[] for _ in self.padding]
        self.seen, self.floor = 0, 0  # the floor: the length at which tokens last left

    def append(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Append a chunk, ``[B, H, n, D]``; returns what its queries attend to, ``[B, H, n, Dv]`` in float64."""
        outputs = []
        shift = 0
        for t in range(keys.shape[2]):
            for row, key, value in zip(self.rows, keys[:, :, t], values[:, :, t], strict=True):
                row.append((self.seen, key, value))
            self.seen += 1
            self.drop(self.policy.keep(len(self.rows[0])))
            if t == 0:  # a chunk sees its pinned keys where its first query does: directly before the retained tail
                shift = self.seen - len(self.rows[0])
            outputs.append(torch.stack([self.attend(b, query, shift) for b, query in enumerate(queries[:, :, t])]))
        return torch.stack(outputs, 2)

    def drop(self, keep: int) -> None:
        """Down to `keep` tokens: a row's pads leave first, then what follows its own pinned tokens."""
        for pads, row in zip(self.padding, self.rows, strict=True):
            while len(row) > keep:
                del row[0 if row[0][0] < pads else self.policy.pinned]
                self.floor = self.seen

    def attend(self, b: int, query: Tensor, shift: int) -> Tensor:
        """Softmax attention of one query, ``[H, Dk]``, over the real tokens of row `b`; zeros where there are none."""
        real = [(key, value) for position, key, value in self.rows[b] if position >= self.padding[b]]
        if not real:
            return torch.zeros(query.shape[0], self.rows[b][0][2].shape[1], dtype=torch.float64)
        turned = [
            self.turn(key, shift) if self.turn and i < self.policy.pinned else key for i, (key, _) in enumerate(real)
        ]
        keys, values = torch.stack(turned, 1).double(), torch.stack([value for _, value in real], 1).double()
        scores: Tensor = (keys @ query.double()[..., None])[..., 0] / query.shape[-1] ** 0.5
        seen: Tensor = (scores.softmax(-1)[..., None] * values).sum(1)
        return seen

    def can_truncate(self, length: int) -> bool:
        """To a length since which nothing left, to nothing, or to pinned tokens alone (which pads must not precede)."""
        pinned = length <= self.policy.pinned and not any(self.padding)
        return 0 <= length <= self.seen and (length >= self.floor or length == 0 or pinned)

    def truncate(self, length: int) -> None:
        """To the first `length` tokens."""
        self.rows = [[token for token in row if token[0] < length] for row in self.rows]
        self.seen, self.floor = length, self.floor if length >= self.floor else 0

    def select(self, rows: Sequence[int]) -> None:
        """These rows, in this order."""
        self.rows, self.padding = [list(self.rows[i]) for i in rows], [self.padding[i] for i in rows]
