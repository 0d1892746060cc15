"""What a cache takes: an exact estimate before, an account after, and how that is shown."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from kvcache.errors import MissingDependencyError
from kvcache.geometry import CacheGeometry
from kvcache.policies import KeepAll, SizePolicy
from kvcache.slots import slots_for
from kvcache.views import html_table

_COLUMNS = ("layers", "seen", "kept", "evicted", "slots", "MiB", "policy")


def estimate_bytes(
    geometry: CacheGeometry,
    tokens: int,
    *,
    rows: int = 1,
    policy: SizePolicy | Sequence[SizePolicy] | None = None,
    max_length: int | None = None,
    preallocate: bool = False,
    rerotate: bool = False,
) -> int:
    """Bytes that a cache holds once `tokens` have gone through it, exactly.

    Counts the layers that kvcache manages; those a model manages its own way are not in it.

    Args:
        geometry: of the model; for a hybrid, with only its full-attention layers counted.
        tokens: per row, pads among them.
        rows: batch size.
        policy, max_length, preallocate: as the cache will have them.
        rerotate: whether positions are re-rotated, which keeps the pinned keys twice.
    """
    policies = (
        [KeepAll() if policy is None else policy] * geometry.layers if not isinstance(policy, Sequence) else policy
    )
    key_bytes, value_bytes = (rows * size for size in geometry.layer_token_bytes)
    total = 0
    for given in policies:
        twice = given.pinned * key_bytes * len(policies) if rerotate else 0
        resolved = given.resolve((key_bytes + value_bytes) * len(policies), twice, max_length)
        limit = resolved.limit
        bound, stored = (max_length, tokens) if limit is None else (limit, min(tokens, limit))
        total += (key_bytes + value_bytes) * slots_for(stored, bound, preallocate)
        if rerotate and limit is not None:
            total += key_bytes * resolved.pinned
    return total


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
        layers: one by one.
        enabled: False where everything is recomputed, and there is no cache.
        backend: what runs the decode steps, where that is the decode engine.
        fallback: why it is not what was asked for; None if it is.
    """

    layers: tuple[LayerReport, ...]
    enabled: bool = True
    backend: str | None = None
    fallback: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held, over all layers."""
        return sum(layer.nbytes for layer in self.layers)

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


def account(layers: Sequence[Any]) -> CacheReport:
    """The report of a cache's layers, as `kvcache.hf.cache_layers` lists them."""
    return CacheReport(tuple(_layer_report(layer) for layer in layers))


def _layer_report(layer: Any) -> LayerReport:
    if (kv := getattr(layer, "kv", None)) is not None:
        heads = getattr(kv, "heads", ())
        return LayerReport(repr(kv.policy), kv.seen, kv.stored, kv.evicted, kv.capacity, kv.nbytes, heads)
    tensors = _tensors(layer)
    seen = layer.get_seq_length() if tensors else 0
    stored = tensors[0].shape[-2] if tensors and tensors[0].dim() == 4 else 0
    return LayerReport(
        f"the model's own {type(layer).__name__}", seen, stored, seen - stored, stored, layer_bytes(layer)
    )


def layer_bytes(layer: Any) -> int:
    """Bytes of what a layer holds, ours or the model's own."""
    if (kv := getattr(layer, "kv", None)) is not None:
        return int(kv.nbytes)
    # The model's own layers may hold a slice of a larger tensor: what counts is the storage behind it.
    held = [t.untyped_storage() for t in _tensors(layer)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in held}.values())


def _tensors(layer: Any) -> list[Tensor]:
    return [t for t in (getattr(layer, "keys", None), getattr(layer, "values", None)) if isinstance(t, Tensor)]


# ---------------------------------------------------------------------- shown


def _rows(report: CacheReport) -> list[tuple[str, ...]]:
    """A line for each run of layers that are alike, in the order of `_COLUMNS`."""
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


def _headline(report: CacheReport) -> str:
    """What it all comes to."""
    if not report.enabled:
        return "KV cache disabled: every token is recomputed"
    held = f"{report.nbytes / 2**20:.1f} MiB in {len(report.layers)} layers"
    return f"{report.seen} tokens seen, {report.stored} kept, {held}"


def _footers(report: CacheReport) -> list[str]:
    """What is to be said below the table."""
    said = [("decoded by", report.backend), ("not as asked", report.fallback)]
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
    layers = [{**asdict(layer), "heads": list(layer.heads)} for layer in report.layers]
    about: Mapping[str, Any] = {
        "enabled": report.enabled,
        "backend": report.backend,
        "fallback": report.fallback,
    }
    return {**totals, **about, "layers": layers}
