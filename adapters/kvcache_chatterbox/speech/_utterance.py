"""One text in one voice, decoded as one: what a request comes down to, and a segment of a long text."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kvcache import PrefixKey, PrefixSnapshot
from kvcache.decoding import Sampling
from kvcache.events import Event, emit
from kvcache_chatterbox.units import SPEECH_TOKENS
from kvcache_chatterbox.voices import Voice

_TAIL = 50  # two seconds


@dataclass(frozen=True, eq=False)
class Utterance:
    """What is said, by whom and how; checked, with nothing computed yet.

    Attributes:
        voice: who speaks.
        text: its tokens ``[1, n]``, on the model's device.
        sampling: how speech tokens are drawn.
        max_new_tokens: how many at most.
        seed: of the draws; None takes torch's global generator.
        reused: whether what is known of the voice is used.
        known: gives what is known of it, in place of the store.
    """

    voice: Voice
    text: Tensor
    sampling: Sampling
    max_new_tokens: int
    seed: int | None
    reused: bool
    known: Callable[[PrefixKey], PrefixSnapshot] | None = None

    def generator(self) -> torch.Generator | None:
        """A new one for its draws; None for torch's global one."""
        return None if self.seed is None else torch.Generator(self.text.device).manual_seed(self.seed)

    def after(self, spoken: Tensor | None) -> "Utterance":
        """The same, but going on from what was `spoken` before, speech tokens ``[n]``.

        The last two seconds of that take the place of the end of the voice's speech prompt, at most half of it: the prompt
        is what the model takes manner and pace from. Its keys and values are then this utterance's own.
        """
        prompt = self.voice.t3.cond_prompt_speech_tokens
        if spoken is None or prompt is None or prompt.shape[1] == 1:  # half of one token is none
            return self
        keep = min(_TAIL, prompt.shape[1] // 2)
        tail = spoken[spoken < SPEECH_TOKENS][-keep:].to(prompt)
        if tail.numel() == 0:
            return self
        t3 = copy.copy(self.voice.t3)
        t3.cond_prompt_speech_tokens = torch.cat([prompt[:, : prompt.shape[1] - len(tail)], tail[None]], 1)
        return replace(self, voice=Voice(t3, self.voice.gen), reused=False)


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


def rows_alone(sampling: Sampling) -> int:
    """Rows that an utterance runs by itself: with guidance one without the text besides."""
    return 2 if sampling.cfg_weight > 0 else 1
