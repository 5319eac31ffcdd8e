"""gptoss.generate: what is drawn, when it ends, and how it reads."""

import json
import math
import shutil
from dataclasses import replace
from importlib.resources import files
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gptoss import harmony
from gptoss.model.transformer import GptOss
from gptoss.text.generate import (
    Completion,
    TextStream,
    complete,
    generate,
    generate_batch,
)
from gptoss.text.sampling import (
    NUCLEUS,
    GenerateError,
    Sampler,
    SamplingOptions,
    best,
    draw,
)
from gptoss.text.stops import stop_ids
from gptoss.weights.config import ConfigError, GptOssConfig

POCKET = files("gptoss") / "pocket"
CONFIG = GptOssConfig(
    num_hidden_layers=3, num_local_experts=4, num_experts_per_tok=2,
    vocab_size=275, hidden_size=32, intermediate_size=32, head_dim=8,
    num_attention_heads=4, num_key_value_heads=2, sliding_window=6,
    max_position_embeddings=80, initial_context_length=16, rope_factor=4.0,
    eos_token_id=274, pad_token_id=273)


@pytest.fixture(scope="module")
def model() -> GptOss:
    """Random, but with logits far apart: greedy choices are no near-ties."""
    torch.manual_seed(0)
    model = GptOss(CONFIG, dtype=torch.float32, packed=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3 if parameter.ndim > 1 else 0.5)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def tokenizer() -> harmony.Tokenizer:
    """The 256 bytes, 17 pairs of them, and two control tokens."""
    ranks = {bytes([b]): b for b in range(256)}
    for n, pair in enumerate(["th", "he", "in", "er", "an", "re", "nd", "at",
                              "on", "nt", "ha", "es", "st", "en", "ed", "to",
                              "it"]):
        ranks[pair.encode()] = 256 + n
    return harmony.Tokenizer(harmony.tokenizer_json(
        ranks, {273: "<|endoftext|>", 274: "<|return|>"}))


