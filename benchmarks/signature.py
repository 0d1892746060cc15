"""What it costs to ask, once a request, whether a model has changed, beside one decode step of SmolLM2-135M.

    python benchmarks/signature.py --json benchmarks/results/signature.json

Asked of an unchanged model: its signature, and the signature with a sample of its weights' content, which requests behind a
prefix want. A step is one token of one request on the decode engine, run eagerly, behind 200 tokens. The walk is what the
first question after a change takes. All take turns; the processor's own time is told beside the clock's.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from common import ROOT, arguments, finish, spread
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from kvcache import KVCacheManager
from kvcache.models import watch_of
from kvcache.models._signature import Watch

sys.path.insert(0, str(ROOT / "examples"))
from llm_stream import load

BEHIND = 200  # tokens
BAR = 0.01  # of a decode step


def sides(model: Any) -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""
    manager = KVCacheManager(model)
    watch = watch_of(model)
    prompt = torch.randint(3, 500, (1, BEHIND), generator=torch.Generator().manual_seed(0))
    settings = {"max_new_tokens": 100_000, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    chunks = manager.stream(prompt, backend="eager", chunk_size=1, **settings)
    next(chunks)

    def walk() -> None:
        Watch(model).signature()

    return {
        "decode step": lambda: next(chunks),
        "signature": watch.signature,
        "signature and sample": lambda: (watch.signature(), watch.sample()),
        "walk, after a change": walk,
    }


def main() -> None:
    parser = arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200, help="of all sides (default: 200)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.quick:
        options.rounds = 3
        config = LlamaConfig(vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4)  # fmt: skip
        model: Any = LlamaForCausalLM(config).eval()
    else:
        model = load(None)[0].cpu()
    asked = sides(model)
    clock: dict[str, list[float]] = {name: [] for name in asked}
    worked: dict[str, list[float]] = {name: [] for name in asked}
    for i in tqdm(range(3 + options.rounds), desc="rounds", leave=False):
        for name, ask in asked.items():
            began, work = time.perf_counter(), time.thread_time()
            ask()
            if i >= 3:
                clock[name].append(time.perf_counter() - began)
                worked[name].append(time.thread_time() - work)
    rows = []
    for name in asked:
        told = {f"us, {key}": 1e6 * value for key, value in spread(clock[name]).items() if key != "n"}
        rows.append({"side": name, **told, "us of this thread, median": 1e6 * spread(worked[name])["median"]})
    step = spread(clock["decode step"])["median"]
    ratios = {f"{name} over a step": spread(clock[name])["median"] / step for name in list(asked)[1:]}
    modules = sum(1 for _ in model.modules())
    finish("signature", rows, ratios, options, modules=modules, bar=BAR)


if __name__ == "__main__":
    main()
