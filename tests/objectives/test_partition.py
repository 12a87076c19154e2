"""Partitions of conditions: disjoint, exhaustive, and dealt out so that each member sees its own
cell.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.core.types import Refused
from jaxdistill.objectives.partition import (
    Consecutive,
    Nearest,
    Partition,
    Quadrant,
    Shuffled,
    kmeans,
)

RNG = np.random.default_rng(0)
EMBEDDED = jnp.asarray(RNG.standard_normal((400, 16)) + 1.0, jnp.float32)


def test_consecutive_blocks_by_the_formula():
    part = Consecutive(cells=4, classes=10)
    np.testing.assert_array_equal(part.sizes(jnp.arange(10)), [3, 2, 3, 2])
    np.testing.assert_array_equal(
        part.assign(jnp.arange(10)), [c * 4 // 10 for c in range(10)]
    )


@pytest.mark.parametrize("kind", [Consecutive, Shuffled])
@pytest.mark.parametrize(
    ("cells", "classes"), [(1, 7), (4, 10), (4, 1000), (7, 7), (8, 30)]
)
def test_cells_of_labels_are_disjoint_exhaustive_and_equal(kind, cells, classes):
    part = kind(cells=cells, classes=classes)
    cell = np.asarray(part.assign(jnp.arange(classes)))
    assert cell.dtype == np.int32 and set(cell) == set(range(cells))
    assert np.ptp(np.bincount(cell, minlength=cells)) <= 1
    # the null condition is routed somewhere
    assert part.assign(jnp.asarray([classes]))[0] in range(cells)


def test_a_random_partition_is_another_one_of_equal_sizes():
    part = Shuffled(cells=4, classes=100, seed=1)
    assert (
        np.mean(
            part.assign(jnp.arange(100))
            == Consecutive(cells=4, classes=100).assign(jnp.arange(100))
        )
        < 0.5
    )


def test_quadrants_do_not_depend_on_length_but_thresholds_do():
    part = Quadrant(cells=4)
    cell = part.assign(EMBEDDED)
    assert set(np.unique(cell)) <= set(range(4)) and part.sizes(
        EMBEDDED
    ).sum() == len(EMBEDDED)
    np.testing.assert_array_equal(
        part.assign({"pooled": 3.0 * EMBEDDED, "text": EMBEDDED}), cell
    )
    np.testing.assert_array_equal(cell & 1, part.heights(EMBEDDED)[:, 0] > 0)
    balanced = part.balanced(EMBEDDED)
    np.testing.assert_array_equal(
        [
            np.sum(balanced.assign(EMBEDDED) & 1),
            np.sum(balanced.assign(EMBEDDED) >> 1),
        ],
        [200, 200],
    )
    assert not np.array_equal(
        balanced.assign(3.0 * EMBEDDED), balanced.assign(EMBEDDED)
    )
    scaled = dataclasses.replace(
        balanced, thresholds=tuple(3.0 * t for t in balanced.thresholds)
    )
    # the two at the medians may round over
    assert (
        np.mean(scaled.assign(3.0 * EMBEDDED) != balanced.assign(EMBEDDED))
        <= 2 / 400
    )
    hash(balanced)  # a field of a frozen dataclass


def test_nearest_centres_find_separate_clusters():
    means = np.array([[5.0, 0.0], [-5.0, 0.0], [0.0, 5.0]])
    points = np.concatenate(
        [m + 0.3 * RNG.standard_normal((n, 2)) for m, n in zip(means, (50, 20, 30))]
    )
    part = Nearest(cells=3, centres=kmeans(points, 3, seed=3))
    cell = np.asarray(part.assign(jnp.asarray(points)))
    assert sorted(part.sizes(jnp.asarray(points)).tolist()) == [20, 30, 50]
    assert all(
        len(set(cell[low:high])) == 1
        for low, high in ((0, 50), (50, 70), (70, 100))
    )


def test_dealing_gives_every_cell_its_own_rows():
    part = Consecutive(cells=4, classes=8)
    cond = jnp.asarray([0, 7, 1, 1, 0, 2, 3, 6, 0, 5, 1, 7])
    batch, present = jax.jit(part.split)({"cond": cond, "x": jnp.arange(12.0)})
    np.testing.assert_array_equal(
        part.assign(batch["cond"]), np.repeat(np.arange(4), 3)
    )
    assert present.all() and np.array_equal(
        cond[batch["x"].astype(int)], batch["cond"]
    )
    # in order; what lacks is repeated
    np.testing.assert_array_equal(batch["x"], [0, 2, 3, 5, 6, 5, 9, 9, 9, 1, 7, 11])


def test_one_cell_gets_the_batch_as_it_is():
    cond = jnp.asarray([3, 0, 2])
    batch, present = Consecutive(cells=1, classes=4).split(
        {"cond": cond, "x": jnp.arange(3.0)}
    )
    assert (
        np.array_equal(batch["x"], jnp.arange(3.0))
        and np.array_equal(batch["cond"], cond)
        and present.tolist() == [True]
    )


def test_an_absent_cell_is_reported():
    _, present = Consecutive(cells=2, classes=4).split(
        {"cond": jnp.asarray([3, 2, 3, 2])}
    )
    assert present.tolist() == [False, True]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Consecutive(cells=0), "cells=0"),
        (lambda: Quadrant(cells=6), "power of two"),
        (lambda: Nearest(cells=2, centres=((0.0,),)), "expected 2"),
        (
            lambda: Consecutive(cells=2).split({"cond": jnp.arange(5)}),
            "multiple of partition.cells=2",
        ),
    ],
)
def test_bad_partitions_are_refused(make, said):
    with pytest.raises(Refused, match=said):
        make()


def test_a_partition_says_where_conditions_belong():
    with pytest.raises(NotImplementedError):
        Partition().assign(jnp.arange(3))
