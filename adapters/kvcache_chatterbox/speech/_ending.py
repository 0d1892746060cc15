"""Where speech ends, and who is told of speech that was cut off."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from kvcache.decoding import TextEnd
from kvcache.events import Event, emit


def speech_end(t3: Any, most: int) -> TextEnd:
    """Where an utterance of at most so many speech tokens ends, as in upstream's loops.

    Both loops stop at the stop token. The Llama loop returns it. The GPT-2 loop does not, and does not look for it in the first
    token: a model that begins with it goes on.
    """
    return TextEnd([t3.hp.stop_speech_token], most, first_may_end=not t3.is_gpt, include_stop_token=not t3.is_gpt)


class Ending:
    """How near its end one utterance is, as its tokens come.

    Args:
        end: where it ends.

    Attributes:
        over: whether it has ended.
        cut_off: whether it has ended at its most tokens, and not with a stop token.
    """

    def __init__(self, end: TextEnd) -> None:
        self.end = end
        self.over = self.cut_off = False
        self._made = 0

    def take(self, tokens: Tensor) -> Tensor:
        """What the next tokens ``[n]``, as they were drawn, are of the utterance: up to its end."""
        said = self.end.of(tokens.tolist(), self._made)
        self._made += len(tokens)
        self.over, self.cut_off = said.over, said.cut_off
        return tokens[: said.tokens]


@dataclass
class CutOff:
    """Which segments of a text have come to their most tokens without an end, told as it happens.

    Attributes:
        segment: which one decodes.
        found: those that were cut off.
    """

    segment: int = 0
    found: list[int] = field(default_factory=list)

    def tell(self, tokens: int, segment: int | None = None) -> None:
        """A segment, by default the one that decodes, has said so many tokens, all that it may."""
        segment = self.segment if segment is None else segment
        self.found.append(segment)
        tell_cut_off(segment, tokens)


def tell_cut_off(segment: int, tokens: int) -> None:
    """Emit the event that a segment has said so many tokens, all that it may, and has not come to its end."""
    reason = "no stop token came within max_new_tokens: give more, or shorter segments, or look at the text"
    emit(Event("cut_off", f"segment {segment}", {"segment": segment, "tokens": tokens}, reason))
