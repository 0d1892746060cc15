"""Checks a wheel and an sdist before anybody gets them: what is inside, what an index shows of them, and that they install.

    python .ci/check_packages.py dist
    python .ci/check_packages.py dist --tag v0.1.0 --repository https://host/owner/name    # before they are published

The wheel is installed without dependencies for this Python, and for the lowest and the newest other one that is supported and
found here; every source of the sdist has to compile there.
"""

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Iterator, Sequence
from email.message import Message
from email.parser import Parser
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"kvcache": ROOT / "kvcache", "kvcache_chatterbox": ROOT / "adapters" / "kvcache_chatterbox"}
NOT_IN_SDIST = ".github/"
MADE_BY_SDIST = {"PKG-INFO"}
UNWANTED = re.compile(
    r"(^|/)(__pycache__|\.venv[^/]*|\.(pytest|mypy|ruff)_cache|\.hypothesis|\.wheels|dist|site|out)/|\.(pyc|so|wav)$"
)
RELATIVE = re.compile(r"\]\((?![a-z]+:|#)[^)\s]+\)")
CLASSIFIER = "Programming Language :: Python :: "


def version() -> str:
    """The version where it is written, without importing the package."""
    for node in ast.parse((ROOT / "kvcache" / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__":
            return str(ast.literal_eval(node.value))
    raise SystemExit("kvcache/__init__.py has no __version__")


def wheel_faults(names: set[str], version: str) -> Iterator[str]:
    """What is missing in a wheel, or should not be there: it has the two packages as they are here, and its own folder."""
    about = f"kvcache-{version}.dist-info"
    wanted = {
        f"{package}/{file.relative_to(folder).as_posix()}"
        for package, folder in PACKAGES.items()
        for file in folder.rglob("*")
        if file.is_file() and not UNWANTED.search(file.as_posix())
    }
    wanted |= {f"{about}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")}
    yield from _differences("the wheel", names, wanted)


def sdist_faults(names: set[str], tracked: set[str]) -> Iterator[str]:
    """What is missing in an sdist, or should not be there: it has what the repository has, but for its host's own files."""
    wanted = {name for name in tracked if not name.startswith(NOT_IN_SDIST)} | MADE_BY_SDIST
    yield from _differences("the sdist", names, wanted)
    yield from (f"the sdist has {name}" for name in sorted(names) if UNWANTED.search(name))


def _differences(what: str, names: set[str], wanted: set[str]) -> Iterator[str]:
    yield from (f"{what} lacks {name}" for name in sorted(wanted - names))
    yield from (f"{what} has {name}, which is not of it" for name in sorted(names - wanted))


def metadata_faults(
    metadata: Message, version: str, tag: str | None = None, repository: str | None = None
) -> Iterator[str]:
    """What is wrong with what an index is told, for this version, tag and repository."""
    if metadata["Version"] != version:
        yield f"the wheel is {metadata['Version']}, kvcache/__init__.py says {version}"
    if tag is not None and tag != f"v{metadata['Version']}":
        yield f"the tag {tag} is not that of version {metadata['Version']}; tag v{metadata['Version']}, or change __version__"
    addresses = dict(line.split(", ", 1) for line in metadata.get_all("Project-URL", []))
    here = addresses.get("Repository", "https://") if repository is None else repository
    for name in ("Repository", "Documentation", "Changelog", "Issues"):
        if not addresses.get(name, "").startswith(here):
            yield f"pyproject.toml says {name} = {addresses.get(name)!r}, which is not at {here}; correct it there"
    if not metadata.get_payload():
        yield "there is no long description"
    for link in RELATIVE.findall(str(metadata.get_payload())):
        yield f"the long description has a link that leads nowhere on an index: {link}"


def description_faults(metadata: Message) -> Iterator[str]:
    """What an index would not show of the long description; needs readme_renderer."""
    try:
        from readme_renderer.markdown import render
    except ImportError:
        print("not checked: how an index shows the long description (pip install 'readme-renderer[md]')")
        return
    if metadata["Description-Content-Type"] != "text/markdown":
        yield f"the long description is {metadata['Description-Content-Type']}, not text/markdown"
    shown = render(str(metadata.get_payload()))
    if shown is None or "<h1" not in shown or "<pre" not in shown:
        yield "an index could not show the long description"


def changelog_faults(text: str, tag: str | None) -> Iterator[str]:
    """What is wrong with the changelog for a version that is published."""
    if (
        tag is not None
        and re.search(rf"^## {re.escape(tag.removeprefix('v'))} - \d{{4}}-\d\d-\d\d$", text, re.MULTILINE) is None
    ):
        yield f"CHANGELOG.md has no heading '## {tag.removeprefix('v')} - DATE'; give its section that, below an empty 'Unreleased'"


def supported(metadata: Message) -> list[tuple[int, int]]:
    """The Pythons that the classifiers name, from the lowest to the newest."""
    named = [
        line.removeprefix(CLASSIFIER) for line in metadata.get_all("Classifier", []) if line.startswith(CLASSIFIER)
    ]
    found = [tuple(map(int, name.split("."))) for name in named if re.fullmatch(r"\d+\.\d+", name)]
    return sorted((major, minor) for major, minor in found)


def pythons(wanted: Sequence[tuple[int, int]]) -> dict[tuple[int, int], str]:
    """The Pythons of these versions that run here, on the path or where pyenv has them."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = {}
    for major, minor in wanted:
        name = f"python{major}.{minor}"
        for command in filter(
            None, (shutil.which(name), *map(str, sorted(pyenv.glob(f"{major}.{minor}.*/bin/{name}"))))
        ):
            told = subprocess.run(
                [command, "-c", "import sys; print(*sys.version_info[:2])"], capture_output=True, text=True
            )
            if told.stdout.split() == [
                str(major),
                str(minor),
            ]:  # a shim of pyenv's may stand for a Python that is not there
                found[major, minor] = command
                break
    return found


def install(python: str, wheel: Path, source: Path, version: str) -> None:
    """Put the wheel into a new environment of this Python, ask for its version, and compile every source there."""
    with tempfile.TemporaryDirectory() as folder:
        if python == sys.executable:
            venv.create(folder, with_pip=False)
        else:
            subprocess.run([python, "-m", "venv", "--without-pip", folder], check=True)
        scripts = Path(folder) / ("Scripts" if os.name == "nt" else "bin")
        inside = str(scripts / "python")
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--python", inside, "install"]
        subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True)
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        for command in ([str(scripts / "kvcache"), "--version"], [inside, "-m", "kvcache.cli", "--version"]):
            ran = subprocess.run(command, env=clean, cwd=folder, capture_output=True, text=True)
            if (ran.returncode, ran.stdout) != (0, f"kvcache {version}\n"):
                raise SystemExit(f"{command} of the installed wheel gave {ran.returncode}: {ran.stdout}{ran.stderr}")
        unpacked = Path(folder) / "source"
        with tarfile.open(source) as archive:
            archive.extractall(unpacked, filter="data")
        subprocess.run([inside, "-W", "error", "-m", "compileall", "-q", str(unpacked)], check=True)


def main() -> None:
    """Check what is in a folder; end with exit code 1 and all faults that were found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="with one wheel and one sdist")
    parser.add_argument("--tag", help="that they are published for")
    parser.add_argument("--repository", help="that publishes them")
    options = parser.parse_args()
    [wheel], [source] = options.folder.glob("*.whl"), options.folder.glob("*.tar.gz")
    expected = version()
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if not name.endswith("/")}
        about = next(name for name in inside if PurePosixPath(name).match("*.dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(about).decode())
    with tarfile.open(source) as archive:
        sources = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    print(f"{wheel.name}: {len(inside)} files; {source.name}: {len(sources)} files")
    faults = [
        *wheel_faults(inside, expected),
        *sdist_faults(sources, {name for name in listed if (ROOT / name).is_file()}),
        *metadata_faults(metadata, expected, options.tag, options.repository),
        *description_faults(metadata),
        *changelog_faults((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), options.tag),
    ]
    if faults:
        raise SystemExit("\n".join(faults))
    own = sys.version_info[:2]
    install(sys.executable, wheel, source, expected)
    print(f"installs, and its sources compile: Python {own[0]}.{own[1]}")
    others = [one for one in supported(metadata) if one != own]
    found = pythons(others)
    for one in dict.fromkeys([min(found, default=None), max(found, default=None)]):
        if one is not None:
            install(found[one], wheel, source, expected)
            print(f"installs, and its sources compile: Python {one[0]}.{one[1]}")
    if not found:
        print(f"not tried with another Python: none of {', '.join(f'{a}.{b}' for a, b in others)} is installed here")


if __name__ == "__main__":
    main()
