"""04  Evaluate: every model that should have forgotten, measured alike.

    python 04_evaluate.py --dataset mnist --forget 3                     # every run of 03 for this class, Standard, Unseen
    python 04_evaluate.py --dataset mnist --forget 3 --relearn           # and attack: how soon does the class come back?
    python 04_evaluate.py --dataset mnist --forget 3 --fid --inception-weights pt_inception-2015-12-05-6726825d.pth

Question: did it forget, what did that cost, and is the class gone or only hidden?
Answer:   no single number says so, because each can be cheated: noise has an unlearning ratio near 0, one digit drawn over and over has
          a sure judge, and likelihood may fall where nothing is ever drawn.  So all of them, side by side, with what real images score.

All models get the same noise, sampler, SDE, n and judge, whatever SDE they were unlearned with: one network serves every SDE (common.py,
section 4), so --sde belongs to the test.  Standard is measured without the samples that count as D_f, the others on as many.
Writes out/<dataset>/forget-<names>/: table.md, table.json, samples.png, classes.png; --relearn: relearn.json, relearn.png.  kept/ holds
what is finished, and a run that was stopped goes on from there; delete it to measure again.

Predict, then run:
  1. Which model gives the 3s of the test set the worst likelihood, and is it the one that draws the fewest?
  2. A method that answers every 3 with one and the same 8: which columns show it?     (classes.png)
  3. Fine-tuned on one single 3, does a model draw 3s again, or that 3?                (--relearn 1)
"""
import copy
import hashlib
import importlib.util
import json
import math
import os
import time
from collections import namedtuple
from pathlib import Path

import torch

import common as c

# ---- arguments ---------------------------------------------------------------------------------------
def arguments(argv):
    p = c.parser(__doc__, rk4=None, levels=None)  # these two have no flag
    p.add_argument("--forget", nargs="+", metavar="CLASS", help="names of the classes that were forgotten, as in 03 (no default)")
    p.add_argument("--sde", choices=list(c.SDES), default="vp", help="for all models alike: where sampling starts and likelihood ends")
    p.add_argument("--n", type=c.number(int, 20), help="samples a model")
    p.add_argument("--nfe", type=c.number(int, 2), help="network evaluations a sample")
    p.add_argument("--nll", choices=["ode", "bound", "none"], default="ode", help="ode: RK4, with the bound beside it")
    p.add_argument("--n-nll", type=c.number(int, 2), help="test images of D_g and of D_f each for the likelihood")
    p.add_argument("--fid", action="store_true", help="also the standard FID; needs torch-fidelity")
    p.add_argument("--inception-weights", metavar="PATH", help="--fid without network: the file of Inception's weights, which you trust")
    p.add_argument("--relearn", nargs="*", type=c.number(int, 1), metavar="K", help="attack: --steps steps on K images of D_f (1 10 100)")
    args = p.parse_args(argv)
    if not args.forget:
        c.die("--forget is missing: name what was forgotten, e.g. python 04_evaluate.py --dataset mnist --forget 3")
    if args.fid and not importlib.util.find_spec("torch_fidelity"):  # now, not after the sampling
        c.die("--fid needs one package more: pip install torch-fidelity (or drop --fid: FD needs nothing)")
    if args.inception_weights and not Path(args.inception_weights).is_file():
        c.die(f"--inception-weights {args.inception_weights} not found; drop the flag and torch-fidelity downloads the file")
    full = dict(n=2000, nfe=c.SDES[args.sde].nfe, n_nll=128, rk4=16, levels=64, steps=50, batch_size=64, lr=3e-4)
    return c.finish_args(args, full, quick=dict(n=60, nfe=6, n_nll=4, rk4=3, levels=8, steps=3, batch_size=8))


# ---- which models, and what is done already ----------------------------------------------------------
Model = namedtuple("Model", "name net trained digest")  # trained: the args of its run; digest: of its file
Desk = namedtuple("Desk", "args folder sde judge forget classes images_g real todo")  # what all models share; real: D_g's features


def find_models(args, names, folder):
    """Standard, Unseen from scratch where there is one, and every finished run of 03 -> list of Model; exits when none has run."""
    make = f"python 03_unlearn.py --dataset {args.dataset} --forget {' '.join(names)}" + (f" --out {args.out}" if args.out != "out" else "")
    runs = c.find_runs(folder, make)
    if not runs:
        c.die(f"no unlearned model in {folder}; make one with: {make}")
    base, train = c.find_base(args.out, args.dataset)
    found = [("standard", base, train, c.load_checkpoint(base, train).get("args", {}))]
    found += [(p.parent.name, p, make, runs[p]) for p in sorted(runs, key=lambda p: (runs[p]["method"] != "unseen", p))]  # Unseen first: the yardstick
    layout = torch.channels_last if args.device == "cpu" else torch.preserve_format  # 1.2 x as fast with AVX2; CUDA would need --compile
    load = lambda path, command: c.load_net(path, command, args.device).requires_grad_(False).to(memory_format=layout)
    return [Model(name, load(path, command), trained, hashlib.sha256(path.read_bytes()).hexdigest()) for name, path, command, trained in found]


