"""A long text on Chatterbox's T3: its segments one after the other, as upstream speaks them, and together in one batch.

Each side is a process of its own and they take turns: where segments run one after the other a turn is one segment, where
they run together an eighth of the text's tokens. Where not all fit into `--memory`, they are measured in groups, one after the
other, and upstream speaks the text in every group: "upstream / this" and all ratios are of turns in the same group, or, where
two sides were in different groups, of both over upstream in their own; see `processes.py`. Upstream's `T3.inference` runs unchanged. Ours knows the voice, as it does
from the second request on. Then each of our sides begins the text anew a few times and stops at its first chunk.

Weights are random: they decide neither shapes nor speed. The stop token is made impossible, by a bias of the head, on every
side alike, so each segment is exactly as long as asked.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from common import arguments, chosen, finish, known, memory_option, spread
from processes import Gate, Measured, Phase, Processes, memory, peak_from_here
from torch import nn
from unending import unending

from kvcache.decoding import Request, Turns
from kvcache.memory import malloc_trim
from kvcache_chatterbox import ChatterboxEngine, RowLimits, load_t3, stand_in
from kvcache_chatterbox.speech import LongText
from kvcache_chatterbox.upstream import upstream_t3

# The Harvard sentences (IEEE, 1969), two a segment.
TEXT = """
The birch canoe slid on the smooth planks. Glue the sheet to the dark blue background.
It is easy to tell the depth of a well. These days a chicken leg is a rare dish.
Rice is often served in round bowls. The juice of lemons makes fine punch.
The box was thrown beside the parked truck. The hogs were fed chopped corn and garbage.
Four hours of steady work faced us. A large size in stockings is hard to sell.
The boy was there when the sun rose. A rod is used to catch pink salmon.
The source of the huge river is the clear spring. Kick the ball straight and follow through.
Help the woman get back to her feet. A pot of tea helps to pass the evening.
"""
CHARACTERS = 100
CHUNK = 25
TOKENS_PER_SECOND = 25  # of speech
MEMORY = 16 * 10**9  # bytes, by default
WHOLE, FIRST = 0, 1  # phases
UPSTREAM = "upstream's loop, one after the other, fp32"
ALONE, BATCH = "ours, one after the other", "ours, together"


@dataclass(frozen=True)
class Case:
    """What is spoken: the same for all sides."""

    variant: str
    tokens: int  # of each segment
    segments: int
    layers: int | None = None


@dataclass(frozen=True)
class Side:
    """How.

    Attributes:
        label: in the table.
        rows: segments that decode together; None is upstream's loop.
        precision: of the weights.
        backend: what runs the steps; a compiled one is compiled before it is timed.
        compact, onednn: False leaves one ingredient out.
    """

    label: str
    rows: int | None
    precision: str = "fp32"
    backend: str = "eager"
    compact: bool = True
    onednn: bool = True


def sides(segments: int, ingredients: bool) -> dict[str, Side]:
    found = {
        "upstream": Side(UPSTREAM, None),
        "alone-fp32": Side(f"{ALONE}, fp32", 1),
        "alone-int8": Side(f"{ALONE}, int8", 1, "int8"),
        "batch-fp32": Side(f"{BATCH}, fp32", segments),
        "batch-bf16": Side(f"{BATCH}, bf16", segments, "bf16"),
        "batch-int8": Side(f"{BATCH}, int8", segments, "int8"),
        "batch-int8-compiled": Side(f"{BATCH}, int8, compiled", segments, "int8", "compile"),
    }
    if ingredients:
        found["no-onednn"] = Side(f"{BATCH}, fp32, without oneDNN", segments, onednn=False)
        found["no-compact"] = Side(f"{BATCH}, fp32, steps always run all rows", segments, compact=False)
        found["two"] = Side("ours, two together, fp32", 2)
        found["four"] = Side("ours, four together, fp32", 4)
    return found


def model(case: Case) -> Any:
    """T3-520M, whose head never stops, and whose alignment check neither."""
    if case.variant == "multilingual":
        unending()
    t3 = load_t3(case.variant)  # type: ignore[arg-type]
    if case.layers is not None:
        t3.tfmr.layers = t3.tfmr.layers[: case.layers]
        t3.cfg.num_hidden_layers = t3.tfmr.config.num_hidden_layers = case.layers
    head = nn.Linear(t3.dim, t3.speech_head.out_features)
    with torch.no_grad():
        head.weight.copy_(t3.speech_head.weight)
        head.bias.zero_()
        head.bias[t3.hp.stop_speech_token] = -1e4
    t3.speech_head = head.eval()
    return t3


def engine_of(case: Case, side: Side) -> ChatterboxEngine:
    precision: Any = None if side.precision == "fp32" else side.precision
    backend: Any = side.backend
    return ChatterboxEngine(stand_in(model(case)), precision=precision, backend=backend, onednn=side.onednn)


def planned(engine: ChatterboxEngine, case: Case, rows: int) -> LongText:
    text = " ".join(TEXT.split("\n")[1 : case.segments + 1])
    long = engine.long_text(
        text,
        engine.voice_of(None),
        RowLimits(rows),
        max_new_tokens=case.tokens,
        seed=0,
        segment_characters=CHARACTERS,
        language_id="en",
    )
    assert len(long.utterances) == case.segments, f"{len(long.utterances)} segments"
    return long


# ---------------------------------------------------------------------- the sides


def upstream_of(case: Case) -> Callable[[int, int], list[int]]:
    """From a segment and a number of tokens to what upstream says."""
    module = upstream_t3()
    module.tqdm = lambda steps, **_: steps
    t3 = model(case)
    tts = stand_in(t3)
    utterances = planned(ChatterboxEngine(tts), case, 1).utterances

    def say(i: int, tokens: int) -> list[int]:
        torch.manual_seed(i)
        text = utterances[i].text.expand(2, -1)
        said: list[int] = t3.inference(t3_cond=tts.conds.t3, text_tokens=text, max_new_tokens=tokens)[0].tolist()
        return said

    return say


def alone(engine: ChatterboxEngine, long: LongText) -> Iterator[list[int]]:
    """What our engine says of each segment, one after the other."""
    for one in long.utterances:
        yield torch.cat(list(engine._tokens(one, CHUNK)), 1)[0].tolist()


def together(
    engine: ChatterboxEngine, long: LongText, compact: bool, parts: int, notes: dict[str, Any]
) -> Iterator[list[list[int]] | None]:
    """Their tokens after the last of so many equal parts of the work; None after the others."""
    said: list[list[int]] = [[] for _ in long.utterances]
    with engine.batch(long.plan.rows, long.plan.slots, compact=compact) as batch:
        turns = Turns(batch)
        request = Request(
            len(said),
            lambda i, _: engine.job(long.utterances[i]),
            size=CHUNK,
            deliver=lambda chunk: said[chunk.index].extend(chunk.tokens.tolist()),
        )
        turns.add(request)
        total = sum(one.max_new_tokens for one in long.utterances)
        part = 1
        while not request.over:
            turns.step()
            if part < parts and turns.tokens >= total * part / parts:
                part += 1
                yield None
        if request.error is not None:
            raise request.error
        notes |= {"KV bytes": batch.report().nbytes, "planned": long.plan.kv_bytes}
    yield said


def serve(gate: Gate, case: Case, side: Side) -> None:
    """A side's turns: of the whole text, or, when told so, up to its first chunk."""
    first = [False]

    def told(word: str) -> None:
        first[0] = word == "first"

    gate.told = told
    if side.rows is None:
        say = upstream_of(case)
        say(0, CHUNK)  # as our sides do before they are timed
        gate()
        while True:
            for i in range(case.segments):
                say(i, case.tokens)
                gate()
                while first[0]:
                    gate()
    engine = engine_of(case, side)
    long = planned(engine, case, side.rows)
    for _ in engine._tokens(long.utterances[0], CHUNK):  # the voice is known, libraries are loaded
        break
    engine.release()
    resident = resident_from_here()
    if side.rows > 1:  # some of the text, so that what is compiled is compiled
        warm = together(engine, long, side.compact, 5 * case.segments, {})
        for _ in zip(range(10), warm, strict=False):
            pass
        warm.close()  # type: ignore[attr-defined]
    gate()
    while True:
        if first[0]:
            stream = engine._in_order(long.utterances, long.plan.rows, CHUNK, None, long.plan.slots)
            next(stream)
            stream.close()  # type: ignore[attr-defined]
            gate()
            continue
        units = (
            alone(engine, long) if side.rows == 1 else together(engine, long, side.compact, case.segments, gate.notes)
        )
        for _ in units:
            if first[0]:
                break
            gate.notes |= {
                "estimate, MiB": resident + estimate(engine, long) / 2**20,
                "peak, MiB": memory().get("MiB, peak"),
            }
            gate()


