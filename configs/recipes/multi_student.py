"""MSD (arXiv:2410.23274) on ImageNet-64: four one-step students of EDM's network, each for 250
classes.

    python -m launch.train --config=configs/recipes/multi_student.py --workdir=DIR \\
        --config.data.path=IMAGES \\
        --config.roles.teacher.init=TEACHER --config.roles.perceptual.init=LPIPS

Variants: `:small` has students of 75 % fewer parameters (width 96), `:medium` of 44 % (width 144),
which match the teacher's score first. TEACHER and IMAGES as in configs/recipes/dmd2.py, LPIPS the
package's weights, as interop/families/lpips.py says.

The paper: DM on 32 samples for each student, FID 2.37 (2.62 one student of DMD), then ADM with
DMD2's constants, 1.20 (1.28); students of 42 % fewer parameters 2.88 with score matching and 11.67
without; K = 1, 2, 4, 8 after 20 k steps 2.60, 2.49, 2.37, 2.32. TSM runs at the same rate. The
final runs' lengths are not known: 20 k steps of DM are the ablations', the rest is a guess.
Departures: the paper's small students have 71 and 42 % fewer parameters; members see batches of one
size in all stages.

Memory: four generators at rest; four fake scores and discriminators only in training.
"""

from configs.recipes.dmd2 import ADAMW, ADM, MATCH, TEACHER
from configs.recipes.dmd2 import RECORD as RECORD
from jaxdistill.core.build import Role, experiment
from jaxdistill.core.optim import Ema
from jaxdistill.core.types import lookup
from jaxdistill.data.arrayrecord import ArrayRecords
from jaxdistill.diffusion.process import EDM
from jaxdistill.methods.distribution.dmd import PerceptualDMD
from jaxdistill.methods.distribution.dmd2 import DMD2
from jaxdistill.methods.distribution.multi_student import TSM, MultiStudent
from jaxdistill.models.denoisers.edm import DhariwalUNet
from jaxdistill.models.heads import Discriminator
from jaxdistill.models.vision.lpips import LPIPS
from jaxdistill.objectives.partition import Consecutive

WIDTHS = {"": 192, "medium": 144, "small": 96}  # heads of 48 and of 32 channels
# students, and samples that each sees in a step
CELLS = 4
SHARE = 32


def get_config(variant=""):
    width = lookup(WIDTHS, variant, "variant")
    method = MultiStudent(
        partition=Consecutive(cells=CELLS, classes=1000),
        tsm=TSM(process=EDM()),
        dm=PerceptualDMD(batches=200, solver_steps=256, **MATCH),
        adm=DMD2(taps=(4,), **MATCH),
        shares=(50.0, 20.0, 200.0) if variant else (0.0, 20.0, 200.0),
    )
    model = DhariwalUNet(**{**ADM, "width": width, "head_dim": width // 3})
    small = (
        dict(model=model, denoiser=TEACHER.denoiser, init="fresh")
        if variant
        else {}
    )
    return experiment(
        steps=270_000 if variant else 220_000,
        data=ArrayRecords(batch_size=CELLS * SHARE),
        method=method,
        roles=dict(
            teacher=TEACHER,
            perceptual=Role(
                model=LPIPS(dtype="bfloat16", remat="full"),
                param_dtype="bfloat16",
            ),
            student=Role(**small, bank=CELLS, optimizer=ADAMW, ema=Ema(rate=0.999)),
            fake=Role(
                init="student" if variant else "", bank=CELLS, optimizer=ADAMW
            ),
            disc=Role(
                model=Discriminator(dim=4 * width, width=512, classes=1000),
                bank=CELLS,
                optimizer=ADAMW,
            ),
        ),
        checkpoint_every=5_000,
        log_every=100,
    )
