"""CLeVER in one file: Contrastive Learning Via Equivariant Representation (arXiv 2406.00262).

    torchrun clever.py                                          the demo: no data, no download
    torchrun --nproc-per-node gpu clever.py --data IN100 --out runs/in100   the paper's recipe
    python clever.py --data PHOTOS --recipe small               your own images, shrunk to 32 px
    python clever.py --data cifar10 --method dino --aug baug    the baseline
    python clever.py --out runs/in100 --resume                  continue a run

A random augmentation T turns an image I into a view v = T(I); a backbone f turns the view into a
representation z = f(v). CLeVER splits z into an invariant representation (IR), on which all views
of an image should agree, and an equivariant factor (EF), in which they should differ. Each part has
its own projection head, h_IR and h_EF. A student is trained to match a teacher, which is a moving
average of the student (DINO, arXiv 2104.14294):

    P = softmax((h_IR(z_IR) - c) / 0.04)    of the teacher; c is the moving average of its logits
    Q = softmax(h_IR(z_IR) / 0.1)           of the student
    P', Q'                                  the same for h_EF(z_EF), with a centre c' of its own

    L_CL   = mean of -P_i . log Q_j         over global views i and all views j != i of an image
    L_Orth = mean of |cos(P'_i, Q'_j)|      over the same pairs
    L_PReg = | ||h_IR||^2 - ||h_EF||^2 |    squared norms of the parameters of the two heads
    L      = L_CL + lambda_orth L_Orth + lambda_reg L_PReg

Without the split this is DINO: `--method dino`, L = L_CL.

Shapes: B images in this process, stored as S x S pixels; V views of each: G = 2 global ones (large
crops), then the local ones (small crops); D features, d of them IR; K prototypes of h_IR, K' of
h_EF. Elsewhere N images or rows, C classes, h x w pixels or patches.
"""

import argparse
import collections
import contextlib
import dataclasses
import faulthandler
import hashlib
import itertools
import json
import math
import os
import pkgutil
import random
import re
import shlex
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
import torchvision.transforms.functional as TF
from PIL import Image, ImageOps
from torch import nn
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

# ==================================================================================================
# 1. The representation: z = f(v) is split in two, and each part has a projection head
# ==================================================================================================


def split(z, ratio):
    """z (..., D) -> z_IR (..., d) and z_EF (..., D - d), with d = int(ratio * D). ratio is rho."""
    d = int(ratio * z.shape[-1])
    return z[..., :d], z[..., d:]


class ProjectionHead(nn.Module):
    """DINO's head h: features (..., in_dim) -> logits (..., K), their cosines with K prototypes."""

    def __init__(self, in_dim, out_dim=65536, hidden_dim=2048, bottleneck_dim=256):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        self.prototypes = nn.Linear(bottleneck_dim, out_dim, bias=False)
        init_linear(self)

    def forward(self, x):
        x = F.normalize(self.mlp(x), dim=-1)
        w = F.normalize(self.prototypes.weight, dim=-1)  # (K, bottleneck_dim)
        return F.linear(x, w).to(w.dtype)  # float32 for the losses


Output = collections.namedtuple("Output", "z logits")


class CLeVER(nn.Module):
    """Backbone f and heads h_IR, h_EF: a student or a teacher. DINO has one head, on all of z."""

    def __init__(self, cfg, drop_path=0.0):
        super().__init__()
        self.ratio = cfg.ratio
        self.backbone = initial_backbone(cfg, drop_path)
        D = self.backbone.embed_dim
        d = int(cfg.ratio * D)
        self.heads = nn.ModuleList([ProjectionHead(d, cfg.out_dim, cfg.hidden_dim)])
        if cfg.method == "clever":
            self.heads.append(ProjectionHead(D - d, cfg.ef_out_dim or cfg.out_dim, cfg.hidden_dim))

    def embed(self, views):
        """V views (B, 3, h, w) -> z (V, B, D). Adjacent views of one size pass f together."""
        z = []
        for _, same_size in itertools.groupby(views, key=lambda view: view.shape[-1]):
            # Image by image, so `stochastic_depth` gives each process its own images' draws.
            images = torch.stack(list(same_size), 1)  # (B, n, 3, h, w)
            features = self.backbone(images.flatten(0, 1))  # (B * n, D)
            z.append(features.unflatten(0, images.shape[:2]).transpose(0, 1))  # (n, B, D)
        return torch.cat(z)

    def forward(self, views):
        """V views -> z (V, B, D) and the logits of each head: IR (V, B, K), then EF (V, B, K')."""
        z = self.embed(views)
        # DINO has one head and an empty EF, which zip leaves out.
        return Output(z, [head(part) for head, part in zip(self.heads, split(z, self.ratio))])


# ==================================================================================================
# 2. The losses (paper, section 3.3)
# ==================================================================================================

STUDENT_TEMP = 0.1
TEACHER_TEMP = 0.04


def sharpen(teacher, centre, temp=TEACHER_TEMP):
    """P = softmax((logits - c) / temp) of the teacher, without gradient: (..., K) -> (..., K)."""
    return F.softmax((teacher.detach() - centre) / temp, dim=-1)


def mean_over_pairs(terms):
    """The mean over global views i and all views j != i of an image: terms (G, V, B) -> scalar."""
    G, V, _ = terms.shape
    different = 1 - torch.eye(G, V, dtype=terms.dtype, device=terms.device)  # 0 where i = j
    return (terms.mean(2) * different).sum() / (G * (V - 1))


def invariance_loss(student, teacher, centre, teacher_temp=TEACHER_TEMP):
    """L_CL, the mean of -P_i . log Q_j: views of one image agree in IR. This is DINO's loss.

    student (V, B, K), teacher (G, B, K): logits of h_IR, global views first; centre: c (K,).
    """
    P = sharpen(teacher, centre, teacher_temp)  # (G, B, K)
    log_Q = F.log_softmax(student / STUDENT_TEMP, dim=-1)  # (V, B, K)
    cross_entropy = -torch.einsum("gbk,vbk->gvb", P, log_Q)
    return mean_over_pairs(cross_entropy)


def orthogonality_loss(student, teacher, centre, teacher_temp=TEACHER_TEMP):
    """L_Orth, the mean of |cos(P'_i, Q'_j)|: views of one image differ in EF.

    The arguments are those of `invariance_loss`, for h_EF.
    """
    P = sharpen(teacher, centre, teacher_temp)  # (G, B, K')
    Q = F.softmax(student / STUDENT_TEMP, dim=-1)  # (V, B, K')
    product = torch.einsum("gbk,vbk->gvb", P, Q)
    norms = P.norm(dim=-1)[:, None] * Q.norm(dim=-1)  # (G, 1, B) * (V, B) -> (G, V, B)
    return mean_over_pairs((product / norms).abs())  # the paper's abs; P and Q are positive anyway


def projector_regularization(head_ir, head_ef):
    """L_PReg, the difference of the heads' summed squared parameters: keeps their sizes equal."""
    ir = sum(p.square().sum() for p in head_ir.parameters())
    ef = sum(p.square().sum() for p in head_ef.parameters())
    return (ir - ef).abs()


def clever_loss(cfg, student, teacher, centres, heads):
    """L = L_CL + lambda_orth L_Orth + lambda_reg L_PReg and its terms, by name; DINO has only L_CL.

    student, teacher: the logits of each head, IR then EF; centres and heads in the same order.
    """
    L_CL = invariance_loss(student[0], teacher[0], centres[0], teacher_temp=cfg.teacher_temp)
    if len(heads) == 1:
        return dict(L_CL=L_CL, loss=L_CL)

    L_Orth = orthogonality_loss(student[1], teacher[1], centres[1], teacher_temp=cfg.teacher_temp)
    L_PReg = projector_regularization(heads[0], heads[1])
    loss = L_CL + cfg.lambda_orth * L_Orth + cfg.lambda_reg * L_PReg
    return dict(L_CL=L_CL, L_Orth=L_Orth, L_PReg=L_PReg, loss=loss)


# ==================================================================================================
# 3. One training step
# ==================================================================================================

CLIP = 3.0  # largest norm of each parameter's gradient
CENTRE_MOMENTUM = 0.9


