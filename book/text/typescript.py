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
#     module: typescript
#     public: [Tool]
# ---

# %% [markdown]
# # How does the model learn of a function?

# %% [markdown]
# ## Question
#
# A program offers the model a function: a name, and a JSON schema that says
# which arguments it takes. The model reads tokens and nothing else. Which text
# tells it of the function? Each character counts. A default of 1e-5 that is
# written `1e-05`, as Python does, gives other tokens than the models were
# trained on.
#
# You may skip this chapter at first: the others need of it only that a
# `Tool` becomes a few lines of TypeScript.

# %% [markdown]
# ## Picture

# %% tags=["hide-input", "picture"]
# Figure: left the JSON schema of a function with three arguments, right the
# seven lines of TypeScript that the model reads. Bands of one colour join
# what belongs together; the schema's minimum has no counterpart.
import matplotlib.pyplot as plt

from gptoss.text.typescript import Tool as Finished
from gptoss.text.typescript import typescript as finished

plt.style.use("../_static/book.mplstyle")
SCHEMA = {"type": "object", "required": ["place"], "properties": {
    "place": {"type": "string", "description": "City or coordinates."},
    "days": {"type": "integer", "default": 1, "minimum": 1},
    "unit": {"type": "string", "enum": ["C", "F"]}}}
LEFT = ['{"type": "object",', ' "required": ["place"],', ' "properties": {',
        '  "place": {"type": "string",',
        '    "description": "City or coordinates."},',
        '  "days": {"type": "integer", "default": 1,',
        '    "minimum": 1},',
        '  "unit": {"type": "string",', '    "enum": ["C", "F"]}}}']
right = finished([Finished("weather", "The weather at a place.", SCHEMA)]
                 ).splitlines()[2:-2]
GROUPS = [((0, 3), (0, 2), "C3"), ((3, 5), (2, 4), "C0"),
          ((5, 6), (4, 5), "C1"), ((7, 9), (5, 6), "C2")]  # rows, rows
fig, ax = plt.subplots(figsize=(7, 2.3))
for (a, b), (c, d), colour in GROUPS:
    ax.fill([0, 4.4, 5.4, 9.4, 9.4, 5.4, 4.4, 0],
            [-a, -a, -c - 1, -c - 1, -d - 1, -d - 1, -b, -b], color=colour,
            alpha=0.25, lw=0)
for n, line in enumerate(LEFT):
    ax.text(0.1, -n - 0.5, line, family="monospace", fontsize=7, va="center",
            color="0.5" if "minimum" in line else "k")
ax.text(4.2, -6.5, "lost", fontsize=7, va="center", ha="right", color="0.5")
for n, line in enumerate(right):
    ax.text(5.5, -n - 1.5, line, family="monospace", fontsize=7, va="center")
ax.set(xlim=(0, 9.4), ylim=(-9, 0))
ax.axis("off")
plt.show()

# %% [markdown]
# **What to see.** Left the schema that a program has, right the text that the
# model reads. A description becomes a comment above its line, a default one
# behind it; an argument that is not required gets a question mark. What has
# no place in a type, here the minimum, is lost without a word.

# %% [markdown]
# ## The naive version
#
# Why not show the model the schema itself? JSON is text, too.

# %%
import json

print(json.dumps(SCHEMA)[:75], "...")
print(len(json.dumps(SCHEMA)), "characters as JSON,",
      len("\n".join(right)), "as TypeScript")
print("a default of 1e-5:", json.dumps(1e-5), "in Python")

# %% [markdown]
# It is longer, and above all it is not what the model knows. OpenAI trained
# the models on conversations in which functions are TypeScript types, and
# publishes the renderer of that form, openai-harmony. A model asked in another
# form answers less well, and nothing tells you so. So we write what
# openai-harmony writes, to the token. It does some things that nobody would
# choose (the indent of a nested brace, a description that vanishes); we do
# not ask why, we do the same.

# %% [markdown]
# ## Which type does a schema become?
#
# | of the schema | becomes |
# |---|---|
# | number, integer | `number` |
# | boolean | `boolean` |
# | string, with `enum` | `string`, `"C" \| "F"` |
# | array of T | `T[]`, without `items` `Array<any>` |
# | object | `{ ... }`, a property a line, `name?:` if not required |
# | a list of types, `nullable` | `a \| b`, `a \| null` |
# | `oneOf` | ` \| a` on a line each |
# | title, description, examples | comments above |
# | default | a comment behind: `// default: 3` |
# | anything else | nothing, or `any` |
#
# The table is a recursion: an array holds a schema, an object holds several.
# We begin with what types have in common. A schema may come from anywhere, so
# `_get` gives a value only if it has the kind that we expect.

