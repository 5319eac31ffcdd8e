"""What guesses bring, as ratios within one run: with lookup and without.

    python bench/drafts.py PATH --context 512 --tokens 128 --repeats 2

PATH is a folder in the released layout (bench/make_checkpoint.py writes one
of random weights). A random checkpoint writes noise, in which nothing repeats,
so here it writes what it is told: a sampler hands it given texts, token by
token, whatever the logits say. All else is as ever: the recorded step, checks
of several tokens, what is taken back, and the rule that switches guesses off.

The texts: what the shipped model writes greedily (a story, the same story
again, and three in which it quotes), and texts cut into words, as a large
vocabulary cuts them (an edited program, JSON echoed, the results of a tool
quoted, and prose that does not repeat). Each is written with lookup and
without, in turn, --repeats times, after --context random tokens in the cache.

Beside that, the cost of a forward of 1, 2, ... tokens in steps, and what the
counts and these costs would give together (`expected`).
"""

import argparse
import inspect
import json
import re
import statistics
import time
from pathlib import Path

import torch

import gptoss
from gptoss.kernels import drafts
from gptoss.kernels.build import kernel_path
from gptoss.kernels.drafts import Lookup
from gptoss.model.transformer import GptOss
from gptoss.text import sampling
from gptoss.text.generate import choose_step, generate
from gptoss.text.stops import stop_ids
from gptoss.text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
POCKET = Path(gptoss.__file__).parent / "pocket"

# ---- the texts: name -> (prompt, what follows), lists of ids


def shipped(wanted=None) -> dict[str, tuple[list[int], list[int]]]:
    """What the shipped model writes, greedily, in fp32; wanted: only these,
    the others empty."""
    model = GptOss.from_pretrained(POCKET, dtype=torch.float32)
    tokenizer, stop = Tokenizer.from_pretrained(POCKET), stop_ids(POCKET)

    def follows(prompt):
        return list(generate(model, prompt, stop=stop, temperature=0))

    def chat(*messages, tools=None):
        return tokenizer.apply_chat_template(list(messages), tools, date="")

    tools = [{"type": "function", "function": {
        "name": "calculator",
        "description": "Work out an arithmetic expression.",
        "parameters": {"type": "object", "properties": {"expression": {
            "type": "string"}}, "required": ["expression"]}}}]
    ask = {"role": "user", "content": "What is 1234 * 567?"}
    call = {"role": "assistant", "tool_calls": [
        {"id": "1", "type": "function", "function": {
            "name": "calculator",
            "arguments": '{"expression":"1234 * 567"}'}}]}
    result = {"role": "tool", "tool_call_id": "1", "name": "calculator",
              "content": "699678"}
    opening = tokenizer.encode(
        "Once upon a time there was a little fox named Mira.")
    story = follows(opening)
    prompts = {
        "story": opening, "story again": [*opening, *story, *opening],
        "quotes a fact": chat(
            {"role": "user", "content": "My cat is called Zorali."},
            {"role": "assistant", "content": "I will not forget it."},
            {"role": "user", "content": "What is my cat called?"}),
        "quotes in JSON": chat(ask, tools=tools),
        "quotes a result": chat(ask, call, result, tools=tools)}
    return {name: (prompt, follows(prompt) if name in (wanted or prompts)
                   else []) for name, prompt in prompts.items()}


