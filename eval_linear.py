"""What did a backbone learn? The evaluation of CLeVER (arXiv 2406.00262) in one command.

    python eval_linear.py runs/in100                            linear and k-NN probes
    python eval_linear.py runs/in100 --quick                    in minutes, without crops
    torchrun --nproc-per-node gpu eval_linear.py runs/in100     on several GPUs
    python eval_linear.py runs/in100 --finetune --labels 0.1    train the backbone too
    python eval_linear.py runs/in100 --data cifar10             transfer to other data
    python eval_linear.py runs/mine --features PHOTOS           features of your images
    python eval_linear.py --weights dino.pth --arch vit_small --data IN100

Probes read all of z, IR, EF, and a control: as many dimensions as EF, drawn at random from z. For a
ViT, the linear probe of "all" reads the CLS tokens of the last four blocks, as in DINO; every other
probe reads only the last block's, z.

The linear probes follow the paper's protocol (100 epochs of SGD on random crops) in all but two
points: six learning rates are tried instead of one, and a tenth of the training images, at most
5000, is held out to choose among them. Unlike the published code, which prints the best test
accuracy over the epochs, these probes print that of the last epoch.

Images that cannot be read are reported and left out with their labels; fine-tuning shows the next
image instead.

Shapes: B images, N rows, F features, the last D of them z, C classes.
"""

import argparse
import contextlib
import copy
import json
import math
import os
import shlex
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import clever
from clever import CHUNK, Config, UserError, distributed, generator, report

# ==================================================================================================
# 1. The options
# ==================================================================================================

PROBE_RATES = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3]
FINETUNE_RATES = [1e-3]
LR_HELP = f"""learning rates of the probes {PROBE_RATES} for batches of 256, scaled with the batch;
held-out training images choose one. With --finetune: that of the head {FINETUNE_RATES}, not
scaled; the backbone's is a tenth of it"""


def model_options():
    """A parser of the options that choose the model. The scripts in extras/ have the same ones."""
    parser = argparse.ArgumentParser(add_help=False)
    add = parser.add_argument
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("run", nargs="?", help="folder of a run of clever.py")
    model.add_argument("--weights", help="or a file of weights: timm's, torchvision's, DINO's, ...")
    add("--arch", help="architecture of --weights, as for clever.py")
    add("--ratio", type=float, default=1.0, help="rho of --weights: 0.8 for CLeVER [1: no split]")
    add("--out", help="folder for the results [the run's, or that of --weights]")
    return parser


def parse(argv):
    """The options of a command line."""
    parser = argparse.ArgumentParser(
        "eval_linear.py",
        parents=[model_options()],
        description="Evaluate a backbone. In brackets: the defaults.",
        allow_abbrev=False,
    )
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--quick", action="store_true", help="compute features once: no crops")
    task.add_argument("--finetune", action="store_true", help="train the backbone too, with AdamW")
    task.add_argument("--features", metavar="FOLDER", help="only write features of its images")
    add = parser.add_argument
    add("--data", help="as for clever.py [the run's]")
    add(
        "--labels", type=float, default=1.0, help="fraction of images to use, balanced by class [1]"
    )
    add("--curve", action="store_true", help="also test by angle and by strength of deformation")
    add("--epochs", type=int, default=100, help="passes over the training images [100]")
    add("--batch", type=int, default=256, help="images per step, over all processes [256]")
    add("--lr", type=float, nargs="+", help=LR_HELP)
    add("--seed", type=int, default=0, help="random seed of probes, crops and --labels [0]")
    add("--workers", type=int, default=Config.workers, help="loader workers per process [up to 8]")
    args = parser.parse_args(argv)

    args.lr = args.lr or (FINETUNE_RATES if args.finetune else PROBE_RATES)
    if args.finetune and len(args.lr) > 1:
        raise UserError("--finetune takes one --lr")
    if args.weights and not (args.data or args.features):
        raise UserError("--weights needs --data or --features")
    numbers = (args.epochs, args.batch, args.labels, *args.lr)
    if not all(0 < number < math.inf for number in numbers) or args.labels > 1:
        raise UserError("--epochs, --batch, --lr and --labels must be above 0, --labels at most 1")
    Config(seed=args.seed, workers=args.workers)  # refuses negative numbers
    return args


# ==================================================================================================
# 2. The model, from a run or from a file of weights
# ==================================================================================================


