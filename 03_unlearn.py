"""03  Unlearn: teach the Standard model of 02 to stop drawing some classes and to keep drawing the others.

    python 03_unlearn.py --dataset mnist --forget 3                     # 4 minutes on 2 CPU cores, nothing to download
    python 03_unlearn.py --dataset mnist --forget 3 7 --sde ve          # two classes; another noise process, same checkpoint
    python 03_unlearn.py --dataset mnist --forget 3 --method ort        # the paper's methods: ort, obt
    python 03_unlearn.py --dataset mnist --forget 3 --method siss       # rivals: unseen, erasediff, ascent, siss
    python 03_unlearn.py --dataset mnist --forget 3 --method obt --from-scratch       # both losses from the first step on
    python 03_unlearn.py --dataset cifar10 --forget dog                 # a GPU and a base model of 02 needed
    python 03_unlearn.py --dataset celeba --forget bangs                # a feature: any of 40 attributes, or not_ before it

Question: how do you take away one class from a model that has no notion of classes?
Answer:   minimise  alpha L_g + (1 - alpha) L_f.  L_g is score matching on the data D_g to keep; L_f turns the score on the data
          D_f to forget away from where it points now: orthogonal (ort), obtuse (obt), or obtuse to what D_f adds (obt-rel).

Changes from 02: two data sets instead of one, two losses instead of one, and it starts from a trained model (marked "<-- 03").

Writes out/<dataset>/forget-<names>/<method>-<sde>[-scratch][-s<seed>]/: model.pt, result.json, log.jsonl, curves.png, before_after.png.
Expect with --forget 3: see README.

Predict, then run:
  1. Which digits pay for the forgetting of 3?                  (class_counts in result.json)
  2. What happens with --alpha 0.3?  And with --method obt --alpha 0.3?
  3. With --method ort, what takes the place of the 3s?         (look at before_after.png)
"""
import copy
import json
import time

import numpy as np
import torch

import common as c

# Where to start with each method on the MNIST base; every entry is a flag.  README's "common footing" has the weights that a search found.
RECIPES = {
    "obt-rel": dict(kappa=2.8, lr=1e-3, retain="distill"),  # kappa, not alpha: one strength for small and for large forget sets
    "obt": dict(alpha=0.9, lr=3e-4),
    "ort": dict(alpha=0.95, lr=3e-4),
    "unseen": dict(lr=3e-4),  # L_g alone: what forgetting does by itself
    "ascent": dict(alpha=0.9, lr=3e-4),
    "erasediff": dict(eta=1e-3, lr=3e-4),  # this and the next weigh gradients, not losses
    "siss": dict(c=0.003, lr=1e-3, uniform_t=True),  # D_g and D_f share x_t, hence the noise level: no level may be left out
}

# Flags that only some methods have.
BELONGS = dict(alpha=("ort", "obt", "obt-rel", "ascent", "erasediff"), kappa=("obt-rel",), eta=("erasediff",), c=("siss",), ort=("ort",))
BELONGS |= {flag: [m for m in RECIPES if m not in ("unseen", "siss")] for flag in ("retain", "uniform_t", "log_sigma")}

# ---- arguments ---------------------------------------------------------------------------------------


