"""CLeVER: Contrastive Learning Via Equivariant Representation (Song et al., arXiv 2406.00262), in one file.

    torchrun clever.py                                          the demo: no data, no download
    torchrun --nproc-per-node gpu clever.py --data IMAGENET100 --out runs/in100    the paper's recipe
    python clever.py --data MY_IMAGES --recipe small            your own images, shrunk to 32 px, on a laptop
    python clever.py --data cifar10 --method dino --aug baug    the baseline
    python clever.py --out runs/in100 --resume                  go on where a run stopped

A view v = t(I) of an image I under a random augmentation t passes the backbone: z = f(v). The
representation is split, z = (z_IR, z_EF): views of one image agree in the invariant representation (IR)
and differ in the equivariant factor (EF). Each part has a projection head, h_IR and h_EF. A student learns
by gradient from a teacher, which is the moving average of the student (DINO, arXiv 2104.14294):

    P = softmax((h_IR(z_IR) of the teacher - c) / 0.04)    Q = softmax(h_IR(z_IR) of the student / 0.1)
    P', Q' the same of h_EF(z_EF), with its own c'. c: the moving average of the teacher's logits

    L_CL   = mean of -P_i . log Q_j      over the global views i and all views j != i of an image
    L_Orth = mean of |cos(P'_i, Q'_j)|   over the same pairs
    L_PReg = |sum of squares of h_IR's parameters - sum of squares of h_EF's|
    L      = L_CL + lambda_orth L_Orth + lambda_reg L_PReg

Without the split this is DINO, `--method dino`: L = L_CL.
Letters in comments: B images of a process, stored as S x S pixels; V views of each, the first G = 2 global;
D features (d of a part), K prototypes (K' of EF), N or M rows, C classes; t is a `Training`.
"""
import argparse
import dataclasses
import hashlib
import json
import math
import os
import random
import shlex
import shutil
import signal
import sys
import time
import traceback
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends at once; `train` saves first
    sys.stderr = sys.stderr or open(os.devnull, "w")  # a closed one is None
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
import torchvision.transforms.functional as TF
from filelock import FileLock
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

# ======== 1. The representation: z = f(v) is split in two, each part has a projection head
def split(z, ratio):
    """z (..., D) -> z_IR (..., d), z_EF (..., D - d), d = int(ratio * D): the paper's rho (section 3)."""
    d = int(ratio * z.shape[-1])
    return z[..., :d], z[..., d:]

class ProjectionHead(nn.Module):
    """h: features (..., in_dim) -> float32 logits (..., out_dim), cosines to out_dim prototypes (DINO)."""
    def __init__(self, in_dim, out_dim=65536, hidden_dim=2048, bottleneck_dim=256):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim), nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim), nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim))
        self.prototypes = nn.Linear(bottleneck_dim, out_dim, bias=False)
        self.register_buffer("centre", torch.zeros(out_dim))  # c; only the teacher's is used
        init_linear(self)

    def forward(self, x):
        x = F.normalize(self.mlp(x), dim=-1)
        return self.prototypes(x) / self.prototypes.weight.norm(dim=-1)

class CLeVER(nn.Module):
    """Backbone f and heads h_IR, h_EF: a student or a teacher. DINO has no split and no h_EF."""
    def __init__(self, cfg, drop_path=0.0):
        super().__init__()
        self.ratio = cfg.ratio
        self.backbone = build_backbone(cfg.arch, cfg.global_size, drop_path)
        z_ir, z_ef = split(torch.empty(self.backbone.embed_dim), self.ratio)
        if cfg.method == "clever" and 0 in (len(z_ir), len(z_ef)):
            raise UserError(f"--ratio {cfg.ratio} leaves nothing to IR or to EF; take one nearer to 0.8")
        self.heads = nn.ModuleList([ProjectionHead(len(z_ir), cfg.out_dim, cfg.hidden_dim)])
        if len(z_ef) > 0:
            self.heads.append(ProjectionHead(len(z_ef), cfg.ef_out_dim or cfg.out_dim, cfg.hidden_dim))

    def embed(self, views):
        """V views (B, 3, h, w) -> z (V, B, D), in one pass of the backbone for each size of view."""
        z = [None] * len(views)
        for size in sorted({view.shape[-1] for view in views}):
            same = [i for i, view in enumerate(views) if view.shape[-1] == size]
            images = torch.stack([views[i] for i in same], 1)  # (B, same, 3, h, w): an image's rows adjoin
            features = self.backbone(images.flatten(0, 1)).unflatten(0, (-1, len(same)))  # (B, same, D)
            for i, z_i in zip(same, features.unbind(1)):
                z[i] = z_i  # (B, D)
        return torch.stack(z)

    def project(self, z):
        """z (V, B, D) -> logits of each part: (V, B, K) of IR and, with a split, (V, B, K') of EF."""
        return tuple(head(part) for head, part in zip(self.heads, split(z, self.ratio)))

    def forward(self, views):
        """V views (B, 3, h, w) -> (ir_logits, ef_logits); DINO has the first alone."""
        return self.project(self.embed(views))

# ======== 2. The losses (paper, section 3.3): pure functions of logits and parameters
STUDENT_TEMP = 0.1

def sharpen(teacher, centre, temp=0.04):
    """P = softmax((logits - c) / temp) of the teacher, without gradient: (..., K) -> (..., K)."""
    return F.softmax((teacher.detach() - centre) / temp, dim=-1)

def mean_over_pairs(terms):
    """The mean over the global views i and all views j != i of an image: terms (G, V, B) -> scalar."""
    G, V, _ = terms.shape
    different = 1 - torch.eye(G, V, dtype=terms.dtype, device=terms.device)  # 0 where i = j
    return (terms.mean(2) * different).sum() / (G * (V - 1))

def invariance_loss(student, teacher, centre, student_temp=STUDENT_TEMP, teacher_temp=0.04):
    """L_CL, the mean of -P_i . log Q_j: views of one image agree in IR. It is DINO's loss.
    student (V, B, K) and teacher (G, B, K): logits of h_IR, the global views first; centre c (K,)."""
    P = sharpen(teacher, centre, teacher_temp)
    log_Q = F.log_softmax(student / student_temp, dim=-1)
    cross_entropy = -torch.einsum("gbk,vbk->gvb", P, log_Q)
    return mean_over_pairs(cross_entropy)

def orthogonality_loss(student, teacher, centre, student_temp=STUDENT_TEMP, teacher_temp=0.04):
    """L_Orth, the mean of |cos(P'_i, Q'_j)|: views of one image differ in EF. The arguments are those of
    `invariance_loss`, of h_EF. Softmaxes are not negative: the paper's absolute value changes nothing."""
    P = sharpen(teacher, centre, teacher_temp)
    Q = F.softmax(student / student_temp, dim=-1)
    product = torch.einsum("gbk,vbk->gvb", P, Q)
    cosine = product / (P.norm(dim=-1)[:, None] * Q.norm(dim=-1))  # (G, V, B) / ((G, 1, B) * (V, B))
    return mean_over_pairs(cosine.abs())

def projector_regularization(head_ir, head_ef):
    """L_PReg, the difference of the heads' sums of squared norms of parameters: neither wins by growing."""
    ir = sum(p.norm().square() for p in head_ir.parameters())
    ef = sum(p.norm().square() for p in head_ef.parameters())
    return (ir - ef).abs()

def clever_loss(cfg, student, teacher, centres, heads):
    """L = L_CL + lambda_orth L_Orth + lambda_reg L_PReg, as a dict of named terms; DINO has L_CL alone.
    student, teacher: the logits of each part, as `CLeVER.forward` returns them; centres and heads alike."""
    L_CL = invariance_loss(student[0], teacher[0], centres[0], teacher_temp=cfg.teacher_temp)
    if len(heads) == 1:
        return dict(L_CL=L_CL, loss=L_CL)
    L_Orth = orthogonality_loss(student[1], teacher[1], centres[1], teacher_temp=cfg.teacher_temp)
    L_PReg = projector_regularization(heads[0], heads[1])
    loss = L_CL + cfg.lambda_orth * L_Orth + cfg.lambda_reg * L_PReg
    return dict(L_CL=L_CL, L_Orth=L_Orth, L_PReg=L_PReg, loss=loss)

