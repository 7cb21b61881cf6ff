"""The claims of clever.py and eval_linear.py, by the numbers of the README's list: `pytest`."""
import argparse
import copy
import inspect
import itertools
import json
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
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
from assets import vmamba

HERE = Path(clever.__file__).resolve().parent
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), str(Path(__file__).parent)])
os.environ["OMP_NUM_THREADS"] = "1"
CHILDREN = multiprocessing.get_context("forkserver")  # real processes that share one import of torch
CHILDREN.set_forkserver_preload([__name__])
NEAREST, BILINEAR, BICUBIC = map(T.InterpolationMode, ("nearest", "bilinear", "bicubic"))
TINY = dict(arch="vit_micro", global_size=32, local_size=16, local_views=2, out_dim=64, hidden_dim=32,
            batch=8, epochs=4, lr=5e-3, precision="fp32", workers=0)

@pytest.fixture(autouse=True)
def alike(monkeypatch):
    """A test starts with one thread, seed 0 and no GPU."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    yield
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a run in this process changes it
    for p in multiprocessing.active_children():
        p.kill()

def tiny(**options):
    """A configuration of a network that runs in milliseconds."""
    return clever.Config(**{**TINY, **options})

def normal(*shape, seed=0):
    """Normal random numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

def close(a, b, tolerance=1e-10):
    """Equal but for rounding, tensors or lists and dicts of them."""
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)

# ======== Losses

def naive_loss(term, student, teacher, centre, student_temp=0.1, teacher_temp=0.04):
    """Mean of term(P_i, logits_j) over each global view i and each other view j: DINO's double loop."""
    P = ((teacher.detach() - centre) / teacher_temp).softmax(-1)
    logits = (student / student_temp).unbind()
    values = []
    for i in range(len(P)):
        for j in range(len(logits)):
            if i != j:
                values.append(term(P[i], logits[j]).mean())
    return sum(values) / len(values)

naive_invariance = partial(naive_loss, lambda P, x: -(P * x.log_softmax(-1)).sum(-1))
naive_orthogonality = partial(naive_loss, lambda P, x: F.cosine_similarity(P, x.softmax(-1), -1).abs())

def naive_preg(head_ir, head_ef):
    ir = sum(p.pow(2).sum() for p in head_ir.parameters())
    ef = sum(p.pow(2).sum() for p in head_ef.parameters())
    return (ir - ef).abs()

# claim 1: L_CL and L_Orth, and their gradients, are the means over pairs of views that the paper writes.
# claim 2: the order of the images in a batch changes no loss.
@pytest.mark.parametrize("loss, naive", [
    (clever.invariance_loss, naive_invariance), (clever.orthogonality_loss, naive_orthogonality)])
@pytest.mark.parametrize("V, B, K, temps", [(2, 1, 2, (0.1, 0.04)), (3, 5, 7, (0.1, 0.07)),
                                            (10, 4, 64, (0.2, 0.04))])
def test_losses_equal_naive_ones(loss, naive, V, B, K, temps):
    student = normal(V, B, K).requires_grad_()
    teacher = normal(2, B, K, seed=1).requires_grad_()
    rest = normal(K, seed=2), *temps
    ours, theirs = loss(student, teacher, *rest), naive(student, teacher, *rest)
    close(ours, theirs)
    close(torch.autograd.grad(ours, student), torch.autograd.grad(theirs, student))
    assert ours.shape == () and teacher.grad is None
    order = torch.randperm(B)
    close(loss(student[:, order], teacher[:, order], *rest), ours)

# ======== The representation

# claim 4: IR and EF together are z, and each feeds its own head.
# claim 2: views may come in any order of sizes.
@pytest.mark.parametrize("ratio", [0.02, 0.8, 0.99])
def test_ir_and_ef_feed_their_own_heads(ratio):
    net = clever.CLeVER(tiny(ratio=ratio, ef_out_dim=48)).double()
    views = [normal(2, 3, side, side, seed=i) for i, side in enumerate((16, 32, 16, 48, 32))]
    z = torch.stack([net.backbone(view) for view in views])
    ir, ef = clever.split(z, ratio)
    assert ir.shape[-1] == math.floor(ratio * 96) and torch.equal(torch.cat([ir, ef], -1), z)
    close(net.embed(views), z)
    close(net(views), (net.heads[0](ir), net.heads[1](ef)))

# claim 4: the head is the published one: layers of 2048, 2048 and 256, and 65,536 prototypes.
def test_the_head_is_the_published_one():
    shapes = [tuple(p.shape) for p in clever.ProjectionHead(154).parameters()]
    assert shapes == [(2048, 154), (2048,), (2048, 2048), (2048,), (256, 2048), (256,), (65536, 256)]

# claim 5: the student drops paths, more of them block by block, and keeps their mean; a teacher drops none.
def test_the_teacher_is_not_random():
    t = clever.Training(tiny(drop_path=0.3), 1)
    assert [block.drop_path for block in t.student.backbone.blocks] == pytest.approx([0, 0.1, 0.2, 0.3])
    assert [block.drop_path for block in t.teacher.backbone.blocks] == [0] * 4
    net = clever.build_backbone("vmamba_tiny", 32, 0.5)  # twice as much at its last block, below 1
    assert max(m.drop_path for m in net.modules() if isinstance(m, vmamba.VSSBlock)) == 0.99
    x = clever.stochastic_depth(torch.ones(6000, 2).double(), 0.25, training=True)
    happens(x[:, 0] > 0, 0.75)
    close(x.unique(), torch.tensor([0, 1 / 0.75], dtype=torch.float64))

# ======== Collapse

def outputs(case="healthy"):
    """Features (2, 128, 32), the teacher's P and the student's Q (2, 128, 64), healthy but for the case."""
    features = normal(2, 128, 32)
    teacher = 2 * normal(128, 64, seed=1) + 2 * normal(2, 128, 64, seed=2)  # of the image, of the view
    student = teacher + normal(2, 128, 64, seed=3)
    if case == "constant features":
        features = normal(32, seed=4) + 1e-4 * features
    if case == "uniform teacher":
        teacher = 1e-3 * teacher
    if case == "one prototype":
        teacher = teacher + 50 * torch.eye(1, 64)
    if case == "constant student":
        student = normal(64, seed=6).expand(2, 128, 64)
    return features, teacher.softmax(-1), student.softmax(-1)

# claim 25: each collapse is called by its name, EF's trivial solutions too; a healthy run is left in peace.
@pytest.mark.parametrize("case, ir_says, ef_says", [
    ("healthy", "", ""), ("constant features", "same features", "same features"),
    ("uniform teacher", "uniform", "TRIVIAL"), ("one prototype", "one prototype", "TRIVIAL"),
    ("constant student", "", "TRIVIAL")])
def test_each_alarm_rings_on_its_collapse_alone(case, ir_says, ef_says):
    metrics = clever.collapse_metrics(*outputs(case))
    for part, says in (("IR", ir_says), ("EF", ef_says)):
        alarm = clever.collapse_alarm(part, metrics, 64)
        assert part in alarm and says in alarm if says else alarm == ""

# claim 25: the logged metrics are what their names say.
def test_collapse_metrics_equal_naive_ones():
    x, P, Q = outputs()
    metrics = clever.collapse_metrics(x, P, Q)
    x, mean = x.flatten(0, 1), P.mean((0, 1))
    share = torch.linalg.eigvalsh(x.T @ x).sqrt()
    share = share / share.sum()
    close(metrics["rank"], math.exp(-(share * share.log()).sum()), 1e-4)
    close(metrics["std"], float((x / x.norm(dim=1, keepdim=True)).std(0).mean() * 32 ** 0.5))
    close(metrics["entropy"], float(-(P * P.log()).sum(-1).mean()))
    close(metrics["kl_uniform"], float((mean * (mean * 64).log()).sum()))
    for name, view, image in (("own", 0, 0), ("other_view", 1, 0), ("other_image", 0, 1)):
        pairs = [(P[g, b], Q[g - view, b - image]) for g in (0, 1) for b in range(128)]
        close(metrics[name], float(sum(F.cosine_similarity(p, q, 0) for p, q in pairs) / 256))

# ======== Views

def smooth(height, width):
    """A smooth colour image in [0, 1]: (1, 3, height, width)."""
    coarse = torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)

def psnr(a, b, radius=2.0):
    """Peak signal-to-noise ratio in dB, of the pixels within `radius` half sides of the centre."""
    axis = torch.linspace(-1, 1, a.shape[-1])
    near = axis ** 2 + axis[:, None] ** 2 <= radius ** 2
    return -10 * math.log10((a - b)[..., near].square().mean() + 1e-20)

def warp(image, size, box=(0, 0, 1, 1), flip=False, angle=0.0, shift=None):
    """clever.warp of one image."""
    box = torch.tensor([box], dtype=image.dtype)
    return clever.warp(image, size, box, torch.tensor([flip]), torch.tensor([angle]), shift)

# claim 9: a crop off the stored square is torchvision's bicubic crop off the original image, above 36 dB.
@pytest.mark.parametrize("size, scale", [(224, (0.4, 1.0)), (96, (0.05, 0.4))])
def test_crops_are_torchvisions(tmp_path, size, scale):
    TF.to_pil_image(smooth(375, 500)[0]).save(tmp_path / "x.png")
    original = TF.pil_to_tensor(Image.open(tmp_path / "x.png"))
    stored, aspect = clever.decode(tmp_path / "x.png", clever.stored_side(224))
    assert stored.shape == (3, 320, 320) and aspect == pytest.approx(500 / 375)
    for _ in range(8):
        top, left, h, w = T.RandomResizedCrop.get_params(original, scale, (3 / 4, 4 / 3))
        box = (2 * left + w) / 500 - 1, (2 * top + h) / 375 - 1, w / 500, h / 375
        theirs = TF.resized_crop(original, top, left, h, w, [size, size], BICUBIC, antialias=True)
        assert psnr(warp(stored[None] / 255, size, box), theirs[None] / 255) > 36

