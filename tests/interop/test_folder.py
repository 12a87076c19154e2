"""What an export may take the place of: an export, whole, and nothing else. Nothing foreign is ever
gone.
"""

import contextlib
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from jaxdistill.core.types import Refused
from jaxdistill.interop import folder
from jaxdistill.interop.folder import MARKER, replaceable, whole_folder


def export_to(target, text="{}"):
    with whole_folder(target) as fresh:
        (fresh / "config.json").write_text(text)
        (fresh / "scheduler").mkdir()
        (fresh / "scheduler" / "scheduler_config.json").write_text(text)


def everything(place: Path) -> dict:
    """Name -> kind and content of all below a folder."""
    found = {}
    for path in sorted(place.rglob("*")):
        mode = path.lstat().st_mode
        content = (
            os.readlink(path)
            if path.is_symlink()
            else path.read_bytes()
            if stat.S_ISREG(mode)
            else b""
        )
        found[str(path.relative_to(place))] = (stat.S_IFMT(mode), content)
    return found


def make_run(place):
    for name in ("stages/0", "checkpoints/2"):
        (place / name).mkdir(parents=True)
        (place / name / "weights").write_text("1")
    for name in ("config.json", "metrics.jsonl", "report.json"):
        (place / name).write_text("{}")


def a_run(place):
    make_run(place)


def a_young_run(place):
    place.mkdir()
    (place / "config.json").write_text("{}")
    (place / "metrics.jsonl").write_text("")


def an_export_that_became_a_run(place):
    export_to(place)
    (place / "checkpoints").mkdir()


def runs(place):
    make_run(place / "a")


def a_downloaded_model(place):
    place.mkdir()
    (place / "config.json").write_text("{}")
    (place / "diffusion_pytorch_model.safetensors").write_bytes(b"weights")


def a_pipeline(place):
    place.mkdir()
    (place / "model_index.json").write_text("{}")
    a_downloaded_model(place / "vae")


def a_repository(place):
    export_to(place)
    (place / ".git").mkdir()
    (place / ".git" / "HEAD").write_text("ref")


def an_export_with_notes(place):
    export_to(place)
    (place / "scheduler" / "notes.txt").write_text("mine")


def an_export_with_an_empty_folder(place):
    export_to(place)
    (place / "samples").mkdir()


def an_export_with_a_link_for_a_file(place):
    (place.parent / "config.json").write_text("{}")
    export_to(place)
    (place / "config.json").unlink()
    (place / "config.json").symlink_to(place.parent / "config.json")


def an_export_with_a_link_for_a_folder(place):
    export_to(place)
    shutil.move(place / "scheduler", place.parent / "scheduler")
    (place / "scheduler").symlink_to(place.parent / "scheduler")


def an_export_with_a_folder_for_a_file(place):
    export_to(place)
    (place / "config.json").unlink()
    (place / "config.json").mkdir()
    (place / "config.json" / "mine").write_text("1")


def an_edited_export(place):
    export_to(place)
    (place / "config.json").write_text("edited")


def an_export_edited_to_the_same_size(place):
    export_to(place)
    (place / "scheduler" / "scheduler_config.json").write_text("[]")


def an_export_of_an_earlier_version(place):
    """Its list has sizes alone."""
    export_to(place)
    found = json.loads((place / MARKER).read_text())
    found["files"] = {
        name: entry["bytes"] for name, entry in found["files"].items()
    }
    (place / MARKER).write_text(json.dumps(found))


def an_export_with_a_damaged_list(place):
    export_to(place)
    (place / MARKER).write_text('{"files": ["config.json"')


def an_export_with_another_list(place):
    export_to(place)
    (place / MARKER).write_text("[1]")


def an_export_without_a_list(place):
    export_to(place)
    (place / MARKER).unlink()


def photographs(place):
    place.mkdir()
    (place / "cat.jpg").write_bytes(b"\xff\xd8")


def a_file(place):
    place.write_text("mine")


def a_link_to_an_export(place):
    export_to(place.parent / "elsewhere")
    place.symlink_to(place.parent / "elsewhere")


def a_link_to_nothing(place):
    place.symlink_to(place.parent / "nowhere")


