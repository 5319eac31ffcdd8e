"""A gpt-oss you can train over lunch

Generated from book/14_train.py; edit the chapter, not this file.
"""

import json
import math
import random
import re
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gptoss import mxfp4
from gptoss.checkpoint import write_checkpoint
from gptoss.config import GptOssConfig
from gptoss.generate import Sampler, generate_batch
from gptoss.harmony import (
    ALPHABET,
    NAMED,
    PATTERN,
    RANKS,
    Tokenizer,
    tokenizer_json,
)
from gptoss.model import GptOss
from gptoss.routing import expert_load, top_logits

# --- The words of a small world ----------------------------------------------

GIRLS = ("Mira", "Lily", "Nora", "Anna", "Ruby", "Zoe", "Ella", "Maya",
         "Tess", "Wren")
BOYS = ("Tom", "Max", "Leo", "Sam", "Finn", "Hugo", "Otto", "Ben", "Jack",
        "Milo")
WORDS = {
    "hero": GIRLS + BOYS,
    "friend": ("Pip", "Bruno", "Daisy", "Oscar", "Hazel", "Toby", "Clara",
               "Felix", "Ivy", "Rufus", "Nina", "Walter"),
    "kind": ("fox", "rabbit", "mouse", "cat", "duck", "hedgehog", "kitten",
             "lamb"),
    "fkind": ("bear", "goose", "dog", "frog", "squirrel", "mole", "badger",
              "horse"),
    "colour": ("red", "blue", "green", "yellow", "white", "black", "purple",
               "pink", "brown", "silver", "golden", "grey"),
    "thing": ("kite", "ball", "hat", "boat", "drum", "lamp", "scarf",
              "book", "bell", "shell", "cup", "basket", "key", "box",
              "flute", "button"),
    "home": ("the forest", "the small house", "the hollow tree", "the valley",
             "the quiet village", "the cave", "the old barn",
             "the garden", "the tower", "the cottage"),
    "place": ("the river", "the lake", "the beach", "the market",
              "the meadow", "the bridge", "the hill", "the park",
              "the mill", "the pond", "the harbour", "the orchard"),
    # words that may differ from one sentence to the next
    "_day": ("morning", "day", "afternoon", "evening"),
    "_spot": ("bench", "bush", "stone", "wall", "log", "gate", "fence",
              "wagon", "oak", "stairs"),
    "_size": ("little", "small", "young", "tiny"),
    "_loud": ("said", "cried", "called", "whispered"),
}
CAST_SLOTS = tuple(slot for slot in WORDS if not slot.startswith("_"))
PRONOUNS = {name: ("she", "her") for name in GIRLS}
PRONOUNS |= {name: ("he", "his") for name in BOYS}


# --- A plot is a list of beats -----------------------------------------------

