"""SVRG, VSGD-PC, VON-PC and α-SVRG against the paper's Algorithms 1, 3 and 5 (Eq. 24), written out in plain loops."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizer_cases import FIXED, INNER, MEGA, OUTER, Task, equal, flat, network, noises, run, weights
from torch import Tensor, nn

import expfam_poco as poco


class Logistic:
    """Binary logistic regression with every derivative by hand; θ = (weights, bias), one example at a time."""

    def __init__(self, examples: int = 20, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(examples, 4, generator=generator, dtype=torch.float64)
        self.y = (torch.rand(examples, generator=generator, dtype=torch.float64) < torch.sigmoid(2 * x[:, 0])).double()
        self.x = torch.cat([x, torch.ones(examples, 1, dtype=torch.float64)], 1)
        self.n = examples
        self.model = nn.Linear(4, 1, dtype=torch.float64)
        with torch.no_grad():
            self.model.weight.copy_(0.3 * torch.randn(1, 4, generator=generator, dtype=torch.float64))
            self.model.bias.fill_(0.1)

    def closure(self, rows: Any) -> Callable[[], Tensor]:
        """The mean loss of these examples, by the model."""
        rows = torch.as_tensor(rows)
        inputs, targets = self.x[rows, :-1], self.y[rows]
        return lambda: nn.functional.binary_cross_entropy_with_logits(self.model(inputs).squeeze(-1), targets)

    def grad(self, rows: Any, theta: Tensor) -> Tensor:
        x, y = self.x[torch.as_tensor(rows)], self.y[torch.as_tensor(rows)]
        return x.T @ (torch.sigmoid(x @ theta) - y) / len(x)

    def hessian(self, rows: Any, theta: Tensor) -> Tensor:
        x = self.x[torch.as_tensor(rows)]
        p = torch.sigmoid(x @ theta)
        return x.T @ torch.diag(p * (1 - p)) @ x / len(x)

    @property
    def theta(self) -> Tensor:
        return flat(self.model.parameters())


def order(steps: int) -> list[int]:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(20, (steps,), generator=generator).tolist()


# ---- Algorithms 1 and 3 ------------------------------------------------------------------------------------


def test_svrg_is_algorithm_1() -> None:
    task, eta, delta = Logistic(), 0.3, 0.02
    opt = poco.SVRG(task.model.parameters(), lr=eta, weight_decay=delta)
    everything = list(range(task.n))
    theta, worst = task.theta, 0.0
    theta_out, g_out = theta, torch.zeros_like(theta)
    for t, i in enumerate(order(100)):
        if t % 20 == 0:
            opt.refresh([task.closure(everything)])
            g_out = sum(task.grad([j], theta) for j in everything)  # lines 3 and 4
            theta_out = theta.clone()
        opt.step(task.closure([i]))
        g_in = task.grad([i], theta) - task.grad([i], theta_out) + g_out / task.n  # line 7
        theta = theta - eta * (g_in + delta * theta)  # line 8, with the L2 term
        worst = max(worst, float((theta - task.theta).abs().max()))
    assert worst <= 1e-13, worst


@pytest.mark.parametrize("noise", ["fixed", "zero", "shared", "independent"])
def test_vsgd_poco_is_algorithm_3(noise: str) -> None:
    """`fixed` is the algorithm as printed; the other modes differ in where θ_out is drawn."""
    task, eta, delta, s, alpha = Logistic(), 0.2, 0.02, 50.0, 0.9
    opt = poco.VSGDPoCo(
        task.model.parameters(), lr=eta, precision=s, weight_decay=delta, alpha=alpha, noise=noise, seed=2
    )
    everything = list(range(task.n))
    m, worst, refreshes = task.theta, 0.0, 0
    m_out, g_out = m, None
    sigma = 1 / math.sqrt(s)
    for t, i in enumerate(order(60), start=1):
        if t % 15 == 0:
            opt.refresh([task.closure(everything)])
            refreshes += 1
            eps_fixed = flat(noises(opt, FIXED if noise == "fixed" else MEGA, refreshes, noise))
            g_out = task.grad(everything, m + sigma * eps_fixed)  # line 3
            m_out = m.clone()  # line 4: θ_out is m_out + σ ε_fixed
        opt.step(task.closure([i]))
        eps = flat(noises(opt, INNER, t, noise))
        g_in = task.grad([i], m + sigma * eps)  # line 7
        if g_out is not None:
            outs = {
                "fixed": lambda: eps_fixed, "zero": lambda: 0 * eps, "shared": lambda: eps,  # noqa: B023
                "independent": lambda: flat(noises(opt, OUTER, t)),  # noqa: B023
            }  # fmt: skip
            g_in = g_in - alpha * (task.grad([i], m_out + sigma * outs[noise]()) - g_out)
        m = m - eta * (g_in + delta * m)  # line 8
        worst = max(worst, float((m - task.theta).abs().max()))
    assert worst <= 1e-13, worst


# ---- Algorithm 5 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [1.0, 0.6])
@pytest.mark.parametrize("noise", ["fixed", "zero"])
def test_von_poco_is_algorithm_5(noise: str, alpha: float) -> None:
    task, eta, beta, delta, h0 = Logistic(), 0.1, 0.06, 0.1, 0.5
    n, everything = task.n, list(range(task.n))
    opt = poco.VONPoCo(
        task.model.parameters(), lr=eta, ess=n, precision_lr=beta, hess_init=h0, weight_decay=delta, alpha=alpha,
        noise=noise, retraction="plain", seed=6,
    )  # fmt: skip
    identity = torch.eye(5, dtype=torch.float64)
    s0 = n * delta * identity
    m, precision = task.theta, n * (h0 + delta) * identity
    g_out, refreshes, worst = None, 0, 0.0

    def root(matrix: Tensor, eps: Tensor) -> Tensor:
        """S^{−½} ε with S^{−½} = L^{−T}."""
        return torch.linalg.inv(torch.linalg.cholesky(matrix)).T @ eps

    for t, i in enumerate(order(45), start=1):
        if t > 5 and t % 10 == 0:
            opt.refresh([task.closure(everything)])
            refreshes += 1
            eps_out = noises(opt, FIXED, refreshes, noise)[0][0]
            m_out, theta_out = m.clone(), m + root(precision, eps_out)  # line 5
            g_out, h_out = task.grad(everything, theta_out) * n, task.hessian(everything, theta_out) * n  # 3 and 4
        opt.step(task.closure([i]))
        theta_in = m + root(precision, noises(opt, INNER, t, noise)[0][0])
        g_in, h_in = task.grad([i], theta_in), task.hessian([i], theta_in)  # lines 8 and 10
        anchor = torch.zeros_like(m)
        if g_out is not None:
            without_i = h_out / n - task.hessian([i], theta_out)  # line 9
            g_in = g_in - alpha * (task.grad([i], theta_out) - g_out / n)
            h_in = h_in + alpha * without_i
            anchor = alpha * without_i @ (m - m_out)
        precision = (1 - beta) * precision + beta * (s0 + n * h_in)  # line 11
        m = m - eta * torch.linalg.solve(precision, s0 @ m + n * (g_in + anchor))  # line 12
        (state,) = opt.posterior_states().values()
        worst = max(worst, float((m - task.theta).abs().max()))
        worst = max(worst, float(((state.precision - precision) / precision.abs().max()).abs().max()))
    assert refreshes == 4
    assert worst <= 1e-11, worst


@pytest.mark.parametrize("noise", ["shared", "zero"])
def test_von_is_von_poco_without_alpha(noise: str) -> None:
    results = []
    for kind, choices in ((poco.VON, {"own_site": False}), (poco.VONPoCo, {"alpha": 0.0})):
        task = Logistic()
        opt = kind(task.model.parameters(), lr=0.1, ess=task.n, precision_lr=0.2, noise=noise, seed=1, **choices)
        for t, i in enumerate(order(12)):
            if t % 4 == 0:
                opt.refresh([task.closure(range(task.n))])
            opt.step(task.closure([i]))
        (state,) = opt.posterior_states().values()
        results.append([*weights(task.model), *state])
    assert equal(*results)


# ---- α-SVRG over other optimizers --------------------------------------------------------------------------


def sgd_with_momentum(theta: Tensor, memory: dict[str, Tensor], grad: Tensor, t: int) -> Tensor:
    grad = grad + 0.01 * theta
    memory["v"] = 0.8 * memory["v"] + grad if "v" in memory else grad
    return theta - 0.1 * memory["v"]


def adamw(theta: Tensor, memory: dict[str, Tensor], grad: Tensor, t: int) -> Tensor:
    theta = theta - 0.03 * 0.2 * theta
    memory["m"] = 0.9 * memory.get("m", torch.zeros_like(grad)) + 0.1 * grad
    memory["v"] = 0.99 * memory.get("v", torch.zeros_like(grad)) + 0.01 * grad**2
    first, second = memory["m"] / (1 - 0.9**t), memory["v"] / (1 - 0.99**t)
    return theta - 0.03 * first / (second.sqrt() + 1e-8)


BASES: dict[str, tuple[Callable[..., torch.optim.Optimizer], Any]] = {
    "SGD": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, weight_decay=0.01), sgd_with_momentum),
    "AdamW": (lambda p: torch.optim.AdamW(p, lr=0.03, betas=(0.9, 0.99), weight_decay=0.2), adamw),
}


@pytest.mark.parametrize("base", BASES)
def test_alpha_svrg_corrects_before_the_moments(base: str) -> None:
    make, rule = BASES[base]
    task, alphas = Logistic(), {t: 1.0 - 0.01 * t for t in range(1, 61)}
    opt = poco.AlphaSVRG(make(task.model.parameters()), alpha=alphas.__getitem__)
    chunks, sizes = [list(range(0, 8)), list(range(8, 11)), list(range(11, 20))], [8, 3, 9]
    theta, memory, worst = task.theta, {}, 0.0
    theta_out, g_out = theta, None
    for t, i in enumerate(order(60), start=1):
        if t > 5 and t % 15 == 0:
            opt.refresh([task.closure(chunk) for chunk in chunks], sizes)
            theta_out, g_out = theta.clone(), task.grad(list(range(20)), theta)
        opt.step(task.closure([i]))
        grad = task.grad([i], theta)
        if g_out is not None:
            grad = grad - alphas[t] * (task.grad([i], theta_out) - g_out)
        theta = rule(theta, memory, grad, t)
        worst = max(worst, float((theta - task.theta).abs().max()))
    assert worst <= 1e-12, worst


@pytest.mark.parametrize("alpha", [1.0, 0.4, 0.0])
def test_alpha_svrg_over_sgd_is_svrg(alpha: float) -> None:
    first, second = network(), network()
    over = poco.AlphaSVRG(torch.optim.SGD(first.parameters(), lr=0.1, weight_decay=0.02), alpha=alpha)
    direct = poco.SVRG(second.parameters(), lr=0.1, weight_decay=0.02, alpha=alpha)
    losses, expected = run(over, Task(first), 30), run(direct, Task(second), 30)
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected), rtol=0.0, atol=1e-13)
    torch.testing.assert_close(flat(first.parameters()), flat(second.parameters()), rtol=0.0, atol=1e-13)


def test_alpha_svrg_without_refresh_is_the_base_bit_for_bit() -> None:
    first, second = network(), network()
    over = poco.AlphaSVRG(torch.optim.AdamW(first.parameters(), lr=0.05))
    base = torch.optim.AdamW(second.parameters(), lr=0.05)
    task = Task(second)
    losses = run(over, Task(first), 8, refresh_every=100)
    for step, loss in enumerate(losses):
        base.zero_grad()
        expected = task.closure(step)()
        expected.backward()
        base.step()
        assert torch.equal(loss, expected.detach())
    assert equal(weights(first), weights(second))
