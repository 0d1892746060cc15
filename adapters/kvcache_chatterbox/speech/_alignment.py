"""The multilingual model's alignment check: where in the text three attention heads look, and what follows from it.

The rules are those of upstream's `AlignmentStreamAnalyzer`, as tensors with a row for each request, so that a step of any
number of requests asks nothing of the host. Upstream's own turns all layers to eager attention for good, leaves a hook per head
and call, copies whole attention maps to the host, and takes one request; with a text of three letters and less it ends in an
IndexError.
"""

import copy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import Self

from kvcache.models import class_code, get_cache, looks_on
from kvcache_chatterbox.upstream import beside, needed_beside

ALIGNMENT = "alignment"
"""The rule's name."""

_ANALYZER = "AlignmentStreamAnalyzer"
_SURE = 2.0**15  # a score for and against a token that leaves no choice, as upstream's
_BACK, _AHEAD = -4, 7  # tokens of the text that a step goes on by more than, and by less than; else it is a jump
_NEAR_END = 3  # tokens of the text at its end that count as such
_SHORTEST = 5  # a text of five tokens or fewer may end at any time
_LONG = 5.0  # attention in all, about as many steps, that the end of the text, or what is before it, has behind its end
REMEMBERED = 1024
"""Steps of a request whose looks are remembered: a little more than upstream's longest speech."""

_reading: ContextVar["HeadReader | None"] = ContextVar("kvcache_chatterbox_reading", default=None)


def is_checked(t3: Any) -> bool:
    """Whether a T3's alignment is checked: the multilingual one, up to the release of upstream that dropped it."""
    return bool(t3.hp.is_multilingual) and beside(t3, _ANALYZER) is not None


def aligned_heads(t3: Any) -> tuple[tuple[int, int], ...]:
    """The heads that show where in the text a checked T3 is, as ``(layer, head)``."""
    return tuple(sys.modules[needed_beside(t3, _ANALYZER).__module__].LLAMA_ALIGNED_HEADS)


class HeadReader:
    """Reads the attention weights of a few heads of a Llama decoder in the model's own forward passes, for row 0.

    Args:
        decoder: the backbone, with ``layers[i].self_attn``.
        heads: ``(layer, head)`` pairs.
    """

    def __init__(self, decoder: Any, heads: Sequence[tuple[int, int]]) -> None:
        self._decoder = decoder
        self._heads = heads
        self.weights: dict[tuple[int, int], Tensor] = {}  # (layer, head) -> [queries, keys]
        self._projected: dict[nn.Module, Tensor] = {}

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Within this block, forward passes of this thread leave their weights in `weights`."""
        handles = []
        for module in {self._decoder.layers[layer].self_attn for layer, _ in self._heads}:
            handles += [
                part.register_forward_hook(looks_on(self._note, passing=True))
                for part in (module.q_proj, module.k_proj)
            ]
            handles.append(module.register_forward_hook(looks_on(self._read, passing=True), with_kwargs=True))
        token = _reading.set(self)
        try:
            yield
        finally:
            _reading.reset(token)
            for handle in handles:
                handle.remove()
            self._projected.clear()

    def _note(self, module: nn.Module, _args: tuple[Any, ...], projected: Tensor) -> None:
        if _reading.get() is self:  # else another request's forward pass, in another thread
            self._projected[module] = projected[:1]

    def _read(self, module: Any, _args: tuple[Any, ...], *kwargs_and_output: Any) -> None:
        # Torch may call it without kwargs while the hook is removed.
        if _reading.get() is not self:
            return
        kwargs, _ = kwargs_and_output
        cos, sin = (part[:1] for part in kwargs["position_embeddings"])
        cache = get_cache(kwargs)
        for layer, head in self._heads:
            if layer == module.layer_idx:
                kv_head = head // module.num_key_value_groups
                query = self._head(module, module.q_proj, head, cos, sin)
                if cache is None:
                    keys = self._head(module, module.k_proj, kv_head, cos, sin)
                else:
                    keys = cache.layers[layer].keys[0, kv_head]
                self.weights[layer, head] = _weights(query, keys, module.scaling, kwargs.get("attention_mask"))

    def _head(self, module: Any, projection: nn.Module, head: int, cos: Tensor, sin: Tensor) -> Tensor:
        """One head's queries or keys, rotated, ``[tokens, head_dim]``."""
        states = self._projected[projection][:, None, :, head * module.head_dim : (head + 1) * module.head_dim]
        rotate = needed_beside(module, "apply_rotary_pos_emb")
        return torch.as_tensor(rotate(states, states, cos, sin)[0])[0, 0]


