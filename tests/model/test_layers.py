"""gptoss.model.layers: the router and the experts as modules."""

import pytest
import torch
import torch.nn.functional as F
from test_experts import close, draw_case
from torch.utils.flop_counter import FlopCounterMode
from transformers import GptOssConfig as HFConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter

from gptoss.model.layers import Experts, Router
from gptoss.moe.experts import experts_loop
from gptoss.moe.routing import top_logits
from gptoss.weights.config import GptOssConfig
from gptoss.weights.encoding import encode
from gptoss.weights.mxfp4 import MXFP4Error, PackedMXFP4

# ---- the router

def config(E, K, D):
    return GptOssConfig(num_hidden_layers=2, hidden_size=D,
                        num_local_experts=E, num_experts_per_tok=K)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("E, K, D", ((4, 1, 32), (8, 2, 96), (8, 8, 40),
                                     (32, 4, 64), (128, 4, 128)))
def test_against_transformers_and_openai(E, K, D, dtype):
    ours = Router(config(E, K, D), dtype)
    hf = GptOssTopKRouter(HFConfig(
        hidden_size=D, num_local_experts=E, num_experts_per_tok=K)).to(dtype)
    hf.load_state_dict(ours.state_dict())
    x = torch.randn(500, D).to(dtype)
    with torch.no_grad():
        weights, ids = ours(x)
        logits, hf_weights, hf_ids = hf(x)
    assert torch.equal(weights, hf_weights) and weights.dtype == dtype
    openai = torch.topk(logits, k=K, dim=-1, sorted=True)
    assert torch.equal(weights, F.softmax(openai.values, dim=1))
    edge = top_logits(logits, min(K + 1, E))[0]
    tied = (edge[:, 1:] == edge[:, :-1]).any(-1)
    if dtype == torch.float32:
        assert tied.sum() < 5
    for other in (hf_ids, openai.indices):
        assert torch.equal(ids[~tied], other[~tied])
    # on ties too, what is chosen has the same logits
    assert torch.equal(logits.gather(1, ids), logits.gather(1, hf_ids))


def test_router_takes_its_sizes_from_the_config():
    for c, count in ((GptOssConfig.gpt_oss_20b(), 92_192),
                     (GptOssConfig.gpt_oss_120b(), 368_768)):
        router = Router(c, dtype=torch.bfloat16, device="meta")
        assert router.k == 4
        assert sum(p.numel() for p in router.parameters()) == count
        assert {p.dtype for p in router.parameters()} == {torch.bfloat16}
        with FlopCounterMode(display=False) as counter:
            router(torch.empty(3, 2880, dtype=torch.bfloat16, device="meta"))
        assert counter.get_total_flops() == (
            2 * 3 * 2880 * c.num_local_experts)
    assert sorted(dict(Router(config(8, 2, 32)).named_parameters())) == [
        "bias", "weight"]


def test_bias_counts():
    router = Router(config(8, 2, 32))
    with torch.no_grad():
        router.bias[5] = 100.0
    assert (router(torch.randn(20, 32))[1][:, 0] == 5).all()


# ---- the experts

def small(**changes):
    base = dict(num_hidden_layers=2, num_local_experts=4,
                num_experts_per_tok=2, vocab_size=64, hidden_size=32,
                intermediate_size=64, head_dim=16, num_attention_heads=4,
                num_key_value_heads=2)
    return GptOssConfig(**(base | changes))


def test_module_packed_equals_dense():
    packed, dense = Experts(small()), Experts(small(), packed=False)
    assert set(packed.state_dict()) == {
        f"{name}_{part}" for name in ("gate_up_proj", "down_proj")
        for part in ("blocks", "scales", "bias")}
    assert set(dense.state_dict()) == {
        "gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"}
    assert dense.gate_up_proj.shape == (4, 128, 32)
    assert dense.down_proj.shape == (4, 32, 64)
    state = packed.state_dict()
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(dense, name)
        blocks, scales = encode(weight.detach())
        state |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        with torch.no_grad():
            weight.copy_(PackedMXFP4(blocks, scales).decode())
    packed.load_state_dict(state)
    x, ids, weights, *_ = draw_case(6, 4, 2, 32, 64, dtype=torch.bfloat16)
    out = packed(x, ids, weights)
    assert out.dtype == torch.bfloat16 and out.abs().max() > 0
    assert torch.equal(out, dense(x, ids, weights))


def test_module_limit_comes_from_the_config():
    dense = Experts(small(swiglu_limit=0.01), packed=False,
                    dtype=torch.float32)
    case = draw_case(6, 4, 2, 32, 64)
    got = dense(*case[:3])
    parts = [p.detach() for p in (dense.gate_up_proj, dense.gate_up_proj_bias,
                                  dense.down_proj, dense.down_proj_bias)]
    close(got, experts_loop(*case[:3], *parts, 0.01))
    assert (got - experts_loop(*case[:3], *parts, 7.0)).abs().max() > 1e-4


@pytest.mark.parametrize("config, layer_bytes", (
    (GptOssConfig.gpt_oss_20b(), 423_567_360),
    (GptOssConfig.gpt_oss_120b(), 1_694_269_440)))
def test_published_shapes_on_meta(config, layer_bytes):
    E = config.num_local_experts
    layer = Experts(config, device="meta")
    shapes = {name: tuple(t.shape) for name, t in layer.state_dict().items()}
    assert shapes == {
        "gate_up_proj_blocks": (E, 5760, 90, 16),
        "gate_up_proj_scales": (E, 5760, 90), "gate_up_proj_bias": (E, 5760),
        "down_proj_blocks": (E, 2880, 90, 16),
        "down_proj_scales": (E, 2880, 90), "down_proj_bias": (E, 2880)}
    assert sum(t.nbytes for t in layer.state_dict().values()) == layer_bytes
    dense = Experts(config, packed=False, device="meta")
    assert dense.gate_up_proj.shape == (E, 5760, 2880)
    assert dense.down_proj.shape == (E, 2880, 2880)


def test_widths_that_cannot_be_packed():
    with pytest.raises(ValueError, match="gate_up_proj: .*32.*found 48"):
        Experts(small(hidden_size=48))
    with pytest.raises(ValueError, match="down_proj: .*32.*found 40"):
        Experts(small(intermediate_size=40))
    assert issubclass(MXFP4Error, ValueError)
