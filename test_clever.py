"""The claims of clever.py, each with its test; numbers are checked against naive versions written out here.

    pytest                      the plain run
    pytest -m long -s           the same loops for longer: kills, mutated files, 2,000 steps
    pytest -m benchmark -s      time and memory beside the naive versions: ratios, nothing asserted
"""
import copy
import itertools
import json
import math
import os
import random
import resource
import runpy
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import warnings
import zlib
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
import torchvision.transforms.functional as TF
from PIL import Image, ImageFilter
from torch import nn
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode

import clever

warnings.filterwarnings("ignore",
                        category=pytest.PytestUnknownMarkWarning)  # no other file could register them
HERE, BILINEAR, BICUBIC = Path(__file__).parent, InterpolationMode.BILINEAR, InterpolationMode.BICUBIC
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
CHILDREN = torch.multiprocessing.get_context("forkserver")  # real processes that share one import
CHILDREN.set_forkserver_preload(["test_clever"])
TINY = dict(arch="vit_micro", global_size=32, local_size=16, local_views=2, blur=False, out_dim=64,
            hidden_dim=32,
            bottleneck_dim=16, batch=8, epochs=3, warmup_epochs=1, lr=5e-3, precision="fp32", workers=0)


@pytest.fixture(autouse=True)
def only_on_request(request):
    """Tests marked `long` or `benchmark` run where `-m` names the mark."""
    for mark in {"long", "benchmark"} & {m.name for m in request.node.iter_markers()}:
        if mark not in request.config.option.markexpr:
            pytest.skip(f"runs with -m {mark}")


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
    """1. L_CL (which is DINO's) and L_Orth, value and gradient, which is the student's alone."""
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
    """1. Permuting the images changes nothing; permuting the student's alone does."""
    student, teacher, centre, order = normal(4, 6, 9), normal(2, 6, 9, seed=1), normal(9), [2, 0, 5, 1, 3, 4]
    close(loss(student[:, order], teacher[:, order], centre), loss(student, teacher, centre))
    assert abs(loss(student[:, order], teacher, centre) - loss(student, teacher, centre)) > 1e-3


def test_orthogonality_is_1_for_equal_peaks_and_0_for_disjoint_ones():
    """1. The two ends of L_Orth."""
    peaks = 50 * torch.eye(4, 8).double()                                      # (B, K)
    equal, disjoint = (clever.orthogonality_loss(s.expand(5, 4, 8), peaks.expand(2, 4, 8), torch.zeros(8))
                       for s in (peaks, peaks.roll(4, -1)))
    assert equal > 1 - 1e-9 and disjoint < 1e-9


def test_preg_is_0_for_equal_heads_and_counts_every_parameter_of_both():
    """1. L_PReg and its gradient, 2θ in h_IR and -2θ in h_EF or the other way round."""
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
    """1. L = L_CL + λ_orth L_Orth + λ_reg L_PReg; without an EF, L = L_CL."""
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


# TODO: add ("vmamba_tiny", 768, 29.5) once the backbone is there
@pytest.mark.parametrize("arch, D, millions",
                         [("vit_micro", 96, 0.47), ("vit_tiny", 192, 5.5), ("vit_small", 384, 21.7),
                                               ("vit_base", 768, 85.8), ("resnet18", 512, 11.2),
                          ("resnet50", 2048, 23.5)])
def test_every_backbone_has_its_width_and_size_and_takes_both_views(arch, D, millions):
    """2. (B, 3, s, s) -> (B, D) for global and local views; parameters as in DESIGN.md, section 3."""
    f = clever.build_backbone(arch, 224 if arch != "vit_micro" else 32).eval()
    assert f.embed_dim == D and abs(sum(p.numel() for p in f.parameters()) / 1e6 - millions) < 0.06
    with torch.no_grad():
        assert all(f(torch.zeros(2, 3, side, side)).shape == (2, D) for side in (32, 96))


