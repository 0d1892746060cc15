"""One call of a model's `generate`, on caches of ours: a stand-in for the model asks for them.

A `generate` may call itself, as Whisper's does for each part of a long text, or hand its work to a model within, as BLIP's
does. So it is not handed one cache: for the time of a call, a stand-in for the model makes ours where the model would make
its own. The stand-in is a shallow copy, with which the call ends; the model itself is not changed.
"""

import functools
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin
from transformers.cache_utils import Cache
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.streamers import BaseStreamer

from kvcache.cache import CacheGeometry
from kvcache.errors import GeometryError, InputError
from kvcache.models import MADE_AS, cache_kwarg, get_cache, rope_by_length

STEPWISE = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
"""The modes that say one token a row at a time."""


class Wanted(NamedTuple):
    """What a run of `generate` wants a cache for.

    Attributes:
        rows: of its batch, counting beams; None where only the run itself knows.
        mask: the attention mask, ``[rows, tokens]``; None where no row has pads.
        crossing: whether the model attends to an encoder as well.
        assisted: whether tokens are taken back: guesses of an assistant that were wrong.
        supported: whether the model takes a cache of keys and values at all.
    """

    rows: int | None
    mask: Tensor | None
    crossing: bool
    assisted: bool
    supported: bool


class Run:
    """What became of one call of `generate`.

    Attributes:
        model: calls it; None behind `running`.
        cache: that it ran on last; None before, and where it ran on something else.
        asked: whether it asked for a cache.
        mode: of the last run within.
        rows: of the last run within, counting beams; None where it did not say.
        streamer: is told the tokens also where a model's own `generate` forgets to hand it on.
    """

    def __init__(self, make: Callable[[Wanted], Any], given: Any) -> None:
        self.model: Any = None
        self.cache = given
        self.asked = False
        self.mode: GenerationMode | None = None
        self.rows: int | None = None
        self.streamer: BaseStreamer | None = None
        self._make = make
        self._given = given
        self._fresh = True  # nothing has been run on the cache yet

    def prepare(self, module: Any, config: GenerationConfig, inputs: dict[str, Any], mode: Any, rows: int) -> None:
        """Put the cache of a run among the model's inputs."""
        if not self._is_ours(config):
            return
        self.mode = mode
        self.rows = rows * max(config.num_beams or 1, config.num_return_sequences or 1)
        if self._given is None:
            self._put(module, inputs, self.rows)
        else:
            self._check_first_use()
        if inputs.get(MADE_AS) is not None:
            config.cache_implementation = None  # a checkpoint's default, which `generate` would not have beside a cache

    def prefill(self, module: Any, config: GenerationConfig, inputs: dict[str, Any]) -> None:
        """The same for a run that has not asked before it prefills, or prefills twice."""
        if self._given is None and self._is_ours(config):
            held = inputs.get(MADE_AS)
            if held is None or (held is self.cache and not self._fresh):
                self._put(module, inputs, None)
        self._fresh = False

    @staticmethod
    def _is_ours(config: GenerationConfig) -> bool:
        """Whether a run is for this call's own tokens: an assistant's guesses come from a cache of its own."""
        return not config.is_assistant and config.use_cache is not False

    def _put(self, module: Any, inputs: dict[str, Any], rows: int | None) -> None:
        both = bool(module.config.is_encoder_decoder)
        encoded = any(inputs.get(name) is not None for name in ("encoder_hidden_states", "encoder_outputs"))
        wanted = Wanted(
            rows,
            None if both else inputs.get("attention_mask"),
            both or encoded,
            self.mode is GenerationMode.ASSISTED_GENERATION,
            bool(module._supports_default_dynamic_cache()),
        )
        cache = self._make(wanted)
        self.asked, self._fresh = True, True
        if cache is not None:
            inputs[MADE_AS] = self.cache = cache

    def _check_first_use(self) -> None:
        if self.asked:
            raise InputError(
                "these inputs take several runs of this model's generate (long audio, or another try), and a cache of your "
                "own serves one of them; leave it out"
            )
        self.asked = True

    def made(self, inputs: Mapping[str, Any]) -> None:
        """Take note of a cache that the model has made itself."""
        if self.cache is None and isinstance(inputs.get(MADE_AS), Cache):
            self.cache = inputs[MADE_AS]


@contextmanager
def running(model: Any, geometry: CacheGeometry, make: Callable[[Wanted], Any], given: Any = None) -> Iterator[Run]:
    """Within this block, ``run.model.generate(…)`` is the model's own, on caches of ours.

    Args:
        model: is not changed.
        geometry: of its cache: models within that have another are left alone.
        make: gives a new cache for each run of `generate`, or None for the model's own.
        given: one for the only run, which is handed to it by the caller.
    """
    run = Run(make, given)
    modules = _generating(model, geometry)
    run.model, copies = _copied(model, {id(module) for module in modules})
    for copied in copies:
        _let_ask(copied, run)
    try:
        yield run
    finally:
        for copied in copies:  # which would hold themselves and the cache
            for name in _ASKING:
                copied.__dict__.pop(name, None)
        run.model = None


def asks(model: Any, geometry: CacheGeometry) -> bool:
    """Whether there is a `generate` of transformers' in a model, which asks for its cache."""
    return bool(_generating(model, geometry))


