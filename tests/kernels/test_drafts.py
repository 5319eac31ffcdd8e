"""Guesses that are checked: the same text, the same distribution, and a cache
that is left as without them."""

import dataclasses
import functools
import itertools
import logging
import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_step import TINY, tiny

import gptoss
from gptoss.chat.chat import Chat
from gptoss.kernels import drafts
from gptoss.kernels.drafts import Lookup, ModelDrafter, Pace, check_costs
from gptoss.model.transformer import GptOss
from gptoss.text.generate import complete, generate, generate_batch
from gptoss.text.sampling import GenerateError, Sampler, draw
from gptoss.text.stops import stop_ids
from gptoss.text.tokenizer import Tokenizer
from gptoss.weights.config import GptOssConfig

POCKET = Path(gptoss.__file__).parent / "pocket"
OPENING = "Once upon a time there was a little fox named Mira."
V = TINY.vocab_size
HOW = {"greedy": {"temperature": 0},
       "cut": {"seed": 4, "temperature": 0.8, "top_k": 9, "top_p": 0.9}}


@functools.cache
def lively(packed: bool = True) -> GptOss:
    """A small random model, norms at 1: it writes another token each time."""
    model = tiny(packed=packed)
    for name, x in model.named_parameters():
        if "norm" in name:
            x.fill_(1.0)
    return model