def _weights(query: Tensor, keys: Tensor, scaling: float, mask: Tensor | None) -> Tensor:
    """What row 0 looks at: under the layer's own mask, or where it was given none, causally."""
    scores = (query @ keys.T) * scaling
    new, total = scores.shape
    lowest = torch.finfo(scores.dtype).min
    if mask is not None:
        seen = mask[0, 0, :, :total]
        scores = scores.masked_fill(~seen, lowest) if seen.dtype == torch.bool else scores + seen
    elif new > 1:
        future = torch.ones(new, total, dtype=torch.bool, device=scores.device).triu(total - new + 1)
        scores = scores.masked_fill(future, lowest)
    return torch.softmax(scores, dim=-1, dtype=torch.float32)


class AlignmentNote(NamedTuple):
    """What the check has to know of a request when it begins.

    Attributes:
        text: where its text stands among the tokens, from and to.
        looks: what the start-of-speech tokens see of it, ``[1 or 2, text tokens]``, the mean of the heads.
    """

    text: tuple[int, int]
    looks: Tensor


def first_look(weights: Sequence[Tensor], text: tuple[int, int], own: tuple[int, Tensor] | None) -> AlignmentNote:
    """What the check begins with.

    Args:
        weights: of each head in the first pass, ``[queries, keys]``.
        own: of a first pass in which rows lay side by side: how many queries and which keys are the conditional's.
    """
    seen = torch.stack([w if own is None else w[: own[0], own[1]] for w in weights]).mean(0)
    speech = seen.shape[1] - text[1]  # tokens behind the text
    return AlignmentNote(text, seen[-speech:, slice(*text)])


