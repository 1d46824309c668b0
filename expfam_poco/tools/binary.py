"""Binary networks around the optimizer: parameter groups, export to exactly ±1, and files of one bit per weight."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from expfam_poco.engine.settings import translate
from expfam_poco.errors import CheckpointError
from expfam_poco.optim.optimizer import PosteriorCorrected

FORMAT, VERSION = "expfam_poco.binary", "1"
LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
GAUSSIAN = {
    "lr": 0.1, "hess_init": 1.0, "beta1": 0.9, "beta2": 0.9999, "weight_decay": 1e-4, "curvature": "reparam",
    "lr_scale": "initial_hessian", "prior_in_momentum": False,
}  # fmt: skip


def binarize_groups(
    model: nn.Module,
    *,
    layers: Sequence[type[nn.Module]] = LAYERS,
    keep: Iterable[str] = (),
    keep_first: bool = False,
    keep_last: bool = False,
    binary: Mapping[str, Any] | None = None,
    gaussian: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups that make a model's weights binary, and give everything else a Gaussian (IVON) posterior.

    Binary are the weights of the linear and convolutional layers; biases, normalisation scales and the layers that are
    kept stay real. Parameters that require no gradient are left out. Whether activations are binary is the model's
    choice.

    Args:
        model: the network.
        layers: the kinds of modules whose `weight` becomes binary.
        keep: names of layers, of modules that contain some, or of their weights, which stay real.
        keep_first: the first of those layers stays real.
        keep_last: the last of those layers stays real.
        binary: hyperparameters of the binary group, over those of the optimizer.
        gaussian: hyperparameters of the real group, in IVON's names, over lr=0.1, hess_init=1, beta1=0.9,
            beta2=0.9999, weight_decay=1e-4.

    Returns:
        one or two groups for `BayesBiNN` or `BayesBiNNPoCo`.

    Raises:
        ValueError: if no weight would be binary, or a name in `keep` is unknown.

    Example:
        >>> import torch, expfam_poco as poco
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))
        >>> groups = poco.binarize_groups(model, keep_last=True)
        >>> [[name for name, _ in group["params"]] for group in groups]
        [['0.weight'], ['0.bias', '1.weight', '1.bias', '2.weight', '2.bias']]
        >>> opt = poco.BayesBiNNPoCo(groups, lr=1e-3, ess=100.0)
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    found = [name for name, module in modules.items() if isinstance(module, tuple(layers))]
    kept = _kept(model, found, [keep] if isinstance(keep, str) else list(keep))
    kept |= set(found[:1] if keep_first else []) | set(found[-1:] if keep_last else [])
    for name in found:
        if "weight" not in modules[name]._parameters and name not in kept:
            raise ValueError(
                f"model: the weight of {name!r} is computed (by a parametrization), so it cannot be binary; remove the "
                "parametrization, or name the layer in `keep`."
            )
    # A tied weight that is binary in one place is binary.
    chosen = {id(modules[name].weight) for name in found if name not in kept}
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    signs = [(name, p) for name, p in named if id(p) in chosen]
    rest = [(name, p) for name, p in named if id(p) not in chosen]
    if not signs:
        raise ValueError(
            "model: none of its trainable weights would be binary; give other `layers`, or keep fewer of them."
        )
    groups: list[dict[str, Any]] = [{"params": signs, **(binary or {})}]  # of the optimizer's own Bernoulli family
    if rest:
        usual, own = dict(GAUSSIAN), dict(gaussian or {})
        translate(usual)
        translate(own)
        groups.append({"params": rest, "family": "diagonal_gaussian", **usual, **own})
    return groups


def _kept(model: nn.Module, layers: Sequence[str], keep: Sequence[str]) -> set[str]:
    """The layers that stay real: those named, those inside a module that is named, those whose weight is named."""
    known = {name for name, _ in model.named_modules(remove_duplicate=False)}
    known |= {name for name, _ in model.named_parameters(remove_duplicate=False)}
    kept = set()
    for name in keep:
        if name not in known:
            raise ValueError(f"keep={name!r}: the model has no module or parameter of this name.")
        kept |= {layer for layer in layers if name in (layer, f"{layer}.weight") or layer.startswith(f"{name}.")}
    return kept


def binary_names(model: nn.Module, optimizer: PosteriorCorrected) -> list[str]:
    """Names of the model's parameters whose posterior is over −1 and 1, all names of tied ones."""
    if not isinstance(optimizer, PosteriorCorrected):
        raise TypeError(
            f"optimizer={type(optimizer).__name__}: it has no posterior; give the optimizer that trained the binary "
            "weights, such as BayesBiNN."
        )
    two = {id(p) for g in optimizer.param_groups if g["family"].levels == (-1.0, 1.0) for p in g["params"]}
    return [name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in two]


@torch.no_grad()
def export_binary(model: nn.Module, optimizer: PosteriorCorrected, *, seed: int | None = None) -> nn.Module:
    """A copy of the model whose binary weights are exactly ±1: the posterior's mode, or a draw.

    Args:
        model: the trained network.
        optimizer: the optimizer that holds its posterior.
        seed: of a draw from the whole posterior; None: modes of binary weights, means of the others.

    Raises:
        ValueError: if no parameter of the model is binary.

    Example:
        >>> import torch, expfam_poco as poco
        >>> model = torch.nn.Linear(3, 2)
        >>> opt = poco.BayesBiNN(poco.binarize_groups(model), lr=0.1, ess=10.0)
        >>> poco.export_binary(model, opt).weight.abs()
        tensor([[1., 1., 1.],
                [1., 1., 1.]], grad_fn=<AbsBackward0>)
    """
    names = binary_names(model, optimizer)
    if not names:
        raise ValueError("optimizer: it holds no binary parameter of this model; make its groups by binarize_groups().")
    with optimizer.sampled(seed, at_point=seed is None):
        exported = copy.deepcopy(model)
    parameters = dict(exported.named_parameters(remove_duplicate=False))
    for name in names:
        value = parameters[name]
        value.copy_(torch.where(value >= 0.0, 1.0, -1.0))  # of means tanh λ, too, this is the mode
    return exported


