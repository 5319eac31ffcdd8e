"""How does C++ come under an operator?

Generated from book/kernels/building.py; edit the chapter, not this file.
"""

import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

import gptoss
from gptoss.model.answers import LOADING
from gptoss.model.ops import has_kernel
from gptoss.weights.disk import to_disk
from gptoss.weights.errors import Error

# --- What is the compiler told? ----------------------------------------------

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


# --- Which file is it, and is it whole? --------------------------------------

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


# --- Who compiles, if several come at once? ----------------------------------

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


# --- Which path is in use? ---------------------------------------------------

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


__all__ = [
    "KernelError",
    "OPTIONS",
    "PARTS",
    "SOURCE",
    "VARIANTS",
    "build",
    "compile_command",
    "kernel_path",
    "library_path",
    "load_kernels",
    "load_upto",
    "plain_torch",
]
