#!/usr/bin/env python
"""Train and infer the same networks in nanocnn and in other frameworks, in turn, and say how long each of them takes.

Every framework runs in a process of its own, at its best settings. First all must give the same losses, gradients and
logits as nanocnn on the same weights and images: a framework that computes something else is an error. Then they take
turns of a few steps, round after round, so that a processor that slows down slows all of them down.
"""

import argparse
import json
import math
import pickle
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import peers  # isort: skip  (beside this file)
from peers._process import ENVIRONMENT, KEPT, PeerFailed, Process  # isort: skip  (keeps a copy of the environment before it changes)
import nanocnn as nc  # isort: skip  (before NumPy, for whose BLAS it sets variables)

import numpy as np

from nanocnn.kernels import threads
from nanocnn.kernels.dispatch import ChoiceError, parse_use
from nanocnn.machine import machine_facts
from nanocnn.progress import say

import common  # isort: skip
from peers import _layers, _report  # isort: skip

EXAMPLES = """examples:
  python experiments/vs_peers.py                               both networks, training and inference, all that is here
  python experiments/vs_peers.py --quick                       does it work? tiny networks, figures that mean nothing
  python experiments/vs_peers.py --modes infer --batch 1       one image at a time
  python experiments/vs_peers.py --peers pytorch --threads 1   against PyTorch alone, on one core
  python experiments/vs_peers.py --layers                      each convolution of the networks, in its three directions
  python experiments/vs_peers.py --use conv2d=reference        with another rung of nanocnn's ladder

reading the result: "ours / theirs" is nanocnn's time, in its best setting, over theirs, so 0.50 is half the time. The
median is what a step takes, the minimum what it would take on a machine with nothing else to do. A ratio of one run
within a few percent of 1 says nothing; look at whether it stays on one side in several runs.

memory: the most that a process held during a step (VmHWM) less what it held once its framework was imported (VmRSS):
weights, momentum, activations, gradients, and what the framework's own compiler left behind.

a framework is compared if it is installed: pip install torch tensorflow jax onnxruntime openvino onnx. All of them are
in memory at once, some 8 GB for ResNet-18 at batch 128; --peers takes fewer.
"""
TOLERANCES = {  # relative, in the Euclidean norm of each array
    "loss": 1e-3,
    "logits": 1e-3,
    "layer": 1e-3,
    # Rounding turns a few ReLUs whose input is nearly 0: of a share s of them the gradient is off by about sqrt(s).
    "gradient": 5e-2,
}
# Seconds: what a turn of the fastest takes at least, and the pause before a turn, in which threads of the one before
# stop spinning (ONNX Runtime's take 40 ms).
TURN, PAUSE = 0.2, 0.06
LAYER_TURN, LAYER_PAUSE = 0.04, 0.015
PATIENCE = 2  # seconds, after which the first preparation says what it does


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=common.TeachingFormatter, allow_abbrev=False
    )
    what = parser.add_argument_group("what is compared")
    what.add_argument("--models", nargs="+", choices=tuple(_report.MODELS), default=list(_report.MODELS))
    what.add_argument("--modes", nargs="+", choices=("train", "infer"), default=["train", "infer"])
    what.add_argument("--layers", action="store_true", help="the networks' convolutions one by one, instead of them")
    known = ", ".join(peers.names())
    what.add_argument("--peers", nargs="+", metavar="P", help=f"some of {known}; else all that are installed")
    what.add_argument("--batch", type=common.count, help="images a step; else 128")
    what.add_argument("--width", type=common.positive, default=1.0, help="scales channels and features")
    how = parser.add_argument_group("how")
    how.add_argument("--threads", type=common.count, default=threads.cores(), help="of each framework")
    how.add_argument("--rounds", type=common.count, default=5, help="turns of each")
    how.add_argument("--steps", type=common.count, default=3, help="timed steps in a turn, at least")
    how.add_argument(
        "--use", nargs="+", default=[], metavar="CHOICE", help="nanocnn's choices, as in the other scripts"
    )
    how.add_argument("--quick", action="store_true", help="one round, batch 8, an eighth of the width, no compilation")
    how.add_argument("--out", default="runs/vs_peers", metavar="DIR", help="where vs_peers.json and .png go")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.steps, args.width, args.batch = 1, 1, min(args.width, 0.125), args.batch or 8
    args.batch = args.batch or 128
    if args.threads > threads.cores():
        parser.error(f"--threads {args.threads}: this process may use {threads.cores()} cores")
    for name in args.peers or []:
        if name not in peers.names():
            parser.error(f"--peers: unknown peer {name!r}; there are: {known} (files of experiments/peers/)")
        if lacking := peers.missing(name):
            parser.error(f"--peers: {name} is not installed: pip install {' '.join(lacking)}")
        if name not in able(args):
            parser.error(f"--peers: {name} can do nothing of this; it does: {', '.join(abilities(name))}")
    try:
        Path(args.out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: {error}")
    policy, choices = parse_use(args.use)
    try:
        with nc.using(*policy, **choices):
            return args
    except ChoiceError as error:
        parser.error(f"--use: {error}")


# ------------------------------------------------------------------ who takes part


def settings_of(name, kind):
    """The settings of a peer for "train", "infer" or "layers", with what each is; none where it cannot do that."""
    peer = peers.load(name)
    if kind == "layers":
        return getattr(peer, "LAYERS", {})
    return peer.TRAIN if kind == "train" else peer.INFER


def abilities(name):
    """What a peer can do, of "train", "infer" and "layers"."""
    return [kind for kind in ("train", "infer", "layers") if settings_of(name, kind)]


def able(args):
    """The peers that can do something of what is asked for."""
    kinds = {"layers"} if args.layers else {*args.modes}
    return [name for name in peers.names() if kinds.intersection(abilities(name))]


class Comparison:
    """One run: its options, its result file, and the processes that take turns."""

    def __init__(self, args):
        self.args = args
        self.told = False  # that kernels are compiled
        chosen = args.peers or [name for name in able(args) if not peers.missing(name)]
        self.names = sorted({"ours", *chosen}, key=peers.names().index)
        machine = machine_facts()
        self.result = dict(
            kind="vs_peers",
            command=shlex.join(["python", "experiments/vs_peers.py", *common.without_folder(sys.argv[1:])]),
            date=time.strftime("%Y-%m-%d"),
            commit=commit(),
            threads=args.threads,
            batch=args.batch,
            width=args.width,
            rounds=args.rounds,
            environment={k: v for k, v in sorted(ENVIRONMENT.items()) if KEPT.match(k) and k != "NUMBA_CACHE_DIR"},
            machine=dict(
                processor=machine["processor"],
                memory=machine["memory"]["total"],
                platform=machine["system"]["platform"],
                python=machine["python"]["version"],
            ),
            peers={name: dict(title=peers.load(name).TITLE, versions=peers.versions(name)) for name in self.names},
            tolerances=TOLERANCES,
            networks=[],
            layers=[],
            skipped=[],
        )
        absent = [name for name in able(args) if name not in self.names]
        say(f"{threads.processor()}, {args.threads} threads, batch {args.batch}, float32")
        for name in self.names:
            words = ", ".join(f"{package} {version}" for package, version in peers.versions(name).items())
            say(f"  {peers.load(name).TITLE}: {words}")
        if absent:
            say(f"  not taking part: {', '.join(absent)}")
        if args.quick:
            say("  --quick: that it works is all that this run shows; its figures mean nothing")

    def skip(self, name, setting, reason):
        say(f"  skipped: {name} ({setting}): {reason}")
        self.result["skipped"].append(dict(peer=name, setting=setting, reason=reason))

    def start(self, stack, kind, first):
        """[(row, process, answer to the first question)] of all that can do `kind`; `first(process)` asks it.

        A peer that fails is an error if it was asked for by name, and otherwise left out with a line.
        """
        entrants = []
        for name in self.names:
            peer = peers.load(name)
            for setting, about in settings_of(name, kind).items():
                optional = setting in getattr(peer, "OPTIONAL", ())
                if optional and self.args.quick:
                    continue
                if reason := getattr(peer, "unavailable", lambda setting: None)(setting):
                    self.skip(name, setting, reason)
                    continue
                process = Process(name, setting, self.args.threads)
                stack.callback(process.close)
                try:
                    answer = first(process)
                except PeerFailed as error:
                    if not optional and name in ["ours", *(self.args.peers or [])]:
                        raise
                    self.skip(name, setting, str(error).strip().splitlines()[-1])
                    process.close()
                    continue
                environment = peer.environment(setting, self.args.threads)
                row = dict(peer=name, setting=setting, about=about, environment=environment)
                entrants.append((row, process, answer))
        return entrants

    @contextmanager
    def patience(self, process):
        """Around a question: say what takes so long, once, if nanocnn may have kernels to compile."""
        timer = threading.Timer(PATIENCE, say, ["  preparing nanocnn: the first time, its kernels are compiled"])
        if process.name == "ours" and not self.told:
            timer.start()
        try:
            yield
        finally:
            self.told = self.told or process.name == "ours"
            timer.cancel()

    def take_turns(self, rows, entrants, fastest, seconds, pause, *question):
        """Round after round ask each for a turn of the same number of steps, and add its seconds to its row.

        `fastest` is the time of the fastest one's step, `seconds` what a turn of his should last at least.
        """
        steps = self.args.steps if self.args.quick else max(self.args.steps, math.ceil(seconds / fastest))
        for _ in range(self.args.rounds):
            for row, (_, process, _) in zip(rows, entrants, strict=True):
                time.sleep(pause)
                row["seconds"] += process.ask(*question, steps)

    # ---------------------------------------------------------------- networks

    def network(self, model, mode):
        """Check and time one network in one mode."""
        args = self.args
        say(f"\n{_report.MODELS[model]}, {_report.MODES[mode]}")
        task = make_task(model, args)
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory())

            def prepare(process):
                task.setting, path = process.setting, Path(folder, "task.pickle")
                path.write_bytes(pickle.dumps(task))
                with self.patience(process):
                    return process.ask("prepare", mode, str(path))

            if not args.quick:  # compile kernels elsewhere: what the compiler leaves in memory is not the step's
                with closing(Process("ours", "fastest", args.threads)) as process:
                    prepare(process)
            entrants = self.start(stack, mode, prepare)
            rows = [dict(row, memory=facts["memory"], seconds=[]) for row, _, facts in entrants]
            ours = entrants[0][1].ask("check")
            for row, (_, process, _) in zip(rows, entrants, strict=True):
                row["check"] = compare(mode, process.ask("check"), ours) if row is not rows[0] else {}
            say(_report.agreement(rows, TOLERANCES))
            demand_agreement(rows)

            fastest = min(facts["seconds"] for *_, facts in entrants)
            self.take_turns(rows, entrants, fastest, TURN, PAUSE, "turn")
        entry = dict(model=model, mode=mode, rows=[_report.with_figures(row) for row in rows])
        self.result["networks"].append(entry)
        say(_report.network_table(entry, self.result))

    # ---------------------------------------------------------------- layers

    def layers(self):
        """Check and time each distinct convolution of the networks in each direction."""
        args = self.args
        weights = {model: make_task(model, args).weights for model in args.models}
        with ExitStack() as stack:
            entrants = self.start(stack, "layers", lambda process: process.ask("ready"))
            say(_report.layer_header(self.result))
            for shape in _layers.distinct(weights):
                layer = _layers.make(shape, args.batch, args.threads, args.use)
                answers = []
                for _, process, _ in entrants:
                    layer.setting = process.setting
                    with self.patience(process):
                        answers.append(process.ask("layer", layer))
                for direction in _layers.directions(shape):
                    some = [i for i, answer in enumerate(answers) if direction in answer]
                    able, rows = [entrants[i] for i in some], [dict(entrants[i][0], seconds=[]) for i in some]
                    for row, i in zip(rows, some, strict=True):
                        row["check"] = {"layer": (distance(answers[i][direction], answers[0][direction]), direction)}
                    demand_agreement(rows)
                    trial = min(min(process.ask("layer_turn", direction, 1)) for _, process, _ in able)
                    self.take_turns(rows, able, trial, LAYER_TURN, LAYER_PAUSE, "layer_turn", direction)
                    rows = [_report.with_figures(row) for row in rows]
                    entry = dict(layer=shape.name, direction=direction, flops=shape.flops(args.batch), rows=rows)
                    self.result["layers"].append(entry)
                    say(_report.layer_line(entry, self.result))

    def write(self):
        """vs_peers.json and vs_peers.png in the folder of --out."""
        folder = Path(self.args.out)
        (folder / "vs_peers.json").write_text(as_json(self.result))
        (folder / "vs_peers.png").write_bytes(_report.picture(self.result))
        say(f"\nall times: {folder / 'vs_peers.json'}, picture: {folder / 'vs_peers.png'}")


