"""RLAD (arXiv:2602.22495), logic puzzles at 2048 tokens: Qwen3 8B into 1.7B.

    python -m launch.train --config=configs/recipes/rlad.py:verified --workdir=DIR \\
        --config.data.path=train.jsonl \\
        --config.data.tokenizer=QWEN --config.method.reward.tokenizer=QWEN \\
        --config.roles.student.init=QWEN_1.7B --config.roles.teacher.init=QWEN_8B

The paper: groups of 8, 256 responses a batch, alpha 0.5, clip 0.2 and 0.28, lr 1e-6; Knights and
Knaves 0.93 on average against 0.86 (GRPO) and 0.91 (KDRL). `updates` is not in it.
Departure: the verifier compares texts (without `:verified` tokens).
"""

from configs.recipes.grpo import improve, reward
from jaxdistill.core.build import Role
from jaxdistill.methods.language.rlad import RLAD
from jaxdistill.models.language.qwen import Qwen3

QWEN3 = dict(
    vocab=151936,
    head_dim=128,
    kv_heads=8,
    rope_theta=1e6,
    max_length=8192,
    dtype="bfloat16",
    remat="full",
)
QWEN3_1B7 = dict(dim=2048, mlp=6144, heads=16, depth=28, tied=True, **QWEN3)
QWEN3_8B = dict(dim=4096, mlp=12288, heads=32, depth=36, **QWEN3)


def get_config(variant=""):
    return improve(
        RLAD(
            reward=reward(variant, "exact_text"),
            group=8,
            updates=4,
            eos=(151643, 151645),
            pad=151643,
            chunk=18992,
        ),
        Qwen3(**QWEN3_1B7),
        prompts=32,
        prompt_length=512,
        response_length=1536,
        steps=1000,
        teacher=Role(param_dtype="bfloat16", model=Qwen3(**QWEN3_8B)),
    )
