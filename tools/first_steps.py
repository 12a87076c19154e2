"""The engine's own first steps outside of the loop, for tests of methods and for notebooks."""

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
    """(states, metrics): the state before each of `steps` steps and after the last, and what each
    step reports, on the host.

    txs: an optax transformation for each role that moves, or one for all; start: first weights of
    the roles that do not begin as the method says; batch: one for all steps, or a list; how: what
    else `make_train_step` takes. Keys are 0 and 1.
    """
    txs = txs if isinstance(txs, dict) else dict.fromkeys(method.inits, txs)
    state = init_state(method, nets, txs, jax.random.key(0), start)
    step, active_at = make_train_step(method, nets, txs, **how)
    states = [jax.device_get(state)]
    rows = []
    for i in range(steps):
        state, metrics = step(
            state, batch[i] if isinstance(batch, list) else batch, jax.random.key(1), active_at(i)
        )
        states.append(jax.device_get(state))
        rows.append({name: float(value) for name, value in metrics.items()})
    return states, rows


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from launch._command import main, no_command

    main(no_command, __doc__)
