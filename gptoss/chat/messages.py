"""What may a message look like?

Generated from book/chat/messages.py; edit the chapter, not this file.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from gptoss.text.harmony import Message, developer_message
from gptoss.weights.errors import Error, expect, mismatch

# --- How is a refusal worded? ------------------------------------------------

class ChatError(Error):
    """A message, a tool or an option that a chat cannot use."""


def require(fits: bool, where: str, expected: str, found: object) -> None:
    """Raises ChatError at `where` unless what was `found` fits."""
    if not fits and found is None:  # a key that nobody sent
        raise mismatch(ChatError, where, expected, "nothing")
    expect(ChatError, fits, where, expected, found)


# keys of clients that tell a model nothing
_IDLE = frozenset({
    "id", "object", "created", "created_at", "timestamp", "index", "status",
    "model", "finish_reason", "stop_reason", "usage", "logprobs",
    "cache_control"})


def as_dict(value: object, where: str) -> Mapping[str, Any]:
    """`value`, a dict or an object that makes one by `model_dump()`."""
    dump = getattr(value, "model_dump", None)
    if callable(dump) and not isinstance(value, Mapping | type):
        value = dump()
    require(isinstance(value, Mapping), where, "a dict", value)
    return cast("Mapping[str, Any]", value)


def only_keys(given: Mapping, keys: Sequence[str], where: str) -> None:
    """Refuse a key that holds something and would not be read."""
    for key, value in given.items():
        empty = value is None or value is False or (
            isinstance(value, str | list | tuple | Mapping) and not value)
        require(empty or key in keys or key in _IDLE, f"{where}.{key}",
                f"no keys but {', '.join(keys)}", value)


# --- What is a text? ---------------------------------------------------------

# type of a part -> the key with its text
_PARTS = {"text": "text", "input_text": "text", "output_text": "text",
          "refusal": "refusal"}


def _part(part: object, where: str) -> str:
    """The text of one part of a content."""
    part = as_dict(part, where)
    kind = part.get("type")
    key = _PARTS.get(kind, "") if isinstance(kind, str) else ""
    text = part.get(key)
    require(bool(key) and isinstance(text, str), where,
            "{'type': 'text', 'text': ...}", part)
    only_keys(part, ("type", key), where)
    return cast(str, text)


def content_text(content: object, where: str) -> str:
    """The text of `content`, a string or a list of text parts."""
    if isinstance(content, list | tuple):
        content = "".join(_part(part, f"{where}[{n}]")
                          for n, part in enumerate(content))
    require(isinstance(content, str), where,
            "a string or a list of text parts", content)
    text = cast(str, content)
    require(not re.search("[\ud800-\udfff]", text), where,
            "Unicode characters without lone surrogates", text)
    return text


# --- What did the model think? -----------------------------------------------

# type of a piece of reasoning -> the key with its text
_PIECES = {"reasoning.text": "text", "reasoning.summary": "summary",
           "thinking": "thinking", "reasoning_text": "text",
           "summary_text": "text"}
_THOUGHTS = ("reasoning", "reasoning_content", "thinking",
             "reasoning_details", "thinking_blocks")


def _piece(piece: object, where: str) -> str:
    """The text of one entry of a list of reasoning."""
    piece = as_dict(piece, where)
    kind = piece.get("type")
    if isinstance(kind, str) and kind in _PARTS:
        return _part(piece, where)
    key = _PIECES.get(kind, "") if isinstance(kind, str) else ""
    require(bool(key), f"{where}.type",
            f"one of {', '.join(_PIECES)} (what is encrypted cannot be "
            "read)", kind)
    only_keys(piece, ("type", key, "signature", "format"), where)
    return content_text(piece.get(key) or "", f"{where}.{key}")


def _thought(message: Mapping, where: str) -> str:
    """What the assistant thought, under whichever keys."""
    first, thought = "", ""
    for key in _THOUGHTS:
        found, at = message.get(key), f"{where}.{key}"
        if isinstance(found, list | tuple):
            found = "".join(_piece(piece, f"{at}[{n}]")
                            for n, piece in enumerate(found))
        found = content_text("" if found is None else found, at)
        require(not (found and thought) or found.strip() == thought.strip(),
                at, f"the same as {first}, or only one of them", found)
        if found and not thought:
            first, thought = key, found
    return thought


# --- What did it call? -------------------------------------------------------

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_OTHER = re.compile(r"[^A-Za-z0-9_.-]")


def checked_name(name: object, where: str) -> str:
    """`name` of a function or an author, if it may be one."""
    require(isinstance(name, str) and bool(_NAME.fullmatch(name)), where,
            "1 to 64 letters, digits, _ . -", name)
    return cast(str, name)


def possible_name(name: str) -> str:
    """What a model called, made a name that `checked_name` takes."""
    return _OTHER.sub("_", name)[:64] or "none"


def _call(call: object, where: str) -> tuple[str, Message]:
    """One entry of `tool_calls`: its id, and a message to the function."""
    call = as_dict(call, where)
    require(isinstance(call.get("id"), str), f"{where}.id", "a string",
            call.get("id"))
    require(call.get("type", "function") == "function", f"{where}.type",
            "'function'", call.get("type"))
    only_keys(call, ("id", "type", "function"), where)
    function = as_dict(call.get("function"), f"{where}.function")
    name = checked_name(function.get("name"), f"{where}.function.name")
    arguments = function.get("arguments")
    require(isinstance(arguments, str), f"{where}.function.arguments",
            "a string of JSON", arguments)
    only_keys(function, ("name", "arguments"), f"{where}.function")
    return call["id"], Message(
        "assistant", content_text(arguments, f"{where}.arguments"),
        "commentary", f"functions.{name}", "<|constrain|>json")


# --- In which order, and on which channels? ----------------------------------

_PHASES = {"commentary": "commentary", "final_answer": "final"}
_ASSISTANT = ("role", "content", "refusal", "phase", "name", "tool_calls",
              *_THOUGHTS)


def _assistant(message: Mapping, where: str
               ) -> tuple[list[Message], dict[str, str]]:
    """What the assistant thought, said and called, in this order; and the
    calls, id -> function."""
    only_keys(message, _ASSISTANT, where)
    calls, phase = message.get("tool_calls") or [], message.get("phase")
    require(isinstance(calls, list | tuple), f"{where}.tool_calls", "a list",
            calls)
    require(phase is None or phase in tuple(_PHASES), f"{where}.phase",
            f"one of {', '.join(_PHASES)}", phase)
    made = [_call(call, f"{where}.tool_calls[{n}]")
            for n, call in enumerate(calls)]
    known = {id_: str(call.recipient) for id_, call in made}
    require(len(known) == len(made), f"{where}.tool_calls",
            "ids that differ", [id_ for id_, _ in made])
    said = "\n\n".join(filter(None, (
        content_text(message[key], f"{where}.{key}")
        for key in ("content", "refusal") if message.get(key) is not None)))
    channel = (_PHASES[phase] if phase else
               "commentary" if calls else "final")
    out = [Message("assistant", text, channel) for text, channel in (
        (_thought(message, where), "analysis"), (said, channel)) if text]
    return _named(out + [call for _, call in made], message, where), known


def _named(out: list[Message], message: Mapping, where: str
           ) -> list[Message]:
    """The messages with the `name` of their author, if there is one."""
    if not message.get("name"):
        return out
    name = checked_name(message["name"], f"{where}.name")
    return [dataclasses.replace(each, name=name) for each in out]


# --- Which result belongs to which call? -------------------------------------

class _OpenCalls:
    """Calls that wait for their answers, id -> function."""

    def __init__(self) -> None:
        self.to: dict[str, str] = {}
        self.answers: dict[str, Message] = {}

    @property
    def open(self) -> list[str]:
        return [id_ for id_ in self.to if id_ not in self.answers]

    def answer(self, message: Mapping, where: str) -> list[Message]:
        """Takes a tool's message; all answers once none is missing."""
        only_keys(message, ("role", "content", "tool_call_id", "name"), where)
        known, id_ = ", ".join(self.open), message.get("tool_call_id", "")
        require(isinstance(id_, str) and id_ in self.open,
                f"{where}.tool_call_id", "the id of an open call "
                f"({known or 'there is none'})", id_ or None)
        to, name = self.to[id_], message.get("name")
        require(name in (None, "", to, to.removeprefix("functions.")),
                f"{where}.name", f"{to}, which was called", name)
        self.answers[id_] = Message(
            "tool", content_text(message.get("content"), f"{where}.content"),
            "commentary", "assistant", name=to)
        if self.open:
            return []
        answers = [self.answers[id_] for id_ in self.to]
        self.to, self.answers = {}, {}
        return answers


