"""The package's metadata: one version, a licence, its types, its dependencies."""

import ast
import hashlib
import runpy
import sys
from pathlib import Path

import pytest
import setuptools

import jaxdistill

ROOT = Path(__file__).parents[1]


@pytest.fixture
def stated(monkeypatch):
    """The arguments of setup.py's call."""
    found = {}
    monkeypatch.setattr(
        setuptools, "setup", lambda **arguments: found.update(arguments)
    )
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    return found


def test_the_version_stands_in_one_place(stated):
    assert stated["version"] == jaxdistill.__version__
    assert [int(part) for part in jaxdistill.__version__.split(".")]
    text = (
        (ROOT / "setup.py").read_text()
        + (ROOT / "pyproject.toml").read_text()
        + (ROOT / "CITATION.cff").read_text()
    )
    assert f'"{jaxdistill.__version__}"' not in text


def test_setup_needs_nothing_that_it_installs():
    tree = ast.parse((ROOT / "setup.py").read_text())
    imported = [
        node
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    names = {
        getattr(node, "module", None) or node.names[0].name for node in imported
    }
    assert names == {"ast", "pathlib", "setuptools"}


def test_the_licence_is_there_and_named(stated):
    text = (ROOT / "LICENSE").read_text()
    assert text.split()[:7] == [
        "Apache",
        "License",
        "Version",
        "2.0,",
        "January",
        "2004",
        "http://www.apache.org/licenses/",
    ]
    words = hashlib.sha256(" ".join(text.split()).encode()).hexdigest()
    # of the text as published, white space aside
    assert (
        words == "0ffddef9e48f8a09aed5caf2d44f7ba1c1be2d9b8e0a6f693b1635b2d5566645"
    )
    assert stated["license"] == "Apache-2.0" and stated["license_files"] == [
        "LICENSE"
    ]
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (
        citation["license"] == "Apache-2.0" and citation["cff-version"] == "1.2.0"
    )
    assert {"message", "title", "authors", "type"} <= citation.keys() and citation[
        "authors"
    ][0]["name"]


def test_types_leave_with_the_package(stated):
    files = setuptools.Distribution(stated).get_command_obj("build_py")
    files.ensure_finalized()
    assert "py.typed" in {
        name
        for package, *_, names in files.data_files
        for name in names
        if package == "jaxdistill"
    }


def test_what_is_imported_is_declared(stated):
    """Every library that a file of the package imports at its top is a requirement."""
    names = {
        "sklearn": "scikit-learn",
        "PIL": "pillow",
        "yaml": "pyyaml",
        "orbax": "orbax-checkpoint",
        "absl": "absl-py",
    }
    declared = {
        word.replace("_", "-").partition(">")[0].lower()
        for word in stated["install_requires"]
    }
    for file in (ROOT / "jaxdistill").rglob("*.py"):
        for node in ast.parse(file.read_text()).body:
            modules = (
                [a.name for a in node.names] if isinstance(node, ast.Import) else []
            )
            modules += (
                [node.module]
                if isinstance(node, ast.ImportFrom) and node.level == 0
                else []
            )
            for top in {
                module.partition(".")[0] for module in modules
            } - sys.stdlib_module_names:
                assert names.get(top, top).replace("_", "-").lower() in declared | {
                    "jaxdistill"
                }, (
                    file,
                    top,
                )
