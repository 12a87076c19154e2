r"""Diff-Instruct (arXiv:2305.18455), its class-conditional recipe on a latent DiT-XL/2 in place of the paper's EDM network.

    python -m launch.train --config=configs/recipes/diff_instruct.py --workdir=DIR --config.data.path=LATENTS \
        --config.roles.teacher.init=TEACHER

TEACHER is a run of configs/recipes/flow_matching.py, or a folder of diffusers' DiTTransformer2DModel trained by flow
matching. The paper on ImageNet-64: both networks start from the teacher and move by turns, one update each; FID 5.57 at
one step. Departures: backbone, latents, velocity in place of EDM-weighted denoising; learning rates are DMD2's.
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
        method=spec("methods.distribution.diff_instruct:DiffInstruct"),
        roles=dict(
            teacher=Role(model=spec("models.dit:DiT", **XL2), denoiser=Denoiser(param=Velocity(time_scale=1000.0)), param_dtype="bfloat16"),
            student=Role(optimizer=optimizer, ema=Ema(rate=0.999)),
            fake=Role(optimizer=optimizer),
        ),
        checkpoint_every=5_000,
        log_every=100,
    )
