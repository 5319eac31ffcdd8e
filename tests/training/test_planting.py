"""Where the weights start."""

import random

import pytest
import torch

from gptoss.attention.rope import apply_rope, rope_parameters, rope_tables
from gptoss.attention.sinks import softmax_with_sink
from gptoss.model.transformer import GptOss
from gptoss.training import planting, rows, train
from gptoss.training.pocket import pocket_config


def planted(seed=0):
    model = GptOss(pocket_config(1024), dtype=torch.float32, packed=False)
    planting.start_at_random(model, seed)
    planting.plant_copying(model, seed)
    return model


@pytest.mark.parametrize("seed", [0, 1])
def test_a_planted_model_copies_before_it_is_trained(tokenizer, seed):
    drills = [rows.drill_row(tokenizer, random.Random(n)) for n in range(8)]
    blank = GptOss(pocket_config(1024), dtype=torch.float32, packed=False)
    planting.start_at_random(blank, seed)
    with torch.inference_mode():
        know, guess = (sum(train.weighted_loss(model, *rows.padded([row]))[0]
                           for row in drills) / 8
                       for model in (planted(seed), blank))
    assert know < 1.5 and guess > 6


def test_planted_heads_look_back_by_position_alone():
    model = planted()
    attention, C = model.layers[0].self_attn, model.config.head_dim
    T = 60
    tables = rope_tables(torch.arange(T)[None],
                         *rope_parameters(model.config), torch.float32)
    for head, group, back in ((0, 0, 1), (1, 0, 2), (4, 1, 1), (5, 1, 2)):
        assert not attention.q_proj.weight[head * C:(head + 1) * C].any()
        q = attention.q_proj.bias[head * C:(head + 1) * C]
        k = attention.k_proj.bias[group * C:(group + 1) * C]
        q, k = (apply_rope(x.expand(1, T, 1, C), *tables)[0, :, 0]
                for x in (q, k))
        scores = (q @ k.T / C ** 0.5).masked_fill(
            ~torch.ones(T, T).tril().bool(), float("-inf"))
        share = softmax_with_sink(scores[None, None], torch.zeros(1))[0, 0]
        for t_now in range(back, T):
            assert share[t_now, t_now - back] > 0.75
