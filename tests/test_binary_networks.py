"""Groups of mixed models, export to exactly ±1, and packed files."""

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from optimizer_cases import equal
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import expfam_poco as poco
from expfam_poco.families import Bernoulli, DiagonalGaussian
from expfam_poco.tools.binary import _digest

# These models are trained for a few steps, and exported as they are.
pytestmark = pytest.mark.filterwarnings(
    "ignore:model. its BatchNorm layers have running statistics", "ignore:model. its binary layers .* no normalisation"
)


class Net(nn.Module):
    """Convolution, BatchNorm, two linear layers; 1-channel images of 6 × 6."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.hidden = nn.Linear(64, width)
        self.out = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.hidden(torch.tanh(self.norm(self.conv(x))).flatten(1)) / 8.0))


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(16, 1, 6, 6, generator=generator).to(dtype), torch.randint(3, (16,), generator=generator)


def trained(
    *, dtype: torch.dtype = torch.float32, steps: int = 3, seed: int = 0, width: int = 8, **choices: Any
) -> tuple[Net, Any]:
    torch.manual_seed(seed)
    model = Net(width).to(dtype)
    opt = poco.BayesBiNNPoCo(poco.binarize_groups(model, **choices), square_momentum=None, lr=0.01, ess=16.0, seed=0)
    x, y = batch(dtype)
    for _ in range(steps):
        opt.step(lambda: nn.functional.cross_entropy(model(x).float(), y))
    return model, opt


def names_of(groups: list[dict[str, Any]]) -> list[list[str]]:
    return [[name for name, _ in group["params"]] for group in groups]


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_state(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and equal(list(first.values()), list(second.values()))


# ---- groups -------------------------------------------------------------------------------------------------

REAL = ["conv.bias", "norm.weight", "norm.bias", "hidden.bias", "out.bias"]


@pytest.mark.parametrize(
    ("choices", "signs"),
    [
        ({}, ["conv.weight", "hidden.weight", "out.weight"]),
        ({"keep_first": True}, ["hidden.weight", "out.weight"]),
        ({"keep_last": True}, ["conv.weight", "hidden.weight"]),
        ({"keep_first": True, "keep_last": True}, ["hidden.weight"]),
        ({"keep": ["hidden"]}, ["conv.weight", "out.weight"]),
        ({"keep": ["hidden.weight", "norm"]}, ["conv.weight", "out.weight"]),
        ({"layers": [nn.Conv2d]}, ["conv.weight"]),
    ],
)
def test_groups_of_a_mixed_model(choices: dict[str, Any], signs: list[str]) -> None:
    model = Net()
    groups = poco.binarize_groups(model, **choices, gaussian={"lr": 0.2, "beta2": 0.9}, binary={"ess": 7.0})
    binary, real = names_of(groups)
    assert binary == signs
    assert sorted(binary + real) == sorted(name for name, _ in model.named_parameters())
    assert groups[1]["lr"] == 0.2 and groups[0]["ess"] == 7.0
    opt = poco.BayesBiNN(groups, square_momentum=None, lr=0.01, ess=16.0, strength=3.0, stale_mean=True)
    family = opt.param_groups[0]["family"]
    assert family.strength == 3.0 and family.initial == "sign" and isinstance(family, Bernoulli.stale_variant())
    assert isinstance(opt.param_groups[1]["family"], DiagonalGaussian)
    assert opt.param_groups[0]["ess"] == 7.0 and opt.param_groups[1]["precision_lr"] == pytest.approx(0.1)
    x, y = batch()
    opt.step(lambda: nn.functional.cross_entropy(model(x), y))
    for name, p in model.named_parameters():
        assert bool((p.abs() == 1.0).all()) == (name in signs), name


def test_the_gaussian_group_steps_as_ivon_does() -> None:
    """With the binary weights frozen at their signs, the rest is IVON's first step (one with the same noise)."""
    found = []
    for alone in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 2), nn.Tanh())
        x = torch.randn(8, 3)
        with torch.no_grad():
            model[0].weight.copy_(model[0].weight.sign())
        groups = poco.binarize_groups(model)
        if alone:
            opt: Any = poco.IVON(
                [("0.weight", model[0].weight), ("0.bias", model[0].bias)], lr=0.1, ess=8.0, hess_init=1.0,
                beta2=0.9999, weight_decay=1e-4, noise="zero", curvature="exact",
            )  # fmt: skip
            model[0].weight.requires_grad_(False)
        else:
            groups[1]["curvature"] = "exact"
            opt = poco.BayesBiNN(groups, square_momentum=None, lr=1e-9, ess=8.0, noise="zero", strength=30.0)
        opt.step(lambda m=model, v=x: m(v).square().mean())
        found.append(model[0].bias.detach().clone())
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-7)


