"""Time and memory of a training step, and time of a loader, beside the published arithmetic.

    python assets/benchmark.py              a step and its memory, on all cores; about two minutes
    python assets/benchmark.py PHOTOS       also a loader, on one core; a folder of photographs

The published step is the one that the tests compare with, to rounding: losses pair by pair, loops over the
parameters. What is compared is called in turns, after one call that warms up; medians.
"""
import itertools
import random
import sys
import time
from pathlib import Path

import torch
from PIL import Image, ImageFilter
from torchvision import transforms as T

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import clever  # noqa: E402
from test_clever import Published  # noqa: E402


def in_turns(what, published, ours, rounds=5):
    """Print the median seconds of two functions of the round's number, called in turns."""
    times = {published: [], ours: []}
    for i in range(rounds + 1):
        for call in times:
            began = time.perf_counter()
            call(i)
            times[call].append(time.perf_counter() - began)
    theirs, mine = (sorted(took[1:])[rounds // 2] for took in times.values())
    print(f"{what}: published {theirs:.2f} s, ours {mine:.2f} s: {theirs / mine:.2f} x")


def random_views(batch):
    return [torch.randn(batch, 3, side, side) for side in [224] * 2 + [96] * 8]


def step(theirs, ours):
    """A step of the paper's recipe, without its views, in two precisions."""
    t = clever.Training(clever.Config(batch=8, drop_path=0.0, precision=ours), 1)
    published = Published(t)
    published.cfg = clever.Config(batch=8, precision=theirs)
    views = random_views(8)
    threads = torch.get_num_threads()
    in_turns(f"step, batch 8, K = 65,536, {threads} threads, published in {theirs}, ours in {ours}",
             lambda i: published.step(views, 1 + i), lambda i: clever.train_step(t, views, 1 + i))


def published_views(aug):
    """The transforms of the ten views of an image; each geometric operation resamples."""
    blur = T.Lambda(lambda x: x.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0))))
    views = []
    for view in range(10):
        size, scale = (224, (0.4, 1.0)) if view < 2 else (96, (0.05, 0.4))
        views.append(T.Compose([
            T.RandomResizedCrop(size, scale, interpolation=T.InterpolationMode.BICUBIC),
            T.RandomHorizontalFlip(),
            T.RandomRotation(90),
            T.RandomApply([T.ElasticTransform(100.0)], 0.5 * (aug == "caug+")),
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
            T.RandomGrayscale(0.2),
            T.RandomApply([blur], (1.0, 0.1, 0.5)[min(view, 2)]),
            T.RandomSolarize(128, 0.2 * (view == 1)),
            T.ToTensor(),
            T.Normalize(clever.MEAN, clever.STD)]))
    return views


def loader(aug, photos):
    """A worker of the loader, which decodes images, against one that makes the published views."""
    views = published_views(aug)

    def published(_):
        for photo in photos:
            image = Image.open(photo).convert("RGB")
            for view in views:
                view(image)

    def ours(_):
        for photo in photos:
            clever.decode(photo, clever.stored_side(224))

    in_turns(f"loader, {aug}, {len(photos)} images, 1 core", published, ours)


def peak_memory(call):
    """The GiB that a function adds, at most, to the tensors in memory."""
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return max(itertools.accumulate(e.nbytes() for e in events)) / 2 ** 30


def memory(arch, batch):
    """What each image of a batch adds to the memory of a step in bf16."""
    used = []
    for count in (batch, 2 * batch):
        t = clever.Training(clever.Config(arch=arch, batch=count, precision="bf16"), 2)
        views = random_views(count)
        clever.train_step(t, views, 0)  # makes the optimiser's state
        used.append(peak_memory(lambda: clever.train_step(t, views, 2)))
    image = (used[1] - used[0]) / batch
    print(f"a step of {arch}, bf16, K = 65,536: {1024 * image:.0f} MiB an image, "
          f"{512 * image:.0f} GiB at 512")


if __name__ == "__main__":
    if len(sys.argv) > 1 and not Path(sys.argv[1]).is_dir():
        sys.exit(__doc__)
    for theirs, ours in (("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "bf16")):
        step(theirs, ours)
    for arch, batch in (("vit_tiny", 8), ("vit_small", 8), ("vmamba_tiny", 2)):
        memory(arch, batch)
    if len(sys.argv) > 1:
        torch.set_num_threads(1)  # as in a worker
        for aug in ("caug", "caug+"):
            loader(aug, sorted(Path(sys.argv[1]).rglob("*.jpg"))[:40])
