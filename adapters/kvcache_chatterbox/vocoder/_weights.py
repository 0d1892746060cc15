"""The weights that upstream distilled to two steps, which speak for every T3: where they are, and an S3Gen with them."""

import importlib
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from kvcache import InputError, MissingDependencyError
from kvcache.errors import said
from kvcache_chatterbox.units import FRAMES_PER_TOKEN, MELS, TOKENS_PER_SECOND
from kvcache_chatterbox.upstream import upstream_t3

REPOSITORY = "ResembleAI/chatterbox-turbo"
FILE = "s3gen_meanflow.safetensors"
_WAY = (
    f"fetch it once with `hf download {REPOSITORY} {FILE}`, or give VocoderOptions(weights=...) the file, its folder, or an "
    "S3Gen(meanflow=True)"
)


def distilled(weights: str | os.PathLike[str] | nn.Module, s3gen: Any) -> Any:
    """The S3Gen with distilled weights that `VocoderOptions.weights` names.

    Args:
        weights: see there.
        s3gen: the model's own, whose device it is for; it is taken itself if it has such weights.

    Raises:
        InputError: if they are not to be had, with the way to get them.
    """
    if isinstance(weights, nn.Module):
        return weights
    if bool(s3gen.meanflow) and weights == "meanflow":
        return s3gen
    return _load(_downloaded() if weights == "meanflow" else _file(Path(weights)), s3gen)


def _file(given: Path) -> Path:
    file = given / FILE if given.is_dir() else given
    if not file.is_file():
        raise InputError(f"weights={os.fspath(given)!r}: there is no {FILE} in this folder; {_WAY}")
    return file


def _downloaded() -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(REPOSITORY, FILE, etag_timeout=3))
    except Exception as error:  # the hub's errors have no common base
        raise InputError(
            f"weights='meanflow': {FILE} is not among the hub's files on this machine, and the hub did not give it "
            f"({type(error).__name__}); {_WAY}"
        ) from error


def _load(file: Path, s3gen: Any) -> Any:
    try:
        upstream = s3gen_module()
        made = upstream.S3Gen(meanflow=True)
        made.load_state_dict(load_file(file), strict=True)
    except (SafetensorError, RuntimeError, OSError) as error:
        first = (said(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{file} holds no weights of upstream's S3Gen(meanflow=True): {first}; {_WAY}") from error
    weight = s3gen.flow.input_embedding.weight
    return made.to(weight.device, weight.dtype).eval().requires_grad_(False)


def s3gen_of(folder: Path, *, meanflow: bool) -> Any:
    """The S3Gen whose weights lie in a folder of upstream's, on the CPU.

    Raises:
        InputError: if they do not, or are others.
    """
    name = FILE if meanflow else "s3gen.safetensors"
    if not (folder / name).is_file():
        raise InputError(f"{folder} has no {name}, the vocoder's weights; fetch them, or leave the vocoder out")
    try:
        made = s3gen_module().S3Gen(meanflow=meanflow)
        made.load_state_dict(load_file(folder / name), strict=meanflow)  # as upstream does
    except (SafetensorError, RuntimeError, OSError) as error:
        first = (said(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{folder / name} holds no weights of upstream's S3Gen: {first}; fetch them again") from error
    return made.eval().requires_grad_(False)


def made_up_reference(seconds: float = 10, seed: int = 0) -> dict[str, Any]:
    """A voice's reference, as upstream's `embed_ref` makes it of a clip, of random numbers."""
    generator, tokens = torch.Generator().manual_seed(seed), round(TOKENS_PER_SECOND * seconds)
    return {
        "prompt_token": torch.randint(0, 6561, (1, tokens), generator=generator),
        "prompt_token_len": torch.tensor([tokens]),
        "prompt_feat": torch.randn(1, FRAMES_PER_TOKEN * tokens, MELS, generator=generator),
        "prompt_feat_len": None,
        "embedding": torch.randn(1, 192, generator=generator),
    }


def s3gen_module() -> Any:
    """Upstream's module `chatterbox.models.s3gen`.

    Raises:
        MissingDependencyError: if what it imports is not installed, or does not load.
    """
    upstream_t3()
    try:
        return importlib.import_module("chatterbox.models.s3gen")
    except (ImportError, OSError) as error:
        raise MissingDependencyError(
            f"upstream's vocoder does not load ({said(error)}): install what docs/chatterbox.md says for audio, and look at "
            "`kvcache doctor`"
        ) from error


def random_s3gen(*, meanflow: bool, seed: int = 0) -> Any:
    """An S3Gen of upstream's class with random weights, which keep shapes and speed.

    Raises:
        MissingDependencyError: as `s3gen_module`.
    """
    module = s3gen_module()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return module.S3Gen(meanflow=meanflow).eval()
