"""The processors of transformers' `generate`, read as what a step does itself: a `Sampling`, and `TokenRules`."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor
from transformers.generation.logits_process import (
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kvcache.decoding._sampler import Sampling
from kvcache.decoding._token_rules import ALWAYS, Forced, Limits, TokenRules

PLAIN = Sampling(1.0, 1.0, 0.0, 0, 1.0)
"""Draws by the probabilities as they are."""


class Drawn(NamedTuple):
    """How the tokens of a generation are drawn.

    Attributes:
        sampling: the settings of a `Sampler`.
        rules: what else changes their scores.
        unpenalized: how many tokens at the start of each row the repetition penalty is not about.
    """

    sampling: Sampling
    rules: TokenRules
    unpenalized: tuple[int, ...] = ()


class _Unknown(Exception):
    """A processor, or an order of them, that a step does not do by itself."""


def read_processors(processors: Sequence[Any], prompt: int, draws: bool) -> Drawn:
    """What these do. Where a step does not know one of them, or their order, they are run as they are: see `HostProcessors`.

    Args:
        processors: as `generate` has prepared them, in order.
        prompt: token ids of a row before its first new one.
        draws: whether tokens are drawn; else the most likely ones are taken.
    """
    read = _Read(prompt, draws)
    try:
        for one in processors:
            read.take(one)
    except _Unknown:
        sampling = PLAIN if draws else Sampling(0.0, 1.0, 0.0, 0, 1.0)
        return Drawn(sampling, TokenRules(processors=tuple(processors)))
    return read.drawn()


@dataclass
class _Read:
    """What processors have been found to do so far.

    Attributes:
        prompt, draws: see `read_processors`.
    """

    prompt: int
    draws: bool
    _settings: dict[str, Any] = field(default_factory=dict)
    _until: dict[int, int] = field(default_factory=dict)
    _forced: list[Forced] = field(default_factory=list)
    _ngram: int = 0
    _unpenalized: tuple[int, ...] = ()
    _stage: int = -1  # of `_STAGES`: a step does them in this order

    def drawn(self) -> Drawn:
        greedy = {"temperature": 1.0 if self.draws else 0.0}
        sampling = Sampling(**{**vars(PLAIN), **greedy, **self._settings})
        limits = Limits({t: to for t, to in self._until.items() if to > 0}, tuple(f for f in self._forced if f.at >= 0))
        return Drawn(sampling, TokenRules(limits, self._ngram), self._unpenalized)

    def take(self, one: Any) -> None:
        """Raises `_Unknown` for what a step does not do, or not here."""
        stage, read = _STAGES.get(type(one), (0, None))
        many = stage == _LIMITS
        if read is None or stage < self._stage or (stage == self._stage and not many):
            raise _Unknown
        if stage > _LIMITS and not self.draws:  # the most likely token is taken of what a filter leaves
            raise _Unknown
        self._stage = stage
        read(self, one)

    def penalty(self, one: Any) -> None:
        self._settings["repetition_penalty"] = one.penalty
        ignored = one.prompt_ignore_length
        if ignored is not None:
            self._unpenalized = (
                tuple(ignored.tolist()) if isinstance(ignored, Tensor) else (ignored,) if ignored else ()
            )

    def ngrams(self, one: Any) -> None:
        if self._ngram or self._forced:  # what is forced is forced behind it
            raise _Unknown
        self._ngram = one.ngram_size

    def ban(self, tokens: Tensor | Sequence[int], until: int) -> None:
        """These token ids are out of the question before this step, which counts from the first new token on."""
        ids = tokens.flatten().tolist() if isinstance(tokens, Tensor) else tokens
        for forced in self._forced:
            if forced.at < until and set(forced.tokens) & set(ids):
                raise _Unknown  # forced, and then out of the question: nothing is left
        for token in ids:
            self._until[token] = max(until, self._until.get(token, 0))

    def bad_words(self, one: Any) -> None:
        words = list(one.sequence_bias)
        if any(len(word) > 1 for word in words):
            raise _Unknown
        self.ban([word[0] for word in words], ALWAYS)

    def begin_suppressed(self, one: Any) -> None:
        at = one.begin_index - self.prompt
        if at > 0:
            raise _Unknown
        self.ban(one.begin_suppress_tokens, at + 1)

    def force(self, length: int, tokens: Any) -> None:
        """A row of so many token ids goes on with one of these."""
        ids = tokens.flatten().tolist() if isinstance(tokens, Tensor) else [tokens]
        self._forced.append(Forced(length - self.prompt, tuple(ids)))
        if len({forced.at for forced in self._forced}) < len(self._forced):
            raise _Unknown  # the later one alone decides

    def warp(self, one: Any, name: str) -> None:
        if getattr(one, "filter_value", -math.inf) != -math.inf or getattr(one, "min_tokens_to_keep", 1) != 1:
            raise _Unknown
        value = getattr(one, name)
        self._settings[name] = float(value) if name == "min_p" else value

    def top_k(self, one: Any) -> None:
        # It has made of its bound on what it keeps, and of how much that is at least, one number.
        if one.filter_value != -math.inf:
            raise _Unknown
        self._settings["top_k"] = one.top_k


_LIMITS = 1
_STAGES: dict[type, tuple[int, Callable[[_Read, Any], None]]] = {
    RepetitionPenaltyLogitsProcessor: (0, _Read.penalty),
    NoRepeatNGramLogitsProcessor: (_LIMITS, _Read.ngrams),
    NoBadWordsLogitsProcessor: (_LIMITS, _Read.bad_words),
    MinLengthLogitsProcessor: (_LIMITS, lambda read, one: read.ban(one.eos_token_id, one.min_length - read.prompt)),
    MinNewTokensLengthLogitsProcessor: (
        _LIMITS,
        lambda read, one: read.ban(one.eos_token_id, one.prompt_length_to_skip + one.min_new_tokens - read.prompt),
    ),
    ForcedBOSTokenLogitsProcessor: (_LIMITS, lambda read, one: read.force(1, one.bos_token_id)),
    ForcedEOSTokenLogitsProcessor: (_LIMITS, lambda read, one: read.force(one.max_length - 1, one.eos_token_id)),
    SuppressTokensLogitsProcessor: (_LIMITS, lambda read, one: read.ban(one.suppress_tokens, ALWAYS)),
    SuppressTokensAtBeginLogitsProcessor: (_LIMITS, _Read.begin_suppressed),
    TemperatureLogitsWarper: (2, lambda read, one: read.warp(one, "temperature")),
    TopKLogitsWarper: (3, _Read.top_k),
    TopPLogitsWarper: (4, lambda read, one: read.warp(one, "top_p")),
    MinPLogitsWarper: (5, lambda read, one: read.warp(one, "min_p")),
}
"""When a step does what a processor says, and how that is read."""