# --- A whole conversation ----------------------------------------------------

def _item(item: Mapping, where: str) -> Mapping:
    """A message, or an item of OpenAI's Responses interface as one."""
    kind = item.get("type") or "message"
    if kind == "message":
        return {key: item[key] for key in item if key != "type"}
    if kind == "reasoning":
        only_keys(item, ("type", "summary", "content"), where)
        pieces = [item.get(key) or [] for key in ("summary", "content")]
        require(all(isinstance(each, list) for each in pieces), where,
                "lists as summary and content", pieces)
        return {"role": "assistant", "reasoning_details": sum(pieces, [])}
    if kind == "function_call":
        only_keys(item, ("type", "call_id", "name", "arguments"), where)
        return {"role": "assistant", "tool_calls": [
            {"id": item.get("call_id"), "function": {
                key: item.get(key) for key in ("name", "arguments")}}]}
    require(kind == "function_call_output", f"{where}.type", "one of message,"
            " reasoning, function_call, function_call_output", kind)
    only_keys(item, ("type", "call_id", "output"), where)
    return {"role": "tool", "tool_call_id": item.get("call_id"),
            "content": item.get("output")}


_SPEAKERS = ("system", "developer", "user", "assistant", "tool")


def _told(message: Mapping, where: str) -> Message:
    """What a system, developer or user message says."""
    role = message["role"]
    only_keys(message, ("role", "content") + ("name",) * (role == "user"),
              where)
    text = content_text(message.get("content"), f"{where}.content")
    return _named([Message(role, text)], message, where)[0]


