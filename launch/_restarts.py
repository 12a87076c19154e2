"""A bound on restarts that bring nothing new: Slurm and GKE start a run again where it has failed,
whatever the reason.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from jaxdistill.core.types import Refused

FILE = "restarts.json"  # in the run's folder: {"progress", "count"}


def progress(workdir: Path) -> dict[str, int]:
    """How far a run and those inside it have come: stages done, the sum of the newest checkpoints'
    steps, files of stored data.
    """
    found = {"stages": 0, "steps": 0, "stored": 0}
    for at, folders, files in os.walk(
        workdir
    ):  # which follows no link, and passes over what goes away under it
        name = os.path.basename(at)
        if name == "checkpoints":
            found["steps"] += max(
                (int(f[5:]) for f in folders if f.startswith("step_") and f[5:].isdigit()),
                default=0,
            )
        if name == "stages":
            found["stages"] += sum(f.isdigit() for f in folders)
        if os.path.basename(os.path.dirname(at)) == "data":
            found["stored"] += len(files)
        if name in ("checkpoints", "stages"):
            folders.clear()  # what is inside does not matter
    return found


def _count(workdir: Path) -> int:
    """Restarts since the run last got on; 0 where nothing can be read of them."""
    try:
        found = json.loads((workdir / FILE).read_text())
        return int(found["count"]) if found["progress"] == progress(workdir) else 0
    except (OSError, ValueError, KeyError, TypeError):
        return 0


@contextlib.contextmanager
def bounded(workdir: Path, most: int, join: Callable[[], None]) -> Iterator[None]:
    """Around a run that a launcher starts again. Raises Refused where it has failed at `most`
    restarts one after another without a new checkpoint, stage or batch of stored data; 0: no bound.

    `join` joins the run's other processes: all look before it, and the first counts after it. That
    a run was asked to stop is no failure. The first start is none of the restarts, and makes no
    folder.
    """
    if not most:
        join()
        yield
        return
    count = _count(workdir)
    if count >= most:
        raise Refused(
            f"{workdir}: {count} restarts without a new checkpoint; see why it fails, remove"
            f" {FILE} there, and start it again"
        )
    join()
    import jax

    from jaxdistill.run.checkpoint import write_json
    from jaxdistill.run.loop import Stopped

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
