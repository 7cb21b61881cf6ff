"""What this code promises, by number. `pytest` checks it; each test names its claims.

Losses and the training step
 1. L_CL, L_Orth, L_PReg and their gradients equal naive versions that loop over pairs of views.
 2. The order of the images in a batch changes no loss, and views may come in any order of sizes.
 3. The loss is the weighted sum of its named terms. DINO has one head, no split, and only L_CL.
 4. IR and EF together are z, and each part feeds its own head, which is the published one.
 5. Stochastic depth grows from block to block and keeps the mean. The teacher has none.
 6. Six steps equal the published loop in every term, weight and centre, to 1e-10 in float64.
    The schedules equal the published ones, in short and in long runs.
 7. A step and its views never wait for the device, and --compile computes the same.
 8. Losses, weights and metrics do not depend on the number of processes, to rounding.

Backbones
 9. Each backbone has the width and the number of parameters of its paper.
10. ViT and ResNet equal torchvision's with the same weights; their parameters have the names of
    timm and torchvision, and VMamba's 274 tensors have the original's.
11. VMamba's scan is the recurrence of its paper, pixel by pixel, on any map, summed in float32.
12. --arch and --training module:Class use your own class, and a resumed run uses the same one.
    A loss may leave out a head and have layers of its own, on any number of processes. The two
    example losses are lowest if EF knows the view; a constant EF costs what they say.
13. --init starts the student, the teacher and the comparison from the weights of a run, DINO or
    timm. Weights that do not fit or are not finite are refused in one sentence.

Views
14. The boxes of crops are distributed as torchvision's. The pixels of a crop of a textured image
    equal torchvision's bicubic crop to 40 dB on average, which wrong interpolations miss.
15. Flip, rotation, elastic deformation, colours and blur equal torchvision's. The geometry is
    sampled once.
16. Each random parameter of a view has the recipe's distribution and depends only on seed and step.
    The elastic noise has its own generator: all else is drawn as without it.

Images
17. In a labelled folder, the folders in train/ and val/ are the classes, links included. Links
    below them are not followed, and hidden files do not count. Other files are counted as ignored.
18. Wrong folders are refused: stray images, no val/, different classes, what cannot be listed.
19. Images of every common mode are read in their colours and upright. Bad EXIF costs only the
    orientation.
20. A broken image is reported. Training shows the next one with its own label; an evaluation
    leaves it out with its label.

Runs
21. A run prints what it will do, warns if it has few steps, logs what its docstrings list, leaves
    its files and prints the next command. `clever.py` needs no other file.
22. A wrong command gets one sentence and exit code 1 (argparse: 2). It creates nothing and
    overwrites nothing.
23. A run killed at any moment and resumed ends with the same bits as one that never stopped. One
    command line with --resume starts, continues and starts again.
24. SIGTERM and Ctrl-C save a checkpoint and end with 143 and 130, also if they come twice or reach
    the workers; a second Ctrl-C ends at once.
25. Signal handlers are put back however training ends. Training works in a thread.
26. If one of several processes dies, all end; if one is stopped, all save and stop.
27. Workers that hang end the run with an error.
28. A number that is not finite or a full disk ends the run; the last good checkpoint is kept.
29. A run continues with data that moved, and its config.json follows. Other files are refused.
30. No code in a checkpoint or in a file of weights is run.

Collapse and what was learned
31. Each alarm is raised by its collapse only, and printed once.
32. The logged metrics equal naive versions. Batches below 8 images leave out those that need more.
33. k-NN votes and the R2 of the angle equal naive versions. A tied vote is no hit.
34. The comparison tells before from after and upright from rotated. The corners of a rotated image
    do not give its angle away.

Evaluation
35. A class planted in IR and an angle planted in EF are found there and not in the other part.
36. Probes trained side by side equal probes trained one by one, and held-out images choose the
    learning rates.
37. Probes of IR and EF read these dimensions of z, k-NN on all reads z, and the linear probe on all
    of a ViT reads four CLS tokens.
38. Each perturbation is what its name says. Every seed and model sees the same test images.
39. Features and probes do not depend on the number of processes, to rounding.
40. --labels draws equally many readable images of each class (all of a smaller one), always the
    same ones for a seed.
41. Images that cannot be read are left out with their labels: probes on all labels are what they
    are without these files.
42. Weights load from the layouts of timm, DINO and this project; a ViT's sizes and a ResNet's stem
    are read from the file.
43. A wrong command gets one sentence and writes nothing. Ctrl-C ends the workers, too.
44. One command prints tables that fit 100 columns and adds a section to eval.json, named by the
    command; other sections and the run stay as they are.
45. Probing leaves the backbone as it is. Fine-tuning trains a copy, with the learning rates of
    --lr, and keeps the statistics of batch norm.
46. --features writes the z that the k-NN sees, for the images of a folder without labels.
47. DAVIS: masks are carried from frame to frame as by a naive version; pixels that are void do not
    count, and videos that are too short are left out.
48. visualize.py draws what the picture's names list; its attention is that of the last block.
"""

import argparse
import concurrent.futures
import contextlib
import copy
import functools
import importlib
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
import torchvision.transforms.functional as TF
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import transforms as T

import clever
import eval_linear
from extras import davis, published, quarter, turn, visualize, vmamba

