"""The walk: no false alarm, and every planted fault found and named."""

import json
import math
import os
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import Case, random_case, random_tensors

from gptoss.attention.rope import inverse_frequencies
from gptoss.model.transformer import GptOss
from gptoss.parity import report
from gptoss.parity.contracts import (
    CONTRACTS,
    PLAIN_CONTRACTS,
    ParityError,
    contract_for,
)
from gptoss.parity.judge import Judge, excess
from gptoss.parity.rounding import (
    DEVIATIONS,
    LARGEST,
    LOST,
    Rounding,
    half_step,
)
from gptoss.parity.suspects import FAULTS, judge_walk
from gptoss.parity.walk import points, trace_ours
from gptoss.parity.walk_others import (
    load_openai,
    load_transformers,
    stream_transformers,
    trace_openai,
    trace_transformers,
)
from gptoss.weights.checkpoint import Checkpoint
from gptoss.weights.config import GptOssConfig
from gptoss.weights.convert import convert
from gptoss.weights.write import write_checkpoint

transformers = pytest.importorskip("transformers")
CASES = [random_case(seed) for seed in (2, 3, 4, 5, 8, 9, 11, 12)]
DTYPES = (torch.float32, torch.bfloat16)
# window 128, and the limits of the clamp within reach of random gates
CONFIG = GptOssConfig(
    num_hidden_layers=2, num_local_experts=8, num_experts_per_tok=2,
    vocab_size=96, hidden_size=64, intermediate_size=64, head_dim=32,
    num_attention_heads=4, num_key_value_heads=2, swiglu_limit=4.0,
    eos_token_id=2, pad_token_id=0)
TOKENS = report.default_tokens(CONFIG)


def contract(dtype):
    """That of what runs unasked: this file runs on both paths (conftest)."""
    return contract_for(None, dtype)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parity") / "model"
    write_checkpoint(folder, CONFIG, random_tensors(CONFIG).items())
    return folder


def examine(path, trace, dtype, inner, side="theirs", tokens=TOKENS,
            kernels=False):
    trace[None, "tokens"] = tokens[0]
    with Checkpoint.open(path) as checkpoint:
        return judge_walk(
            Judge(checkpoint, dtype, inner, kernels), trace, side)


def examine_ours(path, trace, dtype, tokens=TOKENS):
    use = CONTRACTS[contract(dtype)]
    return examine(path, trace, dtype, use.inner, "ours", tokens, use.kernels)


# --- Nothing is wrong --------------------------------------------------------

@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_false_alarm_and_equal_bits(case: Case, tmp_path):
    """ours, transformers twice: within rounding; hf-eager: equal bits."""
    path, tokens = case.write(tmp_path), case.prompt()
    for dtype in DTYPES:
        model = GptOss.from_pretrained(path, dtype)
        ours = trace_ours(model, tokens, contract(dtype))
        with torch.inference_mode():
            assert torch.equal(ours[None, "logits"], model(tokens)[0])
        assert examine_ours(path, ours, dtype, tokens)[1] is None
        few = min(4, tokens.shape[1] - 1)
        parts = [tokens.shape[1] - few] + [1] * few
        ours = trace_ours(model, tokens, contract(dtype), parts=parts)
        assert examine_ours(path, ours, dtype, tokens)[1] is None
        theirs = trace_transformers(
            load_transformers(path, dtype), tokens)
        same = trace_ours(model, tokens, "hf-eager")
        assert list(same) == points(case.config)
        assert [key for key in same
                if not torch.equal(same[key], theirs[key])] == []
        assert examine(path, theirs, dtype, True, tokens=tokens)[1] is None
        grouped = trace_transformers(
            load_transformers(path, dtype, "grouped_mm"), tokens)
        assert examine(path, grouped, dtype, True, tokens=tokens)[1] is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_openai(path, dtype):
    pytest.importorskip("gpt_oss.torch.model", reason="no gpt-oss 0.0.9")
    theirs = trace_openai(load_openai(path, dtype), TOKENS)
    assert set(theirs) == set(points(CONFIG))
    assert examine(path, theirs, dtype, True)[1] is None
    ours = trace_ours(GptOss.from_pretrained(path, dtype), TOKENS,
                      "openai-torch")
    unequal = {key[1] for key in ours
               if not torch.equal(ours[key], theirs[key])}
    if dtype == torch.bfloat16:  # the probe calls with another shape
        assert unequal <= {"hidden"}
    assert examine(path, ours, dtype, True)[1] is None


