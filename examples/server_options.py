"""Options of the example servers, checked before anything is loaded: one clear line, and exit code 2."""

import argparse
import os
import socket
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


def check_model(parser: Parser, variant: str, checkpoint: Path | None) -> None:
    """End with a line if this model cannot be loaded."""
    if variant == "multilingual":
        parser.error("--variant multilingual: it decodes one request at a time, and this serves many; take another")
    if checkpoint is not None and not any((checkpoint / name).is_file() for name in WEIGHTS[variant]):
        what = f"has no {' or '.join(WEIGHTS[variant])}" if checkpoint.is_dir() else "is no folder"
        parser.error(f"--checkpoint {checkpoint}: {what}; give the folder of the weights of {variant}")
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


def check_address(parser: Parser, host: str, port: int) -> socket.socket:
    """The socket to listen on; end with a line if there is none."""
    try:
        return listener(host, port)
    except (OSError, UnicodeError) as error:
        parser.error(f"--host {host} --port {port}: {said(error)}; give another")


def check_fleet(parser: Parser, options: argparse.Namespace) -> None:
    """End with a line if the fleet of ray_serve.py could not begin."""
    check_model(parser, options.variant, options.checkpoint)
    if not options.made_up and not options.voices.is_dir():
        parser.error(f"--voices {options.voices}: is no folder; give one, or let --made-up write it")
    if options.made_up and options.voices.exists() and not options.voices.is_dir():
        parser.error(f"--voices {options.voices}: is a file; give a folder")
    if options.redis is not None and not options.redis.startswith(("redis://", "rediss://", "unix://")):
        parser.error("--redis: give a URL such as redis://localhost:6379/0")
    if options.address is None:
        check_device(parser, options.device)  # elsewhere it is the cluster's
        check_address(parser, options.host, options.port).close()


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


# ---------------------------------------------------------------------- what the system gives


def allow_files(needed: int) -> int:
    """Let this process open so many files, if the system allows it.

    Returns:
        How many it may open; `needed` where the system counts none.
    """
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return needed
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if soft != unlimited and soft < needed and (hard == unlimited or soft < hard):
        soft = needed if hard == unlimited else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return needed if soft == unlimited else soft


def listener(host: str, port: int) -> socket.socket:
    """A socket of this address, of which clients hear nothing before a server uses it.

    Raises:
        OSError: if there is no such address, or the port is taken.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)  # of both, as most expect
    bound = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # elsewhere it would let two servers have one port
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except BaseException:
        bound.close()
        raise
    return bound
