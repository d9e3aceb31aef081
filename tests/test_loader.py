"""nanocnn/data/loader.py: what ranks share, what a resumed run sees, and a thread that never stays behind."""

import sys
import threading
import time
import traceback

import numpy as np
import pytest

from nanocnn.data import Augment, DataError, Loader, Split
from nanocnn.kernels import dispatch
from nanocnn.kernels.dispatch import ChoiceError, using


def make_split(n=50):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)
    return Split(images, rng.integers(0, 4, n), tuple("abcd"), np.full(3, 0.5), np.full(3, 0.25), "some images")


@pytest.fixture(autouse=True)
def _no_thread_stays_behind():
    yield
    deadline = time.monotonic() + 5
    while any(t.name == "nanocnn prefetch" for t in threading.enumerate()):
        assert time.monotonic() < deadline, "the background thread is still alive"
        time.sleep(0.01)


def assert_same_batches(some, others):
    for a, b in zip(some, others, strict=True):
        for field in ("x", "y", "index", "global_size", "epoch", "step"):
            np.testing.assert_array_equal(getattr(a, field), getattr(b, field))


def test_a_batch():
    split = make_split()
    batch = next(iter(Loader(split, 16).epoch(0)))
    assert batch.x.shape == (16, 8, 8, 3)
    assert batch.x.dtype == np.float32
    assert batch.x.flags.c_contiguous
    assert batch.y.dtype == batch.index.dtype == np.int64
    assert batch.global_size == 16
    np.testing.assert_array_equal(batch.y, split.labels[batch.index])
    assert next(iter(Loader(split, 16, dtype=np.float64).epoch(0))).x.dtype == np.float64


@pytest.mark.parametrize("size", [2, 3, 4, 7])
@pytest.mark.parametrize("shuffle", [True, False])
def test_ranks_together_see_what_one_rank_sees(size, shuffle):
    split, options = make_split(), dict(augment=Augment(2, cutout=3), seed=5, shuffle=shuffle)
    alone = Loader(split, 16, **options)
    loaders = [Loader(split, 16, rank=rank, size=size, **options) for rank in range(size)]
    assert {len(loader) for loader in loaders} == {len(alone)}
    for whole, *pieces in zip(alone.epoch(3), *(loader.epoch(3) for loader in loaders), strict=True):
        for field in ("x", "y", "index"):
            together = np.concatenate([getattr(piece, field) for piece in pieces])
            np.testing.assert_array_equal(getattr(whole, field), together)
        lengths = [len(piece.y) for piece in pieces]
        assert max(lengths) - min(lengths) <= 1
        assert {piece.global_size for piece in pieces} == {whole.global_size}


def test_training_drops_the_last_batch_and_evaluation_keeps_it():
    split = make_split(50)
    training = [batch.index for batch in Loader(split, 16).epoch(0)]
    assert [len(index) for index in training] == [16, 16, 16]
    assert len(np.unique(np.concatenate(training))) == 48
    evaluation = Loader(split, 16, shuffle=False)
    assert len(evaluation) == 4
    indices = np.concatenate([batch.index for batch in evaluation.epoch(0)])
    np.testing.assert_array_equal(indices, np.arange(50))
    assert [len(b.y) for b in Loader(split, 16, drop_last=False).epoch(0)] == [16, 16, 16, 2]
    assert len(Loader(split, 100, shuffle=False)) == 1


def test_a_piece_of_the_last_batch_may_be_empty():
    sizes = [[len(b.y) for b in Loader(make_split(9), 4, shuffle=False, rank=r, size=4).epoch(0)] for r in range(4)]
    assert [sum(column) for column in zip(*sizes, strict=True)] == [4, 4, 1]
    assert [0] in [s[2:] for s in sizes]


