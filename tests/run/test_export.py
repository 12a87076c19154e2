"""What a student leaves as: a folder for each member of a bank, a card whose recipe is the method's
own sampler.
"""

import dataclasses
import json
import re
import shutil
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import interop
from jaxdistill.core.build import Lora, Role, experiment, plain, spec
from jaxdistill.core.net import make_net
from jaxdistill.core.types import Refused
from jaxdistill.data.digits import Digits
from jaxdistill.data.language import Carry, Markov
from jaxdistill.data.mixtures import Mixture
from jaxdistill.data.synthetic import Synthetic
from jaxdistill.data.text import PackedJson, PaddedJson
from jaxdistill.data.tokenizers import byte_files
from jaxdistill.diffusion.denoiser import (
    Denoiser,
    EDMPrecond,
    Noise,
    TrigPrecond,
    Velocity,
    VPVelocity,
)
from jaxdistill.diffusion.process import DDPM, EDM, Flow, Trig
from jaxdistill.interop.chain import SCHEDULER, chain, scheduler, start
from jaxdistill.interop.families import dit
from jaxdistill.interop.folder import MARKER
from jaxdistill.interop.safetensors import write_json
from jaxdistill.interop.tokenizer import with_special_tokens
from jaxdistill.methods.distribution.diff_instruct import (
    DiffInstruct,
    EDMDiffInstruct,
)
from jaxdistill.methods.distribution.dmd2 import DMD2
from jaxdistill.methods.distribution.multi_student import MultiStudent
from jaxdistill.methods.distribution.phased_dmd import PhasedDMD
from jaxdistill.methods.distribution.swiftbrush import SwiftBrush
from jaxdistill.methods.distribution.uni_instruct import UniInstruct
from jaxdistill.methods.language.kd import KD
from jaxdistill.methods.language.sft import SFT
from jaxdistill.methods.trajectory.flow_matching import FlowMatching
from jaxdistill.methods.trajectory.meanflow import MeanFlow
from jaxdistill.methods.trajectory.progressive import Progressive
from jaxdistill.methods.trajectory.reflow import Reflow
from jaxdistill.methods.trajectory.scm import SCM
from jaxdistill.models.denoisers.dit import DiT
from jaxdistill.models.denoisers.unet import UNet
from jaxdistill.models.language.lm import LM
from jaxdistill.models.vision.perceptron import Perceptron
from jaxdistill.objectives.partition import Consecutive
from jaxdistill.run import loop
from jaxdistill.run.checkpoint import save_params
from jaxdistill.run.experiment import Experiment
from jaxdistill.run.export import Student, check, export, needed_roles
from jaxdistill.run.loop import Trained
from launch import export as command

NET = dict(
    model=DiT(size=4, patch=2, channels=1, dim=16, depth=2, heads=2, classes=4),
    denoiser=Denoiser(param=Velocity(time_scale=1000.0)),
)


def _of(config) -> dict:
    """The parts of a report.json that are those of its config."""
    plain = json.loads(config.to_json())
    return {"config": plain, "method": plain["method"]["name"]}


def reported(rows: list, **config) -> dict:
    """A report.json as a run leaves it."""
    given = {"method": {"name": "methods.m:M"}, "seed": 0, **config}
    return {
        "config": given,
        "method": given["method"]["name"],
        "steps": 1,
        "seconds": 1.0,
        "models": rows,
        "claim": {},
    }


@pytest.mark.full
@pytest.mark.parametrize("members", [0, 2])
def test_each_member_leaves_in_a_folder_of_its_own(members, tmp_path):
    role = Role(**NET, init="fresh", bank=members)
    method = MultiStudent(
        partition=Consecutive(cells=2, classes=4),
        shares=(0.0, 1.0, 0.0),
    )
    if not members:
        method = DiffInstruct()
    config = experiment(
        data=Digits(),
        method=method,
        roles=dict(teacher=Role(**NET), student=role, fake=role),
    )
    built = Experiment(config, tmp_path)
    rows = [{"name": "student", "nfe": 1, "energy": 0.5}]
    (tmp_path / "report.json").write_text(json.dumps(reported(rows)))
    params = {"student": built.nets["student"].init(jax.random.key(0))}
    export(Trained(built, built.nets, params), tmp_path / "out")
    for k in range(members or 1):
        folder = tmp_path / "out" / str(k) if members else tmp_path / "out"
        net, loaded = interop.load(folder)
        mine = jax.tree.map(
            lambda w, k=k: w[k] if members else w, params["student"]
        )
        assert net.config == NET["model"] or type(net.config).__name__ == "DiT"
        for a, b in zip(
            jax.tree.leaves(loaded), jax.tree.leaves(mine), strict=True
        ):
            np.testing.assert_array_equal(a, b)
        card = (folder / "README.md").read_text()
        assert "DiTTransformer2DModel" in card and (
            f"student {k}: one of 2 members" in card
        ) == bool(members)
    assert (tmp_path / "out" / "config.json").exists() == (not members)


