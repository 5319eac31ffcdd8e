"""Rotary positions: the released numbers, HF, OpenAI, and the properties."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GptOssConfig as HFConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gpt_oss.modeling_gpt_oss import (
    GptOssRotaryEmbedding,
    apply_rotary_pos_emb,
)

from gptoss.attention.rope import (
    apply_rope,
    concentration,
    correction_range,
    inverse_frequencies,
    rope_parameters,
    rope_tables,
)
from gptoss.weights.config import GptOssConfig

C, THETA, TRAINED, FACTOR = 64, 150000.0, 4096, 32.0
POSITIONS = 131_072
CONCENTRATION = 1.3465735902799727


def hf_config(head_dim=C, theta=THETA, **yarn):
    rope = {"rope_type": "default", "rope_theta": theta}
    if yarn:
        rope = {
            "rope_type": "yarn",
            "rope_theta": theta,
            "factor": FACTOR,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": TRAINED,
        } | yarn
    return HFConfig(head_dim=head_dim, rope_parameters=rope)


@pytest.fixture(scope="module")
def released():
    return inverse_frequencies(C, THETA, FACTOR)


def test_the_released_numbers():
    low, high = correction_range(C, THETA)
    assert (low, high) == (8.092779115512402, 17.39802450158856)
    assert correction_range(C, THETA, truncate=True) == (8, 18)
    assert concentration(FACTOR) == CONCENTRATION
    assert concentration(1.0) == concentration(0.5) == 1.0
    for turns, end in ((32.0, low), (1.0, high)):
        speed = THETA ** (-2 * end / C)
        assert math.isclose(TRAINED * speed / (2 * math.pi), turns)


def test_both_released_configurations_use_them(released):
    for config in (GptOssConfig.gpt_oss_20b(), GptOssConfig.gpt_oss_120b()):
        inv_freq, conc = rope_parameters(config)
        assert inv_freq.dtype == torch.float32
        assert torch.equal(inv_freq, released)
        assert conc == CONCENTRATION


def test_a_default_configuration_is_plain_rope():
    config = dataclasses.replace(
        GptOssConfig.gpt_oss_20b(), rope_type="default"
    )
    inv_freq, conc = rope_parameters(config)
    assert conc == 1.0
    assert torch.equal(inv_freq, inverse_frequencies(C, THETA))
    want = THETA ** (-torch.arange(0, C, 2, dtype=torch.float64) / C)
    torch.testing.assert_close(inv_freq.double(), want, rtol=3e-7, atol=0)


def test_every_position_equals_hf_bit_for_bit(released):
    config = hf_config(factor=FACTOR)
    inv_freq, conc = ROPE_INIT_FUNCTIONS["yarn"](config)
    assert torch.equal(inv_freq, released) and conc == CONCENTRATION
    rotary = GptOssRotaryEmbedding(config)
    for start in range(0, POSITIONS, 16384):
        p = torch.arange(start, start + 16384)[None]
        theirs = rotary(torch.zeros(1), p)
        for t, o in zip(
            theirs, rope_tables(p, released, CONCENTRATION), strict=True
        ):
            assert o.shape == (1, 16384, C // 2)
            assert torch.equal(t, o)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_tables_equal_hf(released, dtype):
    rotary = GptOssRotaryEmbedding(hf_config(factor=FACTOR))
    p = torch.arange(0, POSITIONS, 37)[None]
    theirs = rotary(torch.zeros(1, dtype=dtype), p)
    ours = rope_tables(p, released, CONCENTRATION, dtype)
    assert all(torch.equal(t, o) for t, o in zip(theirs, ours, strict=True))


@settings(deadline=None, max_examples=60)
@given(
    head_dim=st.integers(1, 65).map(lambda n: 2 * n),
    theta=st.floats(10.0, 1e7),
    factor=st.floats(1.001, 128.0),
    original=st.integers(16, 65536),
    beta_fast=st.floats(2.0, 64.0),
    beta_slow=st.floats(0.25, 2.0),
    truncate=st.booleans(),
    positions=st.lists(st.integers(0, 4_000_000), min_size=1, max_size=9),
)
def test_any_yarn_equals_hf_bit_for_bit(
    head_dim, theta, factor, original, beta_fast, beta_slow, truncate,
    positions,
):
    options = {
        "factor": factor,
        "beta_fast": beta_fast,
        "beta_slow": beta_slow,
        "truncate": truncate,
    }
    config = hf_config(
        head_dim, theta, original_max_position_embeddings=original, **options
    )
    ours = inverse_frequencies(head_dim, theta, original=original, **options)
    theirs, conc = ROPE_INIT_FUNCTIONS["yarn"](config)
    assert torch.equal(ours, theirs)
    assert concentration(factor) == conc
    p = torch.tensor([positions])
    for t, o in zip(
        GptOssRotaryEmbedding(config)(torch.zeros(1), p),
        rope_tables(p, ours, conc),
        strict=True,
    ):
        assert torch.equal(t, o)


@settings(deadline=None, max_examples=40)
@given(
    head_dim=st.integers(1, 65).map(lambda n: 2 * n),
    theta=st.floats(10.0, 1e7),
    positions=st.lists(st.integers(0, 131_071), min_size=1, max_size=9),
)
def test_any_default_equals_hf_bit_for_bit(head_dim, theta, positions):
    rotary = GptOssRotaryEmbedding(hf_config(head_dim, theta))
    inv_freq = inverse_frequencies(head_dim, theta)
    assert torch.equal(inv_freq, rotary.inv_freq)
    p = torch.tensor([positions])
    for t, o in zip(
        rotary(torch.zeros(1), p), rope_tables(p, inv_freq), strict=True
    ):
        assert torch.equal(t, o)


def test_yarn_by_a_factor_of_one_is_hf_within_one_step():
    theirs, conc = ROPE_INIT_FUNCTIONS["yarn"](hf_config(factor=1.0))
    ours = inverse_frequencies(C, THETA, 1.0)
    assert conc == concentration(1.0) == 1.0
    assert ((ours - theirs).abs() <= 2**-23 * theirs).all()


def test_the_speeds_are_real_even_where_a_model_is_being_sketched():
    """Under a meta device, too: they are numbers, not parameters to load."""
    want = inverse_frequencies(C, THETA, FACTOR)
    with torch.device("meta"):
        got, _ = rope_parameters(GptOssConfig.gpt_oss_20b())
        plain = inverse_frequencies(C, THETA)
    assert got.device.type == plain.device.type == "cpu"
    assert torch.equal(got, want)
    assert inverse_frequencies(C, THETA, FACTOR, device="meta").is_meta


def test_a_ramp_without_width_is_a_step():
    options = {"truncate": True, "original": 4}  # both ends fall on 0
    assert correction_range(8, THETA, **options) == (0, 0)
    ours = inverse_frequencies(8, THETA, FACTOR, **options)
    config = hf_config(8, truncate=True, original_max_position_embeddings=4)
    assert torch.equal(ours, ROPE_INIT_FUNCTIONS["yarn"](config)[0])
    assert torch.equal(ours[0], inverse_frequencies(8, THETA)[0])


def openai_formula():
    """gpt_oss/torch/model.py's formula, in its order of operations."""
    wave = THETA ** (torch.arange(0, C, 2, dtype=torch.float32) / C)
    low, high = (
        C / 2 * math.log(TRAINED / (beta * 2 * math.pi)) / math.log(THETA)
        for beta in (32.0, 1.0)
    )
    keep = 1 - ((torch.arange(C / 2) - low) / (high - low)).clamp(0, 1)
    return 1 / (FACTOR * wave) * (1 - keep) + 1 / wave * keep


