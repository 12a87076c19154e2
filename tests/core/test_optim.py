"""Optimisers, schedules and averages (00-foundations, section 9)."""

import dataclasses
import functools
import importlib
import inspect
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill import models
from jaxdistill.core import build
from jaxdistill.core.gradients import clip_by_member_norm
from jaxdistill.core.net import make_net, paths
from jaxdistill.core.optim import (
    CopyEma,
    Ema,
    HalfLifeEma,
    Optimizer,
    PowerEma,
    RampEma,
    decayed,
    power_gamma,
)
from jaxdistill.core.types import Refused
from jaxdistill.models.denoisers.edm import DhariwalUNet, SongUNet
from jaxdistill.models.denoisers.mlp import MLP
from jaxdistill.models.denoisers.wan import Wan
from jaxdistill.models.heads import Discriminator


@pytest.mark.parametrize(("width", "gamma"), [(0.05, 16.972), (0.10, 6.937)])
def test_power_gamma(width, gamma):
    """EDM2's table, which has three decimals, and the formula of the width, whose inverse it is."""
    assert power_gamma(width) == pytest.approx(gamma, abs=6e-4)
    g = power_gamma(width)
    assert (g + 1) ** 0.5 / (g + 2) / (g + 3) ** 0.5 == pytest.approx(
        width, rel=1e-9
    )


def run(rule, values):
    average = np.float64(-123.0)
    for k, value in enumerate(values, 1):
        beta = float(rule.decay(jnp.int32(k)))
        average = beta * average + (1 - beta) * value
    return average


def test_power_average_starts_at_the_first_weights_and_weighs_by_a_power():
    rule = PowerEma(sigma_rel=0.10)
    gamma = power_gamma(0.10)
    n = 2000
    assert float(rule.decay(1)) == 0
    assert run(rule, np.full(50, 3.0)) == pytest.approx(3.0, rel=1e-5)
    t = np.arange(1, n + 1)
    weights = t**gamma
    expected = np.sum(weights * t) / np.sum(weights)
    # the power law holds up to O(gamma / k)
    assert run(rule, t) == pytest.approx(expected, rel=(gamma + 1) / n)


def test_constant_average_lags_a_ramp_by_its_mean_age():
    n = 5000
    rate = 0.99
    assert n - run(
        Ema(rate=rate, warmup=False), np.arange(1, n + 1)
    ) == pytest.approx(rate / (1 - rate), rel=1e-3)


def test_copying_average():
    """SwiftBrush's average: beta_1 = 0, then min(rate, k / (9 + k))."""
    rule = CopyEma(rate=0.9)
    assert [float(rule.decay(k)) for k in (1, 2, 9, 81, 82)] == pytest.approx(
        [0, 2 / 11, 0.5, 0.9, 0.9], rel=1e-6
    )
    # nothing of the initial weights is left
    assert run(CopyEma(), np.full(20, 3.0)) == pytest.approx(3.0, rel=1e-6)
    assert float(CopyEma().decay(10**6)) == pytest.approx(0.9999, rel=1e-6)


AVERAGES = (
    Ema(rate=0.9),
    CopyEma(rate=0.9),
    PowerEma(sigma_rel=0.1),
    HalfLifeEma(half_life=1000, batch=100),
    RampEma(rate=0.9),
)


@pytest.mark.parametrize("rule", AVERAGES, ids=lambda rule: type(rule).__name__)
def test_an_average_may_begin_later(rule):
    """Up to the update `start` it has a decay of 0; then it is itself, counted from there."""
    later = dataclasses.replace(rule, start=3)
    ks = jnp.arange(1, 12)
    found = np.asarray(jax.jit(jax.vmap(later.decay))(ks))
    own = np.asarray(jax.jit(jax.vmap(rule.decay))(ks))
    assert not found[:3].any()
    np.testing.assert_array_equal(found[3:], own[:8])
    values = np.arange(1.0, 12.0)
    assert run(later, values[:3]) == 3.0


def test_the_first_average_of_diffusers():
    """EMAModel(update_after_step=n): decay 0 up to update n + 1, then (1 + s) / (10 + s)."""
    rule = CopyEma(rate=0.9999, start=5)
    for k in range(1, 20):
        since = max(0, k - 5 - 1)
        wanted = (1 + since) / (10 + since) if since > 0 else 0.0
        assert float(rule.decay(k)) == pytest.approx(wanted, rel=1e-6)


def test_half_life():
    rule = HalfLifeEma(half_life=1000, batch=100, ramp=0.05)
    assert float(rule.decay(10**6)) == pytest.approx(0.5**0.1, rel=1e-5)
    assert float(rule.decay(1)) == pytest.approx(0.5**20, rel=1e-4)


