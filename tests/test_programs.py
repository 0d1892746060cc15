"""Compiled steps that outlive a process: only what this user wrote in private is run, and nothing is needed."""

import json
import os
import stat
import subprocess
import sys
import threading

import pytest
import torch
from support.families import build, token_ids
from support.inside import decoding as inside
from support.waiting import until
from torch import nn

from kvcache import CorruptError, KVCacheManager, subscribe
from kvcache.decoding import Ahead, ProgramFiles, Programs, Refused, RootSizes

pytestmark = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="this system does not tell whose a file is")
KEY, BY, ABOUT = "ab" * 32, {"torch": "1"}, {"names": ["x"]}


@pytest.fixture
def files(tmp_path):
    return ProgramFiles(tmp_path / "programs")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """As if no program had been loaded in this process."""
    for known in (inside.PROGRAMS_LOADED, inside.PROGRAMS_BEGUN, inside.PROGRAMS_FAILED):
        monkeypatch.setattr(known, {})


@pytest.fixture
def fell_back():
    told = []
    with subscribe(told.append, ["fell_back"]):
        yield told


# ---------------------------------------------------------------------- files


def test_what_was_written_is_read_and_is_its_owners_alone(files):
    assert files.read(KEY, BY) is None
    files.write(KEY, BY, ABOUT, b"code")
    assert files.read(KEY, BY) == (ABOUT, b"code")
    ((path, size),) = files.held()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(files.folder.stat().st_mode) == 0o700
    assert size == path.stat().st_size
    path.unlink()
    assert files.read(KEY, BY) is None


def _open_folder(path):
    path.parent.chmod(0o777)


def _open_file(path):
    path.chmod(0o666)


def _truncated(path):
    path.write_bytes(path.read_bytes()[:-1])


def _changed(path):
    path.write_bytes(path.read_bytes()[:-1] + b"!")


def _garbage(path):
    path.write_bytes(b"\x7fELF" + bytes(100))


def _empty(path):
    path.write_bytes(b"")


def _linked(path):
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


SPOILT = {
    _open_folder: "can be written to by others",
    _open_file: "can be written to by others",
    _truncated: "not whole",
    _changed: "not whole",
    _garbage: "no compiled program",
    _empty: "no compiled program",
    _linked: "a symbolic link",
}


@pytest.mark.parametrize("spoil", SPOILT, ids=lambda spoil: spoil.__name__)
def test_a_file_that_is_not_as_it_was_written_is_not_used(files, spoil):
    files.write(KEY, BY, ABOUT, b"code")
    spoil(files.folder / f"{KEY}.kvcache-program")
    with pytest.raises(CorruptError, match=SPOILT[spoil]):
        files.read(KEY, BY)


def test_files_of_other_versions_or_other_programs_are_not_used(files):
    files.write(KEY, BY, ABOUT, b"code")
    with pytest.raises(CorruptError, match="made by torch 1, and this is 2"):
        files.read(KEY, {"torch": "2"})
    other = "cd" * 32
    (files.folder / f"{KEY}.kvcache-program").rename(files.folder / f"{other}.kvcache-program")
    with pytest.raises(CorruptError, match="of another program"):
        files.read(other, BY)


def test_what_another_user_owns_is_not_used(files, monkeypatch):
    files.write(KEY, BY, ABOUT, b"code")
    mine = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    with pytest.raises(CorruptError, match=f"belongs to user {mine}"):
        files.read(KEY, BY)
    with pytest.raises(CorruptError, match=f"belongs to user {mine}"):
        files.write(KEY, BY, ABOUT, b"other code")
    monkeypatch.undo()
    assert files.read(KEY, BY) == (ABOUT, b"code")


def test_the_least_recently_used_leave_when_there_is_no_more_room(files, monkeypatch):
    monkeypatch.setattr(inside.PROGRAMS_ROOM, 900)
    for i in range(4):
        files.write(f"{i:064}", BY, ABOUT, bytes(250))
        os.utime(files.folder / f"{i:064}.kvcache-program", ns=(i, i))
    files.write(f"{4:064}", BY, ABOUT, bytes(250))
    left = [path.name[63] for path, _ in files.held()]
    assert left == sorted(left)[-len(left) :] and left[-1] == "4" and "0" not in left
    assert sum(size for _, size in files.held()) <= 900


# ---------------------------------------------------------------------- one function


class Scaled(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, generator=torch.Generator().manual_seed(seed)))


def scaled(root, x, twice):
    """``[n, 8]``"""
    made = torch.relu(x @ root.weight)
    return 2 * made if twice else made


