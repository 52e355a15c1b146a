"""The checks each op passes, from its sample table. An op without a table fails here."""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch
from torch.library import opcheck

from pyvitfast import ops, reference
from tests.ops.emulator import Emulator
from tests.ops.table import EMULATED, RecordedCalls, cloned, devices, outputs_of, to, widened

TABLES = {name: importlib.import_module(f"tests.ops.test_{name}").TABLE for name in ops.__all__}
CASES = [pytest.param(t, s, id=f"{t.op}-{s.name}") for t in TABLES.values() for s in t.samples]
TYPED = [
    pytest.param(t, s, d, id=f"{t.op}-{s.name}-{str(d).removeprefix('torch.')}")
    for t in TABLES.values()
    for s in t.samples
    for d in t.dtypes
]
BAD = [pytest.param(t, b, id=f"{t.op}-{b.name}") for t in TABLES.values() for b in t.bad_calls]
DIFFERENTIABLE = [c for c in CASES if c.values[0].inputs is not None]


def functions(table):
    return getattr(ops, table.op), getattr(reference, table.op)


def require_grad(table, args, kwargs):
    for tensor in table.inputs(args, kwargs):
        tensor.requires_grad_()
    return table.inputs(args, kwargs)


def first_error(outputs, expected, bounds):
    for index, (out, want, limit) in enumerate(zip(outputs, expected, bounds, strict=True)):
        assert out.shape == want.shape
        out, want = out.double(), want.double()
        finite = want.isfinite()
        assert torch.equal(out.isnan(), want.isnan()), f"output {index}: NaN in other places"
        assert torch.equal(out[~finite].nan_to_num(9.0), want[~finite].nan_to_num(9.0)), (
            f"output {index}: Inf"
        )
        excess = (out - want).abs()[finite] - limit[finite]
        if excess.numel() and excess.max() > 0:
            return f"output {index} is off by {excess.max().item():.3g} more than allowed"
    return None


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize(("table", "sample", "dtype"), TYPED)
def test_value(table, sample, dtype, device):
    args, kwargs = sample.make(dtype)
    wide = widened((args, kwargs))
    expected = outputs_of(table, functions(table)[1], *cloned(wide))
    outputs = outputs_of(table, functions(table)[0], *to(cloned((args, kwargs)), device))
    bounds = table.bound(args, kwargs, expected, dtype)
    problem = first_error([o.cpu() for o in outputs], expected, bounds)
    assert problem is None, problem


@pytest.mark.parametrize(("table", "sample"), CASES)
def test_uninitialised_memory_is_never_read(table, sample):
    # With deterministic algorithms torch fills fresh memory with NaN, also what C++ allocates.
    args, kwargs = sample.make(torch.float32)
    expected = outputs_of(table, functions(table)[0], *cloned((args, kwargs)))
    torch.use_deterministic_algorithms(True)
    try:
        outputs = outputs_of(table, functions(table)[0], *cloned((args, kwargs)))
    finally:
        torch.use_deterministic_algorithms(False)
    for out, want in zip(outputs, expected, strict=True):
        assert torch.equal(out.nan_to_num(9.0), want.nan_to_num(9.0))


@pytest.mark.parametrize(("table", "sample"), CASES)
def test_bits_do_not_depend_on_threads_or_runs(table, sample):
    args, kwargs = sample.make(torch.float32)
    runs = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            runs.append(outputs_of(table, functions(table)[0], *cloned((args, kwargs))))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        for first, other in zip(runs[0], run, strict=True):
            assert torch.equal(first.nan_to_num(9.0), other.nan_to_num(9.0))


@pytest.mark.parametrize(("table", "sample"), CASES)
def test_opcheck(table, sample):
    for dtype in (torch.float32, torch.float64):
        args, kwargs = sample.make(dtype)
        with RecordedCalls(table.op) as recorded:
            functions(table)[0](*cloned(args), **kwargs)
        overload = getattr(torch.ops.pyvitfast, table.op).default
        for call in recorded.calls:
            call = cloned(call)
            if table.inputs is not None:
                # An op over a list of tensors takes constants after it.
                for tensor in torch.utils._pytree.tree_leaves(call[0] if isinstance(call[0], list) else call):
                    if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                        tensor.requires_grad_()
            opcheck(overload, call)


