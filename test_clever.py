"""The claims of clever.py and eval_linear.py, each the name of its test; numbers are checked against naive
versions written out here.

    pytest                      the plain run
    pytest -m long -s           the same loops for longer: kills, mutated files, 2,000 steps
    pytest -m benchmark -s      time and memory beside the naive versions: ratios, nothing asserted
"""
import argparse
import copy
import inspect
import itertools
import json
import math
import operator
import os
import random
import re
import runpy
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import time
import warnings
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial, reduce
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
import torchvision.transforms.functional as TF
from PIL import Image, ImageFilter
from torch import nn
from torch.profiler import ProfilerActivity
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode

import clever
import eval_linear

warnings.filterwarnings("ignore", category=pytest.PytestUnknownMarkWarning)  # no other file registers them
HERE, BILINEAR, BICUBIC = Path(__file__).parent, InterpolationMode.BILINEAR, InterpolationMode.BICUBIC
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
CHILDREN = torch.multiprocessing.get_context("forkserver")  # real processes that share one import
CHILDREN.set_forkserver_preload(["test_clever"])
THREADS = torch.get_num_threads()  # a benchmark's; a test has one, and so has each of its processes
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
TINY = dict(arch="vit_micro", global_size=32, local_size=16, local_views=2, blur=False, out_dim=64,
            hidden_dim=32, bottleneck_dim=16, batch=8, epochs=3, warmup_epochs=1,
            lr=5e-3, precision="fp32", workers=0, device="cpu")


@pytest.fixture(autouse=True)
def only_on_request(request):
    """Tests marked `long` or `benchmark` run where `-m` names the mark; a benchmark has all threads."""
    marks = {"long", "benchmark"} & {m.name for m in request.node.iter_markers()}
    for mark in marks:
        if mark not in request.config.option.markexpr:
            pytest.skip(f"runs with -m {mark}")
    torch.set_num_threads(THREADS if "benchmark" in marks else 1)


@pytest.fixture(scope="session", autouse=True)
def ahead(request, tmp_path_factory):
    """What takes long begins at once, beside the other tests: the imports of CHILDREN, and these calls."""
    forkserver.ensure_running()
    wanted = {name for item in request.session.items for name in item.fixturenames}
    calls = [f for name, f in dict(demo=run_demo, interrupted=interrupt_torchrun).items() if name in wanted]
    with ThreadPoolExecutor(1) as pool:
        yield {f: pool.submit(f, tmp_path_factory.mktemp(f.__name__)) for f in calls}


def tiny(**options):
    """A configuration of a network that runs in milliseconds."""
    return clever.Config(**{**TINY, **options})


def flags(**options):
    """The command line of a tiny run with these options over it."""
    given = {"report": False, **TINY, **options}
    return [x for k, v in given.items() for x in (
        ["--" + "no-" * (not v) + k.replace("_", "-")] if isinstance(v, bool) else [clever.flag(k), str(v)])]


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def normal(*shape, seed=0, grad=False):
    """Normal random numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed),
                       dtype=torch.float64).requires_grad_(grad)


# ------------------------------ 1. Losses ------------------------------ #


def naive_pairs(term, student, teacher, centre, ts=0.1, tt=0.04):
    """Mean of term(P_i, Q_j) over each global view i and each other view j (DINO's double loop)."""
    values = []
    for i in range(len(teacher)):
        for j in range(len(student)):
            if i != j:
                P, Q = ((teacher[i].detach() - centre) / tt).softmax(-1), (student[j] / ts).softmax(-1)
                values.append(term(P, Q).mean())
    return sum(values) / len(values)


def naive_invariance(*args):
    return naive_pairs(lambda P, Q: -(P * Q.log()).sum(-1), *args)


def naive_orthogonality(*args):
    return naive_pairs(lambda P, Q: ((P * Q).sum(-1) / (P * P).sum(-1).sqrt() / (Q * Q).sum(-1).sqrt()).abs(),
                       *args)


def naive_preg(head_ir, head_ef):
    a, b = (sum(p.pow(2).sum() for p in h.parameters()) for h in (head_ir, head_ef))
    return (a - b).abs()


NAIVE = {clever.invariance_loss: naive_invariance, clever.orthogonality_loss: naive_orthogonality}
each_loss = pytest.mark.parametrize("loss", NAIVE, ids=["L_CL", "L_Orth"])


@each_loss
@pytest.mark.parametrize("V, B, K, ts, tt",
                         [(2, 1, 2, 0.1, 0.04), (3, 5, 7, 0.1, 0.07), (10, 4, 64, 0.2, 0.04)])
def test_each_loss_equals_the_naive_pairwise_one(loss, V, B, K, ts, tt):
    student, teacher = normal(V, B, K, grad=True), normal(2, B, K, seed=1, grad=True)
    centre = normal(K, grad=True)
    ours, naive = loss(student, teacher, centre, ts, tt), NAIVE[loss](student, teacher, centre, ts, tt)
    assert ours.shape == ()
    close(ours, naive)
    close(torch.autograd.grad(ours, student, retain_graph=True)[0], torch.autograd.grad(naive, student)[0])
    ours.backward()
    assert teacher.grad is None and centre.grad is None and student.grad.abs().sum() > 0


@each_loss
def test_the_order_of_the_batch_does_not_matter_but_the_pairing_does(loss):
    student, teacher, centre, order = normal(4, 6, 9), normal(2, 6, 9, seed=1), normal(9), [2, 0, 5, 1, 3, 4]
    close(loss(student[:, order], teacher[:, order], centre), loss(student, teacher, centre))
    assert abs(loss(student[:, order], teacher, centre) - loss(student, teacher, centre)) > 1e-3


@each_loss
def test_a_loss_keeps_no_softmax_for_its_backward(loss):
    for f in (loss, NAIVE[loss]):
        kept = {}
        note = lambda x: kept.update({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()}) or x
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            f(normal(10, 4, 64, grad=True), normal(2, 4, 64), normal(64))
        assert (sum(kept.values()) <= 8 * (10 + 2) * 4 * 64 + 1000) == (f is loss)  # the logits and P


def test_orthogonality_is_1_for_equal_peaks_and_0_for_disjoint_ones():
    peaks = 50 * torch.eye(4, 8).double()                                      # (B, K)
    equal, disjoint = (clever.orthogonality_loss(s.expand(5, 4, 8), peaks.expand(2, 4, 8), torch.zeros(8))
                       for s in (peaks, peaks.roll(4, -1)))
    assert equal > 1 - 1e-9 and disjoint < 1e-9


def test_preg_is_0_for_equal_heads_and_counts_every_parameter_of_both():
    a, b = clever.ProjectionHead(6, 20, 8, 4).double(), clever.ProjectionHead(3, 12, 8, 4).double()
    for p in a.parameters():
        p.data += 0.5                                                          # the biases count too
    assert clever.projector_regularization(a, copy.deepcopy(a)) == 0
    value = clever.projector_regularization(a, b)
    close(value, naive_preg(a, b))
    close(value, clever.projector_regularization(b, a))
    value.backward()
    for p, sign in [(p, 2) for p in a.parameters()] + [(p, -2) for p in b.parameters()]:
        close(p.grad, sign * p.detach())


def test_the_loss_is_the_weighted_sum_and_dino_has_its_first_term_alone():
    heads = clever.ProjectionHead(6, 16, 8, 4).double(), clever.ProjectionHead(3, 12, 8, 4).double()
    student, teacher, centres = ([normal(*n, k, seed=s) for k in (16, 12)] for s,
                                 n in enumerate(((4, 2), (2, 2), ())))
    terms = clever.clever_loss(tiny(lambda_orth=0.3, lambda_reg=0.5), student, teacher, centres, heads)
    ir, ef = zip(student, teacher, centres)
    parts = naive_invariance(*ir), naive_orthogonality(*ef), naive_preg(*heads)
    assert list(terms) == ["L_CL", "L_Orth", "L_PReg", "loss"]
    close(torch.stack([*terms.values()]), torch.stack([*parts, parts[0] + 0.3 * parts[1] + 0.5 * parts[2]]))
    dino = clever.clever_loss(tiny(), *((x[0], None) for x in (student, teacher, centres, heads)))
    assert list(dino) == ["L_CL", "loss"] and dino["L_CL"] == dino["loss"] == terms["L_CL"]


# ------------------------------ 2. Shapes ------------------------------ #


@pytest.mark.parametrize("arch, D, millions", [
    ("vit_micro", 96, 0.47), ("vit_tiny", 192, 5.5), ("vit_small", 384, 21.7), ("vit_base", 768, 85.8),
    ("resnet18", 512, 11.2), ("resnet50", 2048, 23.5), ("vmamba_tiny", 768, 29.5)])
def test_every_backbone_has_its_width_and_size_and_takes_both_views(arch, D, millions):
    f = clever.build_backbone(arch, 224 if arch != "vit_micro" else 32).eval()
    assert f.embed_dim == D and abs(sum(p.numel() for p in f.parameters()) / 1e6 - millions) < 0.06
    with torch.no_grad():
        assert all(f(torch.zeros(2, 3, side, side)).shape == (2, D) for side in (32, 96))


@pytest.mark.parametrize("ratio", [0.02, 0.5, 0.8, 0.99, 1.0])
def test_ir_and_ef_together_are_the_representation_and_feed_their_own_heads(ratio):
    for D in clever.EMBED_DIM.values():
        ir, ef = clever.split(normal(2, 3, D), ratio)
        assert ir.shape[-1] == math.floor(ratio * D) and torch.equal(torch.cat([ir, ef], -1), normal(2, 3, D))
    net, d = clever.CLeVER(tiny(ratio=ratio, ef_out_dim=48)), math.floor(ratio * 96)
    views = [torch.randn(2, 3, s, s) for s in (32, 32, 16, 16)]
    ir, ef = net(views)
    assert ir.shape == (4, 2, 64) and net.head_ir.mlp[0].in_features == d
    close(ir, torch.stack([net.head_ir(net.backbone(v)[:, :d]) for v in views]), 1e-5)
    assert net.head_ef is ef is None if d == 96 else ef.shape == (4, 2, 48)
    if d < 96:
        close(ef, torch.stack([net.head_ef(net.backbone(v)[:, d:]) for v in views]), 1e-5)


def test_the_head_is_the_designed_one():
    head, sizes = clever.ProjectionHead(154), [(2048, 154), (2048,), (2048, 2048), (2048,), (256, 2048),
                                               (256,)]
    assert [tuple(p.shape) for p in head.parameters()] == [*sizes, (65536, 256)]
    assert all(p.abs().max() == 0 if p.ndim == 1 else abs(p.std() - 0.02) < 1e-3 for p in head.parameters())
    head, x = clever.ProjectionHead(5, 7, 6, 4).double(), normal(3, 5)
    close(head(x), naive_head(head, x))
    head.prototypes.weight.data *= 3                                           # their length does not matter
    close(head(x), naive_head(head, x))


# ------------------------------ 3. Collapse ------------------------------ #

FEATURES = dict(healthy=normal(256, 32), constant=normal(1, 32) + 1e-4 * normal(256, 32),
                line=normal(256, 1) * normal(1, 32, seed=1) + 1e-6 * normal(256, 32))
LOGITS = dict(healthy=4 * normal(256, 64), uniform=1e-3 * normal(256, 64),
              one=normal(256, 64) + 50 * torch.eye(1, 64))


@pytest.mark.parametrize("features, logits, says", [
    ("healthy", "healthy", ""), ("healthy", "uniform", "uniform"), ("healthy", "one", "one prototype"),
    ("constant", "healthy", "same features"), ("line", "healthy", "same features")])
def test_each_alarm_rings_on_its_collapse_and_only_there(features, logits, says):
    x, P = FEATURES[features], LOGITS[logits].softmax(-1)
    m, mean, s = clever.collapse_metrics(x, P), P.mean(0), torch.linalg.eigvalsh(x.T @ x).clamp(1e-30).sqrt()
    assert m["entropy"] == pytest.approx(-(P * P.log()).sum(1).mean().item(), abs=1e-9)
    assert m["kl_uniform"] == pytest.approx((mean * (mean * 64).log()).sum().item(), abs=1e-9)
    unit = x / x.norm(dim=1, keepdim=True)
    assert m["std"] == pytest.approx(unit.std(0).mean().item() * 32 ** 0.5, abs=1e-9)
    assert m["rank"] == pytest.approx(torch.exp(-(s / s.sum() * (s / s.sum()).log()).sum()).item(), rel=1e-3)
    for part in ("IR", "EF"):  # L_Orth has nothing against a uniform EF
        alarm, rings = clever.collapse_alarm(part, m, 64), says and (part, says) != ("EF", "uniform")
        assert f"COLLAPSE of {part}" in alarm and says in alarm and "Try" in alarm if rings else alarm == ""


# ------------------------------ 4. Augmentation ------------------------------ #


def smooth(height, width, seed=0, highest=10.0):
    """A smooth colour image in [0, 1], of waves: (1, 3, height, width)."""
    rng, image = random.Random(seed), 0
    y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width,
                          indexing="ij")
    for _ in range(12):
        fx, fy = (rng.uniform(-highest, highest) for _ in "xy")
        image = image + torch.stack([torch.sin(2 * math.pi * (fx * x + fy * y + rng.random()))
                                     for _ in "rgb"])
    return (0.5 + image / image.abs().max() / 2)[None]


