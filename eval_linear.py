"""What did a backbone learn? Every evaluation of CLeVER (arXiv 2406.00262), from one command.

    python eval_linear.py runs/in100                  the paper's table: linear, k-NN and rotation probes
    python eval_linear.py runs/in100 --quick          the same on features extracted once: a minute
    torchrun --nproc-per-node gpu eval_linear.py runs/in100 --curve  also against angle and elasticity
    python eval_linear.py runs/in100 --finetune --labels 0.1         semi-supervised; --data food101: transfer
    python eval_linear.py --weights dino_deitsmall16_pretrain.pth --arch vit_small --data IMAGENET100
    python eval_linear.py runs/in100 --davis DAVIS    segment videos; --visualize IMAGE: attention, components

Parts: `all`; `ir` and `ef`, the dimensions of the last representation z that the losses shaped. Of a ViT, the
linear probe on `all` reads the CLS tokens of the last four blocks (DINO); the other probes on `all` read z.
Symbols: B images, N rows, F features of linear probes, D of z, P parts, L learning rates, C classes.
"""
import argparse
import copy
import dataclasses
import json
import math
import re
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision import datasets, utils
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

import clever
from clever import Config, UserError, flag, generator, near, split, warp

# ======== 1. Options


@dataclasses.dataclass
class Probe:
    """Every option: a typed field, its default and its help. The defaults are the paper's protocol."""
    run: str = ""              # folder of a run of clever.py; else --weights and --arch
    data: str = ""             # as for clever.py, or flowers102, food101, oxfordiiitpet; empty: the run's
    weights: str = ""          # not a run: weights of timm, torchvision or DINO, or a training checkpoint
    arch: str = ""             # the architecture of --weights
    ratio: float = 1.0         # rho of --weights: 0.8 for the published CLeVER; 1: no split
    size: int = 0              # side of the images in pixels; 0: the run's, or 224
    parts: tuple = ()          # some of all, ir, ef; empty: those that the model has
    quick: bool = False        # train on features of the plain images, extracted once
    labels: float = 1.0        # use this fraction of the training labels: a fixed, class-balanced draw
    epochs: int = 100          # passes over the training images
    batch: int = 256           # images a step, over all processes
    lr: float = 0.001          # base learning rate for 256 images a step; scaled by batch / 256
    lr_grid: tuple = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)  # multiples of --lr; held-out images choose
    finetune: bool = False     # train the backbone too, with AdamW
    lr_backbone: float = 1e-4  # of --finetune
    lr_head: float = 1e-3      # of --finetune
    curve: bool = False        # also accuracy against fixed angles and elastic strengths
    davis: str = ""            # folder of DAVIS-2017: segment its validation videos instead
    visualize: tuple = ()      # images: draw attention and principal components instead
    out: str = ""              # folder of eval.json and visualize.png; empty: the run, or that of --weights
    seed: int = 0              # of heads, crops and the draw of labels; test images never depend on it
    device: str = "auto"       # auto, cpu or cuda
    precision: str = "auto"    # of the backbone: auto, bf16, fp16 or fp32
    workers: int = -1          # processes that decode images; -1: one a core


PARTS = ("all", "ir", "ef")
KINDS = ("orig", "cj", "cj+flip", "cj+rot", "cj+rot+elastic")
CURVES = (*(f"rot={a}" for a in range(0, 91, 15)), *(f"elastic={a}" for a in (0, 25, 50, 100, 150, 200)))
CHUNK = 256                    # test images that are drawn, and pass the backbone, together


def parse(argv) -> Probe:
    """The options of a command line, each tested against its range. Raises UserError with one sentence."""
    about = dict(prog="eval_linear.py", usage="[torchrun] eval_linear.py RUN [options]",
                 description="Evaluate a backbone. Defaults: the paper's protocol on the run's data.")
    p = Probe(**clever.read_options(Probe, argv, "run", **about))
    rules = [(getattr(p, n) > 0, f"{flag(n)} {getattr(p, n)} must be greater than 0")
             for n in "epochs batch lr lr_backbone lr_head labels ratio".split()]
    words = [("parts", v, PARTS) for v in p.parts] + [("arch", p.arch, clever.EMBED_DIM)] * bool(p.weights)
    words += [(n, getattr(p, n), clever.CHOICES[n]) for n in ("device", "precision")]
    rules += [(v in known, f"{flag(n)} {v} is unknown, expected one of {', '.join(known)}{near(v, known)}")
              for n, v, known in words]
    rules += [
        (bool(p.run) != bool(p.weights), "name the folder of a run, or --weights and --arch: one of the two"),
        (p.run or p.data or p.davis or p.visualize, "--weights needs --data, the images to probe on"),
        (max(p.labels, p.ratio) <= 1, f"--labels {p.labels} and --ratio {p.ratio} must be at most 1"),
        (min(p.lr_grid) > 0, "--lr-grid: every multiple must be greater than 0"),
        (p.device != "cuda" or torch.cuda.is_available(), "--device cuda: this machine has no GPU for torch"),
        (p.size >= 0 and p.workers >= -1, "--size must be at least 0, --workers at least -1")]
    for ok, sentence in rules:
        if not ok:
            raise UserError(sentence)
    return p


