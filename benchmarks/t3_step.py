"""One decode step of Chatterbox's T3 at a long context: upstream's own loop against ours, step by step in turn.

Upstream's `T3.inference` runs unchanged, in a thread that is let through one step at a time by the progress bar it
iterates over. The rows in between change one thing at a time: our loop on transformers' `DynamicCache`, then our cache.
Weights are random: they decide neither shapes nor speed.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from common import arguments, finish, interleaved, paired_ratio, spread
from transformers import DynamicCache

from kvcache.hf import new_cache
from kvcache_chatterbox import Sampling, byte_tokens, load_t3, random_conditionals
from kvcache_chatterbox.decoding import Decoder
from kvcache_chatterbox.loading import upstream_t3
from kvcache_chatterbox.requests import check_text, prefill

CONDITIONING = 34
BOS = 2


class Stepped:
    """Upstream's loop, run one step at a call."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self._go = threading.Semaphore(0)
        self._ready = threading.Semaphore(0)
        upstream_t3().tqdm = self._gate
        threading.Thread(target=run, daemon=True).start()
        self._ready.acquire()  # the prefill is done

    def _gate(self, steps: Iterable[int], **_: Any) -> Iterator[int]:
        for i in steps:
            self._ready.release()
            self._go.acquire()
            yield i

    def __call__(self) -> None:
        self._go.release()
        self._ready.acquire()


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=900, help="tokens in the cache at the first step (default: 900)")
    parser.add_argument("--steps", type=int, default=40, help="timed steps of each side (default: 40)")
    options = parser.parse_args()
    if options.quick:
        options.context, options.steps = 80, 3
    torch.set_num_threads(options.threads)
    t3 = load_t3("english")
    voice = random_conditionals(t3)
    words = "the quick brown fox jumps over the lazy dog, " * (options.context // 45 + 1)
    text = byte_tokens(t3, words[: options.context - CONDITIONING - BOS - 2])
    sampling = Sampling.of(False, {})
    rows = check_text(t3, text, guided=True)
    most = options.steps + 10

    def ours(cache: Any) -> Callable[[], Any]:
        generator = torch.Generator().manual_seed(0)
        tokens = Decoder(t3, prefill(t3, voice, rows), sampling, most, cache, generator).tokens()
        next(tokens)  # the prefill
        return lambda: next(tokens)

    def upstream() -> None:
        torch.manual_seed(0)
        t3.inference(t3_cond=voice, text_tokens=rows.clone(), max_new_tokens=most)

    # A step of upstream's that ends by sampling the stop token would end its loop: it is made impossible.
    stop = t3.hp.stop_speech_token
    t3.speech_head.register_forward_hook(
        lambda module, args, logits: logits.index_fill_(-1, torch.tensor([stop]), -1e4)
    )
    sides = {
        "upstream's loop": Stepped(upstream),
        "our loop, DynamicCache": ours(DynamicCache(config=t3.cfg)),
        "our loop, our cache (default)": ours(new_cache(t3.tfmr, max_length=2048, rows=2)),
        "our loop, our cache, preallocated": ours(new_cache(t3.tfmr, max_length=2048, rows=2, preallocate=True)),
    }
    seconds = interleaved(sides, options.steps)
    base = seconds["upstream's loop"]
    rows_out = []
    for name, values in seconds.items():
        s = spread([1e3 * v for v in values])
        rows_out.append(
            {
                "side": name,
                "context": options.context,
                "ms/step": s["median"],
                "q1": s["q1"],
                "q3": s["q3"],
                "steps": s["n"],
                "upstream / this": paired_ratio(base, values),
            }
        )
    dynamic, ours_default = seconds["our loop, DynamicCache"], seconds["our loop, our cache (default)"]
    ratios = {
        "upstream_over_default": paired_ratio(base, ours_default),
        "upstream_over_our_loop_alone": paired_ratio(base, dynamic),
        "dynamic_cache_over_our_cache": paired_ratio(dynamic, ours_default),
    }
    finish("t3_step", rows_out, ratios, options)


if __name__ == "__main__":
    main()
