"""Word-level knowledge distillation (arXiv:1503.02531, arXiv:1606.07947) at the size of Llama 3.1
8B into 3.2 1B.

    python -m launch.train --config=configs/recipes/kd.py --workdir=DIR \\
        --config.data.path=train.jsonl \\
        --config.data.tokenizer=LLAMA --config.roles.teacher.init=LLAMA_8B
        --config.roles.student.init=LLAMA_1B

The folders are those of `LlamaForCausalLM`. Divergence chunked over the 128 k vocabulary. No
published figure is claimed. For several students of one teacher `tools/store_logits.py` reads the
data once and `StoredKD` trains on what it kept.
"""

from jaxdistill.core.build import Role, experiment
from jaxdistill.core.optim import Optimizer
from jaxdistill.data.text import PackedJson, PaddedJson
from jaxdistill.methods.language.kd import KD
from jaxdistill.models.language.lm import LM

LLAMA3 = dict(
    vocab=128256,
    rope_theta=500_000.0,
    max_length=4096,
    dtype="bfloat16",
    remat="full",
    norm_eps=1e-5,
)
LLAMA_8B = dict(dim=4096, mlp=14336, heads=32, kv_heads=8, depth=32, **LLAMA3)
LLAMA_1B = dict(
    dim=2048,
    mlp=8192,
    heads=32,
    kv_heads=8,
    head_dim=64,
    depth=16,
    tied=True,
    **LLAMA3,
)
PACKED = PackedJson(length=4096, batch_size=64)
# for those that write
PROMPTS = PaddedJson(prompt_length=512, response_length=512, batch_size=64)


def distil(method, data=PACKED, **role):
    return experiment(
        steps=20_000,
        accumulate=2,
        data=data,
        method=method,
        roles=dict(
            teacher=Role(model=LM(**LLAMA_8B), param_dtype="bfloat16"),
            student=Role(
                model=LM(**LLAMA_1B),
                optimizer=Optimizer(
                    lr=1e-5,
                    b2=0.95,
                    weight_decay=0.1,
                    schedule="cosine",
                    warmup=200,
                    final=0.1,
                ),
                **role,
            ),
        ),
        checkpoint_every=1000,
    )


def get_config():
    return distil(KD(chunk=16032))
