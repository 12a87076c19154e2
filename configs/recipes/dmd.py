r"""DMD (arXiv:2311.18828) on class-conditional ImageNet-64: EDM's network into one step.

    python -m launch.train --config=configs/recipes/dmd.py --workdir=DIR \
        --config.data.path=IMAGES --config.roles.teacher.init=TEACHER \
        --config.roles.perceptual.init=LPIPS

IMAGES and TEACHER as in configs/recipes/dmd2.py, LPIPS the package's weights, as
interop/families/lpips.py says. The paper: 25 k pairs by Heun's solver in 256 steps, LPIPS at a
weight of .25, batch 336, AdamW 2e-6 with decay .01 on both sides, gradient norm 10, one update each
by turns, 350 k of them; FID 2.62 at one step, CIFAR-10 2.66 (3.77 without labels), zero-shot COCO
11.49 from Stable Diffusion. Uncertain: batch and length. The pairs are made before the first step
and stored in the run's folder (75 batches, 1.2 GB).

Departure: the stored pairs come in the same batches as the data's conditions.
"""

from configs.recipes.dmd2 import ADAMW, MATCH, TEACHER
from configs.recipes.dmd2 import RECORD as RECORD
from jaxdistill.core.build import Role, experiment
from jaxdistill.core.optim import Ema
from jaxdistill.data.arrayrecord import ArrayRecords
from jaxdistill.methods.distribution.dmd import PerceptualDMD
from jaxdistill.models.vision.lpips import LPIPS


def get_config():
    return experiment(
        steps=350_000,
        data=ArrayRecords(batch_size=336),
        method=PerceptualDMD(batches=75, solver_steps=256, **MATCH),
        roles=dict(
            teacher=TEACHER,
            perceptual=Role(
                model=LPIPS(dtype="bfloat16", remat="full"),
                param_dtype="bfloat16",
            ),
            student=Role(optimizer=ADAMW, ema=Ema(rate=0.999)),
            fake=Role(optimizer=ADAMW),
        ),
        checkpoint_every=5_000,
        log_every=100,
    )
