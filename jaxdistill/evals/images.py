"""Evaluation of image generators: Fréchet distance in chosen features, agreement with the label
asked for, a grid.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
from einops import rearrange
from PIL import Image

from jaxdistill.core.types import Refused
from jaxdistill.evals import classifier, manifold
from jaxdistill.evals.diversity import pairwise_distance
from jaxdistill.evals.frechet import frechet_distance
from jaxdistill.evals.samples import SampleEval

FEWEST = 4  # samples that have three neighbours each


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageEval(SampleEval):
    """features: "classifier" (a small network trained on the data's own labels, cached), "pixels",
    or the path of an Inception weights file (.safetensors), for the conventional FID features.
    """

    features: str = "classifier"

    metrics = ("frechet", "precision", "recall", "diversity", "accuracy")

    def check(self, data):
        super().check(data)
        if (shape := np.shape(data.one_sample()["x"])) and len(shape) != 3:
            raise Refused(
                f"evaluation: ImageEval needs pictures [height width channels], the data has {list(shape)}"
            )
        if (count := len(data.evaluation(FEWEST)["x"])) < FEWEST or self.samples < FEWEST:
            raise Refused(
                f"evaluation: ImageEval compares at least {FEWEST} samples, the data keeps {count} for evaluation and "
                f"evaluation.samples={self.samples}; expected more of them (data.heldout, or a test folder)"
            )
        if self.features.endswith(".safetensors"):
            if not Path(self.features).is_file():
                raise Refused(f"evaluation.features={self.features!r}: no such file")
        elif self.features not in ("classifier", "pixels"):
            raise Refused(
                f"evaluation.features={self.features!r}: expected classifier, pixels or an Inception .safetensors file"
            )
        elif self.features == "classifier" and np.ndim(data.one_sample().get("cond", ())) != 0:
            raise Refused(
                "evaluation.features='classifier' needs labels `cond`, the data has none; expected pixels or a file"
            )

    def score(self, x, real, data):
        extract, predict = self._features(data)
        fake = extract(x)
        true = extract(real["x"])
        row = {"frechet": frechet_distance(fake, true)}
        row["precision"], row["recall"] = manifold.precision_recall(true, fake)
        label = labels(real)
        if label is None or len(np.unique(label)) < len(
            label
        ):  # else no two samples are of one label
            row["diversity"] = pairwise_distance(fake, label)
        if predict is not None:
            row["accuracy"] = float(np.mean(predict(x) == real["cond"]))
        return row

    def _features(self, data) -> tuple[Callable, Callable | None]:
        if self.features == "classifier":
            net = classifier.trained_on(data)
            return net.features, net.predict
        if self.features == "pixels":
            return lambda x: x.reshape(len(x), -1), None
        from jaxdistill.evals.inception import load

        return load(self.features), None

    def picture(self, x, real):
        """A 10-column grid of up to 100 samples, sorted by label, a pixel apart, enlarged to about
        320 px.
        """
        label = labels(real)
        order = (
            np.arange(min(len(x), 100)) if label is None else np.argsort(label[:100], kind="stable")
        )
        x = x[..., :3] if x.shape[-1] >= 3 else x[..., :1]  # of latents, what can be shown
        x = np.clip((x[order] + 1) * 127.5, 0, 255).astype(np.uint8)
        x = np.pad(x, ((0, -len(x) % 10), (0, 1), (0, 1), (0, 0)), constant_values=96)
        grid = rearrange(x, "(r c) h w d -> (r h) (c w) d", c=10)
        image = Image.fromarray(grid[..., 0] if grid.shape[-1] == 1 else grid)
        scale = max(1, round(320 / image.width))
        return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def labels(rows: dict) -> np.ndarray | None:
    """int [n]: the classes that samples are of; None where there are none, or conditions of another
    kind (texts).
    """
    cond = rows.get("cond")
    return (
        cond
        if isinstance(cond, np.ndarray) and cond.ndim == 1 and cond.dtype.kind in "iu"
        else None
    )
