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
#     module: rows
#     public: [batches, lesson_row]
# ---

# %% [markdown]
# # How does a conversation become a row to learn from?
#
# ## Question
#
# A conversation is system, developer, user, tool and assistant text in one
# row of tokens. Which of them should the model learn to write? Of an average
# lesson less than a third are its own; all others it reads, and most of what
# it has to know stands in them.
#
# ## Picture

# %% tags=["hide-input", "picture"]
# Figure: the tokens of a short conversation in seven lines of boxes, coloured
# by what they count in the loss: white for nothing, light for a fifth, dark
# for everything. Only the last answer, from its analysis to its stop, is dark.
from importlib.resources import files

import matplotlib.pyplot as plt

from gptoss.text.harmony import Message
from gptoss.text.tokenizer import Tokenizer as Reader
from gptoss.training import rows as finished
from gptoss.training.lessons import Lesson as Finished

plt.style.use("../_static/book.mplstyle")
reader = Reader.from_pretrained(files("gptoss") / "pocket")
talk = [Message("user", "My cat is called Zorali."),
        Message("assistant", "Good to know.", channel="final"),
        Message("user", "What is my cat called?"),
        Message("assistant", "Asked for your cat.", channel="analysis"),
        Message("assistant", "Your cat is called Zorali.", channel="final")]
ids, weights = finished.lesson_row(reader, Finished("recall", talk, 3))
fig, ax = plt.subplots(figsize=(7.4, 2.5))
ax.axis("off")
tint = {0: "white", .2: "#cfe3f1", 1: "#0072b2"}
x, y, widest, per_character = 0.0, 0, 0.0, .0122
for token, weight in zip(ids, weights, strict=True):
    text = reader.decode([token])
    if text == "<|start|>" and x:
        x, y = 0.0, y - 1
    width = per_character * len(text) + .01
    ax.text(x + width / 2, y, text, size=7.5, family="monospace",
            ha="center", va="center",
            color="white" if weight == 1 else "black")
    ax.add_patch(plt.Rectangle((x, y - .32), width, .64, fc=tint[weight],
                               ec="0.6", lw=.6, zorder=0))
    x += width + .003
    widest = max(widest, x)
ax.set_xlim(0, widest)
ax.set_ylim(y - 1.4, .6)
for n, (weight, what) in enumerate(((1, "counts 1"), (.2, "counts 0.2"),
                                    (0, "counts 0"))):
    ax.add_patch(plt.Rectangle((.18 * n, y - 1.2), .03, .5, fc=tint[weight],
                               ec="0.6", lw=.6))
    ax.text(.04 + .18 * n, y - .95, what, size=9, va="center")
plt.show()

# %% [markdown]
# What to see: what the model has to write next is dark and counts fully, from
# behind `<|start|>assistant`, which the prompt gives, to the stop. What users
# say is light: it is only read. Of the model's own *earlier* answer the text
# is light and the frame around it white; why, we shall see below.
#
# ## Derivation
#
# Only the assistant's text is the model's to write. A token is paid for by
# its surprise: if the model gave the right one a probability of 1/4, it pays
# $\log 4 = 1.39$ nats. With a weight for each token, the loss is the average
# of what was paid, by weight. Two tokens with surprises of 1.39 and 0.69 that
# count 1 and 0.2 make (1.39 + 0.2 · 0.69) / 1.2 = 1.27.

# %%
import math

paid, counts = (math.log(4), math.log(2)), (1, .2)
loss = sum(p * w for p, w in zip(paid, counts, strict=True)) / sum(counts)
print(f"surprises {paid[0]:.2f} and {paid[1]:.2f}, loss {loss:.2f}")

