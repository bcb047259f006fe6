"""02  Train the Standard score model: it draws everything, and 03 teaches it to forget.

    python 02_train_sde.py --dataset mnist              # about an hour on 2 CPU cores
    python 02_train_sde.py --dataset mnist --resume     # go on after Ctrl-C or a crash
    python 02_train_sde.py --dataset mnist --quick      # seconds: does everything run?
    python 02_train_sde.py --dataset mnist --without 3  # the "Unseen" model: no 3 in training
    python 02_train_sde.py --dataset mnist --measure    # how good is the Standard model?
    python 02_train_sde.py --dataset mnist --judge      # train the judge of samples, 3 minutes
    python 02_train_sde.py --dataset cifar10            # or fashion_mnist stl10 celeba imagenette
    python 02_train_sde.py --dataset folder --data-dir PATH           # your own pictures
    torchrun --nproc_per_node=2 -- 02_train_sde.py --dataset cifar10  # two GPUs share a batch

Question: what does it take to learn the score grad log p_t(x) at every noise level at once?
          p_t is the density of the images with the noise of time t.
Answer:   show the network images at a random noise level and ask it for the noise. That is the
          whole of `train` below.

"Standard" is the paper's name for a model of all classes. data/mnist_base.pt is the one that the
first command made. A run that goes on with --resume ends with the same weights, to the last bit, as
one that was never stopped. --without writes into out/mnist/forget-3/. The judge is a classifier: it
says what a sample shows. --measure prints the same figures for real images beside the model's, and
writes them into measure.json. The folder PATH has one sub-folder per class. 03 and 04 run under
torchrun too.

Writes out/<dataset>/: base.pt (model, average, optimizers: all that --resume needs), log.jsonl, and
every 5,000 steps and at the end samples_*.png (the last row is real). Another or a longer training
that lies there is replaced only with --overwrite. Expect on MNIST for the loss, which is printed as
v-loss: 0.26 after 300 steps, 0.18 after 5,000, 0.16 at the end.

Predict, then run:
  1. At which noise level sigma is the loss highest? Why is it low in between? ("loss by noise")
  2. What do samples look like when the average is switched off?               (--ema 0)
  3. What becomes of samples when training hardly sees sigma above 2, 0.4 % of all levels?
     (--log-sigma -2.5 1.2 --wide 0)
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    # The imports take seconds. Until common.run listens, Ctrl-C ends the program without a word.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

import common

# ---- arguments -----------------------------------------------------------------------------------

QUICK = {"steps": 30, "n": 200, "width": 32}  # the defaults that differ under --quick


def arguments(argv):
    """Read the command line: refuse what makes no sense and fill in what the user has left open."""
    p = flags()
    args = p.parse_args(argv)
    refuse(args)
    refuse_unused(p, args)
    return common.finish_args(args, defaults(args), QUICK)


def flags():
    """Return a parser of this script's flags and of those that all scripts share."""
    recipe = "for mnist; see common.RECIPES"
    helps = {
        "--steps": f"training steps (default: 30000 {recipe})",
        "--batch-size": f"images a step (default: 64 {recipe})",
        "--lr": f"peak learning rate of Adam; Muon has its own (default: 0.008 {recipe})",
        "--overwrite": common.OVERWRITE_OR_RESUME,
    }
    p = common.parser(__doc__, helps=helps)
    p.add_argument(
        "--sde",
        choices=["any", *common.SDES],
        default="any",
        help="noise seen in training; any: one model for all of them",
    )
    p.add_argument(
        "--log-sigma",
        type=common.number(float, -10, 10),
        nargs=2,
        default=(common.TRAINING_NOISE["mean"], common.TRAINING_NOISE["std"]),
        help="--sde any: mean and std of ln sigma",
    )
    p.add_argument(
        "--wide",
        type=common.number(float, 0, 1),
        default=common.TRAINING_NOISE["uniform"],
        help="--sde any: share of ln sigma drawn uniformly instead",
    )
    p.add_argument(
        "--ema",
        type=common.number(float, 0, 0.99999),
        help=f"decay of the weight average (default: 0.9995 {recipe})",
    )
    p.add_argument(
        "--width",
        type=common.number(int, 8, 4096),
        help=f"channels of the U-Net at its top, a multiple of 8 (default: 48 {recipe})",
    )
    p.add_argument("--resume", action="store_true", help="go on with a training")
    p.add_argument(
        "--save-every",
        type=common.number(int, 1),
        default=1000,
        metavar="STEPS",
        help="steps from one checkpoint to the next",
    )
    p.add_argument(
        "--sample-every",
        type=common.number(int, 1),
        default=5000,
        metavar="STEPS",
        help="steps from one picture of samples to the next",
    )
    p.add_argument(
        "--without",
        nargs="+",
        metavar="CLASS",
        help="leave these classes out: the Unseen model (default: all classes)",
    )
    p.add_argument(
        "--judge", action="store_true", help="train the judge instead of the score model"
    )
    p.add_argument(
        "--measure", action="store_true", help="measure the base model instead of training one"
    )
    p.add_argument(
        "--n", type=common.number(int, 100, 10**6), help="--measure: samples (default: 5000)"
    )
    return p