BEATS = (
    ("opening", (
        "Once upon a time there was a {_size} {kind} named {hero}.",
        "Once upon a time, a {_size} {kind} called {hero} woke up early.",
        "Once upon a time there lived a {_size} {kind} by the name of "
        "{hero}.",
        "There once was a {_size} {kind} whose name was {hero}.",
        "This is the story of {hero}, a {_size} {kind}.",
        "Long ago there was a {_size} {kind} named {hero}.")),
    ("home", (
        "{hero} lived in {home}.",
        "{She} lived in {home} with {her} mother.",
        "{Her} home was {home}.",
        "{hero} and {her} family lived in {home}.",
        "It was warm in {home}, where {hero} lived.")),
    ("love", (
        "More than anything, {she} loved {her} {colour} {thing}.",
        "{hero} had a {colour} {thing} and took it everywhere.",
        "For {her} birthday {she} got a {colour} {thing}.",
        "{Her} father gave {hero} a {colour} {thing}.",
        "The best thing {she} had was a {colour} {thing}.")),
    ("journey", (
        "One {_day} {she} went to {place} with the {thing}.",
        "One {_day} {hero} took the {colour} {thing} to {place}.",
        "\"Let us go to {place},\" {she} {_loud} one {_day}.",
        "The next {_day} {hero} walked all the way to {place}.",
        "One {_day} the sun was shining, and {hero} ran to {place}.")),
    ("play", (
        "",
        "There {she} played with the {thing} until {she} was tired.",
        "{hero} the {kind} sang a song and danced with the {thing}.",
        "What a lovely {_day} it was at {place}!",
        "{She} showed the {thing} to the birds.")),
    ("loss", (
        "But a strong wind came, and the {colour} {thing} was gone.",
        "Then {hero} fell asleep. When {she} woke up, "
        "the {thing} was gone.",
        "{She} put the {thing} down for a moment, and then "
        "{she} could not find it.",
        "Suddenly the {kind} saw that the {colour} {thing} was missing.",
        "But on the way from {home} {she} lost the {thing}.")),
    ("sorrow", (
        "",
        "The {_size} {kind} sat down and cried.",
        "\"Oh no!\" {_loud} {hero}. \"Where is my {thing}?\"",
        "{She} was very sad, for there was no other {thing} like it.",
        "{hero} looked all over {place}, but it was not there.")),
    ("friend", (
        "A {fkind} named {friend} came by.",
        "Just then a {fkind} came along. It was {friend}.",
        "{friend} the {fkind} heard {whom}.",
        "Near the {_spot} {she} met a {fkind} called {friend}.",
        "Then {she} saw {friend}, a {fkind} with kind eyes.")),
    ("question", (
        "\"What is wrong, little {kind}?\" asked {friend}.",
        "\"Why are you sad, {hero}?\" asked {friend}.",
        "\"Can I help you?\" asked the {fkind}.",
        "\"What are you looking for?\" asked {friend}.")),
    ("answer", (
        "\"I came from {home} and lost my {colour} {thing},\" "
        "said {hero}.",
        "\"My {thing} is gone,\" said the {kind}. \"It is {colour}.\"",
        "{hero} told {friend} about the {colour} {thing}.",
        "\"Have you seen a {colour} {thing}?\" asked {hero}.")),
    ("offer", (
        "\"Do not worry,\" said {friend}. \"I will help you.\"",
        "\"Let us look for it at {place} together,\" said {friend}.",
        "{friend} thought for a while. \"I know what to do,\" "
        "said the {fkind}.",
        "\"We will find it, {hero},\" said the {fkind}.")),
    ("search", (
        "So the {kind} and the {fkind} looked under a {_spot} at {place}.",
        "They searched all around {place}.",
        "{friend} looked on one side of {place}, and {hero} on "
        "the other.",
        "The {kind} and the {fkind} asked everybody at {place}.")),
    ("finding", (
        "At last the {fkind} saw something {colour} at {place}. "
        "It was the {thing}!",
        "And there, behind the {_spot}, was the {colour} {thing}!",
        "Then the {kind} shouted, \"Here is my {thing}!\" It was under "
        "the {_spot}.",
        "In the end {friend} found the {colour} {thing} near the "
        "{_spot} at {place}.")),
    ("thanks", (
        "\"Thank you, {friend}!\" said {hero}, and the {fkind} smiled.",
        "{hero} hugged {friend} and thanked the {fkind}.",
        "\"You are a good friend,\" said {hero} to the {fkind}.",
        "\"Thank you, {friend},\" said the {kind} to the {fkind}.")),
    ("return", (
        "That {_day} the {kind} carried the {colour} {thing} from {place} "
        "back to {home}.",
        "{hero} left {place} and took the {thing} home to {home}.",
        "Then they went to {home} and played with the {colour} {thing}.",
        "Soon the {kind} was back in {home} with the {colour} {thing}.")),
    ("ending", (
        "From that day on, {hero} and {friend} were best friends.",
        "{hero} the {kind} never lost the {thing} again.",
        "And {hero} and {friend} lived happily ever after.",
        "The {kind} and the {fkind} were friends for ever.",
        "That night {hero} dreamed of {friend} and the {colour} {thing}.")),
)


# --- Telling -----------------------------------------------------------------

def draw_cast(rng: random.Random) -> dict[str, str]:
    """Draw who and what a story is about: one word for each fixed slot.

    Hero and friend differ, and so do their kinds: their lists have no word
    in common.
    """
    return {slot: rng.choice(WORDS[slot]) for slot in CAST_SLOTS}


def with_pronouns(cast: dict[str, str]) -> dict[str, str]:
    """Add the slots that follow from the hero: she, her, She, Her …"""
    she, her = PRONOUNS[cast["hero"]]
    whom = "her" if she == "she" else "him"
    return cast | {"she": she, "her": her, "She": she.title(),
                   "Her": her.title(), "whom": whom}


