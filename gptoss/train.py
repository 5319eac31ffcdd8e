"""A gpt-oss you can train over lunch

Generated from book/14_train.py; edit the chapter, not this file.
"""

import json
import math
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gptoss import mxfp4
from gptoss.checkpoint import write_checkpoint
from gptoss.config import GptOssConfig
from gptoss.exams import MILESTONE, report_card
from gptoss.harmony import (
    ALPHABET,
    CHAT_TEMPLATE,
    NAMED,
    PATTERN,
    RANKS,
    Tokenizer,
    render_message,
    tokenizer_json,
)
from gptoss.layers import Attention
from gptoss.leaks import story_without_leaks, without_leaks
from gptoss.lessons import SECOND, THIRD, Lesson, column, lesson_stream
from gptoss.model import GptOss
from gptoss.rope import rope_parameters
from gptoss.routing import expert_load, top_logits
from gptoss.stories import WORDS, story_stream

# --- A tokenizer of fifteen hundred tokens -----------------------------------

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


# --- Rows, and what counts in them -------------------------------------------

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
    ids, weights, seen = [], [], set()
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


# --- The loss: the next token, and a fair share for every expert -------------

def weighted_loss(model: GptOss, tokens: Tensor, weights: Tensor
                  ) -> tuple[Tensor, Tensor]:
    """Weighted mean cross-entropy in nats, and the mean over the tokens of
    weight 1 alone. tokens, weights (B, T): each token but the first is
    predicted from those before it."""
    logits = model(tokens[:, :-1]).flatten(0, 1)
    nats = F.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    own = weights == 1
    return ((weights * nats).sum() / weights.sum(),
            (nats.detach() * own).sum() / own.sum().clamp_min(1))


def that_matter(weights: Tensor) -> Tensor:
    """(B, T) bool: places with something that counts at or behind them; the
    others are padding, or as good as that."""
    return weights.flip(-1).cummax(-1).values.flip(-1) > 0


def load_balance(logits: Tensor, k: int) -> Tensor:
    """The auxiliary loss of Switch Transformers, for K experts a token.

    Args:
        logits: (N, E) router logits of one layer.
        k: experts chosen per token.
    Returns:
        E * sum_e f_e * p_e, a scalar: f_e the share of assignments that
        expert e gets, p_e its mean probability over all E. 1 when both
        are uniform; up to E / K when K experts take everything.
    """
    experts = logits.shape[-1]
    _, ids = top_logits(logits, k)
    share = expert_load(ids, experts) / ids.numel()
    return experts * (share * logits.softmax(-1).mean(0)).sum()


class RouterTap:
    """Collects the router logits of one forward pass, layer by layer."""

    def __init__(self, model: GptOss) -> None:
        self.logits: list[Tensor] = []
        self.hooks = [layer.mlp.router.register_forward_hook(self._keep)
                      for layer in model.layers]

    def _keep(self, router: nn.Module, inputs: tuple, output: object) -> None:
        self.logits.append(F.linear(inputs[0], router.weight, router.bias))

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def take(self) -> list[Tensor]:
        taken, self.logits = self.logits, []
        return taken


# --- Where the weights start -------------------------------------------------

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