def test_an_export_reads_the_weights_of_the_roles_that_leave(tmp_path):
    """The teacher's folder is gone."""
    net = make_net(NET["model"], config=NET["model"])
    interop.save(tmp_path / "teacher", net, net.init(jax.random.key(1)))
    config = experiment(
        data=Digits(),
        method=DiffInstruct(),
        roles=dict(
            teacher=Role(**NET, init=str(tmp_path / "teacher")),
            student=Role(**NET),
            fake=Role(**NET),
        ),
    )
    workdir = tmp_path / "run"
    built = Experiment(config, workdir)
    params = {
        "student": net.init(jax.random.key(2)),
        "fake": net.init(jax.random.key(3)),
    }
    save_params(workdir / "stages" / "0", params)
    write_json(workdir / "config.json", json.loads(config.to_json()))
    report = reported([{"name": "student", "nfe": 1, "energy": 0.5}])
    write_json(workdir / "report.json", {**report, **_of(config)})
    assert loop.load(workdir).params.keys() == {"teacher", "student", "fake"}
    shutil.rmtree(tmp_path / "teacher")
    with pytest.raises(Refused, match="teacher"):
        loop.load(workdir)
    assert needed_roles(built) == {"student"}
    command.export([f"--workdir={workdir}"])
    _, loaded = interop.load(workdir / "export")
    jax.tree.map(np.testing.assert_array_equal, loaded, params["student"])


def test_a_role_on_an_adapter_needs_its_base(tmp_path):
    lora = Role(lora=Lora(rank=2))
    teacher = Role(**NET, init="fresh")
    config = experiment(
        data=Digits(),
        method=DiffInstruct(),
        roles=dict(teacher=teacher, student=lora, fake=lora),
    )
    built = Experiment(config, tmp_path)
    assert needed_roles(built) == {"student", "teacher"}
    assert needed_roles(built, adapter=True) == {"student"}
    assert built.with_bases(["fake"]) == {"fake", "teacher"}


# (method, how the network is read, steps): deterministic ones, and renoising ones at one step
CHAINS = {
    "progressive": (Progressive(teacher_steps=8, student_steps=4), Denoiser(), 4),
    "progressive from DDPM": (
        Progressive(teacher_steps=8, student_steps=4),
        Denoiser(param=Noise(time_scale=999.0), native=DDPM()),
        4,
    ),
    "reflow": (Reflow(), Denoiser(native=Flow(shift=3.0)), 3),
    "flow matching": (
        FlowMatching(solver="ddim", process=EDM()),
        Denoiser(param=EDMPrecond(), native=EDM()),
        5,
    ),
    "phased": (
        PhasedDMD(),
        Denoiser(param=VPVelocity(time_scale=999.0), native=DDPM()),
        4,
    ),
    "dmd2": (
        DMD2(),
        Denoiser(
            param=Noise(time_scale=999.0),
            native=DDPM(scaled=True, beta_min=0.00085, beta_max=0.012),
        ),
        1,
    ),
    "swiftbrush": (
        SwiftBrush(process=DDPM()),
        Denoiser(param=Noise(time_scale=999.0), native=DDPM()),
        1,
    ),
    "uni-instruct": (UniInstruct(), Denoiser(param=EDMPrecond(), native=EDM()), 1),
    "scm": (SCM(), Denoiser(param=TrigPrecond(), native=Trig()), 1),
}


