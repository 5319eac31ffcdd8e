# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   gptoss:
#     module: exams
#     public: [examine, make_pocket, report_card]
# ---

# %% [markdown]
# # Who marks the examiner?
#
# ## Question
#
# Who says that the model can add, remember and use tools? A program that made
# the questions, and it has to answer for its marks: it is tried on a model
# that knows nothing and on answers that are right, its questions occur in no
# text of training, and a share of 200 comes with an error bar. An exam that
# finds 196 right has not shown that the share is above 97 %.

# %%
import json
from importlib.resources import files

import matplotlib.pyplot as plt
import torch

from gptoss.model.transformer import GptOss
from gptoss.text.harmony import system_message
from gptoss.text.tokenizer import Tokenizer

torch.set_num_threads(1)
plt.style.use("../_static/book.mplstyle")
POCKET = files("gptoss") / "pocket"
pocket = GptOss.from_pretrained(POCKET, dtype=torch.float32)
reader = Tokenizer.from_pretrained(POCKET)
saved = json.loads((POCKET / "train_log.json").read_text())
shipped = saved["exam"]

# %% [markdown]
# ## Picture

# %% tags=["hide-input"]
# Figure: one bar for each kind of question, with the share that the shipped
# file gets right and its error bar, beside it the percentage and the count.
rules = {"story": "story: coherent, and about what was asked",
         "talk": "greetings and the like",
         "beyond": "beyond its world: says so",
         "sum": "sum or difference: exact",
         "far": "fact from over two windows before",
         "recall": "fact from a few turns before",
         "after": "sum, right after a fact was asked for",
         "missing": "no tool for it: says so",
         "tool": "right tool, right JSON, result used"}
fig, ax = plt.subplots(figsize=(7, 2.8))
for n, kind in enumerate(rules):
    right, (low, high) = shipped[kind]["right"], shipped[kind]["between"]
    ax.barh(-n, right, color="C0")
    ax.plot((low, high), (-n, -n), color="black", linewidth=1)
    ax.text(1.01, -n, f"{right:.1%} of {shipped[kind]['count']}",
            va="center", fontsize=8)
ax.set(xlim=(0, 1), xlabel="share right", yticks=range(0, -len(rules), -1),
       yticklabels=list(rules.values()),
       title="The shipped file, greedy, held out")
ax.grid(False)
plt.show()

# %% [markdown]
# The figure is the long examination of the shipped file; the thin lines are
# its error bars, 95 % each: 200 questions are few enough that another 200
# might have given a point more or less. "Held out" is meant strictly, and
# checked by reading: a cast, a sum, a question for a tool or a fact that lies
# on the exam's shelf occurs in no turn of
# [anything that trained the model](leaks.ipynb). (Small talk, the date and
# what is beyond the model have nothing to hold out; there only the
# conversation is new.)
#
# Effort changes how long it thinks. The mean number of tokens of analysis for
# a sum at low, medium and high, from the log:

# %%
means = [shipped["sum"][effort] for effort in ("low", "medium", "high")]
assert means == sorted(means)
print(means)

# %% [markdown]
# ## Code
#
# ### How does a program examine?
#
# The program that made a question can tell whether an answer is right. The
# examiner plays the user and the tool: it runs the model until it stops,
# reads the tokens with the [parser](../text/parsing.ipynb), hands back the
# tool's result if the call was right, and judges the final text.

# %% tags=["export"]
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from gptoss.chat.turn import STOPS
from gptoss.model.transformer import GptOss
from gptoss.text.generate import generate_batch
from gptoss.text.harmony import CHANNELS, EFFORTS, Message, render
from gptoss.text.parser import StreamParser
from gptoss.text.sampling import Sampler
from gptoss.text.tokenizer import Tokenizer
from gptoss.training.conversations import TALK, lesson_stream
from gptoss.training.lessons import NOTED, Lesson
from gptoss.training.stories import CAST_SLOTS, read_story