def axis(size):
    """Centres of pixels in [-1, 1]."""
    return (torch.arange(size) * 2 + 1) / size - 1


def disc(size, radius):
    """The pixels of a view within `radius` half sides of its centre."""
    return (axis(size)[:, None] ** 2 + axis(size) ** 2).sqrt() <= radius


def psnr(a, b, where=torch.tensor(True)):
    return -10 * math.log10(((a - b) ** 2)[where.expand_as(a)].mean())


def warp(images, size, box=(0, 0, 1, 1), flip=False, angle=0.0, shift=None):
    """clever.warp with the same, or no, crop, flip, rotation and deformation for all images."""
    B = len(images)
    return clever.warp(images, size, torch.tensor([box] * B), torch.tensor([flip] * B),
                       torch.tensor([angle] * B), shift)


@pytest.mark.parametrize("size, scale", [(224, (0.4, 1.0)), (96, (0.05, 0.4))])
def test_the_crop_is_that_of_torchvision(tmp_path, size, scale):
    TF.to_pil_image(smooth(375, 500)[0]).save(tmp_path / "x.png")
    original = TF.pil_to_tensor(Image.open(tmp_path / "x.png"))
    stored, aspect = clever.decode(tmp_path / "x.png", 320)
    resized = TF.resize(original, [320, 320], BICUBIC, antialias=True)
    assert (stored.int() - resized.int()).abs().max() <= 1 and aspect == pytest.approx(500 / 375)
    for seed in range(8):
        torch.manual_seed(seed)
        top, left, h, w = T.RandomResizedCrop.get_params(original, scale, (3 / 4, 4 / 3))
        ours = warp(stored[None] / 255, size,
                    ((2 * left + w) / 500 - 1, (2 * top + h) / 375 - 1, w / 500, h / 375))
        theirs = TF.resized_crop(original, top, left, h, w, [size, size], BICUBIC, antialias=True)
        assert psnr(ours, theirs[None] / 255) > 36


@pytest.mark.parametrize("view, scale", [(0, (0.4, 1.0)), (2, (0.05, 0.4))])
@pytest.mark.parametrize("width, height", [(375, 500), (500, 375), (900, 100)])
def test_crop_boxes_are_distributed_as_those_of_torchvision(view, scale, width, height):
    torch.manual_seed(0)
    crop = clever.MultiCrop(tiny(local_scale=(0.05, 0.4), global_scale=(0.4, 1.0)))
    p, image = crop.draw(view, 10_000, clever.generator("cpu", 0)), torch.empty(3, height, width)
    box = crop.crop_box(p["area"], p["ratio"], p["place"], torch.full((10_000,), width / height))
    theirs = [T.RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(5000)]
    top, left, h, w = torch.tensor(theirs).T
    theirs = [(2 * left + w) / width - 1, (2 * top + h) / height - 1, w / width, h / height]
    assert (box[:, :2].abs() + box[:, 2:] <= 1 + 1e-6).all()
    for mine, other in zip(box.T, theirs):
        q = torch.linspace(0.01, 0.99, 99)
        assert (mine.quantile(q) - other.quantile(q)).abs().max() < 0.06


def test_a_flip_is_exact():
    image = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    close(warp(image, 32), image, 1e-14)
    close(warp(image, 32, flip=True), image.flip(-1), 1e-14)


@pytest.mark.parametrize("angle", [-90.0, -37.0, 12.5, 45.0, 90.0])
def test_a_rotation_is_that_of_torchvision_and_its_corners_are_black(angle):
    image, x, y = smooth(64, 64) * 0.8 + 0.1, axis(64), axis(64)[:, None]
    ours, a = warp(image, 64, angle=angle), math.radians(angle)
    assert ((ours - TF.rotate(image, angle, BILINEAR)).abs() * disc(64, 0.95)).max() < 1e-4
    far = torch.maximum((math.cos(a) * x - math.sin(a) * y).abs(), (math.sin(a) * x + math.cos(a) * y).abs())
    assert (ours[:, :, far > 1.001] == 0).all() and (ours[:, :, far < 0.999] > 0.05).all()


def test_the_elastic_deformation_is_that_of_torchvision_and_strength_0_is_the_identity():
    image, noise = smooth(64, 64), torch.rand(1, 2, 64, 64) * 2 - 1
    alpha, sigma = 100 * 64 / 224, 5 * 64 / 224
    shift, kernel = clever.elastic_shift(noise, alpha, sigma), 2 * int(4 * sigma + 0.5) + 1
    theirs = TF.gaussian_blur(noise, [kernel] * 2, [sigma] * 2).permute(0, 2, 3, 1) * alpha / 64
    close(shift, theirs, 1e-5)
    ours = warp(image, 64, shift=shift)
    grid = torch.stack(torch.meshgrid(axis(64), axis(64), indexing="xy"), -1)
    inside = ((grid + shift).abs() < 1 - 1 / 64).all(-1)[:, None]
    close(ours * inside, TF.elastic_transform(image, theirs, BILINEAR) * inside, 1e-4)
    assert psnr(ours, image) < 40                                              # it does deform
    assert torch.equal(warp(image, 64, shift=clever.elastic_shift(noise, 0.0, sigma)), warp(image, 64))


def test_the_warp_is_the_composition_of_its_steps_in_the_designed_order():
    image, noise = smooth(320, 320, highest=6), normal(1, 2, 128, 128).float().clamp(-1, 1)
    box, shift, inner = (0.1, -0.2, 0.7, 0.6), clever.elastic_shift(noise, 57.0, 2.9), disc(128, 0.85)
    ours, crop = warp(image, 128, box, True, 33.0, shift), warp(image, 128, box)
    turn = lambda x: TF.rotate(x, 33.0, BILINEAR)
    bend = lambda x: TF.elastic_transform(x, shift, BILINEAR)
    assert psnr(ours, bend(turn(TF.hflip(crop))), inner) > 36
    for other in (bend(TF.hflip(turn(crop))), turn(bend(TF.hflip(crop))), bend(turn(crop))):
        assert psnr(ours, other, inner) < 34


def test_each_colour_operation_is_that_of_torchvision():
    x = torch.cat([torch.rand(1, 3, 32, 32), smooth(32, 32), smooth(32, 32)[:, :1].expand(-1, 3, -1, -1)])
    theirs = TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue
    each = torch.tensor([[0.6, 1.0, 1.4], [0.6, 0.9, 1.4], [0.0, 0.8, 1.2], [-0.1, 0.03, 0.5]])
    for order in [(0,), (1,), (2,), (3,), (2, 0, 3, 1), (3, 1, 0, 2)]:
        images = [x[i:i + 1] for i in range(3)]
        for k in order:
            images = [theirs[k](y, factor.item()) for y, factor in zip(images, each[k])]
        close(clever.color_jitter(x, *each, order), torch.cat(images), 1e-5)
    close(clever.gray(x).expand(-1, 3, -1, -1), TF.rgb_to_grayscale(x, 3), 1e-5)
    close(clever.normalize(x), TF.normalize(x, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), 1e-5)
    for sigma in (0.1, 0.7, 2.0):
        m = clever.gaussian_matrix(32, torch.full((3,), sigma), 6)[:, None]
        close(m @ x @ m.mT, TF.gaussian_blur(x, [13, 13], [sigma, sigma]), 1e-5)
    one, no, yes = torch.ones(3), torch.tensor([False] * 3), torch.tensor([False, True, True])
    p = dict(box=torch.tensor([[0.0, 0, 1, 1]] * 3), flip=no, angle=0 * one, brightness=one, contrast=one,
             saturation=one, hue=0 * one, gray=~yes, sigma=torch.tensor([1e-3, 1e-3, 2.0]), solarize=yes)
    expected = [TF.rgb_to_grayscale(x[:1], 3), TF.solarize(x[1:2], 0.5),
                TF.solarize(TF.gaussian_blur(x[2:], [13, 13], [2.0, 2.0]), 0.5)]
    views = clever.MultiCrop(tiny(blur=True)).make_view(x, 32, p, range(4))
    close(views, clever.normalize(torch.cat(expected)), 2e-5)


def uniform(x, low, high):
    """Kolmogorov's distance of numbers from a uniform distribution is that of chance."""
    x = (x.double().sort().values - low) / (high - low)
    assert x[0] >= -1e-6 and x[-1] <= 1 + 1e-6
    assert (x - torch.linspace(0, 1, len(x)).double()).abs().max() < 2 / len(x) ** 0.5


def happens(event, p):
    """The share of true values is p, but for chance (4 standard deviations)."""
    assert abs(event.double().mean() - p) <= 4 * math.sqrt(p * (1 - p) / len(event))


@pytest.mark.parametrize("aug, view", [*itertools.product(("baug", "caug", "caug+"), (0, 1, 2, 9))])
def test_every_random_parameter_has_the_designed_distribution(aug, view):
    cfg = tiny(aug=aug, blur=True, global_scale=(0.4, 1.0), local_scale=(0.05, 0.4))
    p = clever.MultiCrop(cfg).draw(view, 10_000, clever.generator("cpu", 0))
    blurred, jittered = p["sigma"] > 0.05, p["hue"] != 0
    uniform(p["area"][:, 0], *((0.05, 0.4) if view >= 2 else (0.4, 1.0)))
    uniform(p["ratio"][:, 0].log(), math.log(3 / 4), math.log(4 / 3))
    for name, low, high in (("brightness", 0.6, 1.4), ("contrast", 0.6, 1.4), ("saturation", 0.8, 1.2),
                            ("hue", -0.1, 0.1)):
        uniform(p[name][jittered], low, high)
        assert (p[name][~jittered] == (name != "hue")).all()
    for event, chance in ((p["flip"], 0.5), (p["gray"], 0.2), (p["solarize"], 0.2 * (view == 1)),
                          (jittered, 0.8),
                          (p["elastic"], 0.5 * (aug == "caug+")), (blurred, {0: 1.0, 1: 0.1}.get(view, 0.5))):
        happens(event, chance)
    for x, low, high in (*((column, 0, 1) for column in p["place"].T), (p["sigma"][blurred], 0.1, 2.0)):
        uniform(x, low, high)
    uniform(p["angle"], -90, 90) if aug != "baug" else happens(p["angle"] != 0, 0)
    numbers = [p[k][jittered].double()
               for k in ("flip", "gray", "brightness", "contrast", "saturation", "hue")]
    numbers = torch.stack([*numbers, p["area"][jittered, 0].double(), *p["place"][jittered].double().T])
    assert (torch.corrcoef(numbers) - torch.eye(len(numbers))).abs().max() < 0.05     # drawn independently


def test_the_order_of_the_colour_operations_is_random():
    crop, seen = clever.MultiCrop(tiny(global_size=8, local_size=8)), Counter()
    crop.make_view = lambda images, size, p, order, noise: seen.update([tuple(order)])
    for step in range(600):
        crop(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.ones(1), step)
    assert len(seen) == 24 and min(seen.values()) > 60 and max(seen.values()) < 140, seen


