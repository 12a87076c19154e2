"""Every path of attention computes the same; `blockwise` also in its derivatives, and in memory
that grows with the length.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.core import sharding
from jaxdistill.core.net import forward_mode
from jaxdistill.core.sharding import MeshShape
from jaxdistill.data.synthetic import Synthetic
from jaxdistill.methods.trajectory.scm import SCT
from jaxdistill.models import attention as module
from jaxdistill.models import splash as kernel
from jaxdistill.models.attention import attention, blockwise, plain, splash
from jaxdistill.models.denoisers.dit import DiT
from jaxdistill.models.heads import TimeWeight

B = 2
T = 70
S = 50
H = 4
G = 2
K = 8


def draw(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.fixture(scope="module")
def qkv():
    return draw(B, T, H, K), draw(B, S, G, K, seed=1), draw(B, S, G, K, seed=2)


def masks():
    scores = (
        jax.random.bernoulli(jax.random.key(3), 0.6, (B, H, T, S))
        .at[..., 0]
        .set(True)
    )
    padding = (jnp.arange(S) < jnp.array([S, 30])[:, None])[:, None, None]
    return {
        "none": {},
        "padding": {"mask": padding},
        "any": {"mask": scores},
        "shared": {"mask": scores[:1, :1]},
    }


@pytest.mark.full
@pytest.mark.parametrize("kind", masks())
@pytest.mark.parametrize("block", [16, 512])
def test_blockwise_equals_plain_in_value_and_every_derivative(qkv, kind, block):
    kw = masks()[kind]
    tangents = tuple(draw(*x.shape, seed=5 + i) for i, x in enumerate(qkv))
    ours = functools.partial(blockwise, block=block, **kw)
    reference = functools.partial(plain, **kw)

    def everything(f):
        value, tangent = jax.jvp(f, qkv, tangents)
        loss = lambda q, k, v: jnp.sum(jnp.sin(f(q, k, v)))
        gradient = jax.grad(loss, (0, 1, 2))(*qkv)
        over = jax.grad(
            lambda q: jnp.sum(
                jax.jvp(lambda q: f(q, *qkv[1:]), (q,), tangents[:1])[1] ** 2
            )
        )(qkv[0])
        return value, tangent, gradient, over

    for a, b in zip(
        *(
            jax.tree.leaves(jax.jit(everything, static_argnums=0)(f))
            for f in (ours, reference)
        ),
        strict=True,
    ):
        # float32 sums of 50 terms of order 1, in another order
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kind", masks())
def test_the_backward_pass_of_plain_attention_keeps_no_scores(qkv, kind):
    kept = jax.tree.leaves(
        jax.vjp(functools.partial(plain, **masks()[kind]), *qkv)[1]
    )
    # the mask is an argument
    assert kept and all(x.size < B * H * T * S for x in kept if x.dtype != bool)


@pytest.mark.parametrize("heads", [H, G])
def test_plain_attention_is_the_librarys(qkv, heads):
    q, k, v = qkv[0][:, :, :heads], *qkv[1:]
    for how in (*masks().values(), {"bias": draw(1, heads, T, S, seed=6)}):
        if how.get("mask", jnp.ones((1, 1))).shape[1] not in (1, heads):
            continue
        for causal in (False, True):
            library = jax.nn.dot_product_attention(
                q, k, v, is_causal=causal, scale=0.3, implementation="xla", **how
            )
            # sums of 50 terms
            np.testing.assert_allclose(
                plain(q, k, v, causal=causal, scale=0.3, **how),
                library,
                rtol=1e-5,
                atol=1e-5,
            )


def test_blockwise_is_causal():
    q = draw(1, T, H, K)
    k = draw(1, T, H, K, seed=1)
    v = draw(1, T, H, K, seed=2)
    np.testing.assert_allclose(
        blockwise(q, k, v, causal=True, block=16),
        plain(q, k, v, causal=True),
        rtol=1e-5,
        atol=1e-5,
    )


def test_a_row_without_keys_stays_finite(qkv):
    mask = jnp.zeros((1, 1, T, S), bool)
    grads = jax.grad(
        lambda q: jnp.sum(blockwise(q, *qkv[1:], mask=mask, block=16))
    )(qkv[0])
    assert not grads.any() and not blockwise(*qkv, mask=mask, block=16).any()


def test_forward_mode_at_a_thousand_tokens():
    """Value and tangent against plain attention to 1e-5, at the length from which the plain path
    would be left.
    """
    q, k, v, d = (draw(1, 1024, 2, 32, seed=i) for i in range(4))
    run = lambda f: jax.jit(lambda q, d: jax.jvp(lambda q: f(q, k, v), (q,), (d,)))(
        q, d
    )
    for a, b in zip(
        run(functools.partial(blockwise, block=256)), run(plain), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-5)


def temporaries(tokens: int, derivative) -> int:
    x = jax.ShapeDtypeStruct((1, tokens, 1, 16), jnp.float32)
    return (
        jax.jit(derivative).lower(x).compile().memory_analysis().temp_size_in_bytes
    )


def tangent(x):
    return jax.jvp(lambda q: blockwise(q, x, x, block=256), (x,), (x,))[1]


def gradient_of_tangent(x):
    return jax.grad(lambda x: jnp.sum(tangent(x) ** 2))(x)


@pytest.mark.parametrize("derivative", [tangent, gradient_of_tangent])
def test_memory_grows_with_the_length(derivative, record_property):
    """Doubling the tokens doubles the temporaries at most (to 10 %); plain scores would take 4 x,
    and 1 GiB at 16 k.
    """
    table = {n: temporaries(n, derivative) for n in (4096, 8192, 16384)}
    record_property("temporaries", table)
    assert table[8192] < 2.2 * table[4096] and table[16384] < 2.2 * table[8192], (
        table
    )
    assert table[16384] < 16384**2 * 4 / 8, table


def test_which_path_is_taken(monkeypatch):
    taken = []

    def stand_in(name):
        return lambda q, k, v, **kw: (taken.append(name), q)[1]

    for name in ("plain", "blockwise", "splash", "cudnn"):
        monkeypatch.setattr(module, name, stand_in(name))
    x = jnp.zeros((1, 256, 2, 8), jnp.bfloat16)
    long = jnp.zeros((1, 2304, 1, 1))

    def path(*args, **kw):
        taken.clear()
        jax.eval_shape(functools.partial(attention, **kw), *args)
        return set(taken)

    assert path(x, x, x, mask=jnp.ones((1, 1, 256, 256), bool)) == {"plain"}
    assert path(x, x, x, mask=jnp.ones((1, 1, 1, 256), bool)) == {"splash", "plain"}
    assert path(x, x[:, :128], x[:, :128]) == {"plain"}
    assert path(*[jnp.zeros((1, 2100, 1, 8), jnp.bfloat16)] * 3) == {
        "splash",
        "plain",
    }
    assert path(x[:, :100], x[:, :100], x[:, :100]) == {"plain"}
    # one for each platform it may be compiled for
    assert path(x, x, x) == {
        "splash",
        "plain",
    }
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert path(x, x, x) == {"splash", "plain", "cudnn"}
    assert path(*[x.astype(jnp.float32)] * 3) == {"splash", "plain"}
    with forward_mode():
        assert path(x, x, x) == {"plain"} and path(long, long, long) == {
            "blockwise"
        }


@pytest.mark.skipif(
    jax.default_backend() != "gpu",
    reason="needs an NVIDIA GPU (JAX_PLATFORMS=cuda)",
)
@pytest.mark.parametrize(
    "length, size", [(256, 72), (1024, 64), (512, 128)]
)  # DiT-XL/2's heads, and two usual ones
@pytest.mark.parametrize("causal", [False, True])
def test_the_kernel_on_a_gpu(length, size, causal):
    """bfloat16 through cuDNN against plain attention in float32 of the same numbers: values and
    gradients to a few roundings of bfloat16 (2^-8), relative to the largest.
    """
    q, k, v, w = (
        draw(2, length, 4, size, seed=i).astype(jnp.bfloat16) for i in range(4)
    )

    def both(path, *x):
        loss = lambda *x: (
            jnp.sum((out := path(*x, causal=causal)) * w.astype(out.dtype)).astype(
                jnp.float32
            ),
            out,
        )
        (_, out), grads = jax.jit(
            jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
        )(*x)
        return (out, *grads)

    with jax.default_matmul_precision("highest"):
        exact = both(plain, *(x.astype(jnp.float32) for x in (q, k, v)))
    assert (
        "cudnn"
        in jax.jit(functools.partial(attention, causal=causal))
        .lower(q, k, v)
        .as_text()
    )
    for a, b in zip(both(attention, q, k, v), exact, strict=True):
        np.testing.assert_allclose(
            a.astype(jnp.float32), b, atol=4 * 2**-8 * float(jnp.abs(b).max())
        )


def test_tpu_gets_the_pallas_kernel_and_its_gradient():
    x = jax.ShapeDtypeStruct((4, 256, 4, 64), jnp.bfloat16)
    loss = lambda q: jnp.sum(attention(q, q, q, causal=True).astype(jnp.float32))
    text = jax.export.export(jax.jit(jax.grad(loss)), platforms=["tpu"])(
        x
    ).mlir_module()
    assert text.count("tpu_custom_call") >= 3  # forward, dq, dkv


@pytest.mark.full
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_the_kernel_masks_and_pads(causal, masked, monkeypatch):
    """Values and gradients at the tokens that count, by the interpreter in float32.

    200 tokens do not fill tiles; 200, 77 and 1 of them count in the three samples.
    """
    monkeypatch.setattr(kernel, "INTERPRET", True)
    q, k, v = (
        jax.random.normal(jax.random.key(i), (3, 200, 2, 16)) for i in range(3)
    )
    mask = (
        jnp.arange(200) < jnp.array([200, 77, 1])[:, None]
        if masked
        else jnp.ones((3, 200), bool)
    )
    real = mask[..., None, None]

    def loss(path):
        out = lambda q, k, v: (
            path(
                q, k, v, mask=mask[:, None, None] if masked else None, causal=causal
            )
            * real
        )
        return jax.jit(
            lambda *x: (
                out(*x),
                jax.grad(lambda *x: jnp.sum(out(*x) ** 2), (0, 1, 2))(*x),
            )
        )

    (ours, grads), (theirs, others) = (
        loss(path)(q, k, v) for path in (splash, plain)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    for a, b in zip(grads, others, strict=True):
        assert jnp.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", [plain, blockwise, splash])
def test_values_may_be_narrower_than_keys(path, monkeypatch):
    """The kernel interpreted; against values that are padded with zeros to the keys' width."""
    monkeypatch.setattr(kernel, "INTERPRET", True)
    q = draw(1, 256, 2, 24)
    k = draw(1, 256, 2, 24, seed=1)
    v = draw(1, 256, 2, 16, seed=2)
    reference = lambda q, k, v: plain(q, k, jnp.pad(v, ((0, 0),) * 3 + ((0, 8),)))[
        ..., :16
    ]
    both = lambda f: jax.jit(
        lambda *x: (f(*x), jax.grad(lambda *x: jnp.sum(f(*x) ** 2), (0, 1, 2))(*x))
    )(q, k, v)
    for a, b in zip(
        jax.tree.leaves(both(path)), jax.tree.leaves(both(reference)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
def test_the_kernel_runs_per_shard(causal):
    """On a mesh the kernel sees its own rows and heads; here its interpreter-free stand-in is plain
    attention.
    """
    mesh = sharding.make_mesh(
        sharding.MeshShape(data=1, fsdp=2, sequence=2, tensor=2)
    )
    x = jax.ShapeDtypeStruct((4, 256, 4, 64), jnp.bfloat16)
    with sharding.use(mesh):
        text = jax.export.export(
            jax.jit(functools.partial(splash, causal=causal)), platforms=["tpu"]
        )(x, x, x).mlir_module()
        assert "tpu_custom_call" in text
        seen = jax.ShapeDtypeStruct((4, 1, 1, 200), bool)
        z = jax.ShapeDtypeStruct((4, 200, 4, 64), jnp.bfloat16)
        masked = lambda q, mask: splash(q, q, q, mask=mask, causal=causal)
        assert (
            "tpu_custom_call"
            in jax.export.export(jax.jit(masked), platforms=["tpu"])(
                z, seen
            ).mlir_module()
        )
        # heads that do not divide: the compiler's own attention
        y = jax.ShapeDtypeStruct((4, 256, 3, 64), jnp.bfloat16)
        text = jax.export.export(
            jax.jit(functools.partial(splash, causal=causal)), platforms=["tpu"]
        )(y, y, y).mlir_module()
        assert "tpu_custom_call" not in text


@pytest.mark.slow
def test_an_scm_step_at_16k_tokens(record_property):
    """A complete sCM step, forward mode and reverse over it, on a DiT of 128 x 128 patches.

    It never holds an N x N matrix (1 GiB a head).
    """
    from pathlib import Path

    from jaxdistill.core import sharding
    from jaxdistill.core.build import Role, experiment
    from jaxdistill.diffusion.denoiser import Denoiser, Velocity
    from jaxdistill.run import loop

    model = DiT(
        size=128,
        patch=1,
        channels=4,
        dim=32,
        depth=2,
        heads=2,
        remat="full",
    )
    arrays = dict(x="normal 128 128 4", cond="integers 10", null_cond="constant 10")
    net = dict(
        model=model,
        denoiser=Denoiser(param=Velocity(time_scale=1000.0)),
        init="fresh",
    )
    config = experiment(
        steps=1,
        data=Synthetic(batch_size=1, arrays=arrays),
        method=SCT(),
        roles=dict(student=Role(**net), weight=Role(model=TimeWeight())),
        mesh=MeshShape(fsdp=1),
    )
    made = loop.Experiment(config, Path("unused"))
    with sharding.use(made.mesh, made.settings.rules):
        programs, _ = loop.abstract_programs(made)
        state = programs.init(jax.random.key(0), {})
        batch = sharding.put_batch(made.mesh)(made.data.batch(0, slice(None)))
        compiled = programs.step.lower(
            state, batch, jax.random.key(1), (0,)
        ).compile()
        temporaries = compiled.memory_analysis().temp_size_in_bytes
        record_property("temporaries_mib", temporaries / 2**20)
        state, metrics = compiled(state, batch, jax.random.key(1))
    assert all(np.isfinite(v) for v in metrics.values()), metrics
    assert temporaries < 2**30
