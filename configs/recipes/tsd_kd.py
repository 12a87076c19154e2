"""TSD-KD (arXiv:2603.13260), Qwen2.5 14B into 1.5B on prompts of UltraInteract.

    python -m launch.train --config=configs/recipes/tsd_kd.py --workdir=DIR \\
        --config.data.path=train.jsonl \\
        --config.data.tokenizer=QWEN --config.roles.student.init=QWEN_1.5B
        --config.roles.teacher.init=QWEN_14B

The paper: batch 128, three epochs, lr 5e-6 with 10 % warm-up and cosine, responses of up to 128
tokens (the default of the trainer that its code builds on); GSM8K 60.1 and MATH 26.1 against 57.9
and 18.1 of GKD. The number of steps depends on the file; 6000 stands for three epochs of 256 000
prompts. The teacher's table is padded to 152064 rows and the student's to 151936: the ids that both
have are compared.
"""

from jaxdistill.core.build import Role, experiment
from jaxdistill.core.optim import Optimizer
from jaxdistill.data.text import PaddedJson
from jaxdistill.methods.language.tsd_kd import TSDKD
from jaxdistill.models.language.qwen import Qwen2

QWEN25 = dict(rope_theta=1e6, max_length=4096, dtype="bfloat16", remat="full")
QWEN25_14B = dict(
    dim=5120,
    mlp=13824,
    heads=40,
    kv_heads=8,
    depth=48,
    norm_eps=1e-5,
    vocab=152064,
    **QWEN25,
)
QWEN25_1B5 = dict(
    dim=1536,
    mlp=8960,
    heads=12,
    kv_heads=2,
    depth=28,
    tied=True,
    vocab=151936,
    **QWEN25,
)


def get_config():
    return experiment(
        steps=6000,
        accumulate=4,
        data=PaddedJson(prompt_length=896, response_length=128, batch_size=128),
        method=TSDKD(eos=(151643, 151645), pad=151643),
        roles=dict(
            teacher=Role(param_dtype="bfloat16", model=Qwen2(**QWEN25_14B)),
            student=Role(
                model=Qwen2(**QWEN25_1B5),
                optimizer=Optimizer(lr=5e-6, schedule="cosine", warmup=600),
            ),
        ),
        checkpoint_every=500,
    )
