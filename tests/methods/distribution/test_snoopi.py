"""SNOOPI: random guidance that both networks share, NASA in training, the clamped CLIP loss."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxdistill.core.lora import adapt
from jaxdistill.core.needs import check_needs
from jaxdistill.core.net import make_net
from jaxdistill.core.step import bind
from jaxdistill.core.types import Ctx, Refused
from jaxdistill.diffusion.denoiser import Denoiser
from jaxdistill.diffusion.guidance import Constant, Random, RandomEach
from jaxdistill.diffusion.process import Flow
from jaxdistill.methods.distribution.snoopi import (
    PGSB,
    ClippedNasaT,
    ClippedPGSB,
    NasaT,
)
from jaxdistill.methods.distribution.swiftbrush import SwiftBrush
from jaxdistill.models.denoisers.mlp import MLP
from jaxdistill.models.denoisers.unet import UNet
from jaxdistill.models.vision.clip import ClipVisionProjected
from jaxdistill.models.vision.judges import Identity
from jaxdistill.objectives.pixels import CLIP, Preprocess
from tools.first_steps import first_steps

CLASSES = 3
N = 8
WRAP = functools.partial(Denoiser().wrap, process=Flow())
MLPS = make_net(MLP(width=8, depth=1, classes=CLASSES), wrap=WRAP)
LABELS = {"cond": jnp.arange(N) % CLASSES, "null_cond": jnp.full(N, CLASSES)}
# images are their own embeddings, every text is (1, 1)
TEXTS = {"text_embed": jnp.ones((N, 2))}


class Own(nnx.Module):
    """A tower whose states and summaries are its images."""

    def __call__(self, x):
        return x

    def pool(self, states):
        return states


FIXED = {"decoder": make_net(Identity()), "judge": make_net(lambda rngs: Own())}
NETS = {
    "teacher": MLPS,
    "student": MLPS,
    "fake": adapt(MLPS, base="teacher", rank=2),
    **FIXED,
}
PLAIN = functools.partial(ClippedPGSB, preprocess=Preprocess())
X0 = jax.random.normal(jax.random.key(9), (N, 2))


def start(b=0.0):
    """First weights by role; the adapters' second factor is `b` throughout."""
    params = {
        role: NETS[role].init(jax.random.key(i))
        for i, role in enumerate(("student", "teacher", "fake", *FIXED))
    }
    return {
        **params,
        "fake": {
            path: {"a": p["a"], "b": p["b"] + b}
            for path, p in params["fake"].items()
        },
    }


KEY = jax.random.key(3)


def matching(method, params):
    """Gradient of the samples X0, times their number of entries: g."""
    ctx = Ctx(LABELS, KEY, 0, {})
    return (
        jax.grad(lambda x: method.match(bind(NETS, params), ctx, x)[0])(X0)
        * X0.size
    )


def constant(k, fake=None):
    return PGSB(
        guidance=Constant(scale=k),
        fake_guidance=Constant(scale=k if fake is None else fake),
    )


def run(method, params, steps=5):
    """(weights, losses) of five engine steps by plain gradient descent."""
    nets = {role: NETS[role] for role in (*method.inits, *method.frozen)}
    batch = {"x": jnp.zeros((N, 2)), **LABELS, **TEXTS}
    start = {role: params[role] for role in nets}
    states, losses = first_steps(method, nets, optax.sgd(1e-1), start, batch, steps)
    return states[-1].params, losses


