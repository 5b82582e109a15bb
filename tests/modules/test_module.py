"""ConvBnScale2d against the model it replaces: construction, evaluation, training, and where PyTorch's ops must run."""

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
from module_pairs import CASES, FUSED, TRAIN, Ops, Plain, cases, check, dtypes, models, ops_of, randomize, sample

# ---- construction ----------------------------------------------------------------------------------------------------


@cases
def test_constructor_and_state_dict_are_those_of_the_plain_model(case: str) -> None:
    arguments = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "scaling_factor": 2.0, **CASES[case]}
    positional = [arguments.pop(name) for name in ("in_channels", "out_channels", "kernel_size", "scaling_factor")]
    torch.manual_seed(3)
    plain, plain_next = Plain(*positional, **arguments), torch.rand(1)
    torch.manual_seed(3)
    ours, ours_next = ConvBnScale2d(*positional, **arguments), torch.rand(1)
    assert torch.equal(plain_next, ours_next), "the constructors draw different numbers of random numbers"
    mine, theirs = ours.state_dict(), plain.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert ours.load_state_dict(theirs, strict=True) == plain.load_state_dict(mine, strict=True)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert repr(ours.conv) == repr(plain.conv) and repr(ours.bn) == repr(plain.bn)


def test_constructor_passes_device_and_dtype() -> None:
    module = ConvBnScale2d(4, 6, 3, device="meta", dtype=torch.float16)
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.float16)}
    assert module.bn.running_var.dtype == torch.float16
    assert module.eval()(torch.empty(2, 4, 9, 8, device="meta", dtype=torch.float16)).shape == (2, 6, 7, 6)


def test_parameter_as_scaling_factor_is_registered() -> None:
    module = ConvBnScale2d(4, 6, 3, nn.Parameter(torch.tensor(2.0)))
    assert "scaling_factor" in module.state_dict()
    assert module.eval()(torch.randn(1, 4, 9, 8)).requires_grad


def test_constructor_refuses() -> None:
    with pytest.raises(ValueError, match=r"activation is 'selu', expected one of 'none', 'relu'"):
        ConvBnScale2d(4, 6, 3, activation="selu")
    with pytest.raises(ValueError, match=r"activation is PReLU\(.*, expected one of 'none', 'relu'"):
        ConvBnScale2d(4, 6, 3, activation=nn.PReLU())
    for factor in ("2", None, [1.0], 1j):
        with pytest.raises(TypeError, match="scaling_factor is .* expected a float or a tensor of no dimensions"):
            ConvBnScale2d(4, 6, 3, factor)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="scaling_factor is a module, ReLU, .* an activation is passed as activation="):
        ConvBnScale2d.from_modules(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU())  # type: ignore[arg-type]
    for slope in ("a", None):
        with pytest.raises(TypeError, match="^ConvBnScale2d: negative_slope is .*, expected a float"):
            ConvBnScale2d(4, 6, 3, activation="leaky_relu", negative_slope=slope)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"scaling_factor has shape \[1\], expected a float or a tensor of no dim"):
        ConvBnScale2d(4, 6, 3, torch.ones(1))


def test_from_modules_uses_the_modules(generator: torch.Generator) -> None:
    conv, bn = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)
    assert ConvBnScale2d.from_modules(conv, bn).training
    randomize(bn, generator)
    module = ConvBnScale2d.from_modules(conv, bn.eval(), 0.5, "relu")
    assert module.conv is conv and module.bn is bn and not module.training
    x = sample(generator)
    with torch.no_grad():
        plain = Plain(4, 6, 3, 0.5).eval()
        plain.conv, plain.bn = conv, bn
        check(module(x), plain, x, None, "relu")
    with pytest.raises(ValueError, match="bn has 7 features, expected 6, conv's out_channels"):
        ConvBnScale2d.from_modules(conv, nn.BatchNorm2d(7))
    with pytest.raises(ValueError, match="activation is 'selu'"):
        ConvBnScale2d.from_modules(conv, bn, activation="selu")


