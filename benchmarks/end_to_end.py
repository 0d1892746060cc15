"""Text to audio, end to end: how long a listener waits, and where that time goes. Upstream's way, chunks of a second, and ours.

Each side is a process of its own with a whole Chatterbox, T3 and S3Gen and Perth; they take turns, request by request. All
figures of a row are of the same requests. A listener is played out from the times at which audio came. Where the requests of a
side take longer than `--patience`, there is one of each length; n says how many.

Sides: upstream's `generate`, which says nothing before all is there; "fixed", our engine with chunks of 25 tokens, each made by
upstream's `inference` with 25 tokens before it and the whole reference, as it was before the vocoder was driven from outside;
"exact", which computes what upstream computes, in chunks that grow; and "fast", with settings that change the sound.

Weights are random: they decide neither shapes nor speed, and what is heard is no speech. What a setting changes is given as the
distance of its audio from that of upstream's setting, of the same tokens under the same noise, and is not judged by ear here.

A run can be taken in parts: `--with` keeps the rows of earlier ones. Ratios are of medians, at the longest speech of both sides;
that of first audio at the length that was spoken most often.
"""
# Not by `make bench`: it needs what upstream's S3Gen imports.

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import arguments, finish, keep, memory_option, only, show, spread
from processes import Gate, Phase, Processes
from speaking import (
    CLASSES,
    PARTS,
    TEXT,
    Case,
    Heard,
    Side,
    begin,
    chatterbox,
    engine_of,
    imported,
    listen,
    serve,
    tokens_of,
)
from torch import Tensor

from kvcache_chatterbox import SpeechScheduler
from kvcache_chatterbox.units import SAMPLE_RATE, SPEECH_TOKENS, TOKENS_PER_SECOND
from kvcache_chatterbox.vocoder import Run, S3GenVocoder, SeededNoise, VocoderOptions, random_s3gen
from kvcache_chatterbox.voices import Voice

UPSTREAM, FIXED, EXACT, FAST = "upstream", "fixed", "exact", "fast"
PRINTED = (
    "variant", "how", "over", "characters", "speech, s", "n", "first audio, s", "new voice, s", "cold, s", "s", "RTF",
    "silence in all, s", "underruns", "runs", "T3, %", "flow, %", "HiFT, %", "peak, MiB", "mel distance", "this over / this",
    "failed",
)  # fmt: skip
NOT_JUDGED = "not judged by ear here"
# The report's own texts are not at hand: these are as long as they are.
TEXTS = (
    "Hello there",
    "Rice is often served in round bowls, and often on a green leaf.",
    "The birch canoe slid on the smooth planks. Glue the sheet to the dark blue background. It is easy to tell the depth of a "
    "well. These days a chicken leg is a rare dish. Rice is often served in round bowls. The juice of lemons makes fine punch. "
    "The box was thrown beside the parked truck. The hogs were fed chopped corn and garbage. Four hours of steady work faced us. "
    "A large size in stockings is hard to sell. The boy was there.",
)


# ---------------------------------------------------------------------- sides


def sides_of(options: argparse.Namespace, variant: str) -> dict[str, Side]:
    """Those that the ratios are about."""
    fast = short(variant)
    if options.fast_vocoder != "fp32":
        fast["precision"] = options.fast_vocoder
    if options.fast_compiled:
        fast["compiled"] = True
    return {
        UPSTREAM: Side("upstream's generate", upstream=True),
        FIXED: Side("fixed, as it was", chunking="fixed"),
        EXACT: Side("ours, exact", vocoder={}),
        FAST: Side("ours, fast", vocoder=fast, precision=options.fast_precision, backend=options.fast_backend),
    }


def short(variant: str) -> dict[str, Any]:
    """Two steps and a reference of 3 s; Turbo and Nano have the weights for it themselves."""
    return ({} if Case(variant).distilled else {"weights": "meanflow"}) | {"reference_seconds": 3.0}


