import pytest

from jaxdistill.evals.ner import partial_f1, strict_f1


@pytest.mark.parametrize("score", [strict_f1, partial_f1])
def test_counts_are_pooled_over_questions(score):
    assert score([["a", "b"]], [["b", "c"]]) == pytest.approx(
        {"precision": 0.5, "recall": 0.5, "f1": 0.5}, abs=1e-8
    )
    assert score([["a"], ["b"]], [["a"], ["b"]])["f1"] == pytest.approx(1, abs=1e-8)
    # empty and empty count for nothing
    assert score([["a"], [], []], [["a"], [], []])["f1"] == pytest.approx(
        1, abs=1e-8
    )
    assert score([], [])["f1"] == 0
    assert score([["a", "a"]], [["a", "a", "a"]])["precision"] == pytest.approx(
        1, abs=1e-8
    )
    pooled = score([["a"], []], [["a"], ["x", "y"]])
    assert pooled["precision"] == pytest.approx(1 / 3) and pooled[
        "recall"
    ] == pytest.approx(1, abs=1e-8)


def test_half_a_hit_for_a_shared_word():
    assert strict_f1([["asian"]], [["asian cuisine"]])["f1"] == 0
    assert partial_f1([["asian"]], [["asian cuisine"]])["f1"] == pytest.approx(
        0.5, abs=1e-8
    )
    # the equal one takes it
    one_each = partial_f1([["new york"]], [["new deal", "new york", "york"]])
    assert one_each["precision"] == pytest.approx(1 / 3) and one_each[
        "recall"
    ] == pytest.approx(1, abs=1e-8)
    assert partial_f1([["a b", "b c"]], [["b"]])["recall"] == pytest.approx(0.25)
