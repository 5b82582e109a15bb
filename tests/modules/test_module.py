"""The modules against the models that they replace: construction, evaluation, training, and where PyTorch's ops must run."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import error
from fused_conv_bn import ConvBnScale2d
from fused_conv_bn.reference import ACTIVATIONS
from module_pairs import (
    BN,
    FUSED,
    WITH_LAYOUTS,
    Ops,
    Plain,
    Row,
    assert_fused,
    check,
    dtypes,
    models,
    ops_of,
    randomize,
    residual_of,
    row_cases,
    rows,
    sample,
    trained_row_cases,
)

# ---- construction ----------------------------------------------------------------------------------------------------


@row_cases
def test_constructor_and_state_dict_are_those_of_the_plain_model(
    row: Row, case: str, arguments: dict[str, Any]
) -> None:
    arguments = {**row.arguments, "scaling_factor": 2.0, **arguments}
    positional = [arguments.pop(name) for name in (*row.arguments, "scaling_factor")]
    torch.manual_seed(3)
    plain, plain_next = Plain(*positional, row=row, **arguments), torch.rand(1)
    torch.manual_seed(3)
    ours, ours_next = row.of(*positional, **arguments), torch.rand(1)
    assert torch.equal(plain_next, ours_next), "the constructors draw different numbers of random numbers"
    mine, theirs = ours.state_dict(), plain.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert ours.load_state_dict(theirs, strict=True) == plain.load_state_dict(mine, strict=True)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert repr(getattr(ours, row.name)) == repr(getattr(plain, row.name)) and repr(ours.bn) == repr(plain.bn)


@rows
def test_constructor_passes_device_and_dtype(row: Row) -> None:
    module = row.of(**row.arguments, device="meta", dtype=torch.float16)
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.float16)}
    assert module.bn.running_var.dtype == torch.float16
    assert module.eval()(torch.empty(row.size, device="meta", dtype=torch.float16)).shape == row.result


def test_parameter_as_scaling_factor_is_registered() -> None:
    module = ConvBnScale2d(4, 6, 3, nn.Parameter(torch.tensor(2.0)))
    assert "scaling_factor" in module.state_dict()
    assert module.eval()(torch.randn(1, 4, 9, 8)).requires_grad


@rows
def test_constructor_refuses(row: Row) -> None:
    with pytest.raises(ValueError, match=r"activation is 'selu', expected one of 'none', 'relu'"):
        row.of(**row.arguments, activation="selu")
    with pytest.raises(ValueError, match=r"activation is PReLU\(.*, expected one of 'none', 'relu'"):
        row.of(**row.arguments, activation=nn.PReLU())
    for factor in ("2", None, [1.0], 1j, False):
        with pytest.raises(TypeError, match="scaling_factor is .* expected a float or a tensor of no dimensions"):
            row.of(**row.arguments, scaling_factor=factor)
    with pytest.raises(TypeError, match="scaling_factor is a module, ReLU, .* an activation is passed as activation="):
        row.of.from_modules(row.layer(**row.arguments), row.norm(6), nn.ReLU())
    for slope in ("a", None):
        with pytest.raises(TypeError, match=rf"^{row.of.__name__}: negative_slope is .*, expected a float"):
            row.of(**row.arguments, activation="leaky_relu", negative_slope=slope)
    with pytest.raises(ValueError, match=r"scaling_factor has shape \[1\], expected a float or a tensor of no dim"):
        row.of(**row.arguments, scaling_factor=torch.ones(1))


@rows
def test_from_modules_uses_the_modules(row: Row, generator: torch.Generator) -> None:
    layer, bn = row.layer(**row.arguments), row.norm(6)
    assert row.of.from_modules(layer, bn).training
    randomize(bn, generator)
    module = row.of.from_modules(layer, bn.eval(), 0.5, "relu")
    assert getattr(module, row.name) is layer and module.bn is bn and not module.training
    x = sample(generator, row=row)
    with torch.no_grad():
        plain = Plain(**row.arguments, scaling_factor=0.5, row=row).eval()
        setattr(plain, row.name, layer)
        plain.bn = bn
        check(module(x), plain, x, None, "relu")
    if row.name == "conv":
        with pytest.raises(ValueError, match="bn has 7 features, expected 6, conv's out_channels"):
            row.of.from_modules(layer, row.norm(7))
    with pytest.raises(ValueError, match="activation is 'selu'"):
        row.of.from_modules(layer, bn, activation="selu")


@rows
def test_from_modules_refuses(row: Row) -> None:
    layer, bn = row.layer(**row.arguments), row.norm(6)
    name, layer_class, norm_class = row.name, row.layer.__name__, row.norm.__name__
    other = nn.Conv1d(4, 6, 3) if row.layer is not nn.Conv1d else nn.Conv2d(4, 6, 3)
    other_norm = nn.BatchNorm2d(6) if row.norm is not nn.BatchNorm2d else nn.BatchNorm1d(6)
    what = "convolution" if name == "conv" else "linear layer"
    for arguments, message in (
        ((bn, layer), f"{name} is the BatchNorm and bn the {what}, expected {name} first"),
        ((other, bn), f"{name} is of type {type(other).__name__}, expected an nn.{layer_class}"),
        ((nn.Bilinear(4, 4, 6), bn), f"{name} is of type Bilinear, expected an nn.{layer_class}"),
        ((layer, other_norm), f"bn is of type {type(other_norm).__name__}, expected an nn.{norm_class}"),
        ((layer, nn.Module()), f"bn is of type Module, expected an nn.{norm_class}"),
        ((layer, bn, "2"), "scaling_factor is '2', of type str, expected a float"),
    ):
        with pytest.raises(TypeError, match=f"^from_modules: {message}"):
            row.of.from_modules(*arguments)
    for accepted in (nn.SyncBatchNorm(6), getattr(nn, f"Lazy{norm_class}")()):
        assert row.of.from_modules(layer, accepted).bn is accepted


@rows
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_residual_that_is_no_tensor(row: Row, training: bool, generator: torch.Generator) -> None:
    module, x = row.of(**row.arguments).train(training), sample(generator, row=row)
    y = module(x)
    for value, what in ((x.tolist(), "of type list"), (2.0, "of type float")):
        with pytest.raises(TypeError, match=f"^{row.of.__name__}: residual is {what}, expected a tensor or None$"):
            module(x, value)
    traced = torch.fx.symbolic_trace(module, {"residual": None})
    torch.testing.assert_close(traced(x, None), y)


def test_activations_by_module_and_function(generator: torch.Generator) -> None:
    x = sample(generator)
    for activation in (
        *(nn.Identity(), nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.SiLU(), nn.Hardswish(), nn.GELU()),
        *(nn.GELU("tanh"), nn.LeakyReLU(), nn.LeakyReLU(0.2), nn.Sigmoid(), nn.Hardsigmoid(), nn.Mish(), nn.Tanh()),
        *(F.relu, torch.relu, F.relu6, F.silu, F.hardswish, F.gelu, F.leaky_relu, torch.sigmoid, F.hardsigmoid),
        *(F.mish, torch.tanh),
    ):
        ours = ConvBnScale2d(4, 6, 3, 1.7, activation=activation).eval()
        randomize(ours, generator)
        with torch.no_grad():
            torch.testing.assert_close(ours(x), activation(ours.bn(ours.conv(x)) * 1.7))
        assert ops_of(ours, x).names == [FUSED], activation


@rows
@pytest.mark.parametrize("activation", ["none", "leaky_relu", "gelu_tanh"])
def test_residual_last(row: Row, activation: str, device: str, generator: torch.Generator) -> None:
    named = {"activation": activation, "negative_slope": 0.3, "residual_last": True}
    ours = row.of(**row.arguments, scaling_factor=1.7, **named).to(device).eval()
    randomize(ours, generator)
    x, residual = sample(generator, device, row=row), residual_of(row, generator, device)
    act = {"none": lambda y: y, "leaky_relu": lambda y: F.leaky_relu(y, 0.3), "gelu_tanh": nn.GELU("tanh")}[activation]
    for mode in (False, True):
        ours.train(mode)
        with torch.no_grad():
            y = ours(x, residual)
            torch.testing.assert_close(y, act(ours.bn(getattr(ours, row.name)(x)) * 1.7) + residual)
            torch.testing.assert_close(ours._forward_plain(x, residual), y)
    assert "residual_last=True" in repr(ours)


def test_repr_names_what_is_special() -> None:
    assert "scaling_factor=2.0, activation=relu" in repr(ConvBnScale2d(4, 6, 3, 2.0, activation="relu"))


# ---- evaluation ------------------------------------------------------------------------------------------------------


@row_cases
@dtypes
def test_eval(
    row: Row, case: str, arguments: dict[str, Any], dtype: torch.dtype, device: str, generator: torch.Generator
) -> None:
    plain, ours = models(generator, device, dtype, row=row, **arguments)
    x = sample(generator, device, dtype, row)
    with torch.no_grad():
        check(ours(x), plain, x)


@rows
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@dtypes
def test_eval_with_residual_and_activation(
    row: Row, activation: str, with_residual: bool, dtype: torch.dtype, device: str, generator: torch.Generator
) -> None:
    plain, ours = models(generator, device, dtype, activation, row)
    x = sample(generator, device, dtype, row)
    residual = residual_of(row, generator, device, dtype) if with_residual else None
    with torch.no_grad():
        y = ours(x, residual)
        check(y, plain, x, residual, activation)
    ops = ops_of(ours, x, residual)
    assert_fused(ops, row.fused)
    # Behind a layer it is one pass: the layer's ops, then this one.
    assert ops.names == [FUSED] if row.fused == FUSED else ops.names[-1] == BN


@row_cases
def test_no_grad_runs_the_fused_op_alone(
    row: Row, case: str, arguments: dict[str, Any], device: str, generator: torch.Generator
) -> None:
    _, ours = models(generator, device, row=row, **arguments)
    ops = ops_of(ours, sample(generator, device, row=row))
    fused = row.train if case == "no_stats" else row.fused  # without running statistics the batch's own are needed
    assert_fused(ops, fused)


def test_inputs_stay_as_they_are(device: str, generator: torch.Generator) -> None:
    _, ours = models(generator, device, activation="relu", kernel_size=1)
    x, residual = sample(generator, device), torch.randn(3, 6, 9, 8, generator=generator).to(device)
    before = copy.deepcopy((x, residual, ours.state_dict()))
    with torch.no_grad():
        ours(x, residual)
    assert torch.equal(x, before[0]) and torch.equal(residual, before[1])
    assert all(torch.equal(value, before[2][name]) for name, value in ours.state_dict().items())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_parameters_without_grad_fuse_in_any_grad_mode(mode: Any, device: str, generator: torch.Generator) -> None:
    _, ours = models(generator, device)
    x = sample(generator, device)
    with mode():
        expected = ours(x)
    ours.requires_grad_(False)
    with Ops() as ops:
        y = ours(x)
    assert ops.count(FUSED) == 1 and torch.equal(y, expected)
    with Ops() as ops:
        assert ours(x.clone().requires_grad_()).requires_grad
    assert ops.count(FUSED) == 1


@rows
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_eval_gradients(row: Row, activation: str, device: str, generator: torch.Generator) -> None:
    plain, ours = models(generator, device, torch.float64, activation, row)
    assert_same_gradients(plain, ours, sample(generator, device, torch.float64, row), activation)


def assert_same_gradients(plain: Plain, ours: Any, x: Tensor, activation: str = "none") -> None:
    """In float64: the input's gradient, the parameters' and a residual's."""
    results = []
    # PyTorch's own multiply float64 by a float32 1/6: on CUDA, and backward of hardsigmoid on the CPU as well.
    coarse = activation == "hardsigmoid" or (x.is_cuda and activation == "hardswish")
    near = 2.0**-23 if coarse else 1e-10
    for module, extra in ((plain, {"activation": activation}), (ours, {})):
        leaf = x.double().requires_grad_()
        module.double()
        with torch.no_grad():
            y = copy.deepcopy(module)(leaf)
        residual = torch.linspace(-1, 1, y.numel(), device=x.device, dtype=x.dtype).view_as(y).requires_grad_()
        y = module(leaf, residual, **extra)
        (y * torch.linspace(0, 2, y.numel(), device=x.device, dtype=x.dtype).view_as(y)).sum().backward()
        results.append([y, leaf.grad, residual.grad, *(p.grad for p in module.parameters())])
    for expected, got in zip(*results, strict=True):
        assert expected is not None and got is not None
        torch.testing.assert_close(got, expected, rtol=near, atol=4 * near if coarse else near)


