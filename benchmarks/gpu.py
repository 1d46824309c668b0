"""What the optimizers do and cost on a CUDA device, in one run of under four minutes.

    python benchmarks/gpu.py                     # every part
    python benchmarks/gpu.py same cycle          # some of them

* cycle    all but forward and backward: 124 M weights in GPT-2's tensors, beside fused AdamW
* variants the same for IVON by kernels of other shapes, and by torch.compile
* launches the events and waits of a step of 10 and of 1,000 tensors
* small    a whole step of an MLP of 6 tensors
* captured the same as one graph, beside a captured AdamW; and that its numbers are those of ordinary steps
* same     every leafwise family and every optimizer gives the CPU's numbers (float64; float32 up to rounding)
* network  a whole step of GPT-2 (124 M, bfloat16), beside AdamW
* tests    the tests marked `cuda`

Times are medians of interleaved rounds in one process; "events" are kernels, copies and fills of one step, "busy" is
what they take together, "waits" the times that the host waits for the device, "host" the time until it is free again.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import expfam_poco as poco
from expfam_poco.engine import fused

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from gpt import GPT, preset

DEVICE = "cuda"
VOCABULARY = 50_257  # GPT-2's
Run = Callable[[], Any]
synchronise = torch.cuda.synchronize
COMPILED = ("diagonal_gaussian", "bernoulli", "log_normal")  # families whose large tensors are tried, too


@contextmanager
def reported(name: str) -> Iterator[None]:
    """A failure is a line of the table, and so is every warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        except Exception as error:  # of the compiler, of the driver, of memory: the other rows are still wanted
            print(f"  {name:22} FAILED {type(error).__name__}: {str(error).splitlines()[0][:200]}", flush=True)
    for message in sorted({str(w.message)[:200] for w in caught if issubclass(w.category, RuntimeWarning)}):
        print(f"  {name:22} warned: {message}", flush=True)


def medians(runs: dict[str, Run], rounds: int, warm: int = 3) -> dict[str, float]:
    """Seconds of every run, interleaved; a run that fails is left out."""
    times: dict[str, list[float]] = {}
    for name, run in list(runs.items()):
        with reported(name):
            for _ in range(warm):
                run()
            synchronise()
            times[name] = []
    for _ in range(rounds):
        for name, found in times.items():
            synchronise()
            begun = time.perf_counter()
            runs[name]()
            synchronise()
            found.append(time.perf_counter() - begun)
    return {name: statistics.median(found) for name, found in times.items()}


WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize", "cudaMemcpy")


def waits(run: Run) -> str:
    """Where, in one run, the host waits for the device, as torch sees it."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places = [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
    return ", ".join(f"{place} ({places.count(place)})" for place in sorted(set(places))) or "nowhere"


def host(run: Run, rounds: int = 5) -> float:
    """Seconds until a run returns, with nothing before it in the queue."""
    found = []
    for _ in range(rounds):
        synchronise()
        begun = time.perf_counter()
        run()
        found.append(time.perf_counter() - begun)
    synchronise()
    return statistics.median(found)


def counts(run: Run) -> str:
    """The device's events in one run, and the host's waits for it."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        run()
        synchronise()
    events = found.events()
    device = [event for event in events if str(event.device_type).endswith("CUDA")]
    waited = [e.name for e in events if e.name in WAITS]
    times: dict[str, float] = {}
    for event in device:
        times[event.name] = times.get(event.name, 0.0) + event.self_device_time_total / 1e3
    longest = sorted(times.items(), key=lambda pair: -pair[1])[:6]
    shown = "".join(f"\n      {milliseconds:8.3f} ms {name[:90]}" for name, milliseconds in longest)
    busy = f"busy {sum(times.values()):.3f} ms, host {host(run) * 1e3:.3f} ms"
    return f"{len(device)} events, {max(0, len(waited) - 1)} waits ({waits(run)}), {busy}{shown}"


# ---- the same numbers --------------------------------------------------------------------------------------


