"""The tables of the pages on planning, profiling, tuning and watching."""

from measured import Result, digits, ms, quartiles, signed, table

MODELS = {
    "chatterbox-english": "English 520M",
    "chatterbox-turbo": "Turbo",
    "chatterbox-nano": "Nano 110M",
    "smollm2": "SmolLM2-135M",
}


# ---------------------------------------------------------------------- planning


def plans(result: Result) -> str:
    header = ["model", "decoded in", "requests of tokens", "KV, bytes, predicted and held"]
    header += ["peak, MiB: predicted", "measured", "ratio", "while loading"]
    return table(
        header,
        [
            [
                MODELS[row["model"]],
                row["decoded"],
                f"{row['requests']} of {row['tokens']}",
                _both(row["KV predicted, bytes"], row["KV held, bytes"]),
                f"{row['peak predicted, MiB']:.0f}",
                f"{row['peak measured, MiB']:.0f}",
                f"{row['ratio']:.3f}",
                f"{row['loading, MiB']:.0f}",
            ]
            for row in result.rows
        ],
        words=2,
    )


def _both(predicted: str, held: str) -> str:
    """Two figures, as one where they are the same."""
    return predicted if predicted == held else f"{predicted}, but {held}"


def farthest(result: Result, *, loop: bool, arena: bool = False) -> str:
    """How far the predicted peaks are off, of the token loop or of the engine: −4.2 to +0.2 %."""
    rows = [row for row in result.rows if ("token loop" in row["decoded"]) == loop]
    return reach([100 * (row["ratio"] - 1) for row in rows if ("one arena" in row["decoded"]) == arena])


def reach(values: list[float]) -> str:
    """From the least to the most of some per cent."""
    least, most = signed(min(values)), signed(max(values))
    return least if least == most else f"{least.removesuffix(' %')} to {most}"


# ---------------------------------------------------------------------- profiling

_SHARES = {
    "q, k, v, o, %": "products of attention",
    "scores, %": "queries against the cache",
    "cache update, %": "cache update",
    "MLP, %": "MLP",
    "rest of model, %": "rest of the model",
}


def shares(result: Result) -> str:
    header = ["model and setting", "ms a step", *_SHARES.values(), "sampling, host", "most by a cache", "KV, of memory"]
    return table(
        header,
        [
            [
                f"{row['model']}, {row['context']} tokens, {row['setting']}",
                ms(row["ms/step"]),
                *(f"{row[column]:.1f} %" for column in _SHARES),
                f"{row['sampling, %'] + row['host, %']:.1f} %",
                f"{row['most by a cache, %']:.1f} %",
                f"{row['KV, % of memory']:.1f} %",
            ]
            for row in result.rows
        ],
    )


def between(result: Result, column: str, places: int) -> str:
    """From the least to the most of a column of per cent."""
    values = [row[column] for row in result.rows]
    return f"{min(values):.{places}f} to {max(values):.{places}f} %"


def outside(result: Result) -> str:
    independent = "by torch's profiler, MiB"
    rows = [row for row in result.rows if row[independent] is not None]
    header = ["model", "tokens", "of torch, MiB: kvcache", "torch's profiler", "difference"]
    header += ["the process, MiB: profiled", "plain"]
    return table(
        header,
        [
            [
                row["model"],
                str(row["context"]),
                f"{row['outside attention, of torch, MiB']:.1f}",
                f"{row[independent]:.1f}",
                signed(row["difference, %"], 2),
                f"{row['resident MiB']:.0f}",
                f"{row['resident MiB, plain']:.0f}",
            ]
            for row in rows
        ],
    )


# ---------------------------------------------------------------------- tuning


def tuned(result: Result) -> str:
    header = ["setting", "chosen by", "ms a token (quartiles)", "in the sweep"]
    return table(
        header,
        [
            [
                row["setting"],
                row["chosen by"],
                quartiles(row, "ms/token", form=digits),
                digits(row["in the sweep"]),
            ]
            for row in result.rows
        ],
        words=2,
    )


# ---------------------------------------------------------------------- watching

_SIDES = {
    "no hooks": "no hooks",
    "off": "nobody listens",
    "off, again": "nobody listens, a second time",
    "on": "metrics, a callback, and a timeline 20 times a second",
}


def watched(result: Result) -> str:
    header = ["", "ms of the clock a step (quartiles)", "more", "ms of the processor (quartiles)", "more"]
    lines = []
    for side, name in _SIDES.items():
        row = result.row(side=side)
        line = [name]
        for what in ("of the clock", "of the processor"):
            of = f"ms {what}, "
            line.append(quartiles(row, f"{of}median", f"{of}q1", f"{of}q3"))
            line.append("–" if side == "no hooks" else signed(row[f"more {what}, %"], 2))
        lines.append(line)
    return table(header, lines)


def part(result: Result) -> str:
    """The hooks alone, as a share of a step."""
    return f"{100 / result.ratios['a step over the hooks alone']:.4f} %"
