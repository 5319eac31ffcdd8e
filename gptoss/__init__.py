"""The command line

Generated from book/cli/commands.py; edit the chapter, not this file.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

# --- What does `import gptoss` load? -----------------------------------------

if TYPE_CHECKING:
    from gptoss import chat as chat
    from gptoss import checkpoint as checkpoint
    from gptoss import harmony as harmony
    from gptoss import kernels as kernels
    from gptoss import mxfp4 as mxfp4
    from gptoss.chat.chat import Chat as Chat
    from gptoss.model.transformer import GptOss as GptOss
    from gptoss.text.tokenizer import Tokenizer as Tokenizer
    from gptoss.weights.config import GptOssConfig as GptOssConfig
    from gptoss.weights.errors import Error as Error

__version__ = "0.1.0"
_HOME = {"Chat": "chat.chat", "Error": "weights.errors",
         "GptOss": "model.transformer", "GptOssConfig": "weights.config",
         "Tokenizer": "text.tokenizer"}
_PARTS = ("weights", "attention", "moe", "model", "text", "kernels",
          "parallel", "chat", "training", "parity", "cli")
_SUBJECTS = {
    "mxfp4": ("weights.mxfp4", "weights.encoding", "model.ops"),
    "checkpoint": ("weights.layout", "weights.files", "weights.spellings",
                   "weights.checkpoint", "weights.write", "weights.convert",
                   "weights.hub"),
    "harmony": ("text.vocabulary", "text.tokenizer", "text.typescript",
                "text.harmony", "text.template", "text.parser")}


class _Subject(ModuleType):
    """Several modules under the name of what they are about."""

    def __getattr__(self, name: str) -> object:
        homes = _SUBJECTS[self.__name__.rpartition(".")[2]]
        for home in homes if not name.startswith("__") else ():
            module = import_module(f"gptoss.{home}")
            if hasattr(module, name):
                return getattr(module, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute "
                             f"{name!r}")


for _name in _SUBJECTS:
    sys.modules[f"gptoss.{_name}"] = _Subject(f"gptoss.{_name}")


def __getattr__(name: str) -> object:
    """`gptoss.GptOss`, `gptoss.mxfp4` ...: loaded when first asked for."""
    if name in _HOME:
        return getattr(import_module(f"gptoss.{_HOME[name]}"), name)
    if name in _PARTS or name in _SUBJECTS:
        return import_module(f"gptoss.{name}")
    raise AttributeError(f"module 'gptoss' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME, *_PARTS, *_SUBJECTS])


__all__ = [
    "Chat",
    "Error",
    "GptOss",
    "GptOssConfig",
    "Tokenizer",
    "chat",
    "checkpoint",
    "harmony",
    "kernels",
    "mxfp4",
]
