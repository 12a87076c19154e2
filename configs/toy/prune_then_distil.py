"""Minitron (arXiv:2407.14679) on a synthetic language: half of a trained model's layers and
neurons, then distillation.

    python -m launch.train --config=configs/toy/prune_then_distil.py --workdir=runs/toy_prune

2 CPU cores, about two minutes, teacher included. The claim: after the same steps the pruned and
distilled student has a lower perplexity than a network of its size trained from scratch
(`baseline`).
"""

from configs.toy.kd import DATA
from jaxdistill.core.build import Role, experiment
from jaxdistill.core.optim import Optimizer
from jaxdistill.data.language import Markov
from jaxdistill.evals.text import TextEval
from jaxdistill.methods.architecture.prune_then_distil import PruneThenDistil
from jaxdistill.methods.language.sft import SFT
from jaxdistill.models.language.lm import LM

SIZES = dict(vocab=24, dim=64, heads=4, max_length=48)
OPTIMIZER = Optimizer(lr=3e-3, schedule="cosine", warmup=20)


def train(steps: int, **sizes):
    """Ordinary training of one network."""
    return experiment(
        steps=steps,
        data=Markov(**DATA),
        method=SFT(),
        roles=dict(student=Role(model=LM(**SIZES, **sizes), optimizer=OPTIMIZER)),
        evaluation=TextEval(),
    )


def get_config():
    return experiment(
        steps=200,
        runs=dict(
            teacher=train(800, depth=4, mlp=128),
            baseline=train(200, depth=2, mlp=64),
        ),
        data=Markov(**DATA),
        method=PruneThenDistil(
            depth=2,
            mlp=64,
            student_layers=(1,),
            teacher_layers=(3,),
        ),
        roles=dict(
            teacher=Role(init="@teacher"), student=Role(optimizer=OPTIMIZER)
        ),
        evaluation=TextEval(),
        claim=dict(
            metric="perplexity",
            model="student",
            baseline="baseline",
            better="lower",
            ratio=0.98,
        ),
    )
