"""Part cli of the book: 6 names, loaded when first asked for

Generated from the front matter of book/cli/*.py; edit it, not this file.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptoss.cli.commands import COMMANDS as COMMANDS
    from gptoss.cli.commands import main as main
    from gptoss.cli.mistakes import UsageError as UsageError
    from gptoss.cli.mistakes import printable as printable
    from gptoss.cli.terminal import TerminalSession as TerminalSession
    from gptoss.cli.terminal import converse as converse

_HOME = {
    "COMMANDS": "commands",
    "TerminalSession": "terminal",
    "UsageError": "mistakes",
    "converse": "terminal",
    "main": "commands",
    "printable": "mistakes",
}
_MODULES = (
    "mistakes",
    "options",
    "terminal",
    "tables",
    "commands",
)


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME, *_MODULES])


__all__ = [
    "COMMANDS",
    "TerminalSession",
    "UsageError",
    "converse",
    "main",
    "printable",
]
