"""What does the model ask for, and who answers?

Generated from book/model/operators.py; edit the chapter, not this file.
"""

from collections.abc import Callable
from importlib import import_module
from threading import RLock

# --- When are the kernels loaded? --------------------------------------------

ANSWERS = {"kernels": "gptoss.kernels.build:load_kernels",
           "product": "gptoss.kernels.quicker:choose_product",
           "step": "gptoss.kernels.step:quick_step",
           "drafts": "gptoss.kernels.drafts:with_drafts"}
LOADING = RLock()  # the thread that loads may call operators itself
_state = ""  # then "loading", then "loaded": changed behind LOADING alone


def find_answer(what: str) -> Callable:
    """The function that ANSWERS names; imports its module."""
    module, _, name = ANSWERS[what].partition(":")
    return getattr(import_module(module), name)


def load_answers() -> bool:
    """Load, once, the kernels and the step. True: there was nothing to wait
    for. Whoever comes while another thread loads waits, and gets False; what
    fails is tried again by the next."""
    global _state
    if _state == "loaded":
        return True
    with LOADING:
        if _state == "loading":
            return True
        if _state == "loaded":
            return False
        _state = "loading"
        try:
            find_answer("kernels")()
            find_answer("product")()  # ours or torch's, by the clock
            find_answer("step")
            _state = "loaded"
        finally:
            _state = _state if _state == "loaded" else ""
    return False


__all__ = [
    "ANSWERS",
    "LOADING",
    "find_answer",
    "load_answers",
]
