"""Make a data set of coloured shapes, as a folder of PNG pictures for --dataset folder.

    python tests/shapes.py out/shapes        # 9 sub-folders of 200 pictures of 32x32, a few seconds

Each picture is a circle, a square or a triangle, in red, green or blue. The set is made up on
purpose: nothing can be downloaded where this project was measured, and everybody sees at once
whether a generated picture is right.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    # The imports take seconds. Until common.run listens, Ctrl-C ends the program without a word.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

# Python looks for modules beside this file; common.py is one folder higher.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

SHAPES = ("circle", "square", "triangle")
COLORS = {"red": (220, 60, 50), "green": (60, 190, 80), "blue": (60, 100, 230)}


def arguments(argv):
    """Read the command line."""
    p = common.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "folder",
        nargs="?",
        default="out/shapes",
        help="where to write the sub-folders (default: out/shapes)",
    )
    p.add_argument(
        "--n",
        type=common.number(int, 1, 10**6),
        default=200,
        help="pictures in each sub-folder (default: 200)",
    )
    p.add_argument(
        "--seed",
        type=common.number(int, 0, common.MAX_SEED),
        default=0,
        help="another seed draws other pictures",
    )
    return p.parse_args(argv)


def draw(shape, color, generator, size=32):
    """Draw one picture with a random place, size, shade and background.

    shape      one of SHAPES
    color      one of the names in COLORS
    generator  NumPy's random generator
    size       pixels a side

    Returns a PIL image. It is drawn at four times the size and then shrunk, which makes the edges
    smooth: PIL itself draws without anti-aliasing.
    """
    big = 4 * size

    # The order of the draws is part of the data set: another order gives other pictures.
    background = tuple(generator.integers(15, 70, 3).tolist())
    radius = big * generator.uniform(0.2, 0.32)
    x, y = big * generator.uniform(0.38, 0.62, 2)
    shade = np.array(COLORS[color]) + generator.normal(0, 14, 3)
    fill = tuple(int(value) for value in np.clip(shade, 0, 255))

    image = Image.new("RGB", (big, big), background)
    pen = ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=fill)
    elif shape == "square":
        half = 0.85 * radius  # with `radius` the square would be a quarter larger than the circle
        pen.rectangle([x - half, y - half, x + half, y + half], fill=fill)
    else:
        top = (x, y - radius)
        left = (x - 0.95 * radius, y + 0.75 * radius)
        right = (x + 0.95 * radius, y + 0.75 * radius)
        pen.polygon([top, left, right], fill=fill)
    return image.resize((size, size), Image.LANCZOS)


def write(root, n=200, seed=0):
    """Write n pictures of each of the 9 kinds into root/<color>_<shape>/."""
    generator = np.random.default_rng(seed)
    for color in COLORS:
        for shape in SHAPES:
            folder = Path(root) / f"{color}_{shape}"
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(n):
                draw(shape, color, generator).save(folder / f"{i:04d}.png")


def main(argv):
    """Write the folders that the command line asks for."""
    args = arguments(argv)
    if any(common.make_folder(args.folder, "FOLDER").iterdir()):
        common.exit_with_error(
            f"{args.folder} is not empty, and the pictures would replace or join what is there; "
            "remove it, or name another folder: python tests/shapes.py FOLDER"
        )
    write(args.folder, args.n, args.seed)


if __name__ == "__main__":
    common.run(main)
