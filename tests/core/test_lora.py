"""Low-rank adapters: start as the base, move alone, fold in exactly, share one base."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdistill.core.build import Lora, Role
from jaxdistill.core.lora import Part, adapt, base_of, combined, merge
from jaxdistill.core.net import make_net, paths
from jaxdistill.core.parts import joined, split
from jaxdistill.core.step import bind, first_weights
from jaxdistill.core.types import Method, Refused
from jaxdistill.models.denoisers.dit import DiT
from jaxdistill.models.layers import BatchNorm, conv, dense

BASE = make_net(DiT(dim=16, heads=2, depth=2))
X = jax.random.normal(jax.random.key(1), (2, 8, 8, 1))
T = jnp.array([1.0, 2.0])


def perturbed(params):
    """Weights away from where they start, which is 0 for some."""
    rng = np.random.default_rng(2)
    return jax.tree.map(
        lambda w: w + 0.1 * rng.standard_normal(w.shape, np.float32), params
    )


def fresh(net, seed=3):
    return jax.jit(net.init)(jax.random.key(seed))


WEIGHTS = perturbed(fresh(BASE, 0))


def run(nets, **params):
    """The bound networks' outputs on X and T by role, as one program."""

    @jax.jit
    def outputs(params):
        bound = bind(nets, params)
        return {role: getattr(bound, role)(X, T) for role in params}

    return outputs({"teacher": WEIGHTS, **params})


def test_starts_as_its_base_and_folds_in_exactly():
    net = adapt(BASE, base="teacher", rank=3)
    start = fresh(net)
    nets = {"teacher": BASE, "student": net, "full": BASE}
    found = run(nets, student=start)
    np.testing.assert_array_equal(found["student"], found["teacher"])
    moved = perturbed(start)
    found = run(nets, student=moved, full=merge(WEIGHTS, moved, net.scale))
    np.testing.assert_allclose(found["full"], found["student"], rtol=1e-6)
    assert not np.allclose(found["full"], found["teacher"])


def test_rank_of_the_change_and_scale():
    net = adapt(
        BASE, base="teacher", rank=2, alpha=6.0, targets=r"blocks/to_q/kernel"
    )
    assert list(net.shapes) == ["blocks/to_q/kernel"]
    moved = perturbed(fresh(net))
    of_q = lambda weights: np.asarray(weights["blocks"]["to_q"]["kernel"])
    change = of_q(merge(WEIGHTS, moved, net.scale)) - of_q(WEIGHTS)
    assert all(np.linalg.matrix_rank(layer, tol=1e-4) == 2 for layer in change)
    pair = moved["blocks/to_q/kernel"]
    np.testing.assert_allclose(
        change, 3.0 * pair["a"] @ pair["b"], rtol=1e-4, atol=1e-5
    )


def test_several_roles_share_one_base():
    """Gradients reach each adapter alone, and the base not at all."""
    net = adapt(BASE, base="teacher", rank=2)
    nets = {"teacher": BASE, "student": net, "fake": net}
    params = {"student": perturbed(fresh(net, 3)), "fake": perturbed(fresh(net, 4))}

    def loss(moving):
        bound = bind(nets, {"teacher": WEIGHTS, **params, **moving})
        return jnp.sum(bound.student(X, T) ** 2) + jnp.sum(bound.fake(X, T))

    gradient = jax.jit(jax.grad(loss))({"student": params["student"]})
    assert set(gradient) == {"student"}
    assert all(g.any() for g in jax.tree.leaves(gradient))


def test_axes_follow_the_matrix():
    net = adapt(BASE, base="teacher", rank=2)
    assert net.axes["blocks/to_q/kernel"]["a"] == jax.P("layers", "embed", None)
    assert net.axes["blocks/to_q/kernel"]["b"] == jax.P("layers", None, "heads")
    assert all(p.endswith("kernel") for p in net.shapes)
    assert len(net.shapes) < len(paths(BASE.shapes))


def test_no_match_is_refused():
    with pytest.raises(Refused, match="matches no matrix"):
        adapt(BASE, base="teacher", rank=2, targets="nothing")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("rank", v) for v in (0, -1, 1.5, None, True)],
        *[("alpha", v) for v in (-1.0, float("nan"), "x")],
        *[("base", v) for v in ("", None)],
        *[("targets", v) for v in ("(", "*", None, "")],
    ],
)
def test_fields_out_of_range_are_refused_in_one_line(field, value):
    with pytest.raises(Refused, match=rf"^lora\.{field}=[^\n]*$"):
        adapt(BASE, **{"base": "teacher", "rank": 2, field: value})