def train_step(run, views, step):
    """One optimisation step of a `Training` (section 9) from V views (B, 3, h, w), global first.

    step counts from 0 and picks the values of the schedules. Returns the named loss terms of this
    process's images, as tensors on the device: nothing in here waits for the GPU, except
    SyncBatchNorm, which ResNets use on several GPUs.
    """
    cfg = run.cfg
    torch.manual_seed(seed_of(cfg.seed, "drop path", step))
    for group in run.optimizer.param_groups:
        group["lr"] = run.lr[step]
    # Group 1, biases and norms, has no weight decay.
    run.optimizer.param_groups[0]["weight_decay"] = run.weight_decay[step]

    # 1. The teacher sees only the global views.
    with torch.no_grad(), autocast(run.device, cfg.precision):
        teacher = run.teacher(views[:2])  # z (G, B, D), logits (G, B, K) of each head

    # 2. The student sees all views.
    with autocast(run.device, cfg.precision):
        student = run.student(views)  # z (V, B, D), logits (V, B, K) of each head

    # 3. Losses in float32
    terms = run.loss(student, teacher)
    run.optimizer.zero_grad()
    terms["loss"].backward()

    # 4. Update the student. Each gradient is clipped on its own; prototypes are frozen at first.
    for gradient in average_gradients(run.student.parameters()):
        gradient *= (CLIP / (gradient.norm() + 1e-6)).clamp(max=1)
    if step < cfg.freeze_epochs * run.steps_per_epoch:
        for head in run.student.heads:
            head.prototypes.weight.grad = None
    run.optimizer.step()

    # 5. The teacher follows the student, the centres follow the teacher's logits.
    with torch.no_grad():
        for slow, fast in zip(run.teacher.parameters(), run.student.parameters()):
            slow.lerp_(fast, 1 - run.momentum[step])
        for centre, logits in zip(run.centres, teacher.logits):
            mean = mean_over_processes(logits.mean((0, 1), dtype=centre.dtype))  # (K,)
            centre.lerp_(mean, 1 - CENTRE_MOMENTUM)

    if (step + 1) % run.steps_per_epoch == 0:  # for `epoch_metrics`, which needs only global views
        run.last = teacher, [logits[:2].detach().clone() for logits in student.logits]
    return {name: term.detach() for name, term in terms.items()}


# ==================================================================================================
# 4. The recipe: the defaults are the paper's
# ==================================================================================================


class UserError(Exception):
    """Something the user can fix: the command ends with this one sentence and no traceback."""


def flag(name):
    """The command-line spelling of a field of `Config`."""
    return "--" + name.replace("_", "-")


def option(default, help, choices=None):
    """A field of `Config` with its line of --help."""
    return dataclasses.field(default=default, metadata=dict(help=help, choices=choices))


@dataclasses.dataclass
class Config:
    """Every option; the command line is generated from it (section 11)."""

    data: str = option("patterns", "patterns, cifar10, cifar100, or a folder of images")
    out: str = option("", "folder of the run; default runs/<data>-<method>-<aug>-<time>")
    recipe: str = option(
        "auto",
        "preset for the other options; auto picks by --data",
        ("auto", "paper", "small", "demo"),
    )
    workers: int = option(min(8, os.cpu_count()), "image-decoding processes per training process")
    # method
    method: str = option("clever", "dino is the baseline, without the split", ("clever", "dino"))
    ratio: float = option(0.8, "rho: the fraction of z that is IR; the rest is EF (dino: 1)")
    lambda_orth: float = option(1.0, "weight of L_Orth (not used by dino)")
    lambda_reg: float = option(0.001, "weight of L_PReg (not used by dino)")
    training: str = option("", "module:Class, a subclass of Training with a loss of your own")
    arch: str = option(
        "vit_tiny", "vit_{micro,tiny,small,base}, resnet{18,34,50,101}, vmamba_tiny, module:Class"
    )
    init: str = option("", "file of weights to start from; also lower --lr, raise --momentum")
    out_dim: int = option(65536, "prototypes K of the IR head; try fewer if the output is uniform")
    ef_out_dim: int = option(0, "prototypes K' of the EF head; 0 means as many as IR")
    hidden_dim: int = option(2048, "width of the heads' hidden layers")
    teacher_temp: float = option(0.04, "teacher temperature; lower it if the output is uniform")
    momentum: float = option(0.996, "initial teacher momentum; try 0.98 for short runs")
    # views
    aug: str = option("caug", "caug rotates, caug+ also deforms", ("baug", "caug", "caug+"))
    global_size: int = option(224, "side of the two global views, in pixels")
    local_size: int = option(96, "side of the local views, in pixels")
    local_views: int = option(8, "number of local views")
    global_scale: tuple = option((0.4, 1.0), "area range of global views (1: the whole image)")
    local_scale: tuple = option((0.05, 0.4), "area range of local views (1: the whole image)")
    # optimisation
    epochs: int = option(200, "passes over the data; 0 means 20, or more to reach 1000 steps")
    batch: int = option(512, "images per step, over all processes")
    lr: float = option(5e-4, "peak learning rate for a batch of 256; scales with --batch")
    weight_decay: tuple = option((0.04, 0.4), "initial and final; not for biases and norms")
    freeze_epochs: int = option(1, "epochs with frozen prototypes; raise it if the loss stalls")
    drop_path: float = option(0.1, "stochastic depth: drop rate of the last block (VMamba: double)")
    # run
    seed: int = option(0, "random seed")
    precision: str = option("auto", "auto is bf16 if the GPU has it", ("auto", "fp32", "bf16"))
    compile: bool = option(False, "torch.compile the networks, the loss and the augmentation")
    resume: bool = option(False, "continue the run in --out; with --data, start it if it is new")

    def __post_init__(self):
        if self.method == "dino":
            self.ratio = 1.0
        elif not 0 < self.ratio < 1:
            raise UserError("--ratio must be between 0 and 1; only dino has 1")
        for name, value in vars(self).items():
            values = value if isinstance(value, (tuple, list)) else [value]
            for number in values:
                if isinstance(number, (int, float)) and not 0 <= number < math.inf:
                    raise UserError(f"{flag(name)} must be a number, 0 or greater, not {number}")


SMALL_IMAGES = dict(
    arch="vit_micro", global_size=32, local_size=16, local_views=2, hidden_dim=512, out_dim=1024,
    teacher_temp=0.03, batch=64, lr=2e-3,
)  # fmt: skip
RECIPES = dict(
    paper=dict(),
    small=dict(SMALL_IMAGES, local_scale=(0.1, 0.4), momentum=0.98, epochs=0, freeze_epochs=0),
    # In such a short run, frozen prototypes do slightly better.
    demo=dict(
        SMALL_IMAGES, global_scale=(0.5, 1), local_scale=(0.2, 0.5), epochs=12, freeze_epochs=12
    ),
)
AUTO = dict(patterns="demo", cifar10="small", cifar100="small")  # a folder gets the paper's recipe


# ==================================================================================================
# 5. The views: every geometric augmentation is a change of coordinates; compose them, sample once
# ==================================================================================================

MEAN = (0.485, 0.456, 0.406)  # ImageNet's
STD = (0.229, 0.224, 0.225)
BLUR_PROBABILITY = (1.0, 0.1, 0.5)  # of the first global view, the second, local views
JITTER = (  # lowest, highest and neutral factor
    (0.6, 1.4, 1.0),  # brightness
    (0.6, 1.4, 1.0),  # contrast
    (0.8, 1.2, 1.0),  # saturation
    (-0.1, 0.1, 0.0),  # hue
)


