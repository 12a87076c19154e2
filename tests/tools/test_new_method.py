"""Skeletons of every family run unchanged: a few steps of the toy, and the test. Bad names are
refused in one line.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jaxdistill.core.types import Refused
from tools import new_method

ROOT = Path(__file__).parents[2]
FAMILIES = sorted(new_method.SKELETONS)
TOYS = """
import importlib

import pytest
from jaxdistill.run import loop


@pytest.mark.parametrize("family", {families})
def test_toy(family, tmp_path):
    config = importlib.import_module(f"configs.toy.new_{{family}}").get_config()
    config.steps, config.evaluation.batch = 4, 20
    if "samples" in config.evaluation:
        config.evaluation.samples = 20
    for run in (config.runs or {{}}).values():
        run.steps = 4
    report = loop.run(config, tmp_path / "run")
    assert report["claim"]["value"] == report["claim"]["value"] and report["steps"] == 4
"""


def test_every_family_of_methods_has_a_skeleton():
    folders = {
        p.name
        for p in (ROOT / "jaxdistill/methods").iterdir()
        if p.is_dir() and list(p.glob("[!_]*.py"))
    }
    assert folders == set(FAMILIES)
    for family in FAMILIES:
        assert {p.name for p in new_method.SKELETONS[family].glob("*.py")} == set(
            new_method.PLACES
        )


@pytest.mark.full
def test_what_is_written_runs(tmp_path, monkeypatch, capsys):
    """Toys, tests and ruff of all families, in a copy of the project and a process of its own."""
    for part in ("jaxdistill", "configs", "tools", "launch"):
        shutil.copytree(
            ROOT / part,
            tmp_path / part,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    shared = ("conftest.py", "typed.py", "times.py", "methods/conftest.py")
    for file in ("pyproject.toml", *(f"tests/{name}" for name in shared)):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    monkeypatch.setattr(new_method, "ROOT", tmp_path)
    for family in FAMILIES:
        new_method.new_method(
            [
                family,
                f"new_{family}",
                f"New{family.title()}",
                f"A method, {family}'s",
                "2601.12345",
            ]
        )
    written = [tmp_path / line for line in capsys.readouterr().out.split()]
    assert (
        len(written) == len(set(written)) == len(FAMILIES) * len(new_method.PLACES)
    )
    for path in written:
        text = path.read_text()
        assert "A method, " in text
        for word in ("my_method", "MyMethod", "My method", "2601.00000"):
            assert word not in text
    (tmp_path / "tests/test_toys.py").write_text(TOYS.format(families=FAMILIES))
    tests = [str(path) for path in written if "tests" in path.parts] + [
        "tests/test_toys.py"
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    ruff = shutil.which("ruff")
    assert ruff, "ruff is missing: pip install -e '.[dev]'"
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [ruff, *command, "--no-cache", *written],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(new_method, "ROOT", tmp_path)
    return tmp_path


GOOD = ["language", "some_method", "SomeMethod", "Some method", "2601.12345"]


@pytest.mark.parametrize(
    ("place", "word", "says"),
    [
        (
            0,
            "languages",
            "FAMILY='languages'[;:] did you mean 'language'",
        ),
        (0, "", "FAMILY="),
        (0, "../language", "FAMILY="),
        (1, "", "NAME="),
        (1, "SomeMethod", "NAME='SomeMethod': expected a module's name"),
        (1, "_some", "NAME="),
        (1, "some-method", "NAME="),
        (1, "../some", "NAME="),
        (1, "some.method", "NAME="),
        (1, "class", "NAME='class'"),
        (1, "1st", "NAME="),
        (1, "a" * 300, "NAME="),
        (2, "someMethod", "ClassName="),
        (2, "Some Method", "ClassName="),
        (2, "True", "ClassName="),
        (
            2,
            "Method",
            "ClassName=Method: the skeleton of language has something of that name",
        ),
        (2, "Some\n", "ClassName="),
        (3, 'Some """ method', "Title="),
        (3, "Some\nmethod", "Title="),
        (3, "Some \\method", "Title="),
        (3, "x" * 200, "Title="),
        (3, " ", "Title="),
        (4, "2601.1234", "arXiv-id="),
        (4, "arXiv:2601.12345", "arXiv-id="),
        (
            4,
            "--force",
            "unknown argument --force; expected FAMILY NAME ClassName Title arXiv-id",
        ),
    ],
)
def test_bad_arguments_are_refused_in_one_line(root, place, word, says):
    with pytest.raises(Refused, match=says) as caught:
        new_method.new_method([*GOOD[:place], word, *GOOD[place + 1 :]])
    assert str(caught.value).isprintable() and list(root.iterdir()) == []


@pytest.mark.parametrize("argv", [[], GOOD[:4], [*GOOD, "more"]])
def test_the_number_of_arguments(root, argv):
    said = f"found {len(argv)} arguments; expected FAMILY NAME ClassName Title arXiv-id, as in: "
    with pytest.raises(Refused, match=said):
        new_method.new_method(argv)
    assert list(root.iterdir()) == []


@pytest.mark.parametrize("part", new_method.PLACES)
def test_nothing_that_exists_is_replaced(root, part):
    there = root / new_method.PLACES[part].format(
        family="language", name="some_method"
    )
    there.parent.mkdir(parents=True)
    there.write_text("mine")
    with pytest.raises(
        Refused, match=f"NAME=some_method: {there.relative_to(root)} exists"
    ):
        new_method.new_method(GOOD)
    assert [p for p in root.rglob("*") if p.is_file()] == [
        there
    ] and there.read_text() == "mine"


def test_a_folder_that_takes_no_files_leaves_none(root):
    (root / "configs").write_text("a file")  # in the place of a folder
    with pytest.raises(Refused, match="configs"):
        new_method.new_method(GOOD)
    assert [p for p in root.rglob("*") if p.is_file()] == [root / "configs"]
