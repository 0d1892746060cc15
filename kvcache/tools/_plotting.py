"""Profiles as stacked bars."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvcache.errors import InputError, MissingDependencyError
from kvcache.io import check_given
from kvcache.tools._module_timer import PARTS
from kvcache.tools._profile import MEMORY, Profile

_COLORS = {
    "attention_products": "#08519c",
    "attention_weights": "#08519c",
    "attention_scores": "#d94801",
    "cache_update": "#fd8d3c",
    "kv_cache": "#d94801",
    "prefixes": "#fd8d3c",
    "mlp": "#3182bd",
    "mlp_weights": "#3182bd",
    "norms": "#4a9a5d",
    "positions": "#74b884",
    "embeddings": "#a3d2ae",
    "embedding_weights": "#a3d2ae",
    "head": "#c7e6cd",
    "glue": "#dff2e2",
    "other_weights": "#dff2e2",
    "unused_weights": "#9e9ac8",
    "vocoder_weights": "#dadaeb",
    "sampling": "#8c8c8c",
    "host": "#bdbdbd",
    "vocoder_mel": "#9e9ac8",
    "vocoder_wave": "#bcbddc",
    "watermark": "#efedf5",
    "vocoder": "#dadaeb",
    "activations": "#8c8c8c",
    "rest": "#d9d9d9",
}


def plot(profiles: Mapping[str, Profile], file: str | Path) -> None:
    """Stacked bars, by label, of a step's time and of the memory; what a cache could save is orange.

    Args:
        profiles: at least one.
        file: PNG, PDF or SVG.

    Raises:
        InputError: without matplotlib, or for a file that it cannot write.
    """
    pyplot = check_plot(file)
    labels = list(profiles)
    size = 11, 2.6 + 0.8 * len(labels)
    figure, axes = pyplot.subplots(2, 1, figsize=size, layout="constrained")
    panels: list[tuple[Any, Mapping[str, str], list[Mapping[str, float]], str]] = [
        (
            axes[0],
            PARTS,
            [{part: 1e3 * s for part, s in one.step.parts.items()} for one in profiles.values()],
            "ms a step",
        ),
        (
            axes[1],
            MEMORY,
            [{part: n / 2**20 for part, n in one.memory.parts.items()} for one in profiles.values()],
            "MiB",
        ),
    ]
    for axis, names, bars, unit in panels:
        left = [0.0] * len(labels)
        for part, name in names.items():
            widths = [max(0.0, bar[part]) for bar in bars]
            if any(widths):
                axis.barh(labels, widths, left=left, color=_COLORS[part], edgecolor="white", linewidth=0.5, label=name)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axis.invert_yaxis()
        axis.set_xlabel(unit)
        axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)
    try:
        figure.savefig(file, dpi=110)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write {file}: {error}; name a .png, .pdf or .svg in a folder that exists") from error
    finally:
        pyplot.close(figure)


def check_plot(file: str | Path) -> Any:
    """Matplotlib's pyplot; raises what `plot` would, as far as it can be known before.

    Raises:
        InputError: without matplotlib, or for a file that it cannot write.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise MissingDependencyError('a plot needs matplotlib; run: pip install "kvcache[plot]"') from error
    path = Path(file)
    if path.suffix not in (".png", ".pdf", ".svg") or not path.absolute().parent.is_dir():
        raise InputError(f"cannot write {file}: name a .png, .pdf or .svg in a folder that exists")
    check_given(path)
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
