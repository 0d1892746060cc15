"""One decode step of Chatterbox's T3 at a long context: upstream's own loop against ours, step by step in turn.

Each side is a process of its own. Upstream's `T3.inference` runs unchanged, let through one step at a time by the
progress bar that it iterates over. The rows in between change one thing at a time: our loop on transformers'
`DynamicCache`, then our cache. Weights are random: they decide neither shapes nor speed.

A long context of T3's is a short prefill and many speech tokens. So each side prefills a 62-token text, then its cache is
grown to the context by a few made-up tokens at a time. That is how generation fills memory, and it matters: a cache that
is concatenated anew asks the system for fresh pages, or finds them in the heap, depending on what came before.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from common import arguments, finish, known, memory_option, paired_ratio, spread
from processes import Gate, Phase, Processes
from transformers import DynamicCache

from kvcache.cache import CacheSpec
from kvcache.models import new_cache
from kvcache_chatterbox import byte_tokens, load_t3, random_conditionals
from kvcache_chatterbox.prefill import check_text, condition, prefill
from kvcache_chatterbox.speech import Decoder, sampling_of
from kvcache_chatterbox.upstream import upstream_t3

TEXT = "The quick brown fox jumps over the lazy dog, and runs away. "  # 60 letters, 62 tokens with start and stop
GROWTH = 8  # tokens at a time
UPSTREAM = "upstream's loop"
DYNAMIC = "our loop, DynamicCache"
DEFAULT = "our loop, our cache (default)"
STATIC = "our loop, our cache, preallocated"


def setup() -> tuple[Any, Any, torch.Tensor]:
    """The 520M model, a voice and a text in two rows."""
    t3 = load_t3("english")
    # A loop that happens to sample the stop token would end: it is made impossible, on every side alike.
    stop = torch.tensor([t3.hp.stop_speech_token])
    t3.speech_head.register_forward_hook(lambda module, args, logits: logits.index_fill_(-1, stop, -1e4))
    return t3, random_conditionals(t3), check_text(t3, byte_tokens(t3, TEXT), guided=True)


@torch.inference_mode()
def grow(cache: Any, t3: Any, context: int) -> None:
    """Fill the cache up to `context` tokens as decoding would, a few at a time."""
    config = t3.cfg
    while (missing := context - cache.get_seq_length()) > 0:
        new = (2, config.num_key_value_heads, min(GROWTH, missing), config.head_dim)
        for layer in range(config.num_hidden_layers):
            cache.update(torch.randn(new), torch.randn(new), layer)


def upstream(gate: Gate, context: int) -> None:
    t3, voice, rows = setup()
    caches: list[Any] = []  # the loop's own, caught at its first step
    t3.tfmr.register_forward_pre_hook(lambda m, args, given: caches.append(given["past_key_values"]), with_kwargs=True)

    def gated(steps: Iterable[int], **_: Any) -> Iterator[int]:
        for i in steps:
            if i == 2:
                grow(caches[-1], t3, context)
            if i >= 2:
                gate()
            yield i

    upstream_t3().tqdm = gated
    torch.manual_seed(0)
    t3.inference(t3_cond=voice, text_tokens=rows.clone(), max_new_tokens=1000)


def ours(gate: Gate, context: int, kind: str) -> None:
    t3, voice, rows = setup()
    if kind == DYNAMIC:
        cache = DynamicCache(config=t3.cfg)
    else:
        cache = new_cache(t3.tfmr, CacheSpec(max_length=2048, static=kind == STATIC), rows=2)
    generator = torch.Generator().manual_seed(0)
    tokens = Decoder(
        t3, prefill(t3, condition(t3, voice), rows), sampling_of(False, {}), 1000, cache, generator
    ).tokens()
    next(tokens)  # the prefill
    next(tokens)
    grow(cache, t3, context)
    gate()
    for _ in tokens:
        gate()


def main() -> None:
    parser = arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("--context", type=int, default=900, help="tokens in the cache at the first step (default: 900)")
    parser.add_argument("--steps", type=int, default=40, help="timed steps of each side (default: 40)")
    memory_option(parser)
    options = parser.parse_args()
    if options.quick:
        options.context, options.steps = 120, 2
    torch.set_num_threads(options.threads)
    sides: dict[str, tuple[Any, ...]] = {UPSTREAM: (upstream, options.context)}
    sides |= {name: (ours, options.context, name) for name in (DYNAMIC, DEFAULT, STATIC)}
    measured = Processes(sides, options.threads, memory=options.memory).run([Phase(options.steps)])
    rows = []
    for name in sides:
        row: dict[str, Any] = {"side": name, "context": options.context}
        values = [1e3 * value for value in measured.seconds(name)]
        row |= {f"ms/step, {key}" if key != "n" else "steps": value for key, value in spread(values).items()}
        rows.append(row | {"upstream / this": measured.ratio(UPSTREAM, name, paired_ratio)} | measured.mark(name))
    compared = {
        "upstream_over_default": (UPSTREAM, DEFAULT),
        "upstream_over_our_loop_alone": (UPSTREAM, DYNAMIC),
        "dynamic_cache_over_our_cache": (DYNAMIC, DEFAULT),
        "growing_over_preallocated": (DEFAULT, STATIC),
    }
    found = {name: measured.ratio(slow, fast, paired_ratio) for name, (slow, fast) in compared.items()}
    finish("t3_step", rows, known(found), options, measured.failed, **measured.facts())


if __name__ == "__main__":
    main()
