"""A loss that makes EF know the orientation: it predicts quarter turns (E-SSL, arXiv 2111.00899).

    python clever.py --training extras.quarter:Quarter --ef-out-dim 4 --aug baug [options]

One more global view of each image, upright, is turned by k = 0, 1, 2 or 3 quarter turns, which are
exact and leave no black corners. Only the student sees it, and h_EF, with K' = 4 outputs, names k:

    L = L_CL of the other views + 0.4 CE(h_EF(z_EF) / 0.1, k)

Two controls: extras.quarter:Shuffled has labels that are unrelated to the turns, and
extras.quarter:ExtraView, with --method dino, has as many views and only DINO's loss.
"""

import dataclasses
import random

import torch
import torch.nn.functional as F

import clever

WEIGHT = 0.4  # of L_Quarter


class MoreViews(clever.MultiCrop):
    """The views and one more global view; with `turned`, that of image i by i % 4 quarter turns."""

    def __init__(self, cfg, turned):
        super().__init__(cfg)
        self.turned = turned
        self.upright = clever.MultiCrop(dataclasses.replace(cfg, aug="baug"))

    @torch.no_grad()
    def forward(self, images, aspect, step):
        views = super().forward(images, aspect, step)
        gen = clever.generator(images.device, self.cfg.seed, "quarter", step)
        orders = random.Random(clever.seed_of(self.cfg.seed, "quarter", step))  # of the colours
        extra = self.upright.make_view(images.float() / 255, aspect, step, 1, gen, orders)
        if self.turned:
            for k in range(4):
                extra[k::4] = extra[k::4].rot90(k, (2, 3))
        return [*views, extra]


class Quarter(clever.Training):
    def __init__(self, cfg, steps_per_epoch, device="cpu"):
        super().__init__(cfg, steps_per_epoch, device)
        self.augment = MoreViews(cfg, turned=True)
        self.watched = {"IR"}  # under baug all views are oriented alike: EF may ignore the view

    def loss(self, student, teacher):
        ir, ef = student.logits  # (V + 1, B, K), (V + 1, B, 4)
        temp = self.cfg.teacher_temp
        L_CL = clever.invariance_loss(
            ir[:-1], teacher.logits[0], self.centres[0], teacher_temp=temp
        )
        k = self.label(torch.arange(ef.shape[1], device=ef.device))  # (B,)
        L_Quarter = F.cross_entropy(ef[-1] / clever.STUDENT_TEMP, k)
        hit = (ef[-1].argmax(1) == k).float().mean()  # 0.25 by chance
        return dict(L_CL=L_CL, L_Quarter=L_Quarter, hit=hit, loss=L_CL + WEIGHT * L_Quarter)

    def label(self, i):
        """The quarter turns of the images number i of the batch."""
        return i % 4


class Shuffled(Quarter):
    def label(self, i):
        return i // 4 % 4  # each label is as frequent for one turn as for another


class ExtraView(clever.Training):
    def __init__(self, cfg, steps_per_epoch, device="cpu"):
        super().__init__(cfg, steps_per_epoch, device)
        self.augment = MoreViews(cfg, turned=False)
