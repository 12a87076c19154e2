"""Clipping that begins late or follows a percentile, and updates that are not finite."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill.core.bank import bank
from jaxdistill.core.gradients import Skipping
from jaxdistill.core.net import make_net
from jaxdistill.core.optim import CopyEma, Optimizer
from jaxdistill.core.step import init_state, make_train_step
from jaxdistill.core.types import Method, Out, Refused, Turn
from jaxdistill.models.denoisers.mlp import MLP
from jaxdistill.run.metrics import NonFinite, Pending

NET = make_net(MLP(width=8, depth=1))
WEIGHTS = {"a": jnp.zeros(2)}
BANK = {"a": jnp.zeros((2, 2))}


def norms_after(optimizer, norms):
    """Norms of SGD's updates by gradients of these norms, [] or [K] each."""
    norms = np.float32(norms)
    is_bank = norms.ndim == 2
    tx = optimizer.make(len(norms), bank=is_bank)
    weights = BANK if is_bank else WEIGHTS
    state = tx.init(weights)
    update = jax.jit(tx.update)
    found = []
    for norm in norms:
        grads = {"a": norm[..., None] * jnp.array([0.6, 0.8])}
        updates, state = update(grads, state, weights)
        found.append(np.linalg.norm(updates["a"], axis=-1))
    return np.stack(found)


SGD = Optimizer(algorithm="sgd", lr=1.0)


def test_clipping_may_begin_later():
    later = dataclasses.replace(SGD, clip_from=2)
    np.testing.assert_allclose(
        norms_after(later, [5, 0.5, 5, 0.5]), [5, 0.5, 1, 0.5], rtol=1e-6
    )
    by_value = dataclasses.replace(later, clip=0.0, clip_value=0.1)
    found = norms_after(by_value, [5, 5, 5])
    np.testing.assert_allclose(found, [5, 5, 0.1 * 2**0.5], rtol=1e-6)


NORMS = [4.0, 1.0, 3.0, 2.0, 8.0, 1.5, 20.0, 1.0]


def by_percentile(norms, clip, percentile, window):
    """The definition: at most `clip`, and that percentile of the last norms if there are enough."""
    found = []
    for i, norm in enumerate(norms):
        limit = clip
        if i >= window:
            limit = min(clip, np.percentile(norms[i - window : i], percentile))
        found.append(min(norm, limit))
    return found


@pytest.mark.parametrize(("clip", "limit"), [(0.0, np.inf), (5.0, 5.0), (3.0, 3.0)])
def test_the_limit_is_a_percentile_of_the_last_norms(clip, limit):
    optimizer = dataclasses.replace(
        SGD, clip=clip, clip_percentile=75, clip_window=3
    )
    wanted = by_percentile(NORMS, limit, 75, 3)
    np.testing.assert_allclose(norms_after(optimizer, NORMS), wanted, rtol=1e-6)
    assert wanted != [min(norm, limit) for norm in NORMS]


def test_members_have_percentiles_of_their_own():
    optimizer = dataclasses.replace(
        SGD, clip=5.0, clip_percentile=75, clip_window=3
    )
    other = NORMS[::-1]
    found = norms_after(optimizer, list(zip(NORMS, other)))
    for k, norms in enumerate((NORMS, other)):
        wanted = by_percentile(norms, 5.0, 75, 3)
        np.testing.assert_allclose(found[:, k], wanted, rtol=1e-6)