# claim 9: the boxes of the crops are distributed as those of torchvision's RandomResizedCrop.
@pytest.mark.parametrize("scale", [(0.4, 1.0), (0.05, 0.4)])
@pytest.mark.parametrize("width, height", [(375, 500), (500, 375), (900, 100)])
def test_crop_boxes_are_distributed_as_torchvisions(scale, width, height):
    area = scale[0] + (scale[1] - scale[0]) * torch.rand(10_000, 10)
    ratio = (torch.rand(10_000, 10) * 2 - 1).mul(math.log(4 / 3)).exp()
    box = clever.crop_box(area, ratio, torch.rand(10_000, 2), torch.full((10_000,), width / height))
    assert (box[:, :2].abs() + box[:, 2:] <= 1 + 1e-6).all()
    image = torch.empty(3, height, width)
    theirs = [T.RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(5000)]
    top, left, h, w = torch.tensor(theirs).T
    theirs = (2 * left + w) / width - 1, (2 * top + h) / height - 1, w / width, h / height
    q = torch.linspace(0.01, 0.99, 99)
    for mine, other in zip(box.T, theirs):
        assert (mine.quantile(q) - other.quantile(q)).abs().max() < 0.06

# claim 10: flips are exact, rotations and elastic deformations torchvision's, black outside. A view is crop,
# flip, rotation and elastic deformation in this order, sampled once.
@pytest.mark.parametrize("size", [224, 96, 64])
def test_the_warp_is_torchvisions(size):
    image, white = smooth(size, size), torch.ones(1, 3, size, size)
    close(warp(image.double(), size, flip=True), image.double().flip(-1))
    close(warp(white, size, angle=12.5), TF.rotate(white, 12.5, NEAREST), 1e-5)
    assert psnr(warp(image, size, angle=-37.0), TF.rotate(image, -37.0, BILINEAR), 0.95) > 90
    alpha, sigma = 100 * size / 224, 5 * size / 224
    shift = T.ElasticTransform.get_params([alpha] * 2, [sigma] * 2, [size, size])
    torch.manual_seed(0)
    close(clever.elastic_shift(torch.rand(1, 2, size, size) * 2 - 1, alpha, sigma), shift, 1e-5)
    close(warp(white, size, shift=shift), TF.elastic_transform(white, shift, NEAREST), 1e-5)
    image, box = smooth(320, 320), (0.1, -0.2, 0.7, 0.6)
    theirs = TF.rotate(TF.hflip(warp(image, size, box)), 33.0, BILINEAR)
    theirs = TF.elastic_transform(theirs, shift, BILINEAR)
    assert psnr(warp(image, size, box, True, 33.0, shift), theirs, 0.85) > 36

# claim 10: colours are torchvision's jitter in any order and, at 224 px, its 13-pixel blur.
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 0, 3, 1), (3, 1, 0, 2)])
def test_colours_are_torchvisions(order):
    images, factors = torch.rand(8, 3, 64, 64), torch.rand(4, 8) * 0.8 + 0.6
    factors[3] = torch.rand(8) * 0.2 - 0.1
    operations = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    blur = clever.gaussian_matrix(64, factors[0], 6)[:, None]
    for i, x in enumerate(images):
        close((blur @ images @ blur.mT)[i], TF.gaussian_blur(x, [13, 13], [float(factors[0, i])] * 2), 1e-5)
        for k in order:
            x = operations[k](x, float(factors[k, i]))
        close(clever.color_jitter(images, *factors, order)[i], x, 1e-4)

def uniform(x, low, high):
    """Kolmogorov's distance of numbers from a uniform distribution is that of chance."""
    x = (x.double().flatten().sort().values - low) / (high - low)
    assert x[0] >= -1e-6 and x[-1] <= 1 + 1e-6
    assert (x - torch.linspace(0, 1, len(x)).double()).abs().max() < 2 / len(x) ** 0.5

def happens(event, p):
    """The share of true values is p, but for chance (4 standard deviations)."""
    assert abs(event.double().mean() - p) <= 4 * math.sqrt(p * (1 - p) / len(event))

def spy(monkeypatch, *names):
    """A dict of the arguments and results, by name, of these functions of clever.py, once they are called."""
    seen = {}

    def note(*args, name, real):
        seen.update(inspect.signature(real).bind(*args).arguments)
        seen[name] = real(*args)
        return seen[name]
    for name in names:
        monkeypatch.setattr(clever, name, partial(note, name=name, real=getattr(clever, name)))
    return seen

# claim 11: each random parameter of a view has the recipe's distribution and is a function of the generator.
@pytest.mark.parametrize("view, aug", [(0, "baug"), (1, "caug"), (2, "caug+"), (9, "caug")])
def test_distribution_of_every_random_parameter(monkeypatch, view, aug):
    images = torch.tensor([0.9, 0.7, 0.6]).view(1, 3, 1, 1).expand(10_000, 3, 1, 1)
    p = spy(monkeypatch, "crop_box", "warp", "color_jitter", "gaussian_matrix")  # last: blur
    crop = clever.MultiCrop(tiny(aug=aug, global_size=8, local_size=8))
    views = crop.make_view(images, torch.ones(10_000), view, clever.generator("cpu", 0), (0, 1, 2, 3))
    uniform(p["area"], *((0.4, 1.0) if view < 2 else (0.05, 0.4)))
    uniform(p["shape"].log(), math.log(3 / 4), math.log(4 / 3))
    uniform(p["place"], 0, 1)
    happens(p["flip"], 0.5)
    if aug == "baug":
        assert not p["angle"].any()
    else:
        uniform(p["angle"], -90, 90)
    if aug == "caug+":
        happens(p["shift"].flatten(1).any(1), 0.5)
    jittered = p["hue"] != 0
    happens(jittered, 0.8)
    for name, low, high in (("brightness", 0.6, 1.4), ("contrast", 0.6, 1.4), ("saturation", 0.8, 1.2),
                            ("hue", -0.1, 0.1)):
        uniform(p[name][jittered], low, high)
        assert (p[name][~jittered] == (name != "hue")).all()
    blurred = p["sigma"] != 1e-3
    happens(blurred, (1.0, 0.1, 0.5)[min(view, 2)])
    uniform(p["sigma"][blurred] * 224 / 8, 0.1, 2.0)  # in pixels of a global view of 224
    before = p["color_jitter"][:, :, 3, 3]  # a pixel near the middle
    after = views[:, :, 3, 3] * torch.tensor(clever.STD) + torch.tensor(clever.MEAN)
    luma = torch.tensor([0.2989, 0.587, 0.114])
    happens(after.amax(1) - after.amin(1) < 1e-3, 0.2)  # grey
    happens((after @ luma - before @ luma).abs() > 1e-3, 0.2 * (view == 1))  # solarised

# ======== The step

def naive_schedule(start, end, epochs, spe, warmup=0):
    """DINO's cosine_scheduler."""
    n = epochs * spe - warmup
    ramp = [start * i / max(1, warmup - 1) for i in range(warmup)]
    return ramp + [end + 0.5 * (start - end) * (1 + math.cos(math.pi * i / n)) for i in range(n)]

