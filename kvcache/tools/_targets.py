"""What `kvcache plan`, `profile` and `tune` are about: a model by its name, and ways to let it decode.

A transformers language model is named by a folder, a ``.gguf`` file or a hub id; adapters bring other names through the
entry point group ``kvcache.subjects``, as the Chatterbox adapter does with ``chatterbox-nano``.
"""

from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from kvcache.errors import MissingDependencyError, said
from kvcache.tools._language import LanguageTarget
from kvcache.tools._target import ModelTarget

GROUP = "kvcache.subjects"


Source = Callable[[str], ModelTarget | None]
"""What an entry point of the group names: gives the subject of a name, or None for a name that is not its own."""


def subject(name: str) -> ModelTarget:
    """The model of that name.

    Adapters whose entry point's name the model's name begins with are asked first; a folder and a ``.gguf`` file are no
    adapter's; then all others are asked, but for those that lack a package.

    Raises:
        InputError: if there is none, with what there is.
        MissingDependencyError: if the adapter that it belongs to lacks a package.
    """
    found = sorted(entry_points(group=GROUP), key=lambda entry: entry.name)
    own = [entry for entry in found if name.startswith(entry.name)]
    for entry in own:
        if (made := _source(entry, name)(name)) is not None:
            return made
    if not Path(name).exists():
        for entry in found:
            if entry in own:
                continue
            try:
                source = _source(entry, name)
            except MissingDependencyError:  # nothing says that the name is its own
                continue
            if (made := source(name)) is not None:
                return made
    return LanguageTarget(name)


def _source(entry: EntryPoint, name: str) -> Source:
    try:
        source: Source = entry.load()
    except ImportError as error:
        raise MissingDependencyError(
            f"{name} is a model of {entry.name}, which does not load: {said(error)}; run: pip install "
            f'"{lacking(entry, error)}"'
        ) from error
    return source


def lacking(entry: EntryPoint, error: ImportError) -> str:
    """What to install for an adapter that does not load: its package's extra of the same name, or the module that is missing."""
    extras = () if entry.dist is None else entry.dist.metadata.get_all("Provides-Extra") or ()
    if entry.dist is not None and entry.name in extras:
        return f"{entry.dist.name}[{entry.name}]"
    return error.name or entry.name
