"""Compare likelihood, samplers and training step with the usual recipes, on the MNIST network.

    torchrun --nproc_per_node=2 -- tests/benchmark.py --samplers     # makes assets/samplers.json
    python tests/benchmark.py --json speed.json     # seconds and errors on this machine
    python tests/benchmark.py --quick --samplers --json /tmp/b.json

The first command can be stopped with Ctrl-C: started again, it goes on. The second one reads
assets/samplers.json. The third one only tells whether everything runs.

Question: what do the short cuts of common.py cost in accuracy, and what do they save?

  likelihood   Ours is RK4 on the circle, with drift and divergence from one forward pass. The
               recipe of score_sde is scipy's adaptive RK45 in t with rtol = atol = 1e-5, with drift
               and divergence evaluated apart. Network, images, probe and first t are the same.
  sampler      The few-step samplers against the two slow ones of score_sde, 1000 steps of VP each.
               "euler-maruyama" has no corrector: that is score_sde's configuration for VP and
               sub-VP. "pc" is reverse diffusion with the corrector "langevin": score_sde has it
               for VE. Seconds are measured here. The Frechet distance comes from
               assets/samplers.json (n samples a seed, two seeds), because no benchmark of minutes
               could measure it. EDM's own Heun stands beside ours.
  training     Floating-point operations a second of 02's step, against the best matrix product
               that this machine does.

Keys of --json: likelihood_speedup, likelihood_abs_diff (bits/dim, mean over images),
sampler_speedup (against "pc"), sampler_speedup_euler_maruyama, sampler_fd_pc,
sampler_fd_euler_maruyama, sampler_fd_fast, sampler_n, gemm_share; and beside them what each is made
of.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    # The imports take seconds. Until common.run listens, Ctrl-C ends the program without a word.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

# Python looks for modules beside this file, but common.py lies one folder higher.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

SAMPLERS_COMMAND = "python tests/benchmark.py --samplers"

# The slow samplers of score_sde, with which the others are compared.
YARDSTICKS = ("euler-maruyama", "pc")

# ---- arguments -----------------------------------------------------------------------------------


def arguments(argv):
    """Read the command line, and fill what the user left open."""
    p = common.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--json", metavar="FILE", help="measure the speed and write it here (default: it is not)"
    )
    p.add_argument(
        "--samplers", action="store_true", help="measure the Frechet distance of every sampler"
    )
    p.add_argument(
        "--samplers-file",
        metavar="FILE",
        help="--samplers writes it, and --json reads it (default: assets/samplers.json; "
        "--samplers --quick: <out>/quick/samplers.json)",
    )
    p.add_argument(
        "--n",
        type=common.number(int, 20, 10**6),
        help="--samplers: samples a seed (default: 1000)",
    )
    p.add_argument(
        "--images",
        type=common.number(int, 1),
        help="--json: test images of the likelihood (default: 32)",
    )
    p.add_argument(
        "--rk4",
        type=common.number(int, 1, 10**4),
        help="--json: steps of our likelihood, four evaluations each (default: 16)",
    )
    p.add_argument("--dataset", default="mnist", help=f"one of: {', '.join(common.RECIPES)}")
    p.add_argument("--data-dir", help="folder that holds the data set (default: data/)")
    p.add_argument(
        "--cache-dir", help="folder for decoded pictures (default: beside the data, or in --out)"
    )
    common.add_seed(p)
    p.add_argument("--device", default="cpu", help="where PyTorch computes, such as cpu or cuda")
    p.add_argument(
        "--compile",
        action="store_true",
        help="--samplers: torch.compile the network; needs a C++ compiler on a CPU",
    )
    p.add_argument(
        "--out",
        default="out",
        help="finished parts of --samplers are kept in <out>/<dataset>/samplers-*/",
    )
    p.add_argument("--quick", action="store_true", help="the same path with few steps and samples")
    # No flags, but they shrink under --quick like those above.
    p.set_defaults(pc_steps=None, rounds=None, budgets=None, pc_images=None)
    args = p.parse_args(argv)

    if not args.json and not args.samplers:
        common.exit_with_error(
            "nothing to do: give --json FILE (speed), --samplers (quality; makes what --json "
            "reads), or both"
        )
    full = {
        "n": 1000,
        "images": 32,
        "rk4": 16,
        "pc_steps": 1000,
        "rounds": 3,
        "budgets": (10, 15, 20, 30),
        "pc_images": 16,
    }
    quick = {
        "n": 20,
        "images": 2,
        "rk4": 10,
        "pc_steps": 3,
        "rounds": 1,
        "budgets": (4, 6),
        "pc_images": 4,
    }
    args = common.finish_args(args, full=full, quick=quick)
    if args.samplers_file is None:
        # The shipped table is one of MNIST, with so many samples.
        is_other = args.dataset != "mnist"
        is_trial = args.samplers and (args.quick or args.n != full["n"])
        shipped = common.HERE / "assets" / "samplers.json"
        own = Path(args.out) / "samplers.json"
        args.samplers_file = own if is_other or is_trial else shipped
    if args.json:
        refuse_other_file(args.json, "--json", "gemm_share")
    if args.samplers:
        refuse_other_file(args.samplers_file, "--samplers-file", "samplers")
    _, num_processes = common.ranks()
    if args.json and num_processes > 1:
        common.exit_with_error(
            "--json measures one process: run it without torchrun, "
            "python tests/benchmark.py --json FILE"
        )
    return args


def refuse_other_file(path, flag, key):
    """Exit with one line if a table cannot be written, or would replace a file that is none.

    flag  that names the file
    key   which a table of this kind has
    """
    path = Path(path)
    common.refuse_unwritable(path)
    if not path.parent.is_dir():
        common.make_folder(path.parent, flag)
    if not path.is_file():
        return
    try:
        is_ours = key in json.loads(path.read_bytes())
    except (ValueError, TypeError):
        is_ours = False
    if not is_ours:
        common.exit_with_error(
            f"{flag}: {path} is not such a table, and would be replaced; name another file"
        )


# ---- what make_tables.py uses too ----------------------------------------------------------------


def write_json(path, content):
    """Write a JSON file whole or not at all: a run that is stopped leaves the old file.

    Of several processes only the first one writes.
    """
    if not common.is_first_process():
        return
    common.make_folder(path.parent)
    common.write_json(path, content)
    common.say(f"wrote {path}")


def clock(device):
    """Return the time in seconds, when a GPU has done all that it was given so far."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextlib.contextmanager
