"""Choosing the next token

Generated from book/12_generate.py; edit the chapter, not this file.
"""

import ast
import dataclasses
import datetime
import inspect
import itertools
import json
import random
import re
import reprlib
import time
import types
import typing
import warnings
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

class ChatError(ValueError):
    """A message, a tool or an option that a chat cannot use."""


def _expect(fits: bool, where: str, expected: str, found: object) -> None:
    if not fits:
        shown = "nothing" if found is None else reprlib.repr(found)
        raise ChatError(f"{where}: expected {expected}, found {shown}")


def _text(content: object, where: str) -> str:
    """The text of `content`, a string or a list of text parts."""
    if isinstance(content, list):
        for n, part in enumerate(content):
            fits = isinstance(part, Mapping) and part.get("type") == "text"
            _expect(fits and isinstance(part.get("text"), str),
                    f"{where}[{n}]", "{'type': 'text', 'text': ...}", part)
        content = "".join(part["text"] for part in content)
    _expect(isinstance(content, str), where,
            "a string or a list of text parts", content)
    _expect(not re.search("[\ud800-\udfff]", content), where,
            "Unicode characters without lone surrogates", content)
    return content


_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_OTHER = re.compile(r"[^A-Za-z0-9_.-]")


def _call(call: object, where: str) -> Message:
    """One entry of `tool_calls` as a message to the function."""
    _expect(isinstance(call, Mapping) and isinstance(call.get("id"), str),
            f"{where}.id", "a string", call)
    _expect(call.get("type", "function") == "function", f"{where}.type",
            "'function'", call.get("type"))
    function = call.get("function")
    _expect(isinstance(function, Mapping), f"{where}.function", "a dict",
            function)
    name = function.get("name")
    _expect(isinstance(name, str) and bool(_NAME.fullmatch(name)),
            f"{where}.function.name", "1 to 64 letters, digits, _ . -", name)
    arguments = function.get("arguments")
    _expect(isinstance(arguments, str), f"{where}.function.arguments",
            "a string of JSON", arguments)
    return Message("assistant", _text(arguments, f"{where}.arguments"),
                   "commentary", f"functions.{name}", "<|constrain|>json")


def _assistant(message: Mapping, where: str) -> list[Message]:
    """What the assistant thought, said and called, in this order."""
    calls = message.get("tool_calls") or []
    _expect(isinstance(calls, list), f"{where}.tool_calls", "a list", calls)
    made = [_call(call, f"{where}.tool_calls[{n}]")
            for n, call in enumerate(calls)]
    content, out = message.get("content"), []
    if message.get("reasoning"):
        thought = _text(message["reasoning"], f"{where}.reasoning")
        out.append(Message("assistant", thought, "analysis"))
    if content or not calls:
        said = _text(content, f"{where}.content")
        out.append(Message("assistant", said,
                           "commentary" if calls else "final"))
    return out + made


def _result(message: Mapping, where: str, open_calls: dict[str, str]
            ) -> Message:
    """A tool's answer; closes the call that it answers."""
    known, found = ", ".join(open_calls), message.get("tool_call_id")
    _expect(isinstance(found, str) and found in open_calls,
            f"{where}.tool_call_id",
            f"the id of an open call ({known or 'there is none'})", found)
    return Message("tool", _text(message.get("content"), f"{where}.content"),
                   "commentary", "assistant",
                   name=f"functions.{open_calls.pop(found)}")


_SPEAKERS = ("system", "developer", "user", "assistant", "tool")


