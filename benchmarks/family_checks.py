"""What kvcache does with one model: each feature tried, and compared with the model's own `generate` and forward."""
# Not by `make bench`: a part of families.py.

import copy
import inspect
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import family_models
import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
)

from kvcache import KVCacheManager, KVQuantization, SlidingWindow
from kvcache.cache import SnapKV
from kvcache.errors import KVCacheError
from kvcache.models import cache_kwarg

WINDOW, SINKS = 8, 2
LIMIT = WINDOW + SINKS
LONG = 20  # tokens of a prompt that is longer than the window
SAME = 1e-3  # of the largest logit: fp32 sums in another order, through some layers of wide weights
FED_BACK = 5e-3  # of the largest number: sounds are fed back as numbers, and so differ more from step to step
TIE = 1e-4  # of the largest logit: two tokens so close may change places
FEW_BITS = 0.25  # of the spread of logits: 8 bits are off by up to 1/254 of a group's largest, in each of some layers
SPREADS = (0.2, 0.08, None)  # of weights: the widest with which the model's own logits are finite

FEATURES = (
    "generate", "stream", "engine", "window", "re-rotation", "prefix", "ranking", "bits", "save", "plan", "truncate", "beams",
)  # fmt: skip
STATES = ("works", "falls back", "refused", "wrong", "crash", "not tried")


class Wrong(Exception):
    """Another answer than the model's own."""


class FellBack(Exception):
    """`generate` did what the engine was asked for."""


class NotTried(Exception):
    """The model itself cannot do what the feature is compared with."""


@dataclass(frozen=True)
class Cell:
    """What came of one feature.

    Attributes:
        state: one of `STATES`.
        why: the reason, or what differs; empty where it works.
    """

    state: str
    why: str = ""


def told(check: Callable[[], None]) -> Cell:
    """Run one check."""
    try:
        check()
    except Wrong as error:
        return Cell("wrong", str(error))
    except FellBack as error:
        return Cell("falls back", str(error))
    except NotTried as error:
        return Cell("not tried", str(error))
    except KVCacheError as error:
        return Cell("refused", f"{type(error).__name__}: {error}")
    except Exception as error:  # the sweep's purpose is to find these
        return Cell("crash", f"{type(error).__name__}: {str(error)[:300]} ({_place(error)})")
    return Cell("works")