HERE = Path(clever.__file__).resolve().parent
os.environ.update(PYTHONPATH=str(HERE), OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
CHILDREN = multiprocessing.get_context("forkserver")  # real processes that share an import of torch
CHILDREN.set_forkserver_preload([__name__])

CPU = torch.device("cpu")
INT, TERM, KILL = signal.SIGINT, signal.SIGTERM, signal.SIGKILL
NEAREST = T.InterpolationMode.NEAREST
BILINEAR = T.InterpolationMode.BILINEAR
BICUBIC = T.InterpolationMode.BICUBIC

# ==================================================================================================
# Helpers
# ==================================================================================================

TINY = dict(
    arch="vit_micro", global_size=32, local_size=16, local_views=2, out_dim=64, hidden_dim=32,
    batch=8, epochs=4, lr=5e-3, precision="fp32", workers=0,
)  # fmt: skip


@pytest.fixture(autouse=True)
def same_start(monkeypatch, tmp_path):
    """A test starts in an empty folder with one thread and seed 0, and leaves no process behind."""
    monkeypatch.chdir(tmp_path)
    signal.signal(INT, signal.default_int_handler)  # a shell's background ignores Ctrl-C
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    for process in multiprocessing.active_children():
        process.kill()


def tiny(**options):
    """A configuration of a network that runs in milliseconds."""
    return clever.Config(**{**TINY, **options})


def normal(*shape, seed=0):
    """Normal random numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a, b, tolerance=1e-10):
    """Assert that tensors, or lists and dicts of them, are equal but for rounding."""
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def happens(event, p):
    """Assert that the share of true values is p, but for chance (4 standard deviations)."""
    assert abs(event.double().mean() - p) <= 4 * math.sqrt(p * (1 - p) / len(event))


def uniform(x, low, high):
    """Assert that numbers are as near to a uniform distribution as by chance (Kolmogorov)."""
    x = (x.double().flatten().sort().values - low) / (high - low)
    assert x[0] >= -1e-6 and x[-1] <= 1 + 1e-6
    assert (x - torch.linspace(0, 1, len(x)).double()).abs().max() < 2 / len(x) ** 0.5


def spy(monkeypatch, *names):
    """A dict of the arguments and results, by name, of functions of clever.py, when called last."""
    seen = {}

    def watched(function):
        @functools.wraps(function)
        def call(*args, **options):
            seen.update(inspect.signature(function).bind(*args, **options).arguments)
            seen[function.__name__] = function(*args, **options)
            return seen[function.__name__]

        return call

    for name in names:
        monkeypatch.setattr(clever, name, watched(getattr(clever, name)))
    return seen


def patterns(count):
    """Images in memory, in ten classes."""
    return clever.Images(32, *clever.draw_patterns(count, seed=0))


def pictures(folder, count, red=90):
    """Files of noise, 36 to 40 px wide, with this much red."""
    folder.mkdir(parents=True)
    for n in range(count):
        gen = torch.Generator().manual_seed(n)
        pixels = torch.randint(90, 160, (3, 34, 36 + n % 5), generator=gen, dtype=torch.uint8)
        pixels[0] = red
        TF.to_pil_image(pixels).save(folder / f"{n:02}.jpg")
    return folder


def labelled_pictures(folder, train=12, val=4, reds=(10, 250)):
    """A folder of two classes: <folder>/{train,val}/{a,b}/00.jpg, ..."""
    for part, count in (("train", train), ("val", val)):
        for label, red in zip("ab", reds):
            pictures(folder / part / label, count, red)
    return folder


def flags(out, *more, **options):
    """The command line of a tiny run, 12 steps on 24 images, with other options over it."""
    words = ["--out", str(out)]
    for name, value in {**TINY, **options}.items():
        words += [clever.flag(name), str(value)]
    return words + [str(word) for word in more]


def child(words, folder, fault, env):
    """The body of a process: clever.py's main after a fault, with its output in a file."""
    os.chdir(folder)
    signal.signal(INT, signal.default_int_handler)
    multiprocessing.set_start_method("fork", force=True)  # starts a loader's workers at once
    output = os.open("output", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for number in (1, 2):
        os.dup2(output, number)
    os.environ.update(env)
    if fault:
        fault()
    try:
        clever.main(words)
    except clever.UserError as error:
        sys.exit(f"clever.py: {error}")


def start(words, folder, fault=None, **env):
    """Start a process that runs clever.py in a folder and writes to <folder>/output."""
    process = CHILDREN.Process(target=child, args=(words, folder, fault, env))
    process.start()
    return process


def finish(*processes):
    """The exit codes of processes; None: it hangs."""
    for process in processes:
        process.join(300)
    return [process.exitcode for process in processes]


def before(function, number, action, **constants):
    """A fault: call `number` of a function, "clever.train_step", does something first."""
    vars(clever).update(constants)
    module, name = function.split(".")
    owner = importlib.import_module(module)
    original = getattr(owner, name)
    calls = itertools.count(1)

    def call(*args, **options):
        if next(calls) == number:
            action(*args)
        return original(*args, **options)

    setattr(owner, name, call)


def send(numbers, *_):
    """An action: this process receives signals."""
    for number in numbers:
        signal.raise_signal(number)


def fail(error, *_):
    """An action: an exception."""
    raise error


def two_processes():
    """The environment of each of two processes, as torchrun makes it."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    env = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    return [dict(env, RANK=rank, LOCAL_RANK=rank) for rank in "01"]


def results_of(work, world, folder):
    """What work(rank, world, folder) saves to <folder>/<world>-<rank>.pt in each process."""
    ranks = [CHILDREN.Process(target=work, args=(rank, world, folder)) for rank in range(world)]
    for process in ranks:
        process.start()
    assert finish(*ranks) == [0] * world
    return [torch.load(folder / f"{world}-{rank}.pt") for rank in range(world)]


def join(rank, world, folder):
    """Become process `rank` of `world`, with one thread and seed 0."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if world > 1:
        meeting = f"file://{folder}/meeting-{world}"
        dist.init_process_group("gloo", meeting, rank=rank, world_size=world)


def read_log(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def checkpoint(run):
    return torch.load(run / "checkpoint.pt", weights_only=True)


def files_of(*folders):
    """All files below folders, and when they were written."""
    files = set()
    for folder in folders:
        files |= {(str(path), path.lstat().st_mtime_ns) for path in folder.rglob("*")}
    return files


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """24 images without labels, in a folder of a folder."""
    return pictures(tmp_path_factory.mktemp("data") / "photos" / "trip", 24).parent


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    return labelled_pictures(tmp_path_factory.mktemp("data") / "labelled")


@pytest.fixture(scope="module")
def base(photos, tmp_path_factory):
    """A run that never stopped."""
    folder = tmp_path_factory.mktemp("base")
    assert finish(start(flags(folder / "run", data=photos), folder)) == [0]
    return folder / "run"


# ==================================================================================================
# Losses, the representation and the training step
# ==================================================================================================


# Claims 1 and 2
@pytest.mark.parametrize("name", ["invariance", "orthogonality"])
@pytest.mark.parametrize("V, B, K, temp", [(2, 1, 2, 0.04), (10, 4, 64, 0.07)])
def test_losses_equal_naive_ones(name, V, B, K, temp):
    loss = getattr(clever, f"{name}_loss")
    naive = getattr(published, f"naive_{name}")
    student = normal(V, B, K).requires_grad_()
    teacher = normal(2, B, K, seed=1).requires_grad_()
    centre = normal(K, seed=2)
    ours = loss(student, teacher, centre, temp)
    theirs = naive(student, teacher, centre, temp)
    close(ours, theirs)
    gradient, none = torch.autograd.grad(ours, (student, teacher), allow_unused=True)
    close(gradient, torch.autograd.grad(theirs, student)[0])
    assert none is None

    order = torch.randperm(B)
    close(loss(student[:, order], teacher[:, order], centre, temp), ours)


# Claims 2 and 4
@pytest.mark.parametrize("ratio", [0.02, 0.8, 0.99])
def test_ir_and_ef_feed_their_own_heads(ratio):
    net = clever.CLeVER(tiny(ratio=ratio, ef_out_dim=48)).double()
    views = [normal(2, 3, side, side, seed=i) for i, side in enumerate((16, 32, 16, 48, 32))]
    z = torch.stack([net.backbone(view) for view in views])
    ir, ef = clever.split(z, ratio)
    assert ir.shape[-1] == math.floor(ratio * 96)
    assert torch.equal(torch.cat([ir, ef], -1), z)

    output = net(views)
    close(output.z, z)
    close(output.logits, [net.heads[0](ir), net.heads[1](ef)])


# Claim 4
def test_the_head_is_the_published_one():
    head = clever.ProjectionHead(154)
    shapes = [tuple(p.shape) for p in head.parameters()]
    hidden = [(2048, 154), (2048,), (2048, 2048), (2048,), (256, 2048), (256,)]
    assert shapes == [*hidden, (65536, 256)]

    x = torch.randn(2, 154)
    cosines = F.cosine_similarity(head.mlp(x)[:, None], head.prototypes.weight, dim=-1)
    close(head(x), cosines, 1e-5)


# Claim 5
def test_the_teacher_has_no_stochastic_depth():
    run = clever.Training(tiny(drop_path=0.3), 1)
    rates = [block.drop_path for block in run.student.backbone.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])
    assert [block.drop_path for block in run.teacher.backbone.blocks] == [0] * 4

    net = vmamba.VMamba(0.5)  # twice as much in its last block, below 1
    blocks = [module for module in net.modules() if isinstance(module, vmamba.VSSBlock)]
    assert max(block.drop_path for block in blocks) == 0.99

    x = clever.stochastic_depth(torch.ones(6000, 2).double(), 0.25, training=True)
    happens(x[:, 0] > 0, 0.75)
    close(x.unique(), torch.tensor([0, 1 / 0.75], dtype=torch.float64), 1e-6)


# Claims 1, 3, 6 and 7
@pytest.mark.parametrize(
    "method, epochs, compiled",
    [("clever", 20, False), ("dino", 200, False), ("clever", 20, True)],
)
def test_six_steps_equal_the_published_loop(monkeypatch, method, epochs, compiled):
    eager = partial(torch.compile, backend="eager")  # needs no C compiler
    monkeypatch.setattr(torch, "compile", eager)
    monkeypatch.setattr(clever, "CLIP", 0.02)  # clips a part of the gradients
    cfg = tiny(
        method=method, epochs=epochs, compile=compiled, drop_path=0.0, ef_out_dim=48, lr=0.1,
        lambda_orth=0.7, lambda_reg=0.1, teacher_temp=0.05,
    )  # fmt: skip
    run = clever.Training(cfg, 2)
    assert len(run.student.heads) == (1 if method == "dino" else 2)
    run.student.double()
    run.teacher.double()
    run.centres = [centre.double() for centre in run.centres]
    naive = published.Published(run, clip=0.02)
    close([run.lr, run.weight_decay, run.momentum], [naive.lr, naive.weight_decay, naive.momentum])

    prototypes = run.student.heads[0].prototypes.weight.clone()
    multi_crop = clever.MultiCrop(tiny())
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    for step in range(6):
        views = run.augment(images, torch.ones(8), step)
        close(views, multi_crop(images, torch.ones(8), step), 1e-4)
        views = [view.double() for view in views]
        close(clever.train_step(run, views, step), naive.step(views, step))
        close(list(run.student.parameters()), list(naive.student.parameters()))
        close(list(run.teacher.parameters()), list(naive.teacher.parameters()))
        close(run.centres, naive.centres)
        frozen = torch.equal(run.student.heads[0].prototypes.weight, prototypes)
        assert frozen == (step < 2)


class NeverWait(TorchDispatchMode):
    """Within it, an operation that makes the host wait for values of a device fails."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        waits = re.fullmatch("_local_scalar_dense|nonzero|masked_select|equal|_?unique2?", name)
        if name.startswith("index") and isinstance(args[1], (list, tuple)):
            waits = any(index is not None and index.dtype == torch.bool for index in args[1])
        assert not waits, f"{name} waits for the device"
        return function(*args, **(kwargs or {}))


# Claim 7
@pytest.mark.parametrize(
    "options", [dict(aug="caug+"), dict(arch="resnet18"), dict(arch="vmamba_tiny")]
)
def test_a_step_never_waits_for_the_device(monkeypatch, options):
    run = clever.Training(tiny(batch=2, **options), 1)
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    aspect = torch.ones(2)
    for name in ("tolist", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, None)
    with NeverWait():
        clever.train_step(run, run.augment(images, aspect, 0), 0)


class OwnLayer(clever.Training):
    """A training of a user: no loss for h_EF, one for a layer of its own on EF."""

    def __init__(self, cfg, steps_per_epoch):
        super().__init__(cfg, steps_per_epoch)
        self.student.layer = nn.Linear(self.student.heads[1].mlp[0].in_features, 5)
        self.optimizer.add_param_group(dict(params=self.student.layer.parameters()))

    def loss(self, student, teacher):
        L_CL = super().loss(student, teacher)["L_CL"]
        own = (self.student.layer(clever.split(student.z, self.cfg.ratio)[1]) - 1).square().mean()
        return dict(L_CL=L_CL, own=own, loss=L_CL + own)


def four_steps(kind, options, rank, world, folder):
    """Save what an epoch of four steps, as one of `world` processes, computes."""
    join(rank, world, folder)
    data = patterns(51)
    run = kind(tiny(batch=12, **options), 4)
    batches = clever.batches(len(data), run.cfg, 0, 4)
    for step, (images, aspect, _) in enumerate(data.stream(batches, CPU, 0)):
        terms = clever.train_step(run, run.augment(images, aspect, step), step)

    for block in [*run.student.backbone.blocks, *run.teacher.backbone.blocks]:
        block.attn.qkv.bias.data[96:192] = 0  # the gradient of the keys' bias is only rounding
    terms = {name: clever.mean_over_processes(term) for name, term in terms.items()}
    networks = [run.student.state_dict(), run.teacher.state_dict()]
    torch.save([terms, clever.epoch_metrics(run), *networks], f"{folder}/{world}-{rank}.pt")


# Claims 8 and 12
@pytest.mark.parametrize(
    "kind, options, worlds",
    [
        (clever.Training, dict(aug="caug+", ef_out_dim=48), (2, 3)),
        (OwnLayer, dict(), (2,)),
        (quarter.Shuffled, dict(aug="baug", ef_out_dim=4), (2,)),
    ],
)
def test_several_processes_equal_one(tmp_path, kind, options, worlds):
    work = functools.partial(four_steps, kind, options)
    work(0, 1, tmp_path)
    one = torch.load(tmp_path / "1-0.pt")
    for world in worlds:
        results = results_of(work, world, tmp_path)
        close(results[0], one, 1e-5)
        close(results, results[:1] * world, 0)


# ==================================================================================================
# Backbones
# ==================================================================================================


# Claim 9
@pytest.mark.parametrize(
    "arch, D, parameters",
    [
        ("vit_micro", 96, 467_808),
        ("vit_tiny", 192, 5_524_416),
        ("vit_small", 384, 21_665_664),
        ("vit_base", 768, 85_798_656),
        ("resnet18", 512, 11_176_512),
        ("resnet50", 2048, 23_508_032),
        ("vmamba_tiny", 768, 29_480_064),
    ],
)
def test_width_and_size_of_every_backbone(arch, D, parameters):
    with torch.device("meta"):
        f = clever.build_backbone(arch, 32 if arch == "vit_micro" else 224)
    assert f.embed_dim == D
    assert sum(p.numel() for p in f.parameters()) == parameters


# Claim 10
@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_resnets_equal_torchvisions(arch):
    ours = clever.build_backbone(arch, 224).double().eval()
    theirs = torchvision.models.get_model(arch).double().eval()
    theirs.fc = nn.Identity()
    theirs.load_state_dict(ours.state_dict())
    x = normal(2, 3, 64, 64)
    close(ours(x), theirs(x))


TIMM_TO_TORCHVISION = {
    "cls_token": "class_token",
    "pos_embed": "encoder.pos_embedding",
    "patch_embed.proj": "conv_proj",
    "\nnorm.": "\nencoder.ln.",
    "blocks.": "encoder.layers.encoder_layer_",
    "norm1.": "ln_1.",
    "norm2.": "ln_2.",
    "attn.qkv.": "self_attention.in_proj_",
    "attn.proj.": "self_attention.out_proj.",
    "mlp.fc1.": "mlp.0.",
    "mlp.fc2.": "mlp.3.",
}


# Claim 10
def test_the_vit_equals_torchvisions_and_has_timms_names():
    f = clever.build_backbone("vit_tiny", 64).double()
    for i, p in enumerate(f.parameters()):
        p.data += 0.05 * normal(*p.shape, seed=i)  # so that biases and norms count too
    theirs = torchvision.models.VisionTransformer(64, 16, 12, 3, 192, 768).double()
    theirs.heads = nn.Identity()
    names = "\n".join(f.state_dict())
    for timm_name, name in TIMM_TO_TORCHVISION.items():
        assert timm_name in names
        names = names.replace(timm_name, name)
    theirs.load_state_dict(dict(zip(names.split(), f.state_dict().values())))

    x = normal(2, 3, 64, 64)
    close(f(x), theirs(x))
    close(f.get_intermediate_layers(x, 4)[-1][:, 0], f(x))

    wide = normal(2, 3, 32, 48)  # positions are interpolated to its size
    grid = F.interpolate(f.pos_embed[:, 1:].mT.unflatten(2, (4, 4)), (2, 3), mode="bicubic")
    patches = f.patch_embed.proj(wide).flatten(2).mT
    close(f.tokens(wide)[:, 1:], patches + grid.flatten(2).mT)


def naive_scan(op, v, p):
    """The recurrence of SS2D, pixel by pixel, of a map v (B, H, W, D); p: its r, write and read."""
    B, H, W, D = v.shape
    rows = list(itertools.product(range(H), range(W)))
    columns = [(h, w) for w in range(W) for h in range(H)]
    z = op.Ds.view(4, D).sum(0) * v
    for k, path in enumerate([rows, columns, rows[::-1], columns[::-1]]):
        A = -op.A_logs.view(4, D)[k].exp()
        state = 0
        y = {}
        for h, w in path:
            r, write, read = p[:, h, w, k].tensor_split([-2, -1], 1)
            delta = F.softplus(r @ op.dt_projs_weight[k].T + op.dt_projs_bias[k])
            state = (delta * A).exp() * state + delta * write * v[:, h, w]
            y[h, w] = read * state
        z = z + torch.stack([y[pixel] for pixel in rows], 1).view(B, H, W, D)
    return z


# Claim 11
@pytest.mark.parametrize("H, W", [(1, 1), (1, 7), (7, 1), (5, 5), (9, 13)])
def test_the_scan_is_the_recurrence(H, W):
    op = vmamba.SS2D(32).double()
    for i, p in enumerate(op.parameters()):
        p.data = 0.5 * normal(*p.shape, seed=i)  # so large that every term counts
    x = normal(2, H, W, 32)

    v = (x @ op.in_proj.weight.T).permute(0, 3, 1, 2)
    v = F.silu(F.conv2d(v, op.conv2d.weight, padding=1, groups=32)).permute(0, 2, 3, 1)
    z = naive_scan(op, v, torch.einsum("kcd,bhwd->bhwkc", op.x_proj_weight, v))
    z = F.layer_norm(z, (32,), op.out_norm.weight, op.out_norm.bias) @ op.out_proj.weight.T

    ours = op(x)
    close(ours, z)
    weights = list(op.parameters())
    naive = torch.autograd.grad(z.sin().sum(), weights)
    close(torch.autograd.grad(ours.sin().sum(), weights), naive)


# Claim 11
@pytest.mark.parametrize("bias", [-1.0, -14.0])  # -14: a time step of about 1e-6
def test_the_scan_sums_half_precision_in_float32(bias):
    op = vmamba.SS2D(32)
    op.x_proj_weight.data = torch.eye(4, 32).expand(4, 4, 32).clone()  # r, B and C are exact
    op.dt_projs_bias.data = normal(4, 32).float() + bias
    op.Ds.data.zero_()
    v = normal(2, 9, 9, 32).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        z = op.selective_scan(v)

    v = v.double()
    naive = naive_scan(op.double(), v, v[..., None, :4].expand(2, 9, 9, 4, 4))
    largest = naive.abs().max()
    close(z.double() / largest, naive / largest, 1e-5)


# Claim 10
def test_the_274_tensors_of_vmamba():
    shapes = {}

    def layer(name, *weight):
        shapes[f"{name}.weight"] = weight
        shapes[f"{name}.bias"] = weight[:1]

    for i, weight in ((0, (48, 3, 3, 3)), (2, (48,)), (5, (96, 48, 3, 3)), (7, (96,))):
        layer(f"patch_embed.{i}", *weight)
    for i, (D, depth) in enumerate([(96, 2), (192, 2), (384, 8), (768, 2)]):
        for j in range(depth):
            block = f"layers.{i}.blocks.{j}"
            layer(f"{block}.norm", D)
            shapes[f"{block}.op.x_proj_weight"] = (4, D // 16 + 2, D)
            shapes[f"{block}.op.dt_projs_weight"] = (4, D, D // 16)
            shapes[f"{block}.op.dt_projs_bias"] = (4, D)
            shapes[f"{block}.op.A_logs"] = (4 * D, 1)
            shapes[f"{block}.op.Ds"] = (4 * D,)
            layer(f"{block}.op.out_norm", D)
            shapes[f"{block}.op.in_proj.weight"] = (D, D)
            shapes[f"{block}.op.conv2d.weight"] = (D, 1, 3, 3)
            shapes[f"{block}.op.out_proj.weight"] = (D, D)
            layer(f"{block}.norm2", D)
            layer(f"{block}.mlp.fc1", 4 * D, D)
            layer(f"{block}.mlp.fc2", D, 4 * D)
        if i < 3:
            layer(f"layers.{i}.downsample.1", 2 * D, D, 3, 3)
            layer(f"layers.{i}.downsample.3", 2 * D)
    layer("classifier.norm", 768)

    with torch.device("meta"):
        state = clever.build_backbone("vmamba_tiny", 224).state_dict()
    assert len(shapes) == 274
    assert [(name, tuple(p.shape)) for name, p in state.items()] == list(shapes.items())


class Net(nn.Module):
    """A backbone of a user."""

    embed_dim = 12

    def __init__(self, drop_path):
        super().__init__()
        self.backbone = nn.Linear(3, 12)
        self.fc = nn.Linear(12, 12)

    def forward(self, x):
        return self.fc(self.backbone(x.mean((2, 3))))


class Fork(clever.Training):
    """A training of a user: no loss for EF, one more term in the log, and SIGTERM in step 5."""

    def loss(self, student, teacher):
        if self.step == 4 and not self.cfg.resume:
            signal.raise_signal(signal.SIGTERM)
        terms = super().loss(student, teacher)
        return dict(terms, loss=terms["L_CL"], angle=self.augment.angles[0].mean())


# Claim 12
def test_a_fork_is_used_from_its_start_to_its_end(photos, tmp_path):
    own = dict(arch="test_clever:Net", training="test_clever:Fork")
    words = flags("run", data=photos, **own)
    command = [sys.executable, HERE / "clever.py", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 143, done.stderr
    assert read_log(tmp_path / "run")[-1]["step"] == 6
    clever.main(["--out", "run", "--resume"])
    assert all("angle" in line for line in read_log(tmp_path / "run"))
    clever.load_weights(Net(0.0), "run/backbone.pt")  # names as in other projects' classifiers


# Claim 12
def test_an_ef_that_turns_with_the_view_costs_nothing_in_turn():
    run = turn.Turn(tiny(aug="caug", ef_out_dim=2), 1)
    B, V = 4000, 4
    ir = torch.zeros(V, B, run.cfg.out_dim)

    def cost(ef):
        teacher = clever.Output(None, [ir[:2], ef[:2]])
        return float(run.loss(clever.Output(None, [ir, ef]), teacher)["L_Turn"])

    angle = torch.rand(V, B, generator=torch.Generator().manual_seed(0)) * 180 - 90
    run.augment.angles = list(angle)
    turning = torch.stack([angle.deg2rad().cos(), angle.deg2rad().sin()], -1)  # (V, B, 2)
    assert cost(turning) == pytest.approx(0, abs=1e-6)
    assert cost(turning.flip(-1)) > 0.5  # turns the other way
    assert cost(torch.ones(V, B, 2)) == pytest.approx(1 - (2 / math.pi) ** 2, abs=0.02)


# Claim 12
@pytest.mark.parametrize("kind", [quarter.Quarter, quarter.Shuffled])
def test_quarter_turns_local_views_and_asks_ef_for_the_turn(kind):
    run = kind(tiny(aug="baug", ef_out_dim=4), 1)
    images = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8)
    upright = clever.MultiCrop(run.cfg)(images, torch.ones(16), 0)
    views = run.augment(images, torch.ones(16), 0)
    for view, (turned, before) in enumerate(zip(views, upright)):
        for i in range(16):
            k = 0 if view < 2 else i % 4
            assert torch.equal(turned[i], torch.rot90(before[i], k, (1, 2)))

    ir = torch.zeros(len(views), 16, run.cfg.out_dim)
    knows = F.one_hot(torch.arange(16) % 4, 4).float().expand(len(views), -1, -1)
    for ef, L, hit in ((knows, 0, 1), (0 * knows, math.log(4), 0.25)):
        terms = run.loss(clever.Output(None, [ir, ef]), clever.Output(None, [ir[:2], ef[:2]]))
        if kind is quarter.Quarter or hit < 1:
            assert float(terms["L_Quarter"]) == pytest.approx(L, abs=1e-3)
            assert float(terms["hit"]) == hit
        else:
            assert float(terms["L_Quarter"]) > 5  # its labels have nothing to do with the turns


# Claim 13
def test_a_run_starts_from_given_weights(labelled, monkeypatch):
    torch.manual_seed(1)  # unlike the run's own
    own = clever.build_backbone("vit_micro", 32).state_dict()
    bare = {f"backbone.{name}": value for name, value in own.items()}
    wrapped = {f"module.{name}": value for name, value in bare.items()}
    head = torch.zeros(10, 96)
    dino = dict(teacher={**wrapped, "module.head.mlp": head}, args=argparse.Namespace(lr=0.1))
    for content in (own, {**own, "head.weight": head}, dino, dict(teacher=bare)):
        torch.save(content, "weights.pt")
        run = clever.Training(tiny(init="weights.pt"), 1)
        for backbone in (run.student.backbone, run.teacher.backbone):
            close(dict(backbone.state_dict()), dict(own), 0)

    seen = spy(monkeypatch, "compare")
    clever.main(flags("run", data=labelled, epochs=1, init="weights.pt", method="dino"))
    close(dict(seen["initial"].state_dict()), dict(own), 0)
    assert not torch.equal(seen["trained"].pos_embed, own["pos_embed"])

    not_finite = torch.full((1, 17, 96), math.inf)
    for change, words in ((dict(odd=head), "does not fit"), (dict(pos_embed=not_finite), "finite")):
        torch.save({**own, **change}, "weights.pt")
        with pytest.raises(clever.UserError, match=words):
            clever.Training(tiny(init="weights.pt"), 1)
    for content in (head, [head], dict(net=own), dict(own, epoch=3)):
        torch.save(content, "weights.pt")
        with pytest.raises(clever.UserError, match="holds no named tensors"):
            clever.read_weights("weights.pt")


# ==================================================================================================
# Views
# ==================================================================================================


def texture(height, width, *sides):
    """A colour image with details of several sizes in [0, 1]: (1, 3, height, width)."""
    image = torch.zeros(1, 3, height, width)
    for side in sides:
        noise = torch.rand(1, 3, side, side)
        image += F.interpolate(noise, (height, width), mode="bicubic") / side**0.25
    return (image - image.min()) / (image.max() - image.min())


def psnr(a, b, radius=2.0):
    """Peak signal-to-noise ratio in dB of the pixels within `radius` half sides of the centre."""
    axis = torch.linspace(-1, 1, a.shape[-1])
    near = axis**2 + axis[:, None] ** 2 <= radius**2
    return -10 * math.log10((a - b)[..., near].square().mean() + 1e-20)


def warp(image, size, box=(0, 0, 1, 1), flip=False, angle=0.0, shift=None):
    """clever.warp of one image."""
    box = torch.tensor([box], dtype=image.dtype)
    return clever.warp(image, size, box, torch.tensor([flip]), torch.tensor([angle]), shift)


def crop_psnr(path, size, scale, move=0.0):
    """The mean PSNR of eight crops, moved by so many stored pixels, with torchvision's crops."""
    original = TF.pil_to_tensor(Image.open(path))
    _, H, W = original.shape
    stored, aspect = clever.decode(path, clever.stored_side(224))
    assert stored.shape == (3, 320, 320) and aspect == W / H

    values = []
    for _ in range(8):
        top, left, h, w = T.RandomResizedCrop.get_params(original, scale, (3 / 4, 4 / 3))
        box = ((2 * left + w) / W - 1 + 2 * move / 320, (2 * top + h) / H - 1, w / W, h / H)
        ours = warp(stored[None] / 255, size, box)
        theirs = TF.resized_crop(original, top, left, h, w, [size, size], BICUBIC, antialias=True)
        values.append(psnr(ours, theirs[None] / 255))
    return sum(values) / len(values)


# Claim 14
@pytest.mark.parametrize("size, scale", [(224, (0.4, 1.0)), (96, (0.05, 0.4))])
def test_crops_equal_torchvisions(monkeypatch, size, scale):
    path = "textured.png"
    TF.to_pil_image(texture(600, 800, 8, 16, 32, 64, 128, 256, 512)[0]).save(path)
    assert crop_psnr(path, size, scale) > 40.5
    assert crop_psnr(path, size, scale, move=0.5) < 40.5
    for name, wrong in (
        ("grid_sample", dict(mode="nearest")),
        ("grid_sample", dict(align_corners=True)),
        ("interpolate", dict(antialias=False)),
    ):
        function = getattr(F, name)
        with monkeypatch.context() as patch:
            patch.setattr(F, name, lambda *args, **options: function(*args, **{**options, **wrong}))
            assert crop_psnr(path, size, scale) < 40.5


# Claim 14
@pytest.mark.parametrize("scale", [(0.4, 1.0), (0.05, 0.4)])
@pytest.mark.parametrize("width, height", [(375, 500), (500, 375), (900, 100)])
def test_crop_boxes_are_distributed_as_torchvisions(scale, width, height):
    area = scale[0] + (scale[1] - scale[0]) * torch.rand(10_000, 10)
    shape = ((torch.rand(10_000, 10) * 2 - 1) * math.log(4 / 3)).exp()
    aspect = torch.full((10_000,), width / height)
    ours = clever.crop_box(area, shape, torch.rand(10_000, 2), aspect)
    assert (ours[:, :2].abs() + ours[:, 2:] <= 1 + 1e-6).all()

    image = torch.empty(3, height, width)
    boxes = [T.RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(5000)]
    top, left, h, w = torch.tensor(boxes).T
    theirs = [(2 * left + w) / width - 1, (2 * top + h) / height - 1, w / width, h / height]
    q = torch.linspace(0.01, 0.99, 99)
    for a, b in zip(ours.T, theirs):
        assert (a.quantile(q) - b.quantile(q)).abs().max() < 0.06


# Claim 15
@pytest.mark.parametrize("size", [224, 96, 64])
def test_the_warp_equals_torchvisions(monkeypatch, size):
    image = texture(size, size, 12)
    white = torch.ones(1, 3, size, size)
    close(warp(image.double(), size, flip=True), image.double().flip(-1))
    close(warp(white, size, angle=12.5), TF.rotate(white, 12.5, NEAREST), 1e-5)
    assert psnr(warp(image, size, angle=-37.0), TF.rotate(image, -37.0, BILINEAR), 0.95) > 90

    alpha = 100 * size / 224
    sigma = 5 * size / 224
    torch.manual_seed(0)
    shift = T.ElasticTransform.get_params([alpha] * 2, [sigma] * 2, [size, size])
    torch.manual_seed(0)
    close(clever.elastic_shift(torch.rand(1, 2, size, size) * 2 - 1, alpha, sigma), shift, 1e-5)
    close(warp(white, size, shift=shift), TF.elastic_transform(white, shift, NEAREST), 1e-5)

    image = texture(320, 320, 12)
    box = (0.1, -0.2, 0.7, 0.6)
    theirs = TF.rotate(TF.hflip(warp(image, size, box)), 33.0, BILINEAR)
    theirs = TF.elastic_transform(theirs, shift, BILINEAR)
    assert psnr(warp(image, size, box, True, 33.0, shift), theirs, 0.85) > 36

    calls = []
    sample = F.grid_sample
    monkeypatch.setattr(F, "grid_sample", lambda *a, **o: calls.append(1) or sample(*a, **o))
    warp(image, size, box, True, 33.0, shift)
    assert len(calls) == 1


# Claim 15
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 0, 3, 1), (3, 1, 0, 2)])
def test_colours_and_blur_equal_torchvisions(order):
    images = torch.rand(8, 3, 64, 64)
    factors = torch.rand(4, 8) * 0.8 + 0.6
    factors[3] = torch.rand(8) * 0.2 - 0.1
    sigma = factors[0]
    operations = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    ours = clever.color_jitter(images, factors, order)
    matrix = clever.gaussian_matrix(64, sigma, 6)[:, None]
    blurred = matrix @ images @ matrix.mT
    for i, x in enumerate(images):
        close(blurred[i], TF.gaussian_blur(x, [13, 13], [float(sigma[i])] * 2), 1e-5)
        for k in order:
            x = operations[k](x, float(factors[k, i]))
        close(ours[i], x, 1e-4)


