"""Joules from counters that run over, and a reason where there are none."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "experiments"))

from energy import Meter


def package(folder, name, energy, most=1_000_000):
    path = folder / name
    path.mkdir(exist_ok=True)
    (path / "energy_uj").write_text(f"{energy}\n")
    (path / "max_energy_range_uj").write_text(f"{most}\n")


def test_packages_are_added_up_and_their_parts_are_not(tmp_path):
    package(tmp_path, "intel-rapl:0", 100)
    package(tmp_path, "intel-rapl:1", 900_000)
    package(tmp_path, "intel-rapl:0:0", 5)
    meter = Meter(gpu=False, powercap=tmp_path)
    assert meter.why == {}
    package(tmp_path, "intel-rapl:0", 500_100)
    package(tmp_path, "intel-rapl:1", 150_000)  # it has run over
    package(tmp_path, "intel-rapl:0:0", 400_000)
    assert meter.joules() == {"cpu": 0.75, "gpu": None}
    package(tmp_path, "intel-rapl:0", 600_100)
    assert meter.joules() == {"cpu": 0.85, "gpu": None}


def test_a_reason_where_there_is_none(tmp_path, monkeypatch):
    meter = Meter(gpu=False, powercap=tmp_path)
    assert meter.joules() == {"cpu": None, "gpu": None}
    assert "there is no RAPL" in meter.why["cpu"]
    package(tmp_path, "intel-rapl:0", 1)

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", refuse)
    meter = Meter(gpu=False, powercap=tmp_path)
    assert meter.joules()["cpu"] is None
    assert "only root may read" in meter.why["cpu"]


def test_a_gpu(tmp_path, monkeypatch):
    counter = [5000]
    nvml = SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: counter[0],
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    meter = Meter(powercap=tmp_path)
    counter[0] = 7500
    assert meter.joules() == {"cpu": None, "gpu": 2.5}

    def fail():
        raise RuntimeError("Driver Not Loaded")

    nvml.nvmlInit = fail
    assert Meter(powercap=tmp_path).why["gpu"] == "NVML: Driver Not Loaded"
    monkeypatch.setitem(sys.modules, "pynvml", None)  # as if it were not installed
    assert "pip install nvidia-ml-py" in Meter(powercap=tmp_path).why["gpu"]
