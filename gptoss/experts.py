"""Experts

Generated from book/08_experts.py; edit the chapter, not this file.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptoss.config import GptOssConfig
from gptoss.mxfp4 import BLOCK, PackedMXFP4, decode, define_operator

# --- The clamped SwiGLU ------------------------------------------------------

ALPHA = 1.702  # makes z * sigmoid(ALPHA * z) close to GELU; not in config


def clamped_swiglu(gate_up: Tensor, limit: float = 7.0) -> Tensor:
    """(…, 2F) with gate at even, up at odd entries -> (…, F), same dtype.

    The gate is clamped from above only, up on both sides. The order of the
    multiplications is that of transformers, so that equal inputs give equal
    bits. Source: openai/gpt-oss gpt_oss/torch/model.py, swiglu.
    """
    gate, up = gate_up[..., ::2], gate_up[..., 1::2]
    gate = gate.clamp(max=limit)
    up = up.clamp(-limit, limit)
    return (up + 1) * (gate * torch.sigmoid(gate * ALPHA))


# --- One expert --------------------------------------------------------------

def one_expert(x: Tensor, gate_up_FD: Tensor, gate_up_bias: Tensor,
               down_DF: Tensor, down_bias: Tensor, limit: float = 7.0
               ) -> Tensor:
    """(…, D) -> (…, D) through one expert.

    gate_up_FD (2F, D), gate_up_bias (2F,), down_DF (D, F), down_bias (D,),
    all in x.dtype, any strides.
    """
    hidden = clamped_swiglu(F.linear(x, gate_up_FD, gate_up_bias), limit)
    return F.linear(hidden, down_DF, down_bias)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What the K results are summed in: fp32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


# --- The loop ----------------------------------------------------------------

def experts_loop(x: Tensor, ids: Tensor, weights: Tensor,
                 gate_up_EFD: Tensor, gate_up_bias: Tensor,
                 down_EDF: Tensor, down_bias: Tensor, limit: float = 7.0
                 ) -> Tensor:
    """The slow twin: every token, every choice, one after the other.

    x (N, D); ids (N, K) int64, distinct in a row; weights (N, K);
    gate_up_EFD (E, 2F, D), gate_up_bias (E, 2F), down_EDF (E, D, F),
    down_bias (E, D). Returns (N, D) in x.dtype, summed in fp32.
    """
    y = torch.zeros_like(x, dtype=_wide(x.dtype))
    for n, chosen in enumerate(ids.tolist()):
        for k, e in enumerate(chosen):
            out = one_expert(x[n], gate_up_EFD[e], gate_up_bias[e],
                             down_EDF[e], down_bias[e], limit)
            y[n] += out.to(y.dtype) * weights[n, k].to(y.dtype)
    return y.to(x.dtype)


# --- The gather --------------------------------------------------------------

def experts_gather(x: Tensor, ids: Tensor, weights: Tensor,
                   gate_up_EFD: Tensor, gate_up_bias: Tensor,
                   down_EDF: Tensor, down_bias: Tensor, limit: float = 7.0
                   ) -> Tensor:
    """OpenAI's form: copy the K chosen experts to every token, contract.

    Arguments as in `experts_loop`. Takes 3NKFD numbers of memory.
    """
    gate_up = torch.einsum("nd,nkfd->nkf", x, gate_up_EFD[ids])
    hidden = clamped_swiglu(gate_up + gate_up_bias[ids], limit)
    out = torch.einsum("nkf,nkdf->nkd", hidden, down_EDF[ids])
    out = (out + down_bias[ids]).to(_wide(x.dtype))
    return (out * weights.to(out.dtype)[..., None]).sum(1).to(x.dtype)


# --- Sorting the tokens by expert --------------------------------------------

def by_expert(x: Tensor, ids: Tensor, weights: Tensor, experts: int,
              apply: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Sum over the chosen experts, each called once with all its tokens.

    apply(e, rows (M, D)) -> (M, D) is called in ascending order of e and
    only for the experts hit. Arguments and result as in `experts_loop`.
    """
    order = ids.flatten().argsort(stable=True)  # pick n * K + k, by expert
    counts = torch.bincount(ids.flatten(), minlength=experts).tolist()
    tokens = order // ids.shape[1]
    rows = x.index_select(0, tokens).split(counts)
    shares = weights.flatten().index_select(0, order)[:, None].split(counts)
    y = torch.zeros_like(x, dtype=_wide(x.dtype))
    for e, which in enumerate(tokens.split(counts)):
        if counts[e]:
            out = apply(e, rows[e]).to(y.dtype) * shares[e].to(y.dtype)
            y.index_add_(0, which, out)
    return y.to(x.dtype)


