"""Matrix products with few rows: the same result from oneDNN, and only where it was asked for."""

import threading

import pytest
import torch
from torch import nn

from kvcache.cpu import few_rows


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


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("shape", "suits"),
    [((1, 31), True), ((2, 33), True), ((256,), True), ((1, 4), True), ((1, 3), False), ((1, 300), False)],
)
def test_a_linear_layer_of_few_rows_gives_the_same(shape, suits, bias):
    layer = nn.Linear(96, 160, bias=bias)
    states = torch.randn(*shape, 96)
    plain, before = run(layer, states)
    with few_rows(layer):
        ours, within = run(layer, states)
    after = run(layer, states)[1]
    assert (before, within, after) == (0, int(suits), 0)
    # The same 96 products of size 1, summed in another order.
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=0)


def test_other_dtypes_gradients_and_threads_are_left_alone():
    layer, states = nn.Linear(96, 160), torch.randn(31, 96, requires_grad=True)
    half = nn.Linear(96, 160).bfloat16()
    seen = []
    with few_rows(half):
        seen.append(run(half, states.bfloat16())[1])
    with few_rows(layer):
        with Watch() as watch:
            layer(states).sum().backward()
        seen.append(watch.onednn)
        other = threading.Thread(target=lambda: seen.append(run(layer, states)[1]))
        other.start()
        other.join()
    plain = run(half, states.bfloat16())[1]  # torch itself may run bfloat16 on oneDNN
    assert seen == [plain, 0, 0] and states.grad is not None