def follows(ours, host):
    """Weights, and the host's losses."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6),
        ours[0],
        host[0],
    )
    for mine, theirs in zip(ours[1], host[1], strict=True):
        for name in ("student/match", "fake/denoise", "student/denoise"):
            if name in theirs:
                np.testing.assert_allclose(mine[name], theirs[name], rtol=1e-6)


@pytest.mark.full
def test_equal_ends_are_swiftbrush(context):
    """kmin = kmax = C: bit-equal gradients, and five steps with the same losses and weights."""
    params = start(0.3)
    c = 2.7
    scale = Random(low=c, high=c)
    ours = PGSB(guidance=scale, fake_guidance=scale)
    host = SwiftBrush(guidance=c, fake_guidance=c)
    net = bind(NETS, params)
    ctx = context(jnp.zeros((N, 2)), **LABELS)
    # operation by operation: nothing is reordered
    gradient = lambda method: jax.grad(lambda x: method.match(net, ctx, x)[0])(X0)
    np.testing.assert_array_equal(gradient(ours), gradient(host))
    follows(run(ours, params), run(host, params))


def test_gradient_is_affine_in_the_scale():
    """Its mean over k ~ U(a, b) is that at (a + b) / 2, its variance (b - a)^2 / 12 |dg/dk|^2."""
    params, (a, b), n = start(0.3), (0.5, 4.0), 16
    grid = a + (b - a) * (np.arange(n) + 0.5) / n
    at = jax.jit(jax.vmap(lambda k: matching(constant(k), params)))
    g = np.asarray(at(grid), np.float64)
    middle = at(np.array([(a + b) / 2]))[0]
    np.testing.assert_allclose(g.mean(0), middle, rtol=1e-4, atol=1e-6)
    net = bind(NETS, params)
    ctx = Ctx(LABELS, KEY, 0, {})
    xt, t, _ = PGSB().diffuse(X0, PGSB().match_times, ctx, "match")
    gap = lambda role: (
        getattr(net, role)(xt, t, LABELS["cond"]).eps
        - getattr(net, role)(xt, t, LABELS["null_cond"]).eps
    )
    slope = np.asarray(t[:, None] ** 2 * (gap("teacher") - gap("fake")))
    np.testing.assert_allclose(
        g.var(0),
        (b - a) ** 2 / 12 * (1 - 1 / n**2) * slope**2,
        rtol=1e-3,
        atol=1e-6,
    )


def test_both_networks_see_the_same_scale(context):
    """From the ratio of guided to plain answers; it is one for the batch, and another at another
    step.
    """

    def labelled(x, t, cond):
        return Flow().from_eps(
            jnp.where((cond == CLASSES)[:, None], 0.0, 1.0) + 0 * x, x, t
        )

    net = SimpleNamespace(teacher=labelled, fake=labelled)
    scales = []
    for seed in range(20):
        ctx = context(jnp.zeros((N, 2)), seed=seed, **LABELS)
        real, fake = (
            read(net, X0, jnp.full(N, 0.5), ctx).eps
            for read in (PGSB().real, PGSB().fake)
        )
        np.testing.assert_array_equal(real, fake)
        assert len(np.unique(real)) == 1 and 0.5 <= real[0, 0] <= 4
        scales.append(float(real[0, 0]))
    assert len(set(scales)) == 20
    each = PGSB(guidance=RandomEach(), fake_guidance=RandomEach())
    real, fake = (
        read(net, X0, jnp.full(N, 0.5), ctx).eps for read in (each.real, each.fake)
    )
    np.testing.assert_array_equal(real, fake)
    assert len(np.unique(real)) == N


def test_fresh_adapters_leave_the_student_alone(context):
    """B = 0: no gradient at any scale, since both share it, but one where only the teacher's scale
    is random.
    """
    net = bind(NETS, start())
    gradient = lambda method, seed: jax.grad(
        lambda x: method.match(
            net, context(jnp.zeros((N, 2)), seed=seed, **LABELS), x
        )[0]
    )(X0)
    assert not any(np.any(gradient(PGSB(), seed)) for seed in range(3))
    assert np.any(gradient(PGSB(fake_guidance=Constant(scale=4.5)), 0))


def test_the_adapters_never_see_the_scale(context):
    calls = []

    def fake(x, t, cond):
        calls.append(cond)
        return Flow().from_v(x, x, t)

    method = PGSB(fake_dropout=0.0)
    method.denoise(
        SimpleNamespace(fake=fake),
        context(jnp.zeros((N, 2)), t=jnp.ones(N), **LABELS),
        X0,
    )
    assert len(calls) == 1
    np.testing.assert_array_equal(calls[0], LABELS["cond"])


def clip_gradient(method, x0, step, context):
    """Gradient of the samples through the CLIP term alone."""
    ctx = context(jnp.zeros_like(x0), step=step, text_embed=jnp.ones_like(x0))
    still = lambda x, t, cond=None: Flow().from_eps(0 * x, x, t)
    net = SimpleNamespace(
        teacher=still,
        fake=still,
        decoder=lambda x, method: x,
        judge=lambda x, method="": x,
    )
    loss = lambda x: method.student_terms(net, ctx, x)[0]
    return jax.grad(loss)(x0), method.student_terms(net, ctx, x0)[1]["clip"]


def test_clip_is_clamped_for_each_sample(context):
    """cos of (1, 0), (1, 1), (-1, -1), (0, -1) with (1, 1): .707, 1, -1, -.707; tau .37 asks no
    more of the first two.
    """
    x0 = jnp.array([[1.0, 0.0], [1.0, 1.0], [-1.0, -1.0], [0.0, -1.0]])
    method = PLAIN(clip_weight=0.1, clip_steps=100)
    grad, clip = clip_gradient(method, x0, 0, context)
    assert not np.any(grad[:2]) and np.any(grad[3])
    assert float(clip) == pytest.approx((0.37 + 1 + 0.37 + 0.5**0.5) / 4, rel=1e-5)
    cos = lambda x: jnp.sum(x) / jnp.linalg.norm(x) / 2**0.5
    np.testing.assert_allclose(grad[3], -0.1 / 4 * jax.grad(cos)(x0[3]), rtol=1e-5)
    assert not np.any(
        clip_gradient(dataclasses.replace(method, clip_tau=-1.1), x0, 0, context)[0]
    )


@pytest.mark.parametrize(
    ("step", "left"), [(0, 1.0), (25, 0.75), (100, 0.0), (1000, 0.0)]
)
def test_clip_decays_to_nothing(context, step, left):
    x0 = jnp.array([[0.0, -1.0]])
    method = PLAIN(clip_steps=100)
    at, first = (clip_gradient(method, x0, s, context)[0] for s in (step, 0))
    np.testing.assert_allclose(at, left * first, rtol=1e-6)


def test_without_clip_it_follows_its_host():
    params = start(0.3)
    assert (
        ClippedPGSB().guidance == PGSB().guidance
        and ClippedNasaT().nasa == NasaT().nasa
    )
    assert (
        ClippedPGSB.frozen == ClippedNasaT.frozen == ("teacher", "decoder", "judge")
        and ClippedNasaT().preprocess == CLIP
    )
    follows(run(PLAIN(clip_weight=0.0), params), run(PGSB(), params))
    moved = run(PLAIN(clip_weight=10.0), params)[0]
    plain = run(PGSB(), params)[0]
    assert any(
        np.any(a != b)
        for a, b in zip(
            jax.tree.leaves(moved["student"]), jax.tree.leaves(plain["student"])
        )
    )


TEXT = 6
WORDS = 4


def prompts(n=N, seed=0):
    rng = np.random.default_rng(seed)
    text = lambda: jnp.asarray(rng.standard_normal((n, WORDS, TEXT)), jnp.float32)
    draw = lambda: {
        "text": text(),
        "mask": jnp.asarray(rng.random((n, WORDS)) < 0.8),
    }
    batch = {"cond": draw(), "null_cond": draw(), "negative_cond": draw()}
    return {
        name: {**c, "mask": c["mask"].at[:, 0].set(True)}
        for name, c in batch.items()
    }


def recorder(seen):
    def net(x, t, cond):
        seen.append(cond)
        return Flow().from_v(x, x, t)

    return net


def test_who_sees_the_negative_prompt(context):
    """The student in its attention, the teacher in its guidance, the fake score nowhere."""
    method = NasaT(fake_dropout=0.0)
    batch = prompts()
    seen = {role: [] for role in ("student", "teacher", "fake")}
    net = SimpleNamespace(**{role: recorder(calls) for role, calls in seen.items()})
    ctx = context(jnp.zeros((N, 2)), **batch)
    ctx = dataclasses.replace(ctx, batch=method.simulate(net, ctx))
    method.loss(net, ctx)
    for cond in seen["student"]:
        np.testing.assert_array_equal(cond["text"], batch["cond"]["text"])
        np.testing.assert_array_equal(
            cond["negative"], batch["negative_cond"]["text"]
        )
        np.testing.assert_array_equal(
            cond["negative_mask"], batch["negative_cond"]["mask"]
        )
        assert (
            cond["nasa"].shape == (N,)
            and len(np.unique(cond["nasa"])) == 1
            and 0 < cond["nasa"][0] < 1
        )
    pair = lambda role, other: np.concatenate(
        [batch["cond"]["text"], batch[other]["text"]]
    )
    np.testing.assert_array_equal(
        seen["teacher"][0]["text"], pair("teacher", "negative_cond")
    )
    guided, alone = seen["fake"]
    np.testing.assert_array_equal(guided["text"], pair("fake", "null_cond"))
    np.testing.assert_array_equal(alone["text"], batch["cond"]["text"])
    assert all(
        set(c) == {"text", "mask"} for c in (*seen["teacher"], guided, alone)
    )
    other = dataclasses.replace(context(jnp.zeros((N, 2)), seed=1, **batch))
    assert (
        method.simulate(net, other)["active"]["nasa"][0]
        != seen["student"][0]["nasa"][0]
    )


def test_nasa_at_every_step_of_a_chain(context):
    seen = []
    method = NasaT(student_times=(1.0, 0.5))
    ctx = context(jnp.zeros((N, 2)), **prompts())
    # its loop is traced, not run
    method.simulate(SimpleNamespace(student=recorder(seen)), ctx)
    assert seen and all("nasa" in cond for cond in seen)


def test_negative_equal_to_null_and_no_strength_is_pg_sb(context):
    batch = prompts()
    batch["negative_cond"] = batch["null_cond"]
    net = lambda gain: (
        lambda x, t, cond: Flow().from_v(
            gain * x
            + jnp.mean(cond["text"] * cond["mask"][..., None], (1, 2))[:, None],
            x,
            t,
        )
    )
    nets = SimpleNamespace(student=net(0.1), teacher=net(0.2), fake=net(0.3))
    ctx = context(jnp.zeros((N, 2)), **batch)
    losses = []
    for method in (NasaT(nasa=Constant(scale=0.0)), PGSB()):
        gathered = dataclasses.replace(ctx, batch=method.simulate(nets, ctx))
        losses.append(
            {k: float(v) for k, v in method.loss(nets, gathered).metrics.items()}
        )
    assert losses[0] == losses[1]


@pytest.mark.full
def test_trains_a_unet():
    """Two steps of all of it: adapters on queries and values of a U-Net with text, NASA, CLIP; only
    student and adapters move.
    """
    unet = make_net(
        UNet(
            size=4,
            channels=2,
            widths=(8,),
            layers=1,
            depths=(1,),
            heads=(2,),
            text_dim=TEXT,
            groups=4,
        ),
        wrap=WRAP,
    )
    fake = adapt(
        unet,
        base="teacher",
        rank=2,
        alpha=4.0,
        targets=r".*attn[12]/to_[qv]/kernel",
    )
    judge = make_net(
        ClipVisionProjected(
            size=6, channels=2, dim=8, mlp=8, heads=2, depth=1, projection=5
        )
    )
    nets = {
        "student": unet,
        "teacher": unet,
        "fake": fake,
        "decoder": make_net(Identity()),
        "judge": judge,
    }
    method = ClippedNasaT(shape=(4, 4, 2), preprocess=Preprocess(size=6))
    start = {
        "teacher": unet.init(jax.random.key(7)),
        "decoder": {},
        "judge": judge.init(jax.random.key(6)),
    }
    batch = {
        **prompts(n=4),
        "text_embed": jax.random.normal(jax.random.key(5), (4, 5)),
    }
    states, metrics = first_steps(method, nets, optax.adam(1e-3), start, batch, 2)
    assert metrics[-1]["student/clip"] > 0
    assert all(np.isfinite(v) for row in metrics for v in row.values()), metrics
    assert (
        metrics[-1]["student/grad_norm"] > 0 and metrics[-1]["fake/grad_norm"] > 0
    )
    before = states[0]
    after = states[-1]
    jax.tree.map(np.testing.assert_array_equal, before.frozen, after.frozen)
    assert {
        path.split("/")[-3] + "/" + path.split("/")[-2] for path in fake.shapes
    } == {f"attn{i}/to_{m}" for i in (1, 2) for m in "qv"}
    moved = lambda role: any(
        np.any(a != b)
        for a, b in zip(
            jax.tree.leaves(before.params[role]),
            jax.tree.leaves(after.params[role]),
        )
    )
    assert moved("student") and moved("fake")


def test_batches_hold_what_the_losses_read():
    """Prompts as texts where one may be negative, and their embeddings for the CLIP loss."""
    assert set(ClippedNasaT(shape=(4, 4, 2)).needs) == {
        "cond",
        "negative_cond",
        "text_embed",
    }
    assert set(PGSB().needs) == {"x"} and PGSB(shape=(2,)).needs == {}
    data = {
        name: jnp.zeros(shape)
        for name, shape in [("cond", (4, 7, 3)), ("negative", (4, 5, 3))]
    }
    spec = {
        name: {"text": jax.ShapeDtypeStruct(v.shape, v.dtype)}
        for name, v in data.items()
    }
    needs = NasaT(shape=(2,)).needs
    check_needs(
        {"cond": spec["cond"], "negative_cond": spec["negative"]},
        needs,
        "NasaT",
        "data",
    )
    with pytest.raises(Refused, match="data: NasaT needs 'negative_cond'"):
        check_needs({"cond": spec["cond"]}, needs, "NasaT", "data")