def as_json(result):
    """JSON for readers: indented, but a list of numbers on one line."""
    indented = json.dumps(result, indent=1)
    return re.sub(r"\[[-+.\deE,\s]+\]", lambda numbers: " ".join(numbers[0].split()), indented) + "\n"


def commit():
    """The commit of this checkout, with "+" after it where a tracked file differs; None where it is no checkout."""
    words = ["git", "--no-optional-locks", "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        outcome = subprocess.run(words, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:  # no git
        return None
    return outcome.stdout.strip() or None


def make_task(model, args):
    """Random images and labels, and weights from the model's own initialisation.

    Statistics, scales and biases are drawn at random too: as zeros and ones they would hide a mistake.
    """
    rng = np.random.default_rng(0)
    nc.manual_seed(0)
    dropout = 0.5 if model == "alexnet" else 0.0
    weights = {}
    for name, array in peers.load("ours").network(model, args.width, dropout).state_dict().items():
        if "running_var" in name:
            array = rng.uniform(0.5, 1.5, array.shape)
        elif array.ndim == 1:
            array = array + rng.uniform(-0.1, 0.1, array.shape)
        weights[name] = array.astype(np.float32)
    images = rng.standard_normal((args.batch, 32, 32, 3)).astype(np.float32)
    labels = rng.integers(0, 10, args.batch)
    return peers.Task(model, args.width, images, labels, weights, dropout, args.threads, use=args.use)


# ------------------------------------------------------------------ do they agree?


def distance(a, b):
    """|a - b| / |b|; infinite where shapes differ or something is not a number."""
    if a.shape != b.shape or not np.isfinite(a).all():
        return math.inf
    return float(np.linalg.norm(a.astype(np.float64) - b) / max(np.linalg.norm(b), 1e-30))


def compare(mode, theirs, ours):
    """{what: (largest relative difference, of which array)}."""
    if mode == "infer":
        return {"logits": (distance(theirs, ours), "logits")}
    losses, (first, gradients) = theirs
    our_losses, (our_first, our_gradients) = ours
    loss = distance(np.array([first, *losses]), np.array([our_first, *our_losses]))
    if set(gradients) != set(our_gradients):
        return {"loss": (loss, "loss"), "gradient": (math.inf, "names")}
    gradient = max((distance(gradients[name], our_gradients[name]), name) for name in our_gradients)
    return {"loss": (loss, "losses of three steps"), "gradient": gradient}


def demand_agreement(rows):
    """Raise Disagreement if one of them computes something else than nanocnn does."""
    for row in rows:
        for what, (difference, where) in row["check"].items():
            if not difference <= TOLERANCES[what]:
                raise Disagreement(
                    f"{row['peer']} ({row['setting']}) disagrees with nanocnn: {what} of {where} differ by "
                    f"{difference:.1e}, allowed {TOLERANCES[what]:.0e}; nothing was timed"
                )


class Disagreement(RuntimeError):
    """Two frameworks did not compute the same thing."""


def main():
    args = arguments()
    try:
        comparison = Comparison(args)
        if args.layers:
            comparison.layers()
        else:
            for model in args.models:
                for mode in args.modes:
                    comparison.network(model, mode)
    except (Disagreement, PeerFailed) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; nothing was written")
    comparison.write()


if __name__ == "__main__":
    main()
