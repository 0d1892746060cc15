"""Options of the example servers, checked before anything is loaded: one clear line, and exit code 2."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch

from kvcache import KVCacheError
from kvcache.decoding import backend_on
from kvcache.errors import said
from kvcache_chatterbox.loading import WEIGHTS, upstream_t3

LONGEST_NAME = 200  # characters of a voice's name
CLASSES = {  # with the audio stack, by variant
    "english": ("chatterbox.tts", "ChatterboxTTS"),
    "multilingual": ("chatterbox.mtl_tts", "ChatterboxMultilingualTTS"),
    "turbo": ("chatterbox.tts_turbo", "ChatterboxTurboTTS"),
}


class Parser(argparse.ArgumentParser):
    """One that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def parser_of(description: str | None) -> Parser:
    """With the options that the servers share: which model, where it runs, where it listens."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--variant", choices=sorted(WEIGHTS), default="nano")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="a folder with the variant's weights")
    parser.add_argument("--host", default="127.0.0.1", help="whom to listen to (default: this machine alone)")
    parser.add_argument("--port", type=port, default=8000)
    parser.add_argument("--max-rows", type=count(1), default=8, help="segments that decode together (default: 8)")
    return parser


def check_model(parser: Parser, variant: str, checkpoint: Path | None, device: str) -> None:
    """End with a line if this model cannot be loaded there."""
    if variant == "multilingual":
        parser.error("--variant multilingual: it decodes one request at a time, and this serves many; take another")
    if checkpoint is not None and not any((checkpoint / name).is_file() for name in WEIGHTS[variant]):
        what = f"has no {' or '.join(WEIGHTS[variant])}" if checkpoint.is_dir() else "is no folder"
        parser.error(f"--checkpoint {checkpoint}: {what}; give the folder of the weights of {variant}")
    check_device(parser, device)
    try:
        upstream_t3()
    except KVCacheError as error:
        parser.error(said(error))


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


def port(text: str) -> int:
    """A port; 0 is any that is free."""
    return _whole(text, 0, 65535)


def count(least: int, most: int = 100_000) -> Callable[[str], int]:
    """A type of whole numbers."""

    def counted(text: str) -> int:
        return _whole(text, least, most)

    return counted


def voice_file(text: str) -> tuple[str, Path]:
    """NAME=FILE, of a file that is there."""
    name, _, file = text.partition("=")
    name = name.strip()
    if not name or not file:
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME=FILE, such as sarah=sarah.wav")
    if len(name) > LONGEST_NAME or not name.isprintable():
        raise argparse.ArgumentTypeError(f"the name {name[:50]!r} must be 1 to {LONGEST_NAME} printable characters")
    if not Path(file).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {file!r} for the voice {name!r}")
    return name, Path(file)


def _whole(text: str, least: int, most: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if not least <= number <= most:
        raise argparse.ArgumentTypeError(f"{text[:50]!r} is no whole number from {least} to {most}")
    return number