@pytest.fixture(scope="module")
def pocket() -> GptOss:
    return GptOss.from_pretrained(POCKET, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer_() -> Tokenizer:
    return Tokenizer.from_pretrained(POCKET)


@pytest.fixture
def always(monkeypatch):
    """Checking costs nothing, so that every guess is checked."""
    monkeypatch.setattr(drafts, "check_costs",
                        lambda config, drafter: [1.0] * (drafter.most + 1))


@pytest.fixture
def forwards(monkeypatch):
    """How many tokens each forward of a model ran, one after the other."""
    seen: list[int] = []
    run = GptOss.forward

    def forward(self, tokens=None, *args, **kwargs):
        seen.append(tokens.shape[1])
        return run(self, tokens, *args, **kwargs)
    monkeypatch.setattr(GptOss, "forward", forward)
    return seen


def guesser(propose, most: int = 3) -> SimpleNamespace:
    """A drafter whose guesses are propose(text so far)."""
    text: list[int] = []

    def begin(tokens):
        text[:] = tokens
    return SimpleNamespace(most=most, reads=0, begin=begin, add=text.extend,
                           propose=lambda n, *_: (propose(text)[:n], None))


def knowing(prompt, follows, wrong=lambda at: False, most=3):
    """Guesses what follows; where wrong(its place), another token."""
    def propose(text):
        at = len(text) - len(prompt)
        return [(token + wrong(at + n)) % V
                for n, token in enumerate(follows[at:])]
    return guesser(propose, most)


# ---- who guesses

def place(text, lengths):
    """Where the longest n-gram at the end ended before, and its length."""
    for n in lengths:
        for at in range(len(text) - 1, n - 1, -1):
            if text[at - n:at] == text[-n:]:
                return at, n
    return None, 0


def search(text, lengths, most):
    """What `Lookup` says, by looking through the text."""
    at, _ = place(text, lengths)
    return [] if at is None else list(itertools.islice(
        itertools.cycle(text[at:]), most))


@given(st.lists(st.integers(0, 3), max_size=30), st.integers(0, 30),
       st.sampled_from([(8, 4, 2, 1), (3, 2), (2,), (1,), (4, 1), (2, 3)]),
       st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_lookup_is_the_search(text, cut, lengths, most):
    lookup = Lookup(lengths, most=5)
    lookup.begin([9, 9, 9])
    lookup.begin(text[:cut])  # forgets the text before
    lookup.add(text[cut:cut + 2])
    lookup.add(text[cut + 2:])
    found, said = lookup.propose(most, None, None)
    assert said is None
    # a text that was cut short by its end is taken for a period
    wanted = search(text, lengths, most)
    assert found == wanted
    assert lookup.chances == chances(text, min(cut, len(text)), lengths, most)


def chances(text, own, lengths, most):
    """What `Lookup` says of its guesses: all counted anew."""
    def kind(at, agree):
        return (8 if agree > 7 else 4 if agree > 3 else min(agree, 2),
                at >= own, met[at])

    met, seen = [], []
    for n, token in enumerate(text):
        at, agree = place(text[:n], lengths)
        if at is None:
            met.append("unseen")
            continue
        hit = text[at] == token
        if n >= own:
            seen.append((kind(at, agree), hit))
        met.append("foreseen" if hit else "surprise")
    at, agree = place(text, lengths)
    if at is None:
        return []
    found = []
    for n in range(most):
        there = kind(at + n % (len(text) - at), agree + n)
        hits = [hit for other, hit in seen if other == there]
        first = {1: 0.3, 2: 0.5, 4: 0.7, 8: 0.85}[there[0]]
        if there[2] == "surprise":
            first *= 0.5
        found.append((sum(hits) + 4 * first) / (len(hits) + 4))
    return found


@given(st.lists(st.lists(st.integers(0, 3), max_size=12), max_size=5),
       st.integers(0, 6))
@settings(max_examples=60, deadline=None)
def test_a_text_that_goes_on_is_as_one_begun_anew(parts, other):
    """Turns of a conversation; before the last, perhaps, another text."""
    lookup, text = Lookup(), []
    for n, part in enumerate(parts):
        text = text + part
        lookup.begin([7] * n if n == other else text)
        lookup.begin(text)
        lookup.add([1, 2])
        text = [*text, 1, 2]
    fresh = Lookup()
    fresh.begin(text)
    lookup.begin(text)
    assert vars(fresh) == vars(lookup)
    assert (fresh.propose(5, None, None), fresh.chances) == (
        lookup.propose(5, None, None), lookup.chances)


def test_fields_of_a_form_are_not_guessed_twice():
    """The second time the words end where they were new the first time."""
    form = [1, 2, 3, 4, None, 5, 6, 7, 8]
    lookup, guesses = Lookup(), []
    lookup.begin([0])
    pace = Pace(check_costs(GptOssConfig.gpt_oss_20b(), lookup))
    for n in range(4):
        for at, token in enumerate(form):
            token = 20 + n if token is None else token
            if at == 3:
                found = lookup.propose(8, None, None)[0]
                guesses.append(found[:pace.best(lookup.chances)])
            lookup.add([token])
    assert guesses[0] == [] and guesses[1] != guesses[2]
    assert guesses[2:] == [[4], [4]]


def test_chances_decide(forwards):
    """A drafter that is always right, and says what it is told to say."""
    model, prompt = lively(), [1, 2, 3]
    alone = list(generate(model, prompt, temperature=0, max_new_tokens=31))
    for said, fed in (([1.0] * 3, {4}), ([1.0, 1.0, 0.0], {3}),
                      ([0.0] * 3, {1}), ([0.01, 1.0, 1.0], {1})):
        draft = knowing(prompt, alone)
        draft.chances = said
        forwards.clear()
        assert list(generate(model, prompt, temperature=0, max_new_tokens=31,
                             draft=draft)) == alone
        assert set(forwards[1:-1]) == fed


@pytest.mark.parametrize("said", [None, [], [1.0]])
def test_no_chances_are_no_checks(said, forwards):
    """Fewer chances than guesses: the others are not checked."""
    model, prompt = lively(), [1, 2, 3]
    alone = list(generate(model, prompt, temperature=0, max_new_tokens=21))
    draft = knowing(prompt, alone)
    draft.chances = said
    forwards.clear()
    assert list(generate(model, prompt, temperature=0, max_new_tokens=21,
                         draft=draft)) == alone
    assert max(forwards[1:]) == (2 if said else 1)


def test_chances_of_what_was_drawn_are_refused():
    """They would make what is written depend on what was guessed."""
    draft = SimpleNamespace(
        most=1, reads=0, chances=[1.0], begin=len, add=len,
        propose=lambda *_: ([1], torch.full((1, V), 1 / V)))
    with pytest.raises(GenerateError, match="draft: .*chances.*both"):
        list(generate(lively(), [1, 2], max_new_tokens=5, draft=draft))


def test_who_reads_much_is_asked_seldom_whatever_it_says():
    model, asked = lively(), []
    draft = guesser(lambda text: asked.append(1) or [0])
    draft.reads, draft.chances = 10 ** 12, [1.0]
    list(generate(model, [1, 2, 3], max_new_tokens=64, draft=draft))
    assert len(asked) <= 4


@pytest.mark.parametrize("how", HOW)
def test_the_same_text_where_chances_decide(how, pocket, tokenizer_):
    """At the costs of the model itself, so that some guesses are left."""
    prompt, stop = tokenizer_.encode(OPENING), stop_ids(POCKET)
    story = list(generate(pocket, prompt, temperature=0, max_new_tokens=60))
    prompt = [*prompt, *story, *prompt]
    how_ = HOW[how] | {"stop": stop, "max_new_tokens": 60}
    assert list(generate(pocket, prompt, draft="lookup", **how_)) == list(
        generate(pocket, prompt, **how_))


def test_best_is_the_best_of_all():
    pace = Pace(check_costs(GptOssConfig.gpt_oss_120b(), Lookup()))
    rng = random.Random(0)
    for _ in range(300):
        chances = [rng.random() for _ in range(rng.randrange(9))]
        gains = [(1 + sum(math.prod(chances[:k + 1]) for k in range(n)))
                 / pace.costs[n] for n in range(len(chances) + 1)]
        assert pace.best(chances) == gains.index(max(gains))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=25),
       st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)),
                max_size=6), st.booleans())
