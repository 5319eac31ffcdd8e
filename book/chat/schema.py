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
# ## Picture

# %% tags=["hide-input"]
# Figure: five boxes in a ring. A hint Unit or None becomes pydantic's schema,
# from which harmony shows any; our schema shows the two words and null. The
# model writes the string kelvin, and the function gets Unit.KELVIN.
import matplotlib.pyplot as plt

plt.style.use("../_static/book.mplstyle")
BOXES = {  # what it is: (x, y, text, colour)
    "Python's hint": (0, 3, "unit: Unit | None", "C0"),
    "pydantic's schema": (37, 3, '{"anyOf": [{"$ref": "#/$defs/Unit"},\n'
                          '           {"type": "null"}]}', "0.5"),
    "shown as it is": (74, 3, "unit: any", "C5"),
    "our schema": (37, 1.5, '{"type": "string", "nullable": true,\n'
                   ' "enum": ["celsius", "kelvin"]}', "C2"),
    "shown to the model": (74, 1.5, 'unit: "celsius" | "kelvin"\n'
                           "         | null", "C2"),
    "the model writes": (74, 0, '{"unit": "kelvin"}', "C1"),
    "checked": (37, 0, 'it fits; or: unit: expected\n"celsius" or "kelvin", '
                'found 3', "C1"),
    "the function gets": (0, 0, "Unit.KELVIN", "C0")}
ARROWS = [((28, 3), (37, 3)), ((69, 3), (74, 3)), ((53, 2.5), (53, 2)),
          ((69, 1.5), (74, 1.5)), ((98, 1), (98, 0.5)), ((74, 0), (69, 0)),
          ((37, 0), (28, 0))]
fig, ax = plt.subplots(figsize=(7, 2.9))
for name, (x, y, text, colour) in BOXES.items():
    wide = 28 if x != 37 else 32
    ax.barh(y, wide, 0.9, x, color=colour, alpha=0.2)
    ax.text(x + 1, y + 0.55, name, fontsize=7.5, color="0.25", va="bottom")
    ax.text(x + 1, y, text, fontsize=6.6, va="center", family="monospace",
            parse_math=False)
for start, end in ARROWS:
    ax.annotate("", end, start, arrowprops={"arrowstyle": "->"})
ax.set(xlim=(-1, 103), ylim=(-0.6, 4.0))
ax.set_axis_off()
plt.show()

# %% [markdown]
# What to see: one argument, a unit that may be left out. In the upper row the
# schema goes to harmony as pydantic writes it, and the model reads `any`
# (red): it would have to guess. In the middle row (green) the same is said in
# words that harmony's TypeScript has. Below, what the model writes comes back
# as the value that the hint names, or the model is told its mistake.

# %% [markdown]
# ## The naive version
#
# Give harmony the schema as it comes.
# [pydantic](https://docs.pydantic.dev) is the library that most Python
# programs use to check values against hints; its `TypeAdapter` takes any hint.

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
# pydantic reads "3" as a number, and says what is wrong at places that the
# model has never seen.

# %%
from pydantic import ValidationError

print(repr(TypeAdapter(int).validate_python("3")))
try:
    TypeAdapter(int | list[Unit]).validate_python(["hot"])
except ValidationError as error:
    for each in error.errors():
        print(each["loc"], each["msg"])

# %% [markdown]
# ## The twenty lines
#
# How hard can it be? A schema is a dict, and for the plainest hints it is
# written at once:

# %%
import dataclasses

NAMES = {str: "string", int: "integer", float: "number", bool: "boolean"}


@dataclasses.dataclass
class Place:
    city: str
    country: str | None = None


