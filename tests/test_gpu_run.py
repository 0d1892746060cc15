"""The timetable for a GPU: steps that fail, hang or lack something stop no other, and a second run goes on from there."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import carry
import gpu
from timetable import TAIL, Results, Step, run_all

pytestmark = pytest.mark.one_release

ROOT = Path(__file__).resolve().parents[1]
ABOUT = {"rehearsal": True, "code": "1"}
KEY = ("rehearsal", "code")


def step(name, program="", limit=60.0, **given):
    return Step(name, limit, (sys.executable, "-S", "-c", program), **given)


class Runner:
    """Runs steps as `gpu.py` does, into a folder."""

    def __init__(self, folder):
        self.folder = folder
        self.file = folder / "gpu.json"
        self.said = []

    def __call__(self, *steps, about=ABOUT, again=False, missing=(), seconds=60.0):
        self.said.clear()
        return run_all(
            steps,
            Results(self.file, about, KEY, again),
            environment=lambda step: os.environ,
            log=self.folder / "gpu.log",
            missing=lambda: dict.fromkeys(missing, "not there"),
            deadline=time.monotonic() + seconds,
            say=self.said.append,
        )

    def __getitem__(self, name):
        return json.loads(self.file.read_text())["steps"][name]


@pytest.fixture
def run(tmp_path):
    return Runner(tmp_path)


def test_a_failing_step_stops_no_other(run):
    assert not run(
        step("a", "print('x' * 9000); raise SystemExit('no such kernel')"), step("b", "print('half\\rdone')")
    )
    assert run["a"] | {"seconds": 0} == {
        "limit": 60.0,
        "status": "failed",
        "seconds": 0,
        "exit": 1,
        "reason": "no such kernel",
        "tail": ("x" * 9000 + "\nno such kernel")[-TAIL:],
    }
    assert (run["b"]["status"], run["b"]["tail"]) == ("passed", "done")
    assert [line.split()[:2] for line in run.said] == [["a", "failed"], ["b", "passed"]]


@pytest.mark.parametrize("program", ["import os; os.kill(os.getpid(), 11)", None])
def test_what_dies_or_does_not_start_is_told(run, program):
    odd = step("a", program) if program else Step("a", 60, ("/no/such/program",))
    assert not run(odd)
    assert run["a"]["reason"] == (
        "ended by SIGSEGV" if program else "[Errno 2] No such file or directory: '/no/such/program'"
    )


def test_a_step_that_lacks_a_wheel_is_skipped(run):
    assert not run(step("a", needs=("perth", "librosa")), step("b", needs=("conformer",)), missing=["librosa"])
    assert (run["a"]["status"], run["a"]["reason"]) == ("skipped", "needs librosa")
    assert run["b"]["status"] == "passed"


HANGS = "import threading; threading.Event().wait()"
CHILD = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import threading; threading.Event().wait()"])
print(child.pid, flush=True)
child.wait()
"""


