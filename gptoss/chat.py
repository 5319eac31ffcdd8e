"""Choosing the next token

Generated from book/12_generate.py; edit the chapter, not this file.
"""

import ast
import dataclasses
import datetime
import functools
import inspect
import itertools
import json
import logging
import math
import random
import re
import reprlib
import time
import types
import typing
import warnings
import weakref
from collections.abc import (
    Callable,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from decimal import Context, Decimal, Inexact
from fractions import Fraction
from importlib.resources import files
from pathlib import Path

import torch

from gptoss.checkpoint import resolve
from gptoss.errors import Error, mismatch
from gptoss.generate import Sampler, generate
from gptoss.harmony import (
    CHANNELS,
    EFFORTS,
    Delta,
    Event,
    Malformed,
    Message,
    Opened,
    StreamParser,
    Tokenizer,
    Tool,
    ToolCall,
    developer_message,
    render,
    system_message,
)
from gptoss.model import GptOss

# --- A conversation: what a message may look like ----------------------------

_log = logging.getLogger("gptoss")


class ChatError(Error):
    """A message, a tool or an option that a chat cannot use."""


def _expect(fits: bool, where: str, expected: str, found: object) -> None:
    if not fits:
        said = "nothing" if found is None else reprlib.repr(found)
        raise mismatch(ChatError, where, expected, said)


# keys of clients that tell a model nothing
_IDLE = frozenset({
    "id", "object", "created", "created_at", "timestamp", "index", "status",
    "model", "finish_reason", "stop_reason", "usage", "logprobs",
    "cache_control"})


def _dict(value: object, where: str) -> Mapping:
    """`value`, a dict or an object that makes one by `model_dump()`."""
    dump = getattr(value, "model_dump", None)
    if callable(dump) and not isinstance(value, Mapping | type):
        value = dump()
    _expect(isinstance(value, Mapping), where, "a dict", value)
    return value


def _known(given: Mapping, keys: Sequence[str], where: str) -> None:
    """Refuse a key that holds something and would not be read."""
    for key, value in given.items():
        empty = value is None or value is False or (
            isinstance(value, str | list | tuple | Mapping) and not value)
        _expect(empty or key in keys or key in _IDLE, f"{where}.{key}",
                f"no keys but {', '.join(keys)}", value)


# type of a part -> the key with its text
_PARTS = {"text": "text", "input_text": "text", "output_text": "text",
          "refusal": "refusal"}


def _part(part: object, where: str) -> str:
    """The text of one part of a content."""
    part = _dict(part, where)
    kind = part.get("type")
    key = _PARTS.get(kind) if isinstance(kind, str) else None
    _expect(key is not None and isinstance(part.get(key), str), where,
            "{'type': 'text', 'text': ...}", part)
    _known(part, ("type", key), where)
    return part[key]


def _text(content: object, where: str) -> str:
    """The text of `content`, a string or a list of text parts."""
    if isinstance(content, list | tuple):
        content = "".join(_part(part, f"{where}[{n}]")
                          for n, part in enumerate(content))
    _expect(isinstance(content, str), where,
            "a string or a list of text parts", content)
    _expect(not re.search("[\ud800-\udfff]", content), where,
            "Unicode characters without lone surrogates", content)
    return content


# type of a piece of reasoning -> the key with its text
_PIECES = {"reasoning.text": "text", "reasoning.summary": "summary",
           "thinking": "thinking", "reasoning_text": "text",
           "summary_text": "text"}
_THOUGHTS = ("reasoning", "reasoning_content", "thinking",
             "reasoning_details", "thinking_blocks")


def _piece(piece: object, where: str) -> str:
    """The text of one entry of a list of reasoning."""
    piece = _dict(piece, where)
    kind = piece.get("type")
    if isinstance(kind, str) and kind in _PARTS:
        return _part(piece, where)
    key = _PIECES.get(kind) if isinstance(kind, str) else None
    _expect(key is not None, f"{where}.type",
            f"one of {', '.join(_PIECES)} (what is encrypted cannot be "
            "read)", kind)
    _known(piece, ("type", key, "signature", "format"), where)
    return _text(piece.get(key) or "", f"{where}.{key}")


def _thought(message: Mapping, where: str) -> str:
    """What the assistant thought, under whichever keys."""
    first, thought = "", ""
    for key in _THOUGHTS:
        found, at = message.get(key), f"{where}.{key}"
        if isinstance(found, list | tuple):
            found = "".join(_piece(piece, f"{at}[{n}]")
                            for n, piece in enumerate(found))
        found = _text("" if found is None else found, at)
        _expect(not (found and thought) or found.strip() == thought.strip(),
                at, f"the same as {first}, or only one of them", found)
        if found and not thought:
            first, thought = key, found
    return thought


_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_OTHER = re.compile(r"[^A-Za-z0-9_.-]")


def _name(name: object, where: str) -> str:
    _expect(isinstance(name, str) and bool(_NAME.fullmatch(name)), where,
            "1 to 64 letters, digits, _ . -", name)
    return name


def _call(call: object, where: str) -> tuple[str, Message]:
    """One entry of `tool_calls`: its id, and a message to the function."""
    call = _dict(call, where)
    _expect(isinstance(call.get("id"), str), f"{where}.id", "a string",
            call.get("id"))
    _expect(call.get("type", "function") == "function", f"{where}.type",
            "'function'", call.get("type"))
    _known(call, ("id", "type", "function"), where)
    function = _dict(call.get("function"), f"{where}.function")
    name = _name(function.get("name"), f"{where}.function.name")
    arguments = function.get("arguments")
    _expect(isinstance(arguments, str), f"{where}.function.arguments",
            "a string of JSON", arguments)
    _known(function, ("name", "arguments"), f"{where}.function")
    return call["id"], Message(
        "assistant", _text(arguments, f"{where}.arguments"), "commentary",
        f"functions.{name}", "<|constrain|>json")


_PHASES = {"commentary": "commentary", "final_answer": "final"}
_ASSISTANT = ("role", "content", "refusal", "phase", "name", "tool_calls",
              *_THOUGHTS)


def _assistant(message: Mapping, where: str
               ) -> tuple[list[Message], dict[str, str]]:
    """What the assistant thought, said and called, in this order; and the
    calls, id -> function."""
    _known(message, _ASSISTANT, where)
    calls, phase = message.get("tool_calls") or [], message.get("phase")
    _expect(isinstance(calls, list | tuple), f"{where}.tool_calls", "a list",
            calls)
    _expect(phase is None or phase in tuple(_PHASES), f"{where}.phase",
            f"one of {', '.join(_PHASES)}", phase)
    made = [_call(call, f"{where}.tool_calls[{n}]")
            for n, call in enumerate(calls)]
    known = {id_: call.recipient for id_, call in made}
    _expect(len(known) == len(made), f"{where}.tool_calls",
            "ids that differ", [id_ for id_, _ in made])
    said = "\n\n".join(filter(None, (
        _text(message[key], f"{where}.{key}")
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
    name = _name(message["name"], f"{where}.name")
    return [dataclasses.replace(each, name=name) for each in out]


class _Calls:
    """Calls that wait for their answers, id -> function."""

    def __init__(self) -> None:
        self.to: dict[str, str] = {}
        self.answers: dict[str, Message] = {}

    @property
    def open(self) -> list[str]:
        return [id_ for id_ in self.to if id_ not in self.answers]

    def answer(self, message: Mapping, where: str) -> list[Message]:
        """Takes a tool's message; all answers once none is missing."""
        _known(message, ("role", "content", "tool_call_id", "name"), where)
        known, found = ", ".join(self.open), message.get("tool_call_id")
        _expect(isinstance(found, str) and found in self.open,
                f"{where}.tool_call_id",
                f"the id of an open call ({known or 'there is none'})", found)
        to, name = self.to[found], message.get("name")
        _expect(name in (None, "", to, to.removeprefix("functions.")),
                f"{where}.name", f"{to}, which was called", name)
        self.answers[found] = Message(
            "tool", _text(message.get("content"), f"{where}.content"),
            "commentary", "assistant", name=to)
        if self.open:
            return []
        answers = [self.answers[id_] for id_ in self.to]
        self.to, self.answers = {}, {}
        return answers


def _item(item: Mapping, where: str) -> Mapping:
    """A message, or an item of OpenAI's Responses interface as one."""
    kind = item.get("type") or "message"
    if kind == "message":
        return {key: item[key] for key in item if key != "type"}
    if kind == "reasoning":
        _known(item, ("type", "summary", "content"), where)
        pieces = [item.get(key) or [] for key in ("summary", "content")]
        _expect(all(isinstance(each, list) for each in pieces), where,
                "lists as summary and content", pieces)
        return {"role": "assistant", "reasoning_details": sum(pieces, [])}
    if kind == "function_call":
        _known(item, ("type", "call_id", "name", "arguments"), where)
        return {"role": "assistant", "tool_calls": [
            {"id": item.get("call_id"), "function": {
                key: item.get(key) for key in ("name", "arguments")}}]}
    _expect(kind == "function_call_output", f"{where}.type", "one of message,"
            " reasoning, function_call, function_call_output", kind)
    _known(item, ("type", "call_id", "output"), where)
    return {"role": "tool", "tool_call_id": item.get("call_id"),
            "content": item.get("output")}


_SPEAKERS = ("system", "developer", "user", "assistant", "tool")


def _told(message: Mapping, where: str) -> Message:
    """What a system, developer or user message says."""
    role = message["role"]
    _known(message, ("role", "content") + ("name",) * (role == "user"),
           where)
    text = _text(message.get("content"), f"{where}.content")
    return _named([Message(role, text)], message, where)[0]


def _next(item: Mapping, where: str, calls: _Calls) -> list[Message]:
    """What a message adds to the conversation, in which `calls` wait."""
    message = _item(item, where)
    role = message.get("role")
    _expect(role in _SPEAKERS, f"{where}.role",
            f"one of {', '.join(_SPEAKERS)}", role)
    if role == "tool":
        return calls.answer(message, where)
    more = item.get("type") == "function_call" and not calls.answers
    _expect(more or not calls.open, f"{where}.role",
            f"'tool', to answer {', '.join(calls.open)}", role)
    if role != "assistant":
        return [_told(message, where)]
    out, made = _assistant(message, where)
    _expect(not made.keys() & calls.to.keys(), f"{where}.call_id",
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
    _expect(isinstance(messages, list | tuple) and len(messages) > 0,
            "messages", "a list of at least one dict", messages)
    head, out, calls, heading = [], [], _Calls(), True
    for n, item in enumerate(messages):
        item = _dict(item, where := f"messages[{n}]")
        for message in _next(item, where, calls):
            told = message.role in ("system", "developer")
            heading = heading and told
            if heading:
                head.append(message.content)
            else:
                out.append(developer_message(message.content) if told
                           else message)
    last = _item(item, where).get("role")
    _expect(last in ("user", "tool") and not calls.open, f"{where}.role",
            "the user or a tool to speak last" + (
                f" (not answered: {', '.join(calls.open)})"
                if calls.open else ""), last)
    return "\n\n".join(filter(None, head)), out



def _call_ids(messages: Sequence[object]) -> list[str]:
    """The ids of all calls in `messages`, which are right."""
    dicts = [_dict(each, "messages") for each in messages]
    return [_dict(call, "tool_calls")["id"] for each in dicts
            for call in _item(each, "messages").get("tool_calls") or ()]


# --- A function's type hints as a schema -------------------------------------

_UNIONS = (typing.Union, types.UnionType)
_WRAPPERS = (typing.Required, typing.NotRequired)


def _type_hints(owner: object, where: str) -> dict[str, object]:
    try:
        return typing.get_type_hints(owner, include_extras=True)
    except RecursionError:
        raise
    except Exception as error:  # hints may be any text
        raise ChatError(f"{where}: {error}") from error


def _fields(hint: object) -> tuple[dict[str, object], set[str]] | None:
    """Hints and required keys of a dataclass or TypedDict, else None."""
    from typing_extensions import is_typeddict

    if is_typeddict(hint):
        return _type_hints(hint, hint.__name__), set(hint.__required_keys__)
    if not (isinstance(hint, type) and dataclasses.is_dataclass(hint)
            ) or hasattr(hint, "__pydantic_core_schema__"):
        return None
    hints = _type_hints(hint, hint.__name__)
    made = [field for field in dataclasses.fields(hint) if field.init]
    return ({field.name: hints[field.name] for field in made},
            {field.name for field in made
             if field.default is field.default_factory is
             dataclasses.MISSING})


def _record(name: str, hints: Mapping[str, object],
            required: Iterable[str]) -> type:
    """The type of a strict object with these keys, for pydantic."""
    from pydantic import ConfigDict
    from typing_extensions import NotRequired, TypedDict  # noqa: UP035

    made = TypedDict(name, {
        key: _strict(hint) if key in required else NotRequired[_strict(hint)]
        for key, hint in hints.items()})
    made.__pydantic_config__ = ConfigDict(strict=True, extra="forbid")
    return made


def _strict(hint: object) -> object:
    """`hint` with strict records for its dataclasses and TypedDicts, and
    the text in an Annotated as its description."""
    from pydantic import AfterValidator, Field

    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in _WRAPPERS:
        return _strict(inside[0])
    if (fields := _fields(hint)) is not None:
        record = _record(hint.__name__, *fields)
        return (typing.Annotated[record, AfterValidator(
            lambda values: hint(**values))]
            if dataclasses.is_dataclass(hint) else record)
    if origin is typing.Annotated:
        first, *notes = inside
        return typing.Annotated[(_strict(first), *(
            Field(description=note) if isinstance(note, str) else note
            for note in notes))]
    changed = tuple(map(_strict, inside))
    if origin is typing.Literal or changed == inside:
        return hint
    return (typing.Union if origin in _UNIONS else origin)[changed]


_PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean"}
_FORMATS = {"date": "YYYY-MM-DD", "time": "HH:MM:SS", "duration":
            "ISO 8601, as PT1H30M", "date-time": "YYYY-MM-DDTHH:MM:SS"}


def _either(variants: Sequence[dict]) -> dict:
    """The schema of a choice; null among `variants` makes it nullable."""
    some = [each for each in variants if each != {"type": "null"}]
    some = [each for n, each in enumerate(some) if each not in some[:n]]
    if len(some) == 1:
        schema = some[0]
    elif some and all(list(each) == ["type"] for each in some):
        schema = {"type": [each["type"] for each in some]}
    else:
        schema = {"oneOf": some}
    nullable = {"type": "null"} in variants
    return schema | ({"nullable": True} if nullable else {})


def _spelt(schema: dict, about: str | None = None) -> dict:
    """`schema` of an argument; the way to write a date in its description,
    which is `about` if it has none."""
    told, how = schema.get("description"), _FORMATS.get(schema.get("format"))
    told = (None if told == how else told) or about
    if how and not (told or "").endswith(f"({how})"):
        told = f"{told} ({how})" if told else how
    return schema | ({"description": told} if told else {})


def _flat(schema: dict, defs: Mapping[str, dict], inside: tuple = ()
          ) -> dict:
    """pydantic's `schema` as harmony can show it; `inside`: the classes
    that it is a part of. RecursionError if it contains itself."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        if name in inside:
            raise RecursionError(name)
        own = {key: defs[name][key] for key in defs[name] if key != "title"}
        return _flat(own | {key: schema[key] for key in schema
                            if key != "$ref"}, defs, (*inside, name))
    flat = functools.partial(_flat, defs=defs, inside=inside)
    schema = {key: value for key, value in schema.items()
              if key != "discriminator" and (key, value) not in (
                  ("items", {}), ("additionalProperties", True))}
    for key in ("anyOf", "oneOf"):
        if key in schema:
            choice = _either([flat(each) for each in schema.pop(key)])
            schema = choice | schema
    if "prefixItems" in schema:
        schema["items"] = _either([flat(each) for each in
                                   schema.pop("prefixItems")])
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            schema[key] = flat(schema[key])
    if "properties" in schema:
        schema["properties"] = {
            key: _spelt(_bare(flat(each)))
            for key, each in schema["properties"].items()}
    return _listed(schema)


def _bare(schema: dict) -> dict:
    """Without a default of None: that it may be left out says as much."""
    return {key: value for key, value in schema.items()
            if (key, value) != ("default", None)}


def _listed(schema: dict) -> dict:
    """A constant as an enum of one; the type of an enum's values."""
    if "const" in schema:
        schema = schema | {"enum": [schema.pop("const")]}
    if "enum" in schema and "type" not in schema:
        names = [_PLAIN.get(type(value)) for value in schema["enum"]]
        names = list(dict.fromkeys(filter(None, names)))
        schema["type"] = names[0] if len(names) == 1 else names
    return schema


@functools.cache
def _schema_maker() -> type:
    """pydantic's maker of schemas, without what nobody has written."""
    from pydantic.json_schema import GenerateJsonSchema

    class Maker(GenerateJsonSchema):
        ignored_warning_kinds = {"skipped-choice",
                                 "non-serializable-default"}

        def field_title_should_be_set(self, schema) -> bool:
            return False

        def typed_dict_schema(self, schema) -> dict:
            made = super().typed_dict_schema(schema)
            made.pop("description", None)  # as of a dataclass
            return made
    return Maker


class _Types:
    """JSON values of an object with the keys of `hints`."""

    def __init__(self, hints: Mapping[str, object], required: Iterable[str],
                 where: str) -> None:
        from pydantic import TypeAdapter

        try:
            self._adapter = TypeAdapter(_record("values", hints, required))
            schema = self._adapter.json_schema(
                schema_generator=_schema_maker())
            self.schema = _flat(schema, schema.get("$defs", {}))
        except ChatError:
            raise
        except RecursionError:
            raise ChatError(f"{where}: expected type hints that end, found "
                            "one that contains itself") from None
        except Exception as error:  # pydantic has many
            raise ChatError(f"{where}: expected type hints that JSON can "
                            f"hold, found {[*hints.values()]}") from error
        for key in ("title", "$defs"):
            self.schema.pop(key, None)
        self.schema.setdefault("properties", {})
        self.schema.setdefault("required", [])


def json_schema(hint: object, where: str = "hint") -> dict:
    """The JSON schema of a type hint, as harmony can show it.

    Whatever pydantic takes: plain types, Any, Literal, enums, Optional and
    unions, lists, tuples, sets, dicts, dates, dataclasses, TypedDict,
    models, and Annotated[hint, "what it is"]. Raises ChatError at `where`
    for anything else, and for a type that contains itself.
    """
    schema = _Types({"value": hint}, ["value"], where).schema
    return schema["properties"]["value"]


_WANTED = {
    "missing": "a value", "none_required": "null", "bool_type": "a boolean",
    **dict.fromkeys(("int_type", "int_from_float"), "an integer"),
    "float_type": "a number", "string_type": "a string",
    **dict.fromkeys(("list_type", "tuple_type", "set_type",
                     "frozen_set_type"), "an array"),
    **dict.fromkeys(("dict_type", "model_type", "mapping_type"),
                    "an object"),
    **dict.fromkeys(("extra_forbidden", "unexpected_keyword_argument"),
                    "no keys but")}


def _place(value: object, way: Sequence[object], missing: bool
           ) -> tuple[str, Sequence[object]]:
    """Where `way` leads in `value`, written behind its name; the keys."""
    place, keys = "", []
    for n, step in enumerate(way):
        if isinstance(value, dict) and step in value:
            place, value = f"{place}.{step}", value[step]
        elif (isinstance(value, list) and isinstance(step, int)
              and step < len(value)):
            place, value = f"{place}[{step}]", value[step]
        elif missing and n == len(way) - 1:
            place += f".{step}"
        else:
            continue  # the name of a branch
        keys.append(step)
    return place, keys


def _known_keys(schema: dict, keys: Sequence[object]) -> str:
    """The keys of the object at the end of `keys`, if that is certain."""
    for key in keys:
        schema = (schema.get("properties", {}).get(key) or schema.get("items")
                  or schema.get("additionalProperties") or {})
    return ", ".join(schema.get("properties", ())) or "those of its type"


def _fault(fault: Mapping, value: object, schema: dict
           ) -> tuple[str, str, object]:
    """Place, what was expected there, what was found."""
    kind, way, found = fault["type"], fault["loc"], fault["input"]
    wanted = _WANTED.get(kind)
    if wanted == "no keys but":
        place, keys = _place(value, way[:-1], False)
        known = _known_keys(schema, keys) if schema["properties"] else "none"
        return place, f"{wanted} {known}", way[-1]
    if kind == "missing":
        found = None
    message = fault["msg"].removeprefix("Input should be ")
    if message == fault["msg"]:  # of a validator of the type's own
        message = f"a value that fits ({message})"
    return _place(value, way, kind == "missing")[0], wanted or message, found


def _fit(types_: _Types, value: object, where: str, skip: str = "") -> dict:
    """JSON `value` as the types say; ChatError names what does not fit,
    `where` and its place there without `skip`."""
    from pydantic import ValidationError

    try:
        return types_._adapter.validate_json(json.dumps(_whole(value)))
    except ValidationError as error:
        faults: dict[tuple[str, str], list[str]] = {}
        for each in error.errors(include_url=False):
            place, wanted, found = _fault(each, value, types_.schema)
            shown = "nothing" if found is None else reprlib.repr(found)
            faults.setdefault((place, shown), []).append(wanted)
    raise ChatError("; ".join(
        f"{where}{place.removeprefix(skip)}: expected "
        f"{' or '.join(dict.fromkeys(wanted))}, found {shown}"
        for (place, shown), wanted in list(faults.items())[:3]))


def _whole(value: object) -> object:
    """`value` with 3.0 as 3: to JSON both are integers."""
    if isinstance(value, dict):
        return {key: _whole(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return list(map(_whole, value))
    whole = isinstance(value, float) and value.is_integer()
    return int(value) if whole else value


def fit(value: object, hint: object, where: str = "arguments") -> object:
    """JSON `value` as `hint` says: dataclasses made, 3.0 an int.

    The inverse of what `json_schema` allows. Raises ChatError at `where`.
    """
    types_ = _Types({"value": hint}, ["value"], where)
    return _fit(types_, {"value": value}, where, ".value")["value"]


# --- Tools -------------------------------------------------------------------

_SECTION = re.compile(r"^(Args|Arguments|Returns|Raises|Yields|Examples?):"
                      r"[ \t]*$", re.MULTILINE)
_ARGUMENT = re.compile(r"^[ \t]+(\w+)(?: *\([^)]*\))?: *"
                       r"(.+(?:\n[ \t]{6,}\S.*)*)$", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Offer:
    """A tool, and how it is run; run None: the caller of the chat does."""

    tool: Tool
    run: Callable[[str], str] | None = None


def _docs(function: Callable) -> tuple[str, dict[str, str]]:
    """What a docstring says of the function and, under Args, of each."""
    about, *rest = _SECTION.split(inspect.getdoc(function) or "")
    sections = dict(zip(rest[::2], rest[1::2], strict=True))
    listed = sections.get("Args") or sections.get("Arguments") or ""
    return about.strip(), {name: " ".join(text.split()) for name, text
                           in _ARGUMENT.findall(listed)}


def _inner(function: Callable) -> Callable:
    """What has the hints and the docstring of `function`."""
    while isinstance(function, functools.partial):
        function = function.func
    return (function if inspect.isroutine(function)
            else type(function).__call__)


def _tool_name(function: object, name: str | None) -> str:
    """`name`, or the function's; ChatError says why there is none."""
    _expect(callable(function), "tools", "a function or a dict", function)
    _expect(not isinstance(function, type), "tools", "a function, not a "
            "class", function)
    while isinstance(function, functools.partial):
        function = function.func
    own = getattr(function, "__name__", type(function).__name__)
    _expect(name is not None or own != "<lambda>", "tools", "a function with "
            "a name, which a lambda has not: use def", own)
    return _name(own if name is None else name, "tools, name of a function")


def _hints(function: Callable, name: str
           ) -> tuple[dict[str, object], dict[str, object]]:
    """The hint of each argument, and the defaults; ChatError without."""
    hints, given = _type_hints(_inner(function), f"tool {name}"), function
    filled: set[str] = set()
    while isinstance(given, functools.partial):
        filled |= given.keywords.keys()
        given = given.func
    try:
        asked = inspect.signature(function).parameters
    except ValueError as error:  # as of many that are written in C
        raise ChatError(f"tool {name}: {error}") from error
    asked = {key: asked[key] for key in asked if key not in filled}
    for key, argument in asked.items():
        _expect(argument.kind in (argument.POSITIONAL_OR_KEYWORD,
                                  argument.KEYWORD_ONLY),
                f"tool {name}, {key}",
                "an argument that can be given by name", str(argument))
        _expect(key in hints, f"tool {name}, {key}", "a type hint", None)
    return {key: hints[key] for key in asked}, {
        key: argument.default for key, argument in asked.items()
        if argument.default is not argument.empty}


def _jsonable(value: object, unknown: Callable | None = None) -> object:
    """`value` in terms of JSON; `unknown` is for what has none."""
    from pydantic_core import to_jsonable_python

    return to_jsonable_python(value, fallback=unknown)


def _as_text(value: object) -> str:
    """What a function returned, for the model: text, or else JSON."""
    if isinstance(value, Iterator):
        value = list(value)
    if not isinstance(value, str):
        try:
            value = json.dumps(value, ensure_ascii=False)
        except (TypeError, ValueError):
            try:
                value = json.dumps(_jsonable(value, str), ensure_ascii=False)
            except (TypeError, ValueError):  # as a list that holds itself
                value = str(value)
    return value.encode("utf-8", "replace").decode("utf-8")


def _why(error: BaseException) -> str:
    """An exception in a line for the model; its str() may fail."""
    try:
        text = str(error)
    except Exception:
        text = ""
    kind = "" if isinstance(error, ChatError) else type(error).__name__
    return "error: " + ": ".join(filter(None, (kind, text)))


class ToolTimeout(Exception):
    """A tool has not answered in time."""


def _in_thread(work: Callable[[], object], timeout: float | None) -> object:
    """work(), in a thread that is left alone after `timeout` seconds."""
    import contextvars
    from queue import Empty, SimpleQueue
    from threading import Thread

    done: SimpleQueue = SimpleQueue()

    def run() -> None:
        try:
            done.put((work(), None))
        except BaseException as error:
            done.put((None, error))

    Thread(target=contextvars.copy_context().run, args=(run,), daemon=True,
           name="gptoss tool").start()
    try:
        value, error = done.get(timeout=timeout)
    except Empty:
        raise ToolTimeout(f"timed out after {timeout:g} s") from None
    if error is not None:
        raise error
    return value


async def _awaited(value: object, timeout: float | None) -> object:
    """What `value` comes to; cancelled after `timeout` seconds."""
    import asyncio

    task = asyncio.ensure_future(value)
    await asyncio.wait({task}, timeout=timeout)
    if not task.done():  # it is cancelled when its loop ends
        raise ToolTimeout(f"timed out after {timeout:g} s")
    return task.result()


def perform(function: Callable, values: Mapping[str, object],
            timeout: float | None = None) -> object:
    """function(**values), awaited if need be.

    In a thread if there is a `timeout`, else here. Raises ToolTimeout, and
    whatever the function raises.
    """
    import asyncio

    def work() -> object:
        value = function(**values)
        if not inspect.isawaitable(value):
            return value

        def wait() -> object:
            return asyncio.run(_awaited(value, timeout))

        return _in_thread(wait, timeout) if _loop_runs() else wait()
    return work() if timeout is None else _in_thread(work, timeout)


def _loop_runs() -> bool:
    """Whether this thread is inside an event loop."""
    import asyncio

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _not_json(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _describe(function: Callable, name: str, types_: _Types,
              defaults: Mapping[str, object]) -> Tool:
    """A function as it is told to the model."""
    about, told = _docs(function if inspect.isroutine(function)
                        else _inner(function))
    schema = dict(types_.schema)
    schema["properties"] = {
        key: _spelt(entry, told.get(key))
        for key, entry in schema["properties"].items()}
    for key, default in defaults.items():
        entry = schema["properties"][key]
        try:
            default = _jsonable(default)
        except Exception:  # no JSON has it: the model need not know
            continue
        if isinstance(default, str | int) or (
                isinstance(default, float) and math.isfinite(default)):
            entry.setdefault("default", default)
    return Tool(name, about, schema if schema["properties"] else None)


def function_tool(function: Callable, *, name: str | None = None,
                  timeout: float | None = None) -> Offer:
    """Offers a Python function with type hints; see `json_schema`.

    Also an async one, a partial, a bound method, an object that can be
    called. name: instead of its own. timeout: seconds that it may take; one
    that is late goes on in its thread, and its result is dropped. What it
    raises is told to the model, and logged with a traceback as "gptoss".
    """
    name = _tool_name(function, name)
    hints, defaults = _hints(function, name)
    for key, hint in hints.items():  # so that an error names the argument
        json_schema(hint, f"tool {name}, {key}")
    types_ = _Types(hints, hints.keys() - defaults.keys(), f"tool {name}")

    def run(arguments: str) -> str:
        try:
            values = _fit(types_, json.loads(
                arguments.strip() or "{}", parse_constant=_not_json),
                "arguments")
        except Exception as error:  # the model's own mistake
            return _as_text(_why(error))
        try:
            return _as_text(perform(function, values, timeout))
        except ToolTimeout as error:
            _log.warning("gptoss: tool %s %s; its thread goes on", name,
                         error)
            return f"error: {error}"
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit too: it is the tool's
            _log.error("gptoss: tool %s failed", name, exc_info=error)
            return _as_text(_why(error))
    return Offer(_describe(function, name, types_, defaults), run)


def _dict_tool(given: object, where: str) -> Tool:
    """A tool that a dict describes, in either of OpenAI's shapes."""
    given = _dict(given, where)
    _expect(given.get("type", "function") == "function", f"{where}.type",
            "'function' (built-in tools are not run here)",
            given.get("type"))
    if "name" not in given or "function" in given:  # not the flat one
        _known(given, ("type", "function"), where)
        where = f"{where}.function"
        given = _dict(given.get("function"), where)
    _known(given, ("type", "name", "description", "parameters", "strict"),
           where)
    name, schema = given.get("name"), given.get("parameters")
    _name(name, f"{where}.name")
    _expect(isinstance(schema, Mapping | None), f"{where}.parameters",
            "a JSON schema", schema)
    try:
        json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ChatError(f"{where}.parameters: expected JSON, found "
                        f"{error}") from None
    return Tool(name, _text(given.get("description") or "",
                            f"{where}.description"), schema)


def read_tools(tools: Iterable[object], timeout: float | None = None
               ) -> dict[str, Offer]:
    """Functions, offers and dicts by their name.

    A dict is {"type": "function", "function": {"name", "description",
    "parameters"}}, or flat: {"type": "function", "name", ...}. timeout: of
    the functions. Raises ChatError for another shape, a built-in tool, or a
    name used twice.
    """
    offers: dict[str, Offer] = {}
    for n, given in enumerate(tools):
        if isinstance(given, Offer):
            offer = given
        elif isinstance(given, Mapping) or (hasattr(given, "model_dump")
                                            and not callable(given)):
            offer = Offer(_dict_tool(given, f"tools[{n}]"))
        else:
            offer = function_tool(given, timeout=timeout)
        _expect(offer.tool.name not in offers, f"tools[{n}]",
                "a name of its own", offer.tool.name)
        offers[offer.tool.name] = offer
    return offers


# --- Two tools that can do no harm -------------------------------------------

_BITS = 1024  # of numerator and denominator: about 300 digits
_BINARY = {ast.Add: Fraction.__add__, ast.Sub: Fraction.__sub__,
           ast.Mult: Fraction.__mul__, ast.Div: Fraction.__truediv__,
           ast.FloorDiv: Fraction.__floordiv__, ast.Mod: Fraction.__mod__}


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(),
           value.denominator.bit_length()) > _BITS:
        raise ValueError("a number of more than 300 digits")
    return value


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise ValueError("** takes whole exponents only")
    size = max(base.numerator.bit_length(), base.denominator.bit_length())
    if (size - 1) * abs(exponent.numerator) > _BITS:
        raise ValueError("a number of more than 300 digits")
    return base ** exponent.numerator


def _evaluate(node: ast.expr, source: str) -> Fraction:
    """The exact value of a syntax tree of numbers and operators."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        text = ast.get_source_segment(source, node)
        number = (Decimal(node.value) if type(node.value) is int
                  else Decimal(text))  # as written: 0.1 is a tenth
        if abs(number.adjusted()) > 300:
            raise ValueError("a number of more than 300 digits")
        return Fraction(number)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op,
                                                    ast.USub | ast.UAdd):
        value = _evaluate(node.operand, source)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in {*_BINARY, ast.Pow}:
        run = _BINARY.get(type(node.op), _power)
        return _bounded(Fraction(run(_evaluate(node.left, source),
                                     _evaluate(node.right, source))))
    raise ValueError("expected numbers, + - * / // % ** and parentheses, "
                     f"found {ast.unparse(node)[:40]!r}")


def _decimal(value: Fraction) -> str:
    """Exact if that ends within 300 digits, else 15 digits and "..."."""
    context = Context(prec=700)  # 309 digits before the point, 300 behind
    exact = context.divide(Decimal(value.numerator),
                           Decimal(value.denominator))
    if context.flags[Inexact] or exact.as_tuple().exponent < -300:
        return f"{float(value):.15g}..."
    return f"{exact:f}"


def calculator(expression: str) -> str:
    """Work out an arithmetic expression.

    Args:
        expression: what to work out
    """
    text = expression.strip()  # + - * / // % ** and parentheses
    try:
        if len(text) > 300:
            raise ValueError("more than 300 characters")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the parser, about spelling
            tree = ast.parse(text, mode="eval")
        return _decimal(_evaluate(tree.body, text))
    except ZeroDivisionError:
        return "error: division by zero"
    except SyntaxError as error:
        return f"error: {error.msg}"
    except (ValueError, ArithmeticError, MemoryError,
            RecursionError) as error:
        return f"error: {error or 'too deeply nested'}"


def today() -> str:
    """The date of today."""
    return datetime.date.today().isoformat()


TOOLS = {"calculator": calculator, "today": today}


# --- The cache and the tokens in it ------------------------------------------

def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens at the beginning of `a` and `b` are the same."""
    for n, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return n
    return min(len(a), len(b))


class Memory:
    """A cache of batch 1 and the tokens whose keys and values it holds.

    `slack`: slots of the rings beyond the window; so many tokens plus one
    can be taken back without feeding older ones again.
    """

    def __init__(self, model: GptOss, slack: int = 0) -> None:
        self.model = model
        self.cache = model.new_cache(slack=slack)
        self.tokens: list[int] = []  # fed, or to be fed next
        self.fed = 0  # tokens fed so far that were not written here
        self.left = 0  # tokens of the prompt that are still to be fed
        self._full = 0  # tokens that the full layers hold, if that is more

    def resume(self, prompt: Sequence[int]) -> int:
        """Keep what the cache shares with `prompt`; return where to feed
        from. At least the last token is fed: its logits are needed."""
        held = max(self.cache.length, self._full)
        shared = min(common_prefix(prompt, self.tokens[:held]),
                     len(prompt) - 1)
        start = self.cache.rollback(shared)
        self.tokens, self._full = list(prompt), shared
        return start

    def write(self, prompt: Sequence[int], **options
              ) -> Iterator[int | None]:
        """`generate` after `prompt`, feeding only what must be fed; with
        its pauses, after which `self.left` tokens are still to be fed."""
        start = self.resume(prompt)
        self.left = len(prompt) - start
        for token in generate(self.model, prompt[start:], cache=self.cache,
                              pauses=True, **options):
            left = len(prompt) - self.cache.length if token is None else 0
            self.fed, self.left = self.fed + self.left - left, left
            if token is not None:
                self.tokens.append(token)
            yield token


# --- What happened -----------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Usage:
    """What a turn took.

    finish_reason: "stop", "length" or "tool_calls"; "stopped" if it was
    left before its end. prompt_tokens: of the conversation before it.
    prefilled_tokens: how many of these, and of the answers of tools, had to
    be fed. generated_tokens: written by the model. seconds: wall time.
    """

    finish_reason: str
    prompt_tokens: int
    prefilled_tokens: int
    generated_tokens: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class ChatEvent:
    """One thing that happened in a turn.

    kind "analysis", "commentary", "final": `text` is the next piece of what
    the model writes there. "call": it calls tool `name` with the JSON in
    `text`; "result": what that gave. "notice": something was wrong with
    its output. "done": the end; `usage` is set, `text` the finish reason.
    "progress", for who asks: a part of the prompt was read, `text` is how
    many tokens are left to read.
    """

    kind: str
    text: str = ""
    name: str = ""
    usage: Usage | None = None


# --- A round -----------------------------------------------------------------

class Round:
    """What the model writes after a prompt, up to a call or its answer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._parser = StreamParser(tokenizer, role="assistant")
        self.said: list[list[str]] = []  # messages to no tool: channel, text
        self._to: str | None = None  # recipient of the message in progress
        self.call: ToolCall | None = None
        self.kept: list[dict] = []  # the call and its answer, for the history
        self.over = False  # what follows is not part of the round

    def feed(self, token: int) -> list[ChatEvent]:
        """The events that `token` causes."""
        return list(self._read(self._parser.feed(token)))

    def close(self) -> list[ChatEvent]:
        """The events that the end of the tokens causes."""
        return list(self._read(self._parser.close()))

    def text(self, channel: str) -> str:
        """All that was written in `channel` so far."""
        return "\n\n".join(text for where, text in self.said
                           if where == channel and text)

    def _read(self, events: Iterable[Event]) -> Iterator[ChatEvent]:
        for event in events:
            if isinstance(event, Opened):
                yield from self._opened(event.message)
            elif isinstance(event, Malformed):
                about = f": {event.text[:60]!r}" if event.text else ""
                yield ChatEvent("notice", event.reason + about)
            elif isinstance(event, ToolCall) and self.call is None:
                self.call, self.over = event, True
            elif isinstance(event, Delta) and self._to is None:
                self.said[-1][1] += event.text
                yield ChatEvent(self.said[-1][0], event.text)

    def _opened(self, message: Message) -> Iterator[ChatEvent]:
        self._to = message.recipient
        if message.role != "assistant":
            self._to, self.over = "nobody", True
            yield ChatEvent("notice", f"a message of {message.role!r}, "
                                      "written by the model")
        if self._to is None:
            kind = ("final" if message.channel is None else message.channel
                    if message.channel in CHANNELS else "analysis")
            if self.text(kind):  # a second one
                yield ChatEvent(kind, "\n\n")
            self.said.append([kind, ""])


def round_messages(round_: Round) -> list[dict]:
    """A round as OpenAI's dicts: what the assistant thought, said (marked
    `phase: "commentary"` if that was not the answer) and called, and the
    tool's answer if there is one. [] if nothing was written."""
    calls, answers, out = round_.kept[:1], round_.kept[1:], []
    open_ = None  # the dict that may still get a content, or calls
    for channel, text in round_.said:
        if not text:
            continue
        if channel == "analysis" or open_ is None or open_["content"]:
            open_ = {"role": "assistant", "content": None}
            out.append(open_)
        if channel == "analysis":
            open_["reasoning"] = text
        else:
            open_["content"] = text
        if channel == "commentary":
            open_["phase"] = channel
    if calls and (open_ is None or (open_["content"]
                                    and "phase" not in open_)):
        open_ = {"role": "assistant", "content": None}
        out.append(open_)
    if calls:
        open_.pop("phase", None)  # before a call it goes without saying
        open_["tool_calls"] = calls
    return out + answers


# --- Several processes, one decision -----------------------------------------

class Alone:
    """The link of a process by itself; see chapter 15 for another."""

    first = True

    def same(self, make: Callable[[], object]) -> object:
        """make() of the first process, as JSON has it, for all."""
        return make()


class Stopped(Exception):
    """The first process goes no further with this turn."""


class Agreement:
    """What the processes of a model ask the first while a turn lasts."""

    def __init__(self, link: Alone) -> None:
        self._link, self.open = link, True

    def ask(self, make: Callable[[], object]) -> object:
        """make() of the first process. What it raises ends the turn: that
        is raised there, and Stopped by the others."""
        failed: list[BaseException] = []

        def word() -> list:
            try:
                return [make()]
            except BaseException as error:
                failed.append(error)
                return []

        told = self._link.same(word)
        self.open = bool(told)
        if failed:
            raise failed[0]
        if not told:
            raise Stopped
        return told[0]

    def leave(self) -> None:
        """The first process leaves, and the others at their next question;
        they cannot leave first."""
        if self.open and self._link.first:
            self.open = False
            self._link.same(list)


# --- Settings ----------------------------------------------------------------

SLACK = 1024  # ring slots beyond the window; no longer turn needs a replay
STOPS = ("<|return|>", "<|call|>", "<|endoftext|>")


def load(model: str | Path | tuple[GptOss, Tokenizer] | None = None,
         dtype: torch.dtype = torch.bfloat16, device="cpu"
         ) -> tuple[GptOss, Tokenizer]:
    """Model and tokenizer of a folder or hub id; None: the shipped one."""
    if isinstance(model, tuple):
        return model
    folder = resolve(files("gptoss") / "pocket" if model is None else model)
    tokenizer = Tokenizer.from_pretrained(folder)  # the quick one first
    return (GptOss.from_pretrained(folder, dtype=dtype, device=device),
            tokenizer)


def _stops(tokenizer: Tokenizer) -> frozenset[int]:
    missing = [name for name in STOPS if name not in tokenizer.special]
    _expect(not missing, "tokenizer", f"the control tokens {STOPS}",
            f"none for {missing}")
    return frozenset(tokenizer.special[name] for name in STOPS)


class _Settings:
    """What a chat is made of, and the prompt that follows from it."""

    def __init__(self, model: str | Path | tuple[GptOss, Tokenizer] |
                 None = None, effort: str = "medium",
                 tools: Iterable[Callable | Mapping] = (), *,
                 instructions: str = "", date: str | None = None,
                 temperature: float = 1.0, top_k: int = 0,
                 top_p: float = 1.0, seed: int | None = None,
                 max_new_tokens: int | None = None, rounds: int = 8,
                 slack: int = SLACK, dtype: torch.dtype = torch.bfloat16,
                 device="cpu", tool_timeout: float | None = None,
                 prefill_chunk: int = 512) -> None:
        for name, value, least in (("max_new_tokens", max_new_tokens, 1),
                                   ("seed", seed, 0), ("rounds", rounds, 0),
                                   ("slack", slack, 0),
                                   ("prefill_chunk", prefill_chunk, 1)):
            _expect(value is None or type(value) is int and value >= least,
                    name, f"an integer >= {least}", value)
        _expect(tool_timeout is None or type(tool_timeout) in (int, float)
                and 0 < tool_timeout < 1e6, "tool_timeout",
                "seconds > 0", tool_timeout)
        self.effort, self.offers = effort, read_tools(tools, tool_timeout)
        self.instructions = _text(instructions, "instructions")
        self.date = "" if date is None else _text(date, "date")
        self.sampler = Sampler(temperature, top_k, top_p)
        self._head()
        self.max_new_tokens, self.rounds = max_new_tokens, rounds
        self._seed, self._slack, self._chunk = seed, slack, prefill_chunk
        self.model, self.tokenizer = load(model, dtype, device)
        self._link = getattr(self.model, "group", None) or Alone()
        if date is None:
            self.date = self._link.same(today)
        self._stop = _stops(self.tokenizer)
        self.reset()

    def reset(self) -> None:
        """Forget the cache; a seed begins anew."""
        self.memory = Memory(self.model, self._slack)
        self._random = random.Random(self._seed)

    def _head(self, instructions: str = "") -> list[Message]:
        """The system message and, if it says anything, the developer's."""
        _expect(self.effort in EFFORTS, "effort",
                f"one of {', '.join(EFFORTS)}", self.effort)
        tools = [offer.tool for offer in self.offers.values()]
        text = "\n\n".join(filter(None, (self.instructions, instructions)))
        both = (system_message(self.effort, self.date or None, bool(tools)),
                developer_message(text, tools))
        return [message for message in both if message.content]

    def prompt(self, messages: Sequence[Mapping]) -> list[int]:
        """The tokens that `messages` become, up to the model's turn."""
        instructions, rest = read_messages(messages)
        prompt = render(self.tokenizer, [*self._head(instructions), *rest],
                        drop="turns")
        most = self.model.config.max_position_embeddings
        _expect(len(prompt) <= most, "messages", f"at most {most} tokens "
                "(max_position_embeddings)", len(prompt))
        return prompt


# --- A turn ------------------------------------------------------------------

class _Turns(_Settings):
    """One turn of the model: rounds of writing, and calls between them."""

    usage: Usage | None = None
    _rounds: list[Round]

    def _round_seed(self) -> int:
        """Drawn by all processes, so that torch's numbers stay alike."""
        return (torch.randint(2 ** 48, ()).item() if self._seed is None
                else self._random.getrandbits(48))

    def _tokens(self, prompt: list[int], made: int, agreement: Agreement,
                stop: Callable[[], object] | None) -> Iterator[int | None]:
        """What the model writes after `prompt`, having written `made`; None
        after a part of the prompt."""
        most = self.model.config.max_position_embeddings
        left = (self.max_new_tokens or most + made) - made
        if left <= 0 or len(prompt) > most:
            return

        def go_on() -> bool:
            if stop is not None and stop():
                raise Stopped
            return True

        drawn = self._round_seed()
        steps = self.memory.write(
            prompt, max_new_tokens=left, sampler=self.sampler,
            stop=self._stop, prefill_chunk=self._chunk,
            seed=agreement.ask(lambda: drawn))
        end = object()
        while agreement.ask(go_on) and (step := next(steps, end)) is not end:
            yield step

    def _turn(self, prompt: list[int], ids: Iterator[str],
              agreement: Agreement, stop: Callable[[], object] | None,
              progress: bool) -> Iterator[ChatEvent]:
        began, fed, made = time.perf_counter(), self.memory.fed, 0
        before, reason = len(prompt), ""

        def used() -> Usage:
            return Usage(reason or "stopped", before, self.memory.fed - fed,
                         made, time.perf_counter() - began)

        try:
            while not reason:
                round_, token = Round(self.tokenizer), None
                self._rounds.append(round_)
                for token in self._tokens(prompt, made, agreement, stop):
                    if token is not None:
                        made += 1
                        yield from round_.feed(token)
                    elif progress:
                        yield ChatEvent("progress", str(self.memory.left))
                    if round_.over:
                        break
                yield from round_.close()
                if round_.call is not None:
                    reason = yield from self._answer(round_, next(ids),
                                                     agreement)
                    prompt = self._after(round_)
                else:
                    reason = ("stop" if round_.over or token in self._stop
                              else "length")
            agreement.ask(bool)  # here the last chance to leave ends
            agreement.open = False
        except Stopped:
            reason = "stopped"
        except BaseException:
            reason = "stopped"
            self.usage = used()
            agreement.leave()
            raise
        yield from self._complaints(reason, len(prompt))
        self.usage = used()
        yield ChatEvent("done", reason, usage=self.usage)

    def _complaints(self, reason: str, length: int) -> Iterator[ChatEvent]:
        most = self.model.config.max_position_embeddings
        if reason == "stop" and not self._rounds[-1].text("final"):
            yield ChatEvent("notice", "the model ended without an answer")
        if max(length, len(self.memory.tokens)) > most:
            yield ChatEvent("notice", f"the context of {most} tokens is full")

    def _answer(self, round_: Round, id_: str, agreement: Agreement
                ) -> Generator[ChatEvent, None, str]:
        """Runs the call of a round; returns why the turn ends, or ""."""
        arguments, to = round_.call.arguments, round_.call.recipient
        name = _OTHER.sub("_", to.removeprefix("functions."))[:64] or "none"
        yield ChatEvent("call", arguments, name)
        reason, result = agreement.ask(
            functools.partial(self._run, name, arguments))
        call = {"id": id_, "type": "function",
                "function": {"name": name, "arguments": arguments}}
        if reason == "length":
            yield ChatEvent("notice", f"not run: call {len(self._rounds)} "
                            f"of at most {self.rounds} in a turn")
        elif reason:
            round_.kept = [call]
        else:
            round_.kept = [call, {"role": "tool", "tool_call_id": id_,
                                  "name": name, "content": result}]
            yield ChatEvent("result", result, name)
        return reason

    def _run(self, name: str, arguments: str) -> tuple[str, str]:
        """Why the turn ends with this call, or "", and what the call gave.
        Of several processes only the first runs it."""
        offer, known = self.offers.get(name), ", ".join(self.offers)
        if offer is not None and offer.run is None:
            return "tool_calls", ""
        if len(self._rounds) > self.rounds:
            return "length", ""
        if offer is None:
            return "", (f"error: there is no tool {name}; there are: "
                        f"{known or 'none'}")
        return "", _as_text(offer.run(arguments))

    def _after(self, round_: Round) -> list[int]:
        """The tokens so far, word for word, and the tool's answer."""
        if not round_.kept[1:]:
            return []
        answer = round_.kept[1]
        message = Message("tool", answer["content"], "commentary",
                          "assistant", name=f"functions.{answer['name']}")
        return self.memory.tokens + render(self.tokenizer, [message])


# --- Chat --------------------------------------------------------------------

def _followed(turn: Iterator[ChatEvent]) -> Iterator[ChatEvent]:
    """`turn`, and all the rest of it when its reader leaves."""
    try:
        for event in turn:  # noqa: UP028  `yield from` would close it
            yield event
    finally:
        for _ in turn:
            pass


class Chat(_Turns):
    """A conversation with a gpt-oss model, in OpenAI's message dicts.

    model: a folder, a hub id, a pair (GptOss, Tokenizer), or None for the
    shipped one. effort: low, medium, high. tools: typed Python functions,
    which are called when the model asks, or dicts of OpenAI's shape, which
    end the turn with a call for the caller. instructions: come before those
    of a system message. date: "2025-06-28", "" for none, None for today.
    temperature, top_k, top_p, seed: as for `Sampler` and `generate`.
    max_new_tokens: in a turn, all rounds together (None: until the context
    is full). rounds: calls run in one turn. slack: see `Memory`.
    tool_timeout: seconds for a call, see `function_tool`. prefill_chunk:
    tokens of a prompt that are read at once.

    One cache is kept from turn to turn; what a new prompt shares with it is
    not fed again. A turn may be left at any point. Not for several threads.
    With a model that is spread over processes, all of them make the same
    calls; what the first is given counts, and its tools alone are run.
    """

    usage: Usage | None = None  # of the last turn; None while it lasts
    _rounds: Sequence[Round] = ()
    _turning: tuple = ()  # its events, what is behind them, its agreement

    def events(self, messages: Sequence[object], *,
               stop: Callable[[], object] | None = None,
               progress: bool = False) -> Iterator[ChatEvent]:
        """The turn of the model after `messages`, as it happens.

        stop: asked before every forward; if what it returns is true, the
        turn ends there with the finish reason "stopped". progress: whether
        there are events of that kind. Raises ChatError at the call, for
        messages that are not right or do not fit. A turn that is still
        under way ends here.
        """
        self._interrupt()
        begin = self._link.same(functools.partial(self._begin, messages))
        if "error" in begin:
            raise ChatError(begin["error"])
        ids = (f"call_{n}" for n in itertools.count(1)
               if f"call_{n}" not in begin["used"])
        self._rounds, self.usage = [], None
        agreement = Agreement(self._link)
        turn = self._turn(begin["prompt"], ids, agreement, stop, progress)
        events = turn if self._link.first else _followed(turn)
        self._turning = (weakref.ref(events), agreement,
                         None if self._link.first else turn)
        return events

    def _begin(self, messages: Sequence[object]) -> dict:
        """The prompt and the ids of calls that are taken, or an error."""
        try:
            return {"prompt": self.prompt(messages),
                    "used": _call_ids(messages)}
        except ChatError as error:
            return {"error": str(error)}

    def reply(self, messages: Sequence[object], *,
              stop: Callable[[], object] | None = None) -> Iterator[str]:
        """The text of the final channel, piece by piece; see `events`."""
        return (event.text for event in self.events(messages, stop=stop)
                if event.kind == "final")

    @property
    def turn(self) -> list[dict]:
        """The messages that the turn has added, to go on with: what was
        thought, said and called, in order, with the answers of the calls,
        then the answer as far as it came."""
        return [message for round_ in self._rounds
                for message in round_messages(round_)]

    def reset(self) -> None:
        """Forget the turn and the cache; a seed begins anew."""
        self._interrupt()
        self._rounds, self.usage = (), None
        super().reset()

    def _interrupt(self) -> None:
        """End the turn that is under way, if there is one."""
        if not self._turning:
            return
        events, agreement, behind = self._turning
        try:
            if (running := events()) is not None:
                running.close()
        except ValueError as error:  # the generator is running right now
            raise ChatError("chat: in the middle of a turn") from error
        agreement.leave()
        for _ in behind or ():
            pass
        self._turning = ()


__all__ = [
    "Agreement",
    "Alone",
    "Chat",
    "ChatError",
    "ChatEvent",
    "Memory",
    "Offer",
    "Round",
    "SLACK",
    "STOPS",
    "Stopped",
    "TOOLS",
    "ToolTimeout",
    "Usage",
    "calculator",
    "common_prefix",
    "fit",
    "function_tool",
    "json_schema",
    "load",
    "perform",
    "read_messages",
    "read_tools",
    "round_messages",
    "today",
]