def arguments(argv):
    p = c.parser(__doc__)
    p.add_argument("--forget", nargs="+", metavar="CLASS", help="names of the classes to forget, e.g. 3 7 (no default)")      # <-- 03
    p.add_argument("--method", choices=list(RECIPES), default="obt-rel")
    p.add_argument("--sde", choices=list(c.SDES), default="vp")
    p.add_argument("--from-scratch", action="store_true", help="start from random weights, not from the Standard model")          # <-- 03
    p.add_argument("--alpha", type=c.number(float, 0, 1), help="weight of L_g; L_f has 1 - alpha")
    p.add_argument("--kappa", type=c.number(float, 0), help="obt-rel: the same weight, relative to the sizes of D_g and D_f")
    p.add_argument("--eta", type=c.number(float, 0), help="erasediff: how fast each step must lower L_f; --alpha instead: the constant weight (1 - alpha)/alpha")
    p.add_argument("--c", type=c.number(float, 0), help="siss: length of the forget gradient (the paper's 5 is for losses summed over pixels)")
    p.add_argument("--ort", choices=("elementwise", "inner"), help="the two readings of Ort, see common.ort_loss (default: elementwise)")
    p.add_argument("--log-sigma", type=float, nargs=2, help="noise of D_f: mean and std of ln sigma")
    p.add_argument("--retain", choices=("dsm", "distill"), help="L_g: score matching, the paper's, or ours, see common.distill_loss")
    p.add_argument("--uniform-t", action="store_true", default=None, help="noise of D_f: the paper's t ~ U(0, 1) instead")
    p.add_argument("--ema", type=c.number(float, 0, 0.99999), help="decay of the weight average")
    p.add_argument("--n", type=c.number(int, 10), help="samples for the measures, before and after")
    p.add_argument("--nfe", type=c.number(int, 2), help="network evaluations a sample")
    args = p.parse_args(argv)
    if not args.forget:
        c.die("--forget is missing: name what to forget, e.g. python 03_unlearn.py --dataset mnist --forget 3")
    if args.from_scratch and args.method == "obt-rel":
        c.die("--method obt-rel compares with a Standard model by construction: leave out --from-scratch, or take --method ort | obt")
    if args.from_scratch and args.retain == "distill":
        c.die("--retain distill keeps what a Standard model says: leave out --from-scratch, or take --retain dsm")
    if (args.grad_accum > 1 or args.compile) and args.method in ("erasediff", "siss") and args.alpha is None:
        c.die(f"--method {args.method} weighs the gradients of a whole batch by hand: leave out --grad-accum and --compile")
    for flag, methods in BELONGS.items():
        if getattr(args, flag) is not None and args.method not in methods:
            c.die(f"--{flag.replace('_', '-')} has no part in --method {args.method}; it belongs to --method {' | '.join(methods)}")
    for a, b in (("alpha", "kappa"), ("alpha", "eta"), ("uniform_t", "log_sigma")):
        if getattr(args, a) is not None and getattr(args, b) is not None:
            c.die(f"--{a} and --{b} set the same: give one of them".replace("_", "-"))
    recipe = dict(retain="dsm", log_sigma=(0.0, 0.7), uniform_t=False, alpha=None, kappa=None, eta=None, c=None) | RECIPES[args.method]
    if args.method == "obt-rel":  # uniform t gives L_g 1/3 (vp), 1/4 (subvp), 1/5 (ve) of the images that L_f has at sigma = 1
        recipe["kappa"] = dict(ve=1.8, subvp=2.4).get(args.sde, recipe["kappa"])
    recipe |= dict(kappa=None, eta=None) if args.alpha is not None else {}
    if args.from_scratch:
        recipe |= dict(steps=3000, lr=8e-3, ema=0.999)
    full = dict(n=2000, nfe=c.SDES[args.sde].nfe, ema=0.98) | c.recipe(args.dataset)["unlearn"] | recipe
    return c.finish_args(args, full=full, quick=dict(steps=5, batch_size=16, n=40, nfe=4))


# ---- the losses --------------------------------------------------------------------------------------


def forget_times(args, sde, n):                                                                           # <-- 03
    """Noise levels for n images of D_f -> (n,)."""
    # Where to push: a class is decided near sigma = 1.  Higher, all images look alike; lower, only the strokes' edges are open.
    return c.uniform_t(n, sde, args.device) if args.uniform_t else c.lognormal_t(n, sde, *args.log_sigma, device=args.device)


def forget_loss(args, net, base, sde, x_f):                                                               # <-- 03
    """L_f of the chosen method on a batch of D_f -> (B,)."""
    if args.method == "unseen":
        return torch.zeros(len(x_f), device=x_f.device)
    t = forget_times(args, sde, len(x_f))
    if args.method == "ort":
        return c.ort_loss(net, sde, x_f, t, inner=args.ort == "inner")
    if args.method == "obt-rel":
        return c.obt_rel_loss(net, base, sde, x_f, t)
    return {"obt": c.obt_loss, "ascent": c.ascent_loss, "erasediff": c.erasediff_loss}[args.method](net, sde, x_f, t)


