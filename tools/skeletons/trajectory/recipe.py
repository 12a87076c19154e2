"""My method (arXiv:2601.00000) of a DiT-XL/2 on 256 px ImageNet latents.

    python -m launch.train --config=configs/recipes/my_method.py --workdir=DIR --config.data.path=LATENTS \\
        --config.roles.teacher.init=TEACHER

TEACHER is a run of configs/recipes/flow_matching.py, LATENTS are that recipe's. The paper's
constants, hardware, hours and figures stand here, and what departs from them.
"""

from configs.recipes.flow_matching import XL2
from jaxdistill.core.build import Role, experiment, spec
from jaxdistill.core.optim import Ema, Optimizer
from jaxdistill.diffusion.denoiser import Denoiser, Velocity


def get_config():
    return experiment(
        steps=100_000,
        data=spec("data.arrayrecord:ArrayRecords", batch_size=256),
        method=spec("methods.trajectory.my_method:MyMethod", guidance=1.5),
        roles=dict(
            teacher=Role(
                model=spec("models.denoisers.dit:DiT", **XL2),
                denoiser=Denoiser(param=Velocity(time_scale=1000.0)),
                param_dtype="bfloat16",
            ),
            student=Role(optimizer=Optimizer(lr=1e-5), ema=Ema(rate=0.9999)),
        ),
        checkpoint_every=5_000,
        log_every=100,
    )
