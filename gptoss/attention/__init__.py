"""Part attention of the book: 6 names, loaded when first asked for

Generated from the front matter of book/attention/*.py; edit it, not this file.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptoss.attention.masks import visible as visible
    from gptoss.attention.rope import apply_rope as apply_rope
    from gptoss.attention.rope import rope_parameters as rope_parameters
    from gptoss.attention.rope import rope_tables as rope_tables
    from gptoss.attention.sinks import attention_concat as attention_concat
    from gptoss.attention.sinks import attention_flash as attention_flash

_HOME = {
    "apply_rope": "rope",
    "attention_concat": "sinks",
    "attention_flash": "sinks",
    "rope_parameters": "rope",
    "rope_tables": "rope",
    "visible": "masks",
}
_MODULES = (
    "scores",
    "rope",
    "sinks",
    "masks",
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
    "apply_rope",
    "attention_concat",
    "attention_flash",
    "rope_parameters",
    "rope_tables",
    "visible",
]