def test_stacked_vectors_are_no_matrices():
    """Biases of stacked layers have two dimensions, one of them the layers'."""
    net = adapt(BASE, base="teacher", rank=2, targets=".*(bias|kernel)")
    assert net.shapes == adapt(BASE, base="teacher", rank=2).shapes
    with pytest.raises(Refused, match="matches no matrix"):
        adapt(BASE, base="teacher", rank=2, targets="blocks/.*bias")


@pytest.mark.parametrize(
    ("base", "why"),
    [
        ("", "no such role"),
        ("techer", "no such role"),
        ("student", "the role itself"),
        ("fake", "a circle, student <- fake <- student"),
    ],
)
def test_a_base_that_is_none_is_refused(base, why):
    roles = {
        "teacher": Role(),
        "student": Role(lora=Lora(rank=2)),
        "fake": Role(lora=Lora(full=".*bias", base="student")),
    }
    with pytest.raises(
        Refused, match=rf"^lora\.base={base!r}: {why}; expected .*: teacher$"
    ):
        base_of("student", base, roles)
    assert base_of("student", "teacher", roles) == "teacher"
    assert base_of("fake", "student", roles) == "student"


class Tower(nnx.Module):
    """A convolution, a grouped one, a matrix; and a head, which a base may lack."""

    def __init__(self, rngs, head=0, width=6):
        self.first = conv(2, 4, (3, 3), rngs=rngs)
        self.grouped = conv(4, 4, (3, 3), groups=2, rngs=rngs)
        self.point = conv(4, width, (1, 1), rngs=rngs)
        self.out = dense(width, 3, ("embed", "mlp"), rngs=rngs)
        if head:
            self.norm = BatchNorm(3, rngs=rngs)
            self.head = dense(3, head, ("embed", "mlp"), rngs=rngs)

    def __call__(self, x):
        y = self.out(self.point(self.grouped(self.first(x))))
        return self.head(self.norm(y)) if hasattr(self, "head") else y


def tower(**sizes):
    return make_net(lambda rngs: Tower(rngs, **sizes))


def leaf_of(weights, path):
    return np.asarray(paths(weights)[path])


TOWER = tower()
TOWER_WEIGHTS = perturbed(fresh(TOWER, 0))
IMAGE = np.random.default_rng(5).standard_normal((2, 5, 5, 2), np.float32)


class Follows(Method):
    """Trained roles on a frozen teacher."""

    inits = {"upper": None, "student": None}
    ema = ()


def begun(nets):
    """The first weights of the trained roles; the teacher's are bfloat16."""
    start = {
        "teacher": jax.tree.map(lambda w: w.astype(jnp.bfloat16), TOWER_WEIGHTS)
    }

    class Here(Follows):
        inits = {role: None for role in nets if role != "teacher"}

    first = jax.jit(lambda key: first_weights(Here(), nets, key, start))
    return start["teacher"], first(jax.random.key(3))


@pytest.mark.parametrize(
    "lora", [dict(rank=2), dict(rank=2, targets=""), dict(rank=0)], ids=str
)
def test_whole_leaves_start_as_the_base_and_are_exact(lora):
    net = adapt(TOWER, base="teacher", full=r".*bias", **lora)
    adapted = lora == dict(rank=2)
    names = [path for path in net.shapes if not path.endswith("bias")]
    assert names == (
        ["first/kernel", "out/kernel", "point/kernel"] if adapted else []
    )
    teacher, first = begun({"teacher": TOWER, "student": net})
    for path in net.whole_leaves:
        start = first["student"][path]
        assert start.dtype == jnp.float32
        np.testing.assert_array_equal(start, leaf_of(teacher, path).astype("f4"))
    moved = perturbed(first["student"])
    merged = merge(TOWER_WEIGHTS, moved, net.scale)
    np.testing.assert_array_equal(leaf_of(merged, "out/bias"), moved["out/bias"])
    kernel = leaf_of(merged, "out/kernel")
    same = np.array_equal(kernel, leaf_of(TOWER_WEIGHTS, "out/kernel"))
    assert same != adapted


