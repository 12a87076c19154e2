"""DMD2 (arXiv:2405.14867), its ImageNet recipe on a latent DiT-XL/2 in place of the paper's pixel-space EDM network.

    python -m launch.train --config=configs/recipes/dmd2.py --workdir=DIR --config.data.path=LATENTS --config.roles.teacher.init=TEACHER

TEACHER is a run of configs/recipes/flow_matching.py, or a folder of diffusers' DiTTransformer2DModel trained by flow
matching. The paper's ImageNet-64 constants: batch 280 (288 here, for meshes of 32), AdamW 2e-6 on both sides, five critic
updates to one of the student, GAN weight 3e-3, discriminator weight 1e-2, gradient norm 10; FID 1.51 at one step, 1.28
after longer training. Departures: backbone, velocity in place of EDM-weighted denoising for the fake score, latents.
"""

from configs.recipes.flow_matching import XL2
from jaxdistill.core.build import Role, experiment, spec
from jaxdistill.core.optim import Ema, Optimizer
from jaxdistill.diffusion.denoiser import Denoiser, Velocity


def get_config():
    optimizer = Optimizer(lr=2e-6, weight_decay=0.01, clip=10.0)
    return experiment(
        steps=400_000,
        data=spec("data.arrayrecord:ArrayRecords", batch_size=288),
        method=spec("methods.distribution.dmd2:DMD2", gan_weight=3e-3, disc_weight=1e-2, critic_steps=5, taps=(13,)),
        roles=dict(
            teacher=Role(model=spec("models.dit:DiT", **XL2), denoiser=Denoiser(param=Velocity(time_scale=1000.0)), param_dtype="bfloat16"),
            student=Role(optimizer=optimizer, ema=Ema(rate=0.999)),
            fake=Role(optimizer=optimizer),
            disc=Role(model=spec("models.heads:Discriminator", dim=1152, width=512, classes=1000), optimizer=optimizer),
        ),
        checkpoint_every=5_000,
        log_every=100,
    )
