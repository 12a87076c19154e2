"""Checkpoints through orbax: asynchronous, whole or not at all, and a damaged one is set aside."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jaxdistill.core.net import paths
from jaxdistill.core.types import Params, Refused, State


def _saved(state: State) -> dict[str, Any]:
    """What a checkpoint holds: everything but the frozen roles, which the start-up loads again."""
    return {k: getattr(state, k) for k in ("step", "count", "params", "opt", "ema", "memory")}


def _architecture(state: State) -> dict[str, str]:
    return {k: f"{v.dtype}{list(v.shape)}" for k, v in paths(state.params).items()}


class Checkpoints:
    """The checkpoints of one run, by global step, with a JSON record of the host's state beside each."""

    def __init__(self, folder: Path, keep: int = 2):
        self.folder = Path(folder).absolute()
        self._keep = keep
        self._manager = self._open()

    def _open(self):
        options = ocp.CheckpointManagerOptions(max_to_keep=self._keep, create=True, step_prefix="step")
        return ocp.CheckpointManager(self.folder, options=options)

    def save(self, step: int, state: State, host: dict[str, Any]) -> None:
        """Starts writing; returns once the device arrays are copied. `host` must be JSON-serialisable."""
        record = {**host, "architecture": _architecture(state)}
        args = ocp.args.Composite(state=ocp.args.StandardSave(_saved(state)), host=ocp.args.JsonSave(record))
        self._manager.save(step, args=args, force=True)

    def wait(self) -> None:
        """Returns when everything is on disk."""
        self._manager.wait_until_finished()

    def host(self) -> tuple[int, dict[str, Any]] | None:
        """(step, host record) of the newest checkpoint whose record can be read."""
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                return step, self._manager.restore(step, args=ocp.args.Composite(host=ocp.args.JsonRestore()))["host"]
            except Exception as error:
                self._set_aside(step, error)
        return None

    def restore(self, abstract: State) -> tuple[int, State, dict[str, Any]] | None:
        """(step, state, host record) of the newest sound checkpoint; None where there is none.

        `abstract` holds ShapeDtypeStructs with shardings; its frozen roles are handed through. A damaged checkpoint is
        moved to `damaged/` with a warning. Raises Refused where the weights are those of another architecture.
        """
        while (found := self.host()) is not None:
            step, host = found
            self._check(step, host["architecture"], _architecture(abstract))
            try:
                args = ocp.args.Composite(state=ocp.args.StandardRestore(_saved(abstract)))
                state = self._manager.restore(step, args=args)["state"]
                return step, abstract.replace(**state), host
            except Exception as error:
                self._set_aside(step, error)
        return None

    def _check(self, step: int, saved: dict[str, str], expected: dict[str, str]) -> None:
        for path in sorted(saved.keys() | expected.keys()):
            if saved.get(path) != expected.get(path):
                raise Refused(f"{self.folder}: checkpoint {step} is of another architecture: {path} is {saved.get(path, 'absent')}, "
                              f"expected {expected.get(path, 'absent')}")  # fmt: skip

    def _set_aside(self, step: int, error: Exception) -> None:
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        warnings.warn(f"{self.folder}: checkpoint {step} is damaged and was moved to damaged/ ({reason})", stacklevel=3)
        self._manager.close()
        aside = self.folder.parent / "damaged"
        aside.mkdir(parents=True, exist_ok=True)
        for entry in self.folder.glob(f"step_{step}") if jax.process_index() == 0 else ():
            os.replace(entry, aside / f"{entry.name}_{os.getpid()}")
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("set_aside")
        self._manager = self._open()

    def close(self) -> None:
        self._manager.close()


def save_params(folder: Path, params: dict[str, Params]) -> None:
    """Writes `{role: params}` to `folder`, whole or not at all."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(folder).absolute(), params, force=True)


def load_params(folder: Path, abstract: dict[str, Params]) -> dict[str, Params]:
    """Reads the roles in `abstract` (ShapeDtypeStructs with shardings) from what `save_params` wrote.

    Each process reads its own shards. Raises Refused where a weight is missing or has another shape.
    """
    folder = Path(folder).absolute()
    if not folder.exists():
        raise Refused(f"{folder}: no such result; has that run finished?")
    with ocp.PyTreeCheckpointer() as checkpointer:
        saved = paths(checkpointer.metadata(folder).item_metadata.tree)
        for path, want in paths(abstract).items():
            have = saved.get(path)
            if have is None or tuple(have.shape) != tuple(want.shape):
                found = "absent" if have is None else list(have.shape)
                raise Refused(f"{folder}: {path} is {found}, expected {list(want.shape)}")
        restore = ocp.args.PyTreeRestore(item=abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
                                         partial_restore=True)  # fmt: skip
        return checkpointer.restore(folder, args=restore)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON whole or not at all; by one process only."""
    if jax.process_index():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f".{path.name}.{os.getpid()}")
    temp.write_text(json.dumps(value, indent=1, default=str) + "\n")
    os.replace(temp, path)
