"""The base of all data sets: endless batches from a position that can be saved.

The batches do not depend on the number of processes that share them. Abilities that only some data
sets have are in `data.abilities`.
"""

from __future__ import annotations

import dataclasses
import functools
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import grain
import jax
import numpy as np

from jaxdistill.core.fields import Count, Natural, Range, problem, shown
from jaxdistill.core.types import Method, Refused

ENDLESS = 1 << 40  # batches: more than any run takes
LARGEST = 1 << 34  # bytes of a file that is read at once


def check_fields(config: Any, where: str) -> None:
    """Raises Refused where a field of a dataclass does not fit its annotation.

    Args:
        config: an object of a dataclass whose annotations are those of `core.fields`.
        where: how the message names it, such as "data".
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        expected = problem(type(config), field.name, value)
        if expected:
            raise Refused(f"{where}.{field.name}={shown(value)}: {expected}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """Base of all data sets; its fields are the keys of `config.data`.

    Global batch number i is the same set of samples whatever the number of processes; process p of
    n takes its share of them. Subclasses override `batch` (for samples in memory, or made on the
    fly), or derive from `Records`.
    """

    batch_size: Count = 128  # samples per step over all processes
    # which mixture or language is made, or the order in which stored samples are read
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    path: str = ""  # file or folder, of the data sets that read one

    # Number of classes, where samples have labels and it is known; labels are below it.
    classes: ClassVar[int | None] = None
    # Share of the stored samples that is held out, where a data set splits one store in two.
    heldout: ClassVar[float | None] = None

    def __post_init__(self):
        check_fields(self, "data")

    def check(self, test: bool = True) -> None:
        """Raises Refused where there is no training sample or, where `test`, no held-out one.

        Called before anything runs or is written. Data sets that are read record by record open
        their files, and read one record of each split.
        """
        self.spec()
        if test:
            self.evaluation(1)

    def check_method(self, method: Method) -> None:
        """Raises Refused where `method` would train on batches that are not for training."""

    @property
    def vocab_size(self) -> int | None:
        """Token ids are below it; None where batches have no tokens or the number is not known."""
        return None

    @property
    def teacher_vocab_size(self) -> int | None:
        """`vocab_size` of the tokens that the teacher reads, which may have its own tokenizer."""
        return self.vocab_size

    @property
    def label_count(self) -> int | None:
        """Class labels are below it; None where there are no labels or the number is not known."""
        return self.classes

    def batch(self, index: int, samples: slice) -> dict[str, np.ndarray]:
        """The part `samples` of global batch `index`.

        Returns:
            Arrays [B ...] under the keys "x" or "tokens", "cond", "null_cond", "mask", ...
        """
        raise NotImplementedError

    def loader(self, shard: tuple[int, int] = (0, 1)) -> grain.DatasetIterator:
        """Endless iterator over one process's part of every batch.

        Its `get_state()` is a small JSON value that does not depend on the number of processes.

        Args:
            shard: (number of the process, number of processes).
        """
        samples = self.own_samples(shard)
        batches = grain.MapDataset.range(ENDLESS).map(
            lambda i: self.batch(int(i), samples)
        )
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        return iter(batches.to_iter_dataset(options))

    def own_samples(self, shard: tuple[int, int]) -> slice:
        """The samples of a global batch that one process takes.

        Raises:
            Refused: where the processes cannot share the batch evenly.
        """
        process, processes = shard
        if self.batch_size % processes:
            raise Refused(
                f"data.batch_size={self.batch_size}: expected a multiple of the {processes} "
                "processes"
            )
        share = self.batch_size // processes
        return slice(process * share, (process + 1) * share)

    def evaluation(self, n: int) -> dict[str, np.ndarray]:
        """Up to `n` held-out samples, always the same ones, under the keys of `batch`."""
        raise NotImplementedError

    def examples(self, split: str) -> Sequence[dict[str, np.ndarray]]:
        """Every sample of "train" or "test", without batch axis, always in the same order.

        Raises:
            Refused: where the data set makes samples without end.
        """
        raise Refused(
            f"data: {type(self).__name__} makes samples without end, so that their number has to "
            "be given"
        )

    def one_sample(self) -> dict[str, np.ndarray]:
        """One training sample, without batch axis; it is read once.

        Raises:
            Refused: where there is none.
        """
        return dict(self._sample)

    @functools.cached_property
    def _sample(self) -> dict[str, np.ndarray]:
        batch = self.batch(0, slice(0, 1))
        if not all(len(v) for v in jax.tree.leaves(batch)):
            raise self.lacking("train")
        return jax.tree.map(lambda v: v[0], batch)

    def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of a global batch."""

        def batched(v):
            return jax.ShapeDtypeStruct(
                (self.batch_size, *np.shape(v)), np.asarray(v).dtype
            )

        return jax.tree.map(batched, self.one_sample())

    def steer(self, hints: Mapping[str, Any]) -> Dataset:
        """This data set with the fields that a controller asks for."""
        return dataclasses.replace(self, **hints)

    @property
    def texts(self) -> Dataset:
        """The data set that says what the tokens mean: itself, or the one it is made from."""
        return self

    def tokenizer_files(self) -> Path | dict[str, Any]:
        """The tokenizer of its tokens: a folder of `transformers`, or JSON objects by file name.

        Empty where the tokens are not made from text.
        """
        return {}

    def prompt_text(self, question: str) -> str:
        """The full text that a student reads before it answers."""
        return question

    def chosen(self, size: int, n: int) -> np.ndarray:
        """Which of `size` held-out samples `evaluation(n)` takes.

        A fixed random choice, since stored samples may be sorted.
        """
        return np.sort(shuffled(0, size, 0)[:n])

    def existing(self) -> Path:
        """`path` as a Path.

        Raises:
            Refused: where it is empty, missing or cannot be looked at.
        """
        if not self.path:
            raise Refused(
                f"data.path is empty: {type(self).__name__} reads files; "
                "give --config.data.path=..."
            )
        try:
            path = Path(self.path).expanduser()
            path.stat()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise Refused(
                f"data.path={self.path}: no such file or folder"
            ) from error
        except OSError as error:  # no permission, or a name that is too long
            raise Refused(
                f"data.path={self.path!r}: {error.strerror or error}"
            ) from error
        except (RuntimeError, ValueError) as error:  # no such user; a zero byte
            raise Refused(f"data.path={self.path!r}: {error}") from error
        return path

    def lacking(self, split: str) -> Refused:
        """The refusal of a `split` without samples."""
        hint = ""
        if self.heldout is not None:
            hint = f"; data.heldout={self.heldout} is the share that is kept for evaluation"
        return Refused(
            f"data.path={self.path}: {type(self).__name__} has no {split} samples{hint}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class InMemory(Dataset):
    """A data set that fits in memory; subclasses give `arrays(split)`.

    It is shuffled anew in every epoch, and no sample is left out.
    """

    def arrays(self, split: str) -> dict[str, np.ndarray]:
        """All samples of "train" or "test", equally long along axis 0."""
        raise NotImplementedError

    def batch(self, index, samples):
        arrays = self._cached("train")
        positions = index * self.batch_size + np.arange(self.batch_size)[samples]
        picked = at_positions(self.seed, _length(arrays), positions)
        return {k: v[picked] for k, v in arrays.items()}

    def evaluation(self, n):
        arrays = self._cached("test")
        picked = self.chosen(_length(arrays), n)
        return {k: v[picked] for k, v in arrays.items()}

    def examples(self, split):
        arrays = self._cached(split)
        return Derived(
            range(_length(arrays)), lambda i: {k: v[i] for k, v in arrays.items()}
        )

    @functools.lru_cache(maxsize=4)  # noqa: B019 - the instances are frozen and few
    def _cached(self, split: str):
        arrays = self.arrays(split)
        if not _length(arrays):
            raise self.lacking(split)
        return arrays


def _length(arrays: Mapping[str, np.ndarray]) -> int:
    """The number of samples."""
    return len(next(iter(arrays.values())))


@functools.lru_cache(maxsize=4)
def shuffled(seed: int, size: int, epoch: int) -> np.ndarray:
    """The order of `size` samples in one epoch."""
    return np.random.default_rng([seed, epoch]).permutation(size)


def at_positions(seed: int, size: int, positions: np.ndarray) -> np.ndarray:
    """Which of `size` samples stand at these positions of the endless shuffled stream."""
    return np.array(
        [shuffled(seed, size, int(p // size))[p % size] for p in positions]
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Records(Dataset):
    """A data set read record by record; subclasses give `source(split)` and `example(record)`.

    It is shuffled anew in every epoch, and no record is left out. `augment` is random in (seed,
    position in the stream) alone.
    """

    threads: Natural = 4  # for reading and decoding
    shuffle: bool = True

    def source(self, split: str):
        """Records with random access: `len(source)`, `source[i]`."""
        raise NotImplementedError

    def example(self, record: Any) -> dict[str, np.ndarray]:
        """One decoded sample, without batch axis."""
        raise NotImplementedError

    def augment(
        self, example: dict[str, np.ndarray], rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """`example` with the random changes of training; held-out samples are not augmented."""
        return example

    def loader(self, shard=(0, 1)):
        process, processes = shard
        own = self.own_samples(shard)
        records = grain.MapDataset.source(self._opened("train")).seed(self.seed)
        if self.shuffle:
            records = records.shuffle()
        examples = records.repeat(None).map(self.example).random_map(self.augment)
        mine = examples[process::processes]
        batches = mine.batch(own.stop - own.start, drop_remainder=True)
        options = grain.ReadOptions(
            num_threads=self.threads, prefetch_buffer_size=2 * self.threads
        )
        return iter(batches.to_iter_dataset(options))

    def evaluation(self, n):
        source = self._opened("test")
        examples = [
            self.example(source[int(i)]) for i in self.chosen(len(source), n)
        ]
        return {k: np.stack([e[k] for e in examples]) for k in examples[0]}

    def examples(self, split):
        return Derived(self._opened(split), self.example)

    @functools.cached_property
    def _sample(self):
        return self.example(self._opened("train")[0])

    @functools.lru_cache(maxsize=4)  # noqa: B019 - the instances are frozen and few
    def _opened(self, split: str):
        source = self.source(split)
        if not len(source):
            raise self.lacking(split)
        return source


def contents(file: Path, largest: int = LARGEST) -> bytes:
    """The bytes of a file.

    Raises:
        Refused: as `regular` does, and where the file has more than `largest` bytes.
    """
    size = regular(file)
    if size > largest:
        raise Refused(f"{file}: {size:,} bytes, expected at most {largest:,}")
    try:
        with file.open("rb") as stream:
            return stream.read(size)  # a file that grows while it is read ends here
    except OSError as error:
        raise Refused(
            f"{file}: cannot be read ({error.strerror or error})"
        ) from error


def regular(file: Path) -> int:
    """The size of a regular file in bytes; links are followed.

    Raises:
        Refused: on devices and pipes, which may have no end, on folders, and where the file cannot
            be looked at.
    """
    try:
        about = file.stat()
    except OSError as error:
        raise Refused(
            f"{file}: cannot be read ({error.strerror or error})"
        ) from error
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
    """`make(item)` of each item of `source`, made on access."""

    def __init__(self, source: Sequence, make: Callable[[Any], Any]):
        self.source = source
        self.make = make

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        return self.make(self.source[i])


def held_out(size: int, share: float, split: str) -> np.ndarray:
    """Indices of `split` ("train" or "test"), of which a fixed random `share` is held out."""
    order = shuffled(0, size, 0)
    cut = round(size * check_share(share))
    return np.sort(order[:cut] if split == "test" else order[cut:])


def check_share(heldout: float) -> float:
    """The share itself.

    Raises:
        Refused: outside [0, 1).
    """
    if not 0 <= heldout < 1:
        raise Refused(f"data.heldout={heldout}: expected a share from 0 to below 1")
    return heldout
