"""2-rectified flow (arXiv:2209.03003) on a latent DiT-XL/2, in place of the paper's NCSN++ on
CIFAR-10.

    python -m launch.train --config=configs/recipes/reflow.py --workdir=DIR \\
        --config.data.path=LATENTS --config.roles.teacher.init=TEACHER

TEACHER as in configs/recipes/consistency.py; LATENTS gives the labels. 4 M pairs (262 GB as
float32) are made first, in DIR/data. The paper: pairs by RK45, uniform times, EMA .9999.
Departures: backbone, Heun with 50 steps for the pairs, a guided teacher as in InstaFlow
(arXiv:2309.06380), batch and learning rate. One step needs `Distil` after it, in a run of its
own: --config.roles.teacher.init=DIR.
"""

from configs.recipes.flow_matching import XL2
from jaxdistill.core.build import Role, experiment
from jaxdistill.core.optim import Ema, Optimizer
from jaxdistill.data.arrayrecord import ArrayRecords
from jaxdistill.diffusion.denoiser import Denoiser, Velocity
from jaxdistill.methods.trajectory.reflow import Reflow
from jaxdistill.models.denoisers.dit import DiT


def get_config():
    return experiment(
        steps=500_000,
        data=ArrayRecords(batch_size=256),
        method=Reflow(batches=15_625, guidance=1.5),
        roles=dict(
            teacher=Role(
                model=DiT(**XL2),
                denoiser=Denoiser(param=Velocity(time_scale=1000.0)),
                param_dtype="bfloat16",
            ),
            student=Role(
                optimizer=Optimizer(lr=1e-4, warmup=5000), ema=Ema(rate=0.9999)
            ),
        ),
        checkpoint_every=10_000,
        log_every=100,
    )
