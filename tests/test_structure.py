"""Who may know whom: the engine no family, the shell no mathematics, the import no optional package."""

import ast
import importlib
import json
import re
import subprocess
import sys

import pytest
from imports import ROOT, called_name, imports_of, is_family

# Functions of tensors that belong in `blr`, `correction`, an estimator or a family; a mean loss may stay.
MATHEMATICS = frozenset(
    """
    acos addcdiv addcmul addmm asin atan atanh baddbmm bmm cholesky cholesky_inverse cholesky_solve clamp
    clip cos cosh cross cumsum det diag div dot eigh einsum erf erfinv exp exp2 expm1 inv inverse lerp
    lgamma linalg_norm log log10 log1p log2 logaddexp logdet logit logsumexp lstsq lu_solve matmul
    matrix_exp mm mul multiply mv neg norm normal outer pinv pow qr rand randn reciprocal rsqrt sigmoid sin
    sinh slogdet softmax softplus solve solve_triangular sqrt square std sub svd tan tanh trace true_divide
    var vdot vector_norm
    """.split()
)


@pytest.mark.parametrize(
    "source",
    [
        "import expfam_poco.families",
        "import families.gaussian as g",
        "from expfam_poco import families",
        "from expfam_poco.families import Bernoulli",
        "from ..families.gaussian import FullGaussian",
        "from .. import families",
        "def late():\n    from ..families import Bernoulli",
        "importlib.import_module('expfam_poco.families')",
        "import_module(f'expfam_poco.families.{name}')",
        "GROUP = 'expfam_poco.families'\n__import__(GROUP)",
    ],
)
def test_the_check_finds_every_way_to_import_a_family(source: str) -> None:
    path = ROOT / "expfam_poco" / "compare" / "some_module.py"
    assert any(is_family(module) for _, module, _ in imports_of(path, source))


def test_the_check_lets_mentions_pass() -> None:
    source = '"""expfam_poco.families"""\nfrom ..family import F\nentry_points(group="expfam_poco.families")'
    path = ROOT / "expfam_poco" / "compare" / "some_module.py"
    assert not any(is_family(module) for _, module, _ in imports_of(path, source))


def test_optimizer_shell_holds_no_mathematics() -> None:
    tree = ast.parse((ROOT / "expfam_poco" / "optim" / "optimizer.py").read_text(encoding="utf-8"))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = called_name(node).removeprefix("_foreach_").strip("_")
            mathematical = name in MATHEMATICS
        else:
            operator = node.op if isinstance(node, ast.BinOp | ast.AugAssign) else None
            of_numbers = isinstance(node, ast.BinOp) and isinstance(node.left, ast.Constant)
            mathematical = isinstance(operator, ast.MatMult | ast.Pow) and not of_numbers
        if mathematical:
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    assert not found, f"move these out of the shell: {found}"


def test_import_brings_in_neither_families_nor_optional_packages() -> None:
    probe = """
import json, sys
import torch
before = set(sys.modules)
import expfam_poco
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    command = [sys.executable, "-c", probe]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    new = json.loads(done.stdout)
    optional = {"pyro", "typer", "rich", "matplotlib", "sklearn", "pandas", "scipy", "ivon", "pytest", "hypothesis"}
    optional |= {"transformers", "accelerate", "lightning", "pytorch_lightning"}
    found = [name for name in new if name.split(".")[0] in optional or is_family(name)]
    assert not found, f"`import expfam_poco` also imports {found}"


def test_files_name_no_path_of_the_machine_they_were_written_on() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        capture_output=True, text=True, cwd=ROOT, timeout=60,
    )  # fmt: skip
    if listed.returncode:
        pytest.skip("not a git checkout")
    # Written so that this file does not name them itself.
    folders = "|".join(("work", "root", "home", "opt", "tmp/venv", "workspace"))
    local_path = re.compile(rf"(?<![\w.])/(?:{folders})\b/?[\w.]|\.\./{'shared'}\b|\.{'library'}/")
    found = []
    for name in listed.stdout.split("\0"):
        path = ROOT / name
        if name and path.is_file():
            text = path.read_bytes().decode("utf-8", errors="ignore")
            found += [f"{name}: {match[0]!r}" for match in local_path.finditer(text)]
    assert not found, found


@pytest.mark.parametrize("module", ["expfam_poco", "expfam_poco.families"])
def test_every_public_name_has_an_example(module: str) -> None:
    package = importlib.import_module(module)
    missing = []
    for name in package.__all__:
        value = getattr(package, name)
        value_type = module == "expfam_poco.families" and isinstance(value, type) and issubclass(value, tuple)
        if callable(value) and not value_type:
            text = value.__doc__ or ""
            if ">>>" not in text and "```" not in text:
                missing.append(name)
    assert not missing, f"no example in the docstring of {missing}"


@pytest.mark.xdist_group("alone")
def test_tests_of_a_group_stay_on_one_worker(request: pytest.FixtureRequest) -> None:
    """pytest-xdist goes by this ending; without it every worker makes what a group is to share."""
    assert request.node.nodeid.endswith("@alone") or not hasattr(request.config, "workerinput")
