"""Work on rows: one number whatever the mesh and the blocks, a kernel's gradient that does not turn
its operand around.
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


def everything(f):
    """Value, both gradients, the derivative along both arguments, and a gradient of that."""
    tangents = X[::-1], KERNEL[::-1]
    along = lambda *args: jax.jvp(f, args, tangents)[1]
    return (
        f(X, KERNEL),
        jax.grad(lambda *a: jnp.sin(f(*a)).sum(), (0, 1))(X, KERNEL),
        along(X, KERNEL),
        jax.grad(lambda *a: jnp.sin(along(*a)).sum(), (0, 1))(X, KERNEL),
    )


def close(a, b):
    np.testing.assert_allclose(
        a, b, rtol=1e-5, atol=1e-5
    )  # float32 sums of at most 24 terms of order 1, in another order


def test_equals_the_plain_product_in_every_derivative_on_one_device_and_on_eight():
    expected = jax.jit(everything, static_argnums=0)(plain)
    for shape in (MeshShape(fsdp=1), MeshShape(fsdp=2, sequence=2, tensor=2)):
        with sharding.use(sharding.make_mesh(shape)):
            jax.tree.map(close, jax.jit(lambda: everything(project))(), expected)


def test_under_vmap_and_with_any_number_of_leading_axes():
    kernels = jnp.stack([KERNEL, 2 * KERNEL])
    close(jax.vmap(project, (None, 0))(X, kernels), jnp.stack([plain(X, k) for k in kernels]))
    for x in (X[0, 0], X[0], X[None]):
        assert project(x, KERNEL).shape == (*x.shape[:-1], 16)
    assert (
        project(X.astype(jnp.bfloat16), KERNEL.astype(jnp.bfloat16), jnp.float32).dtype
        == jnp.float32
    )


def test_the_kernels_gradient_on_one_device_needs_no_transposed_copy_of_the_outputs():
    wide = jax.random.normal(jax.random.key(2), (8, 512))
    program = lambda f: (
        jax.jit(jax.grad(lambda k: jnp.sin(f(X, k)).sum())).lower(wide).compile().as_text()
    )
    assert "f32[512,24]" in program(plain) and "f32[512,24]" not in program(project)


def law(x, y, scale=1.0):
    """A function of rows with a reduction kept by name, and temporaries of the rows' size."""
    norm = keep(jax.nn.logsumexp(x, -1, keepdims=True))
    return scale * jnp.sum(jnp.exp(x - norm) * jnp.sin(y), -1)


def derivatives(f, x, y):
    """Value, gradients, the derivative along both arguments, and a gradient of that."""
    along = lambda x, y: jax.jvp(f, (x, y), (y, x))[1]
    both = lambda g: jax.grad(lambda *a: jnp.sin(g(*a)).sum(), (0, 1))(x, y)
    return f(x, y), along(x, y), both(f), both(along)


def test_blocks_of_rows_change_nothing(monkeypatch):
    """17 rows in blocks of 4 and one that is left over: each row's arithmetic is the same, so are
    numbers to float32's last digits.
    """
    x, y = jax.random.normal(jax.random.key(3), (2, 1, 17, 32))
    expected = jax.jit(lambda: derivatives(law, x, y))()
    monkeypatch.setattr(rows, "SMALL", 0)
    monkeypatch.setattr(rows, "BLOCK", 4 * 32)
    blocked = lambda x, y: by_rows(law, x, y)
    assert "scan" in str(jax.make_jaxpr(blocked)(x, y))
    jax.tree.map(close, jax.jit(lambda: derivatives(blocked, x, y))(), expected)
    jax.tree.map(close, jax.vmap(blocked)(x[:, None], y[:, None]), law(x[:, None], y[:, None]))
    with sharding.use(sharding.make_mesh(MeshShape(fsdp=8))):
        assert "scan" not in str(jax.make_jaxpr(blocked)(x, y))


def test_small_arrays_go_at_once_and_large_ones_with_temporaries_of_a_block():
    assert "scan" not in str(
        jax.make_jaxpr(lambda x: by_rows(law, x, x))(jax.ShapeDtypeStruct((32, 1024), jnp.float32))
    )
    wide = jax.ShapeDtypeStruct((256, 2**15), jnp.float32)  # 32 MiB
    taken = lambda f: (
        jax.jit(jax.grad(lambda x, y: f(x, y).sum(), (0, 1)))
        .lower(wide, wide)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
    )
    at_once = taken(law)
    blocked = taken(lambda x, y: by_rows(law, x, y))
    assert blocked < 8 * 4 * rows.BLOCK < at_once
