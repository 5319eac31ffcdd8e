"""How kernels are built and chosen, and what happens without a compiler."""

import functools
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_kernels import (
    LOADED,
    POCKET,
    kernels_on,  # noqa: F401  a fixture
    needs_compiler,
)

from gptoss.kernels import build

CHILD = """
import logging, sys, torch
from gptoss.kernels import build
from gptoss.kernels.compact import CompactLinear, pack
from gptoss.kernels.eight import pack_eight, unpack_eight
from gptoss.model.layers import Linear
from gptoss.weights.mxfp4 import decode
from gptoss.weights.encoding import encode
from gptoss.model.ops import mxfp4_linear
torch.manual_seed(0)
y = mxfp4_linear(torch.randn(3, 96).bfloat16(), *encode(torch.randn(20, 96)))
print(build.kernel_path())
print(y.float().sum().item())
worst = 0.0
for tokens in (1, 2, 5, 23):
    for rows, columns in ((50, 32), (33, 96), (16, 160), (64, 2880)):
        weight = encode(torch.randn(rows, columns))
        x = torch.randn(tokens, columns).bfloat16()
        exact = x.double() @ decode(*weight, torch.float64).T
        y = mxfp4_linear(x, *weight).double()
        worst = max(worst, ((y - exact).norm() / exact.norm()).item())
for rows, columns in ((50, 64), (3, 4096), (131, 2880)):
    if "AVX" in build.kernel_path():
        layer = Linear(columns, rows, dtype=torch.bfloat16)
        copy = CompactLinear(layer, pack(layer.weight.detach()))
        for tokens in (1, 2, 5, 9):
            x = torch.randn(tokens, columns).bfloat16()
            exact = x.double() @ layer.weight.double().T + layer.bias.double()
            for made in (layer, copy):
                with torch.no_grad():
                    y = made(x).double()
                worst = max(worst, ((y - exact).norm() / exact.norm()).item())
for tokens in (1, 2, 3, 4, 7):
    for rows, columns in ((50, 64), (3, 4096), (131, 2880)):
        if "C++" in build.kernel_path():
            weight = pack_eight(torch.randn(rows, columns).bfloat16())
            x = torch.randn(tokens, columns).bfloat16()
            exact = x.double() @ unpack_eight(weight).double().T
            y = torch.ops.gptoss.eight_linear(x, *weight, None).double()
            worst = max(worst, ((y - exact).norm() / exact.norm()).item())
print(worst)
"""


@functools.cache  # the same words from the same process
def child(**changes: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", CHILD], text=True,
                          capture_output=True, timeout=280,
                          env=os.environ | {"OMP_NUM_THREADS": "1",
                                             "GPTOSS_KERNELS": "auto"}
                          | changes)


def test_torch_can_be_chosen_and_is_silent():
    done = child(GPTOSS_KERNELS="torch")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("torch (GPTOSS_KERNELS=torch)")


@pytest.mark.parametrize(("changes", "words"), [
    ({"CXX": "no-such-compiler"}, "no-such-compiler"),
    ({"CXX": "false"}, "compiler failed"),
    ({"GPTOSS_KERNELS": "quick"}, "quick")])
def test_without_kernels_one_line_says_so(changes, words, tmp_path):
    done = child(XDG_CACHE_HOME=str(tmp_path), **changes)
    assert done.returncode == 0
    *first, told = done.stderr.splitlines()
    assert told.startswith("gptoss: no kernels") and words in told
    assert all("compiling" in line for line in first)
    assert len(first) == (changes.get("CXX") == "false")
    assert done.stdout.startswith("torch (")
    plain = child(GPTOSS_KERNELS="torch")
    assert done.stdout.splitlines()[1] == plain.stdout.splitlines()[1]


@needs_compiler
@pytest.mark.parametrize("variant, names", [
    ("auto", ("C++ with AVX", "portable C++")),
    ("avx2", ("C++ with AVX2\n", "portable C++")),
    ("portable", ("portable C++",))])
def test_each_variant_is_one_rounding_from_exact(variant, names):
    """Compiled once more where another processor would run it."""
    done = child(GPTOSS_KERNELS=variant)
    assert done.stdout.startswith(names), done.stderr
    assert 1e-4 < float(done.stdout.splitlines()[2]) < 3e-3


PAGE = """
from gptoss.kernels import build
from gptoss.model.ops import has_kernel
print(build.load_upto("small"))
print(has_kernel("rms_norm"), has_kernel("linear"), build.load_kernels())
"""


@pytest.mark.parametrize("compiler, loaded", [
    pytest.param(os.environ.get("CXX", "c++"), "True\nTrue",
                 marks=needs_compiler),
    ("no-such-compiler", "False\nFalse")])
def test_a_page_loads_the_parts_up_to_its_own(compiler, loaded, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PAGE], text=True, capture_output=True,
        timeout=280, env=os.environ | {"XDG_CACHE_HOME": str(tmp_path),
                                       "CXX": compiler})
    assert done.stdout == f"{loaded} False torch (GPTOSS_KERNELS=torch)\n"
    assert not done.stderr


@needs_compiler
def test_a_page_takes_the_whole_library_where_it_lies(tmp_path):
    """Compiled already, it is not compiled again up to a part."""
    whole, folder = build.build("auto"), tmp_path / "gptoss"
    folder.mkdir(mode=0o700)
    for file in (whole, whole.with_suffix(".sha256")):
        shutil.copy2(file, folder)
    done = subprocess.run(
        [sys.executable, "-c", PAGE], text=True, capture_output=True,
        timeout=280, env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)})
    assert done.stdout == "True\nTrue True torch (GPTOSS_KERNELS=torch)\n"
    assert [*folder.glob("*.so")] == [folder / whole.name]
    assert not done.stderr