def _place(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/kvcache/" in frame.filename]
    return " from ".join(f"{Path(f.filename).name}:{f.lineno}" for f in [frames[-1], *ours[-1:]])


# ---------------------------------------------------------------------- comparing


def _tensors(out: Any) -> list[Tensor]:
    """What a `generate` has made, without logits and caches."""
    if isinstance(out, Tensor):
        return [out]
    if getattr(out, "sequences", None) is not None:
        return [out.sequences]
    if isinstance(out, Mapping):
        out = [value for name, value in out.items() if name not in ("cache", "past_key_values")]
    return [t for one in out for t in _tensors(one)] if isinstance(out, list | tuple) else []


def _logits(out: Any) -> Tensor | None:
    """``[rows, steps, vocabulary]``, where `generate` tells them."""
    steps = getattr(out, "logits", None)
    if not isinstance(steps, tuple) or not steps or len({step.shape for step in steps}) != 1 or steps[0].dim() != 2:
        return None
    return torch.stack([step.float() for step in steps], 1)


def _same_steps(a: Any, b: Any, steps: int) -> int:
    """For how many of the last steps two results have the same tokens, of sound as well as of text."""
    same = torch.ones(steps, dtype=torch.bool)
    for name, tokens in a.items():
        if (
            isinstance(tokens, Tensor)
            and not tokens.is_floating_point()
            and tokens.dim() > 1
            and tokens.shape[1] >= steps
        ):
            same &= (tokens[:, -steps:] == b[name][:, -steps:]).transpose(0, 1).reshape(steps, -1).all(1)
    return int(same.long().cumprod(0).sum())


def _off(a: Tensor, b: Tensor) -> float:
    """The largest difference, as a part of the largest number; infinite where only one is finite."""
    both = torch.isfinite(a) & torch.isfinite(b)
    if not torch.equal(torch.isfinite(a), torch.isfinite(b)):
        return float("inf")
    if not both.any():
        return 0.0
    return float((a[both] - b[both]).abs().max() / a[both].abs().max().clamp_min(1e-9))


def compare(want: Any, got: Any, what: str = "") -> None:
    """Raise `Wrong` unless two results of `generate` are the same but for rounding."""
    prefix = f"{what}: " if what else ""
    wanted, found = _tensors(want), _tensors(got)
    if [t.shape for t in wanted] != [t.shape for t in found]:
        raise Wrong(f"{prefix}{[list(t.shape) for t in found]} where {[list(t.shape) for t in wanted]} was expected")
    left, right = _logits(want), _logits(got)
    if left is not None and right is not None and left.shape == right.shape and left.shape[0] == wanted[0].shape[0]:
        _compare_steps(wanted[0], found[0], left, right, prefix)
        return
    for a, b in zip(wanted, found, strict=True):
        if a.is_floating_point():
            if (off := _off(a.float(), b.float())) > FED_BACK:
                raise Wrong(f"{prefix}numbers are off by {off:.2g}")
        elif not torch.equal(a, b):
            raise Wrong(f"{prefix}tokens differ first at {(a != b).nonzero()[0].tolist()}")


def _compare_steps(a: Tensor, b: Tensor, left: Tensor, right: Tensor, prefix: str) -> None:
    steps = left.shape[1]
    for row in range(a.shape[0]):
        differ = (a[row, -steps:] != b[row, -steps:]).nonzero()
        first = int(differ[0]) if len(differ) else steps - 1
        off = _off(left[row, : first + 1], right[row, : first + 1])
        if len(differ) and off > TIE:
            raise Wrong(f"{prefix}row {row} differs from step {first} of {steps} on, logits up to there by {off:.2g}")
        if off > SAME:
            raise Wrong(f"{prefix}same tokens, but logits are off by {off:.2g}")


# ---------------------------------------------------------------------- a window that is nobody's but this file's


class PlainWindow(DynamicLayer):
    """Sinks and the newest tokens, cut out of all that came: for one token at a time behind a short prompt."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        super().update(key_states, value_states, *args, **kwargs)
        self.seen += key_states.shape[2]
        for name in ("keys", "values"):
            states = getattr(self, name)
            if states.shape[2] > LIMIT:
                setattr(self, name, torch.cat([states[:, :, :SINKS], states[:, :, -WINDOW:]], 2))
        return self.keys, self.values

    def get_seq_length(self, *args: Any) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        fresh = query_length.shape[0] if isinstance(query_length, Tensor) else int(query_length)
        kept = min(self.seen, LIMIT - fresh) if self.seen else 0
        return kept + fresh, self.seen - kept


def plain_cache(model: Any, layers: int, window: bool = False) -> Any:
    """The model's own kind of cache, with plain windows in place of its full layers where they are wanted."""
    made = list(DynamicCache(config=model.config).layers)[: layers or None]
    made += [DynamicLayer() for _ in range(layers - len(made))]  # type: ignore[no-untyped-call]
    found = [PlainWindow() if window and type(layer) is DynamicLayer else layer for layer in made]
    cache = Cache(layers=found)
    return EncoderDecoderCache(cache, DynamicCache()) if model.config.is_encoder_decoder else cache


def mask_oracle(model: Any, ids: Tensor, window: bool) -> Tensor | None:
    """All logits of a forward without any cache, under masks that say what a window shows; None if it takes none."""
    count = ids.shape[1]
    query, key = torch.arange(count)[:, None], torch.arange(count)[None]
    causal = key <= query
    shown = causal & ((key < SINKS) | (key > query - WINDOW)) if window else causal
    config = model.config.get_text_config(decoder=True)
    own = {type(layer) for layer in DynamicCache(config=model.config).layers}
    masks: Any = _added(shown, ids.shape[0])
    if own - {DynamicLayer}:
        if own - {DynamicLayer, DynamicSlidingWindowLayer} or not getattr(config, "sliding_window", None):
            return None
        near = causal & (key > query - config.sliding_window)
        masks = {"full_attention": masks, "sliding_attention": _added(near, ids.shape[0])}
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": masks, "use_cache": False}
    if "position_ids" in inspect.signature(model.forward).parameters:
        given["position_ids"] = torch.arange(count)[None].expand(ids.shape[0], -1)
    try:
        with torch.no_grad():
            return model(**given).logits.float()
    except Exception:  # a model that takes no such mask; another reference serves
        return None


def _added(shown: Tensor, rows: int) -> Tensor:
    return torch.where(shown, 0.0, torch.finfo(torch.float32).min)[None, None].expand(rows, 1, -1, -1)


# ---------------------------------------------------------------------- one model


class Trial:
    """One model, its inputs, and what its own `generate` says to them.

    Args:
        name: of the class.
        **settings: of its config, by dotted path.

    Raises:
        ValueError: if there is nothing to compare with: it cannot be built, or its own `generate` fails.
    """

    def __init__(self, name: str, **settings: Any) -> None:
        self.name = name
        self.new = family_models.EXCEPTIONS.get(name, family_models.Case()).tokens
        said: list[str] = []
        for spread in SPREADS:
            self.model = family_models.build(name, spread, **settings)
            for kind, inputs in self._inputs():
                for logits in (True, False):
                    self.kind, self.inputs, self._logits = kind, inputs, logits
                    try:
                        self.reference = self._checked()
                    except Exception as error:  # of any model's own code: the next is tried
                        said.append(f"{kind}: {type(error).__name__}: {str(error)[:200]}")
                    else:
                        self.spread = spread
                        return
        raise ValueError(f"its own generate gives nothing to compare with: {said[0]}")

    def _inputs(self) -> list[tuple[str, dict[str, Any]]]:
        found = []
        names = iter(family_models.inputs_of(self.name, self.model))
        while True:
            try:
                found.append(next(names))
            except StopIteration:
                return found

    def _checked(self) -> Any:
        first = self.run(self.model.generate)
        made = _tensors(first)
        if not made or not all(bool(torch.isfinite(t).all()) for t in made if t.is_floating_point()):
            raise ValueError("no finite result")
        logits = _logits(first)
        if self._logits and (logits is None or bool(logits.isnan().any())):
            raise ValueError("no logits")
        compare(first, self.run(self.model.generate))
        return first

    # ------------------------------------------------------------------ running

    def run(self, generate: Callable[..., Any], new: int | None = None, **given: Any) -> Any:
        """`generate`, the model's or a manager's, on the inputs, or on those that are given instead."""
        inputs = given.pop("inputs", None)
        inputs = copy.deepcopy(self.inputs if inputs is None else inputs)
        if self._logits:
            given = {"return_dict_in_generate": True, "output_logits": True, **given}
        torch.manual_seed(5)
        with torch.no_grad():
            return generate(**inputs, max_new_tokens=new or self.new, do_sample=False, **given)

    @property
    def rows(self) -> int:
        first = next(iter(self.inputs.values()))
        return int(first[0].shape[0]) if not isinstance(first, Tensor) else int(first.shape[0])

    def text(self, count: int, seed: int = 0) -> dict[str, Any]:
        """A prompt of so many tokens, for a model that takes nothing but text."""
        if self.kind != "text" or self.model.config.is_encoder_decoder:
            raise NotTried("takes more than text")
        ids = family_models.tokens(self.model.config, self.rows, count, seed)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def manager(self, policy: Any = None, **settings: Any) -> KVCacheManager:
        return KVCacheManager(self.model, policy, **settings)

    # ------------------------------------------------------------------ the features

    def generate(self) -> None:
        compare(self.reference, self.run(self.manager().generate))
        compare(self.reference, self.run(self.model.generate), "the model's own afterwards")

    def _streamed(self, manager: KVCacheManager, backend: Any, want: Any, **given: Any) -> None:
        inputs = copy.deepcopy(given.pop("inputs", self.inputs))
        torch.manual_seed(5)
        new = given.pop("new", self.new)
        with torch.no_grad():
            parts = list(manager.stream(**inputs, max_new_tokens=new, do_sample=False, chunk_size=5, backend=backend))
        got, made = torch.cat(parts, 1), _tensors(want)[0]
        if made.dim() != 2 or made.is_floating_point() or got.dim() != 2:
            if not got.numel():
                raise Wrong("nothing was streamed")
            return  # what a model makes of its tokens; `generate` compares that
        logits = _logits(want)
        fresh = made[:, -(new if logits is None else logits.shape[1]) :]  # a text may end before: with its sound, say
        if got.shape != fresh.shape:
            raise Wrong(f"{list(got.shape)} streamed, {list(fresh.shape)} generated")
        differ = (got != fresh).any(0).nonzero()
        if len(differ) and not self._tied(logits, int(differ[0])):
            raise Wrong(f"tokens differ from step {int(differ[0])} on")

    @staticmethod
    def _tied(logits: Tensor | None, step: int) -> bool:
        if logits is None:
            return False
        first, second = logits[:, step].topk(2, -1).values.unbind(-1)
        return bool(((first - second) <= TIE * logits.abs().max()).any())

    def stream(self) -> None:
        self._streamed(self.manager(), "off", self.reference)

    def engine(self) -> None:
        manager = self.manager()
        self._streamed(manager, "eager", self.reference)
        if manager.report().backend is None:
            raise FellBack(manager.report().fallback or "no reason was given")

    def window(self) -> None:
        loose = self.manager(SlidingWindow(200, sinks=SINKS))
        compare(self.reference, self.run(loose.generate), "below the limit")
        seen = loose.report().seen
        if seen > 2 * SINKS:
            exact = self.manager(SlidingWindow(seen - SINKS, sinks=SINKS))
            compare(self.reference, self.run(exact.generate), "at the limit")
        manager = self.manager(SlidingWindow(WINDOW, sinks=SINKS))
        out = self.run(manager.generate)
        self._bounded(manager, LIMIT)
        self._as_masked(out, self.run, "beyond the limit")
        self._streamed(manager, "eager", out)
        if self.kind == "text" and not self.model.config.is_encoder_decoder:
            self._long()

    @staticmethod
    def _bounded(manager: KVCacheManager, limit: int) -> None:
        for i, layer in enumerate(manager.report().layers):
            if "the model's own" not in layer.policy and layer.stored > limit:
                raise Wrong(f"layer {i} holds {layer.stored} tokens, {limit} were allowed")

    def _as_masked(self, out: Any, run: Callable[..., Any], what: str) -> None:
        """Compare with masks, and where a model takes none with a cache that cuts its tokens out."""
        if self.kind == "text" and self._compared_with_masks(out, self.reference, what):
            return
        cache = plain_cache(self.model, self.manager().geometry.layers, window=True)
        try:
            want = run(self.model.generate, use_cache=True, **cache_kwarg(self.model, cache))
        except Exception as error:  # a model that does not take this cache
            raise NotTried(f"runs; there is no window to compare with ({type(error).__name__})") from error
        compare(want, out, what)

    def _compared_with_masks(self, out: Any, plain: Any, what: str) -> bool:
        """Whether masks could say it; raises `Wrong` where they say something else."""
        logits, own = _logits(out), _logits(plain)
        if logits is None or own is None or self.model.config.is_encoder_decoder or plain.sequences.dim() != 2:
            return False
        steps = logits.shape[1]
        if plain.sequences.shape[1] <= steps:
            return False  # what it was given is not in what it says
        whole = mask_oracle(self.model, plain.sequences, window=False)
        if whole is None or whole.shape[:2] != plain.sequences.shape or _off(own, whole[:, -steps - 1 : -1]) > SAME:
            return False
        masked = mask_oracle(self.model, out.sequences, window=True)
        unmasked = mask_oracle(self.model, out.sequences, window=False)
        if masked is None or unmasked is None or _off(masked, unmasked) < SAME:
            return False  # it does not look at the mask
        if (off := _off(masked[:, -steps - 1 : -1], logits)) > 2 * SAME:
            raise Wrong(f"{what}: logits are off by {off:.2g} from those under a mask")
        return True

    def _long(self) -> None:
        """A prompt longer than the window, at once."""
        text = self.text(LONG, seed=11)
        plain = self.run(self.model.generate, 8, inputs=text)
        manager = self.manager(SlidingWindow(WINDOW, sinks=SINKS))
        out = self.run(manager.generate, 8, inputs=text)
        self._bounded(manager, LIMIT)
        if not self._compared_with_masks(out, plain, "a prompt longer than the window"):
            self._one_by_one(manager, out, text)
        self._streamed(manager, "eager", out, inputs=text, new=8)

    def _one_by_one(self, manager: KVCacheManager, out: Any, text: dict[str, Any]) -> None:
        logits = _logits(out)
        if logits is None:
            return
        plain = self.run(self.model.generate, 8, inputs=text)
        own = self._stepped(plain_cache(self.model, manager.geometry.layers), plain.sequences)
        wanted = _logits(plain)
        if own is None or wanted is None or wanted.shape != own.shape or _off(wanted, own) > SAME:
            return  # alone, the model's tokens one by one are not its prompt
        cache = plain_cache(self.model, manager.geometry.layers, window=True)
        stepped = self._stepped(cache, out.sequences)
        if stepped is not None and (off := _off(stepped, logits)) > 2 * SAME:
            raise Wrong(f"a prompt longer than the window is not its tokens one by one: off by {off:.2g}")

    def _stepped(self, cache: Any, ids: Tensor) -> Tensor | None:
        """The logits of the last 8 tokens' predecessors, from one token at a time; None if the model cannot."""
        found = []
        positions = "position_ids" in inspect.signature(self.model.forward).parameters
        try:
            with torch.no_grad():
                for t in range(ids.shape[1] - 1):
                    more = {"position_ids": torch.full((ids.shape[0], 1), t)} if positions else {}
                    mask = torch.ones(ids.shape[0], t + 1, dtype=torch.long)
                    given = {"input_ids": ids[:, t : t + 1], "attention_mask": mask, "use_cache": True, **more}
                    found.append(self.model(**given, **cache_kwarg(self.model, cache)).logits[:, -1].float())
        except Exception:  # a model that is not called so
            return None
        return torch.stack(found[-8:], 1)

    def re_rotation(self) -> None:
        loose = self.manager(SlidingWindow(200, sinks=SINKS), positions="rerotated")
        compare(self.reference, self.run(loose.generate), "nothing leaves")
        # Without sinks all distances are the same at other positions.
        turned = self.manager(SlidingWindow(WINDOW), positions="rerotated")
        compare(self.run(self.manager(SlidingWindow(WINDOW)).generate), self.run(turned.generate), "without sinks")
        manager = self.manager(SlidingWindow(WINDOW, sinks=SINKS), positions="rerotated")
        self.run(manager.generate)
        self._bounded(manager, LIMIT)

    def prefix(self) -> None:
        manager = self.manager()
        if self.model.config.is_encoder_decoder or self.kind != "text":
            manager.add_prefix("p", torch.tensor([3, 4, 5]))
            raise NotTried("takes more than text")
        beginning = family_models.tokens(self.model.config, 1, 5, seed=3)[0]
        text = self.text(family_models.PROMPT)
        whole = torch.cat([beginning.expand(self.rows, -1), text["input_ids"]], 1)
        want = self.run(self.model.generate, inputs={"input_ids": whole, "attention_mask": torch.ones_like(whole)})
        manager.add_prefix("p", beginning)
        compare(want, self.run(manager.generate, inputs=text, prefix="p"))

    def ranking(self) -> None:
        loose = self.manager(SnapKV(400, sinks=SINKS, window_size=4))
        compare(self.reference, self.run(loose.generate), "nothing leaves")
        manager = self.manager(SnapKV(LIMIT, sinks=SINKS, window_size=4))
        self.run(manager.generate)
        self._bounded(manager, LIMIT)

    def bits(self) -> None:
        out = self.run(self.manager(storage=KVQuantization(8, group_size=8)).generate)
        want, got = _logits(self.reference), _logits(out)
        if want is None or got is None or want.shape != got.shape:
            return
        steps = want.shape[1]
        until = min(steps, _same_steps(self.reference, out, steps) + 1)
        a, b = want[:, :until], got[:, :until]
        a, b = (torch.where(torch.isfinite(a) & torch.isfinite(b), x, 0) for x in (a, b))
        off = float((a - b).square().mean().sqrt() / a.std().clamp_min(1e-9))
        if off > FEW_BITS:
            raise Wrong(f"8 bits move the logits by {off:.2g} of their spread in {until} steps")

    def save(self) -> None:
        manager = self.manager()
        cache = manager.new_cache(self.rows)
        begun = self.run(manager.generate, 8, **cache_kwarg(self.model, cache))
        again = manager.load(manager.save(cache))
        if self.kind != "text":
            raise NotTried("takes more than text")
        text = self._whole(begun)
        want = self._continued(text)
        compare(want, self.run(manager.generate, 6, inputs=text, **cache_kwarg(self.model, cache)), "going on")
        compare(
            want, self.run(manager.generate, 6, inputs=text, **cache_kwarg(self.model, again)), "going on from the file"
        )

    @staticmethod
    def _whole(out: Any) -> dict[str, Any]:
        ids = _tensors(out)[0]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def _continued(self, text: dict[str, Any]) -> Any:
        """What follows a text on a cache of the model's own kind that holds its beginning."""
        cache = plain_cache(self.model, self.manager().geometry.layers)
        try:
            self.run(self.model.generate, 8, use_cache=True, **cache_kwarg(self.model, cache))
            return self.run(self.model.generate, 6, inputs=text, use_cache=True, **cache_kwarg(self.model, cache))
        except Exception as error:  # of a model that cannot go on
            raise NotTried(f"the model itself cannot go on from a cache ({type(error).__name__})") from error

    def plan(self) -> None:
        for policy in (None, SlidingWindow(WINDOW, sinks=SINKS)):
            try:
                manager = self.manager(policy)
            except KVCacheError:
                continue  # the window says why
            self.run(manager.generate)
            held = manager.report()
            if not held.layers:
                raise NotTried("keeps no cache of keys and values")
            # The last token is never run; rows of guidance and the like count.
            encoded = max((layer.stored for layer in held.cross), default=0) or None
            told = manager.estimate(held.seen, self.rows, encoder_tokens=encoded)
            if told != held.nbytes:
                raise Wrong(f"{told:,} bytes estimated, {held.nbytes:,} held under {policy}")

    def truncate(self) -> None:
        manager = self.manager()
        cache = manager.new_cache(self.rows)
        inputs = self.inputs
        if self.model.config.is_encoder_decoder:
            start = _tensors(self.reference)[0]
            if start.dim() != 2 or start.is_floating_point():
                raise NotTried("its tokens cannot be given back")
            inputs = {**inputs, "decoder_input_ids": start[:, :6]}
        elif self.kind != "text":
            raise NotTried("takes more than text")
        length = 4
        try:
            want = self.run(self.model.generate, 8, inputs=inputs)
        except Exception as error:  # of the model's own code
            raise NotTried(f"the model itself takes no beginning ({type(error).__name__})") from error
        self.run(manager.generate, 4, inputs=inputs, **cache_kwarg(self.model, cache))
        manager.truncate(cache, length)
        own = self._cropped(inputs, length)
        got = self.run(manager.generate, 8, inputs=inputs, **cache_kwarg(self.model, cache))
        try:
            compare(want, got)
        except Wrong:
            compare(own, got)  # some models go on in another way than they begin

    def _cropped(self, inputs: dict[str, Any], length: int) -> Any:
        """What the model makes of its own cache when all but its first tokens are taken away."""
        cache = plain_cache(self.model, self.manager().geometry.layers)
        own = cache.self_attention_cache if self.model.config.is_encoder_decoder else cache
        try:
            self.run(self.model.generate, 4, inputs=inputs, use_cache=True, **cache_kwarg(self.model, cache))
            own.crop(length - int(own.get_seq_length()))
            return self.run(self.model.generate, 8, inputs=inputs, use_cache=True, **cache_kwarg(self.model, cache))
        except Exception as error:  # of a model that cannot
            raise NotTried(f"the model itself cannot go on from a cropped cache ({type(error).__name__})") from error

    def beams(self) -> None:
        given = {"num_beams": 2, "num_return_sequences": 2}
        if self._logits:
            given = {**given, "output_scores": True}
        try:
            want = self.run(self.model.generate, 8, **given)
        except Exception as error:  # of the model's own code
            raise NotTried(f"the model itself searches no beams ({type(error).__name__})") from error
        got = self.run(self.manager().generate, 8, **given)
        a, b = getattr(want, "sequences_scores", None), getattr(got, "sequences_scores", None)
        if a is not None and b is not None and a.shape == b.shape and _off(a, b) < TIE:
            return  # beams that are as likely
        compare(_tensors(want), _tensors(got))


def tried(name: str, features: Sequence[str] = FEATURES, **settings: Any) -> dict[str, Any]:
    """What came of each feature with one class, as a row of the results."""
    row: dict[str, Any] = {"class": name}
    try:
        trial = Trial(name, **settings)
    except Exception as error:  # told in the row
        return {**row, "built": f"{type(error).__name__}: {str(error)[:300]}", "cells": {}}
    config = trial.model.config
    kinds = [type(layer).__name__ for layer in DynamicCache(config=config).layers]
    row |= {"built": None, "family": config.model_type, "inputs": trial.kind, "layers": kinds, "spread": trial.spread}
    row["tokens told apart"] = int(_tensors(trial.reference)[0].unique().numel())
    cells = {}
    for feature in features:
        cells[feature] = asdict(told(getattr(trial, feature.replace("-", "_"))))
    return {**row, "cells": cells}
