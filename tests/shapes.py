"""A made-up colour data set: circles, squares and triangles in red, green and blue, as a folder of PNGs for --dataset folder.

    python tests/shapes.py out/shapes        # 9 sub-folders of 200 pictures of 32x32, a few seconds

Synthetic on purpose: nothing can be downloaded where this was measured, and what is right is plain to see.
"""
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SHAPES, COLORS = ("circle", "square", "triangle"), dict(red=(220, 60, 50), green=(60, 190, 80), blue=(60, 100, 230))


def draw(shape, color, rng, size=32):
    """One picture, drawn at four times the size and shrunk; place, size, shade and ground are random -> PIL."""
    big = 4 * size
    ground = tuple(int(v) for v in rng.integers(15, 70, 3))
    image = Image.new("RGB", (big, big), ground)
    r, (x, y) = big * rng.uniform(0.2, 0.32), big * rng.uniform(0.38, 0.62, 2)
    fill = tuple(int(np.clip(v + rng.normal(0, 14), 0, 255)) for v in COLORS[color])
    pen = ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse([x - r, y - r, x + r, y + r], fill=fill)
    elif shape == "square":
        pen.rectangle([x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r], fill=fill)
    else:
        pen.polygon([(x, y - r), (x - 0.95 * r, y + 0.75 * r), (x + 0.95 * r, y + 0.75 * r)], fill=fill)
    return image.resize((size, size), Image.LANCZOS)


def write(root, n=200, seed=0):
    """n pictures of each of the 9 kinds into root/<color>_<shape>/."""
    rng = np.random.default_rng(seed)
    for color in COLORS:
        for shape in SHAPES:
            folder = Path(root) / f"{color}_{shape}"
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(n):
                draw(shape, color, rng).save(folder / f"{i:04d}.png")


if __name__ == "__main__":
    write(sys.argv[1] if len(sys.argv) > 1 else "out/shapes")
