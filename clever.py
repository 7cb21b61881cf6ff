"""CLeVER: Contrastive Learning Via Equivariant Representation (Song et al., arXiv 2406.00262), in one file.

    torchrun clever.py                                         the demo: no data, no download
    torchrun --nproc-per-node gpu clever.py --data IMAGENET100 --out runs/in100     the paper's recipe
    torchrun clever.py --data cifar10 --method dino --aug baug                      the baseline
    python clever.py --data IMAGENET100 --profile 30           where does the time of a step go?
    python clever.py --out runs/in100 --resume                 go on where a run stopped

A view v = t(I) of an image I under a random augmentation t passes the backbone: z = f(v). The representation
is split, z = (z_IR, z_EF): views of one image shall agree in the invariant representation (IR) and differ in
the equivariant factor (EF). A student learns by gradient, a teacher is its moving average (DINO, arXiv
2104.14294). DINO itself is ratio = 1: no EF.

From the bottom up: 1 configuration, 2 augmentation, 3 backbones, 4 split and heads, 5 losses, 6 collapse
metrics, 7 data, 8 one training step, 9 the loop, 10 the command line. Letters in comments: B images, V views
of each (G of them global), D features, K prototypes, S side of a stored image, N tokens or samples.
"""
import argparse
import dataclasses
import difflib
import fcntl
import hashlib
import inspect
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
import warnings
from collections import OrderedDict
from contextlib import contextmanager, nullcontext
from functools import partial, reduce
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import Permute, stochastic_depth
from tqdm import tqdm

# ======== 1. Configuration: the defaults are the paper's recipe; RECIPES says what smaller data changes


@dataclasses.dataclass
class Config:
    """Every option: a typed field, its default (the paper's recipe), its help. It makes the command line."""
    data: str = "patterns"            # patterns, cifar10, cifar100, or a folder: {train,val}/<class>/*
    out: str = ""                     # folder of the run; empty: the next free runs/<data>-<method>-<aug>-<n>
    recipe: str = "auto"              # defaults of the other options: demo, cifar, paper; auto: of --data
    method: str = "clever"            # clever or dino (the same code without the split)
    arch: str = "vit_tiny"            # backbone: vit_micro/tiny/small/base, resnet18/50, vmamba_tiny
    patch_size: int = 0               # patch of a ViT in pixels; 0: the architecture's (16; vit_micro 8)
    ratio: float = 0.8                # rho: the first int(rho * D) features are IR, the others EF
    lambda_orth: float = 1.0          # weight of L_Orth
    lambda_reg: float = 0.001         # weight of L_PReg
    out_dim: int = 65536              # K, prototypes of the IR head
    ef_out_dim: int = 0               # prototypes of the EF head; 0: as many as the IR head
    hidden_dim: int = 2048            # width of the heads' hidden layers
    bottleneck_dim: int = 256         # width of the heads' last layer before the prototypes
    student_temp: float = 0.1         # temperature of the student's softmax
    teacher_temp: float = 0.04        # temperature of the teacher's; lower it if the output becomes uniform
    centre_momentum: float = 0.9      # momentum of the centres
    momentum: float = 0.996           # of the teacher at the start, cosine to 1; raise it for small batches
    aug: str = "caug"                 # baug, caug (+ rotation) or caug+ (+ elastic deformation)
    blur: bool = True                 # Gaussian blur among the colour operations; off for images of 32 px
    global_size: int = 224            # side of the 2 global views in pixels
    local_size: int = 96              # side of the local views in pixels
    local_views: int = 8              # number of local views
    global_scale: tuple = (0.4, 1.0)  # area of a global view, as a fraction of the image
    local_scale: tuple = (0.05, 0.4)  # area of a local view, as a fraction of the image
    store_size: int = 0               # side of a stored image; 0: global_size, and 10/7 of it above 64 px
    epochs: int = 200                 # passes over the data
    batch: int = 512                  # images a step, over all processes
    lr: float = 5e-4                  # peak learning rate for 256 images a step; scaled by batch / 256
    min_lr: float = 1e-6              # learning rate at the end of the cosine
    warmup_epochs: int = 10           # epochs of linear warm-up of the learning rate
    weight_decay: float = 0.04        # at the start (none on biases and 1-D parameters)
    weight_decay_end: float = 0.4     # at the end of its cosine
    clip: float = 3.0                 # largest norm of each parameter's gradient; 0: no clipping
    freeze_epochs: int = 1            # epochs with frozen prototypes; more if the loss does not fall
    drop_path: float = 0.1            # stochastic depth of the student's last block, 0 at its first
    images: int = 0                   # train on a random subset of so many images; 0: all
    seed: int = 0                     # of everything random
    device: str = "auto"              # auto, cpu or cuda
    precision: str = "auto"           # bf16, fp16, fp32 (TF32 on a GPU); auto: bf16 where it is fast
    compile: bool = False             # torch.compile augmentation, backbone, heads and losses
    deterministic: bool = False       # bit-identical reruns on a GPU too (slower); a CPU needs no such switch
    workers: int = -1                 # processes that decode images; -1: one a core; none for data in memory
    cache: bool = True                # hold decoded images on the device if they fill at most a quarter of it
    save_every: float = 15.0          # minutes between checkpoints (and one at the end of each epoch)
    resume: bool = False              # go on with the run in --out
    report: bool = True               # at the end, compare with the untrained backbone
    profile: int = 0                  # profile so many steps instead of training


SMALL = dict(global_size=32, local_size=16, blur=False)
RECIPES = {
    "paper": {},
    "cifar": dict(SMALL, arch="resnet18", local_views=4, local_scale=(0.1, 0.4), out_dim=4096, batch=256),
    "demo": dict(SMALL, arch="vit_micro", local_views=2, global_scale=(0.5, 1.0), local_scale=(0.2, 0.5),
                     hidden_dim=512, bottleneck_dim=128, out_dim=1024, teacher_temp=0.03, batch=64, lr=2e-3,
                     epochs=14, warmup_epochs=1, freeze_epochs=14),
}
EMBED_DIM = dict(vit_micro=96, vit_tiny=192, vit_small=384, vit_base=768,
                 resnet18=512, resnet50=2048, vmamba_tiny=768)
CHOICES = dict(recipe=("auto", *RECIPES), method=("clever", "dino"), arch=tuple(EMBED_DIM),
               aug=("baug", "caug", "caug+"), device=("auto", "cpu", "cuda"),
               precision=("auto", "bf16", "fp16", "fp32"))
MAY_CHANGE = ("out", "resume", "workers", "cache", "save_every", "report", "profile")  # on resuming a run


class UserError(Exception):
    """A wrong input: one sentence that says what is wrong, what was expected and what to do. Exit code 2."""


def flag(name: str) -> str:
    """The command-line spelling of a field of `Config`."""
    return "--" + name.replace("_", "-")


def near(word: str, known) -> str:
    """`; did you mean X?` where a known word is close."""
    match = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {match[0]}?" if match else ""


def check(c: Config) -> None:
    """Test every option against its range before anything is loaded. Raises UserError with one sentence."""
    for name, value in vars(c).items():
        if value not in (known := CHOICES.get(name, (value,))):
            raise UserError(f"{flag(name)} {value} is unknown{near(value, known)}; known: {', '.join(known)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{flag(name)} {value} must be a finite number")
        if isinstance(value, tuple) and not (len(value) == 2 and 0 < value[0] <= value[1] <= 1):
            raise UserError(f"{flag(name)} must be two numbers with 0 < first <= second <= 1, not {value}")
    ranges = {
        "greater than 0": (lambda v: v > 0, "out_dim hidden_dim bottleneck_dim student_temp teacher_temp "
                           "global_size local_size epochs batch lr save_every"),
        "at least 0": (lambda v: v >= 0, "patch_size ef_out_dim lambda_orth lambda_reg local_views "
                       "store_size min_lr warmup_epochs weight_decay weight_decay_end clip freeze_epochs "
                       "images seed profile"),
        "in [0, 1]": (lambda v: 0 <= v <= 1, "centre_momentum momentum"),
        "in [0, 1)": (lambda v: 0 <= v < 1, "drop_path"),
        "in (0, 1], the paper's is 0.8": (lambda v: 0 < v <= 1, "ratio"),
        "at least 0, or -1 for one a core": (lambda v: v >= -1, "workers")}
    for expected, (fits, names) in ranges.items():
        for name in names.split():
            if not fits(getattr(c, name)):
                raise UserError(f"{flag(name)} {getattr(c, name)} must be {expected}")
    dim, gpu, dino = EMBED_DIM[c.arch], torch.cuda.is_available(), c.method == "dino"
    compiler = os.environ.get("CXX") or {"darwin": "clang++"}.get(sys.platform, "g++")
    ir = int(c.ratio * dim)
    patch = c.patch_size or VIT.get(c.arch, (0, 0, 1, 0))[2]
    sizes = {n: getattr(c, n) for n in ("global_size", "local_size")[:1 + bool(c.local_views)]}
    sentences = [
        (ir > 0, f"--ratio {c.ratio} leaves an IR of width 0 in {dim} features; raise it"),
        (ir < dim or dino, f"--ratio {c.ratio} leaves an EF of width 0; lower it, or say --method dino"),
        (c.ratio == 1 or not dino, f"--method dino has no split; leave out --ratio {c.ratio}"),
        (c.warmup_epochs <= c.epochs, f"--warmup-epochs {c.warmup_epochs} is over {c.epochs} epochs"),
        (c.arch in VIT or not c.patch_size, f"--patch-size is for a ViT, not for {c.arch}; leave it out"),
        *((size % patch == 0, f"{flag(name)} {size} is no multiple of the patch of {patch} px")
          for name, size in sizes.items()),
        (min(sizes.values()) > BLUR_RADIUS or not c.blur,
         f"--blur needs views over {BLUR_RADIUS} px; say --no-blur"),
        (gpu or c.device != "cuda", "--device cuda: torch finds no GPU here; leave it out"),
        (c.precision != "fp16" or gpu and c.device != "cpu",
         "--precision fp16 is for a GPU; say bf16 or fp32"),
        (not c.compile or gpu and c.device != "cpu" or shutil.which(compiler.split()[0]),
         f"--compile needs a C++ compiler, and {compiler} is not found; install one, or name it in CXX")]
    for ok, sentence in sentences:
        if not ok:
            raise UserError(sentence)