@settings(max_examples=15, deadline=None)
def test_a_model_that_guesses_reads_the_text(text, rounds, drawn):
    """Whatever became of its guesses, it guesses as a new one would."""
    small = lively()
    draws = Sampler(1.0 if drawn else 0.0)

    def ask(drafter):
        made = torch.Generator().manual_seed(5)
        return drafter.propose(3, draws, made)

    drafter = ModelDrafter(small)
    drafter.begin(text)
    for right, other in rounds:
        guesses, said = ask(drafter)
        assert (said is not None) == drawn
        new = [*guesses[:right], other]
        text = text + new
        drafter.add(new)
    fresh = ModelDrafter(small)
    fresh.begin(text)
    (ours, said), (theirs, wanted) = ask(drafter), ask(fresh)
    assert ours == theirs
    if drawn:
        assert (said - wanted).abs().max() < 1e-9
    drafter.begin(text[:3])  # back to an earlier text, beyond its slack
    fresh = ModelDrafter(small)
    fresh.begin(text[:3])
    assert ask(drafter)[0] == ask(fresh)[0]


def test_a_text_longer_than_the_small_model_has_positions(always):
    big = lively()
    small = GptOss(dataclasses.replace(
        TINY, max_position_embeddings=20), torch.float64, packed=False)
    alone = list(generate(big, [1, 2, 3], temperature=0, max_new_tokens=40))
    assert alone == list(generate(big, [1, 2, 3], temperature=0,
                                  max_new_tokens=40, draft=small))


# ---- the same text

DRAFTERS = {
    "lookup": lambda prompt, text: "lookup",
    "one token": lambda prompt, text: Lookup((1,), most=6),
    "always right": knowing,
    "always wrong": lambda prompt, text: knowing(prompt, text,
                                                 lambda at: True),
    "now and then": lambda prompt, text: knowing(
        prompt, text, lambda at: at % 5 in (0, 3)),
    "too many": lambda prompt, text: SimpleNamespace(**{
        **vars(knowing(prompt, text)),
        "propose": lambda n, *_: ([*text, *text], None)}),
    "no tokens": lambda prompt, text: guesser(
        lambda known: [known[-1], V, -1, 10 ** 12]),
    "at random": lambda prompt, text: guesser(
        lambda known: random.Random(len(known)).choices(
            range(V + 2), k=len(known) % 4)),
    "none": lambda prompt, text: guesser(lambda known: []),
    "many": lambda prompt, text: knowing(prompt, text, most=20),
}


def thirty(how: str, cache: str, **more) -> tuple[list[int], int | None]:
    """A text, and how many tokens its cache then holds."""
    model = lively(False)
    held = {"none": None, "slack 2": model.new_cache(slack=2),
            "no slack": model.new_cache(max_tokens=34)}[cache]
    text = list(generate(model, [1, 2, 3, 1, 2, 3, 1], max_new_tokens=30,
                         cache=held, **HOW[how], **more))
    return text, held and held.length


