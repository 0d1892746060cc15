"""A voice as one object and one file: what T3 and the vocoder are told about a speaker, and what T3 computed of it."""

import copy
import dataclasses
import os
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvcache import CorruptError, InputError, PrefixSnapshot
from kvcache.cache import pack, unpack
from kvcache.errors import said
from kvcache.io import check_given, read_given, write_given
from kvcache_chatterbox.checks import check_number, check_path
from kvcache_chatterbox.upstream import needed_beside
from kvcache_chatterbox.voices._reuse import VoiceReuse

VERSION = 1  # of the file
_FORMAT = "kvcache-voice"
_LONGEST_NAME = 200


@dataclass(frozen=True, eq=False)
class Voice:
    """A speaker.

    Attributes:
        t3: upstream's `T3Cond`: speaker embedding, prompt tokens, emotion.
        gen: S3Gen's reference, upstream's `ref_dict`; empty if there is no vocoder.
        kept: whether what T3 computes of it is stored for other requests. Not so of what a single request brings, an emotion
            or a clip: there are any number of those, and they would push all others out.
    """

    t3: Any
    gen: Mapping[str, Any]
    kept: bool = True

    @classmethod
    def of(cls, t3: Any, conditionals: Any) -> "Voice":
        """A voice from upstream's `Conditionals` or `T3Cond`, copied and checked for the model `t3`.

        Raises:
            InputError: if a part is missing, has another shape or is out of range.
        """
        if isinstance(conditionals, Voice):
            return conditionals
        given, gen = getattr(conditionals, "t3", conditionals), getattr(conditionals, "gen", {})
        kinds = cond_class(t3)
        names = [field.name for field in dataclasses.fields(kinds)]
        if not hasattr(given, "speaker_emb"):
            raise InputError(f"{type(conditionals).__name__} is no voice: give upstream's Conditionals or T3Cond")
        parts = {name: _kept(getattr(given, name, None)) for name in names}
        parts["cond_prompt_speech_emb"] = None  # made anew from the tokens: an earlier model may have left it there
        _check(t3, parts)
        return cls(kinds(**parts), _reference(gen))

    @property
    def emotion(self) -> float | None:
        """How the voice speaks unless a request says otherwise; None for a model that knows no emotion."""
        given = self.t3.emotion_adv
        return None if given is None else float(torch.as_tensor(given).reshape(-1)[0])

    def with_emotion(self, exaggeration: float) -> "Voice":
        """The same speaker with another emotion; not `kept` until it is added under a name.

        Raises:
            InputError: if that is no finite number.
        """
        exaggeration = check_number("exaggeration", exaggeration)
        t3 = copy.copy(self.t3)
        t3.emotion_adv = exaggeration * torch.ones(1, 1, 1)
        return Voice(t3, self.gen, kept=False)