def alive(process):
    """Whether a process runs; one that ended and waits to be asked about does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_hanging_step_is_stopped_with_what_it_started(run, monkeypatch):
    wait = subprocess.Popen.wait

    def soon(process, timeout=None):
        """The limit is over as soon as the step has said which process it started."""
        if timeout is None:
            return wait(process)
        while not (run.folder / "gpu.log").read_text().rpartition("==> a")[2].split("\n")[-2].isdigit():
            os.sched_yield()
        raise subprocess.TimeoutExpired(process.args, timeout)

    with monkeypatch.context() as patched:
        patched.setattr(subprocess.Popen, "wait", soon)
        assert not run(step("a", CHILD, limit=0.5))
    assert (run["a"]["status"], run["a"]["reason"]) == ("timed out", "stopped after 0.5 s")
    child = int(run["a"]["tail"])
    end = time.monotonic() + 10
    while alive(child) and time.monotonic() < end:  # killed, but perhaps not yet gone
        os.sched_yield()
    assert not alive(child)
    assert not run(step("a", CHILD, limit=0.5), step("b"))  # by the clock
    assert (run["a"]["status"], run["b"]["status"]) == ("timed out", "passed")
    assert run["a"]["seconds"] >= 0.5


def test_nothing_runs_beyond_the_deadline(run):
    assert not run(step("a"), seconds=0)
    assert (run["a"]["status"], run["a"]["reason"]) == ("skipped", "no time left")
    assert not run(step("a", CHILD), seconds=1)
    assert run["a"]["reason"].startswith(("stopped after", "no time left"))
    assert run["a"]["seconds"] < 60


def test_a_second_run_goes_on(run, tmp_path):
    count = (
        "import pathlib, sys; f = pathlib.Path(sys.argv[1]); f.write_text((f.read_text() if f.exists() else '') + 'x')"
    )

    def counted(name, more="", **given):
        return Step(name, 60, (sys.executable, "-S", "-c", count + more, str(tmp_path / name)), **given)

    steps = [counted("a"), counted("b", "; raise SystemExit(len(f.read_text()) < 2)"), counted("c", always=True)]
    assert not run(*steps)
    assert run(*steps)
    assert [(tmp_path / name).read_text() for name in "abc"] == ["x", "xx", "xx"]
    assert "of an earlier run" in run.said[0]
    assert run(*steps, again=True)
    assert [(tmp_path / name).read_text() for name in "abc"] == ["xx", "xxx", "xxx"]


@pytest.mark.parametrize("other", [{"code": "2"}, {"rehearsal": False}])
def test_results_of_something_else_are_left_alone(run, other):
    assert run(step("a"))
    before = run.file.read_text()
    with pytest.raises(SystemExit, match=r"results of something else.*--results.*--again"):
        run(step("a"), about=ABOUT | other)
    assert run.file.read_text() == before


def test_results_are_there_while_a_later_step_is_killed(tmp_path):
    """The runner itself dies in its second step, as it does where a machine is taken back."""
    program = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
from pathlib import Path
from timetable import Results, Step, run_all
kill = "import os, signal; os.kill(os.getppid(), signal.SIGKILL)"
steps = [Step("a", 60, (sys.executable, "-S", "-c", "")), Step("b", 60, (sys.executable, "-S", "-c", kill))]
folder = Path({str(tmp_path)!r})
results = Results(folder / "gpu.json", {{}}, ())
run_all(steps, results, environment=lambda step: os.environ, log=folder / "gpu.log", missing=dict, deadline=time.monotonic() + 60)
"""
    assert subprocess.run([sys.executable, "-S", "-c", program], capture_output=True).returncode == -signal.SIGKILL
    kept = json.loads((tmp_path / "gpu.json").read_text())["steps"]
    assert {name: one["status"] for name, one in kept.items()} == {"a": "passed"}


# ---------------------------------------------------------------------- the real timetable


def timetables(folder=Path("there")):
    return [make(folder, folder, folder, []) for make in (gpu.timetable, gpu.rehearsal)]


def test_the_timetable_fits_into_ten_minutes():
    steps, rehearsed = timetables()
    assert gpu.STARTING + sum(one.limit for one in steps) <= gpu.DEADLINE <= 600
    assert [one.name for one in steps] == [one.name for one in rehearsed]
    assert [one.needs for one in steps] == [one.needs for one in rehearsed]
    assert {need for one in steps for need in one.needs} <= set(carry.pinned())
    assert len(steps) - 2 + len(["gpu.json", "gpu.log"]) <= 8  # files that are to come back


def test_the_page_has_the_timetable():
    told = re.findall(r"^\| `(\w+)` \| (\d+) \|", (ROOT / "docs" / "gpu.md").read_text(), re.MULTILINE)
    assert told == [(one.name, f"{one.limit:g}") for one in timetables()[0]]


def test_only_rehearsals_are_marked_and_on_a_cpu():
    steps, rehearsed = timetables()
    for one in steps:
        assert not {"--rehearsal", "--quick", "cpu"} & set(one.command)
    for one in rehearsed:
        assert one.name in ("wheels", "tests") or {"--rehearsal", "--quick", "cpu"} <= set(one.command)


@pytest.mark.parametrize(
    ("options", "said"), [([], "sees no CUDA device.*--rehearse"), (["--inject", "fail=tests"], "add --rehearse")]
)
def test_no_result_without_a_gpu(monkeypatch, tmp_path, options, said):
    known = {"cuda": False, "machine": {"gpu": None, "cpu": "x"}, "versions": {}, "commit": "unknown"}
    monkeypatch.setattr(gpu, "facts", lambda environment, seconds: known)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--results", str(tmp_path / "out"), *options])
    with pytest.raises(SystemExit, match=said):
        gpu.main()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("program", "said"),
    [("import no_such_module", "cannot run this: ModuleNotFoundError"), (HANGS, "did not start within 0.5 s")],
)
def test_a_python_that_cannot_run_it_is_told(monkeypatch, program, said):
    monkeypatch.setattr(gpu, "FACTS", program)
    with pytest.raises(SystemExit, match=said):
        gpu.facts(os.environ, 0.5 if program == HANGS else 60)


