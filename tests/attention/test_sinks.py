"""gptoss.sinks: four forms, one function; masks, extremes, gradients."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.gpt_oss.modeling_gpt_oss import (
    eager_attention_forward,
)

from gptoss.attention.sinks import (
    attention_concat,
    attention_flash,
    attention_online,
    attention_rescale,
    rescale,
    sink_share,
    softmax_with_sink,
)

FORMS = (attention_concat, attention_rescale, attention_online,
         attention_flash)


def draw(B, T, S, G, R, C, seed, dtype=torch.float64, spread=1.0):
    """q, k, v, sinks, mask (a fifth of the rows empty), scale."""
    g = torch.Generator().manual_seed(seed)
    shapes = (B, T, G * R, C), (B, S, G, C), (B, S, G, C), (G * R,)
    q, k, v, sinks = (
        torch.randn(s, generator=g, dtype=torch.float64) for s in shapes)
    mask = torch.rand(B, T, S, generator=g) < 0.7
    mask &= torch.rand(B, T, 1, generator=g) < 0.8
    return [x.to(dtype) for x in (spread * q, k, v, sinks)] + [
        mask, C ** -0.5]


def by_loops(q, k, v, sinks, mask, scale):
    """The definition, number by number, in Python's floats."""
    B, T, H, C = q.shape
    group = H // k.shape[2]
    out = torch.zeros_like(q)
    for b in range(B):
        for t in range(T):
            for h in range(H):
                row = [(scale * float(q[b, t, h] @ k[b, s, h // group]), s)
                       for s in range(k.shape[1])
                       if mask[b if len(mask) > 1 else 0, t, s]]
                top = max([a for a, _ in row] + [float(sinks[h])])
                if top == -torch.inf:
                    continue
                weight = {s: torch.tensor(a - top, dtype=q.dtype).exp()
                          for a, s in row}
                total = sum(weight.values()) + (sinks[h] - top).exp()
                for s, w in weight.items():
                    out[b, t, h] += w / total * v[b, s, h // group]
    return out


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shift", (0.0, 3.0, -torch.inf))
def test_definition(form, shift):
    for seed in range(3):
        q, k, v, sinks, mask, scale = draw(2, 3, 5, 2, 3, 4, seed)
        case = q, k, v, sinks + shift, mask, scale
        torch.testing.assert_close(
            form(*case), by_loops(*case), rtol=1e-11, atol=1e-12)


sizes = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 24),
                  st.integers(1, 3), st.integers(1, 4), st.integers(1, 40))


@settings(deadline=None, max_examples=120)
@given(sizes, st.integers(0, 2 ** 31), st.integers(1, 30),
       st.sampled_from((0.0, 10.0, 1e4, -1e4, -torch.inf)),
       st.sampled_from((1.0, 30.0)))
def test_forms_agree(size, seed, chunk, shift, spread):
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        q, k, v, sinks, mask, scale = draw(*size, seed, dtype, spread)
        case = q, k, v, sinks + shift, mask, scale
        first = attention_concat(*case)
        assert first.dtype == dtype and first.shape == q.shape
        assert first.isfinite().all()
        assert (first[~mask.any(-1)] == 0).all()
        if shift == 1e4:
            assert (first == 0).all()
        for other in (attention_rescale(*case), attention_flash(*case),
                      attention_online(*case, chunk=chunk)):
            assert (other - first).abs().max() <= bound * v.abs().max()


def test_no_sink_is_plain_attention():
    q, k, v, _, _, scale = draw(2, 6, 9, 2, 3, 8, 0)
    mask = torch.ones(1, 6, 9, dtype=torch.bool).tril(3)
    plain = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.repeat_interleave(3, 2).transpose(1, 2),
        v.repeat_interleave(3, 2).transpose(1, 2), attn_mask=mask[:, None],
        scale=scale).transpose(1, 2)
    none = torch.full((6,), -torch.inf).double()
    for form in FORMS:
        torch.testing.assert_close(form(q, k, v, none, mask, scale), plain)


def test_one_mask_for_all_rows_of_the_batch():
    q, k, v, sinks, mask, scale = draw(3, 4, 5, 2, 2, 8, 1)
    for form in FORMS:
        one = form(q, k, v, sinks, mask[:1], scale)
        many = form(q, k, v, sinks, mask[:1].expand(3, -1, -1), scale)
        assert torch.equal(one, many)


def test_query_head_uses_its_group():
    """Changing key head 1 changes query heads 3, 4, 5 of 6 and no other."""
    q, k, v, sinks, mask, scale = draw(1, 4, 5, 2, 3, 8, 2)
    mask[:] = True
    moved = k.clone()
    moved[:, :, 1] += 1
    for form in FORMS:
        changed = (form(q, k, v, sinks, mask, scale)
                   != form(q, moved, v, sinks, mask, scale))
        assert changed.any(-1).all(1)[0].tolist() == [False] * 3 + [True] * 3


def test_strided_inputs():
    """A cache returns transposed views."""
    q, k, v, sinks, mask, scale = draw(2, 3, 8, 2, 2, 8, 3)
    k2 = k.transpose(1, 2).contiguous().transpose(1, 2)
    v2 = v.transpose(1, 2).contiguous().transpose(1, 2)
    assert not k2.is_contiguous()
    for form in FORMS:
        torch.testing.assert_close(form(q, k2, v2, sinks, mask, scale),
                                   form(q, k, v, sinks, mask, scale))


def test_a_query_stands_alone():
    """Tiles of queries give what all queries together give."""
    q, k, v, sinks, mask, scale = draw(2, 7, 9, 2, 2, 8, 4)
    for form in FORMS:
        whole = form(q, k, v, sinks, mask, scale)
        tiles = [form(q[:, t:t + 2], k, v, sinks, mask[:, t:t + 2], scale)
                 for t in range(0, 7, 2)]
        torch.testing.assert_close(torch.cat(tiles, 1), whole)


def test_inputs_are_left_alone():
    case = draw(2, 3, 5, 2, 2, 8, 5)
    before = [x.clone() for x in case[:5]]
    for form in FORMS:
        form(*case)
        assert all(torch.equal(a, b)
                   for a, b in zip(case, before, strict=False))


def test_huge_scores():
    """A naive exponential overflows at 89 in fp32, at 12 in fp16."""
    q = torch.full((1, 1, 1, 1), 300.0)
    k = torch.tensor([300.0, 200.0]).view(1, 2, 1, 1)
    v = torch.tensor([1.0, -1.0]).view(1, 2, 1, 1)
    mask = torch.ones(1, 1, 2, dtype=torch.bool)
    for form in FORMS:
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            for sign in (1.0, -1.0):
                case = [x.to(dtype) for x in (q, sign * k, v)]
                out = form(*case, torch.zeros(1, dtype=dtype), mask, 1.0)
                assert out.item() == (1.0 if sign > 0 else 0.0)


def test_softmax_with_sink():
    scores = torch.tensor([[[0.0, 1.0], [-torch.inf, 2.0],
                            [-torch.inf, -torch.inf]]])
    e = torch.e
    want = torch.tensor([[[1 / (2 + e), e / (2 + e)],
                          [0, e * e / (1 + e * e)], [0, 0]]])
    torch.testing.assert_close(
        softmax_with_sink(scores, torch.zeros(1)), want)
    assert softmax_with_sink(scores.bfloat16(), torch.zeros(
        1, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert (softmax_with_sink(scores, torch.tensor([-torch.inf]))[0, 2]
            == 0).all()


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2 ** 31), st.floats(-40, 40))
def test_share_and_rest_are_one(seed, shift):
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, 3, 4, 5, generator=g).double()
    sinks = torch.randn(3, generator=g).double() + shift
    share = sink_share(scores.logsumexp(-1), sinks)
    kept = softmax_with_sink(scores, sinks).sum(-1)
    torch.testing.assert_close(share + kept, torch.ones(2, 3, 4).double())
    ones = torch.ones(2, 4, 3, 1).double()
    torch.testing.assert_close(
        rescale(ones, scores.logsumexp(-1), sinks)[..., 0].transpose(1, 2),
        kept, rtol=1e-12, atol=0)


