"""Binary networks around the optimizer: parameter groups, export to exactly ±1, and files of one bit per weight."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from expfam_poco import arguments
from expfam_poco.engine.settings import translate
from expfam_poco.errors import CheckpointError
from expfam_poco.optim.choices import UNNORMALISED
from expfam_poco.optim.optimizer import PosteriorCorrected
from expfam_poco.tools.few_levels import few_levels
from expfam_poco.tools.files import written_aside
from expfam_poco.tools.packed import pack_weights
from expfam_poco.tools.predict import remind_of_recalibration

FORMAT, VERSION = "expfam_poco.binary", "1"
LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
FEW = 16  # terms of a sum that needs no normalisation
WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
NORMALISATIONS: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm, nn.CrossMapLRN2d,
)  # fmt: skip
GAUSSIAN = {
    "lr": 0.1, "hess_init": 1.0, "beta1": 0.9, "beta2": 0.9999, "weight_decay": 1e-4, "curvature": "reparam",
    "lr_convention": "initial_hessian", "prior_in_momentum": False,
    "square_momentum": None, "kl_weight": 1.0,
}  # fmt: skip


def binarize_groups(
    model: nn.Module,
    *,
    layers: Sequence[type[nn.Module]] = LAYERS,
    keep: Iterable[str] = (),
    keep_first: bool = False,
    keep_last: bool = False,
    levels: Sequence[float] | None = None,
    binary: Mapping[str, Any] | None = None,
    gaussian: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups that make a model's weights binary, and give everything else a Gaussian (IVON) posterior.

    Binary are the weights of the linear and convolutional layers; biases, normalisation scales and the layers that are
    kept stay real. Parameters that require no gradient are left out. Whether activations are binary is the model's
    choice. Other modules with matrices of weights (`nn.MultiheadAttention`, whose q, k and v are no `nn.Linear`,
    `nn.LSTM`) stay real, and a warning names them; so does one where binary layers follow each other in a model
    without any normalisation: there a step of signs is three tenths as long (`lr_convention` 30 in place of 100), and
    few levels may not learn.

    Args:
        model: the network. Names are those within wrappers (`torch.compile`, `DataParallel`), or those with them.
        layers: the kinds of modules whose `weight` becomes binary; of those without one, the parameters with "weight"
            in their names, such as `in_proj_weight` and `weight_ih_l0`.
        keep: names of layers, of modules that contain some, or of their weights, which stay real.
        keep_first: the first of those layers stays real.
        keep_last: the last of those layers stays real.
        levels: evenly spaced values in place of −1 and 1, such as (−1, 0, 1) or `torch.linspace(-1, 1, 16).tolist()`
            for 4 bits: the binary group then has a `Categorical` family, and `few_levels`' settings for it.
        binary: hyperparameters of the binary group, over those of the optimizer.
        gaussian: hyperparameters of the real group, in IVON's names, over lr=0.1, hess_init=1, beta1=0.9,
            beta2=0.9999, weight_decay=1e-4.

    Returns:
        one or two groups for `BayesBiNN` or `BayesBiNNPoCo`.

    Raises:
        ValueError: if no weight would be binary, a name in `keep` is unknown, or `levels` are no grid.

    Example:
        >>> import torch, expfam_poco as poco
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))
        >>> groups = poco.binarize_groups(model, keep_last=True)
        >>> [[name for name, _ in group["params"]] for group in groups]
        [['0.weight'], ['0.bias', '1.weight', '1.bias', '2.weight', '2.bias']]
        >>> opt = poco.BayesBiNNPoCo(groups, lr=1e-3, ess=100.0)
    """
    arguments.module(model)
    kinds = arguments.listed("layers", layers, "give the kinds of modules, such as [torch.nn.Linear]")
    for kind in kinds:
        if not isinstance(kind, type):
            raise TypeError(f"layers={arguments.shown(kind)}: give classes of modules, such as [torch.nn.Linear].")
    arguments.flag("keep_first", keep_first)
    arguments.flag("keep_last", keep_last)
    for name, given in (("binary", binary), ("gaussian", gaussian)):
        arguments.instance(
            name, {} if given is None else given, Mapping, "give a dictionary of hyperparameters, or None"
        )
    arguments.no_decay(binary or {})
    kept_names = [keep] if isinstance(keep, str) else arguments.listed("keep", keep, "give a list of names")
    modules = dict(model.named_modules(remove_duplicate=False))
    found = [name for name, module in modules.items() if isinstance(module, tuple(layers))]
    known = _names_of(model)
    kept = {known[name] for name in _checked(kept_names, known)}
    kept |= set(found[:1] if keep_first else []) | set(found[-1:] if keep_last else [])
    # A tied weight that is binary in one place is binary.
    chosen: set[int] = set()
    for name in found:
        weights = _weights_of(modules[name])
        if not weights and not _is_kept(name, kept):
            raise ValueError(f"model: {_why_no_weights(name, modules[name])}, or name the layer in `keep`.")
        chosen |= {id(p) for own, p in weights.items() if not _is_kept(_joined(name, own), kept)}
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    signs = [(name, p) for name, p in named if id(p) in chosen]
    rest = [(name, p) for name, p in named if id(p) not in chosen]
    if not signs:
        raise ValueError(
            "model: none of its trainable weights would be binary; give other `layers`, or keep fewer of them."
        )
    _warn_of_what_stays_real(modules, chosen, kept, layers)
    few = {} if levels is None else few_levels(levels)  # without: of the optimizer's own Bernoulli family
    if _lacks_normalisation(modules, chosen, few=levels is not None):
        few = {"lr_convention": UNNORMALISED, **few}
    groups: list[dict[str, Any]] = [{"params": signs, **few, **(binary or {})}]
    if rest:
        usual, own = dict(GAUSSIAN), dict(gaussian or {})
        translate(usual)
        translate(own)
        groups.append({"params": rest, "family": "diagonal_gaussian", **usual, **own})
    return groups


