"""What the numbered scripts share: score-based generative models, and how to make one forget.

The method is MSGM, "Moderating the Generalization of Score-based Generative Model" (ICCV 2025,
arXiv 2412.07229). Losses, samplers, likelihood and measures take plain tensors, an SDE and a
network, so each can be lifted into another project together with the few names that it calls.

Contents

    The science
     0  Notation               expand_like, flat_mean, rng, randn, finest_type, no_tf32
     1  SDEs                   VE, VP, SubVP, DDPM              x_t = s(t) x0 + std(t) z
     2  The circle             predict, score_fn                one network for every SDE
     3  Networks               UNet, describe_network; ExactNet, GaussianMixture (no training)
     4  Noise levels           uniform_t, lognormal_t
     5  Losses                 dsm_loss, distill_loss; ort_loss, obt_loss, obt_rel_loss
     6  Samplers               pc_sample, langevin_step, heun_solve, ode_sample, dpmpp_sample,
                               Recorder, sample_images
     7  Likelihood             ode_log_likelihood, bits_per_dim
     8  Judge and measures     Judge, fit_judge, judge_images; frechet_distance, wilson, measure,
                               instead, is_noise

    The plumbing: skip it on first reading
     9  Data                   RECIPES, load_dataset, dequantize, draw_batch, split_forget
                               check_dataset, refuse_too_few, cache_folders, read_picture
    10  Training               EMA, Muon, set_lr, batch_parts, guarded_step, CtrlC,
                               restore_training, autocast, bfloat16
    11  Processes              ranks, from_first_process, wait_for_all_processes, share_work
    12  Checkpoints, folders   whole_file, save_checkpoint, write_json, write_losses,
                               load_checkpoint, load_net, find_base, find_runs, run_command,
                               run_name, fingerprint, refuse_other_result, locked,
                               fresh_folder, remove_leftovers
    13  The judge on disk      judge_path, train_judge, load_judge
    14  Pictures               pyplot, METHOD_STYLES, draw_picture, save_figure, save_animation,
                               plain_text, short_name, tile
    15  Command line           exit_with_error, warn, say, Parser, number, parser, finish_args,
                               command_line, own_command, Output, run

Words and symbols of all files

    Standard         the model before unlearning, trained on all data
    Unseen           a model that was trained, or trained further, without the data to forget
    D_g, D_f         the data to keep, and the data to forget
    L_g, L_f         the loss that keeps D_g, and the one that forgets D_f
    alpha            a number: the whole loss is alpha L_g + (1 - alpha) L_f
    x0, x_t          (B, ...) a clean image, and the noisy one at time t
    z, z_hat         (B, ...) the Gaussian noise in x_t, and the network's estimate of it
    x_hat, y         (B, ...) x_t in other units, see section 2; so is F, the network's output
    t, sigma, phi    (B,) time, noise level and angle: three names for how noisy an image is
    NFE              number of network evaluations for one image

B is the number of images in a batch. D is the number of values in one image: C*H*W, or 2 for the
points of the toy. The README has the same symbols with their equations.

Papers that are cited by the names of their authors

    Song et al. 2021     Score-Based Generative Modeling through SDEs           arXiv 2011.13456
    Karras et al. 2022   Elucidating the Design Space of Diffusion-Based ...    arXiv 2206.00364
    Ho et al. 2020       Denoising Diffusion Probabilistic Models               arXiv 2006.11239
    Lu et al. 2022       DPM-Solver++                                           arXiv 2211.01095
    Kingma et al. 2021   Variational Diffusion Models                           arXiv 2107.00630
"""

import argparse
import atexit
import collections
import contextlib
import copy
import difflib
import errno
import gzip
import hashlib
import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import textwrap
import time
import warnings
import zipfile
import zlib
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F  # in formulae F is the output of the network, see "The circle"
from torch.utils.flop_counter import FlopCounterMode

try:
    import fcntl  # locks of files; Windows has no such module
except ImportError:
    fcntl = None

HERE = Path(__file__).resolve().parent
PROGRAM_START = time.time()

# ==================================================================================================
# 0  Notation
# ==================================================================================================


def expand_like(values, like):
    """Reshape one number per image so that it can multiply a batch of points or of pictures.

    values  (B,)
    like    (B, ...) the batch; only its number of dimensions counts

    Returns the values as (B, 1, ..., 1).
    """
    ones = [1] * (like.ndim - 1)
    return values.reshape(-1, *ones)


def flat_mean(x):
    """Mean over everything but the batch: (B, ...) -> (B,)."""
    return x.flatten(1).mean(1)


def rng(*keys):
    """Make a random generator that is seeded by several whole numbers, e.g. rng(seed, batch).

    Different keys give unrelated streams of random numbers. The order counts: (0, 1) and (1, 0)
    are different keys. A 0 at the end does not: (5, 0) and (5,) are one key. The generator is on
    the CPU on purpose. CUDA's generator draws other numbers, and one seed should give one set of
    pictures everywhere.
    """
    state = np.random.SeedSequence(keys).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> 1))  # torch takes 63 bits and no sign


def finest_type(device):
    """Return the most precise type of real numbers that a device has: mps has no float64."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


@contextlib.contextmanager
def no_tf32():
    """Return a context in which CUDA computes in full float32, and not in the faster TF32.

    A likelihood adds up thousands of small terms, and the 10 bits of TF32 are too coarse for it.
    """
    precision = torch.get_float32_matmul_precision()
    allow_tf32 = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = allow_tf32


def randn(shape, generator, device="cpu"):
    """Gaussian noise of this shape, drawn on the CPU and then moved to the device; see rng."""
    return torch.randn(shape, generator=generator).to(device)


# ==================================================================================================
# 1  SDEs
# ==================================================================================================


class SDE:
    """A forward process dx = f(x, t) dt + g(t) dw that turns data into noise.

    At time t it has made x_t = s(t) x0 + std(t) z of the data x0, with z ~ N(0, I). The two
    functions s and std determine the rest. With sigma = std/s and s' = ds/dt (Karras et al. 2022,
    eq. 4, and its appendix B):

        f(x, t) = (s'/s) x        g(t)^2 = s^2 d(sigma^2)/dt

    Time runs from t = 0 (data) to t = T = 1 (noise). A subclass defines these functions, which take
    and return tensors of shape (B,):

        s(t), std(t)    what is left of the signal, and the standard deviation of the noise
        dlog_s(t)       s'/s = d ln s / dt, the rate of the drift
        diffusion(t)    g(t), the rate of the noise
        time_of(sigma)  the time at which the noise level is sigma
    """

    T = 1.0

    # The sampler that sample_images uses, by its name in results, and the number of network
    # evaluations for one image that is enough for it.
    sampler = "sde-dpm++2m"
    nfe = 20

    def sigma(self, t):
        """The noise level std/s, the ratio of noise to signal: it means the same for all SDEs."""
        return self.std(t) / self.s(t)

    def sigma_max(self):
        """The largest noise level sigma(T) as a float: where sampling starts."""
        last = torch.ones(1, dtype=torch.float64)
        return self.sigma(last).item()

    def t_min(self, sigma):
        """The smallest time in use, where the noise level is `sigma`: a float for a float.

        An SDE that never has so little noise, such as VE, gives the time of the least that it has.
        Two values of `sigma` are in use, and they must not be mixed. Sampling ends at 0.01, where
        about one grey level of noise is left. The likelihood starts at 0.001. If it started at
        0.01 too, MNIST would come out 0.94 bits/dim worse on average, a single image up to 2.2.
        The paper's VE starts there, because its noise never falls below 0.01.
        """
        t = self.time_of(torch.tensor([sigma], dtype=torch.float64))
        return t.clamp(0, 1).item()

    def draw(self, u):
        """Turn u ~ U(0, 1) into the paper's training times t ~ U(t_min, 1), both (B,).

        Here t_min is where sigma = 0.001, see t_min.
        """
        # t_min + (1 - t_min) u would be the same, but rounding could make it larger than 1.
        return 1 - (1 - self.t_min(0.001)) * (1 - u)

    def drift(self, x, t):
        """The drift f(x, t) = (d ln s / dt) x, for x (B, ...) and t (B,)."""
        return expand_like(self.dlog_s(t), x) * x

    def prior(self, shape, generator, device="cpu"):
        """Draw x_T from N(0, std(T)^2 I), where sampling starts.

        The data term s(T) x0 is left out, because the noise drowns it. It is largest for VE: there
        it shifts x_T by 1/50 of a standard deviation where x0 is 1.
        """
        std = self.std(torch.ones(1)).item()
        return randn(shape, generator, device) * std


class VE(SDE):
    """Variance exploding: s = 1, std = sigma_min (sigma_max/sigma_min)^t.

    Song et al. 2021, eq. 9 and appendix C.
    """

    def __init__(self, sigma_min=0.01, sigma_max=50.0):
        self.sigma_min = sigma_min
        self.log_ratio = math.log(sigma_max / sigma_min)

    def s(self, t):
        """What is left of the signal: all of it, so 1 at every time."""
        return torch.ones_like(t)

    def std(self, t):
        """The standard deviation of the noise; equal steps in t multiply it by equal factors."""
        return self.sigma_min * torch.exp(self.log_ratio * t)

    def dlog_s(self, t):
        """The rate d ln s / dt, which is 0: VE has no drift."""
        return torch.zeros_like(t)

    def diffusion(self, t):
        """The noise rate g(t), from g^2 = d std^2/dt."""
        return self.std(t) * math.sqrt(2 * self.log_ratio)

    def time_of(self, sigma):
        """The time at which the noise level is sigma (B,)."""
        return torch.log(sigma / self.sigma_min) / self.log_ratio


class VP(SDE):
    """Variance preserving: the rate of the noise, beta(t), rises from 0.1 to 20; s^2 + std^2 = 1.

    Let b(t) be the integral of beta from 0 to t. Then s = exp(-b/2) and std = sqrt(1 - exp(-b)).
    Song et al. 2021, eq. 11 and appendix C.
    """

    def __init__(self, beta_min=0.1, beta_max=20.0):
        self.beta_min = beta_min
        self.beta_slope = beta_max - beta_min

    def beta(self, t):
        """The rate at which noise is added: a straight line from beta_min to beta_max."""
        return self.beta_min + self.beta_slope * t

    def integrated_beta(self, t):
        """The integral b(t) of beta from 0 to t."""
        return self.beta_min * t + 0.5 * self.beta_slope * t * t

    def s(self, t):
        """What is left of the signal: exp(-b/2)."""
        return torch.exp(-0.5 * self.integrated_beta(t))

    def std(self, t):
        """The standard deviation of the noise: sqrt(1 - exp(-b))."""
        # -expm1(-b), not 1 - exp(-b): in float32 the second is 0.6 % off at t = 1e-5, where the
        # likelihood starts.
        return torch.sqrt(-torch.expm1(-self.integrated_beta(t)))

    def dlog_s(self, t):
        """The rate d ln s / dt = -beta/2."""
        return -0.5 * self.beta(t)

    def diffusion(self, t):
        """The noise rate g(t) = sqrt(beta)."""
        return torch.sqrt(self.beta(t))

    def time_of_integrated_beta(self, integral):
        """The inverse of integrated_beta: the time t at which b(t) is `integral`, both (B,)."""
        # The root of beta_slope/2 t^2 + beta_min t - b = 0. The textbook's form of it,
        # (-beta_min + sqrt(...))/beta_slope, subtracts two numbers that are nearly equal when b is
        # small. This form subtracts nothing.
        root = torch.sqrt(self.beta_min**2 + 2 * self.beta_slope * integral)
        return 2 * integral / (self.beta_min + root)

    def time_of(self, sigma):
        """The time at which the noise level is sigma (B,)."""
        # sigma^2 = std^2/s^2 = (1 - exp(-b))/exp(-b) = exp(b) - 1, so b = ln(1 + sigma^2)
        return self.time_of_integrated_beta(torch.log1p(sigma * sigma))


class SubVP(VP):
    """Sub-VP: s as in VP, and std = 1 - exp(-b) with b(t) as in VP.

    Its variance is never above that of VP. Song et al. 2021, eq. 12 and appendix C.
    """

    def std(self, t):
        """The standard deviation of the noise: 1 - exp(-b), the square of VP's."""
        return -torch.expm1(-self.integrated_beta(t))

    def diffusion(self, t):
        """The noise rate g(t), from g^2 = beta (1 - exp(-2 b))."""
        return torch.sqrt(self.beta(t) * -torch.expm1(-2 * self.integrated_beta(t)))

    def time_of(self, sigma):
        """The time at which the noise level is sigma (B,)."""
        # sigma = std/s = (1 - exp(-b))/exp(-b/2) = 2 sinh(b/2), so b = 2 asinh(sigma/2)
        return self.time_of_integrated_beta(2 * torch.asinh(sigma / 2))


class DDPM(SDE):
    """The discrete chain x_k = sqrt(1 - beta_k) x_{k-1} + sqrt(beta_k) n, k = 1..1000, t = k/1000.

    Here n ~ N(0, I) is fresh in each step (Ho et al. 2020, eq. 2), and beta_k runs from 1e-4 to
    0.02 in a line (their section 4). Then s = PROD_{i<=k} sqrt(1 - beta_i) and s^2 + std^2 = 1
    (their eq. 4). VP is its limit of infinitely many steps. Any t is read as the nearest k.

    A chain has no rates: dlog_s and diffusion are missing. Sample it with the predictor "ancestral"
    of pc_sample, which needs none.
    """

    # An ancestral step takes x0_hat as constant, which dpmpp_sample corrects for. So more and
    # shorter steps are needed.
    sampler = "ancestral"
    nfe = 50

    def __init__(self, steps=1000, beta_min=1e-4, beta_max=0.02):
        beta = torch.linspace(beta_min, beta_max, steps, dtype=torch.float64)
        log_s = 0.5 * torch.log1p(-beta).cumsum(0)
        self.log_s = F.pad(log_s, (1, 0))  # (steps + 1,): entry k = 0 is the data, where s = 1
        self.steps = steps

    def log_s_at(self, t):
        """Look up ln s (B,) at the level k that is nearest to t (B,), in the precision of t."""
        level = (t * self.steps).round().long()
        # First the type, then the device: mps has no float64.
        return self.log_s.to(t.dtype).to(t.device)[level]

    def s(self, t):
        """What is left of the signal."""
        return torch.exp(self.log_s_at(t))

    def std(self, t):
        """The standard deviation of the noise: sqrt(1 - s^2)."""
        return torch.sqrt(-torch.expm1(2 * self.log_s_at(t)))  # expm1 as in VP

    def draw(self, u):
        """Turn u ~ U(0, 1) into training times: each of the 1000 levels is equally likely."""
        return torch.ceil(u * self.steps).clamp(min=1) / self.steps

    def time_of(self, sigma):
        """The time of the level whose noise is nearest to sigma (B,)."""
        finest = finest_type(sigma.device)
        log_s = -0.5 * torch.log1p(sigma.to(finest) ** 2)  # s^2 = 1/(1 + sigma^2)
        # (B, 1) against (steps + 1,) -> (B, steps + 1)
        distance = (self.log_s.to(finest).to(sigma.device) - log_s[..., None]).abs()
        level = distance.argmin(-1).clamp(min=1)  # level 0 has no noise, and a score needs some
        return (level / self.steps).to(sigma.dtype)


SDES = {"ve": VE, "vp": VP, "subvp": SubVP, "ddpm": DDPM}

# The base model is trained with this wider VE. Its sigma covers every SDE above (VP ends at 152,
# DDPM at 157) and the 0.001 at which the likelihood starts.
TRAINING_SDE = VE(0.001, 160.0)

# ==================================================================================================
# 2  The circle: one network for every SDE
# ==================================================================================================
#
# Divide x_t by s(t), and every SDE becomes x_hat = x0 + sigma z. Let sd be the standard deviation
# of the data. Scale x_hat to unit variance, with the angle phi = atan(sigma/sd):
#
#     y  = x_hat / sqrt(sigma^2 + sd^2) = cos(phi) x0/sd + sin(phi) z      what the network sees
#     F* = sin(phi) x0/sd - cos(phi) z                                     what it should answer
#
# F without the star is what the network does answer. A network is any callable net(y, phi) -> F
# with an attribute net.sd; y and F are (B, ...), phi is (B,).
#
# For a fixed pair (x0, z) the point y moves on a circle when phi changes. Its velocity is
# dy/dphi = -F*. The map (x0/sd, z) -> (y, F*) is a rotation with a reflection, and such a map is
# its own inverse. So one output F gives the estimates of both, of the data and of the noise:
#
#     x0_hat = sd (cos(phi) y + sin(phi) F)          z_hat = sin(phi) y - cos(phi) F
#
# This is v-prediction (Salimans and Ho 2022, section 4) with the sign turned. It is also the
# preconditioning of EDM, the method of Karras et al. 2022 (Table 1), written with an angle.


def predict(net, x_hat, sigma):
    """Split a noisy image into the network's estimates of data and noise.

    x_hat  (B, ...) the image x0 + sigma z
    sigma  (B,) its noise level

    Returns (x0_hat, z_hat), each shaped like x_hat.
    """
    level = expand_like(sigma, x_hat)
    y = x_hat / torch.sqrt(level * level + net.sd**2)
    phi = torch.atan(sigma / net.sd)
    out = net(y, phi)  # F; here that name belongs to torch.nn.functional

    # The map of the comment above in reverse, (y, F) -> (x0_hat/sd, z_hat).
    cos = torch.cos(expand_like(phi, y))
    sin = torch.sin(expand_like(phi, y))
    x0_hat = net.sd * (cos * y + sin * out)
    z_hat = sin * y - cos * out
    return x0_hat, z_hat


def score_fn(net, sde, x_t, t):
    """Compute the model's score, grad log p_t(x_t) = -z_hat/std(t), the same way for every SDE.

    x_t is (B, ...), t is (B,); the result is shaped like x_t. The formula is Tweedie's. In Karras
    et al. 2022 it is eq. 3, divided here by s(t) because the gradient is taken in x_t, not in
    x_hat.
    """
    x_hat = x_t / expand_like(sde.s(t), x_t)
    _, z_hat = predict(net, x_hat, sde.sigma(t))
    return -z_hat / expand_like(sde.std(t), x_t)


# ==================================================================================================
# 3  Networks
# ==================================================================================================
#
# Two things must not change in the three classes of the U-Net (Block, Attention, UNet). The names
# of the layers are the keys in every saved checkpoint. The order in which the layers are made is
# the order of the random draws, and of the parameters in a saved optimizer.


class Block(nn.Module):
    """A residual block: norm, SiLU and convolution twice, then attention if it is wanted.

    in_channels, out_channels  of the features that come in and go out
    emb_size                   length of the vector `emb` that stands for the noise level
    has_attention              whether the block ends with Attention
    dropout                    share of the features that training sets to zero

    The noise level enters as scale and shift after the second norm (FiLM, Perez et al. 2018).
    """

    def __init__(self, in_channels, out_channels, emb_size, has_attention, dropout):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.film = nn.Linear(emb_size, 2 * out_channels)
        # affine=False: FiLM supplies scale and shift.
        self.norm2 = nn.GroupNorm(8, out_channels, affine=False)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        if in_channels == out_channels:
            self.skip = nn.Identity()
        else:
            self.skip = nn.Conv2d(in_channels, out_channels, 1)
        self.attn = Attention(out_channels) if has_attention else nn.Identity()

        # Zero the last layer of each branch: the block starts as the identity, and depth costs
        # nothing at first.
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x, emb):
        """Map x (B, in_channels, H, W) and emb (B, emb_size) to (B, out_channels, H, W)."""
        # (B, 2 out_channels) -> (B, 2 out_channels, 1, 1) -> two of (B, out_channels, 1, 1)
        scale, shift = self.film(emb)[:, :, None, None].chunk(2, 1)
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.norm2(hidden) * (1 + scale) + shift
        hidden = self.conv2(self.dropout(F.silu(hidden)))
        return self.attn(self.skip(x) + hidden)


class Attention(nn.Module):
    """Self-attention over the pixels with heads of 32 channels (Vaswani et al. 2017, eq. 1).

    With MNIST it compares 7x7 = 49 positions, which costs almost nothing.
    """

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        # gcd: with a width that 32 does not divide, such as 48, the heads are narrower.
        self.num_heads = channels // math.gcd(channels, 32)

        # The branch starts as zero, see Block.
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x):
        """Map (B, C, H, W) to the same shape."""
        batch, channels, height, width = x.shape
        num_pixels = height * width
        head_size = channels // self.num_heads  # 32, or less; see __init__
        qkv = self.qkv(self.norm(x))

        # (B, 3C, H, W) -> (B, 3, heads, 32, HW) -> three of (B, heads, HW, 32)
        qkv = qkv.reshape(batch, 3, self.num_heads, head_size, num_pixels)
        query, key, value = qkv.transpose(-1, -2).unbind(1)
        mixed = F.scaled_dot_product_attention(query, key, value)

        # (B, heads, HW, 32) -> (B, heads, 32, HW) -> (B, C, H, W)
        mixed = mixed.transpose(-1, -2).reshape(batch, channels, height, width)
        return x + self.out(mixed)


