"""Four bits at full speed

Generated from book/13_kernels.py; edit the chapter, not this file.
"""

import hashlib
import logging
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F

from gptoss import mxfp4
from gptoss.config import bytes_read_per_token
from gptoss.experts import packed_by_decoding
from gptoss.generate import Sampler, generate, peak_rss_bytes
from gptoss.model import GptOss, attention_in_tiles, rms_norm
from gptoss.mxfp4 import before_first_call, define_operator, linear_by_decoding
from gptoss.rope import apply_rope

# --- Built on first use ------------------------------------------------------

SOURCE = Path(mxfp4.__file__).with_name("kernels.cpp")
OPTIONS = ("-O3", "-march=native", "-std=c++20", "-ffp-contract=fast",
           "-fopenmp", "-fPIC", "-shared", "-w")


class KernelError(RuntimeError):
    """The kernels cannot be compiled or loaded here."""


def compile_command(target: Path, portable: bool = False) -> list[str]:
    """The compiler's command line that makes `target` from kernels.cpp.

    The compiler is $CXX or c++. portable: without vector instructions.
    """
    from torch.utils.cpp_extension import include_paths, library_paths

    return [*shlex.split(os.environ.get("CXX") or "c++"), *OPTIONS,
            *(["-DGPTOSS_PORTABLE"] if portable else []),
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
            *(f"-I{folder}" for folder in include_paths()), str(SOURCE),
            "-o", str(target), *(f"-L{path}" for path in library_paths()),
            "-ltorch_cpu", "-lc10"]


def library_path(portable: bool = False) -> Path:
    """Where the compiled kernels lie: $XDG_CACHE_HOME or ~/.cache."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    able = [line for line in lines if line.startswith(("flags", "Features"))]
    parts = (SOURCE.read_text("utf-8"), OPTIONS, portable, torch.__version__,
             platform.machine(), able[:1], os.environ.get("CXX"))
    name = hashlib.sha256(repr(parts).encode()).hexdigest()[:20]
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "gptoss" / f"kernels-{name}.so"


def build(portable: bool = False) -> Path:
    """The compiled kernels; compiles them if they are not there yet.

    KernelError, with the compiler's own first complaint, if that fails.
    """
    path = library_path(portable)
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            if sys.stderr.isatty():
                print("gptoss: compiling kernels (once, about half a minute)",
                      file=sys.stderr)
            done = subprocess.run(compile_command(made, portable),
                                  capture_output=True, text=True)
            if done.returncode:
                lines = [*done.stderr.splitlines(), "no message"]
                raise KernelError("the compiler failed: " + next(
                    (line for line in lines if "error" in line), lines[0]))
            os.replace(made, path)
    except OSError as error:
        raise KernelError(f"cannot compile: {error}") from error
    return path


# --- Which path is in use ----------------------------------------------------

PLAIN: dict[str, Callable] = {
    "mxfp4_linear": linear_by_decoding, "packed_experts": packed_by_decoding,
    "linear": F.linear, "rms_norm": rms_norm, "rope": apply_rope,
    "sink_attention": attention_in_tiles}
_DERIVED = ("mxfp4_linear", "packed_experts")  # have a gradient of their own


def _define_plain() -> None:
    """Declare gptoss::plain_NAME for every operator that has a kernel."""
    for name, function in PLAIN.items():
        schema = str(getattr(torch.ops.gptoss, name).default._schema)
        fake = torch.empty_like if name in _DERIVED else None
        define_operator(schema.replace("::", "::plain_"), function, fake)


_path = ""


def _load(choice: str) -> str:
    if choice == "torch":
        return "torch (GPTOSS_KERNELS=torch)"
    try:
        if choice not in ("auto", "portable"):
            raise KernelError("GPTOSS_KERNELS: expected auto, portable or "
                              f"torch, found {choice!r}")
        library = build(choice == "portable")
        _define_plain()
        torch.ops.load_library(str(library))
    except (KernelError, OSError) as error:
        logging.getLogger("gptoss").warning(
            "gptoss: no kernels, plain torch is used (many times slower; "
            "GPTOSS_KERNELS=torch silences this): %s", error)
        return f"torch ({error})"
    return torch.ops.gptoss.kernels_name()


def load_kernels() -> str:
    """Register the kernels, compiled if need be; which path is in use.

    $GPTOSS_KERNELS chooses: auto (default), portable (C++ without vector
    instructions) or torch. What fails is told in one line on the logger
    "gptoss", and plain torch goes on computing. Later calls do nothing.
    """
    global _path
    _path = _path or _load(os.environ.get("GPTOSS_KERNELS", "auto"))
    return _path


def kernel_path() -> str:
    """Which path the operators take on the CPU, in words; never compiles."""
    choice = os.environ.get("GPTOSS_KERNELS", "auto")
    waits = not _path and choice == "auto" and not library_path().exists()
    return "C++, to be compiled when first used" if waits else load_kernels()


@contextmanager
def plain_torch() -> Iterator[None]:
    """Inside, the operators compute with plain torch, kernels or not."""
    load_kernels()
    if not hasattr(torch.ops.gptoss, "enable_kernels"):
        yield
        return
    before = torch.ops.gptoss.enable_kernels(False)
    try:
        yield
    finally:
        torch.ops.gptoss.enable_kernels(before)


if __name__ != "__main__":  # imported; a notebook loads them when it wants
    before_first_call(load_kernels)


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


def spread(seconds: list[float]) -> dict[str, float]:
    """Rates of durations: the median's, and of the slow and fast tenth."""
    ordered = sorted(seconds)
    tenth = len(ordered) // 10
    return {"median": 1 / statistics.median(ordered),
            "low": 1 / ordered[-1 - tenth], "high": 1 / ordered[tenth]}