def refuse(args):
    """Exit with one line if flags do not fit together."""
    common.refuse_log_sigma(args.log_sigma)
    if (args.judge or args.measure) and args.dataset == "celeba" and not args.without:
        # CelebA has attributes and no classes: without names the judge would have nothing to tell.
        common.exit_with_error(
            "--judge and --measure of celeba are about attributes: name them, e.g. --without bangs"
        )
    common.refuse_resume_and_overwrite(args)
    if args.width and args.width % 8:
        common.exit_with_error(
            f"--width {args.width}: a multiple of 8 is needed, for the groups of its norms"
        )


def refuse_unused(p, args):
    """Exit with one line on a flag that this run would silently ignore; p is the parser."""
    places = {"dataset", "data_dir", "cache_dir", "out", "quick", "device", "seed"}
    if args.dataset == "celeba":
        places.add("without")  # it names the classes of CelebA
    others = set(vars(args)) - places
    if args.judge:
        common.refuse_unused(p, args, sorted(others - {"judge", "overwrite"}), "with --judge")
    elif args.measure:
        flags = {"measure", "n", "bf16", "overwrite"}
        common.refuse_unused(p, args, sorted(others - flags), "with --measure")
    else:
        common.refuse_unused(p, args, ["n"], "without --measure")
    if args.sde != "any":
        common.refuse_unused(p, args, ["log_sigma", "wide"], f"with --sde {args.sde}")


def defaults(args):
    """Return the values of the flags that the user has left open, as a dict."""
    # A recipe is what we know about training on one data set: network, steps, batch, rates.
    recipe = common.recipe(args.dataset)
    return {"width": recipe["net"]["width"], "n": 5000, **recipe["train"]}


# ---- data and model ------------------------------------------------------------------------------


@dataclass
class Data:
    """The images of a run: all of them in one tensor of bytes, and the indices of each set."""

    images: torch.Tensor  # (N, C, H, W) uint8, all training images, on the device
    index_g: torch.Tensor  # (N_g,) indices of D_g, the images to learn: all but those of --without
    test_g: torch.Tensor  # (n, C, H, W) uint8, test images of D_g, 500 if there are so many
    held_out: torch.Tensor  # (n, C, H, W) the same on the device, dequantised as `draw` does it
    forget_names: list  # names of the classes that are left out; none without --without
    part_size: int  # B, images in one call of `draw`: a batch, or one part of it
    flip: bool  # whether it mirrors a random half of them: a mirror image is then as good

    def draw(self, index):
        """Draw a random batch of the images with these indices (M,): (B, C, H, W), dequantised.

        A byte k becomes the real number (k + u)/128 - 1 with u ~ U(0, 1): bytes have no density.
        """
        return common.draw_batch(self.images, index, self.part_size, self.flip, self.images.device)


