"""The train step: global normalisation, roles, memory, gather, averages."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill.core.net import make_net
from jaxdistill.core.optim import Ema
from jaxdistill.core.step import init_state, make_train_step, overlay
from jaxdistill.core.types import Ctx, Means, Method, Out, Refused, Turn
from jaxdistill.models.denoisers.mlp import MLP
from jaxdistill.run.metrics import Pending

NET = make_net(MLP(width=8, depth=1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counted(Method):
    """A loss that is a sum over the valid entries of the batch, and a metric with its own count."""

    inits = {"student": None}
    frozen = ()

    @property
    def turns(self):
        return (Turn(("student",), self.loss),)

    def loss(self, net, ctx):
        value = ctx.batch["value"]
        mask = ctx.batch["mask"]
        scale = (
            sum(jnp.sum(w) for w in jax.tree.leaves(ctx.batch["w"]))
            if "w" in ctx.batch
            else 1.0
        )
        pull = jnp.sum(net.student(jnp.ones((1, 2)), jnp.ones(1)))
        total = (
            jnp.sum(value * mask) * (1 + pull - jax.lax.stop_gradient(pull)) * scale
        )
        return Out(
            total,
            {
                "seen": (jnp.sum(mask), jnp.float32(1)),
                "value": jnp.sum(value * mask),
            },
            count=jnp.sum(mask),
        )


def fit(method, nets, batch, *, steps=1, accumulate=1, lr=0.1, start=None, **kw):
    txs = {role: optax.sgd(lr) for role in method.inits}
    state = init_state(method, nets, txs, jax.random.key(0), start or {})
    step, active_at = make_train_step(
        method, nets, txs, accumulate=accumulate, **kw
    )
    metrics = None
    for i in range(steps):
        state, metrics = step(state, batch, jax.random.key(1), active_at(i))
    return state, metrics


def test_micro_batches_are_normalised_by_the_global_count():
    """{1} and {3, 3, 3} average to 2.5, not to the mean of means 2."""
    value = jnp.array([[1.0, 0, 0], [3, 3, 3]])
    batch = {"value": value, "mask": (value > 0).astype(jnp.float32)}
    for accumulate in (1, 2):
        _, metrics = fit(Counted(), {"student": NET}, batch, accumulate=accumulate)
        assert metrics["student/loss"] == 2.5
        assert metrics["student/value"] == 2.5
        # a count of one for each micro-batch
        assert metrics["student/seen"] == 4 / accumulate


def test_the_log_weighs_tokens_alike():
    """Steps of {1, 1, 1, 2} and {5} have the mean 10 / 5, where the mean of their means is 3.125;
    also with micro-batches.
    """
    batches = [
        {"value": jnp.array(v), "mask": jnp.array(v) > 0}
        for v in ([[1.0, 1], [1, 2]], [[5.0, 0], [0, 0]])
    ]
    for accumulate in (1, 2):
        pending = Pending(Counted().turns)
        for i, batch in enumerate(batches):
            metrics = fit(
                Counted(), {"student": NET}, batch, accumulate=accumulate
            )[1]
            assert metrics.counts.keys() == {
                "student/loss",
                "student/value",
                "student/seen",
            }
            pending.add(i, metrics)
        means = pending.flush()
        assert means["student/loss"] == means["student/value"] == 2.0
        # a count of one for each micro-batch
        assert means["student/seen"] == 5 / 2 / accumulate


def test_means_keep_their_counts_through_programs():
    means = jax.jit(lambda x: Means({"b": x, "a": 2 * x}, {"a": x + 1}))(
        jnp.float32(1)
    )
    assert (
        isinstance(means, Means)
        and dict(means) == {"a": 2, "b": 1}
        and means.counts == {"a": 2}
    )


def test_gradient_does_not_depend_on_the_micro_batches():
    value = jax.random.uniform(jax.random.key(0), (8, 3))
    batch = {"value": value, "mask": (value > 0.4).astype(jnp.float32)}
    whole, _ = fit(Counted(), {"student": NET}, batch)
    for accumulate in (2, 4, 8):
        parts, _ = fit(Counted(), {"student": NET}, batch, accumulate=accumulate)
        for a, b in zip(
            jax.tree.leaves(whole.params), jax.tree.leaves(parts.params)
        ):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_batch_without_valid_tokens_changes_nothing():
    batch = {"value": jnp.ones((2, 3)), "mask": jnp.zeros((2, 3))}
    state, metrics = fit(Counted(), {"student": NET}, batch)
    assert metrics["student/loss"] == 0
    assert metrics["student/grad_norm"] == 0
    assert np.isfinite(jax.tree.leaves(state.params)[0]).all()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoTurns(Method):
    """The fake moves at every step, the student at every third; the fake's turn remembers and
    gathers.
    """

    inits = {"student": "teacher", "fake": "teacher"}

    @property
    def turns(self):
        return (
            Turn(("fake",), self.fake_loss, gather=self.collect),
            Turn(("student",), self.student_loss, when=lambda step: step % 3 == 0),
        )

    def memory(self):
        return {"count": jnp.zeros(()), "other": jnp.ones(())}

    def collect(self, net, ctx):
        return {**ctx.batch, "x": net.student(ctx.batch["x"], jnp.ones(4)) + 1.0}

    def fake_loss(self, net, ctx):
        x = ctx.batch["x"]
        error = net.fake(x, jnp.ones(4)) - net.teacher(x, jnp.ones(4)) - x
        return Out(
            jnp.mean(error**2),
            {"input": jnp.mean(x)},
            {"count": ctx.memory["count"] + 1},
        )

    def student_loss(self, net, ctx):
        return Out(
            jnp.mean(
                (
                    net.student(ctx.batch["x"], jnp.ones(4))
                    - net.ema_student(ctx.batch["x"], jnp.ones(4))
                    - 1
                )
                ** 2
            )
        )


def test_turns_memory_and_gather():
    teacher = NET.init(jax.random.key(3))
    nets = {"student": NET, "teacher": NET, "fake": NET}
    x = jax.random.normal(jax.random.key(4), (4, 2))
    state, metrics = fit(
        TwoTurns(), nets, {"x": x}, steps=4, start={"teacher": teacher}
    )
    assert int(state.count["fake"]) == 4
    assert int(state.count["student"]) == 2
    assert state.memory["count"] == 4
    assert state.memory["other"] == 1
    assert metrics["fake/input"] != jnp.mean(x)
    for a, b in zip(
        jax.tree.leaves(teacher), jax.tree.leaves(state.frozen["teacher"])
    ):
        np.testing.assert_array_equal(a, b)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnData(Counted):
    """A loss on nothing but what the student itself has generated."""

    @property
    def turns(self):
        return (
            Turn(
                ("student",),
                lambda net, ctx: Out(jnp.sum(ctx.batch["x"])),
                gather=self.collect,
            ),
        )

    def collect(self, net, ctx):
        return {"x": net.student(ctx.batch["x"], jnp.ones(4))}


def test_gathered_data_carries_no_gradient():
    _, metrics = fit(OwnData(), {"student": NET}, {"x": jnp.ones((4, 2))})
    assert metrics["student/loss"] != 0
    assert metrics["student/grad_norm"] == 0


def test_average_follows_its_rule():
    batch = {"value": jnp.ones((1, 1)), "mask": jnp.ones((1, 1))}
    ema = Ema(rate=0.9, warmup=True)
    path = []
    for steps in range(4):
        path.append(
            fit(
                Counted(),
                {"student": NET},
                batch,
                steps=steps,
                emas={"student": ema},
            )[0]
        )
    average = jax.tree.leaves(path[0].params["student"])[0]
    for k, state in enumerate(path[1:], 1):
        beta = min(0.9, (1 + k) / (10 + k))
        average = (
            beta * average
            + (1 - beta) * jax.tree.leaves(state.params["student"])[0]
        )
        np.testing.assert_allclose(
            jax.tree.leaves(state.ema["student"])[0], average, rtol=1e-5, atol=1e-7
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnDecay(Counted):
    """A method that sets the decay of its average."""

    @property
    def turns(self):
        return tuple(
            dataclasses.replace(turn, decay=lambda k: 1 / (3 + k))
            for turn in super().turns
        )


def test_a_turn_may_give_the_decay():
    batch = {"value": jnp.ones((1, 1)), "mask": jnp.ones((1, 1))}
    path = [
        fit(OwnDecay(), {"student": NET}, batch, steps=steps)[0]
        for steps in range(4)
    ]
    average = jax.tree.leaves(path[0].params["student"])[0]
    for k, state in enumerate(path[1:], 1):
        average = (
            average / (3 + k)
            + (2 + k) / (3 + k) * jax.tree.leaves(state.params["student"])[0]
        )
        np.testing.assert_allclose(
            jax.tree.leaves(state.ema["student"])[0], average, rtol=1e-5, atol=1e-7
        )


def test_another_average_beside_it_is_refused():
    batch = {"value": jnp.ones((1, 1)), "mask": jnp.ones((1, 1))}
    with pytest.raises(
        Refused,
        match=r"config\.roles\.student\.ema=.*OwnDecay has a decay of its own",
    ):
        fit(OwnDecay(), {"student": NET}, batch, emas={"student": Ema(rate=0.5)})


def test_names_keep_draws_apart():
    ctx = Ctx({}, jax.random.key(0), jnp.int32(0), {})
    draw = lambda name: float(jax.random.normal(ctx.key(name)))
    assert draw("a") == draw("a") != draw("b")


def test_overlay_keeps_what_only_the_copy_has():
    small = NET.init(jax.random.key(0))
    large = make_net(MLP(width=8, depth=1, second_time=True)).init(
        jax.random.key(1)
    )
    merged = overlay(large, small, "student", "teacher")
    np.testing.assert_array_equal(merged["inp"]["kernel"], small["inp"]["kernel"])
    np.testing.assert_array_equal(
        merged["gap_embed"]["kernel"], large["gap_embed"]["kernel"]
    )
    with pytest.raises(Refused, match="no such weight"):
        overlay(small, large, "student", "teacher")
    with pytest.raises(Refused, match="shape"):
        overlay(
            make_net(MLP(width=4, depth=1)).init(jax.random.key(0)),
            small,
            "student",
            "teacher",
        )


def test_step_runs_bf16_networks_with_float32_weights():
    net = make_net(MLP(width=8, depth=1, dtype="bfloat16"))
    state, _ = fit(
        Counted(),
        {"student": net},
        {"value": jnp.ones((1, 1)), "mask": jnp.ones((1, 1))},
    )
    assert all(w.dtype == jnp.float32 for w in jax.tree.leaves(state.params))
    text = jax.make_jaxpr(net.apply)(
        state.params["student"], jnp.ones((1, 2)), jnp.ones(1)
    ).pretty_print()
    assert "bf16" in text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coupled(Counted):
    """A second role without gradients: after every update it moves half way to the student."""

    inits = {"student": None, "shadow": "student"}

    @property
    def turns(self):
        pull = lambda w, step: {
            "shadow": jax.tree.map(
                lambda s, p: 0.5 * s + 0.5 * p, w["shadow"], w["student"]
            )
        }
        return (dataclasses.replace(super().turns[0], after=pull),)


def test_after_an_update_weights_may_be_coupled():
    batch = {"value": jnp.array([[1.0], [2.0]]), "mask": jnp.ones((2, 1))}
    nets = {"student": NET, "shadow": NET}
    first, _ = fit(Coupled(), nets, batch)
    start, _ = fit(Coupled(), nets, batch, lr=0.0)
    moved = 0
    for shadow, new, old in zip(
        *(
            jax.tree.leaves(t)
            for t in (
                first.params["shadow"],
                first.params["student"],
                start.params["student"],
            )
        )
    ):
        np.testing.assert_allclose(shadow, 0.5 * (new + old), rtol=1e-6, atol=1e-7)
        moved += not np.array_equal(new, old)
    assert moved and first.count["shadow"] == 0
