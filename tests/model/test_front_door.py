"""What people expect of a model who know torch and transformers: device and
dtype, input_ids, a state dict with the names of the file, save_pretrained,
sizes in repr."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import gptoss
from gptoss import GptOss, GptOssConfig
from gptoss.model.transformer import ModelError, file_name, file_tensor
from gptoss.weights.convert import convert
from gptoss.weights.layout import CheckpointError, tensor_table
from gptoss.weights.write import random_tensors, write_checkpoint

POCKET = Path(gptoss.__file__).parent / "pocket"
# F = D: by its shape, nobody can tell which way a down projection lies
TINY = GptOssConfig(
    num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2,
    vocab_size=64, hidden_size=32, intermediate_size=32, head_dim=8,
    num_attention_heads=2, num_key_value_heads=1, sliding_window=5,
    initial_context_length=16, max_position_embeddings=512,
    eos_token_id=2, pad_token_id=0)
TOKENS = torch.tensor([[5, 6, 7, 60, 1]])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    home = tmp_path_factory.mktemp("tiny")
    write_checkpoint(home / "hf", TINY, random_tensors(TINY))
    convert(home / "hf", home / "bf16", "bf16")
    return home


def loaded(model, **inputs):
    with torch.inference_mode():
        return model(**inputs)


def weights(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors"))
            for name, tensor in load_file(file).items()}


def equal(one, two):
    return one.keys() == two.keys() and all(
        one[name].dtype == two[name].dtype and torch.equal(one[name],
                                                           two[name])
        for name in one)


# --- Where and what ----------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_device_and_dtype(dtype, device):
    model = GptOss(TINY, dtype, device)
    assert model.device == torch.device(device)
    assert model.dtype == dtype
    if device == "cpu":
        assert loaded(model, tokens=TOKENS).dtype == model.dtype
        assert model.to(torch.float32).dtype == torch.float32


def test_input_ids_are_tokens(folders):
    model = GptOss.from_pretrained(folders / "hf", "float32")
    wanted = loaded(model, tokens=TOKENS)
    assert torch.equal(loaded(model, input_ids=TOKENS), wanted)
    mask = torch.ones_like(TOKENS)
    assert torch.equal(loaded(model, input_ids=TOKENS, attention_mask=mask),
                       wanted)


@pytest.mark.parametrize("inputs, said", [
    ({}, "neither"), ({"tokens": TOKENS, "input_ids": TOKENS}, "both")])
def test_tokens_are_named_once(inputs, said):
    model = GptOss(TINY, torch.float32)
    with pytest.raises(ModelError, match="^tokens: expected either tokens or "
                       f"input_ids, found {said}$"):
        model(**inputs)


# --- A state dict is the file ------------------------------------------------

@pytest.mark.parametrize("layout", ["hf", "bf16"])
def test_a_state_dict_is_what_the_file_holds(folders, layout):
    model = GptOss.from_pretrained(folders / layout)
    assert equal(dict(model.state_dict()), weights(folders / layout))
    assert set(model.state_dict()) == set(tensor_table(TINY, layout))


@pytest.mark.parametrize("prefix", ["model.", ""])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("layout", ["hf", "bf16"])
def test_a_file_is_a_state_dict(folders, layout, assign, prefix):
    """With and without the file's `model.`, as torch names attributes."""
    model = GptOss(TINY, packed=layout == "hf")
    state = {prefix + name.removeprefix("model.")
             if name.startswith("model.") else name: tensor
             for name, tensor in weights(folders / layout).items()}
    before = dict(state)
    said = model.load_state_dict(state, assign=assign)
    assert said.missing_keys == said.unexpected_keys == []
    assert equal(state, before)  # the caller's is not touched
    wanted = GptOss.from_pretrained(folders / layout)
    assert torch.equal(loaded(model, tokens=TOKENS),
                       loaded(wanted, tokens=TOKENS))
    down = model.layers[1].mlp.experts
    if layout == "bf16":
        stored = before[prefix + "layers.1.mlp.experts.down_proj"]
        assert torch.equal(down.down_proj, stored.transpose(1, 2))
        assert not torch.equal(down.down_proj, stored)


def test_the_shipped_file_is_a_state_dict():
    model = GptOss(GptOssConfig.from_pretrained(POCKET))
    model.load_state_dict(load_file(POCKET / "model.safetensors"))
    wanted = GptOss.from_pretrained(POCKET)
    tokens = torch.arange(20)[None]
    assert torch.equal(loaded(model, tokens=tokens),
                       loaded(wanted, tokens=tokens))


def test_what_is_missing_is_named_as_in_the_file(folders):
    model, state = GptOss(TINY), weights(folders / "hf")
    lost = "model.layers.1.mlp.experts.down_proj_scales"
    del state[lost]
    state["model.layers.9.extra"] = torch.zeros(1)
    said = model.load_state_dict(state, strict=False)
    assert said.missing_keys == [lost]
    assert said.unexpected_keys == ["model.layers.9.extra"]
    with pytest.raises(RuntimeError) as caught:
        model.load_state_dict(state)
    assert f'Missing key(s) in state_dict: "{lost}"' in str(caught.value)
    assert '"model.layers.9.extra"' in str(caught.value)


