"""SmolLM2-135M decoded by transformers and by the engine: eager, graphed, compiled, alone and several prompts together.

Each request is a prompt and as many greedy tokens; stopping is made impossible. In fp32 on a CPU all sides must say the same;
in bf16 and int8, where two tokens are nearly as likely, either may come, so the table says how many tokens are alike. Weights
are random. With ``--model smollm2`` they are real, and the prompts come from CPython's documentation. With ``--rows N`` there is
a second table: N prompts of different lengths, one after the other and together, and the time for each token of them all.
"""

import argparse
import copy
import inspect
import sys
import textwrap
from collections.abc import Callable
from functools import partial
from pydoc_data import topics
from typing import Any

import torch
from common import ROOT, arguments, finish, interleaved, paired_ratio, show, spread, trace_graphs
from preparing import Preparing
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

from kvcache import KVCacheManager, SlidingWindow, quantize_linear
from kvcache.decoding import RECORDERS, Job

sys.path.insert(0, str(ROOT / "examples"))

GENERATE = "generate, DynamicCache"
STATIC = "generate, StaticCache"
CONTINUOUS = "transformers' continuous batching"
PAGE = 32  # tokens


def model_of(device: str, quick: bool) -> Any:
    """Random weights, bf16 on a GPU, and a vocabulary without an end."""
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=2 if quick else 30,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192, rope_theta=1e5, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval().to(device, torch.bfloat16 if device == "cuda" else torch.float32)


def real_model() -> tuple[Any, Any]:
    """SmolLM2-135M with real weights, and its tokenizer."""
    from llm_stream import load

    model, tokenizer, _ = load(None)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model, tokenizer


