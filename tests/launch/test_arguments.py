"""Invalid values of arguments are refused in one line, before anything is loaded or written."""

import os

import pytest

from jaxdistill.core.types import Refused
from launch import generate
from launch._command import arguments, decimal, output, whole
from tools import bench, plan


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "-1",
        "x",
        "1.5",
        "1e3",
        "²",
        "٣x",
        " 1",
        "1 ",
        "+1",
        "0x10",
        "9" * 30,
        "9" * 5000,
        "2147483648",
    ],
)
def test_whole_numbers(text):
    assert whole({"n": "1"}, "n", 1) == 1 and whole({"n": "-3"}, "n", -5) == -3
    with pytest.raises(
        Refused, match=r"--n=.*: expected an integer of at least 1"
    ) as caught:
        whole({"n": text}, "n", 1)
    assert len(str(caught.value)) < 120


@pytest.mark.parametrize(
    "text", ["", "x", "nan", "inf", "-inf", "-0.1", "1.5", "1e400", "0,5"]
)
def test_decimal_numbers(text):
    assert (
        decimal({"x": "0.5"}, "x", 0.0, 1.0) == 0.5
        and decimal({"x": "0"}, "x", 0.0) == 0.0
    )
    with pytest.raises(Refused, match=r"--x=.*: expected a number from 0 to 1"):
        decimal({"x": text}, "x", 0.0, 1.0)
    with pytest.raises(Refused, match="--x=0: expected a number above 0"):
        decimal({"x": "0"}, "x", 0.0, above=True)


@pytest.mark.parametrize("text", ["", "maybe", "2", "none"])
def test_switches(text):
    values = lambda *words: arguments(words, {"on": False})[0]["on"]
    assert (
        not values()
        and values("--on")
        and values("--on=1")
        and values("--on=True")
        and not values("--on=false")
        and not values("--on=0")
    )
    with pytest.raises(Refused, match=f"--on={text}: expected true or false"):
        values(f"--on={text}")


def test_places_for_files(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.png").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path)
    at = lambda text, *more, **how: output({"out": text}, "out", *more, **how)
    assert at("") is None
    for text in (
        "new.png",
        "file.png",
        "folder/a.png",
        "new/deep/a.png",
        str(tmp_path / "a.png"),
    ):
        assert str(at(text, (".png",))) == text
    assert (
        str(at("folder", folder=True)) == "folder"
        and str(at("new/deep", folder=True)) == "new/deep"
    )
    for text, says in {
        "folder": "is a folder, expected a file such as folder/out.png",
        "folder/": "is a folder",
        ".": "is a folder",
        "new/": "is a folder",
        "a.jpg": "expected a name that ends in .png",
        "a": "expected a name that ends in .png",
        "file.png/a.png": "file.png is no folder",
        "link/a.png": "link is no folder",
        "gs://b/a.png": "gs:// is not supported",
        "a\n.png": "expected the name of a file",
        "a" * 300 + ".png": "expected the name of a file",
    }.items():
        with pytest.raises(Refused, match=says) as caught:
            at(text, (".png",))
        assert "\n" not in str(caught.value)
    with pytest.raises(
        Refused, match="is a folder, expected a file such as folder/out"
    ):
        at("folder")
    with pytest.raises(Refused, match=r"file.png: is a file, expected a folder"):
        at("file.png", folder=True)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(Refused, match="cannot be written to"):
        at("folder/a.png", (".png",))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "file.png",
        "folder",
        "link",
    ]


GENERATE = [
    ("--n=0", "--n=0"),
    ("--steps=abc", "--steps=abc"),
    ("--times=,", "--times=,: expected numbers like 1.0,0.5"),
    ("--times=nan", "--times=nan: expected falling times"),
    ("--guidance=nan", "--guidance=nan: expected a number of at least 0"),
    ("--guidance=1 2", "--guidance=1 2: expected a number"),
    ("--size=0x64", "--size=0x64: expected HEIGHTxWIDTH"),
    (
        "--fps=100000",
        "--fps=100000: expected an integer of at least 1, at most 1000",
    ),
    ("--seed=-1", "--seed=-1"),
    ("--prompt=", "--prompt is needed"),
    ("--out=", "--out=FILE: expected a name"),
    ("--out=a.jpg", "--out=a.jpg: expected a name that ends in .png or .mp4"),
    ("--out=a.mp4", "--out=a.mp4: pictures are written as .png"),
    ("--out=a/", "--out=a/: is a folder"),
    ("--ddim=maybe", "--ddim=maybe: expected true or false"),
    ("--n=1", "model_index.json: no such file"),  # nothing else is wrong
]


@pytest.mark.parametrize(
    ("word", "says"), GENERATE, ids=[word for word, _ in GENERATE]
)
def test_generate(word, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refused, match=says):
        generate.generate(["--pipeline=nowhere", "--prompt=a fox", word])
    assert list(tmp_path.iterdir()) == []


def test_plan_and_bench(tmp_path):
    (tmp_path / "file").write_text("x")
    for words, says in (
        (["--most=0"], "--most=0"),
        (["--most=x"], "--most=x"),
        (["--effort=nan"], "--effort=nan"),
        ([f"--json={tmp_path}"], "is a folder"),
        ([f"--json={tmp_path}/file/a"], "file is no folder"),
        (["--topology=h100:0x1"], "--topology=h100:0x1: expected GPUs"),
        (["--topology=v5p:0x0"], "--topology=v5p:0x0: expected"),
        (["--topology=h100:999999x9"], "expected GPUs"),
    ):
        with pytest.raises(Refused, match=says):
            plan.plan(
                ["--config=configs/toy/dmd2.py", "--topology=h100:8x1", *words]
            )
    for word, says in (
        ("--steps=0", "--steps=0"),
        ("--rounds=x", "--rounds=x"),
        ("--case=kdd", "did you mean 'kd'"),
        (f"--trace={tmp_path}/file", "is a file, expected a folder"),
    ):
        with pytest.raises(Refused, match=says):
            bench.bench([word])
