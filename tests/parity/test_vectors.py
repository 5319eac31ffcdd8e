"""The conformance vectors: complete, right, and able to fail."""

import copy
import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy_vectors
import pytest
import torch
from safetensors.torch import load_file, save_file

from gptoss.cli.commands import main
from gptoss.model.transformer import GptOss
from gptoss.parity import vector_cases, vectors
from gptoss.parity.contracts import PLAIN_CONTRACTS, contract_for
from gptoss.parity.vector_cases import VectorError
from gptoss.parity.walk import trace_ours

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
    state = vector_cases._state(vector_cases.cast_inputs(
        inputs("model"), torch.float64), "model.")
    model = GptOss(vector_cases.TINY_CONFIG, torch.float64, "meta")
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
    t = vector_cases.cast_inputs(inputs("norm"), torch.bfloat16)
    wide = t["x"].float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
    twice = t["weight"] * wide.bfloat16()
    near = CASES["norm"]["outputs"]["y"]["bfloat16"]
    assert vectors.far_off(twice, STORED["norm/out/y"], *near) > 1


@pytest.mark.parametrize("contract", [*PLAIN_CONTRACTS, None])
def test_every_contract_is_near_enough_in_bf16(contract):
    """None: what runs unasked, the kernels on their path."""
    contract = contract_for(contract, torch.bfloat16)
    model = GptOss(vector_cases.TINY_CONFIG, torch.bfloat16, "meta")
    model.load_state_dict(vector_cases._state(inputs("model"), "model."),
                          assign=True)
    trace = trace_ours(model, inputs("model")["tokens"].long()[None],
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
        with pytest.raises(VectorError, match=name):
            vectors.check(FOLDER, file)


def test_broken_sets(tmp_path):
    with pytest.raises(VectorError, match="No such file"):
        vectors.check(tmp_path)
    for name in ("index.json", "vectors.safetensors"):
        (tmp_path / name).write_bytes((FOLDER / name).read_bytes())
    changed = load_file(tmp_path / "vectors.safetensors")
    changed["rope/in/x"][0, 0, 0] += 1
    save_file(changed, tmp_path / "vectors.safetensors")
    with pytest.raises(VectorError, match="sha256"):
        vectors.check(tmp_path)
    (tmp_path / "index.json").write_text(json.dumps({**INDEX, "version": 2}))
    with pytest.raises(VectorError, match="version: expected 1"):
        vectors.check(tmp_path)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(VectorError, match="expected an index"):
        vectors.check(tmp_path)


# --- Writing beside what is there --------------------------------------------

def kept(folder):
    return {file.name: file.read_bytes() if file.is_file() else None
            for file in folder.iterdir()}


@pytest.mark.parametrize(("name", "content"), [
    ("index.json", b"{}"), ("index.json", b'{"format": "mine"}'),
    ("index.json", b"not json"), ("index.json", b"[" * 100_000),
    ("index.json", b""), ("vectors.safetensors", b"mine"),
    ("vectors.safetensors", b"")])
def test_what_is_not_ours_is_not_overwritten(tmp_path, capsys, name, content):
    (tmp_path / name).write_bytes(content)
    before = kept(tmp_path)
    assert main(["vectors", "write", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert str(tmp_path / name) in err and "nothing was written" in err
    assert kept(tmp_path) == before


def test_ours_is_written_again_and_what_replaced_it_is_not(tmp_path):
    vectors.write(tmp_path)
    first = kept(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    vectors.write(tmp_path)
    assert kept(tmp_path) == {**first, "notes.txt": b"mine"}
    (tmp_path / "vectors.safetensors").write_bytes(b"mine")
    with pytest.raises(VectorError, match="vectors.safetensors: exi"):
        vectors.write(tmp_path)
    (tmp_path / "vectors.safetensors").unlink()
    (tmp_path / "index.json").unlink()
    (tmp_path / "index.json").mkdir()
    with pytest.raises(VectorError, match="index.json: exists"):
        vectors.write(tmp_path)
    (tmp_path / "index.json").rmdir()
    (tmp_path / "index.json").symlink_to(tmp_path / "nowhere")
    with pytest.raises(VectorError, match="index.json: exists"):
        vectors.write(tmp_path)
    assert not (tmp_path / "nowhere").exists()


def test_a_full_disk_changes_nothing(tmp_path, monkeypatch, capsys):
    vectors.write(tmp_path)
    before = kept(tmp_path)

    def full(_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(vectors.os, "fsync", full)
    assert main(["vectors", "write", str(tmp_path)]) == 2
    assert "No space left" in capsys.readouterr().err
    assert kept(tmp_path) == before  # nothing half written, nothing beside
    (tmp_path / "plain").write_text("a file")
    assert main(["vectors", "write", str(tmp_path / "plain")]) == 2
    assert (tmp_path / "plain").read_text() == "a file"


# --- Damaged sets: one line, whatever is wrong -------------------------------

def damaged(folder, index, stored=None, raw=None):
    """A set with that index, its checksum right: only the checks see it."""
    data = folder / "vectors.safetensors"
    if raw is not None:
        data.write_bytes(raw)
    elif stored is not None:
        save_file(stored, data)
    if isinstance(index, dict) and "sha256" in index:
        index = {**index, "sha256": hashlib.sha256(
            data.read_bytes()).hexdigest()}
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def only(name):
    """The index and the tensors of one case."""
    case = copy.deepcopy(CASES[name])
    keys = [*case["inputs"].values(),
            *(out["tensor"] for out in case["outputs"].values())]
    return {**INDEX, "cases": [case]}, {key: STORED[key] for key in keys}


ODD = (None, True, 0, -1, 7, 99, 1e308, 10 ** 30, -0.5, float("nan"), "",
       "x", "../index.json", "\x1b[2J", [], [0], [0, 0, 0], [None, None],
       [-1, 0], {}, {"tensor": 1}, "rope/in/x", "model", "norm")


def places(value, at=()):
    """Every place in nested objects and lists, as a path of keys."""
    yield at
    inner = (value.items() if isinstance(value, dict)
             else enumerate(value) if isinstance(value, list) else ())
    for key, each in inner:
        yield from places(each, (*at, key))


def mutate(index, rng):
    """One place of the index becomes something else, goes, or has a twin."""
    index = copy.deepcopy(index)
    where = rng.choice([at for at in places(index)
                        if at and at[0] not in ("operations", "near")])
    parent = index
    for key in where[:-1]:
        parent = parent[key]
    how = rng.randrange(3)
    if how == 0:
        del parent[where[-1]]
    elif how == 1 and isinstance(parent, list):
        parent.append(copy.deepcopy(parent[where[-1]]))
    else:
        parent[where[-1]] = rng.choice(ODD)
    return index


def scramble(stored, rng):
    """One tensor is of another shape, type or size, or its numbers odd."""
    key = rng.choice(sorted(stored))
    t = stored[key]
    flat = t.flatten()
    return {**stored, key: rng.choice([
        lambda: t[:0].clone(), lambda: flat[:len(flat) // 2].clone(),
        lambda: flat.clone(), lambda: t[None].clone(),
        lambda: torch.cat([t, t]), lambda: t.float(), lambda: t.double(),
        lambda: t.to(torch.uint8), lambda: t.long() * 10 ** 6,
        lambda: t.bool(), lambda: torch.tensor(3),
        lambda: torch.full_like(t, -7) if t.dtype != torch.uint8 else ~t,
        lambda: t.float() * float("nan")])()}


def told(folder, capsys):
    """The exit code of the command, whose words are one line and plain."""
    try:
        code = main(["vectors", "check", str(folder)])
    except SystemExit as ended:
        code = ended.code
    out, err = capsys.readouterr()
    assert code in (0, 1, 2)
    if code == 2:
        assert out == "" and err.count("\n") == 1
        assert err.startswith("gptoss: error: ") and len(err) < 700
    assert not set(out + err) & {*map(chr, range(10)), "\x1b", "\x07"}
    return code, out + err


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.filterwarnings("ignore")
def test_no_damage_gives_a_traceback(tmp_path, capsys, seed):
    rng = random.Random(seed)
    codes = []
    for _ in range(60 * int(os.environ.get("GPTOSS_FUZZ", "1"))):
        index, stored = only(rng.choice(sorted(CASES)))
        if rng.random() < 0.7:
            index = mutate(index, rng)
        else:
            stored = scramble(stored, rng)
        raw = None
        if rng.random() < 0.1:
            save_file(stored, tmp_path / "whole")
            raw = bytearray((tmp_path / "whole").read_bytes())
            if rng.random() < 0.5:
                raw = raw[:rng.randrange(len(raw))]
            else:
                raw[rng.randrange(min(len(raw), 400))] ^= 1 << rng.randrange(8)
        codes.append(told(damaged(tmp_path, index, stored, raw), capsys)[0])
    assert codes.count(2) > len(codes) / 4  # it is not all harmless


@pytest.mark.parametrize(("place", "value", "names"), [
    (("sha256",), ..., "sha256"), (("file",), ..., "file"),
    (("cases",), ..., "cases"), (("cases",), None, "cases"),
    (("cases", 0), 7, "case 0"),
    (("cases", 0, "name"), ..., "name"),
    (("cases", 0, "operation"), ..., "'model': operation"),
    (("cases", 0, "operation"), "sink", "found 'sink'"),
    (("cases", 0, "inputs"), None, "'model': inputs"),
    (("cases", 0, "inputs", "tokens"), "no such", "tokens"),
    (("cases", 0, "outputs"), [], "'model': outputs"),
    (("cases", 0, "outputs", "logits", "bfloat16"), ..., "logits: bfloat16"),
    (("cases", 0, "outputs", "logits", "float32"), [0.1], "logits: float32"),
    (("cases", 0, "outputs", "logits", "tensor"), "a\x1b[2Jb", "logits"),
    (("cases", 0, "parameters"), None, "'model': parameters"),
    (("cases", 0, "parameters", "greedy"), 10 ** 6, "greedy"),
    (("cases", 0, "parameters", "config", "num_hidden_layers"), 10 ** 6,
     "'model'"),
    (("cases", 0, "parameters", "config", "vocab_size"), 10 ** 12, r"2\*\*20"),
    (("file",), "../vectors.safetensors", "file: expected a name"),
    (("file",), "sub/../vectors.safetensors", "file: expected a name"),
    (("file",), "..", "file: expected a name"),
    (("file",), "/etc/passwd", "file: expected a name"),
    (("file",), "link", "link: expected a file in its folder"),
    (("version",), [], "version"), (("file",), "fifo", "plain file")])
def test_damage_is_named(tmp_path, capsys, place, value, names):
    index, stored = only("model")
    folder = tmp_path / "set"
    folder.mkdir()
    save_file(stored, tmp_path / "vectors.safetensors")
    (folder / "link").symlink_to(tmp_path / "vectors.safetensors")
    os.mkfifo(folder / "fifo")
    *path, last = place
    parent = index
    for key in path:
        parent = parent[key]
    if value is ...:
        del parent[last]
    else:
        parent[last] = value
    damaged(folder, index, stored)
    with pytest.raises(VectorError, match=names):
        vectors.check(folder)
    assert told(folder, capsys)[0] == 2


def test_a_name_cannot_command_a_terminal(tmp_path, capsys):
    """Of a tensor, in the words about what is wrong with it."""
    index, stored = only("ties")
    out = index["cases"][0]["outputs"]["weights"]
    name = "ties\x1b[2J\x1b]0;owned\x07\u202e"
    stored[name] = stored[out["tensor"]] + 1
    out["tensor"] = name
    code, text = told(damaged(tmp_path, index, stored), capsys)
    assert code == 1 and "ties\u241b[2J" in text and "\u202e" not in text
