"""Draws the figures of the documentation into `docs/img/`, from `benchmarks/results/` and from kvcache itself.

    python docs/generate/figures.py            # all
    python docs/generate/figures.py gain       # one

Each figure is a function of this file that returns what it shows; that is also written into the file, as its description, so
that a test can tell whether a figure is still what the results say.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measured import ROOT, Result, Row, results, times
from tables import NAMES, tokens_shown

FOLDER = ROOT / "docs" / "img"
SIDES = {  # of t3_decode
    "upstream's loop": ("upstream's loop", "fp32"),
    "its loop, our cache": ("upstream's loop, our cache", "fp32"),
    "ours, eager": ("ours, eager", "fp32"),
    "ours, compiled": ("ours, compile", "fp32"),
    "ours, compiled, bf16": ("ours, compile", "bf16"),
    "ours, compiled, int8": ("ours, compile", "int8"),
}
BLUE, ORANGE, GREEN, GREY, RED = "#3f6fb5", "#e08a2e", "#4d9a5b", "#b8b8b8", "#c0504d"

Shown = dict[str, Any]
Drawing = Callable[[dict[str, Result], Figure], Shown]
DRAWINGS: dict[str, tuple[tuple[float, float], Drawing]] = {}
NEEDED: dict[str, str] = {}


def figure(width: float, height: float, needs: str | None = None) -> Callable[[Drawing], Drawing]:
    """Enter a drawing under its name, with its size in inches.

    Args:
        needs: a result that may not be there yet: until then it is not drawn.
    """

    def enter(drawing: Drawing) -> Drawing:
        DRAWINGS[drawing.__name__] = ((width, height), drawing)
        if needs is not None:
            NEEDED[drawing.__name__] = needs
        return drawing

    return enter


def drawable(found: dict[str, Result]) -> list[str]:
    """The figures whose results are there."""
    return [name for name in DRAWINGS if name not in NEEDED or NEEDED[name] in found]


def drawn(name: str, found: dict[str, Result], folder: Path | None = None) -> Shown:
    """Draw a figure, into this folder if there is one; what it shows."""
    size, drawing = DRAWINGS[name]
    style = {"font.size": 9, "svg.hashsalt": name, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(style):
        made = pyplot.figure(figsize=size, layout="constrained")
        shown = drawing(found, made)
        if folder is not None:
            about = {"Date": None, "Title": name, "Description": json.dumps(shown, ensure_ascii=False)}
            made.savefig(folder / f"{name}.svg", metadata=about)
        pyplot.close(made)
    return shown


# ---------------------------------------------------------------------- what it brings


@figure(8, 4.6)
def gain(found: dict[str, Result], made: Figure) -> Shown:
    """The picture of the README: how many times sooner, each against doing without."""
    decode, text, first = (found[name] for name in ("t3_decode", "long_text", "voice_ttft"))

    def known(case: str) -> float:
        return round(first.row(case=case, prefix="from memory")["computed / this"], 2)

    def spoken(side: str) -> float:
        return round(text.row(side=side)["upstream / this"], 2)

    same, fewer = "the same answer, fp32", "int8, which costs SmolLM2 0.8 % of perplexity"
    shown = {
        f"a token, {NAMES[variant]}, {context} in the cache": {
            label: round(row["upstream / this"], 2)
            for label, precision in ((same, "fp32"), (fewer, "int8"))
            for row in decode.of(variant=variant, context=context, side="ours, compile", precision=precision)
        }
        for variant, context in tokens_shown(decode)
    }
    shown |= {
        f"a long text, {text.data['segments']} segments together": {
            same: spoken("ours, together, fp32"),
            fewer: spoken("ours, together, int8, compiled"),
        },
        "first token, English, known voice": {same: known("english_cfg")},
        "first token, Turbo, known voice": {same: known("turbo")},
        "first token, SmolLM2, known prompt": {same: known("smollm2")},
    }
    lost = found["fidelity"].row(way="decode", precision="int8", cache="bf16")["over fp32's"]
    if f"{100 * (lost - 1):.1f} %" not in fewer:
        raise ValueError(f"int8 costs {100 * (lost - 1):.1f} % of perplexity; the legend says {fewer!r}")
    axis = made.add_subplot()
    at = 0.0
    ticks = []
    for bars in shown.values():
        start = at
        for label, value in bars.items():
            axis.barh(at, value, 0.8, color=BLUE if label == same else ORANGE)
            axis.text(value + 0.08, at, times(value), va="center", fontsize=9)
            at += 0.85
        ticks.append((start + at - 0.85) / 2)
        at += 0.55
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_yticks(ticks, list(shown))
    axis.invert_yaxis()
    axis.set_xlim(0, 10.5)
    axis.set_xlabel("times as fast as upstream's loop, or as computing it again (the line at 1)")
    handles = [Rectangle((0, 0), 1, 1, color=color) for color in (BLUE, ORANGE)]
    axis.legend(handles, [same, fewer], loc="upper right", frameon=False)
    made.suptitle("Measured on 2 cores of an Intel Xeon; T3's weights are random. GPU: not yet measured", fontsize=9)
    return shown


# ---------------------------------------------------------------------- what a listener hears


@figure(8, 3.6, needs="end_to_end")
def end_to_end(found: dict[str, Result], made: Figure) -> Shown:
    """When audio comes and when it is played, by side: the longest speech of each."""
    result = found["end_to_end"]
    colors = {"upstream": GREY, "fixed": RED, "exact": BLUE, "fast": GREEN}
    variants = list(dict.fromkeys(row["variant"] for row in result.rows))
    shown: Shown = {}
    for i, variant in enumerate(variants):
        axis = made.add_subplot(1, len(variants), i + 1)
        for row in _longest(result.of(variant=variant)):
            arrivals = _arrivals(result, row)
            came, played = _came(arrivals), _played(arrivals)
            color = colors.get(row["side"], "black")
            axis.plot(*zip(*came, strict=True), color=color, linewidth=1.4, label=row["how"])
            axis.plot(*zip(*played, strict=True), ":", color=color, linewidth=1.4)
            shown[f"{variant}, {row['side']}"] = {
                "first, s": round(arrivals[0][0], 2),
                "last, s": round(arrivals[-1][0], 2),
                "played, s": round(played[-1][0], 2),
                "audio, s": round(came[-1][1], 2),
                "chunks": len(arrivals),
            }
        axis.set_xscale("log")
        axis.tick_params(axis="x", which="minor", labelbottom=False)
        axis.set_xlabel("seconds since the request")
        axis.set_title(NAMES.get(variant, variant.capitalize()), fontsize=9)
        if i == 0:
            axis.set_ylabel("seconds of speech\nthat came (solid), were played (dotted)")
    handles = {label: line for axis in made.axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    made.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return shown


def _longest(rows: list[Row]) -> list[Row]:
    """Of each side the row with the longest speech."""
    most = {row["side"]: row for row in sorted((row for row in rows if row["n"]), key=lambda row: row["speech, s"])}
    return [most[side] for side in dict.fromkeys(row["side"] for row in rows) if side in most]


def _arrivals(result: Result, row: Row) -> list[list[float]]:
    """Times and seconds of audio of this row's chunks."""
    by_length = {
        sum(length for _, length in arrivals): arrivals
        for name, arrivals in result.data["arrivals"].items()
        if name.startswith(f"{row['variant']}, {row['side']}, ")
    }
    return list(by_length[min(by_length, key=lambda length: abs(length - row["speech, s"]))])