def greedy(model, prompt, count):
    """The slow twin: the whole text through the model for each token."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    return ids[len(prompt):]


# Few values, so that ties are common; quarters are exact in every dtype.
ROWS = st.lists(st.integers(-12, 12).map(lambda n: n / 4), min_size=1,
                max_size=12)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
SAMPLERS = st.builds(
    Sampler, temperature=st.floats(0.05, 5.0), top_k=st.integers(0, 14),
    top_p=st.floats(0.01, 1.0))


def definition(row: list[float], sampler: Sampler) -> dict[int, float]:
    """Token -> probability by the definitions, in plain Python."""
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))
    if sampler.top_k:
        order = order[:sampler.top_k]
    weight = {i: math.exp((row[i] - max(row)) / sampler.temperature)
              for i in order}
    total = sum(weight.values())
    kept, mass = [], 0.0
    for i in order:
        kept.append(i)
        mass += weight[i] / total
        if sampler.top_p < 1 and mass >= sampler.top_p:
            break
    total = sum(weight[i] for i in kept)
    return {i: weight[i] / total for i in kept}


# -- the sampler ------------------------------------------------------------

@settings(deadline=None, max_examples=400)
@given(ROWS, SAMPLERS, DTYPES)
def test_probabilities_equal_the_definitions(row, sampler, dtype):
    wanted = definition(row, sampler)
    found = sampler.probabilities(torch.tensor([row], dtype=dtype))[0]
    # a cut at a mass that equals top_p but for rounding may go either way
    mass = torch.tensor(sorted(wanted.values(), reverse=True)).cumsum(0)
    assume(sampler.top_p == 1 or len(wanted) == len(row)
           or (mass - sampler.top_p).abs().min() > 1e-9)
    full = torch.tensor([wanted.get(i, 0.0) for i in range(len(row))],
                        dtype=torch.float64)
    torch.testing.assert_close(found, full, rtol=1e-12, atol=1e-15)


@settings(deadline=None, max_examples=200)
@given(ROWS, st.integers(1, 14), DTYPES)
def test_top_k_keeps_exactly_k_whatever_the_ties(row, k, dtype):
    logits = torch.tensor([row], dtype=dtype)
    kept = Sampler(top_k=k).probabilities(logits)[0].nonzero()[:, 0].tolist()
    best = sorted(range(len(row)), key=lambda i: (-row[i], i))
    assert kept == sorted(best[:k])


@settings(deadline=None, max_examples=300)
@given(ROWS, st.floats(1e-6, 1.0), st.floats(0.1, 4.0))
def test_top_p_keeps_the_smallest_set_that_reaches_p(row, p, temperature):
    logits = torch.tensor([row])
    whole = Sampler(temperature).probabilities(logits)[0]
    kept = Sampler(temperature, top_p=p).probabilities(logits)[0] > 0
    assert kept.any()
    assert whole[kept].sum() >= p - 1e-12
    # nothing smaller would do, and nothing likelier was left out
    assert whole[kept].sum() - whole[kept].min() < p + 1e-12
    if not kept.all():
        assert whole[kept].min() >= whole[~kept].max()


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2 ** 30), st.integers(1, 300), st.integers(1, 300),
       DTYPES, st.integers(2, 40))
def test_best_equals_a_stable_sort(seed, size, k, dtype, values):
    rows = torch.randint(values, (3, size), generator=torch.Generator()
                         .manual_seed(seed)).to(dtype)
    k = min(k, size)
    order = rows.sort(dim=-1, descending=True, stable=True).indices
    assert torch.equal(best(rows, k), order[:, :k])


@pytest.mark.parametrize("spread", [0.1, 3.0, 10.0])
@pytest.mark.parametrize("p", [0.3, 0.9, 0.999])
def test_top_p_of_a_large_vocabulary(spread, p):
    """Beyond the first NUCLEUS tokens and within them: as a full sort."""
    rows = (spread * torch.randn(3, 4 * NUCLEUS)).bfloat16()
    found = Sampler(top_p=p).probabilities(rows)
    whole = rows.double().softmax(-1)
    order = rows.sort(dim=-1, descending=True, stable=True).indices
    for row in range(3):
        mass = whole[row, order[row]].cumsum(0)
        count = int((mass < p).sum()) + 1
        wanted = torch.zeros_like(whole[row])
        kept = order[row, :count]
        wanted[kept] = whole[row, kept] / whole[row, kept].sum()
        torch.testing.assert_close(found[row], wanted, rtol=1e-9, atol=0)
    kept = (found > 0).sum(-1)  # both ways of finding them are met
    assert spread > 1 or (kept > NUCLEUS).all()
    assert spread < 5 or (kept < NUCLEUS).all()


def test_top_p_at_an_exact_boundary():
    """Four tokens of probability 1/4: 0.5 is reached by exactly two."""
    logits = torch.zeros(1, 4)
    for p, count in ((0.25, 1), (0.5, 2), (0.500001, 3), (0.75, 3),
                     (1e-300, 1), (1.0, 4)):
        kept = Sampler(top_p=p).probabilities(logits)[0] > 0
        assert kept.tolist() == [True] * count + [False] * (4 - count)


def test_top_p_acts_on_what_top_k_left():
    """0.4 0.3 0.2 0.1, top-2 -> 4/7 3/7: top-p 0.5 keeps the first alone;
    without the renormalisation it would keep two."""
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    probs = Sampler(top_k=2, top_p=0.5).probabilities(logits)
    assert probs.tolist() == [[1.0, 0.0, 0.0, 0.0]]
    assert (Sampler(top_p=0.5).probabilities(logits) > 0).sum() == 2


@settings(deadline=None, max_examples=100)
@given(ROWS, DTYPES, st.integers(0, 2 ** 40),
       st.sampled_from([0, 5e-324, 1e-300, 1e-30, 1e-3]))
def test_cold_is_greedy(row, dtype, seed, temperature):
    assume(row.count(max(row)) == 1)
    sampler = Sampler(temperature)
    token = sampler(torch.tensor([row], dtype=dtype),
                    torch.Generator().manual_seed(seed))
    assert token.tolist() == [row.index(max(row))]


def test_greedy_takes_no_random_number():
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    Sampler(0)(torch.randn(2, 9), generator)
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("sampler", [
    Sampler(), Sampler(0.5), Sampler(2.0, top_k=5), Sampler(top_p=0.8),
    Sampler(1.3, top_k=9, top_p=0.9)])
def test_frequencies_pass_chi_square(sampler):
    """20000 draws against the distribution that the sampler states."""
    torch.manual_seed(5)
    logits = torch.randn(1, 16)
    draws = 20_000
    found = torch.bincount(sampler(
        logits.expand(draws, -1), torch.Generator().manual_seed(1)),
        minlength=16)
    wanted = sampler.probabilities(logits)[0] * draws
    assert (found[wanted == 0] == 0).all()
    kept = wanted > 0
    chi = ((found[kept] - wanted[kept]) ** 2 / wanted[kept]).sum().item()
    freedom = int(kept.sum()) - 1
    # mean n, variance 2n: five sigma
    assert chi < freedom + 5 * math.sqrt(2 * freedom)


def test_first_draws_of_neighbouring_seeds_are_spread():
    """generate_batch seeds row r with seed + r."""
    logits = torch.zeros(1, 10)
    counts = torch.zeros(10)
    for seed in range(2000):
        counts[Sampler()(logits, torch.Generator().manual_seed(seed))] += 1
    chi = ((counts - 200) ** 2 / 200).sum().item()
    assert 0.5 < chi < 9 + 5 * math.sqrt(18)


def test_draw_never_returns_a_token_of_probability_zero():
    probs = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]], dtype=torch.float64)
    rows = probs.expand(5000, -1)
    tokens = draw(rows, generator=torch.Generator().manual_seed(0))
    assert set(tokens.tolist()) == {1, 3}
    ids = torch.tensor([[9, 8, 7, 6, 5]]).expand(5000, -1)
    assert set(draw(rows, ids).tolist()) == {8, 6}


@pytest.mark.parametrize("options, name", [
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": math.nan}, "temperature"),
    ({"temperature": math.inf}, "temperature"),
    ({"temperature": 10 ** 400}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_k": -1}, "top_k"), ({"top_k": 2.0}, "top_k"),
    ({"top_k": True}, "top_k"),
    ({"top_p": 0}, "top_p"), ({"top_p": 1.0001}, "top_p"),
    ({"top_p": -0.5}, "top_p"), ({"top_p": math.nan}, "top_p"),
    ({"top_p": None}, "top_p")])
def test_bad_options_are_named(options, name):
    with pytest.raises(GenerateError, match=f"^{name}: expected"):
        Sampler(**options)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_logits_that_are_not_finite_name_the_dtype(bad, temperature):
    logits = torch.zeros(2, 4, dtype=torch.float16)
    logits[1, 2] = bad
    with pytest.raises(GenerateError, match="float16.*bfloat16"):
        Sampler(temperature)(logits)
    with pytest.raises(GenerateError, match="logits"):
        Sampler(temperature)(torch.full((1, 3), -math.inf))


def test_minus_infinity_forbids_a_token():
    logits = torch.tensor([[0.0, -math.inf, 0.0]])
    tokens = Sampler()(logits.expand(1000, -1))
    assert set(tokens.tolist()) == {0, 2}
    assert Sampler(1e-9)(logits.index_fill(
        1, torch.tensor([0]), 1.0)).tolist() == [0]


# -- one text ---------------------------------------------------------------

PROMPT = [5, 17, 200, 33, 90, 4, 4, 61, 120]


def test_equals_the_uncached_loop(model):
    wanted = greedy(model, PROMPT, 40)
    assert list(generate(model, PROMPT, max_new_tokens=40,
                         sampler=Sampler(0))) == wanted
    assert len(set(wanted)) > 5  # not one token over and over


@pytest.mark.parametrize("chunk", [1, 2, 5, 6, 7, 8, 9, 512])
def test_chunks_of_the_prompt_do_not_matter(model, chunk):
    assert list(generate(
        model, PROMPT, max_new_tokens=12, sampler=Sampler(0),
        prefill_chunk=chunk)) == greedy(model, PROMPT, 12)


def test_goes_on_from_a_cache(model):
    wanted = greedy(model, PROMPT, 30)
    cache, ids = model.new_cache(), []
    for count in (1, 7, 2, 20):
        prompt = PROMPT if not ids else ids[-1:]
        ids += generate(model, prompt, max_new_tokens=count, cache=cache,
                        sampler=Sampler(0))
        assert cache.length == len(PROMPT) + len(ids) - 1
    assert ids == wanted


def test_seed_repeats_and_seeds_differ(model):
    def run(seed):
        return list(generate(model, PROMPT, max_new_tokens=20, seed=seed))
    assert run(7) == run(7)
    assert len({tuple(run(seed)) for seed in range(5)}) == 5
    torch.manual_seed(1)
    first = run(None)
    assert run(None) != first  # no seed: not the same again
    torch.manual_seed(1)
    assert run(None) == first  # but repeatable by torch's own


def test_stops_at_a_stop_token_and_yields_it(model):
    wanted = greedy(model, PROMPT, 40)
    stop = wanted[11]
    assert list(generate(
        model, PROMPT, max_new_tokens=40, sampler=Sampler(0),
        stop=[stop, 9999])) == wanted[:wanted.index(stop) + 1]


def test_first_token_comes_before_the_second_is_computed(model):
    """Streaming: a forward a token, none ahead of the reader."""
    calls = []

    class Counting:
        config, embed_tokens = model.config, model.embed_tokens
        new_cache = model.new_cache

        def __call__(self, *args, **options):
            calls.append(1)
            return model(*args, **options)

    stream = generate(Counting(), PROMPT, max_new_tokens=3)
    assert calls == []
    for n, _ in enumerate(stream, start=1):
        assert len(calls) == n
    assert len(calls) == 3


def test_ends_where_the_positions_end(model):
    limit = CONFIG.max_position_embeddings
    prompt = [n % 250 for n in range(limit - 3)]
    out = list(generate(model, prompt, max_new_tokens=100,
                        sampler=Sampler(0)))
    # three more positions, and the last prediction needs none
    assert len(out) == 4
    out = list(generate(model, prompt + [1, 2, 3], sampler=Sampler(0)))
    assert len(out) == 1
    cache = model.new_cache(max_tokens=12)
    assert len(list(generate(model, PROMPT, cache=cache))) == 4
    assert cache.length == 12
    with pytest.raises(GenerateError, match="at most 0 tokens after the 12 "
                       "in the cache .the cache's max_tokens is 12., found"):
        generate(model, [1], cache=cache)


@pytest.mark.parametrize("wrong, why", [
    ({"seed": -1}, "seed: expected an integer from 0 to"),
    ({"seed": True}, "seed: expected"),
    ({"max_new_tokens": 0}, "max_new_tokens: expected an integer >= 1"),
    ({"prefill_chunk": None}, "prefill_chunk: expected an integer >= 1"),
    ({"stop": "end"}, "stop: expected token ids, found 'end'"),
    ({"stop": 7}, "stop: expected token ids, found 7"),
    ({"top_p": 0}, "top_p: expected"),
    ({"sampler": Sampler(0), "top_k": 3}, "sampler: expected none beside"),
])
def test_options_are_checked_where_they_are_made(wrong, why):
    with pytest.raises(GenerateError, match=why):
        SamplingOptions(**wrong)


def test_options_are_one_object_for_all_callers(model):
    """An object, single options and both in one call mean the same."""
    options = SamplingOptions(temperature=0.9, top_k=40, seed=5,
                              max_new_tokens=20, stop=[3, 4])
    wanted = list(generate(model, PROMPT, sampler=Sampler(0.9, 40), seed=5,
                           max_new_tokens=20, stop={3, 4}))
    assert list(generate(model, PROMPT, options)) == wanted
    assert list(generate(model, PROMPT, options.with_changes(seed=1),
                         seed=5)) == wanted
    assert generate_batch(model, [PROMPT], options) == [wanted]
    assert options == options.with_changes(stop={4, 3})
    with pytest.raises(TypeError, match="top_n"):
        generate(model, PROMPT, options, top_n=3)
    with pytest.raises(TypeError, match="top_n"):
        generate_batch(model, [PROMPT], top_n=3)


def test_no_limit_is_all_positions(model):
    options = SamplingOptions(temperature=0, max_new_tokens=None)
    most = CONFIG.max_position_embeddings
    assert len(list(generate(model, PROMPT, options))) == (
        most - len(PROMPT) + 1)
    assert options.room(0) == 1


@pytest.mark.parametrize("prompt, options, why", [
    ([], {}, "prompt: expected at least one token"),
    ([3, 275], {}, "prompt, token 1: expected an id from 0 to 274, "
                   "found 275"),
    ([-1], {}, "prompt, token 0: .*found -1"),
    ([1] * 81, {}, r"at most 80 tokens \(max_position_embeddings is 80\), "
                   "found 81"),
    ([1], {"max_new_tokens": 0}, "max_new_tokens: expected"),
    ([1], {"max_new_tokens": 2.5}, "max_new_tokens: expected"),
    ([1], {"prefill_chunk": 0}, "prefill_chunk: expected"),
    ([1], {"seed": -1}, "seed: expected"),
    ([1], {"seed": 2 ** 63}, "seed: expected"),
    ([1], {"seed": 1.5}, "seed: expected"),
])
def test_refused_at_the_call(model, prompt, options, why):
    with pytest.raises(GenerateError, match=why):
        generate(model, prompt, **options)  # not even the first token asked
    with pytest.raises(GenerateError, match=why):
        generate_batch(model, [prompt], **options)


def test_a_bad_row_of_a_batch_is_named(model):
    with pytest.raises(GenerateError, match="row 2: prompt, token 1: "):
        generate_batch(model, [[1], [2, 3], [4, 275]])
    with pytest.raises(GenerateError, match="row 1: prompt: expected at"):
        generate_batch(model, [[1], []])


def test_a_cache_of_several_rows_is_refused(model):
    with pytest.raises(GenerateError, match="cache: expected a batch of 1"):
        generate(model, [1], cache=model.new_cache(batch_size=2))


def test_nan_in_the_model_names_the_dtype(model):
    class Broken:
        config, embed_tokens = model.config, model.embed_tokens
        new_cache = model.new_cache

        def __call__(self, tokens, **options):
            return model(tokens, **options).half() * math.nan

    with pytest.raises(GenerateError, match="float16"):
        list(generate(Broken(), [1, 2]))


# -- many texts -------------------------------------------------------------

PROMPTS = [PROMPT, [7], [1, 2, 3] * 7, [250, 9]]


@pytest.mark.parametrize("chunk", [3, 6, 512])
def test_a_batch_equals_its_rows(model, chunk):
    wanted = [greedy(model, prompt, 20) for prompt in PROMPTS]
    assert generate_batch(model, PROMPTS, max_new_tokens=20,
                          sampler=Sampler(0), prefill_chunk=chunk) == wanted


def test_rows_of_a_batch_stop_on_their_own(model):
    wanted = [greedy(model, prompt, 20) for prompt in PROMPTS]
    stop = {wanted[0][3], wanted[2][9]}
    cut = [next((row[:n + 1] for n, t in enumerate(row) if t in stop), row)
           for row in wanted]
    assert len({len(row) for row in cut}) > 1
    assert generate_batch(model, PROMPTS, max_new_tokens=20, stop=stop,
                          sampler=Sampler(0)) == cut


def test_rows_of_a_batch_draw_as_their_own_seeds(model):
    rows = generate_batch(model, PROMPTS, max_new_tokens=15, seed=40)
    assert rows == [list(generate(model, prompt, max_new_tokens=15,
                                  seed=40 + r))
                    for r, prompt in enumerate(PROMPTS)]


def test_a_long_row_ends_alone(model):
    long = [n % 250 for n in range(CONFIG.max_position_embeddings - 2)]
    rows = generate_batch(model, [long, [5]], max_new_tokens=9,
                          sampler=Sampler(0))
    assert [len(row) for row in rows] == [3, 9]
    assert rows[1] == greedy(model, [5], 9)


def test_no_rows(model):
    assert generate_batch(model, []) == []


# -- as a method of the model -----------------------------------------------

def left_padded(rows: list[list[int]], pad: int = 0
                ) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, rows))
    ids = [[pad] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


@pytest.mark.parametrize("options, wanted", [
    ({"do_sample": False}, {"temperature": 0}),
    ({"temperature": 0.9, "top_k": 30, "top_p": 0.9, "seed": 8},) * 2,
    ({"seed": 8, "top_k": None, "temperature": None}, {"seed": 8})])
def test_the_method_is_generate(model, options, wanted):
    new = list(generate(model, PROMPT, max_new_tokens=15, stop=[274],
                        **wanted))
    given = torch.tensor([PROMPT], dtype=torch.int32)
    out = model.generate(given, max_new_tokens=15, **options)
    assert out.dtype == torch.int64 and out.tolist() == [PROMPT + new]
    assert model.generate(input_ids=PROMPT, max_new_tokens=15,
                          **options) == PROMPT + new
    out = model.generate(given.expand(3, -1), max_new_tokens=15, **options)
    assert out[0].tolist()[:len(PROMPT + new)] == PROMPT + new


def test_the_method_pads_what_ends_early(model):
    alone = [greedy(model, prompt, 20) for prompt in PROMPTS]
    stop = [alone[0][3], alone[2][9]]
    ids, mask = left_padded(PROMPTS)
    out = model.generate(ids, attention_mask=mask, do_sample=False,
                         max_new_tokens=20, eos_token_id=stop,
                         pad_token_id=271)
    assert out[:, :ids.shape[1]].equal(ids)
    new = generate_batch(model, PROMPTS, sampler=Sampler(0), stop=stop,
                         max_new_tokens=20)
    assert len({len(row) for row in new}) > 1
    assert out[:, ids.shape[1]:].tolist() == [
        row + [271] * (max(map(len, new)) - len(row)) for row in new]
    one = model.generate(ids[:1], attention_mask=mask[:1], do_sample=False,
                         max_new_tokens=20, eos_token_id=stop[0])
    assert one[0, ids.shape[1]:].tolist() == (
        alone[0][:alone[0].index(stop[0]) + 1])


def test_the_method_stops_where_the_checkpoint_says(tmp_path):
    from oracles import random_case

    case = random_case(1)
    path = case.write(tmp_path)
    read = GptOss.from_pretrained(path, torch.float32)
    prompt = case.prompt()[0].tolist()
    new = greedy(read, prompt, 20)
    end = max(new.index(token) for token in new)
    assert end > 0
    other = (max(new) + 1) % case.config.vocab_size
    (path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [other, new[end]]}))
    assert read.generate(prompt, do_sample=False) == prompt + new[:end + 1]
    assert read.generate(prompt, do_sample=False, max_new_tokens=20,
                         eos_token_id=()) == prompt + new


@pytest.mark.parametrize("given, options, why, kind", [
    ([[1, 2]], {"num_beams": 4}, "num_beams", TypeError),
    ([[1, 2]], {"top_k": -1}, "top_k: expected", GenerateError),
    ([1, 2], {}, "input_ids: expected integers .B, T.", GenerateError),
    ([[1.0, 2.0]], {}, "input_ids: expected integers", GenerateError),
    ([[1, 2]], {"attention_mask": torch.ones(1, 3)},
     r"attention_mask: expected shape \(1, 2\)", GenerateError),
    ([[1, 2]], {"attention_mask": torch.tensor([[1, 0]])},
     "attention_mask: expected rows padded on the left", GenerateError),
    ([[1, 2], [3, 4]], {"attention_mask": torch.tensor([[1, 1], [0, 0]])},
     "row 1: prompt: expected at least one token", GenerateError)])
def test_the_method_refuses(model, given, options, why, kind):
    with pytest.raises(kind, match=why):
        model.generate(torch.tensor(given), **options)


@pytest.mark.parametrize("seed", range(4))
def test_the_method_beside_transformers(tmp_path, seed):
    """Greedy, one row and rows padded on the left, ended early or not."""
    from oracles import hf, random_case

    case = random_case(seed)
    path = case.write(tmp_path)
    theirs, ours = hf.load(path), GptOss.from_pretrained(path, torch.float32)
    if case.config.sliding_window == 1:
        pytest.skip("transformers 5.23 keeps every key there")
    alone = case.prompt()[:1]
    rows = [alone[0].tolist(), alone[0].tolist()[:3]]
    for ids, mask in ((alone, torch.ones_like(alone)), left_padded(rows)):
        last = theirs.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=12,
            eos_token_id=-1, pad_token_id=0)[0, -5].item()
        for stop in (last, [last]):
            options = {"attention_mask": mask, "do_sample": False,
                       "max_new_tokens": 12, "eos_token_id": stop,
                       "pad_token_id": 1}
            assert ours.generate(ids, **options).equal(
                theirs.generate(ids, **options))


# -- stop ids ---------------------------------------------------------------

@pytest.mark.parametrize("value, wanted", [
    ([200002, 199999, 200012], (200002, 199999, 200012)),  # as released
    (200002, (200002,)), ([7, 7], (7,)), (0, (0,))])
def test_stop_ids_of_a_folder(tmp_path, value, wanted):
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": value}))
    assert stop_ids(tmp_path) == wanted


def test_stop_ids_of_the_original_layout(tmp_path):
    """The released original/ has no generation_config.json; its id alone
    would miss the end of a tool call."""
    inner = tmp_path / "original"
    inner.mkdir()
    config = replace(CONFIG, max_position_embeddings=64)
    (inner / "config.json").write_text(json.dumps(config.to_original_dict()))
    assert stop_ids(inner) == (200002, 199999, 200012)  # harmony's
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [200002, 199999, 7]}))
    assert stop_ids(inner) == (200002, 199999, 7)
    assert stop_ids(tmp_path) == (200002, 199999, 7)
    (inner / "generation_config.json").write_text("{}")  # its own, silent
    assert stop_ids(inner) == (200002, 199999, 200012)


def test_stop_ids_of_the_folder_above_are_anothers(tmp_path):
    """Only original/ has its files there."""
    inner = tmp_path / "model"
    inner.mkdir()
    (inner / "config.json").write_text(json.dumps(CONFIG.to_hf_dict()))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 5}')
    assert stop_ids(inner) == (274,)


def test_stop_ids_fall_back_to_the_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_hf_dict()))
    assert stop_ids(tmp_path) == (274,) == stop_ids(CONFIG)
    assert stop_ids(str(tmp_path)) == (274,)


@pytest.mark.parametrize("text", [
    "{}", '{"temperature": 0.7}', '{"eos_token_id": null}',
    '{"eos_token_id": []}'])
def test_a_generation_config_that_says_nothing(tmp_path, text):
    (tmp_path / "generation_config.json").write_text(text)
    values = CONFIG.to_hf_dict()
    for said, wanted in ((274, (274,)), ([8, 9], (8, 9)),
                         (None, (200002, 199999, 200012)),
                         ([], (200002, 199999, 200012))):
        (tmp_path / "config.json").write_text(json.dumps(
            values | {"eos_token_id": said}))
        assert stop_ids(tmp_path) == wanted
    (tmp_path / "config.json").write_text(json.dumps(
        values | {"eos_token_id": None, "vocab_size": 1536}))
    shutil.copy(POCKET / "tokenizer.json", tmp_path)
    assert set(stop_ids(tmp_path)) == set(stop_ids(POCKET))


@pytest.mark.parametrize("text", [
    '{"eos_token_id": "x"}', '{"eos_token_id": [1.5]}',
    '{"eos_token_id": [2, null]}', '{"eos_token_id": true}',
    '{"eos_token_id": -1}', '{"eos_token_id": {}}',
    '{"eos_token_id": 4294967296}', '"text"', "[]", "{", "\xff",
    "[" * 10 ** 5])
def test_bad_generation_config_names_the_file(tmp_path, text):
    file = tmp_path / "generation_config.json"
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_hf_dict()))
    file.write_text(text, "latin-1")
    with pytest.raises((GenerateError, ConfigError)) as caught:
        stop_ids(tmp_path)
    assert str(caught.value).startswith(f"{file}: ")
    assert "Error" not in str(caught.value) and "\n" not in str(caught.value)


# -- text as it comes -------------------------------------------------------

class Bytes:
    """A vocabulary in which any byte string is a token."""

    def __init__(self, tokens: list[bytes]) -> None:
        self.tokens = tokens

    def is_special(self, token: int) -> bool:
        return self.tokens[token] == b"<|end|>"

    def token_bytes(self, token: int) -> bytes:
        return self.tokens[token]


def cuts(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(p % (len(data) + 1) for p in places), len(data)]
    return [data[a:b] for a, b in zip(edges, edges[1:], strict=False)]


@settings(deadline=None, max_examples=300)
@given(st.text(max_size=20), st.lists(st.integers(0, 100), max_size=12))
def test_no_cut_of_the_bytes_breaks_a_character(text, places):
    pieces = cuts(text.encode(), places)
    stream = TextStream(Bytes(pieces))
    shown = ""
    for n in range(len(pieces)):
        shown += stream.feed(n)
        assert text.startswith(shown)
        # and nothing that is complete is held back
        whole = b"".join(pieces[:n + 1]).decode(errors="ignore")
        assert shown == whole
    assert shown + stream.flush() == text


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=30), st.lists(st.integers(0, 100), max_size=12))
def test_invalid_bytes_read_as_python_reads_them(data, places):
    pieces = cuts(data, places)
    stream = TextStream(Bytes(pieces))
    shown = "".join(map(stream.feed, range(len(pieces))))
    assert shown + stream.flush() == data.decode(errors="replace")


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 274), max_size=30), st.booleans())
def test_stream_and_decode_say_the_same(tokenizer, ids, skip):
    stream = TextStream(tokenizer, skip_special=skip)
    pieces = [stream.feed(token) for token in ids] + [stream.flush()]
    assert "".join(pieces) == tokenizer.decode(ids, skip_special=skip)


def test_a_control_token_ends_a_broken_character():
    stream = TextStream(Bytes([b"\xc3", b"<|end|>", b"\xa9"]))
    assert [stream.feed(n) for n in (0, 1, 2)] == [
        "", "\ufffd<|end|>", "\ufffd"]
    assert stream.flush() == ""


# -- a whole completion -----------------------------------------------------

def test_complete_reports(model, tokenizer):
    pieces = []
    done = complete(model, tokenizer, "then", max_new_tokens=24,
                    sampler=Sampler(0), on_text=pieces.append)
    ids = tokenizer.encode("then")
    assert isinstance(done, Completion)
    assert done.prompt_tokens == ids
    assert done.tokens == greedy(model, ids, 24)
    assert done.text == tokenizer.decode(done.tokens) == "".join(pieces)
    assert "" not in pieces
    assert done.finish_reason == "length" and done.seconds > 0


def test_complete_stops_without_showing_the_stop_token(model, tokenizer):
    ids = tokenizer.encode("then")
    tokens = greedy(model, ids, 24)
    at = next(n for n in range(3, 24) if tokens[n] not in tokens[:n])
    done = complete(model, tokenizer, ids, max_new_tokens=24,
                    sampler=Sampler(0), stop=[tokens[at]])
    assert done.tokens == tokens[:at + 1]
    assert done.text == tokenizer.decode(tokens[:at])
    assert done.finish_reason == "stop"


def test_complete_flushes_half_a_character(tokenizer):
    """A text cut off inside a character ends in U+FFFD, also for on_text."""
    lead = "é".encode()[0]

    class Always:
        config = CONFIG
        embed_tokens = SimpleNamespace(weight=torch.zeros(1))

        def new_cache(self):
            return SimpleNamespace(length=0, batch_size=1, max_tokens=None)

        def __call__(self, tokens, **options):
            logits = torch.zeros(1, 1, 275)
            logits[..., lead] = 9.0
            return logits

    pieces = []
    done = complete(Always(), tokenizer, "a", max_new_tokens=1,
                    sampler=Sampler(0), on_text=pieces.append)
    assert done.text == "\ufffd" and pieces == ["\ufffd"]
