"""Four bits at full speed

Generated from book/13_kernels.py; edit the chapter, not this file.
"""

import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import RLock

import torch
import torch.nn.functional as F

from gptoss import mxfp4
from gptoss.compact import compact_layers, linear_beside_compact, saved_bytes
from gptoss.config import bytes_read_per_token
from gptoss.decode_step import kernels_loaded, quick_step
from gptoss.errors import Error
from gptoss.experts import packed_by_decoding
from gptoss.generate import Sampler, generate, peak_rss_bytes, use_decoder
from gptoss.model import GptOss, attention_in_tiles, rms_norm
from gptoss.mxfp4 import define_operator, linear_by_decoding
from gptoss.rope import apply_rope
from gptoss.routing import route

# --- Built on first use ------------------------------------------------------

_log = logging.getLogger("gptoss")
SOURCE = Path(mxfp4.__file__).with_name("kernels.cpp")
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


def compile_command(target: Path, variant: str = "auto") -> list[str]:
    """The compiler's command line that makes `target` from kernels.cpp.

    The compiler is $CXX or c++. variant: one of VARIANTS; "avx2" leaves out
    AVX-512 and VNNI, "portable" every instruction named in the source.
    """
    home = Path(torch.__file__).parent
    return [*_compiler(), *OPTIONS,
            *VARIANTS[variant],
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
            f"-I{home / 'include'}",
            f"-I{home / 'include' / 'torch' / 'csrc' / 'api' / 'include'}",
            str(SOURCE), "-o", str(target), f"-L{home / 'lib'}",
            "-ltorch_cpu", "-lc10"]


try:
    import fcntl
except ImportError:  # Windows: two processes may both compile
    fcntl = None