@pytest.mark.parametrize("part", ["dens", "base", "recording"])
def test_a_page_of_no_operator_is_refused_and_changes_nothing(part):
    before = dict(os.environ)
    with pytest.raises(build.KernelError,
                       match=f"part: .*small, packed.*'{part}'"):
        build.load_upto(part)
    assert dict(os.environ) == before


COMPILER = """
import os, pathlib, shutil, sys, time
folder = pathlib.Path({folder!r})
with open(folder / "log", "a") as log:
    print("run", file=log, flush=True)
until, parent = time.monotonic() + {seconds}, os.getppid()
while time.monotonic() < until and os.getppid() == parent:
    if len(list(folder.glob("here-*"))) >= {wait_for}:
        break
    time.sleep(0.02)
time.sleep(0.3)
shutil.copy({library!r}, sys.argv[sys.argv.index("-o") + 1])
"""
READY = "import os, pathlib; pathlib.Path(os.environ['READY']).touch()\n"


def compiler(folder: Path, wait_for: int = 0, seconds: float = 60) -> str:
    """$CXX: copies the library that is there, once `wait_for` processes are
    waiting for it or the seconds are over, and notes each call."""
    script = folder / "compiler.py"
    script.write_text(COMPILER.format(
        folder=str(folder), library=str(build.build()), wait_for=wait_for,
        seconds=seconds))
    return shlex.join([sys.executable, "-S", str(script)])


def starting(folder: Path, cxx: str, number: int) -> subprocess.Popen:
    """A process that is about to build, as a rank of torchrun would."""
    code = CHILD.replace("torch.manual_seed", READY + "torch.manual_seed", 1)
    return subprocess.Popen(
        [sys.executable, "-c", code], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=os.environ | {
            "OMP_NUM_THREADS": "1", "GPTOSS_KERNELS": "auto", "CXX": cxx,
            "XDG_CACHE_HOME": str(folder / "cache"),
            "READY": str(folder / f"here-{number}")})


@needs_compiler
def test_of_several_first_builds_one_compiles(tmp_path):
    cxx = compiler(tmp_path, wait_for=3)
    ranks = [starting(tmp_path, cxx, n) for n in range(3)]
    told = [rank.communicate(timeout=280) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 0], told
    assert (tmp_path / "log").read_text().count("run") == 1
    assert len({out for out, _ in told}) == 1 and "C++" in told[0][0]
    assert sorted("compiling" in err for _, err in told) == [False, False,
                                                             True]
    # and what each measured, kept once
    assert sorted(x.suffix for x in (tmp_path / "cache" / "gptoss").iterdir()
                  ) == [".json", ".sha256", ".so"]


@needs_compiler
def test_a_build_that_is_killed_holds_nobody_up(tmp_path):
    cxx = compiler(tmp_path, wait_for=2)  # the first waits for the second
    first = starting(tmp_path, cxx, 0)
    while not (tmp_path / "log").exists():
        assert first.poll() is None
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.communicate(timeout=60)
    second = starting(tmp_path, cxx, 1)
    out, err = second.communicate(timeout=280)
    assert second.returncode == 0 and "C++" in out, err
    assert (tmp_path / "log").read_text().count("run") == 2


@needs_compiler
@pytest.mark.parametrize("lock", ["missing", "refused"])
def test_a_system_without_locks(lock, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", compiler(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    class Refusing:
        LOCK_EX = 2

        def flock(self, *_):
            raise OSError("no locks available")

    monkeypatch.setattr(build, "fcntl",
                        Refusing() if lock == "refused" else None)
    made = build.build()
    assert made.exists() and made == build.build()
    assert (tmp_path / "log").read_text() == "run\n"


@needs_compiler
def test_a_failed_build_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(build.KernelError, match="compiler failed"):
        build.build()
    assert list((tmp_path / "gptoss").iterdir()) == []


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "gptoss").write_text("a file, not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(build.KernelError, match="cannot compile"):
        build.build()


def test_the_library_is_named_by_what_it_depends_on(monkeypatch, tmp_path):
    names = set(map(build.library_path, build.VARIANTS))
    monkeypatch.setenv("CXX", "some-other-compiler")
    names.add(build.library_path())
    monkeypatch.setattr(build, "OPTIONS", ("-O1",))
    names.add(build.library_path())
    assert len(names) == 5


# ---- who gets the kernels

FRONT = """
import sys, gptoss
assert not {"torch", "gptoss.kernels"} & set(sys.modules)
from gptoss import %s
assert "gptoss.kernels" not in sys.modules  # nothing before it is needed
from gptoss.chat.chat import load
model, _ = load(sys.argv[1])
from gptoss.kernels import build
import torch
assert build._path  # loaded with the model, before threads share it
model(torch.tensor([[1, 2, 3]]))
assert "torch._dynamo" not in sys.modules  # 1 to 2 seconds of importing
print(build._path)
"""


@pytest.mark.parametrize("name", ["GptOss", "Chat"])
def test_whoever_reads_a_model_gets_the_kernels(name):
    """Importing alone loads nothing; tests/model/test_operators.py has the
    other routes."""
    done = subprocess.run(
        [sys.executable, "-c", FRONT % name, str(POCKET)], text=True,
        capture_output=True, timeout=280,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GPTOSS_KERNELS": "auto"})
    assert done.returncode == 0, done.stderr
    assert done.stdout == LOADED + "\n"


def test_kernel_path_says_what_will_happen(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "_path", "")
    monkeypatch.setenv("GPTOSS_KERNELS", "auto")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", sys.executable)  # something that exists
    assert build.kernel_path() == "C++, to be compiled when first used"
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.kernel_path().startswith("torch (no compiler 'no-such")
