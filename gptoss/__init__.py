"""The command line

Generated from book/B_cli.py; edit the chapter, not this file.
"""

from importlib import import_module
from typing import TYPE_CHECKING

# --- The package's front door ------------------------------------------------

if TYPE_CHECKING:
    from gptoss.chat.chat import Chat as Chat
    from gptoss.weights.config import GptOssConfig as GptOssConfig
    from gptoss.weights.errors import Error as Error
    from gptoss.text.tokenizer import Tokenizer as Tokenizer
    from gptoss.model.transformer import GptOss as GptOss

__version__ = "0.1.0"
_HOME = {"Chat": "chat", "Error": "errors", "GptOss": "model",
         "GptOssConfig": "config", "Tokenizer": "harmony"}
_MODULES = ("errors", "config", "mxfp4", "checkpoint", "rope", "sinks",
            "masks", "routing", "experts", "cache", "norm", "answers", "ops",
            "layers", "model", "harmony", "generate",
            "messages", "schema", "tools", "calculator", "memory",
            "settings", "agreement", "turn", "chat", "kernels", "compact",
            "triton_kernels", "decode_step",
            "stories", "lessons", "leaks", "exams", "train", "shards",
            "launch", "collectives", "split", "plan", "parity", "vectors",
            "mistakes", "options", "terminal", "tables", "commands")


def __getattr__(name: str) -> object:
    """`gptoss.GptOss`, `gptoss.mxfp4` ...: loaded when first asked for."""
    if name in _HOME:
        return getattr(import_module(f"gptoss.{_HOME[name]}"), name)
    if name in _MODULES:
        return import_module(f"gptoss.{name}")
    raise AttributeError(f"module 'gptoss' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME, *_MODULES])


__all__ = [
    "Chat",
    "Error",
    "GptOss",
    "GptOssConfig",
    "Tokenizer",
]
