"""Text from several domains in proportions that a controller may change while a run goes on."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import grain
import numpy as np

from jaxdistill.core.types import Refused
from jaxdistill.data.base import Dataset, Derived, InMemory, _order
from jaxdistill.data.language import Markov


class Mixer:
    """Which rows of domains with `sizes` rows come next: a domain's by turns, in a new order each
    time round.
    """

    def __init__(self, sizes: Sequence[int], seed: int):
        self.sizes = tuple(sizes)
        self.seed = seed

    def draw(
        self, index: int, taken: Sequence[int], weights: Sequence[float], n: int
    ) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """(domain [n], row in it [n], rows taken so far of each domain) of batch `index`, domains
        drawn by `weights`.
        """
        domain = np.random.default_rng([self.seed, 3, index]).choice(len(self.sizes), n, p=weights)
        row = np.zeros(n, np.int64)
        taken = list(taken)
        for d, size in enumerate(self.sizes):
            mine = np.flatnonzero(domain == d)
            at = taken[d] + np.arange(len(mine))
            row[mine] = [
                _order(self.seed * len(self.sizes) + d, size, int(a // size))[a % size] for a in at
            ]
            taken[d] += len(mine)
        return domain, row, taken


@dataclasses.dataclass(frozen=True, kw_only=True)
class Domains(Dataset):
    """Rows of other data sets, one for each domain, with `domain` int32 and `heldout` float32 (1 on
    rows never trained on).

    Of every interval + measures batches the first `measures` are held-out rows, the same each time
    and as many of each domain; those that follow are drawn with the probabilities `weights`.
    Subclasses give `parts`.
    """

    weights: tuple[
        float, ...
    ] = ()  # probability of each domain; none: in proportion to the domains' sizes
    interval: int = 0  # training batches between measurements; 0: no held-out batches
    measures: int = 1  # batches of held-out rows in a measurement

    def __post_init__(self):
        super().__post_init__()
        if self.interval < 0 or self.measures < 1:
            raise Refused(
                f"data.interval={self.interval}, data.measures={self.measures}: expected 0 or more, and 1 or more"
            )

    @functools.cached_property
    def parts(self) -> dict[str, tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]]:
        """Domain -> arrays of its (training, held-out) rows."""
        raise NotImplementedError

    @functools.cached_property
    def mixer(self) -> Mixer:
        """Raises Refused where a domain has no training rows."""
        sizes = {name: len(train["tokens"]) for name, (train, _) in self.parts.items()}
        for name, size in sizes.items():
            if not size:
                raise Refused(f"data.path={self.path}: the domain {name!r} has no training rows")
        return Mixer(list(sizes.values()), self.seed)

    def check(self, test=True):
        """As every data set's; all domains' rows are read, since they are kept in memory."""
        _ = self.probabilities
        self.spec()
        for index in range(self.measures if self.interval else 0):
            self.read(index, [0] * len(self.parts), slice(None))
        if test:
            self.evaluation(len(self.parts))

    def check_method(self, method):
        """At the held-out batches of the first two measurements the method moves nothing."""
        if not self.interval:
            return
        for step in (
            start + i for start in (0, self.interval + self.measures) for i in range(self.measures)
        ):
            if moved := [role for turn in method.turns if turn.when(step) for role in turn.moves]:
                raise Refused(
                    f"data.interval={self.interval}, data.measures={self.measures}: {type(method).__name__} would train "
                    f"{moved[0]} on the held-out rows of step {step}; expected 0, or the method's own interval and measures"
                )

    @property
    def probabilities(self) -> np.ndarray:
        """`weights`, or the domains' natural proportions. Raises Refused unless they are one for
        each and sum to 1.
        """
        given = np.array(
            self.weights or np.array(self.mixer.sizes) / sum(self.mixer.sizes), np.float64
        )
        if given.shape != (len(self.parts),) or (given < 0).any() or abs(given.sum() - 1) > 1e-6:
            raise Refused(
                f"data.weights={tuple(self.weights)}: expected a probability for each of {', '.join(self.parts)}"
            )
        return given / given.sum()

    @property
    def share(self) -> int:
        """Rows of each domain in a held-out batch."""
        if self.batch_size % len(self.parts):
            raise Refused(
                f"data.batch_size={self.batch_size}: expected a multiple of the {len(self.parts)} domains, for held-out batches"
            )
        return self.batch_size // len(self.parts)

    def read(
        self, index: int, taken: Sequence[int], rows: slice
    ) -> tuple[dict[str, np.ndarray], list[int]]:
        """(rows `rows` of batch `index`, rows taken of each domain after it)."""
        within = index % (self.interval + self.measures) if self.interval else self.measures
        if within >= self.measures:
            domain, row, taken = self.mixer.draw(index, taken, self.probabilities, self.batch_size)
            return self.rows_of(domain[rows], row[rows], 0), taken
        domain = np.repeat(np.arange(len(self.parts)), self.share)
        row = np.tile(within * self.share + np.arange(self.share), len(self.parts))
        return self.rows_of(domain[rows], row[rows], 1), list(taken)

    def rows_of(self, domain: np.ndarray, row: np.ndarray, heldout: int) -> dict[str, np.ndarray]:
        """Row `row[i]` of domain `domain[i]` for every i. Raises Refused where a domain has too few
        held-out rows.
        """
        arrays = [part[heldout] for part in self.parts.values()]
        if heldout and (short := min(len(a["tokens"]) for a in arrays)) <= row.max():
            raise Refused(
                f"data.measures={self.measures}: a domain has only {short} held-out rows, {row.max() + 1} are asked for"
            )
        batch = {k: np.stack([arrays[d][k][r] for d, r in zip(domain, row)]) for k in arrays[0]}
        return {
            **batch,
            "domain": domain.astype(np.int32),
            "heldout": np.full(len(row), heldout, np.float32),
        }

    def batch(self, index, rows):
        return self.read(index, [0] * len(self.parts), rows)[0]

    def loader(self, shard=(0, 1)):
        return _Mixed(self, self.rows(shard))

    def evaluation(self, n):
        """Up to n / domains rows of each, held out and apart from those that measurements use."""
        first = self.share * self.measures if self.interval else 0
        spare = {name: len(held["tokens"]) - first for name, (_, held) in self.parts.items()}
        for name, rows in spare.items():
            if rows < 1:
                raise Refused(
                    f"data.path={self.path}: the domain {name!r} has {rows + first} held-out rows, expected {first + 1} or more"
                )
        each = min(n // len(self.parts), *spare.values())
        if not each:
            raise Refused(
                f"data: {n} held-out rows are asked for, expected at least one of each of {', '.join(self.parts)}"
            )
        domain = np.repeat(np.arange(len(self.parts)), each)
        return self.rows_of(domain, np.tile(first + np.arange(each), len(self.parts)), 1)

    def examples(self, split):
        """All rows of one domain after another."""
        heldout = int(split == "test")
        sizes = [len(part[heldout]["tokens"]) for part in self.parts.values()]
        places = [(domain, row) for domain, size in enumerate(sizes) for row in range(size)]
        one = lambda place: {
            k: v[0] for k, v in self.rows_of(*np.array(place)[:, None], heldout).items()
        }
        return Derived(places, one)

    def steer(self, hints):
        return dataclasses.replace(
            self, **{k: tuple(v) if isinstance(v, list) else v for k, v in hints.items()}
        )


class _Mixed(grain.DatasetIterator):
    """Endless batches; the state is the batch's number and how many rows of each domain are used."""

    def __init__(self, data: Domains, rows: slice):
        super().__init__()
        self._data = data
        self._rows = rows
        self.set_state({"index": 0, "taken": [0] * len(data.parts)})

    def __next__(self):
        batch, self._taken = self._data.read(self._index, self._taken, self._rows)
        self._index += 1
        return batch

    def get_state(self):
        return {"index": self._index, "taken": list(self._taken)}

    def set_state(self, state):
        self._index = state["index"]
        self._taken = list(state["taken"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Folders(Domains):
    """Every file and folder in `path` is a domain, read by `each` (a data set that keeps its arrays
    in memory).
    """

    each: Dataset | None = None  # a data.text data set; its own path and batch_size are not used

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.each, InMemory):
            raise Refused(
                f"data.each: {type(self.each).__name__}, expected a data set that keeps its arrays in memory, as data.text's"
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
        names = (
            sorted(p.name for p in path.iterdir() if not p.name.startswith("."))
            if path.is_dir()
            else []
        )
        if not names:
            raise Refused(
                f"data.path={self.path}: expected a folder of files and folders, each a domain"
            )
        sets = {
            name: dataclasses.replace(self.each, path=str(self.existing() / name)) for name in names
        }
        return {name: (part.arrays("train"), part.arrays("test")) for name, part in sets.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chains(Domains):
    """Random second-order Markov chains (data.language) of differing entropy over one vocabulary."""

    branches: tuple[int, ...] = (
        2,
        3,
        4,
        6,
        8,
    )  # likely successors in each domain; their number is that of the domains
    vocab: int = 24
    length: int = 48  # tokens
    size: int = 4000  # training rows of a domain
    held: int = 600  # held-out rows of a domain

    @functools.cached_property
    def parts(self):
        make = lambda i, branch: Markov(
            vocab=self.vocab,
            branch=branch,
            length=self.length,
            seed=self.seed * 101 + i,
            batch_size=self.size,
        )
        chains = {f"chain{i}": make(i, branch) for i, branch in enumerate(self.branches)}
        return {
            name: (chain.batch(0, slice(None)), chain.evaluation(self.held))
            for name, chain in chains.items()
        }