def speaker(model: Any, geometry: CacheGeometry) -> Any:
    """The model, or within a wrapper that one, which `generate` is called on; None if it is no transformers model."""
    return model if isinstance(model, GenerationMixin) else next(iter(_generating(model, geometry)), None)


def own_way(module: Any) -> str | None:
    """What of `generate` a model does in its own way; None if it is transformers' own."""
    kind = type(module)
    name = next((n for n in ("generate", "_sample") if getattr(kind, n) is not getattr(GenerationMixin, n)), None)
    return None if name is None else f"{kind.__name__} has a {name.strip('_')} of its own"


def mode_of(module: Any, given: Mapping[str, Any]) -> GenerationMode:
    """How `generate` will choose tokens, by its arguments, the model's generation config, and its defaults.

    Raises:
        InputError: for settings that it refuses.
    """
    arguments = {name: value for name, value in given.items() if name != "generation_config"}
    standing: Any = _shallow(module)  # some models take notes of what they are asked for
    try:
        config, _ = standing._prepare_generation_config(given.get("generation_config"), **arguments)
        return GenerationMode(config.get_generation_mode(given.get("assistant_model")))
    except (ValueError, TypeError) as error:
        raise InputError(f"generate refuses these settings: {error}") from error


# ---------------------------------------------------------------------- the stand-in

_ASKING = ("_prepare_cache_for_generation", "_prefill", "_sample", "prepare_inputs_for_generation")


def _generating(model: Any, geometry: CacheGeometry) -> list[Any]:
    """The modules whose `generate` may run on a cache of this geometry."""
    if isinstance(model, GenerationMixin) and type(model).generate is GenerationMixin.generate:
        return [model]
    found = [module for module in model.modules() if isinstance(module, GenerationMixin)]
    return [module for module in found if module is model or _alike(module, model, geometry)]


def _alike(module: Any, model: Any, geometry: CacheGeometry) -> bool:
    """Whether a model within is the one that says the text, not, for example, one that says a codebook's other levels."""
    config, whole = (one.config.get_text_config(decoder=True) for one in (module, model))
    if type(config) is not type(whole):
        return False
    try:
        other = CacheGeometry.from_config(module.config)
    except GeometryError:
        return False
    return (other.layers, other.kv_heads, other.head_dim) == (geometry.layers, geometry.kv_heads, geometry.head_dim)


def _shallow(module: nn.Module) -> nn.Module:
    """A module with the same everything, whose attributes are its own."""
    new: nn.Module = object.__new__(type(module))
    new.__dict__.update(module.__dict__)
    return new


def _copied(model: Any, targets: set[int]) -> tuple[Any, list[nn.Module]]:
    """A shallow copy of a model in which the targets, and what they stand in, are copies; the targets' copies."""
    copies: dict[int, nn.Module] = {}

    def holds(module: nn.Module) -> bool:
        return any(id(part) in targets for part in module.modules())

    def visit(module: nn.Module) -> nn.Module:
        new = _shallow(module)
        if id(module) in targets:
            copies[id(module)] = new
        if len(copies) < len(targets):
            new.__dict__["_modules"] = {
                name: visit(part) if part is not None and holds(part) else part
                for name, part in module._modules.items()
            }
        return new

    return visit(model), list(copies.values())


def _let_ask(module: Any, run: Run) -> None:
    """Let a copy ask `run` for its cache. These are methods, as some models call their functions with another `self`."""
    kind = type(module)

    def prepare(self: Any, generation_config: Any, model_kwargs: Any, generation_mode: Any, batch_size: int,
                max_cache_length: int, **others: Any) -> Any:  # fmt: skip
        if self is module:
            run.prepare(self, generation_config, model_kwargs, generation_mode, batch_size)
        result = kind._prepare_cache_for_generation(
            self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length, **others
        )
        if self is module:
            run.made(model_kwargs)
        return result

    def prefill(self: Any, input_ids: Any, generation_config: Any, model_kwargs: Any, *rest: Any, **others: Any) -> Any:
        if self is module:
            run.prefill(self, generation_config, model_kwargs)
        return kind._prefill(self, input_ids, generation_config, model_kwargs, *rest, **others)

    def sample(self: Any, *inputs: Any, **others: Any) -> Any:
        if self is module and others.get("streamer") is None and run.streamer is not None:
            others["streamer"] = run.streamer
        return kind._sample(self, *inputs, **others)

    @functools.wraps(kind.prepare_inputs_for_generation)  # `generate` reads there what it may be given
    def next_inputs(self: Any, *inputs: Any, **others: Any) -> Any:
        result = kind.prepare_inputs_for_generation(self, *inputs, **others)
        if self is module and run.cache is not None and get_cache(others) is run.cache and get_cache(result) is None:
            run.cache.reset()  # all tokens are computed anew, on the same cache
            result = {**result, **cache_kwarg(module, run.cache)}
        return result

    methods: list[Callable[..., Any]] = [prepare, prefill, sample]
    if rope_by_length(module) == "longrope":
        # One that changes at a length (Phi-3) drops its cache there, and would go on with one of transformers'.
        methods.append(next_inputs)
    for name, method in zip(_ASKING, methods, strict=False):
        module.__dict__[name] = types.MethodType(method, module)