def experts_grouped(x: Tensor, ids: Tensor, weights: Tensor,
                    gate_up_EFD: Tensor, gate_up_bias: Tensor,
                    down_EDF: Tensor, down_bias: Tensor, limit: float = 7.0
                    ) -> Tensor:
    """One pair of matrix products for every expert hit; differentiable.

    Arguments as in `experts_loop`; the weights may have any strides.
    """
    parts = list(zip(gate_up_EFD.unbind(), gate_up_bias.unbind(),
                     down_EDF.unbind(), down_bias.unbind(), strict=True))
    return by_expert(x, ids, weights, len(parts),
                     lambda e, rows: one_expert(rows, *parts[e], limit))


# --- Packed experts ----------------------------------------------------------

def packed_by_decoding(x: Tensor, ids: Tensor, weights: Tensor,
                       gate_up_blocks: Tensor, gate_up_scales: Tensor,
                       gate_up_bias: Tensor, down_blocks: Tensor,
                       down_scales: Tensor, down_bias: Tensor, limit: float
                       ) -> Tensor:
    """`packed_experts` in plain torch: decode an expert, use it, drop it."""
    def apply(e: int, rows: Tensor) -> Tensor:
        return one_expert(
            rows, decode(gate_up_blocks[e], gate_up_scales[e], x.dtype),
            gate_up_bias[e], decode(down_blocks[e], down_scales[e], x.dtype),
            down_bias[e], limit)
    return by_expert(x, ids, weights, len(gate_up_scales), apply)


_PACKED = ("(Tensor x, Tensor ids, Tensor weights, Tensor gate_up_blocks,"
           " Tensor gate_up_scales, Tensor gate_up_bias, Tensor down_blocks,"
           " Tensor down_scales, Tensor down_bias, float limit)")
define_operator(f"gptoss::packed_experts{_PACKED} -> Tensor",
                packed_by_decoding, lambda x, *_: torch.empty_like(x))


# --- Its gradient ------------------------------------------------------------

def swiglu_backward(gate_up: Tensor, grad: Tensor, limit: float) -> Tensor:
    """Gradient of `clamped_swiglu` at gate_up (…, 2F) for grad (…, F)."""
    gate, up = gate_up[..., ::2], gate_up[..., 1::2]
    g, u = gate.clamp(max=limit), up.clamp(-limit, limit)
    s = torch.sigmoid(ALPHA * g)
    slope = s + ALPHA * g * s * (1 - s)  # of g * sigmoid(ALPHA * g)
    d_gate = grad * (u + 1) * slope * (gate <= limit)
    d_up = grad * g * s * (up.abs() <= limit)
    return torch.stack([d_gate, d_up], dim=-1).flatten(-2)