def split_data(args, train_set, test_set):
    """Find D_g, the images to learn, in the training set and in the test set; return a Data."""
    is_forgotten, forget_classes = split_off(train_set, args.without)
    test_forgotten, _ = split_off(test_set, args.without)
    index_g = torch.where(~is_forgotten)[0]
    test_g = common.random_subset(test_set.images[~test_forgotten], 500, 0)  # 0 is a seed
    data = Data(
        images=train_set.images.to(args.device),  # bytes: a quarter of the memory of floats
        index_g=index_g.to(args.device),
        test_g=test_g,
        # Dequantised once: the held-out losses of two steps differ by the network alone.
        held_out=common.dequantize(test_g).to(args.device),
        forget_names=[train_set.classes[i] for i in forget_classes],
        part_size=common.part_size(args),
        flip=common.RECIPES[args.dataset]["flip"],
    )

    left_out = f", without {' '.join(data.forget_names)}" if args.without else ""
    shape = tuple(train_set.images.shape[1:])
    common.say(f"data: {len(index_g):,} images of {shape}{left_out}")
    return data


def split_off(dataset, names):
    """Find the images of some classes: (is_forgotten (N,) bool, indices of the classes).

    names  of these classes; None stands for no class
    """
    if not names:
        return torch.zeros(len(dataset.labels), dtype=torch.bool), []
    return common.split_forget(dataset, names, "--without")


@dataclass
class Model:
    """A network and what trains it."""

    net: common.UNet  # the weights that are trained
    ema: common.EMA  # the average of net over the last steps; samples are drawn from it
    optimizers: list  # each moves some of the weights
    sde: common.SDE  # the noise that images get in training
    shape: tuple  # (C, H, W) of the images
    data_key: int = 0  # of the training set, see common.data_key
    num_skipped: int = 0  # steps so far that were left out: their gradient was not finite
    log: list = field(default_factory=list)  # the lines of log.jsonl so far


def make_model(args, shape):
    """Make a network for images of shape (C, H, W), and what trains it: a Model.

    The network starts with random weights.
    """
    recipe = common.RECIPES[args.dataset]
    # The arguments of UNet. sd is the standard deviation of the pixels on the scale [-1, 1].
    arch = {**recipe["net"], "width": args.width, "sd": recipe["sd"]}
    refuse_too_large(arch)
    net = common.UNet(**arch).to(args.device)
    print(f"model: {common.describe_network(net, shape)}")

    # x_t / s(t) is x0 + sigma z for every SDE. They only differ in the time at which a noise level
    # sigma comes. So a model that has seen all levels of "any" serves all SDEs.
    sde = common.TRAINING_SDE if args.sde == "any" else common.SDES[args.sde]()
    model = Model(
        net=net,
        ema=common.EMA(net, args.ema),
        optimizers=common.muon_and_adam(net, args.lr),
        sde=sde,
        shape=tuple(shape),
    )
    if args.compile:
        net.compile()  # last: describe_network and EMA need the network as it is without that
    return model


def refuse_too_large(arch):
    """Raise MemoryError if the machine has too little memory to train a UNet of this `arch`.

    Linux grants more memory than there is and ends the program when it is used.
    """
    with torch.device("meta"):  # the shapes alone, which take no memory
        num_weights = sum(weight.numel() for weight in common.UNet(**arch).parameters())
    # The weights, their gradients, their average and Muon's momentum: 4 bytes for each of them.
    if 4 * 4 * num_weights > common.physical_memory():
        raise MemoryError


# ---- the losses ----------------------------------------------------------------------------------
#
# t is a time between 0 (data) and 1 (noise). An image x0 gets the noise z ~ N(0, I):
#     x_t = s(t) x0 + std(t) z,      sigma = std(t) / s(t), the noise level
# The network estimates z, and its estimate is z_hat. The score of the model is -z_hat / std(t).
# On average it should be -z / std(t).
#
# The network does not return z_hat itself but F, from which z_hat follows. F* is what F should be:
#     z_hat - z = -cos(phi) (F - F*),   tan(phi) = sigma / sd,  see "The circle" in common.py
# Here sd is the standard deviation of the data. A loss, and each |...|^2, is a mean over the D
# numbers of an image.