@pytest.mark.parametrize("ratio", [0.02, 0.5, 0.8, 0.99, 1.0])
def test_ir_and_ef_together_are_the_representation_and_feed_their_own_heads(ratio):
    """2. Widths of split, heads and logits for each ratio; views keep their order."""
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
    """2. Three layers, unit bottleneck, prototypes of gain 1, weights of std 0.02, zero biases."""
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


# TODO: the words follow the thresholds of collapse_alarm
@pytest.mark.parametrize("features, logits, says", [
    ("healthy", "healthy", ""), ("healthy", "uniform", "uniform"), ("healthy", "one", "one prototype"),
    ("constant", "healthy", "same features"), ("line", "healthy", "same features")])
def test_each_alarm_rings_on_its_collapse_and_only_there(features, logits, says):
    """3. Entropy, divergence from uniform, spread and RankMe equal their formulas; the alarm names it."""
    x, P = FEATURES[features], LOGITS[logits].softmax(-1)
    m, s, mean = clever.collapse_metrics(x,
                                         P), torch.linalg.eigvalsh(x.T @ x).clamp(min=1e-30).sqrt(), P.mean(0)
    assert m["entropy"] == pytest.approx(-(P * P.log()).sum(1).mean().item(), abs=1e-9)
    assert m["kl_uniform"] == pytest.approx((mean * (mean * 64).log()).sum().item(), abs=1e-9)
    assert m["std"] == pytest.approx((x / x.norm(dim=1, keepdim=True)).std(0).mean().item() * 32 ** 0.5,
                                     abs=1e-9)
    assert m["rank"] == pytest.approx(torch.exp(-(s / s.sum() * (s / s.sum()).log()).sum()).item(), rel=1e-3)
    alarm = clever.collapse_alarm("IR", m, 64)
    assert says in alarm and "Try" in alarm if says else alarm == ""


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
    """4. Decoded, squashed to 320 px, cropped by the warp: 36 dB from the bicubic crop of the original."""
    TF.to_pil_image(smooth(375, 500)[0]).save(tmp_path / "x.png")
    original = TF.pil_to_tensor(Image.open(tmp_path / "x.png"))
    stored, aspect = clever.decode(tmp_path / "x.png", 320)
    assert stored.shape == (3, 320,
                            320) and stored.dtype == torch.uint8 and aspect == pytest.approx(500 / 375)
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
    """4. Position and size of 10,000 boxes against 5,000, on upright, wide and extreme images."""
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
    """4. The empty warp is the identity, and with a flip the mirrored image: to 1e-14."""
    image = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    close(warp(image, 32), image, 1e-14)
    close(warp(image, 32, flip=True), image.flip(-1), 1e-14)


@pytest.mark.parametrize("angle", [-90.0, -37.0, 12.5, 45.0, 90.0])
def test_a_rotation_is_that_of_torchvision_and_its_corners_are_black(angle):
    """4. Bilinear inside the disc; exactly 0 outside the rotated crop, and nowhere inside."""
    image, x, y = smooth(64, 64) * 0.8 + 0.1, axis(64), axis(64)[:, None]
    ours, a = warp(image, 64, angle=angle), math.radians(angle)
    assert ((ours - TF.rotate(image, angle, BILINEAR)).abs() * disc(64, 0.95)).max() < 1e-4
    far = torch.maximum((math.cos(a) * x - math.sin(a) * y).abs(), (math.sin(a) * x + math.cos(a) * y).abs())
    assert (ours[:, :, far > 1.001] == 0).all() and (ours[:, :, far < 0.999] > 0.05).all()


