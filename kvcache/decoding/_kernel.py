"""Attention of one new token per row to a static buffer of slots, in Triton.

The keys are split among programs and a second small kernel combines what they found (flash-decoding, Dao et al., 2023). How
many tokens a row holds is read on the device: nothing waits for the host, and a CUDA graph captured once serves all lengths.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvcache.errors import GeometryError, InputError

try:
    triton: Any = importlib.import_module("triton")
    tl: Any = importlib.import_module("triton.language")
except ImportError:
    triton = tl = None

_LARGEST_DIM = 256
_MOST_SPLITS = 64
_TILE = 4096  # products that a program holds at a time: 32 registers per thread
_DOT_TILE = 16384  # bytes of keys that a program holds at a time, several times that with buffers, of 64 KiB at least
_DOT_FROM = 8  # heads per KV head from which on tensor cores pay, although they compute 16 at least


def available() -> str | None:
    """None if the kernel can run on this machine, else why not."""
    if triton is None:
        return "triton is not installed; run pip install triton"
    if not (_interpreted() or torch.cuda.is_available()):
        return "there is no CUDA or ROCm device; set TRITON_INTERPRET=1 before the import to try the kernel on a CPU"
    return None


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    stored: Tensor,
    pinned: Tensor,
    scale: float | None = None,
    splits: int | None = None,
) -> Tensor:
    """Attention of each row's current token to the tokens that its slots show, ``[rows, heads, 1, value_dim]``.

    The first `pinned` slots keep the first tokens, the others are a ring, in which token ``t`` has the slot
    ``pinned + (t - pinned) % (slots - pinned)``. What the invisible slots hold is never read.

    Args:
        query: ``[rows, heads, 1, head_dim]``. Its dtype is the output's; sums are in fp32.
        keys: ``[rows, kv_heads, slots, head_dim]``, the current token's among them; each KV head serves
            ``heads / kv_heads`` neighbouring heads.
        values: ``[rows, kv_heads, slots, value_dim]``.
        length: tokens seen by each row, the current one among them, ``[rows]`` int64. A row of length 0 gives zeros.
        stored: how many of them are visible, pinned ones included, ``[rows]`` int64.
        pinned: how many first tokens never leave, fewer than there are slots, ``[rows]`` int64.
        scale: of the scores, by default ``head_dim ** -0.5``.
        splits: among how many programs a row's slots are split, by default enough to fill the device.

    Raises:
        GeometryError: if shapes, dtypes, devices or strides do not fit.
        InputError: if `splits` cannot be, or the kernel cannot run there.
    """
    _check(query, keys, values, length, stored, pinned)
    if splits is not None and not 1 <= splits <= _MOST_SPLITS:
        raise InputError(f"splits={splits} must be 1 to {_MOST_SPLITS}, or None to choose by the device")
    return torch.as_tensor(
        torch.ops.kvcache.decode_attention(query, keys, values, length, stored, pinned, scale, splits)
    )


def _check(query: Tensor, keys: Tensor, values: Tensor, length: Tensor, stored: Tensor, pinned: Tensor) -> None:
    shapes = f"query {list(query.shape)}, keys {list(keys.shape)} and values {list(values.shape)}"
    if query.dim() != 4 or keys.dim() != 4 or values.dim() != 4 or query.shape[2] != 1:
        raise GeometryError(f"{shapes} must be [rows, heads, 1, head_dim] and twice [rows, kv_heads, slots, head_dim]")
    if 0 in query.shape or 0 in keys.shape or 0 in values.shape:
        raise GeometryError(f"{shapes} are empty; give at least one row, head, slot and dimension")
    if query.shape[0] != keys.shape[0] or keys.shape[:3] != values.shape[:3] or query.shape[3] != keys.shape[3]:
        raise GeometryError(f"{shapes} must agree in rows, KV heads, slots and the head_dim of query and keys")
    if query.shape[1] % keys.shape[1]:
        raise GeometryError(f"{query.shape[1]} heads are no multiple of {keys.shape[1]} KV heads; see {shapes}")
    if keys.shape[3] > _LARGEST_DIM or values.shape[3] > _LARGEST_DIM:
        raise GeometryError(
            f"{shapes}: the kernel takes head_dim up to {_LARGEST_DIM}; use scaled_dot_product_attention"
        )
    for dtype in (query.dtype, keys.dtype):
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise GeometryError(
                f"query is {query.dtype}, keys are {keys.dtype}; convert to float32, bfloat16 or float16"
            )
    if keys.dtype != values.dtype:
        raise GeometryError(f"keys are {keys.dtype}, values are {values.dtype}; convert one of them")
    if keys.stride(3) != 1 or values.stride(3) != 1:
        raise GeometryError(
            f"keys have strides {keys.stride()}, values {values.stride()}: a head's elements must be neighbours; call contiguous()"
        )
    for name, counts in (("length", length), ("stored", stored), ("pinned", pinned)):
        if counts.dtype != torch.int64 or counts.shape != query.shape[:1]:
            raise GeometryError(
                f"{name} is {counts.dtype} {list(counts.shape)}; give int64 [{query.shape[0]}], one number per row"
            )
        if counts.stride() != length.stride():
            raise GeometryError(
                f"{name} has stride {counts.stride()}, length {length.stride()}; lay them out alike, as columns of one tensor"
            )
    others = {"keys": keys, "values": values, "length": length, "stored": stored, "pinned": pinned}
    for name, other in others.items():
        if other.device != query.device:
            raise GeometryError(f"query is on {query.device}, {name} on {other.device}; move them to one device")
    if query.device.type not in ("cuda", "cpu"):
        raise InputError(f"the kernel runs on CUDA and ROCm, not on {query.device}; use scaled_dot_product_attention")


def _shape(  # with the kernel's own arguments
    query: Tensor,
    keys: Tensor,  # noqa: ARG001
    values: Tensor,
    length: Tensor,  # noqa: ARG001
    stored: Tensor,  # noqa: ARG001
    pinned: Tensor,  # noqa: ARG001
    scale: float | None,  # noqa: ARG001
    splits: int | None,  # noqa: ARG001
) -> Tensor:
    return query.new_empty((*query.shape[:3], values.shape[3]))


def _launch(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    stored: Tensor,
    pinned: Tensor,
    scale: float | None,
    splits: int | None,
) -> Tensor:
    missing = available()
    if missing is not None:
        raise InputError(f"cannot run the kernel: {missing}")
    if query.device.type == "cpu" and not _interpreted():
        raise InputError("the tensors are on the CPU, where the kernel does not run; use scaled_dot_product_attention")
    rows, heads, _, head_dim = query.shape
    _, kv_heads, slots, value_dim = values.shape
    group = heads // kv_heads
    out = query.new_empty((rows, heads, 1, value_dim))
    dims, value_dims = triton.next_power_of_2(head_dim), triton.next_power_of_2(value_dim)
    padded = triton.next_power_of_2(group)
    dot = padded >= _DOT_FROM and query.dtype == keys.dtype
    if dot:  # tensor cores want 16 of everything
        padded, dims, value_dims = max(16, padded), max(16, dims), max(16, value_dims)
        block = min(128, max(16, _DOT_TILE // query.element_size() // max(dims, value_dims)))
    else:
        block = min(128, max(2, _TILE // padded // max(dims, value_dims)))
    # Products are in the query's dtype. Triton's interpreter multiplies the bits of bf16, not the numbers (triton#11584).
    if query.dtype != keys.dtype or (_interpreted() and query.dtype == torch.bfloat16):
        query = query.float()
    if query.stride(3) != 1:
        query = query.contiguous()
    if splits is None:
        splits = _splits(rows * kv_heads, triton.cdiv(slots, block), query.device)
    partials = torch.empty((rows * heads, splits, value_dim), dtype=torch.float32, device=query.device)
    norms = torch.empty((rows * heads, splits, 2), dtype=torch.float32, device=query.device)
    scale = head_dim**-0.5 if scale is None else scale
    with torch.cuda.device(query.get_device()):
        _attend[(rows * kv_heads, splits)](
            query, keys, values, length, stored, pinned, partials, norms,
            scale * 1.4426950408889634,  # log2(e), as the kernel takes powers of 2
            length.stride(0), slots, kv_heads, group,
            query.stride(0), query.stride(1), *keys.stride()[:3], *values.stride()[:3],
            HEAD_DIM=head_dim, VALUE_DIM=value_dim, DIMS=dims, VALUE_DIMS=value_dims, HEADS=padded, BLOCK=block, DOT=dot,
            num_warps=4, num_stages=2,
        )  # fmt: skip
        _combine[(rows * heads,)](
            partials, norms, out, splits,
            VALUE_DIM=value_dim, VALUE_DIMS=value_dims, SPLITS=triton.next_power_of_2(splits), num_warps=4,
        )  # fmt: skip
    return out


# An operator of its own, as compiled and traced steps shall not look inside.
_torch_library: Any = torch.library  # has no types
_library = _torch_library.Library("kvcache", "FRAGMENT")
_library.define(
    "decode_attention(Tensor query, Tensor keys, Tensor values, Tensor length, Tensor stored, "
    "Tensor pinned, float? scale, SymInt? splits) -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag),
)
_library.impl("decode_attention", _launch, "CUDA")
_library.impl("decode_attention", _launch, "CPU")  # for triton's interpreter, and to say what is missing
_torch_library.register_fake("kvcache::decode_attention", _shape, lib=_library)


def _splits(programs: int, blocks: int, device: torch.device) -> int:
    """Among how many programs to split each of the `programs` there are without, at most one per block of slots."""
    # Several programs per multiprocessor hide each other's waiting for memory. The number 4 is not tuned.
    at_once = 4 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
    return max(1, min(_MOST_SPLITS, blocks, at_once // programs))


# ---------------------------------------------------------------------- on the device


constexpr: Any = None if triton is None else tl.constexpr


def _jit(kernel: Callable[..., None]) -> Any:
    return kernel if triton is None else triton.jit(kernel)


@_jit
def _attend(  # type: ignore[no-untyped-def]
    query, keys, values, length, stored, pinned, partials, norms,
    scale, count_row, slots, kv_heads, group,
    query_row, query_head, key_row, key_head, key_slot, value_row, value_head, value_slot,
    HEAD_DIM: constexpr, VALUE_DIM: constexpr, DIMS: constexpr, VALUE_DIMS: constexpr,
    HEADS: constexpr, BLOCK: constexpr, DOT: constexpr,
):  # fmt: skip
    """One split of one KV head of one row, for all of the KV head's `group` heads.

    Leaves in `norms` the greatest score and the sum of the exponentials, in `partials` the sum of the values weighted by
    them. DIMS, VALUE_DIMS and HEADS are powers of 2 that HEAD_DIM, VALUE_DIM and `group` fit in.
    """
    row = (tl.program_id(0) // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(0) % kv_heads).to(tl.int64)
    split, splits = tl.program_id(1), tl.num_programs(1)

    seen = tl.load(length + row * count_row)
    first = tl.load(pinned + row * count_row).to(tl.int32)
    ring = slots - first
    end = tl.minimum(seen, slots).to(tl.int32)  # from here on nothing was ever written
    newest = (first + tl.maximum(seen - 1 - first, 0) % ring).to(tl.int32)  # the current token's slot in the ring
    turning = (tl.minimum(end, tl.load(stored + row * count_row)) - first).to(
        tl.int32
    )  # how many tokens the ring shows

    head, dim, value_dim = tl.arange(0, HEADS), tl.arange(0, DIMS), tl.arange(0, VALUE_DIMS)
    q = tl.load(
        query + row * query_row + (kv_head * group + head)[:, None] * query_head + dim[None, :],
        mask=(head < group)[:, None] & (dim < HEAD_DIM)[None, :],
        other=0.0,
    )
    # The start is finite, so that a difference of two is no NaN where nothing is visible.
    greatest = tl.full([HEADS], -1e38, tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    weighted = tl.zeros([HEADS, VALUE_DIMS], tl.float32)

    share = tl.cdiv(end, splits * BLOCK) * BLOCK
    for start in range(split * share, tl.minimum((split + 1) * share, end), BLOCK):
        slot = start + tl.arange(0, BLOCK)
        age = tl.where(slot <= newest, newest - slot, newest - slot + ring)  # of the token in this slot of the ring
        visible = (slot < end) & ((slot < first) | (age < turning))
        at = slot.to(tl.int64)[:, None]
        k = tl.load(
            keys + row * key_row + kv_head * key_head + at * key_slot + dim[None, :],
            mask=visible[:, None] & (dim < HEAD_DIM)[None, :],
            other=0.0,
        )
        v = tl.load(
            values + row * value_row + kv_head * value_head + at * value_slot + value_dim[None, :],
            mask=visible[:, None] & (value_dim < VALUE_DIM)[None, :],
            other=0.0,
        )
        if DOT:
            scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")
        else:
            scores = tl.sum(q.to(tl.float32)[:, None, :] * k.to(tl.float32)[None, :, :], 2)
        scores = tl.where(visible[None, :], scores * scale, float("-inf"))
        before = greatest
        greatest = tl.maximum(before, tl.max(scores, 1))
        weights = tl.exp2(scores - greatest[:, None])
        shrink = tl.exp2(before - greatest)
        total = total * shrink + tl.sum(weights, 1)
        if DOT:
            added = tl.dot(weights.to(q.dtype), v.to(q.dtype), input_precision="ieee")
        else:
            added = tl.sum(weights[:, :, None] * v.to(tl.float32)[None, :, :], 1)
        weighted = weighted * shrink[:, None] + added

    part = (tl.program_id(0).to(tl.int64) * group + head) * splits + split
    tl.store(norms + part * 2, greatest, mask=head < group)
    tl.store(norms + part * 2 + 1, total, mask=head < group)
    tl.store(
        partials + part[:, None] * VALUE_DIM + value_dim[None, :],
        weighted,
        mask=(head < group)[:, None] & (value_dim < VALUE_DIM)[None, :],
    )


@_jit
def _combine(  # type: ignore[no-untyped-def]
    partials, norms, out, splits, VALUE_DIM: constexpr, VALUE_DIMS: constexpr, SPLITS: constexpr
):
    """All splits of one head of one row; SPLITS is a power of 2 that `splits` fit in."""
    head = tl.program_id(0).to(tl.int64)
    split, dim = tl.arange(0, SPLITS), tl.arange(0, VALUE_DIMS)
    part = head * splits + split
    greatest = tl.load(norms + part * 2, mask=split < splits, other=-1e38)
    total = tl.load(norms + part * 2 + 1, mask=split < splits, other=0.0)
    weighted = tl.load(
        partials + part[:, None] * VALUE_DIM + dim[None, :],
        mask=(split < splits)[:, None] & (dim < VALUE_DIM)[None, :],
        other=0.0,
    )
    shrink = tl.exp2(greatest - tl.max(greatest, 0))
    norm = tl.sum(total * shrink, 0)
    norm = tl.where(norm == 0, 1.0, norm)  # a row without tokens
    value = tl.sum(weighted * shrink[:, None], 0) / norm
    tl.store(out + head * VALUE_DIM + dim, value.to(out.dtype.element_ty), mask=dim < VALUE_DIM)


def _interpreted() -> bool:
    """Whether TRITON_INTERPRET was set when the kernels were made."""
    return triton is not None and not isinstance(_attend, triton.JITFunction)
