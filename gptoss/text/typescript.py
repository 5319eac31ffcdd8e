"""How does the model learn of a function?

Generated from book/text/typescript.py; edit the chapter, not this file.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, TypeVar

from gptoss.text.vocabulary import HarmonyError

# --- The types ---------------------------------------------------------------

_NAMES = {"number": "number", "integer": "number", "boolean": "boolean"}
_T = TypeVar("_T")


def _get(schema: object, key: str, kind: type[_T]) -> _T | None:
    """schema[key] if that is a `kind`, else None."""
    value = schema.get(key) if isinstance(schema, Mapping) else None
    return value if isinstance(value, kind) else None


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


# --- Comments, and the null that may be --------------------------------------

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


# --- A property, an object, a union ------------------------------------------

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


# --- Numbers as Rust writes them ---------------------------------------------

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


# --- The rest of JSON --------------------------------------------------------

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


# --- From tools to a namespace -----------------------------------------------

@dataclass(frozen=True)
class Tool:
    """A function on offer; `parameters`: JSON schema of its arguments."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None


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


__all__ = [
    "Tool",
    "as_json",
    "split_lines",
    "typescript",
]
