"""From logits to the next token of each request, on the device, with every setting a tensor.

The same arithmetic as transformers' logits processors, in whatever order they are wanted in, but without growing token ids
and without a number from the host: what was drawn before is a mask. A draw takes the most likely of the probabilities
divided by exponential noise, which is what `torch.multinomial` does for one sample; so noise taken from a generator
beforehand draws the very tokens that `multinomial` would draw from it.

Each filter looks at what the one before it left, as the processors do, and the nucleus sorts by the same call on the same
values: where tokens have the very same score, as they often have in bf16, that sort alone decides which of them stay.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from typing_extensions import Self

from kvcache.errors import InputError

TRANSFORMERS = ("penalty", "temperature", "top_k", "top_p", "min_p")
"""The order of `generate`."""

_ALL = slice(None)
_FILTERS = ("top_k", "top_p", "min_p")
_LEAST, _MOST = 1e-30, 1e30  # what a score is divided by or multiplied with, and stays finite in float32
_CANDIDATES = (0, 64, 512, 4096)  # few bounds, as a step is recorded for each


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: from 1e-30 to 1e30, beyond which float32 has no scores left; 0 takes the most likely token.
        top_p: nucleus of this probability (Holtzman et al., arXiv:1904.09751), in [0, 1]; 0 leaves the best token.
        min_p: least share of the best token's probability (Nguyen et al., arXiv:2407.01082), in [0, 1].
        top_k: how many of the best tokens stay; 0 for all.
        repetition_penalty: from 1e-30 to 1e30; 1 is none (Keskar et al., arXiv:1909.05858).
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
            (
                "temperature",
                self.greedy or _LEAST <= self.temperature <= _MOST,
                f"0 (greedy), or from {_LEAST} to {_MOST}",
            ),
            ("top_p", 0 <= self.top_p <= 1, "in [0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            ("top_k", isinstance(self.top_k, int) and self.top_k >= 0, "a whole number of at least 0 (0 is all)"),
            ("repetition_penalty", _LEAST <= self.repetition_penalty <= _MOST, f"from {_LEAST} to {_MOST} (1 is none)"),
            ("cfg_weight", 0 <= self.cfg_weight <= _MOST, f"from 0 (without guidance) to {_MOST}"),
        ):
            if not fits:
                raise InputError(f"{name}={getattr(self, name)} must be {wanted}")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken, without a draw."""
        return self.temperature == 0


GREEDY = Sampling(temperature=0, repetition_penalty=1)
"""The most likely token, whatever came before."""


class Drawing(NamedTuple):
    """What a step has to do beside taking the most likely token. It is known on the host: a sort takes most of the time.

    Attributes:
        candidates: a bound on every ``top_k`` that filters, or 0 if none does.
        nucleus: whether some ``top_p`` filters.
        floor: whether some ``min_p`` filters.
        draws: whether some request draws; else all take their most likely token.
        rules: the names of those that change some request's scores.
    """

    candidates: int = 0
    nucleus: bool = False
    floor: bool = False
    draws: bool = True
    rules: tuple[str, ...] = ()


class ScoreRule(Protocol):
    """Changes scores by what each request has said and looked at, within a step: without a look at the host.

    What it knows is tensors of one size throughout, a row for each request, which it changes in place.
    """

    def begin(self, request: int, note: Any) -> None:
        """Forget what a request was; `note` says what the rule has to know of the next one. None: it leaves that alone."""

    def end(self, request: int) -> None:
        """The request is over: its scores are nobody's. What is known of it may still be read."""

    def move(self, request: int, to: int) -> None:
        """Bring what is known of a request to another place."""

    def first_rows(self, requests: int) -> Self:
        """The rule of the first requests: the same memory."""
        ...

    def state(self) -> list[Tensor]:
        """All tensors that a step changes, each ``[requests, …]``."""
        ...

    def program(self) -> str:
        """What decides, beside its tensors, which operations it runs: its code, and numbers that are part of it."""
        ...

    def active(self, which: slice) -> bool:
        """Whether it changes the scores of one of these requests at all, as far as the host knows. Else a step leaves it out."""
        ...

    def look(self, weights: Sequence[Tensor]) -> None:
        """What the heads that are watched see in this step, ``[requests, columns]`` each; see `HeadWatch`."""

    def scores(self, scores: Tensor, which: slice) -> Tensor:
        """The scores ``[requests, vocabulary]`` of these requests, changed. Called once for each token."""
        ...

    def drew(self, tokens: Tensor, which: slice) -> None:
        """These tokens ``[requests]`` were drawn."""