def test_the_elastic_deformation_is_that_of_torchvision_and_strength_0_is_the_identity():
    """4. Displacement and deformed image, from the same noise."""
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
    """4. Crop, flip, rotation, elastic, one after the other; in another order, another image."""
    image, noise = smooth(320, 320, highest=6), normal(1, 2, 128, 128).float().clamp(-1, 1)
    box, shift, inner = (0.1, -0.2, 0.7, 0.6), clever.elastic_shift(noise, 57.0, 2.9), disc(128, 0.85)
    ours, crop = warp(image, 128, box, True, 33.0, shift), warp(image, 128, box)
    turn = lambda x: TF.rotate(x, 33.0, BILINEAR)
    bend = lambda x: TF.elastic_transform(x, shift, BILINEAR)
    assert psnr(ours, bend(turn(TF.hflip(crop))), inner) > 36
    for other in (bend(TF.hflip(turn(crop))), turn(bend(TF.hflip(crop))), bend(turn(crop))):
        assert psnr(ours, other, inner) < 34


def test_each_colour_operation_is_that_of_torchvision():
    """4. Jitter in any order and with a factor an image, grey, blur, solarisation, normalisation: to 1e-5."""
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
    """4. Ranges and probabilities over 10,000 draws, for each recipe and kind of view."""
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
    """4. All 24 orders come up, about equally often."""
    crop, seen = clever.MultiCrop(tiny(global_size=8, local_size=8)), Counter()
    crop.make_view = lambda images, size, p, order, noise: seen.update([tuple(order)])
    for step in range(600):
        crop(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.ones(1), step)
    assert len(seen) == 24 and min(seen.values()) > 60 and max(seen.values()) < 140, seen


def test_views_depend_on_seed_and_step_and_not_on_the_number_of_processes():
    """4. The global batch in one piece, or in four."""
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
    """5. Schedules, clipping, frozen prototypes, AdamW's groups, EMA, centres, losses: to 1e-10."""
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


def test_a_folder_of_images_gets_the_papers_schedules():
    """5. The defaults of DESIGN.md, section 3: warm-up to 5e-4 · 512/256, cosines of 200 epochs."""
    t = clever.Training(clever.parse("--data x --arch vit_micro --hidden-dim 8 --out-dim 8".split()), 5)
    assert len(t.lr) == 1000 and t.lr[0] == 0 and max(t.lr) == t.lr[50] == 1e-3
    assert (t.momentum[0], t.weight_decay[0], t.weight_decay[-1],
            t.lr[-1]) == pytest.approx((0.996, 0.04, 0.4, 1e-6), 1e-2)


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
        result += [x.detach() for x in (*t.student.parameters(), *t.teacher.parameters(),
                                        *t.centres)]  # makes steps of its rounding
    torch.save(result, f"{folder}/{world}-{rank}.pt")


def test_two_processes_equal_one(tmp_path):
    """6. Losses of five steps, weights, centres: 1e-10 in float64, 1e-5 in float32; equal ranks."""
    ranks = [CHILDREN.Process(target=five_steps, args=(rank, 2, str(tmp_path))) for rank in range(2)]
    for p in ranks:
        p.start()
    five_steps(0, 1, str(tmp_path))
    for p in ranks:
        p.join(60)
    assert [p.exitcode for p in ranks] == [0, 0]
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    assert {x.dtype for x in one} == {torch.float64, torch.float32}
    for a, b, c in zip(one, first, second, strict=True):
        assert torch.equal(b, c)
        close(a, b, 1e-10 if a.dtype == torch.float64 else 1e-5)


# ------------------------------ 7. Names ------------------------------ #


def test_parameters_of_vit_tiny_are_those_of_timm():
    """7. Names and shapes of timm's vit_tiny_patch16_224 without its classifier."""
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
    """7. A state dict loads there with strict=True and gives equal features; small images: another stem."""
    ours, theirs = clever.build_backbone(arch, 224), getattr(torchvision.models, arch)()
    theirs.fc = nn.Identity()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x, small = torch.randn(2, 3, 64, 64), clever.build_backbone(arch, 32).state_dict()
    close(ours.eval()(x), theirs.eval()(x), 1e-4)
    assert {k for k, v in theirs.state_dict().items() if small[k].shape != v.shape} == {"conv1.weight"}


