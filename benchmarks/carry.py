"""What a machine without a network needs: the wheels that it lacks, and which commit its copy of the tree is of.

    python benchmarks/carry.py collect .wheels            # on a machine with a network; pinned in gpu-wheels.txt
    python benchmarks/carry.py install .wheels SITE       # on the other one, into folders that go on PYTHONPATH

Only Python's own library is imported here, so that it runs before anything is installed.
"""
# Not by `make bench`: it fetches wheels and installs them.

import argparse
import hashlib
import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PINNED = ROOT / "benchmarks" / "gpu-wheels.txt"
STAMP = "commit.json"  # beside the wheels
CHECKED = "checked.json"  # beside what was installed
MOST_MIB = 64
PYTHON_VERSION = "3.12"
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (35, 34, 31, 28, 27, 24, 17)] + ["manylinux2014_x86_64"]
LOOKED_FOR = ("chatterbox-tts",)  # not imported as a whole: that wants all the others, and more; steps import its parts
CODE = ("kvcache/**/*.py", "adapters/**/*.py", "benchmarks/*.py", "tests/*.py")


def pinned(file: Path = PINNED) -> dict[str, tuple[str, str]]:
    """Version and module to import of each package in the list."""
    found = {}
    for line in file.read_text().splitlines():
        requirement, _, module = (part.strip() for part in line.partition("#"))
        if requirement:
            name, _, version = requirement.partition("==")
            if not version or not module:
                raise SystemExit(f"{file}: {line!r} is not NAME==VERSION  # MODULE")
            found[name] = (version, module)
    return found


def wheel_of(name: str, version: str, folder: Path) -> Path | None:
    """The wheel of a package in a folder, if it is there."""
    return next(iter(sorted(folder.glob(f"{name.replace('-', '_')}-{version}-*.whl"))), None)


def code_digest(root: Path = ROOT) -> str:
    """A hash of the Python files that are run, by which two copies of a tree are told apart."""
    files = sorted({file for pattern in CODE for file in root.glob(pattern)})
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(root)} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


def carried_commit(folder: Path, root: Path = ROOT) -> str | None:
    """The commit that was noted beside the wheels, marked if the code is another by now; None if none was."""
    stamp = folder / STAMP
    if not stamp.exists():
        return None
    noted = json.loads(stamp.read_text())
    return str(noted["commit"]) + ("" if noted["code"] == code_digest(root) else "-changed")


# ---------------------------------------------------------------------- where there is a network


def collect(folder: Path, most_mib: float, packages: Mapping[str, tuple[str, str]]) -> None:
    """Put every wheel of the list into a folder, and check that it and the tree are small enough to be carried."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = set()
    for name, (version, _) in packages.items():
        if wheel_of(name, version, folder) is None:
            _download(f"{name}=={version}", folder)
        wheel = wheel_of(name, version, folder)
        assert wheel is not None, f"pip has put no wheel of {name}=={version} into {folder}"
        wanted.add(wheel)
    for other in set(folder.glob("*.whl")) - wanted:  # two versions of one package would stop the installation
        other.unlink()
    head, tree = _git("rev-parse", "HEAD").strip(), _tree_bytes()
    changed = "-changed" if _git("status", "--porcelain", "-uno").strip() else ""
    (folder / STAMP).write_text(json.dumps({"commit": head + changed, "code": code_digest()}) + "\n")
    check_size(sorted(wanted), tree, most_mib)


def check_size(wheels: Iterable[Path], tree: int, most_mib: float) -> None:
    """Print what each wheel takes, and stop if that is too much beside so many bytes of tree."""
    sizes = {wheel.name: wheel.stat().st_size for wheel in wheels} | {"the tree": tree}
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        print(f"{size / 2**20:7.2f} MiB  {name}")
    total = sum(sizes.values()) / 2**20
    print(f"{total:7.2f} MiB  of at most {most_mib:g}")
    if total > most_mib:
        raise SystemExit(
            f"tree and wheels take {total:.1f} MiB, which is more than {most_mib:g}: take the largest off {PINNED.name}"
        )


def _download(requirement: str, folder: Path) -> None:
    platforms = [f"--platform={platform}" for platform in PLATFORMS]
    command = [
        sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps", "--only-binary=:all:",
        f"--python-version={PYTHON_VERSION}", "--implementation=cp", *platforms, f"--dest={folder}", requirement,
    ]  # fmt: skip
    if subprocess.run(command).returncode:
        raise SystemExit(f"pip found no wheel of {requirement} for Python {PYTHON_VERSION} on x86-64; see its message")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def _tree_bytes() -> int:
    files = _git("ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    return sum((ROOT / file).stat().st_size for file in files if file and (ROOT / file).is_file())


# ---------------------------------------------------------------------- where there is none


def install(
    folder: Path, site: Path, without: Sequence[str], packages: Mapping[str, tuple[str, str]]
) -> dict[str, str]:
    """Unpack each wheel into a folder of its own in `site`, and see whether it imports.

    A step is given the folders of what it needs and no others: transformers imports some of them where it finds them, and
    breaks if they lack something.

    Args:
        without: packages that are left out, to see what becomes of the rest.

    Returns:
        Each package that cannot be used, and why. `CHECKED` in `site` holds the same.
    """
    if site.exists():
        shutil.rmtree(site)
    site.mkdir(parents=True)
    missing, modules = {}, {}
    for name, (version, module) in packages.items():
        wheel = None if name in without else wheel_of(name, version, folder)
        if wheel is None:
            missing[name] = f"no wheel of {name}=={version} in {folder}: run make gpu-wheels where there is a network"
        else:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site / name)
            modules[name] = module
    missing |= _imports(site, modules)
    (site / CHECKED).write_text(json.dumps(missing, indent=1) + "\n")
    return missing


def _imports(site: Path, modules: Mapping[str, str]) -> dict[str, str]:
    """Packages whose module does not import, and why; in a process of its own that sees all of them."""
    paths = [*(str(site / name) for name in modules), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-W", "ignore", __file__, "imports", json.dumps(modules)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def import_each(modules: Mapping[str, str]) -> dict[str, str]:
    """Packages whose module does not import, and why."""
    failed = {}
    for name, module in modules.items():
        try:
            if name in LOOKED_FOR:
                if importlib.util.find_spec(module) is None:
                    failed[name] = f"there is no module {module}"
            else:
                importlib.import_module(module)
        except Exception as error:  # whatever a package does when it is imported: it is said, the others go on
            failed[name] = f"{type(error).__name__}: {error}"
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("collect", help="download the wheels, where there is a network")
    one.add_argument("folder", type=Path)
    one.add_argument("--most-mib", type=float, default=MOST_MIB, help="tree and wheels together (default: 64)")
    one = commands.add_parser("install", help="install them, where there is none")
    one.add_argument("folder", type=Path)
    one.add_argument("site", type=Path)
    one.add_argument("--without", nargs="*", default=[], help="packages to leave out")
    commands.add_parser("imports", help="import modules, which is told as JSON").add_argument("modules")
    options = parser.parse_args()
    if options.command == "collect":
        collect(options.folder, options.most_mib, pinned())
    elif options.command == "imports":
        print(json.dumps(import_each(json.loads(options.modules))))
    else:
        missing = install(options.folder, options.site, options.without, pinned())
        for name, why in missing.items():
            print(f"{name}: {why}")
        raise SystemExit(1 if missing else 0)


if __name__ == "__main__":
    main()