def packed_backward(grad: Tensor, x: Tensor, ids: Tensor, weights: Tensor,
                    gate_up_blocks: Tensor, gate_up_scales: Tensor,
                    gate_up_bias: Tensor, down_blocks: Tensor,
                    down_scales: Tensor, down_bias: Tensor, limit: float
                    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weights and both biases; one expert at a time."""
    wide = _wide(x.dtype)
    d_x, d_weights, d_up, d_down = (
        torch.zeros_like(t, dtype=wide)
        for t in (x, weights, gate_up_bias, down_bias))
    for e in ids.unique().tolist():
        n, k = (ids == e).nonzero(as_tuple=True)
        gate_up_FD = decode(gate_up_blocks[e], gate_up_scales[e], x.dtype)
        down_DF = decode(down_blocks[e], down_scales[e], x.dtype)
        gate_up = F.linear(x[n], gate_up_FD, gate_up_bias[e])
        out = F.linear(clamped_swiglu(gate_up, limit), down_DF, down_bias[e])
        d_weights[n, k] = (grad[n] * out).sum(-1, dtype=wide)
        d_out = grad[n] * weights[n, k, None].to(x.dtype)
        d_gate_up = swiglu_backward(gate_up, d_out @ down_DF, limit)
        d_x.index_add_(0, n, (d_gate_up @ gate_up_FD).to(wide))
        d_up[e], d_down[e] = (t.sum(0, dtype=wide)
                              for t in (d_gate_up, d_out))
    return (d_x.to(x.dtype), d_weights.to(weights.dtype),
            d_up.to(gate_up_bias.dtype), d_down.to(down_bias.dtype))


define_operator(
    f"gptoss::packed_experts_backward(Tensor grad, {_PACKED[1:]}"
    " -> (Tensor, Tensor, Tensor, Tensor)", packed_backward,
    lambda grad, x, ids, weights, a, b, up_bias, c, d, down_bias, limit:
        tuple(map(torch.empty_like, (x, weights, up_bias, down_bias))))


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:-1])
    ctx.limit = inputs[-1]


def _backward(ctx, grad):
    d_x, d_weights, d_up, d_down = torch.ops.gptoss.packed_experts_backward(
        grad.contiguous(), *ctx.saved_tensors, ctx.limit)
    return (d_x, None, d_weights, None, None, d_up, None, None, d_down,
            None)


define_operator(f"gptoss::packed_experts{_PACKED} -> Tensor",
                packed_by_decoding, lambda x, *_: torch.empty_like(x),
                _backward, _setup)


def packed_experts(x: Tensor, ids: Tensor, weights: Tensor,
                   gate_up: PackedMXFP4, gate_up_bias: Tensor,
                   down: PackedMXFP4, down_bias: Tensor, limit: float = 7.0
                   ) -> Tensor:
    """`experts_grouped` on weights that stay in four bits.

    gate_up (E, 2F, D) and down (E, D, F) packed; the rest as in
    `experts_loop`. Decodes the experts hit, one at a time. Differentiable
    in x, weights and the biases; the packed weights are constants.
    """
    return torch.ops.gptoss.packed_experts(
        x, ids, weights, gate_up.blocks, gate_up.scales, gate_up_bias,
        down.blocks, down.scales, down_bias, limit)


# --- The module --------------------------------------------------------------

class Experts(nn.Module):
    """The E experts of one layer, packed (MXFP4) or dense (dtype)."""

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

    def _weight(self, name: str) -> PackedMXFP4 | Tensor:
        if not self.packed:
            return getattr(self, name)
        return PackedMXFP4(getattr(self, f"{name}_blocks"),
                           getattr(self, f"{name}_scales"))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """x (N, D), ids and weights (N, K) -> (N, D)."""
        run = packed_experts if self.packed else experts_grouped
        return run(x, ids, weights, self._weight("gate_up_proj"),
                   self.gate_up_proj_bias, self._weight("down_proj"),
                   self.down_proj_bias, self.limit)

    def extra_repr(self) -> str:
        E, D = self.down_proj_bias.shape
        return (f"experts={E}, hidden={D}, "
                f"intermediate={self.gate_up_proj_bias.shape[1] // 2}, "
                f"packed={self.packed}")


__all__ = [
    "ALPHA",
    "Experts",
    "by_expert",
    "clamped_swiglu",
    "experts_gather",
    "experts_grouped",
    "experts_loop",
    "one_expert",
    "packed_backward",
    "packed_by_decoding",
    "packed_experts",
    "swiglu_backward",
]
