"""Turned keys against the models' own rotary embeddings at the new position."""

import pytest
import torch
from transformers import CohereConfig, LlamaConfig
from transformers.models.cohere import modeling_cohere
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.llama import modeling_llama

from kvcache import KeyRotation, KVLayer, PositionsError, SlidingWindow

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10_000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
    "llama3": LLAMA3,
    "yarn": {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64},
}


def llama(dims: int = 16, **rope) -> modeling_llama.LlamaRotaryEmbedding:
    config = LlamaConfig(hidden_size=4 * dims, num_attention_heads=4, head_dim=dims, max_position_embeddings=256)
    config.rope_parameters = rope or ROPES["default"]
    return modeling_llama.LlamaRotaryEmbedding(config)


def placed(rotary, apply, keys: torch.Tensor, position: int) -> torch.Tensor:
    """`keys` as the model itself would cache them at a position."""
    cos, sin = rotary(keys, torch.tensor([[position]]))
    return apply(keys, keys, cos, sin)[1]


def raw(tokens: int = 5, dims: int = 16, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 3, tokens, dims, generator=torch.Generator().manual_seed(0)).to(dtype)


# An fp32 angle near 200 is off by up to 200 * 2**-24 = 1e-5 in the model; its keys reach 5, so 5e-5, twice.
CLOSE = {"atol": 2e-4, "rtol": 0}


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize(("start", "delta"), [(0, 1), (3, 7), (0, 200), (150, 50), (120, -100)])
def test_turned_is_placed_there(rope, start, delta):
    rotary = llama(**ROPES[rope])
    there = placed(rotary, modeling_llama.apply_rotary_pos_emb, raw(), start + delta)
    here = placed(rotary, modeling_llama.apply_rotary_pos_emb, raw(), start)
    assert not torch.allclose(here, there, atol=0.1)
    torch.testing.assert_close(KeyRotation(rotary.inv_freq)(here, delta), there, **CLOSE)


def test_partial_rotary_turns_the_first_channels_alone():
    rotary = llama(dims=8)  # of 16 channels
    here = placed(rotary, modeling_gpt_neox.apply_rotary_pos_emb, raw()[..., :8], 3)
    there = placed(rotary, modeling_gpt_neox.apply_rotary_pos_emb, raw()[..., :8], 13)
    turned = KeyRotation(rotary.inv_freq)(torch.cat((here, raw()[..., 8:]), -1), 10)
    torch.testing.assert_close(turned[..., :8], there, **CLOSE)
    assert torch.equal(turned[..., 8:], raw()[..., 8:])


def test_interleaved_pairs():
    rotary = modeling_cohere.CohereRotaryEmbedding(CohereConfig(hidden_size=64, num_attention_heads=4))
    here, there = (placed(rotary, modeling_cohere.apply_rotary_pos_emb, raw(), p) for p in (3, 103))
    torch.testing.assert_close(KeyRotation(rotary.inv_freq, interleaved=True)(here, 100), there, **CLOSE)
    assert not torch.allclose(KeyRotation(rotary.inv_freq)(here, 100), there, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_turn_changes_no_bit(dtype):
    keys = raw(dtype=dtype)
    turned = KeyRotation(llama().inv_freq)(keys, 0)
    assert turned.dtype == dtype
    assert torch.equal(turned, keys)


def test_far_turns_are_exact():
    """At position 100,000 an fp32 angle is off by 0.004; ours is of float64."""
    frequencies, delta = llama().inv_freq, 100_000
    keys = raw()
    pairs = torch.complex(keys[..., :8].double(), keys[..., 8:].double()) * torch.exp(1j * frequencies.double() * delta)
    # cos and sin rounded to fp32, then products of keys of up to 4: a few times 4 * 2**-24.
    turned = KeyRotation(frequencies)(keys, delta)
    torch.testing.assert_close(turned, torch.cat((pairs.real, pairs.imag), -1).float(), atol=2e-6, rtol=0)


def test_each_turn_has_its_own_angles():
    rotation, keys = KeyRotation(llama().inv_freq), raw()
    for delta in (3, 4, 3):
        assert torch.equal(rotation(keys, delta), KeyRotation(llama().inv_freq)(keys, delta))


def test_always_turn_from_the_keys_as_they_came():
    """In bf16, 2,000 turns by one position end far from the truth that one turn by 2,000 meets."""
    inv_freq = llama(dims=64).inv_freq
    rotation = KeyRotation(inv_freq)
    keys = raw(dims=64, dtype=torch.bfloat16)
    truth = rotation(keys.float(), 2000)
    step = keys
    for _ in range(2000):
        step = rotation(step, 1)
    assert (step.float() - truth).abs().max() > 1
    # One rounding to bf16 of keys below 8: at most half of 2**-5.
    assert (rotation(keys, 2000).float() - truth).abs().max() <= 2**-6


def test_padded_rows_cannot_be_re_rotated():
    rotation = KeyRotation(llama().inv_freq)
    with pytest.raises(PositionsError, match="rows without padding; run the rows apart, or keep positions='absolute'"):
        KVLayer(SlidingWindow(8, sinks=2), rotation=rotation, padding=torch.tensor([0, 3]))
    KVLayer(SlidingWindow(8, sinks=2), rotation=rotation, padding=torch.tensor([0, 0]))


@pytest.mark.parametrize("interleaved", [False, True])
def test_what_is_ahead_is_the_mean_over_the_positions_that_follow(interleaved):
    rotation = KeyRotation(llama().inv_freq, interleaved)
    queries, distance, following = torch.cat((raw(), raw()[..., :4]), -1), torch.tensor([9, 7, 3, 2, 1]), 6
    found = rotation.ahead(queries, distance, following)
    for i, far in enumerate(distance.tolist()):
        each = torch.stack([rotation(queries[:, :, i : i + 1], far + further) for further in range(following)])
        torch.testing.assert_close(found[:, :, i : i + 1], each.mean(0), **CLOSE)
    assert torch.equal(found[..., 16:], queries[..., 16:])
