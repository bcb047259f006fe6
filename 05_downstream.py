"""05  Restore damaged images with the unlearned model, with no further training: what it has forgotten stays lost.

    python 05_downstream.py --dataset mnist --forget 3 --task inpaint                # fill in the right half; --mask: another hole
    python 05_downstream.py --dataset mnist --forget 3 --task inpaint --paper        # the paper's sampler, 2001 evaluations an image
    python 05_downstream.py --dataset mnist --forget 3 --task reconstruct            # add noise, take it away

Question: the unlearned model no longer draws D_f from nothing.  Does it still restore an image of D_f that it is shown?
Answer:   restoring is drawing under a condition: D_g comes back as from the Standard model, D_f as something else.  Encode-decode,
          which the paper reports, cannot tell: the probability-flow ODE is one-to-one for *any* network, so there and back returns
          the image, forgotten or not.  It is shown ("latent"), but judge by noise that really hides the class.

A row for each run of 03; the same images and noise for all.  --steps: noise levels (latent: ODE steps each way).  Writes
out/<dataset>/forget-<names>/downstream/<task>/: table.json, pictures.png, and for reconstruct curve.png.

Predict, then run:
  1. What does a hole look like that is filled in one pass, and why?         (--resample 1, then 5; see repaint)
  2. Above which sigma does the image no longer say which digit it was?      (--task reconstruct, the curve)
  3. Does PSNR on D_f fall much when the digit becomes another one?          (look at the picture)
"""
import json
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

import common as c

PAPER = ["unseen", "ort", "obt", "obt-rel"]  # rows after Standard, as on the poster; other methods come after them
MASKS = {"half": lambda y, x: x > 0.5, "rows": lambda y, x: abs(y - 0.625) < 0.125, "center": lambda y, x: abs(y - 0.5).maximum(abs(x - 0.5)) < 0.25}

# ---- arguments ---------------------------------------------------------------------------------------
def arguments(argv):
    p = c.parser(__doc__)
    p.add_argument("--forget", nargs="+", metavar="CLASS", help="names of the classes that were forgotten (no default)")
    p.add_argument("--task", choices=["inpaint", "reconstruct"], default="inpaint")
    p.add_argument("--sde", choices=list(c.SDES), default="vp", help="one network serves all: whose noise range and clock to use")
    p.add_argument("--runs", nargs="+", metavar="RUN", help="folder names of the runs to compare, e.g. obt-rel-vp (default: all)")
    p.add_argument("--n", type=c.number(int, 3), help="test images of D_f, and as many of D_g")
    p.add_argument("--mask", help=f"inpaint: {', '.join(MASKS)}, or a PNG that is white where to fill in (default: half)")
    p.add_argument("--resample", type=c.number(int, 1), help="inpaint: passes through each noise level (default: 5)")
    p.add_argument("--paper", action="store_true", help="inpaint: the paper's predictor-corrector with replacement, 1000 steps")
    p.add_argument("--sigmas", type=c.number(float, 0.02, 50), nargs="+", help="reconstruct: levels of noise to take away again")
    p.add_argument("--clip-weights", metavar="PATH", help="adds the CLIP distance on D_g: a ViT-B-32 checkpoint for open_clip")
    args = p.parse_args(argv)
    if not args.forget:
        c.die("--forget is missing: name what was forgotten, e.g. python 05_downstream.py --dataset mnist --forget 3")
    for key in dict(inpaint=["lr", "sigmas"] + ["resample"] * args.paper, reconstruct=["lr", "mask", "resample", "paper"])[args.task]:
        if getattr(args, key):
            c.die(f"--{key} has no meaning with --task {args.task}{' --paper' * args.paper}; leave it out")
    steps = 16 if args.task == "reconstruct" else 1000 if args.paper else 25  # 25 levels, 5 passes each: 121 evaluations
    full = dict(steps=steps, batch_size=250, n=200, mask="half", resample=5, sigmas=[1.0, 1.4, 1.7, 2.0, 2.8])
    return c.finish_args(args, full, quick=dict(steps=4, n=12, resample=2, sigmas=[0.5, 1.0]))


