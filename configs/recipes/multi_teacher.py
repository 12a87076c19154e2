"""Specialists of Llama 3.1 8B, each on a domain of its own, into one Llama 3.2 1B
(arXiv:1503.02531, section 5).

    python -m launch.train --config=configs/recipes/multi_teacher.py --workdir=DIR \\
        --config.data.path=DOMAINS \\
        --config.data.each.tokenizer=LLAMA --config.roles.student.init=LLAMA_1B
        --config.roles.teacher.init=FIRST \\
        --config.roles.teacher1.init=SECOND --config.roles.teacher2.init=THIRD

DOMAINS holds a folder of prompts and responses for each domain (train.jsonl and test.jsonl), in the
order of their names that of the teachers; `method.routes` for another assignment. The paper's are
61 specialists on subsets of image classes; no published figure is claimed.
"""

from configs.recipes.kd import LLAMA_8B, distil
from jaxdistill.core.build import Role, plain
from jaxdistill.data.domains import Folders
from jaxdistill.data.text import PackedJson
from jaxdistill.methods.language.multi_teacher import RoutedKD
from jaxdistill.models.language.lm import LM


def get_config():
    data = Folders(each=PackedJson(length=4096), batch_size=64)
    config = distil(RoutedKD(routes=(0, 1, 2), chunk=16032), data)
    with config.unlocked():
        for role in ("teacher1", "teacher2"):
            config.roles[role] = plain(
                Role(
                    model=LM(**LLAMA_8B),
                    param_dtype="bfloat16",
                )
            )
    return config