def seed_of(*key):
    """A seed that depends only on a key such as (seed, purpose, step)."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


def generator(device, *key):
    """A random generator on a device, seeded by a key."""
    return torch.Generator(device).manual_seed(seed_of(*key))


def warp(images, size, box, flip, angle, shift=None):
    """One view of each image, sampled once through all changes of coordinates: T without colour.

    images (B, 3, S, S) -> (B, 3, size, size), black where a pixel comes from outside the crop
    box (B, 4): the crop's centre x, y and half width, half height, in an image of [-1, 1] x [-1, 1]
    flip (B,): bool
    angle (B,): degrees, counter-clockwise
    shift (B, size, size, 2): elastic displacement of each pixel, in a view of [-1, 1] x [-1, 1]
    """
    axis = (torch.arange(size, device=images.device, dtype=images.dtype) * 2 + 1) / size - 1
    point = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)[None]  # (1, size, size, 2)

    # From a pixel of the view back to a place in the image: the last augmentation comes first.
    if shift is not None:  # elastic deformation
        point = point + shift  # (B, size, size, 2)
    inside = (point.abs() <= 1).all(-1)  # (B or 1, size, size)
    x, y = point.unbind(-1)  # each (B or 1, size, size)

    cos = angle.deg2rad().cos()[:, None, None]  # (B, 1, 1)
    sin = angle.deg2rad().sin()[:, None, None]
    x, y = cos * x - sin * y, sin * x + cos * y  # rotation
    inside = inside & (x.abs() <= 1) & (y.abs() <= 1)

    x = torch.where(flip[:, None, None], -x, x)  # flip

    centre_x, centre_y, half_width, half_height = box[:, :, None, None].unbind(1)  # each (B, 1, 1)
    grid = torch.stack([centre_x + half_width * x, centre_y + half_height * y], -1)  # crop
    view = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return view * inside[:, None]


def crop_box(area, shape, place, aspect):
    """Boxes (B, 4) of random resized crops, by torchvision's rule: ten tries, then the centre.

    area (B, 10): area of each try, as a fraction of the image's
    shape (B, 10): width / height of each try
    place (B, 2): x and y, from 0 (left, top) to 1
    aspect (B,): width / height of the image
    """
    width = (area * shape / aspect[:, None]).sqrt()  # (B, 10), as a fraction of the image's width
    height = (area / shape * aspect[:, None]).sqrt()  # (B, 10), of its height
    fits = (width <= 1) & (height <= 1)
    any_fits = fits.any(1, keepdim=True)  # (B, 1)
    first = fits.int().argmax(1, keepdim=True)  # (B, 1)
    drawn = torch.cat([width.gather(1, first), height.gather(1, first)], 1)  # (B, 2)

    # No try fits: the largest centred crop with an allowed shape.
    allowed = aspect.clamp(3 / 4, 4 / 3)  # width / height
    centred = torch.stack([allowed / aspect, aspect / allowed], 1).clamp(max=1)  # (B, 2)

    half = torch.where(any_fits, drawn, centred)  # half sizes: the image is 2 wide and 2 high
    centre = torch.where(any_fits, (2 * place - 1) * (1 - half), 0)
    return torch.cat([centre, half], 1)


def gaussian_matrix(size, sigma, radius):
    """Blur as a matrix product: M @ X @ M.T blurs X (size, size). sigma (B,) -> M (B, size, size).

    Row r of M holds the weights with which the pixels of a column contribute to pixel r: a Gaussian
    around r, cut at `radius` pixels (fewer than size) and mirrored where it leaves the image.
    """
    tap = torch.arange(-radius, radius + 1, device=sigma.device)
    weight = torch.exp(-0.5 * (tap / sigma[:, None]) ** 2)  # (B, taps)
    weight = weight / weight.sum(1, keepdim=True)

    pixels = torch.eye(size, dtype=sigma.dtype, device=sigma.device)  # row p: only pixel p is 1
    mirrored = F.pad(pixels[None], (radius, radius), mode="reflect")[0]  # (size, size + 2 * radius)
    windows = mirrored.unfold(1, len(tap), 1)  # (size, size, taps): of row p, around each pixel r
    return torch.einsum("bt,prt->brp", weight, windows)


def elastic_shift(noise, alpha, sigma):
    """torchvision's ElasticTransform: noise (B, 2, size, size) in [-1, 1] -> `shift` of `warp`."""
    size = noise.shape[-1]
    radius = min(size - 1, int(4 * sigma + 0.5))
    smooth = gaussian_matrix(size, noise.new_full((1,), sigma), radius)
    return (smooth @ noise @ smooth.mT).permute(0, 2, 3, 1) * (alpha / size)


def blend(other, x, factor):
    """From `other` (factor 0) to x (factor 1), images (B, 3, h, w); factor (B,) may exceed 1."""
    return torch.lerp(other, x, factor[:, None, None, None]).clamp(0, 1)


def adjust_brightness(x, factor):
    return blend(torch.zeros_like(x), x, factor)


def adjust_contrast(x, factor):
    return blend(TF.rgb_to_grayscale(x).mean((1, 2, 3), keepdim=True), x, factor)


def adjust_saturation(x, factor):
    return blend(TF.rgb_to_grayscale(x), x, factor)


def adjust_hue(x, turn):
    """Turn the hue of images (B, 3, h, w) by a fraction of the colour circle (B,)."""
    r, g, b = x.unbind(1)  # each (B, h, w)
    value = x.amax(1)
    chroma = value - x.amin(1)
    safe = torch.where(chroma == 0, 1, chroma)

    hue = torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe)  # in sixths of a circle
    hue = torch.where(value == r, (g - b) / safe, hue)
    hue = hue + 6 * turn[:, None, None]

    offset = torch.arange(5, 0, -2, device=x.device)  # 5, 3, 1: of red, green, blue
    k = (hue[:, None] + offset[:, None, None]) % 6  # (B, 3, h, w)
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


COLOUR_OPERATIONS = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)


def color_jitter(x, factors, order=(0, 1, 2, 3), operations=COLOUR_OPERATIONS):
    """torchvision's ColorJitter of images (B, 3, h, w). Four factors (B,), neutral: 1, 1, 1, 0."""
    for i in order:
        x = operations[i](x, factors[i])
    return x


def normalize(x):
    """Normalise images (B, 3, h, w). torchvision's Normalize would wait for the GPU."""
    return torch.stack([(x[:, c] - MEAN[c]) / STD[c] for c in range(3)], 1)


class MultiCrop(nn.Module):
    """The V views of a batch of images, 2 global ones first, made on the images' device.

    Random numbers depend only on (seed, step), never on torch's global generator, so a resumed run
    sees the same views. They are drawn for the images of all processes, and each process takes its
    own, so results do not depend on the number of processes.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.angles = []  # the rotation (B,) of each view of the last step, in degrees
        functions = (warp, *COLOUR_OPERATIONS)
        if cfg.compile:
            functions = [torch.compile(function, dynamic=False) for function in functions]
        self.warp, *self.colour_operations = functions

    @torch.no_grad()
    def forward(self, images, aspect, step):
        """Bytes (B, 3, S, S), width / height (B,) -> V normalised views (B, 3, size, size)."""
        self.angles = []
        gen = generator(images.device, self.cfg.seed, "views", step)
        orders = random.Random(seed_of(self.cfg.seed, "orders", step))  # of the colour operations
        images = images.float() / 255
        count = 2 + self.cfg.local_views
        return [self.make_view(images, aspect, step, i, gen, orders) for i in range(count)]

    def make_view(self, images, aspect, step, i, gen, orders):
        """View number i of images (B, 3, S, S) in [0, 1]: 0 and 1 are global, the others local."""
        cfg = self.cfg
        size, scale = cfg.local_size, cfg.local_scale
        if i < 2:
            size, scale = cfg.global_size, cfg.global_scale
        B = len(images)
        rank, world = distributed()

        def uniform(low, high, *shape, gen=gen):
            draws = torch.rand(B * world, *shape, generator=gen, device=gen.device)
            return low + (high - low) * draws[rank * B : (rank + 1) * B]  # (B, *shape)

        def chance(probability):
            return uniform(0, 1) < probability  # (B,)

        # Geometry: crop, flip, rotation and elastic deformation in one warp
        area = uniform(*scale, 10)
        shape = uniform(math.log(3 / 4), math.log(4 / 3), 10).exp()
        box = crop_box(area, shape, uniform(0, 1, 2), aspect)
        flip = chance(0.5)
        angle = uniform(-90, 90)  # drawn for baug too, so its crops and colours are those of caug
        if cfg.aug == "baug":
            angle = torch.zeros_like(angle)
        shift = None
        if cfg.aug == "caug+":
            # A separate generator: how many numbers a large draw consumes depends on the GPU model.
            own = generator(images.device, cfg.seed, "elastic", step, i)
            deformed = uniform(0, 1, gen=own) < 0.5
            noise = uniform(-1, 1, 2, size, size, gen=own)
            shift = elastic_shift(noise, alpha=100 * size / 224, sigma=5 * size / 224)
            shift = shift * deformed[:, None, None, None]
        self.angles.append(angle)
        x = self.warp(images, size, box, flip, angle, shift)

        # Colour: jitter, grey, blur, solarisation
        jittered = chance(0.8)
        factors = [torch.where(jittered, uniform(low, high), same) for low, high, same in JITTER]
        x = color_jitter(x, factors, orders.sample(range(4), 4), self.colour_operations)
        x = torch.where(chance(0.2)[:, None, None, None], TF.rgb_to_grayscale(x), x)

        pixel = cfg.global_size / 224  # sigma and radius are meant for runs with 224 px
        blurred = chance(BLUR_PROBABILITY[min(i, 2)])
        sigma = torch.where(blurred, uniform(0.1, 2.0) * pixel, 1e-3)  # 1e-3 does not blur
        blur = gaussian_matrix(size, sigma, min(math.ceil(6 * pixel), size - 1))
        blur = blur[:, None]  # (B, 1, size, size), for all colours
        x = blur @ x @ blur.mT
        if i == 1:
            solarised = chance(0.2)[:, None, None, None]
            x = torch.where(solarised & (x >= 0.5), 1 - x, x)
        return normalize(x)


# ==================================================================================================
# 6. The backbones. Parameters are named as in timm and DINO (ViT) and torchvision (ResNet)
# ==================================================================================================


def init_linear(module, std=0.02):
    """Truncated-normal weights and zero biases in all linear layers of a module."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def mlp(dim):
    """The two linear layers of a block: (..., dim) -> (..., dim)."""
    layers = dict(fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim))
    return nn.Sequential(collections.OrderedDict(layers))


