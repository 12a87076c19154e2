"""Minitron (arXiv:2407.14679) on a synthetic language: half of a trained model's layers and
neurons, then distillation.

    python -m launch.train --config=configs/toy/prune_then_distil.py --workdir=runs/toy_prune

2 CPU cores, about two minutes, teacher included. The claim: after the same steps the pruned and
distilled student has a lower perplexity than a network of its size trained from scratch
(`baseline`).
"""

from configs.toy.kd import DATA
from jaxdistill.core.build import Role, experiment, spec
from jaxdistill.core.optim import Optimizer

SIZES = dict(vocab=24, dim=64, heads=4, max_length=48)
OPTIMIZER = Optimizer(lr=3e-3, schedule="cosine", warmup=20)


def train(steps: int, **sizes):
    """Ordinary training of one network."""
    return experiment(
        steps=steps,
        data=spec("data.language:Markov", **DATA),
        method=spec("methods.language.sft:SFT"),
        roles=dict(
            student=Role(model=spec("models.language.lm:LM", **SIZES, **sizes), optimizer=OPTIMIZER)
        ),
        evaluation=spec("evals.text:TextEval"),
    )


def get_config():
    return experiment(
        steps=200,
        runs=dict(teacher=train(800, depth=4, mlp=128), baseline=train(200, depth=2, mlp=64)),
        data=spec("data.language:Markov", **DATA),
        method=spec(
            "methods.architecture.prune_then_distil:PruneThenDistil",
            depth=2,
            mlp=64,
            student_layers=(1,),
            teacher_layers=(3,),
        ),
        roles=dict(teacher=Role(init="@teacher"), student=Role(optimizer=OPTIMIZER)),
        evaluation=spec("evals.text:TextEval"),
        claim=dict(
            metric="perplexity", model="student", baseline="baseline", better="lower", ratio=0.98
        ),
    )
