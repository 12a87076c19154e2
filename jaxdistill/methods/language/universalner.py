"""UniversalNER - Targeted Distillation from Large Language Models for Open NER (arXiv:2308.03279).

One broad skill is copied from a teacher that only answers in text. It lists the entities of many
passages, with types in its own words; the student is tuned on conversations that ask for one type
at a time (data/ner.py), absent types included, so that it learns to answer "none". No teacher
probabilities: the loss is that of supervised tuning on answer tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.methods.language.sft import SFT
from jaxdistill.samplers.text import generate


@dataclasses.dataclass(frozen=True, kw_only=True)
class UniversalNER(SFT):
    """L = - sum_j m_j log q(c_j | c_<j) / sum_j m_j over a batch of conversations, m the mask of
    answers and their ends.
    """

    answer_length: int = 256  # tokens that an answer may have

    def answer(self, net: Callable, prompt: np.ndarray, eos: int) -> np.ndarray:
        """What a bound student answers, greedily, to the conversation `prompt` int [P]
        (data.ner.encode): int [n], without the end sign.
        """
        length = len(prompt) + self.answer_length
        tokens, alive = generate(
            net, jnp.asarray(prompt)[None], length, jax.random.key(0), temperature=0.0, eos=eos
        )
        written = np.asarray(tokens[0, len(prompt) :])[np.asarray(alive[0, len(prompt) :])]
        return written[written != eos]
