"""`kvcache tune`."""

import math
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer

from kvcache.cli._common import (
    Json,
    at_least,
    bytes_of,
    display,
    one_line,
    print_json,
    progress,
    shown_bytes,
    table,
    threads_of,
)
from kvcache.cli._vocoding import ReferenceSeconds, Vocoder, VocoderPrecision, vocoder_setting
from kvcache.decoding import VocoderSetting, setting_to_dict
from kvcache.errors import InputError
from kvcache.io import check_given
from kvcache.tools import Tuned, shown, subject, tune


class _Goal(str, Enum):
    latency = "latency"
    throughput = "throughput"


def command(
    model: Annotated[
        str,
        typer.Argument(help="A folder, a .gguf file, a hub id, or a name such as chatterbox-nano.", metavar="MODEL"),
    ],
    out: Annotated[Path, typer.Option(help="Where the profile is saved, as JSON.", metavar="FILE")],
    goal: Annotated[
        _Goal, typer.Option("--for", help="One request's tokens, or all requests' together.")
    ] = _Goal.latency,
    context: Annotated[int | None, typer.Option(help="Tokens of a request before those that are timed.")] = None,
    time_limit: Annotated[
        float | None, typer.Option(help="Seconds; 300 by default, and none with --exhaustive.", metavar="SECONDS")
    ] = None,
    fidelity: Annotated[
        float, typer.Option(help="Most divergence from fp32, in nats a token; 0.01 is about 1 % of perplexity.")
    ] = 0.03,
    max_requests: Annotated[int, typer.Option(help="Most requests together, for throughput.")] = 8,
    memory: Annotated[str | None, typer.Option(help="What the cache may take, such as 512MiB.")] = None,
    threads: Annotated[int | None, typer.Option(help="Torch's threads.")] = None,
    device: Annotated[
        str | None, typer.Option(help="Such as cpu or cuda; by default a GPU where there is one.")
    ] = None,
    vocoder: Vocoder = "none",
    vocoder_precision: VocoderPrecision = None,
    reference_seconds: ReferenceSeconds = None,
    change_sound: Annotated[
        bool, typer.Option("--change-sound", help="Try the vocoder in fewer bits, which changes the sound.")
    ] = False,
    exhaustive: Annotated[
        bool, typer.Option("--exhaustive", help="Measure every setting: slow, the reference.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Find the fastest way to decode a model on this machine, say why, and save it for from_profile()."""
    budget = bytes_of("--memory", memory)
    _check(out, max_requests, context, time_limit, fidelity)
    speaks = vocoder_setting(vocoder, vocoder_precision, reference_seconds)
    _check_sound(change_sound, speaks)
    found = subject(model)
    device = _device(device)
    threads_of(threads)
    tuned = tune(
        found,
        goal.value,
        say=progress().print,
        context=context,
        time_limit=time_limit or (None if exhaustive else 300.0),
        bound=fidelity,
        max_requests=max_requests,
        memory=budget,
        device=device,
        exhaustive=exhaustive,
        vocoder=speaks,
        change_sound=change_sound,
    )
    tuned.profile.save(out)
    if as_json:
        print_json(_answer(tuned, out))
    else:
        _show(tuned, out, budget)


def _check(out: Path, max_requests: int, context: int | None, time_limit: float | None, fidelity: float) -> None:
    if not out.parent.is_dir() or out.is_dir():
        raise InputError(f"--out {out}: there is no folder {out.parent} to write a file to, or that is a folder itself")
    check_given(out)
    at_least("--max-requests", max_requests, 1)
    at_least("--context", context, 1)
    if time_limit is not None and not 0 < time_limit < math.inf:
        raise InputError(f"--time-limit {time_limit:g}: give a number of seconds above 0")
    if not 0 <= fidelity < math.inf:
        raise InputError(f"--fidelity {fidelity:g}: give a number of nats of at least 0; 0.03 is the default")


def _check_sound(change_sound: bool, speaks: VocoderSetting | None) -> None:
    if change_sound and (speaks is None or speaks.precision is not None):
        raise InputError(
            "--change-sound: it goes with --vocoder own, and without --vocoder-precision, which is kept as given"
        )


def _device(given: str | None) -> str:
    """The device that is asked for, or a GPU where there is one."""
    device = given or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {device} is not here: {one_line(error)}; use cpu") from error
    return device


def _answer(tuned: Tuned, out: Path) -> dict[str, object]:
    return {
        "setting": setting_to_dict(tuned.profile.setting),
        "milliseconds": 1e3 * tuned.best,
        "tokens_per_second": 1 / tuned.best,
        "seconds": tuned.seconds,
        "settings": tuned.settings,
        "untried": tuned.untried,
        "note": tuned.note,
        "out": str(out),
        "profile": tuned.profile.to_dict(),
    }


def _show(tuned: Tuned, out: Path, budget: int | None) -> None:
    profile = tuned.profile
    shows = table(
        f"{profile.name}, {profile.goal} behind {profile.context} tokens", "setting", "ms a token", "KL", "", right=1
    )
    for trial in sorted(profile.trials, key=lambda one: math.inf if one.milliseconds is None else one.milliseconds):
        time = "–" if trial.milliseconds is None else f"{trial.milliseconds:.2f}"
        divergence = "–" if trial.divergence is None else f"{trial.divergence:.1e}"
        mark = "chosen" if trial.setting == profile.setting else "refused" if trial.refused else ""
        shows.add_row(shown(trial.setting), time, divergence, mark)
    limits = f"at most {profile.bound:g} nats a token from fp32"
    limits += "" if budget is None else f", {shown_bytes(budget)} of cache"
    untried = f", {tuned.untried} left out for lack of time" if tuned.untried else ""
    display(
        shows,
        *profile.explanation,
        f"{shown(profile.setting)}: {1 / tuned.best:.1f} tokens a second, {limits}. {len(profile.trials)} of {tuned.settings} "
        f"settings looked at in {tuned.seconds:.0f} s{untried}.",
        *([f"Fidelity: {tuned.note}."] if tuned.note else []),
        f"Saved as {out}; load it with from_profile().",
    )