def levers_of(options: argparse.Namespace, variant: str) -> dict[str, Side]:
    """From "fixed" to "fast", each but one thing away from another, also where it does not pay."""
    sides = sides_of(options, variant)
    fixed, exact, fast = (replace(sides[name], label=name) for name in (FIXED, EXACT, FAST))
    found = {
        FIXED: fixed,
        "grow": replace(fixed, label="chunks that grow", chunking="auto", over=FIXED),
        "outside": replace(
            fixed, label="S3Gen driven from outside", vocoder={"lookahead": False}, whole_hift=True, over=FIXED
        ),
        "hift": replace(fixed, label="HiFT over its context alone", vocoder={"lookahead": False}, over="outside"),
        "lookahead": replace(fixed, label="lookahead", vocoder={}, over="hift"),
        EXACT: replace(exact, label="chunks that grow, with all before", over="lookahead"),
        "onednn": replace(exact, label="without oneDNN", onednn=False, over=EXACT),
        "steps": replace(exact, label="5 steps", vocoder={"steps": 5}, over=EXACT),
        "guidance": replace(exact, label="no guidance", vocoder={"guidance": 0.0}, over=EXACT),
        "reference": replace(exact, label="reference of 3 s", vocoder={"reference_seconds": 3.0}, over=EXACT),
        "meanflow": replace(exact, label="meanflow", vocoder={"weights": "meanflow"}, over=EXACT),
    }
    three = short(variant)
    found |= {
        "three": replace(exact, label="meanflow, reference of 3 s", vocoder=three, over="meanflow"),
        # The end of what was said, heard in place of most of the reference, would be as many tokens.
        "rolling": replace(
            exact,
            label="reference of 1 s, as a rolling prompt would cost",
            vocoder=three | {"reference_seconds": 1.0},
            over="three",
        ),
        "bf16": replace(exact, label="vocoder in bf16", vocoder=three | {"precision": "bf16"}, over="three"),
        "int8": replace(exact, label="vocoder in int8", vocoder=three | {"precision": "int8"}, over="three"),
        "compiled": replace(exact, label="vocoder compiled", vocoder=three | {"compiled": True}, over="three"),
    }
    base = replace(exact, vocoder=three, over="three")
    found |= {
        "t3-int8": replace(base, label="T3 in int8", precision="int8"),
        "t3-bf16": replace(base, label="T3 in bf16", precision="bf16"),
        "t3-compile": replace(base, label="T3 compiled", backend="compile"),
        "t3-int8-compile": replace(base, label="T3 in int8, compiled", precision="int8", backend="compile"),
        "t3-bf16-compile": replace(base, label="T3 in bf16, compiled", precision="bf16", backend="compile"),
        FAST: replace(fast, label="fast, all that it has", over="three"),
        "overlap": replace(fast, label="fast, T3 and vocoder at once, a thread each", overlap=True, over=FAST),
    }
    if Case(variant).distilled:  # its own weights are distilled: two steps without guidance
        for name in ("steps", "guidance", "meanflow"):
            del found[name]
        found["one-step"] = replace(exact, label="1 step", vocoder={"steps": 1}, over=EXACT)
        found["three"] = replace(found["three"], label="reference of 3 s", over=EXACT)
        del found["reference"]  # the same
    return found


def with_bases(sides: Mapping[str, Side], names: Sequence[str]) -> dict[str, Side]:
    """The named ones, and those that they are compared with.

    Raises:
        SystemExit: if no variant of this run has one of them.
    """
    wanted = set(names) & set(sides)
    wanted |= {str(sides[name].over) for name in wanted if sides[name].over}
    return {name: side for name, side in sides.items() if name in wanted}


# ---------------------------------------------------------------------- what settings change


