"""Options of the examples, checked before anything is loaded: one clear line, and exit code 2."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch

from kvcache import KVCacheError
from kvcache.decoding import backend_on
from kvcache.errors import said
from kvcache_chatterbox import VocoderOptions
from kvcache_chatterbox.audio import chunking_of
from kvcache_chatterbox.loading import WEIGHTS
from kvcache_chatterbox.upstream import upstream_t3

CLASSES = {  # with the audio stack, by variant
    "english": ("chatterbox.tts", "ChatterboxTTS"),
    "multilingual": ("chatterbox.mtl_tts", "ChatterboxMultilingualTTS"),
    "turbo": ("chatterbox.tts_turbo", "ChatterboxTurboTTS"),
}
LARGEST_SEED = 2**63 - 1
REDIS_URLS = ("redis://", "rediss://", "unix://")


class Parser(argparse.ArgumentParser):
    """One that says what is wrong in one line."""

    def __init__(self, description: str | None) -> None:
        kind = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=kind, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def add_model(parser: Parser) -> None:
    """The options that say which Chatterbox model; see `check_model`."""
    parser.add_argument("--variant", choices=sorted(WEIGHTS), default="nano")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="a folder with the variant's weights")


def check_model(parser: Parser, variant: str, checkpoint: Path | None) -> None:
    """End with a line if this model cannot be loaded."""
    if checkpoint is not None and not any((checkpoint / name).is_file() for name in WEIGHTS[variant]):
        what = f"has no {' or '.join(WEIGHTS[variant])}" if checkpoint.is_dir() else "is no folder"
        parser.error(f"--checkpoint {checkpoint}: {what}; give the folder of the weights of {variant}")
    try:
        upstream_t3()
    except KVCacheError as error:
        parser.error(said(error))


def add_sound(parser: Parser) -> None:
    """The options that say how speech tokens become audio; see `check_sound`."""
    group = parser.add_argument_group("audio")
    group.add_argument(
        "--chunking", choices=("auto", "fixed"), default="auto",
        help="how much audio comes at once: as much as what there is to play allows, or always as much (default: auto)",
    )  # fmt: skip
    group.add_argument(
        "--first-chunk", type=count(1, 1000), metavar="N", help="speech tokens of the first chunk, 25 are a second"
    )
    group.add_argument(
        "--max-chunk", type=count(1, 1000), metavar="N", help="speech tokens of a chunk at most, with auto"
    )
    group.add_argument(
        "--vocoder", default="own", metavar="WEIGHTS",
        help="own, or meanflow, Turbo's distilled ones, or where those are: another sound, in less time (default: own)",
    )  # fmt: skip
    group.add_argument("--steps", type=count(1, 1000), metavar="N", help="of the flow; fewer change the sound")
    group.add_argument(
        "--reference-seconds",
        type=number(1),
        metavar="S",
        help="of the voice that the flow hears; fewer change the sound",
    )
    group.add_argument(
        "--vocoder-precision", choices=("bf16", "fp16", "int8"), help="of the vocoder (default: as loaded)"
    )


def check_sound(parser: Parser, options: argparse.Namespace) -> None:
    """End with a line if audio cannot be made so. Puts what a request is given into ``options.chunks``, and the engine's
    settings into ``options.vocoder``, None if they are as upstream has them."""
    options.chunks = {"chunking": options.chunking, "first_chunk": options.first_chunk, "max_chunk": options.max_chunk}
    try:
        chunking_of(**options.chunks)
        vocoder = VocoderOptions(
            weights=options.vocoder,
            steps=options.steps,
            reference_seconds=options.reference_seconds,
            precision=options.vocoder_precision,
        )
    except KVCacheError as error:
        parser.error(said(error))
    options.vocoder = None if vocoder == VocoderOptions() else vocoder


def check_device(parser: Parser, name: str) -> None:
    """End with a line if there is no such device."""
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = (said(error).splitlines() or ["not here"])[0]
        parser.error(f"--device {name}: {first[:200]}; cpu is always there")


def check_backend(parser: Parser, name: str, device: str) -> None:
    """End with a line if this does not decode on the device."""
    try:
        backend_on(name, torch.device(device))
    except KVCacheError as error:
        parser.error(f"--backend {name}: {said(error)}")


def count(least: int, most: int = 100_000) -> Callable[[str], int]:
    """A type of whole numbers."""

    def counted(text: str) -> int:
        return _whole(text, least, most)

    return counted


def number(least: float, above: bool = False) -> Callable[[str], float]:
    """A type of finite numbers of at least `least`, or `above` it."""

    def numbered(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < least or (above and value == least):
            wanted = f"above {least:g}" if above else f"of at least {least:g}"
            raise argparse.ArgumentTypeError(f"{text[:50]!r} is no number {wanted}")
        return value

    return numbered


def words(text: str) -> str:
    """A text with something in it."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the text is empty")
    return text


def old_file(text: str) -> Path:
    """A file that is there."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text[:200]!r}")
    return Path(text)


def text_file(text: str) -> str:
    """What a file of text says."""
    try:
        return words(old_file(text).read_text("utf-8"))
    except (OSError, UnicodeError) as error:
        raise argparse.ArgumentTypeError(f"{text[:200]!r} is no text in UTF-8: {said(error)}") from error


def new_file(text: str) -> Path:
    """A file that can be written, as its folder is there."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else "is in no folder that there is"
        raise argparse.ArgumentTypeError(f"{text[:200]!r} {what}; give the name of a file to write")
    return path


def _whole(text: str, least: int, most: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if not least <= number <= most:
        raise argparse.ArgumentTypeError(f"{text[:50]!r} is no whole number from {least} to {most}")
    return number