# ======== 2. The backbone, from a run or a file of others


def read_weights(path) -> dict:
    """A backbone's tensors by name, from a state dict or a checkpoint's teacher. Runs no code of the file."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as e:
        raise UserError(f"{path}: there are no weights to read ({e.strerror})")
    except Exception as e:
        code = re.search(r"GLOBAL (\S+)", str(e))
        why = f"it wants to run {code[1]}; save its tensors alone" if code else "no intact file of torch.save"
        raise UserError(f"{path} is refused: {why}")
    if isinstance(state, dict):
        state = next((state[k] for k in ("teacher", "student", "state_dict", "model") if k in state), state)
    if not isinstance(state, dict) or not any(isinstance(v, torch.Tensor) for v in state.values()):
        raise UserError(f"{path} holds no state dict; expected tensors by name, or such a teacher or student")
    state = {re.sub(r"^(module\.|_orig_mod\.)+", "", k): v for k, v in state.items()}
    return {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")} or state


def open_model(p: Probe):
    """(configuration, trained backbone, its file) of a run or --weights. Fills in p.size and p.data."""
    path, cfg = Path(p.weights), Config(arch=p.arch, ratio=p.ratio, data=p.data)
    if p.run:
        path, cfg = Path(p.run) / "backbone.pt", clever.load_config(p.run)
    state = read_weights(path)
    if p.weights and "conv1.weight" in state and state["conv1.weight"].shape[-1] == 3:
        cfg.global_size = 32                                   # a ResNet's stem for small images
    if p.weights and p.arch in clever.VIT and {"pos_embed", "patch_embed.proj.weight"} <= set(state):
        cfg.patch_size = state["patch_embed.proj.weight"].shape[-1]
        cfg.global_size = cfg.patch_size * math.isqrt(state["pos_embed"].shape[1] - 1)
    backbone = clever.build_backbone(cfg.arch, cfg.global_size, cfg.patch_size)
    own = backbone.state_dict()
    extra = [k for k in state if k not in own and not re.match(r"(head|fc|classifier|projector)", k)]
    wrong = [k for k in own if (state[k].shape != own[k].shape if k in state else "num_batches" not in k)]
    if wrong or extra:
        names = lambda keys: ", ".join(keys[:5]) + f" and {len(keys) - 5} more" * (len(keys) > 5) or "none"
        raise UserError(f"{path} does not fit {cfg.arch}; missing or of another shape: {names(wrong)}; "
                        f"unknown to it: {names(extra)}; is this the right architecture?")
    backbone.load_state_dict({**own, **{k: v for k, v in state.items() if k in own}})
    p.size, p.data = p.size or cfg.global_size, p.data or cfg.data
    if p.size % getattr(backbone, "patch_size", 1):
        raise UserError(f"--size {p.size} is not a multiple of the patch of {backbone.patch_size} px")
    return cfg, backbone, path


class Representation(nn.Module):
    """What the probes see, in eval mode: images (B, 3, H, W) -> features (B, F); z is the last D of them.

    `parts` and `last` hold the columns of each part, for linear probes and for the others; `all` differs.
    shard: (rank, world) of the processes that share the work."""

    def __init__(self, backbone, cfg, p: Probe, device="cpu", shard=(0, 1)):
        super().__init__()
        self.backbone, self.size, self.device = backbone.to(device), p.size, torch.device(device)
        self.side, self.workers = clever.stored_side(p.size), clever.worker_count(p.workers)
        self.rank, self.world = shard
        self.dtype = clever.pick_precision(p.precision, self.device)
        if p.finetune and self.dtype is torch.float16:
            self.dtype = None                                  # fp16 gradients would need scaling
        self.vit, D = cfg.arch in clever.VIT, backbone.embed_dim
        self.width = D * min(4, len(backbone.blocks)) if self.vit else D
        whole = torch.arange(self.width, device=device)
        z = whole[-D:]
        self.last = dict(zip(PARTS if cfg.ratio < 1 else ("all",), (z, *split(z, cfg.ratio))))
        if missing := set(p.parts) - set(self.last):
            raise UserError(f"--parts {missing.pop()}: this model has no split (DINO, or ratio 1)")
        self.last = {k: i for k, i in self.last.items() if k in (p.parts or PARTS)}
        self.parts = {k: whole if k == "all" else i for k, i in self.last.items()}
        self.eval().requires_grad_(False)

    def forward(self, x):
        """(B, 3, H, W) -> (B, F): a ViT's CLS tokens after the last four blocks, each normalised; else z."""
        with clever.mixed_precision(self.device, self.dtype):
            if not self.vit:
                return self.backbone(x).float()
            return torch.cat([t[:, 0] for t in self.backbone.get_intermediate_layers(x, 4)], -1).float()


