"""What every data set is: endless batches from a position that can be saved, the same for any
number of processes.
"""

from __future__ import annotations

import dataclasses
import functools
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np

from jaxdistill.core.fields import Natural
from jaxdistill.core.types import Method, Refused

ENDLESS = 1 << 40
LARGEST = 1 << 34  # bytes of a file that is read whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """Base of all data sets; its fields are the keys of `config.data`.

    Global batch number i is the same set of samples whatever the number of processes; process p of
    n takes its share of the rows. Subclasses override `batch` (vectorised, data in memory or
    generated), or derive from `Records`.
    """

    batch_size: int = 128  # samples per step over all processes
    seed: int = 0  # which mixture or language is made, or the order that a stored set is read in
    path: str = ""  # file or folder, for the sets that read one

    def __post_init__(self):
        if self.batch_size < 1:
            raise Refused(f"data.batch_size={self.batch_size}: expected a positive integer")
        if not 0 <= self.seed < 1 << 32:
            raise Refused(f"data.seed={self.seed}: expected 0 to 2^32 - 1")

    def at_least(self, least: int, *names: str) -> None:
        """Raises Refused where one of these fields is less."""
        for name in names:
            if not getattr(self, name) >= least:
                raise Refused(f"data.{name}={getattr(self, name)}: expected {least} or more")

    def check(self, test: bool = True) -> None:
        """Raises Refused where there is no first training sample or, where `test`, no held-out one;
        asked before anything runs or is written. Sets that are read record by record are opened,
        and one record of each split is read.
        """
        self.spec()
        if test:
            self.evaluation(1)

    def check_method(self, method: Method) -> None:
        """Raises Refused where `method` would train on batches that are not for training."""

    @property
    def vocab_size(self) -> int | None:
        """Token ids are below it; None where the batches have no tokens, or where nobody knows."""
        return getattr(self, "vocab", None)

    @property
    def teacher_vocab_size(self) -> int | None:
        """The same of what a teacher reads that has a tokenizer of its own."""
        return self.vocab_size

    @property
    def label_count(self) -> int | None:
        """Class labels are below it; None where there are none, or where nobody knows."""
        return getattr(self, "classes", None)

    def batch(self, index: int, rows: slice) -> dict[str, np.ndarray]:
        """Rows `rows` of global batch `index`; keys "x" / "tokens", "cond", "null_cond", "mask",
        ...
        """
        raise NotImplementedError

    def loader(self, shard: tuple[int, int] = (0, 1)) -> grain.DatasetIterator:
        """Endless iterator over this process's rows, `shard = (process, processes)`.

        `get_state()` is a small JSON value that does not depend on the number of processes.
        """
        rows = self.rows(shard)
        ds = grain.MapDataset.range(ENDLESS).map(lambda i: self.batch(int(i), rows))
        return iter(ds.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))

    def rows(self, shard: tuple[int, int]) -> slice:
        """The rows of a global batch that belong to `shard`. Raises Refused where processes cannot
        share it evenly.
        """
        process, processes = shard
        if self.batch_size % processes:
            raise Refused(
                f"data.batch_size={self.batch_size}: expected a multiple of the {processes} processes"
            )
        share = self.batch_size // processes
        return slice(process * share, (process + 1) * share)

    def evaluation(self, n: int) -> dict[str, np.ndarray]:
        """Up to `n` held-out samples, always the same ones, under the keys of `batch`."""
        raise NotImplementedError

    def examples(self, split: str) -> Sequence[dict[str, np.ndarray]]:
        """Every sample of "train" or "test", without batch axis, in an order that stays. Raises
        Refused where there is no last one.
        """
        raise Refused(
            f"data: {type(self).__name__} makes samples without end, so that their number has to be given"
        )

    def one_sample(self) -> dict[str, np.ndarray]:
        """One training sample, without batch axis. Raises Refused where there is none."""
        rows = self.batch(0, slice(0, 1))
        if not all(len(v) for v in jax.tree.leaves(rows)):
            raise self.lacking("train")
        return jax.tree.map(lambda v: v[0], rows)

    def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of a global batch."""
        shape = lambda v: jax.ShapeDtypeStruct((self.batch_size, *np.shape(v)), np.asarray(v).dtype)
        return jax.tree.map(shape, self.one_sample())

    def steer(self, hints: Mapping[str, Any]) -> Dataset:
        """This data set with the fields that a controller asks for."""
        return dataclasses.replace(self, **hints)

    @property
    def texts(self) -> Dataset:
        """The data set whose vocabulary its tokens are of: itself, or the one that it is made of."""
        return self

    def tokenizer_files(self) -> Path | dict[str, Any]:
        """What turns text into its tokens: a folder of `transformers`, or JSON objects by file
        name; empty where nothing does.
        """
        return {}

    def prompt_text(self, question: str) -> str:
        """All that a student reads before it answers."""
        return question

    def chosen(self, size: int, n: int) -> np.ndarray:
        """Which of `size` held-out samples `evaluation(n)` takes: a fixed random choice, since
        files may be sorted.
        """
        return np.sort(_order(0, size, 0)[:n])

    def existing(self) -> Path:
        """`path` as a Path. Raises Refused where it is empty or missing."""
        if not self.path:
            raise Refused(
                f"data.path is empty: {type(self).__name__} reads files; give --config.data.path=..."
            )
        try:
            path = Path(self.path).expanduser()
            path.stat()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise Refused(f"data.path={self.path}: no such file or folder") from error
        except (
            OSError,
            RuntimeError,
            ValueError,
        ) as error:  # no permission, a name too long, no such user, a zero byte
            raise Refused(
                f"data.path={self.path!r}: {getattr(error, 'strerror', None) or error}"
            ) from error
        return path

    def lacking(self, split: str) -> Refused:
        """What to raise where `split` has no samples."""
        share = getattr(self, "heldout", None)
        hint = (
            ""
            if share is None
            else f"; data.heldout={share} is the share that is kept for evaluation"
        )
        return Refused(f"data.path={self.path}: {type(self).__name__} has no {split} samples{hint}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class InMemory(Dataset):
    """A set that fits in memory: subclasses give `arrays(split)`; shuffled anew each epoch, no
    sample left out.
    """

    def arrays(self, split: str) -> dict[str, np.ndarray]:
        """All samples of "train" or "test", equally long along axis 0."""
        raise NotImplementedError

    def batch(self, index, rows):
        arrays = self._cached("train")
        size = len(next(iter(arrays.values())))
        at = index * self.batch_size + np.arange(self.batch_size)[rows]
        pick = np.array([_order(self.seed, size, int(p // size))[p % size] for p in at])
        return {k: v[pick] for k, v in arrays.items()}

    def evaluation(self, n):
        arrays = self._cached("test")
        pick = self.chosen(len(next(iter(arrays.values()))), n)
        return {k: v[pick] for k, v in arrays.items()}

    def examples(self, split):
        arrays = self._cached(split)
        return Derived(
            range(len(next(iter(arrays.values())))), lambda i: {k: v[i] for k, v in arrays.items()}
        )

    @functools.lru_cache(maxsize=4)  # noqa: B019 - the instances are frozen and few
    def _cached(self, split: str):
        arrays = self.arrays(split)
        if not len(next(iter(arrays.values()))):
            raise self.lacking(split)
        return arrays


@functools.lru_cache(maxsize=4)
def _order(seed: int, size: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Records(Dataset):
    """A set read record by record: subclasses give `source(split)` (random access) and
    `example(record)`.

    Shuffled anew each epoch, no record left out; `augment` is random in (seed, position in the
    stream) alone.
    """

    threads: Natural = 4  # reading and decoding
    shuffle: bool = True

    def source(self, split: str):
        """Random-access records: `len(source)`, `source[i]`."""
        raise NotImplementedError

    def example(self, record: Any) -> dict[str, np.ndarray]:
        """One decoded sample, without batch axis."""
        raise NotImplementedError

    def augment(
        self, example: dict[str, np.ndarray], rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """`example` as training sees it, with the random changes of this pass; evaluation leaves it
        alone.
        """
        return example

    def loader(self, shard=(0, 1)):
        process, processes = shard
        rows = self.rows(shard)
        ds = grain.MapDataset.source(self._opened("train")).seed(self.seed)
        ds = (
            (ds.shuffle() if self.shuffle else ds)
            .repeat(None)
            .map(self.example)
            .random_map(self.augment)
        )
        ds = ds[process::processes].batch(rows.stop - rows.start, drop_remainder=True)
        return iter(
            ds.to_iter_dataset(
                grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=2 * self.threads)
            )
        )

    def evaluation(self, n):
        source = self._opened("test")
        examples = [self.example(source[int(i)]) for i in self.chosen(len(source), n)]
        return {k: np.stack([e[k] for e in examples]) for k in examples[0]}

    def examples(self, split):
        return Derived(self._opened(split), self.example)

    def one_sample(self):
        return self.example(self._opened("train")[0])

    @functools.lru_cache(maxsize=4)  # noqa: B019 - the instances are frozen and few
    def _opened(self, split: str):
        source = self.source(split)
        if not len(source):
            raise self.lacking(split)
        return source


def contents(file: Path, largest: int = LARGEST) -> bytes:
    """The bytes of a file. Raises Refused as `regular` does, and on more than `largest` bytes."""
    size = regular(file)
    if size > largest:
        raise Refused(f"{file}: {size:,} bytes, expected at most {largest:,}")
    try:
        with file.open("rb") as stream:
            return stream.read(size)  # a file that grows while it is read ends here
    except OSError as error:
        raise Refused(f"{file}: cannot be read ({error.strerror or error})") from error


def regular(file: Path) -> int:
    """The size of a regular file (links are followed), bytes. Raises Refused on devices and pipes,
    which may have no end, on folders, and where it cannot be looked at.
    """
    try:
        about = file.stat()
    except OSError as error:
        raise Refused(f"{file}: cannot be read ({error.strerror or error})") from error
    if not stat.S_ISREG(about.st_mode):
        raise Refused(f"{file}: not a regular file")
    return about.st_size


class Joined(Sequence):
    """Several sequences one after another."""

    def __init__(self, parts: Sequence[Sequence]):
        self.parts = parts
        self.starts = np.cumsum([0, *map(len, parts)])

    def __len__(self):
        return int(self.starts[-1])

    def __getitem__(self, i):
        part = int(np.searchsorted(self.starts, i, side="right")) - 1
        return self.parts[part][i - int(self.starts[part])]


class Subset(Sequence):
    """The items of `source` at `indices`."""

    def __init__(self, source: Sequence, indices: np.ndarray):
        self.source = source
        self.indices = indices

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i):
        return self.source[int(self.indices[i])]


class Derived(Sequence):
    """`make(item)` of each item of `source`, when it is asked for."""

    def __init__(self, source: Sequence, make: Callable[[Any], Any]):
        self.source = source
        self.make = make

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        return self.make(self.source[i])


def held_out(size: int, share: float, split: str) -> np.ndarray:
    """Indices of `split` ("train" or "test") where a fixed random `share` of `size` samples is kept
    for evaluation.
    """
    order = _order(0, size, 0)
    cut = round(size * check_share(share))
    return np.sort(order[:cut] if split == "test" else order[cut:])


def check_share(heldout: float) -> float:
    """The share itself. Raises Refused outside [0, 1)."""
    if not 0 <= heldout < 1:
        raise Refused(f"data.heldout={heldout}: expected a share from 0 to below 1")
    return heldout
