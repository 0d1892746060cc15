"""`kvcache doctor`."""

from kvcache.cli.common import Json, Wanting


def command(as_json: Json = False) -> None:
    """Not there yet."""
    raise Wanting("kvcache doctor is not built yet")
