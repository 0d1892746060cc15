"""How accounts are shown: tables in plain text and in HTML for notebooks, and the figures of matplotlib."""

import html
from collections.abc import Sequence
from typing import Any

from kvcache.errors import MissingDependencyError


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


def canvas(*, width: float = 8.0, height: float = 4.0) -> tuple[Any, Any]:
    """A figure with one pair of axes, drawn without a display and not known to pyplot, so nothing has to close it.

    Raises:
        MissingDependencyError: without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MissingDependencyError("plots need matplotlib; run: pip install 'kvcache[plot]'") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()
