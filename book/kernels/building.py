# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   gptoss:
#     module: build
#     public: [KernelError, kernel_path, load_kernels, plain_torch]
# ---
# %% [markdown]
# # How does C++ come under an operator?
#
# ## Question
#
# In the time in which a processor adds two numbers, it can add two rows of
# eight. Python cannot ask for that; ten lines of C++ can. How do these ten
# lines come under a model that was written without them, so that not a line of
# the model changes?

# %%
import ctypes
import logging
import os
import shlex
import subprocess
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from gptoss.model.norm import rms_norm

plt.style.use("../_static/book.mplstyle")

# %% [markdown]
# ## Picture
#
# A *register* is a place in the processor that holds what is being computed
# with; everything else has to be loaded into one first. A core has 16 or 32
# registers for *vectors*. With AVX2, the vector instructions of most x86
# processors since 2013, such a register has 32 bytes. What the bytes mean is
# up to the instruction; the place of one number in a register is a *lane*.

# %% tags=["hide-input"]
# Figure: left, two registers of eight numbers and a third with their products,
# one instruction for all eight. Right, the same 32 bytes three times: as 8
# numbers of fp32, 16 of 16 bits, 32 of 8 bits. Below, a tile: 2 registers of
# sums for each of 4 tokens, beside the 2 registers of weights they meet.
fig, (left, right) = plt.subplots(1, 2, figsize=(7.4, 2.9))


def register(ax, x, y, count, color, texts=None, height=0.8):
    """Boxes side by side, `count` in a register."""
    for n in range(count):
        size = 8 / count
        ax.add_patch(plt.Rectangle((x + n * size, y), size, height,
                                   ec="white", fc=color))
        if texts:
            ax.text(x + (n + 0.5) * size, y + 0.4, texts[n], ha="center",
                    va="center", fontsize=7)


a, b = [3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]
register(left, 0, 4, 8, "C4", a)
register(left, 0, 2.8, 8, "C1", b)
register(left, 0, 1, 8, "0.85", [x * y for x, y in zip(a, b, strict=True)])
left.text(4, 2.3, "× : one instruction", ha="center", va="center",
          fontsize=8)
left.set(xlim=(-0.2, 8.2), ylim=(-1, 5.4), title="eight numbers at a time")
for y, (count, words) in zip((4, 3, 2), (
        (8, "8 of fp32"), (16, "16 of 16 bits"), (32, "32 of 8 bits")),
        strict=True):
    register(right, 0, y, count, "C4")
    right.text(8.2, y + 0.4, words, va="center", fontsize=8)
register(right, 0, 0.9, 2, "C1")
right.text(8.2, 1.3, "2 registers of weights", va="center", fontsize=8)
for n in range(4):
    register(right, 0, 0.3 - 0.45 * n, 2, "0.85", height=0.4)
right.text(8.2, -0.2, "a tile: 2 registers of\nsums for each of 4 tokens",
           va="center", fontsize=8)
right.set(xlim=(-0.2, 13.5), ylim=(-1.5, 5.4), title="the same 32 bytes")
for ax in (left, right):
    ax.axis("off")
plt.show()

# %% [markdown]
# What to see: an instruction does the same to all numbers in its registers.
# Half as many bits a number are twice as many numbers an instruction, which is
# why [four-bit weights](packed.ipynb) are multiplied as bytes. A *tile* is a
# piece of a matrix product whose sums all stay in registers while weights pass
# by; [many rows](many_rows.ipynb) is about those.

# %% [markdown]
# ## The naive version
#
# Our first kernel is RMSNorm of one row: divide $x$ by the root of its mean
# square, multiply by a weight. In Python, number by number, it is five lines:

# %%
def norm_by_loop(x: list[float], weight: list[float], eps: float):
    squares = 0.0
    for value in x:
        squares += value * value
    scale = 1 / (squares / len(x) + eps) ** 0.5
    return [w * (value * scale) for w, value in zip(weight, x, strict=True)]


print([round(y, 2) for y in norm_by_loop([3.0, 4.0], [1.0, 10.0], 0.0)])

