"""Options of the example servers beyond those of all examples, checked before anything is loaded, too."""

import argparse
import os
import socket
from pathlib import Path

from example_options import REDIS_URLS, Parser, add_model, add_sound, check_device, check_model, check_sound, count

from kvcache.errors import said

LONGEST_NAME = 200  # characters of a voice's name
LARGEST_CHUNK = 1000  # speech tokens that a request may want at once; 25 are a second


def parser_of(description: str | None) -> Parser:
    """With the options that the servers share: which model, where it runs, where it listens."""
    parser = Parser(description)
    add_model(parser)
    parser.add_argument("--host", default="127.0.0.1", help="whom to listen to (default: this machine alone)")
    parser.add_argument("--port", type=count(0, 65535), default=8000)
    parser.add_argument("--max-rows", type=count(1), default=8, help="segments that decode together (default: 8)")
    add_sound(parser)
    return parser


def check_served(parser: Parser, options: argparse.Namespace) -> None:
    """End with a line if this model cannot be loaded, or not speak for many, or not so; see `check_sound`."""
    check_model(parser, options.variant, options.checkpoint)
    check_sound(parser, options)


def check_address(parser: Parser, host: str, port: int) -> socket.socket:
    """The socket to listen on; end with a line if there is none."""
    try:
        return listener(host, port)
    except (OSError, UnicodeError) as error:
        parser.error(f"--host {host} --port {port}: {said(error)}; give another")


def check_fleet(parser: Parser, options: argparse.Namespace) -> None:
    """End with a line if the fleet of ray_serve.py could not begin."""
    check_served(parser, options)
    if not options.made_up and not options.voices.is_dir():
        parser.error(f"--voices {options.voices}: is no folder; give one, or let --made-up write it")
    if options.made_up and options.voices.exists() and not options.voices.is_dir():
        parser.error(f"--voices {options.voices}: is a file; give a folder")
    if options.redis is not None and not options.redis.startswith(REDIS_URLS):
        parser.error("--redis: give a URL such as redis://localhost:6379/0")
    if options.address is None:
        check_device(parser, options.device)  # elsewhere it is the cluster's
        check_address(parser, options.host, options.port).close()


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
