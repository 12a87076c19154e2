import numpy as np

from jaxdistill.data.digits import Digits


def test_values():
    out = Digits().evaluation(2000)
    assert out["x"].shape == (1797, 8, 8, 1) and out["x"].dtype == np.float32
    assert (out["x"].min(), out["x"].max()) == (-1, 1)
    assert np.bincount(out["cond"]).tolist() == [
        178,
        182,
        177,
        183,
        181,
        182,
        181,
        179,
        174,
        180,
    ]
    assert out["cond"].dtype == np.int32 and (out["null_cond"] == 10).all()


def test_stream(check_stream, check_epochs):
    check_stream(Digits(batch_size=32))
    check_epochs(Digits(batch_size=32), 1797)
