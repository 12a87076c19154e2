"""A bank of students leaves as one folder for each member."""

import json

import jax
import numpy as np
import pytest

from jaxdistill import interop
from jaxdistill.core.build import Role, experiment, spec
from jaxdistill.core.experiment import Experiment
from jaxdistill.core.loop import Trained
from jaxdistill.diffusion.denoiser import Denoiser, Velocity
from jaxdistill.interop.export import export

NET = dict(model=spec("models.dit:DiT", size=4, patch=2, channels=1, dim=16, depth=2, heads=2, classes=4), denoiser=Denoiser(
    param=Velocity(time_scale=1000.0)))  # fmt: skip


@pytest.mark.parametrize("members", [0, 2])
def test_each_member_leaves_in_a_folder_of_its_own(members, tmp_path):
    role = Role(**NET, init="fresh", bank=members)
    method = spec("methods.distribution.multi_student:MultiStudent", partition=spec("objectives.partition:Consecutive", cells=2, classes=4),
                  shares=(0.0, 1.0, 0.0))  # fmt: skip
    if not members:
        method = spec("methods.distribution.diff_instruct:DiffInstruct")
    config = experiment(data=spec("data.digits:Digits"), method=method, roles=dict(teacher=Role(**NET), student=role, fake=role))
    built = Experiment(config, tmp_path)
    rows = [{"name": "student", "nfe": 1, "energy": 0.5}]
    (tmp_path / "report.json").write_text(json.dumps({"models": rows, "steps": 1, "config": {"method": {"name": "m"}, "seed": 0}}))
    params = {"student": built.nets["student"].init(jax.random.key(0))}
    export(Trained(built, built.nets, params), tmp_path / "out")
    for k in range(members or 1):
        folder = tmp_path / "out" / str(k) if members else tmp_path / "out"
        net, loaded = interop.load(folder)
        mine = jax.tree.map(lambda w, k=k: w[k] if members else w, params["student"])
        assert net.config == NET["model"] or type(net.config).__name__ == "DiT"
        for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(mine), strict=True):
            np.testing.assert_array_equal(a, b)
        assert "DiTTransformer2DModel" in (folder / "README.md").read_text()
    assert (tmp_path / "out" / "config.json").exists() == (not members)