def read_messages(messages: Sequence[Mapping]) -> tuple[str, list[Message]]:
    """OpenAI's dicts as (instructions, harmony messages).

    Instructions: the text of the system and developer messages at the
    head; a later one stays where it is. Every call must be answered before
    anybody else speaks, and the user or a tool must have the last word.
    Raises ChatError naming the message's index and the key.
    """
    _expect(isinstance(messages, list | tuple) and len(messages) > 0,
            "messages", "a list of at least one dict", messages)
    head, out, open_calls = [], [], {}
    for n, message in enumerate(messages):
        where = f"messages[{n}]"
        _expect(isinstance(message, Mapping), where, "a dict", message)
        role = message.get("role")
        _expect(role in _SPEAKERS, f"{where}.role",
                f"one of {', '.join(_SPEAKERS)}", role)
        _expect(role == "tool" or not open_calls, f"{where}.role",
                f"'tool', to answer {', '.join(open_calls)}", role)
        if role == "tool":
            out.append(_result(message, where, open_calls))
        elif role == "assistant":
            out += _assistant(message, where)
            calls = message.get("tool_calls") or []
            open_calls = {c["id"]: c["function"]["name"] for c in calls}
            _expect(len(open_calls) == len(calls), f"{where}.tool_calls",
                    "ids that differ", [c["id"] for c in calls])
        else:
            text = _text(message.get("content"), f"{where}.content")
            if role == "user":
                out.append(Message("user", text))
            elif out:
                out.append(developer_message(text))
            else:
                head.append(text)
    _expect(role in ("user", "tool") and not open_calls,
            f"messages[{n}].role", "the user or a tool to speak last"
            + (f" (not answered: {', '.join(open_calls)})"
               if open_calls else ""), role)
    return "\n\n".join(filter(None, head)), out


# --- A function's type hints as a schema -------------------------------------

_PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean"}
_UNIONS = (typing.Union, types.UnionType)
_WRAPPERS = (typing.Annotated, typing.Required, typing.NotRequired)


def _type_hints(owner: object, where: str) -> dict[str, object]:
    try:
        return typing.get_type_hints(owner, include_extras=True)
    except (NameError, TypeError) as error:
        raise ChatError(f"{where}: {error}") from error


def _fields(hint: object) -> tuple[dict[str, object], set[str]] | None:
    """Hints and required keys of a dataclass or TypedDict, else None."""
    if typing.is_typeddict(hint):
        return _type_hints(hint, hint.__name__), set(hint.__required_keys__)
    if not (isinstance(hint, type) and dataclasses.is_dataclass(hint)):
        return None
    hints = _type_hints(hint, hint.__name__)
    made = [field for field in dataclasses.fields(hint) if field.init]
    return ({field.name: hints[field.name] for field in made},
            {field.name for field in made
             if field.default is field.default_factory is
             dataclasses.MISSING})


def _record(hints: Mapping[str, object], required: Iterable[str],
            where: str) -> dict:
    """The schema of an object with these keys."""
    return {"type": "object",
            "properties": {name: json_schema(hint, f"{where}.{name}")
                           for name, hint in hints.items()},
            "required": [name for name in hints if name in required],
            "additionalProperties": False}


def _either(hints: Sequence[object], where: str) -> dict:
    """The schema of a union; None among `hints` makes it nullable."""
    some = [json_schema(h, where) for h in hints if h is not type(None)]
    if len(some) == 1:
        schema = some[0]
    elif all(list(each) == ["type"] for each in some):
        schema = {"type": [each["type"] for each in some]}
    else:
        schema = {"oneOf": some}
    return schema | ({"nullable": True} if type(None) in hints else {})


