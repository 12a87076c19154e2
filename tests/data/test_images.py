import io
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jaxdistill.core.types import Refused
from jaxdistill.data.images import ImageFolder, ParquetImages, decode


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def pictures(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 8, 8, 3), np.uint8)


def unit(pixels: np.ndarray) -> np.ndarray:
    return pixels.astype(np.float32) / 127.5 - 1


def shard(file, images, labels, image="img", label="label"):
    rows = pa.array([{"bytes": b, "path": None} for b in images], pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    pq.write_table(pa.table({image: rows, label: labels}), file)


@pytest.fixture
def parquet(tmp_path):
    """(folder, pixels): 12 training images of 3 classes in two shards, 4 test images."""
    pixels = pictures(16)
    coded = [png(p) for p in pixels]
    shard(tmp_path / "train-00000-of-00002.parquet", coded[:5], [0, 1, 2, 0, 1])
    shard(tmp_path / "train-00001-of-00002.parquet", coded[5:12], [2, 0, 1, 2, 0, 1, 2])
    shard(tmp_path / "test-00000-of-00001.parquet", coded[12:], [0, 1, 2, 0])
    return tmp_path, pixels


@pytest.fixture
def folder(tmp_path):
    """A folder with 2 classes of 20 images each."""
    for c, name in enumerate(("cat", "dog")):
        (tmp_path / name).mkdir()
        for i, p in enumerate(pictures(20, seed=c)):
            (tmp_path / name / f"{i:03}.png").write_bytes(png(p))
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / ".hidden").mkdir()
    return tmp_path


def test_decoding_is_exact_where_no_resizing_is_needed():
    wide = np.random.default_rng(0).integers(0, 256, (8, 13, 3), np.uint8)
    np.testing.assert_array_equal(decode(png(wide), 8, ""), unit(wide[:, 2:10]))
    np.testing.assert_array_equal(decode(png(wide.swapaxes(0, 1)), 8, ""), unit(wide[:, 2:10].swapaxes(0, 1)))


def test_grey_and_transparent_images_become_rgb():
    grey = pictures(1)[0, ..., 0]
    np.testing.assert_array_equal(decode(png(grey), 8, ""), unit(grey)[..., None].repeat(3, -1))
    clear = np.concatenate([pictures(1)[0], np.full((8, 8, 1), 255, np.uint8)], -1)
    np.testing.assert_array_equal(decode(png(clear), 8, ""), unit(clear[..., :3]))


def test_resizing_averages():
    """A fine checkerboard shrinks to its mean; without antialiasing it would be black or white."""
    board = np.uint8(np.indices((64, 64)).sum(0) % 2 * 255)
    inner = decode(png(board), 8, "")[2:-2, 2:-2]
    assert np.abs(inner).max() <= 2 / 255  # a step of 8 bits either way
    flat = np.full((50, 50, 3), 77, np.uint8)
    np.testing.assert_array_equal(decode(png(flat), 16, ""), unit(flat[:16, :16]))


def test_parquet_values(parquet):
    path, pixels = parquet
    data = ParquetImages(path=str(path), size=8, batch_size=12, shuffle=False)
    batch = next(data.loader())
    np.testing.assert_array_equal(batch["x"], unit(pixels[:12]))
    assert batch["cond"].tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2] and batch["cond"].dtype == np.int32
    assert batch["null_cond"].tolist() == [3] * 12 and batch["null_cond"].dtype == np.int32
    test = data.evaluation(100)
    np.testing.assert_array_equal(test["x"], unit(pixels[12:]))


@pytest.mark.parametrize("flip", [False, True])
def test_parquet_stream(parquet, flip, check_stream):
    check_stream(ParquetImages(path=str(parquet[0]), size=8, batch_size=4, flip=flip))


def test_epochs(parquet, check_epochs):
    check_epochs(ParquetImages(path=str(parquet[0]), size=8, batch_size=8), 12)


def test_flips_are_drawn_per_pass(parquet):
    path, pixels = parquet
    data = ParquetImages(path=str(path), size=8, batch_size=12, shuffle=False, flip=True)
    loader, x = data.loader(), unit(pixels[:12])
    flipped = []
    for _ in range(20):
        got = next(loader)["x"]
        same, mirrored = (got == x).all((1, 2, 3)), (got == x[:, :, ::-1]).all((1, 2, 3))
        assert (same ^ mirrored).all()
        flipped.append(mirrored)
    flipped = np.array(flipped)
    assert abs(flipped.mean() - 0.5) < 5 * 0.5 / np.sqrt(240)
    assert (flipped.any(0) & ~flipped.all(0)).all()  # each image both ways: fails by chance once in 40,000
    np.testing.assert_array_equal(data.evaluation(4)["x"], unit(pixels[12:]))


def test_parquet_without_test_files_holds_a_share_out(parquet, check_epochs):
    path, pixels = parquet
    (path / "test-00000-of-00001.parquet").unlink()
    data = ParquetImages(path=str(path), size=8, batch_size=3, heldout=0.25)
    check = lambda x: {p.tobytes() for p in x}
    test = check(data.evaluation(100)["x"])
    loader = data.loader()
    train = set().union(*(check(next(loader)["x"]) for _ in range(3)))
    assert len(test) == 3 and len(train) == 9 and test | train == check(unit(pixels[:12]))


