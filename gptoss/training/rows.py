"""How does a conversation become a row to learn from?

Generated from book/training/rows.py; edit the chapter, not this file.
"""

import random
import re
from collections.abc import Iterator

import torch
from torch import Tensor

from gptoss.text.harmony import render_message
from gptoss.text.tokenizer import Tokenizer
from gptoss.text.vocabulary import (
    ALPHABET,
    NAMED,
    PATTERN,
    RANKS,
    tokenizer_json,
)
from gptoss.training.conversations import lesson_stream
from gptoss.training.leaks import story_without_leaks, without_leaks
from gptoss.training.lessons import Lesson, column
from gptoss.training.stories import WORDS, story_stream

# --- Which tokens does so small a model need? --------------------------------

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


# --- What is a row, and what counts in it? -----------------------------------

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


# --- How do rows of unequal length share a batch? ----------------------------

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


__all__ = [
    "BREAK",
    "CONTROL",
    "QUOTED",
    "READ",
    "Row",
    "batches",
    "control_ids",
    "drill_row",
    "lesson_row",
    "padded",
    "rows",
    "sample_texts",
    "story_row",
    "table_row",
    "train_ranks",
    "train_tokenizer",
    "twin_row",
]
