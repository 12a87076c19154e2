"""Figures of language models on small cases (00-foundations, section 12)."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.core.types import Refused
from jaxdistill.evals import language
from jaxdistill.objectives.divergence import ReverseKL


def test_perplexity_of_a_uniform_model_is_its_vocabulary():
    np.testing.assert_allclose(
        language.perplexity(30 * np.log(17), 30), 17, rtol=1e-12
    )


def test_token_kl_and_agreement_over_the_mask():
    p = np.array([0.5, 0.3, 0.2])
    q = np.array([0.2, 0.3, 0.5])
    teacher = jnp.log(jnp.asarray([[p, p, p]]))
    student = jnp.log(jnp.asarray([[p, q, q]]))
    mask = jnp.asarray([[1, 1, 0]])
    kl, count = language.token_kl(teacher, student, mask)
    np.testing.assert_allclose(
        [kl, count], [np.sum(p * np.log(p / q)), 2], rtol=1e-6
    )
    back, _ = language.token_kl(teacher, student, mask, divergence=ReverseKL())
    np.testing.assert_allclose(back, np.sum(q * np.log(q / p)), rtol=1e-6)
    assert [float(v) for v in language.top1_agreement(teacher, student, mask)] == [
        1.0,
        2.0,
    ]


def test_exact_match_and_rouge():
    assert language.exact_match(["a  b ", "c", "A b"], ["a b", "d", "a b"]) == 1 / 3
    # the longest common subsequence of 4 and 3 words is 2
    np.testing.assert_allclose(
        language.rouge_l(["The cat sat down"], ["cat down there"]),
        2 * 2 / 7,
        rtol=1e-12,
    )
    assert language.rouge_l(["a b", "", "x"], ["a b", "", "y"]) == 1 / 3
    for metric in (language.exact_match, language.rouge_l):
        with pytest.raises(Refused, match="2 predictions for 1 references"):
            metric(["a", "b"], ["a"])
        with pytest.raises(Refused, match="0 predictions"):
            metric([], [])
