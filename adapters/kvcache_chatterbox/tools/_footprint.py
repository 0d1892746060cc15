"""What requests take on a T3 that has no weights: upstream's modules and this adapter's own code, run on the meta device."""

from typing import Any

import torch
from torch import Tensor, nn

from kvcache import InputError, PrefixKey, PrefixSnapshot
from kvcache.decoding import Decoding
from kvcache.models import Watch, cache_kwarg, kv_layers, onednn_rows
from kvcache.tools import Footprint, Moment, buffers, fill, onednn_bytes, step_bytes, written_static
from kvcache_chatterbox.engine import ChatterboxEngine
from kvcache_chatterbox.loading import random_conditionals
from kvcache_chatterbox.prefill import condition
from kvcache_chatterbox.speech import Utterance, sampling_of
from kvcache_chatterbox.voices import Voice, VoiceReuse


def text_room(engine: ChatterboxEngine, voice: int, context: int) -> int:
    """Text tokens of a request that begins with `context` tokens, `voice` of them the voice; frame included.

    Raises:
        InputError: if there is no room for a text.
    """
    frame = 0 if engine.t3.is_gpt else 2
    count = context - voice - engine.needs.overhead - frame
    if count < 1:
        raise InputError(
            f"context={context} leaves no room for a text: voice, frame and start take {context - count} tokens; "
            f"give at least {context - count + 1}"
        )
    return count + frame


def check_together(engine: ChatterboxEngine, requests: int) -> None:
    """Raise `InputError` if an engine cannot decode so many requests together."""
    if requests > 1 and not engine.batches:
        reason = engine._why_not or "the token loop runs one request at a time; give another backend than 'off'"
        raise InputError(f"requests={requests} decode together on the decode engine: {reason}")


class _Assumed(VoiceReuse):
    """Finds every prefix: with the shapes that it has, and no numbers."""

    def __init__(self, t3: Any, prefix_cache: Any) -> None:
        super().__init__(t3, prefix_cache, "all")
        self.kept = 0  # tokens of the longest

    def condition(self, t3_cond: Any) -> Tensor:
        return condition(self._t3, t3_cond)

    def _key(self, conditioning: Tensor, unconditional: int = 0) -> PrefixKey:
        content = self._content(conditioning, unconditional)
        return PrefixKey("planned", torch.zeros(content.shape, dtype=content.dtype))

    def _known(self, key: PrefixKey) -> PrefixSnapshot:
        self.kept = max(self.kept, len(key))
        shape, geometry = (1, self._geometry.kv_heads, len(key)), self._geometry
        keys, values = (
            torch.empty(*shape, dim, dtype=geometry.dtype, device="meta")
            for dim in (geometry.head_dim, geometry.value_dim)
        )
        return PrefixSnapshot(key, tuple((keys, values) for _ in range(geometry.layers)))

    def build(self, key: PrefixKey, start: PrefixSnapshot | None) -> int:
        """Bytes that computing a prefix takes at most, the prefix itself not among them."""
        with Watch() as watch:
            made = self._extend(key, start)
        return int(watch.peak - made.nbytes + made.key.content.nbytes)

    def building(self, beginning: Tensor, unconditional: int) -> int:
        """Bytes that computing a voice takes at most, and then what a longer text needs besides.

        Args:
            beginning: the voice as the beginning of the backbone's input, ``[tokens, dim]``.
            unconditional: tokens of the text without conditioning; 0 without guidance.
        """
        first, last = self._key(beginning, min(1, unconditional)), self._key(beginning, unconditional)
        voice = self.build(first, None)
        return max(voice, self.build(last, self._known(first))) if len(last) > len(first) else voice

    def nbytes(self, tokens: int) -> int:
        """Bytes of a prefix as it is kept."""
        content: int = self._t3.dim * self._t3.speech_emb.weight.element_size()
        return tokens * (self._geometry.token_bytes + content)