alone_ = functools.cache(thirty)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("cache", ["none", "slack 2", "no slack"])
def test_the_same_text(name, how, cache, always):
    """Windows of 8, in float64; drawn with the same random numbers."""
    wanted = alone_(how, cache)
    draft = DRAFTERS[name]([1, 2, 3, 1, 2, 3, 1], wanted[0])
    assert thirty(how, cache, draft=draft) == wanted
    assert len(wanted[0]) == (28 if cache == "no slack" else 30)
    assert len(set(wanted[0])) > 12  # it does not only repeat itself


@pytest.mark.parametrize("how", HOW)
def test_the_same_text_of_the_trained_model(how, pocket, tokenizer_, always):
    prompt, stop = tokenizer_.encode(OPENING), stop_ids(POCKET)
    story = list(generate(pocket, prompt, temperature=0, max_new_tokens=80))
    prompt = [*prompt, *story, *prompt]
    how_ = HOW[how] | {"stop": stop, "max_new_tokens": 90}
    alone = list(generate(pocket, prompt, **how_))
    assert list(generate(pocket, prompt, draft="lookup", **how_)) == alone
    if how == "greedy":  # by itself, greedily, too
        how_ |= {"max_new_tokens": 40}
        assert list(generate(pocket, prompt, draft=pocket, **how_)
                    ) == alone[:40]


def test_guesses_that_are_right_save_forwards(always, forwards):
    model, prompt = lively(), [1, 2, 3]
    alone = list(generate(model, prompt, temperature=0, max_new_tokens=41))
    assert forwards == [3] + [1] * 40
    forwards.clear()
    assert list(generate(model, prompt, temperature=0, max_new_tokens=41,
                         draft=knowing(prompt, alone))) == alone
    assert forwards == [3] + [4] * 10


def test_pauses_and_chunks_stay(always):
    model, prompt = lively(), [1, 2, 3] * 7
    runs = [list(generate(model, prompt, temperature=0, max_new_tokens=20,
                          pauses=True, prefill_chunk=5, draft=draft))
            for draft in (None, "lookup")]
    assert runs[0] == runs[1] and runs[0][:5] == [None] * 4 + runs[0][4:5]


# ---- the end

def test_stops_inside_a_run(always):
    model, prompt = lively(), [1, 2, 3]
    alone = list(generate(model, prompt, temperature=0, max_new_tokens=30))
    for token in sorted(set(alone)):
        upto = alone[:alone.index(token) + 1]
        cache = model.new_cache(slack=5)
        assert list(generate(
            model, prompt, temperature=0, max_new_tokens=30, stop=[token],
            cache=cache, draft=knowing(prompt, alone, most=5))) == upto
        assert cache.length == len(prompt) + len(upto) - 1


@pytest.mark.parametrize("count", range(1, 13))
def test_as_many_tokens_as_asked(count, always):
    model, prompt = lively(), [1, 2, 3]
    alone = list(generate(model, prompt, temperature=0, max_new_tokens=30))
    cache = model.new_cache(slack=3)
    assert list(generate(model, prompt, temperature=0, cache=cache,
                         max_new_tokens=count,
                         draft=knowing(prompt, alone))) == alone[:count]
    assert cache.length == 3 + count - 1


@pytest.mark.parametrize("room", range(3, 16))
def test_the_last_positions(room, always):
    """No check goes beyond them, and none of them is left."""
    model, prompt = lively(), [1, 2, 3]
    alone = list(generate(model, prompt, temperature=0, max_new_tokens=30))
    cache = model.new_cache(max_tokens=room, slack=3)
    found = list(generate(model, prompt, temperature=0, cache=cache,
                          max_new_tokens=None,
                          draft=knowing(prompt, alone)))
    assert found == alone[:room - 2] and cache.length == room


