"""Losses, the grid and the loop."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss.model.transformer import GptOss
from gptoss.training import planting, pocket, rows, stories, train
from gptoss.weights.encoding import encode
from gptoss.weights.mxfp4 import decode

MANY = settings(deadline=None, max_examples=60)


SMALL = replace(pocket.pocket_config(1024), num_hidden_layers=2,
                layer_types=None, hidden_size=32, intermediate_size=32,
                head_dim=8)


@MANY
@given(st.integers(2, 16), st.integers(1, 4), st.integers(0, 99))
def test_balance_is_one_when_even_and_most_when_collapsed(E, k, seed):
    k = min(k, E)
    even = torch.zeros(E, E)
    # each token prefers its own k neighbours by a hair: all alike together
    for n in range(E):
        even[n, [(n + i) % E for i in range(k)]] = 1e-4
    assert train.load_balance(even, k).item() == pytest.approx(1, abs=1e-3)
    collapsed = torch.full((9, E), -40.0)
    collapsed[:, :k] = 0
    assert train.load_balance(collapsed, k).item() == pytest.approx(E / k,
                                                                rel=1e-4)


def test_what_is_padded_does_not_count_for_the_balance():
    weights = torch.tensor([[0.0, 1, 0, 1, 0], [0, 0.2, 0, 0, 0],
                            [0, 0, 0, 0, 0]])
    assert train.that_matter(weights).int().tolist() == [
        [1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [0] * 5]


def test_the_balance_of_a_batch_is_that_of_its_rows_alone(tokenizer):
    """However much padding a long row brings to the short ones."""
    told = stories.story_stream(1)
    short = rows.story_row(tokenizer, next(told)[:40])
    long = rows.story_row(tokenizer, " ".join(next(told) for _ in range(4)))
    found = []
    for group in ([short], [short, long]):
        model, log = GptOss(SMALL, dtype=torch.float32, packed=False), []
        planting.start_at_random(model, seed=5)
        tap = train.RouterTap(model)
        tokens, weights = rows.padded(group)
        train.weighted_loss(model, tokens, weights)
        real = train.that_matter(weights[:, 1:])
        logits = [each.reshape(*real.shape, -1) for each in tap.take()]
        tap.close()
        found.append([each[0][real[0]] for each in logits])
        train.train(model, iter([(tokens, weights)]), train.Recipe(steps=1),
                log.append)
        each = [train.load_balance(one.flatten(0, 1)[real.flatten()], 2)
                for one in logits]
        assert log[0]["balance"] == pytest.approx(
            torch.stack(each).mean().item(), abs=1e-5)
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)


def test_on_grid_rounds_forward_and_passes_gradients():
    weight = torch.randn(3, 8, 64, requires_grad=True)
    out = train.OnGrid()(weight)
    blocks, scales = encode(weight.detach())
    torch.testing.assert_close(out, decode(blocks, scales,
                                                 torch.float32))
    gradient = torch.randn_like(out)
    out.backward(gradient)
    assert torch.equal(weight.grad, gradient)


@pytest.mark.parametrize("steps,warmup", [(1, 5), (10, 10), (100, 7)])
def test_rate_rises_then_falls(steps, warmup):
    recipe = train.Recipe(steps=steps, warmup=warmup)
    change, last = recipe.at(recipe.change), recipe.at(recipe.last)
    rates = [recipe.rate(step) for step in range(steps)]
    parts = rates[:change], rates[change:last], rates[last:]
    for part, peak in zip(parts, recipe.rates, strict=True):
        assert all(0 < rate <= peak for rate in part)
        top = part.index(max(part)) if part else 0
        assert part[:top + 1] == sorted(part[:top + 1])
        assert part[top:] == sorted(part[top:], reverse=True)


def small_run(tokenizer, steps=24):
    model, log = GptOss(SMALL, dtype=torch.float32, packed=False), []
    planting.start_at_random(model, seed=5)
    told = stories.story_stream(0)
    some = [rows.padded([rows.story_row(tokenizer, next(told))])
            for _ in range(steps)]
    recipe = train.Recipe(steps=steps, warmup=3)
    train.train(model, iter(some), recipe, log.append)
    return model, log


def test_training_learns_and_repeats_itself(tokenizer):
    model, log = small_run(tokenizer)
    again, log_again = small_run(tokenizer)
    assert log[-1]["loss"] < log[0]["loss"] - 1
    assert [e["loss"] for e in log] == [e["loss"] for e in log_again]
    for one, two in zip(pocket.released_tensors(model),
                        pocket.released_tensors(again), strict=True):
        assert one[0] == two[0] and torch.equal(one[1], two[1])
    switched = [e["step"] for e in log if "unrounded" in e]
    assert switched == [train.Recipe(steps=24).at(train.Recipe().grid_from)]
