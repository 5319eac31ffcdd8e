"""Operators: who loads the kernels and when, defining anew, fakes, gradients,
torch.compile; the same on both paths, by every import and from every thread.
"""

import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import gptoss
from gptoss.kernels.compact import pack_by_torch
from gptoss.kernels.eight import pack_by_steps
from gptoss.model import answers
from gptoss.model.ops import OPERATORS, Operator, define_operator
from gptoss.weights.encoding import encode

POCKET = Path(gptoss.__file__).parent / "pocket"
OPS = torch.ops.gptoss


def run(code: str, *arguments: str, **changes: str) -> str:
    """What a fresh process prints; it must end well and say nothing else."""
    done = subprocess.run(
        [sys.executable, "-c", code, str(POCKET), *arguments], text=True,
        capture_output=True, timeout=280, env=os.environ | {
            "OMP_NUM_THREADS": "1", "GPTOSS_KERNELS": "auto"} | changes)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# ---- one behaviour, by every route

ROUTES = """
import os, sys, hashlib, threading
import torch
from importlib import import_module

def told(GptOss, start=lambda: None):
    from gptoss.text.sampling import Sampler
    from gptoss.text.generate import generate
    model = GptOss.from_pretrained(sys.argv[1])
    with torch.inference_mode():
        logits = model(torch.tensor([[7, 8, 9, 10]]))
    text = list(generate(model, [5, 6, 7], max_new_tokens=24,
                         sampler=Sampler(temperature=0.0)))
    from gptoss.kernels import build, step
    return (build._path, step.can_record(model), text,
            hashlib.sha256(logits.view(torch.int16).numpy().tobytes()
                           if False else bytes(logits.untyped_storage())
                           ).hexdigest())

def front():
    from gptoss import GptOss
    return told(GptOss)

def module():
    from gptoss.model.transformer import GptOss
    return told(GptOss)

def attribute():
    import gptoss
    return told(gptoss.model.transformer.GptOss)

def chat():
    from gptoss.chat.chat import load
    model, _ = load(sys.argv[1])
    return told(type(model))

def operator():
    import gptoss.model.transformer
    x = torch.ones(1, 64).bfloat16()
    torch.ops.gptoss.rms_norm(x, x[0], 1e-5)
    assert torch.ops.gptoss.kernels_on()
    return told(gptoss.model.transformer.GptOss)

def layer():
    from gptoss.model.layers import Linear
    from gptoss.model.transformer import GptOss
    with torch.no_grad():
        Linear(64, 8, dtype=torch.bfloat16)(torch.ones(1, 64).bfloat16())
    assert torch.ops.gptoss.kernels_on()
    return told(GptOss)

def subclass():
    from gptoss.model.transformer import GptOss
    class Mine(GptOss):
        pass
    return told(Mine)

def threads():
    # loading takes a while, so that the second thread comes meanwhile
    import time
    from gptoss.kernels import build as kernels
    from gptoss.model import transformer as model
    from gptoss.text import generate
    from gptoss.text.sampling import Sampler
    real, count = kernels.build, []
    def build(*arguments):
        count.append(1)
        time.sleep(0.5)
        return real(*arguments)
    kernels.build = build
    assert not kernels._path
    texts, barrier = [None, None], threading.Barrier(2)
    def work(n):
        barrier.wait()
        texts[n] = list(generate.generate(
            model.GptOss.from_pretrained(sys.argv[1]), [5, 6, 7],
            max_new_tokens=24,
            sampler=Sampler(temperature=0.0)))
    both = [threading.Thread(target=work, args=(n,)) for n in (0, 1)]
    for thread in both: thread.start()
    for thread in both: thread.join()
    assert len(count) == 1
    found = told(model.GptOss)
    assert texts == [found[2]] * 2, (texts, found)
    return found

for route in (front, module, attribute, chat, operator, layer, subclass,
              threads):
    if os.fork() == 0:  # a process in which nothing of gptoss is loaded
        try:
            print(*route(), flush=True)
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
        os._exit(1)
    assert os.wait()[1] == 0, route
""".replace("""logits.view(torch.int16).numpy().tobytes()
                           if False else """, "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("choice", ["auto", "torch"])
def test_every_route_and_thread_does_the_same(choice):
    code = ROUTES
    if choice == "torch":
        code = code.replace("    assert torch.ops.gptoss.kernels_on()\n", "")
        code = code.replace("    assert len(count) == 1\n", "")
    lines = run(code, GPTOSS_KERNELS=choice).splitlines()
    assert len(lines) == 8 and len(set(lines)) == 1, lines
    assert lines[0].startswith("torch (" if choice == "torch" else
                               ("C++", "portable", "torch ("))


THREADS = """
import sys, threading, time
import torch
import gptoss.model.layers
from gptoss.kernels import build as kernels
real, count = kernels.build, []
def build(*arguments):
    count.append(1)
    time.sleep(0.5)
    return real(*arguments)
kernels.build = build
x, found = torch.randn(4, 64).bfloat16(), [None] * 3
barrier = threading.Barrier(3)
def work(n):
    barrier.wait()
    with torch.inference_mode():
        found[n] = torch.ops.gptoss.rms_norm(x, x[0], 1e-5)
threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
for thread in threads: thread.start()
for thread in threads: thread.join()
with torch.inference_mode():
    last = torch.ops.gptoss.rms_norm(x, x[0], 1e-5)
print(len(count), *(torch.equal(y, last) for y in found))
"""


def test_threads_that_use_a_bare_operator_load_once():
    """No model is made: the first call loads, the others wait for it."""
    assert run(THREADS) == "1 True True True\n"


def test_answers_count_as_loaded_when_they_are(monkeypatch):
    """A thread that comes meanwhile waits; a failure is tried again; what
    loads may call operators itself."""
    begun, go, done = threading.Event(), threading.Event(), []

    def action():
        begun.set()
        assert go.wait(60)
        assert answers.load_answers()  # in this thread: under way
        done.append(1)
    loader = SimpleNamespace(load=action)
    monkeypatch.setitem(sys.modules, "gptoss_loader", loader)
    monkeypatch.setitem(answers.ANSWERS, "kernels", "gptoss_loader:load")
    monkeypatch.setattr(answers, "_state", "")
    told = []

    def ask():
        told.append((answers.load_answers(), list(done)))
    threads = [threading.Thread(target=ask) for _ in range(3)]
    threads[0].start()
    assert begun.wait(60)
    for thread in threads[1:]:
        thread.start()
    go.set()
    for thread in threads:
        thread.join(60)
    # one that came before the end had to wait: there may be a kernel now
    assert told[0] == (False, [1]) and len(told) == 3
    assert all(seen == [1] for _, seen in told) and done == [1]
    assert answers.load_answers()

    def fails():
        if not tried:
            tried.append(1)
            raise KeyboardInterrupt
    tried, loader.load = [], fails
    monkeypatch.setattr(answers, "_state", "")
    with pytest.raises(KeyboardInterrupt):
        answers.load_answers()
    assert not answers.load_answers() and answers.load_answers()


def test_answers_import_neither_torch_nor_the_package():
    assert run("import sys, gptoss.model.answers; print(sorted(name for name "
               "in sys.modules if name.partition('.')[0] in ('torch', "
               "'gptoss')))") == (
                   "['gptoss', 'gptoss.checkpoint', 'gptoss.harmony', "
                   "'gptoss.model', 'gptoss.model.answers', "
                   "'gptoss.mxfp4']\n")  # subjects: empty until asked


@pytest.mark.parametrize("make", [
    ".from_pretrained(sys.argv[1])",
    "(GptOssConfig.gpt_oss_20b(), device='meta')"], ids=["read", "drawn"])
def test_who_makes_a_model_loads(make):
    """Before any call, so before threads share it."""
    code = ("import sys\nfrom gptoss import GptOss, GptOssConfig\n"
            "from gptoss.model import answers\n"
            f"assert not answers._state\nGptOss{make}\n"
            "from gptoss.kernels import build\n"
            "print(answers._state, build._path)")
    assert run(code, GPTOSS_KERNELS="torch") == (
        "loaded torch (GPTOSS_KERNELS=torch)\n")


# ---- the table

def test_every_operator_is_in_the_table_and_has_its_twin():
    """What is defined comes from the table, schema by schema."""
    made = {name.removeprefix("gptoss::")
            for name in torch._C._dispatch_get_all_op_names()
            if name.startswith("gptoss::")}
    plain = {name for name in made if name.startswith("plain_")}
    assert {f"plain_{name}" for name in OPERATORS} == plain
    assert set(OPERATORS) >= {
        "mxfp4_decode", "mxfp4_linear", "packed_experts",
        "packed_experts_backward", "rms_norm", "linear", "rope", "route",
        "sink_attention", "compact_linear", "pack_compact", "eight_linear",
        "pack_eight"}
    for name, operator in OPERATORS.items():
        for of in (name, f"plain_{name}"):
            assert str(getattr(OPS, of).default._schema) == (
                f"gptoss::{of}{operator.schema}")


def test_twins_are_the_plain_functions():
    for name, (_, case) in arguments(torch.bfloat16, False).items():
        name = name.split()[0]
        twin = getattr(OPS, f"plain_{name}")(*case)
        right = OPERATORS[name].plain(*case)
        both = [x if isinstance(x, tuple) else (x,) for x in (twin, right)]
        assert all(map(torch.equal, *both)), name


# ---- defining anew

def test_a_definition_replaces_the_one_before():
    """With its fake and its gradient, and another schema if need be."""
    for n in (2, 3):
        define_operator("tested", Operator(
            "(Tensor x) -> Tensor", lambda x, n=n: n * x,
            lambda x, n=n: x.new_empty(n),
            lambda ctx, grad, n=n: 10 * n * grad, lambda *_, **__: None))
        x = torch.ones(2, requires_grad=True)
        y = OPS.tested(x)
        y.sum().backward()
        assert y.tolist() == [n, n] and x.grad.tolist() == [10 * n] * 2
        assert OPS.tested(x.to("meta")).shape == (n,)
    define_operator("tested", Operator("(Tensor x, int n) -> Tensor",
                                       lambda x, n: x + n))
    assert OPS.tested(torch.zeros(1), 4).item() == 4
    assert OPS.plain_tested(torch.zeros(1), 4).item() == 4
    with pytest.raises((TypeError, RuntimeError)):
        OPS.tested(torch.zeros(1))


def test_an_error_names_the_operator_and_what_it_was_given():
    define_operator("tested", Operator("(Tensor x, int n) -> Tensor",
                                       lambda x, n: x.view(n)))
    with pytest.raises(RuntimeError, match="invalid for input") as caught:
        OPS.tested(torch.zeros(3, 2), 5)
    [note] = caught.value.__notes__
    assert note == "in gptoss::tested(torch.float32 (3, 2), 5)"


# ---- fakes and gradients of every operator

def arguments(dtype: torch.dtype, learns: bool, sizes=(2, 20)
              ) -> dict[str, tuple]:
    """Of each operator a set for every number of tokens."""
    def real(*shape: int) -> torch.Tensor:
        return torch.randn(shape).to(dtype).requires_grad_(learns)

    torch.manual_seed(1)  # a process of its own would draw others each time
    found = {}
    for N in sizes:
        E, K, D, F = 4, 2, 64, 32
        ids = torch.rand(N, E).topk(K).indices
        weight = real(8, D)
        at = torch.arange(N)[None]
        cases = {
            "linear": (real(N, D), weight, real(8)),
            "rms_norm": (real(2, N, D), real(D), 1e-5),
            "rope": (real(1, N, 2, 32), real(1, N, 16), real(1, N, 16)),
            "route": (real(N, E), K),
            "sink_attention": (real(1, N, 4, 16), real(1, N, 2, 16),
                               real(1, N, 2, 16), real(4), at, at, 3, 0.25),
            "mxfp4_linear": (real(N, D), *encode(torch.randn(8, D)),
                             real(8)),
            "packed_experts": (
                real(N, D), ids, real(N, K),
                *encode(torch.randn(E, 2 * F, D)), real(E, 2 * F),
                *encode(torch.randn(E, D, F)), real(E, D), 7.0),
            "mxfp4_decode": (*encode(torch.randn(8, D)), dtype)}
        if dtype == torch.bfloat16:
            cases["compact_linear"] = (
                cases["linear"][0], weight, None,
                *pack_by_torch(weight.detach()))
            cases["eight_linear"] = (
                cases["linear"][0], *pack_by_steps(weight.detach()), None)
        for name, case in cases.items():
            found[f"{name} {N}"] = (getattr(OPS, name), case)
    return found


CHECKED = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from test_operators import arguments
import gptoss.kernels.build as kernels
import gptoss.kernels.eight
dtype = torch.float32 if "torch" in kernels.load_kernels() else torch.bfloat16
for learns in (False, True):
    for name, (operator, case) in arguments(dtype, learns, (5,)).items():
        torch.library.opcheck(operator, case, test_utils=(
            "test_schema", "test_autograd_registration", "test_faketensor",
            *(("test_aot_dispatch_static",) if not learns else ())))
print("checked")
"""


@pytest.mark.parametrize("choice", ["auto", "torch"])
def test_torchs_own_checks_of_operators(choice):
    assert run(CHECKED, str(Path(__file__).parent),
               GPTOSS_KERNELS=choice) == "checked\n"


def test_no_fake_tensor_reaches_a_kernel():
    real = {name: (operator, case) for name, (operator, case)
            in arguments(torch.bfloat16, False).items()}
    with FakeTensorMode() as mode:
        for name, (operator, case) in real.items():
            fakes = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x
                     for x in case]
            with torch.no_grad():
                found = operator(*fakes)
            for x in found if isinstance(found, tuple) else (found,):
                assert type(x).__name__ == "FakeTensor", name


FUNCTIONS = """
import sys, torch
from torch.func import grad, jvp, vmap
sys.path.insert(0, sys.argv[2])
from test_operators import arguments
import torch.autograd.forward_ad as forward
import gptoss.kernels.eight
from gptoss.kernels.build import load_kernels
load_kernels()

def near(a, b):
    a, b = a.double(), b.double()
    return (a - b).norm() <= 0.05 * b.norm() + 1e-9

for name, (operator, case) in arguments(torch.bfloat16, False,
                                        (20,)).items():
    if name.startswith("mxfp4_decode"):
        continue
    def first(x):
        y = operator(x, *case[1:])
        return (y[0] if isinstance(y, tuple) else y).float()
    def wide(x):
        y = operator(x, *(c.double() if torch.is_tensor(c)
                          and c.is_floating_point() else c
                          for c in case[1:]))
        return y[0] if isinstance(y, tuple) else y
    x, t = case[0], torch.randn(case[0].shape).bfloat16()
    right = jvp(wide, (x.double(),), (t.double(),))[1]
    assert near(jvp(first, (x,), (t,))[1], right), name
    with forward.dual_level():
        y = first(forward.make_dual(x, t))
        assert near(forward.unpack_dual(y).tangent, right), name
    try:
        share = torch.randn(right.shape)
        slope = grad(lambda x: (share * first(x)).sum())(x)
        assert near(slope, grad(lambda x: (share * wide(x)).sum())(
            x.double())), name
    except RuntimeError as error:  # told, not wrong
        assert "functorch" in str(error) or "vmap" in str(error), error
    if name.split()[0] in ("linear", "rms_norm", "mxfp4_linear"):
        many = torch.stack([x, t])
        assert near(vmap(first)(many), torch.stack([first(x), first(t)]))
print("right")
"""


def test_derivatives_forwards_and_torch_func():
    """The right number or an error that says so, with kernels loaded."""
    assert run(FUNCTIONS, str(Path(__file__).parent)) == "right\n"


# ---- torch.compile

COMPILED = """
import sys, torch, warnings
warnings.simplefilter("ignore")
import torch._dynamo as dynamo
import gptoss.kernels.build as kernels
from gptoss.kernels.step import DecodeStep
from gptoss.model.transformer import GptOss
model = GptOss.from_pretrained(sys.argv[1])
tokens = torch.tensor([[5, 6, 7, 8, 9]])
at = torch.arange(5)[None]
exact = sys.argv[2] != "inductor"

def same(a, b):
    return torch.equal(a, b) if exact else (
        (a.double() - b.double()).norm() < 0.02 * b.double().norm())

def whole(backend):
    with torch.inference_mode():
        compiled = torch.compile(model.run, backend=backend, fullgraph=True)
        assert same(compiled(tokens, at), model(tokens)), "forward"

def cached(backend):
    compiled = torch.compile(model.run, backend=backend, fullgraph=True)
    caches = [model.new_cache(), model.new_cache()]
    with torch.no_grad():
        for t in (tokens, tokens[:, :1], tokens[:, 1:2]):
            place = at[:, :t.shape[1]] + caches[0].length
            plan = caches[0].begin(place)
            y = compiled(t, place, plan)
            caches[0].commit(plan)
            assert same(y, model(t, caches[1])), "cache"

def step(backend):
    caches = [model.new_cache(), model.new_cache()]
    one = DecodeStep(model, caches[0], lambda run, undo: torch.compile(
        run, backend=backend, fullgraph=True))
    with torch.inference_mode():
        for t in tokens[:, :3].split(1, 1):
            assert same(one(t), model(t, caches[1])), "step"

def front(backend):
    with torch.no_grad():
        compiled = torch.compile(model, backend=backend)
        assert same(compiled(tokens), model(tokens)), "front"

def learns(backend):
    layer = GptOss.from_pretrained(sys.argv[1]).layers[0].self_attn.q_proj
    layer.requires_grad_()
    slopes = []
    for run in (torch.compile(layer, backend=backend), layer):
        x = torch.ones(2, layer.in_features).bfloat16().requires_grad_()
        layer.zero_grad()
        run(x).sum().backward()
        slopes.append((x.grad, layer.weight.grad.clone()))
    assert all(map(torch.equal, *slopes)), "gradients"

for work in sys.argv[3:]:
    dynamo.reset()
    globals()[work](sys.argv[2])
print(kernels._path.split()[0])
"""


@pytest.mark.parametrize("works", [("eager", "cached", "front"),
                                   ("aot_eager", "whole", "step", "learns")])
def test_a_model_compiles_on_the_path_in_use(works):
    """Forward, with a cache, a step: one graph each, and equal numbers."""
    assert run(COMPILED, *works).strip() in ("C++", "portable", "torch")


@pytest.mark.skipif(not os.environ.get("GPTOSS_SLOW"),
                    reason="GPTOSS_SLOW is not set")
def test_a_model_compiles_with_inductor():
    run(COMPILED, "inductor", "whole", "step")
