"""Methods that compare tokens say in one line that teacher and student have different vocabularies, before anything runs."""

import importlib.util
from pathlib import Path

import pytest

from jaxdistill.core import loop
from jaxdistill.core.build import Role, experiment, spec
from jaxdistill.core.sharding import MeshShape
from jaxdistill.core.types import Refused

METHODS = {
    "KD": spec("methods.language.kd:KD"),
    "GKD": spec("methods.language.gkd:GKD", prompt_length=4),
    "TSDKD": spec("methods.language.tsd_kd:TSDKD", prompt_length=4),
    "Paced": spec("methods.language.paced:Paced", prompt_length=4),
    "PruneThenDistil": spec("methods.architecture.prune_then_distil:PruneThenDistil"),
    "RLAD": spec("methods.language.rlad:RLAD", prompt_length=4),
}


def config(method, **roles):
    sizes = lambda vocab: Role(model=spec("models.lm:LM", vocab=vocab, dim=8, mlp=8, heads=2, depth=1), init="fresh")
    return experiment(steps=1, mesh=MeshShape(fsdp=1), data=spec("data.language:Markov", vocab=12),
                      method=METHODS[method], roles={"teacher": Role(init="exact"), "student": sizes(13), **roles})  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_one_line(method, tmp_path):
    said = f"config.roles.teacher: a vocabulary of 12 tokens, the student's has 13; {method} compares tokens"
    for dry in (True, False):
        with pytest.raises(Refused, match=said) as error:
            loop.run(config(method), tmp_path / "run", dry_run=dry, progress=False)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_runs_inside_are_not_trained_first(tmp_path):
    """A teacher that would have to be trained, with another vocabulary: refused before it is."""
    path = Path(__file__).parents[2] / "core/tiny.py"
    found = importlib.util.spec_from_file_location("tiny", path)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    inner = module.get_config("language")
    roles = dict(teacher=Role(init="@first"), student=Role(model=spec("models.lm:LM", vocab=99), init="fresh"))
    made = experiment(steps=1, mesh=module.spec_mesh(), data=inner.data, method=METHODS["KD"], runs={"first": inner}, roles=roles)
    with pytest.raises(Refused, match="a vocabulary of 16 tokens, the student's has 99"):
        loop.run(made, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
