"""Chat: messages in, events out, tools run, and a cache that stays right.

Most tests use a small random model whose choices are scripted: it computes
and fills its cache like any other, and then writes what the test wants.
"""

import asyncio
import dataclasses
import datetime
import enum
import functools
import gc
import json
import logging
import os
import random
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    NotRequired,
    Optional,
    TypedDict,
    Union,
)

import pydantic
import pytest
import torch
import typing_extensions
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss.chat import (
    Chat,
    ChatError,
    Memory,
    Usage,
    calculator,
    common_prefix,
    fit,
    function_tool,
    json_schema,
    read_messages,
    read_tools,
    today,
)
from gptoss.config import GptOssConfig
from gptoss.generate import GenerateError, Sampler
from gptoss.harmony import (
    Message,
    Tokenizer,
    render,
    tokenizer_json,
    typescript,
)
from gptoss.model import GptOss

CONTROL = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>",
           "<|constrain|>", "<|return|>", "<|call|>", "<|endoftext|>")
CONFIG = GptOssConfig(
    num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2,
    vocab_size=264, hidden_size=32, intermediate_size=32, head_dim=8,
    num_attention_heads=4, num_key_value_heads=2, sliding_window=8,
    max_position_embeddings=2048, initial_context_length=128,
    eos_token_id=261, pad_token_id=263)
TOKENIZER = Tokenizer(tokenizer_json(
    {bytes([b]): b for b in range(256)},
    {256 + n: name for n, name in enumerate(CONTROL)}))


class Scripted(GptOss):
    """A random model that writes what stands in `script`, one text a round.

    The tokens that are fed are kept: `fed` counts all of them, and the
    logits `last` are those that it computed itself.
    """

    def __init__(self, *script: str, layers: int = 2) -> None:
        torch.manual_seed(0)
        super().__init__(dataclasses.replace(
            CONFIG, num_hidden_layers=layers, layer_types=None),
            torch.float32, packed=False)
        self.requires_grad_(False)
        self.script = [ids(text) for text in script]
        self.at, self.fed, self.seen = 0, 0, []

    def forward(self, tokens, cache=None, attention_mask=None,
                logits_to_keep=0):
        logits = super().forward(tokens, cache, attention_mask,
                                 logits_to_keep)
        self.fed += tokens.numel()
        self.seen.append(tokens[0].tolist())
        self.last = logits[0, -1].clone()
        if not self.script:
            return logits
        now = self.script[0]
        if self.at and self.seen[-1] == [now[self.at - 1]]:
            pass  # its own last token: go on
        else:
            self.at = 0
        choice = now[self.at]
        self.at += 1
        if self.at == len(now):
            self.script.pop(0)
            self.at = 0
        return torch.nn.functional.one_hot(
            torch.full(logits.shape[:2], choice), 264).float()


def ids(text: str) -> list[int]:
    """Tokens of `text`, control tokens by name."""
    out = []
    while text:
        name = next((c for c in CONTROL if text.startswith(c)), None)
        out += ([TOKENIZER.special[name]] if name
                else TOKENIZER.encode(text[0]))
        text = text[len(name or text[0]):]
    return out


def said(final: str, analysis: str = "", stop: str = "<|return|>") -> str:
    thought = (f"<|channel|>analysis<|message|>{analysis}<|end|>"
               "<|start|>assistant" if analysis else "")
    return f"{thought}<|channel|>final<|message|>{final}{stop}"


def called(name: str, arguments: str, stop: str = "<|call|>") -> str:
    return (f"<|channel|>commentary to=functions.{name} <|constrain|>json"
            f"<|message|>{arguments}{stop}")


def chat(*script: str, **options) -> Chat:
    options = {"temperature": 0, "date": "2025-06-28"} | options
    return Chat((Scripted(*script), TOKENIZER), **options)


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def run(chat_: Chat, messages: list[dict]) -> dict[str, str]:
    """The texts of a turn by kind; several of a kind joined by |."""
    found: dict[str, str] = {}
    for event in chat_.events(messages):
        glue = "|" if event.kind in ("call", "result", "notice") else ""
        text = (f"{event.name} {event.text}"
                if event.kind in ("call", "result") else event.text)
        found[event.kind] = (found[event.kind] + glue + text
                             if event.kind in found else text)
    return found


# -- messages ---------------------------------------------------------------

CALL = {"id": "c1", "type": "function",
        "function": {"name": "f", "arguments": "{}"}}
ASKS = {"role": "assistant", "tool_calls": [CALL]}
TELLS = {"role": "tool", "tool_call_id": "c1", "content": "x"}


def changed(base: dict, **new: object) -> dict:
    return base | {"function": base["function"] | new}


@pytest.mark.parametrize("messages, why", [
    ([], "messages: expected a list of at least one"),
    ("hello", "messages: expected a list"),
    (["hello"], "messages[0]: expected a dict, found 'hello'"),
    ([{}], "messages[0].role: expected one of system, developer"),
    ([{"role": "bot", "content": ""}], "found 'bot'"),
    ([{"role": ["user"], "content": ""}], "messages[0].role"),
    ([user("a"), {"role": "user"}],
     "messages[1].content: expected a string or a list of text parts, "
     "found nothing"),
    ([user(3)], "messages[0].content: expected a string"),
    ([user([{"type": "image_url", "image_url": "x"}])],
     "messages[0].content[0]: expected {'type': 'text'"),
    ([user([{"type": "text"}])], "messages[0].content[0]"),
    ([user("a\ud800")], "messages[0].content: expected Unicode"),
    ([user("a"), {"role": "assistant"}],
     "messages[1].role: expected the user or a tool to speak last"),
    ([user("a") | {"text": "b"}],
     "messages[0].text: expected no keys but role, content, name, found 'b'"),
    ([user("a") | {"name": "a b"}], "messages[0].name: expected 1 to 64"),
    ([{"role": "system", "content": "a", "name": "b"}], "messages[0].name"),
    ([user([{"type": "text", "text": "a", "style": "b"}])],
     "messages[0].content[0].style"),
    ([user("a"), ASKS | {"function_call": {"name": "f"}}, TELLS],
     "messages[1].function_call"),
    ([user("a"), {"role": "assistant", "audio": {"id": "x"}}, user("b")],
     "messages[1].audio"),
    ([user("a"), {"role": "assistant", "content": "b", "prefix": True},
      user("b")], "messages[1].prefix"),
    ([user("a"), {"role": "assistant", "content": "b", "phase": "final"},
      user("b")], "messages[1].phase: expected one of commentary, "),
    ([user("a"), {"role": "assistant", "reasoning": "b", "thinking": "c"},
      user("b")], "messages[1].thinking: expected the same as reasoning"),
    ([user("a"), {"role": "assistant", "reasoning_details": [
        {"type": "reasoning.encrypted", "data": "x"}]}, user("b")],
     "messages[1].reasoning_details[0].type: expected one of"),
    ([user("a"), ASKS, TELLS | {"name": "g"}],
     "messages[2].name: expected functions.f, which was called, found 'g'"),
    ([user("a"), ASKS, TELLS | {"is_error": True}], "messages[2].is_error"),
    ([{"role": "function", "name": "f", "content": "a"}], "'function'"),
    ([{"type": "reasoning", "encrypted_content": "x"}, user("a")],
     "messages[0].encrypted_content"),
    ([{"type": "web_search_call"}, user("a")], "messages[0].type"),
    ([{"type": "reasoning", "content": 3}, user("a")],
     "messages[0]: expected lists"),
    ([{"type": "function_call", "name": "f", "arguments": ""}, user("a")],
     "messages[0].tool_calls[0].id"),
    ([user("a"), {"role": "assistant", "content": "b"}],
     "messages[1].role: expected the user or a tool to speak last"),
    ([{"role": "system", "content": "a"}], "speak last, found 'system'"),
    ([user("a"), ASKS], "speak last (not answered: c1)"),
    ([user("a"), ASKS, user("b")],
     "messages[2].role: expected 'tool', to answer c1, found 'user'"),
    ([user("a"), TELLS], "messages[1].tool_call_id: expected the id of an "
     "open call (there is none), found 'c1'"),
    ([user("a"), ASKS, TELLS | {"tool_call_id": "c2"}], "open call (c1)"),
    ([user("a"), ASKS, {"role": "tool", "tool_call_id": "c1"}],
     "messages[2].content"),
    ([user("a"), ASKS, TELLS, TELLS], "messages[3].tool_call_id"),
    ([user("a"), {"role": "assistant", "tool_calls": "f"}],
     "messages[1].tool_calls: expected a list"),
    ([user("a"), {"role": "assistant", "tool_calls": [CALL, CALL]}],
     "messages[1].tool_calls: expected ids that differ"),
    *(([user("a"), {"role": "assistant", "tool_calls": [call]}],
       f"messages[1].tool_calls[0].{key}: expected {what}")
      for call, key, what in (
          ({}, "id", "a string"), (CALL | {"id": 1}, "id", "a string"),
          (CALL | {"type": "custom"}, "type", "'function'"),
          (CALL | {"function": "f"}, "function", "a dict"),
          (changed(CALL, name="a b"), "function.name", "1 to 64 letters"),
          (changed(CALL, name="f\n"), "function.name", "1 to 64 letters"),
          (changed(CALL, arguments={}), "function.arguments", "a string"))),
    ([user("a"), {"role": "assistant", "content": "b", "reasoning": 1},
      user("c")], "messages[1].reasoning"),
])
def test_wrong_messages_are_named(messages, why):
    with pytest.raises(ChatError) as error:
        read_messages(messages)
    assert why in str(error.value)


