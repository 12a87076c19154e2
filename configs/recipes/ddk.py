"""DDK (arXiv:2407.16154): domain weights from perplexity ratios, Llama 3.1 8B into 3.2 1B in place
of Qwen1.5 14B into 1.8B.

    python -m launch.train --config=configs/recipes/ddk.py --workdir=DIR \\
        --config.data.path=DOMAINS \\
        --config.data.each.tokenizer=LLAMA --config.roles.teacher.init=LLAMA_8B
        --config.roles.student.init=LLAMA_1B

DOMAINS holds a folder of prompts and responses for each of 10 domains (train.jsonl and test.jsonl;
`method.domains` for another number). The paper: about 30 k steps of 0.5 M tokens, weights refreshed
every 1000 steps from 500 held-out rows of each domain, gamma 0.2, lr 3e-5 to 3e-6 after 1000 steps
of warm-up, 16 A100. Sequence length and batch are not stated: 120 rows of 4096 tokens here, and 40
held-out batches of them make a measurement.
Departures: the families; sample documents in place of running text.
"""

from configs.recipes.kd import LLAMA_1B, LLAMA_8B
from jaxdistill.core.build import Role, experiment
from jaxdistill.core.optim import Optimizer
from jaxdistill.data.domains import Folders
from jaxdistill.data.text import PackedJson
from jaxdistill.methods.language.ddk import DDK
from jaxdistill.models.language.lm import LM

INTERVAL = 1000
MEASURES = 40


def get_config():
    return experiment(
        steps=30 * (INTERVAL + MEASURES),
        accumulate=5,
        log_every=MEASURES,
        data=Folders(
            each=PackedJson(length=4096),
            interval=INTERVAL,
            measures=MEASURES,
            batch_size=120,
        ),
        method=DDK(
            domains=10,
            interval=INTERVAL,
            measures=MEASURES,
            chunk=16032,
        ),
        roles=dict(
            teacher=Role(model=LM(**LLAMA_8B), param_dtype="bfloat16"),
            student=Role(
                model=LM(**LLAMA_1B),
                optimizer=Optimizer(
                    lr=3e-5, schedule="cosine", warmup=1000, final=0.1
                ),
            ),
        ),
        checkpoint_every=INTERVAL + MEASURES,
    )
