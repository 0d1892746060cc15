"""Which layers a profile keeps wide: those that it hurts, and no more than needed."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from kvcache import InputError
from kvcache.models import check_precision, find_sensitive_layers, quantize_linear

pytestmark = pytest.mark.one_release

try:
    check_precision("int8", torch.device("cpu"))
except InputError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture(scope="module")
def model():
    """Small, and with one layer that int8 cannot do: a channel of its input is huge and means little."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    made = LlamaForCausalLM(config).eval()
    hurt = made.model.layers[1].mlp
    with torch.no_grad():
        hurt.up_proj.weight[5] *= 3000  # a row of its own scale: nothing is lost here
        hurt.down_proj.weight[:, 5] /= 3000
    return made


@pytest.fixture(scope="module")
def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 50, (2, 40), generator=generator) for _ in range(2)]


@torch.no_grad()
def divergence(model, other, batches) -> float:
    """KL(model || other) in nats per token."""
    total = 0.0
    for batch in batches:
        ours, theirs = (each(batch).logits.log_softmax(-1) for each in (model, other))
        total += float((ours.exp() * (ours - theirs)).sum() / ours.shape[:-1].numel())
    return total / len(batches)


def test_the_layer_that_int8_cannot_do_stays_wide(model, batches):
    plain = divergence(model, quantize_linear(model, "int8"), batches)
    modules_to_not_convert = find_sensitive_layers(model, "int8", batches, bound=plain / 4)
    assert modules_to_not_convert[0] == "model.layers.1.mlp.down_proj"
    assert len(modules_to_not_convert) < 6
    # On other text than it was profiled on. Divergences add up only about, hence the half.
    others = [torch.randint(0, 50, (2, 40), generator=torch.Generator().manual_seed(2))]
    assert (
        divergence(model, quantize_linear(model, "int8", modules_to_not_convert=modules_to_not_convert), others)
        < plain / 2
    )


def test_layers_that_are_computed_together_stay_wide_together(model, batches):
    modules_to_not_convert = find_sensitive_layers(model, "int8", batches, bound=0)
    linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    assert sorted(modules_to_not_convert) == sorted(linear)
    first = modules_to_not_convert.index("model.layers.0.self_attn.q_proj")
    assert [name.rsplit(".", 1)[1] for name in modules_to_not_convert[first : first + 3]] == [
        "q_proj",
        "k_proj",
        "v_proj",
    ]


def test_nothing_stays_wide_where_the_bound_allows_all(model, batches):
    assert find_sensitive_layers(model, "int8", batches, bound=100) == []


def test_other_models_and_inputs():
    torch.manual_seed(0)
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_positions=32, n_embd=16, n_layer=2, n_head=2)).eval()
    embeds = [torch.randn(1, 12, 16)]

    def forward(model, batch):
        return gpt.lm_head(model(inputs_embeds=batch)[0])

    modules_to_not_convert = find_sensitive_layers(gpt.transformer, "int8", embeds, bound=0, forward=forward)
    assert len(modules_to_not_convert) == 8
    assert "h.0.attn.c_attn" in modules_to_not_convert
    quantize_linear(gpt.transformer, "int8", modules_to_not_convert=modules_to_not_convert)  # takes the names


def test_without_samples_there_is_nothing_to_go_by(model):
    with pytest.raises(InputError, match="at least one"):
        find_sensitive_layers(model, "int8", [])
