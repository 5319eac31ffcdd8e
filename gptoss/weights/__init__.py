"""Part weights of the book: 0 names, loaded when first asked for

Generated from the front matter of book/weights/*.py; edit it, not this file.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass

_HOME = {

}
_MODULES = (
    "errors",
    "config",
    "config_file",
    "sizes",
    "mxfp4",
    "encoding",
    "layout",
    "files",
    "checkpoint",
    "write",
    "convert",
    "hub",
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

]
