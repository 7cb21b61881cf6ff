"""The claims of clever.py and eval_linear.py, by the numbers of the README's list.

    pytest                      all claims, on one thread a test
    pytest -m benchmark -s      time and memory beside the published arithmetic: ratios, nothing asserted
"""
import argparse
import copy
import dataclasses
import inspect
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import time
import types
import warnings
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
import torchvision.transforms.functional as TF
from PIL import Image, ImageFilter
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode

import clever
import eval_linear

warnings.filterwarnings("ignore", category=pytest.PytestUnknownMarkWarning)  # no other file registers them
BILINEAR = InterpolationMode.BILINEAR
BICUBIC = InterpolationMode.BICUBIC
NEAREST = InterpolationMode.NEAREST
TINY = dict(arch="vit_micro", global_size=32, local_size=16, local_views=2, out_dim=64, hidden_dim=32,
            batch=8, epochs=3, lr=5e-3, precision="fp32", workers=0)

@pytest.fixture(autouse=True)
def only_on_request(request):
    """A benchmark runs where `-m` names the mark, with all threads; a test has one thread and seed 0."""
    benchmark = request.node.get_closest_marker("benchmark")
    if benchmark and "benchmark" not in request.config.option.markexpr:
        pytest.skip("runs with -m benchmark")
    torch.set_num_threads(os.cpu_count() if benchmark else 1)
    torch.manual_seed(0)

def tiny(**options):
    """A configuration of a network that runs in milliseconds."""
    return clever.Config(**{**TINY, **options})

def normal(*shape, seed=0):
    """Normal random numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

def close(a, b, tolerance=1e-10):
    """Equal but for rounding, tensors or lists and dicts of them."""
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)

def error(a, b):
    """The largest difference, relative to the largest value of b."""
    return float((a - b).detach().abs().max() / b.detach().abs().max().clamp_min(1e-300))


# ---------------- Losses ----------------

def naive_pairs(term, student, teacher, centre, student_temp=0.1, teacher_temp=0.04):
    """Mean of term(P_i, logits_j) over each global view i and each other view j: DINO's double loop."""
    P = ((teacher.detach() - centre) / teacher_temp).softmax(-1)
    logits = (student / student_temp).unbind()
    values = []
    for i in range(len(P)):
        for j in range(len(logits)):
            if i != j:
                values.append(term(P[i], logits[j]).mean())
    return sum(values) / len(values)

def naive_invariance(*args):
    return naive_pairs(lambda P, x: -(P * x.log_softmax(-1)).sum(-1), *args)

def naive_orthogonality(*args):
    return naive_pairs(lambda P, x: F.cosine_similarity(P, x.softmax(-1), -1).abs(), *args)

def naive_preg(head_ir, head_ef):
    ir = sum(p.pow(2).sum() for p in head_ir.parameters())
    ef = sum(p.pow(2).sum() for p in head_ef.parameters())
    return (ir - ef).abs()

each_loss = pytest.mark.parametrize("loss, naive", [
    (clever.invariance_loss, naive_invariance), (clever.orthogonality_loss, naive_orthogonality)])

# claim 1: L_CL and L_Orth, and their gradients, are the means over pairs of views that the paper writes.
@each_loss
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

# claim 2: the order of the images in a batch changes no loss; pairing views of different images does.
@each_loss
def test_order_and_pairing_of_the_batch(loss, naive):
    student, teacher, centre = normal(4, 6, 9), normal(2, 6, 9, seed=1), normal(9, seed=2)
    order = [2, 0, 5, 1, 3, 4]
    value = loss(student, teacher, centre)
    close(loss(student[:, order], teacher[:, order], centre), value)
    assert abs(loss(student[:, order], teacher, centre) - value) > 1e-3

# claim 1: L_Orth is 1 where all views have the same peak, and 0 where their peaks are disjoint.
def test_orthogonality_of_equal_and_disjoint_peaks():
    peaks = 50 * torch.eye(4, 8).double()  # (B, K)
    teacher, centre = peaks.expand(2, 4, 8), torch.zeros(8)
    assert clever.orthogonality_loss(peaks.expand(5, 4, 8), teacher, centre) > 1 - 1e-9
    assert clever.orthogonality_loss(peaks.roll(4, -1).expand(5, 4, 8), teacher, centre) < 1e-9

# claim 1: L_PReg is 0 for equal heads and counts every parameter of both.
def test_preg_counts_every_parameter():
    a, b = clever.ProjectionHead(6, 16, 8, 4), clever.ProjectionHead(3, 12, 8, 4)
    assert clever.projector_regularization(a, copy.deepcopy(a)) == 0
    for p in (*a.parameters(), *b.parameters()):
        before = clever.projector_regularization(a, b)
        p.data.add_(1.0)
        close(clever.projector_regularization(a, b), naive_preg(a, b), 1e-6)
        assert abs(clever.projector_regularization(a, b) - before) > 0.1


# ---------------- The representation ----------------

# claim 3: method="dino" has no split and L_CL alone, whoever builds the configuration.
def test_dino_has_no_split():
    built = tiny(method="dino"), tiny(method="dino", ratio=0.5), dataclasses.replace(tiny(), method="dino")
    assert [cfg.ratio for cfg in built] == [1.0] * 3 and tiny().ratio == 0.8
    net = clever.CLeVER(built[0])
    logits = net([torch.rand(2, 3, 32, 32)] * 2)
    terms = clever.clever_loss(built[0], logits, logits, [torch.zeros(64)], net.heads)
    assert terms.keys() == {"loss", "L_CL"} and terms["loss"] == terms["L_CL"]

# claim 7: every backbone has its paper's width and parameters, and takes views of several sizes.
@pytest.mark.parametrize("arch, D, parameters", [
    ("vit_micro", 96, 467_808), ("vit_tiny", 192, 5_524_416), ("vit_small", 384, 21_665_664),
    ("vit_base", 768, 85_798_656), ("resnet18", 512, 11_176_512), ("resnet50", 2048, 23_508_032),
    ("vmamba_tiny", 768, 29_480_064), ("convnext_tiny", 768, 27_820_128)])
def test_width_and_size_of_every_backbone(arch, D, parameters):
    with torch.device("meta"):
        f = clever.build_backbone(arch, 32 if arch == "vit_micro" else 224)
    assert f.embed_dim == D and sum(p.numel() for p in f.parameters()) == parameters
    f.to_empty(device="cpu")
    with torch.no_grad():
        for side in (32, 64):
            assert f(torch.zeros(2, 3, side, side)).shape == (2, D)

# claim 5: the student's stochastic depth grows linearly over its blocks; a teacher has neither it nor
# dropout.
@pytest.mark.parametrize("arch", ["vit_micro", "convnext_tiny", "efficientnet_b0"])
def test_the_teacher_is_not_random(arch):
    student = clever.build_backbone(arch, 32, drop_path=0.3)
    rates = [layer.p for layer in student.modules() if isinstance(layer, torchvision.ops.StochasticDepth)]
    rates += [layer.drop_path for layer in student.modules() if isinstance(layer, clever.Block)]
    assert rates == pytest.approx(torch.linspace(0, 0.3, len(rates)).tolist())
    teacher = clever.build_backbone(arch, 32)
    x = torch.rand(4, 3, 32, 32)
    assert torch.equal(teacher(x), teacher(x))

# claim 4: IR and EF together are z, and each feeds its own head; views may come in any order of sizes.
@pytest.mark.parametrize("ratio", [0.02, 0.5, 0.8, 0.99])
def test_ir_and_ef_feed_their_own_heads(ratio):
    net = clever.CLeVER(tiny(ratio=ratio, ef_out_dim=48)).double()
    views = [normal(2, 3, side, side, seed=i) for i, side in enumerate((16, 32, 16, 48, 32))]
    z = torch.stack([net.backbone(view) for view in views])
    ir, ef = clever.split(z, ratio)
    assert ir.shape[-1] == math.floor(ratio * 96) and torch.equal(torch.cat([ir, ef], -1), z)
    close(net.embed(views), z)
    close(net(views), (net.heads[0](ir), net.heads[1](ef)))

# claim 4: the head is the published one: layers of 2048, 2048 and 256, and 65,536 prototypes.
def test_the_head_is_the_designed_one():
    head = clever.ProjectionHead(154)
    shapes = [tuple(p.shape) for p in head.parameters()]
    assert shapes == [(2048, 154), (2048,), (2048, 2048), (2048,), (256, 2048), (256,), (65536, 256)]
    for p in head.parameters():
        assert abs(p.std() - 0.02) < 1e-3 if p.ndim > 1 else (p == 0).all()
    assert [type(layer) for layer in head.mlp] == [nn.Linear, nn.GELU, nn.Linear, nn.GELU, nn.Linear]


# ---------------- Collapse ----------------

def outputs(case="healthy"):
    """Features (2, 128, 32), the teacher's P and the student's Q (2, 128, 64), healthy but for the case."""
    features = normal(2, 128, 32)
    teacher = 2 * normal(128, 64, seed=1) + 2 * normal(2, 128, 64, seed=2)  # of the image, of the view
    student = teacher + normal(2, 128, 64, seed=3)
    if case == "constant features":
        features = normal(32, seed=4) + 1e-4 * features
    if case == "features on a line":
        features = normal(2, 128, 1, seed=4) * normal(32, seed=5) + 1e-6 * features
    if case == "uniform teacher":
        teacher = 1e-3 * teacher
    if case == "one prototype":
        teacher = teacher + 50 * torch.eye(1, 64)
    if case == "constant student":
        student = normal(64, seed=6).expand(2, 128, 64)
    return features, teacher.softmax(-1), student.softmax(-1)

# claim 25: each collapse is called by its name, EF's trivial solutions too, and a healthy run is left in
# peace.
@pytest.mark.parametrize("case, ir_says, ef_says", [
    ("healthy", None, None), ("constant features", "same features", "same features"),
    ("features on a line", "same features", "same features"), ("uniform teacher", "uniform", "TRIVIAL"),
    ("one prototype", "one prototype", "TRIVIAL"), ("constant student", None, "TRIVIAL")])
def test_each_alarm_rings_on_its_collapse_alone(case, ir_says, ef_says):
    metrics = clever.collapse_metrics(*outputs(case))
    for part, says in (("IR", ir_says), ("EF", ef_says)):
        alarm = clever.collapse_alarm(part, metrics, 64)
        assert part in alarm and says in alarm if says else alarm == ""

# claim 25: the logged metrics, effective rank included, are what their names say.
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


# ---------------- Views ----------------

def smooth(height, width):
    """A smooth colour image in [0, 1]: (1, 3, height, width)."""
    coarse = torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)

def psnr(a, b, radius=2.0):
    """Peak signal-to-noise ratio in dB, of the pixels within `radius` half sides of the centre."""
    axis = torch.linspace(-1, 1, a.shape[-1])
    near = axis ** 2 + axis[:, None] ** 2 <= radius ** 2
    return -10 * math.log10((a - b)[..., near].square().mean() + 1e-20)

def warp(images, size, box=(0, 0, 1, 1), flip=False, angle=0.0, shift=None):
    """clever.warp with the same, or no, crop, flip, rotation and deformation for all images."""
    B = len(images)
    box = torch.tensor([box], dtype=images.dtype).expand(B, 4)
    return clever.warp(images, size, box, torch.tensor([flip] * B), torch.tensor([angle] * B), shift)

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

# claim 10: a flip is exact, a rotation is torchvision's, and what it turns in from outside is black.
@pytest.mark.parametrize("angle", [-90.0, -37.0, 12.5, 45.0, 90.0])
def test_flips_are_exact_and_rotations_torchvisions(angle):
    image, white = smooth(64, 64), torch.ones(1, 3, 64, 64)
    close(warp(image.double(), 64), image.double(), 1e-13)
    close(warp(image.double(), 64, flip=True), image.double().flip(-1), 1e-13)
    assert psnr(warp(image, 64, angle=angle), TF.rotate(image, angle, BILINEAR), 0.95) > 90
    close(warp(white, 64, angle=angle), TF.rotate(white, angle, NEAREST), 1e-5)  # black outside

