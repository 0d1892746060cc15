"""One torch thread per test process: tiny models gain nothing from more, and two processes fight over the cores.

Voices and prefixes go to a folder of this run's own, not to the user's cache. Every test draws the same, whatever ran before.
"""

import atexit
import gc
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
import transformers

pytest.register_assert_rewrite("support")  # before it is imported: what is shared tells what it compared, as tests do

from support import searching  # noqa: E402
from support.grids import mark_grids  # noqa: E402

if TYPE_CHECKING:
    from support.snapshots import Stores

torch.set_num_threads(1)
# Without a GPU, Triton's kernels run in its interpreter; it asks for this once, when it is first imported.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
os.environ["KVCACHE_HOME"] = tempfile.mkdtemp(prefix="kvcache-tests-")
atexit.register(shutil.rmtree, os.environ["KVCACHE_HOME"], ignore_errors=True)
searching.register()

pytest_plugins = ["pytester"]


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if getattr(getattr(item, "obj", None), "is_hypothesis_test", False):
            item.add_marker("search")
    # The lowest release runs beside the newest, on which each value is tried: there a part of all cases tells what differs.
    lowest = transformers.__version__.startswith("5.2.")
    mark_grids(items, 0.25 if lowest else 0.3, every=not lowest)


def pytest_collection_finish() -> None:
    # What the imports and the collection made stays to the end: no search for garbage, of which tests make many, walks it.
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.hookimpl(tryfirst=True)  # before the fixtures, which may draw too
def pytest_runtest_setup(item: pytest.Item) -> None:
    torch.manual_seed(0)
    random.seed(0)


@pytest.fixture(scope="session", autouse=True)
def graphs_are_traced() -> Iterator[None]:
    """What a GPU captures is tested on any machine: there a trace takes the place of a CUDA graph."""
    from kvcache.testing import traced_graphs

    with traced_graphs():
        yield


@pytest.fixture(scope="module")
def all_threads() -> Iterator[None]:
    """For models of full size: this process's share of the cores. Two that take all of them take ten times as long."""
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def buffers_grow() -> Iterator[None]:
    """For layers of few tokens: buffers that grow within them."""
    from kvcache.cache import short_ladder

    with short_ladder():
        yield


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real Redis server, for the tests of one module."""
    from support.snapshots import running_redis

    with running_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server.url


@pytest.fixture
def stores(request: pytest.FixtureRequest, tmp_path: Path) -> "Iterator[Stores]":
    """Opens stores of every kind in the test's folder, and closes them."""
    from support.snapshots import Stores

    opened = Stores(request, tmp_path)
    yield opened
    opened.close()