@rows
def test_forward_mode_derivative(row: Row, generator: torch.Generator) -> None:
    """A dual tensor does not require grad, and neither do these parameters."""
    plain, ours = models(generator, dtype=torch.float64, row=row)
    x, direction = sample(generator, dtype=torch.float64, row=row), sample(generator, dtype=torch.float64, row=row)
    for module in (plain, ours):
        module.requires_grad_(False)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            (_, expected), (_, got) = (torch.func.jvp(module, (x,), (direction,)) for module in (plain, ours))
        assert torch.equal(expected, got)


@rows
def test_residual_that_does_not_fit_takes_the_plain_path(row: Row, device: str, generator: torch.Generator) -> None:
    plain, ours = models(generator, device, torch.float32, "relu", row)
    x = sample(generator, device, row=row)
    for shape, dtype in ((row.result[1:], torch.float32), (row.result, torch.float64), (row.result, torch.float16)):
        residual = torch.randn(shape, generator=generator).to(device, dtype)
        with torch.no_grad():
            y = ours(x, residual)
            assert torch.equal(y, plain(x, residual, "relu")), (shape, dtype)
    with torch.no_grad(), pytest.raises(RuntimeError, match="size of tensor"):
        ours(x, torch.zeros(*row.result[:-1], 5, device=device))


