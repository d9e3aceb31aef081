"""Joules, where the machine tells them: processors by RAPL, GPUs by NVML.

    meter = Meter()
    ...                                  # work
    print(meter.joules(), meter.why)     # {"cpu": 12.3, "gpu": None}, {"gpu": "the package pynvml is not installed"}

Both count what the whole package or GPU takes, ours and everybody else's. RAPL's counters run over after some minutes
of full load: once is noticed, twice is not, so read them every minute or so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Intel's, and AMD's since Zen, by the same names: intel-rapl:0 is a package, intel-rapl:0:0 a part of it.
POWERCAP = Path("/sys/class/powercap")


class Meter:
    """Reads the counters when it is made, and at each call of `joules`. `why` says what cannot be read, and why not."""

    def __init__(self, gpu: bool = True, powercap: Path = POWERCAP):
        self.why: dict[str, str] = {}
        self._packages = _packages(powercap, self.why)
        self._gpu = _nvml(self.why) if gpu else None
        self._last = self._read()
        self._total = dict.fromkeys(self._last, 0.0)

    def joules(self) -> dict[str, float | None]:
        """Since it was made, of "cpu" and "gpu"; None where it cannot be read."""
        now = self._read()
        for name, value in now.items():
            passed = value - self._last[name]
            if passed < 0:  # the counter has run over
                passed += self._packages[name]
            self._total[name] += passed
        self._last = now
        cpu = sum(total for name, total in self._total.items() if name != "gpu") / 1e6
        gpu = self._total.get("gpu", 0.0) / 1e3
        return {"cpu": cpu if self._packages else None, "gpu": gpu if self._gpu else None}

    def _read(self) -> dict[Any, float]:
        """Microjoules of each package, millijoules of the GPU."""
        found: dict[Any, float] = {path: int((path / "energy_uj").read_text()) for path in self._packages}
        if self._gpu:
            found["gpu"] = self._gpu()
        return found


def _packages(powercap: Path, why: dict[str, str]) -> dict[Any, int]:
    """The packages' folders, and where the counter of each runs over."""
    found = {}
    folders = sorted(p for p in powercap.glob("intel-rapl:*") if p.name.count(":") == 1)
    for folder in folders:
        try:
            int((folder / "energy_uj").read_text())
            found[folder] = int((folder / "max_energy_range_uj").read_text())
        except PermissionError:
            why["cpu"] = f"only root may read {folder}/energy_uj: sudo chmod a+r {powercap}/*/energy_uj"
        except (OSError, ValueError) as error:
            why["cpu"] = f"{folder}: {error}"
    if not folders:
        why["cpu"] = f"there is no RAPL: {powercap} has no intel-rapl:0 (a virtual machine seldom has it)"
    return {} if "cpu" in why else found


def _nvml(why: dict[str, str]) -> Any:
    """A function that reads the first GPU's counter; None where there is none."""
    try:
        import pynvml
    except ImportError:
        why["gpu"] = "the package pynvml is not installed: pip install nvidia-ml-py"
        return None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError as error:
        why["gpu"] = f"NVML: {error}"
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
