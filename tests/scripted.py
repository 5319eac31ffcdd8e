"""A small random model whose choices are scripted, for tests of a chat.

It computes and fills its cache like any other, and then writes what the test
wants.
"""

import dataclasses

import torch

from gptoss.chat.chat import Chat
from gptoss.model.transformer import GptOss
from gptoss.text.tokenizer import Tokenizer
from gptoss.text.vocabulary import tokenizer_json
from gptoss.weights.config import GptOssConfig

CONTROL = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>",
           "<|constrain|>", "<|return|>", "<|call|>", "<|endoftext|>")
CONFIG = GptOssConfig(
    num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2,
    vocab_size=264, hidden_size=32, intermediate_size=32, head_dim=8,
    num_attention_heads=4, num_key_value_heads=2, sliding_window=8,
    max_position_embeddings=2048, initial_context_length=128,
    eos_token_id=261, pad_token_id=263)
TOKENIZER = Tokenizer(tokenizer_json(
    {bytes([b]): b for b in range(256)},
    {256 + n: name for n, name in enumerate(CONTROL)}))


class Scripted(GptOss):
    """A random model that writes what stands in `script`, one text a round.

    The tokens that are fed are kept: `fed` counts all of them, and the
    logits `last` are those that it computed itself.
    """

    def __init__(self, *script: str, layers: int = 2) -> None:
        torch.manual_seed(0)
        super().__init__(dataclasses.replace(
            CONFIG, num_hidden_layers=layers, layer_types=None),
            torch.float32, packed=False)
        self.requires_grad_(False)
        self.script = [ids(text) for text in script]
        self.at, self.fed, self.seen = 0, 0, []

    def forward(self, tokens, cache=None, attention_mask=None,
                logits_to_keep=0):
        logits = super().forward(tokens, cache, attention_mask,
                                 logits_to_keep)
        self.fed += tokens.numel()
        self.seen.append(tokens[0].tolist())
        self.last = logits[0, -1].clone()
        if not self.script:
            return logits
        now = self.script[0]
        if self.at and self.seen[-1] == [now[self.at - 1]]:
            pass  # its own last token: go on
        else:
            self.at = 0
        choice = now[self.at]
        self.at += 1
        if self.at == len(now):
            self.script.pop(0)
            self.at = 0
        return torch.nn.functional.one_hot(
            torch.full(logits.shape[:2], choice), 264).float()


def ids(text: str) -> list[int]:
    """Tokens of `text`, control tokens by name."""
    out = []
    while text:
        name = next((c for c in CONTROL if text.startswith(c)), None)
        out += ([TOKENIZER.special[name]] if name
                else TOKENIZER.encode(text[0]))
        text = text[len(name or text[0]):]
    return out


def said(final: str, analysis: str = "", stop: str = "<|return|>") -> str:
    thought = (f"<|channel|>analysis<|message|>{analysis}<|end|>"
               "<|start|>assistant" if analysis else "")
    return f"{thought}<|channel|>final<|message|>{final}{stop}"


def called(name: str, arguments: str, stop: str = "<|call|>") -> str:
    return (f"<|channel|>commentary to=functions.{name} <|constrain|>json"
            f"<|message|>{arguments}{stop}")


def chat(*script: str, **options) -> Chat:
    options = {"temperature": 0, "date": "2025-06-28"} | options
    return Chat((Scripted(*script), TOKENIZER), **options)


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def run(chat_: Chat, messages: list[dict]) -> dict[str, str]:
    """The texts of a turn by kind; several of a kind joined by |."""
    found: dict[str, str] = {}
    for event in chat_.events(messages):
        glue = "|" if event.kind in ("call", "result", "notice") else ""
        text = (f"{event.name} {event.text}"
                if event.kind in ("call", "result") else event.text)
        found[event.kind] = (found[event.kind] + glue + text
                             if event.kind in found else text)
    return found


def fresh(model: Scripted, tokens: list[int]) -> torch.Tensor:
    """Logits after `tokens`, without any cache."""
    with torch.no_grad():
        return GptOss.forward(model, torch.tensor([tokens]))[0, -1]


MODEL = Scripted(layers=4)
