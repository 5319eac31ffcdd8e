"""How do other programs write the same prompt?

Generated from book/text/template.py; edit the chapter, not this file.
"""

from collections.abc import Iterable

from gptoss.text.harmony import (
    Message,
    developer_message,
    render,
    system_message,
)
from gptoss.text.tokenizer import Tokenizer
from gptoss.text.vocabulary import HarmonyError

# --- Dicts to ids ------------------------------------------------------------

def chat_prompt(tokenizer: Tokenizer, messages: Iterable[object],
                tools: Iterable[object] = (), effort: str = "medium",
                date: str | None = None, reply: bool = True) -> list[int]:
    """Token ids of a conversation in OpenAI's dicts, or in `Message`s.

    To dicts a system message is added (`date`: None for today, "" for none)
    and the developer message that their instructions and `tools` (dicts or
    functions) make, as `Chat` does; `Message`s are taken as they stand.
    `reply`: end in `<|start|>assistant`. Raises HarmonyError, or ChatError
    naming the message.
    """
    messages, tools = list(messages), list(tools)
    ours = [each for each in messages if isinstance(each, Message)]
    if ours and len(ours) == len(messages):
        if tools:
            raise HarmonyError("tools: expected none beside messages of "
                               "harmony, whose developer message has them")
        return render(tokenizer, ours, reply, "turns")
    from gptoss.chat.calculator import today
    from gptoss.chat.messages import read_messages
    from gptoss.chat.tools import read_tools

    # the reader wants the user to have the last word; for a conversation
    # that nobody is to answer it gets one, which is taken out again
    closing = [] if reply else [{"role": "user", "content": ""}]
    instructions, said = read_messages([*messages, *closing])
    offered = [each.spec for each in read_tools(tools).values()]
    date = today() if date is None else date or None
    head = [system_message(effort, date, bool(offered)),
            developer_message(instructions, offered)]
    said = said[:len(said) - len(closing)]
    return render(tokenizer, [*filter(lambda each: each.content, head),
                              *said], reply, "turns")


__all__ = [
    "chat_prompt",
]