def test_strided_residual(device: str, generator: torch.Generator) -> None:
    plain, ours = models(generator, device)
    x = sample(generator, device)
    residual = torch.randn(3, 7, 6, 6, generator=generator).to(device).permute(0, 3, 1, 2)
    with torch.no_grad():
        check(ours(x, residual), plain, x, residual)
    assert ops_of(ours, x, residual).count(FUSED) == 1


@pytest.mark.parametrize("row", WITH_LAYOUTS.values(), ids=WITH_LAYOUTS)
@dtypes
def test_channels_last(row: Row, dtype: torch.dtype, device: str, generator: torch.Generator) -> None:
    plain, ours = models(generator, device, dtype, row=row)
    x = sample(generator, device, dtype, row)
    last = torch.channels_last if len(row.size) == 4 else torch.channels_last_3d
    for weights in (torch.contiguous_format, last):
        for inputs in (torch.contiguous_format, last):
            plain, ours = plain.to(memory_format=weights), ours.to(memory_format=weights)
            with torch.no_grad():
                laid = x.to(memory_format=inputs)
                check(ours(laid), plain, laid)


@pytest.mark.parametrize("shape", [(0, 4, 9, 8), (1, 4, 3, 3), (1, 4, 9, 3)], ids=str)
def test_small_batches(shape: tuple[int, ...], device: str, generator: torch.Generator) -> None:
    plain, ours = models(generator, device)
    x = torch.randn(shape, generator=generator).to(device)
    with torch.no_grad():
        check(ours(x), plain, x)


