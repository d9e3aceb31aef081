"""The profile: self times that add up, rates, layers, kinds, the timeline, and that it goes away."""

import io
import json
import sys
import threading
import time

import numpy as np
import pytest
from launch import NEEDS_GXX
from rich.console import Console
from stand_in import Array, Ranges, Stream, forget, stand_in

from nanocnn import tensor
from nanocnn.kernels import dispatch
from nanocnn.kernels.cuda import device
from nanocnn.kernels.dispatch import Primitive, anything, span
from nanocnn.kernels.elementwise import relu
from nanocnn.profile import OUTSIDE, Profile, merge_traces, profile
from nanocnn.tensor import Op, Tensor


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until `clock(seconds)` moves it: durations are exact."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def advance(seconds):
        now[0] += seconds

    return advance


@pytest.fixture
def kernels(clock):
    """Two primitives: `prof_outer` (20 ms of its own, 4 GFLOP in all) calls `prof_inner` (30 ms, 3 GFLOP, 6 GB)."""
    before = dict(dispatch.primitives)

    @Primitive
    def prof_inner(x):
        """the inner one"""
        clock(0.030)
        return x

    @Primitive
    def prof_outer(x):
        """the outer one"""
        clock(0.015)
        y = prof_inner(x)
        clock(0.005)
        return y

    prof_inner.work(lambda x: (3e9, 6e9))
    prof_outer.work(lambda x: (4e9, 0))
    yield prof_outer, prof_inner
    dispatch.primitives.clear()
    dispatch.primitives.update(before)


class Toy:
    """A model as the profile sees it: something with named_modules(), called as nn.Module calls."""

    def __init__(self, body=None, **children):
        self.body, self.children = body, children

    def named_modules(self, prefix=""):
        yield prefix, self
        for name, child in self.children.items():
            yield from child.named_modules(f"{prefix}.{name}".strip("."))

    def __call__(self, x):
        name = dispatch.recorder.layer(self)
        tensor._layers.append(name)
        with span(name, "layer"):
            for child in self.children.values():
                x = child(x)
            y = self.body(x) if self.body else x
        tensor._layers.pop()
        return y


def by_name(rows):
    return {r["name"]: r for r in rows}


x = np.zeros(3, np.float32)


def test_nested_primitives_count_by_self_time(clock, kernels):
    outer, inner = kernels
    with profile() as p:
        outer(x)
        inner(x)
        clock(0.020)
    rows = p.rows()
    assert rows["wall_ms"] == pytest.approx(100)
    assert [r["name"] for r in rows["kernels"]] == ["prof_inner", "prof_outer"]  # the slowest first
    got = by_name(rows["kernels"])
    assert got["prof_inner"]["calls"] == 2
    assert got["prof_inner"]["ms"] == pytest.approx(60)
    assert got["prof_outer"]["ms"] == pytest.approx(20)
    assert got["prof_outer"]["total_ms"] == pytest.approx(50)
    assert got["prof_inner"]["share"] + got["prof_outer"]["share"] == pytest.approx(0.8)
    assert all(r["variant"] == "reference" for r in rows["kernels"])


def test_rates_and_no_work_counted_twice(clock, kernels):
    outer, inner = kernels
    with profile() as p:
        outer(x)
        inner(x)
        clock(0.020)
    rows = p.rows()
    got = by_name(rows["kernels"])
    assert got["prof_inner"]["gflops_per_s"] == pytest.approx(3 / 0.030)
    assert got["prof_inner"]["gb_per_s"] == pytest.approx(6 / 0.030)
    assert got["prof_outer"]["gflops_per_s"] == pytest.approx(4 / 0.050)  # its work in its whole time
    assert rows["gflops_per_s"] == pytest.approx((4 + 3) / 0.100)  # the inner call's 3 are among the outer's 4


def test_a_primitive_without_work_takes_that_of_the_primitives_it_calls(clock, kernels):
    outer, _ = kernels
    outer.count_work = None
    with profile() as p:
        outer(x)
    assert p.rows()["gflops_per_s"] == pytest.approx(3 / 0.050)


def test_time_by_kind_adds_up_to_the_step(clock, kernels):
    outer, inner = kernels
    with profile() as p:
        with span("wait for the batch", "data"):
            clock(0.001)
        with span("features", "layer"):
            clock(0.002)
            with span("Conv2d", "forward"):
                clock(0.003)
                outer(x)
        with span("Conv2d", "backward", layer="features"):
            outer(x)
            with span("bucket 0", "communication"):
                clock(0.010)
        with span("SGD", "update"):
            inner(x)
        inner(x)
        clock(0.004)
    rows = p.rows()
    kinds = by_name(rows["kinds"])
    want = dict(forward=55, backward=50, communication=10, data=1, update=30, other=34)
    assert {name: kinds[name]["ms"] for name in want} == pytest.approx(want)
    assert sum(r["ms"] for r in rows["kinds"]) == pytest.approx(rows["wall_ms"])
    assert sum(r["share"] for r in rows["kinds"]) == pytest.approx(1)
    assert kinds["forward"]["gflops_per_s"] == pytest.approx(4 / 0.055)
    assert kinds["other"]["gflops_per_s"] == pytest.approx(3 / 0.034)