# ======== 3. Images: a test view is a function of its position, not of model, seed or number of processes


def load_split(data, part, side):
    """`clever.load_images` and three data sets of torchvision, at side x side px; part: train or val."""
    known = dict(
        flowers102=(datasets.Flowers102, dict(train=("train", "val"), val=("test",)), "_image_files"),
        food101=(datasets.Food101, dict(train=("train",), val=("test",)), "_image_files"),
        oxfordiiitpet=(datasets.OxfordIIITPet, dict(train=("trainval",), val=("test",)), "_images"))
    if data not in known:
        return clever.load_images(data, part, side)
    kind, names, files = known[data]
    try:
        loaded = [kind(".data", split=name, download=True) for name in names[part]]
    except Exception as e:
        reason = str(e).strip().splitlines()[0]
        raise UserError(f"--data {data}: neither in .data nor to be downloaded ({reason}); check the "
                        "network, or name a folder of images")
    labels, paths = ([v for s in loaded for v in getattr(s, name)] for name in ("_labels", files))
    return clever.Images(side, labels, [str(c) for c in range(max(labels) + 1)], paths=paths)


def open_splits(data, side, fraction=1.0, seed=0):
    """Training images, perhaps a fraction of them, and held-out ones. UserError if their classes differ."""
    train, val = load_split(data, "train", side), load_split(data, "val", side)
    if odd := sorted(set(train.classes) ^ set(val.classes)):
        raise UserError(f"--data {data}: train and val have different classes ({', '.join(odd[:5])} in one "
                        "only); a probe needs the same in both")
    if fraction < 1:
        train.keep(balanced_draw(train.labels, fraction, seed))
    return train, val


def balanced_draw(labels, fraction, seed):
    """Indices of a fixed draw with equally many images, at least one, of each class: labels (N,) -> (n,)."""
    order = torch.randperm(len(labels), generator=generator("cpu", seed, "labels"))
    count = max(1, round(fraction * len(labels) / len(labels.unique())))
    nth = F.one_hot(labels[order]).cumsum(0).gather(1, labels[order, None])[:, 0]   # (N,), from 1
    return order[nth <= count].sort().values


def centre_box(aspect, part):
    """Box for `warp` of the centred square over `part` of the shorter side: aspect (B,) -> (B, 4)."""
    half = torch.stack([(1 / aspect).clamp(max=1), aspect.clamp(max=1)], 1) * part  # (B, 2)
    return torch.cat([torch.zeros_like(half), half], 1)


def make_view(images, aspect, size, kind, chunk):
    """The test view of a chunk of images: bytes (B, 3, S, S), aspect (B,) -> (B, 3, size, size), angles (B,).

    kind: orig, or cj, flip, rot, elastic joined by "+"; rot=30 and elastic=50 fix the angle (else within 90
    degrees) and alpha (else 100, at 224 px). Random numbers are a function of the chunk, drawn on the CPU."""
    gen, B, device, scale = generator("cpu", "test views", chunk), len(images), images.device, size / 224
    steps = dict(s.partition("=")[::2] for s in kind.split("+"))                    # {"cj": "", "rot": "30"}
    between = lambda low, high: (low + (high - low) * torch.rand(B, generator=gen)).to(device)
    flip, angle = (between(0, 1) < 0.5) & ("flip" in steps), between(-90, 90) * ("rot" in steps)
    jitter = [*(between(0.6, 1.4) for _ in range(3)), between(-0.1, 0.1), torch.randperm(4, generator=gen)]
    if steps.get("rot"):
        angle = torch.full_like(angle, float(steps["rot"]))
    shift = None
    if "elastic" in steps:
        noise = torch.rand(B, 2, size, size, generator=gen).to(device) * 2 - 1
        shift = clever.elastic_shift(noise, float(steps["elastic"] or 100) * scale, 5 * scale)
    x = warp(images.float() / 255, size, centre_box(aspect, 0.875 if size > 64 else 1), flip, angle, shift)
    return clever.normalize(clever.color_jitter(x, *jitter) if "cj" in steps else x), angle


