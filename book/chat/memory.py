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
# Common programs then start from nothing. In the three turns below, 145 tokens
# are read instead of 358; and the 20b has to look again at no more than 1,524
# tokens before the place of the change, however long the conversation is.
#
# ## Picture

# %% tags=["hide-input", "picture"]
# Figure: three turns of a real conversation as bars of tokens with their
# counts. Turn 1: 89 fed, then written. Turn 2: 90 kept, 32 fed. Turn 3: 123
# kept, 24 fed. In each, the analysis is the larger part of what was written.
import os

os.environ["GPTOSS_KERNELS"] = "torch"  # the same words on every processor
import matplotlib.pyplot as plt
import torch

from gptoss.chat.chat import Chat, load
from gptoss.text.harmony import (
    Message,
    render,
    render_training,
    system_message,
)

plt.style.use("../_static/book.mplstyle")
torch.manual_seed(0)
model, tokenizer = load(dtype=torch.float32)
asked = ["What is 347 + 285?", "Take 88 from 403.", "Thank you!"]
held_talk = Chat((model, tokenizer), temperature=0, date="2025-06-28")
END, turns, messages = tokenizer.special["<|end|>"], [], []
for question in asked:
    messages.append({"role": "user", "content": question})
    list(held_talk.events(messages))
    messages += held_talk.turn
    used, held = held_talk.usage, list(held_talk.session.prefix.tokens)
    thinking = held.index(END, used.prompt_tokens) + 1 - used.prompt_tokens
    turns.append({"kept": used.prompt_tokens - used.prefilled_tokens,
                  "fed": used.prefilled_tokens, "analysis": thinking,
                  "answer": used.generated_tokens - thinking, "held": held})
thoughts, answers = zip(*((m["reasoning"], m["content"]) for m in messages
                          if m["role"] == "assistant"), strict=True)

fig, ax = plt.subplots(figsize=(7.2, 2.4))
NAMES = {"kept": ("kept in the cache", "C0"), "fed": ("read", "C1"),
         "analysis": ("analysis, dropped next turn", "0.75"),
         "answer": ("answer", "C2")}
for n, turn in enumerate(turns):
    x = 0
    for key, (name, colour) in NAMES.items():
        ax.barh(n, turn[key], left=x, color=colour, height=0.6)
        if turn[key]:
            ax.text(x + turn[key] / 2, n, turn[key], ha="center",
                    va="center", fontsize=8,
                    color="k" if key in ("fed", "analysis") else "w")
        if n == 1:
            ax.text(x + turn[key] / 2, -0.85, name, ha="center", fontsize=7.5,
                    color="0.3" if key == "analysis" else colour)
        x += turn[key]
    ax.text(x + 2, n, f'"{asked[n]}"', va="center", fontsize=7.5)
ax.set(xlabel="position (tokens)", ylabel="turn", yticks=(0, 1, 2),
       yticklabels=(1, 2, 3), ylim=(2.5, -0.9), xlim=(0, 235))
ax.grid(visible=False)
plt.show()

# %% [markdown]
# What to see: three turns that the shipped model has really held (this cell
# uses the finished package), with their tokens counted. After each turn the
# model's analysis (grey) is taken out of the next prompt. So all that follows
# it moves to the left and must be read at its new place (orange): the last
# answer, now without its analysis, and the new question. All before it (blue)
# is still in the cache.

# %% [markdown]
# ## The naive version
#
# Read the whole prompt in every turn. What is read then grows with the square
# of the number of turns; what is *new* does not grow at all.

# %%
from collections.abc import Sequence


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens at the beginning of `a` and `b` are the same."""
    for n, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return n
    return min(len(a), len(b))


def prompt_of(count: int, drop: str = "turns") -> list[int]:
    """The prompt of turn `count` of the picture's conversation."""
    said = [system_message(date="2025-06-28")]
    for n in range(count):
        said.append(Message("user", asked[n]))
        if n < count - 1:
            said += [Message("assistant", thoughts[n], "analysis"),
                     Message("assistant", answers[n], "final")]
    return render(tokenizer, said, drop=drop)