def start(family: Any, shape: tuple[int, ...]) -> Tensor:
    """Weights inside the family's support."""
    generator = torch.Generator().manual_seed(1)
    raw = torch.randn(shape, dtype=torch.float64, generator=generator)
    support = family.support
    if family.levels is not None:
        return raw.sign()
    return raw if support is torch.distributions.constraints.real else torch.distributions.transform_to(support)(raw)


def trained(device: str, make: Callable[[Any], Any], weights: Tensor, refreshing: bool) -> Tensor:
    """The weights after six steps on noisy quadratics."""
    p = nn.Parameter(weights.clone().to(device))
    target = torch.linspace(0.5, 1.5, 4, dtype=torch.float64).to(device)
    opt = make([p])

    def closure(i: int) -> Callable[[], Tensor]:
        return lambda: ((p - target[i]) ** 2).mean()

    for step in range(6):
        if refreshing and step % 3 == 0:
            opt.refresh([closure(i) for i in range(4)])
        if hasattr(opt, "refresh"):
            opt.step(closure(step % 4))
        else:
            opt.zero_grad()
            closure(step % 4)().backward()
            opt.step()
    return p.detach().cpu()


def same(arguments: argparse.Namespace) -> None:
    """Trajectories on the device against those on the CPU."""
    cases: dict[str, tuple[Callable[[Any], Any], Tensor, bool]] = {}
    for name in poco.families_available():
        family = poco.resolve_family(name)
        if family.joint or name == "product":
            continue
        for size in (64, 700) if name in COMPILED else (64,):
            weights = start(family, (size, size))

            def make(p: Any, family: Any = family) -> Any:
                return poco.PosteriorCorrected(p, family, lr=1e-3, ess=10.0, weight_decay=0.1, seed=1)

            cases[f"{name} {size}²"] = make, weights, True
    real = start(poco.resolve_family("diagonal_gaussian"), (700, 700))
    for kind in ("IVON", "IVONPoCo", "IVONPoCoMo", "BayesBiNN", "BayesBiNNPoCo"):
        weights = real.sign() if "BiNN" in kind else real
        corrected = kind.endswith(("Co", "Mo"))
        cases[kind] = (lambda p, k=kind: getattr(poco, k)(p, lr=1e-2, ess=1e4, seed=1)), weights, corrected
    cases["SVRG"] = (lambda p: poco.SVRG(p, lr=1e-2, seed=1)), real, True
    cases["AlphaSVRG"] = (lambda p: poco.AlphaSVRG(torch.optim.AdamW(p, lr=1e-2))), real, True
    cases["VSGD"] = (lambda p: poco.VSGD(p, lr=1e-2)), real, False
    cases["full_gaussian 20"] = (
        lambda p: poco.VONPoCo(p, lr=0.5, ess=10.0, seed=1)), real[:4, :5].clone(), True  # fmt: skip
    single = ("IVON", "IVONPoCoMo", "BayesBiNN", "log_normal 700²")
    cases.update({f"{name} float32": (cases[name][0], cases[name][1].float(), cases[name][2]) for name in single})
    for name, (make, weights, refreshing) in cases.items():
        with reported(name):
            begun = time.perf_counter()
            there = trained(DEVICE, make, weights, refreshing)
            seconds = time.perf_counter() - begun
            here = trained("cpu", lambda p, make=make: make(p), weights, refreshing)
            difference = float((here - there).abs().max())
            verdict = "" if difference < (1e-4 if "float32" in name else 1e-9) else "   DIFFERS"
            print(f"  {name:22} {difference:8.1e}  {seconds:5.1f} s{verdict}", flush=True)


# ---- a cycle -----------------------------------------------------------------------------------------------


def table(found: dict[str, float], runs: dict[str, Run], base: str, bars: dict[str, float]) -> None:
    """Milliseconds, the ratio to the base, the bar, and what one run asks of the device."""
    for name, seconds in found.items():
        bar = f"  bar {bars[name]:.2f}" if name in bars else ""
        with reported(name):
            print(
                f"  {name:22} {seconds * 1e3:9.3f} ms  {seconds / found[base]:7.2f} x{bar}  {counts(runs[name])}",
                flush=True,
            )


