"""The tables of the page on benchmarks, but for its first and those on smaller caches."""

from collections.abc import Sequence

from measured import Result, Row, cell, digits, quartiles, table, times

ENGLISH, NANO = "english", "nano"
NAMES = {ENGLISH: "English 520M", NANO: "Nano 110M"}


def by_context(result: Result, variant: str) -> str:
    """Milliseconds a token of every side of t3_decode, a column for each context."""
    rows = result.of(variant=variant)
    contexts = sorted({row["context"] for row in rows})
    sides = list(dict.fromkeys((row["side"], row["precision"]) for row in rows))
    lines = []
    for side, precision in sides:
        found = {row["context"]: row for row in rows if (row["side"], row["precision"]) == (side, precision)}
        longest = found[contexts[-1]]
        lines.append(
            [
                side,
                precision,
                *(f"{quartiles(row, 'ms/token')}, {times(row['upstream / this'])}" for _, row in sorted(found.items())),
                f"{longest['floor, %']:.0f} %",
                f"{longest['RTF']:.2f}",
            ]
        )
    return table(["side", "precision", *(f"{n} tokens" for n in contexts), "of the floor", "RTF"], lines, words=2)


def ablation(result: Result) -> str:
    rows: list[Row] = result.data["ablation"]
    return table(
        ["from the best side", "ms a token (quartiles)", "times the best's"],
        [[row["side"], quartiles(row, "ms/token", form=lambda x: f"{x:.1f}"), f"{row['cost']:.2f}"] for row in rows],
    )


def long_text(result: Result) -> str:
    header = [
        "side",
        "the text, s",
        "RTF",
        "upstream / this",
        "first chunk, s (quartiles)",
        "KV cache, MiB",
        "peak, MiB",
    ]
    lines = []
    for row in result.rows:
        first = "–"
        if row["first chunk, s"] is not None:
            first = quartiles(row, "first chunk, s", "first q1", "first q3", form=lambda x: f"{x:.2f}")
        whole = [f"{row[name]:.0f}" if row[name] is not None else "–" for name in ("KV MiB", "peak MiB")]
        lines.append([row["side"], digits(row["s"]), f"{row['RTF']:.2f}", times(row["upstream / this"]), first, *whole])
    return table(header, lines)


def fewer_bits(result: Result) -> str:
    """Prefill and decoding by precision; decoding with the cache that the engine takes by itself."""
    header = ["precision", "perplexity, prefill", "over fp32's", "KL"]
    header += ["perplexity, decode (bf16 cache; fp32: fp32)", "over fp32's", "KL", "same likeliest token"]
    lines = []
    for prefill in result.of(way="prefill"):
        precision = prefill["precision"]
        decode = result.row(way="decode", precision=precision, cache="fp32" if precision == "fp32" else "bf16")
        figures = [
            text
            for row in (prefill, decode)
            for text in (f"{row['perplexity']:.2f}", f"{row[_OVER]:.4f}", f"{row['KL per token']:.2g}")
        ]
        lines.append([precision, *figures, f"{decode['same argmax, %']:.1f} %"])
    return table(header, lines)


_OVER = "over fp32's"


def long_step(result: Result) -> str:
    lines = [
        [
            row["side"],
            quartiles(row, "ms/step, median", "ms/step, q1", "ms/step, q3"),
            f"{row['upstream / this']:.2f}",
        ]
        for row in result.rows
    ]
    return table(["loop and cache", "ms a step (quartiles)", "upstream's time / this"], lines)


CASES = {
    "turbo": "Turbo: 376 of voice, 30 of text",
    "nano": "Nano: the same, a smaller model",
    "english_cfg": "English, guidance in 2 rows: 34 of voice, 62 of text",
    "smollm2": "SmolLM2-135M: 500 of prompt, 20 of question",
}
PREFIXES = {
    "computed again": "computed again",
    "from memory": "from memory",
    "from disk": "from disk",
    "from disk, page cache dropped": "from disk, not in the page cache",
    "from Redis": "from Redis",
    "the rest alone": "the rest alone",
}


def first_token(result: Result, prefixes: Sequence[str] = tuple(PREFIXES)) -> str:
    lines = []
    for case, name in CASES.items():
        line = [name]
        for prefix in prefixes:
            row = result.row(case=case, prefix=prefix)
            text = quartiles(row, "ms, median", "ms, q1", "ms, q3", form=lambda x: f"{x:.0f}")
            ratio = times(row["computed / this"])
            if prefix != "computed again":
                text += f", **{ratio}**" if prefix == "from memory" else f", {ratio}"
            line.append(text)
        lines.append(line)
    return table(["tokens", *(PREFIXES[prefix] for prefix in prefixes)], lines)


