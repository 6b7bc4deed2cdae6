"""The house rules that a machine can check."""

from __future__ import annotations

import ast
import importlib
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import histill
from histill.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "histill"
MODULES = sorted(SOURCE.rglob("*.py"))
SCRIPTS = sorted([*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "examples").glob("*.py")])
MODULE_LINES = 400
FUNCTION_LINES = 60
LOOP_LINES = 150
LOOP = ("loop.py", "step.py")
HEAVY = ("torch", "torchvision", "timm", "tyro", "numpy", "PIL", "sklearn", "matplotlib", "rich", "jinja2")


def _relative(path: Path) -> str:
    return path.relative_to(SOURCE if path.is_relative_to(SOURCE) else ROOT).as_posix()


def _imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield (node.module or "").partition(".")[0]


def _functions(text: str) -> dict[str, int]:
    """Name -> lines, the docstring included."""
    return {
        node.name: (node.end_lineno or 0) - node.lineno + 1
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


# ------------------------------------------------------------------ modules


@pytest.mark.parametrize("path", [*MODULES, *SCRIPTS], ids=_relative)
def test_a_module_fits_in_the_head(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MODULE_LINES
    for name, lines in _functions(text).items():
        assert lines <= FUNCTION_LINES, f"{name} has {lines} lines, allowed are {FUNCTION_LINES}"


def test_the_training_loop_is_seen_at_a_glance() -> None:
    lines = {name: len((SOURCE / "distill" / name).read_text(encoding="utf-8").splitlines()) for name in LOOP}
    assert all(count <= LOOP_LINES for count in lines.values()), lines


def test_no_module_is_named_for_nothing() -> None:
    nothing = {"utils", "util", "common", "helpers", "helper", "misc", "tools"}
    parts = {part for path in MODULES for part in (path.stem, *path.relative_to(SOURCE).parts[:-1])}
    assert not parts & nothing


def test_tyro_is_known_to_config_alone() -> None:
    knowing = [_relative(path) for path in MODULES if "tyro" in _imported(ast.parse(path.read_text("utf-8")))]
    assert knowing == ["config.py"]


def test_nothing_is_pickled() -> None:
    for path in MODULES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert not {"pickle", "dill", "joblib", "cloudpickle"} & set(_imported(tree)), _relative(path)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert keywords.get("weights_only") == "True", f"{_relative(path)}:{node.lineno}"


def _dotted(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("name", [_dotted(path) for path in MODULES if path.stem != "__main__"])
def test_public_names_resolve_once_each(name: str) -> None:
    module = importlib.import_module(name)
    public = getattr(module, "__all__", None)
    if public is None:
        defined = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == name]
        assert [key for key in defined if not key.startswith("_")] == [], "a module with public names has __all__"
        return
    assert len(set(public)) == len(public)
    for entry in public:
        assert getattr(module, entry) is not None


def test_every_module_is_found_by_import() -> None:
    found = {module.name for module in pkgutil.walk_packages(histill.__path__, "histill.")}
    missing = {_dotted(path) for path in MODULES} - found - {"histill"}
    assert not missing, "a folder without __init__.py, or an installed copy that is older than the source"


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'destill'"):
        _ = histill.destill


# ------------------------------------------------------------------ layers


def _lint_imports(source: Path) -> subprocess.CompletedProcess[str]:
    script = shutil.which("lint-imports", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert script is not None, "lint-imports is part of the test extra"
    return subprocess.run(
        [script, "--no-cache", "--no-logo", "--config", str(ROOT / "pyproject.toml")],
        env={**os.environ, "PYTHONPATH": str(source), "NO_COLOR": "1"},
        cwd=source,
        capture_output=True,
        text=True,
        check=False,
    )


def test_imports_point_downward_only() -> None:
    done = _lint_imports(SOURCE.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@pytest.mark.parametrize(
    ("module", "text", "finding"),
    [
        ("files.py", "from histill import config\n", "histill.files -> histill.config"),
        ("tiles/upward.py", "import histill.distill\n", "histill.tiles.upward -> histill.distill"),
        ("newcomer/__init__.py", "", "newcomer"),
    ],
)
def test_the_contract_sees_an_upward_import_and_an_unplaced_folder(
    tmp_path: Path, module: str, text: str, finding: str
) -> None:
    shutil.copytree(SOURCE, tmp_path / "histill", ignore=shutil.ignore_patterns("__pycache__"))
    path = tmp_path / "histill" / module
    path.parent.mkdir(exist_ok=True)
    path.write_text((path.read_text() if path.exists() else "") + text)
    done = _lint_imports(tmp_path)
    assert done.returncode != 0
    assert finding in done.stdout + done.stderr


# ------------------------------------------------------------------ light start


@pytest.mark.parametrize("code", ["import histill", "from histill import cli; cli.main(['--help'])"])
def test_import_and_help_load_nothing_heavy(code: str) -> None:
    probe = f"{code}\nimport sys\nprint('loaded:', [name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded: []"


# ------------------------------------------------------------------ what the README promises


def _readme_commands() -> list[str]:
    """The two commands of the section Install, each with its && parts on one line."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Install\n")[2].partition("\n## ")[0]
    return [block.strip() for block in re.findall(r"```bash\n(.*?)```", section, flags=re.DOTALL)]


def test_the_readme_gives_two_commands_and_ci_runs_the_second_as_it_stands() -> None:
    commands = _readme_commands()
    assert len(commands) == 2
    assert all("\n" not in command for command in commands)
    demo, test = ([part.strip() for part in command.split("&&")] for command in commands)
    assert demo == ["python3 -m venv .venv", ".venv/bin/pip install .", ".venv/bin/histill demo"]
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8").replace('"$venv"', ".venv").splitlines()
    for part in test:
        assert part in script
    assert script[-1] == test[-1], "pytest's summary is the last thing that CI prints"


def test_ci_pre_commit_and_contributing_run_the_same_checks() -> None:
    checks = {"ruff check .", "ruff format --check .", "mypy", "lint-imports"}
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    hooks = re.findall(r"entry: (.*)", (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert set(hooks) == checks
    for check in checks:
        assert f'"$venv"/bin/{check}\n' in script
    assert "pre-commit run --all-files" in contributing


def test_the_readme_shows_only_commands_that_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL) + re.findall(r"`([^`\n]+)`", text))
    shown = set(re.findall(r"(?:^|/|&& )histill ([a-z]+)", code, flags=re.MULTILINE))
    assert {"demo", "distill", "models"} <= shown
    assert shown <= set(COMMANDS)


def test_the_licence_is_apache_2_0() -> None:
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in licence
    assert "Version 2.0, January 2004" in licence
    assert "END OF TERMS AND CONDITIONS" in licence
