"""What did a backbone learn? Every evaluation of CLeVER (arXiv 2406.00262), from one command.

    python eval_linear.py runs/in100                  the paper's table: linear and k-NN probes
    python eval_linear.py runs/in100 --quick --curve  on features extracted once; also against the angle
    torchrun --nproc-per-node gpu eval_linear.py runs/in100                    the same on several GPUs
    python eval_linear.py runs/in100 --finetune --labels 0.1  semi-supervised; --data cifar10: transfer
    python eval_linear.py --weights dino_deitsmall16_pretrain.pth --arch vit_small --data IMAGENET100
    python eval_linear.py runs/in100 --davis DAVIS    segment videos
    python eval_linear.py runs/in100 --visualize A.jpg    IR, EF and attention of an image that turns

IR and EF are the dimensions of the last representation z, which the losses shaped. Of a ViT, the linear probe
on all reads the CLS tokens of the last four blocks (DINO), the other probes read z.
Letters in comments: B images, N rows, F features, D of them z, C classes, T frames or turns.
"""
import argparse
import copy
import json
import math
import os
import re
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends at once
    sys.stderr = sys.stderr or open(os.devnull, "w")  # a closed one is None
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

import clever
from clever import CHUNK, Config, UserError, distributed, generator, say

# ======== 1. The options: the defaults are the paper's protocol
def parse(argv):
    """The options of a command line. Raises UserError for one that is wrong, or that would be ignored."""
    parser = argparse.ArgumentParser("eval_linear.py", argparse.SUPPRESS, allow_abbrev=False,
                                     description="Evaluate a backbone. In brackets: the defaults.")
    add = parser.add_argument
    add("run", nargs="?", default="", help="folder of a run of clever.py; else --weights and --arch")
    add("--weights", default="", help="weights of timm, torchvision or DINO, or a training checkpoint")
    add("--arch", default="", help="the architecture of --weights, as for clever.py")
    add("--ratio", type=float, default=1.0, help="rho of --weights: 0.8 for published CLeVER [1: no split]")
    add("--data", default="", help="as for clever.py [the run's]")
    add("--parts", nargs="+", choices=("all", "IR", "EF"), default=["all", "IR", "EF"], help="what to probe")
    add("--quick", action="store_true", help="train on features of the plain images, extracted once")
    add("--labels", type=float, default=1.0, help="fraction of the training labels, drawn class by class [1]")
    add("--epochs", type=int, default=100, help="passes over the training images [100]")
    add("--batch", type=int, default=256, help="images a step, over all processes [256]")
    add("--lr", nargs="+", type=float, default=[0.001, 0.003, 0.01, 0.03, 0.1, 0.3],
        help="for 256 images a step; held-out training images choose %(default)s")
    add("--finetune", action="store_true", help="train the backbone too, with AdamW")
    add("--curve", action="store_true", help="also accuracy against fixed angles and elastic strengths")
    add("--davis", default="", help="folder of DAVIS-2017: segment its validation videos instead")
    add("--visualize", default="", metavar="IMAGE", help="draw how IR, EF and attention turn with it instead")
    add("--out", default="", help="folder of eval.json and visualize.png [the run, or that of --weights]")
    add("--seed", type=int, default=0, help="of heads, crops and the draw of labels, not of test images [0]")
    add("--workers", type=int, default=-1, help="processes that decode images [-1: one a core]")
    p = parser.parse_args(argv)
    p.changed = [name for name in vars(p) if getattr(p, name) != parser.get_default(name)]
    p.weights = p.weights and os.path.abspath(p.weights)
    p.probing = not (p.davis or p.visualize)
    ignored = ["--weights", "--arch", "--ratio"] if p.run else []  # the run has its own
    if p.finetune:
        ignored += ["--parts", "--quick", "--lr", "--ratio"]
        p.parts = ["all"]
        p.lr = [1.0]  # AdamW has its own
    if not p.probing:
        ignored += ["--data", "--parts", "--quick", "--labels", "--epochs", "--batch", "--lr", "--finetune",
                    "--curve", "--seed", "--workers"]
    for word in argv:
        if word.split("=")[0] in ignored:
            raise UserError(f"{word} would be ignored here; leave it out")
    if not p.run and not (p.weights and p.arch and (p.data or not p.probing)):
        raise UserError("name the folder of a run; or --weights, its --arch such as vit_small, and --data")
    if not all(0 < value < math.inf for value in (p.epochs, p.batch, p.labels, p.ratio, *p.lr)):
        raise UserError("--epochs, --batch, --lr, --labels and --ratio must be greater than 0")
    if p.labels > 1 or p.ratio > 1 or p.workers > 1024:
        raise UserError("--labels and --ratio must be at most 1, --workers at most 1024")
    return p

