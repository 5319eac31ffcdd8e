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
#     module: memory
#     public: [PrefixCache, Session, Settings]
# ---

# %% [markdown]
# # How much of a conversation must be read again?
#
# ## Question
#
# When the model has answered, how much of the conversation must it read again
# for the next question? Its old reasoning leaves the prompt, from the middle.
# Common programs then start from nothing; the 20b has to look again at what
# follows the reasoning and at no more than 1,524 tokens before it, however
# long the conversation is.
#
# ## Picture

# %% tags=["hide-input"]
# Figure: three turns as bars of tokens. In the second and third most is kept
# in the cache; only the last answer and the new question are fed anew, then
# come the analysis and the answer.
import os
from importlib.resources import files

import matplotlib.pyplot as plt
import torch

from gptoss.model.transformer import GptOss
from gptoss.text.harmony import (
    Message,
    render,
    render_training,
    system_message,
)
from gptoss.text.tokenizer import Tokenizer

plt.style.use("../_static/book.mplstyle")
torch.manual_seed(0)
POCKET = files("gptoss") / "pocket"
model = GptOss.from_pretrained(POCKET, dtype=torch.float32)
tokenizer = Tokenizer.from_pretrained(POCKET)

asked = ["Tell me a story about a fox.", "What is its name?", "Thank you!"]
thoughts = ["The user wants a story. A fox, a hill, a lost hat; three "
            "sentences will do. " * 2, "They ask for the name, Mira. " * 3,
            "Only thanks: a short answer."]
answers = ["A fox named Mira lived on a hill. One day she lost her hat. A "
           "bear had found it. ", "Its name is Mira.", "You are welcome."]
colours = {"kept in the cache": "C0", "fed anew": "C1",
           "analysis, dropped next turn": "0.75", "answer": "C2"}


def model_writes(said: list[Message]) -> list[int]:
    """What the model adds to a prompt: all since the last user message,
    less the `<|start|>assistant` with which the prompt ends."""
    since = max(n for n, m in enumerate(said) if m.role == "user") + 1
    return render_training(tokenizer, said[since:], "none")[
        1 + len(tokenizer.encode("assistant")):]


fig, ax = plt.subplots(figsize=(7.4, 2.2))
said, held = [system_message(date="2025-06-28")], []
for n, (question, thought, answer) in enumerate(
        zip(asked, thoughts, answers, strict=True), 1):
    said.append(Message("user", question))
    prompt = render(tokenizer, said, drop="turns")
    kept = len(os.path.commonprefix([prompt, held]))
    said.append(Message("assistant", thought, "analysis"))
    thinking = len(prompt) + len(model_writes(said))
    said.append(Message("assistant", answer, "final"))
    held = prompt + model_writes(said)
    edges = [0, kept, len(prompt), thinking, len(held)]
    for left, right, colour in zip(edges, edges[1:], colours.values(),
                                   strict=False):
        ax.barh(n, right - left, left=left, color=colour, height=0.6)
for name, colour in colours.items():
    ax.barh(0, 0, color=colour, label=name)
ax.set(xlabel="position (tokens)", ylabel="turn", yticks=(1, 2, 3),
       ylim=(3.5, 0.5))
ax.legend(ncols=4, fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1))
plt.show()

# %% [markdown]
# Three turns of a conversation. After each, the model's analysis (grey) is
# taken out, so all that follows it moves to the left and must be fed again
# (orange): the last answer without its analysis, and the new question. All
# before it (blue) is still in the cache.

# %% [markdown]
# ## Derivation
#
# Let the cache hold $n$ tokens, let the next prompt have $P$, and
# let the two agree in their first $m$. At least one token must be fed, since
# the answer begins with the logits of the last one. So feeding starts at
# $f = \min(m, P - 1)$, if the cache can be rolled back to there. Full layers
# always can. A sliding layer whose ring has $W + s$ slots holds positions
# $n - W - s \dots n - 1$; the query at $f$ looks at itself and at
# $f - W + 1 \dots f - 1$, so nothing is missing if
#
# $$ n - W - s \le f - W + 1, \quad\text{that is}\quad
#    n - f \le s + 1 . $$ (generate-slack)
#
# Otherwise the $J$ sliding layers are filled again by a replay of
# {eq}`eq-cache-replay` ([the cache](../model/cache.ipynb)), and the tokens to
# feed are
#
# $$ P - f + \begin{cases} 0 & n - f \le s + 1 \\
#    \min(f, J (W - 1)) & \text{else.} \end{cases} $$ (generate-turn)
#
# The next prompt begins with the prompt of the turn before, so of the $a$
# tokens that a turn has added fewer than $a$ are taken back, and with slack
# for the longest turn a replay never happens. What follows the analysis
# cannot be kept: its keys were computed at other positions, by layers that
# had seen the analysis. After a *call* nothing is dropped, and the tool's
# answer is all that must be read: the tokens that the model wrote stay as
# they are, even where a renderer would spell them in another way.