def _timed(model: GptOss, prompt: list[int], count: int) -> list[float]:
    """Seconds from the start to each of `count` greedy tokens."""
    start, times = time.perf_counter(), []
    for _ in generate(model, prompt, max_new_tokens=count,
                      sampler=Sampler(temperature=0.0)):
        times.append(time.perf_counter() - start)
    return times


def measure(path: str | Path, prompt_tokens: int = 512, new_tokens: int = 32,
            seed: int = 0) -> dict:
    """Load the model in `path` and generate; what it took, as a dict.

    The prompt is random tokens. A short run comes first, so that the file
    is in memory and the kernels are loaded: time_to_first_token is that of
    the timed run. Seconds, bytes, tokens a second; read_bandwidth_share is
    the bytes of a token over what memory could deliver in its time.
    """
    start = time.perf_counter()
    model = GptOss.from_pretrained(path)
    load_seconds = time.perf_counter() - start
    draw = torch.Generator().manual_seed(seed)
    prompt = torch.randint(model.config.vocab_size, (prompt_tokens,),
                           generator=draw).tolist()
    _timed(model, prompt[:8], 4)
    times = _timed(model, prompt, new_tokens + 1)
    steps = [b - a for a, b in zip(times, times[1:], strict=False)]
    size, decode = bytes_read_per_token(model.config), spread(steps)
    speed = read_speed()
    return {"kernels": kernel_path(), "threads": torch.get_num_threads(),
            "load_seconds": load_seconds,
            "peak_rss_bytes": peak_rss_bytes(),
            "time_to_first_token": times[0], "prompt_tokens": prompt_tokens,
            "prefill_tokens_per_second": prompt_tokens / times[0],
            "decode_tokens_per_second": decode, "bytes_per_token": size,
            "read_bytes_per_second": speed,
            "read_bandwidth_share": decode["median"] * size / speed}


__all__ = [
    "KernelError",
    "OPTIONS",
    "PLAIN",
    "SOURCE",
    "build",
    "compile_command",
    "kernel_path",
    "library_path",
    "load_kernels",
    "measure",
    "plain_torch",
    "read_speed",
    "spread",
]