# ======== 3. One training step
def train_step(t, views, step):
    """One optimisation step of t (a `Training`, section 8) from V views (B, 3, h, w), the global ones first.
    step counts from 0 and picks the values of the schedules. Returns the named loss terms of this
    process's images, tensors on the device: nothing in here waits for it."""
    cfg = t.cfg
    torch.manual_seed(seed_of(cfg.seed, "drop path", step))
    for group in t.optimizer.param_groups:
        group["lr"] = t.lr[step]
    t.optimizer.param_groups[0]["weight_decay"] = t.weight_decay[step]  # group 1 has none

    # 1. The teacher sees the global views alone.
    with torch.no_grad(), autocast(t.device, cfg.precision):
        z = t.teacher.embed(views[:2])  # (G, B, D)
        teacher_logits = t.teacher.project(z)  # (G, B, K), (G, B, K')

    # 2. The student sees all views.
    with autocast(t.device, cfg.precision):
        student_logits = t.ddp(views)  # (V, B, K), (V, B, K')

    # 3. The losses, in float32; gradients, which DDP averages over the processes.
    centres = [head.centre for head in t.teacher.heads]
    terms = t.loss(cfg, student_logits, teacher_logits, centres, t.student.heads)
    t.optimizer.zero_grad()
    terms["loss"].backward()

    # 4. The student's step: each parameter's gradient is clipped on its own; prototypes are frozen at first.
    for p in t.student.parameters():
        nn.utils.clip_grad_norm_(p, CLIP)
    if step < cfg.freeze_epochs * t.steps_per_epoch:
        for head in t.student.heads:
            head.prototypes.weight.grad = None
    t.optimizer.step()

    # 5. The teacher follows the student, the centres follow the teacher's logits.
    with torch.no_grad():
        for slow, fast in zip(t.teacher.parameters(), t.student.parameters()):
            slow.lerp_(fast, 1 - t.momentum[step])
        for head, logits in zip(t.teacher.heads, teacher_logits):
            mean = logits.mean((0, 1), dtype=head.centre.dtype)  # (K,)
            head.centre.lerp_(mean_over_processes(mean), 1 - CENTRE_MOMENTUM)
    if (step + 1) % t.steps_per_epoch == 0:  # what `collapse_metrics` looks at
        t.last = z, teacher_logits, [logits[:2].detach().clone() for logits in student_logits]
    return {name: term.detach() for name, term in terms.items()}

# ======== 4. The recipe: the defaults are the paper's; smaller data changes some of them
CLIP = 3.0  # largest norm of a parameter's gradient
CENTRE_MOMENTUM = 0.9
GROUPS = dict(data="data", method="method", aug="views", epochs="optimisation", seed="run")  # of --help

def option(default, help, *allowed):
    """A field of `Config`: its default, its help, and the lowest and highest number, or words, allowed."""
    return dataclasses.field(default=default, metadata=dict(help=help, allowed=allowed))

@dataclasses.dataclass
class Config:
    """Every option. The command line is made of it (section 10). DINO has ratio 1, whatever is given."""
    data: str = option("patterns", "patterns, cifar10, cifar100 or a folder, sorted by train/<class> or not")
    out: str = option("auto", "folder of the run; auto: runs/<data>-<method>-<aug>-<time>")
    recipe: str = option("paper", "which defaults the others take", "paper", "small", "demo")
    workers: int = option(-1, "processes that decode images; -1: one a core, 16 at most", -1, 1024)
    method: str = option("clever", "clever, or dino: the baseline, without the split", "clever", "dino")
    ratio: float = option(0.8, "rho: the first int(rho * D) features are IR, the others EF", 0, 1)
    lambda_orth: float = option(1.0, "weight of L_Orth", 0, 1e6)
    lambda_reg: float = option(0.001, "weight of L_PReg", 0, 1e6)
    arch: str = option("vit_tiny", "vit_micro, _tiny, _small, _base, resnet18, 34, 50, 101, vmamba_tiny")
    out_dim: int = option(65536, "K, prototypes of the IR head", 2, 1e7)
    ef_out_dim: int = option(0, "K', prototypes of the EF head; 0: as many as the IR head", 0, 1e7)
    hidden_dim: int = option(2048, "width of the heads' hidden layers", 1, 1e6)
    teacher_temp: float = option(0.04, "of the teacher's softmax; less if it is uniform", 1e-4, 10)
    momentum: float = option(0.996, "of the teacher at first, cosine to 1; less for short runs", 0, 1)
    aug: str = option("caug", "baug; caug: and rotation; caug+: and elastic", "baug", "caug", "caug+")
    global_size: int = option(224, "side of the 2 global views in pixels", 8, 4096)
    local_size: int = option(96, "side of the local views in pixels", 8, 4096)
    local_views: int = option(8, "number of local views", 0, 100)
    global_scale: tuple = option((0.4, 1.0), "area of a global view as a fraction of the image", 1e-4, 1)
    local_scale: tuple = option((0.05, 0.4), "area of a local view as a fraction of the image", 1e-4, 1)
    epochs: int = option(200, "passes over the data; the first tenth, 10 at most, warms up", 1, 1e6)
    batch: int = option(512, "images a step, over all processes", 1, 1e6)
    lr: float = option(5e-4, "peak learning rate for 256 images a step; scaled by batch / 256", 1e-9, 100)
    weight_decay: tuple = option((0.04, 0.4), "at the start, at the end; none on 1-D parameters", 0, 100)
    freeze_epochs: int = option(1, "epochs with frozen prototypes; more if the loss does not fall", 0, 1e6)
    drop_path: float = option(0.1, "stochastic depth of the student's last block, 0 at its first", 0, 0.99)
    seed: int = option(0, "of everything random", 0, 2 ** 62)
    precision: str = option("auto", "bf16, fp32; auto: bf16 on a GPU that has it", "auto", "fp32", "bf16")
    compile: bool = option(False, "torch.compile the networks and the losses")
    resume: bool = option(False, "go on with the run in --out")

    def __post_init__(self):
        """Raises UserError for a value that is not allowed."""
        if self.method == "dino":
            self.ratio = 1.0
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            allowed = field.metadata["allowed"]
            if field.type is tuple:
                setattr(self, field.name, tuple(value))  # argparse and JSON have lists
            if field.type is str and allowed and value not in allowed:
                raise UserError(f"{flag(field.name)} {value} is unknown; expected {', '.join(allowed)}")
            if field.type in (int, float, tuple):
                low, high = allowed
                first, last = value if field.type is tuple else (value, value)
                if not (low <= first <= high and low <= last <= high):
                    raise UserError(f"{flag(field.name)} {value} must be between {low} and {high}")
        patch = VIT.get(self.arch, {}).get("patch_size", 1)
        if self.global_size % patch or self.local_size % patch:
            raise UserError(f"--global-size and --local-size must be multiples of {patch}, the patch's side")

def flag(name):
    """The command-line spelling of a field of `Config`."""
    return "--" + name.replace("_", "-")

SMALL_IMAGES = dict(arch="vit_micro", global_size=32, local_size=16, local_views=2, hidden_dim=512,
                    out_dim=1024, teacher_temp=0.03, batch=64, lr=2e-3)
RECIPES = dict(  # what smaller data changes of the paper's
    small=dict(SMALL_IMAGES, local_scale=(0.1, 0.4), momentum=0.98, epochs=20, freeze_epochs=0),
    demo=dict(SMALL_IMAGES, global_scale=(0.5, 1.0), local_scale=(0.2, 0.5), epochs=12, freeze_epochs=12))