# Claims 16 and 38
def test_colour_operations_come_in_every_order(monkeypatch):
    seen = spy(monkeypatch, "color_jitter")
    crop = clever.MultiCrop(tiny(local_views=0))
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    one = torch.ones(1)
    training, testing = set(), set()
    for step in range(300):
        crop(images, one, step)
        training.add(tuple(seen["order"]))
        eval_linear.make_view(images, one, 32, clever.generator("cpu", step), jitter=True)
        testing.add(tuple(seen["order"]))
    assert len(training) == len(testing) == 24


def draws_of(monkeypatch, view, aug, count=10_000):
    """The arguments with which MultiCrop makes a view of grey-red images, and the view."""
    images = torch.tensor([0.9, 0.7, 0.6]).view(1, 3, 1, 1).expand(count, 3, 1, 1)
    with monkeypatch.context() as patch:
        drawn = spy(patch, "crop_box", "warp", "color_jitter", "gaussian_matrix")
        crop = clever.MultiCrop(tiny(aug=aug, global_size=8, local_size=8))
        gen = clever.generator("cpu", 0)
        drawn["view"] = crop.make_view(images, torch.ones(count), 0, view, gen, random.Random(0))
    return drawn  # of gaussian_matrix, the last call: the blur


# Claim 16
@pytest.mark.parametrize("view, aug", [(0, "baug"), (1, "caug"), (2, "caug+"), (9, "caug")])
def test_distribution_of_every_random_parameter(monkeypatch, view, aug):
    drawn = draws_of(monkeypatch, view, aug)
    scale = (0.4, 1.0) if view < 2 else (0.05, 0.4)
    uniform(drawn["area"], *scale)
    uniform(drawn["shape"].log(), math.log(3 / 4), math.log(4 / 3))
    uniform(drawn["place"], 0, 1)
    happens(drawn["flip"], 0.5)
    if aug == "baug":
        assert not drawn["angle"].any()
    else:
        uniform(drawn["angle"], -90, 90)
    if aug == "caug+":
        happens(drawn["shift"].flatten(1).any(1), 0.5)
    else:
        assert drawn["shift"] is None

    *strengths, hue = drawn["factors"]  # of brightness, contrast, saturation
    jittered = hue != 0
    happens(jittered, 0.8)
    uniform(hue[jittered], -0.1, 0.1)
    for factor, spread in zip(strengths, (0.4, 0.4, 0.2)):
        uniform(factor[jittered], 1 - spread, 1 + spread)
        assert (factor[~jittered] == 1).all()
    blurred = drawn["sigma"] != 1e-3
    happens(blurred, {0: 1.0, 1: 0.1}.get(view, 0.5))
    uniform(drawn["sigma"][blurred] * 224 / 8, 0.1, 2.0)  # in pixels of a global view of 224

    before = drawn["color_jitter"][:, :, 3, 3]  # a pixel near the middle
    after = drawn["view"][:, :, 3, 3] * torch.tensor(clever.STD) + torch.tensor(clever.MEAN)
    luma = torch.tensor([0.2989, 0.587, 0.114])
    happens(after.amax(1) - after.amin(1) < 1e-3, 0.2)  # grey
    happens((after @ luma - before @ luma).abs() > 1e-3, 0.2 if view == 1 else 0)  # solarised