def test_from_modules_refuses() -> None:
    conv, bn = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)
    for arguments, message in (
        ((bn, conv), "conv is the BatchNorm and bn the convolution, expected conv first"),
        ((nn.Conv1d(4, 6, 3), bn), "conv is of type Conv1d, expected an nn.Conv2d"),
        ((nn.ConvTranspose2d(4, 6, 3), bn), "conv is of type ConvTranspose2d, expected an nn.Conv2d"),
        ((conv, nn.BatchNorm1d(6)), "bn is of type BatchNorm1d, expected an nn.BatchNorm2d"),
        ((conv, nn.Module()), "bn is of type Module, expected an nn.BatchNorm2d"),
        ((conv, bn, "2"), "scaling_factor is '2', of type str, expected a float"),
    ):
        with pytest.raises(TypeError, match=f"^from_modules: {message}"):
            ConvBnScale2d.from_modules(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_residual_that_is_no_tensor(training: bool, generator: torch.Generator) -> None:
    module, x = ConvBnScale2d(4, 6, 3).train(training), sample(generator)
    y = module(x)
    for value, what in ((x.tolist(), "of type list"), (2.0, "of type float")):
        with pytest.raises(TypeError, match=f"^ConvBnScale2d: residual is {what}, expected a tensor or None$"):
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


@pytest.mark.parametrize("activation", ["none", "leaky_relu", "gelu_tanh"])
def test_residual_last(activation: str, device: str, generator: torch.Generator) -> None:
    ours = ConvBnScale2d(4, 6, 3, 1.7, activation=activation, negative_slope=0.3, residual_last=True).to(device).eval()
    randomize(ours, generator)
    x, residual = sample(generator, device), torch.randn(3, 6, 7, 6, generator=generator).to(device)
    act = {"none": lambda y: y, "leaky_relu": lambda y: F.leaky_relu(y, 0.3), "gelu_tanh": nn.GELU("tanh")}[activation]
    for mode in (False, True):
        ours.train(mode)
        with torch.no_grad():
            y = ours(x, residual)
            torch.testing.assert_close(y, act(ours.bn(ours.conv(x)) * 1.7) + residual)
            torch.testing.assert_close(ours._forward_plain(x, residual), y)
    assert "residual_last=True" in repr(ours)


def test_repr_names_what_is_special() -> None:
    assert "scaling_factor=2.0, activation=relu" in repr(ConvBnScale2d(4, 6, 3, 2.0, activation="relu"))


# ---- evaluation ------------------------------------------------------------------------------------------------------


@cases
@dtypes
def test_eval(case: str, dtype: torch.dtype, device: str, generator: torch.Generator) -> None:
    plain, ours = models(generator, device, dtype, **CASES[case])
    x = sample(generator, device, dtype)
    with torch.no_grad():
        check(ours(x), plain, x)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@dtypes
def test_eval_with_residual_and_activation(
    activation: str, with_residual: bool, dtype: torch.dtype, device: str, generator: torch.Generator
) -> None:
    plain, ours = models(generator, device, dtype, activation)
    x = sample(generator, device, dtype)
    residual = torch.randn(3, 6, 7, 6, generator=generator).to(device, dtype) if with_residual else None
    with torch.no_grad():
        y = ours(x, residual)
        check(y, plain, x, residual, activation)
    ops = ops_of(ours, x, residual)
    assert ops.count(FUSED) == 1 and ops.count("convolution") == 0 and ops.count("batch_norm") == 0
    assert ops.names == [FUSED]


@cases
def test_no_grad_runs_the_fused_op_alone(case: str, device: str, generator: torch.Generator) -> None:
    _, ours = models(generator, device, **CASES[case])
    ops = ops_of(ours, sample(generator, device))
    fused = TRAIN if case == "no_stats" else FUSED  # without running statistics the batch's own are needed
    assert ops.count(fused) == 1 and ops.count("convolution") == ops.count("batch_norm") == 0


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


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_eval_gradients(activation: str, device: str, generator: torch.Generator) -> None:
    plain, ours = models(generator, device, torch.float64, activation)
    assert_same_gradients(plain, ours, sample(generator, device, torch.float64), activation)


def assert_same_gradients(plain: Plain, ours: ConvBnScale2d, x: Tensor, activation: str = "none") -> None:
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


def test_forward_mode_derivative(generator: torch.Generator) -> None:
    """A dual tensor does not require grad, and neither do these parameters."""
    plain, ours = models(generator, dtype=torch.float64)
    x, direction = sample(generator, dtype=torch.float64), sample(generator, dtype=torch.float64)
    for module in (plain, ours):
        module.requires_grad_(False)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            (_, expected), (_, got) = (torch.func.jvp(module, (x,), (direction,)) for module in (plain, ours))
        assert torch.equal(expected, got)


def test_residual_that_does_not_fit_takes_the_plain_path(device: str, generator: torch.Generator) -> None:
    plain, ours = models(generator, device, torch.float32, "relu")
    x = sample(generator, device)
    for shape, dtype in (((6, 1, 1), torch.float32), ((3, 6, 7, 6), torch.float64), ((3, 6, 7, 6), torch.float16)):
        residual = torch.randn(shape, generator=generator).to(device, dtype)
        with torch.no_grad():
            y = ours(x, residual)
            assert torch.equal(y, plain(x, residual, "relu")), (shape, dtype)
    with torch.no_grad(), pytest.raises(RuntimeError, match="size of tensor"):
        ours(x, torch.zeros(3, 6, 7, 5, device=device))


def test_strided_residual(device: str, generator: torch.Generator) -> None:
    plain, ours = models(generator, device)
    x = sample(generator, device)
    residual = torch.randn(3, 7, 6, 6, generator=generator).to(device).permute(0, 3, 1, 2)
    with torch.no_grad():
        check(ours(x, residual), plain, x, residual)
    assert ops_of(ours, x, residual).count(FUSED) == 1


@dtypes
def test_channels_last(dtype: torch.dtype, device: str, generator: torch.Generator) -> None:
    plain, ours = models(generator, device, dtype)
    x = sample(generator, device, dtype)
    for weights in (torch.contiguous_format, torch.channels_last):
        for inputs in (torch.contiguous_format, torch.channels_last):
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype: torch.dtype, device: str, generator: torch.Generator) -> None:
    plain, ours = models(generator, device)
    x = sample(generator, device)
    with torch.no_grad(), torch.autocast(device, dtype=dtype):
        assert check(ours(x), plain, x).dtype == dtype
        assert ops_of(ours, x).count(FUSED) == 1
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


