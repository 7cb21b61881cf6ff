"""A loss that makes EF know the orientation: it predicts quarter turns (E-SSL, arXiv 2111.00899).

    python clever.py --training extras.quarter:Quarter --ef-out-dim 4 --aug baug [options]

The local views are turned by k = 0, 1, 2 or 3 quarter turns, which are exact and leave no black
corners. IR has to ignore the turn, because L_CL compares local views with the teacher's upright
global views; EF has to know it, because h_EF, with K' = 4 outputs, predicts k:

    L_Quarter = mean of CE(h_EF(z_EF) / 0.1, k)     over the local views
    L         = L_CL + 0.4 L_Quarter

A step costs hardly more than DINO's. The control is extras.quarter:Shuffled, whose labels are
unrelated to the turns. results.md has the measurements.
"""

import torch
import torch.nn.functional as F

import clever

WEIGHT = 0.4  # of L_Quarter


class TurnedViews(clever.MultiCrop):
    """The local views of image i of the batch are turned by i % 4 quarter turns."""

    def forward(self, images, aspect, step):
        views = super().forward(images, aspect, step)
        first = clever.distributed()[0] * len(images)  # number of this process's first image
        for view in views[2:]:  # (B, 3, size, size)
            for k in range(4):
                start = (k - first) % 4
                view[start::4] = view[start::4].rot90(k, (2, 3))
        return views


class Quarter(clever.Training):
    def __init__(self, cfg, steps_per_epoch, device="cpu"):
        super().__init__(cfg, steps_per_epoch, device)
        self.augment = TurnedViews(cfg)
        self.watched = {"IR"}  # the global views are oriented alike, so their EF may agree
        if cfg.aug != "baug":
            raise clever.UserError("quarter turns need upright views; use --aug baug")

    def loss(self, student, teacher):
        ir, ef = student.logits  # (V, B, K), (V, B, 4)
        temp = self.cfg.teacher_temp
        L_CL = clever.invariance_loss(ir, teacher.logits[0], self.centres[0], teacher_temp=temp)

        ef = ef[2:]  # of the local views
        B = ef.shape[1]
        i = clever.distributed()[0] * B + torch.arange(B, device=ef.device)
        k = self.label(i).expand(ef.shape[:2])  # (V - 2, B)
        L_Quarter = F.cross_entropy(ef.flatten(0, 1) / clever.STUDENT_TEMP, k.flatten())
        hit = (ef.argmax(-1) == k).float().mean()  # 0.25 by chance
        return dict(L_CL=L_CL, L_Quarter=L_Quarter, hit=hit, loss=L_CL + WEIGHT * L_Quarter)

    def label(self, i):
        """The quarter turns of image number i of the batch."""
        return i % 4


class Shuffled(Quarter):
    def label(self, i):
        return i // 4 % 4  # each label is as frequent for one turn as for another