def open_model(args):
    """The model that the options choose: its `Config`, the untrained and the trained backbone."""
    options = {}
    if args.run:
        cfg = clever.load_config(args.run)
        path = Path(args.run, "backbone.pt")
    else:
        path = Path(args.weights)
        cfg, options = inspect_weights(args, path)

    torch.manual_seed(cfg.seed)
    untrained = clever.build_backbone(cfg.arch, cfg.global_size, **options)  # as the run began
    trained = copy.deepcopy(untrained)
    clever.load_weights(trained, path)
    return cfg, untrained, trained


def inspect_weights(args, path):
    """The `Config` for a file of weights, and options of its backbone.

    A ViT's sizes are read from the file; a ResNet gets 32 or 224 px, by its stem.
    """
    if not args.arch:
        raise UserError("--weights needs --arch, such as vit_small")
    method = "dino" if args.ratio == 1 else "clever"
    cfg = Config(arch=args.arch, method=method, ratio=args.ratio)
    state = clever.read_weights(path)
    options = {}
    if {"pos_embed", "patch_embed.proj.weight"} <= state.keys():  # a ViT
        options["patch_size"] = state["patch_embed.proj.weight"].shape[-1]
        side = math.isqrt(state["pos_embed"].shape[1] - 1)  # patches
        cfg.global_size = side * options["patch_size"]
    elif "conv1.weight" in state and state["conv1.weight"].shape[-1] == 3:
        cfg.global_size = 32  # a ResNet with the stem for small images
    return cfg, options


def open_folder(args):
    """The folder for the results."""
    out = Path(args.out or args.run or Path(args.weights).parent)
    out.mkdir(parents=True, exist_ok=True)
    return out


class Representation(nn.Module):
    """What the probes see, in eval mode: images (B, 3, H, W) -> features (B, F); z is the last D.

    linear_columns and knn_columns: the columns of each part. For k-NN, "all" is z.
    """

    def __init__(self, backbone, cfg, device):
        super().__init__()
        self.backbone = backbone.to(device)
        self.cfg = cfg
        self.device = device
        D = backbone.embed_dim
        self.blocks = min(4, len(backbone.blocks)) if cfg.arch in clever.VIT else 1
        self.width = self.blocks * D

        parts = clever.part_columns(D, cfg.ratio)
        first = self.width - D  # of z
        self.knn_columns = {part: first + dims.to(device) for part, dims in parts.items()}
        self.linear_columns = dict(self.knn_columns, all=torch.arange(self.width, device=device))
        self.eval().requires_grad_(False)

    def forward(self, x):
        with clever.autocast(self.device, self.cfg.precision):
            if self.blocks == 1:
                return self.backbone(x).float()
            layers = self.backbone.get_intermediate_layers(x, self.blocks)
            return torch.cat([tokens[:, 0] for tokens in layers], -1).float()


# ==================================================================================================
# 3. The images
# ==================================================================================================

# The perturbations of the test images, as options of `make_view`
KINDS = {
    "orig": dict(),
    "cj": dict(jitter=True),
    "cj+flip": dict(jitter=True, flip=True),
    "cj+rot": dict(jitter=True, angles=(-90, 90)),
    "cj+rot+elastic": dict(jitter=True, angles=(-90, 90), alpha=100),
}
CURVES = {f"rot={degrees}": dict(angles=(degrees, degrees)) for degrees in range(15, 91, 15)}
CURVES |= {f"elastic={alpha}": dict(alpha=alpha) for alpha in (25, 50, 100, 150, 200)}


def make_view(
    images, aspect, size, gen, crop=False, flip=False, jitter=False, angles=(0, 0), alpha=0
):
    """A view of each image: bytes (B, 3, S, S), aspect (B,) -> (B, 3, size, size), normalised.

    gen: random generator on the CPU
    crop: random resized crop instead of the centre
    angles: range of the rotation, in degrees
    alpha: strength of the elastic deformation of a view of 224 px
    """
    B = len(images)
    # Training crops: draw for the images of all processes and take this one's. Test images: each
    # process has chunks of its own.
    rank, world = distributed() if crop else (0, 1)

    def uniform(low, high, *shape):
        draws = torch.rand(B * world, *shape, generator=gen)[rank * B : (rank + 1) * B]
        return (low + (high - low) * draws).to(images.device)  # (B, *shape)

    # Every kind makes all these draws, so two kinds differ only in what their names list.
    flipped = (uniform(0, 1) < 0.5) & flip
    angle = uniform(*angles)
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
        x = clever.color_jitter(x, factors, order)
    return clever.normalize(x)


