"""02  Train the Standard score model: the one that generates everything, and that 03 teaches to forget.

    python 02_train_sde.py --dataset mnist                 # about an hour on 2 CPU cores; data/mnist_base.pt is its result
    python 02_train_sde.py --dataset mnist --resume        # go on after Ctrl-C or a crash
    python 02_train_sde.py --dataset mnist --quick         # a minute: does everything run?
    python 02_train_sde.py --dataset mnist --judge         # train the classifier that judges samples instead (3 minutes)

Question: what does it take to learn grad log p_t(x) for every noise level t at once?
Answer:   show the network images at a random noise level and ask it for the noise.  That is the whole loop below.

Writes out/<dataset>/: base.pt (model, EMA, optimiser: everything --resume needs), samples_*.png at a cadence (the last row
is real), log.jsonl.  Expect on MNIST: v-loss 0.30 after 300 steps, 0.20 after 1,500, 0.17 at the end.

Predict, then run:
  1. At which sigma is the loss highest, and why is it low at both ends?      (read "loss by noise")
  2. What do samples look like when the EMA is switched off?                  (--ema 0)
  3. What happens to samples when no training image has sigma above 2?        (--log-sigma -1 0.5 --wide 0)
"""
import json
import signal
import sys
import time
from pathlib import Path

import torch

import common as c


def train_judge(args):
    """--judge: train, test and save the classifier of common.Judge."""
    train, test = (c.load_dataset(args.dataset, args.data_dir, part) for part in (True, False))
    judge = c.train_judge(train, epochs=1 if args.quick else 8, seed=args.seed, device=args.device)
    right = c.judge_images(judge, test.images).labels == test.labels
    path = Path(args.out) / args.dataset / "judge.pt"
    half = {k: v.half() if v.is_floating_point() else v for k, v in judge.state_dict().items()}
    c.save_checkpoint(path, arch=judge.arch, model=half, accuracy=right.float().mean().item())
    print(f"test accuracy {100 * right.float().mean():.2f} % on {len(right)} images; wrote {path}")


def main(argv=None):
    p = c.parser(__doc__)
    p.add_argument("--ema", type=c.number(float, 0, 0.99999), default=0.9995, help="decay of the weight average")
    p.add_argument("--log-sigma", type=float, nargs=2, default=(-1.0, 1.4), help="mean and std of ln sigma in training")
    p.add_argument("--wide", type=c.number(float, 0, 1), default=0.1, help="share of ln sigma drawn uniformly instead")
    p.add_argument("--resume", action="store_true", help="go on from base.pt")
    p.add_argument("--judge", action="store_true", help="train the judge instead of the score model")
    p.add_argument("--save-every", type=c.number(int, 1), default=1000)
    p.add_argument("--sample-every", type=c.number(int, 1), default=5000)
    args = c.finish_args(p.parse_args(argv), full=dict(steps=30000, lr=8e-3), quick=dict(steps=30))
    if args.judge:
        return train_judge(args)
    out = Path(args.out) / args.dataset
    print("args:", json.dumps(vars(args)))

    # ---- data: one tensor of bytes
    data = c.load_dataset(args.dataset, args.data_dir)
    test = c.load_dataset(args.dataset, args.data_dir, train=False)
    held_out = c.dequantize(test.images[:500]).to(args.device)
    print(f"data: {len(data.images):,} images of {tuple(data.images.shape[1:])}, classes {' '.join(data.classes)}")

    # ---- model
    recipe = c.RECIPES[args.dataset]
    shape = dict(recipe["net"], sd=recipe["sd"])
    if args.quick:
        shape["width"] = 32  # only a network made from scratch shrinks
    net = c.UNet(**shape).to(args.device)
    print(f"model: {sum(w.numel() for w in net.parameters()) / 1e6:.2f} M parameters")
    optimizers = c.muon_and_adam(net, args.lr)
    ema, first = c.EMA(net, args.ema), 0
    if args.resume:
        make = f"python 02_train_sde.py --dataset {args.dataset}"
        ckpt = c.load_checkpoint(out / "base.pt", make, ("model", "ema", "optimizer", "step", "rng", "arch"))
        if ckpt["arch"] != net.arch:
            c.die(f"{out / 'base.pt'} holds another network (was it made with --quick?); start again without --resume")
        net.load_state_dict(ckpt["model"]), ema.net.load_state_dict(ckpt["ema"])
        for optimizer, state in zip(optimizers, ckpt["optimizer"]):
            optimizer.load_state_dict(state)
        torch.set_rng_state(ckpt["rng"])
        first = ema.n = ckpt["step"]
        print(f"resumed {out / 'base.pt'} at step {first}")

    def save(step):
        c.save_checkpoint(
            out / "base.pt", arch=net.arch, model=net.state_dict(), ema=ema.net.state_dict(), optimizer=[o.state_dict() for o in optimizers],
            step=step, rng=torch.get_rng_state(), args=vars(args), torch=str(torch.__version__),
        )

    # ---- loop
    shown, t0, skipped, running = first, time.time(), 0, 0.0
    log = open(out / "log.jsonl", "a" if args.resume else "w")
    stop = []  # Ctrl-C only asks: the step in progress is finished, so the checkpoint is a whole number of steps
    signal.signal(signal.SIGINT, lambda *_: stop.append(True))
    for step in range(first, args.steps):
        net.train()
        c.set_lr(optimizers, step, args.steps, warmup=200)
        x0 = c.dequantize(data.images[torch.randint(len(data.images), (args.batch_size,))]).to(args.device)
        t = c.lognormal_t(len(x0), c.WIDE, *args.log_sigma, args.wide, device=args.device)
        loss = c.dsm_loss(net, c.WIDE, x0, t, weight="v").mean()
        skipped = c.guarded_step(loss, net, optimizers, skipped)
        ema.update(net)
        running += loss.detach()  # no .item(): on a GPU that would wait for the step to finish

        done = step + 1
        if done % 100 == 0 or done == args.steps:
            rate = (done - shown) * args.batch_size / (time.time() - t0)
            eta = (args.steps - done) * args.batch_size / rate / 60
            print(f"step {done}/{args.steps}  v-loss {running.item() / (done - shown):.4f}  {rate:.0f} images/s  ETA {eta:.1f} min", flush=True)
            log.write(json.dumps(dict(step=done, loss=running.item() / (done - shown), images_per_s=rate)) + "\n"), log.flush()
            shown, t0, running = done, time.time(), 0.0
        if done % args.sample_every == 0 or done == args.steps:
            bins = c.loss_by_noise(ema.net, held_out)
            print("loss by noise (held out): " + "  ".join(f"sigma {a:g}-{b:g}: {v:.3f}" for a, b, v in bins))
            noise = c.randn((50, *data.images.shape[1:]), c.rng(args.seed), args.device)
            x = c.dpmpp_sample(ema.net, noise, c.karras_sigmas(20, 80.0), eta=1.0, generator=c.rng(args.seed, 1))
            c.image_grid(out / f"samples_{done:06d}.png", c.to_bytes(x.cpu()), title=f"step {done} (last row: real)", real=test.images)
        if done % args.save_every == 0 or done == args.steps or stop:
            save(done)
        if stop:
            print(f"\nstopped at step {done}; go on with: python 02_train_sde.py --dataset {args.dataset} --steps {args.steps} --resume")
            return
    print(f"wrote {out / 'base.pt'}; next: python 03_unlearn.py --dataset {args.dataset} --forget <class>")


if __name__ == "__main__":
    main(sys.argv[1:])
