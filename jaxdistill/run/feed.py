"""The data of one stage: batches on the mesh, at a position that a checkpoint stores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from jaxdistill.core.types import Batch, Controller
from jaxdistill.data.base import Dataset
from jaxdistill.data.prefetch import DevicePrefetch
from jaxdistill.run.experiment import Experiment


def process() -> tuple[int, int]:
    """(index of this process, number of processes): the part of every batch that it loads."""
    return jax.process_index(), jax.process_count()


class Feed:
    """Batches of a stage, whose data set the method's controller may steer."""

    def __init__(
        self, experiment: Experiment, data: Dataset, controller: Controller | None
    ):
        self.data = data
        self._controller = controller
        self._hints: dict[str, Any] = {}
        self._position: Any = None  # after the last batch that was handed out
        self._put = experiment.put_batch()
        self._batches: DevicePrefetch | None = None

    def open(self) -> None:
        """Starts to load from the present position."""
        loader = self.data.loader(process())
        if self._position is not None:
            loader.set_state(self._position)
        self._batches = DevicePrefetch(loader, self._put)

    def next(self) -> Batch:
        """The next batch, as global arrays on the mesh."""
        batch, self._position = next(self._batches)
        return batch

    def steer(self, metrics: Mapping[str, float]) -> None:
        """Lets the controller change the data set. Loading goes on from the same position."""
        hints = self._controller.update(metrics) if self._controller else {}
        if not hints:
            return
        self._batches.close()
        self._hints = {**self._hints, **hints}
        self.data = self.data.steer(hints)
        self.open()

    def keys(self) -> dict[str, type]:
        """The entries of `state` that are groups, with their types."""
        return (
            dict.fromkeys(("controller", "hints"), dict) if self._controller else {}
        )

    def state(self) -> dict[str, Any]:
        """What a checkpoint stores; JSON-serialisable."""
        state = {"data": self._position}
        if self._controller:
            state |= {"controller": self._controller.state(), "hints": self._hints}
        return state

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state` returned, before `open`."""
        self._position = state["data"]
        if self._controller:
            self._controller.restore(state["controller"])
            self._hints = state["hints"]
            self.data = self.data.steer(self._hints)

    def close(self) -> None:
        """Stops loading."""
        if self._batches is not None:
            self._batches.close()