def test_the_cls_feature_is_that_of_torchvision_and_the_other_outputs_agree_with_it():
    """7. Our weights in torchvision's VisionTransformer; other sizes, layers and attention written out."""
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


def child(argv, output, env, cwd):
    """Body of a process: `python clever.py argv` with its output in a file."""
    for number in (1, 2):
        os.dup2(os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = ["clever.py", *argv]
    runpy.run_path(str(HERE / "clever.py"), run_name="__main__")


def start(argv, output, cwd=HERE, **env):
    """`python clever.py argv` in a process of its own."""
    p = CHILDREN.Process(target=child,
                         args=(argv, str(output), {k: str(v) for k, v in env.items()}, str(cwd)))
    p.start()
    return p


def start_two(folder, **options):
    """The two processes of a run, as torchrun starts them."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        env = dict(WORLD_SIZE=2, LOCAL_WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=s.getsockname()[1])
    return [start(flags(out=folder, **options), f"{folder}.{r}", RANK=r, LOCAL_RANK=r, **env)
            for r in range(2)]


def torchrun(*argv, cwd=None, processes=1):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    return subprocess.Popen([str(x) for x in (*command, HERE / "clever.py", *argv)], cwd=cwd, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


# TODO: eval_linear.py on this run
def test_torchrun_trains_the_demo_and_leaves_the_designed_files(tmp_path):
    """8. `torchrun clever.py`, cut to six steps: the designed files; one line an epoch if redirected."""
    p = torchrun("--images", 192, "--epochs", 2, "--no-report", cwd=tmp_path)
    out, err = p.communicate(timeout=120)
    assert p.returncode == 0, err
    folder = tmp_path / "runs" / "patterns-clever-caug-1"
    files = {"config.json", "log.jsonl", "crops.png", "checkpoint.pt", "backbone.pt"}
    assert {f.name for f in folder.iterdir()} == files
    assert [line.split("  ")[0] for line in out.splitlines()] == ["epoch 1/2", "epoch 2/2"]
    assert "\r" not in out + err
    assert [(r["epoch"], r["step"]) for r in log(folder)] == [(1, 3), (2, 6)]
    assert {"L_CL", "L_Orth", "L_PReg", "loss", "ir_rank", "ef_std", "ef_kl_uniform"} <= log(folder)[0].keys()
    weights, teacher = torch.load(folder / "backbone.pt", weights_only=True), checkpoint(folder)["teacher"]
    clever.build_backbone("vit_micro", 32).load_state_dict(weights, strict=True)
    assert all(torch.equal(v, teacher["backbone." + k]) for k, v in weights.items())
    with Image.open(folder / "crops.png") as crops:
        assert crops.width > 5 * 96 and crops.height > 8 * 96


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of 12 JPEGs in two classes."""
    folder = tmp_path_factory.mktemp("data")
    for i in range(12):
        path = folder / "train" / "ab"[i % 2] / f"{i:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        TF.to_pil_image(smooth(40, 60, seed=i)[0]).save(path)
    return folder


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
--recipe papr > did you mean paper; --device gpu; --precision fp8; --precision fp16 --device cpu;
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
    argv = [[*flags(out=folder / "new"), *(re_place(x, place) for x in line.split())] for line, _, _ in table]
    return folder, [(a, words or line.split()[0]) for a, (line, _, words) in zip(argv, table)]


def re_place(word, places):
    for old, new in places.items():
        word = word.replace(old, new)
    return word


def tree(*folders):
    """All files of these folders and when they were written."""
    return {(str(f), f.stat().st_mtime_ns) for folder in folders for f in Path(folder).rglob("*")}


def test_every_wrong_setting_is_one_sentence_exit_code_2_and_creates_nothing(
        wrong, base, data, capsys, monkeypatch):
    """8. A table of more than 50, in this process."""
    folder, settings = wrong
    before = tree(folder, base, data)
    monkeypatch.chdir(folder)
    for argv, words in settings:
        code, (out, err) = clever.main(argv), capsys.readouterr()
        assert (code, out, err.count("\n")) == (2, "", 1), (argv, err)
        assert err.startswith("clever.py: ") and words in err, (argv, err)
        assert tree(folder, base, data) == before, argv
    assert len(settings) > 50


def test_ten_wrong_inputs_of_the_real_command(wrong, base, data, tmp_path):
    """8. The same in processes of their own."""
    folder, settings = wrong
    before, chosen = tree(folder, base, data), settings[::len(settings) // 10][:10]
    started = [start(argv, tmp_path / str(i), folder) for i, (argv, _) in enumerate(chosen)]
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


def test_a_run_killed_at_random_moments_resumes_to_the_same_bits(base, tmp_path):
    """9. SIGKILL up to three times: weights, optimiser, centres and log of the run that was never stopped."""
    assert kill_and_resume(base, tmp_path / "run", 3, random.Random(0)) > 0


@pytest.mark.long
def test_runs_killed_fifty_times_resume_to_the_same_bits(base, tmp_path):
    """9. The same for ten runs, at other moments each time."""
    kills = sum(kill_and_resume(base, tmp_path / f"run{i}", 5, random.Random()) for i in range(10))
    print(f"\n{kills} kills")
    assert kills >= 10


@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_stop_signal_leaves_a_checkpoint_that_resumes_to_the_same_bits(base, tmp_path, name, code):
    """9. The step is finished, the checkpoint written, the exit code 143 or 130."""
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


def test_a_signal_to_one_of_two_processes_stops_both_with_a_checkpoint(tmp_path):
    """9. SIGTERM reaches rank 1 alone; both leave with 143."""
    folder = tmp_path / "run"
    ranks = start_two(folder, epochs=1000, images=64)
    until(lambda: log(folder), *ranks)
    os.kill(ranks[1].pid, signal.SIGTERM)
    for p in ranks:
        p.join(60)
    assert [p.exitcode for p in ranks] == [143, 143]
    assert f"stopped at step {checkpoint(folder)['step']}" in Path(f"{folder}.0").read_text()


def test_ctrl_c_on_torchrun_leaves_a_checkpoint(tmp_path):
    """9. Ctrl-C reaches torchrun and both its processes at once; the step is finished and saved."""
    folder = tmp_path / "run"
    p = torchrun(*flags(out=folder, epochs=1000, images=64, save_every=60), processes=2)
    until(lambda: len(log(folder)) >= 2 or p.poll() is not None)
    os.killpg(p.pid, signal.SIGINT)
    out, err = p.communicate(timeout=60)
    assert f"stopped at step {checkpoint(folder)['step']}" in err, err


def test_a_rank_that_dies_takes_the_other_down_with_a_message(tmp_path):
    """9. No hang."""
    folder = tmp_path / "run"
    ranks = start_two(folder, epochs=1000, images=64)
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
    """9. Truncated, foreign, executable, of another architecture, ratio or K: exit code 2, the file stays."""
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
        code, (out, err) = run(path.parent, resume=True, **SHORT), capsys.readouterr()
        assert (code, err.count("\n")) == (2, 1) and words in err and str(path) in err, (i, err)
        assert path.read_bytes() == before and log(path.parent) == log(base)
    assert not (tmp_path / "executed").exists()


def test_a_full_disk_costs_one_checkpoint_and_nothing_else(base, tmp_path, capsys, monkeypatch):
    """9. It is said aloud, the last checkpoint stays whole, the run goes on and ends as it should."""
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


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_checkpoint(base, tmp_path, monkeypatch):
    """9. Step, term and last good checkpoint are named; resumed, the run ends as it should."""
    real, calls = clever.orthogonality_loss, []
    folder, options = tmp_path / "run", {**SHORT, "save_every": 60}

    def loss(*args):
        calls.append(1)
        return real(*args) * (math.nan if len(calls) == 13 else 1.0)           # at step 12, of 24
    with monkeypatch.context() as m, pytest.raises(SystemExit) as end:
        m.setattr(clever, "orthogonality_loss", loss)
        run(folder, **options)
    assert "L_Orth is nan at step 12" in str(end.value)
    assert f"{folder / 'checkpoint.pt'}, step 8" in str(end.value)
    assert checkpoint(folder)["step"] == 8
    assert run(folder, resume=True, **options) == 0
    same_run(base, folder)


# TODO: follows the thresholds of collapse_alarm and the README's broken setting
@pytest.mark.parametrize("options, says", [
    (dict(freeze_epochs=3, teacher_temp=0.03, lr=2e-3), ""),
    (dict(freeze_epochs=0, teacher_temp=0.2, lr=0.02), "output is uniform"),
    (dict(freeze_epochs=0, teacher_temp=0.03, lr=0.04, centre_momentum=1.0, momentum=0.9),
     "one prototype takes every image")])
def test_a_real_run_that_collapses_is_called_out_and_one_that_does_not_is_not(
        tmp_path, capsys, options, says):
    """9. Collapse by temperature and by a centre that stands still, beside a healthy run."""
    size = dict(images=256, batch=32, local_views=0, out_dim=256, hidden_dim=128, bottleneck_dim=64)
    assert run(tmp_path / "run", **size, **options) == 0
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
    """10. CMYK, palette, grey, 16 bits, alpha, one pixel wide, EXIF-rotated, odd names."""
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
        assert pixels.shape == (3, 32,
                                32) and pixels.dtype == torch.uint8 and shape == pytest.approx(aspect), name
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


@pytest.mark.parametrize("cache", [True, False])
def test_broken_images_are_replaced_named_once_and_counted(data, tmp_path, capsys, cache):
    """10. Five kinds among 600 files, beside a directory called x.jpg: two epochs of the run go on."""
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
    """10. At the end of the first epoch."""
    shutil.copytree(data, tmp_path / "data")
    names = break_five(tmp_path / "data" / "train" / "b", data / "train" / "a" / "00.jpg")
    with pytest.raises(SystemExit) as end:
        run(tmp_path / "run", data=tmp_path / "data", batch=17)
    assert all(name in str(end.value)
               for name in names) and "1 %" in str(end.value) and len(log(tmp_path / "run")) == 1


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
    """10. Whatever the bytes, an image comes back: of the file, or of the one in its place."""
    assert 0 < mutate(count, seed, data / "train" / "a" / "00.jpg", tmp_path / "x.jpg") < count


# ------------------------------ 11. Long runs ------------------------------ #


@pytest.mark.parametrize("steps", [60, pytest.param(2000, marks=pytest.mark.long)])
def test_memory_and_open_files_do_not_grow(data, tmp_path, monkeypatch, steps):
    """11. From a tenth of the steps to their end, images from files, a checkpoint every second step."""
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


# ------------------------------ 12. Benchmarks: pytest -m benchmark -s ------------------------------ #


def published_views(cfg):
    """The published recipe of each view of a PIL image, a resampling for each geometric operation."""
    def view(v):
        size, scale = (cfg.global_size, cfg.global_scale) if v < 2 else (cfg.local_size, cfg.local_scale)
        soften = T.Lambda(lambda x: x.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0))))
        elastic = T.RandomApply([T.ElasticTransform(100 * size / 224, 5 * size / 224)])
        return T.Compose([
            T.RandomResizedCrop(size, scale, interpolation=BICUBIC), T.RandomHorizontalFlip(),
            *[T.RandomRotation(90)] * (cfg.aug != "baug"), *[elastic] * (cfg.aug == "caug+"),
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8), T.RandomGrayscale(0.2),
            T.RandomApply([soften], (1.0, 0.1, 0.5)[min(v, 2)]), T.RandomSolarize(128, 0.2 * (v == 1)),
            T.ToTensor(), T.Normalize(clever.MEAN, clever.STD)])
    return [view(v) for v in range(2 + cfg.local_views)]


