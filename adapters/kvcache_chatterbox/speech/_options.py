"""How T3 decodes, as a value."""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from kvcache import InputError, KeepAll, PolicyError, SizePolicy
from kvcache.cache import PositionMode, chosen_by_head
from kvcache.decoding import BUCKET, BackendName, check_bucket
from kvcache.models import Precision, check_kv_dtype
from kvcache_chatterbox.checks import check_count, check_flag
from kvcache_chatterbox.voices import Reuse


@dataclass(frozen=True)
class DecoderOptions:
    """How T3 decodes. By default it says upstream's tokens.

    Attributes:
        policy: which speech tokens stay; None keeps all.
        max_cache_length: the most tokens a request may hold, prefix and speech.
        positions: ``"rerotated"`` moves the prefix along next to the window (Llama variants).
        double_bos: give the Llama variants the start-of-speech token twice, as upstream does.
        reuse: ``"all"`` runs of a request only what is not known of its voice; ``"conditioning"`` does without the
            unconditional text, which guidance needs; ``"none"`` runs everything.
        onednn: let oneDNN multiply in fp32 on a CPU, where it is faster, T3 and the vocoder. See `kvcache.models.onednn_linear`.
        backend: what decodes, see `kvcache.decoding.Decoding`: ``"eager"``, ``"compile"``, ``"graph"`` or
            ``"graph+compile"``; ``"auto"`` is graph on a GPU, eager elsewhere; ``"off"`` is the token loop that looks at
            the host for every token. What cannot be done falls back to that, and the report says why.
        precision: of the backbone: ``"bf16"``, ``"fp16"``, ``"int8"``, see `kvcache.models.quantize_linear`; None: as the model is.
        kv_dtype: of the cache while decoding; None: bf16 where the precision is bf16 or int8 and a CPU reads that faster, which
            is with AMX or ``backend="compile"`` (not in the steps that run eagerly for want of a C++ compiler: give
            ``torch.float32`` there); else the model's.
        tf32: let a GPU round the inputs of fp32 products to TF32 while decoding.
        bucket: slots that a captured graph reads, or a multiple of so many, see `kvcache.decoding.Decoding`.

    Raises:
        InputError: for a value that cannot be. What depends on the model or the device, the engine says.
        PolicyError: for a list of policies, or one that ranks.
    """

    policy: SizePolicy | None = None
    max_cache_length: int = 2048
    positions: PositionMode = "absolute"
    double_bos: bool = True
    reuse: Reuse = "all"
    onednn: bool = True
    backend: BackendName | Literal["auto", "off"] = "auto"
    precision: Precision | None = None
    kv_dtype: torch.dtype | None = None
    tf32: bool = False
    bucket: int = BUCKET

    def __post_init__(self) -> None:
        if self.reuse not in ("all", "conditioning", "none"):
            raise InputError(f"reuse={self.reuse!r} must be 'all', 'conditioning' or 'none'")
        check_count("max_cache_length", self.max_cache_length)
        for name in ("double_bos", "onednn", "tf32"):
            check_flag(name, getattr(self, name))
        check_bucket(self.bucket)
        _check_policy(self.policy)
        check_kv_dtype(self.kv_dtype)

    @property
    def kept(self) -> SizePolicy:
        """Which speech tokens stay, `KeepAll` where no policy is given."""
        return KeepAll() if self.policy is None else self.policy


def _check_policy(policy: Any) -> None:
    """Refuse what the engine cannot follow in every layer and step alike.

    Raises:
        PolicyError: for a list of policies, or one that ranks.
    """
    if policy is not None and not isinstance(policy, SizePolicy):
        raise PolicyError(
            f"policy={policy!r}: the engine keeps the same tokens in all layers; give one SizePolicy, such as "
            "SlidingWindow(500)"
        )
    if policy is not None and chosen_by_head(policy):
        raise PolicyError(
            f"{policy!r} chooses tokens by head, which the engine does not; use a policy by age, such as "
            "SlidingWindow(500) or MaxTokens(500)"
        )