@pytest.mark.parametrize("layout", ["hf", "bf16"])
def test_a_state_dict_survives_torch_save(folders, layout, tmp_path):
    model = GptOss.from_pretrained(folders / layout)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt")
    other = GptOss(TINY, packed=layout == "hf")
    other.load_state_dict(state)
    assert torch.equal(loaded(other, tokens=TOKENS),
                       loaded(model, tokens=TOKENS))


def test_inside_another_module_the_names_stay_the_files(folders):
    inner = GptOss.from_pretrained(folders / "bf16")
    outer = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": inner})
    state = outer.state_dict()
    assert {name for name in state if name.startswith("b.")} == {
        f"b.{name}" for name in tensor_table(TINY, "bf16")}
    other = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2),
                                 "b": GptOss(TINY, packed=False)})
    other.load_state_dict(state)
    assert torch.equal(loaded(other["b"], tokens=TOKENS),
                       loaded(inner, tokens=TOKENS))


def test_a_copy_has_the_names_too(folders):
    model = GptOss.from_pretrained(folders / "bf16")
    assert equal(dict(copy.deepcopy(model).state_dict()),
                 dict(model.state_dict()))


def test_names_and_orientation():
    tensor = torch.arange(24).view(2, 3, 4)
    experts = "layers.0.mlp.experts."
    assert file_name("lm_head.weight") == "lm_head.weight"
    assert file_name("norm.weight") == "model.norm.weight"
    for name in ("gate_up_proj", "down_proj",
                 "parametrizations.down_proj.original"):
        turned = file_tensor(experts + name, tensor)
        assert torch.equal(turned, tensor.transpose(1, 2))
        assert torch.equal(file_tensor(f"model.{experts}{name}", turned),
                           tensor)
    for name in ("down_proj_blocks", "down_proj_scales", "down_proj_bias"):
        assert file_tensor(experts + name, tensor) is tensor


# --- Saving ------------------------------------------------------------------

@pytest.mark.parametrize("shard", [10 ** 9, 20_000])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("layout", ["hf", "bf16"])
def test_saved_and_read_again(folders, layout, dtype, shard, tmp_path):
    model = GptOss.from_pretrained(folders / layout, dtype)
    with torch.no_grad():
        model.norm.weight.add_(2 ** -6)  # not what the file holds
    model.save_pretrained(tmp_path / "new", shard)
    again = GptOss.from_pretrained(tmp_path / "new", "auto")
    assert again.dtype == model.dtype and again.config == model.config
    assert equal(dict(again.state_dict()), dict(model.state_dict()))
    # a library's products may depend on where in memory a matrix begins
    torch.testing.assert_close(
        loaded(again, tokens=TOKENS), loaded(model, tokens=TOKENS), rtol=0,
        atol=32 * torch.finfo(model.dtype).eps)
    files = sorted((tmp_path / "new").glob("*.safetensors"))
    assert (len(files) == 1) == (shard == 10 ** 9)
    said = json.loads((tmp_path / "new" / "config.json").read_text())
    assert ("quantization_config" in said) == (layout == "hf")


def test_a_model_that_was_drawn_can_be_saved(tmp_path):
    model = GptOss(TINY, torch.float32, packed=False)
    model.save_pretrained(tmp_path / "new")
    again = GptOss.from_pretrained(tmp_path / "new", "auto")
    assert equal(dict(again.state_dict()), dict(model.state_dict()))


def test_the_shipped_model_is_saved_with_its_tokenizer(tmp_path):
    GptOss.from_pretrained(POCKET).save_pretrained(tmp_path / "new")
    assert (tmp_path / "new" / "model.safetensors").read_bytes() == (
        POCKET / "model.safetensors").read_bytes()
    for name in ("tokenizer.json", "generation_config.json"):
        if (POCKET / name).exists():
            assert (tmp_path / "new" / name).read_bytes() == (
                POCKET / name).read_bytes()
    assert (tmp_path / "new" / "tokenizer.json").exists()
    assert not (tmp_path / "new" / "README.md").exists()


def test_a_folder_that_holds_something_is_left_alone(folders):
    before = weights(folders / "hf")
    with pytest.raises(CheckpointError, match="a new or empty folder"):
        GptOss.from_pretrained(folders / "hf").save_pretrained(
            folders / "hf")
    assert equal(weights(folders / "hf"), before)


def test_mixed_dtypes_are_refused(folders, tmp_path):
    model = GptOss.from_pretrained(folders / "hf")
    model.layers[0].mlp.router.float()
    with pytest.raises(CheckpointError, match=r"^model\.layers\.0\.mlp\.router"
                       r"\.weight: expected BF16"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


# --- Sizes in repr -----------------------------------------------------------

def test_sizes_in_repr():
    model = GptOss(TINY)
    assert repr(model.norm) == "RMSNorm((32,), eps=1e-05)"
    assert repr(model.layers[0].mlp.experts) == (
        "Experts(experts=4, hidden=32, intermediate=32, packed=True)")
    said = repr(model)
    assert "layer=0, heads=2, head_dim=8, window=5" in said
    assert "layer=1, heads=2, head_dim=8, window=None" in said
    assert "experts_per_token=2" in said
