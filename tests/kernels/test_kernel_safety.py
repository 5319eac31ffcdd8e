"""Kernels given wrong arguments, also under ASan and UBSan, and a cache of
compiled kernels that is broken, or not the user's own.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_build import compiler
from test_kernels import (
    COMPILED,
    kernels_on,  # noqa: F401  a fixture
    needs_compiler,
)

from gptoss.kernels import build
from gptoss.weights.encoding import encode

FUZZ = Path(__file__).with_name("kernel_fuzz.py")
FACTOR = int(os.environ.get("GPTOSS_FUZZ", 1))
OPS = torch.ops.gptoss
needs_kernels = pytest.mark.skipif(not COMPILED, reason="no kernels")


def fuzz(*arguments: object, **changes: str) -> None:
    done = subprocess.run(
        [sys.executable, str(FUZZ), *map(str, arguments)], text=True,
        capture_output=True, timeout=280 * FACTOR, env=os.environ | {
            "OMP_NUM_THREADS": "1", "GPTOSS_KERNELS": "auto"} | changes)
    last = "\n".join(done.stderr.splitlines()[-12:])
    assert done.returncode == 0, f"{done.returncode}: {last}"
    assert done.stdout.endswith(" 0 differ\n"), done.stdout[-3000:]


@needs_kernels
def test_wrong_arguments_are_treated_as_torch_treats_them():
    """No signal, and no number where torch has none, or another one."""
    fuzz(1, 600 * FACTOR, "wrong")


def sanitizer() -> str:
    """What LD_PRELOAD needs for ASan, or nothing where gcc has none."""
    found = []
    for name in ("libasan.so", "libstdc++.so"):
        asked = subprocess.run(
            [*build._compiler(), f"-print-file-name={name}"],
            text=True, capture_output=True)
        path = asked.stdout.strip()
        if asked.returncode or not os.path.isabs(path):
            return ""
        found.append(path)
    return " ".join(found)


@needs_kernels
def test_under_asan_and_ubsan(monkeypatch):
    """Wrong arguments and right ones; compiled once, then kept."""
    preload = sanitizer()
    if not preload:
        pytest.skip("the compiler has no libasan")
    import kernel_fuzz
    monkeypatch.setattr(build, "OPTIONS", kernel_fuzz.SANITIZED)
    build.build()
    for kind in ("wrong", "valid"):
        fuzz(2, 150 * FACTOR, kind, "sanitized", LD_PRELOAD=preload,
             ASAN_OPTIONS="detect_leaks=0")


@needs_kernels
@pytest.mark.parametrize(("name", "given", "words"), [
    ("linear", ((4, 128), (512, 32), None), "linear: x: expected .*32"),
    ("linear", ((4, 32), (8, 32), (7,)), r"linear: bias: expected \(8\)"),
    ("rms_norm", ((1, 8), (7,), 1e-5), r"weight: expected \(8\).*7"),
    ("rope", ((1, 2, 3, 8), (1, 2, 3), (1, 2, 3)), "rope: cos: expected"),
    ("sink_attention", ((1, 2, 4, 16), (1, 2, 2, 32), (1, 2, 2, 32), (4,),
                        torch.zeros(1, 2).long(), torch.zeros(1, 2).long(),
                        0, 1.0), "sink_attention: expected q")])
def test_what_cannot_be_right_is_refused_by_name(name, given, words):
    arguments = [torch.ones(x).bfloat16() if isinstance(x, tuple) else x
                 for x in given]
    with pytest.raises(RuntimeError, match=words):
        getattr(OPS, name)(*arguments)


@needs_kernels
def test_no_queries_and_no_keys():
    """On both paths: nothing, and zeros."""
    at = torch.arange(3)[None]
    for T, S in ((0, 3), (2, 0), (0, 0)):
        q, k = (torch.ones(1, n, heads, 16).bfloat16()
                for n, heads in ((T, 4), (S, 2)))
        for on in (True, False):
            OPS.enable_kernels(on)
            y = OPS.sink_attention(q, k, k, torch.zeros(4).bfloat16(),
                                   at[:, :T], at[:, :S], 0, 0.25)
            assert torch.equal(y, torch.zeros(1, T, 4, 16).bfloat16())


# ---- a cache that is broken

@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A library in a cache of its own, made by a compiler that copies."""
    monkeypatch.setenv("CXX", compiler(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    build.build()
    return tmp_path


def calls(folder: Path) -> int:
    return (folder / "log").read_text().count("run")


USE = """
import sys, torch
from gptoss.kernels import build
print(build.load_kernels().split()[0])
"""


def use() -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", USE], text=True, capture_output=True,
        timeout=280, env=os.environ | {"GPTOSS_KERNELS": "auto"})


@needs_kernels
@needs_compiler
@pytest.mark.parametrize("damage", ["cut", "zeros", "flipped", "other",
                                    "no seal", "folder"])
def test_a_broken_library_is_compiled_again(cache, damage):
    library = build.library_path()
    right = library.read_bytes()
    seal = library.with_suffix(".sha256")
    if damage == "no seal":
        seal.unlink()
    elif damage == "folder":
        seal.unlink()
        seal.mkdir()
        seal.rmdir()
    else:
        library.write_bytes({
            "cut": right[:1000], "zeros": bytes(len(right)),
            "flipped": right[:5000] + bytes([right[5000] ^ 1])
            + right[5001:], "other": b"\x7fELF"}[damage])
    assert build.kernel_path.__doc__ and not build._sound(library)
    assert build.build() == library and library.read_bytes() == right
    assert calls(cache) == 2 and build._sound(library)


@needs_kernels
@needs_compiler
def test_a_sealed_library_that_does_not_load_is_compiled_once_more(cache):
    """As one process sees it; with a compiler that makes nothing good, one
    line is said and plain torch computes."""
    library = build.library_path()
    library.write_bytes(b"\x7fELF nothing")
    library.with_suffix(".sha256").write_text(build._seal(library))
    done = use()
    assert done.returncode == 0 and calls(cache) == 2, done.stderr
    assert not done.stdout.startswith("torch"), done.stderr
    assert build._sound(library)


@needs_compiler
def test_a_compiler_that_makes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for broken, words in (("true", "made no library"),
                          ('g++ "', "CXX"), ("false", "no message")):
        monkeypatch.setenv("CXX", broken)
        with pytest.raises(build.KernelError, match=words):
            build.build()


@pytest.mark.parametrize(("told", "line"), [
    ("collect2: error: ld returned 1 exit status\n"
     "/usr/bin/ld: final link failed: No space left on device\n",
     "/usr/bin/ld: final link failed: No space left on device"),
    ("In file x\na.cpp:1: fatal error: y.h: No such file\n1 error\n",
     "a.cpp:1: fatal error: y.h: No such file"),
    ("cannot \x1b]0;owned\x07 é", "cannot \\x1b]0;owned\\x07 é"),
    ("", "no message")])
def test_a_complaint_is_the_useful_line_and_printable(told, line):
    assert build._complaint(told) == line


@needs_kernels
@needs_compiler
def test_what_killed_compilers_left_is_removed(cache):
    folder = build.library_path().parent
    (folder / "tmpabc").mkdir()
    (folder / "tmpabc" / "half.so").write_text("")
    build.library_path().unlink()
    build.build()
    assert sorted(x.suffix for x in folder.iterdir()) == [".sha256", ".so"]
    (folder / "tmpabc").mkdir()
    build._sweep(folder, 3600)  # no lock: it may be at work
    assert (folder / "tmpabc").exists()
    old = time.time() - 4000
    os.utime(folder / "tmpabc", (old, old))
    build._sweep(folder, 3600)
    assert not (folder / "tmpabc").exists()


# ---- a cache that is not the user's own

@needs_kernels
@needs_compiler
def test_a_folder_that_others_may_write_to_is_not_used(cache):
    folder = build.library_path().parent
    assert folder.stat().st_mode & 0o777 == 0o700
    assert build.library_path().stat().st_mode & 0o022 == 0
    for mode in (0o777, 0o770, 0o722):
        folder.chmod(mode)
        with pytest.raises(build.KernelError, match=f"mode {mode:o}"):
            build.build()
    done = use()
    assert done.stdout == "torch\n" and "nobody else may write" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    folder.chmod(0o700)
    build.library_path().chmod(0o777)  # the file alone: made anew
    build.build()
    assert calls(cache) == 2


def test_a_folder_of_somebody_else_is_not_used(tmp_path, monkeypatch):
    if not hasattr(os, "geteuid"):
        pytest.skip("no user ids here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", sys.executable)
    (tmp_path / "gptoss").mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(build.KernelError, match="found owner"):
        build.build()


def test_a_relative_cache_is_ignored(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("here", "./x", "", None):
        if value is None:
            monkeypatch.delenv("XDG_CACHE_HOME")
        else:
            monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert build.library_path().parent == tmp_path / ".cache" / "gptoss"


def test_building_needs_no_extension_builder():
    """Importing it prints where a CUDA wheel finds no GPU."""
    code = ("import sys; from pathlib import Path;"
            "from gptoss.kernels import build;"
            "build.compile_command(Path('x'));"
            "print('torch.utils.cpp_extension' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], text=True,
                          capture_output=True, timeout=280)
    assert done.stdout == "False\n", done.stderr


# ---- a thread's own switch

@needs_kernels
def test_plain_torch_is_this_threads_alone():
    import threading

    weight = encode(torch.randn(5, 64))
    x = torch.randn(3, 64).bfloat16()
    seen = {}

    def other():
        seen["on"] = OPS.kernels_on()
        with torch.no_grad():
            seen["y"] = OPS.mxfp4_linear(x, *weight, None)
    with torch.no_grad():
        fast = OPS.mxfp4_linear(x, *weight, None)
        with build.plain_torch():
            assert not OPS.kernels_on()
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
        assert OPS.kernels_on() and seen["on"]
        assert torch.equal(seen["y"], fast)