def held_out(cast: dict[str, str]) -> bool:
    """Whether a cast is kept from training: one in ten, by a checksum of
    hero, colour and thing, so that the pair was never seen together."""
    key = f"{cast['hero']} {cast['colour']} {cast['thing']}"
    return zlib.crc32(key.encode()) % 10 == 0


SLOT = re.compile(r"\{(\w+)\}")


def tell(rng: random.Random, cast: dict[str, str] | None = None,
         beats: int | None = None) -> str:
    """Tell a story (or its first `beats` beats) about `cast`."""
    words = with_pronouns(cast or draw_cast(rng))

    def fill(match: re.Match) -> str:
        slot = match[1]
        return words[slot] if slot in words else rng.choice(WORDS[slot])

    told = (SLOT.sub(fill, rng.choice(lines)) for _, lines in BEATS[:beats])
    return " ".join(line for line in told if line)


def story_entropy() -> float:
    """Nats of choice in one story of `tell`: the floor of any loss.

    Equation (train-floor).
    """
    size = {slot: len(words) for slot, words in WORDS.items()}
    nats = sum(math.log(size[slot]) for slot in CAST_SLOTS)
    for _, lines in BEATS:
        free = [slot for line in lines for slot in SLOT.findall(line)
                if slot.startswith("_")]
        nats += math.log(len(lines))
        nats += sum(math.log(size[slot]) for slot in free) / len(lines)
    return nats


# --- Reading: the checker is the generator run backwards ---------------------

def line_pattern(line: str, cast: dict[str, str]) -> re.Pattern:
    """The regular expression of a template under what is known so far.

    A fixed slot that `cast` knows is that word and no other; one that it
    doesn't know is a named group; a free slot is any of its words.
    """
    known = with_pronouns(cast) if "hero" in cast else cast
    seen, parts, end = set(), [], 0
    for match in SLOT.finditer(line):
        slot = match[1]
        parts.append(re.escape(line[end:match.start()]))
        end = match.end()
        if slot in known:
            parts.append(re.escape(known[slot]))
        elif slot in seen:
            parts.append(f"(?P={slot})")
        elif slot in WORDS and not slot.startswith("_"):
            parts.append(f"(?P<{slot}>{'|'.join(WORDS[slot])})")
            seen.add(slot)
        else:
            parts.append(f"(?:{'|'.join(WORDS[slot])})")
    return re.compile("".join(parts) + re.escape(line[end:]))


@dataclass
class Reading:
    """What `read_story` found.

    Attributes:
        coherent: the whole text is one story with one cast.
        cast: the words bound so far.
        beat: name of the first beat that could not be read ("" if none).
        rest: the text from there on, at most 60 characters of it.
    """

    coherent: bool = False
    cast: dict[str, str] = field(default_factory=dict)
    beat: str = ""
    rest: str = ""


def read_story(text: str) -> Reading:
    """Read a story against the plot; never fails, reports how far it got.

    A text is coherent if and only if `tell` could have told it: every
    beat in order, and hero, kind, friend, colour, thing, home and place
    the same wherever they are mentioned.
    """
    text, furthest = text.strip(), [0, Reading(beat="opening", rest=text)]

    def follow(at: int, beat: int, cast: dict[str, str]) -> Reading | None:
        if beat == len(BEATS):
            return Reading(True, cast) if at >= len(text) else None
        name, lines = BEATS[beat]
        if at >= furthest[0]:
            rest = text[at:at + 60]
            furthest[:] = [at, Reading(False, cast, name, rest)]
        for line in lines:
            found = line_pattern(line, cast).match(text, at)
            if not found:
                continue
            bound = cast | found.groupdict()
            step = found.end() + (text[found.end():found.end() + 1] == " ")
            done = follow(step if line else at, beat + 1, bound)
            if done:
                return done
        return None

    return follow(0, 0, {}) or furthest[1]


# --- A tokenizer of a thousand tokens ----------------------------------------

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


# --- Rows of stories ---------------------------------------------------------

NOTHING = -100  # what cross_entropy ignores


def stories(seed: int, hold_out: bool = False) -> Iterator[str]:
    """Endless stories; of held-out casts only, or of all the others."""
    rng = random.Random(seed)
    while True:
        cast = draw_cast(rng)
        if held_out(cast) == hold_out:
            yield tell(rng, cast)


