"""gptoss.routing: the choice, the weights, ties, load."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss.moe.routing import (
    expected_hits,
    expert_load,
    route,
    softmax_then_topk,
    top_logits,
)


def test_choice_exhaustively():
    """All rows of 5 logits out of 4 values (1024 rows), every k, 4 dtypes."""
    rows = torch.tensor(list(product((-1.0, 0.0, 0.5, 2.0), repeat=5)))
    for k in range(1, 6):
        want = torch.tensor([
            sorted(range(5), key=lambda e, row=row: (-row[e], e))[:k]
            for row in rows.tolist()])
        for dtype in (torch.float64, torch.float32, torch.bfloat16,
                      torch.float16):
            weights, ids = route(rows.to(dtype), k)
            assert torch.equal(ids, want) and ids.dtype == torch.int64
            assert weights.dtype == dtype
            chosen = rows.gather(1, want).to(dtype)
            assert torch.equal(weights, chosen.softmax(-1))


@settings(deadline=None, max_examples=150)
@given(st.integers(1, 40), st.integers(1, 130), st.integers(1, 8),
       st.integers(0, 2 ** 31), st.sampled_from((0.1, 1.0, 50.0)))
def test_route_is_topk_and_the_other_order(N, E, k, seed, spread):
    k = min(k, E)
    g = torch.Generator().manual_seed(seed)
    # distinct by construction, so that topk leaves nothing open
    logits = torch.stack([torch.randperm(E, generator=g) for _ in range(N)])
    logits = spread * (logits.double() / E - 0.5)
    weights, ids = route(logits, k)
    value, chosen = logits.topk(k)
    assert torch.equal(ids, chosen)
    assert torch.equal(weights, F.softmax(value, -1))
    torch.testing.assert_close(
        weights.sum(-1), torch.ones(N).double(), rtol=1e-12, atol=0)
    other, other_ids = softmax_then_topk(logits, k)
    assert torch.equal(other_ids, ids)
    torch.testing.assert_close(other, weights, rtol=1e-11, atol=1e-300)
    raw, _ = softmax_then_topk(logits, k, renormalise=False)
    mass = logits.softmax(-1).gather(1, ids).sum(-1, keepdim=True)
    torch.testing.assert_close(raw, weights * mass, rtol=1e-11, atol=1e-300)


def test_without_renormalising_weights_shrink():
    for E, low, high in ((32, 0.35, 0.5), (128, 0.15, 0.25)):
        raw, _ = softmax_then_topk(torch.randn(4000, E), 4, False)
        assert low < raw.sum(-1).mean() < high


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 64), st.integers(0, 2 ** 31))
def test_renaming_experts_renames_the_choice(E, seed):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randperm(E, generator=g).double()[None]
    order = torch.randperm(E, generator=g)
    k = min(4, E)
    weights, ids = route(logits, k)
    renamed, renamed_ids = route(logits[:, order], k)
    assert torch.equal(weights, renamed)
    assert torch.equal(order[renamed_ids], ids)


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 12), st.integers(1, 12), st.integers(0, 2 ** 31))
def test_ties_inside_do_not_matter(E, k, seed):
    """A sum over the chosen is the same for every order among equals,
    unless the border runs through a tie."""
    k = min(k, E)
    g = torch.Generator().manual_seed(seed)
    logits = torch.randint(0, 4, (1, E), generator=g).double()
    answers = torch.randn(E, 5, generator=g, dtype=torch.float64)
    order = torch.randperm(E, generator=g)
    ranked = logits[0].sort(descending=True).values
    border = k < E and bool(ranked[k - 1] == ranked[k])

    def mix(order):
        weights, ids = route(logits[:, order], k)
        return (weights[..., None] * answers[order][ids]).sum(1)
    weights, renamed = route(logits, k)[0], route(logits[:, order], k)[0]
    assert torch.equal(weights, renamed)  # the weights never depend on it
    if not border:
        torch.testing.assert_close(mix(torch.arange(E)), mix(order))


def test_a_tie_at_the_border_goes_to_the_lower_index():
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0]])
    assert route(logits, 2)[1].tolist() == [[1, 2]]
    assert route(logits.flip(1), 2)[1].tolist() == [[3, 0]]


def test_rounding_only_merges():
    """Where bf16 changes the chosen set, its K-th and next are equal."""
    logits = torch.randn(30_000, 128, dtype=torch.float64)
    rounded = logits.bfloat16()
    changed = (route(logits, 4)[1].sort(-1).values
               != route(rounded, 4)[1].sort(-1).values).any(-1)
    edge = top_logits(rounded, 5)[0][:, 3:]
    tie = edge[:, 0] == edge[:, 1]
    assert changed.any() and not (changed & ~tie).any()
    assert 0.01 < changed.double().mean() < 0.04
    assert 0.35 < changed.sum() / tie.sum() < 0.65


def test_rows_are_independent():
    logits = torch.randn(64, 32).bfloat16()
    weights, ids = route(logits, 4)
    for n in range(64):
        one, one_ids = route(logits[n:n + 1], 4)
        assert torch.equal(one[0], weights[n])
        assert torch.equal(one_ids[0], ids[n])


def test_results_hold_only_k_columns():
    for x in route(torch.randn(10, 128), 4):
        assert x.is_contiguous()
        assert x.untyped_storage().nbytes() == 40 * x.element_size()


def test_gradient_reaches_the_chosen_only():
    logits = torch.randn(7, 16, dtype=torch.float64, requires_grad=True)
    weights, ids = route(logits, 3)
    (weights * torch.randn_like(weights)).sum().backward()
    moved = torch.zeros(7, 16).scatter(1, ids, 1.0) == 1
    assert torch.equal(logits.grad != 0, moved)
    # softmax does not see a common shift
    torch.testing.assert_close(logits.grad.sum(-1), torch.zeros(7).double())
    assert torch.autograd.gradcheck(lambda x: route(x, 3)[0], (logits,))


def test_load():
    ids = torch.tensor([[0, 2], [2, 3], [2, 0]])
    load = expert_load(ids, 5)
    assert load.tolist() == [2, 0, 3, 1, 0] and load.dtype == torch.int64
    assert expert_load(ids[:0], 3).tolist() == [0, 0, 0]
    for E in (32, 128):
        counts = expert_load(route(torch.randn(8192, E), 4)[1], E)
        assert counts.sum() == 4 * 8192
        cv = counts.double().std(correction=0) / counts.double().mean()
        assert 0.7 < cv / math.sqrt((E / 4 - 1) / 8192) < 1.4


@pytest.mark.parametrize("E", (32, 128))
def test_expected_hits(E):
    assert expected_hits(E, 4, 0) == 0
    assert expected_hits(E, 4, 1) == pytest.approx(4)
    assert expected_hits(E, E, 1) == E
    assert expected_hits(E, 4, 100_000) == pytest.approx(E)
    for N in (2, 8, 32):
        ids = route(torch.randn(1000 * N, E), 4)[1].view(1000, 4 * N)
        hits = torch.zeros(1000, E).scatter(1, ids, 1.0).sum(1)
        error = hits.std() / math.sqrt(1000)
        assert abs(hits.mean() - expected_hits(E, 4, N)) < 5 * error


def test_no_tokens():
    weights, ids = route(torch.zeros(0, 8), 3)
    assert weights.shape == ids.shape == (0, 3)


@pytest.mark.parametrize("k", (0, -1, 9))
def test_bad_k_is_named(k):
    with pytest.raises(ValueError, match=f"expected 1 to 8, found {k}"):
        route(torch.zeros(2, 8), k)