# ======== 2. The backbone, from a run or from a file of others
def read_weights(path):
    """A backbone's tensors by name, of a state dict or a checkpoint's teacher. Runs no code of the file.
    Raises UserError for what torch.save has not written, or not of tensors alone."""
    if path.suffix == ".safetensors":
        raise UserError(f"{path}: convert it first, in Python: torch.save(safetensors.torch.load_file(A), B)")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # DINO's checkpoints hold their options
            state = torch.load(path, map_location="cpu", weights_only=True)
        for key in ("teacher", "student", "state_dict", "model"):
            state = state.get(key, state)
        tensors = {re.sub(r"^(module\.|_orig_mod\.)+", "", name): value for name, value in state.items()}
    except Exception as e:
        code = re.search(r"GLOBAL (\S+)", str(e))
        reason = f"it wants to run {code[1]}" if code else type(e).__name__
        raise UserError(f"{path} is no file of named tensors by torch.save ({reason})")
    inner = [name for name in tensors if name.startswith("backbone.")]
    return {name.removeprefix("backbone."): tensors[name] for name in inner or tensors}

def open_model(p):
    """(configuration, untrained backbone, trained backbone) of a run or of --weights. Raises UserError.
    The configuration's data and workers are those of the evaluation."""
    path = Path(p.run, "backbone.pt") if p.run else Path(p.weights)
    cfg = clever.load_config(p.run) if p.run else Config(arch=p.arch, ratio=p.ratio)
    cfg.data = p.data or cfg.data
    cfg.workers = p.workers
    if not p.probing and cfg.arch not in clever.VIT:
        raise UserError(f"--davis and --visualize need the patch tokens of a ViT, not {cfg.arch}")
    state = read_weights(path)
    patch = None
    torch.manual_seed(cfg.seed)
    try:
        if p.weights and cfg.arch in clever.VIT:
            patch = state["patch_embed.proj.weight"].shape[-1]
            cfg.global_size = patch * math.isqrt(state["pos_embed"].shape[1] - 1)
        elif p.weights and cfg.arch in clever.RESNETS and state["conv1.weight"].shape[-1] == 3:
            cfg.global_size = 32  # the stem for small images
        untrained = clever.build_backbone(cfg.arch, cfg.global_size, patch_size=patch)  # as the run began
        for name in set(state) - set(untrained.state_dict()):
            if re.match("head|fc|classifier|projector", name):
                del state[name]
        trained = copy.deepcopy(untrained)
        trained.load_state_dict(state)
    except (RuntimeError, LookupError, ValueError, AttributeError) as e:
        reason = " ".join(str(e).split())[:300]
        raise UserError(f"{path} does not fit {cfg.arch}, {type(e).__name__}: {reason}")
    return cfg, untrained, trained