def stochastic_depth(x, rate, training):
    """Drop rows of a residual branch x (N, ...) with probability `rate` and scale up the others."""
    if rate == 0 or not training:
        return x
    rank, world = distributed()  # as in `MultiCrop`, draw for the rows of all processes
    shape = (world, len(x)) + (1,) * (x.dim() - 1)
    kept = torch.rand(shape, device=x.device)[rank] >= rate  # (N, 1, ..., 1)
    return x * (kept / (1 - rate)).to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention: (N, tokens, D) -> (N, tokens, D)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))  # (N, tokens, 3, heads, D / heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (N, heads, tokens, D / heads)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))  # (N, tokens, D)


class Block(nn.Module):
    """Pre-norm transformer block with stochastic depth: (N, tokens, D) -> (N, tokens, D)."""

    def __init__(self, dim, heads, drop_path):
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = mlp(dim)

    def forward(self, x):
        x = x + stochastic_depth(self.attn(self.norm1(x)), self.drop_path, self.training)
        return x + stochastic_depth(self.mlp(self.norm2(x)), self.drop_path, self.training)


class VisionTransformer(nn.Module):
    """ViT (arXiv 2010.11929): images (N, 3, H, W) -> the CLS token (N, D)."""

    def __init__(self, img_size, patch_size, embed_dim, depth, heads, drop_path=0.0, init_std=0.02):
        super().__init__()
        self.embed_dim = embed_dim
        self.patch_size = patch_size
        self.patch_embed = nn.ModuleDict(dict(proj=nn.Conv2d(3, embed_dim, patch_size, patch_size)))
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + (img_size // patch_size) ** 2, embed_dim))
        rates = [drop_path * i / (depth - 1) for i in range(depth)]
        self.blocks = nn.Sequential(*[Block(embed_dim, heads, rate) for rate in rates])
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        nn.init.trunc_normal_(self.cls_token, std=init_std)
        nn.init.trunc_normal_(self.pos_embed, std=init_std)
        init_linear(self, init_std)

    def tokens(self, x):
        """Images (N, 3, H, W) -> (N, 1 + h * w, D): CLS, then the patches, with positions added."""
        x = self.patch_embed.proj(x)  # (N, D, h, w)
        side = math.isqrt(self.pos_embed.shape[1] - 1)
        pos = self.pos_embed[:, 1:].mT.unflatten(2, (side, side))  # (1, D, side, side)
        pos = F.interpolate(pos, x.shape[2:], mode="bicubic")  # (1, D, h, w)
        patches = (x + pos).flatten(2).mT  # (N, h * w, D)
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)  # (N, 1, D)
        return torch.cat([cls, patches], 1)

    def get_intermediate_layers(self, x, n=1):
        """The tokens (N, 1 + h * w, D) after each of the last n blocks, normalised."""
        x = self.tokens(x)
        layers = []
        for block in self.blocks:
            x = block(x)
            layers.append(x)
        return [self.norm(layer) for layer in layers[-n:]]

    def forward(self, x):
        return self.norm(self.blocks(self.tokens(x)))[:, 0]


VIT = dict(
    # With init_std 0.02, the blocks of such a narrow network would be nearly linear.
    vit_micro=dict(patch_size=8, embed_dim=96, depth=4, heads=3, init_std=0.06),
    vit_tiny=dict(patch_size=16, embed_dim=192, depth=12, heads=3),
    vit_small=dict(patch_size=16, embed_dim=384, depth=12, heads=6),
    vit_base=dict(patch_size=16, embed_dim=768, depth=12, heads=12),
)


def build_backbone(arch, img_size, drop_path=0.0, **options):
    """Backbone f with .embed_dim = D: images (N, 3, H, W) -> (N, D). img_size: of global views."""
    if arch in VIT:
        return VisionTransformer(img_size, drop_path=drop_path, **{**VIT[arch], **options})
    if arch == "vmamba_tiny":
        arch = "extras.vmamba:VMamba"
    if ":" in arch:
        return pkgutil.resolve_name(arch)(drop_path=drop_path)
    if not re.fullmatch("resnet(18|34|50|101)", arch):
        raise UserError(f"--arch {arch} is unknown; --help lists the names")

    net = torchvision.models.get_model(arch)
    net.embed_dim = net.fc.in_features
    net.fc = nn.Identity()
    if img_size <= 64:  # a stem that keeps the resolution
        net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out")
        net.maxpool = nn.Identity()
    return net.to(memory_format=torch.channels_last)


def initial_backbone(cfg, drop_path=0.0):
    """The backbone that a run starts from: random, or with the weights of --init."""
    backbone = build_backbone(cfg.arch, cfg.global_size, drop_path)
    if cfg.init:
        load_weights(backbone, cfg.init)
    return backbone


def read_weights(path, names=()):
    """The tensors of a backbone, by name, from a run, timm, torchvision, DINO or a similar project.

    Takes the teacher of a training checkpoint and drops classifiers, unless the file's names are
    exactly `names`. Runs no code of the file.
    """
    if not Path(path).is_file():
        raise UserError(f"{path} is not a file")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # DINO stores its options
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds
        raise UserError(f"{path} is not a file of tensors ({type(error).__name__})") from None
    for key in ("teacher", "student", "state_dict", "model"):
        if isinstance(state, dict) and key in state:
            state = state[key]
    if not isinstance(state, dict) or not all(torch.is_tensor(value) for value in state.values()):
        raise UserError(f"{path} holds no named tensors, nor any in teacher, state_dict or model")
    for name, value in state.items():
        if not value.isfinite().all():
            raise UserError(f"{path}: {name} is not finite")
    if state.keys() == set(names):
        return state

    state = {re.sub(r"^(module\.|_orig_mod\.)+", "", name): state[name] for name in state}
    inside = [name for name in state if name.startswith("backbone.")]
    if inside:  # a whole model: the backbone and its heads
        return {name.removeprefix("backbone."): state[name] for name in inside}
    classifier = r"(head|fc|projector|classifier\.head)\b"
    return {name: state[name] for name in state if not re.match(classifier, name)}


def load_weights(backbone, path):
    """Load the weights of a file into a backbone of the same architecture."""
    try:
        backbone.load_state_dict(read_weights(path, backbone.state_dict()))
    except RuntimeError as error:  # lists what differs
        raise UserError(f"{path} does not fit: {str(error)[:400]}") from None


# ==================================================================================================
# 7. The data: workers decode images and squash them to a square of bytes
# ==================================================================================================


def draw_patterns(count, seed, side=32):
    """Two-tone periodic patterns: bytes (count, 3, side, side), labels (count,), ten class names.

    None is symmetric under a quarter turn, so each image has a true orientation. The greys hardly
    vary: otherwise the network could tell images apart by their brightness.
    """
    gen = generator("cpu", seed, "patterns")

    def uniform(low, high):
        return low + (high - low) * torch.rand(count, 1, 1, generator=gen)

    # Coordinates in periods of the pattern: across and along, each (count, 2 * side, 2 * side)
    axis = (torch.arange(2 * side) + 0.5) / 2 - side / 2  # drawn at twice the size
    x, y = torch.meshgrid(axis, axis, indexing="xy")
    tilt = uniform(-10, 10).deg2rad()
    period = uniform(8, 11)  # pixels
    across = (x * tilt.cos() + y * tilt.sin()) / period + uniform(0, 1)
    along = (y * tilt.cos() - x * tilt.sin()) / period * uniform(0.95, 1.05) + uniform(0, 1)

    a = across % 1
    b = along % 1
    row = along.floor() % 2  # 0, 1, 0, 1, ... period by period
    zigzag = (2 * a - 1).abs()  # 1, 0, 1 from a = 0 to a = 1
    width = uniform(0.4, 0.48)  # of a stripe

    bright = dict(
        stripes=b < width,
        zigzag=(along + zigzag / 2) % 1 < width,
        bricks=(2 * along % 1 > width / 2)
        & ((across + (2 * along).floor() % 2 / 2) % 1 > width / 3),
        waves=(along + 0.15 * torch.sin(2 * math.pi * across)) % 1 < width,
        dashes=(b < width) & ((across + row / 2) % 1 < 0.65),
        triangles=b > zigzag + 0.3 - width / 2,
        ellipses=((a - 0.5) / 0.45) ** 2 + ((b - 0.5) / (0.5 * width)) ** 2 < 1,
        combs=(b < width / 2) | ((b < 0.75) & (2 * across % 1 < width)),
        chevrons=((along + zigzag) % 1 < width) & (a > 0.12) & (a < 0.88),
        steps=(along + (2 * across).floor() % 4 / 4) % 1 < width,
    )
    labels = torch.arange(count) % 10
    image = torch.stack(list(bright.values()))  # (10, count, 2 * side, 2 * side)
    image = image[labels, torch.arange(count)].float()  # (count, 2 * side, 2 * side)
    image = F.avg_pool2d(image[:, None], 2)  # (count, 1, side, side)

    dark = uniform(0.12, 0.14)[..., None]  # (count, 1, 1, 1)
    light = uniform(0.86, 0.88)[..., None]
    image = dark + (light - dark) * image
    image = image + 0.02 * torch.randn(image.shape, generator=gen)
    pixels = (image.clamp(0, 1) * 255).byte().expand(-1, 3, -1, -1).contiguous()
    return pixels, labels, list(bright)


