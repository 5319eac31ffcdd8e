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
# A program sends a conversation as a list of dicts. What the model thought
# stands in them under one of five keys, depending on who wrote the client. A
# reader that knows one of the five loses the thought in four of five cases,
# and nobody is told: the model only answers a little worse. How do we read
# every client's messages without losing a word?

# %% [markdown]
# ## Picture

# %% tags=["hide-input"]
# Figure: on the left one dict of an assistant with the keys reasoning,
# content and tool_calls; arrows lead to three harmony messages on the right,
# on the channels analysis, commentary, and commentary to a function. Below,
# a tool's dict becomes one message.
import matplotlib.pyplot as plt

plt.style.use("../_static/book.mplstyle")
LEFT = [("reasoning", '"Multiply."', "0.45"),
        ("content", '"Let me see."', "C1"),
        ("tool_calls", '[{"id": "call_1", calculator, 6*7}]', "C0"),
        ("tool_call_id", '"call_1",  "content": "42"', "C2")]
RIGHT = [("assistant, analysis", "Multiply."),
         ("assistant, commentary", "Let me see."),
         ("assistant to=functions.calculator", '{"expression": "6*7"}'),
         ("functions.calculator to=assistant", "42")]
fig, ax = plt.subplots(figsize=(7, 2.5))
for n, ((key, value, colour), (header, text)) in enumerate(
        zip(LEFT, RIGHT, strict=True)):
    y = -n - 0.45 * (n == 3)
    ax.text(2, y, f'"{key}": {value}', va="center", fontsize=7.5)
    ax.annotate("", (54, y), (47, y),
                arrowprops={"arrowstyle": "->", "color": colour})
    ax.barh(y, 45, 0.74, 55, color=colour, alpha=0.2)
    ax.text(56, y + 0.17, header, va="center", fontsize=7, color="0.3")
    ax.text(56, y - 0.2, text, va="center", fontsize=7.5)
for top, low, role in ((0.42, -2.42, "assistant"), (-3.03, -3.87, "tool")):
    ax.plot([1, 0, 0, 1], [top, top, low, low], color="0.3", lw=1)
    ax.text(-1, (top + low) / 2, role, rotation=90, ha="right", va="center",
            fontsize=8)
ax.set(xlim=(-5, 101), ylim=(-4.0, 1.0))
ax.text(0, 0.72, "dicts of a client", fontsize=8.5)
ax.text(55, 0.72, "messages of harmony", fontsize=8.5)
ax.set_axis_off()
plt.show()

# %% [markdown]
# What to see: one dict of an assistant can hold three things at once. Harmony
# has [one message for each](../text/conversation.ipynb), on a channel of its
# own and in a fixed order: first what was thought (grey), then what was said
# (orange), then what was called (blue). A tool's answer (green) names its call
# by an id in the dict, and by the function's name in harmony.

# %% [markdown]
# ## The twenty lines
#
# If every client wrote the same keys and made no mistake, this would be all:

# %%
from gptoss.text.harmony import Message


def plainly(messages: list[dict]) -> list[Message]:
    """Dicts as harmony messages, if all is as in the picture."""
    out, to = [], {}
    for message in messages:
        role, text = message["role"], message.get("content")
        if role == "tool":
            out.append(Message("tool", text, "commentary", "assistant",
                               name=to[message["tool_call_id"]]))
        elif role != "assistant":
            out.append(Message(role, text))
        else:
            calls = message.get("tool_calls", [])
            if message.get("reasoning"):
                out.append(Message(role, message["reasoning"], "analysis"))
            if text:
                out.append(Message(role, text,
                                   "commentary" if calls else "final"))
            for call in calls:
                function = call["function"]
                to[call["id"]] = f"functions.{function['name']}"
                out.append(Message(role, function["arguments"], "commentary",
                                   to[call["id"]], "<|constrain|>json"))
    return out


calling = {"role": "assistant", "reasoning": "Multiply.", "tool_calls": [
    {"id": "call_1", "type": "function", "function": {
        "name": "calculator", "arguments": '{"expression": "6*7"}'}}]}
talk = [{"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Six times seven?"}, calling,
        {"role": "tool", "tool_call_id": "call_1", "content": "42"}]
for message in plainly(talk):
    print(message.role, message.channel, message.recipient, message.content)

