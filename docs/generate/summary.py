"""What kvcache brings, in one table of ten lines: at the top of the page on benchmarks, and in the README."""

from collections.abc import Callable

from measured import Result, Row, digits, ms, table, times
from tables import ENGLISH, NAMES, NANO

Line = tuple[str, str, str, float, str]  # what; without; with; how many times better; the section that tells more


def ten_lines(result: Callable[[str], Result], page: str = "") -> str:
    """The table of the results by name; `page` is where its sections are, as seen from the page that shows it."""
    lines = [
        *_speech(result("end_to_end")),
        *_tokens(result("t3_decode")),
        *_requests(result("long_text"), result("voice_ttft")),
        *_fewer_bits(result("compressed_step")),
    ]
    rows = [[_linked(what, f"{page}#{section}"), slow, fast, times(gain)] for what, slow, fast, gain, section in lines]
    return table(["", "without", "with kvcache", "gain"], rows)


def _linked(what: str, address: str) -> str:
    """What stands before the colon leads to the section."""
    subject, colon, how = what.partition(":")
    return f"[{subject}]({address}){colon}{how}"


def processors(result: Callable[[str], Result]) -> str:
    """What the lines were measured on."""
    names = ("end_to_end", "t3_decode", "long_text", "voice_ttft", "compressed_step")
    machines = {one.hardware.split(",")[0]: one.data["machine"]["cores"] for one in map(result, names)}
    return " and ".join(f"an {name} ({cores} cores)" for name, cores in sorted(machines.items()))


def _speech(result: Result) -> list[Line]:
    section = "what-a-listener-waits-for"

    def longest(variant: str, side: str) -> Row:
        return max(result.of(variant=variant, side=side), key=lambda row: row["speech, s"])

    def line(variant: str, side: str, column: str, what: str, how: str, unit: str = "") -> Line:
        slow, fast = (longest(variant, one)[column] for one in ("fixed", side))
        return f"{what}, {NAMES[variant]}: {how}", digits(slow) + unit, digits(fast) + unit, slow / fast, section

    rtf, changed = "seconds of work for a second of speech (RTF)", "settings that change the sound"
    return [
        line(ENGLISH, "exact", "RTF", rtf, "upstream's settings"),
        line(NANO, "fast", "RTF", rtf, changed),
        line(ENGLISH, "fast", "first audio, s", "first audio", changed, " s"),
    ]


def _tokens(result: Result) -> list[Line]:
    def line(context: int, side: str, precision: str, how: str) -> Line:
        slow = result.row(variant=ENGLISH, context=context, side="upstream's loop")
        fast = result.row(variant=ENGLISH, context=context, side=side, precision=precision)
        what = f"a token of T3, {NAMES[ENGLISH]}, {context} in the cache: {how}"
        figures = f"{ms(slow['ms/token'])} ms", f"{ms(fast['ms/token'])} ms"
        return what, *figures, fast["upstream / this"], "a-decode-step-in-every-way-there-is-to-run-it"

    contexts = [row["context"] for row in result.of(variant=ENGLISH)]
    return [
        line(min(contexts), "ours, compile", "fp32", "compiled, fp32"),
        line(max(contexts), "upstream's loop, our cache", "fp32", "our cache in upstream's loop"),
        line(max(contexts), "ours, compile", "int8", "compiled, int8"),
    ]


def _requests(text: Result, first: Result) -> list[Line]:
    slow, fast = text.rows[0], text.row(side="ours, together, fp32")
    again, known = (first.row(case="smollm2", prefix=prefix) for prefix in ("computed again", "from memory"))
    return [
        (
            f"a text of {text.data['segments']} segments, {NAMES[ENGLISH]}, decoded together, fp32",
            f"{digits(slow['s'])} s", f"{digits(fast['s'])} s", fast["upstream / this"], "a-long-text",
        ),
        (
            "the first token behind a known prompt, SmolLM2-135M",
            f"{again['ms, median']:.0f} ms", f"{known['ms, median']:.0f} ms", known["computed / this"],
            "the-first-token-of-a-known-voice-or-prompt",
        ),
    ]  # fmt: skip


def _fewer_bits(result: Result) -> list[Line]:
    part = "quantized, 8000"
    plain, int8 = result.row(part=part, side="DynamicCache, growing"), result.row(part=part, side="int8")
    held = "memory of a cache of 8,000 tokens, SmolLM2-135M: int8 beside `DynamicCache` in fp32"
    figures = [f"{row['MiB']:.0f} MiB" for row in (plain, int8)]
    steps = [f"{ms(row['ms/step'])} ms" for row in (plain, int8)]
    section = "what-reading-fewer-bits-costs-a-step"
    return [
        (held, figures[0], figures[1], plain["MiB"] / int8["MiB"], section),
        ("a token on each of these two", steps[0], steps[1], plain["ms/step"] / int8["ms/step"], section),
    ]