def squash(pixels, side):
    """Bytes (3, H, W) -> (3, side, side), bicubic."""
    return F.interpolate(pixels[None], (side, side), mode="bicubic", antialias=True)[0]


def stored_side(size):
    """Side of the stored images for views of `size` pixels: 320 for 224; unchanged up to 64."""
    return size if size <= 64 else round(size * 10 / 7)


def decode(path, side):
    """An image file, upright and without alpha -> bytes (3, side, side) and its width / height."""
    try:
        if not os.path.isfile(path):
            raise OSError("not a file")  # reading a pipe would hang
        with Image.open(path) as image:
            image.draft("RGB", (side, side))  # decodes a large JPEG at a fraction of its size
            image.load()
            with contextlib.suppress(Exception):  # bad EXIF costs the orientation, not the image
                ImageOps.exif_transpose(image, in_place=True)
            if image.mode[0] in "IF":
                image = upper_bits(image)
            pixels = TF.pil_to_tensor(image.convert("RGB"))  # (3, H, W)
    except Exception as error:  # Pillow's readers raise many kinds
        raise UserError(f"{path} cannot be read ({error})") from None
    return squash(pixels, side), image.width / image.height


def upper_bits(image):
    """The upper 8 of an image's 16 bits."""
    white_is_zero = getattr(image, "tag_v2", {}).get(262) == 0  # a TIFF; Pillow inverts only 8 bits
    low, high = image.convert("I").getextrema()
    if image.mode == "F" or low < 0 or high > 65535:
        raise ValueError("its pixels have neither 8 nor 16 bits")
    image = image.convert("I").point(lambda value: value / 256).convert("L")
    return ImageOps.invert(image) if white_is_zero else image


LOADER_TIMEOUT = 3600  # seconds to wait for a batch; one of large PNGs can take half an hour


class Images(Dataset):
    """Images, as files or as bytes (N, 3, H, W). Item i: bytes (3, S, S), width / height, i.

    An unreadable file is reported. In training (`replace`) the next image takes its place; in an
    evaluation it is left out, and so is its label.
    """

    def __init__(self, side, images, labels, classes, ignored=0):
        self.side = side
        self.images = images
        self.labels = torch.as_tensor(labels)
        self.classes = classes
        self.ignored = ignored  # number of other files in the folder
        self.replace = False

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        if torch.is_tensor(self.images):
            return squash(self.images[i], self.side), 1.0, i
        for _ in range(len(self) if self.replace else 1):
            try:
                return *decode(self.images[i], self.side), i
            except UserError as error:
                action = "showing the next image" if self.replace else "leaving it out"
                sys.stderr.write(f"warning: {error}; {action}\n")
            i = (i + 1) % len(self)
        if self.replace:
            raise UserError("no image can be read")
        return None

    def digest(self):
        """A hash of the files' names: a resumed run must see the same files."""
        if torch.is_tensor(self.images):
            return seed_of(len(self), self.classes)
        root = os.path.commonpath(self.images)
        return seed_of(*[path.removeprefix(root) for path in self.images])

    def stream(self, batches, device, workers, replace=False):
        """For each list of indices, yield bytes (B, 3, S, S), aspect (B,) and i (B,).

        Close the stream after use, also on an error: the workers end with it.
        """
        self.replace = replace
        if torch.is_tensor(self.images):
            workers = 0
        loader = DataLoader(
            self,
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=collate,
            worker_init_fn=ignore_signals,
            pin_memory=device.type == "cuda",
        )
        try:
            end_if_hanging()
            for batch in loader:
                faulthandler.cancel_dump_traceback_later()
                if batch:
                    pixels, aspect, i = batch
                    pixels = pixels.to(device, non_blocking=True)
                    yield pixels, aspect.to(device, non_blocking=True), i
                end_if_hanging()
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # they keep the loader and its workers
            raise
        finally:
            faulthandler.cancel_dump_traceback_later()


def end_if_hanging():
    """End the process after LOADER_TIMEOUT; DataLoader would wait for hung workers to end."""
    faulthandler.dump_traceback_later(LOADER_TIMEOUT, exit=True, file=sys.__stderr__)


def collate(items):
    """A batch of the images that could be read; None if there are none."""
    items = [item for item in items if item is not None]
    if not items:
        return None
    pixels, aspect, i = default_collate(items)
    return pixels, aspect.float(), i


def ignore_signals(_):
    """Only the main process handles stop signals: it still needs the workers for its last steps."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def load_images(data, side):
    """The training and the test `Images` at side x side pixels; without labels, test is None."""
    if data == "patterns":
        train, val = draw_patterns(4096, seed=0), draw_patterns(2000, seed=1)
    elif data in ("cifar10", "cifar100"):
        train, val = load_cifar(data, train=True), load_cifar(data, train=False)
    elif not Path(data, "train").is_dir():
        return Images(side, *load_folder(Path(data), labelled=False)), None
    elif not Path(data, "val").is_dir():
        raise UserError(f"--data {data} has train/ but no val/; if unlabelled, pass {data}/train")
    else:
        train, val = load_folder(Path(data, "train")), load_folder(Path(data, "val"))

    train, val = Images(side, *train), Images(side, *val)
    if train.classes != val.classes:
        difference = sorted(set(train.classes) ^ set(val.classes))
        raise UserError(f"--data {data}: only one of train/ and val/ has the classes {difference}")
    return train, val


def load_cifar(name, train):
    """torchvision's copy in .data, downloaded on first use by one process of each machine."""
    dataset = getattr(torchvision.datasets, name.upper())
    if os.environ.get("LOCAL_RANK", "0") == "0":
        dataset(".data", download=True)
    if dist.is_initialized():
        dist.barrier()
    cifar = dataset(".data", train=train)
    pixels = torch.from_numpy(cifar.data).permute(0, 3, 1, 2).contiguous()  # (N, 3, 32, 32)
    return pixels, cifar.targets, cifar.classes


FORMATS = {"JPEG", "JPEG2000", "PNG", "GIF", "BMP", "PPM", "TIFF", "WEBP", "AVIF"}
SUFFIXES = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}


def load_folder(root, labelled=True):
    """The images in root/<class>/, where a class may be a link; without labels, all below root."""
    classes = [""]
    if labelled:
        entries = [entry for entry in root.iterdir() if not entry.name.startswith(".")]
        classes = sorted(entry.name for entry in entries if entry.is_dir())
        if any(entry.is_file() and entry.suffix.lower() in SUFFIXES for entry in entries):
            raise UserError(f"{root} holds images; expected only folders, one for each class")

    paths, labels, ignored = [], [], 0
    for label, name in enumerate(classes):
        images, others = find_images(root / name)
        paths += images
        labels += [label] * len(images)
        ignored += others
    if not paths:
        raise UserError(f"no images in {root} (linked subfolders are not searched)")
    return paths, labels, classes, ignored


def find_images(folder):
    """The images below a folder, sorted, and the number of other files, without hidden ones."""

    def cannot_list(error):
        raise UserError(f"cannot list {error.filename}: {error.strerror}")

    files = []
    for parent, folders, names in os.walk(folder, onerror=cannot_list):  # enters no linked folders
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [os.path.join(parent, name) for name in names if not name.startswith(".")]
    images = [file for file in files if Path(file).suffix.lower() in SUFFIXES]
    return sorted(images), len(files) - len(images)