def test_a_new_kind_has_a_row_of_its_own(clock):
    with profile() as p, span("step 100", "checkpoint"):
        clock(0.5)
    assert [r["name"] for r in p.rows()["kinds"]][-2:] == ["checkpoint", "other"]
    assert by_name(p.rows()["kinds"])["checkpoint"]["share"] == pytest.approx(1)


def test_layers_forward_and_backward(clock, kernels):
    outer, inner = kernels

    class Slow(Op):
        def forward(self, a):
            return outer(a)

        def backward(self, gy):
            clock(0.001)
            return inner(gy)

    model = Toy(features=Toy(conv=Toy(Slow.apply), act=Toy(Slow.apply)), head=Toy(Slow.apply))
    with profile(model) as p:
        y = model(Tensor(np.ones(3, np.float32), requires_grad=True))
        Slow.apply(y).backward(np.ones(3, np.float32))
    rows = p.rows()
    layers = by_name(rows["layers"])
    assert list(layers) == ["features.conv", "features.act", "head", OUTSIDE]  # the containers spent nothing themselves
    for row in layers.values():
        assert row["forward_ms"] == pytest.approx(50)
        assert row["backward_ms"] == pytest.approx(31)
        assert row["gflops_per_s"] == pytest.approx((4 + 3) / 0.081)
    assert layers["head"]["calls"] == 1
    assert (layers["head"]["type"], layers[OUTSIDE]["type"]) == ("Toy", "")
    assert layers[OUTSIDE]["calls"] == 0
    assert sum(r["share"] for r in rows["layers"]) == pytest.approx(1)


def test_what_a_container_does_itself_is_its_own(clock, kernels):
    _, inner = kernels
    model = Toy(lambda a: inner(a), conv=Toy(lambda a: inner(inner(a))))
    with profile(model) as p:
        model(x)
    assert {r["name"]: round(r["forward_ms"]) for r in p.rows()["layers"]} == {"Toy": 30, "conv": 60}


def test_a_module_that_is_not_in_the_model_goes_by_its_class():
    p = Profile(Toy())
    with p:
        assert p.layer(Toy()) == "Toy"
        assert dispatch.recorder.layer(object()) == "object"


def test_entered_again_it_adds_up(clock, kernels):
    _, inner = kernels
    p = profile()
    for _ in range(3):
        with p:
            inner(x)
        clock(1.0)  # not recorded: the evaluation, say
    assert p.rows()["kernels"][0]["calls"] == 3
    assert p.rows()["wall_ms"] == pytest.approx(90)


def test_nothing_records_afterwards_and_an_error_inside_ends_it(kernels):
    _, inner = kernels
    with pytest.raises(ZeroDivisionError), profile() as p, span("Conv2d", "forward"):
        1 / 0  # noqa: B018
    assert dispatch.recorder is None
    inner(x)
    assert p.rows()["kernels"] == []
    with profile() as p:  # and the next one begins with no span open
        inner(x)
    assert by_name(p.rows()["kinds"])["forward"]["ms"] == 0


def test_a_kernel_that_raises_is_recorded_and_raises(clock, kernels):
    _, inner = kernels

    def burst(a):
        clock(0.030)
        raise ArithmeticError("no")

    inner.variants["reference"].body = burst
    with profile() as p, pytest.raises(ArithmeticError):
        inner(x)
    assert p.rows()["kernels"][0]["ms"] == pytest.approx(30)


def test_a_profile_inside_a_profile_is_an_error_and_the_outer_one_goes_on(kernels):
    _, inner = kernels
    with profile() as p:
        with pytest.raises(RuntimeError, match="records already"), profile():
            pass
        inner(x)
    assert p.rows()["kernels"][0]["calls"] == 1


def test_other_threads_are_in_the_timeline_only(tmp_path):
    def prefetch():
        with span("augment", "data"):
            time.sleep(0.02)

    with profile() as p, span("Conv2d", "forward"):
        worker = threading.Thread(target=prefetch, name="loader")
        worker.start()
        worker.join(10)
    assert by_name(p.rows()["kinds"])["data"]["ms"] == 0
    assert by_name(p.rows()["kinds"])["forward"]["ms"] >= 20
    events = json.loads(p.chrome_trace(tmp_path / "t.json").read_text())["traceEvents"]
    tracks = {e["args"]["name"]: e["tid"] for e in events if e["name"] == "thread_name"}
    assert tracks == {"main": 0, "loader": 1}
    assert [e["tid"] for e in events if e["name"] == "augment"] == [1]


