"""Writes the page on benchmarks, and the measured parts of other pages, from the files in `benchmarks/results/`.

    python docs/generate/pages.py            # write them
    python docs/generate/pages.py --check    # say which of them are not as the results have them

`benchmarks.md.jinja` becomes `docs/benchmarks.md`. In other pages, what stands between ``<!-- measured: NAME -->`` and
``<!-- end -->`` is replaced by the template `NAME.md.jinja`. A file of results that the page on benchmarks has no words for
gets a section by itself, with the words of the script that wrote it.
"""

import argparse
import re
import sys
from pathlib import Path

import jinja2

sys.path.insert(0, str(Path(__file__).resolve().parent))
import by_family
import figures
import measured
import operating
import smaller
import summary
import tables
from measured import ROOT, Result, results

TEMPLATES = Path(__file__).resolve().parent
BENCHMARKS = ROOT / "docs" / "benchmarks.md"
REGION = re.compile(r"(<!-- measured: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


class Known:
    """The results by name; remembers which ones a template has asked for."""

    def __init__(self, found: dict[str, Result]) -> None:
        self.found = found
        self.asked: set[str] = set()

    def __call__(self, name: str) -> Result:
        self.asked.add(name)
        if name not in self.found:
            raise LookupError(f"a template wants benchmarks/results/{name}.json, which is not there")
        return self.found[name]

    def others(self) -> list[Result]:
        """Those that were not asked for so far."""
        return [result for name, result in self.found.items() if name not in self.asked and not result.data["quick"]]


def title(result: Result) -> str:
    """Of a section that nobody wrote: what the script's first sentence says before it becomes particular."""
    return re.split(r"[:.,]", result.about or result.name, maxsplit=1)[0]


def rendered(name: str, found: dict[str, Result]) -> str:
    """A template, filled in."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    words = {name: getattr(measured, name) for name in ("ms", "times", "percent", "signed", "digits", "listed")}
    environment.filters |= words
    known = Known(found)
    return environment.get_template(f"{name}.md.jinja").render(
        result=known,
        results=found,
        others=known.others,
        title=title,
        tables=tables,
        summary=summary,
        smaller=smaller,
        operating=operating,
        figures=figures,
        by_family=by_family,
    )


def pages(found: dict[str, Result] | None = None) -> dict[Path, str]:
    """What every page that quotes measurements has to be."""
    found = results() if found is None else found
    made = {BENCHMARKS: rendered("benchmarks", found)}
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = page.read_text()
        if page != BENCHMARKS and REGION.search(text):
            made[page] = REGION.sub(lambda match: match[1] + rendered(match[2], found) + match[3], text)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page is not as it should be")
    options = parser.parse_args()
    stale = [(page, text) for page, text in pages().items() if page.read_text() != text]
    for page, text in stale:
        print(page.relative_to(ROOT))
        if not options.check:
            page.write_text(text)
    if stale and options.check:
        raise SystemExit("these pages are not as the results have them; run python docs/generate/pages.py")


if __name__ == "__main__":
    main()