def batches(count, cfg, start, stop):
    """Yield this process's image indices, step by step; the order depends on (seed, epoch)."""
    rank, world = distributed()
    share = cfg.batch // world
    for step in range(start, stop):
        epoch, position = divmod(step, count // cfg.batch)
        if position == 0 or step == start:
            order = torch.randperm(count, generator=generator("cpu", cfg.seed, "order", epoch))
        first = position * cfg.batch + rank * share
        yield order[first : first + share].tolist()


# ==================================================================================================
# 8. Collapse: do features and outputs still differ between images and between views?
# ==================================================================================================


@torch.no_grad()
def collapse_metrics(features, P, Q):
    """How a part may have collapsed. features (G, B, d); P (G, B, K) teacher, Q (G, B, K) student.

    entropy      of P, on average: ln K if uniform
    own          mean cosine of P with Q of the same view,
    other_view     of another view of the image: if equal to own, the output ignores the view,
    other_image    of another image: if equal to own, the output ignores the image
    kl_uniform   of the mean P: ln K if one prototype takes every image
    std          of normalised features, times sqrt(d): 0 if constant, about 1 if healthy
    rank         exp of the entropy of the features' singular values (arXiv 2210.02885)

    The last four need several images: below 8 they are left out.
    """
    metrics = dict(
        entropy=-torch.special.xlogy(P, P).sum(-1).mean(),
        own=F.cosine_similarity(P, Q, dim=-1).mean(),
        other_view=F.cosine_similarity(P, Q.flip(0), dim=-1).mean(),
    )
    if P.shape[1] >= 8:
        mean = P.mean((0, 1), dtype=torch.float64)  # (K,)
        features = features.double().flatten(0, 1)  # (G * B, d)
        unit = F.normalize(features, dim=-1)
        singular = torch.linalg.svdvals(features)
        share = singular / singular.sum() + 1e-7
        metrics.update(
            other_image=F.cosine_similarity(P, Q.roll(1, 1), dim=-1).mean(),
            kl_uniform=math.log(len(mean)) + torch.special.xlogy(mean, mean).sum(),
            std=unit.std(0).mean() * unit.shape[1] ** 0.5,
            rank=(-share * share.log()).sum().exp(),
        )
    return {name: float(value) for name, value in metrics.items()}


def collapse_alarm(part, m, K):
    """A warning from the metrics m of a part with K prototypes, and what to try; "" if healthy."""
    if part == "EF" and m["own"] - m["other_view"] < 0.05:
        return (
            "EF IS TRIVIAL: the output of h_EF ignores the view. With L_Orth this is expected; "
            'see README, "The equivariant factor".'
        )
    if part == "IR" and m["entropy"] > 0.99 * math.log(K):
        return (
            "COLLAPSE of IR: uniform output. Lower --teacher-temp, --out-dim, --momentum or --lr."
        )
    if "rank" not in m:
        return ""
    if m["kl_uniform"] > 0.95 * math.log(K):
        return f"COLLAPSE of {part}: one prototype takes every image. Raise --teacher-temp."
    if m["std"] < 0.1 or m["rank"] < 2:
        return f"COLLAPSE of {part}: all images have nearly the same features. Lower --lr."
    if part == "IR" and m["own"] - m["other_image"] < 0.02:
        return (
            "COLLAPSE of IR: its output ignores the image. Raise --epochs; lower --batch or --lr."
        )
    return ""


def epoch_metrics(run):
    """The last step's `collapse_metrics`, {"IR_entropy": ...}. Reports each part's alarm once."""
    teacher, student_logits = run.last
    run.last = None
    metrics = {}
    features = split(teacher.z, run.cfg.ratio)  # of IR (G, B, d) and EF (G, B, D - d)
    parts = zip(("IR", "EF"), features, run.centres, teacher.logits, student_logits)
    for part, z, centre, teacher_part, student_part in parts:
        P = sharpen(teacher_part, centre, run.cfg.teacher_temp)
        Q = F.softmax(student_part / STUDENT_TEMP, dim=-1)
        values = collapse_metrics(gather(z), gather(P), gather(Q))  # of all processes
        metrics.update({f"{part}_{name}": value for name, value in values.items()})

        alarm = collapse_alarm(part, values, P.shape[-1])
        if alarm and part in run.watched:
            report(alarm)
            run.watched.remove(part)  # once is enough
    return metrics


# ==================================================================================================
# 9. The training loop
# ==================================================================================================

LOG_EVERY = 10  # steps; reading a loss synchronises with the GPU. Stop signals are read here too
SAVE_EVERY = 300  # seconds; a checkpoint is also written when a run stops or ends


def setup():
    """Join the processes that torchrun started, if it did. Returns this process's device."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = False  # --precision fp32 means float32
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def distributed():
    """(rank, world) of this process; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def mean_over_processes(x):
    """Average a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


def average_gradients(parameters):
    """Average the gradients over all processes, in place and in one message. Returns them."""
    gradients = [p.grad for p in parameters if p.grad is not None]  # a loss may leave some unused
    if dist.is_initialized():
        flat = mean_over_processes(torch.cat([gradient.flatten() for gradient in gradients]))
        means = flat.split([gradient.numel() for gradient in gradients])
        for gradient, mean in zip(gradients, means):
            gradient.copy_(mean.view_as(gradient))
    return gradients


def gather(x):
    """The images of all processes, in the order of ranks: (G, B, ...) -> (G, world * B, ...)."""
    if not dist.is_initialized():
        return x
    shares = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(shares, x.contiguous())
    return torch.cat(shares, 1)


def report(text):
    """Print on rank 0, above the progress bar."""
    if distributed()[0] == 0:
        tqdm.write(text)
        sys.stdout.flush()


def cosine_schedule(start, end, steps, warmup=0):
    """A value per step: linear from 0 to `start` during `warmup`, then a cosine to `end` (DINO)."""
    ramp = torch.linspace(0, start, warmup, dtype=torch.float64)
    phase = torch.arange(steps - warmup, dtype=torch.float64) / (steps - warmup)
    cosine = end + (start - end) * (1 + torch.cos(math.pi * phase)) / 2
    return torch.cat([ramp, cosine]).tolist()


def autocast(device, precision):
    """The context of the networks' forward passes; weights stay float32."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    bf16 = precision == "bf16" or (precision == "auto" and has_bf16)
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


class Training:
    """All that changes while training: student, teacher, centres, optimiser, step.

    To try another loss, subclass it and pass --training module:Class, as extras/turn.py does. A
    layer of your own is saved and trained if you make it a new attribute of self.student, on
    self.device, and add its parameters to self.optimizer.
    """

    def __init__(self, cfg, steps_per_epoch, device="cpu"):
        if cfg.epochs == 0:
            epochs = max(20, math.ceil(1000 / steps_per_epoch))
            cfg = dataclasses.replace(cfg, epochs=epochs)
        self.cfg = cfg
        self.device = torch.device(device)
        self.steps_per_epoch = steps_per_epoch
        self.steps = cfg.epochs * steps_per_epoch
        self.step = 0
        self.digest = ""  # of the data
        self.last = None  # what `epoch_metrics` needs of an epoch's last step
        self.watched = {"IR", "EF"}  # the parts whose collapse is reported
        self.augment = MultiCrop(cfg)

        torch.manual_seed(cfg.seed)
        self.student = CLeVER(cfg, cfg.drop_path).to(device)
        self.teacher = CLeVER(cfg).to(device).requires_grad_(False)
        self.teacher.load_state_dict(self.student.state_dict())
        widths = [head.prototypes.out_features for head in self.student.heads]
        self.centres = [torch.zeros(K, device=device) for K in widths]

        decayed = [p for p in self.student.parameters() if p.ndim > 1]
        others = [p for p in self.student.parameters() if p.ndim <= 1]  # biases and norms
        groups = [dict(params=decayed), dict(params=others)]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
        warmup = min(10 * steps_per_epoch, self.steps // 10)
        self.lr = cosine_schedule(cfg.lr * cfg.batch / 256, 1e-6, self.steps, warmup)
        self.weight_decay = cosine_schedule(*cfg.weight_decay, self.steps)
        self.momentum = cosine_schedule(cfg.momentum, 1.0, self.steps)

        if distributed()[1] > 1 and self.device.type == "cuda":
            has_batch_norm = any(isinstance(m, nn.BatchNorm2d) for m in self.student.modules())
            if has_batch_norm and cfg.compile:  # would exceed torch's recompilation limit
                raise UserError("--compile does not support batch norm on several GPUs")
            for net in (self.student, self.teacher):
                nn.SyncBatchNorm.convert_sync_batchnorm(net)  # in place
        if cfg.compile:
            self.loss = torch.compile(self.loss)
            for net in (self.student, self.teacher):
                for module in (net.backbone, *net.heads):
                    module.compile(dynamic=False)

    def loss(self, student, teacher):
        """The terms of the loss by name, scalar tensors. All are logged; "loss" is minimised.

        student, teacher: `Output` for V and for G views of this process's images, that is z
        (V, B, D) and logits, IR (V, B, K) and EF (V, B, K'). self.augment.angles: their rotations.
        """
        heads = self.student.heads
        return clever_loss(self.cfg, student.logits, teacher.logits, self.centres, heads)


def save(run, out):
    """Write checkpoint.pt and backbone.pt, on rank 0. A kill while writing leaves the old ones."""
    if distributed()[0] > 0:
        return
    if not all(p.isfinite().all() for p in run.student.parameters()):
        raise UserError(f"a weight is not finite at step {run.step}; the older checkpoint is kept")
    checkpoint = dict(
        student=run.student.state_dict(),
        teacher=run.teacher.state_dict(),
        optimizer=run.optimizer.state_dict(),
        centres=run.centres,
        step=run.step,
        digest=run.digest,
    )
    backbone = {name: value.cpu() for name, value in run.teacher.backbone.state_dict().items()}
    states = {"backbone.pt": backbone, "checkpoint.pt": checkpoint}
    for name, state in states.items():
        torch.save(state, out / f"{name}.{os.getpid()}.tmp")
    for name in states:
        os.replace(out / f"{name}.{os.getpid()}.tmp", out / name)


def restore(run, out):
    """Continue from checkpoint.pt, if there is one. No code in the file is run."""
    path = out / "checkpoint.pt"
    if not path.exists():
        if (out / "backbone.pt").exists():
            raise UserError(f"{out} has no checkpoint.pt; to start again, remove its backbone.pt")
        return  # a new run
    checkpoint = torch.load(path, map_location=run.device, weights_only=True)
    if checkpoint["digest"] != run.digest:
        raise UserError(f"--data {run.cfg.data} holds other files than when {out} was started")
    run.student.load_state_dict(checkpoint["student"])
    run.teacher.load_state_dict(checkpoint["teacher"])
    run.optimizer.load_state_dict(checkpoint["optimizer"])
    run.centres = checkpoint["centres"]
    run.step = checkpoint["step"]


def save_crops(path, images, views):
    """A picture of the first 8 images, each next to its views, as the network sees them."""
    side = max(96, views[0].shape[-1])
    columns = [normalize(images[:8] / 255)] + [view[:8] for view in views]
    tiles = torch.stack([F.interpolate(x, (side, side)) for x in columns], 1).flatten(0, 1).cpu()
    tiles = tiles * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    torchvision.utils.save_image(tiles.clamp(0, 1), path, nrow=len(columns), padding=8)


def open_folder(cfg):
    """The folder of the run, with its config.json. Only --resume may enter one that holds a run."""
    name = f"{Path(cfg.data).resolve().name}-{cfg.method}-{cfg.aug}-{time.strftime('%m%d-%H%M%S')}"
    out = Path(cfg.out or Path("runs", name))
    if distributed()[0] > 0:
        return out
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**vars(cfg), "out": str(out)}, indent=1)
    path = out / "config.json"
    if cfg.resume:
        new = out / f"config.json.{os.getpid()}.tmp"
        new.write_text(text)
        os.replace(new, path)
        return out
    try:
        with open(path, "x") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(f"--out {out} holds a run; use --resume or another --out") from None
    return out


