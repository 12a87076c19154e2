"""First steps of the engine without the loop, for tests of methods and for notebooks."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jaxdistill.core.net import Net
from jaxdistill.core.step import State, init_state, make_train_step
from jaxdistill.core.types import Batch, Method, Params


def first_steps(
    method: Method,
    nets: Mapping[str, Net],
    txs: Any,
    start: Mapping[str, Params],
    batch: Batch | list[Batch],
    steps: int = 5,
    **how: Any,
) -> tuple[list[State], list[dict[str, float]]]:
    """Takes steps from key 0, with key 1 in the steps.

    Args:
        method: The method.
        nets: Role -> network.
        txs: An optax transformation for each trained role, or one for all.
        start: First weights of the roles whose source is not that of the method.
        batch: One for all steps, or a list.
        steps: Their number.
        how: Other arguments of `make_train_step`.

    Returns:
        (states, metrics) on the host: the state before each step and after the last, and the
        metrics of each step.
    """
    txs = txs if isinstance(txs, dict) else dict.fromkeys(method.inits, txs)
    batches = batch if isinstance(batch, list) else [batch] * steps
    state = init_state(method, nets, txs, jax.random.key(0), start)
    step, active_at = make_train_step(method, nets, txs, **how)
    states = [jax.device_get(state)]
    reported = []
    for i in range(steps):
        state, metrics = step(state, batches[i], jax.random.key(1), active_at(i))
        states.append(jax.device_get(state))
        reported.append({name: float(value) for name, value in metrics.items()})
    return states, reported


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from launch._command import main, no_command

    main(no_command, __doc__)
