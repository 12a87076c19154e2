"""My method (arXiv:2601.00000) of a DiT-XL/2 on 256 px ImageNet latents.

    python -m launch.train --config=configs/recipes/my_method.py --workdir=DIR \\
        --config.data.path=LATENTS \\
        --config.roles.teacher.init=TEACHER

TEACHER is a run of configs/recipes/flow_matching.py, LATENTS are that recipe's. The paper's
constants, hardware, hours and figures stand here, and what departs from them.
"""

from configs.recipes.flow_matching import XL2
from jaxdistill.core.build import Role, experiment
from jaxdistill.core.optim import Ema, Optimizer
from jaxdistill.data.arrayrecord import ArrayRecords
from jaxdistill.diffusion.denoiser import Denoiser, Velocity
from jaxdistill.methods.trajectory.my_method import MyMethod
from jaxdistill.models.denoisers.dit import DiT


def get_config():
    return experiment(
        steps=100_000,
        data=ArrayRecords(batch_size=256),
        method=MyMethod(guidance=1.5),
        roles=dict(
            teacher=Role(
                model=DiT(**XL2),
                denoiser=Denoiser(param=Velocity(time_scale=1000.0)),
                param_dtype="bfloat16",
            ),
            student=Role(optimizer=Optimizer(lr=1e-5), ema=Ema(rate=0.9999)),
        ),
        checkpoint_every=5_000,
        log_every=100,
    )
