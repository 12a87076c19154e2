"""My method (arXiv:2601.00000) on a Gaussian mixture with an exact teacher.

    python -m launch.train --config=configs/toy/my_method.py \\
        --workdir=runs/toy_my_method

2 CPU cores, how many minutes. The claim: what the paper claims, at small scale; as it stands, at
one step the student's energy distance is at most a tenth of the teacher's at one step.
`--config.data.seed=N` makes another mixture.
"""

from jaxdistill.core.build import Role, experiment
from jaxdistill.core.optim import Ema, Optimizer
from jaxdistill.data.mixtures import Mixture
from jaxdistill.diffusion.denoiser import Denoiser
from jaxdistill.evals.points import PointEval
from jaxdistill.methods.trajectory.my_method import MyMethod
from jaxdistill.models.denoisers.mlp import MLP

ABLATIONS = {"two steps of the solver": ("method.solver_steps=2",)}


def get_config():
    return experiment(
        steps=2000,
        data=Mixture(seed=0, labelled=False),
        method=MyMethod(),
        roles=dict(
            teacher=Role(init="exact"),
            student=Role(
                model=MLP(),
                denoiser=Denoiser(),
                init="fresh",
                optimizer=Optimizer(lr=1e-3, schedule="cosine"),
                ema=Ema(rate=0.99),
            ),
        ),
        evaluation=PointEval(student_steps=(1,), teacher_steps=(50, 1)),
        claim=dict(
            metric="energy",
            model="student@1",
            baseline="teacher@1",
            better="lower",
            ratio=0.1,
        ),
        checkpoint_every=1000,
    )