def test_the_order_is_drawn_from_seed_and_epoch():
    orders = [Loader(make_split(), 10, seed=seed).order(epoch) for seed in (0, 1, -1, 2**40) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 8
    np.testing.assert_array_equal(orders[0], Loader(make_split(), 25, seed=0, rank=1, size=2).order(0))


@pytest.mark.parametrize("prefetch", [0, 2])
def test_starting_in_the_middle_of_an_epoch(prefetch):
    loader = Loader(make_split(), 8, augment=Augment(3), prefetch=prefetch)
    whole = list(loader.epoch(4))
    assert len(whole) == len(loader) == 6
    for start in (1, 5, 6):
        assert_same_batches(whole[start:], list(loader.epoch(4, start=start)))


def test_prefetch_changes_nothing_but_time():
    split = make_split()
    plain = list(Loader(split, 8, augment=Augment(2), prefetch=0).epoch(1))
    for depth in (1, 2, 10):
        assert_same_batches(plain, list(Loader(split, 8, augment=Augment(2), prefetch=depth).epoch(1)))
    with using(prefetch="off"):
        assert_same_batches(plain, list(Loader(split, 8, augment=Augment(2)).epoch(1)))
    with (
        pytest.raises(ChoiceError, match="prefetch has no choice 'maybe'; there are: on, off"),
        using(prefetch="maybe"),
    ):
        pass


def threads_during(loader):
    batches = loader.epoch(0)
    next(batches)
    return [t.name for t in threading.enumerate() if t.name == "nanocnn prefetch"]


def test_the_switch_decides_whether_there_is_a_thread():
    assert threads_during(Loader(make_split(), 8)) == ["nanocnn prefetch"]
    assert threads_during(Loader(make_split(), 8, prefetch=0)) == []
    with using(prefetch="off"):
        assert threads_during(Loader(make_split(), 8)) == []


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_an_epoch_that_is_given_up(taken):
    """The fixture sees to it that the thread ends."""
    start = time.monotonic()
    batches = Loader(make_split(), 2).epoch(0)
    for _ in range(taken):
        next(batches)
    batches.close()
    assert time.monotonic() - start < 5


def test_a_consumer_that_raises():
    def consume(batches):
        for _ in batches:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        consume(Loader(make_split(), 2).epoch(0))


class Broken(Loader):
    def _batch(self, order, epoch, step):
        if step == 2:
            raise OSError("the disk went away")
        return super()._batch(order, epoch, step)


@pytest.mark.parametrize("prefetch", [0, 1, 5])
def test_an_error_in_the_thread_arrives_with_its_traceback(prefetch):
    seen = []
    with pytest.raises(OSError, match="the disk went away") as caught:
        seen.extend(map(id, Broken(make_split(), 8, prefetch=prefetch).epoch(0)))
    assert len(seen) == 2  # what was good came first
    text = "".join(traceback.format_exception(caught.value))
    assert "_batch" in text
    assert ("in the thread that loads batches ahead" in text) == (prefetch > 0)


def test_the_thread_runs_ahead_by_no_more_than_it_may():
    made = []

    class Counting(Loader):
        def _batch(self, order, epoch, step):
            made.append(step)
            return super()._batch(order, epoch, step)

    batches = Counting(make_split(), 2, prefetch=3).epoch(0)
    next(batches)
    time.sleep(0.2)
    assert made == [0, 1, 2, 3]  # one taken, three ready
    next(batches)
    time.sleep(0.2)
    assert made == [0, 1, 2, 3, 4]
    batches.close()


class Recorder(dispatch.Recorder):
    def __init__(self):
        self.spans, self.threads = [], set()

    def enter(self, name, kind):
        self.spans.append((name, kind))
        self.threads.add(threading.current_thread())

    def leave(self, start, stop, **facts):
        assert stop >= start


def test_without_prefetch_the_training_thread_loads(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(dispatch, "recorder", recorder)
    assert len(list(Loader(make_split(), 10, augment=Augment(1), prefetch=0).epoch(0))) == 5
    assert set(recorder.spans) == {("load", "data")}
    assert recorder.threads == {threading.main_thread()}


def test_with_prefetch_it_waits_and_another_thread_loads(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(dispatch, "recorder", recorder)
    assert len(list(Loader(make_split(), 10, augment=Augment(1), prefetch=2).epoch(0))) == 5
    assert set(recorder.spans) == {("load", "data"), ("wait for data", "data")}
    assert len(recorder.threads) == 2


def test_many_epochs_with_a_hurried_interpreter():
    """Threads that switch every few microseconds: no batch is lost, none comes twice, nothing waits for ever."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        loader = Loader(make_split(), 5, prefetch=1)
        for epoch in range(30):
            index = np.concatenate([batch.index for batch in loader.epoch(epoch)])
            np.testing.assert_array_equal(index, loader.order(epoch))
    finally:
        sys.setswitchinterval(before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(batch_size=51), "some images: a batch of 51 is larger than the 50 images; lower --batch-size to 50"),
        (dict(batch_size=64, rank=0, size=60), "some images: 50 images for 60 ranks; run fewer ranks"),
        (dict(batch_size=64, rank=0, size=60, shuffle=False), "50 images for 60 ranks"),
        (dict(batch_size=3, rank=0, size=4), "a global batch of 3 for 4 ranks"),
        (dict(batch_size=0), "a global batch of 0 for 1 ranks"),
        (dict(batch_size=8, rank=2, size=2), "rank 2 of 2: expected 0 to 1"),
        (dict(batch_size=8, dtype=np.uint8), "dtype uint8, expected a floating-point one"),
        (dict(batch_size=8, augment=Augment(8)), "pad 8 and cutout 0 do not fit images of 8 x 8 pixels"),
    ],
)
def test_what_cannot_be_loaded(options, message):
    with pytest.raises(DataError, match=message):
        Loader(make_split(), **options)


def test_no_images_at_all():
    with pytest.raises(DataError, match="0 images for 1 ranks"):
        Loader(make_split(0), 8, shuffle=False)


@pytest.mark.parametrize("start", [-1, 7])
def test_a_start_beyond_the_epoch(start):
    with pytest.raises(DataError, match=f"cannot start at step {start}, an epoch has 6"):
        Loader(make_split(), 8).epoch(0, start=start)
