"""DI++: old names. What it shares with DI* is in test_rewards.py."""

from jaxdistill.core.build import resolve
from jaxdistill.methods.distribution.di_plus_plus import DIPlusPlus


def test_the_name_in_earlier_configs_is_read():
    assert resolve("methods.distribution._family:DIPlusPlus") is DIPlusPlus