def test_messages_become_harmony():
    head, found = read_messages([
        {"role": "system", "content": "one"},
        {"role": "developer", "content": [{"type": "text", "text": "t"},
                                          {"type": "text", "text": "wo"}]},
        user("ask"),
        {"role": "assistant", "content": "wait", "reasoning": "hm",
         "tool_calls": [CALL]}, TELLS,
        {"role": "assistant", "content": "", "reasoning": "so"},
        {"role": "developer", "content": "later"},
        user("") | {"name": "Ann"}])
    assert head == "one\n\ntwo"
    assert found == [
        Message("user", "ask"), Message("assistant", "hm", "analysis"),
        Message("assistant", "wait", "commentary"),
        Message("assistant", "{}", "commentary", "functions.f",
                "<|constrain|>json"),
        Message("tool", "x", "commentary", "assistant", name="functions.f"),
        Message("assistant", "so", "analysis"),
        Message("developer", "# Instructions\n\nlater"),
        Message("user", "", name="Ann")]


def heard(message: object) -> list[tuple[str | None, str]]:
    """What a message of the assistant becomes: channel and text."""
    return [(each.channel, each.content) for each in
            read_messages([user("a"), message, user("b")])[1][1:-1]]


SAYS = {"role": "assistant"}
TEXT = {"type": "reasoning.text", "text": "hm", "index": 0, "format": "x",
        "signature": None}


@pytest.mark.parametrize("message, wanted", [
    ({}, []), ({"content": None}, []), ({"content": "", "reasoning": ""}, []),
    *(({key: "hm", "content": None}, [("analysis", "hm")])
      for key in ("reasoning", "reasoning_content", "thinking")),
    ({"reasoning_details": [TEXT, TEXT | {"text": "m"}], "reasoning": "hmm"},
     [("analysis", "hmm")]),
    ({"reasoning_details": [{"type": "reasoning.summary", "summary": "s"}]},
     [("analysis", "s")]),
    ({"thinking_blocks": [{"type": "thinking", "thinking": "hm",
                           "signature": "x"}], "reasoning_content": "hm"},
     [("analysis", "hm")]),
    ({"refusal": "No.", "content": None}, [("final", "No.")]),
    ({"refusal": "No.", "content": "Well."}, [("final", "Well.\n\nNo.")]),
    ({"content": [{"type": "refusal", "refusal": "No."}]},
     [("final", "No.")]),
    ({"content": [{"type": "output_text", "text": "a", "annotations": []},
                  {"type": "input_text", "text": "b"}]}, [("final", "ab")]),
    ({"content": "a", "phase": "commentary"}, [("commentary", "a")]),
    ({"content": "a", "phase": "final_answer", "reasoning": "b"},
     [("analysis", "b"), ("final", "a")]),
    ({"content": "a", "tool_calls": None, "function_call": None, "audio": {},
      "annotations": [], "id": "m1", "usage": {"x": 1}}, [("final", "a")]),
    ({"type": "message", "status": "completed", "content": "a"},
     [("final", "a")]),
])
def test_what_an_assistant_said_under_any_key(message, wanted):
    assert heard(SAYS | message) == wanted


class Dumped:
    """An object of a client's library."""

    def __init__(self, **fields: object) -> None:
        self.fields = fields

    def model_dump(self) -> dict:
        return {key: value.model_dump() if isinstance(value, Dumped)
                else value for key, value in self.fields.items()}


def test_objects_of_clients_are_messages_and_tools():
    function = Dumped(name="f", arguments="{}")
    call = Dumped(id="c1", type="function", function=function)
    message = Dumped(role="assistant", content=None, refusal=None,
                     tool_calls=[call.model_dump()], audio=None)
    mixed = SAYS | {"tool_calls": [call]}
    for asks in (message, mixed):
        found = read_messages([user("a"), asks, TELLS])[1]
        assert [each.recipient for each in found] == [
            None, "functions.f", "assistant"]
    with pytest.raises(ChatError, match="expected a dict"):
        read_messages([Dumped])
    offers = read_tools([Dumped(type="function", function=function.fields | {
        "arguments": None})])
    assert offers["f"].run is None
    one = chat(said("ok"))
    assert run(one, [user("a"), mixed, TELLS])["final"] == "ok"


def test_results_are_rendered_in_the_order_of_the_calls():
    asks = SAYS | {"tool_calls": [CALL | {"id": n} for n in "abc"]}
    tells = [TELLS | {"tool_call_id": n, "content": n.upper()} for n in "bca"]
    found = read_messages([user("a"), asks, *tells, user("b")])[1]
    assert [each.content for each in found[4:]] == ["A", "B", "C", "b"]
    with pytest.raises(ChatError, match=r"open call \(b\)"):
        read_messages([user("a"), asks, *tells[1:], tells[1]])
    with pytest.raises(ChatError, match="not answered: c"):
        read_messages([user("a"), asks, tells[0], tells[2]])
    with pytest.raises(ChatError, match="to answer c, found 'assistant'"):
        read_messages([user("a"), asks, tells[0], tells[2], SAYS])


def test_items_of_responses_are_messages():
    def calls(id_):
        return {"type": "function_call", "id": "x", "call_id": id_,
                "name": "f", "arguments": id_, "status": "completed"}

    def gives(id_):
        return {"type": "function_call_output", "call_id": id_,
                "output": id_ * 2}

    talk = [{"type": "message", "role": "user", "content": [
        {"type": "input_text", "text": "ask"}]},
        {"type": "reasoning", "id": "r", "summary": [], "content": [
            {"type": "reasoning_text", "text": "hm"}]},
        calls("1"), calls("2"), gives("2"), gives("1"),
        {"type": "message", "role": "assistant", "phase": "commentary",
         "content": [{"type": "output_text", "text": "so"}]}, user("b")]
    assert [each.content for each in read_messages(talk)[1]] == [
        "ask", "hm", "1", "2", "11", "22", "so", "b"]
    for wrong in ([*talk[:5], calls("3"), gives("1"), gives("3")],
                  [*talk[:4], calls("1"), *talk[4:]]):
        with pytest.raises(ChatError, match="call_id|to answer 1"):
            read_messages(wrong)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.sampled_from(
        ["user", "assistant", "tool", "system", "c1", "text", "function",
         "f", "{}", "", "reasoning", "function_call", "commentary",
         "function_call_output", "reasoning.text", "input_text"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["role", "content", "tool_calls", "id", "type",
                         "text", "function", "name", "arguments",
                         "tool_call_id", "reasoning", "thinking", "phase",
                         "reasoning_details", "refusal", "output", "call_id",
                         "summary", "odd"]), inner, max_size=5),
    max_leaves=25)


@settings(deadline=None, max_examples=150)
@given(st.lists(JSON, max_size=4) | JSON)
def test_any_messages_are_read_or_refused(messages):
    try:
        head, found = read_messages(messages)
    except ChatError as error:
        assert str(error).startswith("messages")
    else:
        assert render(TOKENIZER, found)
        assert found[-1].role in ("user", "tool")


# -- odd conversations, from seeds ------------------------------------------

FUZZ = int(os.environ.get("GPTOSS_FUZZ", "1"))  # times as many cases
ODD = ("name", "refusal", "audio", "function_call", "metadata", "phase",
       "thinking", "reasoning", "reasoning_content", "reasoning_details",
       "tool_calls", "tool_call_id", "content", "prefix", "text", "role")


def odd_talk(rng: random.Random) -> list[dict]:
    """A conversation as some client might send it, with odd keys; every
    text in it is a word of its own."""
    def word() -> str:
        return f"w{rng.randrange(10 ** 9)}w"

    def text() -> object:
        return rng.choice([word(), [{"type": rng.choice(
            ["text", "input_text", "output_text", "image"]),
            "text": word()}], None, ""][:rng.choice((2, 2, 4))])

    talk = []
    for _ in range(rng.randint(1, 4)):
        talk.append({"role": rng.choice(["user", "system", "developer"]),
                     "content": text()})
        calls = [{"id": word(), "type": "function", "function": {
            "name": "f", "arguments": word()}}
            for _ in range(rng.randint(0, 3))]
        said = SAYS | {"content": text(), "tool_calls": calls}
        said[rng.choice(ODD[6:9])] = word()
        tells = [TELLS | {"tool_call_id": call["id"], "content": word()}
                 for call in calls]
        rng.shuffle(tells)
        talk += [said, *tells[:rng.choice((9, 9, 9, 1))]]
    talk.append(user(word()))
    for _ in range(rng.choice((0, 0, 1))):
        rng.choice(talk)[rng.choice(ODD)] = rng.choice(
            [word(), [word()], {word(): word()}, None, 7, True, [{}]])
    return talk


@pytest.mark.parametrize("seed", range(300 * FUZZ))
def test_odd_conversations_are_rendered_whole_or_refused(seed):
    talk = odd_talk(random.Random(seed))
    try:
        head, found = read_messages(talk)
    except ChatError as error:
        assert re.match(r"messages\[\d+\]", str(error))
        return
    shown = head + "".join(f"{each.content} {each.name}" for each in found)
    asked = {call["id"] for each in talk
             for call in each.get("tool_calls") or ()}
    for lost in re.findall(r"w\d+w", json.dumps(talk)):
        assert lost in shown or lost in asked, (lost, talk)


# -- hints, schemas, values -------------------------------------------------

@dataclasses.dataclass
class Point:
    x: float
    y: float = 0.0
    size: int = dataclasses.field(init=False, default=1)