# %% [markdown]
# ## Code
#
# ### The types

# %% tags=["export"]
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, TypeVar

from gptoss.text.vocabulary import HarmonyError

_NAMES = {"number": "number", "integer": "number", "boolean": "boolean"}
_T = TypeVar("_T")


def _get(schema: object, key: str, kind: type[_T]) -> _T | None:
    """schema[key] if that is a `kind`, else None."""
    value = schema.get(key) if isinstance(schema, Mapping) else None
    return value if isinstance(value, kind) else None

# %% tags=["export"]
def _type(schema: object, indent: str = "") -> str:
    """A JSON schema as openai-harmony's kind of TypeScript type."""
    if not isinstance(schema, Mapping):
        return "any"
    if isinstance(schema.get("oneOf"), list):
        return "".join(f"\n{line}" for line in
                       _union(schema["oneOf"], indent, bare=False))
    kind = schema.get("type")
    if isinstance(kind, list):
        kinds = [_NAMES.get(k, k) for k in kind if isinstance(k, str)]
        return " | ".join(kinds) or "any"
    if kind == "object":
        return _object(schema, indent)
    if kind == "array":
        return (f"{_type(schema['items'], indent)}[]" if "items" in schema
                else "Array<any>")
    if kind == "string":
        values = _get(schema, "enum", list) or ()
        return " | ".join(f'"{value}"' for value in values
                          if isinstance(value, str)) or "string"
    return _NAMES.get(kind, "any") if isinstance(kind, str) else "any"

# %% [markdown]
# `_object` and `_union` follow. The indent grows by four characters with each
# object inside an object, and by three inside a union.
#
# ### Comments, and the null that may be
#
# A type may be followed by ` | null` and by a comment with the default.
# Strings stand in quotes there, except the default of an `enum`, which
# openai-harmony writes bare: `default: C`. (Inside a nested union it does
# not; that is what `bare` is for.)

# %% tags=["export"]
def _nullable(schema: object, indent: str) -> str:
    """The type of a property or of a variant in a union."""
    text = _type(schema, indent)
    null = _get(schema, "nullable", bool) and "null" not in text
    return f"{text} | null" if null else text


def _default(schema: object, bare: bool = True) -> str | None:
    """`default: ...` or None; a string of an enum stands bare."""
    if not isinstance(schema, Mapping) or "default" not in schema:
        return None
    value = schema["default"]
    if isinstance(value, str) and not _get(schema, "enum", list):
        return f'default: "{value}"'
    if not (isinstance(value, str) and bare):
        value = as_json(value, "default")
    return f"default: {value}"


def _behind(*parts: str | None) -> str:
    """A comment behind a type, or nothing."""
    found = [part for part in parts if part is not None]
    return f" // {' '.join(found)}" if found else ""

# %% [markdown]
# ### A property, an object, a union
#
# A property is a line, with comments above it: the title and an empty
# comment, the description, the examples. An object is its properties between
# braces. Without unions that would be all:
#
# | where | what stands there |
# |---|---|
# | above a property | title, description, examples |
# | its line | `name: type,` and behind it the default |
# | above a union | the same, and the default |
# | a variant's line | ` \| type`, its description, its default |
#
# Descriptions of a union have two rules more. If the property and its first
# variant have the same description, it is written nowhere. If they differ, the
# property's stands above and the first variant's is dropped.

# %% tags=["export"]
def _union(variants: list[Any], indent: str, about: str | None = None,
           above: bool = False, bare: bool = True) -> list[str]:
    """A line for each variant.

    A variant's description is left out if it is `about`, the property's
    own, and for the first variant if the property's stands `above`.
    """
    lines = []
    for n, variant in enumerate(variants):
        told = _get(variant, "description", str)
        if told == about or (above and n == 0):
            told = None
        lines.append(f"{indent} | {_nullable(variant, indent + '   ')}"
                     + _behind(told, _default(variant, bare)))
    return lines