def training_times(args, sde, n):
    """Draw random noise levels for n images, as times t (n,)."""
    # Levels that come often are learned best. "any" draws most of them where it is decided what an
    # image shows, with ln sigma ~ N(mean, std^2), and a share --wide of them anywhere, for the two
    # ends.
    if args.sde != "any":
        return common.uniform_t(n, sde, args.device)  # the paper's choice
    mean, std = args.log_sigma
    return common.lognormal_t(n, sde, mean, std, args.wide, args.device)


def objective(args, net, sde, x_g):
    """Return the loss to step on, one number: score matching on a batch x_g (B, C, H, W)."""
    t = training_times(args, sde, len(x_g))
    with common.autocast(args.device, args.bf16):  # bfloat16 on a GPU
        # L_g = |F - F*|^2 = |z_hat - z|^2 / cos(phi)^2. The paper's L_g is |z_hat - z|^2 alone. At
        # high noise x_t is nearly all z, so any network knows z, and that loss is small whatever
        # the network has learned. Divided by cos(phi)^2 all noise levels weigh alike, and training
        # from scratch is far quicker. weight="v": F is the v of "v-prediction", up to its sign.
        loss = common.dsm_loss(net, sde, x_g, t, weight="v")  # (B,)
    return loss.mean()


# ---- the training loop ---------------------------------------------------------------------------


def train(args, data, model, path, first_step, kept_steps, ctrl_c):
    """Show the network images at random noise levels and ask it for the noise, again and again.

    path        of the checkpoint; its log and the grids of samples go beside it
    first_step  0, or the step to go on with
    kept_steps  of the training in `path`, which is replaced only by as many
    ctrl_c      common.CtrlC; when it is pressed the program ends after the step in progress
    """
    net = model.net
    sde = model.sde
    outdated = []  # files that go when `path` becomes another training
    if first_step == 0 and kept_steps == 0:
        names = ("log.jsonl", "command.txt")
        outdated = [*map(path.with_name, names), *path.parent.glob("samples_*.png")]
    loss_sum = torch.zeros((), device=args.device)  # of the steps since the last printed line
    num_skipped = 0  # steps in a row whose gradient was not finite
    printed_steps = first_step  # how many steps were done when the last line was printed
    printed_at = time.time()  # when that was, in seconds
    for step in range(first_step, args.steps):
        net.train()
        common.set_lr(model.optimizers, step, args.steps, warmup=200)
        for _ in common.batch_parts(args, step):  # one part, unless --grad-accum or torchrun
            x_g = data.draw(data.index_g)
            loss = objective(args, net, sde, x_g)
            (loss / args.grad_accum).backward()
            # A tensor: loss.item() would make the CPU wait for the GPU at each step.
            loss_sum += loss.detach() / args.grad_accum
        # optimizer.step() and zero_grad(). A gradient that is not finite is dropped.
        num_skipped = common.guarded_step(net, model.optimizers, num_skipped)
        model.num_skipped += num_skipped > 0
        model.ema.update(net)

        done = step + 1
        if done % 100 == 0 or done in (50, args.steps):  # 50: do not wait long for the first line
            common.average_over_ranks([loss_sum])
            mean_loss = loss_sum.item() / (done - printed_steps)
            steps_per_second = (done - printed_steps) / (time.time() - printed_at)
            print_progress(args, model, done, mean_loss, steps_per_second)
            printed_steps = done
            printed_at = time.time()
            loss_sum = torch.zeros_like(loss_sum)
        wants_samples = done % args.sample_every == 0 or done == args.steps
        # Before the samples, because sampling may fail, and what is trained should be safe by then.
        is_due = done % args.save_every == 0 or wants_samples or ctrl_c.signum
        if is_due and done >= kept_steps:
            save(path, done, model, args, outdated)
            outdated = []
        if wants_samples and not ctrl_c.signum:
            show(args, data, model.ema.net, path.with_name(f"samples_{done:06d}.png"), done)
        if ctrl_c.signum:
            remedy = "go on with the same command and --resume"
            if args.overwrite:
                remedy += " in place of --overwrite"
            if done < kept_steps:
                remedy = f"{path} is still the training of {kept_steps} steps"
            print()
            common.say(f"stopped at step {done}; {remedy}")
            raise SystemExit(128 + ctrl_c.signum)  # so that `02 && 03` goes no further


