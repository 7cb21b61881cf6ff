"""Where the time of a training step goes, instead of training.

    python assets/speed.py --data PHOTOS --arch vit_small --aug caug+ --compile     any options of clever.py
    torchrun --nproc-per-node gpu assets/speed.py --data PHOTOS
    STEPS=100 python assets/speed.py                                                20 steps, unless said

Two steps warm up. The phases are measured one after another, waiting for the device in between: while
training, a GPU works on a step as the processes of the loader prepare the next ones.
"""
import os
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import clever  # noqa: E402

PHASES = ("waiting for data", "augmentation", "train_step")


def measure():
    cfg = clever.parse(sys.argv[1:])
    steps = int(os.environ.get("STEPS", 20))
    data = clever.load_images(cfg.data, "train", clever.stored_side(cfg.global_size))
    if cfg.batch > len(data):
        raise clever.UserError(f"--batch {cfg.batch} is larger than the data of {len(data)} images; lower it")
    device = clever.setup(cfg.batch)
    t = clever.Training(cfg, len(data) // cfg.batch, device)
    augment = clever.MultiCrop(cfg)
    wait = getattr(torch, device.type).synchronize
    stream = data.stream(clever.batches(len(data), cfg, 0, steps + 2), device, cfg.workers)
    spent = dict.fromkeys(PHASES, 0.0)  # seconds
    for step in range(steps + 2):
        times = [time.perf_counter()]
        images, aspect = next(stream)
        times.append(time.perf_counter())
        views = augment(images, aspect, step)
        wait()
        times.append(time.perf_counter())
        clever.train_step(t, views, step % len(t.lr))
        wait()
        times.append(time.perf_counter())
        if step >= 2:
            for phase, start, end in zip(PHASES, times, times[1:]):
                spent[phase] += end - start
    total = sum(spent.values())
    with torch.profiler.profile() as trace:
        clever.train_step(t, views, 0)
    order = f"self_{device.type}_time_total"
    clever.say(trace.key_averages().table(sort_by=order, row_limit=10, max_name_column_width=40))
    for phase, seconds in spent.items():
        clever.say(f"{phase:16} {1000 * seconds / steps:8.1f} ms a step, {seconds / total:.1%}")
    clever.say(f"{cfg.batch * steps / total:.1f} images/s: {cfg.method}, {cfg.arch}, {cfg.aug}, "
               f"batch {cfg.batch}, precision {cfg.precision}, torch {torch.__version__}")
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2 ** 30
        clever.say(f"peak memory {peak:.2f} GiB on {torch.cuda.get_device_name()}")


if __name__ == "__main__":
    os._exit(clever.guarded("speed.py", measure))