def test_every_position_equals_openais_formula(released):
    speeds = openai_formula()
    assert torch.equal(speeds, released)
    angle = torch.outer(torch.arange(POSITIONS).float(), speeds)
    cos, sin = rope_tables(torch.arange(POSITIONS), released, CONCENTRATION)
    assert torch.equal(angle.cos() * (0.1 * math.log(32.0) + 1.0), cos)
    assert torch.equal(angle.sin() * (0.1 * math.log(32.0) + 1.0), sin)


def test_openais_own_code_where_it_is_installed(released):
    model = pytest.importorskip(
        "gpt_oss.torch.model",
        reason="gpt-oss 0.0.9 asks for Python 3.12; the formula is above",
    )
    rotary = model.RotaryEmbedding(
        C, THETA, torch.float32, TRAINED, FACTOR, 1.0, 32.0
    )
    cos, sin = rotary._compute_cos_sin(POSITIONS)
    ours = rope_tables(torch.arange(POSITIONS), released, CONCENTRATION)
    assert torch.equal(cos, ours[0]) and torch.equal(sin, ours[1])
    q, k = torch.randn(9, 4 * C), torch.randn(9, 2 * C)
    for x, theirs in zip((q, k), rotary(q, k), strict=True):
        x = apply_rope(x.view(1, 9, -1, C), ours[0][:9], ours[1][:9])
        assert torch.equal(x.reshape(theirs.shape), theirs)


