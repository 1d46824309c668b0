"""The command line: `expfam-poco compare`, `worth`, `reproduce`, `families`, `check` and `new-family`.

Wrong input ends with one sentence on standard error and exit code 2; a family that breaks a law with 1; Ctrl-C
with 130, SIGTERM and SIGHUP with 143 and 129. Everything heavy is imported inside the commands, so that `--help` is
quick.
"""

from __future__ import annotations

import signal
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from expfam_poco.family.base import ExponentialFamily

app = typer.Typer(
    name="expfam-poco",
    help="Optimizers of any exponential family by posterior correction: compare them; list, check or start families.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """The entry point of the installed command."""
    app()


class _StoppedError(BaseException):
    """A signal asks to end."""


def _stop(number: int, frame: Any) -> None:
    raise _StoppedError(number)


@contextmanager
def _signals_raise() -> Iterator[None]:
    """SIGTERM and SIGHUP unwind as Ctrl-C does, so that workers are ended; who ignores them (nohup) still does."""
    names = ("SIGTERM", "SIGHUP") if threading.current_thread() is threading.main_thread() else ()
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    numbers = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, _stop)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def _sentences(err: Console, left: str = "nothing was written") -> Iterator[None]:
    """Turn wrong input into one sentence and exit code 2, and Ctrl-C and signals into 128 + their number."""
    from expfam_poco.errors import InputError

    try:
        with _signals_raise():
            yield
    except InputError as error:
        _say(err, str(error))
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        _say(err, f"stopped by Ctrl-C; {left}.")
        raise typer.Exit(130) from None
    except _StoppedError as error:
        number = signal.Signals(error.args[0])
        _say(err, f"stopped by {number.name}; {left}.")
        raise typer.Exit(128 + number) from None


def _say(err: Console, sentence: str) -> None:
    err.print(f"expfam-poco: {' '.join(sentence.split())}", style="red", highlight=False, markup=False, soft_wrap=True)


def _show_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"expfam-poco {version('expfam_poco')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and stop.")
    ] = False,
) -> None:
    pass


@app.command()
def compare(
    task: Annotated[str, typer.Option(help="breast-cancer, digits or wine.")] = "breast-cancer",
    data: Annotated[Path | None, typer.Option(help="Your own CSV file with a header line, in place of --task.")] = None,
    target: Annotated[str | None, typer.Option(help="The column of --data that holds the labels.")] = None,
    methods: Annotated[
        str | None, typer.Option(help="Names with commas between them; 'help' lists all methods.")
    ] = None,
    lr: Annotated[list[str] | None, typer.Option(help="VALUE, or METHOD=VALUE; may be repeated.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other setting: NAME=VALUE or METHOD.NAME=VALUE; may be repeated."),
    ] = None,
    passes: Annotated[float, typer.Option(help="Budget of gradient evaluations, in passes over the data.")] = 20.0,
    seeds: Annotated[int, typer.Option(help="Number of seeds.")] = 3,
    first_seed: Annotated[int, typer.Option(help="The first seed.")] = 0,
    batch: Annotated[int, typer.Option(help="Examples in a mini-batch.")] = 5,
    delta: Annotated[float | None, typer.Option(help="L2 regularisation δ of the mean loss.")] = None,
    ess: Annotated[str | None, typer.Option(help="Effective sample size, or a multiple such as 100N.")] = None,
    noise: Annotated[
        str | None, typer.Option(help="shared, independent, fixed, antithetic or zero, for methods that sample.")
    ] = None,
    curvature: Annotated[
        str | None, typer.Option(help="reparam, exact, hutchinson or gradsq, for IVON and VON methods.")
    ] = None,
    tune: Annotated[bool, typer.Option("--tune", help="First search a grid of 8 points for every method.")] = False,
    output: Annotated[Path, typer.Option(help="Folder for curves.png, results.json and results.csv.")] = Path(
        "expfam-poco-results"
    ),
    workers: Annotated[int | None, typer.Option(help="Worker processes; default 2.")] = None,
) -> None:
    """Train optimizers side by side on a convex task and show who gets how near to the minimum.

    All gradient evaluations are counted. Default: breast-cancer, 20 passes, 3 seeds, under a minute.
    """
    out, err = Console(), Console(stderr=True)
    with _sentences(err):
        if methods == "help":
            _list_methods(out)
            return
        from expfam_poco.compare.job import Options
        from expfam_poco.compare.job import compare as run
        from expfam_poco.tools.jobs import WorkerError

        options = Options(
            task=task,
            data=data,
            target=target,
            methods=[] if methods is None else methods.split(","),
            lr=lr or [],
            set=settings or [],
            passes=passes,
            seeds=seeds,
            first_seed=first_seed,
            batch=batch,
            delta=delta,
            ess=ess,
            noise=noise,
            curvature=curvature,
            tune=tune,
            output=output,
            workers=workers,
        )
        try:
            run(options, out, err)
        except WorkerError as error:
            _say(err, str(error))
            raise typer.Exit(1) from None


@app.command()
def worth(
    task: Annotated[str, typer.Option(help="breast-cancer, digits or wine.")] = "breast-cancer",
    method: Annotated[str, typer.Option(help="The plain method: SGD, IVON or VON.")] = "SGD",
    passes: Annotated[float, typer.Option(help="Passes that it trains for before it is measured.")] = 2.0,
    batch: Annotated[int, typer.Option(help="Examples in a mini-batch.")] = 5,
    every: Annotated[int, typer.Option(help="M, steps from one mega-batch to the next.")] = 10,
    size: Annotated[int, typer.Option(help="K, mini-batches in a mega-batch.")] = 10,
    seed: Annotated[int, typer.Option(help="Of the shuffling and the draws.")] = 0,
    picture: Annotated[Path | None, typer.Option(help="Where to write the noise's spectrum (PNG).")] = None,
) -> None:
    """Measure what corrections, momentum and larger batches would be worth an evaluation, under 200 of them.

    `poco.worth` does the same for your own model, optimizer and data.
    """
    out, err = Console(), Console(stderr=True)
    with _sentences(err):
        from expfam_poco.compare.worth import Options, worth_on_task

        worth_on_task(Options(task, method, passes, batch, every, size, seed, picture), out)


@app.command()
def reproduce(
    figures: Annotated[
        list[str],
        typer.Argument(help="fig1, fig3, fig4, fig5, fig6, fig7, table1, vsgd-table1, or all.", metavar="FIGURE..."),
    ],
    scale: Annotated[
        str, typer.Option(help="small: minutes, data of scikit-learn and Python; paper: the paper's recipe.")
    ] = "small",
    seeds: Annotated[int | None, typer.Option(help="Number of seeds; default 5.")] = None,
    workers: Annotated[int | None, typer.Option(help="Worker processes; default 2.")] = None,
    output: Annotated[
        Path, typer.Option(help="Where every figure gets a folder; runs that lie there are kept.")
    ] = Path("expfam-poco-figures"),
    tune: Annotated[
        bool, typer.Option("--tune", help="First search every method's learning rate, on a seed of its own.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A few steps: whether it runs.")] = False,
    one_step: Annotated[
        bool, typer.Option("--one-step", help="With --scale paper: one step on random data of the true shapes.")
    ] = False,
    data: Annotated[Path | None, typer.Option(help="Folder of the papers' data, for --scale paper.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, …")] = "cpu",
) -> None:
    """Make the papers' figures: run, tabulate, draw, and test their claims, at equal steps and equal evaluations.

    Interrupted, it continues where it was when called again.
    """
    out, err = Console(), Console(stderr=True)
    with _sentences(err, "finished runs are kept, and the same command continues"):
        from expfam_poco.reproduce.job import Options
        from expfam_poco.reproduce.job import reproduce as run
        from expfam_poco.tools.jobs import WorkerError

        chosen = Options(figures, scale, seeds, workers, output, tune, quick, one_step, data, device)
        try:
            run(chosen, out, err)
        except WorkerError as error:
            _say(err, str(error))
            raise typer.Exit(1) from None


def _list_methods(out: Console) -> None:
    from expfam_poco.compare.methods import DEFAULT_METHODS, METHODS

    table = _table("method", "what it is", "default")
    for method in METHODS.values():
        table.add_row(method.name, method.summary, "yes" if method.name in DEFAULT_METHODS else "")
    out.print(table)


@app.command()
def families() -> None:
    """List the registered families."""
    out = Console()
    from expfam_poco.family.registry import families_available, get_family

    table = _table("name", "one posterior for", "curvature", "what it is")
    broken = []
    for name in families_available():
        try:
            family = get_family(name)
        except (ValueError, TypeError) as error:  # of an installed package, which the others have no part in
            broken.append(str(error))
            continue
        summary = (family.__doc__ or "").strip().partition("\n")[0].rstrip(".")
        table.add_row(
            name,
            "a whole group" if family.joint else "each weight",
            family.curvature,
            f"{summary}\n{family.__module__}:{family.__qualname__}",
        )
    out.print(table)
    for sentence in broken:
        _say(Console(stderr=True), sentence)


def _table(*names: str, title: str | None = None) -> Table:
    """A table whose first column is never broken."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, name in enumerate(names):
        table.add_column(name, no_wrap=number == 0, overflow="fold")
    return table


@app.command()
def check(
    family: Annotated[
        str, typer.Argument(help="A registered name, module:Class or file.py:Class.", metavar="NAME|MODULE:CLASS")
    ],
    seed: Annotated[int, typer.Option(help="Of the test points and the noise.")] = 0,
    shape: Annotated[str, typer.Option(help="Of the tensor that the family is to see, such as 2x3x3.")] = "",
    compiled: Annotated[
        bool, typer.Option(help="Also whether its steps can be compiled, which takes some seconds.")
    ] = True,
) -> None:
    """Run every law of the conformance suite on a family; exit code 1 if one fails."""
    out, err = Console(), Console(stderr=True)
    with _sentences(err):
        found = _find_family(family)
        from expfam_poco.checks.suite import check_family, remedy_of

        report = check_family(found, seed=seed, shape=_shape(shape), compiled=compiled, raise_on_failure=False)
        table = _table("law", "result", "error", "tolerance")
        for law in report.laws:
            result = {"ok": "[green]holds", "FAILS": "[red]FAILS"}.get(law.status, f"[yellow]{law.status}")
            table.add_row(law.name, result, f"{law.error:.2g}", f"{law.tolerance:.2g}")
        out.print(table)
        for law in (*report.failures, *report.unverified):
            remedy = f"; {remedy_of(law.name)}" if not law.passed else ""
            out.print(f"{law.name}: {law.detail}{remedy}", highlight=False, markup=False, soft_wrap=True)
        if not report.passed:
            names = ", ".join(law.name for law in report.failures)
            _say(err, f"{family} breaks {names}; correct the family and run the check again.")
            raise typer.Exit(1)
        if report.unverified:
            count = f"{len(report.unverified)} of {len(report.laws)}"
            out.print(f"{family} breaks no law, but {count} are not verified.", highlight=False)
        else:
            out.print(f"{family} keeps all {len(report.laws)} laws.", highlight=False)


@app.command("new-family")
def new_family(
    name: Annotated[str, typer.Argument(help="What optimizers will call it, such as half-normal.")],
    folder: Annotated[Path, typer.Option(help="Where the files go.")] = Path("."),
) -> None:
    """Write a small family that keeps the laws, with comments on what to change, and its tests."""
    out, err = Console(), Console(stderr=True)
    with _sentences(err):
        from expfam_poco.tools.new_family import write_family

        made, family, tests = write_family(name, folder)
        for line in (
            f"{family}: the family {made}; change it as its comments say.",
            f"{tests}: its tests; run `python -m pytest {tests}`, or `expfam-poco check {family}:{made}`.",
        ):
            out.print(line, highlight=False, markup=False, soft_wrap=True)


def _shape(text: str) -> tuple[int, ...] | None:
    """(2, 3, 3) of "2x3x3" or "2,3,3"; None of nothing.

    Raises:
        InputError: for anything else.
    """
    from expfam_poco.errors import InputError

    if not text:
        return None
    parts = text.replace("x", ",").split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"--shape {text!r}: give positive sizes, such as 2x3x3.")
    return tuple(int(part) for part in parts)


