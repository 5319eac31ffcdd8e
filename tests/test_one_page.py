"""The whole model on one page, against the package and in its own words."""

import ast
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptoss import GptOss, GptOssConfig, Tokenizer
from gptoss import one_page as page
from gptoss.attention.masks import visible
from gptoss.attention.rope import apply_rope
from gptoss.attention.sinks import attention_concat
from gptoss.model.norm import rms_norm
from gptoss.moe.experts import clamped_swiglu, packed_by_decoding
from gptoss.moe.routing import route
from gptoss.weights import mxfp4
from gptoss.weights.convert import convert

SPREAD = 2e-5  # of the logits' standard deviation


@pytest.fixture(scope="module")
def pocket() -> tuple[dict, dict]:
    return page.read(page.POCKET)


@pytest.fixture(scope="module")
def model() -> GptOss:
    return GptOss.from_pretrained(page.POCKET, dtype=torch.float32)


def tokens(length: int, vocabulary: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (length,), generator=generator)


def same(ours: torch.Tensor, page: torch.Tensor) -> None:
    """Logits within SPREAD and the same best token everywhere."""
    assert (ours - page).abs().max() <= SPREAD * ours.std()
    assert ours.argmax(-1).equal(page.argmax(-1))


# --- Against the package -----------------------------------------------------

@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 129, 300])
@torch.inference_mode()
def test_logits_are_the_package_s(pocket, model: GptOss, length: int) -> None:
    config, w = pocket
    assert config["sliding_window"] == 64
    ids = tokens(length, config["vocab_size"], seed=length)
    same(model(ids[None])[0], page.forward(ids, w, config))


@torch.inference_mode()
def test_the_sentence_is_the_package_s(model: GptOss) -> None:
    given = Tokenizer.from_pretrained(page.POCKET).encode(page.SENTENCE)
    assert page.text_to_ids(page.SENTENCE, page.POCKET) == given
    text = page.sentence(60)
    assert text.startswith(page.SENTENCE)
    ids = page.text_to_ids(text, page.POCKET)
    assert len(ids) == len(given) + 60 > 64
    best = model(torch.tensor([ids]))[0].argmax(-1).tolist()
    assert best[len(given) - 1:-1] == ids[len(given):]


@torch.inference_mode()
def test_other_sizes(tmp_path: Path) -> None:
    """A random model with all sizes different, sinks that matter, weights
    large enough that the clamps do."""
    config = GptOssConfig(
        num_hidden_layers=3, num_local_experts=5, num_experts_per_tok=3,
        vocab_size=97, hidden_size=64, intermediate_size=96, head_dim=16,
        num_attention_heads=6, num_key_value_heads=2, sliding_window=5,
        eos_token_id=2, pad_token_id=0)
    made = GptOss(config, torch.float32, packed=False)
    generator = torch.Generator().manual_seed(0)
    for name, x in made.named_parameters():
        size = 4.0 if "gate_up_proj" in name else 0.5
        x.data.copy_(size * torch.randn(x.shape, generator=generator)
                     * (1 if x.ndim == 1 else x.shape[-1] ** -0.5))
    made.save_pretrained(tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "hf", "hf")
    settings, w = page.read(tmp_path / "hf")
    assert "model.layers.2.mlp.experts.down_proj_blocks" in w
    ours = GptOss.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    ids = tokens(23, config.vocab_size)
    same(ours(ids[None])[0], page.forward(ids, w, settings))


