"""`kvcache bench`."""

from kvcache.cli.common import Json, Wanting


def command(as_json: Json = False) -> None:
    """Not there yet."""
    raise Wanting("kvcache bench is not built yet")