@dataclass
class Mark:
    """How one lesson was answered.

    Attributes:
        called: whether the tool call was right; None if none was due.
        right: whether the final text was.
        said: (channel or recipient, text) of each message of the model.
        thought: tokens of analysis.
    """

    lesson: Lesson
    called: bool | None = None
    right: bool = False
    said: list[tuple[str, str]] = field(default_factory=list)
    thought: int = 0


def right_story(text: str, lesson: Lesson) -> bool:
    """Coherent, and about whom and what the question asked for."""
    reading = read_story(text)
    return reading.coherent and all(
        reading.cast[slot] == lesson.facts[slot]
        for slot in CAST_SLOTS if slot in lesson.facts)


def right_answer(text: str, lesson: Lesson) -> bool:
    """Whether `text` answers the lesson's last question."""
    if lesson.kind == "story":
        return right_story(text, lesson)
    if lesson.kind == "telling":
        return text in NOTED
    if lesson.kind == "talk":
        return any(text in answers for _, _, answers in TALK)
    return text == lesson.facts["answer"]


def right_call(message: Message, lesson: Lesson) -> bool:
    """The right tool with the right arguments, as JSON."""
    name, arguments = lesson.facts["call"]
    try:
        found = json.loads(message.content)
    except ValueError:
        return False
    return (message.recipient == f"functions.{name}" and found == arguments
            and message.content_type == "<|constrain|>json")

# %% tags=["export"]
def answers(model: GptOss, tokenizer: Tokenizer, prompts: list[list[int]],
            most: int) -> list[tuple[list[int], list[Message]]]:
    """The greedy continuation of each prompt, as ids and as messages."""
    stop, found = [tokenizer.special[name] for name in STOPS], []
    for ids in generate_batch(model, prompts, max_new_tokens=most, stop=stop,
                              sampler=Sampler(temperature=0.0)):
        parser = StreamParser(tokenizer)
        for token in ids:
            parser.feed(token)
        parser.close()
        found.append((ids, parser.messages))
    return found


def take(mark: Mark, tokenizer: Tokenizer, messages: list[Message]) -> None:
    """Enter what the model wrote into its mark."""
    for message in messages:
        mark.said.append((message.recipient or message.channel or "",
                          message.content))
        if message.channel == CHANNELS[0]:
            mark.thought += len(tokenizer.encode(message.content))
    last = messages[-1] if messages else Message("assistant")
    if last.recipient and mark.lesson.facts["call"]:
        mark.called = right_call(last, mark.lesson)
    elif last.channel == "final":
        mark.right = right_answer(last.content, mark.lesson)


EXAM, MILESTONE = ("exam", 40_000), ("milestone", 10_000)   # shelf, seed


@torch.inference_mode()
def examine(model: GptOss, tokenizer: Tokenizer, kind: str, count: int,
            seed: int = EXAM[1], most: int = 420, held: str = EXAM[0]
            ) -> list[Mark]:
    """Let the model answer `count` held-out lessons of one kind, greedily,
    with questions from the shelf `held`.

    A question for a tool counts as right only if the call was right and
    the final text, after the tool's result, is too.
    """
    source = lesson_stream(seed, hold_out=held, mix={kind: 1})
    marks = [Mark(next(source)) for _ in range(count)]
    prompts = [render(tokenizer, mark.lesson.messages[:mark.lesson.turn],
                      drop="none") for mark in marks]
    wrote = answers(model, tokenizer, prompts, most)
    again = []
    for mark, prompt, (ids, messages) in zip(marks, prompts, wrote,
                                             strict=True):
        if mark.lesson.facts["call"]:
            mark.called = False
        take(mark, tokenizer, messages)
        if mark.called:
            result = mark.lesson.messages[-2]
            assert result.role == "tool"
            more = render(tokenizer, [result], drop="none")
            again.append((mark, [*prompt, *ids, *more]))
    later = answers(model, tokenizer, [ids for _, ids in again], 120)
    for (mark, _), (_, messages) in zip(again, later, strict=True):
        take(mark, tokenizer, messages)
    for mark in marks:
        mark.right &= mark.called is not False
    return marks