COMMON: dict[str, Any] = dict(lr=1e-4, ess=1e7, seed=0)
WARM = 20  # steps; the first ones look at weights more closely


class Gradients:
    """Optimizers of tensors of these shapes, whose gradients are given."""

    def __init__(self, shapes: list[tuple[int, ...]]) -> None:
        self.shapes = shapes
        self.size = sum(torch.Size(shape).numel() for shape in shapes)
        self._grads = [torch.randn(shape, device=DEVICE) * 1e-3 for shape in shapes]
        self._one = torch.ones((), device=DEVICE)

    def _params(self) -> list[nn.Parameter]:
        return [nn.Parameter(torch.randn(shape, device=DEVICE) * 0.02) for shape in self.shapes]

    def ours(self, make: Callable[[Any], Any], refreshing: bool = False) -> Run:
        """A step of an optimizer that takes a closure."""
        own = self._params()

        def closure() -> Tensor:
            for p, grad in zip(own, self._grads, strict=True):
                p.grad = grad
            return self._one

        opt = make(own)
        if refreshing:
            opt.refresh([closure])
        return lambda: opt.step(closure)

    def on_gradients(self, make: Callable[[Any], Any]) -> Run:
        """A step of an optimizer that finds gradients in place."""
        own = self._params()
        opt = make(own)
        for p, grad in zip(own, self._grads, strict=True):
            p.grad = grad
        return lambda: opt.step()

    def adam(self) -> Run:
        """The base."""
        return self.on_gradients(lambda p: torch.optim.AdamW(p, lr=1e-4, fused=True))

    def ivon(self, **more: Any) -> Run:
        """IVON."""
        return self.ours(lambda p: poco.IVON(p, hess_init=1e-3, **COMMON, **more))

    def pocomo(self) -> Run:
        """IVON-PoCoMo."""
        return self.ours(lambda p: poco.IVONPoCoMo(p, hess_init=1e-3, **COMMON), True)


def gpt_shapes() -> list[tuple[int, ...]]:
    """GPT-2's."""
    return [tuple(p.shape) for p in GPT(preset("125m", vocabulary=VOCABULARY)).parameters()]


def started(makers: dict[str, Callable[[], Run]], runs: dict[str, Run]) -> None:
    """Make the runs, and say how long each takes before its second step."""
    for name, maker in makers.items():
        with reported(name):
            begun = time.perf_counter()
            runs[name] = maker()
            runs[name]()
            synchronise()
            print(f"  {name:22} first step {time.perf_counter() - begun:.1f} s", flush=True)


def cycle(arguments: argparse.Namespace) -> None:
    """Everything but forward and backward."""
    gpt = Gradients(gpt_shapes())
    first, second = (torch.empty(gpt.size, device=DEVICE) for _ in range(2))
    runs: dict[str, Run] = {"AdamW fused": gpt.adam(), "copy": lambda: first.copy_(second)}
    makers: dict[str, Callable[[], Run]] = {
        "IVON": gpt.ivon,
        "IVON one_pass": lambda: gpt.ivon(one_pass=True),
        "IVONPoCoMo": gpt.pocomo,
        "gradsq": lambda: gpt.ours(
            lambda p: poco.PosteriorCorrected(p, "diagonal_gaussian", curvature="gradsq", **COMMON)
        ),
        "max_grad_norm": lambda: gpt.ivon(max_grad_norm=1.0),
        "bernoulli": lambda: gpt.ours(lambda p: poco.BayesBiNN(p, square_momentum=None, **COMMON)),
        "VSGD": lambda: gpt.on_gradients(lambda p: poco.VSGD(p, lr=1e-4)),
    }
    started(makers, runs)
    found = medians(runs, arguments.rounds, WARM)
    bars = {"IVON": 1.3, "IVONPoCoMo": 2.2, "gradsq": 3.0, "bernoulli": 3.0, "VSGD": 3.0}
    table(found, runs, "AdamW fused", bars)
    print(f"  copy {8 * gpt.size / found['copy'] / 1e12:.2f} TB/s; {gpt.size / 1e6:.0f} M in {len(gpt.shapes)} tensors")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    runs["IVON"]()
    beside = torch.cuda.max_memory_allocated() - before
    print(f"  a step of IVON takes {beside / gpt.size:.2f} bytes a weight beside the state")


