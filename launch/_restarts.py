"""A bound on restarts that bring nothing new: Slurm and GKE start a run again where it has failed, whatever the reason."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from jaxdistill.core.types import Refused

FILE = "restarts.json"  # in the run's folder: {"progress", "count"}


def progress(workdir: Path) -> dict[str, int]:
    """How far a run and those inside it have come: stages done, the sum of the newest checkpoints' steps, files of stored data."""
    newest: dict[Path, int] = {}
    for folder in workdir.rglob("checkpoints/step_*"):
        if folder.name[5:].isdigit():
            newest[folder.parent] = max(newest.get(folder.parent, 0), int(folder.name[5:]))
    done = sum(folder.name.isdigit() for folder in workdir.rglob("stages/*"))
    return {"stages": done, "steps": sum(newest.values()), "stored": sum(1 for _ in workdir.rglob("data/*/*"))}


def _count(workdir: Path) -> int:
    """Restarts since the run last got on; 0 where nothing can be read of them."""
    try:
        found = json.loads((workdir / FILE).read_text())
        return int(found["count"]) if found["progress"] == progress(workdir) else 0
    except (OSError, ValueError, KeyError, TypeError):
        return 0


@contextlib.contextmanager
def bounded(workdir: Path, most: int, join: Callable[[], None]) -> Iterator[None]:
    """Around a run that a launcher starts again. Raises Refused where it has failed at `most` restarts one after another without a
    new checkpoint, stage or batch of stored data; 0: no bound.

    `join` joins the run's other processes: all look before it, and the first counts after it. That a run was asked to stop is no
    failure. The first start is none of the restarts, and makes no folder.
    """
    if not most:
        join()
        yield
        return
    count = _count(workdir)
    if count >= most:
        raise Refused(f"{workdir}: {count} restarts without a new checkpoint; see why it fails, remove {FILE} there, and start it again")
    join()
    import jax

    from jaxdistill.core.checkpoint import write_json
    from jaxdistill.core.loop import Stopped

    if workdir.is_dir():
        write_json(workdir / FILE, {"progress": progress(workdir), "count": count + 1})
    try:
        yield
    except (Stopped, KeyboardInterrupt):
        _forget(workdir, jax.process_index())
        raise
    _forget(workdir, jax.process_index())


def _forget(workdir: Path, process: int) -> None:
    if process == 0:
        (workdir / FILE).unlink(missing_ok=True)