@pytest.mark.parametrize("case", [name for name in CASES if name not in ("reflect", "replicate")])
def test_training_is_pytorchs(case: str, device: str, generator: torch.Generator) -> None:
    plain, ours = models(generator, device, **CASES[case])
    for _ in range(2):
        assert_same_gradients(plain.train(), ours.train(), sample(generator, device))
    mine, theirs = ours.state_dict(), plain.state_dict()
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value)
    if CASES[case].get("track_running_stats", True):
        assert ours.bn.num_batches_tracked == 2
    with torch.no_grad():  # evaluation after training: with the statistics as they are now
        x = sample(generator, device)
        check(ours.float().eval()(x), plain.float().eval(), x)


@pytest.mark.parametrize("padding_mode", ["reflect", "replicate"])
def test_training_forward_with_other_paddings(padding_mode: str, device: str, generator: torch.Generator) -> None:
    plain, ours = models(generator, device, padding=1, padding_mode=padding_mode)
    x = sample(generator, device)
    torch.testing.assert_close(ours.train()(x), plain.train()(x))
    torch.testing.assert_close(ours.bn.running_var, plain.bn.running_var)


@pytest.mark.parametrize("part", ["module", "bn"])
def test_training_mode_without_grad_updates_statistics(part: str, generator: torch.Generator) -> None:
    """Either flag alone: self.training is what users set, bn.training what BatchNorm obeys."""
    plain, ours = models(generator)
    for module in (plain, ours):
        module.bn.train()
        if part == "module":
            module.training = True
    x = sample(generator)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), plain(x))
    torch.testing.assert_close(ours.bn.running_mean, plain.bn.running_mean)
    assert ours.bn.num_batches_tracked == plain.bn.num_batches_tracked == 1