def test_unbatched_input_raises_as_in_the_plain_model(generator: torch.Generator) -> None:
    for module in models(generator):
        with torch.no_grad(), pytest.raises(ValueError, match="expected 4D input"):
            module(torch.randn(4, 9, 8))


def test_conv_errors_are_those_of_the_plain_model(generator: torch.Generator) -> None:
    messages = []
    for module in models(generator):
        with torch.no_grad(), pytest.raises(RuntimeError) as raised:
            module(torch.randn(1, 5, 9, 8))
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


@rows
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(row: Row, dtype: torch.dtype, device: str, generator: torch.Generator) -> None:
    plain, ours = models(generator, device, row=row)
    x = sample(generator, device, row=row)
    with torch.no_grad(), torch.autocast(device, dtype=dtype):
        assert check(ours(x), plain, x).dtype == dtype
        assert ops_of(ours, x).count(row.fused) == 1
    with torch.autocast(device, dtype=dtype):
        assert check(ours(x).detach(), plain, x).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_conv_with_a_float32_bn(dtype: torch.dtype, device: str, generator: torch.Generator) -> None:
    plain, ours = models(generator, device)
    for module in (plain, ours):
        module.conv.to(dtype)
    x = sample(generator, device, dtype)
    with torch.no_grad():
        check(ours(x), plain, x)
    assert ops_of(ours, x).count(FUSED) == 1