class UNet(nn.Module):
    """The network F(y, phi) of this project: (B, C, H, W), (B,) -> (B, C, H, W).

    channels  C of the images
    width     channels at the highest resolution, a multiple of 8
    mult      width at each resolution, in multiples of `width`, from fine to coarse
    attn      whether there is attention, for each resolution
    patch     2: blocks of 2x2 pixels are first folded into channels (pixel_unshuffle), and the
              network works at half the resolution, for a quarter of the cost. 28x28 digits lose
              nothing by it. 1: nothing is folded
    dropout   share of the features that training sets to zero
    sd        standard deviation of the data, see "The circle"

    The features of the way down are added to those of the way up (skips). Other U-Nets concatenate
    them. Adding makes the way up a third cheaper, and it learns as well.
    """

    def __init__(
        self,
        channels=1,
        width=48,
        mult=(1, 2),
        attn=(False, True),
        patch=2,
        dropout=0.0,
        sd=0.5,
    ):
        super().__init__()
        # What a checkpoint stores, to build the same network again: plain values only.
        self.arch = dict(
            channels=channels,
            width=width,
            mult=tuple(mult),
            attn=tuple(attn),
            patch=patch,
            dropout=dropout,
            sd=sd,
        )
        self.sd = sd
        self.patch = patch
        folded_channels = channels * patch**2
        emb_size = 128
        widths = [width * factor for factor in mult]
        last = len(widths) - 1

        # The noise level enters as sines and cosines of ln tan(phi) = ln(sigma/sd), which spans
        # [-6.4, 5.6] on MNIST. Half a period is pi/frequency: from 12.6, the whole range, down to
        # 0.4. Not persistent: it is a constant, not a weight to be saved.
        frequencies = torch.exp(torch.linspace(math.log(0.25), math.log(8.0), 16))
        self.register_buffer("freq", frequencies, persistent=False)
        self.embed = nn.Sequential(
            nn.Linear(32, emb_size),  # sine and cosine of each of the 16 frequencies
            nn.SiLU(),
            nn.Linear(emb_size, emb_size),
            nn.SiLU(),
        )

        self.stem = nn.Conv2d(folded_channels, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        for i, out_channels in enumerate(widths):
            finer = widths[max(i - 1, 0)]  # max: the first one takes what the stem gives
            self.down.append(Block(finer, out_channels, emb_size, attn[i], dropout))

        self.mid = Block(widths[-1], widths[-1], emb_size, True, dropout)

        # up[i] takes the features of the next coarser resolution. fuse[i] gives the skip of
        # resolution i as many channels, so that the two can be added.
        self.up = nn.ModuleList()
        for i, out_channels in enumerate(widths):
            coarser = widths[min(i + 1, last)]  # min: the coarsest one takes what `mid` gives
            self.up.append(Block(coarser, out_channels, emb_size, attn[i], dropout))
        self.fuse = nn.ModuleList()
        for i, skip_channels in enumerate(widths):
            coarser = widths[min(i + 1, last)]
            self.fuse.append(nn.Conv2d(skip_channels, coarser, 1))

        self.head = nn.Sequential(
            nn.GroupNorm(8, widths[0]),
            nn.SiLU(),
            nn.Conv2d(widths[0], folded_channels, 3, padding=1),
        )
        # The network starts with F = 0. Then x0_hat = sd cos(phi) y: the noisy image, made smaller.
        nn.init.zeros_(self.head[-1].weight)
        nn.init.zeros_(self.head[-1].bias)

    def forward(self, y, phi):
        """Map the noisy image y (B, C, H, W) at the angle phi (B,) to F, which is shaped like y."""
        angle = torch.log(torch.tan(phi))[:, None] * self.freq  # (B, 1) * (16,) -> (B, 16)
        emb = self.embed(torch.cat([angle.sin(), angle.cos()], 1))  # (B, 32) -> (B, 128)

        # (B, C, H, W) -> (B, C patch^2, H/patch, W/patch) -> (B, width, H/patch, W/patch)
        hidden = self.stem(F.pixel_unshuffle(y, self.patch))
        skips = []
        for i, block in enumerate(self.down):
            if i > 0:
                hidden = F.avg_pool2d(hidden, 2)
            hidden = block(hidden, emb)
            skips.append(hidden)

        hidden = self.mid(hidden, emb)

        coarsest = len(self.up) - 1
        for i in reversed(range(len(self.up))):
            if i < coarsest:
                hidden = F.interpolate(hidden, scale_factor=2)
            hidden = self.up[i](hidden + self.fuse[i](skips[i]), emb)
        return F.pixel_shuffle(self.head(hidden), self.patch)


def describe_network(net, shape):
    """Say in words how large a network is, and what it costs for one image of shape (C, H, W)."""
    device = next(net.parameters()).device
    with FlopCounterMode(display=False) as counter:
        net(torch.zeros(1, *shape, device=device), torch.ones(1, device=device))
    num_parameters = sum(weight.numel() for weight in net.parameters())
    num_flops = counter.get_total_flops()
    return f"{num_parameters / 1e6:.2f} M parameters, {num_flops / 1e9:.3f} GFLOP forward an image"


class ExactNet:
    """A perfect network that is no network: it computes F(y, phi) from a formula for the noise.

    z_hat  the formula, a function (x_hat, sigma) -> E[z | x_hat], shaped like x_hat
    sd     standard deviation of the data, see "The circle"

    Losses, samplers and likelihood take it like any network. So their results can be compared with
    exact answers, in the tests and in the toy (01).
    """

    def __init__(self, z_hat, sd=1.0):
        self.z_hat = z_hat
        self.sd = sd

    def __call__(self, y, phi):
        """Compute F, shaped like y (B, ...), at the angle phi (B,)."""
        sigma = self.sd * torch.tan(phi)
        x_hat = y * expand_like(torch.sqrt(sigma**2 + self.sd**2), y)
        z_hat = self.z_hat(x_hat, sigma)
        x0_hat = x_hat - expand_like(sigma, y) * z_hat

        # The map of "The circle", (x0_hat/sd, z_hat) -> F. F = (sin y - z_hat)/cos would be the
        # same, but it divides by almost zero at high noise.
        sin = torch.sin(expand_like(phi, y))
        cos = torch.cos(expand_like(phi, y))
        return sin * x0_hat / self.sd - cos * z_hat


class GaussianMixture(ExactNet):
    """The exact network for data from the mixture SUM_k w_k N(m_k, S_k) of K Gaussians.

    means    (K, D) the m_k
    covs     (K, D, D) the S_k
    weights  (K,) the w_k; they are normalised here
    sd       standard deviation of the data, see "The circle"

    It takes points (B, D), or images of D numbers. At noise level sigma, x_hat is from the mixture
    SUM_k w_k N(m_k, S_k + sigma^2 I). The best estimate of the noise is

        z_hat = SUM_k r_k E_k[z | x_hat]
        E_k[z | x_hat] = sigma (S_k + sigma^2 I)^-1 (x_hat - m_k)

    Here r_k is the probability that x_hat comes from component k, and E_k is the mean if it does.
    """

    def __init__(self, means, covs, weights, sd=1.0):
        # ExactNet's __init__ is not called: here z_hat is a method, not a function that is given.
        self.means = means
        self.covs = covs
        self.weights = weights / weights.sum()
        self.sd = sd
        # S = Q diag(eigenvalues) Q', where Q' is Q transposed. On the axes Q the matrix
        # S + sigma^2 I is diagonal at every sigma, so one decomposition inverts them all.
        self.eigenvalues, self.eigenvectors = torch.linalg.eigh(covs)  # (K, D), (K, D, D)

    def components(self, x_hat, sigma):
        """Compute for each of the K components how it explains x_hat (B, ...) at noise sigma (B,).

        Returns three tensors:

        log_p      (B, K) ln(w_k N_k(x_hat)), where N_k is the density of N(m_k, S_k + sigma^2 I)
        z          (B, K, D) E_k[z | x_hat]
        variances  (B, K, D) of S_k + sigma^2 I on its own axes
        """
        level = sigma[:, None, None]
        variances = self.eigenvalues + level**2  # (K, D) and (B, 1, 1) -> (B, K, D)

        # (B, ...) -> (B, 1, D); minus (K, D) -> (B, K, D); then Q' (x - m), on the axes of S_k
        offset = x_hat.flatten(1)[:, None] - self.means
        local = torch.einsum("kde,bkd->bke", self.eigenvectors, offset)

        # ln N = -1/2 SUM_d [local_d^2/variance_d + ln variance_d + ln 2 pi]
        terms = local**2 / variances + variances.log() + math.log(2 * math.pi)
        log_p = self.weights.log() - 0.5 * terms.sum(-1)

        # Back to the common axes: sigma Q diag(1/variances) Q' (x - m).
        z = level * torch.einsum("kde,bke->bkd", self.eigenvectors, local / variances)
        return log_p, z, variances

    def log_prob(self, x, sigma=None):
        """Compute the log-density (B,) of noisy data x0 + sigma z at x (B, ...).

        sigma is (B,); without it the density is that of clean data.
        """
        if sigma is None:
            sigma = x.new_zeros(len(x))
        log_p, _, _ = self.components(x, sigma)
        return torch.logsumexp(log_p, 1)

    def z_hat(self, x_hat, sigma):
        """The exact noise estimate E[z | x_hat], shaped like x_hat."""
        log_p, z, _ = self.components(x_hat, sigma)
        share = log_p.softmax(1)[:, :, None]  # r_k, by Bayes' rule: (B, K) -> (B, K, 1)
        return (share * z).sum(1).reshape(x_hat.shape)

    def second_moment(self, x_hat, sigma):
        """Compute the matrix E[z z' | x_hat], as (B, D, D); 01 needs it for the optimum of Ort.

        For one component it is Cov_k[z | x_hat] + E_k[z] E_k[z]', where Cov_k[z | x_hat] is
        S_k (S_k + sigma^2 I)^-1. The result is the mean of these over the components.
        """
        log_p, z, variances = self.components(x_hat, sigma)
        covariance = torch.einsum(
            "kde,bke,kfe->bkdf",
            self.eigenvectors,
            self.eigenvalues / variances,
            self.eigenvectors,
        )
        outer = z[..., None] * z[..., None, :]  # (B, K, D, 1) * (B, K, 1, D) -> (B, K, D, D)
        share = log_p.softmax(1)[:, :, None, None]  # r_k: (B, K) -> (B, K, 1, 1)
        return (share * (covariance + outer)).sum(1)

    def sample(self, n, generator=None):
        """Draw n exact samples, (n, D)."""
        # k is (n,): which component each sample comes from.
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        dim = self.means.shape[1]
        noise = torch.randn(n, dim, generator=generator, dtype=self.means.dtype)
        # m + Q diag(sqrt(eigenvalues)) noise has the covariance Q diag(eigenvalues) Q' = S.
        scaled_axes = self.eigenvectors[k] * self.eigenvalues[k, None].sqrt()
        return self.means[k] + torch.einsum("bde,be->bd", scaled_axes, noise)


# ==================================================================================================
# 4  Noise levels: which t a batch sees
# ==================================================================================================


def _stratified(n, device):
    """Draw n numbers in [0, 1), one from each interval of length 1/n, in random order: (n,).

    Each of them alone is uniform, but together they cover the range evenly. So the loss of a batch
    varies less from step to step, at no cost (Kingma et al. 2021, appendix I).
    """
    order = torch.randperm(n, device=device)
    return (order + torch.rand((), device=device)) / n  # one offset for all n


def uniform_t(n, sde, device="cpu"):
    """Draw t (n,) uniformly over the times of the SDE, as the paper does; see SDE.draw."""
    return sde.draw(_stratified(n, device))


def lognormal_t(n, sde, mean, std, uniform=0.0, device="cpu"):
    """Draw t (n,) such that ln sigma ~ N(mean, std^2), except for a uniform share.

    mean, std  of ln sigma
    uniform    share of the n for which ln sigma is uniform over the SDE's range instead

    The Gaussian is EDM's (Karras et al. 2022, Table 1). It spends most of the training near
    sigma = sd, where it is decided what an image shows. The uniform share is for both ends of the
    range: sampling and likelihood need them too, and the Gaussian hardly ever goes there.
    """
    t_min = torch.full((1,), sde.t_min(0.001), dtype=torch.float64)
    # max: with sub-VP, sigma(time_of(0.001)) is a rounding error below 0.001.
    low = math.log(max(0.001, sde.sigma(t_min).item()))
    high = math.log(sde.sigma_max())

    # The inverse distribution function makes a Gaussian number of a uniform one:
    # mean + std sqrt(2) erfinv(2u - 1). The clamp keeps erfinv away from -1 and 1, where it is
    # infinite.
    u = _stratified(n, device)
    log_sigma = mean + std * math.sqrt(2) * torch.erfinv((2 * u - 1).clamp(-0.999999, 0.999999))

    is_uniform = torch.rand(n, device=device) < uniform
    log_sigma = torch.where(is_uniform, low + (high - low) * u, log_sigma)
    t = sde.time_of(torch.exp(log_sigma.clamp(low, high)))
    return t.clamp(0, 1)  # rounding can take the ends a little further


# Settings of lognormal_t with which a network learns all its levels from scratch; see 02.
TRAINING_NOISE = {"mean": -1.0, "std": 1.4, "uniform": 0.1}

# ==================================================================================================
# 5  Losses
# ==================================================================================================
#
# MSGM minimises alpha L_g + (1 - alpha) L_f: L_g on images of D_g and L_f on images of D_f. The
# first two losses are L_g, the others are L_f. Each takes images x0 (B, ...) and times t (B,), and
# returns one number per image, (B,).
#
# In all of them z is the noise that was drawn, and z_hat is the network's estimate of it. The score
# of the model is -z_hat/std, and the score of the data given x0 is -z/std. That is why a loss of
# MSGM about two scores is written here as a loss about two noises. The weight lambda(t) of the
# paper's losses then cancels the powers of std.
#
# In the formulae, |a|^2 and a . b are means over the D values of an image, and a o b is the
# product of each value of a with that of b. s_g and s_f are the exact scores of D_g and of D_f.


def noised(net, sde, x0, t):
    """Draw noise z, add it to the images and let the network estimate it.

    x0 is (B, ...), t is (B,). Returns (x_hat, z, z_hat), each shaped like x0.
    """
    z = torch.randn_like(x0)
    sigma = sde.sigma(t)
    x_hat = x0 + expand_like(sigma, x0) * z  # x_t/s, for x_t = s x0 + std z
    _, z_hat = predict(net, x_hat, sigma)
    return x_hat, z, z_hat


def dsm_loss(net, sde, x0, t, weight="std2"):
    """L_g by denoising score matching: |z_hat - z|^2, how far the estimated noise is from the true.

    This is the paper's L_g (Song et al. 2021, eq. 7). In scores it is std^2 |score - (-z/std)|^2.

    weight  "std2": as written, with the paper's lambda(t) = std^2
            "v": divided by cos(phi)^2, which makes it |F - F*|^2. All noise levels then weigh
            alike, and training from scratch is far quicker
    """
    _, z, z_hat = noised(net, sde, x0, t)
    loss = flat_mean((z_hat - z) ** 2)
    if weight == "v":
        # z_hat - z = -cos(phi) (F - F*), and 1/cos^2 = 1 + tan^2 with tan(phi) = sigma/sd.
        return loss * (1 + (sde.sigma(t) / net.sd) ** 2)
    return loss


def distill_loss(net, base, sde, x0, t):
    """L_g by comparing with the Standard model `base`, which is frozen: |z_hat - z_hat_base|^2.

    This one is ours, for fine-tuning. dsm_loss compares with the drawn z, and most of its gradient
    is the randomness of z. Here the gradient is zero at the start and stays small.

    It keeps the score of all data, not the score of D_g alone. So the optimum of obt_rel_loss, see
    there, has kappa - 1 in place of kappa:

        s_g + (kappa - 1) p(D_f | x_t) (s_g - s_f)

    With kappa = 1 this is s_g, the score of Unseen. Only what kappa has above 1 pushes away from
    D_f. Where L_f sees a noise level q times as often as L_g does, kappa stands for q kappa here
    too.
    """
    x_hat, _, z_hat = noised(net, sde, x0, t)
    with torch.no_grad():  # the Standard model is a fixed target
        _, z_base = predict(base, x_hat, sde.sigma(t))
    return flat_mean((z_hat - z_base) ** 2)


def ort_loss(net, sde, x0, t, inner=False):
    """L_f of MSGM-Ort: push the score on D_f orthogonal to the data score -z/std.

    inner  False: elementwise, |z_hat o z|^2, as the authors' code has it. Its optimum shrinks the
           score
           True: the inner product that the name promises, (SUM_d z_hat_d z_d)^2 / D
    """
    _, z, z_hat = noised(net, sde, x0, t)
    # The product of two scores is a product of two noises divided by std^2, and here it is squared.
    # So both forms have the weight lambda = std^4. The poster's lambda = std^2 would leave a
    # division by std^2, and that blows up at low noise.
    if inner:
        dim = z[0].numel()
        return (z_hat * z).flatten(1).sum(1) ** 2 / dim
    return flat_mean((z_hat * z) ** 2)


def obt_loss(net, sde, x0, t, floor=-2.0):
    """L_f of MSGM-Obt: z_hat . z, for an obtuse angle between the score on D_f and the data score.

    floor  an image whose loss is below it stops pushing; None is for no floor. The loss itself has
           no lower bound: without a floor the scores run away

    The weight is lambda = std^2, one std for each of the two scores. Before unlearning the loss is
    positive: for the exact score z_hat . z is 1 - |z_hat - z|^2 on average.
    """
    _, z, z_hat = noised(net, sde, x0, t)
    # The sign is the POSTER's. The released code minimises -z_hat . z, which is what score matching
    # does already: it forgets nothing (tests/test_toy.py).
    loss = flat_mean(z_hat * z)
    if floor is None:
        return loss
    return loss.clamp(min=floor)


def obt_rel_loss(net, base, sde, x0, t):
    """L_f of Obt-rel (ours): z_hat . (z - z_hat_base), where `base` is the frozen Standard model.

    Obt makes the angle with z obtuse. This loss takes z - z_hat_base in its place: what D_f adds to
    the Standard model. On average over D_f it is -std grad log p(D_f | x_t). As a score, that is
    the direction in which an image becomes more like D_f and less like everything else. It vanishes
    at high noise, where no class can be seen yet. It also vanishes at low noise, where the class is
    certain. So the loss neither shrinks the score of D_g nor stops the denoising.

    With dsm_loss as L_g, at the same noise levels, the optimum is bounded. It is D_g's score,
    guided away from D_f:

        s_g + kappa p(D_f | x_t) (s_g - s_f) = s_g + kappa grad log p(D_g | x_t)
        kappa = (1 - alpha) pi_g / (2 alpha pi_f)

    Here pi_g and pi_f are the shares of D_g and D_f in the data. At a noise level that L_f sees q
    times as often as L_g does, q kappa takes the place of kappa. ESD (Gandikota et al. 2023) trains
    such guidance with prompts.
    """
    x_hat, z, z_hat = noised(net, sde, x0, t)
    with torch.no_grad():
        _, z_base = predict(base, x_hat, sde.sigma(t))  # at the same x_t, or nothing cancels
    return flat_mean(z_hat * (z - z_base))


# ==================================================================================================
# 6  Samplers
# ==================================================================================================


@torch.no_grad()
def pc_sample(
    net,
    sde,
    x,
    steps=1000,
    predictor="reverse_diffusion",
    corrector="langevin",
    snr=0.16,
    sigma_min=0.01,
    generator=None,
    after=None,
):
    """Sample by predictor and corrector, in equal steps of t (Song et al. 2021, Algorithm 1).

    x          (B, ...) the start x_T, from sde.prior(...)
    steps      how many times the predictor goes from one t to the next
    predictor  "euler_maruyama", "reverse_diffusion" or "ancestral"
    corrector  a step before each of the predictor's: "langevin", "ald" or None, see langevin_step
    snr        size of the Langevin step, as a ratio of signal to noise
    sigma_min  noise level at which it stops
    generator  of the noise; None takes torch's global one
    after      function (x, t) -> x that changes x after each corrector and each predictor step:
               inpainting puts the known pixels back with it

    Returns x0_hat, shaped like x. It takes steps + 1 network evaluations, with the corrector
    2 steps + 1. No image depends on the others of its batch; points do, see langevin_step. Raises
    ValueError for an unknown predictor or corrector.

    What score_sde's configurations do: VE has "reverse_diffusion" with "langevin" (2001
    evaluations), VP and sub-VP have "euler_maruyama" and no corrector (1000 evaluations).
    """
    if predictor not in ("euler_maruyama", "reverse_diffusion", "ancestral"):
        raise ValueError(f"unknown predictor {predictor!r}")
    if corrector not in ("langevin", "ald", None):
        raise ValueError(f"unknown corrector {corrector!r}")

    times = torch.linspace(sde.T, sde.t_min(sigma_min), steps + 1, device=x.device)
    for time_now, time_next in zip(times[:-1], times[1:]):
        t = time_now.expand(len(x))  # () -> (B,)
        t_next = time_next.expand(len(x))

        # The forward step from t_next to t is exactly x_t = decay x_{t_next} + sqrt(added) n with
        # n ~ N(0, I). So `decay` scales the signal, and `added` is a variance.
        decay = expand_like(sde.s(t) / sde.s(t_next), x)
        added = expand_like(sde.std(t) ** 2, x) - decay**2 * expand_like(sde.std(t_next) ** 2, x)

        if corrector is not None:
            score = score_fn(net, sde, x, t)
            noise = randn(x.shape, generator, x.device)
            x = langevin_step(x, score, noise, sde.std(t), decay, snr, corrector)
            if after is not None:
                x = after(x, t)

        score = score_fn(net, sde, x, t)
        noise = randn(x.shape, generator, x.device)
        if predictor == "euler_maruyama":
            # The reverse SDE, dx = (f - g^2 score) dt + g dw backwards in time (their eq. 6).
            g_squared = expand_like(sde.diffusion(t) ** 2, x)
            dt = time_now - time_next
            x = x - (sde.drift(x, t) - g_squared * score) * dt + torch.sqrt(g_squared * dt) * noise
        elif predictor == "reverse_diffusion":
            # The forward step turned round (their appendix E): 2 - decay = 1 + (1 - decay).
            x = (2 - decay) * x + added * score + torch.sqrt(added) * noise
        else:
            # "ancestral": the exact mean and variance of x_{t_next} given x_t and x0_hat (Ho et al.
            # 2020, eq. 7; for VE, Song et al. 2021, appendix F). For VP score_sde adds noise of
            # variance beta_k here (Ho's other choice). That is exact for data of variance 1 alone;
            # ours is exact for a single image, and less noise suits data that lies on few points.
            variance = added * expand_like((sde.std(t_next) / sde.std(t)) ** 2, x)
            x = (x + added * score) / decay + torch.sqrt(variance) * noise
        if after is not None:
            x = after(x, t_next)

    # A last denoising step: x still carries noise of the level sigma_min.
    t = times[-1].expand(len(x))
    x0_hat, _ = predict(net, x / expand_like(sde.s(t), x), sde.sigma(t))
    return x0_hat


def langevin_step(x, score, noise, std, decay, snr=0.16, norms="langevin"):
    """Take one step of Langevin dynamics at a fixed noise level: uphill in density, plus noise.

    x, score, noise  (B, ...); the noise is from N(0, I)
    std              (B,) standard deviation of the noise in x
    decay            (B, 1, ...) factor on the signal between this level and the next, 1 for VE
    snr              size of the step, as a ratio of signal to noise
    norms            "langevin": the lengths of score and noise are measured. "ald": they are put at
                     their expectation, |score| = |noise|/std

    Returns x after the step, shaped like x. The step is x + eps score + sqrt(2 eps) noise with
    eps = 2 a (snr |noise|/|score|)^2 and a = decay^2 (Song et al. 2021, Algorithms 4 and 5).

    Both are correctors of score_sde, "langevin" is its default. Its code averages the lengths over
    the batch, so that an image depends on the others. Ours measures each image by itself, which is
    possible because a length over hundreds of values hardly fluctuates. A network's score is
    shorter at low noise than the true one: there "ald" takes smaller steps.
    """
    if norms == "ald":
        ratio = std
    else:
        noise_length = noise.flatten(1).norm(dim=1)  # (B, ...) -> (B,)
        score_length = score.flatten(1).norm(dim=1)
        if x[0].numel() < 64:
            # A single point's score can be near 0, and its step would throw it far away. In few
            # dimensions we average over the batch as score_sde does.
            noise_length = noise_length.mean().expand(len(x))
            score_length = score_length.mean().expand(len(x))
        ratio = noise_length / score_length
    eps = 2 * decay**2 * (snr * expand_like(ratio, x)) ** 2
    return x + eps * score + torch.sqrt(2 * eps) * noise


def karras_sigmas(n, sigma_max, sigma_min=0.01, rho=7.0):
    """Make n noise levels (n,) float32 that fall from sigma_max to sigma_min, dense at the low end.

    Karras et al. 2022, eq. 5. Theirs end with a zero more: our samplers end by returning x0_hat.
    """
    ramp = torch.linspace(0, 1, n, dtype=torch.float64)
    # Equal steps in sigma^(1/rho): with rho = 7 most of them end up at small sigma.
    first = sigma_max ** (1 / rho)
    last = sigma_min ** (1 / rho)
    return (first + ramp * (last - first)).pow(rho).float()


def heun_solve(net, x_hat, sigmas):
    """Solve the probability-flow ODE dx_hat/dsigma = z_hat with Heun's method, in either direction.

    x_hat   (B, ...) the point x0 + sigma z at sigmas[0]
    sigmas  (N,) noise levels, falling from noise to data or rising from data to noise

    Returns x_hat at the last level. It takes 2 (N - 1) network evaluations, and its error falls to
    a quarter when the number of steps doubles. The same equation serves every SDE (Song et al.
    2021, eq. 13; Karras et al. 2022, Algorithm 1). SDEs differ in how fast they run along its path,
    not in the path.

    Why in sigma, when the likelihood is solved in phi: with x0_hat and z_hat constant the path is
    straight in sigma, so even one step is exact. In phi it is a circle, which a straight step
    leaves; with few steps that error is larger than all others.
    """
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:]):
        # Heun: take a trial step to sigma_next, then do the step with the mean of both slopes.
        step = sigma_next - sigma
        _, z_hat = predict(net, x_hat, sigma.expand(len(x_hat)))  # () -> (B,)
        trial = x_hat + step * z_hat
        _, z_hat_next = predict(net, trial, sigma_next.expand(len(x_hat)))
        x_hat = x_hat + step * (z_hat + z_hat_next) / 2
    return x_hat


