"""SAM and ASAM: hand-worked steps, the restore to the bit, and what must not happen."""

import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from pyvitfast.distill import ASAM, SAM


def quadratic(kind=SAM, rho=0.5, **settings):
    """L = (4x^2 + y^2) / 2 at (1, 2), the weights in two groups."""
    x, y = (nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (1.0, 2.0))
    optimizer = kind(torch.optim.SGD([{"params": [x]}, {"params": [y], "lr": 0.1}], 0.1), rho, **settings)

    def closure():
        optimizer.zero_grad()
        loss = (4 * x**2 + y**2) / 2
        loss.backward()
        return loss

    return optimizer, closure, x, y


def test_hand_worked_step():
    optimizer, closure, x, y = quadratic()
    closure()
    assert (x.grad.item(), y.grad.item()) == (4, 2)
    assert optimizer.first_step()
    assert x.item() - 1 == pytest.approx(0.44721360, abs=5e-9)
    assert y.item() - 2 == pytest.approx(0.22360680, abs=5e-9)
    closure()
    assert x.grad.item() == pytest.approx(5.78885438, abs=5e-9)
    assert y.grad.item() == pytest.approx(2.22360680, abs=5e-9)
    optimizer.second_step()
    assert [x.item(), y.item()] == pytest.approx([0.42111456, 1.77763932], abs=5e-9)
    again, closure, u, v = quadratic()
    assert float(again.step(closure)) == 4.0
    assert torch.equal(u, x) and torch.equal(v, y)


@pytest.mark.parametrize(("kind", "settings"), [(ASAM, {}), (SAM, {"adaptive": True})])
def test_hand_worked_adaptive_step(kind, settings):
    optimizer, closure, x, y = quadratic(kind, **settings)
    closure()
    optimizer.first_step()
    assert [x.item() - 1, y.item() - 2] == pytest.approx([0.35355339, 0.70710678], abs=5e-9)


def network(seed=0):
    torch.manual_seed(seed)
    model = timm.create_model("resnet20_cifar", in_chans=1).train()
    images, labels = torch.randn(8, 1, 8, 8), torch.randint(10, (8,))
    return model, lambda: F.cross_entropy(model(images), labels)


def closure_of(optimizer, objective):
    def closure():
        optimizer.zero_grad()
        loss = objective()
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("adaptive", [False, True])
def test_restore_is_bitwise(adaptive):
    model, objective = network()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = SAM(torch.optim.SGD(model.parameters(), 0.1), 0.8, adaptive)
    closure_of(optimizer, objective)()
    grads = [p.grad.clone() for p in model.parameters()]
    assert optimizer.first_step()
    moved = [p.detach().clone() for p in model.parameters()]
    assert any(not torch.equal(a, b) for a, b in zip(moved, before))
    optimizer.restore()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before))
    scale = [b**2 if adaptive else torch.ones_like(b) for b in before]
    steps = [s.double() * g.double() for s, g in zip(scale, grads)]
    weighted = [(b.abs() if adaptive else 1) * g for b, g in zip(before, grads)]
    norm = sum(w.double().square().sum() for w in weighted).sqrt()
    for step, m, b in zip(steps, moved, before):
        torch.testing.assert_close(m.double(), b.double() + 0.8 * step / norm, rtol=1e-6, atol=1e-7)
    # Why a copy is kept: taking the step back does not give the weights back.
    pairs = [(b, (0.8 * step / norm).float()) for b, step in zip(before, steps)]
    assert any(not torch.equal(b + e - e, b) for b, e in pairs)


def test_radius_zero_is_the_base_optimizer():
    runs = []
    for wrap in (lambda o: o, lambda o: SAM(o, 0.0)):
        model, objective = network()
        optimizer = wrap(torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-3))
        for _ in range(3):
            optimizer.step(closure_of(optimizer, objective))
        runs.append(model.state_dict())
    assert all(torch.equal(runs[0][k], runs[1][k]) for k in runs[0])


