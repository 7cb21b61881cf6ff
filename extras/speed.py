"""Where the time of a training step goes.

    python extras/speed.py --data PHOTOS --arch vit_small --compile     any options of clever.py
    torchrun --nproc-per-node gpu extras/speed.py --data PHOTOS
    STEPS=100 python extras/speed.py                                    the default is 20 steps

The phases are timed one after another, waiting for the GPU after each. In training they overlap:
the loader prepares the next images while the GPU works.
"""

import contextlib
import dataclasses
import os
import pkgutil
import sys
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import clever  # noqa: E402

os.environ["KINETO_LOG_LEVEL"] = "6"  # else the profiler reports a missing GPU as an error

WARM_UP = 3  # steps that are not timed
PHASES = ("waiting for data", "augmentation", "train_step")


def finish(device):
    """Wait until the GPU has done its work; return the time."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(run, stream, device):
    """Seconds of each phase of each step: a list of (waiting, augmentation, train_step)."""
    seconds = []
    start = finish(device)
    for step, (images, aspect, _) in enumerate(stream):
        loaded = finish(device)
        views = run.augment(images, aspect, step)
        augmented = finish(device)
        clever.train_step(run, views, step)
        end = finish(device)
        seconds.append((loaded - start, augmented - loaded, end - augmented))
        start = end
    return seconds[WARM_UP:], views


def main():
    cfg = clever.parse(sys.argv[1:])
    steps = int(os.environ.get("STEPS", 20))
    device = clever.setup()
    data, _ = clever.load_images(cfg.data, clever.stored_side(cfg.global_size))
    if cfg.batch > len(data):
        raise clever.UserError(f"--batch {cfg.batch} is more than the {len(data)} images")
    cfg = dataclasses.replace(cfg, epochs=1, freeze_epochs=0)
    kind = pkgutil.resolve_name(cfg.training) if cfg.training else clever.Training
    run = kind(cfg, 2 * (WARM_UP + steps), device)
    stream = data.stream(clever.batches(len(data), cfg, 0, WARM_UP + steps), device, cfg.workers)
    with contextlib.closing(stream):
        seconds, views = measure(run, stream, device)

    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as trace:
        clever.train_step(run, views, 0)
    order = f"self_{device.type}_time_total"
    table = trace.key_averages().table(sort_by=order, row_limit=10, max_name_column_width=40)
    clever.report(table)

    total = torch.tensor(seconds).sum()
    for phase, times in zip(PHASES, zip(*seconds)):
        median = 1000 * torch.tensor(times).median()
        share = sum(times) / total
        clever.report(f"{phase:16} {median:8.1f} ms a step (median), {share:.0%} of the time")
    clever.report(
        f"{cfg.batch * steps / total:.1f} images/s: {cfg.method}, {cfg.arch}, {cfg.aug}, "
        f"batch {cfg.batch}, precision {cfg.precision}, torch {torch.__version__}"
    )
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
        clever.report(f"peak memory {peak:.2f} GiB on {torch.cuda.get_device_name()}")


if __name__ == "__main__":
    try:
        main()
    except clever.UserError as error:
        sys.exit(f"speed.py: {error}")
