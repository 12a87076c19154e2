"""Figures of a negative prompt, on students that do exactly what they are told."""

import dataclasses
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.data.shapes import Shapes, pictures
from jaxdistill.evals.negative import NegativeEval

DATA = Shapes()
VALID = jnp.asarray(pictures())


@dataclasses.dataclass(frozen=True)
class Trained:
    """A student that draws the shape asked for, in red or blue by its noise, and in red where it is
    told to; a negative prompt of full strength turns red to blue.
    """

    params: dict
    experiment: SimpleNamespace
    nets: dict

    def bound(self):
        return None


def sample(net, noise, cond, key, steps):
    table = DATA.caption(np.arange(4), np.array([0, 1, 2, 0]), np.ones(4, bool))[
        "text"
    ]
    shape = jnp.argmin(
        jnp.sum((cond["text"][:, 1, None] - table[:, 1]) ** 2, -1), -1
    )
    red = (noise[:, 0, 0, 0] > 0) | cond["mask"][:, 2]
    x = VALID[shape, jnp.where(red, 0, 2), 1, 1]
    if "nasa" in cond:
        strength = cond["nasa"][:, None, None, None] * red[:, None, None, None]
        x = (1 - strength) * x + strength * VALID[shape, 2, 1, 1]
    return x


@pytest.fixture(scope="module")
def rows():
    method = SimpleNamespace(
        process=None, sample=sample, generator=lambda nets, null: None
    )
    trained = Trained(
        {},
        SimpleNamespace(data=DATA, method=method, conditioned=lambda batch: batch),
        {},
    )
    table = NegativeEval(samples=400, teacher_steps=(), strengths=(0.25, 1.0)).rows(
        trained
    )
    return {row["name"]: row for row in table}


def test_rows(rows):
    assert list(rows) == ["student", "nasa0.25", "nasa1", "blend"]
    assert [row["nfe"] for row in rows.values()] == [1, 1, 1, 2]
    assert all(row["accuracy"] == 1 for row in rows.values())


def test_unwanted_and_stray(rows):
    assert abs(rows["student"]["unwanted"] - 0.5) < 4 * 0.5 / 400**0.5 and rows[
        "student"
    ]["stray"] == pytest.approx(0, abs=1e-6)
    assert rows["nasa1"]["unwanted"] == 0 and rows["nasa1"][
        "stray"
    ] == pytest.approx(0, abs=1e-6)
    assert (
        rows["nasa0.25"]["unwanted"] == rows["student"]["unwanted"]
        and rows["nasa0.25"]["stray"] > 0.01
    )


def test_extrapolation_blends(rows):
    """Samples that are not red leave the valid pictures; those that are red stay red."""
    assert (
        rows["blend"]["stray"] > 0.01
        and rows["blend"]["unwanted"] == rows["student"]["unwanted"]
    )


def test_picture_is_a_grid():
    assert NegativeEval().picture(DATA.evaluation(100)["x"], {}).width >= 280
