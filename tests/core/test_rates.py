"""Learning-rate factors by weight."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill.core import build
from jaxdistill.core.bank import bank
from jaxdistill.core.net import make_net
from jaxdistill.core.optim import Optimizer
from jaxdistill.core.rates import rate_factors
from jaxdistill.core.types import Refused
from jaxdistill.models.denoisers.mlp import MLP
from tools import golden

NET = make_net(MLP(width=8, depth=2))
WEIGHTS = jax.tree.map(lambda s: np.full(s.shape, 0.5, np.float32), NET.shapes)
GRADS = jax.tree.map(lambda w: np.float32(0.1) * w, WEIGHTS)
RATES = (("up/.*", 0.1), ("(up|down)/0/kernel", 0.0), ("out/bias", 3.0))


def updates(optimizer):
    tx = optimizer.make(3, axes=NET.axes)
    return tx.update(GRADS, tx.init(WEIGHTS), WEIGHTS)[0]


@pytest.mark.parametrize("algorithm", ["adamw", "radam", "sgd", "lamb"])
def test_the_whole_update_is_multiplied(algorithm):
    """Decay too: of weights whose pattern comes first, and of no others."""
    fields = dict(algorithm=algorithm, lr=0.1, weight_decay=0.3)
    plain = updates(Optimizer(**fields))
    scaled = updates(Optimizer(**fields, rates=RATES))
    factors = {
        "inp/kernel": 1.0,
        "up/0/kernel": 0.1,
        "up/1/bias": 0.1,
        "down/0/kernel": 0.0,
        "down/1/kernel": 1.0,
        "out/bias": 3.0,
    }
    for path, factor in factors.items():
        first, *rest = path.split("/")
        a, b = plain[first], scaled[first]
        for key in rest:
            key = int(key) if key.isdigit() else key
            a, b = a[key], b[key]
        assert np.any(a)
        np.testing.assert_allclose(b, factor * a, rtol=1e-6)
    found = rate_factors(RATES, WEIGHTS)
    assert {path: found[path] for path in factors} == factors


def test_a_factor_of_zero_keeps_every_bit():
    weights = {"a": jnp.array([-0.0, 1e-30, 3.0]), "b": jnp.ones(3)}
    grads = {"a": jnp.array([1.0, jnp.inf, jnp.nan]), "b": jnp.ones(3)}
    optimizer = Optimizer(rates=(("a", 0),), weight_decay=0.5, clip=0.0)
    tx = optimizer.make(1)
    found, _ = tx.update(grads, tx.init(weights), weights)
    after = jax.jit(optax.apply_updates)(weights, found)
    assert np.array_equal(
        np.asarray(after["a"]).view(np.int32),
        np.asarray(weights["a"]).view(np.int32),
    )
    assert not np.array_equal(after["b"], weights["b"])


def test_without_factors_nothing_is_added():
    names = [type(s).__name__ for s in Optimizer().make(1).init(WEIGHTS)]
    assert len(names) == 2
    assert len(Optimizer(rates=RATES).make(1).init(WEIGHTS)) == 3


def test_lists_of_config_data_are_taken():
    given = Optimizer(rates=[["up/.*", 2]])
    assert given.rates == (("up/.*", 2.0),)
    assert hash(given) == hash(Optimizer(rates=(("up/.*", 2.0),)))
    data = build.plain(given)
    assert build.build(data) == given
    data.rates = [["up/.*", 0.5], ["out.*", 2]]
    assert build.build(data).rates == (("up/.*", 0.5), ("out.*", 2.0))


@pytest.mark.parametrize(
    ("rates", "said"),
    [
        (
            ((".*kernal", 2.0),),
            r"\[0\]\[0\]='\.\*kernal' matches no weight: its weights are ",
        ),
        (
            ((".*", 2.0), ("inp/.*", 1.0)),
            r"\[1\]\[0\]='inp/\.\*' matches weights of earlier ",
        ),
        ((("inp", 2.0),), r"\[0\]\[0\]='inp' matches no weight"),
    ],
)
def test_patterns_without_a_weight_are_refused(rates, said):
    with pytest.raises(Refused, match=rf"^optimizer\.rates{said}[^\n]*$"):
        Optimizer(rates=rates).make(1, axes=NET.axes)
    Optimizer(rates=rates).make(1)


@pytest.mark.parametrize(
    ("rates", "said"),
    [
        ("ab", "='ab': expected a list of pairs"),
        (("ab",), r"\[0\]='ab': expected \(regular"),
        ((("a", 1.0), ("b",)), r"\[1\]=\('b',\): expected \(regular"),
        (((3, 1.0),), r"\[0\]\[0\]=3: expected a regular expression"),
        ((("(", 1.0),), r"\[0\]\[0\]='\(': expected a regular expression: "),
        ((("a", -1.0),), r"\[0\]\[1\]=-1.0: expected a factor of 0 or a number"),
        (
            (("a", float("nan")),),
            r"\[0\]\[1\]=nan: expected a factor of 0 or a number",
        ),
        (
            (("a", "fast"),),
            r"\[0\]\[1\]='fast': expected a factor of 0 or a number",
        ),
    ],
)
def test_what_is_no_pattern_and_factor_is_refused(rates, said):
    with pytest.raises(Refused, match=rf"^optimizer\.rates{said}[^\n]*$"):
        Optimizer(rates=rates)


def test_members_of_a_bank_have_the_same_paths():
    Optimizer(rates=RATES).make(1, bank=True, axes=bank(NET, 2).axes)


def test_golden_files_state_the_factors():
    lines = list(golden.lines_of(NET, NET.shapes, True, RATES))
    ends = {line.split("  ")[0]: line.split("  ")[-1] for line in lines}
    assert ends["up/0/kernel"] == "lr * 0.1"
    assert ends["down/0/kernel"] == "lr * 0"
    assert ends["inp/kernel"] == "lr * 1"