def grade(marks: Sequence[Mark]) -> float:
    """The share that was right."""
    return sum(mark.right for mark in marks) / len(marks)

# %% tags=["export"]
def error_bar(right: int, count: int, z: float = 1.96) -> list[float]:
    """Wilson's 95 % interval for a share of `right` in `count`: from where
    to where the share over all such questions may well lie."""
    share, more = right / count, z * z / count
    middle = (share + more / 2) / (1 + more)
    half = z / (1 + more) * math.sqrt(
        share * (1 - share) / count + more / count / 4)
    return [round(max(0.0, middle - half), 4),
            round(min(1.0, middle + half), 4)]


def report_card(model: GptOss, tokenizer: Tokenizer, kinds: Sequence[str],
                count: int, seed: int = EXAM[1], held: str = EXAM[0]
                ) -> dict[str, dict]:
    """For each kind: how many were asked, the share that was right with its
    error bar, and the mean number of tokens of analysis for each effort."""
    card = {}
    for kind in kinds:
        marks = examine(model, tokenizer, kind, count, seed, held=held)
        right = sum(mark.right for mark in marks)
        card[kind] = {"count": count, "right": round(right / count, 4),
                      "between": error_bar(right, count)}
        for effort in EFFORTS:
            found = [mark.thought for mark in marks
                     if mark.lesson.facts["effort"] == effort]
            card[kind][effort] = round(sum(found) / max(1, len(found)), 1)
    return card

# %% [markdown]
# The examiner can be examined too: a model that has learnt nothing passes
# nothing, and every reference answer passes.

# %%
import itertools
from dataclasses import replace

small = replace(pocket.config, num_hidden_layers=2, layer_types=None,
                hidden_size=32, intermediate_size=32, head_dim=8)
untaught = GptOss(small, dtype=torch.float32, packed=False)
empty = examine(untaught, reader, "sum", count=4, most=30)
print("untaught:", grade(empty))
asked = 0
for kind in ("story", "sum", "tool", "far", "talk"):
    for one in itertools.islice(lesson_stream(2, mix={kind: 1}), 20):
        assert right_answer(one.messages[-1].content, one)
        asked += 1
print("reference answers that pass:", asked, "of 100")

# %% [markdown]
# ### The model that is shipped

# %% tags=["export:pocket"]
from gptoss.training.rows import control_ids
from gptoss.weights.config import GptOssConfig


def pocket_config(vocab_size: int = 1536) -> GptOssConfig:
    """The shipped model: every feature of the 20b, a ten-thousandth of it."""
    special = control_ids(vocab_size)
    return GptOssConfig(
        num_hidden_layers=4, num_local_experts=8, num_experts_per_tok=2,
        vocab_size=vocab_size, hidden_size=128, intermediate_size=128,
        head_dim=32, num_attention_heads=8, num_key_value_heads=2,
        sliding_window=64, initial_context_length=256, rope_factor=8.0,
        max_position_embeddings=2048,
        eos_token_id=special["return"], pad_token_id=special["endoftext"])

# %% [markdown]
# ### From parameters to a file
#
# Training holds every weight in fp32, experts as $w$ and not as $Q(w)$. The
# file gets the released layout: $Q(w)$ in four bits, the rest in bf16.

# %% tags=["export:pocket"]
from collections.abc import Iterator

import torch
from torch import Tensor

from gptoss.weights.encoding import encode


