"""Captioned shapes: captions say what is drawn, batches do not depend on how they are split."""

import jax
import numpy as np
import pytest

from jaxdistill.core.types import Refused
from jaxdistill.data.shapes import COLOURS, SHAPES, WORDS, Shapes, pictures


def test_the_label_is_the_picture():
    out = Shapes().evaluation(500)
    assert (
        out["x"].shape == (500, 6, 6, 3)
        and out["x"].dtype == np.float32
        and set(np.unique(out["x"])) == {-1.0, 1.0}
    )
    ink = out["x"].max(-1) > 0
    sizes = [sum(row.count("#") for row in rows) for rows in SHAPES.values()]
    np.testing.assert_array_equal(
        ink.sum((1, 2)), np.array(sizes)[out["label"][:, 0]]
    )
    for x, inked, colour in zip(out["x"], ink, out["label"][:, 1]):
        assert (x[inked] == list(COLOURS.values())[colour]).all()


def test_captions_tell_shape_and_now_and_then_colour():
    data = Shapes(untold=0.3)
    out = data.evaluation(3000)
    mask = out["cond"]["mask"]
    assert (
        mask[:, :2].all()
        and abs((~mask[:, 2]).mean() - 0.3) < 4 * (0.21 / 3000) ** 0.5
    )
    words = np.unique(out["cond"]["text"].reshape(-1, data.dim), axis=0)
    assert len(words) == len(WORDS)
    same = out["label"] == out["label"][0]
    for column in (0, 1):  # one word for each shape and each colour
        equal = (
            out["cond"]["text"][:, 1 + column] == out["cond"]["text"][0, 1 + column]
        ).all(-1)
        np.testing.assert_array_equal(equal, same[:, column])
    np.testing.assert_array_equal(
        out["null_cond"]["mask"], np.tile([True, False, False], (3000, 1))
    )


def test_batches_are_the_same_however_they_are_split():
    data = Shapes(batch_size=8)
    whole = data.batch(3, slice(None))
    parts = [data.batch(3, slice(i, i + 4)) for i in (0, 4)]
    jax.tree.map(
        lambda w, *p: np.testing.assert_array_equal(w, np.concatenate(p)),
        whole,
        *parts,
    )
    others = (
        data.batch(4, slice(None)),
        Shapes(batch_size=8, seed=1).batch(3, slice(None)),
    )
    assert all(np.any(other["x"] != whole["x"]) for other in others)
    assert data.spec()["cond"]["text"].shape == (8, 3, data.dim)


def test_all_pictures_differ():
    every = pictures().reshape(-1, 6 * 6 * 3)
    assert (
        len(np.unique(every, axis=0))
        == len(every)
        == len(SHAPES) * len(COLOURS) * 9
    )


def test_refuses_shares_outside_0_to_1():
    with pytest.raises(
        Refused,
        match=r"data.untold=1.5: expected a finite number of at least 0 and at most 1",
    ):
        Shapes(untold=1.5)
