"""What a first request would wait for, done before it: the beginning of a made-up one."""

from collections.abc import Iterator
from contextlib import closing
from typing import Any, cast

from kvcache.decoding import Told
from kvcache_chatterbox.speech import Utterance, UtteranceDecoder

TEXT = "The birch canoe slid on the smooth planks."
FEW = 4  # tokens that a warm-up decodes


def begun(stream: Iterator[Any], told: Told) -> None:
    """The beginning of a stream of tokens, which is closed then."""
    told("decoding the first tokens")
    with closing(cast(Any, stream)) as begun:
        next(begun, None)
        next(begun, None)  # the first may be there without a step


def batch_begun(decoder: UtteranceDecoder, utterance: Utterance, requests: int, told: Told) -> None:
    """Steps of a batch of as many places as a scheduler with so many rows has: each number that a step may run."""
    slots, _ = decoder.room(requests)
    with decoder.batch(requests, slots) as batch:
        for size in batch.sizes:
            told(f"decoding the first tokens of {size} at once")
            while batch.busy < size:
                batch.add(decoder.job(utterance))
            batch.step()
