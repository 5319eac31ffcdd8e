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
#     module: schema
#     public: [fit, json_schema]
# ---

# %% [markdown]
# # What does a type hint say to a model?
#
# ## Question
#
# The model is told the arguments of a function as TypeScript, made from a
# JSON schema ([a conversation](../text/conversation.ipynb)), and writes them
# as JSON. Python's type hints say what they are. But of seven common hints,
# as pydantic writes their schemas, harmony's TypeScript shows five with an
# `any`. How does a hint reach the model, and a value come back?

# %% [markdown]
# ## The naive version
#
# Give harmony the schema as it comes.

# %%
import datetime
import enum
import typing

from pydantic import TypeAdapter

from gptoss.text.harmony import developer_message
from gptoss.text.typescript import Tool


class Unit(enum.Enum):
    CELSIUS = "celsius"
    KELVIN = "kelvin"


COMMON = {"number": float, "maybe": int | None, "unit": Unit,
          "maybe_unit": Unit | None, "mixed": list[int | str],
          "pair": tuple[datetime.date, int],
          "one": typing.Literal["a"] | int}


def shown(key: str, schema: dict) -> str:
    """An argument as the model reads it."""
    told = developer_message(tools=[Tool("f", "", {
        "type": "object", "properties": {key: schema}})]).content
    return " ".join(told.split("(_: {")[1].split("}) =>")[0].split())


naive = [shown(key, TypeAdapter(hint).json_schema())
         for key, hint in COMMON.items()]
print("\n".join(naive))
print(sum("any" in line for line in naive), "of", len(naive), "with an any")

# %% [markdown]
# The model would have to guess. The second fault is in the other direction:
# pydantic reads "3" as a number and says what is wrong at places that the
# model has never seen.

# %% [markdown]
# ## Code
#
# ### The way in: a type for pydantic
#
# Both directions follow the type hints: `json_schema` out, `fit` back in.
# Both are work that has been done: [pydantic](https://docs.pydantic.dev)
# knows every type that people put into hints. What is left to us is what it
# cannot know: how harmony shows a schema, and how a language model is told
# its mistake.
#
# First the way in. An object with fixed keys, which is what the arguments of
# a function are, becomes a `TypedDict` that takes no other keys and is
# *strict*: "3" is no number. Dataclasses go the same way, for they say what
# their keys are, and are made from them at the end.

# %% tags=["export"]
import dataclasses
import functools
import json
import reprlib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence

from gptoss.chat.messages import ChatError

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


def _typed_keys(hint: object) -> tuple[dict[str, object], set[str]] | None:
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

# %%
@dataclasses.dataclass
class Place:
    city: str
    country: str | None = None


print(_typed_keys(Place), _typed_keys(int))

# %% tags=["export"]
def _record(name: str, hints: Mapping[str, object],
            required: Iterable[str]) -> type:
    """The type of a strict object with these keys, for pydantic."""
    from pydantic import ConfigDict
    from typing_extensions import NotRequired, TypedDict  # noqa: UP035

    made = TypedDict(name, {
        key: _strict(hint) if key in required else NotRequired[_strict(hint)]
        for key, hint in hints.items()})
    made.__pydantic_config__ = ConfigDict(strict=True, extra="forbid")
    return made


def _strict(hint: object) -> object:
    """`hint` with strict records for its dataclasses and TypedDicts, and
    the text in an Annotated as its description."""
    from pydantic import AfterValidator, Field

    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in _WRAPPERS:
        return _strict(inside[0])
    if (fields := _typed_keys(hint)) is not None:
        record = _record(hint.__name__, *fields)
        return (typing.Annotated[record, AfterValidator(
            lambda values: hint(**values))]
            if dataclasses.is_dataclass(hint) else record)
    if origin is typing.Annotated:
        first, *notes = inside
        return typing.Annotated[(_strict(first), *(
            Field(description=note) if isinstance(note, str) else note
            for note in notes))]
    changed = tuple(map(_strict, inside))
    if origin is typing.Literal or changed == inside:
        return hint
    return (typing.Union if origin in _UNIONS else origin)[changed]

# %% [markdown]
# ### The way out: a schema for harmony
#
# Then the way out. pydantic's schema names every class once, under `$defs`,
# and refers to it; a choice is an `anyOf`, and an argument that may be left
# out with None has one with `null`. Harmony's TypeScript knows none of this
# (it writes `any`), but can say the same in other words: the class in its
# place, `oneOf` or a list of types, `nullable`. A pair becomes an array of
# what may stand in it. Only a type that contains itself cannot be said.

# %% tags=["export"]
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
    told, how = schema.get("description"), _FORMATS.get(schema.get("format"))
    told = (None if told == how else told) or about
    if how and not (told or "").endswith(f"({how})"):
        told = f"{told} ({how})" if told else how
    return schema | ({"description": told} if told else {})

# %% tags=["export"]
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

# %% tags=["export"]
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
            self.adapter = TypeAdapter(_record("values", hints, required))
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