# %% [markdown]
# Now five clients send the same thought, each under the key of its own
# interface: `reasoning` here and in vLLM, `reasoning_content` in llama.cpp,
# `thinking` in ollama and in the released chat template, lists of pieces in
# OpenRouter (`reasoning_details`) and LiteLLM (`thinking_blocks`). And one
# client misspells a key.

# %%
FIVE = [{"reasoning": "Add."}, {"reasoning_content": "Add."},
        {"thinking": "Add."},
        {"reasoning_details": [{"type": "reasoning.text", "text": "Add."}]},
        {"thinking_blocks": [{"type": "thinking", "thinking": "Add."}]}]
heard = [plainly([{"role": "assistant", "content": "5"} | keys])
         for keys in FIVE]
print(sum(len(messages) == 2 for messages in heard), "of", len(FIVE),
      "thoughts arrive")
print(plainly([{"role": "user", "contents": "Hello"}])[0].content)

# %% [markdown]
# Nothing failed, and that is the trouble: a text that is left out without a
# word changes the conversation. So the reader of this chapter has one rule:
#
# > Read every key that says something to the model. A key that says nothing
# > to any model may pass. Any other key that holds something is refused, by
# > its place and its name.
#
# A list of dicts comes in three dresses: as plain dicts of OpenAI's chat
# interface, as objects of its clients (they have a method `model_dump()`,
# which gives the dict), and as items of its Responses interface, one item for
# each thought and each call. We read all three.

# %% [markdown]
# ## Code
#
# ### How is a refusal worded?
#
# Each one is a `ChatError`, and says where, what was expected and what was
# found: `messages[1].content: expected a string or a list of text parts, found
# 7`. Its three parts are those of
# [the package's one helper](../weights/config.ipynb), `expect`. `require` is
# that helper with this chapter's error. Only None reads differently here: a
# key that nobody sent is "found nothing".

# %% tags=["export"]
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from gptoss.text.harmony import Message, developer_message
from gptoss.weights.errors import Error, expect, mismatch

# %% tags=["export"]
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

# %% [markdown]
# `only_keys` is the rule above: an empty value (None, False, an empty text,
# list or dict) may stand under any key, a key in `_IDLE` holds what concerns
# the client alone, and what remains must be in `keys`.
#
# ### What is a text?
#
# A string, or a list of parts, which are joined without a space. Three
# interfaces call their parts by four names:

# %% tags=["export"]
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
# A lone surrogate, half of a character (`"\ud800"`), is refused as well: no
# UTF-8 can hold it, so the tokenizer could not read it.
#
# ### What did the model think?
#
# The five keys are read one after the other. A client may send the same
# thought under two of them: then it counts once. Two different thoughts are a
# contradiction, and refused. Entries of a list are joined; one that is
# encrypted cannot be read, and is refused, too.

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

# %% [markdown]
# ### What did it call?
#
# A call has an id, a type that is `function` or missing, and a function's name
# with its arguments: a *string* of JSON, which we hand on as it is. The name
# becomes a part of the message's header, so it may hold only what a header can
# (letters, digits, `_`, `.`, `-`, at most 64). A model may write any name; one
# that it made up is turned into a possible one by `possible_name`.

# %% tags=["export"]
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

# %%
for name in ("weather.now", "two words", ""):
    print(repr(name), "->", possible_name(name))

# %% [markdown]
# ### In which order, and on which channels?
#
# One dict has one place for what was said. But harmony's assistant can speak
# on two channels: before a call, or between two thoughts, it may tell the user
# on `commentary` what it is about to do. That is called a *preamble*. The
# content of a dict with calls is one; any other is marked, as in OpenAI's
# Responses, by `phase: "commentary"`. Without a mark a content is the answer.
# A refusal ("I cannot help with that") is an answer, too, and stands behind
# the content after an empty line. And a dict without content is no answer:
# somebody who was cut off while thinking has not answered with nothing.

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

# %%
plan = {"role": "assistant", "content": "Let me see.", "phase": "commentary"}
cut = {"role": "assistant", "content": None, "thinking": "Perhaps"}
for given in (calling, plan, cut):
    for message in _assistant(given, "messages[1]")[0]:
        print(message.channel, message.recipient, message.content)

# %% [markdown]
# ### Which result belongs to which call?
#
# Harmony has no ids: the model knows a result by its place behind the calls
# and by its function's name. Suppose that the weather of Oslo and then of Rome
# was called, and the result for Rome arrives first. Rendered as it comes, the
# model would read Rome's weather as Oslo's. So results wait until all are
# there, and are rendered in the order of the calls.

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