# %% tags=["export"]
def _property(name: str, schema: object, indent: str) -> list[str]:
    """The lines of one property: comments, name, type."""
    title = _get(schema, "title", str)
    about = _get(schema, "description", str)
    union = _get(schema, "oneOf", list)
    alone = not (isinstance(schema, Mapping) and "oneOf" in schema)
    notes = [] if title is None else [f" {title}", ""]
    notes += [f" {about}"] * (alone and about is not None)
    if examples := _get(schema, "examples", list):
        notes += [" Examples:", *(f' - "{text}"' for text in examples
                                  if isinstance(text, str))]
    if union is None:
        lines = [f"{indent}{name}: {_nullable(schema, indent + '    ')},"
                 + (_behind(_default(schema)) if alone else "")]
    else:
        first = _get(union[0], "description", str) if union else None
        above = about is not None and about != first
        notes += [f" {text}" for text in (about if above else None,
                                          _default(schema))
                  if text is not None]
        lines = [f"{indent}{name}:", *_union(union, indent, about, above),
                 f"{indent},"]
    return [*(f"{indent}//{note}" for note in notes), *lines]

# %% tags=["export"]
def _object(schema: Mapping[str, Any], indent: str) -> str:
    """`{ ... }`, a property a line."""
    about = _get(schema, "description", str)
    lines = [f"{indent}// {about}"] * (about is not None) + ["{"]
    required = _get(schema, "required", list) or []
    properties = schema.get("properties")
    if isinstance(properties, Mapping):
        for key, value in properties.items():
            name = key if key in required else f"{key}?"
            lines += _property(name, value, indent)
    return "\n".join([*lines, f"{indent}}}"])

# %%
print(_object({"properties": {
    "many": {"type": "array", "items": {"type": ["integer", "null"]}},
    "either": {"description": "One of two.", "oneOf": [
        {"type": "string"}, {"type": "number", "description": "Or so."}]},
    "deep": {"type": "object", "properties": {
        "flag": {"type": "boolean", "title": "Yes or no"}}}}}, ""))

# %% [markdown]
# The first line looks wrong, and is: `number | null[]` means "a number, or an
# array of nulls" in TypeScript, not an array of both. It is what the models
# were shown, so it stays.
#
# ## How does Rust write a number?
#
# Defaults stand in comments, as JSON. openai-harmony is written in Rust, and
# its JSON library, serde_json, reads each number and writes it anew. It does
# both in its own way.
#
# **Reading, by hand.** Python writes 1/11 as 0.09090909090909091. serde_json
# reads the digits as one integer, and divides by a power of ten:

# %%
digits = 9090909090909091
print(f"2**53 is      {2 ** 53:,}")
print(f"the digits:   {digits:,}")
print(f"as a float:   {float(digits):,.0f}")
print("divided by 1e17:", float(digits) / 1e17, " and 1/11 is", 1 / 11)

# %% [markdown]
# A float holds every whole number up to 2**53. This one is larger and odd, so
# it is rounded before the division, and the division rounds once more. The
# result is the neighbour of 1/11, the next float there is. Numbers of up to
# 15 digits come through unharmed.
#
# **In general**, the two differ in four ways.
#
# - A number is written out from $10^{-5}$ to below $10^{16}$, and else has a
#   bare exponent: `0.00001`, `1e-6`, `1e16`.
# - An integer that does not fit into 64 bits becomes a float.
# - Reading is quick, not exact: the digits as one integer below $2^{64}$
#   (further ones are dropped), times or divided by a power of ten, each of
#   the two rounded.
# - What JSON cannot say, infinity and NaN, is an error.

# %% [markdown]
# ### Numbers as Rust writes them

# %% tags=["export"]
def _as_read(text: str) -> float:
    """The float that serde_json reads in a decimal number."""
    sign, digits, power_of_ten = Decimal(text).as_tuple()
    exponent = int(power_of_ten)  # a number's; NaN and infinity have none
    whole = int("".join(map(str, digits)))
    while whole >= 2 ** 64:
        whole, exponent = whole // 10, exponent + 1
    value = float(whole)
    while exponent < -308:
        value, exponent = value / 1e308, exponent + 308
    power = float(f"1e{abs(exponent)}")
    value = value / power if exponent < 0 else value * power
    return -value if sign else value


def _number(value: int | float) -> str | None:
    """A number as serde_json spells it; None: JSON has no such number."""
    if isinstance(value, int) and -2 ** 63 <= value < 2 ** 64:
        return str(int(value))
    if not abs(value) < 10 ** 309:  # nor is NaN
        return None
    value = _as_read(repr(float(value)) if isinstance(value, float)
                     else str(value))
    digits, _, power = repr(value).partition("e")
    if power == "-05":
        sign = "-" * (value < 0)
        return f"{sign}0.0000{digits.lstrip('-').replace('.', '')}"
    if not math.isfinite(value):
        return None
    return f"{digits}e{int(power)}" if power else digits