def test_tied_weights_are_binary_in_both_places() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    for choices in ({}, {"keep": ["1"]}, {"keep_last": True}):
        assert names_of(poco.binarize_groups(model, **choices)) == [["0.weight"], ["0.bias", "1.bias"]]
    embedded = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    embedded[1].weight = embedded[0].weight
    assert names_of(poco.binarize_groups(embedded)) == [["0.weight"]]
    opt = poco.BayesBiNN(poco.binarize_groups(embedded), square_momentum=None, lr=0.1, ess=1.0)
    opt.step(lambda: embedded(torch.arange(5)).square().mean())
    assert embedded[0].weight is embedded[1].weight
    assert bool((poco.export_binary(embedded, opt)[1].weight.abs() == 1.0).all())


def test_frozen_parameters_are_left_out() -> None:
    model = Net()
    model.hidden.requires_grad_(False)
    before = model.hidden.weight.clone()
    groups = poco.binarize_groups(model)
    assert names_of(groups)[0] == ["conv.weight", "out.weight"]
    assert not any("hidden" in name for name in names_of(groups)[1])
    opt = poco.BayesBiNN(groups, square_momentum=None, lr=0.1, ess=1.0)
    x, y = batch()
    opt.step(lambda: nn.functional.cross_entropy(model(x), y))
    assert torch.equal(model.hidden.weight, before)
    assert torch.equal(poco.export_binary(model, opt).hidden.weight, before)


def test_a_model_of_binary_weights_alone_has_one_group() -> None:
    assert names_of(poco.binarize_groups(nn.Linear(3, 2, bias=False))) == [["weight"]]


