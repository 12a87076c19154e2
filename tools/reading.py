"""Prints figures of how the source reads.

python tools/reading.py [--tree=FOLDER]

FOLDER is a checkout (by default this one). For the library, its configs, commands, tools and tests:
lines of code, tokens a line, lines over 100 characters, tuple assignments, named lambdas. For the
library: public functions with typed shapes, and the longest functions. For the tests: assertions.
For the configs: strings that name classes.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from launch._command import arguments, main  # noqa: E402

FOLDERS = ("jaxdistill", "configs", "launch", "tools", "tests")
SHAPED = ("objectives", "diffusion", "samplers", "models", "evals")
# Tokens that are not code.
LAYOUT = {
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.COMMENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}
CLASS_NAME = re.compile(r"[a-z][\w.]*:[A-Z]\w*")
ARRAYS = ("Array", "Float", "Int", "Bool", "PRNGKeyArray", "Key", "Shaped", "Num")


def sources(folder: Path) -> Iterator[tuple[Path, str]]:
    """Every Python file below `folder` with its text."""
    for file in sorted(folder.rglob("*.py")):
        yield file, file.read_text(encoding="utf-8")


def tokens_per_line(text: str) -> tuple[int, int]:
    """(tokens, lines with tokens), without comments, docstrings and layout."""
    docstrings = set()
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            docstrings.add(body[0].lineno)
    count = 0
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in LAYOUT:
            continue
        if token.type == tokenize.STRING and token.start[0] in docstrings:
            continue
        count += 1
        lines.update(range(token.start[0], token.end[0] + 1))
    return count, len(lines)


def is_tuple_assignment(node: ast.AST) -> bool:
    """`a, b = x, y`: several statements in one."""
    if not isinstance(node, ast.Assign) or not isinstance(
        node.targets[0], ast.Tuple
    ):
        return False
    return isinstance(node.value, ast.Tuple)


def is_named_lambda(node: ast.AST) -> bool:
    """`f = lambda x: ...`"""
    return isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda)


def is_assertion(node: ast.AST) -> bool:
    """`assert`, `pytest.raises` or one of numpy's `assert_...`."""
    if isinstance(node, ast.Call):
        called = ast.unparse(node.func)
        return called == "pytest.raises" or ".testing.assert_" in called
    return isinstance(node, ast.Assert)


def public_functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    """Public functions of a module, and public methods (with `__call__`) of its public classes."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for part in node.body:
                named = isinstance(part, ast.FunctionDef)
                if named and (
                    not part.name.startswith("_") or part.name == "__call__"
                ):
                    yield part


def annotations(function: ast.FunctionDef) -> list[str]:
    """The annotations of arguments and result, as text."""
    arguments_ = [
        *function.args.posonlyargs,
        *function.args.args,
        *function.args.kwonlyargs,
    ]
    given = [a.annotation for a in arguments_ if a.annotation is not None]
    if function.returns is not None:
        given.append(function.returns)
    return [ast.unparse(a) for a in given]


def takes_arrays(function: ast.FunctionDef) -> bool:
    """Whether an argument or the result is annotated as an array."""
    return any(
        re.search(rf"\b({'|'.join(ARRAYS)})\b", a) for a in annotations(function)
    )


def has_shapes(function: ast.FunctionDef) -> bool:
    """Whether every array of the signature has a typed shape."""
    for annotation in annotations(function):
        plain = re.sub(
            r"\b\w+\[(Array|np\.ndarray|ArrayLike|Array \| np\.ndarray), *'[^']*'\]",
            "",
            annotation,
        )
        if re.search(r"\bArray\b", plain):
            return False
    return True


def folder_figures(folder: Path) -> dict[str, float]:
    """Name -> value of the figures of one folder."""
    tokens = 0
    lines = 0
    wide = 0
    tuples = 0
    lambdas = 0
    for _, text in sources(folder):
        file_tokens, file_lines = tokens_per_line(text)
        tokens += file_tokens
        lines += file_lines
        wide += sum(len(line) > 100 for line in text.splitlines())
        for node in ast.walk(ast.parse(text)):
            tuples += is_tuple_assignment(node)
            lambdas += is_named_lambda(node)
    return {
        "lines": lines,
        "tokens a line": round(tokens / max(lines, 1), 2),
        "over 100": wide,
        "tuple assignments": tuples,
        "named lambdas": lambdas,
    }


def longest(folder: Path, count: int = 5) -> list[tuple[int, str]]:
    """(tokens, file:function) of the longest functions."""
    found = []
    for file, text in sources(folder):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                size, _ = tokens_per_line(ast.unparse(node))
                found.append((size, f"{file.relative_to(folder)}:{node.name}"))
    return sorted(found, reverse=True)[:count]


def reading(argv):
    values, _ = arguments(argv, {"tree": str(ROOT)})
    tree = Path(values["tree"])
    for name in FOLDERS:
        figures = folder_figures(tree / name)
        print(
            name,
            ", ".join(f"{key} {value}" for key, value in figures.items()),
            sep=": ",
        )
    for name in SHAPED:
        functions = []
        for _, text in sources(tree / "jaxdistill" / name):
            functions += public_functions(ast.parse(text))
        arrays = [f for f in functions if takes_arrays(f)]
        shaped = sum(has_shapes(f) for f in arrays)
        print(
            f"{name}: {shaped} of {len(arrays)} public functions of arrays have typed shapes"
        )
    assertions = 0
    for _, text in sources(tree / "tests"):
        assertions += sum(map(is_assertion, ast.walk(ast.parse(text))))
    print(f"tests: {assertions} assertions")
    names = sum(
        len(CLASS_NAME.findall(text)) for _, text in sources(tree / "configs")
    )
    print(f"configs: {names} strings that name classes")
    for size, where in longest(tree / "jaxdistill"):
        print(f"{size} tokens: {where}")


if __name__ == "__main__":
    main(reading)
