"""Fine-tuned models as transformers itself saves them, read by us."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from oracles import distance, hf, random_tensors
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Mxfp4Config

from gptoss.model.transformer import GptOss
from gptoss.text.generate import generate
from gptoss.text.sampling import Sampler
from gptoss.text.stops import stop_ids
from gptoss.weights.checkpoint import Checkpoint
from gptoss.weights.config import GptOssConfig
from gptoss.weights.convert import convert
from gptoss.weights.layout import CheckpointError
from gptoss.weights.write import write_checkpoint

CONFIG = GptOssConfig(
    num_hidden_layers=3, num_local_experts=5, num_experts_per_tok=3,
    vocab_size=101, hidden_size=64, intermediate_size=96, head_dim=16,
    num_attention_heads=6, num_key_value_heads=3, sliding_window=9,
    max_position_embeddings=4096, initial_context_length=512,
    rope_factor=8.0, eos_token_id=7, pad_token_id=3)
TOKENS = torch.randint(0, 101, (1, 33),
                       generator=torch.Generator().manual_seed(1))


def base(folder: Path, config: GptOssConfig = CONFIG) -> Path:
    """The packed model that is tuned."""
    path = folder / "base"
    write_checkpoint(path, config, random_tensors(config, 11).items())
    return path


def tuned(path: Path, dtype: torch.dtype = torch.bfloat16):
    """Decoded, and one step of training that reaches every parameter."""
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation="eager",
        experts_implementation="eager",
        quantization_config=Mxfp4Config(dequantize=True))
    model.train()
    model(TOKENS, labels=TOKENS).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter -= 0.05 * parameter.grad.sign() * parameter.std()
    return model.eval()


Save = Callable[[Path, Path], torch.nn.Module]  # base, target -> the model


def plain(dtype=torch.bfloat16, **options) -> Save:
    def save(path: Path, target: Path):
        model = tuned(path, dtype)
        model.save_pretrained(target, save_original_format=False, **options)
        return model
    return save


def under_packed_names(path: Path, target: Path):
    """What save_pretrained does by default; its own reader loses it."""
    model = tuned(path)
    model.save_pretrained(target)
    names = load_file(target / "model.safetensors")
    assert "model.layers.0.mlp.experts.down_proj_blocks" in names
    return model


def resized(size: int) -> Save:
    def save(path: Path, target: Path):
        model = tuned(path)
        model.resize_token_embeddings(size, mean_resizing=False)
        model.save_pretrained(target, save_original_format=False)
        return model
    return save


def tied(path: Path, target: Path):
    model = tuned(path)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(target, save_original_format=False)
    assert "lm_head.weight" not in load_file(target / "model.safetensors")
    return model


def without_stop(path: Path, target: Path):
    """generation_config.json without ids, and two in config.json."""
    model = tuned(path)
    model.config.eos_token_id = [7, 9]
    model.generation_config.eos_token_id = None
    model.save_pretrained(target, save_original_format=False)
    said = json.loads((target / "generation_config.json").read_text())
    assert said.get("eos_token_id") is None
    return model


def partly(path: Path, target: Path):
    """Merged by a program that leaves packed experts as they are and saves
    the rest in fp32."""
    model = tuned(path, torch.float32)
    packed = load_file(path / "model.safetensors")
    merged = {n: t.float() for n, t in model.state_dict().items()
              if ".experts." not in n or n.endswith("_bias")}
    merged |= {n: t for n, t in packed.items()
               if n.endswith(("_blocks", "_scales"))}
    from safetensors.torch import save_file

    target.mkdir()
    save_file({n: t.contiguous() for n, t in merged.items()},
              target / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(path / "config.json", target)
    return hf.load(target)


def beside_an_adapter(path: Path, target: Path):
    model = plain(max_shard_size="60KB")(path, target)
    (target / "adapter_model.safetensors").write_bytes(b"of another tool")
    (target / "model-00099-of-00099.safetensors").write_bytes(b"stale")
    return model


def pruned(path: Path, target: Path):
    """One expert and one layer less."""
    model = tuned(path)
    shutil.rmtree(path)
    config = replace(CONFIG, num_local_experts=4, num_hidden_layers=2,
                     layer_types=("full_attention",) * 2)
    model = tuned(base(path.parent, config))
    model.save_pretrained(target, save_original_format=False)
    return model


SHAPES: dict[str, tuple[Save, str]] = {
    "bf16": (plain(), "bf16"), "fp32": (plain(torch.float32), "bf16"),
    "fp16": (plain(torch.float16), "bf16"),
    "shards": (plain(max_shard_size="60KB"), "bf16"),
    "under packed names": (under_packed_names, "bf16"),
    "more tokens": (resized(107), "bf16"),
    "fewer tokens": (resized(67), "bf16"), "tied": (tied, "bf16"),
    "without stop": (without_stop, "bf16"), "partly": (partly, "hf"),
    "beside an adapter": (beside_an_adapter, "bf16"),
    "pruned": (pruned, "bf16"),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_what_transformers_saves_is_read(tmp_path, shape):
    save, layout = SHAPES[shape]
    target = tmp_path / "tuned"
    theirs = save(base(tmp_path), target)
    values = json.loads((target / "config.json").read_text())
    assert "rope_parameters" in values or shape == "partly"
    size = theirs.config.vocab_size
    tokens = TOKENS % size
    wanted = hf.logits(theirs.float(), tokens)
    ours = GptOss.from_pretrained(target, "float32")
    with torch.inference_mode():
        assert distance(ours(tokens), wanted) <= 1e-5
    assert list(generate(ours, tokens[0].tolist(), max_new_tokens=12,
                         sampler=Sampler(temperature=0))) == hf.greedy(
        theirs, tokens, 12)
    with Checkpoint.open(target) as checkpoint:
        assert checkpoint.layout == layout
        said = checkpoint.dtype
    if shape != "partly":  # its config.json is the old one
        assert str(said) == f"torch.{values['dtype']}"
    auto = GptOss.from_pretrained(target, "auto")
    assert {p.dtype for p in auto.parameters()} == {said}
    if shape == "without stop":
        assert stop_ids(target) == (7, 9)


@pytest.mark.parametrize("shape", ["fp32", "under packed names", "tied",
                                   "partly"])
def test_what_was_read_is_converted(tmp_path, shape):
    """To bf16, where transformers reads it with the same numbers."""
    target = tmp_path / "tuned"
    SHAPES[shape][0](base(tmp_path), target)
    convert(target, tmp_path / "new", "bf16")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "new", dtype=torch.float32, attn_implementation="eager",
        experts_implementation="eager")
    again = GptOss.from_pretrained(tmp_path / "new", "float32")
    with torch.inference_mode():
        assert distance(again(TOKENS), hf.logits(theirs, TOKENS)) <= 1e-5
    ours = GptOss.from_pretrained(target, packed=False).state_dict()
    again = again.state_dict()  # both rounded to bf16
    assert ours.keys() == again.keys()
    assert all(torch.equal(ours[name].float(), again[name]) for name in ours)


def test_transformers_loses_its_own_file(tmp_path):
    """If this fails, transformers has learnt to read it, and reading.py is
    to be told."""
    target = tmp_path / "tuned"
    theirs = under_packed_names(base(tmp_path), target)
    again = AutoModelForCausalLM.from_pretrained(
        target, dtype=torch.float32, attn_implementation="eager",
        experts_implementation="eager")
    assert distance(hf.logits(again, TOKENS),
                    hf.logits(theirs.float(), TOKENS)) > 0.1


def test_a_model_with_another_head_is_named(tmp_path):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(
        base(tmp_path), quantization_config=Mxfp4Config(dequantize=True))
    model.save_pretrained(tmp_path / "new", save_original_format=False)
    with pytest.raises(CheckpointError, match="score.weight: .*another head"):
        Checkpoint.open(tmp_path / "new")
