# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   gptoss:
#     module: messages
#     public: [ChatError, read_messages]
# ---

# %% [markdown]
# # What may a message look like?
#
# ## Question
#
# A program sends a conversation as a list of dicts. What a model thought
# stands in them under one of five keys, what it said in parts of four kinds,
# and about a dozen keys more tell a model nothing. What is to be done with
# the one key that nobody knows?
#
# Messages come as the plain dicts of OpenAI's chat interface, as its clients'
# objects, or as items of its Responses interface. All these were made before
# gpt-oss was, and everybody has added a key of their own. So we read every
# key that says something to the model, and refuse by its place and name any
# other that holds something: a text that is left out without a word changes
# the conversation, and nobody learns why the answer is odd.
#
# This is the first chapter of a conversation. Those that follow make
# [hints a schema](schema.ipynb), [functions tools](tools.ipynb), keep
# [what was read](memory.ipynb), run [a turn](turns.ipynb) and hold
# [the conversation](chat.ipynb).

# %% [markdown]
# ## Code
#
# ### A text

# %% tags=["export"]
import dataclasses
import re
import reprlib
from collections.abc import Mapping, Sequence

from gptoss.weights.errors import Error, mismatch
from gptoss.text.harmony import Message, developer_message

# %% tags=["export"]
class ChatError(Error):
    """A message, a tool or an option that a chat cannot use."""


def require(fits: bool, where: str, expected: str, found: object) -> None:
    """Raises ChatError at `where` unless what was `found` fits."""
    if not fits:
        said = "nothing" if found is None else reprlib.repr(found)
        raise mismatch(ChatError, where, expected, said)


# keys of clients that tell a model nothing
_IDLE = frozenset({
    "id", "object", "created", "created_at", "timestamp", "index", "status",
    "model", "finish_reason", "stop_reason", "usage", "logprobs",
    "cache_control"})


def as_dict(value: object, where: str) -> Mapping:
    """`value`, a dict or an object that makes one by `model_dump()`."""
    dump = getattr(value, "model_dump", None)
    if callable(dump) and not isinstance(value, Mapping | type):
        value = dump()
    require(isinstance(value, Mapping), where, "a dict", value)
    return value


def only_keys(given: Mapping, keys: Sequence[str], where: str) -> None:
    """Refuse a key that holds something and would not be read."""
    for key, value in given.items():
        empty = value is None or value is False or (
            isinstance(value, str | list | tuple | Mapping) and not value)
        require(empty or key in keys or key in _IDLE, f"{where}.{key}",
               f"no keys but {', '.join(keys)}", value)

# %% [markdown]
# A text is a string or a list of parts, and three interfaces call their
# parts by four names:

# %% tags=["export"]
# type of a part -> the key with its text
_PARTS = {"text": "text", "input_text": "text", "output_text": "text",
          "refusal": "refusal"}


def _part(part: object, where: str) -> str:
    """The text of one part of a content."""
    part = as_dict(part, where)
    kind = part.get("type")
    key = _PARTS.get(kind) if isinstance(kind, str) else None
    require(key is not None and isinstance(part.get(key), str), where,
           "{'type': 'text', 'text': ...}", part)
    only_keys(part, ("type", key), where)
    return part[key]


def content_text(content: object, where: str) -> str:
    """The text of `content`, a string or a list of text parts."""
    if isinstance(content, list | tuple):
        content = "".join(_part(part, f"{where}[{n}]")
                          for n, part in enumerate(content))
    require(isinstance(content, str), where,
           "a string or a list of text parts", content)
    require(not re.search("[\ud800-\udfff]", content), where,
           "Unicode characters without lone surrogates", content)
    return content

# %%
print(content_text([{"type": "text", "text": "two "},
                    {"type": "input_text", "text": "parts"}],
                   "messages[0].content"))
for wrong in ([{"type": "image_url"}],
              [{"type": "text", "text": "a", "bold": True}]):
    try:
        content_text(wrong, "messages[0].content")
    except ChatError as error:
        print(error)