@pytest.mark.parametrize("slack", [0, 3, 9])
@pytest.mark.parametrize("name", ["lookup", "now and then", "always right"])
def test_the_cache_after_each_token(name, slack, always):
    """Left at any token, and gone on with, by another and without drafts."""
    model, prompt = lively(False), [1, 2, 3, 1, 2, 3]
    alone = list(generate(model, prompt, temperature=0, max_new_tokens=24))
    for leave in (1, 2, 3, 5, 9, 17):
        cache, taken = model.new_cache(slack=slack), []
        for token in generate(model, prompt, temperature=0, cache=cache,
                              max_new_tokens=24,
                              draft=DRAFTERS[name](prompt, alone)):
            taken.append(token)
            assert cache.length == len(prompt) + len(taken) - 1
            assert torch.equal(cache.rows.lengths, cache.rows.held)
            if len(taken) == leave:
                break
        rest = generate(model, taken[-1:], temperature=0, cache=cache,
                        max_new_tokens=24 - leave)
        assert taken + list(rest) == alone


def test_a_cache_that_was_replayed(always):
    """Taken back further than its slack, then gone on with by drafts."""
    model, text = lively(False), [n % 7 for n in range(80)]
    alone = list(generate(model, text[:60], temperature=0,
                          max_new_tokens=30))
    cache = model.new_cache(slack=3)
    list(generate(model, text, cache=cache, max_new_tokens=1))
    start = cache.rollback(60)
    assert start < 60
    assert alone == list(generate(
        model, text[start:60], temperature=0, cache=cache, max_new_tokens=30,
        draft=knowing(text[:60], alone, lambda at: at % 5 == 0),
        before=text[:start]))


# ---- the same distribution

SMALL = GptOssConfig(
    num_hidden_layers=1, num_local_experts=2, num_experts_per_tok=1,
    hidden_size=16, intermediate_size=16, vocab_size=4, head_dim=8,
    num_attention_heads=2, num_key_value_heads=1, sliding_window=4,
    max_position_embeddings=64, initial_context_length=32)
SAMPLERS = {"all": Sampler(), "top-k": Sampler(0.7, top_k=4),
            "top-p": Sampler(1.3, top_p=0.8)}
each_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(),
                                       ids=SAMPLERS)


def chi_square(counts, wanted):
    """The sum over all that occurs, what is rarer than 5 as one; and how much
    may be seen by chance: its mean and five standard deviations."""
    assert not counts[wanted == 0].any()
    often = wanted >= 5
    e = torch.cat([wanted[often], wanted[~often].sum()[None]])
    o = torch.cat([counts[often], counts[~often].sum()[None]])
    total = float(((o - e) ** 2 / e.clamp(min=1e-9)).sum())
    return total, len(e) + 5 * (2 * len(e)) ** 0.5


def by_rule(rule, sampler, times=3000):
    """Two guesses from a q near p, six tokens; the first two tokens counted:
    what the rule leaves open is drawn from p."""
    numbers = torch.Generator().manual_seed(3)
    logits = torch.randn(3, 6, generator=numbers)
    near = logits[:2] + 0.7 * torch.randn(2, 6, generator=numbers)
    said, counts = sampler.probabilities(near), torch.zeros(6, 6)
    for _ in range(times):
        guesses = [int(draw(row[None], None, numbers)) for row in said]
        tokens = rule(logits, guesses, said, sampler, numbers)
        if len(tokens) == 1:
            tokens = [*tokens, int(sampler(logits[1:2], numbers))]
        counts[tokens[0], tokens[1]] += 1
    first, second = sampler.probabilities(logits[:2])
    return chi_square(counts, times * first[:, None] * second)


@each_sampler
def test_speculative_sampling(sampler):
    total, most = by_rule(drafts.keep_or_redraw, sampler)
    assert total < most


@each_sampler
def test_drawing_along(sampler):
    total, most = by_rule(
        lambda logits, guesses, said, draws, generator: drafts.draw_along(
            logits, guesses, draws, generator), sampler)
    assert total < most


def always_keep(logits, guesses, said, sampler, generator):
    return [*guesses, int(sampler(logits[-1:], generator))]


def draw_again(logits, guesses, said, sampler, generator):
    """Not from what is left, but from all: the guess has two chances."""
    found = sampler.probabilities(logits)
    for n, guess in enumerate(guesses):
        if torch.rand((), dtype=torch.float64, generator=generator
                      ) * said[n, guess] >= found[n, guess]:
            return [*guesses[:n], int(sampler(logits[n:n + 1], generator))]
    return [*guesses, int(sampler(logits[-1:], generator))]


