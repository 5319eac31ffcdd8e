"""Who marks the examiner?

Generated from book/training/examining.py; edit the chapter, not this file.
"""

import json
from collections.abc import Callable, Iterator
from importlib.resources import files
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from gptoss.model.transformer import GptOss
from gptoss.text.tokenizer import Tokenizer
from gptoss.training.conversations import SECOND, THIRD
from gptoss.training.exams import MILESTONE, report_card
from gptoss.training.planting import plant_copying, start_at_random
from gptoss.training.rows import (
    batches,
    control_ids,
    rows,
    sample_texts,
    train_tokenizer,
)
from gptoss.training.train import Recipe, train
from gptoss.weights.config import GptOssConfig
from gptoss.weights.disk import drafted
from gptoss.weights.encoding import encode
from gptoss.weights.write import write_checkpoint

# --- The model that is shipped -----------------------------------------------

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


# --- From parameters to a file -----------------------------------------------

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


__all__ = [
    "EXAMINED",
    "MILESTONES",
    "generation_config",
    "make_pocket",
    "milestone",
    "plain_state",
    "pocket_config",
    "released_tensors",
    "schooling",
    "thinned",
    "write_json",
    "write_pocket",
]