@torch.inference_mode()
def speech_footprint(engine: ChatterboxEngine, requests: int, context: int, tokens: int, device: str) -> Footprint:
    """What requests take.

    Args:
        engine: around a T3 on the meta device.
        requests: that decode together.
        context: tokens of a request before the speech.
        tokens: of speech.
        device: ``"cpu"`` or ``"cuda"``: what is planned for.
    """
    check_together(engine, requests)
    t3 = engine.t3
    reuse = engine._reuse = _Assumed(t3, engine.prefix_cache)
    voice = Voice(random_conditionals(t3), {})
    beginning = reuse.condition(voice.t3)[0]
    count = text_room(engine, beginning.shape[0], context)
    text = torch.zeros(1, count, dtype=torch.long, device="meta")
    utterance = Utterance(voice, text, sampling_of(t3.is_gpt, {}), tokens, None, True)
    rows = 2 if utterance.sampling.cfg_weight > 0 else 1

    building = reuse.building(beginning, count if rows == 2 else 0)
    decoder, cache = engine._decoder(utterance, rows, None, True)
    layers = kv_layers(cache)
    with Watch() as watch:
        logits = decoder.prefill()
    prefix, filled, scratch = reuse.nbytes(reuse.kept), buffers(layers), _scratch(engine, device, logits.dtype)
    prefill = max(0, watch.peak - filled) + scratch
    seen = context + tokens - 1  # the last token drawn is never run

    if engine._stepper is None:
        step = 0
        if seen > context:
            step = _loop_step(t3, cache, logits, seen - context)
            step += scratch if rows in onednn_rows() else 0
        token_loop = (
            Moment("voice", building),
            Moment("prefill", filled, workspace=prefill),
            Moment("step", buffers(layers), workspace=step),
        )
        return Footprint(token_loop, buffers(layers), prefix, (t3,), engine._why_not)

    with Watch() as watch:
        decoding = engine._stepper.decoding(requests, rows, engine.slots(utterance))
    static, fixed = decoding.kv, watch.live - decoding.kv.nbytes  # noise, marks, counters
    head = _own_weights(decoding)
    fixed -= head
    step = step_bytes(decoding, seen)
    if requests * rows in onednn_rows() and decoding.backend != "compile":
        step += scratch

    def used(tokens: int, requests: int) -> int:
        return written_static(static, tokens, requests * rows, device)

    if requests == 1:
        beginnings = [Moment("prefill", filled, workspace=prefill), Moment("handover", filled, used(context, 1), fixed)]
    else:  # all may come at once: then all are prefilled before any of them is copied
        beginnings = [Moment("prefill", filled * requests, used(context, requests), fixed, prefill)]
    moments = [Moment("voice", building), *beginnings, Moment("step", 0, used(seen, requests), fixed, step)]
    return Footprint(tuple(moments), static.nbytes, prefix, (t3, *_modules(decoding)))


def _scratch(engine: ChatterboxEngine, device: str, dtype: torch.dtype) -> int:
    """Bytes of oneDNN's copy of the largest layer, where `onednn_linear` multiplies with it."""
    plain = device == "cpu" and engine.options.onednn and dtype == torch.float32
    return onednn_bytes([engine.t3.tfmr]) if plain and (onednn_rows().start == 1 or not engine.t3.is_gpt) else 0


def _loop_step(t3: Any, cache: Any, logits: Tensor, steps: int) -> int:
    """Bytes that the last of so many steps of the token loop takes beside the cache, which is filled up to there.

    Args:
        logits: of the prefill, ``[rows, vocabulary]``.
    """
    layers = kv_layers(cache)
    fill(layers, steps - 1)
    before = buffers(layers)
    with Watch() as watch:
        embeds = logits.new_empty(len(logits), 1, t3.dim)
        out = t3.tfmr(inputs_embeds=embeds, **cache_kwarg(t3.tfmr, cache), use_cache=True)
        t3.speech_head(out[0][:, -1])
    return int(max(0, watch.peak - buffers(layers) + before))


def _modules(decoding: Decoding) -> tuple[nn.Module, ...]:
    return (decoding._forward,) if isinstance(decoding._forward, nn.Module) else ()


def _own_weights(decoding: Decoding) -> int:
    """Of the head in fewer bits, which is a weight and no workspace."""
    found = [buffer for module in _modules(decoding) for buffer in module.head.buffers(recurse=False)]  # type: ignore[union-attr]
    return sum(buffer.nbytes for buffer in found)
