"""A bound on restarts without progress: Slurm and GKE restart a failed run, whatever the cause."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from jaxdistill.core.types import Refused

FILE = "restarts.json"  # in the run's folder: {"progress", "count"}


def progress(workdir: Path) -> dict[str, int]:
    """The progress of a run and the runs inside it.

    Finished stages, the sum of the newest checkpoints' steps, and files of collected data.
    """
    found = {"stages": 0, "steps": 0, "stored": 0}
    # os.walk follows no links and ignores what is removed meanwhile.
    for at, folders, files in os.walk(workdir):
        name = os.path.basename(at)
        if name == "checkpoints":
            steps = [
                f[5:] for f in folders if f.startswith("step_") and f[5:].isdigit()
            ]
            found["steps"] += max(map(int, steps), default=0)
        if name == "stages":
            found["stages"] += sum(f.isdigit() for f in folders)
        if os.path.basename(os.path.dirname(at)) == "data":
            found["stored"] += len(files)
        if name in ("checkpoints", "stages"):
            folders.clear()  # do not go into these
    return found


def _count(workdir: Path) -> int:
    """Restarts since the last progress; 0 where the file of restarts is missing or unreadable."""
    try:
        found = json.loads((workdir / FILE).read_text())
        return int(found["count"]) if found["progress"] == progress(workdir) else 0
    except (OSError, ValueError, KeyError, TypeError):
        return 0


@contextlib.contextmanager
def bounded(workdir: Path, most: int, join: Callable[[], None]) -> Iterator[None]:
    """A context for a run that a launcher starts again after failures.

    The first start is not a restart and makes no folder. A run that was asked to stop has not
    failed.

    Args:
        workdir: The run's folder.
        most: Restarts in a row without progress; 0 for no bound.
        join: Joins the other processes of the run. All read the count before it; the first process
            writes it afterwards.

    Raises:
        Refused: There were `most` restarts without a new checkpoint, stage or file of data.
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
        write_json(
            workdir / FILE, {"progress": progress(workdir), "count": count + 1}
        )
    try:
        yield
    except (Stopped, KeyboardInterrupt):
        _forget(workdir, jax.process_index())
        raise
    _forget(workdir, jax.process_index())


def _forget(workdir: Path, process: int) -> None:
    if process == 0:
        (workdir / FILE).unlink(missing_ok=True)