def read_options(cls, argv: list[str], positional="", **about) -> dict:
    """The options of a dataclass that a command line gives: {field: value}. A field's comment is its help.
    positional: a field without a flag; about: for argparse. Raises UserError for a wrong option or type."""
    source = inspect.getsource(sys.modules[cls.__module__])
    helps = dict(re.findall(r"^    (\w+): \w+ = .*?  # (.+)$", source, re.M))
    parser = argparse.ArgumentParser(allow_abbrev=False, **about)

    def fail(message):
        raise UserError(message)
    parser.error = fail
    flags = {f.name: flag(f.name) for f in dataclasses.fields(cls)}
    for f in dataclasses.fields(cls):
        kind = (dict(action=argparse.BooleanOptionalAction) if f.type is bool else
                dict(nargs="+", type=type(f.default[0]) if f.default else str) if f.type is tuple else
                dict(type=f.type, metavar=f.type.__name__.upper()))
        if f.name == positional:
            flags[f.name], kind = f.name, dict(nargs="?", metavar=f.name.upper())
        text = f"{helps[f.name]} ({f.default})".replace("%", "%%")
        parser.add_argument(flags[f.name], default=argparse.SUPPRESS, help=text, **kind)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        hint = near(unknown[0], flags.values())
        raise UserError(f"unknown option {unknown[0]}{hint}; --help lists them all")
    return as_options(vars(given))


def as_options(values: dict) -> dict:
    """Lists, as argparse and JSON give them, turned into the tuples of `Config`."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def parse(argv: list[str]) -> Config:
    """What a command line gives, over the recipe of the data, over the paper's. Raises UserError."""
    given = read_options(
        Config, argv, usage="[torchrun] clever.py [options]", prog="clever.py",
        description="Train CLeVER or DINO. The defaults are the paper's recipe for a folder of images; "
        "cifar10, cifar100 and patterns have their own.")
    if given.get("resume"):
        cfg = resumed_config(given)
    else:
        recipe = given.get("recipe", "auto")
        if recipe == "auto":
            data = given.get("data", "patterns")
            recipe = dict(patterns="demo", cifar10="cifar", cifar100="cifar").get(data, "paper")
        ratio = {"ratio": 1.0} if given.get("method") == "dino" else {}
        cfg = Config(**{**RECIPES.get(recipe, {}), **ratio, **given})
    check(cfg)
    return cfg


def load_config(out) -> Config:
    """The configuration of a run, from its folder. Raises UserError if it holds none."""
    try:
        return Config(**as_options(json.loads((Path(out) / "config.json").read_text())))
    except (OSError, ValueError, TypeError, AttributeError) as e:
        raise UserError(f"{out} holds no run ({e}); name the --out of one")


def resumed_config(given: dict) -> Config:
    """The configuration of the run in --out. Raises UserError if there is none or a given option differs."""
    if not given.get("out"):
        raise UserError("--resume needs --out, the folder of the run to go on with")
    saved = load_config(given["out"])
    for name, value in given.items():
        if name not in MAY_CHANGE and value != getattr(saved, name):
            raise UserError(f"{flag(name)} {value} differs from the run's {getattr(saved, name)}; leave it "
                            "out, or start a new run in another --out")
    return dataclasses.replace(saved, **given)


# ======== 2. Augmentation: every geometric one is a change of coordinates; compose them, then sample once

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as the field normalises
BLUR_RADIUS = 6  # pixels: 3 times the largest sigma


def seed_of(*key) -> int:
    """A seed that is a function of the key (seed, step, ...) alone."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


def generator(device, *key) -> torch.Generator:
    """A random generator with the seed of the key."""
    return torch.Generator(device).manual_seed(seed_of(*key))


def warp(images, size, box, flip, angle, shift=None):
    """One view of each image, sampled once through a composed change of coordinates: the paper's t, explicit.

    images (B, 3, S, S); size of the view in pixels; box (B, 4), the crop's centre x, y and half extents x, y
    in the image's [-1, 1] coordinates; flip (B,) bool; angle (B,) in degrees, counter-clockwise; shift (B,
    size, size, 2) in the view's [-1, 1] coordinates, or None. Black outside the crop: (B, 3, size, size)."""
    axis = (torch.arange(size, device=images.device, dtype=images.dtype) * 2 + 1) / size - 1
    point = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)[None]  # (1, s, s, 2): output pixels
    inside = True
    if shift is not None:
        point = point + shift  # elastic deformation
        inside = (point.abs() <= 1).all(-1)  # (B, s, s)
    x, y = point.unbind(-1)  # each (B or 1, s, s)
    cos, sin = angle.deg2rad().cos()[:, None, None], angle.deg2rad().sin()[:, None, None]
    x, y = cos * x - sin * y, sin * x + cos * y  # rotation
    inside = inside & (x.abs() <= 1) & (y.abs() <= 1)  # corners stay black
    x = torch.where(flip[:, None, None], -x, x)  # flip
    cx, cy, hx, hy = box.to(images.dtype)[:, :, None, None].unbind(1)  # each (B, 1, 1)
    grid = torch.stack([cx + hx * x, cy + hy * y], -1)  # crop: (B, s, s, 2)
    view = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return view * inside[:, None]


def gaussian_matrix(size, sigma, radius):
    """Matrices M: M X Mᵀ is a blurred image X, mirrored at its ends. sigma (B,) in px -> (B, size, size)."""
    tap = torch.arange(-radius, radius + 1, device=sigma.device)  # as torchvision's gaussian_blur
    weight = torch.exp(-0.5 * (tap / sigma[:, None]) ** 2)  # (B, 2 radius + 1)
    weight = weight / weight.sum(1, keepdim=True)
    source = torch.arange(size, device=sigma.device)[:, None] + tap  # (size, 2 radius + 1)
    source = (size - 1) - ((size - 1) - source.abs()).abs()  # mirrored into 0 .. size-1
    matrix = sigma.new_zeros(len(sigma), size, size)
    return matrix.scatter_add_(2, source.expand(len(sigma), -1, -1), weight[:, None].expand(-1, size, -1))


def elastic_shift(noise, alpha, sigma):
    """torchvision's ElasticTransform: noise in [-1, 1] (B, 2, s, s) -> displacements (B, s, s, 2) in [-1, 1]
    coordinates; alpha: their strength, sigma: their smoothness, both in pixels."""
    size = noise.shape[-1]
    radius = min(size - 1, int(4 * sigma + 0.5))
    smooth = gaussian_matrix(size, torch.full((1,), sigma, dtype=noise.dtype, device=noise.device), radius)
    return (smooth @ noise @ smooth.mT).permute(0, 2, 3, 1) * (alpha / size)


def gray(x):
    """Luma of RGB images: (B, 3, h, w) -> (B, 1, h, w)."""
    return (0.2989 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2])[:, None]


def shift_hue(x, turn):
    """Turn the hue of images (B, 3, h, w) by turn (B,) of a circle, as torchvision's adjust_hue."""
    r, g, b = x.unbind(1)  # each (B, h, w)
    value, chroma = x.amax(1), x.amax(1) - x.amin(1)
    safe = torch.where(chroma == 0, 1, chroma)
    hue = torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe)
    hue = torch.where(value == r, (g - b) / safe, hue) + 6 * turn[:, None, None]  # in sixths of the circle
    shares = [(hue + offset) % 6 for offset in (5, 3, 1)]  # of red, green, blue
    return torch.stack([value - chroma * torch.minimum(k, 4 - k).clamp(0, 1) for k in shares], 1)


def adjust(x, operation, factor):
    """Brightness (0), contrast (1), saturation (2) or hue (3) of images (B, 3, h, w) by factors (B,)."""
    def blend(other):
        return torch.lerp(other, x, factor[:, None, None, None]).clamp(0, 1)
    return (blend(x.new_zeros(())) if operation == 0 else
            blend(gray(x).mean((1, 2, 3), keepdim=True)) if operation == 1 else
            blend(gray(x)) if operation == 2 else shift_hue(x, factor))


def color_jitter(x, brightness, contrast, saturation, hue, order=(0, 1, 2, 3), adjust=adjust):
    """torchvision's ColorJitter on a batch, with factors (B,) for each image: 1, 1, 1, 0 change nothing."""
    for operation in order:
        x = adjust(x, operation, (brightness, contrast, saturation, hue)[operation])
    return x


def normalize(x):
    """Subtract ImageNet's mean and divide by its standard deviation: (B, 3, h, w), channel by channel."""
    return torch.stack([(x[:, c] - MEAN[c]) / STD[c] for c in range(3)], 1)


def finish(x, grayed, sigma, solarized):
    """Grey, blur (none where sigma is None), solarise, normalise: grayed, solarized (B,) bool, sigma (B,)."""
    x = torch.where(grayed[:, None, None, None], gray(x), x)
    if sigma is not None:
        matrix = gaussian_matrix(x.shape[-1], sigma, BLUR_RADIUS)[:, None].to(x.dtype)  # (B, 1, size, size)
        x = matrix @ x @ matrix.mT
    return normalize(torch.where(solarized[:, None, None, None] & (x >= 0.5), 1 - x, x))