# claim 10: the elastic deformation is torchvision's ElasticTransform, scaled with the size of the view.
@pytest.mark.parametrize("size", [224, 96, 64])
def test_elastic_deformations_are_torchvisions(size):
    alpha, sigma = 100 * size / 224, 5 * size / 224
    theirs = T.ElasticTransform.get_params([alpha] * 2, [sigma] * 2, [size, size])
    torch.manual_seed(0)
    shift = clever.elastic_shift(torch.rand(1, 2, size, size) * 2 - 1, alpha, sigma)
    close(shift, theirs, 1e-5)
    white = torch.ones(1, 3, size, size)
    close(warp(white, size, shift=shift), TF.elastic_transform(white, theirs, NEAREST), 1e-5)  # black outside

# claim 10: a view is crop, flip, rotation and elastic deformation in this order, sampled once.
def test_the_warp_is_the_composition_of_its_steps():
    image, box = smooth(320, 320), (0.1, -0.2, 0.7, 0.6)
    shift = clever.elastic_shift(torch.rand(1, 2, 128, 128) * 2 - 1, 57.0, 2.9)
    crop = warp(image, 128, box)
    ours = warp(image, 128, box, True, 33.0, shift)
    turn = partial(TF.rotate, angle=33.0, interpolation=BILINEAR)
    bend = partial(TF.elastic_transform, displacement=shift, interpolation=BILINEAR)
    assert psnr(ours, bend(turn(TF.hflip(crop))), 0.85) > 36
    for other in (bend(TF.hflip(turn(crop))), turn(bend(TF.hflip(crop))), bend(turn(crop))):
        assert psnr(ours, other, 0.85) < 34
    white = torch.ones_like(crop)
    assert psnr(warp(white, 128, box, True, 33.0, shift), bend(turn(white))) > 22  # black outside

def make_view(monkeypatch, view, images, order=(0, 1, 2, 3), **options):
    """The view number `view` of images, and by name the arguments and results of what made it."""
    seen = {}

    def spy(name):
        function = getattr(clever, name)

        def noted(*args, **kwargs):
            seen.update(inspect.signature(function).bind(*args, **kwargs).arguments)
            seen[name] = function(*args, **kwargs)
            return seen[name]
        monkeypatch.setattr(clever, name, noted)

    for name in ("crop_box", "warp", "color_jitter", "gaussian_matrix"):  # the last: elastic, then blur
        spy(name)
    crop = clever.MultiCrop(tiny(**options))
    return crop.make_view(images, torch.ones(len(images)), view, clever.generator("cpu", 0), order), seen

# claim 10: colours are torchvision's jitter in any order, grey, at 224 px a 13-pixel blur, and solarisation.
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 0, 3, 1), (3, 1, 0, 2)])
def test_colours_are_torchvisions(monkeypatch, order):
    images = torch.cat([torch.rand(8, 3, 64, 64), smooth(64, 64).expand(8, -1, -1, -1)])
    views, p = make_view(monkeypatch, 1, images, order, global_size=224, aug="baug")
    assert p["sigma"].max() > 0.1 and p["radius"] == 6
    operations = ((TF.adjust_brightness, "brightness"), (TF.adjust_contrast, "contrast"),
                  (TF.adjust_saturation, "saturation"), (TF.adjust_hue, "hue"))
    kinds = set()
    for i in range(16):
        x = p["warp"][i:i + 1]
        for operation, name in (operations[k] for k in order):
            x = operation(x, float(p[name][i]))
        fits = []
        for grey, solar in itertools.product((False, True), repeat=2):
            y = TF.rgb_to_grayscale(x, 3) if grey else x
            y = TF.gaussian_blur(y, [13, 13], [float(p["sigma"][i])] * 2)
            y = TF.normalize(TF.solarize(y, 0.5) if solar else y, clever.MEAN, clever.STD)
            if error(views[i:i + 1], y) < 1e-4:
                fits.append((grey, solar))
        assert len(fits) == 1
        kinds.update(fits)
    assert len(kinds) > 2

def uniform(x, low, high):
    """Kolmogorov's distance of numbers from a uniform distribution is that of chance."""
    x = (x.double().flatten().sort().values - low) / (high - low)
    assert x[0] >= -1e-6 and x[-1] <= 1 + 1e-6
    assert (x - torch.linspace(0, 1, len(x)).double()).abs().max() < 2 / len(x) ** 0.5

def happens(event, p):
    """The share of true values is p, but for chance (4 standard deviations)."""
    assert abs(event.double().mean() - p) <= 4 * math.sqrt(p * (1 - p) / len(event))

# claim 11: every random parameter of a view has the recipe's distribution, independent of the others.
@pytest.mark.parametrize("aug", ["baug", "caug", "caug+"])
@pytest.mark.parametrize("view", [0, 1, 2, 9])
def test_distribution_of_every_random_parameter(monkeypatch, aug, view):
    images = torch.tensor([0.9, 0.7, 0.6]).view(1, 3, 1, 1).expand(10_000, 3, 1, 1)
    views, p = make_view(monkeypatch, view, images, aug=aug, global_size=8, local_size=6,
                         global_scale=(0.4, 1.0), local_scale=(0.05, 0.4))
    uniform(p["area"], *((0.4, 1.0) if view < 2 else (0.05, 0.4)))
    uniform(p["ratio"].log(), math.log(3 / 4), math.log(4 / 3))
    uniform(p["place"][:, 0], 0, 1)
    uniform(p["place"][:, 1], 0, 1)
    happens(p["flip"], 0.5)
    if aug == "baug":
        assert not p["angle"].any()
    else:
        uniform(p["angle"], -90, 90)
    bent = p["shift"].flatten(1).any(1) if aug == "caug+" else torch.zeros(10_000)
    happens(bent, 0.5 * (aug == "caug+"))
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
    grey = after.amax(1) - after.amin(1) < 1e-3
    luma = torch.tensor([0.2989, 0.587, 0.114])
    solarised = (after @ luma - before @ luma).abs() > 1e-3
    happens(grey, 0.2)
    happens(solarised, 0.2 * (view == 1))
    numbers = [p[name] for name in ("flip", "brightness", "contrast", "saturation", "hue", "angle", "sigma")]
    numbers += [grey, solarised, bent, p["area"][:, 0], p["ratio"][:, 0], *p["place"].T]
    numbers = [x[jittered].double() for x in numbers if x.double().std() > 0]
    assert (torch.corrcoef(torch.stack(numbers)) - torch.eye(len(numbers))).abs().max() < 0.05

# claim 11: the order of the colour operations is drawn anew for each batch and view.
def test_the_order_of_the_colour_operations_is_random():
    crop = clever.MultiCrop(tiny())
    seen = Counter()
    crop.make_view = lambda images, aspect, view, gen, order: seen.update([tuple(order)])
    for step in range(600):
        crop(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.ones(1), step)
    assert len(seen) == 24 and min(seen.values()) > 60 and max(seen.values()) < 140

# claim 12: the views of a step depend on seed and step alone, not on the number of processes.
def test_views_depend_on_seed_and_step():
    images, aspect = torch.randint(0, 256, (12, 3, 40, 40), dtype=torch.uint8), torch.rand(12) + 0.5

    def views(step=7, seed=0, rank=0, world=1):
        crop = clever.MultiCrop(tiny(aug="caug+", seed=seed), rank, world)
        return crop(images.chunk(world)[rank], aspect.chunk(world)[rank], step)

    whole = views()
    for world in (2, 3):
        parts = zip(*(views(rank=rank, world=world) for rank in range(world)))
        close([torch.cat(part) for part in parts], whole, 1e-5)
    assert all(map(torch.equal, whole, views()))
    assert not any(map(torch.equal, whole, views(step=8)))
    assert not any(map(torch.equal, whole, views(seed=1)))


# ---------------- The step ----------------

def naive_vit(f, x):
    """CLS token of a ViT, attention written out."""
    x = f.patch_embed.proj(x)
    side = math.isqrt(f.pos_embed.shape[1] - 1)
    grid = f.pos_embed[:, 1:].mT.unflatten(2, (side, side))
    if x.shape[-1] != side:
        grid = F.interpolate(grid, x.shape[2:], mode="bicubic")
    cls = (f.cls_token + f.pos_embed[:, :1]).expand(len(x), -1, -1)
    x = torch.cat([cls, (x + grid).flatten(2).transpose(1, 2)], 1)
    for block in f.blocks:
        q, k, v = block.attn.qkv(block.norm1(x)).chunk(3, -1)
        q, k, v = (y.unflatten(-1, (block.attn.heads, -1)).transpose(1, 2) for y in (q, k, v))
        weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)
        x = x + block.attn.proj((weights @ v).transpose(1, 2).flatten(2))
        x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
    return f.norm(x)[:, 0]

def naive_head(h, x):
    """The projection head with torch's own weight normalisation, its gain fixed at 1."""
    v = h.prototypes.weight
    return F.normalize(h.mlp(x), dim=-1) @ torch._weight_norm(v, v.new_ones(len(v), 1), 0).T

def naive_schedule(start, end, epochs, spe, warmup=0):
    """DINO's cosine_scheduler."""
    n = epochs * spe - warmup
    ramp = [start * i / max(1, warmup - 1) for i in range(warmup)]
    return ramp + [end + 0.5 * (start - end) * (1 + math.cos(math.pi * i / n)) for i in range(n)]