RECIPE_OF = dict(patterns="demo", cifar10="small", cifar100="small")  # a folder: the paper's

class UserError(Exception):
    """What ends a command, in one sentence: what is wrong, what was expected, what to do. Exit code 2."""

# ======== 5. The views: geometric augmentations are changes of coordinates; compose them, sample once
MEAN = (0.485, 0.456, 0.406)  # of ImageNet, as the field normalises
STD = (0.229, 0.224, 0.225)

def seed_of(*key):
    """A seed that is a function of a key such as (seed, what for, step) alone."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1

def generator(device, *key):
    """A random generator on a device, with the seed of the key."""
    return torch.Generator(device).manual_seed(seed_of(*key))

def warp(images, size, box, flip, angle, shift=None):
    """One view of each image, sampled once through a composition of changes of coordinates: the paper's t.
    images (B, 3, S, S); size of the view in pixels; box (B, 4): the crop's centre x, y and half extents x, y
    in the image's [-1, 1] coordinates; flip (B,) bool; angle (B,) in degrees, counter-clockwise; shift
    (B, size, size, 2) in the view's [-1, 1] coordinates, or None. -> (B, 3, size, size), black outside."""
    axis = (torch.arange(size, device=images.device, dtype=images.dtype) * 2 + 1) / size - 1
    point = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)[None]  # (1, size, size, 2)
    if shift is not None:  # elastic deformation
        point = point + shift  # (B, size, size, 2)
    inside = (point.abs() <= 1).all(-1)  # (B or 1, size, size)
    x, y = point.unbind(-1)  # each (B or 1, size, size)
    rad = angle.deg2rad()[:, None, None]  # (B, 1, 1)
    x, y = rad.cos() * x - rad.sin() * y, rad.sin() * x + rad.cos() * y  # rotation, corners stay black
    inside = inside & (x.abs() <= 1) & (y.abs() <= 1)
    x = torch.where(flip[:, None, None], -x, x)  # flip
    cx, cy, hx, hy = box[:, :, None, None].unbind(1)  # each (B, 1, 1)
    grid = torch.stack([cx + hx * x, cy + hy * y], -1)  # crop: (B, size, size, 2)
    view = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return view * inside[:, None]

def crop_box(area, shape, place, aspect):
    """Boxes of random resized crops by torchvision's rule, ten tries and then the centre: (B, 4) for `warp`.
    area, shape (B, 10) of the tries; place (B, 2): x, y; shape and an image's aspect (B,): width / height."""
    w = (area * shape / aspect[:, None]).sqrt()  # (B, 10), as a fraction of the width
    h = (area / shape * aspect[:, None]).sqrt()  # (B, 10), of the height
    fits = (w <= 1) & (h <= 1)
    first = fits.int().argmax(1, keepdim=True)  # (B, 1)
    found = fits.any(1, keepdim=True)  # (B, 1)
    drawn = torch.cat([w.gather(1, first), h.gather(1, first)], 1)  # (B, 2)
    nearest = aspect.clamp(3 / 4, 4 / 3) / aspect
    centred = torch.stack([nearest.clamp(max=1), (1 / nearest).clamp(max=1)], 1)  # (B, 2)
    half = torch.where(found, drawn, centred)
    centre = torch.where(found, (2 * place - 1) * (1 - half), 0)
    return torch.cat([centre, half], 1)

def gaussian_matrix(size, sigma, radius):
    """Matrices M that blur: M X Mᵀ is an image X blurred, mirrored at its ends. sigma (B,); radius < size."""
    tap = torch.arange(-radius, radius + 1, device=sigma.device)
    weight = torch.exp(-0.5 * (tap / sigma[:, None]) ** 2)  # (B, taps)
    weight = weight / weight.sum(1, keepdim=True)
    source = torch.arange(size, device=sigma.device)[:, None] + tap  # (size, taps)
    source = (size - 1) - ((size - 1) - source.abs()).abs()  # mirrored into 0 .. size - 1
    matrix = sigma.new_zeros(len(sigma), size, size)
    weight = weight[:, None].expand(-1, size, -1)  # (B, size, taps)
    return matrix.scatter_add_(2, source.expand(len(sigma), -1, -1), weight)

def elastic_shift(noise, alpha, sigma):
    """torchvision's ElasticTransform: noise in [-1, 1] (B, 2, s, s) -> displacements (B, s, s, 2), in the
    view's [-1, 1] coordinates. alpha: their strength, sigma: their smoothness, both in pixels."""
    size = noise.shape[-1]
    smooth = gaussian_matrix(size, noise.new_full((1,), sigma), min(size - 1, int(4 * sigma + 0.5)))
    return (smooth @ noise @ smooth.mT).permute(0, 2, 3, 1) * (alpha / size)  # (B, s, s, 2)

def shift_hue(x, turn):
    """Turn the hue of images (B, 3, h, w) by turn (B,) of a circle, as torchvision's adjust_hue."""
    r, g, b = x.unbind(1)  # each (B, h, w)
    value = x.amax(1)
    chroma = value - x.amin(1)
    safe = torch.where(chroma == 0, 1, chroma)
    hue = torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe)
    hue = torch.where(value == r, (g - b) / safe, hue) + 6 * turn[:, None, None]  # in sixths of a circle
    offset = torch.arange(5, 0, -2, device=x.device)  # 5, 3, 1: of red, green, blue
    sixth = (hue[:, None] + offset[:, None, None]) % 6  # (B, 3, h, w)
    return value[:, None] - chroma[:, None] * torch.minimum(sixth, 4 - sixth).clamp(0, 1)

def blend(other, x, factor):
    """From other (factor 0; it may broadcast) to x (B, 3, h, w) (factor 1) and beyond: factor (B,)."""
    return torch.lerp(other, x, factor[:, None, None, None]).clamp(0, 1)

def color_jitter(x, brightness, contrast, saturation, hue, order=(0, 1, 2, 3)):
    """torchvision's ColorJitter of images (B, 3, h, w) by factors (B,); 1, 1, 1, 0 change nothing."""
    for operation in order:  # 0 brightness, 1 contrast, 2 saturation, 3 hue
        if operation == 0:
            x = blend(torch.zeros_like(x), x, brightness)
        elif operation == 1:
            x = blend(TF.rgb_to_grayscale(x).mean((1, 2, 3), keepdim=True), x, contrast)
        elif operation == 2:
            x = blend(TF.rgb_to_grayscale(x), x, saturation)
        else:
            x = shift_hue(x, hue)
    return x

def normalize(x):
    """Subtract ImageNet's mean and divide by its standard deviation: (B, 3, h, w), channel by channel."""
    return torch.stack([(x[:, c] - MEAN[c]) / STD[c] for c in range(3)], 1)

