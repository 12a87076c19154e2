"""Products and functions of rows: the same numbers on any mesh and in any blocks, and a gradient of
the kernel that does not transpose its operand.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.core import rows, sharding
from jaxdistill.core.rows import by_rows, keep, project
from jaxdistill.core.sharding import MeshShape

X = jax.random.normal(jax.random.key(0), (4, 6, 8))
KERNEL = jax.random.normal(jax.random.key(1), (8, 16))


def plain(x, kernel):
    return jnp.einsum("btd,dv->btv", x, kernel)


def derivatives(f, primals, tangents):
    """Value, the derivative along the tangents, and the gradients of both, for both arguments."""

    def along(*arguments):
        return jax.jvp(f, arguments, tangents)[1]

    def gradients(g):
        return jax.grad(lambda *arguments: jnp.sin(g(*arguments)).sum(), (0, 1))(
            *primals
        )

    return f(*primals), along(*primals), gradients(f), gradients(along)


def of_product(f):
    """`derivatives` of a product of X and KERNEL, as one program."""
    return jax.jit(lambda: derivatives(f, (X, KERNEL), (X[::-1], KERNEL[::-1])))()


def close(a, b):
    # float32 sums of at most 24 terms of order 1, in another order
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_equals_the_plain_product_in_every_derivative_on_one_device_and_on_eight():
    expected = of_product(plain)
    for shape in (MeshShape(fsdp=1), MeshShape(fsdp=2, sequence=2, tensor=2)):
        with sharding.use(sharding.make_mesh(shape)):
            jax.tree.map(close, of_product(project), expected)


def test_under_vmap_and_with_any_number_of_leading_axes():
    kernels = jnp.stack([KERNEL, 2 * KERNEL])
    expected = jnp.stack([plain(X, kernel) for kernel in kernels])
    close(jax.vmap(project, (None, 0))(X, kernels), expected)
    for x in (X[0, 0], X[0], X[None]):
        assert project(x, KERNEL).shape == (*x.shape[:-1], 16)
    half = project(X.astype(jnp.bfloat16), KERNEL.astype(jnp.bfloat16), jnp.float32)
    assert half.dtype == jnp.float32


def test_the_kernels_gradient_on_one_device_needs_no_transposed_copy_of_the_outputs():
    wide = jax.random.normal(jax.random.key(2), (8, 512))

    def program(f):
        gradient = jax.grad(lambda kernel: jnp.sin(f(X, kernel)).sum())
        return jax.jit(gradient).lower(wide).compile().as_text()

    assert "f32[512,24]" in program(plain)
    assert "f32[512,24]" not in program(project)


def of_rows(x, y, scale=1.0):
    """A function of rows with a reduction kept by name, and temporaries of the rows' size."""
    norm = keep(jax.nn.logsumexp(x, -1, keepdims=True))
    return scale * jnp.sum(jnp.exp(x - norm) * jnp.sin(y), -1)


def in_blocks(x, y):
    return by_rows(of_rows, x, y)


def test_blocks_of_rows_change_nothing(monkeypatch):
    """17 rows in blocks of 4 and a rest of one: the arithmetic of a row is the same, and numbers
    agree to float32's last digits.
    """
    x, y = jax.random.normal(jax.random.key(3), (2, 1, 17, 32))
    expected = jax.jit(lambda: derivatives(of_rows, (x, y), (y, x)))()
    monkeypatch.setattr(rows, "SMALL", 0)
    monkeypatch.setattr(rows, "BLOCK", 4 * 32)
    assert "scan" in str(jax.make_jaxpr(in_blocks)(x, y))
    jax.tree.map(
        close, jax.jit(lambda: derivatives(in_blocks, (x, y), (y, x)))(), expected
    )
    mapped = jax.vmap(in_blocks)(x[:, None], y[:, None])
    jax.tree.map(close, mapped, of_rows(x[:, None], y[:, None]))
    with sharding.use(sharding.make_mesh(MeshShape(fsdp=8))):
        assert "scan" not in str(jax.make_jaxpr(in_blocks)(x, y))


def test_small_arrays_go_at_once_and_large_ones_with_temporaries_of_a_block():
    small = jax.ShapeDtypeStruct((32, 1024), jnp.float32)
    assert "scan" not in str(jax.make_jaxpr(in_blocks)(small, small))
    wide = jax.ShapeDtypeStruct((256, 2**15), jnp.float32)  # 32 MiB

    def temporaries(f):
        gradient = jax.grad(lambda x, y: f(x, y).sum(), (0, 1))
        compiled = jax.jit(gradient).lower(wide, wide).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(in_blocks) < 8 * 4 * rows.BLOCK < temporaries(of_rows)