@pytest.mark.full
@pytest.mark.parametrize("name", CHAINS)
def test_the_cards_chain_is_the_methods_sampler(name):
    """On a network that is a formula, in float32: sums of a few terms of size up to 80, in another
    order.
    """
    method, denoiser, steps = CHAINS[name]
    raw = lambda x, t, cond: jnp.sin(3 * x) + jnp.cos(t / 100)[:, None] * x
    noise = jnp.asarray(
        np.random.default_rng(0).standard_normal((6, 3)), jnp.float32
    )
    expected = method.sample(
        denoiser.wrap(raw, method.process), noise, None, jax.random.key(0), steps
    )
    x = start(method, denoiser, steps) * noise
    x0 = 0.0
    eps = noise
    for i, (t, scale, p, q, alpha, sigma) in enumerate(
        chain(method, denoiser, steps)
    ):
        x = alpha * x0 + sigma * eps if i else x
        x0 = p * x + q * raw(scale * x, jnp.full(6, t), None)
        eps = (x - alpha * x0) / sigma
    np.testing.assert_allclose(
        x0, expected, rtol=2e-4, atol=2e-5 * np.abs(expected).max()
    )


SD = DDPM(scaled=True, beta_min=0.00085, beta_max=0.012)
QUARTERS = tuple(t / 999 for t in (999, 749, 499, 249))
EPS = Denoiser(param=Noise(time_scale=999.0), native=SD)
V = Denoiser(param=VPVelocity(time_scale=999.0), native=DDPM())
FLOW = Denoiser(param=Velocity(time_scale=1000.0))
# (method, how the network is read, steps), diffusers' class, what set_timesteps is called with
SCHEDULERS = {
    "reflow": (
        (Reflow(), FLOW, 1),
        "FlowMatchEulerDiscreteScheduler",
        "num_inference_steps=1",
    ),
    "three steps": (
        (Reflow(), FLOW, 3),
        "FlowMatchEulerDiscreteScheduler",
        "sigmas=[1, 0.666667, 0.333333]",
    ),
    "shifted": (
        (Progressive(process=Flow(shift=3.0), teacher_steps=8), FLOW, 4),
        "FlowMatchEulerDiscreteScheduler",
        "sigmas=[1, 0.75, 0.5, 0.25]",
    ),
    "phased": (
        (PhasedDMD(process=Flow(shift=5.0)), FLOW, 4),
        "FlowMatchEulerDiscreteScheduler",
        "sigmas=[1, 0.75, 0.5, 0.25]",
    ),
    "fresh noise": (
        (DMD2(student_times=(1.0, 0.6, 0.3)), FLOW, 3),
        "FlowMatchEulerDiscreteScheduler",
        "sigmas=[1, 0.6, 0.3]",
    ),
    "seen as less": (
        (DMD2(student_times=(0.6,)), FLOW, 1),
        "FlowMatchEulerDiscreteScheduler",
        "sigmas=[0.6]",
    ),
    "scm": (
        (
            SCM(process=Trig(sigma_data=1.0), student_times=(np.pi / 2, 1.1)),
            Denoiser(),
            2,
        ),
        "FlowMatchEulerDiscreteScheduler",
        "sigmas=[1, 0.662705]",
    ),
    "dmd2": ((DMD2(process=SD), EPS, 1), "LCMScheduler", "num_inference_steps=1"),
    "from flow": ((DMD2(), EPS, 1), "LCMScheduler", "num_inference_steps=1"),
    "swiftbrush": (
        (SwiftBrush(process=DDPM()), V, 1),
        "LCMScheduler",
        "num_inference_steps=1",
    ),
    "at 399": (
        (DMD2(process=SD, student_times=(399 / 999,)), EPS, 1),
        "LCMScheduler",
        "num_inference_steps=1",
    ),
    "quarters": (
        (DMD2(process=SD, student_times=QUARTERS), EPS, 4),
        "LCMScheduler",
        "num_inference_steps=4",
    ),
    "uneven": (
        (DMD2(process=SD, student_times=(QUARTERS[0], *QUARTERS[2:])), EPS, 3),
        "LCMScheduler",
        "timesteps=[999, 499, 249]",
    ),
    "ddim": (
        (Progressive(teacher_steps=8), EPS, 4),
        "EulerDiscreteScheduler",
        "timesteps=[999, 673.156, 353.89, 95.3136]",
    ),
    "ddim of v": (
        (Progressive(teacher_steps=8), V, 2),
        "EulerDiscreteScheduler",
        "timesteps=[999, 258.093]",
    ),
}


