"""What users run: bf16, through the cache, the recorded step, a chat, several
ranks. Runs twice (conftest): in plain torch, and on the kernels' path.

Both round, so tokens are not compared but judged: what was chosen must be the
likeliest in float64, or as near to it as the rounding of this very path.
"""

import os
import shutil
from pathlib import Path

import conftest
import pytest
import torch
from oracles import random_tensors

from gptoss.chat.chat import Chat
from gptoss.kernels import build
from gptoss.model.transformer import GptOss
from gptoss.parallel.collectives import rehearse
from gptoss.parallel.split import SplitGptOss
from gptoss.parity.contracts import CONTRACTS, contract_for
from gptoss.parity.judge import Judge
from gptoss.parity.suspects import judge_walk
from gptoss.parity.walk import trace_ours
from gptoss.text.generate import choose_step, generate, generate_batch
from gptoss.text.sampling import Sampler
from gptoss.weights.checkpoint import Checkpoint
from gptoss.weights.config import GptOssConfig
from gptoss.weights.write import write_checkpoint

POCKET = Path(build.__file__).parents[1] / "pocket"
GREEDY = Sampler(temperature=0.0)
# every size is one that the kernels take; the text outgrows the window; every
# token goes to all experts, or rounding would send some to others
CONFIG = GptOssConfig(
    num_hidden_layers=4, num_local_experts=4, num_experts_per_tok=4,
    vocab_size=128, hidden_size=128, intermediate_size=96, head_dim=32,
    num_attention_heads=8, num_key_value_heads=4, sliding_window=24,
    swiglu_limit=4.0, eos_token_id=2, pad_token_id=0)
needs_kernels = pytest.mark.skipif(not conftest.ON_KERNELS,
                                   reason="plain torch is in use")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paths") / "model"
    write_checkpoint(folder, CONFIG, random_tensors(CONFIG, 1).items())
    return folder


@pytest.fixture(scope="module")
def model(path):
    return GptOss.from_pretrained(path)


@pytest.fixture(scope="module")
def exact(path):
    return GptOss.from_pretrained(path, torch.float64)


