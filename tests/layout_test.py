"""The layout that imports and packaging depend on: one module object per file, small files."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import tokendance_jax

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("kernels", "models")
PACKAGE = "tokendance_jax"
FOLDERS = (*LINKED, "scripts", "tests", "tokendance_jax")
CORE = {
    "absl-py",
    "flax",
    "jax",
    "jaxlib",
    "jaxtyping",
    "jinja2",
    "numpy",
    "orbax-checkpoint",
    "rich",
    "safetensors",
    "tokenizers",
}

# Imports every module of the package, then prints the modules that were imported under a bare name,
# `kernels` or `models`.
_IMPORT_ALL = """
import importlib, os, sys

names = []
for folder, _, files in os.walk("tokendance_jax", followlinks=True):
    package = folder.replace(os.sep, ".")
    names += [f"{package}.{file[:-3]}" for file in files if file.endswith(".py")]
for name in names:
    importlib.import_module(name.removesuffix(".__init__"))
assert "tokendance_jax.kernels.rope" in sys.modules
assert "tokendance_jax.models.decoder.model" in sys.modules
print(sorted(name for name in sys.modules if name.split(".")[0] in ("kernels", "models")))
"""


def sources(*folders: str) -> Iterator[Path]:
    """Yields all Python files in folders of the root, each once: links are not followed."""
    for top in folders:
        for folder, _, files in os.walk(ROOT / top):
            yield from (Path(folder, file) for file in files if file.endswith(".py"))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yields line and dotted name of every import; relative names start with their dots."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.mark.parametrize("name", LINKED)
def test_root_folders_are_linked_into_the_package(name: str):
    assert (ROOT / name).is_dir()
    assert not (ROOT / name).is_symlink()
    assert not (ROOT / name / "__init__.py").exists()
    assert os.readlink(ROOT / "tokendance_jax" / name) == f"../{name}"


def test_no_module_goes_by_a_bare_name():
    done = subprocess.run(
        [sys.executable, "-c", _IMPORT_ALL],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert done.stdout == "[]\n"


def test_no_source_imports_a_bare_name():
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sources(*FOLDERS)
        for line, name in imports(path)
        if name.split(".")[0] in LINKED
    ]
    assert not found


def test_kernels_stand_on_jax_and_numpy_alone():
    allowed = sys.stdlib_module_names | {"jax", "numpy"}
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sources("kernels")
        for line, name in imports(path)
        if name.split(".")[0] not in allowed
        and not f"{name}.".startswith("tokendance_jax.kernels.")
    ]
    assert not found


# The parts of the package, and the scripts. Each part imports only from itself and earlier parts.
ORDER = (
    *("errors", "host", "hlo", "targets", "kernels", "identity", "prompt", "models", "paged"),
    *("plan", "policy", "model", "mirror", "demo", "engine", "study", "scripts"),
)


def part_of(name: str) -> str:
    """Returns the part that a module belongs to."""
    parts = name.split(".")
    return parts[0] if parts[0] != PACKAGE else parts[1] if len(parts) > 1 else PACKAGE


def test_imports_point_downward():
    upward, seen = [], set()
    for path in sources(PACKAGE, *LINKED, "scripts"):
        importer = part_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
        seen.add(importer)
        if path.parent == ROOT / PACKAGE and path.name == "__init__.py":
            continue  # re-exports the public names of all parts
        for line, name in imports(path):
            if name.split(".")[0] in (PACKAGE, "scripts"):
                part = part_of(name)
                if ORDER.index(part) > ORDER.index(importer):
                    upward.append(f"{path.relative_to(ROOT)}:{line}: {part}")
    assert not upward
    assert seen == {*ORDER, "__init__"}


def reached(*modules: str) -> set[str]:
    """Returns these modules and all modules of the package that they import, directly or not."""
    found, left = set(), list(modules)
    while left:
        name = left.pop()
        base = ROOT.joinpath(*name.split("."))
        path = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
        # Skip the package's own `__init__`: it imports all public parts.
        if name in found or name == PACKAGE or not path.is_file():
            continue
        found.add(name)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                "tokendance_jax"
            ):
                parts = (node.module or "").split(".")
                left += [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
                left += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def test_the_planner_knows_no_model_and_no_kernel():
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sources("tokendance_jax/plan", "tokendance_jax/policy")
    ]
    found = reached(*names)
    assert found > set(names)
    own = "tokendance_jax.plan", "tokendance_jax.policy", "tokendance_jax.prompt"
    known = {
        "tokendance_jax.errors",
        "tokendance_jax.kernels.lanes",
        "tokendance_jax.paged",
        "tokendance_jax.paged.page_pool",
        "tokendance_jax.paged.prefix_cache",
    }
    assert not {name for name in found - known if not name.startswith(own)}
    for name in found:
        path = ROOT.joinpath(*name.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        assert not {name for _, name in imports(path) if name.split(".")[0] == "flax"}


def test_files_are_short():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in sources(*FOLDERS)
    }
    assert len(lengths) > 50
    assert not {path: length for path, length in lengths.items() if length > 450}


def test_core_dependencies():
    names = [re.split(r"[^\w.-]", requirement)[0] for requirement in project()["dependencies"]]
    assert len(names) == len(set(names))
    assert set(names) == CORE


def test_version_is_the_projects():
    assert tokendance_jax.__version__ == project()["version"]


def test_public_names_are_there():
    assert tokendance_jax.__all__ == sorted(tokendance_jax.__all__)
    for name in tokendance_jax.__all__:
        assert hasattr(tokendance_jax, name)


def test_readme_and_ci_share_the_commands():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    first, second = re.findall(r"^```sh\n(.+)\n```$", readme, re.MULTILINE)[:2]
    assert first.endswith(" && .venv/bin/python -m scripts.serve_round")
    assert second.endswith(" && .venv/bin/python -m pytest -n auto")
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    for command in (first, second):
        assert any(line.endswith(f'" {command.split(" && ")[-1]}') for line in ci)