def test_weight_decay_and_momentum_act_at_the_weights():
    w = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    optimizer = SAM(torch.optim.SGD([w], 0.1, momentum=0.9, weight_decay=0.5), 0.5)
    v = torch.zeros(2, dtype=torch.float64)
    plain = w.detach().clone()
    for _ in range(3):
        optimizer.step(closure_of(optimizer, lambda: (w**2).sum() / 2))
        gradient = plain + 0.5 * plain / plain.norm()  # at w + e
        v = 0.9 * v + gradient + 0.5 * plain
        plain = plain - 0.1 * v
    torch.testing.assert_close(w.detach(), plain, rtol=1e-10, atol=0)


@pytest.mark.parametrize("which", ["first", "second"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_skips_the_step(which, value):
    model, objective = network()
    optimizer = SAM(torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), 0.1)
    optimizer.step(closure_of(optimizer, objective))
    before = [p.detach().clone() for p in model.parameters()]
    momentum = copy.deepcopy(optimizer.state_dict()["base"]["state"])
    calls = []

    def closure():
        loss = closure_of(optimizer, objective)()
        calls.append(all(torch.equal(p, b) for p, b in zip(model.parameters(), before)))
        if len(calls) == (1 if which == "first" else 2):
            model.fc.bias.grad[0] = value
        return loss

    optimizer.step(closure)
    assert calls == ([True] if which == "first" else [True, False])
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before))
    after = optimizer.state_dict()["base"]["state"]
    assert all(torch.equal(after[k]["momentum_buffer"], momentum[k]["momentum_buffer"]) for k in momentum)
    assert optimizer.skipped == 1


