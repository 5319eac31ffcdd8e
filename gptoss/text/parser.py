"""What if the model gets the form wrong?

Generated from book/text/parsing.py; edit the chapter, not this file.
"""

import codecs
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from gptoss.text.harmony import (
    BUILTIN_TOOLS,
    CHANNELS,
    CONSTRAIN,
    ROLES,
    Message,
)
from gptoss.text.tokenizer import Tokenizer
from gptoss.text.vocabulary import HarmonyError

# --- What a parser reports ---------------------------------------------------

@dataclass(frozen=True)
class Opened:
    """A header is complete; `message` has its fields and no content yet."""

    message: Message


@dataclass(frozen=True)
class Delta:
    """More content, in whole characters.

    `channel`: as the header wrote it, so that only "final" is an answer;
    None: it named none. Either is reported before if it is none of
    CHANNELS and the message is the assistant's.
    """

    text: str
    channel: str | None


@dataclass(frozen=True)
class ToolCall:
    """A message of the assistant to a tool has come to its stop token."""

    recipient: str
    content_type: str | None
    arguments: str


@dataclass(frozen=True)
class Done:
    """A message has ended; `stop`: end, call, return; None: cut off."""

    message: Message
    stop: str | None


@dataclass(frozen=True)
class Malformed:
    """What was wrong, and the text that it was found in."""

    reason: str
    text: str


Event = Opened | Delta | ToolCall | Done | Malformed


# --- Reading a header --------------------------------------------------------

_Pieces = list[tuple[str, bytearray]]  # control token or "", text behind it
_WORD = re.compile(r"[\w./+-]+")
_TORN_TO = re.compile(r"(?<!\S)to=\s+(?=\S)")


def _spell(pieces: _Pieces) -> str:
    """Pieces as one would write them."""
    return "".join(control + data.decode("utf-8", "replace")
                   for control, data in pieces)


def _fields(pieces: _Pieces
            ) -> tuple[dict[str, str], list[str], list[str]]:
    """Channel and content type by control token, other words, complaints."""
    found: dict[str, str] = {}
    words: list[str] = []
    wrong: list[str] = []
    for control, data in pieces:
        text = data.decode("utf-8", "replace")
        if _TORN_TO.search(text):
            text = _TORN_TO.sub("to=", text)
            wrong.append("white space behind to=")
        parts = text.split()
        if control:
            value = parts.pop(0) if parts else ""
            if control == "<|channel|>" and value and data[:1].isspace():
                wrong.append("white space behind <|channel|>")
            if control in found:
                wrong.append(f"two {control} in a header")
            if control == "<|channel|>" and not value:
                wrong.append("a <|channel|> without a name")
            # the later of two, but no unknown channel after a known one
            elif (control == CONSTRAIN or value in CHANNELS
                  or found.get(control, "") not in CHANNELS):
                found[control] = value
        words += parts
    return found, words, wrong


def _author(words: list[str], role: str | None, started: bool
            ) -> tuple[str, str | None, list[str]]:
    """Takes the author off `words`: role, name, complaints.

    `role`: known beforehand. `started`: whether there was a `<|start|>`.
    """
    first = words[0] if words else ""
    head, _, name = first.partition(":")
    if role is not None:
        del words[:first == role]
        return role, None, []
    if head in ROLES[:-1]:
        del words[0]
        return head, name or None, []
    if (not started or not first or first in CHANNELS
            or first.startswith("to=")):
        return "assistant", None, ["a header without a role"]
    del words[0]
    if (first in ("tool", *BUILTIN_TOOLS) or "." in first
            or any(word.startswith("to=") for word in words)):
        return "tool", first, []
    return "assistant", None, [f"an unknown role {first!r}"]


