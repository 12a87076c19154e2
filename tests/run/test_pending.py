"""What reaches a line of the log: means over tokens or samples where these are counted, over steps
elsewhere.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.core.types import Means, Out, Turn
from jaxdistill.run.metrics import NonFinite, Pending

MOVES = Turn(("student", "head"), lambda net, ctx: Out(0.0))
MEASURES = Turn((), lambda net, ctx: Out(0.0))


def step(means, counts={}):
    return Means(
        {k: jnp.float32(v) for k, v in means.items()},
        {k: jnp.float32(v) for k, v in counts.items()},
    )


def test_counted_means_weigh_tokens_alike():
    """17 tokens: 16 of mean 1.5 and one of 5 are 29 / 17, where the mean of both steps is 3.25."""
    pending = Pending((MOVES,))
    pending.add(
        1,
        step({"student/loss": 1.5, "student/grad_norm": 1.0}, {"student/loss": 16}),
    )
    pending.add(
        2,
        step({"student/loss": 5.0, "student/grad_norm": 2.0}, {"student/loss": 1}),
    )
    means = pending.flush()
    assert means["student/loss"] == pytest.approx(29 / 17, rel=1e-12)
    assert means["student/grad_norm"] == 1.5
    assert pending.flush() == {}


def test_steps_without_a_token_count_for_nothing():
    """A metric that no step has a token of is left out."""
    pending = Pending((MOVES,))
    pending.add(
        1,
        step(
            {"student/loss": 0.0, "student/kl": 0.0},
            {"student/loss": 0, "student/kl": 0},
        ),
    )
    pending.add(
        2,
        step(
            {"student/loss": 3.0, "student/kl": 0.0},
            {"student/loss": 2, "student/kl": 0},
        ),
    )
    assert pending.flush() == {"student/loss": 3.0}


def test_a_metric_counts_in_the_steps_that_report_it():
    pending = Pending((MOVES, MEASURES))
    for i, means in enumerate(
        [{"student/loss": 1.0}, {"student/loss": 3.0, "measured/ratio": 7.0}]
    ):
        pending.add(i, step(means))
    assert pending.flush() == {"student/loss": 2.0, "measured/ratio": 7.0}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_loss_that_is_no_number_names_turn_role_and_step(value):
    pending = Pending((MEASURES, MOVES))
    pending.add(8, step({"student/loss": 1.0}))
    pending.add(9, step({"student/loss": value}, {"student/loss": 3}))
    with pytest.raises(
        NonFinite,
        match=rf"^turn 1 \(student, head\): student/loss of role 'student' is {value} at step 9$",
    ) as caught:
        pending.flush()
    assert caught.value.step == 9


def test_a_turn_that_moves_nothing_is_named_too():
    pending = Pending((MOVES, MEASURES, MEASURES))
    pending.add(3, step({"measured/loss": np.nan}))
    with pytest.raises(
        NonFinite,
        match=r"^turn 1 or 2 \(moves nothing\): measured/loss of role 'measured' is nan at step 3$",
    ):
        pending.flush()


def test_other_metrics_may_be_no_number():
    pending = Pending((MOVES,))
    pending.add(1, step({"student/ratio": np.inf}))
    assert pending.flush() == {"student/ratio": np.inf}