def read_conds(t3: Any, path: str | os.PathLike[str]) -> Voice:
    """Upstream's ``conds.pt``, read without executing anything in it.

    Raises:
        InputError: if it is not one.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        parts, gen = dict(found["t3"]), dict(found["gen"])
        known = {field.name for field in dataclasses.fields(cond_class(t3))}
        given = cond_class(t3)(**{name: value for name, value in parts.items() if name in known})
    except FileNotFoundError:
        raise
    except (pickle.UnpicklingError, RuntimeError, EOFError):
        # Torch advises to load it with weights_only=False, which would run what is in it: nobody shall read that here.
        raise InputError(
            f"{path} is no conds.pt of Chatterbox's: it is damaged, or holds more than tensors and numbers, and is not read; "
            "make it anew with prepare_conditionals() and conds.save()"
        ) from None
    except Exception as error:  # of missing parts
        raise InputError(f"{path} is no conds.pt of Chatterbox's: {said(error)}; give one of a checkpoint") from error
    return Voice.of(t3, _Pair(given, gen))


@dataclass(frozen=True)
class _Pair:
    t3: Any
    gen: dict[str, Any]


class Voices(Mapping[str, Voice]):
    """The voices of an engine, by name.

    Args:
        t3: the model that they are for.
        reuse: what computes their prefixes; None if none are reused.
    """

    def __init__(self, t3: Any, reuse: VoiceReuse | None) -> None:
        self._t3 = t3
        self._reuse = reuse
        self._voices: dict[str, Voice] = {}

    def __getitem__(self, name: str) -> Voice:
        if not isinstance(name, str):
            raise _no_name(name)
        found = self._voices.get(name)  # once: another thread may remove it
        if found is None:
            known = ", ".join(map(repr, self)) or "none yet"
            raise InputError(f"there is no voice {name!r} (known: {known}); add it with add_voice()")
        return found

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._voices

    def get(self, name: str, default: Any = None) -> Any:
        """The voice of this name, or `default`."""
        return self._voices.get(name, default) if isinstance(name, str) else default

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._voices))

    def __len__(self) -> int:
        return len(self._voices)

    def __repr__(self) -> str:
        return f"Voices({', '.join(map(repr, self))})"

    def add(self, name: str, voice: Voice) -> None:
        """Name a voice; one of the same name is replaced.

        Raises:
            InputError: for a name that is empty, longer than 200 characters or not printable, or what is no `Voice`.
        """
        check_name(name)
        if not isinstance(voice, Voice):
            raise InputError(
                f"a {type(voice).__name__} is no Voice: make one with Voice.of(), or give it to add_voice()"
            )
        self._voices[name] = voice if voice.kept else dataclasses.replace(voice, kept=True)

    def remove(self, name: str) -> None:
        """Forget a voice.

        Raises:
            InputError: if there is none of this name.
        """
        self[name]
        self._voices.pop(name, None)

    def export(self, name: str, path: str | os.PathLike[str], *, computed: bool = True) -> None:
        """Write a voice as one ``.safetensors`` file, whole or not at all.

        Args:
            name: of the voice.
            path: of the file; one that exists is replaced, and a symbolic link stays one: what it leads to is written.
            computed: with the keys and values that T3 computed of it, which serve a model with the same weights.

        Raises:
            InputError: if there is no voice of this name, or a folder, a device or the like at the path.
        """
        check_path("path", path)
        voice = self[name]
        check_given(path)  # before the prefix is computed
        known = computed and self._reuse is not None and self._reuse.usable
        snapshot = self._reuse.prepare(voice.t3) if known and self._reuse is not None else None
        _write(Path(path), name, voice, snapshot)

    def load(self, path: str | os.PathLike[str], name: str | None = None, *, computed: bool = False) -> str:
        """Add the voice in a file that `export` wrote.

        Args:
            path: of the file. It is not trusted: a changed byte is noticed, and what it says is checked.
            name: by default the one it was exported under.
            computed: take over the keys and values in it, if they are of a model with the same weights. No check can tell
                whether they are what that model computes of the voice: whoever wrote the file then decides what is heard
                of it, here and wherever the store is shared. They are stored, and signed, as if computed here. By default
                they are left, and computed anew.

        Returns:
            The voice's name.

        Raises:
            CorruptError: if the file is not intact, or of another version.
            InputError: if the voice does not fit the model.
        """
        check_path("path", path)
        written, voice, snapshot = _read(self._t3, Path(path))
        name = written if name is None else name
        self.add(name, voice)
        if self._reuse is not None and self._reuse.usable:
            if computed and snapshot is not None and snapshot.key == (key := self._reuse.key(voice.t3)):
                snapshot.check(key)
                self._reuse.prefix_cache.store.put(snapshot)
            self._reuse.prepare(voice.t3)
        return name


def check_voice(voice: Any) -> None:
    """Raise `InputError` for what is neither a voice nor the name of one."""
    if not isinstance(voice, str | Voice):
        raise _no_name(voice)


def _no_name(name: Any) -> InputError:
    return InputError(
        f"a {type(name).__name__} is no name of a voice: give the name that it was added under; conditionals and "
        "clips are added with add_voice()"
    )


def check_name(name: Any) -> None:
    """Raise `InputError` for what cannot name a voice."""
    if not isinstance(name, str) or not name.strip() or len(name) > _LONGEST_NAME or not name.isprintable():
        raise InputError(f"name={name!r:.80} must be 1 to {_LONGEST_NAME} printable characters")


def _write(path: Path, name: str, voice: Voice, snapshot: PrefixSnapshot | None) -> None:
    parts = {f.name: getattr(voice.t3, f.name) for f in dataclasses.fields(voice.t3)}
    tensors = {f"t3.{key}": value for key, value in parts.items() if isinstance(value, Tensor)}
    tensors |= {f"gen.{key}": value for key, value in voice.gen.items() if isinstance(value, Tensor)}
    header: dict[str, Any] = {
        "format": _FORMAT,
        "version": VERSION,
        "name": name,
        "gen": {key: value for key, value in voice.gen.items() if not isinstance(value, Tensor)},
        "prefix": None if snapshot is None else snapshot.header(),
    }
    if snapshot is not None:
        tensors |= {f"prefix.{key}": value for key, value in snapshot.tensors().items()}
    write_given(path, pack(tensors, header))  # a voice is its speaker's


def _read(t3: Any, path: Path) -> tuple[str, Voice, PrefixSnapshot | None]:
    tensors, header = unpack(read_given(path))
    if (header.get("format"), header.get("version")) != (_FORMAT, VERSION):
        raise CorruptError(
            f"{path} is a {header.get('format')!r} of version {header.get('version')!r}, this reads version {VERSION} "
            f"of {_FORMAT!r}; export the voice again"
        )
    groups: dict[str, dict[str, Tensor]] = {"t3": {}, "gen": {}, "prefix": {}}
    for name, tensor in tensors.items():
        group, _, key = name.partition(".")
        groups.setdefault(group, {})[key] = tensor
    called, gen, prefix = header.get("name"), header.get("gen"), header.get("prefix")
    if not isinstance(called, str) or not isinstance(gen, dict) or not isinstance(prefix, dict | None):
        raise CorruptError(
            f"{path} does not name its voice and what belongs to it as a voice file does; export it again"
        )
    snapshot = None if prefix is None else PrefixSnapshot.from_tensors(groups["prefix"], prefix)
    names = {field.name for field in dataclasses.fields(cond_class(t3))}
    if not {"speaker_emb"} <= groups["t3"].keys() <= names:
        raise CorruptError(f"{path} has T3 conditionals {sorted(groups['t3'])}; expected some of {sorted(names)}")
    given = cond_class(t3)(**{"emotion_adv": None, **groups["t3"]})
    return called, Voice.of(t3, _Pair(given, {**gen, **groups["gen"]})), snapshot


def cond_class(t3: Any) -> Any:
    """Upstream's `T3Cond`, of the package that the model comes from."""
    return needed_beside(t3, "T3Cond")