@pytest.mark.full
@pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # diffusers with numpy 2
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_scheduler_is_the_methods_sampler(name, tmp_path, monkeypatch):
    """diffusers' own steps on a network that is a formula, with our draws of noise.

    Its betas are multiplied in float32, 1000 of them, which leaves 6e-5 of alpha^2.
    """
    torch = pytest.importorskip("torch", reason="torch is not installed")
    diffusers = pytest.importorskip(
        "diffusers", reason="diffusers is not installed"
    )
    (method, denoiser, steps), cls, times = SCHEDULERS[name]
    raw = lambda x, t, sin, cos: sin(3 * x) + cos(t / 100)[:, None] * x
    key = jax.random.key(0)
    noise = jnp.asarray(
        np.random.default_rng(0).standard_normal((6, 3)), jnp.float32
    )
    net = denoiser.wrap(
        lambda x, t, cond: raw(x, t, jnp.sin, jnp.cos), method.process
    )
    expected = np.asarray(method.sample(net, noise, None, key, steps))
    found = scheduler(method, denoiser, steps)
    assert (found.name, found.times) == (cls, times)
    write_json(tmp_path / SCHEDULER, found.config)
    stepper = getattr(diffusers, cls).from_pretrained(
        tmp_path, subfolder="scheduler"
    )
    # it knows every one of them
    assert found.config.items() <= {**stepper.config, "_class_name": cls}.items()
    drawn = iter(
        torch.tensor(
            np.asarray(jax.random.normal(jax.random.fold_in(key, i), noise.shape))
        )
        for i in range(steps)
    )
    monkeypatch.setattr(
        sys.modules[type(stepper).__module__],
        "randn_tensor",
        lambda *args, **kwargs: next(drawn),
    )
    stepper.set_timesteps(**eval(f"dict({times})"))
    x = torch.tensor(np.asarray(noise)) * (
        stepper.init_noise_sigma if found.scales else 1.0
    )
    for t in stepper.timesteps:
        seen = stepper.scale_model_input(x, t) if found.scales else x
        x = stepper.step(
            raw(seen, t.expand(6).float(), torch.sin, torch.cos), t, x
        ).prev_sample
    np.testing.assert_allclose(
        x.numpy(), expected, rtol=0, atol=1e-4 * np.abs(expected).max()
    )


def test_where_no_scheduler_steps_so_it_says_why():
    for (method, denoiser, steps), said in (
        (
            (UniInstruct(), Denoiser(param=EDMPrecond(), native=EDM()), 1),
            "no scheduler for EDMPrecond(time_scale=1) on EDM",
        ),
        (
            (UniInstruct(process=SD, student_times=(399 / 999,)), EPS, 1),
            "starts from noise of size 0.75757",
        ),
        (
            (SCM(), Denoiser(param=TrigPrecond(), native=Trig()), 1),
            "no scheduler for TrigPrecond",
        ),
        (
            (Reflow(), Denoiser(param=Velocity(time_scale=0.5)), 1),
            "no scheduler for Velocity(time_scale=0.5) on Flow",
        ),
        (
            (DMD2(process=SD), dataclasses.replace(EPS, param=Noise()), 1),
            "no scheduler for Noise(time_scale=1) on DDPM",
        ),
        (
            (DMD2(student_times=(1.0, 0.5)), EPS, 2),
            "LCMScheduler has whole time indices, not [999, 353.89]",
        ),
        (
            (Reflow(), Denoiser(native=Flow(shift=3.0)), 1),
            "no scheduler for Velocity(time_scale=1) on Flow",
        ),
    ):
        with pytest.raises(Refused, match=re.escape(said)):
            scheduler(method, denoiser, steps)


def test_a_sampler_that_is_no_chain_is_not_made_one():
    for method, steps in (
        (FlowMatching(solver="heun"), 4),
        (Progressive(process=DDPM()), 2),  # index 0 is not free of noise
        (Reflow(process=Flow(shift=3.0)), 2),
        (MeanFlow(), 2),
        (DMD2(), 2),
    ):
        with pytest.raises(Refused):
            chain(method, Denoiser(), steps)


