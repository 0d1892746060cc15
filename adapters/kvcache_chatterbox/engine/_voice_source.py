"""Who speaks: a voice by its name, one of a clip, or the one that the model was loaded with."""

import os
from collections.abc import Callable
from typing import Any

from kvcache import InputError
from kvcache_chatterbox.audio import Speaker
from kvcache_chatterbox.checks import check_number
from kvcache_chatterbox.engine._request import check_who
from kvcache_chatterbox.voices import Voice, Voices, check_name, read_conds


class VoiceSource:
    """Gives the voices of an engine.

    Args:
        t3: upstream's.
        voices: those that were added, by name.
        speaker: what is around the T3; None around a bare one.
        emotion: that upstream's `generate` gives a voice without a name; None: the voice's own.
    """

    def __init__(self, t3: Any, voices: Voices, speaker: Speaker | None, emotion: float | None) -> None:
        self._t3, self._voices, self._speaker = t3, voices, speaker
        self._emotion = emotion if t3.hp.emotion_adv else None

    @property
    def speaker(self) -> Speaker:
        """What is around the T3.

        Raises:
            InputError: if nothing is.
        """
        if self._speaker is None:
            raise InputError(
                "a bare T3 has no vocoder: give the whole ChatterboxTTS, or use inference_stream() for tokens"
            )
        return self._speaker

    def chosen(
        self, voice: str | Voice | None, audio_prompt_path: str | os.PathLike[str] | None
    ) -> Callable[[], Voice]:
        """See `ChatterboxEngine.chosen_voice`."""
        check_who(voice, audio_prompt_path)
        if voice is not None:
            named = voice if isinstance(voice, Voice) else self._voices[voice]
            return lambda: named
        speaker = self.speaker
        if audio_prompt_path is not None:
            return lambda: self._as_generate(speaker.encode(audio_prompt_path))
        conds = speaker.conds
        return lambda: self._as_generate(Voice.of(self._t3, conds))

    def add(
        self, name: str, clip: str | os.PathLike[str] | None, conditionals: Any, exaggeration: float | None
    ) -> Voice:
        """See `ChatterboxEngine.add_voice`."""
        check_name(name)
        if exaggeration is not None:
            exaggeration = check_number("exaggeration", exaggeration)
        if (clip is None) == (conditionals is None):
            raise InputError(f"voice {name!r} needs either audio_prompt_path or conditionals")
        if clip is not None:
            voice = self.speaker.encode(clip)
        elif isinstance(conditionals, str | os.PathLike):
            voice = read_conds(self._t3, conditionals)
        else:
            voice = Voice.of(self._t3, conditionals)
        self._voices.add(name, voice if exaggeration is None else voice.with_emotion(exaggeration))
        return self._voices[name]

    def _as_generate(self, voice: Voice) -> Voice:
        """A voice without a name as upstream's `generate` has it where it is given no emotion."""
        emotion = self._emotion
        return voice if emotion is None or voice.emotion == emotion else voice.with_emotion(emotion)