def test_views_depend_on_seed_and_step_and_not_on_the_number_of_processes():
    images, aspect = torch.randint(0, 256, (8, 3, 40, 40), dtype=torch.uint8), torch.rand(8) + 0.5

    def views(step=7, seed=0, rank=0, world=1):
        mine = slice(rank * 8 // world, (rank + 1) * 8 // world)
        crop = clever.MultiCrop(tiny(aug="caug+", blur=True, seed=seed), rank, world)
        return crop(images[mine], aspect[mine], step)
    whole = views()
    assert [tuple(v.shape) for v in whole] == [(8, 3, 32, 32)] * 2 + [(8, 3, 16, 16)] * 2
    for view, pieces in zip(whole, zip(*(views(rank=rank, world=4) for rank in range(4)))):
        close(view, torch.cat(pieces), 1e-5)
    assert all(map(torch.equal, whole, views())) and not torch.equal(whole[0], whole[1])
    assert not any(map(torch.equal, whole, views(step=8))) and not any(map(torch.equal, whole, views(seed=1)))


# ------------------------------ 5. The step ------------------------------ #


def naive_vit(f, x):
    """CLS token of a ViT, attention written out."""
    x = f.patch_embed.proj(x)
    n, side = x.shape[-1], math.isqrt(f.pos_embed.shape[1] - 1)
    grid = f.pos_embed[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = grid if n == side else F.interpolate(grid, (n, n), mode="bicubic")
    cls = (f.cls_token + f.pos_embed[:, :1]).expand(len(x), -1, -1)
    x = torch.cat([cls, (x + grid).flatten(2).transpose(1, 2)], 1)
    for b in f.blocks:
        q, k, v = (y.unflatten(-1, (b.attn.heads, -1)).transpose(1, 2)
                   for y in b.attn.qkv(b.norm1(x)).chunk(3, -1))
        weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)
        x = x + b.attn.proj((weights @ v).transpose(1, 2).flatten(2))
        x = x + b.mlp.fc2(F.gelu(b.mlp.fc1(b.norm2(x))))
    return f.norm(x)[:, 0]


def naive_head(h, x):
    """The projection head, its weight-normalised layer written out."""
    x, v = h.mlp(x), h.prototypes.weight
    return (x / x.norm(dim=-1, keepdim=True)) @ (v / v.norm(dim=1, keepdim=True)).T


def naive_schedule(base, end, epochs, spe, warmup=0):
    """DINO's cosine_scheduler."""
    n = (epochs - warmup) * spe
    return ([base * i / max(1, warmup * spe - 1) for i in range(warmup * spe)] +
            [end + 0.5 * (base - end) * (1 + math.cos(math.pi * i / n)) for i in range(n)])


class Published:
    """The published loop from the weights of a Training: losses pair by pair, loops over parameters."""

    def __init__(self, t):
        self.cfg, self.spe, self.clipped = t.cfg, t.steps_per_epoch, []
        self.centres = [x.clone() for x in t.centres]
        self.student, self.teacher, c = copy.deepcopy(t.student), copy.deepcopy(t.teacher), t.cfg
        free = [p for n, p in self.student.named_parameters() if n.endswith(".bias") or len(p.shape) == 1]
        decayed = [p for p in self.student.parameters() if all(p is not q for q in free)]
        self.optimizer = torch.optim.AdamW([dict(params=decayed), dict(params=free, weight_decay=0.0)],
                                           foreach=False)
        self.lr = naive_schedule(c.lr * c.batch / 256, c.min_lr, c.epochs, self.spe, c.warmup_epochs)
        self.wd = naive_schedule(c.weight_decay, c.weight_decay_end, c.epochs, self.spe)
        self.m = naive_schedule(c.momentum, 1.0, c.epochs, self.spe)

    def logits(self, net, views):
        z = torch.cat([naive_vit(net.backbone, torch.cat(vs)) for vs in (views[:2], views[2:]) if vs])
        d = math.floor(self.cfg.ratio * z.shape[1])
        pairs = [(net.head_ir, z[:, :d])] + [(net.head_ef, z[:, d:])] * (self.cfg.method == "clever")
        return [naive_head(h, x).unflatten(0, (len(views), -1)) for h, x in pairs]

    def step(self, views, step):
        c, (decayed, free) = self.cfg, self.optimizer.param_groups
        decayed["lr"] = free["lr"] = self.lr[step]
        decayed["weight_decay"] = self.wd[step]
        with torch.no_grad():
            targets = self.logits(self.teacher, views[:2])
        outputs = self.logits(self.student, views)
        args = [(*x, c.student_temp, c.teacher_temp)
                for x in zip(outputs, targets, self.centres, strict=True)]
        terms = [naive_invariance(*args[0])]
        if c.method == "clever":
            terms += [naive_orthogonality(*args[1]), naive_preg(self.student.head_ir, self.student.head_ef)]
        loss = sum(weight * term for weight, term in zip((1, c.lambda_orth, c.lambda_reg), terms))
        self.optimizer.zero_grad()
        loss.backward()
        for p in self.student.parameters():                                    # clip each gradient on its own
            factor = c.clip / (p.grad.norm(2).item() + 1e-6)
            self.clipped.append(factor < 1)
            if factor < 1:
                p.grad.mul_(factor)
        for name, p in self.student.named_parameters():
            if "prototypes" in name and step < c.freeze_epochs * self.spe:
                p.grad = None
        self.optimizer.step()
        with torch.no_grad():
            for mine, other in zip(self.teacher.parameters(), self.student.parameters()):
                mine.mul_(self.m[step]).add_((1 - self.m[step]) * other)
            self.centres = [c.centre_momentum * x + (1 - c.centre_momentum) * t.flatten(0, 1).mean(0)
                            for x, t in zip(self.centres, targets)]
        return [*terms, loss]


def batches(cfg, count, dtype, rank=0, world=1):
    """Views of the first steps of a run on random images."""
    gen, n = torch.Generator().manual_seed(0), cfg.batch // world
    images = torch.randint(0, 256, (cfg.batch, 3, 32, 32), dtype=torch.uint8,
                           generator=gen)[rank * n:(rank + 1) * n]
    crop = clever.MultiCrop(cfg, rank, world)
    return [[v.to(dtype) for v in crop(images, torch.ones(n), step)] for step in range(count)]


@pytest.mark.parametrize("method, ratio", [("clever", 0.8), ("dino", 1.0)])
def test_six_steps_equal_the_published_loop_written_out(method, ratio):
    cfg = tiny(method=method, ratio=ratio, drop_path=0.0, clip=0.02, ef_out_dim=48, lr=0.1)
    t = clever.Training(cfg, 2)
    t.student.double(), t.teacher.double()
    t.centres = [c.double() for c in t.centres]
    naive, before = Published(t), copy.deepcopy(t.student.state_dict())
    for step, views in enumerate(batches(cfg, 6, torch.float64)):
        terms, expected = clever.train_step(t, views, step), naive.step(views, step)
        close(torch.stack([v for k, v in terms.items() if k != "stop"]), torch.stack(expected).detach())
        for mine, theirs in ((t.student, naive.student), (t.teacher, naive.teacher)):
            for (name, p), q in zip(mine.named_parameters(), theirs.parameters()):
                torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10,
                                           msg=lambda m: f"{name}, step {step}: {m}")
        for mine, theirs in zip(t.centres, naive.centres, strict=True):
            close(mine, theirs)
        head = "head_ir.prototypes.weight"
        assert torch.equal(t.student.state_dict()[head], before[head]) == (step < 2)
    assert 0 < sum(naive.clipped) < len(naive.clipped)                         # some were clipped, some not
    assert all((a != b).any() for a, b in zip(t.student.state_dict().values(), before.values()))


# what torch.use_deterministic_algorithms refuses on a GPU (its documentation)
REFUSED = re.compile("_?((upsample|grid_sampl|reflection_pad|adaptive_|fractional_|avg_pool3d).*_backward|"
                     "max_unpool|nll_loss|ctc_loss|embedding_bag|bincount|histc|median|put_?$|"
                     "scatter_reduce)")


class NeverWait(TorchDispatchMode):
    """Within: an operation raises that makes the host wait for the values of a device, or is REFUSED."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, indices = function.overloadpacket.__name__, args[1] if len(args) > 1 else ()
        mask = name.startswith("index") and isinstance(indices, (list, tuple)) and any(
            i is not None and i.dtype is torch.bool for i in indices)
        waits = mask or re.fullmatch("_local_scalar_dense|nonzero|masked_select|equal|_?unique2?", name)
        assert not waits, f"{name} waits for the device"
        assert not REFUSED.match(name), f"{name} has no deterministic form on a GPU"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [dict(aug="caug+", blur=True), dict(method="dino", ratio=1.0),
                                     dict(arch="resnet18"), dict(arch="vmamba_tiny")])
def test_a_step_and_its_views_never_wait_for_the_device_and_can_be_deterministic(options):
    cfg = tiny(**{**options, "batch": 2})
    t, crop = clever.Training(cfg, 2), clever.MultiCrop(cfg)
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    resize = partial(F.interpolate, size=(3, 3), mode="bicubic")
    for wrong in (lambda x: x.item(), lambda x: x[x > 0], lambda x: bool(x),
                  lambda x: resize(x.view(1, 1, 1, 1).requires_grad_()).sum().backward()):
        with pytest.raises(AssertionError), NeverWait():
            wrong(torch.ones(()))
    with NeverWait():
        for step in range(2):
            clever.train_step(t, crop(images, torch.ones(2), step), step)


def test_compile_covers_augmentation_networks_and_losses_and_computes_the_same(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # needs no C++ compiler
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    results = []
    for compiled in (False, True):
        t = clever.Training(tiny(compile=compiled, batch=2, local_views=1, aug="caug+"), 2)
        terms = [clever.train_step(t, views, i) for i, views in enumerate(batches(t.cfg, 2, torch.float32))]
        results.append([*(x for term in terms for x in term.values()), *t.teacher.parameters()])
    for eager, compiled in zip(*results, strict=True):
        close(eager, compiled, 1e-4)
    counters = torch._dynamo.utils.counters
    graphs = counters["stats"]["unique_graphs"]
    batches(t.cfg, 20, torch.float32)  # other orders of the colour operations
    assert counters["stats"]["unique_graphs"] == graphs >= 10 and not counters["graph_break"]


def test_a_folder_of_images_gets_the_papers_schedules():
    t = clever.Training(clever.parse("--data x --arch vit_micro --hidden-dim 8 --out-dim 8".split()), 5)
    assert len(t.lr) == 1000 and t.lr[0] == 0 and max(t.lr) == t.lr[50] == 1e-3
    ends = t.momentum[0], t.weight_decay[0], t.weight_decay[-1], t.lr[-1]
    assert ends == pytest.approx((0.996, 0.04, 0.4, 1e-6), 1e-2)
    assert (clever.stored_side(224), clever.stored_side(32), clever.worker_count(3)) == (320, 32, 3)
    for data, recipe in (("patterns", "demo"), ("cifar10", "cifar"), ("folder", "paper")):
        explicit = clever.parse(["--data", data, "--recipe", recipe])
        assert vars(explicit) == {**vars(clever.parse(["--data", data])), "recipe": recipe}


@pytest.mark.parametrize("owner, slow, says", [
    (clever.Images, "stream", "The loader limits"), (clever.MultiCrop, "forward", "The augmentation limits"),
    (clever.CLeVER, "project", "The compute limits")])
def test_the_profile_adds_up_and_names_what_limits_the_run(tmp_path, capsys, monkeypatch, owner, slow, says):
    monkeypatch.setattr(owner, slow, sleepy(getattr(owner, slow)))
    assert clever.main(flags(profile=1, images=64, out=tmp_path / "run")) == 0
    text = capsys.readouterr().out
    phases = dict(re.findall(r"^\| ([a-zE].*?) \| ([\d.]+) \| [\d.]+% \|$", text, re.M))
    assert list(phases) == ["waiting for data", "augmentation", "teacher forward", "student forward",
                            "losses", "backward", "optimiser, EMA and centres"]
    whole, loader, compute = map(float, re.search(
        r"([\d.]+) the whole, ([\d.]+) the loader alone .*, ([\d.]+) the compute alone", text).groups())
    assert 8 / whole == pytest.approx(sum(map(float, phases.values())) / 1000, rel=0.5)
    assert whole < 1.2 * min(loader, compute)
    assert says in text.splitlines()[-1] and not (tmp_path / "run").exists()


def sleepy(function):
    """The function, or the generator's every item, after 0.2 s."""
    def slower(*args, **kwargs):
        if not inspect.isgeneratorfunction(function):
            time.sleep(0.2)
            return function(*args, **kwargs)
        return (time.sleep(0.2) or item for item in function(*args, **kwargs))
    return slower


# ------------------------------ 6. Several processes ------------------------------ #


def five_steps(rank, world, folder):
    """Five steps as one of `world` processes, in float64 and in float32; what came out, into a file."""
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    result = []
    for dtype in (torch.float64, torch.float32):
        torch.set_default_dtype(dtype)
        cfg = tiny(drop_path=0.0, aug="caug+", ef_out_dim=48)
        t = clever.Training(cfg, 2)
        torch.set_default_dtype(torch.float32)
        for i, views in enumerate(batches(cfg, 5, dtype, rank, world)):
            result.append(torch.stack(list(clever.train_step(t, views, i).values())))
        for block in [*t.student.backbone.blocks, *t.teacher.backbone.blocks]:
            block.attn.qkv.bias.data[96:192] = 0  # the keys': no gradient, but AdamW
        result += [x.detach().clone() for x in (*t.student.parameters(), *t.teacher.parameters(),
                                        *t.centres)]  # makes steps of its rounding
    if world > 1:
        with torch.profiler.profile(record_shapes=True) as p:
            clever.train_step(t, views, 4)
        sent = [(e.name, math.prod(e.input_shapes[0])) for e in p.events() if e.name.startswith("gloo:")]
        result = dict(result=result, sent=sent, scalars=sum(x.numel() for x in t.student.parameters()))
    torch.save(result, f"{folder}/{world}-{rank}.pt")