@torch.no_grad()
def ode_sample(net, noise, sigmas):
    """Sample by the probability-flow ODE: all randomness is in the noise at the start.

    noise   (B, ...) from N(0, I)
    sigmas  (N,) noise levels, falling, e.g. from karras_sigmas

    Returns x0_hat. It takes 2 (N - 1) + 1 network evaluations. This is the sampler of EDM (Karras
    et al. 2022, Algorithm 1): its last step, Euler's from sigma to 0, is x0_hat.
    """
    sigmas = sigmas.to(noise.device)
    # At the start x_hat = x0 + sigma z. The data term is left out: it is small beside sigma z.
    x_hat = heun_solve(net, noise * sigmas[0], sigmas)
    x0_hat, _ = predict(net, x_hat, sigmas[-1:].expand(len(x_hat)))
    return x0_hat


@torch.no_grad()
def dpmpp_sample(net, noise, sigmas, eta=0.0, generator=None):
    """Sample with DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2), or its stochastic form.

    noise      (B, ...) from N(0, I)
    sigmas     (N,) noise levels, falling, e.g. from karras_sigmas
    eta        0: the deterministic solver; 1: SDE-DPM-Solver++(2M) of the same paper
    generator  of the noise that eta > 0 adds

    Returns x0_hat. It takes N network evaluations. A step would be exact if x0_hat were constant on
    it. To second order x0_hat is a line through its last two values, and they cost nothing new. So
    a step takes one evaluation, where Heun's takes two. The fresh noise of eta > 0 washes out the
    errors of earlier steps, which samples of small networks in few steps need.
    """
    x = noise * sigmas[0]
    sigmas = sigmas.to(noise.device)
    x0_before = None
    step_before = None
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:]):
        x0_hat, _ = predict(net, x, sigma.expand(len(x)))
        step = torch.log(sigma / sigma_next)  # the paper's h, a step in lambda = -ln sigma

        # Extrapolate x0_hat to the middle of the step, by the line through the last two.
        x0_middle = x0_hat
        if x0_before is not None:
            x0_middle = x0_hat + 0.5 * step / step_before * (x0_hat - x0_before)

        # The exact step for a constant x0, with h = step:
        # x <- sigma_next/sigma e^(-eta h) x + (1 - e^(-(1 + eta) h)) x0 + noise
        keep = sigma_next / sigma * torch.exp(-eta * step)
        x = keep * x - torch.expm1(-(1 + eta) * step) * x0_middle
        if eta:
            std = sigma_next * torch.sqrt(-torch.expm1(-2 * eta * step))
            x = x + std * randn(x.shape, generator, x.device)
        x0_before = x0_hat
        step_before = step

    x0_hat, _ = predict(net, x, sigmas[-1].expand(len(x)))
    return x0_hat


class Recorder(nn.Module):
    """A network that remembers what it was asked: the way of the samples, with any sampler.

    net    the network that answers
    limit  how many questions are kept: the first ones
    seen   list of (sigma, x), one for each evaluation. x (B, ...) is x_hat shrunk to the standard
           deviation of the data, so that noise and samples fit into one picture
    """

    def __init__(self, net, limit=math.inf):
        super().__init__()
        self.net = net
        self.sd = net.sd
        self.limit = limit
        self.seen = []

    def forward(self, y, phi):
        """Answer as the network does."""
        if len(self.seen) < self.limit:
            sigma = self.sd * math.tan(phi[0].item())
            self.seen.append((sigma, self.sd * y))
        return self.net(y, phi)


# Goes up when one of the samplers above gives other images than before. Kept images carry it, so
# that images of an older version are not taken for new ones. 2: Heun in sigma, measured Langevin.
SAMPLER_VERSION = 2


def sample_images(
    net,
    n,
    shape,
    sde,
    seed,
    nfe=20,
    eta=1.0,
    sigma_max=80.0,
    batch=250,
    device="cpu",
    label="sampling",
    bf16=False,
):
    """Draw n images (n, *shape) of bytes, where shape is (C, H, W), and print the progress.

    sde        DDPM is sampled by pc_sample's ancestral steps, every other SDE by dpmpp_sample
    seed       of all random numbers
    nfe        network evaluations per image
    eta        of dpmpp_sample
    sigma_max  noise level at which dpmpp_sample starts, if the SDE goes so high
    batch      images that are drawn at once
    label      first words of the progress line; "" prints nothing
    bf16       whether the network computes in bfloat16

    Batch k draws from its own generators, seeded by (seed, k). So the same seed gives each network
    the same noise, at the start and on the way, and a pair of pictures before and after differs by
    the networks alone. Exits with one line if a sample is not finite.
    """
    sigmas = karras_sigmas(nfe, min(sigma_max, sde.sigma_max()))
    start = time.time()

    def sample_batch(k):
        """Draw the images from k * batch to (k + 1) * batch."""
        # Always a whole batch, even if fewer are wanted: so image i does not depend on n.
        noise = randn((batch, *shape), rng(seed, k), device)
        generator = rng(seed, k, 1)  # of the noise on the way
        with bfloat16(device, bf16):
            if sde.sampler == "ancestral":
                # The noise serves as x_T, because DDPM's std(T) is 1 to four digits. nfe - 1 steps:
                # the last evaluation is the final denoising.
                x = pc_sample(
                    net, sde, noise, nfe - 1, "ancestral", corrector=None, generator=generator
                )
            else:
                x = dpmpp_sample(net, noise, sigmas, eta, generator)
        if not torch.isfinite(x).all():
            exit_with_error(
                "sampling gave numbers that are not finite: "
                "the model has diverged (more --alpha, or a lower --lr)"
            )
        num_done = min(n, (k + 1) * batch)
        if label:
            print(f"\r{label}: {num_done}/{n}, {time.time() - start:.0f} s", end="", flush=True)
        return to_bytes(x.cpu())

    batches = share_work(sample_batch, range(math.ceil(n / batch)))
    if label:
        print()
    return torch.cat(batches)[:n]


# ==================================================================================================
# 7  Likelihood
# ==================================================================================================


def rademacher_probes(x, k, generator=None):
    """Draw k probes v of random signs, each shaped like x, with which a trace is estimated.

    For any matrix A the sum of v' A v over the probes is tr A on average (Hutchinson 1990; Song et
    al. 2021, eq. 40). Here A is the Jacobian dF/dy of one image, which is too large to be computed.
    """
    # Signs, never Gaussians: v_i^2 is always 1, so the diagonal of A enters exactly. Only the rest
    # of A makes noise.
    probes = []
    for _ in range(k):
        signs = torch.randint(0, 2, x.shape, generator=generator).to(x) * 2 - 1
        probes.append(signs / math.sqrt(k))
    return probes


def basis_probes(x):
    """Make the D unit vectors, each shaped like x: probes that give the trace exactly.

    Each of them costs one backward pass, which is bearable for D up to about 64.
    """
    eye = torch.eye(x[0].numel(), dtype=x.dtype, device=x.device)
    # Each row of `eye`: (D,) -> (1, ...) -> (B, ...), the same vector for every image.
    return [row.reshape(x[:1].shape).expand_as(x) for row in eye]


def _velocity_and_trace(net, y, phi, probes):
    """Compute the velocity dy/dphi = -F (B, ...) and an estimate of tr(dF/dy) (B,).

    phi is a scalar tensor. It takes one forward pass, and one backward pass per probe v: autograd
    gives the product v' dF/dy without the matrix dF/dy.
    """
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        out = net(y, phi.expand(len(y)))
        trace = 0
        for v in probes:
            is_last = v is probes[-1]  # only the last product may free the graph
            (product,) = torch.autograd.grad(out, y, v, retain_graph=not is_last)
            trace = trace + (product * v).flatten(1).sum(1)
    return -out.detach(), trace


@no_tf32()
def ode_log_likelihood(net, sde, x, probes=None, steps=30, sigma_min=0.001, focus=-1.5):
    """Compute the log-likelihood ln p(x) in nats, (B,), by the probability-flow ODE.

        ln p(x) = ln N(y_T; 0, I) - INT tr(dF/dy) dphi - D ln sqrt(sigma_0^2 + sd^2) - D ln s(t_0)

    This is eq. 39 of Song et al. 2021, the change of variables along dy/dphi = -F(y, phi). The path
    starts at x, which counts as x_t at a time t_0 where the noise level sigma_0 is sigma_min. It
    ends at y_T, where y is almost N(0, I). INT is the integral along the path.

    x          (B, ...) on the scale of dequantize, from -1 to 1
    probes     see rademacher_probes and basis_probes; by default one Rademacher probe, the same
               along the whole path
    steps      of the Runge-Kutta method, with 4 network evaluations each
    sigma_min  noise level at which the path starts, just above the data
    focus      the value of ln sigma around which the steps are dense. -1.5 is where shapes form. -3
               suits dequantised images, whose finest structure is a grey level: with it 16 steps
               err by .0024 bits/dim (tests/benchmark.py), with -1.5 by more than twice that

    To see the error of the solver, compare with the result of twice the steps.
    """
    if probes is None:
        probes = rademacher_probes(x, 1)

    # The nodes are equal steps of sigmoid((ln sigma - focus)/node_scale). A sigmoid is steep in the
    # middle, so they are dense around the focus and thin out exponentially on both sides.
    node_scale = 2.0
    ends = torch.tensor([sigma_min, sde.sigma_max()], dtype=torch.float64)
    first, last = torch.sigmoid((ends.log() - focus) / node_scale)
    ramp = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    log_sigmas = focus + node_scale * torch.logit(ramp * (last - first) + first)
    phis = torch.atan(log_sigmas.exp() / net.sd).to(x)

    # The start of the path is y = x/(s_0 c_0). Dividing D numbers by s_0 c_0 raises their density
    # by the factor (s_0 c_0)^D, and at the end this is taken off again.
    s_0 = sde.s(sde.time_of(ends[:1])).item()
    c_0 = math.sqrt(sigma_min**2 + net.sd**2)
    dim = x[0].numel()
    y = x / (s_0 * c_0)

    # RK4 for y and for the integral of the trace at once: the trace comes from the same evaluation.
    integral = 0.0
    for phi, phi_next in zip(phis[:-1], phis[1:]):
        step = phi_next - phi
        middle = phi + 0.5 * step
        slope1, trace1 = _velocity_and_trace(net, y, phi, probes)
        slope2, trace2 = _velocity_and_trace(net, y + 0.5 * step * slope1, middle, probes)
        slope3, trace3 = _velocity_and_trace(net, y + 0.5 * step * slope2, middle, probes)
        slope4, trace4 = _velocity_and_trace(net, y + step * slope3, phi_next, probes)
        y = y + step / 6 * (slope1 + 2 * slope2 + 2 * slope3 + slope4)
        integral = integral + step / 6 * (trace1 + 2 * trace2 + 2 * trace3 + trace4)

    # ln N(y_T; 0, I): at the largest sigma y is nearly pure noise.
    prior = -0.5 * (y.flatten(1).square().sum(1) + dim * math.log(2 * math.pi))
    return prior - integral - dim * math.log(c_0) - dim * math.log(s_0)


def bits_per_dim(log_p, dim):
    """Turn the log-density of 8-bit images into bits per dimension: fewer is more likely.

    log_p  (B,) or float, ln p in nats on the scale of dequantize
    dim    D, how many numbers an image has
    """
    # On that scale a grey level is 1/128 wide. So a byte image has the probability p/128^D, and
    # -log2(p/128^D)/D = -ln p/(D ln 2) + 7. (score_sde, the code of Song et al., has an unexplained
    # "7 -" and, for images in [0, 1], an 8.)
    return -log_p / (dim * math.log(2)) + 7


# ==================================================================================================
# 8  Judge and measures
# ==================================================================================================


def _conv_norm_relu(in_channels, out_channels, kernel_size, stride=1):
    """Make the three layers of one stage of the Judge, as a list."""
    padding = kernel_size // 2
    return [
        # No bias: the norm that follows would take it out again.
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    ]


class Judge(nn.Module):
    """A classifier of real images, which judges samples.

    It says which class a sample is and how sure it is, and it gives features for a distance.

    channels  of the images. 1 makes a small network that is defined here. Any other number makes
              the ResNet-18 of torchvision, with the small first layer that is usual at 32x32
    classes   how many classes there are
    """

    def __init__(self, channels=1, classes=10):
        super().__init__()
        self.arch = dict(channels=channels, classes=classes)
        # As in the U-Net, names and order of the layers belong to the saved judges.
        if channels == 1:
            feature_size = 96
            layers = [
                *_conv_norm_relu(1, 32, 5, stride=2),
                *_conv_norm_relu(32, 64, 3),
                nn.MaxPool2d(2),
                *_conv_norm_relu(64, 64, 3),
                *_conv_norm_relu(64, 96, 3),
            ]
        else:
            from torchvision.models import resnet18

            feature_size = 512
            layers = [*_conv_norm_relu(channels, 64, 3), nn.MaxPool2d(2)]
            # Children 4 to 7 of resnet18 are its four stages of residual blocks. The ones before
            # are its first layer, made for 224x224. The ones after are its pooling and classifier.
            layers += list(resnet18().children())[4:8]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(feature_size, classes)

    def forward(self, images):
        """Map bytes (B, C, H, W) to logits (B, classes) and features (B, 96), or (B, 512).

        It takes bytes, so that real and generated images are prepared in the same way.
        """
        # The middle of each grey level, on the scale of dequantize.
        x = (images.float() + 0.5) / 128 - 1
        features = self.body(x).mean((2, 3))  # (B, d, H', W') -> (B, d)
        return self.head(features), features