@pytest.mark.parametrize(
    ("make", "choices", "words"),
    [
        (Net, {"keep": ["hiden"]}, "keep='hiden': the model has no module or parameter of this name"),
        (lambda: nn.BatchNorm1d(3), {}, "none of its trainable weights would be binary; give other `layers`"),
        (lambda: nn.Linear(2, 2), {"keep_first": True}, "or keep fewer of them"),
        (lambda: nn.Linear(2, 2).requires_grad_(False), {}, "none of its trainable weights would be binary"),
        (Net, {"layers": [nn.LSTM]}, "none of its trainable weights would be binary"),
    ],
)
def test_groups_that_cannot_be_are_refused(make: Callable[[], nn.Module], choices: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        poco.binarize_groups(make(), **choices)


# ---- export -------------------------------------------------------------------------------------------------


def test_the_exported_mode_is_the_model_between_steps() -> None:
    model, opt = trained()
    model.eval()
    x, _ = batch()
    before, logits = state_of(model), model(x)
    exported = poco.export_binary(model, opt)
    assert torch.equal(exported(x), logits) and exported is not model
    assert same_state(state_of(model), before)
    for name in ("conv.weight", "hidden.weight", "out.weight"):
        value = dict(exported.named_parameters())[name]
        assert torch.equal(value, opt.posterior_states()[name].theta.sign())
    exported.hidden.weight.data.zero_()
    assert same_state(state_of(model), before), "a copy"


def test_an_exported_draw_is_that_of_the_seed() -> None:
    model, opt = trained()
    model.eval()
    x, _ = batch()
    with opt.sampled(7):
        expected = model(x)
    exported = poco.export_binary(model, opt, seed=7)
    assert torch.equal(exported(x), expected)
    assert bool((exported.hidden.weight.abs() == 1.0).all())
    other = poco.export_binary(model, opt, seed=8)
    assert not torch.equal(other.hidden.weight, exported.hidden.weight)
    assert not torch.equal(other.hidden.bias, exported.hidden.bias), "a draw from the whole posterior"


def test_export_is_exact_where_the_model_holds_means() -> None:
    torch.manual_seed(0)
    model = Net()
    groups = poco.binarize_groups(model, binary={"family": poco.get_family("bernoulli")(point_estimate="mean")})
    opt = poco.BayesBiNNPoCo(groups, square_momentum=None, lr=0.01, ess=16.0)
    x, y = batch()
    for _ in range(3):
        opt.step(lambda: nn.functional.cross_entropy(model(x), y))
    assert bool((model.hidden.weight.abs() < 1.0).all())
    exported = poco.export_binary(model, opt)
    assert torch.equal(exported.hidden.weight, model.hidden.weight.sign())
    assert torch.equal(exported.hidden.bias, model.hidden.bias)


def test_export_after_a_one_pass_step_is_still_the_mode() -> None:
    model = nn.Linear(6, 5)
    opt = poco.BayesBiNN(poco.binarize_groups(model), lr=0.01, ess=16.0, one_pass=True, backend="eager")
    for _ in range(3):
        opt.step(lambda: model(torch.ones(6)).square().sum())
    exported = poco.export_binary(model, opt)
    assert torch.equal(exported.weight, opt.posterior_states()["weight"].theta.sign())


def test_export_needs_binary_weights() -> None:
    model = nn.Linear(3, 2)
    opt = poco.IVON(model.parameters(), lr=0.1, ess=1.0)
    with pytest.raises(ValueError, match=r"it holds no binary parameter of this model; make its groups by binarize"):
        poco.export_binary(model, opt)


# ---- packed files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", [None, 3])
def test_a_packed_model_is_exact(tmp_path: Path, dtype: torch.dtype, seed: int | None) -> None:
    model, opt = trained(dtype=dtype)
    before = state_of(model)
    packed = poco.save_binary(tmp_path / "model.safetensors", model, opt, seed=seed)
    assert same_state(state_of(model), before)
    exported = poco.export_binary(model, opt, seed=seed).eval()
    other = Net().to(dtype)
    assert poco.load_binary(tmp_path / "model.safetensors", other) is other
    assert same_state(state_of(other), state_of(exported)), "weights and BatchNorm's buffers, in their dtypes"
    x, _ = batch(dtype)
    assert torch.equal(other.eval()(x), exported(x))
    assert float(other.norm.running_mean.abs().sum()) > 0.0
    assert packed.binary_weights == 36 + 512 + 24 and packed.bytes == (tmp_path / "model.safetensors").stat().st_size
    assert packed.binary_weights + packed.other_numbers == sum(v.numel() for v in before.values())
    assert list(tmp_path.iterdir()) == [tmp_path / "model.safetensors"], "no temporary file is left"


def test_a_weight_takes_one_bit(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(1000, 300, bias=False), nn.Linear(300, 7, bias=False))
    opt = poco.BayesBiNN(poco.binarize_groups(model), square_momentum=None, lr=0.1, ess=1.0)
    packed = poco.save_binary(tmp_path / "m", model, opt)
    bits = 1000 * 300 + 300 * 7
    assert bits / 8 <= packed.bytes <= bits / 8 + 1024
    assert packed.float_bytes == 4 * bits and 30.0 < packed.compression < 32.0


def test_odd_shapes_survive(tmp_path: Path) -> None:
    """Sizes that fill no whole byte, tied weights, a transposed weight, a model on which training goes on."""
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 5))
    model[2].weight = model[1].weight
    model[0].weight = nn.Parameter(torch.randn(3, 5).T)
    opt = poco.BayesBiNN(poco.binarize_groups(model), square_momentum=None, lr=0.1, ess=1.0)
    opt.step(lambda: model(torch.ones(3)).square().sum())
    packed = poco.save_binary(tmp_path / "m", model, opt)
    assert packed.binary_weights == 15 + 25 + 25, "under both names"
    fresh = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 5))
    poco.load_binary(tmp_path / "m", fresh)
    assert same_state(state_of(fresh), state_of(poco.export_binary(model, opt)))