def test_empty_rows_are_the_sinks():
    lse = torch.full((1, 1, 1), -torch.inf)
    for sink in (0.0, -1e4, -torch.inf):
        sinks = torch.tensor([sink])
        assert sink_share(lse, sinks).item() == 1
        assert rescale(torch.zeros(1, 1, 1, 1), lse, sinks).item() == 0


@pytest.mark.parametrize("form", FORMS)
def test_gradients(form):
    q, k, v, sinks, mask, scale = draw(2, 3, 4, 2, 2, 3, 6)
    mask[0, 1] = False
    leaves = [x.requires_grad_() for x in (q, k, v, sinks)]
    assert torch.autograd.gradcheck(
        lambda *x: form(*x, mask, scale), leaves)
    for shift in (1e4, -1e4, -torch.inf):
        grads = torch.autograd.grad(
            form(q, k, v, sinks + shift, mask, scale).sum(), leaves)
        assert all(g.isfinite().all() for g in grads)


def test_gradient_of_the_sink_is_minus_share_times_output():
    q, k, v, sinks, mask, scale = draw(1, 5, 6, 2, 2, 4, 7)
    sinks.requires_grad_()
    upstream = torch.randn(1, 5, 4, 4, dtype=torch.float64)
    out = attention_concat(q, k, v, sinks, mask, scale)
    got, = torch.autograd.grad(out, sinks, upstream)
    scores = torch.einsum("bthc,bshc->bhts", q, k.repeat_interleave(2, 2))
    scores = (scale * scores).masked_fill(~mask[:, None], -torch.inf)
    share = sink_share(scores.logsumexp(-1), sinks).transpose(1, 2)
    want = -(share[..., None] * out * upstream).sum((0, 1, 3))
    torch.testing.assert_close(got, want)


