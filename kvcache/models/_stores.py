"""What code stores: the attributes that a class's methods assign, or change where they lie."""

import dis
import re
import types
from collections.abc import Iterable, Iterator

# What changes a container where it lies; tensors' own such methods end in "_".
_CHANGES = frozenset(
    ("append", "appendleft", "extend", "insert", "pop", "popleft", "popitem", "remove", "clear", "update", "setdefault", "add",
     "discard")
)  # fmt: skip
_INTO = {
    "STORE_SUBSCR": (3, 1),
    "STORE_SLICE": (4, 1),
    "DELETE_SUBSCR": (2, 0),
}  # how many they take, which is stored into
_FAST = re.compile("(STORE|LOAD)_FAST")


def stored_by(functions: Iterable[types.FunctionType]) -> set[str]:
    """The names of attributes that these functions store, or store into.

    As in ``self.x = y``, ``self.x[i] = y``, ``self.x.append(y)`` and ``self.x.copy_(y)``, also by way of a local variable.
    """
    return {name for function in functions for name in _stored(function.__code__)}


def _stored(code: types.CodeType) -> Iterator[str]:
    """Follows the stack from top to bottom of the code: of each value on it, which attribute it is, or is inside of."""
    stack: list[str | None] = []
    named: dict[str, str | None] = {}  # local variables

    def pop(many: int = 1) -> list[str | None]:
        missing = max(0, many - len(stack))
        taken = [None] * missing + stack[len(stack) - (many - missing) :]
        del stack[len(stack) - (many - missing) :]
        return taken

    for step in dis.get_instructions(code):
        name, arg = step.opname, step.arg or 0
        if name == "STORE_ATTR":
            pop(2)
            yield step.argval
        elif name in _INTO:
            many, at = _INTO[name]
            if (held := pop(many)[at]) is not None:
                yield held
        elif name in ("LOAD_ATTR", "LOAD_METHOD"):
            held = pop()[0]
            if held is not None and (step.argval in _CHANGES or (step.argval[-1] == "_" != step.argval[0])):
                yield held
            stack += [step.argval] + [None] * dis.stack_effect(step.opcode, step.arg)
        elif name in ("BINARY_SUBSCR", "BINARY_SLICE") or (name == "BINARY_OP" and step.argrepr == "[]"):
            stack.append(pop(3 if name == "BINARY_SLICE" else 2)[0])
        elif name in ("COPY", "DUP_TOP", "DUP_TOP_TWO"):
            _copy(stack, name, arg)
        elif name in ("SWAP", "ROT_TWO", "ROT_THREE", "ROT_FOUR"):
            _turn(stack, name, arg)
        elif ways := _FAST.findall(name):  # newer Pythons have steps for two variables
            for way, local in zip(ways, step.argval if isinstance(step.argval, tuple) else (step.argval,), strict=True):
                if way == "STORE":
                    named[local] = pop()[0]
                else:
                    stack.append(named.get(local))
        else:
            _other(stack, dis.stack_effect(step.opcode, step.arg, jump=False), name)
    for const in code.co_consts:  # functions inside
        if isinstance(const, types.CodeType):
            yield from _stored(const)
        elif isinstance(const, str) and "setattr" in code.co_names:
            yield const


def _copy(stack: list[str | None], name: str, arg: int) -> None:
    if name == "DUP_TOP_TWO":
        stack += [None, None, *stack][-2:]
    else:
        at = arg if name == "COPY" else 1
        stack.append(stack[-at] if len(stack) >= at else None)


def _turn(stack: list[str | None], name: str, arg: int) -> None:
    many = {"SWAP": arg, "ROT_TWO": 2, "ROT_THREE": 3, "ROT_FOUR": 4}[name]
    stack[:0] = [None] * max(0, many - len(stack))
    if name == "SWAP":
        stack[-many], stack[-1] = stack[-1], stack[-many]
    else:
        stack.insert(len(stack) - many, stack.pop())


def _other(stack: list[str | None], effect: int, name: str) -> None:
    """Any other step: what it leaves on top is of no attribute."""
    if effect < 0:
        del stack[max(0, len(stack) + effect) :]
    if (
        stack
        and effect <= 0
        and not name.startswith(("POP", "CACHE", "RESUME", "NOP", "PRECALL", "STORE", "JUMP", "KW"))
    ):
        stack[-1] = None
    stack += [None] * max(0, effect)
