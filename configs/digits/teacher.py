"""A class-conditional DiT (0.33 M weights) trained by flow matching on scikit-learn's 8x8 digits.

    python -m launch.train --config=configs/digits/teacher.py --workdir=runs/digits_teacher

2 CPU cores, about 2 minutes. Expected: Fréchet distance (classifier features) near 0.3 at 50 steps,
near 9 at 1.
"""

from jaxdistill.core.build import Role, experiment, spec
from jaxdistill.core.optim import Ema, Optimizer
from jaxdistill.diffusion.denoiser import Denoiser, Velocity


def get_config():
    return experiment(
        steps=1000,
        data=spec("data.digits:Digits", batch_size=128),
        method=spec("methods.trajectory.flow_matching:FlowMatching"),
        roles=dict(
            student=Role(
                model=spec("models.denoisers.dit:DiT"),
                denoiser=Denoiser(param=Velocity(time_scale=1000.0)),
                optimizer=Optimizer(lr=2e-3, schedule="cosine", warmup=50),
                ema=Ema(rate=0.995),
            ),
        ),
        evaluation=spec("evals.images:ImageEval", student_steps=(50, 1)),
        checkpoint_every=500,
    )