# %% [markdown]
# With logits $z_t \in \mathbb{R}^V$ at position $t$, the next token $y_t$ and
# a weight $w_t$ for it, the loss of a batch is
#
# $$ \mathcal{L}_{\text{text}} = \frac{1}{\sum_t w_t} \sum_t w_t
#    \Big( \log \sum_v e^{z_{tv}} - z_{t y_t} \Big). $$ (train-ce)
#
# The obvious choice is $w_t = 1$ for the model's own tokens and 0 elsewhere.
# It wastes most of every row: the text that is only read holds the same
# words, and guessing them teaches what they mean. So it counts a fifth.
#
# ## Code
#
# ### Which tokens does so small a model need?
#
# The released vocabulary has two hundred thousand tokens; its table of
# embeddings alone would be far larger than our whole model. We learn a small
# vocabulary of fifteen hundred from the lessons themselves, by the same
# method: byte pair encoding, which joins the pair that occurs most often into
# a new token, again and again. The control tokens get the last 21 ids, in the
# released order.

# %% tags=["export"]
from gptoss.training.conversations import lesson_stream
from gptoss.training.leaks import story_without_leaks, without_leaks
from gptoss.training.lessons import Lesson, column
from gptoss.training.stories import WORDS, story_stream

# %%
import itertools

from gptoss.training.lessons import made_up

# %% tags=["export"]
from gptoss.text.tokenizer import Tokenizer
from gptoss.text.vocabulary import (
    ALPHABET,
    NAMED,
    PATTERN,
    RANKS,
    tokenizer_json,
)

CONTROL = 21  # control tokens, in the order of o200k_harmony


def train_ranks(texts: list[str], vocab_size: int) -> dict[bytes, int]:
    """Learn byte-level BPE ranks: bytes of a token -> its id.

    At most `vocab_size` tokens, 256 of them the single bytes; fewer when
    the texts have nothing left to merge.
    """
    from tokenizers import Regex, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Engine
    from tokenizers.models import BPE

    engine = Engine(BPE())
    engine.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    engine.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=list(ALPHABET),
        show_progress=False))
    letters = {letter: byte for byte, letter in enumerate(ALPHABET)}
    words = sorted(engine.get_vocab().items(), key=lambda pair: pair[1])
    return {bytes(letters[c] for c in word): rank for word, rank in words}


def control_ids(vocab_size: int) -> dict[str, int]:
    """Ids of the named control tokens when the last 21 ids are theirs."""
    return {name: vocab_size - CONTROL + real - RANKS
            for real, name in NAMED.items()}


def train_tokenizer(texts: list[str], vocab_size: int) -> str:
    """The tokenizer.json of a small vocabulary, made like the released one.

    The last 21 ids are the control tokens of o200k_harmony in its order;
    ids that the merges leave free stay reserved.
    """
    ranks = train_ranks(texts, vocab_size - CONTROL)
    name = {token: f"<|{text}|>"
            for text, token in control_ids(vocab_size).items()}
    control = {token: name.get(token, f"<|reserved_{token}|>")
               for token in range(len(ranks), vocab_size)}
    return tokenizer_json(ranks, control)

# %% [markdown]
# Digits are kept out of the texts that the merges are learnt from. Each digit
# then stays a token of its own, and column arithmetic is about tokens rather
# than about their spelling. (In o200k, 347 is one token, and 1347 is two.)
#
# The texts are also broken before a capital letter and after the dot of
# `functions.get_time`. A BPE learnt without this has one token for " Oslo",
# with its space, and spells "Oslo" in pieces where no space comes before it,
# as in the arguments `{"city":"Oslo"}`. To copy is then to spell, and made-up
# names come apart differently each time. With it a name is the same tokens
# wherever it stands.
#
# Words that begin small keep their space: a story would be three fifths longer
# without (exercise 2). So " fox" in a question and "fox" in quotes, as
# arguments have it, are two different tokens, and a model has to learn for
# each word that they belong together. A model that is not helped fails at just
# that: its wrong calls are translations, `brown` for *fox*, `b flute` for
# *flute*. We help three times: the words that are translated are learnt bare
# as well, so that the quoted one is one token and not f, ox; half of the
# questions put the word in quotes, as English does; and some of the rows that
# follow practise nothing but such twins.

