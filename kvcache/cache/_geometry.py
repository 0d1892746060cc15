"""What a cache for a model looks like: layers, KV heads, head size, dtype, and how the model encodes positions."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from kvcache.errors import GeometryError, PositionsError

_CPU = torch.device("cpu")

Positions = Literal["rope", "learned", "none", "alibi", "relative", "unknown"]

WHY_NO_EVICTION: dict[Positions, str] = {
    "alibi": "ALiBi biases attention by the distance between slots, so evicting a token shifts all others",
    "relative": "a T5-style relative bias counts slots, so evicting a token shifts all others",
    "unknown": "kvcache cannot tell how this model encodes positions",
}
_ALIBI_MODELS = {"bloom", "mpt"}
_LEARNED_MODELS = {
    "bart", "biogpt", "blenderbot", "blenderbot-small", "codegen2", "ctrl", "gpt2", "gpt_bigcode", "gpt_neo",
    "imagegpt", "marian", "mbart", "mvp", "openai-gpt", "opt", "pegasus", "plbart", "speech_to_text", "trocr",
    "whisper", "xglm", "xlnet",
}  # fmt: skip


@dataclass(frozen=True)
class CacheGeometry:
    """The shape of a model's cache.

    Attributes:
        layers: layers with self-attention.
        kv_heads: key/value heads of each.
        head_dim: size of a key.
        value_dim: size of a value.
        dtype: of keys and values.
        device: of the first layer.
        positions: how the model tells positions; decides what may be evicted. ``"none"``: its keys carry none.
        max_positions: length of a learned position table, which bounds a run whatever is evicted; None for the others.
        shapes: KV heads, key size and value size of each layer, where they are not the same; zeros for a layer that
            caches no keys. The three above are then those of the first layer that does.
    """

    layers: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype = torch.float32
    device: torch.device = _CPU
    positions: Positions = "unknown"
    max_positions: int | None = None
    shapes: tuple[tuple[int, int, int], ...] = ()

    @property
    def layer_token_bytes(self) -> tuple[int, int]:
        """Bytes of one token's key and value, in one row of one layer, where all are alike."""
        head = self.kv_heads * self.dtype.itemsize
        return head * self.head_dim, head * self.value_dim

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in one row, over all layers."""
        return sum(sum(self.of(layer).layer_token_bytes) for layer in range(self.layers))

    def of(self, layer: int) -> "CacheGeometry":
        """The geometry of one layer alone."""
        heads, key, value = self.shapes[layer] if self.shapes else (self.kv_heads, self.head_dim, self.value_dim)
        return replace(self, layers=1, kv_heads=heads, head_dim=key, value_dim=value, shapes=())

    @classmethod
    def from_config(
        cls,
        config: Any,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        latent: bool = False,
    ) -> "CacheGeometry":
        """The geometry of a transformers config's (text) decoder.

        Args:
            config: of the model.
            dtype: of keys and values; by default the config's, else float32.
            device: of the first layer.
            latent: whether a model with latent attention (DeepSeek-V2, V3) caches its latents, as newer releases of
                transformers do, or full heads.

        Raises:
            GeometryError: if the config does not say how many layers and heads there are.
        """
        given = config
        config = config.get_text_config(decoder=True)
        # An encoder-decoder names its decoder's apart. They are read from what was given: in the decoder's config that
        # newer releases derive from it, these names are back at the defaults of their class.
        layers = _first(given, 0, "decoder_layers", "num_decoder_layers") or _first(
            config, 0, "num_hidden_layers", "n_layer", "num_layers", "num_transformer_layers"
        )
        if layers is None:
            raise GeometryError(
                f"{type(given).__name__} does not say how many layers it has; "
                "build CacheGeometry(layers=…, kv_heads=…, head_dim=…, value_dim=…) yourself"
            )
        # Newer releases give each layer a config of its own, and refuse to tell what differs between them.
        each = list(config.per_layer_config) if getattr(config, "is_heterogeneous", False) else [config] * layers
        shapes = tuple(_shape(given, each[i], i, latent) for i in range(layers))
        positions = positions_of(config)
        table = _first(config, 0, "max_target_positions", "n_positions", "max_position_embeddings")
        return cls(
            layers,
            *shapes[0],
            dtype=dtype or getattr(config, "dtype", None) or torch.float32,
            device=torch.device(device),
            positions=positions,
            max_positions=table if positions == "learned" else None,
            shapes=() if len(set(shapes)) == 1 else shapes,
        )

    def check_eviction(self, *, rerotate: bool = False) -> None:
        """Raise `PositionsError` if evicting tokens, or re-rotating what stays, would be silently wrong."""
        if (why := WHY_NO_EVICTION.get(self.positions)) is not None:
            raise PositionsError(
                f"tokens cannot be evicted from this model's cache: {why}; use KeepAll(), with a max_length"
            )
        if rerotate and self.positions not in ("rope", "none"):
            raise PositionsError(
                f"keys cannot be re-rotated: this model's positions are {self.positions}, baked into the keys through "
                "the hidden states; keep positions='absolute'"
            )


def _shape(given: Any, config: Any, layer: int, latent: bool) -> tuple[int, int, int]:
    """KV heads, key size and value size of one layer, whose config this is."""
    heads = _first(given, layer, "decoder_attention_heads") or _first(
        config, layer, "num_attention_heads", "n_head", "num_heads", "num_query_heads"
    )
    width = _first(config, layer, "hidden_size", "n_embd", "d_model", "model_dim")
    if heads is None or width is None:
        raise GeometryError(
            f"{type(given).__name__} does not say its heads and width (got {heads}, {width}); "
            "build CacheGeometry(layers=…, kv_heads=…, head_dim=…, value_dim=…) yourself"
        )
    if (
        nope := _first(config, layer, "qk_nope_head_dim")
    ) is not None:  # multi-head latent attention (arXiv:2405.04434)
        if latent:
            return 1, config.kv_lora_rank, config.qk_rope_head_dim
        return heads, nope + config.qk_rope_head_dim, config.v_head_dim
    head_dim = _first(config, layer, "head_dim", "d_kv") or width // heads
    if _first(given, layer, "decoder_attention_heads") is not None:
        kv_heads = heads  # grouped heads would be the encoder's name for its own
    elif getattr(config, "new_decoder_architecture", False):
        kv_heads = heads  # Falcon repeats its groups before it caches them
    elif getattr(config, "multi_query", False):
        kv_heads = 1
    else:
        kv_heads = _first(config, layer, "num_key_value_heads", "num_kv_heads") or heads
    return kv_heads, head_dim, head_dim


def _first(config: Any, layer: int, *names: str) -> int | None:
    """The first of these attributes that is a positive whole number, or a list of one for each layer."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, list | tuple) and layer < len(value):
            value = value[layer]
        if isinstance(value, int) and value > 0:
            return value
    return None


def positions_of(config: Any) -> Positions:
    if getattr(config, "relative_attention_num_buckets", None) is not None:
        return "relative"
    kind = config.model_type
    if kind in _ALIBI_MODELS or getattr(config, "alibi", False):
        return "alibi"
    if getattr(config, "position_embedding_type", None) == "alibi":
        return "alibi"
    if kind in _LEARNED_MODELS:
        return "learned"
    if any(getattr(config, name, None) for name in ("rope_parameters", "rope_theta", "rope_scaling", "rotary_dim")):
        return "rope"
    return "unknown"