def seconds(f, repeats=3):
    """The fastest of some calls, after one that warms up."""
    times = []
    for i in range(repeats + 1):
        began = time.perf_counter()
        f(i)
        times.append(time.perf_counter() - began)
    return min(times[1:])


@pytest.fixture
def photos():
    """The photographs of .data/photos."""
    paths = sorted((HERE / ".data" / "photos").rglob("*.jpg"))
    return paths or pytest.skip("needs photographs in .data/photos")


@pytest.mark.benchmark
@pytest.mark.parametrize("aug", ["caug", "caug+"])
def test_benchmark_whole_step(photos, aug):
    """12. vit_tiny, 2 x 224 + 8 x 96, batch 8, K = 65,536, augmentation to EMA, beside the published loop."""
    options = dict(aug=aug, batch=8, drop_path=0.0)
    images = [clever.decode(p, 320) for p in photos[:8]]
    pil = [Image.open(p).convert("RGB") for p in photos[:8]]
    pixels, aspect = torch.stack([x for x, _ in images]), torch.tensor([a for _, a in images])
    cfg = clever.Config(**options, precision="fp32")
    naive, transforms = Published(clever.Training(cfg, 1)), published_views(cfg)
    theirs = seconds(lambda i: naive.step([torch.stack([t(x) for x in pil]) for t in transforms], 1 + i), 2)
    del naive
    for precision in ("fp32", "bf16"):
        t, crop = clever.Training(clever.Config(**options, precision=precision), 1), clever.MultiCrop(cfg)
        ours = seconds(lambda i: clever.train_step(t, crop(pixels, aspect, i), 1 + i), 2)
        print(f"\nstep, {aug}: published fp32 {theirs:.2f} s, "
              f"ours {precision} {ours:.2f} s: {theirs / ours:.2f} x")


