"""Segment the validation videos of DAVIS-2017 by label propagation (DINO, arXiv 2104.14294).

    python extras/davis.py RUN DAVIS                                      of a run of clever.py
    python extras/davis.py --weights dino.pth --arch vit_small DAVIS      of other weights

The masks of the first frame are carried through a video: each patch takes the mask of the patches
with the most similar tokens, of a ViT, in the frames before. Prints J, the mean overlap of a mask
with the truth, over all objects, and adds it to eval.json.

Shapes: T frames of H x W pixels or h x w patches, D features, K objects and the background.
"""

import argparse
import math
import shlex
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import clever  # noqa: E402
import eval_linear  # noqa: E402

VOID = 255  # the label of pixels that belong neither to an object nor to the background


def propagate(features, first, last=7, k=5, radius=12, temperature=0.1):
    """Carry masks through a video: features (T, h, w, D), first (K, h, w) -> masks (T, K, h, w).

    Each patch averages the masks of its k most similar patches, at most `radius` away, in the first
    frame and the `last` frames before it.
    """
    T, h, w, _ = features.shape
    f = F.normalize(features.flatten(1, 2), dim=-1)  # (T, h * w, D)
    place = torch.cartesian_prod(torch.arange(h), torch.arange(w)).to(f.device)  # (h * w, 2)
    far = ((place[:, None] - place).abs() > radius).any(-1)  # (h * w, h * w)

    masks = [first.flatten(1).to(f)]  # (K, h * w) of each frame
    for t in range(1, T):
        context = [0, *range(max(1, t - last), t)]  # c frames
        affinity = f[t] @ f[context].flatten(0, 1).T / temperature  # (h * w, c * h * w)
        affinity = affinity.masked_fill(far.repeat(1, len(context)), -math.inf)
        weight, index = affinity.topk(min(k, affinity.shape[1]), 1)  # each (h * w, k)
        source = torch.cat([masks[c] for c in context], 1)  # (K, c * h * w)
        masks.append((source[:, index] * weight.softmax(1)).sum(-1))
    return torch.stack(masks).unflatten(-1, (h, w))


def jaccard(features, truth):
    """The mean J of each object of a video, carried from its first frame: a list.

    features (T, h, w, D)
    truth (T, H, W): the object of each pixel, 0 for the background; void pixels do not count
    """
    ids = truth[0].unique()
    ids = ids[ids != VOID]
    first = (truth[0] == ids[:, None, None]).float()[None]  # (1, K, H, W)
    masks = propagate(features, F.interpolate(first, size=features.shape[1:3], mode="area")[0])
    masks = F.interpolate(masks.cpu(), size=truth.shape[1:], mode="bilinear")  # (T, K, H, W)
    masks -= masks.amin((2, 3), keepdim=True)
    masks /= masks.amax((2, 3), keepdim=True).clamp(min=1e-6)  # from 0 to 1, as in DINO
    predicted = ids[masks.argmax(1)]  # (T, H, W)

    J = []
    for label in ids[ids > 0]:
        ours = (predicted == label) & (truth != VOID)  # (T, H, W)
        theirs = truth == label
        overlap = (ours & theirs).sum((1, 2))  # (T,)
        union = (ours | theirs).sum((1, 2))
        scores = torch.where(union > 0, overlap / union, 1.0)
        J.append(float(scores[1:-1].mean()))  # the benchmark leaves out the first and last frame
    return J


@torch.no_grad()
def read_video(backbone, root, video, device):
    """The patch tokens (T, h, w, D) and the true masks (T, H, W) of a video."""
    patch = backbone.patch_size
    features, truth = [], []
    for path in sorted((root / "JPEGImages/480p" / video).glob("*.jpg")):
        pixels = pil_to_tensor(Image.open(path).convert("RGB"))[None]  # (1, 3, H, W)
        h, w = (side // patch for side in pixels.shape[2:])
        x = F.interpolate(pixels, (h * patch, w * patch), mode="bicubic", antialias=True)
        tokens = backbone.get_intermediate_layers(clever.normalize(x.to(device) / 255))[0]
        features.append(tokens[0, 1:].unflatten(0, (h, w)))

        mask = Image.open(root / "Annotations/480p" / video / f"{path.stem}.png")
        truth.append(pil_to_tensor(mask))  # (1, H, W)
    return torch.stack(features), torch.cat(truth)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser("davis.py", parents=[eval_linear.model_options()])
    parser.add_argument("davis", type=Path, help="folder of DAVIS-2017 at 480p")
    args = parser.parse_args(argv)
    videos = args.davis / "ImageSets/2017/val.txt"
    if not videos.exists():
        raise clever.UserError(f"{videos} not found: expected a folder of DAVIS-2017")
    device = clever.setup()
    cfg, _, backbone = eval_linear.open_model(args)
    if cfg.arch not in clever.VIT:
        raise clever.UserError(f"this needs the patch tokens of a ViT, not {cfg.arch}")
    backbone.to(device).eval()
    out = eval_linear.open_folder(args)

    scores = {}
    for video in tqdm(videos.read_text().split(), "davis", leave=False, disable=None):
        features, truth = read_video(backbone, args.davis, video, device)
        if len(truth) < 3:
            clever.report(f"{video} is left out: J needs at least 3 frames, it has {len(truth)}")
            continue
        scores[video] = jaccard(features, truth)
    objects = [J for video in scores.values() for J in video]
    if not objects:
        raise clever.UserError(f"no objects in the videos of {args.davis}")

    mean = statistics.mean(objects)
    clever.report(f"DAVIS-2017: J mean {mean:.3f} of {len(objects)} objects")
    results = {"J mean": mean, "videos": scores}
    eval_linear.save_section(out / "eval.json", shlex.join(["davis.py", *argv]), results)


if __name__ == "__main__":
    try:
        main()
    except clever.UserError as error:
        sys.exit(f"davis.py: {error}")