class MultiCrop(nn.Module):
    """V views of each image (2 global, then local), made on the batch, on the device (paper, section 4).

    All random numbers are a function of (seed, step), drawn for the global batch and sliced by rank."""

    def __init__(self, cfg: Config, rank=0, world=1):
        super().__init__()
        self.cfg, self.rank, self.world = cfg, rank, world
        compiled = partial(torch.compile, dynamic=True) if cfg.compile else lambda f: f
        self.warp, self.adjust, self.finish = map(compiled, (warp, adjust, finish))

    def draw(self, view: int, batch: int, gen) -> dict:
        """The random parameters of one view of `batch` images, each a tensor with that many rows."""
        def between(low, high, *shape):
            return low + (high - low) * torch.rand(*shape, batch, generator=gen, device=gen.device)

        def chance(p):
            return between(0, 1) < p
        cfg, jitter = self.cfg, chance(0.8)
        blur = chance((1.0, 0.1, 0.5)[min(view, 2)] * cfg.blur)
        return dict(
            area=between(*(cfg.global_scale if view < 2 else cfg.local_scale), 10).T,  # (B, 10): 10 tries
            ratio=between(math.log(3 / 4), math.log(4 / 3), 10).exp().T,  # width / height, in pixels
            place=between(0, 1, 2).T,  # (B, 2): x, y of the crop
            flip=chance(0.5),
            angle=between(-90, 90) * (cfg.aug != "baug"),
            elastic=chance(0.5 * (cfg.aug == "caug+")),
            brightness=torch.where(jitter, between(0.6, 1.4), 1),
            contrast=torch.where(jitter, between(0.6, 1.4), 1),
            saturation=torch.where(jitter, between(0.8, 1.2), 1),
            hue=torch.where(jitter, between(-0.1, 0.1), 0),
            gray=chance(0.2),
            sigma=torch.where(blur, between(0.1, 2.0), 1e-3),  # 1e-3: no blur at all
            solarize=chance(0.2 * (view == 1)))

    @staticmethod
    def crop_box(area, ratio, place, aspect):
        """Boxes of random resized crops (torchvision's rule: 10 tries, then the centre): (B, 4) for `warp`.

        area, ratio (B, 10), place (B, 2) of `draw`; aspect (B,), width / height of the original image."""
        w = (area * ratio / aspect[:, None]).sqrt()  # (B, 10), of the width
        h = (area / ratio * aspect[:, None]).sqrt()  # (B, 10), of the height
        fits = (w <= 1) & (h <= 1)
        any_fits, first = fits.any(1, keepdim=True), fits.int().argmax(1, keepdim=True)  # (B, 1)
        drawn = torch.cat([w.gather(1, first), h.gather(1, first)], 1)  # (B, 2)
        inner = aspect.clamp(3 / 4, 4 / 3) / aspect  # centre crop of nearest ratio
        fallback = torch.stack([inner.clamp(max=1), (1 / inner).clamp(max=1)], 1)  # (B, 2)
        half = torch.where(any_fits, drawn, fallback)
        return torch.cat([torch.where(any_fits, (2 * place - 1) * (1 - half), 0), half], 1)

    def make_view(self, images, size, p, order, noise=None):
        """One view from its parameters p: images (B, 3, S, S) in [0, 1] -> (B, 3, size, size), normalised."""
        shift = None
        if noise is not None:
            scale = size / 224  # alpha 100, sigma 5 at 224 px
            shift = elastic_shift(noise, 100 * scale, 5 * scale) * p["elastic"][:, None, None, None]
        x = self.warp(images, size, p["box"], p["flip"], p["angle"], shift)
        factors = (p[name] for name in ("brightness", "contrast", "saturation", "hue"))
        x = color_jitter(x, *factors, order, self.adjust)
        return self.finish(x, p["gray"], p["sigma"] if self.cfg.blur else None, p["solarize"])

    @torch.no_grad()
    def forward(self, images, aspect, step):
        """This rank's images (B, 3, S, S) of bytes, aspect (B,) -> a list of V views (B, 3, size, size)."""
        cfg, batch = self.cfg, len(images)
        total, mine = batch * self.world, slice(self.rank * batch, (self.rank + 1) * batch)
        gen = generator(images.device, cfg.seed, "views", step)
        orders = random.Random(f"{cfg.seed} {step}")  # known without asking the device
        images, views, noise = images.to(torch.float32) / 255, [], None
        for view in range(2 + cfg.local_views):
            size = cfg.global_size if view < 2 else cfg.local_size
            p = {k: v[mine] for k, v in self.draw(view, total, gen).items()}
            p["box"] = self.crop_box(p["area"], p["ratio"], p["place"], aspect)
            if cfg.aug == "caug+":
                noise = torch.rand(total, 2, size, size, generator=gen, device=images.device)[mine] * 2 - 1
            views.append(self.make_view(images, size, p, orders.sample(range(4), 4), noise))
        return views


# ======== 3. Backbones: parameter names are timm's (ViT), torchvision's (ResNet) and the original's (VMamba)

#  arch: blocks, heads, patch, std of the weights (0.02 leaves the blocks of a narrow ViT nearly linear)
VIT = dict(vit_micro=(4, 3, 8, 0.06), vit_tiny=(12, 3, 16, 0.02), vit_small=(12, 6, 16, 0.02),
           vit_base=(12, 12, 16, 0.02))


def init_linear(module, std=0.02):
    """Truncated-normal weights and zero biases in all linear layers of a module."""
    for m in module.modules():
        if isinstance(m, nn.Linear):
            nn.init.trunc_normal_(m.weight, std=std)
            if m.bias is not None:
                nn.init.zeros_(m.bias)


class Attention(nn.Module):
    """Multi-head self-attention: (B, N, D) -> (B, N, D)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def project(self, x):
        """Queries, keys and values, each (B, h, N, D/h)."""
        return self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x):
        x = F.scaled_dot_product_attention(*self.project(x))  # (B, h, N, D/h)
        return self.proj(x.transpose(1, 2).flatten(2))  # (B, N, h, D/h) -> (B, N, D)


class Block(nn.Module):
    """Pre-norm transformer block with stochastic depth: (B, N, D) -> (B, N, D)."""

    def __init__(self, dim, heads, drop_path):
        super().__init__()
        self.drop_path = drop_path
        self.norm1, self.attn = nn.LayerNorm(dim, 1e-6), Attention(dim, heads)
        self.norm2, fc1, fc2 = nn.LayerNorm(dim, 1e-6), nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.mlp = nn.Sequential(OrderedDict(fc1=fc1, act=nn.GELU(), fc2=fc2))

    def forward(self, x):
        x = x + stochastic_depth(self.attn(self.norm1(x)), self.drop_path, "row", self.training)
        return x + stochastic_depth(self.mlp(self.norm2(x)), self.drop_path, "row", self.training)


class VisionTransformer(nn.Module):
    """ViT (arXiv 2010.11929) for images that the patch divides: (B, 3, H, W) -> CLS token (B, D)."""

    def __init__(self, img_size, patch_size, embed_dim, depth, heads, drop_path=0.0, init_std=0.02):
        super().__init__()
        self.embed_dim, self.patch_size = embed_dim, patch_size
        self.patch_embed = nn.ModuleDict(dict(proj=nn.Conv2d(3, embed_dim, patch_size, patch_size)))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (img_size // patch_size) ** 2, embed_dim))
        rates = torch.linspace(0, drop_path, depth).tolist()
        self.blocks = nn.ModuleList(Block(embed_dim, heads, rate) for rate in rates)
        self.norm = nn.LayerNorm(embed_dim, 1e-6)
        for p in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(p, std=init_std)
        init_linear(self, init_std)

    def positions(self, h, w):
        """Position embeddings, interpolated to h x w patches: (1, h*w, D)."""
        pos = self.pos_embed[:, 1:]  # (1, n, D)
        side = math.isqrt(pos.shape[1])
        if (h, w) == (side, side):
            return pos
        # a matrix product, for torch's interpolation has no deterministic backward on a GPU
        unit = torch.eye(side ** 2, dtype=pos.dtype, device=pos.device).view(1, -1, side, side)  # n channels
        weight = F.interpolate(unit, size=(h, w), mode="bicubic").flatten(2)  # (1, n, h*w)
        with torch.autocast(pos.device.type, enabled=False):
            return weight.mT @ pos

    def tokens(self, x):
        """Images (B, 3, H, W) -> tokens (B, 1 + N, D), CLS first."""
        x = self.patch_embed.proj(x)  # (B, D, h, w)
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)  # (B, 1, D)
        return torch.cat([cls, x.flatten(2).mT + self.positions(*x.shape[2:])], 1)  # (B, 1 + h*w, D)

    def get_intermediate_layers(self, x, n=1):
        """The normalised tokens after each of the last n blocks: a list of n tensors (B, 1 + N, D)."""
        x, layers = self.tokens(x), []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i >= len(self.blocks) - n:
                layers.append(self.norm(x))
        return layers

    def get_last_selfattention(self, x):
        """Attention weights of the last block: (B, heads, 1 + N, 1 + N); row 0 is the CLS token's."""
        x, last = self.tokens(x), self.blocks[-1]
        for block in self.blocks[:-1]:
            x = block(x)
        q, k, _ = last.attn.project(last.norm1(x))  # each (B, h, 1 + N, D/h)
        return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)

    def forward(self, x):
        return self.get_intermediate_layers(x)[0][:, 0]


# VMamba-Tiny, arXiv 2401.10166; its scan goes back to Mamba, arXiv 2312.00752. B batch, D channels, H, W map,
# L = H W, K = 4 scan directions, R rank of the time step. Maps are channel last, (B, H, W, D). Sequences are
# cut in S chunks of T steps, about sqrt(L) each, the last one filled up with zeros.