def distances(gate: Gate, case: Case, settings: Sequence[dict[str, Any]], tokens: int) -> None:
    """How far the audio of each of these settings is from that of upstream's setting under the same noise, in its notes."""
    tts = chatterbox(case)
    other = None if tts.s3gen.meanflow else random_s3gen(meanflow=True)
    voice = Voice.of(tts.t3, tts.conds)
    said = torch.randint(0, SPEECH_TOKENS, (tokens,), generator=torch.Generator().manual_seed(0))

    def audio(given: dict[str, Any]) -> Tensor:
        if given.get("weights") == "meanflow" and other is not None:
            given = given | {"weights": other}
        return S3GenVocoder(tts.s3gen, VocoderOptions(**given)).waves([Run(said, voice, SeededNoise(0))])[0].audio

    theirs = audio({})
    gate.notes["distances"] = [apart(tts.s3gen.mel_extractor, theirs, audio(given)) for given in settings]
    gate()


def apart(mel: Any, one: Tensor, other: Tensor) -> tuple[float, float]:
    """The mean distance of two signals' log-mels (natural logarithm), and their log-spectral distance in dB.

    The latter is the root mean square over the frequencies of a frame, its mean over frames; what is 80 dB below the first
    signal's loudest bin is taken as that loud.
    """
    mels = [mel(signal[None]) for signal in (one, other)]
    power = [
        torch.stft(signal, 1024, 256, window=torch.hann_window(1024), return_complex=True).abs() ** 2
        for signal in (one, other)
    ]
    floor = 1e-8 * power[0].max()
    decibels = [10 * torch.log10(part.clamp(min=floor)) for part in power]
    spectral = (decibels[0] - decibels[1]).square().mean(0).sqrt().mean()
    return float((mels[0] - mels[1]).abs().mean()), float(spectral)


def changes_sound(side: Side) -> bool:
    """Whether its vocoder's settings do."""
    return bool({"weights", "steps", "guidance", "reference_seconds", "precision"} & set(side.vocoder or {}))


def measured_distances(
    case: Case, sides: Mapping[str, Side], options: argparse.Namespace
) -> dict[str, tuple[float, float]]:
    """By side, of those whose settings change the sound."""
    changing = {name: dict(side.vocoder or {}) for name, side in sides.items() if changes_sound(side)}
    if not changing:
        return {}
    settings = [{k: v for k, v in given.items() if k != "compiled"} for given in changing.values()]
    apart_process = Processes({"": (distances, case, settings, options.compared)}, options.threads).run([])
    found = apart_process.notes.get("", {}).get("distances")
    return {} if found is None else dict(zip(changing, found, strict=True))


# ---------------------------------------------------------------------- measuring


def measure(
    case: Case, sides: Mapping[str, Side], tasks: Sequence[tuple[str, int, str | None]], options: argparse.Namespace
) -> tuple[list[dict[str, Any]], dict[str, Any], Any]:
    """A row for each side and task, when audio came by row, and what came of the processes."""
    least = min(count for _, count, _ in tasks)
    measured = Processes(
        {name: (serve, case, side, least, options.patience) for name, side in sides.items()},
        options.threads,
        memory=options.memory,
        reference=FIXED if FIXED in sides else None,
    ).run([Phase(options.rounds, warmup=0, word=task) for task in tasks])
    rows, arrivals = [], {}
    for name, side in sides.items():
        note = measured.notes.get(name, {})
        for key, _, text in tasks:
            runs = note.get("runs", {}).get(key, [])
            rows.append(
                {"variant": case.variant, "side": name, "how": side.label, "T3": side.t3, "vocoder": side.voiced,
                 "chunking": "all at once" if side.upstream else side.chunking}
                | ({} if text is None else {"characters": len(text)})
                | row_of(runs)
                | {"cold, s": note.get("cold"), "new voice, s": note.get("new voice"), "peak, MiB": note.get("MiB, peak")}
                | far_of(None, side)
                | measured.mark(name)
            )  # fmt: skip
            if runs:
                arrivals[f"{case.variant}, {name}, {key}"] = middle(runs)["arrivals"]
    return rows, arrivals, measured