def released_tensors(model: GptOss) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors as the released layout stores them: experts in
    MXFP4 blocks and scales, everything else in bf16."""
    for name, value in plain_state(model).items():
        value = value.detach()
        if name.endswith(("gate_up_proj", "down_proj")):  # (E, in, out)
            blocks, scales = encode(value.transpose(1, 2).float())
            yield f"{name}_blocks", blocks
            yield f"{name}_scales", scales
        else:
            yield name, value.to(torch.bfloat16)


def plain_state(model: GptOss) -> dict[str, Tensor]:
    """The state dict under its own names, parametrised or not."""
    state = model.state_dict()
    return {name.replace("parametrizations.", "").replace(".original", ""):
            value for name, value in state.items()}

# %%
tensors = dict(released_tensors(untaught))
for name in ("model.layers.0.mlp.experts.down_proj_blocks",
             "model.layers.0.mlp.experts.down_proj_scales",
             "model.layers.0.self_attn.sinks", "lm_head.weight"):
    print(name, tuple(tensors[name].shape), tensors[name].dtype)

# %% [markdown]
# ### One command
#
# All of it in order: tokenizer, starting weights, planted heads, the three
# stretches with a short examination at each thousandth step, the files, and
# a long examination of the files.

# %% tags=["export:pocket"]
import json
from collections.abc import Callable
from importlib.resources import files
from itertools import islice
from pathlib import Path

from gptoss.model.transformer import GptOss
from gptoss.text.tokenizer import Tokenizer
from gptoss.training.conversations import SECOND, THIRD
from gptoss.training.planting import plant_copying, start_at_random
from gptoss.training.rows import (
    batches,
    rows,
    sample_texts,
    train_tokenizer,
)
from gptoss.training.train import Recipe, train
from gptoss.weights.disk import drafted
from gptoss.weights.write import write_checkpoint


MILESTONES = ("story", "sum", "tool", "far")
EXAMINED = (*MILESTONES, "recall", "after", "unknown", "telling", "talk",
            "beyond", "missing", "date")


def make_pocket(out: Path, recipe: Recipe,
                report: Callable[[dict], None] = lambda entry: None) -> None:
    """Train the shipped checkpoint and write it to the new folder `out`.

    Writes model.safetensors, config.json, generation_config.json,
    tokenizer.json, chat_template.jinja and train_log.json: the recipe,
    every eighth step, what the model could do at every thousandth, and the
    last examination.
    """
    config, log, marks = pocket_config(), [], []
    vocabulary = train_tokenizer(sample_texts(6000), config.vocab_size)
    tokenizer = Tokenizer(vocabulary)
    model = GptOss(config, dtype=torch.float32, packed=False)
    start_at_random(model, recipe.seed)
    plant_copying(model, recipe.seed)

    def watch(entry: dict) -> None:
        log.append(entry)
        report(entry)
        if (entry["step"] + 1) % 1000 == 0:
            marks.append(milestone(model, tokenizer, entry["step"] + 1))

    train(model, schooling(tokenizer, recipe), recipe, watch)
    write_pocket(out, model, vocabulary, recipe, log, marks)


def schooling(tokenizer: Tokenizer, recipe: Recipe
              ) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of a run: easy ones, all, those of `SECOND`, and at last
    those of `THIRD` with columns of digits."""
    seed, tokens = recipe.seed + 1, recipe.tokens
    easy = int(recipe.easy * recipe.steps) * tokens // 230  # 230: such a row
    first = batches(rows(tokenizer, seed, easy), seed, tokens)
    second = batches(rows(tokenizer, seed + 1, 0, SECOND), seed + 1, tokens)
    third = batches(rows(tokenizer, seed + 2, 0, THIRD, recipe.table),
                    seed + 2, tokens)
    _, change, last = recipe.begins
    yield from islice(first, change)
    yield from islice(second, last - change)
    yield from third