# %% [markdown]
# ### A thought and a call
#
# What the model thought has many names: `reasoning` here and in vLLM,
# `reasoning_content` in llama.cpp, `thinking` in ollama and in the released
# chat template, lists of pieces in OpenRouter (`reasoning_details`) and
# LiteLLM (`thinking_blocks`). A client may send the same thought under two
# of them. It counts once; two different ones are a contradiction.

# %% tags=["export"]
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
    key = _PIECES.get(kind) if isinstance(kind, str) else None
    require(key is not None, f"{where}.type",
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

# %%
for message in ({"reasoning": "Add.", "reasoning_content": "Add."},
                {"reasoning_details": [{"type": "reasoning.text",
                                        "text": "Add.", "index": 0}]},
                {"reasoning": "Add.", "thinking": "Subtract."},
                {"reasoning_details": [{"type": "reasoning.encrypted"}]}):
    try:
        print(_thought(message, "messages[1]"))
    except ChatError as error:
        print(error)

# %% tags=["export"]
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_OTHER = re.compile(r"[^A-Za-z0-9_.-]")


def checked_name(name: object, where: str) -> str:
    """`name` of a function or an author, if it may be one."""
    require(isinstance(name, str) and bool(_NAME.fullmatch(name)), where,
           "1 to 64 letters, digits, _ . -", name)
    return name


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

# %% [markdown]
# One dict holds what was thought, then what was said, then what was called,
# and it has one place for what was said. But harmony's assistant can speak on
# two channels: before a call, or between two thoughts, it may tell the user
# on `commentary` what it is about to do. That is called a *preamble*. The
# content of a dict with calls is one; any other is marked, as in OpenAI's
# Responses, by `phase: "commentary"`. Without a mark a content is the answer.
# And a dict without content is no answer: somebody who was cut off while
# thinking has not answered with nothing.

# %% tags=["export"]
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
    known = {id_: call.recipient for id_, call in made}
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

# %%
calling = {"role": "assistant", "reasoning": "Multiply.", "tool_calls": [
    {"id": "call_1", "type": "function", "function": {
        "name": "calculator", "arguments": '{"expression": "6*7"}'}}]}
plan = {"role": "assistant", "content": "Let me see.", "phase": "commentary"}
cut = {"role": "assistant", "content": None, "thinking": "Perhaps"}
for given in (calling, plan, cut):
    for message in _assistant(given, "messages[1]")[0]:
        print(message.channel, message.recipient, message.content)

# %% [markdown]
# ### Results in the order of their calls
#
# Harmony has no ids: the model knows a result by its place behind the calls
# and by its function's name. With two calls of one function, results that
# arrive in another order would be swapped. So they wait until all are there,
# and are rendered in the order of the calls.

# %% tags=["export"]
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
        known, found = ", ".join(self.open), message.get("tool_call_id")
        require(isinstance(found, str) and found in self.open,
               f"{where}.tool_call_id",
               f"the id of an open call ({known or 'there is none'})", found)
        to, name = self.to[found], message.get("name")
        require(name in (None, "", to, to.removeprefix("functions.")),
               f"{where}.name", f"{to}, which was called", name)
        self.answers[found] = Message(
            "tool", content_text(message.get("content"), f"{where}.content"),
            "commentary", "assistant", name=to)
        if self.open:
            return []
        answers = [self.answers[id_] for id_ in self.to]
        self.to, self.answers = {}, {}
        return answers

# %% [markdown]
# ### A whole conversation
#
# The items of the Responses interface say the same in smaller pieces, one for
# each thought and each call:

# %% tags=["export"]
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

# %% tags=["export"]
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

# %% tags=["export"]
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
    head, out, calls, heading = [], [], _OpenCalls(), True
    for n, item in enumerate(messages):
        item = as_dict(item, where := f"messages[{n}]")
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

# %%
talk = [{"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Six times seven?"}, calling,
        {"role": "tool", "tool_call_id": "call_1", "content": "42"}]
print(read_messages(talk)[0], [m.role for m in read_messages(talk)[1]])
for wrong in ([*talk[:3], talk[1]], [*talk[:2], talk[3]], talk[:1],
              [{"role": "user", "text": "Hello"}],
              [*talk[:2], {"role": "assistant", "content": "It is"}]):
    try:
        read_messages(wrong)
    except ChatError as error:
        print(error)

# %% [markdown]
# The last refusal is a decision. Some interfaces take a final message of the
# assistant as a beginning that the model shall go on with. Rendered, that
# message has ended, and its author's next one would begin: the model would
# answer itself. We say so instead of guessing.
#
# Two results in the wrong order come out in the right one:

# %%
import json


def ask(id_: str, city: str) -> dict:
    return {"type": "function_call", "call_id": id_, "name": "weather",
            "arguments": json.dumps({"city": city})}


both = [talk[1], ask("a", "Oslo"), ask("b", "Rome"),
        *({"type": "function_call_output", "call_id": id_, "output": text}
          for id_, text in (("b", "30 in Rome"), ("a", "3 in Oslo")))]
print([message.content for message in read_messages(both)[1][1:]])

# %% [markdown]
# ## It holds
#
# **No word is lost.** Whatever an assistant's message holds, each under its
# own word: either all words are in what the model will read, or the message
# is refused.

# %%
import random

rng, read, refused = random.Random(0), 0, 0
KEYS = ["content", "refusal", "reasoning", "thinking", "reasoning_content",
        "name", "note", "audio"]
for _ in range(2000):
    words = {key: f"w{n}" for n, key in enumerate(KEYS)
             if rng.random() < 0.25}
    try:
        _, said = read_messages([talk[1], {"role": "assistant"} | words,
                                 talk[1]])
    except ChatError as error:
        refused += 1
        assert str(error).startswith("messages[1].")
    else:
        read += 1
        if {*words} - {"name"}:  # of nobody's message there is no name
            seen = " ".join(f"{message.name} {message.content}"
                            for message in said[1:-1]).split()
            assert {*words.values()} <= {*seen}
print(f"{read} read, {refused} refused")

# %% [markdown]
# **The order of the results does not matter**: any order of three gives the
# same messages.

# %%
import itertools

calls = [ask(id_, "Oslo") for id_ in "abc"]
results = [{"type": "function_call_output", "call_id": id_, "output": id_}
           for id_ in "abc"]
orders = [read_messages([talk[1], *calls, *order])
          for order in itertools.permutations(results)]
assert all(order == orders[0] for order in orders)
print(len(orders), "orders,", [m.content for m in orders[0][1][4:]])

# %% [markdown]
# ## Takeaways
#
# - Read every key that says something to the model; refuse, by its place and
#   name, every other that holds something.
# - Harmony knows a result by its place: results wait until all are there,
#   and go in the order of the calls.
# - What was thought, said and called keeps its order; a dict without content
#   is no answer.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1
#
# Ollama's clients send a call's arguments as a dict, not as a string of JSON,
# and without ids. `read_messages` refuses both. Write a function that makes
# such messages readable.

# %% tags=["hide-cell"]
def from_ollama(messages: list[dict]) -> list[dict]:
    out, ids = [], []
    for message in messages:
        message = dict(message)
        if message.get("tool_calls"):
            ids = [f"call_{len(out)}_{n}"
                   for n, _ in enumerate(message["tool_calls"])]
            message["tool_calls"] = [
                {"id": id_, "function": {
                    "name": call["function"]["name"], "arguments": json.dumps(
                        call["function"]["arguments"])}}
                for id_, call in zip(ids, message["tool_calls"],
                                     strict=True)]
        if message["role"] == "tool":
            message = {"role": "tool", "content": message["content"],
                       "tool_call_id": ids.pop(0)}
        out.append(message)
    return out


theirs = [talk[1], {"role": "assistant", "content": "", "tool_calls": [
    {"function": {"name": "calculator",
                  "arguments": {"expression": "6*7"}}}]},
          {"role": "tool", "tool_name": "calculator", "content": "42"}]
for message in read_messages(from_ollama(theirs))[1]:
    print(message.role, message.recipient, message.content)
# without ids the results must come in the order of the calls
assert read_messages(from_ollama(theirs))[1][1].recipient == (
    "functions.calculator")

# %% [markdown]
# ## Sources
#
# - OpenAI, `docs/format.md` in openai/harmony: channels, preambles, calls and
#   their answers.
# - openai/openai-python, `src/openai/types/chat` and
#   `src/openai/types/responses`: the dicts and the items.