def test_a_file_is_replaced_or_stays(tmp_path: Path) -> None:
    model, opt = trained()
    path = tmp_path / "model.safetensors"
    poco.save_binary(path, model, opt)
    first = path.read_bytes()
    with pytest.raises(ValueError, match="binarize_groups"):
        poco.save_binary(path, model, poco.IVON(model.parameters(), lr=0.1, ess=1.0))
    assert path.read_bytes() == first
    x, y = batch()
    opt.step(lambda: nn.functional.cross_entropy(model(x), y))
    poco.save_binary(path, model, opt)
    assert path.read_bytes() != first
    with pytest.raises(FileNotFoundError):
        poco.load_binary(tmp_path / "none", model)


def refused(path: Path, words: str | None = None) -> None:
    """One sentence, and the model is as it was."""
    other = Net()
    before = state_of(other)
    with pytest.raises(poco.CheckpointError, match=words) as caught:
        poco.load_binary(path, other)
    assert same_state(state_of(other), before)
    assert str(path) in str(caught.value) and str(caught.value).count("\n") == 0


def corrupted(whole: bytes, header: int, random: Random) -> bytes:
    """A file with a piece of it changed, half of the time in the header: bits, bytes, blocks, its end."""
    size = len(whole)
    at = random.randrange(header) if random.random() < 0.5 else random.randrange(header, size)
    length = min(random.choice((1, 2, 7, 8, 40, 300)), size - at)
    before, piece, after = whole[:at], whole[at : at + length], whole[at + length :]
    other = random.randrange(size)
    kinds: list[Callable[[], bytes]] = [
        lambda: before + bytes([whole[at] ^ 1 << random.randrange(8)]) + whole[at + 1 :],
        lambda: before + random.randbytes(length) + after,
        lambda: before + bytes(length) + after,
        lambda: before + after,
        lambda: before + piece + piece + after,
        lambda: before + piece[::-1] + after,
        lambda: before,
        lambda: whole + random.randbytes(length),
        lambda: before + whole[other : other + length] + after,
        lambda: whole[other:] + whole[:other],
    ]
    return random.choice(kinds)()


