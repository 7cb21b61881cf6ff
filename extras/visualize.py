"""Does EF turn with an image while IR stays? A picture of what a ViT makes of an image that turns.

    python extras/visualize.py RUN IMAGE      writes visualize.png into the run

The columns are turns of the image by 0, 30, 60 and 90 degrees. The rows are the image, the first
three principal components of its patch tokens as colours, of all dimensions, of IR and of EF, and
the attention of the CLS token to the patches, for each head of the last block.

Shapes: T turns, n = h * w patches, D features.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import ImageDraw
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import clever  # noqa: E402
import eval_linear  # noqa: E402

TURNS = (0.0, 30.0, 60.0, 90.0)  # degrees
TILE = 128  # pixels
MARGIN = 16  # around a tile, with its name


def components(tokens):
    """Three principal components, the same for all turns, from 0 to 1: (T, n, D) -> (T, 3, n)."""
    x = tokens.flatten(0, 1)  # (T * n, D)
    u, s, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    x = F.pad(u * s, (0, 2))[:, :3]  # a part may have fewer than three dimensions
    x = (x - x.amin(0)) / (x.amax(0) - x.amin(0) + 1e-9)
    return x.unflatten(0, tokens.shape[:2]).mT


def last_attention(backbone, x):
    """How much the CLS token attends to each patch: images (T, 3, H, W) -> (T, heads, n)."""
    x = backbone.blocks[:-1](backbone.tokens(x))  # (T, 1 + n, D), before the last block
    block = backbone.blocks[-1]
    qkv = block.attn.qkv(block.norm1(x)).unflatten(2, (3, block.attn.heads, -1))
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)  # each (T, heads, 1 + n, D / heads)
    attention = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    return attention[:, :, 0, 1:]


@torch.no_grad()
def draw(backbone, cfg, path, device):
    """A picture of an image file, its components and the attention, at all turns."""
    size = cfg.global_size
    pixels, aspect = clever.decode(path, clever.stored_side(size))
    pixels = pixels.to(device).expand(len(TURNS), -1, -1, -1)
    angle = torch.tensor(TURNS, device=device)
    aspect = torch.full_like(angle, aspect)
    images = clever.centre_view(pixels, aspect, size, torch.zeros_like(angle).bool(), angle)
    x = clever.normalize(images)

    tokens = backbone.get_intermediate_layers(x)[0][:, 1:]  # (T, n, D)
    ir, ef = clever.split(tokens, cfg.ratio)
    parts = dict(all=tokens, IR=ir, EF=ef) if ef.shape[-1] else dict(all=tokens)
    maps = {name: components(part) for name, part in parts.items()}  # (T, 1 or 3, n)
    for head, weight in enumerate(last_attention(backbone, x).split(1, 1), 1):
        maps[f"head {head}"] = weight / weight.max()

    side = size // backbone.patch_size
    rows = {"image": images}
    rows |= {name: row.unflatten(2, (side, side)) for name, row in maps.items()}
    tiles = [F.interpolate(row, (TILE, TILE)).expand(-1, 3, -1, -1) for row in rows.values()]
    sheet = to_pil_image(make_grid(torch.cat(tiles), nrow=len(TURNS), padding=MARGIN))
    pen = ImageDraw.Draw(sheet)
    for row, name in enumerate(rows):
        for column, degrees in enumerate(TURNS):
            corner = (MARGIN + column * (TILE + MARGIN), 2 + row * (TILE + MARGIN))
            pen.text(corner, f"{name}, {degrees:.0f} degrees", "white")
    return sheet


def main(argv=None):
    parser = argparse.ArgumentParser("visualize.py", parents=[eval_linear.model_options()])
    parser.add_argument("image", help="an image file")
    args = parser.parse_args(argv)
    device = clever.setup()
    cfg, _, backbone = eval_linear.open_model(args)
    if cfg.arch not in clever.VIT:
        raise clever.UserError(f"this needs the patch tokens of a ViT, not {cfg.arch}")

    sheet = draw(backbone.to(device).eval(), cfg, args.image, device)
    path = eval_linear.open_folder(args) / "visualize.png"
    sheet.save(path)
    clever.report(f"written to {path}")


if __name__ == "__main__":
    try:
        main()
    except clever.UserError as error:
        sys.exit(f"visualize.py: {error}")