def start_at_random(model: GptOss, seed: int) -> None:
    """Draw the matrices from normal(0, 1 / columns), in place.

    A standard deviation of 0.02 suits D = 2880, since 2880**-0.5 = 0.019;
    in a narrow model it makes every layer whisper, and learning to look
    back took more than twice the steps.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and not name.endswith("bias"):
            scale = parameter.shape[-1] ** -0.5
            nn.init.normal_(parameter, std=scale, generator=generator)


PULL = (8.0, 8.0, 4.0)  # on the score, of the three fastest pairs


def rows_of(n: int, size: int) -> slice:
    """The rows of head, or of group, `n`."""
    return slice(n * size, (n + 1) * size)


def look_back(attention: Attention, config: GptOssConfig, group: int,
              head: int) -> None:
    """`head` of `group` and the next look one and two tokens back, whatever
    these are: biases alone decide, in the three fastest pairs."""
    C, n = config.head_dim, len(PULL)
    frequencies, concentration = rope_parameters(config)
    fast = frequencies[:n].float()
    size = (torch.tensor(PULL) * C ** 0.5 / concentration ** 2).sqrt()
    keys = rows_of(group, C)
    attention.k_proj.bias[keys] = 0
    for start in (0, C // 2):
        channels = slice(keys.start + start, keys.start + start + n)
        attention.k_proj.weight[channels] = 0
    attention.k_proj.bias[keys.start:keys.start + n] = size
    for offset in (1, 2):
        rows = rows_of(head + offset - 1, C)
        queries = attention.q_proj.bias[rows].zero_()
        attention.q_proj.weight[rows] = 0
        queries[:n] = size * torch.cos(fast * offset)
        queries[C // 2:C // 2 + n] = -size * torch.sin(fast * offset)


def look_for(attention: Attention, config: GptOssConfig, group: int,
             head: int, token: Tensor) -> None:
    """`head` of `group` looks for places with the present token beside
    them, in pairs slow enough to mean the same far away."""
    C, half = config.head_dim, config.hidden_size // 2
    slow = torch.tensor([n for n in range(C) if n % (C // 2) > len(PULL)])
    queries, keys = torch.zeros(C, 2 * half), attention.k_proj.weight
    queries[slow, :half] = 2.0 * token[:len(slow)]
    attention.q_proj.weight[rows_of(head, C)] = queries
    keys[group * C + slow] = 0
    beside = half + group * C + torch.arange(len(slow))
    keys[group * C + slow, beside] = 4.0


def carry(attention: Attention, group: int, head: int, token: Tensor,
          out: Tensor, start: int) -> None:
    """What `head` of `group` sees, it writes from `start` on."""
    size, half = token.shape
    values = attention.v_proj.weight[rows_of(group, size)].zero_()
    values[:, :half] = token
    written = attention.o_proj.weight[:, rows_of(head, size)].zero_()
    written[start:start + len(out)] = out


@torch.no_grad()
def plant_copying(model: GptOss, seed: int) -> None:
    """Begin with the circuit that copies, in place.

    Layer 0 writes the previous token beside each one; layers 1 and 3 look
    for the present token beside an earlier one, and say that one. The
    first half of the residual stream holds the token itself. Every other
    head and expert starts more quietly than `start_at_random` left it.
    """
    config, generator = model.config, torch.Generator().manual_seed(seed)
    C, half = config.head_dim, config.hidden_size // 2
    embedding, head = model.embed_tokens.weight, model.lm_head.weight
    words = torch.randn(len(embedding), half, generator=generator) * 0.7
    inner, outer = (torch.linalg.qr(torch.randn(
        half, half, generator=generator))[0].T for _ in range(2))
    embedding.zero_()[:, :half] = words
    head.zero_()[:, half:] = words / 0.7 / half ** 0.5 @ inner.T @ outer
    for layer in model.layers:
        layer.self_attn.o_proj.weight.mul_(0.3)
        layer.mlp.experts.down_proj.mul_(0.1)
    for group in range(config.num_key_value_heads):
        at, first = rows_of(group, C), model.layers[0].self_attn
        place = group, group * (config.num_attention_heads
                                // config.num_key_value_heads)
        look_back(first, config, *place)
        carry(first, *place, inner[at], torch.eye(C) / 2, half + at.start)
        for layer in model.layers[1:4:2]:
            look_for(layer.self_attn, config, *place, inner[at])
            carry(layer.self_attn, *place, inner[at], 1.3 * outer[at].T, half)


# --- Weights that live on the grid -------------------------------------------

class OnGrid(nn.Module):
    """Replace a weight by its MXFP4 rounding; gradients pass unchanged."""

    def forward(self, weight: Tensor) -> Tensor:
        with torch.no_grad():
            grid = mxfp4.decode(*mxfp4.encode(weight), weight.dtype)
        return weight + (grid - weight).detach()


def put_on_grid(model: GptOss) -> None:
    """From now on every expert computes with four-bit weights."""
    for layer in model.layers:
        for name in ("gate_up_proj", "down_proj"):
            parametrize.register_parametrization(
                layer.mlp.experts, name, OnGrid())


# --- The training loop -------------------------------------------------------

@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run; the same recipe and seed on
    the same machine give the same file.

    `tokens`: of a batch, with its padding. `easy`: share of the steps with
    short rows and many plain stories. `change`: share after which the mix
    of lessons is `SECOND`; `last`: after which it is `THIRD` and `table` of
    the rows are digits alone. At both the optimiser begins afresh, and the
    rate rises to the next of `rates`. `grid_from`: share after which the
    experts compute with four bits.
    """

    seed: int = 0
    steps: int = 16000
    tokens: int = 1250
    rates: tuple[float, ...] = (2e-3, 1.2e-3, 8e-4)
    warmup: int = 100
    weight_decay: float = 0.05
    balance: float = 0.01
    easy: float = 0.1079
    change: float = 15 / 32
    grid_from: float = 19 / 32
    last: float = 23 / 32
    table: float = 0.15
    clip: float = 1.0

    def at(self, share: float) -> int:
        """The step at which `share` of the run is over."""
        return round(share * self.steps)

    @property
    def begins(self) -> tuple[int, int, int]:
        """The steps at which the three stretches begin."""
        return 0, self.at(self.change), self.at(self.last)

    def rate(self, step: int) -> float:
        """Linear warm-up, then a cosine towards a hundredth, three times;
        the first is cut short by the change."""
        part = sum(step >= begin for begin in self.begins[1:])
        begin, peak = self.begins[part], self.rates[part]
        end = self.begins[2] if part < 2 else self.steps
        warmup = self.warmup // 2 if part else self.warmup
        step -= begin
        if step < warmup:
            return peak * (step + 1) / warmup
        done = (step - warmup) / max(1, end - begin - warmup)
        floor = 0.01
        cosine = (1 + math.cos(math.pi * done)) / 2
        return peak * (floor + (1 - floor) * cosine)


