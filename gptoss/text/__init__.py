"""Part text of the book: 29 names, loaded when first asked for

Generated from the front matter of book/text/*.py; edit it, not this file.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptoss.text.generate import Completion as Completion
    from gptoss.text.generate import TextStream as TextStream
    from gptoss.text.generate import complete as complete
    from gptoss.text.generate import generate_batch as generate_batch
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
    from gptoss.text.sampling import GenerateError as GenerateError
    from gptoss.text.sampling import Sampler as Sampler
    from gptoss.text.sampling import SamplingOptions as SamplingOptions
    from gptoss.text.stops import stop_ids as stop_ids
    from gptoss.text.template import chat_prompt as chat_prompt
    from gptoss.text.tokenizer import Tokenizer as Tokenizer
    from gptoss.text.typescript import Tool as Tool
    from gptoss.text.vocabulary import HarmonyError as HarmonyError
    from gptoss.text.vocabulary import merge_by_rank as merge_by_rank
    from gptoss.text.vocabulary import merges_from_ranks as merges_from_ranks
    from gptoss.text.vocabulary import tokenizer_json as tokenizer_json

_HOME = {
    "Completion": "generate",
    "Delta": "parser",
    "Done": "parser",
    "Event": "parser",
    "GenerateError": "sampling",
    "HarmonyError": "vocabulary",
    "Malformed": "parser",
    "Message": "harmony",
    "Opened": "parser",
    "Sampler": "sampling",
    "SamplingOptions": "sampling",
    "StreamParser": "parser",
    "TextStream": "generate",
    "Tokenizer": "tokenizer",
    "Tool": "typescript",
    "ToolCall": "parser",
    "chat_prompt": "template",
    "complete": "generate",
    "developer_message": "harmony",
    "generate_batch": "generate",
    "merge_by_rank": "vocabulary",
    "merges_from_ranks": "vocabulary",
    "parse": "parser",
    "render": "harmony",
    "render_message": "harmony",
    "render_training": "harmony",
    "stop_ids": "stops",
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
    "stops",
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
    "Completion",
    "Delta",
    "Done",
    "Event",
    "GenerateError",
    "HarmonyError",
    "Malformed",
    "Message",
    "Opened",
    "Sampler",
    "SamplingOptions",
    "StreamParser",
    "TextStream",
    "Tokenizer",
    "Tool",
    "ToolCall",
    "chat_prompt",
    "complete",
    "developer_message",
    "generate_batch",
    "merge_by_rank",
    "merges_from_ranks",
    "parse",
    "render",
    "render_message",
    "render_training",
    "stop_ids",
    "system_message",
    "tokenizer_json",
]