class Sampler:
    """Draws one token for each of several requests.

    Args:
        requests: how many.
        vocabulary: how many tokens there are.
        order: of ``"penalty"``, ``"temperature"``, the names of the rules, and the three filters, which stand together.
        device: of the logits.
        guided: each request has two rows, conditional and unconditional, one below the other.
        rules: what else changes the scores, by names that `order` has.

    Attributes:
        seen: which tokens a request's penalty is about, ``[requests, vocabulary]``.
        failed: which requests have met logits that nothing can be drawn from (NaN, infinity, or all of them ``-inf``),
            ``[requests]``.
    """

    def __init__(
        self,
        requests: int,
        vocabulary: int,
        order: Sequence[str],
        device: torch.device,
        guided: bool = False,
        rules: Mapping[str, ScoreRule] | None = None,
    ) -> None:
        self.rules = dict(rules or {})
        at, names = [name in _FILTERS for name in order], (*TRANSFORMERS, *self.rules)
        if sorted(order) != sorted(names) or at.index(True) + sum(at) != len(at) - at[::-1].index(True):
            raise InputError(f"order={tuple(order)} must hold each of {names} once, the three filters together")
        self.order = tuple(order)
        self.guided = guided
        self.vocabulary = vocabulary
        with torch.inference_mode(False):
            self.seen = torch.zeros(requests, vocabulary, dtype=torch.bool, device=device)
            self.failed = torch.zeros(requests, dtype=torch.bool, device=device)
            # One setting a row, so that a new request is one copy to the device: all of them as fp32 ``[requests, 6]``.
            self._settings = torch.zeros(requests, 6, device=device)
            self._top_k = torch.full((requests, 1), vocabulary, dtype=torch.long, device=device)
        self._chosen = [GREEDY] * requests
        for request in range(requests):
            self.set(request, GREEDY)

    def first_rows(self, requests: int) -> "Sampler":
        """The sampler of the first requests: the same settings and marks."""
        new = copy.copy(self)
        new.seen, new.failed = self.seen[:requests], self.failed[:requests]
        new._settings, new._top_k = self._settings[:requests], self._top_k[:requests]
        new.rules = {name: rule.first_rows(requests) for name, rule in self.rules.items()}
        return new

    def state(self) -> list[Tensor]:
        """All that a step changes."""
        return [self.seen, self.failed, *(held for rule in self.rules.values() for held in rule.state())]

    def move(self, request: int, to: int) -> None:
        """Bring a request's settings and marks to another place."""
        for held in (self.seen, self.failed, self._settings, self._top_k):
            held[to] = held[request].clone()
        for rule in self.rules.values():
            rule.move(request, to)
        self._chosen[to] = self._chosen[request]

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
        self._settings[request] = torch.tensor(values, device=device)
        self._top_k[request] = self.vocabulary if greedy or not sampling.top_k else sampling.top_k
        self.failed[request] = False
        self._chosen[request] = sampling

    @property
    def drawing(self) -> Drawing | None:
        """What a step has to do; None if every request takes its most likely token, by its logits and penalty alone."""
        return self.drawing_of(_ALL)

    def drawing_of(self, which: slice) -> Drawing | None:
        """The same for a step of these requests alone."""
        chosen = [one for one in self._chosen[: len(self.seen)][which] if not one.greedy]
        rules = tuple(name for name, rule in self.rules.items() if rule.active(which))
        if not chosen and not rules:
            return None
        most = max((one.top_k for one in chosen if one.top_k < self.vocabulary), default=0)
        candidates = next((few for few in _CANDIDATES if few >= most), self.vocabulary)
        return Drawing(
            min(candidates, self.vocabulary),
            any(one.top_p < 1 for one in chosen),
            any(one.min_p > 0 for one in chosen),
            bool(chosen),
            rules,
        )

    def begin(self, request: int, seen: Tensor, notes: Mapping[str, Any] | None = None) -> None:
        """Forget what a request has drawn; its penalty is about these token ids, ``[tokens]``, and what it draws.

        Args:
            notes: what its rules have to know, by their names; what has no note is left alone by them.
        """
        self.penalize(request, seen)
        for name, rule in self.rules.items():
            rule.begin(request, (notes or {}).get(name))

    def free(self, request: int) -> None:
        """Draw nothing for a request, which is over."""
        self.set(request, GREEDY)
        for rule in self.rules.values():
            rule.end(request)

    def penalize(self, request: int, seen: Tensor) -> None:
        """From now on the penalty of a request is about these token ids, ``[tokens]``, and what it draws."""
        marks = self.seen.new_zeros(self.vocabulary + 1)  # the last is for ids that the model reads and never says
        marks[seen.to(marks.device).clamp(max=self.vocabulary)] = True
        self.seen[request] = marks[:-1]

    def __call__(self, logits: Tensor, noise: Tensor, drawing: Drawing | None, which: slice = _ALL) -> Tensor:
        """The next tokens ``[requests]``, which count as seen from then on.

        Args:
            logits: ``[requests, vocabulary]``, or twice as many rows with guidance.
            noise: exponential, ``[requests, vocabulary]``.
            drawing: what `drawing_of` says of these requests.
            which: of the requests; all by default.
        """
        scores = self.process(logits, drawing, which)
        tokens = scores.argmax(-1)
        if drawing is not None and drawing.draws:
            share = torch.softmax(scores, -1)
            drawn = (share / noise).argmax(-1)
            greedy = self._settings[which, 0] > 0
            # `multinomial` refuses what is no distribution: softmax makes NaN of all of it, whatever was wrong.
            self.failed[which].logical_or_(share.gather(1, drawn[:, None])[:, 0].isnan() & ~greedy)
            tokens = torch.where(greedy, tokens, drawn)
        self.seen[which].scatter_(1, tokens[:, None], True)
        for name in () if drawing is None else drawing.rules:
            self.rules[name].drew(tokens, which)
        return tokens

    def process(self, logits: Tensor, drawing: Drawing | None, which: slice = _ALL) -> Tensor:
        """The scores ``[requests, vocabulary]`` that are drawn from; what is filtered out is ``-inf``."""
        _, penalty, temperature, drop, min_p, guidance = self._settings[which][:, :, None].unbind(1)
        scores = logits.float()
        if self.guided:
            conditional, unconditional = scores.view(-1, 2, scores.shape[1]).unbind(1)
            scores = conditional + guidance * (conditional - unconditional)
        for name in self.order:
            if name == "penalty":
                scores = torch.where(
                    self.seen[which], torch.where(scores < 0, scores * penalty, scores / penalty), scores
                )
            elif name == "temperature":
                scores = scores / temperature
            elif drawing is None:
                continue
            elif name in drawing.rules:
                scores = self.rules[name].scores(scores, which)
            elif name == "top_k" and drawing.candidates:
                scores = _best(scores, self._top_k[which], drawing.candidates)
            elif name == "top_p" and drawing.nucleus:
                scores = _nucleus(scores, drop)
            elif name == "min_p" and drawing.floor:
                share = torch.softmax(scores, -1)
                scores = scores.masked_fill(share < min_p * share.amax(-1, keepdim=True), -torch.inf)
        return scores


def default_generator(device: torch.device) -> torch.Generator:
    """What torch draws with on a device where it is given no generator."""
    if device.type in ("cpu", "meta"):
        return torch.default_generator
    if device.type == "mps":
        return torch.mps._get_default_mps_generator()
    module = torch.get_device_module(device)
    module.init()
    return module.default_generators[module.current_device() if device.index is None else device.index]  # type: ignore[no-any-return]


def _best(scores: Tensor, top_k: Tensor, candidates: int) -> Tensor:
    """The `top_k` best, ``[requests, 1]``, of each request and those that are as good as the last of them."""
    ordered = scores.topk(candidates).values
    least = ordered.gather(1, top_k.clamp(max=candidates) - 1)
    return scores.masked_fill((scores < least) & (top_k <= candidates), -torch.inf)


def _nucleus(scores: Tensor, drop: Tensor) -> Tensor:
    """What is left when the worst, up to a probability of `drop`, ``[requests, 1]``, have left; the best stays."""
    ordered, index = torch.sort(scores, descending=False)
    dropped = torch.softmax(ordered, -1).cumsum(-1) <= drop
    dropped[:, -1] = False
    return scores.masked_fill(dropped.scatter(1, index, dropped), -torch.inf)