def test_schedules():
    lr = Optimizer(lr=1.0, schedule="cosine", warmup=10, final=0.1).learning_rate(
        110
    )
    assert float(lr(0)) == pytest.approx(0.1)
    assert float(lr(4)) == pytest.approx(0.5)
    assert float(lr(10)) == pytest.approx(1.0)
    assert float(lr(60)) == pytest.approx(0.55)
    assert float(lr(110)) == pytest.approx(0.1)
    assert float(
        Optimizer(lr=2.0, schedule="linear").learning_rate(10)(5)
    ) == pytest.approx(1.0)


def test_steps_of_the_rate():
    """As PyTorch's MultiStepLR: the update whose number, from 0, is a milestone is the first that
    has the smaller rate.
    """
    steps = dict(lr=2.0, schedule="step", milestones=(3, 5))
    lr = Optimizer(**steps, gamma=0.5).learning_rate(10)
    found = [float(lr(k)) for k in range(7)]
    assert found == [2, 2, 2, 1, 1, 0.5, 0.5]
    lr = Optimizer(**steps, warmup=2).learning_rate(10)
    found = [float(lr(jnp.int32(k))) for k in range(7)]
    assert found == pytest.approx([1, 2, 2, 0.2, 0.2, 0.02, 0.02], rel=1e-6)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            dict(),
            "milestones=\\(\\): expected at least one where optimizer.schedule=step",
        ),
        (
            dict(milestones=(3, 3)),
            "milestones\\[1\\]=3: expected an integer above 3",
        ),
        (dict(milestones=(0,)), "milestones\\[0\\]=0: expected an integer above 0"),
        (
            dict(milestones=(2,), warmup=2),
            "milestones\\[0\\]=2: expected an integer above 2",
        ),
        (
            dict(milestones=(1.5,)),
            "milestones\\[0\\]=1.5: expected an integer above 0",
        ),
        (dict(milestones=3), "milestones=3: expected a list of updates"),
        (dict(milestones=(3,), gamma=0.0), "gamma=0.0: expected a number above 0"),
        (
            dict(milestones=(3,), final=0.1),
            "final=0.1 does not act on .*one of cosine, linear",
        ),
        (
            dict(milestones=(3,), schedule="cosine"),
            "milestones=.* does not act on optimizer.schedule=cosine: .*one of step",
        ),
        (
            dict(gamma=0.5, schedule="constant"),
            "gamma=0.5 does not act on optimizer.schedule=constant: .*one of step",
        ),
    ],
)
def test_steps_without_a_meaning_are_refused(fields, said):
    with pytest.raises(Refused, match=rf"^optimizer\.{said}[^\n]*$"):
        Optimizer(**{"schedule": "step", **fields})


def test_milestones_may_be_a_list_of_config_data():
    data = build.plain(Optimizer(schedule="step", milestones=(3, 5)))
    data.milestones = [4, 6]
    assert build.build(data) == Optimizer(schedule="step", milestones=(4, 6))


def test_decay_spares_vectors_by_name():
    params = {
        "blocks": {
            "norm": {"scale": jnp.ones((2, 3))},
            "up": {"kernel": jnp.ones((2, 3, 3)), "bias": jnp.ones((2, 3))},
        }
    }
    mask = decayed(params)
    assert mask["blocks"]["up"] == {"kernel": True, "bias": False}
    assert not mask["blocks"]["norm"]["scale"]
    tx = Optimizer(lr=0.1, weight_decay=1.0).make(1)
    updates, _ = tx.update(optax.tree.zeros_like(params), tx.init(params), params)
    assert not updates["blocks"]["norm"]["scale"].any()
    np.testing.assert_allclose(updates["blocks"]["up"]["kernel"], -0.1, rtol=1e-6)


NAMES = [
    *(
        "adamw",
        "adam",
        "nadamw",
        "nadam",
        "adamaxw",
        "adamax",
        "lion",
        "radam",
        "adabelief",
        "amsgrad",
    ),
    *("rmsprop", "adagrad", "sgd", "came"),
]
WEIGHTS = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
GRADS = [
    {"kernel": jnp.full((2, 2), g), "bias": jnp.array([3 * g, g])}
    for g in (0.5, -1.5, 0.25)
]
RANDOM = np.random.default_rng(0)
LONG = [  # RAdam begins at the sixth; large and small ones, or signs would be all the same
    jax.tree.map(
        lambda w: jnp.asarray(
            (5.0 if i % 2 else 0.05) * RANDOM.standard_normal(w.shape), jnp.float32
        ),
        WEIGHTS,
    )
    for i in range(10)
]


