"""Text from several domains in proportions that a controller may change during a run."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import grain
import numpy as np

from jaxdistill.core.types import Refused
from jaxdistill.data.base import Dataset, Derived, InMemory, at_positions
from jaxdistill.data.language import Markov


class Mixer:
    """Which samples of several domains come next.

    Every domain's samples are taken in turn, in a new order in each of its epochs.
    """

    def __init__(self, sizes: Sequence[int], seed: int):
        self.sizes = tuple(sizes)
        self.seed = seed

    def draw(
        self, index: int, taken: Sequence[int], weights: Sequence[float], n: int
    ) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """The samples of batch `index`.

        Args:
            index: number of the batch.
            taken: samples of each domain that the batches before have taken.
            weights: probability of each domain.
            n: samples of the batch.

        Returns:
            The domain of each sample [n], its index in the domain [n], and `taken` after the batch.
        """
        rng = np.random.default_rng([self.seed, 3, index])
        domain = rng.choice(len(self.sizes), n, p=weights)
        within = np.zeros(n, np.int64)
        taken = list(taken)
        for d, size in enumerate(self.sizes):
            mine = np.flatnonzero(domain == d)
            positions = taken[d] + np.arange(len(mine))
            within[mine] = at_positions(
                self.seed * len(self.sizes) + d, size, positions
            )
            taken[d] += len(mine)
        return domain, within, taken


@dataclasses.dataclass(frozen=True, kw_only=True)
class Domains(Dataset):
    """Samples of other data sets, one for each domain; subclasses give `parts`.

    Every sample has `domain` int32 and `heldout` float32, 1 on samples that are never trained on.
    Of every interval + measures batches the first `measures` hold held-out samples: always the same
    ones, and as many of each domain. The batches that follow are drawn from the training samples
    with the probabilities `weights`.
    """

    # Probability of each domain; empty: in proportion to the domains' sizes.
    weights: tuple[float, ...] = ()
    # training batches between measurements; 0: no held-out batches
    interval: int = 0
    measures: int = 1  # batches of held-out samples in a measurement

    @functools.cached_property
    def parts(
        self,
    ) -> dict[str, tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]]:
        """Domain -> arrays of its (training, held-out) samples."""
        raise NotImplementedError

    @functools.cached_property
    def mixer(self) -> Mixer:
        """The order of the training samples. Raises Refused where a domain has none."""
        sizes = {
            name: len(train["tokens"]) for name, (train, _) in self.parts.items()
        }
        for name, size in sizes.items():
            if not size:
                raise Refused(
                    f"data.path={self.path}: the domain {name!r} has no training samples"
                )
        return Mixer(list(sizes.values()), self.seed)

    def check(self, test=True):
        """As for every data set; all domains are read, since they are kept in memory."""
        _ = self.probabilities
        self.spec()
        for index in range(self.measures if self.interval else 0):
            self.read(index, [0] * len(self.parts), slice(None))
        if test:
            self.evaluation(len(self.parts))

    def check_method(self, method):
        """Raises Refused where the method moves weights at a held-out batch.

        The first two measurements are looked at.
        """
        if not self.interval:
            return
        for start in (0, self.interval + self.measures):
            for step in range(start, start + self.measures):
                moved = [
                    role
                    for turn in method.turns
                    if turn.when(step)
                    for role in turn.moves
                ]
                if moved:
                    raise Refused(
                        f"data.interval={self.interval}, data.measures={self.measures}: "
                        f"{type(method).__name__} would train {moved[0]} on the held-out samples "
                        f"of step {step}; expected 0, or the method's own interval and measures"
                    )

    @property
    def probabilities(self) -> np.ndarray:
        """The probability of each domain.

        Raises:
            Refused: where `weights` are not one for each domain, or do not sum to 1.
        """
        sizes = np.array(self.mixer.sizes)
        given = np.array(self.weights or sizes / sum(self.mixer.sizes), np.float64)
        if (
            given.shape != (len(self.parts),)
            or (given < 0).any()
            or abs(given.sum() - 1) > 1e-6
        ):
            raise Refused(
                f"data.weights={tuple(self.weights)}: expected a probability for each of "
                f"{', '.join(self.parts)}"
            )
        return given / given.sum()

    @property
    def share(self) -> int:
        """Samples of each domain in a held-out batch."""
        if self.batch_size % len(self.parts):
            raise Refused(
                f"data.batch_size={self.batch_size}: expected a multiple of the {len(self.parts)} "
                "domains, for held-out batches"
            )
        return self.batch_size // len(self.parts)

    def read(
        self, index: int, taken: Sequence[int], samples: slice
    ) -> tuple[dict[str, np.ndarray], list[int]]:
        """The part `samples` of batch `index`.

        Args:
            index: number of the batch.
            taken: training samples of each domain that the batches before have taken.
            samples: which samples of the batch.

        Returns:
            The samples, and `taken` after the batch.
        """
        # Number of the batch since the last measurement began.
        since = (
            index % (self.interval + self.measures)
            if self.interval
            else self.measures
        )
        if since >= self.measures:
            drawn = self.mixer.draw(
                index, taken, self.probabilities, self.batch_size
            )
            domain, within, taken = drawn
            return self.at(domain[samples], within[samples], 0), taken
        domain = np.repeat(np.arange(len(self.parts)), self.share)
        within = np.tile(
            since * self.share + np.arange(self.share), len(self.parts)
        )
        return self.at(domain[samples], within[samples], 1), list(taken)

    def at(
        self, domain: np.ndarray, within: np.ndarray, heldout: int
    ) -> dict[str, np.ndarray]:
        """The samples with the indices `within` [B] in the domains `domain` [B].

        Args:
            heldout: 1 for held-out samples, 0 for training samples.

        Raises:
            Refused: where a domain has too few held-out samples.
        """
        arrays = [part[heldout] for part in self.parts.values()]
        fewest = min(len(a["tokens"]) for a in arrays)
        if heldout and fewest <= within.max():
            raise Refused(
                f"data.measures={self.measures}: a domain has only {fewest} held-out samples, "
                f"{within.max() + 1} are asked for"
            )
        batch = {}
        for key in arrays[0]:
            batch[key] = np.stack(
                [arrays[d][key][i] for d, i in zip(domain, within)]
            )
        batch["domain"] = domain.astype(np.int32)
        batch["heldout"] = np.full(len(within), heldout, np.float32)
        return batch

    def batch(self, index, samples):
        batch, _ = self.read(index, [0] * len(self.parts), samples)
        return batch

    def loader(self, shard=(0, 1)):
        return _Mixed(self, self.own_samples(shard))

    def evaluation(self, n):
        """Up to n / domains held-out samples of each domain, apart from those of measurements."""
        first = self.share * self.measures if self.interval else 0
        spare = {
            name: len(test["tokens"]) - first
            for name, (_, test) in self.parts.items()
        }
        for name, count in spare.items():
            if count < 1:
                raise Refused(
                    f"data.path={self.path}: the domain {name!r} has {count + first} held-out "
                    f"samples, expected {first + 1} or more"
                )
        each = min(n // len(self.parts), *spare.values())
        if not each:
            raise Refused(
                f"data: {n} held-out samples are asked for, expected at least one of each of "
                f"{', '.join(self.parts)}"
            )
        domain = np.repeat(np.arange(len(self.parts)), each)
        within = np.tile(first + np.arange(each), len(self.parts))
        return self.at(domain, within, 1)

    def examples(self, split):
        """All samples, domain by domain."""
        heldout = int(split == "test")
        sizes = [len(part[heldout]["tokens"]) for part in self.parts.values()]
        places = [
            (domain, i) for domain, size in enumerate(sizes) for i in range(size)
        ]

        def example(place):
            domain, within = np.array(place)[:, None]
            return {k: v[0] for k, v in self.at(domain, within, heldout).items()}

        return Derived(places, example)

    def steer(self, hints):
        fields = {
            k: tuple(v) if isinstance(v, list) else v for k, v in hints.items()
        }
        return dataclasses.replace(self, **fields)


class _Mixed(grain.DatasetIterator):
    """Endless batches; the state is the batch's number and the samples taken of each domain."""

    def __init__(self, data: Domains, samples: slice):
        super().__init__()
        self._data = data
        self._samples = samples
        self.set_state({"index": 0, "taken": [0] * len(data.parts)})

    def __next__(self):
        batch, self._taken = self._data.read(
            self._index, self._taken, self._samples
        )
        self._index += 1
        return batch

    def get_state(self):
        return {"index": self._index, "taken": list(self._taken)}

    def set_state(self, state):
        self._index = state["index"]
        self._taken = list(state["taken"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Folders(Domains):
    """Every file and folder in `path` is a domain, which `each` reads."""

    # A data set that keeps its arrays in memory, such as those of data.text. Its own path and
    # batch_size are not used.
    each: Dataset | None = None

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.each, InMemory):
            raise Refused(
                f"data.each: {type(self.each).__name__}, expected a data set that keeps its arrays "
                "in memory, as data.text's"
            )

    @property
    def vocab_size(self):
        return self.each.vocab_size

    @property
    def texts(self):
        return self.each or self

    @functools.cached_property
    def parts(self):
        path = self.existing()
        names = []
        if path.is_dir():
            names = sorted(
                p.name for p in path.iterdir() if not p.name.startswith(".")
            )
        if not names:
            raise Refused(
                f"data.path={self.path}: expected a folder of files and folders, each a domain"
            )
        parts = {}
        for name in names:
            part = dataclasses.replace(self.each, path=str(path / name))
            parts[name] = (part.arrays("train"), part.arrays("test"))
        return parts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chains(Domains):
    """Second-order Markov chains of differing entropy over one vocabulary, one for each domain."""

    # Likely successors of a context (data.language), for each domain.
    branches: tuple[int, ...] = (2, 3, 4, 6, 8)
    vocab: int = 24
    length: int = 48  # tokens
    size: int = 4000  # training samples of a domain
    held_out: int = 600  # held-out samples of a domain

    renamed = {"held": "held_out"}

    @property
    def vocab_size(self):
        return self.vocab

    @functools.cached_property
    def parts(self):
        parts = {}
        for i, branch in enumerate(self.branches):
            chain = Markov(
                vocab=self.vocab,
                branch=branch,
                length=self.length,
                seed=self.seed * 101 + i,
                batch_size=self.size,
            )
            parts[f"chain{i}"] = (
                chain.batch(0, slice(None)),
                chain.evaluation(self.held_out),
            )
        return parts
