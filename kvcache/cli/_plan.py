"""`kvcache plan`: will it fit. What it takes is found by `kvcache.tools.plan`; here it is asked for and shown."""

from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, get_args

import torch
import typer
from rich.text import Text

from kvcache.cache import MaxBytes, SizePolicy, SlidingWindow
from kvcache.cli._common import (
    CheckFailed,
    Json,
    at_least,
    bar,
    bytes_of,
    console,
    display,
    print_json,
    progress,
    shown_bytes,
    table,
)
from kvcache.cli._vocoding import MaxChunk, ReferenceSeconds, Vocoder, VocoderPrecision, vocoder_setting
from kvcache.decoding import Setting
from kvcache.errors import InputError
from kvcache.models import Precision
from kvcache.tools import MOST_REQUESTS, Device, MemoryPlan, ModelTarget, Room, plan, room, subject

_BAR = 80
_COLOURS = (
    "grey50",
    "dark_orange",
    "gold3",
    "khaki3",
    "grey70",
    "indian_red",
    "plum4",
    "medium_purple",
    "green",
    "cyan",
    "steel_blue",
    "blue",
)
_KV_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_LENGTH = 1000


def command(
    model: Annotated[str, typer.Argument(help="A folder, a .gguf file, a hub id, or a name such as chatterbox-nano.")],
    length: Annotated[
        int | None, typer.Option(help="Tokens of a request in the end, its beginning among them.")
    ] = None,
    context: Annotated[int | None, typer.Option(help="Tokens it begins with; by default half of them.")] = None,
    requests: Annotated[int, typer.Option(help="Requests that decode together.")] = 1,
    window: Annotated[int | None, typer.Option(help="Keep only the last tokens, so many.")] = None,
    sinks: Annotated[int | None, typer.Option(help="And the first tokens, so many; with --window.")] = None,
    kv_budget: Annotated[str | None, typer.Option(help="Or keep what fits so many bytes: 512MiB.")] = None,
    precision: Annotated[str | None, typer.Option(help="Of the linear layers: fp32, bf16, fp16, int8.")] = None,
    kv_dtype: Annotated[str | None, typer.Option(help="Of the decode engine's cache: fp32, bf16, fp16.")] = None,
    bits: Annotated[int | None, typer.Option(help="Of the token loop's cache: 8 or 4.")] = None,
    backend: Annotated[str, typer.Option(help="off, eager, compile, graph or graph+compile.")] = "eager",
    memory: Annotated[str | None, typer.Option(help="What there is: 24GiB. Exit code 1 if that is too little.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda; it need not be there.")] = "cpu",
    vocoder: Vocoder = "none",
    vocoder_precision: VocoderPrecision = None,
    reference_seconds: ReferenceSeconds = None,
    max_chunk: MaxChunk = None,
    drop_loaded: Annotated[
        bool, typer.Option("--drop-loaded", help="The fp32 weights are let go of once fewer bits are made.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say what serving a model takes, before it is loaded: weights, KV cache, workspace, and what fits."""
    has = bytes_of("--memory", memory)
    for option, given, least in (("--requests", requests, 1), ("--window", window, 1), ("--sinks", sinks, 0)):
        at_least(option, given, least)
    if requests > MOST_REQUESTS:
        raise InputError(f"--requests {requests}: up to {MOST_REQUESTS} are planned together; give at most as many")
    setting = Setting(
        backend=_one_of("--backend", backend, ("off", "eager", "compile", "graph", "graph+compile")),
        precision=None if precision is None else _one_of("--precision", precision, get_args(Precision)),
        kv_dtype=None if kv_dtype is None else _KV_DTYPES[_one_of("--kv-dtype", kv_dtype, tuple(_KV_DTYPES))],
        requests=requests,
        policy=_policy(window, sinks, kv_budget),
        quantization=bits,
        vocoder=vocoder_setting(vocoder, vocoder_precision, reference_seconds, max_chunk),
    )
    _one_of("--device", device, get_args(Device))
    found = subject(model)
    asked = _Asked(found, setting, context, device, not drop_loaded)  # type: ignore[arg-type]
    made, fit = asked.planned(length, has)
    notes = _notes(made, setting, found)
    if as_json:
        print_json(made.to_dict() | {"notes": notes} | ({} if fit is None else {"room": asdict(fit)}))
    else:
        _show(made, fit, notes)
    if fit is not None and not fit.fits:
        raise CheckFailed(_lacks(made, fit))


@dataclass(frozen=True)
class _Asked:
    """What is planned: requests on a model, in one way, on a device."""

    found: ModelTarget
    setting: Setting
    context: int | None
    device: Device
    keep_loaded: bool

    def planned(self, length: int | None, has: int | None) -> tuple[MemoryPlan, Room | None]:
        """What requests of so many tokens take, and what so many bytes have room for, if they are given."""
        most = self.found.longest(self.setting)
        if length is None:
            length = _LENGTH if most is None else min(_LENGTH, most)
        with progress().status("running the model without its weights …"):
            made = self._of(self.setting.requests, length, self.context, None)

            def again(requests: int, length: int) -> MemoryPlan:
                own = self.context if self.context is not None and self.context < length else None
                return self._of(requests, length, own, made.process)

            return made, None if has is None else room(made, has, again, self.found.shortest + 1, most)

    def _of(self, requests: int, length: int, context: int | None, process: int | None) -> MemoryPlan:
        return plan(
            self.found,
            replace(self.setting, requests=requests),
            length,
            context=context,
            device=self.device,
            process=process,
            keep_loaded=self.keep_loaded,
        )


def _one_of(option: str, given: str, known: tuple[str, ...]) -> Any:
    if given not in known:
        raise InputError(f"{option} {given}: give one of {', '.join(known)}")
    return given


def _policy(window: int | None, sinks: int | None, kv_budget: str | None) -> SizePolicy | None:
    if window is not None and kv_budget is not None:
        raise InputError("--window and --kv-budget: give one of them")
    if window is None and sinks is not None:
        raise InputError(f"--sinks {sinks}: they stand before a window; give --window as well")
    if kv_budget is not None:
        return MaxBytes(bytes_of("--kv-budget", kv_budget) or 0)
    return None if window is None else SlidingWindow(window, sinks or 0)


def _notes(made: MemoryPlan, setting: Setting, found: ModelTarget) -> list[str]:
    """What is not in the figures, and what is other than asked for."""
    notes = []
    if made.fallback is not None:
        notes.append(f"decoded by the token loop: {made.fallback}")
    if isinstance(setting.policy, SlidingWindow) and setting.policy.limit > made.length and made.fallback is None:
        notes.append(
            f"a request of {made.length} tokens never fills its window of {setting.policy.limit}, which is reserved all the "
            "same: give a shorter --window, or leave it out"
        )
    if made.device == "cpu" and made.process is None:
        notes.append("not in it: Python and its libraries: this system does not tell what a process holds")
    if made.device == "cuda":
        notes.append(
            "not in it: what the CUDA context, libraries' workspaces, captured graphs and the allocator's rounding take on the "
            "GPU; not yet measured"
        )
    if found.speaks and setting.vocoder is None:
        notes.append("not in it: the vocoder, which makes audio of the tokens; give --vocoder own")
    if setting.vocoder is not None:
        notes.append(
            "the vocoder is planned with as many chunks in a run as a scheduler puts together, and for its weights to stay beside all that is made of them"
        )
    if "compile" in setting.backend:
        notes.append("not in it: torch's compiler while it compiles; not yet measured")
    if made.device == "cpu" and (setting.backend == "off" or made.fallback is not None):
        notes.append(
            "the token loop may run in a thread, for which glibc keeps memory apart, some hundred MiB: set MALLOC_ARENA_MAX=1"
        )
    if made.parts["weights as loaded"]:
        notes.append(
            "the weights as loaded stay beside those in fewer bits; they go when nothing holds the loaded model and kvcache.memory.malloc_trim() is called (--drop-loaded)"
        )
    if made.device == "cpu":
        notes.append("loading a model may take more for a moment; a CPU's cache counts as it is written to")
    return notes


def _show(made: MemoryPlan, fit: Room | None, notes: list[str]) -> None:
    shown = table(
        f"{made.model}: {_requests(made.requests)} of {made.length} tokens on {made.device}",
        "",
        "what",
        "bytes",
        "share",
        right=2,
    )
    parts = [(name, size, colour) for (name, size), colour in zip(made.parts.items(), _COLOURS, strict=True) if size]
    for name, size, colour in parts:
        shown.add_row(Text(bar(1, 2), style=colour), name, shown_bytes(size), f"{size / made.total:.1%}")
    shown.add_section()
    shown.add_row("", "at most", shown_bytes(made.total), "100.0%")
    display(shown)
    console().print(_drawn(parts, made.total if fit is None else max(made.total, fit.memory)))
    display(
        f"In the end the caches reserve {shown_bytes(made.kv)} ({made.kv:,} bytes), as their report says; a request begins with "
        f"{made.context} tokens"
    )
    display(*notes, style="dim")
    if fit is not None:
        display(_room(made, fit), style="green" if fit.fits else "red")


def _drawn(parts: list[tuple[str, int, str]], whole: int) -> Text:
    """The parts side by side, each as long as its share of the whole; what is free comes last."""
    width, begun, drawn = min(_BAR, console().width), 0, Text()
    for _, size, colour in parts:
        begun += size
        drawn.append(bar((round(width * begun / whole) - len(drawn)) / width, width), style=colour)
    return drawn.append(bar((width - len(drawn)) / width, width, "░").replace("#", "."), style="grey30")


def _requests(count: int) -> str:
    return "1 request" if count == 1 else f"{count} requests"


def _room(made: MemoryPlan, fit: Room) -> str:
    has, requests = shown_bytes(fit.memory), _requests(fit.requests) + (" or more" if fit.or_more else "")
    if not fit.requests and not fit.length:
        if not fit.alone:
            return f"{has} is too little for any request"
        return f"{has} has room for no request of {made.length} tokens, but for 1 request of {fit.alone}"
    length = f"{fit.length} tokens" + (", all that the model goes up to" if fit.longest else "")
    return (
        f"{has} has room for {requests} of {made.length} tokens, or for "
        f"{_requests(made.requests)} of {length if fit.length else 'no length'}"
    )


def _lacks(made: MemoryPlan, fit: Room) -> str:
    does = []
    if fit.requests:
        does.append(f"--requests {fit.requests}")
    if fit.length:
        does.append(f"--length {fit.length}")
    if fit.alone:
        does.append(f"--requests 1 --length {fit.alone}")
    if made.parts["weights as loaded"]:
        does.append("--drop-loaded")
    does.append(f"--memory {-(-made.total // 2**20)}MiB")
    return f"does not fit: it takes {shown_bytes(made.total)}, there are {shown_bytes(fit.memory)}; try {' or '.join(does)}"