class Place(TypedDict):
    """Not told."""

    name: str
    point: NotRequired[Point]


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Model(pydantic.BaseModel):
    """A model."""

    n: int = pydantic.Field(ge=0, description="how many")
    note: str | None = None
    size: int = 3


class Pair(NamedTuple):
    a: int
    b: int


class NewPlace(typing_extensions.TypedDict):
    tree: list[int]


@dataclasses.dataclass
class Nested:
    point: Annotated[Point, "where"]
    colour: Colour
    place: Place | None = None


POINT = {"type": "object", "properties": {"x": {"type": "number"},
                                          "y": {"type": "number"}},
         "required": ["x"], "additionalProperties": False}


@pytest.mark.parametrize("hint, schema", [
    (str, {"type": "string"}), (bool, {"type": "boolean"}), (Any, {}),
    (Literal["a", "b"], {"type": "string", "enum": ["a", "b"]}),
    (Literal[1, "b"], {"type": ["integer", "string"], "enum": [1, "b"]}),
    (Optional[int], {"type": "integer", "nullable": True}),  # noqa: UP045
    (Union[int, str], {"type": ["integer", "string"]}),  # noqa: UP007
    (int | str | None, {"type": ["integer", "string"], "nullable": True}),
    (list, {"type": "array"}),
    (list[int], {"type": "array", "items": {"type": "integer"}}),
    (dict, {"type": "object"}),
    (dict[str, float], {"type": "object",
                        "additionalProperties": {"type": "number"}}),
    (Annotated[str, "a name"], {"type": "string", "description": "a name"}),
    (list[str] | str, {"oneOf": [{"type": "array",
                                  "items": {"type": "string"}},
                                 {"type": "string"}]}),
    (Point, POINT),
    (Place, {"type": "object", "properties": {"name": {"type": "string"},
                                              "point": POINT},
             "required": ["name"], "additionalProperties": False}),
    (Colour, {"type": "string", "enum": ["red", "blue"]}),
    (Colour | None, {"type": "string", "enum": ["red", "blue"],
                     "nullable": True}),
    (Literal[Colour.RED], {"type": "string", "enum": ["red"]}),
    (datetime.date, {"type": "string", "format": "date",
                     "description": "YYYY-MM-DD"}),
    (Annotated[datetime.date, "when"], {
        "type": "string", "format": "date",
        "description": "when (YYYY-MM-DD)"}),
    (tuple[int, str], {"type": "array", "minItems": 2, "maxItems": 2,
                       "items": {"type": ["integer", "string"]}}),
    (tuple[int, ...], {"type": "array", "items": {"type": "integer"}}),
    (set[int], {"type": "array", "items": {"type": "integer"},
                "uniqueItems": True}),
    (dict[int, str], {"type": "object",
                      "additionalProperties": {"type": "string"}}),
    (Model, {"type": "object", "description": "A model.", "properties": {
        "n": {"type": "integer", "description": "how many", "minimum": 0},
        "note": {"type": "string", "nullable": True},
        "size": {"type": "integer", "default": 3}}, "required": ["n"]}),
    (list[Pair], {"type": "array", "items": {
        "type": "array", "minItems": 2, "maxItems": 2,
        "items": {"type": "integer"}}}),
    (Nested, {"type": "object", "properties": {
        "point": POINT | {"description": "where"},
        "colour": {"type": "string", "enum": ["red", "blue"]},
        "place": {"type": "object", "properties": {
            "name": {"type": "string"}, "point": POINT},
            "required": ["name"], "additionalProperties": False,
            "nullable": True}},
        "required": ["point", "colour"], "additionalProperties": False}),
])
def test_schema_of_a_hint(hint, schema):
    assert json_schema(hint) == schema


@pytest.mark.parametrize("hint", [
    Callable[[], int], list[Iterator], Dumped, int | Dumped, "int",
    tuple[int, threading.Lock], dict[str, Dumped], Point | Dumped])
def test_a_hint_without_a_schema_names_its_argument(hint):
    def tool(a: int, b: hint) -> str:  # type: ignore[valid-type]
        return ""

    tool.__annotations__["b"] = (hint if not isinstance(hint, str)
                                 else "Nothing")
    with pytest.raises(ChatError, match=r"tool.*(\bb\b|Nothing)"):
        function_tool(tool)


@pytest.mark.parametrize("value, hint, wanted", [
    (3, int, 3), (3.0, int, 3), (3, float, 3.0), ("a", str, "a"),
    (None, int | None, None), (3, int | str, 3), ("3", int | str, "3"),
    (1, float | int, 1), (True, bool | int, True),
    ([1, 2.0], list[int], [1, 2]), ({"a": 1}, dict[str, float], {"a": 1.0}),
    ({"x": 1}, Point, Point(1.0)), ({"x": 1, "y": 2}, Point, Point(1., 2.)),
    ({"name": "a", "point": {"x": 0}}, Place,
     {"name": "a", "point": Point(0.0)}),
    ([{"a": None}], Any, [{"a": None}]), ("b", Literal["a", "b"], "b"),
    ("x", Annotated[str, "about"], "x"), ("blue", Colour, Colour.BLUE),
    ("2025-06-28", datetime.date, datetime.date(2025, 6, 28)),
    ([1, "a"], tuple[int, str], (1, "a")), ([1, 2, 1], set[int], {1, 2}),
    ({"n": "3"}, Model, None), ([{"n": 1}], list[Model], None),
    ({"tree": [1]}, NewPlace, {"tree": [1]}), ([2, 3], Pair, Pair(2, 3)),
    ("PT1H", datetime.timedelta, datetime.timedelta(hours=1)),
    ({"x": 1}, Point | Model, Point(1.0)), (1e300, int, int(1e300)),
    ([{"point": {"x": 1}, "colour": "red"}], list[Nested],
     [Nested(Point(1.0), Colour.RED)]),
])
def test_values_that_fit(value, hint, wanted):
    found = fit(value, hint)
    if wanted is None and value is not None:
        wanted = pydantic.TypeAdapter(hint).validate_python(value)
    assert found == wanted and type(found) is type(wanted)
    if isinstance(found, list):
        assert list(map(type, found)) == list(map(type, wanted))


@pytest.mark.parametrize("value, hint, why", [
    (True, int, "a: expected an integer, found True"), (1, bool, "boolean"),
    (1.5, int, "integer"), ("1", int, "integer"), (1, str, "string"),
    (float("inf"), int, "integer"), (None, str, "string, found nothing"),
    ("c", Literal["a", "b"], "a: expected 'a' or 'b', found 'c'"),
    ("x", int | None, "a: expected an integer, found 'x'"),
    ({}, int | Point, "a: expected an integer, found {}; a.x: expected a v"),
    ("x", int | bool, "a: expected an integer or a boolean, found 'x'"),
    ("pink", Colour, "a: expected 'red' or 'blue', found 'pink'"),
    ("June", datetime.date, "a: expected a valid date in the format YYYY"),
    (5, datetime.date, "a: expected a valid date, found 5"),
    ([1], tuple[int, str], "a.1: expected a value, found nothing"),
    ([1, 2], tuple[int, str], "a[1]: expected a string, found 2"),
    ({"deep": [{"n": "x"}]}, dict[str, list[Model]],
     "a.deep[0].n: expected a valid integer, unable to parse"),
    ({"n": -1}, Model, "a.n: expected greater than or equal to 0, found -1"),
    ("", Annotated[str, pydantic.Field(min_length=1)],
     "a: expected a value that fits (String should have at least 1 char"),
    ({"0": 1}, list[int], "a: expected an array"),
    ([1, "x"], list[int], "a[1]: expected an integer"),
    ([], dict[str, int], "an object"), ({"k": "x"}, dict[str, int], "a.k: "),
    ({}, Point, "a.x: expected a value"), (
        {"x": 1, "z": 2}, Point, "a: expected no keys but x, y, found 'z'"),
    ({"x": 1, "size": 2}, Point, "found 'size'"),
])
def test_values_that_do_not_fit(value, hint, why):
    with pytest.raises(ChatError) as error:
        fit(value, hint, "a")
    assert why in str(error.value)


@settings(deadline=None, max_examples=200)
@given(JSON | st.floats())
def test_fit_accepts_what_the_schema_says(value):
    def whole(each):
        return not isinstance(each, bool) and (isinstance(each, int) or (
            isinstance(each, float) and each.is_integer()))

    for hint, wanted in (
            (int, whole(value)), (str, isinstance(value, str)),
            (bool, isinstance(value, bool)),
            (list[int | str], isinstance(value, list) and all(
                whole(v) or isinstance(v, str) for v in value)),
            (dict[str, int] | None, value is None or (
                isinstance(value, dict) and all(map(whole,
                                                    value.values()))))):
        try:
            fit(value, hint)
        except ChatError:
            assert not wanted
        else:
            assert wanted


# -- tools ------------------------------------------------------------------

def search(query: str, limit: int = 5,
           where: Literal["web", "mail"] = "web",
           near: Point | None = None) -> list[dict]:
    """Searches
    everywhere.

    Args:
        query: what to look for
        limit (int): at most
            so many

    Returns:
        hits: none
    """
    if query == "bad":
        raise KeyError("no such index")
    return [{"query": query, "limit": limit, "where": where,
             "near": near and near.x}]


