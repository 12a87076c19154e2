"""iCT (arXiv:2310.14189) on a Gaussian mixture: consistency training from data, without a teacher.

    python -m launch.train --config=configs/toy/consistency_training.py \\
        --workdir=runs/toy_consistency_training

2 CPU cores, about 2 minutes. The claim: at one step the student's energy distance is at most a
tenth of that of the same network trained by flow matching (`flow`), at one step.
`--config.data.seed=N` makes another mixture.
"""

from jaxdistill.core.build import Role, experiment
from jaxdistill.core.optim import Ema, Optimizer
from jaxdistill.data.mixtures import Mixture
from jaxdistill.diffusion.denoiser import Denoiser
from jaxdistill.evals.points import PointEval
from jaxdistill.methods.trajectory.consistency_training import ICT
from jaxdistill.methods.trajectory.flow_matching import FlowMatching
from jaxdistill.models.denoisers.mlp import MLP

DATA = Mixture(seed=0, labelled=False)
STUDENT = Role(
    model=MLP(),
    denoiser=Denoiser(),
    optimizer=Optimizer(lr=1e-3, b2=0.99, schedule="cosine"),
    ema=Ema(rate=0.995),
)


def flow():
    """The same network, trained by flow matching."""
    return experiment(
        steps=2000,
        data=DATA,
        method=FlowMatching(),
        roles=dict(student=STUDENT),
        evaluation=PointEval(student_steps=(50, 2, 1)),
    )


def get_config():
    return experiment(
        steps=6000,
        runs=dict(flow=flow()),
        data=DATA,
        method=ICT(
            total=6000,
            s1=160,
            huber=0.03,
            student_times=(1.0, 0.5),
        ),
        roles=dict(student=STUDENT),
        evaluation=PointEval(student_steps=(1, 2)),
        claim=dict(
            metric="energy",
            model="student@1",
            baseline="flow@1",
            better="lower",
            ratio=0.1,
        ),
        checkpoint_every=2000,
    )