again, new, held = 0, 0, []
for count, turn in enumerate(turns, 1):
    prompt = prompt_of(count)
    same = common_prefix(prompt, held)
    print(f"turn {count}: prompt of {len(prompt)}, of which {same} are held")
    again, new, held = again + len(prompt), new + len(prompt) - same, turn[
        "held"]
print(f"read: {again} from a fresh start each time, {new} with the cache")
assert [turn["fed"] for turn in turns] == [89, 32, 24]

# %% [markdown]
# Where do the two part? After the second question's prompt begins the first
# answer. The cache has `<|channel|>analysis` there, the new prompt
# `<|channel|>final`:

# %%
same = common_prefix(prompt_of(2), turns[0]["held"])
print("in the cache after turn 1:", len(turns[0]["held"]) - 1)
for name, tokens in (("held", turns[0]["held"]), ("new ", prompt_of(2))):
    print(name, repr(tokenizer.decode(tokens[same - 5:same])), "|",
          repr(tokenizer.decode(tokens[same:same + 6])))

# %% [markdown]
# ## Derivation
#
# **One turn, with its numbers.** After turn 1 the cache holds $n = 153$ tokens
# (the last one that was written, `<|return|>`, was never fed). The next prompt
# has $P = 122$, and the two agree in their first $m = 90$. So we roll the
# [cache](../model/cache.ipynb) back to 90 and feed the remaining 32.
#
# Why can the rest not be kept? It holds the same words. But its keys were
# computed at other positions, by layers that had seen the analysis. A kept key
# is right only if everything before it is the same.
#
# **In general.** At least one token must be fed, since the answer begins with
# the logits of the last one. So feeding starts at
#
# $$ f = \min(m, P - 1) , $$ (memory-start)
#
# if the cache can be rolled back to there. Full layers always can: they hold
# every position. A sliding layer cannot always. It holds its keys in a ring,
# and a newer key overwrites an older one. Say a window of $W = 8$ and a ring
# of 8 slots, after 40 tokens: it holds positions 32 to 39. Now we go back to
# $f = 34$. The query there looks at itself and at the seven before it, 27 to
# 33, and of these 27 to 31 are gone.
#
# *Slack* helps: $s$ slots more than the window needs. With $s = 8$ the ring
# holds 24 to 39, and nothing is missing. A ring with $W + s$ slots holds $n -
# W - s \dots n - 1$; the query at $f$ needs $f - W + 1 \dots f - 1$. So it has
# all if
#
# $$ n - W - s \le f - W + 1, \quad\text{that is}\quad
#    n - f \le s + 1 . $$ (generate-slack)

# %% tags=["hide-input"]
# Figure: rows of positions 0 to 39. A full layer holds all. A sliding layer
# with slack 8 holds 24 to 39. Going back to 34, the window 27 to 33 is held;
# going back to 26, of the window 19 to 25 the first five are missing (red).
W_, s_, n_ = 8, 8, 40
fig, ax = plt.subplots(figsize=(7, 2.2))
for y, first, name in ((0, 0, "full layer holds"),
                       (1, n_ - W_ - s_, "sliding layer holds")):
    ax.barh(y, n_ - first, 0.6, first, color="C0", alpha=0.7)
    ax.text(-0.5, y, name, ha="right", va="center", fontsize=8)
for y, f in ((2, 34), (3, 26)):
    for p in range(f - W_ + 1, f):
        gone = p < n_ - W_ - s_
        ax.barh(y, 0.85, 0.6, p + 0.07, color="C5" if gone else "C2")
    ax.barh(y, 0.85, 0.6, f + 0.07, color="C1")
    ax.text(-0.5, y, f"back to {f}: needs", ha="right", va="center",
            fontsize=8)
    ax.text(f + 1.3, y, f"{n_ - f} taken back: " + (
        "nothing is missing" if n_ - f <= s_ + 1 else "the red are missing"),
        va="center", fontsize=8)
