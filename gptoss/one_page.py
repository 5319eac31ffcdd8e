"""What happens between the bytes and the next word?

Generated from book/one_page.py; edit the chapter, not this file.
"""

import json
import math
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from types import FunctionType

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

# --- The whole model ---------------------------------------------------------

POCKET = Path(str(files("gptoss"))) / "pocket"  # or any released checkpoint
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6,
                    -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
Weights = dict[str, Tensor]


def read(folder: Path) -> tuple[dict, Weights]:
    """The settings, and all tensors by name: uint8 as they are, or fp32."""
    w: Weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, x in load_file(file).items():
            w[name] = x if x.dtype == torch.uint8 else x.float()
    return json.loads((folder / "config.json").read_text("utf-8")), w


def part(w: Weights, prefix: str) -> Weights:
    """The tensors whose names begin with prefix, by the rest of the name."""
    return {name.removeprefix(prefix): x for name, x in w.items()
            if name.startswith(prefix)}


def decode(blocks: Tensor, scales: Tensor) -> Tensor:
    """Four bits a weight: (..., N, 16) and (..., N) bytes -> (..., 32 N)."""
    pairs = torch.stack([FP4[blocks.int() & 15], FP4[blocks.int() >> 4]], -1)
    power = scales.int()[..., None] - 127
    return torch.ldexp(pairs.flatten(-2), power).flatten(-2)


def linear(x: Tensor, w: Weights, name: str) -> Tensor:
    """Every output is a weighted sum of all inputs, and a bias."""
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def rms_norm(x: Tensor, scale: Tensor, eps: float = 1e-5) -> Tensor:
    """Vectors (..., D) of size one (root mean square), times scale (D,)."""
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * scale


def rope_tables(positions: Tensor, config: dict) -> tuple[Tensor, Tensor]:
    """cos and sin (T, C/2) of the angle of each position and pair."""
    C, theta = config["head_dim"], config["rope_theta"]
    yarn, pair = config["rope_scaling"], torch.arange(C // 2)
    speed = 1 / theta ** (2 * pair / C)  # radians a token
    turns = yarn["original_max_position_embeddings"] / (2 * math.pi)
    low, high = (C * math.log(turns / yarn[beta]) / (2 * math.log(theta))
                 for beta in ("beta_fast", "beta_slow"))
    slow = ((pair - low) / (high - low)).clamp(0, 1)
    speed = speed * (1 - slow) + speed / yarn["factor"] * slow
    angle, grow = positions[:, None] * speed, 0.1 * math.log(yarn["factor"])
    return angle.cos() * (grow + 1), angle.sin() * (grow + 1)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + C/2) of x (T, H, C) by their angles."""
    a, b = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def visible(q_pos: Tensor, k_pos: Tensor, window: int | None) -> Tensor:
    """(T, S) bool: not in the future, not further back than the window."""
    ago = q_pos[:, None] - k_pos
    return (ago >= 0) & (ago < (window or len(k_pos)))


def attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor,
              window: int | None) -> Tensor:
    """q (T, H, C), k and v (T, G, C), sinks (H,) -> (T, H, C)."""
    T, H, C = q.shape
    k, v = (x.repeat_interleave(H // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("thc,shc->hts", q, k) / C ** 0.5
    seen = visible(torch.arange(T), torch.arange(T), window)
    scores = scores.masked_fill(~seen, -math.inf)
    sink = sinks[:, None, None].expand(H, T, 1)
    shares = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    return torch.einsum("hts,shc->thc", shares, v)


def route(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(T, E) -> weights (T, K) that sum to one, experts (T, K)."""
    top, ids = logits.topk(k)
    return top.softmax(-1), ids


def swiglu(gate_up: Tensor, limit: float = 7.0) -> Tensor:
    """(..., 2F), gate and up in turns -> (..., F)."""
    gate, up = gate_up[..., ::2], gate_up[..., 1::2]
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


def experts(x: Tensor, ids: Tensor, weights: Tensor, w: Weights, limit: float
            ) -> Tensor:
    """x (T, D) through the chosen experts, ids and weights (T, K)."""
    def times(x: Tensor, e: int, name: str) -> Tensor:
        matrix = decode(w[f"{name}_blocks"][e], w[f"{name}_scales"][e])
        return x @ matrix.to(x.dtype).T + w[f"{name}_bias"][e]

    y = torch.zeros_like(x)
    for e in ids.unique().tolist():
        t, k = (ids == e).nonzero(as_tuple=True)
        hidden = swiglu(times(x[t], e, "gate_up_proj"), limit)
        y[t] += weights[t, k, None] * times(hidden, e, "down_proj")
    return y


