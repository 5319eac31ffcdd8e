"""What is in the file?

Generated from book/weights/file.py; edit the chapter, not this file.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from gptoss.weights.config import GptOssConfig
from gptoss.weights.errors import Error, mismatch
from gptoss.weights.mxfp4 import BLOCK

# --- Which tensors must be there? --------------------------------------------

class CheckpointError(Error):
    """A checkpoint that is not what it should be; names file and tensor."""


faulty = partial(mismatch, CheckpointError)


# Hugging Face name, original name, shape. `L.` is "model.layers.N." in the
# one, "block.N." in the other. Q = H C, KV = G C. The three rows of the
# original qkv stand one under the other. blocks and scales are U8.
NAME_MAP = (
    ("model.embed_tokens.weight", "embedding.weight", "V D"),
    ("L.input_layernorm.weight", "L.attn.norm.scale", "D"),
    ("L.self_attn.q_proj.weight", "L.attn.qkv.weight", "Q D"),
    ("L.self_attn.k_proj.weight", "L.attn.qkv.weight", "KV D"),
    ("L.self_attn.v_proj.weight", "L.attn.qkv.weight", "KV D"),
    ("L.self_attn.q_proj.bias", "L.attn.qkv.bias", "Q"),
    ("L.self_attn.k_proj.bias", "L.attn.qkv.bias", "KV"),
    ("L.self_attn.v_proj.bias", "L.attn.qkv.bias", "KV"),
    ("L.self_attn.o_proj.weight", "L.attn.out.weight", "D Q"),
    ("L.self_attn.o_proj.bias", "L.attn.out.bias", "D"),
    ("L.self_attn.sinks", "L.attn.sinks", "H"),
    ("L.post_attention_layernorm.weight", "L.mlp.norm.scale", "D"),
    ("L.mlp.router.weight", "L.mlp.gate.weight", "E D"),
    ("L.mlp.router.bias", "L.mlp.gate.bias", "E"),
    ("L.mlp.experts.gate_up_proj_blocks", "L.mlp.mlp1_weight.blocks",
     "E 2F D/32 16"),
    ("L.mlp.experts.gate_up_proj_scales", "L.mlp.mlp1_weight.scales",
     "E 2F D/32"),
    ("L.mlp.experts.gate_up_proj_bias", "L.mlp.mlp1_bias", "E 2F"),
    ("L.mlp.experts.down_proj_blocks", "L.mlp.mlp2_weight.blocks",
     "E D F/32 16"),
    ("L.mlp.experts.down_proj_scales", "L.mlp.mlp2_weight.scales",
     "E D F/32"),
    ("L.mlp.experts.down_proj_bias", "L.mlp.mlp2_bias", "E D"),
    ("model.norm.weight", "norm.scale", "D"),
    ("lm_head.weight", "unembedding.weight", "V D"),
)


LAYOUTS = ("hf", "original", "bf16")
PACKED = ("_blocks", "_scales")
DTYPES = {"BF16": torch.bfloat16, "U8": torch.uint8, "F16": torch.float16,
          "F32": torch.float32, "F64": torch.float64}
FLOATS = ("BF16", "F16", "F32", "F64")


@dataclass(frozen=True)
class TensorSpec:
    """What a header says of one tensor; dtype as safetensors spells it."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def _rows(c: GptOssConfig) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """NAME_MAP with layer numbers and sizes filled in."""
    D, F, H = c.hidden_size, c.intermediate_size, c.num_attention_heads
    for key, width in (("hidden_size", D), ("intermediate_size", F)):
        if width % BLOCK:
            raise faulty(key, f"a multiple of {BLOCK} (MXFP4 blocks)", width)
    sizes = {"V": c.vocab_size, "D": D, "2F": 2 * F, "D/32": D // 32,
             "F/32": F // 32, "16": 16, "H": H, "E": c.num_local_experts,
             "Q": H * c.head_dim, "KV": c.num_key_value_heads * c.head_dim}
    for layered, group in itertools.groupby(
            NAME_MAP, lambda row: row[0].startswith("L.")):
        rows = list(group)
        for n in range(c.num_hidden_layers if layered else 1):
            for hf, original, shape in rows:
                if layered:
                    hf = f"model.layers.{n}.{hf[2:]}"
                    original = f"block.{n}.{original[2:]}"
                yield hf, original, tuple(sizes[s] for s in shape.split())


def tensor_table(config: GptOssConfig, layout: str = "hf",
                 floats: str = "BF16") -> dict[str, TensorSpec]:
    """Every tensor of a checkpoint: name there -> TensorSpec, in order.

    "hf" and "original" are the released layouts; "bf16" is Hugging Face's
    with decoded experts, (E, in, out). Other layouts: CheckpointError.
    floats: the dtype of what is not packed, as safetensors spells it.
    """
    if layout not in LAYOUTS:
        raise faulty("layout", f"one of {LAYOUTS}", repr(layout))
    table: dict[str, TensorSpec] = {}
    for hf, original, shape in _rows(config):
        name = original if layout == "original" else hf
        dtype = "U8" if hf.endswith(PACKED) else floats
        if layout == "bf16" and dtype == "U8":
            if hf.endswith("_scales"):
                continue
            name, dtype = hf.removesuffix("_blocks"), floats
            experts, out, blocks, _ = shape
            shape = (experts, 32 * blocks, out)
        if name in table:  # k below q, v below k
            above = table[name].shape
            shape = (above[0] + shape[0], *above[1:])
        table[name] = TensorSpec(name, shape, dtype)
    return table


@dataclass(frozen=True)
class Place:
    """A tensor under its canonical name, and where its rows are stored."""

    spec: TensorSpec  # canonical: Hugging Face's name, unfused
    stored: str  # name in the file
    first: int  # its first row there


def places(config: GptOssConfig, layout: str, floats: str = "BF16"
           ) -> dict[str, Place]:
    """Canonical name -> Place. Only q, k, v of "original" share one."""
    if layout != "original":
        table = tensor_table(config, layout, floats)
        return {name: Place(spec, name, 0) for name, spec in table.items()}
    table, found = tensor_table(config, "hf", floats), {}
    filled: Counter[str] = Counter()
    for hf, original, shape in _rows(config):
        found[hf] = Place(table[hf], original, filled[original])
        filled[original] += shape[0]
    return found


def find_layout(names: Iterable[str]) -> str:
    """"hf", "original" or "bf16", from the names that we know."""
    names = set(names)
    if "embedding.weight" in names or any(
            name.startswith("block.") for name in names):
        return "original"
    dense = ("experts.gate_up_proj", "experts.down_proj")
    return "bf16" if any(name.endswith(dense) for name in names) else "hf"


COMPONENTS = {"embed_tokens": "embedding", "self_attn": "attention",
              ".router.": "router", ".experts.": "experts", "norm": "norms",
              "lm_head": "lm_head"}


def component_of(name: str) -> str:
    """The component of `parameter_counts` that a tensor belongs to."""
    return next(part for word, part in COMPONENTS.items() if word in name)


__all__ = [
    "COMPONENTS",
    "CheckpointError",
    "DTYPES",
    "FLOATS",
    "LAYOUTS",
    "NAME_MAP",
    "PACKED",
    "Place",
    "TensorSpec",
    "component_of",
    "faulty",
    "find_layout",
    "places",
    "tensor_table",
]
