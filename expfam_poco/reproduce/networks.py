"""The networks of the papers' pictures: ResNets, ResNeXt, VGG and ConvMixer; small versions are small arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import functional


class Residual(nn.Module):
    """relu(f(x) + shortcut(x)), the shortcut a 1×1 convolution where the shape changes.

    Args:
        channels: of the input.
        out: of the output.
        stride: of the block.
        middle: layers of f, the last of which is a BatchNorm.
    """

    def __init__(self, channels: int, out: int, stride: int, middle: Sequence[nn.Module]) -> None:
        super().__init__()
        self.f = nn.Sequential(*middle)
        same = channels == out and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(*convolution(channels, out, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        """As said."""
        return functional.relu(self.f(x) + self.shortcut(x))


def convolution(channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution without bias, and a BatchNorm."""
    layer = nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [layer, nn.BatchNorm2d(out)]


def basic(channels: int, out: int, stride: int) -> Residual:
    """Two 3×3 convolutions."""
    return Residual(
        channels, out, stride, [*convolution(channels, out, 3, stride), nn.ReLU(), *convolution(out, out, 3)]
    )


def bottleneck(channels: int, out: int, stride: int, groups: int = 1, inner: int | None = None) -> Residual:
    """1×1, 3×3 (in groups), 1×1."""
    inner = out // 4 if inner is None else inner
    layers = [
        *convolution(channels, inner, 1), nn.ReLU(),
        *convolution(inner, inner, 3, stride, groups), nn.ReLU(),
        *convolution(inner, out, 1),
    ]  # fmt: skip
    return Residual(channels, out, stride, layers)


def _head(channels: int, classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]


def _stages(
    block: Callable[[int, int, int], nn.Module], first: int, widths: Sequence[int], depths: Sequence[int]
) -> list[nn.Module]:
    """Stages of blocks; every stage but the first halves the picture."""
    layers: list[nn.Module] = []
    for number, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        for place in range(depth):
            layers.append(block(first, width, 2 if number and not place else 1))
            first = width
    return layers


def resnet(colours: int, classes: int, width: int = 16, depth: int = 3) -> nn.Sequential:
    """He et al.'s CIFAR ResNet: three stages of `depth` basic blocks; ResNet-20 at the defaults."""
    stem = [*convolution(colours, width, 3), nn.ReLU()]
    widths = (width, 2 * width, 4 * width)
    return nn.Sequential(*stem, *_stages(basic, width, widths, [depth] * 3), *_head(4 * width, classes))


def resnet50(colours: int, classes: int, width: int = 64, depths: Sequence[int] = (3, 4, 6, 3)) -> nn.Sequential:
    """ResNet-50 for pictures of 224 × 224 (He et al. 2016), the stride in the 3×3 convolutions."""
    stem = [*convolution(colours, width, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    widths = [4 * width * 2**stage for stage in range(len(depths))]
    return nn.Sequential(*stem, *_stages(bottleneck, width, widths, depths), *_head(widths[-1], classes))


def bottlenecks(colours: int, classes: int, width: int = 8) -> nn.Sequential:
    """A ResNet of bottlenecks for pictures of 8 × 8: three stages of one block."""
    stem = [*convolution(colours, width, 3), nn.ReLU()]
    widths = (2 * width, 4 * width, 8 * width)
    return nn.Sequential(*stem, *_stages(bottleneck, width, widths, [1] * 3), *_head(8 * width, classes))


def resnext(
    colours: int, classes: int, width: int = 64, depths: Sequence[int] = (1, 1, 1), groups: int = 8, widen: int = 4
) -> nn.Sequential:
    """ResNeXt (Xie et al. 2017): three stages of [256, 512, 1024] channels in 8 groups of 64 at the first."""

    def block(channels: int, out: int, stride: int) -> Residual:
        return bottleneck(channels, out, stride, groups, 2 * out)

    stem = [*convolution(colours, width, 3), nn.ReLU()]
    widths = [widen * width * 2**stage for stage in range(len(depths))]
    return nn.Sequential(*stem, *_stages(block, width, widths, depths), *_head(widths[-1], classes))


VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)
VGG19 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 256, 0, 512, 512, 512, 512, 0, 512, 512, 512, 512, 0)


def vgg(colours: int, classes: int, channels: Sequence[int] = VGG16) -> nn.Sequential:
    """VGG with BatchNorm (Simonyan and Zisserman 2015); a zero is a max-pooling."""
    layers: list[nn.Module] = []
    for out in channels:
        layers += [*convolution(colours, out, 3), nn.ReLU()] if out else [nn.MaxPool2d(2)]
        colours = out or colours
    return nn.Sequential(*layers, *_head(colours, classes))


class Around(nn.Sequential):
    """x + f(x)."""

    def forward(self, x: Tensor) -> Tensor:
        """As said."""
        mixed: Tensor = super().forward(x)
        return x + mixed


def conv_mixer(
    colours: int, classes: int, width: int = 256, depth: int = 8, kernel: int = 5, patch: int = 2
) -> nn.Sequential:
    """ConvMixer (Trockman and Kolter 2023); 256/8 at the defaults."""

    def block() -> list[nn.Module]:
        mixing = nn.Conv2d(width, width, kernel, groups=width, padding="same")
        around = Around(mixing, nn.GELU(), nn.BatchNorm2d(width))
        return [around, nn.Conv2d(width, width, 1), nn.GELU(), nn.BatchNorm2d(width)]

    stem = [nn.Conv2d(colours, width, patch, patch), nn.GELU(), nn.BatchNorm2d(width)]
    return nn.Sequential(*stem, *(layer for _ in range(depth) for layer in block()), *_head(width, classes))


NETWORKS: dict[str, Callable[..., nn.Sequential]] = {
    "resnet": resnet,
    "resnet50": resnet50,
    "bottlenecks": bottlenecks,
    "resnext": resnext,
    "vgg": vgg,
    "conv-mixer": conv_mixer,
}