def chunking(H, W):
    """Steps T of a chunk and the number S of chunks of a sequence of H W steps."""
    T = math.isqrt(H * W - 1) + 1  # ceil(sqrt(L))
    return T, -(-H * W // T)  # T, S


def cross_scan(x):
    """Reads a map (B, H, W, D), or one per direction (B, H, W, K, D), in 4 directions. -> (B, K, S T, D)."""
    x = x.unsqueeze(3).expand(-1, -1, -1, 4, -1) if x.dim() == 4 else x  # (B, H, W, K, D)
    (B, H, W, K, D), (T, S) = x.shape, chunking(*x.shape[1:3])
    s = x.new_empty(B, K, S * T, D, dtype=torch.promote_types(x.dtype, torch.float32))  # halves to fp32
    s[:, :, H * W:] = 0
    s0, s1, s2, s3 = s[:, :, :H * W].unbind(1)  # (B, L, D) each
    s0.view(B, H, W, D).copy_(x[:, :, :, 0])  # right, then down
    s1.view(B, W, H, D).copy_(x[:, :, :, 1].transpose(1, 2))  # down, then right
    s2.view(B, H, W, D).copy_(x[:, :, :, 2].flip(1, 2))  # the reverse of 0
    s3.view(B, W, H, D).copy_(x[:, :, :, 3].flip(1, 2).transpose(1, 2))  # the reverse of 1
    return s


def cross_unscan(y, H, W):
    """Undoes `cross_scan`; the sum is the cross merge. (B, K, S T, D) -> K maps (B, H, W, D)."""
    y0, y1, y2, y3 = y[:, :, :H * W].unbind(1)  # (B, L, D) each
    return (y0.unflatten(1, (H, W)), y1.unflatten(1, (W, H)).transpose(1, 2),
            y2.unflatten(1, (H, W)).flip(1, 2), y3.unflatten(1, (W, H)).transpose(1, 2).flip(1, 2))


def chunk_starts(a, b, chunks):
    """h_t = a_t h_(t-1) + b_t on entering each chunk. a, b: T steps of all chunks (B, K, S, D) -> same."""
    g, P = b[0], a[0]  # the state when h = 0 on entering, the product of a; of all chunks at once
    for a_t, b_t in zip(a[1:], b[1:]):
        g, P = torch.addcmul(b_t, a_t, g), P * a_t
    c = torch.zeros_like(g)
    for s, after in zip(chunks, chunks[1:]):  # c_(s+1) = g_s + P_s c_s
        torch.addcmul(g[:, :, s], P[:, :, s], c[:, :, s], out=c[:, :, after])
    return c


def chunk_scan_(a, b, h):
    """h_t = a_t h_(t-1) + b_t from h on entering each chunk, all chunks at once. b becomes h."""
    for a_t, b_t in zip(a, b):
        h = b_t.addcmul_(a_t, h)


class SelectiveScan(torch.autograd.Function):
    """Selective scan (Mamba, 2312.00752; one state per channel) in the 4 directions of VMamba (2401.10166).

    v (B, H, W, D), p (B, H, W, K, R + 2) with r | B | C, dt_weight (K, D, R), dt_bias (K, D), A_logs (K D, 1)
    -> z (B, H, W, D), float32 (or float64): the cross merge of y_t = C_t h_t where, u = v in its order,
        h_t = exp(delta_t A) h_(t-1) + delta_t B_t u_t,  delta_t = softplus(dt_weight r_t + dt_bias),
        A = -exp(A_logs).
    Kept for the backward: the inputs and h at the chunk starts. All else is computed again."""

    @staticmethod
    def time_step(r, dt_weight, dt_bias, out=None):  # r (B, K, S T, R) -> (B, K, S T, D)
        return torch.matmul(r, dt_weight.to(r.dtype).mT, out=out).add_(dt_bias[:, None].to(r.dtype))

    @staticmethod
    def softplus(q):
        if q.device.type != "cpu":
            return F.softplus(q)
        e = q.abs().neg_().exp_()  # the same to rounding; torch's is four times as slow on a CPU
        w = e + 1
        log1p = w.log().add_(e.sub_(w.sub_(1)))  # log w, and what w = 1 + e was rounded by
        return log1p.add_(q.clamp_(min=0))

    @staticmethod
    def discretise(v, p, dt_weight, dt_bias, A_logs):
        r, B, C = cross_scan(p).split([p.shape[4] - 2, 1, 1], 3)  # (B, K, S T, R), (B, K, S T, 1) twice
        delta = SelectiveScan.softplus(SelectiveScan.time_step(r, dt_weight, dt_bias))  # (B, K, S T, D)
        A = -A_logs.to(r.dtype).exp().view(p.shape[3], 1, -1)  # (K, 1, D)
        steps = lambda x: x.unflatten(2, chunking(*v.shape[1:3])[::-1]).unbind(3)  # -> T views (B, K, S, D)
        return r, B, C, delta, A, (delta * A).exp_(), cross_scan(v).mul_(delta).mul_(B), steps

    @staticmethod
    def forward(ctx, v, p, dt_weight, dt_bias, A_logs):
        with torch.autocast(v.device.type, enabled=False):
            _, _, C, _, _, a, h, steps = SelectiveScan.discretise(v, p, dt_weight, dt_bias, A_logs)
            a, b = steps(a), steps(h)
            c = chunk_starts(a, b, range(b[0].shape[2]))  # (B, K, S, D)
            chunk_scan_(a, b, c)  # h = delta B u becomes h
            ctx.save_for_backward(v, p, dt_weight, dt_bias, A_logs, c)
            return reduce(torch.add, cross_unscan(h.mul_(C), *v.shape[1:3]))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dz):
        v, p, dt_weight, dt_bias, A_logs, c = ctx.saved_tensors
        with torch.autocast(v.device.type, enabled=False):
            r, B, C, delta, A, a, h, steps = SelectiveScan.discretise(v, p, dt_weight, dt_bias, A_logs)
            chunk_scan_(steps(a), steps(h), c)  # (B, K, S T, D)
            dy = cross_scan(dz)  # (B, K, S T, D)
            dC = torch.stack([(dy[:, k] * h[:, k]).sum(2, True) for k in range(p.shape[3])], 1)
            # gamma_t = C_t dy_t + a_(t+1) gamma_(t+1): the same scan from the end, a of the next step
            gamma = dy.mul_(C)
            a_next = [*steps(a)[1:], F.pad(steps(a)[0][:, :, 1:], (0, 0, 0, 1))][::-1]
            back = steps(gamma)[::-1]
            chunk_scan_(a_next, back, chunk_starts(a_next, back, range(c.shape[2])[::-1]))
            for a_t, h_before in zip(steps(a), (c, *steps(h))):
                a_t.mul_(h_before)  # a_t h_(t-1), in the place of a
            u = cross_scan(v)
            dq = torch.mul(u, B, out=h).addcmul_(a, A).mul_(gamma)  # ddelta = gamma (B u + A a h_(t-1))
            gamma.mul_(delta)
            dB = u.mul_(gamma).sum(3, keepdim=True)  # (B, K, S T, 1)
            dA = a.mul_(gamma).sum((0, 2))  # (K, D)
            dv = reduce(torch.add, cross_unscan(gamma.mul_(B), *v.shape[1:3]))  # (B, H, W, D)
            dq.mul_(SelectiveScan.time_step(r, dt_weight, dt_bias, out=u).sigmoid_())  # (B, K, S T, D)
            dp = torch.cat([torch.matmul(dq, dt_weight.to(dq.dtype)), dB, dC], 3)  # (B, K, S T, R + 2)
            dp = torch.stack(cross_unscan(dp, *v.shape[1:3]), 3)  # (B, H, W, K, R + 2)
            dw = torch.matmul(dq.mT, r).sum(0)  # (K, D, R)
            grads = dv, dp, dw, dq.sum((0, 2)), (A[:, 0] * dA).view_as(A_logs)
            return tuple(g.to(x.dtype) for g, x in zip(grads, ctx.saved_tensors))


selective_scan = torch.compiler.disable(SelectiveScan.apply)  # torch.compile would unroll the loops


def recompute(x, cheap, linear):
    """linear(cheap(x)), keeping x alone: the backward computes cheap(x) again, but not the matrix product."""
    return checkpoint(lambda x: linear(cheap(x)), x, use_reentrant=False, preserve_rng_state=False)


class SS2D(nn.Module):
    """The 2-D selective scan operator of VMamba (2401.10166), no gate. (B, H, W, D) -> (B, H, W, D)."""

    def __init__(self, dim, K=4):
        super().__init__()
        R = math.ceil(dim / 16)
        self.x_proj_weight = nn.Parameter(torch.empty(K, R + 2, dim).uniform_(-dim ** -0.5, dim ** -0.5))
        self.dt_projs_weight = nn.Parameter(torch.empty(K, dim, R).uniform_(-R ** -0.5, R ** -0.5))
        t = torch.empty(K, dim).uniform_(math.log(0.001), math.log(0.1)).exp()  # softplus(bias), log-uniform
        self.dt_projs_bias = nn.Parameter(t + torch.log(-torch.expm1(-t)))
        self.A_logs = nn.Parameter(torch.zeros(K * dim, 1))
        self.Ds = nn.Parameter(torch.ones(K * dim))
        self.out_norm = nn.LayerNorm(dim)
        self.in_proj = nn.Linear(dim, dim, bias=False)
        self.conv2d = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x, norm=nn.Identity()):
        """SS2D(norm(x)): (B, H, W, D) -> (B, H, W, D); `norm` is the block's."""
        t = recompute(x, norm, self.in_proj).permute(0, 3, 1, 2)  # (B, D, H, W)
        v = F.silu(self.conv2d(t)).permute(0, 2, 3, 1)  # (B, H, W, D)
        # a projection sees one pixel, so it may come before the cross scan: v is kept once, not 4 times
        p = F.linear(v, self.x_proj_weight.flatten(0, 1))  # (B, H, W, K (R + 2))
        p = p.unflatten(3, self.x_proj_weight.shape[:2])  # (B, H, W, K, R + 2)
        z = selective_scan(v, p, self.dt_projs_weight, self.dt_projs_bias, self.A_logs)
        z = z + self.Ds.view(p.shape[3], -1).sum(0) * v  # likewise: the merge of all Ds_k s_k
        return recompute(z, lambda z: self.out_norm(z).to(v.dtype), self.out_proj)


class VSSBlock(nn.Module):
    """Block of VMamba (2401.10166): x + SS2D(norm(x)), then x + MLP(norm2(x)). (B, H, W, D) kept."""

    def __init__(self, dim, drop_path):
        super().__init__()
        self.drop_path = drop_path
        self.norm, self.op, self.norm2 = nn.LayerNorm(dim), SS2D(dim), nn.LayerNorm(dim)
        self.mlp = nn.ModuleDict(dict(fc1=nn.Linear(dim, 4 * dim), fc2=nn.Linear(4 * dim, dim)))

    def forward(self, x):
        x = x + stochastic_depth(self.op(x, self.norm), self.drop_path, "row", self.training)
        t = recompute(recompute(x, self.norm2, self.mlp.fc1), F.gelu, self.mlp.fc2)
        return x + stochastic_depth(t, self.drop_path, "row", self.training)


