"""For -h and --help, every command, tool and script prints its docstring or head and does nothing
else; an unknown argument is refused in one line.
"""

import ast
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from launch._command import asks_for_help

ROOT = Path(__file__).parents[1]
FILES = sorted([*ROOT.glob("launch/[!_]*.py"), *ROOT.glob("tools/[!_]*.py")])
SCRIPTS = sorted([*ROOT.glob("launch/**/*.sh"), *ROOT.glob("tools/*.sh")])
NAMES = [str(path.relative_to(ROOT)) for path in FILES]


@pytest.fixture
def call(monkeypatch, tmp_path, capsys):
    """call(file, *arguments) -> (exit code, stdout, stderr) of a file that is run as a program, in
    an empty folder.
    """
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        try:
            runpy.run_path(str(ROOT / name), run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()

    yield run
    os.environ.clear()
    os.environ.update(before)
    assert list(tmp_path.iterdir()) == []


def tree():
    """The files that a command could write over, with the time of their last change."""
    own = [
        ROOT / name
        for name in ("configs", "docs", "jaxdistill", "launch", "tests", "tools")
    ]
    files = [
        path
        for folder in own
        for path in folder.rglob("*")
        if "__pycache__" not in path.parts
    ]
    return {
        path: path.stat().st_mtime_ns
        for path in [*files, *ROOT.glob("*.*")]
        if path.is_file()
    }


@pytest.mark.parametrize("word", ["-h", "--help"])
@pytest.mark.parametrize("name", NAMES)
def test_help_is_the_docstring(name, word, call):
    before = tree()
    code, out, err = call(name, word)
    assert (code, out.strip(), err) == (
        0,
        ast.get_docstring(
            ast.parse((ROOT / name).read_text()), clean=False
        ).strip(),
        "",
    )
    assert tree() == before


def test_help_comes_before_anything_else(call):
    before = tree()
    for arguments in (["--check", "-h"], ["--no_such=1", "--help"], ["x", "-h"]):
        assert call("tools/docs_table.py", *arguments)[0] == 0
    assert tree() == before


def test_help_after_two_dashes_is_anothers():
    assert asks_for_help(["2", "-h", "--", "--config=x"]) and not asks_for_help(
        ["2", "--", "--help"]
    )


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_argument_is_one_line(name, call):
    before = tree()
    for word in (
        "--no_such_argument=1",
        "--no_such_argument",
        "-x",
        "no_such_argument",
    ):
        code, out, err = call(name, word)
        assert (
            code == 2
            and out == ""
            and err.startswith("refused: ")
            and len(err.strip().splitlines()) == 1
        ), (word, err)
    assert tree() == before


@pytest.mark.parametrize(
    ("name", "word", "near"),
    [
        ("launch/train.py", "--workdri=x", "workdir"),
        ("launch/evaluate.py", "--confg=x", "config"),
        ("launch/sample.py", "--step=1", "steps"),
        ("launch/export.py", "--adaptor", "adapter"),
        ("launch/generate.py", "--prompts=x", "prompt"),
        ("tools/bench.py", "--cas=kd", "case"),
        ("tools/bench_generate.py", "--dims=3", "dim"),
        ("tools/docs_table.py", "--chek", "check"),
        ("tools/golden.py", "--onyl=kd", "only"),
        ("tools/plan.py", "--topolgy=v5e:4x4", "topology"),
        ("tools/recipes.py", "--onyl=kd", "only"),
        ("tools/reproduce.py", "--seed=1", "seeds"),
        ("tools/store_logits.py", "--topk=3", "top_k"),
    ],
)
def test_the_nearest_name_is_said(name, word, near, call):
    code, _, err = call(name, word)
    assert code == 2 and f"did you mean {near!r}?" in err


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_help_of_scripts_is_their_head(script, tmp_path):
    before = tree()
    outs = []
    for word in ("-h", "--help"):
        done = subprocess.run(
            ["bash", script, word], cwd=tmp_path, capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "")
        outs.append(done.stdout)
    lines = [
        line
        for line in script.read_text().splitlines()
        if not line.startswith(("#!", "# shellcheck"))
    ]
    head = lines[
        : next(i for i, line in enumerate(lines) if not line.startswith("#"))
    ]
    assert (
        outs[0]
        == outs[1]
        == "".join(line.removeprefix("#").removeprefix(" ") + "\n" for line in head)
    )
    assert tree() == before and list(tmp_path.iterdir()) == []


def test_the_quickstart_takes_one_folder(tmp_path):
    for arguments in (["--workdir=x"], ["a", "b"]):
        done = subprocess.run(
            ["bash", ROOT / "launch/quickstart.sh", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert (
            done.returncode == 2
            and done.stderr.startswith("refused: ")
            and len(done.stderr.splitlines()) == 1
        )
