"""gptoss.attention.scores: grouped heads, masks, types, and torch's own."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from gptoss.attention.scores import mix, scores


def draw(B, T, S, G, R, C, seed, dtype=torch.float64):
    """q, k, v, a mask (a fifth of the rows empty), scale."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(s, generator=g, dtype=torch.float64) for s in (
        (B, T, G * R, C), (B, S, G, C), (B, S, G, C)))
    mask = torch.rand(B, T, S, generator=g) < 0.7
    mask &= torch.rand(B, T, 1, generator=g) < 0.8
    return [x.to(dtype) for x in (q, k, v)] + [mask, C ** -0.5]


def by_loops(q, k, v, mask, scale):
    """Scores and their mixtures, number by number."""
    B, T, H, _ = q.shape
    S, group = k.shape[1], H // k.shape[2]
    a = torch.full((B, H, T, S), -torch.inf, dtype=q.dtype)
    out = torch.zeros_like(q)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                for s in range(S):
                    if mask[b if len(mask) > 1 else 0, t, s]:
                        a[b, h, t, s] = scale * (
                            q[b, t, h] * k[b, s, h // group]).sum()
                        out[b, t, h] += a[b, h, t, s] * v[b, s, h // group]
    return a, out


def test_definition():
    for seed in range(3):
        q, k, v, mask, scale = draw(2, 3, 5, 2, 3, 4, seed)
        a, out = by_loops(q, k, v, mask, scale)
        got = scores(q, k, mask, scale)
        torch.testing.assert_close(got, a)
        torch.testing.assert_close(
            mix(got.masked_fill(got.isinf(), 0), v), out)


sizes = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 24),
                  st.integers(1, 3), st.integers(1, 4), st.integers(1, 40))


@settings(deadline=None, max_examples=80)
@given(sizes, st.integers(0, 2 ** 31))
def test_with_a_softmax_it_is_torchs_attention(size, seed):
    for dtype, bound in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
        q, k, v, mask, scale = draw(*size, seed, dtype)
        mask[..., 0] = True  # an empty row is 0 / 0 here
        ours = mix(scores(q, k, mask, scale).softmax(-1), v)
        torchs = F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask[:, None],
            scale=scale, enable_gqa=True).transpose(1, 2)
        assert ours.dtype == dtype and ours.shape == q.shape
        assert (ours - torchs).abs().max() <= bound


def test_minus_infinity_where_the_mask_is_false():
    q, k, _, mask, scale = draw(2, 4, 6, 2, 2, 8, 1)
    a = scores(q, k, mask, scale)
    assert torch.equal(a == -torch.inf,
                       ~mask[:, None].expand(2, 4, 4, 6))
    assert (~mask.any(-1)).any(), "a row without keys is among them"


def test_one_mask_for_all_texts():
    q, k, _, mask, scale = draw(3, 4, 5, 2, 2, 8, 2)
    assert torch.equal(scores(q, k, mask[:1], scale),
                       scores(q, k, mask[:1].expand(3, -1, -1), scale))


def test_neighbouring_heads_share():
    """Key head 1 concerns query heads 3, 4 and 5 of 6, and no other."""
    q, k, v, mask, scale = draw(1, 4, 5, 2, 3, 8, 3)
    mask[:] = True
    moved = k.clone()
    moved[:, :, 1] += 1
    changed = scores(q, k, mask, scale) != scores(q, moved, mask, scale)
    assert changed.flatten(2).any(-1)[0].tolist() == [False] * 3 + [True] * 3
    weights = torch.rand(1, 6, 4, 5).double()
    changed = (mix(weights, v) != mix(weights, v + (moved - k))).any(-1)
    assert changed[0].any(0).tolist() == [False] * 3 + [True] * 3


@pytest.mark.parametrize("dtype, wide", [
    (torch.bfloat16, torch.float32), (torch.float16, torch.float32),
    (torch.float32, torch.float32), (torch.float64, torch.float64)])
def test_widened_before_the_product(dtype, wide):
    q, k, v, mask, scale = draw(2, 3, 5, 2, 2, 64, 4, dtype)
    a = scores(q, k, mask, scale)
    assert a.dtype == wide
    torch.testing.assert_close(
        a, scores(q.to(wide), k.to(wide), mask, scale), rtol=0, atol=0)
    assert mix(a.softmax(-1).nan_to_num(), v).dtype == wide


def test_the_past_stands_still():
    """A causal row is the same with and without what comes after it."""
    q, k, v, _, scale = draw(2, 9, 9, 2, 3, 8, 5)
    mask = torch.ones(1, 9, 9, dtype=torch.bool).tril()
    whole = mix(scores(q, k, mask, scale).softmax(-1), v)
    for t in range(9):
        row = slice(t, t + 1), slice(None, t + 1)
        a = scores(q[:, row[0]], k[:, row[1]], mask[:, row[0], row[1]], scale)
        torch.testing.assert_close(mix(a.softmax(-1), v[:, row[1]]),
                                   whole[:, row[0]])


def test_strided_inputs_are_read_and_none_is_changed():
    q, k, v, mask, scale = draw(2, 3, 8, 2, 2, 8, 6)
    k2, v2 = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    q2 = q.transpose(1, 2).contiguous().transpose(1, 2)
    assert not k2.is_contiguous()
    before = [x.clone() for x in (q2, k2, v2, mask)]
    a = scores(q2, k2, mask, scale)
    torch.testing.assert_close(a, scores(q, k, mask, scale))
    weights = a.softmax(-1).nan_to_num()
    torch.testing.assert_close(mix(weights, v2), mix(weights, v))
    for x, y in zip((q2, k2, v2, mask), before, strict=True):
        assert torch.equal(x, y)


def test_gradients():
    q, k, v, mask, scale = draw(1, 3, 4, 2, 2, 3, 7)
    mask[..., 0] = True
    leaves = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(
        lambda q, k, v: mix(scores(q, k, mask, scale).softmax(-1), v), leaves)


def test_flops():
    q, k, v, mask, scale = draw(2, 3, 20, 2, 4, 8, 0, torch.float32)
    with FlopCounterMode(display=False) as counter:
        mix(scores(q, k, mask, scale), v)
    assert counter.get_total_flops() == 4 * 2 * 3 * 20 * 8 * 8


def test_bad_input_is_named():
    q, k, _, mask, scale = draw(1, 3, 5, 2, 2, 4, 0)
    with pytest.raises(ValueError, match=r"multiple of G, found 3, 2"):
        scores(q[:, :, :3], k, mask, scale)
    with pytest.raises(ValueError, match=r"mask: expected bool \(1 or 1, 3, "
                                         r"5\), found torch.bool \(1, 3, 4"):
        scores(q, k, mask[..., :4], scale)
    with pytest.raises(ValueError, match="found torch.float64"):
        scores(q, k, mask.double(), scale)
