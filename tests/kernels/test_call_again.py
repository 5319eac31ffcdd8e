"""A step of decode on the CPU, recorded and called again."""

import inspect

import pytest
import torch
from test_kernels import COMPILED, kernels_on  # noqa: F401
from test_step import POCKET, draw, pair, tiny

from gptoss.kernels import step as step_module
from gptoss.kernels.build import plain_torch
from gptoss.kernels.step import DecodeStep
from gptoss.model.cache import FullCache
from gptoss.model.transformer import GptOss
from gptoss.text.generate import choose_step, generate
from gptoss.text.sampling import Sampler

pytestmark = pytest.mark.skipif(not COMPILED, reason="no kernels")


def recorded(step: DecodeStep) -> bool:
    """Is the step's work a recording's, not its own?"""
    work = step._launch.__closure__ and inspect.getclosurevars(
        step._launch).nonlocals["work"]
    return work is not None and work != step._run


@pytest.mark.parametrize("room", [None, 600])
@pytest.mark.parametrize("batch", [1, 3])
def test_recorded_steps_are_the_ordinary_ones(batch, room):
    """To the last bit, in the type of the kernels, while full layers grow
    and what is seen of them does: at 257 tokens and at 513."""
    model = GptOss.from_pretrained(POCKET)
    ours, theirs = model.new_cache(batch, room), model.new_cache(batch)
    step, tokens = DecodeStep(model, ours), draw(model, batch, 560)
    changes = []
    with torch.inference_mode():
        for cache in (ours, theirs):
            model(tokens[:, :200], cache)
        for t in range(200, 560):
            token, before = tokens[:, t:t + 1], step._launch
            assert torch.equal(step(token), model(token, theirs)), t
            assert recorded(step)
            if step._launch is not before:
                changes.append(t + 1)
    assert changes == [201, 257, 513]
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        n = 560 if isinstance(a, FullCache) else a.k.shape[1]
        assert torch.equal(a.k[:, :n], b.k[:, :n])
        assert torch.equal(a.v[:, :n], b.v[:, :n])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_recorded_in_plain_torch(dtype):
    """Operators that have no kernel for a type are called again, too."""
    model = tiny(dtype)
    ours, theirs = pair(model, 2)
    steps = [DecodeStep(model, ours),
             DecodeStep(model, theirs, lambda run, undo: run)]
    for token in draw(model, 60, 2, 1):
        assert torch.equal(*(step(token) for step in steps))
    assert [recorded(step) for step in steps[:1]] == [True]


def test_others_may_grow_full_layers():
    model = GptOss.from_pretrained(POCKET)
    ours, theirs = model.new_cache(), model.new_cache()
    step, tokens = DecodeStep(model, ours), draw(model, 1, 900)
    t = 0
    for count, one in ((1, True), (300, False), (5, True), (400, False),
                       (9, True)):
        for part in tokens[:, t:t + count].split(1 if one else count, 1):
            expected = model(part, theirs)
            got = step(part) if one else model(part, ours)
            assert torch.equal(got, expected)
        t += count


def test_generate_records_unless_told_otherwise(monkeypatch, caplog):
    model = GptOss.from_pretrained(POCKET)
    made = []

    class Noted(DecodeStep):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments)
            made.append(self)
    monkeypatch.setattr(step_module, "DecodeStep", Noted)

    def text(model=model, **options):
        made.clear()
        return list(generate(model, [5, 6, 7], max_new_tokens=60,
                             sampler=Sampler(0.0), **options))
    right = text(decode="eager")
    assert not made
    assert text() == right and recorded(made[0])
    with plain_torch():
        text()
    assert not made
    assert not caplog.records
    ran = []
    hook = model.layers[1].mlp.register_forward_hook(
        lambda *_: ran.append(1))
    assert text() == right and not made and len(ran) == 60
    assert text() == right and not made and len(ran) == 120
    [record] = caplog.records  # once, though asked twice
    assert "layers.1.mlp has a forward hook" in record.getMessage()
    assert record.name == "gptoss"
    hook.remove()
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda *_: None)
    assert text() == right and not made
    hook.remove()
    with monkeypatch.context() as patch:
        patch.setitem(vars(model.norm), "forward", model.norm.forward)
        assert text() == right and not made
    assert text() == right and recorded(made[0])

    class Mine(type(model.lm_head)):
        """Another class, the same forward."""
    model.lm_head.__class__ = Mine
    assert text() == right and recorded(made[0])

    class Whole(GptOss):
        """A model of one's own, without a forward of its own."""
    assert text(Whole.from_pretrained(POCKET)) == right and recorded(made[0])

    class Other(Mine):
        def forward(self, x):
            return -super().forward(x)
    caplog.clear()
    model.lm_head.__class__ = Other
    assert text() != right and not made
    [record] = caplog.records
    assert "lm_head has a forward of its own" in record.getMessage()
    assert text(GptOss.from_pretrained(POCKET, dtype=torch.float32))
    assert not made


