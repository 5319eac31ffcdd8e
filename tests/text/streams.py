"""What the tests of conversations and of the parser share."""

import re
from dataclasses import replace

from gptoss.text.harmony import Message
from gptoss.text.parser import (
    Delta,
    Done,
    Opened,
    StreamParser,
    ToolCall,
)
from gptoss.text.tokenizer import Tokenizer

CONTROLS = ["<|start|>", "<|end|>", "<|message|>", "<|channel|>",
            "<|constrain|>", "<|call|>", "<|return|>"]


def build(tokenizer: Tokenizer, parts: list) -> list[int]:
    """Ids: a string's control tokens by name; {"text": ...} as text only;
    {"bytes": hex} as single bytes; an integer as it is."""
    ids = []
    for part in parts:
        if isinstance(part, int):
            ids.append(part)
        elif isinstance(part, dict) and "text" in part:
            ids += tokenizer.encode(part["text"])
        elif isinstance(part, dict):
            for byte in bytes.fromhex(part["bytes"]):
                ids.append(next(i for i in range(256)
                                if tokenizer.token_bytes(i) == bytes([byte])))
        else:
            for piece in re.split(r"(<\|\w+\|>)", part):
                ids += ([tokenizer.special[piece]]
                        if piece in tokenizer.special
                        else tokenizer.encode(piece))
    return ids


def stream(tokenizer: Tokenizer, ids: list[int], role: str | None
           ) -> tuple[list, list[Message]]:
    """All events and messages of a parser; what must hold of any is held."""
    parser, events = StreamParser(tokenizer, role), []
    for token in ids:
        events += parser.feed(token)
    events += parser.close()
    assert parser.close() == []
    opened, text, calls = None, "", []
    for event in events:
        if isinstance(event, Opened):
            assert opened is None and event.message.content == ""
            opened, text = event.message, ""
        elif isinstance(event, Delta):
            assert event.text and event.channel == opened.channel
            text += event.text
        elif isinstance(event, ToolCall):
            calls.append(event)
        elif isinstance(event, Done):
            assert event.message == replace(opened, content=text)
            assert calls in ([], [ToolCall(opened.recipient,
                                           opened.content_type, text)])
            assert event.stop in ("end", "return", "call", None)
            assert not (calls and event.stop is None)
            opened, calls = None, []
        else:
            assert event.reason
    assert opened is None and not calls
    done = [event.message for event in events if isinstance(event, Done)]
    assert done == parser.messages
    return events, done
