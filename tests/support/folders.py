"""Folders of tiny models, as the commands are given them."""

from pathlib import Path

from transformers import LlamaConfig


def weightless_llama(folder: Path) -> Path:
    """The config of a tiny Llama, without weights, in this folder."""
    LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=300, architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    return folder
