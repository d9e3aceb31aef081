"""What ran, how often, how long and how fast: tables for the terminal, a timeline for Perfetto.

    with nc.profile(model) as p:
        train_step(...)
    p.print()
    p.chrome_trace("trace.json")            # open it at https://ui.perfetto.dev

Spans nest: a layer runs ops, an op calls kernels, a kernel may call others. Every figure here is *self time*, the span
without the spans inside it, so that nothing is counted twice and the shares of a table add up to the whole. While no
profile records, a kernel call pays for one `is None` and nothing else.

On a GPU the host's time is that of launching; what the GPU took itself is measured there, by events around each
primitive (profile_on_device.py), and Nsight Systems sees layers, ops and primitives as NVTX ranges.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.table import Table

from .kernels import dispatch
from .kernels.cuda import device_memory
from .profile_on_device import EventClock, ranges

KINDS = ("forward", "backward", "communication", "data", "update")  # in this order; others follow as they come
OUTSIDE = "(outside the layers)"
TRACE_LIMIT = 300_000  # spans kept for the timeline, about 100 MB; the tables go on counting after that


@dataclass(slots=True)
class _Frame:
    """A span that has begun and not ended."""

    name: str
    kind: str
    phase: str  # what the time is spent on: the kind, or for a kernel that of the span around it
    layer: str
    in_kernel: bool  # is a kernel around it? then its flops are the outer kernel's already
    inside: float = 0.0  # seconds in the spans within
    inside_spans: float = 0.0  # the same without kernels, which count for the layer that called them
    flops: float = 0.0  # of the kernels within


@dataclass(slots=True)
class _Sum:
    """What is added up for one row of a table. Seconds, operations, bytes."""

    calls: int = 0
    self_s: float = 0.0
    total_s: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0
    device_self_s: float = 0.0  # by the GPU's clock
    device_total_s: float = 0.0


class Profile(dispatch.Recorder):
    """Records every kernel, op, layer and span of the thread that enters it; other threads appear in the timeline only.

    `model`, anything with `named_modules()`, gives the layers their names; without it they go by their class. One
    profile may be entered several times, one after the other, and then adds up. Raises RuntimeError inside another.
    """

    def __init__(self, model: Any = None):
        self._model = model
        self._names: dict[int, str] = {}
        self._types: dict[str, str] = {}  # name -> class
        self._kernels: dict[tuple[str, str], _Sum] = {}
        self._forward: dict[str, _Sum] = {}
        self._backward: dict[str, _Sum] = {}
        self._phases: dict[str, _Sum] = {}
        self._flops = 0.0
        self._events: list[tuple[str, str, float, float, int, dict[str, Any]]] = []
        self._dropped = 0
        self._wall = 0.0
        self._began: float | None = None
        self._first = 0.0  # the timeline's zero on perf_counter's clock, and on the calendar's, which all hosts share
        self._first_unix = 0.0
        self._thread = 0
        self._stacks: dict[int, list[_Frame]] = {}
        self._thread_names: dict[int, str] = {}
        self._devices: set[str] = set()  # of the primitives
        self._clock = EventClock()
        self._op_layer = ""  # of the op whose backward runs
        self._nvtx: Any = None
        self._watching = contextlib.ExitStack()
        self._peak: Any = None
        self._memory: dict[str, int] | None = None

    def __enter__(self) -> Profile:
        if dispatch.recorder is not None:
            raise RuntimeError("a profile records already: end it before you begin another")
        if self._model is not None:
            modules = list(self._model.named_modules())
            self._names = {id(m): name or type(m).__name__ for name, m in modules}
            self._types = {self._names[id(m)]: type(m).__name__ for _, m in modules}
        self._thread = threading.get_ident()
        self._stacks = {}
        self._nvtx, self._peak = ranges(), self._watching.enter_context(device_memory.watched())
        self._began = time.perf_counter()
        if not self._first_unix:
            self._first, self._first_unix = self._began, time.time()
        dispatch.recorder = self
        return self

    def __exit__(self, *error: object) -> None:
        dispatch.recorder = None
        self._clock.finish()
        self._wall, self._began = self.seconds, None
        self._watching.close()
        held = device_memory.held()
        if held and self._peak:
            most = max(self._peak.most, (self._memory or {}).get("peak", 0))
            self._memory = dict(peak=most, pool=held["pool"], total=held["total"])

    @property
    def seconds(self) -> float:
        """Wall time recorded so far."""
        return self._wall + (time.perf_counter() - self._began if self._began is not None else 0.0)

    # ---------------------------------------------------------------- what kernels.dispatch and nn.Module call

    def layer(self, module: Any) -> str:
        """The dotted name of a module, or its class where the profile was given no model that holds it."""
        return self._names.get(id(module)) or type(module).__name__

    def enter(self, name: str, kind: str) -> None:
        thread = threading.get_ident()
        stack = self._stacks.get(thread)
        if stack is None:
            stack = self._stacks[thread] = []
            self._thread_names[thread] = threading.current_thread().name
        outer = stack[-1] if stack else None
        phase = {"layer": "forward", "kernel": outer.phase if outer else "other"}.get(kind, kind)
        layer = name if kind == "layer" else outer.layer if outer else ""
        in_kernel = outer is not None and (outer.kind == "kernel" or outer.in_kernel)
        if self._nvtx:
            self._nvtx.RangePush(name)
        stack.append(_Frame(name, kind, phase, layer, in_kernel))

    def leave(self, start: float, stop: float, **facts: Any) -> None:
        thread = threading.get_ident()
        stack = self._stacks.get(thread)
        if not stack:  # a span that began before this profile did
            return
        frame = stack.pop()
        if self._nvtx:
            self._nvtx.RangePop()
        outer = stack[-1] if stack else None
        seconds = stop - start
        if outer:
            outer.inside += seconds
            outer.inside_spans += frame.inside_spans if frame.kind == "kernel" else seconds
        if len(self._events) < TRACE_LIMIT:
            self._events.append((frame.name, frame.kind, start, stop, thread, facts))
        else:
            self._dropped += 1

        flops = 0.0
        if frame.kind == "kernel":
            flops = facts.get("flops") or frame.flops  # an outer kernel's count holds those of the kernels it calls
            if outer and (outer.kind == "kernel" or not frame.in_kernel):
                outer.flops += flops
        if thread != self._thread:
            return  # it runs beside the step: its time is no part of the wall time shared out here

        self_s = seconds - frame.inside
        work = flops if not frame.in_kernel else 0.0
        self._flops += work
        _add(self._phases, frame.phase, self_s, seconds, work)
        if frame.kind == "kernel":
            _add(self._kernels, (frame.name, facts.get("variant", "")), self_s, seconds, flops, facts.get("bytes", 0))
        elif frame.phase in ("forward", "backward"):
            table = self._forward if frame.phase == "forward" else self._backward
            own = seconds - frame.inside_spans
            layer = facts.get("layer") or frame.layer or OUTSIDE
            _add(table, layer, own, own, frame.flops, calls=int(frame.kind == "layer"))  # of the layer, not of its ops

    def op(self, op: Any, kind: str, function: Any, args: tuple, kwargs: dict) -> Any:
        """As every recorder does; kernels of a backward pass are told whose they are."""
        before, self._op_layer = self._op_layer, op.layer if kind == "backward" else ""
        try:
            return super().op(op, kind, function, args, kwargs)
        finally:
            self._op_layer = before

    def kernel(self, primitive: Any, variant: Any, args: tuple, kwargs: dict) -> Any:
        """As every recorder does; on a GPU, between two events."""
        device = dispatch.device_of_call(args, kwargs)
        if threading.get_ident() == self._thread:
            self._devices.add(device)
        if device != "cuda" or threading.get_ident() != self._thread:
            return super().kernel(primitive, variant, args, kwargs)
        outer = self._stacks[self._thread][-1] if self._stacks.get(self._thread) else None
        phase, layer = (outer.phase, outer.layer or self._op_layer or OUTSIDE) if outer else ("other", OUTSIDE)

        def tell(self_s: float, total_s: float) -> None:
            table = {"forward": self._forward, "backward": self._backward}.get(phase)
            sums = [self._kernels.get((primitive.name, variant.name)), self._phases.get(phase)]
            sums.append(table.setdefault(layer, _Sum()) if table is not None else None)
            for found in filter(None, sums):
                found.device_self_s += self_s
                found.device_total_s += total_s

        self._clock.start()
        try:
            return super().kernel(primitive, variant, args, kwargs)
        finally:
            self._clock.stop(tell)

    # ---------------------------------------------------------------- what came of it

    def rows(self) -> dict[str, Any]:
        """The tables as plain data: `wall_ms`, `gflops_per_s` and lists of dicts `kernels`, `layers`, `kinds`.

        Times are self times in ms; `total_ms` holds the nested kernels too, and the rates are work / `total_ms`.
        `share` is of the wall time. The last of `kinds`, `other`, is what no span of a kind has covered.

        `device_ms` is a GPU's own time, 0 where none ran; rates and shares of primitives are of it where there is one.
        `memory`: a GPU's, in bytes, or None: `peak` of what arrays took at once, `pool`, what CuPy took for that, and
        `total`. What the pool holds beyond the peak is lost to fragmentation.
        """
        wall = self.seconds
        kernels: list[dict[str, Any]] = [
            dict(name=name, variant=variant, calls=s.calls, ms=s.self_s * 1e3, total_ms=s.total_s * 1e3)
            | dict(device_ms=s.device_self_s * 1e3)
            | dict(gflops_per_s=_rate(s.flops, s.device_total_s or s.total_s))
            | dict(gb_per_s=_rate(s.bytes, s.device_total_s or s.total_s))
            | dict(share=_share(s.device_self_s or s.self_s, wall))
            for (name, variant), s in self._kernels.items()
        ]
        kernels.sort(key=lambda row: -(row["device_ms"] or row["ms"]))
        layers = []
        for name in dict.fromkeys([*self._names.values(), *self._forward, *self._backward]):
            f, b = self._forward.get(name, _Sum()), self._backward.get(name, _Sum())
            if f.total_s or b.total_s:
                seconds = f.self_s + b.self_s
                layers.append(
                    dict(name=name, type=self._types.get(name, ""), calls=f.calls)
                    | dict(forward_ms=f.self_s * 1e3, backward_ms=b.self_s * 1e3)
                    | dict(device_ms=(f.device_self_s + b.device_self_s) * 1e3)
                    | dict(gflops_per_s=_rate(f.flops + b.flops, seconds), share=_share(seconds, wall))
                )
        kinds: list[dict[str, Any]] = []
        ordered = dict.fromkeys([*KINDS, *(k for k in self._phases if k != "other")])
        for kind in ordered:
            s = self._phases.get(kind, _Sum())
            rate = _rate(s.flops, s.self_s)
            kinds.append(dict(name=kind, ms=s.self_s * 1e3, device_ms=s.device_self_s * 1e3, gflops_per_s=rate))
        rest = wall - sum(self._phases[k].self_s for k in ordered if k in self._phases)
        other = self._phases.get("other", _Sum())  # primitives called outside every span
        rate = _rate(other.flops, rest)
        kinds.append(dict(name="other", ms=rest * 1e3, device_ms=other.device_self_s * 1e3, gflops_per_s=rate))
        for row in kinds:
            row["share"] = _share(row["ms"] / 1e3, wall)
        rate = _rate(self._flops, wall)
        tables = dict(kernels=kernels, layers=layers, kinds=kinds)
        return dict(wall_ms=wall * 1e3, gflops_per_s=rate, **tables, memory=self._memory)

    def table(self) -> Group:
        """Rich tables: by primitive and variant, by layer (if any ran), by kind."""
        rows = self.rows()
        wall = rows["wall_ms"]
        gpu = ["GPU ms"] if "cuda" in self._devices else []  # a column of its own, where there is one

        def on_gpu(milliseconds: float) -> list[str]:
            return [_number(milliseconds)] if gpu else []

        kernels = _table(
            "By primitive and variant", "primitive=variant", "calls", "ms", *gpu, "GFLOP/s", "GB/s", "share"
        )
        kernels.caption = "ms: without the primitives called inside; rates: with them" + self._whose_time()
        for r in rows["kernels"]:
            name = f"{r['name']}={r['variant']}" if r["variant"] else r["name"]
            rates = _number(r["gflops_per_s"]), _number(r["gb_per_s"])
            times = _number(r["ms"]), *on_gpu(r["device_ms"])
            kernels.add_row(name, str(r["calls"]), *times, *rates, _percent(r["share"]))
        in_kernels, on_device = (sum(r[key] for r in rows["kernels"]) for key in ("ms", "device_ms"))
        rest = _percent(_share(wall - (on_device or in_kernels), wall))
        times = _number(wall - in_kernels), *on_gpu(wall - on_device)
        kernels.add_row("outside the primitives", "", *times, "", "", rest, style="dim")
        kernels.add_section()
        times = _number(wall), *on_gpu(wall)
        kernels.add_row("wall time", "", *times, _number(rows["gflops_per_s"]), "", _percent(1.0))

        layers = _table("By layer", "layer", "type", "calls", "forward ms", "backward ms", *gpu, "GFLOP/s", "share")
        for r in rows["layers"]:
            times = _number(r["forward_ms"]), _number(r["backward_ms"]), *on_gpu(r["device_ms"])
            calls = str(r["calls"]) if r["calls"] else ""
            layers.add_row(r["name"], r["type"], calls, *times, _number(r["gflops_per_s"]), _percent(r["share"]))

        kinds = _table("By kind", "kind", "ms", *gpu, "GFLOP/s", "share")
        for r in rows["kinds"]:
            times = _number(r["ms"]), *on_gpu(r["device_ms"])
            kinds.add_row(r["name"], *times, _number(r["gflops_per_s"]), _percent(r["share"]))
        kinds.add_section()
        kinds.add_row("wall time", _number(wall), *on_gpu(wall), _number(rows["gflops_per_s"]), _percent(1.0))
        notes = []
        if self._memory:
            peak, pool, total = (device_memory.gigabytes(self._memory[name]) for name in ("peak", "pool", "total"))
            lost = _percent(1 - self._memory["peak"] / max(1, self._memory["pool"]))
            notes.append(f"GPU memory: {peak} in arrays at most; the pool took {pool} of {total} ({lost} in gaps).")
        if self._dropped:
            notes.append(
                f"The timeline keeps the first {TRACE_LIMIT:,} spans; {self._dropped:,} later ones only count here."
            )
        return Group(kernels, *([layers] if layers.rows else []), kinds, *notes)

    def _whose_time(self) -> str:
        """What the clock says of, where that is not the CPU's work."""
        if "cuda" in self._devices:
            return "; ms is the host's, which launches; GPU ms is by events, on the device"
        return "; ms is the emulator's, on the CPU: it says nothing of a GPU" if "emulated" in self._devices else ""

    def print(self, console: Console | None = None) -> None:
        """Print `table()`; 100 columns wide where the output is no terminal."""
        console = console or Console()
        if not console.is_terminal:
            console.width = 100
        console.print(self.table())

    def chrome_trace(self, path: str | Path, rank: int = 0) -> Path:
        """Write the timeline as Chrome trace JSON, which https://ui.perfetto.dev and chrome://tracing open.

        The process is `rank`; a thread is a track. `merge_traces()` joins the files of several ranks.
        """
        threads = {t: i for i, t in enumerate(dict.fromkeys([self._thread, *self._thread_names]))}
        events = [_metadata("process_name", rank, 0, name=f"rank {rank}")]
        events.append(_metadata("process_sort_index", rank, 0, sort_index=rank))
        for thread, tid in threads.items():
            name = self._thread_names.get(thread, "main")
            events.append(_metadata("thread_name", rank, tid, name="main" if tid == 0 else name))
        spans: list[dict[str, Any]] = []
        for name, kind, start, stop, thread, facts in reversed(self._events):  # kept as they ended: the outer one last
            variant = facts.get("variant")
            args: dict[str, Any] = {k: v for k, v in facts.items() if v not in (None, "", 0)}
            for work, label in (("flops", "GFLOP/s"), ("bytes", "GB/s")):
                if facts.get(work):
                    args[label] = round(_rate(facts[work], stop - start), 3)
            label = f"{name}={variant}" if variant else name
            ts, dur = round((start - self._first) * 1e6, 3), round((stop - start) * 1e6, 3)
            spans.append(dict(name=label, cat=kind, ph="X", ts=ts, dur=dur, pid=rank, tid=threads[thread], args=args))
        spans.sort(key=lambda e: (e["ts"], -e["dur"]))
        about = dict(rank=rank, start_unix=self._first_unix, wall_ms=self.seconds * 1e3, dropped_spans=self._dropped)
        return _write_trace(path, events + spans, about)


