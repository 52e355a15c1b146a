"""Exported files against the model, run by onnxruntime and torch.export on images of the test's own."""

import importlib.util
import sys

import numpy as np
import pytest
import timm
import torch

import pyvitfast as vf
from pyvitfast.models import export
from pyvitfast.prune import NViTPruner, sparsify

onnxruntime = pytest.importorskip("onnxruntime")
# The package holds the function under the module's name.
module = sys.modules["pyvitfast.models.export"]


def compacted(micro, **changes):
    model = micro(**changes)
    pruner = NViTPruner(model, target=0.5, groups_per_step=8)
    generator = torch.Generator().manual_seed(0)
    while not pruner.done:
        pruner.prune_once(torch.rand(pruner.table.count, generator=generator))
    slim = pruner.compact().eval()
    assert len({(b.heads, b.qk_dim, b.v_dim, b.mlp) for b in pruner.dims.blocks}) > 1
    return slim


MODELS = {
    "compacted": lambda micro: compacted(micro, depth=2),
    "compacted, distilled": lambda micro: compacted(micro, distilled=True, depth=2),
    "nvit_revit_tiny": lambda micro: timm.create_model("nvit_revit_tiny", img_size=32, num_classes=5),
}


@pytest.fixture
def model(request, micro):
    torch.manual_seed(0)
    made = MODELS[request.param](micro).eval()
    for parameter in made.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return made


every_model = pytest.mark.parametrize("model", MODELS, indirect=True)


def images(model, count):
    return torch.randn(count, *vf.summary(model).input_size, generator=torch.Generator().manual_seed(count))


def logits(path, x):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (name,) = [i.name for i in session.get_inputs()]
    assert (name, [o.name for o in session.get_outputs()]) == ("images", ["logits"])
    return torch.from_numpy(session.run(None, {name: x.numpy()})[0])


@every_model
def test_compiles_as_one_graph(model):
    x = images(model, 2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["compacted"], indirect=True)
def test_inductor_takes_a_compacted_model_whole(model):
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, dynamic=True)
        for count in (2, 5):
            x = images(model, count)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


@every_model
def test_onnx_of_any_batch_from_a_loaded_checkpoint(model, tmp_path):
    vf.save(model, tmp_path / "m.safetensors")
    report = export(vf.load(tmp_path / "m.safetensors"), tmp_path / "m.onnx")
    assert (report.format, report.runtime, report.batch_size) == ("onnx", "onnxruntime", None)
    assert report.max_error < 1e-4
    assert report.size == (tmp_path / "m.onnx").stat().st_size
    spread = model(images(model, 5)).std(dim=0).min()
    assert spread > 1e-2, "logits that are alike would prove nothing"
    for count in (1, 2, 5):
        x = images(model, count)
        torch.testing.assert_close(logits(tmp_path / "m.onnx", x), model(x), rtol=1e-4, atol=1e-4)


@every_model
def test_pt2_of_any_batch(model, tmp_path):
    report = export(model, tmp_path / "m.pt2")
    assert (report.format, report.runtime) == ("pt2", "torch.export")
    run = torch.export.load(tmp_path / "m.pt2").module()
    for count in (1, 2, 5):
        x = images(model, count)
        torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-4)


def test_fixed_batch_and_a_sparse_model(micro, tmp_path):
    model, report = sparsify(micro(depth=2).train())
    written = export(model, tmp_path / "m.onnx", batch_size=3)
    assert model.training and next(model.parameters()).requires_grad
    x = images(model, 3)
    torch.testing.assert_close(logits(tmp_path / "m.onnx", x), model.eval()(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(Exception, match="images"):
        logits(tmp_path / "m.onnx", images(model, 2))
    assert "takes 3 1x8x8 images; onnxruntime differs from the model by at most" in str(written)
    import onnx

    graph = onnx.load(tmp_path / "m.onnx").graph
    held = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
    mask = report.masks["blocks.0.mlp.fc1.weight"].numpy()
    assert any(a.shape in (mask.shape, mask.T.shape) and (a == 0).mean() == 0.5 for a in held.values())
    assert np.isclose(mask.mean(), 0.5)


def test_half_precision_goes_to_pt2_only(micro, tmp_path):
    model = micro(depth=1).bfloat16()
    assert export(torch.compile(model), tmp_path / "m.pt2", batch_size=2).max_error == 0.0
    with pytest.raises(ValueError, match="`model` must be float32 for ONNX, got bfloat16 in cls_token"):
        export(model, tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("m.pth",), "`path` must end in .onnx or .pt2, got 'm.pth'"),
        (("m.pt2", "onnx"), "`path` must end in .onnx for that format, got 'm.pt2'"),
        (("m.onnx", "torchscript"), "`format` must be onnx or pt2, got 'torchscript'"),
        (("m.onnx", None, 0), "`batch_size` must be at least 1 or None, got 0"),
    ],
)
def test_bad_arguments(arguments, message, micro, tmp_path):
    with pytest.raises(ValueError, match=message):
        export(micro(), tmp_path / arguments[0], *arguments[1:])


def test_missing_folder_and_compressed_weights(micro, tmp_path):
    with pytest.raises(FileNotFoundError, match="the folder of `path` must exist"):
        export(micro(), tmp_path / "no" / "m.onnx")

    class Packed(torch.Tensor):
        pass

    model = micro()
    model.register_buffer("packed", torch.zeros(2).as_subclass(Packed))
    with pytest.raises(NotImplementedError, match="must hold plain tensors, got a Packed in packed"):
        export(model, tmp_path / "m.pt2")


@pytest.mark.parametrize("wrong", [0.5, float("nan")])
def test_other_logits_are_an_error_and_leave_the_old_file(wrong, micro, tmp_path, monkeypatch):
    model = micro().eval()
    target = tmp_path / "m.pt2"
    target.write_text("old")

    def shifted(model, x, shapes):
        def run(x):
            out = model(x)
            out[-1, 3] += wrong
            return out

        return b"", run

    monkeypatch.setattr(module, "_pt2", shifted)
    with pytest.raises(RuntimeError, match=r"must equal the model's within 0\.0001, got a difference of"):
        export(model, target)
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt2"]


def test_missing_packages(micro, tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        module.importlib.util, "find_spec", lambda name: None if name.startswith("onnx") else real(name)
    )
    with pytest.raises(ImportError, match=r"not installed, onnx and onnxscript: pip install 'pyvitfast\["):
        export(micro(), tmp_path / "m.onnx")


class AdaptiveMax(torch.nn.Module):
    """A layer that torch's ONNX exporter has no form of."""

    def forward(self, x):
        return torch.nn.functional.adaptive_max_pool2d(x, 3)


def test_what_onnx_has_not_is_named(micro, tmp_path):
    model = micro().eval()
    model.patch_embed.proj = torch.nn.Sequential(model.patch_embed.proj, AdaptiveMax(), torch.nn.Upsample(4))
    with pytest.raises(NotImplementedError, match=r"aten.adaptive_max_pool2d has no form .* \.pt2 instead"):
        module._onnx(model, torch.zeros(1, 1, 8, 8), None)


def test_without_onnxruntime_the_report_says_what_was_not_checked(micro, tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        module.importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else real(name)
    )
    report = export(micro(depth=1), tmp_path / "m.onnx")
    assert (report.runtime, report.max_error) == (None, None)
    assert "takes any number of 1x8x8 images; not compared with the model" in str(report)
