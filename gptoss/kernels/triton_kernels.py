"""The same on a GPU

Generated from book/kernels/gpu.py; edit the chapter, not this file.
"""

from types import SimpleNamespace

import torch
from torch import Tensor

from gptoss.attention.sinks import softmax_with_sink
from gptoss.moe.experts import clamped_swiglu

# --- How does a nibble become a float? ---------------------------------------

try:
    import triton  # type: ignore[import-not-found]  # may be missing
    import triton.language as tl  # type: ignore[import-not-found]
except ImportError:  # no GPU software: everything else works without
    triton, tl = None, SimpleNamespace(constexpr=None)


def _jit(function):
    return triton.jit(function) if triton else function


@_jit
def decode_fp4(code, scale):
    """Nibbles and scale bytes (int32) -> fp32 values, by their bits."""
    size = code & 7
    bits = tl.where(size > 1, ((size >> 1) + 126 << 23) | (size & 1) << 22,
                    (size & 1) * 0x3F000000)
    value = (bits | (code & 8) << 28).to(tl.float32, bitcast=True)
    power = tl.maximum(scale << 23, 1 << 22).to(tl.float32, bitcast=True)
    return value * (power + 0.0 * power)


# --- What does one program compute? ------------------------------------------

@_jit
def packed_rows(x, w, s, y, order, tile_expert, tile_begin, tile_end, rows,
                blocks, K: tl.constexpr, M: tl.constexpr,
                N: tl.constexpr, STEP: tl.constexpr):
    """y[pick] = rows of the pick's expert times x[pick // K], a tile."""
    row = tl.program_id(0) * M + tl.arange(0, M)
    tile = tl.program_id(1)
    expert = tl.load(tile_expert + tile).to(tl.int64)
    begin, end = tl.load(tile_begin + tile), tl.load(tile_end + tile)
    if begin == end:  # one of the tiles that are there for the worst case
        return
    place = begin + tl.arange(0, N)
    real = place < end
    pick = tl.load(order + place, real, 0)
    width = blocks * 16
    line = expert * rows + row
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, width, STEP):
        column = start + tl.arange(0, STEP)
        inside = (row < rows)[:, None] & (column < width)[None]
        code = tl.load(w + line[:, None] * width + column[None], inside,
                       0).to(tl.int32)
        scale = tl.load(s + line[:, None] * blocks + column[None] // 16,
                        inside, 0).to(tl.int32)
        at = (pick // K)[None] * width * 2 + column[:, None] * 2
        seen = real[None] & (column < width)[:, None]
        even = tl.load(x + at, seen, 0.0)
        odd = tl.load(x + at + 1, seen, 0.0)
        total = tl.dot(decode_fp4(code & 15, scale).to(even.dtype), even,
                       total, input_precision="ieee")
        total = tl.dot(decode_fp4(code >> 4, scale).to(odd.dtype), odd,
                       total, input_precision="ieee")
    tl.store(y + pick[None] * rows + row[:, None], total,
             (row < rows)[:, None] & real[None])


# --- How many tiles? ---------------------------------------------------------

def token_tiles(ids: Tensor, experts: int, size: int) -> tuple[Tensor, ...]:
    """Slots sorted by expert, cut into tiles of one expert each.

    ids (N, K) -> order (N K,), and for each of as many tiles as there can
    be its expert, and where its picks begin and the expert's end in order;
    int32. An empty tile begins where it ends. No shape depends on ids.
    """
    flat = ids.flatten().long()
    order = flat.argsort(stable=True)
    counts = flat.new_zeros(experts).scatter_add_(
        0, flat, torch.ones_like(flat))
    tiles = (counts + size - 1) // size
    most = min(experts, len(flat))
    number = torch.arange(most + (len(flat) - most) // size,
                          device=ids.device)
    after = tiles.cumsum(0)  # the first tile that is not this expert's
    expert = torch.searchsorted(after, number, right=True)
    expert = expert.clamp(max=experts - 1)  # beyond the last: empty
    end = counts.cumsum(0)[expert]
    begin = (end - counts[expert]
             + (number - (after - tiles)[expert]) * size).minimum(end)
    return tuple(t.int() for t in (order, expert, begin, end))


def packed_linear_tiles(x: Tensor, ids: Tensor, blocks: Tensor,
                        scales: Tensor, shared: int = 1) -> Tensor:
    """(picks, rows) fp32: row pick // shared of x times the pick's expert.

    x (…, n); ids (picks,); blocks (E, rows, n/32, 16). Few picks make
    narrow tiles (decode), many wide ones (prefill).
    """
    E, rows, width = scales.shape
    wide = 64 if ids.numel() >= 16 * E else 16
    order, *tiles = token_tiles(ids, E, wide)
    y = torch.empty(ids.numel(), rows, dtype=torch.float32, device=x.device)
    packed_rows[(triton.cdiv(rows, 32), len(tiles[0]))](
        x, blocks, scales, y, order, *tiles, rows, width, K=shared, M=32,
        N=wide, STEP=64)
    return y


def experts_by_triton(x, ids, weights, gate_up_blocks, gate_up_scales,
                      gate_up_bias, down_blocks, down_scales, down_bias,
                      limit):
    """gptoss::packed_experts on a GPU; between the layers in x.dtype."""
    flat, K = ids.flatten(), ids.shape[1]
    up = packed_linear_tiles(x.contiguous(), flat, gate_up_blocks,
                             gate_up_scales, K)
    hidden = clamped_swiglu(up + gate_up_bias[flat].float(), limit)
    out = packed_linear_tiles(hidden.to(x.dtype), flat, down_blocks,
                              down_scales)
    out = (out + down_bias[flat].float()).view(*ids.shape, -1)
    return (out * weights.float()[..., None]).sum(1).to(x.dtype)


# --- How is attention cut into enough pieces? --------------------------------

@_jit
def attend_tile(q, k, v, q_pos, k_pos, y, lse, T, S, H, G, window, scale,
                kb, ks, kg, C: tl.constexpr, J: tl.constexpr,
                N: tl.constexpr, KEYS: tl.constexpr):
    """N rows (tokens times J query heads of a key head), a part of keys."""
    g, b = tl.program_id(1) % G, (tl.program_id(1) // G).to(tl.int64)
    part, parts = tl.program_id(2), tl.num_programs(2)
    row = tl.program_id(0) * N + tl.arange(0, N)
    token, head = row // J, g * J + row % J
    real = token < T
    at = (b * T + token) * H + head
    query = tl.load(q + at[:, None] * C + tl.arange(0, C)[None],
                    real[:, None], 0.0)
    position = tl.load(q_pos + b * T + token, real, -1)
    top = tl.full((N,), -3.0e38, tl.float32)
    total = tl.zeros((N,), tl.float32)
    out = tl.zeros((N, C), tl.float32)
    for start in range(part * KEYS, S, parts * KEYS):
        key = start + tl.arange(0, KEYS)
        there = tl.load(k_pos + b * S + key, key < S, -1)
        seen = (there[None] >= 0) & (there[None] <= position[:, None])
        seen = seen & ((window == 0)
                       | (there[None] > position[:, None] - window))
        wanted = tl.max(seen.to(tl.int32), 0)
        if tl.max(wanted, 0) > 0:
            from_ = b * kb + key[:, None] * ks + g * kg
            from_ += tl.arange(0, C)[None]
            keys = tl.load(k + from_, wanted[:, None] > 0, 0.0)
            values = tl.load(v + from_, wanted[:, None] > 0, 0.0)
            scores = tl.dot(query, tl.trans(keys),
                            input_precision="ieee") * scale
            scores = tl.where(seen, scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 1))
            weights = tl.exp(scores - higher[:, None])
            shrink = tl.exp(top - higher)
            total = total * shrink + tl.sum(weights, 1)
            out = tl.dot(weights.to(values.dtype), values,
                         out * shrink[:, None], input_precision="ieee")
            top = higher
    some = tl.where(total > 0, total, 1.0)
    at = at * parts + part
    tl.store(y + at[:, None] * C + tl.arange(0, C)[None],
             out / some[:, None], real[:, None])
    tl.store(lse + at, tl.where(total > 0, top + tl.log(some),
                                float("-inf")), real)


PROGRAMS = 256  # of attention that a GPU should have to do at a time


def attention_by_triton(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor,
                        q_pos: Tensor, k_pos: Tensor, window: int,
                        scale: float) -> Tensor:
    """gptoss::sink_attention on a GPU; k and v with equal strides."""
    B, T, H, C = q.shape
    S, G = k.shape[1:3]
    tiles, keys = triton.cdiv(T * (H // G), 16), 32
    parts = min(triton.cdiv(S, keys),
                max(1, PROGRAMS // (tiles * B * G)))
    y = q.new_empty(B, T, H, parts, C, dtype=torch.float32)
    lse = q.new_empty(B, T, H, parts, dtype=torch.float32)
    attend_tile[(tiles, B * G, parts)](
        q.contiguous(), k, v, q_pos.expand(B, T).contiguous(),
        k_pos.expand(B, S).contiguous(), y, lse, T, S, H, G, window, scale,
        *k.stride()[:3], C=C, J=H // G, N=16, KEYS=keys)
    shares = softmax_with_sink(lse.transpose(1, 2), sinks).transpose(1, 2)
    return (shares[..., None] * y).sum(3).to(q.dtype)


def use_triton() -> None:
    """Register these kernels for CUDA: to generate with, not to train.

    RuntimeError without Triton.
    """
    if triton is None:
        raise RuntimeError("use_triton: expected the package triton")
    torch.library.impl("gptoss::packed_experts", "CUDA", experts_by_triton)
    torch.library.impl("gptoss::sink_attention", "CUDA", attention_by_triton)


__all__ = [
    "PROGRAMS",
    "attend_tile",
    "attention_by_triton",
    "decode_fp4",
    "experts_by_triton",
    "packed_linear_tiles",
    "packed_rows",
    "token_tiles",
    "use_triton",
]
