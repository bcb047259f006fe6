"""Everything the numbered scripts share: score-based generative models, and how to make one forget.

The method is MSGM, "Moderating the Generalization of Score-based Generative Models" (ICCV 2025, arXiv 2412.07229).  Losses, samplers,
likelihood and measures take plain tensors, an SDE and a network, so each can be lifted into another project with the few names it calls.

Contents
    1  Small helpers          die, bcast, flat_mean, rng, ranks, spread
    2  Data                   RECIPES, load_dataset, draw_batch, dequantize, split_forget
    3  SDEs                   VE, VP, SubVP, DDPM                x_t = s(t) x0 + std(t) z
    4  The circle             predict, score_fn                  one network for every SDE
    5  Networks               UNet, count; ExactNet, GaussianMixture (formulae, no training)
    6  Noise levels           uniform_t, lognormal_t
    7  Losses                 dsm_loss, distill_loss; ort, obt, obt_rel; ascent, erasediff, siss
    8  Training helpers       EMA, Muon, set_lr, batch_parts, guarded_step, autocast
    9  Samplers               pc_sample, heun_solve, ode_sample, dpmpp_sample, sample_images
   10  Likelihood             ode_log_likelihood, bits_per_dim
   11  Judge and measures     Judge, judge_images, frechet_distance, wilson, measure
   12  Checkpoints, folders   save_checkpoint, load_checkpoint, find_base, load_judge, fresh_folder
   13  Pictures               tile, short
   14  Command line           parser, finish_args, run

Shapes: B images a batch, D numbers an image (C*H*W, or 2 for the toy).  x0, x_t, z, y have one shape, (B, ...);
t, sigma, phi are (B,).  README has the table symbol - variable - shape - equation.
"""
import argparse
import atexit
import contextlib
import copy
import gzip
import json
import math
import os
import runpy
import shutil
import sys
import time
import zlib
from collections import namedtuple
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

HERE = Path(__file__).resolve().parent

# ==== 1  Small helpers ================================================================================
def die(message):
    """Bad input: one clear line on stderr, exit status 2, no traceback."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)

def bcast(v, like):
    """(B,) -> (B, 1, ..., 1), so that one number per image multiplies points and pictures alike."""
    return v.reshape(-1, *[1] * (like.ndim - 1))

def flat_mean(x):
    """Mean over everything but the batch: (B, ...) -> (B,)."""
    return x.flatten(1).mean(1)

def rng(*keys):
    """A CPU generator seeded by whole numbers, e.g. rng(seed, chunk); (0, 1) and (1, 0) are unrelated streams.
    CPU on purpose: CUDA's generator draws other numbers, and one seed should give one set of pictures everywhere."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0] >> 1))

def randn(shape, generator, device="cpu"):
    """Gaussian noise drawn on the CPU and moved, see rng."""
    return torch.randn(shape, generator=generator).to(device)

