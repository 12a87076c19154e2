"""Evaluation of image generators: distances of features, agreement with the labels, a grid."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer

from jaxdistill.core.types import Refused
from jaxdistill.evals import classifier, manifold
from jaxdistill.evals.diversity import pairwise_distance
from jaxdistill.evals.frechet import frechet_distance
from jaxdistill.evals.pictures import grid
from jaxdistill.evals.samples import SampleEval

FEWEST = 4  # samples, so that each has three neighbours


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageEval(SampleEval):
    """Fréchet distance, precision, recall and diversity of pictures by their features."""

    # "classifier": those of a small network trained on the data's own labels; "pixels"; or the path
    # of Inception weights (.safetensors), for the conventional FID.
    features: str = "classifier"

    metrics = ("frechet", "precision", "recall", "diversity", "accuracy")

    def check(self, data):
        super().check(data)
        first = data.one_sample()
        shape = np.shape(first["x"])
        if shape and len(shape) != 3:
            raise Refused(
                "evaluation: ImageEval needs pictures [height width channels], "
                f"the data has {list(shape)}"
            )
        count = len(data.evaluation(FEWEST)["x"])
        if count < FEWEST or self.samples < FEWEST:
            raise Refused(
                f"evaluation: ImageEval compares at least {FEWEST} samples, the data keeps {count} "
                f"for evaluation and evaluation.samples={self.samples}; expected more of them "
                "(data.heldout, or a test folder)"
            )
        if self.features.endswith(".safetensors"):
            if not Path(self.features).is_file():
                raise Refused(
                    f"evaluation.features={self.features!r}: no such file"
                )
        elif self.features not in ("classifier", "pixels"):
            raise Refused(
                f"evaluation.features={self.features!r}: expected classifier, pixels or an "
                "Inception .safetensors file"
            )
        elif self.features == "classifier" and np.ndim(first.get("cond", ())) != 0:
            raise Refused(
                "evaluation.features='classifier' needs labels `cond`, the data has none; "
                "expected pixels or a file"
            )

    def score(self, x, real, data):
        extract, predict = self._features(data)
        fake = extract(x)
        true = extract(real["x"])
        row = {"frechet": frechet_distance(fake, true)}
        row["precision"], row["recall"] = manifold.precision_recall(true, fake)
        label = labels(real)
        # Diversity needs two samples of one label.
        if label is None or len(np.unique(label)) < len(label):
            row["diversity"] = pairwise_distance(fake, label)
        if predict is not None:
            row["accuracy"] = float(np.mean(predict(x) == real["cond"]))
        return row

    def _features(self, data: Any) -> tuple[Callable, Callable | None]:
        """The functions from pictures to features and, where there is one, to labels."""
        if self.features == "classifier":
            net = classifier.trained_on(data)
            return net.features, net.predict
        if self.features == "pixels":
            return lambda x: x.reshape(len(x), -1), None
        from jaxdistill.evals.inception import load

        return load(self.features), None

    def picture(self, x, real):
        """A grid of up to 100 samples, sorted by label."""
        label = labels(real)
        order = np.arange(min(len(x), 100))
        if label is not None:
            order = np.argsort(label[:100], kind="stable")
        shown = 3 if x.shape[-1] >= 3 else 1  # channels; latents have more
        return grid(x[..., :shown][order])


def labels(samples: Mapping[str, Any]) -> Integer[np.ndarray, " B"] | None:
    """The classes of samples; None where their conditions are none or of another kind."""
    cond = samples.get("cond")
    if isinstance(cond, np.ndarray) and cond.ndim == 1 and cond.dtype.kind in "iu":
        return cond
    return None