@pytest.mark.parametrize(("table", "sample"), DIFFERENTIABLE)
def test_gradcheck(table, sample):
    args, kwargs = sample.make(torch.float64)
    if kwargs.get("abs"):
        pytest.skip("|w g| has a kink; its gradient is compared with the reference in test_gradient")
    if table.surrogate:
        pytest.skip("straight-through by design; compared with the reference in test_gradient")
    leaves = require_grad(table, args, kwargs)
    sizes = [t.numel() for t in leaves]
    fast = sum(sizes) > 200  # one random direction instead of each entry
    assert torch.autograd.gradcheck(
        lambda *_: functions(table)[0](*args, **kwargs), leaves, fast_mode=fast, check_undefined_grad=False
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("table", "sample"), DIFFERENTIABLE)
def test_gradient(table, sample, dtype):
    args, kwargs = sample.make(dtype)
    wide_args, wide_kwargs = widened((args, kwargs))
    grads = []
    upstream = None
    for function, a, k in (
        (functions(table)[1], wide_args, wide_kwargs),
        (functions(table)[0], args, kwargs),
    ):
        leaves = require_grad(table, a, k)
        out = outputs_of(table, function, a, k)
        flat = torch.cat([o.flatten() for o in out])
        if upstream is None:
            upstream = torch.randn_like(flat).to(torch.float16).to(flat.dtype)
        grads.append(torch.autograd.grad(flat, leaves, upstream.to(flat.dtype), allow_unused=True))
    unit = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10, torch.float64: 1e-13}
    for want, got, leaf in zip(*grads, table.inputs(args, kwargs), strict=True):
        assert got.dtype == leaf.dtype
        # Sums of two upstream values may cancel, so the error is relative to their size and the factor's.
        limit = (want.abs() + want.abs().amax() if want.numel() else want.abs()) * unit[
            leaf.dtype
        ] * table.gradient_slack + 1e-7
        assert ((got.double() - want).abs() <= limit).all()


@pytest.mark.parametrize(("table", "sample"), DIFFERENTIABLE[:1] + DIFFERENTIABLE[-1:])
def test_second_derivative_is_refused_by_name(table, sample):
    args, kwargs = sample.make(torch.float64)
    leaves = require_grad(table, args, kwargs)
    out = torch.cat([o.flatten() for o in outputs_of(table, functions(table)[0], args, kwargs)])
    (first, *_) = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
    with pytest.raises(NotImplementedError, match=f"{table.op}_backward: second derivatives"):
        first.sum().backward()