def random_affine(x):
    """Turn, scale and shift each of the images (B, C, H, W) at random and by a little.

    At most by 10 degrees, 10 % of the size and 2 pixels. The class of an image stays the same, and
    the judge learns not to depend on where and how large a thing is.
    """
    num_images = len(x)
    limits = torch.tensor([[0.17], [0.1]], device=x.device)  # radians; share of the size
    turn, growth = (torch.rand(2, num_images, device=x.device) * 2 - 1) * limits

    # Rotation matrices, (B, 4) -> (B, 2, 2).
    entries = [torch.cos(turn), -torch.sin(turn), torch.sin(turn), torch.cos(turn)]
    rotation = torch.stack(entries, 1).reshape(num_images, 2, 2)
    matrix = rotation * (1 + growth)[:, None, None]

    # For affine_grid an image goes from -1 to 1, so 2 of its W pixels are 4/W wide.
    shift = (torch.rand(num_images, 2, 1, device=x.device) * 2 - 1) * 4 / x.shape[-1]
    theta = torch.cat([matrix, shift], 2)  # (B, 2, 2) and (B, 2, 1) -> (B, 2, 3)
    grid = F.affine_grid(theta, x.shape, align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def fit_judge(data, epochs, batch_size=128, lr=4e-3, seed=0, device="cpu"):
    """Train a Judge on a Dataset, with small random shifts, turns and scalings.

    data        the Dataset, see "Data"
    epochs      length of the training: in each it sees as many images as there are. They are drawn
                with replacement, so one image may come twice and another not at all
    batch_size  images per step, at most as many as there are
    lr          peak learning rate
    seed        of torch's global generator, which is set here

    Returns the Judge in eval mode.
    """
    torch.manual_seed(seed)
    num_images = len(data.images)
    batch_size = min(batch_size, num_images)
    judge = Judge(data.images.shape[1], len(data.classes)).to(device)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=lr, weight_decay=0.02, fused=True)

    steps = epochs * (num_images // batch_size)
    num_skipped = 0
    for step in range(steps):
        set_lr([optimizer], step, steps, warmup=100)
        index = torch.randint(num_images, (batch_size,))
        images = data.images[index].to(device).float()
        target = data.labels[index].to(device)
        logits, _ = judge(random_affine(images))
        loss = F.cross_entropy(logits, target)
        loss.backward()
        # skipped is always 0: bad steps are left out, and the training goes on to its end.
        num_skipped += guarded_step(judge, [optimizer], skipped=0, clip=5.0)
        if step % 200 == 0 or step == steps - 1:
            text = skipped_text(num_skipped)
            print(f"judge step {step}/{steps}  loss {loss.item():.3f}{text}", flush=True)
    refuse_skipped(num_skipped, steps)
    return judge.eval()  # its batch norms now use what they have learnt, not the batch


SURE = 0.8  # a judge that gives its class a lower probability counts as unsure


class Verdict(NamedTuple):
    """What a judge says about n images, on the CPU."""

    labels: torch.Tensor  # (n,) int64, the most probable class
    confidence: torch.Tensor  # (n,) in [0, 1], the probability of that class
    features: torch.Tensor  # (n, d) float64, the judge's features, for frechet_distance
    roughness: torch.Tensor  # (n,), see roughness; it needs no judge


@torch.no_grad()
def judge_images(judge, images, batch=500):
    """Judge bytes (n, C, H, W), `batch` at a time, and return the Verdict."""
    device = next(judge.parameters()).device
    labels = []
    confidences = []
    features = []
    roughnesses = []
    for chunk in images.split(batch):
        logits, feature = judge(chunk.to(device))
        confidence, label = logits.softmax(1).max(1)
        labels.append(label.cpu())
        confidences.append(confidence.cpu())
        features.append(feature.cpu().double())  # float64 for the covariances of a distance
        roughnesses.append(roughness(chunk).cpu())
    return Verdict(*map(torch.cat, (labels, confidences, features, roughnesses)))


def roughness(images):
    """Measure how much a small blur takes away from bytes (n, C, H, W): (n,) float32.

    It is the mean over pixels of (x - blur(x))^2, with x in [0, 1], where the blur makes each pixel
    the mean of 3 x 3 pixels. Of noise whose pixels know nothing of each other that is 8/9 of the
    variance.
    """
    x = images.float() / 255
    # The edge is repeated, so that pixels there have nine neighbours too.
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return (x - blurred).square().flatten(1).mean(1)


def is_noise(verdict, real):
    """Return which samples are noise, (n,) bool: those rougher than every real image.

    verdict  on the samples
    real     Verdict on N real images

    One more real image is called noise with probability 1/(N + 1): when it is the roughest of all.

    The judge has no class for noise. It calls some of it a 3, and is sometimes sure of that.
    """
    return verdict.roughness > real.roughness.max()


def frechet_distance(a, b):
    """Compute the Frechet distance of two sets of features (n_a, d) and (n_b, d), as a float.

        |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^1/2)

    This is the distance of two Gaussians with the means m and the covariances S of the two sets,
    with the divisor n - 1 (Heusel et al. 2017, eq. 6). With the judge's features it is called FD.
    FID is the same with the features of the Inception network, on another scale. Compare two FD
    only if n is the same, because FD has a bias that falls as 1/n. A set with fewer than two points
    gives nan.
    """
    if min(len(a), len(b)) < 2:
        return math.nan  # one point has no covariance
    a = a.double()
    b = b.double()
    cov_a = torch.cov(a.T)
    cov_b = torch.cov(b.T)

    # tr (S_a S_b)^1/2 = tr (R S_b R)^1/2 with R = S_a^1/2, which is `root`. R S_b R is symmetric,
    # so eigvalsh does: no complex numbers, and no scipy. Rounding can make eigenvalues that are 0
    # slightly negative, hence the clamps.
    eigenvalues, eigenvectors = torch.linalg.eigh(cov_a)
    root = (eigenvectors * eigenvalues.clamp(min=0).sqrt()) @ eigenvectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()

    between_means = (a.mean(0) - b.mean(0)).square().sum()
    return (between_means + cov_a.trace() + cov_b.trace() - 2 * cross).item()


def wilson(k, n, z=1.96):
    """Compute the 95 % interval of a share, k of n (Wilson 1927), as (low, high).

    z is the quantile of the normal distribution; 1.96 stands for 95 %. At 0 of n this is still an
    interval, about [0, 3.8/n], where the usual p +- z sqrt(p (1 - p)/n) would have no width.
    """
    # (p + z^2/2n +- z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n)
    share = k / n
    denominator = 1 + z * z / n
    middle = (share + z * z / (2 * n)) / denominator
    half = z / denominator * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def measure(verdict, forget, real, num_classes, standard=None):
    """Measure how well a set of samples has forgotten, and what the forgetting has cost.

    verdict      the judge's Verdict on the n samples
    forget       list of the class indices that were to be forgotten
    real         Verdict on real training images of D_g
    num_classes  how many classes the judge knows
    standard     Verdict on the samples of the Standard model from the same noise, to compare with;
                 None if there is nothing to compare with, as for the Standard model itself

    Returns a dict; every share is in percent:

    ur               unlearning ratio: share of the samples that the judge calls a forget class
    ur_interval      [low, high], the 95 % Wilson interval of ur
    ur_no_noise      the same share without the samples that are noise, see is_noise
    noise            share of the samples that are noise
    low_confidence   share of the samples of which the judge is less than 80 % sure
    fd               Frechet distance of the samples to the images of `real`
    class_min_ratio  only with `standard`: what is left of the kept class that lost most; 1 is all
    instead_...      only with `standard`: what stands where it drew a forget class, see instead
    class_counts     number of samples in each class

    Never read one of them alone, because each can be cheated. Samples of a single other class have
    an ur of 0. Noise has any ur, as the judge guesses; `noise` and low_confidence show it.
    """
    num_samples = len(verdict.labels)
    # True for a sample that shows a forget class: it belongs to D_f, which was to be forgotten.
    is_forgotten = torch.isin(verdict.labels, torch.tensor(forget))
    low, high = wilson(is_forgotten.sum().item(), num_samples)
    noise = is_noise(verdict, real)
    is_unsure = verdict.confidence < SURE
    counts = torch.bincount(verdict.labels, minlength=num_classes)

    result = {
        "ur": percent(is_forgotten),
        "ur_interval": [100 * low, 100 * high],
        "ur_no_noise": percent(is_forgotten & ~noise),
        "noise": percent(noise),
        "low_confidence": percent(is_unsure),
    }

    if standard is None:
        # Leave out the samples of D_f: the Standard model is meant to draw them, so they must not
        # count as a distance to D_g.
        result["fd"] = frechet_distance(verdict.features[~is_forgotten], real.features)
    else:
        standard_forgotten = torch.isin(standard.labels, torch.tensor(forget))

        # Here the samples of D_f do count: an unlearned model is not meant to draw them. Take as
        # many samples as for the Standard model, because the distance has a bias that falls as 1/n.
        num_compared = int((~standard_forgotten).sum())
        result["fd"] = frechet_distance(verdict.features[:num_compared], real.features)

        before = torch.bincount(standard.labels, minlength=num_classes)
        ratios = class_ratios(counts, before, forget)
        ratios = ratios[~ratios.isnan()].tolist()
        result["class_min_ratio"] = min(ratios, default=math.nan)

        # Real test images may be fewer than samples.
        result.update(instead(is_forgotten, is_unsure, noise, standard_forgotten[:num_samples]))

    result["class_counts"] = counts.tolist()
    return result


def instead(is_forgotten, is_unsure, noise, standard_forgotten):
    """Say what stands where the Standard model drew a forget class, from the same noise.

    All arguments are (n,) bool, one value a sample. Returns a dict of four shares of the samples
    with `standard_forgotten`, in percent. They add up to 100, or are nan if there is no such one:

    instead_noise      noise
    instead_forgotten  still a forget class, and no noise
    instead_unsure     an image of which the judge is unsure
    instead_other      another class, of which the judge is sure
    """
    unsure = is_unsure & ~is_forgotten & ~noise
    parts = {
        "instead_noise": noise,
        "instead_forgotten": is_forgotten & ~noise,
        "instead_unsure": unsure,
        "instead_other": ~(noise | is_forgotten | unsure),
    }
    return {name: percent(part[standard_forgotten]) for name, part in parts.items()}


def percent(flags):
    """Return the share of True among flags (n,), in percent; nan if there are none."""
    return 100 * flags.float().mean().item()


# The measures that compare with the Standard model.
COMPARED = """
    class_min_ratio instead_other instead_unsure instead_noise instead_forgotten
""".split()


def class_ratios(after, before, forget):
    """Return what is left of each class that is to be kept: (num_classes,), 1 where all is left.

    after, before  (num_classes,) how many samples show each class
    forget         list of the classes to forget

    These are shares among the samples of D_g, not counts: otherwise every class would seem to grow
    when one disappears. 0/0 gives nan for the classes to forget and for those never drawn.
    """
    shares = []
    for counts in (after, before):
        kept = torch.as_tensor(counts).to(torch.float64, copy=True)
        kept[forget] = 0
        shares.append(kept / kept.sum().clamp(min=1))
    return shares[0] / shares[1]


# ==================================================================================================
# plumbing: skip on first reading
# ==================================================================================================

# ==================================================================================================
# 9  Data
# ==================================================================================================


class Dataset(NamedTuple):
    """One part of a data set, the training or the test part, whole in memory as bytes.

    There is no DataLoader: MNIST is 47 MB and a batch is one index into it, so worker processes
    would be pure overhead.
    """

    images: torch.Tensor  # (N, C, H, W) uint8
    labels: torch.Tensor  # (N,) int64, indices into `classes`
    classes: list  # names of the classes, str


# Arguments of UNet. We have measured DIGIT_NET. PHOTO_NET is the paper's network for CIFAR-10
# (width 128, (1, 2, 2, 2), attention at 16x16, dropout 0.1), but narrower: a step of 128 images
# takes 2.1 GiB of GPU memory, and 2.8 with width 128 (measured on an H100).
DIGIT_NET = {
    "channels": 1,
    "width": 48,
    "mult": (1, 2),
    "attn": (False, True),
    "patch": 2,
    "dropout": 0.0,
}
PHOTO_NET = {
    "channels": 3,
    "width": 96,
    "mult": (1, 2, 2, 2),
    "attn": (False, True, False, False),
    "patch": 1,
    "dropout": 0.1,
}
# 64x64 pixels go behind patch=2, so that the U-Net works on 32x32 again.
LARGE_PHOTO_NET = PHOTO_NET | {"patch": 2}

# What 02 trains with and 03 unlearns with, unless a flag says otherwise. batch_size and ema (the
# decay of the averaged weights) are as usual for these sets. The steps of LONG_RUN are a guess.
SHORT_RUN = {
    "train": {"steps": 30000, "batch_size": 64, "lr": 8e-3, "ema": 0.9995},
    "unlearn": {"steps": 260, "batch_size": 64},
}
LONG_RUN = {
    "train": {"steps": 200000, "batch_size": 128, "lr": 2e-3, "ema": 0.9999},
    "unlearn": {"steps": 500, "batch_size": 64},
}

# One row per data set. size: pixels a side. sd: standard deviation of a pixel on [-1, 1]. flip:
# whether a mirror image is as good as the image. net: arguments of UNet. Only the row of mnist is
# measured, the others are where to start. `folder` is anyone's own pictures: 64x64 if the first one
# has at least 64 pixels a side, else 32x32. They are not mirrored: they may hold letters.
RECIPES = {
    "mnist": dict(size=28, sd=0.6162, flip=False, net=DIGIT_NET, **SHORT_RUN),
    "fashion_mnist": dict(size=28, sd=0.706, flip=True, net=DIGIT_NET, **SHORT_RUN),
    "cifar10": dict(size=32, sd=0.5, flip=True, net=PHOTO_NET, **LONG_RUN),
    "stl10": dict(size=64, sd=0.5, flip=True, net=LARGE_PHOTO_NET, **LONG_RUN),
    "celeba": dict(size=64, sd=0.5, flip=True, net=LARGE_PHOTO_NET, **LONG_RUN),
    "imagenette": dict(size=64, sd=0.5, flip=True, net=LARGE_PHOTO_NET, **LONG_RUN),
    "folder": dict(size=None, sd=0.5, flip=False, net=DIGIT_NET | {"channels": 3}, **SHORT_RUN),
}

# The file to fetch by hand where a download fails, and where from.
FILES_TO_FETCH = {
    "fashion_mnist": "the four *-ubyte.gz files "
    "(31 MB; train images md5 8d4fb7e6c68d591d4c3dfef9ec88bf0d) "
    "of github.com/zalandoresearch/fashion-mnist",
    "cifar10": "cifar-10-python.tar.gz (170 MB, md5 c58f30108f718f92721af3b95e74349a) "
    "of www.cs.toronto.edu/~kriz",
    "stl10": "stl10_binary.tar.gz (2,640 MB, md5 91f7769df0f17e558f3565bffb0c7dfb) "
    "of ai.stanford.edu/~acoates/stl10",
    "celeba": "img_align_celeba.zip (1,443 MB, md5 00d2c5bc6d35e252742224ab0c1e8fcb), unpacked, "
    "and its five .txt, into celeba/ (or: pip install gdown)",
    "imagenette": "imagenette2-160.tgz (99 MB, md5 e793b78cc4c9e9a4ccc0c1155377a412) "
    "of s3.amazonaws.com/fast-ai-imageclas",
}


# What to do about files that are missing or damaged; the others can be fetched again.
REMEDIES = {
    "mnist": "restore mnist.npz with: git checkout data/mnist.npz (or drop --data-dir)",
    "folder": "mend the pictures, or name another folder with --data-dir",
}


def recipe(name):
    """Return the row of RECIPES for a data set; exit with the list of names if there is none."""
    if name not in RECIPES:
        exit_with_error(f"unknown data set '{name}'; choose from: {', '.join(RECIPES)}")
    return RECIPES[name]


def load_dataset(name, data_dir=None, train=True, forget=None, caches=None):
    """Read one part of a data set and return it as a Dataset.

    name      a key of RECIPES
    data_dir  folder that holds the files, or to download them into; None: data/ of this repository
    train     True for the training part, False for the test part
    forget    names of the attributes of celeba that become classes; other data sets ignore it
    caches    folders for decoded pictures, the first that can be written to is taken, see
              cache_folders; None: data_dir

    mnist is read from mnist.npz (in the layout of Keras) in data_dir. fashion_mnist is read from
    its four idx files, plain or .gz, if they lie in data_dir. All else comes through torchvision,
    which downloads into data_dir what is not there.

    celeba has 40 yes/no attributes and no classes. Those in `forget`, such as "bangs" or
    "not_smiling", become classes, and the rest is the class "other".

    Exits with one line for an unknown name, and for a file that is missing, damaged or not what it
    should be, see check_dataset.
    """
    recipe(name)  # an unknown name ends here
    if name == "folder" and not data_dir:
        exit_with_error(
            "--dataset folder needs --data-dir PATH, a folder with one sub-folder of pictures "
            "per class"
        )

    root = Path(data_dir or HERE / "data")
    remedy = REMEDIES.get(name, "mend the files: fetch them again, or check --data-dir")
    try:
        images, labels, classes = _read_files(name, root, train, caches or [root])
        if name == "celeba":
            labels, classes = _attribute_classes(labels, classes, forget or [])
        part = "training" if train else "test"
        check_dataset(images, labels, classes, f"the {part} part", RECIPES[name])
    except FileNotFoundError as error:
        exit_with_error(f"{error.filename or error} not found; {remedy}")
    except PermissionError as error:
        exit_with_error(f"{root} cannot be read ({error}); check --data-dir and its permissions")
    except Exception as error:  # what is broken raises half a dozen different types
        reason = reason_of(error)
        exit_with_error(f"{root}: the files of {name} cannot be used ({reason}); {remedy}")

    # int64, because PyTorch reads an index of uint8, as in mnist.npz, as a mask.
    return Dataset(torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64)), classes)


def check_dataset(images, labels, classes, where, recipe):
    """Raise ValueError if one part of a data set is not what the programs take it for.

    images   array that should be (N, C, H, W) uint8, with C, H and W as in the recipe
    labels   array that should be (N,) whole numbers from 0 to K - 1, the places in `classes`
    classes  the K names
    where    what to call this part, for the message
    recipe   row of RECIPES

    Every reader passes through here. What is wrong would otherwise train all the same: images from
    0 to 1 are black, and a label too many is drawn by nobody.
    """
    if images.dtype != np.uint8:
        raise ValueError(f"{where} has images of {images.dtype}, not bytes (uint8) from 0 to 255")
    _check_shape(images, where, recipe)
    if len(images) == 0:
        raise ValueError(f"{where} has no images")
    if images.max() == 1:
        raise ValueError(f"{where} has images of 0 and 1, not bytes from 0 to 255")
    if labels.shape != (len(images),):
        raise ValueError(
            f"{where} has {len(images)} images and labels of shape {labels.shape}, not one for each"
        )
    if labels.dtype.kind not in "iu":
        raise ValueError(f"{where} has labels of {labels.dtype}, not whole numbers")
    lowest = int(labels.min())
    highest = int(labels.max())
    if lowest < 0 or highest >= len(classes):
        raise ValueError(
            f"{where} has labels from {lowest} to {highest}, not from 0 to {len(classes) - 1}"
        )


def _check_shape(images, where, recipe):
    """Raise ValueError if images are not (N, C, H, W) with the channels and sides of a recipe."""
    channels = recipe["net"]["channels"]
    sides = (recipe["size"],)
    if recipe["size"] is None:  # one's own pictures
        sides = (32, 64)
    wanted = [(channels, side, side) for side in sides]
    if images.shape[1:] not in wanted:
        names = " or ".join(map(str, wanted))
        raise ValueError(f"{where} has images of shape {images.shape[1:]}, not {names}")


def load_train_and_test(name, data_dir=None, forget=None, caches=None):
    """Read both parts of a data set: (train, test), two Datasets. See load_dataset.

    Exits with one line if there are too few images for what is to be forgotten or left out.
    """
    train = load_dataset(name, data_dir, True, forget, caches)
    test = load_dataset(name, data_dir, False, forget, caches)
    refuse_too_few(name, train, test, forget or [])
    return train, test


def refuse_too_few(name, train, test, forget):
    """Exit with one line that says which class lacks what, before anything is trained.

    forget  names of the classes that are forgotten or left out; unknown ones do not count here

    A class of `forget` has to have one image in each part. What is kept needs two in each, because
    a Frechet distance of one image does not exist. Without `forget` one test image is enough.
    """
    forget = [class_name for class_name in train.classes if class_name in forget]
    is_kept = [class_name not in forget for class_name in train.classes]
    lacks = []
    for part, data, num_needed in (("training", train, 2), ("test", test, 2 if forget else 1)):
        counts = torch.bincount(data.labels, minlength=len(data.classes))
        for class_name in forget:
            if counts[data.classes.index(class_name)] == 0:
                lacks.append(f"class '{class_name}' has no {part} image (1 is needed)")
        num_kept = int(counts[torch.tensor(is_kept)].sum())
        # Nothing at all is kept when all classes are named. split_forget says that better.
        if num_kept < num_needed and any(is_kept):
            what = "the classes to keep have" if forget else "all classes have"
            lacks.append(f"{what} {num_kept} {part} images ({num_needed} are needed)")
    if lacks:
        hint = ""
        if name == "folder":
            hint = "; every tenth picture of a class is a test picture, so a class needs 10"
        exit_with_error(f"too few images: {', '.join(lacks)}{hint}")


def _read_files(name, root, train, caches):
    """Read one part in its own format: images (N, C, H, W), labels (N,), names of the classes.

    The labels of celeba are its table of attributes (N, 40), and the names are theirs. Raises many
    kinds of exception when a file is missing or damaged.
    """
    if name == "mnist":
        return _read_mnist(root, train)
    if name == "fashion_mnist" and any(root.glob("*-idx[13]-ubyte*")):
        return _read_fashion_mnist(root, train)
    return _read_pictures(name, root, train, caches)


def _read_mnist(root, train):
    """Read mnist.npz: images (N, 1, 28, 28), labels (N,), the digits as names."""
    part = "train" if train else "test"
    refuse_no_file(root / "mnist.npz")
    with np.load(root / "mnist.npz") as file:
        images = file[f"x_{part}"][:, None]  # (N, 28, 28) -> (N, 1, 28, 28)
        labels = file[f"y_{part}"]
    return images, labels, [str(digit) for digit in range(10)]


def _read_fashion_mnist(root, train):
    """Read the idx files of Fashion-MNIST: images (N, 1, 28, 28), labels (N,), names."""
    part = "train" if train else "t10k"
    images = _read_idx(root, f"{part}-images-idx3-ubyte")
    labels = _read_idx(root, f"{part}-labels-idx1-ubyte")
    names = "t-shirt-top trouser pullover dress coat sandal shirt sneaker bag ankle_boot"
    return images[:, None], labels, names.split()  # (N, 28, 28) -> (N, 1, 28, 28)


def _read_idx(root, name):
    """Read an idx file, plain or .gz, as an array of bytes.

    LeCun's format is: two zeros, a byte for the type and one for the number of dimensions, then the
    sizes, each as a big-endian number of 32 bits, then the data.
    """
    path = root / name
    if not path.exists():
        path = root / f"{name}.gz"
    refuse_no_file(path)
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)

    if content[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is no idx file of bytes")
    num_dims = content[3]
    shape = np.frombuffer(content, ">u4", count=num_dims, offset=4).tolist()
    array = np.frombuffer(content, np.uint8, offset=4 + 4 * num_dims)
    # As numbers of Python, which never overflow. For reshape -1 would mean: as many as there are.
    if math.prod(shape) != len(array):
        raise ValueError(f"{path} says {shape} and has {len(array)} bytes")
    # A copy, because frombuffer gives a read-only view and PyTorch warns about those.
    return array.reshape(shape).copy()


def _read_pictures(name, root, train, caches):
    """Read a data set of torchvision: images (N, C, H, W), labels (N,) or (N, 40), names.

    Its pictures are decoded once, into <name>-<part>*.npy in one of the folders `caches`. They go
    one at a time into a file that is mapped into memory. So there are never two copies of all
    images at a time, and never a list of arrays.
    """
    source_key = _source_key(name, root)
    files = [_cache_path(name, root, folder, train) for folder in caches]
    found = _first_cached(files, source_key)
    if found is None and is_first_process():
        source = _open_or_download(name, root, train)
        # A download has just changed what is there.
        source_key = _source_key(name, root)
        # An aligned face of CelebA fills the middle 140 of its 178x218 pixels.
        crop = 140 if name == "celeba" else None
        _decode_into_first(files, source, RECIPES[name]["size"], crop, source_key)
    wait_for_all_processes()  # the first has written what the others read
    found = found or _first_cached(files, _source_key(name, root))
    if found is None:
        raise ValueError("pictures have changed while they were decoded; start again")
    images, labels, classes = found

    if name == "folder":  # it has no test set: every tenth picture of a class is put aside for it
        is_wanted = np.zeros(len(images), bool)
        for label in range(len(classes)):
            place = np.flatnonzero(labels == label)
            is_test = np.arange(len(place)) % 10 == 9
            is_wanted[place] = is_test != train  # the test pictures if train is False
        _refuse_empty_part(train, is_wanted, labels, classes)
        images = images[is_wanted]
        labels = labels[is_wanted]
    return images, labels, classes


def _refuse_empty_part(train, is_wanted, labels, classes):
    """Exit with one line if no class of one's own pictures has a picture for the test."""
    if train or is_wanted.any():
        return
    counts = np.bincount(labels, minlength=len(classes))
    # Ten classes are enough to see what is wrong.
    lacks = [f"'{name}' has {count}" for name, count in zip(classes[:10], counts)]
    exit_with_error(
        "too few images: every tenth picture of a class is a test picture, so a class needs 10; "
        + ", ".join(lacks)
    )


def cache_folders(args):
    """Return where decoded pictures may be kept, for load_dataset: a list of folders.

    args  of a script: data_dir, out and cache_dir are read

    It is --cache-dir alone, or the data's own folder and then <out>/cache, for data on a disk that
    can only be read.
    """
    if getattr(args, "cache_dir", None):
        return [Path(args.cache_dir)]
    return [Path(args.data_dir or HERE / "data"), Path(args.out) / "cache"]


def _cache_path(name, root, folder, train):
    """Return the path of the file in `folder` that the decoded pictures of one part are kept in."""
    part = "train" if train else "test"
    if name == "folder":
        part = "all"
    if folder.resolve() == root.resolve():
        return folder / f"{name}-{part}.npy"
    # One folder may serve data of several places.
    place = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:12]
    return folder / f"{name}-{part}-{place}.npy"


# Where the pictures of each data set lie below --data-dir; one's own are in any sub-folder.
SOURCE_FOLDERS = {
    "fashion_mnist": "FashionMNIST",
    "cifar10": "cifar-10-batches-py",
    "stl10": "stl10_binary",
    "celeba": "celeba",
    "imagenette": "imagenette2-160",
    "folder": ".",
}

# What decoding does is a part of every key: change this when _as_seen or _decode changes.
DECODER = "3"


def _source_key(name, root):
    """Return a key of all files that decoded pictures come from, at any depth.

    It holds names, sizes and dates. It is empty if no file is there: whoever has deleted the
    originals goes on with the decoded ones.
    """
    folder = root / SOURCE_FOLDERS[name]
    digest = hashlib.sha256()
    is_empty = True
    files, _ = list_files(folder)
    for path in files:
        if name == "folder" and path.parent == folder:  # no class; our own files may lie there
            continue
        if name != "folder":  # a PictureFolder leaves out what is no file
            refuse_no_file(path)
        status = path.stat() if path.exists() else path.lstat()  # a link to nothing
        line = f"{path.relative_to(folder)}|{status.st_size}|{status.st_mtime_ns}\n"
        digest.update(line.encode("utf-8", "surrogateescape"))
        is_empty = False
    return "" if is_empty else f"{DECODER}-{digest.hexdigest()}"


def list_files(folder):
    """List all files in a folder and in its sub-folders, at any depth, each real file once.

    Returns (paths, links that were left out). Links come last. One is left out if it leads to a
    folder above `folder`, or to what is in the list already. Hidden files and folders, and what
    macOS puts into its archives, are no one's pictures.
    """
    if not os.path.lexists(folder):
        return [], []
    root = Path(os.path.realpath(folder))
    found = []
    left_out = []
    seen = set()  # the real paths of files and folders
    places = collections.deque([(Path(folder), str(root))])  # pairs (path, real path) to look at
    while places:
        path, real = places.popleft()
        if seen and (real in seen or root.is_relative_to(real)):
            left_out.append(path)
            continue
        seen.add(real)
        if not os.path.isdir(real):  # a file, or nothing: whoever reads it will say so
            found.append(path)
            continue
        entries = [entry for entry in path.iterdir() if not is_hidden(entry.name)]
        entries.sort(key=lambda entry: (entry.is_dir(), entry.name))  # the files first
        links = [entry for entry in entries if entry.is_symlink()]
        others = [entry for entry in reversed(entries) if not entry.is_symlink()]
        # Links wait for all others.
        places.extend((link, os.path.realpath(link)) for link in links)
        places.extendleft((other, os.path.join(real, other.name)) for other in others)
    return found, left_out


def is_hidden(name):
    """Return whether a file or folder is one that a file manager does not show."""
    return name.startswith(".") or name == "__MACOSX"


def _first_cached(files, source_key):
    """Return (images, labels, classes) of the first of these files that serves, or None.

    A file serves if it is whole, and was made of what is there now; see _source_key.
    """
    for file in files:
        with contextlib.suppress(Exception):  # absent, cut off, of an older version: decode again
            return _read_cached(file, source_key)
    return None


def _read_cached(file, source_key):
    """Return (images, labels, classes) from a file of decoded pictures; raise if it is stale."""
    if no_file(file) or no_file(file.with_suffix(".npz")):
        raise OSError("no file")
    with np.load(file.with_suffix(".npz")) as notes:
        labels = notes["labels"]
        classes = [str(class_name) for class_name in notes["classes"]]
        made_of = str(notes["source"])
        checksum = int(notes["checksum"])
    # "c" is copy on write: nothing that is written to the tensor reaches the file.
    images = np.load(file, mmap_mode="c")
    is_current = made_of == source_key or not source_key
    if not is_current or checksum != _checksum_of_all(_checksum(images), labels, classes, made_of):
        raise ValueError("stale")
    return images, labels, classes


def _checksum_of_all(checksum, labels, classes, source_key):
    """Go on with the checksum of decoded images over all that is kept beside them."""
    text = f"{labels.dtype} {labels.shape} {classes} {source_key}"
    checksum = zlib.crc32(text.encode("utf-8", "surrogateescape"), checksum)
    return zlib.crc32(np.ascontiguousarray(labels), checksum)


def _checksum(images):
    """Return a checksum of images (N, ...), taken a piece at a time: they may be many."""
    checksum = 0
    for start in range(0, len(images), 1000):
        checksum = zlib.crc32(np.ascontiguousarray(images[start : start + 1000]), checksum)
    return checksum


NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT)
NOT_WRITABLE += (errno.EEXIST, errno.ENOTDIR)  # a file lies where the folder should be


def _decode_into_first(files, source, size, crop, source_key):
    """Decode into the first of these files whose folder can be written to; see _decode."""
    reasons = []
    for file in files:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            _decode(source, file, size, crop, source_key)
            return
        except OSError as error:
            # A disk that can only be read or is full, or a folder of somebody else. All other
            # errors stay.
            if error.errno not in NOT_WRITABLE:
                raise
            reasons.append(f"{file.parent} ({error.strerror})")
    exit_with_error(
        f"decoded pictures have to be kept, and cannot be written to {', '.join(reasons)}; "
        "name another folder with --cache-dir"
    )


