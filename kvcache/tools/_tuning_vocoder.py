"""How the vocoder of a model that speaks runs fastest: a few settings, each timed on the same made-up tokens.

What changes the sound is tried only where that was asked for; how far it does is nothing that can be judged here.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import get_args

from kvcache.decoding import Setting, VocoderSetting, VocoderTrial
from kvcache.errors import InputError, KVCacheError
from kvcache.models import Precision
from kvcache.tools._target import ModelTarget

_SPOKEN = 50  # tokens, two seconds of speech
_WORTH = 0.97  # of the time of the plainer setting: what takes more is no gain


def tuned_vocoder(
    subject: ModelTarget,
    setting: Setting,
    vocoder: VocoderSetting,
    *,
    device: str = "cpu",
    change_sound: bool = False,
    until: float | None = None,
    clock: Callable[[], float] = time.monotonic,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[VocoderSetting, tuple[VocoderTrial, ...], tuple[str, ...]]:
    """The fastest way to run a vocoder, what was looked at, and the choice in plain words.

    Args:
        subject: the model.
        setting: how it decodes.
        vocoder: what stays as it is: weights, the reference, and a precision if it has one.
        device: where.
        change_sound: try other precisions, which change the sound; the one that is given, if any, stays.
        until: when nothing new is tried, by `clock`; the first is tried in any case.
        say: is told what was found, line by line.

    Raises:
        InputError: if the model has no vocoder, or it cannot run as given.
    """
    trials: dict[VocoderSetting, VocoderTrial] = {}

    def tried(one: VocoderSetting) -> float:
        if one not in trials:
            if trials and until is not None and clock() >= until:
                trials[one] = VocoderTrial(one, refused="no time was left")
            else:
                trials[one] = _trial(subject, replace(setting, vocoder=one), one, device, clock)
            say(f"vocoder {shown_vocoder(one)}: {_took(trials[one])}")
        found = trials[one].milliseconds
        return float("inf") if found is None else found

    best = replace(vocoder, compiled=False)
    if tried(best) == float("inf"):
        raise InputError(f"the vocoder of {subject.name} cannot run: {trials[best].refused}")
    searched = vocoder.precision is None and change_sound
    rivals = [replace(best, precision=precision) for precision in get_args(Precision)] if searched else []
    for rival in [one for one in rivals if one.precision != "fp32"]:
        best = rival if tried(rival) < _WORTH * tried(best) else best
    compiled = replace(best, compiled=True)
    best = compiled if tried(compiled) < _WORTH * tried(best) else best
    rest = "; ".join(f"{shown_vocoder(one.setting)}: {_took(one)}" for one in trials.values() if one.setting != best)
    lines = [f"vocoder: {shown_vocoder(best)}, {_took(trials[best])}; {rest}"]
    if not searched and vocoder.precision is None:
        lines.append("vocoder's precision: as loaded; others change the sound, and are tried with --change-sound")
    return best, tuple(trials.values()), tuple(lines)


def shown_vocoder(setting: VocoderSetting) -> str:
    """How a vocoder runs, in one line."""
    heard = "" if setting.reference_seconds is None else f", {setting.reference_seconds:g} s of the voice"
    return f"{setting.weights}, {setting.precision or 'as loaded'}{', compiled' if setting.compiled else ''}{heard}"


def _took(trial: VocoderTrial) -> str:
    return f"refused, {trial.refused}" if trial.milliseconds is None else f"{trial.milliseconds:.1f} ms a token"


def _trial(
    subject: ModelTarget, setting: Setting, vocoder: VocoderSetting, device: str, clock: Callable[[], float]
) -> VocoderTrial:
    try:
        prepared = subject.prepared(setting, device)
        try:
            taken = []
            for _ in range(3):  # the first sets something up
                begin = clock()
                if prepared.vocode(_SPOKEN) is None:
                    raise InputError(f"{subject.name} has no vocoder")
                taken.append(clock() - begin)
        finally:
            prepared.release()
    except (KVCacheError, RuntimeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return VocoderTrial(vocoder, refused=lines[0])
    return VocoderTrial(vocoder, 1e3 * min(taken[1:]) / _SPOKEN)
