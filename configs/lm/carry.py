"""Two Llamas on two-digit additions by supervised training: `teacher` for 2,000 steps, `start`, a
quarter of its size, for 300.

    python -m launch.train --config=configs/lm/carry.py:teacher --workdir=runs/lm/teacher_0

2 CPU cores, a minute. What the suite of language methods (configs/lm/suite.py) distils and starts
from.
"""

from jaxdistill.core.build import Role, experiment
from jaxdistill.core.optim import Optimizer
from jaxdistill.core.types import lookup
from jaxdistill.data.language import Carry
from jaxdistill.evals.text import TextEval
from jaxdistill.methods.language.sft import SFT
from jaxdistill.models.language.lm import LM

SIZES = {
    "teacher": dict(dim=64, mlp=128, heads=4, depth=2),
    "start": dict(dim=32, mlp=64, heads=4, depth=2),
}
STEPS = {"teacher": 2000, "start": 300}


def data(prompts: int = 64):
    return Carry(digits=2, batch_size=prompts)


def get_config(variant="teacher"):
    sizes = lookup(SIZES, variant, "variant")
    return experiment(
        steps=STEPS[variant],
        data=data(),
        method=SFT(),
        roles=dict(
            student=Role(
                model=LM(vocab=14, max_length=10, **sizes),
                optimizer=Optimizer(lr=3e-3, schedule="cosine", warmup=20),
            )
        ),
        evaluation=TextEval(samples=588),
        checkpoint_every=400,
    )