def kept(desk, name, key, cost, compute):
    """compute(label) -> dict, or what an earlier run left in kept/ with the same key.  cost: network evaluations, for the ETA."""
    path, todo = c.make_folder(desk.folder / "kept") / f"{name}.pt", desk.todo
    try:
        content = torch.load(path, weights_only=True)
        if content["key"] == key:
            todo["total"] -= cost
            return content
    except Exception:  # absent or damaged: half a dozen types, one remedy
        pass
    left = f"{(time.time() - todo['start']) * (todo['total'] / todo['done'] - 1) / 60:.0f} min" if todo["done"] else "after the first"
    content = compute(f"{100 * todo['done'] / todo['total']:3.0f} %, ETA {left}  {name}")
    c.save_checkpoint(path, key=key, **content)
    todo["done"] += cost
    return content


# ---- measures that 03 has not ------------------------------------------------------------------------
@torch.no_grad()
def nll_bound(net, x, sigma_min=0.001, sigma_max=152.0, levels=64, generator=None):
    """Forward-only upper bound of -ln p in nats (B,), of points or images x (B, ...) on the scale of dequantize.

        D/2 ln(2 pi e sigma_min^2) + INT E_z |z - z_hat(x + sigma z)|^2 d ln sigma + |x|^2 / (2 sigma_max^2)

    The divergence of N(x, sigma^2 I) from the model falls by E|z - z_hat|^2 for each d ln sigma, so the integral and the prior's
    share are that divergence at sigma_min; the first term, an entropy, makes it E_z[-ln p(x + sigma_min z)].  That is exact for an
    exact score, else too high (Song et al. 2021, arXiv 2101.09258).  `levels` forwards, stratified in ln sigma; no ODE, no probe.
    """
    low, width, integral = math.log(sigma_min), math.log(sigma_max / sigma_min), 0.0
    for i in range(levels):
        u, z = torch.rand(len(x), generator=generator).to(x), torch.randn(x.shape, generator=generator).to(x)
        sigma = torch.exp(low + width * (i + u) / levels)
        integral = integral + (z - c.predict(net, x + c.bcast(sigma, x) * z, sigma)[1]).flatten(1).square().sum(1) * width / levels
    return x[0].numel() * (0.5 * math.log(2 * math.pi * math.e) + low) + integral + x.flatten(1).square().sum(1) / (2 * sigma_max**2)


def density_coverage(real, fake, k=5):
    """Features (N, d), (M, d) -> (density, coverage) (Naeem et al. 2020, arXiv 2002.09797): fidelity and diversity apart.

    Around each real point lies a ball that reaches its k-th neighbour.  coverage: share of the balls with a fake inside; it falls when
    a mode is lost.  density: balls around a fake, over k; it falls when fakes lie off the data.  If both sets are of one distribution
    density is 1 and coverage 1 - PROD_{i<=k} (N-i)/(N+M-i), about 1 - 2^-k; precision and recall have no such known value.
    """
    if min(len(real), len(fake)) <= k:
        return math.nan, math.nan
    radius = torch.cdist(real, real).kthvalue(k + 1, 1).values  # k + 1: the nearest is the point itself
    inside = torch.cdist(real, fake) < radius[:, None]
    return inside.double().sum().item() / (k * len(fake)), inside.any(1).double().mean().item()


def fid(fake, real, args, cache):
    """The standard FID of bytes (N, C, H, W): Inception features, resized as TensorFlow did.  Other features, other scale than FD."""
    import torch_fidelity
    fake, real = (torch.utils.data.Subset(x.expand(-1, 3, -1, -1), range(len(x))) for x in (fake, real))  # Datasets of (3, H, W) bytes
    return torch_fidelity.calculate_metrics(
        input1=fake, input2=real, fid=True, cuda=args.device != "cpu", verbose=False, cache_root=str(cache), input2_cache_name=f"real-{len(real)}",
        feature_extractor_weights_path=args.inception_weights)["frechet_inception_distance"]


