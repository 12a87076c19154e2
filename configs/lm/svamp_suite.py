"""Arithmetic word problems with and without a large model's reasons:
`--config=configs/lm/svamp_suite.py:METHOD`, each name below.

    python -m launch.train --config=configs/lm/svamp_suite.py:step_by_step \\
        --workdir=runs/svamp/step_by_step_0 --config.data.path=FOLDER
    # all of them on seeds 0, 1, 2, and the table
    python tools/reproduce.py --suite=svamp --config.data.path=FOLDER

FOLDER holds SVAMP and PaLM 540B's reasons as released with distilling step-by-step
(arXiv:2305.02301): 787 problems to learn from, 198 to be asked. `labels` and `step_by_step` learn
the data's equations, `palm_labels` and `palm_step_by_step` the teacher's, of which a quarter are
wrong. The same for all: a byte-level Llama of 0.14 M weights from nothing, 8 problems a step,
steps.
"""

from jaxdistill.core.build import Role, experiment
from jaxdistill.core.optim import Optimizer
from jaxdistill.core.types import lookup
from jaxdistill.data.rationales import SVAMP
from jaxdistill.evals.text import TextEval
from jaxdistill.methods.language.sft import SFT
from jaxdistill.methods.language.step_by_step import StepByStep
from jaxdistill.models.language.lm import LM

STEPS = 400
VARIANTS = {  # name -> method, labels
    "labels": (SFT, "gt"),
    "step_by_step": (StepByStep, "gt"),
    "palm_labels": (SFT, "llm"),
    "palm_step_by_step": (StepByStep, "llm"),
}


def get_config(variant="step_by_step"):
    method, labels = lookup(VARIANTS, variant, "variant")
    model = LM(vocab=259, dim=64, mlp=192, heads=4, depth=2, max_length=576)
    return experiment(
        steps=STEPS,
        data=SVAMP(labels=labels, rationale_length=224, batch_size=8),
        method=method(),
        roles=dict(
            student=Role(
                model=model,
                optimizer=Optimizer(
                    lr=2e-3, schedule="cosine", warmup=20, weight_decay=0.1
                ),
            )
        ),
        evaluation=TextEval(samples=198, batch=66),
        checkpoint_every=STEPS,
        log_every=20,
    )