def given() -> dict[str, tuple[str, str]]:
    """Texts as a model would write them that follows its orders."""
    program = "".join(map(inspect.getsource, (
        sampling.best, sampling.nucleus, sampling.ranked, sampling.draw)))
    edited = program.replace("probs", "chances").replace(
        "    mass =", "    # from the likeliest on\n    mass =")
    records = [{"id": 100 + n, "name": name, "city": city, "open": n % 3 > 0}
               for n, (name, city) in enumerate(zip(
                   ("Ada", "Ben", "Cleo", "Dora", "Emil", "Fay", "Gus"),
                   ("Oslo", "Rome", "Lima", "Cairo", "Quito", "Delhi",
                    "Lagos"), strict=True))]
    changed = [record | {"open": False} for record in reversed(records)]
    lines = [f"gptoss/{part}/{name}.py:{17 * n + 3}: unused import {what}"
             for n, (part, name, what) in enumerate((
                 ("text", "sampling", "math"), ("model", "cache", "field"),
                 ("kernels", "step", "partial"), ("chat", "turn", "time"),
                 ("weights", "files", "shutil")))]
    quoted = " ".join(f"In {line.split(':')[0]}, line {line.split(':')[1]}, "
                      f"there is an {line.split(': ')[1]}; remove it."
                      for line in lines)
    prose = (ROOT / "book" / "index.md").read_text("utf-8")
    prose = prose[prose.index("What happens"):prose.index("**An hour**")]
    half = prose.index("You need not")
    return {"edited program": (program + "\nRename probs to chances.\n",
                               edited),
            "JSON echoed": (json.dumps(records, indent=1) + "\nClose all, "
                            "and turn the list round.\n",
                            json.dumps(changed, indent=1)),
            "results quoted": ("\n".join(lines) + "\nWhat did it find?\n",
                               quoted),
            "prose": (prose[:half], prose[half:])}


def in_words(texts: dict[str, tuple[str, str]]
             ) -> dict[str, tuple[list[int], list[int]]]:
    """A word with the space before it, signs, and blanks, each an id."""
    ids: dict[str, int] = {}
    return {name: tuple(
        [ids.setdefault(piece, len(ids)) for piece in re.findall(
            r" ?\w+| ?[^\w\s]+|\s+", text)] for text in pair)
        for name, pair in texts.items()}