class MultiCrop(nn.Module):
    """V views of each image, 2 global, then local ones, made on the batch, on its device (paper, section 4).
    All random numbers are a function of (seed, step), drawn for the global batch and sliced by rank."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg

    @torch.no_grad()
    def forward(self, images, aspect, step):
        """This process's bytes (B, 3, S, S) and width / height (B,) -> V views (B, 3, size, size)."""
        gen = generator(images.device, self.cfg.seed, "views", step)
        orders = random.Random(seed_of(self.cfg.seed, "orders", step))  # known without asking the device
        images = images.to(torch.float32) / 255
        V = 2 + self.cfg.local_views
        return [self.make_view(images, aspect, view, gen, orders.sample(range(4), 4)) for view in range(V)]

    def make_view(self, images, aspect, view, gen, order):
        """View number `view` of images (B, 3, S, S) in [0, 1], normalised: (B, 3, size, size)."""
        cfg = self.cfg
        B = len(images)
        rank, world = distributed()
        size = cfg.global_size if view < 2 else cfg.local_size
        def uniform(low, high, *shape):
            draws = torch.rand(B * world, *shape, generator=gen, device=gen.device)
            return low + (high - low) * draws[rank * B:(rank + 1) * B]  # (B, *shape)
        # geometry: crop, flip, rotation, elastic deformation, in one warp
        area = uniform(*(cfg.global_scale if view < 2 else cfg.local_scale), 10)
        shape = uniform(math.log(3 / 4), math.log(4 / 3), 10).exp()
        box = crop_box(area, shape, uniform(0, 1, 2), aspect)
        flip = uniform(0, 1) < 0.5
        angle = uniform(-90, 90) * (cfg.aug != "baug")  # drawn in any case: the other draws stay the same
        shift = None
        if cfg.aug == "caug+":
            shift = elastic_shift(uniform(-1, 1, 2, size, size), 100 * size / 224, 5 * size / 224)
            shift = shift * (uniform(0, 1) < 0.5)[:, None, None, None]
        x = warp(images, size, box, flip, angle, shift)
        # colour: jitter, grey, blur, solarise
        jitter = uniform(0, 1) < 0.8
        strengths = ((0.6, 1.4, 1), (0.6, 1.4, 1), (0.8, 1.2, 1), (-0.1, 0.1, 0))  # low, high, no change
        factors = [torch.where(jitter, uniform(low, high), same) for low, high, same in strengths]
        x = color_jitter(x, *factors, order)
        grey = (uniform(0, 1) < 0.2)[:, None, None, None]
        x = torch.where(grey, TF.rgb_to_grayscale(x), x)
        shrink = cfg.global_size / 224  # small images are hardly blurred
        blurred = uniform(0, 1) < (1.0, 0.1, 0.5)[min(view, 2)]
        sigma = torch.where(blurred, uniform(0.1, 2.0) * shrink, 1e-3)
        radius = min(math.ceil(6 * shrink), size - 1)  # 3 of the largest sigma
        blur = gaussian_matrix(size, sigma, radius)[:, None]  # (B, 1, size, size)
        x = blur @ x @ blur.mT
        if view == 1:
            solarised = (uniform(0, 1) < 0.2)[:, None, None, None]
            x = torch.where(solarised & (x >= 0.5), 1 - x, x)
        return normalize(x)

# ======== 6. The backbones, with the names of timm and DINO (ViT) and of torchvision (ResNet)
def init_linear(module, std=0.02):
    """Truncated-normal weights and zero biases in all linear layers of a module."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

def mlp(dim):
    """The two linear layers of a block: (..., dim) -> (..., dim)."""
    return nn.Sequential(OrderedDict(fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim)))

def stochastic_depth(x, rate, training):
    """Drops rows of a residual branch x (N, ...) with probability `rate`; all processes draw for all rows."""
    if rate == 0 or not training:
        return x
    rank, world = distributed()
    kept = (torch.rand(world, len(x), device=x.device)[rank] >= rate).to(x.dtype)  # (N,)
    return x / (1 - rate) * kept.view(-1, *[1] * (x.dim() - 1))

class Attention(nn.Module):
    """Multi-head self-attention: (N, tokens, D) -> (N, tokens, D)."""
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def queries_keys_values(self, x):
        """Three tensors (N, heads, tokens, D/heads) from (N, tokens, D)."""
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))  # (N, tokens, 3, heads, D/heads)
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x):
        q, k, v = self.queries_keys_values(x)
        x = F.scaled_dot_product_attention(q, k, v)  # (N, heads, tokens, D/heads)
        return self.proj(x.transpose(1, 2).flatten(2))  # (N, tokens, heads, D/heads) -> (N, tokens, D)

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
    """ViT (arXiv 2010.11929): images (N, 3, H, W), which the patch divides -> the CLS token (N, D)."""
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
        """Images (N, 3, H, W) -> (N, tokens, D): CLS, then the h * w patches, with positions added."""
        x = self.patch_embed.proj(x)  # (N, D, h, w)
        side = math.isqrt(self.pos_embed.shape[1] - 1)
        pos = self.pos_embed[:, 1:].mT.unflatten(2, (side, side))  # (1, D, side, side)
        pos = F.interpolate(pos, x.shape[2:], mode="bicubic")  # (1, D, h, w)
        patches = x.flatten(2).mT + pos.flatten(2).mT  # (N, h * w, D)
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)  # (N, 1, D)
        return torch.cat([cls, patches], 1)

    def get_intermediate_layers(self, x, n=1):
        """The tokens (N, tokens, D) after each of the last n blocks, normalised, as a list."""
        x = self.tokens(x)
        layers = []
        for block in self.blocks:
            x = block(x)
            layers = (layers + [x])[-n:]
        return [self.norm(layer) for layer in layers]

    def get_last_selfattention(self, x):
        """Attention weights of the last block (N, heads, tokens, tokens); row 0 is the CLS token's."""
        x = self.blocks[:-1](self.tokens(x))
        last = self.blocks[-1]
        q, k, _ = last.attn.queries_keys_values(last.norm1(x))  # each (N, heads, tokens, D/heads)
        return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)

    def forward(self, x):
        return self.get_intermediate_layers(x)[0][:, 0]

VIT = dict(  # with init_std 0.02 the blocks of the narrow vit_micro would be nearly linear
    vit_micro=dict(patch_size=8, embed_dim=96, depth=4, heads=3, init_std=0.06),
    vit_tiny=dict(patch_size=16, embed_dim=192, depth=12, heads=3),
    vit_small=dict(patch_size=16, embed_dim=384, depth=12, heads=6),
    vit_base=dict(patch_size=16, embed_dim=768, depth=12, heads=12))
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101")

def build_backbone(arch, img_size, drop_path=0.0, patch_size=None):
    """A backbone f with .embed_dim: (N, 3, H, W) -> (N, D), or UserError. img_size: side of global views."""
    if arch in VIT:
        options = {**VIT[arch], "patch_size": patch_size or VIT[arch]["patch_size"]}
        return VisionTransformer(img_size, drop_path=drop_path, **options)
    if arch in RESNETS:
        net = torchvision.models.get_model(arch)
        net.embed_dim = net.fc.in_features
        net.fc = nn.Identity()
        if img_size <= 64:  # a stem that keeps the resolution
            net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out")
            net.maxpool = nn.Identity()
        return net.to(memory_format=torch.channels_last)
    if arch == "vmamba_tiny":
        from assets.vmamba import VMamba
        return VMamba(min(2 * drop_path, 0.99))  # its authors' 0.2 where ViTs have 0.1
    raise UserError(f"--arch {arch} is unknown; expected {', '.join((*VIT, *RESNETS))} or vmamba_tiny")

