"""A config of tests/run/staged.py for commands."""

from tests.run import staged


def get_config(variant=""):
    return staged.get_config(variant)