def json_schema(hint: object, where: str = "hint") -> dict:
    """The JSON schema of a type hint.

    str, int, float, bool, Any, Literal, Optional and unions, list[...],
    dict[str, ...], dataclasses, TypedDict, and Annotated[hint, "what it
    is"]. Raises ChatError at `where` for anything else.
    """
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    kinds = [_PLAIN.get(type(value)) for value in inside]
    if origin in _WRAPPERS:
        about = next((a for a in inside[1:] if isinstance(a, str)), "")
        return json_schema(inside[0], where) | (
            {"description": about} if about else {})
    if hint is typing.Any:
        return {}
    if isinstance(hint, type) and hint in _PLAIN:
        return {"type": _PLAIN[hint]}
    if origin is typing.Literal and None not in kinds:
        names = list(dict.fromkeys(kinds))
        return {"type": names if len(names) > 1 else names[0],
                "enum": list(inside)}
    if origin in _UNIONS:
        return _either(inside, where)
    if list in (hint, origin):
        return {"type": "array"} | (
            {"items": json_schema(inside[0], f"{where}[]")} if inside else {})
    if dict in (hint, origin) and inside[:1] in ((), (str,)):
        return {"type": "object"} | ({"additionalProperties": json_schema(
            inside[1], f"{where}.*")} if inside else {})
    if (fields := _fields(hint)) is not None:
        return _record(*fields, where)
    raise ChatError(f"{where}: expected a type hint that JSON can hold "
                    f"(str, int, float, bool, Any, Literal, Optional, list, "
                    f"dict, a dataclass, a TypedDict), found {hint!r}")


def _fits_plain(value: object, kind: type) -> bool:
    if isinstance(value, bool) or kind is bool:
        return kind is type(value)
    if kind is int:  # to JSON 3.0 is an integer
        return isinstance(value, int) or (isinstance(value, float)
                                          and value.is_integer())
    return isinstance(value, (int, float) if kind is float else kind)


def _fit_fields(value: object, hints: Mapping[str, object],
                required: Iterable[str], where: str) -> dict:
    """`value` as keyword arguments."""
    _expect(isinstance(value, dict), where, "an object", value)
    for name in value:
        _expect(name in hints, where,
                f"no keys but {', '.join(hints) or 'none'}", name)
    for name in required:
        _expect(name in value, f"{where}.{name}", "a value", None)
    return {name: fit(each, hints[name], f"{where}.{name}")
            for name, each in value.items()}


def fit(value: object, hint: object, where: str = "arguments") -> object:
    """JSON `value` as `hint` says: dataclasses made, 3.0 an int.

    The inverse of what `json_schema` allows. Raises ChatError at `where`.
    """
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in _WRAPPERS:
        return fit(value, inside[0], where)
    if origin in _UNIONS:
        return _fit_either(value, inside, where)
    if origin is typing.Literal:
        _expect(any(type(value) is type(v) and value == v for v in inside),
                where, f"one of {', '.join(map(repr, inside))}", value)
    elif hint in (None, type(None)):
        _expect(value is None, where, "null", value)
    elif hint in _PLAIN:
        _expect(_fits_plain(value, hint), where,
                f"{'an' if hint is int else 'a'} {_PLAIN[hint]}", value)
        return hint(value)
    elif list in (hint, origin):
        _expect(isinstance(value, list), where, "an array", value)
        return [fit(each, *inside, where=f"{where}[{n}]")
                for n, each in enumerate(value)] if inside else value
    elif dict in (hint, origin):
        _expect(isinstance(value, dict), where, "an object", value)
        return {key: fit(each, inside[1], f"{where}.{key}")
                for key, each in value.items()} if inside else value
    elif (fields := _fields(hint)) is not None:
        return hint(**_fit_fields(value, *fields, where))
    return value


def _fit_either(value: object, hints: Sequence[object],
                where: str) -> object:
    """`value` as the first of `hints` that it fits, its own type first."""
    faults = []
    for hint in sorted(hints, key=lambda hint: hint is not type(value)):
        try:
            return fit(value, hint, where)
        except ChatError as error:
            faults.append(str(error))
    raise ChatError("; or ".join(faults))


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


def _hints(function: Callable, name: str) -> dict[str, object]:
    """The hint of each argument; ChatError if one has none."""
    hints = _type_hints(function, f"tool {name}")
    for argument in inspect.signature(function).parameters.values():
        _expect(argument.kind in (argument.POSITIONAL_OR_KEYWORD,
                                  argument.KEYWORD_ONLY),
                f"tool {name}, {argument.name}",
                "an argument that can be given by name", str(argument))
        _expect(argument.name in hints, f"tool {name}, {argument.name}",
                "a type hint", None)
    hints.pop("return", None)
    return hints