# %% [markdown]
# `TypeAdapter` is pydantic's door for any type. On top of it the two
# directions for a single hint:

# %% tags=["export"]
def json_schema(hint: object, where: str = "hint") -> dict:
    """The JSON schema of a type hint, as harmony can show it.

    Whatever pydantic takes: plain types, Any, Literal, enums, Optional and
    unions, lists, tuples, sets, dicts, dates, dataclasses, TypedDict,
    models, and Annotated[hint, "what it is"]. Raises ChatError at `where`
    for anything else, and for a type that contains itself.
    """
    schema = ArgumentTypes({"value": hint}, ["value"], where).schema
    return schema["properties"]["value"]

# %%
for hint in (Unit | None, list[int | str], tuple[datetime.date, int], Place):
    print(json_schema(hint))
try:
    json_schema(list[typing.Iterator], "weather.places")
except ChatError as error:
    print(str(error)[:64])

# %% [markdown]
# ### Back again: a value for the function
#
# A value that the model wrote becomes what the hint says, or the
# model is told in one line which argument is wrong, what was expected there
# and what was found. pydantic reports every branch of a choice by itself, at
# a place with names that the model has never seen; we walk the value along
# that place, so that only keys that were written remain.

# %% tags=["export"]
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

# %% tags=["export"]
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

# %% tags=["export"]
def _whole(value: object) -> object:
    """`value` with 3.0 as 3: to JSON both are integers."""
    if isinstance(value, dict):
        return {key: _whole(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return list(map(_whole, value))
    whole = isinstance(value, float) and value.is_integer()
    return int(value) if whole else value


def fit(value: object, hint: object, where: str = "arguments") -> object:
    """JSON `value` as `hint` says: dataclasses made, 3.0 an int.

    The inverse of what `json_schema` allows. Raises ChatError at `where`.
    """
    types_ = ArgumentTypes({"value": hint}, ["value"], where)
    return fit_values(types_, {"value": value}, where, ".value")["value"]

# %%
print(fit([1, 2.0], list[int]), fit(3, float | None), fit(None, str | None))
print(fit({"city": "Oslo"}, Place), fit("kelvin", Unit))
for value, hint in ((True, int), (["a", 1], list[str]), ("x", int | Place),
                    ("hot", Unit), ("June", datetime.date)):
    try:
        fit(value, hint)
    except ChatError as error:
        print(error)

# %% [markdown]
# ## It holds
#
# **No hint is lost on the way out**: the seven of the beginning, again.

# %%
ours = [shown(key, json_schema(hint)) for key, hint in COMMON.items()]
print("\n".join(ours))
assert not any("any" in line for line in ours)

# %% [markdown]
# **Back is the inverse of out**: a value, as JSON has it, comes back as it
# was; and what is not of its type does not.

# %%
CASES = [(float, 1.5), (int | None, None), (Unit, Unit.KELVIN),
         (list[int | str], [1, "a"]), (dict[str, float], {"a": 0.5}),
         (tuple[datetime.date, int], (datetime.date(2025, 6, 28), 3)),
         (set[int], {1, 2}), (Place, Place("Oslo")),
         (list[Place], [Place("Oslo"), Place("Rome", "Italy")])]
for hint, value in CASES:
    written = TypeAdapter(hint).dump_python(value, mode="json")
    assert fit(json.loads(json.dumps(written)), hint) == value
wrong = 0
for hint, _ in CASES:
    for value in ("no", [None], {"x": "y"}, True):
        try:
            fit(value, hint)
        except ChatError as error:
            assert str(error).startswith("arguments")
            wrong += 1
print(len(CASES), "came back;", wrong, "of", 4 * len(CASES), "refused")
assert wrong == 4 * len(CASES)

# %% [markdown]
# ## Takeaways
#
# - pydantic knows the types; what it writes must be said in the words that
#   harmony's TypeScript has: no `anyOf`, no `$ref`, no `const`.
# - Be strict: a model that wrote "3" for a number is told so, and a function
#   never sees it.
# - An error for a model has one line: where, what was expected, what was
#   found, with names that it knows.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1
#
# A tree contains itself. What does `json_schema` say to it? Find a hint for
# the same trees that a model can be told.

# %% tags=["hide-cell"]
@dataclasses.dataclass
class Tree:
    name: str
    children: list["Tree"]


try:
    json_schema(Tree, "tool plant, tree")
except ChatError as error:
    print(error)


@dataclasses.dataclass
class Node:
    name: str
    parent: str | None = None


print(json_schema(list[Node])["items"]["properties"])
# A list of nodes that name their parents is flat, and every tree is one.
assert fit([{"name": "root"}, {"name": "leaf", "parent": "root"}],
           list[Node])[1].parent == "root"

# %% [markdown]
# ## Sources
#
# - pydantic/pydantic, `pydantic/json_schema.py` (`GenerateJsonSchema`) and
#   [its errors](https://docs.pydantic.dev/latest/errors/validation_errors/).
# - openai/harmony, `src/encoding.rs`: how a schema is shown as TypeScript.
