"""Latent consistency distillation (arXiv:2303.01469, arXiv:2310.04378) of a DiT-XL/2 on 256 px
ImageNet latents.

    python -m launch.train --config=configs/recipes/consistency.py --workdir=DIR \\
        --config.data.path=LATENTS \\
        --config.roles.teacher.init=TEACHER

TEACHER is a run of configs/recipes/flow_matching.py, or a folder of diffusers'
DiTTransformer2DModel trained by flow matching; LATENTS are that recipe's. From CM's ImageNet-64
run: batch 2048, learning rate 8e-6, target EMA .95, 600 k steps, FID 6.20 at one step and 4.70 at
two. From LCM: DDIM on 50 even steps, guided teacher, Huber c .001. Departures: rectified flow in
place of EDM and DDPM times, one guidance scale where LCM feeds it to the network, one average where
CM keeps another of rate .999943 for sampling.
"""

from configs.recipes.flow_matching import XL2
from jaxdistill.core.build import Role, experiment
from jaxdistill.core.optim import Ema, Optimizer
from jaxdistill.data.arrayrecord import ArrayRecords
from jaxdistill.diffusion.denoiser import Denoiser, Velocity
from jaxdistill.methods.trajectory.consistency import Consistency
from jaxdistill.models.denoisers.dit import DiT


def get_config():
    return experiment(
        steps=600_000,
        data=ArrayRecords(batch_size=2048),
        method=Consistency(
            solver="ddim",
            levels=51,
            guidance=1.5,
            huber=0.001 / 64,  # the root of 32 * 32 * 4 is 64
            student_times=(1.0, 0.75, 0.5, 0.25),
        ),
        roles=dict(
            teacher=Role(
                model=DiT(**XL2),
                denoiser=Denoiser(param=Velocity(time_scale=1000.0)),
                param_dtype="bfloat16",
            ),
            student=Role(
                optimizer=Optimizer(lr=8e-6), ema=Ema(rate=0.95, warmup=False)
            ),
        ),
        checkpoint_every=5_000,
        log_every=100,
    )
