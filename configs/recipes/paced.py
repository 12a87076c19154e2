"""PACED (arXiv:2603.11178), Qwen3 14B into 8B on competition mathematics.

    python -m launch.train --config=configs/recipes/paced.py:verified --workdir=DIR --config.data.path=train.jsonl \\
        --config.data.tokenizer=QWEN --config.method.reward.tokenizer=QWEN \\
        --config.roles.student.init=QWEN_8B --config.roles.teacher.init=QWEN_14B

The authors' shared trainer: DAPO-Math-17k, of which 80 % is trained on, batch 256, prompts of 2048 and responses of 8192
tokens, lr 1e-6, weight decay 0.1, gradient norm 1, K = 8. The paper reports +7.5 on MATH-500 and +14.8 on AIME 2025 over
the student as it was. Steps and stage lengths are not in it: here one pass over the pool for each divergence.
Departures: one update for each batch of 256 (in 16 parts, for 16
chips), not four of 64; without `:verified` answers are compared token by token.
"""

from configs.recipes.grpo import reward
from configs.recipes.rlad import QWEN3, QWEN3_8B
from jaxdistill.core.build import Role, experiment, spec
from jaxdistill.core.optim import Optimizer

LONG = dict(max_length=16384)
QWEN3_14B = dict(dim=5120, mlp=17408, heads=40, depth=40, **QWEN3)
POOL = 54  # batches: 0.8 x 17398 problems


def get_config(variant=""):
    return experiment(
        steps=2 * POOL,
        accumulate=16,
        data=spec("data.text:PaddedJson", prompt_length=2048, response_length=8192, batch_size=256),
        method=spec("methods.language.paced:Paced", reward=reward(variant), batches=POOL, eos=(151643, 151645), pad=151643, chunk=18992),
        roles=dict(
            teacher=Role(param_dtype="bfloat16", model=spec("models.qwen:Qwen3", **{**QWEN3_14B, **LONG})),
            student=Role(model=spec("models.qwen:Qwen3", **{**QWEN3_8B, **LONG}), optimizer=Optimizer(lr=1e-6, weight_decay=0.1)),
        ),
        checkpoint_every=20,
    )
