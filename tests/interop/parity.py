"""How far two networks are from one another."""

import numpy as np


def gap(ours, theirs, where=...):
    """Largest difference over standard deviation."""
    return float(np.abs(np.asarray(ours) - theirs)[where].max() / theirs.std())
