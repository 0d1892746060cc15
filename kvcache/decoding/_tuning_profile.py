"""`TuningProfile`: what `kvcache tune` found for a model on a machine, as checked JSON that engines and managers load."""

import json
import logging
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from kvcache.cache import KVQuantization
from kvcache.decoding._backends import BackendName, check_bucket
from kvcache.decoding._setting import Setting, VocoderSetting
from kvcache.errors import CorruptError, InputError, said
from kvcache.io import write_given
from kvcache.models import Precision, model_fingerprint, model_outline

Goal = Literal["latency", "throughput"]

_FORMAT = "kvcache-tuning"
_LARGEST = 2**24  # bytes of a file that is read at all
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_APART = {"policy", "vocoder"}  # of a setting, what is not written with it
_AGAIN = "tune again with kvcache tune"
_log = logging.getLogger("kvcache")


@dataclass(frozen=True)
class Trial:
    """A setting that was looked at.

    Attributes:
        setting: which.
        milliseconds: per token of all requests together, the median of `chunks` chunks; None if it was refused.
        chunks: that were measured.
        divergence: KL(fp32 || this) in nats per token; None where it was not judged.
        refused: why it cannot be chosen; None if it can.
    """

    setting: Setting
    milliseconds: float | None = None
    chunks: int = 0
    divergence: float | None = None
    refused: str | None = None


@dataclass(frozen=True)
class VocoderTrial:
    """A way to run the vocoder that was looked at.

    Attributes:
        setting: which.
        milliseconds: per token; None if it was refused.
        refused: why it cannot be chosen; None if it can.
    """

    setting: VocoderSetting
    milliseconds: float | None = None
    refused: str | None = None


@dataclass(frozen=True)
class TuningProfile:
    """The setting that was found best, and what that rests on.

    Attributes:
        name: of the model, as it was given.
        model: its fingerprint, see `kvcache.model_fingerprint`.
        goal: ``"latency"``, milliseconds of a token of one request; ``"throughput"``, tokens of all requests.
        context: tokens of each request before those that were timed.
        bound: of the divergence, in nats per token.
        machine, versions: where it was measured, and with what.
        setting: the best.
        trials: all settings that were looked at.
        explanation: of the choice, a line for each axis.
        outline: of the model, see `kvcache.models.model_outline`; "" where it is not known.
        random: whether its weights were random, of which a divergence tells nothing.
        vocoder: how what makes audio of the tokens runs; None where that was not asked for.
        vocoder_trials: the ways to run it that were looked at.
    """

    name: str
    model: str
    goal: Goal
    context: int
    bound: float
    machine: Mapping[str, str | int]
    versions: Mapping[str, str]
    setting: Setting
    trials: tuple[Trial, ...]
    explanation: tuple[str, ...]
    outline: str = ""
    random: bool = False
    vocoder: VocoderSetting | None = None
    vocoder_trials: tuple[VocoderTrial, ...] = ()

    def save(self, path: Path | str) -> None:
        """Write it as JSON; a file that is there is replaced at once or not at all.

        Raises:
            InputError: if a folder, a device or the like is there.
        """
        write_given(path, f"{json.dumps(self.to_dict(), indent=1)}\n".encode(), private=False)

    def to_dict(self) -> dict[str, Any]:
        """The profile as plain values, as its file has them."""
        trials = [{**vars(trial), "setting": setting_to_dict(trial.setting)} for trial in self.trials]
        plain = {
            **vars(self),
            "machine": dict(self.machine),
            "versions": dict(self.versions),
            "setting": setting_to_dict(self.setting),
            "trials": trials,
            "explanation": list(self.explanation),
            "vocoder": None if self.vocoder is None else dict(vars(self.vocoder)),
            "vocoder_trials": [{**vars(one), "setting": dict(vars(one.setting))} for one in self.vocoder_trials],
        }
        return {"format": _FORMAT, "version": 1, **plain}

    @classmethod
    def load(cls, path: Path | str, model: nn.Module | None = None) -> "TuningProfile":
        """Read it, checked field by field.

        A profile of another machine is taken, with a warning in the log. So is one of other weights in a model that is the
        same otherwise: it is as fast, but its fidelity was judged on those weights.

        Args:
            model: that it must be of.

        Raises:
            InputError: if there is no such file, or it is another model's.
            CorruptError: if that is no profile.
        """
        path = Path(path)
        try:
            if path.stat().st_size > _LARGEST:
                raise CorruptError(f"{path} has {path.stat().st_size} bytes, which no tuning profile has; {_AGAIN}")
            text = path.read_bytes().decode()
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}; make a profile with kvcache tune") from error
        except UnicodeDecodeError as error:
            raise CorruptError(f"{path} is no tuning profile: it is no text; {_AGAIN}") from error
        try:
            profile = _profile(json.loads(text))
        except (ValueError, TypeError, KeyError, ArithmeticError, RecursionError) as error:
            raise CorruptError(f"{path} is no tuning profile: {said(error)}; {_AGAIN}") from error
        if model is not None:
            profile._check(path, model)
        return profile

    @property
    def arguments(self) -> dict[str, Any]:
        """The setting as arguments by name, for `KVCacheManager` and for an adapter's engine.

        The precision is no argument of `KVCacheManager`; an engine makes its own options of how the vocoder runs.
        """
        one = self.setting
        named = {
            "backend": one.backend,
            "precision": one.precision,
            "kv_dtype": one.kv_dtype,
            "bucket": one.bucket,
            "storage": None if one.quantization is None else KVQuantization(one.quantization),
            "max_cache_length": one.max_length,
            "vocoder": self.vocoder,
        }
        return {name: value for name, value in named.items() if value is not None}

    def _check(self, path: Path, model: nn.Module) -> None:
        if self.model != model_fingerprint(model) and self.outline == model_outline(model):
            _log.warning(
                "%s was measured on %s weights (%s): as fast here, but how far it moves what the model says was judged on those; "
                "kvcache tune judges it on these",
                path,
                "random" if self.random else "other",
                self.name,
            )
        elif self.model != model_fingerprint(model):
            here, then = versions()["transformers"], self.versions["transformers"]
            other = (
                "another model" if here == then else f"another model, or this one under transformers {then}, not {here}"
            )
            raise InputError(f"{path} was measured on {other} ({self.name}); tune this one with kvcache tune")
        here_is = machine(next(model.parameters()).device)
        if different := [name for name in here_is if here_is[name] != self.machine[name]]:
            said = ", ".join(f"{name} {self.machine[name]}, not {here_is[name]}" for name in different)
            _log.warning(
                "%s was measured elsewhere (%s): another setting may be faster here; kvcache tune finds it", path, said
            )


