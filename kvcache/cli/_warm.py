"""`kvcache warm`: compile a model's steps before anybody waits for them."""

from dataclasses import asdict, replace
from typing import Annotated, get_args

import typer

from kvcache.cli._common import (
    CheckFailed,
    Json,
    at_least,
    display,
    print_json,
    progress,
    shown_bytes,
    table,
    threads_of,
)
from kvcache.cli._vocoding import ReferenceSeconds, Vocoder, VocoderPrecision, vocoder_setting
from kvcache.decoding import ProgramFiles, Setting, WarmUp
from kvcache.errors import InputError
from kvcache.events import Event, subscribe
from kvcache.models import Precision
from kvcache.tools import ModelTarget, check_vocoder, shown_seconds, subject


def command(
    model: Annotated[
        str,
        typer.Argument(help="A folder, a .gguf file, a hub id, or a name such as chatterbox-nano.", metavar="MODEL"),
    ],
    context: Annotated[
        int, typer.Option(help="Tokens of a request before those it makes; speech has its voice's.")
    ] = 500,
    tokens: Annotated[int, typer.Option(help="Tokens that a request may make.")] = 1000,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of the cache, where the manager or engine is told so.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, bf16, fp16 or int8; as loaded if left out.")] = None,
    requests: Annotated[
        int, typer.Option(help="Rows of the scheduler that will serve: a step of one and one of all are compiled.")
    ] = 1,
    vocoder: Vocoder = "none",
    vocoder_precision: VocoderPrecision = None,
    reference_seconds: ReferenceSeconds = None,
    threads: Annotated[int | None, typer.Option(help="torch threads; torch's own choice if left out.")] = None,
    as_json: Json = False,
) -> None:
    """Compile a model's steps for backend='compile' on a CPU, and its vocoder's, before anybody waits for them.

    They are kept for the processes that serve it; the vocoder's are those of VocoderOptions(compiled=True).

    What is kept is for this machine, these versions, and as many torch threads. It is never needed: what is missing is compiled
    by the first request.
    """
    at_least("--context", context, 1)
    at_least("--tokens", tokens, 8)
    at_least("--max-length", max_length, 8)
    at_least("--requests", requests, 1)
    speaks = vocoder_setting(vocoder, vocoder_precision, reference_seconds)
    if precision not in (None, *get_args(Precision)):
        raise InputError(f"--precision {precision}: give one of {', '.join(get_args(Precision))}")
    found, files = subject(model), ProgramFiles()
    threads_of(threads)
    setting = Setting(
        backend="compile",
        precision=precision,  # type: ignore[arg-type]
        requests=requests,
        max_length=max_length,
        vocoder=None if speaks is None else replace(speaks, compiled=True),
    )
    check_vocoder(found, setting)
    warming, reasons = _warmed(found, setting, context, tokens)
    held = files.held()
    size = sum(size for _, size in held)
    if as_json:
        print_json(
            {
                "model": model,
                "seconds": warming.seconds,
                "made": [asdict(one) for one in warming.made],
                "folder": str(files.folder),
                "files": len(held),
                "bytes": size,
                "reasons": reasons,
            }
        )
    else:
        _show(model, warming, f"{len(held)} compiled programs in {files.folder}, {shown_bytes(size)}.")
    if not warming.made:
        raise CheckFailed(
            f"nothing was compiled: {'; '.join(reasons) or 'the model runs eagerly'}; see kvcache doctor --compile"
        )


def _warmed(found: ModelTarget, setting: Setting, context: int, tokens: int) -> tuple[WarmUp, list[str]]:
    """What was made, and why something was not."""
    reasons: list[str] = []

    def fell_back(event: Event) -> None:
        reasons.append(f"{event.about}: {event.reason}")

    with progress().status("loading the model") as status, subscribe(fell_back, ["fell_back"]):
        warming = found.warm_up(
            setting, context, tokens, lambda line: status.update(f"{line}; compiling takes a minute or more")
        )
    return warming, reasons


def _show(model: str, warming: WarmUp, kept: str) -> None:
    shown = table(f"{model}, warm in {shown_seconds(warming.seconds or 0.0)}", "what", "how", "time", right=2)
    for one in warming.made:
        shown.add_row(one.name, one.how, shown_seconds(one.seconds))
    display(shown, kept)