def story_rows(tokenizer: Tokenizer, seed: int, batch: int,
               length: int) -> Iterator[Tensor]:
    """Endless (batch, length + 1) int64 rows of whole stories end to end.

    Each row starts with the first word of a story and each story ends
    with <|endoftext|>; what is left of a row is `NOTHING`.
    """
    source, end = stories(seed), tokenizer.special["<|endoftext|>"]
    story = [*tokenizer.encode(next(source)), end]
    while True:
        rows = torch.full((batch, length + 1), NOTHING)
        for row in rows:
            at = 0
            while at + len(story) <= length + 1:
                row[at:at + len(story)] = torch.tensor(story)
                at += len(story)
                story = [*tokenizer.encode(next(source)), end]
        yield rows


# --- The loss: the next token, and a fair share for every expert -------------

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

def pocket_config(vocab_size: int = 1024) -> GptOssConfig:
    """The shipped model: every feature of the 20b, a ten-thousandth of it."""
    special = control_ids(vocab_size)
    return GptOssConfig(
        num_hidden_layers=4, num_local_experts=8, num_experts_per_tok=2,
        vocab_size=vocab_size, hidden_size=128, intermediate_size=128,
        head_dim=32, num_attention_heads=8, num_key_value_heads=2,
        sliding_window=64, initial_context_length=256, rope_factor=8.0,
        max_position_embeddings=2048,
        eos_token_id=special["return"], pad_token_id=special["endoftext"])


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run; the same recipe and seed on
    the same machine give the same file."""

    seed: int = 0
    steps: int = 2600
    batch: int = 8
    length: int = 224
    learning_rate: float = 3e-3
    warmup: int = 60
    weight_decay: float = 0.05
    balance: float = 0.01
    grid_from: float = 0.7
    clip: float = 1.0

    def rate(self, step: int) -> float:
        """Linear warm-up, then a cosine down to a hundredth."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        floor = 0.01
        cosine = (1 + math.cos(math.pi * done)) / 2
        return self.learning_rate * (floor + (1 - floor) * cosine)


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


