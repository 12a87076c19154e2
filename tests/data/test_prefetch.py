import signal
import threading

import jax
import numpy as np
import pytest

from jaxdistill.core.types import Refused
from jaxdistill.data.digits import Digits
from jaxdistill.data.prefetch import DevicePrefetch


class Counting:
    """Loads 0, 1, 2, ...; `made` is released for each, `go` is waited for before each, and `fail`
    is raised at `stop`.
    """

    def __init__(self, stop: int = 1 << 30, fail: BaseException | None = None):
        self.n = 0
        self.stop = stop
        self.fail = fail or StopIteration()
        self.made = threading.Semaphore(0)
        self.go = threading.Event()
        self.go.set()

    def __next__(self):
        assert self.go.wait(60)
        if self.n == self.stop:
            raise self.fail
        self.n += 1
        self.made.release()
        return self.n - 1

    def get_state(self):
        return {"next": self.n}


def arrived(loader: Counting, n: int) -> bool:
    return all(loader.made.acquire(timeout=60) for _ in range(n))


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_reads_depth_batches_ahead_and_no_more(depth):
    loader = Counting()
    with DevicePrefetch(loader, lambda x: -x, depth) as batches:
        assert arrived(loader, depth)
        assert not loader.made.acquire(timeout=0.1)
        for i in range(4):
            assert next(batches) == (-i, {"next": i + 1})
            assert arrived(loader, 1)
            assert not loader.made.acquire(timeout=0.1)


def test_state_is_that_of_what_was_consumed():
    put = lambda batch: jax.tree.map(jax.device_put, batch)
    data = Digits(batch_size=8)
    with DevicePrefetch(data.loader(), put, 3) as batches:
        taken = [next(batches) for _ in range(5)]
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(taken[0][0]))
    resumed = data.loader()
    resumed.set_state(taken[2][1])
    for batch, state in taken[3:]:
        jax.tree.map(np.testing.assert_array_equal, next(resumed), batch)
        assert resumed.get_state() == state


def test_the_end_is_passed_on():
    batches = DevicePrefetch(Counting(stop=5), lambda x: x, 2)
    assert [x for x, _ in batches] == list(range(5))
    with pytest.raises(StopIteration):
        next(batches)
    batches.close()


@pytest.mark.parametrize(
    "error", [Refused("file: bad line"), KeyError("x"), MemoryError()]
)
@pytest.mark.parametrize("where", ["loader", "put"])
def test_exceptions_keep_their_type_and_their_turn(error, where):
    def put(x):
        if where == "put" and x == 3:
            raise error
        return x

    with DevicePrefetch(
        Counting(stop=3 if where == "loader" else 9, fail=error), put, 2
    ) as batches:
        assert [next(batches)[0] for _ in range(3)] == [0, 1, 2]
        for _ in range(2):  # and it stays so
            with pytest.raises(type(error)) as raised:
                next(batches)
            assert raised.value is error


def running() -> list[str]:
    return [
        thread.name
        for thread in threading.enumerate()
        if thread.name == "device-prefetch"
    ]


def test_leaving_early_ends_the_thread():
    loader = Counting()
    with DevicePrefetch(loader, lambda x: x) as batches:
        next(batches)
        assert running()
    assert not running()
    with pytest.raises(StopIteration):
        next(batches)
    batches.close()


def test_an_exception_in_the_consumer_ends_the_thread():
    with (
        pytest.raises(KeyboardInterrupt),
        DevicePrefetch(Counting(), lambda x: x) as batches,
    ):
        next(batches)
        raise KeyboardInterrupt
    assert not running()


def test_interrupt_while_waiting_for_a_slow_loader():
    loader = Counting()
    loader.go.clear()
    batches = DevicePrefetch(loader, lambda x: x)
    main = threading.main_thread().ident
    # a test runner in the background ignores it
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Timer(0.2, signal.pthread_kill, (main, signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            next(batches)
    finally:
        signal.signal(signal.SIGINT, before)
    loader.go.set()
    assert next(batches) == (0, {"next": 1})
    batches.close()
    assert not running()


def test_depth_is_checked():
    with pytest.raises(Refused, match="depth=0: expected at least 1"):
        DevicePrefetch(Counting(), lambda x: x, 0)
