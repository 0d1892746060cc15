"""What is published: the check of its packages finds what it looks for, and the workflows publish nothing unchecked."""

import re
import sys
from email.message import Message
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / ".ci"))

import check_packages
from check_packages import (
    changelog_faults,
    description_faults,
    metadata_faults,
    pythons,
    sdist_faults,
    supported,
    wheel_faults,
)

import kvcache

pytestmark = pytest.mark.one_release

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = ROOT / ".github" / "workflows"
REPOSITORY = "https://code.example/us/kvcache"
ABOUT = f"kvcache-{kvcache.__version__}.dist-info"


def metadata(**changed):
    """As a wheel has it, with some lines in place of its own."""
    made = Message()
    lines = {"Version": kvcache.__version__, "Description-Content-Type": "text/markdown"} | changed
    text = lines.pop(
        "text", f"# kvcache\n\n[A page]({REPOSITORY}/blob/v1/docs/a.md), [below](#use)\n\n```python\nx = 1\n```\n"
    )
    addresses = {"Repository": REPOSITORY} | {
        name: f"{REPOSITORY}/{name}" for name in ("Documentation", "Changelog", "Issues")
    }
    for name, address in (addresses | lines.pop("addresses", {})).items():
        made["Project-URL"] = f"{name}, {address}"
    for name, value in lines.items():
        made[name] = value
    made.set_payload(text)
    return made


def wheel():
    """The names in a wheel as it should be."""
    return {fault.split(" lacks ")[1] for fault in wheel_faults(set(), kvcache.__version__)}


def test_the_version_is_read_where_it_is_written():
    assert check_packages.version() == kvcache.__version__


def test_a_wheel_has_the_packages_and_nothing_else():
    whole = wheel()
    assert {"kvcache/py.typed", "kvcache/cli/__main__.py", "kvcache_chatterbox/py.typed", f"{ABOUT}/METADATA"} <= whole
    assert list(wheel_faults(whole, kvcache.__version__)) == []
    [lacking] = wheel_faults(whole - {"kvcache/memory.py"}, kvcache.__version__)
    assert lacking == "the wheel lacks kvcache/memory.py"
    for surplus in ("tests/test_manager.py", "adapters/kvcache_chatterbox/engine.py", "kvcache/__pycache__/x.pyc"):
        assert any(surplus in fault for fault in wheel_faults(whole | {surplus}, kvcache.__version__))


def test_an_sdist_has_what_the_repository_has():
    tracked = {"kvcache/manager.py", "tests/test_manager.py", "docs/index.md", ".github/workflows/checks.yml"}
    whole = tracked - {".github/workflows/checks.yml"} | {"PKG-INFO"}
    assert list(sdist_faults(whole, tracked)) == []
    assert list(sdist_faults(whole - {"docs/index.md"}, tracked)) == ["the sdist lacks docs/index.md"]
    for surplus in ("secret.txt", ".venv-floor/lib/x.py", "site/index.html", "hello.wav"):
        assert any(surplus in fault for fault in sdist_faults(whole | {surplus}, tracked))


@pytest.mark.parametrize(
    ("tag", "refused"),
    [
        (f"v{kvcache.__version__}", False),
        ("v9.9.9", True),
        (kvcache.__version__, True),
        (f"v{kvcache.__version__}.1", True),
    ],
)
def test_a_tag_unlike_the_version_is_refused(tag, refused):
    found = list(metadata_faults(metadata(), kvcache.__version__, tag, REPOSITORY))
    assert found == ([f"the tag {tag} is not that of version {kvcache.__version__}; "
                      f"tag v{kvcache.__version__}, or change __version__"] if refused else [])  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"Version": "9.9.9"}, "the wheel is 9.9.9"),
        (
            {"addresses": {"Repository": "https://git.example/kvcache/kvcache"}},
            "which is not at https://code.example/us/kvcache",
        ),
        ({"addresses": {"Issues": "TODO"}}, "Issues = 'TODO'"),
        ({"text": "[A page](docs/a.md)"}, "leads nowhere on an index: ](docs/a.md)"),
        ({"text": "![A picture](docs/img/a.svg)"}, "docs/img/a.svg"),
        ({"text": ""}, "no long description"),
    ],
)
def test_what_an_index_would_be_told_wrongly_is_found(changed, says):
    [found] = metadata_faults(metadata(**changed), kvcache.__version__, repository=REPOSITORY)
    assert says in found