def test_truncate_moves_nine_pairs(released):
    rounded = inverse_frequencies(C, THETA, FACTOR, truncate=True)
    change = rounded.double() / released.double() - 1
    moved = change.abs().gt(1e-6).nonzero().flatten().tolist()
    assert moved == list(range(9, 18))
    assert torch.equal(rounded[:9], released[:9])
    assert torch.equal(rounded[18:], released[18:])
    assert change.argmax() == 17 and abs(change[17] - 0.763) < 5e-4
    phase = TRAINED * (rounded.double() - released.double()).abs()
    assert phase.argmax() == 12 and abs(phase.max() - 0.904) < 5e-4


def test_the_three_zones(released):
    slowed = inverse_frequencies(C, THETA) / released
    assert (slowed[:9] == 1).all()
    assert (slowed[9:18] > 1).all() and (slowed[9:18] < 32).all()
    assert (slowed.diff() >= -1e-5).all()
    torch.testing.assert_close(slowed[18:], torch.full((14,), 32.0))


def test_fp32_phase_at_the_last_position(released):
    last = POSITIONS - 1
    low, high = correction_range(C, THETA)
    pair = torch.arange(C // 2, dtype=torch.float64)
    keep = 1 - ((pair - low) / (high - low)).clamp(0, 1)
    exact = THETA ** (-2 * pair / C) * (keep + (1 - keep) / FACTOR)
    angle = (torch.tensor(float(last)) * released).double()
    product = (angle - last * released.double()).abs().max()
    total = (angle - last * exact).abs().max()
    assert product <= 2**-8  # half a step of fp32 between 2**16 and 2**17
    assert 1e-4 < total < 1e-2
    # float64 frequencies give float64 tables: what the error is seen with
    wide = rope_tables(torch.tensor([last]), released.double(), 1.0,
                       torch.float64)
    narrow = rope_tables(torch.tensor([last]), released)
    assert wide[0].dtype == torch.float64
    assert (wide[0] - narrow[0]).abs().max() <= product + 1e-6


def test_one_position_is_the_row_of_the_long_table(released):
    cos, sin = rope_tables(torch.arange(POSITIONS), released, CONCENTRATION)
    for p in [*range(0, POSITIONS, 8191), POSITIONS - 1]:
        one = rope_tables(torch.tensor([[p]]), released, CONCENTRATION)
        assert torch.equal(one[0][0, 0], cos[p])
        assert torch.equal(one[1][0, 0], sin[p])


def test_padding_gets_finite_rows(released):
    positions = torch.tensor([[-1, -1, 0, 1], [0, 1, -1, 2]])
    cos, sin = rope_tables(positions, released, CONCENTRATION)
    assert cos.shape == sin.shape == (2, 4, C // 2)
    assert cos.isfinite().all() and sin.isfinite().all()
    assert torch.equal(cos[0, 3], cos[1, 1])


shapes = st.tuples(
    st.integers(1, 3), st.integers(1, 6), st.integers(1, 3), st.integers(1, 9)
)


@settings(deadline=None, max_examples=60)
@given(shapes, st.integers(0, 130_000), st.integers(0, 2**31))
def test_scores_depend_on_the_distance_alone(shape, shift, seed):
    batch, tokens, heads, half = shape
    g = torch.Generator().manual_seed(seed)
    inv_freq = inverse_frequencies(2 * half, THETA, FACTOR).double()
    q, k = torch.randn(
        2, batch, tokens, heads, 2 * half, generator=g, dtype=torch.float64
    ).unbind()
    where = torch.randint(0, 1000, (2, batch, tokens), generator=g)

    def scores(by):
        turned = [
            apply_rope(x, *rope_tables(p + by, inv_freq, 1.0, torch.float64))
            for x, p in zip((q, k), where, strict=True)
        ]
        return torch.einsum("bthc,bshc->bhts", *turned)

    torch.testing.assert_close(scores(shift), scores(0), rtol=0, atol=1e-8)


@settings(deadline=None, max_examples=40)
@given(shapes, st.integers(0, 2**31))
def test_a_rotation_times_the_concentration(shape, seed):
    batch, tokens, heads, half = shape
    g = torch.Generator().manual_seed(seed)
    inv_freq = inverse_frequencies(2 * half, THETA, FACTOR).double()
    x = torch.randn(
        batch, tokens, heads, 2 * half, generator=g, dtype=torch.float64
    )
    a, b = torch.randint(0, 60_000, (2, batch, tokens), generator=g)
    at_a, at_b, both = (
        rope_tables(p, inv_freq, 1.0, torch.float64) for p in (a, b, a + b)
    )
    torch.testing.assert_close(
        apply_rope(apply_rope(x, *at_a), *at_b), apply_rope(x, *both)
    )
    at_a = rope_tables(a, inv_freq, CONCENTRATION, torch.float64)
    torch.testing.assert_close(
        apply_rope(x, *at_a).norm(dim=-1), CONCENTRATION * x.norm(dim=-1)
    )


def test_concentration_enters_a_score_squared(released):
    q, k = torch.randn(2, 1, 1, 1, C, dtype=torch.float64).unbind()
    p = torch.tensor([[77]])
    plain, scaled = (
        (apply_rope(q, *t) * apply_rope(k, *t)).sum()
        for t in (
            rope_tables(p, released, c, torch.float64)
            for c in (1.0, CONCENTRATION)
        )
    )
    assert torch.isclose(scaled / plain, torch.tensor(1.8132604).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_turning_equals_hf_bit_for_bit(released, dtype):
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 7, 8, C, generator=g).to(dtype)
    k = torch.randn(2, 7, 2, C, generator=g).to(dtype)
    p = torch.randint(0, POSITIONS, (2, 7), generator=g)
    t = rope_tables(p, released, CONCENTRATION, dtype)
    theirs = apply_rotary_pos_emb(q, k, *t, unsqueeze_dim=2)
    for ours, want in zip((q, k), theirs, strict=True):
        got = apply_rope(ours, *t)
        assert got.dtype == dtype and torch.equal(got, want)


def test_wider_tables_do_not_widen_the_result(released):
    x = torch.randn(1, 3, 2, C).bfloat16()
    cos, sin = rope_tables(torch.arange(3), released)
    assert apply_rope(x, cos, sin).dtype == torch.bfloat16
    assert torch.equal(
        apply_rope(x, cos, sin),
        apply_rope(x, cos.bfloat16(), sin.bfloat16()),
    )


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 33), st.integers(1, 4), st.integers(0, 2**31))
def test_half_split_is_interleaved_permuted(half, heads, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 5, heads, 2 * half, generator=g)
    p = torch.randint(0, POSITIONS, (1, 5), generator=g)
    inv_freq = inverse_frequencies(2 * half, THETA, FACTOR)
    cos, sin = rope_tables(p, inv_freq, CONCENTRATION)
    order = torch.arange(2 * half).view(2, half).T.flatten()
    even, odd = x[..., order][..., 0::2], x[..., order][..., 1::2]
    c, s = cos.unsqueeze(-2), sin.unsqueeze(-2)
    want = torch.stack((even * c - odd * s, odd * c + even * s), dim=-1)
    assert torch.equal(apply_rope(x, cos, sin)[..., order], want.flatten(-2))


def test_gradients_flow_through_the_rotation():
    x = torch.randn(1, 3, 2, 6, dtype=torch.float64, requires_grad=True)
    inv_freq = inverse_frequencies(6, THETA, FACTOR).double()
    t = rope_tables(torch.tensor([[5, 6, 999]]), inv_freq, 1.3, torch.float64)
    assert torch.autograd.gradcheck(lambda v: apply_rope(v, *t), x)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"head_dim": 7}, "head_dim: expected even, found 7"),
        ({"head_dim": 0}, "head_dim: expected even, found 0"),
        ({"factor": 0.5}, "factor: expected >= 1, found 0.5"),
        ({"factor": math.nan}, "factor: expected >= 1, found nan"),
    ],
)
def test_refusals_name_the_option(options, words):
    with pytest.raises(ValueError, match=words):
        inverse_frequencies(**{"head_dim": 8, "theta": 1e4} | options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_narrow_speeds_are_refused(dtype):
    with pytest.raises(TypeError, match="expected float32 or float64"):
        rope_tables(torch.arange(3), torch.ones(4, dtype=dtype))
