#!/usr/bin/env python
"""Train AlexNet on CIFAR-10, alone or on several MPI ranks, each of which takes its part of every batch.

Every rank holds the whole network; the gradients are averaged while the backward pass still runs.
"""

import sys
import time
from contextlib import nullcontext, suppress

import nanocnn as nc  # before NumPy, whose BLAS reads at import what this sets in the environment
from nanocnn import parallel
from nanocnn.data import Loader
from nanocnn.early_stopping import EarlyStopping
from nanocnn.ema import EMA
from nanocnn.kernels.dispatch import variants_that_ran
from nanocnn.machine import machine_facts
from nanocnn.metrics import Metrics, print_confusion
from nanocnn.models import alexnet_cifar
from nanocnn.progress import Progress, duration, say
from nanocnn.record import Run, peak_memory
from nanocnn.resume import Keeper, Position
from nanocnn.train import evaluate, train_step

import common  # isort: skip  (beside this file)

EXAMPLES = """examples:
  python experiments/alexnet_cifar.py --epochs 3 --width 0.5      alone, a small one
  mpiexec -n 4 python experiments/alexnet_cifar.py                four ranks
  mpiexec -n 4 python experiments/alexnet_cifar.py --resume       ... going on where it stopped
  python experiments/alexnet_cifar.py --use precision=fp16        half precision, with a loss scale; or bf16, without
  python experiments/alexnet_cifar.py --use reference --profile   the textbook's kernels, and where their time goes
"""


def arguments():
    parser = common.training_parser(__doc__, EXAMPLES)
    model = parser.add_argument_group("model")
    model.add_argument("--width", type=common.positive, default=1.0, help="scales channels and features")
    model.add_argument("--batch-norm", action="store_true", help="batch norm after each convolution")
    model.add_argument("--stem-stride", type=int, choices=(1, 2), default=2, help="1 keeps the resolution: 4x the work")
    model.add_argument("--dropout", type=common.fraction, default=0.5, help="in the classifier")
    return common.parse(parser)


def make_alexnet(args, data, width):
    """AlexNet as the options describe it, for the images of `data`."""
    return alexnet_cifar(
        len(data.classes),
        width=width,
        batch_norm=args.batch_norm,
        stem_stride=args.stem_stride,
        dropout=args.dropout,
        image_size=data.train.images.shape[1],
        in_channels=data.train.images.shape[3],
    )