def test_a_function_is_described_and_called():
    offer = function_tool(search)
    assert (offer.tool.name, offer.tool.description) == (
        "search", "Searches\neverywhere.")
    assert offer.tool.parameters == {
        "type": "object", "required": ["query"],
        "additionalProperties": False, "properties": {
            "query": {"type": "string", "description": "what to look for"},
            "limit": {"type": "integer", "description": "at most so many",
                      "default": 5},
            "where": {"type": "string", "enum": ["web", "mail"],
                      "default": "web"},
            "near": POINT | {"nullable": True}}}
    assert json.loads(offer.run('{"query": "é", "near": {"x": 2}}')) == [
        {"query": "é", "limit": 5, "where": "web", "near": 2.0}]
    assert "é" in offer.run('{"query": "é"}')  # not escaped


@pytest.mark.parametrize("arguments, why", [
    ("", "error: arguments.query: expected a value"),
    ("{", "error: JSONDecodeError"), ("[]", "expected an object"),
    ('{"query": 1}', "error: arguments.query: expected a string, found 1"),
    ('{"query": "a", "limit": "5"}', "arguments.limit: expected an integer"),
    ('{"query": "a", "page": 1}', "no keys but query, limit, where, near"),
    ('{"query": "a", "limit": NaN}', "error: ValueError: NaN is no JSON"),
    ('{"query": "bad"}', "error: KeyError: 'no such index'"),
    ("[" * 100_000, "error: RecursionError"),
    ('{"query": "a", "limit": ' + "9" * 5000 + "}", "error: ValueError"),
])
def test_a_wrong_call_is_answered_in_words(arguments, why):
    assert why in function_tool(search).run(arguments)


def test_what_a_function_returns_is_text():
    def give(value: Any) -> Any:
        return {"none": None, "point": Point(1.0), "half": "\ud800",
                "set": {1}}[value]

    run_ = function_tool(give).run
    assert run_('{"value": "none"}') == "null"
    assert json.loads(run_('{"value": "point"}')) == {"x": 1, "y": 0,
                                                      "size": 1}
    assert run_('{"value": "half"}') == "?"
    assert run_('{"value": "set"}') == "[1]"
    assert function_tool(today).tool.parameters is None
    assert len(function_tool(today).run("")) == 10


def untyped(a) -> None:
    pass


def many(*a: int) -> None:
    pass


def positional(a: int, /) -> None:
    pass


@dataclasses.dataclass
class Tree:
    branches: "list[Tree]"


def grow(tree: Tree) -> None:
    pass


class Branch(pydantic.BaseModel):
    twigs: list["Branch"] = []


def climb(branch: Branch) -> None:
    pass


def lost(place: "Nowhere") -> None:  # noqa: F821
    pass


@pytest.mark.parametrize("tools, why", [
    ([untyped], "tool untyped, a: expected a type hint"),
    ([int], "tools: expected a function, not a class, found"),
    ([max], "tool max: no signature found"),
    ([{"type": "web_search"}], "tools[0].type: expected 'function' (built-in "
     "tools are not run here), found 'web_search'"),
    ([{"type": "function", "name": "f", "inputSchema": {"a": 1}}],
     "tools[0].inputSchema"),
    ([{"function": {"name": "f", "parameters": {"default": {1}}}}],
     "tools[0].function.parameters: expected JSON"),
    ([{"function": {"name": "f", "parameters": {"default": float("inf")}}}],
     "tools[0].function.parameters: expected JSON"),
    ([Branch], "tools: expected a function, not a class"),
    ([climb], "tool climb, branch: expected type hints that end"),
    ([many], "tool many, a: expected an argument that can be given by name"),
    ([positional], "tool positional, a: "),
    ([grow], "tool grow, tree: expected type hints that end"),
    ([lost], "tool lost: name 'Nowhere' is not defined"),
    ([lambda: 1], "a function with a name, which a lambda has not"),
    ([3], "tools: expected a function or a dict, found 3"),
    ([today, today], "tools[1]: expected a name of its own, found 'today'"),
    ([{"function": "f"}], "tools[0].function: expected a dict"),
    ([{}], "tools[0].function: expected a dict, found nothing"),
    ([{"function": {"name": "a b"}}], "tools[0].function.name"),
    ([{"function": {"name": "f", "parameters": []}}], "parameters"),
])
def test_wrong_tools_are_named(tools, why):
    with pytest.raises(ChatError) as error:
        read_tools(tools)
    assert why in str(error.value)


# -- tools of every shape ---------------------------------------------------

async def later(text: str, seconds: float = 0) -> str:
    """Waits."""
    await asyncio.sleep(seconds)
    return text.upper()


class Shop:
    """Sells."""

    def __init__(self) -> None:
        self.sold: list[str] = []

    def __call__(self, thing: str) -> int:
        """Buys a thing.

        Args:
            thing: what
        """
        self.sold.append(thing)
        return len(self.sold)

    def price(self, thing: str, *, much: bool = False) -> float:
        """The price."""
        return 2.5 * (2 if much else 1)

    async def ship(self, thing: str) -> str:
        return f"{thing} shipped"


def test_async_functions_run_with_and_without_a_loop():
    offer = function_tool(later)
    assert offer.run('{"text": "a"}') == "A"

    async def inside() -> str:
        return offer.run('{"text": "b"}')

    assert asyncio.run(inside()) == "B"
    partial = functools.partial(later, seconds=0)
    assert function_tool(partial).run('{"text": "c"}') == "C"
    assert function_tool(Shop().ship).run('{"thing": "x"}') == "x shipped"

    async def fails() -> str:
        raise LookupError("nothing there")

    assert function_tool(fails).run("") == "error: LookupError: nothing there"


def test_partials_methods_and_objects_are_tools():
    shop = Shop()
    offers = read_tools([
        shop, shop.price, functools.partial(search, limit=7),
        function_tool(functools.partial(functools.partial(
            later, seconds=0), "given"), name="say"),
        function_tool(lambda: 1, name="one"), functools.cache(today)])
    assert [*offers] == ["Shop", "price", "search", "say", "one", "today"]
    assert offers["Shop"].tool.description == "Buys a thing."
    assert offers["Shop"].tool.parameters["properties"] == {
        "thing": {"type": "string", "description": "what"}}
    assert offers["Shop"].run('{"thing": "a"}') == "1" == str(len(shop.sold))
    assert offers["price"].run('{"thing": "a", "much": true}') == "5.0"
    assert "limit" not in offers["search"].tool.parameters["properties"]
    assert '"limit": 7' in offers["search"].run('{"query": "a"}')
    assert "no keys but" in offers["search"].run('{"query": "", "limit": 1}')
    assert offers["say"].tool.parameters is None
    assert offers["say"].run("{}") == "GIVEN"
    assert "no keys but none, found 'x'" in offers["say"].run('{"x": 1}')
    assert offers["one"].run("") == "1" and len(offers["today"].run("")) == 10


def test_what_a_partial_has_filled_in_is_not_shown():
    def send(text: str, token: str) -> str:
        return text + token

    offer = function_tool(functools.partial(send, token="secret"))
    assert "secret" not in str(offer.tool)
    assert offer.run('{"text": "a "}') == "a secret"


def plan(day: datetime.date, model: Model, colours: set[Colour],
         box: tuple[int, int] = (1, 2), shade: Colour = Colour.RED,
         end: datetime.date = datetime.date(2025, 1, 2),
         never: Any = threading.Lock) -> dict:
    """Plans.

    Args:
        day: the first
    """
    return {"day": day, "model": model, "colours": sorted(
        colour.name for colour in colours), "box": box, "shade": shade}


def test_rich_hints_are_shown_as_typescript_and_come_as_what_they_say():
    offer = function_tool(plan)
    shown = typescript([offer.tool])
    for line in ("// the first (YYYY-MM-DD)\nday: string,", "n: number,",
                 "note?: string | null,", "size?: number, // default: 3",
                 'colours: "red" | "blue"[],', "box?: number[],",
                 'shade?: "red" | "blue", // default: red',
                 'end?: string, // default: "2025-01-02"', "never?: any,"):
        assert line in shown.replace("    ", ""), (line, shown)
    result = offer.run('{"day": "2025-06-28", "model": {"n": 1}, '
                       '"colours": ["blue", "red"], "box": [3, 4.0]}')
    assert json.loads(result) == {
        "day": "2025-06-28", "model": {"n": 1, "note": None, "size": 3},
        "colours": ["BLUE", "RED"], "box": [3, 4], "shade": "red"}
    assert offer.run('{"day": "soon", "model": {}, "colours": ["pink"]}'
                     ).count("expected") == 3


