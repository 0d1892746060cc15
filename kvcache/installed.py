"""torchaudio where it does not load: found, said, and kept from taking transformers down with it.

From PyPI torchaudio is a CUDA build on Linux, whatever torch it meets; and one of another release does not load either. From
5.24 on transformers imports whatever torchaudio is installed, so nothing of transformers works then.
"""

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

__all__ = ["MEND", "mend_torchaudio", "torchaudio_fault", "watch_transformers"]

MEND = "kvcache doctor --mend, or install the torchaudio that belongs to your torch (see pytorch.org)"
"""What to do about a torchaudio that does not load."""

_COMPILED = (".so", ".pyd", ".dll", ".dylib")
_fault: str | None = None  # what `watch_transformers` found


def torchaudio_fault() -> str | None:
    """Why the torchaudio that is installed cannot be imported; None if it can, or there is none."""
    if _fault is not None or _torchaudio() is None:
        return _fault
    try:
        importlib.import_module("torchaudio")
    except Exception as error:  # OSError, ImportError, RuntimeError, AttributeError: by release of both
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0]}"
    return None


def watch_transformers() -> None:
    """Before transformers is first imported, see whether torchaudio can be; one that cannot counts as not installed in this
    process, with a warning that says what is broken and what to do."""
    if _torchaudio() is None:
        return
    if "transformers" in sys.modules:
        _set_aside()
    else:
        sys.meta_path.insert(0, _Watch())


class _Watch:
    """Stands before all finders until transformers is looked for."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == "transformers" and self in sys.meta_path:
            sys.meta_path.remove(self)
            _set_aside()
        return None


def _set_aside() -> None:
    global _fault
    if "torchaudio" in sys.modules or (fault := torchaudio_fault()) is None:
        return
    _fault = fault
    for name in [one for one in sys.modules if one.partition(".")[0] == "torchaudio"]:
        del sys.modules[name]
    sys.modules["torchaudio"] = None  # type: ignore[assignment]  # as Python has it: no such package
    warnings.warn(
        f"torchaudio is installed and cannot be imported ({fault}); here it counts as not installed, and without kvcache "
        f"transformers would fail with it; run {MEND}",
        RuntimeWarning,
        stacklevel=2,
    )


def _torchaudio() -> Path | None:
    """Its folder, whether it can be imported or not."""
    spec = PathFinder.find_spec("torchaudio")  # also where it has been set aside
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    return Path(places[0]) if places else None


def mend_torchaudio() -> list[Path]:
    """Remove torchaudio's compiled part if it does not load, which Chatterbox does without; the files that were removed.

    Raises:
        OSError: if they cannot be removed, or torchaudio cannot be imported without them either.
    """
    import subprocess

    folder = _torchaudio()
    if folder is None or torchaudio_fault() is None:
        return []
    compiled = [file for file in (folder / "lib").glob("*") if file.suffix in _COMPILED]
    for file in compiled:
        file.unlink()
    tried = subprocess.run([sys.executable, "-c", "import torchaudio"], capture_output=True, text=True, timeout=300)
    if tried.returncode:
        raise OSError((tried.stderr.strip().splitlines() or ["it cannot be imported"])[-1])
    return compiled