def variants(arguments: argparse.Namespace) -> None:
    """IVON by kernels of other shapes, and as torch.compile does it."""
    gpt, usual = Gradients(gpt_shapes()), (fused.BLOCKS, fused.WARPS)
    runs: dict[str, Run] = {"AdamW fused": gpt.adam()}

    def shaped(blocks: int, warps: int) -> Run:
        fused.BLOCKS, fused.WARPS = blocks, warps
        own, pair = gpt.ivon(), gpt.pocomo()  # their programs are dealt out at the first step

        def run() -> None:
            fused.WARPS = warps
            own()
            pair()

        return run

    def plain() -> Run:
        run, usually = gpt.ivon(), fused.is_at_hand

        def without() -> None:
            fused.is_at_hand = lambda device: False
            try:
                run()
            finally:
                fused.is_at_hand = usually

        return without

    shapes = [(64, 2), (128, 4), (256, 4), (512, 4)]
    makers = {f"{4 * b} weights, {w} warps": (lambda b=b, w=w: shaped(b, w)) for b, w in shapes}
    for name, maker in makers.items():  # one after the other, for the shape is a setting of the module
        started({name: maker}, runs)
    fused.BLOCKS, fused.WARPS = usual
    started({"torch.compile": plain}, runs)
    table(medians(runs, arguments.rounds, 3), runs, "AdamW fused", {})


def launches(arguments: argparse.Namespace) -> None:
    """What a step asks of the device whatever the number of tensors."""
    for count in (10, 1000):
        model = Gradients([(500, 600)] * 10 if count == 10 else [(50, 60)] * count)
        for name, run in {"IVON": model.ivon(), "IVONPoCoMo": model.pocomo()}.items():
            with reported(name):
                for _ in range(WARM + 1):
                    run()
                print(f"  {name} of {count} tensors: {counts(run)}", flush=True)


# ---- whole steps -------------------------------------------------------------------------------------------


def backward(opt: torch.optim.Optimizer, loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A step of one of torch's optimizers."""

    def step(*batch: Tensor) -> Tensor:
        opt.zero_grad()
        value = loss(*batch)
        value.backward()
        opt.step()
        return value

    return step


def network(arguments: argparse.Namespace) -> None:
    """GPT-2's size in bfloat16, 8 × 1024 tokens."""
    found: dict[str, float] = {}
    runs: dict[str, Run] = {}
    for name in ("AdamW", "IVON", "IVONPoCoMo"):
        with reported(name):
            gc.collect()
            torch.cuda.empty_cache()
            torch.manual_seed(0)
            model = GPT(preset("125m", vocabulary=VOCABULARY, context=1024)).to(DEVICE)
            tokens = torch.randint(0, VOCABULARY, (8, 1024), device=DEVICE)

            def closure(model: GPT = model, tokens: Tensor = tokens) -> Tensor:
                with torch.autocast("cuda", torch.bfloat16):
                    return model.loss(tokens)

            if name == "AdamW":
                run: Run = backward(torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True), closure)
            else:
                own = getattr(poco, name)(model.parameters(), lr=1e-4, ess=1e7, hess_init=1e-3, seed=0)
                if name == "IVONPoCoMo":
                    own.refresh([closure])
                run = partial(own.step, closure)
            found.update(medians({name: run}, arguments.rounds, WARM))
            runs[name] = run
            print(f"  {name:22} peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB", flush=True)
    table(found, runs, "AdamW", {"IVON": 1.06, "IVONPoCoMo": 2.1})