def _open_or_download(name, root, train):
    """Open a data set of torchvision; download it first if it is not in `root`, or not whole."""
    try:
        return _open_torchvision(name, root, train)
    except RuntimeError:  # not there, or not whole
        say(f"{name} is not in {root}: downloading it")
    try:
        # torchvision checks the md5 of what it downloads.
        return _open_torchvision(name, make_folder(root, "--data-dir"), train, download=True)
    except Exception as error:  # no network, no space, gdown not installed, a wrong checksum
        reason = reason_of(error)
        exit_with_error(
            f"no download of {name} ({reason}); fetch by hand {FILES_TO_FETCH[name]}, "
            f"into {root}, and run this again"
        )


def _open_torchvision(name, root, train, **options):
    """Open the torchvision data set of that name; raise RuntimeError if its files are not whole."""
    from torchvision import datasets

    # Each data set has its own way to say which part is meant.
    part = "train" if train else "test"
    if name == "fashion_mnist":
        return datasets.FashionMNIST(root, train, **options)
    if name == "cifar10":
        return datasets.CIFAR10(root, train, **options)
    if name == "stl10":
        return datasets.STL10(root, part, **options)
    if name == "celeba":
        return datasets.CelebA(root, part, **options)
    if name == "imagenette":
        return datasets.Imagenette(root, "train" if train else "val", "160px", **options)
    return PictureFolder(root)


# What counts as a picture in a folder of one's own; the rest is left out, and counted.
PICTURE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp"),
    *(".jpe", ".jfif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"),
)


class PictureFolder:
    """One's own pictures, a sub-folder for each class, as a data set of (PIL picture, label).

    root  the folder. A class may have sub-folders again. Of a GIF or another file of several
          pictures the first one counts. Hidden files and folders are left out

    What is left out is counted and printed. Exits with one line if a class has no picture.
    """

    def __init__(self, root):
        self.root = Path(root)
        files, links = list_files(self.root)
        folders = [path for path in sorted(self.root.iterdir()) if path.is_dir()]
        folders = [path for path in folders if path not in links]
        self.classes = [path.name for path in folders if not is_hidden(path.name)]
        if not self.classes:
            raise ValueError("there is no sub-folder; one for each class is needed")
        refuse_names(self.root, self.classes)
        self.samples = []  # pairs (path, label)
        labels = {name: label for label, name in enumerate(self.classes)}
        left_out = collections.Counter()  # kind -> how many
        for path in files:
            if path.exists() and not path.is_file():
                left_out["pipes, sockets and devices"] += 1
                continue
            suffix = path.suffix.lower() or path.name
            is_picture = suffix in PICTURE_SUFFIXES
            is_loose = path.parent == self.root  # beside the folders of the classes
            if is_picture and not is_loose:
                label = labels[path.relative_to(self.root).parts[0]]
                self.samples.append((path, label))
            elif is_picture:
                left_out["pictures beside the folders of the classes"] += 1
            elif not is_loose:
                left_out[f"of '{suffix}'"] += 1
        for path in links:
            left_out[f"link to what is there already ({path.relative_to(self.root)})"] += 1
        empty = set(labels.values()) - {label for _, label in self.samples}
        if empty:
            name = self.classes[min(empty)]
            raise ValueError(f"class '{name}' has no picture; it may be removed")
        if left_out:
            parts = [f"{count} {kind}" for kind, count in sorted(left_out.items())]
            say(f"{self.root}: left out, as no pictures of a class: {', '.join(parts)}")

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        path, label = self.samples[i]
        return read_picture(path), label


def refuse_names(root, classes):
    """Exit with one line if a class has a name that --forget could not take, or no line show."""
    for name in classes:
        # Behind --forget, which takes several names, "-x" would be a flag.
        if re.search(r"^-|[\x00-\x1f\x7f-\x9f]", name):
            exit_with_error(
                f"{root}: rename the folder '{name}': the name of a class does not begin with "
                "'-', and has no control characters such as a line feed"
            )


def read_picture(path):
    """Read a picture of any format and kind as a PIL picture of 8-bit RGB, as a viewer shows it.

    It stands upright, as the camera was held. What is transparent becomes white. 16 bits become 8,
    and numbers of any range become 0 to 255. Raises many kinds of exception if it is broken, and
    ValueError with a reason if it is no picture to work with.
    """
    from PIL import Image

    if not Path(path).is_file():  # reading a pipe would wait for ever
        raise ValueError("no file, or a link to nothing")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL says much about files that it reads all the same
        try:
            with Image.open(path) as picture:
                width, height = picture.size
                # Scaling would make a line huge: its shorter side is made to fit.
                if min(width, height) == 0 or max(width, height) > 1000 * min(width, height):
                    raise ValueError(f"{width:,} x {height:,} pixels")
                return _as_seen(picture)
        except Image.DecompressionBombError as error:
            limit = 2 * Image.MAX_IMAGE_PIXELS
            raise ValueError(f"more than {limit:,} pixels") from error


def _as_seen(picture):
    """Turn a PIL picture into one of 8-bit RGB; see read_picture."""
    from PIL import Image, ImageOps

    # Loading comes first: for some formats the size or the transparency is known only then.
    picture.load()
    # PIL opens the 16 bits of some formats as 32; there the range is known all the same.
    has_16_bits = picture.mode.startswith("I;16") or picture.format in ("PNG", "PPM")
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith(("I", "F")):
        values = np.asarray(picture)
        grey = _to_range_of_bytes(values, has_16_bits)
        # One value of a grey PNG may stand for what is transparent.
        if "transparency" in picture.info:
            grey[values == picture.info["transparency"]] = 255
        return Image.fromarray(grey).convert("RGB")
    has_alpha = picture.mode in ("LA", "PA", "RGBA", "RGBa")
    if has_alpha or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return _in_common_colours(picture)


def _in_common_colours(picture):
    """Turn a PIL picture into RGB by its colour profile, where it has one that can be used."""
    from io import BytesIO

    from PIL import ImageCms

    profile = picture.info.get("icc_profile")
    if profile and picture.mode in ("RGB", "CMYK", "L"):
        try:
            source = ImageCms.ImageCmsProfile(BytesIO(profile))
            target = ImageCms.createProfile("sRGB")
            return ImageCms.profileToProfile(picture, source, target, outputMode="RGB")
        except (ImageCms.PyCMSError, OSError):  # a broken profile: viewers ignore it as well
            pass
    return picture.convert("RGB")


def _to_range_of_bytes(values, has_16_bits):
    """Scale grey values (H, W) of 16 bits, 32 bits or real numbers to bytes.

    16 bits have the range up to 65535. Other whole numbers may have that up to 255 too, and real
    ones that up to 1: the least of these that holds them all. Beyond, the largest value is white.
    """
    limits = [1, 255, 65535]
    if values.dtype.kind != "f":
        limits.remove(1)
    if has_16_bits:
        limits = [65535]
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("values that are not finite")
    highest = max(values.max(), 0)
    limit = next((limit for limit in limits if highest <= limit), highest)
    return (values.clip(0) * 255 / limit).round().astype(np.uint8)


def _decode(source, cache, size, crop, source_key=""):
    """Decode all pictures of a torchvision data set into files.

    source      data set of pairs (PIL picture, label)
    cache       path of the .npy file for the images, uint8 (N, C, size, size); the labels and the
                names of the classes go into the .npz file of the same name
    size        pixels a side; None: 64 if the first picture has at least 64 a side, else 32
    crop        pixels a side that are cut out of the middle before resizing; None: no cut
    source_key  what the files were decoded from, see _source_key

    Raises ValueError, with their paths, if pictures cannot be read. Nothing half done is left.
    """
    clear_away(cache.parent.glob(f"{cache.stem}.np?.tmp*"))
    classes = _class_names(source)
    # They take their places in reverse order: when the images appear, both files are whole.
    with whole_file(cache) as unfinished, whole_file(cache.with_suffix(".npz")) as notes:
        labels, checksum = _decode_images(source, unfinished, size, crop)
        checksum = _checksum_of_all(checksum, labels, classes, source_key)
        with notes.open("wb") as file:  # given a path, savez would put .npz behind it
            np.savez(
                file,
                labels=labels,
                classes=np.array(classes),
                source=np.array(source_key),
                checksum=np.array(checksum),
            )


def _decode_images(source, path, size, crop):
    """Decode all pictures into one .npy file; return their labels and a checksum; see _decode."""
    from torchvision import transforms

    num_images = len(source)
    if size is None:
        size = _side_of_first(source)
    # Resize makes the shorter side fit; the second crop makes a square of the rest.
    steps = [transforms.Resize(size), transforms.CenterCrop(size), transforms.PILToTensor()]
    if crop is not None:
        steps.insert(0, transforms.CenterCrop(crop))
    to_tensor = transforms.Compose(steps)

    images = None
    labels = None
    broken = []  # of pictures that cannot be read: path and reason
    for i in range(num_images):
        try:
            picture, label = source[i]
            pixels = to_tensor(picture).numpy()
        except Exception as error:  # what is no picture, or half of one, raises half a dozen types
            reason = str(error) if type(error) is ValueError else type(error).__name__
            broken.append(f"{_picture_path(source, i)} ({reason})")
            continue
        if images is None:
            shape = (num_images, *pixels.shape)
            images = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
            _reserve(path)
            labels = np.empty((num_images, *np.asarray(label).shape), np.int16)
        images[i] = pixels
        labels[i] = np.asarray(label)
        if i % 10000 == 9999:
            is_last_report = i + 10000 >= num_images
            end = "\n" if is_last_report else ""
            print(f"\rdecoding: {i + 1:,}/{num_images:,}", end=end, flush=True)
    if broken:
        more = f" and {len(broken) - 5} more" if len(broken) > 5 else ""
        raise ValueError(f"{len(broken)} unreadable: {', '.join(broken[:5])}{more}")
    return labels, _checksum(images)


def _reserve(path):
    """Claim the space on the disk that a new file of pictures needs; raise OSError if it is full.

    Such a file is mapped into memory. Without this a full disk would end the program by a signal
    (SIGBUS), in the middle of the pictures and without a word.
    """
    if hasattr(os, "posix_fallocate"):  # Linux
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _side_of_first(source):
    """Return the side for one's own pictures, 64 or 32 pixels, which the first readable decides."""
    for i in range(len(source)):
        try:
            picture, _ = source[i]
        except Exception:  # _decode_images names it
            continue
        return 64 if min(picture.size) >= 64 else 32
    return 32


def _picture_path(source, i):
    """Return the path of a picture of a torchvision data set, or its number where it has none."""
    if hasattr(source, "samples"):
        return source.samples[i][0]
    if hasattr(source, "_samples"):  # Imagenette
        return source._samples[i][0]
    if hasattr(source, "filename"):  # CelebA
        return source.filename[i]
    return f"picture {i}"


def _class_names(source):
    """Return the names of the classes of a torchvision data set, or CelebA's attributes."""
    names = []
    for name in getattr(source, "classes", None) or source.attr_names:
        if not name:  # CelebA's list of attributes ends with an empty name
            continue
        # Imagenette gives each class as a tuple of synonyms; the first one serves.
        names.append(name if isinstance(name, str) else name[0])
    if hasattr(source, "samples"):  # PictureFolder: the name of one's own folder stays as it is
        return names
    # The other names must be easy to type after --forget and must fit into the name of a folder.
    return [name.lower().replace(" ", "_").replace("/", "-") for name in names]


def _attribute_classes(table, names, wanted):
    """Turn CelebA's attributes into classes: labels (N,) and their names ["other", *wanted].

    table   (N, 40) whether an image has each attribute: 1, else 0 or -1
    names   of the 40 attributes
    wanted  the attributes of interest; "not_" before one means that the image lacks it

    An image with several wanted attributes belongs to the first of them.
    """
    labels = np.zeros(len(table), np.int64)
    # Backwards, so that the first of several overwrites the others.
    for i, attribute in reversed(list(enumerate(wanted))):
        name = attribute.removeprefix("not_")
        if name not in names:
            exit_with_error(
                f"--forget: no attribute '{attribute}'; choose from: {', '.join(names)}; "
                "or not_ before one of them"
            )
        has_it = table[:, names.index(name)] == 1
        is_negated = attribute.startswith("not_")
        labels[has_it != is_negated] = i + 1  # has it, or with not_ has it not; 0 is "other"
    return labels, ["other", *wanted]


def draw_batch(images, index, n, flip=False, device="cpu"):
    """Draw n images at random, with replacement, dequantised: (n, C, H, W) on `device`.

    images  (N, C, H, W) uint8
    index   (M,) int64, the numbers of the images from which to draw
    flip    whether to turn a random half of them into mirror images
    """
    chosen = index[torch.randint(len(index), (n,), device=index.device)]
    # Choose among the bytes first: only n images are moved, and made four times as large (float32).
    x = dequantize(images[chosen].to(device))
    if not flip:
        return x
    is_mirrored = torch.rand(n, device=device) < 0.5
    return torch.where(expand_like(is_mirrored, x), x.flip(-1), x)


def dequantize(images):
    """Turn bytes k into real numbers (k + u)/128 - 1 in [-1, 1), with u ~ U(0, 1) fresh every time.

    Bytes have no density: a model could reach any likelihood with a spike on each grey level.
    Uniform noise one level wide makes the density finite, and E[ln p(k + u)] is a lower bound of
    the byte's own log-probability (Theis et al. 2016). Images are on this scale in training too,
    because it is the one on which the likelihood is measured.
    """
    levels = images.float()
    noise = torch.rand(images.shape, device=images.device)
    x = (levels + noise) / 128 - 1
    # For u next to 1 the sum is rounded up to the next level, 4 times in a million. 2^-23 is the
    # width of the numbers there: such a value goes back below its level's upper end.
    end = (levels + 1) / 128 - 1
    return torch.where(x < end, x, end - 2**-23)


def to_bytes(x):
    """Turn real numbers in [-1, 1] into uint8, the inverse of dequantize."""
    # Floor, not round: the level k owns the whole interval [k/128 - 1, (k + 1)/128 - 1).
    levels = ((x + 1) * 128).floor()
    return levels.clamp(0, 255).to(torch.uint8)


def random_subset(items, n, *seeds):
    """Return n of the images or indices (N, ...) at random, the same ones for the same seeds."""
    # A permutation of all, cut off at n: a larger n only adds to what a smaller n has chosen.
    order = torch.randperm(len(items), generator=rng(*seeds))
    return items[order[:n]]


def reference_images(images, quick):
    """Return the real images that samples are compared with: all, or 1000 under --quick."""
    return images[:1000] if quick else images


def split_forget(data, names, flag="--forget"):
    """Find out which images of a Dataset are D_f, the data to forget; the others are D_g.

    names  of the classes to forget, in any order
    flag   with which the user gave them, for the error messages

    Returns is_forgotten (N,) bool, True for D_f, and the sorted list of the indices of the classes.
    Exits with one line on an unknown name, and when D_f or D_g would be empty.
    """
    unknown = [name for name in names if name not in data.classes]
    if unknown:
        exit_with_error(f"{flag}: no class '{unknown[0]}'; choose from: {', '.join(data.classes)}")
    # A set, because a name may be given twice. Sorted: "7 3" and "3 7" are the same D_f.
    forget = sorted({data.classes.index(name) for name in names})
    is_forgotten = torch.isin(data.labels, torch.tensor(forget))
    if is_forgotten.all():
        exit_with_error(
            f"{flag}: all classes; nothing would be left to keep (leave at least one out)"
        )
    if not is_forgotten.any():
        exit_with_error(f"{flag}: too few images: class '{names[0]}' has none (1 is needed)")
    return is_forgotten, forget


# ==================================================================================================
# 10  Training
# ==================================================================================================


class EMA:
    """A copy of a network, always in eval mode, whose weights are an average over training.

    net          the network in training, with the weights w
    decay        how much of the average stays at each update, at most
    num_updates  how many updates the average has seen already, after --resume

    Each update is  average <- d average + (1 - d) w  with  d = min(decay, (1 + n)/(10 + n)), where
    n is num_updates. The warm-up matters in short runs: with a constant decay of 0.9999 and 5,000
    steps, 61 % of the average would still be the initial weights. score_sde counts the update
    before it takes n, so its n is one ahead of ours.
    """

    def __init__(self, net, decay, num_updates=0):
        self.net = copy.deepcopy(net).requires_grad_(False).eval()
        self.decay = decay
        self.num_updates = num_updates

    @torch.no_grad()
    def update(self, net):
        """Move the average towards the weights of `net`, after each step of training."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        # Buffers are not averaged: the U-Net's only one is constant.
        average = list(self.net.parameters())
        weights = list(net.parameters())
        # lerp(a, w, 1 - d) = a + (1 - d) (w - a) = d a + (1 - d) w, in place, all in one call
        torch._foreach_lerp_(average, weights, 1 - decay)
        self.num_updates += 1


class Muon(torch.optim.Optimizer):
    """An optimizer with momentum whose step is made an orthogonal matrix (Jordan et al. 2024).

    params    weights of two or more dimensions, read as matrices (out, in*k*k)
    lr        size of a step: the singular values of a square weight's update are about lr
    momentum  share of the old momentum that each step keeps

    Adam's step of a convolution points mostly along a few directions. Here all singular values of
    a weight's update are set to about 1, so that the step uses all directions alike. After 857
    steps on MNIST the v-loss on held-out images is 0.169, with Adam 0.184.
    """

    def __init__(self, params, lr, momentum=0.95):
        super().__init__(list(params), {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        """Update every weight once from its .grad."""
        for group in self.param_groups:
            for weight in group["params"]:
                self._update(weight, group["lr"], group["momentum"])

    def _update(self, weight, lr, momentum):
        """Update one weight in place."""
        # m <- momentum m + (1 - momentum) gradient
        average = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
        average.lerp_(weight.grad, 1 - momentum)
        # Nesterov's momentum: mix the gradient in once more, as the next step would.
        ahead = weight.grad.lerp(average, momentum)
        matrix = orthogonalize(ahead.flatten(1))  # (out, in, k, k) -> (out, in*k*k)
        # An orthogonal tall matrix has small entries: sqrt(rows/columns) makes up for it. The code
        # of Jordan et al. takes that factor from the 4-D shape and has 1 for every convolution.
        # Ours is larger on wide 1x1 convolutions alone: sqrt(2) or sqrt(3), five weights here.
        num_rows, num_columns = matrix.shape
        scale = max(1.0, num_rows / num_columns) ** 0.5
        weight.add_(matrix.reshape(weight.shape), alpha=-lr * scale)


def orthogonalize(matrix):
    """Set all singular values of a matrix (rows, columns) to about 1 and keep its directions.

    This is Newton-Schulz with the odd polynomial  X <- a X + b (X X') X + c (X X')^2 X,
    a = 3.4445, b = -4.7750, c = 2.0315 (Jordan et al. 2024). An odd polynomial of a matrix is the
    polynomial of its singular values, and this one drives each of those in (0, 1] towards 1. After
    five rounds all that were above 0.0015 lie between 0.68 and 1.21. It needs no SVD, only products
    of matrices.
    """
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix  # X X' is then the smaller of the two products
    # No singular value is above the Frobenius norm; 1e-7 is for a gradient of zeros.
    x = x / (matrix.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x.T if is_tall else x


def muon_and_adam(net, lr, lr_muon=0.02):
    """Return [Muon for the convolutions inside the U-Net, Adam for everything else].

    lr and lr_muon are their peak rates; see set_lr. The first and the last convolution of the
    U-Net touch the pixels and stay with Adam, as do all biases, norms and linear layers.
    """
    inside = []
    others = []
    for name, weight in net.named_parameters():
        is_convolution = weight.ndim == 4
        if is_convolution and not name.startswith(("stem", "head")):
            inside.append(weight)
        else:
            others.append(weight)
    return [Muon(inside, lr_muon), torch.optim.Adam(others, lr, betas=(0.9, 0.99), fused=True)]


def set_lr(optimizers, step, steps, warmup):
    """Set the learning rates of one step: a linear warm-up, times half a cosine down to 0.

        lr = peak min(1, (step + 1)/warmup) (1 + cos(pi step/steps))/2

    step    number of this step, counted from 0
    steps   number of all steps
    warmup  number of steps of the warm-up

    peak is the rate with which the optimizer was made. The first step has peak/warmup, not 0, or
    it would be wasted.
    """
    warm = min(1.0, (step + 1) / warmup)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            # "peak" stays in the group, hence in the checkpoint: the "lr" that a resumed run finds
            # there is that of the last step.
            peak = group.setdefault("peak", group["lr"])
            group["lr"] = peak * warm * 0.5 * (1 + math.cos(math.pi * step / steps))


def lower_peak(optimizers, factor, least):
    """Multiply the peak of the learning rate by a factor below 1, but not to less than `least`.

    It counts from the next step on, see set_lr.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = max(factor * group["peak"], least)


def part_size(args):
    """Return how many images of a step's batch go through the network at once.

    Exits with one line if the batch cannot be split evenly.
    """
    _, num_processes = ranks()
    size, rest = divmod(args.batch_size, args.grad_accum * num_processes)
    if size == 0 or rest != 0:
        exit_with_error(
            f"--batch-size {args.batch_size} cannot be split into "
            f"{args.grad_accum} (--grad-accum) x {num_processes} (processes)"
        )
    return size


def batch_parts(args, step):
    """Count the parts of a step's batch that this process does, and seed torch for each of them.

    It yields 0, 1, ... There is one part, unless --grad-accum splits the batch; torchrun splits it
    among processes. Each part of a split batch has its own random stream. So two processes, and one
    process with --grad-accum 2, train the same model. On CUDA and mps each step has its own stream
    even without a split: the generator there is not saved in a checkpoint, and --resume would
    otherwise repeat the numbers of the first steps.
    """
    rank, num_processes = ranks()
    is_split = num_processes * args.grad_accum > 1
    for i in range(args.grad_accum):
        if is_split or not args.device.startswith("cpu"):
            # 2 processes have the parts 0 and 1, just as 1 process with --grad-accum 2 has.
            part = rank + num_processes * i
            torch.manual_seed(rng(args.seed, step, part).initial_seed())
        yield i


def average_over_ranks(tensors):
    """Replace tensors by their mean over the processes of torchrun, in place and as one message.

    PyTorch's DistributedDataParallel does this in backward(). It does not serve here: EraseDiff and
    SISS (03) get their gradients from autograd.grad and weigh them.
    """
    _, num_processes = ranks()
    if num_processes == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)  # the sum over all processes
    means = (flat / num_processes).split([tensor.numel() for tensor in tensors])
    for tensor, mean in zip(tensors, means):
        tensor.copy_(mean.view_as(tensor))


def guarded_step(net, optimizers, skipped, clip=1.0):
    """Step every optimizer after backward, unless the gradient is not finite.

    skipped  how many steps were skipped in a row before this one
    clip     norm to which a longer gradient (of all weights together) is shortened

    Returns the number of steps skipped in a row now, 0 after a good one; pass it to the next call.
    Exits with advice after five in a row.

    One NaN in one gradient makes the clipped norm NaN and, through Adam's averages, every weight
    NaN for ever. That is why such a step is left out.
    """
    # First the mean, then the norm: all processes must see the same norm and skip alike.
    average_over_ranks([weight.grad for weight in net.parameters() if weight.grad is not None])
    norm = nn.utils.clip_grad_norm_(net.parameters(), clip)
    is_finite = bool(torch.isfinite(norm))
    if is_finite:
        for optimizer in optimizers:
            optimizer.step()
    net.zero_grad()  # a bad gradient has to go too, or the next backward would add to it

    if is_finite:
        return 0
    if skipped >= 4:
        exit_with_error(
            "the gradient was not finite five times in a row; lower --lr "
            "(or, when unlearning, raise --alpha)"
        )
    return skipped + 1