def waiting_lock(folder):
    """Let no other process change the tables of a folder meanwhile: `with waiting_lock(folder):`.

    It waits while another one does. Where the system has no such locks nothing is locked.
    """
    if common.fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        common.fcntl.flock(handle, common.fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)  # and with it the lock goes


def exit_as_damaged(path, error):
    """Exit with one line: a table is damaged, and what mends it.

    path   of the JSON file
    error  what its reading has raised
    """
    remedy = "delete it"  # a table of --quick
    if path.parent == common.HERE / "assets":
        remedy = f"git checkout {path} restores what was committed"
    common.exit_with_error(f"{path} is damaged ({error}); {remedy}")


def read_kept_images(path):
    """Return the images that were kept in a file, or None if it is absent or damaged."""
    try:
        return common.read_torch_file(path)["images"]
    except Exception:  # many exception types, one remedy: they are drawn again
        return None


# ---- likelihood: the recipe of score_sde ---------------------------------------------------------


def as_vector(x):
    """Flatten a tensor to a NumPy vector in float64, the form in which scipy wants its state."""
    return x.flatten().cpu().double().numpy()


def score_sde_likelihood(net, sde, x, probe, tol=1e-5, t_min=1e-5):
    """Compute ln p(x) as score_sde does (Song et al. 2021, eq. 39).

    net, sde  the network and the forward process; x and probe have one shape
    x         (B, ...) the images, taken as x_t at t_min
    probe     (B, ...) random signs for the estimate of the divergence
    tol       rtol and atol of the solver
    t_min     where the integration starts; it ends at sde.T

    Returns ln p(x) in nats, (B,) in float64 on the CPU, and the number of calls of the ODE's field.

    One adaptive RK45 solves the whole batch in t, on a NumPy vector that holds all images and their
    log-densities. The drift f - g^2 score / 2 and its divergence probe' (d drift/dx) probe are
    evaluated apart, so that a call costs two forward passes and a backward pass.
    """
    from scipy.integrate import solve_ivp

    num_images = len(x)
    dim = x[0].numel()

    def drift(x_t, t):
        """The probability-flow ODE: dx/dt = f - g^2 score / 2 (Song et al. 2021, eq. 13)."""
        g2 = common.expand_like(sde.diffusion(t) ** 2, x_t)
        return sde.drift(x_t, t) - 0.5 * g2 * common.score_fn(net, sde, x_t, t)

    # Every call copies the state from NumPy and back. And one error norm couples the images and
    # their log-densities: one difficult image shortens the steps of the whole batch. Both belong to
    # the recipe, so both stay.
    def field(t, state):
        """The time derivative of `state`: images (B * D,), then log-densities (B,)."""
        x_t = torch.from_numpy(state[:-num_images].reshape(x.shape)).to(x)
        times = torch.full((num_images,), t).to(x)
        with torch.no_grad():
            velocity = drift(x_t, times)
        with torch.enable_grad():
            x_t.requires_grad_()
            projection = (drift(x_t, times) * probe).sum()
            gradient = torch.autograd.grad(projection, x_t)[0]
        # tr A is estimated by probe' A probe (Hutchinson): a vector-Jacobian product, then a dot.
        divergence = (gradient * probe).flatten(1).sum(1)
        return np.concatenate([as_vector(velocity), as_vector(divergence)])

    start = np.concatenate([as_vector(x), np.zeros(num_images)])
    solution = solve_ivp(field, (t_min, sde.T), start, rtol=tol, atol=tol, method="RK45")
    end = solution.y[:, -1]

    # ln p(x) = ln N(x_T; 0, std(T)^2 I) + INT divergence dt
    x_end = end[:-num_images].reshape(num_images, dim)
    change = end[-num_images:]
    std = sde.std(torch.ones(1)).item()
    squares = ((x_end / std) ** 2).sum(1)
    prior = -0.5 * squares - dim * (0.5 * np.log(2 * np.pi) + np.log(std))
    return torch.from_numpy(prior + change), solution.nfev