def _next(item: Mapping, where: str, calls: _OpenCalls) -> list[Message]:
    """What a message adds to the conversation, in which `calls` wait."""
    message = _item(item, where)
    role = message.get("role")
    require(role in _SPEAKERS, f"{where}.role",
            f"one of {', '.join(_SPEAKERS)}", role)
    if role == "tool":
        return calls.answer(message, where)
    more = item.get("type") == "function_call" and not calls.answers
    require(more or not calls.open, f"{where}.role",
            f"'tool', to answer {', '.join(calls.open)}", role)
    if role != "assistant":
        return [_told(message, where)]
    out, made = _assistant(message, where)
    require(not made.keys() & calls.to.keys(), f"{where}.call_id",
            "an id of its own", [*made])
    calls.to |= made
    return out


def read_messages(messages: Sequence[object]) -> tuple[str, list[Message]]:
    """OpenAI's dicts as (instructions, harmony messages).

    Also objects that have `model_dump()`, and items of the Responses
    interface. Instructions: the text of the system and developer messages
    at the head; a later one stays where it is. Every call must be answered
    before anybody else speaks, and the user or a tool must have the last
    word. Raises ChatError naming the message's index and the key.
    """
    require(isinstance(messages, list | tuple) and len(messages) > 0,
            "messages", "a list of at least one dict", messages)
    head: list[str] = []
    out: list[Message] = []
    calls, heading = _OpenCalls(), True
    for n, given in enumerate(messages):
        item = as_dict(given, where := f"messages[{n}]")
        for message in _next(item, where, calls):
            told = message.role in ("system", "developer")
            heading = heading and told
            if heading:
                head.append(message.content)
            else:
                out.append(developer_message(message.content) if told
                           else message)
    last = _item(item, where).get("role")
    require(last in ("user", "tool") and not calls.open, f"{where}.role",
            "the user or a tool to speak last" + (
                 f" (not answered: {', '.join(calls.open)})"
                 if calls.open else ""), last)
    return "\n\n".join(filter(None, head)), out


def call_ids(messages: Sequence[object]) -> list[str]:
    """The ids of all calls in `messages`, which are right."""
    dicts = [as_dict(each, "messages") for each in messages]
    return [as_dict(call, "tool_calls")["id"] for each in dicts
            for call in _item(each, "messages").get("tool_calls") or ()]


__all__ = [
    "ChatError",
    "as_dict",
    "call_ids",
    "checked_name",
    "content_text",
    "only_keys",
    "possible_name",
    "read_messages",
    "require",
]