def load_mask(name, h, w):
    """A name of MASKS (y, x: a pixel's centre, in sides; rows: CelebA's), or a PNG's path -> hidden (1, h, w) bool, True where to fill in."""
    if name in MASKS:
        grey = MASKS[name]((torch.arange(h)[:, None] + 0.5) / h, (torch.arange(w) + 0.5) / w).float().expand(h, w)
    else:
        try:
            grey = torch.atleast_3d(torch.from_numpy(c.pyplot().imread(name)))[..., :3].mean(-1)  # not the fourth: alpha is 1 everywhere
        except Exception as e:  # what is no picture raises half a dozen different types
            c.die(f"--mask {name} is not one of {', '.join(MASKS)}, nor a PNG that can be read ({type(e).__name__})")
    hidden = F.interpolate(grey[None, None], size=(h, w))[0] > 0.5
    if hidden.all() or not hidden[:, 5:-5, 5:-5].any():  # a window of SSIM has its centre 5 pixels from the edge
        c.die(f"--mask {name} hides {'everything' if hidden.all() else 'nothing but, perhaps, the edges'}; make the hole white, the rest black")
    return hidden


# ---- restoring: x0 (B, ...) -> x0_hat (B, ...); `hidden`: a bool mask that broadcasts to x0, True in the hole ---
@torch.no_grad()
def repaint(net, x0, hidden, sigmas, resample=5, generator=None):
    """RePaint (Lugmayr et al. 2022, Alg. 1) in x_hat = x0 + sigma z, hence for every SDE; sigmas (N,) falling.

    NFE = (N - 1) resample + 1.  resample=1 is plain replacement: step down, overwrite the known pixels with x0 noised to that level.
    That stays biased however many steps it takes: the known part's fresh noise knows nothing of the hidden part just drawn, so the
    two look less related than they are.  Going up one level and down again lets them agree.
    """
    noise, sigmas = lambda: c.randn(x0.shape, generator, x0.device).to(x0), sigmas.to(x0)
    x = torch.where(hidden, 0, x0) + sigmas[0] * noise()
    for s, s_next in zip(sigmas[:-1], sigmas[1:]):
        up = torch.sqrt(s**2 - s_next**2)
        for k in range(resample):
            z_hat = c.predict(net, x, s.expand(len(x)))[1]
            x = x - up**2 / s * z_hat + s_next * up / s * noise()  # ancestral step
            x = torch.where(hidden, x, x0 + s_next * noise())
            if k < resample - 1:
                x = x + up * noise()  # known and hidden part together
    return c.predict(net, x, sigmas[-1:].expand(len(x)))[0]


@torch.no_grad()
def pc_inpaint(net, sde, x0, hidden, steps=1000, snr=0.16, sigma_min=0.01, generator=None):
    """The paper's inpainting (Song et al. 2021, App. I.2): pc_sample's Langevin and reverse-diffusion steps, replacement after each.

    NFE = 2 steps + 1.  Known pixels get the noise of the level just reached; score_sde leaves them the old one's after the predictor.
    """
    noise = lambda: c.randn(x0.shape, generator, x0.device).to(x0)
    paste = lambda x, t: torch.where(hidden, x, c.bcast(sde.s(t), x) * x0 + c.bcast(sde.std(t), x) * noise())
    x = paste(sde.prior(x0.shape, generator, x0.device).to(x0), torch.full((len(x0),), sde.T).to(x0))
    return c.pc_sample(net, sde, x, steps, "reverse_diffusion", snr=snr, sigma_min=sigma_min, generator=generator, after=paste)


@torch.no_grad()
def encode_decode(net, sde, x0, steps=20, t=0.02, generator=None):
    """The paper's reconstruction: probability-flow ODE to the latent x_T, x_T -> s(t) x_T + std(t) n, and back.  NFE = 4 steps.

    VP: .997 x_T + .077 n; VE: std(.02) = .012 beside an x_T of size 50, no change.  VP with t=0: x0 again, up to the solver's error.
    """
    phis = torch.atan(c.karras_sigmas(steps + 1, sde.sigma_max(), 0.001).to(x0) / net.sd)
    y = c.heun_solve(net, x0 * torch.cos(phis[-1]) / net.sd, phis.flip(0))  # x_T = scale y
    scale, t = net.sd / torch.cos(phis[0]) * sde.s(torch.ones(1)).item(), torch.tensor([t])
    y = sde.s(t).item() * y + sde.std(t).item() / scale * c.randn(x0.shape, generator, x0.device).to(x0)
    return c.heun_solve(net, y, phis) * net.sd / torch.cos(phis[-1])