# ======== 7. The data: a worker decodes and squashes to a square of bytes
def draw_patterns(count, seed, side=32):
    """Two-tone periodic patterns of ten classes, none symmetric under a quarter turn: bytes (count, 3, side,
    side), labels (count,). Nearly constant greys, for random ones are a shortcut that the network takes."""
    gen = generator("cpu", seed, "patterns")
    def between(low, high):
        return low + (high - low) * torch.rand(count, 1, 1, generator=gen)
    axis = (torch.arange(2 * side) + 0.5) / 2 - side / 2  # drawn at twice the size
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    tilt = between(-10, 10).deg2rad()
    period = between(8, 11)  # pixels
    across = (x * tilt.cos() + y * tilt.sin()) / period + between(0, 1)  # in periods: (count, 2 side, 2 side)
    along = (y * tilt.cos() - x * tilt.sin()) / period * between(0.95, 1.05) + between(0, 1)
    a = across % 1
    b = along % 1
    zigzag = (2 * a - 1).abs()
    duty = between(0.4, 0.48)
    bright = [
        b < duty,  # stripes
        (along + zigzag / 2) % 1 < duty,  # zigzag
        (2 * along % 1 > duty / 2) & ((across + (2 * along % 2).floor() / 2) % 1 > duty / 3),  # bricks
        (along + 0.15 * torch.sin(2 * math.pi * across)) % 1 < duty,  # waves
        (b < duty) & ((across + 0.5 * (along % 2).floor()) % 1 < 0.65),  # dashes
        b > zigzag + 0.3 - duty / 2,  # triangles
        ((a - 0.5) / 0.45) ** 2 + ((b - 0.5) / (0.5 * duty)) ** 2 < 1,  # ellipses
        (b < duty / 2) | ((b < 0.75) & (2 * across % 1 < duty)),  # combs
        ((along + zigzag) % 1 < duty) & (a > 0.12) & (a < 0.88),  # chevrons
        (along + 0.25 * (2 * across % 4).floor()) % 1 < duty]  # steps
    labels = torch.arange(count) % 10
    image = torch.stack(bright, 1)[torch.arange(count), labels].float()  # (count, 2 side, 2 side)
    low = between(0.12, 0.14)
    high = between(0.86, 0.88)
    image = low + (high - low) * F.avg_pool2d(image[:, None], 2)[:, 0]  # (count, side, side)
    image = image + 0.02 * torch.randn(image.shape, generator=gen)
    pixels = (image.clamp(0, 1) * 255).byte()[:, None]  # (count, 1, side, side)
    return pixels.expand(-1, 3, -1, -1).contiguous(), labels

def squash(pixels, side):
    """Bytes (3, H, W) -> (3, side, side), bicubic."""
    return F.interpolate(pixels[None], (side, side), mode="bicubic", antialias=True)[0]

def decode(path, side):
    """An image file, upright by its EXIF: bytes (3, side, side), its width / height. Raises UserError."""
    try:
        if not os.path.isfile(path):  # to open a pipe would hang
            raise OSError("no regular file")
        with Image.open(path) as image:
            image.draft("RGB", (side, side))  # a JPEG decodes smaller, not below side
            image = ImageOps.exif_transpose(image)
            if image.mode in ("I", "F"):
                raise ValueError("pixels of 32 bits have no known range")
            if image.mode.startswith("I;16"):  # keep the upper 8 bits
                image = image.convert("I").point(lambda value: value / 256).convert("L")
            pixels = TF.pil_to_tensor(image.convert("RGB"))  # (3, H, W)
    except Exception as e:  # the readers of Pillow raise many kinds
        raise UserError(f"{path} cannot be read ({e}); mend or remove it")
    return squash(pixels, side), image.width / image.height

class Images(Dataset):
    """Images as files (`paths`) or as bytes in memory (`pixels`); item i: bytes (3, S, S), width / height.
    A file that `decode` refuses ends the run, or if `replace`, is named and the next one is shown for it."""
    def __init__(self, side, labels, classes, paths=None, pixels=None, replace=False):
        self.side = side
        self.labels = torch.as_tensor(labels)
        self.classes = classes
        self.paths = paths
        self.pixels = pixels
        self.replace = replace

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        if self.paths is None:
            return squash(self.pixels[i], self.side), 1.0
        for k in range(i, i + 100):
            try:
                return decode(self.paths[k % len(self)], self.side)
            except UserError as e:
                if not self.replace:
                    raise
                with suppress(OSError):  # a closed terminal does not end a run
                    print(f"warning: {e}; the next image takes its place", file=sys.stderr)
        raise UserError("a hundred images in a row cannot be read; mend or remove them")

    def stream(self, index_lists, device, workers):
        """Yield (bytes (B, 3, S, S), aspect (B,)) on the device for each list of indices."""
        if self.paths is None and self.pixels.shape[-1] == self.side:
            workers = 0  # nothing to do for them
        if workers < 0:
            workers = min(16, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        fork = "fork" if workers and sys.platform == "linux" else None  # a signal would kill a fork server
        loader = DataLoader(self, batch_sampler=index_lists, num_workers=workers, worker_init_fn=quiet_worker,
                            pin_memory=device.type == "cuda", multiprocessing_context=fork)
        for pixels, aspect in loader:
            yield pixels.to(device, non_blocking=True), aspect.to(device, torch.float32, non_blocking=True)

def quiet_worker(_):
    """A stop signal, sent to all, is for the main process: its workers still bring the data of its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

def load_images(data, subset, side):
    """The "train" or "val" images at side x side pixels; without labels "val" is None. Raises UserError."""
    if data == "patterns":
        pixels, labels = draw_patterns(4096, 0) if subset == "train" else draw_patterns(2000, 1)
        return Images(side, labels, list("0123456789"), pixels=pixels)
    if data in ("cifar10", "cifar100"):
        dataset = getattr(torchvision.datasets, data.upper())
        try:
            with FileLock(".data.lock"):  # one process of a machine downloads, the others wait
                cifar = dataset(".data", train=subset == "train", download=True)
        except (OSError, RuntimeError) as e:
            raise UserError(f"--data {data}: neither in .data nor to be downloaded ({e}); name a folder")
        pixels = torch.from_numpy(cifar.data).permute(0, 3, 1, 2).contiguous()  # (N, 3, 32, 32)
        return Images(side, cifar.targets, cifar.classes, pixels=pixels)
    labelled = os.path.isdir(f"{data}/train") and os.path.isdir(f"{data}/val")
    if subset == "val" and not labelled:
        return None
    root = os.path.join(data, subset) if labelled else data
    paths = []
    for folder, _, names in os.walk(root, followlinks=True):
        for name in names:
            if name.lower().endswith(IMG_EXTENSIONS) and name not in ("crops.png", "visualize.png"):
                paths.append(os.path.join(folder, name))
    if not paths:
        raise UserError(f"--data {data}: no image in {root}; name a folder, patterns, cifar10 or cifar100")
    paths.sort()
    names = [os.path.relpath(path, root).split(os.sep)[0] for path in paths]  # the folders in root
    classes = sorted(set(names))
    index = {name: c for c, name in enumerate(classes)}
    return Images(side, [index[name] for name in names], classes, paths, replace=subset == "train")

def batches(count, cfg, start, stop):
    """Yield this process's image indices of each step; an epoch's order is a function of (seed, epoch)."""
    rank, world = distributed()
    share = cfg.batch // world
    for step in range(start, stop):
        epoch, position = divmod(step, count // cfg.batch)
        if position == 0 or step == start:
            order = torch.randperm(count, generator=generator("cpu", cfg.seed, "order", epoch))
        first = position * cfg.batch + rank * share
        yield order[first:first + share].tolist()

# ======== 8. The loop: what changes while training, collapse metrics, checkpoints, log
LOG_EVERY = 10  # steps between lines of the log: to read a loss is to wait for the device
SAVE_EVERY = 600  # seconds between checkpoints; each epoch ends with one
CHUNK = 256  # images that pass the backbone together in an evaluation

def distributed():
    """(rank, world) of this process; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

def mean_over_processes(x):
    """Average a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x

def gather(x):
    """The images of all processes, in the order of the ranks: (G, B, ...) -> (G, world * B, ...)."""
    if not dist.is_initialized():
        return x
    shares = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(shares, x.contiguous())
    return torch.cat(shares, 1)

def cosine_schedule(start, end, steps, warmup=0):
    """A value for each step: linear from 0 to `start` over `warmup` steps, then a cosine to `end` (DINO)."""
    ramp = torch.linspace(0, start, warmup, dtype=torch.float64)
    phase = torch.arange(steps - warmup, dtype=torch.float64) / (steps - warmup)
    cosine = end + (start - end) * (1 + torch.cos(math.pi * phase)) / 2
    return torch.cat([ramp, cosine]).tolist()

def autocast(device, precision):
    """The context of the networks' forward passes; weights stay float32. auto: bf16 on a GPU that has it."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    bf16 = precision == "bf16" or (precision == "auto" and has_bf16)
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)

