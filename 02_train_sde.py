"""02  Train the Standard score model: the one that generates everything, and that 03 teaches to forget.

    python 02_train_sde.py --dataset mnist                 # about an hour on 2 CPU cores; data/mnist_base.pt is its result
    python 02_train_sde.py --dataset mnist --resume        # go on after Ctrl-C or a crash, to the bit as if nothing had happened
    python 02_train_sde.py --dataset mnist --quick         # seconds: does everything run?
    python 02_train_sde.py --dataset mnist --without 3     # "Unseen": the same without the 3s; goes to out/mnist/forget-3/
    python 02_train_sde.py --dataset mnist --measure       # FD and unsure share of the base that is there, beside real images
    python 02_train_sde.py --dataset mnist --judge         # train the classifier that judges samples instead, 3 minutes
    python 02_train_sde.py --dataset cifar10               # also: fashion_mnist stl10 celeba imagenette, or your own pictures:
    python 02_train_sde.py --dataset folder --data-dir PATH         # PATH has one sub-folder per class
    torchrun --nproc_per_node=2 -- 02_train_sde.py --dataset cifar10   # a batch shared by two GPUs; 03 and 04 run so too

Question: what does it take to learn grad log p_t(x) for every noise level t at once?
Answer:   show the network images at a random noise level and ask it for the noise.  That is the whole loop below.

Writes out/<dataset>/: base.pt (model, average, optimizers: all that --resume needs), samples_*.png at a cadence (the last row is
real), log.jsonl.  Expect on MNIST: v-loss 0.26 after 300 steps, 0.18 after 5,000, 0.16 at the end.

Predict, then run:
  1. At which sigma is the loss highest, and why is it low in the middle?     (read "loss by noise")
  2. What do samples look like when the average is switched off?              (--ema 0)
  3. What becomes of samples when training never sees sigma above 2?          (--log-sigma -1 0.5 --wide 0)
"""
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import common as c

# ---- arguments ---------------------------------------------------------------------------------------


def arguments(argv):
    p = c.parser(__doc__)
    p.add_argument("--sde", choices=["any", *c.SDES], default="any", help="noise seen in training; any: one model for all of them")
    p.add_argument("--log-sigma", type=float, nargs=2, default=c.TRAIN_NOISE[:2], help="--sde any: mean and std of ln sigma")
    p.add_argument("--wide", type=c.number(float, 0, 1), default=c.TRAIN_NOISE[2], help="--sde any: share of ln sigma drawn uniformly instead")
    p.add_argument("--ema", type=c.number(float, 0, 0.99999), help="decay of the weight average")
    p.add_argument("--width", type=c.number(int, 8), help="channels of the U-Net at its top, a multiple of 8 (default: see common.RECIPES)")
    p.add_argument("--resume", action="store_true", help="go on from base.pt")
    p.add_argument("--save-every", type=c.number(int, 1), default=1000)
    p.add_argument("--sample-every", type=c.number(int, 1), default=5000)
    p.add_argument("--without", nargs="+", metavar="CLASS", help="leave these classes out: the Unseen model")
    p.add_argument("--judge", action="store_true", help="train the judge instead of the score model")
    p.add_argument("--measure", action="store_true", help="measure the base model instead of training one")
    p.add_argument("--n", type=c.number(int, 100), help="--measure: samples")
    args = p.parse_args(argv)
    if (args.judge or args.measure) and args.dataset == "celeba" and not args.without:
        c.die("--judge and --measure of celeba are about attributes: name them, e.g. --without bangs")
    if args.width and args.width % 8:
        c.die(f"--width {args.width}: a multiple of 8 is needed, for the groups of its norms")
    full = dict(width=c.recipe(args.dataset)["net"]["width"], n=5000, **c.recipe(args.dataset)["train"])
    return c.finish_args(args, full, quick=dict(steps=30, n=200, width=32))


# ---- the two side jobs -------------------------------------------------------------------------------


