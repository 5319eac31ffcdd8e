"""What bench/attention.py tells."""

import json
import subprocess
import sys

from conftest import ROOT


def test_every_case_is_told(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "attention.py"), "--json",
         "--decode", "16,40", "--together", "1x2,2x1", "--prefill", "20,700",
         "--repeats", "1", "--cpu-time", "--words", "here"], text=True,
        capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["words"] == "here" and found["threads"] == 1
    assert found["read_bytes_per_second"] > 0
    kinds = [(case["part"], case["layer"], case["rows"], case["tokens"],
              case["keys"]) for case in found["cases"]]
    assert kinds == [
        ("decode", "full", 1, 1, 16), ("decode", "full", 1, 1, 40),
        ("decode", "sliding", 1, 1, 128), ("decode", "full", 1, 2, 8192),
        ("decode", "full", 2, 1, 8192), ("prefill", "full", 1, 20, 20),
        ("prefill", "sliding", 1, 20, 20), ("prefill", "full", 1, 512, 700),
        ("prefill", "sliding", 1, 512, 640),
        ("prefill", "sliding, no cache", 1, 512, 700)]
    for case in found["cases"]:
        assert 0 < case["best_seconds"] <= case["seconds"]
        assert ("torch_seconds" in case) == (case["layer"] == "full")
        if case["part"] == "decode":
            assert case["bytes"] == case["rows"] * case["keys"] * 2048
            assert case["times_the_floor"] > 0
        else:
            assert case["flops_per_second"] > 0