def test_norms_that_are_not_finite_are_not_remembered():
    optimizer = dataclasses.replace(
        SGD, clip=5.0, clip_percentile=100, clip_window=2, nonfinite="zero"
    )
    tx = optimizer.make(4)
    state = tx.init(WEIGHTS)
    for g in (1.0, np.nan, 2.0, np.inf, 4.0):
        grads = {"a": jnp.array([g, 0.0])}
        updates, state = tx.update(
            grads, state, WEIGHTS, finite=jnp.isfinite(jnp.float32(g))
        )
        assert np.isfinite(updates["a"]).all()
    np.testing.assert_allclose(updates["a"], [-2.0, 0.0])
    assert sorted(state.inner[0].norms.tolist()) == [2.0, 4.0]
    assert int(state.zeroed) == 2


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            dict(clip_percentile=101.0),
            "clip_percentile=101.0: expected a number from 0 to",
        ),
        (
            dict(clip_percentile=-1.0),
            "clip_percentile=-1.0: expected a number from 0 to",
        ),
        (dict(clip_window=0), "clip_window=0: expected a positive integer"),
        (
            dict(clip_window=10),
            "clip_window=10 does not act on .*: expected 1000 there",
        ),
        (dict(clip_from=-1), "clip_from=-1: expected 0 or a positive integer"),
        (
            dict(clip_from=1, clip=0.0),
            "clip_from=1 does not act where nothing is clipped",
        ),
        (dict(nonfinite="skipp"), "nonfinite='skipp': did you mean 'skip'"),
        (dict(nonfinite=True), "nonfinite=True: expected a name"),
    ],
)
def test_values_without_a_meaning_are_refused(fields, said):
    with pytest.raises(Refused, match=rf"^optimizer\.{said}[^\n]*$"):
        Optimizer(**fields)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fragile(Method):
    """A loss whose value and whose gradient a batch may make other than finite, each alone."""

    inits = {"student": None}
    frozen = ()

    def loss(self, net, ctx):
        x = ctx.batch["x"]
        found = jnp.sum(net.student(x, jnp.ones(len(x))) ** 2)
        zero = found - jax.lax.stop_gradient(found)
        slope = jnp.sum(ctx.batch["grad"])
        steep = jnp.isnan(slope)  # then an infinite slope: the root's at 0
        root = jnp.sqrt(jnp.where(steep, zero, 1.0))
        more = jnp.where(steep, root, zero * jnp.nan_to_num(slope))
        value = found + more + jnp.sum(ctx.batch["value"])
        return Out(
            value,
            {"other": jnp.sum(x), "odd": jnp.sum(ctx.batch["value"])},
            {"calls": ctx.memory["calls"] + value},
        )

    def memory(self):
        return {"calls": jnp.zeros(())}


X = np.random.default_rng(0).standard_normal((4, 2)).astype(np.float32)
FINE = {"x": X, "grad": np.zeros(4, np.float32), "value": np.zeros(4, np.float32)}


def with_value(name, value):
    changed = FINE[name].copy()
    changed[1] = value
    return {**FINE, name: changed}


BAD = {
    "gradient": with_value("grad", np.nan),
    "overflow": with_value("grad", 1e25),
    "loss": with_value("value", np.inf),
}


@functools.cache
def program(optimizer, accumulate=1):
    """(first state, train step) of `Fragile`."""
    method = Fragile()
    txs = {"student": optimizer.make(10, axes=NET.axes)}
    state = init_state(method, {"student": NET}, txs, jax.random.key(0), {})
    step, _ = make_train_step(
        method,
        {"student": NET},
        txs,
        emas={"student": CopyEma(rate=0.5)},
        accumulate=accumulate,
    )
    return jax.device_get(state), step


def run(optimizer, batches, accumulate=1):
    """(last state, metrics of each step)."""
    state, step = program(optimizer, accumulate)
    found = []
    for batch in batches:
        state, metrics = step(state, batch, jax.random.key(1), (0,))
        found.append(metrics)
    return jax.device_get(state), found


