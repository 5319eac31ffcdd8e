"""nbval compares pictures, too: what was drawn, not the bytes of the image.

See book/_ext/figures.py, and the appendix on how the book builds itself. And
a kernel that dies while it starts is started again: jupyter chooses its ports
before the kernel takes them, and another notebook's processes can be faster.
"""

import os
import runpy
from pathlib import Path

EXT = Path(__file__).resolve().parent / "_ext"
os.environ["PYTHONSTARTUP"] = str(EXT / "kernel.py")
same = runpy.run_path(str(EXT / "figures.py"))["same"]


def agreed(test: list, ref: list) -> list:
    """`test`, with the frozen text where a figure shows the same."""
    figures = [out for out in ref if "image/png" in out.get("data", {})]
    for new in test:
        data = new.get("data", {})
        if "image/png" not in data or not figures:
            continue
        old = figures.pop(0)["data"].get("text/plain", "")
        if same(old, data["text/plain"]):
            data["text/plain"] = old
    return test


def patient(start, tries: int = 3):
    """`start`, called again if it raises RuntimeError."""
    def start_again(*args, **options):
        for _ in range(tries - 1):
            try:
                return start(*args, **options)
            except RuntimeError:
                continue
        return start(*args, **options)

    return start_again


def pytest_configure(config) -> None:
    from nbval import kernel
    from nbval.plugin import IPyNbCell

    if not hasattr(kernel, "start_once"):
        kernel.start_once = kernel.start_new_kernel
        kernel.start_new_kernel = patient(kernel.start_once)

    compare = IPyNbCell.compare_outputs
    if not hasattr(compare, "figures"):
        def compare_outputs(self, test, ref, skip_compare=None):
            return compare(self, agreed(test, ref), ref, skip_compare)

        compare_outputs.figures = True
        IPyNbCell.compare_outputs = compare_outputs
