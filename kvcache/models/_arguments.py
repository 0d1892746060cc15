"""What the public constructors and calls are given, looked at before anything is done with it."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin

from kvcache.errors import InputError
from kvcache.models._compat import pop_cache

BESIDE_TEXT = frozenset(
    (
        "pixel_values", "pixel_values_images", "pixel_values_videos", "pixel_values_local", "high_res_pixel_values",
        "pixel_attention_mask", "pixel_mask", "image_patches", "image_sizes", "image_sizes_videos", "image_grid_thw",
        "image_position_ids", "image_merge_sizes", "images_per_sample", "batch_num_images", "num_local_patches",
        "patches_grid", "spatial_shapes", "target_sizes", "target_sizes_videos", "video_grid_thw", "video_position_ids",
        "video_merge_sizes", "video_compression_mask", "num_frames_per_video", "second_per_grid_ts",
        "video_second_per_grid", "use_audio_in_video", "vision_feature_layer", "vision_feature_select_strategy",
        "vision_aspect_ratio", "interpolate_pos_encoding", "input_features", "input_features_mask", "input_values",
        "input_values_mask", "feature_attention_mask", "audio_feature_lengths", "mm_encoder_outputs",
    )
)  # fmt: skip
"""What transformers' models call pictures, films and sounds: inputs that stand at tokens of their own, and change no others
before these."""


def check_model(model: Any) -> None:
    """Raise `InputError` for what is no loaded transformers model: a name, a class, nothing."""
    if isinstance(model, nn.Module) and getattr(model, "config", None) is not None:
        return
    if isinstance(model, type):
        given, next_step = f"the class {model.__name__}", f"give an instance: {model.__name__}.from_pretrained(…)"
    elif isinstance(model, str):
        given, next_step = f"the name {model!r}", f"load it first: AutoModelForCausalLM.from_pretrained({model!r})"
    else:
        given, next_step = repr(model), "give for example AutoModelForCausalLM.from_pretrained(…)"
    raise InputError(f"model must be a loaded transformers model, got {given}; {next_step}")


def check_generates(model: Any) -> None:
    """Raise `InputError` for a body without a head, which has no ``generate``."""
    if getattr(model, "generate", None) is None:
        raise InputError(
            f"{type(model).__name__} has no head to choose tokens with, and no generate(): load it as "
            "AutoModelForCausalLM, or run it in a loop of your own with new_cache()"
        )


def check_kv_dtype(kv_dtype: Any) -> None:
    """Raise `InputError` for what is no floating-point dtype of torch."""
    if kv_dtype is not None and not (isinstance(kv_dtype, torch.dtype) and kv_dtype.is_floating_point):
        raise InputError(f"kv_dtype={kv_dtype!r} must be a floating-point dtype of torch, such as torch.bfloat16")


_POPPED = ("tokenizer", "assistant_tokenizer", "trust_remote_code")  # that `generate` takes without saying so


def check_generate_arguments(model: Any, given: Mapping[str, Any]) -> None:
    """Raise `InputError` for keyword arguments that neither ``generate`` nor the model takes, as ``generate`` itself would.

    A model whose ``generate`` is its own is not asked: only that knows what it takes.
    """
    if not isinstance(model, GenerationMixin) or type(model).generate is not GenerationMixin.generate:
        return
    own = inspect.signature(GenerationMixin.generate).parameters
    settings: Any = GenerationConfig
    asked: Any = model
    given = dict(given)
    pop_cache(given)  # a cache, under whichever of its names
    try:
        rest = settings().update(**{name: value for name, value in given.items() if name not in {*own, *_POPPED}})
    except (ValueError, TypeError) as error:
        raise InputError(f"generate refuses these settings: {error}") from error
    try:
        asked._validate_model_kwargs(rest)
    except ValueError as error:
        raise InputError(f"generate does not take these arguments: {error}") from error