def test_frozen_bn_in_a_training_module(generator: torch.Generator) -> None:
    plain, ours = models(generator)
    for module in (plain, ours):
        module.train()
        module.bn.eval()
    assert_same_gradients(plain, ours, sample(generator))
    assert ours.bn.num_batches_tracked == 0


# ---- where PyTorch's ops must run ------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("hooked", ["conv", "bn", "all"])
def test_plain_ops_are_those_of_a_model(hooked: str, grad: bool, generator: torch.Generator) -> None:
    """No product with 1.0, and the activation in place, unless a hook has the tensor that would be written to."""
    _, ours = models(generator, scaling_factor=1.0, activation="relu")
    seen: list[Tensor] = []
    keep = lambda module, inputs, output: seen.append(output)  # noqa: E731
    module = nn.modules.module if hooked == "all" else ours.get_submodule(hooked)
    register = module.register_module_forward_hook if hooked == "all" else module.register_forward_hook
    handle = register(keep)
    try:
        with torch.set_grad_enabled(grad), Ops() as ops:
            y = ours.train()(sample(generator))
    finally:
        handle.remove()
    assert ops.count(FUSED) == ops.count(TRAIN) == ops.count("mul") == 0
    assert (ops.count("aten::relu_"), ops.count("aten::relu")) == ((1, 0) if hooked == "conv" else (0, 1))
    assert (y >= 0).all() and all((t < 0).any() for t in seen[:2])
    assert y.requires_grad == grad
    if grad:
        y.sum().backward()


@pytest.mark.parametrize("part", ["conv", "bn"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre"])
def test_hooks_run(part: str, kind: str, generator: torch.Generator) -> None:
    plain, ours = models(generator)
    seen = []
    for module in (plain, ours):
        register = getattr(getattr(module, part), f"register_{kind}_hook")
        handle = register(lambda *args: seen.append(args[0]))
    x = sample(generator)
    with torch.no_grad():
        assert torch.equal(ours(x), plain(x))
    assert seen == [getattr(ours, part), getattr(plain, part)]
    handle.remove()
    assert ops_of(ours, x).count(FUSED) == 1


def test_parametrized_weight(device: str, generator: torch.Generator) -> None:
    plain, ours = models(generator, device)
    for module in (plain, ours):
        torch.nn.utils.parametrizations.weight_norm(module.conv)
        with torch.no_grad():
            module.conv.parametrizations.weight.original0.mul_(3)
    x = sample(generator, device)
    with torch.no_grad():
        assert torch.equal(ours(x), plain(x))
    ours.conv.parametrizations.weight.original0.data.mul_(2)
    with torch.no_grad():
        assert error(ours(x), plain(x)) > 1e-2


def test_subclasses_run_their_own_forward(generator: torch.Generator) -> None:
    class Doubled(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    plain, ours = models(generator, scaling_factor=1.0)
    bn = Doubled(6).eval()
    bn.load_state_dict(plain.bn.state_dict())
    ours.bn = bn
    x = sample(generator)
    with torch.no_grad():
        assert torch.equal(ours(x), plain(x) * 2)


def test_sync_batchnorm_in_eval(device: str, generator: torch.Generator) -> None:
    plain, ours = models(generator, device)
    x = sample(generator, device)
    with torch.no_grad():
        ours(x)
        ours = nn.SyncBatchNorm.convert_sync_batchnorm(ours).eval()
        assert type(ours.bn) is nn.SyncBatchNorm
        check(ours(x), plain, x)
    assert ops_of(ours, x).count(FUSED) == 1


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


def test_replaced_forward_runs(device: str, generator: torch.Generator) -> None:
    """Libraries that move weights about replace a module's forward on the instance."""
    plain, ours = models(generator, device)
    x = sample(generator, device)
    original = ours.conv.forward
    ours.conv.forward = lambda x: 2 * original(x)  # type: ignore[method-assign]
    with torch.no_grad():
        torch.testing.assert_close(ours(x), plain.bn(2 * plain.conv(x)) * plain.scaling_factor)
