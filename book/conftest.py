"""nbval compares pictures, too: what was drawn, not the bytes of the image.

See book/_ext/figures.py, and the appendix on how the book builds itself.
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


def pytest_configure(config) -> None:
    from nbval.plugin import IPyNbCell

    compare = IPyNbCell.compare_outputs
    if not hasattr(compare, "figures"):
        def compare_outputs(self, test, ref, skip_compare=None):
            return compare(self, agreed(test, ref), ref, skip_compare)

        compare_outputs.figures = True
        IPyNbCell.compare_outputs = compare_outputs
