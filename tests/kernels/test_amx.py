"""Products by squares: on a processor that has AMX as it is, on one with
64-byte bf16 instructions in software (amx_in_software.h) and without, and the
kernels of any other by the same rules."""

import os
import subprocess
import sys
from pathlib import Path

import amx_cases
import pytest
import torch
from test_kernels import COMPILED, needs_compiler

from gptoss.kernels import build

HERE = Path(__file__).parent
INFO = Path("/proc/cpuinfo")
FLAGS = INFO.read_text().split() if INFO.exists() else []


@pytest.mark.skipif(not COMPILED, reason="no kernels")
@pytest.mark.parametrize("case", amx_cases.CASES)
@torch.inference_mode()
def test_the_kernels_in_use(case):
    torch.manual_seed(0)
    case()


@needs_compiler
@pytest.mark.skipif(not {"avx512_bf16", "avx512_vnni"} <= set(FLAGS),
                    reason="no 64-byte bf16 instructions here")
@pytest.mark.parametrize("more", [
    ["-include", str(HERE / "amx_in_software.h")], []],
    ids=["in software", "without"])
def test_another_processor(more, tmp_path):
    """AMX where there is none, and none where there is AMX."""
    parts = build.PARTS[:build.PARTS.index("dense") + 1]
    library = tmp_path / "amx.so"
    command = build.compile_command(library, parts=parts)
    at = command.index("-include")
    command[at:at] = ["-O1", "-mno-amx-bf16", "-mno-amx-int8",
                      "-mno-amx-tile", *more]
    subprocess.run(command, check=True, capture_output=True, timeout=280)
    done = subprocess.run(
        [sys.executable, str(HERE / "amx_cases.py"), str(library)],
        text=True, capture_output=True, timeout=280,
        env=os.environ | {"GPTOSS_KERNELS": "torch"})
    assert done.stdout == "well\n", done.stderr[-3000:]