def plainly(hint: type) -> dict:
    """The schema of a plain hint, as harmony can show it."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if hint in NAMES:
        return {"type": NAMES[hint]}
    if origin is list:
        return {"type": "array", "items": plainly(inside[0])}
    if type(None) in inside and len(inside) == 2:
        return plainly(inside[0]) | {"nullable": True}
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return {"type": "string", "enum": [each.value for each in hint]}
    if dataclasses.is_dataclass(hint):
        fields = dataclasses.fields(hint)
        return {"type": "object",
                "properties": {f.name: plainly(f.type) for f in fields},
                "required": [f.name for f in fields
                             if f.default is dataclasses.MISSING]}
    raise TypeError(hint)


said = 0
for key, hint in COMMON.items():
    try:
        print(shown(key, plainly(hint)))
        said += 1
    except TypeError:
        print(f"{key}: ?")
print(said, "of", len(COMMON), "|", shown("place", plainly(Place)))

# %% [markdown]
# Four of seven. Pairs, dates and mixed choices are missing, and so are sets,
# TypedDicts, pydantic's own models and `Annotated`. Each would cost a branch
# here, and one more on the way back. That work has been done: pydantic knows
# every type that people put into hints, in both directions. What is left to us
# is what it cannot know: how harmony shows a schema, and how a language model
# is told its mistake. The result of these lines stays our measure, though: the
# code below must say the same of the four.

# %% [markdown]
# ## Code
#
# ### The way in: which type does pydantic get?
#
# Both directions follow the type hints: `json_schema` out, `fit` back in.
#
# First the way in. An object with fixed keys, which is what the arguments of a
# function are, becomes a `TypedDict` that takes no other keys and is *strict*:
# "3" is no number. Dataclasses go the same way, for they say what their keys
# are, and are made from them at the end. A field with `init=False` is none of
# the keys. A text in `Annotated[hint, "a text"]` is the description of the
# argument.

# %% tags=["export"]
import dataclasses
import functools
import json
import reprlib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

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

# %%
print(_typed_keys(Place), _typed_keys(int))

# %% tags=["export"]
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
    told, how = schema.get("description"), _FORMATS.get(
        schema.get("format", ""))
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

# %% [markdown]
# Two things that pydantic adds by itself are left out: titles, which repeat
# the keys, and the docstring of a TypedDict, which describes Python's type and
# not the argument.

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

# %% [markdown]
# On top of it the first of the two directions, for a single hint:

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
for key in ("number", "maybe", "unit", "maybe_unit"):
    assert json_schema(COMMON[key]) == plainly(COMMON[key])

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
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def fit(value: object, hint: object, where: str = "arguments") -> object:
    """JSON `value` as `hint` says: dataclasses made, 3.0 an int.

    The inverse of what `json_schema` allows. Raises ChatError at `where`.
    """
    types_ = ArgumentTypes({"value": hint}, ["value"], where)
    return fit_values(types_, {"value": value}, where, ".value")["value"]

# %% [markdown]
# JSON has one kind of number: a model may write 3 or 3.0 for the same whole
# number, so `_whole` makes an integer of both. Nothing else is bent: "3" stays
# a text, and True is no 1.

# %%
print(fit([1, 2.0], list[int]), fit(3, float | None), fit(None, str | None))
print(fit({"city": "Oslo"}, Place), fit("kelvin", Unit))

# %% [markdown]
# ## What is refused
#
# A hint that JSON cannot hold, one that cannot be looked up, and one that
# contains itself, are mistakes of the program, found when the tool is made.
# The error names the tool and the argument:

# %%
@dataclasses.dataclass
class Tree:
    name: str
    children: list["Tree"]


for hint in (list[typing.Iterator], Tree):
    try:
        json_schema(hint, "tool plant, tree")
    except ChatError as error:
        print(f"{str(error):.77}")

# %% [markdown]
# A value that does not fit is a mistake of the model. It is told at most three
# of them, each with its place in what it wrote; what a choice expected is
# joined by "or", and a key that is missing is "found nothing":

# %%
for value, hint in ((True, int), (["a", 1], list[str]), ("x", int | Place),
                    ("hot", Unit), ("June", datetime.date), ({}, Place),
                    ({"city": "Oslo", "zip": 1}, Place)):
    try:
        fit(value, hint)
    except ChatError as error:
        print(error)

# %% [markdown]
# ## It holds
#
# **No hint is lost on the way out**: the seven of the beginning, again. (A
# list of numbers and texts is written `number | string[]`: harmony's own
# renderer sets no brackets, and the model was trained on what it writes.)

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
# The tree above contains itself and cannot be told. Find a hint for the same
# trees that a model can be told.

# %% tags=["hide-cell"]
@dataclasses.dataclass
class Node:
    name: str
    parent: str | None = None


print(json_schema(list[Node])["items"]["properties"])
# A list of nodes that name their parents is flat, and every tree is one.
print(fit([{"name": "root"}, {"name": "leaf", "parent": "root"}],
          list[Node])[1].parent)

# %% [markdown]
# ### Exercise 2
#
# A tool takes a temperature in kelvin, which is never below 0. Say this in the
# hint. What does the model read of it, and when does it learn of the limit?

# %% tags=["hide-cell"]
from pydantic import Field

kelvin = typing.Annotated[float, Field(ge=0, description="kelvin, >= 0")]
print(shown("t", json_schema(kelvin)))
try:
    fit(-1, kelvin)
except ChatError as error:
    print(error)
# TypeScript has no word for a limit. Without the description the model learns
# of it only after a call that was wrong.

# %% [markdown]
# ### Exercise 3
#
# For which of the seven hints do `fit` and pydantic as it comes disagree about
# the value "3"?

# %% tags=["hide-cell"]
def taken(read, hint: object) -> bool:
    try:
        read("3", hint)
    except (ChatError, ValidationError):
        return False
    return True


for key, hint in COMMON.items():
    lax = taken(lambda v, h: TypeAdapter(h).validate_python(v), hint)
    strict = taken(fit, hint)
    if lax != strict:
        print(f"{key}: pydantic takes it: {lax}, fit: {strict}")
# Where a number is asked for, pydantic makes one of the text. A model that
# writes texts for numbers then never learns that the schema said otherwise.

# %% [markdown]
# ## Sources
#
# - pydantic/pydantic, `pydantic/json_schema.py` (`GenerateJsonSchema`) and
#   [its errors](https://docs.pydantic.dev/latest/errors/validation_errors/).
# - openai/harmony, `src/encoding.rs`: how a schema is shown as TypeScript.
