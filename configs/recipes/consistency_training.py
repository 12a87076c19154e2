"""ECT (arXiv:2406.14548): easy consistency tuning of a pretrained DiT-XL/2, in place of the paper's
EDM2 U-Net.

    python -m launch.train --config=configs/recipes/consistency_training.py --workdir=DIR \\
        --config.data.path=LATENTS \\
        --config.roles.student.init=PRETRAINED

PRETRAINED as TEACHER in configs/recipes/consistency.py. The paper's constants: batch 128, 100 k
steps, times of mean -1.1 and std 2, Adam or RAdam, EMA, gaps that shrink with the stages (q, n(t)).
Departures: backbone and latents, rectified-flow time in place of sigma, so that r = t max(0, 1 -
n(t) / q^(stage + 1)) is applied to t in [0, 1]; learning rate; no dropout.
"""

from configs.recipes.flow_matching import XL2
from jaxdistill.core.build import Role, experiment
from jaxdistill.core.optim import Ema, Optimizer
from jaxdistill.data.arrayrecord import ArrayRecords
from jaxdistill.diffusion.denoiser import Denoiser, Velocity
from jaxdistill.methods.trajectory.consistency_training import ECT
from jaxdistill.models.denoisers.dit import DiT


def get_config():
    return experiment(
        steps=100_000,
        data=ArrayRecords(batch_size=128),
        method=ECT(
            stage_steps=12_500,
            student_times=(1.0, 0.5),
        ),
        roles=dict(
            student=Role(
                model=DiT(**XL2),
                denoiser=Denoiser(param=Velocity(time_scale=1000.0)),
                optimizer=Optimizer(algorithm="radam", lr=1e-4),
                ema=Ema(rate=0.9999),
            )
        ),
        checkpoint_every=5_000,
        log_every=100,
    )
