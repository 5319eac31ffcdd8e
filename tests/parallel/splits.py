"""What the tests of `parallel` share: configurations, a model to split, what
is asked of it, and what torchrun tells a process."""

import os
import socket
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import torch

from gptoss.model.transformer import GptOss
from gptoss.parallel.shards import MeshRank, mesh_rank
from gptoss.text.sampling import Sampler
from gptoss.weights.config import GptOssConfig
from gptoss.weights.layout import LAYOUTS
from gptoss.weights.write import random_tensors, write_checkpoint

POCKET = Path(str(files("gptoss") / "pocket"))
RELEASED = {"20b": GptOssConfig.gpt_oss_20b(),
            "120b": GptOssConfig.gpt_oss_120b()}
GREEDY = Sampler(temperature=0.0)
# more key/value heads, and an F of 6 blocks: slices and groups of experts
TINY = GptOssConfig(
    num_hidden_layers=5, num_local_experts=8, num_experts_per_tok=3,
    vocab_size=96, hidden_size=64, intermediate_size=192, head_dim=8,
    num_attention_heads=16, num_key_value_heads=8, sliding_window=6,
    max_position_embeddings=256, initial_context_length=32,
    eos_token_id=1, pad_token_id=0)
ODD = replace(TINY, num_attention_heads=12, num_key_value_heads=6,
              vocab_size=101)  # by nothing; 2, 3 and 6 share the heads


def write_tiny(folder: Path) -> dict[str, Path]:
    """TINY in each layout, the same numbers."""
    original = replace(TINY, layer_types=None, max_position_embeddings=131072,
                       initial_context_length=4096)
    for layout in LAYOUTS:
        config = original if layout == "original" else TINY
        write_checkpoint(folder / layout, config,
                         random_tensors(config, 3, layout), layout)
    return {layout: folder / layout for layout in LAYOUTS}


def ranks(config: GptOssConfig, world: int, stages: int = 1) -> list[MeshRank]:
    return [mesh_rank(config, rank, world, stages) for rank in range(world)]


PROMPT = torch.randint(2, 96, (2, 40),
                       generator=torch.Generator().manual_seed(5))
MASK = torch.ones(2, 40, dtype=torch.bool)
MASK[0, :7] = False


def whole(path: Path) -> GptOss:
    return GptOss.from_pretrained(path, dtype=torch.float32)


def near(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Within 1e-5 of the spread of the logits."""
    return float((found - wanted).abs().max() / wanted.std()) < 1e-5


def exercise(model: GptOss) -> list[torch.Tensor]:
    """Logits of a padded batch: at once, in pieces, after a rollback."""
    with torch.inference_mode():
        at_once = model(PROMPT, attention_mask=MASK)[MASK]
        cache = model.new_cache(2, slack=2)
        pieces = [model(PROMPT[:, part], cache, MASK[:, part])
                  for part in (slice(0, 13), slice(13, 14), slice(14, 40))]
        one = model.new_cache(max_tokens=60)
        model(PROMPT[1:], one)
        start = one.rollback(20)
        again = model(PROMPT[1:, start:], one)[:, 20 - start:]
        last = model(PROMPT[1:, :3], one, logits_to_keep=1)
    return [at_once, torch.cat(pieces, 1)[MASK], again, last,
            torch.tensor([start])]


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def meet(rank: int, world: int, port: int) -> None:
    """What torchrun would have set."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world),
                      LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