# %%
import random

for value in (1e-4, 1e-5, 2.5e-5, 1e-6, 1e15, 1e16, 2 ** 64 - 1, 2 ** 64,
              0.1 + 0.2, 1 / 11):
    print(f"{value!r:22} {_number(value)}")
rng = random.Random(0)
drawn = [rng.random() for _ in range(10_000)]
moved = sum(float(_number(value)) != value for value in drawn)
print(f"of {len(drawn):,} random floats {moved:,} became a neighbour")

# %% [markdown]
# The rest of JSON both languages write alike.
#
# ### The rest of JSON

# %% tags=["export"]
def as_json(value: object, where: str) -> str:
    """`value` as serde_json writes it; `where`: its place, for errors."""
    if isinstance(value, Mapping):
        items = [(key if isinstance(key, str) else as_json(key, where), item)
                 for key, item in value.items()]
        return "{" + ",".join(
            f"{as_json(key, where)}:{as_json(item, f'{where}.{key}')}"
            for key, item in items) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(as_json(item, f"{where}[{n}]")
                              for n, item in enumerate(value)) + "]"
    if value is None or isinstance(value, bool | str):
        return json.dumps(value, ensure_ascii=False)
    if not isinstance(value, int | float):
        raise HarmonyError(f"{where}: expected JSON, found {value!r}")
    if (text := _number(value)) is None:
        raise HarmonyError(
            f"{where}: expected a number that JSON can hold, found " +
            (repr(value) if isinstance(value, float) else
             f"an integer of {value.bit_length()} bits"))
    return text

# %% [markdown]
# ### From tools to a namespace
#
# A tool's description becomes comments above its type. Only LF and CR LF end
# a line of it, as in Rust; Python's `splitlines` would cut at eight other
# characters too.

