"""What a cache for a model looks like: layers, KV heads, head size, dtype, and how the model encodes positions."""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from kvcache.errors import GeometryError, PositionsError

_CPU = torch.device("cpu")

Positions = Literal["rope", "learned", "alibi", "relative", "unknown"]

_WHY_NOT = {
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
        positions: how the model tells positions; decides what may be evicted.
        max_positions: length of a learned position table, which bounds a run whatever is evicted; None for the others.
    """

    layers: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype = torch.float32
    device: torch.device = _CPU
    positions: Positions = "unknown"
    max_positions: int | None = None

    @property
    def layer_token_bytes(self) -> tuple[int, int]:
        """Bytes of one token's key and value, in one row of one layer."""
        head = self.kv_heads * self.dtype.itemsize
        return head * self.head_dim, head * self.value_dim

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in one row, over all layers."""
        return self.layers * sum(self.layer_token_bytes)

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
        heads = _first(given, "decoder_attention_heads") or _first(config, "num_attention_heads", "n_head", "num_heads")
        layers = _first(given, "decoder_layers", "num_decoder_layers") or _first(
            config, "num_hidden_layers", "n_layer", "num_layers"
        )
        width = _first(config, "hidden_size", "n_embd", "d_model")
        if heads is None or layers is None or width is None:
            raise GeometryError(
                f"{type(given).__name__} does not say its layers, heads and width (got {layers}, {heads}, {width}); "
                "build CacheGeometry(layers=…, kv_heads=…, head_dim=…, value_dim=…) yourself"
            )
        head_dim = _first(config, "head_dim", "d_kv") or width // heads
        value_dim = head_dim
        if _first(given, "decoder_attention_heads") is not None:
            kv_heads = heads  # grouped heads would be the encoder's name for its own
        elif getattr(config, "new_decoder_architecture", False):
            kv_heads = heads  # Falcon repeats its groups before it caches them
        elif getattr(config, "multi_query", False):
            kv_heads = 1
        else:
            kv_heads = _first(config, "num_key_value_heads", "num_kv_heads") or heads
        if (nope := _first(config, "qk_nope_head_dim")) is not None:  # multi-head latent attention (arXiv:2405.04434)
            if latent:
                kv_heads, head_dim, value_dim = 1, config.kv_lora_rank, config.qk_rope_head_dim
            else:
                kv_heads, head_dim, value_dim = heads, nope + config.qk_rope_head_dim, config.v_head_dim
        positions = _positions(config)
        table = _first(config, "max_target_positions", "n_positions", "max_position_embeddings")
        return cls(
            layers=layers,
            kv_heads=kv_heads,
            head_dim=head_dim,
            value_dim=value_dim,
            dtype=dtype or getattr(config, "dtype", None) or torch.float32,
            device=torch.device(device),
            positions=positions,
            max_positions=table if positions == "learned" else None,
        )

    @classmethod
    def from_model(cls, model: Any) -> "CacheGeometry":
        """The geometry of a loaded transformers model, in the dtype and on the device of its weights."""
        latent = any(hasattr(module, "expand_kv") for module in model.modules())
        return cls.from_config(model.config, dtype=model.dtype, device=model.device, latent=latent)

    def check_eviction(self, *, rerotate: bool = False) -> None:
        """Raise `PositionsError` if evicting tokens, or re-rotating what stays, would be silently wrong."""
        if (why := _WHY_NOT.get(self.positions)) is not None:
            raise PositionsError(
                f"tokens cannot be evicted from this model's cache: {why}; use KeepAll(), with a max_length"
            )
        if rerotate and self.positions != "rope":
            raise PositionsError(
                f"keys cannot be re-rotated: this model's positions are {self.positions}, baked into the keys through "
                "the hidden states; keep positions='absolute'"
            )


def _first(config: Any, *names: str) -> int | None:
    """The first of these attributes that is a positive whole number."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _positions(config: Any) -> Positions:
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
