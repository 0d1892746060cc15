"""`kvcache bench`: which benchmarks it knows, and that one of them gets its arguments and gives its exit code."""

import ast
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

from kvcache.cli import main
from kvcache.errors import InputError
from kvcache.tools import benchmarks, benchmarks_folder

pytestmark = pytest.mark.one_release

ROOT = Path(__file__).resolve().parent.parent

FAKE = '''"""What a fake one measures: v1.5 of nothing. And more."""
import json
import sys

from common import NAME

print(json.dumps([NAME, sys.argv[1:]]))
print("under way", file=sys.stderr)
sys.exit(3 if "--fail" in sys.argv else 0)
'''


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    (folder / "common.py").write_text("NAME = 'shared'\n")
    (folder / "fake.py").write_text(FAKE)
    (folder / "helper.py").write_text('"""No benchmark: it has nothing of what they share."""\n')
    return tmp_path


def imports_common(script):
    return any(
        isinstance(node, ast.ImportFrom) and node.module == "common" for node in ast.walk(ast.parse(script.read_text()))
    )


def test_the_list_is_what_lies_in_the_folder(capsys):
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("*.py") if imports_common(path)}
    assert len(scripts) > 5
    assert main(["bench", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["folder"] == str(ROOT / "benchmarks") and set(said["benchmarks"]) == scripts
    for name, sentence in said["benchmarks"].items():
        assert sentence.endswith((".", "?")), name
        assert sentence[:20] in (ROOT / "benchmarks" / f"{name}.py").read_text()
    assert main(["bench"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in scripts)


def test_only_benchmarks_are_listed_by_their_first_sentence(checkout, capsys):
    for folder in (checkout, checkout / "benchmarks"):
        assert main(["bench", "--folder", str(folder), "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert said["benchmarks"] == {"fake": "What a fake one measures: v1.5 of nothing."}


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        ([], []),
        (["--quick", "--json", "result.json"], ["--quick", "--json", "result.json"]),  # --json is its own here
        (["--folder", "its own", "-x", "7", "word"], ["--folder", "its own", "-x", "7", "word"]),
        (["--", "--help"], ["--help"]),
        (["--quick", "--", "word"], ["--quick", "--", "word"]),
    ],
)
def test_what_stands_behind_the_name_goes_to_the_benchmark(given, passed, checkout, capfd):
    assert main(["bench", "--folder", str(checkout), "fake", *given]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out) == ["shared", passed] and err == "under way\n"


def test_its_exit_code_is_passed_on(checkout, capfd):
    assert main(["bench", "--folder", str(checkout), "fake", "--fail"]) == 3
    script = checkout / "benchmarks" / "killed.py"
    script.write_text("from common import NAME\nimport os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    if sys.platform != "win32":
        assert main(["bench", "--folder", str(checkout), "killed"]) == 128 + 9  # as a shell has it
    assert benchmarks(checkout / "benchmarks")["killed"] == ""


def test_without_a_checkout_it_says_where_to_get_one(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("kvcache.tools._bench.__file__", str(tmp_path / "site-packages" / "kvcache" / "bench.py"))
    with pytest.raises(InputError, match="clone the repository"):
        benchmarks_folder()
    assert main(["bench"]) == 2
    assert "--folder" in capsys.readouterr().err
