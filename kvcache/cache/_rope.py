"""Turning rotary keys to new positions (RoFormer, Su et al., arXiv:2104.09864)."""

import torch
from torch import Tensor


class KeyRotation:
    """Turns keys, and queries, that carry rotary embeddings by a number of positions.

    A rotary key at position ``p`` turned by ``delta`` is, but for rounding, the key at ``p + delta``. Always turn from
    the keys as they came: 2,000 turns by one position in bf16 end 3.2 away from the truth, one turn by 2,000 ends 0.007
    away.

    Args:
        inv_freq: the model's inverse frequencies, ``[rotary_dim / 2]``, scaling included.
        interleaved: whether the pairs are neighbours (GPT-J, Cohere) and not halves (Llama, GPT-NeoX).
        first: channels before those that turn (latent attention keeps them at the end).
    """

    def __init__(self, inv_freq: Tensor, interleaved: bool = False, first: int = 0) -> None:
        self.inv_freq = inv_freq.detach().float()
        self.interleaved = interleaved
        self.first = first
        self._turn: tuple[int, torch.device, Tensor, Tensor] | None = None

    def __repr__(self) -> str:
        pairs = "neighbours" if self.interleaved else "halves"
        return f"{type(self).__name__}({self.inv_freq.numel()} frequencies, pairs as {pairs})"

    def __call__(self, keys: Tensor, delta: int) -> Tensor:
        """`keys` ``[batch, heads, tokens, head_dim]`` turned by `delta` positions, in their own dtype."""
        return self._turned(keys, *self._angles(delta, keys.device))

    def ahead(self, queries: Tensor, distance: Tensor, n_future_positions: int) -> Tensor:
        """Queries as they would be further on: turned by their distances, then on average by 0, 1, … `n_future_positions` - 1 more.

        Args:
            queries: ``[batch, heads, tokens, head_dim]``.
            distance: positions, ``[tokens]``.
            n_future_positions: over how many positions the average goes.
        """
        home = _in_double(queries.device)
        frequencies = self.inv_freq.to(home).double()
        ones = torch.ones((), dtype=torch.float64, device=home)
        average = torch.polar(ones, frequencies * torch.arange(n_future_positions, device=home)[:, None]).mean(0)
        turn = torch.polar(ones, frequencies * distance.to(home)[:, None]) * average
        return self._turned(queries, turn.real.float().to(queries.device), turn.imag.float().to(queries.device))

    def _turned(self, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        begin, end = self.first, self.first + 2 * self.inv_freq.numel()
        turning = states[..., begin:end].float()
        if self.interleaved:
            a, b = turning[..., 0::2], turning[..., 1::2]
            turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
        else:
            a, b = turning.chunk(2, -1)
            turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
        return torch.cat((states[..., :begin], turned.to(states.dtype), states[..., end:]), -1)

    def _angles(self, delta: int, device: torch.device) -> tuple[Tensor, Tensor]:
        # One rotation serves every layer of a step, so the last angles are worth keeping.
        if self._turn is None or self._turn[:2] != (delta, device):
            home = _in_double(self.inv_freq.device)
            angle = (
                self.inv_freq.to(home).double() * delta
            )  # in double: at position 100,000 fp32 angles are off by 0.004
            self._turn = (delta, device, angle.cos().float().to(device), angle.sin().float().to(device))
        return self._turn[2], self._turn[3]


def _in_double(device: torch.device) -> torch.device:
    """Where to reckon in float64 for a device: on the CPU for those that have none, as "mps" and some "xpu"."""
    return device if device.type in ("cuda", "meta") else torch.device("cpu")