def measures(desk, drawn, before):
    """Samples dict(images, verdict) of a model -> c.measure, density, coverage, FID, all against D_g; before: Standard's samples."""
    keep = ~torch.isin(before["verdict"].labels, torch.tensor(desk.forget))
    comparable = lambda x: x[keep] if drawn is before else x[: keep.sum()]
    out = c.measure(drawn["verdict"], desk.forget, desk.real, len(desk.classes), None if drawn is before else before["verdict"])
    few = desk.real[torch.randperm(len(desk.real), generator=c.rng(desk.args.seed, 3))[: keep.sum()]]
    out["density"], out["coverage"] = density_coverage(few, comparable(drawn["verdict"].features))
    return {**out, "fid": fid(comparable(drawn["images"]), desk.images_g, desk.args, desk.folder / "kept")} if desk.args.fid else out


def sample(desk, model, name="samples", tune=None, **key):
    """args.n samples from the noise that all models share, after net = tune(net) if given -> dict(images, seconds, verdict)."""
    a, shape = desk.args, desk.images_g.shape[1:]

    def compute(label):
        net, t0 = tune(model.net) if tune else model.net, time.time()
        images = c.sample_images(net, a.n, shape, desk.sde, a.seed, a.nfe, batch=50 if a.quick else 250, device=a.device, label=label)
        return dict(images=images, seconds=time.time() - t0)

    key = dict(weights=model.digest, sampler=desk.sde.sampler, sde=a.sde, n=a.n, nfe=a.nfe, seed=a.seed, **key)
    drawn = kept(desk, f"{model.name}.{name}", key, a.n * a.nfe, compute)
    return dict(drawn, verdict=c.judge_images(desk.judge, drawn["images"]))


