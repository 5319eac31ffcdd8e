"""What is on the page was run

Generated from book/cli/freezing.py; edit the chapter, not this file.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import jupytext
import nbformat
from traitlets.config import Config

# --- Freezing ----------------------------------------------------------------

# GPU or real weights: not executed by nbclient, not compared by nbval
_ELSEWHERE = {"skip-execution", "nbval-skip"}


def prepared(path: Path) -> nbformat.NotebookNode:
    """A chapter as a notebook whose cell ids depend on nothing but the
    chapter's name and the cell's place; no outputs yet."""
    notebook = jupytext.read(path)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    notebook.metadata.pop("jupytext", None)
    for n, cell in enumerate(notebook.cells):
        cell.id = f"{path.stem}-{n}".replace("_", "-")
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook


def _talks_by(folder: str) -> dict[str, str]:
    """How a kernel listens: at sockets in a folder of its own, if it can.

    A TCP port is found free and only then taken; of two kernels that start
    in the same moment, one may find its port gone and never answer.
    """
    return ({"transport": "ipc", "ip": f"{folder}/kernel"}
            if os.name == "posix" else {})


def freeze(path: Path) -> Path:
    """Execute a chapter in its own folder; store it beside itself.

    Raises nbclient.exceptions.CellExecutionError for a cell that fails, and
    writes nothing then.
    """
    from nbclient import NotebookClient

    notebook = prepared(path)
    watch = next(filter(Path.exists, (
        up / "_ext" / "kernel.py" for up in path.absolute().parents)), None)
    with TemporaryDirectory() as sockets:
        client = NotebookClient(
            notebook, timeout=600, record_timing=False, coalesce_streams=True,
            kernel_name="python3", extra_arguments=["--log-level=ERROR"],
            resources={"metadata": {"path": path.parent}},
            config=Config(KernelManager=_talks_by(sockets)))
        client.execute(env=os.environ | {
            "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
            "PYTHONHASHSEED": "0",
            "GPTOSS_KERNELS": "torch",  # who wants kernels asks for them
            } | ({"PYTHONSTARTUP": str(watch)} if watch else {}))
    notebook.metadata["language_info"] = {"name": "python"}
    target = path.with_suffix(".ipynb")
    nbformat.write(notebook, target)
    return target


def stale(path: Path) -> str:
    """Why the frozen notebook is not its chapter's own; "" if it is."""
    frozen = path.with_suffix(".ipynb")
    if not frozen.exists():
        return f"{frozen.name}: no such file; `make freeze` writes it"
    there, here = nbformat.read(frozen, 4), prepared(path)
    if len(there.cells) != len(here.cells):
        return (f"{frozen.name}: {len(there.cells)} cells, the chapter has "
                f"{len(here.cells)}")
    for old, new in zip(there.cells, here.cells, strict=True):
        where = f"{frozen.name}: cell {new.id}"
        for key in ("id", "cell_type", "source"):
            if old.get(key) != new.get(key):
                return f"{where}: {key} differs from the chapter"
        tags = set(new.metadata.get("tags", []))
        if set(old.metadata.get("tags", [])) != tags:
            return f"{where}: tags differ from the chapter"
        if new.cell_type != "code" or not new.source.strip():
            continue
        if old.execution_count is None and not _ELSEWHERE <= tags:
            return f"{where}: never executed"
        kinds = {out.get("name", out.output_type) for out in old.outputs}
        if kinds & {"error", "stderr"}:
            return f"{where}: holds an error or wrote to stderr"
    return ""


# --- One command -------------------------------------------------------------

def run_freeze(chapters: list[Path], check: bool = False,
               force: bool = False, jobs: int = 1) -> int:
    """Execute what is stale, or all with `force`; `check` only reports.

    A failing chapter is reported and does not stop the others. Returns the
    exit code.
    """
    reasons = {path: stale(path) for path in chapters}
    if check:
        print("".join(f"{text}\n" for text in reasons.values() if text),
              end="")
        return int(any(reasons.values()))

    def attempt(path: Path) -> int:
        try:
            print(f"froze {freeze(path).name}", flush=True)
        except Exception as error:
            print(f"{path.name}: {error}", file=sys.stderr, flush=True)
            return 1
        return 0

    todo = [path for path, text in reasons.items() if text or force]
    with ThreadPoolExecutor(jobs) as pool:
        return max(pool.map(attempt, todo), default=0)


__all__ = [
    "freeze",
    "prepared",
    "run_freeze",
    "stale",
]
