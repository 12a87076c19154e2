"""A class-conditional DiT (0.33 M weights) trained by flow matching on scikit-learn's 8x8 digits.

    python -m launch.train --config=configs/digits/teacher.py --workdir=runs/digits_teacher

2 CPU cores, about 2 minutes. Expected: Fréchet distance (classifier features) near 0.3 at 50 steps,
near 9 at 1.
"""

from jaxdistill.core.build import Role, experiment
from jaxdistill.core.optim import Ema, Optimizer
from jaxdistill.data.digits import Digits
from jaxdistill.diffusion.denoiser import Denoiser, Velocity
from jaxdistill.evals.images import ImageEval
from jaxdistill.methods.trajectory.flow_matching import FlowMatching
from jaxdistill.models.denoisers.dit import DiT


def get_config():
    return experiment(
        steps=1000,
        data=Digits(batch_size=128),
        method=FlowMatching(),
        roles=dict(
            student=Role(
                model=DiT(),
                denoiser=Denoiser(param=Velocity(time_scale=1000.0)),
                optimizer=Optimizer(lr=2e-3, schedule="cosine", warmup=50),
                ema=Ema(rate=0.995),
            ),
        ),
        evaluation=ImageEval(student_steps=(50, 1)),
        checkpoint_every=500,
    )