def benchmark_likelihood(args, net, images):
    """Time both likelihoods and compare their results: a dict for --json.

    The two take turns, so that a busy moment of the machine meets both.
    """
    sde = common.VP()
    dim = images[0].numel()
    chosen = common.random_subset(images, args.images, args.seed)
    x = common.dequantize(chosen).to(args.device)
    probe = common.rademacher_probes(x, 1, common.rng(args.seed, 1))[0]

    # score_sde starts at t = 1e-5. Near there bits/dim fall with every bit of noise, so ours has to
    # start at exactly the same sigma.
    sigma_min = sde.sigma(torch.tensor([1e-5], dtype=torch.float64)).item()

    seconds = {"ours": [], "score_sde": []}
    for k in range(args.rounds):
        start = clock(args.device)
        ours = common.ode_log_likelihood(
            net,
            sde,
            x,
            [probe],
            args.rk4,
            sigma_min,
            focus=-3.0,  # the focus that 04 takes
        )
        seconds["ours"].append(clock(args.device) - start)

        start = clock(args.device)
        theirs, num_calls = score_sde_likelihood(net, sde, x, probe)
        seconds["score_sde"].append(clock(args.device) - start)
        print(
            f"likelihood, round {k + 1}/{args.rounds}, seconds: {seconds}; "
            f"{num_calls} calls of score_sde's field",
            flush=True,
        )

    bits_ours = common.bits_per_dim(ours.cpu().double(), dim)
    bits_theirs = common.bits_per_dim(theirs.cpu().double(), dim)
    return {
        # The least of each: other programs can only add seconds.
        "likelihood_speedup": min(seconds["score_sde"]) / min(seconds["ours"]),
        "likelihood_abs_diff": (bits_ours - bits_theirs).abs().mean().item(),
        "likelihood": {
            "seconds": seconds,
            "images": len(x),
            "evaluations": 4 * args.rk4,
            "score_sde_calls": num_calls,
            "bits": {"ours": bits_ours.mean().item(), "score_sde": bits_theirs.mean().item()},
        },
    }