def test_faults_go_where_they_are_told():
    steps = [step("a"), step("b"), step("c")]
    failing, same, hanging = gpu.injected(steps, "fail=a,hang=c")
    assert same == steps[1]
    assert failing.command != steps[0].command
    assert hanging.limit < 10
    with pytest.raises(SystemExit, match="no step 'd' to hang; there are a, b, c"):
        gpu.injected(steps, "hang=d")


def test_a_benchmark_marks_a_rehearsal(tmp_path):
    from common import arguments, keep

    for given in (["--rehearsal"], []):
        options = arguments("").parse_args([*given, "--json", str(tmp_path / "x.json")])
        keep("x", [], {}, options)
        assert json.loads((tmp_path / "x.json").read_text()).get("rehearsal", False) is bool(given)
    assert isinstance(options, argparse.Namespace)


# ---------------------------------------------------------------------- wheels


def wheels(folder, *names, size=100):
    made = []
    for name in names:
        made.append(folder / f"{name}-1.0-py3-none-any.whl")
        made[-1].write_bytes(b"0" * size)
    return made


def test_what_is_carried_must_be_small_enough(tmp_path, capsys):
    made = wheels(tmp_path, "small") + wheels(tmp_path, "large", size=2**20)
    carry.check_size(made, 2**19, 2)
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in said] == [
        "large-1.0-py3-none-any.whl",
        "tree",
        "small-1.0-py3-none-any.whl",
        "2",
    ]
    with pytest.raises(SystemExit, match=r"take 1\.5 MiB, which is more than 1\.4"):
        carry.check_size(made, 2**19, 1.4)


def test_what_cannot_be_imported_is_named(tmp_path):
    """Each wheel is unpacked into a folder of its own, and imported beside the others."""
    packages, texts = (
        {},
        {
            "good": "",
            "broken": "raise OSError('no CUDA')",
            "lonely": "import absent",
            "chatterbox-tts": "import absent",
        },
    )
    for name, text in texts.items():
        packages[name] = ("1.0", name.replace("-", "_"))
        with zipfile.ZipFile(tmp_path / f"{packages[name][1]}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{packages[name][1]}.py", text)
    packages["gone"] = ("1.0", "gone")
    site = tmp_path / "site"
    missing = carry.install(tmp_path, site, ["good"], packages)
    assert missing == {
        "good": f"no wheel of good==1.0 in {tmp_path}: run make gpu-wheels where there is a network",
        "gone": f"no wheel of gone==1.0 in {tmp_path}: run make gpu-wheels where there is a network",
        "broken": "OSError: no CUDA",
        "lonely": "ModuleNotFoundError: No module named 'absent'",
    }
    assert json.loads((site / carry.CHECKED).read_text()) == missing
    assert list(carry.install(tmp_path, site, [], packages)) == ["gone", "broken", "lonely"]
    assert (site / "good" / "good.py").exists()


def test_a_step_sees_the_wheels_that_it_needs(tmp_path):
    paths = gpu.environment_of(tmp_path, tmp_path, ("a", "b", gpu.T3[0]))["PYTHONPATH"].split(os.pathsep)
    seen = [Path(path).name for path in paths if path.startswith(str(tmp_path))]
    assert seen == [*gpu.T3, "a", "b"]


def test_the_list_pins_each_package_and_its_module(tmp_path):
    assert carry.pinned()["chatterbox-tts"] == ("0.1.7", "chatterbox")
    (tmp_path / "list.txt").write_text("# a remark\nlibrosa>=0.11  # librosa\n")
    with pytest.raises(SystemExit, match=r"'librosa>=0\.11  # librosa' is not NAME==VERSION"):
        carry.pinned(tmp_path / "list.txt")


def test_a_copy_knows_its_commit_until_it_is_changed(tmp_path):
    code = tmp_path / "kvcache" / "a.py"
    code.parent.mkdir()
    code.write_text("x = 1\n")
    assert carry.carried_commit(tmp_path, tmp_path) is None
    (tmp_path / carry.STAMP).write_text(json.dumps({"commit": "abc", "code": carry.code_digest(tmp_path)}))
    assert carry.carried_commit(tmp_path, tmp_path) == "abc"
    code.write_text("x = 2\n")
    assert carry.carried_commit(tmp_path, tmp_path) == "abc-changed"