def _not_json(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _as_text(value: object) -> str:
    """What a function returned, for the model: text, or else JSON."""
    if not isinstance(value, str):
        value = json.dumps(value, ensure_ascii=False, default=lambda each: (
            dataclasses.asdict(each) if dataclasses.is_dataclass(each)
            else str(each)))
    return value.encode("utf-8", "replace").decode("utf-8")


def _describe(function: Callable, name: str, hints: Mapping[str, object],
              required: Sequence[str]) -> Tool:
    """A function as it is told to the model."""
    about, told = _docs(function)
    try:
        schema = _record(hints, required, f"tool {name}")
    except RecursionError:
        raise ChatError(f"tool {name}: expected type hints that end, found "
                        "one that contains itself") from None
    for key, entry in schema["properties"].items():
        if key in told:
            entry.setdefault("description", told[key])
        default = inspect.signature(function).parameters[key].default
        if isinstance(default, str | int | float):
            entry.setdefault("default", default)
    return Tool(name, about, schema if hints else None)


def function_tool(function: Callable) -> Offer:
    """Offers a Python function with type hints; see `json_schema`."""
    name = getattr(function, "__name__", None)
    _expect(callable(function) and isinstance(name, str)
            and bool(_NAME.fullmatch(name))
            and not inspect.iscoroutinefunction(function),
            "tools", "a named function that is not async", function)
    hints, given = _hints(function, name), inspect.signature(function)
    required = [key for key in hints
                if given.parameters[key].default is given.empty]

    def run(arguments: str) -> str:
        try:
            value = json.loads(arguments.strip() or "{}",
                               parse_constant=_not_json)
            return _as_text(function(**_fit_fields(value, hints, required,
                                                   "arguments")))
        except ChatError as error:
            return _as_text(f"error: {error}")
        except Exception as error:
            return _as_text(f"error: {type(error).__name__}: {error}")
    return Offer(_describe(function, name, hints, required), run)


def read_tools(tools: Iterable[Callable | Mapping]) -> dict[str, Offer]:
    """Functions, and dicts of OpenAI's shape, by their name.

    A dict is {"type": "function", "function": {"name", "description",
    "parameters"}}. Raises ChatError for another shape or a name used twice.
    """
    offers: dict[str, Offer] = {}
    for n, given in enumerate(tools):
        if isinstance(given, Mapping):
            where, function = f"tools[{n}].function", given.get("function")
            _expect(isinstance(function, Mapping), where, "a dict", function)
            name, about = function.get("name"), function.get("description")
            _expect(isinstance(name, str) and bool(_NAME.fullmatch(name)),
                    f"{where}.name", "1 to 64 letters, digits, _ . -", name)
            schema = function.get("parameters")
            _expect(isinstance(schema, Mapping | None),
                    f"{where}.parameters", "a JSON schema", schema)
            offer = Offer(Tool(name, _text(about or "", where), schema))
        else:
            offer = function_tool(given)
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

    def write(self, prompt: Sequence[int], **options) -> Iterator[int]:
        """`generate` after `prompt`, feeding only what must be fed."""
        start = self.resume(prompt)
        self.fed += len(prompt) - start
        for token in generate(self.model, prompt[start:], cache=self.cache,
                              **options):
            self.tokens.append(token)
            yield token


# --- What happened -----------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Usage:
    """What a turn took.

    finish_reason: "stop", "length" or "tool_calls". prompt_tokens: of the
    conversation before it. prefilled_tokens: how many of these, and of the
    answers of tools, had to be fed. generated_tokens: written by the model.
    seconds: wall time.
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
        self._written: dict[str, list[str]] = {name: [] for name in CHANNELS}
        self._to: str | None = None  # recipient of the message in progress
        self.call: ToolCall | None = None
        self.kept: list[dict] = []  # the call and its answer, for the history
        self.over = False  # what follows is not part of the round

    def feed(self, token: int) -> Iterator[ChatEvent]:
        """The events that `token` causes."""
        return self._read(self._parser.feed(token))

    def close(self) -> Iterator[ChatEvent]:
        """The events that the end of the tokens causes."""
        return self._read(self._parser.close())

    def text(self, channel: str) -> str:
        """All that was written in `channel` so far."""
        return "".join(self._written[channel])

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
                yield from self._add(event.channel, event.text)

    def _opened(self, message: Message) -> Iterator[ChatEvent]:
        self._to = message.recipient
        if message.role != "assistant":
            self._to, self.over = "nobody", True
            yield ChatEvent("notice", f"a message of {message.role!r}, "
                                      "written by the model")
        elif self._to is None and self._written.get(message.channel):
            yield from self._add(message.channel, "\n\n")  # a second one

    def _add(self, channel: str | None, text: str) -> Iterator[ChatEvent]:
        kind = channel if channel in CHANNELS else "final"
        self._written[kind].append(text)
        yield ChatEvent(kind, text)


def round_messages(round_: Round) -> list[dict]:
    """A round as OpenAI's dicts: the assistant's message and, if a tool was
    called and has answered, the tool's. [] if nothing was written."""
    thought, said, answer = map(round_.text, CHANNELS)
    calls, answers = round_.kept[:1], round_.kept[1:]
    if not (thought or said or answer or calls):
        return []
    message = {"role": "assistant",
               "content": answer or said or (None if calls else "")}
    if thought:
        message["reasoning"] = thought
    if calls:
        message["tool_calls"] = calls
    return [message, *answers]


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
                 device="cpu") -> None:
        for name, value, least in (("max_new_tokens", max_new_tokens, 1),
                                   ("seed", seed, 0), ("rounds", rounds, 0),
                                   ("slack", slack, 0)):
            _expect(value is None or type(value) is int and value >= least,
                    name, f"an integer >= {least}", value)
        self.effort, self.offers = effort, read_tools(tools)
        self.instructions = _text(instructions, "instructions")
        self.date = today() if date is None else _text(date, "date")
        self.sampler = Sampler(temperature, top_k, top_p)
        self._head()
        self.max_new_tokens, self.rounds = max_new_tokens, rounds
        self._seed, self._slack = seed, slack
        self.model, self.tokenizer = load(model, dtype, device)
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

    def _tokens(self, prompt: list[int], made: int) -> Iterator[int]:
        """What the model writes after `prompt`, having written `made`."""
        most = self.model.config.max_position_embeddings
        left = (self.max_new_tokens or most + made) - made
        if left <= 0 or len(prompt) > most:
            return iter(())
        seed = None if self._seed is None else self._random.getrandbits(48)
        return self.memory.write(prompt, max_new_tokens=left, seed=seed,
                                 sampler=self.sampler, stop=self._stop)

    def _turn(self, prompt: list[int], ids: Iterator[str]
              ) -> Iterator[ChatEvent]:
        began, before, made, reason = time.perf_counter(), len(prompt), 0, ""
        fed = self.memory.fed
        while not reason:
            round_, token = Round(self.tokenizer), None
            self._rounds.append(round_)
            for token in self._tokens(prompt, made):
                made += 1
                yield from round_.feed(token)
                if round_.over:
                    break
            yield from round_.close()
            if round_.call is not None:
                reason = yield from self._answer(round_, next(ids))
                prompt = self._after(round_)
            else:
                reason = ("stop" if round_.over or token in self._stop
                          else "length")
        most = self.model.config.max_position_embeddings
        if reason == "stop" and not round_.text("final"):
            yield ChatEvent("notice", "the model ended without an answer")
        if max(len(prompt), len(self.memory.tokens)) > most:
            yield ChatEvent("notice", f"the context of {most} tokens is full")
        self.usage = Usage(reason, before, self.memory.fed - fed, made,
                           time.perf_counter() - began)
        yield ChatEvent("done", reason, usage=self.usage)

    def _answer(self, round_: Round, id_: str
                ) -> Generator[ChatEvent, None, str]:
        """Runs the call of a round; returns why the turn ends, or ""."""
        arguments, to = round_.call.arguments, round_.call.recipient
        name = _OTHER.sub("_", to.removeprefix("functions."))[:64] or "none"
        offer = self.offers.get(name)
        yield ChatEvent("call", arguments, name)
        call = {"id": id_, "type": "function",
                "function": {"name": name, "arguments": arguments}}
        if offer is not None and offer.run is None:
            round_.kept = [call]
            return "tool_calls"
        if len(self._rounds) > self.rounds:
            yield ChatEvent("notice", f"not run: call {len(self._rounds)} "
                            f"of at most {self.rounds} in a turn")
            return "length"
        known = ", ".join(self.offers) or "none"
        result = (offer.run(arguments) if offer is not None else
                  f"error: there is no tool {name}; there are: {known}")
        round_.kept = [call, {"role": "tool", "tool_call_id": id_,
                              "name": name, "content": result}]
        yield ChatEvent("result", result, name)
        return ""

    def _after(self, round_: Round) -> list[int]:
        """The tokens so far, word for word, and the tool's answer."""
        if not round_.kept[1:]:
            return []
        answer = round_.kept[1]
        message = Message("tool", answer["content"], "commentary",
                          "assistant", name=f"functions.{answer['name']}")
        return self.memory.tokens + render(self.tokenizer, [message])


