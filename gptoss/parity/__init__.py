"""Part parity of the book: 18 names, loaded when first asked for

Generated from the front matter of book/parity/*.py; edit it, not this file.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptoss.parity.contracts import CONTRACTS as CONTRACTS
    from gptoss.parity.contracts import Contract as Contract
    from gptoss.parity.contracts import ParityError as ParityError
    from gptoss.parity.judge import Judge as Judge
    from gptoss.parity.judge import excess as excess
    from gptoss.parity.report import compare as compare
    from gptoss.parity.report import compare_logits as compare_logits
    from gptoss.parity.report import parity_table as parity_table
    from gptoss.parity.rounding import Rounding as Rounding
    from gptoss.parity.suspects import FAULTS as FAULTS
    from gptoss.parity.suspects import Finding as Finding
    from gptoss.parity.suspects import judge_walk as judge_walk
    from gptoss.parity.vector_cases import VectorError as VectorError
    from gptoss.parity.vector_cases import run_case as run_case
    from gptoss.parity.vectors import read_vectors as read_vectors
    from gptoss.parity.walk import points as points
    from gptoss.parity.walk import trace_ours as trace_ours
    from gptoss.parity.walk_others import REFERENCES as REFERENCES

_HOME = {
    "CONTRACTS": "contracts",
    "Contract": "contracts",
    "FAULTS": "suspects",
    "Finding": "suspects",
    "Judge": "judge",
    "ParityError": "contracts",
    "REFERENCES": "walk_others",
    "Rounding": "rounding",
    "VectorError": "vector_cases",
    "compare": "report",
    "compare_logits": "report",
    "excess": "judge",
    "judge_walk": "suspects",
    "parity_table": "report",
    "points": "walk",
    "read_vectors": "vectors",
    "run_case": "vector_cases",
    "trace_ours": "walk",
}
_MODULES = (
    "rounding",
    "contracts",
    "walk",
    "walk_others",
    "judge",
    "suspects",
    "vector_cases",
    "vectors",
    "report",
)


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME, *_MODULES])


__all__ = [
    "CONTRACTS",
    "Contract",
    "FAULTS",
    "Finding",
    "Judge",
    "ParityError",
    "REFERENCES",
    "Rounding",
    "VectorError",
    "compare",
    "compare_logits",
    "excess",
    "judge_walk",
    "parity_table",
    "points",
    "read_vectors",
    "run_case",
    "trace_ours",
]