def test_folder_labels_and_split(folder, check_epochs):
    data = ImageFolder(path=str(folder), size=8, batch_size=4, heldout=0.25)
    assert data.names == ("cat", "dog")
    train, test = data.source("train"), data.source("test")
    assert len(train) + len(test) == 40 and len(test) > 0
    x = [unit(pictures(20, seed=c)) for c in (0, 1)]
    for name, coded, label in [*train, *test]:
        i = int(name[-7:-4])
        np.testing.assert_array_equal(data.example((name, coded, label))["x"], x[label][i])
    check_epochs(data, len(train))


def test_held_out_images_stay_when_others_come_or_the_folder_moves(folder, tmp_path_factory):
    before = {name for name, *_ in ImageFolder(path=str(folder), heldout=0.25).source("test")}
    moved = shutil.copytree(folder, tmp_path_factory.mktemp("moved") / "set")
    there = {name for name, *_ in ImageFolder(path=str(moved), heldout=0.25).source("test")}
    assert {name[-11:] for name in there} == {name[-11:] for name in before}
    for i in range(20):
        shutil.copy(folder / "cat" / f"{i:03}.png", folder / "cat" / f"new{i:03}.png")
    after = {name for name, *_ in ImageFolder(path=str(folder), heldout=0.25, seed=1).source("test")}
    assert before == {name for name in after if "new" not in name} and len(after) > len(before)


def test_folder_with_a_test_folder(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("split")
    shutil.copytree(folder, root / "train")
    shutil.copytree(folder / "dog", root / "test" / "dog")
    data = ImageFolder(path=str(root), size=8)
    assert len(data.source("train")) == 40
    assert data.evaluation(100)["cond"].tolist() == [1] * 20


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: [f.unlink() for f in p.glob("train*")], "no train-\\*.parquet"),
        (lambda p: [shard(f, [], pa.array([], pa.int64())) for f in p.glob("*")], "ParquetImages has no train samples"),
        (lambda p: shard(p / "train-0.parquet", [b"junk"], [0]), "train-0.parquet row 0: damaged image"),
        (lambda p: shard(p / "train-0.parquet", [png(pictures(1)[0])[:90]], [0]), "train-0.parquet row 0: damaged image"),
        (lambda p: shard(p / "train-0.parquet", [None], [0]), "train-0.parquet row 0: no image"),
        (lambda p: shard(p / "train-0.parquet", [b""], [-1]), "train-0.parquet row 0: label -1, the training set has 0 to 2"),
        (lambda p: shard(p / "train-0.parquet", [b""], [None]), "column 'label' is null with 1 empty rows, expected integers"),
        (lambda p: shard(p / "train-0.parquet", [b""], ["a"]), "column 'label' is string"),
        (lambda p: shard(p / "train-0.parquet", [b""], [0], image="picture"), "no column image or img, found picture, label"),
        (lambda p: shard(p / "train-0.parquet", [b""], [0], label="labels"), "column='label': did you mean 'labels'?"),
        (lambda p: pq.write_table(pa.table({"img": [b""], "label": [0]}), p / "train-0.parquet"), "'img' is binary, expected a struct"),
        (lambda p: (p / "train-0.parquet").write_bytes(b"junk" * 9), "train-0.parquet: damaged parquet file"),
        (lambda p: (p / "train-0.parquet").write_bytes((p / "train-00000-of-00002.parquet").read_bytes()[:500]), "damaged parquet file"),
    ],
)
def test_parquet_refused(parquet, damage, message):
    path, _ = parquet
    damage(path)
    with pytest.raises(Refused, match=message) as refused:
        next(ParquetImages(path=str(path), size=8, batch_size=16, shuffle=False).loader())
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "cat" / "000.png").write_bytes(b"junk"), "cat/000.png: damaged image"),
        (lambda p: [shutil.rmtree(p / n) for n in ("cat", "dog")], "expected one folder per class"),
        (lambda p: [f.unlink() for f in p.glob("*/*.png")], "no images in its class folders"),
        (lambda p: (p / "dog").rename(p / "test"), "a test folder, but no train folder"),
        (lambda p: Image.new("I;16", (8, 8)).save(p / "cat" / "000.png"), "cat/000.png: pixels of mode I;16, expected 8 bits a channel"),
    ],
)
def test_folder_refused(folder, damage, message):
    damage(folder)
    with pytest.raises(Refused, match=message):
        data = ImageFolder(path=str(folder), size=8, batch_size=20, shuffle=False, heldout=0)
        next(data.loader())


def test_class_that_training_lacks(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("split")
    shutil.copytree(folder, root / "train")
    shutil.copytree(folder / "dog", root / "test" / "dogs")
    with pytest.raises(Refused, match=r"class='dogs': did you mean 'dog'\?"):
        ImageFolder(path=str(root)).evaluation(1)


def test_share_that_leaves_nothing(folder):
    with pytest.raises(Refused, match=r"data.heldout=1.0"):
        ImageFolder(path=str(folder), heldout=1.0).source("train")


@pytest.mark.shared_data
def test_cifar10(shared_data):
    data = ParquetImages(path=str(shared_data / "cifar10"), batch_size=64, flip=True)
    batch = next(data.loader())
    assert {k: (v.shape, str(v.dtype)) for k, v in batch.items()} == {
        "x": ((64, 32, 32, 3), "float32"), "cond": ((64,), "int32"), "null_cond": ((64,), "int32")}  # fmt: skip
    assert -1 <= batch["x"].min() < -0.9 and 0.9 < batch["x"].max() <= 1 and (batch["null_cond"] == 10).all()
    assert len(data.source("train")) == 50_000 and len(data.source("test")) == 10_000
