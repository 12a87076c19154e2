"""Low-rank adapters: start as the base, move alone, fold in exactly, share one base."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.core.build import Lora, Role
from jaxdistill.core.lora import adapt, base_of, merge
from jaxdistill.core.net import make_net, paths
from jaxdistill.core.step import bind
from jaxdistill.core.types import Refused
from jaxdistill.models.denoisers.dit import DiT

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
        ("fake", "it has adapters too"),
    ],
)
def test_a_base_that_has_no_full_weights_is_refused(base, why):
    roles = {
        "teacher": Role(),
        "student": Role(lora=Lora(rank=2)),
        "fake": Role(lora=Lora(rank=4)),
    }
    with pytest.raises(
        Refused, match=rf"^lora\.base={base!r}: {why}; expected .*: teacher$"
    ):
        base_of("student", base, roles)
    assert base_of("student", "teacher", roles) == "teacher"