# ---- samplers ------------------------------------------------------------------------------------


class Sampler(NamedTuple):
    """One way to draw samples, and what it costs."""

    nfe: int  # network evaluations a sample
    run: Callable  # function(net, noise (B, C, H, W), generator) -> x0_hat like noise


def heun_sampler(num_nodes):
    """Return Heun's method for the probability-flow ODE, through so many noise levels."""
    sigmas = common.karras_sigmas(num_nodes, 80.0)

    def run(net, noise, generator):
        """The ODE draws no noise on the way, so the generator is not used."""
        return common.ode_sample(net, noise, sigmas)

    # Heun evaluates twice a step, and once more at the end for x0_hat.
    return Sampler(2 * (num_nodes - 1) + 1, run)


def dpmpp_sampler(nfe, eta):
    """Return DPM-Solver++(2M), with eta = 0 the ODE and with eta = 1 its stochastic form."""
    sigmas = common.karras_sigmas(nfe, 80.0)

    def run(net, noise, generator):
        return common.dpmpp_sample(net, noise, sigmas, eta, generator)

    return Sampler(nfe, run)


def edm_sample(net, noise, sigmas):
    """Sample as EDM's own code does (Karras et al. 2022, Algorithm 1, without churn) -> x0_hat.

    It stands here to be compared with common.ode_sample, in the symbols of that algorithm: t is the
    noise level, d the slope, and the denoiser is the x0_hat of `predict`.
    """

    def slope(x, t):
        denoised, _ = common.predict(net, x, t.expand(len(x)))
        return (x - denoised) / t

    levels = [*sigmas, torch.zeros(())]  # theirs end at 0
    x = noise * levels[0]
    for t, t_next in zip(levels[:-1], levels[1:]):
        d = slope(x, t)
        euler = x + (t_next - t) * d
        if t_next > 0:
            d = (d + slope(euler, t_next)) / 2
        x = x + (t_next - t) * d
    return x


def edm_sampler(num_nodes):
    """Return EDM's own Heun steps through so many noise levels, as many as `heun_sampler` takes."""
    sigmas = common.karras_sigmas(num_nodes, 80.0)

    def run(net, noise, generator):
        """EDM without churn draws no noise on the way, so the generator is not used."""
        return edm_sample(net, noise, sigmas)

    return Sampler(2 * (num_nodes - 1) + 1, run)


def vp_sampler(steps, predictor, corrector):
    """Return `pc_sample` of VP with so many steps: a yardstick."""
    sde = common.VP()
    # All samplers start from the same noise. The x_T of this one is sde.prior, which is that noise
    # times std(T).
    std = sde.std(torch.ones(1)).item()

    def run(net, noise, generator):
        x = noise * std
        return common.pc_sample(net, sde, x, steps, predictor, corrector, generator=generator)

    # Predictor and corrector evaluate once each a step, and there is one more for x0_hat.
    evaluations_a_step = 1 if corrector is None else 2
    return Sampler(evaluations_a_step * steps + 1, run)


def samplers(args):
    """Return all samplers of the comparison, {name: Sampler}; the yardsticks come last.

    The number in a name is the number of evaluations. It is odd for Heun, which leaves one
    evaluation of an even budget unused.
    """
    result = {}
    for budget in args.budgets:
        num_nodes = (budget + 1) // 2
        heun = heun_sampler(num_nodes)
        result[f"heun-{heun.nfe}"] = heun
        result[f"edm-{heun.nfe}"] = edm_sampler(num_nodes)
        result[f"dpm++2m-{budget}"] = dpmpp_sampler(budget, eta=0.0)
        result[f"sde-dpm++2m-{budget}"] = dpmpp_sampler(budget, eta=1.0)
    result["euler-maruyama"] = vp_sampler(args.pc_steps, "euler_maruyama", corrector=None)
    result["pc"] = vp_sampler(args.pc_steps, "reverse_diffusion", corrector="langevin")
    return result


