"""The fusion stage on the op: when it runs, when it steps aside, and what it leaves untouched."""

from __future__ import annotations

import copy
import warnings

import pytest
import timm
import torch
from timm.models.crossvit import CrossVit, MultiScaleBlock
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

import pyvitfast as vf
from pyvitfast import ops
from pyvitfast.models import LinearMultiScaleBlock, accelerate
from tests.methods.test_crossvit import SMALL, shaken

FUSIONS = 2 * len(SMALL["depth"])


@pytest.fixture
def pair():
    """timm's model and an accelerated copy, in double precision."""

    def make(**changes: object) -> tuple[CrossVit, CrossVit]:
        torch.manual_seed(0)
        theirs = shaken(CrossVit(**{**SMALL, **changes}), 0.2).double()
        ours = copy.deepcopy(theirs)
        accelerate(ours)
        return theirs, ours

    return make


@pytest.fixture
def images():
    return torch.randn(3, 3, 30, 30, dtype=torch.float64)


@pytest.fixture
def calls(monkeypatch):
    """Batch sizes of the calls of the op."""
    seen: list[torch.Size] = []
    real = ops.linear_cross_attention

    def counted(query: Tensor, tokens: Tensor, *args: object, **kwargs: object) -> Tensor:
        seen.append(tokens.shape)
        return real(query, tokens, *args, **kwargs)

    monkeypatch.setattr(ops, "linear_cross_attention", counted)
    return seen


