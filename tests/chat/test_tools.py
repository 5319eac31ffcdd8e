"""Functions as tools: described, called, and answered in words."""

import asyncio
import dataclasses
import datetime
import functools
import json
import logging
import threading
import time
from typing import Any, Literal

import pydantic
import pytest
import torch
from scripted import called, chat, run, said, user
from test_schema import POINT, Colour, Model, Point

from gptoss.chat.calculator import today
from gptoss.chat.messages import ChatError
from gptoss.chat.tools import function_tool, read_tools
from gptoss.text.typescript import typescript

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
    tool = function_tool(search)
    assert (tool.spec.name, tool.spec.description) == (
        "search", "Searches\neverywhere.")
    assert tool.spec.parameters == {
        "type": "object", "required": ["query"],
        "additionalProperties": False, "properties": {
            "query": {"type": "string", "description": "what to look for"},
            "limit": {"type": "integer", "description": "at most so many",
                      "default": 5},
            "where": {"type": "string", "enum": ["web", "mail"],
                      "default": "web"},
            "near": POINT | {"nullable": True}}}
    assert json.loads(tool.run('{"query": "é", "near": {"x": 2}}')) == [
        {"query": "é", "limit": 5, "where": "web", "near": 2.0}]
    assert "é" in tool.run('{"query": "é"}')  # not escaped


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
    assert function_tool(today).spec.parameters is None
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
    tool = function_tool(later)
    assert tool.run('{"text": "a"}') == "A"

    async def inside() -> str:
        return tool.run('{"text": "b"}')

    assert asyncio.run(inside()) == "B"
    partial = functools.partial(later, seconds=0)
    assert function_tool(partial).run('{"text": "c"}') == "C"
    assert function_tool(Shop().ship).run('{"thing": "x"}') == "x shipped"

    async def fails() -> str:
        raise LookupError("nothing there")

    assert function_tool(fails).run("") == "error: LookupError: nothing there"


def test_partials_methods_and_objects_are_tools():
    shop = Shop()
    tools = read_tools([
        shop, shop.price, functools.partial(search, limit=7),
        function_tool(functools.partial(functools.partial(
            later, seconds=0), "given"), name="say"),
        function_tool(lambda: 1, name="one"), functools.cache(today)])
    assert [*tools] == ["Shop", "price", "search", "say", "one", "today"]
    assert tools["Shop"].spec.description == "Buys a thing."
    assert tools["Shop"].spec.parameters["properties"] == {
        "thing": {"type": "string", "description": "what"}}
    assert tools["Shop"].run('{"thing": "a"}') == "1" == str(len(shop.sold))
    assert tools["price"].run('{"thing": "a", "much": true}') == "5.0"
    assert "limit" not in tools["search"].spec.parameters["properties"]
    assert '"limit": 7' in tools["search"].run('{"query": "a"}')
    assert "no keys but" in tools["search"].run('{"query": "", "limit": 1}')
    assert tools["say"].spec.parameters is None
    assert tools["say"].run("{}") == "GIVEN"
    assert "no keys but none, found 'x'" in tools["say"].run('{"x": 1}')
    assert tools["one"].run("") == "1" and len(tools["today"].run("")) == 10


def test_what_a_partial_has_filled_in_is_not_shown():
    def send(text: str, token: str) -> str:
        return text + token

    tool = function_tool(functools.partial(send, token="secret"))
    assert "secret" not in str(tool.spec)
    assert tool.run('{"text": "a "}') == "a secret"


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
    tool = function_tool(plan)
    shown = typescript([tool.spec])
    for line in ("// the first (YYYY-MM-DD)\nday: string,", "n: number,",
                 "note?: string | null,", "size?: number, // default: 3",
                 'colours: "red" | "blue"[],', "box?: number[],",
                 'shade?: "red" | "blue", // default: red',
                 'end?: string, // default: "2025-01-02"', "never?: any,"):
        assert line in shown.replace("    ", ""), (line, shown)
    result = tool.run('{"day": "2025-06-28", "model": {"n": 1}, '
                       '"colours": ["blue", "red"], "box": [3, 4.0]}')
    assert json.loads(result) == {
        "day": "2025-06-28", "model": {"n": 1, "note": None, "size": 3},
        "colours": ["BLUE", "RED"], "box": [3, 4], "shade": "red"}
    assert tool.run('{"day": "soon", "model": {}, "colours": ["pink"]}'
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

    tool = function_tool(do)
    found = {what: tool.run(json.dumps({"what": what})) for what in does}
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
    assert tool.run("{") and len(caplog.records) == 5  # not the tool's fault
    does["half"] = ValueError("\ud800")     # which no log in UTF-8 can hold
    with caplog.at_level(logging.CRITICAL, "gptoss"):
        assert tool.run('{"what": "half"}') == "error: ValueError: ?"
    does["c"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        tool.run('{"what": "c"}')


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
