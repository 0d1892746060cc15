"""fp32 products: the same result from oneDNN, only where it was asked for, and where it is the faster one."""

import platform
import threading
from pathlib import Path

import pytest
import torch
from support.inside.models import ALL_ROWS, FEW_ROWS, ONEDNN_ROWS
from torch import nn
from transformers.pytorch_utils import Conv1D

from kvcache.models import onednn_linear, onednn_rows


class Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts what runs on oneDNN."""

    def __init__(self):
        super().__init__()
        self.onednn = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.onednn += "mkldnn" in str(func)
        return func(*args, **(kwargs or {}))


def run(layer, states):
    with torch.no_grad(), Watch() as watch:
        return layer(states), watch.onednn


@pytest.fixture
def intel(monkeypatch):
    monkeypatch.setattr(ONEDNN_ROWS, lambda: FEW_ROWS)


@pytest.fixture
def other(monkeypatch):
    monkeypatch.setattr(ONEDNN_ROWS, lambda: ALL_ROWS)


def check(layer, shape, suits):
    states = torch.randn(*shape, 96)
    plain, before = run(layer, states)
    with onednn_linear(layer):
        ours, within = run(layer, states)
    after = run(layer, states)[1]
    assert (before, within, after) == (0, int(suits), 0)
    # The same 96 products of size 1, summed in another order.
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("shape", "suits"),
    [((1, 31), True), ((2, 33), True), ((256,), True), ((1, 4), True), ((1, 3), False), ((1, 300), False)],
)
def test_a_linear_layer_of_few_rows_gives_the_same(shape, suits, bias, intel):
    check(nn.Linear(96, 160, bias=bias), shape, suits)
    check(Conv1D(160, 96), shape, False)


@pytest.mark.parametrize("shape", [(1, 1), (2,), (1, 31), (3, 300)])
def test_on_other_processors_all_products_give_the_same(shape, other):
    check(nn.Linear(96, 160), shape, True)
    check(Conv1D(160, 96), shape, True)


def test_who_made_the_processor_decides(monkeypatch):
    mkl = torch.backends.mkl.is_available()
    cases = [
        ("x86_64", "vendor_id : GenuineIntel", 4), ("x86_64", "vendor_id : AuthenticAMD", 1 if mkl else 4),
        ("AMD64", "nothing that is known", 4), ("aarch64", "CPU implementer : 0x41", 4),
    ]  # fmt: skip
    for machine, said, least in cases:
        monkeypatch.setattr(platform, "machine", lambda machine=machine: machine)
        monkeypatch.setattr(Path, "read_text", lambda path, said=said: said)
        assert onednn_rows.__wrapped__().start == least, machine


def test_where_no_product_would_be_another_nothing_is_looked_at(intel):
    layer = nn.Linear(96, 160)
    assert type(onednn_linear(layer, 2)) is not type(onednn_linear(layer, 5))


def test_other_dtypes_gradients_and_threads_are_left_alone():
    layer, states = nn.Linear(96, 160), torch.randn(31, 96, requires_grad=True)
    half = nn.Linear(96, 160).bfloat16()
    seen = []
    with onednn_linear(half):
        seen.append(run(half, states.bfloat16())[1])
    with onednn_linear(layer):
        with Watch() as watch:
            layer(states).sum().backward()
        seen.append(watch.onednn)
        other = threading.Thread(target=lambda: seen.append(run(layer, states)[1]))
        other.start()
        other.join()
    plain = run(half, states.bfloat16())[1]  # torch itself may run bfloat16 on oneDNN
    assert seen == [plain, 0, 0] and states.grad is not None