def ranks():
    """(which process of torchrun this is, how many there are); (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)

def spread(work, items):
    """[work(i) for i in items], shared out among the processes of torchrun; each of them gets all the results."""
    rank, world = ranks()
    parts, mine = [None] * world, [work(i) for i in items[rank::world]]
    if world == 1:
        return mine
    dist.all_gather_object(parts, mine)
    return [parts[i % world][i // world] for i in range(len(items))]

# ==== 2  Data =========================================================================================
# One tensor of bytes in memory and index batches: MNIST is 47 MB, so a DataLoader with workers is pure overhead.
Dataset = namedtuple("Dataset", "images labels classes")  # (N, C, H, W) uint8, (N,) int64, list of str

# One visible row per data set: pixels a side, sd of a pixel on [-1, 1], network, what 02 trains and 03 unlearns with unless a flag says otherwise,
# file to fetch by hand.  Measured by us: mnist.  The others are where to start: the paper's network for CIFAR (width 128 (1,2,2,2), attention at 16,
# dropout 0.1), narrower to fit 12 GB (an estimate), at 64x64 behind patch=2; batch and average as is usual for these sets; steps are a guess.
_DIGITS = dict(channels=1, width=48, mult=(1, 2), attn=(False, True), patch=2, dropout=0.0)
_PHOTOS = dict(channels=3, width=96, mult=(1, 2, 2, 2), attn=(False, True, False, False), patch=1, dropout=0.1)
_SHORT = dict(train=dict(steps=30000, batch_size=64, lr=8e-3, ema=0.9995), unlearn=dict(steps=260, batch_size=64))
_LONG = dict(train=dict(steps=200000, batch_size=128, lr=2e-3, ema=0.9999), unlearn=dict(steps=500, batch_size=64))
RECIPES = {
    "mnist": dict(size=28, sd=0.6162, flip=False, net=_DIGITS, **_SHORT),
    "fashion_mnist": dict(size=28, sd=0.706, flip=True, net=_DIGITS, **_SHORT,
        file="the four *-ubyte.gz files (31 MB; train images md5 8d4fb7e6c68d591d4c3dfef9ec88bf0d) of github.com/zalandoresearch/fashion-mnist"),
    "cifar10": dict(size=32, sd=0.5, flip=True, net=_PHOTOS, **_LONG,
        file="cifar-10-python.tar.gz (170 MB, md5 c58f30108f718f92721af3b95e74349a) of www.cs.toronto.edu/~kriz"),
    "stl10": dict(size=64, sd=0.5, flip=True, net=_PHOTOS | dict(patch=2), **_LONG,
        file="stl10_binary.tar.gz (2,640 MB, md5 91f7769df0f17e558f3565bffb0c7dfb) of ai.stanford.edu/~acoates/stl10"),
    "celeba": dict(size=64, sd=0.5, flip=True, net=_PHOTOS | dict(patch=2), **_LONG,
        file="img_align_celeba.zip (1,443 MB, md5 00d2c5bc6d35e252742224ab0c1e8fcb), unpacked, and its five .txt, into celeba/ (or: pip install gdown)"),
    "imagenette": dict(size=64, sd=0.5, flip=True, net=_PHOTOS | dict(patch=2), **_LONG,
        file="imagenette2-160.tgz (99 MB, md5 e793b78cc4c9e9a4ccc0c1155377a412) of s3.amazonaws.com/fast-ai-imageclas"),
    # anyone's own pictures: 64x64 if the first has at least 64 pixels a side, else 32x32; no mirror images, they may hold letters
    "folder": dict(size=None, sd=0.5, flip=False, net=_DIGITS | dict(channels=3), **_SHORT),
}

def recipe(name):
    """The row of RECIPES, or one line that says which there are."""
    return RECIPES[name] if name in RECIPES else die(f"unknown data set '{name}'; choose from: {', '.join(RECIPES)}")

def load_dataset(name, data_dir=None, train=True, forget=None):
    """Read a data set -> Dataset(images uint8 (N,C,H,W), labels int64 (N,), classes).

    mnist is data/mnist.npz of this repository (Keras layout), or the file of that name in data_dir; fashion_mnist its four idx files if they
    lie in data_dir, plain or .gz.  All else comes through torchvision, which downloads into data_dir what is not there.
    celeba has 40 yes/no attributes and no classes: those in `forget` ("bangs", "not_smiling") become classes, the rest is "other".
    Exits with one line for an unknown name and for a file that is missing or damaged."""
    if recipe(name) and name == "folder" and not data_dir:
        die("--dataset folder needs --data-dir PATH, a folder with one sub-folder of pictures per class")
    root, part = Path(data_dir or HERE / "data"), "train" if train else "test"
    try:
        if name == "mnist":
            with np.load(root / "mnist.npz") as f:
                images, labels, classes = f[f"x_{part}"][:, None], f[f"y_{part}"], [str(i) for i in range(10)]
        elif name == "fashion_mnist" and list(root.glob("*-idx[13]-ubyte*")):
            images, labels = (_read_idx(root, f"{'train' if train else 't10k'}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
            images, classes = images[:, None], "t-shirt-top trouser pullover dress coat sandal shirt sneaker bag ankle_boot".split()
        else:
            images, labels, classes = _read_pictures(name, root, train)
    except FileNotFoundError as e:
        die(f"{e.filename or e} not found; " + ("restore it with: git checkout data/mnist.npz (or drop --data-dir)" if name == "mnist" else "check --data-dir"))
    except PermissionError as e:
        die(f"{root} cannot be written to ({e}): pictures are decoded once, beside the data; name another folder with --data-dir")
    except Exception as e:  # what is broken raises half a dozen different types
        mend = "git checkout data/mnist.npz" if name == "mnist" else f"fetch them again, or delete {root}/{name}-*.np? if these are broken"
        die(f"{root}: the files of {name} cannot be read ({e}); mend them: {mend}")
    if name == "celeba":
        labels, classes = _attribute_classes(labels, classes, forget or [])
    return Dataset(torch.from_numpy(images), torch.from_numpy(labels).long(), classes)

def _read_idx(root, name):
    """An idx file (LeCun's format: two zeros, type, rank, sizes as big-endian 32 bit, data), plain or .gz -> array of bytes."""
    path = root / name if (root / name).exists() else root / f"{name}.gz"
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(np.frombuffer(raw, ">i4", raw[3], 4)).copy()

def _open_torchvision(name, root, train, **more):
    """The torchvision data set of that name; raises what torchvision raises when its files are not in root."""
    from torchvision import datasets as tv
    part = "train" if train else "test"
    kind, *which = dict(fashion_mnist=("FashionMNIST", train), cifar10=("CIFAR10", train), stl10=("STL10", part), celeba=("CelebA", part),
                        imagenette=("Imagenette", "train" if train else "val", "160px"), folder=("ImageFolder",))[name]
    return getattr(tv, kind)(root, *which, **more)

def _read_pictures(name, root, train):
    """-> images (N,C,H,W), labels (N,) or (N, 40), names of the classes.  Decoded once, into <name>-<part>*.npy beside the data.
    Pictures go one at a time into a file that is mapped into memory: at no time are there two copies, and never a list of arrays."""
    part = "all" if name == "folder" else "train" if train else "test"
    files = [f"{p}{p.stat().st_size}{p.stat().st_mtime_ns}" for p in sorted(root.glob("*/*"))] if name == "folder" else []
    cache = root / f"{name}-{part}{zlib.crc32(''.join(files).encode()) if files else ''}.npy"  # one's own pictures may change
    if not cache.exists() and ranks()[0] == 0:
        try:
            source = _open_torchvision(name, root, train)
        except RuntimeError:  # not there, or not whole
            print(f"{name} is not in {root}: downloading it", flush=True)
            try:
                source = _open_torchvision(name, make_folder(root), train, download=True)
            except Exception as e:
                die(f"no download of {name} ({str(e).splitlines()[0]}); fetch by hand {RECIPES[name]['file']}, into {root}, and run this again")
        _decode(source, cache, RECIPES[name]["size"], crop=140 if name == "celeba" else None)
    spread(None, [])  # all wait here: the first has written what the others read
    with np.load(cache.with_suffix(".npz")) as f:
        labels, classes = f["labels"], [str(k) for k in f["classes"]]
    images = np.load(cache, mmap_mode="c")  # private: nothing that is written to the tensor reaches the file
    if name == "folder":  # it has no test set: every tenth picture is put aside for it
        mine = (np.arange(len(images)) % 10 == 9) != train
        images, labels = images[mine], labels[mine]
    return images, labels, classes

def _decode(source, cache, size, crop):
    """Every picture of a torchvision data set, cropped and resized to size x size, into the file `cache`, its labels into .npz beside."""
    from torchvision import transforms as T
    tmp, n = cache.with_name(f"{cache.stem}.tmp{os.getpid()}.npy"), len(source)
    size = size or (64 if min(source[0][0].size) >= 64 else 32)
    shape = T.Compose(([T.CenterCrop(crop)] if crop else []) + [T.Resize(size), T.CenterCrop(size), T.PILToTensor()])
    for i in range(n):
        picture, label = source[i]
        x, label = shape(picture).numpy(), np.asarray(label)
        if i == 0:
            images, labels = np.lib.format.open_memmap(tmp, "w+", np.uint8, (n, *x.shape)), np.empty((n, *label.shape), np.int16)
        images[i], labels[i] = x, label
        if i % 10000 == 9999:
            print(f"\rdecoding: {i + 1:,}/{n:,}", end="\n" if i + 10000 >= n else "", flush=True)
    names = [k if isinstance(k, str) else k[0] for k in getattr(source, "classes", None) or source.attr_names if k]
    names = [k if hasattr(source, "samples") else k.lower().replace(" ", "_").replace("/", "-") for k in names]  # a folder's name stays
    np.savez(cache.with_suffix(".npz"), labels=labels, classes=np.array(names))  # before the other, whose being there says that both are
    os.replace(tmp, cache)

def _attribute_classes(table, names, wanted):
    """CelebA's attributes (N, 40), their names, and those of interest -> labels (N,), classes ["other", *wanted]; the first that holds counts."""
    labels = np.zeros(len(table), np.int64)
    for i, want in reversed(list(enumerate(wanted))):
        if want.removeprefix("not_") not in names:
            die(f"--forget: no attribute '{want}'; choose from: {', '.join(names)}; or not_ before one of them")
        labels[(table[:, names.index(want.removeprefix("not_"))] == 1) != want.startswith("not_")] = i + 1
    return labels, ["other", *wanted]

def draw_batch(images, index, n, flip=False, device="cpu"):
    """n of the bytes images[index] at random, dequantised; with flip a random half of them as mirror images -> (n, C, H, W) on device."""
    x = dequantize(images[index[torch.randint(len(index), (n,), device=index.device)]].to(device))
    return torch.where(bcast(torch.rand(n, device=device) < 0.5, x), x.flip(-1), x) if flip else x

def dequantize(images):
    """uint8 k -> float (k + u)/128 - 1 in [-1, 1), u ~ U(0,1) fresh at every call.

    Bytes have no density: a spike on each grey level would reach any likelihood.  Uniform noise one level wide makes the density finite, and
    E[ln p(k+u)] bounds the byte's own probability from below (Theis et al. 2016).  Training has to see the scale on which NLL is measured."""
    return (images.float() + torch.rand(images.shape, device=images.device)) / 128 - 1

def to_bytes(x):
    """float in [-1, 1] -> uint8, the inverse of dequantize.  Floor, not round: level k owns the whole interval [k, k+1)/128 - 1."""
    return ((x + 1) * 128).floor().clamp(0, 255).to(torch.uint8)

def split_forget(data, names):
    """Names of classes -> (mask of D_f (N,) bool, their class indices).  Exits on an unknown name, or when all go."""
    unknown = [n for n in names if n not in data.classes]
    if unknown:
        die(f"--forget: no class '{unknown[0]}'; choose from: {', '.join(data.classes)}")
    ids = sorted({data.classes.index(n) for n in names})
    mask = torch.isin(data.labels, torch.tensor(ids))
    if mask.all() or not mask.any():
        die(f"--forget: {'all classes; nothing would be left to keep (leave at least one out)' if mask.all() else 'there is no image of that class'}")
    return mask, ids

# ==== 3  SDEs =========================================================================================
class SDE:
    """A forward process dx = f(x,t) dt + g(t) dw whose marginals are x_t = s(t) x0 + std(t) z, z ~ N(0, I).
    s and std say everything: with sigma = std/s,  f = (s'/s) x  and  g^2 = s^2 d(sigma^2)/dt  (Karras et al. 2022, eq. 4).
    A subclass gives s, std, beta-like rates in closed form and time_of(sigma).  t runs from 0 (data) to T = 1 (noise), shape (B,)."""
    T = 1.0
    sampler, nfe = "sde-dpm++2m", 20  # what sample_images draws with: the name that results carry, and evaluations that are enough

    def sigma(self, t):
        """Noise-to-signal ratio std/s: the clock that all SDEs share."""
        return self.std(t) / self.s(t)

    def sigma_max(self):
        """sigma(T) as a float: where sampling starts."""
        return self.sigma(torch.ones(1, dtype=torch.float64)).item()

    def t_min(self, sigma):
        """The time floor at which the noise has fallen to sigma (float), or as low as this SDE goes.
        Two floors are in use and must not be mixed: 0.01 ends sampling (less than one grey level is left),
        0.001 starts the likelihood (at 0.01 it would be more than 2 bits/dim off)."""
        return self.time_of(torch.tensor([sigma], dtype=torch.float64)).clamp(0, 1).item()

    def draw(self, u):
        """u ~ U(0, 1) -> t ~ U(t_min, 1), t_min where sigma = 0.001 or as low as the SDE goes: the paper's training times."""
        return 1 - (1 - self.t_min(0.001)) * (1 - u)

    def drift(self, x, t):
        """f(x, t) = (d ln s / dt) x."""
        return bcast(self.dlog_s(t), x) * x

    def prior(self, shape, generator, device="cpu"):
        """x_T: N(0, std(T)^2 I).  For VE the data term s x0 is dropped: an error of |x0|/50 standard deviations."""
        return randn(shape, generator, device) * self.std(torch.ones(1)).item()

class VE(SDE):
    """Variance exploding: s = 1, std = sigma_min (sigma_max/sigma_min)^t  (Song et al. 2021, App. C)."""
    def __init__(self, sigma_min=0.01, sigma_max=50.0):
        self.lo, self.log_ratio = sigma_min, math.log(sigma_max / sigma_min)

    def s(self, t): return torch.ones_like(t)
    def std(self, t): return self.lo * torch.exp(self.log_ratio * t)
    def dlog_s(self, t): return torch.zeros_like(t)

    def diffusion(self, t):
        """g(t): g^2 = d std^2/dt."""
        return self.std(t) * math.sqrt(2 * self.log_ratio)

    def time_of(self, sigma): return torch.log(sigma / self.lo) / self.log_ratio

class VP(SDE):
    """Variance preserving: beta from 0.1 to 20, s^2 + std^2 = 1  (Song et al. 2021, eq. 11).
    With B(t) = INT_0^t beta:  s = exp(-B/2),  std = sqrt(1 - exp(-B))."""
    def __init__(self, beta_min=0.1, beta_max=20.0):
        self.b0, self.db = beta_min, beta_max - beta_min

    def beta(self, t): return self.b0 + self.db * t
    def B(self, t): return self.b0 * t + 0.5 * self.db * t * t
    def s(self, t): return torch.exp(-0.5 * self.B(t))

    def std(self, t):
        # expm1, not 1 - exp: in float32 the naive form is 0.6 % off at t = 1e-5, where the likelihood lives.
        return torch.sqrt(-torch.expm1(-self.B(t)))

    def dlog_s(self, t): return -0.5 * self.beta(t)
    def diffusion(self, t): return torch.sqrt(self.beta(t))

    def time_of_B(self, B):
        # Solve db/2 t^2 + b0 t = B; this form of the root does not cancel for small B.
        return 2 * B / (self.b0 + torch.sqrt(self.b0**2 + 2 * self.db * B))

    def time_of(self, sigma): return self.time_of_B(torch.log1p(sigma * sigma))  # sigma^2 = exp(B) - 1

class SubVP(VP):
    """Sub-VP: s as in VP, std = 1 - exp(-B), so sigma = 2 sinh(B/2)  (Song et al. 2021, eq. 12)."""

    def std(self, t): return -torch.expm1(-self.B(t))
    def diffusion(self, t): return torch.sqrt(self.beta(t) * -torch.expm1(-2 * self.B(t)))
    def time_of(self, sigma): return self.time_of_B(2 * torch.asinh(sigma / 2))

class DDPM(SDE):
    """The discrete chain of Ho et al. 2020: t = k/1000, k = 1..1000, x_k = sqrt(1 - beta_k) x_{k-1} + sqrt(beta_k) n.
    beta_k runs from 1e-4 to 0.02 in a line; s = prod_i sqrt(1 - beta_i), s^2 + std^2 = 1.  VP is its limit of infinitely many
    steps.  Any t is read as the nearest k.  It has no drift and diffusion: sample it with pc_sample's "ancestral"."""
    sampler, nfe = "ancestral", 50  # it keeps all the noise that it adds, and needs more steps for that

    def __init__(self, steps=1000, beta_min=1e-4, beta_max=0.02):
        beta = torch.linspace(beta_min, beta_max, steps, dtype=torch.float64)
        self.log_s, self.steps = F.pad(0.5 * torch.log1p(-beta).cumsum(0), (1, 0)), steps  # (steps + 1,), k = 0 is the data

    def _log_s(self, t): return self.log_s.to(t.device)[(t * self.steps).round().long()].to(t.dtype)
    def s(self, t): return torch.exp(self._log_s(t))
    def std(self, t): return torch.sqrt(-torch.expm1(2 * self._log_s(t)))
    def draw(self, u): return torch.ceil(u * self.steps) / self.steps  # each of the 1000 levels alike

    def time_of(self, sigma):
        log_s = -0.5 * torch.log1p(sigma.double() ** 2)
        k = (self.log_s.to(sigma.device) - log_s[..., None]).abs().argmin(-1).clamp(min=1)
        return (k / self.steps).to(sigma.dtype)

SDES = {"ve": VE, "vp": VP, "subvp": SubVP, "ddpm": DDPM}
# The base model is trained on this wider VE clock: it covers every SDE above (VP ends at sigma = 152) and the likelihood floor.
WIDE = VE(0.001, 160.0)
TRAIN_NOISE = (-1.0, 1.4, 0.1)  # mean, std and uniform share for lognormal_t with which a network learns all its levels; see 02

# ==== 4  The circle: one network for every SDE ========================================================
# Divide x_t by s(t) and every SDE becomes x_hat = x0 + sigma z.  Scale that to unit variance, with phi = atan(sigma/sd):
#
#     y = x_hat / sqrt(sigma^2 + sd^2) = cos(phi) x0/sd + sin(phi) z          what the network sees
#     F*                               = sin(phi) x0/sd - cos(phi) z          what it is asked for: dF* = -dy/dphi
#
# (x0/sd, z) -> (y, F) is a reflected rotation, its own inverse, so one network output gives both halves:
#
#     x0_hat = sd (cos(phi) y + sin(phi) F)          z_hat = sin(phi) y - cos(phi) F
#
# This is v-prediction, and EDM's preconditioning (Karras et al. 2022, Table 1) in angles.  A network is any callable
# net(y, phi) -> F with an attribute net.sd.
def predict(net, x_hat, sigma):
    """x_hat = x0 + sigma z (B, ...), sigma (B,) -> (x0_hat, z_hat), the network's estimates of both parts."""
    sig = bcast(sigma, x_hat)
    y = x_hat / torch.sqrt(sig * sig + net.sd**2)
    phi = torch.atan(sigma / net.sd)
    out = net(y, phi)
    c, s = torch.cos(bcast(phi, y)), torch.sin(bcast(phi, y))
    return net.sd * (c * y + s * out), s * y - c * out

def score_fn(net, sde, x_t, t):
    """grad log p_t(x_t) = -z_hat/std(t), for every SDE alike (Tweedie)."""
    return -predict(net, x_t / bcast(sde.s(t), x_t), sde.sigma(t))[1] / bcast(sde.std(t), x_t)

# ==== 5  Networks =====================================================================================
class Block(nn.Module):
    """Residual block: norm-SiLU-conv twice, the noise level enters as scale and shift of the second norm (FiLM)."""
    def __init__(self, cin, cout, emb, attn, dropout):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, cin), nn.Conv2d(cin, cout, 3, padding=1)
        self.film = nn.Linear(emb, 2 * cout)
        self.norm2, self.conv2 = nn.GroupNorm(8, cout, affine=False), nn.Conv2d(cout, cout, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()
        self.attn = Attention(cout) if attn else nn.Identity()
        # Zero the last layer of each branch: the block starts as the identity, and depth costs nothing at first.
        nn.init.zeros_(self.conv2.weight), nn.init.zeros_(self.conv2.bias)

    def forward(self, x, emb):
        scale, shift = self.film(emb)[:, :, None, None].chunk(2, 1)
        h = self.norm2(self.conv1(F.silu(self.norm1(x)))) * (1 + scale) + shift
        return self.attn(self.skip(x) + self.conv2(self.dropout(F.silu(h))))

class Attention(nn.Module):
    """Self-attention over the pixels, heads of 32 channels; 49 positions at 7x7, so it costs almost nothing there."""
    def __init__(self, c):
        super().__init__()
        self.norm, self.qkv, self.out = nn.GroupNorm(8, c), nn.Conv2d(c, 3 * c, 1), nn.Conv2d(c, c, 1)
        self.heads = c // math.gcd(c, 32)
        nn.init.zeros_(self.out.weight), nn.init.zeros_(self.out.bias)

    def forward(self, x):
        """(B, C, H, W) -> same."""
        b, c, h, w = x.shape
        # (B, 3C, H, W) -> three of (B, heads, HW, 32)
        q, k, v = self.qkv(self.norm(x)).reshape(b, 3, self.heads, c // self.heads, h * w).transpose(-1, -2).unbind(1)
        a = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(a.transpose(-1, -2).reshape(b, c, h, w))

class UNet(nn.Module):
    """F(y, phi): (B, C, H, W), (B,) -> (B, C, H, W).  The whole network of this project.
    patch=2 folds 2x2 pixels into channels first (pixel_unshuffle): half the resolution at a quarter of the cost, and
    28x28 digits lose nothing by it.  Skips are added, not concatenated: a third cheaper in the way up, and it learns as well."""
    def __init__(self, channels=1, width=48, mult=(1, 2), attn=(False, True), patch=2, dropout=0.0, sd=0.5):
        super().__init__()
        self.arch = dict(channels=channels, width=width, mult=tuple(mult), attn=tuple(attn), patch=patch, dropout=dropout, sd=sd)
        self.sd, self.patch, c, emb = sd, patch, channels * patch**2, 128
        # The level ln tan(phi) = ln(sigma/sd) spans [-6.4, 5.6]; 16 frequencies resolve it from the whole range to 0.4.
        self.register_buffer("freq", torch.exp(torch.linspace(math.log(0.25), math.log(8.0), 16)), persistent=False)
        self.embed = nn.Sequential(nn.Linear(32, emb), nn.SiLU(), nn.Linear(emb, emb), nn.SiLU())
        w, n = [width * m for m in mult], len(mult)
        self.stem = nn.Conv2d(c, w[0], 3, padding=1)
        self.down = nn.ModuleList(Block(w[max(i - 1, 0)], w[i], emb, attn[i], dropout) for i in range(n))
        self.mid = Block(w[-1], w[-1], emb, True, dropout)
        self.up = nn.ModuleList(Block(w[min(i + 1, n - 1)], w[i], emb, attn[i], dropout) for i in range(n))
        self.fuse = nn.ModuleList(nn.Conv2d(w[i], w[min(i + 1, n - 1)], 1) for i in range(n))
        self.head = nn.Sequential(nn.GroupNorm(8, w[0]), nn.SiLU(), nn.Conv2d(w[0], c, 3, padding=1))
        nn.init.zeros_(self.head[-1].weight), nn.init.zeros_(self.head[-1].bias)  # F = 0: x0_hat is a shrunken input

    def forward(self, y, phi):
        """Noised image y (B, C, H, W), angle phi (B,) -> F like y."""
        angle = torch.log(torch.tan(phi))[:, None] * self.freq
        emb = self.embed(torch.cat([angle.sin(), angle.cos()], 1))
        h, skips = self.stem(F.pixel_unshuffle(y, self.patch)), []
        for i, block in enumerate(self.down):
            h = block(F.avg_pool2d(h, 2) if i else h, emb)
            skips.append(h)
        h = self.mid(h, emb)
        for i in reversed(range(len(self.up))):
            h = h if i == len(self.up) - 1 else F.interpolate(h, scale_factor=2)
            h = self.up[i](h + self.fuse[i](skips[i]), emb)
        return F.pixel_shuffle(self.head(h), self.patch)

def count(net, shape):
    """Size and cost of a network for images (C, H, W), in words."""
    device = next(net.parameters()).device
    with FlopCounterMode(display=False) as counter:
        net(torch.zeros(1, *shape, device=device), torch.ones(1, device=device))
    return f"{sum(w.numel() for w in net.parameters()) / 1e6:.2f} M parameters, {counter.get_total_flops() / 1e9:.3f} GFLOP forward an image"

class ExactNet:
    """A network known in closed form: z_hat(x_hat, sigma) = E[z | x_hat] as a function, dressed as net(y, phi) -> F."""
    def __init__(self, z_hat, sd=1.0):
        self.z_hat, self.sd = z_hat, sd

    def __call__(self, y, phi):
        sigma = self.sd * torch.tan(phi)
        x_hat = y * bcast(torch.sqrt(sigma**2 + self.sd**2), y)
        z = self.z_hat(x_hat, sigma)
        # The reflected rotation again, F from (x0, z).  Writing F = (sin y - z)/cos instead would divide by zero at high noise.
        return torch.sin(bcast(phi, y)) * (x_hat - bcast(sigma, y) * z) / self.sd - torch.cos(bcast(phi, y)) * z

class GaussianMixture(ExactNet):
    """Exact network for data from SUM_k w_k N(m_k, S_k): means (K, D), covs (K, D, D), weights (K,), normalised here.
    At noise sigma x_hat ~ SUM_k w_k N(m_k, S_k + sigma^2 I); z_hat = SUM_k r_k E_k[z | x_hat] with r_k the posterior share of k and
    E_k[z | x_hat] = sigma (S_k + sigma^2 I)^-1 (x_hat - m_k).  Takes (B, D), or images of D numbers."""
    def __init__(self, means, covs, weights, sd=1.0):
        self.means, self.covs, self.weights, self.sd = means, covs, weights / weights.sum(), sd
        # S = Q diag(val) Q': then S + sigma^2 I is as easy to invert as its diagonal, at every sigma.
        self.val, self.vec = torch.linalg.eigh(covs)  # (K, D), (K, D, D)

    def components(self, x_hat, sigma):
        """-> ln(w_k N_k(x_hat)) (B, K), E_k[z|x_hat] (B, K, D), and S_k + sigma^2 I on its own axes, val (B, K, D)."""
        val = self.val + (sigma**2)[:, None, None]
        local = torch.einsum("kde,bkd->bke", self.vec, x_hat.flatten(1)[:, None] - self.means)
        log_p = self.weights.log() - 0.5 * (local**2 / val + val.log() + math.log(2 * math.pi)).sum(-1)
        return log_p, sigma[:, None, None] * torch.einsum("kde,bke->bkd", self.vec, local / val), val

    def log_prob(self, x, sigma=None):
        """ln density of x0 + sigma z at x (B, ...) -> (B,); without sigma, of the clean data."""
        return torch.logsumexp(self.components(x, x.new_zeros(len(x)) if sigma is None else sigma)[0], 1)

    def z_hat(self, x_hat, sigma):
        """E[z | x_hat], shaped like x_hat."""
        log_p, z, _ = self.components(x_hat, sigma)
        return (log_p.softmax(1)[:, :, None] * z).sum(1).reshape(x_hat.shape)

    def zz(self, x_hat, sigma):
        """E[z z' | x_hat] (B, D, D): the spread within each component, Cov_k[z | x_hat] = S_k (S_k + sigma^2 I)^-1, plus its mean."""
        log_p, z, val = self.components(x_hat, sigma)
        spread = torch.einsum("kde,bke,kfe->bkdf", self.vec, self.val / val, self.vec)
        return (log_p.softmax(1)[:, :, None, None] * (spread + z[..., None] * z[..., None, :])).sum(1)

    def sample(self, n, generator=None):
        """n exact samples (n, D)."""
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return self.means[k] + torch.einsum("bde,be->bd", self.vec[k] * self.val[k, None].sqrt(), noise)

# ==== 6  Noise levels: which t a batch sees ===========================================================
def _stratified(n, device):
    """n numbers in (0,1), one from each n-th, in random order: the spread of the batch's loss falls at no cost (VDM, App. I)."""
    return (torch.randperm(n, device=device) + torch.rand((), device=device)) / n

def uniform_t(n, sde, device="cpu"):
    """t (n,), uniform over the SDE's times (SDE.draw): the paper's choice."""
    return sde.draw(_stratified(n, device))

def lognormal_t(n, sde, mean, std, uniform=0.0, device="cpu"):
    """t (n,) for which ln sigma ~ N(mean, std^2), except a share `uniform` of them, uniform in ln sigma over the SDE's range.
    EDM's density (Karras et al. 2022, Table 1) puts the effort where images are decided, near sigma = sd; the uniform share
    keeps both ends alive, which sampling and likelihood visit too."""
    lo, hi = math.log(max(0.001, sde.sigma(torch.full((1,), sde.t_min(0.001), dtype=torch.float64)).item())), math.log(sde.sigma_max())
    u = _stratified(n, device)
    log_sigma = mean + std * math.sqrt(2) * torch.erfinv((2 * u - 1).clamp(-0.999999, 0.999999))
    log_sigma = torch.where(torch.rand(n, device=device) < uniform, lo + (hi - lo) * u, log_sigma)
    return sde.time_of(torch.exp(log_sigma.clamp(lo, hi))).clamp(0, 1)

# ==== 7  Losses: each returns one number per image (B,), averaged over its D dimensions ===============
def noised(net, sde, x0, t):
    """Draw z, make x_t = s x0 + std z -> (x_hat = x_t/s, z, z_hat)."""
    z = torch.randn_like(x0)
    x_hat = x0 + bcast(sde.sigma(t), x0) * z
    return x_hat, z, predict(net, x_hat, sde.sigma(t))[1]

def dsm_loss(net, sde, x0, t, weight="std2"):
    """L_g, denoising score matching: |z_hat - z|^2 = std^2 |score - score*|^2  (paper's L_g; Song et al. 2021, eq. 7).
    weight "std2": as written, the paper's lambda = std^2.  "v": divided by cos(phi)^2, which makes it |F - F*|^2; all
    noise levels then weigh alike and training from scratch is far quicker."""
    _, z, z_hat = noised(net, sde, x0, t)
    loss = flat_mean((z_hat - z) ** 2)
    return loss * (1 + (sde.sigma(t) / net.sd) ** 2) if weight == "v" else loss  # 1/cos^2 = 1 + tan^2

def distill_loss(net, base, sde, x0, t):
    """L_g without its noise: |z_hat - z_hat_base|^2, `base` the frozen Standard model (ours, for fine-tuning).

    dsm_loss compares with z, whose variance is most of its gradient; here the gradient is zero at the start and stays small.  It keeps
    the score of all data instead of D_g's, so with obt_rel_loss the optimum is s_g + (kappa - 1) p(D_f|x_t) (s_g - s_f), where
    kappa = 1 is Unseen and only what is above it pushes (kappa as counted at that noise level, see there)."""
    x_hat, _, z_hat = noised(net, sde, x0, t)
    z_base = torch.no_grad()(predict)(base, x_hat, sde.sigma(t))[1]
    return flat_mean((z_hat - z_base) ** 2)

def ort_loss(net, sde, x0, t, inner=False):
    """L_f of MSGM-Ort: push the score on D_f orthogonal to the data score -z/std.

    Elementwise |z_hat o z|^2, as the authors' code has it; its optimum shrinks the score.  inner=True is the inner product
    that the name promises, (z_hat . z)^2 / D.  Both carry lambda = std^4: the poster's std^2 would divide by std^2 again
    and blow up at low noise."""
    _, z, z_hat = noised(net, sde, x0, t)
    return (z_hat * z).flatten(1).sum(1) ** 2 / z[0].numel() if inner else flat_mean((z_hat * z) ** 2)

def obt_loss(net, sde, x0, t, floor=-2.0):
    """L_f of MSGM-Obt: z_hat . z, lambda = std^2: an obtuse angle between the score on D_f and the data score.

    The sign is the POSTER's.  The released code minimises -z_hat . z, which is what score matching already does: it forgets nothing
    (tests/test_toy.py).  For the exact score z_hat . z is 1 - |z_hat - z|^2 on average.  It has no lower bound, so an image that
    reached `floor` stops pushing; without it the scores run away.  floor=None: the bare loss."""
    _, z, z_hat = noised(net, sde, x0, t)
    loss = flat_mean(z_hat * z)
    return loss if floor is None else loss.clamp(min=floor)

def obt_rel_loss(net, base, sde, x0, t):
    """L_f of Obt-rel (ours): z_hat . (z - z_hat_base), obtuse to what D_f adds to the Standard model `base`, which is frozen.

    On average over D_f, z - z_hat_base = -std grad log p(D_f | x_t): the direction that tells D_f from everything else.  It vanishes
    at high noise, where nothing can be told, and at low noise, where everything has been, so it neither shrinks the score of D_g nor
    stops the denoising.  With L_g (dsm_loss, same noise levels) the optimum is bounded: D_g's score, guided away from D_f,
        s_g + kappa p(D_f|x_t) (s_g - s_f) = s_g + kappa grad log p(D_g | x_t),    kappa = (1-alpha) pi_g / (2 alpha pi_f).
    A noise level that L_f sees q times as often as L_g has q kappa.  (ESD, Gandikota et al. 2023, trains such guidance with prompts.)"""
    x_hat, z, z_hat = noised(net, sde, x0, t)
    z_base = torch.no_grad()(predict)(base, x_hat, sde.sigma(t))[1]
    return flat_mean(z_hat * (z - z_base))

def ascent_loss(net, sde, x0, t, cap=2.0):
    """L_f of gradient ascent: minus the score matching loss on D_f, capped for each image (NegGrad of the unlearning literature).
    alpha L_g + (1-alpha) L_f is then L_g - w DSM(D_f) with w = (1-alpha)/alpha, to scale.  Its optimum is the score of
    (p_g - w p_f)/(1 - w) while that is a density and does not exist beyond: hence the cap, at twice the loss of z_hat = 0."""
    return -dsm_loss(net, sde, x0, t).clamp(max=cap)

def erasediff_loss(net, sde, x0, t):
    """L_f of EraseDiff (Wu et al., CVPR 2025): |z_hat - u|^2, u ~ U(0, 1) afresh: on D_f the network shall answer nonsense.
    Four versions are in circulation; this is the unconditional one (Gaussian noise in x_t, another u as target)."""
    _, _, z_hat = noised(net, sde, x0, t)
    return flat_mean((z_hat - torch.rand_like(x0)) ** 2)

def erasediff_weight(grad_g, grad_f, eta):
    """EraseDiff's lambda = max(eta - <g_g, g_f>/|g_f|^2, 0); the step is g_g + lambda g_f.  Flat gradients (P,) -> number.
    The first-order solution (BOME) of "least L_g among the minima of L_f": where keeping already forgets, lambda is 0; where they
    conflict, L_f still falls by eta |g_f|^2.  The released code divides by the norms (a cosine) or fixes lambda at 0.1 (--alpha .909)."""
    return (eta - grad_g @ grad_f / grad_f.square().sum()).clamp(min=0)

def siss_losses(net, sde, x_g, x_f, t, mix=0.5):
    """SISS (Alberti et al., ICLR 2025): the score matching losses of D_g and of D_f at the same x_t -> two of (B,).

    x_t comes from x_f with probability `mix` (their lambda), else from x_g; the weights q(x_t|x_g)/q_mix <= 1/(1-mix) and
    q(x_t|x_f)/q_mix <= 1/mix leave both losses unbiased, at the cost of one evaluation.  The step is g_g - (c/|g_f|) g_f: a forget
    gradient of fixed length c.  As in the released code x_g is drawn from D_g; two of its scripts draw only t = 999, ours all t."""
    sigma = bcast(sde.sigma(t), x_g)
    from_f = bcast(torch.rand(len(t), device=t.device) < mix, x_g)
    x_hat = torch.where(from_f, x_f, x_g) + sigma * torch.randn_like(x_g)
    z_hat = predict(net, x_hat, sde.sigma(t))[1]
    z_g, z_f = (x_hat - x_g) / sigma, (x_hat - x_f) / sigma  # the noise that would have led here from either
    log_ratio = 0.5 * (z_g**2 - z_f**2).flatten(1).sum(1)  # ln q(x_t|x_f) - ln q(x_t|x_g)
    share = torch.sigmoid(log_ratio + math.log(mix / (1 - mix)))  # posterior of "it came from x_f": no overflow
    return (1 - share) / (1 - mix) * flat_mean((z_hat - z_g) ** 2), share / mix * flat_mean((z_hat - z_f) ** 2)

# ==== 8  Training helpers =============================================================================
class EMA:
    """An always-eval copy of a network whose weights follow the training weights with decay min(decay, (1+n)/(10+n)).
    The warm-up matters in short runs: with a constant 0.9999 and 5,000 steps, 61 % of the average is still the initialisation."""
    def __init__(self, net, decay, n=0):
        self.net, self.decay, self.n = copy.deepcopy(net).requires_grad_(False).eval(), decay, n

    @torch.no_grad()
    def update(self, net):
        d = min(self.decay, (1 + self.n) / (10 + self.n))
        torch._foreach_lerp_(list(self.net.parameters()), list(net.parameters()), 1 - d)
        self.n += 1

class Muon(torch.optim.Optimizer):
    """Momentum whose step is made orthogonal: all singular values of a weight's update, as (out, in*k*k), are set to about 1 (Jordan et al.
    2024).  Adam's step of a convolution points mostly along a few directions.  857 steps on MNIST: held-out v-loss 0.169, Adam 0.184."""
    def __init__(self, params, lr, momentum=0.95):
        super().__init__(list(params), dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        """One update of every weight from its .grad."""
        for group in self.param_groups:
            for w in group["params"]:
                m = self.state[w].setdefault("momentum", torch.zeros_like(w))
                m.lerp_(w.grad, 1 - group["momentum"])
                g = w.grad.lerp(m, group["momentum"]).flatten(1)  # Nesterov: one step ahead
                tall = g.shape[0] > g.shape[1]
                g = (g.T if tall else g) / (g.norm() + 1e-7)
                for _ in range(5):  # Newton-Schulz: an odd polynomial that drives every singular value in (0, 1] towards 1
                    a = g @ g.T
                    g = 3.4445 * g + (2.0315 * a @ a - 4.7750 * a) @ g
                g = g.T if tall else g
                w.add_(g.reshape(w.shape), alpha=-group["lr"] * max(1.0, g.shape[0] / g.shape[1]) ** 0.5)

def muon_and_adam(net, lr, lr_muon=0.02):
    """Muon for the convolutions inside the U-Net, Adam for everything else -> [optimizer, optimizer]."""
    inside = [w for k, w in net.named_parameters() if w.ndim == 4 and not k.startswith(("stem", "head"))]
    rest = [w for w in net.parameters() if not any(w is v for v in inside)]
    return [Muon(inside, lr_muon), torch.optim.Adam(rest, lr, betas=(0.9, 0.99), fused=True)]

def set_lr(optimizers, step, steps, warmup):
    """Scale the peak rate of each optimizer: linear warm-up that never is 0, then half a cosine down to 0 at `steps`."""
    for group in [g for o in optimizers for g in o.param_groups]:
        peak = group.setdefault("peak", group["lr"])
        group["lr"] = peak * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))

def part_size(args):
    """Images of a step's batch that go through the network at once."""
    size, rest = divmod(args.batch_size, args.grad_accum * ranks()[1])
    return size if size and not rest else die(f"--batch-size {args.batch_size} cannot be split into {args.grad_accum} (--grad-accum) x {ranks()[1]} (processes)")

def batch_parts(args, step):
    """The parts of a step's batch for this process: one, unless --grad-accum or torchrun splits it.  A part has its own random stream, so
    2 processes and 1 with --grad-accum 2 train the same model, and --resume goes on with fresh numbers on CUDA, whose generator is not saved."""
    rank, world = ranks()
    for i in range(args.grad_accum):
        if world * args.grad_accum > 1 or args.device.startswith("cuda"):
            torch.manual_seed(rng(args.seed, step, rank + world * i).initial_seed())
        yield i

def average_over_ranks(tensors):
    """In-place mean over the processes of torchrun, as one message.
    Not DistributedDataParallel: that averages in backward(), and EraseDiff and SISS weigh gradients that autograd.grad has made."""
    if ranks()[1] > 1:
        flat = torch.cat([x.flatten() for x in tensors])
        dist.all_reduce(flat)
        for x, mean in zip(tensors, (flat / ranks()[1]).split([x.numel() for x in tensors])):
            x.copy_(mean.view_as(x))

def guarded_step(net, optimizers, skipped, clip=1.0):
    """After backward: average over processes, clip to norm `clip`, step every optimizer -> number of steps skipped in a row.
    One NaN in one gradient makes the clipped norm NaN and, through Adam's averages, every weight NaN for ever: such a step
    is skipped, and five in a row end the run."""
    average_over_ranks([w.grad for w in net.parameters() if w.grad is not None])
    if finite := bool(torch.isfinite(nn.utils.clip_grad_norm_(net.parameters(), clip))):
        for optimizer in optimizers:
            optimizer.step()
    net.zero_grad()
    if not finite and skipped >= 4:
        die("the gradient was not finite five times in a row; lower --lr (or, when unlearning, raise --alpha)")
    return 0 if finite else skipped + 1

def autocast(device):
    """Training in bfloat16 on CUDA, half the memory and several times the speed; on a CPU without such units it would be slower.
    No GradScaler: bfloat16 has float32's range.  Weights, average and optimizers stay float32: in bfloat16 an average would stick."""
    return torch.autocast("cuda", torch.bfloat16) if str(device).startswith("cuda") else contextlib.nullcontext()

# ==== 9  Samplers =====================================================================================
@torch.no_grad()
def pc_sample(net, sde, x, steps=1000, predictor="reverse_diffusion", corrector=True, snr=0.16, sigma_min=0.01, generator=None, after=None):
    """Predictor-corrector sampling in the SDE's own clock (Song et al. 2021, Alg. 1), from x = sde.prior(...) to x0_hat.

    predictor: "euler_maruyama", "reverse_diffusion" or "ancestral".  corrector: one Langevin step a level.  NFE is
    2 steps + 1 with the corrector.  Every image has its own step sizes: image i does not depend on its batch mates.
    after(x, t) -> x, if given, has the last word after each of the two: inpainting puts the known pixels back."""
    if predictor not in ("euler_maruyama", "reverse_diffusion", "ancestral"):
        raise ValueError(f"unknown predictor {predictor!r}")
    grid, after = torch.linspace(sde.T, sde.t_min(sigma_min), steps + 1, device=x.device), after or (lambda x, t: x)
    for t0, t1 in zip(grid[:-1], grid[1:]):
        t, t_next = t0.expand(len(x)), t1.expand(len(x))
        # The forward step t_next -> t is exactly x_t = a x_{t_next} + b n.
        a = bcast(sde.s(t) / sde.s(t_next), x)
        b2 = bcast(sde.std(t) ** 2, x) - a**2 * bcast(sde.std(t_next) ** 2, x)
        if corrector:
            # Song's step, eps = 2 alpha (snr |noise|/|score|)^2, with the norms at their expectation |score| = |noise|/std.
            eps = 2 * a**2 * (snr * bcast(sde.std(t), x)) ** 2
            x = after(x + eps * score_fn(net, sde, x, t) + torch.sqrt(2 * eps) * randn(x.shape, generator, x.device), t)
        score, n = score_fn(net, sde, x, t), randn(x.shape, generator, x.device)
        if predictor == "euler_maruyama":
            g2, dt = bcast(sde.diffusion(t) ** 2, x), t0 - t1
            x = x - (sde.drift(x, t) - g2 * score) * dt + torch.sqrt(g2 * dt) * n
        elif predictor == "reverse_diffusion":
            x = (2 - a) * x + b2 * score + torch.sqrt(b2) * n
        else:  # the exact posterior mean and variance of x_{t_next} given x_t and x0_hat
            var = b2 * bcast((sde.std(t_next) / sde.std(t)) ** 2, x)
            x = (x + b2 * score) / a + torch.sqrt(var) * n
        x = after(x, t_next)
    t = grid[-1].expand(len(x))
    return predict(net, x / bcast(sde.s(t), x), sde.sigma(t))[0]

def karras_sigmas(n, sigma_max, sigma_min=0.01, rho=7.0):
    """n levels from sigma_max down to sigma_min, dense at the low end (Karras et al. 2022, eq. 5) -> (n,) float32."""
    ramp = torch.linspace(0, 1, n, dtype=torch.float64)
    return (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))).pow(rho).float()

