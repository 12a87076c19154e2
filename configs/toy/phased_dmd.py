"""Phased DMD (arXiv:2510.27684) on a Gaussian mixture: four steps in two phases, against four steps in one.

python -m launch.train --config=configs/toy/phased_dmd.py --workdir=runs/toy_phased_dmd
"""

from jaxdistill.core.build import Role, build, experiment, spec
from jaxdistill.core.optim import Ema, Optimizer
from jaxdistill.diffusion.denoiser import Denoiser
from jaxdistill.diffusion.times import Uniform

DATA = spec("data.mixtures:Mixture", seed=0, labelled=False)


def pretrain():
    """The network that experts and fake scores start from."""
    student = Role(
        model=spec("models.mlp:MLP", width=96, depth=2),
        denoiser=Denoiser(),
        optimizer=Optimizer(lr=2e-3, schedule="cosine"),
        ema=Ema(rate=0.99),
    )
    method = spec("methods.trajectory.flow_matching:FlowMatching", times=Uniform(), label_dropout=0.0)
    return experiment(steps=3000, data=DATA, method=method, roles=dict(student=student))


def distil(*phase_steps: int, runs=None, **rest):
    method = spec("methods.distribution.phased_dmd:PhasedDMD", phase_steps=phase_steps)
    rate = lambda role: 1e-3 if role.startswith("fake") else 2e-4
    optimizer = lambda role: Optimizer(lr=rate(role), b1=0.0, schedule="constant" if role.startswith("fake") else "cosine")
    return experiment(
        steps=4000,
        data=DATA,
        method=method,
        roles=dict(teacher=Role(init="exact"), **{r: Role(init="@base", optimizer=optimizer(r)) for r in build(method).inits}),
        runs=dict(base=pretrain(), **(runs or {})),
        evaluation=spec("evals.points:ChainEval", state=0.5, student_steps=(4,), teacher_steps=(50, 4), samples=4000),
        checkpoint_every=2000,
        **rest,
    )


def get_config():
    return distil(
        2,
        2,
        runs=dict(baseline=distil(4)),
        claim=dict(metric="energy", model="student@4", baseline="baseline@4", better="lower", ratio=0.67),
    )
