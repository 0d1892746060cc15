"""`kvcache doctor`: what works on this machine, and why something does not."""

from dataclasses import asdict
from typing import Annotated

import typer
from rich.text import Text

from kvcache.cli._common import CheckFailed, Json, display, print_json, progress, table
from kvcache.cli._prefixes import Namespace, SecretFile, Where, read_secret
from kvcache.installed import mend_torchaudio

_COLOURS = {"ok": "green", "note": "yellow", "missing": "dim", "broken": "red"}


def command(
    store: Where = None,
    namespace: Namespace = None,
    secret_file: SecretFile = None,
    compiling: Annotated[
        bool, typer.Option("--compile", help="Also compile a decode step, which takes up to minutes.")
    ] = False,
    mend: Annotated[
        bool, typer.Option("--mend", help="Before, remove torchaudio's compiled part if it does not load.")
    ] = False,
    as_json: Json = False,
) -> None:
    """What works here and why something does not: packages, devices, precisions, back ends, stores.

    Exit code 1 if something that is needed is broken. What is merely missing is no failure.
    """
    if mend:
        _mend()
    from kvcache.tools import diagnose, healthy  # not when another command's options are read: it imports a lot

    with progress().status("looking"):
        found = diagnose(store, secret=read_secret(secret_file), namespace=namespace, compiling=compiling)
    if as_json:
        print_json({"healthy": healthy(found), "findings": [asdict(finding) for finding in found]})
    else:
        for section in dict.fromkeys(finding.section for finding in found):
            shown = table(section, "", "", "what was found", "what to do", right=9)
            for finding in (finding for finding in found if finding.section == section):
                state = Text(finding.state, style=_COLOURS[finding.state])
                shown.add_row(state, finding.name, finding.said, finding.advice or "")
            display(shown)
    if not healthy(found):
        broken = ", ".join(finding.name for finding in found if finding.state == "broken")
        raise CheckFailed(f"broken: {broken}; what to do stands beside each")


def _mend() -> None:
    try:
        removed = mend_torchaudio()
    except OSError as error:
        raise CheckFailed(f"torchaudio could not be mended: {error}; reinstall it, see pytorch.org") from error
    for file in removed:
        progress().print(f"removed {file}")