def heun_solve(net, y, phis):
    """Heun's method for the probability-flow ODE dy/dphi = -F(y, phi) through the nodes phis, either way -> y at the last one.
    This one line is the ODE of every SDE: they differ in how fast they run along it, not in the path."""
    for p0, p1 in zip(phis[:-1], phis[1:]):
        h, at = p1 - p0, lambda p: p.expand(len(y))
        k0 = net(y, at(p0))
        y = y - 0.5 * h * (k0 + net(y - h * k0, at(p1)))
    return y

@torch.no_grad()
def ode_sample(net, noise, sigmas):
    """Deterministic sample: noise (B, ...) ~ N(0, I), levels sigmas (N,) falling -> x0_hat.  NFE = 2 (N-1) + 1."""
    phis = torch.atan(sigmas.to(noise.device) / net.sd)
    y = heun_solve(net, noise * torch.sin(phis[0]), phis)
    return predict(net, y * net.sd / torch.cos(phis[-1]), sigmas[-1:].to(y.device).expand(len(y)))[0]

@torch.no_grad()
def dpmpp_sample(net, noise, sigmas, eta=0.0, generator=None):
    """DPM-Solver++(2M) (Lu et al. 2022), eta = 0, and its stochastic form SDE-DPM++(2M), eta = 1 -> x0_hat.  NFE = N.
    Exact for a constant x0_hat; the second order comes from the last two x0_hat, so a step costs one evaluation.  The fresh
    noise of eta > 0 washes out the errors of earlier steps, which is what few-step samples of small networks need."""
    x, sigmas = noise * sigmas[0], sigmas.to(noise.device)
    d_old = h_old = None
    for i, sigma in enumerate(sigmas):
        d = predict(net, x, sigma.expand(len(x)))[0]
        if i == len(sigmas) - 1:
            return d
        h = torch.log(sigma / sigmas[i + 1])
        mid = d if d_old is None else d + 0.5 * h / h_old * (d - d_old)
        x = sigmas[i + 1] / sigma * torch.exp(-eta * h) * x - torch.expm1(-(1 + eta) * h) * mid
        if eta:
            x = x + sigmas[i + 1] * torch.sqrt(-torch.expm1(-2 * eta * h)) * randn(x.shape, generator, x.device)
        d_old, h_old = d, h

