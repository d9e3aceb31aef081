"""What the scripts share: a second process that helps to compile."""

from __future__ import annotations

from launch import ROOT, alone

PROGRAM = """
import sys
sys.path.insert(0, {experiments!r})
import nanocnn as nc
import common, numpy as np
from nanocnn.data import Batch
from nanocnn.models import alexnet_cifar

if __name__ == "__main__":
    sys.argv[1:] = ["--use", "reference"]  # nothing to compile: the helper is soon done
    args = common.parse(common.training_parser("", ""))
    model = alexnet_cifar(width=1 / 64)
    before = {{name: p.data.copy() for name, p in model.named_parameters()}}
    rng = np.random.default_rng(0)
    batch = Batch(rng.standard_normal((40, 32, 32, 3)).astype("f"), rng.integers(0, 10, 40), np.arange(40), 40)
    common.threads.cores = lambda: 2
    impatience = common._Impatience(args, model, batch)
    impatience._act()
    impatience.helper.join(60)
    print("exit code", impatience.helper.exitcode)
    print("unchanged", all((p.data == before[name]).all() for name, p in model.named_parameters()))
"""


def test_the_process_that_helps_to_compile(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(PROGRAM.format(experiments=str(ROOT / "experiments")))
    lines = alone(script).output.splitlines()
    assert lines == ["compiling kernels, once (about a minute, more on busy cores)", "exit code 0", "unchanged True"]
