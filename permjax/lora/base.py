"""What the methods share."""

from typing import ClassVar


class Base:
    """A method that is compiled, needs no data, and whose result has the largest rank of its inputs."""

    on_host: ClassVar[bool] = False
    needs_inputs: ClassVar[bool] = False

    def natural_rank(self, ranks: tuple[int, ...]) -> int:
        """The largest rank of the adapters."""
        return max(ranks)