def test_a_span_that_outlives_the_profile_does_no_harm():
    go, ended = threading.Event(), threading.Event()

    def prefetch():
        with span("augment", "data"):
            go.wait(10)
        ended.set()

    with profile() as p:
        worker = threading.Thread(target=prefetch)
        worker.start()
        while not p._stacks:
            time.sleep(0.001)
    go.set()
    worker.join(10)
    assert ended.is_set()  # the thread did not die of a recorder that was gone


def test_chrome_trace(tmp_path, clock, kernels):
    outer, _ = kernels
    with profile() as p:
        clock(0.010)
        with span("Conv2d", "backward", layer="features.0"):
            outer(x)
    path = p.chrome_trace(tmp_path / "new" / "trace.json", rank=3)
    trace = json.loads(path.read_text())
    assert trace["displayTimeUnit"] == "ms"
    assert trace["otherData"]["rank"] == 3
    assert {"name": "process_name", "ph": "M", "pid": 3, "tid": 0, "args": {"name": "rank 3"}} in trace["traceEvents"]
    spans = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert [e["name"] for e in spans] == ["Conv2d", "prof_outer=reference", "prof_inner=reference"]
    assert [e["cat"] for e in spans] == ["backward", "kernel", "kernel"]
    assert [(e["ts"], e["dur"]) for e in spans] == [
        (pytest.approx(10_000), pytest.approx(50_000)),
        (pytest.approx(10_000), pytest.approx(50_000)),
        (pytest.approx(25_000), pytest.approx(30_000)),
    ]
    assert all(e["pid"] == 3 and e["tid"] == 0 for e in spans)
    assert spans[0]["args"] == {"layer": "features.0"}
    facts = {"variant": "reference", "flops": 3e9, "bytes": 6e9, "GFLOP/s": 100, "GB/s": 200, "shapes": "float32[3]"}
    assert spans[2]["args"] == facts


def test_the_timeline_stops_growing_and_the_tables_do_not(monkeypatch, tmp_path, kernels):
    module = sys.modules[Profile.__module__]  # nanocnn.profile the name is the class, in nanocnn itself
    monkeypatch.setattr(module, "TRACE_LIMIT", 4)
    with profile() as p:
        for _ in range(10):
            kernels[1](x)
    trace = json.loads(p.chrome_trace(tmp_path / "t.json").read_text())
    assert sum(e["ph"] == "X" for e in trace["traceEvents"]) == 4
    assert trace["otherData"]["dropped_spans"] == 6
    assert p.rows()["kernels"][0]["calls"] == 10
    assert "6 later ones" in printed(p)


def printed(p, width=100):
    console = Console(width=width, file=io.StringIO())
    p.print(console)
    return console.file.getvalue()


def test_merge_traces_on_one_clock(tmp_path, clock, kernels):
    paths = []
    for rank in (1, 0):
        with profile() as p:
            kernels[1](x)
        p._first_unix = 1000.0 + rank * 0.5
        paths.append(p.chrome_trace(tmp_path / f"{rank}.json", rank=rank))
    merged = json.loads(merge_traces(paths, tmp_path / "all.json").read_text())
    spans = [e for e in merged["traceEvents"] if e["ph"] == "X"]
    assert [(e["pid"], e["ts"]) for e in spans] == [(0, 0), (1, pytest.approx(500_000))]
    assert merged["otherData"]["ranks"] == [0, 1]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"traceEvents": []}', '{"traceEvents": [], "otherData": {"rank": "x"}}']
)
def test_merge_traces_refuses_what_is_no_trace(tmp_path, text):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"bad\.json is not a trace"):
        merge_traces([path], tmp_path / "all.json")


def test_merge_traces_refuses_two_of_a_rank_and_none(tmp_path):
    with profile() as p:
        pass
    one, two = p.chrome_trace(tmp_path / "1.json"), p.chrome_trace(tmp_path / "2.json")
    with pytest.raises(ValueError, match="both of rank 0"):
        merge_traces([one, two], tmp_path / "all.json")
    with pytest.raises(ValueError, match="no trace"):
        merge_traces([], tmp_path / "all.json")


