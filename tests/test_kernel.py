"""The Triton kernel against dense attention in fp64, on a GPU or, where there is none, in Triton's interpreter.

Which slots count is found by filling the buffer token by token. All other slots hold NaN, in keys and in values.
"""

import os
import subprocess
import sys
from collections import Counter
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.inside.decoding import KERNEL_DOT_TILE, KERNEL_INTERPRETED, KERNEL_TILE, kernel
from support.searching import search

# Is read when triton is imported, which torch._dynamo does.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx

from kvcache import GeometryError, InputError
from kvcache.decoding import decode_attention

pytest.importorskip("triton", reason="triton is not installed")
# Triton 3.9 announces a default of 3.10 when it first compiles; fused or not, the bounds below hold.
pytestmark = [
    pytest.mark.one_release,
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA or ROCm device")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def shown(length: int, stored: int, slots: int, pinned: int) -> list[int]:
    """The slots that show a token after `length` tokens, each put into a free slot or else the oldest's."""
    holds: dict[int, int] = {}
    for token in range(length):
        slot = len(holds) if len(holds) < slots else min(range(pinned, slots), key=holds.__getitem__)
        holds[slot] = token
    return [slot for slot, token in holds.items() if token < pinned or token >= length - (stored - pinned)]


def dense(query, keys, values, visible: list[list[int]], scale: float | None = None) -> torch.Tensor:
    """Attention in fp64 to the visible slots of each row."""
    group = query.shape[1] // keys.shape[1]
    rows = []
    for row, slots in enumerate(visible):
        k, v = (x[row, :, slots].double().repeat_interleave(group, 0) for x in (keys, values))
        scores = query[row].double() @ k.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
        rows.append(scores.softmax(-1) @ v)
    return torch.stack(rows)


def bound(out: torch.dtype, held: torch.dtype) -> float:
    """How far the kernel may be off. Values are below 5 in size, and half an eps is what rounding to a dtype costs.

    fp32: some dozens of sums of numbers near 1 with 6e-8 each. Otherwise the result is rounded to the query's dtype, and
    the weights to that of the values, where tensor cores multiply them.
    """
    return 2e-6 + sum(2.5 * torch.finfo(dtype).eps for dtype in (out, held) if dtype != F32)


def assert_close(ours: torch.Tensor, truth: torch.Tensor, held: torch.dtype) -> None:
    torch.testing.assert_close(ours.double(), truth, atol=bound(ours.dtype, held), rtol=0)


class Problem:
    """Random tensors of one geometry, with NaN in all that no row shows."""

    def __init__(
        self, lengths, stored=None, *, kv_heads=2, group=1, head_dim=8, value_dim=None, slots=12, pinned=2,
        dtypes=(F32, F32), strided=False, seed=0,
    ):  # fmt: skip
        self.pinned, self.slots, self.held = pinned, slots, dtypes[1]
        random = torch.Generator().manual_seed(seed)
        rows, value_dim = len(lengths), head_dim if value_dim is None else value_dim
        self.query = torch.randn(rows, 1, kv_heads * group, head_dim, generator=random).transpose(1, 2)
        if not strided:
            self.query = self.query.contiguous()
        self.query = self.query.to(DEVICE, dtypes[0])
        self.full = [
            torch.randn(rows, kv_heads, slots, dim, generator=random).clamp(-5, 5).to(DEVICE, self.held)
            for dim in (head_dim, value_dim)
        ]
        self.keys, self.values = (self._buffer(full, strided) for full in self.full)
        self.counts = torch.full((rows, 3), pinned, dtype=torch.int64, device=DEVICE)  # length, stored, pinned
        self.set(lengths, stored)

    @staticmethod
    def _buffer(full: torch.Tensor, strided: bool) -> torch.Tensor:
        rows, heads, slots, dim = full.shape
        if not strided:
            return torch.empty_like(full)
        # [slots, rows, heads, dim] inside of a larger one, NaN all around
        outer = torch.full((slots + 2, rows + 1, heads + 1, dim + 3), torch.nan, dtype=full.dtype, device=DEVICE)
        return outer[1:-1, :-1, 1:, 2:-1].permute(1, 2, 0, 3)

    def set(self, lengths, stored=None) -> None:
        """Other lengths, in the same memory."""
        stored = [min(length, self.slots) for length in lengths] if stored is None else stored
        self.visible = [shown(*counts, self.slots, self.pinned) for counts in zip(lengths, stored, strict=True)]
        self.counts[:, :2] = torch.tensor([lengths, stored]).T
        for buffer, full in zip((self.keys, self.values), self.full, strict=True):
            buffer.fill_(torch.nan)
            for row, slots in enumerate(self.visible):
                buffer[row, :, slots] = full[row, :, slots]

    @property
    def tensors(self):
        return self.query, self.keys, self.values, *self.counts.unbind(1)

    def truth(self, scale=None) -> torch.Tensor:
        return dense(self.query, self.keys, self.values, self.visible, scale)

    def check(self, ours: torch.Tensor, scale=None) -> None:
        assert ours.dtype == self.query.dtype
        assert_close(ours, self.truth(scale), self.held)


@st.composite
def problems(draw):
    slots = draw(st.integers(1, 40))
    pinned = draw(st.integers(0, min(slots - 1, 5)))
    lengths = draw(st.lists(st.integers(1, 3 * slots + 2), min_size=1, max_size=3))
    # A window may show fewer tokens than the ring holds, the current one always.
    stored = [min(n, slots) if n <= pinned else draw(st.integers(pinned + 1, min(n, slots))) for n in lengths]
    return Problem(
        lengths,
        stored,
        kv_heads=draw(st.integers(1, 2)),
        group=draw(st.sampled_from([1, 2, 3, 4, 5, 8, 18])),
        head_dim=draw(st.sampled_from([1, 5, 16, 20, 80, 96])),
        value_dim=draw(st.sampled_from([1, 12, 16, 40, 80])),
        slots=slots,
        pinned=pinned,
        dtypes=draw(st.tuples(*[st.sampled_from([F32, BF16, F16])] * 2)),
        strided=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )


@search(20)
@given(problems(), st.sampled_from([None, 1, 2, 3, 7, 64]), st.sampled_from([None, 0.05]), st.sampled_from([64, 4096]))
def test_as_dense_attention_to_the_visible_slots(problem, splits, scale, tile):
    # A small tile makes several blocks of a few slots.
    with mock.patch(KERNEL_TILE, tile), mock.patch(KERNEL_DOT_TILE, tile):
        ours = decode_attention(*problem.tensors, scale, splits)
    problem.check(ours, scale)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("group", [1, 16])
def test_the_largest_heads(dtype, group):
    problem = Problem([3, 400], kv_heads=1, group=group, head_dim=256, slots=150, dtypes=(dtype, dtype))
    problem.check(decode_attention(*problem.tensors))


@pytest.mark.parametrize("splits", [1, 5])
def test_every_length_of_a_row(splits):
    problem = Problem([1, 1], slots=7, pinned=3, kv_heads=1)
    for length in range(1, 24):
        problem.set([length, 24 - length])
        problem.check(decode_attention(*problem.tensors, splits=splits))


def test_a_row_without_tokens_gives_zeros():
    problem = Problem([1, 5])
    problem.counts[0] = 0
    ours = decode_attention(*problem.tensors, splits=2)
    assert not ours[0].any()
    assert_close(ours[1], problem.truth()[1], F32)


@pytest.mark.parametrize("size", [1e3, -1e3])
def test_scores_far_from_zero(size):
    problem = Problem([9, 30], kv_heads=1, slots=20)
    problem.full[0] = torch.rand_like(problem.full[0])
    problem.query.fill_(size)
    problem.set([9, 30])
    # The scores are near 1e3 * 8 * 0.5 / sqrt(8): fp32 keeps them to some 1e-3, and so the weights.
    ours = decode_attention(*problem.tensors, splits=3)
    torch.testing.assert_close(ours.double(), problem.truth(), atol=1e-2, rtol=0)


def test_a_broken_visible_key_is_not_hidden():
    problem = Problem([9], kv_heads=1)
    problem.keys[0, 0, 4] = torch.nan
    assert decode_attention(*problem.tensors, splits=3).isnan().all()


@pytest.mark.skipif(DEVICE != "cpu", reason="watches Triton's interpreter")
@pytest.mark.parametrize(("length", "stored"), [(3, 3), (40, 40), (77, 64), (200, 50), (10_000, 64)])
def test_reads_what_is_visible_and_no_more(length, stored):
    from triton.runtime.interpreter import interpreter_builder

    problem = Problem([length], [stored], slots=64, pinned=4, head_dim=6, value_dim=10, kv_heads=1)
    read: Counter[int] = Counter()
    blocks = 0
    load = interpreter_builder.create_masked_load

    def watched(pointers, mask, *rest):
        nonlocal blocks
        for buffer in (problem.keys, problem.values):
            place = (pointers.data.astype("int64") - buffer.data_ptr()) // 4
            # Of a skipped load only its first element tells whose it was; the buffers have one block of memory each.
            if 0 <= place.flat[0] < buffer.numel():
                blocks += 1
                read.update((buffer.data_ptr() + 4 * place[mask.data]).tolist())
        return load(pointers, mask, *rest)

    with mock.patch.object(interpreter_builder, "create_masked_load", watched), mock.patch(KERNEL_TILE, 64):
        decode_attention(*problem.tensors, splits=4)
    wanted = [
        buffer[0, 0, slot, dim].data_ptr()
        for buffer in (problem.keys, problem.values)
        for slot in problem.visible[0]
        for dim in range(buffer.shape[-1])
    ]
    assert read == Counter(wanted)  # each once
    assert blocks == 2 * -(-min(length, 64) // 4)  # 64 products are 4 slots of 16 dimensions


# ---------------------------------------------------------------------- traced, compiled, captured


def step(query, keys, values, length, stored, pinned):
    return decode_attention(query * 2, keys, values, length, stored, pinned) + 1


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_traced_is_one_node_for_all_lengths(mode):
    problem = Problem([3, 30], strided=True, group=3)
    traced = make_fx(step, tracing_mode=mode)(*problem.tensors)
    called = [node.target for node in traced.graph.nodes if "kvcache" in str(node.target)]
    assert called == [torch.ops.kvcache.decode_attention.default]
    for lengths in ([3, 30], [17, 1], [12, 13]):
        problem.set(lengths)
        problem.check((traced(*problem.tensors) - 1), 2 * problem.query.shape[-1] ** -0.5)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_is_one_graph_for_all_lengths(backend):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    problem = Problem([3, 30], group=2)
    for lengths in ([3, 30], [17, 1], [12, 13]):
        problem.set(lengths)
        problem.check(compiled(*problem.tensors) - 1, 2 * problem.query.shape[-1] ** -0.5)
    assert counter.frame_count == 1


def test_the_operator_is_what_it_declares():
    problem = Problem([3, 30], strided=True, group=3, value_dim=5, dtypes=(F16, F32))
    torch.library.opcheck(
        torch.ops.kvcache.decode_attention.default,
        (*problem.tensors, None, 3),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@needs_gpu
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("group", [1, 3, 8])
def test_captured_in_a_cuda_graph(dtype, group):
    problem = Problem([3, 300, 1], group=group, head_dim=80, slots=1000, pinned=4, dtypes=(dtype, dtype))

    def run() -> torch.Tensor:
        return decode_attention(*problem.tensors)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for lengths in ([3, 300, 1], [1, 2, 999], [1000, 1001, 5], [5000, 1, 2345]):
        problem.set(lengths)
        graph.replay()
        problem.check(out)


# ---------------------------------------------------------------------- misuse


def some(**other):
    given = {
        "query": torch.zeros(2, 4, 1, 8), "keys": torch.zeros(2, 2, 6, 8), "values": torch.zeros(2, 2, 6, 8),
        **{name: torch.ones(2, dtype=torch.int64) for name in ("length", "stored", "pinned")},
    }  # fmt: skip
    given = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in given.items()}
    return given | other


WRONG = {
    "two tokens": ({"query": torch.zeros(2, 4, 2, 8)}, r"query \[2, 4, 2, 8\].* must be \[rows, heads, 1, head_dim\]"),
    "three dimensions": ({"keys": torch.zeros(2, 6, 8)}, r"keys \[2, 6, 8\].* must be"),
    "no slots": ({"keys": torch.zeros(2, 2, 0, 8), "values": torch.zeros(2, 2, 0, 8)}, "are empty; give at least one"),
    "rows": ({"query": torch.zeros(3, 4, 1, 8)}, "must agree in rows"),
    "slots": ({"values": torch.zeros(2, 2, 5, 8)}, "must agree in rows, KV heads, slots"),
    "head_dim": ({"query": torch.zeros(2, 4, 1, 9)}, "must agree in .* the head_dim"),
    "heads": ({"query": torch.zeros(2, 5, 1, 8)}, "5 heads are no multiple of 2 KV heads"),
    "large": ({"values": torch.zeros(2, 2, 6, 257)}, "head_dim up to 256; use scaled_dot_product_attention"),
    "query's dtype": ({"query": torch.zeros(2, 4, 1, 8, dtype=torch.float64)}, "query is torch.float64"),
    "two dtypes": ({"values": torch.zeros(2, 2, 6, 8, dtype=F16)}, "keys are torch.float32, values are torch.float16"),
    "strides": ({"keys": torch.zeros(2, 2, 8, 6).mT}, "must be neighbours; call contiguous"),
    "int32": ({"length": torch.ones(2, dtype=torch.int32)}, r"length is torch.int32 \[2\]; give int64 \[2\]"),
    "counts laid out apart": ({"pinned": torch.ones(2, 3, dtype=torch.int64)[:, 0]}, "lay them out alike"),
    "one length": ({"stored": torch.ones(1, dtype=torch.int64)}, r"stored is torch.int64 \[1\]; give int64 \[2\]"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_fit_is_refused(wrong):
    other, message = WRONG[wrong]
    with pytest.raises(GeometryError, match=message):
        decode_attention(**some(**{name: x.to(DEVICE) for name, x in other.items()}))


def test_other_devices_are_refused():
    with pytest.raises(GeometryError, match=f"query is on {DEVICE}.*, length on meta; move them to one device"):
        decode_attention(**some(length=torch.ones(2, dtype=torch.int64, device="meta")))
    with pytest.raises(InputError, match="runs on CUDA and ROCm, not on meta"):
        decode_attention(**{name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in some().items()})


@pytest.mark.parametrize("splits", [0, 65])
def test_splits_have_bounds(splits):
    with pytest.raises(InputError, match=f"splits={splits} must be 1 to 64, or None"):
        decode_attention(**some(), splits=splits)


def test_a_cpu_needs_the_interpreter(monkeypatch):
    assert kernel.available() is None
    monkeypatch.setattr(KERNEL_INTERPRETED, lambda: False)
    cpu = {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in some().items()}
    with pytest.raises(InputError, match=r"set TRITON_INTERPRET=1|the tensors are on the CPU"):
        decode_attention(**cpu)


@pytest.mark.slow  # a process of its own that imports all
def test_without_triton_it_says_so():
    script = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch
from kvcache import InputError
from kvcache.decoding import decode_attention, kernel_reason
print(kernel_reason(torch.device("cuda")))
counts = torch.ones(1, dtype=torch.int64)
try:
    decode_attention(*torch.zeros(3, 1, 1, 1, 8), counts, counts, counts)
except InputError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    reason = "triton is not installed; run pip install triton"
    assert done.stdout.splitlines() == [reason, f"cannot run the kernel: {reason}"]