def block(x: Tensor, w: Weights, cos: Tensor, sin: Tensor,
          window: int | None, config: dict) -> Tensor:
    """One layer: attention, then experts; each adds to x (T, D)."""
    eps = config["rms_norm_eps"]
    h = rms_norm(x, w["input_layernorm.weight"], eps)
    q, k, v = (linear(h, w, f"self_attn.{name}_proj").unflatten(
        -1, (-1, config["head_dim"])) for name in "qkv")
    mixed = attention(rope(q, cos, sin), rope(k, cos, sin), v,
                      w["self_attn.sinks"], window)
    x = x + linear(mixed.flatten(1), w, "self_attn.o_proj")
    h = rms_norm(x, w["post_attention_layernorm.weight"], eps)
    weights, ids = route(linear(h, w, "mlp.router"),
                         config["num_experts_per_tok"])
    return x + experts(h, ids, weights, part(w, "mlp.experts."),
                       config["swiglu_limit"])


def forward(ids: Tensor, w: Weights, config: dict) -> Tensor:
    """Tokens (T,) -> logits (T, V): a score for each possible next token."""
    x = w["model.embed_tokens.weight"][ids]
    cos, sin = rope_tables(torch.arange(len(ids)), config)
    for n, kind in enumerate(config["layer_types"]):
        slides = kind == "sliding_attention"
        x = block(x, part(w, f"model.layers.{n}."), cos, sin,
                  config["sliding_window"] if slides else None, config)
    x = rms_norm(x, w["model.norm.weight"], config["rms_norm_eps"])
    return x @ w["lm_head.weight"].T


def next_token(logits: Tensor) -> int:
    """One of V tokens from its scores (V,): the best."""
    return int(logits.argmax())


def generate(ids: list[int], w: Weights, config: dict,
             new: int) -> list[int]:
    """`new` tokens more, one by one."""
    for _ in range(new):
        logits = forward(torch.tensor(ids), w, config)
        ids = [*ids, next_token(logits[-1])]
    return ids


# --- The sentence that we follow ---------------------------------------------

SENTENCE = "Once upon a time there was a little fox named Mira."


def text_to_ids(text: str, folder: Path) -> list[int]:
    """The tokens of a text."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return tokenizer.encode(text, add_special_tokens=False).ids


def ids_to_text(ids: list[int], folder: Path) -> str:
    """The text of tokens."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return tokenizer.decode(ids, skip_special_tokens=False)


# --- Swap a function ---------------------------------------------------------

REPLACEABLE = (text_to_ids, ids_to_text, read, part, decode, linear, rms_norm,
               rope_tables, rope, visible, attention, route, swiglu, experts,
               block, forward, next_token, generate)


def sentence(new: int = 42, **functions: Callable) -> str:
    """SENTENCE and `new` tokens more, by the pocket model.

    functions: others in place of this page's functions of the same name;
    they take and give what those do. TypeError for a name that is not in
    REPLACEABLE.
    """
    page = dict(globals())
    for function in REPLACEABLE:
        page[function.__name__] = FunctionType(
            function.__code__, page, None, function.__defaults__)
    names = [function.__name__ for function in REPLACEABLE]
    for name in functions:
        if name not in names:
            raise TypeError(f"sentence: expected one of {', '.join(names)}, "
                            f"found {name}")
    page.update(functions)
    config, w = page["read"](POCKET)
    ids = page["text_to_ids"](SENTENCE, POCKET)
    return page["ids_to_text"](page["generate"](ids, w, config, new), POCKET)


__all__ = [
    "FP4",
    "POCKET",
    "REPLACEABLE",
    "SENTENCE",
    "Weights",
    "attention",
    "block",
    "decode",
    "experts",
    "forward",
    "generate",
    "ids_to_text",
    "linear",
    "next_token",
    "part",
    "read",
    "rms_norm",
    "rope",
    "rope_tables",
    "route",
    "sentence",
    "swiglu",
    "text_to_ids",
    "visible",
]
