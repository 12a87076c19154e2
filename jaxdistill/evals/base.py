"""What every evaluation is: rows of a table for the networks of a run, and pictures to look at."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any, ClassVar

from jaxdistill.core.types import Refused

Table = dict[
    str, tuple[str, ...]
]  # "name@nfe" of a row -> the names of its metrics ("accuracy_*": any of these)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Base of all evaluations; its fields are the keys of `config.evaluation`."""

    needs: ClassVar[tuple[str, ...]] = ()  # what the data set must have: "components", "gold", ...

    def check(self, data: Any) -> None:
        """Raises Refused where this data set cannot be evaluated so; asked before anything runs."""
        for name in self.needs:
            if not hasattr(data, name):
                cls = type(data)
                raise Refused(
                    f"evaluation: {type(self).__name__} needs data with `{name}`, "
                    f"which {cls.__module__.removeprefix('jaxdistill.')}:{cls.__name__} has not"
                )

    def table(self, roles: Collection[str], data: Any) -> Table:
        """The rows and metrics that `rows` will give for a run of these roles; {}: not known
        before.
        """
        return {}

    def rows(self, trained: Any) -> list[dict[str, Any]]:
        """[{"name", "nfe", metric: value, ...}] of a run (run.loop.Trained)."""
        raise NotImplementedError

    def pictures(self, trained: Any) -> dict[str, Any]:
        """Title -> PIL image."""
        return {}
