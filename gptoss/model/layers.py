"""What is one block?

Generated from book/model/layers.py; edit the chapter, not this file.
"""

import torch
from torch import Tensor, nn

from gptoss.model.cache import CacheView
from gptoss.model.ops import packed_experts
from gptoss.moe.experts import experts_grouped
from gptoss.weights.config import GptOssConfig
from gptoss.weights.mxfp4 import BLOCK, PackedMXFP4

# --- Layers ------------------------------------------------------------------

class RMSNorm(nn.Module):
    """`rms_norm` with its weight (D,), at first all ones."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype,
                 device=None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(
            torch.ones(size, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.gptoss.rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class Linear(nn.Linear):
    """torch's linear layer, computed by the operator gptoss::linear."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.gptoss.linear(x, self.weight, self.bias)


class Router(Linear):
    """A linear layer with bias from D to E logits, and `route`."""

    def __init__(self, config: GptOssConfig,
                 dtype: torch.dtype | None = None, device=None) -> None:
        super().__init__(config.hidden_size, config.num_local_experts,
                         bias=True, device=device, dtype=dtype)
        self.k = config.num_experts_per_tok

    def forward(  # type: ignore[override]  # a choice, not a tensor
            self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (N, D) -> weights (N, K) in x.dtype, ids (N, K) int64."""
        return torch.ops.gptoss.route(super().forward(x), self.k)


# --- What do the experts hold? -----------------------------------------------

class Experts(nn.Module):
    """The E experts of one layer, packed (MXFP4) or dense (dtype)."""

    gate_up_proj: nn.Parameter  # (E, 2F, D), dense ones alone
    down_proj: nn.Parameter  # (E, D, F), dense ones alone
    gate_up_proj_bias: nn.Parameter  # (E, 2F)
    down_proj_bias: nn.Parameter  # (E, D)

    def __init__(self, config: GptOssConfig, packed: bool = True,
                 dtype: torch.dtype = torch.bfloat16, device=None) -> None:
        super().__init__()
        E, D = config.num_local_experts, config.hidden_size
        width = config.intermediate_size
        self.packed, self.limit = packed, config.swiglu_limit
        for name, rows, columns in (("gate_up_proj", 2 * width, D),
                                    ("down_proj", D, width)):
            make = self._make_packed if packed else self._make_dense
            make(name, E, rows, columns, dtype, device)
            bias = torch.zeros(E, rows, dtype=dtype, device=device)
            setattr(self, f"{name}_bias", nn.Parameter(bias))

    def _make_dense(self, name, E, rows, columns, dtype, device) -> None:
        weight = torch.empty(E, rows, columns, dtype=dtype, device=device)
        if not weight.is_meta:  # there is nothing to draw there
            nn.init.normal_(weight, std=0.02)
        setattr(self, name, nn.Parameter(weight))

    def _make_packed(self, name, E, rows, columns, dtype, device) -> None:
        if columns % BLOCK:
            raise ValueError(f"{name}: expected an input width divisible by "
                             f"{BLOCK} to pack it, found {columns}")
        shape = (E, rows, columns // BLOCK)
        for part, size in (("blocks", (*shape, BLOCK // 2)),
                           ("scales", shape)):
            self.register_buffer(f"{name}_{part}", torch.zeros(
                size, dtype=torch.uint8, device=device))

    def _packed(self, name: str) -> PackedMXFP4:
        return PackedMXFP4(getattr(self, f"{name}_blocks"),
                           getattr(self, f"{name}_scales"))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """x (N, D), ids and weights (N, K) -> (N, D)."""
        if self.packed:
            return packed_experts(
                x, ids, weights, self._packed("gate_up_proj"),
                self.gate_up_proj_bias, self._packed("down_proj"),
                self.down_proj_bias, self.limit)
        return experts_grouped(
            x, ids, weights, self.gate_up_proj, self.gate_up_proj_bias,
            self.down_proj, self.down_proj_bias, self.limit)

    def extra_repr(self) -> str:
        E, D = self.down_proj_bias.shape
        return (f"experts={E}, hidden={D}, "
                f"intermediate={self.gate_up_proj_bias.shape[1] // 2}, "
                f"packed={self.packed}")


# --- What does attention add to the operator? --------------------------------

class Attention(nn.Module):
    """Grouped-query attention with RoPE, sinks and, perhaps, a window."""

    def __init__(self, config: GptOssConfig, layer: int,
                 dtype: torch.dtype, device=None) -> None:
        super().__init__()
        D, C = config.hidden_size, config.head_dim
        H, G = config.num_attention_heads, config.num_key_value_heads
        self.layer, self.head_dim = layer, C
        kinds = config.layer_types or ()
        sliding = kinds[layer] == "sliding_attention"
        self.window = config.sliding_window if sliding else 0
        like = {"dtype": dtype, "device": device}
        self.q_proj = Linear(D, H * C, **like)
        self.k_proj = Linear(D, G * C, **like)
        self.v_proj = Linear(D, G * C, **like)
        self.o_proj = Linear(H * C, D, **like)
        self.sinks = nn.Parameter(torch.zeros(H, **like))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor,
                positions: Tensor, plan: CacheView | None = None) -> Tensor:
        """x (B, T, D), tables (B, T, C/2), positions (B, T) -> (B, T, D)."""
        heads = (*x.shape[:2], -1, self.head_dim)
        q = torch.ops.gptoss.rope(self.q_proj(x).view(heads), cos, sin)
        k = torch.ops.gptoss.rope(self.k_proj(x).view(heads), cos, sin)
        v, k_pos = self.v_proj(x).view(heads), positions
        if plan is not None:
            k, v, k_pos = plan.update(self.layer, k, v)
        out = torch.ops.gptoss.sink_attention(
            q, k, v, self.sinks, positions, k_pos, self.window,
            self.head_dim ** -0.5)
        return self.o_proj(out.flatten(2))

    def extra_repr(self) -> str:
        return (f"layer={self.layer}, heads={len(self.sinks)}, "
                f"head_dim={self.head_dim}, window={self.window or None}")


# --- How do the halves make a block? -----------------------------------------

class MLP(nn.Module):
    """The router and the experts it chooses from."""

    def __init__(self, config: GptOssConfig, dtype: torch.dtype,
                 device=None, packed: bool = True) -> None:
        super().__init__()
        self.router = Router(config, dtype=dtype, device=device)
        self.experts = Experts(config, packed, dtype, device)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D), each token on its own."""
        tokens = x.flatten(0, 1)
        weights, ids = self.router(tokens)
        return self.experts(tokens, ids, weights).view_as(x)

    def extra_repr(self) -> str:
        return f"experts_per_token={self.router.k}"


class Block(nn.Module):
    """One layer: attention and experts, each added to the stream."""

    def __init__(self, config: GptOssConfig, layer: int, dtype: torch.dtype,
                 device=None, packed: bool = True) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(D, eps, dtype, device)
        self.self_attn = Attention(config, layer, dtype, device)
        self.post_attention_layernorm = RMSNorm(D, eps, dtype, device)
        self.mlp = MLP(config, dtype, device, packed)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor,
                positions: Tensor, plan: CacheView | None = None) -> Tensor:
        """x (B, T, D) -> (B, T, D); the rest as in `Attention.forward`."""
        h = x + self.self_attn(self.input_layernorm(x), cos, sin, positions,
                               plan)
        return h + self.mlp(self.post_attention_layernorm(h))


# --- What is there before a file is read? ------------------------------------

class Embedding(nn.Embedding):
    """torch's embedding; on the meta device there is nothing to draw."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


def initialise(model: nn.Module) -> None:
    """Linear and embedding weights normal(0, 0.02), biases 0, in place."""
    for module in model.modules():
        if (isinstance(module, nn.Linear | nn.Embedding)
                and not module.weight.is_meta):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


__all__ = [
    "Attention",
    "Block",
    "Embedding",
    "Experts",
    "Linear",
    "MLP",
    "RMSNorm",
    "Router",
    "initialise",
]
