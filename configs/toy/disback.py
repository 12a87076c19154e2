"""DisBack (arXiv:2408.15991) on a Gaussian mixture: a learnt teacher's path, walked back.

python -m launch.train --config=configs/toy/disback.py --workdir=runs/toy_disback
"""

from jaxdistill.core.build import Role, experiment, spec
from jaxdistill.core.optim import Ema, Optimizer
from jaxdistill.diffusion.denoiser import Denoiser
from jaxdistill.diffusion.times import Uniform

DATA = spec("data.mixtures:Mixture", seed=0, batch_size=128, modes=8, std=0.05, labelled=False)
EVALUATION = spec("evals.points:PointEval", student_steps=(1,), teacher_steps=(50, 1))


def pretrain():
    """The teacher: what it says off its data's support is what it happened to learn."""
    return flow(2000, DATA)


def flow(steps, data):
    student = Role(
        model=spec("models.mlp:MLP", width=64, depth=2),
        denoiser=Denoiser(),
        optimizer=Optimizer(lr=2e-3, schedule="cosine"),
        ema=Ema(rate=0.99),
    )
    method = spec("methods.trajectory.flow_matching:FlowMatching", times=Uniform(), label_dropout=0.0)
    return experiment(steps=steps, data=data, method=method, roles=dict(student=student))


def distil(method, runs=None, roles=None, **rest):
    return experiment(
        steps=2500,
        data=DATA,
        method=method,
        roles=dict(
            teacher=Role(init="@teacher"),
            student=Role(init="@start", optimizer=Optimizer(lr=1e-3, b1=0.0, schedule="cosine"), ema=Ema(rate=0.99)),
            fake=Role(optimizer=Optimizer(lr=1e-3, b1=0.0)),
            **(roles or {}),
        ),
        runs=dict(
            teacher=pretrain(),
            start=flow(300, spec("data.mixtures:Mixture", seed=0, batch_size=128, modes=1, radius=6.0, labelled=False)),
            **(runs or {}),
        ),
        evaluation=EVALUATION,
        eval_every=250,
        checkpoint_every=2500,
        **rest,
    )


def get_config():
    host = spec("methods.distribution.diff_instruct:DiffInstruct", critic_steps=5)
    disback = spec("methods.distribution.disback:DisBackDiffInstruct", checkpoints=5, record_every=60, interval=100)
    return distil(
        disback,
        runs=dict(baseline=distil(host)),
        roles=dict(path=Role(init="teacher", bank=6)),
        claim=dict(metric="energy", model="student@1", baseline="baseline@1", better="lower", ratio=1.0),
    )
