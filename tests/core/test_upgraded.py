"""Configs of earlier versions: fields whose names and values have changed are read as those of
today.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
from ml_collections import ConfigDict

from jaxdistill.core.build import build, completed, current, plain, spec
from jaxdistill.core.types import Refused
from jaxdistill.objectives.divergence import (
    ForwardKL,
    JensenShannon,
    ReverseKL,
    from_kind,
    from_kinds,
)
from launch._command import override

HERE = f"{__name__}:Matched"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Matched:
    """A method of today, whose divergences were names."""

    divergence: Any = ForwardKL()
    divergences: tuple[Any, ...] = (ForwardKL(), ReverseKL())
    weight: float = 1.0

    renamed: ClassVar[Mapping[str, str]] = {
        "kind": "divergence",
        "beta": "divergence.beta",
        "kinds": "divergences",
        "scale": "weight",
    }

    @classmethod
    def upgraded(cls, given):
        return from_kind(from_kinds(given))


@pytest.mark.parametrize(
    ("given", "divergence"),
    [
        ({"kind": "forward_kl", "params": {}, "beta": 0.5}, ForwardKL()),
        ({"kind": "jsd", "params": {}, "beta": 0.9}, JensenShannon(beta=0.9)),
        ({"kind": "jsd", "params": {"beta": 0.3}}, JensenShannon(beta=0.3)),
        ({"kind": "reverse_kl", "params": None}, ReverseKL()),
        ({"beta": 0.2}, JensenShannon(beta=0.2)),
        ({"divergence": "jsd"}, JensenShannon()),
        ({}, ForwardKL()),
    ],
)
def test_old_fields_are_read(given, divergence):
    assert build({"name": HERE, **given}).divergence == divergence
    assert build(current({"name": HERE, **given})).divergence == divergence
    assert build(completed({"name": HERE, **given})).divergence == divergence
    assert build(spec(HERE, **given)).divergence == divergence


def test_lists_of_objects_are_configs():
    old = {"name": HERE, "kinds": ["jsd", "reverse_kl"], "beta": 0.9}
    made = build(old)
    assert made.divergences == (JensenShannon(beta=0.9), ReverseKL())
    config = ConfigDict({"method": plain(made)})
    assert build(config.method) == made
    assert build(current(json.loads(config.to_json())["method"])) == made


def test_the_command_line_takes_old_keys_and_values():
    config = ConfigDict({"method": plain(Matched())}).lock()
    override(config, "method.kind", "jsd")
    assert build(config.method).divergence == JensenShannon()
    override(config, "method.beta", "0.9")
    assert build(config.method).divergence == JensenShannon(beta=0.9)
    override(config, "method.divergence", "forward_kl")
    assert build(config.method).divergence == ForwardKL()
    override(config, "method.scale", "2")
    assert build(config.method).weight == 2.0


def test_another_class_has_its_own_fields():
    config = ConfigDict(
        {"method": plain(Matched(divergence=JensenShannon(beta=0.9)))}
    ).lock()
    override(config, "method.divergence.name", "objectives.divergence:ReverseKL")
    assert build(config.method).divergence == ReverseKL()
    override(config, "method.divergence.name", "objectives.divergence:SkewKL")
    override(config, "method.divergence.alpha", "0.3")
    assert build(config.method).divergence.alpha == 0.3
    with pytest.raises(Refused, match="has no key 'beta'"):
        override(config, "method.divergence.beta", "0.3")
    with pytest.raises(Refused, match=r"divergence='0\.3': expected one of"):
        override(config, "method.divergence", "0.3")
