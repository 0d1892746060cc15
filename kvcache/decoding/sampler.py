"""From logits to the next token of each request, on the device, with every setting a tensor.

The same arithmetic as transformers' logits processors, in whatever order they are wanted in, but without growing token ids
and without a number from the host: what was drawn before is a mask, and the filters share one sort. A draw takes the most
likely of the probabilities divided by exponential noise, which is what `torch.multinomial` does for one sample; so noise
taken from a generator beforehand draws the very tokens that `multinomial` would draw from it.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcache.errors import InputError

TRANSFORMERS = ("penalty", "temperature", "top_k", "top_p", "min_p")
"""The order of `generate`."""

_ALL = slice(None)
_FILTERS = ("top_k", "top_p", "min_p")


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: above 0; 0 takes the most likely token.
        top_p: nucleus of this probability (Holtzman et al., arXiv:1904.09751), in (0, 1].
        min_p: least share of the best token's probability (Nguyen et al., arXiv:2407.01082), in [0, 1].
        top_k: how many of the best tokens stay; 0 for all.
        repetition_penalty: above 0; 1 is none (Keskar et al., arXiv:1909.05858).
        cfg_weight: classifier-free guidance, ``cond + weight * (cond - uncond)``; 0 runs one row instead of two.
    """

    temperature: float = 0.8
    top_p: float = 0.95
    min_p: float = 0.0
    top_k: int = 0
    repetition_penalty: float = 1.2
    cfg_weight: float = 0.0

    def __post_init__(self) -> None:
        for name, fits, wanted in (
            ("temperature", self.temperature >= 0, "at least 0 (0 is greedy)"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            ("top_k", isinstance(self.top_k, int) and self.top_k >= 0, "a whole number of at least 0 (0 is all)"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0 (1 is none)"),
            ("cfg_weight", self.cfg_weight >= 0, "at least 0 (0 is without guidance)"),
        ):
            if not fits:
                raise InputError(f"{name}={getattr(self, name)} must be {wanted}")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken, without a draw."""
        return self.temperature == 0


GREEDY = Sampling(temperature=0, repetition_penalty=1)
"""The most likely token, whatever came before."""


class Sampler:
    """Draws one token for each of several requests.

    Args:
        requests: how many.
        vocabulary: how many tokens there are.
        order: of ``"penalty"``, ``"temperature"`` and the three filters, which stand together.
        device: of the logits.
        guided: each request has two rows, conditional and unconditional, one below the other.

    Attributes:
        seen: which tokens a request's penalty is about, ``[requests, vocabulary]``.
    """

    def __init__(
        self,
        requests: int,
        vocabulary: int,
        order: Sequence[str],
        device: torch.device,
        guided: bool = False,
    ) -> None:
        at = [name in _FILTERS for name in order]
        if sorted(order) != sorted(TRANSFORMERS) or at.index(True) + sum(at) != len(at) - at[::-1].index(True):
            raise InputError(f"order={tuple(order)} must hold each of {TRANSFORMERS} once, the three filters together")
        self.order = tuple(order)
        self.guided = guided
        self.vocabulary = vocabulary
        with torch.inference_mode(False):
            self.seen = torch.zeros(requests, vocabulary, dtype=torch.bool, device=device)
            # One setting a row, so that a new request is one copy to the device: all of them as fp32 ``[requests, 1]``.
            self._settings = torch.zeros(6, requests, 1, device=device)
            self._top_k = torch.full((requests, 1), vocabulary, dtype=torch.long, device=device)
        self._greedy = [True] * requests
        for request in range(requests):
            self.set(request, GREEDY)

    def front(self, requests: int) -> "Sampler":
        """The sampler of the first requests: the same settings and marks."""
        new = copy.copy(self)
        new.seen, new._settings, new._top_k = self.seen[:requests], self._settings[:, :requests], self._top_k[:requests]
        return new

    def move(self, request: int, to: int) -> None:
        """Bring a request's settings and marks to another place."""
        for held in (self.seen, self._settings[:, :, 0].t(), self._top_k):
            held[to] = held[request].clone()
        self._greedy[to] = self._greedy[request]

    def set(self, request: int, sampling: Sampling) -> None:
        """Draw for a request by these settings from now on."""
        device = self.seen.device
        greedy = sampling.greedy
        # Subtracted in double, as transformers does. Nothing is dropped below 0, not even what rounds to no probability.
        drop = -1.0 if greedy or sampling.top_p == 1 else 1 - sampling.top_p
        values = [
            float(greedy),
            sampling.repetition_penalty,
            1.0 if greedy else sampling.temperature,
            drop,
            0.0 if greedy else sampling.min_p,
            sampling.cfg_weight,
        ]
        kept = self.vocabulary if greedy or not sampling.top_k else min(sampling.top_k, self.vocabulary)
        self._settings[:, request, 0] = torch.tensor(values, device=device)
        self._top_k[request] = kept
        self._greedy[request] = greedy

    @property
    def draws(self) -> bool:
        """Whether any request draws at all. A step in which none does needs no sort."""
        return not all(self._greedy[: len(self.seen)])

    def begin(self, request: int, seen: Tensor) -> None:
        """Forget what a request has drawn; its penalty is about these token ids, ``[tokens]``, and what it draws."""
        self.seen[request] = False
        self.seen[request, seen.to(self.seen.device)] = True

    def __call__(self, logits: Tensor, noise: Tensor, draws: bool = True, which: slice = _ALL) -> Tensor:
        """The next tokens ``[requests]``, which count as seen from then on.

        Args:
            logits: ``[requests, vocabulary]``, or twice as many rows with guidance.
            noise: exponential, ``[requests, vocabulary]``.
            draws: False where every request is greedy.
            which: of the requests; all by default.
        """
        scores = self.process(logits, draws, which)
        tokens = scores.argmax(-1)
        if draws:
            drawn = (torch.softmax(scores, -1) / noise).argmax(-1)
            tokens = torch.where(self._settings[0, which, 0] > 0, tokens, drawn)
        self.seen[which].scatter_(1, tokens[:, None], True)
        return tokens

    def process(self, logits: Tensor, draws: bool = True, which: slice = _ALL) -> Tensor:
        """The scores ``[requests, vocabulary]`` that are drawn from; what is filtered out is ``-inf``."""
        _, penalty, temperature, drop, min_p, guidance = self._settings[:, which].unbind()
        scores = logits.float()
        if self.guided:
            conditional, unconditional = scores.view(-1, 2, scores.shape[1]).unbind(1)
            scores = conditional + guidance * (conditional - unconditional)
        filtered = False
        for name in self.order:
            if name == "penalty":
                scores = torch.where(
                    self.seen[which], torch.where(scores < 0, scores * penalty, scores / penalty), scores
                )
            elif name == "temperature":
                scores = scores / temperature
            elif draws and not filtered:
                filtered = True
                scores = self._filter(scores, drop, min_p, self._top_k[which])
        return scores

    def _filter(self, scores: Tensor, drop: Tensor, min_p: Tensor, top_k: Tensor) -> Tensor:
        """What top-k, top-p and min-p leave. They drop from the bottom, so one ascending sort serves all three."""
        ordered, index = scores.sort(descending=False)
        for name in self.order:
            if name == "top_k":
                least = ordered.gather(1, self.vocabulary - top_k)
                ordered = ordered.masked_fill(ordered < least, -torch.inf)
            elif name == "top_p":
                dropped = torch.softmax(ordered, -1).cumsum(-1) <= drop
                dropped[:, -1] = False
                ordered = ordered.masked_fill(dropped, -torch.inf)
            elif name == "min_p":
                share = torch.softmax(ordered, -1)
                dropped = share < min_p * share.amax(-1, keepdim=True)
                dropped[:, -1] = False
                ordered = ordered.masked_fill(dropped, -torch.inf)
        return torch.empty_like(scores).scatter(1, index, ordered)
