"""The base of all evaluations: table rows for the networks of a run, and pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from jaxdistill.core.net import Net
from jaxdistill.core.types import Method, Nets, Params, Refused
from jaxdistill.data.abilities import members
from jaxdistill.data.base import Dataset, check_fields

# "name@nfe" of a row -> the names of its metrics; "accuracy_*" stands for any that begin so.
Table = dict[str, tuple[str, ...]]


@runtime_checkable
class Trained(Protocol):
    """What an evaluation sees of a finished run, a dataclass; `run.experiment` has it."""

    experiment: Experiment
    nets: Mapping[str, Net]  # role -> network
    # role -> weights, averaged where the role has an average
    params: Mapping[str, Params]

    def bound(self) -> Nets:
        """The networks with their weights bound."""


class Experiment(Protocol):
    """What an evaluation sees of a run's config."""

    method: Method
    data: Dataset
    settings: Any  # core.build.Run
    workdir: Path  # the run's folder

    def conditioned(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """The batch with the null label of the networks."""

    def source(self, role: str) -> str:
        """Where the role's first weights come from."""

    def warm_starts(self) -> dict[str, Params]:
        """Role -> first weights, of the roles that do not start at random."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Base of all evaluations; its fields are the keys of `config.evaluation`."""

    # Abilities of data.abilities that the data set must have.
    needs: ClassVar[tuple[type, ...]] = ()

    def __post_init__(self):
        check_fields(self, "evaluation")

    def check(self, data: Any) -> None:
        """Raises Refused where this data set cannot be evaluated so, before anything runs."""
        for ability in self.needs:
            if not isinstance(data, ability):
                cls = type(data)
                missing = " and ".join(f"`{name}`" for name in members(ability))
                raise Refused(
                    f"evaluation: {type(self).__name__} needs data with {missing}, "
                    f"which {cls.__module__.removeprefix('jaxdistill.')}:{cls.__name__} has not"
                )

    def table(self, roles: Collection[str], data: Any) -> Table:
        """The rows and metrics that `rows` will give for a run of these roles.

        Empty where they are not known before.
        """
        return {}

    def rows(self, trained: Trained) -> list[dict[str, Any]]:
        """The table of a run: [{"name", "nfe", metric: value, ...}]."""
        raise NotImplementedError

    def pictures(self, trained: Trained) -> dict[str, Any]:
        """Title -> PIL image of a run's samples."""
        return {}


def judged(roles: Collection[str]) -> list[str]:
    """The teacher and the student, as far as a run has them."""
    return [role for role in ("teacher", "student") if role in roles]