def print_progress(args, model, done, mean_loss, steps_per_second):
    """Print a line and add it to the log: steps done, their mean loss, speed, time left."""
    images_per_second = steps_per_second * args.batch_size
    hours_left = (args.steps - done) / steps_per_second / 3600
    print(
        f"step {done}/{args.steps}  v-loss {mean_loss:.4f}  "
        f"{images_per_second:.0f} images/s  ETA {hours_left:.2f} h"
        + common.skipped_text(model.num_skipped),
        flush=True,
    )
    line = {"step": done, "loss": mean_loss, "images_per_s": images_per_second}
    line["skipped_steps"] = model.num_skipped
    model.log.append(common.json_line(line))


# ---- checkpoints ---------------------------------------------------------------------------------


def save(path, step, model, args, outdated):
    """Save everything a run is made of, so that --resume goes on as if nothing had happened.

    The random state is part of it: data order, noise levels and noise all come from there. So is
    the log. log.jsonl is a copy of it for other programs.

    outdated  files of the training that was in `path`: they never stand beside another one
    """
    if not common.is_first_process():
        return
    with common.whole_file(path.with_name("log.jsonl")) as unfinished:
        unfinished.write_text("".join(model.log))
        # The checkpoint takes its place first, then the log: it is never ahead of its checkpoint.
        common.save_checkpoint(
            path,
            outdated=outdated,
            arch=model.net.arch,
            shape=model.shape,
            model=model.net.state_dict(),
            ema=model.ema.net.state_dict(),
            optimizers=[optimizer.state_dict() for optimizer in model.optimizers],
            step=step,
            skipped_steps=model.num_skipped,
            log=model.log,
            data=[model.data_key],
            rng=torch.get_rng_state(),
            args=vars(args),
            torch=str(torch.__version__),
        )
    if args.without:
        # 04 and 05 name it if the model is damaged. The base is made by a plainer command.
        with common.whole_file(path.with_name("command.txt")) as unfinished:
            unfinished.write_text(f"{args.command}\n", "utf-8")


def resume(path, model, args, train_set):
    """Load a checkpoint into the model and the random generator; return the step to go on with.

    train_set  the Dataset that is there now

    Exits with one line if the checkpoint is missing, or does not fit the network or the flags.
    """
    keys = ("arch", "model", "ema", "optimizers", "step", "rng", "args")
    checkpoint = common.load_checkpoint(path, args.command, keys)
    refuse_other_training(path, args, checkpoint["args"])
    common.restore_training(path, args.command, model, checkpoint)
    model.num_skipped = int(checkpoint.get("skipped_steps", 0))
    model.log = [str(line) for line in checkpoint.get("log", [])]
    if not 0 <= int(checkpoint["step"]) <= args.steps:
        common.exit_with_error(
            f"{path} has done {checkpoint['step']} steps, and --steps is {args.steps}; "
            "give as many or more"
        )
    common.warn_of_other_data(path, checkpoint.get("data"), train_set, args.command)
    if model.log and common.is_first_process():  # a program killed between two moves leaves none
        with common.whole_file(path.with_name("log.jsonl")) as unfinished:
            unfinished.write_text("".join(model.log))
    common.say(f"resumed {path} at step {checkpoint['step']}")
    return int(checkpoint["step"])