class PaddedConv2d(nn.Conv2d):
    """Conv2d that pads by 1 itself: with padding=1 torch's bf16 weight gradient on a CPU is undefined at taps
    that meet padding alone, as on a map of one pixel."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias, self.stride)


class VMamba(nn.Module):
    """VMamba-Tiny (2401.10166), no head: (B, 3, any height, any width) -> (B, dims[-1])."""

    def __init__(self, drop_path=0.2, dims=(96, 192, 384, 768), depths=(2, 2, 8, 2)):
        super().__init__()
        self.embed_dim, half = dims[-1], dims[0] // 2
        # names and order of parameters are the original's; Permute stands for its parameter-free layers
        first, last = Permute([0, 3, 1, 2]), Permute([0, 2, 3, 1])  # the channels
        conv = partial(PaddedConv2d, kernel_size=3, stride=2)
        self.patch_embed = nn.Sequential(conv(3, half), last, nn.LayerNorm(half), first, nn.GELU(),
                                         conv(half, dims[0]), last, nn.LayerNorm(dims[0]))
        rates = iter(torch.linspace(0, drop_path, sum(depths), device="cpu").tolist())
        self.layers = nn.Sequential()
        for dim, wider, depth in zip(dims, (*dims[1:], None), depths):
            stage = OrderedDict(blocks=nn.Sequential(*(VSSBlock(dim, next(rates)) for _ in range(depth))))
            if wider:
                stage["downsample"] = nn.Sequential(first, conv(dim, wider), last, nn.LayerNorm(wider))
            self.layers.append(nn.Sequential(stage))
        self.classifier = nn.Sequential(OrderedDict(norm=nn.LayerNorm(dims[-1])))
        init_linear(self)

    def forward(self, x):
        return self.classifier(self.layers(self.patch_embed(x))).mean((1, 2))  # (B, H, W, D) -> (B, D)


def build_backbone(arch: str, img_size: int, patch_size: int = 0, drop_path: float = 0.0) -> nn.Module:
    """A backbone f with .embed_dim: (B, 3, H, W) -> (B, D). img_size: side of the global views in pixels."""
    if arch in VIT:
        depth, heads, patch, std = VIT[arch]
        return VisionTransformer(img_size, patch_size or patch, EMBED_DIM[arch], depth, heads, drop_path, std)
    if arch == "vmamba_tiny":
        return VMamba(drop_path=2 * drop_path)  # its authors' 0.2 where ViTs have 0.1
    net = getattr(torchvision.models, arch)()
    net.fc, net.embed_dim = nn.Identity(), EMBED_DIM[arch]
    if img_size <= 64:  # keep the resolution of small images
        net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    return net.to(memory_format=torch.channels_last)


# ======== 4. Split and heads


def split(z, ratio):
    """z (..., D) -> IR z[:d], EF z[d:], d = int(ratio * D) (paper, section 3). The one place that splits."""
    d = int(ratio * z.shape[-1])
    return z[..., :d], z[..., d:]


class Cosines(torch.autograd.Function):
    """x (..., d), w (K, d) -> (..., K), x · w_k / ‖w_k‖: a weight-normalised linear map of gain 1.

    By hand, for w may be 65,536 prototypes: neither pass makes a normalised copy of it."""

    @staticmethod
    def forward(ctx, x, w):
        norm, w_x = torch.linalg.vector_norm(w, dim=1), w.to(x.dtype)  # (K,), (K, d)
        cos = (x @ w_x.mT).div_(norm)  # (..., K)
        ctx.save_for_backward(x, w, w_x, norm, cos)
        return cos

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d):
        x, w, w_x, norm, cos = ctx.saved_tensors
        d, x_rows = d.div(norm).to(x.dtype).flatten(0, -2), x.flatten(0, -2)  # (N, K), (N, d)
        along = wide(d * cos.flatten(0, -2)).sum(0) / norm  # (K,): of the gradient, what is along w
        dw = (d.mT @ x_rows).to(w.dtype).addcmul_(along[:, None], w, value=-1)  # (K, d)
        return (d @ w_x).view_as(x), dw


class ProjectionHead(nn.Module):
    """h (DINO's): cosines to out_dim prototypes, the rows of a weight-normalised last layer of gain 1."""

    def __init__(self, in_dim, out_dim=65536, hidden_dim=2048, bottleneck_dim=256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(in_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, hidden_dim),
                                 nn.GELU(), nn.Linear(hidden_dim, bottleneck_dim))
        self.prototypes = nn.Linear(bottleneck_dim, out_dim, bias=False)
        init_linear(self)

    def forward(self, x):
        """(N, in_dim) -> (N, out_dim)."""
        x = self.mlp(x)
        return Cosines.apply(F.normalize(x, dim=-1).to(x.dtype), self.prototypes.weight)


class CLeVER(nn.Module):
    """Backbone f and heads h_IR, h_EF: a student or a teacher. With ratio 1 there is no h_EF: DINO."""

    def __init__(self, cfg: Config, drop_path=0.0):
        super().__init__()
        self.ratio = cfg.ratio
        self.backbone = build_backbone(cfg.arch, cfg.global_size, cfg.patch_size, drop_path)
        D, widths = self.backbone.embed_dim, (cfg.hidden_dim, cfg.bottleneck_dim)
        d = int(self.ratio * D)
        self.head_ir = ProjectionHead(d, cfg.out_dim, *widths)
        self.head_ef = ProjectionHead(D - d, cfg.ef_out_dim or cfg.out_dim, *widths) if d < D else None

    def embed(self, views):
        """V views (B, 3, h, w), equal sizes side by side -> z (V, B, D), one forward for each size."""
        sizes = [v.shape[-1] for v in views]
        groups = [torch.cat([v for v in views if v.shape[-1] == s]) for s in dict.fromkeys(sizes)]
        z = torch.cat([self.backbone(g) for g in groups])  # (V*B, D)
        return z.unflatten(0, (len(views), -1))  # (V, B, D)

    def project(self, z):
        """z (V, B, D) -> logits (V, B, K) of IR and (V, B, K') of EF (None without one)."""
        ir, ef = split(z, self.ratio)
        return self.head_ir(ir), None if self.head_ef is None else self.head_ef(ef)

    def forward(self, views):
        """A list of V views -> (ir_logits (V, B, K), ef_logits (V, B, K') or None)."""
        return self.project(self.embed(views))


# ======== 5. Losses (paper, section 3.3), as pure functions of logits and parameters


def wide(x):
    """Half precision to float32; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def sharpen(teacher, centre, temp):
    """The teacher's distributions P = softmax((logits - c) / temp) without gradient: (..., K) -> (..., K)."""
    return F.softmax((wide(teacher.detach()) - centre.detach()) / temp, -1)


def mean_over_pairs(term, student, teacher):
    """Mean of term(P_i, logits_j) over the global views i and all views j != i, in one pass over the views.

    student (V, B, K): logits; teacher (G, B, K): P of the first G views; term: (G', B, K), (B, K) -> (G', B).
    The backward computes a view's term again, so that never more than one view's softmax is in memory."""
    (V, B, _), G = student.shape, len(teacher)

    def of_view(logits, j):
        others = teacher if j >= G else torch.cat([teacher[:j], teacher[j + 1:]])  # all i != j
        return term(others, wide(logits)).sum()
    again = dict(use_reentrant=False, preserve_rng_state=False)
    total = sum(checkpoint(of_view, view, j, **again) for j, view in enumerate(student.unbind()))
    return total / ((V - 1) * G * B)


def invariance_loss(student, teacher, centre, student_temp=0.1, teacher_temp=0.04):
    """L_CL: mean of -P_i · log Q_j; views of one image agree in IR. It is DINO's loss.

    student (V, B, K), teacher (G, B, K): logits of h_IR, the teacher's of the first G views; centre (K,)."""
    def cross_entropy(P, logits):
        return -torch.einsum("gbk,bk->gb", P, F.log_softmax(logits / student_temp, -1))
    return mean_over_pairs(cross_entropy, student, sharpen(teacher, centre, teacher_temp))


def orthogonality_loss(student, teacher, centre, student_temp=0.1, teacher_temp=0.04):
    """L_Orth: mean of |cos(P'_i, Q'_j)|; views of one image differ in EF. Arguments as of L_CL, from h_EF."""
    def cosine(P, logits):  # the paper's |.| changes nothing here: softmaxes are not negative
        Q = F.softmax(logits / student_temp, -1)  # (B, K)
        return (torch.einsum("gbk,bk->gb", P, Q) / (P.norm(dim=-1) * Q.norm(dim=-1))).abs()
    return mean_over_pairs(cosine, student, sharpen(teacher, centre, teacher_temp))


class SumOfSquares(torch.autograd.Function):
    """‖p‖² in one pass over p and one in the backward, where autograd takes three."""

    @staticmethod
    def forward(ctx, p):
        ctx.save_for_backward(p)
        return torch.linalg.vector_norm(p) ** 2

    @staticmethod
    def backward(ctx, d):
        return 2 * d * ctx.saved_tensors[0]


def projector_regularization(head_ir, head_ef):
    """L_PReg: |Σ‖θ‖² over h_IR - Σ‖θ‖² over h_EF| of two heads (modules): neither wins by growing."""
    ir, ef = (sum(SumOfSquares.apply(p) for p in head.parameters()) for head in (head_ir, head_ef))
    return (ir - ef).abs()


def clever_loss(cfg, student_logits, teacher_logits, centres, heads):
    """L = L_CL + λ_orth L_Orth + λ_reg L_PReg: a dict of named terms, "loss" last. Without an EF, L = L_CL.

    student_logits, teacher_logits, centres, heads: pairs (of IR, of EF), as `CLeVER.forward` returns them."""
    temps = cfg.student_temp, cfg.teacher_temp
    ir, ef = zip(student_logits, teacher_logits, centres)
    terms = {"L_CL": invariance_loss(*ir, *temps)}
    loss = terms["L_CL"]
    if heads[1] is not None:
        terms["L_Orth"] = orthogonality_loss(*ef, *temps)
        terms["L_PReg"] = projector_regularization(*heads)
        loss = loss + cfg.lambda_orth * terms["L_Orth"] + cfg.lambda_reg * terms["L_PReg"]
    return {**terms, "loss": loss}


# ======== 6. Collapse is watched, not hoped against


def effective_rank(features) -> float:
    """RankMe (arXiv 2210.02885): exp of the entropy of the normalised singular values of features (N, d)."""
    s = torch.linalg.svdvals(features.double())
    p = s / s.sum() + 1e-7
    return float(torch.exp(-(p * p.log()).sum()))


def collapse_metrics(features, probabilities) -> dict:
    """The ways in which a part (IR or EF) can collapse, from features (N, d) and the teacher's P (N, K).

    entropy: mean of P's (ln K: uniform); kl_uniform: of the mean P from uniform (ln K: one prototype);
    std: of the normalised features, times √d (0: constant, about 1: healthy); rank: the effective rank."""
    P, mean = probabilities.double(), probabilities.double().mean(0)
    return dict(entropy=float(-torch.special.xlogy(P, P).sum(-1).mean()),
                kl_uniform=float(math.log(P.shape[-1]) + torch.special.xlogy(mean, mean).sum()),
                std=float(F.normalize(features.double(), dim=-1).std(0).mean() * features.shape[-1] ** 0.5),
                rank=effective_rank(features))


def collapse_alarm(part: str, m: dict, K: int) -> str:
    """One sentence when `collapse_metrics` of a part say collapse, with what to try; else an empty string."""
    # a uniform teacher is an alarm in IR alone: L_Orth has nothing against it (README, results)
    if part == "IR" and m["entropy"] > 0.99 * math.log(K):
        what, cure = "the teacher's output is uniform", "lower --teacher-temp or --lr, raise --freeze-epochs"
    elif m["kl_uniform"] > 0.95 * math.log(K):
        what, cure = "one prototype takes every image", "lower --centre-momentum or raise --teacher-temp"
    elif m["std"] < 0.1 or m["rank"] < 2:
        what, cure = "all images have nearly the same features", "lower --lr, raise --momentum or --batch"
    else:
        return ""
    return (f"COLLAPSE of {part}: {what} (entropy {m['entropy']:.2f} of at most {math.log(K):.2f}, "
            f"divergence of the mean {m['kl_uniform']:.2f}, std {m['std']:.3f}, "
            f"effective rank {m['rank']:.1f}). Try: {cure}.")


# ======== 7. Data: a worker decodes and squashes to a square of bytes; small data sits decoded on the device


def draw_patterns(count: int, seed: int, side: int = 32):
    """Two-tone periodic patterns of ten classes, none symmetric under a quarter turn.

    Returns bytes (count, 3, side, side) and labels. Random period, phase, duty and tilt of up to 10 degrees;
    nearly constant greys, for random ones are a shortcut that the network takes."""
    gen = generator("cpu", seed, "patterns")

    def between(low, high):  # (count, 1, 1)
        return low + (high - low) * torch.rand(count, 1, 1, generator=gen)
    axis = (torch.arange(2 * side) + 0.5) / 2 - side / 2  # drawn at twice the size
    y, x = torch.meshgrid(axis, axis, indexing="ij")  # y points down
    tilt, period = between(-10, 10).deg2rad(), between(8, 11)
    f = (x * tilt.cos() + y * tilt.sin()) / period + between(0, 1)  # (count, 2 side, 2 side)
    g = (y * tilt.cos() - x * tilt.sin()) / period * between(0.95, 1.05) + between(0, 1)
    duty, image = between(0.4, 0.48), torch.empty_like(f)
    patterns = [  # of the coordinates f, g in periods, a, b within one, and the duty d
        lambda a, b, f, g, d: b < d,  # stripes
        lambda a, b, f, g, d: (g + (2 * a - 1).abs() / 2) % 1 < d,  # zigzag
        lambda a, b, f, g, d: (2 * g % 1 > d / 2) & ((f + (2 * g % 2).floor() / 2) % 1 > d / 3),  # bricks
        lambda a, b, f, g, d: (g + 0.15 * torch.sin(2 * math.pi * f)) % 1 < d,  # waves
        lambda a, b, f, g, d: (b < d) & ((f + 0.5 * (g % 2).floor()) % 1 < 0.65),  # dashes
        lambda a, b, f, g, d: b > (2 * a - 1).abs() + 0.3 - d / 2,  # triangles
        lambda a, b, f, g, d: ((a - 0.5) / 0.45) ** 2 + ((b - 0.5) / (0.5 * d)) ** 2 < 1,  # flat ellipses
        lambda a, b, f, g, d: (b < d / 2) | ((b < 0.75) & ((2 * f) % 1 < d)),  # combs
        lambda a, b, f, g, d: ((g + (2 * a - 1).abs()) % 1 < d) & (a > 0.12) & (a < 0.88),  # chevrons
        lambda a, b, f, g, d: (g + 0.25 * ((2 * f) % 4).floor()) % 1 < d]  # steps
    for c, bright in enumerate(patterns):
        u, v = f[c::10], g[c::10]
        image[c::10] = bright(u % 1, v % 1, u, v, duty[c::10]).float()
    low, high = between(0.12, 0.14), between(0.86, 0.88)
    image = low + (high - low) * F.avg_pool2d(image[:, None], 2)[:, 0]  # (count, side, side)
    image = image + 0.02 * torch.randn(image.shape, generator=gen)
    pixels = (image.clamp(0, 1) * 255).byte()[:, None].expand(-1, 3, -1, -1).contiguous()
    return pixels, torch.arange(count) % 10


def decode(path, side: int):
    """Read an image file, turned as its EXIF says, squashed to bytes (3, side, side); its width / height."""
    with Image.open(path) as image:
        image.draft("RGB", (side, side))  # a JPEG decodes smaller, but no less
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):  # 16 bits: keep the upper 8
            image = image.point(lambda v: v / 256).convert("L")
        aspect = image.width / image.height
        pixels = torchvision.transforms.functional.pil_to_tensor(image.convert("RGB"))  # (3, H, W)
    return F.interpolate(pixels[None], (side, side), mode="bicubic", antialias=True)[0], aspect