# %% [markdown]
# ### A whole conversation
#
# The items of the Responses interface say the same in smaller pieces.
# `_item` turns each into a dict of the chat interface:

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

# %% [markdown]
# Several items of calls in a row belong together, like the entries of one
# `tool_calls`: their results are waited for together. Once the first result
# has come, no more calls may. `_next` says this for one message, and
# `read_messages` for all of them. The system and developer messages at the
# head become *instructions*, a text that the caller puts into the developer
# message of the prompt ([settings](memory.ipynb) do it); a later one stays
# where it is, as a developer message of its own.

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

# %%
print(read_messages(talk)[0], [m.role for m in read_messages(talk)[1]])
found = [read_messages([talk[1], {"role": "assistant", "content": "5"} | keys,
                        talk[1]])[1] for keys in FIVE]
print(sum(len(messages) == 4 for messages in found), "of", len(FIVE),
      "thoughts arrive")

# %% [markdown]
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
# ## What is refused
#
# Everything that would be lost, and everything that a model could not answer.
# A line each:

# %%
REFUSED = [
    [],                                                   # nobody spoke
    [*talk[:2], {"role": "bot", "content": "Hi"}],        # an unknown role
    [{"role": "user"}],                                   # no text at all
    [{"role": "user", "content": "Hello", "text": "Hi"}],
    [{"role": "system", "content": "a", "name": "b"}],    # only users have one
    [*talk[:3], talk[1]],                                 # call_1 is open
    [*talk[:2], talk[3]],                                 # nobody called
    [*talk, talk[3]],                                     # answered twice
    [*talk[:3], talk[3] | {"name": "clock"}],             # another function
    [*talk[:2], calling | {"tool_calls": calling["tool_calls"] * 2}],
    [*talk[:2], {"role": "assistant", "content": "It is"}]]
for wrong in REFUSED:
    try:
        read_messages(wrong)
    except ChatError as error:
        print(f"{str(error):.77}")

# %% [markdown]
# The last refusal is a decision. Some interfaces take a final message of the
# assistant as a beginning that the model shall go on with. Rendered, that
# message has ended, and its author's next one would begin: the model would
# answer itself. We say so instead of guessing. The user or a tool must have
# the last word, and every call must be answered before anybody else speaks.

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
# - One dict of an assistant becomes up to three kinds of harmony messages:
#   thought, said, called, in this order.
# - Read every key that says something to the model; refuse, by its place and
#   name, every other that holds something.
# - Harmony knows a result by its place: results wait until all are there,
#   and go in the order of the calls.
# - A dict without content is no answer.

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
# ### Exercise 2
#
# An application puts a note of the system between two turns: "The user is now
# logged in." Where does the model read it, and as whose words? And where does
# it read one that stands at the very beginning?

# %% tags=["hide-cell"]
note = {"role": "system", "content": "The user is now logged in."}
for messages in ([note, talk[1]], [talk[1], {"role": "assistant",
                                             "content": "42"}, note, talk[1]]):
    head, said = read_messages(messages)
    print(repr(head), [(m.role, m.content) for m in said])
# At the head it is a part of the instructions, later a developer message at
# its place. Harmony's own system message is the provider's, not ours.

# %% [markdown]
# ### Exercise 3
#
# To save room, a client stores only `role` and `content` of each message.
# Which of its stored conversations does `read_messages` refuse, and which one
# does it read although something is lost?

# %% tags=["hide-cell"]
final = {"role": "assistant", "reasoning": "So 42.", "content": "It is 42."}
for messages in ([*talk, final, talk[1]], [talk[1], final, talk[1]]):
    stored = [{"role": m["role"], "content": m.get("content")}
              for m in messages]
    try:
        print(len(read_messages(messages)[1]), "messages become",
              len(read_messages(stored)[1]))
    except ChatError as error:
        print(error)
# A result without its call is noticed. A thought that was never sent cannot
# be. After an answer that does no harm, since a renderer drops old thoughts
# anyway; between a call and its answer the model needs them.

# %% [markdown]
# ## Sources
#
# - OpenAI, `docs/format.md` in openai/harmony: channels, preambles, calls and
#   their answers.
# - openai/openai-python, `src/openai/types/chat` and
#   `src/openai/types/responses`: the dicts and the items.