def test_float64_and_the_other_layouts(path, tmp_path):
    convert(path, tmp_path / "bf16", "bf16")
    convert(path, tmp_path / "original", "original")
    for folder in (path, tmp_path / "bf16", tmp_path / "original"):
        result = report.report(folder, "float64")
        assert result["findings"] == []
        assert all(row.get("relative", 0) < 1e-5 for row in result["rows"])
        assert [row["others"] for row in result["rows"]
                if row["point"] == "chosen"] == [0, 0]
        assert result["logits"]["kl_max"] < 1e-9


def test_parity_judges_what_runs(path):
    """On the kernels' path, their contract in bf16; else plain torch."""
    runs = os.environ["GPTOSS_KERNELS"] != "torch"
    assert contract(torch.bfloat16) == ("kernels" if runs else "fp32")
    assert contract(torch.float32) == "fp32"
    for dtype in DTYPES:
        result = report.report(path, "float64", dtype=dtype)
        assert result["findings"] == [] and not result["compact"]
        by_kernels = runs and dtype == torch.bfloat16
        assert result["contract"] == ("kernels" if by_kernels else "fp32")
        assert result["kernels"].startswith(
            ("C++", "portable") if by_kernels else "plain torch")
        assert result["parts"] == ([128] + [1] * 16 if by_kernels else [144])
        assert result["kernels"] in report.parity_table(result)


def test_plain_torch_is_plain_torch_on_both_paths(path):
    """Contracts of plain torch use no kernel, whatever is loaded; in fp32
    and float64 both paths give the same bits."""
    from gptoss.kernels.build import plain_torch

    for dtype in (torch.float32, torch.bfloat16):
        model = GptOss.from_pretrained(path, dtype)
        for name in PLAIN_CONTRACTS:
            traces = [trace_ours(model, TOKENS, name)]
            with plain_torch():
                traces.append(trace_ours(model, TOKENS, name))
            assert all(torch.equal(traces[0][key], traces[1][key])
                       for key in traces[0])


def test_kernels_would_not_pass_as_plain_torch(path):
    """The two contracts are no synonyms: what the kernels compute is beyond
    the rounding of plain torch, and a model in four bits is judged so."""
    if contract(torch.bfloat16) != "kernels":
        pytest.skip("plain torch is in use")
    model = GptOss.from_pretrained(path)
    ours = trace_ours(model, TOKENS, "kernels")
    _, finding = examine(path, ours, torch.bfloat16, False)
    assert finding is not None and finding.point == "hidden"
    dense = GptOss.from_pretrained(path, packed=False)
    ours = trace_ours(dense, TOKENS, "kernels")
    _, finding = examine_ours(path, ours, torch.bfloat16)
    assert finding is not None and finding.point == "hidden"


def test_twelve_bits(path):
    """--compact: decoding reads other bytes, and is judged as well."""
    if contract(torch.bfloat16) != "kernels":
        with pytest.raises(ParityError, match="compact: expected"):
            report.report(path, "float64", dtype=torch.bfloat16, compact=True)
        pytest.skip("plain torch is in use")
    result = report.report(path, "float64", dtype=torch.bfloat16,
                           compact=True, new_tokens=3)
    assert result["findings"] == [] and result["compact"]
    assert result["parts"] == [144, 1, 1, 1]


def test_eight_bits_are_judged_by_themselves(path):
    """--dense 8: ours by its rounded matrices, and a fault is still seen."""
    how = {"dtype": torch.bfloat16, "dense": 8}
    if contract(torch.bfloat16) != "kernels":
        with pytest.raises(ParityError, match="dense: expected"):
            report.report(path, "float64", **how)
        pytest.skip("plain torch is in use")
    result = report.report(path, "float64", new_tokens=3, **how)
    assert result["findings"] == [] and result["dense"] == 8
    assert not result["compact"]
    assert 1e-6 < result["logits"]["kl_mean"]
    stored = report.report(path, "float64", new_tokens=3,
                           dtype=torch.bfloat16)
    assert stored["dense"] == 16
    assert stored["rows"] != result["rows"]
    result = report.report(path, "float64", fault="bias", **how)
    assert result["findings"]


