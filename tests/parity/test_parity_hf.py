"""Ours beside Hugging Face transformers, on the same random checkpoints."""

import statistics

import pytest
import torch
from oracles import Case, distance, hf, long_case, random_case, usual_error

from gptoss.model.transformer import GptOss

CASES = [random_case(seed) for seed in range(40)]
LONG = [long_case(100), long_case(101)]


def greedy(model: GptOss, tokens: torch.Tensor, count: int) -> list[int]:
    """The `count` likeliest tokens after tokens (1, T), with our cache."""
    cache, out, feed = model.new_cache(), [], tokens
    while True:
        feed = model(feed, cache, logits_to_keep=1).argmax(-1)
        out.append(feed.item())
        if len(out) == count:
            return out
        assert cache.length == tokens.shape[1] + len(out) - 1


def test_the_cases_cover_what_they_should():
    configs = [case.config for case in CASES]
    assert sum("original" in case.layouts() for case in CASES) >= 30
    assert all(c.hidden_size != c.num_attention_heads * c.head_dim
               for c in configs)
    for field, at_least in (("num_experts_per_tok", 4),
                            ("num_local_experts", 4),
                            ("num_key_value_heads", 4),
                            ("sliding_window", 5), ("rope_factor", 3)):
        assert len({getattr(c, field) for c in configs}) >= at_least, field
    shorter = [case.length < case.config.sliding_window for case in CASES]
    assert 8 < sum(shorter) < 32
    assert max(case.sink_std for case in CASES) == 10


@pytest.mark.parametrize("case", CASES + LONG, ids=str)
@torch.inference_mode()
def test_logits_and_greedy_tokens_in_fp32(case: Case, tmp_path):
    tokens, path = case.prompt(), case.write(tmp_path)
    theirs = hf.load(path)
    wanted = hf.logits(theirs, tokens)
    chosen = hf.greedy(theirs, tokens, 64)
    for layout in case.layouts():
        for packed in (True, False):
            ours = GptOss.from_pretrained(case.write(tmp_path, layout),
                                          torch.float32, packed=packed)
            assert distance(ours(tokens), wanted) <= 1e-5
    assert greedy(ours, tokens, 64) == chosen


@torch.inference_mode()
def test_bf16_is_no_further_from_float64(tmp_path):
    """Median over the cases of the error against our own float64 run."""
    errors: dict[str, list[float]] = {"ours": [], "theirs": []}
    for case in CASES:
        tokens, path = case.prompt(), case.write(tmp_path)
        exact = GptOss.from_pretrained(path, torch.float64)(tokens)
        ours = GptOss.from_pretrained(path, torch.bfloat16)(tokens)
        theirs = hf.logits(hf.load(path, torch.bfloat16), tokens)
        assert ours.dtype == theirs.dtype == torch.bfloat16
        for name, found in (("ours", ours), ("theirs", theirs)):
            errors[name].append(usual_error(found, exact))
    assert 0 < statistics.median(errors["ours"]) <= statistics.median(
        errors["theirs"])
