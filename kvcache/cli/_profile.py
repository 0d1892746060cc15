"""`kvcache profile`: where a model's time and memory go, and how much of it any cache could save."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, get_args

import torch
import typer
from rich.table import Table
from rich.text import Text

from kvcache.cli._common import (
    Json,
    at_least,
    bar,
    console,
    display,
    print_json,
    progress,
    shown_bytes,
    table,
    threads_of,
)
from kvcache.cli._vocoding import ReferenceSeconds, Vocoder, VocoderPrecision, vocoder_setting
from kvcache.decoding import BackendName, Setting
from kvcache.errors import InputError
from kvcache.models import Precision
from kvcache.tools import MEMORY, PARTS, Profile, check_plot, plot, profile, shown_seconds, subject

_BAR, _SHORT = 40, 10  # characters for all of it
_WIDE = 100  # columns of a terminal that has room for the long one


def command(
    model: Annotated[
        str, typer.Argument(help="A folder, a .gguf file, a hub id (owner/name), or a name such as chatterbox-nano.")
    ],
    context: Annotated[int, typer.Option(help="Tokens of a request before the first that is decoded.")] = 500,
    tokens: Annotated[int, typer.Option(help="Tokens that are decoded in each run.")] = 40,
    requests: Annotated[int, typer.Option(help="Requests that decode together.")] = 1,
    backend: Annotated[str, typer.Option(help="off, eager, compile, graph or graph+compile.")] = "eager",
    precision: Annotated[str | None, typer.Option(help="fp32, bf16, fp16 or int8; as loaded if left out.")] = None,
    vocoder: Vocoder = "none",
    vocoder_precision: VocoderPrecision = None,
    reference_seconds: ReferenceSeconds = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="torch threads; torch's own choice if left out.")] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw stacked bars there (PNG, PDF or SVG).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Decode a little and say where time and memory go: attention, MLP, cache, sampling, host; weights, KV, the rest."""
    setting = replace(
        _setting(backend, precision, requests), vocoder=vocoder_setting(vocoder, vocoder_precision, reference_seconds)
    )
    if device not in ("cpu", "cuda"):
        raise InputError(f"--device {device}: give cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no GPU here; leave the option out, or see kvcache doctor")
    at_least("--context", context, 1)
    at_least("--tokens", tokens, 8)
    if plot_file is not None:
        check_plot(plot_file)
    found = subject(model)
    threads_of(threads)
    with progress().status("loading and running the model"):
        result = profile(found, setting, context, tokens, device=device)
    if plot_file is not None:
        plot({model: result}, plot_file)
    if as_json:
        print_json(result.to_dict())
        return
    wide = console().width >= _WIDE
    display(_times(result, wide), _memory(result, wide), *(f"• {sentence}" for sentence in result.sentences()))


def _setting(backend: str, precision: str | None, requests: int) -> Setting:
    backends = ("off", *get_args(BackendName))
    if backend not in backends:
        raise InputError(f"--backend {backend}: give one of {', '.join(backends)}")
    if precision not in (None, *get_args(Precision)):
        raise InputError(f"--precision {precision}: give one of {', '.join(get_args(Precision))}")
    at_least("--requests", requests, 1)
    return Setting(backend=backend, precision=precision, requests=requests)  # type: ignore[arg-type]


def _times(result: Profile, wide: bool) -> Table:
    setting = result.setting
    rows = "" if setting.requests == 1 else f", {setting.requests} requests together"
    shown = table(
        f"{result.model}: a step behind {result.context} tokens{rows} ({setting.precision or 'as loaded'}, "
        f"{result.device}, {result.threads} threads)",
        "time",
        "a step",
        "share",
        "",
        "prefill",
        "share",
    )
    shown.columns[3].justify = "left"
    for part, name in PARTS.items():
        if result.step.parts[part] or result.prefill.parts[part]:
            shown.add_row(
                name,
                shown_seconds(result.step.parts[part]),
                f"{result.step.share(part):.1%}",
                _bar(result.step.share(part), part in ("attention_scores", "cache_update"), wide),
                shown_seconds(result.prefill.parts[part]),
                f"{result.prefill.share(part):.1%}",
            )
    shown.add_section()
    shown.add_row("all", shown_seconds(result.step.total), "", "", shown_seconds(result.prefill.total), "")
    return shown


def _memory(result: Profile, wide: bool) -> Table:
    memory = result.memory
    kind = "the process holds" if result.device == "cpu" else "torch has reserved on the GPU"
    shown = table(f"memory that {kind}", "memory", "", "share", "")
    shown.columns[3].justify = "left"
    parts: Mapping[str, int] = memory.parts
    for part, name in MEMORY.items():
        if parts[part]:
            bar = _bar(memory.share(part), part in ("kv_cache", "prefixes"), wide)
            shown.add_row(name, shown_bytes(parts[part]), f"{memory.share(part):.1%}", bar)
    shown.add_section()
    shown.add_row("all", shown_bytes(memory.total), "", "")
    shown.add_row("before the model was loaded", shown_bytes(memory.before), "", "")
    shown.add_row("a prefill takes at its peak, for a moment", shown_bytes(memory.prefill), "", "")
    return shown


def _bar(share: float, saved: bool, wide: bool) -> Text:
    """A bar; orange is what a cache could save."""
    return Text(bar(share, _BAR if wide else _SHORT), style="dark_orange" if saved else "blue")