# %% [markdown]
# ## Code
#
# ### The cache and the tokens in it
#
# `PrefixCache` joins a cache to the list of tokens that went into it, and
# does what the derivation says: keep the common beginning, roll back, feed
# the rest. It stays right if it is left at any point, because the list is
# extended before a token is fed, and the cache knows how far it came.

# %% tags=["export"]
import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from gptoss.model.transformer import GptOss
from gptoss.text.generate import generate
from gptoss.text.sampling import SamplingOptions

SLACK = 1024  # ring slots beyond the window; no longer turn needs a replay


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens at the beginning of `a` and `b` are the same."""
    for n, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return n
    return min(len(a), len(b))

# %% tags=["export"]
class PrefixCache:
    """A cache of batch 1 and the tokens whose keys and values it holds.

    `slack`: slots of the rings beyond the window; so many tokens plus one
    can be taken back without feeding older ones again.
    """

    def __init__(self, model: GptOss, slack: int = 0) -> None:
        self.model = model
        self.cache = model.new_cache(slack=slack)
        self.tokens: list[int] = []  # fed, or to be fed next
        self.fed = 0  # tokens fed so far that were not written here
        self.left = 0  # tokens of the prompt that are still to be fed
        self._full = 0  # tokens that the full layers hold, if that is more

    def resume(self, prompt: Sequence[int]) -> int:
        """Keep what the cache shares with `prompt`; return where to feed
        from. At least the last token is fed: its logits are needed."""
        held = max(self.cache.length, self._full)
        shared = min(common_prefix(prompt, self.tokens[:held]),
                     len(prompt) - 1)
        start = self.cache.rollback(shared)
        self.tokens, self._full = list(prompt), shared
        return start

    def __repr__(self) -> str:
        return f"PrefixCache({len(self.tokens):,} tokens)"

    def write(self, prompt: Sequence[int],
              options: SamplingOptions | None = None, **changes: Any
              ) -> Iterator[int | None]:
        """`generate` after `prompt`, feeding only what must be fed; with
        its pauses, after which `self.left` tokens are still to be fed."""
        start = self.resume(prompt)
        self.left = len(prompt) - start
        for token in generate(self.model, prompt[start:], options,
                              cache=self.cache, pauses=True, **changes):
            left = len(prompt) - self.cache.length if token is None else 0
            self.fed, self.left = self.fed + self.left - left, left
            if token is not None:
                self.tokens.append(token)
            yield token

# %%
opening = "Once upon a time there was a little fox named Mira."
prefix, prompt = PrefixCache(model), tokenizer.encode(opening)
first = list(prefix.write(prompt, max_new_tokens=30, temperature=0))
for written in (first, first[:9]):  # nothing is new; only the end is gone
    print(prefix.resume(prompt + written), "of", len(prompt + written), "kept")

# %% [markdown]
# ### What belongs to one conversation
#
# A model that weighs 13.8 GB should serve many conversations. So what one
# conversation remembers stands apart from what all of them share: a
# `Session` has the tokens in its cache, the state of its random numbers, and
# its last turn. Model, tokenizer, tools and options are none of its business.

# %% tags=["export"]
class Session:
    """What one conversation remembers.

    prefix: its cache, and the tokens in it. turn: its last `Turn`, or None.
    seed: of the seeds of its rounds; None: they come from torch's numbers.
    """

    def __init__(self, model: GptOss, slack: int = SLACK,
                 seed: int | None = None) -> None:
        self.prefix = PrefixCache(model, slack)
        self.turn: Any = None
        self._random = None if seed is None else random.Random(seed)

    def __repr__(self) -> str:
        return f"Session({len(self.prefix.tokens):,} tokens)"

    def next_seed(self) -> int:
        """Of the next round. Of several processes all draw one, so that
        torch's numbers stay alike."""
        return (torch.randint(2 ** 48, ()).item() if self._random is None
                else self._random.getrandbits(48))