# %% [markdown]
# The same in C++. `Floats` is a *vector type* of the compilers GCC and Clang:
# it behaves like a `float`, but there are eight of them, and the compiler
# takes the vector instructions of the processor at hand. `extern "C"` lets
# Python find the function by its plain name. A pointer such as `const float*
# x` is the address of a tensor's first number.

# %%
SOURCE_TEXT = """
#include <cmath>
#include <cstring>
using Floats = float __attribute__((vector_size(32)));  // eight at a time
extern "C" void norm(const float* x, const float* weight, float* y, long n,
                     float eps) {
  Floats squares = {}, v;                // eight sums, side by side
  for (long i = 0; i < n; i += 8) {
    std::memcpy(&v, x + i, sizeof v);    // load eight numbers
    squares += v * v;
  }
  float total = 0;
  for (int i = 0; i < 8; ++i) total += squares[i];
  const float scale = 1 / std::sqrt(total / n + eps);
  for (long i = 0; i < n; ++i) y[i] = weight[i] * (x[i] * scale);
}
"""


def compiled(text: str):
    """The function `norm` of a C++ text; None without a compiler."""
    command = shlex.split(os.environ.get("CXX", "c++"))
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder) / "first.cpp", Path(folder) / "first.so"
        source.write_text(text)
        try:
            subprocess.run([*command, "-O3", "-march=native", "-shared",
                            "-fPIC", source, "-o", made], check=True,
                           capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return ctypes.CDLL(str(made)).norm  # stays loaded


def norm_of(function, x, weight, eps):
    """Call it with the addresses of one row's numbers."""
    if function is None:
        return rms_norm(x, weight, eps)
    y = torch.empty_like(x)
    function(*(ctypes.c_void_p(t.data_ptr()) for t in (x, weight, y)),
             ctypes.c_long(len(x)), ctypes.c_float(eps))
    return y


torch.manual_seed(0)
x, weight = torch.randn(2880), torch.randn(2880)
first = compiled(SOURCE_TEXT)
y, expected = norm_of(first, x, weight, 1e-5), rms_norm(x, weight, 1e-5)
print("C++:  ", [round(v, 3) for v in y[:4].tolist()])
print("torch:", [round(v, 3) for v in expected[:4].tolist()])
assert torch.allclose(y, expected, atol=1e-5)

# %% [markdown]
# One call of the compiler, and the library it made is loaded into this very
# process: that is all there is to a kernel. Two things break it for a model.
# It knows one row of fp32 whose length is a multiple of 8, and reads beyond
# the end of any other. And somebody has to call it: the model would have to
# know.
#
# ## Derivation
#
# **Who calls it: the dispatch key.** The model asks for an
# [operator](../model/operators.ipynb), by a name such as `gptoss::rms_norm`.
# torch keeps a table: for each name a row, for each kind of tensor a column.
# A column is called a *dispatch key*: `CPU`, `CUDA`, `Meta` (tensors that have
# a shape and no numbers), `Autograd` and more. With every call torch looks at
# the tensors, and calls the function that the table has for their key. The key
# `CompositeExplicitAutograd` stands for "any device that has none of its own":
# plain torch is registered there.
#
# So a kernel is put under an operator by one entry: name, key `CPU`, function.
# Here it is, with a toy operator and our ten lines:

# %%
library = torch.library.Library("first", "DEF")
library.define("norm(Tensor x, Tensor weight, float eps) -> Tensor")


def by_torch(x, weight, eps):
    print("  plain torch answers, for", x.device.type)
    return rms_norm(x, weight, eps)


def by_kernel(x, weight, eps):
    print("  C++ answers, for", x.device.type)
    return norm_of(first, x, weight, eps)


library.impl("norm", by_torch, "CompositeExplicitAutograd")
for said in ("before:", "after:"):
    print(said)
    for device in ("cpu", "meta"):
        torch.ops.first.norm(x.to(device), weight.to(device), 1e-5)
    if said == "before:":
        library.impl("norm", by_kernel, "CPU")

# %% [markdown]
# The caller's line is the same before and after. That is the whole trick, and
# a model can be written before anybody has thought of kernels. In what follows
# the entry is made in C++ (`TORCH_LIBRARY_IMPL`, in
# [the first three](first_three.ipynb)), so that no Python stands between torch
# and the kernel.
#
# ## Code
#
# What is left is to make this safe on a stranger's machine: a compiler called
# once, a file that nobody can slip in, and a switch. Without the care it would
# be two lines, `subprocess.run(compile_command(path))` and
# `torch.ops.load_library(path)`.
#
# ### What is the compiler told?
#
# The C++ of this part stands in its chapters as the Python does: fenced blocks
# become the files `gptoss/kernels/*.h`, the *parts* of one program, in the
# order of the list `PARTS`. An empty file is compiled with all of them
# included before it, so that what one part defines can be used in the next.
# The first few of `PARTS` make a library too, so each chapter can compile the
# parts up to its own and try its own kernel. A process loads one library.
#
# `-march=native` lets the compiler use every instruction of the processor at
# hand. A *variant* does with less: `avx2` leaves out AVX-512 and VNNI,
# `portable` every instruction that the source names.

# %% tags=["export"]
import logging
import os
import shlex
from pathlib import Path

import torch

import gptoss
from gptoss.weights.disk import to_disk
from gptoss.weights.errors import Error

_log = logging.getLogger("gptoss")
SOURCE = Path(gptoss.__file__).parent / "kernels"  # where the parts are
PARTS = ("pool", "base", "small", "digits", "wide", "packed", "strips",
         "tiles", "pairs", "slabs", "panels", "interleaved", "amx",
         "columns", "twelve", "wide16", "squares", "experts", "dense",
         "running", "attention", "compact", "integers", "eight", "coarse",
         "recording")
OPTIONS = ("-O3", "-march=native", "-std=c++20", "-ffp-contract=fast",
           "-DNDEBUG",  # as torch is compiled, or its structs differ
           "-fopenmp", "-fPIC", "-shared", "-w")


VARIANTS = {"auto": (), "avx2": ("-DGPTOSS_NARROW",),
            "portable": ("-DGPTOSS_PORTABLE",)}


class KernelError(Error, RuntimeError):
    """The kernels cannot be compiled or loaded here."""


def _compiler() -> list[str]:
    try:
        return shlex.split(os.environ.get("CXX", "")) or ["c++"]
    except ValueError as error:
        raise KernelError(f"$CXX: {error}") from error


def compile_command(target: Path, variant: str = "auto",
                    parts: tuple[str, ...] = PARTS) -> list[str]:
    """The compiler's command line that makes `target` from the parts.

    The compiler is $CXX or c++. variant: one of VARIANTS; "avx2" leaves out
    AVX-512 and VNNI, "portable" every instruction named in the source.
    parts: PARTS or the first few of them.
    """
    home = Path(torch.__file__).parent
    included = [word for part in parts
                for word in ("-include", str(SOURCE / f"{part}.h"))]
    return [*_compiler(), *OPTIONS,
            *VARIANTS[variant],
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
            f"-I{home / 'include'}",
            f"-I{home / 'include' / 'torch' / 'csrc' / 'api' / 'include'}",
            *included, "-x", "c++", os.devnull,
            "-o", str(target), f"-L{home / 'lib'}",
            "-ltorch_cpu", "-lc10"]

# %%
words = compile_command(Path("made.so"), "avx2", PARTS[:2])
print([Path(word).name for word in words if word.endswith((".h", ".so"))
       or word.startswith("-DGPTOSS")])

# %% [markdown]
# ### Which file is it, and is it whole?
#
# The library's name carries a *hash*, a number computed from all that it
# depends on: the parts' texts and order, the options and the variant, torch's
# version, the processor's abilities, `$CXX`. Change one of them and another
# name is looked for, and compiled if it is not there. The file lies in
# `$XDG_CACHE_HOME/gptoss` or `~/.cache/gptoss`. (A relative `$XDG_CACHE_HOME`
# would be another folder in every directory; it is ignored.)
#
# What is loaded runs with all rights of the user, and its name can be guessed.
# So `_own` asks whether folder and file are the user's, for nobody else to
# write. And a full disk or a power cut may have cut the file short, which
# would crash every later process: so its SHA-256 is kept beside it, and
# `_sound` compares.

# %% tags=["export"]
import hashlib
import platform
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

try:
    import fcntl
except ImportError:  # Windows: two processes may both compile
    fcntl = None  # type: ignore[assignment]  # asked for before each use


def library_path(variant: str = "auto",
                 parts: tuple[str, ...] = PARTS) -> Path:
    """Where the compiled parts lie: $XDG_CACHE_HOME or ~/.cache."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    able = [line for line in lines if line.startswith(("flags", "Features"))]
    texts = [(part, (SOURCE / f"{part}.h").read_text("utf-8"))
             for part in parts]
    known = (texts, OPTIONS, VARIANTS[variant], torch.__version__,
             platform.machine(), able[:1], os.environ.get("CXX"))
    name = hashlib.sha256(repr(known).encode()).hexdigest()[:20]
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    cache = cache if cache.is_absolute() else Path.home() / ".cache"
    return cache / "gptoss" / f"kernels-{name}.so"


def _own(path: Path) -> bool:
    """Is it the user's, and may nobody else write to it?"""
    if not hasattr(os, "geteuid"):  # Windows
        return True
    found = path.stat()
    return found.st_uid == os.geteuid() and not found.st_mode & 0o022


def _seal(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _sound(path: Path) -> bool:
    """Is the library there, the user's own, and as the compiler left it?"""
    try:
        return (_own(path.parent) and _own(path)
                and path.with_suffix(".sha256").read_text() == _seal(path))
    except (OSError, ValueError):
        return False

# %% [markdown]
# ### Who compiles, if several come at once?
#
# Eight processes that start together must not call eight compilers. A *lock*
# on the folder lets one in and has the others wait; the system drops it when
# its process dies, so a killed compiler holds nobody up. (The builder that
# comes with torch, `cpp_extension`, needs `ninja`, and its lock is a file that
# outlives its process.) Where there are no locks, as on Windows or some
# network drives, several may compile, each in a folder of its own; the last
# one wins, with the same file. If a compiler fails, `_complaint` finds the one
# line of its output that says why.

# %% tags=["export"]
@contextmanager
def _alone_in(folder: Path) -> Iterator[bool]:
    """One process at a time; others wait. A dead process holds nothing.

    Gives whether it is so: not on a network drive that knows no locks."""
    held, locked = os.open(folder, os.O_RDONLY), False
    try:
        with suppress(OSError):
            if fcntl:
                fcntl.flock(held, fcntl.LOCK_EX)
                locked = True
        yield locked
    finally:
        os.close(held)


def _complaint(told: str) -> str:
    """The line in which a compiler says what went wrong, made printable."""
    lines = told.splitlines() or ["no message"]
    bad = [line for line in lines if re.search(
        "error|no space|failed|cannot|not found", line, re.IGNORECASE)]
    causes = [line for line in bad if "ld returned" not in line]
    line = (causes or bad or lines)[0]
    return "".join(c if c.isprintable() else c.encode("unicode_escape")
                   .decode() for c in line)

# %% [markdown]
# The compiler writes into a temporary folder. Library and seal get their names
# by `os.replace`, in one step each and the library last, after both are on
# the disk: whoever finds the name finds all of the file.

# %% tags=["export"]
def _compile(path: Path, variant: str, parts: tuple[str, ...]) -> None:
    _log.warning("gptoss: compiling the kernels, once; it takes about half "
                 "a minute")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made, seal = Path(folder) / path.name, Path(folder) / "seal"
        done = subprocess.run(compile_command(made, variant, parts),
                              text=True, errors="backslashreplace",
                              capture_output=True)
        if done.returncode:
            raise KernelError("the compiler failed: "
                              + _complaint(done.stderr))
        if not made.is_file():
            raise KernelError(f"{shlex.join(_compiler())} made no library")
        made.chmod(0o700)
        seal.write_text(_seal(made))
        for file in (seal, made):
            to_disk(file)
        os.replace(seal, path.with_suffix(".sha256"))
        os.replace(made, path)
    with suppress(OSError):  # some file systems do not sync a folder
        to_disk(path.parent)


def _sweep(folder: Path, age: float) -> None:
    """Remove what killed compilers left, if older than `age` seconds."""
    for left in folder.glob("tmp*"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > age:
                shutil.rmtree(left, ignore_errors=True)

# %% [markdown]
# `build` puts it together: look, lock, look again (another process may have
# been first), compile.

# %% tags=["export"]
def build(variant: str = "auto", anew: bool = False,
          parts: tuple[str, ...] = PARTS) -> Path:
    """The compiled kernels; compiles them if they are not there yet.

    anew: even if they are. parts: PARTS or the first few of them, for a
    process that needs no more. Compiling is told in one line on the logger
    "gptoss". KernelError, with the compiler's own complaint, if it fails, or
    if the folder is not the user's own.
    """
    path = library_path(variant, parts)
    if not anew and _sound(path):
        return path
    if shutil.which(_compiler()[0]) is None:
        raise KernelError(f"no compiler {_compiler()[0]!r} ($CXX names one)")
    folder = path.parent
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _own(folder):
            raise KernelError(f"{folder}: expected a folder of yours to which "
                              "nobody else may write, found owner "
                              f"{folder.stat().st_uid}, mode "
                              f"{folder.stat().st_mode & 0o777:o}")
        with _alone_in(folder) as locked:
            _sweep(folder, 0 if locked else 3600)
            if anew or not _sound(path):  # else another process was first
                _compile(path, variant, parts)
    except OSError as error:
        raise KernelError(f"cannot compile: {error}") from error
    return path

# %% [markdown]
# ### Which path is in use?
#
# Loading the library registers the kernels. When? The table of what answers,
# in `model/answers`, names `load_kernels`; so whoever first makes a model or
# computes loads them, and every thread that comes meanwhile waits.
# `GPTOSS_KERNELS` in the environment chooses: `auto` (which is also the
# default), another variant, or `torch` for plain torch. The earlier chapters
# of the book are run with `torch`, so that they show what they say.
# `kernel_path` tells in words which path is taken, and never compiles: before
# the first use it may say "C++, to be compiled when first used".
#
# A page about a kernel shows the one that it has just derived: `load_upto`
# compiles the parts up to the one that makes an operator of it, and no more.
# (If the whole library is compiled already, that is loaded: a page then has
# later kernels, too, and does not use them.)

# %% tags=["export"]
from gptoss.model.answers import LOADING
from gptoss.model.ops import has_kernel

_path = ""  # in words, once the kernels are loaded; changed behind LOADING


def _load_library(choice: str, parts: tuple[str, ...] = PARTS) -> None:
    """Load the compiled kernels; what does not load is compiled anew."""
    for anew in (False, True):
        path = build(choice, anew, parts)
        try:
            torch.ops.load_library(str(path))
            torch.ops.gptoss.kernels_name()  # else it is another library
            return
        except (OSError, AttributeError, RuntimeError) as error:
            failed = error.__cause__ or error
    raise KernelError(f"{path}: {failed}")


def _load(choice: str) -> str:
    if choice == "torch":
        return "torch (GPTOSS_KERNELS=torch)"
    try:
        if choice not in VARIANTS:
            raise KernelError(f"GPTOSS_KERNELS: expected {', '.join(VARIANTS)}"
                              f" or torch, found {choice!r}")
        _load_library(choice)
    except (RuntimeError, OSError) as error:
        _log.warning(
            "gptoss: no kernels, plain torch is used (many times slower; "
            "GPTOSS_KERNELS=torch silences this): %s", error)
        return f"torch ({error})"
    return torch.ops.gptoss.kernels_name()

# %% tags=["export"]
def load_kernels() -> str:
    """Register the kernels, compiled if need be; which path is in use.

    $GPTOSS_KERNELS chooses: auto (default) or another of VARIANTS, or torch.
    What fails is told in one line on the logger "gptoss", and plain torch
    goes on computing. Later calls do nothing, one meanwhile waits.
    """
    global _path
    with LOADING:
        _path = _path or _load(os.environ.get("GPTOSS_KERNELS", "auto"))
    return _path


def kernel_path() -> str:
    """Which path the operators take on the CPU, in words; never compiles."""
    choice = os.environ.get("GPTOSS_KERNELS", "auto")
    if not _path and choice in VARIANTS:
        path = library_path(choice)
        if (not _sound(path) and shutil.which(_compiler()[0])
                and (not path.parent.exists() or _own(path.parent))):
            return "C++, to be compiled when first used"
    return load_kernels()


def load_upto(part: str) -> bool:
    """Load the kernels that a page shows: the whole library if it is compiled
    already, else the parts up to this one alone; did it work? In silence, and
    for good: a process has one library.

    KernelError if that is no part, or one that makes no operator, since a
    page would then test plain torch."""
    makers = [name for name in PARTS if "TORCH_LIBRARY_IMPL" in
              (SOURCE / f"{name}.h").read_text("utf-8")]
    if part not in makers:
        raise KernelError(f"part: expected one of {', '.join(makers)}, found "
                          f"{part!r}")
    os.environ["GPTOSS_KERNELS"] = "torch"  # which loads no other
    _log.setLevel(logging.ERROR)
    whole = _sound(library_path("auto"))
    try:
        _load_library("auto", PARTS if whole else
                      PARTS[:PARTS.index(part) + 1])
    except KernelError:
        return False
    return True


@contextmanager
def plain_torch() -> Iterator[None]:
    """Inside, this thread computes with plain torch, kernels or not."""
    load_kernels()
    if not has_kernel():
        yield
        return
    before = torch.ops.gptoss.enable_kernels(False)
    try:
        yield
    finally:
        torch.ops.gptoss.enable_kernels(before)

# %% [markdown]
# ## What is refused
#
# Nothing here stops a model: `load_kernels` turns each failure into one line
# on the logger "gptoss", "no kernels, plain torch is used", and plain torch
# computes. `build` alone raises, a `KernelError` that says what to do:
#
# | what is wrong | words |
# |---|---|
# | no such compiler | `no compiler 'x' ($CXX names one)` |
# | the compiler fails | `the compiler failed:` and its complaint |
# | it makes no file | `… made no library` |
# | a folder of somebody else's | `expected a folder of yours …` |
# | a cache that cannot be written | `cannot compile: …` |
#
# A failed build leaves nothing behind. A library that is whole but cannot be
# loaded is compiled anew, once.

# %%
def told(**changes: str) -> str:
    """What `build` says under these environment variables."""
    with tempfile.TemporaryDirectory() as folder:
        before = dict(os.environ)
        os.environ.update({"XDG_CACHE_HOME": folder, **changes})
        try:
            return f"made {build(parts=PARTS[:1]).suffix}"
        except KernelError as error:
            return str(error).replace(folder, "…")
        finally:
            os.environ.clear()
            os.environ.update(before)


_log.setLevel(logging.ERROR)  # built without a word
print(told(CXX="no-such-compiler"))
print(told(CXX="false"))
print(told(CXX="true"))

# %% [markdown]
# ## It holds
#
# This process declines the kernels by `GPTOSS_KERNELS`, and then loads a
# smaller library by itself: the first two parts, with the operators of the
# [next chapter](first_three.ipynb). A second `build` finds it and compiles
# nothing. The switch is a thread's own.

# %%
import gptoss.model.ops  # noqa: F401  declares the operators

os.environ["GPTOSS_KERNELS"] = "torch"
print(load_kernels(), "|", kernel_path())
try:
    made = build(parts=PARTS[:2])
    stamp = made.stat().st_mtime_ns
    print("made:", made.suffix, "| again:", build(
        parts=PARTS[:2]).stat().st_mtime_ns - stamp, "ns younger")
    torch.ops.load_library(str(made))
    states = [torch.ops.gptoss.kernels_on()]
    torch.ops.gptoss.enable_kernels(False)
    states.append(torch.ops.gptoss.kernels_on())
    torch.ops.gptoss.enable_kernels(True)
except KernelError:
    print("made: .so | again: 0 ns younger")
    states = [True, False]
print("kernels on:", states)
assert states == [True, False]

# %% [markdown]
# **The sentence again.** Our first kernel knows one row of fp32, and that is
# what [the page](../one_page.ipynb) has. So we give it row after row in the
# place of the page's norm, and the story is the same.

# %%
from gptoss.one_page import SENTENCE, sentence

retold = sentence(12, rms_norm=lambda x, scale, eps: torch.stack(
    [norm_of(first, row, scale, eps) for row in x]))
assert retold == sentence(12)
print(retold.removeprefix(SENTENCE).strip())

# %% [markdown]
# ## Takeaways
#
# - A register holds 8 numbers of fp32 or 32 bytes, and an instruction does the
#   same to all of them.
# - A kernel is put under an operator by one entry in torch's table: name,
#   dispatch key, function. The model asks by name and does not know.
# - A compiled file is named by a hash of all that it depends on, and loaded
#   only from a folder that is the user's own, if it is whole.
# - Whatever fails, plain torch computes, and one line in the log says why.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1
#
# Our first kernel reads eight numbers at a time. What does it do with a row of
# 10? Mend it: take eight at a time as long as there are eight, then the rest
# one by one.

# %% tags=["hide-cell"]
mended = compiled(SOURCE_TEXT.replace("i < n; i += 8", "i + 8 <= n; i += 8")
                  .replace("float total = 0;",
                           "float total = 0;\n  for (long i = n / 8 * 8; "
                           "i < n; ++i) total += x[i] * x[i];"))
row = torch.arange(1.0, 11.0)
for n in (10, 7, 8):
    y = norm_of(mended, row[:n], torch.ones(n), 0.0)
    expected = rms_norm(row[:n], torch.ones(n), 0.0)
    print(f"{n:2} numbers: last {y[-1].item():.4f}, torch "
          f"{expected[-1].item():.4f}")
    assert torch.allclose(y, expected)
print("unmended, 10 numbers count 6 of whatever lies behind them")

# %% [markdown]
# ### Exercise 2
#
# A power cut shortens the library by a byte. What does `_sound` make of it?
# And of a file whose folder others may write to? Try it on a file of zeros
# with its seal.

# %% tags=["hide-cell"]
with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "kernels-x.so"
    file.write_bytes(bytes(1000))
    file.chmod(0o700)
    file.with_suffix(".sha256").write_text(_seal(file))
    whole = _sound(file)
    file.write_bytes(bytes(999))
    cut = _sound(file)
    file.write_bytes(bytes(1000))
    Path(folder).chmod(0o777)
    print(f"whole: {whole}, cut: {cut}, in a folder for all: {_sound(file)}; "
          "what is not sound, build compiles anew")
    assert whole and not cut and not _sound(file)

# %% [markdown]
# ### Exercise 3
#
# Which of these gives the library another name: another variant, one part
# fewer, another compiler in `$CXX`, another folder for the cache?

# %% tags=["hide-cell"]
def name_with(variant="auto", parts=PARTS, **changes):
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        return library_path(variant, parts).name
    finally:
        os.environ.clear()
        os.environ.update(before)


usual = name_with()
for what, name in (("a variant", name_with("portable")),
                   ("a part fewer", name_with(parts=PARTS[:-1])),
                   ("a compiler", name_with(CXX="other-c++")),
                   ("a folder", name_with(XDG_CACHE_HOME="/elsewhere"))):
    print(f"{what}: {'the same name' if name == usual else 'another name'}")
assert name_with(parts=PARTS[:-1]) != usual

# %% [markdown]
# ## Sources
#
# - pytorch/pytorch, `aten/src/ATen/core/dispatch/` and `torch/library.h`: how
#   a kernel is put under an operator.
# - Where a user's cache lies: https://specifications.freedesktop.org/basedir
# - GCC's vector types:
#   https://gcc.gnu.org/onlinedocs/gcc/Vector-Extensions.html