def _came(arrivals: list[list[float]]) -> list[tuple[float, float]]:
    """A corner of the steps before and behind each chunk."""
    corners, audio = [], 0.0
    for at, length in arrivals:
        corners += [(at, audio), (at, audio + length)]
        audio += length
    return corners


def _played(arrivals: list[list[float]]) -> list[tuple[float, float]]:
    """What has been played: level where there was nothing to play, and curved only by the axis."""
    points, audio, ends = [], 0.0, arrivals[0][0]
    for at, length in arrivals:
        begin = max(at, ends)
        points += [(ends, audio), (begin, audio)]
        points += [(begin + length * part / 20, audio + length * part / 20) for part in range(1, 21)]
        audio, ends = audio + length, begin + length
    return points


# ---------------------------------------------------------------------- where the time goes


def parts_of_a_step(decode: Result, variant: str) -> dict[tuple[str, int], tuple[float, float, float]]:
    """Milliseconds of a step, by side and context: to read the weights, to read keys and values, and all else.

    The floor (see the page on benchmarks) is a line over the context: at no context it is the weights alone.
    """
    parts = {}
    for label, (side, precision) in SIDES.items():
        rows = decode.of(variant=variant, side=side, precision=precision)
        floor = {row["context"]: row["ms/token"] * row["floor, %"] / 100 for row in rows}
        low, high = min(floor), max(floor)
        per_token = (floor[high] - floor[low]) / (high - low)
        weights = floor[low] - per_token * low
        for row in rows:
            cache = per_token * row["context"]
            parts[label, row["context"]] = (weights, cache, row["ms/token"] - weights - cache)
    return parts


