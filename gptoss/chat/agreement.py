"""What happens in a turn?

Generated from book/chat/turns.py; edit the chapter, not this file.
"""

from collections.abc import Callable
from typing import Any

# --- Several processes, one decision -----------------------------------------

class SingleProcess:
    """The group of a process by itself; parallel/collectives has others."""

    first = True

    def same(self, make: Callable[[], Any]) -> Any:
        """make() of the first process, as JSON has it, for all."""
        return make()


class Stopped(Exception):
    """The first process goes no further with this turn."""


class Agreement:
    """What the processes of a model ask the first while a turn lasts."""

    def __init__(self, group: SingleProcess) -> None:
        self._group, self.open = group, True

    def ask(self, make: Callable[[], Any]) -> Any:
        """make() of the first process. What it raises ends the turn: that
        is raised there, and Stopped by the others."""
        failed: list[BaseException] = []

        def word() -> list:
            try:
                return [make()]
            except BaseException as error:
                failed.append(error)
                return []

        told = self._group.same(word)
        self.open = bool(told)
        if failed:
            raise failed[0]
        if not told:
            raise Stopped
        return told[0]

    def leave(self) -> None:
        """The first process leaves, and the others at their next question;
        they cannot leave first."""
        if self.open and self._group.first:
            self.open = False
            self._group.same(list)


__all__ = [
    "Agreement",
    "SingleProcess",
    "Stopped",
]
