"""Part moe of the book: 3 names, loaded when first asked for

Generated from the front matter of book/moe/*.py; edit it, not this file.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptoss.moe.experts import clamped_swiglu as clamped_swiglu
    from gptoss.moe.experts import experts_grouped as experts_grouped
    from gptoss.moe.routing import route as route

_HOME = {
    "clamped_swiglu": "experts",
    "experts_grouped": "experts",
    "route": "routing",
}
_MODULES = (
    "routing",
    "experts",
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
    "clamped_swiglu",
    "experts_grouped",
    "route",
]