def middle(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The request that took the median time, or a little more."""
    return sorted(runs, key=lambda run: float(run["seconds"]))[len(runs) // 2]


def row_of(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The figures of a side's requests: medians, and of underruns the most."""
    heard = [listen(run["arrivals"]) for run in runs]
    wall = spread([run["seconds"] for run in runs])
    row: dict[str, Any] = {
        "speech, s": heard[0].audio if heard else None,
        "n": wall["n"],
        "first audio, s": spread([one.first for one in heard])["median"],
        "s": wall["median"],
        "q1": wall["q1"],
        "q3": wall["q3"],
        "RTF": spread([run["seconds"] / one.audio for run, one in zip(runs, heard, strict=True)])["median"],
        "silence in all, s": spread([one.waited for one in heard])["median"],
        "longest behind the first, s": spread([one.longest for one in heard])["median"],
        "underruns": max((one.underruns for one in heard), default=None),
        "runs": len(middle(runs)["chunks"]) if runs else None,
        "first chunk, tokens": middle(runs)["chunks"][0] if runs else None,
    }
    shares = [{part: 100 * run["spent"].get(part, 0.0) / run["seconds"] for part in PARTS} for run in runs]
    for part in PARTS:
        row[f"{part}, %"] = spread([share[part] for share in shares])["median"]
    # What T3 does in a thread of its own is beside the rest.
    row["host, %"] = spread([max(0.0, 100 - sum(share.values())) for share in shares])["median"]
    return row


def far_of(found: tuple[float, float] | None, side: Side) -> dict[str, Any]:
    """What its row says of the sound."""
    if not changes_sound(side):
        return {"mel distance": None, "log-spectral distance, dB": None, "sound": "as upstream's setting"}
    mel, spectral = found or (None, None)
    return {"mel distance": mel, "log-spectral distance, dB": spectral, "sound": f"changed, {NOT_JUDGED}"}


def over(rows: Sequence[Mapping[str, Any]], variant: str, slow: str, fast: str, column: str = "s") -> float | None:
    """How many times as much of a column one side has as another, at the longest speech that both have spoken."""
    pair = longest(rows, variant, slow, fast)
    return None if pair is None or not pair[1][column] else pair[0][column] / pair[1][column]


def longest(rows: Sequence[Mapping[str, Any]], variant: str, *sides: str) -> list[Mapping[str, Any]] | None:
    """The rows of these sides at the longest speech that all of them have spoken."""
    spoken = [
        {round(row["speech, s"]): row for row in rows if row["variant"] == variant and row["side"] == side and row["n"]}
        for side in sides
    ]
    common = set.intersection(*map(set, spoken))
    return [of[max(common)] for of in spoken] if common else None


def first_audio(rows: Sequence[Mapping[str, Any]], variant: str) -> float | None:
    """How many times sooner the fast side is heard than "fixed". It is no matter of how much is said: of the length that was
    spoken most often."""
    spoken = [
        {round(row["speech, s"]): row for row in rows if row["variant"] == variant and row["side"] == side and row["n"]}
        for side in (FIXED, FAST)
    ]
    pairs = [[of[length] for of in spoken] for length in sorted(set.intersection(*map(set, spoken)), reverse=True)]
    if not pairs:
        return None
    fixed, fast = max(pairs, key=lambda pair: min(row["n"] for row in pair))
    return float(fixed["first audio, s"] / fast["first audio, s"])


def ratios_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The figures that the benchmark is about, of sides that were measured."""
    found: dict[str, float | None] = {
        "english_exact_over_fixed": over(rows, "english", FIXED, EXACT),
        "english_fast_over_fixed": over(rows, "english", FIXED, FAST),
        "nano_fast_over_fixed": over(rows, "nano", FIXED, FAST),
    }
    for variant in ("english", "nano"):
        fast = longest(rows, variant, FAST)
        found[f"{variant}_realtime"] = None if fast is None else 1 / fast[0]["RTF"]
        found[f"{variant}_first_audio"] = first_audio(rows, variant)
        if variant == "nano" and fast is not None:
            found["nano_underruns"] = float(fast[0]["underruns"])
    return {name: value for name, value in found.items() if value is not None}


def with_gains(rows: Sequence[dict[str, Any]], sides: Mapping[str, Side]) -> list[dict[str, Any]]:
    """Rows of levers, each with how many times less time it takes than what it differs from, and than "fixed"."""
    found = []
    for row in rows:
        base, variant = sides[row["side"]].over, row["variant"]
        gain = None if base is None or not row["n"] else over(rows, variant, base, row["side"])
        whole = None if not row["n"] else over(rows, variant, FIXED, row["side"])
        found.append(row | {"over": base, "this over / this": gain, "fixed / this": whole})
    return found


# ---------------------------------------------------------------------- streams at once


def at_once(gate: Gate, case: Case, side: Side, counts: Sequence[int], tokens: int, by_turns: bool) -> None:
    """So many requests one by one and together, by turns; each turn is all of them, and its notes what was heard."""
    tts = chatterbox(case)
    engine = engine_of(tts, side)
    voice = Voice.of(tts.t3, tts.conds)
    for count in counts:  # each number of rows has a compiled step of its own
        engine.warm_up(voice=voice, max_new_tokens=tokens, requests=count)
        asyncio.run(spoken(engine, voice, count, count, tokens, by_turns))
    gate.notes["streams"] = []
    gate()
    while True:
        for count in counts:
            alone, together = (asyncio.run(spoken(engine, voice, count, rows, tokens, by_turns)) for rows in (1, count))
            gate.notes["streams"].append((count, alone, together))
        gate()


async def spoken(engine: Any, voice: Voice, count: int, rows: int, tokens: int, by_turns: bool) -> dict[str, Any]:
    """So many requests through a scheduler, `rows` at a time: seconds in all, and what each listener has heard.

    Args:
        by_turns: T3 and the vocoder compute one at a time.
    """
    heard: list[Heard] = []

    async def one(index: int, tokens: int = tokens) -> None:
        begin = time.perf_counter()
        stream = scheduler.submit(TEXT, voice=voice, max_new_tokens=tokens, seed=index, segment_characters=None)
        heard.append(listen([(time.perf_counter() - begin, piece.shape[-1] / SAMPLE_RATE) async for piece in stream]))

    async with SpeechScheduler(engine, max_rows=rows, one_at_a_time=by_turns) as scheduler:
        await asyncio.gather(*(one(index, tokens // 8) for index in range(rows)))  # it has served before
        heard.clear()
        start = time.perf_counter()
        if rows == 1:
            for index in range(count):
                await one(index)
        else:
            await asyncio.gather(*(one(index) for index in range(count)))
        took = time.perf_counter() - start
    return {"seconds": took, "heard": heard}


def streams_of(case: Case, side: Side, options: argparse.Namespace) -> tuple[list[dict[str, Any]], Any]:
    """A row for each number of streams."""
    tokens = round(options.stream_seconds * TOKENS_PER_SECOND)
    measured = Processes(
        {"streams": (at_once, case, side, options.streams, tokens, not options.both_at_once)},
        options.threads,
        memory=options.memory,
    ).run([Phase(options.rounds, warmup=0)])
    note = measured.notes.get("streams", {})
    rows = []
    for count in options.streams:
        pairs = [(alone, together) for n, alone, together in note.get("streams", []) if n == count]
        if not pairs:
            continue
        speed = [
            [sum(one.audio for one in run["heard"]) / run["seconds"] for run in runs]
            for runs in zip(*pairs, strict=True)
        ]
        gained = spread([b / a for a, b in zip(*speed, strict=True)])
        together = [one for _, run in pairs for one in run["heard"]]
        firsts = torch.tensor([one.first for one in together], dtype=torch.float64)
        rows.append(
            {"variant": case.variant, "streams": count,
             "computed": "both at once" if options.both_at_once else "by turns", "T3": side.t3, "vocoder": side.voiced, "n": len(pairs),
             "speech of each, s": options.stream_seconds,
             "audio s / s, one by one": spread(speed[0])["median"],
             "audio s / s, together": spread(speed[1])["median"],
             "together / one by one": gained["median"], "q1": gained["q1"], "q3": gained["q3"]}
            | {f"first audio p{p}, s": float(torch.quantile(firsts, p / 100)) for p in (50, 90, 99)}
            | {"silence in all, s": spread([one.waited for one in together])["median"]}
            | {"peak, MiB": note.get("MiB, peak")}
        )  # fmt: skip
    return rows, measured


# ---------------------------------------------------------------------- new processes


def cold_of(case: Case, side: Side, options: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """A row for the first process of a machine, one for the next, and one for a next whose engine warms up before its first
    request."""
    tokens = round(min(options.seconds) * TOKENS_PER_SECOND)
    rows, failed = [], {}
    with tempfile.TemporaryDirectory() as home:
        for process, warm_up in (("first of the machine", False), ("second", False), ("third, warmed up", True)):
            measured = Processes({process: (begin, case, side, tokens, home, warm_up)}, options.threads).run([])
            failed |= measured.failed
            note = measured.notes.get(process, {})
            if "first" not in note:
                continue
            later = spread(note["later"])
            rows.append(
                {"variant": case.variant, "process": process, "T3": side.t3, "vocoder": side.voiced,
                 "warm-up, s": note["warm-up"], "first request's first audio, s": note["first"],
                 "later ones', s": later["median"], "q1": later["q1"], "q3": later["q3"],
                 "first / later": note["first"] / later["median"], "fell back": len(note["fell back"])}
            )  # fmt: skip
    return rows, failed


# ---------------------------------------------------------------------- all of it


def options_of() -> argparse.Namespace:
    parser = arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("--variants", nargs="+", choices=tuple(CLASSES), default=["english", "nano"])
    parser.add_argument(
        "--sides",
        nargs="+",
        choices=(UPSTREAM, FIXED, EXACT, FAST),
        help="default: all; with --levers or --streams none, unless they are named",
    )
    parser.add_argument("--levers", nargs="*", metavar="NAME", help="levers, each apart; all without a name")
    parser.add_argument("--texts", action="store_true", help="three texts of the report's lengths, by --sides")
    parser.add_argument("--streams", type=int, nargs="*", metavar="N", help="so many at once (1 2 4 8), fast side")
    parser.add_argument(
        "--both-at-once", action="store_true", help="streams whose T3 and vocoder compute beside one another"
    )
    parser.add_argument("--cold", action="store_true", help="the first requests of new processes, fast side")
    parser.add_argument("--seconds", type=float, nargs="+", default=[10.0, 30.0], help="of speech (default: 10 30)")
    parser.add_argument("--stream-seconds", type=float, default=10.0, help="of each stream's speech (default: 10)")
    parser.add_argument("--rounds", type=int, default=3, help="requests of each side and length (default: 3)")
    parser.add_argument(
        "--patience", type=float, default=60.0, help="seconds after which none is repeated (default: 60)"
    )
    parser.add_argument("--fast-precision", choices=("fp32", "bf16", "int8"), default="int8", help="of T3, fast side")
    parser.add_argument("--fast-backend", choices=("eager", "compile"), default="compile", help="of T3, fast side")
    parser.add_argument("--fast-vocoder", choices=("fp32", "bf16", "int8"), default="bf16", help="precision, fast side")
    parser.add_argument("--fast-compiled", action="store_true", help="compile the fast side's vocoder")
    parser.add_argument(
        "--with", type=Path, nargs="+", default=[], metavar="FILE", dest="parts", help="keep these rows"
    )
    memory_option(parser)
    options: argparse.Namespace = parser.parse_args()
    options.reference, options.layers, options.compared = 10.0, None, 50
    if options.quick:
        options.reference, options.layers, options.compared = 1.0, 2, 4
        options.variants, options.seconds, options.rounds, options.stream_seconds = ["nano"], [0.8], 1, 0.4
        options.fast_precision, options.fast_backend, options.fast_vocoder = "fp32", "eager", "fp32"
        options.streams = options.streams and options.streams[:1]
    options.streams = [1, 2, 4, 8] if options.streams == [] else options.streams
    alone = options.levers is not None or options.texts or options.streams is not None or options.cold
    options.main = not alone or (options.sides is not None and not options.texts)
    return options


class Parts:
    """What has been measured, in this run and in earlier ones."""

    LISTS = ("rows", "levers", "texts", "streams", "cold")

    def __init__(self, files: Sequence[Path]) -> None:
        self.lists: dict[str, list[dict[str, Any]]] = {name: [] for name in self.LISTS}
        self.arrivals: dict[str, Any] = {}
        self.made: list[dict[str, Any]] = []
        for file in files:
            data = json.loads(file.read_text())
            for name in self.LISTS:
                self.add(name, data.get(name, []))
            self.arrivals |= data.get("arrivals", {})
            self.made += [*data.get("parts", []), {key: data[key] for key in ("command", "commit")}]

    def add(self, name: str, rows: Sequence[dict[str, Any]]) -> None:
        """Rows that take the place of those of the same side and length."""
        new = {self._key(row) for row in rows}
        self.lists[name] = [row for row in self.lists[name] if self._key(row) not in new] + list(rows)

    @staticmethod
    def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
        speech = row.get("speech, s")
        length = None if speech is None else round(speech)
        return (
            *(row.get(name) for name in ("variant", "side", "streams", "computed", "process", "characters")),
            length,
        )


def main() -> None:
    options = options_of()
    torch.set_num_threads(options.threads)
    imported(CLASSES[options.variants[0]][0])
    parts, failed = Parts(options.parts), dict[str, str]()
    lasting = [(f"{seconds:g}", round(seconds * TOKENS_PER_SECOND), None) for seconds in options.seconds]
    more: dict[str, Any] = {"weights": "random", "tokenizer": "a stand-in", "reference, s": options.reference}

    def kept(write: Any = keep) -> None:
        rest = {name: parts.lists[name] for name in Parts.LISTS[1:] if parts.lists[name]}
        told = more | rest | {"arrivals": parts.arrivals, "parts": parts.made}
        write("end_to_end", parts.lists["rows"], ratios_of(parts.lists["rows"]), options, failed, **told)

    def take(name: str, case: Case, sides: Mapping[str, Side], tasks: Sequence[tuple[str, int, str | None]]) -> None:
        rows, arrivals, measured = measure(case, sides, tasks, options)
        if name == "rows":
            parts.arrivals |= arrivals
            more.update(measured.facts())
        if name == "levers":
            rows = with_gains(rows, sides)
        failed.update({f"{case.variant}, {name}, {side}": why for side, why in measured.failed.items()})
        parts.add(name, rows)
        kept()  # as the distances may take minutes
        far = measured_distances(case, sides, options)
        parts.add(name, [row | far_of(far.get(row["side"]), sides[row["side"]]) for row in rows])
        kept()

    for variant in options.variants:
        case = Case(variant, options.reference, options.layers)
        sides = sides_of(options, variant)
        chosen = {name: sides[name] for name in options.sides or sides}
        if options.main:
            take("rows", case, chosen, lasting)
        if options.levers is not None:
            levers = levers_of(options, variant)
            take("levers", case, with_bases(levers, options.levers or list(levers)), lasting)
        if options.texts:
            texts = [(f"text {len(text)}", tokens_of(text), text) for text in TEXTS[: 1 if options.quick else None]]
            take("texts", case, chosen, texts)
        if options.streams is not None:
            rows, measured = streams_of(case, sides[FAST], options)
            parts.add("streams", rows)
            failed |= {f"{variant}, {name}": why for name, why in measured.failed.items()}
            kept()
        if options.cold:
            rows, why = cold_of(case, sides[FAST], options)
            parts.add("cold", rows)
            failed |= {f"{variant}, {process} process": reason for process, reason in why.items()}
            kept()
    for name in Parts.LISTS[1:]:
        if found := parts.lists[name]:
            show(f"end_to_end, {name}", found if name in ("streams", "cold") else only(found, PRINTED))
    kept(partial(finish, columns=PRINTED))


if __name__ == "__main__":
    main()
