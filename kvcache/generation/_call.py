"""What a model's `generate` is asked for, read once: for the run itself, for the decode engine and for planners."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.generation.configuration_utils import GenerationMode

from kvcache.cache import CacheGeometry
from kvcache.errors import InputError
from kvcache.generation._run import mode_of, speaker
from kvcache.models import pop_cache


@dataclass(frozen=True, eq=False)
class GenerateCall:
    """What a model's `generate` is asked for.

    Attributes:
        inputs: its first argument, such as token ids ``[rows, tokens]``; None where that is among the settings, under the
            name that the model has for it.
        settings: its other arguments, by name.
        model: that is asked.
        module: the model, or within a wrapper that one, which `generate` is called on; None if it is no transformers model.
    """

    inputs: Tensor | None
    settings: Mapping[str, Any]
    model: Any
    module: Any

    @classmethod
    def of(
        cls, model: Any, geometry: CacheGeometry, inputs: Tensor | None, settings: Mapping[str, Any]
    ) -> "GenerateCall":
        """A call of ``model.generate(inputs, **settings)``, or without inputs.

        Args:
            model: a transformers model.
            geometry: of its cache.
            inputs: token ids ``[rows, tokens]``, or what else the model's first argument is.
            settings: what `generate` is given besides.
        """
        return cls(inputs, dict(settings), model, speaker(model, geometry))

    @property
    def seq2seq(self) -> bool:
        """Whether the model is an encoder-decoder."""
        return bool(self.model.config.is_encoder_decoder)

    @property
    def caches(self) -> bool:
        """Whether the request leaves caches on."""
        return self.settings.get("use_cache") is not False

    # ------------------------------------------------------------------ what it starts from

    @cached_property
    def prompt(self) -> Tensor | None:
        """What the model starts from: token ids ``[rows, tokens]``, embeddings, or an encoder's features or pictures."""
        main = getattr(self.model, "main_input_name", "input_ids")
        given = map(self.settings.get, ("decoder_input_ids", "input_ids", "inputs_embeds", main))
        return next((states for states in (*given, self.inputs) if states is not None), None)

    @cached_property
    def rows(self) -> int | None:
        """Rows of the request, counting the sequences that one prompt shall have; None if nothing says so."""
        encoded = self.settings.get("encoder_outputs")
        known = self.prompt if encoded is None else encoded[0]
        return None if known is None else known.shape[0] * self.number("num_return_sequences")

    @cached_property
    def mask(self) -> Tensor | None:
        """The attention mask ``[rows, tokens]``, as given or as `generate` will make it; None without one."""
        mask: Tensor | None = self.settings.get("attention_mask")
        return self.guessed_mask(self.prompt) if mask is None else mask

    def guessed_mask(self, ids: Tensor | None) -> Tensor | None:
        """The mask that `generate` makes itself of these token ids ``[rows, tokens]``, where none is given: in that shape."""
        pad, ends = self.setting("pad_token_id"), self.setting("eos_token_id")
        ends = ends if isinstance(ends, list) else [ends]
        if ids is None or ids.dim() != 2 or pad is None or pad in ends:
            return None
        return torch.ne(ids, pad).long()

    @property
    def text(self) -> tuple[Tensor | None, int] | None:
        """The token ids ``[rows, tokens]`` of the text so far, and how many a row has.

        The ids are None where they are not known; all of it is None where nothing says how many there are.
        """
        ids = self.settings.get("decoder_input_ids") if self.seq2seq else self.prompt
        mask = self.settings.get("decoder_attention_mask" if self.seq2seq else "attention_mask")
        if ids is None and not self.seq2seq:
            return None
        given = 1 if ids is None else ids.shape[1]
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] > given:  # only what is new is given
            return None, mask.shape[1]
        return (ids if ids is not None and not ids.is_floating_point() else None), given

    def read(self, out: Any) -> Tensor | None:
        """The token ids ``[rows, tokens]`` that a cache has seen after this, by what came of it.

        Rows stand as they came, ids from the beginning; None where that does not say it.
        """
        prompt, mask = self.prompt, self.settings.get("attention_mask")
        ids = out if isinstance(out, Tensor) else getattr(out, "sequences", None)
        told = prompt is not None and prompt.dim() == 2 and not prompt.is_floating_point()
        if mask is not None and told and prompt is not None:
            told = mask.dim() == 2 and mask.shape[1] == prompt.shape[1]
        one = self.number("num_beams") == 1 and not self.seq2seq
        text = isinstance(ids, Tensor) and ids.dim() == 2  # and no sound, nor several numbers a token
        return ids if told and one and text else None

    # ------------------------------------------------------------------ its settings

    def setting(self, name: str) -> Any:
        """A generation setting as `generate` will find it: by name, in the given config, or in the model's; None without."""
        configs = (self.settings.get("generation_config"), self._defaults)
        found = (self.settings.get(name), *(getattr(config, name, None) for config in configs))
        return next((value for value in found if value is not None), None)

    def number(self, name: str) -> int:
        """A whole number among the generation settings; 1 where nobody has set it."""
        value = self.setting(name)
        return 1 if value is None else int(value)

    @property
    def mode(self) -> GenerationMode:
        """How `generate` will choose tokens.

        Raises:
            InputError: for settings that it refuses.
        """
        return mode_of(self.module, self.settings)

    def check_cache_kind(self) -> None:
        """Refuse another kind of cache than ours.

        What a checkpoint's config asks for is a default, for which we stand; what a request asks for is not.

        Raises:
            InputError: with what to do instead.
        """
        configs = self.settings.get("generation_config"), self._defaults
        asked, default = (getattr(config, "cache_implementation", None) for config in configs)
        kind = self.settings.get("cache_implementation") or (asked if asked != default else None)
        if kind not in (None, "dynamic", "dynamic_full"):
            raise InputError(
                f"cache_implementation={kind!r} asks for another cache than this manager's; leave it out, or call "
                "model.generate(), which makes that one"
            )

    @property
    def _defaults(self) -> Any:
        return getattr(self.module, "generation_config", None)

    # ------------------------------------------------------------------ others like it

    def given(self, inputs: Tensor | None, settings: Mapping[str, Any]) -> "GenerateCall":
        """The same model asked for something else: inputs as of `of`, ``[rows, tokens]``."""
        return replace(self, inputs=inputs, settings=dict(settings))

    def without_cache(self) -> "tuple[Any, GenerateCall]":
        """A cache among the settings, None if there is none, and the call without it."""
        settings = dict(self.settings)
        return pop_cache(settings), self.given(self.inputs, settings)

    def arguments(self, caching: bool) -> dict[str, Any]:
        """The settings with caches switched on or off: in the config where one is given, which wants no others beside it."""
        config = self.settings.get("generation_config")
        if config is None:
            return {**self.settings, "use_cache": caching}
        config = copy.copy(config)
        config.use_cache = caching
        others = {name: value for name, value in self.settings.items() if name != "use_cache"}
        return others | {"generation_config": config}