FOREIGN = {
    a_run: "is a run (it has stages)",
    a_young_run: "is a run (it has metrics.jsonl)",
    an_export_that_became_a_run: "is a run (it has checkpoints)",
    runs: "not empty and not a model folder",
    a_downloaded_model: f"holds a model without {MARKER}",
    a_pipeline: "not empty and not a model folder",
    a_repository: ".git was not written by an export",
    an_export_with_notes: "scheduler/notes.txt was not written by an export",
    an_export_with_an_empty_folder: "samples was not written by an export",
    an_export_with_a_link_for_a_file: "config.json is not as it was exported",
    an_export_with_a_link_for_a_folder: "scheduler was not written by an export",
    an_export_with_a_folder_for_a_file: "config.json is not as it was exported",
    an_edited_export: "config.json is not as it was exported",
    an_export_edited_to_the_same_size: "scheduler/scheduler_config.json is not as it was exported",
    an_export_of_an_earlier_version: "has no digests, so that an edit would be lost "
    "(earlier versions left none); move it away",
    an_export_with_a_damaged_list: f"{MARKER} is damaged",
    an_export_with_another_list: f"{MARKER} is damaged",
    an_export_without_a_list: "earlier versions left none",
    photographs: "not empty and not a model folder",
    a_file: "is a file",
    a_link_to_an_export: "is a link to",
    a_link_to_nothing: "is a link to",
}


@pytest.mark.parametrize("make", FOREIGN, ids=lambda make: make.__name__)
def test_what_no_export_wrote_stays(make, tmp_path):
    make(tmp_path / "out")
    before = everything(tmp_path)
    begun = []
    for work in (
        lambda: replaceable(tmp_path / "out"),
        lambda: export_to(tmp_path / "out", "new"),
    ):
        with pytest.raises(Refused) as error:
            work()
        assert (
            FOREIGN[make] in str(error.value)
            and str(error.value).startswith(str(tmp_path / "out"))
            and "\n" not in str(error.value)
        )
    assert everything(tmp_path) == before and not begun


