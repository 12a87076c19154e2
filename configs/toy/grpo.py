"""GRPO (arXiv:2402.03300) on additions that a program checks: from seldom to mostly right, without seeing an answer.

    python -m launch.train --config=configs/toy/grpo.py --workdir=runs/toy_grpo

2 CPU cores, about a minute. The student starts from a short supervised training (`start`); its reward is the share of
the sum's digits that it gets right. The claim: greedy `accuracy` on additions that were kept back becomes at least
twice what the start has (`baseline`, the same run once more).
"""

from jaxdistill.core.build import Role, experiment, spec
from jaxdistill.core.optim import Optimizer

DATA = dict(digits=2, batch_size=64)
LM = spec("models.lm:LM", vocab=14, dim=64, mlp=128, heads=4, depth=2, max_length=10)
OPTIMIZER = Optimizer(lr=3e-4, clip=1.0, warmup=10)
WRITING = dict(eos=(12,), pad=13)


def train(steps: int):
    """Supervised training on the sums."""
    return experiment(
        steps=steps,
        data=spec("data.language:Carry", **DATA),
        method=spec("methods.language.sft:SFT"),
        roles=dict(student=Role(model=LM, optimizer=Optimizer(lr=3e-3, schedule="cosine", warmup=20))),
        evaluation=spec("evals.text:TextEval"),
    )


def improve(method, *, steps=300, runs=None, roles=None, **rest):
    """A student from `start`, with 16 prompts a step."""
    held = dict(old=Role(optimizer=Optimizer(algorithm="sgd", clip=0.0)))  # it only copies: no moments
    return experiment(
        steps=steps,
        runs=dict(start=train(200), **(runs or {})),
        data=spec("data.language:Carry", **{**DATA, "batch_size": 16}),
        method=method,
        roles=dict(student=Role(init="@start", optimizer=OPTIMIZER), **held, **(roles or {})),
        evaluation=spec("evals.text:TextEval"),
        **rest,
    )


def get_config():
    return improve(
        spec("methods.language.grpo:GRPO", reward=spec("objectives.reward:Share"), updates=4, **WRITING),
        runs=dict(baseline=train(200)),
        roles=dict(reference=Role(init="@start")),
        claim=dict(metric="accuracy", model="student", baseline="baseline", better="higher", ratio=2.0),
    )