def retain_loss(args, net, base, sde, x_g):                                                               # <-- 03
    """L_g on a batch of D_g -> (B,)."""
    if args.from_scratch:  # a random network has all noise levels to learn: 02's noise and weight
        return c.dsm_loss(net, sde, x_g, c.lognormal_t(len(x_g), sde, *c.TRAIN_NOISE, args.device), weight="v")
    t = c.uniform_t(len(x_g), sde, args.device)
    return c.distill_loss(net, base, sde, x_g, t) if args.retain == "distill" else c.dsm_loss(net, sde, x_g, t)


def flat_grad(loss, net):
    """Gradient of a loss by all weights of net, as one vector (P,), for methods that weigh gradients and not losses."""
    grad = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)])
    c.average_over_ranks([grad])
    return grad


def linear_loss(net, grad):
    """The loss w . grad, whose gradient is `grad` (P,): hands a gradient made by hand to backward."""
    return torch.cat([w.flatten() for w in net.parameters()]) @ grad


def objective(args, net, base, sde, x_g, x_f):                                                            # <-- 03
    """-> the loss to step on, L_g, L_f."""
    with c.autocast(args.device):
        if args.method == "siss":
            both = c.siss_losses(net, sde, x_g, x_f, forget_times(args, sde, len(x_f)))
        else:
            both = retain_loss(args, net, base, sde, x_g), forget_loss(args, net, base, sde, x_f)
    loss_g, loss_f = (loss.mean() for loss in both)
    if args.eta is not None or args.c is not None:
        g, f = flat_grad(loss_g, net), flat_grad(loss_f, net)
        weight = -args.c / f.norm() if args.eta is None else c.erasediff_weight(g, f, args.eta)
        return linear_loss(net, g + weight * f), loss_g, loss_f
    alpha = 1.0 if args.alpha is None else args.alpha  # unseen: L_g alone
    return alpha * loss_g + (1 - alpha) * loss_f, loss_g, loss_f  # the paper's objective


# ---- measures and pictures ---------------------------------------------------------------------------


def draw(net, label, args, sde, judge, shape):
    """args.n samples, always from the same noise, and the judge's verdict on them."""
    x = c.sample_images(net, args.n, shape, sde, args.seed, args.nfe, batch=50 if args.quick else 250, device=args.device, label=label)
    return x, c.judge_images(judge, x)


def report(args, before, after, judge, images_g, test_g, forget, classes, seconds):
    """Print the measures before and after beside the floor: what real images of D_g score -> the content of result.json.

    before is None when there is no Standard model (--from-scratch); its figures are None then.
    """
    real = c.judge_images(judge, images_g[:1000] if args.quick else images_g).features
    real_test = c.judge_images(judge, test_g[torch.randperm(len(test_g), generator=c.rng(args.seed))[: args.n]])
    pairs = ((before, None), (after, before or after), (real_test, None))
    b, a, floor = (c.measure(verdict, forget, real, len(classes), reference) if verdict else {} for verdict, reference in pairs)
    cell = lambda m, key: f"{m[key]:6.2f}" if m else "     -"
    print(f"{'':24}before   after   real D_g (floor)")
    for name, key in (("unlearning ratio, %", "ur"), ("Frechet distance", "fd"), ("judge unsure, %", "low_confidence")):
        print(f"{name:24}" + "  ".join(cell(m, key) for m in (b, a, floor)))
    print(f"UR after in [{a['ur_interval'][0]:.2f}, {a['ur_interval'][1]:.2f}] % (95 %, n = {args.n})" + (f"; class_min_ratio {a['class_min_ratio']:.2f}" if b else ""))
    print(f"class counts before {b.get('class_counts')}\n             after  {a['class_counts']}")
    return dict(
        method=args.method, sde=args.sde, forget=[classes[i] for i in forget], alpha=args.alpha,
        steps=args.steps, n=args.n, sampler=c.SDES[args.sde].sampler, nfe=args.nfe,
        ur_before=b.get("ur"), ur_after=a["ur"], ur_interval=a["ur_interval"], ur_floor=floor["ur"],
        fd_before=b.get("fd"), fd_after=a["fd"], fd_floor=floor["fd"], low_confidence_before=b.get("low_confidence"),
        low_confidence_after=a["low_confidence"], low_confidence_floor=floor["low_confidence"],
        class_min_ratio=a["class_min_ratio"] if b else None, class_counts=dict(before=b.get("class_counts"), after=a["class_counts"]),
        seconds=seconds, args=vars(args),
    )


