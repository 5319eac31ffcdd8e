"""The conformance vectors in plain numpy: neither torch nor this package.

A second implementation, written from the one-line formulas of index.json,
and proof that a port needs no more than a reader of safetensors.

    python tests/parity/numpy_vectors.py tests/parity/vectors [ANSWERS]

With ANSWERS it also writes its outputs there, for `gptoss vectors check`.
"""

import json
import math
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

KINDS = {"F32": "<f4", "I32": "<i4", "U8": "u1", "BF16": "<u2"}
GRID = np.array([0, .5, 1, 1.5, 2, 3, 4, 6] * 2, dtype=np.float32)
GRID[8:] *= -1


def read_safetensors(file: Path) -> dict[str, np.ndarray]:
    """Eight bytes of length, a JSON header, the numbers."""
    raw = file.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    data, out = raw[8 + size:], {}
    for key, entry in json.loads(raw[8:8 + size]).items():
        if key == "__metadata__":
            continue
        start, end = entry["data_offsets"]
        x = np.frombuffer(data[start:end], KINDS[entry["dtype"]])
        if entry["dtype"] == "BF16":  # the upper half of an fp32
            x = (x.astype("<u4") << 16).view("<f4")
        out[key] = x.reshape(entry["shape"])
    return out


def mxfp4(t: dict, p: dict) -> dict:
    nibbles = np.stack([t["blocks"] & 15, t["blocks"] >> 4], -1)
    values = GRID[nibbles].reshape(*t["scales"].shape, 32)
    with np.errstate(over="ignore"):
        values = np.ldexp(values, t["scales"][..., None].astype(int) - 127)
    values[t["scales"] == 255] = np.nan
    return {"values": values.reshape(*t["scales"].shape[:-1], -1)}


