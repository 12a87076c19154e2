"""Metrics: their files (metrics.jsonl, TensorBoard, Weights & Biases), and the progress bar."""

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
    """The records of a metrics.jsonl, without a last line that was cut short.

    Raises:
        Refused: Another line is damaged, or, with `clock`, has no seconds.
    """
    return records.read_lines(Path(path), clock=clock)


class Writer:
    """Appends records `{"step", "seconds", "role/name": float}`.

    A resumed run first removes the records of steps after `step`.
    """

    def __init__(
        self,
        workdir: Path,
        step: int,
        *,
        tensorboard: bool,
        wandb: str,
        config: Mapping[str, Any],
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

            purge_step = step + 1 if step else None
            self._board = SummaryWriter(
                str(workdir / "tensorboard"), purge_step=purge_step
            )
        if wandb:
            self._wandb = _wandb_run(wandb, workdir, config)

    def write(self, step: int, seconds: float, values: Mapping[str, float]) -> None:
        """Writes one record, with six digits of each value and null for one that is not finite."""
        if self._file is None:
            return
        record = {"step": step, "seconds": round(self.offset + seconds, 3)}
        for name, value in values.items():
            record[name] = float(f"{value:.6g}") if math.isfinite(value) else None
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


def _wandb_run(project: str, workdir: Path, config: Mapping[str, Any]) -> Any:
    """The Weights & Biases run of `workdir`, new or resumed."""
    try:
        import wandb
    except ImportError as error:
        raise Refused(
            f"config.wandb={project!r}: wandb is not installed; pip install 'jaxdistill[wandb]'"
        ) from error
    return wandb.init(
        project=project,
        dir=str(workdir),
        config=dict(config),
        resume="allow",
        id=workdir.name,
    )


class Pending:
    """Metrics of steps whose programs may still be running; `flush` reads all of them at once."""

    def __init__(self, turns: Sequence[Turn]):
        self._turns = turns
        self._steps = []

    def add(self, step: int, metrics: Means) -> None:
        self._steps.append((step, metrics))

    def flush(self) -> dict[str, float]:
        """Means since the last flush, weighted by the counts of tokens or samples where there are.

        Metrics whose counts are all 0 are left out.

        Raises:
            NonFinite: A loss or gradient is not finite; the message names turn, role and step.
        """
        sums: dict[str, tuple[float, float]] = {}
        values = jax.device_get([m for _, m in self._steps])
        for (step, _), metrics in zip(self._steps, values):
            for name, value in metrics.items():
                if not np.isfinite(value) and name.endswith(
                    ("/loss", "/grad_norm")
                ):
                    raise NonFinite(
                        f"{self._described(name)} is {value} at step {step}", step
                    )
                count = float(metrics.counts.get(name, 1.0))
                total, number = sums.get(name, (0.0, 0.0))
                sums[name] = total + float(value) * count, number + count
        self._steps = []
        return {
            name: total / number for name, (total, number) in sums.items() if number
        }

    def _described(self, name: str) -> str:
        """A metric in a message: the turns that report it, the roles they move, name and role."""
        role = name.split("/")[0]
        reporting = []
        for i, turn in enumerate(self._turns):
            reports = role in turn.moves if turn.moves else role == "measured"
            if reports:
                reporting.append(i)
        moves = ", ".join(self._turns[reporting[0]].moves) if reporting else ""
        turns = " or ".join(map(str, reporting))
        return f"turn {turns} ({moves or 'moves nothing'}): {name} of role {role!r}"


def bar(
    items: Sequence, title: str, unit: str, enabled: bool = True, done: int = 0
) -> tqdm:
    """A progress bar over `items` on stderr, updated seldom where stderr is no terminal."""
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