def before_after(path, before, after, judge_before, judge_after, classes, forget, columns=8, titles=("before", "after")):
    """Two grids made from the same noise: bytes (N, C, H, W) twice and their Verdicts.

    The judge's class stands in the corner of each image, red when it is to be forgotten; an orange frame marks the images
    whose class has changed.
    """
    plt = c.pyplot()
    n, _, h, w = before.shape
    rows = -(-n // columns)
    fig, axes = plt.subplots(1, 2, figsize=(11, 5.5 * rows / columns + 0.4))
    for ax, images, verdict, title in zip(axes, (before, after), (judge_before, judge_after), titles):
        ax.imshow(c.tile(images, columns), cmap="gray", vmin=0, vmax=255)
        ax.axis("off"), ax.set_title(title, fontsize=10)
        for i in range(n):
            x, y, label = i % columns * w, i // columns * h, int(verdict.labels[i])
            color = "#ff4040" if label in forget else "#60c060"
            ax.text(x + 1, y + 1, c.short(classes[label]), color=color, fontsize=7, va="top", fontweight="bold")
            if judge_before.labels[i] != judge_after.labels[i]:
                ax.add_patch(plt.Rectangle((x, y), w - 1, h - 1, fill=False, edgecolor="orange", linewidth=1.2))
    fig.tight_layout(pad=0.4), fig.savefig(path, dpi=110), plt.close(fig)


def plot_curves(path, rows, title):
    """Retain and forget loss over the steps: rows of dicts, with a running mean of 20."""
    plt = c.pyplot()
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.2))
    for ax, i, name in zip(axes, ("loss_g", "loss_f"), ("retain loss L_g", "forget loss L_f")):
        y = np.array([r[i] for r in rows])
        k = min(20, len(y))
        ax.plot(y, color="0.8"), ax.plot(np.arange(k - 1, len(y)), np.convolve(y, np.ones(k) / k, "valid"))
        ax.set_xlabel("step"), ax.set_title(name, fontsize=10)
    fig.suptitle(title, fontsize=10), fig.tight_layout()
    fig.savefig(path, dpi=100), plt.close(fig)


# ---- the story ---------------------------------------------------------------------------------------


def models(args, shape):                                                                                     # <-- 03
    """The Standard model (None where there is none and none is needed), and the network to train: its copy, or random weights."""
    path, make = c.find_base(args.out, args.dataset)
    if not path.exists() and not args.from_scratch:
        c.die(f"{path} not found; make it with: {make}, or do without a Standard model: --from-scratch --method ort | obt")
    base, recipe = c.load_net(path, make, args.device) if path.exists() else None, c.RECIPES[args.dataset]
    weights = "  ".join(f"{k} {v:.4g}" for k, v in vars(args).items() if k in ("alpha", "kappa", "eta", "c", "lr", "steps") and v is not None)
    print(f"base: {path if base else 'none'}; sde {args.sde}, method {args.method}{', from scratch' * args.from_scratch}; {weights}")
    fresh = (base.arch if base else recipe["net"] | dict(sd=recipe["sd"])) | (dict(width=32) if args.quick else {})
    net = c.UNet(**fresh).to(args.device) if args.from_scratch else copy.deepcopy(base)
    print(f"model: {c.count(net, shape)}")
    return base, net