def keep_likeliest(logits, guesses, said, sampler, generator):
    """Looks whether the guess is the likeliest token, and else draws."""
    for n, guess in enumerate(guesses):
        if guess != int(logits[n].argmax()):
            return [*guesses[:n], int(sampler(logits[n:n + 1], generator))]
    return [*guesses, int(sampler(logits[-1:], generator))]


@pytest.mark.parametrize("rule", [always_keep, draw_again, keep_likeliest])
def test_wrong_rules_are_found_out(rule):
    total, most = by_rule(rule, Sampler())
    assert total > 2 * most


def small_model(seed: int, near: GptOss | None = None) -> GptOss:
    """Random; or near another, as a draft model is."""
    torch.manual_seed(seed)
    model = GptOss(SMALL, torch.float64, packed=False).requires_grad_(False)
    for name, x in model.named_parameters():
        noise = torch.randn_like(x)
        x.copy_((0.3 if "head" in name else 1) * noise if near is None
                else near.get_parameter(name) + 0.2 * noise)
    return model


def law(model, prompt, sampler):
    """The probability of every four tokens after the prompt, (256,)."""
    texts = torch.cartesian_prod(*[torch.arange(4)] * 4)
    rows = torch.cat([torch.tensor([prompt]).expand(256, -1), texts], 1)
    with torch.no_grad():
        logits = model(rows)[:, len(prompt) - 1:-1]
    return torch.stack([sampler.probabilities(logits[:, n]).gather(
        1, texts[:, n:n + 1])[:, 0] for n in range(4)]).prod(0)


def by_texts(model, sampler, draft, times):
    """Chi-square of whole texts of four tokens: the first is drawn as ever,
    then two guesses are checked at most."""
    prompt = [1, 2, 3, 0, 0, 1, 3, 2, 1]
    counts = torch.zeros(256)
    for seed in range(times):
        a, b, c, d = generate(
            model, prompt, seed=seed, draft=draft, max_new_tokens=4,
            temperature=sampler.temperature, top_k=sampler.top_k,
            top_p=sampler.top_p)
        counts[64 * a + 16 * b + 4 * c + d] += 1
    return chi_square(counts, times * law(model, prompt, sampler))


@pytest.mark.parametrize("who", ["lookup", "model"])
def test_texts_have_the_same_distribution(who, always, forwards):
    model = small_model(1)
    draft = (Lookup((1,)) if who == "lookup"
             else ModelDrafter(small_model(2, near=model)))
    total, most = by_texts(model, Sampler(0.8, top_p=0.9), draft, 600)
    assert 3 in forwards and total < most


def test_texts_by_a_wrong_rule(always, monkeypatch):
    model = small_model(1)
    monkeypatch.setattr(drafts, "keep_or_redraw", always_keep)
    total, most = by_texts(model, Sampler(), ModelDrafter(
        small_model(2, near=model)), 400)
    assert total > 2 * most


def test_a_sampler_of_ones_own(always):
    """It has no probabilities; a model then guesses its likeliest token."""
    model, small = small_model(1), small_model(2)

    def second(logits, generator=None):
        return logits.topk(2).indices[:, 1]
    for draft in ("lookup", small):
        assert list(generate(model, [1, 2, 1], sampler=second,
                             max_new_tokens=30)) == list(
            generate(model, [1, 2, 1], sampler=second, draft=draft,
                     max_new_tokens=30))


def test_a_seed_gives_one_text_with_a_model_that_guesses(always):
    model, small = small_model(1), small_model(2)
    texts = {tuple(generate(model, [1, 2], seed=seed, draft=small,
                            max_new_tokens=30))
             for seed in (5, 5, 6)}
    assert len(texts) == 2


# ---- is it worth it?

