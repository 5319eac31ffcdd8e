"""What does a type hint say to a model?

Generated from book/chat/schema.py; edit the chapter, not this file.
"""

import dataclasses
import functools
import json
import reprlib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gptoss.chat.messages import ChatError

# --- The way in: which type does pydantic get? -------------------------------

_UNIONS = (typing.Union, types.UnionType)
_WRAPPERS = (typing.Required, typing.NotRequired)


def type_hints(owner: object, where: str) -> dict[str, object]:
    """The hints of a function or class; ChatError for one that fails."""
    try:
        return typing.get_type_hints(owner, include_extras=True)
    except RecursionError:
        raise
    except Exception as error:  # hints may be any text
        raise ChatError(f"{where}: {error}") from error


def _typed_keys(hint: Any) -> tuple[dict[str, object], set[str]] | None:
    """Hints and required keys of a dataclass or TypedDict, else None."""
    from typing_extensions import is_typeddict

    if is_typeddict(hint):
        return type_hints(hint, hint.__name__), set(hint.__required_keys__)
    if not (isinstance(hint, type) and dataclasses.is_dataclass(hint)
            ) or hasattr(hint, "__pydantic_core_schema__"):
        return None
    hints = type_hints(hint, hint.__name__)
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

    make: Any = TypedDict  # its name and keys are known only here
    made: Any = make(name, {
        key: _strict(hint) if key in required else NotRequired[_strict(hint)]
        for key, hint in hints.items()})
    made.__pydantic_config__ = ConfigDict(strict=True, extra="forbid")
    record: type = made
    return record


def _strict(hint: Any) -> Any:
    """`hint` with strict records for its dataclasses and TypedDicts, and
    the text in an Annotated as its description."""
    from pydantic import AfterValidator, Field

    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in _WRAPPERS:
        return _strict(inside[0])
    if (fields := _typed_keys(hint)) is not None:
        make, record = hint, _record(hint.__name__, *fields)
        return (typing.Annotated[record, AfterValidator(
            lambda values: make(**values))]
            if dataclasses.is_dataclass(hint) else record)
    if origin is typing.Annotated:
        first, *notes = inside
        return typing.Annotated[(_strict(first), *(
            Field(description=note) if isinstance(note, str) else note
            for note in notes))]
    changed = tuple(map(_strict, inside))
    if origin is typing.Literal or changed == inside:
        return hint
    outer: Any = typing.Union if origin in _UNIONS else origin
    return outer[changed]


# --- The way out: a schema for harmony ---------------------------------------

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


def spelt(schema: dict, about: str | None = None) -> dict:
    """`schema` of an argument; the way to write a date in its description,
    which is `about` if it has none."""
    told, how = schema.get("description"), _FORMATS.get(
        schema.get("format", ""))
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
            key: spelt(_bare(flat(each)))
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


class ArgumentTypes:
    """JSON values of an object with the keys of `hints`."""

    def __init__(self, hints: Mapping[str, object], required: Iterable[str],
                 where: str) -> None:
        from pydantic import TypeAdapter

        try:
            self.adapter: TypeAdapter[Any] = TypeAdapter(
                _record("values", hints, required))
            schema = self.adapter.json_schema(
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
    schema = ArgumentTypes({"value": hint}, ["value"], where).schema
    return schema["properties"]["value"]


# --- Back again: a value for the function ------------------------------------

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


def fit_values(types_: ArgumentTypes, value: object, where: str,
               skip: str = "") -> dict:
    """JSON `value` as the types say; ChatError names what does not fit,
    `where` and its place there without `skip`."""
    from pydantic import ValidationError

    try:
        return types_.adapter.validate_json(json.dumps(_whole(value)))
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
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def fit(value: object, hint: object, where: str = "arguments") -> object:
    """JSON `value` as `hint` says: dataclasses made, 3.0 an int.

    The inverse of what `json_schema` allows. Raises ChatError at `where`.
    """
    types_ = ArgumentTypes({"value": hint}, ["value"], where)
    return fit_values(types_, {"value": value}, where, ".value")["value"]


__all__ = [
    "ArgumentTypes",
    "fit",
    "fit_values",
    "json_schema",
    "spelt",
    "type_hints",
]
