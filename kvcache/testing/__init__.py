"""For tests of your own: that nothing leaks, that a layer or policy you wrote keeps the laws, and that steps can be recorded.

    from kvcache.testing import check_layer, check_policy, no_leaks, traced_graphs

The laws need hypothesis: ``pip install hypothesis``.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from kvcache.cache import LayerCache, SizePolicy
from kvcache.errors import MissingDependencyError
from kvcache.testing._leaks import no_leaks
from kvcache.testing._traces import traced, traced_graphs

__all__ = ["check_layer", "check_policy", "no_leaks", "traced", "traced_graphs"]


def check_policy(policy: SizePolicy, *, examples: int = 20) -> None:
    """Hold a policy of yours to its contract, and the layer that it gets to the laws.

    Its counts are tried far past its limit: within it nothing leaves, beyond it at most `limit` tokens stay and never fewer
    than are pinned and the current one; the same count always gives the same answer, and an equal policy too, as equal
    policies share their schedules. Then layers under it are compared with a plain list of tokens, in any chunking, through
    roll backs, changed rows and failed calls. Of a policy that ranks, what is compared is what holds whatever its scores:
    pinned and recent tokens stay, what has left does not come back, and what stays is what came.

    Args:
        policy: yours.
        examples: how many scenarios each law is tried on.

    Raises:
        AssertionError: with the law that is broken and the smallest scenario found in which it is.
        PolicyError: if no cache would take it.
        InputError: without hypothesis.
    """
    _checks_of_laws().check_policy(policy, examples)


def check_layer(
    make: Callable[..., LayerCache],
    policies: Mapping[str, SizePolicy] | Sequence[SizePolicy] | None = None,
    *,
    variants: Collection[str] = ("plain", "padded"),
    laws: Collection[str] | None = None,
    tolerance: float = 0.0,
    examples: int = 10,
) -> None:
    """Hold a layer of yours to the laws, beside a plain list of tokens.

    The laws: ``"any_chunking"`` (1), ``"truncate_then_append"`` and ``"reset_then_append"`` (2), ``"kept_is_named"`` (3),
    ``"failed_call_changes_nothing"`` (5), ``"rows_commute"`` (6), ``"bytes_are_told"`` (8).

    Args:
        make: called with a policy and the keyword arguments of `LayerCache`, and with `rotation` and, where it takes the
            memory at once, `static`; a class of layers, or a function that drops what
            yours does not take.
        policies: that it is tried under, each keeping the oldest tokens last; by default one of each kind that there is.
        variants: ``"plain"``, ``"padded"``: rows padded on the left, ``"rerotated"``: pinned keys turned.
        laws: which of them; by default all.
        tolerance: how far what is held may be from what came, for a layer in few bits. Above 0 its bytes are compared with
            what it holds, and not with `CacheSpec.nbytes`; it may refuse roll backs; and attention is not compared.
        examples: how many scenarios each law is tried on, under each policy and variant.

    Raises:
        AssertionError: with the law that is broken and the smallest scenario found in which it is.
        InputError: for an unknown law or variant, or without hypothesis.
    """
    _checks_of_laws().check_layer(make, policies, variants, laws, tolerance, examples)


def _checks_of_laws() -> Any:
    """The module that needs hypothesis."""
    try:
        from kvcache.testing import _checks as checks
    except ModuleNotFoundError as error:
        if error.name != "hypothesis":
            raise
        raise MissingDependencyError(
            "the laws search for scenarios with hypothesis; run: pip install hypothesis"
        ) from error
    return checks
