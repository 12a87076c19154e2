"""Coverage of a known mixture (00-foundations, section 12)."""

import dataclasses

import numpy as np

from jaxdistill.data.mixtures import Mixture
from jaxdistill.data.rings import Rings
from jaxdistill.evals import modes
from jaxdistill.evals.points import DirectionEval, TextureEval

LAW = (
    np.array([0.5, 0.3, 0.2]),
    np.array([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0]]),
    np.array([0.1, 0.2, 0.1]),
)


def at(*counts, offset=0.0):
    """`counts[k]` samples at `offset` standard deviations of mode k from its mean."""
    rows = [
        [LAW[1][k] + [offset * LAW[2][k], 0.0]] * n
        for k, n in enumerate(counts)
        if n
    ]
    return np.concatenate(rows)


def test_the_law_itself_scores_best():
    data = Mixture(seed=3)
    x = data.evaluation(5000)["x"]
    assert modes.modes_hit(x, data.components) == 1.0
    # 2 n KL is chi-squared with 5 degrees of freedom: below its 99.9 % quantile, 20.5
    assert 0 <= modes.mode_kl(x, data.components) < 20.5 / 10_000
    inside = 1 - np.exp(-4.5)
    np.testing.assert_allclose(
        modes.quality(x, data.components),
        inside,
        atol=4 * np.sqrt(inside * (1 - inside) / 5000),
    )


def test_assignment_agrees_with_the_labels_it_was_drawn_from():
    data = Mixture(seed=4)
    drawn = data.evaluation(2000)
    mode, distance = modes.assign(drawn["x"], data.components)
    # modes are 5 mean standard deviations apart or more, if they fit: at most 2 Phi(-5 / 2 / 1.25)
    # = 4.6 % are ambiguous
    assert np.mean(mode == drawn["cond"]) > 0.954
    own = (
        np.linalg.norm(drawn["x"] - data.components[1][mode], axis=1)
        / data.components[2][mode]
    )
    np.testing.assert_allclose(distance, own, rtol=1e-3)


def test_a_dropped_mode_counts_as_missed_and_costs_its_mass():
    x = at(50, 30, 0)
    assert modes.modes_hit(x, LAW) == 2 / 3
    np.testing.assert_allclose(modes.mode_kl(x, LAW), np.log(1 / 0.8), rtol=1e-12)
    np.testing.assert_allclose(modes.mode_kl(at(50, 30, 20), LAW), 0.0, atol=1e-15)


def test_one_percent_of_a_modes_mass_is_a_hit():
    # 0.2 % of all is 1 % of mode 2's 20 %
    assert modes.modes_hit(at(998, 0, 2), LAW) == 2 / 3
    assert modes.modes_hit(at(999, 0, 1), LAW) == 1 / 3


def test_only_samples_within_three_sigma_are_good_or_hit():
    near = at(50, 30, 20, offset=2.99)
    far = at(50, 30, 20, offset=3.01)
    assert modes.quality(near, LAW) == 1.0 and modes.modes_hit(near, LAW) == 1.0
    assert modes.quality(far, LAW) == 0.0 and modes.modes_hit(far, LAW) == 0.0
    assert modes.quality(np.concatenate([near, far]), LAW) == 0.5


def test_offsets_lay_the_modes_over_each_other():
    """They are unit Gaussian for the mixture itself, whatever its places, widths and shares."""
    x = at(3, 2, 4, offset=1.5)
    np.testing.assert_allclose(
        modes.offsets(x, LAW), np.tile([1.5, 0.0], (9, 1)), atol=1e-12
    )


def test_texture_sees_what_the_energy_distance_of_the_whole_does_not():
    """Rings against rings blurred by half of their radius.

    The energy distance of the full distributions is next to nothing.
    """
    data = Rings(seed=0)
    blurred = dataclasses.replace(data, thickness=0.5).evaluation(2000)
    real = data.evaluation(2000)
    same = dataclasses.replace(data, batch_size=2000).batch(0, slice(None))
    blunt, sharp = (
        TextureEval().score(x["x"], real, data) for x in (blurred, same)
    )
    assert blunt["texture"] > 0.015 > 10 * abs(sharp["texture"])
    assert abs(blunt["energy"]) < blunt["texture"] / 5


def test_reward_of_a_direction():
    data = Rings(seed=0)
    x = np.repeat(np.array([[2.0, 0.0], [0.0, 3.0]]), 20, 0)  # along the axes
    reward = lambda angle: DirectionEval(angle=angle).score(
        x, {"x": data.evaluation(40)["x"]}, data
    )["reward"]
    np.testing.assert_allclose(
        [reward(0.0), reward(np.pi / 4), reward(np.pi)],
        [0.5, np.sqrt(0.5), -0.5],
        atol=1e-12,
    )