def skipped_text(num_skipped):
    """Return the end of a progress line: how many steps guarded_step has left out, if any."""
    if num_skipped == 0:
        return ""
    return f"  skipped so far, because the gradient was not finite: {num_skipped}"


def refuse_skipped(num_skipped, steps):
    """Exit with one line if all steps of a training were left out: nothing has been learned."""
    if num_skipped >= steps:
        exit_with_error(
            f"the gradient was not finite in any of the {steps} steps; lower --lr "
            "(or, when unlearning, raise --alpha)"
        )


class CtrlC:
    """Remember that Ctrl-C was pressed, so that training can stop after the step in progress.

    A checkpoint then always holds a whole number of steps. `kill` and a closed terminal do the same
    as Ctrl-C: `with CtrlC() as ctrl_c:` listens to all three until its end.
    """

    def __init__(self):
        self.signum = 0  # number of the signal that came, or 0
        self.handlers = {}  # what else would happen at each signal

    def __enter__(self):
        _, num_processes = ranks()
        # Several processes of torchrun could not agree on the step to stop after. There Ctrl-C ends
        # them at once, and what came after the last checkpoint is lost.
        if num_processes == 1:
            for signum in ending_signals():
                if signum == signal.SIGINT or signal.getsignal(signum) != signal.SIG_IGN:
                    self.handlers[signum] = signal.signal(signum, self.remember)
        return self

    def __exit__(self, *_):
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)

    def remember(self, signum, frame):
        """Note the signal; Python calls this in place of raising KeyboardInterrupt."""
        self.signum = signum


def restore_training(path, command, model, checkpoint):
    """Put what a checkpoint holds into a Model of 02 or 03 and into the random generator.

    path     of the checkpoint
    command  the command that begins again, for error messages

    Exits with one line if the checkpoint does not fit the model.
    """
    if checkpoint["arch"] != model.net.arch:
        exit_with_error(
            f"{path} holds another network; choose another --out, or begin again with: {command}"
        )
    refuse_other_shape(path, command, model.net, checkpoint, model.shape)
    try:
        # The raw weights train on; the average only follows them.
        model.net.load_state_dict(checkpoint["model"])
        model.ema.net.load_state_dict(checkpoint["ema"])
        # Without this the average would take itself for new, and forget faster than it should.
        model.ema.num_updates = int(checkpoint["step"])
        # strict: with one state too few an optimizer would start anew, and nobody would notice.
        for optimizer, state in zip(model.optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(state)
            check_state(optimizer)
        torch.set_rng_state(checkpoint["rng"])
    except Exception as error:  # entries that do not fit raise half a dozen types
        reason = reason_of(error)
        exit_with_error(f"{path} cannot be resumed ({reason}); begin again with: {command}")


def check_state(optimizer):
    """Raise ValueError if what an optimizer has loaded does not fit its weights; torch does not."""
    if not optimizer.state:  # all steps so far were skipped
        return
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if weight not in optimizer.state:
                raise ValueError("an optimizer has forgotten some of its weights")
            for value in optimizer.state[weight].values():
                is_average = torch.is_tensor(value) and value.ndim > 0  # and not Adam's step count
                if is_average and value.shape != weight.shape:
                    raise ValueError("an optimizer belongs to other weights")


def autocast(device, bf16=False):
    """Return a context for a step of training: CUDA computes in bfloat16, a CPU only with --bf16.

    bfloat16 takes half the memory and is several times as fast on CUDA. There is no GradScaler,
    because bfloat16 has the range of float32. A CPU without units for it is slower than in float32.
    """
    return bfloat16(device, bf16 or str(device).startswith("cuda"))


def bfloat16(device, wanted):
    """Return a context in which networks compute in bfloat16, if that is wanted (--bf16).

    Samples are drawn in it. A likelihood adds up thousands of small terms, and stays out of it.
    """
    # Only what is computed becomes bfloat16. Weights, average and optimizers stay float32: bfloat16
    # has 8 bits of precision, and the small updates of an average would round to nothing.
    if wanted:
        return torch.autocast(torch.device(device).type, torch.bfloat16)
    return contextlib.nullcontext()


def device_name(device):
    """Return what a run computed on, for its records: "cpu", or the name of the GPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return torch.device(device).type


def say_bf16(args, cpuinfo="/proc/cpuinfo"):
    """Say in one line that --bf16 is on, and that it is slow if the processor has no units for it.

    cpuinfo  file in which Linux lists what the processor has; other systems have no such file
    """
    if not getattr(args, "bf16", False):  # some scripts have no such flag
        return
    say("bf16: networks compute in bfloat16; figures then differ between machines in last digits")
    if torch.device(args.device).type != "cpu":
        return
    # x86 has units for it since 2020 (avx512_bf16, amx_bf16), ARM calls them bf16.
    with contextlib.suppress(OSError):
        if not re.search(r"(\bbf16|_bf16)\b", Path(cpuinfo).read_text()):
            warn("bf16: this processor has no units for bfloat16: it will be slower than without")


# ==================================================================================================
# 11  Processes
# ==================================================================================================


def ranks():
    """Return (which process of torchrun this is, how many there are); (0, 1) without torchrun."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_first_process():
    """Return whether this process is the first of torchrun, or the only one: it writes files."""
    rank, _ = ranks()
    return rank == 0


def from_first_process(value):
    """Return what the first process of torchrun has for a value; all others pass theirs in vain.

    The processes compute alike, but not to the bit, and a decision must be the same in all of them.
    """
    _, num_processes = ranks()
    if num_processes == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)  # from the first one, in place
    return values[0]


def wait_for_all_processes():
    """Return when every process of torchrun has come here; at once if there is only one."""
    _, num_processes = ranks()
    if num_processes > 1:
        dist.barrier()