def resident_from_here() -> float:
    """MiB of this process; from here on its peak is counted anew."""
    peak_from_here()
    return memory()["MiB"]


def estimate(engine: ChatterboxEngine, long: LongText) -> float:
    """Bytes that the text will take beside the model: the plan's cache, a prefill's own, and the sampler's noise."""
    prefix = long.plan.prefix + max(one.text_tokens for one in long.plan.segments)
    token = long.plan.row_bytes / long.plan.slots
    noise = 64 * long.plan.rows * engine.t3.speech_head.out_features * 4
    return long.plan.kv_bytes + 2 * prefix * token + noise


# ---------------------------------------------------------------------- measuring


def check() -> None:
    """Upstream, one after the other and together say the same, in fp32."""
    case = Case("english", tokens=24, segments=4, layers=3)
    say = upstream_of(case)
    expected = [say(i, case.tokens) for i in range(case.segments)]
    engine = engine_of(case, Side("", 1))
    apart = list(alone(engine, planned(engine, case, 1)))
    *_, batch = together(engine, planned(engine, case, 3), True, 1, {})
    assert apart == expected, "one after the other says something else than upstream"
    assert batch == expected, "together says something else than upstream"


def whole(slow: Sequence[float], fast: Sequence[float]) -> float:
    """How many times longer the text took: the turns of one text differ in length, and are compared by their sums."""
    return sum(slow) / sum(fast)


