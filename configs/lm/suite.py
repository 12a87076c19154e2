"""Language methods on additions under one set of conditions: `--config=configs/lm/suite.py:METHOD`, each name below.

    python -m launch.train --config=configs/lm/suite.py:gkd --workdir=runs/lm/gkd_0 \\
        --config.roles.teacher.init=TEACHER --config.roles.student.init=START
    python tools/reproduce.py --suite=lm            # all of them on seeds 0, 1, 2, and the table

TEACHER and START are runs of configs/lm/carry.py, variants `teacher` and `start`. The same for all: both of these, responses
that a step learns from, steps, Adam with lr 1e-3. A method's own: who writes the answers, what they are graded by. GRPO and
RLAD write eight answers to each prompt, hence an eighth of the prompts.
"""

from configs.lm import carry
from jaxdistill.core.build import Role, experiment, spec
from jaxdistill.core.optim import Optimizer
from jaxdistill.core.types import lookup

STEPS = 1000
ROWS = 64  # responses that a step learns from
WRITING = dict(eos=(12,), pad=13)
REINFORCED = dict(reward=spec("objectives.reward:Exact"), group=8, updates=4, **WRITING)


def language(name, **fields):
    return spec(f"methods.language.{name}", **fields)


VARIANTS = {
    "sft": lambda: language("sft:SFT"),
    "sequence_kd": lambda: language("sequence_kd:SequenceKD", **WRITING),
    "forward_kl": lambda: language("kd:KD", kind="forward_kl"),
    "reverse_kl": lambda: language("kd:KD", kind="reverse_kl"),
    "jsd": lambda: language("kd:KD", kind="jsd"),
    "gkd": lambda: language("gkd:GKD", beta=0.9, on_policy=1.0, **WRITING),
    "tsd_kd": lambda: language("tsd_kd:TSDKD", candidates=2, ranking_weight=0.01, entropy_weight=0.003, **WRITING),
    "paced": lambda: language("paced:Paced", batches=100, **WRITING),
    "grpo": lambda: language("grpo:GRPO", **REINFORCED),
    "rlad": lambda: language("rlad:RLAD", clamp="straight_through", **REINFORCED),
}
OLD = dict(old=Role(optimizer=Optimizer(algorithm="sgd", clip=0.0)))  # what grpo and rlad write with


def get_config(method="gkd"):
    chosen = lookup(VARIANTS, method, "--config=configs/lm/suite.py:METHOD")()
    roles = dict(student=Role(init="runs/lm/start_0", optimizer=Optimizer(lr=1e-3, warmup=10)))
    roles |= OLD if method in ("grpo", "rlad") else {}
    roles |= dict(reference=Role(init="runs/lm/start_0")) if method == "grpo" else {}
    roles |= dict(teacher=Role(init="runs/lm/teacher_0")) if method not in ("sft", "grpo") else {}
    return experiment(
        steps=STEPS,
        data=carry.data(ROWS // REINFORCED["group"] if method in ("grpo", "rlad") else ROWS),
        method=chosen,
        roles=roles,
        evaluation=spec("evals.text:TextEval", samples=588),
        checkpoint_every=STEPS,
        log_every=50,
    )
