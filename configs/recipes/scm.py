"""sCD (arXiv:2410.11081): continuous-time consistency distillation of a latent DiT-XL/2, in place
of the paper's EDM2 U-Net.

    python -m launch.train --config=configs/recipes/scm.py --workdir=DIR \\
        --config.data.path=LATENTS --config.roles.teacher.init=TEACHER

TEACHER is a run of configs/recipes/flow_matching.py with
--config.roles.student.denoiser.param.time_scale=1.0: the paper needs a time embedding with a small
derivative, and 1000 t has none. The paper's constants: batch 2048, tau of mean -1 and std 1.4,
tangent warm-up over 10 k steps, c = .1, Adam with b2 .99, guided teacher, power-function EMA, two
steps at pi/2 and 1.1. Departures: backbone, latents of unit variance (sigma_data 1), plain layer
norms where the paper has pixel and double normalisation, one guidance scale where it draws one,
learning rate.
"""

from configs.recipes.flow_matching import XL2
from jaxdistill.core.build import Role, experiment
from jaxdistill.core.optim import Optimizer, PowerEma
from jaxdistill.data.arrayrecord import ArrayRecords
from jaxdistill.diffusion.denoiser import Denoiser
from jaxdistill.diffusion.process import Trig
from jaxdistill.methods.trajectory.scm import SCM
from jaxdistill.models.denoisers.dit import DiT
from jaxdistill.models.heads import TimeWeight


def get_config():
    optimizer = Optimizer(lr=1e-4, b2=0.99, eps=1e-11, warmup=1000)
    return experiment(
        steps=200_000,
        data=ArrayRecords(batch_size=2048),
        method=SCM(process=Trig(sigma_data=1.0), guidance=1.5),
        roles=dict(
            teacher=Role(
                model=DiT(**{**XL2, "dtype": "float32"}),
                denoiser=Denoiser(),
            ),
            student=Role(optimizer=optimizer, ema=PowerEma(sigma_rel=0.05)),
            weight=Role(model=TimeWeight(), optimizer=optimizer),
        ),
        checkpoint_every=5_000,
        log_every=100,
    )
