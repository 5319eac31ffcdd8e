"""Which numbers make a gpt-oss?

Generated from book/weights/config.py; edit the chapter, not this file.
"""

from typing import NoReturn, TypeGuard, TypeVar

# --- What is an error, and what does it say? ---------------------------------

class Error(ValueError):
    """What this package refuses: each of its errors is one of these."""


E = TypeVar("E", bound=Error)


def mismatch(error: type[E], what: object, expected: object,
             found: object) -> E:
    """An error of this class, worded; `found` is said as it is."""
    return error(f"{what}: expected {expected}, found {found}")


def refuse(error: type[Error], what: object, expected: object,
           found: object) -> NoReturn:
    """Raise `mismatch`; a value that was found is `shown`."""
    raise mismatch(error, what, expected, shown(found))


def expect(error: type[Error], good: bool, what: object, expected: object,
           found: object) -> None:
    """`refuse` unless it is good."""
    if not good:
        refuse(error, what, expected, found)


def shown(value: object) -> str:
    """repr(value), and no more of it than fits into a message."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an int of 5,000 digits
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= 200 else text[:200] + "..."


def is_count(value: object) -> TypeGuard[int]:
    """A whole number; True is none, although Python thinks it is 1."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[int | float]:
    """A float, infinity and NaN among them, or a whole number like one."""
    return (isinstance(value, float)
            or is_count(value) and abs(value) < 2 ** 1023)


def is_positive(value: object) -> TypeGuard[int | float]:
    """A finite number above 0."""
    return is_number(value) and 0 < value < float("inf")


__all__ = [
    "E",
    "Error",
    "expect",
    "is_count",
    "is_number",
    "is_positive",
    "mismatch",
    "refuse",
    "shown",
]