def optimizer_for(model: GptOss, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; biases, sinks and norms are not decayed towards zero."""
    vectors = ("bias", "sinks", "norm.weight")
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        (free if name.endswith(vectors) else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay},
              {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate,
                             betas=(0.9, 0.95))


def next_token_loss(model: GptOss, rows: Tensor) -> Tensor:
    """Mean cross-entropy in nats of rows (B, T + 1): each token but the
    first is predicted from those before it, and `NOTHING` never is."""
    logits = model(rows[:, :-1].clamp_min(0))
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def train(model: GptOss, rows: Iterator[Tensor], recipe: Recipe,
          report: Callable[[dict], None] = lambda entry: None) -> None:
    """Train in place; `report` gets one dict per step (loss in nats)."""
    optimizer, tap = optimizer_for(model, recipe), RouterTap(model)
    k, begin = model.config.num_experts_per_tok, time.perf_counter()
    for step in range(recipe.steps):
        row, extra = next(rows), {}
        if step == int(recipe.grid_from * recipe.steps):
            with torch.no_grad():
                extra = {"unrounded": next_token_loss(model, row).item()}
            put_on_grid(model)
            tap.take()
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        loss = next_token_loss(model, row)
        routed = [load_balance(each, k) for each in tap.take()]
        balance = torch.stack(routed).mean()
        (loss + recipe.balance * balance).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        report({"step": step, "loss": loss.item(),
                "balance": balance.item(), "norm": norm.item(),
                "seconds": time.perf_counter() - begin} | extra)
    tap.close()


# --- From parameters to a file -----------------------------------------------

def released_tensors(model: GptOss) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors as the released layout stores them: experts in
    MXFP4 blocks and scales, everything else in bf16."""
    outside = ("lm_head",)
    for name, value in plain_state(model).items():
        value = value.detach()
        name = name if name.startswith(outside) else f"model.{name}"
        if name.endswith(("gate_up_proj", "down_proj")):
            blocks, scales = mxfp4.encode(value.float())
            yield f"{name}_blocks", blocks
            yield f"{name}_scales", scales
        else:
            yield name, value.to(torch.bfloat16)


def plain_state(model: GptOss) -> dict[str, Tensor]:
    """The state dict under its own names, parametrised or not."""
    state = model.state_dict()
    return {name.replace("parametrizations.", "").replace(".original", ""):
            value for name, value in state.items()}


# --- Examination by a program ------------------------------------------------

@dataclass
class Exam:
    """Outcome of an examination: how many stories were coherent, and for
    the others the first beat that could not be read."""

    stories: int = 0
    coherent: int = 0
    failures: list[Reading] = field(default_factory=list)


@torch.inference_mode()
def examine(model: GptOss, tokenizer: Tokenizer, count: int, seed: int = 1,
            beats: int = 3, sampler: Sampler | None = None) -> Exam:
    """Let the model finish `count` stories whose cast it never saw.

    Each prompt is the first `beats` beats of a held-out story; the rest
    is the model's, greedy unless a sampler is given.
    """
    rng, exam = random.Random(seed), Exam(stories=count)
    casts = (draw_cast(rng) for _ in iter(int, 1))
    chosen = (cast for cast in casts if held_out(cast))
    openings = [tell(rng, next(chosen), beats) for _ in range(count)]
    stop = (tokenizer.special["<|endoftext|>"],)
    prompts = [tokenizer.encode(text) for text in openings]
    answers = generate_batch(
        model, prompts, max_new_tokens=400, stop=stop, seed=seed,
        sampler=sampler or Sampler(temperature=0.0))
    for prompt, answer in zip(prompts, answers, strict=True):
        story = [token for token in prompt + answer if token not in stop]
        reading = read_story(tokenizer.decode(story))
        exam.coherent += reading.coherent
        exam.failures += [] if reading.coherent else [reading]
    return exam


# --- One command -------------------------------------------------------------

def make_pocket(out: Path, recipe: Recipe,
                report: Callable[[dict], None] = lambda entry: None) -> None:
    """Train the shipped checkpoint and write it to the new folder `out`.

    Writes model.safetensors, config.json, generation_config.json,
    tokenizer.json and train_log.json (one entry per step).
    """
    source, log = stories(recipe.seed + 1), []
    texts = [next(source) for _ in range(2000)]
    config = pocket_config()
    vocabulary = train_tokenizer(texts, config.vocab_size)
    tokenizer = Tokenizer(vocabulary)
    model = GptOss(config, dtype=torch.float32, packed=False)
    start_at_random(model, recipe.seed)
    rows = story_rows(tokenizer, recipe.seed, recipe.batch, recipe.length)
    train(model, rows, recipe, lambda e: (log.append(e), report(e)))
    write_checkpoint(out, config, released_tensors(model))
    (out / "tokenizer.json").write_text(vocabulary, "utf-8")
    write_json(out / "generation_config.json", generation_config(config), 2)
    tokens = sum(len(tokenizer.encode(text)) + 1 for text in texts)
    write_json(out / "train_log.json", {
        "recipe": vars(recipe), "log": thinned(log),
        "floor": round(story_entropy() / (tokens / len(texts)), 4)})


def generation_config(config: GptOssConfig) -> dict:
    """What generation_config.json says of a released model."""
    special = control_ids(config.vocab_size)
    stop = ("return", "endoftext", "call")
    return {"bos_token_id": special["startoftext"], "do_sample": True,
            "eos_token_id": [special[name] for name in stop],
            "pad_token_id": special["endoftext"]}


def thinned(log: list[dict], every: int = 4) -> list[dict]:
    """Each fourth entry, the switch to the grid and the last; 4 digits."""
    kept = [entry for n, entry in enumerate(log)
            if n % every == 0 or "unrounded" in entry or n == len(log) - 1]
    return [{key: round(value, 4) for key, value in entry.items()}
            for entry in kept]


def write_json(path: Path, value: object, indent: int | None = None
               ) -> None:
    path.write_text(json.dumps(value, indent=indent) + "\n")


__all__ = [
    "BEATS",
    "BOYS",
    "CAST_SLOTS",
    "CONTROL",
    "Exam",
    "GIRLS",
    "NOTHING",
    "OnGrid",
    "PRONOUNS",
    "Reading",
    "Recipe",
    "RouterTap",
    "SLOT",
    "WORDS",
    "control_ids",
    "draw_cast",
    "examine",
    "generation_config",
    "held_out",
    "line_pattern",
    "load_balance",
    "make_pocket",
    "next_token_loss",
    "optimizer_for",
    "plain_state",
    "pocket_config",
    "put_on_grid",
    "read_story",
    "released_tensors",
    "start_at_random",
    "stories",
    "story_entropy",
    "story_rows",
    "tell",
    "thinned",
    "train",
    "train_ranks",
    "train_tokenizer",
    "with_pronouns",
    "write_json",
]