# ---- training --------------------------------------------------------------------------------------------------------


@trained_row_cases
def test_training_is_pytorchs(
    row: Row, case: str, arguments: dict[str, Any], device: str, generator: torch.Generator
) -> None:
    plain, ours = models(generator, device, row=row, **arguments)
    for _ in range(2):
        assert_same_gradients(plain.train(), ours.train(), sample(generator, device, row=row))
    mine, theirs = ours.state_dict(), plain.state_dict()
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value)
    if arguments.get("track_running_stats", True):
        assert ours.bn.num_batches_tracked == 2
    with torch.no_grad():  # evaluation after training: with the statistics as they are now
        x = sample(generator, device, row=row)
        check(ours.float().eval()(x), plain.float().eval(), x)


@pytest.mark.parametrize("padding_mode", ["reflect", "replicate"])
def test_training_forward_with_other_paddings(padding_mode: str, device: str, generator: torch.Generator) -> None:
    plain, ours = models(generator, device, padding=1, padding_mode=padding_mode)
    x = sample(generator, device)
    torch.testing.assert_close(ours.train()(x), plain.train()(x))
    torch.testing.assert_close(ours.bn.running_var, plain.bn.running_var)


@rows
@pytest.mark.parametrize("part", ["module", "bn"])
def test_training_mode_without_grad_updates_statistics(row: Row, part: str, generator: torch.Generator) -> None:
    """Either flag alone: self.training is what users set, bn.training what BatchNorm obeys."""
    plain, ours = models(generator, row=row)
    for module in (plain, ours):
        module.bn.train()
        if part == "module":
            module.training = True
    x = sample(generator, row=row)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), plain(x))
    torch.testing.assert_close(ours.bn.running_mean, plain.bn.running_mean)
    assert ours.bn.num_batches_tracked == plain.bn.num_batches_tracked == 1


@rows
def test_frozen_bn_in_a_training_module(row: Row, generator: torch.Generator) -> None:
    plain, ours = models(generator, row=row)
    for module in (plain, ours):
        module.train()
        module.bn.eval()
    assert_same_gradients(plain, ours, sample(generator, row=row))
    assert ours.bn.num_batches_tracked == 0


# ---- where PyTorch's ops must run ------------------------------------------------------------------------------------


@rows
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("hooked", ["layer", "bn", "all"])
def test_plain_ops_are_those_of_a_model(row: Row, hooked: str, grad: bool, generator: torch.Generator) -> None:
    """No product with 1.0, and the activation in place, unless a hook has the tensor that would be written to."""
    _, ours = models(generator, scaling_factor=1.0, activation="relu", row=row)
    hooked = row.name if hooked == "layer" else hooked
    seen: list[Tensor] = []
    keep = lambda module, inputs, output: seen.append(output)  # noqa: E731
    module = nn.modules.module if hooked == "all" else ours.get_submodule(hooked)
    register = module.register_module_forward_hook if hooked == "all" else module.register_forward_hook
    handle = register(keep)
    try:
        with torch.set_grad_enabled(grad), Ops() as ops:
            y = ours.train()(sample(generator, row=row))
    finally:
        handle.remove()
    assert ops.count("fused_conv_bn") == ops.count("aten::mul.Tensor") == 0
    assert (ops.count("aten::relu_"), ops.count("aten::relu")) == ((1, 0) if hooked == row.name else (0, 1))
    assert (y >= 0).all() and all((t < 0).any() for t in seen[:2])
    assert y.requires_grad == grad
    if grad:
        y.sum().backward()