class Published:
    """The published loop from the weights of a Training: losses pair by pair, loops over parameters."""

    def __init__(self, t):
        cfg, spe = t.cfg, t.steps_per_epoch
        self.cfg, self.frozen = cfg, cfg.freeze_epochs * spe
        self.student, self.teacher = copy.deepcopy(t.student), copy.deepcopy(t.teacher)
        self.centres = [head.centre.clone() for head in t.teacher.heads]
        self.clipped = []
        groups = [dict(params=[]), dict(params=[], weight_decay=0.0)]
        for name, p in self.student.named_parameters():
            groups[name.endswith(".bias") or p.ndim == 1]["params"].append(p)
        self.optimizer = torch.optim.AdamW(groups, foreach=False)
        warmup = min(10 * spe, cfg.epochs * spe // 10)
        self.lr = naive_schedule(cfg.lr * cfg.batch / 256, 1e-6, cfg.epochs, spe, warmup)
        self.weight_decay = naive_schedule(*cfg.weight_decay, cfg.epochs, spe)
        self.momentum = naive_schedule(cfg.momentum, 1.0, cfg.epochs, spe)

    def logits(self, net, views):
        z = torch.cat([naive_vit(net.backbone, torch.cat(same)) for same in (views[:2], views[2:]) if same])
        d = math.floor(self.cfg.ratio * z.shape[1])
        parts = z[:, :d], z[:, d:]
        return [naive_head(h, part).unflatten(0, (len(views), -1)) for h, part in zip(net.heads, parts)]

    def terms(self, views):
        cfg = self.cfg
        with torch.no_grad():
            targets = self.logits(self.teacher, views[:2])
        ir, *ef = zip(self.logits(self.student, views), targets, self.centres)
        L_CL = naive_invariance(*ir, 0.1, cfg.teacher_temp)
        if cfg.method == "dino":
            return targets, dict(loss=L_CL, L_CL=L_CL)
        L_Orth = naive_orthogonality(*ef[0], 0.1, cfg.teacher_temp)
        L_PReg = naive_preg(*self.student.heads)
        loss = L_CL + cfg.lambda_orth * L_Orth + cfg.lambda_reg * L_PReg
        return targets, dict(loss=loss, L_CL=L_CL, L_Orth=L_Orth, L_PReg=L_PReg)

    def step(self, views, step):
        decayed, free = self.optimizer.param_groups
        decayed["lr"] = free["lr"] = self.lr[step]
        decayed["weight_decay"] = self.weight_decay[step]
        with torch.autocast("cpu", torch.bfloat16, enabled=self.cfg.precision == "bf16"):
            targets, terms = self.terms(views)
        self.optimizer.zero_grad()
        terms["loss"].backward()
        for name, p in self.student.named_parameters():  # clip each gradient on its own
            factor = clever.CLIP / (p.grad.norm(2).item() + 1e-6)
            self.clipped.append(factor < 1)
            if factor < 1:
                p.grad.mul_(factor)
            if "prototypes" in name and step < self.frozen:
                p.grad = None
        self.optimizer.step()
        m = self.momentum[step]
        with torch.no_grad():
            for slow, fast in zip(self.teacher.parameters(), self.student.parameters()):
                slow.mul_(m).add_((1 - m) * fast)
            for centre, target in zip(self.centres, targets):
                centre.mul_(0.9).add_(0.1 * target.mean((0, 1)))
        return {name: term.detach() for name, term in terms.items()}

def some_views(cfg, steps, dtype=torch.float32):
    """Views of the first steps of a run on random images."""
    crop = clever.MultiCrop(cfg)
    images = torch.randint(0, 256, (cfg.batch, 3, 32, 32), dtype=torch.uint8)
    return [[view.to(dtype) for view in crop(images, torch.ones(cfg.batch), step)] for step in range(steps)]

# claim 6: six steps of training equal the published loop, in every term, weight and centre, to 1e-10.
@pytest.mark.parametrize("method", ["clever", "dino"])
def test_six_steps_equal_the_published_loop(monkeypatch, method):
    monkeypatch.setattr(clever, "CLIP", 0.02)
    t = clever.Training(tiny(method=method, drop_path=0.0, ef_out_dim=48, lr=0.1, epochs=20,
                             lambda_orth=0.7, lambda_reg=0.1, teacher_temp=0.05), 2)
    t.student.double()
    t.teacher.double()
    naive = Published(t)
    before = copy.deepcopy(dict(t.student.named_parameters()))
    for step, views in enumerate(some_views(t.cfg, 6, torch.float64)):
        close(clever.train_step(t, views, step), naive.step(views, step))
        close(list(t.student.parameters()), list(naive.student.parameters()))
        close(list(t.teacher.parameters()), list(naive.teacher.parameters()))
        close([head.centre for head in t.teacher.heads], naive.centres)
        name = "heads.0.prototypes.weight"
        assert torch.equal(t.student.get_parameter(name), before[name]) == (step < 2)
    assert 0 < sum(naive.clipped) < len(naive.clipped)  # some were clipped, some not
    assert all((p != before[name]).any() for name, p in t.student.named_parameters())

# claim 6: learning rate, weight decay and momentum follow the paper; a short run warms up for a tenth of it.
@pytest.mark.parametrize("epochs, warmup", [(200, 50), (100, 50), (20, 10), (1, 0)])
def test_schedules_are_the_papers(epochs, warmup):
    t = clever.Training(clever.Config(arch="vit_micro", hidden_dim=8, out_dim=8, epochs=epochs), 5)
    assert t.lr == pytest.approx(naive_schedule(1e-3, 1e-6, epochs, 5, warmup), rel=1e-9)
    assert t.weight_decay == pytest.approx(naive_schedule(0.04, 0.4, epochs, 5), rel=1e-9)
    assert t.momentum == pytest.approx(naive_schedule(0.996, 1.0, epochs, 5), rel=1e-9)

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
@pytest.mark.parametrize("options", [dict(aug="caug+"), dict(method="dino"), dict(arch="resnet18"),
                                     dict(arch="vmamba_tiny")])
def test_a_step_never_waits_for_the_device(options):
    cfg = tiny(**{**options, "batch": 2})
    t, crop = clever.Training(cfg, 1), clever.MultiCrop(cfg)
    images, aspect = torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.ones(2)
    with NeverWait():
        t.count(clever.train_step(t, crop(images, aspect, 0), 0))

# claim 13: --compile covers networks and losses without a graph break, and computes the same.
def test_compile_computes_the_same(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # needs no C compiler
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    views = some_views(tiny(batch=2), 2)
    results = []
    for compiled in (False, True):
        t = clever.Training(tiny(compile=compiled, batch=2, epochs=20), 2)
        terms = [clever.train_step(t, views[step], step) for step in range(2)]
        results.append([*terms, *t.teacher.parameters()])
    close(results[0], results[1], 1e-4)
    assert not counters["graph_break"]
    graphs = counters["stats"]["unique_graphs"]
    assert graphs >= 8  # student: 2 sizes, 2 heads; teacher: 1 size, 2 heads; loss


# ---------------- Several processes ----------------

# claim 12: stochastic depth is drawn for the rows of all processes, and keeps the mean.
def test_stochastic_depth_is_drawn_for_the_global_batch(monkeypatch):
    def drop(x, rank=0, world=1):
        monkeypatch.setattr(clever, "distributed", lambda: (rank, world))
        torch.manual_seed(0)
        return clever.drop_path(x, 0.25, training=True)

    x = normal(6000, 2, 3)
    whole = drop(x)
    kept = whole.flatten(1).any(1)
    happens(kept, 0.75)
    close(whole[kept], x[kept] / 0.75)
    for world in (2, 3):
        close(torch.cat([drop(part, rank, world) for rank, part in enumerate(x.chunk(world))]), whole)

def in_processes(world, function, *args):
    """Call function(rank, world, *args) in real processes, which share one import of this file."""
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    ranks = [context.Process(target=function, args=(rank, world, *args)) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(300)
    assert [process.exitcode for process in ranks] == [0] * world

def four_steps(rank, world, folder):
    """An epoch of four steps on 255 images as one of `world` processes; what came out, into a file."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", f"file://{folder}/meeting-{world}", rank=rank, world_size=world)
    pixels = torch.randint(0, 256, (255, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    data = clever.Images(32, torch.zeros(255), ["one"], pixels=pixels.byte())
    t = clever.Training(tiny(aug="caug+", batch=30, ef_out_dim=48), 4)
    augment = clever.MultiCrop(t.cfg, rank, world)
    steps = clever.batches(len(data), t.cfg, 0, 4, rank, world)
    for step, (images, aspect) in enumerate(data.stream(steps, t.device, 0)):
        terms = clever.train_step(t, augment(images, aspect, step), step)
    for block in [*t.student.backbone.blocks, *t.teacher.backbone.blocks]:
        block.attn.qkv.bias.data[96:192] = 0  # the keys' have no gradient but rounding
    terms = {name: clever.mean_over_processes(term) for name, term in terms.items()}
    state = dict(t.student.state_dict()), dict(t.teacher.state_dict())
    torch.save([terms, clever.look(t)[0], *state], f"{folder}/{world}-{rank}.pt")

# claim 12: losses, weights and collapse metrics do not depend on the number of processes; all hold one
# teacher.
def test_two_and_three_processes_equal_one(tmp_path):
    four_steps(0, 1, tmp_path)
    one = torch.load(tmp_path / "1-0.pt")
    for world in (2, 3):
        in_processes(world, four_steps, tmp_path)
        first, *others = (torch.load(tmp_path / f"{world}-{rank}.pt") for rank in range(world))
        close(first, one, 1e-5)
        for other in others:
            close(other, first, 0)


# ---------------- Backbones ----------------

# claim 7: a ResNet's weights load into torchvision's with fc = Identity(); at 32 px only the stem differs.
@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_resnets_are_torchvisions(arch):
    ours, theirs = clever.build_backbone(arch, 224).eval(), torchvision.models.get_model(arch).eval()
    theirs.fc = nn.Identity()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 64)
    close(ours(x), theirs(x), 1e-4)
    small = clever.build_backbone(arch, 32).state_dict()
    differ = [name for name, p in theirs.state_dict().items() if small[name].shape != p.shape]
    assert differ == ["conv1.weight"]

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
    x, small = normal(2, 3, 64, 64), normal(2, 3, 32, 48)
    close(f(x), theirs(x))
    close(f(small), naive_vit(f, small))
    layers = f.get_intermediate_layers(x, 4)
    assert [layer.shape for layer in layers] == [(2, 17, 192)] * 4
    close(layers[-1][:, 0], f(x))
    attention = f.get_last_selfattention(x)
    assert attention.shape == (2, 3, 17, 17)
    close(attention.sum(-1), torch.ones(2, 3, 17).double())

def naive_scan(v, p, weight, bias, A_logs):
    """The recurrence pixel after pixel in the four directions, summed."""
    B, H, W, D = v.shape
    rows = [(h, w) for h in range(H) for w in range(W)]
    columns = [(h, w) for w in range(W) for h in range(H)]
    z = 0
    for k, path in enumerate([rows, columns, rows[::-1], columns[::-1]]):
        A = -A_logs.view(4, D)[k].exp()
        state, y = 0, {}
        for h, w in path:
            r, write, read = p[:, h, w, k].split([weight.shape[2], 1, 1], 1)
            delta = F.softplus(r @ weight[k].T + bias[k])
            state = (delta * A).exp() * state + delta * write * v[:, h, w]
            y[h, w] = read * state
        z = z + torch.stack([y[pixel] for pixel in rows], 1).view(B, H, W, D)
    return z

# claim 8: VMamba's operator and its gradients are the recurrence of its paper, pixel after pixel, on any map.
@pytest.mark.parametrize("H, W", [(1, 1), (1, 7), (7, 1), (2, 3), (5, 5), (9, 13)])
def test_the_scan_is_the_recurrence(H, W):
    op, x = clever.SS2D(32).double(), normal(2, H, W, 32)
    for i, p in enumerate(op.parameters()):
        p.data = 0.5 * normal(*p.shape, seed=i)  # so large that every term counts
    v = (x @ op.in_proj.weight.T).permute(0, 3, 1, 2)
    v = F.silu(F.conv2d(v, op.conv2d.weight, padding=1, groups=32)).permute(0, 2, 3, 1)
    p = torch.einsum("kcd,bhwd->bhwkc", op.x_proj_weight, v)
    z = naive_scan(v, p, op.dt_projs_weight, op.dt_projs_bias, op.A_logs) + op.Ds.view(4, 32).sum(0) * v
    z = F.layer_norm(z, (32,), op.out_norm.weight, op.out_norm.bias) @ op.out_proj.weight.T
    ours = op(x)
    close(ours, z)
    weights = list(op.parameters())
    close(torch.autograd.grad(ours.sin().sum(), weights), torch.autograd.grad(z.sin().sum(), weights))

# claim 8: the scan accumulates half precision in float32, and keeps the digits of a small time step.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_scan_accumulates_half_precision_in_float32(dtype):
    shapes = (2, 9, 9, 6), (2, 9, 9, 4, 5), (4, 6, 3), (4, 6), (24, 1)
    v, p, weight, bias, A_logs = (normal(*shape, seed=i).float() for i, shape in enumerate(shapes))
    half = v.to(dtype), p.to(dtype), weight, bias - 1, A_logs
    small = v, p, 0.01 * weight, bias - 14, A_logs  # a time step of about 1e-6
    for x in (half, small):
        with torch.autocast("cpu", torch.bfloat16):
            z = clever.selective_scan(*x)
        assert z.dtype == torch.float32
        assert error(z, naive_scan(*(y.double() for y in x))) < 1e-5

# claim 7: VMamba's 274 tensors have the original's names, shapes and order: 29,480,064 parameters.
def test_the_274_tensors_of_vmamba():
    shapes = {}

    def layer(name, *weight, bias=True):
        shapes[f"{name}.weight"] = weight
        if bias:
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
            layer(f"{block}.op.in_proj", D, D, bias=False)
            layer(f"{block}.op.conv2d", D, 1, 3, 3, bias=False)
            layer(f"{block}.op.out_proj", D, D, bias=False)
            layer(f"{block}.norm2", D)
            layer(f"{block}.mlp.fc1", 4 * D, D)
            layer(f"{block}.mlp.fc2", D, 4 * D)
        if i < 3:
            layer(f"layers.{i}.downsample.1", 2 * D, D, 3, 3)
            layer(f"layers.{i}.downsample.3", 2 * D)
    layer("classifier.norm", 768)
    with torch.device("meta"):
        found = clever.build_backbone("vmamba_tiny", 224).state_dict()
    assert [(name, tuple(p.shape)) for name, p in found.items()] == list(shapes.items())
    assert len(shapes) == 274 and sum(map(math.prod, shapes.values())) == 29_480_064

# claim 7: VMamba starts from the original's distributions.
def test_the_initialisation_of_vmamba():
    block = clever.VMamba(dims=(96, 192), depths=(1, 1)).layers[1].blocks[0]
    op = block.op
    step = F.softplus(op.dt_projs_bias)
    assert step.min() >= 0.00099 and step.max() <= 0.101 and abs(step.log10().mean() + 2) < 0.1
    for weight, bound in ((op.x_proj_weight, 192 ** -0.5), (op.dt_projs_weight, 12 ** -0.5),
                          (op.conv2d.weight, 1 / 3)):
        assert 0.98 * bound < weight.abs().max() <= bound
    assert (op.A_logs == 0).all() and (op.Ds == 1).all() and (block.mlp.fc2.bias == 0).all()
    assert abs(op.in_proj.weight.std() - 0.02) < 5e-4 and abs(block.mlp.fc2.weight.std() - 0.02) < 5e-4

# claim 8: VMamba takes images of any size, in half precision too, and drops paths in training alone.
def test_vmamba_takes_any_size_and_drops_paths_in_training():
    model = clever.VMamba(drop_path=0.5, dims=(8, 16, 24, 32), depths=(1, 1, 2, 1))
    x = torch.randn(16, 3, 32, 32)
    for size in ((224, 224), (97, 33), (31, 17), (1, 1)):
        assert model(torch.randn(2, 3, *size)).shape == (2, 32)
    assert not torch.equal(model(x), model(x))
    y = model.eval()(x)
    assert torch.equal(model(x), y) and error(model(x[:1]), y[:1]) < 1e-4
    with torch.autocast("cpu", torch.bfloat16):
        assert error(model(x).float(), y) < 5e-2


# ---------------- Benchmarks: pytest -m benchmark -s ----------------

def in_turns(calls, rounds=5):
    """The median seconds of each of some calls {name: f(i)}, called in turns, after one that warms up."""
    times = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call(i)
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(took[1:]) for name, took in times.items()}

# claim 33: without its views, a step of the paper's recipe takes a CPU no longer than the published
# arithmetic.
@pytest.mark.benchmark
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_benchmark_step(precision):
    t = clever.Training(clever.Config(batch=8, drop_path=0.0, precision=precision), 1)
    naive = Published(t)
    views = [torch.randn(8, 3, side, side) for side in [224] * 2 + [96] * 8]
    took = in_turns(dict(published=lambda i: naive.step(views, 1 + i),
                         ours=lambda i: clever.train_step(t, views, 1 + i)))
    print(f"\nstep, batch 8, K = 65,536, {precision}, {torch.get_num_threads()} threads: published "
          f"{took['published']:.2f} s, ours {took['ours']:.2f} s: {took['published'] / took['ours']:.2f} x")

# claim 33: a worker of the loader decodes an image in a fraction of the time of the published views.
@pytest.mark.benchmark
@pytest.mark.parametrize("aug", ["baug", "caug", "caug+"])
def test_benchmark_loader(aug):
    photos = sorted((Path(clever.__file__).parent / ".data" / "photos").rglob("*.jpg"))[:40]
    if not photos:
        pytest.skip("needs photographs in .data/photos")
    blur = T.Lambda(lambda x: x.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0))))
    views = []
    for view in range(10):  # a resampling for each geometric operation
        size, scale = (224, (0.4, 1.0)) if view < 2 else (96, (0.05, 0.4))
        views.append(T.Compose([
            T.RandomResizedCrop(size, scale, interpolation=BICUBIC), T.RandomHorizontalFlip(),
            *[T.RandomRotation(90)] * (aug != "baug"),
            *[T.RandomApply([T.ElasticTransform(100.0)])] * (aug == "caug+"),
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8), T.RandomGrayscale(0.2),
            T.RandomApply([blur], (1.0, 0.1, 0.5)[min(view, 2)]), T.RandomSolarize(128, 0.2 * (view == 1)),
            T.ToTensor(), T.Normalize(clever.MEAN, clever.STD)]))

    def published(photo):
        image = Image.open(photo).convert("RGB")
        return [view(image) for view in views]

    torch.set_num_threads(1)  # as in a worker
    took = in_turns(dict(published=lambda i: [published(photo) for photo in photos],
                         ours=lambda i: [clever.decode(photo, 320) for photo in photos]), rounds=3)
    print(f"\nloader, {aug}, {len(photos)} images, 1 core: published {took['published']:.2f} s, ours "
          f"{took['ours']:.2f} s: {took['published'] / took['ours']:.1f} x")

# claim 33: VMamba in plain PyTorch needs memory like a ViT's, not that of all states of its scans.
@pytest.mark.benchmark
def test_benchmark_memory_of_vmamba():
    used = {}
    for arch in ("vmamba_tiny", "vit_small"):
        net = clever.build_backbone(arch, 224)
        with torch.profiler.profile(profile_memory=True) as profile:
            net(torch.rand(4, 3, 224, 224)).sum().backward()
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        events.sort(key=lambda e: e.start_ns())
        used[arch] = max(itertools.accumulate(e.nbytes() for e in events)) / 2 ** 30
    print(f"\nforward and backward, batch 4, 224 px: vmamba_tiny {used['vmamba_tiny']:.2f} GiB, vit_small "
          f"{used['vit_small']:.2f} GiB: {used['vmamba_tiny'] / used['vit_small']:.2f} x")

HERE = Path(clever.__file__).resolve().parent
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), str(Path(__file__).parent)])
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
CHILDREN = multiprocessing.get_context("forkserver")  # real processes that share one import of torch
CHILDREN.set_forkserver_preload([__name__])
TINY_RUN = dict(recipe="small", out_dim=64, hidden_dim=32, local_views=1, batch=8, epochs=4, lr=1e-2,
            save_every=1e-6, workers=0)  # 3 steps an epoch of 24 images, a checkpoint after each

@pytest.fixture(autouse=True)
def no_process_outlives_its_test(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    yield
    for p in multiprocessing.active_children():
        p.kill()

def flags(out, **options):
    """The command line of a tiny run, with these options over it."""
    words = ["--out", str(out)]
    for name, value in {**TINY_RUN, **options}.items():
        words.append(clever.flag(name))
        words += [str(value)] if name == "data" else str(value).split()
    return words

def child(argv, output, patch, env):
    """Body of a process: clever.py's main, with its output in a file and perhaps a fault in its code."""
    for number in (1, 2):
        os.dup2(os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    os.environ.update(env)
    multiprocessing.set_start_method("fork", force=True)  # so that a loader's workers have the fault too
    exec(patch, dict(vars(clever), clever=clever))
    os._exit(clever.main(argv))

def before(name, code):
    """A fault for `child`: a function of clever.py does this first; n counts its calls from 0."""
    return f"""
def faulty(*args, real={name}, calls=[]):
    n = len(calls)
    calls.append(n)
    {code}
    return real(*args)
{name} = faulty
"""

def start(argv, output, patch="", **env):
    env = {name: str(value) for name, value in {"CUDA_VISIBLE_DEVICES": "", **env}.items()}
    p = CHILDREN.Process(target=child, args=([str(word) for word in argv], str(output), patch, env))
    p.start()
    return p

def start_two(argv, output, patch=""):
    """The two processes of a run, as torchrun starts them; each has a file of output, ending in its rank."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        env = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=s.getsockname()[1], WORLD_SIZE=2, LOCAL_WORLD_SIZE=2)
    return [start(argv, f"{output}.{r}", patch, RANK=r, LOCAL_RANK=r, **env) for r in range(2)]

def finish(*processes):
    """The exit codes of processes, which may take two minutes; None: it hangs."""
    for p in processes:
        p.join(120)
    return [p.exitcode for p in processes]

def until(condition, alive):
    """Wait for a condition, as long as a process lives."""
    end = time.monotonic() + 120
    while not condition():
        assert alive() and time.monotonic() < end, "waited in vain"
        time.sleep(0.01)

def log(folder):
    """The lines of a run's log, but for the time that they took."""
    path = Path(folder) / "log.jsonl"
    lines = map(json.loads, path.read_text().splitlines() if path.exists() else [])
    return [{k: v for k, v in line.items() if k not in ("images_per_second", "waiting")} for line in lines]

def checkpoint(folder):
    return torch.load(Path(folder) / "checkpoint.pt", weights_only=True)

def leaves(x):
    """The values of a nested state, in order."""
    if not isinstance(x, (dict, list)):
        return [x]
    return [v for y in (x.values() if isinstance(x, dict) else x) for v in leaves(y)]

def same_run(*folders):
    """Two runs ended with bit-identical weights, centres, optimisers, backbones and logs."""
    for x, y in zip(*(leaves(checkpoint(folder)["training"]) for folder in folders), strict=True):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
    for x, y in zip(*(torch.load(Path(f) / "backbone.pt").values() for f in folders), strict=True):
        assert torch.equal(x, y)
    assert log(folders[0]) == log(folders[1])

def resume(folder):
    return clever.main(["--out", str(folder), "--resume"])

def pictures(folder, count, red=90):
    """Files of noise, 36 to 40 px wide."""
    folder.mkdir(parents=True)
    for n in range(count):
        gen = torch.Generator().manual_seed(n)
        pixels = torch.randint(90, 160, (3, 34, 36 + n % 5), generator=gen, dtype=torch.uint8)
        pixels[0] = red
        TF.to_pil_image(pixels).save(folder / f"{n:02}.jpg")
    return folder

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """24 images without labels, some in a folder of a folder."""
    folder = pictures(tmp_path_factory.mktemp("data") / "photos", 14)
    pictures(folder / "some" / "more", 10, red=250)
    return folder

@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labelled")
    for part, count in (("train", 12), ("val", 4)):
        for label, red in (("a", 10), ("b", 250)):
            pictures(folder / part / label, count, red)
    return folder

@pytest.fixture(scope="module")
def base(data, tmp_path_factory):
    """A run that was never stopped; output.txt holds what it said."""
    folder = tmp_path_factory.mktemp("base") / "run"
    assert finish(start(flags(folder, data=data), folder.with_name("output.txt"))) == [0]
    return folder


# ------------------------------ The command line ------------------------------ #

# claim 14: `python clever.py` trains on its own patterns, compares before and after, and leaves its files
def test_the_demo(tmp_path):
    fewer = f"real = clever.draw_patterns; os.chdir({str(tmp_path)!r})\n" \
            "clever.draw_patterns = lambda count, seed: real(count // 32, seed)"
    assert finish(start(["--epochs", 2], tmp_path / "said", fewer)) == [0]
    said = (tmp_path / "said").read_text()
    (folder,) = (tmp_path / "runs").iterdir()
    assert {f.name for f in folder.iterdir()} - {"lock"} == {
        "config.json", "log.jsonl", "crops.png", "checkpoint.pt", "backbone.pt", "compare.json"}
    assert folder.name.startswith("patterns-clever-caug") and said.count("\nepoch ") == 2 and "\r" not in said
    assert all(f"| {what}" in said for what in ("k-NN, upright", "k-NN, rotated", "R2 of the angle"))
    compared = json.loads((folder / "compare.json").read_text())
    assert set(compared["after"]["k-NN, upright"]) == {"all", "IR", "EF"}
    assert compared["before"].keys() == compared["after"].keys() and compared["before"] != compared["after"]
    weights = torch.load(folder / "backbone.pt", weights_only=True)
    clever.build_backbone("vit_micro", 32).load_state_dict(weights, strict=True)
    with Image.open(folder / "crops.png") as crops:  # 8 images, each beside its 4 views
        assert crops.width > 5 * 32 and crops.height > 8 * 32

# claim 14: images without labels, anywhere below a folder, train; a run says at its start what it will do,
# and
# that there will be no comparison
def test_a_run_says_first_what_it_will_do(base, data):
    said = base.with_name("output.txt").read_text()
    first = said.split("epoch 1.00")[0]
    for words in ("clever", "vit_micro", "0.5M", "1 x CPU", "float32", f"{data}: 24 images", "no comparison",
                  "4 epochs", "3 steps", "8 images", "0.00031", f"writes to {base}", "from step 0"):
        assert words in first, words
    assert not (base / "compare.json").exists() and "eval_linear" not in said

# claim 14: log.jsonl holds a line of JSON an epoch and every 60 steps: the mean loss terms, lr, speed and,
# at an
# epoch's end, the collapse metrics of each part
def test_the_lines_of_the_log(base, data, tmp_path, monkeypatch):
    metrics = ("entropy", "kl_uniform", "std", "rank", "own", "other_view", "other_image")
    always = {"step", "epoch", "loss", "L_CL", "L_Orth", "L_PReg", "lr"}
    at_the_end = {"bad_images", *(f"{part}_{name}" for part in ("IR", "EF") for name in metrics)}
    assert [line["step"] for line in log(base)] == [3, 6, 9, 12]
    assert all(line.keys() == always | at_the_end for line in log(base))
    assert '"images_per_second"' in (base / "log.jsonl").read_text()
    monkeypatch.setattr(clever, "LOG_EVERY", 2)
    assert clever.main(flags(tmp_path / "run", data=data, epochs=1)) == 0
    assert [(line["step"], len(line)) for line in log(tmp_path / "run")] == [(2, 7), (3, 22)]

# claim 14: without a terminal a run prints a line at least every minute or so
def test_a_redirected_run_is_not_mute(data, tmp_path, monkeypatch, capsys):
    now = [0.0]
    real = clever.train_step

    def slow(*args):
        now[0] += 31
        return real(*args)
    clock = types.SimpleNamespace(**{**vars(time), "monotonic": lambda: now[0]})
    monkeypatch.setattr(clever, "time", clock)
    monkeypatch.setattr(clever, "train_step", slow)
    assert clever.main(flags(tmp_path / "run", data=data, batch=2, epochs=1, local_views=0)) == 0
    said = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert said == ["0.17/1", "0.33/1", "0.50/1", "0.67/1", "0.83/1", "1.00/1"]

# claim 15: the commands printed at the end run as printed
def test_the_commands_printed_at_the_end_run(labelled, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["clever.py"])
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    out = tmp_path / "my run"
    assert clever.main(flags(out, data=labelled, epochs=1)) == 0
    commands = re.findall(r"(?m)\bpython .*$", capsys.readouterr().out)
    assert len(commands) == 2 and commands[0].startswith("python eval_linear.py")
    for command in commands:
        done = subprocess.run(command, shell=True, cwd=HERE, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done
    assert json.loads(Path(f"{out}-dino", "config.json").read_text())["method"] == "dino"

# claim 16: --help shows the options in groups, with the values that this command would use
def test_help(capsys):
    assert clever.main(["--data", "cifar10", "--epochs", "77", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for words in ("data:", "method:", "views:", "optimisation:", "run:", "[resnet18]", "[77]", "[0.1 0.4]"):
        assert words in said, words

# Options over those of a tiny run of DATA, beside a finished run BASE, in a folder W > what is said, at least
# the first option
WRONG = """--ratio 1.5; --ratio nan; --ratio 0.001 > 0 features to IR; --ratio 1 > 0 to EF; --method dyno;
--method dino --ratio 0.8 > no split; --arch resnet81; --arch vit_b_16; --aug cuag; --recipe papr;
--precision fp8; --precision fp16; --locl-views 3; --epochs ten; --epochs 0; --batch 0; --batch 25 > larger
than the data; --lr inf; --lr -1; --lambda-reg nan; --teacher-temp 0; --momentum 1.1; --drop-path 1;
--global-size 30 > patch; --local-size 12 > patch; --out-dim 0; --global-scale 0.9 0.2; --local-scale 0 0.5;
--weight-decay nan 0.4; --save-every 0; --profile -1; --seed 99999999999999999999; --data W/nowhere > is no
folder; --data cifar1 > cifar10; --data W/empty > no image; --out BASE > holds a run; --out W/file > cannot
be written; --resume > no folder of a run; --resume --out BASE --ratio 0.5 > --ratio 0.5 differs; --resume
--out BASE --batch 4 > --batch 4 differs"""

# claim 16: a wrong setting is refused in one sentence with exit code 2, before anything is created
def test_wrong_settings_are_one_sentence_and_create_nothing(base, data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()

    def files():
        return {(f, f.stat().st_mtime_ns) for folder in (tmp_path, base, data) for f in folder.rglob("*")}
    before = files()
    for line in WRONG.replace("\n", " ").split("; "):
        words, _, said = line.partition(" > ")
        words = words.replace("W/", f"{tmp_path}/").replace("BASE", str(base)).split()
        argv = words if "--resume" in words else flags(tmp_path / "new", data=data) + words
        assert clever.main(argv) == 2, line
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1) and (said or words[0]) in err, (line, err)
        assert files() == before, line

# claim 16: where fcntl and resource do not exist (Windows), the file imports and trains
def test_without_fcntl(data, tmp_path):
    code = "import sys; sys.modules.update(fcntl=None, resource=None)\n" \
           "import clever; sys.exit(clever.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *flags(tmp_path / "run", data=data, epochs=1)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and checkpoint(tmp_path / "run")["training"]["step"] == 3, done

# claim 17: train/ and val/ must have the same classes; links in a circle and runs inside a folder of images
# do no harm
def test_folders_of_images(labelled, data, tmp_path):
    some = shutil.copytree(labelled, tmp_path / "some")
    shutil.rmtree(some / "val" / "a")
    train = clever.load_images(str(some), "train", 32)
    val = clever.load_images(str(some), "val", 32)
    with pytest.raises(clever.UserError, match="classes"):
        clever.describe(None, clever.Config(data=str(some)), train, val, "cpu")
    photos = shutil.copytree(data, tmp_path / "photos")
    assert clever.main(flags(photos / "runs" / "1", data=photos, epochs=1)) == 0
    (photos / "here").symlink_to(".")
    (photos / "up").symlink_to("../photos")
    count = f"print(len(clever.load_images({str(photos)!r}, 'train', 32)), flush=True); os._exit(0)"
    assert finish(start([], tmp_path / "said", count)) == [0] and (tmp_path / "said").read_text() == "24\n"


# ------------------------------ Stopped and resumed ------------------------------ #

class Payload:
    """Something that runs code when a pickle loader reads it."""

    def __reduce__(self):
        return os.mkdir, ("executed",)

# claim 23: --resume refuses a foreign or damaged checkpoint.pt or config.json, or other data, in one sentence
@pytest.mark.filterwarnings("ignore")
def test_what_does_not_fit_is_not_resumed(base, data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = shutil.copytree(base, tmp_path / "run")
    path = run / "checkpoint.pt"
    config = json.loads((run / "config.json").read_text())

    def refused(*said):
        assert resume(run) == 2, said
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and all(word in err for word in said), (said, err)
        assert log(run) == log(base)

    def changed(**parts):
        state = checkpoint(base)
        return {**state, "training": {**state["training"], **parts}}
    moments = checkpoint(base)["training"]["optimizer"]
    flat = {**moments, 0: {**moments[0], "exp_avg": torch.zeros(3)}}
    foreign = [Payload(), torch.zeros(3), {}]
    for value in (flat, [], {**moments, 999: moments[0]}):
        foreign.append(changed(optimizer=value))
    for value in ("x", -3, 10 ** 9):
        foreign.append(changed(step=value))
    foreign += [changed(sums=dict(loss="x")), changed(teacher={}), changed(student=dict(x=moments))]
    for content in foreign:
        torch.save(content, path)
        refused("checkpoint.pt", "damaged")
    path.write_bytes((base / "checkpoint.pt").read_bytes()[:99999])
    refused("checkpoint.pt", "damaged")
    path.unlink()
    refused("checkpoint.pt", "missing")
    path.symlink_to("nowhere")
    refused("checkpoint.pt", "missing")
    path.unlink()
    shutil.copy(base / "checkpoint.pt", path)
    bigger = str(pictures(tmp_path / "bigger", 25))
    wrong = dict(data=bigger, lr="fast", epochs=2.5, lr_=1, aug="cuag", precision="fp8", out_dim=128,
                 global_scale=["a", "b"], local_scale=[0.4], weight_decay=[0.4])
    for name, value in wrong.items():
        (run / "config.json").write_text(json.dumps({**config, name: value}))
        refused(*(("24 images", "25") if name == "data" else ()))
    (run / "config.json").write_text("[1]")
    refused("no folder of a run")
    assert not (tmp_path / "executed").exists()

# claim 18: killed at random moments and resumed, a run ends with the same bits as one never stopped
def test_runs_killed_at_random_moments_resume_to_the_same_bits(base, data, tmp_path):
    run = tmp_path / "run"
    argv = flags(run, data=data)
    for seconds in (0.001, 0.02, 0.04):  # the alarm kills as SIGKILL does, wherever the process then is
        alarm = f"signal.setitimer(signal.ITIMER_REAL, {seconds} * random.random())"
        kill = before("clever.train_step", f"n == 2 and {alarm}")
        assert finish(start(argv, tmp_path / "said", kill)) == [-signal.SIGALRM]
        argv = ["--out", run, "--resume"]
    assert resume(run) == 0
    same_run(base, run)

# claim 18: a kill between backbone.pt and checkpoint.pt does no harm
def test_a_kill_between_backbone_and_checkpoint(base, data, tmp_path):
    kill = before("os.replace", "n > 8 and 'checkpoint' in str(args) and os.kill(os.getpid(), 9)")
    assert finish(start(flags(tmp_path / "run", data=data), tmp_path / "said", kill)) == [-9]
    assert resume(tmp_path / "run") == 0
    same_run(base, tmp_path / "run")

# claim 19: SIGTERM and Ctrl-C let a run finish its step, save and end (143, 130); it resumes to the same bits
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_resumes_to_the_same_bits(base, data, tmp_path, number, code):
    run = tmp_path / "run"
    patch = before("clever.train_step", f"n == 4 and os.kill(os.getpid(), {int(number)})")
    assert finish(start(flags(run, data=data, save_every=60), tmp_path / "said", patch)) == [code]
    said = (tmp_path / "said").read_text()
    assert "stopped at step 5;" in said and "Traceback" not in said
    assert checkpoint(run)["training"]["step"] == 5
    assert resume(run) == 0
    same_run(base, run)

# claim 19: a second Ctrl-C ends a run at once; Python's own handling of signals is as before after a run
def test_a_second_signal_ends_a_run_at_once():
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(KeyboardInterrupt), clever.stop_signals(types.SimpleNamespace()):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers

# claim 19: Ctrl-C outside a step is one line and exit code 130
@pytest.mark.parametrize("where", ["load_images", "open_folder", "compare"])
def test_ctrl_c_outside_a_step_is_one_line(labelled, tmp_path, capsys, monkeypatch, where):
    monkeypatch.setattr(clever, where, lambda *args: signal.raise_signal(signal.SIGINT))
    assert clever.main(flags(tmp_path / "run", data=labelled, epochs=1, local_views=0)) == 130
    assert capsys.readouterr().err == "clever.py: interrupted\n"

# claim 19: Ctrl-C on torchrun stops its processes with a checkpoint
def test_ctrl_c_on_torchrun_leaves_a_checkpoint(data, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with open(tmp_path / "said", "w") as said:
        argv = [*command, HERE / "clever.py", *flags(run, data=data, epochs=200)]
        p = subprocess.Popen(argv, stdout=said, stderr=said)
    until(lambda: log(run), lambda: p.poll() is None)
    p.send_signal(signal.SIGINT)
    assert p.wait(120) != 0
    assert f"stopped at step {checkpoint(run)['training']['step']};" in (tmp_path / "said").read_text()

# claim 19: a signal to one of two processes, at whatever moment, stops both with a checkpoint
def test_a_signal_to_one_of_two_processes_stops_both(data, tmp_path):
    run = tmp_path / "run"
    late = before("clever.look", "args[0].rank == 1 and os.kill(os.getpid(), signal.SIGTERM)")
    alone = before("clever.write_whole", "assert clever.distributed()[0] == 0")  # rank 0 alone writes
    assert finish(*start_two(flags(run, data=data, epochs=50), run, late + alone)) == [143, 143]
    step = checkpoint(run)["training"]["step"]
    assert step in (3, 4) and f"stopped at step {step};" in Path(f"{run}.0").read_text()

# claim 20: a process that dies takes the other down, without a hang, and its traceback is printed
@pytest.mark.parametrize("fault, said", [("raise ValueError('a fault of mine')", "a fault of mine"),
                                         ("os.kill(os.getpid(), signal.SIGKILL)", "")])
def test_a_process_that_dies_takes_the_other_down(data, tmp_path, fault, said):
    run = tmp_path / "run"
    patch = before("clever.train_step", f"if args[0].rank == 1 and n == 4: {fault}")
    codes = finish(*start_two(flags(run, data=data, epochs=1000), run, patch))
    assert None not in codes and 0 not in codes
    assert "Traceback" in Path(f"{run}.0").read_text() and said in Path(f"{run}.1").read_text()

# claim 21: a folder that holds a run is refused, by several processes too, and nothing in it changes
def test_two_processes_refuse_a_used_folder(base, data, tmp_path):
    before = {f: f.stat().st_mtime_ns for f in base.iterdir()}
    codes = finish(*start_two(flags(base, data=data), tmp_path / "said"))
    assert codes[0] == 2 and codes[1] not in (None, 0) and "holds a run" in (tmp_path / "said.0").read_text()
    assert {f: f.stat().st_mtime_ns for f in base.iterdir()} == before

# claim 21: one process at a time writes to a folder; a second gets a sentence, until the first ends or is
# killed
def test_a_second_process_in_the_same_folder_is_refused(data, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    p = start(flags(run, data=data, epochs=200), tmp_path / "said")
    until(lambda: log(run), p.is_alive)
    assert resume(run) == 2
    err = capsys.readouterr().err
    assert "another process" in err and err.count("\n") == 1
    p.kill()
    assert finish(p) == [-signal.SIGKILL]
    monkeypatch.setattr(clever, "train_step", lambda *args: signal.raise_signal(signal.SIGTERM) or {})
    assert resume(run) == 143


# ------------------------------ What goes wrong on the way ------------------------------ #

# claim 22: a full disk costs a checkpoint and a warning; if it is the last one, the run says so and fails
@pytest.mark.parametrize("last, code", [(8, 0), (999, 1)])
def test_a_full_disk(base, data, tmp_path, capsys, monkeypatch, last, code):
    run = tmp_path / "run"
    real = os.fsync
    calls = []

    def fsync(number):
        calls.append(number)
        if 8 <= len(calls) <= last:
            raise OSError(28, "No space left on device")
        real(number)
    with monkeypatch.context() as m:
        m.setattr(os, "fsync", fsync)
        assert clever.main(flags(run, data=data)) == code
    err = capsys.readouterr().err
    assert "warning" in err and "No space left on device" in err and not list(run.glob("*.tmp"))
    assert ("last checkpoint could not be written" in err) == bool(code)
    if code:
        assert resume(run) == 0
    same_run(base, run)

# claim 22: a log.jsonl that cannot be written is a warning, not the end
def test_a_log_that_cannot_be_written(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(clever, "save_crops", lambda path, *args: path.with_name("log.jsonl").mkdir())
    assert clever.main(flags(tmp_path / "run", data=data, epochs=1)) == 0
    assert "warning" in capsys.readouterr().err and checkpoint(tmp_path / "run")["training"]["step"] == 3

# claim 22: a stdout that is closed, full or knows no umlauts does not end a run
def test_a_closed_stdout(data, tmp_path):
    argv = flags(tmp_path / "0", data=data, epochs=1)
    command = shlex.join([sys.executable, str(HERE / "clever.py"), *argv])
    head = f"{command} | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", head], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.count("\n") == 1 and "Traceback" not in done.stderr, done
    for i, end in enumerate(("None", "open('/dev/full', 'w')", "open(os.devnull, 'w', encoding='ascii')")):
        argv = flags(tmp_path / f"größe{i}", data=data, epochs=1)
        assert finish(start(argv, tmp_path / "said", f"sys.stdout = {end}")) == [0], end
        assert checkpoint(argv[1])["training"]["step"] == 3

# claim 27: an error of our own is not taken for a bad image: its traceback ends the run, though workers live
def test_a_fault_while_workers_live_ends_the_run(data, tmp_path):
    typo = before("clever.decode", "undefined_name")
    p = start(flags(tmp_path / "run", data=data, workers=2), tmp_path / "said", typo)
    assert finish(p) == [1] and "NameError" in (tmp_path / "said").read_text()

# claim 24: numbers that are not finite stop the run, naming what and when, and leave the last good checkpoint
@pytest.mark.parametrize("name, said", [("orthogonality_loss", "L_Orth is not finite at step 5"),
                                        ("train_step", "a weight is not finite at step 6")])
def test_numbers_that_are_not_finite_stop_the_run(data, tmp_path, capsys, monkeypatch, name, said):
    real = getattr(clever, name)
    calls = []

    def faulty(*args, **more):
        calls.append(1)
        result = real(*args, **more)
        if name == "train_step" and len(calls) == 6:
            args[0].student.backbone.norm.bias.data.fill_(math.nan)
        if name == "orthogonality_loss" and len(calls) == 5:
            return result * math.nan
        return result
    monkeypatch.setattr(clever, name, faulty)
    assert clever.main(flags(tmp_path / "run", data=data, save_every=60)) == 1
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err and checkpoint(tmp_path / "run")["training"]["step"] == 3

# claim 25: a run that collapses says so, and a healthy one does not
@pytest.mark.parametrize("collapses, options", [(False, dict(teacher_temp=0.03, freeze_epochs=3, lr=8e-3)),
                                                (True, dict(teacher_temp=0.1, freeze_epochs=0, lr=3e-2))])
def test_a_collapse_is_called_out(tmp_path, capsys, monkeypatch, options, collapses):
    real = clever.draw_patterns
    monkeypatch.setattr(clever, "draw_patterns", lambda count, seed: real(128, seed))
    monkeypatch.setattr(clever, "compare", lambda *args: None)
    options.update(recipe="demo", hidden_dim=64, local_views=0, batch=16, epochs=3, save_every=60)
    assert clever.main(flags(tmp_path / "run", data="patterns", **options)) == 0
    assert ("COLLAPSE of IR: the teacher's output is uniform" in capsys.readouterr().out) == collapses
    assert (log(tmp_path / "run")[-1]["IR_entropy"] > 0.99 * math.log(64)) == collapses

# claim 26: memory and open files do not grow while a run goes on
def test_memory_and_open_files_do_not_grow(data, tmp_path, monkeypatch):
    seen = []
    real = clever.look

    def watch(t):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        seen.append((pages * os.sysconf("SC_PAGE_SIZE") / 1e6, len(os.listdir("/proc/self/fd"))))
        return real(t)
    monkeypatch.setattr(clever, "look", watch)
    options = dict(batch=4, epochs=10, local_views=0, save_every=60)  # 60 steps
    assert clever.main(flags(tmp_path / "run", data=data, **options)) == 0
    (memory, files), (memory_end, files_end) = seen[1], seen[-1]
    assert memory_end - memory < 20 and files_end <= files


# ------------------------------ Images of all kinds ------------------------------ #

# claim 27: images of every common mode are read in their colours, turned as their EXIF says
def test_images_of_every_mode_are_read_in_their_colours(tmp_path):
    orange = (200, 90, 40)
    luma = (117, 117, 117)
    rgb = Image.new("RGB", (60, 40), orange)
    deep = Image.new("I;16", (60, 40), 117 * 256)
    for name, image, colour in [
            ("cmyk.jpg", rgb.convert("CMYK"), orange), ("palette.png", rgb.quantize(4), orange),
            ("grey.jpg", rgb.convert("L"), luma), ("grey alpha.png", rgb.convert("LA"), luma),
            ("alpha.png", Image.new("RGBA", (60, 40), (*orange, 0)), orange),
            ("größe ✓.jpg", rgb, orange),
            ("one bit.png", Image.new("1", (60, 40), 1), (255, 255, 255)), ("16 bit.png", deep, luma),
            ("16 bit.tif", deep, luma), ("narrow.png", rgb.resize((1, 500)), orange)]:
        image.save(tmp_path / name)
        pixels, aspect = clever.decode(str(tmp_path / name), 32)
        assert (pixels.shape, pixels.dtype) == ((3, 32, 32), torch.uint8)
        assert aspect == image.width / image.height
        assert (pixels.double() - torch.tensor(colour)[:, None, None]).abs().max() < 6, name
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: its dark left half comes above
    halves = Image.new("L", (60, 40), 255)
    halves.paste(0, (0, 0, 30, 40))
    halves.save(tmp_path / "turned.jpg", exif=exif)
    pixels, aspect = clever.decode(str(tmp_path / "turned.jpg"), 32)
    assert aspect == 40 / 60 and pixels[:, :15].max() < 10 and pixels[:, 17:].min() > 245

# claim 27: broken images are replaced, named once with the cause, and counted
def test_broken_images_are_replaced_named_once_and_counted(data, tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(201):
        (photos / f"{i} é.jpg").symlink_to(data / "00.jpg")
    (photos / "zero.jpg").touch()
    (photos / "text.jpg").write_text("not an image")
    options = dict(batch=29, epochs=2, local_views=0, save_every=60, workers=2)
    assert clever.main(flags(tmp_path / "run", data=photos, **options)) == 0
    warned = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warned) == 2 and all("cannot identify" in line for line in warned), warned
    assert "text.jpg" in warned[0] and "zero.jpg" in warned[1]
    assert [line["bad_images"] for line in log(tmp_path / "run")] == [2, 2]

def bomb(side):
    """A PNG of a few bytes that declares side x side pixels."""
    parts = {b"IHDR": struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0), b"IDAT": zlib.compress(bytes(999)),
             b"IEND": b""}
    png = b"\x89PNG\r\n\x1a\n"
    for kind, body in parts.items():
        png += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return png

# claim 27: pipes, bombs, 32-bit pixels, ... are bad images; over 1 % of those end the run, with the list
def test_more_than_one_percent_of_broken_images_end_the_run(data, tmp_path, capsys):
    photos = shutil.copytree(data, tmp_path / "photos")
    (photos / "truncated.jpg").write_bytes((data / "00.jpg").read_bytes()[:300])
    (photos / "zero.jpg").touch()
    (photos / "text.jpg").write_text("not an image")
    (photos / "bomb.png").write_bytes(bomb(20_000))
    (photos / "dangling.jpg").symlink_to("nowhere")
    os.mkfifo(photos / "pipe.jpg")
    Image.new("F", (40, 40), 0.5).save(photos / "float.tif")
    Image.new("I", (40, 40), 1 << 20).save(photos / "deep.tif")
    assert clever.main(flags(tmp_path / "run", data=photos, batch=16, save_every=60)) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    for word in ("8 of 32", "1 %", "truncated", "zero", "text", "bomb", "dangling", "pipe", "float", "deep"):
        assert word in last, (word, last)

# claim 27: random and mutated files never stop the reader
@pytest.mark.filterwarnings("ignore")
def test_random_and_mutated_files_never_stop_the_reader(data, tmp_path):
    rng = random.Random(0)
    path = tmp_path / "x.jpg"
    images = clever.Images(32, [0, 0], ["a"], paths=[str(path), str(data / "00.jpg")])
    sources = ((data / "00.jpg").read_bytes(), bomb(300))
    used = 0
    for i in range(300):
        content = bytearray(rng.choice(sources) if i % 3 else rng.randbytes(rng.randrange(1, 2000)))
        for _ in range(rng.choice((0, 1, 3, 30))):
            content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(content[:rng.randrange(1, 2 * len(content))])
        pixels, aspect, problem = images[0]
        assert pixels.shape == (3, 32, 32) and pixels.dtype == torch.uint8 and 0 < aspect < math.inf
        used += not problem
    assert 0 < used < 300

# claim 17: one process downloads CIFAR while others wait; without a network there is one sentence
def test_one_process_downloads_cifar(tmp_path, monkeypatch):
    inside = []
    most = []
    network = []

    class Cifar:
        """What torchvision's class would hold, slowly downloaded."""
        classes = ["cat", "dog"]
        targets = [0, 1]
        data = torch.arange(2 * 32 * 32 * 3).byte().view(2, 32, 32, 3).numpy()

        def __init__(self, root, train, download):
            if not network:
                raise OSError("no network")
            inside.append(self)
            most.append(len(inside))
            time.sleep(0.1)
            inside.pop()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Cifar)
    with pytest.raises(clever.UserError, match="no network"):
        clever.load_images("cifar10", "train", 32)
    network.append("up")
    with ThreadPoolExecutor(3) as pool:
        sets = list(pool.map(lambda part: clever.load_images("cifar10", part, 32), ("train", "train", "val")))
    assert most == [1, 1, 1] and all(len(images) == 2 for images in sets)
    assert torch.equal(sets[0].pixels[1, :, 3, 4], torch.from_numpy(Cifar.data[1, 3, 4]))

def labelled_pictures(folder, train=6, val=3, strength=0.4):
    """A folder of noise around red (class a) and blue (b): <folder>/{train,val}/{a,b}/00.jpg, ..."""
    gen = torch.Generator().manual_seed(0)
    for part, count in (("train", train), ("val", val)):
        for channel, name in ((0, "a"), (2, "b")):
            (folder / part / name).mkdir(parents=True)
            for n in range(count):
                pixels = 0.5 * torch.rand(3, 40, 60, generator=gen)
                pixels[channel] += strength
                TF.to_pil_image(pixels).save(folder / part / name / f"{n:02}.jpg")
    return folder

def untrained(folder, data="patterns", **options):
    """A run as clever.py leaves it, of an untrained backbone."""
    cfg = clever.Config(**{**TINY, "data": str(data), "out": str(folder), **options})
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(vars(cfg)))
    torch.manual_seed(1)
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

def tree(folder):
    """All files below a folder and when they were written."""
    return {(str(path), path.stat().st_mtime_ns) for path in folder.rglob("*")}

def start_eval(argv, cwd, **env):
    """The real command `python eval_linear.py argv`."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in env.items()}}
    command = [sys.executable, str(HERE / "eval_linear.py"), *map(str, argv)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=cwd, env=env, text=True, stdout=pipe, stderr=pipe)

def planted(count, seed):
    """20 features, the first 16 (IR) of the class, the others (EF) of the angle; angles; labels."""
    labels = torch.arange(count) % 4
    angle = normal(count, seed=seed).erf().float() * 90
    ir = 3 * F.one_hot(labels, 16) + 0.5 * normal(count, 16, seed=seed)
    circle = torch.stack([angle.deg2rad().cos(), angle.deg2rad().sin()], 1)
    z = torch.cat([ir, circle.repeat(1, 2) + 0.1 * normal(count, 4, seed=seed)], 1)
    return z.float(), angle, labels

class Planted(nn.Module):
    """Stands in for a Representation of planted features."""
    device = torch.device("cpu")
    cfg = clever.Config(**TINY)
    last = linear = clever.columns(20, 0.8)

def images_of(labels):
    """A data set of black images with these labels."""
    classes = [str(label) for label in range(int(labels.max()) + 1)]
    return clever.Images(8, labels, classes, pixels=torch.zeros(len(labels), 3, 8, 8, dtype=torch.uint8))

# claim 29: a class planted in IR and an angle planted in EF are found there and not in the other part
def test_planted_class_and_angle_are_recovered():
    z, angle, y = planted(1000, 0)
    z_val, angle_val, y_val = planted(500, 1)
    p = eval_linear.parse(["RUN", "--quick", "--epochs", "10"])
    probes = eval_linear.train_probes(p, Planted(), images_of(y), z)
    for part, i in Planted.last.items():
        linear = eval_linear.accuracy(probes[part][1](z_val[:, i]), y_val)[0]
        near = eval_linear.accuracy(clever.knn(z[:, i], y, z_val[:, i], 4), y_val)[0]
        r2 = clever.ridge_r2(z[:, i], angle, z_val[:, i], angle_val)
        if part == "EF":
            assert abs(linear - 25) < 8 and abs(near - 25) < 8
        else:
            assert linear > 95 and near > 95
        assert abs(r2) < 0.1 if part == "IR" else r2 > 0.9

# claim 29: k-NN votes and the R2 of the angle equal those of naive versions in float64
def test_knn_and_ridge_equal_naive_ones():
    bank, queries, labels = normal(60, 5), normal(9, 5, seed=1), torch.arange(60) % 3
    votes = clever.knn(bank, labels, queries, 3, k=7)
    for query, row in zip(queries, votes):
        cosine = [float(query @ b / query.norm() / b.norm()) for b in bank]
        naive = [0.0] * 3
        for n in sorted(range(60), key=lambda n: -cosine[n])[:7]:
            naive[labels[n]] += math.exp((cosine[n] - 1) / 0.07)
        close(row, torch.tensor(naive, dtype=torch.float64), 1e-9)
    x, x_test = normal(60, 5), normal(40, 5, seed=2)
    angle, angle_test = 50 * normal(60), 50 * normal(40, seed=3)
    scores = []
    for f in (torch.cos, torch.sin):
        y, y_test = f(angle * math.pi / 180), f(angle_test * math.pi / 180)
        std = (x - x.mean(0)) / (x.std(0) + 1e-6)
        w = torch.linalg.inv(std.T @ std + 60 * 0.01 * torch.eye(5)) @ std.T @ (y - y.mean())
        error = y_test - y.mean() - (x_test - x.mean(0)) / (x.std(0) + 1e-6) @ w
        scores.append(1 - float(error @ error / ((y_test - y_test.mean()) ** 2).sum()))
    assert clever.ridge_r2(x, angle, x_test, angle_test) == pytest.approx(sum(scores) / 2, abs=1e-9)

# claim 29: probes side by side equal probes trained one by one; held-out images choose each learning rate
def test_probes_side_by_side_equal_probes_one_by_one():
    z, _, y = planted(96, 0)
    rates = [0.01, 0.1]
    p = eval_linear.parse(["RUN", "--quick", "--epochs", "2", "--batch", "16", "--lr", *map(str, rates)])
    data = images_of(y)
    probes = eval_linear.train_probes(p, Planted(), data, z)
    order = torch.randperm(96, generator=clever.generator("cpu", 0, "held out"))
    held, rows = order[:9], order[9:]
    batches = list(clever.batches(87, clever.Config(batch=16), 0, 10))
    gen = clever.generator("cpu", 0, "head")
    for part, i in Planted.linear.items():
        best = -1
        for rate in rates:
            w = (0.01 * torch.randn(4, len(i), generator=gen)).double()
            b, speed_w, speed_b = (torch.zeros(4).double(), torch.zeros_like(w), torch.zeros(4).double())
            for step, some in enumerate(batches):
                x, target = z[rows[some]][:, i].double(), F.one_hot(y[rows[some]], 4)
                slope = ((x @ w.T + b).softmax(1) - target) / 16
                speed_w, speed_b = 0.9 * speed_w + slope.T @ x, 0.9 * speed_b + slope.sum(0)
                lr = rate * 16 / 256 * (1 + math.cos(math.pi * step / 10)) / 2
                w, b = w - lr * speed_w, b - lr * speed_b
            hits = int(((z[held][:, i].double() @ w.T + b).argmax(1) == y[held]).sum())
            if hits > best:
                best, chosen = hits, (rate, w, b)
        assert probes[part][0] == chosen[0]
        close(probes[part][1].weight.detach().double(), chosen[1], 1e-4)
        close(probes[part][1].bias.detach().double(), chosen[2], 1e-4)

# claim 29: IR and EF are the dimensions of the last representation, and all of a ViT its last four CLS tokens
def test_parts_are_dimensions_of_the_last_representation():
    cfg = clever.Config(**TINY)
    backbone = clever.build_backbone("vit_micro", 32).eval()
    model = eval_linear.Representation(backbone, cfg, eval_linear.parse(["RUN"]), torch.device("cpu"))
    x = torch.randn(2, 3, 32, 32)
    z, last = model(x), backbone(x)
    assert z.shape == (2, 4 * 96) and len(model.linear["all"]) == 4 * 96
    ir, ef = clever.split(last, 0.8)
    for part, expected in (("all", last), ("IR", ir), ("EF", ef)):
        assert torch.equal(z[:, model.last[part]], expected)
    assert torch.equal(model.linear["EF"], model.last["EF"])

# claim 28: a test view depends on its position alone, and that of a small upright image is the image
def test_views_are_functions_of_the_generator():
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)

    def view(kind, chunk):
        gen = clever.generator("cpu", chunk)
        return eval_linear.make_view(images, torch.ones(5), 32, gen, **eval_linear.KINDS[kind])

    assert torch.equal(view("cj+rot+elastic", 3), view("cj+rot+elastic", 3))
    assert not torch.equal(view("cj+rot+elastic", 3), view("cj+rot+elastic", 4))
    plain = view("orig", 0)
    close(plain, clever.normalize(images / 255), 1e-4)
    close(view("rot=90", 0), plain.rot90(1, (2, 3)), 1e-3)

# claim 28: the random crops of a step do not depend on how many processes share them
def test_processes_share_the_crops_of_one():
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)

    def views(some, share):
        gen = clever.generator("cpu", "step")
        return eval_linear.make_view(some, torch.ones(len(some)), 32, gen, share, crop=True, flip=True)

    both = torch.cat([views(images[:3], (0, 2)), views(images[3:], (1, 2))])
    close(both, views(images, (0, 1)), 1e-6)

# claim 28: --labels draws equally many images of each class, the same for a seed
def test_a_draw_of_labels_is_fixed_and_balanced():
    labels = torch.arange(1000) % 10
    draw = eval_linear.balanced_draw
    assert labels[draw(labels, 0.1, 0)].bincount().tolist() == [10] * 10
    assert labels[draw(labels, 0.001, 0)].bincount().tolist() == [1] * 10
    assert torch.equal(draw(labels, 0.1, 0), draw(labels, 0.1, 0))
    assert not torch.equal(draw(labels, 0.1, 0), draw(labels, 0.1, 1))

# claim 30: top-5 is left out of fewer than six classes
def test_top_5_needs_six_classes():
    scores = torch.eye(6).roll(1, 1)
    assert eval_linear.accuracy(torch.eye(6), torch.arange(6)) == [100, 100]
    assert eval_linear.accuracy(scores[:, :5][:5], torch.arange(5)) == pytest.approx([0])

# claim 31: weights load from the layouts of timm, DINO and this project, head or not
def test_published_layouts_load(tmp_path):
    own = clever.build_backbone("vit_micro", 32).state_dict()
    bare = {f"backbone.{name}": value for name, value in own.items()}
    wrapped = {f"module.backbone.{name}": value for name, value in own.items()}
    zeros = {name: 0 * value for name, value in wrapped.items()}
    head = {"head.mlp.0.weight": torch.zeros(3)}
    options = argparse.Namespace(arch="vit_micro", lr=0.1)

    def load(content, arch):
        torch.save(content, tmp_path / "w.pt")
        argv = ["--weights", str(tmp_path / "w.pt"), "--arch", arch, "--data", "patterns"]
        return eval_linear.open_model(eval_linear.parse(argv))

    for content in (own, {**own, "head.weight": torch.zeros(10, 96)}, dict(student={**wrapped, **head}),
                    dict(teacher={**bare, **head}, student=zeros, epoch=3, args=options),
                    dict(training=dict(teacher=bare))):
        cfg, _, loaded = load(content, "vit_micro")
        assert cfg.global_size == 32
        assert all(torch.equal(value, own[name]) for name, value in loaded.state_dict().items())
    for size in (32, 224):
        assert load(clever.build_backbone("resnet18", size).state_dict(), "resnet18")[0].global_size == size

# claim 31: a file that does not fit, runs code, or is of safetensors is refused in one sentence that helps
def test_wrong_weights_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = clever.build_backbone("vit_micro", 32).state_dict()
    torch.save(dict(teacher=own, more=Payload()), "code.pt")
    torch.save({name: value for name, value in own.items() if "qkv" not in name}, "part.pt")
    torch.save({**own, "odd": torch.zeros(1)}, "odd.pt")
    torch.save([1, 2], "list.pt")
    Path("w.safetensors").write_bytes(b"x")
    Path("text.pt").write_text("x")
    convert = "torch.save(safetensors.torch.load_file(A), B)"
    for name, words in dict(code="mkdir", part="blocks.0.attn.qkv.weight", odd='"odd"', list="named tensors",
                            text="named tensors", none="FileNotFound", convert=convert).items():
        name = "w.safetensors" if name == "convert" else f"{name}.pt"
        said = refused(capsys, "--weights", name, "--arch", "vit_micro", "--data", "patterns")
        assert words in said and name in said, said
    assert "resnet18" in refused(capsys, "--weights", "odd.pt", "--arch", "resnet18", "--data", "patterns")
    assert not Path("executed").exists() and not Path("eval.json").exists()

WRONG_EVALUATIONS = """NONE > no folder of a run
--weights A.pt --data patterns > --arch
--weights A.pt --arch vit_tiny > --data
--weights A.pt --arch vit_tini --data patterns > vit_tini
RUN --quik > --quik
RUN --epochs ten > --epochs
RUN --epochs 0 > greater than 0
RUN --batch=-4 > greater than 0
RUN --lr 0.1 inf > greater than 0
RUN --lr nan > greater than 0
RUN --labels=-0.1 > greater than 0
RUN --labels nan > greater than 0
RUN --labels 2 > at most 1
RUN --parts iv > invalid choice
RUN --arch vit_tiny > --arch would be ignored
RUN --ratio=1 > --ratio=1 would be ignored
RUN --weights A.pt > --weights would be ignored
RUN --finetune --parts ir > --parts would be ignored
RUN --finetune --quick > --quick would be ignored
RUN --finetune --lr 1 > --lr would be ignored
RUN --davis ODD --epochs 100 > --epochs would be ignored
RUN --davis ODD > DAVIS-2017
RUN --visualize no.png > cannot be read
RUN --data ODD > b, c
RUN --out RUN/config.json > cannot be written
DINO --parts ef > no split
NET --visualize x > ViT
BARE > backbone.pt
OLD --out OLD > eval.json"""

# claim 30: a wrong evaluation, or an option that would be ignored, is one sentence, exit code 2, nothing
# written
def test_wrong_evaluations_are_refused(tmp_path, capsys):
    data = labelled_pictures(tmp_path / "data", 2, 2)
    untrained(tmp_path / "RUN", data)
    untrained(tmp_path / "DINO", data, method="dino")
    untrained(tmp_path / "NET", data, arch="resnet18")
    (untrained(tmp_path / "BARE") / "backbone.pt").unlink()
    (labelled_pictures(tmp_path / "ODD", 1, 1) / "val" / "b").rename(tmp_path / "ODD" / "val" / "c")
    (untrained(tmp_path / "OLD", data) / "eval.json").write_text("[1, 2]")
    before = tree(tmp_path)
    for line in WRONG_EVALUATIONS.splitlines():
        command, _, words = line.partition(" > ")
        argv = [re.sub("^[A-Z]+(?=$|/)", f"{tmp_path}/\\g<0>", word) for word in command.split()]
        if "--out" not in argv:
            argv += ["--out", tmp_path / "new" / "folder"]
        assert words in refused(capsys, *argv)
    assert tree(tmp_path) == before

# claim 30: broken test images are listed and refused before the work; no table of black images
@pytest.mark.parametrize("broken", [1, 4])
def test_broken_test_images_are_refused(tmp_path, capsys, broken):
    data = labelled_pictures(tmp_path / "data", 2, 2)
    for path in sorted(data.glob("val/*/*"))[:broken]:
        path.write_text("no image")
    before = tree(tmp_path)
    run = untrained(tmp_path / "run", data)
    assert evaluate(run, "--quick", "--out", tmp_path / "new") == 2
    said = capsys.readouterr()
    last = said.err.splitlines()[-1]
    assert said.out == "" and f"{broken} of 4 images" in last and "val/a/00.jpg" in last
    assert not (tmp_path / "new").exists() and before <= tree(tmp_path)

# claim 30: one command prints and writes the table of parts and perturbations; two processes give the same
def test_one_command_writes_the_table_and_two_processes_agree(tmp_path):
    data = labelled_pictures(tmp_path / "data", 30, 140, strength=0.01)  # 280 test images: two chunks
    folder = untrained(tmp_path / "run", data)
    argv = [folder, *"--epochs 3 --batch 16 --lr 0.01 0.1 --workers 0".split()]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = dict(WORLD_SIZE=2, LOCAL_WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    both = [*argv, "--out", tmp_path / "two"]
    ranks = [start_eval(both, tmp_path, RANK=rank, LOCAL_RANK=rank, **env) for rank in (0, 1)]
    ended = [rank.communicate(timeout=300) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], ended
    assert ended[1][0] == "" and "| cj+rot+elastic " in ended[0][0] and "below 0" in ended[0][0]
    assert evaluate(*argv) == 0
    one, two = sections(folder), sections(tmp_path / "two")
    assert one["probes"]["settings"]["epochs"] == 3
    assert set(one) == {"probes", "rotation"}
    for what in ("linear", "k-NN"):
        for part in ("all", "IR", "EF"):
            a, b = one["probes"][f"{what} {part}"], two["probes"][f"{what} {part}"]
            assert list(a) == ["orig", "cj", "cj+flip", "cj+rot", "cj+rot+elastic"]
            assert all(a[kind] == pytest.approx(b[kind], abs=0.8) for kind in a)  # two images
    for what, row in one["rotation"]["after"].items():
        assert row == pytest.approx(two["rotation"]["after"][what], rel=1e-3, abs=1e-3)

# claim 30: fine-tuning, labels, curves and other weights add sections; those of before and the run stay
def test_sections_are_added_and_the_run_is_left_alone(tmp_path):
    folder = untrained(tmp_path / "run", labelled_pictures(tmp_path / "data", 20, 4))
    weights = (folder / "backbone.pt").read_bytes()
    common = ("--epochs", 3, "--batch", 16, "--workers", 0)
    assert evaluate(folder, *common, "--quick", "--curve") == 0
    first = sections(folder)
    assert first["probes quick"]["k-NN all"]["rot=0"] == first["probes quick"]["k-NN all"]["orig"]
    assert set(first["probes quick"]["linear EF"]) == set(eval_linear.KINDS)
    assert evaluate(folder, *common, "--finetune", "--labels", 0.5) == 0
    for name in ("A.pt", "B.pt"):
        (tmp_path / name).write_bytes(weights)
        argv = ("--weights", tmp_path / name, "--arch", "vit_micro", "--ratio", 0.8)
        argv += ("--data", tmp_path / "data")
        assert evaluate(*argv, *common, "--quick", "--parts", "Ir", "--out", folder) == 0
    saved = sections(folder)
    assert saved["finetune labels 0.5"]["linear all"]["orig"][0] > 90
    assert {name: saved[name] for name in first} == first
    for name in ("A.pt", "B.pt"):
        section = saved[f"probes {tmp_path / 'data'} {tmp_path / name} quick"]
        assert section["k-NN IR"]["orig"] == first["probes quick"]["k-NN IR"]["orig"]
        assert "k-NN EF" not in section
    assert (folder / "backbone.pt").read_bytes() == weights

# claim 32: probing a convolutional network leaves its batch norm alone; fine-tuning keeps its statistics
def test_batch_norm_is_left_alone(tmp_path):
    data = labelled_pictures(tmp_path / "data", 6, 3)
    backbone = clever.build_backbone("resnet18", 32)
    cfg = clever.Config(**{**TINY, "arch": "resnet18"})
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    splits = [clever.load_images(str(data), part, 32) for part in ("train", "val")]
    for options, changed in ((["--quick"], False), ([], False), (["--finetune"], True)):
        p = eval_linear.parse(["RUN", "--epochs", "1", "--batch", "8", *options])
        model = eval_linear.Representation(backbone, cfg, p, torch.device("cpu"))
        eval_linear.evaluate(p, model, *splits)
        same = {name: torch.equal(value, before[name]) for name, value in backbone.state_dict().items()}
        assert all(same[name] for name in same if "running" in name)
        assert all(same.values()) != changed

def moving_shapes(frames=12, side=64):
    """Two shapes that move over grey noise: frames (T, 3, side, side), ids (T, side, side)."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    clip, ids = [], []
    for t in range(frames):
        circle = (x - 16 - 2 * t) ** 2 + (y - 20) ** 2 < 144
        box = ((x - 44 + t).abs() < 10) & ((y - 46).abs() < 10)
        colour = torch.tensor([0.4, -0.4, -0.4])[:, None, None]
        clip.append(0.5 + 0.05 * normal(3, side, side, seed=t) + colour * circle + colour.flip(0) * box)
        ids.append(circle * 1 + (box & ~circle) * 2)
    return torch.stack(clip).float(), torch.stack(ids)

# claim 32: label propagation follows objects by their patches, and fails on shuffled ones
def test_label_propagation_follows_colour_patches():
    clip, truth = moving_shapes()
    features = F.avg_pool2d(clip - 0.5, 2).permute(0, 2, 3, 1)  # (T, 32, 32, 3): raw patches
    scores = eval_linear.jaccard(features, truth)
    assert len(scores) == 2 and min(scores) > 0.75
    order = [torch.randperm(1024, generator=torch.Generator().manual_seed(t)) for t in range(12)]
    shuffled = torch.stack([f.flatten(0, 1)[o].view(32, 32, 3) for f, o in zip(features, order)])
    assert max(eval_linear.jaccard(shuffled, truth)) < 0.5

# claim 32: J is intersection over union, 1 where both are empty, over the frames but the first and last
def test_jaccard_equals_a_naive_one(monkeypatch):
    truth = torch.tensor([[[0, 1], [7, 7]], [[0, 1], [7, 0]], [[0, 0], [7, 7]], [[0, 0], [0, 0]]])
    found = torch.tensor([[[0, 1], [7, 7]], [[1, 1], [0, 0]], [[0, 0], [7, 0]], [[7, 7], [7, 7]]])
    ids = torch.tensor([0, 1, 7])
    monkeypatch.setattr(eval_linear, "propagate", lambda *_: (found[:, None] == ids[:, None, None]).float())
    naive = []
    for i in (1, 7):
        J = []
        for ours, theirs in zip(found[1:-1], truth[1:-1]):
            ours, theirs = (set(map(tuple, (frame == i).nonzero().tolist())) for frame in (ours, theirs))
            J.append(len(ours & theirs) / len(ours | theirs) if ours | theirs else 1.0)
        naive.append(sum(J) / 2)
    assert eval_linear.jaccard(torch.zeros(4, 2, 2, 1), truth) == pytest.approx(naive)

# claim 32: --davis reads the layout of DAVIS-2017
def test_davis_reads_the_layout_of_the_data_set(tmp_path):
    root, (clip, truth) = tmp_path / "davis", moving_shapes(4)
    for folder in ("JPEGImages/480p/toy", "Annotations/480p/toy", "ImageSets/2017"):
        (root / folder).mkdir(parents=True)
    (root / "ImageSets/2017/val.txt").write_text("toy\n")
    for t in range(4):
        TF.to_pil_image(clip[t].clamp(0, 1)).save(root / f"JPEGImages/480p/toy/{t:05}.jpg")
        mask = Image.fromarray(truth[t].byte().numpy(), "P")
        mask.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
        mask.save(root / f"Annotations/480p/toy/{t:05}.png")
    assert evaluate(untrained(tmp_path / "run"), "--davis", root) == 0
    saved = sections(tmp_path / "run")["davis"]
    assert 0 < saved["J mean"] <= 1 and len(saved["videos"]["toy"]) == 2

# claim 32: --visualize draws an image, components of its parts and attention at four turns, each with its
# title
def test_visualize_writes_a_titled_row_for_each_map(tmp_path):
    data, folder = labelled_pictures(tmp_path / "data"), untrained(tmp_path / "run")
    assert evaluate(folder, "--visualize", data / "train" / "a" / "00.jpg") == 0
    with Image.open(folder / "visualize.png") as sheet:  # image, all, IR, EF, 3 heads; tiles of 128 px
        assert sheet.size == (4 * 144 + 16, 7 * 144 + 16)
        for row in range(7):
            for column in range(4):
                place = (144 * column + 16, 144 * row, 144 * column + 144, 144 * row + 16)
                title = sheet.convert("L").crop(place)
                assert title.getextrema()[1] > 200
    tokens = normal(4, 9, 6)
    colours = eval_linear.components(tokens.sin())
    assert colours.shape == (4, 3, 9)
    x = tokens.sin().flatten(0, 1)
    x = x - x.mean(0)
    basis = torch.linalg.eigh(x.T @ x).eigenvectors.flip(1)[:, :3]  # of all turns together
    for ours, theirs in zip(colours.transpose(0, 1).flatten(1), (x @ basis).T):
        theirs = (theirs - theirs.min()) / (theirs.max() - theirs.min())
        close(ours, theirs if (ours - theirs).abs().max() < 0.01 else 1 - theirs, 1e-6)  # its sign is free
    assert eval_linear.components(normal(4, 9, 1)).shape == (4, 3, 9)

