"""05  Restore damaged images with the unlearned model: what it has forgotten comes back less.

    python 05_downstream.py --dataset mnist --forget 3 --task inpaint
    python 05_downstream.py --dataset mnist --forget 3 --task inpaint --paper
    python 05_downstream.py --dataset mnist --forget 3 --task reconstruct

The first fills in the right half; --mask takes another hole. --paper does it with the paper's
sampler, which takes 2001 evaluations an image. The third adds noise and takes it away again.
Nothing is trained here.

Question: the unlearned model no longer draws D_f from nothing. Does it still restore an image of
          D_f that it is shown?
Answer:   restoring is drawing under a condition. D_g comes back as from the Standard model. D_f
          comes back as something else, the more often the less is left of the image. Encode-decode,
          which the paper reports, cannot tell: the probability-flow ODE is one-to-one for *any*
          network, so there and back returns the image, forgotten or not. It is shown ("latent"),
          but judge by noise that really hides the class.

There is a row for each run of 03; all of them get the same images and the same noise. --steps is
the number of noise levels (of ODE steps each way for "latent"). Writes
out/<dataset>/forget-<names>/downstream/<task>/: table.json, pictures.png, and for reconstruct
curve.png. A table of other settings is replaced only with --overwrite.

Predict, then run:
  1. What does a hole look like that is filled in one pass, and why?
     (--resample 1, then 5; see repaint)
  2. Above which sigma does noise begin to hide which digit it was?
     (--task reconstruct, the curve)
  3. Does PSNR on D_f fall much when the digit becomes another one?
     (look at the picture)
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    # The imports take seconds. Until common.run listens, Ctrl-C ends the program without a word.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import common

# The methods whose rows follow Standard, in the order of the poster. Others come after them.
FIRST_METHODS = ["unseen", "ort", "obt", "obt-rel"]

LEAST_N = 3  # test images of D_f, and of D_g; a Frechet distance of fewer says nothing

# ---- masks ---------------------------------------------------------------------------------------
#
# Each function says which pixels are hidden. y (H, 1) and x (W,) are the centres of the pixels,
# from 0 at the upper left corner to 1. The result is bool and broadcasts to (H, W).


def hides_half(y, x):
    """Hide the right half."""
    return x > 0.5


def hides_rows(y, x):
    """Hide a band just below the middle, a quarter of the height: the mask for CelebA."""
    return abs(y - 0.625) < 0.125


def hides_center(y, x):
    """Hide a square of half the side in the middle."""
    return torch.maximum(abs(y - 0.5), abs(x - 0.5)) < 0.25


MASKS = {"half": hides_half, "rows": hides_rows, "center": hides_center}


def read_grey(path):
    """Read a picture as grey values in [0, 1], (H, W); exit with one line if it cannot be read."""
    try:
        pixels = torch.from_numpy(np.array(common.read_picture(path)))  # (H, W, 3) bytes
        return pixels.float().mean(-1) / 255
    except Exception as error:  # what is no picture raises half a dozen different types
        common.exit_with_error(
            f"--mask {path} is not one of {', '.join(MASKS)}, "
            f"nor a PNG that can be read ({type(error).__name__})"
        )


def load_mask(name, height, width):
    """Make the mask that --mask names: hidden (1, H, W) bool, True where the hole is.

    name  a key of MASKS, or the path of a PNG, which is scaled to the image; white is hidden

    Exits with one line if the PNG cannot be read, and if the mask hides everything or nothing.
    """
    if name in MASKS:
        y = (torch.arange(height) + 0.5) / height
        x = (torch.arange(width) + 0.5) / width
        is_hole = MASKS[name](y[:, None], x)
        grey = is_hole.float().expand(height, width)
    else:
        grey = read_grey(name)

    # interpolate wants a batch and a channel: (H', W') -> (1, 1, H', W') -> (1, H, W)
    hidden = F.interpolate(grey[None, None], size=(height, width))[0] > 0.5

    # ssim compares windows of 11x11 pixels, and the centre of a window is at least 5 pixels from
    # the edge. A hole without such a centre could not be measured.
    fault = None
    if hidden.all():
        fault = "everything"
    elif not hidden[:, 5:-5, 5:-5].any():
        fault = "nothing but, perhaps, the edges"
    if fault:
        common.exit_with_error(f"--mask {name} hides {fault}; make the hole white, the rest black")
    return hidden


# ---- arguments -----------------------------------------------------------------------------------


def arguments(argv):
    """Read the command line and fill in what it leaves open."""
    helps = {
        "--steps": "noise levels on the way to an image (default: 25; 1000 with --paper, 16 with "
        "--task reconstruct)",
        "--batch-size": "images that are restored at once (default: 250)",
    }
    parser = common.parser(__doc__, ("--lr", "--grad-accum", "--compile"), helps)
    common.add_forget(parser, "05_downstream.py", "that were forgotten")
    parser.add_argument(
        "--task",
        choices=["inpaint", "reconstruct"],
        default="inpaint",
        help="fill in a part of each image, or add noise to it and take that away",
    )
    parser.add_argument(
        "--sde",
        choices=list(common.SDES),
        default="vp",
        help="its noise range and its clock are used; one network serves all SDEs",
    )
    parser.add_argument(
        "--runs",
        nargs="+",
        metavar="RUN",
        help="folder names of the runs to compare, e.g. obt-rel-vp (default: all)",
    )
    parser.add_argument(
        "--n",
        type=common.number(int, LEAST_N),
        help="test images of D_f, and as many of D_g (default: 200)",
    )
    parser.add_argument(
        "--mask",
        help=f"inpaint: {', '.join(MASKS)}, or a PNG that is white where to fill in "
        "(default: half)",
    )
    parser.add_argument(
        "--resample",
        type=common.number(int, 1, 1000),
        help="inpaint: passes through each noise level (default: 5)",
    )
    parser.add_argument(
        "--paper",
        action="store_true",
        help="inpaint: the paper's predictor-corrector with replacement, 1000 steps",
    )
    parser.add_argument(
        "--sigmas",
        type=common.number(float, 0.02, 50),
        nargs="+",
        help="reconstruct: levels of noise to take away again (default: 1 1.4 1.7 2 2.8)",
    )
    parser.add_argument(
        "--clip-weights",
        metavar="PATH",
        help="a ViT-B-32 checkpoint for open_clip: adds the CLIP distance on D_g (default: none)",
    )
    args = parser.parse_args(argv)
    refuse_unused_flags(parser, args)

    steps = 25  # with 5 passes through each level that makes 121 evaluations
    if args.paper:
        steps = 1000
    if args.task == "reconstruct":
        steps = 16
    full = {
        "steps": steps,
        "batch_size": 250,
        "n": 200,
        "mask": "half",
        "resample": 5,
        "sigmas": [1.0, 1.4, 1.7, 2.0, 2.8],
    }
    quick = {"steps": 4, "n": 12, "resample": 2, "sigmas": [0.5, 1.0]}
    return common.finish_args(args, full, quick)


def refuse_unused_flags(parser, args):
    """Exit with one line on a flag that the chosen task would silently ignore."""
    unused = ["sigmas"]
    if args.task == "reconstruct":
        unused = ["mask", "resample", "paper"]
    elif args.paper:
        unused = ["sigmas", "resample"]

    chosen = f"with --task {args.task}"
    if args.paper:
        chosen += " --paper"
    common.refuse_unused(parser, args, unused, chosen)


# ---- restoring: x0 (B, ...) -> x0_hat (B, ...) ---------------------------------------------------
#
# There are four ways. x0 is on the scale of dequantize, from -1 to 1. `hidden` is a bool mask that
# broadcasts to x0, True in the hole. NFE is the number of network evaluations for one image.


def noise_like(x0, generator):
    """Gaussian noise with the shape, type and device of x0."""
    return common.randn(x0.shape, generator, x0.device).to(x0)


@torch.no_grad()
def repaint(net, x0, hidden, sigmas, resample=5, generator=None):
    """Fill the hole of x0 by RePaint (Lugmayr et al. 2022, Alg. 1).

    x0        (B, ...) the images; what is hidden of them is never read
    sigmas    (N,) noise levels, falling
    resample  passes through each level; 1 is plain replacement

    It works on noisy images of the form x0 + sigma z, hence for every SDE. It has
    NFE = (N - 1) resample + 1.

    Plain replacement steps down one noise level, and then overwrites the known pixels with those of
    x0 plus noise of that level. It stays biased however many steps it takes. The noise of the known
    part is drawn anew and knows nothing of the hidden part, so the two look less related than they
    are. Going up one level and down again lets them agree.
    """
    sigmas = sigmas.to(x0)
    # x is the noisy image, in the end the restored one. In the hole it starts as noise alone.
    x = torch.where(hidden, 0, x0) + sigmas[0] * noise_like(x0, generator)

    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:]):
        # Variances of independent noise add up: noise of the size `up` makes sigma of sigma_next.
        up = torch.sqrt(sigma**2 - sigma_next**2)

        for repeat in range(resample):
            # The ancestral step from sigma down to sigma', which is sigma_next (n is fresh noise):
            #   x' = x - (sigma^2 - sigma'^2)/sigma z_hat + sigma' sqrt(sigma^2 - sigma'^2)/sigma n
            _, z_hat = common.predict(net, x, sigma.expand(len(x)))
            fresh_noise = noise_like(x0, generator)
            x = x - up**2 / sigma * z_hat + sigma_next * up / sigma * fresh_noise

            known = x0 + sigma_next * noise_like(x0, generator)
            x = torch.where(hidden, x, known)

            if repeat < resample - 1:
                # Up again, the known and the hidden part together: from here on the network sees
                # them as one image and can make them agree.
                x = x + up * noise_like(x0, generator)

    x0_hat, _ = common.predict(net, x, sigmas[-1:].expand(len(x)))
    return x0_hat


@torch.no_grad()
def pc_inpaint(net, sde, x0, hidden, steps=1000, snr=0.16, sigma_min=0.01, generator=None):
    """Fill the hole of x0 (B, ...) as the paper does (Song et al. 2021, App. I.2).

    snr, sigma_min  as in common.pc_sample

    These are the Langevin and the reverse-diffusion steps of pc_sample, and after each of them the
    known pixels are replaced. NFE = 2 steps + 1.

    The known pixels get the noise of the level just reached. In score_sde, the code of Song et al.,
    they still have the noise of the old level after a step of the predictor. And ours starts with
    known pixels that are noised to the first level; score_sde starts with clean ones.
    """

    def paste(x, t):
        # Outside the hole, noise the original to time t: x_t = s(t) x0 + std(t) z, with fresh z.
        scaled = common.expand_like(sde.s(t), x) * x0
        known = scaled + common.expand_like(sde.std(t), x) * noise_like(x0, generator)
        return torch.where(hidden, x, known)

    start_time = torch.full((len(x0),), sde.T).to(x0)  # (B,)
    x = sde.prior(x0.shape, generator, x0.device).to(x0)
    x = paste(x, start_time)
    return common.pc_sample(
        net,
        sde,
        x,
        steps,
        "reverse_diffusion",
        snr=snr,
        sigma_min=sigma_min,
        generator=generator,
        after=paste,
    )


@torch.no_grad()
def encode_decode(net, sde, x0, steps=20, t=0.02, generator=None):
    """Reconstruct x0 (B, ...) as the paper does: encode it, add a little noise, decode it.

    steps  of the ODE, in each direction
    t      how much noise is added: that of the SDE at this time

    The probability-flow ODE leads from x0 to x_T, its latent. The latent becomes
    s(t) x_T + std(t) n with Gaussian noise n, and the ODE leads back. NFE = 4 steps.

    With VP the latent becomes .997 x_T + .077 n. With VE nearly nothing changes: std(.02) is .012,
    and x_T has the size 50. VP with t=0 gives x0 again, up to the error of the solver.
    """
    sigmas = common.karras_sigmas(steps + 1, sde.sigma_max(), 0.001).to(x0)  # falling

    # x0 counts as x_hat at the smallest sigma. The levels backwards lead from data up to noise.
    x_hat = common.heun_solve(net, x0, sigmas.flip(0))

    # x_T = s(T) x_hat, so that noise of std(t) on x_T is std(t)/s(T) on x_hat.
    s_T = sde.s(torch.ones(1)).item()
    t = torch.tensor([t])
    latent_noise = sde.std(t).item() / s_T * noise_like(x0, generator)
    x_hat = sde.s(t).item() * x_hat + latent_noise

    return common.heun_solve(net, x_hat, sigmas)


def noise_and_denoise(net, x0, sigma, steps=20, generator=None):
    """Add noise of the level sigma (a float) to x0 (B, ...), and draw a clean image from there.

    The result (B, ...) is a random draw from p(clean image | noisy image), with the noise of
    `generator`. Where the noise leaves the class open, the model decides. NFE = steps.
    """
    # dpmpp_sample multiplies the noise that it is given by sigma, and sigma (x0/sigma + z) is the
    # x0 + sigma z from which it has to start.
    noise = x0 / sigma + noise_like(x0, generator)
    sigmas = common.karras_sigmas(steps, sigma).to(x0)
    return common.dpmpp_sample(net, noise, sigmas, eta=1.0, generator=generator)


def make_methods(args, hidden):
    """List the ways to restore that are compared: {title: method}.

    hidden  (1, H, W) bool, True in the hole; not used by reconstruct

    A method is called as method(net, x0=..., generator=...) and returns x0_hat.
    """
    sde = common.SDES[args.sde]()
    if args.task == "reconstruct":
        methods = {}
        for sigma in sorted(args.sigmas):
            methods[f"sigma {sigma:g}"] = partial(noise_and_denoise, sigma=sigma, steps=args.steps)
        methods["latent"] = partial(encode_decode, sde=sde, steps=args.steps)
        return methods

    hole = hidden.to(args.device)
    if args.paper:
        return {"paper": partial(pc_inpaint, sde=sde, hidden=hole, steps=args.steps)}
    # Above sigma = 80 nothing of an image is left: levels there would be wasted.
    sigmas = common.karras_sigmas(args.steps, min(80.0, sde.sigma_max()))
    return {"repaint": partial(repaint, hidden=hole, sigmas=sigmas, resample=args.resample)}


def restore(images, method, hidden, args, label):
    """Restore images with one model, in batches: bytes (N, C, H, W) -> bytes (N, C, H, W).

    method  is called as method(x0=..., generator=...) and returns x0_hat
    hidden  (1, H, W) bool; all other pixels come back as they were
    label   the beginning of the printed line that says how far it is

    Batch k has its own generator, so each model gets the same noise. Exits with one line if a
    number is not finite.
    """
    finished = []
    start = time.time()
    for k, batch in enumerate(images.split(args.batch_size)):
        # As common.dequantize, but without its noise: + 0.5 is the middle of a grey level.
        x0 = (batch.float() + 0.5) / 128 - 1
        with common.bfloat16(args.device, args.bf16):
            x0_hat = method(x0=x0.to(args.device), generator=common.rng(args.seed, k))
        if not torch.isfinite(x0_hat).all():
            common.exit_with_error(
                f"{label}: numbers that are not finite; the model has diverged "
                "(unlearn again with more --alpha, or a lower --lr)"
            )

        # x0_hat is an estimate of the whole image. Paste the original over it outside the hole, so
        # that what is known stays the same to the bit.
        finished.append(torch.where(hidden, common.to_bytes(x0_hat.cpu()), batch))
        num_finished = sum(len(part) for part in finished)
        seconds = time.time() - start
        print(f"\r{label}: {num_finished}/{len(images)}, {seconds:.0f} s", end="", flush=True)
    print()
    return torch.cat(finished)


# ---- measures ------------------------------------------------------------------------------------


def psnr(images, restored, hidden=None):
    """Compute the peak signal-to-noise ratio 10 log10(1/MSE) in dB: one number per image, (B,).

    images, restored  (B, C, H, W) uint8
    hidden            (1, H, W) bool; if given, only these pixels count

    MSE is the mean squared error of the bytes divided by 255. Equal images get 100 dB. For many
    images, take the mean of their dB. The dB of their mean MSE would be another number.
    """
    # In float: bytes wrap around at 256, and then any image has about 31 dB.
    error = ((images.double() - restored.double()) / 255) ** 2
    if hidden is not None:
        error = error[:, :, hidden[0]]  # (B, C, H, W) -> (B, C, number of hidden pixels)
    mean_error = common.flat_mean(error).clamp(min=1e-10)  # no log of 0; -10 log10(1e-10) = 100
    return -10 * torch.log10(mean_error)


def ssim(images, restored, hidden=None):
    """Compute the structural similarity (Wang et al. 2004): one number per image, (B,); 1 if equal.

    images, restored  (B, C, H, W) uint8
    hidden            (1, H, W) bool; if given, only windows with a hidden pixel as centre count

    Bytes are divided by 255, so their range is 1. The window is Gaussian, 11x11 with sigma 1.5 and
    weights that sum to 1. K1 is .01 and K2 is .03. The result is the mean over the channels and
    over all windows that lie inside the image; 28x28 pixels have 18x18 of them.
    """
    a = images.double() / 255
    b = restored.double() / 255
    num_channels = a.shape[1]

    offset = torch.arange(11, dtype=torch.float64, device=a.device) - 5
    profile = torch.exp(-(offset**2) / (2 * 1.5**2))
    window = profile[:, None] * profile / profile.sum() ** 2  # (11, 11), sums to 1
    kernel = window.expand(num_channels, 1, 11, 11)

    def local_mean(values):
        # groups: each channel by itself. No padding: (B, C, H, W) -> (B, C, H - 10, W - 10)
        return F.conv2d(values, kernel, groups=num_channels)

    mean_a = local_mean(a)
    mean_b = local_mean(b)
    covariance = local_mean(a * b) - mean_a * mean_b
    variance_sum = local_mean(a * a) - mean_a**2 + local_mean(b * b) - mean_b**2

    # Wang et al., eq. 13, for means m, covariance cov and the sum of both variances var:
    #   (2 m_a m_b + K1^2)(2 cov + K2^2) / ((m_a^2 + m_b^2 + K1^2)(var + K2^2))
    numerator = (2 * mean_a * mean_b + 0.01**2) * (2 * covariance + 0.03**2)
    denominator = (mean_a**2 + mean_b**2 + 0.01**2) * (variance_sum + 0.03**2)
    similarity = (numerator / denominator).mean(1)  # (B, H - 10, W - 10), one for each window
    if hidden is None:
        return common.flat_mean(similarity)
    # 5:-5, because the centre of the first window is 5 pixels inside.
    return similarity[:, hidden[0, 5:-5, 5:-5]].mean(1)


def load_clip(path):
    """Load CLIP as a function that maps bytes (B, C, H, W) to features of length 1, (B, 512).

    path  the checkpoint of a ViT-B-32 in the format of open_clip

    Exits with a hint when something is missing.
    """
    common.refuse_no_file(path)
    try:
        import open_clip
        from torchvision.transforms.functional import to_pil_image

        checkpoint = str(Path(path).resolve(strict=True))
        model, _, prepare = open_clip.create_model_and_transforms("ViT-B-32", pretrained=checkpoint)
    except Exception as error:  # not installed, no such file, not its format
        common.exit_with_error(
            "--clip-weights needs open_clip (pip install open_clip_torch) and the file of a "
            f"ViT-B-32 checkpoint ({type(error).__name__}: {path})"
        )
    model.eval()

    @torch.no_grad()
    def clip(images):
        features = []
        for batch in images.split(50):
            inputs = torch.stack([prepare(to_pil_image(image)) for image in batch])
            features.append(F.normalize(model.encode_image(inputs), dim=1))
        return torch.cat(features)

    return clip


@dataclass
class Setup:
    """What all models share, so that two rows of a table differ by the weights alone."""

    args: argparse.Namespace
    images: torch.Tensor  # (2n, C, H, W) uint8, test images: the first n of D_f, the others of D_g
    labels: torch.Tensor  # (2n,) their classes
    hidden: torch.Tensor  # (1, H, W) bool, True in the hole; True everywhere in reconstruct
    judge: common.Judge
    real_features: torch.Tensor  # (N, d) what the judge makes of training images of D_g
    classes: list  # names of all classes
    forget: list  # indices of the classes that were forgotten
    clip: Callable | None  # bytes -> CLIP features; None without --clip-weights

    @property
    def has_hole(self):
        """Whether some pixels are known, as in inpainting."""
        return not self.hidden.all()


class Attempt(NamedTuple):
    """What one way of restoring has made of the test images, with every model."""

    title: str  # of the way, a key of make_methods
    restored: dict  # name of the model -> (2n, C, H, W) uint8
    verdicts: dict  # name of the model -> Verdict on them; the first, "clean", is on the originals


def attempt_all(setup, models, title, method):
    """Restore the images with every model in one way, and judge the results: an Attempt.

    models  {name: network}
    title   name of the way
    method  see make_methods
    """
    restored = {}
    for name, net in models.items():
        restore_one = partial(method, net)
        label = f"{title}, {name}"
        restored[name] = restore(setup.images, restore_one, setup.hidden, setup.args, label)

    verdicts = {"clean": common.judge_images(setup.judge, setup.images)}
    for name, images in restored.items():
        verdicts[name] = common.judge_images(setup.judge, images)
    return Attempt(title, restored, verdicts)


def measure_part(setup, restored, verdict, part):
    """Compare the restored images of D_f, or those of D_g, with the originals.

    restored  (2n, C, H, W) uint8
    verdict   the judge's Verdict on them
    part      slice that takes the images of D_f or of D_g

    Returns a dict:

    accuracy         share judged to be of the class of the original, in percent
    interval         [low, high], its 95 % Wilson interval
    unsure           share of which the judge is less than 80 % sure, in percent
    psnr, ssim       means over the images, see there
    psnr_hole        the same for the hole alone, if there is one; so is ssim_hole
    """
    labels = setup.labels[part]
    num_images = len(labels)
    num_right = (verdict.labels[part] == labels).sum().item()
    num_unsure = (verdict.confidence[part] < common.SURE).sum().item()
    low, high = common.wilson(num_right, num_images)
    measures = {
        "accuracy": 100 * num_right / num_images,
        "interval": [100 * low, 100 * high],
        "unsure": 100 * num_unsure / num_images,
    }

    pair = (setup.images[part], restored[part])
    for name, likeness in (("psnr", psnr), ("ssim", ssim)):
        measures[name] = likeness(*pair).mean().item()
        if setup.has_hole:
            # The known pixels are right by construction, so the hole has its own numbers.
            measures[f"{name}_hole"] = likeness(*pair, setup.hidden).mean().item()
    return measures


def measure_restored(setup, restored, verdict):
    """Measure one model's restored images: {"D_f": measures, "D_g": measures}, see measure_part.

    D_g has one or two measures more. fd is the Frechet distance to real training images of D_g in
    the features of the judge. clip_distance, with --clip-weights, is 1 - cos of the CLIP features
    of original and restored image.
    """
    n = setup.args.n
    part_f = slice(0, n)
    part_g = slice(n, 2 * n)
    measures_f = measure_part(setup, restored, verdict, part_f)
    measures_g = measure_part(setup, restored, verdict, part_g)

    # On D_f a distance to real images would say nothing: another class is the aim there.
    measures_g["fd"] = common.frechet_distance(verdict.features[part_g], setup.real_features)
    if setup.clip is not None:
        # The features have length 1: their dot product is the cosine.
        cosine = (setup.clip(setup.images[part_g]) * setup.clip(restored[part_g])).sum(1)
        measures_g["clip_distance"] = 1 - cosine.mean().item()
    return {"D_f": measures_f, "D_g": measures_g}


def measure_all(setup, attempt):
    """Measure what every model has restored: {name of the model: measure_restored(...)}."""
    # The row "clean" is for the originals. It is the ceiling: the judge errs on real images too.
    rows = {}
    for name, verdict in attempt.verdicts.items():
        restored = attempt.restored.get(name, setup.images)
        rows[name] = measure_restored(setup, restored, verdict)
    return rows


def decides_more(title, rows):
    """Whether this way of restoring says more about forgetting than all those before it.

    title  of the way
    rows   {name of the model: measure_restored(...)}

    The levels of noise come in rising order. The one that says most is the highest at which
    Standard still gives back nine of ten images of D_g. There the noise hides as much as it can,
    and a model that has forgotten nothing can still restore.
    """
    return title.startswith("sigma") and rows["Standard"]["D_g"]["accuracy"] >= 90


# ---- models and images ---------------------------------------------------------------------------


def load_models(args, forget_names, folder, shape):
    """Load the networks to compare: {name of the row: network}.

    folder  out/<dataset>/forget-<names>, which holds the runs of 03
    shape   (C, H, W) of the images

    Standard comes first, then FIRST_METHODS, then any others. Exits with one line if there are no
    runs, or not those of --runs.
    """
    base_path, base_command = common.find_base(args)
    command = common.command_line("03_unlearn.py", args, "--forget", *forget_names)

    method_of = {}  # path of model.pt -> method
    for path, trained_args in common.find_runs(args, forget_names).items():
        method_of[path] = trained_args["method"]
    available = {path.parent.name for path in method_of}
    wanted = set(args.runs or available)
    if not available:
        common.exit_with_error(f"no unlearned model in {folder}; make one with: {command}")
    if not wanted <= available:
        unknown = ", ".join(sorted(wanted - available))
        there = ", ".join(sorted(available))
        common.exit_with_error(f"--runs: no {unknown} in {folder}; choose from: {there}")

    message = f"base: {base_path}"
    missing = [method for method in FIRST_METHODS if method not in method_of.values()]
    if missing:
        message += f"; no run of {', '.join(missing)}: {command} --method {missing[0]}"
    common.say(message)

    def place(path):
        # Sort by the order of the methods. Runs of one method go by name, and so do the others.
        method = method_of[path]
        rank = len(FIRST_METHODS)
        if method in FIRST_METHODS:
            rank = FIRST_METHODS.index(method)
        return rank, path

    models = {"Standard": common.load_net(base_path, base_command, args.device, shape)}
    base = common.weights_digest(models["Standard"])
    for path in sorted(method_of, key=place):
        run = path.parent.name
        if run in wanted:
            # As in a table: "obt-rel-vp" is "Obt-rel". VP is the default and goes without saying.
            name = run.removesuffix("-vp").capitalize()
            run_command = common.run_command(args, path, forget_names)
            common.warn_of_other_base(path, base, run_command)
            models[name] = common.load_net(path, run_command, args.device, shape)
    return models


def choose_images(is_forgotten, args):
    """Choose test images to restore at random: indices (2n,), n of D_f and then n of D_g.

    is_forgotten  (N,) bool, True for the test images of D_f

    Exits with one line if the test set has too few of either.
    """
    index_f = torch.where(is_forgotten)[0]
    index_g = torch.where(~is_forgotten)[0]
    num_images = min(len(index_f), len(index_g))
    if args.n > num_images:
        remedy = f"choose --n {num_images}"
        if num_images < LEAST_N:
            remedy = f"{LEAST_N} of each are needed"
        common.exit_with_error(
            f"--n {args.n}: the test set has {len(index_f):,} images of D_f "
            f"and {len(index_g):,} of D_g; {remedy}"
        )
    # Each part has its own random stream, so the images of one do not depend on the other.
    chosen_f = common.random_subset(index_f, args.n, args.seed, 0)
    chosen_g = common.random_subset(index_g, args.n, args.seed, 1)
    return torch.cat([chosen_f, chosen_g])


# ---- outputs -------------------------------------------------------------------------------------


def print_table(title, rows):
    """Print a table for D_f and one for D_g; brackets hold the 95 % interval of the accuracy.

    rows  {name of the model: measure_restored(...)}
    """
    for part in ("D_f", "D_g"):
        keys = list(rows["clean"][part])
        keys.remove("accuracy")
        keys.remove("interval")  # these two share the first column

        heading = f"{title}, {part}"
        titles = [f"{key:>14}" for key in keys]
        print(f"{heading:16}accuracy, %          " + "".join(titles))
        for name, row in rows.items():
            measures = row[part]
            low, high = measures["interval"]
            cells = [f"{measures[key]:14.2f}" for key in keys]
            accuracy = f"{measures['accuracy']:5.1f} [{low:5.1f}, {high:5.1f}]"
            print(f"{name:16}{accuracy}" + "".join(cells))


def draw_pictures(path, setup, attempt, num_rows=10):
    """Draw originals and restored images side by side: D_f on the left, D_g on the right.

    In the corner stands the judge's class, in a filled box if it is one of the forgotten ones.
    """
    columns = {"original": setup.images}
    if setup.has_hole:
        columns["masked"] = torch.where(setup.hidden, 128, setup.images)
    columns.update(attempt.restored)

    # The model whose failures on D_f are shown first: the last run of MSGM's own methods, or else
    # the last model.
    names = list(attempt.verdicts)
    names_msgm = [name for name in names if name.startswith(("Ort", "Obt"))]
    ours = (names_msgm or names)[-1]
    standard_keeps = attempt.verdicts["Standard"].labels == setup.labels
    ours_loses = attempt.verdicts[ours].labels != setup.labels
    is_lost = standard_keeps & ours_loses

    # The first n images are of D_f. False sorts before True: those that are lost come first. A
    # stable sort keeps the order among them, and among the rest.
    n = setup.args.n
    index_f = torch.argsort(~is_lost[:n], stable=True)[:num_rows]
    index_g = torch.arange(n, min(n + num_rows, 2 * n))

    plt = common.pyplot()
    fig, axes = plt.subplots(1, 2, figsize=(1.5 * len(columns), 0.75 * num_rows + 0.8))
    for ax, index in zip(axes, (index_f, index_g)):
        draw_grid(ax, setup, columns, attempt.verdicts, index)
    title = (
        f"left: D_f, first where Standard restores the class and {ours} does not; "
        "right: D_g, in a random order"
    )
    # With one run the picture is narrow: about 20 letters fit above a column.
    fig.suptitle(textwrap.fill(common.plain_text(title), 20 * len(columns)), fontsize=10)
    fig.tight_layout(pad=0.6)
    common.save_figure(fig, path, dpi=110)


def draw_grid(ax, setup, columns, verdicts, index):
    """Draw a grid of images into the axes `ax`: a row for each image, a column for each version.

    columns   {title: images (2n, C, H, W)}
    verdicts  {title: Verdict on these images}; a column without one gets no labels
    index     (R,) which of the 2n images to show
    """
    height, width = setup.images.shape[2:]
    # R images of each of K columns: K of (R, C, H, W) -> (R, K, C, H, W) -> (R K, C, H, W), row
    # after row, as tile wants them.
    grid = torch.stack([images[index] for images in columns.values()], dim=1)
    ax.imshow(common.tile(grid.flatten(0, 1), len(columns)))
    ax.axis("off")

    for column, title in enumerate(columns):
        left = column * width
        # The name of a run can be long: it is broken at its hyphens, and grows upwards.
        lines = textwrap.fill(common.plain_text(title), 13)
        ax.text(left + width / 2, -2, lines, ha="center", va="bottom", fontsize=8)
        if title not in verdicts:
            continue  # the originals and the masked images get no label
        for row, label in enumerate(verdicts[title].labels[index].tolist()):
            name = setup.classes[label]
            common.label_corner(ax, left, row * height, name, label in setup.forget)


def plot_curve(path, results):
    """Plot the share of images that keep their class over sigma, a line for each model.

    results  {title: {name of the model: measure_restored(...)}}; titles without a sigma are left
             out
    """
    titles = [title for title in results if title.startswith("sigma ")]
    sigmas = [float(title.removeprefix("sigma ")) for title in titles]

    plt = common.pyplot()
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True)
    styles = common.method_styles(results[titles[0]])
    for ax, part in zip(axes, ("D_f", "D_g")):
        for name, style in styles.items():
            accuracies = [results[title][name][part]["accuracy"] for title in titles]
            ax.semilogx(sigmas, accuracies, **style, ms=5, label=common.plain_text(name))
        ax.set_xticks(sigmas, [f"{sigma:g}" for sigma in sigmas])
        ax.minorticks_off()
        ax.set_xlabel("noise level sigma (data in [-1, 1])")
        ax.set_title(f"{part}: class kept, % of images", fontsize=10)
    axes[0].legend(fontsize=9)
    fig.tight_layout()
    common.save_figure(fig, path, dpi=100)


def output_name(args):
    """Return the name of the folder for this task; each mask and each sampler has its own."""
    if args.task == "reconstruct":
        return "reconstruct"
    name = f"inpaint-{args.mask}"
    if args.mask not in MASKS:
        # a/hole.png and b/hole.png are two masks: their content tells them apart.
        mask = Path(args.mask)
        checksum = common.file_digest(mask)[:8]
        name = f"inpaint-{common.shorten(mask.stem, 60)}-{checksum}"
    if args.paper:
        name += "-paper"
    return name


# ---- the story -----------------------------------------------------------------------------------


def main(argv=None):
    """Find the images and the models, and restore the images with every model."""
    args = arguments(argv)
    args.command = common.own_command("05_downstream.py", argv)  # named when a picture fails
    start = time.time()

    # ---- data: n test images of D_f, then n of D_g
    train, test = common.load_train_and_test(
        args.dataset, args.data_dir, args.forget, common.cache_folders(args)
    )
    is_forgotten, forget = common.split_forget(test, args.forget)
    height, width = test.images.shape[2:]
    hidden = torch.ones(1, height, width, dtype=torch.bool)
    if args.task == "inpaint":
        hidden = load_mask(args.mask, height, width)
    clip = load_clip(args.clip_weights) if args.clip_weights else None
    chosen = choose_images(is_forgotten, args)

    # ---- models
    forget_names = [test.classes[i] for i in forget]
    folder = common.forget_folder(args.out, args.dataset, forget_names)
    finished = folder / "downstream" / output_name(args)
    made_from = {"data": [common.data_key(part) for part in (train, test)]}
    refuse_other_table(args, finished, made_from)
    models = load_models(args, forget_names, folder, test.images.shape[1:])
    judge = common.load_judge(args, test, forget_names)
    common.warn_if_unfit(args)

    # The Frechet distance compares with training images of D_g: the test images are the ones that
    # are restored, and they would be compared with themselves.
    train_forgotten, _ = common.split_forget(train, args.forget)
    real_images = common.reference_images(train.images[~train_forgotten], args.quick)
    setup = Setup(
        args=args,
        images=test.images[chosen],
        labels=test.labels[chosen],
        hidden=hidden,
        judge=judge,
        real_features=common.judge_images(judge, real_images).features,
        classes=test.classes,
        forget=forget,
        clip=clip,
    )

    with common.locked(finished):  # two programs must not do one task side by side
        restore_all(setup, models, finished, start, made_from)
    common.warn_if_unfit(args)  # again: nobody scrolls up


# The flags that a table depends on; those of the folder's name are left out.
TABLE_FLAGS = "sde steps n batch_size resample sigmas seed bf16 runs clip_weights".split()


def refuse_other_table(args, finished, made_from):
    """Exit with one line if a table would be replaced by one of other settings; see --overwrite.

    finished   the folder to write
    made_from  {"data": ...}, see common.data_key

    The models may be others: a table is made again when a run has come, or has been made anew.
    """
    now = {**{name: getattr(args, name) for name in TABLE_FLAGS}, **made_from}
    path = finished / "table.json"
    common.refuse_foreign(finished, path.name, "pictures.png", "curve.png")
    common.refuse_other_result(args, path, now, addable=("clip_weights",))


def restore_all(setup, models, finished, start, made_from):
    """Restore the same images with every model in every way; write what became of them.

    models     {name: network}
    finished   the folder to write
    start      when the program began, in seconds
    made_from  {"data": ...}, for the table
    """
    args = setup.args

    # ---- restore, judge, measure
    results = {}  # {title of the way: {name of the model: measures}}
    shown = None  # the Attempt that says most about forgetting: it is drawn and named at the end
    for title, method in make_methods(args, setup.hidden).items():
        attempt = attempt_all(setup, models, title, method)
        results[title] = measure_all(setup, attempt)
        print_table(title, results[title])
        if shown is None or decides_more(title, results[title]):
            shown = attempt

    # ---- outputs
    with common.fresh_folder(finished) as out:
        content = {
            "judged_by": shown.title,
            "results": results,
            "seconds": time.time() - start,
            "made_from": made_from,
            "args": vars(args),
        }
        common.write_json(out / "table.json", content)

    # ---- pictures: last, because the table is safe by now
    draw = partial(common.draw_picture, again=args.command)
    draw(finished / "pictures.png", draw_pictures, setup, shown)
    if args.task == "reconstruct":
        draw(finished / "curve.png", plot_curve, results)
    common.say(
        f"{time.time() - start:.0f} s; the picture shows {shown.title}; wrote {finished}/; "
        f"next: look at {finished / 'pictures.png'}"
    )


if __name__ == "__main__":
    common.run(main)
