"""The causal convolution against PyTorch's, gradients included, and in the models whose mixers call it."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from manticore_hf.modeling import mixers_manticore as mm
from scans import CONFIGS, build, mixers, modeling, own_globals, padded_inputs

from manticore_hf.kernels.conv import causal_conv1d


def make_inputs(time, taps=4, channels=5, dtype=torch.float64, bias=True):
    generator = torch.Generator().manual_seed(time)
    shapes = [(2, channels, time), (channels, taps)] + [(channels,)] * bias
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def theirs(x, weight, bias=None):
    y = F.conv1d(x, weight[:, None], bias, padding=weight.shape[1] - 1, groups=len(weight))
    return y[..., : x.shape[2]]


@pytest.mark.parametrize("time", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_torch(time, taps, bias):
    inputs = make_inputs(time, taps, bias=bias)
    found, expected = causal_conv1d(*inputs), theirs(*inputs)
    torch.testing.assert_close(found, expected)
    seed = torch.randn_like(expected)
    for ours, reference in zip(torch.autograd.grad(found, inputs, seed), torch.autograd.grad(expected, inputs, seed)):
        torch.testing.assert_close(ours, reference)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_only_the_gradients_asked_for(wanted):
    """Frozen components: the input's gradient is needed, the weights' are not."""
    inputs = make_inputs(7)
    expected = torch.autograd.grad(theirs(*inputs).square().sum(), inputs)
    for k, tensor in enumerate(inputs):
        tensor.requires_grad_(k in wanted)
    causal_conv1d(*inputs).square().sum().backward()
    for k, tensor in enumerate(inputs):
        assert (tensor.grad is not None) == (k in wanted)
        if k in wanted:
            torch.testing.assert_close(tensor.grad, expected[k])


def test_second_derivatives():
    assert torch.autograd.gradgradcheck(causal_conv1d, make_inputs(5, channels=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_takes_the_place_of_upstreams(dtype, activation):
    inputs = [z.detach() for z in make_inputs(11, dtype=dtype)]
    upstream = modeling("mamba").causal_conv1d_fn
    expected = inspect.unwrap(upstream)(*inputs, activation=activation)
    found = mm._make_conv(upstream)(*inputs, activation=activation)
    assert found.dtype == expected.dtype and found.shape == expected.shape
    tolerance = 5e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("model_type", list(CONFIGS))
def test_models_train_alike(model_type, monkeypatch):
    """Loss and every gradient of a model with Transformers' convolution, and with ours, on the same scan."""
    dtype = torch.float32 if model_type == "jamba" else torch.float64  # no grouped products in float64 for its experts
    model, (ids, _) = build(model_type, dtype).train(), padded_inputs(False)
    assert mm.repair_mixers(model)
    called, gradients = own_globals(mixers(model)[0]), []
    for convolution in (called["causal_conv1d_fn"], inspect.unwrap(modeling(model_type).causal_conv1d_fn)):
        monkeypatch.setitem(called, "causal_conv1d_fn", convolution)
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and any("conv1d" in name for name in gradients[0])
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], rtol=1e-4, atol=1e-5, msg=name)