def draw(args, net, name, sampler, seed, shape, chunk_size=125):
    """Draw args.n images with one sampler and one seed: bytes (n, *shape), shape (C, H, W).

    Every chunk is kept on disk as soon as it is there, because a yardstick takes minutes for one.

    Chunks are shared out among the processes of torchrun. On two cores two processes with a thread
    each draw 1.2 times as fast as one process with two threads. Channels-last memory makes it
    another 1.3 times faster (on an AMD processor with AVX2; elsewhere it made no difference).
    """
    # The folder's name holds the network, the shape of the images, the device, which rounds in its
    # own way, and the version of the samplers: if one changes, so do the images.
    sides = "x".join(map(str, shape))
    device = torch.device(args.device).type
    version = f"v{common.SAMPLER_VERSION}"
    name_of_folder = f"samplers-{common.weights_digest(net)}-{sides}-{device}-{version}"
    folder = common.make_folder(Path(args.out) / args.dataset / name_of_folder)
    num_chunks = math.ceil(args.n / chunk_size)

    def draw_chunk(k):
        """Images k * chunk_size to (k + 1) * chunk_size, drawn now or in an earlier run."""
        size = min(chunk_size, args.n - k * chunk_size)
        path = folder / f"{name}-steps{args.pc_steps}-seed{seed}-chunk{k}-of{size}.pt"
        images = read_kept_images(path)
        if images is None:
            start = time.time()
            noise = common.randn((size, *shape), common.rng(seed, k), args.device)
            x = sampler.run(net, noise, common.rng(seed, k, 1))
            # Not common.save_checkpoint: that writes in the first process only.
            if not torch.isfinite(x).all():
                common.exit_with_error(f"{name} has drawn numbers that are not finite")
            images = common.to_bytes(x.cpu())
            common.write_torch_file(path, {"images": images})
            # Only the first process's lines are seen.
            print(
                f"{name}, seed {seed}: chunk {k + 1} of {num_chunks}, {time.time() - start:.0f} s",
                flush=True,
            )
        return images

    return torch.cat(common.share_work(draw_chunk, range(num_chunks)))


def choose(rows):
    """Choose the cheapest sampler that is as good as the slow ones of score_sde.

    rows  {name: {"nfe": evaluations, "fd": Frechet distances, one a seed}}, with both YARDSTICKS

    Returns (name, True) for the cheapest one whose mean FD is at most the bar; of several as cheap
    ones the best. The bar is the mean of the better yardstick plus the distance between its seeds.
    Where no sampler reaches the bar, it returns (name of the best, False).
    """
    # EDM's own steps stand in the table to be compared with ours, not to be chosen.
    fast = [name for name in rows if name not in YARDSTICKS and not name.startswith("edm-")]
    mean_fd = {name: statistics.mean(row["fd"]) for name, row in rows.items()}

    # Two seeds have no better measure of their scatter than their distance. FD also has a bias of
    # about 1/n, but at one n it is the same for all.
    yardstick = min(YARDSTICKS, key=mean_fd.get)
    scatter = max(rows[yardstick]["fd"]) - min(rows[yardstick]["fd"])
    bar = mean_fd[yardstick] + scatter
    good = [name for name in fast if mean_fd[name] <= bar]
    if good:
        return min(good, key=lambda name: (rows[name]["nfe"], mean_fd[name])), True
    return min(fast, key=lambda name: mean_fd[name]), False


def measure_samplers(args, net, judge, train, test):
    """Do --samplers: measure FD to the training images, with two seeds, and write samplers_file.

    The cheap samplers come first, so that an interrupted run has most of the table.
    """
    reference = train.images
    if args.quick:
        reference = reference[:5000]
    features = common.judge_images(judge, reference).features
    shape = train.images.shape[1:]

    def distance(images):
        """Frechet distance of byte images to the training images."""
        return common.frechet_distance(common.judge_images(judge, images).features, features)

    rows = {}
    for name, sampler in samplers(args).items():
        fd = [distance(draw(args, net, name, sampler, seed, shape)) for seed in (0, 1)]
        rows[name] = {"nfe": sampler.nfe, "fd": fd}
        values = " ".join(f"{value:.3f}" for value in fd)
        print(f"{name:16} NFE {sampler.nfe:5}  FD {values}", flush=True)

    # Real test images have a distance too, since they are finitely many: the best that can be had.
    floor = [distance(common.random_subset(test.images, args.n, seed)) for seed in (0, 1)]
    chosen, reaches_bar = choose(rows)
    content = {
        "n": args.n,
        "pc_steps": args.pc_steps,
        "samplers": rows,
        "real": floor,
        "chosen": chosen,
        "reaches_bar": reaches_bar,
    }
    write_json(Path(args.samplers_file), content)
    verb = "reaches" if reaches_bar else "does not reach"
    print(f"real test images: FD {floor[0]:.3f} {floor[1]:.3f}")
    print(f"chosen: {chosen}, which {verb} the better of {' and '.join(YARDSTICKS)}")


