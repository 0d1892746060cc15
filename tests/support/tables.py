"""A model that is a table: what follows a token depends on that token alone, so that plain Python says the same."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from kvcache import CacheGeometry, KVLayer, SizePolicy
from kvcache.decoding import Batch, Decoding, Job, Prefilled, Sampler, Sampling, StaticKV
from support.decoders import CPU
from support.inside import decoding as inside


def assert_free(batch: Batch) -> None:
    """The places that nobody has are empty and draw nothing."""
    decoding = inside.decoding_of(batch)
    kv, rows = decoding.kv, decoding.rows
    for place, job in enumerate(inside.jobs_of(batch)):
        policies = inside.policies_of(kv)[place * rows : (place + 1) * rows]
        assert [policy is None for policy in policies] == [job is None] * rows
        assert (inside.generators_of(decoding)[place] is None) == (job is None)
        assert inside.settings_of(decoding.sampler)[place].greedy or job is not None


def assert_empty(batch: Batch) -> None:
    decoding = inside.decoding_of(batch)
    kv = decoding.kv
    assert batch.busy == 0
    assert kv.seen == kv.length.tolist() == [0] * kv.rows
    assert inside.policies_of(kv) == [None] * kv.rows
    assert inside.pending_of(kv) == [] and inside.generators_of(decoding) == [None] * batch.places


SYMBOLS = 12
TABLE = torch.randn(SYMBOLS, SYMBOLS, generator=torch.Generator().manual_seed(3)) * 2
SMALL = CacheGeometry(1, 1, 2, 2)


def chain(
    places: int,
    slots: int = 64,
    forward: Callable[..., Tensor] | None = None,
    geometry: CacheGeometry = SMALL,
    backend: Any = "eager",
    **options: Any,
) -> Decoding:
    """A decoding whose next token depends on the last one only."""
    kv = StaticKV(geometry, places, slots)
    sampler = Sampler(places, SYMBOLS, inside.TRANSFORMERS, CPU)
    return Decoding(forward or (lambda tokens, made, given: TABLE[tokens]), kv, sampler, backend, **options)


def link(
    start: int,
    total: int,
    seed: int = 0,
    ends: Sequence[int] = (),
    prefix: int = 3,
    policy: SizePolicy | None = None,
    temperature: float = 1.0,
    penalty: float = 1.0,
    **options: Any,
) -> Job:
    """A job that goes on from a token, after a prefix of so many."""

    def prefill() -> Prefilled:
        kv = KVLayer(policy)
        kv.append(torch.zeros(1, 1, prefix, 2), torch.zeros(1, 1, prefix, 2))
        return Prefilled(TABLE[start][None], [kv])

    sampling = Sampling(temperature, 1.0, repetition_penalty=penalty)
    return Job(prefill, sampling, torch.Generator().manual_seed(seed), total, ends, torch.tensor([start]), **options)


def linked(
    start: int,
    total: int,
    seed: int = 0,
    ends: Sequence[int] = (),
    first_may_end: bool = True,
    include_stop_token: bool = True,
) -> list[int]:
    """What such a job says, in plain Python."""
    generator, token = torch.Generator().manual_seed(seed), start
    said: list[int] = []
    while len(said) < total:
        noise = torch.empty(SYMBOLS).exponential_(generator=generator)
        token = int((torch.softmax(TABLE[token], 0) / noise).argmax())
        said.append(token)
        if token in ends and (first_may_end or len(said) > 1):
            return said if include_stop_token else said[:-1]
    return said


def through(batch: Batch, jobs: Iterable[Job]) -> list[list[int]]:
    """What each of these jobs says, entered as places come free."""
    waiting = list(jobs)
    said: dict[Job, list[int]] = {job: [] for job in waiting}
    while waiting or batch.busy:
        pieces = [batch.add(waiting.pop(0)) for _ in range(min(len(waiting), batch.places - batch.busy))]
        for piece in (*pieces, *batch.step()):
            said[piece.job] += piece.tokens.tolist()
    return list(said.values())


class Breaks(Exception):
    """What a test lets fail."""
