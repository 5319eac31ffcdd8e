"""bench/compare.py beside binaries built elsewhere; here they are scripts.

The scripts print what ik_llama.cpp's and llama.cpp's programs printed, and
note how they were called.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_kernels import POCKET

from gptoss.model.transformer import GptOss

FOLDER = Path(__file__).parents[2] / "bench"
BENCH = '''\
[
  {
    "build_commit": "8337e4cd3", "n_threads": 2, "repack": true,
    "n_prompt": %d, "n_gen": %d, "test_time": "2026-11-29T10:12:00Z",
    "avg_ns": 640000000, "avg_ts": 41.5,
    "samples_ts": [ 40.0, 44.0, 41.0 ]
  }%s
'''
TABLE = '''
main: n_kv_max = 512, n_batch = 2048, n_ubatch = 512, flash_attn = 1

|    PP |     TG |    B |   N_KV |   T_PP s | S_PP t/s |   T_TG s | S_TG t/s |      T s |    S t/s |
|-------|--------|------|--------|----------|----------|----------|----------|----------|----------|
|   128 |      4 |    1 |    132 |    1.869 |    68.48 |    0.500 |     8.00 |    2.369 |    55.72 |
|   128 |      4 |    2 |    136 |    1.871 |    68.41 |    0.500 |    16.00 |    2.371 |    57.36 |
'''  # noqa: E501  as printed


def programs(folder: Path, helps: str, fails: str = "") -> Path:
    """A folder of two scripts that print the above."""
    folder.mkdir()
    for name in ("llama-bench", "llama-batched-bench"):
        file = folder / name
        file.write_text(f"""#!{sys.executable}
import sys
words = sys.argv[1:]
if words == ["--help"]:
    print({helps!r})
    sys.exit(1)
with open({str(folder / "calls")!r}, "a") as calls:
    print({name!r}, *words, file=calls)
if {fails!r}:
    sys.exit({fails!r})
if {name!r} == "llama-batched-bench":
    print({TABLE!r}, file=sys.stderr)
    sys.exit()
value = dict(zip(words, words[1:]))
tests = [(int(value["-p"]), 0)] if value["-n"] == "0" else [
    (int(value["-p"]), 0), (0, int(value["-n"]))]
print("warning: a line of the log")
for n, (prompt, new) in enumerate(tests):
    text = {BENCH!r} % (prompt, new, "," if n + 1 < len(tests) else "")
    print(text if n == 0 else text[2:], end="")
print("]")
""")
        file.chmod(0o755)
    return folder


@pytest.fixture
def bench(monkeypatch):
    """Imports a module of bench/."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def run(*arguments, timeout=100):
    return subprocess.run(
        [sys.executable, str(FOLDER / "compare.py"), str(POCKET),
         "--threads", "1", "--prompt", "16", "--tokens", "4", "--repeats",
         "1", *map(str, arguments)], capture_output=True, text=True,
        timeout=timeout, env=os.environ)


def test_compare_beside_binaries(tmp_path):
    repacks = programs(tmp_path / "ik", "-rtr, --run-time-repack <0|1>")
    plain = programs(tmp_path / "upstream", "usage: --repack <0|1>")
    broken = programs(tmp_path / "broken", "", "cannot load the model")
    file = tmp_path / "model.gguf"
    for name in ("model.gguf", "model.gguf.q8_0"):
        (tmp_path / name).write_bytes(b"GGUF")
    done = run("--engines", "ours,ik,up,up-q8_0,broken,missing", "--rounds",
               2, "--binary", f"ik={repacks} -muge 1 -ub 256", "--binary",
               f"up={plain}", "--binary", f"broken={broken}", "--binary",
               f"missing={tmp_path / 'none'}", "--gguf", file, "--together",
               "1,2", "--long", 24, "--json")
    assert done.returncode == 0, done.stderr
    assert "broken: left out, cannot load the model" in done.stderr
    assert "missing: left out" in done.stderr
    found = json.loads(done.stdout)
    assert [*found] == ["ours", "ik", "up", "up-q8_0"]
    for name in ("ik", "up"):
        assert found[name]["decode_tokens_per_second"] == 41
        assert found[name]["prefill_tokens_per_second"] == 41
        assert found[name]["prefill_of"] == {"24": 41}
        assert found[name]["peak_rss_bytes"] > 10 ** 6
    assert found["ik"]["together"] == {"same": {"1": 8, "2": 16}}
    assert found["up"]["together"] == {"distinct": {"1": 8, "2": 16}}
    assert found["ours"]["prefill_of"]["24"] > 0
    for kind in ("same", "distinct"):
        assert [*found["ours"]["together"][kind]] == ["1", "2"]
        assert min(found["ours"]["together"][kind].values()) > 0
    assert (repacks / "calls").read_text().splitlines() == 2 * [
        f"llama-bench -m {file} -t 1 -o json -muge 1 -ub 256 -rtr 1 -p 16 "
        "-n 4 -r 1",
        f"llama-bench -m {file} -t 1 -o json -muge 1 -ub 256 -rtr 1 -p 24 "
        "-n 0 -r 1",
        f"llama-batched-bench -m {file} -t 1 -muge -ub 256 -rtr -pps -npp "
        "128 -ntg 4 -npl 1,2 -c 264"]
    assert f"-m {file}.q8_0 " in (plain / "calls").read_text()
    assert "-rtr" not in (plain / "calls").read_text()


