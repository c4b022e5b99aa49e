"""The rules of the house: style, types, arrows, sizes, recipes; and nothing private in what is shipped."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.runs import ROOT, mue

PACKAGE = ROOT / "lightning_mue"
MODULES = sorted(PACKAGE.rglob("*.py"))
RECIPES = sorted(p for p in (ROOT / "recipes").rglob("*.yaml") if p.parent.name != "cluster")  # those go beside one
MOST_LINES, MOST_BODY = 300, 40

pytestmark = pytest.mark.skipif(
    not (ROOT / "pyproject.toml").exists(), reason="the source tree with pyproject.toml is not here"
)


def run(*command):
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_ruff():
    run(sys.executable, "-m", "ruff", "check", ".")
    run(sys.executable, "-m", "ruff", "format", "--check", "--exclude", "*.md", ".")


def test_mypy():
    run(sys.executable, "-m", "mypy")


def test_arrows_go_down_only():
    beside = shutil.which("lint-imports", path=str(Path(sys.executable).parent))
    run(beside or "lint-imports")


def functions(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def body_lines(function):
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def test_files_and_functions_are_short():
    long = [str(p.relative_to(ROOT)) for p in MODULES if len(p.read_text("utf-8").splitlines()) > MOST_LINES]
    assert not long, f"more than {MOST_LINES} lines"
    long = [
        f"{p.relative_to(ROOT)}:{f.lineno} {f.name}" for p in MODULES for f in functions(p) if body_lines(f) > MOST_BODY
    ]
    assert not long, f"bodies of more than {MOST_BODY} lines"


def public(tree):
    """Modules, and classes and functions whose names and whose classes' names have no underscore."""
    yield tree
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from (f for f in node.body if isinstance(f, ast.FunctionDef) and not f.name.startswith("_"))


def test_what_is_public_is_documented():
    bare = [
        f"{path.relative_to(ROOT)}: {getattr(node, 'name', 'module')}"
        for path in MODULES
        for node in public(ast.parse(path.read_text(encoding="utf-8")))
        if ast.get_docstring(node) is None
    ]
    assert not bare


def test_lazy_names_lead_home():
    import lightning_mue

    for name in lightning_mue.__all__:
        assert getattr(lightning_mue, name).__name__ == name
    assert sorted(lightning_mue._HOMES) == sorted(lightning_mue.__all__)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
@pytest.mark.parametrize("command", ["fit", "calibrate"])
def test_recipes_parse(recipe, command, capsys):
    with pytest.raises(SystemExit) as stopped:
        mue(command, "-c", recipe, "--print_config")
    assert not stopped.value.code
    assert "exits:" in capsys.readouterr().out


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_go_on_after_a_stop(recipe):
    settings = yaml.safe_load(recipe.read_text())
    assert settings["ckpt_path"] == "last"
    assert settings["trainer"]["default_root_dir"]
    every = settings["trainer"].get("val_check_interval", 1.0)
    assert every <= 1.0 if isinstance(every, float) else every <= 1000, "last.ckpt is written at each validation"


# Each pattern is written so that it does not match itself.
PRIVATE = re.compile(
    "|".join(
        [
            r"(?<![\w.])/(?:[w]ork|[o]pt|[r]oot|[h]ome|[U]sers|[m]nt)/\w",
            r"[i]ndex-url",
            r"[h]ttps?://(?:\w+:\w+@|localhost|127\.|10\.|192\.168\.)",
            r"[a]rtifactory|[j]frog|[n]exus",
        ]
    )
)


def test_no_paths_of_a_machine_and_no_registry_hosts():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: which files are shipped is not known")
    found = []
    for name in run("git", "ls-files", "--cached", "--others", "--exclude-standard").splitlines():
        path = ROOT / name
        if not path.is_file() or b"\0" in (data := path.read_bytes())[:8000]:
            continue
        for number, line in enumerate(data.decode("utf-8", "replace").splitlines(), 1):
            if match := PRIVATE.search(line):
                found.append(f"{name}:{number}: {match.group()!r}")
    assert not found