def prompt(length, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(CONFIG.vocab_size, (1, length), generator=g)


@torch.inference_mode()
def noise(model, exact, tokens, start=0):
    """How far the logits of this path are from float64, at most."""
    off = model(tokens).double() - exact(tokens)
    return off[:, start:].abs().max().item()


@torch.inference_mode()
def judged(model, exact, before, made):
    """Each token of `made` is the likeliest after those before it, or as
    good as that: its float64 logit within what rounding did to both."""
    tokens = torch.tensor([[*before, *made]])
    logits = exact(tokens)[0, len(before) - 1:-1]
    chosen = logits.gather(1, tokens[0, len(before):, None])[:, 0]
    behind = (logits.amax(1) - chosen).max().item()
    limit = noise(model, exact, tokens, len(before) - 1)
    assert behind <= 2 * limit, (behind, limit, made)
    # and that says something: most tokens would be too far behind
    assert (logits.amax(1) - logits.mean(1)).mean() > 2 * limit
    return made


# --- Which path it is --------------------------------------------------------

def product(model):
    """One product of four-bit weights, on the path in use."""
    m = model.layers[0].mlp.experts
    x = torch.randn(6, CONFIG.hidden_size).bfloat16()
    ids = torch.arange(12).view(6, 2) % CONFIG.num_local_experts
    return m(x, ids, torch.full((6, 2), 0.5).bfloat16()).detach()


def test_the_path_is_the_one_that_was_asked_for(model):
    """Where there is a compiler, the second run really runs the kernels."""
    torch.manual_seed(1)
    here = product(model)
    torch.manual_seed(1)
    with build.plain_torch():
        plain = product(model)
    if conftest.ON_KERNELS:
        compiler = os.environ.get("CXX", "c++").split()[0]
        assert shutil.which(compiler) is None or not (
            conftest.LOADED.startswith("torch"))
        assert build.load_kernels() == conftest.LOADED
        assert not torch.equal(here, plain)
    else:
        assert build.load_kernels().startswith("torch")
        assert torch.equal(here, plain)
    assert (here - plain).abs().max() <= 0.02 * plain.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_numbers_are_the_same_bits_on_both_paths(path, dtype):
    """Forward, cache, batch and text: no kernel changes a bit of them."""
    model, tokens = GptOss.from_pretrained(path, dtype), prompt(50)

    def everything():
        cache = model.new_cache()
        parts = [model(part, cache) for part in tokens.split([30, 1, 19], 1)]
        ids = list(generate(model, tokens[0].tolist(), max_new_tokens=12,
                            sampler=GREEDY))
        return [model(tokens), *parts, torch.tensor(ids)]
    with torch.inference_mode():
        here = everything()
        with build.plain_torch():
            there = everything()
    assert all(map(torch.equal, here, there))


# --- Model and cache ---------------------------------------------------------

@pytest.mark.parametrize("parts", [[60], [59, 1], [1] * 60, [4, 5, 3, 48],
                                   [30, *[1] * 30]], ids=len)
def test_each_operation_of_every_way_to_read(path, model, parts):
    contract = contract_for(None, torch.bfloat16)
    use = CONTRACTS[contract]
    tokens = prompt(60, 1)
    trace = trace_ours(model, tokens, contract, parts=parts)
    trace[None, "tokens"] = tokens[0]
    with Checkpoint.open(path) as checkpoint:
        _, finding = judge_walk(Judge(
            checkpoint, torch.bfloat16, use.inner, use.kernels), trace, "ours")
    assert finding is None, finding


@needs_kernels
@pytest.mark.parametrize("step", ["eager", "auto"])
def test_decoding_computes_what_the_walk_judged(model, step):
    """Through the cache, by the recorded step too: the same bits, as long
    as no ring has turned (then keys come in another order)."""
    tokens = prompt(CONFIG.sliding_window, 2)
    parts = [14] + [1] * 10
    wanted = trace_ours(model, tokens, "kernels", parts=parts)
    with torch.inference_mode():
        cache = model.new_cache()
        found = [model(tokens[:, :14], cache)[0]]
        run = choose_step(model, cache, step)
        found += [run(tokens[:, t:t + 1])[0].clone() for t in range(14, 24)]
    assert torch.equal(torch.cat(found), wanted[None, "logits"])


@pytest.mark.parametrize("sizes", [[90], [40, 50], [1] * 90, [64, 1, 25]],
                         ids=len)
def test_the_cache_holds_what_was_read(model, exact, sizes):
    tokens, slack = prompt(90, 3), 4
    with torch.inference_mode():
        cache = model.new_cache(slack=slack)
        found = torch.cat([model(part, cache)
                           for part in tokens.split(sizes, 1)], 1)
        again = cache.rollback(80)  # what is replayed lacks what it saw
        more = model(tokens[:, again:], cache)[:, 80 - again:]
        found = torch.cat([found, more], 1)
        wanted = exact(tokens)
        far = (found - torch.cat([wanted, wanted[:, 80:]], 1)).abs()
    limit = noise(model, exact, tokens)
    assert far.max() < 2 * limit < 0.1 * wanted.abs().max()


# --- Generation --------------------------------------------------------------

def test_generate(model, exact):
    """From the start, in chunks, from a cache, by either decoder."""
    start = prompt(30, 4)[0].tolist()
    options = {"max_new_tokens": 40, "sampler": GREEDY}
    judged(model, exact, start, list(generate(model, start, **options)))
    judged(model, exact, start, list(generate(
        model, start, prefill_chunk=7, **options)))
    cache = model.new_cache(slack=2)
    first = list(generate(model, start, cache=cache, **options))
    rest = [*first[-1:], 5, 9]
    more = list(generate(model, rest, cache=cache, **options))
    judged(model, exact, start + first + rest[1:], more)
    slow = list(generate(model, start, decode="eager", **options))
    judged(model, exact, start, slow)
    if conftest.ON_KERNELS:
        assert slow == first  # the recorded step: the same bits


def test_generate_batch(model, exact):
    rows = [prompt(length, 5 + length)[0].tolist() for length in (3, 31, 12)]
    for row, made in zip(rows, generate_batch(
            model, rows, max_new_tokens=30, sampler=GREEDY), strict=True):
        judged(model, exact, row, list(made))


def test_a_wrong_text_is_not_judged_right(model, exact):
    """The judgement can fail: the second best, or a cache one token off."""
    start = prompt(30, 4)[0].tolist()
    made = list(generate(model, start, max_new_tokens=20, sampler=GREEDY))
    with pytest.raises(AssertionError):
        judged(model, exact, start, [(t + 1) % 128 for t in made])
    with pytest.raises(AssertionError):
        judged(model, exact, start[1:] + start[:1], made)


# --- Chat --------------------------------------------------------------------

@pytest.mark.parametrize("slack", [0, 1024])
def test_a_chat_says_what_its_model_would(slack):
    """Three greedy turns of the shipped model, its cache kept."""
    chat = Chat(temperature=0, date="2025-06-28", max_new_tokens=24,
                effort="low", tools=[], slack=slack)
    assert chat.model.embed_tokens.weight.dtype == torch.bfloat16
    exact, talk = GptOss.from_pretrained(POCKET, torch.float64), []
    for question in ("Tell me a story.", "What is 2 + 3?", "Thanks!"):
        talk.append({"role": "user", "content": question})
        list(chat.events(talk))
        talk += chat.turn
        tokens = chat.session.prefix.tokens
        made = chat.usage.generated_tokens
        judged(chat.model, exact, tokens[:-made], tokens[-made:])


# --- Several ranks -----------------------------------------------------------

@pytest.mark.parametrize(("world", "stages"), [(2, 1), (2, 2), (4, 2)])
def test_ranks_are_one_model(path, model, exact, world, stages):
    tokens = prompt(40, 7)

    def work(mesh, group):
        part = SplitGptOss.part(path, mesh, group)
        with torch.inference_mode():
            logits = part(tokens)
        return logits, list(generate(part, tokens[0].tolist(),
                                     max_new_tokens=12, sampler=GREEDY))
    found = rehearse(CONFIG, world, stages, work)
    assert all(torch.equal(logits, found[0][0]) and made == found[0][1]
               for logits, made in found)
    with torch.inference_mode():
        far = (found[0][0].double() - exact(tokens)).abs().amax(-1)[0]
    assert far.median() < noise(model, exact, tokens)
    judged(model, exact, tokens[0].tolist(), found[0][1])

