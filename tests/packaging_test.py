"""The package as users get it: built, installed into a fresh environment, and run there."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import tokendance_jax

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
TOP = ("kernels", "models", "scripts", "tests", "tokendance_jax")
FILES = ("pyproject.toml", "README.md", "LICENSE")

_SERVE = """
import sys
from pathlib import Path

import tokendance_jax
from tokendance_jax.kernels import lanes
from tokendance_jax.models.decoder import model

for module in (tokendance_jax, lanes, model):
    assert Path(module.__file__).is_relative_to(sys.argv[1]), module.__file__
engine = tokendance_jax.RoundEngine(tokendance_jax.demo_model("float32"), kv_memory=16 << 20)
round_ = tokendance_jax.demo_trace().rounds[0]
result = engine.serve(round_)
right = [result.texts[prompt.agent] == prompt.recorded_output for prompt in round_.agents]
assert sum(right) >= 6, result.texts
assert list(result.texts) == [prompt.agent for prompt in round_.agents]
assert result.ledger.computed_tokens + result.ledger.reused_tokens == result.ledger.prompt_tokens
print("served", result.ledger.decoded_tokens)
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, so that a build leaves no files in the checkout; links stay links."""
    tree = tmp_path_factory.mktemp("tree")
    for name in FILES:
        shutil.copy(ROOT / name, tree)
    for name in TOP:
        ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignore)
    return tree


@pytest.fixture(scope="module")
def dist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel built from it."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", str(out), str(tree)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return out


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (wheel,) = dist.glob("*.whl")
    return wheel


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """An environment that sees the dependencies of this one, but not this project.

    A line in a .pth file adds a folder to the path without running the .pth files in that folder,
    so an editable installation of this project is not found there.
    """
    folder = tmp_path / "environment"
    venv.create(folder, symlinks=True)
    paths = sysconfig.get_paths()
    lines = sorted({paths["purelib"], paths["platlib"]})
    (site_packages(folder) / "dependencies.pth").write_text("\n".join(lines) + "\n")
    return folder


def site_packages(environment: Path) -> Path:
    variables = {"base": str(environment), "platbase": str(environment)}
    return Path(sysconfig.get_path("purelib", "venv", variables))


def python(
    environment: Path, *arguments: str | Path, folder: Path
) -> subprocess.CompletedProcess[str]:
    """Runs the environment's interpreter without the PYTHON* variables of this process."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(
        [environment / "bin" / "python", *arguments],
        cwd=folder,
        env=kept | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_wheel_holds_the_package_and_nothing_else(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tops = {name.split("/")[0] for name in names}
    info = f"tokendance_jax-{tokendance_jax.__version__}.dist-info"
    assert tops == {"tokendance_jax", info}
    assert f"{info}/licenses/LICENSE" in names
    missing = {
        str(path.relative_to(ROOT))
        for folder, _, files in os.walk(ROOT / "tokendance_jax", followlinks=True)
        for path in (Path(folder, file) for file in files)
        if path.suffix != ".pyc"
    } - names
    assert not missing


def test_sdist_holds_files_instead_of_links(dist: Path):
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = {member.name.split("/", 1)[-1]: member for member in archive}
    assert not [name for name, member in members.items() if member.issym() or member.islnk()]
    demo = "tokendance_jax/demo"
    data = f"{demo}/harbour.jsonl", f"{demo}/checkpoint/model.safetensors"
    for name in ("LICENSE", "tokendance_jax/kernels/rope.py", *data):
        assert members[name].isfile()


def test_installed_wheel_serves_a_round(wheel: Path, environment: Path, tmp_path: Path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    before = python(environment, "-c", "import tokendance_jax", folder=elsewhere)
    assert "ModuleNotFoundError" in before.stdout
    pip = [sys.executable, "-m", "pip", "--python", str(environment / "bin" / "python")]
    options = ["install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    subprocess.run([*pip, *options, str(wheel)], check=True)
    done = python(environment, "-c", _SERVE, environment, folder=elsewhere)
    assert done.returncode == 0, done.stdout
    assert "served" in done.stdout


def test_sources_run_without_installation(tree: Path, environment: Path):
    done = python(environment, "-c", _SERVE, tree, folder=tree)
    assert done.returncode == 0, done.stdout
    done = python(environment, "-m", "scripts.serve_round", "--help", folder=tree)
    assert "--policy" in done.stdout
