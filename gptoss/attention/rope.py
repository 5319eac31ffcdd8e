"""From RoPE to YaRN

Generated from book/attention/rope.py; edit the chapter, not this file.
"""

import math

import torch
from torch import Tensor

from gptoss.weights.config import GptOssConfig

# --- Which pairs are slowed? -------------------------------------------------

def correction_range(
    head_dim: int,
    theta: float,
    original: int = 4096,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = False,
) -> tuple[float, float]:
    """Pair indices (low, high) between which YaRN blends.

    Pairs up to low turn more than beta_fast times in `original` tokens and
    keep their speed; pairs from high on turn less than beta_slow times and
    are slowed by the full factor. gpt-oss rounds neither end; truncate=True
    rounds low down and high up, as other YaRN models do.
    """

    def pair_that_turns(times: float) -> float:
        log_angle = math.log(original / (times * 2 * math.pi))
        return (head_dim * log_angle) / (2 * math.log(theta))

    low, high = pair_that_turns(beta_fast), pair_that_turns(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, head_dim - 1)


# --- How fast does each pair turn? -------------------------------------------

def _ramp(low: float, high: float, pairs: int) -> Tensor:
    """0 up to pair `low`, 1 from pair `high`, straight between. (pairs,)"""
    if low == high:
        high += 0.001  # a step; the value is transformers' own
    pair = torch.arange(pairs, dtype=torch.float32, device="cpu")
    return ((pair - low) / (high - low)).clamp(0, 1)


def inverse_frequencies(
    head_dim: int,
    theta: float,
    factor: float = 1.0,
    original: int = 4096,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = False,
    device: torch.device | str | None = None,
) -> Tensor:
    """Angular speed of each pair, (C/2,) fp32, in radians a token.

    factor 1 is plain RoPE; above 1 it is YaRN's blend. The order of the
    operations is that of transformers' modeling_rope_utils, so that the
    result is equal to it bit for bit; computed on the CPU, then moved, as
    the last bit of a power differs between devices.
    ValueError: odd head_dim, factor < 1.
    """
    if head_dim % 2 or head_dim < 2:
        raise ValueError(f"head_dim: expected even, found {head_dim}")
    if not factor >= 1.0:
        raise ValueError(f"rope factor: expected >= 1, found {factor}")
    even = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu")
    wave = theta ** (even / head_dim)  # tokens a radian
    if factor == 1.0:
        return (1.0 / wave).to(device)
    slow, fast = 1.0 / (factor * wave), 1.0 / wave
    low, high = correction_range(
        head_dim, theta, original, beta_fast, beta_slow, truncate
    )
    keep = 1 - _ramp(low, high, head_dim // 2)
    return (slow * (1 - keep) + fast * keep).to(device)


# --- By how much are scores sharpened? ---------------------------------------

def concentration(factor: float) -> float:
    """Factor on both cos and sin; scores get its square. 1.0 if factor <= 1.

    The YaRN paper's sqrt(1/t): the temperature t divides every score.
    """
    return 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1.0


def rope_parameters(
    config: GptOssConfig, device: torch.device | str | None = None
) -> tuple[Tensor, float]:
    """(inv_freq (C/2,) fp32, concentration) of a configuration."""
    if config.rope_type == "default":
        return inverse_frequencies(
            config.head_dim, config.rope_theta, device=device
        ), 1.0
    inv_freq = inverse_frequencies(
        config.head_dim,
        config.rope_theta,
        factor=config.rope_factor,
        original=config.initial_context_length,
        beta_fast=config.rope_beta_fast,
        beta_slow=config.rope_beta_slow,
        truncate=config.rope_truncate,
        device=device,
    )
    return inv_freq, concentration(config.rope_factor)


# --- By which angle is a token turned? ---------------------------------------

def rope_tables(
    positions: Tensor,
    inv_freq: Tensor,
    concentration: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """cos and sin, each (..., T, C/2) in dtype, of integer positions.

    positions (..., T), inv_freq (C/2,) in radians a token.
    Angles, cos and sin are computed in inv_freq's type (fp32; float64 if a
    test asks for it), times the concentration, and only then cast. Padding
    (position -1) gets some finite row that no mask lets through.
    TypeError: inv_freq narrower than fp32, which would move distant tokens.
    """
    if inv_freq.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"inv_freq: expected float32 or float64, found {inv_freq.dtype}"
        )
    angle = positions[..., None].to(inv_freq.dtype) * inv_freq
    cos, sin = angle.cos() * concentration, angle.sin() * concentration
    return cos.to(dtype), sin.to(dtype)


# --- How is a vector turned? -------------------------------------------------

def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (B, T, H, C) by tables (B, T, C/2); same shape and dtype.

    Half-split: channel i is paired with channel i + C/2, not with i + 1.
    """
    cos = cos.to(x.dtype).unsqueeze(-2)  # one angle for all heads
    sin = sin.to(x.dtype).unsqueeze(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat(
        (first * cos - second * sin, second * cos + first * sin), dim=-1
    )


__all__ = [
    "apply_rope",
    "concentration",
    "correction_range",
    "inverse_frequencies",
    "rope_parameters",
    "rope_tables",
]