def _kept(value: Any) -> Any:
    """A copy of a tensor on the CPU, outside inference mode; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    with torch.inference_mode(False):
        return value.detach().to("cpu", copy=True)


def _check(t3: Any, parts: dict[str, Any]) -> None:
    """Refuse conditionals that the model would stumble over, or read another voice from."""
    speaker, prompt, emotion = (parts[name] for name in ("speaker_emb", "cond_prompt_speech_tokens", "emotion_adv"))
    if parts.get("clap_emb") is not None:
        raise InputError("clap_emb is given, which no Chatterbox model has learned; leave it out")
    size = t3.hp.speaker_embed_size
    if not isinstance(speaker, Tensor) or not speaker.is_floating_point() or speaker.numel() != size:
        raise InputError(f"speaker_emb must be one embedding of {size} numbers, got {_shape(speaker)}")
    if prompt is not None:
        known, longest = t3.speech_emb.num_embeddings, _longest_prompt(t3)
        if not isinstance(prompt, Tensor) or prompt.is_floating_point() or prompt.dim() != 2 or prompt.shape[0] != 1:
            raise InputError(f"cond_prompt_speech_tokens must be token ids [1, tokens], got {_shape(prompt)}")
        if not 0 < prompt.shape[1] <= longest or not 0 <= int(prompt.min()) <= int(prompt.max()) < known:
            raise InputError(
                f"cond_prompt_speech_tokens must be 1 to {longest} ids below {known}, got {prompt.shape[1]} "
                f"from {prompt.min() if prompt.numel() else None} to {prompt.max() if prompt.numel() else None}"
            )
    numbers = {"speaker_emb": speaker, "emotion_adv": emotion}
    for name, value in numbers.items():
        if value is not None and not bool(torch.isfinite(torch.as_tensor(value)).all()):
            raise InputError(f"{name} is not finite: compute the voice again")
    if emotion is not None and torch.as_tensor(emotion).numel() != 1:
        raise InputError(f"emotion_adv must be one number, got {_shape(emotion)}")


def _reference(gen: Any) -> dict[str, Any]:
    """A copy of S3Gen's reference, without what the vocoder would stumble over or make noise of."""
    if not isinstance(gen, Mapping):
        raise InputError(f"gen={gen!r:.80} must be S3Gen's reference by name, or empty")
    kept = {name: _kept(value) for name, value in gen.items()}
    for name, value in kept.items():
        if isinstance(value, str | bytes | bool | list | tuple | Mapping):
            raise InputError(f"gen[{name!r}]={value!r:.80} must be a tensor, a number or None")
        if value is not None and not bool(torch.isfinite(torch.as_tensor(value)).all()):
            raise InputError(f"gen[{name!r}] is not finite: compute the voice again")
    return kept


def _longest_prompt(t3: Any) -> int:
    if t3.speech_pos_emb is not None:
        return int(t3.speech_pos_emb.emb.num_embeddings)
    return int(t3.tfmr.config.max_position_embeddings) - 1


def _shape(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