def test_two_processes_equal_one_and_hold_the_same_teacher(tmp_path):
    ranks = [CHILDREN.Process(target=five_steps, args=(rank, 2, str(tmp_path))) for rank in range(2)]
    for p in ranks:
        p.start()
    five_steps(0, 1, str(tmp_path))
    for p in ranks:
        p.join(60)
    assert [p.exitcode for p in ranks] == [0, 0]
    one, *two = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    for rank in two:  # a step sends the gradients, the two centres with the four terms and the stop flag
        assert {name for name, _ in rank["sent"]} == {"gloo:all_reduce"}
        assert sum(count for _, count in rank["sent"]) == rank["scalars"] + 64 + 48 + 5
    first, second = (rank["result"] for rank in two)
    assert {x.dtype for x in one} == {torch.float64, torch.float32}
    for a, b, c in zip(one, first, second, strict=True):
        assert torch.equal(b, c)
        close(a, b, 1e-10 if a.dtype == torch.float64 else 1e-5)


# ------------------------------ 7. Names ------------------------------ #


def test_parameters_of_vit_tiny_are_those_of_timm():
    D, shapes = 192, {"cls_token": (1, 1, 192), "pos_embed": (1, 1 + 14 * 14, 192), "norm.weight": (192,),
                      "norm.bias": (192,), "patch_embed.proj.weight": (192, 3, 16, 16),
                      "patch_embed.proj.bias": (192,)}
    for i, (name, rows, columns) in itertools.product(range(12), (
            ("attn.qkv", 3 * D, D), ("attn.proj", D, D), ("mlp.fc1", 4 * D, D), ("mlp.fc2", D, 4 * D))):
        shapes |= {f"blocks.{i}.{name}.weight": (rows, columns), f"blocks.{i}.{name}.bias": (rows,)}
        shapes |= {f"blocks.{i}.norm{k}.{x}": (D,) for k in (1, 2) for x in ("weight", "bias")}
    assert {k: tuple(v.shape) for k,
            v in clever.build_backbone("vit_tiny", 224).state_dict().items()} == shapes


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_parameters_of_the_resnets_are_those_of_torchvision(arch):
    ours, theirs = clever.build_backbone(arch, 224), getattr(torchvision.models, arch)()
    theirs.fc = nn.Identity()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x, small = torch.randn(2, 3, 64, 64), clever.build_backbone(arch, 32).state_dict()
    close(ours.eval()(x), theirs.eval()(x), 1e-4)
    assert {k for k, v in theirs.state_dict().items() if small[k].shape != v.shape} == {"conv1.weight"}


def test_the_cls_feature_is_that_of_torchvision_and_the_other_outputs_agree_with_it():
    f = clever.build_backbone("vit_tiny", 64)
    theirs = torchvision.models.VisionTransformer(64, 16, 12, 3, 192, 768)
    f.double().eval(), theirs.double().eval()
    for p in f.parameters():
        p.data += 0.05 * torch.randn_like(p)                                   # biases and norms count too
    names, theirs.heads = "\n".join(f.state_dict()), nn.Identity()
    for old, new in {"cls_token": "class_token", "pos_embed": "encoder.pos_embedding",
                     "patch_embed.proj": "conv_proj",
                     "\nnorm.": "\nencoder.ln.", "blocks.": "encoder.layers.encoder_layer_", "norm1": "ln_1",
                     "norm2": "ln_2", "attn.qkv.": "self_attention.in_proj_",
                     "attn.proj": "self_attention.out_proj",
                     "fc1": "0", "fc2": "3"}.items():
        names = names.replace(old, new)
    theirs.load_state_dict(dict(zip(names.split(), f.state_dict().values())), strict=True)
    x, small, seen = normal(2, 3, 64, 64), normal(2, 3, 32, 32), []
    f.blocks[-1].attn.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    close(f(x), theirs(x))
    close(f(small), naive_vit(f, small))
    layers = f.get_intermediate_layers(x, 4)
    assert [y.shape for y in layers] == [(2, 17, 192)] * 4
    close(layers[-1][:, 0], f(x))
    q, k, _ = (y.unflatten(-1, (3, 64)).transpose(1, 2) for y in f.blocks[-1].attn.qkv(seen[0]).chunk(3, -1))
    close(f.get_last_selfattention(x), (q @ k.transpose(-2, -1) / 8).softmax(-1))


# ------------------------------ 8. The command line ------------------------------ #

SHORT = dict(images=64, save_every=1e-5)  # 24 steps, a checkpoint after each


def run(folder, **options):
    """A tiny run in this process; its exit code."""
    return clever.main(flags(out=folder, **options))


def log(folder):
    """The lines of a run's log, but for the time that they took."""
    path = Path(folder) / "log.jsonl"
    lines = map(json.loads, path.read_text().splitlines() if path.exists() else [])
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def checkpoint(folder):
    return torch.load(Path(folder) / "checkpoint.pt", weights_only=True)


def leaves(x):
    """The values of a nested state, in order."""
    if not isinstance(x, (dict, list)):
        return [x]
    return [v for y in (x.values() if isinstance(x, dict) else x) for v in leaves(y)]


def same_run(*folders):
    """Two runs ended with bit-identical weights, optimisers, centres and logs."""
    states = [leaves({k: v for k, v in checkpoint(f).items() if k != "config"}) for f in folders]
    for x, y in zip(*states, strict=True):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
    assert log(folders[0]) == log(folders[1])


def until(condition, *processes):
    """Wait for a condition, as long as these processes live."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end and all(p.is_alive() for p in processes), "waited in vain"
        time.sleep(0.005)


def child(script, argv, output, env, cwd):
    """Body of a process: `python script argv` with its output in a file."""
    for number in (1, 2):
        os.dup2(os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = [script, *argv]
    runpy.run_path(str(HERE / script), run_name="__main__")


def start(argv, output, cwd=HERE, script="clever.py", **env):
    """`python script argv` in a process of its own."""
    env = {k: str(v) for k, v in env.items()}
    p = CHILDREN.Process(target=child, args=(script, [str(x) for x in argv], str(output), env, str(cwd)))
    p.start()
    return p


def start_two(argv, output, script="clever.py"):
    """The two processes of a run, as torchrun starts them; output: a file for each, ending in its rank."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        env = dict(WORLD_SIZE=2, LOCAL_WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=s.getsockname()[1])
    return [start(argv, f"{output}.{r}", HERE, script, RANK=r, LOCAL_RANK=r, **env) for r in range(2)]


