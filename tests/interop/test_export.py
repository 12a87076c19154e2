"""What a student leaves as: a folder for each member of a bank, a card whose recipe is the method's own sampler."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import interop
from jaxdistill.core.build import Lora, Role, experiment, spec
from jaxdistill.core.experiment import Experiment
from jaxdistill.core.loop import Trained
from jaxdistill.core.types import Refused
from jaxdistill.diffusion.denoiser import Denoiser, EDMPrecond, Noise, TrigPrecond, Velocity, VPVelocity
from jaxdistill.diffusion.process import DDPM, EDM, Flow, Trig
from jaxdistill.interop.export import _start, chain, export
from jaxdistill.methods.distribution.dmd2 import DMD2
from jaxdistill.methods.distribution.phased_dmd import PhasedDMD
from jaxdistill.methods.distribution.swiftbrush import SwiftBrush
from jaxdistill.methods.distribution.uni_instruct import UniInstruct
from jaxdistill.methods.trajectory.flow_matching import FlowMatching
from jaxdistill.methods.trajectory.meanflow import MeanFlow
from jaxdistill.methods.trajectory.progressive import Progressive
from jaxdistill.methods.trajectory.reflow import Reflow
from jaxdistill.methods.trajectory.scm import SCM

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


# fmt: off
CHAINS = {  # (method, how the network is read, steps): deterministic ones, and renoising ones at one step
    "progressive": (Progressive(teacher_steps=8, student_steps=4), Denoiser(), 4),
    "progressive from DDPM": (Progressive(teacher_steps=8, student_steps=4), Denoiser(param=Noise(time_scale=999.0), native=DDPM()), 4),
    "reflow": (Reflow(), Denoiser(native=Flow(shift=3.0)), 3),
    "flow matching": (FlowMatching(solver="ddim", process=EDM()), Denoiser(param=EDMPrecond(), native=EDM()), 5),
    "phased": (PhasedDMD(), Denoiser(param=VPVelocity(time_scale=999.0), native=DDPM()), 4),
    "dmd2": (DMD2(), Denoiser(param=Noise(time_scale=999.0), native=DDPM(scaled=True, beta_min=.00085, beta_max=.012)), 1),
    "swiftbrush": (SwiftBrush(process=DDPM()), Denoiser(param=Noise(time_scale=999.0), native=DDPM()), 1),
    "uni-instruct": (UniInstruct(), Denoiser(param=EDMPrecond(), native=EDM()), 1),
    "scm": (SCM(), Denoiser(param=TrigPrecond(), native=Trig()), 1),
}
# fmt: on


@pytest.mark.parametrize("name", CHAINS)
def test_the_cards_chain_is_the_methods_sampler(name):
    """On a network that is a formula, in float32: sums of a few terms of size up to 80, in another order."""
    method, denoiser, steps = CHAINS[name]
    raw = lambda x, t, cond: jnp.sin(3 * x) + jnp.cos(t / 100)[:, None] * x
    noise = jnp.asarray(np.random.default_rng(0).standard_normal((6, 3)), jnp.float32)
    expected = method.sample(denoiser.wrap(raw, method.process), noise, None, jax.random.key(0), steps)
    x = _start(method, denoiser, steps) * noise
    x0, eps = 0.0, noise
    for i, (t, scale, p, q, alpha, sigma) in enumerate(chain(method, denoiser, steps)):
        x = alpha * x0 + sigma * eps if i else x
        x0 = p * x + q * raw(scale * x, jnp.full(6, t), None)
        eps = (x - alpha * x0) / sigma
    np.testing.assert_allclose(x0, expected, rtol=2e-4, atol=2e-5 * np.abs(expected).max())


def test_a_sampler_that_is_no_chain_is_not_made_one():
    for method, steps in ((FlowMatching(solver="heun"), 4), (Reflow(process=Flow(shift=3.0)), 2), (MeanFlow(), 2), (DMD2(), 2)):
        with pytest.raises(Refused):
            chain(method, Denoiser(), steps)


def test_a_card_in_words_where_the_sampler_is_more(tmp_path):
    """Heun's method is no chain of x0: the card says where it is, and how the network is loaded."""
    student = Role(**NET, init="fresh")
    config = experiment(data=spec("data.digits:Digits"), method=spec("methods.trajectory.flow_matching:FlowMatching", solver="heun"),
                        roles=dict(student=student))  # fmt: skip
    card = exported(config, tmp_path)
    assert "more than a chain of x0" in card and "jaxdistill.methods.trajectory.flow_matching" in card
    assert 'DiTTransformer2DModel.from_pretrained(".")' in card and "randn" not in card


