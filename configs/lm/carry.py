"""Two Llamas on two-digit additions by supervised training: `teacher` for 2,000 steps, `start`, a
quarter of its size, for 300.

    python -m launch.train --config=configs/lm/carry.py:teacher --workdir=runs/lm/teacher_0

2 CPU cores, a minute. What the suite of language methods (configs/lm/suite.py) distils and starts
from.
"""

from jaxdistill.core.build import Role, experiment, spec
from jaxdistill.core.optim import Optimizer
from jaxdistill.core.types import lookup

SIZES = {
    "teacher": dict(dim=64, mlp=128, heads=4, depth=2),
    "start": dict(dim=32, mlp=64, heads=4, depth=2),
}
STEPS = {"teacher": 2000, "start": 300}


def data(prompts: int = 64):
    return spec("data.language:Carry", digits=2, batch_size=prompts)


def get_config(variant="teacher"):
    sizes = lookup(SIZES, variant, "variant")
    return experiment(
        steps=STEPS[variant],
        data=data(),
        method=spec("methods.language.sft:SFT"),
        roles=dict(
            student=Role(
                model=spec("models.language.lm:LM", vocab=14, max_length=10, **sizes),
                optimizer=Optimizer(lr=3e-3, schedule="cosine", warmup=20),
            )
        ),
        evaluation=spec("evals.text:TextEval", samples=588),
        checkpoint_every=400,
    )