def yarn(C: int, theta: float, factor: float, original: int,
         beta_fast: float, beta_slow: float) -> np.ndarray:
    def pair(times: float) -> float:
        return C * math.log(original / (times * 2 * math.pi)) / (
            2 * math.log(theta))
    plain = theta ** (-2 * np.arange(C // 2) / C)
    ramp = (np.arange(C // 2) - pair(beta_fast)) / (
        pair(beta_slow) - pair(beta_fast))
    ramp = np.clip(ramp, 0, 1)
    return (plain * (1 - ramp) + plain / factor * ramp).astype(np.float32)


def frequencies(t: dict, p: dict) -> dict:
    assert p["truncate"] is False
    return {"inv_freq": yarn(p["head_dim"], p["theta"], p["factor"],
                             p["original"], p["beta_fast"], p["beta_slow"]),
            "concentration": np.array([0.1 * math.log(p["factor"]) + 1])}


def tables(t: dict, p: dict) -> dict:
    angle = t["positions"].astype(np.float32)[:, None] * t["inv_freq"]
    assert angle.dtype == np.float32
    return {"cos": np.cos(angle) * np.float32(p["concentration"]),
            "sin": np.sin(angle) * np.float32(p["concentration"])}


def rope(t: dict, p: dict) -> dict:
    a, b = np.split(t["x"], 2, -1)
    cos, sin = t["cos"][:, None], t["sin"][:, None]
    return {"y": np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)}


def seen(q_pos: np.ndarray, k_pos: np.ndarray, window: int | None
         ) -> np.ndarray:
    q, k = q_pos[:, None], k_pos[None]
    causal = (k >= 0) & (k <= q)
    return causal if window is None else causal & (k > q - window)


def mask(t: dict, p: dict) -> dict:
    return {"seen": seen(t["q_pos"], t["k_pos"], p["window"]).astype("u1")}


def attention(t: dict, p: dict) -> dict:
    """One query and one head at a time, over the keys that it sees."""
    q, k, v = t["q"], t["k"], t["v"]
    visible, out = seen(t["q_pos"], t["k_pos"], p["window"]), np.zeros_like(q)
    for n in range(q.shape[0]):
        for h in range(q.shape[1]):
            g = h // (q.shape[1] // k.shape[1])
            scores = p["scale"] * (k[visible[n], g] @ q[n, h])
            top = max([*scores, t["sinks"][h]])
            weights = np.exp(scores - top)
            total = weights.sum() + np.exp(t["sinks"][h] - top)
            out[n, h] = weights / total @ v[visible[n], g]
    return {"y": out}


def norm(t: dict, p: dict) -> dict:
    x = t["x"]
    scale = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(p["eps"]))
    return {"y": x * scale * t["weight"]}


def swiglu(t: dict, p: dict) -> dict:
    gate = np.minimum(t["gate_up"][..., ::2], p["limit"])
    up = np.clip(t["gate_up"][..., 1::2], -p["limit"], p["limit"])
    with np.errstate(over="ignore"):
        return {"y": (up + 1) * gate / (1 + np.exp(-1.702 * gate))}


def route(t: dict, p: dict) -> dict:
    logits = t["logits"]
    ids = np.argsort(-logits, -1, kind="stable")[:, :p["k"]]
    chosen = np.take_along_axis(logits, ids, -1)
    weights = np.exp(chosen - chosen[:, :1])
    return {"weights": weights / weights.sum(-1, keepdims=True), "ids": ids}


def one_block(t: dict, c: dict, layer: int, x: np.ndarray) -> np.ndarray:
    def w(name: str) -> np.ndarray:
        return t[f"model.layers.{layer}.{name}"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w(f"{name}.weight").T + w(f"{name}.bias")

    C, positions = c["head_dim"], np.arange(len(x))
    r = c.get("rope_parameters") or c["rope_scaling"]
    turn = tables({"positions": positions, "inv_freq": yarn(
        C, r.get("rope_theta", c.get("rope_theta")), r["factor"],
        r["original_max_position_embeddings"], r["beta_fast"],
        r["beta_slow"])}, {"concentration": 0.1 * math.log(r["factor"]) + 1})
    h = norm({"x": x, "weight": w("input_layernorm.weight")},
             {"eps": c["rms_norm_eps"]})["y"]
    q, k, v = (linear(h, f"self_attn.{n}_proj").reshape(len(x), -1, C)
               for n in "qkv")
    q, k = (rope({"x": z, **turn}, {})["y"] for z in (q, k))
    sliding = c["layer_types"][layer] == "sliding_attention"
    heads = attention(
        {"q": q, "k": k, "v": v, "sinks": w("self_attn.sinks"),
         "q_pos": positions, "k_pos": positions},
        {"window": c["sliding_window"] if sliding else None,
         "scale": C ** -0.5})["y"]
    x = x + linear(heads.reshape(len(x), -1), "self_attn.o_proj")
    h = norm({"x": x, "weight": w("post_attention_layernorm.weight")},
             {"eps": c["rms_norm_eps"]})["y"]
    return x + experts(w, c, h, linear(h, "mlp.router"))


def experts(w, c: dict, x: np.ndarray, logits: np.ndarray) -> np.ndarray:
    up, down = (mxfp4({"blocks": w(f"mlp.experts.{n}_proj_blocks"),
                       "scales": w(f"mlp.experts.{n}_proj_scales")},
                      {})["values"] for n in ("gate_up", "down"))
    chosen, out = route({"logits": logits},
                        {"k": c["num_experts_per_tok"]}), np.zeros_like(x)
    for n, (ids, weights) in enumerate(zip(chosen["ids"], chosen["weights"],
                                           strict=True)):
        for e, weight in zip(ids, weights, strict=True):
            both = up[e] @ x[n] + w("mlp.experts.gate_up_proj_bias")[e]
            hidden = swiglu({"gate_up": both},
                            {"limit": c["swiglu_limit"]})["y"]
            out[n] += weight * (down[e] @ hidden
                                + w("mlp.experts.down_proj_bias")[e])
    return out


def block(t: dict, p: dict) -> dict:
    return {"y": one_block(t, p["config"], p["layer"], t["x"])}


def model(t: dict, p: dict) -> dict:
    c, row = p["config"], list(t["tokens"])

    def logits() -> np.ndarray:
        x = t["model.embed_tokens.weight"][row]
        for layer in range(c["num_hidden_layers"]):
            x = one_block(t, c, layer, x)
        x = norm({"x": x, "weight": t["model.norm.weight"]},
                 {"eps": c["rms_norm_eps"]})["y"]
        return x @ t["lm_head.weight"].T
    out = {"logits": logits()}
    for _ in range(p["greedy"]):
        row.append(int(logits()[-1].argmax()))
    return {**out, "greedy": np.array(row[-p["greedy"]:])}


PORT = {f.__name__: f for f in (mxfp4, frequencies, tables, rope, mask,
                                attention, norm, swiglu, route, block, model)}


def answers(folder: Path, port: dict = PORT
            ) -> Iterator[tuple[dict, dict, dict]]:
    """Each case of the index, the port's outputs for it by name, and the
    tensors of the folder."""
    index = json.loads((folder / "index.json").read_text("utf-8"))
    tensors = read_safetensors(folder / index["file"])
    for case in index["cases"]:
        inputs = {name: tensors[key] for name, key in case["inputs"].items()}
        yield case, port[case["operation"]](inputs, case["parameters"]), \
            tensors


def run(folder: Path, port: dict = PORT) -> dict[str, bool]:
    """Case -> whether every output is within its fp32 tolerance."""
    return {case["name"]: all(
        found[name].shape == tensors[out["tensor"]].shape
        and np.allclose(found[name], tensors[out["tensor"]],
                        atol=out["float32"][0], rtol=out["float32"][1],
                        equal_nan=True)
        for name, out in case["outputs"].items())
        for case, found, tensors in answers(folder, port)}


def write_answers(folder: Path, file: Path, port: dict = PORT) -> None:
    """The outputs of every case as safetensors, under the index's names."""
    header, data = {}, b""
    for case, found, tensors in answers(folder, port):
        for name, out in case["outputs"].items():
            kind = tensors[out["tensor"]].dtype
            raw = np.ascontiguousarray(found[name], kind).tobytes()
            header[out["tensor"]] = {
                "dtype": next(k for k, v in KINDS.items() if v == kind),
                "shape": list(found[name].shape),
                "data_offsets": [len(data), len(data) + len(raw)]}
            data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


if __name__ == "__main__":
    outcome = run(Path(sys.argv[1]))
    if sys.argv[2:]:
        write_answers(Path(sys.argv[1]), Path(sys.argv[2]))
    for name, right in outcome.items():
        print(f"{'ok  ' if right else 'WRONG'} {name}")
    assert not (sys.modules.get("torch") or sys.modules.get("gptoss"))
    sys.exit(not all(outcome.values()))
