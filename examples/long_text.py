"""Speak a text file: planned in segments, decoded together, heard in order.

Weights come from --checkpoint, else they are random and a stand-in vocoder plays tones: speed and memory are then real,
the speech is not.

    python examples/long_text.py --variant nano
    python examples/long_text.py --variant english --checkpoint ./chatterbox --file chapter.txt --wav chapter.wav
"""

import argparse
import importlib
import json
import time
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from example_options import (
    CLASSES,
    LARGEST_SEED,
    Parser,
    add_model,
    add_sound,
    check_device,
    check_model,
    check_sound,
    count,
    new_file,
    number,
    old_file,
    text_file,
)  # fmt: skip
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kvcache import KVCacheError
from kvcache.errors import said
from kvcache_chatterbox import ChatterboxEngine, LongTextPlan, load_t3, stand_in
from kvcache_chatterbox.text import primary_language

TEXT = """The birch canoe slid on the smooth planks. Glue the sheet to the dark blue background. It is easy to tell the
depth of a well. These days a chicken leg is a rare dish. Rice is often served in round bowls. The juice of lemons makes
fine punch. The box was thrown beside the parked truck. The hogs were fed chopped corn and garbage. Four hours of steady
work faced us. A large size in stockings is hard to sell. The boy was there when the sun rose. A rod is used to catch pink
salmon. The source of the huge river is the clear spring. Kick the ball straight and follow through."""
TOKENS_PER_SECOND = 25  # of speech


def parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--file", type=text_file, help="the text (default: some sentences)")
    add_model(parser)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--language", default="en", help="of the text, such as fr")
    parser.add_argument("--voice", type=old_file, metavar="FILE", help="a clip of who speaks")
    parser.add_argument("--rows", type=count(1), default=8, help="segments that decode together at most (default: 8)")
    parser.add_argument("--budget", type=number(0, above=True), metavar="MIB", help="memory that their cache may take")
    parser.add_argument(
        "--segment", type=count(20), default=120, metavar="N", help="characters of a segment (default: 120)"
    )
    parser.add_argument(
        "--max-new-tokens", type=count(1), help="speech tokens of a segment; random weights, which never end, get 75"
    )
    parser.add_argument("--carry", action="store_true", help="one segment after another, each from the end of the last")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16", "int8"), help="of the backbone")
    add_sound(parser)
    parser.add_argument("--seed", type=count(0, LARGEST_SEED), default=0)
    parser.add_argument("--plan", action="store_true", help="only say what it would take")
    parser.add_argument("--no-compare", action="store_true", help="do not also speak one segment after the other")
    parser.add_argument("--wav", type=new_file, default=Path("long_text.wav"))
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write plan and summary there")
    options = parser.parse_args()
    check_model(parser, options.variant, options.checkpoint)
    check_device(parser, options.device)
    check_sound(parser, options)
    options.fail = parser.error
    try:
        primary_language(options.language)
    except KVCacheError as error:
        parser.error(f"--language {options.language}: {error}")
    return options


def load(options: argparse.Namespace) -> tuple[Any, str]:
    """The whole model, or a stand-in around its T3, and a sentence on it."""
    if options.checkpoint is not None and options.variant in CLASSES:
        module, name = CLASSES[options.variant]
        try:
            tts = getattr(importlib.import_module(module), name)
        except ImportError as error:
            raise SystemExit(f"no audio: {error.name} is not installed; see docs/chatterbox.md") from error
        return tts.from_local(options.checkpoint, options.device), f"Weights from {options.checkpoint}."
    t3 = load_t3(options.variant, options.checkpoint, device=options.device)
    return stand_in(t3), "A stand-in plays tones for speech: speed and memory are real, what is said is not."


def shown(plan: LongTextPlan, console: Console) -> Callable[[int, int, bool], None]:
    """A live view of the segments; what moves it, and stops it at the end of the last."""
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )
    bars = [
        progress.add_task(f"segment {i}", total=segment.most, start=False) for i, segment in enumerate(plan.segments)
    ]
    running = set(bars)
    progress.start()

    def watch(index: int, tokens: int, over: bool) -> None:
        bar = bars[index]
        progress.start_task(bar)
        progress.advance(bar, tokens)
        if over:
            progress.update(bar, total=progress.tasks[index].completed)
            running.discard(bar)
            if not running:
                progress.stop()

    return watch


def write_wav(path: Path, audio: torch.Tensor, rate: int) -> None:
    samples = (audio.clamp(-1, 1) * 32767).to(torch.int16).numpy()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())


def speak(engine: ChatterboxEngine, text: str, given: dict[str, Any]) -> tuple[torch.Tensor, float, float]:
    """The audio, the seconds to its first chunk, and to its last."""
    begin, first, parts = time.perf_counter(), 0.0, []
    for audio in engine.generate_stream(text, **given):
        first = first or time.perf_counter() - begin
        parts.append(audio)
    return torch.cat(parts, 1), first, time.perf_counter() - begin


def main() -> None:
    options = parse()
    console = Console()
    with console.status(f"loading {options.variant} …"):
        model, sentence = load(options)
    try:
        engine = ChatterboxEngine(model, precision=options.precision, vocoder=options.vocoder)
    except KVCacheError as error:
        options.fail(said(error))
    text, most = options.file or TEXT, options.max_new_tokens
    shared: dict[str, Any] = {
        "language_id": options.language,
        "max_new_tokens": 75 if most is None and options.checkpoint is None else most,
        "segment_characters": options.segment,
        "max_rows": options.rows,
        "memory_budget": None if options.budget is None else int(options.budget * 2**20),
    }
    console.print(f"[bold]Chatterbox {options.variant}[/bold] on {options.device}. {escape(sentence)}")
    try:
        shared["voice"] = None if options.voice is None else engine.add_voice("voice", options.voice)
        plan = engine.plan(text, **shared)
    except KVCacheError as error:
        raise SystemExit(f"cannot speak this: {error}") from error
    console.print(plan.table())
    summary: dict[str, Any] = {"plan": plan.to_dict()}
    if not options.plan:
        spoken = {**shared, **options.chunks, "seed": options.seed, "carry": "tail" if options.carry else None}
        audio, first, seconds = speak(engine, text, {**spoken, "watch": shown(plan, console)})
        report = engine.report()
        rate = model.sr
        length = audio.shape[1] / rate
        write_wav(options.wav, audio[0], rate)
        summary |= {
            "seconds of speech": round(length, 2),
            "first chunk, s": round(first, 3),
            "total, s": round(seconds, 2),
            "RTF": round(seconds / length, 3),
            "KV cache, MiB": round(report.nbytes / 2**20, 1),
        }
        if plan.rows > 1 and not options.carry and not options.no_compare:
            with console.status("the same, one segment after the other …"):
                _, alone_first, alone = speak(engine, text, {**spoken, "max_rows": 1})
            summary |= {
                "one after the other: first chunk, s": round(alone_first, 3),
                "one after the other: total, s": round(alone, 2),
                "together, times as fast": round(alone / seconds, 2),
            }
        for name, value in list(summary.items())[1:]:
            console.print(f"{name:>38}  {value}")
        console.print(f"audio in {options.wav}", markup=False)
    if options.json is not None:
        options.json.write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