def test_several_files(tmp_path: Path, pocket) -> None:
    tensors = load_file(page.POCKET / "model.safetensors")
    shutil.copy(page.POCKET / "config.json", tmp_path)
    for n in range(3):
        save_file({key: tensors[key] for key in sorted(tensors)[n::3]},
                  tmp_path / f"model-{n + 1:05}-of-00003.safetensors")
    index = {"weight_map": {}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    _, again = page.read(tmp_path)
    assert again.keys() == pocket[1].keys()
    assert all(x.equal(pocket[1][name]) for name, x in again.items())


# --- Its functions -----------------------------------------------------------

def test_decode_all_bytes_and_scales() -> None:
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    scales = torch.arange(1, 255, dtype=torch.uint8).view(-1, 1)
    blocks = blocks.expand(254, 16, 16)
    scales = scales.expand(254, 16)
    assert page.decode(blocks, scales).equal(
        mxfp4.decode(blocks, scales, torch.float32))


def test_parts_are_twins_of_the_package_s() -> None:
    torch.manual_seed(0)
    x, scale = torch.randn(7, 64), torch.randn(64)
    assert page.rms_norm(x, scale).allclose(rms_norm(x, scale), atol=1e-6)
    logits = torch.randn(9, 8)
    for ours, theirs in zip(page.route(logits, 3), route(logits, 3),
                            strict=True):
        assert ours.equal(theirs)
    gate_up = 10 * torch.randn(50, 12)
    assert page.swiglu(gate_up).allclose(clamped_swiglu(gate_up), atol=1e-5)
    q_pos, k_pos = torch.tensor([3, 4]), torch.arange(5)
    for window in (None, 1, 2, 4, 9):
        assert page.visible(q_pos, k_pos, window).equal(
            visible(q_pos, k_pos, window))


# --- Swapping functions ------------------------------------------------------

def their_attention(q, k, v, sinks, window):
    pos = torch.arange(len(q))
    return attention_concat(q[None], k[None], v[None], sinks,
                            visible(pos, pos, window)[None],
                            q.shape[-1] ** -0.5)[0]


def their_experts(x, ids, weights, w, limit):
    return packed_by_decoding(x, ids, weights, *(
        w[f"{name}_proj_{end}"] for name in ("gate_up", "down")
        for end in ("blocks", "scales", "bias")), limit)


@pytest.mark.parametrize("functions", [
    {"decode": mxfp4.decode}, {"rms_norm": rms_norm}, {"route": route},
    {"rope": apply_rope}, {"visible": visible}, {"swiglu": clamped_swiglu},
    {"attention": their_attention}, {"experts": their_experts},
    {"decode": mxfp4.decode, "rms_norm": rms_norm, "rope": apply_rope,
     "route": route, "attention": their_attention}],
    ids=lambda functions: "+".join(functions))
def test_the_package_s_functions_write_the_same(functions: dict) -> None:
    """As later chapters put in what they have derived."""
    assert page.sentence(12, **functions) == page.sentence(12)


def test_a_wrong_function_writes_something_else() -> None:
    def backwards(q_pos, k_pos, window):
        return page.visible(q_pos, k_pos, window).flip(1)

    right = page.sentence(12)
    assert page.sentence(12, visible=backwards) != right
    assert page.sentence(12, decode=lambda b, s: 0 * page.decode(b, s)
                         ) != right
    assert page.sentence(12) == right  # the page is as it was


def test_every_function_can_be_replaced_by_one_that_calls_it() -> None:
    """None of them loops, and each is really called."""
    names = [function.__name__ for function in page.REPLACEABLE]
    assert set(page.__all__) == {*names, "FP4", "POCKET", "REPLACEABLE",
                                 "SENTENCE", "Weights", "sentence"}
    right = page.sentence(2)
    for name in names:
        calls = []

        def spy(*given, name=name, calls=calls):
            calls.append(name)
            return getattr(page, name)(*given)

        assert page.sentence(2, **{name: spy}) == right
        assert calls, name


def test_unknown_functions_are_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"expected one of .*attention.*, "
                                        r"found atention"):
        page.sentence(atention=page.attention)
    with pytest.raises(TypeError, match="found sentence"):
        page.sentence(sentence=page.sentence)


# --- The page itself ---------------------------------------------------------

def test_it_stands_alone() -> None:
    """It imports nothing of the package, and is about a hundred lines."""
    source = Path(page.__file__).read_text("utf-8")
    names = {node.module if isinstance(node, ast.ImportFrom) else alias.name
             for node in ast.walk(ast.parse(source))
             if isinstance(node, ast.Import | ast.ImportFrom)
             for alias in node.names}
    assert names == {"collections.abc", "importlib.resources", "json", "math",
                     "pathlib", "safetensors.torch", "tokenizers", "torch",
                     "types"}
    model = source[:source.index("# --- The sentence")]
    texts = [node.body[0] for node in ast.walk(ast.parse(model))
             if isinstance(node, ast.FunctionDef | ast.Module)
             and ast.get_docstring(node)]
    said = {line for text in texts
            for line in range(text.lineno, text.end_lineno + 1)}
    code = [line for number, line in enumerate(model.splitlines(), 1)
            if number not in said and line.strip()]
    assert 100 < len(code) <= 115
