"""The long description of the package: README.md with links that lead to the repository, as an index has no files beside it."""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

RELATIVE = re.compile(r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)\s]+)\)")


class LongDescription(MetadataHookInterface):
    """Makes the project's readme; hatchling finds the class by this file's name."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the readme, by the repository's address and the version, each of which is stated elsewhere."""
        repository, tag = metadata["urls"]["Repository"], f"v{metadata['version']}"
        readme = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": absolute(readme, repository, tag)}


def absolute(text: str, repository: str, tag: str) -> str:
    """Markdown whose links to files and images are to those of this tag in the repository."""

    def link(match: re.Match[str]) -> str:
        image, words, path = match.groups()
        return f"{image}[{words}]({repository}/{'raw' if image else 'blob'}/{tag}/{path})"

    return RELATIVE.sub(link, text)
