"""Knowledge distillation of logits (arXiv:1503.02531) on a synthetic language with an exact
teacher.

    python -m launch.train --config=configs/toy/kd.py --workdir=runs/toy_kd

2 CPU cores, about a minute. The claim: after the same steps on the same text, a student that sees
the teacher's whole next-token laws has a lower held-out perplexity than one that sees the tokens
alone (`baseline`). `--config.data.seed=N` makes another language.
"""

from jaxdistill.core.build import Role, experiment
from jaxdistill.core.optim import Optimizer
from jaxdistill.data.language import Markov
from jaxdistill.evals.text import TextEval
from jaxdistill.methods.language.kd import KD
from jaxdistill.methods.language.sft import SFT
from jaxdistill.models.language.lm import LM

DATA = dict(vocab=24, length=48, batch_size=32)
STUDENT = Role(
    model=LM(vocab=24, dim=64, mlp=128, heads=4, depth=2, max_length=48),
    optimizer=Optimizer(lr=3e-3, schedule="cosine", warmup=20),
)


def baseline(steps: int):
    """The same student, trained on the tokens alone."""
    return experiment(
        steps=steps,
        data=Markov(**DATA),
        method=SFT(),
        roles=dict(student=STUDENT),
        evaluation=TextEval(),
    )


def get_config():
    return experiment(
        steps=400,
        runs=dict(baseline=baseline(400)),
        data=Markov(**DATA),
        method=KD(),
        roles=dict(teacher=Role(init="exact"), student=STUDENT),
        evaluation=TextEval(),
        claim=dict(
            metric="perplexity",
            model="student",
            baseline="baseline",
            better="lower",
            ratio=0.98,
        ),
    )