def test_plain_rescale_of_the_kernel_loses_gradients():
    """Why attention_flash has a backward of its own."""
    q, k, v, sinks, mask, scale = draw(1, 5, 6, 1, 2, 4, 8)
    mask[:] = True
    leaves = [x.requires_grad_() for x in (q, k, v, sinks)]
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = flash(*(x.transpose(1, 2) for x in (q, k, v)), scale=scale)
    upstream = torch.randn(1, 5, 2, 4, dtype=torch.float64)
    naive = torch.autograd.grad(
        rescale(out.transpose(1, 2), lse, sinks), leaves, upstream)
    right = torch.autograd.grad(
        attention_concat(*leaves, mask, scale), leaves, upstream)
    wrong = [not torch.allclose(a, b)
             for a, b in zip(naive, right, strict=True)]
    assert wrong == [True, True, False, False]


def test_flash_trains_in_bf16():
    q, k, v, sinks, mask, scale = draw(
        1, 32, 32, 2, 2, 16, 9, torch.bfloat16)
    leaves = [x.requires_grad_() for x in (q, k, v, sinks)]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    upstream = torch.randn(1, 32, 4, 16).bfloat16()
    got = torch.autograd.grad(
        attention_flash(*leaves, mask, scale), leaves, upstream)
    want = torch.autograd.grad(
        attention_concat(*wide, mask, scale), wide, upstream.double())
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a - b).norm() < 0.02 * b.norm()


