"""What upstream's `generate` does where it is given nothing: read from its signature, so that it follows the installed version.

`T3.inference`, which `generate` calls, has defaults of its own: the two differ by variant and by release.
"""

import ast
import inspect
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from kvcache import InputError
from kvcache_chatterbox.speech._sampling import OPTIONS
from kvcache_chatterbox.upstream import needed_beside

_SOURCES = {"gpt": "tts_turbo.py", "multilingual": "mtl_tts.py", "english": "tts.py"}
_READ = (*OPTIONS, "exaggeration")


def generate_defaults(tts: Any) -> Mapping[str, float]:
    """The defaults of a model's `generate`, of those settings that an engine knows, by name.

    A stand-in has no `generate`: it has those of the installed class of its variant.

    Args:
        tts: a `ChatterboxTTS` of any variant, or what stands in for one.
    """
    own = [vars(kind)["generate"] for kind in reversed(type(tts).__mro__) if "generate" in vars(kind)]
    given: dict[str, Any] = {}
    for generate in own:  # one that hands ``**options`` on to the class it derives from has that one's defaults
        given |= {name: value for name, value in _in_signature(generate).items() if isinstance(value, int | float)}
    given = given or dict(_in_source(tts.t3))
    return {name: value for name, value in given.items() if name in _READ and isinstance(value, int | float)}


def most_tokens(t3: Any) -> int:
    """Speech tokens at which upstream's `generate` stops: 1000, and one more where the first is drawn before they are counted."""
    if not t3.is_gpt:
        return 1000  # in the body of `generate`
    return int(inspect.signature(type(t3).inference_turbo).parameters["max_gen_len"].default) + 1


def _in_signature(generate: Any) -> Mapping[str, Any]:
    return {name: one.default for name, one in inspect.signature(generate).parameters.items()}


def _in_source(t3: Any) -> Mapping[str, Any]:
    kind = "gpt" if t3.is_gpt else "multilingual" if t3.hp.is_multilingual else "english"
    package = sys.modules[needed_beside(t3, "T3Cond").__module__.partition(".")[0]]
    return _of_file(Path(next(iter(package.__path__))) / _SOURCES[kind])


@cache
def _of_file(source: Path) -> Mapping[str, Any]:
    """The defaults of the method `generate` in a file, which is not imported: it would bring the audio stack along.

    Raises:
        InputError: if there is none.
    """
    for node in ast.walk(ast.parse(source.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name == "generate":
            names = [argument.arg for argument in node.args.args]
            names = names[len(names) - len(node.args.defaults) :]
            named = zip(names, node.args.defaults, strict=True)
            return {name: value.value for name, value in named if isinstance(value, ast.Constant)}
    raise InputError(f"{source} has no generate() with defaults; give temperature, top_p and the like yourself")