def ahead(root, files, **given):
    return Ahead(scaled, root, name="scaled", model=root, dynamic={"x": (0,)}, programs=Programs(files), **given)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with the program of `scaled`, and the file's name."""
    files = ProgramFiles(tmp_path_factory.mktemp("home") / "programs")
    function = ahead(Scaled(), files)
    with torch.inference_mode():
        x = torch.ones(8, 5).T
        assert torch.allclose(function(x, True), scaled(function.root, x, True))
    assert function.refused is None
    return files


def told(function):
    return [(one.name, one.how) for one in inside.programs_of(function)]


def test_another_model_of_the_same_shape_takes_the_program_with_its_own_weights(written, fell_back):
    function = ahead(Scaled(seed=1), written)
    for rows in (5, 2, 33, 700):
        x = torch.randn(rows, 8, generator=torch.Generator().manual_seed(rows))
        torch.testing.assert_close(function(x, True), scaled(function.root, x, True))
    assert told(function) == [("scaled", "loaded")]
    assert fell_back == []
    with torch.no_grad():
        function.root.weight.mul_(3)
    torch.testing.assert_close(function(x, True), scaled(function.root, x, True))
    turned = torch.randn(
        8, 20, generator=torch.Generator().manual_seed(0)
    ).T  # lies otherwise than what it was made with
    torch.testing.assert_close(function(turned, True), scaled(function.root, turned, True))


def test_a_size_of_one_has_a_program_of_its_own(tmp_path):
    function, one = ahead(Scaled(), ProgramFiles(tmp_path / "programs")), torch.ones(1, 8)
    torch.testing.assert_close(function(one, True), scaled(function.root, one, True))
    assert function.key({"x": one, "twice": True}) != function.key({"x": torch.ones(2, 8), "twice": True})
    assert told(function) == [("scaled", "compiled")] and function.refused is None


class Ring:
    """Remembers as much as it has room for."""

    def __init__(self, room):
        self.model = Scaled()
        self.held = torch.zeros(room, 8)
        self.at = torch.zeros(1, dtype=torch.long)


def remembered(root, x, order):
    """Writes ``[8]`` down, and gives the sum of what stands in these places."""
    root.held.index_copy_(0, root.at % root.held.shape[0], (x @ root.model.weight)[None])
    root.at.add_(1)
    torch._check(order.shape[0] <= root.held.shape[0])
    return (root.held[: order.shape[0]] * (order >= 0)[:, None]).sum(0)


