"""Where numbers go: metrics.jsonl, TensorBoard, Weights & Biases; and the progress bar."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jaxdistill.core.types import Means, Refused, Turn
from jaxdistill.run import records


class NonFinite(RuntimeError):
    """A loss or gradient stopped being a number at engine step `step`."""

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


def read(path: Path, *, clock: bool = False) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line that was cut short is left out. Raises Refused
    where another one is damaged, or has no seconds where `clock` is asked for.
    """
    return records.read_lines(Path(path), clock=clock)


class Writer:
    """Appends records `{"step", "seconds", "role/name": float}`; a resumed run first drops what
    came after `step`.
    """

    def __init__(
        self, workdir: Path, step: int, *, tensorboard: bool, wandb: str, config: Mapping[str, Any]
    ):
        self._path = workdir / "metrics.jsonl"
        self._board = None
        self._wandb = None
        if jax.process_index():
            self._file = None
            return
        kept = [r for r in read(self._path, clock=True) if r["step"] <= step]
        temp = self._path.with_name(".metrics.jsonl")
        temp.write_text("".join(json.dumps(r) + "\n" for r in kept))
        os.replace(temp, self._path)
        self.offset = kept[-1]["seconds"] if kept else 0.0
        self._file = self._path.open("a")
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(
                str(workdir / "tensorboard"), purge_step=step + 1 if step else None
            )
        if wandb:
            try:
                import wandb as client
            except ImportError as error:
                raise Refused(
                    f"config.wandb={wandb!r}: wandb is not installed; pip install"
                    " 'jaxdistill[wandb]'"
                ) from error
            self._wandb = client.init(
                project=wandb,
                dir=str(workdir),
                config=dict(config),
                resume="allow",
                id=workdir.name,
            )

    def write(self, step: int, seconds: float, values: Mapping[str, float]) -> None:
        """One record; a value that is not finite is written as null."""
        if self._file is None:
            return
        record = {"step": step, "seconds": round(self.offset + seconds, 3)}
        record |= {k: float(f"{v:.6g}") if math.isfinite(v) else None for k, v in values.items()}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in values.items():
            if self._board:
                self._board.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(dict(values), step=step)

    def close(self) -> None:
        for sink in (self._file, self._board):
            if sink:
                sink.close()
        if self._wandb:
            self._wandb.finish()


class Pending:
    """Metrics of steps whose programs may still be running; read back all at once, each step
    checked.
    """

    def __init__(self, turns: Sequence[Turn]):
        self._turns = turns
        self._steps = []

    def add(self, step: int, metrics: Means) -> None:
        self._steps.append((step, metrics))

    def flush(self) -> dict[str, float]:
        """Means since the last flush, over all tokens or samples where these were counted and over
        steps elsewhere. Raises NonFinite, naming turn, role and step.
        """
        sums: dict[str, tuple[float, float]] = {}
        values = jax.device_get([m for _, m in self._steps])
        for (step, _), metrics in zip(self._steps, values):
            for name, value in metrics.items():
                if not np.isfinite(value) and name.endswith(("/loss", "/grad_norm")):
                    raise NonFinite(f"{self._whose(name)} is {value} at step {step}", step)
                count = float(metrics.counts.get(name, 1.0))
                total, number = sums.get(name, (0.0, 0.0))
                sums[name] = total + float(value) * count, number + count
        self._steps = []
        return {name: total / (number or 1.0) for name, (total, number) in sums.items()}

    def _whose(self, name: str) -> str:
        """The turn that reports a metric of this name, and its role."""
        role = name.split("/")[0]
        mine = [
            i
            for i, turn in enumerate(self._turns)
            if (role in turn.moves if turn.moves else role == "measured")
        ]
        moves = ", ".join(self._turns[mine[0]].moves) if mine else ""
        turns = " or ".join(map(str, mine))
        return f"turn {turns} ({moves or 'moves nothing'}): {name} of role {role!r}"


def bar(items: Sequence, title: str, unit: str, enabled: bool = True, done: int = 0) -> tqdm:
    """A progress bar over `items` on stderr, with the time left. Files get few lines of it."""
    quiet = not enabled or jax.process_index() != 0
    interval = 0.2 if sys.stderr.isatty() else 15.0
    return tqdm(
        items,
        initial=done,
        desc=title,
        unit=unit,
        dynamic_ncols=True,
        mininterval=interval,
        disable=quiet,
    )
