"""The command line

Generated from book/B_cli.py; edit the chapter, not this file.
"""

from importlib import import_module
from typing import TYPE_CHECKING

# --- The package's front door ------------------------------------------------

if TYPE_CHECKING:
    from gptoss.chat import Chat as Chat
    from gptoss.config import GptOssConfig as GptOssConfig
    from gptoss.harmony import Tokenizer as Tokenizer
    from gptoss.model import GptOss as GptOss

__version__ = "0.1.0"
_HOME = {"Chat": "chat", "GptOss": "model", "GptOssConfig": "config",
         "Tokenizer": "harmony"}
_MODULES = ("config", "mxfp4", "checkpoint", "rope", "sinks", "masks",
            "routing", "experts", "cache", "norm", "answers", "ops", "layers",
            "model", "harmony", "generate", "chat", "kernels", "compact",
            "triton_kernels", "decode_step", "stories", "lessons", "leaks",
            "exams", "train", "parallel", "plan", "parity", "vectors")


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
    "GptOss",
    "GptOssConfig",
    "Tokenizer",
]