def milestone(model: GptOss, tokenizer: Tokenizer, step: int) -> dict:
    """Shares of 40 questions right, by kind, and the step. They are held
    out too, and others than the exam's: what chooses a recipe has been
    looked at, and can examine it no more."""
    held, seed = MILESTONE
    card = report_card(model, tokenizer, MILESTONES, 40, seed, held)
    return {"step": step} | {kind: card[kind]["right"] for kind in card}

# %% tags=["export:pocket"]
def write_pocket(out: Path, model: GptOss, vocabulary: str, recipe: Recipe,
                 log: list[dict], marks: list[dict], count: int = 200
                 ) -> None:
    """The six files of a trained model, into the new folder `out`; the
    last examination, `count` questions of a kind, is of these files. They
    are written beside `out` and moved there when all are whole."""
    out = Path(out)
    with drafted(out) as draft:
        write_checkpoint(draft, model.config, released_tensors(model))
        (draft / "tokenizer.json").write_text(vocabulary, "utf-8")
        template = files("gptoss") / "pocket" / "chat_template.jinja"
        (draft / "chat_template.jinja").write_bytes(template.read_bytes())
        write_json(draft / "generation_config.json",
                   generation_config(model.config), 2)
        written = GptOss.from_pretrained(draft, dtype=torch.float32)
        card = report_card(written, Tokenizer(vocabulary), EXAMINED, count)
        write_json(draft / "train_log.json", {
            "recipe": vars(recipe), "marks": marks, "exam": card,
            "log": thinned(log)})


def generation_config(config: GptOssConfig) -> dict:
    """What generation_config.json says of a released model."""
    special = control_ids(config.vocab_size)
    stop = ("return", "endoftext", "call")
    return {"bos_token_id": special["startoftext"], "do_sample": True,
            "eos_token_id": [special[name] for name in stop],
            "pad_token_id": special["endoftext"]}


def thinned(log: list[dict], every: int = 8) -> list[dict]:
    """Each eighth entry, the switch to the grid and the last; 4 digits."""
    kept = [entry for n, entry in enumerate(log)
            if n % every == 0 or "unrounded" in entry or n == len(log) - 1]
    return [{key: round(value, 4) for key, value in entry.items()}
            for entry in kept]


def write_json(path: Path, value: object, indent: int | None = None
               ) -> None:
    path.write_text(json.dumps(value, indent=indent) + "\n")

# %% [markdown]
# ## It holds
#
# Now the shipped file, read as any gpt-oss is, in the released layout, with
# its experts packed: what the long examination in the log says, and a few
# held-out questions of four kinds asked here, greedily.

# %%
results = {}
for kind, count in (("story", 3), ("sum", 6), ("tool", 6), ("far", 6)):
    results[kind] = examine(pocket, reader, kind, count, seed=3)
    low, high = shipped[kind]["between"]
    print(f"{kind:>5}: {shipped[kind]['right']:.1%} in the log, between "
          f"{low:.0%} and {high:.0%}")
    assert grade(results[kind]) > 0.5

# %% [markdown]
# One of each kind, as it is written:

# %% tags=["nbval-ignore-output"]
for kind in ("sum", "tool", "far", "story"):
    mark = results[kind][0]
    print(f"USER  {mark.lesson.messages[mark.lesson.turn - 1].content}")
    for channel, text in mark.said:
        print(f"      {channel}: {text}")

# %% [markdown]
# ### What it cannot do
#
# The examination says it in numbers: what each kind got, of 200, and between
# which shares it may well lie.

# %%
for kind, card in sorted(shipped.items(), key=lambda kv: kv[1]["right"]):
    low, high = card["between"]
    print(f"{kind:8}{card['count'] - round(card['right'] * card['count']):4} "
          f"wrong, right {card['right']:6.1%}  ({low:.0%} to {high:.0%})")