def test_new_leaves_start_as_their_network_does():
    """A head and its batch norm, whose statistics stay statistics."""
    own = tower(head=5)
    net = adapt(TOWER, base="teacher", rank=2, targets="out/kernel", own=own)
    assert set(net.whole_leaves) == {
        *(f"head/{name}" for name in ("bias", "kernel")),
        *(f"norm/{name}" for name in ("bias", "scale", "mean", "var")),
    }
    assert net.statistics == {"norm/mean", "norm/var"}
    assert net.config is own.config
    start = fresh(net)
    assert jnp.std(start["head/kernel"]) > 0.1
    np.testing.assert_array_equal(start["norm/scale"], 1.0)
    bound = bind(
        {"teacher": TOWER, "student": net},
        {"teacher": TOWER_WEIGHTS, "student": start},
    )
    y = np.asarray(bound.teacher(IMAGE))
    head = np.asarray(start["head/kernel"])
    expected = y @ head / np.sqrt(1 + 1e-5) + start["head/bias"]
    np.testing.assert_allclose(bound.student(IMAGE), expected, rtol=1e-4, atol=1e-5)
    _, found = bound.student.training(IMAGE)
    mean = 0.1 * y.mean((0, 1, 2))
    np.testing.assert_allclose(found["norm/mean"], mean, rtol=1e-4, atol=1e-6)
    assert set(found) == net.statistics


def test_a_whole_leaf_may_have_another_shape():
    own = tower(width=8)
    full = r"(point/.*|out/kernel)"
    net = adapt(TOWER, base="teacher", rank=0, full=full, own=own)
    _, first = begun({"teacher": TOWER, "student": net})
    assert first["student"]["out/kernel"].shape == (8, 3)
    assert merge(TOWER_WEIGHTS, first["student"], 1.0)["out"]["kernel"].shape == (
        8,
        3,
    )
    with pytest.raises(
        Refused, match=r"^lora\.full='point/\.\*': out/kernel is \[8, 3\] in"
    ):
        adapt(TOWER, base="teacher", rank=0, full="point/.*", own=own)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            dict(rank=2, full="out/.*"),
            r"lora\.full='out/\.\*': out/kernel has adapters too",
        ),
        (
            dict(rank=2, full="no"),
            r"lora\.full='no' matches no weight of lora\.base='teacher'",
        ),
        (dict(rank=2, full="("), r"lora\.full='\(' is no regular expression"),
        (dict(rank=-1, full="out/.*"), r"lora\.rank=-1: .*0 or more"),
        (dict(rank=2, targets=""), r"lora\.targets='': nothing is trained"),
    ],
)
def test_whole_leaves_that_are_none_are_refused(given, said):
    with pytest.raises(Refused, match=rf"^{said}[^\n]*$"):
        adapt(TOWER, base="teacher", **given)


def test_an_adapter_on_an_adapter():
    """Its weights are the base's with both changes, and its gradient stays its own."""
    lower = adapt(TOWER, base="teacher", rank=1)
    upper = adapt(lower, base="student", rank=2, full=".*bias")
    nets = {"teacher": TOWER, "upper": upper, "student": lower}
    assert (upper.depth, lower.depth, TOWER.depth) == (2, 1, 0)
    _, first = begun(nets)
    bias = first["upper"]["out/bias"]
    own = leaf_of(TOWER_WEIGHTS, "out/bias").astype(jnp.bfloat16).astype("f4")
    np.testing.assert_array_equal(bias, own)
    params = {
        "teacher": TOWER_WEIGHTS,
        **{r: perturbed(w) for r, w in first.items()},
    }
    middle = merge(TOWER_WEIGHTS, params["student"], lower.scale)
    whole = merge(middle, params["upper"], upper.scale)

    def loss(params):
        found = bind(nets, params).upper(IMAGE)
        return jnp.sum(found**2), found

    gradient, found = jax.jit(jax.grad(loss, has_aux=True))(params)
    expected = TOWER.apply(whole, IMAGE)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert all(g.any() for g in jax.tree.leaves(gradient["upper"]))
    for role in ("teacher", "student"):
        assert not any(g.any() for g in jax.tree.leaves(gradient[role]))


def test_a_base_with_whole_leaves_hands_them_on():
    lower = adapt(TOWER, base="teacher", rank=0, full="out/bias")
    upper = adapt(lower, base="student", rank=0, full="out/bias")
    start = {"teacher": TOWER_WEIGHTS, "student": {"out/bias": jnp.arange(3.0)}}
    nets = {"teacher": TOWER, "upper": upper, "student": lower}
    first = first_weights(Follows(), nets, jax.random.key(0), start)
    np.testing.assert_array_equal(first["upper"]["out/bias"], jnp.arange(3.0))


