import io
import os
import shutil
import struct
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps

from jaxdistill.core.types import Refused
from jaxdistill.data.images import Files, ImageFolder, ParquetImages, decode


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def pictures(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 8, 8, 3), np.uint8)


def unit(pixels: np.ndarray) -> np.ndarray:
    return pixels.astype(np.float32) / 127.5 - 1


def shard(file, images, labels, image="img", label="label"):
    rows = pa.array(
        [{"bytes": b, "path": None} for b in images],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    pq.write_table(pa.table({image: rows, label: labels}), file)


@pytest.fixture
def parquet(tmp_path):
    """(folder, pixels): 12 training images of 3 classes in two shards, 4 test images."""
    pixels = pictures(16)
    coded = [png(p) for p in pixels]
    shard(tmp_path / "train-00000-of-00002.parquet", coded[:5], [0, 1, 2, 0, 1])
    shard(
        tmp_path / "train-00001-of-00002.parquet",
        coded[5:12],
        [2, 0, 1, 2, 0, 1, 2],
    )
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
    np.testing.assert_array_equal(
        decode(png(wide.swapaxes(0, 1)), 8, ""), unit(wide[:, 2:10].swapaxes(0, 1))
    )


def test_grey_and_transparent_images_become_rgb():
    grey = pictures(1)[0, ..., 0]
    np.testing.assert_array_equal(
        decode(png(grey), 8, ""), unit(grey)[..., None].repeat(3, -1)
    )
    clear = np.concatenate([pictures(1)[0], np.full((8, 8, 1), 255, np.uint8)], -1)
    np.testing.assert_array_equal(decode(png(clear), 8, ""), unit(clear[..., :3]))


def saved(image: Image.Image, kind: str, **how) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **how)
    return out.getvalue()


BACK = {  # orientation -> how a camera has turned the upright picture
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x),
    7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
    8: lambda x: np.rot90(x, -1),
}


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", BACK)
def test_pictures_stand_upright(orientation, kind):
    """The middle of a wide picture, as `ImageOps.exif_transpose` has it, to the bit."""
    wide = np.random.default_rng(0).integers(0, 256, (8, 13, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    how = {"lossless": True} if kind == "WEBP" else {}
    data = saved(
        Image.fromarray(np.ascontiguousarray(BACK[orientation](wide))),
        kind,
        exif=exif,
        **how,
    )
    np.testing.assert_array_equal(
        np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))), wide
    )
    np.testing.assert_array_equal(decode(data, 8, ""), unit(wide[:, 2:10]))


def test_exif_that_cannot_be_read_says_nothing():
    pixels = pictures(1)[0]
    for exif in (b"Exif\0\0junk", b"Exif\0\0MM\0*\0\0\0\xff", b"Exif\0\0"):
        np.testing.assert_array_equal(
            decode(saved(Image.fromarray(pixels), "PNG", exif=exif), 8, ""),
            unit(pixels),
        )


def hidden_under(colour: int, kind: str) -> Image.Image:
    """Grey 120 in the middle of a picture that is fully transparent elsewhere, over `colour`."""
    seen = np.pad(np.ones((4, 4), bool), 2)
    grey = np.where(seen, 120, colour).astype(np.uint8)
    if kind == "RGBA":
        return Image.fromarray(
            np.dstack([grey, grey, grey, np.uint8(seen) * 255]), "RGBA"
        )
    if kind == "LA":
        return Image.fromarray(np.dstack([grey, np.uint8(seen) * 255]), "LA")
    image = Image.fromarray(grey)
    if kind == "P":
        image = Image.fromarray(np.uint8(seen))
        image.putpalette([colour] * 3 + [120] * 3)
    if kind == "RGB":
        image = image.convert("RGB")
    image.info["transparency"] = {
        "L": colour,
        "P": 0,
        "PA": bytes([0, 255]),
        "RGB": (colour,) * 3,
    }[kind]
    return image