# %% [markdown]
# Goals were set before the run: 97 % of stories and sums, 95 % of far facts
# and tools. This is the third recipe that was tried. The first missed the sums
# by one question. It was also bad at noticing that a tool is missing: its
# analysis ("Asked for a die with 72 sides: no tool.") began as if it had the
# tool, and ran on into what it had read more often. So in the second recipe
# the two thoughts begin differently, "No tool for a die with 72 sides." Sums
# rose, and tools fell below their goal. The third gives tools and far facts
# more of the last stretch. Each recipe was chosen by milestones, and each was
# marked by an exam with a seed of its own: whoever looks at one exam three
# times has not set three.
#
# What is marked for small talk is the answer alone. "Hello!" is answered as it
# should be, and thought over as "A farewell.": nothing in the lessons makes
# the two differ, since greeting and farewell are both a line long and both
# right. An examiner finds what it looks for.
#
# It also knows nothing outside of its lessons. Asked in other words, or for
# something that only looks like a lesson, it answers what it would have
# answered to the nearest one:

# %% tags=["nbval-ignore-output"]
strange = ("Please add 12 and 30 and 7.", "Tell me a story about a dragon.",
           "What was my question?", "What is the weather on Mars?")
prompts = [render(reader, [system_message("medium", "2026-01-31"),
                           Message("user", text)]) for text in strange]
said = generate_batch(pocket, prompts, max_new_tokens=60,
                      stop=[reader.special[name] for name in STOPS],
                      sampler=Sampler(temperature=0.0))
for text, ids in zip(strange, said, strict=True):
    print(f"USER  {text}\n      {reader.decode(ids, skip_special=True)}")

# %% [markdown]
# ## Takeaways
#
# - A procedural corpus gives what no collected one has: a program that marks
#   every answer.
# - What chooses a recipe has been looked at; the questions of an exam are
#   others.
# - A share without its error bar is half a number: with 200 questions it may
#   lie a few points away.
# - The files are examined, not the model in memory: what is marked is what is
#   shipped.
#
# ## Exercises
#
# ### Exercise 1
#
# How many of 200 would have to be right for the whole error bar to lie above
# 97 %? And how many of 2,000?

# %% tags=["hide-cell"]
for count in (200, 2000):
    least = next(right for right in range(count + 1)
                 if error_bar(right, count)[0] > 0.97)
    print(f"{least} of {count}, {least / count:.1%}")
assert error_bar(200, 200)[0] > 0.97 > error_bar(194, 200)[0]

# %% [markdown]
# ### Exercise 2
#
# Plant a fault in an answer of each kind, a digit, a colour or a name, and
# show that the examiner sees it.

# %% tags=["hide-cell"]
import random

rng, seen = random.Random(0), 0
for kind in ("story", "sum", "tool", "far"):
    for one in itertools.islice(lesson_stream(4, mix={kind: 1}), 25):
        text = one.messages[-1].content
        at = rng.choice([n for n, c in enumerate(text) if c.isalnum()])
        other = rng.choice([c for c in "xyz789" if c != text[at]])
        seen += not right_answer(text[:at] + other + text[at + 1:], one)
print(f"{seen} of 100 planted faults are seen")
assert seen == 100

# %% [markdown]
# ### Exercise 3
#
# Somebody tries ten recipes and keeps the one that did best on the exam. Let
# all ten be equally good, right in 95 % of the questions. What will the best
# of ten exams say, on average over a thousand tries?

# %% tags=["hide-cell"]
rng, tries = random.Random(0), 1000
best = sum(max(sum(rng.random() < 0.95 for _ in range(200))
               for _ in range(10)) for _ in range(tries)) / tries
print(f"{best / 200:.1%}, though each is right in 95 %")
assert best / 200 > 0.96

# %% [markdown]
# That is what milestones are for: they may be looked at, and the exam may not.
#
# ## Sources
#
# - The interval for a share: E. B. Wilson, *Probable inference, the law of
#   succession, and statistical inference*, 1927,
#   https://doi.org/10.1080/01621459.1927.10502953.
# - The released layout and harmony: {cite}`gptoss2025`.