@pytest.mark.parametrize("call", [dit.FAMILY.call, ""])
def test_a_card_in_words_where_the_sampler_is_more(call, tmp_path, monkeypatch):
    """Heun's method is no chain of x0: the card says where it is, and how the network is loaded. Of
    a family without Python for one evaluation too.
    """
    monkeypatch.setattr(
        Student, "family", dataclasses.replace(dit.FAMILY, call=call)
    )
    student = Role(**NET, init="fresh")
    config = experiment(
        data=Digits(),
        method=FlowMatching(solver="heun"),
        roles=dict(student=student),
    )
    card = exported(config, tmp_path)[1]
    assert (
        "more than a chain of x0" in card
        and "jaxdistill.methods.trajectory.flow_matching" in card
    )
    assert (
        'DiTTransformer2DModel.from_pretrained(".")' in card and "randn" not in card
    )


def test_each_expert_leaves_with_the_scheduler_of_the_whole_chain(tmp_path):
    method = PhasedDMD(process=Flow(shift=5.0), phase_steps=(2, 2))
    net = {**NET, "model": dataclasses.replace(NET["model"], classes=10)}
    config = experiment(
        data=Digits(),
        method=method,
        roles=dict(
            teacher=Role(**net, init="fresh"),
            **{role: Role() for role in method.inits},
        ),
    )
    trained, cards = exported(config, tmp_path, method.exports, nfe=4)
    for role in trained.experiment.method.exports:
        config = json.loads((tmp_path / "out" / role / SCHEDULER).read_text())
        assert (config["_class_name"], config["shift"]) == (
            "FlowMatchEulerDiscreteScheduler",
            5.0,
        )
        assert f"{role}: one of 2 experts" in cards
    assert cards.count("scheduler.set_timesteps(sigmas=[1, 0.75, 0.5, 0.25])") == 2


def exported(config, folder, roles=("student",), nfe=1, **how):
    """The run of a student with random weights, adapters' too, and the cards in `folder`/out, where
    it is exported to.
    """
    built = Experiment(config, folder)
    report = reported([{"name": "student", "nfe": nfe}])
    folder.mkdir(exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report))
    params = {
        role: built.nets[role].init(jax.random.key(i))
        for i, role in enumerate(roles)
    }
    draw = np.random.default_rng(0)
    trained = Trained(
        built,
        built.nets,
        jax.tree.map(
            lambda w: w + jnp.asarray(0.1 * draw.standard_normal(w.shape), w.dtype),
            params,
        ),
    )
    export(trained, folder / "out", **how)
    return trained, "".join(
        file.read_text() for file in sorted((folder / "out").rglob("README.md"))
    )


def run_card(card, torch, monkeypatch, folder, base=""):
    """(noise, samples), channels last, and the condition, of the card's code."""
    scope = {}
    drawn = []
    draw = torch.randn
    monkeypatch.setattr(
        torch, "randn", lambda *shape: drawn.append(draw(*shape)) or drawn[-1]
    )
    exec(
        card.split("```python\n")[1]
        .split("```")[0]
        .replace('"."', repr(str(folder)))
        .replace('"BASE"', repr(str(base))),
        scope,
    )
    last = lambda x: np.moveaxis(x.numpy(), 1, -1)
    return (
        last(drawn[-1]),
        last(scope["x"] if "scheduler" in scope else scope["x0"]),
        scope["cond"].numpy(),
    )


UNET = UNet(
    size=8,
    channels=1,
    widths=(8, 8),
    layers=1,
    depths=(1, 0),
    mid_depth=1,
    heads=(2, 2),
    text_dim=6,
    groups=4,
)


@pytest.mark.full
@pytest.mark.parametrize("leaves", ["whole", "merged", "adapter"])
def test_a_text_conditional_students_recipe_runs(leaves, tmp_path, monkeypatch):
    """Stable Diffusion's U-Net, small, a student of eps on DDPM: its card's code gives what the
    method samples from that noise.
    """
    torch = pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    pytest.importorskip("peft", reason="peft is not installed")
    teacher = Role(model=UNET, denoiser=EPS, init="fresh")
    student = (
        teacher
        if leaves == "whole"
        else Role(lora=Lora(rank=2, targets=r".*attn[12]/to_[qkv]/kernel"))
    )
    config = experiment(
        data=Digits(),
        method=DiffInstruct(),
        roles=dict(teacher=teacher, student=student, fake=student),
    )
    trained, card = exported(
        config, tmp_path, ("teacher", "student"), adapter=leaves == "adapter"
    )
    assert (
        "scheduler = LCMScheduler" in card
        and "DiffusionPipeline.from_pretrained(..., unet=model, scheduler=scheduler)"
        in card
    )
    interop.save(
        tmp_path / "base", trained.nets["teacher"], trained.params["teacher"]
    )
    noise, theirs, text = run_card(
        card, torch, monkeypatch, tmp_path / "out", tmp_path / "base"
    )
    ours = trained.experiment.method.sample(
        trained.bound().student,
        jnp.asarray(noise),
        {"text": text},
        jax.random.key(0),
        1,
    )
    # x0 = (x - sigma eps) / alpha, alpha 1 / 14.6 at t_max
    assert np.abs(ours - theirs).max() <= 1e-4 * theirs.std() * 14.6
    weights = (
        "pytorch_lora_weights" if leaves == "adapter" else "diffusion_pytorch_model"
    )
    names = [
        MARKER,
        "README.md",
        "config.json",
        "scheduler",
        f"{weights}.safetensors",
    ]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(names)