def torchrun(*argv, cwd=None, processes=1):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    return subprocess.Popen([str(x) for x in (*command, HERE / "clever.py", *argv)], cwd=cwd, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def run_demo(cwd):
    """The demo, cut to 30 steps, and the command that follows it: the run's folder, what each printed."""
    p = torchrun("--images", 640, "--epochs", 3, "--no-report", "--device", "cpu", cwd=cwd)
    said = p.communicate(timeout=120)
    assert p.returncode == 0, said
    folder, options = cwd / "runs" / "patterns-clever-caug-1", "--quick --epochs 3 --labels 0.05 --device cpu"
    table = subprocess.run([sys.executable, HERE / "eval_linear.py", folder, *options.split()], cwd=cwd,
                           capture_output=True, text=True, timeout=120)
    return folder, *said, table


@pytest.fixture
def demo(ahead):
    return ahead[run_demo].result()


def test_torchrun_trains_the_demo_without_alarm_and_leaves_the_designed_files(demo):
    folder, out, err, _ = demo
    files = {"config.json", "log.jsonl", "crops.png", "checkpoint.pt", "backbone.pt"}
    assert {f.name for f in folder.iterdir()} - {"eval.json"} == files
    assert [line.split("  ")[0] for line in out.splitlines()] == [f"epoch {i}/3" for i in (1, 2, 3)]
    assert "\r" not in out + err
    assert [(r["epoch"], r["step"]) for r in log(folder)] == [(1, 10), (2, 20), (3, 30)]
    assert {"L_CL", "L_Orth", "L_PReg", "loss", "ir_rank", "ef_std", "ef_kl_uniform"} <= log(folder)[0].keys()
    weights, teacher = torch.load(folder / "backbone.pt", weights_only=True), checkpoint(folder)["teacher"]
    clever.build_backbone("vit_micro", 32).load_state_dict(weights, strict=True)
    assert all(torch.equal(v, teacher["backbone." + k]) for k, v in weights.items())
    with Image.open(folder / "crops.png") as crops:
        assert crops.width > 5 * 96 and crops.height > 8 * 96


def test_the_command_that_follows_the_demo_prints_the_table(demo):
    folder, _, _, done = demo
    assert done.returncode == 0 and "| linear ef " in done.stdout and "| relative rotation R2" in done.stdout
    assert set(sections(folder)) == {"probes labels 0.05", "rotation labels 0.05"}


def test_every_name_in_the_readmes_table_from_paper_to_code_exists():
    path = HERE / "README.md"
    text = path.read_text() if path.exists() else ""
    section = re.search(r"(?ms)^#+ *Read it beside the paper.*?$(.*?)(?=^#|\Z)", text)
    if not section:
        pytest.skip("README.md has no such section")
    cells = [row.rstrip("| ").split("|")[-1] for row in re.findall(r"(?m)^\|.*\| *$", section[1])[2:]]
    names = re.findall(r"`([A-Za-z_][\w.]*?)(?:\([^`]*)?`", " ".join(cells))
    names = [name for name in names if not name.endswith(".py")]
    code = argparse.Namespace(**{**vars(eval_linear), **vars(clever), "eval_linear": eval_linear})
    for name in names:
        operator.attrgetter(name.removeprefix("clever."))(code)
    assert len(names) > 5


def pictures(folder, train=6, val=3):
    """A folder of noise around red (class a) and blue (b): <folder>/{train,val}/{a,b}/00.jpg, ..."""
    gen = torch.Generator().manual_seed(0)
    for (part, count), c in itertools.product((("train", train), ("val", val)), "ab"):
        (folder / part / c).mkdir(parents=True)
        for n in range(count):
            pixels = 0.5 * torch.rand(3, 40, 60, generator=gen)
            pixels["a b".index(c)] += 0.4
            TF.to_pil_image(pixels).save(folder / part / c / f"{n:02}.jpg")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of 12 training images in two classes."""
    return pictures(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run that was never stopped."""
    folder = tmp_path_factory.mktemp("base") / "run"
    assert run(folder, **SHORT) == 0
    return folder


# Command lines that must be refused, in a folder W, beside a run BASE and images DATA; and what is said,
# at least the first option.
WRONG = """--ratio 1.5; --ratio 0; --ratio nan; --ratio 0.001 > IR of width 0; --ratio 1 > EF of width 0;
--method dino --ratio 0.8 > no split; --method dyno > did you mean dino;
--arch resnet81 > did you mean resnet18; --aug cuag > did you mean caug;
--recipe papr > did you mean paper; --device gpu; --device cuda > finds no GPU; --precision fp8;
--precision fp16 --device cpu;
--locl-views 3 > did you mean --local-views; --epochs ten; --epochs 0; --warmup-epochs 9; --batch 0;
--batch 5000 > larger than the data; --images 5000; --images -1; --lr inf; --lr -1; --lambda-reg nan;
--teacher-temp 0; --student-temp -1; --momentum 1.1; --centre-momentum -0.1; --drop-path 1; --clip -1;
--global-size 30; --local-size 12; --patch-size 5 > patch of 5;
--arch resnet18 --patch-size 8 > --patch-size; --out-dim 0; --workers -2;
--blur --arch resnet18 --local-size 4; --global-scale 0.9 0.2; --local-scale 0 0.5; --save-every 0;
--save-every nan; --seed -1; --profile -1; --data W/nowhere > is no folder;
--data cifar1 > did you mean cifar10; --data W/no-train > no folder train/; --data W/empty > class;
--data W/no-images > class; --data W/empty-class > classes b;
--data DATA --batch 13 > larger than the data; --out BASE > holds a run;
--out W/file > cannot be written; --out W/file/run > cannot be written; --resume > no run;
--resume --out BASE --ratio 0.5 > --ratio 0.5 differs"""


@pytest.fixture(scope="module")
def wrong(base, data, tmp_path_factory):
    """(folder, [(argv, words)]) of WRONG."""
    folder = tmp_path_factory.mktemp("wrong")
    for name in ("no-train", "empty/train", "no-images/train/a", "empty-class/train/b"):
        (folder / name).mkdir(parents=True)
    shutil.copytree(data / "train" / "a", folder / "empty-class" / "train" / "a")
    (folder / "file").touch()
    table = [line.partition(" > ") for line in WRONG.replace("\n", " ").split("; ")]
    place = {"W/": f"{folder}/", "BASE": str(base), "DATA": str(data)}
    fill = lambda line: reduce(lambda x, k: x.replace(k, place[k]), place, line).split()
    new = flags(out=folder / "new")
    return folder, [([*new, *fill(line)], words or line.split()[0]) for line, _, words in table]


def tree(*folders):
    """All files of these folders and when they were written."""
    return {(str(f), f.stat().st_mtime_ns) for folder in folders for f in Path(folder).rglob("*")}


def test_every_wrong_setting_is_one_sentence_exit_code_2_and_creates_nothing(
        wrong, base, data, capsys, monkeypatch):
    folder, settings = wrong
    before = tree(folder, base, data)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for argv, words in settings:
        code, (out, err) = clever.main(argv), capsys.readouterr()
        assert (code, out, err.count("\n")) == (2, "", 1), (argv, err)
        assert err.startswith("clever.py: ") and words in err, (argv, err)
        assert tree(folder, base, data) == before, argv
    assert len(settings) > 50
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert run(folder / "new", compile=True) == 2 and "needs a C++ compiler" in capsys.readouterr().err
    monkeypatch.setattr(shutil, "disk_usage", lambda path: argparse.Namespace(free=1000))
    for world, words in (("1", "make room"), ("3", "cannot be shared evenly by 3 processes")):
        monkeypatch.setenv("WORLD_SIZE", world)
        assert run(folder / "new") == 2 and words in capsys.readouterr().err
        assert tree(folder, base, data) == before


def test_ten_wrong_inputs_of_the_real_command(wrong, base, data, tmp_path):
    folder, settings = wrong
    before, chosen = tree(folder, base, data), settings[::len(settings) // 10][:10]
    started = [start(argv, tmp_path / str(i), folder, CUDA_VISIBLE_DEVICES="")
               for i, (argv, _) in enumerate(chosen)]
    for i, (p, (argv, words)) in enumerate(zip(started, chosen, strict=True)):
        p.join(60)
        said = (tmp_path / str(i)).read_text()
        assert (p.exitcode, said.count("\n")) == (2, 1) and words in said, (argv, said)
    assert len(chosen) == 10 and tree(folder, base, data) == before


# ------------------------------ 9. Reliability ------------------------------ #


def kill_and_resume(base, folder, kills, rng):
    """Kill a run at random moments and go on with it until it ends, the same as `base`; its deaths."""
    died = 0
    while True:
        resume = (folder / "config.json").exists()
        p = start(flags(out=folder, resume=resume, **SHORT), f"{folder}.txt")
        if died < kills:
            p.join(rng.uniform(0.3, 1.5))
            p.kill()
        p.join(60)
        if p.exitcode == 0:
            same_run(base, folder)
            return died
        assert p.exitcode == -signal.SIGKILL, Path(f"{folder}.txt").read_text()
        died += 1


@pytest.mark.parametrize("runs, kills", [(1, 3), pytest.param(10, 5, marks=pytest.mark.long)])
def test_runs_killed_at_random_moments_resume_to_the_same_bits(base, tmp_path, runs, kills):
    rng = random.Random(0 if runs == 1 else None)
    died = sum(kill_and_resume(base, tmp_path / f"run{i}", kills, rng) for i in range(runs))
    print(f"\n{died} kills")
    assert died >= runs


@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_stop_signal_leaves_a_checkpoint_that_resumes_to_the_same_bits(base, tmp_path, name, code):
    folder, options = tmp_path / "run", {**SHORT, "save_every": 60}
    p = start(flags(out=folder, **options), f"{folder}.txt")
    until(lambda: log(folder), p)
    os.kill(p.pid, getattr(signal, name))
    p.join(60)
    said, step = Path(f"{folder}.txt").read_text(), checkpoint(folder)["step"]
    assert p.exitcode == code and 8 <= step < 24
    assert f"stopped at step {step}" in said and "Traceback" not in said
    assert run(folder, resume=True, **options) == 0
    same_run(base, folder)


def test_signal_handlers_are_restored_and_a_second_signal_ends_the_run_at_once():
    t, numbers = argparse.Namespace(stop=0), (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(n) for n in numbers]
    with pytest.raises(KeyboardInterrupt), clever.stop_signals(t):
        signal.raise_signal(signal.SIGINT)
        assert t.stop == signal.SIGINT
        signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(n) for n in numbers] == before


def test_a_signal_to_one_of_two_processes_stops_both_with_a_checkpoint(tmp_path):
    folder = tmp_path / "run"
    ranks = start_two(flags(out=folder, epochs=1000, images=64), folder)
    until(lambda: log(folder), *ranks)
    os.kill(ranks[1].pid, signal.SIGTERM)
    for p in ranks:
        p.join(60)
    assert [p.exitcode for p in ranks] == [143, 143]
    assert f"stopped at step {checkpoint(folder)['step']}" in Path(f"{folder}.0").read_text()


def interrupt_torchrun(cwd):
    """A run of two processes, stopped by Ctrl-C on torchrun: its folder and what it said."""
    folder = cwd / "run"
    p = torchrun(*flags(out=folder, epochs=1000, images=64, save_every=60), processes=2)
    until(lambda: len(log(folder)) >= 2 or p.poll() is not None)
    os.killpg(p.pid, signal.SIGINT)
    return folder, p.communicate(timeout=60)[1]


@pytest.fixture
def interrupted(ahead):
    return ahead[interrupt_torchrun].result()


def test_ctrl_c_on_torchrun_leaves_a_checkpoint(interrupted):
    folder, err = interrupted
    assert f"stopped at step {checkpoint(folder)['step']}" in err, err


def test_a_rank_that_dies_takes_the_other_down_with_a_message(tmp_path):
    folder = tmp_path / "run"
    ranks = start_two(flags(out=folder, epochs=1000, images=64), folder)
    until(lambda: log(folder), *ranks)
    ranks[1].kill()
    ranks[0].join(30)
    code = ranks[0].exitcode
    ranks[0].kill()
    assert code not in (None, 0) and "Error" in Path(f"{folder}.0").read_text()


class Payload:
    """Something that runs code when a pickle loader reads it."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_a_checkpoint_that_does_not_fit_is_refused_in_one_sentence(base, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole, state = (base / "checkpoint.pt").read_bytes(), checkpoint(base)
    changed = [(dict(state, config={**state["config"], k: v}), "--" + k.replace("_", "-"))
               for k, v in dict(arch="vit_tiny", ratio=0.5, out_dim=128).items()]
    renamed = dict(state, student={"x" + k: v for k, v in state["student"].items()})
    damaged = (whole[:len(whole) // 2], b"", b"foreign", Payload(), torch.zeros(3), dict(model={}), renamed,
               {**state, "centres": []})
    for i, (content, words) in enumerate([*changed, *((x, "damaged") for x in damaged)]):
        path = shutil.copytree(base, tmp_path / str(i)) / "checkpoint.pt"
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        before = path.read_bytes()
        code, err = run(path.parent, resume=True, **SHORT), capsys.readouterr().err
        assert (code, err.count("\n")) == (2, 1) and words in err and str(path) in err, (i, err)
        assert path.read_bytes() == before and log(path.parent) == log(base)
    assert not (tmp_path / "executed").exists()


def test_a_full_disk_costs_one_checkpoint_and_nothing_else(base, tmp_path, capsys, monkeypatch):
    real, folder, calls = os.fsync, tmp_path / "run", []

    def fsync(number):
        calls.append(checkpoint(folder)["step"] if (folder / "checkpoint.pt").exists() else 0)
        if len(calls) == 10:
            raise OSError(28, "No space left on device")
        real(number)
    monkeypatch.setattr(os, "fsync", fsync)
    assert run(folder, **SHORT) == 0
    assert capsys.readouterr().err.count("No space left on device") == 1 and not list(folder.glob("*.tmp"))
    assert 0 < calls[9] == calls[10] < calls[12]                               # two files a checkpoint
    same_run(base, folder)


def test_a_gpu_whose_memory_is_full_says_what_to_change(tmp_path, capsys, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    monkeypatch.setattr(clever, "train_step", full)
    assert run(tmp_path / "run") == 2
    assert "memory is full; lower --batch" in capsys.readouterr().err


@pytest.mark.parametrize("name, call, words", [("orthogonality_loss", 13, "L_Orth is nan at step 12"),
                                               ("train_step", 16, "the weights are not finite at step 16")])
def test_numbers_that_are_not_finite_stop_the_run_and_leave_the_checkpoint(
        base, tmp_path, monkeypatch, name, call, words):
    real, calls, folder, options = getattr(clever, name), [], tmp_path / "run", {**SHORT, "save_every": 60}

    def faulty(*args):
        calls.append(1)
        result = real(*args)
        if len(calls) != call:
            return result
        if name == "train_step":
            args[0].student.backbone.norm.bias.data.fill_(math.nan)
            return result
        return result * math.nan
    with monkeypatch.context() as m, pytest.raises(SystemExit) as end:
        m.setattr(clever, name, faulty)
        run(folder, **options)
    assert words in str(end.value) and f"{folder / 'checkpoint.pt'}, step 8" in str(end.value)
    assert checkpoint(folder)["step"] == 8
    assert run(folder, resume=True, **options) == 0
    same_run(base, folder)


@pytest.mark.parametrize("options, says", [
    ("--freeze-epochs 3 --lr 2e-3 --teacher-temp 0.03", ""),
    ("--teacher-temp 0.1 --freeze-epochs 0 --epochs 8", "output is uniform"),
    ("--freeze-epochs 0 --lr 0.04 --centre-momentum 1 --momentum 0.9 --teacher-temp 0.03",
     "one prototype takes every image")])
def test_a_real_run_that_collapses_is_called_out_and_one_that_does_not_is_not(
        tmp_path, capsys, options, says):
    size = dict(images=256, batch=32, local_views=0, out_dim=256, hidden_dim=128, bottleneck_dim=64)
    argv = flags(out=tmp_path / "run", **size)
    if "uniform" in says:  # the README's broken variant of the demo, cut short
        argv = ["--no-report", "--device", "cpu", "--images", "512", "--out", str(tmp_path / "run")]
    assert clever.main([*argv, *options.split()]) == 0
    out, last = capsys.readouterr().out, log(tmp_path / "run")[-1]
    assert "COLLAPSE of IR" in out and says in out if says else "COLLAPSE" not in out
    assert says or (last["ir_kl_uniform"] > 0.3 and last["ir_rank"] > 4
                    and last["ir_entropy"] < 0.9 * math.log(256))


# ------------------------------ 10. Images of all kinds ------------------------------ #


def bomb(side):
    """A PNG of a few bytes that declares side x side pixels."""
    parts = {b"IHDR": struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0),
             b"IDAT": zlib.compress(bytes(999)), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in parts.items())


def test_images_of_every_mode_are_read_in_their_colours(tmp_path):
    rgb, luma, exif = Image.new("RGB", (60, 40), (200, 90, 40)), (117, 117, 117), Image.Exif()
    exif[0x0112] = 6                                                           # to be turned clockwise
    halves = TF.to_pil_image(torch.tensor([[0.0, 1.0]]).repeat_interleave(30, 1).expand(3, 40, 60))
    deep = Image.new("I;16", (60, 40), 117 * 256)
    for name, image, colour, aspect in [
            ("cmyk.jpg", rgb.convert("CMYK"), rgb, 1.5), ("palette.png", rgb.quantize(4), rgb, 1.5),
            ("grey.jpg", rgb.convert("L"), luma, 1.5), ("grey alpha.png", rgb.convert("LA"), luma, 1.5),
            ("alpha.png", Image.new("RGBA", (60, 40), (200, 90, 40, 0)), rgb, 1.5),
            ("16 bit.png", deep, luma, 1.5),
            ("16 bit.tif", deep, luma, 1.5), ("narrow.png", rgb.resize((1, 500)), rgb, 1 / 500),
            ("ein größeres Bild ✓.jpg", rgb, rgb, 1.5), ("turned.jpg", halves, None, 1 / 1.5)]:
        image.save(tmp_path / name, **{"exif": exif} if colour is None else {})
        pixels, shape = clever.decode(tmp_path / name, 32)
        assert (pixels.shape, pixels.dtype, shape) == ((3, 32, 32), torch.uint8, pytest.approx(aspect)), name
        if colour is None:  # its dark left half is above now
            assert pixels[:, :15].max() < 10 and pixels[:, 17:].min() > 245
        else:
            colour = torch.tensor(colour if colour is luma else colour.getpixel((0, 0)))
            assert (pixels.double() - colour[:, None, None]).abs().max() < 6, name


def break_five(folder, good):
    """Put a file of each unreadable kind into a folder; their names."""
    (folder / "truncated.jpg").write_bytes(good.read_bytes()[:300])
    (folder / "zero.jpg").touch()
    (folder / "text.jpg").write_text("not an image")
    (folder / "bomb.png").write_bytes(bomb(20_000))
    (folder / "dangling.jpg").symlink_to(folder / "nowhere")
    return "truncated.jpg", "zero.jpg", "text.jpg", "bomb.png", "dangling.jpg"


def test_one_process_downloads_cifar_while_others_wait_and_a_refusal_is_one_sentence(tmp_path, monkeypatch):
    inside, most, network = [], [], []

    class Cifar:
        """What torchvision's class would hold, slowly downloaded."""
        classes, targets = ["cat", "dog"], [0, 1]
        data = torch.arange(2 * 32 * 32 * 3).byte().view(2, 32, 32, 3).numpy()

        def __init__(self, root, train, download):
            if not network:
                raise OSError("no network")
            inside.append(self)
            most.append(len(inside))
            time.sleep(0.2)
            inside.pop()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Cifar)
    with pytest.raises(clever.UserError, match="neither in .data nor to be downloaded .no network."):
        clever.load_images("cifar10", "train", 32)
    network.append("up")
    with ThreadPoolExecutor(3) as pool:
        sets = [*pool.map(lambda split: clever.load_images("cifar10", split, 32), ("train", "train", "val"))]
    assert most == [1, 1, 1] and all(s.pixels.shape == (2, 3, 32, 32) for s in sets)
    assert torch.equal(sets[0].pixels[1, :, 3, 4], torch.from_numpy(Cifar.data[1, 3, 4]))