def loss_peak(losses, path):
    """Bytes that the losses of a step of 10 views, batch 128, K = 65,536 add to a process, into a file."""
    logits = [(torch.rand(10, 128, 65536, requires_grad=True), torch.rand(2, 128, 65536)) for _ in losses]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sum(loss(*x, torch.zeros(65536), 0.1, 0.04) for loss, x in zip(losses, logits)).backward()
    path.write_text(str((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024))


@pytest.mark.benchmark
def test_benchmark_memory_of_the_losses(tmp_path):
    """12. Both losses, forward and backward, in a process each; the gradient of the logits included."""
    for name, losses in (("naive", list(NAIVE.values())), ("ours", list(NAIVE))):
        p = CHILDREN.Process(target=loss_peak, args=(losses, tmp_path / name))
        p.start()
        p.join()
    naive, ours = (float((tmp_path / name).read_text()) / 2 ** 30 for name in ("naive", "ours"))
    print(f"\nlosses: naive {naive:.2f} GiB, ours {ours:.2f} GiB: {naive / ours:.2f} x")


@pytest.mark.benchmark
@pytest.mark.parametrize("aug", ["baug", "caug", "caug+"])
def test_benchmark_loader(photos, aug):
    """12. Decode and squash, beside decode and ten PIL views: images/s of one core."""
    transforms, load = published_views(clever.Config(aug=aug)), lambda p: Image.open(p).convert("RGB")
    theirs = seconds(lambda i: [[t(x) for t in transforms] for x in map(load, photos[:10])]) / 10
    ours = seconds(lambda i: [clever.decode(p, 320) for p in photos]) / len(photos)
    print(f"\nloader, {aug}: published {1 / theirs:.1f} images/s, ours {1 / ours:.1f}: {theirs / ours:.1f} x")