def follow(optimizer, grads=GRADS, weights=WEIGHTS, **how):
    """Weights after an update by each of `grads`."""
    tx = optimizer.make(len(grads), **how)
    state = tx.init(weights)
    for g in grads:
        updates, state = tx.update(g, state, weights)
        weights = optax.apply_updates(weights, updates)
    return weights


def same(a, b):
    return all(
        np.array_equal(x, y)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.mark.parametrize("algorithm", NAMES)
def test_only_weight_decay_moves_weights_without_gradient(algorithm):
    """They move by lr times the decay, whatever the algorithm does with gradients: w (1 - 0.05)."""
    zero = [optax.tree.zeros_like(WEIGHTS)]
    assert same(follow(Optimizer(algorithm=algorithm, lr=0.1), zero), WEIGHTS)
    after = follow(Optimizer(algorithm=algorithm, lr=0.1, weight_decay=0.5), zero)
    np.testing.assert_allclose(after["kernel"], 0.95, rtol=1e-6)
    assert same(after["bias"], WEIGHTS["bias"])


@functools.cache
def long_run(**fields):
    return follow(Optimizer(**fields), LONG)


CHANGED = dict(
    lr=0.2,
    b1=0.3,
    b2=0.4,
    b3=0.5,
    eps=1e-2,
    eps1=1e-2,
    eps2=1e-2,
    momentum=0.7,
    weight_decay=0.3,
    rates=(("kernel", 0.5),),
    clip=0.1,
    clip_value=0.1,
    clip_from=4,
    schedule="cosine",
    warmup=2,
)


@pytest.mark.parametrize("algorithm", [*NAMES, "lamb"])
@pytest.mark.parametrize("field", CHANGED)
def test_every_field_acts_or_is_refused(algorithm, field):
    plain = dict(algorithm=algorithm, lr=0.1)
    try:
        changed = long_run(**{**plain, field: CHANGED[field]})
    except Refused as error:
        said = str(error)
        assert field in ("b1", "b2", "b3", "eps", "eps1", "eps2", "momentum")
        assert "\n" not in said
        assert f"optimizer.{field}={CHANGED[field]} does not act on " in said
        assert f"optimizer.algorithm={algorithm}: expected" in said
    else:
        assert not same(changed, long_run(**plain))


def test_a_refusal_names_where_the_field_acts():
    with pytest.raises(
        Refused,
        match=r"optimizer\.momentum=0\.9 does not act .*adamw: expected 0\.0 there, or one of sgd$",
    ):
        Optimizer(momentum=0.9)
    with pytest.raises(
        Refused,
        match=r"optimizer\.final=0\.1 does not act .*: expected 0\.0 there, or .* cosine, linear$",
    ):
        Optimizer(final=0.1)


@pytest.mark.parametrize(
    ("optimizer", "theirs"),
    [
        (Optimizer(lr=0.1, clip=0.0), optax.adam(0.1)),
        (
            Optimizer(lr=0.1, clip=0.0, algorithm="adam", b1=0.5),
            optax.adam(0.1, b1=0.5),
        ),
        (
            Optimizer(lr=0.1, clip=0.0, weight_decay=0.2),
            optax.adamw(0.1, weight_decay=0.2, mask=decayed),
        ),
        (
            Optimizer(lr=0.1, clip=0.0, algorithm="radam", b2=0.95),
            optax.radam(0.1, b2=0.95),
        ),
        (
            Optimizer(lr=0.1, clip=0.0, algorithm="lion", b2=0.99),
            optax.lion(0.1, weight_decay=0.0),
        ),
        (Optimizer(lr=0.1, clip=0.0, algorithm="sgd"), optax.sgd(0.1)),
        (
            Optimizer(lr=0.1, clip=0.0, algorithm="sgd", momentum=0.9),
            optax.sgd(0.1, momentum=0.9),
        ),
    ],
    ids=lambda v: v.algorithm if isinstance(v, Optimizer) else "",
)
def test_algorithms_are_optax_own(optimizer, theirs):
    weights = WEIGHTS
    state = theirs.init(WEIGHTS)
    for g in GRADS:
        updates, state = theirs.update(g, state, weights)
        weights = optax.apply_updates(weights, updates)
    assert same(follow(optimizer), weights)


def test_decoupled_decay_joins_the_update_times_the_rate_of_the_schedule():
    optimizer = Optimizer(
        algorithm="radam", lr=0.1, weight_decay=0.5, schedule="linear", clip=0.0
    )
    plain, decayed_ = (
        o.make(3)
        for o in (dataclasses.replace(optimizer, weight_decay=0.0), optimizer)
    )
    states = [plain.init(WEIGHTS), decayed_.init(WEIGHTS)]
    for k, g in enumerate(GRADS):
        without, states[0] = plain.update(g, states[0], WEIGHTS)
        having, states[1] = decayed_.update(g, states[1], WEIGHTS)
        rate = 0.1 * (1 - k / 3)
        np.testing.assert_allclose(
            having["kernel"], without["kernel"] - rate * 0.5, rtol=1e-5
        )
        np.testing.assert_allclose(having["bias"], without["bias"], rtol=1e-6)


def test_decay_of_sgd_joins_the_gradient_before_the_momentum():
    """v <- m v + (g + d w), w <- w - lr v, in numpy."""
    w = 1.0
    v = 0.0
    for g in (0.5, -1.5, 0.25):
        v = 0.9 * v + (g + 0.2 * w)
        w -= 0.1 * v
    after = follow(
        Optimizer(algorithm="sgd", lr=0.1, momentum=0.9, weight_decay=0.2, clip=0.0)
    )
    np.testing.assert_allclose(after["kernel"], w, rtol=1e-5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[
            ("lr", v)
            for v in (
                0.0,
                -1.0,
                float("nan"),
                float("inf"),
                1e300,
                10**400,
                "fast",
                None,
                True,
            )
        ],
        *[(name, v) for name in ("b1", "b2") for v in (-0.1, 1.0, float("nan"))],
        *[
            ("eps", 0.0),
            ("weight_decay", -0.1),
            ("weight_decay", float("nan")),
            ("clip", -1.0),
            ("eps1", 0.0),
            ("eps2", 0.0),
            ("b3", 1.0),
            ("clip_value", -1.0),
        ],
        *[
            ("warmup", -1),
            ("warmup", 1.5),
            ("decay_steps", -1),
            ("final", -0.1),
            ("final", 1.1),
        ],
        *[
            ("algorithm", v)
            for v in (
                "clip",
                "chain",
                "constant_schedule",
                "scale_by_adam",
                "lars",
                "",
                3,
                None,
            )
        ],
        *[("schedule", v) for v in ("cosin", 3)],
    ],
)
def test_values_out_of_range_are_refused_in_one_line(field, value):
    with pytest.raises(
        Refused, match=rf"^optimizer\.{field}=.*(expected|did you mean)[^\n]*$"
    ):
        Optimizer(**{field: value})