class Representation(nn.Module):
    """What the probes see, in eval mode: images (B, 3, H, W) -> features (B, F), of which z is the last D.
    The columns of each part, for linear probes and for k-NN, whose "all" is z alone."""
    def __init__(self, backbone, cfg, p, device):
        super().__init__()
        self.backbone = backbone.to(device)
        self.cfg = cfg
        self.device = device
        self.vit = cfg.arch in clever.VIT
        D = backbone.embed_dim
        self.width = D * min(4, len(backbone.blocks)) if self.vit else D
        parts = clever.columns(D, cfg.ratio)
        first = self.width - D  # of z
        self.knn_columns = {part: parts[part].to(device) + first for part in parts if part in p.parts}
        if "parts" in p.changed and len(self.knn_columns) < len(set(p.parts)):
            raise UserError(f"--parts {' '.join(p.parts)}: this model has no split (DINO, or ratio 1)")
        whole = dict(all=torch.arange(self.width, device=device))
        self.linear_columns = {part: whole.get(part, dims) for part, dims in self.knn_columns.items()}
        self.eval().requires_grad_(False)

    def forward(self, x):
        with clever.autocast(self.device, self.cfg.precision):
            if self.vit:
                layers = self.backbone.get_intermediate_layers(x, 4)
                return torch.cat([tokens[:, 0] for tokens in layers], -1).float()
            return self.backbone(x).float()

# ======== 3. The images: a test view is a function of its position, not of model, seed or number of processes
KINDS = {  # of test views, by the options of `make_view`
    "orig": dict(),
    "cj": dict(jitter=True),
    "cj+flip": dict(jitter=True, flip=True),
    "cj+rot": dict(jitter=True, rotate=True),
    "cj+rot+elastic": dict(jitter=True, rotate=True, alpha=100)}
TABLE = list(KINDS)  # without the curves
KINDS.update({f"rot={degrees}": dict(degrees=degrees) for degrees in range(15, 91, 15)})
KINDS.update({f"elastic={alpha}": dict(alpha=alpha) for alpha in (25, 50, 100, 150, 200)})

def make_view(images, aspect, size, gen, rank=0, world=1, crop=False, flip=False, jitter=False, rotate=False,
              degrees=0, alpha=0):
    """Views of some images: bytes (B, 3, S, S), aspect (B,) -> (B, 3, size, size), normalised.
    gen, on the CPU, draws for the images of `world` processes, of which `rank` is this one; all kinds draw
    the same. crop: random resized; rotate: within 90 degrees; alpha: of an elastic deformation at 224 px."""
    B = len(images)

    def uniform(low, high, *shape):
        draws = torch.rand(B * world, *shape, generator=gen)[rank * B:(rank + 1) * B]
        return (low + (high - low) * draws).to(images.device)  # (B, *shape)

    flipped = (uniform(0, 1) < 0.5) & flip
    angle = uniform(-90, 90) * rotate + degrees
    factors = [uniform(0.6, 1.4), uniform(0.6, 1.4), uniform(0.6, 1.4), uniform(-0.1, 0.1)]
    order = torch.randperm(4, generator=gen).tolist()
    shift = None
    if alpha:
        noise = uniform(-1, 1, 2, size, size)
        shift = clever.elastic_shift(noise, alpha * size / 224, 5 * size / 224)
    if crop:
        shape = uniform(math.log(3 / 4), math.log(4 / 3), 10).exp()
        box = clever.crop_box(uniform(0.08, 1, 10), shape, uniform(0, 1, 2), aspect)
        x = clever.warp(images.float() / 255, size, box, flipped, angle, shift)
    else:
        x = clever.centre_view(images, aspect, size, flipped, angle, shift)
    if jitter:
        x = clever.color_jitter(x, *factors, order)
    return clever.normalize(x)

def balanced_draw(labels, fraction, seed):
    """Rows of a fixed draw with equally many images, at least one, of each class: labels (N,) -> (n,)."""
    order = torch.randperm(len(labels), generator=generator("cpu", seed, "labels"))
    count = max(1, round(fraction * len(labels) / len(labels.unique())))
    rows = [order[labels[order] == label][:count] for label in labels.unique()]
    return torch.cat(rows).sort().values

def open_splits(p, cfg):
    """Training images or a fraction of them, and test images. Raises UserError if their classes differ."""
    train = clever.load_images(cfg.data, "train", clever.stored_side(cfg.global_size))
    val = clever.load_images(cfg.data, "val", train.side)
    if val is None or train.classes != val.classes:
        raise UserError(f"--data {cfg.data}: expected train/ and val/ with the same classes")
    if p.labels < 1:
        rows = balanced_draw(train.labels, p.labels, p.seed)
        paths = [train.paths[i] for i in rows] if train.paths else None
        pixels = None if train.paths else train.pixels[rows]
        train = clever.Images(train.side, train.labels[rows], train.classes, paths, pixels, replace=True)
    return train, val