@rows
@pytest.mark.parametrize("part", ["layer", "bn"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre"])
def test_hooks_run(row: Row, part: str, kind: str, generator: torch.Generator) -> None:
    plain, ours = models(generator, row=row)
    part = row.name if part == "layer" else part
    seen = []
    for module in (plain, ours):
        register = getattr(getattr(module, part), f"register_{kind}_hook")
        handle = register(lambda *args: seen.append(args[0]))
    x = sample(generator, row=row)
    with torch.no_grad():
        assert torch.equal(ours(x), plain(x))
    assert seen == [getattr(ours, part), getattr(plain, part)]
    handle.remove()
    assert ops_of(ours, x).count(row.fused) == 1


@rows
def test_parametrized_weight(row: Row, device: str, generator: torch.Generator) -> None:
    plain, ours = models(generator, device, row=row)
    for module in (plain, ours):
        torch.nn.utils.parametrizations.weight_norm(getattr(module, row.name))
        with torch.no_grad():
            getattr(module, row.name).parametrizations.weight.original0.mul_(3)
    x = sample(generator, device, row=row)
    with torch.no_grad():
        assert torch.equal(ours(x), plain(x))
    getattr(ours, row.name).parametrizations.weight.original0.data.mul_(2)
    with torch.no_grad():
        assert error(ours(x), plain(x)) > 1e-2


@rows
def test_subclasses_run_their_own_forward(row: Row, generator: torch.Generator) -> None:
    class Doubled(row.norm):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    plain, ours = models(generator, scaling_factor=1.0, row=row)
    bn = Doubled(6).eval()
    bn.load_state_dict(plain.bn.state_dict())
    ours.bn = bn
    x = sample(generator, row=row)
    with torch.no_grad():
        assert torch.equal(ours(x), plain(x) * 2)


@rows
def test_sync_batchnorm_in_eval(row: Row, device: str, generator: torch.Generator) -> None:
    plain, ours = models(generator, device, row=row)
    x = sample(generator, device, row=row)
    with torch.no_grad():
        ours(x)
        ours = nn.SyncBatchNorm.convert_sync_batchnorm(ours).eval()
        assert type(ours.bn) is nn.SyncBatchNorm
        check(ours(x), plain, x)
    assert ops_of(ours, x).count(row.fused) == 1


def test_inside_a_model(device: str, generator: torch.Generator) -> None:
    """A model's train(), eval(), to() and load_state_dict() reach the module through its parent."""
    plain = nn.Sequential(Plain(4, 4, 3, 2.0, padding=1), nn.ReLU(), Plain(4, 6, 1, 0.5))
    ours = nn.Sequential(ConvBnScale2d(4, 4, 3, 2.0, padding=1), nn.ReLU(), ConvBnScale2d(4, 6, 1, 0.5))
    randomize(plain, generator)
    x = sample(generator, device)
    plain.to(device).eval()
    ours.to(device).eval()
    with torch.no_grad():
        ours(x)
        ours.load_state_dict(plain.state_dict())
        check(ours(x), plain, x)
    assert ops_of(ours, x).count(FUSED) == 2


@rows
def test_replaced_forward_runs(row: Row, device: str, generator: torch.Generator) -> None:
    """Libraries that move weights about replace a module's forward on the instance."""
    plain, ours = models(generator, device, row=row)
    x = sample(generator, device, row=row)
    layer, plain_layer = getattr(ours, row.name), getattr(plain, row.name)
    original = layer.forward
    layer.forward = lambda x: 2 * original(x)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), plain.bn(2 * plain_layer(x)) * plain.scaling_factor)
