"""04  Evaluate: every model that should have forgotten, measured alike.

    # every run of 03 for this class, Standard, Unseen
    python 04_evaluate.py --dataset mnist --forget 3
    # and attack: how soon does the class come back?
    python 04_evaluate.py --dataset mnist --forget 3 --relearn
    # the standard FID too; without the last flag torch-fidelity downloads the file
    python 04_evaluate.py --dataset mnist --forget 3 --fid \\
        --inception-weights pt_inception-2015-12-05-6726825d.pth

Question: did it forget, what did that cost, and is the class gone or only hidden?
Answer:   no single number says so, because each can be cheated. A model that draws one 1 over and
          over has an unlearning ratio of 0 and a sure judge. Likelihood may fall where nothing is
          ever drawn. So all of them stand side by side, with what real images score.

All models get the same noise, sampler, SDE, n and judge, whatever SDE they were unlearned with.
This is possible because one network serves every SDE (common.py, section 2), so --sde belongs to
the test. Standard's samples of D_f are left out. Each other model has equally many samples.

Writes into out/<dataset>/forget-<names>/: table.md, table.json, samples.png and classes.png; with
--relearn also relearn.json, relearn.png and relearned.png. The folder kept/ in there holds what is
finished, and a run that was stopped goes on from there. Delete kept/ to measure again. A table of
other settings is replaced only with --overwrite.

Predict, then run:
  1. Which model gives the 3s of the test set the worst likelihood, and is it the one that draws
     the fewest?
  2. A method that answers every 3 with one and the same 8: which columns show it?   (classes.png)
  3. Fine-tuned on one single 3, does a model draw 3s again, or that 3?
     (--relearn 1, relearned.png)
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    # The imports take seconds. Until common.run listens, Ctrl-C ends the program without a word.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import copy
import math
import os
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

import common

NLL_BATCH = 64  # images whose likelihood is computed at once
NLL_CHECK = 16  # images of D_g, and as many of D_f, that are computed again with twice the steps

# ---- arguments -----------------------------------------------------------------------------------


def arguments(argv):
    """Read the command line and fill in what it leaves open.

    Exits with one line if something is missing that a flag needs.
    """
    # Two settings have no flag, they only differ between --quick and a full run: rk4, the steps of
    # the ODE's likelihood, and levels, the noise levels of the bound.
    helps = {
        "--steps": "--relearn: steps that the attacker trains (default: 50)",
        "--batch-size": "--relearn: images a step (default: 64)",
        "--lr": "--relearn: peak learning rate of Adam (default: 0.0003)",
    }
    unused = ("--grad-accum", "--compile")
    parser = common.parser(__doc__, unused, helps, rk4=None, levels=None)
    common.add_forget(parser, "04_evaluate.py", "that were forgotten")
    parser.add_argument(
        "--sde",
        choices=list(common.SDES),
        default="vp",
        help="for all models alike: where sampling starts and likelihood ends",
    )
    parser.add_argument(
        "--n", type=common.number(int, 20, 10**6), help="samples a model (default: 2000)"
    )
    parser.add_argument(
        "--nfe",
        type=common.number(int, 2, 10**4),
        help="network evaluations a sample (default: 20; 50 with --sde ddpm)",
    )
    parser.add_argument(
        "--nll",
        choices=["ode", "bound", "none"],
        default="ode",
        help="likelihood; ode: by RK4, with the bound beside it",
    )
    parser.add_argument(
        "--n-nll",
        type=common.number(int, 2),
        help="test images of D_g and of D_f each for the likelihood (default: 128)",
    )
    parser.add_argument(
        "--nll-floor",
        type=common.number(float, 1e-4, 1),
        default=0.001,
        metavar="SIGMA",
        help="noise level at which the likelihood starts; the paper's VE: 0.01",
    )
    common.add_fid(parser)
    parser.add_argument(
        "--relearn",
        nargs="*",
        type=common.number(int, 1),
        metavar="K",
        help="attack: train on K images of D_f (default: no attack; without numbers: 1 10 100)",
    )
    args = parser.parse_args(argv)

    common.refuse_missing_fid(args)
    if args.relearn is None:
        common.refuse_unused(parser, args, ["steps", "batch_size", "lr"], "without --relearn")
    if not args.fid:
        common.refuse_unused(parser, args, ["inception_weights"], "without --fid")
    if args.nll == "none":
        common.refuse_unused(parser, args, ["n_nll", "nll_floor"], "with --nll none")

    full = {
        "n": 2000,
        "nfe": common.SDES[args.sde].nfe,
        "n_nll": 128,
        "rk4": 16,
        "levels": 64,
        # The last three are for --relearn: how the attacker trains.
        "steps": 50,
        "batch_size": 64,
        "lr": 3e-4,
    }
    quick = {"n": 60, "nfe": 6, "n_nll": 4, "rk4": 3, "levels": 8, "steps": 3, "batch_size": 8}
    return common.finish_args(args, full, quick)


def check_attack(args, num_images):
    """Hold the numbers of --relearn to the images that there are; exit with one line if they miss.

    num_images  how many training images D_f has
    """
    if args.relearn == []:  # --relearn without a number
        args.relearn = [k for k in (1, 10, 100) if k <= num_images]
    if args.relearn and max(args.relearn) > num_images:
        common.exit_with_error(
            f"--relearn {max(args.relearn)}: D_f has only {num_images} training images"
        )


# ---- the images, and which models there are ------------------------------------------------------


class Images(NamedTuple):
    """The images of one evaluation, uint8 (N, C, H, W): D_g is kept, D_f was to be forgotten."""

    train_g: torch.Tensor  # what samples are compared with
    train_f: torch.Tensor  # what the attacker relearns from
    test_g: torch.Tensor  # for the likelihood, and measured like the samples of a perfect model
    test_f: torch.Tensor  # for the likelihood, and to see how many of them the judge recognises


def split_images(train, test, args):
    """Split training and test images into D_g and D_f.

    train, test  the two Datasets

    Returns Images and the list of the forget classes' indices. Under --quick train_g is only the
    first 1000. Exits with one line if a class is unknown.
    """
    # (N,) bool masks: True for the images of D_f.
    train_forgotten, forget = common.split_forget(train, args.forget)
    test_forgotten, _ = common.split_forget(test, args.forget)
    images = Images(
        train_g=common.reference_images(train.images[~train_forgotten], args.quick),
        train_f=train.images[train_forgotten],
        test_g=test.images[~test_forgotten],
        test_f=test.images[test_forgotten],
    )
    return images, forget


def draw_nll_images(images, args):
    """Choose the test images for the likelihood and dequantise them.

    Returns (2n, C, H, W) real numbers on args.device: n images of D_g, then n of D_f.

    Call this before any network is built. Dequantising draws noise from the global generator, which
    `arguments` has just seeded, and a new network draws its weights from there too. A likelihood is
    found in kept/ by its images, so the same seed must always mean the same images.
    """
    # As many of D_g as of D_f, so that both means are known equally well.
    n = min(args.n_nll, len(images.test_g), len(images.test_f))
    chosen_g = common.random_subset(images.test_g, n, args.seed)
    chosen_f = common.random_subset(images.test_f, n, args.seed)
    return common.dequantize(torch.cat([chosen_g, chosen_f])).to(args.device)


class Model(NamedTuple):
    """A network to measure, and where it comes from."""

    name: str  # of its folder, or "standard"
    net: common.UNet  # in eval mode, its weights frozen
    trained: dict  # arguments of the run that made it
    digest: str  # common.weights_digest: tells new weights from old ones under the same name


def find_models(args, forget_names, folder, shape):
    """Load the Standard model and every finished run for these classes, as a list of Model.

    folder  out/<dataset>/forget-<names>, which holds the runs
    shape   (C, H, W) of the images

    Standard comes first, then Unseen where there is one, then the others by name. Exits with one
    line that names the command to run when nothing has been unlearned yet.
    """
    runs = common.find_runs(args, forget_names)
    if not runs:
        command = common.command_line("03_unlearn.py", args, "--forget", *forget_names)
        common.exit_with_error(f"no unlearned model in {folder}; make one with: {command}")

    base_path, base_command = common.find_base(args)
    # The Standard model may come without its arguments: the row then says None.
    base_args = common.load_checkpoint(base_path, base_command).get("args") or {}
    models = [load_model(args, "standard", base_path, base_command, base_args, shape)]

    def unseen_first(path):
        # False sorts before True: Unseen comes first, as the yardstick, and the rest goes by path.
        return (runs[path]["method"] != "unseen", path)

    base = common.weights_digest(models[0].net)
    for path in sorted(runs, key=unseen_first):
        command = common.run_command(args, path, forget_names)
        common.warn_of_other_base(path, base, command)
        models.append(load_model(args, path.parent.name, path, command, runs[path], shape))
    return models


def load_model(args, name, path, command, trained, shape):
    """Load one checkpoint as a Model, with its network on args.device.

    command  the command that makes the file, for error messages
    trained  arguments of the run that made it
    shape    (C, H, W) of the images
    """
    # Frozen: the likelihood needs gradients with respect to the images. Gradients with respect to
    # the weights would only cost memory.
    net = common.load_net(path, command, args.device, shape).requires_grad_(False)
    if args.device == "cpu":
        # 1.2 times as fast with AVX2. On CUDA this layout only pays with torch.compile.
        net = net.to(memory_format=torch.channels_last)
    digest = common.weights_digest(net)
    return Model(name=name, net=net, trained=trained, digest=digest)


# ---- what is done already, and how far we are ----------------------------------------------------


@dataclass
class Progress:
    """How far the evaluation is, counted in network evaluations: they take nearly all the time."""

    total: int  # network evaluations that this run has to do
    done: int = 0  # those that it has done
    start: float = field(default_factory=time.time)  # in seconds

    def skip(self, cost):
        """Take work off the total that an earlier run has done already."""
        # It is not added to `done`: it took no time, so the speed would seem higher than it is.
        self.total -= cost

    def advance(self, cost):
        """Count work that was done just now."""
        self.done += cost

    def label(self, name):
        """Return the beginning of a progress line, e.g. " 42 %, ETA 7 min  ort-vp.samples"."""
        percent = 100 * self.done / self.total
        if self.done == 0:
            # Nothing has been timed yet, so there is no speed to go by.
            return f"{percent:3.0f} %, ETA after the first  {name}"
        seconds_so_far = time.time() - self.start
        # The work still to do over the work done, at the speed so far.
        seconds_left = seconds_so_far * (self.total / self.done - 1)
        return f"{percent:3.0f} %, ETA {seconds_left / 60:.0f} min  {name}"


def nll_cost_per_image(args):
    """Count the network evaluations that the likelihood of one image takes."""
    if args.nll == "none":
        return 0
    if args.nll == "bound":
        return args.levels
    # RK4 evaluates the network four times a step, and a backward pass for the trace doubles that.
    # The few images that are computed a second time (NLL_CHECK) are left out.
    return args.levels + 8 * args.rk4


def total_cost(args, num_models, num_nll_images):
    """Count the network evaluations of the whole evaluation."""
    sample_cost = args.n * args.nfe
    model_cost = sample_cost + num_nll_images * nll_cost_per_image(args)
    # An attack trains for a moment only: nearly all its time goes into sampling again.
    attack_cost = len(args.relearn or []) * sample_cost
    # All models but the Standard model are attacked.
    return num_models * model_cost + (num_models - 1) * attack_cost


@dataclass
class Setup:
    """What all models share, so that two rows of a table differ by the weights alone."""

    args: argparse.Namespace
    folder: Path  # out/<dataset>/forget-<names>
    sde: common.SDE
    judge: common.Judge
    forget: list  # indices of the classes to forget
    classes: list  # names of all classes
    real_images: torch.Tensor  # (N, C, H, W) uint8, training images of D_g
    real: common.Verdict  # on these N images
    progress: Progress


def cached(setup, name, key, cost, compute):
    """Return the result of `compute`, or that of an earlier run which had the same key.

    name     of the file in kept/, without .pt
    key      dict of all settings that the result depends on; any change means a new computation
    cost     network evaluations that `compute` needs, for the time that is left
    compute  function of a progress label that returns a dict of tensors and plain values
    """
    path = common.make_folder(setup.folder / "kept") / f"{name}.pt"
    common.refuse_unwritable(path)
    result = read_cache(path, key)
    if result is not None:
        setup.progress.skip(cost)
        return result

    result = compute(setup.progress.label(name))
    # Save at once, model by model: a run that is stopped loses only what it was just computing.
    common.save_checkpoint(path, key=key, **result)
    setup.progress.advance(cost)
    return result


def read_cache(path, key):
    """Return the dict that was saved in `path` with this key, or None if there is no such dict."""
    try:
        content = common.read_torch_file(path)
        saved_key = content.pop("key")
    except Exception:  # absent, cut off, another format: many exception types, one remedy
        return None
    return content if saved_key == key else None


# ---- samples and their measures ------------------------------------------------------------------


def sample(setup, model, name="samples", tune=None, **more_key):
    """Draw args.n samples from a model, with the noise that all models share, and judge them.

    name      second half of the name of the file in kept/; the first half is the model's name
    tune      function of the network that returns a changed copy, to be sampled in its place
    more_key  settings of `tune`: a change of one of them means new samples

    Returns a dict: images (n, C, H, W) uint8, seconds that the sampling took, and verdict, the
    judge's Verdict on them.
    """
    args = setup.args
    batch = 50 if args.quick else 250

    def compute(label):
        net = model.net
        if tune is not None:
            net = tune(net)
        start = time.time()  # after tuning: the column "seconds" is for the sampling alone
        images = common.sample_images(
            net,
            args.n,
            setup.real_images.shape[1:],  # (C, H, W)
            setup.sde,
            args.seed,
            args.nfe,
            batch=batch,
            device=args.device,
            label=label,
            bf16=args.bf16,
        )
        result = {"images": images, "seconds": time.time() - start}
        if tune is not None:
            result["skipped_steps"] = net.skipped_steps
        return result

    key = {
        "weights": model.digest,
        "sampler": setup.sde.sampler,
        "sampler_version": common.SAMPLER_VERSION,
        "sde": args.sde,
        "n": args.n,
        "nfe": args.nfe,
        "seed": args.seed,
        # A batch has its own noise: with other batches, as under --quick, image i is another one.
        "batch": batch,
        "shape": list(setup.real_images.shape[1:]),
        "device": torch.device(args.device).type,
        **more_key,
    }
    if args.bf16:  # the samples of earlier versions, which had no such flag, are still good
        key["bf16"] = True
    drawn = cached(setup, f"{model.name}.{name}", key, args.n * args.nfe, compute)
    # Only the images are kept. The judge is quick, and another judge must not find old verdicts.
    return {**drawn, "verdict": common.judge_images(setup.judge, drawn["images"])}


def judged(setup, images):
    """Judge images (n, C, H, W), and return both in a dict like that of `sample`."""
    return {"images": images, "verdict": common.judge_images(setup.judge, images)}


def measures(setup, drawn, standard):
    """Measure one set of samples in all ways, against the training images of D_g: a dict.

    drawn     what `sample` or `judged` has returned
    standard  what `sample` has returned for the Standard model

    To measure the Standard model itself, pass the same object as both. The dict is that of
    common.measure with three more entries: density, coverage and (only with --fid) fid.
    """
    is_standard = drawn is standard  # `is`, not ==: another model may have drawn equal samples
    standard_forgotten = torch.isin(standard["verdict"].labels, torch.tensor(setup.forget))
    num_compared = int((~standard_forgotten).sum())

    def comparable(items):
        # The Standard model is meant to draw D_f, so these samples must not count against it. From
        # every other model take as many samples, D_f or not: most measures depend on the number.
        return items[~standard_forgotten] if is_standard else items[:num_compared]

    result = common.measure(
        drawn["verdict"],
        setup.forget,
        setup.real,
        len(setup.classes),
        None if is_standard else standard["verdict"],
    )

    # As many real images as samples: what coverage has to be for a perfect model depends on both
    # numbers (see density_coverage), and the full set would also make a large matrix of distances.
    # 3 is the number of this random stream; 1 and 2 are in nll_in_nats.
    real = common.random_subset(setup.real.features, num_compared, setup.args.seed, 3)
    density, coverage = density_coverage(real, comparable(drawn["verdict"].features))
    result["density"] = density
    result["coverage"] = coverage
    if setup.args.fid:
        cache = setup.folder / "kept"
        # The features of the real images are the same for all models.
        name = f"real-{real_key(setup.real_images, setup.args.inception_weights)}"
        kept = {"cache_root": str(cache), "input2_cache_name": name}
        fake = comparable(drawn["images"])
        result["fid"] = common.standard_fid(setup.args, fake, setup.real_images, **kept)
    return result


def density_coverage(real, fake, k=5):
    """Measure density and coverage: how real samples look, and how much of the data they reach.

    real  (N, d) features of real images
    fake  (M, d) features of samples
    k     which neighbour decides how large a ball is

    Around each real point lies a ball that reaches to its k-th neighbour. Coverage is the share of
    the balls with a fake point inside; it falls when a mode is lost. Density is the mean number of
    balls around a fake point, divided by k; it falls when fake points lie off the data.

    If both sets are of one distribution, the mean of density is 1. That of coverage is
    1 - PROD_{i<=k} (N-i)/(N+M-i), for N = M about 1 - 2^-k. The older pair of measures, precision
    and recall, has no such known value.

    Returns (density, coverage), both nan where there are too few points for a k-th neighbour.
    Source: Naeem et al. 2020, arXiv 2002.09797.
    """
    if min(len(real), len(fake)) <= k:
        return math.nan, math.nan
    # (N, N) -> (N,). Take the (k + 1)-th smallest distance: the smallest is 0, to the point itself.
    radius = torch.cdist(real, real).kthvalue(k + 1, 1).values
    inside = torch.cdist(real, fake) < radius[:, None]  # (N, M): is fake point j in ball i?
    density = inside.double().sum().item() / (k * len(fake))
    coverage = inside.any(1).double().mean().item()
    return density, coverage


def real_key(real, inception_weights):
    """Return a name for the features of real images: of which images, by which weights.

    inception_weights  path of the file of weights, or None for the one that is downloaded
    """
    weights = "published"
    if inception_weights:
        weights = common.file_digest(inception_weights)[:16]
    return f"{common.fingerprint(real)}-{weights}"


# ---- likelihood ----------------------------------------------------------------------------------


@torch.no_grad()
@common.no_tf32()
def nll_bound(net, x, sigma_min=0.001, sigma_max=152.0, levels=64, generator=None):
    """Compute an upper bound of -ln p(x) in nats, (B,), by forward passes alone.

        D/2 ln(2 pi e sigma_min^2)                            the entropy of N(x, sigma_min^2 I)
        + INT E_z |z - z_hat(x + sigma z)|^2 d ln sigma       from sigma_min to sigma_max
        + |x|^2 / (2 sigma_max^2)                             the prior's share

    x                     (B, ...) points or images, on the scale of dequantize
    sigma_min, sigma_max  ends of the integral
    levels                number of forward passes: one in each of as many intervals of ln sigma
    generator             of the noise, on the CPU

    Here |a|^2 is the sum over the D values. Why it is a bound: let KL(sigma) be the divergence of
    N(x, sigma^2 I) from the model's density of noisy images. At sigma_max that density is the
    prior N(0, sigma_max^2 I), so KL is the last term. On the way down KL grows by the integral. The
    last two terms are therefore KL(sigma_min). A divergence is E[-ln p] minus an entropy, and the
    first term puts it back. The result is E_z[-ln p(x + sigma_min z)]. It is exact for an exact
    score, and too high for any other.

    Source: Song et al. 2021, "Maximum Likelihood Training of Score-Based Diffusion Models",
    arXiv 2101.09258.
    """
    log_min = math.log(sigma_min)
    log_range = math.log(sigma_max / sigma_min)
    integral = 0.0
    for i in range(levels):
        # One ln sigma per image, uniform within the i-th of `levels` equal intervals. Each interval
        # is hit once, so the sum varies far less than with `levels` independent draws.
        u = torch.rand(len(x), generator=generator).to(x)  # (B,)
        z = torch.randn(x.shape, generator=generator).to(x)
        sigma = torch.exp(log_min + log_range * (i + u) / levels)
        _, z_hat = common.predict(net, x + common.expand_like(sigma, x) * z, sigma)
        squared_error = (z - z_hat).flatten(1).square().sum(1)  # (B, ...) -> (B,)
        integral = integral + squared_error * log_range / levels

    # D times the entropy of one number: 1/2 ln(2 pi e) + ln sigma_min.
    entropy = x[0].numel() * (0.5 * math.log(2 * math.pi * math.e) + log_min)
    # The divergence of N(x, sigma_max^2 I) from N(0, sigma_max^2 I): only the means differ.
    prior = x.flatten(1).square().sum(1) / (2 * sigma_max**2)
    return entropy + integral + prior


def likelihoods(setup, model, x, cost):
    """Estimate the negative log-likelihood of test images under one model, as a dict.

    x     (2n, C, H, W) dequantised images, the first n of D_g and the others of D_f
    cost  network evaluations that this takes

    For each kind of estimate ("ode", "bound"), unit ("bits", "nats") and part ("g", "f") there is
    an entry such as ode_bits_g: {"mean": ..., "se": ...}, where se is the standard error of the
    mean. "bits" are bits per dimension. ode_error_bits is the error of the ODE solver itself, in
    bits per dimension too. With --nll bound the entries of the ODE are missing.
    """
    args = setup.args
    num_images = len(x) // 2
    dim = x[0].numel()

    key = {
        "weights": model.digest,
        "sde": args.sde,
        "nll": args.nll,
        "nll_floor": args.nll_floor,
        "rk4": args.rk4,
        "levels": args.levels,
        "seed": args.seed,  # of the probes, and of the noise of the bound
        # The images themselves: under one --data-dir the test set may be exchanged.
        "images": common.fingerprint(x),
        "batch": NLL_BATCH,
        "check": NLL_CHECK,
        "device": x.device.type,
    }
    nats = cached(
        setup, f"{model.name}.nll", key, cost, lambda label: nll_in_nats(setup, model.net, x, label)
    )

    result = {}
    for kind in ("ode", "bound"):
        if kind not in nats:
            continue
        # (2n,) -> (n,) of D_g and (n,) of D_f. float64, because rounding adds up in a mean.
        for part, values in zip("gf", nats[kind].double().split(num_images)):
            bits = common.bits_per_dim(-values, dim)
            result[f"{kind}_bits_{part}"] = mean_and_error(bits)
            result[f"{kind}_nats_{part}"] = mean_and_error(values)

    if "fine" in nats:
        # bits_per_dim adds 7 to each. That cancels in a difference, so it is not called here.
        difference = nats["ode"][check_indices(num_images)] - nats["fine"]
        result["ode_error_bits"] = difference.abs().mean().item() / (dim * math.log(2))
    return result


def nll_in_nats(setup, net, x, label):
    """Compute -ln p of each image x (2n, C, H, W) in nats, as a dict of tensors on the CPU.

    bound  (2n,) by nll_bound
    ode    (2n,) by the ODE; only with --nll ode
    fine   (2 m,) the images of `check_indices` again, with twice the steps; only with --nll ode

    The difference of fine and ode says how far the solver is from the exact solution, without
    knowing that solution.
    """
    args = setup.args
    # One probe per image, the same for all models and for both numbers of steps: a difference
    # between two results then never comes from the probe.
    probe = common.rademacher_probes(x, 1, common.rng(args.seed, 1))[0]

    def solve(index, steps):
        # focus: dequantised images have their finest structure at a grey level, near ln sigma = -3.
        log_p = common.ode_log_likelihood(
            net, setup.sde, x[index], [probe[index]], steps, args.nll_floor, focus=-3.0
        )
        return -log_p.cpu()

    def one_batch(k):
        index = torch.arange(k * NLL_BATCH, min((k + 1) * NLL_BATCH, len(x)))
        print(f"\r{label}: {index[-1] + 1}/{len(x)}", end="", flush=True)
        bound = nll_bound(
            net,
            x[index],
            args.nll_floor,
            setup.sde.sigma_max(),
            levels=args.levels,
            # A stream of its own for each batch: which process does it makes no difference.
            generator=common.rng(args.seed, 2, k),
        )
        nats = {"bound": bound.cpu()}
        if args.nll == "ode":
            nats["ode"] = solve(index, args.rk4)
        return nats

    num_batches = math.ceil(len(x) / NLL_BATCH)
    batches = common.share_work(one_batch, range(num_batches))  # among the processes of torchrun
    print()

    nats = {}
    for kind in batches[0]:
        nats[kind] = torch.cat([batch[kind] for batch in batches])
    if args.nll == "ode":
        nats["fine"] = solve(check_indices(len(x) // 2), 2 * args.rk4)
    return nats


def check_indices(num_images):
    """Choose the images that are solved twice, the first m of D_g and of D_f: indices (2 m,).

    num_images  n; the images are n of D_g and then n of D_f. m is NLL_CHECK, but at most n
    """
    first = torch.arange(min(NLL_CHECK, num_images))
    return torch.cat([first, num_images + first])


def mean_and_error(values):
    """Compute the mean of independent values (n,) and the standard error of that mean."""
    return {"mean": values.mean().item(), "se": values.std().item() / len(values) ** 0.5}


# ---- the attack ----------------------------------------------------------------------------------


def relearn(net, images, steps, batch, lr, seed):
    """Fine-tune a copy of a network on a few images of D_f, and return the copy.

    images  (k, C, H, W) uint8
    steps   training steps with the loss and the noise levels of 02
    batch   number of images a step, drawn from the k
    lr      peak learning rate
    seed    of torch's global generator, which is set here

    This is the least that an attacker would try. A class that comes back may have been hidden, or
    it may have been learned anew. A model that never saw it (02 --without, or 03 --method unseen
    --from-scratch) is the control.
    """
    # The draws below take the global generator. Where it stands depends on what ran before, for
    # instance on what was found in kept/. The attack must not depend on that.
    torch.manual_seed(seed)
    tuned = copy.deepcopy(net).requires_grad_(True).train()
    device = next(tuned.parameters()).device
    adam = torch.optim.Adam(tuned.parameters(), lr, betas=(0.9, 0.99), fused=True)
    sde = common.TRAINING_SDE  # as in 02: the attacker does not know with which SDE we sample

    num_skipped = 0  # steps in a row whose gradient was not finite
    total_skipped = 0
    for step in range(steps):
        common.set_lr([adam], step, steps, warmup=5)
        # With replacement: the same few images again and again, each time with other noise.
        chosen = images[torch.randint(len(images), (batch,))]
        x0 = common.dequantize(chosen).to(device)
        t = common.lognormal_t(batch, sde, **common.TRAINING_NOISE, device=device)
        common.dsm_loss(tuned, sde, x0, t, weight="v").mean().backward()
        num_skipped = common.guarded_step(tuned, [adam], num_skipped)
        total_skipped += num_skipped > 0
    common.refuse_skipped(total_skipped, steps)
    tuned.skipped_steps = total_skipped  # for `sample`, which writes it down
    return tuned.requires_grad_(False).eval()


class Attack(NamedTuple):
    """One model that has relearned, for the picture."""

    name: str  # of the model
    shown: torch.Tensor  # (k, C, H, W) uint8, the images of D_f that it has relearned from
    drawn: dict  # its samples afterwards, as `sample` returns them


def attack(setup, models, rows, standard, images_f):
    """Let each model relearn from a few images of D_f; sample and measure it again.

    rows      the table's rows, in the order of `models`
    standard  the Standard model's samples
    images_f  (N, C, H, W) uint8, training images of D_f

    Returns a list of rows, and a list of Attack. The rows of a model are one with k = 0, which is
    the model as it is, and one for each number k of images. Both lists are empty without --relearn.
    The Standard model, the first one, is left out: it has forgotten nothing that it could relearn.
    """
    args = setup.args
    counts = args.relearn or []
    attacked = []
    attacks = []
    if not counts:
        return attacked, attacks
    for model, row in zip(models[1:], rows[1:]):
        attacked.append({**row, "k": 0})
        for k in counts:
            # The first k of one random order: the one image is among the 10, these among 100.
            shown = common.random_subset(images_f, k, args.seed)
            tune = partial(
                relearn,
                images=shown,
                steps=args.steps,
                batch=args.batch_size,
                lr=args.lr,
                seed=args.seed,
            )
            drawn = sample(
                setup,
                model,
                f"relearn-{k}",
                tune,
                k=k,
                shown=common.fingerprint(shown),
                steps=args.steps,
                batch_size=args.batch_size,
                lr=args.lr,
            )
            attacks.append(Attack(model.name, shown, drawn))
            attacked.append({
                "model": model.name,
                "k": k,
                "skipped_steps": drawn.get("skipped_steps"),
                **measures(setup, drawn, standard),
            })
    return attacked, attacks


# ---- tables --------------------------------------------------------------------------------------

# The columns of the two tables in their order: key of a row -> digits behind the point.
SAMPLE_COLUMNS = {
    "model": 0,
    "k": 0,
    "ur": 2,
    "ur_interval": 2,
    "fd": 2,
    "ur_no_noise": 2,
    "noise": 2,
    "low_confidence": 2,
    "instead_other": 1,
    "instead_unsure": 1,
    "instead_noise": 1,
    "class_min_ratio": 2,
    "density": 2,
    "coverage": 3,
    "fid": 2,
    "nfe": 0,
    "seconds": 0,
}
NLL_COLUMNS = {
    "model": 0,
    "ode_bits_g": 3,
    "ode_bits_f": 3,
    "ode_nats_g": 3,
    "ode_nats_f": 3,
    "bound_bits_g": 3,
    "bound_bits_f": 3,
    "bound_nats_g": 3,
    "bound_nats_f": 3,
    "ode_error_bits": 4,
}


def table(columns, rows):
    """Write a Markdown table with the keys as its header.

    columns  {key: digits behind the point}; a column that no row fills is left out
    rows     list of dicts; a key that a row has not makes an empty cell
    """
    filled = set().union(*rows)  # the keys of all rows
    keys = [key for key in columns if key in filled]
    lines = [keys]  # each line is a list of cells
    for row in rows:
        lines.append([format_cell(row.get(key, ""), columns[key]) for key in keys])

    # zip(*lines) turns the lines into columns.
    widths = [max(map(len, cells)) for cells in zip(*lines)]
    # Only now, because the dashes below the header are as many as the widest cell has letters.
    lines.insert(1, ["-" * width for width in widths])

    text = ""
    for line in lines:
        padded = [cell.ljust(width) for cell, width in zip(line, widths)]
        text += f"| {' | '.join(padded)} |\n"
    return text


def format_cell(value, digits):
    """Turn a value into the text of a cell.

    The value is a dict from mean_and_error, an interval [low, high], a number or a string.
    """
    if isinstance(value, dict):
        return f"{value['mean']:.{digits}f} ± {value['se']:.{digits}f}"
    if isinstance(value, list):
        low, high = value
        return f"{low:.{digits}f} to {high:.{digits}f}"
    if isinstance(value, float):
        return f"{value:.{digits}f}"
    return str(value)


def measure_models(setup, models, samples, nll_images):
    """Measure all models: a list of rows for the tables, one dict for each model.

    samples     what `sample` has returned for each of `models`, the Standard model's first
    nll_images  (2n, C, H, W) from draw_nll_images
    """
    nll_cost = len(nll_images) * nll_cost_per_image(setup.args)
    rows = []
    for model, drawn in zip(models, samples):
        row = {"model": model.name}
        # How the model was trained. Its SDE can differ from the SDE of this test.
        for key in ("method", "sde", "seed"):
            row[key] = model.trained.get(key)
        row["nfe"] = setup.args.nfe
        row["seconds"] = drawn["seconds"]
        row.update(measures(setup, drawn, samples[0]))
        if setup.args.nll != "none":
            row.update(likelihoods(setup, model, nll_images, nll_cost))
        rows.append(row)
    return rows


def measure_real_images(setup, images, standard):
    """Measure real test images like samples, to know what a perfect model would have.

    standard  the Standard model's samples

    Returns the row of D_g for the table, and recall, the share of D_f that the judge recognises, in
    percent. The row is the best that a model can hope for. Recall is the highest ur it can have.
    """
    args = setup.args
    # Test images, because training images would be compared with themselves and come out perfect.
    real_g = judged(setup, common.random_subset(images.test_g, args.n, args.seed))
    row = {"model": "real D_g", **measures(setup, real_g, standard)}
    for key in common.COMPARED:  # real images come from no noise that the Standard model had too
        del row[key]
    real_f = judged(setup, common.random_subset(images.test_f, args.n, args.seed))
    is_recognised = torch.isin(real_f["verdict"].labels, torch.tensor(setup.forget))
    return row, 100 * is_recognised.float().mean().item()


def report(args, rows, real_row, recall, num_nll):
    """Write the tables as Markdown: one row for each model, and real images as the last row.

    recall   share of the real D_f that the judge recognises, in percent
    num_nll  number of test images of D_g, and as many of D_f, in the likelihood
    """
    text = table(SAMPLE_COLUMNS, [*rows, real_row])
    text += f"\nOf the real D_f the judge knows {recall:.2f} %: the ceiling of ur.\n"
    if args.nll != "none":
        text += f"\nNegative log-likelihood of {num_nll} + {num_nll} test images:\n\n"
        text += table(NLL_COLUMNS, rows)
    return text


# ---- pictures ------------------------------------------------------------------------------------


def plot_samples(path, names, samples, forget, classes):
    """Draw samples.png: a row for each model, a column for each starting noise.

    samples  what `sample` returned for each of `names`, the Standard model's first

    Up to eight columns where the Standard model draws D_f, then up to eight where it draws D_g.
    """
    plt = common.pyplot()
    height, width = samples[0]["images"].shape[2:]
    # The Standard model decides which noises are shown: a column tells what became of its image.
    is_forgotten = torch.isin(samples[0]["verdict"].labels, torch.tensor(forget))
    columns_f = is_forgotten.nonzero().flatten()[:8]
    columns_g = (~is_forgotten).nonzero().flatten()[:8]
    picked = torch.cat([columns_f, columns_g])  # (columns,) indices of samples

    fig, ax = plt.subplots(figsize=(10, 0.7 * len(names) + 0.5))
    images = torch.cat([drawn["images"][picked] for drawn in samples])
    ax.imshow(common.tile(images, len(picked)))
    for i, drawn in enumerate(samples):
        for j, class_index in enumerate(drawn["verdict"].labels[picked].tolist()):
            name = classes[class_index]
            common.label_corner(ax, j * width, i * height, name, class_index in forget)

    # The y axis counts pixels: a row's name stands at the middle of its images.
    ax.set_yticks([(i + 0.5) * height for i in range(len(names))], names)
    ax.set_xticks([])
    ax.set_title(
        f"a column, one noise; left {len(columns_f)}: where Standard draws D_f", fontsize=9
    )
    common.save_figure(fig, path, dpi=110, bbox_inches="tight")


def plot_classes(path, names, samples, forget, classes):
    """Draw classes.png: how often each model draws each class, with the Standard model as a line.

    samples  what `sample` returned for each of `names`, the Standard model's first

    The bars of the forget classes are hatched.
    """
    plt = common.pyplot()
    counts = []
    for drawn in samples:
        counts.append(torch.bincount(drawn["verdict"].labels, minlength=len(classes)).numpy())
    is_forgotten = [i in forget for i in range(len(classes))]
    colors = [common.FORGOTTEN if yes else common.KEPT for yes in is_forgotten]
    hatches = ["//" if yes else "" for yes in is_forgotten]

    labels = [common.plain_text(name) for name in classes]
    # Shared axes, because the heights are to be compared from model to model.
    fig, axes = plt.subplots(
        len(names), 1, figsize=(6, 1.1 * len(names) + 0.6), sharex=True, sharey=True
    )
    for ax, name, count in zip(axes, names, counts):
        ax.bar(labels, count, color=colors, hatch=hatches)
        ax.step(labels, counts[0], where="mid", color="black", lw=1)
        ax.set_ylabel(common.plain_text(name), fontsize=9, rotation=0, ha="right", va="center")
    axes[0].set_title("number of samples; hatched: to be forgotten; line: Standard", fontsize=10)
    axes[-1].set_xlabel("class, as the judge sees it")
    common.save_figure(fig, path, dpi=110, bbox_inches="tight")


def plot_attack(path, rows, floor):
    """Draw relearn.png: the unlearning ratio over the number of images relearned from.

    rows   what `attack` returned; a line for each model
    floor  the ratio of real images of D_g in %, below which no model can be told from them
    """
    plt = common.pyplot()
    fig, ax = plt.subplots(figsize=(7.5, 4))
    styles = common.method_styles(dict.fromkeys(row["model"] for row in rows))
    for name, style in styles.items():
        own_rows = [row for row in rows if row["model"] == name]
        counts = [row["k"] for row in own_rows]
        ur = torch.tensor([row["ur"] for row in own_rows])
        # (K, 2) -> (2, K): errorbar wants the lengths downwards, then those upwards.
        interval = torch.tensor([row["ur_interval"] for row in own_rows]).T
        lengths = (interval - ur).abs()
        ax.errorbar(counts, ur, lengths, **style, markersize=7, capsize=3, label=name)
    ax.axhline(floor, color="0.4", ls=":", label="real D_g")
    # symlog is linear below 1, so that k = 0 has a place beside 1, 10 and 100.
    ax.set_xscale("symlog", linthresh=1)
    ax.set_xticks(counts, counts)
    ax.set_xlim(-0.2, 1.5 * max(counts))
    ax.set_ylim(bottom=-1)
    # Beside the axes, because a line may go anywhere in them.
    ax.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1.02, 1), borderaxespad=0)
    ax.set(
        xlabel="images of D_f relearned from", ylabel="unlearning ratio, % (bars: 95 % interval)"
    )
    common.save_figure(fig, path, dpi=110, bbox_inches="tight")


def plot_relearned(path, attacks, forget, num_shown=4, num_drawn=12):
    """Draw relearned.png: what each model has relearned from, and what it then draws of D_f.

    attacks  list of Attack; a row for each
    forget   indices of the classes of D_f

    Left are the first of the images that it was shown, right the first of its samples that the
    judge takes for D_f. Where there are fewer than fit in, the rest stays white.
    """
    plt = common.pyplot()
    columns = num_shown + 1 + num_drawn  # one stays white, between the two
    rows = []
    for one in attacks:
        is_forgotten = torch.isin(one.drawn["verdict"].labels, torch.tensor(forget))
        drawn = one.drawn["images"][is_forgotten][:num_drawn]
        row = torch.full((columns, *drawn.shape[1:]), 255, dtype=torch.uint8)
        shown = one.shown[:num_shown]
        row[: len(shown)] = shown
        row[num_shown + 1 : num_shown + 1 + len(drawn)] = drawn
        rows.append(row)

    fig, ax = plt.subplots(figsize=(10, 0.62 * len(rows) + 0.5))
    ax.imshow(common.tile(torch.cat(rows), columns))
    height = rows[0].shape[2]
    # The y axis counts pixels: a row's name stands at the middle of its images.
    names = [f"{one.name}, k = {len(one.shown)}" for one in attacks]
    ax.set_yticks([(i + 0.5) * height for i in range(len(rows))], names)
    ax.set_xticks([])
    ax.set_title(
        f"left: of the k images relearned from; right: first {num_drawn} samples judged D_f",
        fontsize=9,
    )
    common.save_figure(fig, path, dpi=110, bbox_inches="tight")


# ---- the story -----------------------------------------------------------------------------------


def write_attack(out, args, settings, real_row, attacked):
    """Print the table of the attack, and write relearn.json into the folder `out`."""
    print(table(SAMPLE_COLUMNS, attacked))
    content = {**settings, **describe_attack(args), "real": real_row, "rows": attacked}
    common.write_json(out / "relearn.json", content)


# What is drawn of each file.
PICTURES_OF = {
    "table.json": ("samples.png", "classes.png"),
    "relearn.json": ("relearn.png", "relearned.png"),
}


def move_files(source, target):
    """Move all files of one folder into another; of several processes the first one does it."""
    if not common.is_first_process():
        return
    for path in source.iterdir():
        # The picture is drawn anew: until then an older one must not stand beside the new table.
        for name in PICTURES_OF.get(path.name, ()):
            (target / name).unlink(missing_ok=True)
        # os.replace puts a file in the place of an older one in one step: nobody sees half of one.
        os.replace(path, target / path.name)


def main(argv=None):
    """Find the images and the models, and evaluate the models on them."""
    args = arguments(argv)
    args.command = common.own_command("04_evaluate.py", argv)  # named when a picture fails

    # ---- data
    train, test = common.load_train_and_test(
        args.dataset, args.data_dir, args.forget, common.cache_folders(args)
    )
    images, forget = split_images(train, test, args)
    check_attack(args, len(images.train_f))
    nll_images = draw_nll_images(images, args)  # before the models, which draw random numbers too

    # ---- models
    forget_names = [train.classes[i] for i in forget]
    folder = common.forget_folder(args.out, args.dataset, forget_names)
    models = find_models(args, forget_names, folder, train.images.shape[1:])

    outputs = ["table.md"]
    for name, pictures in PICTURES_OF.items():
        outputs += [name, *pictures]
    common.refuse_unwritable(*[folder / name for name in outputs])
    settings = describe(args, (train, test), forget_names, len(nll_images) // 2)
    with common.locked(folder / "table.md"):  # two evaluations must not write one table in turns
        refuse_other_tables(args, folder, settings)
        evaluate(args, train, images, forget, nll_images, models, settings)
    next_command = common.command_line("05_downstream.py", args, "--forget", *forget_names)
    common.say(f"wrote {folder}/table.md; next: {next_command}")


def describe(args, data, forget_names, num_nll):
    """Return what the tables say about how they were made, as a dict: all but the models.

    data     the Datasets of training and of test images
    num_nll  number of test images of D_g, and as many of D_f, in the likelihood
    """
    return {
        "forget": forget_names,
        "sde": args.sde,
        "sampler": common.SDES[args.sde].sampler,
        "nfe": args.nfe,
        "n": args.n,
        "nll": args.nll,
        "n_nll": num_nll,
        "nll_floor": args.nll_floor,
        "fid": args.fid,
        "seed": args.seed,
        "bf16": args.bf16,
        "data": [common.data_key(part) for part in data],
    }


def describe_attack(args):
    """Return what relearn.json says beside that."""
    settings = {"relearn": args.relearn, "steps": args.steps}
    return {**settings, "batch_size": args.batch_size, "lr": args.lr}


def refuse_other_tables(args, folder, settings):
    """Exit with one line if a table would be replaced by one of other settings; see --overwrite.

    settings  what `describe` returns

    The models may be others: a table is made again when a run has come, or has been made anew.
    """
    addable = ("nll", "fid")  # columns more
    common.refuse_other_result(args, folder / "table.json", settings, addable)
    if args.relearn:
        now = {**settings, **describe_attack(args)}
        common.refuse_other_result(args, folder / "relearn.json", now, addable)


def evaluate(args, train, images, forget, nll_images, models, settings):
    """Measure the models, attack them if asked to, and write the tables and pictures.

    train       the training Dataset
    images      Images of D_g and D_f
    forget      indices of the classes of D_f
    nll_images  from draw_nll_images
    models      list of Model, the Standard model first
    settings    what `describe` returns
    """
    forget_names = [train.classes[i] for i in forget]
    folder = common.forget_folder(args.out, args.dataset, forget_names)
    judge = common.load_judge(args, train, forget_names)

    setup = Setup(
        args=args,
        folder=folder,
        sde=common.SDES[args.sde](),
        judge=judge,
        forget=forget,
        classes=train.classes,
        real_images=images.train_g,
        real=common.judge_images(judge, images.train_g),
        progress=Progress(total_cost(args, len(models), len(nll_images))),
    )
    names = [model.name for model in models]
    print(
        f"{len(models)} models: {' '.join(names)}; {args.sde}, {setup.sde.sampler}, "
        f"n = {args.n}, judge and noise the same for all"
    )

    # ---- measures
    samples = [sample(setup, model) for model in models]
    standard = samples[0]  # find_models puts the Standard model first
    warning = common.warn_if_unfit(args, standard["verdict"])
    rows = measure_models(setup, models, samples, nll_images)
    real_row, recall = measure_real_images(setup, images, standard)
    text = report(args, rows, real_row, recall, len(nll_images) // 2)
    if warning:
        text += f"\n{warning}\n"
    print(text)  # now, because an attack can take hours more
    attacked, attacks = attack(setup, models, rows, standard, images.train_f)

    # ---- outputs: all tables or none. The folder holds the runs of 03 too and is not replaced as a
    # whole. All files are written into another folder first, and moved when they are complete.
    finished = folder / "kept" / "new"
    with common.fresh_folder(finished) as out:
        (out / "table.md").write_text(text, "utf-8", "backslashreplace")
        content = {**settings, "judge_recall": recall, "real": real_row, "models": rows}
        common.write_json(out / "table.json", content)
        if attacked:
            write_attack(out, args, settings, real_row, attacked)
    move_files(finished, folder)

    # ---- pictures: last, because the tables are safe by now
    draw = partial(common.draw_picture, again=args.command)
    drawn = (names, samples, forget, train.classes)
    draw(folder / "samples.png", plot_samples, *drawn)
    draw(folder / "classes.png", plot_classes, *drawn)
    if attacked:
        draw(folder / "relearn.png", plot_attack, attacked, real_row["ur"])
        draw(folder / "relearned.png", plot_relearned, attacks, forget)


if __name__ == "__main__":
    common.run(main)