# Claim 16
def test_elastic_noise_changes_no_other_draw(monkeypatch):
    caug = draws_of(monkeypatch, 2, "caug", count=50)
    elastic = draws_of(monkeypatch, 2, "caug+", count=50)
    for name in ("area", "shape", "place", "flip", "angle", "factors", "order", "sigma"):
        close(elastic[name], caug[name], 0)


# ==================================================================================================
# Images
# ==================================================================================================


# Claim 17
def test_which_files_are_images(tmp_path):
    folder = labelled_pictures(tmp_path / "data", train=2, val=1)
    link = pictures(tmp_path / "elsewhere", 3)
    for part in ("train", "val"):
        (folder / part / "c").symlink_to(link)
        (folder / part / "a" / "up").symlink_to("..")
        (folder / part / ".checkpoints").mkdir()
    train = folder / "train"
    jpeg = (link / "00.jpg").read_bytes()
    for name in (".checkpoints/0.jpg", "a/.0.jpg", "a/.cache/0.jpg", "a/notes.txt", "b/x.JPEG"):
        (train / name).parent.mkdir(exist_ok=True)
        (train / name).write_bytes(jpeg)
    (train / "b" / "deep").mkdir()
    for suffix in (".gif", ".jfif", ".jpe", ".webp", ".tif", ".PNG", ".bmp"):
        Image.new("RGB", (9, 9)).save(train / "b" / "deep" / f"0{suffix}")

    data, val = clever.load_images(str(folder), 32)
    assert data.classes == ["a", "b", "c"] and val.classes == data.classes
    assert data.labels.bincount().tolist() == [2, 10, 3]
    assert data.ignored == 1  # a/notes.txt; hidden files do not count


# Claim 18
def test_wrong_folders_are_refused(tmp_path, monkeypatch):
    folder = labelled_pictures(tmp_path / "data", train=1, val=1)
    (tmp_path / "empty").mkdir()

    def refused(words, data=folder):
        with pytest.raises(clever.UserError, match=re.escape(words)):
            clever.load_images(str(data), 32)

    refused("no images", tmp_path / "empty")
    refused("cannot list", tmp_path / "nowhere")
    stray = shutil.copy(folder / "train" / "a" / "00.jpg", folder / "val")
    refused("expected only folders")
    Path(stray).unlink()
    (folder / "val" / "b").rename(folder / "val" / "z")
    refused("['b', 'z']")
    (folder / "val").rename(folder / "valid")
    refused("no val/")

    def scandir(path, real=os.scandir):
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    refused("b: Permission denied", folder / "train")


# Claim 19
def test_images_of_every_mode_are_read_in_their_colours():
    orange = (200, 90, 40)
    grey = (117, 117, 117)
    rgb = Image.new("RGB", (60, 40), orange)
    deep = Image.new("I;16", (60, 40), 117 * 256)
    big_endian = Image.frombytes("I;16B", (60, 40), bytes([117, 0]) * 60 * 40)
    for name, image, colour in [
        ("cmyk.jpg", rgb.convert("CMYK"), orange),
        ("palette.png", rgb.quantize(4), orange),
        ("grey.jpg", rgb.convert("L"), grey),
        ("grey alpha.png", rgb.convert("LA"), grey),
        ("alpha.png", Image.new("RGBA", (60, 40), (*orange, 0)), orange),
        ("größe.jpg", rgb, orange),
        ("one bit.png", Image.new("1", (60, 40), 1), (255, 255, 255)),
        ("16 bits.png", deep, grey),
        ("16 bits.tif", deep, grey),
        ("16 bits.pgm", deep, grey),
        ("big endian.tif", big_endian, grey),
        ("narrow.png", rgb.resize((1, 500)), orange),
    ]:
        image.save(name)
        pixels, aspect = clever.decode(name, 32)
        assert pixels.dtype == torch.uint8 and aspect == image.width / image.height
        expected = torch.tensor(colour).view(3, 1, 1).expand(3, 32, 32)
        close(pixels.double(), expected.double(), 6)

    # In a TIFF with photometric interpretation 0, white is zero.
    tiff = Path("16 bits.tif").read_bytes()
    entry = struct.pack("<HHI", 262, 3, 1)
    assert tiff.count(entry + b"\1\0") == 1
    Path("white.tif").write_bytes(tiff.replace(entry + b"\1\0", entry + b"\0\0"))
    assert clever.decode("white.tif", 32)[0].unique() == 255 - 117