class Training:
    """All that changes while training: student, teacher (its heads hold the centres), optimiser, step."""
    def __init__(self, cfg, steps_per_epoch, device="cpu"):
        self.cfg = cfg
        self.steps_per_epoch = steps_per_epoch
        self.device = torch.device(device)
        self.step = 0
        self.alarmed = set()  # the parts whose alarm was said
        torch.manual_seed(cfg.seed)
        self.student = CLeVER(cfg, cfg.drop_path).to(device)
        self.teacher = CLeVER(cfg).to(device).requires_grad_(False)  # without drop path
        self.teacher.load_state_dict(self.student.state_dict())
        decayed = [p for p in self.student.parameters() if p.ndim > 1]
        others = [p for p in self.student.parameters() if p.ndim <= 1]  # biases and norms, as DINO
        groups = [dict(params=decayed), dict(params=others, weight_decay=0.0)]
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        self.steps = cfg.epochs * steps_per_epoch
        warmup = min(10 * steps_per_epoch, self.steps // 10)
        self.lr = cosine_schedule(cfg.lr * cfg.batch / 256, 1e-6, self.steps, warmup)
        self.weight_decay = cosine_schedule(*cfg.weight_decay, self.steps)
        self.momentum = cosine_schedule(cfg.momentum, 1.0, self.steps)
        several = distributed()[1] > 1
        for net in (self.student, self.teacher):
            if several and self.device.type == "cuda":
                nn.SyncBatchNorm.convert_sync_batchnorm(net)  # in place: statistics of the whole batch
            if cfg.compile:
                for module in (net.backbone, *net.heads):
                    module.compile(dynamic=False)
        self.loss = torch.compile(clever_loss) if cfg.compile else clever_loss
        self.ddp = nn.parallel.DistributedDataParallel(self.student) if several else self.student

def collapse_metrics(features, P, Q):
    """How a part may have collapsed: features (G, B, d); P (G, B, K) of the teacher, Q of the student.
    entropy: of P, on average (ln K: uniform); kl_uniform: of the mean P (ln K: one prototype takes all); std:
    of the normalised features, times sqrt(d) (0: constant, about 1: healthy); rank: exp of the entropy of the
    singular values (arXiv 2210.02885); own, other_view, other_image: the mean cosine of P with Q of the same
    view, of the other global view, of another image. Where own equals other_view, the view is not known."""
    mean = P.mean((0, 1), dtype=torch.float64)  # (K,)
    features = features.double().flatten(0, 1)  # (G * B, d)
    unit = F.normalize(features, dim=-1)
    singular = torch.linalg.svdvals(features)
    share = singular / singular.sum() + 1e-7
    return dict(
        entropy=float(-torch.special.xlogy(P, P).sum(-1).mean()),
        kl_uniform=float(math.log(len(mean)) + torch.special.xlogy(mean, mean).sum()),
        std=float(unit.std(0).mean() * unit.shape[1] ** 0.5),
        rank=float((-share * share.log()).sum().exp()),
        own=float(F.cosine_similarity(P, Q, dim=-1).mean()),
        other_view=float(F.cosine_similarity(P, Q.flip(0), dim=-1).mean()),
        other_image=float(F.cosine_similarity(P, Q.roll(1, 1), dim=-1).mean()))

def collapse_alarm(part, m, K):
    """A sentence when the `collapse_metrics` m of a part with K prototypes say collapse; else ""."""
    if part == "EF" and m["own"] - m["other_view"] < 0.05:
        return (f"EF IS TRIVIAL: its output does not know the view (cosine with its own {m['own']:.3f}, with "
                f"another view {m['other_view']:.3f}, another image {m['other_image']:.3f}).")
    if part == "IR" and m["entropy"] > 0.99 * math.log(K):
        return "COLLAPSE of IR: the teacher's output is uniform. Try: lower --teacher-temp or --lr."
    if m["kl_uniform"] > 0.95 * math.log(K):
        return f"COLLAPSE of {part}: one prototype takes every image. Try: raise --teacher-temp."
    if m["std"] < 0.1 or m["rank"] < 2:
        return f"COLLAPSE of {part}: all images have nearly the same features. Try: lower --lr."
    return ""

def epoch_metrics(t):
    """At an epoch's end: the `collapse_metrics`, {"IR_entropy": ...}; says a part's first alarm."""
    z, teacher, student = t.last
    t.last = None
    metrics = {}
    for i, (part, head) in enumerate(zip(("IR", "EF"), t.teacher.heads)):
        features = gather(split(z, t.cfg.ratio)[i])  # (G, B, d)
        P = gather(sharpen(teacher[i], head.centre, t.cfg.teacher_temp))  # (G, B, K)
        Q = gather(F.softmax(student[i] / STUDENT_TEMP, dim=-1))
        found = collapse_metrics(features, P, Q)
        metrics.update({f"{part}_{name}": value for name, value in found.items()})
        alarm = collapse_alarm(part, found, P.shape[-1])
        if alarm and part not in t.alarmed:
            say(alarm)
            t.alarmed.add(part)
    return metrics

def say(text, end="\n"):
    """Print beside the progress bar, on rank 0; a closed pipe or a full disk does not end a run."""
    with suppress(OSError, ValueError, AttributeError):  # full, closed, none at all
        if distributed()[0] == 0:
            tqdm.write(text, end=end)
            sys.stdout.flush()

def write(path, content):
    """Write a text, or as torch.save does, aside, then rename. Returns whether it worked, or warns."""
    try:
        with open(f"{path}.tmp", "wb") as file:
            if isinstance(content, str):
                file.write(content.encode())
            else:
                torch.save(content, file)
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)
        return True
    except (OSError, RuntimeError) as e:  # torch.save raises the latter
        say(f"warning: {path} cannot be written ({e})")
        with suppress(OSError):  # its room is for others
            os.remove(f"{path}.tmp")
        return False

def open_folder(cfg):
    """The folder of a run, with config.json, and the lock that rank 0 holds to the end. Raises UserError."""
    name = f"{Path(cfg.data).resolve().name}-{cfg.method}-{cfg.aug}-{time.strftime('%m%d-%H%M%S')}"
    out = Path("runs", name) if cfg.out in ("", "auto") else Path(cfg.out)
    lock = FileLock(out / "lock", timeout=0)
    if distributed()[0] == 0:
        try:
            out.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            if not cfg.resume and ((out / "checkpoint.pt").exists() or (out / "backbone.pt").exists()):
                raise UserError(f"--out {out} holds a run; go on with --resume, or name another folder")
            if not cfg.resume:
                (out / "config.json").write_text(json.dumps({**vars(cfg), "out": str(out)}, indent=1))
        except OSError as e:  # the lock's Timeout is one
            raise UserError(f"--out {out} cannot be written, or another process is writing to it ({e})")
    return out, lock

def save(t, data, out):
    """Rank 0 writes backbone.pt, checkpoint.pt. Returns whether it worked; UserError: a weight not finite."""
    if distributed()[0] > 0:
        return True
    if not all(p.isfinite().all() for p in t.student.parameters()):
        raise UserError(f"a weight is not finite at step {t.step}; the last checkpoint is from before")
    state = dict(student=t.student.state_dict(), teacher=t.teacher.state_dict(), step=t.step,
                 optimizer=t.optimizer.state_dict(), images=len(data))
    return write(out / "backbone.pt", t.teacher.backbone.state_dict()) and write(out / "checkpoint.pt", state)