def test_costs_follow_the_bytes():
    costs = check_costs(GptOssConfig.gpt_oss_20b(), Lookup())
    assert [round(cost / drafts.MARGIN, 2) for cost in costs[1:]] == [
        1.30, 1.56, 1.79, 1.99, 2.17, 2.32, 2.46, 2.57]
    costs = check_costs(GptOssConfig.gpt_oss_120b(), Lookup(most=15))
    assert round(costs[15] / drafts.MARGIN, 2) == 5.47


def test_pace():
    pace = Pace(check_costs(GptOssConfig.gpt_oss_20b(), Lookup()))
    assert 0.4 < pace.share < 0.5 and pace.length > 0
    pace.saw(0, 1)
    assert pace.length == 0
    for _ in range(10):
        pace.saw(8, 0)
    assert pace.length == 8
    for _ in range(30):
        pace.saw(1, 1)
        pace.saw(0, 1)
    assert pace.length == 0
    assert Pace([1.0, 9.0]).length == 0  # never worth it


def test_off_when_wrong_and_on_when_right(forwards):
    """Wrong for 40 tokens, then right: the costs are the model's own."""
    model, prompt = lively(), [1, 2, 3]
    alone = list(generate(model, prompt, temperature=0, max_new_tokens=120))
    forwards.clear()
    draft = knowing(prompt, alone, lambda at: at < 40)
    assert list(generate(model, prompt, temperature=0, max_new_tokens=120,
                         draft=draft)) == alone
    checks = [n for n, size in enumerate(forwards[1:]) if size > 1]
    assert sum(n < 40 for n in checks) <= 2  # the first, and none after it
    assert len([n for n in checks if n >= 40]) > 12


def test_a_dear_drafter_is_asked_seldom(monkeypatch):
    model, asked = lively(), []
    draft = guesser(lambda text: [0])
    draft.reads = 10 ** 12
    propose = draft.propose
    draft.propose = lambda *args: asked.append(1) or propose(*args)
    list(generate(model, [1, 2, 3], max_new_tokens=64, draft=draft))
    assert len(asked) == 3


def test_nothing_found_is_the_plain_step(forwards):
    """No forward of several tokens, and the step that was chosen."""
    model, made = lively(), []

    def decoder(model, cache):
        made.append(cache)
        return lambda token: model(token, cache=cache, logits_to_keep=1)
    list(generate(model, [1, 2, 3], max_new_tokens=20, decode=decoder,
                  draft=guesser(lambda text: [])))
    assert forwards == [3] + [1] * 19 and len(made) == 1


# ---- who may be given

def test_refused(pocket):
    model = lively()
    group = tiny()
    group.group = object()
    for draft, words in (
            ("look", "draft: expected lookup, a GptOss or a Drafter"),
            (3, "draft: expected lookup"), (object(), "draft: expected"),
            (pocket, "draft: expected a model with the vocabulary of 50 "
                     "tokens, found 1536")):
        with pytest.raises(GenerateError, match=words):
            generate(model, [1], draft=draft)
    with pytest.raises(GenerateError, match="spread over processes"):
        generate(group, [1], seed=1, draft=model)
    generate(group, [1], seed=1, draft="lookup")
    for make in (lambda: Lookup(()), lambda: Lookup((0,)),
                 lambda: Lookup(most=0), lambda: Lookup((True,))):
        with pytest.raises(GenerateError, match="integers >= 1"):
            make()
    with pytest.raises(GenerateError, match="most: expected an integer"):
        ModelDrafter(model, 0)


def test_probabilities_of_another_shape(always):
    draft = guesser(lambda text: [1])
    draft.propose = lambda *_: ([1], torch.zeros(1, 3))
    with pytest.raises(GenerateError, match="draft: expected probabilities"):
        list(generate(lively(), [1, 2], draft=draft, max_new_tokens=9))


def test_logits_that_are_no_numbers(always):
    model = small_model(1)
    for draft in ("lookup", small_model(2)):
        run = generate(model, [1, 2, 1, 2, 1], draft=draft, seed=1)
        next(run)
        model.lm_head.weight.fill_(float("nan"))
        with pytest.raises(GenerateError, match="finite"):
            list(run)
        model = small_model(1)


def test_batches_take_none():
    with pytest.raises(TypeError):
        generate_batch(lively(), [[1]], draft="lookup")


# ---- beside it: completions, chats

