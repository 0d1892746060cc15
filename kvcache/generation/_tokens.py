"""The tokens that `generate` says on the way."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.streamers import BaseStreamer

from kvcache.errors import InputError
from kvcache.generation._run import Run


class Emitter(BaseStreamer):
    """Passes each step's tokens on, ``[rows]``, or ``[rows, codebooks]`` where a token has several numbers.

    Args:
        emit: takes them.
        run: that they are of.
        rows: of the batch, where the run does not say.
        beside: another streamer, which is given all that `generate` gives.
    """

    def __init__(self, emit: Callable[[Tensor], None], run: Run, rows: int | None, beside: Any) -> None:
        self._emit = emit
        self._run = run
        self._rows = rows
        self._beside = beside
        self._prompt: Tensor | None = None
        self._ended = False

    def put(self, value: Tensor) -> None:
        if self._ended:
            raise InputError(
                "these inputs take several runs of this model's generate (long audio, or another try), whose tokens are no "
                "stream: what came so far may be replaced; use generate()"
            )
        if self._beside is not None:
            self._beside.put(value)
        if self._prompt is None:
            self._prompt = value
            return
        if self._run.mode is GenerationMode.ASSISTED_GENERATION:  # several tokens of one row
            for token in value.reshape(1, -1).unbind(1):
                self._emit(token)
        else:
            self._emit(self._by_row(value, self._prompt))

    def _by_row(self, value: Tensor, prompt: Tensor) -> Tensor:
        # Some models run a row for each codebook, and tell how many there are by their prompt or not at all.
        rows = prompt.shape[0] if prompt.dim() == 3 else self._run.rows or self._rows
        if value.dim() > 1 or rows is None or value.shape[0] == rows or value.shape[0] % rows:
            return value
        return value.reshape(rows, -1)

    def end(self) -> None:
        self._ended = True
        if self._beside is not None:
            self._beside.end()
