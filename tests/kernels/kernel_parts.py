"""The kernels of each part of the C++ beside a twin in numpy and float64.

python kernel_parts.py VARIANT PART compiles the parts up to PART, without
optimising, loads that library alone and runs the twins of all its parts, as a
chapter does that knows no later part. A process of its own, since a process
loads one library. TWINS: part -> a function that asserts.
"""

import sys
from pathlib import Path

import numpy as np
import torch

import gptoss.kernels.coarse  # noqa: F401  defines the last operators
import gptoss.kernels.eight  # noqa: F401
from gptoss.kernels import build

OPS = torch.ops.gptoss
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E2M1 = np.concatenate([E2M1, -E2M1])


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape).bfloat16()


def exact(x: torch.Tensor) -> np.ndarray:
    return x.double().numpy()


def near(y: torch.Tensor, twin: np.ndarray, bound: float = 4e-3) -> None:
    """Of bf16, unless told otherwise: its rounding is 2**-8 at worst."""
    assert tuple(y.shape) == twin.shape
    assert np.linalg.norm(exact(y) - twin) <= bound * np.linalg.norm(twin)


def packed(*shape: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """blocks, scales and the weight (..., n) that they are."""
    *rows, n = shape
    blocks = torch.randint(256, (*rows, n // 32, 16), dtype=torch.uint8)
    scales = torch.randint(121, 126, (*rows, n // 32), dtype=torch.uint8)
    code = blocks.numpy()
    weight = E2M1[np.stack([code & 15, code >> 4], -1)].reshape(
        *rows, n // 32, 32)
    weight = weight * 2.0 ** (scales.numpy()[..., None].astype(float) - 127)
    return blocks, scales, weight.reshape(*rows, n)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def small() -> None:
    x, weight = numbers(2, 5, 24), numbers(24)
    wide = exact(x)
    scale = np.sqrt((wide ** 2).mean(-1, keepdims=True) + 1e-5)
    near(OPS.rms_norm(x, weight, 1e-5), wide / scale * exact(weight))
    x, cos, sin = numbers(2, 3, 4, 16), numbers(2, 3, 8), numbers(2, 3, 8)
    one, two = exact(x)[..., :8], exact(x)[..., 8:]
    c, s = exact(cos)[:, :, None], exact(sin)[:, :, None]
    near(OPS.rope(x, cos, sin),
         np.concatenate([one * c - two * s, two * c + one * s], -1))
    logits = numbers(40, 9)
    weights, ids = OPS.route(logits, 3)
    order = np.argsort(-exact(logits), -1, kind="stable")[:, :3]
    assert (ids.numpy() == order).all()
    near(weights, softmax(np.take_along_axis(exact(logits), order, -1)))


def packed_row() -> None:
    for rows, blocks in ((1, 1), (7, 3), (40, 2), (6, 17), (5, 90)):
        x = numbers(9, 32 * blocks)
        code, scales, weight = packed(rows, 32 * blocks)
        alone = torch.cat([OPS.packed_rows(x[n:n + 1], code, scales)
                           for n in range(len(x))])
        near(alone, exact(x) @ weight.T, 1e-4)
        for n in range(2, len(x) + 1):  # the same bits in company
            assert torch.equal(OPS.packed_rows(x[:n], code, scales),
                               alone[:n])


def answers(x, ids, shares, up, up_bias, down, down_bias,
            between=lambda hidden: hidden) -> np.ndarray:
    """(N, D) of experts (E, 2 F, D) and (E, D, F); between: what becomes of
    a hidden vector (F,)."""
    y = np.zeros(x.shape)
    for n in range(len(x)):
        for k, e in enumerate(ids[n].tolist()):
            both = up[e] @ exact(x)[n] + exact(up_bias)[e]
            gate, line = both[::2].clip(None, 7), both[1::2].clip(-7, 7)
            hidden = gate / (1 + np.exp(-1.702 * gate)) * (line + 1)
            y[n] += exact(shares)[n, k] * (
                down[e] @ between(hidden) + exact(down_bias)[e])
    return y


def in_steps(hidden: np.ndarray) -> np.ndarray:
    """Each 32 numbers in steps of their largest over 127."""
    parts = hidden.reshape(-1, 32)
    step = np.abs(parts).max(1, keepdims=True) / 127
    return ((parts / step).round() * step).reshape(-1)


def experts() -> None:
    for tokens in (1, 3, 9, 13, 70):  # row by row, strips, tiles
        x, bias = numbers(tokens, 96), numbers(50)
        code, scales, weight = packed(50, 96)
        near(OPS.mxfp4_linear(x, code, scales, bias),
             exact(x) @ weight.T + exact(bias))
    N, E, D, F = 9, 3, 64, 32
    x, shares = numbers(N, D), numbers(N, 2)
    ids = torch.rand(N, E).topk(2).indices
    up, down = packed(E, 2 * F, D), packed(E, D, F)
    up_bias, down_bias = numbers(E, 2 * F), numbers(E, D)
    y = answers(x, ids, shares, up[2], up_bias, down[2], down_bias)
    near(OPS.packed_experts(x, ids, shares, *up[:2], up_bias, *down[:2],
                            down_bias, 7.0), y)


def dense() -> None:
    for tokens in (1, 2, 5, 7, 20, 100):  # few, many, more than at once
        x, weight, bias = numbers(tokens, 320), numbers(150, 320), numbers(150)
        near(OPS.linear(x, weight, bias),
             exact(x) @ exact(weight).T + exact(bias))


def attention() -> None:
    for T, S, window in ((1, 700, 0), (20, 90, 0), (20, 90, 8)):
        q, k, v = numbers(1, T, 4, 32), numbers(1, S, 2, 32), numbers(
            1, S, 2, 32)
        sinks, at = numbers(4), np.arange(S)
        asked = at[S - T:]
        score = np.einsum("thc,shc->hts", exact(q)[0],
                          exact(k)[0].repeat(2, 1)) / 32 ** 0.5
        seen = at <= asked[:, None]
        if window:
            seen &= at > asked[:, None] - window
        score = np.where(seen, score, -np.inf)
        sink = np.broadcast_to(exact(sinks)[:, None, None], (4, T, 1))
        share = softmax(np.concatenate([score, sink], -1))[..., :-1]
        near(OPS.sink_attention(
            q, k, v, sinks, torch.from_numpy(asked)[None],
            torch.from_numpy(at)[None], window, 32 ** -0.5),
            np.einsum("hts,shc->thc", share, exact(v)[0].repeat(2, 1))[None])


def unpacked(blocks: torch.Tensor, upper: torch.Tensor, first: torch.Tensor,
             others: torch.Tensor) -> np.ndarray:
    """The bits (m, n) of a matrix in twelve bits a number."""
    each = blocks.numpy().astype(np.uint16)
    i = np.arange(32)
    place = (i & 7) | (i & 8) << 1 | (i & 16) >> 1
    codes = each[..., 64 + place]
    code = np.concatenate([codes & 15, codes >> 4], -1)
    lower = np.concatenate([each[..., place], each[..., 32 + place]], -1)
    bits = upper.numpy().astype(np.uint16)[code] << 8 | lower
    bits = bits.reshape(len(each), -1)
    apart, row = others.numpy().view(np.uint32), first.numpy()
    for r in range(len(bits)):
        for word in apart[row[r]:row[r + 1]]:
            bits[r, word >> 16] = word & 0xffff
    return bits


def compact() -> None:
    if not hasattr(OPS, "pack_compact") or not torch._C. \
            _dispatch_has_kernel_for_dispatch_key(
                "gptoss::pack_compact", "CPU"):
        return  # for AVX2 and more only
    weight, bias = 0.02 * numbers(140, 192), numbers(140)
    weight[torch.rand(weight.shape) < 0.02] *= 1e-9  # these stand apart
    made = OPS.pack_compact(weight)
    assert len(made[3])
    assert (unpacked(*made) == weight.view(torch.int16).numpy().view(
        np.uint16)).all()
    for tokens in (1, 3, 9):
        x = numbers(tokens, 192)
        near(OPS.compact_linear(x, weight, bias, *made),
             exact(x) @ exact(weight).T + exact(bias))


def eight() -> None:
    weight, bias = 0.02 * numbers(140, 192), numbers(140)
    values, scales = OPS.pack_eight(weight)
    place = np.arange(64).reshape(2, 2, 16).swapaxes(0, 1).reshape(64)
    step = exact(scales.view(torch.bfloat16)).repeat(32, axis=1)
    twin = values.numpy().reshape(140, 3, 64)[..., place].reshape(140, 192)
    twin = twin * step
    assert (np.abs(twin - exact(weight)) <= step / 2).all()
    for tokens in (1, 3, 9, 23):  # row by row, strips or tiles
        x = numbers(tokens, 192)
        near(OPS.eight_linear(x, values, scales, bias),
             exact(x) @ twin.T + exact(bias))


def coarse() -> None:
    """Activations that are whole steps, so that none is between two."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key(
            "gptoss::packed_experts_eight", "CPU"):
        return  # for AVX2 and more only
    E, D, F = 3, 544, 96  # more blocks than a tile is deep
    up, down = packed(E, 2 * F, D), packed(E, D, F)
    up_bias, down_bias = numbers(E, 2 * F), numbers(E, D)
    for N in (1, 5, 9, 40):  # row by row, tiles that are full or not
        whole = torch.randint(-126, 127, (N, D))
        whole[:, ::32] = 127
        x, shares = (whole / 2 ** 9).bfloat16(), numbers(N, 2)
        ids = torch.rand(N, E).topk(2).indices
        as_it_is = "AMX" in OPS.kernels_name()  # stored in bf16 is enough
        y = answers(x, ids, shares, up[2], up_bias, down[2], down_bias,
                    *[] if as_it_is else [in_steps])
        near(OPS.packed_experts_eight(x, ids, shares, *up[:2], up_bias,
                                      *down[:2], down_bias, 7.0), y)


def recording() -> None:
    x, out, made = numbers(3, 4), torch.zeros(3, 4), torch.classes.gptoss
    with torch.inference_mode():
        calls = made.Recording()
        calls.begin()
        out.copy_((x + x).float() * 3)
        assert calls.end() == ""
        for _ in range(2):
            x.copy_(numbers(3, 4))
            calls.replay()
            near(out, exact(x) * 6)
        calls = made.Recording()
        calls.begin()
        x[0, 0].item()
        assert "gives no tensor" in calls.end()


TWINS = {"small": small, "packed": packed_row, "experts": experts,
         "dense": dense, "attention": attention, "compact": compact,
         "eight": eight, "coarse": coarse, "recording": recording}


def main(variant: str, last: str) -> None:
    build.OPTIONS = ("-O1", *build.OPTIONS[1:])
    parts = build.PARTS[:build.PARTS.index(last) + 1]
    path = build.build(variant, parts=parts)
    torch.ops.load_library(str(path))
    path.unlink()  # nobody will load it again
    Path(path).with_suffix(".sha256").unlink()
    torch.manual_seed(0)
    with torch.inference_mode():
        for part in parts:
            TWINS.get(part, lambda: None)()
    print(OPS.kernels_name(), "up to", last)


if __name__ == "__main__":
    main(*sys.argv[1:])