def machine(device: torch.device) -> dict[str, str | int]:
    """What decides how fast a setting is here."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "cpu": cpu, "cores": os.cpu_count() or 1, "threads": torch.get_num_threads()}


def versions() -> dict[str, str]:
    """Python and the packages whose speed is in a measurement."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("transformers", "kvcache"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def dtype_name(dtype: torch.dtype | None) -> str | None:
    """``"fp32"`` and the like, as in a file."""
    return next((name for name, one in _DTYPES.items() if one == dtype), None)


def setting_to_dict(setting: Setting) -> dict[str, Any]:
    """A setting as plain values; tuning knows no policies."""
    plain = {name: value for name, value in vars(setting).items() if name not in _APART}
    return {**plain, "kv_dtype": dtype_name(setting.kv_dtype)}


# ---------------------------------------------------------------------- reading what nobody vouches for


def _profile(content: Any) -> TuningProfile:
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError("it has not the format kvcache-tuning")
    if type(content.get("version")) is not int or content["version"] != 1:
        raise ValueError(f"it has version {content.get('version')!r}, this kvcache reads version 1")
    content = {
        "outline": "",
        "random": False,
        "vocoder": None,
        "vocoder_trials": [],
        **content,
    }  # which the first profiles had not
    _names(content, {"format", "version", *TuningProfile.__dataclass_fields__}, "the profile")
    model, outline = _text(content, "model"), _text(content, "outline")
    for name, digest in (("model", model), ("outline", outline or model)):
        if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
            raise ValueError(f"{name} is {digest[:80]!r}, and no fingerprint")
    if not isinstance(content["random"], bool):
        raise TypeError(f"random is {str(content['random'])[:80]!r}, and neither true nor false")
    where, made_with = content["machine"], content["versions"]
    _names(where, {"device", "cpu", "cores", "threads"}, "machine")
    _names(made_with, {"python", "torch", "transformers", "kvcache"}, "versions")
    goal = _one_of(content, "goal", get_args(Goal))
    trials = tuple(_trial(one) for one in _list(content, "trials"))
    setting = _setting(content["setting"])
    if not any(trial.setting == setting and trial.refused is None for trial in trials):
        raise ValueError("its setting is not among the trials that were not refused")
    spoken = tuple(_vocoder_trial(one) for one in _list(content, "vocoder_trials"))
    vocoder = None if content["vocoder"] is None else _vocoder(content["vocoder"])
    if vocoder is not None and not any(one.setting == vocoder and one.refused is None for one in spoken):
        raise ValueError("its vocoder is not among the trials that were not refused")
    explanation = _list(content, "explanation")
    if not all(isinstance(line, str) for line in explanation):
        raise TypeError("explanation has what is no text")
    return TuningProfile(
        name=_text(content, "name"),
        model=model,
        goal=goal,  # type: ignore[arg-type]
        context=_count(content, "context"),
        bound=_number(content, "bound"),
        machine={
            **{name: _text(where, name) for name in ("device", "cpu")},
            **{name: _count(where, name) for name in ("cores", "threads")},
        },
        versions={name: _text(made_with, name) for name in made_with},
        setting=setting,
        trials=trials,
        explanation=tuple(explanation),
        outline=outline,
        random=content["random"],
        vocoder=vocoder,
        vocoder_trials=spoken,
    )


