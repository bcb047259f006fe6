"""Likelihood, sampler and training step against the usual recipes, on the trained MNIST network.

    torchrun --nproc_per_node=2 -- tests/benchmark.py --samplers     # makes assets/samplers.json; Ctrl-C, the same again: goes on
    python tests/benchmark.py --json speed.json     # seconds and errors on this machine; reads assets/samplers.json
    python tests/benchmark.py --quick --samplers --samplers-file /tmp/s.json --json /tmp/b.json       # does it run?

Question: what do the short cuts of common.py cost in accuracy, and what do they save?
  likelihood   RK4 on the circle, drift and divergence from one forward, against score_sde's recipe: scipy's adaptive RK45 in t with
               rtol = atol = 1e-5, drift and divergence evaluated apart.  Same network, images, probe and starting time.
  sampler      the few-step samplers against predictor-corrector with 1000 steps, score_sde's default: seconds here, Frechet distance
               from assets/samplers.json (n samples a seed, two seeds), which no benchmark of minutes could measure.
  training     floating-point operations a second of 02's step against the best matrix product this machine does.

--json keys: likelihood_speedup, likelihood_abs_diff (bits/dim, mean over images), sampler_speedup, sampler_fd_pc, sampler_fd_fast,
sampler_n, gemm_share; and beside them what each is made of.
"""
import argparse
import hashlib
import json
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common as c  # after the path is set

# ---- arguments ---------------------------------------------------------------------------------------


def arguments(argv):
    p = c.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--json", metavar="FILE", help="run the benchmark and write its figures here")
    p.add_argument("--samplers", action="store_true", help="measure the Frechet distance of every sampler")
    p.add_argument("--samplers-file", default=str(c.HERE / "assets" / "samplers.json"), metavar="FILE")
    p.add_argument("--n", type=c.number(int, 20), help="--samplers: samples a seed")
    p.add_argument("--images", type=c.number(int, 1), help="--json: test images of the likelihood")
    p.add_argument("--rk4", type=c.number(int, 1), help="--json: steps of our likelihood, four evaluations each (default: 16)")
    p.add_argument("--dataset", default="mnist")
    p.add_argument("--data-dir")
    p.add_argument("--seed", type=c.number(int, 0), default=0)
    p.add_argument("--device", default="cpu")
    p.add_argument("--compile", action="store_true", help="--samplers: torch.compile the network; needs a C++ compiler on a CPU")
    p.add_argument("--out", default="out", help="finished parts of --samplers are kept in <out>/<dataset>/samplers-*/")
    p.add_argument("--quick", action="store_true", help="the same path with few steps and samples")
    p.set_defaults(pc_steps=None, rounds=None, budgets=None, pc_images=None)
    args = p.parse_args(argv)
    if not (args.json or args.samplers):
        c.die("nothing to do: give --json FILE (speed), --samplers (quality; makes what --json reads), or both")
    args = c.finish_args(
        args, full=dict(n=1000, images=32, rk4=16, pc_steps=1000, rounds=4, budgets=(10, 15, 20, 30), pc_images=64),
        quick=dict(n=20, images=2, rk4=10, pc_steps=3, rounds=1, budgets=(4, 6), pc_images=4),
    )
    if args.json and c.ranks()[1] > 1:
        c.die("--json measures one process: run it without torchrun, python tests/benchmark.py --json FILE")
    return args


def weights_digest(net):
    """A name for the weights of a network, for what is kept of it on disk."""
    return hashlib.sha256(b"".join(w.detach().cpu().numpy().tobytes() for w in net.parameters())).hexdigest()[:12]


def write_json(path, content):
    """Whole or not at all: a run that is stopped leaves the old file.  Of several processes the first one writes."""
    if c.ranks()[0]:
        return
    tmp = c.make_folder(path.parent) / f".{path.name}.tmp"
    tmp.write_text(json.dumps(content, indent=1))
    os.replace(tmp, path)
    print(f"wrote {path}", flush=True)


# ---- likelihood: the recipe of score_sde -------------------------------------------------------------


