"""The product of states with a kernel: one number whatever the mesh, and a gradient that does not turn its operand around."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.core import sharding
from jaxdistill.core.sharding import MeshShape, project

X = jax.random.normal(jax.random.key(0), (4, 6, 8))
KERNEL = jax.random.normal(jax.random.key(1), (8, 16))


def plain(x, kernel):
    return jnp.einsum("btd,dv->btv", x, kernel)


def everything(f):
    """Value, both gradients, the derivative along both arguments, and a gradient of that."""
    tangents = X[::-1], KERNEL[::-1]
    along = lambda *args: jax.jvp(f, args, tangents)[1]
    return f(X, KERNEL), jax.grad(lambda *a: jnp.sin(f(*a)).sum(), (0, 1))(X, KERNEL), along(X, KERNEL), jax.grad(
        lambda *a: jnp.sin(along(*a)).sum(), (0, 1))(X, KERNEL)  # fmt: skip


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)  # float32 sums of at most 24 terms of order 1, in another order


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
    assert project(X.astype(jnp.bfloat16), KERNEL.astype(jnp.bfloat16), jnp.float32).dtype == jnp.float32


def test_the_kernels_gradient_on_one_device_needs_no_transposed_copy_of_the_outputs():
    wide = jax.random.normal(jax.random.key(2), (8, 512))
    program = lambda f: jax.jit(jax.grad(lambda k: jnp.sin(f(X, k)).sum())).lower(wide).compile().as_text()
    assert "f32[512,24]" in program(plain) and "f32[512,24]" not in program(project)
