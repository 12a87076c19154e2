"""PACED (arXiv:2603.11178), Qwen3 14B into 8B on competition mathematics.

    python -m launch.train --config=configs/recipes/paced.py:verified --workdir=DIR \\
        --config.data.path=train.jsonl \\
        --config.data.tokenizer=QWEN --config.method.reward.tokenizer=QWEN \\
        --config.roles.student.init=QWEN_8B --config.roles.teacher.init=QWEN_14B

The authors' shared trainer: DAPO-Math-17k, of which 80 % is trained on, batch 256, prompts of 2048
and responses of 8192 tokens, lr 1e-6, weight decay 0.1, gradient norm 1, K = 8. The paper reports
+7.5 on MATH-500 and +14.8 on AIME 2025 over the student as it was. Steps and stage lengths are not
in it: here one pass over the pool for each divergence.
Departures: one update for each batch of 256 (in 16 parts, for 16
chips), not four of 64; without `:verified` answers are compared token by token.

`:self` is self-distillation of Qwen2.5-Math 7B Instruct by reverse KL; the student starts from the
teacher's folder. The teacher has read the data's solution, so that its rows are twice as long, and
fill the model's 4096 tokens. The paper reports +9.8 on MATH-500 and +13.6 on AIME 2025. Sizes of
prompts and responses are not in it; the verifier runs on the host.
"""

from configs.recipes.grpo import reward
from configs.recipes.rlad import QWEN3, QWEN3_8B
from configs.recipes.tsd_kd import QWEN25
from jaxdistill.core.build import Role, experiment
from jaxdistill.core.optim import Optimizer
from jaxdistill.core.types import lookup
from jaxdistill.data.text import PaddedJson
from jaxdistill.methods.language.paced import Paced, SelfPaced
from jaxdistill.models.language.qwen import Qwen2, Qwen3

LONG = dict(max_length=16384)
QWEN3_14B = dict(dim=5120, mlp=17408, heads=40, depth=40, **QWEN3)
QWEN25_MATH_7B = {
    **QWEN25,
    "dim": 3584,
    "mlp": 18944,
    "heads": 28,
    "kv_heads": 4,
    "depth": 28,
    "rope_theta": 1e4,
}
POOL = 54  # batches: 0.8 x 17398 problems
WRITING = dict(batches=POOL, eos=(151643, 151645), pad=151643)


def distil(method, teacher, student, *, prompt_length, response_length, stages):
    return experiment(
        steps=stages * POOL,
        accumulate=16,
        data=PaddedJson(
            prompt_length=prompt_length,
            response_length=response_length,
            batch_size=256,
        ),
        method=method,
        roles=dict(
            teacher=Role(param_dtype="bfloat16", model=teacher),
            student=Role(
                model=student, optimizer=Optimizer(lr=1e-6, weight_decay=0.1)
            ),
        ),
        checkpoint_every=20,
    )


def get_config(variant=""):
    lookup(dict.fromkeys(("", "verified", "self")), variant, "variant")
    if variant == "self":
        model = Qwen2(**QWEN25_MATH_7B)
        method = SelfPaced(reward=reward("verified"), chunk=19008, **WRITING)
        return distil(
            method, model, model, prompt_length=512, response_length=1536, stages=1
        )
    method = Paced(reward=reward(variant), chunk=18992, **WRITING)
    teacher, student = (Qwen3(**{**size, **LONG}) for size in (QWEN3_14B, QWEN3_8B))
    return distil(
        method, teacher, student, prompt_length=2048, response_length=8192, stages=2
    )
