"""GRPO (arXiv:2402.03300) on questions to be known by heart: it is told how much of an answer is
right, never the answer.

    python -m launch.train --config=configs/toy/grpo.py --workdir=runs/toy_grpo

2 CPU cores, about a minute. The student starts from a supervised training that is cut short
(`start`); its reward is the share of the answer's six tokens that it gets right. The claim: greedy
`accuracy` rises over that of the start (`baseline`, the same run once more). Measured on seeds 0 to
2: 1, .69, .94 against .5, .25, .25.
"""

from jaxdistill.core.build import Role, experiment
from jaxdistill.core.optim import Optimizer
from jaxdistill.data.language import Recall
from jaxdistill.evals.text import TextEval
from jaxdistill.methods.language.grpo import GRPO
from jaxdistill.methods.language.sft import SFT
from jaxdistill.models.language.lm import LM
from jaxdistill.objectives.reward import Share


def train(steps: int):
    """Supervised training on the answers."""
    model = LM(vocab=8, dim=64, mlp=128, heads=4, depth=2, max_length=8)
    return experiment(
        steps=steps,
        data=Recall(batch_size=64),
        method=SFT(),
        roles=dict(
            student=Role(
                model=model,
                optimizer=Optimizer(lr=3e-3, schedule="cosine", warmup=20),
            )
        ),
        evaluation=TextEval(),
    )


def improve(method, *, lr=1e-3, runs=None, roles=None, **rest):
    """A student from `start`, with 16 prompts a step."""
    own = dict(
        student=Role(init="@start", optimizer=Optimizer(lr=lr, warmup=10)),
        old=Role(
            optimizer=Optimizer(algorithm="sgd", clip=0.0)
        ),  # it only copies: no moments
    )
    return experiment(
        steps=400,
        runs=dict(start=train(12), **(runs or {})),
        data=Recall(batch_size=16),
        method=method,
        roles={**own, **(roles or {})},
        evaluation=TextEval(),
        **rest,
    )


def get_config():
    return improve(
        GRPO(
            reward=Share(),
            group=32,
            updates=4,
        ),
        lr=3e-4,
        runs=dict(baseline=train(12)),
        roles=dict(reference=Role(init="@start")),
        claim=dict(
            metric="accuracy",
            model="student",
            baseline="baseline",
            better="higher",
            ratio=1.3,
        ),
    )
