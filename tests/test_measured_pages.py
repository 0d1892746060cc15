"""The pages that quote measurements say what the files in `benchmarks/results/` hold, no more and nothing older."""

import html
import json
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "docs" / "generate"))

import figures
import pages
import summary
from common import command
from measured import ROOT, Result, cell, digits, ms, results, signed

pytestmark = pytest.mark.one_release


def test_the_committed_pages_are_what_the_results_make_of_them():
    stale = [str(page.relative_to(ROOT)) for page, text in pages.pages().items() if page.read_text() != text]
    assert not stale, "run python docs/generate/pages.py"


def test_the_page_on_benchmarks_begins_with_ten_lines():
    """Each is what its own section says, which it leads to; what is slower is among them."""
    whole = summary.ten_lines(results().__getitem__)
    assert pages.BENCHMARKS.read_text().startswith(f"# Benchmarks\n\n{whole}\n\n")
    _, _, *lines = whole.splitlines()
    assert len(lines) == 10
    gains = [float(line.split(" | ")[-1].removesuffix("× |")) for line in lines]
    assert min(gains) < 1 < max(gains)
    assert whole.replace("](#", "](docs/benchmarks.md#") in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", figures.drawable(results()))
def test_the_committed_figures_show_what_the_results_say(name):
    svg = (figures.FOLDER / f"{name}.svg").read_text()
    (told,) = re.findall(r"<dc:description>(.*?)</dc:description>", svg, re.DOTALL)
    shown = json.loads(json.dumps(figures.drawn(name, results())))
    assert json.loads(html.unescape(told)) == shown, f"run python docs/generate/figures.py {name}"


def test_figures_are_drawn_the_same_each_time(tmp_path):
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        figures.drawn("window", results(), folder)
    assert (tmp_path / "a" / "window.svg").read_bytes() == (tmp_path / "b" / "window.svg").read_bytes()


def test_the_parts_of_a_step_are_the_whole():
    decode = results()["t3_decode"]
    for (label, context), parts in figures.parts_of_a_step(decode, "english").items():
        side, precision = figures.SIDES[label]
        row = decode.row(variant="english", side=side, precision=precision, context=context)
        assert sum(parts) == pytest.approx(row["ms/token"]) and min(parts) > 0
        # fp32: 2 rows of 30 layers of 1,024 keys and values, at the speed at which this machine copies
        if precision == "fp32":
            read = 2 * 30 * 2 * 1024 * 4 * context / decode.data["copy, GB/s"] / 1e6
            assert parts[1] == pytest.approx(read, rel=1e-6)


def test_a_changed_figure_changes_the_page():
    found = results()
    data = json.loads(json.dumps(found["t3_step"].data))
    data["rows"][0]["ms/step, median"] = 777.7
    assert "| upstream's loop | 778 (458–568) |" in pages.rendered(
        "benchmarks", found | {"t3_step": Result("t3_step", data)}
    )


def test_a_file_without_words_of_its_own_gets_a_section_of_the_scripts():
    data = json.loads(json.dumps(results()["t3_step"].data))
    data |= {"command": "python benchmarks/t3_step.py --all", "rows": [{"what": "a|b", "MiB": 12.345}, {"extra": None}]}
    page = pages.rendered("benchmarks", results() | {"new": Result("new", data)})
    section = page[page.index("### One decode step of Chatterbox's T3 at a long context") :]
    assert "| a\\|b | 12.35 | – |" in section and "| – | – | – |" in section  # the last row has no value that it shows
    assert "`python benchmarks/t3_step.py --all`, kept in `benchmarks/results/new.json`" in section
    assert "AMD EPYC, 2 cores" in section and "| upstream_over_default | 1.374 |" in section


def test_each_figure_names_its_command_and_hardware():
    page = pages.BENCHMARKS.read_text()
    named = re.findall(
        r"^> `.+`, kept in `benchmarks/results/(\w+)\.json`\.\n> On .+ cores?, .+ torch .+\.$", page, re.MULTILINE
    )
    assert set(named) == set(results())


def test_what_is_missing_is_named():
    with pytest.raises(LookupError, match=r"wants benchmarks/results/t3_step\.json"):
        pages.rendered("benchmarks", {name: found for name, found in results().items() if name != "t3_step"})


@pytest.mark.parametrize(
    ("value", "text"), [(0.9841, "0.984"), (9.996, "10.0"), (98.44, "98.4"), (984.4, "984"), (9843.2, "9843"), (0, "0")]
)
def test_digits(value, text):
    assert digits(value) == text


def test_figures_in_words():
    assert [ms(99.94), ms(99.96), signed(-0.04), signed(-3.14), signed(3.16)] == [
        "99.9",
        "100",
        "0.0 %",
        "−3.1 %",
        "+3.2 %",
    ]
    assert cell({"a": 1.5, "b": [1, None]}) == "a 1.500, b 1, –"


def test_a_command_names_no_place_of_the_machine():
    argv = [
        "/somewhere/benchmarks/quality.py",
        "--json",
        "/tmp/a.json",
        "--kvpress",
        "/opt/venv/bin/python",
        "--plot=/x/a b.png",
    ]
    assert (
        command([*argv, "--pieces", "6"]) == "python benchmarks/quality.py --kvpress python '--plot=a b.png' --pieces 6"
    )