def share_work(work, items):
    """Compute [work(item) for item in items], shared out among the processes of torchrun.

    work   function of one item; its result must not depend on which process computes it
    items  a list or range, the same in each process

    Each process gets the results of all of them, in the order of `items`.
    """
    rank, num_processes = ranks()
    # Dealt like cards: process r takes items r, r + n, r + 2n, ...
    mine = [work(item) for item in items[rank::num_processes]]
    if num_processes == 1:
        return mine
    # Results travel as pickled objects. Tensors in them should be on the CPU: one on a GPU would
    # arrive on the GPU of its sender.
    dealt = [None] * num_processes
    dist.all_gather_object(dealt, mine)
    return [dealt[i % num_processes][i // num_processes] for i in range(len(items))]


# ==================================================================================================
# 12  Checkpoints and folders
# ==================================================================================================


@contextlib.contextmanager
def path_in_errors(path):
    """Put `path` into an OSError of the block that names no file, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def whole_file(path, outdated=()):
    """Write a file as a whole or not at all: `with whole_file(path) as unfinished:`.

    The block writes the file `unfinished`, which then takes the place of `path`. After an exception
    `path` is as it was.

    outdated  files that belong to the old `path` and are removed with it; they need not exist
    """
    path = Path(path)
    # In the same folder: os.replace is one indivisible move only within a file system. The process
    # id keeps two programs out of each other's way.
    unfinished = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        with path_in_errors(path):
            yield unfinished
            # They go first. A program killed in between would else leave them beside the new file.
            for file in outdated:
                file.unlink(missing_ok=True)
            os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def save_checkpoint(path, outdated=(), **content):
    """Write a plain dict of tensors, numbers, strings and lists into one file.

    A crash leaves the old file or the new one, never half of one. Of several processes the first
    one writes. Raises OSError if the disk is full. For `outdated` see whole_file.
    """
    if is_first_process():
        write_torch_file(path, content, outdated)


def write_torch_file(path, content, outdated=()):
    """Write what torch.save can write, whole or not at all and in every process that calls it."""
    with whole_file(path, outdated) as unfinished:
        unfinished.touch()  # a folder that cannot be written to: an OSError that says why
        try:
            torch.save(content, unfinished)
        except RuntimeError as error:
            # PyTorch's C++ part does not say why a write failed, only in which of its files.
            if "inline_container" not in str(error):
                raise
            reason = "no space left, or a limit on the size of files"
            raise OSError(errno.ENOSPC, reason, str(path)) from error


def write_json(path, content):
    """Write a JSON file whole or not at all; of several processes the first one writes.

    content  dicts, lists, strings and numbers; one that is not finite becomes null
    """
    if not is_first_process():
        return
    text = json.dumps(without_nan(content), indent=1, allow_nan=False)
    with whole_file(path) as unfinished:
        unfinished.write_text(text)


def json_line(content):
    """Return a dict as one line of JSON, for a log; a number that is not finite becomes null."""
    return json.dumps(without_nan(content), allow_nan=False) + "\n"


def write_losses(path, losses, skipped, more=()):
    """Write L_g and L_f of each step, losses (steps, 2), as lines of JSON.

    skipped  numbers of the steps that were left out, because their gradient was not finite
    more     dicts of what else belongs into the line of a step, each with the number of its "step"
    """
    more = {values["step"]: values for values in more}
    with path_in_errors(path), path.open("w") as log:
        for i, (loss_g, loss_f) in enumerate(losses.tolist()):
            line = {"step": i + 1, "loss_g": loss_g, "loss_f": loss_f}
            line["skipped"] = i + 1 in skipped
            line.update(more.get(i + 1, {}))
            log.write(json_line(line))


def without_nan(content):
    """Return a copy of dicts, lists and tuples in which NaN and the infinities are None.

    JSON has no such numbers. Python would write the words NaN and Infinity, at which other
    languages' readers stop.
    """
    if isinstance(content, dict):
        return {key: without_nan(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [without_nan(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content


def no_file(path):
    """Say in words what lies at `path` if it is no ordinary file; "" for a file or for nothing."""
    path = Path(path)
    if path.is_file() or not os.path.lexists(path):
        return ""
    if path.is_dir():
        return "a folder, not a file"
    if path.exists():
        return "no ordinary file, but a pipe, a socket or a device"
    return f"a link to {os.readlink(path)}, which cannot be found"


def refuse_no_file(path):
    """Exit with one line if something else than a file lies at `path`, which is to be read.

    Reading a pipe would wait for ever.
    """
    if no_file(path):
        exit_with_error(f"{path} is {no_file(path)}; move it away, or put a file there")


def read_text(path):
    """Return the text of a file; exit with one line if something else lies there."""
    refuse_no_file(path)
    return Path(path).read_text("utf-8")


def read_torch_file(path):
    """Read what torch.save has written, on the CPU.

    Raises an exception, of one of many types, if the file is absent or not as it was written.
    """
    if no_file(path):
        raise OSError(f"{path} is {no_file(path)}")
    # torch.load does not compare the checksums in the file. A bit that has flipped on a disk would
    # become another weight, and nobody would notice.
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
    # weights_only: a file from elsewhere may hold data, but cannot run code.
    return torch.load(path, map_location="cpu", weights_only=True)


def load_checkpoint(path, command, keys=("arch", "ema")):
    """Read a checkpoint and return its dict, on the CPU.

    path     of the file
    command  the command that makes it, for error messages
    keys     entries that it must have

    Exits with one line that names `command` if the file is missing, damaged or of another kind.
    """
    if no_file(path):
        exit_with_error(f"{path} is {no_file(path)}; move it away, then: {command}")
    if not Path(path).exists():
        exit_with_error(f"{path} not found; make it with: {command}")
    try:
        content = read_torch_file(path)
    except PermissionError as error:
        exit_with_error(f"{path} cannot be read ({error.strerror}); chmod u+r makes it readable")
    except Exception as error:  # cut off, another format: many exception types, one remedy
        exit_with_error(
            f"{path} is damaged ({type(error).__name__}); make it again with: {command}"
        )
    known = content if isinstance(content, dict) else {}
    missing = [key for key in keys if key not in known]
    if missing:
        exit_with_error(
            f"{path} is no checkpoint of this project (no '{missing[0]}' in it); "
            f"make it with: {command}"
        )
    return content


def load_net(path, command, device="cpu", shape=None):
    """Load the averaged network of a checkpoint, built as is stored in it, in eval mode.

    command  the command that makes the file, for error messages; see load_checkpoint
    shape    (C, H, W) of the images that the network is for; None: it is not checked
    """
    content = load_checkpoint(path, command)
    net = build_network(UNet, content["arch"], content["ema"], path, command)
    net.made_of = content.get("data")  # for warn_of_other_data
    if shape is not None:
        refuse_other_shape(path, command, net, content, tuple(shape))
    return net.to(device).eval()


def build_network(kind, arch, weights, path, command):
    """Build a UNet or a Judge (`kind`) with the weights that a checkpoint holds.

    Exits with one line that names the file and `command`, which makes it, if they do not fit.
    """
    try:
        net = kind(**arch)
        net.load_state_dict(weights)
    except Exception as error:  # what is no arch, or no weights, raises half a dozen types
        reason = reason_of(error)
        exit_with_error(
            f"{path} does not fit this version of common.py ({reason}); "
            f"make it again with: {command}"
        )
    # A judge of such weights would be sure of everything, because no comparison with nan holds.
    is_finite = [bool(torch.isfinite(value).all()) for value in net.state_dict().values()]
    if not all(is_finite):
        exit_with_error(
            f"{path} has weights that are not finite: its training has diverged; "
            f"make it again with: {command}"
        )
    return net


def refuse_other_shape(path, command, net, content, shape):
    """Exit with one line if the UNet `net` of a checkpoint was not made for images of this shape.

    content  the checkpoint's dict
    shape    (C, H, W)
    """
    arch = net.arch
    channels, height, width = shape
    # Each resolution halves the one before, and there must be no half pixels.
    divisor = arch["patch"] * 2 ** (len(arch["mult"]) - 1)
    takes_size = height % divisor == 0 and width % divisor == 0
    # Any size that can be halved passes through a UNet. So 02 writes down what it was trained on.
    trained_on = content.get("shape", shape)
    if isinstance(trained_on, list):
        trained_on = tuple(trained_on)
    if arch["channels"] == channels and takes_size and trained_on == shape:
        return
    if "shape" in content:
        made_for = f"images of {trained_on}"
    else:
        made_for = f"{arch['channels']} channels and sides that {divisor} divides"
    exit_with_error(
        f"{path} was made for {made_for}, not for images of {shape}; "
        f"make it again for these with: {command}"
    )


def find_base(args):
    """Find the Standard model that a run with `args` needs: (its path, the command that makes it).

    It is out/<dataset>/base.pt if there is one, else the file that is shipped in data/. If neither
    exists, the path is the first one.
    """
    own = Path(args.out) / args.dataset / "base.pt"
    shipped = HERE / "data" / f"{args.dataset}_base.pt"
    # 02 replaces a file that is there only with --overwrite.
    flags = ["--overwrite"] if own.exists() else []
    return _own_or_shipped(own, shipped), command_line("02_train_sde.py", args, *flags)


def warn_if_unfit(args, verdict=None):
    """Say loudly if the Standard model is not fit to be unlearned, and return what was said.

    args     of the run that uses the model
    verdict  the judge's Verdict on samples of the model, or None if there are none yet

    A model that draws rubbish can have a low unlearning ratio before it has forgotten anything.
    The table then looks like a success.
    """
    path, command = find_base(args)
    faults = []
    steps = load_checkpoint(path, command).get("step")
    usual_steps = RECIPES[args.dataset]["train"]["steps"]
    # A file that does not say how long it was trained is taken on trust.
    if steps is not None and steps < usual_steps / 10:
        faults.append(f"it was trained for {steps:,} steps, where {usual_steps:,} are usual")
    if verdict is not None:
        unsure = (verdict.confidence < SURE).float().mean().item()
        if unsure > 0.5:
            faults.append(f"the judge is unsure of {100 * unsure:.0f} % of its samples")
    if not faults:
        return ""
    text = (
        f"WARNING: the Standard model {path} is not fit, because {' and '.join(faults)}. "
        "Figures that start from it say little about unlearning."
    )
    say(text)
    return text


def _own_or_shipped(own, shipped):
    """Return the path of the file that serves: the user's own if it exists, else the shipped."""
    if shipped.exists() and not os.path.lexists(own):  # whoever reads a link to nothing says so
        return shipped
    return own


def find_runs(args, forget_names):
    """Find the finished runs of 02 and 03 for these classes: {path of model.pt: args of the run}.

    The dict is sorted by path and may be empty. A run of other classes or of another data set may
    have been copied into the folder: it is left out, and a line says so.
    """
    folder = forget_folder(args.out, args.dataset, forget_names)
    runs = {}
    for run_folder in sorted(Path(folder).glob("*")):
        path = run_folder / "model.pt"
        is_hidden_run = run_folder.name.startswith(".")  # by fresh_folder: it is not finished
        if not run_folder.exists():  # a link to a run that has been moved
            refuse_no_file(run_folder)
        if is_hidden_run or not os.path.lexists(path):
            continue
        command = run_command(args, path, forget_names)
        run_args = load_checkpoint(path, command, ("arch", "ema", "args"))["args"]
        if not isinstance(run_args, dict) or "method" not in run_args:
            exit_with_error(f"{path} does not say by which method; make it again with: {command}")
        forgotten = run_args.get("forget") or forget_names
        dataset = run_args.get("dataset") or args.dataset
        if not isinstance(forgotten, list) or not all(isinstance(x, str) for x in forgotten):
            exit_with_error(
                f"{path} does not say which classes were forgotten; make it again with: {command}"
            )
        if set(forgotten) != set(forget_names) or dataset != args.dataset:
            names = " ".join(forgotten)
            warn(f"left out: {path.parent} is a run of {dataset}, forget {names}")
            continue
        runs[path] = run_args
    return runs


def warn_of_other_base(path, base, command):
    """Print one line on stderr if a run of 03 was made from another Standard model than `base`.

    path     of its model.pt; nothing is printed if its result.json does not name a Standard model
    base     weights_digest of the Standard model
    command  what makes the run again
    """
    try:
        digest = json.loads(read_text(path.with_name("result.json")))["made_from"]["base"]
    except (OSError, ValueError, LookupError, TypeError):
        return
    if digest is not None and digest != base:
        warn(
            f"{path.parent} was made from another Standard model, so the two do not compare; "
            f"make it again with: {command}"
        )


def run_command(args, path, forget_names):
    """Return the command that makes a run again whose model.pt is at `path`, for error messages.

    args  of the script that prints it
    """
    note = path.with_name("command.txt")
    try:
        if note.exists():  # 02 leaves it
            return at_this_place(read_text(note), args)
        result = json.loads(read_text(path.with_name("result.json")))
        return at_this_place(result["args"]["command"], args)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        pass  # damaged too, or of an older version
    if path.parent.name.startswith("unseen-any-"):
        return command_line("02_train_sde.py", args, "--without", *forget_names)
    return command_line("03_unlearn.py", args, "--forget", *forget_names)


def at_this_place(command, args):
    """Change a recorded command so that it writes where its result lies now.

    args  of the run that found the result: its folder may have been moved or copied

    Raises ValueError if it is not a command with which a script was started.
    """
    _, script, *argv = split_command(str(command))
    words = iter(leave_out(argv, "--overwrite"))
    kept = []
    for word in words:
        flag, _, value = word.partition("=")
        if flag in ("--ou", "--out"):  # argparse lets --out be shortened
            if not value:
                next(words, None)
            continue
        kept.append(word)
    # The result is there, so it has to be replaced.
    return own_command(Path(script).name, kept, *out_flag(args), "--overwrite")


def forget_folder(out, dataset, names):
    """Return the folder for all that concerns one forget set: out/<dataset>/forget-<names>."""
    return Path(out) / dataset / f"forget-{join_names(names)}"


# In the name of a file "-" stands between two classes. So a "-" within a class becomes "+", and
# what cannot stand in a file name, or has a meaning here, becomes its number after a "%".
ESCAPES = {ord("-"): "+"}
for character in ("/", "\\", "%", "+", *map(chr, range(32))):
    ESCAPES[ord(character)] = f"%{ord(character):02X}"


def join_names(names):
    """Join the names of classes into a part of a file name, another one for each list of names."""
    return shorten("-".join(name.translate(ESCAPES) for name in names), 150)


def shorten(name, limit):
    """Cut a name to at most `limit` bytes; a checksum at its end then tells it from others."""
    content = name.encode(errors="surrogateescape")
    if len(content) <= limit:
        return name
    checksum = hashlib.sha256(content).hexdigest()[:10]
    return f"{content[: limit - 11].decode(errors='ignore')}-{checksum}"


# The flags that a run's folder is named after, in this order: all that change the model.
NAMED_FLAGS = """
    alpha kappa eta c ort no_floor forget_every retain log_sigma wide uniform_t until max_steps
    steps batch_size lr ema width grad_accum bf16
""".split()


def run_name(args, usual, is_scratch):
    """Return the name of one run's folder: <method>-<sde>[-<flag><value>...][-scratch][-s<seed>].

    args        of the run, before anything is computed from them
    usual       dict of what its flags are if none is given; a flag with another value is named
    is_scratch  whether the run begins with random weights

    The default run of a method is obt-rel-vp, another one obt-rel-vp-kappa2-steps1000.
    """
    parts = [args.method, args.sde]
    for flag in NAMED_FLAGS:
        value = getattr(args, flag, None)
        part = flag_part(flag, value)
        if value is False and usual.get(flag) is True:
            part = f"no-{flag_part(flag, True)}"
        if part and part != flag_part(flag, usual.get(flag)):
            parts.append(part)
    if is_scratch:
        parts.append("scratch")
    if args.seed:
        parts.append(f"s{args.seed}")
    return shorten("-".join(parts), 100)


def flag_part(flag, value):
    """Spell a flag and its value as a part of a folder's name; "" for a flag without a value."""
    name = flag.replace("_", "-")
    if value is None or value is False:
        return ""
    if value is True:
        return name
    if isinstance(value, str):
        return f"{name}-{value}"
    values = value if isinstance(value, (list, tuple)) else [value]
    # Python spells a number with as many digits as tell it from all others; 2.0 becomes 2.
    return name + "_".join(str(number).removesuffix(".0") for number in values)


def file_digest(path):
    """Return the SHA-256 of a file as hexadecimal digits: another content, another name."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def fingerprint(*tensors):
    """Return a name for the content of tensors: other numbers, another name.

    It belongs into the key of every result that is kept on disk and was computed from them.
    """
    digest = hashlib.sha256()
    for tensor in tensors:
        array = np.ascontiguousarray(tensor.detach().cpu().numpy())
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(array)
    return digest.hexdigest()[:16]


def weights_digest(net):
    """Return a name for a UNet: other weights, another name. What else its file says has no part.

    The arch belongs to it: with another sd the same weights are another network.
    """
    weights = [weight.detach().cpu().numpy().tobytes() for weight in net.parameters()]
    arch = repr(sorted(net.arch.items())).encode()
    return hashlib.sha256(b"".join([arch, *weights])).hexdigest()[:12]


def data_key(data):
    """Return a number for the content of a Dataset; see warn_of_other_data."""
    return zlib.crc32(data.labels.numpy(), _checksum(data.images.numpy()))


# How to speak of a content that has changed. Its name is a checksum, which tells nobody anything.
CONTENTS = {"base": "the Standard model is another one", "data": "the images are others"}


def differing_flags(now, recorded, names):
    """List which flags differ from those that a file was made with, in words.

    now, recorded  {name: value}: the flags of this program, and those that the file records
    names          of the flags that count; what the file does not record is not compared
    """
    differences = []
    for name in names:
        if name not in recorded:  # the file of an older version
            continue
        old = plain(recorded[name])
        new = plain(now[name])
        if old != new:
            flag = "--" + name.replace("_", "-")
            text = f"{flag} was {old} and is now {new}"
            differences.append(CONTENTS.get(name, text))
    return differences


def plain(value):
    """Return the value of a flag so that it can be compared: a list, with names in order."""
    if isinstance(value, (list, tuple)):
        has_names = all(isinstance(item, str) for item in value)
        return sorted(value) if has_names else list(value)
    return value


def recorded_settings(path):
    """Return the settings that the JSON file of a finished result records: {name: value}.

    They stand in the file itself, or in an entry of it. Exits with one line if it is damaged.
    """
    recorded = {}
    try:
        content = json.loads(Path(path).read_text())
        for part in (content, content.get("args", {}), content.get("made_from", {})):
            recorded.update(part)
    except (ValueError, TypeError, AttributeError):  # no JSON, or not one of ours
        exit_with_error(
            f"{path} is damaged and does not say what it was made with; "
            "replace it by --overwrite, or choose another --out"
        )
    return recorded


def refuse_other_result(args, path, now, addable=()):
    """Exit with one line if a finished result of other settings would be replaced; see --overwrite.

    path     JSON file of the result, see recorded_settings
    now      {name: value}: the settings of this run. All that the result depends on belongs there
    addable  names of the settings that only add to a result. Where one was off, nothing is lost
    """
    if args.overwrite or not path.is_file():
        return
    recorded = recorded_settings(path)
    for name in addable:
        if recorded.get(name) in (None, False, "none"):
            recorded.pop(name, None)
    differences = differing_flags(now, recorded, now)
    if differences:
        exit_with_error(
            f"{path} was made with other settings: {', '.join(differences)}; "
            "give the same again, replace it by --overwrite, or choose another --out"
        )


def refuse_foreign(folder, *names):
    """Exit with one line if a folder that is replaced as a whole holds other files than these.

    Not even --overwrite replaces a file that no run has written.
    """
    for path in sorted(Path(folder).glob("[!.]*")):
        if path.name not in names:
            exit_with_error(
                f"{path} is not from a run, and its folder is to be replaced as a whole; "
                "move it away"
            )


def warn_of_other_data(path, made_of, data, command):
    """Print one line on stderr if a file was trained on other images than those that are there.

    path     of the file; nothing is printed if it does not say what it was trained on
    made_of  data_keys of the Datasets that count as the same, or None if the file does not say
    data     the Dataset that is there now
    command  what makes the file

    It is no error: whoever adds a picture to a thousand may go on with the old model.
    """
    if made_of is None or not is_first_process() or data_key(data) in made_of:
        return
    warn(
        f"note: {path} was trained on other images than those that are there now; "
        f"train it again with: {command}"
    )


def make_folder(path, flag="--out"):
    """Create a folder and return its Path; exit with one line that says why it cannot be.

    flag  the one that names another folder, for the error message
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        # An existing folder is no error for mkdir, even if nobody may write into it.
        if not os.access(path, os.W_OK):
            raise PermissionError("no permission to write")
    except OSError as error:
        reason = error.strerror or error
        if os.path.islink(path) and not os.path.exists(path):
            reason = no_file(path)
        exit_with_error(f"cannot write to {path} ({reason}); choose another folder with {flag}")
    return Path(path)


def refuse_unwritable(*paths):
    """Exit with one line if one of these files could not be written; they need not exist.

    A script asks before its work, because a refusal after hours of it would come too late.
    """
    for path in map(Path, paths):
        if no_file(path):
            exit_with_error(f"{path} is {no_file(path)}; a file has to be written there: move it")
        # Without a bit for writing somebody has protected the file. os.replace would not mind, and
        # the administrator is asked for no permission at all.
        if path.exists() and (not path.stat().st_mode & 0o222 or not os.access(path, os.W_OK)):
            exit_with_error(
                f"{path} is read-only; chmod u+w lets it be replaced, "
                "or choose another folder with --out"
            )


@contextlib.contextmanager
def locked(path):
    """Let no other program write `path`, a file or a folder: `with locked(path):`.

    Exits with one line if another program has the lock. It ends with the block, and with the
    program, however that ends. Where the system has no such locks nothing is locked.
    """
    path = Path(path)
    # Of the processes of torchrun the first one writes.
    if fcntl is None or not is_first_process():
        yield
        return
    # The file goes with the block. What a killed program leaves is harmless, and remove_leftovers
    # clears it away.
    lock = make_folder(path.parent) / f".{path.name}.lock"
    refuse_no_file(lock)
    with lock.open("a") as file:
        if not take_lock(file, lock):
            exit_with_error(
                f"another program is writing {path}: wait until it has ended, "
                "or choose another folder with --out"
            )
        try:
            yield
        finally:
            # While it is locked: afterwards it could be the lock of another program.
            lock.unlink(missing_ok=True)


def take_lock(file, path):
    """Lock an open file, which has this path, and return whether that succeeded."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Its last owner may have removed the file just now. A lock on it would stop nobody.
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except (BlockingIOError, FileNotFoundError):
        return False
    except OSError:  # a file system without locks
        return True


@contextlib.contextmanager
def fresh_folder(path):
    """Write a folder as a whole or not at all: `with fresh_folder(path) as new:`.

    The block writes into `new`, a hidden folder beside `path`. When the block has ended well, the
    new folder takes the place of `path`. After an exception `path` is as it was, and so it is if
    the new folder cannot take its place. The new one then stays where it is, and a line says where.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        exit_with_error(f"{path} is a file, but a folder has to be there; move it away")
    refuse_unwritable(*[file for file in path.glob("*") if file.is_file()])
    # The process id keeps two programs, and the processes of torchrun, out of each other's way.
    new = _hidden(path, "tmp")
    shutil.rmtree(new, ignore_errors=True)  # an earlier program may have had the same number
    make_folder(new)
    try:
        with path_in_errors(path):
            yield new
    except BaseException:  # Ctrl-C too
        shutil.rmtree(new, ignore_errors=True)
        raise
    if not new.exists():  # the block has given it another place
        return
    if is_first_process():  # of several processes the first one's folder stays
        _put_in_place(new, path)
    else:
        shutil.rmtree(new, ignore_errors=True)


def _hidden(path, kind):
    """Return the name of a hidden folder beside `path` that belongs to this process."""
    return path.with_name(f".{path.name}.{kind}{os.getpid()}")


def _put_in_place(new, path):
    """Let the finished folder `new` take the place of the folder `path`, if there is one.

    Whatever interrupts it, neither the old folder nor the new one is lost.
    """
    old = _hidden(path, "old")
    finished = _hidden(path, "finished")
    try:
        os.rename(new, finished)  # from now on nobody takes it for a leftover
        # os.replace refuses a folder that is not empty: move the old one away first.
        if path.exists():
            os.replace(path, old)
        os.replace(finished, path)
    except BaseException:  # Ctrl-C too may fall between the two moves
        if not path.exists() and old.exists():
            os.rename(old, path)
        if finished.exists():
            warn(f"{path} could not be replaced; the new one lies in {finished}")
        raise
    finally:
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)


LEFTOVER = re.compile(r"(?P<name>.+)\.(?P<kind>tmp|old|finished)(?P<pid>\d+)")


def remove_leftovers(folder):
    """Clear away what killed programs have left below a folder, whole_file's and fresh_folder's.

    A folder that had been moved away, and whose successor never came, is put back. What belongs to
    a program that still runs stays, and so does every finished folder.
    """
    if not is_first_process():
        return
    clear_away(Path(folder).rglob("*.*[0-9]"))
    for lock in filter(Path.is_file, Path(folder).rglob(".*.lock")):
        with contextlib.suppress(OSError), lock.open("a") as file:
            if fcntl is None or take_lock(file, lock):
                lock.unlink()


def clear_away(paths):
    """Clear away those of the paths that are leftovers of killed programs; see remove_leftovers."""
    # "finished" comes before "old": where a program was killed between its two moves both are
    # there, and the new folder was complete.
    for path in sorted(paths):
        match = LEFTOVER.fullmatch(path.name)
        if not match:
            continue
        with contextlib.suppress(OSError):  # another program clears away at the same time
            if not _is_in_use(path, int(match["pid"])):
                _remove_or_put_back(path, match["name"], match["kind"])


def _remove_or_put_back(path, name, kind):
    """Remove one leftover, or put it back where its folder is missing.

    name, kind  of the leftover: .<name>.<kind><process id>, or <name>.tmp<process id> of a file
    """
    if path.is_file():
        if kind == "tmp":
            path.unlink()
        return
    if not name.startswith("."):
        return  # no folder of ours: those are hidden
    place = path.with_name(name.removeprefix("."))
    if kind != "tmp" and not place.exists():
        os.rename(path, place)
    elif kind != "finished":
        shutil.rmtree(path)


def _is_in_use(path, pid):
    """Return whether the process with this number runs on this machine and may have made `path`."""
    if pid == os.getpid():
        # In a container each program may have the same number, so an older file is not ours.
        return path.stat().st_mtime >= PROGRAM_START
    if os.name == "nt":
        return True  # Windows cannot be asked: there os.kill would end the process
    try:
        os.kill(pid, 0)  # the signal 0 does nothing
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # another user's
    return True


# ==================================================================================================
# 13  The judge on disk
# ==================================================================================================


def _own_judge(args, forget):
    """Return where the user's own judge lies: judge.pt, or for CelebA e.g. judge-bangs.pt."""
    folder = Path(args.out) / args.dataset
    if args.dataset != "celeba":
        return folder / "judge.pt"
    # The attributes to forget decide what CelebA's classes are: a judge for each choice of them.
    return folder / f"judge-{join_names(forget)}.pt"


def judge_path(args, forget=()):
    """Return where the judge lies: out/<dataset>/, or data/ if only the shipped one exists."""
    own = _own_judge(args, forget)
    shipped = HERE / "data" / f"{args.dataset}_{own.name}"
    return _own_or_shipped(own, shipped)


def judge_command(args, forget=()):
    """Return the command that makes the judge that a run with `args` needs, for error messages."""
    flags = ["--judge"]
    if args.dataset == "celeba":
        # CelebA has attributes and no classes: the attributes to forget decide what a class is.
        flags += ["--without", *forget]
    if _own_judge(args, forget).exists():  # 02 replaces a file that is there only with this
        flags += ["--overwrite"]
    return command_line("02_train_sde.py", args, *flags)


def train_judge(args, forget=(), seed=0, overwrite=False):
    """Train, test and save the judge of a data set.

    args       of a script: dataset, data_dir, out, quick and device are read
    forget     names of the attributes that are CelebA's classes; other data sets ignore it
    seed       of the judge's initial weights and batches
    overwrite  whether a judge of another training may be replaced

    The weights are saved in half precision, which halves the file. Under --quick the training is
    too short for good verdicts, and the file lies where only --quick looks for it.
    """
    path = _own_judge(args, forget)
    make_folder(path.parent)
    refuse_unwritable(path)
    train, test = load_train_and_test(args.dataset, args.data_dir, forget, cache_folders(args))
    refuse_unknown_to_judge(train)
    made_of = [data_key(train), data_key(test)]
    if path.exists() and not overwrite:
        refuse_to_replace_judge(path, args, judge_command(args, forget), seed, made_of)
    num_epochs = 8
    if args.quick:
        num_epochs = 1
        train = train._replace(images=train.images[:10000], labels=train.labels[:10000])

    judge = fit_judge(train, epochs=num_epochs, seed=seed, device=args.device)
    is_right = judge_images(judge, test.images).labels == test.labels
    accuracy = is_right.float().mean()

    weights = {}
    for name, value in judge.state_dict().items():
        # The norms count their batches in whole numbers, and those stay.
        weights[name] = value.half() if value.is_floating_point() else value
    save_checkpoint(
        path,
        arch=judge.arch,
        model=weights,
        classes=train.classes,
        accuracy=accuracy.item(),
        data=made_of,
        seed=seed,
    )
    say(f"test accuracy {100 * accuracy:.2f} % on {len(is_right)} images; wrote {path}")


def refuse_to_replace_judge(path, args, command, seed, made_of):
    """Exit with one line if the judge in `path` is of another training, or is no judge.

    path, command  of its file, and what makes it
    seed, made_of  what is to be trained now: the seed, and the data_keys of both Datasets
    """
    content = load_checkpoint(path, command, ("arch", "model"))
    if args.quick:  # it shows that the code works, and is nothing to keep
        return
    recorded = {"seed": content.get("seed", "not recorded"), "data": content.get("data")}
    now = {"seed": seed, "data": made_of}
    differences = differing_flags(now, recorded, now)
    if differences:
        exit_with_error(
            f"{path} holds a judge of another training ({', '.join(differences)}): "
            "replace it by --overwrite, or choose another --out"
        )


def refuse_unknown_to_judge(train):
    """Exit with one line if a class of the training Dataset has no image for a judge to learn."""
    counts = torch.bincount(train.labels, minlength=len(train.classes)).tolist()
    empty = [name for name, count in zip(train.classes, counts) if count == 0]
    if empty:
        exit_with_error(
            f"too few images: class '{empty[0]}' has no training image (1 is needed), "
            "so a judge cannot learn it"
        )


def load_judge(args, data, forget=()):
    """Load the judge for the Dataset `data` in eval mode on args.device; train it if there is none.

    args    of a script: dataset, data_dir, out, quick and device are read
    forget  names of the attributes that are CelebA's classes; other data sets ignore it

    Exits with one line if the judge was trained on other classes than those of `data`.
    """
    command = judge_command(args, forget)  # for error messages
    path = judge_path(args, forget)
    if not os.path.lexists(path):
        # Training draws random numbers. Put the generator back afterwards, so that the run that
        # had to train a judge and the next one, which finds it, give the same results.
        rng_state = torch.get_rng_state()
        train_judge(args, forget)
        torch.set_rng_state(rng_state)
        wait_for_all_processes()  # only the first process writes the file that all of them read
    checkpoint = load_checkpoint(path, command, ("arch", "model"))

    # The half precision of the file becomes float32 again: the values are copied into the judge.
    judge = build_network(Judge, checkpoint["arch"], checkpoint["model"], path, command)
    num_channels = data.images.shape[1]
    arch = judge.arch
    if arch["channels"] != num_channels or arch["classes"] != len(data.classes):
        exit_with_error(
            f"{path} judges images of {arch['channels']} channels and {arch['classes']} classes, "
            f"not of {num_channels} and {len(data.classes)}; make another with: {command}"
        )
    # The judge that is shipped for MNIST was saved without a list of classes.
    known_classes = checkpoint.get("classes")
    if known_classes is None and args.dataset != "mnist":
        exit_with_error(f"{path} does not say which classes; make it again with: {command}")
    if known_classes is not None and known_classes != data.classes:
        names = known_classes  # of another project it may be anything
        if isinstance(known_classes, list):
            names = ", ".join(map(str, known_classes))
        exit_with_error(
            f"{path} knows other classes ({names}); another folder of pictures needs another --out"
        )
    warn_of_other_data(path, checkpoint.get("data"), data, command)
    return judge.to(args.device).eval()


# ==================================================================================================
# 14  Pictures
# ==================================================================================================


def pyplot():
    """Return matplotlib.pyplot, set up to draw into files: no screen is needed."""
    # A program that is started from a notebook inherits its backend, which may not be installed
    # here; then not even the import would succeed.
    os.environ["MPLBACKEND"] = "Agg"
    import matplotlib

    matplotlib.use("Agg")  # before pyplot is imported
    matplotlib.rcParams["text.usetex"] = False  # a matplotlibrc may ask for LaTeX
    import matplotlib.pyplot as plt

    return plt


# The colour and the marker of each method, the same in all figures. The colours are those of Okabe
# and Ito, which the colour-blind can tell apart. The markers tell methods apart without any colour.
METHOD_STYLES = {
    "standard": ("#000000", "s"),
    "unseen": ("#888888", "P"),
    "obt-rel": ("#0072B2", "o"),
    "obt": ("#E69F00", "^"),
    "ort": ("#009E73", "v"),
    "ascent": ("#D55E00", "X"),
    "erasediff": ("#CC79A7", "D"),
    "siss": ("#56B4E9", ">"),
}
# What marks a picture or a point, out of the same colours.
FORGOTTEN = "#D55E00"  # of D_f
KEPT = "#56B4E9"  # not of D_f
CHANGED = "#E69F00"  # of another class than the Standard model's picture from the same noise


def method_styles(names):
    """Return how a figure draws each of these models: {name: options of matplotlib's plot}.

    names  of methods, or of runs, which begin with their method: "obt-rel-vp-kappa2.0", "Obt-rel"

    Runs of one method share its colour and marker, and differ by their lines. What belongs to no
    method, such as real images, is a thin grey line without a marker.
    """
    result = {}
    for name in names:
        # The longest name that fits: obt-rel-vp is no run of obt.
        fitting = [method for method in METHOD_STYLES if name.lower().startswith(method)]
        color, marker = METHOD_STYLES[max(fitting, key=len)] if fitting else ("0.5", "")
        styles = list(result.values())
        num_before = sum(style["color"] == color for style in styles)
        line = ("-", "--", ":", "-.")[num_before % 4]
        result[name] = {"color": color, "marker": marker, "linestyle": line}
    return result


def draw_picture(path, draw, *args, again="", **more):
    """Draw a picture into a file, or say in one line why it could not be drawn; then go on.

    path   of the file; of several processes the first one draws
    draw   function of the path, of `args` and of `more`
    again  the command that draws it again, if there is one

    A picture comes after everything else has been written, and none is worth the loss of a run.
    """
    if not is_first_process():
        return
    try:
        draw(path, *args, **more)
    except Exception as error:  # of matplotlib, of a font, of a full disk: any type
        reason = reason_of(error)
        remedy = f"; draw it again with: {again}" if again else ""
        message = f"picture {Path(path).name} could not be drawn ({reason}){remedy}"
        warn(message)


def save_figure(fig, path, **options):
    """Save a figure as a PNG, whole or not at all, and close it.

    options  of savefig
    """
    try:
        with whole_file(path) as unfinished:
            fig.savefig(unfinished, format="png", **options)
    finally:
        pyplot().close(fig)  # it would stay in memory otherwise


def save_animation(fig, path, show, num_frames, seconds=0.15, last=3.0):
    """Save the pictures that a figure goes through as a GIF, whole or not at all, and close it.

    path        of the file
    show        function of k that changes the figure into picture k, of 0 ... num_frames - 1
    seconds     that each picture stands
    last        seconds that the last one stands, before all begins again
    """
    from PIL import Image

    frames = []
    try:
        for k in range(num_frames):
            show(k)
            fig.canvas.draw()
            pixels = np.asarray(fig.canvas.buffer_rgba())[..., :3]
            # 64 colours are enough for few hues and their shades, and make a small file.
            frames.append(Image.fromarray(pixels.copy()).quantize(64, dither=Image.Dither.NONE))
        durations = [round(1000 * seconds)] * (num_frames - 1) + [round(1000 * last)]
        with whole_file(path) as unfinished:
            frames[0].save(
                unfinished,
                format="GIF",
                save_all=True,
                append_images=frames[1:],
                duration=durations,
                loop=0,  # for ever
            )
    finally:
        pyplot().close(fig)


def plain_text(name):
    """Return a user's text in the form in which a figure shows it as it is.

    Between two dollar signs matplotlib reads a formula, and fails where there is none.
    """
    # A file name that is not UTF-8 holds characters that no font and no stream can take.
    readable = name.encode("utf-8", "replace").decode()
    return readable.replace("$", r"\$")


def short_name(name):
    """Shorten the name of a class for the corner of an image: airplane: airp, ankle_boot: ab."""
    words = [word for word in name.split("_") if word]
    if len(words) < 2:  # also for names such as "dog_" and "_"
        return (name.strip("_") or name)[:4]
    return "".join(word[0] for word in words)


def label_corner(ax, left, top, name, is_forgotten):
    """Write the short name of a class into the upper left corner of an image: a label.

    left and top are the pixel of the corner within the picture that `ax` shows. A class that was to
    be forgotten stands in a filled box, so that it can be told from the others without colours.
    """
    color = KEPT
    box = None
    if is_forgotten:
        color = "white"
        box = {"facecolor": FORGOTTEN, "edgecolor": "none", "pad": 1}
    ax.text(
        left + 1,
        top + 1,
        plain_text(short_name(name)),
        color=color,
        fontsize=8,
        va="top",
        fontweight="bold",
        bbox=box,
    )


def tile(images, columns):
    """Arrange bytes (N, C, H, W) in rows of `columns` images: a uint8 array for imshow.

    The array is (rows*H, columns*W, 3), for grey images too. A short last row is filled with black.
    """
    from torchvision.utils import make_grid

    num_rows = max(1, math.ceil(len(images) / columns))  # make_grid fails without any image
    canvas = torch.zeros(num_rows * columns, *images.shape[1:], dtype=torch.uint8)
    canvas[: len(images)] = images
    grid = make_grid(canvas, nrow=columns, padding=0)
    return grid.permute(1, 2, 0).numpy()  # (3, rows*H, columns*W) -> (rows*H, columns*W, 3)


# ==================================================================================================
# 15  Command line
# ==================================================================================================


def exit_with_error(message):
    """End the program for bad input: one clear line on stderr, exit status 2, no traceback."""
    warn(f"error: {message}")
    raise SystemExit(2)


def warn(message):
    """Print one line on stderr, whatever names of files and of classes the message holds."""
    print(one_line(message), file=sys.stderr, flush=True)


def say(message):
    """Print one line on stdout; see warn."""
    print(one_line(message), flush=True)


def one_line(text):
    """Spell what would end the line or move the cursor as Python does: a line feed as \\n."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def reason_of(error):
    """Return in one line what an exception says, or its type if it says nothing."""
    return textwrap.shorten(str(error), 600, placeholder=" ...") or type(error).__name__


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, without the usage."""

    example = ""  # a whole command, to be shown when a required flag is missing
    leave_out = ()  # names of flags that are not added: a script has no use for them
    helps = {}  # {flag: help}, where a script has other words than all scripts
    words = ()  # the command line

    def add_argument(self, *names, **options):
        """Add a flag, unless it is to be left out, and return what argparse returns.

        A default that argparse knows is added to the help. Others depend on the data set or on the
        method: there the help has to name them.
        """
        if names[0] in self.leave_out:
            return None
        text = self.helps.get(names[0], options.get("help"))
        default = options.get("default")
        if text and default is not None and "action" not in options and "(default" not in text:
            values = default if isinstance(default, (list, tuple)) else [default]
            text += f" (default: {' '.join(map(str, values))})"
        options["help"] = text
        return super().add_argument(*names, **options)

    def _get_values(self, action, arg_strings):
        """Convert the values of a flag; exit with one line if one is empty, as of an unset $OUT."""
        if "" in arg_strings:
            valid = action.help or f"choose from: {', '.join(action.choices or ())}"
            name = "/".join(action.option_strings) or action.dest
            exit_with_error(f"{name}: an empty value; {valid}")
        return super()._get_values(action, arg_strings)

    def parse_known_args(self, args=None, namespace=None):
        """Do what argparse does, and remember the command line for `error`."""
        self.words = sys.argv[1:] if args is None else args
        return super().parse_known_args(args, namespace)

    def error(self, message):
        """End the program with the message and a hint: a flag, the example, or --help."""
        # argparse itself would print the usage first, some 20 lines.
        known = self._option_string_actions
        for word in self.words:
            flag = word.partition("=")[0]
            # argparse takes the beginning of a flag for the flag. A bare -- is none.
            if not flag.startswith("--") or any(name.startswith(flag) for name in known):
                continue
            near = difflib.get_close_matches(flag, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "try --help"
            exit_with_error(f"unrecognized arguments: {flag} ({hint})")
        is_missing = message.startswith("the following arguments are required")
        if is_missing and self.example:
            exit_with_error(f"{message} (e.g. {self.example})")
        exit_with_error(f"{message} (try --help)")


# Beside the weights of a network, in float32, a number nearer to 0 than this is lost.
SMALLEST = 1e-8


def number(kind, low, high=10**9):
    """Return an argparse type: a number within bounds, which its error message names.

    kind  int or float
    low   smallest number that is allowed
    high  largest number that is allowed
    """

    def convert(text):
        value = kind(text)
        is_lost = 0 < abs(value) < SMALLEST
        # nan and inf are numbers for Python, and no setting makes sense with them.
        if low <= value <= high and math.isfinite(value) and not is_lost:
            return value
        bounds = f"from {low} to {high}"
        if is_lost:
            bounds += f", and at least {SMALLEST} away from 0"
        raise argparse.ArgumentTypeError(f"{text} is out of range: {bounds}")

    # argparse puts this name into its message: "invalid whole number value: 'x'".
    convert.__name__ = "whole number" if kind is int else "number"
    return convert


def refuse_log_sigma(log_sigma):
    """Exit with one line if --log-sigma, the mean and std of ln sigma, is no distribution."""
    if log_sigma is not None and log_sigma[1] < 0.01:
        exit_with_error(f"--log-sigma: the second number is a std: {log_sigma[1]} is below 0.01")


def refuse_resume_and_overwrite(args):
    """Exit with one line if both flags are given."""
    if args.resume and args.overwrite:
        exit_with_error("--resume goes on and --overwrite begins again: give one of them")


MAX_SEED = 2**63 - 1  # PyTorch takes no larger seed


def parser(doc, leave_out=(), helps=None, **defaults):
    """Return a Parser with the flags that every script has; a script adds its own.

    doc        description for --help, with its line breaks
    leave_out  those of these flags that the script does not have
    helps      {flag: what it means in the script}, where that is not the same for all
    defaults   other default values of these flags
    """
    p = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.leave_out = leave_out
    p.helps = helps or {}
    p.add_argument("--dataset", default="mnist", help=f"one of: {', '.join(RECIPES)}")
    p.add_argument(
        "--data-dir",
        help="folder that holds the data set, or to download it into (default: data/)",
    )
    p.add_argument(
        "--cache-dir",
        help="folder for decoded pictures (default: beside the data, or <out>/cache if that "
        "cannot be written to)",
    )
    p.add_argument("--steps", type=number(int, 1), help="training steps")
    p.add_argument("--batch-size", type=number(int, 2, 10**6), help="images a step")
    p.add_argument("--lr", type=number(float, SMALLEST, 1), help="peak learning rate of Adam")
    p.add_argument(
        "--grad-accum",
        type=number(int, 1),
        default=1,
        help="do a batch in so many parts, for less memory",
    )
    p.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile the network that trains: a minute more at the start, faster on CUDA",
    )
    p.add_argument(
        "--bf16",
        action="store_true",
        help="train and sample in bfloat16 on a CPU too, for processors with units for it",
    )
    add_seed(p)
    p.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where PyTorch computes, such as cpu, cuda, cuda:1 or mps",
    )
    add_out(p)
    add_overwrite(p)
    p.add_argument(
        "--quick",
        action="store_true",
        help="the same path with few steps and samples, in <out>/quick: does it run?",
    )
    p.set_defaults(**defaults)
    return p