def test_complete(pocket, tokenizer_):
    texts = [complete(pocket, tokenizer_, OPENING, temperature=0,
                      max_new_tokens=40, draft=draft).text
             for draft in (None, "lookup", pocket)]
    assert texts[0] == texts[1] == texts[2] != ""


@pytest.mark.parametrize("who", ["lookup", "model", "own"])
def test_chat(who, pocket, tokenizer_):
    """Three turns, the cache kept: the same words, and no more is fed."""
    draft = {"lookup": "lookup", "model": pocket, "own": Lookup((2,))}[who]
    said = []
    for who_ in (None, draft):
        chat = Chat((pocket, tokenizer_), temperature=0, date="", draft=who_)
        messages, turns = [], []
        for ask in ("My cat is called Zorali.", "What is 12 + 345?",
                    "What is my cat called?"):
            messages.append({"role": "user", "content": ask})
            text = "".join(chat.reply(messages))
            messages += chat.turn
            turns.append((text, chat.usage.prefilled_tokens,
                          chat.usage.generated_tokens))
        said.append(turns)
    assert said[0] == said[1] and "Zorali" in said[0][2][0]


def test_a_chat_looks_at_the_whole_text(pocket, tokenizer_, forwards):
    """What an earlier turn said is found, though it is not fed again."""
    chat = Chat((pocket, tokenizer_), temperature=0, date="", draft="lookup")
    messages = [{"role": "user", "content": "My cat is called Zorali."}]
    "".join(chat.reply(messages))
    messages += [*chat.turn, {"role": "user",
                              "content": "What is my cat called?"}]
    forwards.clear()
    assert "Zorali" in "".join(chat.reply(messages))
    assert len(forwards) < 25  # 20; with what is fed alone it was 29


# ---- with kernels: bf16, a recorded step

def near_tie(model, text, ours, theirs):
    """Where two texts part, both tokens are nearly as likely."""
    at = next(n for n, (a, b) in enumerate(zip(ours, theirs, strict=False))
              if a != b)
    with torch.inference_mode():
        logits = model(torch.tensor([[*text, *ours[:at]]]))[0, -1].float()
    return abs(float(logits[ours[at]] - logits[theirs[at]])) < 0.25


@pytest.mark.parametrize("name", ["lookup", "now and then", "always right"])
def test_bf16_text_but_for_near_ties(name, always, tokenizer_, caplog):
    model, stop = GptOss.from_pretrained(POCKET), stop_ids(POCKET)
    prompt = tokenizer_.encode(OPENING)
    first = list(generate(model, prompt, temperature=0, max_new_tokens=90))
    prompt = [*prompt, *first, *prompt]
    caplog.set_level(logging.INFO, "gptoss")
    cache = model.new_cache(slack=3)
    alone, ours = (list(generate(
        model, prompt, stop=stop, temperature=0, draft=draft, cache=cache_,
        max_new_tokens=110))
        for draft, cache_ in ((None, None),
                              (DRAFTERS[name](prompt, first), cache)))
    assert ours == alone or near_tie(model, prompt, ours, alone)
    steps = {record.getMessage().split(":")[1] for record in caplog.records
             if "single tokens" in record.getMessage()}
    assert len(steps) == 1  # the recorded one, if there are kernels
    assert cache.length == len(prompt) + len(ours) - 1
    assert torch.equal(cache.rows.lengths, cache.rows.held)


def test_bf16_cache_after_steps_and_checks(always):
    """A step that is called again and checks take turns, past 256 tokens,
    where the full layers grow: what the cache holds is what one forward
    over the text holds, to the rounding of bf16."""
    model = GptOss.from_pretrained(POCKET)
    prompt = list(range(5, 240))
    draft = guesser(lambda text: text[-3:] if len(text) % 3 else [])
    cache = model.new_cache(slack=3)
    made = list(generate(model, prompt, temperature=0, cache=cache,
                         max_new_tokens=60, draft=draft))
    text = [*prompt, *made]
    with torch.inference_mode():
        ours = model(torch.tensor([text[-1:]]), cache=cache)[0, -1].float()
        whole = model(torch.tensor([text]))[0, -1].float()
    assert (ours - whole).abs().max() < 0.1 * whole.std() + 0.1