# %% tags=["export"]
import random
import re


BREAK = re.compile(r"\d+| (?=[A-Z])|\.(?=[a-z])")
QUOTED = WORDS["thing"] + WORDS["colour"] + WORDS["kind"]


def sample_texts(count: int, seed: int = 7) -> list[str]:
    """What the tokenizer learns from: lessons and stories, no digits."""
    texts, source = [], lesson_stream(seed)
    for _ in range(count):
        for message in next(source).messages:
            header = (message.role, message.channel,
                      f" to={message.recipient or ''}", " json")
            for text in (message.content, *filter(None, header)):
                texts += [part for part in BREAK.split(text) if part]
    told = story_stream(seed)
    texts += [part for _ in range(count // 4)
              for part in BREAK.split(next(told))]
    return texts + [word for word in QUOTED for _ in range(count // 4)]

# %%
vocabulary = Tokenizer(train_tokenizer(sample_texts(800), 1024))
for text in ("347+285: ones 7+5=12", "Zorali lives in Bomak.",
             '{"city":"Bomak"}'):
    print([vocabulary.decode([t]) for t in vocabulary.encode(text)])
rng = random.Random(0)
for name in (made_up(rng) for _ in range(100)):
    alone = vocabulary.encode(name)
    assert vocabulary.encode(f" {name}")[-len(alone):] == alone

# %% [markdown]
# ### What is a row, and what counts in it?
#
# A row is a whole conversation, a plain story, a drill or a table. A drill is
# tokens without any sense, in pieces that come again and again, of which each
# repetition counts; a table is columns of digits, of which the answers count.
# In a conversation what the model itself has to write counts fully:
# everything after the `<|start|>assistant` with which the prompt ends. The
# rest, which it only reads, counts a fifth.
#
# Its own *earlier* messages need care. Their analysis has been dropped, so
# each of them goes straight from `<|start|>assistant` to the final channel
# and ends in `<|end|>`: just what the model must not do now. Where these
# tokens count, a model soon answers greetings without thinking,
# ends with `<|end|>` and goes on to write the user's next question itself. So
# headers and stops of old messages count nothing, and neither does the text
# of an old sum: learning to say 632 without the working is what the analysis
# exists to avoid.

# %% tags=["export"]
from collections.abc import Iterator

import torch
from torch import Tensor

from gptoss.text.harmony import render_message


Row = tuple[list[int], list[float]]
READ = 0.2  # weight of a token that the model only reads


def lesson_row(tokenizer: Tokenizer, lesson: Lesson) -> Row:
    """Token ids of a lesson, and the weight of each in the loss."""
    ids, weights = [], []
    last, body = len(lesson.messages) - 1, tokenizer.special["<|message|>"]
    lead = 1 + len(tokenizer.encode("assistant"))   # <|start|>assistant
    for n, message in enumerate(lesson.messages):
        stop = "<|return|>" if n == last else "<|end|>"
        part = render_message(tokenizer, message, stop)
        begin, end = 0, len(part)
        if message.role == "assistant":
            if n < lesson.turn:     # of an old one, the text alone
                begin, end = part.index(body) + 1, end - 1
            elif lesson.messages[n - 1].role != "assistant":
                begin = lead        # the prompt gives it
        weight = READ if n < lesson.turn or message.role != "assistant" else 1
        weight = 0 if n in lesson.muted else weight
        ids += part
        weights += [weight if begin <= at < end else 0
                    for at in range(len(part))]
    return ids, weights


def story_row(tokenizer: Tokenizer, text: str) -> Row:
    """A plain story, ended by <|endoftext|>; every token counts."""
    ids = [*tokenizer.encode(text), tokenizer.special["<|endoftext|>"]]
    return ids, [1.0] * len(ids)


def drill_row(tokenizer: Tokenizer, rng: random.Random) -> Row:
    """Tokens without any sense, in pieces that come again and again."""
    top = min(tokenizer.special.values())
    pieces = [[rng.randrange(top) for _ in range(rng.randrange(2, 9))]
              for _ in range(rng.randrange(2, 9))]
    ids: list[int] = []
    weights: list[float] = []
    seen: set[int] = set()
    while len(ids) < rng.choice((80, 160, 240, 320)):
        at = rng.randrange(len(pieces))
        ids += pieces[at]
        weights += [0.0] + [float(at in seen)] * (len(pieces[at]) - 1)
        seen.add(at)
    return ids, weights


def table_row(tokenizer: Tokenizer, rng: random.Random) -> Row:
    """Columns without their sums, one after the other; answers count."""
    ids, weights = [], []
    for _ in range(rng.randrange(12, 36)):
        asked, answer, _ = column(rng.randrange(10), rng.randrange(10),
                                  rng.randrange(2), rng.choice("+-"))
        for text, weight in ((f" {asked}", 0.0), (answer, 1.0)):
            part = tokenizer.encode(text)
            ids += part
            weights += [weight] * len(part)
    return ids, weights


def twin_row(tokenizer: Tokenizer, rng: random.Random) -> Row:
    """Words as text has them, with a space before, and as JSON has them, in
    quotes; these count."""
    ids, weights = [], []
    for _ in range(rng.randrange(12, 36)):
        word = rng.choice(QUOTED)
        for text, weight in ((f" {word}", 0.0), (':"', 0.0), (word, 1.0),
                             ('"', 0.0)):
            part = tokenizer.encode(text)
            ids += part
            weights += [weight] * len(part)
    return ids, weights


def rows(tokenizer: Tokenizer, seed: int, easy: int = 0,
         mix: dict[str, int] | None = None, table: float = 0.0
         ) -> Iterator[Row]:
    """Endless rows. Of the first `easy`, a third are plain stories and
    drills and none is longer than 320 tokens; later one in twelve, and
    up to 1900. `mix`: of the lessons, as for `lesson_stream`; `table`: share
    of rows that are digits alone. LeakError if a lesson or a story holds
    what is kept for the exam."""
    rng, made = random.Random(seed), 0
    lessons = map(without_leaks, lesson_stream(seed, mix=mix))
    stories = map(story_without_leaks, story_stream(seed))
    while True:
        (plain, drill), longest = (((0.2, 0.12), 320) if made < easy
                                   else ((0.05, 0.03), 1900))
        luck = rng.random()
        row = (story_row(tokenizer, next(stories)) if luck < plain
               else drill_row(tokenizer, rng) if luck < plain + drill
               else twin_row(tokenizer, rng) if luck < plain + drill + 0.02
               else table_row(tokenizer, rng) if luck > 1 - table
               else lesson_row(tokenizer, next(lessons)))
        if len(row[0]) <= longest:
            made += 1
            yield row

# %%
shown = next(lesson_stream(11, mix={"tool": 1}))
ids, weights = lesson_row(vocabulary, shown)
own = [t for t, weight in zip(ids, weights, strict=True) if weight == 1]
print(len(ids), "tokens, of these", len(own), "to be written:")
print(vocabulary.decode(own))
print("a table:", vocabulary.decode(table_row(
    vocabulary, random.Random(0))[0][:40]))

# %% [markdown]
# ### How do rows of unequal length share a batch?
#
# Rows of like length go into a batch together, so that little of it is
# padding: 400 rows are sorted and cut into batches of at most so many tokens,
# and the batches are shuffled.

# %% tags=["export"]
def padded(group: list[Row]) -> tuple[Tensor, Tensor]:
    """Tokens (B, T) int64 and weights (B, T), zero beyond each row."""
    shape = len(group), max(len(ids) for ids, _ in group)
    tokens, weights = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape)
    for row, (ids, weight) in enumerate(group):
        tokens[row, :len(ids)] = torch.tensor(ids)
        weights[row, :len(ids)] = torch.tensor(weight)
    return tokens, weights


def batches(source: Iterator[Row], seed: int, size: int, pool: int = 400
            ) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (tokens, weights) of at most `size` tokens with padding."""
    rng = random.Random(seed)
    while True:
        some = sorted((next(source) for _ in range(pool)),
                      key=lambda row: len(row[0]))
        groups: list[list[Row]] = [[]]
        for row in some:
            if groups[-1] and (len(groups[-1]) + 1) * len(row[0]) > size:
                groups.append([])
            groups[-1].append(row)
        rng.shuffle(groups)
        yield from map(padded, groups)

# %%
source = batches(rows(vocabulary, seed=0), seed=0, size=2500)
some = [next(source) for _ in range(50)]
filled = sum((weights > 0).sum() for _, weights in some)
print(f"{filled / sum(t.numel() for t, _ in some):.2f} of a batch is text")

# %% [markdown]
# ## It holds
#
# A row is the conversation as it is rendered, token by token, and what counts
# fully in it is what the model writes: its answer, to the stop.

# %%
from gptoss.text.harmony import render_training

counted = 0
for lesson in itertools.islice(lesson_stream(2), 200):
    ids, weights = lesson_row(vocabulary, lesson)
    assert ids == render_training(vocabulary, lesson.messages, drop="none")
    own = [t for t, weight in zip(ids, weights, strict=True) if weight == 1]
    assert vocabulary.decode(own).endswith(
        f"<|message|>{lesson.messages[-1].content}<|return|>")
    counted += len(own) / len(ids) / 200
print(f"{counted:.0%} of a conversation is the model's to write")

# %% [markdown]
# ## Takeaways
#
# - Each token has a weight: 1 for what the model has to write, a fifth for
#   what it only reads, nothing for what it must not learn to do.
# - Old messages have lost their analysis; their headers and stops, and the
#   text of old sums, would teach the wrong thing.
# - A tokenizer can make copying easy or hard: a name should be the same tokens
#   wherever it stands.
#
# ## Exercises
#
# ### Exercise 1
#
# What would an untrained model pay for a batch if padding were counted? Show
# that the weight of a padded place is zero, whatever stands there.

# %% tags=["hide-cell"]
group = [([1, 2, 3], [0.0, 1.0, 1.0]), ([4], [1.0])]
tokens, weights = padded(group)
print(tokens.tolist(), weights.tolist())
assert weights[1, 1:].sum() == 0 and tokens.shape == (2, 3)

# %% [markdown]
# ### Exercise 2
#
# How much longer would a story be if the texts that the tokenizer learns from
# were broken before every word, not only before names?

# %% tags=["hide-cell"]
EVERY = re.compile(r"\d+| (?=\w)|\.(?=[a-z])")
told = list(itertools.islice(story_stream(7), 400))
found = []
for where in (BREAK, EVERY):
    parts = [part for text in told for part in where.split(text) if part]
    small = Tokenizer(train_tokenizer(parts, 1024))
    found.append(sum(len(small.encode(text)) for text in told[:40]))
print(f"{found[1] / found[0] - 1:.0%} longer")
assert found[1] > found[0]

# %% [markdown]
# ### Exercise 3
#
# What is read counts a fifth of what is written, but there is more of it. Of
# all the weight in the loss, how much falls on the model's own tokens?

# %% tags=["hide-cell"]
written = total = 0.0
for lesson in itertools.islice(lesson_stream(3), 200):
    _, weights = lesson_row(vocabulary, lesson)
    written += sum(weight for weight in weights if weight == 1)
    total += sum(weights)
print(f"{written / total:.0%} of the weight")
assert written > total / 2

# %% [markdown]
# ## Sources
#
# - Byte-level BPE: {cite}`bpe2016`; the layout of the tokenizer's file and
#   harmony: {cite}`gptoss2025`.