def test_a_build_may_draw_tokens(tmp_path):
    repacks = programs(tmp_path / "ik", "-rtr, --run-time-repack <0|1>")
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    done = run("--engines", "ik", "--binary", f"ik={repacks} -rtr 0",
               "--distinct", "ik", "--gguf", file, "--together", "1,2",
               "--json")
    assert json.loads(done.stdout)["ik"]["together"] == {
        "distinct": {"1": 8, "2": 16}}
    last = (repacks / "calls").read_text().splitlines()[-1]
    assert "-rtr" not in last


def test_compare_prints_like_beside_like(bench):
    compare = bench("compare")
    found = {
        "ours": {"together": {"same": {"1": 10.0, "4": 30.0},
                              "distinct": {"1": 9.0, "4": 18.0}},
                 "prefill_of": {"4096": 50.0}},
        "ik": {"together": {"same": {"1": 8.0, "4": 20.0}},
               "prefill_of": {"4096": 40.0}}}
    lines = compare.told_more(found)
    assert any(line.startswith("ours ") and "distinct" in line
               and line.endswith("2.00 times one") for line in lines)
    assert any(line.startswith("ik ") and "   4 same" in line
               and line.endswith("ours 1.50 times as fast")
               for line in lines)
    assert any("prefill of 4096" in line and line.endswith("ours 1.25 times "
               "as fast") for line in lines)


def test_best_of_rounds(bench):
    first = {"decode_tokens_per_second": 2.0, "load_seconds": 1,
             "together": {"same": {"1": 1.0, "2": 4.0}}}
    second = {"decode_tokens_per_second": 3.0, "load_seconds": 2,
              "together": {"same": {"1": 2.0, "2": 3.0}}}
    found = bench("compare").best_of(first, second)
    assert found == {"decode_tokens_per_second": 3.0, "load_seconds": 2,
                     "together": {"same": {"1": 2.0, "2": 4.0}}}


@pytest.mark.parametrize("wrong", ["ik", "=folder", "ik=", "ours=/tmp"])
def test_binary_is_name_and_folder(wrong, tmp_path):
    done = run("--binary", wrong)
    assert done.returncode == 2 and "--binary" in done.stderr


def test_unknown_engine():
    done = run("--engines", "ours,ik", "--binary", "other=/tmp")
    assert done.returncode == 2 and "found ik" in done.stderr


def test_rows(bench):
    """Steps of the pocket model: what is counted, and the ratios."""
    rows = bench("rows")
    model = GptOss.from_pretrained(POCKET)
    found, speed = rows.steps(model, {"tokens": [3], "distinct": [2],
                                      "same": [2]}, sets=2, repeats=1)
    assert speed > 0
    assert [(row["kind"], row["n"]) for row in found] == [
        ("tokens", 1), ("tokens", 3), ("distinct", 1), ("distinct", 2),
        ("same", 1), ("same", 2)]
    c = model.config
    for row in found:
        least = c.num_experts_per_tok
        assert least <= row["experts_a_layer"] <= min(
            c.num_local_experts, row["n"] * least)
        if row["n"] == 1:
            assert row["cost"] == row["excess"] == row["rate"] == 1
        assert row["allowed"] >= 1
        assert abs(row["rate"] * row["cost"] - row["n"]) < 1e-9
    # equal texts choose the same experts
    assert found[-1]["experts_a_layer"] == c.num_experts_per_tok
    one = rows.bytes_read_per_token(c)
    assert found[0]["bytes"] == one
    assert found[-1]["bytes"] == one + 2 * c.hidden_size


def test_rows_of_products(bench, monkeypatch):
    rows = bench("rows")
    monkeypatch.setattr(rows, "BEYOND_CACHES", 10 ** 5)
    torch.manual_seed(0)
    best = rows.in_turns({"ours": lambda i: None, "torch": lambda i: None},
                         0.0, iter(range(10 ** 6)))
    assert set(best) == {"ours", "torch"} and min(best.values()) >= 0
    calls, width = rows.dense_products("compact", "128x64")
    each, size = calls(torch.randn(3, width).bfloat16())
    assert each["ours"](5).shape == each["torch"](5).shape == (3, 128)
    assert size < 2 * 128 * 64