def fit_judge(data, epochs, batch=128, lr=4e-3, seed=0, device="cpu"):
    """Train a Judge on a Dataset, with small random shifts, turns and scalings -> Judge in eval mode."""
    torch.manual_seed(seed)
    batch = min(batch, len(data.images))
    judge = c.Judge(data.images.shape[1], len(data.classes)).to(device)
    optimizers = [torch.optim.AdamW(judge.parameters(), lr=lr, weight_decay=0.02, fused=True)]
    steps = epochs * (len(data.images) // batch)
    for step in range(steps):
        c.set_lr(optimizers, step, steps, 100)
        i = torch.randint(len(data.images), (batch,))
        x, target = data.images[i].to(device).float(), data.labels[i].to(device)
        # Up to 10 degrees, 10 % of size, 2 pixels: (B, 2, 3) affine maps.
        turn, size = (torch.rand(2, batch, device=device) * 2 - 1) * torch.tensor([[0.17], [0.1]], device=device)
        row = torch.stack([torch.cos(turn), -torch.sin(turn), torch.sin(turn), torch.cos(turn)], 1).reshape(batch, 2, 2)
        shift = (torch.rand(batch, 2, 1, device=device) * 2 - 1) * 4 / x.shape[-1]
        theta = torch.cat([row * (1 + size)[:, None, None], shift], 2)
        x = F.grid_sample(x, F.affine_grid(theta, x.shape, align_corners=False), padding_mode="border", align_corners=False)
        loss = F.cross_entropy(judge(x)[0], target)
        loss.backward()
        c.guarded_step(judge, optimizers, 0, clip=5.0)
        if step % 200 == 0 or step == steps - 1:
            print(f"judge step {step}/{steps}  loss {loss.item():.3f}", flush=True)
    return judge.eval()


def load(args):
    """The training and test part of the data set."""
    return (c.load_dataset(args.dataset, args.data_dir, part, args.without) for part in (True, False))


def train_judge(args):
    """--judge: train, test and save the classifier of common.Judge, in half precision to halve the file."""
    train, test = load(args)
    part = slice(10000 if args.quick else None)
    train = train._replace(images=train.images[part], labels=train.labels[part])
    judge = fit_judge(train, epochs=1 if args.quick else 8, seed=args.seed, device=args.device)
    right = c.judge_images(judge, test.images).labels == test.labels
    path = Path(args.out) / args.dataset / c.judge_path(args, args.without or ()).name.removeprefix(f"{args.dataset}_")
    half = {k: v.half() if v.is_floating_point() else v for k, v in judge.state_dict().items()}
    c.save_checkpoint(path, arch=judge.arch, model=half, classes=train.classes, quick=args.quick, accuracy=right.float().mean().item())
    print(f"test accuracy {100 * right.float().mean():.2f} % on {len(right)} images; wrote {path}")


def measure_base(args):
    """--measure: how good is the base?  The same numbers for as many real test images say how good it could look at this n."""
    path, make = c.find_base(args.out, args.dataset)
    net, (train, test) = c.load_net(path, make, args.device), load(args)
    judge = c.load_judge(args, train, args.without or ())
    real = c.judge_images(judge, train.images[:1000] if args.quick else train.images).features
    fake = c.sample_images(net, args.n, train.images.shape[1:], c.VP(), args.seed, device=args.device)
    print(f"{path}, n = {args.n}, {c.VP.sampler}\n{'':9}FD       judge unsure, %")
    for name, images in (("model", fake), ("real", test.images[torch.randperm(len(test.images), generator=c.rng(args.seed))[: args.n]])):
        m = c.measure(c.judge_images(judge, images), [], real, len(train.classes))
        print(f"{name:8}{m['fd']:7.3f}  {m['low_confidence']:6.2f}     classes {m['class_counts']}")


# ---- checkpoint and progress -------------------------------------------------------------------------


def save(path, step, net, ema, optimizers, args):
    """Everything a run is made of, the random state included: data order, noise levels and noise all come from it."""
    c.save_checkpoint(
        path, arch=net.arch, model=net.state_dict(), ema=ema.net.state_dict(), optimizers=[o.state_dict() for o in optimizers],
        step=step, rng=torch.get_rng_state(), args=vars(args), torch=str(torch.__version__),
    )


def resume(path, net, ema, optimizers, args):
    """Undo of save -> the step to go on with."""
    make = f"python 02_train_sde.py --dataset {args.dataset}"
    ckpt = c.load_checkpoint(path, make, ("arch", "model", "ema", "optimizers", "step", "rng"))
    if ckpt["arch"] != net.arch:
        c.die(f"{path} holds another network (was it made with --quick?); start again without --resume")
    net.load_state_dict(ckpt["model"]), ema.net.load_state_dict(ckpt["ema"])  # raw weights train on; the average only follows
    for optimizer, state in zip(optimizers, ckpt["optimizers"]):
        optimizer.load_state_dict(state)
    torch.set_rng_state(ckpt["rng"])
    ema.n = ckpt["step"]
    print(f"resumed {path} at step {ckpt['step']}")
    return ckpt["step"]


def image_grid(path, images, columns=10, title=None, real=None):
    """Save bytes (N, C, H, W) as a grid; `real` adds a row of real images below a gap, to compare with."""
    plt = c.pyplot()
    pixels = c.tile(images, columns)
    if real is not None:
        gap = np.full((4, *pixels.shape[1:]), 255, np.uint8)
        pixels = np.concatenate([pixels, gap, c.tile(real[:columns], columns)])
    fig, ax = plt.subplots(figsize=(6, 6 * pixels.shape[0] / pixels.shape[1] + (0.3 if title else 0)))
    ax.imshow(pixels, cmap="gray", vmin=0, vmax=255), ax.axis("off")
    if title:
        ax.set_title(title, fontsize=9)
    fig.savefig(path, dpi=110, bbox_inches="tight", pad_inches=0.05)
    plt.close(fig)


@torch.no_grad()
def loss_by_noise(net, x0, edges=(0.001, 0.02, 0.1, 0.5, 2.0, 10.0, 160.0), seed=0):
    """v-loss |F - F*|^2 of images x0 (B, ...) in bins of sigma, with fixed noise -> list of (low, high, loss)."""
    out, generator = [], c.rng(seed)
    for low, high in zip(edges[:-1], edges[1:]):
        sigma = low * (high / low) ** ((torch.arange(len(x0), device=x0.device) + 0.5) / len(x0))
        z = c.randn(x0.shape, generator, x0.device)
        z_hat = c.predict(net, x0 + c.bcast(sigma, x0) * z, sigma)[1]
        out.append((low, high, (c.flat_mean((z_hat - z) ** 2) * (1 + (sigma / net.sd) ** 2)).mean().item()))
    return out


def show(path, step, net, held_out, real, args):
    """Loss by noise level on held-out images, and a grid of samples over a row of the bytes `real`."""
    print("loss by noise, held out: " + "  ".join(f"sigma {a:g}-{b:g}: {v:.3f}" for a, b, v in loss_by_noise(net, held_out)))
    x = c.sample_images(net, n := 10 if args.quick else 50, real.shape[1:], c.WIDE, args.seed, batch=n, device=args.device)
    if c.ranks()[0] == 0:
        image_grid(path, x, title=f"step {step} (last row: real)", real=real)


# ---- the story ---------------------------------------------------------------------------------------


def main(argv=None):
    args = arguments(argv)
    if args.judge or args.measure:
        return train_judge(args) if args.judge else measure_base(args)
    print("args:", json.dumps(vars(args)))

    # ---- data: one tensor of bytes, on the GPU if there is one
    data, test = load(args)
    out, file, (rest, test_rest) = Path(args.out) / args.dataset, "base.pt", (torch.arange(len(part.images)) for part in (data, test))
    if args.without:  # the Unseen model stands beside the unlearned ones, where 04 looks for it
        rest, test_rest = (torch.where(~c.split_forget(part, args.without)[0])[0] for part in (data, test))
        args.method, args.forget, file = "unseen", [data.classes[i] for i in c.split_forget(data, args.without)[1]], "model.pt"
        out = c.make_folder(c.forget_folder(args.out, args.dataset, args.forget) / c.run_name("unseen", args.sde, True, args.seed))
    print(f"data: {len(rest):,} images of {tuple(data.images.shape[1:])}" + (f", without {' '.join(args.forget)}" if args.without else ""))
    images, rest, real = data.images.to(args.device), rest.to(args.device), test.images[test_rest[torch.randperm(len(test_rest), generator=c.rng(0))[:500]]]
    held_out = c.dequantize(real).to(args.device)

    # ---- model: from scratch; only a network made from scratch shrinks under --quick
    recipe = c.RECIPES[args.dataset]
    net = c.UNet(**recipe["net"] | dict(width=args.width), sd=recipe["sd"]).to(args.device)
    print(f"model: {c.count(net, images.shape[1:])}")
    optimizers, ema, sde = c.muon_and_adam(net, args.lr), c.EMA(net, args.ema), c.WIDE if args.sde == "any" else c.SDES[args.sde]()
    first = resume(out / file, net, ema, optimizers, args) if args.resume else 0
    if args.compile:
        net.compile()

    # ---- loop
    size, shown, t0, skipped, running = c.part_size(args), first, time.time(), 0, torch.zeros((), device=args.device)
    log = open(out / "log.jsonl" if c.ranks()[0] == 0 else os.devnull, "a" if args.resume else "w")
    stop = []  # Ctrl-C only asks: the step in progress is finished, so a checkpoint always holds a whole number of steps
    if c.ranks()[1] == 1:  # several processes could not agree on the step; they lose what came after the last checkpoint
        signal.signal(signal.SIGINT, lambda *_: stop.append(True))
    for step in range(first, args.steps):
        net.train()
        c.set_lr(optimizers, step, args.steps, warmup=200)
        for _ in c.batch_parts(args, step):  # one, unless --grad-accum or torchrun
            x0 = c.draw_batch(images, rest, size, recipe["flip"], args.device)
            # The density of t decides where the effort goes; see common.lognormal_t.
            t = c.uniform_t(len(x0), sde, args.device) if sde is not c.WIDE else c.lognormal_t(len(x0), sde, *args.log_sigma, args.wide, args.device)
            with c.autocast(args.device):
                loss = c.dsm_loss(net, sde, x0, t, weight="v").mean()
            (loss / args.grad_accum).backward()
            running += loss.detach() / args.grad_accum
        skipped = c.guarded_step(net, optimizers, skipped)
        ema.update(net)

        done = step + 1
        if done % 100 == 0 or done in (50, args.steps):
            c.average_over_ranks([running])
            mean, rate = running.item() / (done - shown), (done - shown) * args.batch_size / (time.time() - t0)
            print(f"step {done}/{args.steps}  v-loss {mean:.4f}  {rate:.0f} images/s  ETA {(args.steps - done) * args.batch_size / rate / 3600:.2f} h", flush=True)
            print(json.dumps(dict(step=done, loss=mean, images_per_s=rate)), file=log, flush=True)
            shown, t0, running = done, time.time(), torch.zeros_like(running)
        if done % args.sample_every == 0 or done == args.steps:
            show(out / f"samples_{done:06d}.png", done, ema.net, held_out, real, args)
        if done % args.save_every == 0 or done == args.steps or stop:
            save(out / file, done, net, ema, optimizers, args)
        if stop:
            return print(f"\nstopped at step {done}; go on with the same command and --resume")
    print(f"wrote {out / file}; next: python 03_unlearn.py --dataset {args.dataset} --forget {' '.join(args.without or ['<class>'])}")


if __name__ == "__main__":
    c.run(main)
