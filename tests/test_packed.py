"""Layers that keep their weights in bits: equal to the unpacked ones, small, and told where they cannot be."""

import copy
import functools
import platform
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import expfam_poco as poco
from expfam_poco.families import Categorical
from expfam_poco.tools import packed_kernel
from expfam_poco.tools.packed import PackedConv, PackedLayer, PackedLinear, coded

pytestmark = pytest.mark.filterwarnings(
    "ignore:model. its BatchNorm layers have running statistics", "ignore:model. its binary layers .* no normalisation"
)
VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "real": lambda x: x,
    "±1": lambda x: torch.where(x >= 0.0, 1.0, -1.0),
    "ternary": lambda x: x.round().clamp(-1.0, 1.0),
}


@functools.cache
def built(command: str) -> Any:
    """The kernel by another command."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", command)
        return packed_kernel.library.__wrapped__()


@pytest.fixture(params=["C++", "C++ with vectors of 8", "torch"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """With a compiler, for both kinds of vectors, and without."""
    name = request.param
    if name != "torch" and shutil.which("c++") is None:
        pytest.skip("no C++ compiler is installed")
    if name == "C++ with vectors of 8" and platform.machine() != "x86_64":
        pytest.skip("all vectors are of 8 here")
    if name != "C++":
        found = built("c++ -mno-avx512f") if name.startswith("C++") else None
        assert name == "torch" or found is not None
        monkeypatch.setattr(packed_kernel, "library", lambda: found)
    assert name == "torch" or packed_kernel.library() is not None
    yield name


def with_signs(model: Any) -> Any:
    """All weights with two axes or more become ±1."""
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.copy_(torch.where(p >= 0.0, 1.0, -1.0))
    return model


def assert_close(found: Tensor, model: nn.Module, x: Tensor) -> None:
    """Within 1e-5 of the largest output of the model in double precision."""
    expected = copy.deepcopy(model).double()(x.double()).detach()
    assert found.shape == expected.shape and found.is_contiguous() and found.dtype == x.dtype
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize(("n", "out"), [(7, 5), (64, 3), (131, 40), (1000, 300)])
def test_packed_linear_layers_are_the_unpacked_ones(kernel: str, values: str, n: int, out: int) -> None:
    """Rows that fill no vector, word or byte; few examples, and so many that tiles (two at 1000 × 300) are unpacked."""
    torch.manual_seed(0)
    model = with_signs(nn.Linear(n, out))
    layer = poco.pack_weights(model)
    assert isinstance(layer, PackedLinear) and torch.equal(layer.weight, model.weight)
    for shape in ((n,), (1, n), (3, n), (5, 8, n)):
        x = VALUES[values](torch.randn(shape))
        with torch.no_grad():
            assert_close(layer(x), model, x)
            if values != "real":
                assert torch.equal(layer(x), model(x).sub(model.bias).round() + model.bias), "counts are exact"
    assert layer(torch.randn(0, n)).shape == (0, out)
    counted = layer(torch.randn(4, n)[:, torch.arange(n)].t().contiguous().t())
    assert counted.shape == (4, out), "of any strides"


CONVOLUTIONS: list[tuple[Callable[[], nn.Module], tuple[int, ...]]] = [
    (lambda: nn.Conv1d(8, 9, 3, padding=1), (2, 8, 11)),
    (lambda: nn.Conv2d(16, 20, 3, stride=(2, 1), padding=(2, 1), bias=False), (2, 16, 9, 7)),
    (lambda: nn.Conv2d(16, 20, (2, 3), padding="same"), (2, 16, 9, 7)),
    (lambda: nn.Conv2d(24, 20, 3, padding=(0, 2), padding_mode="reflect"), (2, 24, 9, 7)),
    (lambda: nn.Conv2d(16, 20, 3, dilation=2), (16, 9, 7)),
    (lambda: nn.Conv2d(16, 20, 3, groups=4), (2, 16, 9, 7)),
    (lambda: nn.Conv3d(8, 4, 2, padding=1), (2, 8, 4, 5, 6)),
    (lambda: nn.Conv2d(5, 7, 3), (2, 5, 9, 9)),
    (lambda: nn.Conv2d(256, 150, 3, padding=1), (1, 256, 4, 4)),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # of the layer that is packed
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("number", range(len(CONVOLUTIONS)))
def test_packed_convolutions_are_the_unpacked_ones(
    kernel: str, values: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(number)
    make, shape = CONVOLUTIONS[number]
    model = with_signs(make())
    layer = poco.pack_weights(model)
    assert isinstance(layer, PackedConv) and torch.equal(layer.weight, model.weight)
    counts: list[int] = []
    agreements = packed_kernel.agreements

    def counted(*inputs: Any) -> Tensor:
        counts.append(1)
        return agreements(*inputs)

    monkeypatch.setattr(packed_kernel, "agreements", counted)
    x = VALUES[values](torch.randn(shape))
    with torch.no_grad():
        assert_close(layer(x), model, x)
    assert bool(counts) == (kernel != "torch" and values != "real" and number not in (4, 5, 7)), (
        "by bits where it says so"
    )


@pytest.mark.parametrize(("levels", "bits"), [((-1.0, 0.0, 1.0), 2), ((-0.5, 0.0, 0.1, 2.0), 2), (None, 4)])
def test_few_levels_take_two_or_four_bits(levels: tuple[float, ...] | None, bits: int) -> None:
    torch.manual_seed(0)
    levels = levels or tuple(torch.linspace(-1.0, 1.0, 16).tolist())
    model = nn.Sequential(nn.Conv2d(3, 50, 3, bias=False), nn.BatchNorm2d(50), nn.Flatten(), nn.Linear(1250, 30))
    params = [model[0].weight, model[3].weight]
    groups = [{"params": params, "family": Categorical(levels)}, {"params": [model[3].bias, *model[1].parameters()]}]
    opt = poco.PosteriorCorrected(groups, "diagonal_gaussian", lr=0.1, ess=10.0, hess_init=1.0)
    x = torch.randn(20, 3, 7, 7)
    for _ in range(2):
        opt.step(lambda: model(x).square().mean())
    for seed in (None, 3):
        plain, packed = (poco.export_binary(model, opt, seed=seed, packed=choice) for choice in (False, True))
        assert {*plain[3].weight.unique().tolist()} <= {*torch.tensor(levels).tolist()}
        for number in (0, 3):
            assert packed[number].bits == bits and torch.equal(packed[number].weight, plain[number].weight)
        assert packed[3].codes.numel() == 30 * -(-1250 * bits // 8)
        assert_close(packed.eval()(x).detach(), plain.eval(), x)
        assert torch.equal(packed.double()[3].weight, plain.double()[3].weight)


def test_means_are_exported_at_the_nearest_level() -> None:
    model = nn.Linear(40, 30)
    family = Categorical(point_estimate="mean")
    opt = poco.PosteriorCorrected([model.weight], family, lr=0.1, ess=10.0)
    opt.step(lambda: model(torch.ones(40)).square().mean())
    assert len(model.weight.unique()) > 3
    assert torch.equal(poco.export_binary(model, opt).weight, model.weight.round())


def bytes_of(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])


def test_packed_layers_are_small_and_unpack_a_little_at_a_time() -> None:
    model = with_signs(nn.Sequential(nn.Conv2d(64, 128, 3), nn.Flatten(), nn.Linear(1152, 1000)))
    packed = poco.pack_weights(model)
    assert bytes_of(packed) <= bytes_of(model) / 20
    assert all(isinstance(layer, PackedLayer) for layer in (packed[0], packed[2]))
    for layer in (packed[0], packed[2]):
        tiles = list(layer.tiles(torch.float32))
        assert len(tiles) > 1 or layer.codes.numel() * 8 <= packed_kernel.TILE
        assert max(tile.numel() for tile in tiles) <= packed_kernel.TILE


def test_the_exported_binary_model_is_the_packed_one(kernel: str, tmp_path: Path) -> None:
    """Through training, a compiled and a DataParallel wrapper, and the file."""
    make = lambda: nn.Sequential(  # noqa: E731
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), poco.BinaryActivation(), nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16),
        poco.BinaryActivation(), nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip
    torch.manual_seed(0)
    x = torch.randn(32, 1, 8, 8)
    for wrap in (nn.DataParallel, lambda m: torch.compile(m, backend="eager"), lambda m: m):
        model = wrap(make())
        opt = poco.BayesBiNN(poco.binarize_groups(model), square_momentum=None, lr=0.1, ess=320.0, seed=0)
        for _ in range(3):
            opt.step(lambda m=model: nn.functional.cross_entropy(m(x), torch.arange(32) % 10))
        plain, packed = (poco.export_binary(model, opt, packed=choice).eval() for choice in (False, True))
        assert sum(isinstance(layer, PackedLayer) for layer in packed.modules()) == 3
        with torch.no_grad():
            torch.testing.assert_close(packed(x), plain(x), rtol=1e-5, atol=1e-4)
        assert not any(isinstance(m, PackedLayer) for m in model.modules())
    poco.save_binary(tmp_path / "m", model, opt)
    again = poco.pack_weights(poco.load_binary(tmp_path / "m", make())).eval()
    assert torch.equal(again(x), packed(x))
    torch.save(packed.state_dict(), tmp_path / "packed.pt")
    fresh = poco.pack_weights(with_signs(make())).eval()
    fresh.load_state_dict(torch.load(tmp_path / "packed.pt"))
    assert torch.equal(fresh(x), packed(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_unpacked(dtype: torch.dtype) -> None:
    model = with_signs(nn.Linear(100, 20)).to(dtype)
    packed, x = poco.pack_weights(model), torch.randn(3, 100).to(dtype)
    assert packed.weight.dtype == dtype and torch.equal(packed.weight, model.weight)
    # Products and bias are rounded apart.
    torch.testing.assert_close(packed(x), model(x), rtol=4 * torch.finfo(dtype).eps, atol=60 * torch.finfo(dtype).eps)


def test_packed_layers_differentiate_their_inputs_and_can_be_transformed_and_exported() -> None:
    torch.manual_seed(0)
    model = with_signs(nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 20)))
    packed = poco.pack_weights(model)
    x = torch.randn(4, 40, requires_grad=True)
    expected, found = (torch.autograd.grad(m(x).square().sum(), x)[0] for m in (model, packed))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)
    x = x.detach()
    torch.testing.assert_close(torch.func.vmap(packed)(x), model(x), rtol=1e-5, atol=1e-4)
    traced = torch.export.export(packed, (x,))
    torch.testing.assert_close(traced.module()(x), model(x), rtol=1e-5, atol=1e-4)
    assert sum(t.numel() * t.element_size() for t in traced.state_dict.values()) <= bytes_of(packed)
    assert all(t.numel() < 1200 for t in traced.constants.values() if isinstance(t, Tensor)), "and no unpacked weight"


def test_layers_that_are_tied_hooked_or_others_own() -> None:
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.weight.sum()

    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20), Own(20, 20), nn.Linear(20, 20), nn.Linear(20, 20))
    model[1].weight = model[0].weight
    model[3].register_forward_hook(lambda module, inputs, y: -y)
    model.again = model[0]
    with_signs(model[:4])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        packed = poco.pack_weights(model)
    assert [isinstance(layer, PackedLayer) for layer in packed[:5]] == [True, True, False, False, False]
    assert packed[0].codes.data_ptr() == packed[1].codes.data_ptr() and packed.again is packed[0]
    x = torch.randn(3, 20)
    torch.testing.assert_close(packed(x), model(x), rtol=1e-5, atol=1e-2)
    with pytest.warns(UserWarning, match=r"model: 2.weight, 4.weight stay unpacked"):
        poco.pack_weights(model, ["0.weight", "1.weight", "2.weight", "4.weight"])
    with pytest.raises(ValueError, match="none of these weights can be packed; give a model with linear"):
        poco.pack_weights(model[4])
    layer = with_signs(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)).eval()
    packed, x = poco.pack_weights(layer), torch.randn(2, 5, 16)
    assert isinstance(packed.linear1, PackedLinear) and isinstance(packed.self_attn, nn.MultiheadAttention)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), layer(x), rtol=1e-5, atol=1e-4)


def test_weights_that_bits_do_not_hold_stay() -> None:
    assert coded(torch.tensor([[1.0, float("nan")], [1.0, -1.0]])) is None
    assert coded(torch.randn(3, 40)) is None
    assert coded(torch.tensor([[0.0, -0.0], [2.0, -2.0]])).scale.tolist() == [0.0, 2.0]  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="can be packed"):
        poco.pack_weights(nn.Linear(1, 64))  # bits and scales would be larger than the weights


def test_a_kernel_that_cannot_be_built_is_told_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No compiler, a failing one, a library that is none, a cache that cannot be: right results, and one warning."""
    packed, x = poco.pack_weights(with_signs(nn.Linear(50, 40))), torch.randn(2, 50)
    expected = packed(x)
    fake = tmp_path / "fake"
    fake.write_text("#!/bin/sh\nfor last; do :; done\nshift 6\ncase $1 in -o) echo no library > $2;; esac\n")
    fake.chmod(0o755)
    (tmp_path / "file").write_text("")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"CXX": "no-such-compiler"}, "No such file"),
        ({"CXX": "c++ --no-such-option"}, "no-such-option"),
        ({"CXX": str(fake)}, "kernel"),
        ({"XDG_CACHE_HOME": str(tmp_path / "file")}, "file"),
    ]
    for number, (variables, words) in enumerate(cases):
        with monkeypatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(tmp_path / str(number)))
            for name, value in variables.items():
                patch.setenv(name, value)
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                patch.setattr(packed_kernel, "library", functools.cache(packed_kernel.library.__wrapped__))
                for _ in range(2):
                    torch.testing.assert_close(packed(x), expected, rtol=1e-5, atol=1e-5)
        assert len(seen) == 1 and words in str(seen[0].message) and "install a compiler" in str(seen[0].message)


def test_an_onnx_file_holds_the_bits_and_onnxruntime_unpacks_them(tmp_path: Path) -> None:
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)), torch.randn(3, 512)
    for layer in (model[0], model[2]):
        layer.weight.data.sign_()
    path = tmp_path / "model.onnx"
    small = poco.pack_weights(model).eval()
    torch.onnx.export(small, (x,), path, dynamo=True, external_data=False, verbose=False)
    assert path.stat().st_size < 4 * sum(p.numel() for p in model.parameters()) / 8
    bits = [t for t in onnx.load(path).graph.initializer if t.data_type == onnx.TensorProto.UINT8]
    assert [list(t.dims) for t in bits] == [[512, 64]]
    session = runtime.InferenceSession(path)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.tensor(found), model(x).detach(), rtol=1e-5, atol=1e-4)
