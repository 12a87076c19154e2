"""Adapters of several runs on one base: their weighted sum as full weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from jaxdistill.core import lora
from jaxdistill.core.build import plain
from jaxdistill.core.net import Net, paths
from jaxdistill.core.types import Params, Refused
from jaxdistill.run import loop, records
from jaxdistill.run.experiment import Experiment, Trained


def check(
    experiment: Experiment, roles: Collection[str], given: Mapping[Path, float]
) -> None:
    """Raises Refused where `summed` would; no weight is read for it."""
    for role in roles:
        _check_adapts(experiment, role, "--adapters")
        for folder in others(experiment, given):
            _other_role(experiment, role, folder)


def others(experiment: Experiment, given: Mapping[Path, float]) -> list[Path]:
    """The folders that are not the run's own."""
    own = experiment.workdir.resolve()
    return [folder for folder in given if folder.resolve() != own]


def summed(
    trained: Trained, roles: Collection[str], given: Mapping[Path, float]
) -> Trained:
    """A run whose `roles` have full weights: their base with a weighted sum of adapters.

    Args:
        trained: The run; it has the weights of `roles` and of their bases.
        roles: Roles with adapters.
        given: Folder of a finished run -> the weight of the adapters that its exported role of
            that name has, or its only one. The weight of the run's own adapters is 1, unless its
            own folder is given.

    Raises:
        Refused: A role has full weights; or its base is not known to be the same in a run, by its
            source in the config.
    """
    experiment = trained.experiment
    check(experiment, roles, given)
    shown = {str(folder): weight for folder, weight in given.items()}
    nets = dict(trained.nets)
    # Roles on the adapters of `roles` are left out: their base is another one now.
    kept = [r for r in nets if roles.isdisjoint(experiment.with_bases([r]) - {r})]
    params = {r: trained.params[r] for r in kept if r in trained.params}
    for role in roles:
        nets[role] = trained.nets[role].whole
        params[role] = _sum(trained, role, given)
    return dataclasses.replace(trained, nets=nets, params=params, adapters=shown)


def _sum(trained: Trained, role: str, given: Mapping[Path, float]) -> Params:
    """All weights of a role: its base with the weighted sum of adapters."""
    experiment = trained.experiment
    net = trained.nets[role]
    own = experiment.workdir.resolve()
    weights = {folder.resolve(): weight for folder, weight in given.items()}
    parts = [lora.Part(trained.params[role], net.scale, weights.get(own, 1.0))]
    for folder in others(experiment, given):
        name = _other_role(experiment, role, folder)
        other = loop.load(folder, roles={name})
        scale = other.nets[name].scale
        parts.append(lora.Part(other.params[name], scale, given[folder]))
    base = net.under.whole_weights(net.adapts, trained.params)
    return lora.combined(base, parts, net.whole.shapes)


def _other_role(experiment: Experiment, role: str, folder: Path) -> str:
    """The exported role of another run whose adapters go on the base of `role`.

    Raises:
        Refused: There is no such role, or its base is another one.
    """
    other = Experiment(records.read_config(folder), folder, where=str(folder))
    exports = other.method.exports
    name = role if role in exports else exports[0]
    if name != role and len(exports) > 1:
        raise Refused(
            f"--adapters={folder}: exports {', '.join(exports)}; expected {role}, or one role"
        )
    _check_adapts(other, name, f"--adapters={folder}")
    net = experiment.nets[role]
    found = other.nets[name]
    ours = identity(experiment, net.adapts)
    theirs = identity(other, found.adapts)
    if ours != theirs:
        raise Refused(
            f"--adapters={folder}: {name} is on {_shown(other, found)}, expected the base of"
            f" {role}, {_shown(experiment, net)}"
        )
    known = paths(net.whole.shapes)
    for path in found.shapes:
        if path not in known:
            raise Refused(
                f"--adapters={folder}: {name} has {path}, which {role} and its base lack; give that"
                " run as --workdir"
            )
    return name


def _check_adapts(experiment: Experiment, role: str, where: str) -> None:
    if not experiment.nets[role].adapts:
        raise Refused(
            f"{where}: {role} has full weights, expected a role with `lora`"
        )


def _shown(experiment: Experiment, net: Net) -> str:
    """The base of a network in a message."""
    source = experiment.source(net.adapts)
    return f"{net.adapts} (init {source!r}) of {experiment.workdir}"


def identity(experiment: Experiment, role: str) -> tuple[Any, ...]:
    """What is equal for roles of two runs that have the same weights, by their configs.

    A trained role is known by its run alone. Runs of equal configs have equal results.
    """
    lora_of = experiment.roles[role].lora
    under: tuple[Any, ...] = ()
    if lora_of.adapts:
        under = (plain(lora_of).to_json(), identity(experiment, lora_of.base))
    return (*_source(experiment, role), *under)


def _source(experiment: Experiment, role: str) -> tuple[Any, ...]:
    """The source of a role's weights in a form that two configs share."""
    if role in experiment.method.inits:
        return "trained", str(experiment.workdir.resolve()), role
    source = experiment.source(role)
    if source in experiment.roles:
        return identity(experiment, source)
    if source in ("random", "fresh", "exact"):
        model, _ = experiment.described(role)
        return source, experiment.settings.seed, role, plain(model).to_json()
    run = experiment.run_at(role, source)
    if run is not None:
        return "run", loop.identity(records.read_config(run.workdir))
    return "folder", str(Path(source).expanduser().resolve())