def test_a_description_that_an_index_cannot_show_is_found():
    pytest.importorskip("readme_renderer.markdown")
    assert list(description_faults(metadata())) == []
    assert any(
        "not text/markdown" in one for one in description_faults(metadata(**{"Description-Content-Type": "text/x-rst"}))
    )
    assert any("could not show" in one for one in description_faults(metadata(text="<script>")))


def test_a_version_without_its_section_in_the_changelog_is_refused():
    text = "# Changelog\n\n## Unreleased\n\n## 0.2.0 - 2027-01-31\n\n### Added\n"
    assert [list(changelog_faults(text, tag)) for tag in (None, "v0.2.0")] == [[], []]
    [found] = changelog_faults(text, "v0.2.1")
    assert "## 0.2.1 - DATE" in found


def test_links_of_the_readme_lead_to_the_repository():
    pytest.importorskip("hatchling")
    sys.path.insert(0, str(ROOT))
    from hatch_build import absolute

    text = "![a](docs/img/a.svg) [b](docs/b.md#c) [d\ne](LICENSE) [f](https://f.example) [g](#g)"
    assert absolute(text, "https://h", "v1") == (
        "![a](https://h/raw/v1/docs/img/a.svg) [b](https://h/blob/v1/docs/b.md#c) [d\ne](https://h/blob/v1/LICENSE) "
        "[f](https://f.example) [g](#g)"
    )
    assert not check_packages.RELATIVE.search(absolute((ROOT / "README.md").read_text(), "https://h", "v1"))


def test_pythons_that_are_installed_are_found_and_no_others():
    own = sys.version_info[:2]
    found = pythons([own, (3, 0)])
    assert set(found) <= {own}


# ---------------------------------------------------------------------- the workflows


@pytest.fixture
def workflow():
    if not WORKFLOWS.is_dir():
        pytest.skip("an sdist has no workflows")
    return lambda name: yaml.safe_load((WORKFLOWS / name).read_text())


def test_the_lowest_and_the_newest_supported_python_are_checked(workflow):
    project = (ROOT / "pyproject.toml").read_text()
    about = Message()
    for line in re.findall(r'"(Programming Language :: Python :: [\d.]+)"', project):
        about["Classifier"] = line
    lowest, *_, newest = supported(about)
    assert re.search(r'requires-python = ">=([\d.]+)"', project)[1] == f"{lowest[0]}.{lowest[1]}"
    checked = workflow("checks.yml")["jobs"]["checks"]
    assert checked["strategy"]["matrix"]["python"] == [f"{major}.{minor}" for major, minor in (lowest, newest)]
    assert checked["steps"][-1]["run"] == ".ci/run"


def test_only_what_was_checked_is_published(workflow):
    publish = workflow("publish.yml")
    assert publish[True] == {"push": {"tags": ["v*"]}}  # YAML 1.1 reads "on" so
    jobs = publish["jobs"]
    assert set(jobs["publish"]["needs"]) == set(jobs) - {"publish"}
    assert jobs["checks"]["uses"] == "./.github/workflows/checks.yml"
    runs = [step["run"] for step in jobs["build"]["steps"] if "run" in step]
    assert runs[-1].startswith("python .ci/check_packages.py dist --tag ") and "--repository" in runs[-1]
    assert publish["permissions"] == {"contents": "read"}
    assert [name for name, job in jobs.items() if "id-token" in job.get("permissions", {})] == ["publish"]
    assert any(step.get("uses", "").startswith("pypa/gh-action-pypi-publish@") for step in jobs["publish"]["steps"])


# ---------------------------------------------------------------------- the changelog


def test_the_changelog_has_the_form_of_keep_a_changelog():
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert versions[0] == "Unreleased"
    assert all(re.fullmatch(r"\d+\.\d+\.\d+ - \d{4}-\d\d-\d\d", version) for version in versions[1:])
    kinds = re.findall(r"^### (.+)$", text, re.MULTILINE)
    assert kinds and set(kinds) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
