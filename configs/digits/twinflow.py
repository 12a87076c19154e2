"""TwinFlow (arXiv:2512.05150) on scikit-learn's 8x8 digits: a DiT of 50 steps tuned into one of 1
to 4, by itself.

    python -m launch.train --config=configs/digits/twinflow.py --workdir=runs/digits_twinflow

2 CPU cores, minutes; trains the flow-matching network first, in workdir/teacher
(`--config.roles.teacher.init=RUN` takes that of another run). `:rcgm` is its host alone, from the
same network, in about as much time. This comparison has not been measured.
From scratch, 800 steps of either are too few: Fréchet distance 11.7 against RCGM's 12.4 at one
step, labels at chance (9 % against 12 %), seed 0.
"""

from configs.digits import teacher
from jaxdistill.core.build import Role, experiment
from jaxdistill.core.optim import Optimizer, RampEma
from jaxdistill.core.types import lookup
from jaxdistill.data.digits import Digits
from jaxdistill.diffusion.denoiser import Denoiser, Velocity
from jaxdistill.evals.images import ImageEval
from jaxdistill.methods.trajectory.twinflow import TunedTwinFlow
from jaxdistill.models.denoisers.dit import DiT

VARIANTS = {  # method's fields, steps
    "": ({}, 700),
    "rcgm": (dict(objectives=("e2e", "mul", "any"), rectify_weight=0.0), 800),
}


def get_config(variant=""):
    fields, steps = lookup(VARIANTS, variant, "variant")
    return experiment(
        steps=steps,
        runs=dict(teacher=teacher.get_config()),
        data=Digits(batch_size=64),
        method=TunedTwinFlow(training_guidance=0.0, **fields),
        roles=dict(
            teacher=Role(init="@teacher"),
            student=Role(
                model=DiT(second_time=True),
                denoiser=Denoiser(param=Velocity(time_scale=1000.0)),
                init="teacher",
                optimizer=Optimizer(lr=5e-4, b2=0.99, schedule="cosine", warmup=20),
                ema=RampEma(rate=0.99),
            ),
        ),
        evaluation=ImageEval(student_steps=(1, 2, 4), teacher_steps=(50, 1)),
        checkpoint_every=500,
    )
