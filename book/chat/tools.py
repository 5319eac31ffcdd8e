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
# and writes a call of it, some twenty tokens of JSON. Who reads the docstring,
# who runs the call, and what if the arguments are nonsense, the function
# raises, hangs or calls `exit`? Nothing of that may end the conversation:
# below 2,000 mangled strings come as arguments, and each gives the model a
# text to read.

# %% [markdown]
# ## Picture

# %% tags=["hide-input", "picture"]
# Figure: four boxes from top to bottom: the signature and docstring of a
# Python function weather; the TypeScript that the model is shown; the JSON
# that the model writes as a call; the text that it reads as the result. Beside
# the last two a wrong call and its one line.
import textwrap

import matplotlib.pyplot as plt

from gptoss.chat.tools import function_tool
from gptoss.text.harmony import developer_message

plt.style.use("../_static/book.mplstyle")
SOURCE = '''def weather(city: str, days: int = 1) -> dict:
    """The weather in a city.

    Args:
        city: its name, in English
    """
    return {"city": city, "warm": [21] * days}'''
names: dict = {}
exec(SOURCE, names)
drawn = function_tool(names["weather"])
told = developer_message(tools=[drawn.spec]).content
told = told[told.index("//"):told.index("} //")].rstrip()
CALLS = ['{"city": "Oslo", "days": 2}', '{"town": "Oslo"}']
BOXES = [(7.6, 2.1, 0, SOURCE, "C0", "you write a function"),
         (5.1, 1.9, 0, told, "C2", "the model is shown"),
         *((2.8, 0.9, 52 * n, call, "C1",
            ("the model writes", "or it writes")[n])
           for n, call in enumerate(CALLS)),
         *((1.5, 1.5, 52 * n, textwrap.fill(drawn.run(call), 44),
            ("C4", "C5")[n], "and reads")
           for n, call in enumerate(CALLS))]
fig, ax = plt.subplots(figsize=(7, 4.8))
for top, high, x, text, colour, name in BOXES:
    wide = 101 if top > 5 else 49
    ax.barh(top - high / 2, wide, high, x, color=colour, alpha=0.2)
    ax.text(x + 1, top - high + 0.12, text, fontsize=7, va="bottom",
            family="monospace", parse_math=False)
    ax.text(x + wide - 1, top - 0.08, name, fontsize=7.5, ha="right",
            va="top", color="0.25")
for x, start, end in ((10, 5.5, 5.1), (10, 3.2, 2.8), (62, 3.2, 2.8),
                      (10, 1.9, 1.5), (62, 1.9, 1.5)):
    ax.annotate("", (x, end), (x, start), arrowprops={"arrowstyle": "->"})
ax.set(xlim=(-1, 102), ylim=(-0.05, 7.65))
ax.set_axis_off()
plt.show()

# %% [markdown]
# What to see: everything that the model is shown (green) was taken from the
# function (blue): its name, its docstring, its hints, and which argument may
# be left out. What it writes (orange) is text. A right call becomes Python
# values, the function runs, and its result is text again. A wrong one, on the
# right, becomes a line that says what is wrong: the model wrote the call, and
# may write a better one. (This cell uses the finished package.)

# %% [markdown]
# ## The twenty lines
#
# With [the schema of a hint](schema.ipynb) and its inverse, `fit`, the way
# from a signature to a result is short:

# %%
import inspect
import json
import random
import typing

from gptoss.chat.schema import fit, json_schema
from gptoss.text.harmony import developer_message
from gptoss.text.typescript import Tool


def plainly(function) -> tuple:
    """What the model is told of a function, and what runs a call of it."""
    hints = typing.get_type_hints(function)
    hints.pop("return", None)
    asked = inspect.signature(function).parameters
    spec = Tool(function.__name__, inspect.getdoc(function), {
        "type": "object",
        "properties": {key: json_schema(hints[key]) for key in asked},
        "required": [key for key, one in asked.items()
                     if one.default is one.empty]})

    def run(arguments: str) -> str:
        given = json.loads(arguments)
        values = {key: fit(given[key], hints[key]) for key in given}
        return json.dumps(function(**values))
    return spec, run


def weather(city: str, unit: typing.Literal["celsius", "kelvin"] = "celsius"
            ) -> dict:
    """The weather in a city now.

    Args:
        city: its name, in English
    """
    return {"city": city, "temperature": 21 if unit == "celsius" else 294}


spec, run = plainly(weather)
print(developer_message(tools=[spec]).content)
print(run('{"city": "Oslo", "unit": "kelvin"}'))

# %% [markdown]
# It works, for a model that makes no mistake. Ours is small, and the large
# ones slip as well. So we take a right call, replace up to four characters of
# it at random, and count what happens:

# %%
rng = random.Random(0)


def mangled() -> str:
    """A call of `weather` with up to four wrong characters."""
    text = list('{"city": "Oslo", "unit": "kelvin"}')
    for _ in range(rng.randint(0, 4)):
        text[rng.randrange(len(text))] = rng.choice('{}[]":,x0 ')
    return "".join(text)


CALLS, raised = [mangled() for _ in range(2000)], 0
for arguments in CALLS:
    try:
        run(arguments)
    except Exception:
        raised += 1
print(f"{raised:,} of {len(CALLS):,} calls end the program")

# %% [markdown]
# Each of these would be a traceback in the middle of a conversation. And the
# argument's own description ("its name, in English") has not come through: it
# stands in the middle of the docstring. What follows mends both, and takes
# care of functions that are asynchronous, late, or not plain functions at all.