class Copies(TorchDispatchMode):
    """Counts stores into existing tensors."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.copy_.default
        return func(*args, **(kwargs or {}))


def stores(model, x):
    with Copies() as mode:
        model(x)
    return mode.count


class TestAccelerate:
    def test_on_and_off_touch_nothing_else(self, pair, images):
        theirs, model = pair(depth=((1, 2, 0), (1, 2, 1)))
        accelerate(model, enable=False)
        parameters = dict(model.named_parameters())
        before = {name: p.detach().clone() for name, p in parameters.items()}
        seen = []
        handle = model.blocks[0].register_forward_hook(lambda *_: seen.append(1))
        modules = list(model.modules())
        model.train()
        report = accelerate(model)
        assert (report.blocks, report.changed, report.enabled) == (2, 2, True)
        assert [type(b) for b in model.blocks] == [LinearMultiScaleBlock] * 2
        assert accelerate(model).changed == 0
        assert model.training
        assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
        model(images)
        assert seen == [1]
        report = accelerate(model, enable=False)
        assert (report.changed, report.enabled) == (2, False)
        assert accelerate(model, enable=False).changed == 0
        assert [type(b) for b in model.blocks] == [MultiScaleBlock] * 2
        handle.remove()
        assert all(
            p is parameters[name] and torch.equal(p, before[name]) for name, p in model.named_parameters()
        )
        assert torch.equal(model.eval()(images), theirs(images))

    def test_report_counts(self):
        with torch.device("meta"):
            model = timm.create_model("crossvit_15_240")
        report = accelerate(model)
        assert report.macs_before == vf.models.CrossViTConfig.from_model(model).macs(folded=False)
        assert report.macs_after == vf.summary(model).macs
        assert str(report) == (
            "3 of 3 multi-scale encoders changed, all run on linear_cross_attention; "
            f"MACs/image {report.macs_before:,} -> {report.macs_after:,}"
        )
        assert "timm's cross-attention" in str(accelerate(model, enable=False))

    def test_a_model_that_cannot_be_counted(self, pair):
        _, model = pair()
        model.extra = nn.Linear(2, 2)
        report = accelerate(nn.Sequential(model), enable=False)
        assert (report.changed, report.macs_before, report.macs_after) == (2, None, None)
        assert "MACs" not in str(report)

    def test_wrapped_models(self, pair, images):
        theirs, ours = pair()
        accelerate(ours, enable=False)
        compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
        for enable in (True, False, True):
            assert accelerate(compiled, enable).changed == 2
            torch.testing.assert_close(compiled(images), theirs(images), rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize(
        "make", [lambda: timm.create_model("vit_micro_patch2_8"), lambda: nn.Linear(2, 2)]
    )
    def test_no_match_is_an_error(self, make):
        with pytest.raises(TypeError, match="`model` must hold timm's MultiScaleBlock"):
            accelerate(make())
        with pytest.raises(TypeError, match=r"`model` must be an nn\.Module, got str"):
            accelerate("crossvit_9_240")

    def test_a_subclass_of_timms_encoder_is_left_alone(self, pair):
        theirs, _ = pair()

        class Own(MultiScaleBlock):
            pass

        for block in theirs.blocks:
            block.__class__ = Own
        with pytest.raises(TypeError, match="Subclasses"):
            accelerate(theirs)


class TestTheOpRuns:
    @pytest.mark.parametrize("training", [False, True])
    def test_once_a_direction(self, pair, images, calls, training):
        theirs, ours = pair()
        torch.testing.assert_close(ours.train(training)(images), theirs(images), rtol=1e-12, atol=1e-12)
        assert [tuple(shape) for shape in calls] == [(3, 16, 24), (3, 25, 16)] * 2

    @pytest.mark.parametrize("fusions", [1, 3])
    def test_in_the_first_module_of_a_sequential(self, pair, images, calls, fusions):
        theirs, ours = pair(depth=((1, 2, fusions),) * 2)
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-12, atol=1e-12)
        assert len(calls) == FUSIONS

    def test_without_biases_and_without_a_norm_bias(self, pair, images, calls):
        theirs, _ = pair(qkv_bias=False)
        for block in theirs.blocks:
            for fusion in block.fusion:
                fusion.norm1.bias = None
        ours = copy.deepcopy(theirs)
        accelerate(ours)
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-12, atol=1e-12)
        assert len(calls) == FUSIONS

    def test_hooks_on_what_is_still_called(self, pair, images, calls):
        theirs, ours = pair(proj_drop_rate=0.3, drop_path_rate=0.3)
        shapes = []
        for model in (theirs, ours):
            seen = []
            shapes.append(seen)
            for part in (model.blocks[1].projs[0], model.blocks[1].fusion[0].attn.proj_drop):
                part.register_forward_hook(lambda m, i, o, seen=seen: seen.append(o.shape) or 2 * o)
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-12, atol=1e-12)
        assert shapes[0] == shapes[1]
        assert len(calls) == FUSIONS

    @pytest.mark.parametrize("enable", [False, True])
    def test_autocast_gives_timms_dtypes(self, enable):
        theirs = shaken(CrossVit(**SMALL), 0.1)
        ours = copy.deepcopy(theirs)
        accelerate(ours)
        x = torch.randn(3, 3, 30, 30)
        with torch.autocast("cpu", torch.bfloat16, enabled=enable), torch.no_grad():
            for a, b in zip(ours.forward_features(x), theirs.forward_features(x), strict=True):
                assert a.dtype == b.dtype == torch.float32
                # Two encoders of bfloat16 products, 2^-9 each, on normalised tokens of order 1.
                torch.testing.assert_close(a, b, rtol=0, atol=5e-2 if enable else 1e-5)
            assert ours(x).dtype == theirs(x).dtype

    def test_autocast_gives_the_op_the_residual_streams_type(self, monkeypatch):
        seen = []
        real = ops.linear_cross_attention

        def watched(query, tokens, *args, **kwargs):
            seen.append((query.dtype, tokens.dtype))
            return real(query, tokens, *args, **kwargs)

        monkeypatch.setattr(ops, "linear_cross_attention", watched)
        model = shaken(CrossVit(**SMALL))
        accelerate(model)
        with torch.autocast("cpu", torch.bfloat16):
            model(torch.randn(2, 3, 30, 30))
        assert set(seen) == {(torch.float32, torch.float32)}

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_low_precision_models(self, dtype):
        theirs = shaken(CrossVit(**SMALL), 0.1).to(dtype)
        ours = copy.deepcopy(theirs)
        accelerate(ours)
        x = torch.randn(3, 3, 30, 30).to(dtype)
        found, expected = ours(x), theirs(x)
        assert found.dtype == dtype
        # Either is up to 0.012 (bfloat16) or 0.002 (float16) from float64 over 30 draws, logits of order 1.
        torch.testing.assert_close(found, expected, rtol=0, atol=0.025 if dtype == torch.bfloat16 else 0.004)

    def test_reference_without_a_library(self, pair, images, monkeypatch):
        theirs, ours = pair()
        monkeypatch.setattr(ops.STATUS, "loaded", [])
        ops._reference.cache_clear()
        with pytest.warns(
            RuntimeWarning, match="linear_cross_attention runs on the plain-torch reference"
        ) as told:
            found = [ours(images) for _ in range(2)]
        assert len(told) == 1
        assert torch.equal(*found)
        torch.testing.assert_close(found[0], theirs(images), rtol=1e-12, atol=1e-12)
        ops._reference.cache_clear()
        compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            torch.testing.assert_close(compiled(images), theirs(images), rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("strict", [False, True])
    def test_export_with_any_batch(self, pair, images, strict):
        theirs, ours = pair()
        shapes = ({0: torch.export.Dim("batch")},)
        program = torch.export.export(ours, (images,), dynamic_shapes=shapes, strict=strict)
        for count in (1, 3):
            found = program.module()(images[:count])
            torch.testing.assert_close(found, theirs(images[:count]), rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("fusions", [0, 2])
    def test_compiled_training_step(self, pair, images, fusions):
        theirs, ours = pair(depth=((1, 2, fusions),) * 2)
        compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
        for model in (theirs, compiled):
            model(images).square().sum().backward()
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-11, atol=1e-12, msg=name)

    def test_functional_call(self, pair, images):
        theirs, ours = pair()
        found = torch.func.functional_call(ours, dict(ours.named_parameters()), (images,))
        torch.testing.assert_close(found, theirs(images), rtol=1e-12, atol=1e-12)


class Added(nn.Linear):
    """As low-rank adapters do: a linear layer and something more."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.5 * x