# %% tags=["export"]
@dataclass(frozen=True)
class Tool:
    """A function on offer; `parameters`: JSON schema of its arguments."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None

# %% tags=["export"]
def split_lines(text: str) -> list[str]:
    """Only LF and CR LF end a line, as in Rust; a CR alone is text."""
    *lines, last = text.split("\n")
    return [line.removesuffix("\r") for line in lines] + [last] * bool(last)


def typescript(tools: Iterable[Tool], namespace: str = "functions") -> str:
    """`tools` as the TypeScript namespace that the models are shown.

    Raises HarmonyError, which names the place, for parameters that are not
    JSON.
    """
    out = [f"namespace {namespace} {{\n"]
    for tool in tools:
        out += [f"// {line}" for line in split_lines(tool.description)]
        argument = ""
        if tool.parameters is not None:
            try:
                as_json(tool.parameters, f"tool {tool.name!r}: parameters")
                argument = f"_: {_type(tool.parameters)}"
            except RecursionError as error:
                raise HarmonyError(f"tool {tool.name!r}: parameters: nested "
                                   f"too deeply") from error
        out.append(f"type {tool.name} = ({argument}) => any;\n")
    return "\n".join([*out, f"}} // namespace {namespace}"])

# %%
weather = Tool("weather", "The weather at a place.", {
    "type": "object", "required": ["place"], "properties": {
        "place": {"type": "string", "description": "City or coordinates."},
        "days": {"type": "integer", "default": 1, "minimum": 1},
        "unit": {"type": "string", "enum": ["C", "F"]}}})
print(typescript([weather, Tool("today", "The date.")]))

# %% [markdown]
# ## What is refused
#
# A schema may hold anything that Python can hold, and the text must not be
# made of what JSON cannot say. So a schema is looked through as a whole
# before it is used, also where the text would leave the value out. The
# `HarmonyError` names the tool and the place. A schema that contains itself,
# or is nested deeper than Python can follow, is "nested too deeply".

# %%
loop = {"type": "object"}
loop["properties"] = {"self": loop}
for schema in ({"properties": {"x": {"default": float("inf")}}},
               {"properties": {"x": {"enum": [1, 10 ** 400]}}},
               {"properties": {"x": {"default": {1, 2}}}}, loop):
    try:
        typescript([Tool("far_off", "", schema)])
    except HarmonyError as error:
        print(error)

# %% [markdown]
# ## It holds
#
# openai-harmony makes a developer message of the same tools. Our text stands
# in it, character by character; the tests repeat this for generated schemas
# with every key above.

# %%
import gzip
import os
import tempfile
from importlib.resources import files
from pathlib import Path

import openai_harmony as official

raw = gzip.decompress(
    (files("bpe_openai.data") / "o200k_base.tiktoken.gz").read_bytes())
with tempfile.TemporaryDirectory() as folder:
    (Path(folder) / "o200k_base.tiktoken").write_bytes(raw)
    os.environ["TIKTOKEN_ENCODINGS_BASE"] = folder
    theirs = official.load_harmony_encoding("HarmonyGptOss")


def officially(tool: Tool) -> str:
    """What the official developer message says of one tool."""
    content = official.DeveloperContent.new().with_function_tools([
        official.ToolDescription.new(tool.name, tool.description,
                                     parameters=tool.parameters)])
    return theirs.decode(theirs.render(
        official.Message.from_role_and_content(
            official.Role.DEVELOPER, content)))


odd = Tool("odd", "One.\nTwo.", {"type": "object", "properties": {
    "step": {"type": "number", "default": 1e-5},
    "many": {"type": "array", "items": {"type": ["integer", "null"]}},
    "either": {"description": "One of two.", "oneOf": [
        {"type": "string", "default": "x"},
        {"type": "number", "nullable": True, "description": "Or so."}]},
    "deep": {"type": "object", "properties": {
        "flag": {"type": "boolean", "title": "Yes or no"}}}}})
for tool in (weather, odd):
    assert typescript([tool]) in officially(tool)
print(typescript([odd]))

# %% [markdown]
# ## Cost
#
# The text stands in every prompt. In tokens of o200k, with the JSON of the
# same schema beside it:

# %%
encoder = theirs.encode
for tool in (weather, odd):
    schema = as_json(tool.parameters, tool.name)
    print(f"{tool.name}: {len(encoder(typescript([tool])))} tokens, its "
          f"schema alone as JSON {len(encoder(schema))}")

# %% [markdown]
# ## Takeaways
#
# - The models know functions as TypeScript types, made from JSON schemas by
#   the rules of openai-harmony; what the rules do not know is silently gone.
# - Equal token ids ask for equal spelling, down to 1e-5, and to another
#   program's rounding.
# - What JSON cannot say is refused, with its place in the schema.
#
# ## Exercises
#
# ### Exercise 1
#
# A parameter must lie between 1 and 14, and the schema says so with `minimum`
# and `maximum`. Does the model learn of it? How could it?

# %% tags=["hide-cell"]
days = {"type": "integer", "minimum": 1, "maximum": 14}
for schema in (days, days | {"description": "1 to 14"}):
    print(typescript([Tool("f", "", {"type": "object", "properties": {
        "days": schema}})]).splitlines()[3:5])
# Only words reach it: a description, which becomes a comment.

# %% [markdown]
# ### Exercise 2
#
# pydantic writes the schema of `int | None` as `{"anyOf": [{"type":
# "integer"}, {"type": "null"}]}`. What does the model see? Find a schema of
# the same meaning that it can read.

# %% tags=["hide-cell"]
for schema in ({"anyOf": [{"type": "integer"}, {"type": "null"}]},
               {"oneOf": [{"type": "integer"}, {"type": "null"}]},
               {"type": ["integer", "null"]}):
    print(typescript([Tool("f", "", {"type": "object", "properties": {
        "days": schema}})]).splitlines()[3:-3])
# anyOf is not in the table, so the type is any. oneOf gives a line a variant,
# and null is no type of its own there; the list of types says it in one line.

# %% [markdown]
# ### Exercise 3
#
# How many decimal numbers of 17 digits does `_as_read` move to a neighbour,
# and how many of 15? Explain the difference.

# %% tags=["hide-cell"]
for size in (15, 17):
    drawn = [f"0.{rng.randrange(10 ** (size - 1), 10 ** size)}"
             for _ in range(2000)]
    moved = [text for text in drawn if _as_read(text) != float(text)]
    print(size, "digits:", len(moved), "of 2000 are moved")
    assert bool(moved) == (size == 17)
# 15 digits and powers of ten to the 22nd are exact floats, so one rounded
# division gives the nearest float; 17 digits are rounded before it too.

# %% [markdown]
# ## Sources
#
# - openai/harmony 0.0.8: `src/encoding.rs` (`json_schema_to_typescript`).
# - serde-rs/json, `src/de.rs` (how a number is read without the feature
#   `float_roundtrip`) and dtolnay/ryu (how one is written).
# - Functions in a developer message: openai/harmony, `docs/format.md`.