def read_samplers_file(args):
    """Read the table that --samplers wrote, and make the samplers that are timed.

    Returns (content of the table, {name: Sampler} with the chosen one and both yardsticks). Exits
    with one line when the file is missing or damaged.
    """
    try:
        table = json.loads(common.read_text(args.samplers_file))
        chosen = table["chosen"]
        # The table says which samplers there are, not args.budgets. The budget that makes the
        # chosen sampler is its number of evaluations.
        budget = table["samplers"][chosen]["nfe"]
        # The distances of a table of --quick say nothing about the samplers of a full run.
        if not args.quick and table["pc_steps"] != args.pc_steps:
            raise ValueError("another predictor-corrector")
        known = samplers(argparse.Namespace(budgets=(budget,), pc_steps=args.pc_steps))
        for name in YARDSTICKS:
            statistics.mean(table["samplers"][name]["fd"])
        return table, {name: known[name] for name in (chosen, *YARDSTICKS)}
    except (OSError, ValueError, KeyError, TypeError):
        where = ["--samplers-file", Path(args.samplers_file), "--out", Path(args.out)]
        if args.quick:  # it adds its folder to --out again
            where = [*where[:3], Path(args.out).parent, "--quick"]
        common.exit_with_error(
            f"{args.samplers_file} is missing, damaged, of --quick or of an older version; "
            f"make it with: {SAMPLERS_COMMAND} {common.shell_command(where)}"
        )


def benchmark_sampler(args, net, shape):
    """Time the chosen sampler and the yardsticks on the same noise: a dict for --json.

    They take turns, so that a busy minute of the machine meets all of them. The Frechet distances
    come from the committed table.
    """
    table, runs = read_samplers_file(args)
    rows = table["samplers"]
    chosen = table["chosen"]
    noise = common.randn((args.pc_images, *shape), common.rng(args.seed), args.device)

    runs[chosen].run(net, noise, common.rng(0))  # the first call of a network allocates memory
    times = {name: [] for name in runs}
    for k in range(args.rounds):
        for name, sampler in runs.items():
            start = clock(args.device)
            sampler.run(net, noise, common.rng(args.seed, 1))
            times[name].append(clock(args.device) - start)
        print(f"samplers, round {k + 1}/{args.rounds}, seconds: {times}", flush=True)
    # The least of each: other programs can only add seconds.
    seconds = {name: min(values) for name, values in times.items()}

    return {
        "sampler_speedup": seconds["pc"] / seconds[chosen],
        "sampler_speedup_euler_maruyama": seconds["euler-maruyama"] / seconds[chosen],
        "sampler_n": table["n"],
        "sampler_fd_pc": statistics.mean(rows["pc"]["fd"]),
        "sampler_fd_euler_maruyama": statistics.mean(rows["euler-maruyama"]["fd"]),
        "sampler_fd_fast": statistics.mean(rows[chosen]["fd"]),
        "sampler": {
            "chosen": chosen,
            "nfe": rows[chosen]["nfe"],
            "seconds": seconds,
            "images": args.pc_images,
            "reaches_bar": table["reaches_bar"],
        },
    }


# ---- training step -------------------------------------------------------------------------------

GEMM_SHAPES = (
    (512, 512, 512),
    (1024, 1024, 1024),
    (2048, 2048, 2048),
    # A convolution is a matrix product too: these are shapes that the network's own ones make.
    (48, 432, 12544),
    (96, 864, 3136),
    (4096, 432, 48),
)


