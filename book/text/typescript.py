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
# A program offers the model a function, as a name and a JSON schema. The model
# reads tokens and nothing else: which text tells it? Each character counts: a
# default of 1e-5 that is written `1e-05`, as Python does, gives other tokens
# than the models were trained on.
#
# This chapter may be skipped at first: the others need of it only that a
# `Tool` becomes a few lines of TypeScript.

# %% [markdown]
# ## Derivation
#
# The models know functions as TypeScript types in a namespace, made from the
# JSON schema of their arguments. Descriptions become comments above a
# property, defaults comments behind it; everything else of the schema is
# silently gone. The oddities (the indent of a nested brace, the description
# of a union that vanishes if its first variant has the same) are
# openai-harmony's. OpenAI publishes it as the renderer of the form that the
# models were trained on, so we keep its text to the token.
#
# **Numbers** are one of the oddities. A tolerance of 1e-5 as a default is
# nothing exotic, and Python writes it `1e-05`. openai-harmony is written in
# Rust; its JSON library, serde_json, reads the number and writes `0.00001`:
# other characters, other tokens. The two differ in four ways.
#
# - A number is written out from $10^{-5}$ to below $10^{16}$, and else has a
#   bare exponent: `1e-6`, `1e16`.
# - An integer that does not fit into 64 bits becomes a float.
# - What JSON cannot say, infinity and NaN, is an error.
# - Reading is quick, not exact: the digits as one integer below $2^{64}$,
#   times or divided by a power of ten, each of the two rounded. Numbers of
#   up to 15 digits come through; of floats that were computed, which have
#   16 or 17, about one in ten becomes a neighbour of itself.

# %% [markdown]
# ## Code
#
# ### Numbers as Rust writes them

# %% tags=["export"]
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal

from gptoss.text.vocabulary import HarmonyError


def _as_read(text: str) -> float:
    """The float that serde_json reads in a decimal number."""
    sign, digits, exponent = Decimal(text).as_tuple()
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
# So did 1/11. The rest of JSON both write alike.
#
# ### The rest of JSON
#
# A schema is looked through
# as a whole, so that an infinity is named wherever it stands, as is anything
# that JSON does not know.

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

# %%
print(as_json({"tolerance": 1e-5, "steps": [1e3, 10 ** 20]}, "default"))
try:
    as_json({"properties": {"x": {"default": float("inf")}}}, "parameters")
except HarmonyError as error:
    print(error)

# %% [markdown]
# ### The types
#
# What the rules come to:
#
# | of the schema | becomes |
# |---|---|
# | number, integer | `number` |
# | string, with `enum` | `string`, `"C" \| "F"` |
# | array of T | `T[]`, without `items` `Array<any>` |
# | object | `{ ... }`, a property a line, `name?:` if not required |
# | a list of types, `nullable` | `a \| b`, `a \| null` |
# | `oneOf` | ` \| a` on a line each |
# | title, description, examples | comments above |
# | default | a comment behind: `// default: 3` |
# | anything else | nothing, or `any` |

# %% tags=["export"]
_NAMES = {"number": "number", "integer": "number", "boolean": "boolean"}


def _get(schema: object, key: str, kind: type) -> object:
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

# %% tags=["export"]
def _union(variants: list, indent: str, about: str | None = None,
           above: bool = False, bare: bool = True) -> list[str]:
    """A line each; `about`: the property's own description, not repeated,
    nor is the first variant's if it stands `above`."""
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
    if not isinstance(schema, Mapping):
        schema = {}
    title, about = (_get(schema, key, str) for key in ("title", "description"))
    union, alone = _get(schema, "oneOf", list), "oneOf" not in schema
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
        shown = about is not None and about != first
        above = (about if shown else None, _default(schema))
        notes += [f" {text}" for text in above if text is not None]
        lines = [f"{indent}{name}:", *_union(union, indent, about, shown),
                 f"{indent},"]
    return [*(f"{indent}//{note}" for note in notes), *lines]

# %% tags=["export"]
def _object(schema: Mapping, indent: str) -> str:
    """`{ ... }`, a property a line."""
    about = _get(schema, "description", str)
    lines = [f"{indent}// {about}"] * (about is not None) + ["{"]
    required = _get(schema, "required", list) or ()
    for key, value in (_get(schema, "properties", Mapping) or {}).items():
        name = key if key in required else f"{key}?"
        lines += _property(name, value, indent)
    return "\n".join([*lines, f"{indent}}}"])

# %% tags=["export"]
@dataclass(frozen=True)
class Tool:
    """A function on offer; `parameters`: JSON schema of its arguments."""

    name: str
    description: str = ""
    parameters: Mapping | None = None

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
# Find a decimal number of at most 17 digits that `_as_read` moves to a
# neighbour, and check that none of at most 15 is moved.

# %% tags=["hide-cell"]
moved = [text for text in (f"0.{rng.randrange(10 ** 16, 10 ** 17)}"
                           for _ in range(100)) if _as_read(text)
         != float(text)]
print(len(moved), "of 100 with 17 digits are moved")
short = [f"0.{rng.randrange(10 ** 14, 10 ** 15)}" for _ in range(10_000)]
assert all(_as_read(text) == float(text) for text in short)
# 15 digits and powers of ten to the 22nd are exact floats, so one rounded
# division gives the nearest float; 17 digits are rounded before it too.

# %% [markdown]
# ## Sources
#
# - openai/harmony 0.0.8: `src/encoding.rs` (`json_schema_to_typescript`).
# - serde-rs/json, `src/de.rs` (how a number is read without the feature
#   `float_roundtrip`) and dtolnay/ryu (how one is written).
# - Functions in a developer message: openai/harmony, `docs/format.md`.
