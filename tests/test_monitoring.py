"""Views of a report, the memory timeline and the occupancy map, each against what is counted another way."""

import json
import mmap
import re
import threading
from html.parser import HTMLParser
from io import StringIO

import pytest
import torch
from rich.console import Console
from support.families import tiny, token_ids
from support.waiting import until
from transformers import StoppingCriteriaList

from kvcache import (
    CacheReport,
    InputError,
    KeepAll,
    KVCacheManager,
    KVLayer,
    MaxTokens,
    MemoryTimeline,
    PerHead,
    SlidingWindow,
    SnapKV,
    occupancy,
)
from kvcache import models as hf
from kvcache.cache import LayerReport
from kvcache.memory import resident_bytes

GREEDY = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": -1, "pad_token_id": 0}  # no token is -1


def report():
    first = LayerReport("SlidingWindow(window=8, sinks=0)", 20, 8, 12, 8, 4096)
    second = LayerReport("<b>own & odd</b>", 20, 20, 0, 128, 2**20, heads=(7, 20))
    return CacheReport((first, first, second), backend="eager", fallback="graph <failed>")


class Cells(HTMLParser):
    """The text of each row of a table, and of what is around it."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.other, self.tags, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        (self.rows[-1] if self.open[-1] in ("td", "th") else self.other).append(data)


# ---------------------------------------------------------------------- views


def test_the_views_of_a_report_say_the_same():
    title, columns, *lines = str(report()).splitlines()
    assert title == "20 tokens seen, 20 kept, 1.0 MiB in 3 layers"
    assert columns.split() == ["layers", "seen", "kept", "evicted", "slots", "MiB", "policy"]
    assert lines[0].split(maxsplit=6) == ["0-1", "20", "8", "12", "8", "0.0", "SlidingWindow(window=8, sinks=0)"]
    assert lines[1].split(maxsplit=6) == ["2", "20", "7-20", "0", "128", "1.0", "<b>own & odd</b>"]
    assert lines[2:] == ["decoded by: eager", "not as asked: graph <failed>"]

    page = Cells(report()._repr_html_())
    assert [columns.split(), *(line.split(maxsplit=6) for line in lines[:2])] == page.rows
    assert page.other == [title, *lines[2:]]
    assert set(page.tags) == {"div", "table", "caption", "thead", "tbody", "tr", "th", "td", "p"}, "the rest is escaped"

    console = Console(width=120, file=StringIO(), color_system=None)
    console.print(report())
    shown = console.file.getvalue()
    for text in (title, "0-1", "7-20", "<b>own & odd</b>", "not as asked: graph <failed>"):
        assert text in shown


def test_a_report_as_json():
    found = json.loads(json.dumps(report().to_dict(), allow_nan=False))
    assert {name: found[name] for name in ("nbytes", "seen", "stored", "evicted", "backend", "fallback", "enabled")} == {
        "nbytes": 2 * 4096 + 2**20, "seen": 20, "stored": 20, "evicted": 24, "backend": "eager",
        "fallback": "graph <failed>", "enabled": True,
    }  # fmt: skip
    assert [layer["stored"] for layer in found["layers"]] == [8, 8, 20]
    assert found["layers"][2]["heads"] == [7, 20]


def test_a_disabled_cache_has_views_too():
    off = CacheReport((), enabled=False)
    console = Console(width=120, file=StringIO())
    console.print(off)
    assert str(off) == console.file.getvalue().strip() == "KV cache disabled: every token is recomputed"
    assert off._repr_html_() == f"<div><p>{off}</p></div>"
    assert off.to_dict()["enabled"] is False


def test_views_say_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "rich.table", None)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match="pip install rich"):
        report().__rich__()
    layer = KVLayer()
    layer.append(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4))
    with pytest.raises(InputError, match=re.escape("pip install 'kvcache[plot]'")):
        occupancy([layer]).plot()


# ---------------------------------------------------------------------- timeline


def test_a_timeline_sees_a_cache_grow():
    manager = KVCacheManager(tiny("llama"))
    cache = manager.new_cache()
    expected = []
    with MemoryTimeline(cache, every=None) as timeline, torch.no_grad():
        for i in range(4):
            manager.model(token_ids(1, 100, seed=i), past_key_values=cache)
            expected.append(manager.report(cache).nbytes)
            timeline.sample(f"chunk {i}")
    assert [sample.kv for sample in timeline.samples] == [0, *expected, expected[-1]]
    assert [sample.label for sample in timeline.samples] == ["", *(f"chunk {i}" for i in range(4)), ""]
    assert timeline.peak() == max(expected) and len(set(expected)) > 2
    seconds = [sample.seconds for sample in timeline.samples]
    assert seconds == sorted(seconds) and seconds[0] >= 0
    assert all(sample.allocated is None and sample.reserved is None for sample in timeline.samples) or (
        torch.cuda.is_initialized()
    )


def test_a_timeline_sees_the_process_grow():
    if resident_bytes() is None:
        pytest.skip("this system has no /proc")
    # New pages of the system's, each written to: what was freed before is used again, and is resident already.
    with MemoryTimeline(every=None) as timeline, mmap.mmap(-1, 64 * 2**20) as held:
        held[::4096] = bytes([1]) * len(range(0, len(held), 4096))
        timeline.sample()
    before, with_it, _ = (sample.resident for sample in timeline.samples)
    # Other memory comes and goes meanwhile; 64 MiB of it do not.
    assert 48 * 2**20 < with_it - before < 96 * 2**20


def test_a_thread_samples_a_run_while_it_goes_on():
    manager = KVCacheManager(tiny("llama"))

    def sampled(tokens, scores):  # at least once in each step
        before = len(timeline.samples)
        until(lambda: len(timeline.samples) > before)
        return torch.zeros(len(tokens), dtype=torch.bool)

    with MemoryTimeline(manager, every=0.002) as timeline:
        manager.generate(token_ids(1, 300), stopping_criteria=StoppingCriteriaList([sampled]), **GREEDY)
    kv = [sample.kv for sample in timeline.samples]
    assert kv[0] == 0 and kv[-1] == manager.report().nbytes == max(kv)
    assert len(kv) > 20 and len(set(kv)) > 1
    assert "kvcache-timeline" not in {thread.name for thread in threading.enumerate()}


def test_a_timeline_of_the_engine():
    manager = KVCacheManager(tiny("llama"), SlidingWindow(16))
    with MemoryTimeline(manager, lambda: 5, every=None) as timeline:
        for _ in manager.stream(token_ids(1, 20), chunk_size=5, backend="eager", **GREEDY):
            timeline.sample()
    assert {sample.kv for sample in timeline.samples[2:]} == {manager.report().nbytes + 5}


def test_what_fails_while_sampling_is_raised_at_the_end():
    calls = []

    def breaks():
        calls.append(1)
        if len(calls) == 2:
            raise OSError("gone")
        return 0

    with pytest.raises(OSError, match="gone"), MemoryTimeline(breaks, every=0.001):
        until(lambda: len(calls) == 2)
    with pytest.raises(InputError, match="int cannot be watched; give a cache"):
        MemoryTimeline(3)
    with pytest.raises(InputError, match="every=0 must be above 0 seconds"):
        MemoryTimeline(every=0)


def test_a_timelines_table_and_plot(tmp_path):
    sizes = iter([0, 2**20, 3 * 2**20, 2 * 2**20])
    with MemoryTimeline(lambda: next(sizes), every=None) as timeline:
        timeline.sample("prefill")
        timeline.sample()
    title, _, line, *_ = str(timeline).splitlines()
    assert title.startswith("4 samples in ")
    assert line.split() == ["KV", "cache", "0.0", "3.0", "2.0"]
    assert [row[:2] for row in Cells(timeline._repr_html_()).rows[1:2]] == [["KV cache", "0.0"]]
    assert [sample["kv"] for sample in json.loads(json.dumps(timeline.to_dict()))["samples"]] == [
        0,
        2**20,
        3 * 2**20,
        2**21,
    ]
    figure = timeline.plot(tmp_path / "memory.png")
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")
    (curve,) = (line for line in figure.axes[0].get_lines() if line.get_label() == "KV cache")
    assert list(curve.get_ydata()) == [0, 1, 3, 2]
    with pytest.raises(InputError, match="no samples yet"):
        MemoryTimeline().plot()
    with pytest.raises(InputError, match="'rss' is no field of bytes; there are 'kv'"):
        timeline.peak("rss")


# ---------------------------------------------------------------------- occupancy


def run(manager, cache, tokens):
    with torch.no_grad(), hf.exact_windows(manager.observed_model):
        manager.observed_model(tokens, past_key_values=cache)


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        (KeepAll(), range(30)),
        (SlidingWindow(8, sinks=2), [0, 1, *range(22, 30)]),
        (MaxTokens(12, low_water=4), range(19, 30)),  # 13 become 4, nine more become 4 again: at 22; then 8 more
    ],
    ids=repr,
)
def test_an_occupancy_is_what_the_policy_says(policy, kept):
    manager = KVCacheManager(tiny("llama"), policy)
    cache = manager.new_cache()
    run(manager, cache, token_ids(1, 30))
    found = occupancy(cache)
    if isinstance(policy, MaxTokens):
        stored = 0
        for _ in range(30):
            stored = policy.keep(stored + 1)
        kept = range(30 - stored, 30)
    assert found.seen == 30 and len(found.layers) == len(cache.layers)
    assert all(found.kept(i) == list(kept) for i in range(len(cache.layers)))
    assert torch.equal(found.map()[0].nonzero()[:, 0], torch.tensor(list(kept)))
    assert found.share == pytest.approx(len(kept) / 30)
    assert found.names == (repr(policy),) * len(cache.layers)


def test_heads_of_their_own():
    manager = KVCacheManager(tiny("llama"), PerHead((SlidingWindow(4, sinks=1), KeepAll())))
    cache = manager.new_cache()
    run(manager, cache, token_ids(1, 20))
    found = occupancy(cache)
    assert found.kept(0, head=0) == [0, 16, 17, 18, 19] and found.kept(0, head=1) == list(range(20))
    assert found.map()[0, 5] == 0.5 and found.map()[0, 17] == 1

    manager = KVCacheManager(tiny("llama"), SnapKV(12, sinks=2, window_size=3))
    cache = manager.new_cache(2)
    run(manager, cache, token_ids(2, 30))
    found = occupancy(cache)
    for layer, kv in enumerate(hf.kv_layers(cache)):
        for row in range(2):
            for head in range(2):
                assert found.kept(layer, row, head) == kv.positions()[row, head].tolist()
                assert {0, 1, 27, 28, 29} <= set(found.kept(layer, row, head))


def test_padded_rows_and_layers_of_the_models_own():
    layer = KVLayer(SlidingWindow(4, sinks=1), padding=torch.tensor([3, 0]))
    layer.append(torch.zeros(2, 1, 6, 4), torch.zeros(2, 1, 6, 4))
    found = occupancy([layer])
    assert [found.kept(0, row) for row in range(2)] == [[1, 2, 3, 4, 5], [0, 2, 3, 4, 5]]

    manager = KVCacheManager(tiny("gemma3"))
    cache = manager.new_cache()
    run(manager, cache, token_ids(1, 20))
    found = occupancy(cache)
    own = [i for i, layer in enumerate(cache.layers) if not isinstance(layer, hf.ManagedLayer)]
    assert own and all("the model's own" in found.names[i] for i in own)
    for i in own:
        stored = cache.layers[i].keys.shape[-2]
        assert found.kept(i) == list(range(20 - stored, 20))


def test_an_occupancy_as_a_picture(tmp_path):
    manager = KVCacheManager(tiny("llama"), SlidingWindow(8, sinks=2))
    cache = manager.new_cache()
    assert occupancy(cache).seen == 0 and occupancy(cache).share == 0
    with pytest.raises(InputError, match="nothing has been seen yet"):
        occupancy(cache).plot()
    run(manager, cache, token_ids(1, 30))
    found = occupancy(cache)
    figure = found.plot(tmp_path / "kept.svg")
    assert "<svg" in (tmp_path / "kept.svg").read_text()
    assert torch.equal(torch.tensor(figure.axes[0].images[0].get_array().tolist()), found.map())
    for wrong, says in (
        ({"row": 2}, "row=2: there are 1"),
        ({"head": 3}, "head=3"),
        ({"layer": 9}, "layer=9: there are 2"),
    ):
        if "head" not in wrong and "row" not in wrong:
            with pytest.raises(InputError, match=says):
                found.kept(**wrong)
    with pytest.raises(InputError, match="str is no cache"):
        occupancy("cache")
