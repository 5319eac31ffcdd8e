"""Routing

Generated from book/moe/routing.py; edit the chapter, not this file.
"""

import torch
from torch import Tensor

# --- How are the largest chosen? ---------------------------------------------

def top_logits(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of (N, E), largest first: (N, k) logits, (N, k) int64.

    Equal logits keep the order of their experts, so the choice depends on
    the numbers alone. ValueError: k not in 1..E.
    """
    if not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"num_experts_per_tok: expected 1 to "
                         f"{logits.shape[-1]}, found {k}")
    ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
    # contiguous: a slice would keep all E columns in memory
    return ordered[..., :k].contiguous(), ids[..., :k].contiguous()


def route(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(N, E) logits -> weights (N, k) summing to one, ids (N, k) int64.

    Softmax over the k chosen logits, in the dtype of the logits, as
    transformers does (GptOssTopKRouter). ValueError: k not in 1..E.
    """
    chosen, ids = top_logits(logits, k)
    return chosen.softmax(-1), ids


# --- And the other order? ----------------------------------------------------

def softmax_then_topk(logits: Tensor, k: int, renormalise: bool = True
                      ) -> tuple[Tensor, Tensor]:
    """(N, E) -> weights (N, k), ids (N, k): softmax over all E, then choose.

    Equal to `route` when renormalised; without, each token's weights sum
    to less than one. Other models want that, gpt-oss does not.
    """
    probs, ids = top_logits(logits.softmax(-1), k)
    if renormalise:
        probs = probs / probs.sum(-1, keepdim=True)
    return probs, ids


# --- How is the load counted? ------------------------------------------------

def expert_load(ids: Tensor, experts: int) -> Tensor:
    """How many tokens chose each expert: ids (N, K) -> counts (E,) int64."""
    return torch.bincount(ids.flatten(), minlength=experts)


def expected_hits(experts: int, k: int, tokens: int) -> float:
    """Distinct experts that `tokens` tokens hit together, on average.

    Each token chooses k of the experts, all choices equally likely and
    independent: E (1 - (1 - k/E)^N).
    """
    return experts * (1 - (1 - k / experts) ** tokens)


__all__ = [
    "expected_hits",
    "expert_load",
    "route",
    "softmax_then_topk",
    "top_logits",
]