def _trial(content: Any) -> Trial:
    _names(content, set(Trial.__dataclass_fields__), "a trial")
    refused = None if content["refused"] is None else _text(content, "refused")
    milliseconds = None if content["milliseconds"] is None else _number(content, "milliseconds")
    if (milliseconds is None) != (refused is not None):
        raise ValueError("a trial is either measured or refused")
    if milliseconds == 0:
        raise ValueError("milliseconds is 0")
    return Trial(
        _setting(content["setting"]),
        milliseconds,
        _count(content, "chunks", least=0),
        None if content["divergence"] is None else _number(content, "divergence"),
        refused,
    )


def _setting(content: Any) -> Setting:
    _names(content, set(Setting.__dataclass_fields__) - _APART, "a setting")
    setting = Setting(
        backend=_one_of(content, "backend", ("off", *get_args(BackendName))),  # type: ignore[arg-type]
        precision=_one_of(content, "precision", (None, *get_args(Precision))),  # type: ignore[arg-type]
        kv_dtype=None if content["kv_dtype"] is None else _DTYPES[str(_one_of(content, "kv_dtype", tuple(_DTYPES)))],
        requests=_count(content, "requests"),
    )
    if (bits := content["quantization"]) is not None:
        KVQuantization(bits)
        setting = replace(setting, quantization=bits)
    if content["max_length"] is not None:
        setting = replace(setting, max_length=_count(content, "max_length"))
    if (bucket := content["bucket"]) is not None:
        check_bucket(bucket)
        setting = replace(setting, bucket=bucket)
    return setting


def _vocoder_trial(content: Any) -> VocoderTrial:
    _names(content, set(VocoderTrial.__dataclass_fields__), "a trial of the vocoder")
    refused = None if content["refused"] is None else _text(content, "refused")
    milliseconds = None if content["milliseconds"] is None else _number(content, "milliseconds")
    if (milliseconds is None) != (refused is not None):
        raise ValueError("a trial is either measured or refused")
    return VocoderTrial(_vocoder(content["setting"]), milliseconds, refused)


def _vocoder(content: Any) -> VocoderSetting:
    _names(content, set(VocoderSetting.__dataclass_fields__), "the vocoder")
    if not isinstance(content["compiled"], bool):
        raise TypeError(f"compiled is {str(content['compiled'])[:80]!r}, and neither true nor false")
    return VocoderSetting(
        _text(content, "weights"),
        _one_of(content, "precision", (None, *get_args(Precision))),  # type: ignore[arg-type]
        content["compiled"],
        None if content["reference_seconds"] is None else _number(content, "reference_seconds"),
        None if content["max_chunk"] is None else _count(content, "max_chunk"),
    )


def _names(content: Any, known: set[str], what: str) -> None:
    if not isinstance(content, dict):
        raise TypeError(f"{what} is no object")
    if missing := known - set(content):
        raise ValueError(f"{what} lacks {', '.join(sorted(missing))}")
    if unknown := set(content) - known:
        raise ValueError(f"{what} has unknown {', '.join(sorted(unknown))[:80]}")


def _text(content: dict[str, Any], name: str) -> str:
    value = content[name]
    if not isinstance(value, str):
        raise TypeError(f"{name} is {str(value)[:80]!r}, and no text")
    return value


def _count(content: dict[str, Any], name: str, least: int = 1) -> int:
    value = content[name]
    if type(value) is not int or not least <= value < 2**31:
        raise ValueError(f"{name} is {str(value)[:80]!r}, and no whole number of at least {least}")
    return value


def _number(content: dict[str, Any], name: str) -> float:
    value = content[name]
    if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} is {str(value)[:80]!r}, and no number of at least 0")
    return float(value)


def _one_of(content: dict[str, Any], name: str, known: tuple[str | None, ...]) -> str | None:
    value = content[name]
    if not (value is None or isinstance(value, str)) or value not in known:
        raise ValueError(f"{name} is {str(value)[:80]!r}, and none of {', '.join(map(str, known))}")
    return value


def _list(content: dict[str, Any], name: str) -> list[Any]:
    value = content[name]
    if not isinstance(value, list):
        raise TypeError(f"{name} is no list")
    return value
