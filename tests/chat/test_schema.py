"""Type hints as schemas, and values that fit them."""

import dataclasses
import datetime
import enum
import threading
from collections.abc import Callable, Iterator
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    NotRequired,
    Optional,
    TypedDict,
    Union,
)

import pydantic
import pytest
import typing_extensions
from hypothesis import given, settings
from hypothesis import strategies as st
from test_messages import JSON, Dumped

from gptoss.chat.messages import ChatError
from gptoss.chat.schema import fit, json_schema
from gptoss.chat.tools import function_tool

# -- hints, schemas, values -------------------------------------------------

@dataclasses.dataclass
class Point:
    x: float
    y: float = 0.0
    size: int = dataclasses.field(init=False, default=1)


class Place(TypedDict):
    """Not told."""

    name: str
    point: NotRequired[Point]


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Model(pydantic.BaseModel):
    """A model."""

    n: int = pydantic.Field(ge=0, description="how many")
    note: str | None = None
    size: int = 3


class Pair(NamedTuple):
    a: int
    b: int


class NewPlace(typing_extensions.TypedDict):
    tree: list[int]


@dataclasses.dataclass
class Nested:
    point: Annotated[Point, "where"]
    colour: Colour
    place: Place | None = None


POINT = {"type": "object", "properties": {"x": {"type": "number"},
                                          "y": {"type": "number"}},
         "required": ["x"], "additionalProperties": False}


@pytest.mark.parametrize("hint, schema", [
    (str, {"type": "string"}), (bool, {"type": "boolean"}), (Any, {}),
    (Literal["a", "b"], {"type": "string", "enum": ["a", "b"]}),
    (Literal[1, "b"], {"type": ["integer", "string"], "enum": [1, "b"]}),
    (Optional[int], {"type": "integer", "nullable": True}),  # noqa: UP045
    (Union[int, str], {"type": ["integer", "string"]}),  # noqa: UP007
    (int | str | None, {"type": ["integer", "string"], "nullable": True}),
    (list, {"type": "array"}),
    (list[int], {"type": "array", "items": {"type": "integer"}}),
    (dict, {"type": "object"}),
    (dict[str, float], {"type": "object",
                        "additionalProperties": {"type": "number"}}),
    (Annotated[str, "a name"], {"type": "string", "description": "a name"}),
    (list[str] | str, {"oneOf": [{"type": "array",
                                  "items": {"type": "string"}},
                                 {"type": "string"}]}),
    (Point, POINT),
    (Place, {"type": "object", "properties": {"name": {"type": "string"},
                                              "point": POINT},
             "required": ["name"], "additionalProperties": False}),
    (Colour, {"type": "string", "enum": ["red", "blue"]}),
    (Colour | None, {"type": "string", "enum": ["red", "blue"],
                     "nullable": True}),
    (Literal[Colour.RED], {"type": "string", "enum": ["red"]}),
    (datetime.date, {"type": "string", "format": "date",
                     "description": "YYYY-MM-DD"}),
    (Annotated[datetime.date, "when"], {
        "type": "string", "format": "date",
        "description": "when (YYYY-MM-DD)"}),
    (tuple[int, str], {"type": "array", "minItems": 2, "maxItems": 2,
                       "items": {"type": ["integer", "string"]}}),
    (tuple[int, ...], {"type": "array", "items": {"type": "integer"}}),
    (set[int], {"type": "array", "items": {"type": "integer"},
                "uniqueItems": True}),
    (dict[int, str], {"type": "object",
                      "additionalProperties": {"type": "string"}}),
    (Model, {"type": "object", "description": "A model.", "properties": {
        "n": {"type": "integer", "description": "how many", "minimum": 0},
        "note": {"type": "string", "nullable": True},
        "size": {"type": "integer", "default": 3}}, "required": ["n"]}),
    (list[Pair], {"type": "array", "items": {
        "type": "array", "minItems": 2, "maxItems": 2,
        "items": {"type": "integer"}}}),
    (Nested, {"type": "object", "properties": {
        "point": POINT | {"description": "where"},
        "colour": {"type": "string", "enum": ["red", "blue"]},
        "place": {"type": "object", "properties": {
            "name": {"type": "string"}, "point": POINT},
            "required": ["name"], "additionalProperties": False,
            "nullable": True}},
        "required": ["point", "colour"], "additionalProperties": False}),
])
def test_schema_of_a_hint(hint, schema):
    assert json_schema(hint) == schema


@pytest.mark.parametrize("hint", [
    Callable[[], int], list[Iterator], Dumped, int | Dumped, "int",
    tuple[int, threading.Lock], dict[str, Dumped], Point | Dumped])
def test_a_hint_without_a_schema_names_its_argument(hint):
    def tool(a: int, b: hint) -> str:  # type: ignore[valid-type]
        return ""

    tool.__annotations__["b"] = (hint if not isinstance(hint, str)
                                 else "Nothing")
    with pytest.raises(ChatError, match=r"tool.*(\bb\b|Nothing)"):
        function_tool(tool)


