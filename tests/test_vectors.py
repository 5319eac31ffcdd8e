"""The conformance vectors: complete, right, and able to fail."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy_vectors
import pytest
import torch
from safetensors.torch import load_file, save_file

from gptoss import parity, vectors
from gptoss.model import GptOss

FOLDER = Path(__file__).parent / "vectors"
INDEX, STORED = vectors.read_vectors(FOLDER)
CASES = {case["name"]: case for case in INDEX["cases"]}


def inputs(name: str) -> dict[str, torch.Tensor]:
    return {n: STORED[key] for n, key in CASES[name]["inputs"].items()}


# --- The set in the repository -----------------------------------------------

def test_the_package_holds_to_the_set():
    assert vectors.check(FOLDER) == []


def test_the_set_is_what_write_writes(tmp_path):
    vectors.write(tmp_path)
    index, stored = vectors.read_vectors(tmp_path)
    assert index["cases"] == INDEX["cases"]
    assert index["operations"] == INDEX["operations"]
    assert stored.keys() == STORED.keys()
    for key, tensor in stored.items():
        assert tensor.dtype == STORED[key].dtype
        assert vectors.far_off(tensor, STORED[key], 1e-7, 1e-6) <= 1


def test_size_and_names():
    assert sum(f.stat().st_size for f in FOLDER.iterdir()) <= 5_000_000
    assert {f.name for f in FOLDER.iterdir()} == {"index.json",
                                                  "vectors.safetensors"}
    used = {key for case in CASES.values() for key in (
        *case["inputs"].values(),
        *(out["tensor"] for out in case["outputs"].values()))}
    assert used == set(STORED)
    assert {c["operation"] for c in CASES.values()} == set(
        INDEX["operations"]) == set(vectors.OPERATIONS)
    assert all(case["explains"] and "\n" not in case["explains"]
               for case in CASES.values())


def test_it_stands_at_the_edges():
    assert inputs("tables")["positions"].tolist() == [
        0, 127, 128, 4095, 4096, 131071]
    assert {0, 1, 253, 254, 255} <= set(
        inputs("mxfp4")["scales"].flatten().tolist())
    assert len(inputs("mxfp4")["blocks"].unique()) == 256
    values = STORED["mxfp4/out/values"]
    assert values.isinf().any() and values.isnan().any()
    seen = STORED["mask window/out/seen"]
    assert seen.sum(-1).tolist() == [1, 2, 127, 128, 128, 128, 128, 0]
    alone = STORED["sinks only/out/y"]
    assert not alone[:2].any() and alone[2:].all(dim=-1).any()
    logits = inputs("ties")["logits"].sort(-1, descending=True)[0]
    assert (logits[:, 3] == logits[:, 4]).any()


def test_greedy_tokens_are_no_near_ties():
    case = CASES["model"]
    row = torch.cat([inputs("model")["tokens"],
                     STORED["model/out/greedy"]]).long()
    state = vectors._state(vectors.cast_inputs(inputs("model"),
                                               torch.float64), "model.")
    model = GptOss(vectors.TINY_CONFIG, torch.float64, "meta")
    model.load_state_dict(state, assign=True)
    with torch.inference_mode():
        best = model(row[None])[0, -9:-1].topk(2)[0]
    atol = case["outputs"]["logits"]["float32"][0]
    assert (best[:, 0] - best[:, 1]).min() > 100 * atol


# --- Without torch -----------------------------------------------------------

def test_numpy_alone_passes_every_case():
    """In a process where torch and this package cannot be imported."""
    code = ("import sys, runpy; sys.argv[1:] = [{!r}]; "
            "sys.modules['torch'] = sys.modules['gptoss'] = None; "
            "runpy.run_path({!r}, run_name='__main__')")
    run = subprocess.run(
        [sys.executable, "-c", code.format(
            str(FOLDER), str(Path(numpy_vectors.__file__)))],
        capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("ok ") == len(CASES)


def _swapped_nibbles(t, p):
    return numpy_vectors.mxfp4({**t, "blocks": t["blocks"] << 4
                                | t["blocks"] >> 4}, p)


def _no_nan(t, p):
    out = numpy_vectors.mxfp4(t, p)
    return {"values": np.nan_to_num(out["values"], nan=0.0)}


def _truncated(t, p):
    pairs = np.arange(32)
    ramp = np.clip((pairs - 8) / (18 - 8), 0, 1)
    plain = 150000.0 ** (-2 * pairs / 64)
    return {"inv_freq": plain * (1 - ramp) + plain / 32 * ramp,
            "concentration": np.array([0.1 * np.log(32) + 1])}


def _no_concentration(t, p):
    return numpy_vectors.tables(t, {"concentration": 1.0})


def _neighbours(t, p):
    a, b = t["x"][..., ::2], t["x"][..., 1::2]
    cos, sin = t["cos"][:, None], t["sin"][:, None]
    both = np.stack([a * cos - b * sin, b * cos + a * sin], -1)
    return {"y": both.reshape(t["x"].shape)}


def _longer(t, p):
    window = p["window"] and p["window"] + 1
    return numpy_vectors.mask(t, {"window": window})


def _no_sink(t, p):
    return numpy_vectors.attention({**t, "sinks": t["sinks"] - 1e30}, p)


def _gemma(t, p):
    return numpy_vectors.norm({**t, "weight": 1 + t["weight"]}, p)


def _clamped_below(t, p):
    both = t["gate_up"].copy()
    both[::2] = np.maximum(both[::2], -p["limit"])
    return numpy_vectors.swiglu({"gate_up": both}, p)


def _higher_index(t, p):
    flipped = numpy_vectors.route({"logits": t["logits"][:, ::-1]}, p)
    return {"weights": flipped["weights"],
            "ids": t["logits"].shape[1] - 1 - flipped["ids"]}


@pytest.mark.parametrize(("operation", "wrong", "fail"), [
    ("mxfp4", _swapped_nibbles, {"mxfp4"}), ("mxfp4", _no_nan, {"mxfp4"}),
    ("frequencies", _truncated, {"frequencies"}),
    ("tables", _no_concentration, {"tables"}),
    ("rope", _neighbours, {"rope"}), ("mask", _longer, {"mask window"}),
    ("attention", _no_sink, {"sinks", "sinks window", "sinks only"}),
    ("norm", _gemma, {"norm"}), ("swiglu", _clamped_below, {"clamp"}),
    ("route", _higher_index, {"ties"})])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_wrong_port_fails_its_case(operation, wrong, fail):
    port = {**numpy_vectors.PORT, operation: wrong}
    outcome = numpy_vectors.run(FOLDER, port)
    assert {name for name, right in outcome.items() if not right} == fail


def test_an_error_in_a_block_shows_in_block_and_model(monkeypatch):
    monkeypatch.setattr(numpy_vectors, "seen",
                        lambda q, k, window: (k[None] >= 0)
                        & (k[None] <= q[:, None]))  # no window at all
    outcome = numpy_vectors.run(FOLDER)
    wrong = {name for name, right in outcome.items() if not right}
    assert {"block", "model", "mask window", "sinks window"} <= wrong
    assert "mask full" not in wrong


# --- bf16 --------------------------------------------------------------------

def test_two_roundings_are_too_many():
    t = vectors.cast_inputs(inputs("norm"), torch.bfloat16)
    wide = t["x"].float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
    twice = t["weight"] * wide.bfloat16()
    near = CASES["norm"]["outputs"]["y"]["bfloat16"]
    assert vectors.far_off(twice, STORED["norm/out/y"], *near) > 1


@pytest.mark.parametrize("contract", parity.CONTRACTS)
def test_every_contract_is_near_enough_in_bf16(contract):
    model = GptOss(vectors.TINY_CONFIG, torch.bfloat16, "meta")
    model.load_state_dict(vectors._state(inputs("model"), "model."),
                          assign=True)
    trace = parity.trace_ours(model, inputs("model")["tokens"].long()[None],
                              contract)
    near = CASES["model"]["outputs"]["logits"]["bfloat16"]
    assert vectors.far_off(trace[None, "logits"],
                           STORED["model/out/logits"], *near) <= 1


# --- Answers of a port, and broken sets --------------------------------------

def test_answers(tmp_path):
    file = tmp_path / "answers.safetensors"
    answers = {out["tensor"]: STORED[out["tensor"]].clone()
               for case in CASES.values()
               for out in case["outputs"].values()}
    save_file(answers, file)
    assert vectors.check(FOLDER, file) == []
    assert vectors.check(FOLDER, file, "bfloat16") == []
    answers["rope/out/y"][0, 0, 0] += 1
    del answers["ties/out/ids"]
    answers["model/out/logits"] = answers["model/out/logits"][:, :5].clone()
    save_file(answers, file)
    assert [line.split(" in ")[0] for line in vectors.check(FOLDER, file)
            ] == ["rope/out/y", "ties/out/ids", "model/out/logits"]


def test_broken_answers(tmp_path):
    for name, data in (("none", None), ("short", b"{}"), ("text", b"x" * 99)):
        file = tmp_path / name
        if data is not None:
            file.write_bytes(data)
        with pytest.raises(vectors.VectorError, match=name):
            vectors.check(FOLDER, file)


def test_broken_sets(tmp_path):
    with pytest.raises(vectors.VectorError, match="No such file"):
        vectors.check(tmp_path)
    for name in ("index.json", "vectors.safetensors"):
        (tmp_path / name).write_bytes((FOLDER / name).read_bytes())
    changed = load_file(tmp_path / "vectors.safetensors")
    changed["rope/in/x"][0, 0, 0] += 1
    save_file(changed, tmp_path / "vectors.safetensors")
    with pytest.raises(vectors.VectorError, match="sha256"):
        vectors.check(tmp_path)
    (tmp_path / "index.json").write_text(json.dumps({**INDEX, "version": 2}))
    with pytest.raises(vectors.VectorError, match="version: expected 1"):
        vectors.check(tmp_path)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(vectors.VectorError, match="expected an index"):
        vectors.check(tmp_path)
