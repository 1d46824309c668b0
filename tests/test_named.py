"""A named optimizer is its row of one table, a docstring and a signature."""

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from optimizer_cases import SHELL, network

import expfam_poco as poco
from expfam_poco.correction.alpha import resolve_alpha
from expfam_poco.optim import named
from expfam_poco.optim.choices import CHOICES

PAGE = Path(__file__).resolve().parents[1] / "docs" / "optimizers.md"
every_name = pytest.mark.parametrize("name", CHOICES)
OTHERS_DEFAULTS = ("like_ivon_opt", "as_published")  # the constructors beside `__init__`
# What a signature calls otherwise than the table.
OTHERWISE = {"beta1": "momentum", "beta2": "precision_lr", "rho1": "rho", "rho2": "rho"}


def made(name: str, **choices: Any) -> Any:
    kind = getattr(poco, name)
    takes = inspect.signature(kind).parameters
    needed = {"ess": 24.0} if takes["ess"].default in (None, inspect.Parameter.empty) else {}
    return kind(network().parameters(), lr=0.1, **needed, **choices)


def shown(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(shown, value))})"
    return f"{value:g}" if isinstance(value, float) else str(value)


def test_named_optimizers_are_choices_and_nothing_else() -> None:
    tree = ast.parse(Path(named.__file__).read_text(encoding="utf-8"))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    others = [node for node in tree.body if not isinstance(node, ast.ClassDef | ast.Import | ast.ImportFrom | ast.Expr)]
    assert [cls.name for cls in classes if cls.name not in CHOICES] == [] and len(classes) == len(CHOICES)
    assert not others
    for cls in classes:
        docstring, chosen, *methods = cls.body
        assert isinstance(docstring, ast.Expr), cls.name
        assert ast.unparse(chosen) == f"chosen = CHOICES['{cls.name}']", f"{cls.name} does not name its row"
        own = [m.name for m in methods if isinstance(m, ast.FunctionDef) and m.name not in OTHERS_DEFAULTS]
        assert own in ([], ["__init__"]) and not [m for m in methods if not isinstance(m, ast.FunctionDef)], cls.name
        loops = [n for n in ast.walk(cls) if isinstance(n, ast.For | ast.While | ast.With | ast.Lambda)]
        assert not loops, f"{cls.name} computes"


@every_name
def test_the_table_is_true(name: str) -> None:
    """Of the optimizer with nothing else said, and of the numbers that its signature shows."""
    opt, plain = made(name), poco.PosteriorCorrected(network().parameters(), CHOICES[name]["family"], 0.1, 24.0)
    group, own = {**opt.param_groups[0], "noise": opt.noise}, dict(CHOICES[name])
    own["lr_convention"], own["alpha"] = own.pop("lr_scale", 1.0), resolve_alpha(own["alpha"])
    usual = {**plain.param_groups[0], "noise": plain.noise}
    estimator = poco.estimators.resolve_estimator(own.pop("curvature", None), poco.resolve_family(own["family"]))
    assert type(group["family"]) is type(poco.resolve_family(own.pop("family"))) and group["curvature"] == estimator
    for key, value in own.items():
        assert group[key] == value, key
    apart = {"params", "family", "curvature", "lr", "ess", *own}
    assert {k: v for k, v in group.items() if k not in apart} == {k: v for k, v in usual.items() if k not in apart}


@every_name
def test_signatures_show_types_and_the_table_s_numbers(name: str) -> None:
    shows = inspect.signature(getattr(poco, name)).parameters
    row = {**CHOICES[name], "rho": CHOICES[name].get("rho", (0.0, 0.0))[0]}
    for key, parameter in shows.items():
        assert parameter.annotation is not inspect.Parameter.empty, key
        own = OTHERWISE.get(key, key)
        if own in row and parameter.default not in (None, inspect.Parameter.empty):
            given = 1.0 - parameter.default if key == "beta2" else parameter.default
            assert given == row[own], key


@every_name
def test_alpha_and_curvature_are_the_table_s_unless_they_are_said(name: str) -> None:
    assert made(name, alpha=None, curvature=None).param_groups[0]["alpha"] == resolve_alpha(CHOICES[name]["alpha"])
    assert made(name, alpha=0.3).param_groups[0]["alpha"] == 0.3


@every_name
def test_what_an_optimizer_calls_otherwise_is_refused_by_one_sentence(name: str) -> None:
    with pytest.raises(TypeError, match=rf"^family='gamma': {name} chooses it; use PosteriorCorrected for another\.$"):
        made(name, family="gamma")
    shows = [*inspect.signature(getattr(poco, name)).parameters]
    for key, other in OTHERWISE.items():
        if key in shows:
            with pytest.raises(TypeError, match=rf"^{other}=0\.3: {name} calls it .*{key}.*; give that\.$"):
                made(name, **{other: 0.3})


def test_a_subclass_has_its_parent_s_choices() -> None:
    class Own(poco.IVONPoCo):
        """Nothing but a name."""

    opt = Own(network().parameters(), 0.1, 24.0)
    assert opt.param_groups[0]["momentum"] == 0.9 and opt.param_groups[0]["alpha"] == 1.0


def test_the_page_shows_the_table() -> None:
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| (\w+) \| (\S+) \| (.+) \|$", PAGE.read_text(encoding="utf-8"), re.M)
    found = [(name, family, alpha, rest) for name, family, alpha, rest in rows if name in CHOICES]
    expected = [
        (name, row["family"], shown(row["alpha"]),
         ", ".join(f"{key}={shown(value)}" for key, value in row.items() if key not in ("family", "alpha")))
        for name, row in CHOICES.items()
    ]  # fmt: skip
    assert found == expected, "docs/optimizers.md: show the table of optim/choices.py"


def test_every_named_optimizer_is_tried() -> None:
    assert set(CHOICES) <= {type(make(network().parameters())).__name__ for make in SHELL.values()}
