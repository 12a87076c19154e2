import gzip
import struct
import tracemalloc

import numpy as np
import pytest

from jaxdistill.core.types import Refused
from jaxdistill.data.idx import IDX, read

IMAGES = "train-images-idx3-ubyte"
LABELS = "train-labels-idx1-ubyte"


def idx(array: np.ndarray) -> bytes:
    return (
        bytes([0, 0, 8, array.ndim])
        + struct.pack(f">{array.ndim}I", *array.shape)
        + array.astype(np.uint8).tobytes()
    )


@pytest.fixture
def stored(tmp_path):
    """(folder, images, labels): 12 training images with 3 labels, plain, and 5 test images,
    gzipped.
    """
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (12, 6, 5))
    labels = np.arange(12) % 3
    (tmp_path / IMAGES).write_bytes(idx(images))
    (tmp_path / LABELS).write_bytes(idx(labels))
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(
        gzip.compress(idx(images[:5]))
    )
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(
        gzip.compress(idx(labels[:5]))
    )
    return tmp_path, images, labels


def test_values(stored):
    folder, images, labels = stored
    data = IDX(path=str(folder))
    for split, n in (("train", 12), ("test", 5)):
        out = data.arrays(split)
        assert out["x"].shape == (n, 6, 5, 1) and out["x"].dtype == np.float32
        np.testing.assert_array_equal(
            np.rint((out["x"][..., 0] + 1) * 127.5), images[:n]
        )
        assert (
            out["cond"].tolist() == labels[:n].tolist()
            and out["cond"].dtype == np.int32
        )
        assert (out["null_cond"] == 3).all()
    assert (
        (images.min(), images.max()) == (0, 255)
        and (out["x"].min() >= -1)
        and (out["x"].max() <= 1)
    )


def test_padding_is_black_and_centred(stored):
    folder, *_ = stored
    plain = IDX(path=str(folder)).arrays("train")["x"]
    padded = IDX(path=str(folder), size=9).arrays("train")["x"]
    assert padded.shape == (12, 9, 9, 1)
    np.testing.assert_array_equal(padded[:, 1:7, 2:7], plain)
    assert padded.sum() == pytest.approx(
        plain.sum() - 12 * (81 - 30), abs=12 * 81 * 2**-20
    )


def test_stream(stored, check_stream, check_epochs):
    data = IDX(path=str(stored[0]), batch_size=4)
    check_stream(data)
    check_epochs(data, 12)


def cut(file, n):
    file.write_bytes(file.read_bytes()[:n])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: cut(f / IMAGES, 100),
            rf"{IMAGES}: expected 376 bytes for shape \(12, 6, 5\), found 100",
        ),
        (
            lambda f: cut(f / IMAGES, 7),
            rf"{IMAGES}: expected a header of 16 bytes, found 7",
        ),
        (
            lambda f: (f / LABELS).write_bytes(idx(np.zeros((2, 2)))),
            rf"{LABELS}: begins with 0x00000802, expected 0x00000801",
        ),
        (
            lambda f: (f / LABELS).write_bytes(b"junk" * 9),
            rf"{LABELS}: begins with 0x6a756e6b",
        ),
        (
            lambda f: (f / LABELS).write_bytes(idx(np.arange(11))),
            "train has 12 images and 11 labels",
        ),
        (
            lambda f: (f / LABELS).write_bytes(idx(np.arange(0))),
            f"{LABELS}: holds no samples",
        ),
        (lambda f: (f / IMAGES).unlink(), f"no file {IMAGES} or {IMAGES}.gz"),
    ],
)
def test_refused(stored, damage, message):
    folder, *_ = stored
    damage(folder)
    with pytest.raises(Refused, match=message):
        IDX(path=str(folder)).batch(0, slice(0, 1))


@pytest.mark.parametrize("keep", [0.3, 0.8])
def test_truncated_gzip_names_what_is_left(stored, keep):
    folder, *_ = stored
    file = folder / "t10k-images-idx3-ubyte.gz"
    cut(file, int(keep * file.stat().st_size))
    with pytest.raises(
        Refused, match=rf"{file.name}: expected .* bytes.*, found \d+"
    ):
        IDX(path=str(folder)).evaluation(5)


@pytest.mark.parametrize(
    "shape", [(2**32 - 1,) * 3, (12, 2**31, 1), (1, 2**20, 2**20)]
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_sizes_that_no_file_has(tmp_path, shape, suffix):
    """Nothing is allocated for them."""
    file = tmp_path / f"a{suffix}"
    data = bytes([0, 0, 8, 3]) + struct.pack(">3I", *shape) + bytes(100)
    file.write_bytes(gzip.compress(data) if suffix else data)
    with pytest.raises(
        Refused, match=r"expected \d+ bytes for shape .*, found \d+ in the file"
    ):
        read(file, 3)


def test_a_gzip_file_is_read_as_far_as_its_header_says(tmp_path):
    """64 MiB of zeros in 64 kB, of which the header names 30 bytes: two pieces of little more than
    that are made.
    """
    bomb = idx(np.arange(30).reshape(2, 3, 5)) + bytes(1 << 26)
    (tmp_path / "a.gz").write_bytes(gzip.compress(bomb, 1))
    tracemalloc.start()
    with pytest.raises(
        Refused, match=r"expected 46 bytes for shape \(2, 3, 5\), found more"
    ):
        read(tmp_path / "a.gz", 3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 22


def test_images_without_pixels(tmp_path):
    (tmp_path / "a").write_bytes(idx(np.zeros((4, 0, 5))))
    with pytest.raises(
        Refused, match=r"holds no samples, its shape is \(4, 0, 5\)"
    ):
        read(tmp_path / "a", 3)


def test_no_gzip_file(stored):
    folder, *_ = stored
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(b"junk" * 9)
    with pytest.raises(Refused, match="expected a gzip file"):
        IDX(path=str(folder)).evaluation(5)


def test_label_that_training_lacks(stored):
    folder, *_ = stored
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(
        gzip.compress(idx(np.array([0, 1, 2, 3, 0])))
    )
    with pytest.raises(Refused, match="t10k has label 3, the training set 0 to 2"):
        IDX(path=str(folder)).evaluation(5)


def test_padding_does_not_crop(stored):
    with pytest.raises(
        Refused, match=r"data\.size=5: the images have 6 pixels a side"
    ):
        IDX(path=str(stored[0]), size=5).spec()


@pytest.mark.shared_data
def test_mnist(shared_data):
    data = IDX(path=str(shared_data / "mnist"))
    test = data.evaluation(10_000)
    assert (
        test["x"].shape == (10_000, 28, 28, 1) and (test["null_cond"] == 10).all()
    )
    # as published
    assert np.bincount(test["cond"]).tolist() == [
        980,
        1135,
        1032,
        1010,
        982,
        892,
        958,
        1028,
        974,
        1009,
    ]
