"""Tokens of requests that decode together, in chunks of one size, each request up to its end."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kvcache.decoding._ends import FAILED, Criteria, TextEnd
from kvcache.decoding._engine import Decoding
from kvcache.errors import InputError


def chunks_of(
    decoding: Decoding,
    end: TextEnd,
    size: int,
    pad: int | None = 0,
    criteria: Criteria | None = None,
    more: Callable[[int], Tensor] | None = None,
) -> Iterator[Tensor]:
    """The tokens of all requests in chunks ``[requests, size]``, from the first on; the last may be shorter.

    Over when every request has ended; what a request that has ended would say further is `pad`.

    Args:
        decoding: whose requests have been started.
        end: where each ends.
        size: tokens in a chunk. The host looks at the device once for each, and every `Decoding.ahead` tokens.
        pad: the token behind an end; None: a request that has ended goes on, where others have not.
        criteria: what else ends a request.
        more: is told how many tokens are wanted, and gives the next of every request, ``[requests, n]``; by default
            `Decoding.chunk`.

    Raises:
        InputError: if a token cannot be drawn, as its logits are NaN or infinite. The chunks before have been given;
            what was drawn before it in its own chunk has not.
        CapacityError: where a row has no room for more, after all tokens that there was room for.
    """
    more, over, made = decoding.chunk if more is None else more, [False] * decoding.requests, 1
    first = decoding.token.masked_fill(decoding.sampler.failed, FAILED)[:, None]
    held = _until_ends(first, 0, end, over, pad, criteria)
    while True:
        while not all(over) and held.shape[1] < size:
            if (room := decoding.kv.room()) == 0:
                if held.shape[1]:
                    yield held
                decoding.kv.check(1)
            drawn = more(min(size - held.shape[1], end.most - made, decoding.ahead, room))
            new = _until_ends(drawn, made, end, over, pad, criteria)
            if new.shape[1] < drawn.shape[1]:
                decoding.rewind(new.shape[1])
            held = torch.cat([held, new], 1)
            made += new.shape[1]
        yield held[:, :size]
        held = held[:, size:]
        if all(over) and not held.shape[1]:
            return


def _until_ends(
    tokens: Tensor, made: int, end: TextEnd, over: list[bool], pad: int | None, criteria: Criteria | None = None
) -> Tensor:
    """The tokens up to where the last request ends, padded behind each end.

    Args:
        tokens: ``[requests, n]``, as they were drawn.
        made: tokens of each request before them.
        end: where each ends.
        over: which have ended, which is brought up to date.
        criteria: what else ends a request.

    Raises:
        InputError: if one of them could not be drawn.
    """
    drawn = tokens.tolist()  # the one look at the device
    found = [(0, True) if over[row] else end.of(ids, made)[:2] for row, ids in enumerate(drawn)]
    if criteria is not None:
        found = criteria.cut(tokens, [said for said, _ in found], [ends for _, ends in found])
    lengths = [said for said, _ in found]
    over[:] = [ends for _, ends in found]
    if pad is None:
        lengths = [max(lengths) if all(over) else tokens.shape[1]] * len(found)
    if any(FAILED in ids[:said] for ids, said in zip(drawn, lengths, strict=True)):
        check_drawn(tokens)
    needed = max(lengths) if all(over) else tokens.shape[1]
    tokens = tokens[:, :needed]
    if pad is None or min(lengths) == needed:
        return tokens
    order = torch.arange(needed, device=tokens.device)
    return tokens.masked_fill(order >= torch.tensor(lengths, device=tokens.device)[:, None], pad)


def check_drawn(tokens: Tensor) -> None:
    """Raise `InputError` if one of these tokens ``[requests, n]`` could not be drawn."""
    if bool((tokens == FAILED).any()):
        raise InputError(
            "a token cannot be drawn: the logits of its step were NaN, infinite, or all of them -inf; look for NaN in the "
            "model's weights and inputs, or run it in a wider dtype"
        )
