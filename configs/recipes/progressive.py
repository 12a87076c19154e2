"""Progressive distillation (arXiv:2202.00512) of a latent DiT-XL/2, 1024 steps to one in ten
halvings.

    python -m launch.train --config=configs/recipes/progressive.py --workdir=DIR \\
        --config.data.path=LATENTS \\
        --config.roles.teacher.init=TEACHER

TEACHER as in configs/recipes/consistency.py. The paper's ImageNet-64 constants: batch 2048, 50 k
steps a stage, Adam 1e-4 down to 0 linearly in each stage, gradient norm 1, no average, max(SNR, 1);
FID 16 at one step, 7.1 at two, 3.8 at four. Departures: backbone, latents, rectified flow in place
of the cosine schedule, a guided first teacher (arXiv:2210.03142) at one scale.
"""

from configs.recipes.flow_matching import XL2
from jaxdistill.core.build import Role, experiment
from jaxdistill.core.optim import Ema, Optimizer
from jaxdistill.data.arrayrecord import ArrayRecords
from jaxdistill.diffusion.denoiser import Denoiser, Velocity
from jaxdistill.methods.trajectory.progressive import Progressive
from jaxdistill.models.denoisers.dit import DiT


def get_config():
    return experiment(
        steps=500_000,
        data=ArrayRecords(batch_size=2048),
        method=Progressive(teacher_steps=1024, guidance=1.5),
        roles=dict(
            teacher=Role(
                model=DiT(**XL2),
                denoiser=Denoiser(param=Velocity(time_scale=1000.0)),
                param_dtype="bfloat16",
            ),
            student=Role(
                optimizer=Optimizer(lr=1e-4, schedule="linear"), ema=Ema(rate=0.0)
            ),
        ),
        checkpoint_every=5_000,
        log_every=100,
    )
