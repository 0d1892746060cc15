"""One text in one voice, decoded as one: what a request comes down to, and a segment of a long text."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor
from typing_extensions import Self

from kvcache import PrefixKey, PrefixSnapshot
from kvcache.decoding import Sampling
from kvcache_chatterbox.checks import check_count, check_names, check_number, check_seed
from kvcache_chatterbox.speech._sampling import OPTIONS, SamplingOptions, check_sampling
from kvcache_chatterbox.units import SPEECH_TOKENS
from kvcache_chatterbox.voices import Voice

_TAIL = 50  # two seconds


class UtteranceFields(SamplingOptions, total=False):
    """The fields of `UtteranceOptions` as keywords, those of its `sampling` among them."""

    max_new_tokens: int | None
    exaggeration: float | None
    seed: int | None


@dataclass(frozen=True)
class UtteranceOptions:
    """How the speech of a text is made.

    Attributes:
        max_new_tokens: speech tokens at most; 25 are a second. None: 1000 of bare tokens; of a text that becomes audio
            upstream's own number for one segment, and of each of several three times as many as it will probably take.
        exaggeration: emotion; None: as the voice has it.
        seed: of the draws; None draws from torch's global generator. Of several texts or segments each further one has the
            next number.
        sampling: what is to be other than upstream has it for the model and the method.

    Raises:
        InputError: for a value that cannot be.
    """

    max_new_tokens: int | None = None
    exaggeration: float | None = None
    seed: int | None = None
    sampling: SamplingOptions = field(default_factory=SamplingOptions, hash=False)

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None:
            check_count("max_new_tokens", self.max_new_tokens)
        if self.exaggeration is not None:
            object.__setattr__(self, "exaggeration", check_number("exaggeration", self.exaggeration))
        check_seed(self.seed)
        object.__setattr__(self, "sampling", check_sampling(self.sampling))

    @classmethod
    def of(cls, fields: UtteranceFields) -> Self:
        """The options that keywords stand for.

        Raises:
            InputError: for an unknown keyword, or a value that cannot be.
        """
        check_names(fields, UTTERANCE_FIELDS, "a text to be spoken")
        sampling = {name: value for name, value in fields.items() if name in OPTIONS}
        others: dict[str, Any] = {name: value for name, value in fields.items() if name not in OPTIONS}
        return cls(**others, sampling=cast(SamplingOptions, sampling))


UTTERANCE_FIELDS = frozenset(UtteranceFields.__optional_keys__)


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


def rows_alone(sampling: Sampling) -> int:
    """Rows that an utterance runs by itself: with guidance one without the text besides."""
    return 2 if sampling.cfg_weight > 0 else 1
