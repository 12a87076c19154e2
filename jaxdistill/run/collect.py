"""Data that a stage makes before its first step, stored in the run's folder: batches that networks
generate on the mesh (`Collect`), and records that are made on the host (`Pool`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxdistill.core import sharding
from jaxdistill.core.step import bind
from jaxdistill.core.types import Batch, Ctx, Params, Refused, Stage
from jaxdistill.data import arrayrecord
from jaxdistill.data.base import Dataset
from jaxdistill.data.prefetch import DevicePrefetch
from jaxdistill.run import metrics
from jaxdistill.run.experiment import Trained
from jaxdistill.run.feed import process
from jaxdistill.run.stop import Stopped


def collected(
    trained: Trained,
    stage: Stage,
    index: int,
    stop: threading.Event,
    progress: bool,
) -> Dataset:
    """The data set of a stage: the experiment's, or what `stage.collect` generates.

    Generated batches are stored in data/<index>, one file each; those that are there are kept.
    Raises Stopped where the run was asked to stop.
    """
    experiment = trained.experiment
    if stage.collect is None:
        return experiment.data
    folder = experiment.workdir / "data" / str(index)
    folder.mkdir(parents=True, exist_ok=True)

    @jax.jit
    def make(params: Mapping[str, Params], batch: Batch, rng: Any) -> Batch:
        ctx = Ctx(batch, rng, jnp.int32(0), {})
        return stage.collect.make(bind(trained.nets, params), ctx)

    count = stage.collect.batches
    title = f"{experiment.workdir.name} data"
    key = jax.random.key(experiment.settings.seed)
    loader = experiment.data.loader(process())
    with DevicePrefetch(loader, experiment.put_batch()) as batches:
        for i in metrics.bar(range(count), title, "batch", progress):
            batch, _ = next(batches)
            file = folder / f"batch{i:06d}_{jax.process_index()}.arrayrecord"
            if not file.exists():
                made = make(trained.params, batch, jax.random.fold_in(key, i))
                arrayrecord.write(file, _samples(sharding.local_samples(made)))
            if stop.is_set():
                raise Stopped(
                    stop.reason, f"stored {i + 1} of {count} batches in {folder}"
                )
    data = experiment.data
    return arrayrecord.stored(folder, batch_size=data.batch_size, seed=data.seed)


def pooled(
    trained: Trained,
    stage: Stage,
    index: int,
    data: Dataset,
    stop: threading.Event,
    progress: bool,
) -> Dataset:
    """The data set of a stage: `data`, or the records that `stage.pool` makes of it.

    They are stored in pools/<index>, a file for each item; items that are there are kept. Raises
    Stopped where the run was asked to stop, Refused on a name that is no name of a file.
    """
    pool = stage.pool
    if pool is None:
        return data
    experiment = trained.experiment
    folder = experiment.workdir / "pools" / str(index)
    folder.mkdir(parents=True, exist_ok=True)
    items = [_file_name(item) for item in pool.items(data)]
    nets = bind(trained.nets, trained.params)
    title = f"{experiment.workdir.name} pool"
    missing = _missing(folder, items)
    done = len(items) - len(missing)
    for n, item in enumerate(metrics.bar(missing, title, "item", progress, done)):
        records = pool.make(nets, data, item)
        if n % jax.process_count() == jax.process_index():
            arrayrecord.write(folder / f"{item}.arrayrecord", records)
        if stop.is_set():
            raise Stopped(
                stop.reason,
                f"stored {done + n + 1} of {len(items)} items in {folder}",
            )
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"pool {index}")
    return pool.read(data, folder)


def _file_name(item: str) -> str:
    if not item or Path(item).name != item:
        raise Refused(
            f"pool: {item!r} is the name of an item, expected that of a file"
        )
    return item


def _missing(folder: Path, items: Sequence[str]) -> list[str]:
    """The items without a file, as the first process sees them, since all work on the same."""
    files = [folder / f"{item}.arrayrecord" for item in items]
    there = sharding.as_first_process([file.exists() for file in files])
    return [item for item, exists in zip(items, there) if not exists]


def _samples(batch: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """The samples of a batch, one after the other."""
    size = len(next(iter(batch.values())))
    for n in range(size):
        yield {name: values[n] for name, values in batch.items()}