class Images(Dataset):
    """One split of a data set, as files (`paths`) or in memory (`pixels`).

    Item i: bytes (3, S, S), width / height, i. A file that cannot be read is replaced by the next one that
    can, and i is returned as -1 - i."""

    def __init__(self, side, labels, classes, paths=None, pixels=None):
        self.side, self.labels, self.classes = side, torch.as_tensor(labels), classes
        self.paths, self.pixels, self.aspect, self.bad = paths, pixels, torch.ones(len(labels)), set()
        if pixels is not None and pixels.shape[-1] != side:
            self.pixels = F.interpolate(pixels, size=(side, side), mode="bicubic", antialias=True)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        for k in range(min(len(self), 100)):
            try:
                return *decode(self.paths[(i + k) % len(self)], self.side), i if k == 0 else -1 - i
            except Exception:  # whatever a broken file provokes
                continue
        return torch.zeros(3, self.side, self.side, dtype=torch.uint8), 1.0, -1 - i  # the epoch's end stops

    def keep(self, indices):
        """Reduce the split to these images, in this order."""
        self.labels, self.aspect = self.labels[indices], self.aspect[indices]
        if self.pixels is None:
            self.paths = [self.paths[i] for i in indices.tolist()]
        else:
            self.pixels = self.pixels[indices]

    def note_bad(self, indices):
        """Remember the images that could not be read; name each once."""
        for i in {-1 - i for i in indices if i < 0} - self.bad:
            self.bad.add(i)
            tqdm.write(f"warning: cannot read {self.paths[i]}, another image takes its place", sys.stderr)

    def stream(self, batches, device, workers):
        """Yield (bytes (B, 3, S, S), aspect (B,)) on the device for each list of indices."""
        if self.pixels is not None:
            for indices in batches:
                indices = torch.as_tensor(indices)
                if self.pixels.is_cuda:
                    indices = indices.pin_memory().to(device, non_blocking=True)
                yield self.pixels[indices].to(device), self.aspect[indices].to(device)
            return
        loader = DataLoader(self, batch_sampler=batches, num_workers=workers, worker_init_fn=quiet_worker,
                            pin_memory=device.type == "cuda")
        for pixels, aspect, indices in loader:
            self.note_bad(indices.tolist())
            yield pixels.to(device, non_blocking=True), aspect.float().to(device, non_blocking=True)

    def hold(self, device, workers, allowed=True):
        """Keep all images decoded in the device's memory, if they fill at most a quarter of it."""
        memory = (torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else
                  os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") //
                  int(os.environ.get("LOCAL_WORLD_SIZE", 1)))  # shared by a machine's processes
        if self.pixels is not None:
            self.pixels, self.aspect = self.pixels.to(device), self.aspect.to(device)
        elif allowed and len(self) * 3 * self.side ** 2 <= memory / 4:
            chunks = [range(i, min(i + 64, len(self))) for i in range(0, len(self), 64)]
            bar = tqdm(self.stream(chunks, device, workers), "decode", len(chunks), unit=" batches",
                       disable=not sys.stderr.isatty() or distributed()[0] > 0, leave=False)
            self.pixels, self.aspect = map(torch.cat, zip(*bar))


