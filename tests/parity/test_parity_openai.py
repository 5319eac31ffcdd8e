"""Ours beside OpenAI's torch code, on the same random checkpoints.

The oracle is the PyPI package gpt-oss 0.0.9, which names Python 3.12 as its
least; its torch model runs on 3.11 all the same:
pip install --no-deps --ignore-requires-python gpt-oss==0.0.9
"""

import statistics

import pytest
import torch
from oracles import Case, distance, long_case, random_case, usual_error
from test_parity_hf import greedy

from gptoss.attention.rope import correction_range
from gptoss.model.transformer import GptOss

openai = pytest.importorskip("oracles.openai", reason="no gpt-oss 0.0.9")


def usable(case: Case) -> bool:
    """What OpenAI's code asserts of YaRN's range: it ends before the last
    pair. (Head size 8 with theta 10000 does not.)"""
    c = case.config
    low, high = correction_range(c.head_dim, c.rope_theta)
    return c.rope_factor == 1 or 0 < low < high < c.head_dim / 2 - 1


CASES = [case for case in (random_case(seed, alternating=True)
                           for seed in range(200, 260))
         if usable(case)][:32]


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.inference_mode()
def test_logits_and_greedy_tokens_in_fp32(case: Case, tmp_path):
    tokens, path = case.prompt(), case.write(tmp_path, "original")
    theirs = openai.load(path)
    ours = GptOss.from_pretrained(path, torch.float32)
    assert distance(ours(tokens), openai.logits(theirs, tokens)) <= 1e-5
    # 64 greedy tokens in one forward of theirs, which has no cache: if it
    # chooses each of ours after those before it, its own would be the same
    chosen = greedy(ours, tokens, 64)
    logits = openai.logits(theirs, torch.cat(
        [tokens, torch.tensor([chosen[:-1]])], 1))
    assert logits[0, -64:].argmax(-1).tolist() == chosen


@torch.inference_mode()
def test_past_position_4096(tmp_path):
    case = long_case(102)
    tokens, path = case.prompt(), case.write(tmp_path, "original")
    wanted = openai.logits(openai.load(path), tokens)
    ours = GptOss.from_pretrained(path, torch.float32)
    assert distance(ours(tokens), wanted) <= 1e-5


@torch.inference_mode()
def test_bf16_is_no_further_from_float64(tmp_path):
    """Median over the cases of the error against our own float64 run."""
    errors: dict[str, list[float]] = {"ours": [], "theirs": []}
    for case in CASES:
        tokens, path = case.prompt(), case.write(tmp_path, "original")
        exact = GptOss.from_pretrained(path, torch.float64)(tokens)
        ours = GptOss.from_pretrained(path, torch.bfloat16)(tokens)
        theirs = openai.logits(openai.load(path, torch.bfloat16), tokens)
        assert ours.dtype == theirs.dtype == torch.bfloat16
        for name, found in (("ours", ours), ("theirs", theirs)):
            errors[name].append(usual_error(found, exact))
    assert 0 < statistics.median(errors["ours"]) <= statistics.median(
        errors["theirs"])