def _find_family(name: str) -> ExponentialFamily:
    """A family from a registered name, `module:Class` or `file.py:Class`.

    Raises:
        InputError: where there is none, or it cannot be made without arguments.
    """
    from expfam_poco.errors import InputError
    from expfam_poco.family.registry import resolve_family

    module_name, colon, class_name = name.rpartition(":")
    chosen: Any = name
    if colon:
        chosen = _import_class(name, module_name, class_name)
    try:
        return resolve_family(chosen)
    except (ValueError, TypeError) as error:
        raise InputError(f"{name!r}: {error}") from error


def _import_class(name: str, module_name: str, class_name: str) -> Any:
    """An object from a module that is installed or lies in the current folder, or from a file."""
    from importlib import import_module

    from expfam_poco.errors import InputError

    here = Path.cwd()
    if module_name.endswith(".py"):
        file = here / module_name
        if not file.is_file():
            raise InputError(f"{name!r}: there is no file {module_name}; check the path.")
        here, module_name = file.parent, file.stem
    if str(here) not in sys.path:
        sys.path.insert(0, str(here))
    try:
        module = import_module(module_name)
    except Exception as error:
        raise InputError(
            f"{name!r}: module {module_name!r} cannot be imported ({type(error).__name__}: {error}); "
            "install or correct it, or run the command in its folder."
        ) from error
    if not class_name or not hasattr(module, class_name):
        raise InputError(f"{name!r}: module {module_name!r} has no {class_name!r}; check the spelling.")
    return getattr(module, class_name)


if __name__ == "__main__":
    main()