def _read_header(pieces: _Pieces, role: str | None, started: bool
                 ) -> tuple[Message, list[Malformed]]:
    """The message that a header announces, and what is wrong with it."""
    found, words, wrong = _fields(pieces)
    role, name, complaints = _author(words, role, started)
    to = [word[3:] for word in words if word.startswith("to=")]
    early = not all(word.startswith("to=") for word in words[:len(to)])
    words = [word for word in words if not word.startswith("to=")]
    bare = "<|channel|>" not in found and words[:1] in [[c] for c in CHANNELS]
    channel = words.pop(0) if bare else found.get("<|channel|>")
    kind = (CONSTRAIN + found[CONSTRAIN] if CONSTRAIN in found
            else words[0] if len(words) == 1 else None)
    alone = kind is not None and (
        words == [kind] and bool(_WORD.fullmatch(kind)))
    lost = role == "assistant" and channel not in CHANNELS
    text = _spell(pieces)
    table = {  # complaint -> whether it holds
        "a channel without <|channel|>": bare,
        f"unexpected text {' '.join(words)!r} in a header":
            words and not alone,
        f"a format before to=: {kind!r}": alone and early,
        f"recipients {to} in a header": len(to) > 1 or "" in to,
        f"an unknown channel {channel!r}": lost and channel,
        "a message of the assistant without a channel": lost and not channel,
        "a header that is not UTF-8": "\ufffd" in text}
    wrong += complaints + [reason for reason, holds in table.items() if holds]
    recipient = next(filter(None, to), None)
    return (Message(role, "", channel, recipient, kind, name),
            [Malformed(reason, text) for reason in wrong])


# --- A header that never came to its message ---------------------------------

def _rescue(pieces: _Pieces) -> Message | None:
    """The assistant's text in a header that never came to `<|message|>`.

    Plain text, or a channel's name and text; else there is none.
    """
    (_, before), *rest = pieces
    text, channel = before.decode("utf-8", "replace"), None
    text = text.removeprefix("assistant").lstrip()
    if rest:
        control, behind = rest[0]
        after = behind.decode("utf-8", "replace").lstrip()
        # not "finally": that may be any text
        channel = next((c for c in CHANNELS
                        if re.match(f"{c}(?![a-z])", after)), None)
        if text or channel is None or rest[1:] or control == CONSTRAIN:
            return None
        text = after.removeprefix(channel).lstrip()
    return (Message("assistant", text, channel)
            if text and "to=" not in text else None)


# --- One token at a time -----------------------------------------------------

_STOPS = {"<|end|>": "end", "<|return|>": "return", "<|call|>": "call"}