@pytest.mark.parametrize("kind", ["RGBA", "LA", "L", "P", "RGB"])
@pytest.mark.parametrize("colour", [0, 255, 77])
def test_what_transparency_hides_is_white(kind, colour):
    want = np.pad(np.full((4, 4), 120, np.uint8), 2, constant_values=255)[
        ..., None
    ].repeat(3, -1)
    np.testing.assert_array_equal(
        decode(saved(hidden_under(colour, kind), "PNG"), 8, ""), unit(want)
    )


def test_half_transparent_is_half_white():
    half = np.dstack(
        [np.zeros((8, 8, 3), np.uint8), np.full((8, 8), 128, np.uint8)]
    )
    np.testing.assert_array_equal(
        decode(png(half), 8, ""), np.full((8, 8, 3), np.float32(127) / 127.5 - 1)
    )


def sixteen(kind: str) -> bytes:
    """A picture with 16 bits a channel."""
    if kind == "ppm":
        return b"P6 2 2 65535\n" + bytes(24)
    if kind == "pgm":
        return b"P5 2 2 1023\n" + bytes(8)
    colours, words = {
        "grey": (0, 1),
        "rgb": (2, 3),
        "grey alpha": (4, 2),
        "rgba": (6, 4),
    }[kind]
    chunk = lambda name, data: (
        struct.pack(">I", len(data))
        + name
        + data
        + struct.pack(">I", zlib.crc32(name + data))
    )
    header = struct.pack(">IIBBBBB", 8, 8, 16, colours, 0, 0, 0)
    rows = zlib.compress((b"\0" + bytes(16 * words)) * 8)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", rows)
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    "kind", ["grey", "rgb", "grey alpha", "rgba", "ppm", "pgm"]
)
def test_sixteen_bits_are_refused(kind):
    with pytest.raises(
        Refused,
        match=r"a: pixels of mode .*, expected 8 bits a channel, found 1[06]",
    ):
        decode(sixteen(kind), 8, "a")


ADAM7 = (
    (0, 0, 8, 8),
    (0, 4, 8, 8),
    (4, 0, 8, 4),
    (0, 2, 4, 4),
    (2, 0, 4, 2),
    (0, 1, 2, 2),
    (1, 0, 2, 1),
)


def written(pixels: np.ndarray, interlaced: bool, lost: int = 0) -> bytes:
    """A PNG as the specification has it, its last `lost` bytes of pixels left out before they are
    deflated.
    """
    chunk = lambda name, data: (
        struct.pack(">I", len(data))
        + name
        + data
        + struct.pack(">I", zlib.crc32(name + data))
    )
    header = struct.pack(
        ">IIBBBBB", pixels.shape[1], pixels.shape[0], 8, 2, 0, 0, interlaced
    )
    passes = [
        pixels[top::down, left::across]
        for top, left, down, across in (ADAM7 if interlaced else ((0, 0, 1, 1),))
    ]
    rows = b"".join(
        b"\0" + row.tobytes() for part in passes for row in part if row.size
    )
    coded = zlib.compress(rows[: len(rows) - lost])
    parts = [chunk(b"IDAT", coded[i : i + 50]) for i in range(0, len(coded), 50)]
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + b"".join(parts)
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("shape", [(8, 8), (3, 3), (1, 1), (13, 13)])
def test_png_with_fewer_rows_than_its_header(shape, interlaced):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    np.testing.assert_array_equal(
        decode(written(pixels, interlaced), shape[0], ""), unit(pixels)
    )
    for lost in (1, 1 + 3 * shape[1]):
        with pytest.raises(Refused, match=r"a: (truncated|damaged) image"):
            decode(written(pixels, interlaced, lost), 8, "a")


def test_png_of_few_bits_is_whole():
    for mode in ("1", "P", "L", "LA", "RGBA"):
        assert decode(saved(Image.new(mode, (13, 7)), "PNG"), 7, "").shape == (
            7,
            7,
            3,
        )
    few = Image.new("P", (13, 7))
    few.putpalette([0, 0, 0, 255, 255, 255])
    for depth in (1, 2, 4):
        np.testing.assert_array_equal(
            decode(saved(few, "PNG", bits=depth), 7, ""),
            np.full((7, 7, 3), -1, np.float32),
        )


