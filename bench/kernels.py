"""Measure the packed product step by step; keep it for the chapter.

    python bench/kernels.py [--words "2 cores of ..."]

Builds and runs bench/kernels_steps.cpp (for AVX2) with 1, 2, 4 ... threads,
then the plain operator and the kernel of kernels/packed on a matrix of the
same size, and writes "steps" and "machine" into
book/_static/kernels_bench.json, which kernels/measured shows. Takes about a
minute; whatever else the machine does meanwhile is measured as well.
"""

import argparse
import json
import os
import shlex
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from gptoss.kernels.build import plain_torch
from gptoss.kernels.roofline import read_speed
from gptoss.model.ops import mxfp4_linear

HERE = Path(__file__).parent
SAVED = HERE.parent / "book" / "_static" / "kernels_bench.json"
ROWS, BLOCKS = 8640 * 16, 90  # as in kernels_steps.cpp: 211 MB


def save(found: dict) -> None:
    """Merge `found` into the saved measurements, two levels deep."""
    saved = json.loads(SAVED.read_text()) if SAVED.exists() else {}
    for key, value in found.items():
        old = saved.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        saved[key] = old | value if both else value
    SAVED.write_text(json.dumps(saved, indent=1, sort_keys=True) + "\n")


def in_cpp(threads: int) -> list[dict]:
    """What kernels_steps.cpp prints."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "steps"
        subprocess.run([*shlex.split(os.environ.get("CXX") or "c++"), "-O3",
                        "-march=native", "-std=c++20", "-pthread",
                        str(HERE / "kernels_steps.cpp"), "-o", str(program)],
                       check=True)
        done = subprocess.run([program, str(threads)], check=True,
                              capture_output=True, text=True)
    return json.loads(done.stdout)


def timed(blocks, scales, x, repeats: int) -> float:
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        mxfp4_linear(x, blocks, scales)
        best = min(best, time.perf_counter() - start)
    return 17 * ROWS * BLOCKS / best / 1e9


@torch.inference_mode()
def in_torch(threads: int, plain: bool) -> dict:
    """The operator by plain torch or by the kernel."""
    blocks = torch.randint(256, (ROWS, BLOCKS, 16), dtype=torch.uint8)
    scales = torch.randint(115, 123, (ROWS, BLOCKS), dtype=torch.uint8)
    x = torch.randn(1, 32 * BLOCKS).bfloat16()
    torch.set_num_threads(threads)
    if plain:
        with plain_torch():
            speed = timed(blocks, scales, x, 1)
    else:
        speed = timed(blocks, scales, x, 5)
    name = "plain torch" if plain else "the chapter's kernel"
    return {"name": name, "threads": threads, "gb_per_s": round(speed, 2)}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--words", help="the machine, for the chapter")
    options = parser.parse_args(argv)
    most = torch.get_num_threads()
    counts = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= most]
    steps = [in_torch(count, True) for count in counts]
    steps += in_cpp(most)
    steps += [in_torch(count, False) for count in counts]
    machine = {"threads": most,
               "read_gb_per_s": round(read_speed() / 1e9, 1)}
    if options.words:
        machine["words"] = options.words
    save({"steps": steps, "machine": machine})
    print(json.dumps({"steps": steps, "machine": machine}, indent=1))


if __name__ == "__main__":
    main()
