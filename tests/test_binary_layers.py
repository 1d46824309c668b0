"""Binary activations and layers: values, the clipped straight-through gradient, α, and what is packed of them."""

from typing import Any

import pytest
import torch
from torch import nn

import expfam_poco as poco
from expfam_poco.tools.packed import PackedLayer


def test_activations_are_exact_signs_with_a_clipped_gradient() -> None:
    torch.manual_seed(0)
    x = torch.cat([torch.randn(10_000) * 2.0, torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-30, -1e30, float("inf")])])
    x.requires_grad_()
    y = poco.BinaryActivation()(x)
    assert torch.equal(y, torch.where(x >= 0.0, 1.0, -1.0))
    seen = torch.randn_like(x)
    y.backward(seen)
    assert x.grad is not None and torch.equal(x.grad, seen * (x.abs() <= 1.0))
    assert bool(poco.BinaryActivation()(torch.tensor(float("nan"))).isnan())


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_binary_layers_have_the_documented_weight_and_gradient(kind: str, scaled: bool) -> None:
    """Against the formulas of XNOR-Net, by hand and in double precision."""
    torch.manual_seed(0)
    layer: Any
    if kind == "linear":
        layer, x = poco.BinaryLinear(12, 5, scaled=scaled, dtype=torch.float64), torch.randn(7, 12).double()
        plain = lambda w: nn.functional.linear(x, w, layer.bias)  # noqa: E731
    else:
        layer = poco.BinaryConv2d(3, 5, 3, scaled=scaled, padding=1, stride=2, dtype=torch.float64)
        x = torch.randn(2, 3, 8, 8).double()
        plain = lambda w: nn.functional.conv2d(x, w, layer.bias, 2, 1)  # noqa: E731
    with torch.no_grad():
        layer.weight.mul_(6.0)  # some beyond 1
    w = layer.weight.detach()
    flat, signs = w.flatten(1), torch.where(w >= 0.0, 1.0, -1.0).double().flatten(1)
    alpha = flat.abs().mean(1, keepdim=True) if scaled else torch.ones(5, 1).double()
    effective = (alpha * signs).view_as(w).requires_grad_()
    torch.testing.assert_close(layer(x), plain(effective))
    g = torch.autograd.grad(plain(effective).square().sum(), effective)[0].flatten(1)
    expected = alpha * (flat.abs() <= 1.0) * g
    if scaled:
        expected = expected + signs * (g * signs).sum(1, keepdim=True) / flat.shape[1]
    layer(x).square().sum().backward()
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad.flatten(1), expected)
    if scaled:  # the nearest multiple of the signs
        left = (flat - alpha * signs).square().sum()
        assert all(float((flat - (alpha + d) * signs).square().sum()) > float(left) for d in (0.01, -0.01))


def test_a_network_by_straight_through_and_adam_is_packed_with_its_scales() -> None:
    """No optimizer of this package, real weights underneath; with a first layer in full precision."""
    torch.manual_seed(0)
    x = torch.randn(64, 1, 8, 8)
    y = (x.mean((1, 2, 3)) > 0.0).long()
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), poco.BinaryActivation(), poco.BinaryConv2d(16, 16, 3, scaled=True),
        nn.BatchNorm2d(16), poco.BinaryActivation(), nn.Flatten(), poco.BinaryLinear(256, 2, scaled=True),
    )  # fmt: skip
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(x), y)
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    packed: Any = poco.pack_weights(model.eval())
    assert [i for i, layer in enumerate(packed) if isinstance(layer, PackedLayer)] == [3, 7]
    assert packed[7].scale.shape == (2,)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), model(x), rtol=1e-5, atol=1e-5)


def test_binary_layers_under_the_rule_have_no_scale() -> None:
    model = nn.Sequential(poco.BinaryLinear(30, 20, scaled=True), nn.BatchNorm1d(20), poco.BinaryLinear(20, 20))
    opt = poco.BayesBiNN(poco.binarize_groups(model), square_momentum=None, lr=0.01, ess=100.0, seed=0)
    x = torch.randn(16, 30)
    opt.step(lambda: model(x).square().mean())
    poco.recalibrate_batchnorm(model, [x])
    packed: Any = poco.export_binary(model, opt, packed=True).eval()
    assert packed[0].scale is None and torch.equal(packed[0].weight, model[0].weight)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), model.eval()(x), rtol=1e-5, atol=1e-4)