def test_of_an_animation_the_first_picture():
    first, second = (
        Image.fromarray(np.full((8, 8), level, np.uint8)) for level in (40, 200)
    )
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        how = {"lossless": True} if kind == "WEBP" else {}
        data = saved(first, kind, save_all=True, append_images=[second], **how)
        np.testing.assert_array_equal(
            decode(data, 8, ""), np.full((8, 8, 3), np.float32(40) / 127.5 - 1)
        )


def test_other_modes():
    ink = Image.fromarray(np.zeros((8, 8, 4), np.uint8), "CMYK")
    np.testing.assert_array_equal(
        decode(saved(ink, "TIFF"), 8, ""), np.ones((8, 8, 3), np.float32)
    )
    bits = Image.fromarray(np.indices((8, 8)).sum(0) % 2 == 1)
    np.testing.assert_array_equal(
        decode(saved(bits, "PNG"), 8, "")[..., 0],
        np.float32(np.indices((8, 8)).sum(0) % 2 * 2 - 1),
    )


def test_pictures_without_end_are_refused(tmp_path, monkeypatch):
    huge = b"P5 30000 30000 255\n"
    with pytest.raises(Refused, match=r"a: .*pixels|damaged"):
        decode(huge, 8, "a")
    with pytest.raises(
        Refused,
        match=r"a: 12000 x 12000 pixels, expected at most 134,217,728 in all",
    ):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1 << 30)
        decode(b"P5 12000 12000 255\n", 8, "a")
    monkeypatch.setattr("jaxdistill.data.images.BYTES", 100)
    with pytest.raises(Refused, match="a: 101 bytes, expected at most 100"):
        decode(bytes(101), 8, "a")
    for name, make in {
        "pipe.png": os.mkfifo,
        "zero.png": lambda p: p.symlink_to("/dev/zero"),
        "big.png": lambda p: p.write_bytes(bytes(101)),
    }.items():
        make(tmp_path / name)
        with pytest.raises(
            Refused,
            match=f"{name}: (not a regular file|101 bytes, expected at most 100)",
        ):
            Files([(tmp_path / name, 0)])[0]


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
    assert (
        batch["cond"].tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2]
        and batch["cond"].dtype == np.int32
    )
    assert (
        batch["null_cond"].tolist() == [3] * 12
        and batch["null_cond"].dtype == np.int32
    )
    test = data.evaluation(100)
    np.testing.assert_array_equal(test["x"], unit(pixels[12:]))


@pytest.mark.parametrize("flip", [False, True])
def test_parquet_stream(parquet, flip, check_stream):
    check_stream(
        ParquetImages(path=str(parquet[0]), size=8, batch_size=4, flip=flip)
    )


def test_epochs(parquet, check_epochs):
    check_epochs(ParquetImages(path=str(parquet[0]), size=8, batch_size=8), 12)


def test_flips_are_drawn_per_pass(parquet):
    path, pixels = parquet
    data = ParquetImages(
        path=str(path), size=8, batch_size=12, shuffle=False, flip=True
    )
    loader = data.loader()
    x = unit(pixels[:12])
    flipped = []
    for _ in range(20):
        got = next(loader)["x"]
        same = (got == x).all((1, 2, 3))
        mirrored = (got == x[:, :, ::-1]).all((1, 2, 3))
        assert (same ^ mirrored).all()
        flipped.append(mirrored)
    flipped = np.array(flipped)
    assert abs(flipped.mean() - 0.5) < 5 * 0.5 / np.sqrt(240)
    assert (
        flipped.any(0) & ~flipped.all(0)
    ).all()  # each image both ways: fails by chance once in 40,000
    np.testing.assert_array_equal(data.evaluation(4)["x"], unit(pixels[12:]))


def test_parquet_without_test_files_holds_a_share_out(parquet, check_epochs):
    path, pixels = parquet
    (path / "test-00000-of-00001.parquet").unlink()
    data = ParquetImages(path=str(path), size=8, batch_size=3, heldout=0.25)
    check = lambda x: {p.tobytes() for p in x}
    test = check(data.evaluation(100)["x"])
    loader = data.loader()
    train = set().union(*(check(next(loader)["x"]) for _ in range(3)))
    assert (
        len(test) == 3
        and len(train) == 9
        and test | train == check(unit(pixels[:12]))
    )