class Bad(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


class Mute:
    def __repr__(self) -> str:
        raise RuntimeError("no words")


def test_whatever_a_tool_does_the_model_gets_a_line(caplog):
    circle: list = []
    circle.append(circle)
    does = {"exit": SystemExit(3), "bad": Bad(), "cancel":
            asyncio.CancelledError(), "stop": GeneratorExit(),
            "mute": Mute(), "circle": circle,
            "keys": {(1, 2): 3}, "iterator": iter([1, 2]), "bytes": b"\xff",
            "nan": float("nan"), "tensor": torch.tensor(3)}

    def do(what: str) -> Any:
        if isinstance(does[what], BaseException):
            raise does[what]
        return does[what]

    offer = function_tool(do)
    found = {what: offer.run(json.dumps({"what": what})) for what in does}
    assert found["exit"] == "error: SystemExit: 3"
    assert found["bad"] == "error: Bad" and found["mute"].startswith("error:")
    assert found["cancel"] == "error: CancelledError"
    assert found["circle"] == "[[...]]" and found["iterator"] == "[1, 2]"
    assert found["tensor"] == '"tensor(3)"' and found["nan"] == "NaN"
    for what in does:
        assert found[what] and found[what].encode()
    logged = [record for record in caplog.records if record.exc_info]
    assert len(logged) == 5 and logged[0].name == "gptoss"
    assert "Traceback" in caplog.text and "does[what]" in caplog.text
    assert offer.run("{") and len(caplog.records) == 5  # not the tool's fault
    does["half"] = ValueError("\ud800")     # which no log in UTF-8 can hold
    with caplog.at_level(logging.CRITICAL, "gptoss"):
        assert offer.run('{"what": "half"}') == "error: ValueError: ?"
    does["c"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        offer.run('{"what": "c"}')


@pytest.mark.parametrize("kind", ["plain", "async", "stubborn"])
def test_a_tool_that_hangs_is_left_and_the_turn_goes_on(kind, caplog):
    ended = threading.Event()

    def plain() -> str:
        ended.wait(20)
        return "late"

    async def polite() -> str:
        try:
            await asyncio.sleep(20)
        finally:
            ended.set()
        return "late"

    async def stubborn() -> str:
        ended.wait(20)
        return "late"

    tool = {"plain": plain, "async": polite, "stubborn": stubborn}[kind]
    one = chat(called(tool.__name__, ""), said("ok"), tools=[tool],
               tool_timeout=0.2)
    began = time.monotonic()
    found = run(one, [user("a")])
    assert found["result"].endswith("error: timed out after 0.2 s")
    assert found["final"] == "ok" and time.monotonic() - began < 15
    assert "its thread goes on" in caplog.text
    if kind == "async":  # this one can be ended
        assert ended.wait(10)
    ended.set()


def test_a_tool_in_time_is_not_limited():
    where = []

    def quick() -> str:
        where.append(threading.current_thread())
        raise TimeoutError("of its own")

    for timeout in (None, 60):
        one = chat(called("quick", ""), said("ok"), tools=[quick],
                   tool_timeout=timeout)
        assert run(one, [user("a")])["result"].endswith(
            "error: TimeoutError: of its own")
    assert where[0] is threading.current_thread() is not where[1]
    for wrong in (0, -1, True, float("nan"), "5"):
        with pytest.raises(ChatError, match="tool_timeout: expected sec"):
            chat("", tool_timeout=wrong)


# -- the calculator ---------------------------------------------------------

@pytest.mark.parametrize("text, wanted", [
    ("347 * 285", "98895"), ("0.1+0.2", "0.3"), (" -(2 + 3)*+4 ", "-20"),
    ("7 // -2", "-4"), ("-7 % 3", "2"), ("2**10", "1024"), ("2**-2", "0.25"),
    ("1e3", "1000"), ("1_000 + .5", "1000.5"), ("0xff", "255"),
    ("1/3", "0.333333333333333..."), ("-1/8", "-0.125"), ("0/5", "0"),
    ("10**300", "1" + "0" * 300), ("1/10**20", "0.00000000000000000001"),
    ("12345678901234567890.5 * 2", "24691357802469135781"),
    ("1/0", "error: division by zero"), ("0**-1", "error: division by zero"),
    ("9**9**9", "error: a number of more than 300 digits"),
    ("1e999999999", "error: a number of more than 300 digits"),
    ("10**300*10**300", "error: a number of more than 300 digits"),
    ("2**0.5", "error: ** takes whole exponents only"),
    ("", "error: "), ("2 +", "error: "), ("1,5", "error: expected numbers"),
    ("1j", "error: "), ("True", "error: "), ("'a'", "error: "),
    ("f(1)", "error: expected numbers"), ("a", "error: "),
    ("().__class__", "error: "), ("1 if 2 else 3", "error: "),
    ("[x for x in (1,)]", "error: "), ("1 << 3", "error: "), ("~1", "error"),
    ("1" * 301, "error: more than 300 characters"),
    ("(" * 150 + "1" + ")" * 150, "error: "), ("-" * 299 + "1", "-1"),
    ("1\x00", "error: "), ("\ud800", "error: "), ("1 # note", "1"),
])
def test_calculator(text, wanted, capsys):
    found = calculator(text)
    assert found == wanted or (wanted.startswith("error")
                               and found.startswith(wanted))
    assert capsys.readouterr().err == ""


NUMBERS = st.integers(0, 10 ** 6).map(str) | st.decimals(
    0, 1000, places=3).map(str)
SUMS = st.recursive(NUMBERS, lambda inner: st.tuples(
    inner, st.sampled_from(["+", "-", "*", "//", "%"]), inner).map(
        lambda three: f"({' '.join(three)})"), max_leaves=12)


@settings(deadline=None, max_examples=200)
@given(SUMS)
def test_calculator_agrees_with_fractions(text):
    exact = re.sub(r"[\d.]+", lambda n: f"Fraction('{n[0]}')", text)
    if len(text) > 300:
        return
    try:
        wanted = eval(exact, {"Fraction": Fraction})  # our own text
    except ZeroDivisionError:
        assert calculator(text) == "error: division by zero"
        return
    assert Fraction(calculator(text)) == wanted


@settings(deadline=None, max_examples=300)
@given(st.text(alphabet="0123456789.+-*/%() eEjx_,a'\"\n\\[]{}:=<>&|~^@!;#"
               "\x00é\ud800", max_size=40))
def test_calculator_answers_anything(text):
    found = calculator(text)
    assert found.startswith("error: ") or found.removesuffix("...")


# -- turns ------------------------------------------------------------------

def test_reply_is_the_final_channel_as_it_comes():
    one = chat(said("héllo", "They greet."))
    pieces = list(one.reply([user("Hi")]))
    assert "".join(pieces) == "héllo" and len(pieces) == 5  # never half of é
    assert one.turn == [{"role": "assistant", "content": "héllo",
                         "reasoning": "They greet."}]
    assert one.usage.finish_reason == "stop"


def test_events_tell_everything_and_count():
    one = chat(called("calculator", '{"expression": "6*7"}'),
               said("It is 42.", "Good."), tools=[calculator])
    events = list(one.events([user("6*7?")]))
    kinds = [kind for kind, _ in groupby(event.kind for event in events)]
    assert kinds == ["call", "result", "analysis", "final", "done"]
    assert (events[0].name, events[0].text) == (
        "calculator", '{"expression": "6*7"}')
    assert (events[1].name, events[1].text) == ("calculator", "42")
    prompt = len(one.prompt([user("6*7?")]))
    answer = len(ids("<|start|>functions.calculator to=assistant<|channel|>"
                     "commentary<|message|>42<|end|><|start|>assistant"))
    written = len(one.memory.tokens) - prompt - answer
    usage = events[-1].usage
    assert usage == one.usage == Usage("stop", prompt, prompt + answer + 1,
                                       written, usage.seconds)
    # all but the very last token went through the model, each once
    assert one.model.fed == len(one.memory.tokens) - 1
    assert usage.seconds > 0


def test_within_a_turn_the_model_reads_its_own_words():
    """A header that no renderer would write stays as it is."""
    odd = ("<|channel|>analysis<|message|>hm<|end|><|start|>assistant to="
           "functions.today<|channel|>commentary<|message|>{ }<|call|>")
    one = chat(odd, said("done"), tools=[today])
    found = run(one, [user("a")])
    text = TOKENIZER.decode(one.memory.tokens)
    assert odd + "<|start|>functions.today to=assistant" in text
    assert "notice" not in found
    assert one.turn[0]["reasoning"] == "hm"


def test_old_analysis_is_dropped_and_the_turns_go_on():
    one = chat(said("one", "first thought"), called("today", "{}"),
               said("two", "second thought"), said("three", "third"),
               tools=[today], effort="high", instructions="Be kind.")
    talk = [{"role": "system", "content": "Be brief."}, user("a")]
    for _ in range(3):
        text = TOKENIZER.decode(one.prompt(talk))
        assert "thought" not in text and text.endswith("<|start|>assistant")
        assert "Reasoning: high" in text
        assert "# Instructions\n\nBe kind.\n\nBe brief.\n\n# Tools" in text
        assert text.count("<|call|>") == text.count("functions.today to=")
        list(one.events(talk))
        talk += [*one.turn, user("b")]
    assert [m["content"] for m in talk if m["role"] == "assistant"] == [
        "one", None, "two", "three"]
    assert len([m for m in talk if "reasoning" in m]) == 3


def test_a_callers_tool_ends_the_turn():
    clock = {"type": "function", "function": {
        "name": "clock", "description": "The time.", "parameters": {
            "type": "object", "properties": {"zone": {"type": "string"}}}}}
    preamble = "<|channel|>commentary<|message|>wait<|end|><|start|>assistant"
    one = chat(preamble + called("clock", '{"zone": "x"}'), said("noon"),
               tools=[clock, today])
    talk = [user("time?")]
    assert run(one, talk)["done"] == "tool_calls"
    assert one.turn == [{"role": "assistant", "content": "wait",
                         "tool_calls": [{"id": "call_1", "type": "function",
                                         "function": {
                                             "name": "clock", "arguments":
                                             '{"zone": "x"}'}}]}]
    talk += [*one.turn, {"role": "tool", "tool_call_id": "call_1",
                         "content": "12:00"}]
    assert run(one, talk) == {"final": "noon", "done": "stop"}
    assert one.usage.prefilled_tokens < 120  # the call was not fed again
    talk += [*one.turn, user("thanks")]
    assert one.prompt(talk)


def test_ids_of_calls_are_new_in_the_conversation():
    one = chat(called("today", ""), said("x"), tools=[today])
    talk = [user("a"), ASKS | {"tool_calls": [CALL | {"id": "call_1"}]},
            TELLS | {"tool_call_id": "call_1"}]
    run(one, talk)
    assert one.turn[0]["tool_calls"][0]["id"] == "call_2"
    assert one.turn[1]["tool_call_id"] == "call_2"


@pytest.mark.parametrize("call, result", [
    (called("nothing", "{}"), "error: there is no tool nothing; there are: "
     "search, today"),
    (called("search", "{oops"), "error: JSONDecodeError"),
    (called("search", '{"query": "bad"}'), "error: KeyError"),
    (called("today", "{}", "<|end|>"), "20"),  # a call without <|call|>
    ("<|channel|>commentary to=today<|message|><|call|>", "20"),
    ("<|channel|>analysis to=functions.today<|message|>{}<|return|>", "20"),
    ("<|channel|>commentary to=python<|message|>1<|call|>",
     "error: there is no tool python"),
    (called("a<b>é", "{}"), "error: there is no tool a_b__"),
    (called("x" * 90, "{}"), "error: there is no tool xxx"),
])
def test_whatever_is_called_the_turn_goes_on(call, result):
    one = chat(call, said("ok"), tools=[search, today])
    talk = [user("a")]
    found = run(one, talk)
    assert found["result"].split(" ", 1)[1].startswith(result)
    assert found["final"] == "ok" and found["done"] == "stop"
    assert read_messages([*talk, *one.turn, user("b")])


def test_rounds_are_bounded():
    one = chat(*[called("today", "{}")] * 9, said("never"), tools=[today],
               rounds=3)
    found = run(one, [user("a")])
    assert found["result"].count("|") == 2 and found["done"] == "length"
    assert "not run: call 4 of at most 3" in found["notice"]
    assert len(one.turn) == 6
    assert read_messages([user("a"), *one.turn, user("b")])
    none = chat(called("today", "{}"), tools=[today], rounds=0)
    assert "result" not in run(none, [user("a")]) and none.turn == []


# -- malformed output -------------------------------------------------------

@pytest.mark.parametrize("text, final", [
    ("<|return|>", ""), ("<|end|><|return|>", ""), ("hello<|return|>",
                                                    "hello"),
    ("<|channel|><|return|>", ""), ("<|message|>hello<|return|>", "hello"),
    ("<|channel|>other<|message|>hello<|return|>", ""),
    ("<|channel|>analyis<|message|>x<|end|><|start|>assistant<|channel|>final"
     "<|message|>hello<|return|>", "hello"),
    ("<|channel|>final<|message|><|return|>", ""),
    ("<|channel|>final<|message|>a<|start|>assistant<|channel|>final"
     "<|message|>b<|return|>", "a\n\nb"),
    ("<|channel|>final<|message|>a<|call|>", "a"),
    ("<|channel|>final<|message|>a<|constrain|>b<|return|>", "ab"),
    ("<|channel|>final<|message|>a<|endoftext|>", "a"),
    ("<|channel|>final<|message|>a<|end|><|start|>user<|message|>b<|end|>"
     "<|start|>assistant<|channel|>final<|message|>c<|return|>", "a"),
    ("<|channel|>commentary to=assistant<|message|>a<|call|>", ""),
    ("<|channel|>final to=<|message|>a<|return|>", "a"),
])
def test_malformed_output_is_reported(text, final):
    one = chat(text)
    talk = [user("a")]
    found = run(one, talk)
    assert found.get("final", "") == final and found["done"] == "stop"
    assert found["notice"]
    assert read_messages([*talk, *one.turn, user("b")])


def test_thinking_only_is_reported():
    one = chat("<|channel|>analysis<|message|>hm<|return|>")
    assert "without an answer" in run(one, [user("a")])["notice"]
    assert one.turn == [{"role": "assistant", "content": None,
                         "reasoning": "hm"}]


SOUP = st.lists(st.sampled_from([
    *CONTROL, "assistant", "user", "final", "analysis", "commentary",
    " to=functions.today", " to=x", "json", "{}", "a", "\xff"]), max_size=14)


@settings(deadline=None, max_examples=20)
@given(st.lists(SOUP, min_size=1, max_size=3))
def test_any_output_ends_in_done(soups):
    script = ["".join(soup) + "<|return|>" for soup in soups]
    one = chat(*script, tools=[today], rounds=2, max_new_tokens=60)
    talk = [user("a")]
    found = run(one, talk)
    assert found["done"] in ("stop", "length")
    assert read_messages([*talk, *one.turn, user("b")])
    assert one.memory.cache.length == len(one.memory.tokens) - 1


# -- limits and options -----------------------------------------------------

def test_max_new_tokens_is_for_the_whole_turn():
    one = chat(called("today", "{}"), said("hello!"), tools=[today],
               max_new_tokens=len(ids(called("today", "{}"))) + 10)
    assert run(one, [user("a")])["done"] == "length"
    assert one.usage.generated_tokens == one.max_new_tokens
    assert one.turn[-1]["content"] == "hel"


def test_a_full_context_ends_in_length_and_a_fuller_one_is_refused():
    one = chat(said("b" * 200))
    room = CONFIG.max_position_embeddings - len(one.prompt([user("")]))
    found = run(one, [user("a" * (room - 30))])
    assert found["done"] == "length"
    assert found["notice"] == "the context of 2048 tokens is full"
    assert len(one.memory.tokens) == CONFIG.max_position_embeddings + 1
    assert one.turn[0]["content"].startswith("b")
    with pytest.raises(ChatError, match="messages: expected at most 2048 "
                                        "tokens .* found 2049"):
        one.events([user("a" * (room + 1))])
    assert run(one, [user("a")])["done"] == "stop"  # and still works


def test_a_result_that_does_not_fit_ends_in_length():
    def much() -> str:
        return "x" * 5000

    one = chat(called("much", ""), said("never"), tools=[much])
    found = run(one, [user("a")])
    assert found["done"] == "length" and "final" not in found
    assert "context of 2048 tokens is full" in found["notice"]
    assert run(one, [user("a")])["final"] == "never"


@pytest.mark.parametrize("options, why", [
    ({"effort": "huge"}, "effort: expected one of low, medium, high"),
    ({"max_new_tokens": 0}, "max_new_tokens: expected an integer >= 1"),
    ({"seed": -1}, "seed: expected an integer >= 0"),
    ({"rounds": True}, "rounds: expected"), ({"slack": 1.5}, "slack: "),
    ({"instructions": 3}, "instructions: expected a string"),
    ({"tools": [3]}, "tools: expected"),
])
def test_wrong_options_are_named(options, why):
    with pytest.raises(ChatError, match=why):
        chat("", **options)


def test_sampler_options_and_a_tokenizer_without_harmony():
    with pytest.raises(GenerateError, match="top_p"):
        chat("", top_p=0)
    plain = Tokenizer(tokenizer_json({bytes([b]): b for b in range(256)},
                                     {256: "<|endoftext|>"}))
    with pytest.raises(ChatError, match="control tokens"):
        Chat((Scripted(), plain))


def test_a_seed_repeats_and_reset_begins_it_anew():
    def texts(one: Chat) -> list[dict]:
        return [run(one, [user(text)]) for text in "ab"]

    first, other = (chat(seed=seed, temperature=1.0, max_new_tokens=30)
                    for seed in (1, 2))
    wanted = texts(first)
    assert wanted != texts(other)
    assert texts(first) != wanted
    first.reset()
    assert first.memory.tokens == [] and first.turn == []
    assert texts(first) == wanted


def test_date_and_effort_are_in_the_prompt():
    one = chat(date="2031-01-02")
    assert "Current date: 2031-01-02\n" in TOKENIZER.decode(
        one.prompt([user("a")]))
    one.effort = "low"
    assert "Reasoning: low" in TOKENIZER.decode(one.prompt([user("a")]))
    one.effort = "none"
    with pytest.raises(ChatError, match="effort"):
        one.events([user("a")])
    assert "Current date" not in TOKENIZER.decode(
        chat(date="").prompt([user("a")]))
    assert today() in TOKENIZER.decode(chat(date=None).prompt([user("a")]))


# -- the cache --------------------------------------------------------------

def fresh(model: Scripted, tokens: list[int]) -> torch.Tensor:
    """Logits after `tokens`, without any cache."""
    with torch.no_grad():
        return GptOss.forward(model, torch.tensor([tokens]))[0, -1]


@pytest.mark.parametrize("slack", [0, 40, 1024])
def test_a_turn_feeds_only_what_is_new(slack):
    """Turn by turn, the tokens fed are those that differ, and a replay of
    7 tokens (one sliding layer, window 8) if more than slack + 1 go."""
    one = chat(*[said("answer", "thought" * n) for n in range(1, 5)],
               slack=slack)
    talk, before = [], []
    for n in range(4):
        talk.append(user(f"question {n}"))
        prompt = one.prompt(talk)
        shared = common_prefix(prompt, before)
        gone = max(0, len(before) - 1 - shared)
        run(one, talk)
        assert one.usage.prompt_tokens == len(prompt)
        assert one.usage.prefilled_tokens == len(prompt) - shared + (
            0 if gone <= slack + 1 else 7)
        if n:  # of the last answer only its first control token was kept
            assert prompt[shared:] == ids(TOKENIZER.decode(prompt)
                                          .rpartition("<|channel|>")[2])
        before = list(one.memory.tokens)
        talk += one.turn


def step(memory: Memory, prompt: list[int]) -> torch.Tensor:
    """Feed what `prompt` needs; the logits after it."""
    start = memory.resume(prompt)
    with torch.no_grad():
        logits = memory.model(torch.tensor([prompt[start:]]), memory.cache)
    return logits[0, -1]


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 12), st.lists(
    st.tuples(st.integers(0, 70), st.integers(1, 25), st.booleans()),
    min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_memory_is_exact_whatever_is_kept_and_left(slack, steps, rng):
    """Prompts that share any part with the last one, some of them left in
    the middle of a forward: the logits are those of a fresh start."""
    model = MODEL
    memory, before = Memory(model, slack), []
    for keep, new, left in steps:
        prompt = before[:keep] + [rng.randrange(256) for _ in range(new)]
        if left:
            layer = rng.randrange(4)
            handle = model.layers[layer].register_forward_pre_hook(stop_here)
            with pytest.raises(KeyboardInterrupt):
                step(memory, prompt)
            handle.remove()
        else:
            torch.testing.assert_close(step(memory, prompt),
                                       fresh(model, prompt), atol=1e-5,
                                       rtol=0)
        before = prompt
    torch.testing.assert_close(step(memory, before), fresh(model, before),
                               atol=1e-5, rtol=0)


def stop_here(module, inputs):
    raise KeyboardInterrupt


MODEL = Scripted(layers=4)


def test_an_interrupt_at_any_forward_leaves_the_chat_right():
    """Ctrl-C in the middle of the n-th forward, in a layer, for many n."""
    for nth in (1, 2, 9, 25):
        one = chat(said("abc", "x" * 30), said("second", "y"), slack=0)
        count = 0

        def hook(module, inputs, nth=nth):
            nonlocal count
            count += 1
            if count == nth:
                raise KeyboardInterrupt

        handle = one.model.layers[1].register_forward_pre_hook(hook)
        with pytest.raises(KeyboardInterrupt):
            list(one.events([user("first")]))
        handle.remove()
        one.model.script, one.model.at = [ids(said("second", "y"))], 0
        talk = [user("first"), *one.turn, user("again")]
        assert run(one, talk)["final"] == "second"
        torch.testing.assert_close(
            one.model.last, fresh(one.model, one.memory.tokens[:-1]),
            atol=1e-5, rtol=0)


@pytest.mark.parametrize("way", ["close", "forget", "keep", "tool"])
def test_a_turn_that_is_left_leaves_the_chat_usable(way):
    def interrupted() -> str:
        raise KeyboardInterrupt

    script = [called("interrupted", "")] if way == "tool" else [
        said("abcdef", "thinking")]
    one = chat(*script, tools=[interrupted])
    talk = [user("first")]
    if way == "tool":
        with pytest.raises(KeyboardInterrupt):
            list(one.events(talk))
        assert one.turn == []
    else:
        reply = one.reply(talk)
        assert next(reply) + next(reply) == "ab"
        assert one.turn == [{"role": "assistant", "content": "ab",
                             "reasoning": "thinking"}]
        if way == "close":
            reply.close()
        elif way == "forget":
            del reply
            gc.collect()
    talk += [*one.turn, user("second")]
    one.model.script, one.model.at = [ids(said("ok"))], 0
    assert "".join(one.reply(talk)) == "ok"
    if way == "keep":
        assert list(reply) == []  # it ended when the next turn began
    torch.testing.assert_close(
        one.model.last, fresh(one.model, one.memory.tokens[:-1]), atol=1e-5,
        rtol=0)


def test_a_tool_cannot_use_the_chat_that_called_it():
    def again() -> str:
        return "".join(one.reply([user("x")]))

    one = chat(called("again", ""), said("ok"), tools=[again])
    found = run(one, [user("a")])
    assert found["result"].startswith(
        "again error: chat: in the middle of a turn")
    assert found["final"] == "ok"


def test_prompts_again_and_shorter_are_exact():
    one = chat(said("x", "y"), said("x", "y"), said("z"), slack=0)
    talk = [user("a" * 40), {"role": "assistant", "content": "b"},
            user("c")]
    run(one, talk)
    run(one, talk)  # the same again: one token is fed, and what rings need
    assert one.usage.prefilled_tokens == 1 + CONFIG.sliding_window - 1
    run(one, talk[:1])
    torch.testing.assert_close(
        one.model.last, fresh(one.model, one.memory.tokens[:-1]), atol=1e-5,
        rtol=0)


# -- the order of what was said ---------------------------------------------

START = "<|start|>assistant"


def wrote(channel: str, text: str) -> str:
    return f"<|channel|>{channel}<|message|>{text}<|end|>{START}"


@pytest.mark.parametrize("script, turn", [
    ([("analysis", "A1"), ("commentary", "C1"), ("analysis", "A2"),
      ("commentary", "C2"), ("final", "F")],
     [{"reasoning": "A1", "content": "C1", "phase": "commentary"},
      {"reasoning": "A2", "content": "C2", "phase": "commentary"},
      {"content": "F"}]),
    ([("commentary", "C1"), ("final", "F")],
     [{"content": "C1", "phase": "commentary"}, {"content": "F"}]),
    ([("commentary", "C1"), ("commentary", "C2")],
     [{"content": c, "phase": "commentary"} for c in ("C1", "C2")]),
    ([("analysis", "A1"), ("analysis", "A2"), ("final", "F")],
     [{"reasoning": "A1", "content": None},
      {"reasoning": "A2", "content": "F"}]),
    ([("final", "F1"), ("analysis", "A"), ("final", "F2")],
     [{"content": "F1"}, {"reasoning": "A", "content": "F2"}]),
    ([("analysis", "A")], [{"reasoning": "A", "content": None}]),
])
def test_a_turn_keeps_its_messages_in_order(script, turn):
    text = "".join(wrote(*each) for each in script).removesuffix(
        "<|end|>" + START) + "<|return|>"
    one = chat(text)
    found = run(one, [user("a")])
    assert one.turn == [SAYS | each for each in turn]
    for channel in ("analysis", "commentary", "final"):
        assert found.get(channel, "") == "\n\n".join(
            said for where, said in script if where == channel)
    again = read_messages([user("a"), *one.turn, user("b")])[1][1:-1]
    assert [(each.channel, each.content) for each in again] == script


@pytest.mark.parametrize("before", [
    [("analysis", "A")], [("commentary", "C")],
    [("analysis", "A1"), ("commentary", "C1"), ("analysis", "A2"),
     ("commentary", "C2")], [("analysis", "A1"), ("analysis", "A2")], []])
def test_what_comes_before_a_call_stays_in_the_cache(before):
    """The next prompt begins with the very tokens that the model wrote."""
    clock = {"type": "function", "name": "clock"}
    text = "".join(wrote(*each) for each in before)
    text += ("<|channel|>commentary to=functions.clock <|constrain|>json"
             "<|message|>{}<|call|>").replace("<|channel|>commentary to="
                                              "functions.clock", " to="
                                              "functions.clock<|channel|>"
                                              "commentary")
    one = chat(text, said("noon"), tools=[clock])
    talk = [user("time?")]
    assert run(one, talk)["done"] == "tool_calls"
    held = list(one.memory.tokens)
    talk += [*one.turn, TELLS | {"tool_call_id": "call_1"}]
    assert one.prompt(talk)[:len(held)] == held
    assert run(one, talk)["final"] == "noon"
    assert one.usage.prefilled_tokens == len(
        ids("<|start|>functions.clock to=assistant<|channel|>commentary"
            "<|message|>x<|end|><|start|>assistant")) + 1


def test_an_answer_before_a_call_stays_an_answer():
    one = chat(wrote("final", "F") + called("today", "{}"), said("G"),
               tools=[today])
    run(one, [user("a")])
    assert [(m.get("content"), "tool_calls" in m) for m in one.turn] == [
        ("F", False), (None, True), (one.turn[2]["content"], False),
        ("G", False)]


def test_a_turn_that_did_not_end_is_no_answer():
    """Cut off while thinking; "go on" finds the thought, and no answer."""
    one = chat(said("never", "a long thought"), said("done"),
               max_new_tokens=22)
    talk = [user("q")]
    assert run(one, talk)["done"] == "length"
    thought = one.turn[0]["reasoning"]
    assert one.turn == [SAYS | {"content": None, "reasoning": thought}]
    assert thought and "a long thought".startswith(thought)
    talk += [*one.turn, user("go on")]
    assert "final" not in TOKENIZER.decode(one.prompt(talk)).partition(
        "<|start|>user")[2]
    assert thought in [each.content for each in read_messages(talk)[1]]


# -- left and stopped -------------------------------------------------------

def test_usage_is_of_this_turn():
    one = chat(said("first"), said("second, longer"))
    run(one, [user("a")])
    first = one.usage
    events = one.events([user("b")])
    assert one.usage is None
    assert next(events).kind == "final" and one.usage is None
    events.close()
    assert one.usage.finish_reason == "stopped"
    assert 0 < one.usage.generated_tokens < first.generated_tokens
    one.model.script, one.model.at = [ids(said("third"))], 0
    for event in one.events([user("c")]):
        if event.kind == "final":
            break
    del event
    assert one.usage is None or one.usage.finish_reason == "stopped"
    one.reset()
    assert one.usage is None


def test_a_long_prompt_can_be_stopped_between_its_chunks():
    text = "x" * 300
    for slack in (0, 1024):
        one = chat(said("ok"), said("ok"), said("ok"), said("ok"),
                   prefill_chunk=32, slack=slack)
        size = len(one.prompt([user(text)]))
        for asked in (1, 2, 5):
            count = iter(range(asked))
            events = list(one.events([user(text)], progress=True,
                                     stop=lambda count=count: next(
                                         count, None) is None))
            assert [event.kind for event in events] == (
                ["progress"] * asked + ["done"])
            assert events[-1].text == "stopped" == one.usage.finish_reason
            assert one.turn == [] and one.usage.generated_tokens == 0
            assert one.usage.prefilled_tokens <= asked * 32
            assert one.memory.cache.length >= 32 * asked
        one.model.script, one.model.at = [ids(said("ok"))], 0
        fed = one.model.fed
        assert run(one, [user(text)])["final"] == "ok"
        assert one.usage.prefilled_tokens < size - 32  # what was fed is kept
        assert one.model.fed - fed == one.usage.prefilled_tokens + len(
            ids(said("ok"))) - 1
        torch.testing.assert_close(
            one.model.last, fresh(one.model, one.memory.tokens[:-1]),
            atol=1e-5, rtol=0)


def test_progress_counts_down_and_only_if_asked():
    one = chat(said("ok"), said("ok"), prefill_chunk=64)
    talk = [user("x" * 200)]
    size = len(one.prompt(talk))
    events = list(one.events(talk, progress=True))
    assert [event.text for event in events if event.kind == "progress"] == [
        str(size - n) for n in range(64, size, 64)]
    assert one.usage.prefilled_tokens == size
    one.reset()
    assert "progress" not in {event.kind for event in one.events(talk)}


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 40), st.lists(
    st.tuples(st.integers(0, 120), st.integers(1, 60), st.integers(1, 9),
              st.integers(0, 9)), min_size=1, max_size=5),
    st.randoms(use_true_random=False))
