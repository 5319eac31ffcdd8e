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
#     module: tools
#     public: [FunctionTool, ToolTimeout, function_tool, read_tools]
# ---

# %% [markdown]
# # How does a Python function become a tool?
#
# ## Question
#
# A model can only write. It is shown a function as a few lines of TypeScript
# and writes a call of it, some twenty tokens of JSON. Who reads the
# docstring, who runs the call, and what if the arguments are nonsense, the
# function raises, hangs or calls `exit`? Nothing of that may end the
# conversation: 2,000 random strings as arguments below, and each gives the
# model a text to read.

# %% [markdown]
# ## Code
#
# ### A function and its docstring
#
# A Python function is described by its name, docstring and
# [hints](schema.ipynb), and called when the model asks for it. Whatever goes
# wrong in a call is told to the model in words: it wrote the call, and may
# write a better one.

# %% tags=["export"]
import dataclasses
import functools
import inspect
import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

from gptoss.chat.messages import (
    ChatError,
    as_dict,
    checked_name,
    content_text,
    require,
    only_keys,
)
from gptoss.chat.schema import (
    ArgumentTypes,
    fit_values,
    json_schema,
    spelt,
    type_hints,
)
from gptoss.text.typescript import Tool

_log = logging.getLogger("gptoss")
_SECTION = re.compile(r"^(Args|Arguments|Returns|Raises|Yields|Examples?):"
                      r"[ \t]*$", re.MULTILINE)