def refuse_unused(p, args, unused, why):
    """Exit with one line on a flag that would silently be ignored.

    p       the Parser that has read `args`
    unused  names of the flags that have no part in this run
    why     the end of "--n has no meaning ...", e.g. "with --judge"

    Call it before the defaults are filled in. A flag that has its default counts as not given.
    """
    for name in unused:
        if getattr(args, name) != p.get_default(name):
            flag = "--" + name.replace("_", "-")
            exit_with_error(f"{flag} has no meaning {why}; leave it out")


def refuse_other_methods(args, belongs_to):
    """Exit with one line if a flag was given that has no part in args.method.

    belongs_to  {name of a flag: the methods that have it}

    Call it before the defaults are filled in: a flag that is None was not given.
    """
    for flag, methods in belongs_to.items():
        if getattr(args, flag) is not None and args.method not in methods:
            exit_with_error(
                f"--{flag.replace('_', '-')} has no part in --method {args.method}; "
                f"it belongs to --method {' | '.join(methods)}"
            )


def add_fid(p):
    """Add --fid and --inception-weights to a Parser."""
    p.add_argument("--fid", action="store_true", help="also the standard FID; needs torch-fidelity")
    p.add_argument(
        "--inception-weights",
        metavar="PATH",
        help="--fid without network: the file of Inception's weights, which you trust "
        "(default: downloaded)",
    )


def refuse_missing_fid(args):
    """Exit with one line if --fid lacks something: the sampling before it can take hours."""
    if args.fid and not importlib.util.find_spec("torch_fidelity"):
        exit_with_error(
            "--fid needs one package more: pip install torch-fidelity "
            "(or drop --fid: FD needs nothing)"
        )
    if args.inception_weights and not Path(args.inception_weights).is_file():
        exit_with_error(
            f"--inception-weights {args.inception_weights} not found; "
            "drop the flag and torch-fidelity downloads the file"
        )


def standard_fid(args, fake, real, **more):
    """Compute the standard FID of fake and real images, uint8 (N, C, H, W), by torch-fidelity.

    more  other arguments of torch_fidelity.calculate_metrics

    FID takes the features of the Inception network, of images that are resized as TensorFlow does
    it. So it can be compared with the literature. Our FD takes the judge's features, and its scale
    is another one. Exits with one line if torch-fidelity cannot use or download its weights.
    """
    import torch_fidelity

    def as_dataset(images):
        # It wants a Dataset of (3, H, W) bytes. expand repeats a grey channel and copies nothing.
        return torch.utils.data.Subset(images.expand(-1, 3, -1, -1), range(len(images)))

    try:
        result = torch_fidelity.calculate_metrics(
            input1=as_dataset(fake),
            input2=as_dataset(real),
            fid=True,
            cuda=args.device != "cpu",
            verbose=False,
            feature_extractor_weights_path=args.inception_weights,
            **more,
        )
    except Exception as error:  # another file, half a file, no network: many exception types
        if is_out_of_memory(error):
            raise
        exit_with_error(
            f"--fid: torch-fidelity failed ({reason_of(error)}); it needs the file "
            "pt_inception-2015-12-05-6726825d.pth (--inception-weights); what was drawn is kept"
        )
    return result["frechet_inception_distance"]


def add_seed(p):
    """Add the flag --seed to a Parser."""
    text = "of all random numbers: another seed is another try"
    p.add_argument("--seed", type=number(int, 0, MAX_SEED), default=0, help=text)


def add_out(p):
    """Add the flag --out to a Parser."""
    p.add_argument("--out", default="out", help="root of everything that is written")


def add_overwrite(p):
    """Add the flag --overwrite to a Parser."""
    p.add_argument(
        "--overwrite", action="store_true", help="replace what was made with other settings"
    )


# The help of --overwrite where a training can be resumed.
OVERWRITE_OR_RESUME = "replace what was made with other settings, begin again what was stopped"


def add_forget(p, script, verb):
    """Add the flag --forget, which has no default, to a Parser.

    script  file name of the script that the example in the error message calls
    verb    the end of "names of the classes ...", for --help
    """
    p.add_argument(
        "--forget",
        nargs="+",
        required=True,
        metavar="CLASS",
        help=f"names of the classes {verb}, e.g. 3 7 (no default)",
    )
    p.example = f"python {script} --dataset mnist --forget 3"


def finish_args(args, full, quick, folder=None):
    """Fill in what the user left open, and set up everything that a run needs; return args.

    args    Namespace of a `parser`
    full    default values of flags that are None
    quick   those that differ under --quick
    folder  name of the folder in --out that the run writes into; None: that of the data set

    Exits with one line for an unknown data set, and for a device or folder that cannot be used.
    """
    fill_defaults(args, full, quick)
    drop_repeated(args)
    separate_quick(args)
    recipe(args.dataset)  # an unknown data set ends here
    start_processes(args)
    check_device(args)  # only now: torchrun has just changed "cuda" to the GPU of this process
    out = Path(args.out) / (folder or args.dataset)
    refuse_pictures_among_outputs(args, out)
    remove_leftovers(make_folder(out))
    torch.manual_seed(args.seed)
    # TF32 on CUDA, nothing on a CPU. A likelihood does without it, see no_tf32.
    torch.set_float32_matmul_precision("high")
    use_all_cores()
    say_bf16(args)
    return args


def refuse_pictures_among_outputs(args, out):
    """Exit with one line if the user's pictures and the folder `out` lie inside each other.

    What is written would become pictures of the data set. And what looks like a leftover there
    could be the user's own file. Nor may decoded pictures lie in the folder of a class.
    """
    if args.dataset != "folder" or not args.data_dir:
        return
    data = Path(args.data_dir).resolve()
    out = out.resolve()
    if args.cache_dir and data in Path(args.cache_dir).resolve().parents:
        exit_with_error(
            f"--cache-dir {args.cache_dir} lies among the pictures of --data-dir {args.data_dir}, "
            "and would count as one of their classes; choose another folder with --cache-dir"
        )
    if data == out or data in out.parents or out in data.parents:
        exit_with_error(
            f"--data-dir {args.data_dir} and the outputs in {out} lie inside each other; "
            "choose another folder with --out"
        )


def fill_defaults(args, full, quick):
    """Set the flags that the user left open: from `quick` under --quick, else from `full`."""
    defaults = dict(full)
    if args.quick:
        defaults |= quick
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def drop_repeated(args):
    """Keep one of the values of a flag that are given twice: --forget 3 3 is --forget 3."""
    for name in ("forget", "without", "keep", "runs", "relearn", "sigmas"):
        if getattr(args, name, None):
            setattr(args, name, list(dict.fromkeys(getattr(args, name))))


def separate_quick(args):
    """Let a --quick run read and write in <out>/quick, where no full run looks for anything."""
    if args.quick:
        args.out = str(Path(args.out) / "quick")


def command_line(script, args, *flags):
    """Return a command that works as it is printed: a shell takes it without a change.

    script  name of the file, e.g. "03_unlearn.py"
    args    of the run that prints it; the command reads and writes in the same places
    flags   its own flags and their values, e.g. "--forget", "3", "7"
    """
    argv = ["python", script_path(script), "--dataset", args.dataset, *flags]
    if args.data_dir:
        argv += ["--data-dir", Path(args.data_dir)]
    if getattr(args, "cache_dir", None):  # 01 has no such flag
        argv += ["--cache-dir", Path(args.cache_dir)]
    if args.quick:
        argv += ["--quick"]
    argv += out_flag(args)
    if args.device == "cpu" and torch.cuda.is_available():
        argv += ["--device", "cpu"]
    return shell_command(argv)


def out_flag(args):
    """Return --out with its value, for a command that writes where a run with `args` does."""
    out = Path(args.out)
    if args.quick:
        out = out.parent  # --quick will add its folder again, see separate_quick
    return [] if str(out) == "out" else ["--out", out]


def own_command(script, argv, *more):
    """Return the command with which this program was started, for its records.

    argv  the arguments of main; None stands for those of the command line
    more  flags and values that come after them
    """
    argv = sys.argv[1:] if argv is None else argv
    return shell_command(["python", script_path(script), *argv, *more])


def leave_out(argv, *switches):
    """Return the arguments of main without these switches; argparse lets them be shortened.

    argv  the arguments of main; None stands for those of the command line
    """
    argv = sys.argv[1:] if argv is None else argv
    return [word for word in argv if len(word) < 3 or not any(s.startswith(word) for s in switches)]


def shell_command(argv):
    """Join strings, numbers and paths into one line that bash takes as they are.

    Any stream can show the line: what it could not, such as a byte that is no UTF-8 or an umlaut
    in a terminal of ASCII, is spelled in bash's form $'...'.
    """
    words = []
    for word in argv:
        text = str(word)
        if isinstance(word, Path) and text.startswith("-"):
            text = f"./{text}"  # or it would be taken for a flag
        words.append(shlex.quote(text) if is_showable(text) else spell_bytes(text))
    return " ".join(words)


def split_command(command):
    """Split what shell_command has joined: a list of strings. Raises ValueError for what it cannot.

    The form $'...' is bash's own, and unknown to shlex.
    """

    def spell_for_shlex(word):
        """Spell what spell_bytes has spelled as any shell would take it."""
        codes = re.sub(rb"\\x(..)", lambda code: bytes.fromhex(code[1].decode()), word[1].encode())
        return shlex.quote(codes.decode("utf-8", "surrogateescape"))

    # No space in it: spell_bytes leaves none.
    return shlex.split(re.sub(r"(?<!\S)\$'([^'\s]*)'(?!\S)", spell_for_shlex, command))


def is_showable(text):
    """Return whether both stdout and stderr can show a text, in one line."""
    for stream in (sys.stdout, sys.stderr):
        try:
            text.encode(getattr(stream, "encoding", None) or "utf-8")
        except UnicodeEncodeError:
            return False
    return text.isprintable()


def spell_bytes(text):
    """Spell a text in the letters of ASCII for bash: $'caf\\xc3\\xa9'."""
    spelled = ""
    for byte in text.encode("utf-8", "surrogateescape"):
        char = chr(byte)
        is_plain = char.isascii() and char.isprintable() and char not in "\\' "
        spelled += char if is_plain else f"\\x{byte:02x}"
    return f"$'{spelled}'"


def script_path(script):
    """Return how a shell finds a script from here: by its name alone in the project's folder."""
    return script if Path.cwd() == HERE else str(HERE / script)


def start_processes(args):
    """Join the other processes, if torchrun has started this one, and set this one's device.

    Of several processes only the first one prints.
    """
    # torchrun says who is who through the environment.
    if "RANK" not in os.environ or dist.is_initialized():
        return
    missing = [name for name in TORCHRUN_SETS if not os.environ.get(name)]
    if missing:
        exit_with_error(
            f"RANK is set in the environment, and {', '.join(missing)} not: start with torchrun, "
            "or type first: unset RANK"
        )
    on_cuda = args.device == "cuda"
    backend = "nccl" if on_cuda else "gloo"
    # So long, because the others wait while the first one downloads a data set.
    dist.init_process_group(backend, timeout=timedelta(hours=12))
    atexit.register(dist.destroy_process_group)
    if on_cuda:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    if not is_first_process():
        sys.stdout = _null_stream()


TORCHRUN_SETS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def _null_stream():
    """Return a text stream that forgets what is written into it."""
    return open(os.devnull, "w")


def check_device(args):
    """Exit with one line if args.device cannot be used; make it the current one on CUDA."""
    try:
        # The first thing on the device fails for a wrong name, an absent GPU and an absent driver.
        torch.zeros(1, device=args.device).item()
        if args.device.startswith("cuda:"):
            # Without this all processes would send their messages (NCCL) from the first GPU.
            torch.cuda.set_device(args.device)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = reason_of(error)
        exit_with_error(f"--device {args.device} is not usable here ({reason}); try --device cpu")


def use_all_cores():
    """Let PyTorch compute on all cores that this program may use, shared among its processes.

    OMP_NUM_THREADS says how many threads each process may have, as everywhere else. torchrun sets
    it to 1 for several processes, unless it is set already.
    """
    _, num_processes = ranks()
    # More threads than cores would slow all of them down.
    limits = [allowed_cores() // num_processes]
    for name in ("OMP_NUM_THREADS", "OMP_THREAD_LIMIT", "MKL_NUM_THREADS"):
        # OpenMP also allows a list, for nested loops: the first one counts.
        wanted = os.environ.get(name, "").split(",")[0].strip()
        if wanted.isdigit() and int(wanted) > 0:
            limits.append(int(wanted))
    torch.set_num_threads(max(1, min(limits)))


def allowed_cores():
    """Return how many cores this program may use: the least of all that is known about it."""
    limits = [os.cpu_count() or 1]
    # A container or `taskset` may allow fewer cores than the machine has; cpu_count would give all
    # of them. sched_getaffinity exists on Linux only.
    if hasattr(os, "sched_getaffinity"):
        limits.append(len(os.sched_getaffinity(0)))
    if hasattr(os, "process_cpu_count"):  # Python 3.13: it knows PYTHON_CPU_COUNT
        limits.append(os.process_cpu_count() or 1)
    limits += cpu_quotas()
    return max(1, min(limits))


def cpu_quotas(root="/sys/fs/cgroup", own="/proc/self/cgroup"):
    """Return the numbers of cores that Linux grants to the groups this program is in: a list.

    Docker's --cpus, Kubernetes and batch systems set such a quota. All cores are visible all the
    same, and threads beyond the quota would wait for each other.

    root  folder of the groups
    own   file that names the groups of this program, in lines such as 0::/user/job
    """
    folders = {Path(root), Path(root) / "cpu"}  # as a container sees its own group
    try:
        for line in Path(own).read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            base = Path(root)
            if controllers:  # version 1 has a tree for each controller
                base = base / controllers
            group = base / name.strip("/")
            # The groups around it have quotas too.
            folders.update([group, *group.parents[: len(Path(name).parts)]])
    except (OSError, ValueError):  # no Linux, or no /proc
        pass
    quotas = [_read_quota(folder) for folder in folders]
    return [quota for quota in quotas if quota is not None]


def _read_quota(folder):
    """Return the whole cores that a group's folder grants, at least 1; None if it says nothing."""
    try:
        if (folder / "cpu.max").exists():  # version 2: "150000 100000", or "max 100000"
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        cores = int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # not there, or "max": no limit
        return None
    return max(1, int(cores)) if cores > 0 else None  # -1 stands for no limit in version 1


# The errors of a write for which there is no space: on the disk, in the user's share of it, or
# under the shell's limit on the size of a file (ulimit -f).
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Stopped(KeyboardInterrupt):
    """A signal has asked the program to end: as Ctrl-C does, and with the same cleaning up."""

    def __init__(self, signum):
        super().__init__(signum)
        self.signum = signum


def raise_stopped(signum, frame):
    """Handle a signal by an exception. Left alone, SIGTERM would end the program at once."""
    raise Stopped(signum)


def ending_signals():
    """List the signals that ask a program to end: of Ctrl-C, of `kill`, of a closed terminal."""
    names = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
    return [getattr(signal, name) for name in names if hasattr(signal, name)]


class Output:
    """A stream of text that drops what it cannot write, so that a run goes on without its reader.

    `python 03_unlearn.py ... | head -1` closes the pipe after one line. Or the output goes into a
    file, and the disk is full. A run of hours should end in neither case.

    error  the first OSError, or None
    """

    def __init__(self, stream):
        self.stream = _null_stream() if stream is None else stream  # None: the shell closed it, >&-
        self.error = None

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        """Write a text, or drop it. What would move the cursor is spelled; see one_line."""
        shown = re.sub(r"[^\n\r\t]+", lambda part: one_line(part[0]), text)
        self._attempt(self.stream.write, shown)
        return len(text)

    def flush(self):
        """Write what is still in the buffer, or drop it."""
        self._attempt(self.stream.flush)

    def _attempt(self, method, *args):
        try:
            method(*args)
        except OSError as error:
            self.error = self.error or error
            # Python writes the rest of the buffer when it ends, and would fail once more.
            with contextlib.suppress(OSError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.stream.fileno())
                os.close(nowhere)


def run(main):
    """Run main(argv) of a script, and end as programs do: with one line and without a traceback.

    The exit status is

    0    success
    1    the run has finished, but it made things worse, or has not reached what it was to reach
    2    bad input, a file that cannot be read or written, no space left, too little memory
    130  Ctrl-C; 143 after SIGTERM, in general 128 + the number of the signal
    141  nobody has read the output to its end; the run has finished all the same
    """
    for signum in ending_signals():
        if signal.getsignal(signum) == signal.SIG_DFL:  # `nohup` has it ignored, and it stays so
            signal.signal(signum, raise_stopped)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show
    stdout = Output(sys.stdout)
    stderr = Output(sys.stderr)
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            _run_to_one_line(main)
        finally:
            stdout.flush()
        if isinstance(stdout.error, BrokenPipeError):
            raise SystemExit(141)
        if stdout.error is not None:
            exit_with_error(
                f"the output could not be written ({stdout.error}); the run itself has finished"
            )


@contextlib.contextmanager
def going_on_with(command, path):
    """Name a command in the line that says what has interrupted the block.

    command  goes on from the file at `path`; it is not named while there is no such file
    """
    try:
        yield
    except (KeyboardInterrupt, OSError) as stop:
        if path.exists():
            stop.remedy = f"go on with: {command}"
        raise


def _run_to_one_line(main):
    """Run main(argv); turn what the user can do something about into one line on stderr."""
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt as stop:
        signum = getattr(stop, "signum", signal.SIGINT)
        name = "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name
        print()  # a line of progress may stand there without its end
        remedy = getattr(stop, "remedy", "what was finished before is still there")
        warn(f"stopped by {name}; {remedy}")
        raise SystemExit(128 + signum) from None
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        exit_with_error(
            "out of memory: split a batch with --grad-accum 2 (or 4, 8), or lower --batch-size, "
            "--n or --width; what was finished before is still there"
        )
    except OSError as error:
        exit_with_error(describe_os_error(error))


# PyTorch's words for too little memory, where it has no type of error for that. They are those of
# a CPU, of one under Windows, of mps, and of a size that no machine could have.
TOO_LITTLE_MEMORY = re.compile(
    "can't allocate memory|not enough memory|out of memory|Storage size calculation overflowed|"
    "integer multiplication overflow"
)


def is_out_of_memory(error):
    """Return whether an exception says that the memory of the GPU or of the CPU is too small."""
    is_typed = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return is_typed or TOO_LITTLE_MEMORY.search(str(error)) is not None


def physical_memory():
    """Return how many bytes of memory the machine has; infinity where the system cannot tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return math.inf


def describe_os_error(error):
    """Say in one line which file could not be read or written, why, and what is to be done."""
    # filename2 is the target of a move.
    path = error.filename2 or error.filename
    reason = error.strerror or reason_of(error)
    if error.errno in NO_SPACE:
        remedy = "make room, or choose another place with --out, and run this again"
        if hasattr(error, "remedy"):
            remedy = f"make room, then {error.remedy}"
        return (
            f"{path or 'a file'} could not be written ({reason}); what was finished before is "
            f"still there: {remedy}"
        )
    if path is None:
        return reason
    return f"{path} cannot be used ({reason})"