def optimizer_for(model: GptOss, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; biases, sinks and norms are not decayed towards zero."""
    vectors = ("bias", "sinks", "norm.weight")
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        (free if name.endswith(vectors) else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay},
              {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.rates[0],
                             betas=(0.9, 0.98))


def train(model: GptOss, source: Iterator[tuple[Tensor, Tensor]],
          recipe: Recipe,
          report: Callable[[dict], None] = lambda entry: None) -> None:
    """Train in place; `report` gets one dict per step: `loss`, the
    weighted mean, and `own`, of the tokens to be written, in nats."""
    tap = RouterTap(model)
    k, begin = model.config.num_experts_per_tok, time.perf_counter()
    for step in range(recipe.steps):
        batch, extra = next(source), {}
        if step in recipe.begins:
            optimizer = optimizer_for(model, recipe)
        if step == recipe.at(recipe.grid_from):
            with torch.no_grad():
                extra = {"unrounded": weighted_loss(model, *batch)[0].item()}
            put_on_grid(model)
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        tap.take()  # what was looked at between two steps
        loss, own = weighted_loss(model, *batch)
        real = that_matter(batch[1][:, 1:]).flatten()
        routed = [load_balance(each.flatten(0, -2)[real], k)
                  for each in tap.take()]
        balance = torch.stack(routed).mean()
        (loss + recipe.balance * balance).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        report({"step": step, "loss": loss.item(), "own": own.item(),
                "balance": balance.item(), "norm": norm.item(),
                "seconds": time.perf_counter() - begin} | extra)
    tap.close()


# --- From parameters to a file -----------------------------------------------

def released_tensors(model: GptOss) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors as the released layout stores them: experts in
    MXFP4 blocks and scales, everything else in bf16."""
    for name, value in plain_state(model).items():
        value = value.detach()
        if name.endswith(("gate_up_proj", "down_proj")):  # (E, in, out)
            blocks, scales = mxfp4.encode(value.transpose(1, 2).float())
            yield f"{name}_blocks", blocks
            yield f"{name}_scales", scales
        else:
            yield name, value.to(torch.bfloat16)


def plain_state(model: GptOss) -> dict[str, Tensor]:
    """The state dict under its own names, parametrised or not."""
    state = model.state_dict()
    return {name.replace("parametrizations.", "").replace(".original", ""):
            value for name, value in state.items()}


# --- One command -------------------------------------------------------------

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


def write_pocket(out: Path, model: GptOss, vocabulary: str, recipe: Recipe,
                 log: list[dict], marks: list[dict], count: int = 200
                 ) -> None:
    """The six files of a trained model, into the new folder `out`; the
    last examination, `count` questions of a kind, is of these files. They
    are written beside `out` and moved there when all are whole."""
    out = Path(out)
    with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as beside:
        draft = Path(beside) / out.name
        write_checkpoint(draft, model.config, released_tensors(model))
        (draft / "tokenizer.json").write_text(vocabulary, "utf-8")
        (draft / "chat_template.jinja").write_text(CHAT_TEMPLATE, "utf-8")
        write_json(draft / "generation_config.json",
                   generation_config(model.config), 2)
        written = GptOss.from_pretrained(draft, dtype=torch.float32)
        card = report_card(written, Tokenizer(vocabulary), EXAMINED, count)
        write_json(draft / "train_log.json", {
            "recipe": vars(recipe), "marks": marks, "exam": card,
            "log": thinned(log)})
        draft.rename(out)


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


__all__ = [
    "BREAK",
    "CONTROL",
    "EXAMINED",
    "MILESTONES",
    "OnGrid",
    "PULL",
    "QUOTED",
    "READ",
    "Recipe",
    "RouterTap",
    "Row",
    "batches",
    "carry",
    "control_ids",
    "drill_row",
    "generation_config",
    "lesson_row",
    "load_balance",
    "look_back",
    "look_for",
    "make_pocket",
    "milestone",
    "optimizer_for",
    "padded",
    "plain_state",
    "plant_copying",
    "pocket_config",
    "put_on_grid",
    "released_tensors",
    "rows",
    "rows_of",
    "sample_texts",
    "schooling",
    "start_at_random",
    "story_row",
    "table_row",
    "that_matter",
    "thinned",
    "train",
    "train_ranks",
    "train_tokenizer",
    "twin_row",
    "weighted_loss",
    "write_json",
    "write_pocket",
]