def test_memory_is_exact_after_stops_between_chunks(slack, steps, rng):
    memory, before = Memory(MODEL, slack), []
    for keep, new, chunk, pauses in steps:
        before = before[:keep] + [rng.randrange(256) for _ in range(new)]
        for n, token in enumerate(memory.write(
                before, prefill_chunk=chunk, max_new_tokens=1,
                sampler=Sampler(0))):
            if token is None and n == pauses:
                break
    torch.testing.assert_close(step(memory, before), fresh(MODEL, before),
                               atol=1e-5, rtol=0)


@pytest.mark.parametrize("at", range(0, 30, 3))
def test_stop_is_asked_before_every_forward(at):
    one = chat(said("abcdef", "thinking"), called("today", "{}"),
               tools=[today])
    count = 0

    def stop() -> bool:
        nonlocal count
        count += 1
        return count > at

    events = list(one.events([user("a")], stop=stop))
    assert events[-1].kind == "done"
    assert events[-1].text == "stopped" and count == at + 1
    assert one.usage.generated_tokens == at
    with pytest.raises(ZeroDivisionError):
        list(one.events([user("a")], stop=lambda: 1 / 0))
    assert list(one.reply([user("a")], stop=lambda: True)) == []


# -- the shipped model ------------------------------------------------------

