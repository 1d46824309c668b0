"""Steps on a CUDA device that does not exist: fake tensors have shapes, dtypes and devices, and no values.

Whoever mixes devices, or looks at a value, is refused by them; so a step that passes here neither does the one nor
waits for the device. Passes run eagerly.
"""

import operator
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from optimizer_cases import SHELL, Make, named, shell
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import expfam_poco as poco
from expfam_poco.engine import block, evaluator, fused
from expfam_poco.family import transfer
from expfam_poco.family.recording import BUFFERS
from expfam_poco.optim import captured_gradients
from expfam_poco.optim.captured import CapturedStep
from expfam_poco.optim.captured_gradients import CapturedGradientStep

ATEN = torch.ops.aten
IVON = {"lr": 0.1, "ess": 100.0, "hess_init": 1.0, "backend": "eager", "seed": 0}
CASES: dict[str, Make] = {
    "IVON": named(poco.IVON, **IVON),
    "IVON-3": named(poco.IVON, mc_samples=3, **IVON),
    "one-pass": named(poco.IVON, one_pass=True, **IVON),
    "IVONPoCoMo": named(poco.IVONPoCoMo, **IVON),
    "antithetic": named(poco.IVONPoCo, noise="antithetic", mc_samples=2, **IVON),
    "norm-clipping": named(poco.IVONPoCo, max_grad_norm=1.0, **IVON),
    "gradsq": named(poco.IVONPoCo, curvature="gradsq", **IVON),
    "SVRG": named(poco.SVRG, lr=0.1, backend="eager", seed=0),
    "BayesBiNNPoCo": named(poco.BayesBiNNPoCo, lr=1e-3, ess=24.0, backend="eager", seed=0),
    "VSGD": lambda params: poco.VSGD(params, lr=0.1, backend="eager"),
    "VSGD-skip": lambda params: poco.VSGD(params, lr=0.1, backend="eager", nonfinite="skip", init="official"),
    "VSGD-small": lambda params: poco.VSGD(params, lr=0.1, weight_decay=0.1),
    "ConstantVSGD": lambda params: poco.ConstantVSGD(params, lr=0.1, backend="eager", maximize=True),
}
FAMILIES = ("bernoulli", "exponential", "gamma", "inverse_gaussian", "log_normal", "beta")
CASES |= {n: shell(n, lr=0.01, ess=10.0, momentum=0.5, backend="eager", seed=0) for n in FAMILIES}
VIEWS = {"slice", "view", "select", "detach", "alias", "unsqueeze", "expand", "_unsafe_view", "as_strided", "unbind",
         "squeeze", "split_with_sizes", "t", "permute", "reshape", "sym_size", "_to_copy_view"}  # fmt: skip


class Cuda(TorchFunctionMode):
    """What torch without CUDA refuses on fake tensors of that kind, by other words; and, for a start, values."""

    looking = True  # values may be looked at: all are 1
    capturing = False  # nothing of the host's may be sent to the device

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        if self.capturing:
            sent = name in ("tensor", "pin_memory") or (name == "copy_" and args[0].is_cuda and not args[1].is_cuda)
            assert not sent and not (name == "to" and not args[0].is_cuda), f"{name}: numbers of the host on their way"
        if self.looking and name in ("__bool__", "item", "__float__", "__int__", "equal", "allclose", "tolist"):
            return {"item": 1.0, "__float__": 1.0, "__int__": 1}.get(name, True)
        if name == "tensor" and torch.device(kwargs.get("device") or "cpu").type == "cuda":
            made = torch.tensor(*args, **{**kwargs, "device": "cpu"})
            return torch.empty(made.shape, dtype=made.dtype, device=kwargs["device"])
        if name == "to" and any(torch.device(a).type == "cuda" for a in args[1:] if isinstance(a, str | torch.device)):
            return args[0] if args[0].is_cuda else torch.empty(args[0].shape, dtype=args[0].dtype, device="cuda")
        if name == "pin_memory":
            return args[0]
        if name == "copy_":
            return ATEN.copy_(args[0], args[1])
        if name == "__invert__":
            return torch.logical_not(args[0])
        if name == "__getitem__" and args[0].is_cuda:
            return _item(*args)
        return function(*args, **kwargs)


def _item(value: Tensor, index: Any) -> Tensor:
    dim, parts = 0, list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in parts:
        place, missing = parts.index(Ellipsis), value.ndim - sum(part is not None for part in parts) + 1
        parts[place : place + 1] = [slice(None)] * missing
    for part in parts:
        if isinstance(part, slice):
            stop = torch.iinfo(torch.int64).max if part.stop is None else part.stop
            value, dim = ATEN.slice(value, dim, part.start or 0, stop, part.step or 1), dim + 1
        elif part is None:
            value, dim = ATEN.unsqueeze(value, dim), dim + 1
        else:
            value = ATEN.select(value, dim, operator.index(part))
    return value