@pytest.mark.parametrize("cache", [True, False])
def test_broken_images_are_replaced_named_once_and_counted(data, tmp_path, capsys, cache):
    good, folder = data / "train" / "a" / "00.jpg", tmp_path / "data" / "train" / "a"
    (folder / "x.jpg").mkdir(parents=True)
    for i in range(600):
        (folder / f"{i} é.jpg").symlink_to(good)
    names = break_five(folder, good)
    assert run(tmp_path / "run", data=tmp_path / "data", batch=121, epochs=2, cache=cache, local_views=0) == 0
    err = capsys.readouterr().err
    assert all(err.count(name) == 1 for name in names) and err.count("warning") == 5, err
    assert [r["bad_images"] for r in log(tmp_path / "run")] == [5, 5]


def test_more_than_one_percent_of_broken_images_stop_the_run_with_the_list(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    names = break_five(tmp_path / "data" / "train" / "b", data / "train" / "a" / "00.jpg")
    with pytest.raises(SystemExit) as end:
        run(tmp_path / "run", data=tmp_path / "data", batch=17)
    assert all(name in str(end.value) for name in (*names, "1 %")) and len(log(tmp_path / "run")) == 1


def mutate(count, seed, good, path):
    """Feed random bytes and mutated files to the reader; how many it could use."""
    rng, images = random.Random(seed), clever.Images(32, [0, 0], ["a"], [path, good])
    sources = good.read_bytes(), bomb(300)
    used = 0
    for i in range(count):
        x = bytearray(rng.choice(sources) if i % 3 else rng.randbytes(rng.randrange(2000)))
        for _ in range(rng.choice((0, 1, 3, 30)) * bool(x)):
            x[rng.randrange(len(x))] = rng.randrange(256)
        path.write_bytes(x[:rng.randrange(len(x) + 1)] if rng.random() < 0.4 else x)
        pixels, aspect, index = images[0]
        assert pixels.shape == (3, 32, 32) and pixels.dtype == torch.uint8
        assert 0 < aspect < math.inf and index in (0, -1)
        used += index == 0
    return used


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count, seed", [(300, 0), pytest.param(10_000, None, marks=pytest.mark.long)])
def test_random_and_mutated_files_never_stop_the_reader(data, tmp_path, count, seed):
    assert 0 < mutate(count, seed, data / "train" / "a" / "00.jpg", tmp_path / "x.jpg") < count


# ------------------------------ 11. Long runs ------------------------------ #


@pytest.mark.parametrize("steps", [60, pytest.param(2000, marks=pytest.mark.long)])
def test_memory_and_open_files_do_not_grow(data, tmp_path, monkeypatch, steps):
    seen, real = [], clever.Run.end_epoch

    def watch(self, seconds):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        seen.append((pages * os.sysconf("SC_PAGE_SIZE") / 1e6, len(os.listdir("/proc/self/fd"))))
        return real(self, seconds)
    monkeypatch.setattr(clever.Run, "end_epoch", watch)
    assert run(tmp_path / "run", data=data, batch=6, epochs=steps // 2, cache=False) == 0
    (memory, files), (memory_end, files_end) = seen[len(seen) // 10], seen[-1]
    print(f"\n{steps} steps: {memory:.0f} -> {memory_end:.0f} MB, {files} -> {files_end} open files")
    assert memory_end - memory < 20 and files_end <= files


# ------------------------------ 12. VMamba ------------------------------ #

FAULTS = ["swapped directions", "no reverse", "no recurrence", "swapped B and C", "outer bias", "mean"]


def small_vmamba(**options):
    return clever.VMamba(dims=(8, 16, 24, 32), depths=(1, 1, 2, 1), **options)


def error(a, b):
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-300)).item()


def naive_scan(v, p, weight, bias, A_logs, fault=None):
    """The recurrence pixel after pixel in the four directions, summed; with one of FAULTS if asked."""
    (B, H, W, D), R, z = v.shape, weight.shape[2], torch.zeros_like(v)
    rows, columns = [*itertools.product(range(H), range(W))], [(h, w) for w in range(W) for h in range(H)]
    paths = [rows, columns, rows[::-1], columns[::-1]]
    if fault in FAULTS[:2]:
        paths = [columns, rows, columns[::-1], rows[::-1]] if fault == FAULTS[0] else [rows, columns] * 2
    for k, path in enumerate(paths):
        A, h, y = -A_logs.view(4, D)[k].exp(), 0, {}
        for pixel in path:
            u, (r, b, c) = v[:, *pixel], p[:, *pixel, k].split([R, 1, 1], 1)
            b, c = (c, b) if fault == "swapped B and C" else (b, c)
            q = r @ weight[k].T
            delta = F.softplus(q) + bias[k] if fault == "outer bias" else F.softplus(q + bias[k])
            h = (0 if fault == "no recurrence" else (delta * A).exp() * h) + delta * b * u
            y[pixel] = c * h
        z = z + torch.stack([y[pixel] for pixel in rows], 1).view(B, H, W, D)
    return z / 4 if fault == "mean" else z


def scan_inputs(H, W, D=6, R=3, B=2):
    """Values so large that a state lives for many pixels and every term counts."""
    shapes = (B, H, W, D), (B, H, W, 4, R + 2), (4, D, R), (4, D), (4 * D, 1)
    x = [normal(*shape, seed=H * 100 + W + i) for i, shape in enumerate(shapes)]
    return [t.requires_grad_() for t in (*x[:3], x[3] - 1, x[4] - 0.5)]


def test_the_274_names_shapes_and_their_order_are_the_originals():
    norm = lambda name, d: {f"{name}.weight": (d,), f"{name}.bias": (d,)}
    layer = lambda name, *shape: {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    expected = {**layer("patch_embed.0", 48, 3, 3, 3), **norm("patch_embed.2", 48),
                **layer("patch_embed.5", 96, 48, 3, 3), **norm("patch_embed.7", 96)}
    for i, (D, R, depth) in enumerate([(96, 6, 2), (192, 12, 2), (384, 24, 8), (768, 48, 2)]):
        for b in (f"layers.{i}.blocks.{j}." for j in range(depth)):
            op = b + "op."
            expected |= {**norm(b + "norm", D), op + "x_proj_weight": (4, R + 2, D),
                         op + "dt_projs_weight": (4, D, R), op + "dt_projs_bias": (4, D),
                         op + "A_logs": (4 * D, 1), op + "Ds": (4 * D,), **norm(op + "out_norm", D),
                         op + "in_proj.weight": (D, D), op + "conv2d.weight": (D, 1, 3, 3),
                         op + "out_proj.weight": (D, D), **norm(b + "norm2", D),
                         **layer(b + "mlp.fc1", 4 * D, D), **layer(b + "mlp.fc2", D, 4 * D)}
        if i < 3:
            down = f"layers.{i}.downsample."
            expected |= {**layer(down + "1", 2 * D, D, 3, 3), **norm(down + "3", 2 * D)}
    with torch.device("meta"):
        found = {n: tuple(p.shape) for n, p in clever.VMamba().state_dict().items()}
    assert list(found.items()) == list((expected | norm("classifier.norm", 768)).items())
    assert len(found) == 274 and sum(map(math.prod, found.values())) == 29_480_064


def test_the_initialisation_of_vmamba_is_the_originals():
    torch.manual_seed(0)
    block = clever.VMamba(dims=(96, 192), depths=(1, 1)).layers[1].blocks[0]
    op, mlp = block.op, block.mlp
    t = F.softplus(op.dt_projs_bias)
    assert t.min() >= 0.00099 and t.max() <= 0.101 and abs(t.log10().mean() + 2) < 0.1
    bounds = {op.x_proj_weight: 192 ** -0.5, op.dt_projs_weight: 12 ** -0.5, op.conv2d.weight: 1 / 3}
    for x, bound in bounds.items():
        assert 0.98 * bound < x.abs().max() <= bound
    assert (op.A_logs == 0).all() and (op.Ds == 1).all() and (mlp["fc1"].bias == 0).all()
    assert abs(op.in_proj.weight.std() - 0.02) < 5e-4 and abs(mlp["fc2"].weight.std() - 0.02) < 2e-3


@pytest.mark.parametrize("H, W", [(1, 1), (1, 7), (2, 3), (5, 5), (7, 4), (9, 13)])
def test_the_scan_and_its_gradients_equal_the_recurrence_step_by_step(H, W):
    x = scan_inputs(H, W)
    fast, slow = clever.selective_scan(*x), naive_scan(*x)
    dz = normal(*slow.shape, seed=1)
    assert error(fast, slow) < 1e-10
    for a, b in zip(torch.autograd.grad(fast, x, dz), torch.autograd.grad(slow, x, dz)):
        assert error(a, b) < 1e-10
    assert H * W > 6 or torch.autograd.gradcheck(clever.selective_scan, scan_inputs(H, W, 2, 2, 1))


@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_would_notice(fault):
    x = scan_inputs(5, 7)
    assert error(clever.selective_scan(*x), naive_scan(*x, fault=fault)) > 1e-2


def test_the_operator_is_the_formula_of_the_paper():
    torch.manual_seed(0)
    op, x = clever.SS2D(32).double(), normal(2, 5, 7, 32)
    for p in op.parameters():
        nn.init.normal_(p, std=0.5)
    v = (x @ op.in_proj.weight.T).permute(0, 3, 1, 2)
    v = F.silu(F.conv2d(v, op.conv2d.weight, padding=1, groups=32))
    p, v = torch.einsum("kcd,bdhw->bhwkc", op.x_proj_weight, v), v.permute(0, 2, 3, 1)
    z = naive_scan(v, p, op.dt_projs_weight, op.dt_projs_bias, op.A_logs) + op.Ds.view(4, 32).sum(0) * v
    z = F.layer_norm(z, (32,), op.out_norm.weight, op.out_norm.bias) @ op.out_proj.weight.T
    assert error(op(x), z) < 1e-10
    for a, b in zip(*(torch.autograd.grad(y.sin().sum(), list(op.parameters())) for y in (op(x), z))):
        assert error(a, b) < 1e-10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_scan_accumulates_half_inputs_in_float32_and_keeps_the_digits_of_a_small_delta(dtype):
    dtypes = dtype, dtype, *[torch.float32] * 3
    half = [x.detach().to(d).requires_grad_() for x, d in zip(scan_inputs(9, 9), dtypes)]
    with torch.autocast("cpu", torch.bfloat16):
        z = clever.selective_scan(*half)
    exact, dz = naive_scan(*(x.double() for x in half)), normal(*z.shape).float()
    assert z.dtype == torch.float32 and error(z, exact) < 1e-5
    for a, b, x in zip(torch.autograd.grad(z, half, dz), torch.autograd.grad(exact, half, dz.double()), half):
        assert a.dtype == x.dtype and error(a.float(), b.float()) < (1e-2 if x.dtype == dtype else 1e-5)
    x = [t.detach() for t in scan_inputs(3, 3)]
    x[2], x[3] = x[2] * 0.01, x[3] - 14  # delta about 1e-6
    assert error(clever.selective_scan(*(t.float() for t in x)).double(), naive_scan(*x)) < 1e-5


def test_vmamba_takes_any_size_autocast_and_compile_and_drops_paths_in_training_only():
    model, x = small_vmamba(drop_path=0.5), torch.randn(16, 3, 32, 32)
    for size in ((224, 224), (97, 33), (31, 17), (1, 1)):
        assert model(torch.randn(2, 3, *size)).shape == (2, 32)
    blocks = [b.drop_path for s in clever.VMamba(0.2, (8, 8, 8, 8)).layers for b in s.blocks]
    assert blocks == pytest.approx([0.2 * i / 13 for i in range(14)]) and not torch.equal(model(x), model(x))
    y = model.eval()(x)
    assert torch.equal(model(x), y) and error(model(x[:1]), y[:1]) < 1e-4
    assert error(torch.compile(model, backend="eager")(x), y) < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        assert error(model(x).float(), y) < 5e-2


def test_recomputing_changes_no_gradient_and_no_grad_keeps_nothing(monkeypatch):
    model, x, kept = small_vmamba(drop_path=0.0), torch.randn(2, 3, 40, 24), []
    grads = torch.autograd.grad(model(x).sin().sum(), list(model.parameters()))
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t):
        assert model(x).grad_fn is None and not kept
    monkeypatch.setattr(clever, "recompute", lambda x, cheap, linear: linear(cheap(x)))
    for a, b in zip(grads, torch.autograd.grad(model(x).sin().sum(), list(model.parameters()))):
        assert error(a, b) < 1e-5


def test_a_step_with_crops_of_two_sizes_reaches_every_parameter_of_vmamba():
    cfg = tiny(arch="vmamba_tiny", global_size=64, local_size=32, batch=4, freeze_epochs=0, warmup_epochs=0)
    t, views = clever.Training(cfg, 2), [torch.randn(4, 3, s, s) for s in (64, 64, 32, 32)]
    losses = [float(clever.train_step(t, views, step)["L_CL"]) for step in range(4)]
    assert losses[-1] < losses[0] and clever.split(t.last[0], 0.8)[0].shape == (2, 4, 614)
    assert all(p.grad.isfinite().all() and p.grad.any() for p in t.student.parameters())


def test_vmamba_trains_in_bf16_on_two_processes_and_is_evaluated(tmp_path, data):
    folder = tmp_path / "run"
    argv = flags(out=folder, data=data, arch="vmamba_tiny", precision="bf16", batch=6, epochs=1)
    ranks = start_two(argv, folder)
    for p in ranks:
        p.join(120)
    assert [p.exitcode for p in ranks] == [0, 0], Path(f"{folder}.0").read_text()
    assert len(log(folder)) == 1
    assert evaluate(folder, "--quick", "--epochs", 1, "--batch", 6) == 0
    (folder / "checkpoint.pt").unlink()  # half a GB


# ------------------------------ 13. Evaluation ------------------------------ #


def untrained(folder, data="patterns", **options):
    """A run as clever.py leaves it, of an untrained backbone."""
    cfg = tiny(data=str(data), out=str(folder), **options)
    folder.mkdir()
    clever.write_json(folder / "config.json", vars(cfg))
    torch.manual_seed(1)
    torch.save(clever.CLeVER(cfg).backbone.state_dict(), folder / "backbone.pt")
    return folder


def evaluate(*argv):
    """An evaluation in this process; its exit code."""
    return eval_linear.main([str(x) for x in (*argv, "--device", "cpu", "--workers", 0)])


def sections(folder, file="eval.json"):
    return json.loads((folder / file).read_text())


def planted(count, seed):
    """20 features, the first 16 (IR) of the class, the others (EF) of the angle; angles; labels."""
    labels, angle = torch.arange(count) % 4, normal(count, seed=seed).erf().float() * 90
    ir = 3 * F.one_hot(labels, 16) + 0.5 * normal(count, 16, seed=seed)
    circle = torch.stack([angle.deg2rad().cos(), angle.deg2rad().sin()], 1)
    return torch.cat([ir, circle.repeat(1, 2) + 0.1 * normal(count, 4, seed=seed)], 1).float(), angle, labels


class Planted(nn.Module):
    """Stands in for a Representation of planted features."""
    width, rank, world, device = 20, 0, 1, torch.device("cpu")
    parts = last = dict(zip(eval_linear.PARTS, (torch.arange(20), *clever.split(torch.arange(20), 0.8))))


def test_planted_class_in_ir_and_angle_in_ef_are_recovered_as_such():
    (z, angle, y), (z_val, angle_val, y_val) = planted(1000, 0), planted(500, 1)
    data = clever.Images(8, y, list("abcd"), pixels=torch.zeros(1000, 3, 8, 8).byte())
    probes = eval_linear.train_probes(eval_linear.Probe(quick=True, epochs=10), Planted(), data, z)
    for (part, i), logits in zip(Planted.last.items(), probes.predict(z_val)):
        votes = eval_linear.knn(z[:, i], y, z_val[:, i], 4)
        linear, near = (eval_linear.topk(s, y_val)[0] for s in (logits, votes))
        r2 = eval_linear.ridge_r2(z[:, i], angle, z_val[:, i], angle_val)
        assert max(abs(linear - 25), abs(near - 25)) < 8 if part == "ef" else min(linear, near) > 95
        assert abs(r2) < 0.1 if part == "ir" else r2 > 0.9


def test_knn_agrees_with_a_naive_one():
    bank, queries, labels = normal(60, 5), normal(9, 5, seed=1), torch.arange(60) % 3
    for q, row in zip(queries, eval_linear.knn(bank, labels, queries, 3, k=7, temperature=0.07)):
        cosine, naive = [float(q @ b / q.norm() / b.norm()) for b in bank], [0.0] * 3
        for i in sorted(range(60), key=lambda i: -cosine[i])[:7]:
            naive[labels[i]] += math.exp((cosine[i] - 1) / 0.07)
        close(row, torch.tensor(naive).double(), 1e-6)


def test_probes_side_by_side_equal_probes_trained_one_by_one():
    x, y, rates = normal(64, 6).float(), torch.arange(64) % 3, (1.0, 10.0)
    parts = dict(all=torch.arange(6), ef=torch.arange(4, 6))

    def train(module, loss, rate):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.01 * rate, momentum=0.9)
        for _ in range(20):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
    probes = eval_linear.LinearProbes(parts, 6, rates, 3)
    start = probes.weight.detach().clone().unflatten(-1, (2, 3))  # (P, F, L, C)
    train(probes, lambda: probes.loss(x, y), 1)
    for (n, i), (m, rate) in itertools.product(enumerate(parts.values()), enumerate(rates)):
        head = nn.Linear(len(i), 3)
        head.weight.data, head.bias.data = start[n, i, m].T.clone(), torch.zeros(3)
        train(head, lambda: F.cross_entropy(head(x[:, i]), y), rate)
        close(probes(x)[n, m], head(x[:, i]), 1e-4)