# Claim 19
def test_images_are_turned_as_their_exif_asks():
    halves = Image.new("L", (60, 40), 255)
    halves.paste(0, (0, 0, 30, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: the dark left half becomes the upper one
    halves.save("turned.jpg", exif=exif)
    pixels, aspect = clever.decode("turned.jpg", 32)
    assert aspect == 40 / 60
    assert pixels[:, :15].max() < 10 and pixels[:, 17:].min() > 245

    # The same with an image width of "abc" is still an image.
    jpeg = io.BytesIO()
    halves.save(jpeg, "JPEG")
    tags = struct.pack("<HHHIIHHI4s", 2, 0x0112, 3, 1, 6, 0x0100, 2, 4, b"abc")
    exif = b"Exif\0\0II*\0\x08\0\0\0" + tags + bytes(4)
    segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    Path("bad.jpg").write_bytes(jpeg.getvalue()[:2] + segment + jpeg.getvalue()[2:])
    pixels, aspect = clever.decode("bad.jpg", 32)
    assert pixels.double().mean() == pytest.approx(127, abs=10)


# Claim 20
def test_broken_images_are_replaced_in_training_and_left_out_otherwise(tmp_path, capsys):
    folder = labelled_pictures(tmp_path / "data", train=4)
    a = folder / "train" / "a"
    (a / "01.jpg").write_bytes((a / "01.jpg").read_bytes()[:300])
    (a / "02.jpg").unlink()
    (a / "02.jpg").symlink_to("nowhere")
    Image.new("F", (40, 40), 0.5).save(a / "03.tif")
    (a / "03.jpg").unlink()
    data, _ = clever.load_images(str(folder), 32)
    names = [Path(path).name for path in data.images]
    assert names == ["00.jpg", "01.jpg", "02.jpg", "03.tif", *names[4:]]

    for workers in (0, 1):
        everything = [[0, 1, 2], [3], [4, 7]]
        streams = {}
        for replace in (True, False):
            streams[replace] = []
            for pixels, aspect, index in data.stream(everything, CPU, workers, replace):
                assert pixels.shape == (len(index), 3, 32, 32) and len(aspect) == len(index)
                bright = pixels[:, 0].double().mean((1, 2)) > 128  # class b
                assert torch.equal(bright.long(), data.labels[index])
                streams[replace].append(index.tolist())
        assert streams == {True: [[0, 4, 4], [4], [4, 7]], False: [[0], [4, 7]]}

    clever.decode(str(a / "00.jpg"), 32)
    err = capsys.readouterr().err
    for name in names[1:4]:
        assert re.search(rf"warning: \S+/{name} cannot be read \(\S", err)

    many = clever.Images(32, ["none.jpg"] * 1100 + [str(a / "00.jpg")], [0] * 1101, ["a"])
    [(_, _, index)] = many.stream([[0]], CPU, 0, replace=True)
    assert index.tolist() == [1100]
    none = clever.Images(32, ["none.jpg"] * 3, [0] * 3, ["a"])
    with pytest.raises(clever.UserError, match="no image can be read"):
        list(none.stream([[0]], CPU, 0, replace=True))


# ==================================================================================================
# Runs
# ==================================================================================================


def in_fewer_patterns():
    clever.LOG_EVERY = 1
    draw_patterns = clever.draw_patterns
    clever.draw_patterns = lambda count, seed: draw_patterns(count // 32, seed)


# Claim 21
def test_the_demo(tmp_path):
    process = start(["--epochs", "2"], tmp_path, in_fewer_patterns, WORLD_SIZE="2")
    assert finish(process) == [0]
    output = (tmp_path / "output").read_text()
    (run,) = (tmp_path / "runs").iterdir()
    for words in (
        "clever, vit_micro (0.5M parameters), caug, 1 x cpu",
        "patterns: 128 images in 10 classes; 0 other files ignored",
        "2 epochs x 2 steps x 64 images, from step 0",
        "writes to runs/patterns-clever-caug",
        "warning: only 4 steps",
    ):
        assert words in output.split("epoch 1.00")[0]
    assert output.count("\nepoch ") == 2
    for words in ("k-NN, upright", "k-NN, rotated", "R2 of the angle"):
        assert f"| {words}" in output
    assert f"\nNext: python eval_linear.py runs/{run.name} --quick\n" in output

    files = "config.json log.jsonl crops.png checkpoint.pt backbone.pt compare.json"
    assert {path.name for path in run.iterdir()} == set(files.split())
    always = {"step", "epoch", "loss", "L_CL", "L_Orth", "L_PReg", "lr", "images_per_second"}
    names = ("entropy", "own", "other_view", "other_image", "kl_uniform", "std", "rank")
    metrics = {f"{part}_{name}" for part in ("IR", "EF") for name in names}
    lines = read_log(run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [set(line) for line in lines] == [always, always | metrics] * 2


# Claim 21
def test_a_run_has_enough_steps(capsys):
    for count in (24, 1600):
        run, _ = clever.start(tiny(out=f"run{count}", epochs=0), patterns(count), CPU)
        epochs = max(20, math.ceil(1000 * 8 / count))
        assert (run.cfg.epochs, run.steps) == (epochs, epochs * count // 8)
    assert clever.load_config("run24").epochs == 334
    assert "warning" not in capsys.readouterr().out
    again = clever.parse("--out run24 --resume --recipe auto --epochs 0".split())
    assert (again.recipe, again.epochs) == (clever.load_config("run24").recipe, 334)


# Claims 21 and 22
def test_clever_runs_without_the_other_files(photos, tmp_path):
    shutil.copy(HERE / "clever.py", tmp_path)
    shutil.copytree(photos, "photos")
    Path("photos/notes.txt").touch()

    def run(*words):
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [sys.executable, "clever.py", *words]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    code, out, _ = run("--help")
    assert code == 0 and "--lambda-orth" in out
    code, out, err = run(*flags("run", data="photos", epochs=1))
    assert code == 0, err
    assert "24 images without labels; 1 other files ignored" in out
    assert "Next, the features of your images: python eval_linear.py run --features photos" in out
    sentence = "clever.py: cannot list nowhere: No such file or directory\n"
    assert run("--data", "nowhere") == (1, "", sentence)


WRONG = [
    ("--ratio 1.5", "between 0 and 1"),
    ("--method dyno", "invalid choice: 'dyno'"),
    ("--locl-views 3", "unrecognized arguments"),
    ("--epochs ten", "invalid int value: 'ten'"),
    ("--lr -1", "--lr must be a number, 0 or greater"),
    ("--lambda-reg nan", "--lambda-reg must be a number"),
    ("--weight-decay inf 0.4", "--weight-decay must be a number"),
    ("--batch 25", "between 1 and 24"),
    ("--arch resnet81", "--arch resnet81 is unknown"),
    ("--init nowhere.pt", "nowhere.pt is not a file"),
    ("--data nowhere", "cannot list nowhere"),
    ("--out BASE", "holds a run; use --resume or another --out"),
    ("--resume --out BASE --ratio 0.5", "--ratio is 0.8 in this run"),
    ("--resume", "--resume needs --out, the folder of the run"),
    ("--resume --out new", "is not a run folder"),
]


# Claim 22
@pytest.mark.parametrize("words, expected", WRONG)
def test_wrong_commands_create_nothing(base, photos, tmp_path, capsys, words, expected):
    words = words.replace("BASE", str(base)).split()
    if "--resume" not in words:
        words = flags("new", data=photos) + words
    files = files_of(tmp_path, base, photos)
    with pytest.raises((clever.UserError, SystemExit)) as caught:
        clever.main(words)
    assert expected in str(caught.value) + capsys.readouterr().err
    assert files_of(tmp_path, base, photos) == files


def die_soon(*_):
    """An action: this process dies at a random moment."""
    signal.setitimer(signal.ITIMER_REAL, random.SystemRandom().uniform(0.001, 0.05))


def terminate_all(*_):
    """An action: this process and its workers receive SIGTERM from another one, a scheduler."""
    pids = [process.pid for process in multiprocessing.active_children()]
    subprocess.run(["kill", *map(str, [*pids, os.getpid()])])


def spoil(name, run, *_):
    """An action: a parameter of the student is not finite."""
    run.student.get_parameter(name).data.fill_(math.nan)


# Claims 23, 24 and 28
@pytest.mark.parametrize(
    "function, number, action, code, step, words",
    [
        ("clever.train_step", 1, partial(send, [KILL]), -9, 0, ""),
        ("clever.train_step", 3, die_soon, -14, None, ""),
        ("os.replace", 4, partial(send, [KILL]), -9, 1, ""),  # between backbone and checkpoint
        ("clever.train_step", 5, partial(send, [TERM]), 143, 5, "stopped at step 5; continue"),
        ("clever.train_step", 5, partial(send, [TERM, TERM]), 143, 5, "stopped at step 5"),
        ("clever.train_step", 5, partial(send, [INT]), 130, 5, "stopped at step 5; continue"),
        ("clever.train_step", 5, partial(send, [INT, INT]), 1, 4, "KeyboardInterrupt"),
        ("clever.train_step", 5, terminate_all, 143, 5, "stopped at step 5; continue"),
        ("torch.save", 4, partial(fail, OSError("disk full")), 1, 1, "disk full"),
        (
            "clever.train_step",
            5,
            partial(spoil, "heads.1.mlp.0.bias"),
            1,
            4,
            "not finite at step 5",
        ),
        ("clever.save", 5, partial(spoil, "backbone.norm.bias"), 1, 4, "a weight is not finite at"),
    ],
)
def test_a_run_with_a_fault_resumes_to_the_same_bits(
    base, photos, tmp_path, function, number, action, code, step, words
):
    command = flags("run", "--resume", data=photos, workers=int(action == terminate_all))
    fault = partial(before, function, number, action, LOG_EVERY=1, SAVE_EVERY=0)
    assert finish(start(command, tmp_path, fault)) == [code]
    assert words in (tmp_path / "output").read_text()
    run = tmp_path / "run"
    saved = checkpoint(run)["step"] if (run / "checkpoint.pt").exists() else 0
    assert step in (saved, None)

    clever.main(command)
    ours, theirs = checkpoint(run), checkpoint(base)
    assert ours.pop("digest") == theirs.pop("digest")
    close(ours, theirs, 0)
    close(torch.load(run / "backbone.pt"), torch.load(base / "backbone.pt"), 0)
    assert {line["step"] for line in read_log(run)} >= {3, 6, 9, 12}


def on_rank_1(action, *_):
    if os.environ["RANK"] == "1":
        action()


# Claim 26
@pytest.mark.parametrize(
    "action, code, words",
    [
        (partial(send, [TERM]), 143, "stopped at step 3; continue with"),
        (partial(send, [KILL]), -9, ""),
        (partial(fail, ValueError("a bug")), 1, "ValueError: a bug"),
    ],
)
def test_one_of_two_processes_is_stopped_or_dies(photos, tmp_path, action, code, words):
    fault = partial(before, "clever.epoch_metrics", 1, partial(on_rank_1, action))
    command = flags("run", data=photos, epochs=1000)
    codes = finish(*[start(command, tmp_path, fault, **env) for env in two_processes()])
    assert codes[1] == code and codes[0] not in (0, None)
    assert words in (tmp_path / "output").read_text()
    assert (tmp_path / "run" / "checkpoint.pt").exists() == (code == 143)


def stop_workers(*_):
    """An action: the workers of the loader hang. Their ids are written to a file."""
    pids = [process.pid for process in multiprocessing.active_children()]
    Path("pids").write_text(json.dumps(pids))
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)


# Claim 27
def test_workers_that_hang_end_the_run(photos, tmp_path):
    fault = partial(before, "clever.train_step", 2, stop_workers, LOADER_TIMEOUT=10)
    command = flags("run", data=photos, workers=1)
    assert finish(start(command, tmp_path, fault)) == [1]
    assert "Timeout (0:00:10)" in (tmp_path / "output").read_text()
    for pid in json.loads(Path("pids").read_text()):
        os.kill(pid, KILL)


# Claim 25
@pytest.mark.parametrize(
    "action, error",
    [
        (partial(send, []), None),
        (partial(fail, ValueError()), ValueError),
        (partial(send, [TERM]), SystemExit),
        (partial(send, [INT, INT]), KeyboardInterrupt),
    ],
)
def test_signal_handlers_are_put_back(monkeypatch, action, error):
    previous = [signal.getsignal(number) for number in (TERM, INT)]
    monkeypatch.setattr(clever, "train_step", clever.train_step)  # undoes `before`
    before("clever.train_step", 2, action)
    with pytest.raises(error) if error else contextlib.nullcontext():
        clever.train(tiny(out="run", epochs=1), patterns(24), CPU)
    assert [signal.getsignal(number) for number in (TERM, INT)] == previous


# Claim 25
def test_training_works_in_a_thread():
    with concurrent.futures.ThreadPoolExecutor() as pool:
        run, out = pool.submit(clever.train, tiny(out="run", epochs=1), patterns(24), CPU).result()
    assert run.step == 3 and (out / "backbone.pt").exists()


# Claim 29
def test_a_run_continues_with_data_that_moved(base, photos, tmp_path, monkeypatch):
    shutil.copytree(base, "run")
    moved = shutil.copytree(photos, tmp_path / "moved")
    resume = ["--out", "run", "--resume", "--data", str(moved)]
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", partial(fail, OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            clever.main(resume)
    assert clever.load_config("run").data == str(photos)  # config.json is never half written
    clever.main(resume)
    assert clever.load_config("run").data == str(moved)

    other = shutil.copytree(photos, tmp_path / "other")
    (other / "trip" / "00.jpg").rename(other / "trip" / "99.jpg")
    with pytest.raises(clever.UserError, match="holds other files than when run was started"):
        clever.main([*resume[:-1], str(other)])
    assert clever.load_config("run").data == str(moved)
    clever.main(["--out", "run", "--resume"])

    pixels = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)  # in memory, such as both CIFARs
    ten, hundred = [clever.Images(32, pixels, [0, 1], ["a", name]) for name in "bc"]
    assert ten.digest() != hundred.digest()


class Payload:
    """An object that creates a folder when pickle reads it."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


# Claims 22 and 30
def test_no_code_in_a_file_is_run_and_no_checkpoint_is_replaced(base):
    run = Path(shutil.copytree(base, "run"))
    torch.save({**checkpoint(base), "more": Payload()}, run / "checkpoint.pt")
    with pytest.raises(Exception, match="mkdir"):
        clever.main(["--out", "run", "--resume"])
    with pytest.raises(clever.UserError, match="not a file of tensors"):
        clever.read_weights(run / "checkpoint.pt")
    assert not Path("executed").exists()

    (run / "checkpoint.pt").unlink()
    with pytest.raises(clever.UserError, match="run has no checkpoint.pt"):
        clever.main(["--out", "run", "--resume"])


# ==================================================================================================
# Collapse and what was learned
# ==================================================================================================


def outputs(case="healthy"):
    """Features (2, 128, 32), P and Q (2, 128, 64), healthy but for the case."""
    features = normal(2, 128, 32)
    of_image = 2 * normal(128, 64, seed=1)
    of_view = 2 * normal(2, 128, 64, seed=2)
    if case == "ignores the image":
        of_image = 0 * of_image
        of_view = of_view[:, :1].expand(2, 128, 64)
    teacher = of_image + of_view
    if case == "constant features":
        features = normal(32, seed=4) + 1e-4 * features
    if case == "uniform teacher":
        teacher = 1e-3 * teacher
    if case == "one prototype":
        teacher = teacher + 50 * torch.eye(1, 64)
    student = teacher + normal(2, 128, 64, seed=3)
    if case == "constant student":
        student = normal(64, seed=6).expand(2, 128, 64)
    return features, teacher.softmax(-1), student.softmax(-1)


# Claim 31
@pytest.mark.parametrize(
    "case, ir, ef",
    [
        ("healthy", "", ""),
        ("constant features", "IR: all images have", "EF: all images have"),
        ("uniform teacher", "IR: uniform", "EF IS TRIVIAL"),
        ("one prototype", "IR: one prototype", "EF IS TRIVIAL"),
        ("constant student", "IR: its output ignores", "EF IS TRIVIAL"),
        ("ignores the image", "IR: its output ignores", ""),
    ],
)
def test_each_alarm_is_raised_by_its_collapse_only(case, ir, ef):
    metrics = clever.collapse_metrics(*outputs(case))
    for part, words in (("IR", ir), ("EF", ef)):
        alarm = clever.collapse_alarm(part, metrics, 64)
        assert words in alarm and bool(alarm) == bool(words)


# Claim 31
def test_alarms_are_printed_once(monkeypatch, capsys):
    monkeypatch.setattr(clever, "collapse_alarm", lambda part, *_: f"{part} rings")
    run = clever.Training(tiny(epochs=2), 1)
    run.watched = {"IR"}
    for step in range(2):
        views = [torch.randn(8, 3, side, side) for side in (32, 32, 16)]
        clever.train_step(run, views, step)
        clever.epoch_metrics(run)
    assert capsys.readouterr().out == "IR rings\n"


# Claim 32
def test_collapse_metrics_equal_naive_ones():
    x, P, Q = outputs()
    metrics = clever.collapse_metrics(x, P, Q)
    x = x.flatten(0, 1)
    mean = P.mean((0, 1))
    share = torch.linalg.eigvalsh(x.T @ x).sqrt()
    share = share / share.sum()
    close(metrics["rank"], math.exp(-(share * share.log()).sum()), 1e-4)
    close(metrics["std"], float((x / x.norm(dim=1, keepdim=True)).std(0).mean() * 32**0.5))
    close(metrics["entropy"], float(-(P * P.log()).sum(-1).mean()))
    close(metrics["kl_uniform"], float((mean * (mean * 64).log()).sum()))
    for name, view, image in (("own", 0, 0), ("other_view", 1, 0), ("other_image", 0, 1)):
        cosines = []
        for g, b in itertools.product(range(2), range(128)):
            cosines.append(F.cosine_similarity(P[g, b], Q[g - view, b - image], 0))
        close(metrics[name], float(torch.stack(cosines).mean()))

    metrics = clever.collapse_metrics(*[x[:, :7] for x in outputs()])
    assert set(metrics) == {"entropy", "own", "other_view"}
    assert clever.collapse_alarm("IR", metrics, 64) == ""


# Claim 33
def test_knn_equals_a_naive_one():
    bank = normal(60, 5)
    queries = normal(9, 5, seed=1)
    labels = torch.arange(60) % 3
    for query, votes in zip(queries, clever.knn(bank, labels, queries, 3, k=7)):
        cosine = [float(query @ row / query.norm() / row.norm()) for row in bank]
        naive = [0.0, 0.0, 0.0]
        for n in sorted(range(60), key=lambda n: -cosine[n])[:7]:
            naive[labels[n]] += math.exp((cosine[n] - 1) / 0.07)
        close(votes, torch.tensor(naive).double(), 1e-6)


# Claim 33
def test_a_tied_vote_is_no_hit():
    votes = torch.tensor([[3.0, 1, 2], [2, 2, 0], [0, 0, 0], [math.nan, 1, 2]])
    assert clever.accuracy(votes, torch.tensor([0, 0, 0, 0])) == 25
    assert clever.accuracy(votes, torch.tensor([2, 1, 2, 1]), k=2) == 50


# Claim 33
def test_the_r2_of_the_angle_equals_a_naive_one():
    x, x_test = normal(60, 5), normal(40, 5, seed=2)
    angle, angle_test = 50 * normal(60), 50 * normal(40, seed=3)
    y = torch.stack([angle.deg2rad().cos(), angle.deg2rad().sin()], 1)
    y_test = torch.stack([angle_test.deg2rad().cos(), angle_test.deg2rad().sin()], 1)

    a = (x - x.mean(0)) / (x.std(0) + 1e-4)
    b = (x_test - x.mean(0)) / (x.std(0) + 1e-4)
    w = torch.linalg.inv(a.T @ a + 60 * 0.01 * torch.eye(5)) @ a.T @ (y - y.mean(0))
    error = y_test - y.mean(0) - b @ w
    r2 = 1 - error.pow(2).sum(0) / (y_test - y_test.mean(0)).pow(2).sum(0)
    ours = clever.ridge_r2(x, angle, x_test, angle_test)
    assert ours == pytest.approx(float(r2.mean()), abs=1e-9)


def halves(count):
    """Images with a bright half: below, on the right, above or on the left (labels 0 to 3)."""
    pixels = torch.full((count, 3, 32, 32), 30, dtype=torch.uint8)
    labels = torch.arange(count) % 4
    for x, label in zip(pixels, labels):
        x[:, 16:] = 200
        x.copy_(torch.rot90(x, int(label), (1, 2)))
    return clever.Images(32, pixels, labels, list("0123"))


# Claim 34
def test_the_comparison_says_which_is_which(capsys):
    quarters = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())  # D = 12
    blind = nn.Sequential(quarters, nn.Threshold(9, 1.0))
    results = clever.compare(tiny(), halves(400), halves(200), CPU, blind, quarters)
    assert set(results["after"]["R2 of the angle"]) == {"all", "IR", "EF", "random"}
    assert results["before"]["k-NN, upright"]["all"] <= 25
    assert results["after"]["k-NN, upright"]["all"] == 100
    assert results["after"]["k-NN, rotated"]["all"] < 80
    assert "-> 100." in capsys.readouterr().out


# Claim 34
def test_corners_do_not_give_the_angle_away(monkeypatch):
    greys = torch.randint(100, 256, (1500, 1, 1, 1), dtype=torch.uint8).expand(-1, 3, 32, 32)
    data = clever.Images(32, greys[:1000], torch.zeros(1000).long(), ["grey"])
    val = clever.Images(32, greys[1000:], torch.zeros(500).long(), ["grey"])
    eye = nn.Sequential(nn.AdaptiveAvgPool2d(8), nn.Flatten())
    r2 = clever.probe(eye, tiny(method="dino"), data, val, CPU)["R2 of the angle"]["all"]
    assert abs(r2) < 0.03

    white = clever.Images(32, torch.full_like(data.images, 255), data.labels, ["white"])
    vit = clever.build_backbone("vit_micro", 32)
    r2 = clever.probe(vit, tiny(method="dino"), white, white, CPU)["R2 of the angle"]["all"]
    assert abs(r2) < 0.03  # rounding tells nothing

    monkeypatch.setattr(clever, "disc", lambda size, device: torch.ones(size, size))
    r2 = clever.probe(eye, tiny(method="dino"), data, val, CPU)["R2 of the angle"]["all"]
    assert r2 > 0.06


# ==================================================================================================
# Evaluation
# ==================================================================================================


def untrained(folder, data="patterns", **options):
    """A run as clever.py leaves it, with an untrained backbone."""
    cfg = tiny(data=str(data), out=str(folder), **options)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(vars(cfg)))
    torch.save(clever.CLeVER(cfg).backbone.state_dict(), folder / "backbone.pt")
    return folder


def evaluate(*words):
    """Run eval_linear.py in this process. Returns the section that it writes."""
    words = [str(word) for word in words]
    eval_linear.main(words)
    args = eval_linear.parse(words)
    sections = json.loads(Path(args.out or args.run, "eval.json").read_text())
    return list(sections.values())[-1]


def planted(count, seed):
    """20 features, the first 16 (IR) of the class, the others (EF) of the angle; angles; labels."""
    labels = torch.arange(count) % 4
    angle = normal(count, seed=seed).erf().float() * 90
    ir = 3 * F.one_hot(labels, 16) + 0.5 * normal(count, 16, seed=seed)
    circle = torch.stack([angle.deg2rad().cos(), angle.deg2rad().sin()], 1)
    ef = circle.repeat(1, 2) + 0.1 * normal(count, 4, seed=seed)
    return torch.cat([ir, ef], 1).float(), angle, labels


def probes_of(z, labels, *words):
    """Linear probes of planted features, {part: (learning rate, head)}, and each part's columns."""
    columns = clever.part_columns(20, 0.8)
    model = argparse.Namespace(
        device=CPU, cfg=tiny(), linear_columns=columns, requires_grad_=lambda wanted: None
    )
    pixels = torch.zeros(len(labels), 3, 8, 8, dtype=torch.uint8)
    data = clever.Images(8, pixels, labels, list("0123"))
    args = eval_linear.parse(["RUN", "--quick", *words])
    return eval_linear.train_probes(args, model, data, z), columns


# Claim 35
def test_planted_class_and_angle_are_found():
    z, angle, labels = planted(1000, seed=0)
    z_test, angle_test, truth = planted(500, seed=1)
    probes, columns = probes_of(z, labels, "--epochs", "10")
    linear, knn, r2 = {}, {}, {}
    for part, dims in columns.items():
        _, head = probes[part]
        votes = clever.knn(z[:, dims], labels, z_test[:, dims], 4)
        linear[part] = clever.accuracy(head(z_test[:, dims]), truth)
        knn[part] = clever.accuracy(votes, truth)
        r2[part] = clever.ridge_r2(z[:, dims], angle, z_test[:, dims], angle_test)

    assert min(linear["all"], linear["IR"], knn["all"], knn["IR"]) > 95
    assert max(linear["EF"], knn["EF"]) < 33
    assert min(r2["all"], r2["EF"]) > 0.9
    assert abs(r2["IR"]) < 0.1


def probe_alone(z, labels, rows, rate, gen):
    """A linear probe trained on rows of z at one learning rate, 16 images a step for two epochs."""
    head = nn.Linear(z.shape[1], 4).double()
    head.weight.data = (0.01 * torch.randn(4, z.shape[1], generator=gen)).double()
    head.bias.data.zero_()
    optimizer = torch.optim.SGD(head.parameters(), momentum=0.9)
    for step, share in enumerate(clever.batches(len(rows), clever.Config(batch=16), 0, 10)):
        cosine = (1 + math.cos(math.pi * step / 10)) / 2
        optimizer.param_groups[0]["lr"] = rate * 16 / 256 * cosine
        optimizer.zero_grad()
        F.cross_entropy(head(z[rows[share]]), labels[rows[share]]).backward()
        optimizer.step()
    return head


# Claim 36
def test_probes_side_by_side_equal_probes_one_by_one():
    z, _, labels = planted(96, seed=0)
    z = z + 4 * normal(96, 20, seed=5).float()  # hard: training rows would choose another rate
    rates = [0.01, 0.1, 1.0, 3.0]
    words = ["--epochs", "2", "--batch", "16", "--lr", *map(str, rates)]
    probes, columns = probes_of(z, labels, *words)

    order = torch.randperm(96, generator=clever.generator("cpu", 0, "held out"))
    held, rows = order[:10], order[10:]
    gen = clever.generator("cpu", 0, "head")
    for part, dims in columns.items():
        candidates = []
        for rate in rates:
            head = probe_alone(z[:, dims].double(), labels, rows, rate, gen)
            scores = head(z[held][:, dims].double())
            hits = int((scores.argmax(1) == labels[held]).sum())
            loss = F.cross_entropy(scores, labels[held]).item()
            candidates.append((hits, -loss, rate, head))
        *_, best_rate, best_head = max(candidates, key=lambda candidate: candidate[:2])
        rate, head = probes[part]
        assert rate == best_rate
        close(list(head.double().parameters()), list(best_head.parameters()), 1e-4)


# Claim 37
def test_what_the_probes_see():
    net = clever.build_backbone("vit_micro", 32)
    model = eval_linear.Representation(net, tiny(), CPU)
    x = torch.randn(2, 3, 32, 32)
    features = model(x)
    ir, ef = clever.split(net(x), 0.8)
    for columns in (model.knn_columns, model.linear_columns):
        close(features[:, columns["IR"]], ir)
        close(features[:, columns["EF"]], ef)
        assert len(columns["random"]) == len(columns["EF"])
    close(features[:, model.knn_columns["all"]], net(x))

    tokens = [layer[:, 0] for layer in net.get_intermediate_layers(x, 4)]
    close(features[:, model.linear_columns["all"]], torch.cat(tokens, 1))
    resnet = clever.build_backbone("resnet18", 32)
    model = eval_linear.Representation(resnet, tiny(arch="resnet18"), CPU)
    close(model(x)[:, model.linear_columns["all"]], resnet(x))


# Claim 38
@pytest.mark.parametrize("kind", eval_linear.KINDS)
def test_perturbations_are_what_their_names_say(monkeypatch, kind):
    seen = spy(monkeypatch, "warp", "color_jitter", "elastic_shift")
    images = torch.zeros(4000, 3, 8, 8, dtype=torch.uint8)
    gen = clever.generator("cpu", 0)
    eval_linear.make_view(images, torch.ones(4000), 8, gen, **eval_linear.KINDS[kind])

    happens(seen["flip"], 0.5 if "flip" in kind else 0)
    if "rot" in kind:
        uniform(seen["angle"], -90, 90)
    else:
        assert not seen["angle"].any()
    assert ("elastic_shift" in seen) == ("elastic" in kind)
    if "elastic" in kind:
        assert seen["alpha"] == pytest.approx(100 * 8 / 224)
    assert ("factors" in seen) == ("cj" in kind)
    if "cj" in kind:
        *others, hue = seen["factors"]
        uniform(hue, -0.1, 0.1)
        for factor in others:
            uniform(factor, 0.6, 1.4)


# Claim 38
def test_curves_are_what_their_names_say(monkeypatch):
    seen = spy(monkeypatch, "warp", "elastic_shift")
    images = torch.zeros(5, 3, 8, 8, dtype=torch.uint8)
    for kind, options in eval_linear.CURVES.items():
        eval_linear.make_view(images, torch.ones(5), 8, clever.generator("cpu", 0), **options)
        name, value = kind.split("=")
        if name == "rot":
            assert seen["angle"].tolist() == [float(value)] * 5
            assert seen["shift"] is None
        else:
            assert not seen["angle"].any()
            assert seen["alpha"] == pytest.approx(float(value) * 8 / 224)


def features_and_probes(rank, world, folder):
    """Features and linear probes of files, one of them broken, as one of `world` processes."""
    join(rank, world, folder)
    eval_linear.CHUNK = 8
    net = clever.build_backbone("vit_micro", 32)
    model = eval_linear.Representation(net, tiny(), CPU)
    files = clever.load_folder(folder / "data" / "train")
    data = clever.Images(32, *files)
    args = eval_linear.parse("RUN --epochs 2 --batch 12 --lr 0.1".split())
    bank = eval_linear.compute_features(model, data, **eval_linear.KINDS["orig"])
    rotated = eval_linear.compute_features(model, data, **eval_linear.KINDS["cj+rot"])
    probes = eval_linear.train_probes(args, model, data, bank)
    heads = {part: head.state_dict() for part, (_, head) in probes.items()}
    torch.save([bank, rotated, data.labels, heads], f"{folder}/{world}-{rank}.pt")


# Claims 39 and 41
def test_features_and_probes_of_two_processes_equal_those_of_one(tmp_path):
    labelled_pictures(tmp_path / "data", train=15, val=1)
    (tmp_path / "data" / "train" / "a" / "04.jpg").write_text("broken")
    (one,) = results_of(features_and_probes, 1, tmp_path)
    assert one[0].shape == one[1].shape == (29, 4 * 96)
    assert one[2].tolist() == [0] * 14 + [1] * 15
    for result in results_of(features_and_probes, 2, tmp_path):
        close(result, one, 1e-5)


# Claim 40
def test_a_draw_of_labels_is_fixed_and_balanced():
    labels = torch.arange(1000) % 10
    readable = torch.rand(1000) > 0.3
    draws = [eval_linear.balanced_draw(labels, 0.1, seed, readable) for seed in (0, 0, 1)]
    assert labels[draws[0]].bincount().tolist() == [10] * 10
    assert readable[draws[0]].all()
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


# Claims 40 and 41: three of four images of class a are broken.
@pytest.mark.parametrize("words", ["", "--labels 0.25 --seed 1"])
def test_broken_images_are_left_out_with_their_labels(tmp_path, capsys, words):
    whole = labelled_pictures(tmp_path / "whole", train=4, val=4, reds=(10, 250))
    broken = shutil.copytree(whole, tmp_path / "broken")
    for name in ("train/a/00.jpg", "train/a/02.jpg", "train/a/03.jpg", "val/b/00.jpg"):
        (whole / name).unlink()
        (broken / name).write_text("broken")

    sections = []
    for data in (broken, whole):
        torch.manual_seed(0)
        run = untrained(tmp_path / f"run of {data.name}", data)
        sections.append(evaluate(run, "--quick", "--epochs", 2, "--workers", 0, *words.split()))
        output = capsys.readouterr()
        if data == broken:
            assert "val/b/00.jpg cannot be read" in output.err
            assert "1 of 8 images cannot be read and are left out" in output.out
        else:
            assert output.err == ""
    results = [section["k-NN"] for section in sections]
    assert results[0]["all"]["orig"] == results[1]["all"]["orig"] == [100]
    if not words:
        assert results[0] == results[1]
        assert sections[0]["linear"] == sections[1]["linear"]


# Claim 41: where nothing was checked before, the next image is shown with its own label.
def test_fine_tuning_shows_no_image_with_another_label(tmp_path, monkeypatch):
    folder = labelled_pictures(tmp_path / "data", train=6, val=1, reds=(10, 250))
    for n in (1, 3, 5):
        (folder / "train" / "a" / f"{n:02}.jpg").write_text("broken")
    data, _ = clever.load_images(str(folder), 32)
    monkeypatch.setattr(eval_linear, "make_view", lambda images, *_, **__: images)
    args = eval_linear.parse(["RUN", "--finetune", "--workers", "0"])
    red = nn.Module()
    red.forward = lambda images: images[:, 0].float().mean((1, 2))
    red.device, red.cfg = CPU, tiny()
    rows = torch.arange(12)
    batches = eval_linear.training_batches(args, red, data, None, rows, batch=4, steps=6)
    for value, labels in batches:
        assert torch.equal(value > 130, labels == 1)


# Claim 42
def test_published_layouts_load():
    own = clever.build_backbone("vit_micro", 32).state_dict()
    bare = {f"backbone.{name}": value for name, value in own.items()}
    wrapped = {f"module.{name}": value for name, value in bare.items()}
    wrapped["module.head.mlp"] = own["cls_token"]
    dino = dict(teacher=wrapped, args=argparse.Namespace(lr=0.1))
    timm = {**own, "head.weight": torch.zeros(10, 96)}
    args = eval_linear.parse("--weights w.pt --arch vit_micro --data patterns".split())
    for content in (own, timm, dino, dict(teacher=bare)):
        torch.save(content, "w.pt")
        cfg, _, loaded = eval_linear.open_model(args)
        assert cfg.global_size == 32
        close(loaded.state_dict(), dict(own), 0)


# Claim 42
@pytest.mark.parametrize(
    "arch, size, patch", [("vit_tiny", 32, 8), ("resnet18", 32, None), ("resnet18", 224, None)]
)
def test_sizes_and_stem_are_read_from_the_file(arch, size, patch):
    options = dict(patch_size=patch) if patch else {}
    weights = clever.build_backbone(arch, size, **options).state_dict()
    torch.save({**weights, "fc.bias": torch.zeros(10)}, "w.pt")
    args = eval_linear.parse(["--weights", "w.pt", "--arch", arch, "--data", "patterns"])
    cfg, _, loaded = eval_linear.open_model(args)
    assert cfg.global_size == size
    close(dict(loaded.state_dict()), dict(weights), 0)


WRONG_EVALUATIONS = [
    ("", "run --weights is required"),
    ("none", "none is not a run folder"),
    ("empty", "empty is not a run folder"),
    ("bare", "bare/backbone.pt is not a file"),
    ("infinite", "infinite/backbone.pt: cls_token is not finite"),
    ("run --quik", "--quik"),
    ("run --epochs ten", "invalid int value: 'ten'"),
    ("run --epochs 0", "must be above 0"),
    ("run --seed -1", "--seed must be a number, 0 or greater"),
    ("run --data none --out new", "none"),
    ("run --lr 0.1 inf", "must be above 0"),
    ("run --labels nan", "must be above 0"),
    ("run --labels 10", "--labels at most 1"),
    ("run --quick --finetune", "not allowed with argument --quick"),
    ("run --finetune --lr 0.1 0.2", "--finetune takes one --lr"),
    ("run --weights w.pt", "not allowed with argument"),
    ("--weights w.pt --data patterns", "--weights needs --arch"),
    ("--weights w.pt --arch vit_micro", "--data or --features"),
    ("--weights none.pt --arch vit_micro --data patterns", "none.pt is not a file"),
    ("--weights w.pt --arch vit_micro --data patterns --ratio 2", "--ratio must be"),
    ("--weights w.pt --arch vit_mini --data patterns", "--arch vit_mini"),
    ("--weights w.pt --arch resnet18 --data patterns", "w.pt does not fit"),
    ("--weights part.pt --arch vit_micro --data patterns", "blocks.0.attn.qkv.weight"),
    ("--weights odd.pt --arch vit_micro --data patterns", '"odd"'),
    ("run --data unlabelled", "has no labels; --features writes"),
    ("run --data none", "none"),
    ("run --features none", "none"),
]


@pytest.fixture(scope="module")
def mistakes(labelled, tmp_path_factory):  # noqa: F811
    """A folder of runs, weights and data, most of them wrong."""
    folder = tmp_path_factory.mktemp("mistakes")
    weights = torch.load(untrained(folder / "run", labelled) / "backbone.pt")
    (folder / "empty").mkdir()
    (untrained(folder / "bare") / "backbone.pt").unlink()
    broken = dict(weights, cls_token=torch.full((1, 1, 96), math.inf))
    torch.save(broken, untrained(folder / "infinite") / "backbone.pt")
    torch.save(weights, folder / "w.pt")
    torch.save(dict(weights, odd=torch.zeros(1)), folder / "odd.pt")
    part = {name: value for name, value in weights.items() if "qkv" not in name}
    torch.save(part, folder / "part.pt")
    pictures(folder / "unlabelled", 2)
    return folder


# Claim 43
@pytest.mark.parametrize("words, expected", WRONG_EVALUATIONS)
def test_wrong_evaluations_write_nothing(mistakes, monkeypatch, capsys, words, expected):
    monkeypatch.chdir(mistakes)
    before = files_of(mistakes)
    with pytest.raises((clever.UserError, SystemExit)) as error:
        eval_linear.main([*words.split(), "--workers", "0"])
    assert expected in str(error.value) + capsys.readouterr().err
    assert files_of(mistakes) == before


def evaluation(rank, world, folder):
    """Run eval_linear.py as one of `world` processes, as torchrun starts them."""
    torch.set_num_threads(1)
    os.chdir(folder)
    os.environ.update(json.loads(Path(f"{rank}.json").read_text()))
    eval_linear.CHUNK = 32
    eval_linear.main("run --epochs 2 --batch 16 --lr 0.1 --workers 0 --out two --seed 1".split())
    torch.save(rank, f"{world}-{rank}.pt")


# Claims 38, 39 and 44
def test_a_command_writes_a_section_and_two_processes_agree(tmp_path, capsys, monkeypatch):
    data = labelled_pictures(tmp_path / "data", 20, 50, reds=(118, 132))
    run = untrained(tmp_path / "run", data)
    for rank, env in enumerate(two_processes()):
        (tmp_path / f"{rank}.json").write_text(json.dumps(env))
    results_of(evaluation, 2, tmp_path)
    (name,) = json.loads(Path("two/eval.json").read_text())
    assert name == (
        "eval_linear.py run --epochs 2 --batch 16 --lr 0.1 --workers 0 --out two --seed 1"
    )
    two = json.loads(Path("two/eval.json").read_text())[name]

    monkeypatch.setattr(eval_linear, "CHUNK", 32)
    one = evaluate(run, *"--epochs 2 --batch 16 --lr 0.1 0.2 --workers 0 --labels 0.5".split())
    output = capsys.readouterr().out
    assert f"{data}: 20 training and 100 test images in 2 classes" in output
    assert "| linear, top-1 in % | all " in output
    assert "| cj+rot+elastic " in output
    assert max(len(line) for line in output.splitlines() if line.startswith("|")) <= 100
    assert one["settings"]["ratio"] == 0.8
    assert one["settings"]["labels"] == 0.5
    assert set(one["compare"]["after"]) == {"k-NN, upright", "k-NN, rotated", "R2 of the angle"}
    assert set(one["linear"]) == set(one["k-NN"]) == {"all", "IR", "EF", "random"}
    assert list(one["linear"]["IR"]) == list(eval_linear.KINDS)

    config = run / "config.json"
    config.write_text(config.read_text().replace('"seed": 0', '"seed": 5'))
    words = ["--epochs", 1, "--batch", 16, "--workers", 0, "--seed", 2]
    again = evaluate(run, *words)  # k-NN does not depend on seeds, learning rate or processes
    for part, kinds in again["k-NN"].items():
        for kind, value in kinds.items():
            assert value == pytest.approx(two["k-NN"][part][kind], abs=1.1)  # one image


# Claim 38
def test_the_boxes_of_test_views_and_probe_crops(monkeypatch):
    seen = spy(monkeypatch, "warp", "crop_box")
    images = torch.zeros(1000, 3, 8, 8, dtype=torch.uint8)
    wide = torch.full((1000,), 2.0)
    for size, side in ((64, 1.0), (65, 0.875)):
        eval_linear.make_view(images, wide, size, clever.generator("cpu", 0))
        close(seen["box"], torch.tensor([0, 0, side / 2, side]).expand(1000, 4), 1e-6)
    eval_linear.make_view(images, wide, 8, clever.generator("cpu", 0), crop=True)
    uniform(seen["area"], 0.08, 1)
    uniform(seen["shape"].log(), math.log(3 / 4), math.log(4 / 3))


# Claim 44
def test_top_5_counts_the_five_highest_scores():
    scores = torch.arange(8.0).expand(8, 8)
    assert eval_linear.top_1_and_5(scores, torch.arange(8)) == [12.5, 62.5]


# Claim 44
def test_the_widest_tables_fit_100_columns(capsys):
    kinds = {kind: [100.0, 100.0] for kind in eval_linear.KINDS}
    parts = dict(all=kinds, IR=kinds, EF=kinds, random=kinds)
    eval_linear.print_accuracies("linear", parts)
    eval_linear.print_accuracies("k-NN", parts)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100


# Claims 44 and 45
def test_sections_are_added_and_the_run_stays(labelled, tmp_path, capsys):  # noqa: F811
    run = untrained(tmp_path / "run", labelled)
    before = (run / "backbone.pt").read_bytes()
    common = ["--epochs", 3, "--batch", 8, "--workers", 0]
    probes = evaluate(run, *common, "--quick", "--curve")
    assert set(probes["linear"]["EF"]) == {*eval_linear.KINDS, *eval_linear.CURVES}
    capsys.readouterr()
    tuned = evaluate(run, *common, "--finetune", "--labels", 0.5)
    assert "| fine-tuned " in capsys.readouterr().out
    assert tuned["linear"]["fine-tuned"]["orig"][0] > 90

    weights = ["--weights", run / "backbone.pt", "--arch", "vit_micro", "--ratio", 0.8]
    foreign = evaluate(*weights, "--data", labelled, *common, "--quick", "--out", run)
    for part, kinds in foreign["k-NN"].items():
        assert kinds == {kind: probes["k-NN"][part][kind] for kind in eval_linear.KINDS}
    sections = json.loads((run / "eval.json").read_text())
    assert list(sections.values()) == [probes, tuned, foreign]
    assert list(sections)[1].endswith("--workers 0 --finetune --labels 0.5")
    assert (run / "backbone.pt").read_bytes() == before


# Claim 45
@pytest.mark.parametrize("words, changes", [("", False), ("--finetune", True)])
def test_batch_norm_keeps_its_statistics(tmp_path, words, changes):
    backbone = clever.build_backbone("resnet18", 32)
    before = copy.deepcopy(backbone.state_dict())
    args = eval_linear.parse(["RUN", "--epochs", "1", "--batch", "8", *words.split()])
    model = eval_linear.Representation(backbone, tiny(arch="resnet18"), CPU)
    folder = labelled_pictures(tmp_path / "data", train=5, val=1)
    train, val = clever.load_images(str(folder), 32)
    eval_linear.evaluate(args, model, train, val)

    changed = set()
    for name, value in backbone.state_dict().items():
        if not torch.equal(value, before[name]):
            changed.add(name)
    assert bool(changed) == changes
    assert not any("running" in name or "tracked" in name for name in changed)


# Claim 45
@pytest.mark.parametrize("words, rates", [("", [1e-3, 1e-4]), ("--lr 0.02", [0.02, 0.002])])
def test_the_learning_rates_of_fine_tuning(words, rates):
    args = eval_linear.parse(["RUN", "--finetune", *words.split()])
    model = eval_linear.Representation(clever.build_backbone("vit_micro", 32), tiny(), CPU)
    heads = eval_linear.new_heads(args, model, 3)
    optimizer = eval_linear.new_optimizer(args, model, heads, batch=8)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(rates)
    assert all(p.requires_grad for p in model.parameters())


# Claim 46
def test_features_of_a_folder(tmp_path, capsys):
    run = untrained(tmp_path / "run")
    folder = pictures(tmp_path / "photos" / "trip", 3).parent
    (folder / "trip" / "01.jpg").write_text("broken")
    eval_linear.main([str(run), "--features", str(folder), "--workers", "0"])
    output = capsys.readouterr()
    assert "01.jpg cannot be read" in output.err
    assert "features.pt: z (2, 96), IR (76,), EF (20,)" in output.out
    assert not (run / "eval.json").exists()

    saved = torch.load(run / "features.pt", weights_only=True)
    assert saved["paths"] == [str(folder / "trip" / "00.jpg"), str(folder / "trip" / "02.jpg")]
    backbone = clever.build_backbone("vit_micro", 32).eval()
    clever.load_weights(backbone, run / "backbone.pt")
    for path, z in zip(saved["paths"], saved["z"]):
        pixels, aspect = clever.decode(path, 32)
        zero = torch.zeros(1)
        view = clever.centre_view(pixels[None], torch.tensor([aspect]), 32, zero.bool(), zero)
        with torch.no_grad():
            close(backbone(clever.normalize(view))[0], z, 1e-5)
        ir, ef = clever.split(z, saved["ratio"])
        assert torch.equal(z[saved["IR"]], ir)
        assert torch.equal(z[saved["EF"]], ef)


# Claim 47
def test_propagation_equals_a_naive_one():
    f = normal(5, 4, 3, 6)
    masks = [normal(2, 4, 3, seed=1)]
    places = list(itertools.product(range(4), range(3)))
    for t in range(1, 5):
        mask = torch.zeros(2, 4, 3).double()
        for h, w in places:
            near = []
            for c in sorted({0, max(0, t - 2), t - 1}):
                for y, x in places:
                    if abs(y - h) <= 1 and abs(x - w) <= 1:
                        cosine = F.cosine_similarity(f[t, h, w], f[c, y, x], 0)
                        near.append((float(cosine) / 0.1, c, y, x))
            near = sorted(near)[-3:]
            weights = torch.tensor([affinity for affinity, *_ in near]).double().softmax(0)
            for weight, (_, c, y, x) in zip(weights, near):
                mask[:, h, w] += weight * masks[c][:, y, x]
        masks.append(mask)
    close(davis.propagate(f, masks[0], last=2, k=3, radius=1), torch.stack(masks), 1e-6)


# Claim 47: the features are the places, so each pixel keeps its mask.
def test_void_pixels_do_not_count():
    truth = torch.zeros(5, 12, 12, dtype=torch.uint8)
    truth[:, 3:9, 3:9] = 1
    features = torch.eye(144).view(1, 12, 12, 144).expand(5, -1, -1, -1)
    assert davis.jaccard(features, truth) == [1]

    void = truth.clone()
    void[:, 2, 3:9] = 255  # background here
    void[:, 3, 3:9] = 255  # object here
    assert davis.jaccard(features, void) == [1]
    wrong = torch.where(void == 255, 0, void)
    wrong[0] = truth[0]
    assert davis.jaccard(features, wrong) == pytest.approx([30 / 36])


def toy_video(root, name, frames):
    """A bright square that moves by 8 pixels a frame, in the layout of DAVIS-2017."""
    for kind in ("JPEGImages", "Annotations"):
        (root / kind / "480p" / name).mkdir(parents=True)
    for t in range(frames):
        mask = torch.zeros(128, 128, dtype=torch.uint8)
        mask[32:80, 16 + 8 * t : 64 + 8 * t] = 1
        TF.to_pil_image(200 * mask).save(root / f"JPEGImages/480p/{name}/{t:05}.jpg")
        mask[30:32, 16 + 8 * t : 64 + 8 * t] = 255
        TF.to_pil_image(mask).save(root / f"Annotations/480p/{name}/{t:05}.png")


# Claim 47
def test_davis_follows_an_object(tmp_path, capsys):
    run = untrained(tmp_path / "run")
    root = tmp_path / "DAVIS"
    with pytest.raises(clever.UserError, match="val.txt not found"):
        davis.main([str(run), str(root)])

    (root / "ImageSets" / "2017").mkdir(parents=True)
    (root / "ImageSets/2017/val.txt").write_text("toy\nshort\n")
    toy_video(root, "toy", 6)
    toy_video(root, "short", 2)
    davis.main([str(run), str(root)])
    output = capsys.readouterr().out
    assert "short is left out" in output
    section = json.loads((run / "eval.json").read_text())[f"davis.py {run} {root}"]
    assert section["J mean"] > 0.7
    assert list(section["videos"]) == ["toy"]
    assert len(section["videos"]["toy"]) == 1

    weights = f"--weights {run}/backbone.pt --arch vit_micro {root}".split()
    davis.main(weights)
    assert f"J mean {section['J mean']:.3f} of 1 objects" in capsys.readouterr().out


# Claim 48
def test_visualize_draws_a_row_for_each_map(labelled, tmp_path):  # noqa: F811
    run = untrained(tmp_path / "run")
    visualize.main([str(run), str(labelled / "train" / "a" / "00.jpg")])
    sheet = TF.pil_to_tensor(Image.open(run / "visualize.png")) / 255
    rows, columns = 7, 4  # image, all, IR, EF and 3 heads, at four turns; tiles of 128 px
    assert sheet.shape == (3, rows * 144 + 16, columns * 144 + 16)
    tiles = sheet[:, 16:, 16:].unflatten(2, (columns, 144)).unflatten(1, (rows, 144))
    tiles = tiles[:, :, :128, :, :128]  # (3, rows, 128, columns, 128)
    assert (tiles.std((0, 2, 4)) > 0.01).all()  # none is empty
    upright, turned = tiles[:, 0, :, 0], tiles[:, 0, :, 3]
    assert psnr(turned, upright.rot90(1, (1, 2))) > 40


# Claim 48
def test_the_attention_is_that_of_the_last_block(monkeypatch):
    net = clever.build_backbone("vit_micro", 32)
    attention = F.scaled_dot_product_attention
    weights = []

    def watched(q, k, v):
        eye = torch.eye(k.shape[2]).expand(*k.shape[:2], -1, -1)
        weights.append(attention(q, k, eye))  # (T, heads, 1 + n, 1 + n)
        return attention(q, k, v)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    x = torch.randn(2, 3, 32, 32)
    net(x)
    close(visualize.last_attention(net, x), weights[3][:, :, 0, 1:], 1e-5)


# Claim 43
def test_ctrl_c_ends_an_evaluation_and_its_workers(labelled, tmp_path):
    run = untrained(tmp_path / "run", labelled)
    command = [sys.executable, HERE / "eval_linear.py", run, "--workers", "1", "--epochs", "9999"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        if line.startswith("epoch"):
            break
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and "KeyboardInterrupt" in output