class Published:
    """The published loop from the networks of a Training: losses pair by pair, loops over parameters."""

    def __init__(self, t):
        cfg, spe = t.cfg, t.steps_per_epoch
        self.cfg, self.frozen = cfg, cfg.freeze_epochs * spe
        self.student, self.teacher = copy.deepcopy(t.student), copy.deepcopy(t.teacher)
        self.centres = [head.centre.clone() for head in t.teacher.heads]
        groups = [dict(params=[]), dict(params=[], weight_decay=0.0)]
        for name, p in self.student.named_parameters():
            groups[name.endswith(".bias") or p.ndim == 1]["params"].append(p)
        self.optimizer = torch.optim.AdamW(groups, foreach=False)
        warmup = min(10 * spe, cfg.epochs * spe // 10)
        self.lr = naive_schedule(cfg.lr * cfg.batch / 256, 1e-6, cfg.epochs, spe, warmup)
        self.weight_decay = naive_schedule(*cfg.weight_decay, cfg.epochs, spe)
        self.momentum = naive_schedule(cfg.momentum, 1.0, cfg.epochs, spe)

    def terms(self, student, teacher):
        cfg = self.cfg
        ir, *ef = zip(student, teacher, self.centres)
        L_CL = naive_invariance(*ir, 0.1, cfg.teacher_temp)
        if cfg.method == "dino":
            return dict(loss=L_CL, L_CL=L_CL)
        L_Orth = naive_orthogonality(*ef[0], 0.1, cfg.teacher_temp)
        L_PReg = naive_preg(*self.student.heads)
        loss = L_CL + cfg.lambda_orth * L_Orth + cfg.lambda_reg * L_PReg
        return dict(loss=loss, L_CL=L_CL, L_Orth=L_Orth, L_PReg=L_PReg)

    def step(self, views, step):
        decayed, free = self.optimizer.param_groups
        decayed["lr"] = free["lr"] = self.lr[step]
        decayed["weight_decay"] = self.weight_decay[step]
        with torch.autocast("cpu", torch.bfloat16, enabled=self.cfg.precision == "bf16"):
            teacher = self.teacher(views[:2])
            terms = self.terms(self.student(views), teacher)
        self.optimizer.zero_grad()
        terms["loss"].backward()
        for name, p in self.student.named_parameters():  # clip each gradient on its own
            factor = clever.CLIP / (p.grad.norm(2).item() + 1e-6)
            if factor < 1:
                p.grad.mul_(factor)
            if "prototypes" in name and step < self.frozen:
                p.grad = None
        self.optimizer.step()
        m = self.momentum[step]
        with torch.no_grad():
            for slow, fast in zip(self.teacher.parameters(), self.student.parameters()):
                slow.mul_(m).add_((1 - m) * fast)
            for centre, logits in zip(self.centres, teacher):
                centre.mul_(0.9).add_(0.1 * logits.mean((0, 1)))
        return {name: term.detach() for name, term in terms.items()}

# claim 6: six steps of training equal the published loop, in every term, weight and centre, to 1e-10; so do
# the schedules of long runs and of short ones, which warm up for a tenth.
# claim 1: L_PReg and its gradients are the difference of the sums of squares.
# claim 3: the loss is the sum of its named terms; DINO's is L_CL alone, whatever ratio it is given.
# claim 13: --compile computes the same.
@pytest.mark.parametrize("method, epochs, compiled", [("clever", 20, False), ("dino", 200, False),
                                                      ("clever", 20, True)])
def test_six_steps_equal_the_published_loop(monkeypatch, method, epochs, compiled):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # needs no C compiler
    monkeypatch.setattr(clever, "CLIP", 0.02)  # clips some gradients, not all
    t = clever.Training(tiny(method=method, drop_path=0.0, ef_out_dim=48, lr=0.1, epochs=epochs,
                             lambda_orth=0.7, lambda_reg=0.1, teacher_temp=0.05, compile=compiled), 2)
    t.student.double()
    t.teacher.double()
    naive = Published(t)
    close([t.lr, t.weight_decay, t.momentum], [naive.lr, naive.weight_decay, naive.momentum])
    before = t.student.heads[0].prototypes.weight.clone()
    crop = clever.MultiCrop(t.cfg)
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    for step in range(6):
        views = [view.double() for view in crop(images, torch.ones(8), step)]
        close(clever.train_step(t, views, step), naive.step(views, step))
        close(list(t.student.parameters()), list(naive.student.parameters()))
        close(list(t.teacher.parameters()), list(naive.teacher.parameters()))
        close([head.centre for head in t.teacher.heads], naive.centres)
        assert torch.equal(t.student.heads[0].prototypes.weight, before) == (step < 2)

class NeverWait(TorchDispatchMode):
    """Within: an operation raises that makes the host wait for the values of a device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        waits = re.fullmatch("_local_scalar_dense|nonzero|masked_select|equal|_?unique2?", name)
        if name.startswith("index") and isinstance(args[1], (list, tuple)):
            waits = any(i is not None and i.dtype is torch.bool for i in args[1])
        assert not waits, f"{name} waits for the device"
        return function(*args, **(kwargs or {}))

# claim 13: a step and its views never ask the device for a value.
@pytest.mark.parametrize("options", [dict(aug="caug+"), dict(arch="resnet18"), dict(arch="vmamba_tiny")])
def test_a_step_never_waits_for_the_device(monkeypatch, options):
    cfg = tiny(**{**options, "batch": 2})
    t, crop = clever.Training(cfg, 1), clever.MultiCrop(cfg)
    images, aspect = torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.ones(2)
    for name in ("tolist", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, None)
    with NeverWait():
        clever.train_step(t, crop(images, aspect, 0), 0)

# ======== Several processes

def finish(*processes):
    """The exit codes of processes, which may take two minutes; None: it hangs."""
    for p in processes:
        p.join(120)
    return [p.exitcode for p in processes]

def results_of(work, world, folder):
    """What each of `world` real processes leaves in <folder>/<world>-<rank>.pt."""
    ranks = [CHILDREN.Process(target=work, args=(rank, world, folder)) for rank in range(world)]
    for p in ranks:
        p.start()
    assert finish(*ranks) == [0] * world
    return [torch.load(folder / f"{world}-{rank}.pt") for rank in range(world)]

def four_steps(rank, world, folder):
    """An epoch of four steps on 255 images as one of `world` processes; what came out, into a file."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", f"file://{folder}/meeting-{world}", rank=rank, world_size=world)
    pixels = torch.randint(0, 256, (255, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    data = clever.Images(32, torch.zeros(255), ["one"], pixels=pixels.byte())
    t = clever.Training(tiny(aug="caug+", batch=30, ef_out_dim=48), 4)
    augment = clever.MultiCrop(t.cfg)
    steps = clever.batches(len(data), t.cfg, 0, 4)
    for step, (images, aspect) in enumerate(data.stream(steps, t.device, 0)):
        terms = clever.train_step(t, augment(images, aspect, step), step)
    for block in [*t.student.backbone.blocks, *t.teacher.backbone.blocks]:
        block.attn.qkv.bias.data[96:192] = 0  # the keys' have no gradient but rounding
    terms = {name: clever.mean_over_processes(term) for name, term in terms.items()}
    nets = t.student.state_dict(), t.teacher.state_dict()
    torch.save([terms, clever.epoch_metrics(t), *nets], f"{folder}/{world}-{rank}.pt")

# claim 12: losses, weights and metrics do not depend on the number of processes; all hold one teacher.
def test_two_and_three_processes_equal_one(tmp_path):
    four_steps(0, 1, tmp_path)
    one = torch.load(tmp_path / "1-0.pt")
    for world in (2, 3):
        results = results_of(four_steps, world, tmp_path)
        close(results[0], one, 1e-5)
        close(results, results[:1] * world, 0)

# ======== Backbones

# claim 7: every backbone has its paper's width and number of parameters.
@pytest.mark.parametrize("arch, D, parameters", [
    ("vit_micro", 96, 467_808), ("vit_tiny", 192, 5_524_416), ("vit_small", 384, 21_665_664),
    ("vit_base", 768, 85_798_656), ("resnet18", 512, 11_176_512), ("resnet50", 2048, 23_508_032),
    ("vmamba_tiny", 768, 29_480_064)])
def test_width_and_size_of_every_backbone(arch, D, parameters):
    with torch.device("meta"):
        f = clever.build_backbone(arch, 32 if arch == "vit_micro" else 224)
    assert f.embed_dim == D and sum(p.numel() for p in f.parameters()) == parameters

# claim 7: a ResNet's weights load into torchvision's with fc = Identity().
@pytest.mark.parametrize("arch", clever.RESNETS)
def test_resnets_are_torchvisions(arch):
    ours, theirs = clever.build_backbone(arch, 224).eval(), torchvision.models.get_model(arch).eval()
    theirs.fc = nn.Identity()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = normal(2, 3, 64, 64)
    close(ours.double()(x), theirs.double()(x))

# claim 7: a ViT's parameters have timm's names; its feature is torchvision's ViT's with the same weights.
def test_the_vit_is_torchvisions_with_timms_names():
    f = clever.build_backbone("vit_tiny", 64).double()
    theirs = torchvision.models.VisionTransformer(64, 16, 12, 3, 192, 768).double()
    theirs.heads = nn.Identity()
    for i, p in enumerate(f.parameters()):
        p.data += 0.05 * normal(*p.shape, seed=i)  # biases and norms count too
    names = "\n".join(f.state_dict())
    for timm, torchvisions in {
            "cls_token": "class_token", "pos_embed": "encoder.pos_embedding", "patch_embed.proj": "conv_proj",
            "\nnorm.": "\nencoder.ln.", "blocks.": "encoder.layers.encoder_layer_", "norm1.": "ln_1.",
            "norm2.": "ln_2.", "attn.qkv.": "self_attention.in_proj_",
            "attn.proj.": "self_attention.out_proj.", "mlp.fc1.": "mlp.0.", "mlp.fc2.": "mlp.3."}.items():
        assert timm in names
        names = names.replace(timm, torchvisions)
    theirs.load_state_dict(dict(zip(names.split(), f.state_dict().values())), strict=True)
    x = normal(2, 3, 64, 64)
    close(f(x), theirs(x))
    grid = F.interpolate(f.pos_embed[:, 1:].mT.unflatten(2, (4, 4)), (2, 3), mode="bicubic")
    wide = normal(2, 3, 32, 48)
    close(f.tokens(wide)[:, 1:], f.patch_embed.proj(wide).flatten(2).mT + grid.flatten(2).mT)
    close(f.get_intermediate_layers(x, 4)[-1][:, 0], f(x))
    close(f.get_last_selfattention(x).sum(-1), torch.ones(2, 3, 17).double())

def naive_scan(op, v, p):
    """The recurrence of SS2D, pixel after pixel, of a map v (B, H, W, D) with p its r, write and read."""
    B, H, W, D = v.shape
    rows = [(h, w) for h in range(H) for w in range(W)]
    columns = [(h, w) for w in range(W) for h in range(H)]
    z = op.Ds.view(4, D).sum(0) * v
    for k, path in enumerate([rows, columns, rows[::-1], columns[::-1]]):
        A = -op.A_logs.view(4, D)[k].exp()
        state, y = 0, {}
        for h, w in path:
            r, write, read = p[:, h, w, k].tensor_split([-2, -1], 1)
            delta = F.softplus(r @ op.dt_projs_weight[k].T + op.dt_projs_bias[k])
            state = (delta * A).exp() * state + delta * write * v[:, h, w]
            y[h, w] = read * state
        z = z + torch.stack([y[pixel] for pixel in rows], 1).view(B, H, W, D)
    return z

# claim 8: VMamba's operator and its gradients are the recurrence of its paper, pixel after pixel, on any map.
@pytest.mark.parametrize("H, W", [(1, 1), (1, 7), (7, 1), (5, 5), (9, 13)])
def test_the_scan_is_the_recurrence(H, W):
    op, x = vmamba.SS2D(32).double(), normal(2, H, W, 32)
    for i, p in enumerate(op.parameters()):
        p.data = 0.5 * normal(*p.shape, seed=i)  # so large that every term counts
    v = (x @ op.in_proj.weight.T).permute(0, 3, 1, 2)
    v = F.silu(F.conv2d(v, op.conv2d.weight, padding=1, groups=32)).permute(0, 2, 3, 1)
    z = naive_scan(op, v, torch.einsum("kcd,bhwd->bhwkc", op.x_proj_weight, v))
    z = F.layer_norm(z, (32,), op.out_norm.weight, op.out_norm.bias) @ op.out_proj.weight.T
    ours = op(x)
    close(ours, z)
    weights = list(op.parameters())
    close(torch.autograd.grad(ours.sin().sum(), weights), torch.autograd.grad(z.sin().sum(), weights))

# claim 8: the scan sums half precision in float32, and keeps the digits of a small time step.
@pytest.mark.parametrize("bias", [-1.0, -14.0])  # a time step of about 1e-6
def test_the_scan_sums_half_precision_in_float32(bias):
    op, v = vmamba.SS2D(32), normal(2, 9, 9, 32).bfloat16()
    op.x_proj_weight.data = torch.eye(4, 32).expand(4, 4, 32).clone()  # r, B and C are features: exact
    op.dt_projs_bias.data = normal(4, 32).float() + bias
    op.Ds.data.zero_()
    with torch.autocast("cpu", torch.bfloat16):
        z = op.selective_scan(v)
    v = v.double()
    naive = naive_scan(op.double(), v, v[..., None, :4].expand(2, 9, 9, 4, 4))
    close(z / naive.abs().max().float(), (naive / naive.abs().max()).float(), 1e-5)

# claim 7: VMamba's 274 tensors have the original's names, shapes and order.
def test_the_274_tensors_of_vmamba():
    shapes = {}

    def layer(name, *weight):
        shapes[f"{name}.weight"] = weight
        shapes[f"{name}.bias"] = weight[:1]
    for i, weight in ((0, (48, 3, 3, 3)), (2, (48,)), (5, (96, 48, 3, 3)), (7, (96,))):
        layer(f"patch_embed.{i}", *weight)
    for i, (D, depth) in enumerate([(96, 2), (192, 2), (384, 8), (768, 2)]):
        for block in (f"layers.{i}.blocks.{j}" for j in range(depth)):
            layer(f"{block}.norm", D)
            shapes[f"{block}.op.x_proj_weight"] = 4, D // 16 + 2, D
            shapes[f"{block}.op.dt_projs_weight"] = 4, D, D // 16
            shapes[f"{block}.op.dt_projs_bias"] = 4, D
            shapes[f"{block}.op.A_logs"] = 4 * D, 1
            shapes[f"{block}.op.Ds"] = 4 * D,
            layer(f"{block}.op.out_norm", D)
            shapes[f"{block}.op.in_proj.weight"] = D, D
            shapes[f"{block}.op.conv2d.weight"] = D, 1, 3, 3
            shapes[f"{block}.op.out_proj.weight"] = D, D
            layer(f"{block}.norm2", D)
            layer(f"{block}.mlp.fc1", 4 * D, D)
            layer(f"{block}.mlp.fc2", D, 4 * D)
        if i < 3:
            layer(f"layers.{i}.downsample.1", 2 * D, D, 3, 3)
            layer(f"layers.{i}.downsample.3", 2 * D)
    layer("classifier.norm", 768)
    with torch.device("meta"):
        found = clever.build_backbone("vmamba_tiny", 224).state_dict()
    assert len(shapes) == 274
    assert [(name, tuple(p.shape)) for name, p in found.items()] == list(shapes.items())

# ======== Runs

def flags(out, **options):
    """The command line of a tiny run, 12 steps on 24 images, with these options over it."""
    words = ["--out", str(out)]
    for name, value in {**TINY, **options}.items():
        words += [clever.flag(name), str(value)]
    return words

def child(argv, output, patch, env):
    """Body of a process: clever.py's main, with its output in a file and perhaps a fault in its code."""
    for number in (1, 2):
        os.dup2(os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    os.environ.update(env)
    multiprocessing.set_start_method("fork", force=True)  # so that a loader's workers have the fault too
    exec(patch, dict(vars(clever), clever=clever, itertools=itertools))
    os._exit(clever.main(argv))

def before(name, code):
    """A fault for `child`: a function does this first; n counts its calls from 0."""
    name = name if "." in name else f"clever.{name}"
    return f"""
def faulty(*args, real={name}, count=itertools.count()):
    n = next(count)
    {code}
    return real(*args)
{name} = faulty
"""

def start(argv, output, patch="", **env):
    p = CHILDREN.Process(target=child, args=([str(word) for word in argv], str(output), patch, env))
    p.start()
    return p

def two_processes():
    """The environment of each of two processes, as torchrun makes it."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    env = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    return [dict(env, RANK=rank, LOCAL_RANK=rank) for rank in "01"]

def log(folder):
    path = folder / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)

def same_run(*folders):
    """Two runs ended with bit-identical weights, centres, optimisers and steps, and logged the same steps."""
    states = [(checkpoint(folder), torch.load(folder / "backbone.pt")) for folder in folders]
    close(*(torch.utils._pytree.tree_leaves(state) for state in states), 0)
    assert {line["step"] for line in log(folders[0])} <= {line["step"] for line in log(folders[1])}

def resume(folder):
    return clever.main(["--out", str(folder), "--resume"])

def files_of(*folders):
    """All files below some folders and when they were written."""
    return {(str(path), path.lstat().st_mtime_ns) for folder in folders for path in folder.rglob("*")}

def pictures(folder, count, red=90):
    """Files of noise, 36 to 40 px wide, with this much red."""
    folder.mkdir(parents=True)
    for n in range(count):
        gen = torch.Generator().manual_seed(n)
        pixels = torch.randint(90, 160, (3, 34, 36 + n % 5), generator=gen, dtype=torch.uint8)
        pixels[0] = red
        TF.to_pil_image(pixels).save(folder / f"{n:02}.jpg")
    return folder

def labelled_pictures(folder, train=12, val=4, red=(10, 250)):
    """A folder of two classes: <folder>/{train,val}/{a,b}/00.jpg, ..."""
    for part, count in (("train", train), ("val", val)):
        for label, much in zip("ab", red):
            pictures(folder / part / label, count, much)
    return folder

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """24 images without labels in a folder of a folder."""
    return pictures(tmp_path_factory.mktemp("data") / "photos" / "some", 24).parent

@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    return labelled_pictures(tmp_path_factory.mktemp("labelled"))

@pytest.fixture(scope="module")
def base(data, tmp_path_factory):
    """A run that was never stopped."""
    folder = tmp_path_factory.mktemp("base")
    assert finish(start(flags(folder / "run", data=data), folder / "said")) == [0]
    return folder / "run"

# claim 14: `python clever.py` says what it will do, trains on its own patterns, compares, leaves its files.
def test_the_demo(tmp_path):
    fewer = f"real = clever.draw_patterns; os.chdir({str(tmp_path)!r})\n" \
            "clever.draw_patterns = lambda count, seed: real(count // 32, seed)"
    assert finish(start(["--epochs", 2], tmp_path / "said", fewer)) == [0]
    said = (tmp_path / "said").read_text()
    (folder,) = (tmp_path / "runs").iterdir()
    for words in ("clever, vit_micro of 0.5M parameters, caug, 1 x cpu", "patterns: 128 images, 10 classes",
                  "2 epochs of 2 steps of 64 images", "writes to runs/patterns-clever-caug", "from step 0"):
        assert words in said.split("epoch 1.00")[0]
    assert said.count("\nepoch ") == 2 and "\r" not in said
    assert {f.name for f in folder.iterdir()} - {"lock"} == {
        "config.json", "log.jsonl", "crops.png", "checkpoint.pt", "backbone.pt", "compare.json"}
    assert all(f"| {what}" in said for what in ("k-NN, upright", "k-NN, rotated", "R2 of the angle"))
    assert f"\nNext: python eval_linear.py runs/{folder.name} --quick\n" in said

# claim 14: a line of log.jsonl every some steps, with the collapse metrics at each epoch's end; without a
# terminal a line is printed after a minute, also within an epoch.
# claim 15: images without labels, anywhere below a folder, train, without a comparison.
def test_what_a_run_logs_and_prints(data, tmp_path, monkeypatch, capsys):
    clock = argparse.Namespace(monotonic=itertools.count(0, 61).__next__, strftime=time.strftime)
    monkeypatch.setattr(clever, "time", clock)
    monkeypatch.setattr(clever, "LOG_EVERY", 2)
    assert clever.main(flags(tmp_path / "run", data=data, epochs=1)) == 0
    said = capsys.readouterr().out
    assert said.count("\nepoch ") == 2 and "24 images, no val/: no comparison" in said
    always = {"step", "epoch", "loss", "L_CL", "L_Orth", "L_PReg", "lr", "images_per_second"}
    metrics = ("entropy", "kl_uniform", "std", "rank", "own", "other_view", "other_image")
    middle, end = log(tmp_path / "run")
    assert middle["step"] == 2 and set(middle) == always
    assert end["step"] == 3 and set(end) == always | {f"{p}_{m}" for p in ("IR", "EF") for m in metrics}

# Options over a tiny run's, beside a finished run BASE, in a folder W > what is said, or the first option is
WRONG = """--ratio 1.5; --ratio nan; --ratio 0.001 > nothing to IR; --ratio 1 > or to EF; --method dyno;
--method dino --ratio 0.8 > no split; --arch resnet81; --aug cuag; --recipe papr; --precision fp8;
--locl-views 3; --epochs ten; --epochs 0; --batch 0; --batch 25 > larger than the data; --lr inf;
--lambda-reg nan; --teacher-temp 0; --momentum 1.1; --drop-path 1; --global-size 30 > patch; --local-size 12
> patch; --out-dim 0; --local-scale 0 0.5; --weight-decay nan 0.4; --seed 99999999999999999999; --data
W/nowhere > no image; --data cifar1 > cifar10; --data W/empty > no image; --out BASE > holds a run;
--out W/bare > holds a run;
--out W/file > cannot be written; --compile > C++ compiler; --resume > no folder of a run;
--resume --out BASE --ratio 0.5 > --ratio 0.5: the run has 0.8;
--resume --out BASE --batch 4 > --batch 4: the run has 8"""

# claim 16: a wrong option is refused in one sentence with exit code 2, before anything is created.
def test_wrong_options_are_one_sentence_and_create_nothing(base, data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shutil, "which", lambda name: None)  # there is no compiler
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare").mkdir()  # a run without its checkpoint
    for name in ("file", "bare/lock", "bare/backbone.pt"):
        (tmp_path / name).touch()
    before = files_of(tmp_path, base, data)
    for line in WRONG.replace("\n", " ").split("; "):
        words, _, said = line.partition(" > ")
        words = words.replace("W/", f"{tmp_path}/").replace("BASE", str(base)).split()
        argv = words if "--resume" in words else flags(tmp_path / "new", data=data) + words
        assert clever.main(argv) == 2, line
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1) and (said or words[0]) in err, (line, err)
        assert files_of(tmp_path, base, data) == before, line

# claim 15: the comparison says which backbone is which, and which images are rotated.
def test_compare_says_which_is_which(labelled):
    splits = [clever.load_images(str(labelled), part, 32) for part in ("train", "val")]
    corner = nn.Sequential(nn.Upsample(size=1), nn.Flatten())  # black in a rotated image
    blind = nn.Sequential(*corner, nn.Threshold(9, 1.0))
    known = clever.compare(tiny(), *splits, blind, corner, torch.device("cpu"))
    assert known["before"]["k-NN, upright"]["all"] == 50 and known["after"]["k-NN, upright"]["all"] == 100
    assert known["after"]["k-NN, rotated"]["all"] < 80

# claim 16: so it is where fcntl and resource do not exist (Windows).
def test_without_fcntl():
    code = "import sys; sys.modules.update(fcntl=None, resource=None); import clever; clever.main(['--k'])"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.stderr == "clever.py: error: unrecognized arguments: --k\n", done

# claim 19: Ctrl-C outside of training, even while torch is imported, ends a command without a traceback.
@pytest.mark.parametrize("script", ["clever.py", "eval_linear.py"])
def test_ctrl_c_outside_of_training(tmp_path, script):
    (tmp_path / "torch.py").write_text("import signal; signal.raise_signal(signal.SIGINT)")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, HERE / script], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")

# claim 16: --help shows the values that a command would use, into a pipe too.
def test_help_shows_the_values_of_a_command():
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, HERE / "clever.py", "--method", "dino", "--help"]
    said = subprocess.run(command, env=env, capture_output=True, text=True).stdout
    for words in ("views:", "--lambda-orth", "IR, the others EF [1.0]", "[demo]"):
        assert words in re.sub(r"\s+", " ", said), said

# claim 17: without the same classes in train/ and val/ nothing begins; the crops.png of a run is no image.
def test_folders_of_images(labelled, tmp_path, capsys):
    some = shutil.copytree(labelled, tmp_path / "some")
    shutil.rmtree(some / "val" / "a")
    assert clever.main(flags(tmp_path / "run", data=some)) == 2
    assert "the classes in train/ and val/ differ" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    run = some / "train" / "a" / "run"
    assert clever.main(flags(run, data=some / "train", epochs=1)) == 0
    assert (run / "crops.png").exists() and len(clever.load_images(str(some), "train", 32)) == 24

# ======== Stopped and resumed

# claim 18: killed at any moment and resumed, a run ends with the same bits as one never stopped.
# claim 19: SIGTERM and Ctrl-C finish the step, save and end (143, 130); a second Ctrl-C ends a run at once.
# claim 22: a full disk costs a checkpoint and a warning, and the run fails if it was the last.
# claim 24: a number that is not finite stops the run, is named, and leaves the last good checkpoint.
@pytest.mark.parametrize("where, fault, code, said", [
    ("os.replace", "n == 3 and os.kill(os.getpid(), 9)", -9, ""),  # between backbone.pt and checkpoint.pt
    ("train_step", "clever.SAVE_EVERY = 0; n == 2 and signal.setitimer(0, random.random() / 25)", -14, ""),
    ("train_step", "n == 4 and signal.raise_signal(15)", 143, "stopped at step 5;"),
    ("train_step", "n == 4 and [os.kill(p.pid, 15) for p in torch.multiprocessing.active_children()] "
                   "and signal.raise_signal(15)", 143, "stopped at step 5;"),  # all of a group, workers too
    ("train_step", "n == 4 and signal.raise_signal(2)", 130, "stopped at step 5;"),
    ("train_step", "n == 4 and [signal.raise_signal(15) for _ in range(2)]", 143, "stopped at step 5;"),
    ("train_step", "n == 4 and [signal.raise_signal(2), signal.raise_signal(2)]", -2, ""),
    ("os.replace", "n == 9 and signal.raise_signal(15)", 143, ""),  # as the last checkpoint is written
    ("os.fsync", "if n == 3: raise OSError(28, 'No space left')", 0, "checkpoint.pt cannot be written"),
    ("os.fsync", "if n >= 5: raise OSError(28, 'No space left')", 2, "last checkpoint could not be written"),
    ("train_step", "n == 4 and args[0].student.heads[1].prototypes.weight.data.fill_(math.nan)", 2,
     "not finite: {"),
    ("train_step", "if n == 4: os.fsync = lambda _: os.stat('/full'); signal.raise_signal(15)", 143,
     "\nstopped\n"),
    ("save", "n == 2 and args[0].student.backbone.norm.bias.data.fill_(math.nan)", 2,
     "a weight is not finite at step 6")])
def test_a_run_with_a_fault_resumes_to_the_same_bits(base, data, tmp_path, where, fault, code, said):
    run = tmp_path / "run"
    argv = flags(run, data=data, workers=int("children" in fault))
    assert finish(start(argv, tmp_path / "said", before(where, fault))) == [code]
    text = (tmp_path / "said").read_text()
    assert said in text and "Traceback" not in text
    assert "stopped at" not in said or checkpoint(run)["step"] == 5
    assert resume(run) == 0
    same_run(base, run)

# claim 19: a signal to one of two processes stops both with a checkpoint.
# claim 20: a process that dies takes the other down, without a hang, and its reason is printed.
@pytest.mark.parametrize("fault, code, said", [
    ("signal.raise_signal(15)", 143, "stopped at step 3;"), ("os.kill(os.getpid(), 9)", -9, ""),
    ("raise ValueError('a fault of mine')", 1, "ValueError: a fault of mine")])
def test_one_of_two_processes_is_stopped_or_dies(data, tmp_path, fault, code, said):
    patch = before("epoch_metrics", f"if clever.distributed()[0] == 1: {fault}")
    argv = flags(tmp_path / "run", data=data, epochs=1000)
    codes = finish(*(start(argv, tmp_path / "said", patch, **env) for env in two_processes()))
    assert codes[1] == code and codes[0] not in (None, 0) and said in (tmp_path / "said").read_text()
    assert checkpoint(tmp_path / "run")["step"] == (3 if code == 143 else 0)

# claim 23: nodes that find different images are refused, as are those that find different checkpoints.
@pytest.mark.parametrize("fault", ["data.labels = data.labels[:20]", "t.step = 3"])
def test_nodes_that_found_different_things_are_refused(base, tmp_path, fault):
    run = shutil.copytree(base, tmp_path / "run")
    patch = f"""
def faulty(t, data, out, real=clever.restore):
    real(t, data, out)
    if clever.distributed()[0] == 1:
        {fault}
clever.restore = faulty
"""
    argv = ["--out", run, "--resume"]
    codes = finish(*(start(argv, tmp_path / "said", patch, **env) for env in two_processes()))
    assert codes == [2, 2] and "different --data or checkpoints" in (tmp_path / "said").read_text()

# claim 21: one process at a time writes to a folder; another one gets a sentence.
def test_a_second_process_in_the_same_folder_is_refused(base, tmp_path, capsys):
    run = shutil.copytree(base, tmp_path / "run")
    _, lock = clever.open_folder(clever.parse(["--out", str(run), "--resume"]))
    p = start(["--out", run, "--resume"], tmp_path / "said")
    assert finish(p) == [2] and "another process" in (tmp_path / "said").read_text()
    lock.release()
    assert resume(run) == 0

# claim 18: a run goes on with data that moved.
def test_a_run_resumes_with_data_that_moved(base, data, tmp_path):
    run = shutil.copytree(base, tmp_path / "run")
    moved = shutil.copytree(data, tmp_path / "moved")
    assert clever.main(["--out", str(run), "--resume", "--data", str(moved)]) == 0

class Payload:
    """Something that runs code when a pickle loader reads it."""

    def __reduce__(self):
        return os.mkdir, ("executed",)

# claim 23: a foreign or damaged checkpoint.pt or config.json is refused in one sentence; no code of it runs.
@pytest.mark.filterwarnings("ignore")
def test_what_does_not_fit_is_not_resumed(base, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = shutil.copytree(base, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())

    def refused(said):
        assert resume(run) == 2, said
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and said in err, (said, err)
        assert log(run) == log(base)

    state = checkpoint(base)
    flat = copy.deepcopy(state["optimizer"])
    flat["state"][0]["exp_avg"] = torch.zeros(3)
    foreign = [Payload(), torch.zeros(3), {}]
    for part in (dict(teacher={}), dict(optimizer=[]), dict(optimizer=flat), dict(step="x"), dict(step=999),
                 dict(step=-1)):
        foreign.append({**state, **part})
    for content in foreign:
        torch.save(content, run / "checkpoint.pt")
        refused("checkpoint.pt")
    (run / "checkpoint.pt").write_bytes((base / "checkpoint.pt").read_bytes()[:99999])
    refused("checkpoint.pt")
    shutil.copy(base / "checkpoint.pt", run)
    for name, value in dict(data=str(pictures(tmp_path / "more", 25)), lr="fast", lr_=1, aug="cuag",
                            out_dim=128, local_scale=["a", "b"], global_scale=[0.4]).items():
        (run / "config.json").write_text(json.dumps({**config, name: value}))
        refused("saw 24 images" if name == "data" else "")
    assert not (tmp_path / "executed").exists()

# ======== What goes wrong on the way

# claim 22: a log that cannot be written, a terminal that is closed, full or without umlauts stop nothing.
@pytest.mark.parametrize("end", ["None", "open('/dev/full', 'w')", "open(os.devnull, 'w', encoding='ascii')"])
def test_a_log_and_a_terminal_that_cannot_be_written(data, tmp_path, end):
    (tmp_path / "größe").mkdir()
    (tmp_path / "größe" / "log.jsonl").symlink_to("/dev/full")
    argv = flags(tmp_path / "größe", data=data, epochs=1)
    assert finish(start(argv, tmp_path / "said", f"sys.stdout = {end}")) == [0]

# claim 22: neither does a stderr that is full or closed, with a broken image to name; errors still end a run.
@pytest.mark.parametrize("end", ["2>/dev/full", "2>&-"])
def test_a_stderr_that_cannot_be_written(data, tmp_path, end):
    photos = shutil.copytree(data, tmp_path / "photos")
    (photos / "broken.jpg").write_text("no image")
    words = flags(tmp_path / "run", data=photos, epochs=1, workers=1)
    for more, code in ((), 0), (("--resume", "--batch", "4"), 2):
        argv = [sys.executable, str(HERE / "clever.py"), *words, *more]
        command = " ".join(map(shlex.quote, argv)) + f" {end}"
        assert subprocess.run(command, shell=True, stdout=subprocess.DEVNULL, timeout=300).returncode == code

# claim 26: memory and open files do not grow while a run goes on.
def test_memory_and_open_files_do_not_grow(data, tmp_path, monkeypatch):
    seen = []
    real = clever.epoch_metrics

    def watch(t):
        seen.append((int(Path("/proc/self/statm").read_text().split()[1]), len(os.listdir("/proc/self/fd"))))
        return real(t)
    monkeypatch.setattr(clever, "epoch_metrics", watch)
    assert clever.main(flags(tmp_path / "run", data=data, batch=4, epochs=10, local_views=0)) == 0
    (pages, files), (pages_end, files_end) = seen[1], seen[-1]
    assert (pages_end - pages) * os.sysconf("SC_PAGE_SIZE") < 3e6 and files_end <= files

# claim 27: images of every common mode are read in their colours, turned as their EXIF says.
def test_images_of_every_mode_are_read_in_their_colours(tmp_path):
    orange = (200, 90, 40)
    luma = (117, 117, 117)
    rgb = Image.new("RGB", (60, 40), orange)
    deep = Image.new("I;16", (60, 40), 117 * 256)
    other_end = Image.frombytes("I;16B", (60, 40), bytes([117, 0]) * 60 * 40)
    for name, image, colour in [
            ("cmyk.jpg", rgb.convert("CMYK"), orange), ("palette.png", rgb.quantize(4), orange),
            ("grey.jpg", rgb.convert("L"), luma), ("grey alpha.png", rgb.convert("LA"), luma),
            ("alpha.png", Image.new("RGBA", (60, 40), (*orange, 0)), orange), ("größe.jpg", rgb, orange),
            ("one bit.png", Image.new("1", (60, 40), 1), (255, 255, 255)), ("16 bit.png", deep, luma),
            ("16 bit.tif", deep, luma), ("big.tif", other_end, luma),
            ("narrow.png", rgb.resize((1, 500)), orange)]:
        image.save(tmp_path / name)
        pixels, aspect = clever.decode(str(tmp_path / name), 32)
        assert pixels.dtype == torch.uint8 and aspect == image.width / image.height
        close(pixels.double(), torch.tensor(colour)[:, None, None].expand(3, 32, 32).double(), 6)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: its dark left half comes above
    halves = Image.new("L", (60, 40), 255)
    halves.paste(0, (0, 0, 30, 40))
    halves.save(tmp_path / "turned.jpg", exif=exif)
    pixels, aspect = clever.decode(str(tmp_path / "turned.jpg"), 32)
    assert aspect == 40 / 60 and pixels[:, :15].max() < 10 and pixels[:, 17:].min() > 245

# claim 27: truncated files, pipes, bombs, 32-bit pixels, ... are replaced, and named with the cause.
def test_broken_images_are_replaced_and_named(data, tmp_path, capsys):
    photos = shutil.copytree(data, tmp_path / "photos")
    (photos / "truncated.jpg").write_bytes((data / "some" / "00.jpg").read_bytes()[:300])
    (photos / "dangling.jpg").symlink_to("nowhere")
    os.mkfifo(photos / "pipe.jpg")
    Image.new("1", (20_000, 20_000)).save(photos / "bomb.png")
    Image.new("I", (40, 40), 1 << 20).save(photos / "deep.tif")
    assert clever.main(flags(tmp_path / "run", data=photos, batch=16, epochs=2)) == 0
    err = capsys.readouterr().err
    for name in ("truncated", "dangling", "pipe", "bomb", "deep"):
        assert re.search(rf"warning: \S+/{name}\.\w+ cannot be read \(\S", err), (name, err)

# claim 27: a hundred broken images in a row end the run in one sentence, out of a loader's worker too.
def test_a_hundred_broken_images_in_a_row_end_the_run(tmp_path):
    photos = pictures(tmp_path / "photos", 1)
    (photos / "00.jpg").write_text("no image")
    argv = flags(tmp_path / "run", data=photos, batch=1, workers=1)
    assert finish(start(argv, tmp_path / "said")) == [2]
    said = (tmp_path / "said").read_text()
    assert said.count("a hundred images in a row") == 1 and "Traceback" not in said

# ======== Evaluation

def untrained(folder, data="patterns", **options):
    """A run as clever.py leaves it, of an untrained backbone."""
    cfg = tiny(data=str(data), out=str(folder), **options)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(vars(cfg)))
    torch.save(clever.CLeVER(cfg).backbone.state_dict(), folder / "backbone.pt")
    return folder

def evaluate(*argv):
    """An evaluation in this process; its exit code."""
    return eval_linear.main([str(word) for word in argv])

def refused(capsys, *argv):
    """What is said of a command that must be refused: one sentence, exit code 2."""
    code = evaluate(*argv)
    said = capsys.readouterr()
    assert (code, said.out, said.err.count("\n")) == (2, "", 1), (argv, said)
    return said.err

def sections(folder):
    return json.loads((folder / "eval.json").read_text())

def planted(count, seed):
    """20 features, the first 16 (IR) of the class, the others (EF) of the angle; angles; labels."""
    labels = torch.arange(count) % 4
    angle = normal(count, seed=seed).erf().float() * 90
    ir = 3 * F.one_hot(labels, 16) + 0.5 * normal(count, 16, seed=seed)
    circle = torch.stack([angle.deg2rad().cos(), angle.deg2rad().sin()], 1)
    z = torch.cat([ir, circle.repeat(1, 2) + 0.1 * normal(count, 4, seed=seed)], 1)
    return z.float(), angle, labels

def probe(z, y, *options):
    """The linear probes of planted features, {part: (learning rate, head)}, and the columns of each part."""
    model = argparse.Namespace(device=torch.device("cpu"), cfg=tiny(), linear_columns=clever.columns(20, 0.8),
                               requires_grad_=lambda wanted: None)
    data = clever.Images(8, y, list("0123"), pixels=torch.zeros(len(y), 3, 8, 8, dtype=torch.uint8))
    p = eval_linear.parse(["RUN", "--quick", *options])
    return eval_linear.train_probes(p, model, data, z), model.linear_columns

# claim 29: a class planted in IR and an angle planted in EF are found there and not in the other part.
def test_planted_class_and_angle_are_found():
    z, angle, y = planted(1000, 0)
    z_val, angle_val, y_val = planted(500, 1)
    probes, columns = probe(z, y, "--epochs", "10")
    for part, i in columns.items():
        linear, = eval_linear.accuracy(probes[part][1](z_val[:, i]), y_val)
        near, = eval_linear.accuracy(clever.knn(z[:, i], y, z_val[:, i], 4), y_val)
        r2 = clever.ridge_r2(z[:, i], angle, z_val[:, i], angle_val)
        assert max(linear, near) < 33 if part == "EF" else min(linear, near) > 95
        assert abs(r2) < 0.1 if part == "IR" else r2 > 0.9

# claim 29: k-NN votes and the R2 of the angle equal naive ones; a class without votes is no hit.
def test_knn_and_ridge_equal_naive_ones():
    bank, queries, labels = normal(60, 5), normal(9, 5, seed=1), torch.arange(60) % 3
    votes = clever.knn(bank, labels, queries, 3, k=7)
    for query, row in zip(queries, votes):
        cosine = [float(query @ b / query.norm() / b.norm()) for b in bank]
        naive = [0.0] * 3
        for n in sorted(range(60), key=lambda n: -cosine[n])[:7]:
            naive[labels[n]] += math.exp((cosine[n] - 1) / 0.07)
        close(row, torch.tensor(naive).double(), 1e-6)
    votes = torch.tensor([[3.0, 0, 0, 2, 0, 0], [0, 0, 0, 0, 0, math.nan]])
    assert eval_linear.accuracy(votes, torch.tensor([3, 5])) == [0, 50]
    assert eval_linear.accuracy(votes, torch.tensor([1, 0])) == [0, 0]
    x, x_test = normal(60, 5), normal(40, 5, seed=2)
    angles = 50 * normal(60), 50 * normal(40, seed=3)
    y, y_test = (torch.stack([torch.cos(a * math.pi / 180), torch.sin(a * math.pi / 180)], 1) for a in angles)
    a, b = ((some - x.mean(0)) / (x.std(0) + 1e-6) for some in (x, x_test))
    w = torch.linalg.inv(a.T @ a + 60 * 0.01 * torch.eye(5)) @ a.T @ (y - y.mean(0))
    r2 = 1 - (y_test - y.mean(0) - b @ w).pow(2).sum(0) / (y_test - y_test.mean(0)).pow(2).sum(0)
    assert clever.ridge_r2(x, angles[0], x_test, angles[1]) == pytest.approx(float(r2.mean()), abs=1e-9)

# claim 29: probes side by side equal probes trained one by one; held-out images choose the learning rates.
def test_probes_side_by_side_equal_probes_one_by_one():
    z, _, y = planted(96, 0)
    z = z + 4 * normal(96, 20, seed=5).float()  # hard: the training rows would choose another rate
    rates = [0.01, 0.1, 1.0, 3.0]
    probes, columns = probe(z, y, "--epochs", "2", "--batch", "16", "--lr", *map(str, rates))
    order = torch.randperm(96, generator=clever.generator("cpu", 0, "held out"))
    held, rows = order[:10], order[10:]
    batches = list(clever.batches(86, clever.Config(batch=16), 0, 10))
    gen = clever.generator("cpu", 0, "head")
    for part, i in columns.items():
        best = -1, 0.0
        for rate in rates:
            head = nn.Linear(len(i), 4).double()
            head.weight.data = (0.01 * torch.randn(4, len(i), generator=gen)).double()
            head.bias.data.zero_()
            optimizer = torch.optim.SGD(head.parameters(), momentum=0.9)
            for step, some in enumerate(batches):
                optimizer.param_groups[0]["lr"] = rate * 16 / 256 * (1 + math.cos(math.pi * step / 10)) / 2
                optimizer.zero_grad()
                F.cross_entropy(head(z[rows[some]][:, i].double()), y[rows[some]]).backward()
                optimizer.step()
            scores = head(z[held][:, i].double())
            hits = int((scores.argmax(1) == y[held]).sum())
            quality = hits, -F.cross_entropy(scores, y[held]).item()
            if quality > best:
                best, best_rate, best_head = quality, rate, head
        assert probes[part][0] == best_rate
        close([p.double() for p in probes[part][1].parameters()], list(best_head.parameters()), 1e-4)

# claim 29: IR and EF are dimensions of the last representation; a linear probe on all sees four CLS tokens.
def test_what_the_probes_see():
    net = clever.build_backbone("vit_micro", 32)
    model = eval_linear.Representation(net, tiny(), eval_linear.parse(["RUN"]), torch.device("cpu"))
    x = torch.randn(2, 3, 32, 32)
    features = model(x)
    close(features, torch.cat([layer[:, 0] for layer in net.get_intermediate_layers(x, 4)], 1))
    ir, ef = clever.split(net(x), 0.8)
    for columns in (model.knn_columns, model.linear_columns):
        close([features[:, columns["IR"]], features[:, columns["EF"]]], [ir, ef])
    close(features[:, model.knn_columns["all"]], net(x))
    close(features[:, model.linear_columns["all"]], features)

# claim 30: each perturbation of the test images is what its name says.
@pytest.mark.parametrize("kind", eval_linear.TABLE)
def test_perturbations_are_what_their_names_say(monkeypatch, kind):
    p = spy(monkeypatch, "warp", "color_jitter", "elastic_shift")
    images = torch.zeros(4000, 3, 8, 8, dtype=torch.uint8)
    eval_linear.make_view(images, torch.ones(4000), 8, clever.generator("cpu", 0), **eval_linear.KINDS[kind])
    happens(p["flip"], 0.5 * ("flip" in kind))
    if "rot" in kind:
        uniform(p["angle"], -90, 90)
    else:
        assert not p["angle"].any()
    assert ("alpha" in p) == ("elastic" in kind)
    if "elastic" in kind:
        assert p["alpha"] == pytest.approx(100 * 8 / 224)
    assert ("hue" in p) == ("cj" in kind)
    if "cj" in kind:
        uniform(p["hue"], -0.1, 0.1)
        for name in ("brightness", "contrast", "saturation"):
            uniform(p[name], 0.6, 1.4)

def probes_of(rank, world, folder):
    """Features and linear probes as one of `world` processes finds them, into a file."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if world > 1:
        dist.init_process_group("gloo", f"file://{folder}/meeting-{world}", rank=rank, world_size=world)
    images = clever.Images(32, torch.arange(40) % 2, ["a", "b"], pixels=clever.draw_patterns(40, 0)[0])
    p = eval_linear.parse("RUN --epochs 2 --batch 12 --lr 0.1".split())
    net = clever.build_backbone("vit_micro", 32)
    model = eval_linear.Representation(net, tiny(), p, torch.device("cpu"))
    bank = eval_linear.extract(model, images, "cj+rot")
    probes = eval_linear.train_probes(p, model, images, bank)
    heads = {part: head.state_dict() for part, (_, head) in probes.items()}
    torch.save([bank, heads], f"{folder}/{world}-{rank}.pt")

# claim 28: features and linear probes do not depend on the number of processes.
def test_probes_of_two_processes_equal_those_of_one(tmp_path):
    probes_of(0, 1, tmp_path)
    for result in results_of(probes_of, 2, tmp_path):
        close(result, torch.load(tmp_path / "1-0.pt"), 1e-5)

# claim 28: --labels draws equally many images of each class, the same for a seed.
def test_a_draw_of_labels_is_fixed_and_balanced():
    labels = torch.arange(1000) % 10
    draws = [eval_linear.balanced_draw(labels, 0.1, seed) for seed in (0, 0, 1)]
    assert labels[draws[0]].bincount().tolist() == [10] * 10
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])

# claim 31: weights load from the layouts of timm, DINO and this project, head or not.
def test_published_layouts_load(tmp_path):
    own = clever.build_backbone("vit_micro", 32).state_dict()
    bare = {f"backbone.{name}": value for name, value in own.items()}
    wrapped = {f"module.{name}": value for name, value in bare.items()}
    dino = dict(teacher={**wrapped, "module.head.mlp": own["cls_token"]}, args=argparse.Namespace(lr=0.1))
    timm = {**own, "head.weight": torch.zeros(10, 96)}
    argv = ["--weights", str(tmp_path / "w.pt"), "--arch", "vit_micro", "--data", "patterns"]
    for content in (own, timm, dino, dict(teacher=bare)):
        torch.save(content, tmp_path / "w.pt")
        cfg, _, loaded = eval_linear.open_model(eval_linear.parse(argv))
        assert cfg.global_size == 32
        assert all(torch.equal(value, own[name]) for name, value in loaded.state_dict().items())

# claim 31: the size of a ViT's patches and the stem of a ResNet are found in the file.
@pytest.mark.parametrize("arch, size, patch", [
    ("vit_tiny", 32, 8), ("resnet18", 32, None), ("resnet18", 224, None)])
def test_patch_and_stem_are_found_in_the_file(tmp_path, arch, size, patch):
    weights = clever.build_backbone(arch, size, patch_size=patch).state_dict()
    torch.save({**weights, "fc.bias": torch.zeros(10)}, tmp_path / "w.pt")
    argv = ["--weights", str(tmp_path / "w.pt"), "--arch", arch, "--data", "patterns"]
    cfg, _, loaded = eval_linear.open_model(eval_linear.parse(argv))
    assert cfg.global_size == size
    close(loaded.state_dict(), weights, 0)

# claim 31: a file that does not fit, runs code, or is of safetensors is refused in one sentence that helps.
def test_wrong_weights_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = clever.build_backbone("vit_micro", 32).state_dict()
    torch.save(dict(teacher=own, more=Payload()), "code.pt")
    torch.save({name: value for name, value in own.items() if "qkv" not in name}, "part.pt")
    torch.save({**own, "odd": torch.zeros(1)}, "odd.pt")
    Path("w.safetensors").write_bytes(b"x")
    for name, words in {"code.pt": "mkdir", "part.pt": "blocks.0.attn.qkv.weight", "odd.pt": '"odd"',
                        "none.pt": "FileNotFound",
                        "w.safetensors": "torch.save(safetensors.torch.load_file(A), B)"}.items():
        said = refused(capsys, "--weights", name, "--arch", "vit_micro", "--data", "patterns")
        assert words in said and name in said, said
    assert not Path("executed").exists() and not Path("eval.json").exists()

# Words of capitals, but for EF, are names in a folder
WRONG_EVALUATIONS = """NONE > no folder of a run; --weights A.pt --data patterns > --arch;
--weights A.pt --arch vit_tiny > --data; --weights RUN/backbone.pt --arch vit_tini --data patterns > vit_tini;
RUN --quik > --quik; RUN --epochs ten > --epochs; RUN --epochs 0 > greater than 0;
RUN --lr 0.1 inf > greater than 0; RUN --labels nan > --labels; RUN --labels 2 > at most 1;
RUN --parts iv > invalid choice; RUN --arch vit_tiny > --arch would be ignored;
RUN --ratio=1 > --ratio=1 would be ignored; RUN --weights A.pt > --weights would be ignored;
RUN --finetune --parts all > --parts would be ignored; RUN --finetune --quick > --quick would be ignored;
RUN --finetune --lr 1 > --lr would be ignored; RUN --davis ODD --epochs 100 > --epochs would be ignored;
RUN --data ODD > classes; RUN --out RUN/config.json > cannot be written; DINO --parts EF > no split;
DINO --parts all EF > no split; RUN --davis ODD > layout of DAVIS; NET --visualize x > ViT;
RUN --visualize HOLE/val/a/00.jpg > cannot be read; RUN --workers 2000 > at most 1024;
--weights A.pt --arch vit_tiny --data patterns --finetune --ratio 0.8 > --ratio would be ignored;
BARE > backbone.pt; OLD --out OLD > eval.json;
RUN --data HOLE --out RUN --workers 0 > val/a/00.jpg cannot be read"""

# claim 30: a wrong option, or one that would be ignored, is one sentence, exit code 2, nothing written.
# claim 27: so is a broken test image.
def test_wrong_evaluations_are_refused(labelled, tmp_path, capsys):
    untrained(tmp_path / "RUN", labelled)
    untrained(tmp_path / "DINO", labelled, method="dino")
    untrained(tmp_path / "NET", labelled, arch="resnet18")
    (untrained(tmp_path / "BARE") / "backbone.pt").unlink()
    (labelled_pictures(tmp_path / "ODD", 1, 1) / "val" / "b").rename(tmp_path / "ODD" / "val" / "c")
    (labelled_pictures(tmp_path / "HOLE", 1, 1) / "val" / "a" / "00.jpg").write_text("no image")
    (untrained(tmp_path / "OLD", labelled) / "eval.json").write_text("[1, 2]")
    before = files_of(tmp_path)
    for line in WRONG_EVALUATIONS.replace("\n", " ").split("; "):
        command, _, words = line.partition(" > ")
        argv = [re.sub("^[A-Z]{3,}(?=$|/)", f"{tmp_path}/\\g<0>", word) for word in command.split()]
        if "--out" not in argv:
            argv += ["--out", tmp_path / "new" / "folder"]
        assert words in refused(capsys, *argv)
        assert files_of(tmp_path) == before, line

# claim 30: one command prints and writes the table of parts and perturbations.
# claim 28: every seed and number of processes sees the same test images.
def test_one_command_writes_the_table_and_two_processes_agree(tmp_path, capsys):
    data = labelled_pictures(tmp_path / "data", 30, 140, red=(118, 132))  # 280 test images: two chunks
    run = untrained(tmp_path / "run", data)
    argv = [run, *"--epochs 3 --batch 16 --lr 0.01 0.1 --workers 0".split()]
    command = [sys.executable, HERE / "eval_linear.py", *argv, "--seed", "1", "--out", tmp_path / "two"]
    ranks = [subprocess.Popen(command, env={**os.environ, **env}) for env in two_processes()]
    assert [p.wait(300) for p in ranks] == [0, 0]
    assert evaluate(*argv) == 0 and "| cj+rot+elastic " in capsys.readouterr().out
    one, two = sections(run), sections(tmp_path / "two")
    options = "epochs=3 batch=16 lr=[0.01, 0.1]"
    assert list(one) == [f"probes {options}", f"rotation {options}"]
    assert list(two) == [name.replace(" ", f" run={run} ", 1) + " seed=1" for name in one]
    for part in ("all", "IR", "EF"):
        a = one[f"probes {options}"][f"k-NN {part}"]
        b = two[f"probes run={run} {options} seed=1"][f"k-NN {part}"]
        assert list(a) == ["orig", "cj", "cj+flip", "cj+rot", "cj+rot+elastic"]
        assert all(a[kind] == pytest.approx(b[kind], abs=0.4) for kind in a)  # one image

# claim 30: other evaluations add sections; those of before, and the run, stay.
# claim 32: fine-tuning trains the backbone of its own copy.
def test_sections_are_added_and_the_run_is_left_alone(labelled, tmp_path):
    run = untrained(tmp_path / "run", labelled)
    before = (run / "backbone.pt").read_bytes()
    common = ("--epochs", 3, "--batch", 8, "--workers", 0)
    assert evaluate(run, *common, "--quick", "--curve") == 0
    first = sections(run)
    probes = first["probes quick=True epochs=3 batch=8 curve=True"]
    assert set(probes["linear EF"]) == set(eval_linear.KINDS)
    assert evaluate(run, *common, "--finetune", "--labels", 0.5) == 0
    weights = ("--weights", run / "backbone.pt", "--arch", "vit_micro", "--ratio", 0.8, "--data", labelled)
    assert evaluate(*weights, *common, "--quick", "--parts", "IR", "--out", run) == 0
    saved = sections(run)
    assert {name: saved[name] for name in first} == first
    assert saved["finetune labels=0.5 epochs=3 batch=8"]["linear all"]["orig"][0] > 90
    other, = (saved[name] for name in saved if f"weights={run / 'backbone.pt'}" in name and "probes" in name)
    assert other["k-NN IR"] == {kind: probes["k-NN IR"][kind] for kind in eval_linear.TABLE}
    assert "k-NN EF" not in other and (run / "backbone.pt").read_bytes() == before

# claim 32: probing leaves a backbone alone; fine-tuning changes it, but for the statistics of batch norm.
@pytest.mark.parametrize("options, changes", [(["--quick"], False), ([], False), (["--finetune"], True)])
def test_batch_norm_is_left_alone(labelled, options, changes):
    backbone = clever.build_backbone("resnet18", 32)
    before = copy.deepcopy(backbone.state_dict())
    p = eval_linear.parse(["RUN", "--epochs", "1", "--batch", "8", *options])
    model = eval_linear.Representation(backbone, tiny(arch="resnet18"), p, torch.device("cpu"))
    splits = [clever.load_images(str(labelled), part, 32) for part in ("train", "val")]
    eval_linear.evaluate(p, model, *splits)
    same = {name: torch.equal(value, before[name]) for name, value in backbone.state_dict().items()}
    assert all(same.values()) != changes and all(same[name] for name in same if "running" in name)

# claim 32: masks are carried on as a naive version does it, from the most similar places nearby.
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
    close(eval_linear.propagate(f, masks[0], last=2, k=3, radius=1), torch.stack(masks), 1e-6)

# claim 32: --davis follows an object through a video in the layout of DAVIS-2017.
def test_davis_follows_an_object(tmp_path):
    for folder in ("JPEGImages/480p/toy", "Annotations/480p/toy", "ImageSets/2017"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "ImageSets/2017/val.txt").write_text("toy\n")
    for t in range(6):
        mask = torch.zeros(128, 128, dtype=torch.uint8)
        mask[32:80, 16 + 8 * t:64 + 8 * t] = 1
        TF.to_pil_image(200 * mask).save(tmp_path / f"JPEGImages/480p/toy/{t:05}.jpg")
        TF.to_pil_image(mask).save(tmp_path / f"Annotations/480p/toy/{t:05}.png")
    assert evaluate(untrained(tmp_path / "run"), "--davis", tmp_path) == 0
    saved = sections(tmp_path / "run")[f"davis davis={tmp_path}"]
    assert saved["J mean"] > 0.7 and len(saved["videos"]["toy"]) == 1

# claim 32: --visualize draws an image, components of its parts and attention of its heads, at four turns.
def test_visualize_draws_a_row_for_each_map(labelled, tmp_path):
    run = untrained(tmp_path / "run")
    assert evaluate(run, "--visualize", labelled / "train" / "a" / "00.jpg") == 0
    sheet = TF.pil_to_tensor(Image.open(run / "visualize.png")) / 255
    assert sheet.shape[1:] == (7 * 144 + 16, 4 * 144 + 16)  # image, all, IR, EF, 3 heads; tiles of 128 px
    tiles = sheet[:, 16:, 16:].unflatten(2, (4, 144)).unflatten(1, (7, 144))[:, :, :128, :, :128]
    assert (tiles.std((0, 2, 4)) > 0.01).all()  # none is empty
    assert psnr(tiles[:, 0, :, 3], tiles[:, 0, :, 0].rot90(1, (1, 2))) > 40  # turned by 90 degrees
