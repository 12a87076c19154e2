"""Random arrays of the described shapes, the same for the same seed, in groups where a name has a
stroke.
"""

import jax
import numpy as np
import pytest

from jaxdistill.core.types import Refused
from jaxdistill.data.synthetic import Synthetic

ARRAYS = {
    "x": "normal 4 4 2",
    "cond/text": "normal 7 3",
    "cond/label": "integers 10",
    "tokens": "integers 50 8",
    "null_cond": "constant 10",
    "mask": "constant 1 8",
}


def make(**kw):
    return Synthetic(arrays=ARRAYS, batch_size=6, **kw)


def test_shapes_dtypes_and_ranges():
    batch = make().batch(0, slice(None))
    assert batch["x"].shape == (6, 4, 4, 2) and batch["x"].dtype == np.float32
    assert batch["cond"]["text"].shape == (6, 7, 3) and batch["cond"][
        "label"
    ].shape == (6,)
    assert (
        batch["tokens"].shape == (6, 8)
        and batch["tokens"].min() >= 0
        and batch["tokens"].max() < 50
    )
    assert (
        (batch["null_cond"] == 10).all()
        and (batch["mask"] == 1).all()
        and batch["mask"].shape == (6, 8)
    )
    spec = make().spec()
    assert (
        spec["cond"]["text"].shape == (6, 7, 3) and spec["tokens"].dtype == np.int32
    )


def test_same_seed_same_batches_and_no_batch_twice():
    same = lambda a, b: all(
        np.array_equal(x, y)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )
    assert same(make().batch(3, slice(None)), make().batch(3, slice(None)))
    assert not same(make().batch(3, slice(None)), make().batch(4, slice(None)))
    assert not same(
        make().batch(3, slice(None)), make(seed=1).batch(3, slice(None))
    )
    assert not same(make().batch(3, slice(0, 3)), make().batch(3, slice(3, 6)))


@pytest.mark.parametrize("text", ["normals 3", "integers", "normal a", "constant"])
def test_another_description_is_refused(text):
    with pytest.raises(Refused, match=r"data\.arrays\.x="):
        Synthetic(arrays={"x": text}).batch(0, slice(None))
