"""From a request to what is decoded: the segments of its text, planned, with settings as upstream's `generate` has them."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from torch import Tensor

from kvcache_chatterbox.audio import Speaker
from kvcache_chatterbox.checks import check_seed
from kvcache_chatterbox.engine._request import SpeechRequest
from kvcache_chatterbox.speech import (
    OPTIONS,
    LongText,
    SamplingOptions,
    UtteranceDecoder,
    UtteranceOptions,
    most_tokens,
    rows_alone,
    sampling_of,
    seeds,
)
from kvcache_chatterbox.text import LongTextPlan, RowLimits, Segment, TokenRoom, make_plan, split
from kvcache_chatterbox.voices import Voice

log = logging.getLogger("kvcache_chatterbox")


def long_text(
    decoder: UtteranceDecoder,
    speaker: Speaker,
    defaults: Mapping[str, float],
    request: SpeechRequest,
    voice: Voice,
    limits: RowLimits,
    slots: int | None,
) -> LongText:
    """The text of a request as utterances, with the plan for them.

    Args:
        decoder: what will decode them.
        speaker: what is around its T3.
        defaults: of upstream's `generate`, by name.
        request: what is asked for.
        voice: who speaks.
        limits, slots: see `ChatterboxEngine.long_text`.

    Raises:
        InputError, CapacityError: if it cannot be spoken.
    """
    speaker.check_language(request.language_id)
    options = _as_generate(decoder.t3, defaults, request.utterance)
    if options.exaggeration is not None:
        voice, options = voice.with_emotion(options.exaggeration), replace(options, exaggeration=None)
    parts, tokens = _divided(request, speaker)
    check_seed(options.seed, len(parts))
    if len(parts) == 1 and options.max_new_tokens is None:
        options = replace(options, max_new_tokens=most_tokens(decoder.t3))
    if request.segmenting.carry is not None or not decoder.batches:
        limits = replace(limits, max_rows=1)
    counts = [one.shape[1] for one in tokens]
    plan = _planned(decoder, parts, counts, request.language_id, options, limits, voice, slots)
    utterances = [
        decoder.utterance(voice, text, replace(options, max_new_tokens=segment.most, seed=seed))
        for text, segment, seed in zip(tokens, plan.segments, seeds(options.seed, len(parts)), strict=True)
    ]
    return LongText(plan, utterances, request.segmenting.carry)


def _planned(
    decoder: UtteranceDecoder,
    parts: list[Segment],
    text_tokens: list[int],
    language: str | None,
    options: UtteranceOptions,
    limits: RowLimits,
    voice: Voice,
    slots: int | None,
) -> LongTextPlan:
    needs, positions = decoder.needs, decoder.t3.speech_pos_emb
    slots_of = needs.taken if slots is None else needs.exactly
    alone = rows_alone(sampling_of(decoder.t3.is_gpt, options.sampling))
    room = TokenRoom(
        prefix=decoder.voice_tokens(voice),
        overhead=needs.overhead,
        longest=None if positions is None else positions.emb.num_embeddings - 1,
        max_length=decoder.options.max_cache_length if slots is None else slots,
    )
    return make_plan(
        parts,
        text_tokens,
        language=language,
        max_new_tokens=options.max_new_tokens,
        limits=limits,
        room=room,
        together=needs.layout(needs.rows, slots_of, decoder.enabled),
        alone=needs.layout(alone, slots_of, decoder.enabled),
    )


def _divided(request: SpeechRequest, speaker: Speaker) -> tuple[list[Segment], list[Tensor]]:
    """The segments of a request's text, and the text tokens ``[1, n]`` of each.

    Raises:
        InputError: if there is nothing to say, or the language cannot be used.
    """
    text, language = request.text, request.language_id
    parts = split(text, language, request.segmenting.segment_characters)
    # Upstream's rules look at the first character, be it white space.
    said = [text if len(parts) == 1 else text[: parts[0].end], *(part.text for part in parts[1:])]
    return parts, [speaker.tokenize(one, language) for one in said]


def _as_generate(t3: Any, defaults: Mapping[str, float], options: UtteranceOptions) -> UtteranceOptions:
    """What `generate` of the model's own class would do: its defaults, where nothing is given.

    Upstream's Turbo takes `min_p` and `exaggeration`, says that it ignores them, and ignores them; so does this.
    """
    given: dict[str, Any] = {name: defaults[name] for name in OPTIONS if name in defaults} | dict(options.sampling)
    if t3.is_gpt:
        unused = [name for name in ("min_p",) if given.get(name)] + ["exaggeration"] * bool(options.exaggeration)
        if unused:
            log.warning("%s: the GPT-2 variants know nothing of it; ignored, as upstream does", ", ".join(unused))
        given["min_p"] = 0.0
    return replace(options, sampling=cast(SamplingOptions, given))