def gemm_peak(quick=False, device="cpu"):
    """Measure matrix products (m, k) x (k, n): (the best GFLOP/s, {shape: its GFLOP/s})."""
    shapes = [(256, 256, 256)] if quick else GEMM_SHAPES
    seconds_each = 0.05 if quick else 1.0
    rates = {}
    for m, k, n in shapes:
        a = torch.randn(m, k, device=device)
        b = torch.randn(k, n, device=device)
        best = math.inf
        end = time.perf_counter() + seconds_each
        while time.perf_counter() < end:
            start = time.perf_counter()
            (a @ b)[0, 0].item()  # .item() waits for a GPU
            best = min(best, time.perf_counter() - start)
        # A multiplication and an addition for each of m k n terms.
        rates[f"{m}x{k}x{n}"] = 2e-9 * m * k * n / best
    return max(rates.values()), rates


def training_step(args, arch, images, batch_size=64):
    """Return a function that does one step of 02: loss, backward, Muon and Adam, average."""
    torch.manual_seed(args.seed)
    net = common.UNet(**arch).to(args.device).train()
    optimizers = common.muon_and_adam(net, 1e-4)
    ema = common.EMA(net, 0.9995)
    sde = common.TRAINING_SDE

    def step():
        index = torch.randint(len(images), (batch_size,))
        x0 = common.dequantize(images[index]).to(args.device)
        t = common.lognormal_t(batch_size, sde, **common.TRAINING_NOISE, device=args.device)
        loss = common.dsm_loss(net, sde, x0, t, weight="v").mean()
        loss.backward()
        common.guarded_step(net, optimizers, 0)
        ema.update(net)

    return step


def benchmark_training(args, arch, images):
    """Compare 02's training step with the best matrix product: a dict for --json.

    It has GFLOP/s as a share of the peak, and where the time of the step goes.
    """
    from torch.profiler import ProfilerActivity, profile
    from torch.utils.flop_counter import FlopCounterMode

    step = training_step(args, arch, images)
    step()  # the first one allocates memory

    # This counts matrix products, convolutions and attention; nothing else has a count.
    with FlopCounterMode(display=False) as counter:
        step()
    gflop = 1e-9 * counter.get_total_flops()

    times = []
    for _ in range(2 if args.quick else 30):
        start = clock(args.device)
        step()
        times.append(clock(args.device) - start)
    seconds = statistics.median(times)

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    # Self time is what an operator spends in itself and not in the operators that it calls, so the
    # shares add up to 1.
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    shares = {event.key: round(event.self_cpu_time_total / total, 4) for event in events[:12]}

    peak, rates = gemm_peak(args.quick, args.device)
    rate = gflop / seconds
    print(f"training step: {rate:.0f} GFLOP/s of {peak:.0f} in a matrix product", flush=True)
    return {
        "gemm_share": rate / peak,
        "training": {
            "gflop": gflop,
            "seconds": seconds,
            "gemm_gflops": rates,
            "profile": shares,
        },
    }


# ---- the story -----------------------------------------------------------------------------------


def load_base(args, shape):
    """Load the Standard model, which is measured and not trained here, for images (C, H, W)."""
    path, command = common.find_base(args)
    return common.load_net(path, command, args.device, shape).requires_grad_(False)


def main(argv=None):
    """Measure the samplers' quality, the speed of everything, or both."""
    args = arguments(argv)
    train, test = common.load_train_and_test(
        args.dataset, args.data_dir, caches=common.cache_folders(args)
    )

    if args.samplers:
        net = load_base(args, train.images.shape[1:])
        if args.device == "cpu" or args.compile:  # on CUDA channels-last pays only when compiled
            net = net.to(memory_format=torch.channels_last)
        if args.compile:
            net.compile()
        measure_samplers(args, net, common.load_judge(args, train), train, test)

    if args.json:
        # Loaded anew, because here the weights have to be contiguous, as in 02 and 03.
        net = load_base(args, train.images.shape[1:])
        # The sampler first: it ends the run at once when it has no table to read.
        result = benchmark_sampler(args, net, train.images.shape[1:])
        result |= benchmark_likelihood(args, net, test.images)
        result |= benchmark_training(args, net.arch, train.images)
        write_json(Path(args.json), result)


if __name__ == "__main__":
    common.run(main)
