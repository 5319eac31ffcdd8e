"""Can a circuit be planted?

Generated from book/training/planting.py; edit the chapter, not this file.
"""

from typing import cast

import torch
from torch import Tensor, nn

from gptoss.attention.rope import rope_parameters
from gptoss.model.layers import Attention, Block
from gptoss.model.transformer import GptOss
from gptoss.weights.config import GptOssConfig

# --- Where do the weights start? ---------------------------------------------

def start_at_random(model: GptOss, seed: int) -> None:
    """Draw the matrices from normal(0, 1 / columns), in place.

    A standard deviation of 0.02 suits D = 2880, since 2880**-0.5 = 0.019;
    in a narrow model it makes every layer whisper, and learning to look
    back took more than twice the steps.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and not name.endswith("bias"):
            scale = parameter.shape[-1] ** -0.5
            nn.init.normal_(parameter, std=scale, generator=generator)


# --- How are the two heads set? ----------------------------------------------

PULL = (8.0, 8.0, 4.0)  # on the score, of the three fastest pairs


def rows_of(n: int, size: int) -> slice:
    """The rows of head, or of group, `n`."""
    return slice(n * size, (n + 1) * size)


def look_back(attention: Attention, config: GptOssConfig, group: int,
              head: int) -> None:
    """`head` of `group` and the next look one and two tokens back, whatever
    these are: biases alone decide, in the three fastest pairs."""
    C, n = config.head_dim, len(PULL)
    frequencies, concentration = rope_parameters(config)
    fast = frequencies[:n].float()
    size = (torch.tensor(PULL) * C ** 0.5 / concentration ** 2).sqrt()
    keys = rows_of(group, C)
    attention.k_proj.bias[keys] = 0
    for start in (0, C // 2):
        channels = slice(keys.start + start, keys.start + start + n)
        attention.k_proj.weight[channels] = 0
    attention.k_proj.bias[keys.start:keys.start + n] = size
    for offset in (1, 2):
        rows = rows_of(head + offset - 1, C)
        queries = attention.q_proj.bias[rows].zero_()
        attention.q_proj.weight[rows] = 0
        queries[:n] = size * torch.cos(fast * offset)
        queries[C // 2:C // 2 + n] = -size * torch.sin(fast * offset)


def look_for(attention: Attention, config: GptOssConfig, group: int,
             head: int, token: Tensor) -> None:
    """`head` of `group` looks for places with the present token beside
    them, in pairs slow enough to mean the same far away."""
    C, half = config.head_dim, config.hidden_size // 2
    slow = torch.tensor([n for n in range(C) if n % (C // 2) > len(PULL)])
    queries, keys = torch.zeros(C, 2 * half), attention.k_proj.weight
    queries[slow, :half] = 2.0 * token[:len(slow)]
    attention.q_proj.weight[rows_of(head, C)] = queries
    keys[group * C + slow] = 0
    beside = half + group * C + torch.arange(len(slow))
    keys[group * C + slow, beside] = 4.0


def carry(attention: Attention, group: int, head: int, token: Tensor,
          out: Tensor, start: int) -> None:
    """What `head` of `group` sees, it writes from `start` on."""
    size, half = token.shape
    values = attention.v_proj.weight[rows_of(group, size)].zero_()
    values[:, :half] = token
    written = attention.o_proj.weight[:, rows_of(head, size)].zero_()
    written[start:start + len(out)] = out


@torch.no_grad()
def plant_copying(model: GptOss, seed: int) -> None:
    """Begin with the circuit that copies, in place.

    Layer 0 writes the previous token beside each one; layers 1 and 3 look
    for the present token beside an earlier one, and say that one. The
    first half of the residual stream holds the token itself. Every other
    head and expert starts more quietly than `start_at_random` left it.
    """
    config, generator = model.config, torch.Generator().manual_seed(seed)
    C, half = config.head_dim, config.hidden_size // 2
    embedding, head = model.embed_tokens.weight, model.lm_head.weight
    words = torch.randn(len(embedding), half, generator=generator) * 0.7
    inner, outer = (torch.linalg.qr(torch.randn(
        half, half, generator=generator))[0].T for _ in range(2))
    embedding.zero_()[:, :half] = words
    head.zero_()[:, half:] = words / 0.7 / half ** 0.5 @ inner.T @ outer
    blocks = [cast(Block, layer) for layer in model.layers]
    for layer in blocks:
        layer.self_attn.o_proj.weight.mul_(0.3)
        layer.mlp.experts.down_proj.mul_(0.1)
    for group in range(config.num_key_value_heads):
        at, first = rows_of(group, C), blocks[0].self_attn
        place = group, group * (config.num_attention_heads
                                // config.num_key_value_heads)
        look_back(first, config, *place)
        carry(first, *place, inner[at], torch.eye(C) / 2, half + at.start)
        for layer in blocks[1:4:2]:
            look_for(layer.self_attn, config, *place, inner[at])
            carry(layer.self_attn, *place, inner[at], 1.3 * outer[at].T, half)


__all__ = [
    "PULL",
    "carry",
    "look_back",
    "look_for",
    "plant_copying",
    "rows_of",
    "start_at_random",
]