def prompts_of(tokenizer: Any, count: int, tokens: int) -> list[Tensor]:
    """Beginnings of CPython's documentation, each of its own length: half as many tokens to so many."""
    texts = [text for _, text in sorted(topics.topics.items()) if len(text) > 8 * tokens]
    lengths = [tokens // 2 + (tokens - tokens // 2) * i // max(1, count - 1) for i in range(count)]
    return [
        torch.tensor([tokenizer(text).input_ids[:length]]) for text, length in zip(texts[:count], lengths, strict=True)
    ]


def given_of(tokens: int) -> dict[str, Any]:
    return {"max_new_tokens": tokens, "do_sample": False}


def decoded(manager: KVCacheManager, prompt: Tensor, tokens: int, backend: Any) -> Tensor:
    """What our engine says."""
    said = torch.cat(list(manager.stream(prompt, backend=backend, **given_of(tokens))), 1)
    if (why := manager.report().fallback) is not None:
        raise RuntimeError(f"ours, {backend}: {why}")
    return said


def compiled_static(model: Any, prompt: Tensor, tokens: int) -> Callable[[], Tensor]:
    """transformers' static cache under torch's compiler, which `generate` brings in by itself on a GPU alone."""
    copied: Any = copy.copy(model)
    copied.forward = torch.compile(model.forward, dynamic=False)
    mask = torch.ones_like(prompt)

    def run() -> Tensor:
        out = copied.generate(prompt, attention_mask=mask, cache_implementation="static", **given_of(tokens))
        return torch.as_tensor(out[:, prompt.shape[1] :])

    return run


def sides_of(
    model: Any, prompt: Tensor, tokens: int, backends: list[str], narrow: dict[str, Any], window: int | None
) -> dict[str, Callable[[], Tensor]]:
    """New tokens ``[1, n]`` of each side.

    Args:
        narrow: copies of the model that compute in fewer bits, by precision.
        window: of a side that keeps no more; None: there is none.
    """
    mask = torch.ones_like(prompt)

    def generate(**more: Any) -> Tensor:
        out = model.generate(prompt, attention_mask=mask, **given_of(tokens), **more)
        return torch.as_tensor(out[:, prompt.shape[1] :])

    sides = {GENERATE: generate}
    if prompt.device.type == "cpu":  # on a GPU transformers compiles a static cache's forward, for a minute
        sides[STATIC] = lambda: generate(cache_implementation="static")
        if narrow:
            sides[f"{STATIC}, compiled"] = compiled_static(model, prompt, tokens)
    managers = {"": KVCacheManager(model, max_cache_length=prompt.shape[1] + tokens)}
    managers |= {
        f", {precision}": KVCacheManager(one, max_cache_length=prompt.shape[1] + tokens)
        for precision, one in narrow.items()
    }
    for backend in backends:
        for label, manager in managers.items():
            sides[f"ours, {backend}{label}"] = partial(decoded, manager, prompt, tokens, backend)
    if window is not None:
        manager = KVCacheManager(model, SlidingWindow(window))
        sides[f"ours, {backends[-1]}, a window of {window}"] = partial(decoded, manager, prompt, tokens, backends[-1])
    return sides


def together(manager: KVCacheManager, prompts: list[Tensor], tokens: int, backend: Any) -> list[list[int]]:
    """What prompts say in one batch."""
    slots = max(prompt.shape[1] for prompt in prompts) + tokens
    said: dict[Job, list[int]] = {}
    with manager.batch(max_rows=len(prompts), slots=slots, backend=backend) as batch:
        for prompt in prompts:
            said[batch.add(prompt, seed=0, **given_of(tokens))] = []
        while batch.busy:
            for piece in batch.step():
                said[piece.job] += piece.tokens.tolist()
        if (why := batch.report().fallback) is not None:
            raise RuntimeError(f"ours, {backend}: {why}")
    return list(said.values())


def batch_sides_of(
    model: Any, prompts: list[Tensor], tokens: int, backends: list[str], narrow: dict[str, Any]
) -> dict[str, Callable[[], list[list[int]]]]:
    """New tokens of each prompt, by each side: one after the other, and together."""

    def alone() -> list[list[int]]:
        return [
            model.generate(prompt, attention_mask=torch.ones_like(prompt), **given_of(tokens))[
                0, prompt.shape[1] :
            ].tolist()
            for prompt in prompts
        ]

    def padded() -> list[list[int]]:
        longest = max(prompt.shape[1] for prompt in prompts)
        ids = torch.cat([torch.nn.functional.pad(prompt, (longest - prompt.shape[1], 0)) for prompt in prompts])
        mask = torch.stack([(torch.arange(longest) >= longest - prompt.shape[1]).long() for prompt in prompts])
        out: list[list[int]] = model.generate(ids, attention_mask=mask, **given_of(tokens))[:, longest:].tolist()
        return out

    def continuous() -> list[list[int]]:
        room = sum(-(-(prompt.shape[1] + tokens) // PAGE) for prompt in prompts)
        pages = ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=2 * room,
            max_batch_tokens=1024,
            use_cuda_graph=False,
            max_requests_per_batch=len(prompts),
        )
        config = GenerationConfig(eos_token_id=-1, pad_token_id=0, **given_of(tokens))
        out = model.generate_batch(
            [prompt[0].tolist() for prompt in prompts],
            generation_config=config,
            continuous_batching_config=pages,
            warmup=False,
        )
        model.set_attn_implementation("sdpa")  # it leaves a paged one
        return [out[name].generated_tokens for name in sorted(out, key=lambda name: int(name.rsplit("_", 1)[1]))]

    sides: dict[str, Callable[[], list[list[int]]]] = {
        f"{GENERATE}, one after the other": alone,
        f"{GENERATE}, a padded batch": padded,
        CONTINUOUS: continuous,
    }
    for backend in backends:
        for precision, one in {"": model, **narrow}.items():
            label = f"ours, {backend}" + (f", {precision}" if precision else "")
            manager = KVCacheManager(one)

            def apart(manager: KVCacheManager = manager, backend: str = backend) -> list[list[int]]:
                return [decoded(manager, prompt, tokens, backend)[0].tolist() for prompt in prompts]

            sides[f"{label}, one after the other"] = apart
            sides[f"{label}, together"] = partial(together, manager, prompts, tokens, backend)
    return sides


DRAFTED = {"a function copied": {"do_sample": False}, "drawn text": {"do_sample": True, "temperature": 1.0, "top_k": 0}}
LOOKUP = {"prompt_lookup_num_tokens": 7}


def drafted_prompts(tokenizer: Any) -> dict[str, Tensor]:
    """A prompt whose answer is in it, and one whose answer is drawn and says little twice."""
    source = textwrap.dedent(inspect.getsource(textwrap.TextWrapper._split))
    again = f"{source}\n\n# The same function once more:\n{source[:60]}"
    topic = next(text for _, text in sorted(topics.topics.items()) if len(text) > 1000)
    return {
        name: torch.tensor([tokenizer(text).input_ids[-400:]])
        for name, text in zip(DRAFTED, (again, topic[:600]), strict=True)
    }


def draft_sides_of(
    model: Any, prompt: Tensor, tokens: int, backends: list[str], drawing: dict[str, Any]
) -> dict[str, Callable[[], Tensor]]:
    """New tokens ``[1, n]`` without drafts and with, by each side."""
    manager = KVCacheManager(model)

    def generate(**more: Any) -> Tensor:
        torch.manual_seed(0)
        mask = torch.ones_like(prompt)
        out = model.generate(prompt, attention_mask=mask, max_new_tokens=tokens, **drawing, **more)
        return torch.as_tensor(out[:, prompt.shape[1] :])

    def ours(backend: Any, **more: Any) -> Tensor:
        torch.manual_seed(0)
        chunks = manager.stream(prompt, backend=backend, max_new_tokens=tokens, **drawing, **more)
        said = torch.cat(list(chunks), 1)
        if (why := manager.report().fallback) is not None:
            raise RuntimeError(f"ours, {backend}: {why}")
        return said

    sides: dict[str, Callable[[], Tensor]] = {GENERATE: generate}
    if not drawing["do_sample"]:  # drawn, it says something else than without
        sides[f"{GENERATE}, drafts"] = partial(generate, **LOOKUP)
    for backend in backends:
        sides[f"ours, {backend}"] = partial(ours, backend)
        sides[f"ours, {backend}, drafts"] = partial(ours, backend, **LOOKUP)
    return sides


def drafted(
    model: Any, tokenizer: Any, options: argparse.Namespace, exact: Callable[[str], bool]
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows of all texts, and how much sooner our best back end has said each with drafts."""
    rows, gains = [], {}
    for name, prompt in drafted_prompts(tokenizer).items():
        sides = draft_sides_of(model, prompt, options.tokens, options.backends, DRAFTED[name])
        found, seconds = measured(sides, options.tokens, options.rounds, options.device, exact)
        rows += [{"text": name, **row} for row in found]
        gains[name] = max(
            paired_ratio(seconds[f"ours, {backend}"], seconds[f"ours, {backend}, drafts"])
            for backend in options.backends
        )
    return rows, gains


def alike(said: Tensor, expected: Tensor) -> int:
    """How many tokens are the same, up to the first that is not."""
    return int((said == expected).int().cumprod(1).sum())


def measured(
    sides: dict[str, Callable[[], Any]], tokens: int, rounds: int, device: str, exact: Callable[[str], bool]
) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    """A row for each side, and its seconds in each round.

    Args:
        tokens: that a side says.
        exact: whether a side must say what the first one says.
    """
    first = next(iter(sides))
    expected, same, prepared, peak = torch.as_tensor(sides[first]()), {}, {}, {}
    for name, side in sides.items():
        preparing = Preparing()
        same[name] = alike(torch.as_tensor(side()), expected)
        prepared[name] = preparing.notes()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            side()
            peak[name] = torch.cuda.max_memory_allocated() / 2**20
    wrong = {name: count for name, count in same.items() if exact(name) and count < tokens}
    if device == "cpu" and wrong:
        raise SystemExit(f"sides say different tokens in fp32; alike are the first {wrong} of {tokens}")
    seconds = interleaved(sides, rounds, warmup=1)
    rows = []
    for name, values in seconds.items():
        ms = spread([1e3 * value / tokens for value in values])
        rows.append(
            {
                "side": name, "ms/token": ms["median"], "q1": ms["q1"], "q3": ms["q3"], "rounds": ms["n"],
                "tokens/s": 1e3 / ms["median"], "generate / this": paired_ratio(seconds[first], values),
                "alike": same[name], **prepared[name], **({"GPU MiB, peak": peak[name]} if name in peak else {}),
            }
        )  # fmt: skip
    return rows, seconds


def main() -> None:
    parser = arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--model", choices=("random", "smollm2"), default="random", help="smollm2 has real weights (default: random)"
    )
    parser.add_argument("--prompt", type=int, default=100, help="tokens of it (default: 100)")
    parser.add_argument("--tokens", type=int, default=200, help="new tokens of a request (default: 200)")
    parser.add_argument("--rounds", type=int, default=5, help="timed requests of each side (default: 5)")
    parser.add_argument("--backends", nargs="+", help="of ours (default: eager, and graph on a GPU)")
    parser.add_argument("--drafts", action="store_true", help="n-gram lookup as well; real weights")
    parser.add_argument("--rows", type=int, default=0, help="prompts that decode together as well (default: none)")
    options: argparse.Namespace = parser.parse_args()
    trace_graphs(options.quick or options.rehearsal)
    torch.set_num_threads(options.threads)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    options.backends = options.backends or (["eager", "graph"] if options.device in RECORDERS else ["eager"])
    if options.quick:
        options.prompt, options.tokens, options.rounds = 10, 12, 1
        options.rows = min(options.rows, 2)
    narrow: dict[str, Any] = {}
    if options.model == "random":
        model = model_of(options.device, options.quick)
        generator = torch.Generator().manual_seed(0)
        prompts = [
            torch.randint(1, model.config.vocab_size, (1, options.prompt), generator=generator).to(options.device)
            for _ in range(max(1, options.rows))
        ]
    else:
        model, tokenizer = real_model()
        prompts = prompts_of(tokenizer, max(1, options.rows), options.prompt)
        narrow = {"int8": quantize_linear(model, "int8")}
    window = 64 if narrow else None
    sides = sides_of(model, prompts[-1], options.tokens, options.backends, narrow, window)

    def exact(name: str) -> bool:
        return not any(one in name for one in ("int8", "window", "compile"))  # compiled sums are in another order

    rows, _ = measured(sides, options.tokens, options.rounds, options.device, exact)
    best = max(row["generate / this"] for row in rows[1:] if row["side"].startswith("ours"))
    ratios = {"smollm2_best_over_generate" if narrow else "llm_best_over_generate": best}
    more = {"weights": options.model, "prompt": options.prompt, "tokens": options.tokens, "dtype": str(model.dtype)}
    if options.rows > 1:
        batch = batch_sides_of(model, prompts, options.tokens, options.backends, narrow)
        found, seconds = measured(batch, options.rows * options.tokens, options.rounds, options.device, exact)
        labels = [name.removesuffix(", together") for name in seconds if name.endswith(", together")]
        gains = {
            label: paired_ratio(seconds[f"{label}, one after the other"], seconds[f"{label}, together"])
            for label in labels
        }
        ahead = [paired_ratio(seconds[CONTINUOUS], seconds[f"{label}, together"]) for label in labels]
        ratios |= {
            "smollm2_batch8": max(gains.values()),
            "smollm2_batch8_over_generate": max(row["generate / this"] for row in found if "together" in row["side"]),
            "smollm2_batch8_over_continuous": max(ahead),
        }
        more |= {"rows together": options.rows, "batch": found, "together over one after the other": gains}
        show(f"llm_decode, {options.rows} prompts", found)
    if options.drafts and narrow:
        more["drafts"], gains = drafted(model, tokenizer, options, exact)
        ratios |= {"smollm2_ngram_code": gains["a function copied"], "smollm2_ngram_drawn": gains["drawn text"]}
        show("llm_decode, drafts", more["drafts"])
    finish("llm_decode", rows, ratios, options, **more)


if __name__ == "__main__":
    main()