@torch.no_grad()
def extract(model, data, kind):
    """Features (N, F) and angles (N,) of a split's images under `kind`; each process computes its chunks."""
    features = torch.zeros(len(data), model.width, device=model.device)
    angles = torch.zeros(len(data), device=model.device)
    starts = range(model.rank * CHUNK, len(data), model.world * CHUNK)
    stream = data.stream([range(i, min(i + CHUNK, len(data))) for i in starts], model.device, model.workers)
    quiet = model.rank > 0 or None
    for i, (images, aspect) in zip(starts, tqdm(stream, kind, len(starts), disable=quiet, leave=False)):
        view, angles[i:i + CHUNK] = make_view(images, aspect, model.size, kind, i // CHUNK)
        features[i:i + CHUNK] = model(view)
    if model.world > 1:
        dist.all_reduce(features), dist.all_reduce(angles)     # the rows of the other processes are zero here
    return features, angles


# ======== 4. Probes: pure functions of features


class LinearProbes(nn.Module):
    """Linear classifiers of P parts x L learning rates side by side: features (B, F) -> logits (P, L, B, C).

    SGD without weight decay is linear in the gradient: a learning rate is a weight of the loss."""

    def __init__(self, parts, width, rates, classes, seed=0, device="cpu"):
        super().__init__()
        self.names, self.shape, outputs = list(parts), (len(rates), classes), len(rates) * classes
        weight = 0.01 * torch.randn(len(parts), width, outputs, generator=generator("cpu", seed, "head"))
        self.weight = nn.Parameter(weight.to(device))                               # (P, F, L * C)
        self.bias = nn.Parameter(torch.zeros(len(parts), 1, outputs, device=device))
        mask = [torch.zeros(1, width, device=device).index_fill(1, i, 1.0) for i in parts.values()]
        self.mask, self.rates = torch.stack(mask), torch.tensor(rates, device=device)    # (P, 1, F), (L,)
        self.best = torch.zeros(len(parts), dtype=torch.long, device=device)        # (P,), see `choose`

    def forward(self, z):
        """(B, F) -> (P, L, B, C)."""
        logits = torch.baddbmm(self.bias, z * self.mask, self.weight)               # (P, B, L * C)
        return logits.unflatten(-1, self.shape).transpose(1, 2)

    def loss(self, z, y):
        """Mean cross-entropies of a batch, summed, weighted by the learning rates: (B, F), (B,) -> scalar."""
        log_q = F.log_softmax(self(z), -1)                                          # (P, L, B, C)
        return -(log_q[..., torch.arange(len(y), device=y.device), y].mean(-1) * self.rates).sum()

    @torch.no_grad()
    def choose(self, z, y):
        """Keep each part's learning rate with the best top-1 on held-out features (N, F), labels (N,)."""
        chunks = zip(z.split(CHUNK), y.split(CHUNK))
        self.best = sum((self(a).argmax(-1) == b).sum(-1) for a, b in chunks).argmax(1)

    @torch.no_grad()
    def predict(self, z):
        """Logits at the chosen learning rates: (N, F) -> (P, N, C)."""
        rows = torch.arange(len(self.best), device=z.device)
        return torch.cat([self(a)[rows, self.best] for a in z.split(CHUNK)], 1)


def knn(bank, labels, queries, classes, k=20, temperature=0.07):
    """Weighted k-NN by cosine (DINO): bank (N, d), labels (N,), queries (M, d) -> votes (M, C)."""
    bank, votes = F.normalize(bank, dim=-1), []
    for q in F.normalize(queries, dim=-1).split(CHUNK):
        cosine, index = (q @ bank.T).topk(min(k, len(bank)), 1)                     # each (m, k)
        weight = ((cosine - 1) / temperature).exp()
        votes.append(weight.new_zeros(len(q), classes).scatter_add_(1, labels[index], weight))
    return torch.cat(votes)


def topk(scores, labels, ks=(1, 5)):
    """Percentages of labels (N,) among the k highest scores (N, C), for each k."""
    hits = scores.topk(min(max(ks), scores.shape[1]), 1).indices == labels[:, None]      # (N, k)
    return [round(100 * float(hits[:, :k].any(1).float().mean()), 4) for k in ks]


def ridge_r2(x, angle, x_test, angle_test, penalty=0.01) -> float:
    """R2 on test rows of ridge regression from standardised features (N, d) to (cos, sin) of angles (N,)."""
    y, y_test = (torch.stack([a.deg2rad().cos(), a.deg2rad().sin()], 1).double() for a in (angle, angle_test))
    mean, std, centre = x.double().mean(0), x.double().std(0) + 1e-6, y.mean(0)
    x, x_test = (x - mean) / std, (x_test - mean) / std
    gram = x.T @ x / len(x) + penalty * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    w = torch.linalg.solve(gram, x.T @ (y - centre) / len(x))                       # (d, 2)
    error = (y_test - centre - x_test @ w).square().sum(0)
    return float((1 - error / (y_test - y_test.mean(0)).square().sum(0)).mean())


def describe(model, train, val) -> dict:
    """What z of a frozen backbone tells of class and angle, and its rank: {what: {part: number}}."""
    (bank, _), (turned, angle), (up, _), (rot, angle_val) = (
        extract(model, data, kind) for data in (train, val) for kind in ("orig", "rot"))
    labels, labels_val, C = train.labels.to(model.device), val.labels.to(model.device), len(train.classes)
    both, both_val = torch.stack([bank, turned], 1), torch.stack([up, rot], 1)  # (N, 2, F): and its copy
    top1 = lambda i, z: topk(knn(bank[:, i], labels, z[:, i], C), labels_val)[0]
    r2 = lambda i, z, z_val: ridge_r2(z[..., i].flatten(1), angle, z_val[..., i].flatten(1), angle_val)
    measures = {"k-NN top-1, upright": lambda i: top1(i, up), "k-NN top-1, rotated": lambda i: top1(i, rot),
                "rotation R2": lambda i: r2(i, turned, rot),
                "relative rotation R2": lambda i: r2(i, both, both_val),
                "effective rank": lambda i: clever.effective_rank(up[:, i])}
    return {what: {part: measure(i) for part, i in model.last.items()} for what, measure in measures.items()}


def before_after(cfg, p, model, train, val) -> tuple[dict, list]:
    """`describe`, untrained and trained, on at most 4096 and 2000 images: (numbers, rows of a table)."""
    splits = []
    for data, count in ((train, 4096), (val, 2000)):
        order = torch.randperm(len(data), generator=generator("cpu", "subset"))[:count].sort().values
        splits.append(copy.copy(data))
        splits[-1].bad = set()
        splits[-1].keep(order)
        splits[-1].hold(model.device, model.workers)
    torch.manual_seed(cfg.seed)                                # the backbone that this run started from
    floor = Representation(clever.CLeVER(cfg).backbone, cfg, p, model.device, (model.rank, model.world))
    before, after = describe(floor, *splits), describe(model, *splits)
    cell = lambda what, x: f"{x:.2f}" if "R2" in what else f"{x:.1f}"
    rows = [[what, *(f"{cell(what, before[what][k])} -> {cell(what, x)}" for k, x in row.items())]
            for what, row in after.items()]
    return dict(before=before, after=after), [["untrained -> trained", *model.last], *rows]


def markdown(rows) -> str:
    """Rows of strings, the first one the head, as an aligned Markdown table."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], re.sub(r"[^|]", "-", lines[0]), *lines[1:]])


def compare(cfg: Config, out) -> None:
    """At the end of a run (rank 0 alone): print what training changed, write it, and say what to do next."""
    p = Probe(run=str(out), device=cfg.device, precision=cfg.precision, workers=cfg.workers)
    device = torch.device("cuda" if cfg.device != "cpu" and torch.cuda.is_available() else "cpu")
    model = Representation(open_model(p)[1], cfg, p, device)
    try:
        numbers, rows = before_after(cfg, p, model, *open_splits(cfg.data, model.side))
        clever.write_json(Path(out) / "compare.json", numbers)
        print(f"\n{markdown(rows)}\n\nOn held-out images: k-NN in %, upright and rotated by up to 90 "
              "degrees; R2 of reading the angle (1: exact).")
    except UserError as e:
        print(f"No comparison with the untrained backbone: {e}")
    other = "dino" if cfg.method == "clever" else "clever"
    print(f"\n{out}: backbone.pt is the trained backbone, crops.png what it saw, log.jsonl the log. Next:\n"
          f"  python eval_linear.py {out} --quick\n  python clever.py --data {cfg.data} --method {other}")


# ======== 5. The paper's table


def feature_batches(p, model, data, rows, steps, bank=None):
    """This process's share of each step's batch: yields features (b, F) and labels (b,).

    From the bank (N, F) of extracted features; or through the backbone, with crops by (seed, step)."""
    labels, mine = data.labels.to(model.device), p.batch // model.world
    mine = slice(model.rank * mine, (model.rank + 1) * mine)
    batches = [rows[b] for b in clever.batches(len(rows), p, 0, steps, model.rank, model.world)]
    if bank is not None:
        yield from ((bank[b], labels[b]) for b in (b.to(model.device) for b in batches))
        return
    crops = clever.MultiCrop(Config(global_scale=(0.08, 1.0), aug="baug", blur=False))
    stream = data.stream([b.tolist() for b in batches], model.device, model.workers)
    for step, (batch, (images, aspect)) in enumerate(zip(batches, stream)):
        draws = crops.draw(0, p.batch, generator(model.device, p.seed, "probe", step))
        d = {k: v[mine] for k, v in draws.items()}
        box = crops.crop_box(d["area"], d["ratio"], d["place"], aspect)
        x = warp(images.float() / 255, model.size, box, d["flip"], d["angle"])      # (b, 3, size, size)
        yield model(clever.normalize(x)), labels[batch.to(model.device)]


def train_probes(p, model, data, bank=None) -> LinearProbes:
    """Linear probes of all parts, each at its best learning rate; with --finetune one head and the backbone.

    bank (N, F): features of the plain training images. A tenth, at most 5000, is held out to choose among
    several learning rates; a single one trains on all. Fine-tuning keeps the statistics of batch norm."""
    rates = (1.0,) if p.finetune else p.lr_grid
    order = torch.randperm(len(data), generator=generator("cpu", p.seed, "held out"))
    held, rows = order.tensor_split([min(5000, len(order) // 10) if len(rates) > 1 else 0])
    p = dataclasses.replace(p, batch=min(p.batch, len(rows) // model.world * model.world))
    steps = p.epochs * (len(rows) // p.batch)
    parts = {"all": torch.arange(model.width, device=model.device)} if p.finetune else model.parts
    probes = LinearProbes(parts, model.width, rates, len(data.classes), p.seed, model.device)
    head, trunk = list(probes.parameters()), list(model.parameters()) if p.finetune else []
    optimizer = torch.optim.SGD(head, lr=p.lr * p.batch / 256, momentum=0.9)
    if p.finetune:
        model.requires_grad_(True)
        groups = dict(params=head, lr=p.lr_head), dict(params=trunk, lr=p.lr_backbone)
        optimizer = torch.optim.AdamW(groups, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    batches = feature_batches(p, model, data, rows, steps, bank if p.quick else None)
    for z, y in tqdm(batches, "train", steps, disable=model.rank > 0 or None, leave=False):
        optimizer.zero_grad()
        probes.loss(z, y).backward()
        if model.world > 1:
            for q, mean in zip(head + trunk, clever.mean_over_processes([q.grad for q in head + trunk])):
                q.grad = mean
        optimizer.step()
        schedule.step()
    model.requires_grad_(False)
    if len(held):
        held = held.to(model.device)
        probes.choose(bank[held], data.labels.to(model.device)[held])
    return probes


def score(kinds, model, probes, train, val, bank=None) -> dict:
    """{"linear ir": {kind: [top-1, top-5]}} of linear probes and, where there is a bank (N, F), of k-NN."""
    labels, labels_val, table = train.labels.to(model.device), val.labels.to(model.device), {}
    for kind in kinds:
        z, _ = extract(model, val, kind)
        scores = {f"linear {part}": s for part, s in zip(probes.names, probes.predict(z))}
        for part, i in model.last.items() if bank is not None else ():
            scores[f"k-NN {part}"] = knn(bank[:, i], labels, z[:, i], len(train.classes))
        for name, s in scores.items():
            table.setdefault(name, {})[kind] = topk(s, labels_val)
    return table


def evaluate(p: Probe, cfg: Config, model) -> dict:
    """Train and test the probes, print the tables: {section of eval.json: pairs of top-1 and top-5}."""
    train, val = open_splits(p.data, model.side, p.labels, p.seed)
    train.hold(model.device, model.workers), val.hold(model.device, model.workers)
    backbone, name = copy.deepcopy(model.state_dict()), "finetune" if p.finetune else "probes"
    bank = None if p.finetune else extract(model, train, "orig")[0]
    probes = train_probes(p, model, train, bank)
    results = {name: score(KINDS, model, probes, train, val, bank)}
    tables = [[["top-1 / top-5, %", *KINDS]] + [[row, *("{:.1f} / {:.1f}".format(*v) for v in cells.values())]
                                               for row, cells in results[name].items()]]
    if p.curve:
        results["curves"] = score(CURVES, model, probes, train, val, bank)
        top1 = [[row, *(f"{v[0]:.1f}" for v in cells.values())] for row, cells in results["curves"].items()]
        tables.append([*zip(["top-1, %", *CURVES], *top1)])
    if not p.finetune:
        results[name]["learning rates"] = dict(zip(probes.names, (p.lr * probes.rates[probes.best]).tolist()))
        results["rotation"], rows = before_after(cfg, p, model, train, val)
        tables.append(rows)
        assert not any(m.training for m in model.modules()), "the probes saw a backbone in training mode"
        assert all(torch.equal(v, backbone[k]) for k, v in model.state_dict().items()), "the backbone changed"
    if model.rank == 0:
        print(f"{p.data}: {len(train)} training, {len(val)} test images of {len(train.classes)} classes\n")
        print("\n\n".join(map(markdown, tables)))
    suffix = f" {p.data}" * (p.data != cfg.data) + f" labels {p.labels}" * (p.labels < 1)
    return {section + suffix: numbers for section, numbers in results.items()}


# ======== 6. Segmentation by label propagation (DAVIS-2017), and pictures


def propagate(features, first, last=7, k=5, radius=12, temperature=0.1):
    """Carry masks through a clip (DINO): features (T, h, w, D), first (K, h, w) -> masks (T, K, h, w).

    A position takes the masks of its k most similar ones within `radius`, in the first and last frames."""
    T, h, w, _ = features.shape
    f = F.normalize(features.flatten(1, 2), dim=-1)                                 # (T, h*w, D)
    place = torch.cartesian_prod(torch.arange(h), torch.arange(w)).to(f.device)     # (h*w, 2)
    far = ((place[:, None] - place).abs() > radius).any(-1)                         # (h*w, h*w)
    masks = [first.flatten(1).to(f)]                                                # (K, h*w) of each frame
    for t in range(1, T):
        context = [0, *range(max(1, t - last), t)]
        affinity = f[t] @ f[context].flatten(0, 1).T / temperature                  # (h*w, c*h*w)
        affinity = affinity.masked_fill(far.repeat(1, len(context)), -math.inf)
        weight, index = affinity.topk(min(k, affinity.shape[1]), 1)                 # each (h*w, k)
        source = torch.cat([masks[c] for c in context], 1)                          # (K, c*h*w)
        masks.append((source[:, index] * weight.softmax(1)).sum(-1))
    return torch.stack(masks).unflatten(-1, (h, w))  # (T, K, h*w) -> (T, K, h, w)


def segment(features, annotation):
    """Objects of a clip from those of its first frame: features (T, h, w, D), ids (H, W) -> ids (T, H, W)."""
    ids = torch.tensor([0, *(i for i in annotation.unique().tolist() if 0 < i < 255)])   # 255: void
    one_hot = (annotation == ids[:, None, None]).float()[None]                      # (1, K, H, W)
    masks = propagate(features, F.interpolate(one_hot, size=features.shape[1:3], mode="area")[0]).cpu()
    low, high = masks.amin((2, 3), keepdim=True), masks.amax((2, 3), keepdim=True)
    masks = (masks - low) / (high - low).clamp(min=1e-6)                            # to [0, 1] (DINO)
    up = lambda m: F.interpolate(m[None], size=annotation.shape, mode="bilinear")[0]
    return torch.stack([ids[up(m).argmax(0)] for m in masks])


def jaccard(predicted, truth):
    """Region similarity J of each object in each frame but the first and last: ids (T, H, W) -> (O, T-2)."""
    ids = [i for i in truth[0].unique().tolist() if 0 < i < 255]
    p, t = predicted[1:-1].masked_fill(truth[1:-1] == 255, 255), truth[1:-1]        # void is no object
    union = torch.stack([((p == i) | (t == i)).sum((1, 2)) for i in ids])           # (O, T-2)
    common = torch.stack([((p == i) & (t == i)).sum((1, 2)) for i in ids])
    return torch.where(union > 0, common / union.clamp(min=1), 1.0)


def patches(model, path):
    """Patch tokens of an image file, resized to whole patches, after the last norm of a ViT: (h, w, D)."""
    image, patch = Image.open(path).convert("RGB"), model.backbone.patch_size
    h, w = round(image.height / patch), round(image.width / patch)
    x = pil_to_tensor(image.resize((w * patch, h * patch), Image.Resampling.BICUBIC))[None].to(model.device)
    tokens = model.backbone.get_intermediate_layers(clever.normalize(x.float() / 255))[0]
    return tokens[0, 1:].unflatten(0, (h, w))                                       # (h*w, D) -> (h, w, D)


@torch.no_grad()
def davis(p: Probe, model) -> dict:
    """J mean and recall over the objects of DAVIS-2017's validation videos, from frozen patch features."""
    root, scores = Path(p.davis), {}
    try:
        videos = (root / "ImageSets/2017/val.txt").read_text().split()
        mine = videos[model.rank::model.world]
        for video in tqdm(mine, "videos", disable=model.rank > 0 or None, leave=False):
            frames = sorted((root / "JPEGImages/480p" / video).glob("*.jpg"))
            truth = [Image.open(root / "Annotations/480p" / video / f"{f.stem}.png") for f in frames]
            truth = torch.cat([pil_to_tensor(t) for t in truth])                    # (T, H, W): indices
            features = torch.stack([patches(model, f) for f in frames])             # (T, h, w, D)
            scores[video] = jaccard(segment(features, truth[0]), truth)
    except (OSError, RuntimeError) as e:
        raise UserError(f"--davis {root}: unreadable, or not the layout of DAVIS-2017 at 480p ({e})")
    gathered = [scores] * model.world
    if model.world > 1:
        dist.all_gather_object(gathered, scores)
    scores = {video: j for part in gathered for video, j in part.items()}
    objects = [j for video in videos for j in scores[video]]                        # each (T-2,)
    mean = lambda values: sum(values) / len(objects)
    result = {"J mean": mean(float(j.mean()) for j in objects),
              "J recall": mean(float((j > 0.5).float().mean()) for j in objects)}
    if model.rank == 0:
        cells = [str(len(videos)), str(len(objects)), *(f"{v:.3f}" for v in result.values())]
        print(markdown([["videos", "objects", *result], cells]))
    return {"davis": {**result, "videos": {v: scores[v].mean(1).tolist() for v in videos}}}


@torch.no_grad()
def visualize(p: Probe, model, path: Path) -> None:
    """A picture, a row an image: itself, the last CLS attention of each head, principal components."""
    rows, side = [], model.size // model.backbone.patch_size
    unit = lambda v: (v - v.amin(-1, True)) / (v.amax(-1, True) - v.amin(-1, True) + 1e-9)
    for name in p.visualize:
        try:
            pixels, aspect = clever.decode(name, model.side)
        except Exception as e:
            raise UserError(f"--visualize {name}: cannot be read ({e})")
        none, aspect = torch.zeros(1, device=model.device), torch.tensor([aspect], device=model.device)
        image = pixels[None].to(model.device).float() / 255
        image = warp(image, model.size, centre_box(aspect, 1), none > 0, none)      # (1, 3, size, size)
        x = clever.normalize(image)
        attention = model.backbone.get_last_selfattention(x)[0, :, 0, 1:]           # (heads, side*side)
        tokens = model.backbone.get_intermediate_layers(x)[0][0, 1:]                # (side*side, D)
        u, s, _ = torch.linalg.svd(tokens - tokens.mean(0), full_matrices=False)
        maps = torch.cat([unit(attention)[:, None].expand(-1, 3, -1), unit((u * s)[:, :3].T)[None]])
        maps = F.interpolate(maps.unflatten(-1, (side, side)), size=image.shape[2:], mode="nearest")
        rows.append(torch.cat([image, maps]).cpu())                                 # (heads + 2, 3, s, s)
    tiles = F.interpolate(torch.cat(rows), scale_factor=max(1, 128 // model.size), mode="nearest")
    grid = utils.make_grid(tiles, nrow=len(rows[0]), padding=4, pad_value=1.0)
    clever.write_whole(path, lambda f: utils.save_image(grid, f, format="png"))


# ======== 7. The command line


def run(p: Probe) -> None:
    """Evaluate as asked, on all processes; eval.json keeps its other sections. Raises UserError."""
    cfg, backbone, path = open_model(p)
    out = Path(p.out or path.parent)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out {out} cannot be written ({e.strerror}); name another folder")
    if (p.davis or p.visualize) and cfg.arch not in clever.VIT:
        raise UserError(f"--davis and --visualize need the patch tokens of a ViT, not {cfg.arch}")
    rank, world, device = clever.setup(Config(batch=p.batch, device=p.device))
    model = Representation(backbone, cfg, p, device, (rank, world))
    if p.visualize:
        if rank == 0:
            visualize(p, model, out / "visualize.png")
            print(f"{out / 'visualize.png'}: image, attention of each head, principal components as colours")
        return
    results = davis(p, model) if p.davis else evaluate(p, cfg, model)
    if rank == 0:
        file = out / "eval.json"
        settings = {**vars(p), "arch": cfg.arch, "ratio": cfg.ratio, "weights": str(path)}
        try:
            known = json.loads(file.read_text())
        except (OSError, ValueError):
            known = {}
        clever.write_json(file, {**known, **{k: {**v, "settings": settings} for k, v in results.items()}})
        print(f"\nwritten to {file}")


def main(argv) -> int:
    """Evaluate as a command line says; returns the exit code."""
    return clever.guarded("eval_linear.py", lambda: run(parse(argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