class Own(Tensor):
    """As compressed weights are: a tensor of a class of its own."""


def adapter(fusion, part):
    old = fusion.attn.get_submodule(part)
    new = Added(old.in_features, old.out_features, dtype=torch.float64)
    new.load_state_dict(old.state_dict())
    setattr(fusion.attn, part, new)


def own_norm(fusion):
    class Other(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    fusion.norm1.__class__ = Other


def own_forward(fusion):
    plain = fusion.attn.wk.forward
    fusion.attn.wk.forward = lambda x: 2 * plain(x)


def own_weight(fusion):
    weight = fusion.attn.wv.weight
    fusion.attn.wv.weight = nn.Parameter(weight.detach().as_subclass(Own))


def no_affine(fusion):
    fusion.norm1 = nn.LayerNorm(fusion.norm1.normalized_shape, 1e-6, elementwise_affine=False)


def hook(part, kind):
    def change(fusion):
        module = fusion.get_submodule(part) if part else fusion
        if kind == "pre":
            module.register_forward_pre_hook(lambda m, x: (x[0] + x[0].roll(1, -1),))
        elif kind == "forward":
            module.register_forward_hook(lambda m, x, y: y + y.roll(1, -1))
        elif kind == "backward":
            module.register_full_backward_hook(lambda m, gx, gy: (1.5 * gx[0],))
        else:
            module.register_full_backward_pre_hook(lambda m, gy: (1.5 * gy[0],))

    return change


CHANGES = {
    **{f"adapter on {part}": lambda f, part=part: adapter(f, part) for part in ("wq", "wk", "wv", "proj")},
    "another norm": own_norm,
    "norm without weight": no_affine,
    "another forward": own_forward,
    "weight of another class": own_weight,
    "parametrized": lambda f: parametrizations.weight_norm(f.attn.wk),
    "another attention": lambda f: setattr(f, "attn", nn.Sequential(f.attn, nn.Tanh())),
    "another dropout": lambda f: setattr(f.attn, "attn_drop", nn.Threshold(0.05, 0.0)),
    **{
        f"{kind} hook on {part or 'fusion'}": hook(part, kind)
        for part in ("", "norm1", "attn", "attn.wq", "attn.wk", "attn.wv", "attn.proj", "attn.attn_drop")
        for kind in ("pre", "forward", "backward", "backward pre")
    },
}


class TestItStepsAside:
    @pytest.mark.parametrize("change", CHANGES)
    @pytest.mark.parametrize("fusions", [0, 2])
    def test_for_that_fusion_only(self, pair, images, calls, change, fusions):
        models = pair(depth=((1, 2, fusions), (1, 2, fusions)))
        plain = models[0](images)
        for model in models:
            fusion = model.blocks[1].fusion[0]
            CHANGES[change](fusion[0] if fusions else fusion)
            model.zero_grad()
            model.logits = model(images)
            model.logits.square().sum().backward()
        theirs, ours = models
        assert len(calls) == FUSIONS - 1
        torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-12, atol=1e-12)
        for (name, a), b in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
            torch.testing.assert_close(a.grad, b[1].grad, rtol=1e-10, atol=1e-12, msg=name)
        # The change is one that a shortcut would have lost.
        if "backward" not in change and change not in ("weight of another class", "parametrized"):
            assert not torch.allclose(theirs.logits, plain)

    def test_for_a_hook_on_the_sequential(self, pair, images, calls):
        models = pair(depth=((1, 2, 2),) * 2)
        for model in models:
            model.blocks[0].fusion[1].register_forward_hook(lambda m, x, y: 2 * y)
        torch.testing.assert_close(models[1](images), models[0](images), rtol=1e-12, atol=1e-12)
        assert len(calls) == FUSIONS - 1

    def test_for_attention_dropout_in_training_only(self, pair, images, calls):
        models = pair(attn_drop_rate=0.5)
        for model in models:
            torch.manual_seed(5)
            model.train()
            model.logits = model(images)
        torch.testing.assert_close(models[1].logits, models[0].logits, rtol=1e-12, atol=1e-12)
        assert calls == []
        models[1].eval()(images)
        assert len(calls) == FUSIONS


