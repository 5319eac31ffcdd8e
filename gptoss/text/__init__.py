"""Part text of the book: 21 names, loaded when first asked for

Generated from the front matter of book/text/*.py; edit it, not this file.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptoss.text.harmony import Message as Message
    from gptoss.text.harmony import developer_message as developer_message
    from gptoss.text.harmony import render as render
    from gptoss.text.harmony import render_message as render_message
    from gptoss.text.harmony import render_training as render_training
    from gptoss.text.harmony import system_message as system_message
    from gptoss.text.parser import Delta as Delta
    from gptoss.text.parser import Done as Done
    from gptoss.text.parser import Event as Event
    from gptoss.text.parser import Malformed as Malformed
    from gptoss.text.parser import Opened as Opened
    from gptoss.text.parser import StreamParser as StreamParser
    from gptoss.text.parser import ToolCall as ToolCall
    from gptoss.text.parser import parse as parse
    from gptoss.text.template import chat_prompt as chat_prompt
    from gptoss.text.tokenizer import Tokenizer as Tokenizer
    from gptoss.text.typescript import Tool as Tool
    from gptoss.text.vocabulary import HarmonyError as HarmonyError
    from gptoss.text.vocabulary import merge_by_rank as merge_by_rank
    from gptoss.text.vocabulary import merges_from_ranks as merges_from_ranks
    from gptoss.text.vocabulary import tokenizer_json as tokenizer_json

_HOME = {
    "Delta": "parser",
    "Done": "parser",
    "Event": "parser",
    "HarmonyError": "vocabulary",
    "Malformed": "parser",
    "Message": "harmony",
    "Opened": "parser",
    "StreamParser": "parser",
    "Tokenizer": "tokenizer",
    "Tool": "typescript",
    "ToolCall": "parser",
    "chat_prompt": "template",
    "developer_message": "harmony",
    "merge_by_rank": "vocabulary",
    "merges_from_ranks": "vocabulary",
    "parse": "parser",
    "render": "harmony",
    "render_message": "harmony",
    "render_training": "harmony",
    "system_message": "harmony",
    "tokenizer_json": "vocabulary",
}
_MODULES = (
    "vocabulary",
    "tokenizer",
    "typescript",
    "harmony",
    "template",
    "parser",
    "sampling",
    "generate",
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
    "Delta",
    "Done",
    "Event",
    "HarmonyError",
    "Malformed",
    "Message",
    "Opened",
    "StreamParser",
    "Tokenizer",
    "Tool",
    "ToolCall",
    "chat_prompt",
    "developer_message",
    "merge_by_rank",
    "merges_from_ranks",
    "parse",
    "render",
    "render_message",
    "render_training",
    "system_message",
    "tokenizer_json",
]