# What a training is made of, by name of the flag. All else may differ when it is resumed: how the
# work is split (--grad-accum, --device), what is written when (--save-every), and more --steps.
TRAINING_FLAGS = (
    *("dataset", "without", "sde", "batch_size", "lr", "ema", "log_sigma", "wide", "width"),
    *("seed", "bf16", "quick"),
)


def refuse_other_training(path, args, recorded):
    """Exit with one line if flags are not those of the training that is to be resumed.

    recorded  args of the checkpoint

    The optimizers would go on with the old rates, and the random numbers with the old seed, while
    the checkpoint would say something else.
    """
    if not isinstance(recorded, dict):
        common.exit_with_error(
            f"{path} does not say how it was trained; "
            "begin again with --overwrite instead of --resume"
        )
    differences = common.differing_flags(vars(args), recorded, TRAINING_FLAGS)
    if differences:
        common.exit_with_error(
            f"{path} was trained with other flags: {', '.join(differences)}; "
            "give the same again, or begin again with --overwrite instead of --resume"
        )
    steps = recorded.get("steps")
    if isinstance(steps, int) and args.steps < steps:
        common.exit_with_error(
            f"{path} is a training of {steps} steps, and --steps {args.steps} is less; "
            "give as many or more"
        )


def checkpoint_path(args, forget_names):
    """Return the path of the checkpoint to write, in a folder that exists.

    The Unseen model of --without stands beside the unlearned ones, where 04 looks for it.
    """
    if not args.without:
        return Path(args.out) / args.dataset / "base.pt"
    folder = common.forget_folder(args.out, args.dataset, forget_names)
    run_name = common.run_name(args, usual_values(args), is_scratch=True)
    if args.sde != "any":  # the plain name belongs to 03 --method unseen --from-scratch
        run_name = common.shorten(f"{run_name}-02", 100)
    return common.make_folder(folder / run_name) / "model.pt"


def usual_values(args):
    """Return what the flags of a run like this are if none is given, as a dict."""
    usual = flags().parse_args(["--dataset", args.dataset])
    usual.quick = args.quick
    common.fill_defaults(usual, defaults(usual), QUICK)
    usual.steps = args.steps  # they name no folder: --resume with more of them goes on in its own
    return vars(usual)


def steps_to_keep(args, path, data_key):
    """Return how many steps the training in `path` has that this run begins again; 0 if none.

    data_key  of the training set, see common.data_key

    Until the new one has come as far, the old one stays. Exits with one line if the new one is
    another training, or is to be shorter, or if the file is not of this project or damaged: only
    --overwrite replaces such a file.
    """
    if args.overwrite or args.resume or not path.exists():
        return 0
    content = common.load_checkpoint(path, args.command)
    if args.quick:  # it shows that the code works, and is nothing to keep
        return 0
    known = content.get("args")
    num_steps = content.get("step")
    is_known = isinstance(known, dict) and isinstance(num_steps, int)

    # --resume may go on with data that have moved. A training that begins anew with data of another
    # place is another training.
    differences = ["its flags are not known"]
    if is_known:
        now = {**vars(args), "data": [data_key]}
        # The file of an older version does not say on which images it was trained.
        recorded = {**known, "data": content.get("data", [data_key])}
        names = ("data", "data_dir", *TRAINING_FLAGS)
        differences = common.differing_flags(now, recorded, names)
    if is_known and num_steps > args.steps:
        differences.append(f"--steps was {num_steps} and is now {args.steps}")
    if differences:
        common.exit_with_error(
            f"{path} holds another training ({', '.join(differences)}): go on with that by "
            "--resume, replace it by --overwrite, or choose another --out"
        )
    common.say(f"{path} has {num_steps:,} steps: it stays until this training has come as far")
    return num_steps


# ---- measures and pictures -----------------------------------------------------------------------


