"""A language model of SmolLM2-135M's shape, decoded by transformers and by the engine: eager, graphed, compiled.

Each request is a prompt and as many greedy tokens; stopping is made impossible. In fp32 on a CPU all sides must say the same;
in bf16 a near tie may go either way, so there it is told how many tokens are alike. Weights are random: they decide neither
shapes nor speed.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from common import arguments, finish, interleaved, paired_ratio, spread, trace_graphs
from preparing import Preparing
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from kvcache import KVCacheManager
from kvcache.decoding import RECORDERS

GENERATE = "generate, DynamicCache"
STATIC = "generate, StaticCache"


def model_of(device: str, quick: bool) -> Any:
    """Random weights, bf16 on a GPU, and a vocabulary without an end."""
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=2 if quick else 30,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192, rope_theta=1e5, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval().to(device, torch.bfloat16 if device == "cuda" else torch.float32)


def sides_of(model: Any, prompt: Tensor, tokens: int, backends: list[str]) -> dict[str, Callable[[], Tensor]]:
    """New tokens ``[1, n]`` of each side."""
    given: dict[str, Any] = {"max_new_tokens": tokens, "do_sample": False}
    mask = torch.ones_like(prompt)

    def generate(**more: Any) -> Tensor:
        return torch.as_tensor(model.generate(prompt, attention_mask=mask, **given, **more)[:, prompt.shape[1] :])

    def engine(manager: KVCacheManager, backend: Any) -> Tensor:
        said = torch.cat(list(manager.stream(prompt, backend=backend, **given)), 1)
        if (why := manager.report().fallback) is not None:
            raise RuntimeError(f"ours, {backend}: {why}")
        return said

    sides = {GENERATE: generate}
    if prompt.device.type == "cpu":  # on a GPU transformers compiles a static cache's forward, for a minute
        sides[STATIC] = lambda: generate(cache_implementation="static")
    for backend in backends:
        manager = KVCacheManager(model, max_cache_length=prompt.shape[1] + tokens)
        sides[f"ours, {backend}"] = lambda manager=manager, backend=backend: engine(manager, backend)  # type: ignore[misc]
    return sides


def alike(said: Tensor, expected: Tensor) -> int:
    """How many tokens are the same, up to the first that is not."""
    return int((said == expected).cumprod(1).sum())


def main() -> None:
    parser = arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--prompt", type=int, default=100, help="tokens of it (default: 100)")
    parser.add_argument("--tokens", type=int, default=200, help="new tokens of a request (default: 200)")
    parser.add_argument("--rounds", type=int, default=5, help="timed requests of each side (default: 5)")
    parser.add_argument("--backends", nargs="+", help="of ours (default: eager, and graph on a GPU)")
    options: argparse.Namespace = parser.parse_args()
    trace_graphs(options.quick or options.rehearsal)
    torch.set_num_threads(options.threads)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    options.backends = options.backends or (["eager", "graph"] if options.device in RECORDERS else ["eager"])
    if options.quick:
        options.prompt, options.tokens, options.rounds = 10, 12, 1
    model = model_of(options.device, options.quick)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(1, model.config.vocab_size, (1, options.prompt), generator=generator).to(options.device)
    sides = sides_of(model, prompt, options.tokens, options.backends)
    expected, same, prepared, peak = sides[GENERATE](), {}, {}, {}
    for name, side in sides.items():
        preparing = Preparing()
        same[name] = alike(side(), expected)
        prepared[name] = preparing.notes()
        if options.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            side()
            peak[name] = torch.cuda.max_memory_allocated() / 2**20
    if options.device == "cpu" and min(same.values()) < options.tokens:
        raise SystemExit(f"the sides say different tokens in fp32; alike are the first {same}")
    seconds = interleaved(sides, options.rounds, warmup=1)
    rows = []
    for name, values in seconds.items():
        ms = spread([1e3 * value / options.tokens for value in values])
        rows.append(
            {
                "side": name, "ms/token": ms["median"], "q1": ms["q1"], "q3": ms["q3"], "rounds": ms["n"],
                "tokens/s": 1e3 / ms["median"], "generate / this": paired_ratio(seconds[GENERATE], values),
                "alike": same[name], **prepared[name], "GPU MiB, peak": peak.get(name),
            }
        )  # fmt: skip
    best = max(row["generate / this"] for row in rows[1:])
    more = {"weights": "random", "prompt": options.prompt, "tokens": options.tokens, "dtype": str(model.dtype)}
    finish("llm_decode", rows, {"llm_best_over_generate": best}, options, **more)


if __name__ == "__main__":
    main()