def noise_and_denoise(net, x0, sigma, steps=20, generator=None):
    """x0 noised to sigma (float), and a draw of x0 given that: where noise leaves the class open, the model decides.  NFE = steps."""
    start = x0 / sigma + c.randn(x0.shape, generator, x0.device).to(x0)
    return c.dpmpp_sample(net, start, c.karras_sigmas(steps, sigma).to(x0), eta=1.0, generator=generator)


def psnr(a, b, hidden=None):
    """Peak signal-to-noise ratio of bytes (B, C, H, W) twice, 10 log10(1/MSE) of k/255 -> (B,) in dB; of the pixels `hidden` (1, H, W).

    In float: bytes wrap around at 256 and give about 31 dB whatever the image.  100 for equal images.  We average dB over images.
    """
    error = ((a.double() - b.double()) / 255) ** 2
    return -10 * torch.log10(c.flat_mean(error if hidden is None else error[:, :, hidden[0]]).clamp(min=1e-10))


def ssim(a, b, hidden=None):
    """Structural similarity (Wang et al. 2004) of bytes (B, C, H, W) twice, as k/255 -> (B,); 1 for equal images.

    Gaussian window 11x11, sigma 1.5; K1 .01, K2 .03, range 1; covariances with weights that sum to 1.  Mean over channels and over the
    windows that lie inside the image (28x28 has 18x18 of them), or those of them whose centre is `hidden` (1, H, W).
    """
    w = torch.exp(-((torch.arange(11, dtype=torch.float64, device=a.device) - 5) ** 2) / (2 * 1.5**2))
    mean = lambda v: F.conv2d(v, (w[:, None] * w / w.sum() ** 2).expand(v.shape[1], 1, 11, 11), groups=v.shape[1])
    a, b = a.double() / 255, b.double() / 255
    ma, mb, cov = mean(a), mean(b), mean(a * b) - mean(a) * mean(b)
    spread = mean(a * a) - ma**2 + mean(b * b) - mb**2
    out = ((2 * ma * mb + 0.01**2) * (2 * cov + 0.03**2) / ((ma**2 + mb**2 + 0.01**2) * (spread + 0.03**2))).mean(1)
    return c.flat_mean(out) if hidden is None else out[:, hidden[0, 5:-5, 5:-5]].mean(1)


def load_clip(path):
    """A function from bytes (B, C, H, W) to CLIP features of length 1 (B, 512).  Exits with a hint when something is missing."""
    try:
        import open_clip
        from torchvision.transforms.functional import to_pil_image as pil
        model, _, prepare = open_clip.create_model_and_transforms("ViT-B-32", pretrained=str(Path(path).resolve(strict=True)))
    except Exception as e:  # not installed, no such file, not its format
        c.die(f"--clip-weights needs open_clip (pip install open_clip_torch) and the file of a ViT-B-32 checkpoint ({type(e).__name__}: {path})")
    embed = torch.no_grad()(lambda images: model.eval().encode_image(torch.stack([prepare(pil(image)) for image in images])))
    return lambda images: torch.cat([F.normalize(embed(chunk), dim=1) for chunk in images.split(50)])


def measure(images, out, labels, verdict, n, hidden, real, clip=None):
    """Restored `out` beside the originals, bytes, the first n of D_f; the judge's Verdict on `out` -> {"D_f": dict, "D_g": dict}.

    In percent: accuracy, the share judged to be of the original's class, with its Wilson interval; unsure, the share that the judge is
    less than 80 % sure of.  PSNR and SSIM, also in the hole.  On D_g fd, to real training features, and 1 - cos of CLIP features.
    """
    result = {}
    for part, i in (("D_f", slice(n)), ("D_g", slice(n, 2 * n))):
        a, b, right, doubt = images[i], out[i], (verdict.labels[i] == labels[i]).sum().item(), (verdict.confidence[i] < 0.8).sum().item()
        result[part] = m = dict(accuracy=100 * right / n, interval=[100 * v for v in c.wilson(right, n)], unsure=100 * doubt / n)
        for name, f in dict(psnr=psnr, ssim=ssim).items():
            m.update({name: f(a, b).mean().item()} | ({} if hidden.all() else {f"{name}_hole": f(a, b, hidden).mean().item()}))
    m["fd"] = c.frechet_distance(verdict.features[n:], real)
    m.update({} if clip is None else dict(clip_distance=1 - (clip(a) * clip(b)).sum(1).mean().item()))
    return result