def keep_rows(data, rows):
    """Keep only these rows (n,) of `Images`, with their labels."""
    if torch.is_tensor(data.images):
        data.images = data.images[rows]
    else:
        data.images = [data.images[i] for i in rows.tolist()]
    data.labels = data.labels[rows]


def balanced_draw(labels, fraction, seed, readable):
    """Rows (n,) of equally many readable images of each class, at least one: labels (N,)."""
    order = torch.randperm(len(labels), generator=generator("cpu", seed, "labels"))
    order = order[readable[order]]
    classes = labels.unique()
    count = max(1, round(fraction * len(labels) / len(classes)))
    rows = [order[labels[order] == label][:count] for label in classes]
    return torch.cat(rows).sort().values


def keep_fraction(data, args):
    """Keep a balanced draw of the images; for one that cannot be read, another is drawn."""
    readable = torch.ones(len(data), dtype=torch.bool)
    while True:
        rows = balanced_draw(data.labels, args.labels, args.seed, readable)
        chunks = [chunk.tolist() for chunk in rows.split(CHUNK)]
        stream = data.stream(chunks, torch.device("cpu"), args.workers)
        readable[rows] = False
        with contextlib.closing(stream):
            for _, _, index in stream:
                readable[index] = True
        if readable[rows].all():
            return keep_rows(data, rows)


def open_data(args, cfg):
    """The training images, or a fraction of them, and the test images."""
    train, val = clever.load_images(cfg.data, clever.stored_side(cfg.global_size))
    if val is None:
        raise UserError(f"--data {cfg.data} has no labels; --features writes its features")
    if args.labels < 1:
        keep_fraction(train, args)
    world = distributed()[1]
    if args.batch % world:
        raise UserError(f"--batch {args.batch} must be a multiple of {world}, the process count")
    if len(train) < 2 * world:  # some images are held out
        raise UserError(f"{len(train)} training images are too few")
    counts = f"{len(train)} training and {len(val)} test images in {len(train.classes)} classes"
    report(f"{cfg.data}: {counts}")
    return train, val


