"""Dependencies point one way, and methods stay free of machinery."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "jaxdistill"
FILES = sorted(PACKAGE.rglob("*.py"))
ALLOWED = {  # folder -> folders of this package that it may import
    "core": {"core"},
    "models": {"core", "models"},
    "diffusion": {"core", "diffusion"},
    "samplers": {"core", "diffusion", "samplers"},
    "objectives": {"core", "objectives"},
    "surgery": {"core", "models", "surgery", "objectives"},
    "methods": {"core", "models", "diffusion", "samplers", "objectives", "surgery", "methods"},
    "data": {"core", "data", "diffusion"},
    "evals": {"core", "data", "diffusion", "models", "samplers", "objectives", "evals"},
    "interop": {"core", "models", "diffusion", "samplers", "interop"},
    "run": {"core", "data", "diffusion", "evals", "interop", "run"},
}
CORE_FOR_METHODS = {"types", "fields", "needs", "net", "rows"}  # no jit, mesh, optimiser or checkpoint
MACHINERY = {"optax", "orbax", "grain", "ml_collections", "torch"}


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_direction(file):
    folder = file.relative_to(PACKAGE).parts[0]
    inside = [name.split(".") for name in imports(file) if name.startswith("jaxdistill.")]
    for parts in inside:
        assert parts[1] in ALLOWED.get(folder, set(ALLOWED)), ".".join(parts)
    if folder in ("methods", "objectives", "diffusion", "samplers"):
        for parts in inside:
            assert parts[1] != "core" or parts[2] in CORE_FOR_METHODS, ".".join(parts)
        assert not {name.split(".")[0] for name in imports(file)} & MACHINERY


def test_only_models_and_the_net_know_nnx():
    for file in FILES:
        if any(name.startswith("flax.nnx") or name == "flax.nnx" for name in imports(file)):
            assert file.relative_to(PACKAGE).parts[0] == "models" or file.name == "net.py", file