class StreamParser:
    """Takes tokens one by one and reports events; never raises on a token.

    `role`: the author of the first message if the tokens continue
    `<|start|>role`, as a reply to `render` does; None: they begin with
    `<|start|>`. `messages`: those that are done. What is malformed is
    reported, and the parser goes on with the next header that it finds.
    A ToolCall comes only of a message with a stop token: without one its
    arguments may be cut short.
    """

    def __init__(self, tokenizer: Tokenizer,
                 role: str | None = "assistant") -> None:
        if role not in (None, *ROLES):
            raise HarmonyError(f"role: expected one of {', '.join(ROLES)} or "
                               f"None, found {role!r}")
        self.messages: list[Message] = []
        self._tokenizer = tokenizer
        self._replying = role == "assistant"
        self._stop: str | None = None  # of the message before
        self._begin(role, started=role is not None)

    def feed(self, token: int) -> list[Event]:
        """The events that `token` causes."""
        try:
            data = self._tokenizer.token_bytes(token)
            special = self._tokenizer.is_special(token)
        except (HarmonyError, TypeError):
            data, special = f"<|unknown {token}|>".encode(), True
        step = self._content if self._in_content else self._header
        return step(*((data.decode(), b"") if special else ("", data)))

    def close(self) -> list[Event]:
        """The events that the end of the tokens causes."""
        if self._in_content:
            return self._finish(None)
        blank = self._pieces == [("", b"")]
        return [] if blank and not self._started else self._abandon()

    def _header(self, control: str, data: bytes) -> list[Event]:
        """A token between messages or in a header."""
        if control in _STOPS:
            return self._abandon(control)
        if control == "<|start|>":
            fresh = self._pieces == [("", b"")] and (
                not self._started or self._role is not None)
            events = [] if fresh else self._abandon(control)
            if self._stop == "return":
                events.append(Malformed("a message after <|return|>", ""))
            self._stop = None
            self._begin(started=True)
            return events
        if control == "<|message|>":
            message, wrong = _read_header(self._pieces, self._role,
                                          self._started)
            if not self._started:
                wrong.append(Malformed("a header without <|start|>",
                                       _spell(self._pieces)))
            return [*wrong, *self._open(message)]
        if control not in ("", "<|channel|>", CONSTRAIN):
            return [Malformed("a control token in a header", control)]
        if control:
            self._pieces.append((control, bytearray()))
        self._pieces[-1][1].extend(data)
        return []

    def _content(self, control: str, data: bytes) -> list[Event]:
        """A token of a message's content."""
        if not control:
            return self._add(data)
        if control in _STOPS:
            return self._finish(_STOPS[control])
        if control not in ("<|start|>", "<|channel|>"):
            return [*self._add(b"", final=True),
                    Malformed("a control token in a text", control)]
        role = self._message.role if control == "<|channel|>" else None
        events = [Malformed(f"{control} before the message has ended", ""),
                  *self._finish(None)]
        self._begin(role, started=role is not None)
        return events + self._header(control, b"")

    def _begin(self, role: str | None = None, started: bool = False) -> None:
        """A new header; `started`: its `<|start|>` has been seen."""
        self._role, self._started = role, started
        self._pieces: _Pieces = [("", bytearray())]
        self._message = Message("assistant")  # its header, once read
        self._in_content = False              # whether it has been
        self._text: list[str] = []
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def _open(self, message: Message) -> list[Event]:
        """A header is complete."""
        self._message, self._in_content = message, True
        return [Opened(message)]

    def _add(self, data: bytes, final: bool = False) -> list[Event]:
        """More content; at a `final` half a character becomes U+FFFD."""
        text = self._utf8.decode(data, final)
        self._text.append(text)
        return [Delta(text, self._message.channel)] if text else []

    def _finish(self, stop: str | None) -> list[Event]:
        """The message ends."""
        events = self._add(b"", final=True)
        message = replace(self._message, content="".join(self._text))
        to, call = message.recipient, None
        if message.role == "assistant" and to is not None:
            call = ToolCall(to, message.content_type, message.content)
        if stop == "call" and call is None:
            events.append(Malformed("<|call|> without a recipient", ""))
        if call and call.recipient in ROLES:
            events.append(Malformed("a recipient that is no tool",
                                    call.recipient))
        elif call and stop is not None:
            if stop != "call":
                events.append(Malformed("a call without <|call|>",
                                        call.recipient))
            events.append(call)
        self.messages.append(message)
        self._stop = stop
        self._begin()
        return [*events, Done(message, stop)]

    def _abandon(self, control: str = "") -> list[Event]:
        """`control` (or the end) instead of `<|message|>` after a header."""
        found = _spell(self._pieces) + control
        reason = ("a header without <|message|>" if self._started else
                  "text outside of a message")
        events: list[Event] = [Malformed(reason, found)]
        message = _rescue(self._pieces) if self._replying else None
        if message is None or control == "<|start|>":
            self._begin()
            return events
        events += self._open(replace(message, content=""))
        events += self._add(message.content.encode())
        return events + self._finish(_STOPS.get(control))


# --- All at once -------------------------------------------------------------

def parse(tokenizer: Tokenizer, ids: Iterable[int],
          role: str | None = None) -> list[Message]:
    """The messages in `ids`; raises HarmonyError if anything is malformed.

    `role`: as for StreamParser. The last message may lack its stop token.
    """
    parser = StreamParser(tokenizer, role)
    for n, events in enumerate([*map(parser.feed, ids), parser.close()]):
        for event in events:
            if isinstance(event, Malformed):
                raise HarmonyError(f"token {n}: {event.reason}: "
                                   f"{event.text!r}")
    return parser.messages


__all__ = [
    "Delta",
    "Done",
    "Event",
    "Malformed",
    "Opened",
    "StreamParser",
    "ToolCall",
    "parse",
]