def quiet_worker(_):
    """A stop signal is for the main process: it finishes its step, with the data its workers still bring."""
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def load_images(data: str, split: str, side: int) -> Images:
    """The split "train" or "val" of a data set at side x side pixels. Raises UserError if there is none."""
    known = dict(cifar10=torchvision.datasets.CIFAR10, cifar100=torchvision.datasets.CIFAR100)
    if data == "patterns":
        pixels, labels = draw_patterns(*{"train": (4096, 0), "val": (2000, 1)}[split])
        return Images(side, labels, [str(c) for c in range(10)], pixels=pixels)
    if data in known:
        try:
            os.makedirs(".data", exist_ok=True)
            with open(".data/lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # one process of a machine downloads, the others wait
                cifar = known[data](".data", train=split == "train", download=True)
        except Exception as e:
            raise UserError(f"--data {data}: neither in .data nor to be downloaded ({e}); name a folder")
        pixels = torch.from_numpy(cifar.data).permute(0, 3, 1, 2).contiguous()  # (N, 3, 32, 32)
        return Images(side, cifar.targets, cifar.classes, pixels=pixels)
    if not Path(data).is_dir():
        raise UserError(f"--data {data} is no folder, and none of patterns, {', '.join(known)}"
                        f"{near(data, ('patterns', *known))}")
    folder = Path(data) / split
    if not folder.is_dir():
        raise UserError(f"--data {data} has no folder {split}/; expected {split}/<class>/<images>")
    try:
        files = torchvision.datasets.ImageFolder(folder)
    except OSError as e:  # also of a class without images
        why = str(e).split(" Supported")[0].rstrip(".")
        raise UserError(f"--data {folder}: {why}; expected <class>/<images>")
    return Images(side, files.targets, files.classes, paths=[path for path, _ in files.samples])


def batches(count: int, cfg: Config, start: int, stop: int, rank=0, world=1):
    """Yield this process's image indices, step by step; an epoch's order is a function of (seed, epoch)."""
    per_epoch, size, epoch = count // cfg.batch, cfg.batch // world, None
    for step in range(start, stop):
        if step // per_epoch != epoch:
            epoch = step // per_epoch
            order = torch.randperm(count, generator=generator("cpu", cfg.seed, "order", epoch))
        first = step % per_epoch * cfg.batch + rank * size
        yield order[first:first + size].tolist()


# ======== 8. One training step


def cosine_schedule(start: float, end: float, steps: int, warmup: int = 0) -> list[float]:
    """A value for each step: linear from 0 to `start` over `warmup` steps, then a cosine to `end` (DINO)."""
    ramp = torch.linspace(0, start, warmup, dtype=torch.float64)
    phase = torch.arange(steps - warmup, dtype=torch.float64) / max(1, steps - warmup)
    return torch.cat([ramp, end + (start - end) * (1 + torch.cos(math.pi * phase)) / 2]).tolist()


def distributed() -> tuple[int, int]:
    """(rank, world) of this process; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def pick_precision(name: str, device: torch.device):
    """The dtype of autocast, or None for float32. auto: bf16 where the device has instructions for it, else
    fp16 on a GPU and float32 on a CPU."""
    if name == "auto" and device.type == "cuda":
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif name == "auto":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        name = "bf16" if fast else "fp32"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[name]


@contextmanager
def mixed_precision(device: torch.device, dtype):
    """The context of forward passes: autocast to a dtype of `pick_precision`, or nothing for None."""
    # torch's fused attention is slow in bf16 on a CPU: plain matrix products make a step 1.3 x as fast
    plain = device.type == "cpu" and dtype is not None
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(plain)  # these switches are the CPU's as well
    with (torch.autocast(device.type, dtype, enabled=dtype is not None),
          sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()):
        yield


class Training:
    """All that changes while training: student, teacher, optimiser, centres, and their schedules."""
    STATEFUL = "student", "teacher", "optimizer", "scaler"

    def __init__(self, cfg: Config, steps_per_epoch: int, device="cpu"):
        self.cfg, self.device, self.steps_per_epoch = cfg, torch.device(device), steps_per_epoch
        self.rank, self.world = distributed()
        torch.manual_seed(cfg.seed)
        self.student = CLeVER(cfg, cfg.drop_path).to(device)
        self.teacher = CLeVER(cfg).to(device).requires_grad_(False)  # in train mode, without drop path
        if self.world > 1 and any(isinstance(m, nn.BatchNorm2d) for m in self.student.modules()):
            if self.device.type == "cpu":
                raise UserError(f"--arch {cfg.arch} has batch norm, which torch synchronises on GPUs only; "
                                "on a CPU start one process, or take a ViT")
            convert = nn.SyncBatchNorm.convert_sync_batchnorm
            self.student, self.teacher = convert(self.student), convert(self.teacher)
        self.teacher.load_state_dict(self.student.state_dict())
        decayed, free = dict(params=[]), dict(params=[], weight_decay=0.0)
        for name, p in self.student.named_parameters():
            (free if p.ndim == 1 or name.endswith(".bias") else decayed)["params"].append(p)
        self.optimizer = torch.optim.AdamW([decayed, free], fused=True)
        self.dtype = pick_precision(cfg.precision, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)
        self.heads = [h for h in (self.student.head_ir, self.student.head_ef) if h is not None]
        self.centres = [torch.zeros(h.prototypes.out_features, device=device) for h in self.heads]
        total, warmup = cfg.epochs * steps_per_epoch, cfg.warmup_epochs * steps_per_epoch
        self.lr = cosine_schedule(cfg.lr * cfg.batch / 256, cfg.min_lr, total, warmup)
        self.weight_decay = cosine_schedule(cfg.weight_decay, cfg.weight_decay_end, total)
        self.momentum = cosine_schedule(cfg.momentum, 1.0, total)
        self.loss, self.ddp, self.stop = clever_loss, self.student, 0
        if cfg.compile:
            for net in (self.student, *self.teacher.children()):  # a step calls the teacher's parts
                net.compile()
            self.loss = torch.compile(clever_loss)
        if self.world > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            warnings.filterwarnings("ignore", message=".*broadcast_buffers")  # torch 2.15 renames it
            self.ddp = nn.parallel.DistributedDataParallel(self.student, ids, broadcast_buffers=False,
                                                           gradient_as_bucket_view=True)

    def state_dict(self) -> dict:
        """Everything that a resumed run needs, as plain tensors and numbers."""
        return {**{name: getattr(self, name).state_dict() for name in self.STATEFUL},
                "centres": self.centres, "backbone": self.teacher.backbone.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Raises RuntimeError, KeyError or ValueError where a part is missing or does not fit."""
        for name in self.STATEFUL:
            getattr(self, name).load_state_dict(state[name])
        for mine, saved in zip(self.centres, state["centres"], strict=True):
            mine.copy_(saved)


@torch.no_grad()
def clip_gradients(parameters, limit: float) -> None:
    """Scale each parameter's gradient, on its own, to a norm of at most `limit` (DINO), without waiting."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    factors = torch._foreach_norm(gradients)
    torch._foreach_add_(factors, 1e-6)
    torch._foreach_reciprocal_(factors)
    torch._foreach_mul_(factors, limit)
    torch._foreach_clamp_max_(factors, 1.0)
    torch._foreach_mul_(gradients, factors)


@torch.no_grad()
def mean_over_processes(tensors: list) -> list:
    """Average tensors over all processes in one flattened all-reduce."""
    flat = torch.cat([t.detach().flatten().to(tensors[0].dtype) for t in tensors])
    if dist.is_initialized():
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
    return [part.view(t.shape) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors)]


def train_step(t: Training, views: list, step: int, mark=lambda phase: None) -> dict:
    """One optimisation step from this process's V views (B, 3, h, w): student, teacher and centres, in place.

    Returns the named loss terms, means over all processes, as tensors on the device (`float` of one waits),
    and "stop", positive where a process was told to. mark(phase) is called after each phase (`--profile`)."""
    cfg = t.cfg
    torch.manual_seed(seed_of(cfg.seed, "depth", step, t.rank))  # of stochastic depth
    for group in t.optimizer.param_groups:
        group["lr"] = t.lr[step]
    t.optimizer.param_groups[0]["weight_decay"] = t.weight_decay[step]
    # 1. the teacher sees the global views alone
    with torch.no_grad(), mixed_precision(t.device, t.dtype):
        z = t.teacher.embed(views[:2])  # (2, B, D)
        targets = t.teacher.project(z)  # (2, B, K), (2, B, K') or None
    mark("teacher forward")
    # 2. the student sees all views
    with mixed_precision(t.device, t.dtype):
        logits = t.ddp(views)  # (V, B, K), (V, B, K') or None
    mark("student forward")
    # 3. losses, in float32
    centres = [*t.centres, None][:2]
    terms = t.loss(cfg, logits, targets, centres, (t.student.head_ir, t.student.head_ef))
    mark("losses")
    # 4. gradients, averaged over processes by DDP
    t.optimizer.zero_grad()
    t.scaler.scale(terms["loss"]).backward()
    mark("backward")
    # 5. the student's step
    t.scaler.unscale_(t.optimizer)
    if cfg.clip:
        clip_gradients(t.student.parameters(), cfg.clip)
    if step < cfg.freeze_epochs * t.steps_per_epoch:
        for head in t.heads:
            head.prototypes.weight.grad = None
    t.scaler.step(t.optimizer)
    t.scaler.update()
    # 6. teacher <- m teacher + (1 - m) student; centre <- 0.9 centre + 0.1 mean of the teacher's logits
    with torch.no_grad():
        torch._foreach_lerp_(list(t.teacher.parameters()), list(t.student.parameters()), 1 - t.momentum[step])
        means = [wide(x).mean((0, 1)) for x in targets if x is not None]
        stop = torch.full_like(means[0][0], float(t.stop > 0))
        *means, scalars, stop = mean_over_processes([*means, torch.stack(list(terms.values())), stop])
        for centre, mean in zip(t.centres, means):
            centre.lerp_(mean.to(centre.dtype), 1 - cfg.centre_momentum)
    t.last = z, targets
    mark("optimiser, EMA and centres")
    return {**dict(zip(terms, scalars)), "stop": stop}


# ======== 9. The loop


def write_whole(path: Path, write) -> None:
    """Let write(file) fill a file aside, then rename it: a reader sees the old one or the new, no part."""
    aside = path.with_name(path.name + ".tmp")
    try:
        with open(aside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: dict) -> None:
    """Write a dict as JSON, never half of it."""
    write_whole(path, lambda f: f.write(json.dumps(content, indent=1).encode()))


def setup(cfg: Config) -> tuple[int, int, torch.device]:
    """Join the processes that torchrun started, if it did: (rank, world, device). Raises UserError."""
    world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes on this machine
    if cfg.batch % world:
        raise UserError(f"--batch {cfg.batch} cannot be shared evenly by {world} processes; take a multiple")
    cuda = cfg.device == "cuda" or (cfg.device == "auto" and torch.cuda.is_available())
    if cuda and neighbours > torch.cuda.device_count():
        raise UserError(f"{neighbours} processes share {torch.cuda.device_count()} GPUs; start fewer")
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    return *distributed(), device


def stored_side(size: int) -> int:
    """Side of the stored images for views of `size` pixels: small ones as they are, 320 px for 224."""
    return size if size <= 64 else round(size * 10 / 7)


def worker_count(workers: int) -> int:
    """--workers, or one for each core that this process can have to itself."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # macOS
    return workers if workers >= 0 else max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def open_data(cfg: Config) -> Images:
    """The training images of the run. Raises UserError where there are none, or too few."""
    data = load_images(cfg.data, "train", cfg.store_size or stored_side(cfg.global_size))
    if cfg.images > len(data):
        raise UserError(f"--images {cfg.images} is more than the {len(data)} images of {cfg.data}; lower it")
    if cfg.images:
        data.keep(torch.randperm(len(data), generator=generator("cpu", cfg.seed, "subset"))[:cfg.images])
    if cfg.batch > len(data):
        raise UserError(f"--batch {cfg.batch} is larger than the data of {len(data)} images; lower it")
    return data


def make_folder(cfg: Config, need: int):
    """The run's folder, made, with config.json and room for `need` bytes; or the UserError to raise."""
    try:
        out, stem = Path(cfg.out), f"{Path(cfg.data).name}-{cfg.method}-{cfg.aug.replace('+', 'plus')}"
        if not cfg.out:
            out = next(p for n in range(1, 10 ** 6) if not (p := Path("runs") / f"{stem}-{n}").exists())
        if not cfg.resume and (out / "config.json").exists():
            return UserError(f"--out {out} holds a run; go on with --resume, or name another folder")
        disk = next(p for p in [out, *out.absolute().parents] if p.exists())
        if (free := shutil.disk_usage(disk).free) < need:
            return UserError(f"--out {out} needs {need >> 20} MiB, {free >> 20} are free; make room")
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "config.json", {**vars(cfg), "out": str(out), "resume": False})
        return out
    except OSError as e:
        return UserError(f"--out {cfg.out}: cannot be written ({e.strerror}); name another folder")