def test_folder_labels_and_split(folder, check_epochs):
    data = ImageFolder(path=str(folder), size=8, batch_size=4, heldout=0.25)
    assert data.names == ("cat", "dog")
    train = data.source("train")
    test = data.source("test")
    assert len(train) + len(test) == 40 and len(test) > 0
    x = [unit(pictures(20, seed=c)) for c in (0, 1)]
    for name, coded, label in [*train, *test]:
        i = int(name[-7:-4])
        np.testing.assert_array_equal(
            data.example((name, coded, label))["x"], x[label][i]
        )
    check_epochs(data, len(train))


def test_held_out_images_stay_when_others_come_or_the_folder_moves(
    folder, tmp_path_factory
):
    before = {
        name
        for name, *_ in ImageFolder(path=str(folder), heldout=0.25).source("test")
    }
    moved = shutil.copytree(folder, tmp_path_factory.mktemp("moved") / "set")
    there = {
        name
        for name, *_ in ImageFolder(path=str(moved), heldout=0.25).source("test")
    }
    assert {name[-11:] for name in there} == {name[-11:] for name in before}
    for i in range(20):
        shutil.copy(
            folder / "cat" / f"{i:03}.png", folder / "cat" / f"new{i:03}.png"
        )
    after = {
        name
        for name, *_ in ImageFolder(path=str(folder), heldout=0.25, seed=1).source(
            "test"
        )
    }
    assert before == {name for name in after if "new" not in name} and len(
        after
    ) > len(before)


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
        (
            lambda p: [shard(f, [], pa.array([], pa.int64())) for f in p.glob("*")],
            "ParquetImages has no train samples",
        ),
        (
            lambda p: shard(p / "train-0.parquet", [b"junk"], [0]),
            "train-0.parquet row 0: damaged image",
        ),
        (
            lambda p: shard(p / "train-0.parquet", [png(pictures(1)[0])[:90]], [0]),
            "train-0.parquet row 0: damaged image",
        ),
        (
            lambda p: shard(p / "train-0.parquet", [None], [0]),
            "train-0.parquet row 0: no image",
        ),
        (
            lambda p: shard(p / "train-0.parquet", [b""], [-1]),
            "train-0.parquet row 0: label -1, the training set has 0 to 2",
        ),
        (
            lambda p: shard(p / "train-0.parquet", [b""], [None]),
            "column 'label' is null with 1 empty rows, expected integers",
        ),
        (
            lambda p: shard(p / "train-0.parquet", [b""], ["a"]),
            "column 'label' is string",
        ),
        (
            lambda p: shard(p / "train-0.parquet", [b""], [0], image="picture"),
            "no column image or img, found picture, label",
        ),
        (
            lambda p: shard(p / "train-0.parquet", [b""], [0], label="labels"),
            "column='label': did you mean 'labels'?",
        ),
        (
            lambda p: shard(p / "train-0.parquet", [b""], [1 << 40]),
            "train-0.parquet row 0: label 1099511627776, expected at most",
        ),
        (
            lambda p: shard(p / "train-0.parquet", [b""], [[0]]),
            "column 'label' is list",
        ),
        (
            lambda p: (p / "train-0.parquet").mkdir(),
            "train-0.parquet: not a regular file",
        ),
        (
            lambda p: pq.write_table(
                pa.table({"img": [{"bytes": "a"}], "label": [0]}),
                p / "train-0.parquet",
            ),
            "expected bytes of the type binary",
        ),
        (
            lambda p: pq.write_table(
                pa.table({"img": [b""], "label": [0]}), p / "train-0.parquet"
            ),
            "'img' is binary, expected a struct",
        ),
        (
            lambda p: (p / "train-0.parquet").write_bytes(b"junk" * 9),
            "train-0.parquet: damaged parquet file",
        ),
        (
            lambda p: (p / "train-0.parquet").write_bytes(
                (p / "train-00000-of-00002.parquet").read_bytes()[:500]
            ),
            "damaged parquet file",
        ),
    ],
)
def test_parquet_refused(parquet, damage, message):
    path, _ = parquet
    damage(path)
    with pytest.raises(Refused, match=message) as refused:
        next(
            ParquetImages(
                path=str(path), size=8, batch_size=16, shuffle=False
            ).loader()
        )
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda p: (p / "cat" / "000.png").write_bytes(b"junk"),
            "cat/000.png: damaged image",
        ),
        (
            lambda p: [shutil.rmtree(p / n) for n in ("cat", "dog")],
            "expected one folder per class",
        ),
        (
            lambda p: [f.unlink() for f in p.glob("*/*.png")],
            "no images in its class folders",
        ),
        (
            lambda p: (p / "dog").rename(p / "test"),
            "a test folder, but no train folder",
        ),
        (
            lambda p: Image.new("I;16", (8, 8)).save(p / "cat" / "000.png"),
            "cat/000.png: pixels of mode I;16, expected 8 bits a channel",
        ),
    ],
)
def test_folder_refused(folder, damage, message):
    damage(folder)
    with pytest.raises(Refused, match=message):
        data = ImageFolder(
            path=str(folder), size=8, batch_size=20, shuffle=False, heldout=0
        )
        next(data.loader())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda p: [f.unlink() for f in (p / "dog").glob("*.png")],
            r"dog: no images of this class, expected .png",
        ),
        (
            lambda p: [
                f.rename(f.with_suffix(".heic")) for f in (p / "dog").glob("*.png")
            ],
            r"dog/\d+.heic: an image of a kind that is not read",
        ),
        (
            lambda p: (p / "dog" / "000.png").rename(p / "dog" / "000.jp2"),
            r"dog/000.jp2: an image of a kind that is not read",
        ),
        (
            lambda p: (p / "dog" / "000.png").rename(p / "dog" / "000"),
            r"dog/000: an image of a kind that is not read",
        ),
        (
            lambda p: (
                (p / "dog" / "x").mkdir(),
                (p / "dog" / "000.png").rename(p / "dog" / "x" / "0.png"),
            ),
            "x/0.png: an image in a folder inside",
        ),
        (
            lambda p: (p / "dog" / "000.png").rename(p / "0.png"),
            r"0.png: an image in no class folder",
        ),
    ],
)
def test_no_image_is_passed_over_in_silence(folder, damage, message):
    damage(folder)
    with pytest.raises(Refused, match=message) as refused:
        ImageFolder(path=str(folder), size=8).check()
    assert "\n" not in str(refused.value)