def mlp(name: str, *, captured: bool = False, **choices: Any) -> tuple[nn.Module, Run]:
    """An MLP of 6 tensors, and an optimizer's step on a batch of 64."""
    torch.manual_seed(0)
    layers = nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)
    model = nn.Sequential(*layers).to(DEVICE)
    batch = torch.randn(64, 64, device=DEVICE), torch.randn(64, 10, device=DEVICE)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return functional.mse_loss(model(x), y)

    if name == "AdamW":
        step = backward(torch.optim.AdamW(model.parameters(), lr=1e-3, capturable=captured, **choices), loss)
        return model, graph_of(step, batch) if captured else partial(step, *batch)
    own = getattr(poco, name)(model.parameters(), lr=1e-3, ess=1e4, seed=0)
    if name == "IVONPoCoMo":
        own.refresh([lambda: loss(*batch)])
    run = own.captured(loss, batch) if captured else lambda _: own.step(lambda: loss(*batch))
    return model, lambda: run(batch)


def graph_of(step: Callable[..., Tensor], batch: tuple[Tensor, ...]) -> Run:
    """A step as torch's documentation captures it; the batch is copied and the loss handed out, as ours are."""
    places, side = [value.clone() for value in batch], torch.cuda.Stream()
    synchronise()
    with torch.cuda.stream(side):
        for _ in range(3):
            step(*places)
    synchronise()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = step(*places)

    def run() -> Tensor:
        for place, own in zip(places, batch, strict=True):
            place.copy_(own)
        graph.replay()
        return value.detach().clone()

    return run


def small(arguments: argparse.Namespace) -> None:
    """An MLP of 6 tensors, batch 64."""
    runs = {"AdamW": mlp("AdamW", fused=True)[1], "IVON": mlp("IVON")[1], "IVONPoCoMo": mlp("IVONPoCoMo")[1]}
    table(medians(runs, 10 * arguments.rounds, WARM), runs, "AdamW", {"IVON": 3.0})


def captured(arguments: argparse.Namespace) -> None:
    """The same as graphs."""
    runs = {"AdamW": mlp("AdamW", captured=True)[1], "AdamW fused": mlp("AdamW", captured=True, fused=True)[1]}
    for name in ("IVON", "IVONPoCoMo"):
        with reported(name):
            (one, ordinary), (two, replayed) = mlp(name), mlp(name, captured=True)
            for _ in range(40):
                ordinary(), replayed()
            difference = max(float((a - b).abs().max()) for a, b in zip(one.parameters(), two.parameters()))  # noqa: B905
            print(f"  {name:22} {difference:8.1e} from ordinary steps{'   DIFFERS' if difference > 1e-4 else ''}")
            runs[name], runs[f"{name} ordinary"] = replayed, ordinary
    table(medians(runs, 10 * arguments.rounds, WARM), runs, "AdamW", {"IVON": 1.2, "IVONPoCoMo": 2.3})


def tests(arguments: argparse.Namespace) -> None:
    """The tests that need a device."""
    folder = Path(__file__).resolve().parents[1]
    without = [part for plugin in ("cacheprovider", "benchmark") for part in ("-p", f"no:{plugin}")]
    subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "cuda", *without], cwd=folder, check=False)


PARTS = {
    "cycle": cycle, "launches": launches, "small": small, "captured": captured, "variants": variants, "same": same,
    "network": network, "tests": tests,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=", ".join(PARTS))
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.parts) - set(PARTS))
    if unknown:
        parser.error(f"no part is named {unknown[0]!r}; there are {', '.join(PARTS)}.")
    if not torch.cuda.is_available():
        raise SystemExit("gpu.py: no CUDA device here.")
    torch._inductor.config.compile_threads = 8  # type: ignore[attr-defined]
    versions = f"torch {torch.__version__}, triton {metadata.version('triton')}"
    print(f"{torch.cuda.get_device_name()}, {versions}", flush=True)
    for name in arguments.parts or PARTS:
        begun = time.perf_counter()
        print(f"== {name}", flush=True)
        with reported(name):
            PARTS[name](arguments)
        print(f"   ({time.perf_counter() - begun:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