def test_the_tables_name_the_variant_and_the_shares(clock, kernels):
    with profile(Toy()) as p:
        with span("stem", "layer"):
            kernels[0](x)
        clock(0.050)
    text = printed(p)
    assert "prof_outer=reference" in text
    assert "30.0%" in text  # prof_inner, 30 of 100 ms
    assert "outside the primitives" in text
    assert "stem" in text
    assert "communication" in text
    assert max(map(len, text.splitlines())) <= 100


def test_an_empty_profile_has_tables_too():
    with profile() as p:
        pass
    assert p.rows()["kernels"] == []
    assert "wall time" in printed(p)


def test_paused_records_nothing(kernels):
    with profile() as p:
        with dispatch.paused():
            kernels[0](x)
        kernels[1](x)
    assert [r["name"] for r in p.rows()["kernels"]] == ["prof_inner"]


def test_rows_are_json(kernels):
    with profile() as p:
        kernels[0](x)
    assert json.loads(json.dumps(p.rows())) == p.rows()


# ---------------------------------------------------------------- on a device


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    cupy = stand_in(monkeypatch, tmp_path)
    cupy.stream = Stream()
    cupy.cuda.Event, cupy.cuda.get_elapsed_time = cupy.stream.event, cupy.stream.elapsed
    cupy.cuda.get_current_stream = lambda: cupy.stream
    cupy.cuda.nvtx = Ranges()
    yield cupy
    forget()


def test_kernels_are_timed_by_events_and_nobody_waits_inside(gpu, kernels, clock):
    device.check()
    outer, inner = kernels
    stream = gpu.stream

    def inner_on_the_gpu(x):
        clock(0.001)  # of the host, to launch it
        stream.milliseconds += 7.0
        return x

    def outer_on_the_gpu(x):
        stream.milliseconds += 4.0
        y = inner(inner(x))
        stream.milliseconds += 1.0
        return y

    outer.variant("cuda", device="cuda", supports=anything)(outer_on_the_gpu)
    inner.variant("cuda", device="cuda", supports=anything)(inner_on_the_gpu)
    p = Profile()
    with p:
        for _ in range(3):
            with span("conv1", "layer"):
                outer(Array((4,)))
                stream.milliseconds += 2.0  # between layers
        assert stream.waited == 0
    assert stream.waited == 1
    rows = p.rows()
    found = {(r["name"], r["variant"]): r for r in rows["kernels"]}
    inner_row, outer_row = found["prof_inner", "cuda"], found["prof_outer", "cuda"]
    assert inner_row["device_ms"] == pytest.approx(42.0)
    assert inner_row["ms"] == pytest.approx(6.0)
    assert outer_row["device_ms"] == pytest.approx(15.0)  # without the inner ones
    assert outer_row["gflops_per_s"] == pytest.approx(12 / 0.057)  # with them; by the GPU's time
    assert [r["device_ms"] for r in rows["kinds"] if r["name"] == "forward"] == pytest.approx([57.0])
    assert [(r["name"], r["device_ms"]) for r in rows["layers"]] == [("conv1", pytest.approx(57.0))]
    assert rows["memory"] == dict(peak=60 * 10**9, pool=70 * 10**9, total=80 * 10**9)
    console = Console(file=io.StringIO(), width=120)
    p.print(console)
    text = console.file.getvalue()
    assert "GPU ms" in text
    assert "60.00 GB in arrays at most; the pool took 70.00 GB of 80.00 GB (14.3% in gaps)" in text
    assert gpu.cuda.nvtx.seen[:3] == ["conv1", "conv1/prof_outer", "conv1/prof_outer/prof_inner"]
    assert not gpu.cuda.nvtx.open


def test_a_long_profile_reads_events_on_the_way_and_uses_them_again(gpu, kernels, monkeypatch):
    monkeypatch.setattr("nanocnn.profile_on_device.KEPT", 8)
    made = []
    gpu.cuda.Event = lambda: made.append(gpu.stream.event()) or made[-1]
    device.check()
    p = Profile()
    with p:
        for _ in range(50):
            kernels[1](Array((4,)))
            gpu.stream.milliseconds += 1.0
            gpu.stream.reached = gpu.stream.milliseconds - 3.0  # the GPU is 3 ms behind
        assert gpu.stream.waited == 0
    assert len(made) < 30
    assert sum(r["calls"] for r in p.rows()["kernels"]) == 50


@NEEDS_GXX
def test_the_emulators_time_is_called_so():
    forget()  # a GPU that an earlier test may have used
    x = dispatch.to_device(np.ones((4, 4), np.float32), "emulated")
    with Profile() as p:
        relu(x)
    console = Console(file=io.StringIO(), width=200)
    p.print(console)
    assert "the emulator's, on the CPU" in console.file.getvalue()
    assert "GPU ms" not in console.file.getvalue()
    assert p.rows()["memory"] is None
