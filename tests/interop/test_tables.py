import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.interop.tables import CONV, LINEAR, SAME, Family, Row, patches


@pytest.mark.parametrize(
    ("layout", "torch_shape", "jax_shape"),
    [
        (SAME, (5,), (5,)),
        (LINEAR, (5, 3), (3, 5)),
        (CONV, (5, 3, 2, 4), (2, 4, 3, 5)),
        (patches(2), (5, 3, 2, 2), (12, 5)),
        (patches((1, 2, 3)), (5, 4, 1, 2, 3), (24, 5)),
    ],
)
def test_layouts_are_inverse_both_ways(layout, torch_shape, jax_shape):
    w = np.random.default_rng(0).standard_normal(torch_shape)
    ours = layout.to_jax(w)
    assert ours.shape == jax_shape
    np.testing.assert_array_equal(layout.to_torch(ours), w)
    assert Row("a", "b", layout).torch_shape(jax_shape) == torch_shape


def test_linear_is_a_view_of_the_file():
    w = np.zeros((5, 3))
    assert np.shares_memory(LINEAR.to_jax(w), w)


def test_patches_is_the_convolution():
    rng = np.random.default_rng(0)
    x = rng.integers(-4, 5, (1, 4, 6, 3)).astype(np.float32)
    w = rng.integers(-4, 5, (5, 3, 2, 2)).astype(np.float32)
    conv = jax.lax.conv_general_dilated(
        x,
        CONV.to_jax(w),
        (2, 2),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    cut = (
        x.reshape(1, 2, 2, 3, 2, 3).transpose(0, 1, 3, 2, 4, 5).reshape(1, 2, 3, 12)
    )
    # sums of integers: exact
    np.testing.assert_array_equal(jnp.asarray(cut) @ patches(2).to_jax(w), conv)


def test_names_and_shapes_of_stacked_and_repeated_rows():
    stacked = Row("blocks/up/kernel", "layers.{i}.up.weight", LINEAR)
    assert stacked.names((2, 3, 5)) == ["layers.0.up.weight", "layers.1.up.weight"]
    assert stacked.torch_shape((2, 3, 5)) == (5, 3)
    copied = Row("time/kernel", "layers.{i}.time.weight", LINEAR, copies=3)
    assert copied.names((3, 5)) == [f"layers.{i}.time.weight" for i in range(3)]
    assert copied.torch_shape((3, 5)) == (5, 3)
    assert Row("norm/scale", "norm.weight").names((4,)) == ["norm.weight"]


def test_old_names_become_those_of_the_table():
    rules = ((r"\.gamma$", ".weight"), (r"^model\.", ""))
    family = Family(name="", library="", config=object, table=None, renamed=rules)
    assert [
        family.current(name) for name in ("model.norm.gamma", "gamma.weight")
    ] == [
        "norm.weight",
        "gamma.weight",
    ]
