"""The account of what a cache holds, and how that is shown."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from kvcache.cache._shape import layer_bytes
from kvcache.errors import MissingDependencyError
from kvcache.io import html_table

_COLUMNS = ("layers", "seen", "kept", "evicted", "slots", "MiB", "policy")


@dataclass(frozen=True)
class LayerReport:
    """One layer's account. `evicted` counts tokens that have left, per row; `capacity` counts slots.

    `heads` says how many tokens each KV head holds, where they differ; the other counts are then the fullest head's.
    """

    policy: str
    seen: int
    stored: int
    evicted: int
    capacity: int
    nbytes: int
    heads: tuple[int, ...] = ()


@dataclass(frozen=True, repr=False)
class CacheReport:
    """The account of a cache: what it has seen, what it holds and what that takes.

    Attributes:
        layers: those of self-attention, or of what stands in its place, one by one.
        cross: those that hold what attends to an encoder.
        enabled: False where everything is recomputed, and there is no cache.
        backend: what runs the decode steps, where that is the decode engine.
        fallback: why it is not what was asked for; None if it is.
        cut_off: of speech: which segments of the text have come to their most tokens without an end (``max_new_tokens``).
    """

    layers: tuple[LayerReport, ...]
    enabled: bool = True
    backend: str | None = None
    fallback: str | None = None
    cut_off: tuple[int, ...] = ()
    cross: tuple[LayerReport, ...] = field(default=(), repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held, over all layers."""
        return sum(layer.nbytes for layer in (*self.layers, *self.cross))

    @property
    def seen(self) -> int:
        """Tokens that went through, per row."""
        return max((layer.seen for layer in self.layers), default=0)

    @property
    def stored(self) -> int:
        """Tokens that the fullest layer holds, per row."""
        return max((layer.stored for layer in self.layers), default=0)

    @property
    def evicted(self) -> int:
        """Evictions, summed over the layers."""
        return sum(layer.evicted for layer in self.layers)

    def __repr__(self) -> str:
        said = "; ".join([_headline(self), *_footers(self)])
        return f"{type(self).__name__}({said})"

    def __str__(self) -> str:
        return _text(self)

    def __rich__(self) -> Any:
        return _rich(self)

    def _repr_html_(self) -> str:
        return _html(self)

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON has it: ``nbytes``, ``seen``, ``stored``, ``evicted``, … and ``layers``, one by one."""
        return _dict(self)


def account(layers: Sequence[Any], cross: Sequence[Any] = ()) -> CacheReport:
    """The report of a cache's layers, as `kvcache.models.cache_layers` and `cross_layers` list them."""
    return CacheReport(
        tuple(_layer_report(layer) for layer in layers), cross=tuple(_layer_report(layer) for layer in cross)
    )


def _layer_report(layer: Any) -> LayerReport:
    if (kv := getattr(layer, "kv", None)) is not None:
        return LayerReport(repr(kv.policy), kv.seen, kv.stored, kv.evicted, kv.capacity, kv.nbytes, kv.heads)
    keys: Any = getattr(layer, "keys", None)
    attends = isinstance(keys, Tensor) and keys.dim() == 4
    seen = layer.get_seq_length() if attends else 0
    stored = keys.shape[-2] if attends else 0
    return LayerReport(f"the model's own {_kind(layer)}", seen, stored, seen - stored, stored, layer_bytes(layer))


def _kind(layer: Any) -> str:
    """What transformers calls a layer, of which ours may be a kind."""
    return next(
        (c.__name__ for c in type(layer).__mro__ if c.__module__.startswith("transformers.")), type(layer).__name__
    )


# ---------------------------------------------------------------------- shown


def _rows(report: CacheReport) -> list[tuple[str, ...]]:
    """A line for each run of layers that are alike, in the order of `_COLUMNS`."""
    return [*_lines(report.layers, ""), *_lines(report.cross, "cross ")]


def _lines(layers: Sequence[LayerReport], kind: str) -> list[tuple[str, ...]]:
    rows, start = [], 0
    for i, layer in enumerate(layers):
        if i + 1 == len(layers) or layers[i + 1] != layer:
            span = kind + (f"{start}" if start == i else f"{start}-{i}")
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


def _headline(report: CacheReport) -> str:
    """What it all comes to."""
    if not report.enabled:
        return "KV cache disabled: every token is recomputed"
    held = f"{report.nbytes / 2**20:.1f} MiB in {len(report.layers)} layers"
    return f"{report.seen} tokens seen, {report.stored} kept, {held}"


def _footers(report: CacheReport) -> list[str]:
    """What is to be said below the table."""
    cut_off = ", ".join(map(str, report.cut_off)) or None
    said = [("decoded by", report.backend), ("not as asked", report.fallback), ("cut off, segments", cut_off)]
    return [f"{name}: {text}" for name, text in said if text is not None]


def _text(report: CacheReport) -> str:
    """In plain text."""
    if not report.enabled:
        return _headline(report)
    rows = (" ".join(f"{cell:>8}" for cell in row[:-1]) + f"  {row[-1]}" for row in (_COLUMNS, *_rows(report)))
    return "\n".join((_headline(report), *rows, *_footers(report)))


def _rich(report: CacheReport) -> Any:
    """As what `rich.print` shows.

    Raises:
        MissingDependencyError: without rich.
    """
    try:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text
    except ModuleNotFoundError as error:
        raise MissingDependencyError("this view needs rich; run: pip install rich") from error
    if not report.enabled:
        return Text(_headline(report))
    table = Table(title=Text(_headline(report)), title_justify="left")
    for name in _COLUMNS:
        table.add_column(name, justify="left" if name in ("layers", "policy") else "right")
    for row in _rows(report):
        table.add_row(*map(Text, row))
    return Group(table, *(Text(line) for line in _footers(report)))


def _html(report: CacheReport) -> str:
    """For notebooks."""
    return html_table(_headline(report), _COLUMNS, _rows(report), _footers(report))


def _dict(report: CacheReport) -> dict[str, Any]:
    """Of plain numbers, strings, lists and dicts, as JSON has them: totals, then layer by layer."""
    totals = {name: getattr(report, name) for name in ("nbytes", "seen", "stored", "evicted")}
    layers, cross = (
        [{**asdict(layer), "heads": list(layer.heads)} for layer in some] for some in (report.layers, report.cross)
    )
    about: Mapping[str, Any] = {
        "enabled": report.enabled,
        "backend": report.backend,
        "fallback": report.fallback,
        "cut_off": list(report.cut_off),
    }
    return {**totals, **about, "layers": layers, "cross": cross}