def test_kernels_that_cannot_be_had(path):
    name = contract(torch.bfloat16)
    for dtype in DTYPES:
        if name == "kernels" and dtype == torch.bfloat16:
            continue
        with pytest.raises(ParityError, match="need bfloat16"):
            report.report(path, "float64", dtype=dtype, contract="kernels")


def test_streamed(path, tmp_path):
    """One layer at a time, from any layout: the same bits, the same report
    without a float64 run."""
    whole = trace_transformers(
        load_transformers(path, torch.bfloat16), TOKENS)
    convert(path, tmp_path / "original", "original")
    for folder in (path, tmp_path / "original"):
        model = stream_transformers(folder)
        part = trace_transformers(model, TOKENS)
        assert all(torch.equal(part[key], whole[key]) for key in whole)
        assert all(p.is_meta for p in model.model.layers.parameters())
    result = report.report(path, "streamed", dtype=torch.bfloat16,
                           fault="window")
    assert [f["cause"] for f in result["findings"]] == [
        FAULTS["window"][1]]
    assert {row["ours_error"] for row in result["rows"]} == {None}
    assert "weights" in report.parity_table(result)


def test_too_large_is_streamed_and_what_it_writes_is_walked_over(
        path, monkeypatch):
    """`--against transformers` on a model that does not fit, with tokens
    of ours that the reference would choose too."""
    whole = report.report(path, "transformers", new_tokens=6)
    assert whole["against"] == "transformers"
    assert len(whole["generated"]["tokens"]) == 6
    assert whole["generated"]["same"] == 6
    memory = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 6 * 2 ** 20}   # 24 GiB
    monkeypatch.setattr(report.os, "sysconf", memory.__getitem__)
    twenty, small = GptOssConfig.gpt_oss_20b(), whole["rows"]
    assert report.too_large(twenty, torch.bfloat16)
    with monkeypatch.context() as patch:
        patch.setattr(report, "too_large", lambda *_: True)
        part = report.report(path, "transformers", new_tokens=6)
    assert part["against"] == "streamed"
    assert part["generated"] == whole["generated"]
    for one, other in zip(small, part["rows"], strict=True):
        assert one["point"] == other["point"]
    assert "chooses the same 6 times" in report.parity_table(part)
    assert report.report(path, "float64")["generated"]["tokens"] == []
    with pytest.raises(ParityError, match="new_tokens: .* at most"):
        report.report(path, "float64", new_tokens=10 ** 6)


# --- Faults in ours ----------------------------------------------------------

@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_in_ours(path, fault, dtype):
    result = report.report(path, "float64", dtype=dtype, fault=fault)
    assert result["contract"] == contract(dtype)
    assert [f["side"] for f in result["findings"]] == ["ours"]
    finding = result["findings"][0]
    assert finding["layer"] == 0
    assert finding["cause"] == FAULTS[fault][1]
    assert finding["cause_excess"] <= 1 < finding["excess"]
    assert finding["cause"] in result["verdict"]
    json.dumps(result)


@pytest.mark.parametrize(("name", "point"), [
    ("gate_up_proj", "hidden"), ("down_proj", "experts")])
@pytest.mark.parametrize("parts", [[144], [140, 1, 1, 1, 1]], ids=len)
def test_one_scale_of_one_row_is_wrong(path, name, point, parts):
    """One of 32 * 64 * 2 blocks an expert, in the last layer: on the path
    that runs, for many tokens at once and for single ones."""
    model = GptOss.from_pretrained(path)
    experts = model.layers[1].mlp.experts
    scales = getattr(experts, f"{name}_scales").clone()
    scales[:, 5, 1] += 1
    setattr(experts, f"{name}_scales", scales)
    trace = trace_ours(model, TOKENS, contract(torch.bfloat16),
                       parts=parts)
    _, finding = examine_ours(path, trace, torch.bfloat16)
    assert (finding.layer, finding.point) == (1, point)
    assert finding.cause is None and finding.excess > 10


def test_eight_bits_are_no_sixteen(path):
    """Activations in bytes, as others round them: beyond every contract."""
    model = GptOss.from_pretrained(path)
    experts = model.layers[0].mlp.experts
    run = type(experts).forward

    def coarse(x, ids, weights):
        blocks = x.float().unflatten(-1, (-1, 32))
        step = blocks.abs().amax(-1, keepdim=True) / 127
        x = ((blocks / step).round() * step).flatten(-2).to(x.dtype)
        return run(experts, x, ids, weights)
    experts.forward = coarse
    trace = trace_ours(model, TOKENS, contract(torch.bfloat16))
    _, finding = examine_ours(path, trace, torch.bfloat16)
    assert (finding.layer, finding.point) == (0, "hidden")