@pytest.mark.parametrize("name", [".", "..", "a/..", "inner/../..", "/"])
def test_the_working_folder_and_those_above_stay(name, tmp_path, monkeypatch):
    (tmp_path / "here" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    for target in (Path(name), tmp_path / "here", tmp_path):
        with pytest.raises(
            Refused,
            match=r"expected the name of a folder|is the working folder or holds it",
        ):
            replaceable(target)


def test_names_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    make_run(tmp_path / "run")
    for target, said in (
        (tmp_path / ("x" * 300), "File name too long"),
        (tmp_path / "new" / ("x" * 300) / "out", "File name too long"),
        (tmp_path / Path(*["y" * 200] * 25), "File name too long"),
        (tmp_path / "file" / "out", "file is a file"),
        (tmp_path / "file" / "inner" / "out", "file is a file"),
        (tmp_path / "run" / "stages" / "7", "is inside stages/ of the run"),
        (
            tmp_path / "run" / "checkpoints" / "new" / "export",
            "is inside checkpoints/ of the run",
        ),
        (Path("gs://bucket/export"), "local folder"),
    ):
        with pytest.raises(Refused) as error:
            replaceable(target)
        assert said in str(error.value) and "\n" not in str(error.value)
    # root may write everywhere
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(Refused, match=f"the folder {tmp_path} is read-only"):
        replaceable(tmp_path / "new" / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "run"]


def test_a_long_name_that_the_disk_takes(tmp_path):
    target = tmp_path / ("x" * 250)
    for text in ("1", "2"):
        export_to(target, text)
    assert (target / "config.json").read_text() == "2" and len(
        list(tmp_path.iterdir())
    ) == 1


def test_links_above_are_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    export_to(tmp_path / "link" / "out")
    assert (tmp_path / "real" / "out" / MARKER).is_file() and (
        tmp_path / "link"
    ).is_symlink()


def test_an_export_is_replaced_as_a_whole(tmp_path):
    """Also into an empty folder, and where files of the old one are gone."""
    target = tmp_path / "out"
    target.mkdir()
    export_to(target, "1")
    (target / "scheduler" / "scheduler_config.json").unlink()
    with whole_folder(target) as fresh:
        (fresh / "model.safetensors").write_bytes(b"12")
    assert set(everything(tmp_path)) == {
        "out",
        f"out/{MARKER}",
        "out/model.safetensors",
    }
    digest = hashlib.blake2b(b"12").hexdigest()
    assert json.loads((target / MARKER).read_text())["files"][
        "model.safetensors"
    ] == {
        "bytes": 2,
        "blake2b": digest,
    }


def test_a_large_file_is_known_by_the_time_of_its_last_change(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(folder, "LARGE", 3)
    for text in ("1234", "5678"):
        export_to(tmp_path / "out", text)
    file = tmp_path / "out" / "config.json"
    then = file.stat().st_mtime_ns
    file.write_text("edit")
    os.utime(file, ns=(then, then + 1000))
    with pytest.raises(Refused, match=r"config\.json is not as it was exported"):
        export_to(tmp_path / "out")
    assert file.read_text() == "edit"


def test_a_finished_export_of_an_earlier_version_that_was_left_beside_stays(
    tmp_path,
):
    left = tmp_path / ".out.new-0123abcd"
    an_export_of_an_earlier_version(left)
    export_to(tmp_path / "out")
    assert (left / "config.json").is_file() and (
        tmp_path / "out" / MARKER
    ).is_file()


def test_folders_inside_are_part_of_the_whole(tmp_path):
    for _ in range(2):
        with whole_folder(tmp_path / "out") as fresh:
            for expert in ("first", "second"):
                export_to(fresh / expert)
    assert (tmp_path / "out" / "second" / MARKER).is_file() and [
        p.name for p in tmp_path.iterdir()
    ] == ["out"]
    with pytest.raises(Refused) as error, whole_folder(tmp_path / "out") as fresh:
        raise Refused(f"{fresh}/first: no")
    assert str(error.value) == f"{tmp_path / 'out'}/first: no"


def test_what_is_put_there_meanwhile_stays(tmp_path):
    target = tmp_path / "out"
    export_to(target, "old")
    with (
        pytest.raises(Refused, match=r"notes was not written"),
        whole_folder(target) as fresh,
    ):
        (fresh / "config.json").write_text("new")
        (target / "notes").write_text("mine")
    assert (target / "notes").read_text() == "mine" and (
        target / "config.json"
    ).read_text() == "old"
    with (
        pytest.raises(Refused, match="is a file"),
        whole_folder(tmp_path / "other") as fresh,
    ):
        (tmp_path / "other").write_text("mine")
    assert (tmp_path / "other").read_text() == "mine"


@pytest.mark.parametrize("renames", [0, 1])
def test_an_error_between_the_renames_loses_nothing(renames, tmp_path, monkeypatch):
    target = tmp_path / "out"
    rename = Path.rename
    done = []
    export_to(target, "old")

    def fails(self, new):
        done.append(new)
        if len(done) == renames + 1:
            raise OSError(5, "Input/output error")
        return rename(self, new)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(Refused, match="Input/output error"):
        export_to(target, "new")
    assert (target / "config.json").read_text() == "old" and [
        p.name for p in tmp_path.iterdir()
    ] == ["out"]


KILLED = """
import os, signal, sys
from pathlib import Path
from jaxdistill.interop import folder
rename, count = Path.rename, [0]
def rename_and_die(self, new):
    if count[0] == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    count[0] += 1
    return rename(self, new)
Path.rename = rename_and_die
with folder.whole_folder(Path(sys.argv[1])) as fresh:
    (fresh / "config.json").write_text("new")
    if sys.argv[2] == "-1":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("renames", [-1, 0, 1])
def test_a_killed_export_loses_nothing_and_the_next_one_tidies_up(
    renames, tmp_path
):
    """Killed while it writes, before the old export is moved aside, and before the new one takes
    its place.
    """
    target = tmp_path / "out"
    export_to(target, "old")
    for name in (
        ".out.new-1234",
        ".out.new-0123abcd",
        ".out.old-0123abcd",
        ".out.old-mine",
    ):  # ours have a list
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("1")
    before = everything(tmp_path)
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, target, str(renames)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert killed.returncode == -9, killed.stderr
    left = everything(tmp_path)
    assert sum(content == b"old" for _, content in left.values()) == 2 and len(
        left
    ) > len(before)
    with contextlib.suppress(ZeroDivisionError), whole_folder(target):
        assert (target / "config.json").read_text() == "old"
        raise ZeroDivisionError
    assert everything(tmp_path) == before
    export_to(target, "newer")
    assert (target / "config.json").read_text() == "newer" and set(
        everything(tmp_path)
    ) == set(before)


def test_who_is_at_work_is_left_alone(tmp_path):
    target = tmp_path / "out"
    with whole_folder(target) as first:
        (first / "config.json").write_text("1")
        export_to(target, "2")
        assert (first / "config.json").read_text() == "1"
    assert (target / "config.json").read_text() == "1" and not (
        target / folder.LOCK
    ).exists()


def test_a_full_disk_is_one_line(tmp_path):
    with (
        pytest.raises(
            Refused, match=r"out: cannot be written: \[Errno 28\] No space left"
        ),
        whole_folder(tmp_path / "out"),
    ):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []
