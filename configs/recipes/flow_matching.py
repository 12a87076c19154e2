"""SiT-XL/2 (arXiv:2401.08740): flow matching on 256 px ImageNet latents (32x32x4), the teacher of
latent distillation.

    python -m launch.train --config=configs/recipes/flow_matching.py --workdir=DIR \\
        --config.data.path=LATENTS

LATENTS is a folder of *.arrayrecord with x float32 [32, 32, 4], cond and null_cond (= 1000). The
paper: batch 256, AdamW 1e-4 without decay, uniform times, EMA 0.9999, 7 M steps, FID 8.3 without
guidance and 2.06 with scale 1.5 (SDE).
Hardware: a v5p-128 slice holds it with room; days at 7 M steps.
"""

from jaxdistill.core.build import Role, experiment
from jaxdistill.core.optim import Ema, Optimizer
from jaxdistill.data.arrayrecord import ArrayRecords
from jaxdistill.diffusion.denoiser import Denoiser, Velocity
from jaxdistill.diffusion.times import Uniform
from jaxdistill.methods.trajectory.flow_matching import FlowMatching
from jaxdistill.models.denoisers.dit import DiT

XL2 = dict(
    size=32,
    patch=2,
    channels=4,
    dim=1152,
    depth=28,
    heads=16,
    classes=1000,
    dtype="bfloat16",
    remat="full",
)


def get_config():
    return experiment(
        steps=7_000_000,
        data=ArrayRecords(batch_size=256),
        method=FlowMatching(times=Uniform(), solver="heun"),
        roles=dict(
            student=Role(
                model=DiT(**XL2),
                denoiser=Denoiser(param=Velocity(time_scale=1000.0)),
                optimizer=Optimizer(lr=1e-4),
                ema=Ema(rate=0.9999),
            )
        ),
        checkpoint_every=10_000,
        log_every=100,
    )
