"""``python -m kvcache.cli``, and the script `kvcache`."""

import sys

from kvcache.cli import main


def run() -> None:
    """What the script `kvcache` calls."""
    sys.exit(main())


if __name__ == "__main__":
    run()