def restore(t, data, out):
    """Go on from checkpoint.pt, running no code of it. Raises UserError naming what is wrong."""
    path = out / "checkpoint.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["images"] != len(data):
            raise ValueError(f"it saw {state['images']} images, --data now holds {len(data)}")
        for name in ("student", "teacher", "optimizer"):
            getattr(t, name).load_state_dict(state[name])
        for p, moments in t.optimizer.state.items():  # of another shape they would crash AdamW
            if not p.shape == moments["exp_avg"].shape == moments["exp_avg_sq"].shape:
                raise ValueError("the optimiser's state has another shape")
        if not 0 <= state["step"] <= t.steps:
            raise ValueError(f"step {state['step']} is none of this run")
        t.step = state["step"]
    except Exception as e:
        reason = " ".join(f"{type(e).__name__}: {e}".split())[:200]
        raise UserError(f"{path} cannot be resumed ({reason}); mend that, or start anew in another --out")

def save_crops(path, images, views):
    """A picture of the first images (B, 3, S, S) of bytes, each beside its views as the network sees them."""
    side = max(96, views[0].shape[-1])
    pictures = [F.interpolate(x[:8], (side, side)) for x in (normalize(images[:8] / 255), *views)]
    tiles = torch.stack(pictures, 1).flatten(0, 1).cpu()  # (rows * (1 + V), 3, side, side)
    tiles = tiles * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    sheet = TF.to_pil_image(torchvision.utils.make_grid(tiles.clamp(0, 1), nrow=len(pictures), padding=16))
    for i, title in enumerate(["image", "global", "global"] + ["local"] * (len(views) - 2)):
        ImageDraw.Draw(sheet).text((16 + i * (side + 16), 2), title)
    with suppress(OSError):  # a full disk does not end a run
        sheet.save(path)