# %%
print([Session(model, seed=7).next_seed() % 1000 for _ in range(2)])

# %% [markdown]
# ### What all conversations share
#
# The other half: how hard the model shall think, its tools, what it is told
# before everything else, and how its words are drawn. They make the messages
# at the head of a prompt. Settings do not change; `with_changes` makes new
# ones, checked like the first.

# %% tags=["export:settings"]
import dataclasses
from collections.abc import Mapping
from typing import Any

from gptoss.chat.messages import content_text, require
from gptoss.chat.tools import FunctionTool
from gptoss.text.harmony import (
    EFFORTS,
    Message,
    developer_message,
    system_message,
)
from gptoss.text.sampling import SamplingOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What a chat is asked, whoever speaks to it.

    tools: by name. date: "" or None for none. sampling: of a whole turn;
    what stands in its `stop` is not read. rounds: calls run in one turn.
    slack: see `PrefixCache`. Raises ChatError, which names the option.
    """

    effort: str = "medium"
    tools: Mapping[str, FunctionTool] = dataclasses.field(
        default_factory=dict)
    instructions: str = ""
    date: str | None = None
    sampling: SamplingOptions = SamplingOptions(max_new_tokens=None)
    rounds: int = 8
    slack: int = SLACK

    def __post_init__(self) -> None:
        for name in ("rounds", "slack"):
            value = getattr(self, name)
            require(type(value) is int and value >= 0, name,
                    "an integer >= 0", value)
        require(self.effort in EFFORTS, "effort",
                f"one of {', '.join(EFFORTS)}", self.effort)
        for name, text in (("instructions", self.instructions),
                           ("date", "" if self.date is None else self.date)):
            object.__setattr__(self, name, content_text(text, name))

    def with_changes(self, **changes: Any) -> "Settings":
        """These settings but for `changes`; those of `sampling` by their
        own names. TypeError for an unknown one."""
        own = {field.name for field in dataclasses.fields(self)}
        inner = {name: changes.pop(name) for name in [*changes]
                 if name not in own}
        sampling = changes.pop("sampling", self.sampling)
        return dataclasses.replace(
            self, sampling=sampling.with_changes(**inner), **changes)

    def head(self, instructions: str = "") -> list[Message]:
        """The system message and, if it says anything, the developer's."""
        tools = [tool.spec for tool in self.tools.values()]
        text = "\n\n".join(filter(None, (self.instructions, instructions)))
        both = (system_message(self.effort, self.date or None, bool(tools)),
                developer_message(text, tools))
        return [message for message in both if message.content]

# %%
from gptoss.chat.messages import ChatError
from gptoss.chat.tools import read_tools


def weather(city: str) -> dict:
    """The weather in a city now.

    Args:
        city: its name, in English
    """
    return {"city": city, "temperature": 21}


usual = Settings(date="2025-06-28", tools=read_tools([weather]))
changed = usual.with_changes(effort="high", temperature=0)
print(usual.effort, usual.sampling.temperature, "->",
      changed.effort, changed.sampling.temperature)
print(changed.head()[0].content)
try:
    usual.with_changes(effort="utmost")
except ChatError as error:
    print(error)

# %% [markdown]
# ## It holds
#
# **The cache that is kept is the cache of a fresh start**: any beginning of
# the last prompt kept, anything new after it, with and without slack, a
# forward in four stopped half-way as Ctrl-C would. The last logits are those
# of the whole prompt without a cache.

# %%
import contextlib


def halfway(module, inputs):
    raise KeyboardInterrupt