def library_path(variant: str = "auto") -> Path:
    """Where the compiled kernels lie: $XDG_CACHE_HOME or ~/.cache."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    able = [line for line in lines if line.startswith(("flags", "Features"))]
    parts = (SOURCE.read_text("utf-8"), OPTIONS, VARIANTS[variant],
             torch.__version__, platform.machine(), able[:1],
             os.environ.get("CXX"))
    name = hashlib.sha256(repr(parts).encode()).hexdigest()[:20]
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


def _compile(path: Path, variant: str) -> None:
    _log.warning("gptoss: compiling the kernels, once; it takes about half "
                 "a minute")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made, seal = Path(folder) / path.name, Path(folder) / "seal"
        done = subprocess.run(compile_command(made, variant), text=True,
                              errors="backslashreplace", capture_output=True)
        if done.returncode:
            raise KernelError("the compiler failed: "
                              + _complaint(done.stderr))
        if not made.is_file():
            raise KernelError(f"{shlex.join(_compiler())} made no library")
        made.chmod(0o700)
        seal.write_text(_seal(made))
        for file in (seal, made):
            _to_disk(file)
        os.replace(seal, path.with_suffix(".sha256"))
        os.replace(made, path)
    with suppress(OSError):  # some file systems do not sync a folder
        _to_disk(path.parent)


def _to_disk(path: Path) -> None:
    """Have the system write what it holds of a file or folder."""
    held = os.open(path, os.O_RDONLY)
    try:
        os.fsync(held)
    finally:
        os.close(held)


def _sweep(folder: Path, age: float) -> None:
    """Remove what killed compilers left, if older than `age` seconds."""
    for left in folder.glob("tmp*"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > age:
                shutil.rmtree(left, ignore_errors=True)


def build(variant: str = "auto", anew: bool = False) -> Path:
    """The compiled kernels; compiles them if they are not there yet.

    anew: even if they are. Compiling is told in one line on the logger
    "gptoss". KernelError, with the compiler's own complaint, if it fails, or
    if the folder is not the user's own.
    """
    path = library_path(variant)
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
                _compile(path, variant)
    except OSError as error:
        raise KernelError(f"cannot compile: {error}") from error
    return path


# --- Which path is in use ----------------------------------------------------

PLAIN: dict[str, Callable] = {
    "mxfp4_linear": linear_by_decoding, "packed_experts": packed_by_decoding,
    "linear": F.linear, "compact_linear": linear_beside_compact,
    "rms_norm": rms_norm, "rope": apply_rope, "route": route,
    "sink_attention": attention_in_tiles}


def _define_plain() -> None:
    """Declare gptoss::plain_NAME for every operator that has a kernel."""
    for name, function in PLAIN.items():
        schema = str(getattr(torch.ops.gptoss, name).default._schema)
        define_operator(schema.replace("::", "::plain_"), function)


_path, _loading = "", RLock()


def _load_library(choice: str) -> None:
    """Load the compiled kernels; what does not load is compiled anew."""
    for anew in (False, True):
        path = build(choice, anew)
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
        _define_plain()
        use_decoder(quick_step)  # which looks whether there are kernels
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
    with _loading:
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


@contextmanager
def plain_torch() -> Iterator[None]:
    """Inside, this thread computes with plain torch, kernels or not."""
    load_kernels()
    if not kernels_loaded():
        yield
        return
    before = torch.ops.gptoss.enable_kernels(False)
    try:
        yield
    finally:
        torch.ops.gptoss.enable_kernels(before)


def make_compact(model: GptOss) -> GptOss:
    """The model, its dense matrices also in twelve bits; same numbers.

    Decoding then reads a quarter less of them (`CompactLinear`); the copies
    take three quarters of the matrices' memory, and some seconds to make.
    Without kernels that read them the model stays as it is, and one line on
    the logger "gptoss" says so.
    """
    path = load_kernels()
    if kernels_loaded("pack_compact"):
        compact_layers(model)
    else:
        _log.warning("gptoss: matrices stay in sixteen bits: no kernel for "
                     "twelve here (%s)", path)
    return model


# --- Measuring ---------------------------------------------------------------

def read_speed(size: int = 2 ** 30, repeats: int = 5) -> float:
    """Bytes a second that all threads together read from memory, best of."""
    numbers = torch.ones(size // 4)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        numbers.sum()
        best = min(best, time.perf_counter() - start)
    return size / best


def rates(name: str, seconds: list[float], count: int = 1) -> dict:
    """Rates of `count` things in so many seconds: the median as `name`, and
    those of the slow and the fast tenth as low and high in `name`_spread."""
    ordered = sorted(seconds)
    tenth = len(ordered) // 10
    return {name: count / statistics.median(ordered),
            f"{name}_spread": {"low": count / ordered[-1 - tenth],
                               "high": count / ordered[tenth]}}


def _timed(model: GptOss, prompt: list[int], count: int) -> list[float]:
    """Seconds from the start to each of `count` greedy tokens."""
    start, times = time.perf_counter(), []
    for _ in generate(model, prompt, max_new_tokens=count,
                      sampler=Sampler(temperature=0.0)):
        times.append(time.perf_counter() - start)
    return times


def summarise(runs: list[list[float]], prompt_tokens: int, size: int,
              speed: float) -> dict:
    """What runs say, each the seconds from its start to each of its tokens.

    size: the bytes of weights that a token reads; speed: bytes a second
    that memory delivers. The first token ends the reading of the prompt.
    """
    first = [times[0] for times in runs]
    steps = [after - before for times in runs
             for before, after in zip(times, times[1:], strict=False)]
    decode = rates("decode_tokens_per_second", steps)
    share = decode["decode_tokens_per_second"] * size / speed
    return ({"time_to_first_token": statistics.median(first)}
            | rates("prefill_tokens_per_second", first, prompt_tokens)
            | decode | {"bytes_per_token": size,
                        "read_bytes_per_second": speed,
                        "read_bandwidth_share": share})


def measure(path: str | Path, prompt_tokens: int = 512, new_tokens: int = 32,
            repeats: int = 3, seed: int = 0,
            load: Callable[..., GptOss] = GptOss.from_pretrained) -> dict:
    """Load the model in `path` and generate; what it took, as a dict.

    The prompt is random tokens. A short run comes first, so that the file
    is in memory and the kernels are loaded; then `repeats` timed ones.
    Seconds, bytes, tokens a second (medians); read_bandwidth_share is the
    bytes of a token over what memory could deliver in its time. KernelError
    if the tokens do not fit into the model's context.
    """
    start = time.perf_counter()
    model = load(path)
    load_seconds = time.perf_counter() - start
    room = model.config.max_position_embeddings
    if prompt_tokens + new_tokens > room:
        raise KernelError(f"prompt_tokens + new_tokens: expected at most "
                          f"{room} (the model's context), found "
                          f"{prompt_tokens} + {new_tokens}")
    draw = torch.Generator().manual_seed(seed)
    prompt = torch.randint(model.config.vocab_size, (prompt_tokens,),
                           generator=draw).tolist()
    _timed(model, prompt[:8], 4)
    runs = [_timed(model, prompt, new_tokens + 1) for _ in range(repeats)]
    peak = peak_rss_bytes()  # now: measuring memory takes a gigabyte
    return {"kernels": kernel_path(), "threads": torch.get_num_threads(),
            "load_seconds": load_seconds, "peak_rss_bytes": peak,
            "prompt_tokens": prompt_tokens, "new_tokens": new_tokens,
            "repeats": repeats} | summarise(
                runs, prompt_tokens,
                bytes_read_per_token(model.config) - saved_bytes(model),
                read_speed())


__all__ = [
    "KernelError",
    "OPTIONS",
    "PLAIN",
    "SOURCE",
    "VARIANTS",
    "build",
    "compile_command",
    "kernel_path",
    "library_path",
    "load_kernels",
    "make_compact",
    "measure",
    "plain_torch",
    "rates",
    "read_speed",
    "summarise",
]
