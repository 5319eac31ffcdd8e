"""bench/gpu.py with --dry: the paths that it takes on a GPU, on a CPU."""

import importlib.util
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import gptoss.kernels.eight  # noqa: F401  it defines operators
from gptoss.model.ops import OPERATORS

COMMAND = Path(__file__).parents[2] / "bench" / "gpu.py"
NO_TRITON = find_spec("triton") is None


def command():
    """bench/gpu.py as a module; it must not need torch."""
    spec = importlib.util.spec_from_file_location("bench_gpu", COMMAND)
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


def run(*arguments, timeout: int = 60) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(COMMAND), *map(str, arguments)],
                          capture_output=True, text=True, timeout=timeout)


def test_dry(tmp_path):
    file, folder = tmp_path / "gpu.json", tmp_path / "temporary"
    folder.mkdir()
    done = run(file, "--dry", "--folder", folder, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list(folder.iterdir())  # it leaves nothing behind
    assert "Traceback" not in done.stdout + done.stderr
    found = json.loads(file.read_text())
    assert found.keys() == {"dry", "began", "seconds", "stages"}
    stages = found["stages"]
    assert list(stages) == [name for name, _, _ in command().STAGES]
    for name, stage in stages.items():
        assert stage["state"] in ("passed", "left out"), (name, stage)
        assert stage["cases"], name
    for name in ("machine", "operators", "pocket", "ranks", "write", "speed",
                 "compiled"):
        assert stages[name]["state"] == "passed", name
    kernels = stages["kernels"]
    assert kernels["state"] == ("left out" if NO_TRITON else "passed")
    assert not NO_TRITON or kernels["why"] == "no triton here"
    check_figures(stages)


def check_figures(stages: dict) -> None:
    cases = {name: stage["cases"] for name, stage in stages.items()}
    assert cases["machine"]["versions"].keys() >= {"python", "torch",
                                                   "triton"}
    assert cases["machine"]["copy"]["bytes_per_second"] > 1e8
    assert len(cases["operators"]) == 2 * len(OPERATORS)
    for name, case in cases["operators"].items():
        if "bfloat16" in name or not ("compact" in name or "eight" in name):
            assert case["error"] <= case["allowed"], name
    for name in ("plain torch", "CUDA graph of the step"):
        case = cases["pocket"][name]
        assert case["equal"] == case["tokens"] > 0
    assert all(case["equal"] == 24 for case in cases["ranks"].values())
    for stage, case in (("speed", "plain torch: decode"),
                        ("speed", "plain torch: prefill of 8"),
                        ("speed", "CUDA graph: decode"),
                        ("compiled", "step: decode")):
        assert cases[stage][case]["tokens_per_second"] > 0
        assert cases[stage][case]["share_of_memory_speed"] > 0


def test_a_stage_that_fails_or_is_late_is_recorded(tmp_path, monkeypatch):
    gpu = command()
    late = gpu.stage("operators", 0.01, tmp_path, 1.0, True)
    assert late["state"] == "out of time" and "0 seconds" in late["why"]
    broken = gpu.stage("no such stage", 60, tmp_path, 1.0, True)
    assert broken["state"] == "failed"
    assert broken["why"] == "KeyError: 'no such stage'"
    assert "Traceback" in broken["traceback"]
    assert gpu.state_of([]) == "failed"
    assert gpu.state_of(["passed", "left out"]) == "passed"
    assert gpu.state_of(["left out", "failed", "passed"]) == "failed"
    assert gpu.state_of(["left out"]) == "left out"


@pytest.mark.parametrize(("arguments", "words"), [
    (["--only", "all"], "expected some of machine, operators"),
    (["no/such/folder/x.json"], "expected a folder, found none"),
    (["x.json", "--folder", "no/such/folder"], "expected a folder")])
def test_mistakes_are_one_line(arguments, words):
    done = run(*arguments)
    assert done.returncode == 2 and words in done.stderr.splitlines()[-1]


def test_without_a_gpu_one_line_says_so(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run(tmp_path / "gpu.json")
    assert done.returncode == 1 and not done.stderr
    first, case, last = done.stdout.splitlines()
    assert first.startswith("machine      failed") and (
        "finds no CUDA device" in case) and last.endswith("passed: machine")
    assert list(json.loads((tmp_path / "gpu.json").read_text())["stages"]
                ) == ["machine"]
