"""TwinFlow (arXiv:2512.05150), its Qwen-Image LoRA recipe on a latent DiT-XL/2 in place of the paper's 20 B network.

    python -m launch.train --config=configs/recipes/twinflow.py --workdir=DIR --config.data.path=LATENTS --config.roles.teacher.init=BASE

BASE is a run of configs/recipes/flow_matching.py, or a folder of diffusers' DiTTransformer2DModel trained by flow matching;
LATENTS as there. The paper's constants: adapters of rank and alpha 64 on the frozen base, one time embedder fed t - r / 2,
AdamW 1e-4 (.9, .99) without decay, gradient norm 1, batch 64, 7 k steps, order 2, live F^- (kappa = 0), guidance .8, push .5.
Qwen-Image at one step: GenEval .86, DPG 86.5; at 100 evaluations .87, 88.3. Departures: backbone and data.
"""

from configs.recipes.flow_matching import XL2
from jaxdistill.core.build import Lora, Role, experiment, spec
from jaxdistill.core.optim import Optimizer, RampEma
from jaxdistill.diffusion.denoiser import Denoiser, Velocity


def get_config():
    return experiment(
        steps=7_000,
        data=spec("data.arrayrecord:ArrayRecords", batch_size=64),
        method=spec("methods.trajectory.twinflow:TunedTwinFlow", target="student", enhance=0.8),
        roles=dict(
            teacher=Role(
                model=spec("models.dit:DiT", **XL2),
                denoiser=Denoiser(param=Velocity(time_scale=1000.0), fold=0.5),
                param_dtype="bfloat16",
            ),
            student=Role(
                lora=Lora(rank=64, alpha=64.0),
                optimizer=Optimizer(lr=1e-4, b2=0.99, clip=1.0),
                ema=RampEma(rate=0.0),  # evaluates the live adapters
            ),
        ),
        checkpoint_every=1_000,
        log_every=20,
    )