def test_the_learning_rate_is_chosen_for_each_part_on_the_rows_given():
    probes = eval_linear.LinearProbes(dict(a=torch.arange(2), b=torch.arange(2)), 2, (1.0, 2.0), 2)
    good, bad = torch.eye(2), -torch.eye(2)
    probes.weight.data = torch.stack([torch.cat([bad, good], 1), torch.cat([good, bad], 1)])
    probes.choose(torch.eye(2), torch.arange(2))
    assert probes.best.tolist() == [1, 0] and (probes.predict(good).argmax(-1) == torch.arange(2)).all()


def test_parts_are_the_dimensions_of_the_last_representation():
    p, f = eval_linear.Probe(size=32, precision="fp32"), clever.build_backbone("vit_micro", 32)
    model, x = eval_linear.Representation(f, tiny(), p), torch.randn(2, 3, 32, 32)
    z, last = model(x), f(x)
    assert z.shape == (2, 4 * 96) and len(model.parts["all"]) == 4 * 96
    for part, expected in zip(eval_linear.PARTS, (last, *clever.split(last, 0.8))):
        assert torch.equal(z[:, model.last[part]], expected)
        assert part == "all" or torch.equal(model.parts[part], model.last[part])


def test_test_views_depend_on_their_position_alone_and_a_view_of_a_small_image_is_the_image():
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    view = lambda kind, chunk: eval_linear.make_view(images, torch.ones(5), 32, kind, chunk)
    (first, angle), (again, _), (other, _) = (view("cj+rot+elastic", chunk) for chunk in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other) and 45 < angle.abs().max() <= 90
    (plain, _), (right, angle) = view("orig", 0), view("rot=90", 0)
    close(plain, clever.normalize(images / 255), 1e-4)
    close(right, plain.rot90(1, (2, 3)), 1e-3)
    assert angle.tolist() == [90] * 5


def test_a_draw_of_labels_is_fixed_and_class_balanced():
    labels, draw = torch.arange(1000) % 10, eval_linear.balanced_draw
    assert labels[draw(labels, 0.1, 0)].bincount().tolist() == [10] * 10
    assert labels[draw(labels, 0.001, 0)].bincount().tolist() == [1] * 10
    assert torch.equal(draw(labels, 0.1, 0), draw(labels, 0.1, 0))
    assert not torch.equal(draw(labels, 0.1, 0), draw(labels, 0.1, 1))


