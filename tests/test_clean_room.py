"""Each extra alone, and the documented installation of audio, beside nothing but what kvcache itself needs.

torch, transformers and what they need are linked from the environment that runs the tests, so that each takes seconds and not
gigabytes; the extra's own packages come from pip.
"""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support.folders import weightless_llama

pytestmark = [pytest.mark.one_release, pytest.mark.skipif(sys.platform != "linux", reason="links folders")]

ROOT = Path(__file__).resolve().parent.parent
CORE = ("torch", "transformers", "safetensors", "typing-extensions", "filelock", "packaging")
EXTRAS = ["chatterbox", "metrics", "plot", "redis", "remote", "server", "bench", "audio", "ray"]

# What each of the extras is for, in a line; the commands come after it.
CHECK = """
import json, sys
from kvcache.decoding import Setting
from kvcache.tools import diagnose, healthy, plan, subject
extra, folder = sys.argv[1:]
found = diagnose()
states = {finding.name: finding.state for finding in found}
print(json.dumps({"healthy": healthy(found), "extra": states[f"[{extra}]"], "kv": plan(subject(folder), Setting(), 20).kv,
                  "others": [name for name, state in states.items() if name.startswith("[") and state == "ok"]}))
"""


# What somebody who installed audio does first: the vocoder's code, the watermarker, transformers, and a mark that is found.
HEARD = """
import warnings; warnings.simplefilter("error", RuntimeWarning)
import kvcache, numpy, perth, torch, transformers, transformers.audio_utils
from chatterbox.models.s3gen import S3Gen
from chatterbox.tts import ChatterboxTTS
from transformers import LlamaForCausalLM
marker = perth.PerthImplicitWatermarker()
noise = 0.1 * numpy.random.default_rng(0).standard_normal(48_000).astype("float32")
marked = marker.apply_watermark(noise, sample_rate=24_000)
print(transformers.__version__, marker.get_watermark(marked, sample_rate=24_000), marker.get_watermark(noise, sample_rate=24_000))
"""


def needed(names):
    """These distributions and all that they need, without extras."""
    found, left = {}, [canonicalize_name(name) for name in names]
    while left:
        if (name := left.pop()) in found:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:  # for another platform, or part of another package here
            continue
        asked = [Requirement(line) for line in found[name].requires or []]
        left += [canonicalize_name(r.name) for r in asked if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    """A folder with links to what kvcache itself needs."""
    folder = tmp_path_factory.mktemp("core")
    for found in needed(CORE).values():
        site = Path(found.locate_file(""))
        for top in {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (folder / top).exists():
                (folder / top).symlink_to(site / top)
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT))
    [found] = folder.glob("kvcache-*.whl")
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return weightless_llama(tmp_path_factory.mktemp("model"))


def pip(*arguments):
    """What pip gets from an index; where it reaches none, the test is skipped, see `assert_came`."""
    ended = subprocess.run(
        [sys.executable, "-m", "pip", "--quiet", "--retries=1", *arguments], capture_output=True, text=True
    )
    assert_came(ended)


def assert_came(ended):
    if "NewConnectionError" in ended.stderr or "NameResolutionError" in ended.stderr:
        pytest.skip("pip reaches no package index here")
    assert ended.returncode == 0, (ended.args, ended.stdout, ended.stderr)


def run(*command, code=0, **more):
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "KVCACHE_STORE")}
    ended = subprocess.run(command, env=environment | more, capture_output=True, text=True, timeout=550)
    assert ended.returncode == code and "Traceback" not in ended.stderr, (command, ended.stdout, ended.stderr)
    return ended.stdout


def bare(folder, *places):
    """A new environment with what is at these places; its Python."""
    run(sys.executable, "-m", "venv", "--without-pip", str(folder))
    [site] = folder.glob("lib/python*/site-packages")
    (site / "core.pth").write_text("".join(f"{place}\n" for place in places))
    return str(folder / "bin" / "python")


def environment_with(extra, core, wheel, folder):
    """A new environment with this extra alone; its Python, and its command."""
    python = bare(folder, core)
    pip("--python", python, "install", "--no-compile", f"{wheel}[{extra}]")
    return python, str(folder / "bin" / "kvcache")


def documented(page, after):
    """The commands of the first shell block behind these words of a page."""
    text = (ROOT / "docs" / page).read_text()
    block = re.search(r"^```sh\n(.*?)^```$", text[text.index(after) :], re.MULTILINE | re.DOTALL)[1]
    return block.replace("\\\n", "").splitlines()


def test_the_commands_alone(core, wheel, model, tmp_path):
    """What `kvcache plan MODEL` was installed for, with no adapter's packages at hand."""
    _, command = environment_with("cli", core, wheel, tmp_path / "cli")
    home = {"KVCACHE_HOME": str(tmp_path / "home")}
    said = json.loads(run(command, "doctor", "--json", **home))
    states = {finding["name"]: finding["state"] for finding in said["findings"]}
    assert said["healthy"] and states["[cli]"] == "ok" and states["[chatterbox]"] == "missing"
    assert json.loads(run(command, "plan", str(model), "--length", "20", "--json", **home))["kv"] > 0
    run(command, "plan", "chatterbox-nano", code=2)


@pytest.mark.slow
@pytest.mark.parametrize("extra", EXTRAS)
def test_each_extra_alone(extra, core, wheel, model, tmp_path):
    python, command = environment_with(extra, core, wheel, tmp_path / extra)
    home = {"KVCACHE_HOME": str(tmp_path / "home")}
    said = json.loads(run(python, "-W", "ignore", "-c", CHECK, extra, str(model), **home).splitlines()[-1])
    assert said["healthy"] and said["extra"] == "ok" and said["kv"] > 0
    has = subprocess.run([python, "-c", "import typer, rich"], capture_output=True).returncode == 0
    run(command, "doctor", code=0 if has else 2, **home)
    run(command, "plan", str(model), "--length", "20", code=0 if has else 2, **home)


@pytest.mark.slow
@pytest.mark.parametrize("release", ["newest", "lowest"])
def test_the_documented_installation_of_audio(release, core, tmp_path):
    """Line by line as docs/chatterbox.md has it, beside a torch without CUDA, until a mark is heard."""
    floor = ROOT / os.environ.get("FLOOR", ".venv-floor")
    if release == "lowest" and not floor.is_dir():
        pytest.skip("no environment with the lowest transformers here: make environments")
    python = bare(tmp_path / "audio", *[floor] * (release == "lowest"), core)
    commands = tmp_path / "audio" / "bin"
    (commands / "pip").write_text(f'#!/bin/sh\nexec {sys.executable} -m pip --python {python} "$@"\n')
    (commands / "pip").chmod(0o755)
    path = f"{commands}{os.pathsep}{os.environ['PATH']}"
    lines = documented("chatterbox.md", "Audio needs what")
    assert len(lines) == 3
    for line in lines:
        ended = subprocess.run(
            ["sh", "-e", "-c", line], cwd=ROOT, env=os.environ | {"PATH": path}, capture_output=True, text=True
        )
        assert_came(ended)
    home = {"KVCACHE_HOME": str(tmp_path / "home")}
    found = {
        one["name"]: one for one in json.loads(run(str(commands / "kvcache"), "doctor", "--json", **home))["findings"]
    }
    assert {name for name, one in found.items() if one["state"] == "broken"} == set()
    assert found["[audio]"]["state"] == "ok", found["[audio]"]
    said = run(python, "-c", HEARD, **home).splitlines()[-1]
    version, *heard = said.split()
    assert heard == ["1.0", "0.0"] and version.startswith("5.2." if release == "lowest" else ""), said
