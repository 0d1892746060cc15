"""How accounts are shown: rich tables, HTML for notebooks, JSON, and the figures of matplotlib."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from kvcache.errors import InputError

if TYPE_CHECKING:
    from kvcache.memory import CacheReport

COLUMNS = ("layers", "seen", "kept", "evicted", "slots", "MiB", "policy")


def report_rows(report: "CacheReport") -> list[tuple[str, ...]]:
    """A line for each run of layers that are alike, in the order of `COLUMNS`."""
    rows, start = [], 0
    for i, layer in enumerate(report.layers):
        if i + 1 == len(report.layers) or report.layers[i + 1] != layer:
            span = f"{start}" if start == i else f"{start}-{i}"
            size = layer.nbytes * (i + 1 - start) / 2**20
            kept = (
                f"{min(layer.heads)}-{layer.stored}"
                if layer.heads and min(layer.heads) < layer.stored
                else layer.stored
            )
            counts = (layer.seen, kept, layer.evicted, layer.capacity)
            rows.append((span, *map(str, counts), f"{size:.1f}", layer.policy))
            start = i + 1
    return rows


def headline(report: "CacheReport") -> str:
    """What it all comes to."""
    if not report.enabled:
        return "KV cache disabled: every token is recomputed"
    held = f"{report.nbytes / 2**20:.1f} MiB in {len(report.layers)} layers"
    return f"{report.seen} tokens seen, {report.stored} kept, {held}"


def footers(report: "CacheReport") -> list[str]:
    """What is to be said below the table."""
    said = [("decoded by", report.backend), ("not as asked", report.fallback)]
    return [f"{name}: {text}" for name, text in said if text is not None]


def report_text(report: "CacheReport") -> str:
    """In plain text."""
    if not report.enabled:
        return headline(report)
    rows = (" ".join(f"{cell:>8}" for cell in row[:-1]) + f"  {row[-1]}" for row in (COLUMNS, *report_rows(report)))
    return "\n".join((headline(report), *rows, *footers(report)))


def report_rich(report: "CacheReport") -> Any:
    """As what `rich.print` shows.

    Raises:
        InputError: without rich.
    """
    try:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text
    except ModuleNotFoundError as error:
        raise InputError("this view needs rich; run: pip install rich") from error
    if not report.enabled:
        return Text(headline(report))
    table = Table(title=Text(headline(report)), title_justify="left")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in ("layers", "policy") else "right")
    for row in report_rows(report):
        table.add_row(*map(Text, row))
    return Group(table, *(Text(line) for line in footers(report)))


def text_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in plain text; its first column is aligned to the left."""
    lines = [columns, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    shown = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join([title, *shown])


def html_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], below: Sequence[str] = ()) -> str:
    """A table for notebooks; everything in it is escaped."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    head = f"<caption style='caption-side: top; text-align: left'>{html.escape(title)}</caption>"
    body = "".join(line(row, "td") for row in rows)
    table = f"<table>{head}<thead>{line(columns, 'th')}</thead><tbody>{body}</tbody></table>" if rows else ""
    said = "".join(f"<p>{html.escape(text)}</p>" for text in ([] if rows else [title]) + list(below))
    return f"<div>{table}{said}</div>"


def report_html(report: "CacheReport") -> str:
    """For notebooks."""
    return html_table(headline(report), COLUMNS, report_rows(report), footers(report))


def report_dict(report: "CacheReport") -> dict[str, Any]:
    """Of plain numbers, strings, lists and dicts, as JSON has them: totals, then layer by layer."""
    totals = {name: getattr(report, name) for name in ("nbytes", "seen", "stored", "evicted")}
    layers = [{**asdict(layer), "heads": list(layer.heads)} for layer in report.layers]
    about: Mapping[str, Any] = {
        "enabled": report.enabled,
        "backend": report.backend,
        "fallback": report.fallback,
    }
    return {**totals, **about, "layers": layers}


def canvas(*, width: float = 8.0, height: float = 4.0) -> tuple[Any, Any]:
    """A figure with one pair of axes, drawn without a display and not known to pyplot, so nothing has to close it.

    Raises:
        InputError: without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise InputError("plots need matplotlib; run: pip install 'kvcache[plot]'") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()