@torch.no_grad()
def loss_by_noise(net, x0, edges=(0.001, 0.02, 0.1, 0.5, 2.0, 10.0, 160.0), seed=0):
    """Measure the v-loss |F - F*|^2 in bins of the noise level sigma.

    x0     (B, ...) images on the scale of common.dequantize
    edges  of the bins; every image is looked at once in each bin
    seed   of the noise: the same noise each time, so two results differ by the networks alone

    Returns a list of (low, high, loss).
    """
    bins = []
    generator = common.rng(seed)
    for low, high in zip(edges[:-1], edges[1:]):
        # A level of its own for each image, (B,): from low to high in even steps of ln sigma.
        share_of_bin = (torch.arange(len(x0), device=x0.device) + 0.5) / len(x0)
        sigma = low * (high / low) ** share_of_bin
        z = common.randn(x0.shape, generator, x0.device)
        x_hat = x0 + common.expand_like(sigma, x0) * z  # x_t / s(t)
        _, z_hat = common.predict(net, x_hat, sigma)
        # |F - F*|^2 = |z_hat - z|^2 / cos(phi)^2,  1/cos^2 = 1 + tan^2,  tan(phi) = sigma/sd
        loss = common.flat_mean((z_hat - z) ** 2) * (1 + (sigma / net.sd) ** 2)
        bins.append((low, high, loss.mean().item()))
    return bins


def show(args, data, net, path, step):
    """Print the loss by noise level on held-out images, and save samples as a picture.

    The picture goes to `path`. Its last row shows real images.
    """
    bins = loss_by_noise(net, data.held_out)
    cells = [f"sigma {low:g}-{high:g}: {loss:.3f}" for low, high, loss in bins]
    print("loss by noise, held out: " + "  ".join(cells))

    num_samples = 10 if args.quick else 50
    samples = common.sample_images(
        net,
        num_samples,
        data.test_g.shape[1:],
        common.TRAINING_SDE,
        args.seed,  # the same noise at each step: only the network changes from grid to grid
        batch=num_samples,
        device=args.device,
        bf16=args.bf16,
    )
    title = f"step {step} (last row: real)"
    common.draw_picture(path, image_grid, samples, title=title, real=data.test_g)


def image_grid(path, images, columns=10, title=None, real=None):
    """Save bytes (N, C, H, W) as one picture, `columns` of them in a row.

    real  None, or bytes (M, C, H, W): the first `columns` of them become a row below a white gap
    """
    plt = common.pyplot()
    pixels = common.tile(images, columns)  # (N, C, H, W) -> (rows*H, columns*W, 3)
    if real is not None:
        gap = np.full((4, *pixels.shape[1:]), 255, np.uint8)
        pixels = np.concatenate([pixels, gap, common.tile(real[:columns], columns)])

    title_height = 0.3 if title else 0  # in inches, and the figure is 6 inches wide
    height = 6 * pixels.shape[0] / pixels.shape[1] + title_height
    fig, ax = plt.subplots(figsize=(6, height))
    ax.imshow(pixels)
    ax.axis("off")
    if title:
        ax.set_title(title, fontsize=9)
    common.save_figure(fig, path, dpi=110, bbox_inches="tight", pad_inches=0.05)