ax.set(xlim=(-11, 56), ylim=(3.5, -0.5), yticks=[], xlabel="position")
ax.spines["left"].set_visible(False)
ax.set_xticks([0, 8, 16, 24, 32, 39])
ax.grid(visible=False)
plt.show()

# %% [markdown]
# What to see: both layers after 40 tokens, and what the next query (orange)
# needs of the sliding one. Six tokens can be taken back, and with $s = 8$ up
# to nine; fourteen cannot (red): what was overwritten must be computed once
# more.
#
# If more is taken back than the slack allows, the $J$ sliding layers are
# filled again by a *replay*: some of the tokens before $f$ are fed once more,
# and their logits ignored. How many is {eq}`eq-cache-replay` of [the
# cache](../model/cache.ipynb). The tokens to feed are then
#
# $$ P - f + \begin{cases} 0 & n - f \le s + 1 \\
#    \min(f, J (W - 1)) & \text{else.} \end{cases} $$ (generate-turn)
#
# The next prompt begins with the prompt of the turn before, so of the $a$
# tokens that a turn has added fewer than $a$ are taken back, and with slack
# for the longest turn a replay never happens. After a *call* nothing is
# dropped, and the tool's answer is all that must be read: the tokens that the
# model wrote stay as they are, even where a renderer would spell them in
# another way.

# %% [markdown]
# ## Code
#
# ### The cache and the tokens in it
#
# `PrefixCache` joins a cache to the list of tokens that went into it. `resume`
# is the derivation, in five lines: compare, stop one before the end
# ({eq}`memory-start`), roll back, note the new tokens, say where to feed from.
# `rollback` itself returns an earlier place when a replay is due.
#
# It must stay right if it is left at any point, by Ctrl-C in the middle of a
# layer, say. So the list is extended *before* a token is fed, and what is
# really held is asked of the cache, which counts a token when all layers have
# it. One number more is needed, `_full`: during a replay the cache counts from
# an earlier place, while its full layers still hold everything up to `shared`.
# If the replay is left half-way, they need not be read again, and the next
# `resume` must know.

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
    can be taken back without feeding older ones again. `draft`: who guesses
    tokens, as for `generate`; a small model keeps its own cache here.
    """

    def __init__(self, model: GptOss, slack: int = 0, draft: Any = None
                 ) -> None:
        self.model = model
        self.draft = draft
        if draft is not None:  # kernels are imported where they are needed
            from gptoss.kernels.drafts import drafter_for

            self.draft = drafter_for(draft, model)
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
                              cache=self.cache, pauses=True, draft=self.draft,
                              before=prompt[:start], **changes):
            left = len(prompt) - self.cache.length if token is None else 0
            self.fed, self.left = self.fed + self.left - left, left
            if token is not None:
                self.tokens.append(token)
            yield token

# %% [markdown]
# A text that was written and then offered again, whole or with its end cut
# off: one token is fed, or as many as are new.

# %%
opening = "Once upon a time there was a little fox named Mira."
prefix, prompt = PrefixCache(model), tokenizer.encode(opening)
first = list(prefix.write(prompt, max_new_tokens=30, temperature=0))
for written in (first, first[:9]):  # nothing is new; only the end is gone
    print(prefix.resume(prompt + written), "of", len(prompt + written), "kept")

# %% [markdown]
# ### What belongs to one conversation
#
# A model that fills a whole card should serve many conversations. So what one
# conversation remembers stands apart from what all of them share: a
# `Session` has the tokens in its cache, the state of its random numbers, and
# its last turn. Model, tokenizer, tools and options are none of its business.

# %% tags=["export"]
class Session:
    """What one conversation remembers.

    prefix: its cache, and the tokens in it. turn: its last `Turn`, or None.
    seed: of the seeds of its rounds; None: they come from torch's numbers.
    draft: who guesses tokens, as for `generate`.
    """

    def __init__(self, model: GptOss, slack: int = SLACK,
                 seed: int | None = None, draft: Any = None) -> None:
        self.prefix = PrefixCache(model, slack, draft)
        self.turn: Any = None
        self._random = None if seed is None else random.Random(seed)

    def __repr__(self) -> str:
        return f"Session({len(self.prefix.tokens):,} tokens)"

    def next_seed(self) -> int:
        """Of the next round. Of several processes all draw one, so that
        torch's numbers stay alike."""
        return (int(torch.randint(2 ** 48, ()).item())
                if self._random is None else self._random.getrandbits(48))

