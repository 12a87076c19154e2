"""Where a loss that is not finite from the first steps on may come from."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxdistill.core.types import Array, Params
from jaxdistill.data.base import Dataset
from jaxdistill.run.experiment import Experiment
from jaxdistill.run.feed import process


def suspects(
    experiment: Experiment,
    data: Dataset,
    index: int,
    step: int,
    frozen: Mapping[str, Params],
    trained: tuple[str, ...],
) -> str:
    """The end of a message on a loss that is not finite.

    It names entries of the batch and first weights that are not finite, or else the settings that
    may be the cause.

    Args:
      data: of the stage.
      index: of the stage.
      step: of the stage, from 1, whose loss is not finite.
      frozen: weights of the frozen roles.
      trained: names of the trained roles; their first weights are loaded again.
    """
    found = [
        f"batch[{name!r}] of that step has values that are not finite"
        for name in _bad_entries(data, step)
    ]
    weights = {**frozen, **_warm_starts(experiment, index, trained)}
    found += [
        f"roles.{role} starts from weights that are not finite"
        for role, params in weights.items()
        if not _all_finite(params)
    ]
    if found:
        return f"; suspects: {', '.join(found)}"
    rates = [
        f"roles.{role}.optimizer.lr={experiment.roles[role].optimizer.lr:g}"
        for role in trained
    ]
    return (
        "; its batch and the first weights are finite: suspects are"
        f" {', '.join(rates)} and arithmetic in half precision"
    )


def _bad_entries(data: Dataset, step: int) -> list[str]:
    batch = next(itertools.islice(data.loader(process()), step - 1, None))
    return [name for name, value in batch.items() if not _finite(value)]


def _warm_starts(
    experiment: Experiment, index: int, trained: tuple[str, ...]
) -> Mapping[str, Params]:
    """The first weights of trained roles. Stages after the first start from results: none."""
    if index:
        return {}
    return experiment.warm_starts(trained)


def _all_finite(params: Params) -> bool:
    return all(_finite(w) for w in jax.tree.leaves(params))


def _finite(values: Array) -> bool:
    if not jnp.issubdtype(values.dtype, jnp.floating):
        return True
    return bool(jnp.isfinite(values).all())