def test_a_decay_that_ends_before_the_warm_up_is_refused():
    with pytest.raises(
        Refused,
        match=r"optimizer\.decay_steps=10: expected 0, or more than optimizer\.warmup=10",
    ):
        Optimizer(schedule="cosine", warmup=10, decay_steps=10)


def test_the_nearest_name_is_suggested():
    with pytest.raises(
        Refused, match=r"optimizer\.algorithm='adamm': did you mean 'adam'"
    ):
        Optimizer(algorithm="adamm")


@pytest.mark.parametrize(
    "make",
    [
        *[
            lambda rate=rate, rule=rule: rule(rate=rate)
            for rule in (Ema, CopyEma, RampEma)
            for rate in (-0.1, 1.0, float("nan"), "x")
        ],
        *[
            lambda rule=rule, start=start: dataclasses.replace(rule, start=start)
            for rule in AVERAGES
            for start in (-1, 1.5, True)
        ],
        *[
            lambda s=s: PowerEma(sigma_rel=s)
            for s in (0.0, -0.1, 0.3, float("nan"))
        ],
        *[
            lambda k=k, v=v: HalfLifeEma(**{k: v})
            for k in ("half_life", "batch", "ramp")
            for v in (0, -1.0, float("inf"))
        ],
    ],
)
def test_averages_out_of_range_are_refused(make):
    with pytest.raises(Refused, match=r"^ema\.[a-z_]+=.*: expected"):
        make()


def families():
    """Every model of the library by name, including parts that its defaults leave out."""
    for info in pkgutil.walk_packages(models.__path__, "jaxdistill.models."):
        module = importlib.import_module(info.name)
        for name, cls in vars(module).items():
            if (
                dataclasses.is_dataclass(cls)
                and cls.__module__ == module.__name__
                and "rngs" in inspect.signature(cls.__call__).parameters
            ):
                yield name, cls
    yield from {
        "MLP": lambda: MLP(classes=3),
        "Discriminator": lambda: Discriminator(classes=3),
    }.items()
    yield from {
        "SongUNet": lambda: SongUNet(classes=3),
        "DhariwalUNet": lambda: DhariwalUNet(classes=3),
    }.items()
    yield "Wan", lambda: Wan(vision_dim=8, vision_length=5)


