"""Whether a model is still what it was."""

from typing import Any


def signature_of(model: Any) -> tuple[Any, ...]:
    """What decides what a model computes, as a value to compare: its modules, tensors, versions and attention."""
    return (
        tuple((id(m), type(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()),
        tuple((id(p), p._version if not p.is_inference() else 0, p.dtype, p.device) for p in model.parameters()),
        getattr(model.config, "_attn_implementation", None),
    )