def measure_base(args):
    """Print how good the Standard model is (--measure), and write it into measure.json.

    FD is the Frechet distance to the training images. The judge is unsure of a sample when it is
    less than 80 % sure. Real test images get the same measures, as many as there are samples: that
    is the best that a model can hope for at this n. It is args.n, or all test images if these are
    fewer.
    """
    path, command = common.find_base(args)  # command: what makes it, for an error
    train_set, test_set = common.load_train_and_test(
        args.dataset, args.data_dir, args.without, common.cache_folders(args)
    )
    shape = train_set.images.shape[1:]
    net = common.load_net(path, command, args.device, shape)
    result_path = Path(args.out) / args.dataset / "measure.json"
    n = min(args.n, len(test_set.images))
    settings = {"n": n, **{name: getattr(args, name) for name in ("seed", "bf16", "without")}}
    settings |= {"base": common.weights_digest(net), "data": common.data_key(train_set)}
    common.refuse_unwritable(result_path)
    common.refuse_other_result(args, result_path, settings)
    judge = common.load_judge(args, train_set, args.without or ())
    real_images = common.reference_images(train_set.images, args.quick)
    real = common.judge_images(judge, real_images)
    sde = common.VP()  # as 03 and 04 sample, unless told otherwise
    image_sets = {
        "model": common.sample_images(
            net, n, shape, sde, args.seed, device=args.device, bf16=args.bf16
        ),
        "real": common.random_subset(test_set.images, n, args.seed),
    }

    common.say(f"{path}, n = {n}, {sde.sampler}")
    rows = {}
    print(f"{'':9}FD       judge unsure, %")
    for name, images in image_sets.items():
        verdict = common.judge_images(judge, images)
        # The empty list: nothing is to be forgotten, so the distance is that of all samples.
        row = rows[name] = common.measure(verdict, [], real, len(train_set.classes))
        print(
            f"{name:8}{row['fd']:7.3f}  {row['low_confidence']:6.2f}     "
            f"classes {row['class_counts']}"
        )
    common.write_json(result_path, {**settings, "sampler": sde.sampler, "nfe": sde.nfe, **rows})
    common.say(f"wrote {result_path}")


# ---- the story -----------------------------------------------------------------------------------


def next_step(args, classes):
    """Return the command to try next: 03 on what was left out, or else on the last class."""
    if len(classes) == 1 and args.dataset == "folder":
        return "03 forgets one class of several, and these pictures have only one"
    base, base_command = common.find_base(args)
    if not base.exists():  # an Unseen model of data without a Standard one, which 03 begins with
        return base_command
    forget = args.without or classes[-1:]
    if args.dataset == "celeba" and not args.without:
        forget = ["bangs"]  # its only class is "other", until attributes are named
    flags = ["--forget", *forget]
    if args.sde != "any":  # the model knows the noise of one SDE only
        flags += ["--sde", args.sde]
    return common.command_line("03_unlearn.py", args, *flags)


def remake_command(argv):
    """Return the command that makes the same checkpoint again from the first step on."""
    same = common.leave_out(argv, "--resume", "--overwrite")
    return common.own_command("02_train_sde.py", same, "--overwrite")


def main(argv=None):
    """Train the Standard model, or the judge, or measure the model that is there."""
    args = arguments(argv)
    if args.judge:
        # --without names the attributes that a judge of CelebA has to tell apart.
        common.train_judge(args, args.without or (), args.seed, args.overwrite)
        return
    if args.measure:
        measure_base(args)
        return
    print("args:", common.json_line(vars(args)), end="")

    # ---- data: one tensor of bytes, on the GPU if there is one
    train_set, test_set = common.load_train_and_test(
        args.dataset, args.data_dir, args.without, common.cache_folders(args)
    )
    data = split_data(args, train_set, test_set)
    if args.without:
        # The checkpoint holds args. With these two it says what one of 03 says, and 04 can read it.
        args.method = "unseen"
        args.forget = data.forget_names
    path = checkpoint_path(args, data.forget_names)
    args.command = remake_command(argv)
    common.refuse_unwritable(path, path.with_name("log.jsonl"), path.with_name("command.txt"))

    with common.locked(path):  # two trainings must not write one file in turns
        data_key = common.data_key(train_set)
        kept_steps = steps_to_keep(args, path, data_key)

        # ---- model: from scratch
        model = make_model(args, data.images.shape[1:])
        model.data_key = data_key
        first_step = resume(path, model, args, train_set) if args.resume else 0

        # ---- loop
        with common.CtrlC() as ctrl_c:
            train(args, data, model, path, first_step, kept_steps, ctrl_c)

    # ---- outputs: all written by now
    if first_step == args.steps:
        common.say(f"nothing was left to do: {path} has all its {args.steps} steps")
    else:
        common.refuse_skipped(model.num_skipped, args.steps)
        common.say(f"wrote {path}; next: {next_step(args, train_set.classes)}")


if __name__ == "__main__":
    common.run(main)
