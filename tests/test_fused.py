"""Passes as kernels of their own give what the passes tile by tile give, and take as many launches for any model.

The kernels are Triton's; here they are read by `fake_triton`, and run on the CPU.
"""

import warnings
from collections.abc import Iterator
from typing import Any

import fake_triton
import pytest
import torch
from backend_cases import FLAT, SHAPES, distance, model_of, numbers, trained
from optimizer_cases import ON_GRADIENTS, named, run, same
from test_backends import CASES
from torch import nn

import expfam_poco as poco
from expfam_poco.engine import backend, fused, passes
from expfam_poco.family import transfer
from expfam_poco.family.noise import NoiseKey, noise
from expfam_poco.family.philox import WORD

# Not those of user_families, whose steps have small matrices for every weight.
PRINTED = ("IVON", "antithetic", "independent", "norm-clipping", "gradsq-zero", "SVRG", "VSGDPoCo", "Bernoulli",
           "straight-through")  # fmt: skip


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels of their own on the CPU; a fallback to torch.compile, which is slow, is a failure."""
    monkeypatch.setattr(fused, "is_at_hand", lambda device: True)
    monkeypatch.setattr(fused, "_loaded", fake_triton.loaded)
    fake_triton.Jit.launches.clear()
    monkeypatch.setattr(fused, "KERNELS", {})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="backend=")
        yield


@pytest.mark.parametrize("case", PRINTED)
def test_kernels_give_what_tiles_give(case: str) -> None:
    tiles, own = (numbers(*trained(CASES[case], 8, FLAT, backend=b)[:2]) for b in ("eager", "compiled"))
    assert distance(own, tiles) < 1e-13 and fake_triton.Jit.launches


@pytest.mark.parametrize("case", ["IVONPoCoMo-3", "BayesBiNNPoCo", "priors"])
def test_tensors_of_every_layout(case: str) -> None:
    tiles, own = (numbers(*trained(CASES[case], 8, tuple(SHAPES), backend=b)[:2]) for b in ("eager", "compiled"))
    assert distance(own, tiles) < 1e-13 and fake_triton.Jit.launches


@pytest.mark.parametrize("case", ["IVONPoCoMo", "Bernoulli"])
def test_single_precision(case: str) -> None:
    tiles, own = (trained(CASES[case], 8, FLAT, torch.float32, backend=b)[:2] for b in ("eager", "compiled"))
    assert distance(numbers(*own), numbers(*tiles)) < 1e-5


@pytest.mark.parametrize("name", ["exponential", "log_normal", "isotropic_gaussian"])
def test_built_in_families(name: str) -> None:
    make = named(poco.PosteriorCorrected, family=name, lr=0.01, ess=5.0, momentum=0.5)
    tiles, own = (numbers(*trained(make, 8, FLAT, backend=b)[:2]) for b in ("eager", "compiled"))
    assert distance(own, tiles) < 1e-12 and fake_triton.Jit.launches


@pytest.mark.parametrize("name", ON_GRADIENTS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_what_keeps_no_posterior(name: str, dtype: torch.dtype, bound: float) -> None:
    """In one launch; a tensor that is not contiguous is stepped by itself."""
    found = []
    for choice in ("eager", "compiled"):
        model = model_of((*FLAT, "kernel"), dtype)
        opt = ON_GRADIENTS[name](list(model.parameters()), backend=choice, weight_decay=0.1, maximize=True)
        for step in range(5):
            for number, p in enumerate(model.parameters()):
                p.grad = torch.sin((step + 1.0) * torch.arange(p.numel(), dtype=dtype) + number).view(p.shape)
            fake_triton.Jit.launches.clear()
            opt.step()
        states = [[state[key] for state in opt.state.values()] for key in opt.state_names]
        found.append([torch.cat([v.detach().reshape(-1) for v in row]) for row in ([*model.parameters()], *states)])
    assert fake_triton.Jit.launches == ["kernel"]
    assert all(float((a - b).norm() / b.norm()) < bound for a, b in zip(*found, strict=True))


def test_one_pass_leaves_the_next_draw() -> None:
    found = []
    for one_pass in (False, True):
        model, opt, _ = trained(CASES["IVON"], 8, FLAT, backend="compiled", one_pass=one_pass)
        with opt.sampled(at_point=True):
            found.append(numbers(model, opt))
    assert distance(*found) < 1e-13


@pytest.mark.parametrize("kind", ["normal", "logistic", "uniform", "rademacher"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-15)])
def test_noise_is_the_same(kind: str, dtype: torch.dtype, bound: float) -> None:
    key = NoiseKey(seed=2**63 + 5, stream=3, step=WORD - 1, draw=9)
    programs = fused.Programs([0, 1024], [700, 1300], [4, WORD - 1], torch.device("cpu"))
    what = fused.Pass(lambda like, e: ([e], None), "noise", kind, dtype)
    out = torch.zeros(1024 + 1536, dtype=dtype)
    fused.run(what, programs, [out], key)
    for start, size, parameter in ((0, 700, 4), (1024, 1300, WORD - 1)):
        expected = noise(kind, (size,), 1, key.at(parameter=parameter), dtype=dtype)[0]
        assert float((out[start : start + size] - expected).abs().max()) <= bound
    assert not bool(out[700:1024].any()) and not bool(out[2324:].any())


@pytest.mark.parametrize("make", ["IVON", "IVONPoCoMo"])
def test_as_many_launches_for_forty_tensors_as_for_ten(make: str) -> None:
    found = []
    for count in (10, 40):
        params = [nn.Parameter(torch.full((3,), 0.1 * i)) for i in range(count)]
        opt = getattr(poco, make)(params, lr=0.1, ess=100.0, backend="compiled", seed=0)

        def closure(params: Any = params) -> Any:
            return torch.stack([p.square().sum() for p in params]).sum()

        if make != "IVON":
            opt.refresh([closure])
        for _ in range(5):
            fake_triton.Jit.launches.clear()
            opt.step(closure)
        found.append(len(fake_triton.Jit.launches))
    assert found[0] == found[1] == (2 if make == "IVON" else 3)


def test_a_gradient_that_is_not_finite_leaves_its_weight_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "AHEAD", ("cpu", "meta"))
    model, opt, task = trained(CASES["IVON"], 4, FLAT, backend="compiled")
    before = opt.posterior_states()["matrix"]
    opt.step(lambda: task.closure(0)() + torch.sqrt(0.0 * model["matrix"].view(-1)[7]))
    moved = (opt.posterior_states()["matrix"].mean != before.mean).view(-1)
    assert not bool(moved[7]) and int(moved.sum()) == 599
    with pytest.raises(poco.NonFiniteError, match=r"^step 5: .* 1 of 600 weights of 'matrix'"):
        opt.step(task.closure(0))
    before = opt.posterior_states()
    opt.step(lambda: task.closure(0)() * torch.nan)
    assert same(opt.posterior_states(), before)
    with pytest.raises(poco.NonFiniteError, match=r"^step 7: .* 700 of 700 weights of 'long'"):
        opt.step(task.closure(0))
    run(opt, task, 2, start=8)


def test_what_cannot_be_printed_is_left_to_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one warning; the noise is still made here."""
    monkeypatch.setattr(backend, "_compile", lambda kernel, constants: lambda *rest: kernel(*constants, *rest))
    tiles = numbers(*trained(CASES["Exponential"], 6, FLAT, backend="eager")[:2])
    with pytest.warns(
        RuntimeWarning, match=r"^backend='compiled': Exponential gets no kernel of its own \(.*\); steps"
    ):
        model, opt, _ = trained(CASES["Exponential"], 6, FLAT, backend="compiled")
    assert distance(numbers(model, opt), tiles) < 1e-12
    assert passes.noised.__name__ in {key[0][0] for key in fused.KERNELS}
