"""How much of a conversation must be read again?

Generated from book/chat/memory.py; edit the chapter, not this file.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from gptoss.chat.memory import SLACK
from gptoss.chat.messages import content_text, require
from gptoss.chat.tools import FunctionTool
from gptoss.text.harmony import (
    EFFORTS,
    Message,
    developer_message,
    system_message,
)
from gptoss.text.sampling import SamplingOptions

# --- What all conversations share --------------------------------------------

@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What a chat is asked, whoever speaks to it.

    tools: by name. date: "" or None for none. sampling: of a whole turn;
    what stands in its `stop` is not read. rounds: calls run in one turn.
    slack: see `PrefixCache`. Raises ChatError, which names the option.
    """

    effort: str = "medium"
    tools: Mapping[str, FunctionTool] = dataclasses.field(
        default_factory=dict)
    instructions: str = ""
    date: str | None = None
    sampling: SamplingOptions = SamplingOptions(max_new_tokens=None)
    rounds: int = 8
    slack: int = SLACK

    def __post_init__(self) -> None:
        for name in ("rounds", "slack"):
            value = getattr(self, name)
            require(type(value) is int and value >= 0, name,
                    "an integer >= 0", value)
        require(self.effort in EFFORTS, "effort",
                f"one of {', '.join(EFFORTS)}", self.effort)
        for name, text in (("instructions", self.instructions),
                           ("date", "" if self.date is None else self.date)):
            object.__setattr__(self, name, content_text(text, name))

    def with_changes(self, **changes: Any) -> "Settings":
        """These settings but for `changes`; those of `sampling` by their
        own names. TypeError for an unknown one."""
        own = {field.name for field in dataclasses.fields(self)}
        inner = {name: changes.pop(name) for name in [*changes]
                 if name not in own}
        sampling = changes.pop("sampling", self.sampling)
        return dataclasses.replace(
            self, sampling=sampling.with_changes(**inner), **changes)

    def head(self, instructions: str = "") -> list[Message]:
        """The system message and, if it says anything, the developer's."""
        tools = [tool.spec for tool in self.tools.values()]
        text = "\n\n".join(filter(None, (self.instructions, instructions)))
        both = (system_message(self.effort, self.date or None, bool(tools)),
                developer_message(text, tools))
        return [message for message in both if message.content]


__all__ = [
    "Settings",
]
