"""The documentation: its Python blocks run and print what they say, its links lead somewhere, and the figures it quotes
have their files."""

import copy
import functools
import io
import json
import logging
import pkgutil
import re
from contextlib import redirect_stdout

import pytest
from support.inside.ground import LISTENERS
from support.pages import ROOT, blocks

from kvcache_chatterbox import load_t3

pytestmark = pytest.mark.one_release

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROSE = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
CODE = re.compile(r"^```(?:python|sh|bash|console)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
WIDEST = 79  # characters of a line of code that its column shows
ANY_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
ELSEWHERE = re.compile(r"https://[a-z0-9-]+(\.[a-z0-9-]+)+(/[\w.~%+@:=-]+)*/?(#[\w.-]+)?")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
RESULTS = re.compile(r"benchmarks/results/[\w.-]+\.json")


def name(page):
    return str(page.relative_to(ROOT))


def slug(heading):
    """The anchor that the site makes of a heading."""
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip())


def broken_links(page, text):
    for target in LINK.findall(ANY_FENCE.sub("", text)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists() or (anchor and anchor not in map(slug, HEADING.findall(file.read_text()))):
            yield target


@pytest.mark.parametrize("page", PROSE, ids=name)
def test_code_fits_its_column(page):
    lines = [line for code in CODE.findall(page.read_text()) for line in code.splitlines()]
    assert [line for line in lines if len(line) > WIDEST] == []


@pytest.fixture
def told():
    """The log of events as loud as it was before a page turned it up: whether anybody listens is asked of it."""
    log = logging.getLogger("kvcache.events")
    level = log.level
    yield
    log.setLevel(level)


@functools.cache
def _made(variant):
    return load_t3(variant)


def made_once(variant):
    """As `load_t3` with random weights, which take seconds to draw: once for all pages, a copy for each."""
    return copy.deepcopy(_made(variant))


@pytest.mark.usefixtures("told")
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] * (page.stem == "tutorial")) for page in PAGES
    ],  # see test_tutorial.py
    ids=name,
)
def test_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(LISTENERS, ())  # a page may leave some behind
    monkeypatch.setattr("kvcache_chatterbox.load_t3", made_once)
    shared = {"__name__": "__main__"}
    for source, run, printed in blocks(page.read_text()):
        code = compile(source, str(page), "exec")  # padded, so that a traceback shows the page's line
        if run:
            with redirect_stdout(io.StringIO()) as out:
                exec(code, shared)
            assert printed is None or out.getvalue() == printed


@pytest.mark.parametrize("page", PROSE, ids=name)
def test_links_lead_somewhere(page):
    assert list(broken_links(page, page.read_text())) == []


@pytest.mark.parametrize("page", PROSE, ids=name)
def test_links_elsewhere_are_well_formed(page):
    """They cannot be followed without a network; what is tested is that they can be."""
    targets = [target for target in LINK.findall(ANY_FENCE.sub("", page.read_text())) if re.match(r"[a-z]+:", target)]
    assert [target for target in targets if ELSEWHERE.fullmatch(target) is None] == []


@pytest.mark.parametrize("page", PROSE, ids=name)
def test_quoted_figures_have_their_files(page):
    for quoted in RESULTS.findall(page.read_text()):
        result = json.loads((ROOT / quoted).read_text())
        assert set(result) >= {"benchmark", "machine", "versions", "commit", "rows", "ratios"}, quoted
        assert not result.get("quick"), f"{quoted} is a smoke run, whose figures mean nothing"


def test_the_reference_names_what_there_is():
    named = re.findall(r"^::: (\S+)", (ROOT / "docs/reference.md").read_text(), re.MULTILINE)
    assert len(named) > 20
    for one in named:
        assert pkgutil.resolve_name(one) is not None


def test_these_checks_find_what_they_look_for(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# One page\n```python\nx = 1\n```\n\n```text\n1\n```\n<!-- not run: no network -->\n```python\ny\n```\n\n# Two\n"
    )
    found = [(source.strip(), run, printed) for source, run, printed in blocks(page.read_text())]
    assert found == [("x = 1", True, "1\n"), ("y", False, None)]
    text = "[a](page.md) [b](#one-page) [c](gone.md) [d](page.md#two) [e](https://x.example)\n```\n[f](gone)\n```"
    assert list(broken_links(page, text)) == ["gone.md"]
    assert list(broken_links(page, text.replace("#two", "#three"))) == ["gone.md", "page.md#three"]
    assert ELSEWHERE.fullmatch("https://arxiv.org/abs/2405.00001")
    assert not any(
        map(ELSEWHERE.fullmatch, ("http://x.example", "https://x", "https://x.example/a b", "ftp://x.example"))
    )