def put(file):
    """A picture at `file`, in folders that are made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(png(pictures(1)[0]))


@pytest.mark.parametrize("name", ["x/b.jp2", "x/b.pcx", "x/b", "x/y/b.HEIC"])
def test_no_image_deeper_in_a_class(folder, name):
    put(folder / "dog" / name)
    with pytest.raises(
        Refused,
        match=f"dog/{name}: an image in a folder inside the class folder 'dog'",
    ):
        ImageFolder(path=str(folder), size=8).check()


@pytest.mark.parametrize("name", ["b.heic", "b.jp2", "b.pcx", "b"])
def test_no_image_beside_the_classes(folder, name):
    put(folder / name)
    with pytest.raises(Refused, match=f"/{name}: an image in no class folder"):
        ImageFolder(path=str(folder), size=8).check()


def test_a_class_folder_that_is_a_link_to_nothing(folder):
    (folder / "bird").symlink_to(folder / "gone")
    with pytest.raises(
        Refused, match="/bird: a link to nothing, expected a folder"
    ):
        ImageFolder(path=str(folder), size=8).check()


@pytest.fixture
def split(folder, tmp_path_factory):
    """The same classes inside "train"; hidden folders, documents and folders without images may lie
    beside it.
    """
    root = tmp_path_factory.mktemp("split")
    shutil.copytree(folder, root / "train")
    put(root / ".bird" / "a.png")
    (root / "notes").mkdir()
    (root / "notes" / "paper.pdf").write_bytes(b"%PDF-1.4")
    (root / "README.pdf").write_bytes(b"%PDF-1.4")
    return root


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "bird/a.png",
            "bird/a.png: an image beside the train folder, expected it in .*train",
        ),
        ("bird/x/a.jp2", "bird/x/a.jp2: an image beside the train folder"),
        ("a.png", "a.png: an image in no class folder"),
        *(
            (
                f"{n}/dog/a.png",
                f"/{n}: images beside the train folder .* expected the name 'test'",
            )
            for n in ("Test", "val", "validation")
        ),
    ],
)
def test_no_image_beside_train(split, name, message):
    assert len(ImageFolder(path=str(split), heldout=0).source("train")) == 40
    put(split / name)
    with pytest.raises(Refused, match=message):
        ImageFolder(path=str(split), size=8).check()


def test_a_further_split_is_named(split, caplog):
    for name in ("test", "val"):
        put(split / name / "dog" / "a.png")
    with caplog.at_level("WARNING", logger="absl"):
        assert len(ImageFolder(path=str(split)).source("test")) == 1
    assert any(
        "/val: its images are not read" in record.getMessage()
        for record in caplog.records
    )


@pytest.mark.parametrize("name", [b"dog/\xe9.png", b"\xe9t\xe9/a.png"])
def test_names_that_are_not_utf8(folder, name):
    file = folder / os.fsdecode(name)
    try:
        put(file)
    except OSError:
        pytest.skip("the file system has only UTF-8")
    with pytest.raises(Refused, match=r"the name '\\udce9.* is not UTF-8"):
        ImageFolder(path=str(folder), size=8).check()


def test_what_is_no_image_is_counted(folder, caplog):
    for name in ("a.json", "Thumbs.db", "LICENSE", ".DS_Store", "._000.png"):
        (folder / "dog" / name).write_text("none")
    (folder / "cat" / "empty").mkdir()
    with caplog.at_level("WARNING", logger="absl"):
        data = ImageFolder(path=str(folder), size=8, heldout=0.25)
        data.check()
    assert len(data.source("train")) + len(data.source("test")) == 40
    (line,) = [
        record.getMessage()
        for record in caplog.records
        if "no images" in record.getMessage()
    ]
    assert "4 files are no images and are not read" in line
    assert all(f"1 {kind}" in line for kind in (".txt", ".json", ".db", "LICENSE"))


@pytest.mark.parametrize(
    "suffix",
    [".bmp", ".gif", ".tif", ".TIFF", ".jfif", ".webp", ".ppm", ".avif", ".apng"],
)
def test_suffixes(tmp_path, suffix):
    kind = {".tif": "TIFF", ".tiff": "TIFF", ".jfif": "JPEG", ".apng": "PNG"}.get(
        suffix.lower(), suffix[1:].upper()
    )
    for i, name in enumerate(("cat", "dog")):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"a{suffix if i else '.png'}").write_bytes(
            saved(Image.new("RGB", (8, 8), (250, 250, 250)), kind if i else "PNG")
        )
    batch = next(
        ImageFolder(
            path=str(tmp_path), size=8, batch_size=2, heldout=0, shuffle=False
        ).loader()
    )
    assert batch["cond"].tolist() == [0, 1] and (batch["x"] > 0.9).all()


def test_parquet_check_looks_at_every_label(parquet):
    path, _ = parquet
    ParquetImages(path=str(path), size=8).check()
    shard(
        path / "test-00001-of-00001.parquet", [png(pictures(1)[0])] * 3, [0, 1, 3]
    )
    with pytest.raises(
        Refused,
        match=r"test-00001-of-00001.parquet row 2: label 3, the training set has 0 to 2",
    ):
        ParquetImages(path=str(path), size=8, seed=1).check()


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
    data = ParquetImages(
        path=str(shared_data / "cifar10"), batch_size=64, flip=True
    )
    batch = next(data.loader())
    assert {k: (v.shape, str(v.dtype)) for k, v in batch.items()} == {
        "x": ((64, 32, 32, 3), "float32"),
        "cond": ((64,), "int32"),
        "null_cond": ((64,), "int32"),
    }
    assert (
        -1 <= batch["x"].min() < -0.9
        and 0.9 < batch["x"].max() <= 1
        and (batch["null_cond"] == 10).all()
    )
    assert (
        len(data.source("train")) == 50_000 and len(data.source("test")) == 10_000
    )
