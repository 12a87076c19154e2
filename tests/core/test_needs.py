"""What methods and networks need of a batch, held against what there is."""

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import Float, Int, Shaped

from jaxdistill.core.needs import Spec, check_needs
from jaxdistill.core.types import Refused

GIVEN = {
    "tokens": Spec((4, 8), jnp.int32),
    "mask": Spec((4, 7), jnp.bool_),
    "x": Spec((4, 2, 2, 3), jnp.float32),
    "cond": {"text": Spec((4, 5, 6), jnp.float32)},
}


def check(needs):
    check_needs(GIVEN, needs, "KD", "config.data")


@pytest.mark.parametrize(
    "needs",
    [
        {},
        {"tokens": Int[Spec, "B T"], "x": Float[Spec, "B *S"]},
        {"cond": {"text": Float[Spec, "B L 6"]}},
        {"mask": Shaped[Spec, "B T"]},
    ],
)
def test_what_fits_passes(needs):
    check(needs)


@pytest.mark.parametrize(
    ("needs", "message"),
    [
        (
            {"token": Int[Spec, "B T"]},
            r"'token' int \[B T\] in a batch; did you mean 'tokens'",
        ),
        (
            {"tokens": Float[Spec, "B T"]},
            r"'tokens' is int32 \[4, 8\], KD needs float \[B T\]",
        ),
        (
            {"tokens": Int[Spec, "B T"], "mask": Shaped[Spec, "B T"]},
            r"'mask' is bool \[4, 7\], KD needs array \[B T\]",
        ),
        (
            {"tokens": {"text": Int[Spec, "B T"]}},
            "'tokens' is one array, KD needs text",
        ),
        ({"cond": Int[Spec, " B"]}, r"'cond' is a group, KD needs int \[B\]"),
        (
            {"cond": {"pooled": Float[Spec, "B D"]}},
            r"data\['cond'\]: KD needs 'pooled'",
        ),
    ],
)
def test_what_does_not_is_refused_in_one_line(needs, message):
    with pytest.raises(Refused, match=message):
        check(needs)


def test_axes_of_one_name_are_those_of_one_mapping():
    check({"tokens": Int[Spec, "B T"]})
    check({"mask": Shaped[Spec, "B T"]})  # another T: not the T of another call


def test_arrays_in_a_trace_have_shapes_too():
    shapes = jax.eval_shape(lambda: {"x": jnp.zeros((3, 2))})
    check_needs(shapes, {"x": Float[Spec, "B 2"]}, "KD", "config.data")