# --- Faults in theirs --------------------------------------------------------

def _truncate(model):
    c = CONFIG
    model.model.rotary_emb.inv_freq.copy_(inverse_frequencies(
        c.head_dim, c.rope_theta, c.rope_factor, truncate=True))


def _unconcentrated(model):
    model.model.rotary_emb.attention_scaling = 1.0


def _window(model):
    model.config.sliding_window = 129


def _sink(model):
    for layer in model.model.layers:
        layer.self_attn.sinks.data.fill_(-1e30)


def _bias(model):
    for layer in model.model.layers:
        layer.self_attn.q_proj.bias.data.mul_(2)


def _swapped(model):
    for layer in model.model.layers:
        for t in (layer.mlp.experts.gate_up_proj,
                  layer.mlp.experts.gate_up_proj_bias):
            t.data = t.data.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


def _nibbles(model):
    for layer in model.model.layers:
        for t in (layer.mlp.experts.gate_up_proj,
                  layer.mlp.experts.down_proj):
            t.data = t.data.unflatten(1, (-1, 2)).flip(2).flatten(1, 2)


def _clamp(model):
    for layer in model.model.layers:
        experts = layer.mlp.experts

        def gate(both, limit=experts.limit):
            gate, up = both[..., ::2], both[..., 1::2]
            gate, up = gate.clamp(min=-limit), up.clamp(-limit, limit)
            return (up + 1) * (gate * torch.sigmoid(gate * 1.702))
        experts._apply_gate = gate


def _softmax(model):
    for layer in model.model.layers:
        router = layer.mlp.router

        def forward(x, router=router):
            logits = F.linear(x, router.weight, router.bias)
            weights, ids = logits.softmax(-1).topk(router.top_k, -1)
            return logits, weights, ids
        router.forward = forward


IN_THEIRS = {
    "truncate": _truncate, "concentration": _unconcentrated,
    "window": _window, "sink": _sink, "bias": _bias, "swapped": _swapped,
    "nibbles": _nibbles, "clamp": _clamp, "softmax": _softmax}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", IN_THEIRS)
def test_planted_in_transformers(path, fault, dtype):
    model = load_transformers(path, dtype)
    with torch.no_grad():
        IN_THEIRS[fault](model)
    _, finding = examine(
        path, trace_transformers(model, TOKENS), dtype, True)
    assert finding is not None and finding.layer == 0
    assert finding.cause == FAULTS[fault][1]


def test_every_fault_is_planted_in_both():
    assert set(IN_THEIRS) == set(FAULTS)


# --- A fault in a later layer, and one that nobody knows ---------------------

def test_the_first_is_named(path):
    model = GptOss.from_pretrained(path, torch.float32)
    bias = model.layers[1].self_attn.k_proj.bias
    bias.data = torch.zeros_like(bias)
    _, finding = examine(path, trace_ours(model, TOKENS),
                         torch.float32, False)
    assert (finding.layer, finding.point) == (1, "k")
    assert finding.cause == "bias left out"


def test_unknown_cause(path):
    model = GptOss.from_pretrained(path, torch.float32)
    model.norm.weight.data = 1.001 * model.norm.weight
    _, finding = examine(path, trace_ours(model, TOKENS),
                         torch.float32, False)
    assert (finding.layer, finding.point) == (None, "last norm")
    assert finding.cause is None and "no known cause" in finding.describe()


def test_wrong_choice_and_nan(path):
    model = GptOss.from_pretrained(path, torch.float32)
    trace = trace_ours(model, TOKENS)
    trace[1, "chosen"] = trace[1, "router"].topk(2, largest=False)[1]
    _, finding = examine(path, trace, torch.float32, False)
    assert (finding.layer, finding.point) == (1, "chosen")
    trace = trace_ours(model, TOKENS)
    trace[0, "v"] = torch.full_like(trace[0, "v"], math.nan)
    _, finding = examine(path, trace, torch.float32, False)
    assert (finding.layer, finding.point) == (0, "v")
    assert finding.excess == math.inf