@figure(8, 3.8)
def step_parts(found: dict[str, Result], made: Figure) -> Shown:
    """What a token's time consists of, with a short and with a long context."""
    parts = parts_of_a_step(found["t3_decode"], "english")
    contexts = sorted({context for _, context in parts})
    shown = {}
    for i, context in enumerate((contexts[0], contexts[-1])):
        axis = made.add_subplot(1, 2, i + 1)
        for at, label in enumerate(SIDES):
            left = 0.0
            for value, color in zip(parts[label, context], (GREY, BLUE, ORANGE), strict=True):
                axis.barh(at, value, 0.7, left=left, color=color)
                left += value
            axis.text(left + 3, at, f"{left:.0f}", va="center", fontsize=8)
            shown[f"{label}, {context}"] = [round(value, 1) for value in parts[label, context]]
        axis.set_yticks(range(len(SIDES)), list(SIDES) if i == 0 else [""] * len(SIDES))
        axis.invert_yaxis()
        axis.set_xlim(0, 235)
        axis.set_xlabel("ms a token")
        axis.set_title(f"{context} tokens in the cache", fontsize=9)
        if i == 1:
            handles = [Rectangle((0, 0), 1, 1, color=color) for color in (GREY, BLUE, ORANGE)]
            names = ["reading the weights", "reading keys and values", "all else: copies, arithmetic, Python"]
            made.legend(handles, names, loc="outside lower center", ncols=3, frameon=False)
    return shown


@figure(7, 3.8)
def amdahl(found: dict[str, Result], made: Figure) -> Shown:
    """What can be gained of a whole by making a part of it faster, and where the first plan and our cache stand."""
    parts = parts_of_a_step(found["t3_decode"], "english")
    axis = made.add_subplot()
    shares = [share / 1000 for share in range(501)]
    for times_faster, line in ((2, ":"), (4, "--"), (math.inf, "-")):
        gains = [100 * (1 - 1 / _speedup(share, times_faster)) for share in shares]
        label = "free" if math.isinf(times_faster) else f"{times_faster}× as fast"
        axis.plot([100 * share for share in shares], gains, line, color="black", linewidth=1, label=label)
    axis.axhspan(15, 25, color=GREEN, alpha=0.25)
    axis.text(0.7, 20, "planned: 15–25 % less", va="center", color="#2c6b39", fontsize=8)
    axis.axhline(0.6, color=RED, linewidth=1)
    axis.text(49, 2.4, "got: 0.6 %", ha="right", color=RED, fontsize=8)
    shown: Shown = {}
    for context in sorted({context for _, context in parts}):
        weights, cache, rest = parts["upstream's loop", context]
        whole = weights + cache + rest
        saved = whole - sum(parts["its loop, our cache", context])
        share, won = 100 * (cache + saved) / whole, 100 * saved / whole
        shown[str(context)] = {"reading, %": round(100 * cache / whole, 1), "with copies, %": round(share, 1), "won, %": round(won, 1)}  # fmt: skip
        axis.plot(share, won, "o", color=BLUE)
        axis.annotate(f"{context} tokens", (share, won), (6, -9), textcoords="offset points", fontsize=8, color=BLUE)
    axis.plot([], [], "o", color=BLUE, label="ours, measured")
    axis.set_xlim(0, 60)
    axis.set_ylim(0, 52)
    axis.set_xlabel("share of the time that the cache has: reading it and copying it, %")
    axis.set_ylabel("less time for the whole, %")
    axis.legend(title="the cache is", loc="upper left", frameon=False, fontsize=8)
    return shown


def _speedup(share: float, faster: float) -> float:
    """Amdahl's law."""
    return 1 / (1 - share + share / faster)


# ---------------------------------------------------------------------- how it works