def find_runs(args, names):
    """-> the folder of 03's finished runs, {row: network}: Standard, the paper's methods in its order, then any others."""
    base, make_base = c.find_base(args.out, args.dataset)
    folder, make = c.forget_folder(args.out, args.dataset, names), f"python 03_unlearn.py --dataset {args.dataset} --forget"
    make = " ".join([make, *names])
    method = {p: trained["method"] for p, trained in c.find_runs(folder, make).items()}
    have, missing = {p.parent.name for p in method}, [m for m in PAPER if m not in method.values()]
    if not have or not set(args.runs or have) <= have:
        c.die(f"no {'such --runs' if have else 'unlearned model'} in {folder} (there: {', '.join(sorted(have)) or 'nothing'}); make one with: {make}")
    print(f"base: {base}" + (f"; no run of {', '.join(missing)}: {make} --method {missing[0]}" if missing else ""))
    paths = sorted((p for p in method if p.parent.name in (args.runs or have)), key=lambda p: ((PAPER + [method[p]]).index(method[p]), p))
    runs = {p.parent.name.removesuffix("-vp").capitalize(): c.load_net(p, make, args.device) for p in paths}
    return folder, {"Standard": c.load_net(base, make_base, args.device), **runs}


def restore(images, method, hidden, args, label):
    """Bytes (N, C, H, W) -> restored bytes; method(x0=, generator=) -> x0_hat.  Chunk k has its generator: each model gets the same noise."""
    out, t0 = [], time.time()
    for k, chunk in enumerate(images.split(args.batch_size)):
        x = method(x0=((chunk.float() + 0.5) / 128 - 1).to(args.device), generator=c.rng(args.seed, k))  # + 0.5: the middle of a grey level
        if not torch.isfinite(x).all():
            c.die(f"{label}: numbers that are not finite; the model has diverged (unlearn again with more --alpha, or a lower --lr)")
        out.append(torch.where(hidden, c.to_bytes(x.cpu()), chunk))  # what is known stays the same to the bit
        print(f"\r{label}: {sum(map(len, out))}/{len(images)}, {time.time() - t0:.0f} s", end="", flush=True)
    print()
    return torch.cat(out)


def print_table(name, rows):
    """rows {model: measure(...)}, a table for D_f and one for D_g; in brackets the 95 % interval of the accuracy."""
    for part in ("D_f", "D_g"):
        keys = [key for key in rows["clean"][part] if key not in ("accuracy", "interval")]
        print(f"{name + ', ' + part:16}accuracy, %          " + "".join(f"{key:>14}" for key in keys))
        for model, m in ((model, row[part]) for model, row in rows.items()):
            print(f"{model:16}" + "{accuracy:5.1f} [{interval[0]:5.1f}, {interval[1]:5.1f}]".format(**m) + "".join(f"{m[key]:14.2f}" for key in keys))


def picture(path, columns, verdicts, labels, n, classes, forget, rows=10):
    """columns {title: bytes}, the first n of D_f, on the left; the judge's class in the corner, red if it is to be forgotten."""
    plt, ours = c.pyplot(), ([name for name in verdicts if name.startswith(("Ort", "Obt"))] or list(verdicts))[-1]
    lost, (h, w) = (verdicts["Standard"].labels == labels) & (verdicts[ours].labels != labels), columns["original"].shape[2:]
    fig, axes = plt.subplots(1, 2, figsize=(1.5 * len(columns), 0.75 * rows + 0.8))
    for ax, pick in zip(axes, (torch.argsort(~lost[:n], stable=True)[:rows], torch.arange(n, min(n + rows, 2 * n)))):
        ax.imshow(c.tile(torch.stack([x[pick] for x in columns.values()], 1).flatten(0, 1), len(columns)), cmap="gray", vmin=0, vmax=255)
        for j, name in enumerate(columns):
            ax.text((j + 0.5) * w, -2, name, ha="center", fontsize=8), ax.axis("off")
            for i, k in enumerate(verdicts[name].labels[pick].tolist() if name in verdicts else []):
                ax.text(j * w + 1, i * h + 1, c.short(classes[k]), color="#ff4040" if k in forget else "#60c060", fontsize=7, va="top", fontweight="bold")
    fig.suptitle(f"left: D_f, first where Standard restores the class and {ours} does not; right: D_g, in a random order", fontsize=9)
    fig.tight_layout(pad=0.6), fig.savefig(path, dpi=110), plt.close(fig)