# --- Bounds ------------------------------------------------------------------

@settings(deadline=None, max_examples=60)
@given(blocks=st.integers(1, 9), scale=st.sampled_from((1e-30, 1.0, 1e20)),
       power=st.sampled_from((0, 1, 3)), seed=st.integers(0, 10 ** 6),
       stored=st.booleans())
def test_half_step(blocks, scale, power, seed, stored):
    """Rounded to sixteen bits as the kernels do it, no entry is further
    off; and outliers, which make the step coarse, are allowed for."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 32 * blocks, generator=g, dtype=torch.float64)
    x = scale * x * x.abs() ** power
    x = (x.bfloat16() if stored else x.float()).double()
    parts = x.unflatten(-1, (-1, 32))
    top = parts.abs().amax(-1, keepdim=True)
    step = 2.0 ** (top.log2().floor() - 13) if stored else (
        top / LARGEST)
    off = ((parts / step).round() * step - parts).abs().flatten(-2)
    half = half_step((x, torch.zeros_like(x)), stored)
    assert (off <= half).all()
    assert (half <= 0.51 * step.expand_as(parts).flatten(-2)
            + LOST).all()


@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 300), m=st.integers(1, 20), seed=st.integers(0, 99),
       scale=st.sampled_from((1e-3, 1.0, 1e3)),
       dtype=st.sampled_from(DTYPES))
def test_linear_bound(n, m, seed, scale, dtype):
    g = torch.Generator().manual_seed(seed)
    x, w, b = ((scale * torch.randn(s, generator=g)).to(dtype)
               for s in ((4, n), (m, n), (m,)))
    r = Rounding.of(dtype, False)
    zero = torch.zeros(4, n, dtype=torch.float64)
    value, bound = r.linear((x.double(), zero), w.double(), b.double(), False)
    found = F.linear(x, w, b)
    assert excess(found, (value, bound)) <= 1
    moved = value + 4 * bound
    assert excess(moved, (value, bound)) > 1


def test_units():
    r = Rounding.of(torch.bfloat16, True)
    assert (r.unit, r.wide, r.inner) == (2 ** -8, 2 ** -24, 2 ** -8)
    assert r.sums(4) == 4 * r.wide  # the worst case, where it is smaller
    assert r.sums(2500) == DEVIATIONS * 50 * r.wide


# --- Numbers of the report ---------------------------------------------------

def test_compare():
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 4.0])
    got = report.compare(a, b)
    assert got == {"max": 3.0, "mean": 1.5, "relative": 0.75, "cosine": 0.8}
    p = torch.tensor([[0.5, 0.25, 0.25]]).log()
    q = torch.tensor([[0.25, 0.5, 0.25]]).log()
    got = report.compare_logits(q, p, k=1)
    assert got["argmax"] == got["top_k"] == 0
    assert got["kl_mean"] == pytest.approx(0.25 * math.log(2))


def test_table_has_a_line_a_point(path):
    result = report.report(path, "float64", fault="window")
    lines = report.parity_table(result).splitlines()
    assert len(lines) == 3 + len(points(CONFIG)) + 1 + 2
    assert {len(line) for line in lines[2:3 + len(points(CONFIG))]} == {79}
    marked = [line for line in lines if "!" in line]
    assert "weights" in marked[0]


# --- What cannot be done -----------------------------------------------------

@pytest.mark.parametrize("options", [
    {"against": "vllm"}, {"contract": "bf16"}, {"fault": "gremlin"}])
def test_unknown_names(path, options):
    with pytest.raises(ParityError, match="expected one of"):
        report.report(path, **{"against": "float64", **options})


@pytest.mark.parametrize(("package", "against"), [
    ("transformers", "transformers"), ("gpt_oss.torch.model", "openai")])
def test_missing_packages(path, monkeypatch, package, against):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ParityError, match="expected the package"):
        report.report(path, against)


def test_hooks_are_gone(path):
    from transformers.models.gpt_oss import modeling_gpt_oss as theirs

    before = theirs.eager_attention_forward
    model = load_transformers(path)
    held = model.model.layers[0].mlp.experts.down_proj
    trace_transformers(model, TOKENS)
    assert theirs.eager_attention_forward is before
    assert model.model.layers[0].mlp.experts.down_proj is held
    assert not any(m._forward_hooks for m in model.modules())