def open_run(cfg: Config, rank: int, need: int) -> Path:
    """The folder of the run, made by rank 0, told to the others. Raises UserError on all of them."""
    answer = [make_folder(cfg, need) if rank == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(answer)
    if isinstance(answer[0], UserError):
        raise answer[0]
    return answer[0]


def load_checkpoint(path: Path, t: Training) -> dict:
    """Restore `t` from a checkpoint, running no code from it. Raises UserError naming what does not fit."""
    try:
        state = torch.load(path, map_location=t.device, weights_only=True)
        if not isinstance(state, dict):
            raise ValueError("it holds no dict")
        for name, value in state["config"].items():
            if name not in MAY_CHANGE and value != getattr(t.cfg, name):
                raise UserError(f"{path} was written with {flag(name)} {value}, the run's config.json says "
                                f"{getattr(t.cfg, name)}; restore the one that was changed")
        t.load_state_dict(state)
        return state
    except UserError:
        raise
    except Exception as e:
        why = (str(e).strip().splitlines() or [type(e).__name__])[0][:150]
        raise UserError(f"{path} is damaged, or no checkpoint of this run ({why}); "
                        "restore it, or start again in another --out")


class Run:
    """What the loop keeps beside `Training`: where it writes, the sums of the epoch, what was saved when."""

    def __init__(self, cfg: Config, t: Training, data: Images, out: Path):
        self.cfg, self.t, self.data, self.out = cfg, t, data, out
        self.step, self.sums, self.waiting, self.told = 0, {}, None, False
        self.saved, self.last_good, self.path = time.monotonic(), "none yet", out / "checkpoint.pt"
        log = out / "log.jsonl"
        if cfg.resume and self.path.exists():
            state = load_checkpoint(self.path, t)
            self.step, self.sums = state["step"], state["sums"]
            self.last_good = f"{self.path}, step {self.step}"
            data.bad |= set(state["bad"])
        if t.rank == 0 and cfg.resume and log.exists():  # drop what came after the checkpoint
            lines = log.read_bytes().splitlines(keepends=True)[:self.step // t.steps_per_epoch]
            write_whole(log, lambda f: f.writelines(lines))

    def give_up(self, what: str):
        """Raise SystemExit for something that is not finite."""
        raise SystemExit(f"clever.py: {what}. The last good checkpoint: {self.last_good}. "
                         "Try a lower --lr, or --precision fp32.")

    def save(self) -> None:
        """Write checkpoint.pt and backbone.pt; a failure is said aloud and costs only this checkpoint."""
        self.saved = time.monotonic()
        if self.t.rank > 0:
            return
        if not all(p.isfinite().all() for p in self.t.student.parameters()):  # the next loss tells too late
            self.give_up(f"the weights are not finite at step {self.step}")
        state = dict(self.t.state_dict(), config=vars(self.cfg), step=self.step, sums=self.sums,
                     bad=sorted(self.data.bad))
        try:
            write_whole(self.path, lambda f: torch.save(state, f))
            write_whole(self.out / "backbone.pt", lambda f: torch.save(state["backbone"], f))
            self.last_good = f"{self.path}, step {self.step}"
        except (OSError, RuntimeError) as e:
            tqdm.write(f"warning: no checkpoint at step {self.step} ({e}); last: {self.last_good}",
                       sys.stderr)

    def collect(self, terms=None) -> bool:
        """Send a step's terms to the host; add those of the step before, there by now, to the epoch's sums.

        Nothing waits. True once a process was told to stop. Raises SystemExit if a term is not finite."""
        ready, self.waiting = self.waiting, None
        if terms is not None:
            host = torch.stack(list(terms.values())).to("cpu", non_blocking=True)
            event = torch.cuda.Event() if self.t.device.type == "cuda" else None
            if event:
                event.record()
            self.waiting = self.step, list(terms), host, event
        if ready:
            step, names, host, event = ready
            if event:
                event.synchronize()
            values = dict(zip(names, host.tolist()))
            self.told |= values.pop("stop") > 0
            for name, value in values.items():
                if not math.isfinite(value):
                    self.give_up(f"{name} is {value} at step {step}")
                self.sums[name] = self.sums.get(name, 0.0) + value
        return self.told

    def show(self, bar) -> None:
        """Move the progress bar by a step: epoch, means of the epoch's terms so far."""
        epoch, known = divmod(self.step - 1, self.t.steps_per_epoch)  # the sums lag by a step
        bar.set_description(f"epoch {1 + epoch}/{self.cfg.epochs}", refresh=False)
        bar.set_postfix({k: f"{v / max(1, known):.3f}" for k, v in self.sums.items()}, refresh=False)
        bar.update(self.cfg.batch)

    def end_epoch(self, seconds: float) -> None:
        """Log the means of the epoch's terms, the collapse metrics of its last batch and the bad images."""
        cfg, t, spe, data = self.cfg, self.t, self.t.steps_per_epoch, self.data
        terms, self.sums = {k: v / spe for k, v in self.sums.items()}, {}
        record = dict(epoch=self.step // spe, step=self.step, lr=t.lr[self.step - 1],
                      momentum=t.momentum[self.step - 1], **terms)
        z, targets = t.last
        words = [f"epoch {record['epoch']}/{cfg.epochs}"]
        words += [f"{k} {v:.4f}" for k, v in {"loss": terms["loss"], **terms}.items()]  # the sum first
        alarms = []
        for part, features, logits, centre in zip(("IR", "EF"), split(z, cfg.ratio), targets, t.centres):
            P = sharpen(logits, centre, cfg.teacher_temp).flatten(0, 1)  # (2B, K)
            m = collapse_metrics(wide(features).flatten(0, 1), P)  # of (2B, d)
            record.update({f"{part.lower()}_{k}": v for k, v in m.items()})
            words.append(f"rank {part} {m['rank']:.1f}")
            alarms.append(collapse_alarm(part, m, P.shape[-1]))
        if dist.is_initialized():
            everyone = [None] * t.world
            dist.all_gather_object(everyone, data.bad)
            data.bad = set().union(*everyone)
        record.update(bad_images=len(data.bad), seconds=round(seconds, 2))
        if t.rank == 0:
            with open(self.out / "log.jsonl", "a") as log:
                log.write(json.dumps(record) + "\n")
            tqdm.write("  ".join([*words, f"{spe * cfg.batch / seconds:.0f} images/s"]))
            for alarm in filter(None, alarms):
                tqdm.write(alarm)
        if len(data.bad) > 0.01 * len(data):
            names = ", ".join(str(data.paths[i]) for i in sorted(data.bad)[:100])
            raise SystemExit(f"clever.py: {len(data.bad)} of {len(data)} images are bad, over 1 %: {names}")


def save_crops(path: Path, images, views) -> None:
    """A picture of the first images (B, 3, S, S) of bytes, each beside its views as the network sees them."""
    rows, side = min(8, len(images)), views[0].shape[-1]
    source = normalize(images[:rows].cpu() / 255)
    source = F.interpolate(source, (side, side), mode="bilinear", antialias=True)
    tiles = [F.pad(x[:rows].float().cpu(), [0, side - x.shape[-1]] * 2, value=9.0) for x in (source, *views)]
    tiles = torch.stack(tiles, 1).flatten(0, 1)  # (rows * (1 + V), 3, side, side), 9.0: white
    tiles = torch.stack([tiles[:, c] * STD[c] + MEAN[c] for c in range(3)], 1).clamp(0, 1)
    tiles = F.interpolate(tiles, scale_factor=max(1, 96 // side), mode="nearest")
    grid = torchvision.utils.make_grid(tiles, nrow=1 + len(views), padding=4, pad_value=1.0)
    write_whole(path, lambda f: torchvision.utils.save_image(grid, f, format="png"))


@contextmanager
def stop_signals(t: Training):
    """Within: SIGTERM and Ctrl-C let the loop finish the step, save and leave; a second one ends at once."""
    def note(number, frame):
        t.stop = number
        signal.signal(number, before[number])
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(cfg: Config) -> Path | None:
    """Train (or profile) as configured, on all processes; the folder of the run. Raises UserError for a wrong
    start, SystemExit with a reason or a signal's code for what stops it."""
    rank, world, device = setup(cfg)
    data = open_data(cfg)
    t = Training(cfg, len(data) // cfg.batch, device)
    augment, workers = MultiCrop(cfg, rank, world), worker_count(cfg.workers)
    if cfg.profile:
        data.hold(device, workers, cfg.cache)
        return profile(cfg, t, data, augment, workers)
    out = open_run(cfg, rank, need=10 * sum(p.nbytes for p in t.student.parameters()))
    run, spe = Run(cfg, t, data, out), t.steps_per_epoch
    data.hold(device, workers, cfg.cache)
    steps = batches(len(data), cfg, run.step, cfg.epochs * spe, rank, world)
    bar = tqdm(total=cfg.epochs * spe * cfg.batch, initial=run.step * cfg.batch, unit=" images",
               unit_scale=True, smoothing=0.05, disable=rank > 0 or not sys.stderr.isatty())
    with stop_signals(t), bar:
        began = time.monotonic()
        for images, aspect in data.stream(steps, device, workers):
            views = augment(images, aspect, run.step)
            if run.step == 0 and rank == 0:
                save_crops(out / "crops.png", images, views)
            stop = run.collect(train_step(t, views, run.step))
            run.step += 1
            run.show(bar)
            if run.step % spe == 0:
                stop |= run.collect()
                run.end_epoch(time.monotonic() - began)
                run.save()
                began = time.monotonic()
            elif stop or time.monotonic() - run.saved > 60 * cfg.save_every:
                run.collect()  # clocks differ: a stop that it sees counts at the next step, as elsewhere
                run.save()
            if stop:
                if rank == 0:
                    tqdm.write(f"stopped at step {run.step}; go on with --out {out} --resume", sys.stderr)
                raise SystemExit(128 + (t.stop or signal.SIGTERM))
    return out


def profile(cfg: Config, t: Training, data: Images, augment: MultiCrop, workers: int) -> None:
    """Print where the time of `cfg.profile` steps goes, what the parts reach alone, and what limits them."""
    cuda, n, share = t.device.type == "cuda", cfg.profile, cfg.batch // t.world
    spent = {}

    def clock():
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def mark(phase):
        now = clock()
        spent[phase] = spent.get(phase, 0.0) + now - spent["since"]
        spent["since"] = now

    def run(mark=lambda phase: None, only_load=False, fixed=None):
        """Images/s of this process over n steps, after two that warm up; the views of the last one."""
        views, stream = fixed, [(None, None)] * (n + 2)
        if not fixed:
            stream = data.stream(batches(len(data), cfg, 0, n + 2, t.rank, t.world), t.device, workers)
        start = spent["since"] = clock()
        for i, (images, aspect) in enumerate(stream):
            mark("waiting for data")
            if not only_load:
                views = fixed or augment(images, aspect, i)
                mark("augmentation")
                train_step(t, views, i % len(t.lr), mark)
            if i == 1:  # warm: the next wait for data counts
                spent.clear()
                start = spent["since"] = clock()
        return n * share / (clock() - start), views

    _, views = run(mark)
    phases = {k: v for k, v in spent.items() if k != "since"}
    whole, loader, compute = run()[0], run(only_load=True)[0], run(fixed=views)[0]
    with FlopCounterMode(display=False) as counter:
        train_step(t, views, 0)
    flops = counter.get_total_flops() * compute / share  # a second
    a = torch.randn(2 * [8192 if cuda else 1024], device=t.device, dtype=t.dtype or torch.float32)
    a @ a
    start = clock()
    for _ in range(10):
        a @ a
    peak = 10 * 2 * len(a) ** 3 / (clock() - start)
    memory = (torch.cuda.max_memory_allocated() if cuda else
              resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
    if t.rank > 0:
        return
    total = sum(phases.values())
    device = torch.cuda.get_device_name() if cuda else f"CPU with {torch.get_num_threads()} threads"
    print(f"{cfg.arch}, {cfg.method}, {cfg.aug}, batch {cfg.batch} on {t.world} x {device}, "
          f"{str(a.dtype)[6:]}, torch {torch.__version__}: {n} steps\n")
    print("| phase | ms a step | share |\n|---|---:|---:|")
    for phase, seconds in phases.items():
        print(f"| {phase} | {1000 * seconds / n:.1f} | {seconds / total:.1%} |")
    print(f"\nimages/s of a process: {whole:.1f} the whole, {loader:.1f} the loader alone ({workers} workers"
          f"{', data in memory' if data.pixels is not None else ''}), {compute:.1f} the compute alone")
    print(f"peak memory {memory / 2 ** 30:.2f} GiB; {flops / 1e12:.3f} TFLOP/s, {flops / peak:.0%} of the "
          f"{peak / 1e12:.2f} TFLOP/s of a matrix product")
    print("The loader limits this run: more --workers, a smaller --store-size, or a faster disk."
          if loader < 1.1 * compute else
          "The augmentation limits this run: --compile, fewer --local-views or a simpler --aug."
          if phases["augmentation"] > 0.2 * total else
          "The compute limits this run: try --compile; then a larger --batch, if memory allows."
          if cuda and not cfg.compile else
          "The compute limits this run: a smaller --arch, fewer --local-views, or more processes.")


def guarded(name: str, work) -> int:
    """The exit code of a command: 0, or 2 with what the user can change, said. Leaves the process group."""
    try:
        work()
        return 0
    except UserError as e:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"{name}: {e}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as e:  # on any rank
        print(f"{name}: the GPU's memory is full; lower --batch, or use more GPUs ({e})", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def main(argv: list[str]) -> int:
    """Train as a command line says, then compare with the untrained backbone. Returns the exit code."""
    def work():
        cfg = parse(argv)
        out = train(cfg)
        if cfg.report and not cfg.profile and distributed()[0] == 0:
            sys.modules["clever"] = sys.modules[__name__]  # eval_linear imports this very module
            import eval_linear
            eval_linear.compare(cfg, out)
    return guarded("clever.py", work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
