"""Inside of the commands: how they read and write figures, and where they can be interrupted."""

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

from kvcache.cli._common import bytes_of, print_json, shown_bytes
from kvcache.cli._plan import _room as shown_room

__all__ = ["bytes_of", "print_json", "shown_bytes", "shown_room"]

PLAN = "kvcache.cli._plan.plan"
DESCRIBE = "kvcache.cli._prefixes.describe"
UNPACK = "kvcache.cli._prefixes.unpack"
