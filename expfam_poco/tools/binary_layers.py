"""Layers with binary weights and activations, for gradients that pass straight through the sign."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def straight_sign(x: Tensor) -> Tensor:
    """sign x, +1 at 0, with the clipped straight-through gradient ∂/∂x ≈ 1{|x| ≤ 1} (Hubara et al. 2016).

    Example:
        >>> import torch
        >>> from expfam_poco.tools.binary_layers import straight_sign
        >>> x = torch.tensor([-2.0, -0.5, 0.0, 3.0], requires_grad=True)
        >>> straight_sign(x).sum().backward()
        >>> straight_sign(x).tolist(), x.grad.tolist()
        ([-1.0, -1.0, 1.0, 1.0], [0.0, 1.0, 1.0, 0.0])
    """
    clipped = x.clamp(-1.0, 1.0)
    # The difference is exactly 0; what is not a number stays so.
    return torch.where(x.detach() >= 0.0, 1.0, -1.0).to(x.dtype) + (clipped - clipped.detach())


class BinaryActivation(nn.Module):
    """Activations of ±1: y = sign x, with the clipped straight-through gradient

        ∂ℓ/∂x ≈ ∂ℓ/∂y · 1{|x| ≤ 1}

    Put it after a normalisation. A layer with packed weights that follows it multiplies by XNOR and popcount.

    Example:
        >>> import torch, expfam_poco as poco
        >>> poco.BinaryActivation()(torch.tensor([-0.3, 0.0, 2.0]))
        tensor([-1.,  1.,  1.])
    """

    def forward(self, x: Tensor) -> Tensor:
        """The signs, in x's shape."""
        return straight_sign(x)


def scaled_signs(weight: Tensor, *, scaled: bool) -> Tensor:
    """sign W, or with `scaled` α sign W with αₒ = mean |Wₒ| over what goes into output o (XNOR-Net).

    α sign W is the multiple of sign W that is nearest to W: α = ⟨W, sign W⟩/n minimises ‖Wₒ − α sign Wₒ‖². Its gradient
    with respect to Wᵢ is α 1{|Wᵢ| ≤ 1} gᵢ + sign(Wᵢ) ⟨g, sign W⟩/n.

    Args:
        weight: (out, …).
    """
    signs = straight_sign(weight)
    return signs * weight.abs().mean(tuple(range(1, weight.ndim)), keepdim=True) if scaled else signs


class BinaryLinear(nn.Linear):
    """y = x (α sign W)ᵀ + b: a linear layer that keeps real weights and multiplies by their signs.

    The gradient passes the sign as in `BinaryActivation`. With `scaled`, αₒ = mean |Wₒ| of every output o as in
    XNOR-Net (Rastegari et al. 2016), else 1. For straight-through training with Adam and the like (clamp W to [−1, 1]
    after a step); under `BayesBiNN`, which needs no such layer, W is ±1 and α = 1. `pack_weights` keeps signs and α.

    Args:
        in_features, out_features, bias: those of `torch.nn.Linear`.
        scaled: with α.

    Example:
        >>> import torch, expfam_poco as poco
        >>> layer = poco.BinaryLinear(2, 1, bias=False, scaled=True)
        >>> with torch.no_grad():
        ...     _ = layer.weight.copy_(torch.tensor([[0.5, -0.1]]))
        >>> layer(torch.tensor([1.0, 1.0])).item(), round(layer(torch.tensor([1.0, -1.0])).item(), 4)
        (0.0, 0.6)
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, scaled: bool = False, device: object = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.scaled = scaled

    def binary_weight(self) -> Tensor:
        """α sign W."""
        return scaled_signs(self.weight, scaled=self.scaled)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) to (…, out)."""
        return F.linear(x, self.binary_weight(), self.bias)


class BinaryConv2d(nn.Conv2d):
    """A two-dimensional convolution with α sign W, see `BinaryLinear`; α is of an output channel.

    Args:
        scaled: with α.
        *sizes, **choices: those of `torch.nn.Conv2d`.

    Example:
        >>> import torch, expfam_poco as poco
        >>> layer = poco.BinaryConv2d(3, 8, 3, padding=1)
        >>> layer(torch.randn(2, 3, 5, 5)).shape, layer.binary_weight().abs().unique().tolist()
        (torch.Size([2, 8, 5, 5]), [1.0])
    """

    def __init__(self, *sizes: int, scaled: bool = False, **choices: object) -> None:
        super().__init__(*sizes, **choices)  # type: ignore[arg-type]
        self.scaled = scaled

    def binary_weight(self) -> Tensor:
        """α sign W."""
        return scaled_signs(self.weight, scaled=self.scaled)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, height, width) to (N, out, …)."""
        return self._conv_forward(x, self.binary_weight(), self.bias)