class AlignmentRule:
    """Ends or prolongs the speech of requests by where in their texts it is; a `kvcache.decoding.ScoreRule`.

    The end of speech is out of the question before the last three tokens of the text, and certain where the last three, or what
    is before the last five, are seen for long behind the end, or where a token of speech comes twice.

    Args:
        requests: how many.
        text: tokens of a text at most. Like the steps it is the same for decodings of any length, which share a compiled step.
        steps: how many of a request's last steps are remembered.
        stop: the token that ends speech.
        start: the token that it begins with.
        device: of the scores.
    """

    def __init__(self, requests: int, text: int, steps: int, stop: int, start: int, device: torch.device) -> None:
        self._stop, self._start = stop, start

        def zeros(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(requests, *shape, dtype=dtype, device=device)

        with torch.inference_mode(False):
            self._held = {
                "begin": zeros(),  # of the text
                "length": zeros(),  # of the text; 0: nothing is checked
                "step": zeros(),
                "position": zeros(),  # in the text, without jumps
                "complete": zeros(dtype=torch.bool),  # the end of the text was reached
                "tail": zeros(_NEAR_END, dtype=torch.float32),  # attention to each of its last tokens since
                "again": zeros(dtype=torch.float32),  # attention to what is before its end since
                "spoken": zeros(2),  # the last tokens of speech
                "looks": zeros(text, dtype=torch.float32),  # of the step that is running
                "history": zeros(steps, text, dtype=torch.float16),
            }
            self._order = torch.arange(text, device=device)

    @classmethod
    def of(cls, t3: Any, requests: int, text: int | None = None, steps: int = REMEMBERED) -> Self:
        """The rule of a checked T3; by default for the longest text that it has positions for."""
        text = t3.text_pos_emb.emb.num_embeddings if text is None else text
        return cls(requests, text, steps, t3.hp.stop_speech_token, t3.hp.start_speech_token, t3.device)

    def first_rows(self, requests: int) -> "AlignmentRule":
        """See `kvcache.decoding.ScoreRule`."""
        new = copy.copy(self)
        vars(new).update(_held={name: held[:requests] for name, held in self._held.items()})
        return new

    def move(self, request: int, to: int) -> None:
        """See `kvcache.decoding.ScoreRule`."""
        for held in self._held.values():
            held[to] = held[request].clone()

    def state(self) -> list[Tensor]:
        """All that a step changes, each ``[requests, …]``."""
        return list(self._held.values())

    def program(self) -> str:
        """See `kvcache.decoding.ScoreRule`."""
        return f"{class_code(type(self))} {self._stop} {self._start}"

    def end(self, request: int) -> None:
        """See `kvcache.decoding.ScoreRule`: `alignment` is asked of it then."""

    def active(self, which: slice) -> bool:  # noqa: ARG002  # every request has a text
        """See `kvcache.decoding.ScoreRule`."""
        return True

    def begin(self, request: int, note: AlignmentNote | None) -> None:
        """See `kvcache.decoding.ScoreRule`."""
        held = {name: one[request] for name, one in self._held.items()}
        for name, one in held.items():
            if name != "history":
                one.zero_()
        held["spoken"].fill_(self._start)
        if note is not None:
            held["begin"].fill_(note.text[0])
            held["length"].fill_(note.text[1] - note.text[0])
            held["looks"][: note.looks.shape[1]] = note.looks[-1]

    def look(self, weights: Sequence[Tensor]) -> None:
        """Take what the heads see, ``[requests, columns]`` each."""
        held, seen = self._held, torch.stack(list(weights)).mean(0)
        columns = (held["begin"][:, None] + self._order).clamp(max=seen.shape[1] - 1)
        held["looks"].copy_(seen.gather(1, columns).masked_fill(self._order >= held["length"][:, None], 0))

    def scores(self, scores: Tensor, which: slice = slice(None)) -> Tensor:
        """The scores ``[requests, vocabulary]``, with the end of speech out of the question or certain where that is so."""
        held = {name: one[which] for name, one in self._held.items()}
        length, step, order = held["length"], held["step"], self._order
        checked, rows = length > 0, torch.arange(len(length), device=length.device)
        held["history"][rows, step % held["history"].shape[1]] = held["looks"].half()
        # Nothing is seen further on in the text than there were steps.
        looks = held["looks"].masked_fill(order > step[:, None], 0)
        here = looks.argmax(-1)
        jump = here - held["position"]
        position = torch.where((jump > _BACK) & (jump < _AHEAD), here, held["position"])
        ended = held["complete"].clone()  # before this step
        complete = ended | (position >= length - _NEAR_END)
        last = looks.gather(1, (length[:, None] - _NEAR_END + order[:_NEAR_END]).clamp(min=0))
        before = looks.masked_fill(order >= length[:, None] - _SHORTEST, 0).amax(-1)
        tail, again = held["tail"] + last * ended[:, None], held["again"] + before * ended
        spoken = held["spoken"]
        twice = (step >= 2) & (spoken[:, 0] == spoken[:, 1])  # upstream waits for three tokens, the start among them
        for name, value in {"position": position, "complete": complete, "tail": tail, "again": again}.items():
            held[name].copy_(value)
        step.add_(checked)

        stopping = torch.arange(scores.shape[1], device=scores.device) == self._stop
        early = checked & (here < length - _NEAR_END) & (length > _SHORTEST)
        late = checked & ((tail.amax(-1) >= _LONG) | (again > _LONG) | twice)
        scores = scores.masked_fill(early[:, None] & stopping, -_SURE)
        return torch.where(late[:, None], torch.where(stopping, _SURE, -_SURE).to(scores.dtype), scores)

    def drew(self, tokens: Tensor, which: slice = slice(None)) -> None:
        """These tokens ``[requests]`` were drawn."""
        spoken = self._held["spoken"][which]
        spoken.copy_(torch.stack((spoken[:, 1], tokens), 1))

    def alignment(self, request: int) -> Tensor:
        """What each step of a request saw of its text, ``[steps, text tokens]``, fp16: the last steps that are remembered."""
        held = {name: one[request] for name, one in self._held.items()}
        made, most = int(held["step"]), held["history"].shape[0]
        steps = torch.arange(max(0, made - most), made, device=held["history"].device) % most
        return held["history"][steps, : int(held["length"])]