def test_an_adapted_student_leaves_merged_or_as_its_adapter(tmp_path):
    roles = dict(teacher=Role(**NET, init="fresh"), student=Role(lora=Lora(rank=2)), fake=Role(lora=Lora(rank=2)))
    config = experiment(data=spec("data.digits:Digits"), method=spec("methods.distribution.diff_instruct:DiffInstruct"), roles=roles)
    for adapter, file in ((False, "diffusion_pytorch_model.safetensors"), (True, "pytorch_lora_weights.safetensors")):
        (tmp_path / file).mkdir()
        assert "DiTTransformer2DModel" in exported(config, tmp_path / file, ("teacher", "student"), adapter=adapter)
        assert sorted(p.name for p in (tmp_path / file / "out").iterdir()) == sorted(["README.md", "config.json", file])


def exported(config, folder, roles=("student",), **how):
    """The card of a student with random weights, exported to `folder`/out."""
    built = Experiment(config, folder)
    report = {"models": [{"name": "student", "nfe": 1}], "steps": 1, "config": {"method": {"name": "m"}, "seed": 0}}
    (folder / "report.json").write_text(json.dumps(report))
    params = {role: built.nets[role].init(jax.random.key(i)) for i, role in enumerate(roles)}
    export(Trained(built, built.nets, params), folder / "out", **how)
    return (folder / "out" / "README.md").read_text()


def test_a_text_conditional_students_recipe_runs(tmp_path):
    """Stable Diffusion's U-Net, small, a student of eps on DDPM: its card's code gives what the method samples from that noise."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    model = spec(
        "models.unet:UNet", size=8, channels=1, widths=(8, 8), layers=1, depths=(1, 0), mid_depth=1, heads=(2, 2), text_dim=6, groups=4
    )
    denoiser = Denoiser(param=Noise(time_scale=999.0), native=DDPM(scaled=True, beta_min=0.00085, beta_max=0.012))
    role = Role(model=model, denoiser=denoiser, init="fresh")
    config = experiment(data=spec("data.digits:Digits"), method=spec("methods.distribution.diff_instruct:DiffInstruct"),
                        roles=dict(teacher=role, student=role, fake=role))  # fmt: skip
    card = exported(config, tmp_path)
    scope = {}
    torch.manual_seed(0)
    exec(card.split("```python\n")[1].split("```")[0].replace('"."', repr(str(tmp_path / "out"))), scope)
    net, params = interop.load(tmp_path / "out")
    method = dataclasses.replace(Experiment(config, tmp_path).method)
    noise = np.moveaxis(scope["x"].numpy(), 1, -1) / _start(method, denoiser, 1)
    call = denoiser.wrap(lambda *a: net.apply(params, *a), method.process)
    ours = method.sample(call, jnp.asarray(noise), {"text": scope["cond"].numpy()}, jax.random.key(0), 1)
    theirs = np.moveaxis(scope["x0"].numpy(), 1, -1)
    assert np.abs(ours - theirs).max() <= 1e-4 * theirs.std() * 14.6  # x0 = (x - sigma eps) / alpha, alpha 1 / 14.6 at t_max
