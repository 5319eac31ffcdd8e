"""One base for every error of the package, and one wording of refusals."""

import ast
import importlib
from pathlib import Path

import pytest

import gptoss
from gptoss.weights import errors

PACKAGE = Path(gptoss.__file__).parent
OTHERS = {"ParserError", "TangleError", "UsageError"}  # tools, not a model's


def error_classes() -> list[tuple[str, str]]:
    """(module, class) of each class of the package whose name ends so."""
    return [(file.relative_to(PACKAGE).with_suffix("").as_posix(), node.name)
            for file in sorted(PACKAGE.rglob("*.py"))
            for node in ast.walk(ast.parse(file.read_text("utf-8")))
            if isinstance(node, ast.ClassDef) and node.name.endswith("Error")
            and node.name not in {"Error", *OTHERS}]


def test_every_error_is_one_of_the_package() -> None:
    found = error_classes()
    assert len(found) >= 13
    for module, name in found:
        error = getattr(importlib.import_module(
            f"gptoss.{module.replace('/', '.')}"), name)
        assert issubclass(error, gptoss.Error), name
    assert issubclass(gptoss.Error, ValueError)
    assert gptoss.Error is errors.Error


@pytest.mark.parametrize("module, name", [
    ("model/cache", "CacheError"), ("kernels/build", "KernelError"),
    ("parallel/shards", "ParallelError")])
def test_what_fails_while_running_is_a_runtime_error_too(
        module: str, name: str) -> None:
    error = getattr(importlib.import_module(
            f"gptoss.{module.replace('/', '.')}"), name)
    assert issubclass(error, RuntimeError)


class Mine(errors.Error):
    pass


def test_the_wording() -> None:
    made = errors.mismatch(Mine, "x", "a number", "none")
    assert type(made) is Mine
    assert str(made) == "x: expected a number, found none"
    with pytest.raises(Mine, match="^x: expected a number, found 'none'$"):
        errors.refuse(Mine, "x", "a number", "none")
    with pytest.raises(Mine, match="^x: expected one, found 2$"):
        errors.expect(Mine, False, "x", "one", 2)
    errors.expect(Mine, True, "x", "one", 1)


def test_what_is_shown_of_a_value() -> None:
    assert errors.shown("a") == "'a'"
    assert errors.shown("a" * 300) == "'" + "a" * 199 + "..."
    assert errors.shown(10 ** 5000) == "a int too large to show"


@pytest.mark.parametrize("value, count, number, positive", [
    (2, True, True, True), (0, True, True, False), (2.5, False, True, True),
    (-1.0, False, True, False), (True, False, False, False),
    (float("nan"), False, True, False), (float("inf"), False, True, False),
    ("2", False, False, False), (None, False, False, False)])
def test_kinds_of_numbers(value: object, count: bool, number: bool,
                          positive: bool) -> None:
    assert errors.is_count(value) is count
    assert errors.is_number(value) is number
    assert bool(errors.is_positive(value)) is positive
