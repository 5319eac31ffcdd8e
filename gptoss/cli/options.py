"""What does a program owe to somebody who mistypes?

Generated from book/cli/mistakes.py; edit the chapter, not this file.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gptoss
from gptoss.cli.mistakes import UsageError, agreed, torchrun_number
from gptoss.parallel.launch import launched

# --- What the options mean ---------------------------------------------------

if TYPE_CHECKING:
    import torch

    from gptoss.model.transformer import GptOss
    from gptoss.text.sampling import SamplingOptions
    from gptoss.text.tokenizer import Tokenizer

POCKET = Path(gptoss.__file__).parent / "pocket"
FIRST_WORDS = "Once upon a time"


class Option:
    """One argument of a command: its name, and `how` it is read, which is
    what argparse's `add_argument` takes."""

    def __init__(self, name: str, **how: Any) -> None:
        self.name, self.how = name, how


MODEL = Option("--model", default=str(POCKET), metavar="PATH_OR_ID",
               help="folder or hub id (default: the one shipped)")
PATH = Option("path", metavar="PATH_OR_ID", nargs="?", default=str(POCKET),
              help="folder or hub id (default: the one shipped)")
JSON = Option("--json", action="store_true", help="one JSON object")
STAGES = Option("--stages", type=int, default=1, metavar="N",
                help="with torchrun: split the layers into N stages, and "
                "each among the rest (default: 1)")
DENSE = (
    Option("--dense", type=int, choices=(16, 12, 8), default=16,
           help="bits of the dense matrices, on a CPU: 16 as stored (default),"
           " 12 a copy without loss to decode faster, 8 rounded"),
    Option("--compact", action="store_const", dest="dense", const=12,
           default=16, help="the same as --dense 12"))
ACTIVATIONS = Option(
    "--activations", type=int, choices=(16, 8), default=16,
    help="bits of what enters the experts, on a CPU: 16 (default), 8 rounded,"
    " to read prompts faster")
RUNNING = (*DENSE, ACTIVATIONS, STAGES)
SAMPLING = (
    Option("--temperature", type=float, default=1.0, metavar="X",
           help="0 is greedy (default: 1)"),
    Option("--top-p", type=float, default=1.0, metavar="X"),
    Option("--top-k", type=int, default=0, metavar="N"),
    Option("--seed", type=int, metavar="N"),
    Option("--dtype", default="bfloat16", choices=(
        "bfloat16", "float16", "float32"), help="default: bfloat16"),
    Option("--device", default="cpu", help="cpu (default), cuda, ..."),
    Option("--draft", metavar="lookup|PATH_OR_ID", help="guess tokens and "
           "check several at once: look them up in the text, or ask a small "
           "model of the same vocabulary"),
)


def torch_dtype(name: str) -> "torch.dtype":
    import torch

    found: torch.dtype = getattr(torch, name)
    return found


def sampling(args: argparse.Namespace) -> "SamplingOptions":
    """The options of sampling that a command was given."""
    from gptoss.text.sampling import SamplingOptions

    return SamplingOptions(
        temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
        seed=args.seed, max_new_tokens=args.max_new_tokens)


def torch_device(name: str) -> "torch.device":
    """The torch device `name`, after a byte was put on it."""
    import torch

    try:
        device = torch.device(name)
        if device.type == "cuda" and launched() > 1:  # each its own
            own = torchrun_number("LOCAL_RANK", launched())
            device = torch.device("cuda", own)
        if device.type == "meta":
            raise RuntimeError("holds no numbers")
        torch.empty(1, dtype=torch.uint8, device=device)
        return device
    except UsageError:
        raise
    except Exception as error:  # a backend may raise anything, ImportError too
        why = (str(error).splitlines() or ["not available"])[0]
        raise UsageError(f"--device {name}: {why}") from error


def read_prompt(args: argparse.Namespace) -> str:
    """--prompt, or what stdin holds, or a beginning for the model that is
    shipped."""
    if args.prompt is None:
        if args.model != str(POCKET):
            raise UsageError("--prompt: needed with --model")
        return FIRST_WORDS
    text: str = agreed(args, _stdin) if args.prompt == "-" else args.prompt
    return text


def _stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"--prompt -: stdin is not UTF-8 ({error.reason} "
                         f"at byte {error.start})") from error


def load_model(args: argparse.Namespace, folder: Path,
               device: "torch.device | str" = "cpu") -> "GptOss":
    """The model in a folder, or this process's part of it; the kernels
    after it, for the first time they are compiled."""
    from gptoss.kernels.build import load_kernels
    from gptoss.kernels.coarse import hold_activations
    from gptoss.kernels.eight import hold_dense
    from gptoss.model.transformer import GptOss

    dtype = torch_dtype(getattr(args, "dtype", "bfloat16"))
    alone = launched() == args.stages == 1
    activations = getattr(args, "activations", 16)
    if (args.dense, activations) != (16, 16) and (
            not alone or (str(device), str(dtype))
            != ("cpu", "torch.bfloat16")):
        raise UsageError("--dense and --compact: for one process, --device "
                         "cpu and --dtype bfloat16; --activations, too")
    if alone:
        model = GptOss.from_pretrained(folder, dtype=dtype, device=device)
    else:
        from gptoss.parallel.split import load_split

        model = load_split(folder, dtype, device, stages=args.stages)
    if args.dense != 16:
        hold_dense(model, args.dense)
    if activations != 16:
        hold_activations(model, activations)
    load_kernels()
    return model


def load_pair(args: argparse.Namespace) -> "tuple[GptOss, Tokenizer]":
    """Model and tokenizer, the quick one of the two first."""
    from gptoss.text.tokenizer import Tokenizer
    from gptoss.weights.checkpoint import Checkpoint
    from gptoss.weights.hub import resolve

    device, folder = torch_device(args.device), resolve(args.model)
    Checkpoint.open(folder).close()  # the headers, before anything slow
    tokenizer = Tokenizer.from_pretrained(folder)
    return load_model(args, folder, device), tokenizer


def load_draft(args: argparse.Namespace) -> "GptOss | str | None":
    """What --draft asks for; a small model on the device of the large one."""
    device = torch_device(args.device)
    if args.draft in (None, "lookup"):
        found: str | None = args.draft
        return found
    if launched() > 1:
        raise UsageError("--draft: with torchrun only lookup")
    from gptoss.model.transformer import GptOss
    from gptoss.text.tokenizer import Tokenizer
    from gptoss.weights.hub import resolve

    folder = resolve(args.draft)
    own, other = (Tokenizer.from_pretrained(path)
                  for path in (folder, resolve(args.model)))
    if own.vocab_size != other.vocab_size or any(
            own.token_bytes(n) != other.token_bytes(n)
            for n in range(own.vocab_size)):
        raise UsageError(f"--draft {args.draft}: expected the vocabulary of "
                         f"{args.model}, found another")
    return GptOss.from_pretrained(folder, torch_dtype(args.dtype), device)


__all__ = [
    "ACTIVATIONS",
    "DENSE",
    "FIRST_WORDS",
    "JSON",
    "MODEL",
    "Option",
    "PATH",
    "POCKET",
    "RUNNING",
    "SAMPLING",
    "STAGES",
    "load_draft",
    "load_model",
    "load_pair",
    "read_prompt",
    "sampling",
    "torch_device",
    "torch_dtype",
]
