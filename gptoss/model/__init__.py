"""Part model of the book: 9 names, loaded when first asked for

Generated from the front matter of book/model/*.py; edit it, not this file.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptoss.model.answers import load_answers as load_answers
    from gptoss.model.cache import Cache as Cache
    from gptoss.model.layers import Block as Block
    from gptoss.model.ops import define_operator as define_operator
    from gptoss.model.ops import mxfp4_linear as mxfp4_linear
    from gptoss.model.ops import packed_experts as packed_experts
    from gptoss.model.rows import CacheError as CacheError
    from gptoss.model.transformer import GptOss as GptOss
    from gptoss.model.transformer import ModelError as ModelError

_HOME = {
    "Block": "layers",
    "Cache": "cache",
    "CacheError": "rows",
    "GptOss": "transformer",
    "ModelError": "transformer",
    "define_operator": "ops",
    "load_answers": "answers",
    "mxfp4_linear": "ops",
    "packed_experts": "ops",
}
_MODULES = (
    "norm",
    "ops",
    "answers",
    "rows",
    "cache",
    "layers",
    "transformer",
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
    "Block",
    "Cache",
    "CacheError",
    "GptOss",
    "ModelError",
    "define_operator",
    "load_answers",
    "mxfp4_linear",
    "packed_experts",
]