class Counted(TorchDispatchMode):
    """Counts operations that are not views."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if function.namespace == "aten" and name not in VIEWS:
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


class NoReplay:
    """The device has no random numbers."""

    def __init__(self, params: Any) -> None:
        pass

    def again(self) -> Any:
        return nullcontext()


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cuda]:
    def later(self: Any, values: Tensor) -> None:
        self._shape = tuple(values.shape)

    with FakeTensorMode(), Cuda() as mode, pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer.Later, "__init__", later)
        patch.setattr(transfer.Later, "read", lambda self: np.zeros(self._shape).tolist())
        patch.setattr(transfer.Later, "arrived", True)
        patch.setattr(evaluator, "FIRST", 0)
        patch.setattr(evaluator, "AGAIN", 2**30)
        patch.setattr(block, "LOOKS", 0)
        patch.setattr(block, "LOOK_AGAIN", 2**30)
        patch.setattr(evaluator, "Replay", NoReplay)
        for module in (evaluator, captured_gradients):
            patch.setattr(module, "capture_random", lambda params: None)
            patch.setattr(module, "replay_random", lambda state: nullcontext())
        yield mode


def model_of(shapes: list[tuple[int, ...]]) -> list[nn.Parameter]:
    return [nn.Parameter(torch.empty(shape, device="cuda")) for shape in shapes]


def stepper(make: Make, params: list[nn.Parameter], backend: str = "") -> tuple[Any, Callable[[], Tensor]]:
    grads = [torch.empty(p.shape, device="cuda") for p in params]

    def closure() -> Tensor:
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        return torch.empty((), device="cuda")

    opt = make(params)
    opt.backend.name = backend or opt.backend.name
    if hasattr(opt, "refresh"):
        opt.refresh([closure, closure])
    opt.step(closure)
    return opt, closure


# VON takes Hessians, which fake losses do not have, and waits where it factors a precision.
SMALL = ("SVRG", "VSGDPoCo", "IVON", "IVONPoCo", "IVONPoCoMo", "BayesBiNN", "BayesBiNNPoCo", "diagonal-gradsq")


@pytest.mark.filterwarnings("ignore:Accessing the data pointer", "ignore:params. group0.param1, group0.param2 have")
@pytest.mark.parametrize("case", SMALL)
def test_a_small_model_does_not_wait_either(cuda: Cuda, case: str) -> None:
    """All or nothing, as ever."""
    opt, closure = stepper(SHELL[case], model_of([(30, 20), (700,), (4, 3)]))
    cuda.looking = False
    for _ in range(2):
        opt.step(closure)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
@pytest.mark.parametrize("case", CASES)
def test_a_step_neither_mixes_devices_nor_waits(cuda: Cuda, case: str) -> None:
    opt, closure = stepper(CASES[case], model_of([(30, 20), (700,), (4, 3, 5)]))
    cuda.looking = False
    for _ in range(2 if case in FAMILIES else 12):  # one of twelve shows itself to the variance meter
        opt.step(closure)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_writes_of_others_are_looked_for_with_one_wait(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """One for the weights between steps, and one for each evaluation, however many tensors there are."""
    asked = list[int]()

    def told(answers: list[Tensor]) -> list[bool]:
        asked.append(len(answers))
        return [True] * len(answers)

    opt, closure = stepper(SHELL["IVONPoCo"], model_of([(4, 3), (7,)] * 5), backend)
    with monkeypatch.context() as patch:  # undone before what the fixture has patched is
        for module, name, value in ((block, "LOOKS", 16), (evaluator, "FIRST", 99), (block, "told", told)):
            patch.setattr(module, name, value)
        patch.setattr(evaluator, "told", told)
        cuda.looking = False
        opt.step(closure)
    assert asked == [10, 1, 1]


def test_looking_is_noticed(cuda: Cuda) -> None:
    cuda.looking = False
    with pytest.raises(DataDependentOutputException):
        bool(torch.empty(3, device="cuda").sum() > 0)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
@pytest.mark.parametrize(
    ("case", "many"),
    [pytest.param("IVONPoCoMo", 300, marks=pytest.mark.slow), ("IVON-3", 60), ("norm-clipping", 60), ("bernoulli", 60)],
)
def test_as_many_operations_for_hundreds_of_tensors_as_for_ten(cuda: Cuda, case: str, many: int) -> None:
    found = []
    for shapes in ([(200, 300)] * 10, [(60, 80)] * many):
        opt, closure = stepper(CASES[case], model_of(shapes))
        opt.step(closure)
        with Counted() as counted:
            opt.step(closure)
        found.append(counted.found)
    assert found[0] == found[1]


class Captures:
    """A recorder of `engine.capture` that runs, and watches as a capture does."""

    def __init__(self, mode: Cuda) -> None:
        self.mode, self.device = mode, torch.device("cuda")
        self.nodes = list[Counter[str]]()  # of every kind of step, launches of kernels among them

    def warm(self, run: Callable[[], Any]) -> None:
        run()

    def record(self, run: Callable[[], Any]) -> Any:
        self.mode.looking, self.mode.capturing, before = False, True, Launches.count
        try:
            with Counted() as counted:
                return run()
        finally:
            self.mode.looking, self.mode.capturing = True, False
            found = {name: n for name, n in counted.found.items() if "empty" not in name}
            self.nodes.append(Counter({**found, "kernel": Launches.count - before}))

    def replay(self) -> None:
        pass

    def paired(self, params: Any) -> Any:
        return NoReplay(params)


def captures(cuda: Cuda, monkeypatch: pytest.MonkeyPatch, make: Make, shapes: Any, backend: str) -> Captures:
    """A recorder that has recorded a step (after a refresh, where there is any), of which another was made, too."""
    opt, closure = stepper(make, model_of(shapes), backend)
    kind = CapturedStep if hasattr(opt, "refresh") else CapturedGradientStep
    recorder = Captures(cuda)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: cuda.capturing)
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda: None, query=lambda: True))
    run = kind(opt, lambda batch: closure() * batch, torch.empty((), device="cuda"), lambda device: recorder)
    cuda.looking = False
    for _ in range(BUFFERS + 2):
        assert run(torch.empty((), device="cuda")).is_cuda
    return recorder


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
@pytest.mark.parametrize(
    ("case", "backend"),
    [("IVONPoCoMo", "auto"), ("norm-clipping", "auto"), ("BayesBiNNPoCo", "auto"), ("log_normal", "auto"),
     ("IVON-3", "eager"), ("SVRG", "eager"), ("VSGD-skip", "eager"), ("VSGD-small", "auto")],
)  # fmt: skip
def test_what_is_captured_neither_waits_nor_sends(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch, case: str, backend: str
) -> None:
    assert captures(cuda, monkeypatch, CASES[case], [(30, 20), (700,), (4, 3, 5)], backend).nodes


class Launches:
    """In place of a Triton kernel: counts how often it is launched."""

    count = 0

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*tensors: Tensor, BLOCKS: int, num_warps: int) -> None:
            assert all(tensor.is_cuda for tensor in tensors)
            Launches.count += 1

        return launch


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
@pytest.mark.parametrize(
    ("case", "most"),
    [("IVON", 15), ("IVON-3", 40), ("IVONPoCoMo", 20), ("norm-clipping", 30), ("VSGD", 10), ("VSGD-skip", 16),
     ("ConstantVSGD", 10)],
)  # fmt: skip
def test_a_step_of_kernels_asks_little_of_the_device(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch, case: str, most: int
) -> None:
    """Launches and other operations together, as many for 10 tensors as for 100."""
    monkeypatch.setattr(fused, "is_at_hand", lambda device: True)
    monkeypatch.setattr(fused, "_loaded", lambda source: Launches())
    monkeypatch.setattr(fused, "KERNELS", {})
    monkeypatch.setattr(torch.cuda, "device", lambda where: nullcontext())
    found = []
    for count in (10, 100):
        cuda.looking = True
        opt, closure = stepper(CASES[case], model_of([(20, 30)] * count), "compiled")
        cuda.looking = False
        opt.step(closure)
        Launches.count = 0
        with Counted() as counted:
            opt.step(closure)
        found.append(Launches.count + sum(counted.found.values()))
    assert found[0] == found[1] <= most, counted.found


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
@pytest.mark.parametrize(("case", "most", "sampled"), [("IVON", 3, 25), ("IVONPoCoMo", 4, 80), ("VSGD", 4, 4)])
def test_a_graph_of_a_small_model_has_few_nodes(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch, case: str, most: int, sampled: int
) -> None:
    """Beside those of the model: a kernel for every draw, one for the update, and what gathers their counts.

    A step in eleven is also for the variance meter.
    """
    monkeypatch.setattr(fused, "is_at_hand", lambda device: True)
    monkeypatch.setattr(fused, "_loaded", lambda source: Launches())
    monkeypatch.setattr(fused, "KERNELS", {})
    monkeypatch.setattr(torch.cuda, "device", lambda where: nullcontext())
    recorder = captures(cuda, monkeypatch, CASES[case], [(64, 64), (64,)] * 3, "compiled")
    model = 2 if case == "IVONPoCoMo" else 1  # the closure's
    found = [sum(nodes.values()) - model for nodes in recorder.nodes]
    assert found[0] <= most and found[-1] <= sampled, recorder.nodes
