"""What the aligned heads of a multilingual T3 might see of a text, step by step: paths that each trip a rule, or none."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kvcache_chatterbox.upstream import upstream_t3

Path = Callable[[int, int], Tensor]
"""What a step sees of a text of so many tokens, ``[tokens]``."""


def _at(tokens: int, place: float, weight: float = 0.79) -> Tensor:
    row = torch.full((tokens,), (1 - weight) / tokens)
    row[min(max(round(place), 0), tokens - 1)] += weight
    return row


def _tail_then(tokens: int, step: int, then: Callable[[int], float], speed: float = 1.0) -> Tensor:
    """Straight through the text, then somewhere else."""
    end = round((tokens - 1) / speed)
    return _at(tokens, step * speed if step <= end else then(step - end))


PATHS: dict[str, Path] = {
    "straight": lambda tokens, step: _at(tokens, step),
    "slow": lambda tokens, step: _at(tokens, step / 3),
    "slower than it may": lambda tokens, step: _at(tokens, step / 40),
    "fast": lambda tokens, step: _at(tokens, 2 * step),
    "skipping": lambda tokens, step: _at(tokens, step if step < 3 else step + 6),
    "jumping to the end": lambda tokens, step: _at(tokens, 0 if step < 4 else tokens - 1),
    "jumping back": lambda tokens, step: _at(tokens, step if step < tokens - 6 else 1),
    "running on": lambda tokens, step: _tail_then(tokens, step, lambda _: tokens - 1),
    "running on, faintly": lambda tokens, step: _at(tokens, step, 0.79 if step < tokens else 0.2),
    "from the start again": lambda tokens, step: _tail_then(tokens, step, float),
    "to the middle again": lambda tokens, step: _tail_then(tokens, step, lambda _: tokens // 2),
    "looping": lambda tokens, step: _at(tokens, step % (tokens // 2)),
    "never at the end": lambda tokens, step: _at(tokens, min(step, tokens - 5)),
    "at the last three": lambda tokens, step: _tail_then(tokens, step, lambda past: tokens - 1 - past % 3),
    "all alike": lambda tokens, step: torch.full((tokens,), 1 / tokens),
    "nothing": lambda tokens, step: torch.zeros(tokens),
    "before the diagonal": lambda tokens, step: _at(tokens, tokens - 1),
    "a false start": lambda tokens, step: _at(tokens, tokens - 1 if step < 5 else step - 5),
}


class Upstream:
    """Upstream's own analyzer of one text, which is given what the heads see.

    Args:
        tokens: of the text.
        stop: the token that ends speech.
    """

    def __init__(self, tokens: int, stop: int) -> None:
        analyzer: Any = upstream_t3().AlignmentStreamAnalyzer
        module: Any = sys.modules[analyzer.__module__]
        without_hooks = type("Analyzer", (analyzer,), {"_add_attention_spy": lambda *_: None})
        self._analyzer: Any = without_hooks(None, None, text_tokens_slice=(2, 2 + tokens), eos_idx=stop)
        self._heads = len(module.LLAMA_ALIGNED_HEADS)

    @property
    def close(self) -> bool:
        """Whether a sum of its rules lies so close to the limit that the order of adding up decides."""
        seen, since = self._analyzer.alignment, self._analyzer.completed_at
        if since is None:
            return False
        sums = [*seen[since:, -3:].sum(0), seen[since:, :-5].amax(1).sum()]
        return any(abs(float(one) - 5) < 1e-4 for one in sums)

    def step(self, looks: Sequence[Tensor], logits: Tensor, last_token: int) -> Tensor:
        """The logits ``[1, vocabulary]`` as it changes them.

        Args:
            looks: what each of the new tokens sees of the text; of the first step one or two.
            logits: which it writes into.
        """
        seen = torch.stack(list(looks))
        before, after = torch.zeros(len(seen), 2), torch.zeros(len(seen), 3)
        rows = torch.cat([before, seen, after], 1)
        if self._analyzer.curr_frame_pos == 0:  # it is given the prefill's, too
            rows = torch.cat([torch.zeros(2 + seen.shape[1], rows.shape[1]), rows])
        self._analyzer.last_aligned_attns = [rows] * self._heads
        return torch.as_tensor(self._analyzer.step(logits, next_token=last_token))
