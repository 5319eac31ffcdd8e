"""How does a Python function become a tool?

Generated from book/chat/tools.py; edit the chapter, not this file.
"""

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

# --- What does the docstring say of each argument? ---------------------------

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


# --- What does the model read of a result? -----------------------------------

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


# --- A call, and its time ----------------------------------------------------

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


# --- The tool ----------------------------------------------------------------

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


# --- Tools that somebody else runs -------------------------------------------

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


__all__ = [
    "FunctionTool",
    "ToolTimeout",
    "function_tool",
    "perform",
    "read_tools",
    "result_text",
]