def test_a_class_without_adapters_leaves_merged_only(tmp_path):
    roles = dict(
        teacher=Role(**NET, init="fresh"),
        student=Role(lora=Lora(rank=2)),
        fake=Role(lora=Lora(rank=2)),
    )
    config = experiment(
        data=Digits(),
        method=DiffInstruct(),
        roles=roles,
    )
    with pytest.raises(
        Refused,
        match="diffusers puts no adapter on DiTTransformer2DModel; "
        "export without --adapter, merged",
    ):
        exported(config, tmp_path, ("teacher", "student"), adapter=True)
    assert not (tmp_path / "out").exists()
    assert (
        "DiTTransformer2DModel"
        in exported(config, tmp_path, ("teacher", "student"))[1]
    )


@pytest.mark.full
def test_an_edm_students_card_loads_it_in_the_repositorys_class(
    tmp_path, monkeypatch
):
    """The class is a stand-in that notes what it is given and answers with our network; the chain
    around it is the card's.
    """
    torch = pytest.importorskip("torch", reason="torch is not installed")
    role = Role(
        model=spec(
            "models.denoisers.edm:SongUNet",
            size=8,
            channels=1,
            width=8,
            multiples=(1, 1),
            blocks=1,
            attention=(4,),
            classes=10,
        ),
        denoiser=Denoiser(param=EDMPrecond(), native=EDM()),
        init="fresh",
    )
    config = experiment(
        data=Digits(),
        method=EDMDiffInstruct(),
        roles=dict(teacher=role, student=role, fake=role),
    )
    trained, card = exported(config, tmp_path)
    net, params = interop.load(tmp_path / "out")

    class SongUNet(torch.nn.Module):
        def __init__(
            self, img_resolution, in_channels, out_channels, model_channels, **rest
        ):
            super().__init__()
            assert (
                img_resolution,
                in_channels,
                out_channels,
                model_channels,
                rest["label_dim"],
            ) == (8, 1, 1, 8, 10)

        def load_state_dict(self, weights):
            assert all(
                name.split(".")[0]
                in ("enc", "dec", "map_layer0", "map_layer1", "map_label")
                for name in weights
            )

        def forward(self, x, noise_labels, class_labels):
            raw = net.apply(
                params,
                np.moveaxis(x.numpy(), 1, -1),
                noise_labels.numpy(),
                class_labels.numpy().argmax(1),
            )
            return torch.tensor(np.moveaxis(np.asarray(raw), -1, 1))

    monkeypatch.setitem(sys.modules, "training", types.ModuleType("training"))
    monkeypatch.setitem(
        sys.modules, "training.networks", types.SimpleNamespace(SongUNet=SongUNet)
    )
    noise, theirs, labels = run_card(card, torch, monkeypatch, tmp_path / "out")
    ours = trained.experiment.method.sample(
        trained.bound().student,
        jnp.asarray(noise),
        labels.argmax(1),
        jax.random.key(0),
        1,
    )
    assert (
        not (tmp_path / "out" / "scheduler").exists()
        and "scheduler" not in card.split("## Config")[0].split("## Use")[1]
    )
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-4 * np.abs(ours).max())


TINY = LM(vocab=259, dim=16, mlp=16, heads=2, depth=1, max_length=32)


