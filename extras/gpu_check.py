"""The checks of gpu_check.sh, one a function: `python extras/gpu_check.py NAME [ARGUMENTS]`.

Each prints its figures and fails with an AssertionError. Without a GPU the sizes are small.
"""

import json
import os
import shutil
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torchvision

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import clever  # noqa: E402
from extras.speed import finish  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
SIZES = {} if GPU else dict(arch="vit_micro", global_size=32, local_size=16, out_dim=64)


def random_batch(batch):
    """Images and their aspects, for `MultiCrop`."""
    images = torch.randint(0, 256, (batch, 3, 320, 320), dtype=torch.uint8)
    return images.to(DEVICE), torch.ones(batch, device=DEVICE)


def photos(folder, count):
    """A folder of JPEGs in four classes, an eighth of them for testing; 128 differ."""
    paths = []
    for i in range(int(count)):
        parent = Path(folder, "train" if i % 8 else "val", str(i // 8 % 4))
        parent.mkdir(parents=True, exist_ok=True)
        paths.append(parent / f"{i}.jpg")
        if i >= 128:
            shutil.copy(paths[i % 128], paths[i])
            continue
        noise = torch.randint(100, 140, (3, 375, 500), dtype=torch.uint8)
        torchvision.io.write_jpeg(noise, str(paths[i]), quality=90)


def waits():
    """A step on one GPU never waits for it."""
    images, aspect = random_batch(8)
    for arch, aug in (("vit_tiny", "caug+"), ("resnet50", "caug"), ("vmamba_tiny", "baug")):
        cfg = clever.Config(**{"arch": arch, **SIZES}, aug=aug, batch=8)
        run = clever.Training(cfg, 100, DEVICE)
        for step in range(2):
            if GPU:
                torch.cuda.set_sync_debug_mode("error" if step == 1 else "default")
            clever.train_step(run, run.augment(images, aspect, step), step)
        if GPU:
            torch.cuda.set_sync_debug_mode("default")
        print(f"{cfg.arch}, {aug}: does not wait")


def same_as_cpu():
    """Three steps in float32 have the same loss and gradients on the GPU and on the CPU."""
    sizes = dict(SIZES, precision="fp32", drop_path=0, freeze_epochs=0)
    cfg = clever.Config(**sizes, batch=4, local_views=2)
    images = torch.randint(0, 256, (4, 3, 320, 320), dtype=torch.uint8)
    crop = clever.MultiCrop(cfg)
    losses, gradients = [], []
    for device in ("cpu", DEVICE):
        run = clever.Training(cfg, 100, device)
        for step in range(3):
            views = [view.to(device) for view in crop(images, torch.ones(4), step)]
            terms = clever.train_step(run, views, step)
        losses.append(float(terms["loss"]))
        gradients.append(torch.cat([p.grad.flatten().cpu() for p in run.student.parameters()]))

    loss = abs(losses[1] / losses[0] - 1)
    gradient = float((gradients[1] - gradients[0]).norm() / gradients[0].norm())
    print(f"relative difference of the loss {loss:.1e}, of the gradients {gradient:.1e}")
    assert loss < 1e-4 and gradient < 1e-2


def host():
    """Below some batch, launching the operations of a step takes longer than computing them."""
    for batch in (16, 64, 256) if GPU else (2, 4):
        run = clever.Training(clever.Config(**SIZES, batch=batch), 100, DEVICE)
        images, aspect = random_batch(batch)
        views = run.augment(images, aspect, 0)
        phases = dict(
            augmentation=lambda step: run.augment(images, aspect, step),
            train_step=lambda step: clever.train_step(run, views, step),
        )
        for name, phase in phases.items():
            for step in range(3):
                phase(step)
            start = finish(DEVICE)
            for step in range(5):
                phase(step)
            launched = 200 * (time.perf_counter() - start)  # ms a step
            done = 200 * (finish(DEVICE) - start)
            print(f"batch {batch}, {name}: {launched:.1f} ms to launch, {done:.1f} ms until done")


def svdvals():
    """What the ranks at the end of an epoch cost."""
    for columns in (153, 307, 1638):
        x = torch.randn(1024, columns, device=DEVICE, dtype=torch.float64)
        torch.linalg.svdvals(x)
        start = finish(DEVICE)
        torch.linalg.svdvals(x)
        print(f"1024 x {columns}: {1000 * (finish(DEVICE) - start):.0f} ms")


def join(*options):
    """Train in one of two processes that share a GPU, over gloo: NCCL refuses that."""
    os.environ["LOCAL_RANK"] = "0"
    dist.init_process_group("gloo")
    clever.main(options)


def same_loss(*logs):
    """The runs end with the same loss."""
    losses = [json.loads(Path(log).read_text().splitlines()[-1])["loss"] for log in logs]
    print("last losses", *losses)
    assert max(losses) / min(losses) - 1 < 1e-3


def compiled_views():
    """--compile changes the views only by rounding."""
    images, aspect = random_batch(4)
    views = []
    for compile in (False, True):
        crop = clever.MultiCrop(clever.Config(**SIZES, aug="caug+", compile=compile))
        views.append(torch.cat([view.flatten() for view in crop(images, aspect, 0)]))
    off = (views[0] - views[1]).abs()
    share = float((off > 1e-3).double().mean())  # rounding can move the edge of a black corner
    print(f"compiled views: off by up to {off.max():.1e}, by more than 1e-3: {share:.1e} of values")
    assert share < 1e-4


def draws():
    """Elastic noise does not change the other draws, so they are the same on all GPUs."""
    images, aspect = random_batch(64 if GPU else 4)
    angles = []
    for aug in ("caug", "caug+"):
        crop = clever.MultiCrop(clever.Config(aug=aug))
        crop(images, aspect, 0)
        angles.append(float(crop.angles[-1][-1]))
    print("last angle of the last view with caug and caug+:", *angles)
    assert angles[0] == angles[1]


if __name__ == "__main__":
    name, *arguments = sys.argv[1:]
    if name != "join":
        clever.setup()
    globals()[name](*arguments)