def score_sde_likelihood(net, sde, x, probe, tol=1e-5, t_min=1e-5):
    """ln p(x) in nats (B,) as score_sde computes it (Song et al. 2021, eq. 39) -> (float64 on the CPU, network calls).

    One adaptive RK45 for the whole batch, in t, on a NumPy vector of all images and their log-densities; the drift
    f - g^2 score / 2 and its divergence probe' (d drift/dx) probe are evaluated apart, so a call costs two forwards and a backward.
    """
    from scipy.integrate import solve_ivp

    shape, calls = x.shape, 0

    # Every call copies the state from NumPy and back, and one error norm couples the images and their log-densities: one difficult
    # image shortens the steps of the whole batch.  Both belong to the recipe, so both stay.
    def drift(x, t):
        g2 = c.bcast(sde.diffusion(t) ** 2, x)
        return sde.drift(x, t) - 0.5 * g2 * c.score_fn(net, sde, x, t)

    def ode(t, state):
        nonlocal calls
        calls += 1
        sample = torch.from_numpy(state[: -shape[0]].reshape(shape)).to(x)
        ts = torch.full((shape[0],), t).to(x)
        with torch.no_grad():
            velocity = drift(sample, ts)
        with torch.enable_grad():
            sample.requires_grad_()
            product = torch.autograd.grad((drift(sample, ts) * probe).sum(), sample)[0]
        divergence = (product * probe).flatten(1).sum(1)
        return np.concatenate([velocity.flatten().double().cpu().numpy(), divergence.double().cpu().numpy()])

    start = np.concatenate([x.flatten().double().cpu().numpy(), np.zeros(shape[0])])
    end = solve_ivp(ode, (t_min, sde.T), start, rtol=tol, atol=tol, method="RK45").y[:, -1]
    z, dim = end[: -shape[0]].reshape(shape[0], -1), x[0].numel()
    prior = -0.5 * ((z / sde.std(torch.ones(1)).item()) ** 2).sum(1) - dim * (0.5 * np.log(2 * np.pi) + np.log(sde.std(torch.ones(1)).item()))
    return torch.from_numpy(prior + end[-shape[0] :]), calls


def benchmark_likelihood(args, net, images):
    """Seconds of both recipes in turn, so that a busy moment of the machine meets both, and the mean |difference|."""
    sde, dim = c.VP(), images[0].numel()
    x = c.dequantize(images[torch.randperm(len(images), generator=c.rng(args.seed))[: args.images]]).to(args.device)
    probe, sigma = c.rademacher_probes(x, 1, c.rng(args.seed, 1))[0], sde.sigma(torch.tensor([1e-5], dtype=torch.float64)).item()
    # score_sde starts at t = 1e-5.  Near there bits/dim fall with every bit of noise, so ours has to start at exactly that sigma.
    seconds = {"ours": [], "score_sde": []}
    for k in range(args.rounds):
        t0 = time.perf_counter()
        ours = c.ode_log_likelihood(net, sde, x, [probe], args.rk4, sigma, focus=-3.0)  # as 04 does
        t1 = time.perf_counter()
        theirs, calls = score_sde_likelihood(net, sde, x, probe)
        seconds["ours"].append(t1 - t0), seconds["score_sde"].append(time.perf_counter() - t1)
        print(f"likelihood, round {k + 1}/{args.rounds}, seconds: {seconds}; {calls} calls of score_sde's field", flush=True)
    ours, theirs = (c.bits_per_dim(v.double().cpu(), dim) for v in (ours, theirs))
    return dict(  # the least of each: other programs can only add seconds
        likelihood_speedup=min(seconds["score_sde"]) / min(seconds["ours"]),
        likelihood_abs_diff=(ours - theirs).abs().mean().item(),
        likelihood=dict(seconds=seconds, images=len(x), evaluations=4 * args.rk4, score_sde_calls=calls,
                        bits=dict(ours=ours.mean().item(), score_sde=theirs.mean().item())),
    )


# ---- samplers ----------------------------------------------------------------------------------------


def samplers(args):
    """name -> (network evaluations a sample, function(net, noise (B, C, H, W), generator) -> x0_hat); VP's PC is the yardstick."""
    sde, grid = c.VP(), lambda n: c.karras_sigmas(n, 80.0)
    out = {}
    for n in args.budgets:
        nodes = (n + 1) // 2  # Heun evaluates twice a step and once at the end: 2 (nodes - 1) + 1
        out[f"heun-{2 * nodes - 1}"] = (2 * nodes - 1, lambda net, z, g, k=nodes: c.ode_sample(net, z, grid(k)))
        out[f"dpm++2m-{n}"] = (n, lambda net, z, g, n=n: c.dpmpp_sample(net, z, grid(n)))
        out[f"sde-dpm++2m-{n}"] = (n, lambda net, z, g, n=n: c.dpmpp_sample(net, z, grid(n), 1.0, g))
    # All start from the same noise; PC's x_T is sde.prior, which is that noise times std(T).
    std = sde.std(torch.ones(1)).item()
    out["pc"] = (2 * args.pc_steps + 1, lambda net, z, g: c.pc_sample(net, sde, z * std, args.pc_steps, generator=g))
    return out