def test_a_weighted_sum_of_adapters():
    one = adapt(TOWER, base="teacher", rank=1, alpha=3.0, full=".*bias")
    two = adapt(
        TOWER, base="teacher", rank=2, targets="out/kernel", full="out/bias"
    )
    first = perturbed(fresh(one))
    second = perturbed(fresh(two))
    parts = [Part(first, one.scale, 0.5), Part(second, two.scale, -2.0)]
    found = combined(TOWER_WEIGHTS, parts)
    w = leaf_of(TOWER_WEIGHTS, "out/kernel")
    a, b = first["out/kernel"].values()
    c, d = second["out/kernel"].values()
    expected = w + 0.5 * 3.0 * a @ b - 2.0 * c @ d
    np.testing.assert_allclose(
        leaf_of(found, "out/kernel"), expected, rtol=1e-5, atol=1e-6
    )
    w = leaf_of(TOWER_WEIGHTS, "out/bias")
    expected = w + 0.5 * (first["out/bias"] - w) - 2.0 * (second["out/bias"] - w)
    np.testing.assert_allclose(
        leaf_of(found, "out/bias"), expected, rtol=1e-5, atol=1e-6
    )
    alone = combined(TOWER_WEIGHTS, [parts[0]._replace(weight=1.0)])
    jax.tree.map(
        np.testing.assert_array_equal, alone, merge(TOWER_WEIGHTS, first, one.scale)
    )
    with_none = [parts[0]._replace(weight=1.0), parts[1]._replace(weight=0.0)]
    jax.tree.map(
        np.testing.assert_array_equal, alone, combined(TOWER_WEIGHTS, with_none)
    )


def test_no_weight_is_the_bases_own_array():
    net = adapt(TOWER, base="teacher", rank=1, full=".*bias")
    moved = perturbed(fresh(net))
    found = combined(TOWER_WEIGHTS, [Part(moved, net.scale, 0.0)])
    base = paths(TOWER_WEIGHTS)
    assert all(leaf is base[path] for path, leaf in paths(found).items())
    unscaled = paths(merge(TOWER_WEIGHTS, moved, 0.0))
    assert unscaled["out/kernel"] is base["out/kernel"]
    assert unscaled["out/bias"] is moved["out/bias"]


def test_new_leaves_are_in_no_sum():
    net = adapt(TOWER, base="teacher", rank=1, own=tower(head=5))
    start = fresh(net)
    alone = combined(TOWER_WEIGHTS, [Part(start, 1.0)], net.whole.shapes)
    assert leaf_of(alone, "head/bias").shape == (5,)
    for weight in (0.0, 0.5):
        parts = [Part(start, 1.0, weight)]
        with pytest.raises(Refused, match="head/bias is not in their base"):
            combined(TOWER_WEIGHTS, parts, net.whole.shapes)


def test_a_convolution_becomes_two():
    """One of its size to `rank` channels and one of size 1; grouped ones have no adapter."""
    net = adapt(TOWER, base="teacher", rank=2)
    assert list(net.shapes) == ["first/kernel", "out/kernel", "point/kernel"]
    shapes = jax.tree.map(lambda s: s.shape, net.shapes["first/kernel"])
    assert shapes == {"a": (3, 3, 2, 2), "b": (1, 1, 2, 4)}
    pair = perturbed(fresh(net))["first/kernel"]
    change = 1.5 * pair["a"] @ pair["b"]

    def convolved(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    whole = convolved(IMAGE, change)
    twice = 1.5 * convolved(convolved(IMAGE, pair["a"]), pair["b"])
    np.testing.assert_allclose(whole, twice, rtol=1e-4, atol=1e-5)
    with pytest.raises(Refused, match="matches no matrix"):
        adapt(TOWER, base="teacher", rank=2, targets="grouped/.*")


def test_a_first_factor_keeps_the_size_of_its_input():
    """The variance of A's outputs is that of its inputs, with all positions of a kernel."""
    net = adapt(
        make_net(lambda rngs: conv(64, 8, (3, 3), rngs=rngs)), base="t", rank=16
    )
    a = np.asarray(fresh(net)["kernel"]["a"])
    # 9216 draws: their mean square has a relative deviation of 1.5 %
    np.testing.assert_allclose(9 * 64 * np.mean(a**2), 1.0, rtol=0.07)


def test_a_pattern_of_a_method_selects_matrices():
    """`Method.trains` names the base's paths, of adapters and whole leaves alike."""
    net = adapt(TOWER, base="teacher", rank=1, full=".*bias")
    start = fresh(net)
    moving, rest, statistics = split(net, start, r"out/.*")
    assert paths(moving).keys() == {"out/kernel/a", "out/kernel/b", "out/bias"}
    assert not statistics
    together = joined(moving, rest)
    assert paths(together).keys() == paths(start).keys()
    kernels = split(net, net.axes, r".*kernel").moving
    assert kernels.keys() == net.pairs.keys()
    for pattern in (r"out/kernel/a", r"grouped/kernel", r"to_q"):
        with pytest.raises(
            Refused, match="matches no weight; there are first/bias, "
        ):
            split(net, start, pattern)
