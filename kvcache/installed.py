"""What audio needs beside kvcache, above all a torchaudio that loads.

One that does not is found, said, and kept from taking transformers down with it.

From PyPI torchaudio is a CUDA build on Linux, whatever torch it meets; and one of another release does not load either. From
5.24 on transformers imports whatever torchaudio is installed, so nothing of transformers works then.
"""

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

__all__ = ["APART", "MEND", "audio_fault", "mend_torchaudio", "torchaudio_fault", "watch_transformers"]

MEND = "kvcache doctor --mend, or install the torchaudio that belongs to your torch (see pytorch.org)"
"""What to do about a torchaudio that does not load."""

APART = "chatterbox-tts==0.1.7 torchaudio==2.11.0 s3tokenizer==0.3.0 diffusers==0.29.0 conformer==0.3.2"
"""What is installed with --no-deps, since it pins or brings an old torch; what else these import is the extra ``audio``."""

_APART = ("torchaudio", "s3tokenizer", "diffusers", "conformer")
_EXTRA = ("librosa", "omegaconf", "onnx", "importlib_metadata", "perth", "PIL", "pyloudnorm", "einops")
_COMPILED = (".so", ".pyd", ".dll", ".dylib")
_fault: str | None = None  # what `watch_transformers` found


def torchaudio_fault() -> str | None:
    """Why the torchaudio that is installed cannot be imported; None if it can, or there is none."""
    if _fault is not None or _torchaudio() is None:
        return _fault
    try:
        importlib.import_module("torchaudio")
    except Exception as error:  # OSError, ImportError, RuntimeError, AttributeError: by release of both
        return _reason(error)
    return None


def audio_fault() -> tuple[str, str] | None:
    """Why the chatterbox-tts that is installed cannot make audio, and what to do; None if it can."""
    if (fault := torchaudio_fault()) is not None:
        return f"torchaudio does not load ({fault})", MEND
    for modules, command in ((_EXTRA, 'pip install "kvcache[audio]"'), (_APART, f"pip install --no-deps {APART}")):
        if lacking := [name for name in modules if find_spec(name) is None]:
            return f"not installed of what audio needs: {', '.join(lacking)}", command
    try:
        for name in ("chatterbox.tts", "perth"):
            importlib.import_module(name)
    except Exception as error:  # of a dozen packages that pin each other otherwise
        return f"it does not load: {_reason(error)}", f'pip install "kvcache[audio]"; pip install --no-deps {APART}'
    if getattr(sys.modules["perth"], "PerthImplicitWatermarker", None) is None:
        return "its watermarker does not load: it needs pkg_resources, which setuptools has up to 80", (
            'pip install "setuptools<81"'
        )
    return None


def _reason(error: BaseException) -> str:
    """The first line of what is at the bottom of an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def watch_transformers() -> None:
    """See, before transformers is first imported, whether torchaudio can be imported.

    One that cannot counts as not installed in this process, with a warning that says what is broken and what to do.
    """
    if _torchaudio() is None:
        return
    if "transformers" in sys.modules:
        _set_aside()
    else:
        sys.meta_path.insert(0, _Watch())


class _Watch:
    """Stands before all finders until transformers is looked for."""

    def find_spec(
        self,
        name: str,
        path: Sequence[str] | None = None,  # noqa: ARG002  # as Python calls every finder
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        if name == "transformers" and self in sys.meta_path:
            # Another list: whoever looks for transformers goes through the old one, and would pass the next finder over.
            sys.meta_path = [finder for finder in sys.meta_path if finder is not self]
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

    global _fault
    folder = _torchaudio()
    if folder is None or torchaudio_fault() is None:
        return []
    compiled = [file for file in (folder / "lib").glob("*") if file.suffix in _COMPILED]
    for file in compiled:
        file.unlink()
    tried = subprocess.run([sys.executable, "-c", "import torchaudio"], capture_output=True, text=True, timeout=300)
    if tried.returncode:
        raise OSError((tried.stderr.strip().splitlines() or ["it cannot be imported"])[-1])
    _fault = None
    if sys.modules.get("torchaudio", sys) is None:  # no longer set aside
        del sys.modules["torchaudio"]
    return compiled
