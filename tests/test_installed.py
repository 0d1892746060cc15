"""A torchaudio that does not load: found, said, set aside, mended."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.inside import ground as inside

from kvcache import installed

pytestmark = pytest.mark.one_release

ROOT = Path(__file__).resolve().parent.parent
BROKEN = """
from pathlib import Path
if any((Path(__file__).parent / "lib").glob("*.so")):
    try:
        raise OSError("libc10_cuda.so: cannot open shared object file")
    except OSError as error:
        raise OSError("Could not load this library") from error
"""


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """A torchaudio that is installed and whose compiled part does not load, as PyPI's beside a torch without CUDA."""
    folder = tmp_path / "torchaudio"
    (folder / "lib").mkdir(parents=True)
    (folder / "__init__.py").write_text(BROKEN)
    for name in ("_torchaudio.abi3.so", "libtorchaudio.so"):
        (folder / "lib" / name).write_bytes(b"")
    (folder / "lib" / "__init__.py").write_text("")
    known = tmp_path / "torchaudio-2.11.0.dist-info"
    known.mkdir()
    (known / "METADATA").write_text("Metadata-Version: 2.1\nName: torchaudio\nVersion: 2.11.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(inside.FAULT, None)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchaudio"]:
        monkeypatch.delitem(sys.modules, name)
    yield folder
    sys.modules.pop("torchaudio", None)


def test_no_torchaudio_is_no_fault(monkeypatch, tmp_path):
    monkeypatch.setattr(inside.TORCHAUDIO, lambda: None)
    assert installed.torchaudio_fault() is None and installed.mend_torchaudio() == []


def test_a_torchaudio_that_does_not_load_is_told_by_what_is_at_the_bottom_of_it(broken):
    assert installed.torchaudio_fault() == "OSError: libc10_cuda.so: cannot open shared object file"
    assert installed.audio_fault() == (f"torchaudio does not load ({installed.torchaudio_fault()})", installed.MEND)


def test_it_is_set_aside_with_a_warning_that_says_what_to_do(broken):
    with pytest.warns(RuntimeWarning, match=r"torchaudio .*libc10_cuda.*kvcache doctor --mend"):
        inside.set_aside()
    assert find_spec("torchaudio") is None  # what transformers asks
    with pytest.raises(ModuleNotFoundError):
        import torchaudio  # noqa: F401
    assert "libc10_cuda" in installed.torchaudio_fault()  # what doctor asks


def test_it_is_looked_at_when_transformers_is_looked_for(monkeypatch):
    looked = []
    monkeypatch.setattr(inside.SET_ASIDE, lambda: looked.append(1))
    watch = inside.Watch()
    monkeypatch.setattr(sys, "meta_path", [watch, *sys.meta_path])
    for name in ("json", "transformers.utils", "transformers", "transformers"):
        assert watch.find_spec(name) is None
    assert looked == [1] and watch not in sys.meta_path


def test_the_finder_behind_it_is_asked_too(monkeypatch):
    asked = []

    class Tracer:
        def find_spec(self, name, path=None, target=None):
            asked.append(name)

    monkeypatch.setattr(inside.SET_ASIDE, lambda: None)
    monkeypatch.setattr(sys, "meta_path", [inside.Watch(), Tracer(), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "transformers")
    assert find_spec("transformers") is not None
    assert asked == ["transformers"]


def test_mending_removes_the_compiled_part_alone(broken, monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    removed = installed.mend_torchaudio()
    assert sorted(file.name for file in removed) == ["_torchaudio.abi3.so", "libtorchaudio.so"]
    assert (broken / "lib" / "__init__.py").is_file()
    assert installed.torchaudio_fault() is None and installed.mend_torchaudio() == []


def test_what_was_set_aside_is_there_again_once_it_is_mended(broken, monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.warns(RuntimeWarning, match="torchaudio"):
        inside.set_aside()
    assert len(installed.mend_torchaudio()) == 2
    assert installed.torchaudio_fault() is None and find_spec("torchaudio") is not None


def test_what_cannot_be_mended_is_said(broken, monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (broken / "__init__.py").write_text("raise ImportError('of another kind')")
    with pytest.raises(OSError, match="of another kind"):
        installed.mend_torchaudio()


@pytest.mark.slow
def test_transformers_works_beside_it_once_kvcache_is_imported(broken, tmp_path):
    program = "import kvcache; from transformers import LlamaForCausalLM; import transformers.audio_utils; print(kvcache.KVCacheManager)"
    places = os.pathsep.join((str(tmp_path), str(ROOT), str(ROOT / "adapters")))
    ended = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": places},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0 and ended.stderr.count("RuntimeWarning") == 1, ended.stderr


ALONE = """
import re, sys
from importlib.metadata import distribution, packages_distributions, PackageNotFoundError

def name_of(requirement):
    return re.split(r"[^A-Za-z0-9_.-]", requirement)[0].lower().replace("_", "-")

wanted, core = [name_of(one) for one in DEPENDENCIES], set()
while wanted:
    one = wanted.pop()
    if one in core:
        continue
    try:
        found = distribution(one).requires or []
    except PackageNotFoundError:
        continue
    core.add(one)
    wanted += [name_of(each) for each in found if "extra ==" not in each]
for module, owners in packages_distributions().items():
    if core.isdisjoint(owner.lower().replace("_", "-") for owner in owners) and module not in ("kvcache", "kvcache_chatterbox"):
        sys.modules[module] = None  # as if it were not installed

import kvcache
import kvcache.monitoring
from kvcache import *
assert "prometheus_client" not in [name for name, module in sys.modules.items() if module is not None]
try:
    kvcache.monitoring.CacheMetrics
except kvcache.MissingDependencyError as error:
    print(error)
import kvcache.cache, kvcache.decoding, kvcache.generation, kvcache.io, kvcache.manager, kvcache.models, kvcache.prefixes
import kvcache.prefixes.stores, kvcache.testing, kvcache.tools
print("all there")
"""


def test_the_library_is_imported_with_what_it_depends_on_and_nothing_else():
    """It asked for prometheus-client, of an extra, at the first name that was wanted of it."""
    wanted = re.search(r"\ndependencies = \[\n(.*?)\n\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL)
    assert wanted is not None
    names = re.findall(r'"([^"]+)"', wanted[1])
    assert any(name.startswith("torch>") for name in names)
    script = f"DEPENDENCIES = {names!r}\n{ALONE}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    needs = "CacheMetrics needs prometheus-client; run: pip install 'kvcache[metrics]'"
    assert done.stdout.splitlines() == [needs, "all there"]