@pytest.mark.parametrize("table", [t for t in TABLES.values() if t.inputs is not None], ids=lambda t: t.op)
def test_gradient_for_each_subset_of_inputs(table):
    args, kwargs = table.samples[0].make(torch.float32)
    leaves = table.inputs(args, kwargs)
    for chosen in range(len(leaves)):
        for index, leaf in enumerate(leaves):
            leaf.requires_grad_(index == chosen)
        out = torch.cat([o.flatten() for o in outputs_of(table, functions(table)[0], args, kwargs)])
        assert out.requires_grad
        (grad,) = torch.autograd.grad(out.sum(), [leaves[chosen]])
        assert grad.shape == leaves[chosen].shape
    with torch.no_grad():
        assert not outputs_of(table, functions(table)[0], args, kwargs)[0].requires_grad


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("table", TABLES.values(), ids=lambda t: t.op)
def test_compile_fullgraph(table, dynamic):
    function = functions(table)[0]
    compiled = torch.compile(
        lambda a, k: function(*a, **k), fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    for sample in table.samples:
        torch._dynamo.reset()
        args, kwargs = sample.make(torch.float32)
        expected = outputs_of(table, function, *cloned((args, kwargs)))
        own_args, own_kwargs = cloned((args, kwargs))
        outputs = outputs_of(table, lambda *a, **k: compiled(a, k), own_args, own_kwargs)
        for out, want in zip(outputs, expected, strict=True):
            assert torch.equal(out.nan_to_num(9.0), want.nan_to_num(9.0)), sample.name


@pytest.mark.parametrize("table", TABLES.values(), ids=lambda t: t.op)
def test_inductor_compiles_it(table):
    torch._dynamo.reset()
    function = functions(table)[0]
    compiled = torch.compile(lambda a, k: function(*a, **k), fullgraph=True)
    args, kwargs = table.samples[0].make(torch.float32)
    expected = outputs_of(table, function, *cloned((args, kwargs)))
    own_args, own_kwargs = cloned((args, kwargs))
    outputs = outputs_of(table, lambda *a, **k: compiled(a, k), own_args, own_kwargs)
    for out, want in zip(outputs, expected, strict=True):
        assert torch.equal(out, want)


@pytest.mark.parametrize("table", TABLES.values(), ids=lambda t: t.op)
def test_growing_a_size_does_not_recompile_without_end(table):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    function = functions(table)[0]
    compiled = torch.compile(lambda a, k: function(*a, **k), fullgraph=True, backend=counter)
    for size in (5, 6, 7, 8, 9, 10):
        args, kwargs = grown(table.op, size)
        compiled(args, kwargs)
    assert counter.frame_count <= 3


def grown(op, size):
    if op == "linear_cross_attention":
        return (torch.randn(size, 8), torch.randn(size, size + 1, 8), *torch.randn(4, 8, 8)), {"num_heads": 2}
    if op == "semantic_pool_attention":
        # Few enough queries for the absorbed form at all sizes.
        return (torch.randn(size, 1, 8), torch.randn(size, 20, 8), *torch.randn(4, 8, 8)), {"num_heads": 2}
    if op == "two_head_loss":
        labels = torch.zeros(size, dtype=torch.int64)
        return (torch.randn(size, 6), torch.randn(size, 6), labels, labels), {}
    if op == "adaptive_window_pool":
        return (torch.randn(size, 6, 7, 4), (3, 3), "learned", torch.randn(size, 9, 2, 3)), {}
    if op == "few_query_attention":
        return (torch.randn(size, 2, 3, 4), *torch.randn(2, size, 2, size + 1, 4)), {}
    if op == "window_gather_attention":
        return (
            torch.randn(size, 2, 2, 3, 1, 4),
            *torch.randn(2, size, size, size, 1, 4),
            (3, 3),
            (2, 2),
            (0, 0),
        ), {}
    if op == "tensor_ring_grow":
        cores = [torch.randn(1, 2, 3, 2), torch.randn(2, size, size, 1), torch.randn(1, 2, 2, 1)]
        return (torch.randn(2, 2, size, size), *cores, torch.randn(1, size, size, 1)), {}
    if op == "kron_grow":
        shapes = ((1, 2, size, size), (size, size), (size, size), (1, 3, 2))
        return tuple(torch.randn(shape) for shape in shapes), {}
    w = torch.randn(size, 2 * size)
    alive = torch.rand(size) > 0.5
    index = torch.arange(size - 1)
    if op == "saliency_rowcol":
        return ([w], [w.clone()]), {}
    if op == "saliency_commit_":
        indptr = torch.arange(size + 1)
        return (
            torch.zeros(size),
            torch.zeros(2, dtype=torch.int64),
            torch.randn(size),
            indptr,
            indptr[:-1],
        ), {}
    scale, norm = torch.tensor(0.5), torch.tensor(2.0, dtype=torch.float64)
    if op == "scaled_sqnorm":
        return ([w], [scale]), {}
    if op == "fake_quantize":
        return ([w], [scale]), {"bits": 2}
    if op == "spsa_perturb":
        return ([w], [w.clone()], [scale], norm), {
            "seed": 3,
            "one_minus_beta": 0.5,
            "eps_bar": 0.3,
            "bits": 2,
        }
    if op == "spsa_update_":
        return ([w], [scale], torch.ones(2), norm), {"seed": 3, "one_minus_beta": 0.5}
    if op == "structured_zero_":
        return ([w], [alive], [None]), {}
    if op == "structured_gather":
        return ([w], [index], [None]), {}
    raise AssertionError(f"{op}: give `grown` a call whose first size varies")


class Module(torch.nn.Module):
    def __init__(self, table, kwargs):
        super().__init__()
        self.table, self.kwargs = table, kwargs

    def forward(self, args):
        return outputs_of(self.table, functions(self.table)[0], args, self.kwargs)


@pytest.mark.parametrize("table", TABLES.values(), ids=lambda t: t.op)
def test_export_with_a_dynamic_size(table):
    args, kwargs = grown(table.op, 5)
    size = torch.export.Dim.AUTO
    spec = torch.utils._pytree.tree_map(
        lambda t: (
            dict.fromkeys(range(t.ndim), size) if isinstance(t, torch.Tensor) and t.numel() > 2 else None
        ),
        args,
    )
    program = torch.export.export(Module(table, kwargs), (cloned(args),), dynamic_shapes=(spec,))
    other, kwargs = grown(table.op, 9)
    expected = outputs_of(table, functions(table)[0], *cloned((other, kwargs)))
    outputs = program.module()(cloned(other))
    for out, want in zip(outputs, expected, strict=True):
        assert torch.equal(out, want)


@pytest.mark.parametrize(("table", "bad"), BAD)
def test_bad_input_is_named(table, bad):
    args, kwargs = bad.make()
    with pytest.raises(bad.error, match=bad.match) as caught:
        functions(table)[0](*args, **kwargs)
    assert str(caught.value).startswith(f"{table.op}: ")


@pytest.mark.parametrize(("table", "sample"), CASES)
def test_autocast_changes_nothing_but_the_dtype_where_it_must(table, sample):
    args, kwargs = sample.make(torch.float32)
    expected = outputs_of(table, functions(table)[0], *cloned((args, kwargs)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = outputs_of(table, functions(table)[0], *cloned((args, kwargs)))
    for out, want in zip(outputs, expected, strict=True):
        want = want.to(torch.bfloat16) if table.casts else want
        assert out.dtype == want.dtype
        assert torch.equal(out.nan_to_num(9.0), want.nan_to_num(9.0))


@pytest.mark.parametrize("table", TABLES.values(), ids=lambda t: t.op)
def test_docstring_example_runs(table):
    import doctest

    import pyvitfast

    function = functions(table)[0]
    found = doctest.DocTestFinder().find(function, table.op, globs={"torch": torch, "pyvitfast": pyvitfast})
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for example in found:
        runner.run(example)
    assert runner.tries > 0
    assert runner.failures == 0


@pytest.mark.parametrize("table", TABLES.values(), ids=lambda t: t.op)
def test_reference_has_the_same_signature(table):
    op, ref = functions(table)
    assert str(inspect.signature(op)) == str(inspect.signature(ref))


@pytest.mark.parametrize("table", TABLES.values(), ids=lambda t: t.op)
def test_fake_gives_shape_dtype_device_and_strides_of_the_result(table):
    from torch._subclasses.fake_tensor import FakeTensorMode

    for sample in table.samples:
        for dtype in table.dtypes:
            args, kwargs = sample.make(dtype)
            real = outputs_of(table, functions(table)[0], *cloned((args, kwargs)))
            with FakeTensorMode(allow_non_fake_inputs=False) as mode:
                fake_args = torch.utils._pytree.tree_map(
                    lambda v: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v, (args, kwargs)
                )
                fakes = outputs_of(table, functions(table)[0], *fake_args)
            for fake, out in zip(fakes, real, strict=True):
                assert (fake.shape, fake.dtype, fake.device, fake.stride()) == (
                    out.shape,
                    out.dtype,
                    out.device,
                    out.stride(),
                )


@pytest.mark.skipif(not EMULATED, reason="orders belong to the emulated backend")
@pytest.mark.parametrize("order", ["reverse", "random"])
@pytest.mark.parametrize(("table", "sample"), CASES)
def test_order_of_threads_changes_no_bit(table, sample, order):
    args, kwargs = sample.make(torch.float32)
    expected = outputs_of(table, functions(table)[0], *cloned((args, kwargs)))
    emulator = Emulator()
    emulator.configure("ORDER", order)
    emulator.configure("RACECHECK", "1")
    try:
        outputs = outputs_of(table, functions(table)[0], *cloned((args, kwargs)))
    finally:
        emulator.configure("ORDER", "")
        emulator.configure("RACECHECK", "")
    for out, want in zip(outputs, expected, strict=True):
        assert torch.equal(out.nan_to_num(9.0), want.nan_to_num(9.0))