def test_published_layouts_load_and_a_file_that_does_not_fit_or_runs_code_is_refused(
        tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own, head = clever.build_backbone("vit_micro", 32).state_dict(), {"head.mlp.0.weight": torch.zeros(3)}
    under = lambda prefix, factor=1: {f"{prefix}backbone.{k}": v * factor for k, v in own.items()}
    for content in (own, {**own, "head.weight": torch.zeros(10, 96), "head.bias": torch.zeros(10)},
                    dict(teacher={**under(""), **head}, student=under("module.", 0), epoch=3,
                         args=argparse.Namespace(arch="vit_micro", lr=0.1)),
                    dict(student={**under("module."), "module.head.x": head})):
        torch.save(content, "w")
        p = eval_linear.Probe(weights="w", arch="vit_micro", data="patterns")
        cfg, loaded, _ = eval_linear.open_model(p)
        assert all(torch.equal(v, own[k]) for k, v in loaded.state_dict().items())
        assert p.size == 32 and cfg.patch_size == 8
    part = {k: v for k, v in own.items() if "qkv" not in k} | {"odd": torch.zeros(1)}
    for content, words in ((dict(teacher=own, more=Payload()), ["mkdir"]),
                           (part, ["blocks.0.attn.qkv.weight", "odd"])):
        torch.save(content, "w")
        code = evaluate("--weights", "w", "--arch", "vit_micro", "--data", "patterns")
        err = capsys.readouterr().err
        assert (code, err.count("\n")) == (2, 1) and all(w in err for w in words), err
    assert not Path("executed").exists()


def test_every_wrong_evaluation_is_one_sentence_and_exit_code_2(tmp_path, capsys):
    data = pictures(tmp_path / "data", 2, 1)
    dino = untrained(tmp_path / "dino", data, method="dino", ratio=1.0)
    net = untrained(tmp_path / "net", data, arch="resnet18")
    (data / "val" / "b").rename(data / "val" / "c")
    (untrained(tmp_path / "bare") / "backbone.pt").unlink()
    before = tree(tmp_path)
    for words, *argv in [
            ("holds no run", tmp_path / "none"), ("no split", dino, "--parts", "ef"), ("one of the two",),
            ("did you mean --quick", dino, "--quik"), ("cannot be read", dino, "--visualize", "no.png"),
            ("DAVIS", dino, "--davis", tmp_path), ("--epochs", dino, "--epochs", 0),
            ("cannot be written", dino, "--out", dino / "config.json"), ("ViT", net, "--visualize", "x"),
            ("different classes (b, c", dino, "--quick"), ("backbone.pt", tmp_path / "bare")]:
        code, (out, err) = evaluate(*argv), capsys.readouterr()
        assert (code, out, err.count("\n")) == (2, "", 1) and words in err, (argv, err)
    assert tree(tmp_path) == before


def test_one_command_writes_the_table_and_two_processes_give_the_numbers_of_one(tmp_path, capsys):
    folder = untrained(tmp_path / "run", pictures(tmp_path / "data", 40, 140))  # 280 test images: two chunks
    argv = [folder, *"--epochs 3 --batch 16 --lr-grid 10 100 --device cpu --workers 0".split()]
    ranks = start_two([*argv, "--out", tmp_path], tmp_path / "said", "eval_linear.py")
    assert evaluate(*argv) == 0
    table = capsys.readouterr().out
    assert "| linear ef " in table and "cj+rot+elastic" in table and "relative rotation R2" in table
    for p in ranks:
        p.join(100)
    assert [p.exitcode for p in ranks] == [0, 0]
    one, two = sections(folder), sections(tmp_path)
    assert one["probes"]["linear all"]["orig"][0] > 90 and one["probes"]["settings"]["epochs"] == 3
    for row, part, kind in itertools.product(("linear", "k-NN"), eval_linear.PARTS, eval_linear.KINDS):
        a, b = (x["probes"][f"{row} {part}"][kind] for x in (one, two))
        assert a == pytest.approx(b, abs=1), (row, part, kind)
    for what, row in one["rotation"]["after"].items():
        assert row == pytest.approx(two["rotation"]["after"][what], rel=1e-3, abs=1e-3)


def test_finetune_quick_labels_and_curves_add_sections_whole_and_leave_the_run_alone(tmp_path, monkeypatch):
    folder = untrained(tmp_path / "run", pictures(tmp_path / "data", 40, 10))
    weights, common = (folder / "backbone.pt").read_bytes(), (folder, "--epochs", 3, "--batch", 16)
    assert evaluate(*common, "--quick", "--curve") == 0
    before = sections(folder)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(os, "fsync", lambda number: signal.raise_signal(signal.SIGINT))  # stopped while it writes
        evaluate(*common, "--finetune")
    assert sections(folder) == before and not list(folder.glob("*.tmp"))
    assert evaluate(*common, "--finetune", "--labels", 0.5) == 0
    saved = sections(folder)
    assert set(saved) == {"probes", "curves", "rotation", "finetune labels 0.5"}
    assert set(saved["curves"]["k-NN ef"]) == set(eval_linear.CURVES)
    assert saved["finetune labels 0.5"]["linear all"]["orig"][0] > 90
    assert saved["curves"]["k-NN all"]["rot=0"] == saved["probes"]["k-NN all"]["orig"]
    assert (folder / "backbone.pt").read_bytes() == weights


def test_the_report_tells_before_and_after_and_does_without_held_out_images(tmp_path, capsys):
    data = pictures(tmp_path / "data", 30, 15)
    folder, cfg = tmp_path / "run", tiny(data=str(data))
    assert run(folder, data=data, report=True, epochs=1) == 0
    text, numbers = capsys.readouterr().out, sections(folder, "compare.json")
    assert all(word in text for word in ("->", "eval_linear.py", "--method dino", "k-NN top-1, rotated"))
    torch.manual_seed(cfg.seed)
    torch.save(clever.CLeVER(cfg).backbone.state_dict(), folder / "backbone.pt")
    eval_linear.compare(cfg, folder)
    same = sections(folder, "compare.json")
    assert same["before"] == same["after"] == numbers["before"]
    shutil.rmtree(data / "val")
    eval_linear.compare(cfg, folder)
    assert "No comparison" in capsys.readouterr().out


def moving_shapes(frames=12, side=64):
    """Two shapes that move over grey noise: frames (T, 3, side, side), ids (T, side, side)."""
    (y, x), clip, ids = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), [], []
    for t in range(frames):
        circle = (x - 16 - 2 * t) ** 2 + (y - 20) ** 2 < 144
        box = ((x - 44 + t).abs() < 10) & ((y - 46).abs() < 10)
        colour = torch.tensor([0.4, -0.4, -0.4])[:, None, None]
        clip.append(0.5 + 0.05 * normal(3, side, side, seed=t) + colour * circle + colour.flip(0) * box)
        ids.append(circle * 1 + (box & ~circle) * 2)
    return torch.stack(clip).float(), torch.stack(ids)


def test_label_propagation_follows_colour_patches_and_fails_on_shuffled_ones():
    clip, truth = moving_shapes()
    features = F.avg_pool2d(clip - 0.5, 2).permute(0, 2, 3, 1)  # (T, 32, 32, 3): raw patches
    j = eval_linear.jaccard(eval_linear.segment(features, truth[0]), truth)
    assert j.shape == (2, 10) and j.mean() > 0.8
    order = [torch.randperm(1024, generator=torch.Generator().manual_seed(t)) for t in range(12)]
    shuffled = torch.stack([f.flatten(0, 1)[o].view(32, 32, 3) for f, o in zip(features, order)])
    assert eval_linear.jaccard(eval_linear.segment(shuffled, truth[0]), truth).mean() < 0.5


def test_davis_reads_the_layout_of_the_data_set(tmp_path):
    root, (clip, truth) = tmp_path / "davis", moving_shapes(4)
    frames, masks = root / "JPEGImages/480p/toy", root / "Annotations/480p/toy"
    lists = root / "ImageSets/2017"
    for folder in (frames, masks, lists):
        folder.mkdir(parents=True)
    (lists / "val.txt").write_text("toy\n")
    for t in range(4):
        TF.to_pil_image(clip[t].clamp(0, 1)).save(frames / f"{t:05}.jpg")
        mask = Image.fromarray(truth[t].byte().numpy(), "P")
        mask.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
        mask.save(masks / f"{t:05}.png")
    assert evaluate(untrained(tmp_path / "run"), "--davis", root) == 0
    saved = sections(tmp_path / "run")["davis"]
    assert 0 < saved["J mean"] <= 1 and 0 <= saved["J recall"] <= 1 and len(saved["videos"]["toy"]) == 2


def test_visualize_writes_one_row_an_image_with_heads_and_components(tmp_path, data):
    image, folder = data / "train" / "a" / "00.jpg", untrained(tmp_path / "run")
    assert evaluate(folder, "--visualize", image, image) == 0
    with Image.open(folder / "visualize.png") as picture:  # image, 3 heads, components; tiles of 128 px
        assert picture.size == (5 * 132 + 4, 2 * 132 + 4)


def test_probing_a_resnet_uses_its_pooled_features_and_leaves_batch_norm_alone(tmp_path, data, capsys):
    folder = untrained(tmp_path / "run", data, arch="resnet18")
    assert evaluate(folder, "--quick", "--epochs", 2, "--batch", 8) == 0
    assert "rotation R2" in capsys.readouterr().out


# ------------------------------ 14. Benchmarks: pytest -m benchmark -s ------------------------------ #


def published_views(cfg):
    """The published recipe of each view of a PIL image, a resampling for each geometric operation."""
    def view(v):
        size, scale = (cfg.global_size, cfg.global_scale) if v < 2 else (cfg.local_size, cfg.local_scale)
        soften = T.Lambda(lambda x: x.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0))))
        elastic = T.RandomApply([T.ElasticTransform(100.0)])                   # at all sizes
        return T.Compose([
            T.RandomResizedCrop(size, scale, interpolation=BICUBIC), T.RandomHorizontalFlip(),
            *[T.RandomRotation(90)] * (cfg.aug != "baug"), *[elastic] * (cfg.aug == "caug+"),
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8), T.RandomGrayscale(0.2),
            T.RandomApply([soften], (1.0, 0.1, 0.5)[min(v, 2)]), T.RandomSolarize(128, 0.2 * (v == 1)),
            T.ToTensor(), T.Normalize(clever.MEAN, clever.STD)])
    return [view(v) for v in range(2 + cfg.local_views)]


def in_turns(calls, rounds=5):
    """The median seconds of each of some calls {name: f(i)}, called in turns, after one that warms up."""
    times = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, f in calls.items():
            began = time.perf_counter()
            f(i)
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(t[1:]) for name, t in times.items()}


@pytest.fixture
def photos():
    """The photographs of .data/photos."""
    paths = sorted((HERE / ".data" / "photos").rglob("*.jpg"))
    return paths or pytest.skip("needs photographs in .data/photos")


@pytest.mark.benchmark
@pytest.mark.parametrize("aug", ["caug", "caug+"])
def test_benchmark_whole_step(photos, aug):
    images = [clever.decode(p, 320) for p in photos[:8]]
    pil = [Image.open(p).convert("RGB") for p in photos[:8]]
    pixels, aspect = torch.stack([x for x, _ in images]), torch.tensor([a for _, a in images])
    fp32, bf16 = (clever.Config(aug=aug, batch=8, drop_path=0.0, precision=p) for p in ("fp32", "bf16"))
    t, t16, crop = clever.Training(fp32, 1), clever.Training(bf16, 1), clever.MultiCrop(fp32)
    naive, transforms, views = Published(t), published_views(fp32), crop(pixels, aspect, 0)

    def networks(i):
        t.optimizer.zero_grad()
        with torch.no_grad():
            t.teacher(views[:2])
        torch.autograd.backward(t.student(views), [torch.ones(10, 8, 65536)] * 2)
    took = in_turns({
        "published": lambda i: naive.step([torch.stack([v(x) for x in pil]) for v in transforms], 1 + i),
        "fp32": lambda i: clever.train_step(t, crop(pixels, aspect, i), 1 + i),
        "bf16": lambda i: clever.train_step(t16, crop(pixels, aspect, i), 1 + i), "networks": networks})
    for name in ("fp32", "bf16"):
        print(f"\nstep, {aug}: published, fp32 {took['published']:.2f} s, ours, {name} {took[name]:.2f} s: "
              f"{took['published'] / took[name]:.2f} x")
    print(f"\nstep, {aug}: all but backbone and heads {1 - took['networks'] / took['fp32']:.0%} in fp32")


@pytest.mark.benchmark
@pytest.mark.parametrize("aug", ["baug", "caug", "caug+"])
def test_benchmark_loader(photos, aug):
    transforms, load = published_views(clever.Config(aug=aug)), lambda p: Image.open(p).convert("RGB")
    torch.set_num_threads(1)                                                   # as in a worker of a loader
    took = in_turns(dict(theirs=lambda i: [[t(x) for t in transforms] for x in map(load, photos)],
                         ours=lambda i: [clever.decode(p, 320) for p in photos]), rounds=3)
    theirs, ours = (len(photos) / took[name] for name in ("theirs", "ours"))
    print(f"\nloader, {aug}: published {theirs:.1f} images/s, ours {ours:.1f}: {ours / theirs:.1f} x")


def peak(call):
    """The most bytes that tensors held at once during call(), beyond those held before."""
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        call()
    events = (e for e in p.profiler.kineto_results.events() if e.name() == "[memory]")
    sizes = (size for _, size in sorted((e.start_ns(), e.nbytes()) for e in events))
    return max(itertools.accumulate(sizes)) / 2 ** 30


@pytest.mark.benchmark
def test_benchmark_memory_of_the_losses():
    student, teacher = torch.rand(10, 128, 65536, requires_grad=True), torch.rand(2, 128, 65536)
    x = student, teacher, torch.zeros(65536), 0.1, 0.04
    naive, ours = (peak(lambda: sum(f(*x) for f in fs).backward()) for fs in (NAIVE.values(), NAIVE))
    print(f"\nlosses, 10 views, batch 128, K = 65,536: naive {naive:.2f} GiB, ours {ours:.2f} GiB: "
          f"{naive / ours:.2f} x")


@pytest.mark.benchmark
def test_benchmark_memory_of_vmamba_beside_vit_small():
    x = torch.rand(16, 3, 224, 224)
    nets = [clever.build_backbone(arch, 224) for arch in ("vmamba_tiny", "vit_small")]
    vmamba, vit = (peak(lambda: net(x).sum().backward()) for net in nets)
    print(f"\nforward and backward, batch 16, 224 px: vmamba_tiny {vmamba:.2f} GiB, vit_small {vit:.2f} GiB: "
          f"{vmamba / vit:.2f} x")


@pytest.mark.benchmark
def test_benchmark_vmamba_beside_itself_without_the_recurrence(monkeypatch):
    model, x = clever.VMamba(), torch.randn(4, 3, 224, 224)
    nothing = dict(chunk_starts=lambda a, b, chunks: torch.zeros_like(b[0]), chunk_scan_=lambda a, b, h: None)
    no_scan = dict(selective_scan=lambda v, p, *rest: (v * p.sum((3, 4))[..., None]).float()
                   + sum(y.sum() for y in rest))

    def call(**changes):
        with monkeypatch.context() as patch:
            for attribute, value in changes.items():
                patch.setattr(clever, attribute, value)
            model(x).square().mean().backward()
    times = in_turns({"whole": lambda i: call(), "its loops": lambda i: call(**nothing),
                      "the scan": lambda i: call(**no_scan)})
    whole, *others = times.values()
    for name, other in zip(list(times)[1:], others):
        print(f"\nvmamba_tiny: {whole:.2f} s, {whole / other:.2f} x that without {name}")
