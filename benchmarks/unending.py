"""A multilingual T3 whose alignment check looks on, and neither ends nor prolongs the speech: each side says as much as it is asked."""
# Not by `make bench`: what benchmarks share.

from typing import Any

from torch import Tensor

from kvcache_chatterbox.speech import AlignmentRule
from kvcache_chatterbox.upstream import upstream_t3


def unending() -> None:
    """Let upstream's check and ours compute what they do, and change no score."""
    analyzer = upstream_t3().AlignmentStreamAnalyzer
    step, scores = analyzer.step, AlignmentRule.scores
    if step.__name__ == "looks_on":
        return

    def looks_on(self: Any, logits: Tensor, next_token: Any = None) -> Tensor:
        step(self, logits.clone(), next_token=next_token)
        return logits

    def unchanged(self: AlignmentRule, given: Tensor, which: slice = slice(None)) -> Tensor:
        # A score's part of nothing: what is computed and not used, a compiler leaves out.
        return given + 0.0 * scores(self, given, which).clamp(-1, 1)

    analyzer.step = looks_on
    AlignmentRule.scores = unchanged  # type: ignore[method-assign]