class Script:
    """A sampler that draws what it is told, after a look at the logits."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = iter(tokens)

    def __call__(self, logits, generator=None):
        logits.max(-1)  # what greedy costs
        return torch.tensor([next(self.tokens)])


# ---- the measurement


@torch.inference_mode()
def filled(model, count, room, slack):
    """A cache that holds `count` random tokens, with space for `room`."""
    c = model.config
    cache = model.new_cache(max_tokens=count + room, slack=slack)
    if count:
        plan = cache.begin(torch.arange(count)[None])
        for layer in range(c.num_hidden_layers):
            k, v = torch.randn(2, 1, count, c.num_key_value_heads,
                               c.head_dim).to(model.dtype)
            plan.update(layer, k, v)
        cache.commit(plan)
    return cache


class Place:
    """A cache after a prompt, to which one can come back."""

    def __init__(self, model, prompt, context, room, slack):
        self.cache = filled(model, context, len(prompt) + room, slack)
        with torch.inference_mode():
            for at in range(0, len(prompt) - 1, 512):
                part = prompt[at:min(at + 512, len(prompt) - 1)]
                model(torch.tensor([part]), cache=self.cache,
                      logits_to_keep=1)
        self.rows = self.cache.rows
        self.kept = [(x.k.clone(), x.v.clone()) for x in self.cache.layers]

    @torch.inference_mode()
    def back(self):
        self.cache.rows = self.rows
        for layer, (k, v) in zip(self.cache.layers, self.kept, strict=True):
            layer.k.copy_(k)
            layer.v.copy_(v)
        return self.cache


def write(model, place, prompt, follows, draft):
    """Seconds from the first to the last token, and of each check how many
    guesses there were and how many right."""
    checks, real = [], drafts.check_guesses

    def counted(*args):
        tokens = real(*args)
        checks.append((len(args[3]), len(tokens) - 1))
        return tokens

    drafts.check_guesses = counted
    try:
        run = generate(model, prompt[-1:], cache=place.back(), draft=draft,
                       before=prompt[:-1], sampler=Script(follows),
                       max_new_tokens=len(follows))
        next(run)
        start = time.perf_counter()
        for _ in run:
            pass
        return time.perf_counter() - start, checks
    finally:
        drafts.check_guesses = real


@torch.inference_mode()
def forward_costs(model, context, most, repeats):
    """Seconds of a single step, and of forwards of 2 to most + 1 tokens."""
    place = Place(model, [1, 1], context, 8 * (most + 2), most)
    times = {n: [] for n in range(1, most + 2)}
    for _ in range(repeats):
        for n, found in times.items():
            cache = place.back()
            step = choose_step(model, cache) if n == 1 else None
            tokens = torch.ones(1, n, dtype=torch.int64)
            for turn in range(7):
                start = time.perf_counter()
                if step:
                    step(tokens)
                else:
                    model(tokens, cache=cache, logits_to_keep=n)
                if turn:  # the first records, or warms up
                    found.append(time.perf_counter() - start)
    return {n: statistics.median(found) for n, found in times.items()}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128,
                        help="of each text at most (default: 128)")
    parser.add_argument("--most", type=int, default=8,
                        help="guesses at once (default: 8)")
    parser.add_argument("--texts", default="",
                        help="only these, by name, separated by commas")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    chosen = [name for name in options.texts.split(",") if name]
    threads = options.threads or torch.get_num_threads()
    torch.set_num_threads(1)  # the shipped model is small
    texts = shipped(chosen) | in_words(given())
    torch.set_num_threads(threads)
    chosen = chosen or [*texts]
    if unknown := [name for name in chosen if name not in texts]:
        parser.error(f"--texts: expected some of {', '.join(texts)}, found "
                     f"{', '.join(unknown)}")
    model = GptOss.from_pretrained(options.path)
    size = model.config.vocab_size
    texts = {name: tuple([token % size for token in ids] for ids in
                         texts[name]) for name in chosen}
    steps = forward_costs(model, options.context, options.most,
                          options.repeats)
    costs = {n: seconds / steps[1] for n, seconds in steps.items()}
    found = {"kernels": kernel_path(), "threads": torch.get_num_threads(),
             "context": options.context, "most": options.most,
             "seconds_per_step": steps[1],
             "cost_of_tokens": [
                 {"tokens": n, "steps": cost, "steps_by_bytes":
                  drafts.step_bytes(model.config, n)
                  / drafts.step_bytes(model.config, 1)}
                 for n, cost in costs.items()], "texts": []}
    for name, (prompt, follows) in texts.items():
        follows = follows[:options.tokens]
        place = Place(model, prompt, options.context,
                      len(follows) + options.most, options.most)
        times, checks = {"plain": [], "lookup": []}, []
        for _ in range(options.repeats):
            for how, seconds in times.items():
                draft = (Lookup(most=options.most) if how == "lookup"
                         else None)
                took, seen = write(model, place, prompt, follows, draft)
                seconds.append(took)
                checks = seen or checks
        count = len(follows) - 1  # the first is the prompt's
        right = sum(good for _, good in checks)
        spent = count - right - len(checks) + sum(
            costs[n + 1] for n, _ in checks)
        plain, fast = (statistics.median(times[how])
                       for how in ("plain", "lookup"))
        found["texts"].append({
            "name": name, "prompt_tokens": len(prompt), "tokens": count,
            "forwards": count - right, "checks": len(checks),
            "guesses": sum(n for n, _ in checks), "right": right,
            "plain_tokens_per_second": count / plain,
            "lookup_tokens_per_second": count / fast,
            "ratio": plain / fast, "expected": count / spent})
    if options.json:
        print(json.dumps(found, indent=1))
        return
    print(f"{found['kernels']}, {1000 * steps[1]:.2f} ms a step; a forward of"
          " n tokens in steps (by its bytes):", ", ".join(
              f"{row['tokens']}: {row['steps']:.2f} "
              f"({row['steps_by_bytes']:.2f})"
              for row in found["cost_of_tokens"]))
    for row in found["texts"]:
        print(f"{row['name']:16} {row['tokens']:4} tokens, "
              f"{row['forwards']:4} forwards, {row['right']:3} of "
              f"{row['guesses']:3} guesses right, "
              f"{row['plain_tokens_per_second']:7.2f} -> "
              f"{row['lookup_tokens_per_second']:7.2f} tokens/s: "
              f"{row['ratio']:.2f} x (by counts and costs "
              f"{row['expected']:.2f})")


if __name__ == "__main__":
    main()