def train(args, comm, name="AlexNet", make=make_alexnet):
    """Train, record, and return the exit status. `make(args, data, width)` gives the network called `name`."""
    data = nc.data.load(args.data, args.data_dir, val=args.val, seed=args.seed, train_size=args.train_images)
    if comm.rank == 0:
        say(data.notice)
    ranks = dict(rank=comm.rank, size=comm.size, device=args.device)
    augment = common.make_augment(args, data)
    train_batches = Loader(data.train, args.batch_size, augment=augment, shuffle=True, seed=args.seed, **ranks)
    in_order = dict(shuffle=False, **ranks)
    val_batches = Loader(data.val, 256 * comm.size, **in_order) if len(data.val) else None
    test_batches = Loader(data.test, 256 * comm.size, **in_order)

    common.compile_kernels(args, lambda width: make(args, data, width), data, comm)
    nc.manual_seed(args.seed)
    model = make(args, data, args.width).to(args.device)
    optimizer = common.make_optimizer(args, model)
    learning_rate = common.make_schedule(args, len(train_batches))
    scaler = common.make_scaler(args)
    averager = parallel.GradientAverager(optimizer.buckets, comm)
    parallel.broadcast_parameters(optimizer.buckets, model.named_buffers(), comm)
    ema = EMA(optimizer.buckets, args.ema) if args.ema else None
    stopping = EarlyStopping(args.patience or args.epochs + 1)

    folder = common.run_folder(args, f"{name.lower()}-{data.name}", comm)
    run = Run(folder, vars(args), active=comm.rank == 0)
    parts = dict(model=model, optimizer=optimizer, ema=ema, stopping=stopping)
    parts["scaler"] = scaler if scaler.enabled else None
    options = {**vars(args), "data": data.name, "images": len(data.train)}
    keeper = Keeper(folder / "checkpoints", comm, options, args.keep, **parts)
    position = (keeper.load() if args.resume else None) or Position()
    run.load_history(until=position.epoch)
    profile = common.StepProfile(model, args.profile, folder, comm)
    if comm.rank == 0:
        say(f"{name}, {sum(p.size for p in model.parameters()):,} parameters, into {folder}")
        if position.step:
            say(f"resuming in epoch {position.epoch + 1}, after {position.step} steps")
        elif args.resume:
            say("there is no checkpoint to resume from: starting from the beginning")

    def stopped(signalled):
        """Save where we are, say how to go on, and return the exit status."""
        keeper.save(position)
        common.say_how_to_resume(position, comm)
        profile.close()
        run.finish({"status": "stopped", "step": position.step, "data": data.notice, "machine": machine_facts()})
        return signalled.exit_code

    with parallel.StopRequest(announce=comm.rank == 0) as stop:
        for epoch in range(position.epoch, args.epochs):
            if args.patience and stopping.waited >= args.patience:
                break
            start, before = time.perf_counter() - position.seconds, averager.seconds - position.waiting
            label = f"epoch {epoch + 1}/{args.epochs}"
            with Progress(len(train_batches), label, active=comm.rank == 0, done=position.batch) as bar:
                for batch in train_batches.epoch(epoch, start=position.batch):
                    result = train_step(
                        model,
                        batch,
                        optimizer,
                        learning_rate(position.step),
                        averager,
                        label_smoothing=args.label_smoothing,
                        clip=args.clip,
                        stop=stop.requested,
                        scaler=scaler,
                    )
                    if ema:
                        ema.update()
                    seconds, waiting = time.perf_counter() - start, averager.seconds - before
                    position.advance(result.loss, result.correct, result.samples, seconds, waiting)
                    bar.update(position.batch, loss=position.mean_loss, accuracy=position.accuracy, rate=position.rate)
                    profile.tick()
                    if result.stop:
                        return stopped(stop)

            parallel.average_buffers(model.named_buffers(), comm)
            with ema.applied() if ema else nullcontext():
                looks = [
                    evaluate(model, batches.epoch(0), len(data.classes), comm, stop=lambda: stop.requested)
                    for batches in (val_batches, test_batches)
                    if batches
                ]
            if any(look.stopped for look in looks):
                return stopped(stop)
            # The test set is looked at, and nothing is chosen by it.
            val, test = looks if val_batches else (None, *looks)
            enough = stopping.step(val.accuracy) if val else False
            run.epoch(
                epoch + 1,
                position.step,
                loss=position.mean_loss,
                train_accuracy=position.accuracy,
                val_loss=val and val.loss,
                val_accuracy=val and val.accuracy,
                test_loss=test.loss,
                test_accuracy=test.accuracy,
                images_per_second=position.rate,
                communication=position.communication,
                lr=learning_rate(position.step - 1),
                **scaler.figures(),
                memory=sum(comm.all_gather_object(peak_memory())),
                gpu_memory=common.gpu_memory(comm),
                seconds=position.seconds,
            )
            position.next_epoch()
            keeper.save(position, best=bool(val) and stopping.waited == 0)
            if enough:
                break

    profile.close()
    if args.patience:
        keeper.load_best()
    with ema.applied() if ema else nullcontext():
        test = evaluate(model, test_batches.epoch(0), len(data.classes), comm)
    report(test, data, run, comm)
    return 0


def report(test, data, run, comm):
    """Print the figures of the trained network, and write all of them to result.json."""
    if comm.rank:
        return
    metrics = Metrics.of(test.confusion)
    images = int(test.confusion.sum())
    training = sum(row["seconds"] for row in run.history)
    run.finish(
        {
            "data": data.notice,
            "seed": run.config["seed"],
            "ranks": comm.size,
            "test": {
                "loss": test.loss,
                "accuracy": metrics.accuracy,
                "precision": metrics.precision,
                "recall": metrics.recall,
                "f1": metrics.f1,
                "confusion": test.confusion,
            },
            "training_seconds": training,
            "prediction_seconds": test.seconds,
            "variants": variants_that_ran(),
            "machine": machine_facts(),
        }
    )
    say(f"\n{images:,} test images of {data.name}: {metrics}")
    with suppress(OSError):  # nobody reads any more
        print_confusion(test.confusion, data.classes)
    say(f"training {duration(training)}, prediction {duration(test.seconds)} ({images / test.seconds:,.0f} images/s)")
    say(f"all figures: {run.folder / 'result.json'}, curves: {run.folder / 'curves.png'}")


if __name__ == "__main__":
    args = arguments()
    comm = common.connect(args.device)
    with common.plain_errors(comm):
        status = train(args, comm)
    sys.exit(status)
