"""Images, networks and the straight-through baseline of `binary_network.py`.

    python examples/binary_models.py [--model mlp|cnn] [--data digits|mnist|cifar10]    # shows a network and its data

All methods train the same network: layers without bias, each followed by BatchNorm, with ReLU between them. Only the
weights of the layers are binary.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from sklearn.datasets import load_digits, make_moons
from torch import Tensor, nn
from torch.nn.utils import parametrize

DATA = ("digits", "mnist", "cifar10")
MODELS = ("mlp", "cnn")


@dataclass(frozen=True)
class Images:
    """Training and held-out images (count, channels, height, width), standardised, with their labels."""

    x: Tensor
    y: Tensor
    held_out_x: Tensor
    held_out_y: Tensor

    def for_validation(self) -> Images:
        """The training part alone: three quarters of it to train on, the rest to choose settings by."""
        end = len(self.x) * 3 // 4
        return Images(self.x[:end], self.y[:end], self.x[end:], self.y[end:])

    def to(self, device: str) -> Images:
        """The same on a device."""
        return Images(*(value.to(device) for value in (self.x, self.y, self.held_out_x, self.held_out_y)))


@dataclass(frozen=True)
class Batches:
    """Shuffled mini-batches, in a new order each time; those left over at the end wait for the next time."""

    x: Tensor
    y: Tensor
    size: int
    generator: torch.Generator

    def __len__(self) -> int:
        return len(self.x) // self.size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.x), generator=self.generator)[: len(self) * self.size].to(self.x.device)
        for rows in order.split(self.size):
            yield self.x[rows], self.y[rows]


def load(name: str, root: str = "data") -> Images:
    """The images: scikit-learn's digits (one third held out), or MNIST or CIFAR-10 as torchvision has stored them.

    Args:
        name: one of `DATA`.
        root: torchvision's folder.

    Raises:
        ImportError: if torchvision is needed and missing.
        FileNotFoundError: if its folder lacks the data.
    """
    if name == "digits":
        digits = load_digits()
        order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
        x = (torch.tensor(digits.images, dtype=torch.float32) / 8.0 - 1.0).unsqueeze(1)[order]
        y = torch.tensor(digits.target)[order]
        end = len(y) * 2 // 3
        return Images(x[:end], y[:end], x[end:], y[end:])
    try:
        from torchvision import datasets
    except ImportError as error:
        raise ImportError(f"--data {name} is read by torchvision: pip install torchvision, or use digits.") from error
    kind = {"mnist": datasets.MNIST, "cifar10": datasets.CIFAR10}[name]
    try:
        parts = [kind(root, train=train, download=False) for train in (True, False)]
    except RuntimeError as error:
        raise FileNotFoundError(
            f"--data {name}: {root!r} has no such data; download it there with "
            f"torchvision.datasets.{kind.__name__}({root!r}, download=True), or give another --root."
        ) from error
    xs = [torch.as_tensor(part.data, dtype=torch.float32) / 255.0 for part in parts]
    xs = [x.unsqueeze(1) if x.ndim == 3 else x.permute(0, 3, 1, 2).contiguous() for x in xs]
    deviation, mean = torch.std_mean(xs[0], dim=(0, 2, 3), keepdim=True)
    ys = [torch.as_tensor(part.targets) for part in parts]
    order = torch.randperm(len(ys[0]), generator=torch.Generator().manual_seed(0))  # so that for_validation is fair
    train, test = ((x - mean) / deviation for x in xs)
    return Images(train[order], ys[0][order], test, ys[1])


def moons(count: int = 300) -> Images:
    """Two interleaved half circles in the plane, as images of two pixels."""
    x, y = make_moons(2 * count, noise=0.15, random_state=0)
    points, labels = torch.tensor(x, dtype=torch.float32), torch.tensor(y)
    points = (points - points.mean(0)) / points.std(0)
    return Images(points[:count], labels[:count], points[count:], labels[count:])


def network(name: str, shape: torch.Size, classes: int, width: int | None = None) -> nn.Sequential:
    """An MLP with two hidden layers of `width`, or a small VGG-like CNN.

    Args:
        name: one of `MODELS`.
        shape: of one image.
        classes: number of outputs.
        width: of a hidden layer (128), or the channels of the first block (16), doubled from block to block.
    """
    layers: list[nn.Module] = []
    if name == "mlp":
        hidden, features = width or 128, shape.numel()
        layers.append(nn.Flatten())
        for _ in range(2):
            layers += [nn.Linear(features, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU()]
            features = hidden
    else:
        channels, side, found = width or 16, shape[-1], shape[0]
        while side >= 4:  # two 3 × 3 convolutions, then half the resolution
            for _ in range(2):
                layers += [nn.Conv2d(found, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
                found = channels
            layers.append(nn.MaxPool2d(2))
            channels, side = 2 * channels, side // 2
        layers.append(nn.Flatten())
        features = found * side * side
    return nn.Sequential(*layers, nn.Linear(features, classes, bias=False), nn.BatchNorm1d(classes))


# ---- straight-through + Adam ----------------------------------------------------------------------------------


class ClippedIdentity(torch.autograd.Function):
    """sign forward; backward the gradient where the latent weight is in [−1, 1] (Hubara et al. 2016, Eq. 4)."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor) -> Tensor:
        ctx.save_for_backward(latent)
        return torch.where(latent >= 0.0, 1.0, -1.0).to(latent.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (latent,) = ctx.saved_tensors
        return gradients[0] * (latent.abs() <= 1.0)


class Binarized(nn.Module):
    """The parametrization weight = sign(latent)."""

    def forward(self, latent: Tensor) -> Tensor:
        sign: Tensor = ClippedIdentity.apply(latent)
        return sign


def binarize_layers(model: nn.Module) -> list[nn.Parameter]:
    """Make the weights of all layers signs of latent weights; returns these, which stay in [−1, 1] by clipping."""
    latent = []
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            latent.append(module.weight)
            parametrize.register_parametrization(module, "weight", Binarized())
    return latent


def main() -> None:
    """Show a network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="mlp")
    parser.add_argument("--data", choices=DATA, default="digits")
    chosen = parser.parse_args()
    images = load(chosen.data)
    model = network(chosen.model, images.x.shape[1:], int(images.y.max()) + 1)
    weights = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    print(model)
    print(f"{weights} binary weights; {len(images.y)} images to train on, {len(images.held_out_y)} held out")


if __name__ == "__main__":
    main()