_ARGUMENT = re.compile(r"^[ \t]+(\w+)(?: *\([^)]*\))?: *"
                       r"(.+(?:\n[ \t]{6,}\S.*)*)$", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class FunctionTool:
    """A tool, and how it is run; run None: the caller of the chat does."""

    spec: Tool
    run: Callable[[str], str] | None = None


def _docs(function: Callable) -> tuple[str, dict[str, str]]:
    """What a docstring says of the function and, under Args, of each."""
    about, *rest = _SECTION.split(inspect.getdoc(function) or "")
    sections = dict(zip(rest[::2], rest[1::2], strict=True))
    listed = sections.get("Args") or sections.get("Arguments") or ""
    return about.strip(), {name: " ".join(text.split()) for name, text
                           in _ARGUMENT.findall(listed)}

# %% [markdown]
# Name, docstring and hints of a `functools.partial` are those of the function
# inside, and those of an object that can be called are its `__call__`'s. The
# arguments that a partial has filled in are hidden: one of them may be a
# password.

# %% tags=["export"]
def _inner(function: Callable) -> Callable:
    """What has the hints and the docstring of `function`."""
    while isinstance(function, functools.partial):
        function = function.func
    return (function if inspect.isroutine(function)
            else type(function).__call__)


def _tool_name(function: object, name: str | None) -> str:
    """`name`, or the function's; ChatError says why there is none."""
    require(callable(function), "tools", "a function or a dict", function)
    require(not isinstance(function, type), "tools", "a function, not a "
            "class", function)
    while isinstance(function, functools.partial):
        function = function.func
    own = getattr(function, "__name__", type(function).__name__)
    require(name is not None or own != "<lambda>", "tools", "a function with "
            "a name, which a lambda has not: use def", own)
    return checked_name(own if name is None else name,
                        "tools, name of a function")


def _hints(function: Callable, name: str
           ) -> tuple[dict[str, object], dict[str, object]]:
    """The hint of each argument, and the defaults; ChatError without."""
    hints, given = type_hints(_inner(function), f"tool {name}"), function
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
        require(argument.kind in (argument.POSITIONAL_OR_KEYWORD,
                                 argument.KEYWORD_ONLY),
               f"tool {name}, {key}",
               "an argument that can be given by name", str(argument))
        require(key in hints, f"tool {name}, {key}", "a type hint", None)
    return {key: hints[key] for key in asked}, {
        key: argument.default for key, argument in asked.items()
        if argument.default is not argument.empty}

# %%
import datetime
import enum
import typing

from gptoss.text.harmony import developer_message


class Unit(enum.Enum):
    CELSIUS = "celsius"
    KELVIN = "kelvin"


@dataclasses.dataclass
class Place:
    city: str
    country: str | None = None


def weather(city: str, unit: typing.Literal["celsius", "kelvin"] = "celsius"
            ) -> dict:
    """The weather in a city now.

    Args:
        city: its name, in English
    """
    return {"city": city, "temperature": 21 if unit == "celsius" else 294}


print(_docs(weather), list(_hints(weather, "weather")[0]))
warm = functools.partial(weather, unit="kelvin")
print(_tool_name(warm, None), list(_hints(warm, "weather")[0]))

# %% tags=["export"]
def _jsonable(value: object, unknown: Callable | None = None) -> object:
    """`value` in terms of JSON; `unknown` is for what has none."""
    from pydantic_core import to_jsonable_python

    return to_jsonable_python(value, fallback=unknown)


def result_text(value: object) -> str:
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

# %%
print(result_text({"when": datetime.date(2025, 6, 28), "unit": Unit.KELVIN}))
print(_why(KeyError("no such city")))

# %% [markdown]
# ### A call, and its time
#
# A function that is `async` gives something to be awaited, and so may a
# partial of one, which nobody can see beforehand. So we call, look, and await
# what must be awaited on an event loop of its own. If a loop is already
# running here, as in a server or a notebook, a second one cannot, in this
# thread: then it runs in another.
#
# A tool that hangs would hang the turn. `tool_timeout` limits it, at a price
# that should be known. Python can cancel a coroutine where it awaits, but it
# cannot end a thread: a plain function that is late is *left alone*. It goes
# on in its thread until it returns, whatever it still does is done, and its
# result is dropped. So it should have time limits of its own, too.

# %% tags=["export"]
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

# %% tags=["export"]
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

# %%
import asyncio


async def slow(seconds: float) -> str:
    """Sleeps."""
    await asyncio.sleep(seconds)
    return "awake"


print(perform(slow, {"seconds": 0}))  # although a notebook has its own loop
try:
    perform(slow, {"seconds": 60}, timeout=0.1)
except ToolTimeout as error:
    print(error)

# %% [markdown]
# ### A tool

# %% tags=["export"]
def _not_json(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _describe(function: Callable, name: str, types_: ArgumentTypes,
              defaults: Mapping[str, object]) -> Tool:
    """A function as it is told to the model."""
    about, told = _docs(function if inspect.isroutine(function)
                        else _inner(function))
    schema = dict(types_.schema)
    schema["properties"] = {
        key: spelt(entry, told.get(key))
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

# %% tags=["export"]
def function_tool(function: Callable, *, name: str | None = None,
                  timeout: float | None = None) -> FunctionTool:
    """A Python function with type hints as a tool; see `json_schema`.

    Also an async one, a partial, a bound method, an object that can be
    called. name: instead of its own. timeout: seconds that it may take; one
    that is late goes on in its thread, and its result is dropped. What it
    raises is told to the model, and logged with a traceback as "gptoss".
    """
    name = _tool_name(function, name)
    hints, defaults = _hints(function, name)
    for key, hint in hints.items():  # so that an error names the argument
        json_schema(hint, f"tool {name}, {key}")
    types_ = ArgumentTypes(hints, hints.keys() - defaults.keys(),
                           f"tool {name}")

    def run(arguments: str) -> str:
        try:
            values = fit_values(types_, json.loads(
                arguments.strip() or "{}", parse_constant=_not_json),
                "arguments")
        except Exception as error:  # the model's own mistake
            return result_text(_why(error))
        try:
            return result_text(perform(function, values, timeout))
        except ToolTimeout as error:
            _log.warning("gptoss: tool %s %s; its thread goes on", name,
                         error)
            return f"error: {error}"
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit too: it is the tool's
            _log.error("gptoss: tool %s failed", name, exc_info=error)
            return result_text(_why(error))
    return FunctionTool(_describe(function, name, types_, defaults), run)

# %%
tool = function_tool(weather)
print(developer_message(tools=[tool.spec]).content)
for arguments in ('{"city": "Oslo"}', '{"city": 7}', '{"town": "Oslo"}',
                  "Oslo"):
    print(tool.run(arguments))

# %% [markdown]
# Richer hints are shown as a reader of TypeScript expects them:

# %%
def trip(places: list[Place], start: datetime.date, unit: Unit = Unit.KELVIN,
         days: tuple[int, int] | None = None) -> str:
    """Plans a trip.

    Args:
        start: when it begins
    """
    return f"{places[0].city}, {start:%d.%m.}, {unit.name}"


tool = function_tool(trip)
print(developer_message(tools=[tool.spec]).content.split("\n\n", 2)[2])
print(tool.run('{"places": [{"city": "Oslo"}], "start": "2025-06-28"}'))
print(tool.run('{"places": [{"town": "Oslo"}], "start": "today"}'))

# %% [markdown]
# A tool that the caller of a chat runs is described by a dict, in one of two
# shapes:

# %% tags=["export"]
def _dict_tool(given: object, where: str) -> Tool:
    """A tool that a dict describes, in either of OpenAI's shapes."""
    given = as_dict(given, where)
    require(given.get("type", "function") == "function", f"{where}.type",
            "'function' (built-in tools are not run here)",
            given.get("type"))
    if "name" not in given or "function" in given:  # not the flat one
        only_keys(given, ("type", "function"), where)
        where = f"{where}.function"
        given = as_dict(given.get("function"), where)
    only_keys(given, ("type", "name", "description", "parameters", "strict"),
              where)
    name, schema = given.get("name"), given.get("parameters")
    checked_name(name, f"{where}.name")
    require(isinstance(schema, Mapping | None), f"{where}.parameters",
            "a JSON schema", schema)
    try:
        json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ChatError(f"{where}.parameters: expected JSON, found "
                        f"{error}") from None
    return Tool(name, content_text(given.get("description") or "",
                                   f"{where}.description"), schema)


def read_tools(tools: Iterable[object], timeout: float | None = None
               ) -> dict[str, FunctionTool]:
    """Functions, tools and dicts by their name.

    A dict is {"type": "function", "function": {"name", "description",
    "parameters"}}, or flat: {"type": "function", "name", ...}. timeout: of
    the functions. Raises ChatError for another shape, a built-in tool, or a
    name used twice.
    """
    read: dict[str, FunctionTool] = {}
    for n, given in enumerate(tools):
        if isinstance(given, FunctionTool):
            tool = given
        elif isinstance(given, Mapping) or (hasattr(given, "model_dump")
                                            and not callable(given)):
            tool = FunctionTool(_dict_tool(given, f"tools[{n}]"))
        else:
            tool = function_tool(given, timeout=timeout)
        require(tool.spec.name not in read, f"tools[{n}]",
                "a name of its own", tool.spec.name)
        read[tool.spec.name] = tool
    return read

# %%
clock = {"type": "function", "function": {"name": "clock"}}
flat = {"type": "function", "name": "flat_clock"}
print({name: tool.run is None
       for name, tool in read_tools([weather, clock, flat]).items()})
for wrong in ({"type": "web_search"}, lambda: 1, int):
    try:
        read_tools([wrong])
    except ChatError as error:
        print(error)

# %% [markdown]
# ### Two tools that can do no harm
#
# A calculator must not be `eval`. This one reads the syntax tree, knows
# numbers and seven operators, computes in exact fractions, and refuses what
# would take long.

# %% tags=["export:calculator"]
import ast
import datetime
import warnings
from decimal import Context, Decimal, Inexact
from fractions import Fraction

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

# %% tags=["export:calculator"]
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

# %%
print(_evaluate(ast.parse("0.1 + 0.2", mode="eval").body, "0.1 + 0.2"))

# %% tags=["export:calculator"]
def _decimal(value: Fraction) -> str:
    """Exact if that ends within 300 digits, else 15 digits and "..."."""
    context = Context(prec=700)  # 309 digits before the point, 300 behind
    exact = context.divide(Decimal(value.numerator),
                           Decimal(value.denominator))
    if context.flags[Inexact] or exact.as_tuple().exponent < -300:
        return f"{float(value):.15g}..."
    return f"{exact:f}"

# %% tags=["export:calculator"]
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

# %%
for text in ("347 * 285", "0.1 + 0.2", "-7 // 2", "2 ** -3", "10 / 3",
             "9 ** 9 ** 9", "1 / 0", "__import__('os')", "2 +"):
    print(f"{text:16}  {calculator(text)}")

# %% [markdown]
# ## It holds
#
# **The calculator computes.** Random sums, differences and products, against
# Python itself:

# %%
import random

rng = random.Random(0)
for _ in range(500):
    text = str(rng.randint(0, 99))
    for _ in range(rng.randint(1, 6)):
        text = f"({text}) {rng.choice('+-*')} {rng.randint(-99, 99)}"
    assert calculator(text) == str(eval(text)), text

# %% [markdown]
# **Whatever the model writes, it gets a text.** No arguments, however
# mangled, raise:

# %%
tool, answers = function_tool(weather), []
for _ in range(2000):
    text = list('{"city": "Oslo", "unit": "kelvin"}')
    for _ in range(rng.randint(0, 4)):
        text[rng.randrange(len(text))] = rng.choice('{}[]":,x0 ')
    answers.append(tool.run("".join(text)))
assert all(isinstance(answer, str) for answer in answers)
failed = sum(answer.startswith("error: ") for answer in answers)
print(f"{failed:,} of {len(answers):,} were told their mistake")
assert 0 < failed < len(answers)

# %% [markdown]
# ## Against the others
#
# For a function's schema, transformers reads the same hints and docstring:

# %%
from transformers.utils import get_json_schema


def book(name: str, seats: int, days: list[str], note: str | None = None,
         row: float = 1.5) -> str:
    """Books a table.

    Args:
        name: of the guest
        seats: how many
        days: any of these
        note: for the cook
        row: counted from the door
    """


theirs = get_json_schema(book)["function"]["parameters"]
ours = function_tool(book).spec.parameters
assert theirs["required"] == ours["required"]
for key, entry in theirs["properties"].items():
    assert entry == {k: v for k, v in ours["properties"][key].items()
                     if k != "default"}

# %% [markdown]
# ## Takeaways
#
# - Name, docstring and hints of a function are all that a model needs to
#   call it; what it wrote wrong it is told in a line.
# - No failure of a tool is an exception of the conversation.
# - A thread cannot be ended: a time limit leaves a late function alone, it
#   does not stop it.
# - A calculator is a reader of syntax trees, not `eval`.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1
#
# A tool with a `timeout` is late. What does the model read, and does the
# work happen all the same?

# %% tags=["hide-cell"]
import threading

go_on, done = threading.Event(), []


def send_mail(to: str) -> str:
    """Sends a mail."""
    go_on.wait()
    done.append(to)
    return "sent"


logging.getLogger("gptoss").setLevel(logging.ERROR)  # no warning here
late = function_tool(send_mail, timeout=0.05)
print(late.run('{"to": "Mira"}'))
go_on.set()
for thread in threading.enumerate():
    if thread.name == "gptoss tool":
        thread.join()
print(done)
# It does: the model may call again, and Mira gets two mails. What must not
# happen twice needs a limit of its own, inside the function.
assert done == ["Mira"]

# %% [markdown]
# ### Exercise 2
#
# `calculator` gives up on `9 ** 9 ** 9` before it computes the power. How does
# it know? Which power of 7 is the last that it gives, and which would be if
# the digits were not counted afterwards?

# %% tags=["hide-cell"]
last = max(n for n in range(1000)
           if not calculator(f"7 ** {n}").startswith("error"))
print(last, calculator(f"7 ** {last + 1}"))
# A number of b bits to the power n has more than (b - 1) n bits. If those are
# more than 1,024, nothing is computed: for 7, of three bits, from n = 513 on.
# What passes is small enough to be computed, and then its bits are counted.
assert (7 ** last).bit_length() <= 1024 < (7 ** (last + 1)).bit_length()

# %% [markdown]
# ## Sources
#
# - huggingface/transformers, `utils/chat_template_utils.py`
#   (`get_json_schema`).
# - OpenAI, `docs/format.md` in openai/harmony: how functions are declared.