# %% [markdown]
# ## Code
#
# ### What does the docstring say of each argument?
#
# A docstring in Google's style has sections; the text before the first is
# about the function, and under `Args:` (or `Arguments:`) stands a line for
# each argument, with a type in parentheses or without, that may go on in lines
# that are indented further. `_docs` takes them apart.
#
# A `FunctionTool` is what all this comes to: `spec` is told to the model,
# `run` takes the text of a call and returns a text. A tool without `run` is
# one that the caller of the chat runs.

# %% tags=["export"]
import dataclasses
import functools
import inspect
import json
import logging
import math
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from typing import Any

from gptoss.chat.messages import (
    ChatError,
    as_dict,
    checked_name,
    content_text,
    only_keys,
    require,
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
        parameters = inspect.signature(function).parameters
    except ValueError as error:  # as of many that are written in C
        raise ChatError(f"tool {name}: {error}") from error
    asked = {key: one for key, one in parameters.items()
             if key not in filled}
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


class Unit(enum.Enum):
    CELSIUS = "celsius"
    KELVIN = "kelvin"


@dataclasses.dataclass
class Place:
    city: str
    country: str | None = None


print(_docs(weather), list(_hints(weather, "weather")[0]))
warm = functools.partial(weather, unit="kelvin")
print(_tool_name(warm, None), list(_hints(warm, "weather")[0]))

# %% [markdown]
# ### What does the model read of a result?
#
# A text as it is, anything else as JSON, with letters like é as themselves.
# What JSON does not know is put into its words: a date, a dataclass, a set, an
# iterator. If even that fails, `str` of it. A failure is one line that begins
# with `error: `, the exception's class and its words. Half a character (a lone
# surrogate) becomes a question mark, since no tokenizer could read it.

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


async def _awaited(value: Awaitable[object], timeout: float | None
                   ) -> object:
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
# ### The tool
#
# `_describe` puts docstring and hints into the spec. A default is told if it
# is a text or a finite number, so that the model knows what it gets if it says
# nothing. `function_tool` is then the twenty lines again, with the two
# mistakes kept apart: a call that does not fit is the model's own, and is only
# told to it; a function that fails is the program's, and is logged with its
# traceback as well. `exit` in a tool is such a failure. Only Ctrl-C goes
# through: it is the user's.

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
# ### Tools that somebody else runs
#
# A tool that the caller of a chat runs is described by a dict, in one of two
# shapes of OpenAI's: with the function under a key of its own, or flat.

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
    name = checked_name(given.get("name"), f"{where}.name")
    schema = given.get("parameters")
    require(isinstance(schema, Mapping | None), f"{where}.parameters",
            "a JSON schema", schema)
    try:
        json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ChatError(f"{where}.parameters: expected JSON, found "
                        f"{error}") from None
    return Tool(name, content_text(given.get("description") or "",
                                   f"{where}.description"), schema)


def read_tools(tools: Iterable[Any], timeout: float | None = None
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
for name, tool in read_tools([weather, clock, flat]).items():
    print(name, "is run by", "the caller" if tool.run is None else "us")

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
from typing import Any

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
                  else Decimal(text or ""))  # as written: 0.1 is a tenth
        if abs(number.adjusted()) > 300:
            raise ValueError("a number of more than 300 digits")
        return Fraction(number)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op,
                                                    ast.USub | ast.UAdd):
        value = _evaluate(node.operand, source)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in {*_BINARY, ast.Pow}:
        run: Any = _BINARY.get(type(node.op), _power)
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
    if context.flags[Inexact] or int(exact.as_tuple().exponent) < -300:
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
# ## What is refused
#
# A tool that cannot be told or called is a mistake of the program, and found
# before the conversation begins. Every argument needs a hint and must be one
# that can be given by its name; a function needs a name; two tools may not
# share one; built-in tools of OpenAI's are not run here; a dict's schema must
# be JSON. A wrong `timeout` is refused by [the chat](chat.ipynb).

# %%
def untyped(a) -> None: ...


def many(*a: int) -> None: ...


for wrong in ([untyped], [many], [int], [lambda: 1], [3], [max],
              [weather, weather], [{"type": "web_search"}], [{}],
              [{"type": "function", "name": "two words"}]):
    try:
        read_tools(wrong)
    except ChatError as error:
        print(f"{str(error):.77}")

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
# **Whatever the model writes, it gets a text.** The mangled calls again:

# %%
tool = function_tool(weather)
answers = [tool.run(arguments) for arguments in CALLS]
assert all(isinstance(answer, str) for answer in answers)
failed = sum(answer.startswith("error: ") for answer in answers)
print(f"{failed:,} of {len(answers):,} were told their mistake")
assert failed == raised

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
    more = {k: v for k, v in ours["properties"][key].items()
            if k not in entry}
    print(key, "the same, and ours has", more or "no more")
    assert entry.items() <= ours["properties"][key].items()

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
# ### Exercise 3
#
# A function needs a password that the model must never see. Hand it over so
# that neither the spec nor a mistake shows it, and so that the model cannot
# replace it.

# %% tags=["hide-cell"]
def post(text: str, password: str) -> str:
    """Posts a text."""
    return f"posted by somebody who knows {len(password)} letters"


tool = function_tool(functools.partial(post, password="secret"))
print(list(tool.spec.parameters["properties"]), "secret" in str(tool.spec))
print(tool.run('{"text": "Hi"}'))
print(tool.run('{"text": "Hi", "password": "mine"}'))
# What a partial has filled in is no argument any more, so the model is told
# that there is no such key.

# %% [markdown]
# ## Sources
#
# - huggingface/transformers, `utils/chat_template_utils.py`
#   (`get_json_schema`).
# - OpenAI, `docs/format.md` in openai/harmony: how functions are declared.