def draw(args, net, name, run, seed, shape, chunk=125):
    """args.n byte images of one sampler and seed.  Every chunk is kept as soon as it is there: PC takes minutes for one.

    Chunks are shared out among the processes of torchrun: on two cores two of them with a thread each draw 1.2 times as fast as one
    with two threads, and channels-last memory is worth 1.3 times more (an AMD processor with AVX2; elsewhere it made no difference).
    """
    # The weights are in the folder's name: another base model must not find these images.
    folder = c.make_folder(Path(args.out) / args.dataset / f"samplers-{weights_digest(net)}")

    def part(k):
        """Images k chunk to (k + 1) chunk."""
        size = min(chunk, args.n - k * chunk)
        path = folder / f"{name}-steps{args.pc_steps}-seed{seed}-chunk{k}-of{size}.pt"
        if not path.exists():
            t0, noise = time.time(), c.randn((size, *shape), c.rng(seed, k), args.device)
            torch.save(dict(images=c.to_bytes(run(net, noise, c.rng(seed, k, 1)).cpu())), path.with_suffix(".tmp"))  # save_checkpoint writes in the first process only
            os.replace(path.with_suffix(".tmp"), path)
            print(f"{name}, seed {seed}: chunk {k + 1} of {-(-args.n // chunk)}, {time.time() - t0:.0f} s", flush=True)  # the first process's
        return c.load_checkpoint(path, "python tests/benchmark.py --samplers", ("images",))["images"]

    return torch.cat(c.spread(part, range(-(-args.n // chunk))))


def choose(rows):
    """The cheapest sampler whose mean FD is at most PC's mean plus the spread of PC's seeds -> (name, whether there is one).

    Where none is, the best of the fast ones, and False.
    """
    fast = {name: row for name, row in rows.items() if name != "pc"}
    # Two seeds have no better measure of spread than their distance.  FD has a bias of about 1/n, the same for all at one n.
    bar = statistics.mean(rows["pc"]["fd"]) + max(rows["pc"]["fd"]) - min(rows["pc"]["fd"])
    good = [name for name, row in fast.items() if statistics.mean(row["fd"]) <= bar]
    if good:
        return min(good, key=lambda name: (fast[name]["nfe"], statistics.mean(fast[name]["fd"]))), True
    return min(fast, key=lambda name: statistics.mean(fast[name]["fd"])), False


def measure_samplers(args, net, judge, train, test):
    """--samplers: FD of every sampler to the training images, two seeds each, cheap ones first -> writes samplers_file."""
    real = c.judge_images(judge, train.images[:5000] if args.quick else train.images).features
    distance = lambda images: c.frechet_distance(c.judge_images(judge, images).features, real)
    rows = {}
    for name, (nfe, run) in samplers(args).items():
        fd = [distance(draw(args, net, name, run, seed, train.images.shape[1:])) for seed in (0, 1)]
        rows[name] = dict(nfe=nfe, fd=fd)
        print(f"{name:16} NFE {nfe:5}  FD {' '.join(f'{v:.3f}' for v in fd)}", flush=True)
    floor = [distance(test.images[torch.randperm(len(test.images), generator=c.rng(seed))[: args.n]]) for seed in (0, 1)]
    chosen, reached = choose(rows)
    path = Path(args.samplers_file)
    write_json(path, dict(n=args.n, pc_steps=args.pc_steps, samplers=rows, real=floor, chosen=chosen, reaches_pc=reached))
    print(f"real test images: FD {floor[0]:.3f} {floor[1]:.3f}; chosen: {chosen}, which {'reaches' if reached else 'does not reach'} PC")


def benchmark_sampler(args, net, shape):
    """Seconds of PC (once) and of the chosen sampler (five times) for the same noise; both Frechet distances come from the committed table."""
    try:
        table = json.loads(Path(args.samplers_file).read_text())
        rows, chosen = table["samplers"], table["chosen"]
        # The table says which samplers exist; the budget that makes the chosen one is its number of evaluations.
        known = samplers(argparse.Namespace(**{**vars(args), "budgets": (rows[chosen]["nfe"],)}))
        runs = {chosen: known[chosen][1], "pc": known["pc"][1]}
    except (OSError, ValueError, KeyError):
        c.die(f"{args.samplers_file} is missing or damaged; make it with: python tests/benchmark.py --samplers")
    noise, seconds = c.randn((args.pc_images, *shape), c.rng(args.seed), args.device), {}
    runs[chosen](net, noise, c.rng(0))  # once to warm up: the first call of a network allocates
    for name, run in runs.items():
        times = []
        for _ in range(1 if name == "pc" else 5):  # the least of the short ones: other programs can only add seconds
            t0 = time.perf_counter()
            run(net, noise, c.rng(args.seed, 1))
            times.append(time.perf_counter() - t0)
        seconds[name] = min(times)
        print(f"sampler {name}: {seconds[name]:.1f} s for {args.pc_images} images", flush=True)
    return dict(
        sampler_speedup=seconds["pc"] / seconds[chosen], sampler_n=table["n"],
        sampler_fd_pc=statistics.mean(rows["pc"]["fd"]), sampler_fd_fast=statistics.mean(rows[chosen]["fd"]),
        sampler=dict(chosen=chosen, nfe=rows[chosen]["nfe"], seconds=seconds, images=args.pc_images, reaches_pc=table["reaches_pc"]),
    )


# ---- training step -----------------------------------------------------------------------------------


def gemm_peak(quick=False, device="cpu"):
    """Best GFLOP/s over matrix products of several shapes, squares and those that this network's convolutions make -> (best, all)."""
    shapes = [(256, 256, 256)] if quick else [(512,) * 3, (1024,) * 3, (2048,) * 3, (48, 432, 12544), (96, 864, 3136), (4096, 432, 48)]
    rates = {}
    for m, k, n in shapes:
        a, b, best = torch.randn(m, k, device=device), torch.randn(k, n, device=device), float("inf")
        end = time.perf_counter() + (0.05 if quick else 1.0)
        while time.perf_counter() < end:
            t0 = time.perf_counter()
            (a @ b)[0, 0].item()  # .item() waits for a GPU
            best = min(best, time.perf_counter() - t0)
        rates[f"{m}x{k}x{n}"] = 2e-9 * m * k * n / best
    return max(rates.values()), rates


def benchmark_training(args, arch, images):
    """GFLOP/s of 02's step (loss, backward, Muon and Adam, average) over the matrix-product peak, and where the step's time goes."""
    from torch.profiler import ProfilerActivity, profile
    from torch.utils.flop_counter import FlopCounterMode

    torch.manual_seed(args.seed)
    net = c.UNet(**arch).to(args.device).train()
    optimizers, ema = c.muon_and_adam(net, 1e-4), c.EMA(net, 0.9995)

    def step():
        x0 = c.dequantize(images[torch.randint(len(images), (64,))]).to(args.device)
        loss = c.dsm_loss(net, c.WIDE, x0, c.lognormal_t(64, c.WIDE, *c.TRAIN_NOISE, args.device), weight="v").mean()
        loss.backward()
        c.guarded_step(net, optimizers, 0)
        ema.update(net)

    step()  # the first one allocates
    with FlopCounterMode(display=False) as counter:  # matrix products, convolutions and attention; nothing else has a count
        step()
    seconds = []
    for _ in range(2 if args.quick else 30):
        t0 = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - t0)
    # Self time: what an operator spends in itself and not in the operators that it calls, so the shares add up to 1.
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        step()
    peak, rates = gemm_peak(args.quick, args.device)
    events = sorted(prof.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(e.self_cpu_time_total for e in events)
    rate = 1e-9 * counter.get_total_flops() / statistics.median(seconds)
    print(f"training step: {rate:.0f} GFLOP/s of {peak:.0f} in a matrix product", flush=True)
    return dict(
        gemm_share=rate / peak, training=dict(gflop=1e-9 * counter.get_total_flops(), seconds=statistics.median(seconds), gemm_gflops=rates,
        profile={e.key: round(e.self_cpu_time_total / total, 4) for e in events[:12]}),
    )


# ---- the story ---------------------------------------------------------------------------------------


def main(argv=None):
    args = arguments(argv)
    train, test = (c.load_dataset(args.dataset, args.data_dir, part) for part in (True, False))
    load = lambda: c.load_net(*c.find_base(args.out, args.dataset), args.device).requires_grad_(False)
    if args.samplers:
        net = load()
        if args.device == "cpu" or args.compile:  # on CUDA channels-last pays only when compiled
            net = net.to(memory_format=torch.channels_last)
        if args.compile:
            net.compile()
        measure_samplers(args, net, c.load_judge(args, train), train, test)
    if args.json:
        net = load()  # contiguous, as 02 and 03 train and sample
        result = benchmark_sampler(args, net, train.images.shape[1:])  # first: it may have no table to read
        result |= benchmark_likelihood(args, net, test.images)
        result |= benchmark_training(args, net.arch, train.images)
        write_json(Path(args.json), result)


if __name__ == "__main__":
    main(sys.argv[1:])