def main(argv=None):
    args, start = arguments(argv), time.time()

    # ---- data: D_g to keep and D_f to forget, as indices into one tensor                                # <-- 03
    data, test = (c.load_dataset(args.dataset, args.data_dir, part, args.forget) for part in (True, False))
    is_f, forget = c.split_forget(data, args.forget)
    images, in_g, in_f = data.images.to(args.device), *(torch.where(m)[0].to(args.device) for m in (~is_f, is_f))
    test_g, shape, flip = test.images[~c.split_forget(test, args.forget)[0]], images.shape[1:], c.RECIPES[args.dataset]["flip"]
    names = [data.classes[i] for i in forget]
    print("forgetting " + ", ".join(f"class {i} '{data.classes[i]}'" for i in forget) + f": {len(in_f):,} images; keeping {len(in_g):,}")
    if args.method == "obt-rel":
        print("obt-rel: ours, not the paper's; the paper's: --method ort | obt")
        if args.alpha is None:
            args.alpha = 1 / (1 + 2 * args.kappa * len(in_f) / len(in_g))  # kappa = (1-alpha) pi_g / (2 alpha pi_f), solved for alpha

    # ---- model: a copy of the Standard model, which itself stays as obt-rel's reference                 # <-- 03
    base, net = models(args, shape)
    judge, size, sde = c.load_judge(args, data, names), c.part_size(args), c.SDES[args.sde]()
    adam, ema = [torch.optim.Adam(net.parameters(), args.lr, betas=(0.9, 0.99), fused=True)], c.EMA(net, args.ema)
    optimizers = c.muon_and_adam(net, args.lr) if args.from_scratch else adam
    if args.compile:
        net.compile()
    run = c.run_name("ort-inner" if args.ort == "inner" else args.method, args.sde, args.from_scratch, args.seed)

    with c.fresh_folder(folder := c.forget_folder(args.out, args.dataset, names) / run) as out:
        x_before, before = draw(base, "samples before", args, sde, judge, shape) if base else (None, None)

        # ---- loop
        shown, t0, skipped, rows = 0, time.time(), 0, []  # rows: (L_g, L_f) of each step
        for step in range(args.steps):
            net.train()
            c.set_lr(optimizers, step, args.steps, warmup=20)
            both = torch.zeros(2, device=args.device)
            for _ in c.batch_parts(args, step):  # one, unless --grad-accum or torchrun
                x_g, x_f = (c.draw_batch(images, index, size, flip, args.device) for index in (in_g, in_f))  # <-- 03
                loss, loss_g, loss_f = objective(args, net, base, sde, x_g, x_f)                          # <-- 03
                (loss / args.grad_accum).backward()
                both += torch.stack([loss_g.detach(), loss_f.detach()]) / args.grad_accum
            skipped = c.guarded_step(net, optimizers, skipped)
            ema.update(net)
            rows.append(both)

            if (done := step + 1) % 50 == 0 or done == args.steps:
                c.average_over_ranks(rows[shown:])
                (g, f), eta = torch.stack(rows[shown:]).mean(0).tolist(), (args.steps - done) * (time.time() - t0) / (done - shown)
                print(f"step {done}/{args.steps}  L_g {g:.4f}  L_f {f:.4f}  ETA {eta:.0f} s", flush=True)
                shown, t0 = done, time.time()
        rows = [dict(step=i + 1, loss_g=g, loss_f=f) for i, (g, f) in enumerate(torch.stack(rows).tolist())]
        (out / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        c.save_checkpoint(out / "model.pt", arch=net.arch, ema=ema.net.state_dict(), step=args.steps, args=vars(args))

        # ---- outputs
        x_after, after = draw(ema.net, "samples after", args, sde, judge, shape)
        result = report(args, before, after, judge, data.images[~is_f], test_g, forget, data.classes, time.time() - start)
        (out / "result.json").write_text(json.dumps(result, indent=1))
        first, verdict, title = (x_before, before, "before") if base else (x_after, after, "after")
        before_after(out / "before_after.png", first[:64], x_after[:64], verdict, after, data.classes, forget, titles=(title, "after"))
        plot_curves(out / "curves.png", rows, f"{args.method}, forget {' '.join(args.forget)}, {args.sde}")
    print(f"{time.time() - start:.0f} s; wrote {folder}/; next: look at {folder / 'before_after.png'}")


if __name__ == "__main__":
    c.run(main)
