"""Time and memory of a training step and of the loader, compared with the published way.

    python extras/benchmark.py              a step and its memory, on all cores; about two minutes
    python extras/benchmark.py PHOTOS       also the loader, on one core; a folder of photographs

The published step is extras/published.py. The two run alternately, after one call that warms up;
every time is printed.
"""

import itertools
import os
import random
import statistics
import sys
import time
from pathlib import Path

import torch
from PIL import Image, ImageFilter
from torchvision import transforms as T

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import clever  # noqa: E402
from extras.published import Published  # noqa: E402

os.environ["KINETO_LOG_LEVEL"] = "6"  # else the profiler reports a missing GPU as an error
ROUNDS = 5


def timed(call, i):
    """The seconds that call(i) takes."""
    start = time.perf_counter()
    call(i)
    return time.perf_counter() - start


def in_turns(title, published, ours):
    """Time two functions alternately and print the seconds of each round."""
    rounds = [(timed(published, i), timed(ours, i)) for i in range(1 + ROUNDS)][1:]
    print(title)
    for name, seconds in zip(("published", "here"), zip(*rounds)):
        print(f"  {name:9}", *[f"{value:6.2f}" for value in seconds], "s")
    ratios = [theirs / here for theirs, here in rounds]
    print("  ratio    ", *[f"{ratio:6.2f}" for ratio in ratios], end="  ")
    print(f"median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}\n")


def random_views(batch):
    return [torch.randn(batch, 3, side, side) for side in [224] * 2 + [96] * 8]


def new_run(**options):
    return clever.Training(clever.Config(batch=8, drop_path=0.0, **options), steps_per_epoch=1)


def step(theirs, here):
    """Compare a step of the paper's recipe, without making its views, in two precisions."""
    run = new_run(precision=here)
    published = Published(new_run(precision=theirs))
    views = random_views(8)
    in_turns(
        f"step of vit_tiny, batch 8, published in {theirs}, here in {here}, "
        f"{torch.get_num_threads()} threads",
        lambda i: published.step(views, 1 + i),
        lambda i: clever.train_step(run, views, 1 + i),
    )


def published_transform(aug, view):
    """The published transform of a view; each geometric operation resamples the image."""
    size, scale = (224, (0.4, 1.0)) if view < 2 else (96, (0.05, 0.4))
    blur = T.Lambda(lambda x: x.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0))))
    operations = [
        T.RandomResizedCrop(size, scale, interpolation=T.InterpolationMode.BICUBIC),
        T.RandomHorizontalFlip(),
        T.RandomRotation(90),
        T.RandomApply([T.ElasticTransform(100.0)], 0.5 if aug == "caug+" else 0.0),
        T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
        T.RandomGrayscale(0.2),
        T.RandomApply([blur], clever.BLUR_PROBABILITY[min(view, 2)]),
        T.RandomSolarize(128, 0.2 if view == 1 else 0.0),
        T.ToTensor(),
        T.Normalize(clever.MEAN, clever.STD),
    ]
    return T.Compose(operations)


def loader(aug, photos):
    """Compare what a worker of the loader does: decode images, or also make the ten views."""
    transforms = [published_transform(aug, view) for view in range(10)]

    def published(_):
        for photo in photos:
            image = Image.open(photo).convert("RGB")
            for transform in transforms:
                transform(image)

    def ours(_):
        for photo in photos:
            clever.decode(photo, clever.stored_side(224))

    in_turns(f"loader, {aug}, {len(photos)} photographs, one core", published, ours)


def peak_memory(call):
    """The GiB that a function adds, at most, to the tensors in memory."""
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events)) / 2**30


def memory(arch, batch):
    """Print what each image of a batch adds to the memory of a step in bf16."""
    peaks = []
    for count in (batch, 2 * batch):
        run = new_run(arch=arch, precision="bf16")
        views = random_views(count)
        clever.train_step(run, views, 0)  # creates the optimiser's state
        peaks.append(peak_memory(lambda: clever.train_step(run, views, 2)))
    image = (peaks[1] - peaks[0]) / batch
    print(f"step of {arch} in bf16: {1024 * image:.0f} MiB an image, {512 * image:.0f} GiB at 512")


if __name__ == "__main__":
    for precisions in (("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "bf16")):
        step(*precisions)
    for arch, batch in (("vit_tiny", 8), ("vit_small", 8), ("vmamba_tiny", 2)):
        memory(arch, batch)
    if len(sys.argv) > 1:
        torch.set_num_threads(1)  # as in a worker
        photos = clever.find_images(sys.argv[1])[0][:40]
        for aug in ("caug", "caug+"):
            loader(aug, photos)
