"""Sides of a benchmark in processes of their own: who lives with whom, who takes turns when, and what is left of one that dies."""

import json
import multiprocessing
import os
import select
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from statistics import median

import pytest

pytest.importorskip("rich")
if sys.platform == "win32":
    pytest.skip("signals and /proc", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import common
import processes
from processes import Failure, Group, Measured, Phase, Processes, resident
from support.bench_sides import MIB, ends, growing, parent, steady

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.one_release

linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")


@pytest.fixture
def trace(tmp_path):
    return tmp_path / "trace"


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    assert multiprocessing.active_children() == []


def lines(trace):
    return trace.read_text().splitlines()


def ended(pid, seconds=10):
    """Whether a process that is none of ours has ended, or does so soon."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([handle], [], [], seconds)[0])
    finally:
        os.close(handle)


def over(slow, fast):
    return median(slow) / median(fast)


# ---------------------------------------------------------------------- taking turns


def test_without_a_limit_all_live_together_and_every_round_visits_each(trace):
    sides = {name: (steady, trace, name) for name in "abc"}
    measured = Processes(sides, 1).run([Phase(2, warmup=1), Phase(1, warmup=0, word="more")])
    ready, first, told, second = (
        ["a ready", "b ready", "c ready"],
        list("abc") * 3,
        ["a more", "b more", "c more"],
        "abc",
    )
    assert lines(trace) == [*ready, *first, *told, *second]
    assert [group.sides for group in measured.groups] == [("a", "b", "c")]
    assert {name: len(measured.seconds(name)) for name in sides} == {
        "a": 2,
        "b": 2,
        "c": 2,
    }  # the warm-up is not counted
    assert {name: len(measured.seconds(name, 1)) for name in sides} == {"a": 1, "b": 1, "c": 1}
    assert measured.failed == {} and measured.mark("a") == {}
    assert all(measured.notes[name]["held"] == 0 for name in sides)


@linux
def test_those_that_do_not_fit_form_groups_each_with_the_reference(trace):
    # 100 MiB each beside the 20 or so of an interpreter: two fit, three do not, whatever the parent takes.
    sides = {name: (steady, trace, name, 100) for name in "abc"}
    budget = resident(os.getpid()) + 300 * MIB
    measured = Processes(sides, 1, memory=budget, reference="b").run([Phase(2, warmup=1)])
    assert [group.sides for group in measured.groups] == [("b", "a"), ("b", "c")]
    turns = [line for line in lines(trace) if "ready" not in line]
    assert turns == ["b", "a"] * 3 + ["b", "c"] * 3
    assert len(measured.seconds("b")) == 4 and len(measured.seconds("c")) == 2
    facts = measured.facts()
    assert 200 < facts["memory, MiB at most"] <= facts["memory, MiB allowed"] == budget / MIB
    assert facts["groups"] == [["b", "a"], ["b", "c"]]


@linux
def test_one_that_needs_more_than_was_thought_is_put_off_while_it_is_prepared(trace):
    sides = {name: (steady, trace, name, size) for name, size in {"a": 10, "b": 100, "large": 250}.items()}
    measured = Processes(sides, 1, memory=resident(os.getpid()) + 360 * MIB).run([Phase(1, warmup=0)])
    assert [group.sides for group in measured.groups] == [("a", "b"), ("a", "large")]
    assert measured.failed == {}


@linux
def test_one_that_grows_over_the_budget_lets_the_last_go_and_nobody_fails(trace):
    sides = {"a": (steady, trace, "a", 50), "b": (growing, trace, "b", 200, 1), "c": (steady, trace, "c", 150)}
    measured = Processes(sides, 1, memory=resident(os.getpid()) + 390 * MIB).run([Phase(3, warmup=0)])
    assert [group.sides for group in measured.groups] == [("a", "b"), ("a", "c")]
    assert measured.failed == {} and len(measured.seconds("c")) == 3  # those of its first try do not count


@linux
def test_where_two_do_not_fit_they_are_measured_one_after_the_other(trace):
    sides = {name: (steady, trace, name, 200) for name in "ab"}
    measured = Processes(sides, 1, memory=resident(os.getpid()) + 300 * MIB).run([Phase(2, warmup=0)])
    assert [group.sides for group in measured.groups] == [("b",), ("a",)]  # the reference goes, and comes again
    assert measured.ratio("a", "b", over) == over(measured.seconds("a"), measured.seconds("b"))


@linux
def test_a_budget_that_is_too_small_for_one_side_measures_it_all_the_same(trace):
    measured = Processes({"a": (steady, trace, "a", 10)}, 1, memory=1).run([Phase(1, warmup=0)])
    assert len(measured.seconds("a")) == 1 and measured.at_most > 1


# ---------------------------------------------------------------------- sides that die


def test_sides_that_end_by_themselves_are_named_and_the_others_go_on(trace, capfd):
    ways = {
        ("killed", 0): ("killed by SIGKILL (out of memory?)", "on my way"),
        ("killed", 2): ("killed by SIGKILL (out of memory?)", "on my way"),
        ("raises", 0): ("ended with exit code 1", "ValueError: no such model"),
        ("exits", 2): ("ended with exit code 7", "on my way"),
        ("returns", 2): ("ended with exit code 0 before it was told to", "on my way"),
    }
    bad = {f"{way} {turns}": (ends, trace, "bad", turns, way) for way, turns in ways}
    sides = {"a": (steady, trace, "a"), **bad, "c": (steady, trace, "c")}
    measured = Processes(sides, 1).run([Phase(1, warmup=0), Phase(2, warmup=0, word="more")])
    assert lines(trace)[-2:] == ["a", "c"] and len(measured.seconds("c", 1)) == 2
    assert measured.failed.keys() == bad.keys() and measured.mark("a") == {"failed": None}
    passed_on = capfd.readouterr().err
    for (way, turns), (how, said) in ways.items():
        name = f"{way} {turns}"
        assert measured.failed[name].how == how and measured.mark(name) == {"failed": how}
        assert measured.failed[name].said[-1] == said and said in passed_on
        # What lived through the first phase keeps it; nothing is left of the second.
        assert len(measured.seconds(name)) == (turns > 0) and measured.seconds(name, 1) == []
        assert measured.ratio("a", name, over, 1) is None
    assert measured.ratio("a", "c", over, 1) > 0


def test_without_its_reference_the_others_are_measured_and_not_compared_with_it(trace):
    sides = {"a": (ends, trace, "a", 1, "killed"), "b": (steady, trace, "b"), "c": (steady, trace, "c")}
    measured = Processes(sides, 1).run([Phase(2, warmup=0)])
    assert measured.ratio("a", "b", over) is None and measured.ratio("b", "c", over) > 0


@linux
@pytest.mark.parametrize("way", ["killed", "exits"])
def test_what_a_dead_side_has_started_ends_with_it(way, trace):
    measured = Processes({"a": (parent, trace, "a", 1, way)}, 1).run([Phase(2, warmup=0)])
    assert "a" in measured.failed
    assert ended(int(lines(trace)[0].split()[-1]))


@linux
def test_nothing_is_left_after_an_interrupt(trace, monkeypatch):
    def interrupted(side, meanwhile):
        raise KeyboardInterrupt  # as Ctrl-C does, which a shell's background job would not be sent

    monkeypatch.setattr("processes._Side.answer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Processes({"a": (steady, trace, "a")}, 1).run([Phase(1)])


@linux
def test_a_side_that_is_being_prepared_ends_with_a_parent_that_is_killed(trace):
    os.mkfifo(trace)  # so that reading waits for what the side writes
    folders = [str(ROOT / "benchmarks"), str(ROOT / "tests")]
    code = (
        "import sys; sys.path[:0] = sys.argv[2:]\n"
        "import processes\n"
        "from support import bench_sides\n"
        "processes.Processes({'a': (bench_sides.stuck, sys.argv[1], 'a')}, 1).run([processes.Phase(1)])"
    )
    runs = subprocess.Popen([sys.executable, "-c", code, trace, *folders], stderr=subprocess.DEVNULL)
    pid = int(trace.read_text().split()[-1])
    runs.kill()
    runs.wait()
    assert ended(pid)


# ---------------------------------------------------------------------- what is made of it


def test_ratios_are_of_the_same_group_or_over_the_reference_of_each():
    measured = Measured("ref", None)
    measured.groups = [
        Group(("ref", "a", "b"), ({"ref": [10.0], "a": [5.0], "b": [2.0]},)),
        Group(("ref", "c"), ({"ref": [30.0], "c": [5.0]},)),  # the machine has become three times slower
        Group(("lone",), ({"lone": [4.0]},)),
    ]
    assert measured.ratio("a", "b", over) == 2.5
    assert measured.ratio("ref", "c", over) == 6
    assert measured.ratio("a", "c", over) == pytest.approx(3)  # not 1
    assert measured.ratio("ref", "ref", over) == 1 and measured.seconds("ref") == [10, 30]
    assert measured.ratio("a", "lone", over) == 1.25 and measured.ratio("a", "none", over) is None


def test_the_file_and_the_table_are_written_and_the_exit_code_is_1(tmp_path, capsys):
    options = Namespace(json=tmp_path / "result.json", quick=False, rehearsal=False, memory=16 * 10**9, sides=None)
    rows = [{"side": "a", "s": 1.0, "failed": None}, {"side": "b", "s": None, "failed": "killed by SIGKILL"}]
    failed = {"b": Failure("killed by SIGKILL", ("the last", "words"))}
    with pytest.raises(SystemExit) as ended:
        common.finish("fake", rows, {}, options, failed)
    for word in ("b: killed by SIGKILL", "the last", "words", "--memory 12.0GB", "--sides"):
        assert word in str(ended.value)  # which Python prints, with exit code 1
    result = json.loads(options.json.read_text())
    assert result["rows"] == rows and result["failed"] == {
        "b": {"how": "killed by SIGKILL", "stderr": ["the last", "words"]}
    }
    assert "killed by SIGKILL" in capsys.readouterr().out


@linux
def test_the_budget_leaves_a_reserve_and_has_a_ceiling():
    free = processes.available()
    assert 0 <= processes.allowed() <= free - 2**30 or processes.allowed() == 0
    assert processes.allowed(most=2**20) == 2**20


def test_a_side_that_is_not_there_is_named():
    with pytest.raises(SystemExit, match="there is no d; there are a, b, c"):
        common.chosen(dict.fromkeys("abc", 1), "a,d")
    assert common.chosen(dict.fromkeys("abc", 1), "c,a") == {"c": 1, "a": 1}
