"""Distilling Step-by-Step (arXiv:2305.02301) on JSON lines of input, label and rationale: Llama 3.2
1B in place of T5-Large.

    python -m launch.train --config=configs/recipes/step_by_step.py --workdir=DIR \\
        --config.data.path=FOLDER \\
        --config.data.tokenizer=LLAMA --config.roles.student.init=LLAMA_1B

`jaxdistill.data.rationales.svamp` makes such rows of SVAMP. The paper: T5 v1.1, AdamW 5e-5 with
linear decay, batch 64, inputs up to 1024 tokens, targets up to 256, 10,000 steps, alpha 0.5.
Departures: a decoder alone, with the loss on the target.
"""

from configs.recipes.kd import LLAMA_1B
from jaxdistill.core.build import Role, experiment
from jaxdistill.core.optim import Optimizer
from jaxdistill.data.rationales import Rationales
from jaxdistill.methods.language.step_by_step import StepByStep
from jaxdistill.models.language.lm import LM


def get_config():
    return experiment(
        steps=10_000,
        accumulate=2,
        data=Rationales(batch_size=64, between="\n"),
        method=StepByStep(chunk=16032),
        roles=dict(
            student=Role(
                model=LM(**LLAMA_1B),
                optimizer=Optimizer(lr=5e-5, schedule="linear"),
            )
        ),
        checkpoint_every=250,
    )
