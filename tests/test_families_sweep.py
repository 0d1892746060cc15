"""Every generative class of transformers, tiny and random, with each feature: the model's own answer, or a reason."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "docs" / "generate"))

import family_checks
import family_models
import torch
import transformers
from family_checks import Trial, Wrong, compare, told, tried
from measured import results

from kvcache import SlidingWindow

PARTS = 16
KNOWN = family_models.names()


def faults(name: str) -> dict[str, str]:
    """What is wrong, crashes, or could not be compared."""
    row = tried(name)
    if row["built"] is not None:
        return {"built": row["built"]}
    return {k: cell["why"] for k, cell in row["cells"].items() if cell["state"] in ("wrong", "crash")}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # as older models of transformers are written
@pytest.mark.grid(1, any_of=("name",))
@pytest.mark.parametrize("name", [name for name in family_models.POPULAR if name in KNOWN])
def test_popular_classes_answer_as_they_do_without_us(name):
    assert not faults(name)


@pytest.mark.slow
@pytest.mark.one_release
@pytest.mark.parametrize("part", range(PARTS))
def test_all_classes_answer_as_they_do_without_us(part):
    found = {name: faults(name) for name in KNOWN[part::PARTS]}
    assert not {name: what for name, what in found.items() if what and "built" not in what}


@pytest.fixture(scope="module")
def llama():
    return Trial("LlamaForCausalLM")


def test_the_text_depends_on_what_is_cached(llama):
    out = llama.run(llama.manager(SlidingWindow(4)).generate)
    with pytest.raises(Wrong):
        compare(llama.reference, out)


@pytest.mark.parametrize("reference", ["masks", "a cache"])
def test_another_window_is_told_from_the_right_one(llama, monkeypatch, reference):
    if reference == "a cache":
        monkeypatch.setattr(family_checks, "mask_oracle", lambda *given, **more: None)
    out = llama.run(llama.manager(SlidingWindow(family_checks.WINDOW, sinks=family_checks.SINKS)).generate)
    llama._as_masked(out, llama.run, "the right one")
    other = llama.run(llama.manager(SlidingWindow(family_checks.WINDOW - 1, sinks=family_checks.SINKS)).generate)
    with pytest.raises(Wrong, match=r"off|differs"):
        llama._as_masked(other, llama.run, "another")


def test_two_tokens_that_are_as_likely_may_change_places():
    logits = torch.tensor([[[1.0, 1.0 + 1e-6, 0.0], [0.0, 0.5, 1.0]]])

    def said(ids, of=logits):
        return type("Said", (), {"sequences": torch.tensor([ids]), "logits": tuple(of.unbind(1))})()

    compare(said([1, 2]), said([0, 1]))
    with pytest.raises(Wrong, match="step 1"):
        compare(said([1, 2]), said([1, 1], logits + torch.tensor([[[0.0] * 3, [0.0, 1.0, 0.0]]])))


def test_a_check_that_breaks_is_a_crash_with_its_place():
    cell = told(lambda: SlidingWindow(8).keep(None))
    assert cell.state == "crash" and "TypeError" in cell.why and "policies.py" in cell.why
    assert told(lambda: SlidingWindow(0)).state == "refused"


@pytest.mark.one_release
def test_the_kept_run_is_of_all_classes_and_without_faults():
    kept = results()["families"]
    if kept.data["versions"]["transformers"] == transformers.__version__:
        assert {row["class"] for row in kept.rows} == set(KNOWN)
    found = {
        (row["class"], feature)
        for row in kept.rows
        for feature, cell in row["cells"].items()
        if cell["state"] in ("wrong", "crash")
    }
    assert not found