@torch.no_grad()
def extract(model, data, kind):
    """Features (N, F) of a split under a perturbation; each process computes its share of the chunks."""
    rank, world = distributed()
    features = torch.zeros(len(data), model.width, device=model.device)
    chunks = [rows.tolist() for rows in torch.arange(len(data)).split(CHUNK)[rank::world]]
    stream = data.stream(chunks, model.device, model.cfg.workers)
    bar = tqdm(stream, kind, len(chunks), leave=False, disable=None if rank == 0 else True)
    for rows, (images, aspect) in zip(chunks, bar):
        gen = generator("cpu", "test views", rows[0] // CHUNK)
        features[rows] = model(make_view(images, aspect, model.cfg.global_size, gen, **KINDS[kind]))
    if world > 1:
        dist.all_reduce(features)  # the rows of other processes are zero here
    return features

# ======== 4. The probes and the paper's table
def train_probes(p, model, data, bank):
    """A linear probe of each part, {part: (learning rate, nn.Linear)}; with --finetune the backbone too.
    bank (N, F): features of the plain training images. A tenth of them, at most 5000, is held out to choose
    among several learning rates; the loss decides between equals. Fine-tuning keeps the statistics of batch
    norm."""
    rank, world = distributed()
    labels = data.labels.to(model.device)
    order = torch.randperm(len(data), generator=generator("cpu", p.seed, "held out"))
    count = min(5000, math.ceil(len(order) / 10)) if len(p.lr) > 1 else 0
    held, rows = order.tensor_split([count])
    batch = min(p.batch, len(rows)) // world * world  # as many in each process
    steps_per_epoch = len(rows) // batch
    steps = p.epochs * steps_per_epoch
    gen = generator("cpu", p.seed, "head")
    heads = {}
    for part, dims in model.linear_columns.items():
        for rate in p.lr:
            head = nn.Linear(len(dims), len(data.classes))
            nn.init.normal_(head.weight, std=0.01, generator=gen)
            nn.init.zeros_(head.bias)
            heads[part, rate] = head.to(model.device)
    weights = list(nn.ModuleList(heads.values()).parameters())
    optimizer = torch.optim.SGD(weights, lr=batch / 256, momentum=0.9)
    if p.finetune:
        model.requires_grad_(True)
        groups = [dict(params=weights, lr=1e-3), dict(params=model.parameters(), lr=1e-4)]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def indices():  # of each step; gone through twice, for the images and for their labels
        for some in clever.batches(len(rows), Config(batch=batch, seed=p.seed), 0, steps):
            yield rows[some].tolist()

    stream = data.stream(indices(), model.device, model.cfg.workers)  # starts when it is asked
    bar = tqdm(indices(), "train", steps, leave=False, disable=None if rank == 0 else True)
    for step, some in enumerate(bar):
        if p.quick:
            z = bank[some]
        else:
            images, aspect = next(stream)
            gen = generator("cpu", p.seed, "probe", step)
            size = model.cfg.global_size
            z = model(make_view(images, aspect, size, gen, rank, world, crop=True, flip=True))
        optimizer.zero_grad()
        losses = [rate * F.cross_entropy(head(z[:, model.linear_columns[part]]), labels[some])
                  for (part, rate), head in heads.items()]  # SGD is linear: rate is its learning rate
        sum(losses).backward()
        for group in optimizer.param_groups:
            for weight in group["params"]:
                clever.mean_over_processes(weight.grad)
        optimizer.step()
        schedule.step()
        if bar.disable and not p.quick and (step + 1) % steps_per_epoch == 0:
            mean = sum(losses) / sum(rate for _, rate in heads)
            say(f"epoch {(step + 1) // steps_per_epoch}/{p.epochs}  loss {mean:.4f}")
    model.requires_grad_(False)
    best = {}
    for part, dims in model.linear_columns.items():
        quality = {}  # of each learning rate
        for rate in p.lr:
            scores = heads[part, rate](bank[held][:, dims])
            hits = int((scores.argmax(1) == labels[held]).sum())
            quality[rate] = hits, -F.cross_entropy(scores, labels[held]).item()
        rate = max(p.lr, key=quality.get)
        best[part] = rate, heads[part, rate]
    return best

def accuracy(scores, labels):
    """[top-1, top-5] in % of scores (N, C), labels (N,); top-1 alone of fewer than 6 classes."""
    own = scores.gather(1, labels[:, None])  # (N, 1)
    rank = (~(scores < own)).sum(1)  # from 1; equal scores, as without votes of k-NN, or NaN are no hit
    top = (1, 5) if scores.shape[1] > 5 else (1,)
    return [100 * float((rank <= k).double().mean()) for k in top]

def evaluate(p, model, train, val):
    """Train and test the probes and print their table: a section of eval.json. Raises UserError."""
    labels = train.labels.to(model.device)
    truth = val.labels.to(model.device)
    extract(model, val, "orig")  # a dry run: broken images are refused before the work, not after
    bank = torch.zeros(0, model.width, device=model.device)
    if not p.finetune:
        bank = extract(model, train, "orig")
    probes = train_probes(p, model, train, bank)
    table = {}  # {"linear IR": {kind: accuracy}}
    rows = []
    for kind in (KINDS if p.curve else TABLE):
        z = extract(model, val, kind)
        for part, (_, head) in probes.items():
            scores = head(z[:, model.linear_columns[part]]).detach()
            table.setdefault(f"linear {part}", {})[kind] = accuracy(scores, truth)
        for part, dims in model.knn_columns.items():
            if not p.finetune:
                votes = clever.knn(bank[:, dims], labels, z[:, dims], len(train.classes))
                table.setdefault(f"k-NN {part}", {})[kind] = accuracy(votes, truth)
        rows.append([kind] + [" / ".join(f"{value:.1f}" for value in row[kind]) for row in table.values()])
    say(f"{len(train)} training and {len(val)} test images of {len(train.classes)} classes")
    clever.print_table(["top-1 / top-5, %" if len(train.classes) > 5 else "top-1, %", *table], rows)
    if not p.finetune:
        table["learning rates"] = {part: rate for part, (rate, _) in probes.items()}
    return table

# ======== 5. Segmentation by label propagation (DAVIS-2017)
def propagate(features, first, last=7, k=5, radius=12, temperature=0.1):
    """Carry masks through a clip (DINO): features (T, h, w, D), first (K, h, w) -> masks (T, K, h, w).
    A position takes the masks of its k most similar ones within `radius`, in the first and last frames."""
    T, h, w, _ = features.shape
    f = F.normalize(features.flatten(1, 2), dim=-1)  # (T, h*w, D)
    place = torch.cartesian_prod(torch.arange(h), torch.arange(w)).to(f.device)  # (h*w, 2)
    far = ((place[:, None] - place).abs() > radius).any(-1)  # (h*w, h*w)
    masks = [first.flatten(1).to(f)]  # (K, h*w) of each frame
    for t in range(1, T):
        context = [0, *range(max(1, t - last), t)]
        affinity = f[t] @ f[context].flatten(0, 1).T / temperature  # (h*w, c*h*w)
        affinity = affinity.masked_fill(far.repeat(1, len(context)), -math.inf)
        weight, index = affinity.topk(min(k, affinity.shape[1]), 1)  # each (h*w, k)
        source = torch.cat([masks[c] for c in context], 1)  # (K, c*h*w)
        masks.append((source[:, index] * weight.softmax(1)).sum(-1))
    return torch.stack(masks).unflatten(-1, (h, w))

def jaccard(features, truth):
    """The mean region similarity J of each object of a clip, carried on from its first frame: a list.
    features (T, h, w, D); truth (T, H, W): the object of each pixel, 0 for the background."""
    ids = truth[0].unique()
    first = (truth[0] == ids[:, None, None]).float()[None]  # (1, K, H, W)
    masks = propagate(features, F.interpolate(first, size=features.shape[1:3], mode="area")[0]).cpu()
    masks = masks - masks.amin((2, 3), keepdim=True)
    masks = masks / masks.amax((2, 3), keepdim=True).clamp(min=1e-6)  # to [0, 1] (DINO)
    ours = ids[F.interpolate(masks, size=truth.shape[1:], mode="bilinear").argmax(1)]  # (T, H, W)
    objects = ids[ids > 0][:, None, None, None]
    common = ((ours == objects) & (truth == objects)).sum((2, 3))  # (K - 1, T)
    union = ((ours == objects) | (truth == objects)).sum((2, 3))
    J = torch.where(union > 0, common / union, 1.0)
    return J[:, 1:-1].mean(1).tolist()  # the first frame was given; the last one has never counted

@torch.no_grad()
def davis(model, root):
    """J of the objects in DAVIS-2017's validation videos, off patch tokens: a section of eval.json.
    Raises UserError if the folder has another layout."""
    patch = model.backbone.patch_size
    scores = {}
    try:
        videos = (root / "ImageSets/2017/val.txt").read_text().split()
        for video in tqdm(videos, "davis", leave=False, disable=None):
            features = []
            truth = []
            for path in sorted((root / "JPEGImages/480p" / video).glob("*.jpg")):
                pixels = pil_to_tensor(Image.open(path).convert("RGB"))  # (3, H, W)
                h, w = [side // patch for side in pixels.shape[1:]]
                x = F.interpolate(pixels[None], (h * patch, w * patch), mode="bicubic", antialias=True)
                x = clever.normalize(x.to(model.device) / 255)
                tokens = model.backbone.get_intermediate_layers(x)[0]  # (1, 1 + h * w, D)
                features.append(tokens[0, 1:].unflatten(0, (h, w)))
                mask = Image.open(root / "Annotations/480p" / video / f"{path.stem}.png")
                truth.append(pil_to_tensor(mask))
            scores[video] = jaccard(torch.stack(features), torch.cat(truth))
        objects = [J for video in scores.values() for J in video]
        mean = sum(objects) / len(objects)
    except torch.OutOfMemoryError:
        raise
    except (OSError, RuntimeError, ZeroDivisionError) as e:
        raise UserError(f"--davis {root}: unreadable, or not the layout of DAVIS-2017 at 480p ({e})")
    say(f"DAVIS-2017: J mean {mean:.3f} of {len(objects)} objects")
    return {"J mean": mean, "videos": scores}

# ======== 6. Pictures: does EF turn with an image while IR stays?
def components(tokens):
    """Three principal components, the same for all turns, as colours in [0, 1]: (T, n, D) -> (T, 3, n)."""
    x = tokens.flatten(0, 1)
    u, s, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    x = F.pad(u * s, (0, 2))[:, :3]  # a part may have fewer dimensions
    x = (x - x.amin(0)) / (x.amax(0) - x.amin(0) + 1e-9)
    return x.unflatten(0, tokens.shape[:2]).mT

@torch.no_grad()
def draw(model, path, turns=(0.0, 30.0, 60.0, 90.0), tile=128):
    """A PIL image: a file, turned by degrees, below it components of its parts and attention of its heads.
    Raises UserError for a file that cannot be read."""
    size = model.cfg.global_size
    side = size // model.backbone.patch_size
    pixels, aspect = clever.decode(path, clever.stored_side(size))
    angle = torch.tensor(turns, device=model.device)
    pixels = pixels.to(model.device).expand(len(turns), -1, -1, -1)
    no_flip = torch.zeros_like(angle).bool()
    images = clever.centre_view(pixels, torch.full_like(angle, aspect), size, no_flip, angle)
    x = clever.normalize(images)
    tokens = model.backbone.get_intermediate_layers(x)[0][:, 1:]  # (T, n, D) of the n patches
    attention = model.backbone.get_last_selfattention(x)[:, :, :1, 1:]  # (T, heads, 1, n), of the CLS token
    rows = {"image": images}  # (T, 1 or 3, h, w)
    for part, dims in clever.columns(tokens.shape[2], model.cfg.ratio).items():
        rows[part] = components(tokens[:, :, dims.to(model.device)]).unflatten(2, (side, side))
    for head, weight in enumerate(attention.unbind(1)):
        rows[f"head {head + 1}"] = (weight / weight.max()).unflatten(2, (side, side))
    tiles = [F.interpolate(row, (tile, tile)).expand(-1, 3, -1, -1) for row in rows.values()]
    sheet = to_pil_image(make_grid(torch.cat(tiles), nrow=len(turns), padding=16))
    pen = ImageDraw.Draw(sheet)
    for row, name in enumerate(rows):
        for column, degrees in enumerate(turns):
            place = (16 + column * (tile + 16), 2 + row * (tile + 16))  # above the tile
            pen.text(place, f"{name}, {degrees:.0f} degrees", "white")
    return sheet

# ======== 7. The command line
def read_results(file):
    """The sections of an eval.json; {} where there is none. Raises UserError for a file of another kind."""
    try:
        return dict(**json.loads(file.read_text())) if file.exists() else {}
    except (OSError, ValueError, TypeError) as e:
        raise UserError(f"{file} holds no results of an evaluation ({e}); move it away")

def add_results(out, section, numbers, p):
    """Add a section to eval.json, named by the options that are not the defaults, so that another stays."""
    skipped = ("out" if p.out else "run", "workers", "finetune")  # one --out may hold several runs
    words = [f"{name}={getattr(p, name)}" for name in p.changed if name not in skipped]
    known = read_results(out / "eval.json")
    known[" ".join([section, *words])] = {**numbers, "settings": vars(p)}
    out.mkdir(parents=True, exist_ok=True)
    if not clever.write(out / "eval.json", json.dumps(known, indent=1)):
        raise UserError("the results above are not in eval.json")
    say(f"written to {out / 'eval.json'}")

def run(p):
    """Evaluate as asked: the probes on all processes, the rest on rank 0. Raises UserError.
    What may be refused comes first, before anything is written."""
    cfg, untrained, trained = open_model(p)
    out = Path(p.out or p.run or Path(p.weights).parent).absolute()
    read_results(out / "eval.json")
    above = next(folder for folder in (out, *out.parents) if os.path.lexists(folder))
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise UserError(f"--out {out} cannot be written; name another folder")
    if p.probing:
        train, val = open_splits(p, cfg)
        fewest = min(p.batch, len(train) // 2)  # a part of the images is held out
        if fewest < int(os.environ.get("WORLD_SIZE", 1)):
            raise UserError(f"{len(train)} images or --batch {p.batch} are too few for so many processes")
    device = clever.setup(batch=0)
    model = Representation(trained, cfg, p, device)
    if p.probing:
        table = evaluate(p, model, train, val)
    rank, _ = distributed()
    if dist.is_initialized():
        dist.destroy_process_group()  # on success alone: a failed rank would wait here for the others
    if rank > 0:
        return
    if p.visualize:
        sheet = draw(model, p.visualize)
        out.mkdir(parents=True, exist_ok=True)
        sheet.save(out / "visualize.png")
        say(f"written to {out / 'visualize.png'}")
    if p.davis:
        add_results(out, "davis", davis(model, Path(p.davis)), p)
    if p.finetune:
        add_results(out, "finetune", table, p)
    elif p.probing:
        add_results(out, "probes", table, p)
        add_results(out, "rotation", clever.compare(cfg, train, val, untrained, trained, device), p)

def main(argv):
    """Evaluate as a command line says. Returns the exit code."""
    return clever.guarded("eval_linear.py", lambda: run(parse(argv)))

if __name__ == "__main__":
    os._exit(main(sys.argv[1:]))  # at once: neither a loader's workers nor other ranks can hold it up