def test_no_step_while_a_replay_is_under_way():
    model = GptOss.from_pretrained(POCKET)
    cache, tokens = model.new_cache(), draw(model, 1, 300)
    model(tokens, cache)
    assert isinstance(choose_step(model, cache), DecodeStep)
    start = cache.rollback(200)
    assert start < 200
    assert not isinstance(choose_step(model, cache), DecodeStep)
    model(tokens[:, start:200], cache)
    assert isinstance(choose_step(model, cache), DecodeStep)


def test_what_cannot_be_called_again(caplog):
    x = torch.arange(6.)
    out = torch.zeros(())
    for work, why in ((lambda: out.copy_((x * x.sum().item()).sum()),
                       "item gives no tensor"),
                      (lambda: out.copy_(torch.cat([x, x]).sum()),
                       "cat takes a list of tensors"),
                      (lambda: out.copy_(x.split(3)[1].sum()), "split")):
        caplog.clear()
        launch = step_module.call_again(work)
        for start in (0, 1, 2):
            x.copy_(torch.arange(6.) + start)
            launch()
            expected = out.clone()
            work()
            assert torch.equal(out, expected)
        [record] = caplog.records
        assert why in record.getMessage() and record.levelname == "WARNING"


def test_what_is_no_operator_is_refused(caplog):
    """Nor does it count as the call before it, or need one."""
    out = torch.zeros(())

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

    def work() -> None:
        with torch.enable_grad():
            out.copy_(Twice.apply(torch.ones((), requires_grad=True)).detach())
        out.add_(1)
    launch = step_module.call_again(work)
    for _ in range(3):
        out.zero_()
        launch()
        assert out == 3
    [record] = caplog.records
    assert "Twice is no operator" in record.getMessage()


def test_call_again():
    """Views, several results, results in place, a tensor used twice, one
    that is never used, operators within operators."""
    x, y, z = torch.zeros(3, 4), torch.zeros(4), torch.zeros(3)

    def work() -> None:
        a = x[1:] * 2
        a.add_(1)[0].mul_(x[0])
        high, at = (a + a).max(-1)
        a.exp()
        y.copy_(torch.nn.functional.layer_norm(a, (4,)).sum(0))
        z[:2] = high + at
        z[2:].copy_(z[:1])
    launch = step_module.call_again(work)
    for n in range(4):
        torch.manual_seed(n)
        x.normal_()
        launch()
        got = y.clone(), z.clone()
        y.zero_(), z.zero_()
        work()
        assert torch.equal(y, got[0]) and torch.equal(z, got[1])
        assert y.abs().sum() > 0


def test_a_recording_that_fails_is_begun_anew():
    fails, total = [True], torch.zeros(())

    def work() -> None:
        total.add_(1)
        if fails:
            raise fails.pop() and KeyboardInterrupt
    launch = step_module.call_again(work)
    with pytest.raises(KeyboardInterrupt):
        launch()
    for _ in range(3):
        launch()
    assert total == 4
    inner = step_module.call_again(lambda: total.add_(1))
    outer = step_module.call_again(inner)
    with pytest.raises(RuntimeError, match="begun twice"):
        outer()
    inner()
    assert total == 5
