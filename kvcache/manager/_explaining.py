"""How a request would be decoded, said before it is."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Explanation:
    """How a request would be decoded, and why so. As text it is a sentence for each.

    Attributes:
        backend: what would run its steps on the decode engine; None: `generate` runs each token.
        reason: why that is not what was asked for; None if it is.
        once_a_step: processors of transformers that Python runs once a step, by their classes.
        once_a_chunk: stopping criteria that are asked once a chunk, by their classes.
    """

    backend: str | None
    reason: str | None = None
    once_a_step: tuple[str, ...] = ()
    once_a_chunk: tuple[str, ...] = ()

    def __str__(self) -> str:
        said = [
            "`generate` runs each token"
            if self.backend is None
            else f"the decode engine runs whole steps, {self.backend}"
        ]
        if self.reason is not None:
            said[0] += f", as {self.reason}"
        if self.once_a_step:
            said.append(f"{', '.join(self.once_a_step)}: by Python, once a step")
        if self.once_a_chunk:
            said.append(f"{', '.join(self.once_a_chunk)}: asked once a chunk")
        return "; ".join(said)
