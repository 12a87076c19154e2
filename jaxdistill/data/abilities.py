"""What some data sets can do beside making batches.

Whoever needs an ability asks for it by `isinstance(data, ChecksAnswers)`; a data set has it by
having the members. What every data set can say is in `data.base.Dataset`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxdistill.core.net import Net
from jaxdistill.core.types import Array
from jaxdistill.data.tokenizers import Tokenizer


@runtime_checkable
class HasExactTeacher(Protocol):
    """Knows the distribution of its samples."""

    def net(self, *process: Any) -> Net:
        """The exact teacher, a network without weights; a denoiser takes the process."""


@runtime_checkable
class HasModes(Protocol):
    """Samples points from a mixture of isotropic Gaussians, or of modes of another shape."""

    # weights [K], means [K D], stds [K]
    components: tuple[np.ndarray, np.ndarray, np.ndarray]


@runtime_checkable
class EndsText(Protocol):
    """Its texts end with a token, and padding follows."""

    eos: int | tuple[int, ...]
    pad: int


@runtime_checkable
class HasTokenizer(Protocol):
    """Its tokens are those of a tokenizer."""

    codec: Tokenizer


@runtime_checkable
class WritesText(Protocol):
    """Writes its tokens as text without a tokenizer."""

    def text(self, tokens: np.ndarray) -> str:
        """The text of one sample's tokens [T]."""


@runtime_checkable
class ChecksAnswers(Protocol):
    """Asks questions whose answers are right or wrong."""

    def correct(self, tokens: Array) -> Array:
        """Whether each sample, prompt and answer int [B T], ends in the right answer: bool [B]."""


@runtime_checkable
class ListsEntities(Protocol):
    """Asks for lists of entities."""

    def gold(self, tokens: np.ndarray) -> list[list[str]]:
        """The right answer to the question in each of the samples int [B T]."""

    def answers(self, tokens: np.ndarray) -> list[list[str]]:
        """The answer that each of the samples int [B T] gives."""


@runtime_checkable
class HasDomains(Protocol):
    """Text from several domains."""

    # domain -> arrays of its (training, held-out) samples
    parts: Mapping[str, tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]]


@runtime_checkable
class WritesCaptions(Protocol):
    """Pictures of coloured shapes under captions."""

    def caption(
        self,
        shape: np.ndarray,
        colour: np.ndarray,
        told: np.ndarray,
        shaped: bool = True,
    ) -> dict[str, np.ndarray]:
        """The condition that asks for shapes [B] in colours [B], where the colour is `told` [B]."""


def members(ability: type) -> list[str]:
    """The names that a data set must have to have an ability."""
    names = [*getattr(ability, "__annotations__", {}), *vars(ability)]
    return [name for name in dict.fromkeys(names) if not name.startswith("_")]


def text_end(data: Any) -> tuple[tuple[int, ...], int]:
    """The tokens that end a text of this data set and the one that fills up after it.

    Returns:
        (ids of the end tokens, id of the padding); ((), 0) where texts have no end.
    """
    if not isinstance(data, EndsText):
        return (), 0
    eos = data.eos if isinstance(data.eos, (tuple, list)) else (data.eos,)
    return tuple(eos), data.pad