def plot_curve(path, results):
    """Share of images that keep their class over sigma, a line for each model; results {"sigma ...": {model: measure(...)}}."""
    plt = c.pyplot()
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for ax, part in zip(axes, ("D_f", "D_g")):
        for model in results[next(iter(results))]:
            ax.semilogx([float(k[6:]) for k in results], [rows[model][part]["accuracy"] for rows in results.values()], "o-", ms=3, label=model)
        ax.set_xlabel("sigma"), ax.set_title(f"{part}: class kept, %", fontsize=10), ax.legend(fontsize=7)
    fig.tight_layout(), fig.savefig(path, dpi=100), plt.close(fig)


# ---- the story ---------------------------------------------------------------------------------------


def main(argv=None):
    args, start = arguments(argv), time.time()
    train, test = (c.load_dataset(args.dataset, args.data_dir, part, args.forget) for part in (True, False))
    is_f, forget = c.split_forget(test, args.forget)
    sde, n, inpaint, (h, w) = c.SDES[args.sde](), args.n, args.task == "inpaint", test.images.shape[2:]
    hidden = load_mask(args.mask, h, w) if inpaint else torch.ones(1, h, w, dtype=torch.bool)
    clip = load_clip(args.clip_weights) if args.clip_weights else None
    names = [test.classes[i] for i in forget]
    (folder, nets), judge = find_runs(args, names), c.load_judge(args, test, names)

    # ---- data: n test images of D_f, then n of D_g
    parts = [torch.where(part)[0] for part in (is_f, ~is_f)]
    if n > min(map(len, parts)):
        c.die(f"--n {n}: the test set has {len(parts[0]):,} images of D_f and {len(parts[1]):,} of D_g")
    pick = torch.cat([part[torch.randperm(len(part), generator=c.rng(args.seed, i))[:n]] for i, part in enumerate(parts)])
    images, labels, real = test.images[pick], test.labels[pick], train.images[~c.split_forget(train, args.forget)[0]]
    real = c.judge_images(judge, real[:1000] if args.quick else real).features

    methods = {f"sigma {s:g}": partial(noise_and_denoise, sigma=s, steps=args.steps) for s in sorted(args.sigmas)}
    methods["latent"] = partial(encode_decode, sde=sde, steps=args.steps)
    if inpaint:
        hole, sigmas = hidden.to(args.device), c.karras_sigmas(args.steps, min(80.0, sde.sigma_max()))
        paper = partial(pc_inpaint, sde=sde, hidden=hole, steps=args.steps)
        methods = {"paper": paper} if args.paper else {"repaint": partial(repaint, hidden=hole, sigmas=sigmas, resample=args.resample)}

    # ---- restore, judge, measure: {what is done to the images: {model: measures}}
    results, shown = {}, None
    for name, method in methods.items():
        out = {model: restore(images, partial(method, net), hidden, args, f"{name}, {model}") for model, net in nets.items()}
        verdicts = {model: c.judge_images(judge, x) for model, x in {"clean": images, **out}.items()}
        results[name] = {m: measure(images, out.get(m, images), labels, v, n, hidden, real, clip) for m, v in verdicts.items()}
        print_table(name, results[name])
        # Judged by and shown: the most noise at which Standard still gives back nine of ten images of D_g (or else the least noise).
        if not shown or name[:5] == "sigma" and results[name]["Standard"]["D_g"]["accuracy"] >= 90:
            shown = (name, out, verdicts)

    # ---- outputs
    folder = folder / "downstream" / (args.task + f"-{Path(args.mask).name}" * inpaint + "-paper" * args.paper)
    columns = {"original": images, **({"masked": torch.where(hidden, 128, images)} if inpaint else {}), **shown[1]}
    with c.fresh_folder(folder) as tmp:
        picture(tmp / "pictures.png", columns, shown[2], labels, n, test.classes, forget)
        if not inpaint:
            plot_curve(tmp / "curve.png", {name: rows for name, rows in results.items() if name != "latent"})
        (tmp / "table.json").write_text(json.dumps(dict(judged_by=shown[0], results=results, seconds=time.time() - start, args=vars(args)), indent=1))
    print(f"{time.time() - start:.0f} s; judged by {shown[0]}; wrote {folder}/; next: look at {folder / 'pictures.png'}")


if __name__ == "__main__":
    c.run(main)
