"""Other implementations, and small random models to hold ours against."""

import math
import random
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gptoss.weights.config import KINDS, GptOssConfig
from gptoss.weights.layout import tensor_table
from gptoss.weights.write import write_checkpoint


def random_tensors(config: GptOssConfig, seed: int = 0,
                   sink_std: float = 2.0) -> dict[str, Tensor]:
    """Random tensors in the released HF layout, by canonical name.

    Every bias is non-zero, every norm differs from 1, and the expert scales
    vary from block to block, so that a mistake in any of them shows. Some
    gates pass the limit of 7. A tensor's values depend on its name and the
    seed alone.
    """
    tensors = {}
    for name, spec in tensor_table(config, "hf").items():
        g = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
        if name.endswith("_blocks"):
            value = torch.randint(0, 256, spec.shape, generator=g)
            tensors[name] = value.to(torch.uint8)
            continue
        if name.endswith("_scales"):
            # codes have an rms of 2.8: make the weights about 1/sqrt(in)
            middle = -math.log2(2.8 * math.sqrt(32 * spec.shape[-1]))
            value = 0.7 * torch.randn(spec.shape, generator=g) + middle
            tensors[name] = (value.round() + 127).to(torch.uint8)
            continue
        value = torch.randn(spec.shape, generator=g)
        if name.endswith("norm.weight"):
            value = 1 + 0.2 * value
        elif name.endswith("sinks"):
            value = sink_std * value
        elif name.endswith("bias"):
            value = 0.3 * value
        elif "embed_tokens" not in name:
            value = 0.8 * value / math.sqrt(spec.shape[-1])
        tensors[name] = value.to(torch.bfloat16)
    return tensors


@dataclass(frozen=True)
class Case:
    """One random model and one prompt."""

    seed: int
    config: GptOssConfig
    length: int  # of the prompt
    sink_std: float

    def __str__(self) -> str:
        c = self.config
        return (f"{self.seed}: D{c.hidden_size} H{c.num_attention_heads} "
                f"G{c.num_key_value_heads} C{c.head_dim} "
                f"E{c.num_local_experts} K{c.num_experts_per_tok} "
                f"W{c.sliding_window} T{self.length}")

    def layouts(self) -> tuple[str, ...]:
        """Those that can say all that the config says."""
        alternating = GptOssConfig(
            num_hidden_layers=self.config.num_hidden_layers).layer_types
        if self.config.layer_types == alternating:
            return "hf", "original"
        return ("hf",)

    def prompt(self) -> Tensor:
        """Token ids, (1, T)."""
        g = torch.Generator().manual_seed(self.seed)
        return torch.randint(0, self.config.vocab_size, (1, self.length),
                             generator=g)

    def write(self, folder: Path, layout: str = "hf") -> Path:
        """The model as a checkpoint; returns its folder."""
        path = folder / f"{self.seed}-{layout}"
        if not path.exists():
            tensors = random_tensors(self.config, self.seed, self.sink_std)
            write_checkpoint(path, self.config, tensors.items(),
                             layout=layout)
        return path


def random_case(seed: int, alternating: bool = False) -> Case:
    """A small model of random proportions.

    hidden is never H * C. Windows run from 1 (a token sees itself) to far
    longer than the prompt; sinks may be large enough to take nearly all of
    the attention. Every fourth model mixes its layers in its own way, which
    the original layout has no key for, unless `alternating`.
    """
    rng = random.Random(seed)
    groups, head = rng.choice((1, 2, 3, 4)), rng.choice((8, 16, 32))
    heads = groups * rng.choice((1, 2, 3, 4))
    hidden = rng.choice([d for d in (32, 64, 96, 128) if d != heads * head])
    experts, layers = rng.choice((2, 3, 4, 8, 16)), rng.choice((2, 3, 4))
    mixed = tuple(rng.choice(KINDS) for _ in range(layers))
    length, factor = rng.choice((1, 2, 5, 17, 33, 48)), rng.choice((1, 4, 32))
    config = GptOssConfig(
        num_hidden_layers=layers,
        layer_types=None if alternating or seed % 4 else mixed,
        num_local_experts=experts,
        num_experts_per_tok=rng.randint(1, min(experts, 5)),
        vocab_size=rng.choice((101, 128, 250)),
        hidden_size=hidden,
        intermediate_size=rng.choice((32, 64, 96)),
        head_dim=head,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        sliding_window=rng.choice((1, 2, 3, 7, 16, 128)),
        max_position_embeddings=4096 * factor,
        rope_theta=rng.choice((10000.0, 150000.0)),
        rope_type="default" if factor == 1 else "yarn",
        rope_factor=float(factor),
        eos_token_id=2,
        pad_token_id=0,
    )
    return Case(seed, config, length, rng.choice((1.0, 3.0, 10.0)))


def long_case(seed: int) -> Case:
    """A tiny model and a prompt that runs past position 4096."""
    config = GptOssConfig(
        num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2,
        vocab_size=128, hidden_size=32, intermediate_size=32,
        head_dim=16, num_attention_heads=1 + seed % 2,
        num_key_value_heads=1, sliding_window=128, eos_token_id=2,
        pad_token_id=0)
    return Case(seed, config, 4096 + 24, 2.0)


def distance(found: Tensor, wanted: Tensor) -> float:
    """max |found - wanted| in standard deviations of wanted."""
    found, wanted = found.double(), wanted.double()
    return ((found - wanted).abs().max() / wanted.std()).item()


def usual_error(found: Tensor, wanted: Tensor) -> float:
    """rms error of a token's logits, the median over the tokens (1, T).

    In standard deviations of wanted. The median, because a token that
    rounding sends to another expert is far off in any implementation.
    """
    found, wanted = found.double(), wanted.double()
    error = (found - wanted).square().mean(-1).sqrt().median()
    return (error / wanted.std()).item()