rng = random.Random(0)
for slack in (0, 60):
    prefix, prompt, count = PrefixCache(model, slack), [], 0
    for n in range(12):
        prompt = prompt[:rng.randint(0, len(prompt))] + [
            rng.randrange(256) for _ in range(rng.randint(1, 70))]
        start = prefix.resume(prompt)
        rest = torch.tensor([prompt[start:]])
        if n % 4 == 3:
            hook = model.layers[2].register_forward_pre_hook(halfway)
            with contextlib.suppress(KeyboardInterrupt):
                model(rest, prefix.cache)
            hook.remove()
            continue
        with torch.no_grad():
            found = model(rest, prefix.cache, logits_to_keep=1)
            wanted = model(torch.tensor([prompt]), logits_to_keep=1)
        assert (found - wanted).abs().max() < 1e-3
        count += len(rest[0])
    print(f"slack {slack}: {count} tokens fed")

# %% [markdown]
# ## Against the others
#
# A cache that outlives a turn is where programs differ. llama.cpp's server
# reads a gpt-oss conversation from its beginning when the sliding layers
# have forgotten too much ("forcing full prompt re-processing",
# llama.cpp#13194); mlx-lm reused nothing after a turn with reasoning
# (mlx-lm#1042). Both are right, and slow: full layers remember everything,
# and the sliding ones need no more than {eq}`generate-turn`.

# %% [markdown]
# ## In the 20b and the 120b
#
# Nothing here is special to the small model. What the default slack costs in
# bf16, and what a turn longer than that costs:

# %%
from gptoss.weights.config import GptOssConfig

for name, real in (("20b", GptOssConfig.gpt_oss_20b()),
                   ("120b", GptOssConfig.gpt_oss_120b())):
    sliding = real.layer_types.count("sliding_attention")
    slot = 2 * real.num_key_value_heads * real.head_dim * 2
    print(f"{name}: {sliding * SLACK * slot / 1e6:.1f} MB of slack; replay "
          f"of {sliding * (real.sliding_window - 1):,} tokens")

# %% [markdown]
# ## Cost
#
# In the conversation of the picture, held three times, the tokens fed turn by
# turn: from a fresh start, with the cache kept, and with it but without
# slack, so that every turn pays for a replay as in {eq}`generate-turn`.

# %%
spent = {"fresh": [], "kept": [], "no slack": []}
for name, row in spent.items():
    prefix = PrefixCache(model, SLACK if name == "kept" else 0)
    said = [system_message(date="2025-06-28")]
    for question, thought, answer in list(zip(asked, thoughts, answers,
                                              strict=True)) * 3:
        said.append(Message("user", question))
        prompt = render(tokenizer, said, drop="turns")
        start = 0 if name == "fresh" else prefix.resume(prompt)
        row.append(len(prompt) - start)
        said += [Message("assistant", thought, "analysis"),
                 Message("assistant", answer, "final")]
        prefix.tokens = prompt + model_writes(said)
        if name != "fresh":  # as if the model had written the rest
            with torch.no_grad():
                model(torch.tensor([prefix.tokens[start:-1]]), prefix.cache)
    print(f"{name:9}", row)
replay = 2 * (model.config.sliding_window - 1)
assert spent["no slack"] == [
    new + min(whole - new, replay) for whole, new in zip(
        spent["fresh"], spent["kept"], strict=True)]

# %% [markdown]
# ## Takeaways
#
# - Old reasoning leaves a prompt from the middle: keep the common beginning,
#   roll back, feed the rest. It costs one turn, not the conversation.
# - A ring with slack for the longest turn never needs a replay; without it
#   one costs a fixed number of tokens.
# - What one conversation remembers stands apart from what all share.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1
#
# A user goes back and writes their second question anew, after ten turns. How
# much is fed, with the default slack, if the ten turns had 4,000 tokens and
# the second question began at token 300? And if it began at token 3,500?

# %% tags=["hide-cell"]
def fed(start: int, held: int, new: int, config: GptOssConfig) -> int:
    sliding = config.layer_types.count("sliding_attention")
    replay = min(start, sliding * (config.sliding_window - 1))
    return new + (0 if held - start <= SLACK + 1 else replay)


real = GptOssConfig.gpt_oss_20b()
found = [fed(start, 4000, 20, real) for start in (300, 3500)]
print(found)
# Taking back 3,700 tokens is more than the slack holds: all 300 before the
# question are fewer than a replay, and are fed again. 500 are within it.
assert found == [320, 20]

# %% [markdown]
# ## Sources
#
# - OpenAI, `docs/format.md` in openai/harmony: what is dropped when.
# - Threads: ggml-org/llama.cpp#13194, ml-explore/mlx-lm#1042.