@figure(8, 3.4)
def window(found: dict[str, Result], made: Figure) -> Shown:
    """Which token is in which slot, step by step: a window of 6 with 2 sinks, as `KVLayer` has it."""
    import torch

    from kvcache import KVLayer, SlidingWindow

    layer = KVLayer(SlidingWindow(6, sinks=2))
    axis = made.add_subplot()
    steps = 16
    shown = {}
    for step in range(steps):
        layer.append(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2))
        held = layer.positions()[0].tolist()
        shown[str(step)] = held
        for slot, position in enumerate(held):
            color = GREEN if position < 2 else ORANGE if position == step else "#c9d6ea"
            axis.add_patch(Rectangle((step, slot), 0.92, 0.88, color=color))
            axis.text(step + 0.46, slot + 0.46, str(position), ha="center", va="center", fontsize=8)
    axis.set_xlim(0, steps)
    axis.set_ylim(8, -0.1)
    axis.set_xticks([step + 0.46 for step in range(steps)], [str(step) for step in range(steps)])
    axis.set_yticks([slot + 0.46 for slot in range(8)], [f"slot {slot}" for slot in range(8)])
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    axis.set_xlabel("after token")
    handles = [Rectangle((0, 0), 1, 1, color=color) for color in (GREEN, "#c9d6ea", ORANGE)]
    made.legend(handles, ["sinks: never leave", "the window", "written in this step"], loc="outside upper right", ncols=3, frameon=False)  # fmt: skip
    return shown


@figure(8, 3.2)
def endless(found: dict[str, Result], made: Figure) -> Shown:
    """Perplexity along a text of 100,000 tokens through a window, by how sinks are placed."""
    result = found["endless"]
    axis = made.add_subplot()
    shown = {}
    looks = {"absolute": (RED, "absolute positions"), "rerotated": (BLUE, "re-rotated"), "control": ("black", "control: no cache, 1,024–2,048 tokens")}  # fmt: skip
    for name, (color, label) in looks.items():
        values = [math.exp(loss / 1000) for loss in result.data["nll_per_1000"][name]][2:]
        line = ":" if name == "control" else "-"
        axis.plot([2.5 + i for i in range(len(values))], values, line, color=color, linewidth=1.3, label=label)
        shown[name] = [round(values[0], 1), round(values[-1], 1)]
    axis.set_yscale("log")
    axis.set_xlabel("thousand tokens read")
    axis.set_ylabel("perplexity")
    axis.axvline(8.192, color="grey", linewidth=0.8)
    axis.text(7.7, 9000, "trained\nto here", fontsize=8, color="grey", va="top", ha="right")
    axis.set_xlim(0, 100)
    axis.legend(frameon=False, loc="lower right", fontsize=8, ncols=3, bbox_to_anchor=(1, 1))
    return shown


@figure(8, 2.6)
def distances(found: dict[str, Result], made: Figure) -> Shown:
    """How far a token sees the sinks and the window from, with absolute and with re-rotated positions."""
    shown = {}
    axes = made.subplots(1, 2, sharey=True)
    limit, sinks = 260, 4
    for axis, (name, rerotated) in zip(axes, (("absolute", False), ("re-rotated", True)), strict=True):
        steps = list(range(0, 2001, 10))
        far = [min(step, limit - 1) if rerotated else step for step in steps]
        near = [min(step, limit - sinks - 1) for step in steps]
        axis.fill_between(steps, near, color="#c9d6ea", label="the window")
        axis.plot(steps, far, color=GREEN, linewidth=1.6, label="the first sink")
        axis.set_title(f"{name} positions", fontsize=9)
        axis.set_xlabel("token")
        shown[name] = {"sink": far[-1], "window": near[-1]}
    axes[0].set_ylabel("distance seen from")
    axes[0].legend(frameon=False, fontsize=8)
    return shown