def test_kept_cache_and_fresh_cache_answer_alike():
    """Three greedy turns of the shipped model in float32."""
    options = {"temperature": 0, "date": "2025-06-28", "max_new_tokens": 30,
               "effort": "low"}
    fresh = Chat(dtype=torch.float32, **options)
    pair, wanted, talk = (fresh.model, fresh.tokenizer), [], []
    for question in ("Tell me a story.", "What is 2 + 3?", "Thanks!"):
        talk = [*talk, user(question)]
        fresh.reset()
        wanted.append((talk, run(fresh, talk), fresh.memory.tokens))
        talk = talk + fresh.turn
    for slack in (0, 1024):
        kept = Chat(pair, **options, slack=slack)
        for talk, events, tokens in wanted:
            assert run(kept, talk) == events
            assert kept.memory.tokens == tokens
    assert kept.usage.prefilled_tokens < fresh.usage.prefilled_tokens


def test_package_face():
    import gptoss

    assert gptoss.Chat is Chat
    code = Sampler(0)
    assert Chat((MODEL, TOKENIZER), "low", temperature=0).sampler == code
    assert sys.modules["gptoss.chat"].TOOLS == {"calculator": calculator,
                                                "today": today}


# -- the command, in a process of its own -----------------------------------

def child() -> None:
    """`python -m gptoss`, with a scripted model for the shipped one."""
    from gptoss import commands

    script = json.loads(os.environ["SCRIPT"])
    commands.load_pair = lambda *_: (Scripted(*script), TOKENIZER)
    sys.exit(commands.main(sys.argv[1:]))