def hugging_face(q, k, v, sinks, mask, scale):
    layer = SimpleNamespace(sinks=sinks, training=False,
                            num_key_value_groups=q.shape[2] // k.shape[2])
    bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(
        ~mask, torch.finfo(q.dtype).min)[:, None]
    return eager_attention_forward(
        layer, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
        bias, scale)[0]


def openai(q, k, v, sinks, mask, scale):
    """The formula of gpt_oss/torch/model.py, sdpa, in our words."""
    B, T, H, C = q.shape
    G = k.shape[2]
    a = torch.einsum("btgrc,bsgc->bgrts", q.view(B, T, G, H // G, C), k)
    a = a * scale + torch.zeros(mask.shape, dtype=q.dtype).masked_fill(
        ~mask, -torch.inf)[:, None, None]
    s = sinks.view(1, G, H // G, 1, 1).expand(B, -1, -1, T, -1)
    p = torch.softmax(torch.cat([a, s], -1), -1)[..., :-1]
    return torch.einsum("bgrts,bsgc->btgrc", p, v).flatten(2, 3)


@pytest.mark.parametrize("other", (hugging_face, openai))
def test_against_the_others(other):
    for seed in range(20):
        case = draw(2, 9, 17, 1 + seed % 3, 1 + seed % 4, 8 + seed, seed)
        assert (attention_concat(*case) - other(*case)).abs().max() < 1e-12
        case[:4] = [x.float() for x in case[:4]]
        for form in FORMS:
            assert (form(*case) - other(*case)).abs().max() < 5e-6


def test_against_openais_own_sdpa():
    sdpa = pytest.importorskip(
        "gpt_oss.torch.model",
        reason="gpt-oss 0.0.9 asks for Python 3.12; the formula is above",
    ).sdpa
    for window in (0, 1, 5, 40):
        q, k, v, sinks, _, scale = draw(1, 20, 20, 2, 3, 8, window)
        order = torch.arange(20)
        mask = order[:, None] >= order
        if window:
            mask &= order[:, None] - order < window
        theirs = sdpa(q[0].view(20, 2, 3, 8), k[0], v[0], sinks, scale,
                      window).view(20, 6, 8)
        ours = attention_concat(q, k, v, sinks, mask[None], scale)[0]
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("spread", (1.0, 4.0))
def test_bf16_is_the_exact_result_rounded_once(spread):
    """And therefore no further from float64 than HF's or OpenAI's."""
    error = {f: [] for f in (attention_concat, attention_rescale,
                             attention_online, hugging_face, openai)}
    once = []
    for seed in range(11):
        case = draw(1, 48, 64, 1, 4, 64, seed, torch.bfloat16, spread)
        case[4][..., 0] = True  # HF gives an empty row another meaning
        exact = attention_concat(*(x.double() for x in case[:4]), *case[4:])

        def rms(x, exact=exact):
            return float((x.double() - exact).square().mean().sqrt())
        once.append(rms(exact.bfloat16()))
        for form, found in error.items():
            found.append(rms(form(*case)))

    def median(x):
        return float(torch.tensor(x).median())
    for form in (attention_concat, attention_rescale, attention_online):
        assert median(error[form]) < 1.001 * median(once)
        for other in (hugging_face, openai):
            assert 1.5 * median(error[form]) < median(error[other])


def test_flops():
    B, T, S, G, R, C = 2, 3, 20, 2, 4, 8
    case = draw(B, T, S, G, R, C, 0, torch.float32)
    for form in (attention_concat, attention_rescale, attention_online):
        with FlopCounterMode(display=False) as counter:
            form(*case)
        assert counter.get_total_flops() == 4 * B * T * S * G * R * C


def test_bad_input_is_named():
    q, k, v, sinks, mask, scale = draw(1, 3, 5, 2, 2, 4, 0)
    with pytest.raises(ValueError, match=r"multiple of G, found 3, 2"):
        attention_concat(q[:, :, :3], k, v, sinks[:3], mask, scale)
    with pytest.raises(ValueError, match=r"mask: expected bool .*\(1, 3, 4"):
        attention_concat(q, k, v, sinks, mask[..., :4], scale)
    with pytest.raises(ValueError, match="float64"):
        attention_rescale(q, k, v, sinks, mask.double(), scale)
    with pytest.raises(ValueError, match="chunk: expected at least 1"):
        attention_online(q, k, v, sinks, mask, scale, chunk=0)
    with pytest.raises(ValueError, match="expected cpu, found meta"):
        attention_flash(*(x.to("meta") for x in (q, k, v, sinks)), mask,
                        scale)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask", [(1, 3, 9), (1, 1, 8), (3, 3, 8), (3, 8),
                                  (1, 3, 1)], ids=str)
def test_every_form_refuses_a_mask_that_does_not_fit(form, mask):
    q, k = torch.randn(2, 3, 4, 8), torch.randn(2, 8, 2, 8)
    with pytest.raises(ValueError, match="mask: expected bool"):
        form(q, k, k, torch.zeros(4), torch.ones(mask).bool(), 1.0)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_refuses_heads_that_no_key_has(form):
    q, k = torch.randn(1, 3, 3, 8), torch.randn(1, 8, 2, 8)
    with pytest.raises(ValueError, match="multiple of G, found 3, 2"):
        form(q, k, k, torch.zeros(3), torch.ones(1, 3, 8).bool(), 1.0)