def test_loss_scale_does_not_change_the_radius():
    moved = []
    for scale in (1.0, 65536.0):
        model, objective = network()
        optimizer = SAM(torch.optim.SGD(model.parameters(), 0.1), 0.5)
        (scale * objective()).backward()
        optimizer.first_step()
        moved.append([p.detach() for p in model.parameters()])
    for one, other in zip(*moved):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_with_a_gradient_scaler_as_documented():
    def train(bad):
        model, objective = network()
        sam = SAM(torch.optim.SGD(model.parameters(), 0.1), 0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale(objective()).backward()
        if bad:
            model.fc.bias.grad[0] = torch.inf
        if sam.first_step():
            sam.zero_grad()
            scaler.scale(objective()).backward()
            sam.restore()
        scaler.step(sam.base_optimizer)
        scaler.update()
        return model, scaler.get_scale()

    model, objective = network()
    fresh = [p.detach().clone() for p in model.parameters()]
    sam = SAM(torch.optim.SGD(model.parameters(), 0.1), 0.1)
    sam.step(closure_of(sam, objective))
    scaled, scale = train(bad=False)
    assert scale == 1024
    for one, other in zip(scaled.parameters(), model.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    skipped, scale = train(bad=True)
    assert scale == 512
    assert all(torch.equal(p, b) for p, b in zip(skipped.parameters(), fresh))


@pytest.mark.parametrize("once", [False, True])
def test_running_statistics(once):
    model, objective = network()
    sam = SAM(torch.optim.SGD(model.parameters(), 0.1), 0.5, batch_norm_once=once, model=model)
    sam.step(closure_of(sam, objective))
    single, objective = network()
    objective()
    theirs, mine = dict(single.named_buffers()), dict(model.named_buffers())
    assert int(mine["bn1.num_batches_tracked"]) == (1 if once else 2)
    assert all(torch.equal(mine[k], theirs[k]) for k in mine) == once
    with pytest.raises(ValueError, match="`batch_norm_once` needs `model`"):
        SAM(torch.optim.SGD(model.parameters(), 0.1), batch_norm_once=True)


def test_state_round_trip_and_schedulers():
    runs = []
    for resume in (False, True):
        model, objective = network()
        sam = SAM(torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), 0.3)
        schedule = torch.optim.lr_scheduler.StepLR(sam, 1, 0.5)
        sam.step(closure_of(sam, objective))
        schedule.step()
        if resume:
            state = copy.deepcopy(sam.state_dict())
            sam = SAM(torch.optim.SGD(model.parameters(), 9.0, momentum=0.9), 0.1)
            sam.load_state_dict(state)
            assert sam.rho == 0.3
        assert sam.param_groups[0]["lr"] == sam.base_optimizer.param_groups[0]["lr"] == 0.05
        sam.step(closure_of(sam, objective))
        runs.append(model.state_dict())
    assert all(torch.equal(runs[0][k], runs[1][k]) for k in runs[0])


def test_radius_may_be_set_between_steps():
    optimizer, closure, x, _ = quadratic(rho=0.0)
    optimizer.rho = 0.5
    optimizer.step(closure)
    assert x.item() == pytest.approx(0.42111456, abs=5e-9)
    with pytest.raises(ValueError, match="`rho` must be finite and at least 0, got -1"):
        optimizer.rho = -1


def test_parameters_without_gradient_and_of_several_dtypes():
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    unused = nn.Parameter(torch.ones(4))
    sam = SAM(torch.optim.SGD([a, b, unused], 0.1), 1.0)
    (a.sum() + b.float().sum()).backward()
    assert sam.first_step()
    torch.testing.assert_close(a.detach(), torch.full((3,), 1 + 5**-0.5))
    sam.restore()
    assert torch.equal(b, torch.ones_like(b)) and torch.equal(unused, torch.ones(4))
    sam.zero_grad()
    assert not sam.first_step()


def test_a_failing_second_pass_gives_the_weights_back():
    optimizer, closure, x, _ = quadratic()
    calls = []

    def failing():
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return closure()

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(failing)
    assert x.item() == 1


def test_wrong_order_is_told():
    optimizer, closure, *_ = quadratic()
    closure()
    optimizer.first_step()
    with pytest.raises(RuntimeError, match="first_step\\(\\) came twice"):
        optimizer.first_step()
    with pytest.raises(RuntimeError, match="state_dict\\(\\) must come after second_step"):
        optimizer.state_dict()
    optimizer.restore()
    with pytest.raises(TypeError, match="`closure` must be a function"):
        optimizer.step(None)


def test_a_copy_steps_for_itself_and_leaves_others_alone():
    optimizer, closure, x, _ = quadratic()
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # wraps step() of the instance
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(copy.deepcopy(optimizer)))):
        u, v = (group["params"][0] for group in twin.param_groups)

        def theirs(twin=twin, u=u, v=v):
            twin.zero_grad()
            loss = (4 * u**2 + v**2) / 2
            loss.backward()
            return loss

        twin.step(theirs)
        assert twin.rho == 0.5 and not twin.adaptive
        assert [u.item(), v.item()] == pytest.approx([0.42111456, 1.77763932], abs=5e-9)
    assert x.item() == 1
    optimizer.step(closure)
    assert x.item() == pytest.approx(0.42111456, abs=5e-9)


def test_hooks_are_the_base_optimizers():
    optimizer, closure, *_ = quadratic()
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.register_state_dict_post_hook(lambda _, state: seen.append("kept"))
    optimizer.step(closure)
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["before", "after", "kept"]
    assert not hasattr(optimizer, "radius")


def test_restore_is_bitwise_after_the_model_was_cast_or_cut():
    weight = nn.Parameter(torch.randn(4, 3))
    sam = SAM(torch.optim.SGD([weight], 0.1), 0.5)
    for data in (weight.data, torch.randn(4, 3, dtype=torch.float64), torch.randn(1, 3)):
        weight.grad = None
        weight.data = data
        before = data.clone()
        (weight**3).sum().backward()
        assert sam.first_step()
        assert not torch.equal(weight, before)
        sam.restore()
        assert weight.dtype == before.dtype and torch.equal(weight, before)
