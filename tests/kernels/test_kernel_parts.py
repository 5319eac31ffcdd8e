"""The C++ in parts: short, listed, each with a kernel beside its twin, and
the first few of them a library too (kernel_parts.py)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_parts import TWINS
from test_kernels import COMPILED, needs_compiler

from gptoss.kernels import build

SCRIPT = Path(__file__).with_name("kernel_parts.py")


def test_every_part_is_listed_and_short():
    files = {file.stem: file for file in build.SOURCE.glob("*.h")}
    assert set(files) == set(build.PARTS)
    assert not list(build.SOURCE.glob("*.cpp"))
    for file in files.values():
        assert len(file.read_text("utf-8").splitlines()) < 300, file.name


def test_only_operators_of_a_part_have_no_twin():
    """A part that registers an operator has a twin, `base` apart."""
    registers = {part for part in build.PARTS if "TORCH_LIBRARY" in
                 (build.SOURCE / f"{part}.h").read_text("utf-8")}
    assert registers - {"base"} == set(TWINS)


@pytest.mark.skipif(not COMPILED, reason="no kernels")
@pytest.mark.parametrize("part", TWINS)
@torch.inference_mode()
def test_a_part_and_its_twin(part):
    torch.manual_seed(0)
    TWINS[part]()


def test_a_library_is_named_by_its_parts(monkeypatch, tmp_path):
    some = [build.PARTS[:n] for n in range(1, len(build.PARTS) + 1)]
    names = {build.library_path(parts=parts) for parts in some}
    assert len(names) == len(some)
    assert build.library_path() == build.library_path(parts=some[-1])
    command = build.compile_command(Path("x"), parts=some[2])
    included = [Path(command[n + 1]).stem for n, word in enumerate(command)
                if word == "-include"]
    assert tuple(included) == some[2]
    for part in build.PARTS:
        (tmp_path / f"{part}.h").write_text((build.SOURCE / f"{part}.h")
                                            .read_text("utf-8"), "utf-8")
    before = build.library_path(parts=some[2])
    monkeypatch.setattr(build, "SOURCE", tmp_path)
    assert build.library_path(parts=some[2]) == before
    with open(tmp_path / f"{some[2][-1]}.h", "a") as file:
        file.write("// changed\n")
    assert build.library_path(parts=some[2]) != before
    assert build.library_path(parts=some[1]) in names


@pytest.mark.skipif(not COMPILED, reason="no kernels")
@torch.inference_mode()
@pytest.mark.parametrize("wrong", ["type", "columns", "blocks", "strides"])
def test_what_packed_rows_cannot_read_is_refused(wrong):
    x = torch.ones(2, 64).bfloat16()
    blocks = torch.zeros(5, 2, 16, dtype=torch.uint8)
    scales = torch.zeros(5, 2, dtype=torch.uint8)
    given = {"type": (x.float(), blocks, scales),
             "columns": (x[:, :32], blocks, scales),
             "blocks": (x, blocks[:4], scales),
             "strides": (x, blocks.transpose(0, 1).contiguous()
                         .transpose(0, 1), scales)}[wrong]
    with pytest.raises(RuntimeError, match="packed_rows: expected"):
        torch.ops.gptoss.packed_rows(*given)


@pytest.mark.skipif(not os.environ.get("GPTOSS_SLOW"),
                    reason="GPTOSS_SLOW is not set")
@needs_compiler
@pytest.mark.parametrize("part", build.PARTS)
@pytest.mark.parametrize("variant", ["auto", "portable"])
def test_the_first_parts_are_a_library_too(variant, part, tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), variant, part], text=True,
        capture_output=True, timeout=280,
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)})
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith(f"up to {part}\n")