class Packed(NamedTuple):
    """What a packed file holds.

    Example:
        >>> from expfam_poco.binary import Packed
        >>> Packed(bytes=150, float_bytes=1000, binary_weights=200, other_numbers=50).compression
        6.666666666666667
    """

    bytes: int
    float_bytes: int
    binary_weights: int
    other_numbers: int

    @property
    def compression(self) -> float:
        """How many times smaller than the numbers in their own dtypes."""
        return self.float_bytes / self.bytes


def save_binary(
    path: str | os.PathLike[str], model: nn.Module, optimizer: PosteriorCorrected, *, seed: int | None = None
) -> Packed:
    """Write `export_binary(model, optimizer)` with one bit for each binary weight, as a safetensors file.

    Everything else of the model's `state_dict` is stored as it is. Needs the package `safetensors`.

    Args:
        path: the file, replaced if it exists.
        model: as all further arguments, see `export_binary`.

    Returns:
        sizes.

    Example:
        >>> import tempfile, torch, expfam_poco as poco
        >>> model = torch.nn.Linear(64, 64)
        >>> opt = poco.BayesBiNN(poco.binarize_groups(model), lr=0.1, ess=10.0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     packed = poco.save_binary(f"{folder}/model.safetensors", model, opt)
        ...     _ = poco.load_binary(f"{folder}/model.safetensors", model)
        >>> packed.binary_weights, packed.other_numbers
        (4096, 64)
    """
    save_file = _safetensors().torch.save_file
    names = set(binary_names(model, optimizer))
    state = export_binary(model, optimizer, seed=seed).state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"model: {name!r} of its state_dict is no tensor, and safetensors holds nothing else.")
    if not Path(path).absolute().parent.is_dir():
        raise FileNotFoundError(f"path={os.fspath(path)!r}: its folder does not exist; make it first.")
    tensors, shapes = {}, {}
    for name, value in state.items():
        value = value.detach().cpu().contiguous().clone()
        if name in names:
            shapes[name] = [list(value.shape), str(value.dtype).removeprefix("torch.")]
            value = torch.from_numpy(np.packbits(value.flatten().to(torch.float32).numpy() > 0))
        tensors[name] = value
    described = {"format": FORMAT, "version": VERSION, "binary": json.dumps(shapes), "sha256": _digest(tensors, shapes)}
    temporary = Path(f"{os.fspath(path)}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, metadata=described)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    binary = sum(state[name].numel() for name in shapes)
    whole = sum(value.numel() * value.element_size() for value in state.values())
    return Packed(Path(path).stat().st_size, whole, binary, sum(v.numel() for v in state.values()) - binary)


@torch.no_grad()
def load_binary(path: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """Put what `save_binary` wrote into a model of the same shapes; returns the model.

    Raises:
        CheckpointError: if the file is damaged, not one of `save_binary`'s, or of another model; nothing is changed.

    Example:
        >>> import tempfile, torch, expfam_poco as poco
        >>> model = torch.nn.Linear(3, 2)
        >>> opt = poco.BayesBiNN(poco.binarize_groups(model), lr=0.1, ess=10.0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = poco.save_binary(f"{folder}/model.safetensors", model, opt)
        ...     other = poco.load_binary(f"{folder}/model.safetensors", torch.nn.Linear(3, 2))
        >>> torch.equal(other.weight, poco.export_binary(model, opt).weight)
        True
    """
    safetensors = _safetensors()
    shown = repr(os.fspath(path))
    try:
        with safetensors.safe_open(os.fspath(path), framework="pt") as file:
            described = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise CheckpointError(f"{shown}: it is damaged, or no safetensors file ({error}); use another file.") from error
    if described.get("format") != FORMAT or described.get("version") != VERSION:
        raise CheckpointError(f"{shown}: it was not written by this version of save_binary; use another file.")
    try:
        shapes = json.loads(described["binary"])
        sound = described["sha256"] == _digest(tensors, shapes)
    except (KeyError, ValueError):
        sound = False
    if not sound:
        raise CheckpointError(f"{shown}: its checksum is wrong, so it is damaged; use another file.")
    state = {name: _unpacked(value, *shapes[name]) if name in shapes else value for name, value in tensors.items()}
    own = model.state_dict()
    for name in {*own, *state}:
        if name not in own or name not in state or own[name].shape != state[name].shape:
            there = tuple(state[name].shape) if name in state else "missing"
            here = tuple(own[name].shape) if name in own else "missing"
            raise CheckpointError(f"{shown}: {name!r} is {there} there and {here} in the model; make the same model.")
    model.load_state_dict(state)
    return model


def _unpacked(bits: Tensor, shape: Sequence[int], dtype: str) -> Tensor:
    count = int(np.prod(shape))
    signs = np.unpackbits(bits.numpy(), count=count).astype(np.float32) * 2.0 - 1.0
    return torch.from_numpy(signs).reshape(list(shape)).to(getattr(torch, dtype))


def _digest(tensors: Mapping[str, Tensor], shapes: Mapping[str, Any]) -> str:
    """Of names, shapes, dtypes and bytes."""
    digest = hashlib.sha256(json.dumps(shapes, sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError("save_binary needs the package safetensors: pip install 'expfam_poco[binary]'.") from error
    return safetensors