# --- Chat --------------------------------------------------------------------

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

    One cache is kept from turn to turn; what a new prompt shares with it is
    not fed again. A turn may be left at any point. Not for several threads.
    """

    usage: Usage | None = None  # of the last turn that came to its end
    _rounds: Sequence[Round] = ()
    _running: Generator | None = None

    def events(self, messages: Sequence[Mapping]) -> Iterator[ChatEvent]:
        """The turn of the model after `messages`, as it happens.

        Raises ChatError at the call, for messages that are not right or do
        not fit. A turn that is still under way ends here.
        """
        prompt = self.prompt(messages)
        self._interrupt()
        used = {call["id"] for message in messages
                for call in message.get("tool_calls") or ()}
        ids = (f"call_{n}" for n in itertools.count(1)
               if f"call_{n}" not in used)
        self._rounds, self._running = [], self._turn(prompt, ids)
        return self._running

    def reply(self, messages: Sequence[Mapping]) -> Iterator[str]:
        """The text of the final channel, piece by piece; see `events`."""
        return (event.text for event in self.events(messages)
                if event.kind == "final")

    @property
    def turn(self) -> list[dict]:
        """The messages that the turn has added, to go on with: calls with
        their answers, then the answer as far as it came."""
        return [message for round_ in self._rounds
                for message in round_messages(round_)]

    def reset(self) -> None:
        """Forget the turn and the cache; a seed begins anew."""
        self._interrupt()
        self._rounds = ()
        super().reset()

    def _interrupt(self) -> None:
        try:
            if self._running is not None:
                self._running.close()
        except ValueError as error:  # the generator is running right now
            raise ChatError("chat: in the middle of a turn") from error
        self._running = None


__all__ = [
    "Chat",
    "ChatError",
    "ChatEvent",
    "Memory",
    "Offer",
    "Round",
    "SLACK",
    "STOPS",
    "TOOLS",
    "Usage",
    "calculator",
    "common_prefix",
    "fit",
    "function_tool",
    "json_schema",
    "load",
    "read_messages",
    "read_tools",
    "round_messages",
    "today",
]
