"""`kvcache doctor`: well here, and each thing that is planted as missing or broken is found, with what to do about it."""

import json
import os
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest
import torch
import transformers
from support.inside import tools as inside
from support.inside.stores import DISK_PEEK, DISK_WRITE
from support.inside.tools import doctor, doctor_decoding, doctor_machine, doctor_packages, doctor_stores
from support.ports import deserted
from support.snapshots import cold, voice

pytest.importorskip("typer")
pytest.importorskip("rich")

from kvcache.cli import main
from kvcache.decoding import RECORDERS
from kvcache.errors import InputError
from kvcache.prefixes.stores import DiskStore

pytestmark = pytest.mark.one_release


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("KVCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("KVCACHE_STORE", raising=False)
    return tmp_path / "home"


def named(findings, name):
    [found] = [finding for finding in findings if finding.name == name]
    return found


def installed(monkeypatch, **versions):
    """Pretend that these packages are there in another version, or with None not at all."""
    real = doctor_packages.version

    def version(name):
        if name in versions:
            if versions[name] is None:
                raise PackageNotFoundError(name)
            return versions[name]
        return real(name)

    monkeypatch.setattr(doctor_packages, "version", version)


@pytest.fixture
def light(monkeypatch):
    """Without the back ends, which take the time."""
    monkeypatch.setattr(inside.DOCTOR_BACKENDS, lambda device, compiling: [])


# ---------------------------------------------------------------------- here


def test_all_is_well_here_and_nothing_is_left_behind(home, capsys, monkeypatch):
    monkeypatch.delitem(RECORDERS, "cpu")  # as it is outside of tests
    store = DiskStore(home)
    store.put(cold(voice(1)))
    before = sorted(store.entries(), key=str)
    assert main(["doctor", "--json"]) == 0
    out, err = capsys.readouterr()
    said = json.loads(out)
    assert said["healthy"] and err == ""
    found = [doctor.Finding(**finding) for finding in said["findings"]]
    assert {finding.state for finding in found} <= {"ok", "note", "missing"}
    assert list(dict.fromkeys(finding.section for finding in found)) == [
        "packages", "devices", "precisions", "back ends", "stores",
    ]  # fmt: skip
    assert named(found, "torch").said == torch.__version__
    assert named(found, "transformers").said.startswith(transformers.__version__)
    assert named(found, "fp32 on cpu").state == "ok"
    # Tried on a model, whose tokens are compared with those of plain generate.
    for name in ("the cache in generate", "eager"):
        assert named(found, name).state == "ok" and "those of plain generate" in named(found, name).said
    if not torch.cuda.is_available():
        for name in ("graph", "graph+compile"):
            assert (named(found, name).state, named(found, name).said) == ("missing", "there are no graphs on 'cpu'")
        assert named(found, "gpu").state in ("missing", "note")
    assert "1 there; listed, written, read back and removed" in named(found, "default").said
    assert sorted(store.entries(), key=str) == before


def test_the_table_shows_each_finding(home, light, capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["findings"]
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for finding in found:
        assert finding["name"] in shown and finding["section"] in shown
    assert not home.exists()  # nothing is made only to look


def test_a_store_that_is_named_is_tried(home, light, tmp_path, capsys):
    (tmp_path / "voices").mkdir()
    (tmp_path / "secret").write_bytes(b"ours\n")
    for where in (str(tmp_path / "voices"), f"memory://{tmp_path}"):
        assert main(["doctor", "--store", where, "--secret-file", str(tmp_path / "secret"), "--json"]) == 0
        last = json.loads(capsys.readouterr().out)["findings"][-1]
        assert last["state"] == "ok" and "0 there; listed, written" in last["said"] and where in last["said"]
    assert list((tmp_path / "voices").glob("*.safetensors")) == []


# ---------------------------------------------------------------------- planted


def test_a_package_that_is_not_there(home, light, monkeypatch, capsys):
    installed(monkeypatch, safetensors=None, redis=None, triton=None)
    found = doctor.diagnose()
    needed, extra = named(found, "safetensors"), named(found, "[redis]")
    assert needed.state == "broken" and needed.said.startswith("not installed; kvcache needs >=")
    assert needed.advice.startswith('pip install "safetensors>=')
    assert (extra.state, extra.advice) == ("missing", 'pip install "kvcache[redis]"')
    assert "not installed" in extra.said
    assert main(["doctor"]) == 1  # what is needed is not there; an extra alone is no failure
    [line] = capsys.readouterr().err.splitlines()
    assert line == "kvcache: broken: safetensors; what to do stands beside each"
    installed(monkeypatch, safetensors="0.5.0", redis=None)
    assert main(["doctor"]) == 0


def test_versions_that_are_too_old_or_newer_than_tested(home, light, monkeypatch):
    installed(monkeypatch, transformers="4.57.1", torch="2.5.1")
    found = doctor.diagnose()
    for name in ("transformers", "torch"):
        assert named(found, name).state == "broken" and "kvcache needs >=" in named(found, name).said
    assert not doctor.healthy(found)
    installed(monkeypatch, transformers="5.999.0", torch="2.8.0")
    found = doctor.diagnose()
    assert named(found, "transformers").state == "note" and doctor.healthy(found)


def test_not_installed_at_all(home, light, monkeypatch):
    installed(monkeypatch, kvcache=None)
    assert named(doctor.diagnose(), "kvcache").advice == "pip install kvcache"


def test_what_chatterbox_pins_is_told(home, light, monkeypatch):
    monkeypatch.setattr(
        doctor_packages,
        "requires",
        lambda name: ["torch==2.6.0"] if name == "chatterbox-tts" else ["torch>=2.6"],
    )
    installed(monkeypatch, **{"chatterbox-tts": "0.1.7", "torch": "2.8.0"})
    found = named(doctor.diagnose(), "chatterbox-tts")
    assert "torch==2.6.0 (2.8.0 is here)" in found.said
    assert found.state == "ok" and "--no-deps" in found.advice
    installed(monkeypatch, **{"chatterbox-tts": None})
    found = named(doctor.diagnose(), "chatterbox-tts")
    assert found.state == "missing" and "--no-deps" in found.advice


def test_an_adapter_that_does_not_load(home, light, monkeypatch):
    def load():
        raise ImportError("no module named einops")

    entry = SimpleNamespace(name="parrot", value="parrot.subjects:subject", load=load)
    monkeypatch.setattr(doctor_packages, "entry_points", lambda group: [entry])
    found = named(doctor.diagnose(), "models of parrot")
    assert found.state == "broken" and "einops" in found.said and found.advice


def test_an_adapter_whose_package_is_not_installed_is_missing_and_not_broken(home, light, monkeypatch):
    def load():
        raise ModuleNotFoundError("No module named 'einops'", name="einops")

    entry = SimpleNamespace(name="parrot", value="parrot.subjects:subject", load=load, dist=None)
    monkeypatch.setattr(doctor_packages, "entry_points", lambda group: [entry])
    found = named(doctor.diagnose(), "models of parrot")
    assert found.state == "missing" and "einops" in found.said and found.advice == 'pip install "einops"'


def test_back_ends_that_decode_wrongly_fail_or_fall_back(monkeypatch):
    device = torch.device("cpu")
    wrong = {"off": "gave [[1]], and generate without it [[2]]", "eager": None}

    def tried(backend):
        if backend == "compile":
            raise RuntimeError("the linker died\nof many things")
        return wrong[backend]

    monkeypatch.setattr(inside.DOCTOR_TRIAL, lambda device: tried)
    monkeypatch.setattr(inside.DOCTOR_COMPILER, lambda device: None)
    found = list(inside.doctor_backends(device, compiling=True))
    assert (
        named(found, "the cache in generate").state == "broken"
        and "gave [[1]]" in named(found, "the cache in generate").said
    )
    assert named(found, "eager").state == "ok"
    assert named(found, "compile").said == "failed: RuntimeError: the linker died"
    assert named(found, "compile").state == "broken" and named(found, "compile").advice

    def nothing(device):
        raise OSError("driver")

    monkeypatch.setattr(inside.DOCTOR_TRIAL, nothing)
    [found] = inside.doctor_backends(device, compiling=False)
    assert found.state == "broken" and "OSError: driver" in found.said


def test_a_cache_that_changes_tokens_is_found(monkeypatch):
    """The trial itself: its reference is what generate gives without any of ours."""
    tried = inside.doctor_trial(torch.device("cpu"))
    assert tried("eager") is None
    real = doctor_decoding.KVCacheManager.stream
    monkeypatch.setattr(
        doctor_decoding.KVCacheManager,
        "stream",
        lambda self, *a, **k: ((chunk + 1) % 64 for chunk in real(self, *a, **k)),
    )
    assert tried("eager").startswith("gave [[")


def test_without_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setattr(inside.DOCTOR_TRIAL, lambda device: lambda backend: None)
    monkeypatch.setattr(doctor_machine.shutil, "which", lambda name: None)
    found = named(inside.doctor_backends(torch.device("cpu"), compiling=True), "compile")
    assert found.state == "missing" and "no C++ compiler" not in found.said and "g++" in found.advice
    failing = tmp_path / "g++"
    failing.write_text("#!/bin/sh\necho 'fatal error: Python.h: No such file' >&2\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setattr(doctor_machine.shutil, "which", lambda name: str(failing))
    found = named(inside.doctor_backends(torch.device("cpu"), compiling=True), "compile")
    assert found.state == "missing" and "Python.h" in found.said and "python3-dev" in found.advice


def test_more_threads_than_cpus(monkeypatch):
    monkeypatch.setattr(inside.DOCTOR_CPUS, lambda: 2.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    found = named(inside.doctor_devices(), "cpu")
    assert found.state == "note" and "16 torch threads" in found.said and "OMP_NUM_THREADS=2" in found.advice


@pytest.mark.parametrize(
    ("driver", "built", "state", "advice"),
    [
        (None, None, "missing", None),
        ("nvidia-smi", None, "note", "pytorch.org"),
        ("nvidia-smi", "12.8", "note", "driver"),
    ],
)
def test_why_there_is_no_gpu(driver, built, state, advice, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(doctor_machine.shutil, "which", lambda name: driver)
    found = named(inside.doctor_gpus(), "gpu")
    assert (
        found.state == state and (advice is None) == (found.advice is None) and (advice or "") in (found.advice or "")
    )


# ---------------------------------------------------------------------- stores


def test_a_store_that_cannot_be_written_to(home, light, monkeypatch, capsys):
    home.mkdir()

    def full(self, address, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(DISK_WRITE, full)
    assert main(["doctor", "--json"]) == 1
    out, err = capsys.readouterr()
    said = json.loads(out)
    last = said["findings"][-1]
    assert not said["healthy"] and last["state"] == "broken"
    assert "No space left on device" in last["said"] and "KVCACHE_HOME" in last["advice"]
    assert err == "kvcache: broken: default; what to do stands beside each\n"


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("{file}", "is a file"),
        ("{file}/below", "Not a directory"),
        ("/proc/kvcache", "cannot be made"),
        ("~/voices", "no shell has put your home there"),
        ("{folder}/" + "x" * 300, "name too long"),
        ("{read_only}", "could not write"),
        ("{read_only}/below", "cannot be made"),
    ],
)
def test_c7_the_default_store_is_tried(place, says, light, monkeypatch, tmp_path):
    """By writing, and not by what a folder's mode says: root, and read-only file systems, have other rights than that."""
    (tmp_path / "file").write_text("")
    places = {"file": tmp_path / "file", "folder": tmp_path, "read_only": "/sys/kernel"}
    if ("/proc" in place or "read_only" in place) and not os.path.isdir("/sys/kernel"):
        pytest.skip("there is no such folder here that nobody can write to")
    monkeypatch.setenv("KVCACHE_HOME", place.format(**places))
    found = inside.doctor_default_store()
    assert found.state == "broken" and says.lower() in found.said.lower() and "KVCACHE_HOME" in found.advice
    assert sorted(tmp_path.iterdir()) == [tmp_path / "file"]


def test_c7_a_store_that_can_be_made_is_not_made(light, monkeypatch, tmp_path):
    monkeypatch.setenv("KVCACHE_HOME", str(tmp_path / "a" / "b"))
    assert inside.doctor_default_store().state == "ok"
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_nearly_full(home, light, monkeypatch):
    monkeypatch.setattr(doctor_stores.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**30))
    found = named(doctor.diagnose(), "default")
    assert found.state == "note" and "1.0 GiB free, less than its budget of 4" in found.said and found.advice


def test_a_store_that_loses_what_it_was_given(home, light, monkeypatch):
    home.mkdir()
    monkeypatch.setattr(DISK_PEEK, lambda self, address, most=None: None)
    assert "did not come back" in named(doctor.diagnose(), "default").said


def test_a_server_that_is_down(home, light, capsys):
    pytest.importorskip("redis")
    with deserted() as port:
        assert main(["doctor", "--store", f"redis://user:hunter2@127.0.0.1:{port}", "--json"]) == 1
    out, err = capsys.readouterr()
    last = json.loads(out)["findings"][-1]
    assert (last["name"], last["state"]) == ("redis", "broken") and "ConnectionError" in last["said"] and last["advice"]
    assert "hunter2" not in out + err


def test_a_wrong_place_is_refused_before_anything_is_tried(home, monkeypatch):
    monkeypatch.setattr(inside.DOCTOR_PACKAGES, lambda: pytest.fail("it began"))
    for wrong in ({"store": "gopher://x"}, {"namespace": "a"}, {"store": __file__}):
        with pytest.raises(InputError):
            doctor.diagnose(**wrong)


def test_findings_are_plain_data():
    found = doctor.Finding("stores", "disk", "ok", "fine")
    assert asdict(found) == {"section": "stores", "name": "disk", "state": "ok", "said": "fine", "advice": None}
    assert doctor.healthy([found]) and not doctor.healthy([doctor.Finding("stores", "disk", "broken", "gone")])