def any_rows(result: Result) -> str:
    """All rows of a file that this page has no words of its own for."""
    return rows_of(result.rows)


def rows_of(rows: Sequence[Row]) -> str:
    """Rows as they are."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return table(columns, [[cell(row.get(column)) for column in columns] for row in rows])


def any_ratios(result: Result) -> str:
    return table(["ratio", "value"], [[name, digits(value, 4)] for name, value in result.ratios.items()])


# ---------------------------------------------------------------------- text to audio


def end_to_end(rows: Sequence[Row]) -> str:
    """What a listener waits for, a line for each side and length of speech."""
    header = [
        "",
        "side",
        "T3",
        "vocoder",
        "speech, s",
        "first audio, s",
        "new voice, s",
        "new process, s",
        "the whole, s (n)",
    ]
    header += ["RTF", "silence in all, s", "longest behind the first, s", "underruns", "peak, MiB"]
    lines = []
    for row in rows:
        whole = "–" if row["s"] is None else f"{digits(row['s'])} ({row['n']})"
        first = [digits(row[name]) for name in ("first audio, s", "new voice, s", "cold, s")]
        waits = [digits(row[name]) for name in ("RTF", "silence in all, s", "longest behind the first, s")]
        peak = "–" if row["peak, MiB"] is None else f"{row['peak, MiB']:.0f}"
        line = [_variant(row), row["how"], row["T3"], row["vocoder"], digits(row["speech, s"]), *first, whole, *waits]
        lines.append([*line, cell(row["underruns"]), peak])
    return table(header, lines, words=4)


def speech_shares(rows: Sequence[Row]) -> str:
    """Where the time of each side goes, in per cent."""
    parts = ("T3, %", "flow, %", "HiFT, %", "watermark, %", "host, %")
    lines = [
        [
            _variant(row),
            row["how"],
            digits(row["speech, s"]),
            *("–" if row[p] is None else f"{row[p]:.1f}" for p in parts),
        ]
        for row in rows
        if row["n"]
    ]
    return table(["", "side", "speech, s", *(part.removesuffix(", %") for part in parts)], lines, words=2)


def speech_sound(rows: Sequence[Row]) -> str:
    """What the settings that change the sound change, once each."""
    changed = {(row["variant"], row["vocoder"]): row for row in rows if row["mel distance"] is not None}
    lines = [
        [_variant(row), row["vocoder"], digits(row["mel distance"]), digits(row["log-spectral distance, dB"])]
        for row in changed.values()
    ]
    return table(["", "vocoder", "mel distance", "log-spectral distance, dB"], lines, words=2)


def speech_levers(rows: Sequence[Row]) -> str:
    """Each lever against what it differs from in one thing."""
    names = {(row["variant"], row["side"]): row["how"] for row in rows}
    lines = [
        [
            _variant(row), row["how"], row["T3"], row["vocoder"], names.get((row["variant"], row["over"]), "–"),
            digits(row["first audio, s"]), digits(row["RTF"]), digits(row["silence in all, s"]),
            times(row["this over / this"]), times(row["fixed / this"]), cell(row["n"]),
        ]
        for row in rows
    ]  # fmt: skip
    header = ["", "lever", "T3", "vocoder", "differs from", "first audio, s", "RTF", "silence in all, s"]
    return table([*header, "that one's time / this", "fixed / this", "n"], lines, words=5)


def speech_texts(rows: Sequence[Row]) -> str:
    """Texts of given lengths, by side."""
    lines = [
        [
            _variant(row), row["how"], cell(row["characters"]), cell(row["runs"]), digits(row["speech, s"]),
            digits(row["s"]), digits(row["RTF"]), "–" if row["peak, MiB"] is None else f"{row['peak, MiB']:.0f}",
        ]
        for row in rows
    ]  # fmt: skip
    return table(["", "side", "characters", "chunks", "speech, s", "s", "RTF", "peak, MiB"], lines, words=2)


def _variant(row: Row) -> str:
    return NAMES.get(row["variant"], row["variant"].capitalize())


def tokens_shown(decode: Result) -> list[tuple[str, int]]:
    """The variants and contexts that stand for the others: a short and a long one, and Nano's shortest."""
    contexts = {variant: [row["context"] for row in decode.of(variant=variant)] for variant in NAMES}
    return [
        (ENGLISH, min(contexts[ENGLISH])),
        (ENGLISH, max(contexts[ENGLISH])),
        (NANO, min(contexts[NANO])),
    ]
