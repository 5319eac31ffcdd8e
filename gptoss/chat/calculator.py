"""How does a Python function become a tool?

Generated from book/chat/tools.py; edit the chapter, not this file.
"""

import ast
import datetime
import warnings
from decimal import Context, Decimal, Inexact
from fractions import Fraction
from typing import Any

# --- Two tools that can do no harm -------------------------------------------

_BITS = 1024  # of numerator and denominator: about 300 digits
_BINARY = {ast.Add: Fraction.__add__, ast.Sub: Fraction.__sub__,
           ast.Mult: Fraction.__mul__, ast.Div: Fraction.__truediv__,
           ast.FloorDiv: Fraction.__floordiv__, ast.Mod: Fraction.__mod__}


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(),
           value.denominator.bit_length()) > _BITS:
        raise ValueError("a number of more than 300 digits")
    return value


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise ValueError("** takes whole exponents only")
    size = max(base.numerator.bit_length(), base.denominator.bit_length())
    if (size - 1) * abs(exponent.numerator) > _BITS:
        raise ValueError("a number of more than 300 digits")
    return base ** exponent.numerator


def _evaluate(node: ast.expr, source: str) -> Fraction:
    """The exact value of a syntax tree of numbers and operators."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        text = ast.get_source_segment(source, node)
        number = (Decimal(node.value) if type(node.value) is int
                  else Decimal(text or ""))  # as written: 0.1 is a tenth
        if abs(number.adjusted()) > 300:
            raise ValueError("a number of more than 300 digits")
        return Fraction(number)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op,
                                                    ast.USub | ast.UAdd):
        value = _evaluate(node.operand, source)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in {*_BINARY, ast.Pow}:
        run: Any = _BINARY.get(type(node.op), _power)
        return _bounded(Fraction(run(_evaluate(node.left, source),
                                     _evaluate(node.right, source))))
    raise ValueError("expected numbers, + - * / // % ** and parentheses, "
                     f"found {ast.unparse(node)[:40]!r}")


def _decimal(value: Fraction) -> str:
    """Exact if that ends within 300 digits, else 15 digits and "..."."""
    context = Context(prec=700)  # 309 digits before the point, 300 behind
    exact = context.divide(Decimal(value.numerator),
                           Decimal(value.denominator))
    if context.flags[Inexact] or int(exact.as_tuple().exponent) < -300:
        return f"{float(value):.15g}..."
    return f"{exact:f}"


def calculator(expression: str) -> str:
    """Work out an arithmetic expression.

    Args:
        expression: what to work out
    """
    text = expression.strip()  # + - * / // % ** and parentheses
    try:
        if len(text) > 300:
            raise ValueError("more than 300 characters")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the parser, about spelling
            tree = ast.parse(text, mode="eval")
        return _decimal(_evaluate(tree.body, text))
    except ZeroDivisionError:
        return "error: division by zero"
    except SyntaxError as error:
        return f"error: {error.msg}"
    except (ValueError, ArithmeticError, MemoryError,
            RecursionError) as error:
        return f"error: {error or 'too deeply nested'}"


def today() -> str:
    """The date of today."""
    return datetime.date.today().isoformat()


TOOLS = {"calculator": calculator, "today": today}


__all__ = [
    "TOOLS",
    "calculator",
    "today",
]