ROOT = Path(__file__).parents[1]
CHILD = [sys.executable, "-c", "import sys; sys.path.insert(0, 'tests'); "
         "import test_chat; test_chat.child()", "chat"]


def environment(*script: str, **more: str) -> dict[str, str]:
    return os.environ | {"SCRIPT": json.dumps(script), "TERM": "xterm",
                         "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT),
                         } | more


def test_piped_lines_are_answered_and_nothing_else_is_written():
    done = subprocess.run(
        [*CHILD, "--temperature", "0"], cwd=ROOT, capture_output=True,
        input=b"what\n\n /six times seven \nlast", timeout=120,
        env=environment(said("né\x1b", "thought"),
                        called("calculator", '{"expression": "6*7"}'),
                        said("42"), "<|return|>", PYTHONIOENCODING="ascii"))
    assert (done.returncode, done.stderr) == (0, b"")
    # raw bytes to a pipe; an empty line for an answer that did not come
    assert done.stdout == b"n\\xe9\x1b\n42\n\n"


class Typist:
    """Somebody at a terminal in front of the command."""

    def __init__(self, env: dict[str, str], *options: str) -> None:
        import pty

        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.chdir(ROOT)
            os.execve(CHILD[0], [*CHILD, *options], env)
        self.log = b""

    def until(self, text: str, seconds: float = 120) -> str:
        """What was shown up to `text`, from the last such call on."""
        end, shown = time.monotonic() + seconds, b""
        while text.encode() not in shown:
            assert time.monotonic() < end, (text, shown)
            if select.select([self.fd], [], [], 0.1)[0]:
                try:
                    shown += os.read(self.fd, 1)
                except OSError:  # the program has left
                    break
        self.log += shown
        return re.sub(r"\x1b\[[\d;]*m", "", shown.decode("utf-8", "replace"))

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def interrupt(self, text: str) -> str:
        """Ctrl-C at the prompt, until `text`. Python's readline misses a
        signal in the moment between the prompt and its waiting for a key:
        then a second one is as good as the first."""
        for _ in range(9):
            time.sleep(0.2)
            self.type("\x03")
            try:
                return self.until(text, 10)
            except AssertionError:
                continue
        raise AssertionError("Ctrl-C has no effect")

    def code(self) -> int:
        """The exit code of the program, which must be leaving."""
        pid, self.pid = self.pid, 0
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def __enter__(self) -> "Typist":
        return self

    def __exit__(self, *error: object) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.fd)


@pytest.mark.skipif(sys.platform == "win32", reason="no pty")
def test_a_terminal_session(tmp_path):
    """Answers, a tool, Ctrl-C in an answer and at the prompt, commands."""
    env = environment(
        said("he\x1b[2Jllo", "bell\x07"),
        called("calculator", '{"expression": "6*7\u202e"}'), said("failed"),
        said("x" * 1200))
    options = "--system", "Be brief.", "--temperature", "0"
    with Typist(env, *options) as tty:
        tty.until("> ")
        answer_and_stop(tty)
        obey_commands(tty, tmp_path / "talk.json")
        assert "again" in tty.interrupt("> ")
        tty.interrupt("\0")  # to the end
        assert tty.code() == 0
    # nothing but what rich and readline write themselves
    for bad in (b"\x1b[2J", b"\x07", b"\xe2\x80\xae", b"Traceback"):
        assert bad not in tty.log


def answer_and_stop(tty: Typist) -> None:
    tty.type("first\n")
    shown = tty.until("> ")
    assert "[analysis] bell\u2407" in shown
    assert "he\u241b[2Jllo" in shown and "read anew]" in shown
    tty.type("second\n")
    shown = tty.until("> ")
    assert "[calculator] {" in shown and "[result] error: inv" in shown
    assert "failed" in shown
    for _ in range(2):  # stopped, and usable afterwards
        tty.type("third\n")
        tty.until("xxxx")
        tty.type("\x03")
        assert "[stopped]" in tty.until("> ")


def obey_commands(tty: Typist, file: Path) -> None:
    def says(line: str, answer: str) -> None:
        tty.type(line + "\n")
        assert answer in tty.until("> ")

    says(f"/save {file}", "11 messages saved")
    talk = json.loads(file.read_text("utf-8"))
    assert [m["role"] for m in talk] == [
        "system", "user", "assistant", "user", "assistant", "tool",
        "assistant", "user", "assistant", "user", "assistant"]
    assert talk[2]["content"] == "he\x1b[2Jllo"
    assert set(talk[8]["content"]) == set(talk[10]["content"]) == {"x"}
    says(f"/save {file}", "exists; /save!")
    says("/effort high", "effort: high")
    says("/nonsense", "[error] /nonsense: no such command")
    says("/help", "Ctrl-C stops an answer")
    says("/reset", "forgotten")
    says(f"/save! {file}", "1 message saved")
    assert json.loads(file.read_text("utf-8")) == [
        {"role": "system", "content": "Be brief."}]
