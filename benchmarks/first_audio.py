"""First audio and real-time factor from text to sound: T3 and S3Gen together, upstream's way beside ours.

Upstream speaks a whole text, then makes audio of all of it; our engine streams chunks of a second. Each side says as many
speech tokens: stopping is made impossible. Watermarks are left out on all sides. "S3Gen graphed" is our engine over an S3Gen
whose recordings are this benchmark's own (see `s3gen.py`), made before its first request; the library has none yet.

Weights are random: they decide neither shapes nor speed, and what is heard is no speech.
"""
# Not by `make bench`: it needs what upstream's S3Gen imports.

import argparse
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from common import arguments, finish, keep, spread, synchronize
from preparing import Preparing
from s3gen import GRAPHED, Ways, load
from t3_decode import SIDES, TEXT, UPSTREAM, Case, Model, make, run_upstream
from torch import Tensor

from kvcache_chatterbox import ChatterboxEngine
from kvcache_chatterbox.testing import stand_in
from kvcache_chatterbox.units import SAMPLE_RATE, SAMPLES_PER_TOKEN, SPEECH_TOKENS
from kvcache_chatterbox.upstream import upstream_t3

Side = Callable[[], Iterator[Tensor]]


def speech_alone(t3: Any) -> None:
    """Let a model with a bias in its head say nothing but speech tokens, so that each is heard."""
    with torch.no_grad():
        t3.speech_head.bias[SPEECH_TOKENS:] = -1e4


def upstreams(model: Model, ways: Ways, tokens: int) -> Iterator[Tensor]:
    """All at once, at the end."""
    said = run_upstream(model, tokens)
    model.t3.__dict__["_modules"].pop("patched_model", None)  # upstream registers its backbone a second time
    yield ways.s3gen.inference(said[said < SPEECH_TOKENS], ref_dict=dict(ways.voice))[0].cpu()


def ours(
    engine: ChatterboxEngine, ways: Ways, tokens: int, chunk: int, way: str | None = None, overlap: bool | None = None
) -> Iterator[Tensor]:
    """Chunk by chunk, with S3Gen in one of its ways."""
    with nullcontext() if way is None else ways.like(way):
        yield from engine.generate_stream(
            TEXT, max_new_tokens=tokens, chunking=[chunk], watermark=False, seed=0, overlap=overlap
        )


def sides_of(model: Model, ways: Ways, options: argparse.Namespace) -> dict[str, Side]:
    """Each side by name; all on one T3 and one S3Gen."""
    tts = stand_in(model.t3)
    tts.s3gen = ways.s3gen
    assert tts.conds is not None
    tts.conds.gen = ways.voice
    tokens, chunk = options.tokens, options.chunk
    plain = ChatterboxEngine(tts, backend=options.backend)
    narrow = ChatterboxEngine(tts, backend=options.backend, precision="bf16")
    # Recorded beforehand, while nothing decodes: a recording takes hold of the generator that other threads draw from.
    for _ in ours(narrow, ways, tokens, chunk, GRAPHED, overlap=False):
        pass
    return {
        "upstream": lambda: upstreams(model, ways, tokens),
        f"ours, {options.backend}": lambda: ours(plain, ways, tokens, chunk),
        f"ours, {options.backend}, bf16": lambda: ours(narrow, ways, tokens, chunk),
        f"ours, {options.backend}, bf16, S3Gen graphed": lambda: ours(narrow, ways, tokens, chunk, GRAPHED),
    }


def heard(side: Side, tokens: int) -> tuple[float, float]:
    """Seconds to the first audio and to the last."""
    synchronize()
    start, first, samples = time.perf_counter(), 0.0, 0
    for audio in side():  # on the host by then
        first = first or time.perf_counter() - start
        samples += audio.shape[-1]
    synchronize()
    total = time.perf_counter() - start
    expected = tokens * SAMPLES_PER_TOKEN
    # Turbo's variants put three tokens of silence behind a text.
    if samples not in (expected, expected + 3 * SAMPLES_PER_TOKEN):
        raise RuntimeError(f"{samples} samples were heard of {tokens} tokens, not {expected}")
    return first, total


def rows_of(variant: str, sides: dict[str, Side], options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each side: the first request, which compiles and captures, and the median of the later ones."""
    cold, prepared, peak = {}, {}, {}
    preparing = Preparing()
    for name, side in sides.items():
        before = preparing.captured
        cold[name] = heard(side, options.tokens)[0]
        prepared[name] = preparing.captured - before
        if options.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            heard(side, options.tokens)
            peak[name] = torch.cuda.max_memory_allocated() / 2**20
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(options.rounds):
        for name, side in sides.items():
            times[name].append(heard(side, options.tokens))
    rows = []
    for name, taken in times.items():
        first, total = (spread([pair[which] for pair in taken]) for which in (0, 1))
        rows.append(
            {
                "variant": variant, "side": name, "tokens": options.tokens,
                "first audio, s": first["median"], "q1": first["q1"], "q3": first["q3"], "rounds": first["n"],
                "total, s": total["median"],
                "RTF": total["median"] / (options.tokens * SAMPLES_PER_TOKEN / SAMPLE_RATE),
                "first request, first audio, s": cold[name],
                "capture, s": prepared[name] or None,
                "GPU MiB, peak, both models": peak.get(name),
            }
        )  # fmt: skip
    return rows


def options_of() -> argparse.Namespace:
    parser = arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--variants", nargs="+", choices=("english", "nano"), default=["english", "nano"])
    parser.add_argument("--tokens", type=int, default=75, help="speech tokens, 25 a second (default: 75)")
    parser.add_argument("--rounds", type=int, default=3, help="timed requests of each side (default: 3)")
    parser.add_argument("--backend", default="auto", help="of our engine (default: auto, graph on a GPU)")
    options: argparse.Namespace = parser.parse_args()
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    options.chunk, options.reference, options.layers = 25, 10.0, None
    if options.quick:
        options.chunk, options.reference, options.layers = 2, 1.0, 2
        options.tokens, options.rounds, options.variants = 4, 1, ["nano"]
    return options


def main() -> None:
    options = options_of()
    torch.set_num_threads(options.threads)
    logging.getLogger("chatterbox").setLevel(logging.ERROR)
    upstream_t3().tqdm = lambda steps, **_: steps
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    more = {"weights": "random", "reference, s": options.reference, "watermark": False}
    for variant in options.variants:
        model = make(Case(variant, options.device, 1, options.layers), SIDES[UPSTREAM])
        speech_alone(model.t3)
        ways = Ways(*load(model.t3.is_gpt, options.device, options.reference))
        found = rows_of(variant, sides_of(model, ways, options), options)
        rows += found
        for what, name in (("first_audio", "first audio, s"), ("rtf", "RTF")):
            ratios[f"{variant}_{what}_upstream_over_ours"] = found[0][name] / min(row[name] for row in found[1:3])
            ratios[f"{variant}_{what}_upstream_over_graphed"] = found[0][name] / found[3][name]
        keep("first_audio", rows, ratios, options, **more)
    finish("first_audio", rows, ratios, options, **more)


if __name__ == "__main__":
    main()
