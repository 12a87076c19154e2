"""The wheel, installed outside the checkout, holds the whole library."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for file in (ROOT / "jaxdistill").rglob("*.py")
)
IMPORT = """
import importlib, pathlib, sys
for name in sys.argv[2:]:
    found = pathlib.Path(importlib.import_module(name).__file__)
    assert found.is_relative_to(sys.argv[1]), found
"""


def run(*command, **kwargs):
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, **kwargs
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder that the wheel was installed into, built from a copy of what git has here."""
    source, wheels, target = (
        tmp_path_factory.mktemp(n) for n in ("source", "wheels", "target")
    )
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for file in (ROOT / "jaxdistill").rglob("*"):
        if file.is_file() and "__pycache__" not in file.parts:
            copy = source / file.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    quiet = ("--no-deps", "--quiet", "--disable-pip-version-check")
    pip = ("-m", "pip")
    run(
        *pip,
        "wheel",
        str(source),
        "--no-build-isolation",
        "--wheel-dir",
        str(wheels),
        *quiet,
    )
    (wheel,) = wheels.iterdir()
    run(*pip, "install", str(wheel), "--target", str(target), *quiet)
    return target


@pytest.mark.full
def test_every_module_is_imported_from_the_installed_wheel(installed, tmp_path):
    away = {**os.environ, "PYTHONPATH": str(installed), "JAX_PLATFORMS": "cpu"}
    run("-c", IMPORT, str(installed), *MODULES, cwd=tmp_path, env=away)
    assert "jaxdistill.run.loop" in MODULES
    assert (installed / "jaxdistill/py.typed").exists()


@pytest.mark.full
def test_the_wheel_holds_the_library_alone(installed):
    names = {
        path.name for path in installed.iterdir() if path.suffix != ".dist-info"
    }
    assert names == {"jaxdistill"}