profile = Profile


def merge_traces(paths: Iterable[str | Path], path: str | Path) -> Path:
    """Join the ranks' timelines into one file, each shifted by the moment at which its rank began.

    Ranks on one host share a clock; between hosts the shift is as good as their clocks agree. Raises ValueError on a
    file that is no trace of ours and on two files of the same rank.
    """
    parts = []
    seen: dict[int, str | Path] = {}
    for part in paths:
        try:
            trace = json.loads(Path(part).read_text())
            events, about = trace["traceEvents"], trace["otherData"]
            rank, start = int(about["rank"]), float(about["start_unix"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{part} is not a trace that chrome_trace() wrote ({type(error).__name__}: {error})"
            ) from error
        if rank in seen:
            raise ValueError(f"{seen[rank]} and {part} are both of rank {rank}: give chrome_trace() the rank")
        seen[rank] = part
        parts.append((rank, start, events, about))
    if not parts:
        raise ValueError("merge_traces() was given no trace")
    first = min(start for _, start, _, _ in parts)
    merged = []
    for _, start, events, _ in sorted(parts, key=lambda p: p[0]):
        shift = (start - first) * 1e6
        merged += [{**e, "ts": round(e["ts"] + shift, 3)} if "ts" in e else e for e in events]
    dropped = sum(about["dropped_spans"] for *_, about in parts)
    return _write_trace(path, merged, dict(ranks=sorted(seen), start_unix=first, dropped_spans=dropped))


def _write_trace(path: str | Path, events: list[dict], about: dict[str, Any]) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps(dict(traceEvents=events, displayTimeUnit="ms", otherData=about), separators=(",", ":"), default=str)
    )
    return path


def _metadata(about: str, pid: int, tid: int, **args: Any) -> dict[str, Any]:
    return dict(name=about, ph="M", pid=pid, tid=tid, args=args)


def _add(
    table: dict[Any, _Sum], key: Any, self_s: float, total_s: float, flops: float, moved: float = 0, calls: int = 1
) -> None:
    row = table.get(key)
    if row is None:
        row = table[key] = _Sum()
    row.calls += calls
    row.self_s += self_s
    row.total_s += total_s
    row.flops += flops
    row.bytes += moved


def _rate(work: float, seconds: float) -> float:
    """Work per second in units of 10^9; 0 where there was none."""
    return work / seconds / 1e9 if work and seconds > 0 else 0.0


def _share(seconds: float, wall: float) -> float:
    return seconds / wall if wall > 0 else 0.0


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", caption_justify="left")
    table.add_column(first, overflow="fold")
    for column in columns:
        table.add_column(column, justify="left" if column == "type" else "right", no_wrap=True)
    return table


def _number(value: float) -> str:
    if not value:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _percent(share: float) -> str:
    return f"{share:.1%}"