def sample_images(net, n, shape, sde, seed, nfe=20, eta=1.0, sigma_max=80.0, batch=250, device="cpu", label="sampling"):
    """n bytes images (n, *shape), shape (C, H, W), with dpmpp_sample, DDPM by ancestral sampling; prints progress.
    Chunk k draws from its own generators, seeded by (seed, k): the same seed gives each network the same starting noise and
    the same noise on the way, so a before/after pair differs by the networks alone."""
    sigmas, t0 = karras_sigmas(nfe, min(sigma_max, sde.sigma_max())), time.time()

    def chunk(k):
        """Images k batch to (k + 1) batch."""
        noise = randn((batch, *shape), rng(seed, k), device)  # always a whole chunk: image i does not depend on n
        if sde.sampler == "ancestral":
            x = pc_sample(net, sde, noise, nfe - 1, "ancestral", corrector=False, generator=rng(seed, k, 1))
        else:
            x = dpmpp_sample(net, noise, sigmas, eta, rng(seed, k, 1))
        if not torch.isfinite(x).all():
            die("sampling gave numbers that are not finite: the model has diverged (more --alpha, or a lower --lr)")
        print(f"\r{label}: {min(n, (k + 1) * batch)}/{n}, {time.time() - t0:.0f} s", end="", flush=True)
        return to_bytes(x.cpu())

    out = spread(chunk, range(-(-n // batch)))
    print()
    return torch.cat(out)[:n]

# ==== 10  Likelihood ==================================================================================
def rademacher_probes(x, k, generator=None):
    """k probes of random signs, each (B, ...), scaled so that SUM v' A v estimates tr A without bias (Hutchinson).
    Signs, never Gaussians: v' A v is then exact on the diagonal of A, where almost all of the trace sits."""
    return [(torch.randint(0, 2, x.shape, generator=generator).to(x) * 2 - 1) / math.sqrt(k) for _ in range(k)]

def basis_probes(x):
    """The D unit vectors: SUM v' A v = tr A exactly.  For D up to about 64."""
    eye = torch.eye(x[0].numel(), dtype=x.dtype, device=x.device)
    return [e.reshape(x[:1].shape).expand_as(x) for e in eye]

def _velocity_and_trace(net, y, phi, probes):
    """-F and tr(dF/dy): one forward, one vector-Jacobian product per probe."""
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        out = net(y, phi.expand(len(y)))
        trace = 0
        for v in probes:
            trace = trace + (torch.autograd.grad(out, y, v, retain_graph=v is not probes[-1])[0] * v).flatten(1).sum(1)
    return -out.detach(), trace

def ode_log_likelihood(net, sde, x, probes=None, steps=30, sigma_min=0.001, focus=-1.5):
    """ln p(x) in nats (B,) by the probability-flow ODE (Song et al. 2021, eq. 39), on the circle.

        ln p(x) = ln N(y_T; 0, I) - INT tr(dF/dy) dphi - D ln sqrt(sigma_0^2 + sd^2) - D ln s(t_0)

    RK4, 4 steps evaluations.  The nodes are logistic in ln sigma, dense around `focus`: -1.5 is where shapes form; -3 suits dequantised
    images, whose finest structure is a grey level: there 16 steps err by .0024 bits/dim (tests/benchmark.py), at -1.5 by more than twice that.
    probes: see above; one Rademacher probe by default, the same along the whole path.  x on the scale of dequantize.
    Error: compare with twice the steps and print the difference."""
    probes = rademacher_probes(x, 1) if probes is None else probes
    m, w = focus, 2.0
    ends = torch.tensor([sigma_min, sde.sigma_max()], dtype=torch.float64)
    p0, p1 = torch.sigmoid((ends.log() - m) / w)
    nodes = m + w * torch.logit(torch.linspace(0, 1, steps + 1, dtype=torch.float64) * (p1 - p0) + p0)
    phis = torch.atan(nodes.exp() / net.sd).to(x)
    s0 = sde.s(sde.time_of(ends[:1])).item()  # x is x_t at t_0, just above the data
    dim, c0 = x[0].numel(), math.sqrt(sigma_min**2 + net.sd**2)
    y, integral = x / (s0 * c0), 0.0
    for a, b in zip(phis[:-1], phis[1:]):
        h = b - a
        k1, t1 = _velocity_and_trace(net, y, a, probes)
        k2, t2 = _velocity_and_trace(net, y + 0.5 * h * k1, a + 0.5 * h, probes)
        k3, t3 = _velocity_and_trace(net, y + 0.5 * h * k2, a + 0.5 * h, probes)
        k4, t4 = _velocity_and_trace(net, y + h * k3, b, probes)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        integral = integral + h / 6 * (t1 + 2 * t2 + 2 * t3 + t4)
    prior = -0.5 * (y.flatten(1).square().sum(1) + dim * math.log(2 * math.pi))
    return prior - integral - dim * math.log(c0) - dim * math.log(s0)

def bits_per_dim(log_p, dim):
    """Nats of an 8-bit image on the scale of dequantize -> bits per dimension.  A grey level is 1/128 of x wide, so its probability is p/128:
    -log2(p/128^D)/D = -ln p/(D ln 2) + 7.  (score_sde's unexplained "7 -" and, for images in [0, 1], 8.)"""
    return -log_p / (dim * math.log(2)) + 7

# ==== 11  Judge and measures ==========================================================================
class Judge(nn.Module):
    """A classifier of real images: says which class a sample is, how sure it is, and gives features for a distance.
    uint8 (B, C, H, W) -> logits (B, classes), features (B, 96), or (B, 512) in colour: torchvision's ResNet-18 with the small first
    layer that is usual at 32x32.  Bytes in, so that real and generated images take one path."""
    def __init__(self, channels=1, classes=10):
        super().__init__()
        self.arch = dict(channels=channels, classes=classes)

        def conv(cin, cout, k, stride=1):
            return [nn.Conv2d(cin, cout, k, stride, k // 2, bias=False), nn.BatchNorm2d(cout), nn.ReLU()]

        if channels == 1:
            body = [*conv(1, 32, 5, 2), *conv(32, 64, 3), nn.MaxPool2d(2), *conv(64, 64, 3), *conv(64, 96, 3)]
        else:
            from torchvision.models import resnet18
            body = [*conv(channels, 64, 3), nn.MaxPool2d(2), *list(resnet18().children())[4:8]]
        self.body, self.head = nn.Sequential(*body), nn.Linear(96 if channels == 1 else 512, classes)

    def forward(self, images):
        features = self.body((images.float() + 0.5) / 128 - 1).mean((2, 3))
        return self.head(features), features

Verdict = namedtuple("Verdict", "labels confidence features")  # (n,) int64, (n,) in [0,1], (n, d) float64

@torch.no_grad()
def judge_images(judge, images, batch=500):
    """Bytes (n, C, H, W) -> Verdict on the CPU."""
    device, out = next(judge.parameters()).device, []
    for chunk in images.split(batch):
        logits, features = judge(chunk.to(device))
        p, label = logits.softmax(1).max(1)
        out.append((label.cpu(), p.cpu(), features.cpu().double()))
    return Verdict(*map(torch.cat, zip(*out)))

def frechet_distance(a, b):
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^1/2) of two feature sets (n, d), in float64 -> float.
    tr (S_a S_b)^1/2 = tr (R S_b R)^1/2 with R = S_a^1/2, which is symmetric: eigh never meets a complex number, and no scipy.
    In the judge's features this is FD, not FID: other features, other scale.  Compare at one n only: the bias falls as 1/n."""
    if min(len(a), len(b)) < 2:
        return math.nan  # one point has no covariance
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    val, vec = torch.linalg.eigh(cov_a)
    root = (vec * val.clamp(min=0).sqrt()) @ vec.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross).item()

def wilson(k, n, z=1.96):
    """95 % interval of a share k/n (Wilson 1927) -> (low, high).  At 0 of n it still is an interval: [0, 3.8/n]."""
    p, denom = k / n, 1 + z * z / n
    mid, half = (p + z * z / (2 * n)) / denom, z / denom * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, mid - half), min(1.0, mid + half)

def measure(verdict, forget, real_train_g, classes, before=None):
    """The measures of a set of samples, shares in percent -> dict.  They only mean something together.

    ur               share judged to be a forget class (`forget`: list of indices), with its Wilson interval
    fd               Frechet distance to real D_g training features real_train_g; of the samples not judged D_f when before is
                     None (the Standard model should not be punished for the D_f it still draws), of as many otherwise
    low_confidence   share the judge is less than 80 % sure of: rubbish has to be called something
    class_counts     samples judged to be each of the `classes` (a number)
    class_min_ratio  with before (the Standard model's Verdict): smallest over the kept classes of its share of the kept samples
                     after / before: which class paid for the forgetting"""
    n = len(verdict.labels)
    hit = torch.isin(verdict.labels, torch.tensor(forget))
    low, high = wilson(hit.sum().item(), n)
    out = dict(ur=100 * hit.float().mean().item(), ur_interval=[100 * low, 100 * high])
    out["low_confidence"] = 100 * (verdict.confidence < 0.8).float().mean().item()
    if before is None:
        out["fd"] = frechet_distance(verdict.features[~hit], real_train_g)
    else:
        hit0 = torch.isin(before.labels, torch.tensor(forget))
        out["fd"] = frechet_distance(verdict.features[: int((~hit0).sum())], real_train_g)
        share = lambda v, gone: torch.bincount(v.labels[~gone], minlength=classes) / (~gone).sum().clamp(min=1)
        ratios = share(verdict, hit) / share(before, hit0)  # 0/0 = nan for the forget classes and any that never was drawn
        out["class_min_ratio"] = min(ratios[~ratios.isnan()].tolist(), default=math.nan)
    out["class_counts"] = torch.bincount(verdict.labels, minlength=classes).tolist()
    return out

# ==== 12  Checkpoints and folders =====================================================================
def save_checkpoint(path, **content):
    """Write a plain dict (tensors, numbers, strings, lists) so that a crash leaves the old file or the new, never half of one."""
    path = Path(path)
    if ranks()[0]:
        return  # of several processes the first writes
    tmp = path.with_name(path.name + ".tmp")  # same folder: os.replace is atomic only within a file system
    torch.save(content, tmp)
    os.replace(tmp, path)

def load_checkpoint(path, make, keys=("arch", "ema")):
    """Read a checkpoint -> dict.  A missing or damaged file ends with one line that names `make`, the command that mends it."""
    if not Path(path).is_file():
        die(f"{path} not found; make it with: {make}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        missing = [k for k in keys if k not in content]
    except Exception as e:
        die(f"{path} is damaged ({type(e).__name__}); make it again with: {make}")
    if missing:
        die(f"{path} is no checkpoint of this project (no '{missing[0]}' in it); make it with: {make}")
    return content

def load_net(path, make, device="cpu"):
    """The EMA network of a checkpoint, with the architecture stored in it, in eval mode."""
    content = load_checkpoint(path, make)
    try:
        net = UNet(**content["arch"])
        net.load_state_dict(content["ema"])
    except (RuntimeError, TypeError) as e:
        die(f"{path} does not fit this version of common.py ({str(e).splitlines()[0]}); make it again with: {make}")
    return net.to(device).eval()

def find_base(out, dataset):
    """The Standard model: out/<dataset>/base.pt, else the one that ships in data/ -> (path, command that makes it)."""
    own, shipped = Path(out) / dataset / "base.pt", HERE / "data" / f"{dataset}_base.pt"
    return (own if own.exists() or not shipped.exists() else shipped), f"python 02_train_sde.py --dataset {dataset}"

def find_runs(folder, make):
    """The finished runs of 02 and 03 in a forget_folder (unfinished ones are hidden) -> {path of model.pt: its args}, sorted; maybe none."""
    paths = sorted(p for p in Path(folder).glob("*/model.pt") if not p.parent.name.startswith("."))
    return {p: load_checkpoint(p, make, ("arch", "ema", "args"))["args"] for p in paths}

def judge_path(args, forget=()):
    """Where the judge lies, found like the base model; for CelebA one for each choice of attributes."""
    name = "judge" + ("-" + "-".join(forget)) * (args.dataset == "celeba") + ".pt"
    own, shipped = Path(args.out) / args.dataset / name, HERE / "data" / f"{args.dataset}_{name}"
    return own if own.exists() or not shipped.exists() else shipped

def load_judge(args, data, forget=()):
    """The judge of the Dataset `data` on args.device.  If there is none, or one of --quick where that is not asked for, 02 --judge trains it."""
    more = [str(x) for k in ("data_dir", "quick", "device") if getattr(args, k) for x in ("--" + k.replace("_", "-"), getattr(args, k)) if x is not True]
    argv = ["--dataset", args.dataset, "--judge", "--out", str(args.out), *more, *(["--without", *forget] if args.dataset == "celeba" else [])]
    make, path = "python 02_train_sde.py " + " ".join(argv), judge_path(args, forget)
    if not path.exists() or not args.quick and load_checkpoint(path, make, ("arch", "model")).get("quick"):
        state = torch.get_rng_state()  # the first run and the next draw alike
        runpy.run_path(str(HERE / "02_train_sde.py"))["main"](argv)
        torch.set_rng_state(state)
        spread(None, [])  # all wait for the first to have written it
    content = load_checkpoint(judge_path(args, forget), make, ("arch", "model"))
    if content.get("classes", data.classes) != data.classes:
        die(f"{path} knows other classes ({', '.join(content['classes'])}); another folder of pictures needs another --out")
    judge = Judge(**content["arch"])
    judge.load_state_dict(content["model"])
    return judge.to(args.device).eval()

def forget_folder(out, dataset, names):
    """Where all that concerns one forget set lies: out/<dataset>/forget-<names>."""
    return Path(out) / dataset / f"forget-{'-'.join(names)}"

def run_name(method, sde, scratch, seed):
    """The folder of one run in there: <method>-<sde>[-scratch][-s<seed>]."""
    return f"{method}-{sde}" + "-scratch" * scratch + (f"-s{seed}" if seed else "")

def make_folder(path):
    """Create a folder, or exit with one line that says why not."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError("no permission to write")
    except OSError as e:
        die(f"cannot write to {path} ({e.strerror or e}); choose another folder with --out")
    return Path(path)

@contextlib.contextmanager
def fresh_folder(path):
    """`with fresh_folder(p) as tmp`: write into tmp beside p; p is replaced when the block has ended well, else left alone."""
    path = Path(path)
    tmp, old = path.with_name(f".{path.name}.tmp{os.getpid()}"), path.with_name(f".{path.name}.old{os.getpid()}")
    make_folder(tmp)
    try:
        yield tmp
        if ranks()[0]:
            return  # of several processes the first's folder stays
        if path.exists():
            os.replace(path, old)
        os.replace(tmp, path)
    finally:
        [shutil.rmtree(p, ignore_errors=True) for p in (tmp, old)]

# ==== 13  Pictures ====================================================================================
def pyplot():
    """matplotlib.pyplot that draws to files, with no screen needed."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt

def short(name): return name[:4] if "_" not in name else "".join(word[0] for word in name.split("_"))  # of a class, for an image's corner

def tile(images, columns):
    """Bytes (N, C, H, W) -> one array (rows*H, columns*W, C or none) for imshow; a short last row is padded with black."""
    n, c, h, w = images.shape
    rows = -(-n // columns)
    canvas = torch.zeros(rows * columns, c, h, w, dtype=torch.uint8)
    canvas[:n] = images
    canvas = canvas.reshape(rows, columns, c, h, w).permute(0, 3, 1, 4, 2).reshape(rows * h, columns * w, c)
    return canvas.squeeze(-1).numpy()

# ==== 14  Command line ================================================================================
class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""
    def error(self, message):
        die(f"{message} (try --help)")

def number(kind, low, high=math.inf, open_low=False):
    """An argparse type: a number within bounds, which the message names."""
    def convert(text):
        value = kind(text)
        if not (low < value if open_low else low <= value) or not value <= high:
            raise argparse.ArgumentTypeError(f"{text} is out of range: {'above' if open_low else 'at least'} {low}" + (f", at most {high}" if high < math.inf else ""))
        return value
    convert.__name__ = "whole number" if kind is int else "number"
    return convert

def parser(doc, **defaults):
    """The flags that every script has, under the same names; a script adds its own."""
    p = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dataset", default="mnist", help=f"one of: {', '.join(RECIPES)}")
    p.add_argument("--data-dir", help="folder that holds the data set, or to download it into (default: data/)")
    p.add_argument("--steps", type=number(int, 1), help="training steps")
    p.add_argument("--batch-size", type=number(int, 2), help="images a step (03: of D_g and of D_f each)")
    p.add_argument("--lr", type=number(float, 0, open_low=True), help="peak learning rate of Adam")
    p.add_argument("--grad-accum", type=number(int, 1), default=1, help="do a batch in so many parts, for less memory")
    p.add_argument("--compile", action="store_true", help="torch.compile the network that trains: a minute more at the start, faster on CUDA")
    p.add_argument("--seed", type=number(int, 0), default=0)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--out", default="out", help="root of everything that is written (default: out)")
    p.add_argument("--quick", action="store_true", help="the same path with few steps and samples: does it run?")
    p.set_defaults(**defaults)
    return p

def finish_args(args, full, quick):
    """Fill what the user left open from `quick` under --quick, else from `full`; check the device and the output folder."""
    for key, value in {**full, **(quick if args.quick else {})}.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    if recipe(args.dataset) and "RANK" in os.environ and not dist.is_initialized():  # started by torchrun
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo", timeout=timedelta(hours=12))  # long: the others wait for a download
        atexit.register(dist.destroy_process_group)
        args.device = f"cuda:{os.environ['LOCAL_RANK']}" if args.device == "cuda" else args.device
        sys.stdout = sys.stdout if dist.get_rank() == 0 else open(os.devnull, "w")
    try:
        torch.zeros(1, device=args.device)
        if args.device.startswith("cuda:"):
            torch.cuda.set_device(args.device)
    except (RuntimeError, AssertionError, ValueError) as e:
        die(f"--device {args.device} is not usable here ({str(e).splitlines()[0]}); try --device cpu")
    make_folder(Path(args.out) / args.dataset)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA, nothing on a CPU; a likelihood asks for "highest"
    torch.set_num_threads(max(1, (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1) // ranks()[1]))
    return args

def run(main):
    """main(argv) of a script; memory that does not suffice ends with one line."""
    try:
        main(sys.argv[1:])
    except torch.cuda.OutOfMemoryError:
        die("out of GPU memory: lower --batch-size, or split a batch with --grad-accum 2 (or 4, 8)")
