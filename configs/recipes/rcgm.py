"""RCGM as TwinFlow (arXiv:2512.05150) has it, from scratch on 256 px ImageNet latents (32x32x4)
with DiT-XL/2.

    python -m launch.train --config=configs/recipes/rcgm.py --workdir=DIR --config.data.path=LATENTS

LATENTS as in configs/recipes/flow_matching.py. TwinFlow's constants for SANA: RAdam 1e-4 (.9, .95),
batch 128, 30 k steps on a pretrained network, order 2, averages .99, ramped; its baseline, RCGM
alone, has GenEval .80 (SANA-0.6B) and .78 (1.6B) at one step. Departures: backbone and data, from
scratch, hence longer, slower averages, and no guidance (no null condition is learnt).
"""

from configs.recipes.flow_matching import XL2
from jaxdistill.core.build import Role, experiment
from jaxdistill.core.optim import Optimizer, RampEma
from jaxdistill.data.arrayrecord import ArrayRecords
from jaxdistill.diffusion.denoiser import Denoiser, Velocity
from jaxdistill.methods.trajectory.rcgm import RCGM
from jaxdistill.models.denoisers.dit import DiT


def get_config():
    return experiment(
        steps=1_200_000,
        data=ArrayRecords(batch_size=256),
        method=RCGM(training_guidance=0.0),
        roles=dict(
            student=Role(
                model=DiT(**XL2, second_time=True),
                denoiser=Denoiser(param=Velocity(time_scale=1000.0)),
                optimizer=Optimizer(algorithm="radam", lr=1e-4, b2=0.95),
                ema=RampEma(rate=0.999),
            )
        ),
        checkpoint_every=10_000,
        log_every=100,
    )
