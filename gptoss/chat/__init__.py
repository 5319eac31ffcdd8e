"""Part chat of the book: 16 names, loaded when first asked for

Generated from the front matter of book/chat/*.py; edit it, not this file.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptoss.chat.chat import Chat as Chat
    from gptoss.chat.chat import load as load
    from gptoss.chat.memory import PrefixCache as PrefixCache
    from gptoss.chat.memory import Session as Session
    from gptoss.chat.messages import ChatError as ChatError
    from gptoss.chat.messages import read_messages as read_messages
    from gptoss.chat.schema import fit as fit
    from gptoss.chat.schema import json_schema as json_schema
    from gptoss.chat.settings import Settings as Settings
    from gptoss.chat.tools import FunctionTool as FunctionTool
    from gptoss.chat.tools import ToolTimeout as ToolTimeout
    from gptoss.chat.tools import function_tool as function_tool
    from gptoss.chat.tools import read_tools as read_tools
    from gptoss.chat.turn import ChatEvent as ChatEvent
    from gptoss.chat.turn import Turn as Turn
    from gptoss.chat.turn import Usage as Usage

_HOME = {
    "Chat": "chat",
    "ChatError": "messages",
    "ChatEvent": "turn",
    "FunctionTool": "tools",
    "PrefixCache": "memory",
    "Session": "memory",
    "Settings": "settings",
    "ToolTimeout": "tools",
    "Turn": "turn",
    "Usage": "turn",
    "fit": "schema",
    "function_tool": "tools",
    "json_schema": "schema",
    "load": "chat",
    "read_messages": "messages",
    "read_tools": "tools",
}
_MODULES = (
    "messages",
    "schema",
    "tools",
    "calculator",
    "memory",
    "settings",
    "turn",
    "agreement",
    "chat",
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
    "Chat",
    "ChatError",
    "ChatEvent",
    "FunctionTool",
    "PrefixCache",
    "Session",
    "Settings",
    "ToolTimeout",
    "Turn",
    "Usage",
    "fit",
    "function_tool",
    "json_schema",
    "load",
    "read_messages",
    "read_tools",
]
