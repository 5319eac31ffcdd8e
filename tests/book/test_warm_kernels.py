"""Kernels that are forked: processes of their own, with nothing of the book
imported, that end with the command."""

import os
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbformat import v4

TOOL = Path(__file__).parents[1] / "warm_kernels.py"
CELLS = ("import os, sys; print(os.getppid() > 1, 'torch' in sys.modules, "
         "'gptoss' in sys.modules)",
         "print(os.path.basename(os.getcwd()), os.environ['MARK'])",
         "x = 1; print(sys.path, sys.flags, __name__)",
         "x += 1; print(x)")
PROGRAM = """
import sys
from jupyter_client.manager import start_new_kernel
manager, client = start_new_kernel(kernel_name="warm")
client.execute("import time; print('begun', flush=True); time.sleep(60)")
while "begun" not in str(client.get_iopub_msg(timeout=60)["content"]):
    pass
manager.interrupt_kernel()
print(client.get_shell_msg(timeout=60)["content"]["ename"])
client.execute("print(1 + 1)", reply=True, timeout=60)
client.execute("import os; os._exit(0)") if "die" in sys.argv else None
manager.shutdown_kernel(now="now" in sys.argv)
print(manager.has_kernel)
"""
linux = pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux")


def run(*command: str, cwd: Path, **more: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(TOOL), *command], cwd=cwd,
                          env=os.environ | more, text=True,
                          capture_output=True, timeout=300)


def left(folder: Path) -> list[str]:
    """Processes that still name the folder."""
    until = time.monotonic() + 20
    while found := [line for line in subprocess.run(
            ["ps", "-eo", "args"], capture_output=True, text=True
            ).stdout.splitlines() if str(folder) in line]:
        if time.monotonic() > until:
            break
        time.sleep(0.1)
    return found


@linux
def test_two_notebooks_are_two_processes(tmp_path):
    for name in ("one", "two", "plain"):
        cells = [v4.new_code_cell(source, id=f"c{n}")
                 for n, source in enumerate(CELLS)]
        nbformat.write(v4.new_notebook(cells=cells),
                       tmp_path / f"{name}.ipynb")
    done = run(sys.executable, "-m", "jupyter", "execute", "--inplace",
               "--kernel_name=warm", "one.ipynb", "two.ipynb", cwd=tmp_path,
               MARK="here", TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    done = run(sys.executable, "-m", "jupyter", "execute", "--inplace",
               "--kernel_name=python3", "plain.ipynb", cwd=tmp_path,
               MARK="here")
    assert done.returncode == 0, done.stderr
    one, two, plain = ([cell.outputs[0].text for cell in nbformat.read(
        tmp_path / f"{name}.ipynb", 4).cells] for name in ("one", "two",
                                                           "plain"))
    assert one == two and one[0] == "True True False\n"
    assert plain == ["True False False\n", *one[1:]]
    assert one[1] == f"{tmp_path.name} here\n" and one[3] == "2\n"
    assert left(tmp_path) == []


@linux
@pytest.mark.parametrize("how", ["", "now", "die"])
def test_interrupted_and_ended(how, tmp_path):
    done = run(sys.executable, "-c", PROGRAM, how, cwd=tmp_path,
               TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "KeyboardInterrupt\nFalse\n"
    assert left(tmp_path) == []


def test_the_command_decides_how_it_ends(tmp_path):
    assert run(sys.executable, "-c", "raise SystemExit(7)",
               cwd=tmp_path).returncode == 7