@torch.no_grad()
def compute_features(model, data, **perturbation):
    """Features (N, F) of images, perturbed or not; each process computes a share of the chunks.

    Images that cannot be read are removed from `data`. The draws for a test image depend only on
    its position: they are the same for every model, seed and number of processes.
    """
    rank, world = distributed()
    features = torch.zeros(len(data), model.width, device=model.device)
    readable = torch.zeros(len(data), device=model.device)
    chunks = [chunk.tolist() for chunk in torch.arange(len(data)).split(CHUNK)[rank::world]]
    stream = data.stream(chunks, model.device, model.cfg.workers)
    # None: shown only on a terminal
    bar = tqdm(stream, None, len(chunks), leave=False, disable=rank > 0 or None)
    with contextlib.closing(stream):
        for images, aspect, index in bar:
            gen = generator("cpu", "test views", int(index[0]) // CHUNK)
            view = make_view(images, aspect, model.cfg.global_size, gen, **perturbation)
            features[index] = model(view)
            readable[index] = 1

    if world > 1:  # the rows of the other processes are zero here
        dist.all_reduce(features)
        dist.all_reduce(readable)
    rows = readable.nonzero()[:, 0]
    if len(rows) < len(data):
        report(f"{len(data) - len(rows)} of {len(data)} images cannot be read and are left out")
        keep_rows(data, rows.cpu())
    return features[rows]


# ==================================================================================================
# 4. The probes
# ==================================================================================================


def new_heads(args, model, classes):
    """An untrained linear classifier of each part for each learning rate: {(part, rate): head}."""
    gen = generator("cpu", args.seed, "head")
    heads = {}
    for part, dims in model.linear_columns.items():
        for rate in args.lr:
            head = nn.Linear(len(dims), classes)
            nn.init.normal_(head.weight, std=0.01, generator=gen)
            nn.init.zeros_(head.bias)
            heads[part, rate] = head.to(model.device)
    return heads


def new_optimizer(args, model, heads, batch):
    """SGD for the probes or, with --finetune, AdamW for the head and the backbone."""
    weights = list(nn.ModuleList(heads.values()).parameters())
    if not args.finetune:
        return torch.optim.SGD(weights, lr=batch / 256, momentum=0.9)

    model.requires_grad_(True)
    head = dict(params=weights, lr=args.lr[0])
    backbone = dict(params=model.parameters(), lr=args.lr[0] / 10)
    return torch.optim.AdamW([head, backbone], weight_decay=0.05)


def training_batches(args, model, data, bank, rows, batch, steps):
    """Yield the features (b, F) and labels (b,) of each step, from the bank or of random crops."""
    order = clever.batches(len(rows), Config(batch=batch, seed=args.seed), 0, steps)
    if args.quick:
        labels = data.labels.to(model.device)
        for share in order:
            index = rows[share].to(model.device)
            yield bank[index], labels[index]
        return

    order = (rows[share].tolist() for share in order)
    stream = data.stream(order, model.device, model.cfg.workers, replace=True)
    for step, (images, aspect, index) in enumerate(stream):
        gen = generator("cpu", args.seed, "probe", step)
        size = model.cfg.global_size
        view = make_view(images, aspect, size, gen, crop=True, flip=True)
        yield model(view), data.labels[index].to(model.device)


def train_probes(args, model, data, bank):
    """Train a linear probe of each part and, with --finetune, the backbone.

    bank (N, F): features of the plain training images. Returns {part: (learning rate, head)}. A
    tenth of the images, at most 5000, is held out to choose the learning rates. Fine-tuning keeps
    the statistics of batch norm.
    """
    order = torch.randperm(len(data), generator=generator("cpu", args.seed, "held out"))
    count = min(5000, math.ceil(len(order) / 10)) if len(args.lr) > 1 else 0
    held, rows = order.tensor_split([count])
    rank, world = distributed()
    batch = min(args.batch, len(rows)) // world * world  # as many in each process
    steps_per_epoch = len(rows) // batch
    steps = args.epochs * steps_per_epoch

    heads = new_heads(args, model, len(data.classes))
    optimizer = new_optimizer(args, model, heads, batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    # SGD's updates are linear in the loss: multiplying a probe's loss by `rate` trains the probe at
    # that learning rate. So one backward pass and one optimiser, with rate 1 for 256 images, train
    # the probes of all parts at all learning rates side by side.
    scales = [1.0] if args.finetune else [rate for _, rate in heads]

    stream = training_batches(args, model, data, bank, rows, batch, steps)
    bar = tqdm(stream, "train", steps, leave=False, disable=rank > 0 or None)
    with contextlib.closing(stream):
        for step, (z, labels) in enumerate(bar, 1):
            losses = []
            for (part, _), head in heads.items():
                scores = head(z[:, model.linear_columns[part]])
                losses.append(F.cross_entropy(scores, labels))
            optimizer.zero_grad()
            sum(scale * loss for scale, loss in zip(scales, losses)).backward()
            for group in optimizer.param_groups:
                clever.average_gradients(group["params"])
            optimizer.step()
            schedule.step()

            if step % steps_per_epoch == 0 and not args.quick:
                mean = sum(losses) / len(losses)
                report(f"epoch {step // steps_per_epoch}/{args.epochs}  loss {mean:.4f}")

    model.requires_grad_(False)
    return choose_rates(model, heads, bank[held], data.labels[held].to(model.device))


@torch.no_grad()
def choose_rates(model, heads, z, labels):
    """The best (learning rate, head) of each part on held-out rows z (n, F), labels (n,).

    The loss decides between equal accuracies.
    """
    best = {}
    for (part, rate), head in heads.items():
        scores = head(z[:, model.linear_columns[part]])
        quality = clever.accuracy(scores, labels), -float(F.cross_entropy(scores, labels))
        if part not in best or quality > best[part][0]:
            best[part] = quality, rate, head
    return {part: (rate, head) for part, (_, rate, head) in best.items()}


def top_1_and_5(scores, labels):
    """[top-1, top-5] in % of scores (N, C), labels (N,); only top-1 for fewer than 6 classes."""
    top = [1, 5] if scores.shape[1] > 5 else [1]
    return [clever.accuracy(scores, labels, k) for k in top]


def evaluate(args, model, train, val):
    """Train the probes and test them: {"linear": {part: {kind: [top-1, top-5]}}, "k-NN": ...}."""
    if args.finetune:
        model.linear_columns = {"fine-tuned": model.linear_columns["all"]}
        model.knn_columns = {}
        bank = torch.zeros(0, model.width, device=model.device)
    else:
        bank = compute_features(model, train)
    probes = train_probes(args, model, train, bank)

    linear = {part: {} for part in model.linear_columns}
    knn = {part: {} for part in model.knn_columns}
    labels = train.labels.to(model.device)
    kinds = KINDS | CURVES if args.curve else KINDS
    for kind, perturbation in kinds.items():
        z = compute_features(model, val, **perturbation)
        truth = val.labels.to(model.device)
        for part, (_, head) in probes.items():
            linear[part][kind] = top_1_and_5(head(z[:, model.linear_columns[part]]), truth)
        for part, dims in model.knn_columns.items():
            votes = clever.knn(bank[:, dims], labels, z[:, dims], len(train.classes))
            knn[part][kind] = top_1_and_5(votes, truth)
    rates = {part: rate for part, (rate, _) in probes.items()}
    return {"linear": linear, "k-NN": knn, "learning rates": rates}


def print_accuracies(name, parts):
    """Print a table of {part: {kind: [top-1, top-5]}}: a column per part, a row per kind."""
    rows = []
    for kind in list(parts.values())[0]:
        cells = [" / ".join(f"{value:.1f}" for value in row[kind]) for row in parts.values()]
        rows.append([kind, *cells])
    top = "top-1 / top-5" if "/" in cells[0] else "top-1"
    report("")
    clever.print_table([f"{name}, {top} in %", *parts], rows)


# ==================================================================================================
# 5. The command line
# ==================================================================================================


def folder_features(args, model):
    """The folder for features.pt, and what it holds: paths, z (N, D), and its columns IR and EF."""
    side = clever.stored_side(model.cfg.global_size)
    data = clever.Images(side, *clever.load_folder(Path(args.features), labelled=False))
    out = open_folder(args)
    D = model.backbone.embed_dim
    z = compute_features(model, data)[:, -D:].cpu()
    ir, ef = clever.split(torch.arange(D), model.cfg.ratio)
    return out, dict(paths=data.images, z=z, IR=ir, EF=ef, ratio=model.cfg.ratio)


def save_section(path, name, results):
    """Add a section to an eval.json; one of the same name is replaced, the others stay."""
    sections = json.loads(path.read_text()) if path.exists() else {}
    sections[name] = results
    new = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    new.write_text(json.dumps(sections, indent=1))
    os.replace(new, path)


def main(argv=None):
    """Evaluate as a command line asks."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    device = clever.setup()
    cfg, untrained, trained = open_model(args)
    cfg.data = args.data or cfg.data
    cfg.workers = args.workers
    model = Representation(trained, cfg, device)
    million = sum(p.numel() for p in trained.parameters()) / 1e6
    parameters = f"{cfg.arch} ({million:.1f}M parameters, {cfg.global_size} px)"
    report(f"{args.run or args.weights}: {parameters}, {cfg.method}, ratio {cfg.ratio}")
    if args.features:
        out, content = folder_features(args, model)
    else:
        train, val = open_data(args, cfg)
        out = open_folder(args)
        results = evaluate(args, model, train, val)

    rank, _ = distributed()
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank > 0:
        return
    if args.features:
        torch.save(content, out / "features.pt")
        shapes = ", ".join(f"{name} {tuple(content[name].shape)}" for name in ("z", "IR", "EF"))
        report(f"written to {out / 'features.pt'}: {shapes}")
        return

    print_accuracies("linear", results["linear"])
    if not args.finetune:
        print_accuracies("k-NN", results["k-NN"])
    settings = dict(arch=cfg.arch, method=cfg.method, ratio=cfg.ratio, data=cfg.data)
    results["settings"] = vars(args) | settings
    name = shlex.join(["eval_linear.py", *argv])
    save_section(out / "eval.json", name, results)
    report(f'\nwritten to {out / "eval.json"}, section "{name}"')
    if not args.finetune:
        if cfg.init:
            clever.load_weights(untrained, cfg.init)
        results["compare"] = clever.compare(cfg, train, val, device, untrained, trained)
        save_section(out / "eval.json", name, results)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"eval_linear.py: {error}")
