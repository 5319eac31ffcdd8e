"""gpt-oss in float64 with numpy and loops: slow, and hard to get wrong.

Written from the formulas, not from gptoss/: one query, one head, one expert
at a time, no masks (a query is given the keys that it may see), the sink as
one more term of the denominator.
"""

import math

import numpy as np
import torch
from torch import Tensor

from gptoss.weights.config import GptOssConfig

GRID = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


def inverse_frequencies(config: GptOssConfig) -> np.ndarray:
    """YaRN in float64, one pair after the other; (C/2,)."""
    C, base = config.head_dim, config.rope_theta
    yarn = config.rope_type == "yarn" and config.rope_factor > 1

    def pair_turning(times: float) -> float:
        wave = config.initial_context_length / (2 * math.pi * times)
        return C / 2 * math.log(wave) / math.log(base)

    out = []
    for i in range(C // 2):
        plain = base ** (-2 * i / C)
        if not yarn:
            out.append(plain)
            continue
        low = max(pair_turning(config.rope_beta_fast), 0)
        high = min(pair_turning(config.rope_beta_slow), C - 1)
        slowed = min(max((i - low) / (high - low), 0), 1)
        out.append(plain * (1 - slowed) + plain / config.rope_factor * slowed)
    return np.array(out)


def rotate(x: np.ndarray, position: int, inv_freq: np.ndarray,
           factor: float) -> np.ndarray:
    """One head (C,) at one position, as complex numbers."""
    half = len(x) // 2
    turned = (x[:half] + 1j * x[half:]) * np.exp(1j * position * inv_freq)
    return factor * np.concatenate([turned.real, turned.imag])


def norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x ** 2).mean(-1, keepdims=True) + eps) * weight


def unpack(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """MXFP4 -> float64, byte by byte through a list."""
    grid = np.array(GRID, dtype=np.float64)
    pairs = np.stack([grid[blocks % 16], grid[blocks // 16]], axis=-1)
    values = pairs.reshape(*blocks.shape[:-1], 32)
    values = values * 2.0 ** (scales.astype(np.float64) - 127)[..., None]
    return values.reshape(*scales.shape[:-1], -1)


def forward(config: GptOssConfig, tensors: dict[str, Tensor],
            tokens: list[int], inv_freq: np.ndarray | None = None
            ) -> np.ndarray:
    """Logits (T, V) of tokens (T,), from tensors by canonical HF name."""
    def w(name: str) -> np.ndarray:
        t = tensors[name]
        return (t if t.dtype == torch.uint8 else t.double()).numpy()

    if inv_freq is None:
        inv_freq = inverse_frequencies(config)
    x = w("model.embed_tokens.weight")[tokens]
    for n in range(config.num_hidden_layers):
        def p(name: str, n: int = n) -> np.ndarray:
            return w(f"model.layers.{n}.{name}")

        eps = config.rms_norm_eps
        x = x + attention(config, n, p, inv_freq,
                          norm(x, p("input_layernorm.weight"), eps))
        h = norm(x, p("post_attention_layernorm.weight"), eps)
        x = x + experts(config, p, h)
    x = norm(x, w("model.norm.weight"), config.rms_norm_eps)
    return x @ w("lm_head.weight").T


def attention(config: GptOssConfig, layer: int, p, inv_freq: np.ndarray,
              x: np.ndarray) -> np.ndarray:
    """Self-attention of (T, D), one query and one head at a time."""
    H, G, C = (config.num_attention_heads, config.num_key_value_heads,
               config.head_dim)
    yarn = config.rope_type == "yarn" and config.rope_factor > 1
    factor = 0.1 * math.log(config.rope_factor) + 1 if yarn else 1.0
    q, k, v = ((x @ p(f"self_attn.{name}_proj.weight").T
                + p(f"self_attn.{name}_proj.bias")).reshape(len(x), -1, C)
               for name in "qkv")
    sinks, out = p("self_attn.sinks"), np.zeros((len(x), H, C))
    sliding = config.layer_types[layer] == "sliding_attention"
    for t in range(len(x)):
        first = max(0, t - config.sliding_window + 1) if sliding else 0
        for h in range(H):
            g = h // (H // G)
            query = rotate(q[t, h], t, inv_freq, factor)
            scores = np.array([
                query @ rotate(k[s, g], s, inv_freq, factor) / math.sqrt(C)
                for s in range(first, t + 1)])
            most = max(scores.max(), sinks[h])
            weights = np.exp(scores - most)
            weights /= weights.sum() + np.exp(sinks[h] - most)
            out[t, h] = weights @ v[first:t + 1, g]
    return (out.reshape(len(x), H * C) @ p("self_attn.o_proj.weight").T
            + p("self_attn.o_proj.bias"))


def experts(config: GptOssConfig, p, x: np.ndarray) -> np.ndarray:
    """The K experts chosen for each of (T, D), one after the other."""
    logits = x @ p("mlp.router.weight").T + p("mlp.router.bias")
    up_weights = unpack(p("mlp.experts.gate_up_proj_blocks"),
                        p("mlp.experts.gate_up_proj_scales"))
    down_weights = unpack(p("mlp.experts.down_proj_blocks"),
                          p("mlp.experts.down_proj_scales"))
    up_bias = p("mlp.experts.gate_up_proj_bias")
    down_bias = p("mlp.experts.down_proj_bias")
    limit, out = config.swiglu_limit, np.zeros_like(x)
    for t in range(len(x)):
        chosen = np.argsort(-logits[t])[:config.num_experts_per_tok]
        share = np.exp(logits[t, chosen] - logits[t, chosen].max())
        share /= share.sum()
        for e, weight in zip(chosen, share, strict=True):
            both = up_weights[e] @ x[t] + up_bias[e]
            gate = np.minimum(both[0::2], limit)
            up = np.clip(both[1::2], -limit, limit)
            hidden = (up + 1) * gate / (1 + np.exp(-1.702 * gate))
            out[t] += weight * (down_weights[e] @ hidden + down_bias[e])
    return out
