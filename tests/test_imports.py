"""The floors: imports point downwards and never in a circle, and methods stay free of machinery.

A failure names the file, the import and the rule that it breaks.
"""

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "jaxdistill"
FILES = sorted(PACKAGE.rglob("*.py"))
ABOVE = [
    file
    for folder in ("launch", "tools")
    for file in sorted((ROOT / folder).rglob("*.py"))
]
FLOORS = {  # folder -> folders of the library that it stands on, besides itself
    "core": (),
    "objectives": ("core",),
    "diffusion": ("core",),
    "models": ("core",),
    "samplers": ("core", "diffusion"),
    "surgery": ("core", "models", "objectives"),
    "methods": ("core", "models", "diffusion", "samplers", "objectives", "surgery"),
    "data": ("core", "diffusion"),
    "evals": ("core", "data", "diffusion", "models", "samplers", "objectives"),
    "interop": ("core", "models", "diffusion", "samplers"),
    "run": ("core", "data", "diffusion", "evals", "interop"),
    "__init__.py": (),
}
PURE = ("methods", "objectives", "diffusion", "samplers")
# no jit, mesh, optimiser or checkpoint
CORE_FOR_PURE = ("types", "fields", "net", "needs", "rows", "tokenizer")
MACHINERY = ("optax", "orbax", "grain", "ml_collections", "torch")


@functools.cache
def imports(file: Path) -> frozenset[str]:
    """Dotted names of what a file imports, wherever in the file it does."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def broken(file: Path) -> list[str]:
    """The rules that a file of the library breaks, one line each."""
    folder = file.relative_to(PACKAGE).parts[0]
    here = file.relative_to(ROOT)
    if folder not in FLOORS:
        return [
            f"{here}: the folder {folder} is on no floor (FLOORS in tests/test_imports.py)"
        ]
    lines = []
    for name in sorted(imports(file)):
        top, *rest = name.split(".")
        if top in ("launch", "tools", "configs", "tests"):
            lines.append(
                f"{here} imports {name}: the library imports nothing that stands on it"
            )
        if top in MACHINERY and folder in PURE:
            lines.append(
                f"{here} imports {name}: {folder} knows no machinery, such as {top}"
            )
        if top != "jaxdistill" or not rest:
            continue
        if rest[0] == "run" and folder != "run":
            lines.append(
                f"{here} imports {name}: run is the top floor, nothing imports it"
            )
        elif rest[0] != folder and rest[0] not in FLOORS[folder]:
            below = ", ".join(FLOORS[folder]) or "nothing of the library"
            lines.append(f"{here} imports {name}: {folder} stands on {below}")
        elif rest[0] == "core" and folder in PURE and rest[1] not in CORE_FOR_PURE:
            known = ", ".join(CORE_FOR_PURE)
            lines.append(f"{here} imports {name}: of core, {folder} knows {known}")
    return lines


@pytest.mark.parametrize("file", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_stands_on_the_floors_below(file):
    assert not broken(file), "\n".join(broken(file))


def modules(files) -> dict[str, Path]:
    """Dotted name -> file; a package's name is that of its __init__.py."""
    dotted = lambda file: ".".join(file.relative_to(ROOT).with_suffix("").parts)
    return {dotted(file).removesuffix(".__init__"): file for file in files}


def graph(files) -> dict[str, set[str]]:
    """Module -> modules among `files` that it imports."""
    known = modules(files)
    edges = {}
    for module, file in known.items():
        # "package.module.name" is the module, unless the name is a module itself
        found = {
            name if name in known else name.rpartition(".")[0]
            for name in imports(file)
        }
        edges[module] = (found & known.keys()) - {module}
    return edges


def circle(edges: dict[str, set[str]]) -> list[str]:
    """The modules of a circle of imports, the first again at the end; [] where there is none."""
    done = set()
    path = []

    def visit(module: str) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        path.append(module)
        for other in sorted(edges[module]):
            if found := visit(other):
                return found
        path.pop()
        done.add(module)
        return []

    for module in sorted(edges):
        if found := visit(module):
            return found
    return []


def test_no_circle():
    found = circle(graph([*FILES, *ABOVE]))
    assert not found, (
        f"a circle of imports: {' -> '.join(found)}; what both need is a third module"
    )


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == [
        "b",
        "c",
        "b",
    ]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_floors_are_in_order():
    """A floor stands on floors that come before it."""
    assert circle({folder: set(below) for folder, below in FLOORS.items()}) == []


def test_only_models_and_the_net_know_nnx():
    for file in FILES:
        if any(
            name.startswith("flax.nnx") or name == "flax.nnx"
            for name in imports(file)
        ):
            assert (
                file.relative_to(PACKAGE).parts[0] == "models"
                or file.name == "net.py"
            ), file