@contextlib.contextmanager
def stop_signals():
    """Collect SIGTERM and Ctrl-C, so the loop can save and end; a second Ctrl-C ends at once."""
    received, previous = [], {}

    def note(number, frame):
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    if threading.current_thread() is threading.main_thread():  # only it may set handlers
        for number in (signal.SIGTERM, signal.SIGINT):
            previous[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def start(cfg, data, device):
    """The `Training` and the folder of a run, new or continued."""
    world = distributed()[1]
    if not 0 < cfg.batch <= len(data):
        raise UserError(f"--batch {cfg.batch} must be between 1 and {len(data)}, the image count")
    if cfg.batch % world:
        raise UserError(f"--batch {cfg.batch} must be a multiple of {world}, the process count")
    steps_per_epoch = len(data) // cfg.batch

    kind = pkgutil.resolve_name(cfg.training) if cfg.training else Training
    run = kind(cfg, steps_per_epoch, device)
    cfg = run.cfg
    run.digest = data.digest()
    if cfg.resume:
        restore(run, Path(cfg.out))  # before config.json is written, because it may refuse
    out = open_folder(cfg)

    million = sum(p.numel() for p in run.student.backbone.parameters()) / 1e6
    report(f"{cfg.method}, {cfg.arch} ({million:.1f}M parameters), {cfg.aug}, {world} x {device}")
    classes = f"in {len(data.classes)} classes" if data.classes != [""] else "without labels"
    report(f"{cfg.data}: {len(data)} images {classes}; {data.ignored} other files ignored")
    steps = f"{cfg.epochs} epochs x {steps_per_epoch} steps x {cfg.batch} images"
    report(f"{steps}, from step {run.step}")
    report(f"peak lr {max(run.lr):.2g}, precision {cfg.precision}; writes to {out}")
    if run.step == 0 and run.steps < 500:
        report(f"warning: only {run.steps} steps; raise --epochs or lower --batch")
    return run, out


def train(cfg, data, device):
    """Train on `Images` as cfg says. Returns the `Training` and the folder of the run."""
    run, out = start(cfg, data, device)
    cfg = run.cfg
    rank, _ = distributed()
    first_step = run.step
    began = time.monotonic()
    saved = began
    recent = []  # loss terms since the last line of the log
    steps = batches(len(data), cfg, run.step, run.steps)
    stream = data.stream(steps, device, cfg.workers, replace=True)
    # None: shown only on a terminal
    bar = tqdm(total=run.steps, initial=run.step, unit="step", disable=rank > 0 or None)

    # Closing the stream ends the loader's workers, however the loop ends.
    with stop_signals() as signals, contextlib.closing(stream), contextlib.closing(bar):
        for images, aspect, _ in stream:
            views = run.augment(images, aspect, run.step)
            if run.step == 0 and rank == 0:
                save_crops(out / "crops.png", images, views)
            recent.append(train_step(run, views, run.step))
            run.step += 1
            bar.update()

            if run.step % LOG_EVERY == 0 or run.step % run.steps_per_epoch == 0:
                steps_per_second = (run.step - first_step) / (time.monotonic() - began)
                bar.set_postfix_str(log(run, recent, steps_per_second, out))
                recent = []
                received = torch.tensor(float(len(signals)), device=device)
                stop = mean_over_processes(received) > 0  # all processes stop at the same step
                if stop or run.step == run.steps or time.monotonic() - saved > SAVE_EVERY:
                    save(run, out)
                    saved = time.monotonic()
                if stop:
                    command = f"--out {shlex.quote(str(out))} --resume"
                    report(f"stopped at step {run.step}; continue with {command}")
                    number = signals[0] if signals else signal.SIGTERM  # another process got it
                    raise SystemExit(128 + number)
    return run, out


def log(run, recent, steps_per_second, out):
    """Add the means of recent loss terms to log.jsonl; return them as text for the progress bar."""
    rows = [torch.stack(list(terms.values())) for terms in recent]  # one for each step
    mean = mean_over_processes(torch.stack(rows).mean(0))
    line = dict(zip(recent[0], mean.tolist()))
    if not math.isfinite(line["loss"]):
        raise UserError(f"the loss is not finite at step {run.step}: {line}; try a lower --lr")

    epoch = run.step / run.steps_per_epoch
    speed = steps_per_second * run.cfg.batch
    text = "  ".join(f"{name} {value:.4f}" for name, value in line.items())
    text = f"epoch {epoch:.2f}/{run.cfg.epochs}  {text}  {speed:.0f} images/s"
    line.update(step=run.step, epoch=epoch, lr=run.lr[run.step - 1], images_per_second=speed)
    if run.step % run.steps_per_epoch == 0:
        report(text)
        line.update(epoch_metrics(run))
    if distributed()[0] == 0:
        with open(out / "log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
    return text


# ==================================================================================================
# 10. What was learned: the class by k-NN and the angle by ridge regression, from z, IR and EF
# ==================================================================================================

CHUNK = 256  # images that pass the backbone together


def centre_view(images, aspect, size, flip, angle, shift=None):
    """The test view, the centre square: bytes (B, 3, S, S) -> (B, 3, size, size) in [0, 1]."""
    fraction = 0.875 if size > 64 else 1.0  # 224 / 256, as usual on ImageNet
    half = torch.stack([(1 / aspect).clamp(max=1), aspect.clamp(max=1)], 1) * fraction  # (B, 2)
    box = torch.cat([torch.zeros_like(half), half], 1)  # (B, 4)
    return warp(images.float() / 255, size, box, flip, angle, shift)


def disc(size, device):
    """1 inside the inscribed disc of a view, 0 outside: (size, size)."""
    axis = (torch.arange(size, device=device) * 2 + 1) / size - 1
    return (axis**2 + axis[:, None] ** 2 <= 1).float()


def part_columns(D, ratio):
    """The dimensions of each part of z, by name. "random" is a control, as large as EF."""
    z = torch.arange(D)
    z_ir, z_ef = split(z, ratio)
    if len(z_ef) == 0:
        return dict(all=z)
    drawn = torch.randperm(D, generator=generator("cpu", "random part"))[: len(z_ef)]
    return dict(all=z, IR=z_ir, EF=z_ef, random=drawn)


def knn(bank, labels, queries, classes, k=20, temperature=0.07):
    """Weighted k-NN by cosine (DINO): bank (N, d), labels (N,), queries (M, d) -> votes (M, C)."""
    bank = F.normalize(bank, dim=-1)
    votes = []
    for chunk in F.normalize(queries, dim=-1).split(CHUNK):
        cosine, index = (chunk @ bank.T).topk(min(k, len(bank)), 1)  # each (m, k)
        weight = ((cosine - 1) / temperature).exp()
        votes.append(weight.new_zeros(len(chunk), classes).scatter_add_(1, labels[index], weight))
    return torch.cat(votes)


def accuracy(scores, labels, k=1):
    """Top-k accuracy in % of scores (N, C) for labels (N,). A tie counts against the label."""
    own = scores.gather(1, labels[:, None])  # (N, 1)
    rank = (~(scores < own)).sum(1)  # from 1; unlike >=, this also counts NaN against the label
    return 100 * float((rank <= k).double().mean())


def ridge_r2(x, angle, x_test, angle_test, penalty=0.01):
    """R2 on test rows of ridge regression from features (N, d) to (cos, sin) of angles (N,)."""

    def target(angle):
        return torch.stack([angle.deg2rad().cos(), angle.deg2rad().sin()], 1).double()  # (N, 2)

    std, mean = torch.std_mean(x.double(), 0)
    std = std + 1e-4  # a constant feature varies only by rounding
    x = (x - mean) / std
    x_test = (x_test - mean) / std
    y, y_test = target(angle), target(angle_test)

    gram = x.T @ x / len(x) + penalty * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    w = torch.linalg.solve(gram, x.T @ (y - y.mean(0)) / len(x))  # (d, 2)
    error = y_test - y.mean(0) - x_test @ w
    unexplained = error.square().sum(0) / (y_test - y_test.mean(0)).square().sum(0)
    return float(1 - unexplained.mean())


@torch.no_grad()
def extract(backbone, cfg, data, count, device):
    """z (N, D) of `count` images, upright and rotated; their angles (N,) and labels (N,).

    All are cut to the inscribed disc: the black corners of a rotated square give its angle away.
    """

    def represent(images, aspect, angle):
        size, no_flip = cfg.global_size, torch.zeros_like(angle).bool()
        view = centre_view(images, aspect, size, no_flip, angle) * disc(size, device)
        return backbone.forward(normalize(view)).float()  # (B, D); forward skips torch.compile

    rows = torch.randperm(len(data), generator=generator("cpu", "subset"))[:count]
    angles = torch.rand(len(data), generator=generator("cpu", "angles")) * 180 - 90  # of each image
    stream = data.stream([chunk.tolist() for chunk in rows.split(CHUNK)], device, cfg.workers)
    upright, rotated, index = [], [], []
    with contextlib.closing(stream):
        for images, aspect, i in stream:
            angle = angles[i].to(device)
            upright.append(represent(images, aspect, torch.zeros_like(angle)))
            rotated.append(represent(images, aspect, angle))
            index.append(i)
    i = torch.cat(index)
    return torch.cat(upright), torch.cat(rotated), angles[i].to(device), data.labels[i].to(device)


def probe(backbone, cfg, data, val, device):
    """What a backbone knows of class and angle: {"k-NN, upright": {"all": 92.9, ...}, ...}."""
    backbone.to(device).eval()
    bank, bank_rotated, bank_angle, labels = extract(backbone, cfg, data, 4096, device)
    upright, rotated, angle, truth = extract(backbone, cfg, val, 2000, device)
    results = {"k-NN, upright": {}, "k-NN, rotated": {}, "R2 of the angle": {}}
    for part, dims in part_columns(bank.shape[1], cfg.ratio).items():
        for name, queries in (("k-NN, upright", upright), ("k-NN, rotated", rotated)):
            votes = knn(bank[:, dims], labels, queries[:, dims], len(data.classes))
            results[name][part] = accuracy(votes, truth)
        r2 = ridge_r2(bank_rotated[:, dims], bank_angle, rotated[:, dims], angle)
        results["R2 of the angle"][part] = r2
    return results


def compare(cfg, data, val, device, initial, trained):
    """Print and return what a backbone knew before training and what it knows after."""
    before = probe(initial, cfg, data, val, device)
    after = probe(trained, cfg, data, val, device)
    parts = list(after["R2 of the angle"])
    rows = []
    for name in after:
        digits = 1 if name.startswith("k-NN") else 3
        pairs = [(before[name][part], after[name][part]) for part in parts]
        rows.append([name, *[f"{a:.{digits}f} -> {b:.{digits}f}" for a, b in pairs]])
    report("\nTest images, cut to a disc. k-NN: accuracy in %. R2: 1 is exact, 0 is guessing.\n")
    print_table(["initial -> trained", *parts], rows)
    return dict(before=before, after=after)


def print_table(head, rows):
    """Print a Markdown table; the head and each row are lists of strings."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, ["-" * width for width in widths], *rows):
        report("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |")


# ==================================================================================================
# 11. The command line
# ==================================================================================================


def parse(argv=None):
    """The `Config` of a command line, whose options override those of a preset."""
    parser = argparse.ArgumentParser(
        usage="clever.py [options]",
        description="In brackets: the defaults for a folder of images, which are the paper's.",
        argument_default=argparse.SUPPRESS,
    )
    for field in dataclasses.fields(Config):
        kind = dict(type=field.type, choices=field.metadata["choices"])
        if field.type is tuple:
            kind = dict(type=float, nargs=2)
        if field.type is bool:
            kind = dict(action="store_true")
        help = field.metadata["help"] + (f" [{field.default}]" if field.default != "" else "")
        parser.add_argument(flag(field.name), help=help, **kind)
    given = vars(parser.parse_args(argv))

    out = given.get("out", "")
    if "resume" in given and not out:
        raise UserError("--resume needs --out, the folder of the run")
    if "resume" in given and ("data" not in given or Path(out, "config.json").exists()):
        started = load_config(out)
        for name, placeholder in (("recipe", "auto"), ("epochs", 0)):
            if given.get(name) == placeholder:
                del given[name]  # the run has the value that it stood for
        cfg = dataclasses.replace(started, **given)
        for name in given.keys() - {"data", "init", "out", "workers", "resume"}:
            if getattr(cfg, name) != getattr(started, name):
                value = getattr(started, name)
                raise UserError(f"{flag(name)} is {value} in this run and cannot change")
        return cfg

    recipe = given.get("recipe", "auto")
    if recipe == "auto":
        recipe = AUTO.get(given.get("data", "patterns"), "paper")
    return Config(**{**RECIPES[recipe], **given, "recipe": recipe})


def load_config(out):
    """The configuration of the run in a folder."""
    path = Path(out, "config.json")
    if not path.exists():
        raise UserError(f"{out} is not a run folder: it has no config.json")
    return Config(**json.loads(path.read_text()))


def main(argv=None):
    """Train, then compare the backbone before and after."""
    cfg = parse(argv)
    device = setup()
    rank, _ = distributed()
    data, val = load_images(cfg.data, stored_side(cfg.global_size))
    run, out = train(cfg, data, device)
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank > 0:
        return

    command = f"python eval_linear.py {shlex.quote(str(out))}"
    if val is None:
        report(f"Next, the features of your images: {command} --features {shlex.quote(cfg.data)}")
        return
    torch.manual_seed(cfg.seed)
    initial = initial_backbone(cfg)  # as `Training` made it
    results = compare(run.cfg, data, val, device, initial, run.teacher.backbone)
    (out / "compare.json").write_text(json.dumps(results, indent=1))
    report(f"\nNext: {command} --quick")


if __name__ == "__main__":
    sys.modules["clever"] = sys.modules["__main__"]  # for your own modules that import clever
    try:
        main()
    except UserError as error:
        sys.exit(f"clever.py: {error}")