@pytest.fixture
def prompts(tmp_path):
    """A file of prompts with responses."""
    lines = [
        json.dumps({"prompt": f"p{i}", "response": f"r{i}"}) for i in range(40)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    return str(tmp_path / "a.jsonl")


@pytest.fixture
def tokenizer(tmp_path):
    """A folder of `transformers` with a tokenizer of bytes, a chat template, and code."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name, value in byte_files(begins=True).items():
        write_json(folder / name, value)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (folder / "tokenization_mine.py").write_text("raise SystemExit")
    (folder / "config.json").write_text("{}")
    return folder


def language(data, student=TINY, **roles):
    """The config of an ordinary training on `data`."""
    student = (
        student if isinstance(student, Role) else Role(model=student, init="fresh")
    )
    return experiment(data=data, method=SFT(), roles=dict(student=student, **roles))


def in_transformers(out):
    """(model, tokenizer, generation_config.json) of an exported folder."""
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed"
    )
    pytest.importorskip("torch", reason="torch is not installed")
    model = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    return (
        model,
        transformers.AutoTokenizer.from_pretrained(out),
        json.loads((out / "generation_config.json").read_text()),
    )


def test_a_language_student_ends_its_text(prompts, tmp_path):
    """transformers stops where the network is made to say the end token, and not before; its ids
    are those of training.
    """
    data = PackedJson(length=32, batch_size=4, path=prompts)
    trained, card = exported(language(data), tmp_path)
    model, tokenizer, generation = in_transformers(tmp_path / "out")
    assert (
        generation["bos_token_id"],
        generation["eos_token_id"],
        generation["pad_token_id"],
    ) == (
        257,
        258,
        256,
    )
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"]
        == 258
    )
    codec = trained.experiment.data.codec
    text = "héllo  wörld\n日本 <|x|>"
    expected = trained.experiment.data.prompt_tokens(text[:-1] + ">")[:-1]
    # begins, and "\n" is `between`
    assert tokenizer(text)["input_ids"] == expected.tolist()
    assert tokenizer.decode(codec.encode(text)) == text and (
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    ) == (258, 256)
    said = iter([65, 66, 258, 67])

    def say(module, given, logits):
        logits[:, -1, next(said)] = 1e9
        return logits

    model.lm_head.register_forward_hook(say)
    tokens = tokenizer("p1\n", return_tensors="pt").input_ids
    assert model.generate(tokens, max_new_tokens=9, do_sample=False)[
        0
    ].tolist() == [
        257,
        *b"p1\n",
        65,
        66,
        258,
    ]
    assert 'tokenizer("PROMPT\\n"' in card
    exec(
        card.split("```python\n")[1]
        .split("```")[0]
        .replace('"."', repr(str(tmp_path / "out"))),
        {},
    )


def test_a_stored_tokenizer_goes_along_without_its_code(
    prompts, tokenizer, tmp_path
):
    data = PaddedJson(
        prompt_length=16,
        response_length=16,
        batch_size=4,
        path=prompts,
        tokenizer=str(tokenizer),
    )
    exported(language(data), tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (
            tokenizer / name
        ).read_bytes()
    assert not list((tmp_path / "out").glob("*.py"))
    assert in_transformers(tmp_path / "out")[2]["eos_token_id"] == 258


def test_the_folder_that_a_student_starts_from_gives_the_tokenizer(
    tokenizer, tmp_path
):
    """Where the data has none: then the special tokens are that folder's too."""
    own = dataclasses.replace(TINY, eos=(258, 7), bos=257, pad=256)
    net = make_net(own, config=own)
    with pytest.raises(Refused):  # what is there is no export
        interop.save(tokenizer, net, net.init(jax.random.key(0)))
    interop.save(tmp_path / "base", net, net.init(jax.random.key(0)))
    for file in tokenizer.glob("[t,c]*.j*"):
        if file.name != "config.json":
            (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
    data = Synthetic(
        batch_size=4,
        arrays={"tokens": "integers 259 16", "mask": "constant 1 16"},
    )
    exported(language(data, Role(init=str(tmp_path / "base"))), tmp_path)
    _, found, generation = in_transformers(tmp_path / "out")
    assert generation["eos_token_id"] == [258, 7] and found.eos_token_id == 258
    fresh = language(data, TINY)
    fresh.method = plain(KD())
    with fresh.unlocked():
        fresh.roles.teacher = language(
            data, Role(init=str(tmp_path / "base"))
        ).roles.student
    exported(fresh, tmp_path / "kd")
    assert (tmp_path / "kd" / "out" / "chat_template.jinja").is_file()


def test_ids_without_text_are_described(tmp_path):
    _, card = exported(
        language(
            Markov(vocab=24, length=16, batch_size=4),
            dataclasses.replace(TINY, vocab=24),
        ),
        tmp_path,
    )
    assert not list((tmp_path / "out").glob("tokenizer*"))
    said = (
        "No tokenizer goes with it: its tokens are ids of `jaxdistill.data.language:Markov`. "
        "A random Markov chain, stationary from the first token"
    )
    assert said in card
    assert (
        json.loads((tmp_path / "out" / "generation_config.json").read_text())[
            "eos_token_id"
        ]
        is None
    )


def test_characters_are_a_tokenizer(tmp_path):
    trained, _ = exported(
        language(
            Carry(digits=1, batch_size=4), dataclasses.replace(TINY, vocab=14)
        ),
        tmp_path,
    )
    _, tokenizer, generation = in_transformers(tmp_path / "out")
    row = trained.experiment.data.evaluation(1)["tokens"][0]
    text = trained.experiment.data.text(row)
    assert (
        tokenizer(text)["input_ids"] == row.tolist()
        and tokenizer.decode(row) == text
    )
    assert (
        generation["eos_token_id"],
        generation["pad_token_id"],
        generation["bos_token_id"],
    ) == (
        12,
        13,
        None,
    )


@pytest.mark.parametrize("eos", [(), (258,), (7, 258), (2,)])
def test_whose_special_tokens(eos):
    """The student's own where its configuration has the data's end token; else the data's."""
    data = types.SimpleNamespace(
        codec=types.SimpleNamespace(eos=258, bos=None, pad=256)
    )
    found = with_special_tokens(dataclasses.replace(TINY, eos=eos, bos=1), data)
    assert found.eos == (eos if 258 in eos else (258,))
    assert (found.bos, found.pad) == ((1, 256) if 258 in eos else (-1, 256))
    assert with_special_tokens(TINY, types.SimpleNamespace()) == TINY


@pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning"
)  # peft asks for an attribute of old
def test_a_language_adapter_says_where_its_base_is_and_what_ends_its_text(
    prompts, tmp_path
):
    pytest.importorskip("peft", reason="peft is not installed")
    base = Role(model=TINY, init="fresh")
    config = experiment(
        data=PackedJson(length=32, batch_size=4, path=prompts),
        method=KD(),
        roles=dict(
            teacher=base,
            student=Role(
                lora=Lora(base="teacher", rank=2, targets=r".*to_q/kernel")
            ),
        ),
    )
    trained, card = exported(config, tmp_path, ("teacher", "student"), adapter=True)
    assert "`BASE` is the folder of the network that it goes on, `teacher`" in card
    assert (
        "model.generation_config.eos_token_id = [258]" in card
        and (tmp_path / "out" / "tokenizer.json").is_file()
    )
    interop.save(
        tmp_path / "base", trained.nets["teacher"], trained.params["teacher"]
    )
    code = card.split("```python\n")[1].split("```")[0]
    exec(
        code.replace('"."', repr(str(tmp_path / "out"))).replace(
            '"BASE"', repr(str(tmp_path / "base"))
        ),
        {},
    )


@pytest.mark.parametrize(
    "case", ["run", "no class", "no adapter", "unfinished", "matrix"]
)
def test_what_cannot_be_exported_is_refused_before_a_weight_is_read(case, tmp_path):
    role = Role(**NET, init="fresh")
    student = Role(lora=Lora(rank=2)) if case == "matrix" else role
    if case == "no class":
        student = role = Role(model=Perceptron(), init="fresh")
    data = Mixture() if case == "no class" else Digits()
    method = DiffInstruct()
    built = Experiment(
        experiment(
            data=data,
            method=method,
            roles=dict(teacher=role, student=student, fake=student),
        ),
        tmp_path,
    )
    if case != "unfinished":
        (tmp_path / "report.json").write_text(json.dumps(reported([])))
    (tmp_path / "stages").mkdir()
    target = tmp_path if case == "run" else tmp_path / "out"
    said = {
        "run": "is a run",
        "no class": "no PyTorch class",
        "no adapter": "no adapter",
        "unfinished": "has that run finished",
    }
    with pytest.raises(Refused, match=said.get(case, "puts no adapter on")):
        check(built, target, adapter=case in ("no adapter", "matrix"))