def setup(batch):
    """Join the processes that torchrun started, if it did; the device of this one. Raises UserError."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if batch % world:
        raise UserError(f"--batch {batch} cannot be shared evenly by {world} processes; take a multiple")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = False  # --precision fp32 means it
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device

def stored_side(size):
    """Side of the stored images for views of `size` pixels: small ones as they are, 320 px for 224."""
    return size if size <= 64 else round(size * 10 / 7)

def prepare(cfg):
    """(The `Training`, training images, test images or None, folder) of a checked run. Raises UserError."""
    data = load_images(cfg.data, "train", stored_side(cfg.global_size))
    if cfg.batch > len(data):
        raise UserError(f"--batch {cfg.batch} is larger than the data of {len(data)} images; lower it")
    val = load_images(cfg.data, "val", data.side)
    if val and val.classes != data.classes:
        raise UserError(f"--data {cfg.data}: the classes in train/ and val/ differ; name train/ alone")
    if cfg.compile and not any(map(shutil.which, ("g++", "clang++", "cl", os.environ.get("CXX", "c++")))):
        raise UserError("--compile needs a C++ compiler; install g++, or leave it out")
    device = setup(cfg.batch)
    t = Training(cfg, len(data) // cfg.batch, device)
    out, t.lock = open_folder(cfg)
    if cfg.resume:
        restore(t, data, out)
    mine = torch.tensor([len(data), t.step], dtype=torch.float64, device=device)
    if not torch.equal(mean_over_processes(mine.clone()), mine):
        raise UserError("the processes found different --data or checkpoints; nodes need one shared --out")
    million = sum(p.numel() for p in t.student.backbone.parameters()) / 1e6
    labels = f"{len(data.classes)} classes" if val else "no val/: no comparison at the end"
    say(f"{cfg.method}, {cfg.arch} of {million:.1f}M parameters, {cfg.aug}, {distributed()[1]} x {device}\n"
        f"{cfg.data}: {len(data)} images, {labels}\n"
        f"{cfg.epochs} epochs of {t.steps_per_epoch} steps of {cfg.batch} images, peak lr {max(t.lr):.2g}\n"
        f"precision {cfg.precision}; writes to {out}, from step {t.step}")
    return t, data, val, out

def train(cfg):
    """Train as cfg says. Returns what `prepare` does. Raises UserError."""
    t, data, val, out = prepare(cfg)
    rank, world = distributed()
    augment = MultiCrop(cfg)
    journal = open(out / "log.jsonl" if rank == 0 else os.devnull, "a", buffering=1)
    saved = save(t, data, out)
    signals = []  # the SIGTERM and SIGINT that came
    def note(number, frame):
        signals.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # now Ctrl-C ends the process at once
    usual = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    saved_time = told_time = began = time.monotonic()
    first = t.step  # of the means in the log: the epoch's first step, or the resumed one
    sums = {}  # of the loss terms from `first` on, on the device
    bar = tqdm(total=t.steps * cfg.batch, initial=t.step * cfg.batch, unit=" images", unit_scale=True,
               disable=None if rank == 0 else True)  # None: shown on a terminal alone
    for images, aspect in data.stream(batches(len(data), cfg, t.step, t.steps), t.device, cfg.workers):
        views = augment(images, aspect, t.step)
        if t.step == 0 and rank == 0:
            save_crops(out / "crops.png", images, views)
        for name, term in train_step(t, views, t.step).items():
            sums[name] = sums.get(name, 0.0) + term.double()
        t.step += 1
        bar.update(cfg.batch)
        epoch_ends = t.step % t.steps_per_epoch == 0
        if not (epoch_ends or t.step % LOG_EVERY == 0 or (signals and world == 1)):
            continue  # several processes agree below, where they meet, to stop
        means = mean_over_processes(torch.stack([*sums.values()]) / (t.step - first))
        line = dict(zip(sums, means.tolist()), step=t.step, epoch=t.step / t.steps_per_epoch)
        if not math.isfinite(line["loss"]):
            raise UserError(f"not finite: {line}; try a lower --lr or --precision fp32, in another --out")
        line["lr"] = t.lr[t.step - 1]
        line["images_per_second"] = (t.step - first) * cfg.batch / (time.monotonic() - began)
        told = f"epoch {line['epoch']:.2f}/{cfg.epochs}"
        bar.set_description(f"{told}  loss {line['loss']:.4f}", refresh=False)
        if epoch_ends or (bar.disable and time.monotonic() - told_time > 60):
            terms = "  ".join(f"{name} {line[name]:.4f}" for name in sums)
            say(f"{told}  {terms}  {line['images_per_second']:.0f} images/s")
            told_time = time.monotonic()
        if epoch_ends:
            line.update(epoch_metrics(t))
            sums = {}
            first = t.step
            began = time.monotonic()
        with suppress(OSError):  # a full disk does not end a run; `write` warns
            journal.write(json.dumps(line) + "\n")
        stop = mean_over_processes(torch.tensor(float(len(signals)), device=t.device)) > 0
        if epoch_ends or stop or time.monotonic() - saved_time > SAVE_EVERY:
            saved = save(t, data, out)
            saved_time = time.monotonic()
        if stop:
            say(f"stopped at step {t.step}; go on with --out {out} --resume" if saved else "stopped")
            raise SystemExit(128 + (signals or [signal.SIGTERM])[0])
    bar.close()
    for number, handler in usual.items():
        signal.signal(number, handler)
    if signals:
        raise SystemExit(128 + signals[0])
    if not saved:
        raise UserError(f"the last checkpoint could not be written; make room, then --out {out} --resume")
    return t, data, val, out

# ======== 9. What was learned: the class by k-NN and the angle by ridge regression, off z, IR and EF
def centre_view(images, aspect, size, flip, angle, shift=None):
    """The test view: bytes (B, 3, S, S) -> (B, 3, size, size) in [0, 1]: the centre square."""
    fraction = 0.875 if size > 64 else 1.0  # 224 of 256 pixels
    half = torch.stack([(1 / aspect).clamp(max=1), aspect.clamp(max=1)], 1) * fraction  # (B, 2)
    box = torch.cat([torch.zeros_like(half), half], 1)  # (B, 4)
    return warp(images.float() / 255, size, box, flip, angle, shift)

def columns(D, ratio):
    """The dimensions of each part of z: {"all": (D,), "IR": (d,), "EF": (D - d,)}; DINO has "all" alone."""
    z = torch.arange(D)
    z_ir, z_ef = split(z, ratio)
    return dict(all=z, IR=z_ir, EF=z_ef) if len(z_ef) else dict(all=z)

def knn(bank, labels, queries, classes, k=20, temperature=0.07):
    """Weighted k-NN by cosine (DINO): bank (N, d), labels (N,), queries (M, d) -> votes (M, C)."""
    bank = F.normalize(bank, dim=-1)
    votes = []
    for some in F.normalize(queries, dim=-1).split(CHUNK):
        cosine, index = (some @ bank.T).topk(min(k, len(bank)), 1)  # each (m, k)
        weight = ((cosine - 1) / temperature).exp()
        votes.append(weight.new_zeros(len(some), classes).scatter_add_(1, labels[index], weight))
    return torch.cat(votes)

def ridge_r2(x, angle, x_test, angle_test, penalty=0.01):
    """R2 on test rows of ridge regression from standardised features (N, d) to (cos, sin) of angles (N,)."""
    y, y_test = (torch.stack([a.deg2rad().cos(), a.deg2rad().sin()], 1).double() for a in (angle, angle_test))
    std, mean = torch.std_mean(x.double(), 0)
    x, x_test = ((rows - mean) / (std + 1e-6) for rows in (x, x_test))
    gram = x.T @ x / len(x) + penalty * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    w = torch.linalg.solve(gram, x.T @ (y - y.mean(0)) / len(x))  # (d, 2)
    error = y_test - y.mean(0) - x_test @ w  # (M, 2)
    return float((1 - error.square().sum(0) / (y_test - y_test.mean(0)).square().sum(0)).mean())

@torch.no_grad()
def extract(backbone, cfg, data, count, device):
    """z (N, D) of at most `count` images, upright, and turned within 90 degrees; angles (N,), labels (N,)."""
    rows = torch.randperm(len(data), generator=generator("cpu", "subset"))[:count]
    angles = (torch.rand(len(rows), generator=generator("cpu", "angles")) * 180 - 90).to(device)
    chunks = [some.tolist() for some in rows.split(CHUNK)]
    z = []
    for angle, (images, aspect) in zip(angles.split(CHUNK), data.stream(chunks, device, cfg.workers)):
        upright = torch.zeros_like(angle)
        for turn in (upright, angle):
            x = centre_view(images, aspect, cfg.global_size, upright.bool(), turn)  # none is flipped
            z.append(backbone.forward(normalize(x)).float())  # not compiled: for one pass
    return torch.cat(z[::2]), torch.cat(z[1::2]), angles, data.labels[rows].to(device)

def compare(cfg, train_data, val_data, untrained, trained, device):
    """Print what two backbones know of class and angle; {"before": {what: {part: number}}, "after": ...}."""
    known = {}
    for when, backbone in (("before", untrained), ("after", trained)):
        backbone.to(device).eval()
        bank, turned, angle, labels = extract(backbone, cfg, train_data, 4096, device)
        upright, rotated, angle_val, truth = extract(backbone, cfg, val_data, 2000, device)
        found = known[when] = {"k-NN, upright": {}, "k-NN, rotated": {}, "R2 of the angle": {}}
        for part, dims in columns(bank.shape[1], cfg.ratio).items():
            for what, queries in (("k-NN, upright", upright), ("k-NN, rotated", rotated)):
                votes = knn(bank[:, dims], labels, queries[:, dims], len(train_data.classes))
                found[what][part] = float((votes.argmax(1) == truth).double().mean() * 100)
            found["R2 of the angle"][part] = ridge_r2(turned[:, dims], angle, rotated[:, dims], angle_val)
    rows = []
    for what, row in known["after"].items():
        rows.append([what] + [f"{known['before'][what][part]:#.3g} -> {row[part]:#.3g}" for part in row])
    print_table(["untrained -> trained", *row], rows)
    say("\nOn held-out images. k-NN in %. R2: 1 reads the angle exactly, 0 not at all, below 0: worse still.")
    return known

def print_table(head, rows):
    """Print a Markdown table; the head and each row are lists of strings."""
    say("")
    for first, *cells in (head, ["-" * 20] + ["-" * 14] * (len(head) - 1), *rows):
        say(f"| {first:20} | " + " | ".join(f"{cell:14}" for cell in cells) + " |")

# ======== 10. The command line
def parse(argv):
    """The `Config` that a command line asks for: its options over the recipe. Raises UserError."""
    parser = argparse.ArgumentParser("clever.py", usage=argparse.SUPPRESS, argument_default=argparse.SUPPRESS,
                                     allow_abbrev=False, description="In brackets: values of this command.")
    special = {tuple: dict(type=float, nargs=2, metavar="X"), bool: dict(action="store_true")}
    for field in dataclasses.fields(Config):
        kind = special.get(field.type, dict(type=field.type, metavar="X"))
        if field.name in GROUPS:
            group = parser.add_argument_group(GROUPS[field.name])
        group.add_argument(flag(field.name), help=field.metadata["help"] + " [%(default)s]", **kind)
    given = vars(parser.parse_args([word for word in argv if word not in ("-h", "--help")]))
    if given.get("resume"):
        run = load_config(given.get("out", "--out"))
        cfg = dataclasses.replace(run, **given)
        for name in sorted(given.keys() - {"data", "out", "workers", "resume"}):
            if getattr(cfg, name) != getattr(run, name):
                raise UserError(f"{flag(name)} {given[name]}: the run has {getattr(run, name)}; leave it out")
    else:
        recipe = given.get("recipe", RECIPE_OF.get(given.get("data", "patterns"), "paper"))
        cfg = Config(**{**RECIPES.get(recipe, {}), **given, "recipe": recipe})
    if given.get("ratio", cfg.ratio) != cfg.ratio:
        raise UserError(f"--method dino has no split; leave out --ratio {given['ratio']}")
    parser.set_defaults(**vars(cfg))
    parser.parse_args(argv)  # with --help this ends here
    return cfg

def load_config(out):
    """The configuration of a run, from its folder. Raises UserError if it holds none, or a damaged one."""
    try:
        return Config(**json.loads(Path(out, "config.json").read_text()))
    except Exception as e:
        raise UserError(f"{out} is no folder of a run ({type(e).__name__}: {e}); name one")

def guarded(name, work):
    """The exit code of a command: 0; 2 and a sentence for what the user can change; else what went wrong."""
    try:
        work()
        return 0
    except SystemExit as e:
        say("", end="")  # what argparse printed: os._exit does not flush
        return e.code
    except (UserError, OSError, torch.OutOfMemoryError) as e:  # OSError: not to be written or downloaded
        code, words = 2, str(e).split("UserError: ")[-1].strip()  # a loader's worker puts more before it
    except Exception:
        code, words = 1, traceback.format_exc()
    if code == 1 or dist.is_initialized() or os.environ.get("LOCAL_RANK", "0") == "0":
        with suppress(OSError):
            print(f"{name}: {words}", file=sys.stderr, flush=True)  # before they join, one for all
    return code

def main(argv):
    """Train as a command line says, then compare with the untrained backbone. Returns the exit code."""
    def work():
        t, data, val, out = train(parse(argv))
        rank, _ = distributed()
        if dist.is_initialized():
            dist.destroy_process_group()  # on success alone: a failed process would wait here for the others
        if rank == 0 and val:
            torch.manual_seed(t.cfg.seed)
            untrained = build_backbone(t.cfg.arch, t.cfg.global_size)  # as `Training` made it
            known = compare(t.cfg, data, val, untrained, t.teacher.backbone, t.device)
            write(out / "compare.json", json.dumps(known, indent=1))
            say(f"\nNext: python eval_linear.py {shlex.quote(str(out))} --quick")
    return guarded("clever.py", work)

if __name__ == "__main__":
    os._exit(main(sys.argv[1:]))  # at once: neither a loader's worker nor another process holds it up