# %%
print([Session(model, seed=7).next_seed() % 1000 for _ in range(2)])

# %% [markdown]
# A seed makes a conversation repeatable: two sessions with the same one draw
# the same seeds for their rounds. Without one the seeds come from torch's own
# random numbers, so `torch.manual_seed` decides.

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

# %% [markdown]
# ### What is refused
#
# `rounds` and `slack` must be whole numbers from 0 on (True is none), `effort`
# one of three words, and instructions and date texts that UTF-8 can hold. The
# error names the option. An option that nobody has is Python's own TypeError:

# %%
for wrong in ({"effort": "utmost"}, {"rounds": -1}, {"slack": True},
              {"date": 2025}, {"heat": 1}):
    try:
        usual.with_changes(**wrong)
    except (ChatError, TypeError) as error:
        print(type(error).__name__, f"{str(error):.60}")

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
def model_writes(said: list[Message]) -> list[int]:
    """What the model adds to a prompt: all since the last user message,
    less the `<|start|>assistant` with which the prompt ends."""
    since = max(n for n, m in enumerate(said) if m.role == "user") + 1
    return render_training(tokenizer, said[since:], "none")[
        1 + len(tokenizer.encode("assistant")):]


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
# ### Exercise 2
#
# Suppose that nothing were dropped: old analysis stays in the prompt. How much
# is fed then in the three turns of the picture, and what does it cost instead?

# %% tags=["hide-cell"]
held, fed_now, lengths = [], [], []
for count, turn in enumerate(turns, 1):
    prompt = prompt_of(count, drop="none")
    fed_now.append(len(prompt) - common_prefix(prompt, held))
    lengths.append(len(prompt))
    held = prompt + turn["held"][-(turn["analysis"] + turn["answer"]):]
print("fed", fed_now, "of prompts of", lengths)
print("with dropping", [turn["fed"] for turn in turns], "of",
      [len(prompt_of(count)) for count in (1, 2, 3)])
# Fewer tokens are fed, but the prompt grows by every thought: the context is
# full sooner, and every later token attends to all of it. And the released
# models were trained on prompts without it.

# %% [markdown]
# ### Exercise 3
#
# An agent on the 20b thinks for 3,000 tokens in a turn, in a conversation of
# 20,000. What does the next question of 20 tokens cost with the default slack,
# and with a slack of 4,096? How much memory does the larger one take?

# %% tags=["hide-cell"]
slot = 2 * real.num_key_value_heads * real.head_dim * 2
for slack in (SLACK, 4096):
    sliding = real.layer_types.count("sliding_attention")
    replay = 0 if 3000 <= slack + 1 else min(
        20_000, sliding * (real.sliding_window - 1))
    print(f"slack {slack}: {20 + replay:,} tokens, "
          f"{sliding * slack * slot / 1e6:.0f} MB")
# (The answer's own tokens come on top, in both cases.)

# %% [markdown]
# ## Sources
#
# - OpenAI, `docs/format.md` in openai/harmony: what is dropped when.
# - Threads: ggml-org/llama.cpp#13194, ml-explore/mlx-lm#1042.