def _joined(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _unwrapped(model: nn.Module, name: str) -> str:
    """A name of a module or parameter without what `torch.compile` and `DataParallel` put into it."""
    kept: list[str] = []
    module: nn.Module | None = model
    for part in name.split("."):
        if not (part == "_orig_mod" or (part == "module" and isinstance(module, WRAPPERS))):
            kept.append(part)
        module = getattr(module, "_modules", {}).get(part)
    return ".".join(kept)


def _names_of(model: nn.Module) -> dict[str, str]:
    """The model's own names of its modules and parameters by those within wrappers, and by themselves."""
    own = [name for name, _ in model.named_modules(remove_duplicate=False)]
    own += [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return {_unwrapped(model, name): name for name in own} | {name: name for name in own}


def _checked(keep: Sequence[str], known: Mapping[str, str]) -> Sequence[str]:
    for name in keep:
        if not isinstance(name, str) or name not in known:
            raise ValueError(f"keep={arguments.shown(name)}: the model has no module or parameter of this name.")
    return keep


def _is_kept(name: str, kept: set[str]) -> bool:
    """Whether a layer or weight, or a module that it is in, was named."""
    parts = name.split(".")
    return any(_joined(*parts[:count]) in kept for count in range(len(parts) + 1))


def _weights_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """The layer's own parameter `weight`, or where it has nothing of this name, those with it in theirs."""
    own = {name: p for name, p in module.named_parameters(recurse=False) if "weight" in name}
    return {name: p for name, p in own.items() if name == "weight"} if hasattr(module, "weight") else own


def _why_no_weights(name: str, module: nn.Module) -> str:
    if hasattr(module, "weight"):
        return (
            f"the weight of {name!r} is computed (by a parametrization), so it cannot be binary; remove the "
            "parametrization"
        )
    own = [own for own, _ in module.named_parameters(recurse=False)]
    return f"{name!r} ({type(module).__name__}) has no weight of its own, but {own}; leave its kind out of `layers`"


def _warn_of_what_stays_real(
    modules: Mapping[str, nn.Module], chosen: set[int], kept: set[str], layers: Sequence[type[nn.Module]]
) -> None:
    """Matrices that are no embeddings, of modules of other kinds."""
    real = {
        _joined(name, own): type(module).__name__
        for name, module in modules.items()
        if not isinstance(module, (*layers, *LAYERS, nn.Embedding, nn.EmbeddingBag))
        for own, p in module.named_parameters(recurse=False)
        if "weight" in own and p.ndim > 1 and p.requires_grad
        and id(p) not in chosen and not _is_kept(_joined(name, own), kept)
    }  # fmt: skip
    if real:
        shown = ", ".join([*real][:4]) + (", …" if len(real) > 4 else "")
        kinds = sorted(set(real.values()))
        warnings.warn(
            f"model: {shown} stay real, as {' and '.join(kinds)} is not among `layers`; add it (layers=[nn.Linear, …, "
            f"{', '.join(kinds)}]) to make them binary, or name them in `keep`.",
            stacklevel=3,
        )


def _terms(weight: Tensor) -> int:
    """How many weights go into one output."""
    return weight[0].numel() if weight.ndim > 1 and len(weight) else 0


def _lacks_normalisation(modules: Mapping[str, nn.Module], chosen: set[int], *, few: bool) -> bool:
    """Whether two binary layers or more of long sums have nothing known to bring these back to size 1; it is said."""
    weights = {name: _weights_of(module).values() for name, module in modules.items()}
    binary = [name for name, own in weights.items() if any(id(p) in chosen and _terms(p) >= FEW for p in own)]
    scaling = any(isinstance(module, NORMALISATIONS) for module in modules.values())
    leaves = [module for module in modules.values() if not any(True for _ in module.children())]
    unknown = any(not type(module).__module__.startswith("torch.") for module in leaves)  # it may hold a factor
    lacks = len(binary) > 1 and not scaling and not unknown
    if lacks:
        so = (
            "and initial weights far below the levels are 0 in every draw, so that it may not learn at all"
            if few
            else "so steps are shorter and the accuracy is lower"
        )
        warnings.warn(
            f"model: its binary layers ({binary[0]!r} to {binary[-1]!r}) have no normalisation after them; a sum of n "
            f"terms of size 1 has size √n, {so}. Put nn.BatchNorm1d (BatchNorm2d) after each, or divide by √n in "
            "`forward`" + (", and begin with weights of the levels' size." if few else "."),
            stacklevel=3,
        )
    return lacks


def level_names(model: nn.Module, optimizer: PosteriorCorrected) -> dict[str, tuple[float, ...]]:
    """The levels of the model's parameters whose posterior is over some, by name; all names of tied ones."""
    arguments.module(model)
    if not isinstance(optimizer, PosteriorCorrected):
        raise TypeError(
            f"optimizer={type(optimizer).__name__}: it has no posterior; give the optimizer that trained the binary "
            "weights, such as BayesBiNN."
        )
    levels = {id(p): g["family"].levels for g in optimizer.param_groups if g["family"].levels for p in g["params"]}
    named = model.named_parameters(remove_duplicate=False)
    return {name: levels[id(p)] for name, p in named if id(p) in levels}


def binary_names(model: nn.Module, optimizer: PosteriorCorrected) -> list[str]:
    """Names of the model's parameters whose posterior is over −1 and 1, all names of tied ones."""
    return [name for name, levels in level_names(model, optimizer).items() if levels == (-1.0, 1.0)]


@torch.no_grad()
def export_binary(
    model: nn.Module, optimizer: PosteriorCorrected, *, seed: int | None = None, packed: bool = False
) -> nn.Module:
    """A copy of the model whose binary weights are exactly ±1: the posterior's mode, or a draw.

    Weights of other levels (`Categorical`) are exactly at these, too: at the mode, or where the optimizer keeps means
    (`point_estimate="mean"`) at the level nearest to the mean.

    Args:
        model: the trained network.
        optimizer: the optimizer that holds its posterior.
        seed: of a draw from the whole posterior; None: modes of binary weights, means of the others.
        packed: with these weights in 1, 2 or 4 bits each in memory, too, for inference; see `pack_weights`.

    Raises:
        ValueError: if no parameter of the model is binary, or has levels.

    Example:
        >>> import torch, expfam_poco as poco
        >>> model = torch.nn.Linear(3, 2)
        >>> opt = poco.BayesBiNN(poco.binarize_groups(model), lr=0.1, ess=10.0)
        >>> poco.export_binary(model, opt).weight.abs()
        tensor([[1., 1., 1.],
                [1., 1., 1.]], grad_fn=<AbsBackward0>)
    """
    arguments.flag("packed", packed)
    known = level_names(model, optimizer)
    if not known:
        raise ValueError("optimizer: it holds no binary parameter of this model; make its groups by binarize_groups().")
    remind_of_recalibration(model, optimizer)
    with optimizer.sampled(seed, at_point=seed is None):
        exported = copy.deepcopy(model)
    parameters = dict(exported.named_parameters(remove_duplicate=False))
    for name, levels in known.items():
        value = parameters[name]
        table = torch.tensor(levels, dtype=value.dtype, device=value.device)
        halfway = (table[1:] + table[:-1]) / 2.0
        nearest = torch.bucketize(value.contiguous(), halfway, right=True)
        value.copy_(table[nearest])  # of means tanh λ, too, this is the mode
    return pack_weights(exported, known) if packed else exported


class Packed(NamedTuple):
    """What a packed file holds.

    Example:
        >>> from expfam_poco.tools.binary import Packed
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

    Everything else of the model's `state_dict` is stored as it is, under the names within wrappers (`torch.compile`,
    `DataParallel`): the file fits the plain model and the wrapped one. Needs the package `safetensors`.

    Args:
        path: the file, replaced if it exists; it keeps its mode. Its folder must exist.
        model: as all further arguments, see `export_binary`.

    Returns:
        sizes.

    Raises:
        ValueError: as `export_binary`, or where the state_dict holds something else than tensors.
        OSError: the file could not be written, or something else than a file is there. The old file is as it was.

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
    arguments.instance("path", path, (str, os.PathLike), "give the path of a file")
    serialized = _safetensors().torch.save
    names = {_unwrapped(model, name) for name in binary_names(model, optimizer)}
    if not names:
        raise ValueError("optimizer: it holds no binary parameter of this model; make its groups by binarize_groups().")
    exported = export_binary(model, optimizer, seed=seed)
    state = {_unwrapped(model, name): value for name, value in exported.state_dict().items()}
    tensors, shapes = {}, {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"model: {name!r} of its state_dict is no tensor, and safetensors holds nothing else.")
        value = value.detach().cpu().contiguous().clone()
        if name in names:
            shapes[name] = [list(value.shape), str(value.dtype).removeprefix("torch.")]
            value = torch.from_numpy(np.packbits(value.flatten().to(torch.float32).numpy() > 0))
        tensors[name] = value
    described = {"format": FORMAT, "version": VERSION, "binary": json.dumps(shapes), "sha256": _digest(tensors, shapes)}
    with written_aside(path) as file:
        file.write(serialized(tensors, metadata=described))
    binary = sum(state[name].numel() for name in shapes)
    whole = sum(value.numel() * value.element_size() for value in state.values())
    return Packed(Path(path).stat().st_size, whole, binary, sum(v.numel() for v in state.values()) - binary)


@torch.no_grad()
def load_binary(path: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """Put what `save_binary` wrote into a model of the same shapes; returns the model.

    Args:
        path: of the file.
        model: any that has the saved one's names and shapes.

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
    arguments.module(model)
    arguments.instance("path", path, (str, os.PathLike), "give the path of a file")
    safetensors = _safetensors()
    shown = repr(os.fspath(path))
    own = {_unwrapped(model, name): (name, value) for name, value in model.state_dict().items()}
    try:
        with safetensors.safe_open(os.fspath(path), framework="pt") as file:
            described = file.metadata() or {}
            if described.get("format") != FORMAT or described.get("version") != VERSION:
                raise CheckpointError(f"{shown}: it was not written by this version of save_binary; use another file.")
            shapes = _shapes_of(described, shown)
            # Compared before anything is read: a small file can claim to be of any size.
            there = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (no dictionary)
            _check_shapes(there, shapes, {name: list(value.shape) for name, (_, value) in own.items()}, shown)
            tensors = {name: file.get_tensor(name) for name in there}
    except (FileNotFoundError, CheckpointError):
        raise
    except Exception as error:
        raise CheckpointError(f"{shown}: it is damaged, or no safetensors file ({error}); use another file.") from error
    if described.get("sha256") != _digest(tensors, json.loads(described["binary"])):
        raise CheckpointError(f"{shown}: its checksum is wrong, so it is damaged; use another file.")
    if any(tensors[name].dtype != torch.uint8 for name in shapes):
        raise CheckpointError(f"{shown}: its bits are no bytes, so it is damaged; use another file.")
    state = {name: _unpacked(value, *shapes[name]) if name in shapes else value for name, value in tensors.items()}
    model.load_state_dict({own[name][0]: value for name, value in state.items()})
    return model


def _shapes_of(described: Mapping[str, str], shown: str) -> dict[str, tuple[list[int], torch.dtype]]:
    """The shape and dtype of every weight that is stored in bits."""
    try:
        listed = json.loads(described["binary"])
        shapes = {name: (shape, getattr(torch, dtype)) for name, (shape, dtype) in listed.items()}
        if json.dumps(listed) != described["binary"]:  # a moved space, which the checksum does not see
            raise ValueError
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        shapes = {"": ([], None)}
    for shape, dtype in shapes.values():
        sizes = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
        if not (sizes and isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise CheckpointError(f"{shown}: its list of binary weights is damaged; use another file.")
    return shapes


def _check_shapes(
    stored: Mapping[str, list[int]], shapes: Mapping[str, Any], own: Mapping[str, list[int]], shown: str
) -> None:
    """See that the entries are those of the model, and that those in bits have as many bytes as they need."""
    there = {name: list(shapes[name][0]) if name in shapes else shape for name, shape in stored.items()}
    for name in sorted({*own, *there}):
        if own.get(name) != there.get(name):
            words = [tuple(shape[name]) if name in shape else "missing" for shape in (there, own)]
            raise CheckpointError(
                f"{shown}: {name!r} is {words[0]} there and {words[1]} in the model; make the same model."
            )
    for name, (shape, _) in shapes.items():
        if stored.get(name) != [(math.prod(shape) + 7) // 8]:
            raise CheckpointError(f"{shown}: {name!r} has not as many bits as weights; use another file.")


def _unpacked(bits: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    signs = np.unpackbits(bits.numpy(), count=math.prod(shape)).astype(np.float32) * 2.0 - 1.0
    return torch.from_numpy(signs).reshape(list(shape)).to(dtype)


def _digest(tensors: Mapping[str, Tensor], shapes: Any) -> str:
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