def rows_of(case: Case, sides: dict[str, Side], measured: Measured, firsts: bool) -> list[dict[str, Any]]:
    tokens = case.tokens * case.segments
    rows = []
    for key, side in sides.items():
        seconds, note = measured.seconds(key, WHOLE), measured.notes.get(key, {})
        turn = spread(seconds)
        first = spread(measured.seconds(key, FIRST) if firsts and side.rows is not None else [])
        total = sum(seconds) * case.segments / len(seconds) if seconds else None
        rows.append(
            {
                "side": side.label,
                "s": total,
                "turn, s": turn["median"],
                "q1": turn["q1"],
                "q3": turn["q3"],
                "ms/token": None if total is None else 1e3 * total / tokens,
                "RTF": None if total is None else total / (tokens / TOKENS_PER_SECOND),
                "upstream / this": measured.ratio("upstream", key, whole, WHOLE),
                "first chunk, s": first["median"],
                "first q1": first["q1"],
                "first q3": first["q3"],
                "KV MiB": note["KV bytes"] / 2**20 if "KV bytes" in note else None,
                "planned MiB": note["planned"] / 2**20 if "planned" in note else None,
                "peak MiB": note.get("peak, MiB"),
                "estimate MiB": note.get("estimate, MiB"),
                **measured.mark(key),
            }
        )
    return rows


def ratios_of(measured: Measured, sides: dict[str, Side], firsts: bool) -> dict[str, float]:
    def over(slow: str, fast: str) -> float | None:
        return measured.ratio(slow, fast, whole, WHOLE)

    def best(slow: str) -> float | None:
        """Over the best of those that run together, as the engine has it."""
        found = known({key: over(slow, key) for key in sides if key.startswith("batch-")})
        return max(found.values(), default=None)

    found = {
        "batch8_over_sequential": over("alone-fp32", "batch-fp32"),
        "batch8_best_over_upstream": best("upstream"),
        "batch8_best_over_sequential_best": best("alone-int8"),
        "onednn_gain": over("no-onednn", "batch-fp32"),
        "compact_gain": over("no-compact", "batch-fp32"),
    }
    batch = measured.notes.get("batch-fp32", {})
    if "peak, MiB" in batch:
        found["peak_over_estimate"] = batch["peak, MiB"] / batch["estimate, MiB"]
    if firsts:
        found["first_chunk_batch_over_single"] = measured.ratio("batch-fp32", "alone-fp32", middle, FIRST)
    return known(found)


def middle(slow: Sequence[float], fast: Sequence[float]) -> float:
    return median(slow) / median(fast)


def options_of() -> argparse.Namespace:
    parser = arguments(str(__doc__).split("\n")[0])
    parser.add_argument("--variant", choices=("english", "multilingual"), default="english")
    parser.add_argument("--tokens", type=int, default=200, help="speech tokens of each segment (default: 200)")
    parser.add_argument("--segments", type=int, default=8, choices=range(2, 9), help="of the text (default: 8)")
    parser.add_argument("--rounds", type=int, default=1, help="times that the text is spoken (default: 1)")
    parser.add_argument("--firsts", type=int, default=5, help="first chunks of each side (default: 5)")
    parser.add_argument("--ingredients", action="store_true", help="also with one ingredient left out, and fewer rows")
    parser.add_argument("--sides", help="only these, by their short names, with commas; each takes 3 to 5 GB")
    memory_option(parser, MEMORY)
    options = parser.parse_args()
    if options.quick:
        options.tokens, options.segments, options.firsts = 30, 3, 2
        options.layers = 14 if options.variant == "multilingual" else 2  # which its check looks at
    else:
        options.layers = None
    return options


def main() -> None:
    options = options_of()
    torch.set_num_threads(options.threads)
    check()
    malloc_trim()  # 2 GB of its models, which glibc would keep beside the sides
    case = Case(options.variant, options.tokens, options.segments, options.layers)
    all_sides = sides(case.segments, options.ingredients or options.sides is not None)
    wanted = chosen(all_sides, options.sides)
    phases = [Phase(case.segments * options.rounds, warmup=0)]
    if options.firsts:
        phases.append(Phase(options.firsts, warmup=1, word="first"))
    measured = Processes(
        {key: (serve, case, side) for key, side in wanted.items()},
        options.threads,
        memory=options.memory,
        reference="upstream" if "upstream" in wanted else None,
    ).run(phases)
    firsts = bool(options.firsts)
    rows, ratios = rows_of(case, wanted, measured, firsts), ratios_of(measured, wanted, firsts)
    more = {"variant": case.variant, "tokens": case.tokens, "segments": case.segments} | measured.facts()
    finish("long_text", rows, ratios, options, measured.failed, **more)


if __name__ == "__main__":
    main()