def likelihoods(desk, model, x, cost):
    """x: n dequantised images of D_g, then n of D_f -> means and standard errors of NLL in bits/dim and nats, and RK4's own error."""
    a, n, dim = desk.args, len(x) // 2, x[0].numel()
    check = torch.cat([torch.arange(min(16, n)) + start for start in (0, n)])  # these again with twice the steps

    def compute(label):
        probe = c.rademacher_probes(x, 1, c.rng(a.seed, 1))[0]  # one an image: the same for all models and both step counts
        solve = lambda i, steps: -c.ode_log_likelihood(model.net, desk.sde, x[i], [probe[i]], steps, focus=-3.0).cpu()
        def part(k):
            i = torch.arange(len(x))[64 * k : 64 * (k + 1)]
            print(f"\r{label}: {i[-1] + 1}/{len(x)}", end="", flush=True)
            bound = nll_bound(model.net, x[i], sigma_max=desk.sde.sigma_max(), levels=a.levels, generator=c.rng(a.seed, 2, k)).cpu()
            return dict(bound=bound, **(dict(ode=solve(i, a.rk4)) if a.nll == "ode" else {}))

        parts = c.spread(part, range(-(-len(x) // 64)))
        print()
        out = {name: torch.cat([p[name] for p in parts]) for name in parts[0]}
        return {**out, "fine": solve(check, 2 * a.rk4)} if a.nll == "ode" else out

    key = dict(weights=model.digest, sde=a.sde, nll=a.nll, n=len(x), rk4=a.rk4, levels=a.levels, seed=a.seed, data=str(a.data_dir))
    nats = kept(desk, f"{model.name}.nll", key, cost, compute)
    parts = [(kind, part, v) for kind in ("ode", "bound") if kind in nats for part, v in zip("gf", nats[kind].double().split(n))]
    both = [(kind, unit, part, u) for kind, part, v in parts for unit, u in (("bits", c.bits_per_dim(-v, dim)), ("nats", v))]
    out = {f"{kind}_{unit}_{part}": dict(mean=u.mean().item(), se=u.std().item() / n**0.5) for kind, unit, part, u in both}
    return {**out, "ode_error_bits": (nats["ode"][check] - nats["fine"]).abs().mean().item() / (dim * math.log(2))} if "fine" in nats else out


def relearn(net, images, steps, batch, lr, seed):
    """A copy of net after `steps` steps of 02's loss on a few images of D_f, bytes (k, C, H, W): the least that an attacker would try."""
    torch.manual_seed(seed)
    net, skipped, device = copy.deepcopy(net).requires_grad_(True).train(), 0, next(net.parameters()).device
    adam = torch.optim.Adam(net.parameters(), lr, betas=(0.9, 0.99), fused=True)
    for step in range(steps):
        c.set_lr([adam], step, steps, warmup=5)
        x0 = c.dequantize(images[torch.randint(len(images), (batch,))]).to(device)
        c.dsm_loss(net, c.WIDE, x0, c.lognormal_t(batch, c.WIDE, *c.TRAIN_NOISE, device), weight="v").mean().backward()
        skipped = c.guarded_step(net, [adam], skipped)
    return net.requires_grad_(False).eval()


# ---- tables and pictures -----------------------------------------------------------------------------
SAMPLES = dict(model=0, k=0, ur=2, ur_interval=2, fd=2, low_confidence=2, class_min_ratio=2, density=2, coverage=3, fid=2, nfe=0, seconds=0)
NLL = {"model": 0, **{f"{kind}_{unit}_{part}": 3 for kind in ("ode", "bound") for unit in ("bits", "nats") for part in "gf"}, "ode_error_bits": 4}


def table(columns, rows):
    """{key: digits} and dicts -> Markdown with the keys as header; a column that no row fills is left out."""
    def cell(value, digits):
        pair = (*value.values(), "±") if isinstance(value, dict) else (*value, "to") if isinstance(value, list) else None
        return f"{pair[0]:.{digits}f} {pair[2]} {pair[1]:.{digits}f}" if pair else f"{value:.{digits}f}" if isinstance(value, float) else str(value)
    columns = {k: d for k, d in columns.items() if any(k in row for row in rows)}
    lines = [list(columns), [""] * len(columns)] + [[cell(row.get(k, ""), d) for k, d in columns.items()] for row in rows]
    width = [max(map(len, cells)) for cells in zip(*lines)]
    return "".join(f"| {' | '.join(text.ljust(w, '-' if i == 1 else ' ') for text, w in zip(line, width))} |\n" for i, line in enumerate(lines))


def pictures(out, names, drawn, forget, classes):
    """samples.png: a row a model from the same noise; classes.png: how often each class is drawn."""
    plt, (h, w), hit = c.pyplot(), drawn[0]["images"].shape[2:], torch.isin(drawn[0]["verdict"].labels, torch.tensor(forget))
    pick = torch.cat([hit.nonzero()[:8], (~hit).nonzero()[:8]]).flatten()
    fig, ax = plt.subplots(figsize=(10, 0.7 * len(names) + 0.5))
    ax.imshow(c.tile(torch.cat([d["images"][pick] for d in drawn]), len(pick)), cmap="gray", vmin=0, vmax=255)
    for i, label in enumerate(torch.cat([d["verdict"].labels[pick] for d in drawn]).tolist()):
        ax.text(i % len(pick) * w + 1, i // len(pick) * h + 8, c.short(classes[label]), color="#ff4040" if label in forget else "#60c060", fontsize=7)
    ax.set_yticks([(i + 0.5) * h for i in range(len(names))], names), ax.set_xticks([])
    ax.set_title(f"a column, one noise; left {min(8, int(hit.sum()))}: where Standard draws D_f", fontsize=9)
    fig.savefig(out / "samples.png", dpi=110, bbox_inches="tight"), plt.close(fig)
    fig, axes = plt.subplots(len(names), 1, figsize=(6, 1.1 * len(names) + 0.6), sharex=True, sharey=True)
    counts = [torch.bincount(d["verdict"].labels, minlength=len(classes)).numpy() for d in drawn]
    for ax, name, count in zip(axes, names, counts):
        ax.bar(classes, count, color=["#d05050" if i in forget else "#7090c0" for i in range(len(classes))])
        ax.step(classes, counts[0], where="mid", color="black", lw=1), ax.set_ylabel(name, fontsize=7, rotation=0, ha="right")
    axes[0].set_title("samples of each class; black: Standard", fontsize=9)
    fig.savefig(out / "classes.png", dpi=110, bbox_inches="tight"), plt.close(fig)


def plot_attack(path, rows, floor):
    """UR over the number of images relearned from, a line a model."""
    fig, ax = c.pyplot().subplots(figsize=(6, 4))
    for name in dict.fromkeys(row["model"] for row in rows):
        k, ur, ends = map(torch.tensor, zip(*((r["k"], r["ur"], r["ur_interval"]) for r in rows if r["model"] == name)))
        ax.errorbar(k, ur, (ends.T - ur).abs(), marker="o", capsize=2, label=name)
    ax.axhline(floor, color="0.6", ls=":", label="real D_g"), ax.set_xscale("symlog", linthresh=1), ax.set_xlim(left=-0.2), ax.legend(fontsize=7)
    ax.set(xlabel="images of D_f relearned from", ylabel="unlearning ratio, %"), fig.savefig(path, dpi=110, bbox_inches="tight")


# ---- the story ---------------------------------------------------------------------------------------
def main(argv=None):
    args = arguments(argv)
    # ---- data: D_g to compare samples with; test images of D_g and D_f for the likelihood
    data, test = (c.load_dataset(args.dataset, args.data_dir, part, args.forget) for part in (True, False))
    (is_f, forget), test_f = c.split_forget(data, args.forget), c.split_forget(test, args.forget)[0]
    images_g, test_g, test_f = data.images[~is_f][: 1000 if args.quick else None], test.images[~test_f], test.images[test_f]
    some = lambda images, n: images[torch.randperm(len(images), generator=c.rng(args.seed))[:n]]
    n, ks = min(args.n_nll, len(test_g), len(test_f)), [1, 10, 100] if args.relearn == [] else args.relearn or []
    x = c.dequantize(torch.cat([some(test_g, n), some(test_f, n)])).to(args.device)  # seeded by finish_args: the same in every run
    # ---- models
    names = [data.classes[i] for i in forget]
    folder = c.forget_folder(args.out, args.dataset, names)
    models, judge = find_models(args, names, folder), c.load_judge(args, data, names)
    torch.set_float32_matmul_precision("highest"), setattr(torch.backends.cudnn, "allow_tf32", False)  # a likelihood needs all 24 bits
    print(f"{len(models)} models: {' '.join(m.name for m in models)}; {args.sde}, {c.SDES[args.sde].sampler}, n = {args.n}, judge and noise the same for all")
    draws, solves = args.n * args.nfe, dict(none=0, bound=args.levels, ode=args.levels + 8 * args.rk4)[args.nll] * 2 * n
    todo = dict(total=len(models) * (draws + solves) + (len(models) - 1) * len(ks) * draws, done=0, start=time.time())
    desk = Desk(args, folder, c.SDES[args.sde](), judge, forget, data.classes, images_g, c.judge_images(judge, images_g).features, todo)
    # ---- measures
    drawn = [sample(desk, m) for m in models]
    rows = [dict(model=m.name, **{k: m.trained.get(k) for k in ("method", "sde", "seed")}, nfe=args.nfe, seconds=d["seconds"],
                 **measures(desk, d, drawn[0]), **(likelihoods(desk, m, x, solves) if solves else {})) for m, d in zip(models, drawn)]
    real_g, real_f = (dict(images=images, verdict=c.judge_images(judge, images)) for images in (some(test_g, args.n), some(test_f, args.n)))
    real = dict(model="real D_g", **measures(desk, real_g, drawn[0]))
    recall = 100 * torch.isin(real_f["verdict"].labels, torch.tensor(forget)).float().mean().item()
    text = f"{table(SAMPLES, rows + [real])}\nOf the real D_f the judge knows {recall:.2f} %: the ceiling of ur.\n"
    text += f"\nNegative log-likelihood of {n} + {n} test images:\n\n{table(NLL, rows)}" if args.nll != "none" else ""
    print(text)
    # ---- attack: Standard has nothing to relearn
    attacked = []
    for m, row in list(zip(models, rows))[1:]:
        attacked.append(dict(row, k=0))
        for k in ks:
            tune = lambda net: relearn(net, some(data.images[is_f], k), args.steps, args.batch_size, args.lr, args.seed)
            d = sample(desk, m, f"relearn-{k}", tune, k=k, steps=args.steps, batch_size=args.batch_size, lr=args.lr)
            attacked.append(dict(model=m.name, k=k, **measures(desk, d, drawn[0])))
    # ---- outputs: all of them, or none
    with c.fresh_folder(folder / "kept" / "new") as out:
        settings = dict(forget=names, sde=args.sde, sampler=desk.sde.sampler, nfe=args.nfe, n=args.n, n_nll=n, seed=args.seed)
        (out / "table.md").write_text(text)
        (out / "table.json").write_text(json.dumps(dict(settings, judge_recall=recall, real=real, models=rows), indent=1))
        pictures(out, [m.name for m in models], drawn, forget, data.classes)
        if ks:
            print(table(SAMPLES, attacked))
            settings.update(steps=args.steps, batch_size=args.batch_size, lr=args.lr)
            (out / "relearn.json").write_text(json.dumps(dict(settings, real=real, rows=attacked), indent=1))
            plot_attack(out / "relearn.png", attacked, real["ur"])
    for path in (folder / "kept" / "new").iterdir() if c.ranks()[0] == 0 else ():
        os.replace(path, folder / path.name)
    print(f"wrote {folder}/table.md; next: python 05_downstream.py --dataset {args.dataset} --forget {' '.join(names)}")


if __name__ == "__main__":
    c.run(main)