@pytest.mark.parametrize("value, hint, wanted", [
    (3, int, 3), (3.0, int, 3), (3, float, 3.0), ("a", str, "a"),
    (None, int | None, None), (3, int | str, 3), ("3", int | str, "3"),
    (1, float | int, 1), (True, bool | int, True),
    ([1, 2.0], list[int], [1, 2]), ({"a": 1}, dict[str, float], {"a": 1.0}),
    ({"x": 1}, Point, Point(1.0)), ({"x": 1, "y": 2}, Point, Point(1., 2.)),
    ({"name": "a", "point": {"x": 0}}, Place,
     {"name": "a", "point": Point(0.0)}),
    ([{"a": None}], Any, [{"a": None}]), ("b", Literal["a", "b"], "b"),
    ("x", Annotated[str, "about"], "x"), ("blue", Colour, Colour.BLUE),
    ("2025-06-28", datetime.date, datetime.date(2025, 6, 28)),
    ([1, "a"], tuple[int, str], (1, "a")), ([1, 2, 1], set[int], {1, 2}),
    ({"n": "3"}, Model, None), ([{"n": 1}], list[Model], None),
    ({"tree": [1]}, NewPlace, {"tree": [1]}), ([2, 3], Pair, Pair(2, 3)),
    ("PT1H", datetime.timedelta, datetime.timedelta(hours=1)),
    ({"x": 1}, Point | Model, Point(1.0)), (1e300, int, int(1e300)),
    ([{"point": {"x": 1}, "colour": "red"}], list[Nested],
     [Nested(Point(1.0), Colour.RED)]),
])
def test_values_that_fit(value, hint, wanted):
    found = fit(value, hint)
    if wanted is None and value is not None:
        wanted = pydantic.TypeAdapter(hint).validate_python(value)
    assert found == wanted and type(found) is type(wanted)
    if isinstance(found, list):
        assert list(map(type, found)) == list(map(type, wanted))


@pytest.mark.parametrize("value, hint, why", [
    (True, int, "a: expected an integer, found True"), (1, bool, "boolean"),
    (1.5, int, "integer"), ("1", int, "integer"), (1, str, "string"),
    (float("inf"), int, "integer"), (None, str, "string, found nothing"),
    ("c", Literal["a", "b"], "a: expected 'a' or 'b', found 'c'"),
    ("x", int | None, "a: expected an integer, found 'x'"),
    ({}, int | Point, "a: expected an integer, found {}; a.x: expected a v"),
    ("x", int | bool, "a: expected an integer or a boolean, found 'x'"),
    ("pink", Colour, "a: expected 'red' or 'blue', found 'pink'"),
    ("June", datetime.date, "a: expected a valid date in the format YYYY"),
    (5, datetime.date, "a: expected a valid date, found 5"),
    ([1], tuple[int, str], "a.1: expected a value, found nothing"),
    ([1, 2], tuple[int, str], "a[1]: expected a string, found 2"),
    ({"deep": [{"n": "x"}]}, dict[str, list[Model]],
     "a.deep[0].n: expected a valid integer, unable to parse"),
    ({"n": -1}, Model, "a.n: expected greater than or equal to 0, found -1"),
    ("", Annotated[str, pydantic.Field(min_length=1)],
     "a: expected a value that fits (String should have at least 1 char"),
    ({"0": 1}, list[int], "a: expected an array"),
    ([1, "x"], list[int], "a[1]: expected an integer"),
    ([], dict[str, int], "an object"), ({"k": "x"}, dict[str, int], "a.k: "),
    ({}, Point, "a.x: expected a value"), (
        {"x": 1, "z": 2}, Point, "a: expected no keys but x, y, found 'z'"),
    ({"x": 1, "size": 2}, Point, "found 'size'"),
])
def test_values_that_do_not_fit(value, hint, why):
    with pytest.raises(ChatError) as error:
        fit(value, hint, "a")
    assert why in str(error.value)


@settings(deadline=None, max_examples=200)
@given(JSON | st.floats())
def test_fit_accepts_what_the_schema_says(value):
    def whole(each):
        return not isinstance(each, bool) and (isinstance(each, int) or (
            isinstance(each, float) and each.is_integer()))

    for hint, wanted in (
            (int, whole(value)), (str, isinstance(value, str)),
            (bool, isinstance(value, bool)),
            (list[int | str], isinstance(value, list) and all(
                whole(v) or isinstance(v, str) for v in value)),
            (dict[str, int] | None, value is None or (
                isinstance(value, dict) and all(map(whole,
                                                    value.values()))))):
        try:
            fit(value, hint)
        except ChatError:
            assert not wanted
        else:
            assert wanted
