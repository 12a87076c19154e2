"""Distillation across tokenizers (arXiv:2503.20083, arXiv:2402.12030): Qwen2.5 7B into Llama 3.2
1B.

    python -m launch.train --config=configs/recipes/cross_tokenizer_kd.py --workdir=DIR \\
        --config.data.path=train.jsonl \\
        --config.data.tokenizer=LLAMA --config.data.teacher_tokenizer=QWEN \\
        --config.roles.teacher.init=QWEN_7B --config.roles.student.init=LLAMA_1B

The folders are those of `LlamaForCausalLM` and `Qwen2ForCausalLM`. Spans end at words, tau = 100
(ALM). As ALM's authors have it: `--config.data.ends=unbiased --config.data.space=True
--config.method.name=methods.language.cross_tokenizer_kd:SpacedKD`. For ULD
`--config.method.name=methods.language.cross_tokenizer_kd:ULD --config.method.chunk=0
--config.method.temperature=1
--config.method.hard_weight=0.4`. No published figure is claimed: the papers' pairs are others.
"""

from configs.recipes.kd import distil
from jaxdistill.core.build import Role, plain
from jaxdistill.data.two_tokenizers import AlignedJson
from jaxdistill.methods.language.cross_tokenizer_kd import CrossTokenizerKD
from jaxdistill.models.language.qwen import Qwen2

QWEN_7B = dict(
    vocab=152064,
    dim=3584,
    mlp=18944,
    heads=28,
    kv_heads=4,
    depth=28,
    rope_theta=1e6,
    norm_eps=1e-6,
    max_length=4096,
    dtype="bfloat16",
    remat="full",
)


def get_config():
    data = AlignedJson(
        prompt_length=512,
        response_length=512,
        batch_size=64,
        ends="words",
    )
    config = distil(CrossTokenizerKD(chunk=16032), data)
    with config.unlocked():
        config.roles.teacher = plain(
            Role(
                model=Qwen2(**QWEN_7B),
                param_dtype="bfloat16",
            )
        )
    return config