# maps, token tables, SANA's maps of each head
MATRICES = (
    "kernel",
    "embed/embedding",
    "point",
)
TABLES = (
    "label/kernel",
    "label_embed/embedding",
    "embed_position/embedding",
    "embed_type/embedding",
    "position/embedding",
    "positions",
    "token",
    "table",
    "rows",
    "columns",
)


@pytest.mark.full
def test_what_decays_in_every_family():
    """Matrices and token tables decay. Labels, positions, types, relative biases, shifts of a
    modulation and vectors do not.
    """
    seen = set()
    for name, make in families():
        net = make_net(make())
        mask = paths(decayed(net.shapes, net.axes))
        for path, shape in paths(net.shapes).items():
            table = next((t for t in TABLES if f"/{path}".endswith(f"/{t}")), None)
            wanted = table is None and any(
                f"/{path}".endswith(f"/{m}") for m in MATRICES
            )
            assert mask[path] == wanted, (name, path, shape.shape)
            seen.add(table)
    assert seen == {None, *TABLES}


def test_axes_reach_the_decay():
    net = make_net(MLP(width=8, depth=1, classes=3))
    weights = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), net.shapes)
    after = follow(
        Optimizer(lr=0.1, weight_decay=0.5),
        [optax.tree.zeros_like(weights)],
        weights,
        axes=net.axes,
    )
    assert same(after["label_embed"], weights["label_embed"])
    np.testing.assert_allclose(after["inp"]["kernel"], 0.95, rtol=1e-6)


@pytest.mark.parametrize("rate", [0.0, 0.5, 0.99, 0.999])
def test_ramp_follows_its_recursion(rate):
    """d_0 = 0 copies; the average at update k has decay d_k, up to 0.1 % of 1 - rate."""
    decay = 0.0
    rule = RampEma(rate=rate)
    for k in range(1, 3000):
        decay += (1 - decay) * (rate - decay) / 2
        if k < 4 or k % 500 == 0:
            assert float(rule.decay(jnp.int32(k))) == pytest.approx(
                decay, abs=1.1e-3 * (1 - rate) + 1e-7
            )
    assert float(rule.decay(jnp.int32(10**6))) == pytest.approx(rate, abs=1e-7)


def test_entries_are_clipped_before_the_norm():
    grads = {"a": jnp.array([3.0, -0.5]), "b": jnp.array([-7.0])}
    for clip, want in ((0.0, [-1.0, 0.5, 1.0]), (0.75, [-0.5, 0.25, 0.5])):
        tx = Optimizer(algorithm="sgd", lr=1.0, clip=clip, clip_value=1.0).make(1)
        np.testing.assert_allclose(
            jnp.concatenate(jax.tree.leaves(tx.update(grads, tx.init(grads))[0])),
            want,
            rtol=1e-6,
        )


def test_members_of_a_bank_are_clipped_by_their_own_norm():
    # norms 5, 0.5, 0
    grads = {
        "a": jnp.asarray([[3.0, 0.0], [0.3, 0.0], [0.0, 0.0]]),
        "b": jnp.asarray([4.0, 0.4, 0.0]),
    }
    clipped, _ = clip_by_member_norm(1.0).update(grads, None)
    np.testing.assert_allclose(
        clipped["a"], [[0.6, 0.0], [0.3, 0.0], [0.0, 0.0]], rtol=1e-6
    )
    np.testing.assert_allclose(clipped["b"], [0.8, 0.4, 0.0], rtol=1e-6)
    tx = Optimizer(algorithm="sgd", lr=1.0).make(1, bank=True)
    update, _ = tx.update(grads, tx.init(grads))
    np.testing.assert_allclose(update["b"], [-0.8, -0.4, 0.0], rtol=1e-6)


def test_a_role_that_never_moves_has_no_moments():
    assert not jax.tree.leaves(Optimizer().make(0).init({"a": jnp.ones(3)}))


@pytest.mark.parametrize(
    ("field", "value", "seen"),
    [
        ("b2", 0.99999999, "1"),
        ("eps", 1e-60, "0"),
        ("lr", 1e-320, "0"),
        ("b1", 1 - 1e-9, "1"),
    ],
)
def test_values_that_float32_rounds_out_of_range_are_refused(field, value, seen):
    with pytest.raises(
        Refused, match=rf"optimizer\.{field}=.*: is {seen} in float32, expected "
    ):
        Optimizer(**{field: value})


def test_updates_are_counted_in_int32():
    with pytest.raises(
        Refused, match=r"optimizer\.warmup=10+: expected 0 or a positive integer"
    ):
        Optimizer(warmup=10**30)