def ring(room, files):
    root = Ring(room)
    return Ahead(
        remembered,
        root,
        name="remembered",
        model=root.model,
        dynamic={"order": (0,)},
        programs=Programs(files),
        sizes=RootSizes([(root.held, (0,))], lambda given: {**given, "order": torch.arange(room // 2)}),
    )


def test_one_program_serves_roots_whose_tensors_are_of_another_size(tmp_path):
    files, made = ProgramFiles(tmp_path / "programs"), []
    for room in (12, 5, 40):
        function, plain = ring(room, files), Ring(room)
        for turn in range(2 * room):
            x, order = torch.full((8,), float(turn)), torch.arange(2 + turn % (room - 1))
            torch.testing.assert_close(function(x, order), remembered(plain, x, order))
            torch.testing.assert_close(function.root.held, plain.held)
        assert function.refused is None
        made += told(function)
    assert made == [("remembered", "compiled")]  # and then it was at hand
    assert len(files.held()) == 1
    turned = ring(12, files)
    turned.root.held = torch.zeros(8, 12).T  # whose elements lie otherwise
    turned(torch.ones(8), torch.arange(3))
    assert "was made for a self.held" in turned.refused


@pytest.mark.parametrize("spoil", SPOILT, ids=lambda spoil: spoil.__name__)
def test_what_cannot_be_used_is_said_and_everything_works(written, fell_back, tmp_path, monkeypatch, spoil):
    files = ProgramFiles(tmp_path / "programs")
    files.folder.mkdir(mode=0o700)
    ((path, _),) = written.held()
    copied = files.folder / path.name
    copied.write_bytes(path.read_bytes())
    copied.chmod(0o600)
    spoil(copied)
    monkeypatch.setattr(inside.PROGRAMS_COMPILED, _no_compiler)
    function = ahead(Scaled(), files)
    x = torch.ones(5, 8)
    assert torch.equal(function(x, True), scaled(function.root, x, True))
    assert SPOILT[spoil] in fell_back[0].reason
    assert "there is no compiler" in fell_back[1].reason


def _no_compiler(function, args):
    raise RuntimeError("there is no compiler")


def test_what_decides_a_program_decides_its_name(written):
    x = torch.ones(5, 8)
    function = ahead(Scaled(), written)
    names = {function.key({"x": x, "twice": twice}) for twice in (True, False)}
    names |= {ahead(Scaled(), written, about="other").key({"x": x, "twice": True})}
    wider = Scaled()
    wider.weight = nn.Parameter(torch.ones(8, 9))
    names |= {ahead(wider, written).key({"x": x, "twice": True})}
    names |= {function.key({"x": x.double(), "twice": True})}
    assert len(names) == 5
    assert function.key({"x": torch.ones(9, 8), "twice": True}) in names  # of any length
    assert ahead(Scaled(seed=3), written).key({"x": x, "twice": True}) in names  # and any weights


def test_threads_decide_the_name_too(written, monkeypatch):
    function, given = ahead(Scaled(), written), {"x": torch.ones(5, 8), "twice": True}
    before = function.key(given)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert function.key(given) != before


# ---------------------------------------------------------------------- while it is made


def test_requests_are_served_eagerly_while_their_step_is_compiled(tmp_path, monkeypatch):
    begun, go = threading.Event(), threading.Event()

    def compiling(function, args):
        begun.set()
        assert go.wait(60)
        raise Refused("it was only a test")

    monkeypatch.setattr(inside.PROGRAMS_COMPILED, compiling)
    monkeypatch.setenv("KVCACHE_HOME", str(tmp_path))
    manager = KVCacheManager(build("llama"), max_cache_length=64)
    given = {"max_new_tokens": 12, "do_sample": False}
    expected = torch.cat(list(manager.stream(token_ids(1, 9), backend="eager", **given)), 1)
    warming = manager.warm_up(token_ids(1, 9), backend="compile", background=True, **given)
    assert begun.wait(60)
    for _ in range(3):
        assert torch.equal(torch.cat(list(manager.stream(token_ids(1, 9), backend="compile", **given)), 1), expected)
        report = manager.report()
        assert (report.backend, report.fallback) == ("eager", "its steps are being compiled")
    assert not warming.over
    with pytest.raises(TimeoutError, match="requests run eagerly meanwhile"):
        warming.wait(0)
    go.set()
    until(lambda: warming.over)
    assert warming.made == ()


def test_a_warm_up_that_fails_says_so_when_it_is_waited_for(monkeypatch, tmp_path):
    monkeypatch.setenv("KVCACHE_HOME", str(tmp_path))
    manager = KVCacheManager(build("llama"), max_cache_length=16)
    warming = manager.warm_up(token_ids(1, 30), backend="eager", background=True, max_new_tokens=4, do_sample=False)
    with pytest.raises(Exception, match="16"):
        warming.wait(60)


# ---------------------------------------------------------------------- real processes

_PROCESS = """
import json, sys, time
import torch
sys.path[:0] = {path!r}
torch.set_num_threads(1)
from support.families import build, token_ids
from kvcache import KVCacheManager, subscribe
reasons = []
subscribe(lambda event: reasons.append(str(event)), ["fell_back"])
manager = KVCacheManager(build("llama"), max_cache_length={slots})
given = dict(max_new_tokens=12, do_sample=False)
eager = torch.cat(list(manager.stream(token_ids(1, 9), backend="eager", **given)), 1)
times = []
for _ in range(3):
    began = time.perf_counter()
    tokens = torch.cat(list(manager.stream(token_ids(1, 9), backend="compile", **given)), 1)
    times.append(time.perf_counter() - began)
print(json.dumps(dict(slots=manager.report().layers[0].capacity, same=torch.equal(tokens, eager), times=times, reasons=reasons, backend=manager.report().backend,
      how=[one.how for one in manager.engine.decoder.programs.made], dynamo="torch._dynamo.convert_frame" in sys.modules)))
"""


@pytest.mark.slow
def test_the_second_process_traces_nothing(tmp_path):
    environment = {
        **os.environ,
        "KVCACHE_HOME": str(tmp_path / "home"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "torch"),
    }

    def process(slots):
        script = _PROCESS.format(path=[path for path in sys.path if path], slots=slots)
        ran = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=1200
        )
        assert ran.returncode == 0, ran.stderr
        return json.loads(ran.stdout.splitlines()[-1])

    first, second = process(64), process(90)
    for one, slots in ((first, 64), (second, 90)):
        assert one["same"]
        assert one["slots"] == slots
        assert one["reasons"] == []
        assert one["backend"] == "compile"
    assert first["how"] == ["compiled"]
    assert second["how"] == ["loaded"]
    assert second["times"][0] < first["times"][0] / 4
