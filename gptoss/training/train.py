"""How is a gpt-oss trained over lunch?

Generated from book/training/training.py; edit the chapter, not this file.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gptoss.model.layers import Block, Router
from gptoss.model.transformer import GptOss
from gptoss.moe.routing import expert_load, top_logits
from gptoss.weights.encoding import encode
from gptoss.weights.mxfp4 import decode

# --- What is the loss? -------------------------------------------------------

def weighted_loss(model: GptOss, tokens: Tensor, weights: Tensor
                  ) -> tuple[Tensor, Tensor]:
    """Weighted mean cross-entropy in nats, and the mean over the tokens of
    weight 1 alone. tokens, weights (B, T): each token but the first is
    predicted from those before it."""
    logits = model(tokens[:, :-1]).flatten(0, 1)
    nats = F.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    own = weights == 1
    return ((weights * nats).sum() / weights.sum(),
            (nats.detach() * own).sum() / own.sum().clamp_min(1))


def that_matter(weights: Tensor) -> Tensor:
    """(B, T) bool: places with something that counts at or behind them; the
    others are padding, or as good as that."""
    return weights.flip(-1).cummax(-1).values.flip(-1) > 0


def load_balance(logits: Tensor, k: int) -> Tensor:
    """The auxiliary loss of Switch Transformers, for K experts a token.

    Args:
        logits: (N, E) router logits of one layer.
        k: experts chosen per token.
    Returns:
        E * sum_e f_e * p_e, a scalar: f_e the share of assignments that
        expert e gets, p_e its mean probability over all E. 1 when both
        are uniform; up to E / K when K experts take everything.
    """
    experts = logits.shape[-1]
    _, ids = top_logits(logits, k)
    share = expert_load(ids, experts) / ids.numel()
    return experts * (share * logits.softmax(-1).mean(0)).sum()


class RouterTap:
    """Collects the router logits of one forward pass, layer by layer."""

    def __init__(self, model: GptOss) -> None:
        self.logits: list[Tensor] = []
        self.hooks = [
            cast(Block, layer).mlp.router.register_forward_hook(self._keep)
            for layer in model.layers]

    def _keep(self, router: Router, inputs: tuple, output: object) -> None:
        self.logits.append(F.linear(inputs[0], router.weight, router.bias))

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def take(self) -> list[Tensor]:
        taken, self.logits = self.logits, []
        return taken


# --- How do weights live on the grid? ----------------------------------------

class OnGrid(nn.Module):
    """Replace a weight by its MXFP4 rounding; gradients pass unchanged."""

    def forward(self, weight: Tensor) -> Tensor:
        with torch.no_grad():
            grid = decode(*encode(weight), weight.dtype)
        return weight + (grid - weight).detach()


def put_on_grid(model: GptOss) -> None:
    """From now on every expert computes with four-bit weights."""
    for layer in model.layers:
        experts = cast(Block, layer).mlp.experts
        for name in ("gate_up_proj", "down_proj"):
            parametrize.register_parametrization(experts, name, OnGrid())


# --- How does a run go? ------------------------------------------------------

@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run; the same recipe and seed on
    the same machine give the same file.

    `tokens`: of a batch, with its padding. `easy`: share of the steps with
    short rows and many plain stories. `change`: share after which the mix
    of lessons is `SECOND`; `last`: after which it is `THIRD` and `table` of
    the rows are digits alone. At both the optimiser begins afresh, and the
    rate rises to the next of `rates`. `grid_from`: share after which the
    experts compute with four bits.
    """

    seed: int = 0
    steps: int = 19000
    tokens: int = 1250
    rates: tuple[float, ...] = (2e-3, 1.2e-3, 8e-4)
    warmup: int = 100
    weight_decay: float = 0.05
    balance: float = 0.01
    easy: float = 0.0909
    change: float = 15 / 35
    grid_from: float = 19 / 35
    last: float = 23 / 35
    table: float = 0.15
    clip: float = 1.0

    def at(self, share: float) -> int:
        """The step at which `share` of the run is over."""
        return round(share * self.steps)

    @property
    def begins(self) -> tuple[int, int, int]:
        """The steps at which the three stretches begin."""
        return 0, self.at(self.change), self.at(self.last)

    def rate(self, step: int) -> float:
        """Linear warm-up, then a cosine towards a hundredth, three times;
        the first is cut short by the change."""
        part = sum(step >= begin for begin in self.begins[1:])
        begin, peak = self.begins[part], self.rates[part]
        end = self.begins[2] if part < 2 else self.steps
        warmup = self.warmup // 2 if part else self.warmup
        step -= begin
        if step < warmup:
            return peak * (step + 1) / warmup
        done = (step - warmup) / max(1, end - begin - warmup)
        floor = 0.01
        cosine = (1 + math.cos(math.pi * done)) / 2
        return peak * (floor + (1 - floor) * cosine)


def optimizer_for(model: GptOss, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; biases, sinks and norms are not decayed towards zero."""
    vectors = ("bias", "sinks", "norm.weight")
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (free if name.endswith(vectors) else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay},
              {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.rates[0],
                             betas=(0.9, 0.98))


def train(model: GptOss, source: Iterator[tuple[Tensor, Tensor]],
          recipe: Recipe,
          report: Callable[[dict], None] = lambda entry: None) -> None:
    """Train in place; `report` gets one dict per step: `loss`, the
    weighted mean, and `own`, of the tokens to be written, in nats."""
    tap = RouterTap(model)
    k, begin = model.config.num_experts_per_tok, time.perf_counter()
    for step in range(recipe.steps):
        batch, extra = next(source), {}
        if step in recipe.begins:
            optimizer = optimizer_for(model, recipe)
        if step == recipe.at(recipe.grid_from):
            with torch.no_grad():
                extra = {"unrounded": weighted_loss(model, *batch)[0].item()}
            put_on_grid(model)
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        tap.take()  # what was looked at between two steps
        loss, own = weighted_loss(model, *batch)
        real = that_matter(batch[1][:, 1:]).flatten()
        routed = [load_balance(each.flatten(0, -2)[real], k)
                  for each in tap.take()]
        balance = torch.stack(routed).mean()
        (loss + recipe.balance * balance).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        report({"step": step, "loss": loss.item(), "own": own.item(),
                "balance": balance.item(), "norm": norm.item(),
                "seconds": time.perf_counter() - begin} | extra)
    tap.close()


__all__ = [
    "OnGrid",
    "Recipe",
    "RouterTap",
    "load_balance",
    "optimizer_for",
    "put_on_grid",
    "that_matter",
    "train",
    "weighted_loss",
]