@pytest.mark.parametrize("count", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_corrupted_files_are_refused_and_nothing_is_changed(count: int, tmp_path: Path) -> None:
    """Random ones, half of them in the header."""
    model, opt = trained()
    path, hurt = tmp_path / "model.safetensors", tmp_path / "hurt"
    poco.save_binary(path, model, opt)
    whole = path.read_bytes()
    header, random = 8 + int.from_bytes(whole[:8], "little"), Random(0)
    for _ in range(count):
        damaged = corrupted(whole, header, random)
        if damaged != whole:
            hurt.write_bytes(damaged)
            refused(hurt)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    model, opt = trained()
    path = tmp_path / "f"
    save_file({"weight": torch.ones(2)}, path)
    refused(path, "not written by this version of save_binary")
    save_file({"weight": torch.ones(2)}, path, metadata={"format": "pt"})
    refused(path, "not written by this version of save_binary")
    torch.save(model.state_dict(), path)
    refused(path, "damaged, or no safetensors file")
    path.write_text("hello")
    refused(path, "damaged, or no safetensors file")
    poco.save_binary(path, model, opt)
    with safe_open(path, "pt") as file:
        described, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for change in ({"version": "9"}, {"binary": "["}, {"binary": json.dumps({"no": [[1], "float32"]})}, {"sha256": ""}):
        save_file(tensors, path, metadata=described | change)
        refused(path)
    for missing in ("binary", "sha256"):
        save_file(tensors, path, metadata={k: v for k, v in described.items() if k != missing})
        refused(path)


def test_another_models_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m"
    poco.save_binary(path, *trained(width=9))
    refused(path, r"'hidden.weight' is \(9, 64\) there and \(8, 64\) in the model|'hidden.bias'|'out.weight'")
    small = nn.Linear(3, 2)
    poco.save_binary(path, small, poco.BayesBiNN(poco.binarize_groups(small), square_momentum=None, lr=0.1, ess=1.0))
    refused(path, "missing")


# ---- wrappers, other layers, and files that claim much -----------------------------------------------------


def stack() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 3))


WRAPPED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compile": lambda model: torch.compile(model, backend="eager"),  # type: ignore[dict-item]
    "DataParallel": nn.DataParallel,
    "both": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),  # type: ignore[dict-item]
    "a part": lambda model: nn.Sequential(torch.compile(model[0], backend="eager"), *model[1:]),  # type: ignore
    "none": lambda model: model,
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_files_and_names_survive_wrappers(kind: str, tmp_path: Path) -> None:
    model = WRAPPED[kind](stack())
    groups = poco.binarize_groups(model, keep=["2"])
    assert [p.shape for _, p in groups[0]["params"]] == [(16, 8)]
    opt = poco.BayesBiNN(groups, square_momentum=None, lr=1e-3, ess=64.0)
    poco.save_binary(tmp_path / "m", model, opt)
    plain, again = poco.load_binary(tmp_path / "m", stack()), poco.load_binary(tmp_path / "m", WRAPPED[kind](stack()))
    expected = list(poco.export_binary(model, opt).state_dict().values())
    for loaded in (plain, again):
        assert all(map(torch.equal, loaded.state_dict().values(), expected))


def test_layers_whose_weights_have_other_names() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32)
    with pytest.warns(UserWarning, match=r"self_attn.in_proj_weight stay real, as MultiheadAttention .* `keep`"):
        groups = poco.binarize_groups(layer)
    assert "self_attn.in_proj_weight" in [name for name, _ in groups[1]["params"]]
    poco.binarize_groups(layer, keep=["self_attn.in_proj_weight"])  # said, so no warning
    groups = poco.binarize_groups(layer, layers=[nn.Linear, nn.MultiheadAttention])
    assert [name for name, _ in groups[0]["params"]] == [
        "self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight",
    ]  # fmt: skip
    lstm = poco.binarize_groups(nn.LSTM(4, 4), layers=[nn.LSTM])
    assert [name for name, _ in lstm[0]["params"]] == ["weight_ih_l0", "weight_hh_l0"]
    with pytest.raises(ValueError, match=r"'' \(ParameterList\) has no weight of its own, but \['0'\]"):
        poco.binarize_groups(nn.ParameterList([torch.ones(2, 2)]), layers=[nn.ParameterList])


@pytest.mark.filterwarnings("error")
def test_binary_layers_without_a_normalisation_are_named() -> None:
    plain = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3))
    with pytest.warns(UserWarning, match=r"binary layers \('0' to '2'\) have no normalisation"):
        poco.binarize_groups(plain)

    class Factor(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / 8.0

    poco.binarize_groups(plain, keep_last=True)
    poco.binarize_groups(nn.Sequential(nn.Linear(64, 32), Factor(), nn.Linear(32, 3)))
    poco.binarize_groups(nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32), nn.Linear(32, 3)))


