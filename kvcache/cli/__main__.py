"""``python -m kvcache.cli``, and the script `kvcache`."""

import os
import sys

from kvcache.cli import main


def run() -> None:
    """What the script `kvcache` calls."""
    if sys.stdout is None:  # closed by whoever started it
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    code = main()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (
            OSError,
            ValueError,
        ):  # has been said; what is left in it would be tried again at exit, and end in a traceback
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


if __name__ == "__main__":
    run()
