import dataclasses
import importlib
import inspect
import pkgutil

import jax
import numpy as np
import pytest

from jaxdistill import data
from jaxdistill.core.fields import Natural
from jaxdistill.core.types import Refused
from jaxdistill.data.base import (
    Dataset,
    InMemory,
    Joined,
    Records,
    Subset,
    held_out,
)
from jaxdistill.data.language import Markov


@dataclasses.dataclass(frozen=True, kw_only=True)
class Numbers(InMemory):
    batch_size: int = 4
    size: Natural = 10

    def arrays(self, split):
        return {"x": np.arange(self.size if split == "train" else 100)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lines(Records):
    batch_size: int = 4
    size: Natural = 10
    noise: bool = False

    def source(self, split):
        return Joined([range(self.size // 2), range(self.size // 2, self.size)])

    def example(self, record):
        if record < 0:
            raise Refused("record: negative")
        return {"x": np.int32(record), "y": np.float32([record, 0])}

    def augment(self, example, rng):
        return (
            {**example, "y": example["y"] + rng.random(dtype=np.float32)}
            if self.noise
            else example
        )


@pytest.mark.parametrize("kind", [Numbers, Lines])
@pytest.mark.parametrize(
    "size", [10, 12]
)  # batches that run over an epoch's end, and that do not
def test_stream(kind, size, check_stream, check_epochs):
    data = kind(size=size)
    check_stream(data)
    check_epochs(data, size)


def test_order_of_files_is_kept_on_demand(check_epochs):
    check_epochs(Lines(shuffle=False), 10, shuffled=False)
    assert next(Lines(shuffle=False).loader())["x"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", [Numbers, Lines])
def test_seed_changes_the_order(kind):
    size = 1000  # equal first batches of 4 by chance: 1 in 10^12
    first = [
        next(kind(size=size, seed=seed).loader())["x"].tolist() for seed in (0, 1)
    ]
    assert first[0] != first[1]


def test_augmentation_depends_on_seed_and_position_alone(check_stream):
    data = Lines(noise=True, size=4)
    check_stream(data)
    loader = data.loader()
    noise = [
        {int(x): float(y[0]) - x for x, y in zip(b["x"], b["y"])}
        for b in (next(loader), next(loader))
    ]
    assert all(noise[0][x] != noise[1][x] for x in range(4)), (
        "an epoch repeats the last one's draws"
    )
    assert data.evaluation(4)["y"][:, 0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", [Numbers, Lines])
def test_spec_is_that_of_a_global_batch(kind):
    data = kind()
    batch = next(data.loader())
    assert data.spec() == {
        k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch.items()
    }


def test_evaluation_is_a_fixed_choice_from_the_whole_set():
    some = Numbers().evaluation(20)["x"]
    # all of the first half: 1 in 10^9
    assert len(set(some.tolist())) == 20 and some.max() >= 50
    assert (some == Numbers(seed=5).evaluation(20)["x"]).all()
    assert Numbers().evaluation(1000)["x"].tolist() == list(range(100))
    assert len(set(Lines().evaluation(7)["x"].tolist())) == 7


def test_held_out_splits_and_covers():
    train = held_out(1000, 0.1, "train")
    test = held_out(1000, 0.1, "test")
    assert len(test) == 100 and sorted([*train, *test]) == list(range(1000))
    assert (test == held_out(1000, 0.1, "test")).all()
    assert len(held_out(10, 0.0, "test")) == 0


def test_joined_and_subset():
    joined = Joined([[], [1, 2], [], [3], []])
    assert list(joined) == [1, 2, 3] and len(joined) == 3
    assert list(Subset(joined, np.array([2, 0]))) == [3, 1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Numbers(batch_size=0),
            "data.batch_size=0: expected an integer of at least 1",
        ),
        (lambda: Numbers(seed=-1), "data.seed=-1"),
        (
            lambda: Numbers(batch_size=6).loader((0, 4)),
            "data.batch_size=6: expected a multiple of the 4 processes",
        ),
        (
            lambda: Lines(batch_size=6).loader((3, 4)),
            "data.batch_size=6: expected a multiple of the 4 processes",
        ),
        (lambda: Numbers().existing(), "data.path is empty: Numbers reads files"),
        (
            lambda: Numbers(path="/nowhere").existing(),
            "data.path=/nowhere: no such file or folder",
        ),
        (lambda: held_out(10, 1.0, "test"), "data.heldout=1.0"),
        (lambda: next(Numbers(size=0).loader()), "Numbers has no train samples"),
        (lambda: Lines(size=0).loader(), "Lines has no train samples"),
        (lambda: Lines(size=0).evaluation(5), "Lines has no test samples"),
    ],
)
def test_refused(make, message):
    with pytest.raises(Refused, match=message):
        make()


def test_a_bad_record_is_refused_by_the_loader(monkeypatch):
    monkeypatch.setattr(Lines, "source", lambda self, split: range(-3, 5))
    with pytest.raises(Refused, match="record: negative"):
        for _ in zip(range(8), Lines(size=99).loader()):
            pass


@pytest.mark.parametrize("kind", [Numbers, Lines])
def test_examples_are_all_of_a_split_in_order(kind):
    rows = kind().examples("train")
    assert len(rows) == 10 and [int(row["x"]) for row in rows] == list(range(10))
    assert rows[3].keys() == kind().spec().keys() and rows[3]["x"].shape == ()


def test_sets_without_end_have_no_examples():
    with pytest.raises(Refused, match="Markov makes samples without end"):
        Markov().examples("train")


def test_what_a_data_set_overrides_is_called_as_the_base_calls_it():
    """A method that happens to have the name of one of `Dataset`'s takes its place, whatever it was
    meant for.
    """
    modules = [
        importlib.import_module(m.name)
        for m in pkgutil.iter_modules(data.__path__, "jaxdistill.data.")
    ]
    made = {
        c
        for module in modules
        for c in vars(module).values()
        if inspect.isclass(c) and issubclass(c, Dataset)
    }
    arguments = lambda f: list(inspect.signature(f).parameters)
    assert len(made) > 20
    for kind in made:
        for name, method in vars(kind).items():
            for base in (
                b
                for b in kind.__mro__[1:]
                if issubclass(b, Dataset) and inspect.isfunction(vars(b).get(name))
            ):
                if not name.startswith("__"):
                    assert arguments(method) == arguments(vars(base)[name]), (
                        f"{kind.__name__}.{name} against {base.__name__}'s"
                    )