@figure(8, 2.9)
def guidance(found: dict[str, Result], made: Figure) -> Shown:
    """A prefill of the English model with guidance: what is known of the voice, and what is run."""
    conditioning, text, speech = 34, 62, 2
    shown = {"rows": 2 * (conditioning + text + speech), "run": text + 2 * speech}
    axis = made.add_subplot()
    lines = (
        (0.0, "conditional row", ((conditioning, BLUE), (text, ORANGE), (speech, ORANGE))),
        (1.0, "unconditional row", ((conditioning, BLUE), (text, "#9db8df"), (speech, ORANGE))),
    )
    for at, _, pieces in lines:
        left = 0.0
        for width, color in pieces:
            axis.add_patch(Rectangle((left, at), width - 0.4, 0.7, color=color))
            left += width
    names = ((0, conditioning, "conditioning: 34"), (conditioning, text, "text: 62"), (conditioning + text, speech, "start of\nspeech: 2"))  # fmt: skip
    for left, width, name in names:
        axis.text(left + width / 2, -0.15, name, ha="center", va="bottom", fontsize=8)
    axis.text(
        conditioning / 2, 0.35, "computed once,\nfor both rows", ha="center", va="center", fontsize=8, color="white"
    )
    axis.text(conditioning / 2, 1.35, "the same", ha="center", va="center", fontsize=8, color="white")
    axis.text(conditioning + text / 2, 0.35, "run: the words", ha="center", va="center", fontsize=8)
    axis.text(conditioning + text / 2, 1.35, "zeros and positions: the same for every text of this length", ha="center", va="center", fontsize=8)  # fmt: skip
    axis.set_xlim(0, 104)
    axis.set_ylim(1.9, -0.6)
    axis.set_yticks([0.35, 1.35], [name for _, name, _ in lines])
    axis.set_xticks([])
    for spine in axis.spines.values():
        spine.set_visible(False)
    axis.tick_params(length=0)
    handles = [Rectangle((0, 0), 1, 1, color=color) for color in (BLUE, "#9db8df", ORANGE)]
    labels = [
        "known of the voice",
        "known of the voice, cut to the text's length",
        f"run: {shown['run']} of {shown['rows']} tokens",
    ]
    axis.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=3, frameon=False, fontsize=8)
    return shown


@figure(8, 3.6)
def capture(found: dict[str, Result], made: Figure) -> Shown:
    """Host and device in the usual loop and in the decode engine; a sketch, not a measurement."""
    axes = made.subplots(2, 1)
    _lanes(axes[0], "the usual loop: the host has a hand in every token", looks=True)
    _lanes(axes[1], "the decode engine, 4 tokens a chunk: a recorded step, replayed", looks=False)
    return {"sketch": True}


def _lanes(axis: Axes, title: str, looks: bool) -> None:
    host, device = 1.0, 0.0

    def box(lane: float, left: float, width: float, color: str, text: str = "") -> None:
        axis.add_patch(Rectangle((left, lane), width, 0.7, facecolor=color, edgecolor="white"))
        axis.text(left + width / 2, lane + 0.35, text, ha="center", va="center", fontsize=7)

    if looks:
        for i in range(4):
            start = 5.0 * i
            box(host, start, 2.6, ORANGE, "launch kernels,\nconcatenate")
            box(device, start + 0.4, 3.2, BLUE, f"token {i + 1}")
            box(host, start + 3.6, 1.2, RED, "wait,\nlook")
    else:
        box(host, 0, 1.4, GREY, "draw\nnoise")
        for i in range(4):
            box(host, 1.5 + 0.3 * i, 0.25, ORANGE)
            box(device, 1.7 + 3.2 * i, 3.2, BLUE, f"token {i + 1}")
        axis.text(2.8, host + 0.35, "4 replays", va="center", fontsize=7)
        box(host, 14.5, 1.2, RED, "look\nonce")
    axis.set_xlim(0, 20)
    axis.set_ylim(-0.15, 1.8)
    axis.set_yticks([device + 0.35, host + 0.35], ["device", "host"])
    axis.set_xticks([])
    axis.set_xlabel("time (a sketch, not a measurement)", fontsize=8)
    axis.set_title(title, fontsize=9, loc="left")
    axis.tick_params(length=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="FIGURE", help=f"some of {', '.join(DRAWINGS)} (default: all)")
    found = results()
    names = parser.parse_args().names or drawable(found)
    if unknown := set(names) - set(DRAWINGS):
        parser.error(f"there is no figure {', '.join(sorted(unknown))}; there are {', '.join(DRAWINGS)}")
    FOLDER.mkdir(exist_ok=True)
    for name in names:
        drawn(name, found, FOLDER)
        print(FOLDER / f"{name}.svg")


if __name__ == "__main__":
    main()