BITS = torch.tensor([170], dtype=torch.uint8)


@pytest.mark.parametrize(
    ("tensors", "listed", "words"),
    [
        ({"weight": BITS}, {"weight": [[200_000_000_000], "float32"]}, r"\(200000000000,\) there and \(2, 4\)"),
        ({"weight": BITS[:0]}, {"weight": [[2, 4], "float32"]}, "not as many bits"),
        ({"weight": BITS.repeat(99)}, {"weight": [[2, 4], "float32"]}, "not as many bits"),
        ({"weight": torch.ones(1)}, {"weight": [[2, 4], "float32"]}, "bits are no bytes"),
        ({"weight": BITS}, {"weight": [[2, 4], "load"]}, "list of binary weights is damaged"),
        ({"weight": BITS}, {"weight": [[2, 4], "int8"]}, "list of binary weights is damaged"),
        ({"weight": BITS}, {"weight": [[-2, -4], "float32"]}, "list of binary weights is damaged"),
        ({"weight": BITS}, {"weight": [["a"], "float32"]}, "list of binary weights is damaged"),
        ({"weight": BITS}, {"weight": 3}, "list of binary weights is damaged"),
        ({"weight": BITS}, ["weight"], "list of binary weights is damaged"),
        ({"weight": torch.ones(2, 4)}, None, "list of binary weights is damaged"),
        ({"weight": torch.ones(2, 4)}, {"other": [[2, 4], "float32"]}, "not as many bits"),
    ],
)
def test_files_with_a_right_checksum_are_believed_nothing(
    tensors: dict[str, Tensor], listed: Any, words: str, tmp_path: Path
) -> None:
    path, model = tmp_path / "f", nn.Linear(4, 2, bias=False)
    before = model.weight.clone()
    described = {"format": "expfam_poco.binary", "version": "1", "binary": json.dumps(listed)}
    save_file(tensors, path, metadata={**described, "sha256": _digest(tensors, listed)})
    with pytest.raises(poco.CheckpointError, match=words):
        poco.load_binary(path, model)
    assert torch.equal(model.weight, before)


@pytest.mark.filterwarnings("error")
def test_export_reminds_once_of_statistics_from_training() -> None:
    model = stack()
    opt = poco.BayesBiNN(poco.binarize_groups(model), square_momentum=None, lr=1e-3, ess=64.0)
    poco.export_binary(model, opt)  # nothing has been trained
    x = torch.randn(12, 8)
    opt.step(lambda: model(x).square().mean())
    with pytest.warns(UserWarning, match="call poco.recalibrate_batchnorm"):
        poco.export_binary(model, opt)
    poco.export_binary(model, opt)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("family", ["bernoulli", "categorical"])
def test_vectors_that_become_levels_beside_matrices_are_told(family: str, named: bool) -> None:
    model = nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    params = list(model.named_parameters() if named else model.parameters())
    names = (
        "0.bias, 1.weight, 1.bias, 2.bias" if named else "group0.param1, group0.param2, group0.param3, group0.param5"
    )
    with pytest.warns(
        UserWarning, match=rf"^params: {names} have fewer than two axes.* from -1 to 1 .*binarize_groups"
    ):
        poco.PosteriorCorrected(params, family, lr=0.1, ess=1.0)


@pytest.mark.filterwarnings("error")
def test_what_is_meant_to_be_binary_is_not_told() -> None:
    model = nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    poco.BayesBiNN(poco.binarize_groups(model), square_momentum=None, lr=0.1, ess=1.0)
    poco.BayesBiNN([nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(3))], square_momentum=None, lr=0.1, ess=1.0)
    poco.BayesBiNN([p for p in model.parameters() if p.ndim > 1], square_momentum=None, lr=0.1, ess=1.0)
    poco.IVON(model.parameters(), lr=0.1, ess=1.0)