class TestInPlace:
    """In inference the class token is stored into row 0, where nobody else can see that tensor."""

    def test_only_without_gradients(self, pair, images):
        _, ours = pair()
        assert stores(ours, images) == 0
        with torch.no_grad():
            assert stores(ours, images) == FUSIONS
        with torch.inference_mode():
            assert stores(ours, images) == FUSIONS

    def test_tensors_made_in_inference_mode(self, pair):
        theirs, ours = pair()
        with torch.inference_mode():
            x = torch.randn(2, 3, 30, 30, dtype=torch.float64)
            ours.load_state_dict(theirs.state_dict(), assign=True)
            ours.requires_grad_(False)
            expected = ours(x)
        with torch.no_grad():
            torch.testing.assert_close(ours(x), expected, rtol=1e-12, atol=1e-12)

    def test_frozen_weights_with_gradients_on_are_copied(self, pair, images):
        _, ours = pair()
        assert stores(ours.requires_grad_(False), images) == 0

    def test_not_where_a_hook_may_hold_the_tensor(self, pair, images):
        for place in (lambda b: b.blocks[0], lambda b: b.blocks[0][-1]):
            theirs, ours = pair()
            kept = []
            place(ours.blocks[0]).register_forward_hook(
                lambda m, x, y, kept=kept: kept.append((y, y.clone()))
            )
            with torch.no_grad():
                assert stores(ours, images) == FUSIONS - 1
                torch.testing.assert_close(ours(images), theirs(images), rtol=1e-12, atol=1e-12)
            assert all(torch.equal(held, copied) for held, copied in kept)

    def test_not_under_a_hook_on_all_modules(self, pair, images):
        _, ours = pair()
        handle = nn.modules.module.register_module_forward_hook(lambda m, x, y: None)
        try:
            with torch.no_grad():
                assert stores(ours, images) == 0
        finally:
            handle.remove()

    def test_not_into_the_callers_tensor(self, images):
        config = vf.models.CrossViTConfig(**{**SMALL, "depth": ((0, 1, 0),)})
        block = shaken(config.build()).blocks[0]
        x = [torch.randn(2, n, c) for n, c in zip(config.tokens(), config.embed_dim)]
        kept = [t.clone() for t in x]
        with torch.no_grad():
            assert stores(block, x) == 1
        assert all(map(torch.equal, x, kept))

    def test_not_after_a_block_of_another_class(self, pair, images):
        theirs, ours = pair()
        held = []

        class Holds(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                held.append(x)
                return x

        for model in (theirs, ours):
            model.blocks[0].blocks[1].append(Holds())
        with torch.no_grad():
            expected = theirs(images)
            kept = held.pop().clone()
            torch.testing.assert_close(ours(images), expected, rtol=0, atol=1e-12)
            assert torch.equal(held[0], kept)

    def test_not_where_it_would_lose_precision(self):
        config = vf.models.CrossViTConfig(**SMALL)
        block = shaken(config.build()).blocks[0].bfloat16()
        block.revert_projs.double()
        for revert in block.revert_projs:
            revert.register_forward_pre_hook(lambda m, y: (y[0].double(),))
        x = [torch.randn(2, n, c).bfloat16() for n, c in zip(config.tokens(), config.embed_dim)]
        with torch.no_grad():
            assert [t.dtype for t in block(x)] == [torch.float64] * 2


class TestInvariants:
    @pytest.fixture
    def encoder(self, pair):
        """An encoder without blocks of its own, so that its input is what is fused."""
        model = pair()[1]
        block = model.blocks[0]
        block.blocks = nn.ModuleList([nn.Sequential(), nn.Sequential()])
        tokens = [torch.randn(2, n, c, dtype=torch.float64) for n, c in ((26, 16), (17, 24))]
        return block, tokens

    @pytest.mark.parametrize("grad", [False, True])
    def test_patches_pass_unchanged(self, pair, grad):
        block = pair()[1].blocks[0]
        tokens = [torch.randn(2, n, c, dtype=torch.float64) for n, c in ((26, 16), (17, 24))]
        with torch.set_grad_enabled(grad):
            own = [b(t) for b, t in zip(block.blocks, tokens)]
            for new, old in zip(block(tokens), own):
                assert torch.equal(new[:, 1:], old[:, 1:])
                assert not torch.allclose(new[:, 0], old[:, 0])

    def test_without_output_projection_only_f_and_g_are_left(self, encoder):
        block, (a, b) = encoder
        for fusion in block.fusion:
            nn.init.zeros_(fusion.attn.proj.weight)
            nn.init.zeros_(fusion.attn.proj.bias)
        new_a, new_b = block([a, b])
        expected = block.revert_projs[0](block.projs[0](a[:, 0]))
        torch.testing.assert_close(new_a[:, 0], expected, rtol=1e-12, atol=1e-12)
        expected = block.revert_projs[1](block.projs[1](b[:, 0]))
        torch.testing.assert_close(new_b[:, 0], expected, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("branch", [0, 1])
    def test_each_direction_reads_its_class_token_and_the_others_patches(self, encoder, branch):
        block, tokens = encoder
        first = block(tokens)
        # The other branch's class token has no part; its patches have, and one's own patches have not.
        for rows, seen, changed in ((slice(0, 1), 1 - branch, False), (slice(1, 2), 1 - branch, True)):
            other = [t.clone() for t in tokens]
            other[seen][:, rows] += torch.randn_like(other[seen][:, rows])
            again = block(other)
            assert torch.equal(first[branch][:, 0], again[branch][:, 0]) is not changed
        other = [t.clone() for t in tokens]
        other[branch][:, 1:] += torch.randn_like(other[branch][:, 1:])
        assert torch.equal(first[branch][:, 0], block(other)[branch][:, 0])

    def test_key_bias_has_no_effect(self, pair, images):
        _, ours = pair()
        before = ours(images)
        for block in ours.blocks:
            for fusion in block.fusion:
                fusion.attn.wk.bias.data += 3
        torch.testing.assert_close(ours(images), before, rtol=1e-10, atol=1e-10)


class TestExport:
    @pytest.mark.parametrize("suffix", ["pt2", "onnx"])
    def test_the_file_needs_no_pyvitfast(self, suffix, tmp_path):
        if suffix == "onnx":
            pytest.importorskip("onnxscript")
            pytest.importorskip("onnxruntime")
        model = shaken(timm.create_model("linear_crossvit_micro_8"), 0.1)
        path = tmp_path / f"m.{suffix}"
        report = vf.models.export(model, path)
        assert report.max_error <= 1e-4
        assert [type(b) for b in model.blocks] == [LinearMultiScaleBlock] * 2
        assert b"linear_cross_attention" not in path.read_bytes()
        if suffix == "pt2":
            graph = torch.export.load(path).graph
            assert not [n for n in graph.nodes if "pyvitfast" in str(n.target)]