def same(a, b):
    return all(
        np.array_equal(x, y)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


ADAMW = Optimizer(lr=1e-2, weight_decay=0.1, warmup=5)
SKIP = dataclasses.replace(
    ADAMW, nonfinite="skip", clip_percentile=50, clip_window=2
)
ZERO = dataclasses.replace(ADAMW, nonfinite="zero")


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("bad", BAD)
def test_an_update_that_is_not_finite_is_left_out(bad, accumulate):
    """The state is that of a run without the step, but for the number of steps."""
    state, metrics = run(SKIP, [FINE, BAD[bad], FINE, FINE], accumulate)
    without, _ = run(SKIP, [FINE, FINE, FINE], accumulate)
    assert int(state.opt["student"].skipped) == 1
    assert same(state.opt["student"].inner, without.opt["student"].inner)
    for part in ("params", "ema", "count", "memory"):
        assert same(getattr(state, part), getattr(without, part))
    assert int(state.step) == 4 and int(state.count["student"]) == 3
    assert [float(m["student/skipped"]) for m in metrics] == [0, 1, 0, 0]


def test_a_skipped_update_keeps_every_bit():
    weights = {"a": jnp.array([-0.0, 3.0])}
    tx = dataclasses.replace(SGD, nonfinite="skip").make(1)
    grads = {"a": jnp.array([jnp.nan, 1.0])}
    updates, _ = tx.update(grads, tx.init(weights), finite=jnp.array(False))
    after = jax.jit(optax.apply_updates)(weights, updates)["a"]
    assert np.signbit(after).tolist() == [True, False]


def test_metrics_of_a_skipped_update_do_not_count():
    for bad in BAD.values():
        pending = Pending(Fragile().turns)
        _, metrics = run(SKIP, [FINE, bad, FINE, bad])
        _, alone = run(SKIP, [FINE, FINE])
        for i, values in enumerate(metrics):
            pending.add(i, values)
        means = pending.flush()
        assert means.pop("student/skipped") == 0.5
        for name, value in means.items():
            wanted = np.mean([float(m[name]) for m in alone])
            assert value == pytest.approx(wanted, rel=1e-6)
        pending.add(4, metrics[1])
        assert pending.flush() == {"student/skipped": 1.0}


def test_the_default_stops_the_run():
    for bad in BAD.values():
        pending = Pending(Fragile().turns)
        pending.add(7, run(ADAMW, [bad])[1][0])
        with pytest.raises(NonFinite, match="at step 7"):
            pending.flush()


def test_the_default_is_the_chain_of_before():
    """The same states, so that checkpoints restore, and the same bits."""

    def matrices(weights):
        return jax.tree.map(lambda w: w.ndim >= 2, weights)

    lr = optax.constant_schedule(1e-3)
    adamw = optax.adamw(lr, weight_decay=0.1, mask=matrices)
    theirs = optax.chain(optax.clip_by_global_norm(1.0), adamw)
    ours = Optimizer(lr=1e-3, weight_decay=0.1).make(3, axes=NET.axes)
    weights = NET.init(jax.random.key(0))
    grads = jax.tree.map(lambda w: w + 0.1, weights)
    mine = ours.init(weights)
    their = theirs.init(weights)
    for _ in range(2):
        assert jax.tree.structure(mine) == jax.tree.structure(their)
        assert same(mine, their)
        a, mine = ours.update(grads, mine, weights)
        b, their = theirs.update(grads, their, weights)
        assert same(a, b)


def test_finite_updates_are_those_of_the_default():
    skip = dataclasses.replace(ADAMW, nonfinite="skip")
    plain, _ = run(ADAMW, [FINE] * 3)
    for optimizer in (skip, ZERO):
        state, _ = run(optimizer, [FINE] * 3)
        for x, y in zip(
            jax.tree.leaves(state.params),
            jax.tree.leaves(plain.params),
            strict=True,
        ):
            np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("bad", BAD)
def test_entries_that_are_not_finite_are_replaced(bad):
    """Clipping leaves no entry of such a gradient, so that moments and decay alone move weights."""
    state, metrics = run(ZERO, [FINE, BAD[bad], FINE])
    assert int(state.count["student"]) == 3
    assert int(state.opt["student"].zeroed) == 1
    assert all(np.isfinite(w).all() for w in jax.tree.leaves(state.params))
    assert [float(m["student/zeroed"]) for m in metrics] == [0, 1, 0]
    pending = Pending(Fragile().turns)
    pending.add(1, metrics[1])
    means = pending.flush()
    assert all(np.isfinite(list(means.values())))
    assert ("student/loss" in means) == (bad != "loss")
    assert ("student/grad_norm" in means) == (bad == "loss")


def test_without_clipping_finite_entries_stay():
    tx = dataclasses.replace(SGD, clip=0.0, nonfinite="zero").make(1)
    grads = {"a": jnp.array([np.nan, 2.0])}
    updates, _ = tx.update(grads, tx.init(WEIGHTS), finite=jnp.array(False))
    np.testing.assert_array_equal(updates["a"], [0.0, -2.0])


THREE = bank(NET, 3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Members(Method):
    """Members side by side; a batch may make one member's loss other than finite."""

    inits = {"student": None}
    frozen = ()

    def loss(self, net, ctx):
        x = jnp.stack([ctx.batch["x"]] * 3)
        found = net.student(x, jnp.ones(x.shape[:2]))
        losses = jnp.sum(found**2, axis=(1, 2)) * ctx.batch["scale"][0]
        return Out(jnp.sum(losses))


def run_bank(scales):
    method = Members()
    optimizer = dataclasses.replace(SKIP, clip_window=1)
    txs = {"student": optimizer.make(10, bank=True, axes=THREE.axes)}
    nets = {"student": THREE}
    state = init_state(method, nets, txs, jax.random.key(0), {})
    step, _ = make_train_step(method, nets, txs)
    metrics = []
    for scale in scales:
        rows = np.tile(np.float32(scale), (4, 1))
        batch = {"x": X, "scale": rows}
        state, found = step(state, batch, jax.random.key(1), (0,))
        metrics.append(found)
    return jax.device_get(state), metrics


def test_a_member_is_left_out_alone():
    """Its weights, moments and average are those of before the step; the others move on."""
    ones = [1, 1, 1]
    first, _ = run_bank([ones])
    hurt, metrics = run_bank([ones, [1, np.nan, 1]])
    whole, _ = run_bank([ones, ones])
    member = lambda tree, k: [w[k] for w in jax.tree.leaves(tree) if np.ndim(w)]
    for part in ("params", "ema"):
        a, b, c = (getattr(s, part) for s in (first, hurt, whole))
        assert same(member(b, 1), member(a, 1))
        assert same(member(b, 0), member(c, 0)) and same(member(b, 2), member(c, 2))
    inner = lambda state: state.opt["student"].inner
    assert same(member(inner(hurt), 1), member(inner(first), 1))
    assert same(member(inner(hurt), 0), member(inner(whole), 0))
    assert hurt.opt["student"].skipped.tolist() == [0, 1, 0]
    assert int(hurt.count["student"]) == 2
    assert float(metrics[1]["student/skipped"]) == pytest.approx(1 / 3)
    assert float(metrics[1].counts["student/loss"]) == 0
    assert float(metrics[1].counts["student/grad_norm"]) == 1


def test_a_bank_without_a_finite_member_stands_still():
    first, _ = run_bank([[1, 1, 1]])
    hurt, _ = run_bank([[1, 1, 1], [np.nan, np.inf, np.nan]])
    assert same(hurt.params, first.params)
    assert same(hurt.opt["student"].inner, first.opt["student"].inner)
    assert int(hurt.count["student"]) == 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair(Fragile):
    """A turn of two roles."""

    inits = {"student": None, "head": None}

    @property
    def turns(self):
        return (Turn(("student", "head"), self.loss),)

    def loss(self, net, ctx):
        out = super().loss(net, ctx)
        return out._replace(loss=out.loss + jnp.sum(net.head(X, jnp.ones(4)) ** 2))


def test_roles_of_one_turn_choose_for_themselves():
    """The head's gradient is finite: it moves; and as it stops the run, a loss that is not does."""
    method = Pair()
    nets = {"student": NET, "head": NET}
    txs = {
        "student": dataclasses.replace(ADAMW, nonfinite="skip").make(5),
        "head": ADAMW.make(5),
    }
    state = init_state(method, nets, txs, jax.random.key(0), {})
    first = jax.device_get(state)
    assert isinstance(state.opt["student"], Skipping)
    step, _ = make_train_step(method, nets, txs)
    state, metrics = step(state, BAD["gradient"], jax.random.key(1), (0,))
    assert same(state.params["student"], first.params["student"])
    assert not same(state.params["head"], first.params["head"])
    assert int(state.count["head"]) == 1 and int(state.count["student"]) == 0
    assert np.isfinite(list(metrics.values())).all()
    state, metrics = step(state, BAD["loss"], jax.random.key(1), (0,))
    assert same(state.params["student"], first.params["student"])
    pending = Pending(method.turns)
    pending.add(3, metrics)
    with pytest.raises(NonFinite, match=re.escape("student/loss")):
        pending.flush()
