"""03  Unlearn: teach the Standard model of 02 to stop drawing some classes and to keep the others.

    python 03_unlearn.py --dataset mnist --forget 3                # 4 minutes on 2 CPU cores
    python 03_unlearn.py --dataset mnist --forget 3 7 --sde ve     # two classes, another noise
    python 03_unlearn.py --dataset mnist --forget 3 --until 0.5    # half a percent of samples
    python 03_unlearn.py --dataset mnist --forget 3 --steps 260    # a fixed length and strength
    python 03_unlearn.py --dataset mnist --forget 3 --method obt   # or ort: the paper's, 12 minutes
    python 03_unlearn.py --dataset mnist --forget 3 --method siss  # or unseen, erasediff, ascent
    python 03_unlearn.py --dataset mnist --forget 3 --method obt --from-scratch
    python 03_unlearn.py --dataset mnist --forget 3 --resume       # go on after Ctrl-C or a crash
    python 03_unlearn.py --dataset mnist --forget 3 --redraw       # only the pictures, once more
    python 03_unlearn.py --dataset cifar10 --forget dog            # a GPU and a base of 02 needed
    python 03_unlearn.py --dataset celeba --forget bangs           # one of 40 attributes

Question: how do you take away one class from a model that has no notion of classes?
Answer:   minimise  alpha L_g + (1 - alpha) L_f,  with a weight alpha between 0 and 1. L_g is score
          matching on D_g, the data to keep. L_f turns the score on D_f, the data to forget, away
          from the direction of D_f: to a right angle (ort), to an obtuse one (obt), or to one that
          is obtuse only to what sets D_f apart from the rest (obt-rel, ours).

Changes from 02: two data sets instead of one, two losses instead of one, and the start is a trained
model. `grep "<-- 03" 03_unlearn.py` lists the places. `diff 02_train_sde.py 03_unlearn.py` shows
what they replace in 02; what is not marked there concerns flags, files, measures and pictures.

How long, and how hard? With --until, the default of obt-rel, nobody has to know. Now and then the
run looks at its own samples. It pushes harder while too many of them show what is to be forgotten,
and less where a kept class suffers; then L_g also sees more images of that class, and the learning
rate falls. It ends when UR is at most half of the share asked for. See `steer` and `protect`.

With MNIST there is nothing to download. All noise processes (--sde) start from the same checkpoint.
siss, erasediff, ascent and unseen are baselines. --from-scratch starts from random weights and
minimises both losses from the first step on. An attribute of CelebA can also be forgotten by its
absence: not_bangs.

Writes out/<dataset>/forget-<names>/<method>-<sde>[-<flag><value>...][-scratch][-s<seed>]/, where a
flag is named if it was given and changes the model: model.pt, result.json, log.jsonl, curves.png,
before_after.png, with --animate flow.gif. Expect with --forget 3: UR about 0.7 %. A run with
--until that does not come to its wish says what stood in the way ("not reached"), and ends with
status 1; its best state is saved. A run that made things worse ends with status 1 too, and goes
into a folder of its own, <name>-worse. Worse means more of what was to be forgotten than before,
half of the samples rubbish, or another class gone. A finished run of other settings, such as --n,
is replaced only with --overwrite. A run that was stopped has left <name>.resume.pt beside its
folder. --resume goes on from there, to the same weights as if nothing had happened.

Predict, then run:
  1. Which digits pay for the forgetting of 3?            (class_counts in result.json)
  2. What happens with --alpha 0.3?  And with --method obt --alpha 0.3?
  3. With --method ort, what takes the place of the 3s?   (look at before_after.png)
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    # The imports take seconds. Until common.run listens, Ctrl-C ends the program without a word.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import copy
import json
import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import common

# Each method with its own defaults, by name of the flag. They are where to start on MNIST. The
# weights that a search found are in docs/results.md, "Every method on a common footing".
METHODS = {  # <-- 03
    # kappa says the same as alpha, but it does not depend on how much is forgotten: see set_alpha.
    # Strength and rate are those of a run with --steps: for --until see UNTIL_LR and first_kappa.
    "obt-rel": {"kappa": 2.8, "lr": 1e-3, "retain": "distill", "until": 1.0},
    # The paper's two, with its noise levels and with the time that they need there.
    "obt": {"alpha": 0.9, "lr": 1e-3, "uniform_t": True, "steps": 1500},
    "ort": {"alpha": 0.95, "lr": 1e-3, "uniform_t": True, "steps": 1500, "ort": "elementwise"},
    # No L_f: how much a model forgets that only goes on without D_f.
    "unseen": {"lr": 3e-4},
    "ascent": {"alpha": 0.9, "lr": 3e-4},
    # This and the next weigh the gradients of L_g and L_f, not the losses: see weigh_gradients.
    "erasediff": {"eta": 1e-3, "lr": 3e-4},
    # One noise level serves both losses here, and L_g needs all of them: hence uniform times.
    "siss": {"c": 0.003, "lr": 1e-3, "uniform_t": True},
}

# The methods in which L_f draws noise levels of its own, apart from those of L_g.
TWO_LOSSES = ("obt-rel", "obt", "ort", "ascent", "erasediff")

# Flags that only some methods have: name of the flag -> those methods.
BELONGS_TO = {
    "alpha": ("ort", "obt", "obt-rel", "ascent", "erasediff"),
    "kappa": ("obt-rel",),
    "eta": ("erasediff",),
    "c": ("siss",),
    "ort": ("ort",),
    "no_floor": ("obt",),
    "forget_every": TWO_LOSSES,
    "retain": TWO_LOSSES,
    "uniform_t": TWO_LOSSES,
    "log_sigma": TWO_LOSSES,
}

# ---- arguments -----------------------------------------------------------------------------------

MAX_STEPS = 1000  # of a run with --until
# Its learning rate with obt-rel on MNIST. A gentle push at a high rate comes to the same UR as a
# hard push at a low rate, and it leaves more of the kept classes. But a Standard model that was
# trained less breaks down at this rate (tests/shapes.py): other data sets have that of METHODS.
UNTIL_LR = 3e-3
# The defaults that differ under --quick.
QUICK = {"steps": 5, "max_steps": 5, "batch_size": 16, "n": 40, "nfe": 4}


def arguments(argv):
    """Read the command line: refuse what makes no sense and fill in what the user has left open."""
    args = flags().parse_args(argv)
    refuse(args)
    return common.finish_args(args, defaults(args), quick_defaults(args))


def flags():
    """Return a parser of this script's flags and of those that all scripts share."""
    helps = {
        "--steps": "train for so many steps (default: --until for obt-rel, 3000 with "
        "--from-scratch, 1500 for ort and obt, else 260 for mnist, see common.RECIPES)",
        "--batch-size": "images a step, of D_g and of D_f each (default: 64)",
        "--lr": "peak learning rate of Adam (default: 0.003 for obt-rel on MNIST with --until, "
        "else 0.001 for it, ort, obt and siss, 0.0003 for others; 0.008 with --from-scratch)",
        "--overwrite": common.OVERWRITE_OR_RESUME,
    }
    p = common.parser(__doc__, helps=helps)
    common.add_forget(p, "03_unlearn.py", "to forget")  # <-- 03
    p.add_argument(  # <-- 03
        "--method",
        choices=list(METHODS),
        default="obt-rel",
        help="ort and obt are the paper's, obt-rel is ours, the others are baselines",
    )
    p.add_argument(
        "--sde",
        choices=list(common.SDES),
        default="vp",
        help="noise of D_g in training, of D_f too with --uniform-t, and where sampling starts",
    )
    p.add_argument(  # <-- 03
        "--from-scratch",
        action="store_true",
        help="start from random weights, not from the Standard model",
    )
    add_length(p)  # <-- 03
    add_weights(p)  # <-- 03
    p.add_argument(
        "--log-sigma",
        type=common.number(float, -10, 10),
        nargs=2,
        help="noise of D_f: mean and std of ln sigma (default: 0 0.7)",
    )
    p.add_argument(
        "--retain",
        choices=("dsm", "distill"),
        help="L_g: score matching, the paper's, or ours, see common.distill_loss (default: distill "
        "for obt-rel, dsm for others)",
    )
    p.add_argument(
        "--uniform-t",
        action=argparse.BooleanOptionalAction,
        help="noise of D_f: the paper's t ~ U(0, 1) instead (default: for ort, obt and siss, "
        "without --log-sigma)",
    )
    p.add_argument(
        "--ema",
        type=common.number(float, 0, 0.99999),
        help="decay of the weight average (default: 0.98; 0.999 with --from-scratch)",
    )
    p.add_argument(
        "--n",
        type=common.number(int, 10, 10**6),
        help="samples for the measures, before and after each (default: 2000)",
    )
    p.add_argument(
        "--nfe",
        type=common.number(int, 2, 10**4),
        help="network evaluations a sample (default: 20; 50 with --sde ddpm)",
    )
    p.add_argument("--resume", action="store_true", help="go on with a run that was stopped")
    p.add_argument(
        "--redraw",
        nargs="?",
        const="",
        metavar="FOLDER",
        help="only draw the pictures of a finished run again (default: the run of the other flags)",
    )
    p.add_argument(
        "--animate",
        action="store_true",
        help="also flow.gif: the same noise as it becomes images, before and after",
    )
    return p


def add_length(p):  # <-- 03
    """Add the flags of a run that ends when it has forgotten, in place of --steps."""
    p.add_argument(
        "--until",
        type=common.number(float, 0.01, 100),
        metavar="PCT",
        help="train until at most PCT %% of the samples show what is to be forgotten "
        "(default: 1 for obt-rel without --steps; others have --steps)",
    )
    p.add_argument(
        "--max-steps",
        type=common.number(int, 1),
        help=f"--until: so many training steps at most (default: {MAX_STEPS})",
    )


def add_weights(p):  # <-- 03
    """Add the flags that say how hard each method pushes, and which of two forms Ort has."""
    p.add_argument(
        "--alpha",
        type=common.number(float, 0, 1),
        help="weight of L_g; L_f has 1 - alpha (default: 0.9 for obt and ascent, 0.95 for ort; "
        "obt-rel and erasediff have --kappa and --eta)",
    )
    p.add_argument(
        "--kappa",
        type=common.number(float, 0, 1000),
        help="obt-rel: the same weight, relative to the sizes of D_g and D_f (default: --until "
        "changes it on the way; with --steps 2.8, with --sde subvp 2.4, with ve 1.8)",
    )
    p.add_argument(
        "--eta",
        type=common.number(float, 0, 1000),
        help="erasediff: how fast each step must lower L_f; "
        "--alpha instead: the constant weight (1 - alpha)/alpha (default: 0.001)",
    )
    p.add_argument(
        "--c",
        type=common.number(float, 0, 1000),
        help="siss: length of the forget gradient; the paper's 5 is for losses summed over pixels "
        "(default: 0.003)",
    )
    p.add_argument(
        "--ort",
        choices=("elementwise", "inner"),
        help="the two readings of Ort, see common.ort_loss (default: elementwise)",
    )
    # None without the flag, as for those above: False would look like a choice.
    p.add_argument(
        "--no-floor",
        action="store_const",
        const=True,
        help="obt: the paper's inner product without our lower bound, see common.obt_loss",
    )
    p.add_argument(
        "--forget-every",
        type=common.number(int, 1),
        metavar="K",
        help="L_f at every K-th step alone, the others minimise alpha L_g; the paper's code has 4 "
        "(default: 1)",
    )


def refuse(args):
    """Exit with one line if flags do not fit together."""
    common.refuse_log_sigma(args.log_sigma)
    refuse_from_scratch(args)
    refuse_until(args)
    # EraseDiff with --alpha has a constant weight, which needs no gradients.
    weighs_gradients = args.method in ("erasediff", "siss") and args.alpha is None
    if weighs_gradients and (args.grad_accum > 1 or args.compile):
        common.exit_with_error(
            f"--method {args.method} weighs the gradients of a whole batch by hand: "
            "leave out --grad-accum and --compile"
        )

    common.refuse_other_methods(args, BELONGS_TO)
    common.refuse_resume_and_overwrite(args)
    if args.redraw is not None and (args.resume or args.overwrite):
        common.exit_with_error("--redraw trains nothing: leave out --resume and --overwrite")
    if args.alpha is not None and args.kappa is not None:
        refuse_both("--alpha", "--kappa")
    if args.alpha is not None and args.eta is not None:
        refuse_both("--alpha", "--eta")
    # --no-uniform-t may stand beside --log-sigma: it asks for the times that --log-sigma describes.
    if args.uniform_t and args.log_sigma is not None:
        refuse_both("--uniform-t", "--log-sigma")


def refuse_until(args):
    """Exit if flags that say how long a run lasts contradict each other."""
    if args.until is not None and args.steps is not None:
        common.exit_with_error(
            "--until trains as long as it takes and --steps for a fixed length: "
            "give one of them, or --until with --max-steps"
        )
    if args.max_steps is not None and not ends_by_itself(args):
        common.exit_with_error("--max-steps has no part in a run without --until; leave it out")
    if args.until is not None and args.from_scratch:
        common.exit_with_error(
            "--until starts from a Standard model: leave out --from-scratch, or take --steps"
        )


def refuse_from_scratch(args):
    """Exit if --from-scratch is given together with something that needs a Standard model."""
    if args.from_scratch and args.method == "obt-rel":
        common.exit_with_error(
            "--method obt-rel compares with a Standard model by construction: "
            "leave out --from-scratch, or take --method ort | obt"
        )
    if args.from_scratch and args.retain == "distill":
        common.exit_with_error(
            "--retain distill keeps what a Standard model says: "
            "leave out --from-scratch, or take --retain dsm"
        )


def refuse_both(flag, other):
    """Exit because two flags were given that set the same thing."""
    common.exit_with_error(f"{flag} and {other} set the same: give one of them")


def defaults(args):
    """Return the values of the flags that the user has left open, as a dict."""
    values = {"n": 2000, "nfe": common.SDES[args.sde].nfe, "ema": 0.98}
    # A recipe is what we know about training on one data set: here steps and batch.
    values.update(common.recipe(args.dataset)["unlearn"])
    values.update(retain="dsm", log_sigma=(0.0, 0.7), uniform_t=False, forget_every=1)
    values.update(METHODS[args.method])  # last: a method may replace what stands above
    values["max_steps"] = MAX_STEPS
    if args.log_sigma is not None:
        values["uniform_t"] = False

    if args.method == "obt-rel":
        values["kappa"] = usual_kappa(args.sde)
        if ends_by_itself(args) and args.dataset == "mnist":
            values["lr"] = UNTIL_LR
    if args.alpha is not None:  # alpha takes the place of either
        values.pop("kappa", None)
        values.pop("eta", None)
    if args.from_scratch:  # a training like that of 02, but shorter
        values.update(steps=3000, lr=8e-3, ema=0.999)
    # Either the length is fixed, or the result: then length and strength follow from it.
    superfluous = ("steps", "kappa") if ends_by_itself(args) else ("until", "max_steps")
    return {name: value for name, value in values.items() if name not in superfluous}


def usual_kappa(sde):
    """Return the kappa of a run with --steps, for the name of an SDE."""
    # Classes are decided near sigma = 1. L_f has most of its images there; L_g, whose t is uniform,
    # has only 1/3 (vp), 1/4 (subvp) or 1/5 (ve) as many. The fewer it has, the harder the same
    # kappa pushes.
    return {"ve": 1.8, "subvp": 2.4}.get(sde, METHODS["obt-rel"]["kappa"])


def ends_by_itself(args):
    """Return whether a run has --until, given or by default."""
    return args.steps is None and (args.until or METHODS[args.method].get("until")) is not None


def quick_defaults(args):
    """Return those defaults of --quick that have a part in this run."""
    full = defaults(args)
    return {name: value for name, value in QUICK.items() if name in full}


# ---- data and model ------------------------------------------------------------------------------


@dataclass
class Data:
    """The images of a run: all of them in one tensor of bytes, and the indices of each set."""

    images: torch.Tensor  # (N, C, H, W) uint8, all training images, on the device
    index_g: torch.Tensor  # (N_g,) indices of D_g, the images to keep
    index_f: torch.Tensor  # (N_f,) indices of D_f, the images to forget  # <-- 03
    labels_g: torch.Tensor  # (N_g,) the classes of D_g  # <-- 03
    test_g: torch.Tensor  # (n, C, H, W) uint8, all test images of D_g
    forget_classes: list  # indices of the classes to forget
    forget_names: list  # their names
    class_names: list  # names of all classes
    part_size: int  # B: `draw` draws so many, a batch or a part of one that is done at once
    flip: bool  # whether it mirrors a random half of them: a mirror image is then as good

    def draw(self, index):
        """Draw a random batch of the images with these indices (M,): (B, C, H, W), dequantised.

        A byte k becomes the real number (k + u)/128 - 1 with u ~ U(0, 1): bytes have no density.
        """
        return common.draw_batch(self.images, index, self.part_size, self.flip, self.images.device)


def split_data(args, train_set, test_set):
    """Find D_g and D_f in the training set, and D_g in the test set; return a Data."""
    is_forgotten, forget_classes = common.split_forget(train_set, args.forget)
    test_forgotten, _ = common.split_forget(test_set, args.forget)
    index_g = torch.where(~is_forgotten)[0]
    index_f = torch.where(is_forgotten)[0]  # <-- 03
    data = Data(
        images=train_set.images.to(args.device),  # bytes: a quarter of the memory of floats
        index_g=index_g.to(args.device),
        index_f=index_f.to(args.device),  # <-- 03
        labels_g=train_set.labels[index_g].to(args.device),  # <-- 03
        test_g=test_set.images[~test_forgotten],
        forget_classes=forget_classes,
        forget_names=[train_set.classes[i] for i in forget_classes],
        class_names=train_set.classes,
        part_size=common.part_size(args),
        flip=common.RECIPES[args.dataset]["flip"],
    )

    forgotten = [f"class {i} '{train_set.classes[i]}'" for i in forget_classes]
    common.say(
        f"forgetting {', '.join(forgotten)}: {len(index_f):,} images; keeping {len(index_g):,}"
    )
    return data


def set_alpha(args, data):  # <-- 03
    """Turn --kappa of obt-rel into alpha, now that the sizes of D_g and D_f are known."""
    if args.method == "obt-rel":
        print("obt-rel: ours, not the paper's; the paper's: --method ort | obt")
    if args.kappa is not None:
        args.alpha = alpha_of(args.kappa, data)


def alpha_of(kappa, data):  # <-- 03
    """Return the alpha of obt-rel that pushes with the strength kappa."""
    # With score matching as L_g the optimum is  s_g + kappa p(D_f | x_t) (s_g - s_f): the exact
    # score s_g of D_g, pushed away from s_f of D_f. Let pi_g and pi_f be the shares of D_g and
    # D_f in the data; then
    #     kappa = (1 - alpha) pi_g / (2 alpha pi_f),  hence  alpha = 1 / (1 + 2 kappa pi_f/pi_g)
    ratio = len(data.index_f) / len(data.index_g)  # pi_f / pi_g
    return 1 / (1 + 2 * kappa * ratio)


@dataclass
class Course:  # <-- 03
    """How a run with --until has gone so far."""

    kappa: float | None = None  # how hard obt-rel pushes now; None: as hard as a flag says
    shares: list | None = None  # how often L_g sees each class, see protect; None: as it comes
    looks: list = field(default_factory=list)  # what was seen so far, see look
    history: list = field(default_factory=list)  # a dict for each step with looks, see pool
    best: dict | None = None  # the state that is nearest to the wish: step, kappa, cost, weights
    has_ended: bool = False  # because it has come to its wish
    seconds: float = 0.0  # that the looks have taken


@dataclass
class Model:
    """A network and what trains it."""

    net: common.UNet  # the weights that are trained
    base: common.UNet | None  # the Standard model, which stays as it is, or None  # <-- 03
    ema: common.EMA  # the average of net over the last steps; samples are drawn from it
    optimizers: list  # each moves some of the weights
    sde: common.SDE  # the noise that images get in training, and that samples start from
    shape: tuple  # (C, H, W) of the images
    losses: list = field(default_factory=list)  # (2,) of each step so far: L_g and L_f
    skipped: list = field(default_factory=list)  # steps left out: their gradient was not finite
    made_from: dict = field(default_factory=dict)  # see find_sources
    course: Course = field(default_factory=Course)  # of a run with --until  # <-- 03
    seconds_trained: float = 0.0
    start: float = field(default_factory=time.time)  # of the run; --resume sets it back


def find_sources(base, train_set):
    """Return what a run is made from besides its flags: {"base": ..., "data": ...}.

    Both are names of a content: of the Standard model `base`, or None without one, and of the
    training Dataset.
    """
    digest = common.weights_digest(base) if base is not None else None
    return {"base": digest, "data": common.data_key(train_set)}


def make_model(args, base, shape, made_from, start):
    """Make a network for images of shape (C, H, W), and what trains it: a Model.

    base       the Standard model, or None
    made_from  what find_sources returns
    start      when the run began, in seconds

    The network starts as a copy of the Standard model, or with random weights (--from-scratch).
    """
    print_settings(args, base)
    net = copy_or_fresh(args, base).to(args.device)  # <-- 03
    print(f"model: {common.describe_network(net, shape)}")

    if args.from_scratch:
        optimizers = common.muon_and_adam(net, args.lr)
    else:
        # With 0.99 Adam averages the squared gradients over about 100 steps. PyTorch's 0.999 would
        # take 1000, and a run has only a few hundred.
        adam = torch.optim.Adam(net.parameters(), args.lr, betas=(0.9, 0.99), fused=True)  # <-- 03
        optimizers = [adam]
    model = Model(
        net=net,
        base=base,  # <-- 03
        ema=common.EMA(net, args.ema),
        optimizers=optimizers,
        sde=common.SDES[args.sde](),
        shape=tuple(shape),
        made_from=made_from,
        course=Course(first_kappa(args)),  # <-- 03
        start=start,
    )
    if args.compile:
        net.compile()  # last: describe_network and EMA need the network as it is without that
    return model


def load_base(args, shape):  # <-- 03
    """Load the Standard model of 02 for images of shape (C, H, W).

    It returns None if there is none and none is needed.

    Unlearning starts from it. obt-rel and --retain distill also compare with it in each step. With
    --from-scratch it is only sampled from, for the "before" of the pictures and measures.
    """
    path, command = common.find_base(args)
    is_missing = not os.path.lexists(path)  # whoever reads a link to nothing says so
    if is_missing and not args.from_scratch:
        common.exit_with_error(
            f"{path} not found (--from-scratch --method ort | obt does without it); "
            f"make it with: {command}"
        )
    if is_missing:
        return None
    return common.load_net(path, command, args.device, shape)


def warn_of_base(args, model, train_set):  # <-- 03
    """Print a line if the Standard model was trained on other images than `train_set`."""
    if model.base is not None:
        path, command = common.find_base(args)
        common.warn_of_other_data(path, model.base.made_of, train_set, command)


def print_settings(args, base):
    """Print which file the Standard model `base` is from, if there is one, and the settings."""
    path, _ = common.find_base(args)
    settings = []
    for name in ("steps", "until", "max_steps", "lr", "alpha", "kappa", "eta", "c"):
        value = getattr(args, name)
        if value is not None:
            settings.append(f"{name} {value:.4g}")
    source = path if base is not None else "none"
    scratch = ", from scratch" if args.from_scratch else ""
    common.say(
        f"base: {source}; sde {args.sde}, method {args.method}{scratch}; {'  '.join(settings)}"
    )


def copy_or_fresh(args, base):  # <-- 03
    """Return the network to train: a copy of `base`, or one like it with random weights."""
    if not args.from_scratch:
        return copy.deepcopy(base)  # a copy: base itself has to stay what it was
    recipe = common.RECIPES[args.dataset]
    # The arguments of UNet. sd is the standard deviation of the pixels on the scale [-1, 1].
    arch = {**recipe["net"], "sd": recipe["sd"]} if base is None else dict(base.arch)
    if args.quick:
        arch["width"] = 32  # narrow, hence fast; a copy of base cannot be made narrower
    return common.UNet(**arch)


# ---- the losses ----------------------------------------------------------------------------------
#
# t is a time between 0 (data) and 1 (noise). An image x0 gets the noise z ~ N(0, I):
#     x_t = s(t) x0 + std(t) z,      sigma = std(t) / s(t), the noise level
# The network estimates z, and its estimate is z_hat. The score of the model is -z_hat / std(t).
# On average it should be -z / std(t).
# So the angle between z_hat and z is the angle between the two scores.  # <-- 03
#
# The network does not return z_hat itself but F, from which z_hat follows. F* is what F should be:
#     z_hat - z = -cos(phi) (F - F*),   tan(phi) = sigma / sd,  see "The circle" in common.py
# Here sd is the standard deviation of the data. A loss, and each |...|^2, is a mean over the D
# numbers of an image.
# So is a . b, the mean of a o b, where o multiplies number by number.  # <-- 03


def forget_times(args, sde, n):  # <-- 03
    """Draw random noise levels for n images of D_f, as times t (n,)."""
    # Push where the class is decided, near sigma = 1. At higher noise all images look alike. At
    # lower noise only details are still open, such as the edge of a stroke.
    if args.uniform_t:
        return common.uniform_t(n, sde, args.device)  # the paper's choice
    mean, std = args.log_sigma
    return common.lognormal_t(n, sde, mean, std, device=args.device)


def retain_loss(args, net, base, sde, x_g):  # <-- 03
    """Return L_g of each image of a batch x_g (B, C, H, W) of D_g: (B,)."""
    if args.from_scratch:
        # A random network has all noise levels to learn. It gets those of 02, and 02's loss:
        #     L_g = |F - F*|^2 = |z_hat - z|^2 / cos(phi)^2
        t = common.lognormal_t(len(x_g), sde, **common.TRAINING_NOISE, device=args.device)
        return common.dsm_loss(net, sde, x_g, t, weight="v")
    t = common.uniform_t(len(x_g), sde, args.device)
    if args.retain == "distill":
        # L_g = |z_hat - z_hat_base|^2, where z_hat_base is the Standard model's estimate. That has
        # far less chance in it than z, and so has the gradient. But it keeps the score of all data,
        # D_f included, and not the score of D_g.
        return common.distill_loss(net, base, sde, x_g, t)
    # L_g = |z_hat - z|^2 = std^2 |score - score*|^2  with score* = -z / std: the paper's L_g, which
    # is eq. 7 of Song et al. 2021.
    return common.dsm_loss(net, sde, x_g, t)


def forget_loss(args, net, base, sde, x_f):  # <-- 03
    """Return L_f of each image of a batch x_f (B, C, H, W) of D_f: (B,).

    SISS is not here, because it needs images of both sets at once: see `objective`.
    """
    if args.method == "unseen":
        return torch.zeros(len(x_f), device=x_f.device)
    t = forget_times(args, sde, len(x_f))
    if args.method == "ort":
        # L_f = |z_hat o z|^2, as in the authors' code. Only z_hat = 0 makes that 0, so it shrinks
        # the score. With --ort inner it is D (z_hat . z)^2, which is 0 at every right angle.
        return common.ort_loss(net, sde, x_f, t, inner=args.ort == "inner")
    if args.method == "obt":
        # L_f = max(z_hat . z, -2). For the exact score z_hat . z is 1 - |z_hat - z|^2 on average,
        # which lies between 0 and 1. Below 0 the angle is obtuse. z_hat . z itself has no minimum,
        # so z_hat would grow without end: an image at or below -2 gets no gradient.
        if args.no_floor:
            return common.obt_loss(net, sde, x_f, t, floor=None)
        return common.obt_loss(net, sde, x_f, t)
    if args.method == "obt-rel":
        # L_f = z_hat . (z - z_hat_base). On average over D_f the bracket is what tells D_f from the
        # rest:  E[z | x_t, D_f] - z_hat_base = -std grad log p(D_f | x_t).
        # So L_f turns z_hat away from that, and leaves alone what all images share.
        return common.obt_rel_loss(net, base, sde, x_f, t)
    if args.method == "ascent":
        return ascent_loss(net, sde, x_f, t)
    return erasediff_loss(net, sde, x_f, t)


def objective(args, net, base, sde, x_g, x_f):  # <-- 03
    """Return the loss to step on, and L_g and L_f to look at: three numbers.

    x_g and x_f are batches of D_g and of D_f, both (B, C, H, W). `base` is the Standard model. Only
    obt-rel and --retain distill ask it. In a step without L_f (--forget-every) x_f is None, and L_f
    is nan.
    """
    with common.autocast(args.device, args.bf16):  # bfloat16 on a GPU
        if args.method == "siss":
            # One x_t serves both losses, so both are computed at once.
            t = forget_times(args, sde, len(x_f))
            losses_g, losses_f = siss_losses(net, sde, x_g, x_f, t)  # (B,), (B,)
        else:
            losses_g = retain_loss(args, net, base, sde, x_g)  # (B,)
            losses_f = torch.full_like(losses_g, math.nan)  # no L_f, which is not an L_f of 0
            if x_f is not None:
                losses_f = forget_loss(args, net, base, sde, x_f)  # (B,)
    loss_g = losses_g.mean()
    loss_f = losses_f.mean()

    weighs_gradients = args.method in ("siss", "erasediff") and args.alpha is None
    if x_f is None:
        # As the paper's released code has it: L_g keeps its weight.
        loss = loss_g if args.alpha is None else args.alpha * loss_g
    elif weighs_gradients:
        loss = weigh_gradients(args, net, loss_g, loss_f)
    elif args.method == "unseen":
        loss = loss_g
    else:
        # The paper's objective:  L = alpha L_g + (1 - alpha) L_f. Its released code has alpha = .99
        # and adds L_f at every fourth step alone (--forget-every 4): on average L_f weighs 1/396 of
        # L_g there.
        loss = args.alpha * loss_g + (1 - args.alpha) * loss_f
    return loss, loss_g, loss_f


# ---- the baselines' losses -----------------------------------------------------------------------


def ascent_loss(net, sde, x0, t, cap=2.0):  # <-- 03
    """Return L_f of gradient ascent (B,): minus the score matching loss on D_f, with a cap.

    x0   (B, ...) images of D_f
    t    (B,) their times
    cap  the largest score matching loss that counts for an image; math.inf: no cap

    The unlearning literature calls this NegGrad. Without the cap alpha L_g + (1 - alpha) L_f is,
    up to a factor, the loss on D_g minus w times the loss on D_f, with w = (1 - alpha)/alpha. With
    p_g and p_f the densities of D_g and D_f, its optimum is the score of (p_g - w p_f)/(1 - w). If
    w is too large, that is below 0 somewhere and no density. Then there is no optimum: hence the
    cap.
    """
    # z_hat = 0 has a loss of 1, and 2 is twice that. An image at the cap has no gradient any more.
    return -common.dsm_loss(net, sde, x0, t).clamp(max=cap)


def erasediff_loss(net, sde, x0, t):  # <-- 03
    """Return L_f of EraseDiff (Wu et al., CVPR 2025): on D_f the network shall answer nonsense.

    x0  (B, ...) images of D_f
    t   (B,) their times

    The loss is |z_hat - u|^2 for each image, (B,), with u ~ U(0, 1) drawn afresh. Four versions are
    in circulation. This is the one for models without classes. The code of SISS has it, and the
    released code of the paper: Gaussian noise makes x_t, and u has nothing to do with that noise.
    The first code of EraseDiff makes x_t with u itself. Its newest version is another one still:
    the target is what the network says for another class, which needs a model with classes.
    """
    _, _, z_hat = common.noised(net, sde, x0, t)
    u = torch.rand_like(x0)  # nobody can predict u, so its mean is learned: a constant 1/2
    return common.flat_mean((z_hat - u) ** 2)


def siss_losses(net, sde, x_g, x_f, t, mix=0.5):  # <-- 03
    """Return the losses of SISS (Alberti et al., ICLR 2025): score matching on D_g and on D_f.

    x_g, x_f  (B, ...) images of D_g and of D_f
    t         (B,) times, one for each pair of them
    mix       probability that x_t is made from x_f, and not from x_g; their lambda

    Returns two tensors (B,). Both losses come from one x_t, so the network is evaluated once and
    not twice. Both are unbiased all the same. As in the released code x_g is drawn from D_g. Two
    scripts of that code draw only t = 999; here all t are drawn.
    """
    sigma = common.expand_like(sde.sigma(t), x_g)  # (B,) -> (B, 1, ..., 1)
    is_from_f = common.expand_like(torch.rand(len(t), device=t.device) < mix, x_g)
    x_hat = torch.where(is_from_f, x_f, x_g) + sigma * torch.randn_like(x_g)  # x_t / s(t)
    _, z_hat = common.predict(net, x_hat, sde.sigma(t))

    # The noise that leads from x_g to this x_t, and the noise that leads there from x_f.
    z_g = (x_hat - x_g) / sigma
    z_f = (x_hat - x_f) / sigma

    # Let q(x_t | x0) be the density of x_t given the image, N(s x0, std^2 I). It is exp(-|z|^2 / 2)
    # up to a factor that both images share; here |z|^2 is a sum, not a mean. So
    #     ln q(x_t | x_f) - ln q(x_t | x_g) = (|z_g|^2 - |z_f|^2) / 2
    # At low noise that is huge: exp of it would overflow, and a sigmoid cannot.
    log_ratio = 0.5 * (z_g**2 - z_f**2).flatten(1).sum(1)  # (B, ...) -> (B,)
    prob_f = torch.sigmoid(log_ratio + math.log(mix / (1 - mix)))  # that x_t came from x_f

    # x_t comes from q_mix = (1 - mix) q(. | x_g) + mix q(. | x_f), and each loss wants it from its
    # own q. Importance weights make up for that:
    #     q(x_t | x_g) / q_mix = (1 - prob_f) / (1 - mix),    q(x_t | x_f) / q_mix = prob_f / mix
    # They are at most 1/(1 - mix) and 1/mix, so no single image can outweigh a batch.
    losses_g = (1 - prob_f) / (1 - mix) * common.flat_mean((z_hat - z_g) ** 2)
    losses_f = prob_f / mix * common.flat_mean((z_hat - z_f) ** 2)
    return losses_g, losses_f


def erasediff_weight(grad_g, grad_f, eta):  # <-- 03
    """Return EraseDiff's weight lambda for the step along grad_g + lambda grad_f, as a tensor ().

    grad_g, grad_f  (P,) gradients of L_g and of L_f by all P weights of the network
    eta             how fast L_f has to fall

        lambda = max(eta - <grad_g, grad_f>/|grad_f|^2, 0)

    The aim is the least L_g among the minima of L_f. This is the first-order method BOME for it.
    Where a step along grad_g alone lowers L_f enough, lambda is 0. Elsewhere L_f falls by
    eta |grad_f|^2 times the learning rate, even where the two gradients conflict. The released code
    divides by both norms (a cosine), or fixes lambda at 0.1, which is --alpha .909 here.
    """
    # <a, b> and |a|^2 are sums over the weights here.
    return (eta - grad_g @ grad_f / grad_f.square().sum()).clamp(min=0)


def weigh_gradients(args, net, loss_g, loss_f):  # <-- 03
    """Return a loss whose gradient is  grad_g + weight grad_f,  for SISS and for EraseDiff.

    grad_g and grad_f are the gradients of L_g and of L_f by the weights of the network. The weight
    follows from these gradients, so there is no alpha that would give the same.
    """
    grad_g = flat_grad(loss_g, net)
    grad_f = flat_grad(loss_f, net)
    if args.method == "siss":
        # Minus: uphill in the score matching loss of D_f. This part always has the length c.
        weight = -args.c / grad_f.norm()
    else:
        weight = erasediff_weight(grad_g, grad_f, args.eta)
    return linear_loss(net, grad_g + weight * grad_f)


def flat_grad(loss, net):  # <-- 03
    """Return the gradient of a loss by all P weights of net, as one vector (P,)."""
    # Both losses of SISS share one graph: it has to last until the second gradient is done.
    grads = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
    grad = torch.cat([g.flatten() for g in grads])
    # Each process of torchrun has the gradient of its part of the batch, but the weight has to come
    # from that of the whole batch. A mean of the processes' weights would be another number.
    common.average_over_ranks([grad])
    return grad


def linear_loss(net, grad):  # <-- 03
    """Return the sum of w grad over the weights w: a loss whose gradient is `grad` (P,).

    So a gradient that was made by hand reaches the optimizer by way of backward, like any other.
    """
    weights = torch.cat([w.flatten() for w in net.parameters()])
    return weights @ grad


# ---- until it has forgotten ----------------------------------------------------------------------
#
# How many steps, and how hard a push? Both depend on the data, on the classes and on the model. So
# a run with --until looks at what it draws, and decides by that.


class Check(NamedTuple):  # <-- 03
    """How a run looks at its own samples."""

    first: int  # training steps before the first look
    every: int  # and from one look to the next
    n: int  # samples of one look
    nfe: int  # network evaluations of each: fewer than 03 takes in the end


# With 10 evaluations twice as many samples of a digit seem to be left as with 15 or 20.
CHECK = Check(first=100, every=50, n=250, nfe=12)
QUICK_CHECK = Check(first=4, every=4, n=20, nfe=2)
CHECK_NFE = {"ddpm": 30}  # ancestral steps need more

NUM_POOLED = 4  # the last looks that count together: 1,000 samples, each from its own noise
CHECK_STREAM = 10**6  # makes their noise another one than that of the samples "after"
LEAST_KEPT = 0.8  # so much of each kept class has to stay
# And so much of it in the samples of the end: by chance alone 200 samples of a class can be a tenth
# more or fewer.
LEAST_KEPT_AT_THE_END = 0.7
# With distill as L_g the optimum is pushed by kappa - 1: at 1 it is Unseen, which still draws D_f.
LEAST_KAPPA = 1.2
RARE = 20  # of a class that the Standard model draws less often than this nothing can be said


def steer(kappa, looks, forget, wish):  # <-- 03
    """Decide after a look at the samples how hard to push, and whether that was enough.

    kappa   the push so far
    looks   what was seen so far, the newest last, see look
    forget  list of the classes that are to be forgotten
    wish    the UR to come to, in percent

    Returns (kappa, decision). The decision is "stop", or "look again": more samples of the same
    model, or "go on": train on with the new kappa.
    """
    aim = wish / 2  # an estimate can be wrong by chance: aim at less than is wished for
    now = pool(looks[-NUM_POOLED:], forget)
    is_harmed = has_harmed(looks, forget)

    steps = sorted({look["step"] for look in looks})
    recent = pool([look for look in looks if look["step"] in steps[-2:]], forget)
    earlier = [look for look in looks if look["step"] in steps[-4:-2]]

    # If 0 of 250 samples are D_f, the true share may still be 1.5 %. So it takes more samples to
    # stop, all of one model.
    num_same = sum(look["step"] == steps[-1] for look in looks)
    if num_same >= NUM_POOLED and not missed(now, aim):
        return kappa, "stop"
    if num_same < NUM_POOLED and recent["ur"] <= aim and not is_harmed:
        return kappa, "look again"

    if is_harmed:
        return max(LEAST_KAPPA, 0.85 * kappa), "go on"
    # As long as UR falls quickly, the same push is enough. Near the aim it has to grow little.
    is_slow = earlier and recent["ur"] > 0.7 * pool(earlier, forget)["ur"]
    if is_slow and recent["ur"] > aim:
        return kappa * (1 + 0.15 * min(1, 0.1 + (recent["ur"] - aim) / wish)), "go on"
    return kappa, "go on"


def has_harmed(looks, forget):  # <-- 03
    """Return whether a kept class or the unsure share suffers, as far as four looks can tell."""
    # A class has too few samples in one look: its share is off by a third then, by chance alone.
    known = len(looks) >= NUM_POOLED
    return known and bool(missed(pool(looks[-NUM_POOLED:], forget), math.inf))


def pool(looks, forget):  # <-- 03
    """Take several looks together: a dict of what they say about the model.

    num            how many samples they had
    ur             share of these that show a class of the list `forget`, in percent
    ur_before      the same of the Standard model's samples from the same noise
    left           what is left of each class, see common.class_ratios; 1 where nothing can be said,
                   and for a class to forget
    worst          what is left of the kept class that lost most
    worst_class    which class that is, or None
    unsure         share of which the judge is unsure, in percent
    unsure_before  the same of the Standard model's samples from the same noise
    """
    after = np.sum([look["counts"] for look in looks], axis=0)  # (number of classes,)
    before = np.sum([look["before"]["counts"] for look in looks], axis=0)
    known = [i for i in range(len(after)) if i not in forget and before[i] >= RARE]
    ratios = common.class_ratios(after, before, forget).tolist()
    left = [ratios[i] if i in known else 1.0 for i in range(len(after))]
    worst_class = min(known, key=left.__getitem__, default=None)
    num = int(after.sum())
    return {
        "num": num,
        "ur": 100 * int(after[forget].sum()) / num,
        "ur_before": 100 * int(before[forget].sum()) / int(before.sum()),
        "left": left,
        "worst": 1.0 if worst_class is None else left[worst_class],
        "worst_class": worst_class,
        "unsure": 100 * sum(look["unsure"] for look in looks) / num,
        "unsure_before": 100 * sum(look["before"]["unsure"] for look in looks) / num,
    }


def protect(shares, left):  # <-- 03
    """Return how often L_g is to see each class, relative to the others: more where it loses.

    shares  the same so far, a list with a number from 1 to 4 for each class
    left    what is left of each class, see pool

    What a class loses, it loses where its images look like D_f. There the push is stronger than
    L_g, and more of its images in L_g keep it.
    """
    return [min(4.0, max(1.0, share / max(part, 0.25))) for share, part in zip(shares, left)]


def missed(figures, most, kept=LEAST_KEPT):  # <-- 03
    """Return which bounds the figures of `pool` miss: {name: by which factor, above 1}.

    most  the largest UR, in percent
    kept  the least that may be left of a kept class, 1 is all
    """
    factors = {
        "ur": figures["ur"] / most,
        "kept": kept / max(figures["worst"], 0.01),
        # Half more than the Standard model's; 1 % if the judge is sure of all of those.
        "unsure": figures["unsure"] / (1 + 1.5 * figures["unsure_before"]),
    }
    return {name: factor for name, factor in factors.items() if factor > 1}


def say_missed(figures, most, class_names):  # <-- 03
    """Say in words which bounds of the end the figures of `pool` miss: texts; see missed."""
    kept = LEAST_KEPT_AT_THE_END
    worst_class = figures["worst_class"]
    name = "" if worst_class is None else class_names[worst_class]
    unsure = figures["unsure"]
    unsure_before = figures["unsure_before"]
    texts = {
        "ur": f"UR {figures['ur']:.2f} %, and not {most:g} %",
        "kept": f"of '{name}' {100 * figures['worst']:.1f} % are left, and not {100 * kept:.0f} %",
        "unsure": f"the judge is unsure of {unsure:.1f} %, before of {unsure_before:.1f} %",
    }
    return [texts[name] for name in missed(figures, most, kept)]


def check_of(args):  # <-- 03
    """Return the Check of a run."""
    if args.quick:
        return QUICK_CHECK
    return CHECK._replace(nfe=CHECK_NFE.get(args.sde, CHECK.nfe))


def count_samples(args, data, model, judge, net, batch):  # <-- 03
    """Draw a batch of samples from a network, and count: {"counts": of each class, "unsure": ...}.

    batch  number of the batch: each has its own noise, the same for all networks
    """
    check = check_of(args)
    images = common.sample_images(
        net,
        check.n,
        model.shape,
        model.sde,
        common.rng(args.seed, CHECK_STREAM, batch).initial_seed(),
        check.nfe,
        batch=check.n // 2,  # so that two processes have something to do
        device=args.device,
        label="",
        bf16=args.bf16,
    )
    verdict = common.judge_images(judge, images)
    counts = torch.bincount(verdict.labels, minlength=len(data.class_names))
    return {"counts": counts.tolist(), "unsure": int((verdict.confidence < common.SURE).sum())}


def look(args, data, model, judge):  # <-- 03
    """Look at samples of the average, and at the Standard model's from the same noise: a dict.

    step    how many steps the average has been trained
    batch   number of the noise; the looks take turns
    counts  how many of the samples the judge takes for each class
    unsure  of how many it is unsure
    before  the same two of the Standard model's samples
    """
    looks = model.course.looks
    batch = len(looks) % NUM_POOLED
    # The Standard model stays as it is: of each batch its samples are drawn once.
    known = [look["before"] for look in looks if look["batch"] == batch][:1]
    result = {
        "step": len(model.losses),
        "batch": batch,
        **count_samples(args, data, model, judge, model.ema.net, batch),
        "before": known[0] if known else count_samples(args, data, model, judge, model.base, batch),
    }
    return common.from_first_process(result)


def look_and_steer(args, data, model, judge):  # <-- 03
    """Every so many steps look at the samples, decide how to go on, and keep the best state."""
    course = model.course
    done = len(model.losses)
    check = check_of(args)
    is_time = (done >= check.first and done % check.every == 0) or done == args.max_steps
    if args.until is None or not is_time:
        return
    start = time.time()
    kappa = course.kappa or 0.0
    decision = "look again"
    while decision == "look again":
        course.looks.append(look(args, data, model, judge))
        kappa, decision = steer(kappa, course.looks, data.forget_classes, args.until)
    figures = pool(course.looks[-NUM_POOLED:], data.forget_classes)
    course.history.append({"step": done, "kappa": course.kappa, **figures})
    course.has_ended = decision == "stop"
    if course.kappa is not None:
        course.kappa = kappa
    if has_harmed(course.looks, data.forget_classes):
        # Too high a learning rate harms, however gentle the push. With too low a one, what a class
        # has lost does not come back.
        common.lower_peak(model.optimizers, 0.7, args.lr / 3)
    course.shares = protect(course.shares or [1.0] * len(data.class_names), figures["left"])

    # The nearest to the wish: at 1 it is fulfilled. Too few samples say nothing, but at the end.
    cost = math.prod(missed(figures, args.until / 2).values())
    is_known = len(course.looks) >= NUM_POOLED or done == args.max_steps
    if is_known and (course.best is None or cost <= course.best["cost"]):
        weights = {name: weight.clone() for name, weight in model.ema.net.state_dict().items()}
        pushed_by = course.history[-1]["kappa"]  # course.kappa is that of the next step by now
        course.best = {"step": done, "kappa": pushed_by, "cost": cost, "weights": weights}
    course.seconds += time.time() - start


def take_best(model):  # <-- 03
    """Let the average of a finished run be that of its best state."""
    if model.course.best is not None:
        model.ema.net.load_state_dict(model.course.best["weights"])


def last_step(args, model):  # <-- 03
    """Return the number of the last step, as far as it is known."""
    if model.course.has_ended:
        return len(model.losses)
    return args.steps or args.max_steps


def first_kappa(args):  # <-- 03
    """Return the push with which a run with --until begins; None where a flag has fixed it."""
    is_fixed = args.method != "obt-rel" or args.kappa is not None or args.alpha is not None
    if args.until is None or is_fixed:
        return None
    # Gentler than a run of a fixed length: what a stronger push costs cannot be taken back.
    return 0.75 * usual_kappa(args.sde)


def draw_kept(data, model):  # <-- 03
    """Draw a batch of D_g for L_g: (B, C, H, W); classes that lose come more often, see protect."""
    index = data.index_g
    if model.course.shares is not None:
        weights = torch.tensor(model.course.shares, device=index.device)[data.labels_g]
        # Many, so that hardly any of them comes twice when `draw` chooses among them.
        index = index[torch.multinomial(weights, 16 * data.part_size, replacement=True)]
    return data.draw(index)


def alpha_now(args, data, model):  # <-- 03
    """Return the alpha of the next step: of the flags, or of the push that --until has come to."""
    if model.course.kappa is None:
        return args.alpha
    return alpha_of(model.course.kappa, data)


def course_text(args, data, model, step_seconds):  # <-- 03
    """Say what the last look has seen, and how long the run may still take.

    step_seconds  that one step takes, its share of the looks included
    """
    done = len(model.losses)
    longest = (last_step(args, model) - done) * step_seconds
    if args.until is None:
        return f"ETA {longest:.0f} s"
    if not model.course.history:
        return f"ETA at most {longest:.0f} s"
    now = model.course.history[-1]
    worst_class = now["worst_class"]
    worst = "" if worst_class is None else f"{data.class_names[worst_class]} x{now['worst']:.2f}"
    push = "" if now["kappa"] is None else f"kappa {now['kappa']:.2f}  "
    soon = min(longest, steps_to_aim(model.course.history, args.until / 2) * step_seconds)
    eta = f"at most {longest:.0f} s" if soon == longest else f"{soon:.0f} to {longest:.0f} s"
    return f"UR {now['ur']:.1f} %  unsure {now['unsure']:.1f} %  {worst}  {push}ETA {eta}"


def steps_to_aim(history, aim):  # <-- 03
    """Guess in how many steps UR is down to `aim` (percent), if it goes on falling as it does."""
    now = history[-1]
    # Before its first step a run has the UR of the Standard model.
    before = history[-2] if len(history) > 1 else {"step": 0, "ur": now["ur_before"]}
    if now["ur"] <= aim:
        return now["step"] - before["step"]
    if now["ur"] >= before["ur"]:
        return math.inf
    # By the same factor in each step.
    rate = math.log(before["ur"] / now["ur"]) / (now["step"] - before["step"])
    return math.log(now["ur"] / aim) / rate


def not_reached(args, data, result):  # <-- 03
    """Return what stood in the way of the wish of --until: texts, none if it was reached.

    result  content of result.json: the samples "after" are from noise that no look has seen

    The looks decide when to stop, and which state is saved. Whether the wish was reached is decided
    here, also where the steps ran out: the looks aim at half the wish, and have fewer samples.
    """
    fresh = fresh_figures(data, result)
    return say_missed(fresh, args.until, data.class_names)


def fresh_figures(data, result):  # <-- 03
    """Return what the samples of the end say, as `pool` does; see not_reached."""
    seen = []
    for when in ("before", "after"):
        unsure = result["n"] * result[f"low_confidence_{when}"] / 100
        seen.append({"counts": result["class_counts"][when], "unsure": unsure})
    before, after = seen
    return pool([{**after, "before": before}], data.forget_classes)


# ---- the training loop ---------------------------------------------------------------------------


SAVE_SECONDS = 180  # after so long what --resume needs is saved again


def train(args, data, model, path, ctrl_c, judge=None):
    """Show the network images to keep and images to forget at random noise levels, again and again.

    path    of the file that --resume goes on from
    ctrl_c  common.CtrlC; when it is pressed the program ends after the step in progress
    judge   common.Judge, which a run with --until looks at its samples with

    Returns L_g and L_f of each step: (steps, 2).
    """
    net = model.net
    base = model.base  # <-- 03
    sde = model.sde
    first_step = len(model.losses)
    num_skipped = skipped_in_a_row(model.skipped, first_step)  # their gradient was not finite
    printed_steps = first_step  # how many steps were done when the last line was printed
    printed_at = time.time()  # when that was, in seconds
    saved_at = time.time()
    began = time.time() - model.seconds_trained
    pushed = copy.copy(args)  # its alpha may change on the way  # <-- 03
    for step in range(first_step, last_step(args, model)):
        net.train()
        # With --until nobody knows the end: the rate falls only where a look sees harm, and the
        # average takes the noise out.
        common.set_lr(model.optimizers, step, args.steps or math.inf, warmup=20)
        pushed.alpha = alpha_now(args, data, model)  # <-- 03
        both = torch.zeros(2, device=args.device)  # L_g, L_f of this step  # <-- 03
        for _ in common.batch_parts(args, step):  # one part, unless --grad-accum or torchrun
            x_g = draw_kept(data, model)  # <-- 03
            has_forget_loss = step % args.forget_every == 0  # <-- 03
            x_f = data.draw(data.index_f) if has_forget_loss else None  # <-- 03
            loss, loss_g, loss_f = objective(pushed, net, base, sde, x_g, x_f)  # <-- 03
            (loss / args.grad_accum).backward()
            # A tensor: loss.item() would make the CPU wait for the GPU at each step.
            both += torch.stack([loss_g, loss_f]).detach() / args.grad_accum  # <-- 03
        model.losses.append(both)
        # optimizer.step() and zero_grad(). A gradient that is not finite is dropped.
        num_skipped = common.guarded_step(net, model.optimizers, num_skipped)
        if num_skipped:
            model.skipped.append(step + 1)
        model.ema.update(net)

        done = step + 1
        look_and_steer(args, data, model, judge)  # <-- 03
        is_last = done == last_step(args, model)
        model.seconds_trained = time.time() - began
        if done % 50 == 0 or is_last:
            common.average_over_ranks(model.losses[printed_steps:])  # in place
            print_progress(args, data, model, printed_steps, time.time() - printed_at)
            printed_steps = done
            printed_at = time.time()
        # Several processes have the same losses only where they have just been averaged.
        is_whole = done == printed_steps or common.ranks()[1] == 1
        is_due = is_whole and time.time() - saved_at > SAVE_SECONDS
        if is_due or is_last or ctrl_c.signum:
            save_for_resume(path, model, args)
            saved_at = time.time()
        if ctrl_c.signum:
            raise common.Stopped(ctrl_c.signum)
        if is_last:
            break
    common.refuse_skipped(len(model.skipped), len(model.losses))
    take_best(model)  # <-- 03
    return torch.stack(model.losses)


def skipped_in_a_row(skipped, step):
    """Return how many steps up to this one were left out without a break; see guarded_step."""
    count = 0
    while step - count in skipped:
        count += 1
    return count


def print_progress(args, data, model, printed_steps, seconds):
    """Print a line: steps done, their mean losses, time left, and how many were left out.

    printed_steps  how many steps the lines before this one were about
    seconds        that the steps since then have taken
    """
    done = len(model.losses)
    # nanmean: the mean L_f of the steps that had one.
    mean_loss_g, mean_loss_f = torch.stack(model.losses[printed_steps:]).nanmean(0).tolist()
    print(
        f"step {done}/{last_step(args, model)}  L_g {mean_loss_g:.4f}  L_f {mean_loss_f:.4f}  "
        + course_text(args, data, model, seconds / (done - printed_steps))
        + common.skipped_text(len(model.skipped)),
        flush=True,
    )


# ---- checkpoints ---------------------------------------------------------------------------------


def saved_step(model):
    """Return of which step the average is that a finished run keeps."""
    if model.course.best is not None:
        return model.course.best["step"]
    return len(model.losses)


def save(path, step, model, args):
    """Save the average, which 04 and 05 load. What --resume needs is in a file of its own."""
    common.save_checkpoint(
        path,
        arch=model.net.arch,
        shape=model.shape,
        ema=model.ema.net.state_dict(),
        step=step,
        args=vars(args),
    )


def save_for_resume(path, model, args):
    """Save everything a run is made of, so that --resume goes on as if nothing had happened.

    The random state is part of it: data order, noise levels and noise all come from there.
    """
    common.save_checkpoint(
        path,
        arch=model.net.arch,
        shape=model.shape,
        model=model.net.state_dict(),
        ema=model.ema.net.state_dict(),
        optimizers=[optimizer.state_dict() for optimizer in model.optimizers],
        step=len(model.losses),
        losses=torch.stack(model.losses),
        skipped=model.skipped,
        course=vars(model.course),
        seconds=time.time() - model.start,
        seconds_trained=model.seconds_trained,
        made_from=model.made_from,
        rng=torch.get_rng_state(),
        args=vars(args),
    )


# Flags on which no result depends: how a run is called, where it computes and writes.
NOT_OF_THE_RESULT = (
    "command",
    "resume",
    "overwrite",
    "redraw",
    "animate",
    "out",
    "cache_dir",
    "device",
)
# Flags on which no weight depends, because they are about where the images lie, how fast a step
# is, and how a run is measured. They may be others when it goes on.
NOT_OF_THE_MODEL = (*NOT_OF_THE_RESULT, "data_dir", "compile", "n", "nfe")


def resume(path, model, args):
    """Load what a stopped run has left into the model and the random generator.

    Exits with one line if that does not fit the network, the flags, the Standard model or the data.
    A run that began with --overwrite goes on with it.
    """
    command = f"{args.command} --overwrite"
    keys = ("arch", "model", "ema", "optimizers", "step", "losses", "skipped", "seconds", "rng")
    checkpoint = common.load_checkpoint(path, command, (*keys, "made_from", "args"))
    try:
        recorded = {**checkpoint["args"], **checkpoint["made_from"]}
        model.losses = list(checkpoint["losses"].to(args.device))
        model.skipped = list(checkpoint["skipped"])
        model.course = Course(**checkpoint.get("course", {}))  # an older version has none
        model.start -= checkpoint["seconds"]
        model.seconds_trained = checkpoint.get("seconds_trained", 0.0)
    except (TypeError, AttributeError) as error:
        common.exit_with_error(f"{path} cannot be resumed ({error}); begin again with: {command}")
    now = {**vars(args), **model.made_from}
    names = [name for name in now if name not in NOT_OF_THE_MODEL]
    differences = common.differing_flags(now, recorded, names)
    if differences:
        common.exit_with_error(
            f"{path} was begun with other settings: {', '.join(differences)}; "
            f"give the same again, or begin again with: {command}"
        )
    args.overwrite = bool(recorded.get("overwrite"))
    common.restore_training(path, command, model, checkpoint)
    common.say(f"resumed {path} at step {len(model.losses)}")


def check_resume(args, path, folder, made_from):
    """Exit with one line if a stopped run would get lost, or --resume has none to go on with.

    path       of the file that --resume goes on from
    folder     of the finished run
    made_from  what find_sources returns
    """
    common.refuse_unwritable(path)
    if path.exists() and not (args.resume or args.overwrite):
        common.exit_with_error(
            f"{path} is a run that was stopped: {args.command} --resume goes on with it, "
            f"{args.command} --overwrite begins again"
        )
    if args.resume and path.exists():
        return
    refuse_other_run(args, folder, made_from)
    if not args.resume:
        # A result of other settings would have been refused.
        if (folder / "result.json").is_file() and not args.overwrite:
            common.say(f"this run has been finished before, in {folder}/; now it is made again")
        return
    for place in (folder, *folder.parent.glob(f"{folder.name}-worse*")):
        path_of_result = place / "result.json"
        if not path_of_result.is_file():
            continue
        # Of `folder` it is known by now that its run was this one.
        if place == folder or is_made_with(path_of_result, settings_now(args, made_from)):
            common.say(f"nothing was left to do: the run has been finished, in {place}/")
            # 1 stands for a run that made things worse, or has not reached its wish, as when it
            # was finished.
            finished = json.loads(common.read_text(path_of_result))
            has_failed = place != folder or (finished.get("not_reached") and not args.quick)
            raise SystemExit(1 if has_failed else 0)
    common.exit_with_error(
        f"{path} not found: no run was stopped there; begin one with: {args.command}"
    )


def settings_now(args, made_from):
    """Return all that the result of this run depends on: {name: value}; see find_sources."""
    flags_now = {name: value for name, value in vars(args).items() if name not in NOT_OF_THE_RESULT}
    return {**flags_now, **made_from}


def is_made_with(path, now):
    """Tell whether a finished result.json is of a run with the settings `now`."""
    return not common.differing_flags(now, common.recorded_settings(path), now)


def refuse_other_run(args, folder, made_from):
    """Exit with one line if the finished run in `folder` is another one than this; see --overwrite.

    made_from  what find_sources returns
    """
    pictures = ("curves.png", "before_after.png", "flow.gif")
    common.refuse_foreign(folder, "model.pt", "result.json", "log.jsonl", *pictures)
    path = folder / "model.pt"
    common.refuse_unwritable(path)
    if path.exists() and not args.overwrite:  # it may be another project's
        common.load_checkpoint(path, f"{args.command} --overwrite", ("arch", "ema", "args"))
    now = settings_now(args, made_from)
    # Older versions recorded None for the usual form of Ort.
    common.refuse_other_result(args, folder / "result.json", now, addable=("ort",))


def output_folder(args, forget_names):
    """Return the folder of this run: out/<dataset>/forget-<names>/<name of the run>.

    What was chosen by a flag is in its name, so two runs have one folder only if they are the same.
    """
    folder = common.forget_folder(args.out, args.dataset, forget_names)
    return folder / common.run_name(args, usual_values(args), args.from_scratch)


def usual_values(args):
    """Return what the flags of a run like this are if none is given, as a dict."""
    method = ["--method", args.method, "--sde", args.sde]
    usual = flags().parse_args(["--dataset", args.dataset, "--forget", "any", *method])
    usual.quick = args.quick
    usual.from_scratch = args.from_scratch
    values = vars(usual)
    is_other_kind = ends_by_itself(usual) != ends_by_itself(args)
    if is_other_kind:
        # A length or a result in place of the usual one: it is named, and the rest is as usual.
        usual.steps = args.steps
        usual.until = args.until
    common.fill_defaults(usual, defaults(usual), quick_defaults(usual))
    if is_other_kind:
        values.update(steps=None, until=None)
    return values


def set_apart_if_worse(result, out, folder):
    """Give a run that made things worse a place beside the one where it would have gone.

    result  content of result.json
    out     folder that holds the finished run, hidden so far
    folder  where it would have gone. What is there stays: the run goes beside it, as <name>-worse

    Returns the folder in which the run is to be found.
    """
    if not result["worse"]:
        return folder
    place = folder.with_name(f"{folder.name}-worse")
    number = 1
    while place.exists():
        number += 1
        place = folder.with_name(f"{folder.name}-worse{number}")
    if common.is_first_process():
        os.rename(out, place)
        stays = f"{folder}/ stays as it was" if folder.exists() else f"{folder}/ was not written"
        common.warn(
            f"worse than before: {'; '.join(result['worse'])}; saved as {place}/, {stays} "
            "(try a lower --lr, or a weaker push)"
        )
    return place


def reasons_of_worse(args, result, data):
    """Return why a model is worse than the Standard model that it came from: a list of texts.

    It draws more of what it was to forget, or rubbish, or a class that was to stay is gone. A run
    that only tries whether everything works has nothing to lose, and one from scratch has no
    model that it came from.
    """
    reasons = []
    if args.quick or args.from_scratch or result["ur_before"] is None:
        return reasons
    low, _ = result["ur_interval"]
    if low > result["ur_before"]:
        reasons.append(f"UR {result['ur_before']:.2f} to {result['ur_after']:.2f} %")
    unsure_before = result["low_confidence_before"]
    unsure_after = result["low_confidence_after"]
    if unsure_after > max(50, unsure_before):
        reasons.append(
            f"the judge is unsure of {unsure_after:.0f} %, before of {unsure_before:.0f} %"
        )
    counts = zip(result["class_counts"]["before"], result["class_counts"]["after"])
    for i, (num_before, num_after) in enumerate(counts):
        # 20: of a class that is drawn so often none is missing by chance (e^-20).
        if num_before >= 20 and num_after == 0 and i not in data.forget_classes:
            reasons.append(f"'{data.class_names[i]}' is gone, {num_before} samples before")
    return reasons


# ---- measures and pictures -----------------------------------------------------------------------

NUM_SHOWN = 64  # images on each side of before_after.png, at most


@dataclass
class Samples:
    """What a model has drawn, and what the judge says of it."""

    images: torch.Tensor  # (n, C, H, W) uint8
    verdict: common.Verdict  # labels, confidence and features of the n images
    # With --animate (sigma, images) from the noise to the first few images, else nothing.
    trajectory: list = field(default_factory=list)


def draw_samples(args, net, sde, judge, shape, label):
    """Draw args.n images of shape (C, H, W) with a network and judge them; return Samples.

    label  first words of the progress line

    The noise is the same at each call: before and after differ by the networks alone.
    """
    trajectory = []
    if args.animate:
        net = common.Recorder(net, limit=args.nfe)  # of the first batch
    images = common.sample_images(
        net,
        args.n,
        shape,
        sde,
        args.seed,
        args.nfe,
        batch=50 if args.quick else 250,
        device=args.device,
        label=label,
        bf16=args.bf16,
    )
    if args.animate:
        trajectory = [(sigma, common.to_bytes(x[:NUM_SHOWN].cpu())) for sigma, x in net.seen]
    return Samples(images, common.judge_images(judge, images), trajectory)


def report(args, data, model, judge, real_g, before, after):
    """Measure, print the measures as a table, and return the content of result.json.

    real_g  (N, C, H, W) training images of D_g, with which samples are compared
    before  Samples of the Standard model, or None; the result then has None for its figures
    after   Samples of the unlearned model
    """
    row_before, row_after, row_floor = measure_all(args, data, judge, real_g, before, after)
    alpha = args.alpha
    kappa = args.kappa
    best = model.course.best
    if best is not None and best["kappa"] is not None:  # no flag has fixed the push
        kappa = best["kappa"]
        alpha = alpha_of(kappa, data)
    print_measures(args, row_before, row_after, row_floor)
    result = {
        "method": args.method,
        "sde": args.sde,
        "forget": data.forget_names,
        "alpha": alpha,
        "kappa": kappa,
        "steps": saved_step(model),
        "n": args.n,
        "sampler": common.SDES[args.sde].sampler,
        "nfe": args.nfe,
        "ur_before": row_before.get("ur"),
        "ur_after": row_after["ur"],
        "ur_interval": row_after["ur_interval"],
        "ur_floor": row_floor["ur"],
        "fd_before": row_before.get("fd"),
        "fd_after": row_after["fd"],
        "fd_floor": row_floor["fd"],
        "low_confidence_before": row_before.get("low_confidence"),
        "low_confidence_after": row_after["low_confidence"],
        "low_confidence_floor": row_floor["low_confidence"],
        "noise_before": row_before.get("noise"),
        "noise_after": row_after["noise"],
        "noise_floor": row_floor["noise"],
        "ur_no_noise_after": row_after["ur_no_noise"],
        **{key: row_after[key] if row_before else None for key in common.COMPARED},
        "class_counts": {
            "before": row_before.get("class_counts"),
            "after": row_after["class_counts"],
        },
        "device": common.device_name(args.device),
        "seconds": time.time() - model.start,
        "seconds_trained": model.seconds_trained,  # that of the looks included
        "seconds_of_looks": model.course.seconds,
        "looks": model.course.history,
        "skipped_steps": len(model.skipped),
        "made_from": model.made_from,
        "args": vars(args),
    }
    result["worse"] = reasons_of_worse(args, result, data)
    result["worst_class"] = None
    if before is not None:
        worst_class = fresh_figures(data, result)["worst_class"]
        result["worst_class"] = None if worst_class is None else data.class_names[worst_class]
    result["not_reached"] = None
    if args.until is not None:
        result["not_reached"] = not_reached(args, data, result)
        say_how_it_ended(args, model, result)
    return result


def say_how_it_ended(args, model, result):  # <-- 03
    """Say in one line whether a run with --until has come to its wish."""
    reasons = result["not_reached"]
    if reasons:
        common.say(f"not reached: {'; '.join(reasons)}; saved is step {saved_step(model)}")
    else:
        common.say(f"reached: UR at most {args.until:g} %, at step {saved_step(model)}")
    print("the figures above are of fresh noise: the looks on the way have seen none of it")


def measure_all(args, data, judge, real_g, before, after):
    """Measure the samples before, the samples after, and real test images of D_g: three dicts.

    The arguments are those of `report`. The first dict is empty if there is no Standard model. The
    third holds the floors. No model can hope to do better than as many real images: the judge
    makes mistakes, and a distance between finite sets is not 0.
    """
    num_classes = len(data.class_names)
    real = common.judge_images(judge, real_g)

    def measure(verdict, standard):
        return common.measure(verdict, data.forget_classes, real, num_classes, standard)

    row_before = {}
    # Without a Standard model the samples are compared with themselves. The class_min_ratio that
    # comes of it means nothing, and `report` drops it.
    standard = after.verdict
    if before is not None:
        row_before = measure(before.verdict, None)
        standard = before.verdict
    row_after = measure(after.verdict, standard)
    real_test = common.random_subset(data.test_g, args.n, args.seed)
    # With as many images as the others have in their distance; see common.measure.
    row_floor = measure(common.judge_images(judge, real_test), standard)
    return row_before, row_after, row_floor


# What may stand where the Standard model draws what is to be forgotten, see common.instead.
INSTEAD = {
    "other": "another class",
    "unsure": "an image of which the judge is unsure",
    "noise": "noise",
    "forgotten": "still that",
}


def print_measures(args, row_before, row_after, row_floor):
    """Print the measures as a table. Read them together: common.measure says why."""
    names = {
        "ur": "unlearning ratio, %",
        "fd": "Frechet distance",
        "low_confidence": "judge unsure, %",
        "noise": "noise, %",
    }
    print(f"{'':24}before   after   real D_g (floor)")
    for key, name in names.items():
        rows = (row_before, row_after, row_floor)
        cells = [f"{row[key]:6.2f}" if row else "     -" for row in rows]
        print(f"{name:24}" + "  ".join(cells))

    low, high = row_after["ur_interval"]
    ratio_text = f"; class_min_ratio {row_after['class_min_ratio']:.2f}" if row_before else ""
    print(f"UR after in [{low:.2f}, {high:.2f}] % (95 %, n = {args.n}){ratio_text}")
    if row_before:
        parts = {name: row_after[f"instead_{name}"] for name in INSTEAD}
        text = ", ".join(f"{share:.1f} % {INSTEAD[name]}" for name, share in parts.items())
        print(f"where the Standard model draws it: {text}")
    print(f"class counts before {row_before.get('class_counts')}")
    print(f"             after  {row_after['class_counts']}")


def before_after(path, data, before, after, num_images=NUM_SHOWN, columns=8):
    """Save a picture of samples before (left) and after (right), made from the same noise.

    before, after  Samples; without a Standard model before is None, and both sides show `after`
    num_images     how many at most on each side
    columns        how many of them in a row

    The judge's class stands in the corner of each image, in a filled box if it is to be forgotten.
    An orange frame marks the images whose class has changed.
    """
    plt = common.pyplot()
    left_title = "before"
    if before is None:
        before = after
        left_title = "after"
    num_images, _, height, width = after.images[:num_images].shape  # there may be fewer
    has_changed = before.verdict.labels != after.verdict.labels

    num_rows = math.ceil(num_images / columns)
    fig, axes = plt.subplots(1, 2, figsize=(11, 5.5 * num_rows / columns + 0.4))
    for ax, samples, name in zip(axes, (before, after), (left_title, "after")):
        # (n, C, H, W) -> (rows*H, columns*W, 3)
        ax.imshow(common.tile(samples.images[:num_images], columns))
        ax.axis("off")
        ax.set_title(name, fontsize=10)
        for i in range(num_images):
            left = i % columns * width
            top = i // columns * height
            label = int(samples.verdict.labels[i])
            is_forgotten = label in data.forget_classes
            common.label_corner(ax, left, top, data.class_names[label], is_forgotten)
            if has_changed[i]:
                corner = (left, top)
                frame = {"fill": False, "edgecolor": common.CHANGED, "linewidth": 1.2}
                ax.add_patch(plt.Rectangle(corner, width - 1, height - 1, **frame))
    fig.tight_layout(pad=0.4)
    common.save_figure(fig, path, dpi=110)


def draw_flow(path, data, before, after, num_images=32, columns=8):
    """Save an animation of the same noise as it becomes images, before (left) and after (right).

    before, after  Samples with their trajectory; without a Standard model before is None

    The images are some of before_after.png. Those that the left model makes D_f come first, and
    keep a solid frame as long as they are D_f. A dashed frame marks one that is D_f no more.
    """
    sides = {"before": before, "after": after}
    if before is None:
        sides = {"after": after}
    forget = torch.tensor(data.forget_classes)
    first = next(iter(sides.values()))
    num_known = len(first.trajectory[0][1])  # it is that of the first batch
    was_forgotten = torch.isin(first.verdict.labels[:num_known], forget)
    # False sorts before True.
    picked = torch.argsort(~was_forgotten, stable=True)[:num_images]

    plt = common.pyplot()
    fig, axes = plt.subplots(1, len(sides), figsize=(5 * len(sides), 3.15), dpi=80, squeeze=False)
    frames = []
    for ax, (name, samples) in zip(axes[0], sides.items()):
        # Before sigma = 10 there is only noise, which fills a file and shows nothing.
        trajectory = [(sigma, images) for sigma, images in samples.trajectory if sigma < 10]
        trajectory = [*trajectory, (0, samples.images)]
        frames.append([(sigma, flow_tile(images[picked], columns)) for sigma, images in trajectory])
        ax.axis("off")
        ax.set_title(name, fontsize=12)
        is_forgotten = torch.isin(samples.verdict.labels[picked], forget)
        frame_forgotten(ax, data, columns, was_forgotten[picked], is_forgotten)
    names = common.plain_text(" ".join(data.forget_names))
    fig.text(
        0.5,
        0.02,
        f"the same noise on both sides; solid frame: becomes {names}; dashed: no longer {names}",
        ha="center",
        fontsize=11,
    )
    fig.subplots_adjust(left=0.005, right=0.995, bottom=0.1, top=0.83, wspace=0.02)
    shown = [ax.imshow(steps[0][1], interpolation="nearest") for ax, steps in zip(axes[0], frames)]

    def show(k):
        """Show step k of every side."""
        for image, steps in zip(shown, frames):
            image.set_data(steps[k][1])
        fig.suptitle(f"noise level sigma = {frames[0][k][0]:.2f}", fontsize=12)

    common.save_animation(fig, path, show, len(frames[0]), seconds=0.3)


def flow_tile(images, columns):
    """Arrange images as common.tile does, in 16 shades: noise of 256 would fill a large file."""
    return common.tile(images // 16 * 17, columns)


def frame_forgotten(ax, data, columns, was_forgotten, is_forgotten):
    """Draw the frames of draw_flow into the axes `ax`.

    was_forgotten, is_forgotten  (n,) bool: whether image i is D_f on the left, and on this side
    """
    plt = common.pyplot()
    height, width = data.images.shape[2:]
    for i in (was_forgotten | is_forgotten).nonzero().flatten().tolist():
        corner = (i % columns * width, i // columns * height)
        frame = {"fill": False, "edgecolor": common.CHANGED, "linewidth": 2, "linestyle": "--"}
        if is_forgotten[i]:
            frame.update(edgecolor=common.FORGOTTEN, linewidth=3, linestyle="-")
        ax.add_patch(plt.Rectangle(corner, width - 1, height - 1, **frame))


def plot_curves(path, losses, title, history=(), wish=None):
    """Save a plot of L_g and of L_f, each with a running mean of 20 steps, and of all looks.

    losses   (steps, 2): L_g and L_f of each step
    history  of a run with --until, see Course
    wish     the UR that it was to come to, in percent
    """
    plt = common.pyplot()
    panels = [["L_g"] * 3 + ["L_f"] * 3]
    if history:
        panels.append(["shares"] * 2 + ["kept"] * 2 + ["push"] * 2)
    fig, axes = plt.subplot_mosaic(panels, figsize=(9, 3 * len(panels) + 0.2))
    names = {"L_g": "retain loss L_g", "L_f": "forget loss L_f"}
    for (key, name), curve in zip(names.items(), losses.T.cpu().numpy()):
        ax = axes[key]
        steps = np.flatnonzero(np.isfinite(curve))  # not every step needs to have an L_f
        values = curve[steps]
        ax.plot(steps, values, color="0.7")
        window = min(20, len(values))
        if window > 0:
            # "valid": a mean only where the window is full, so it starts at value window - 1.
            mean = np.convolve(values, np.ones(window) / window, "valid")
            ax.plot(steps[window - 1 :], mean, color="black")
        ax.set_title(name, fontsize=10)
    if history:
        plot_looks(axes, history, wish)
    for ax in axes.values():
        ax.set_xlabel("step")
    fig.suptitle(title, fontsize=10)
    fig.tight_layout()
    common.save_figure(fig, path, dpi=100)


def plot_looks(axes, history, wish):  # <-- 03
    """Plot what a run with --until has seen: shares of the samples, and the class that lost most.

    axes  {"shares": ..., "kept": ..., "push": ...}; the others are as in plot_curves
    """
    steps = [now["step"] for now in history]
    shares, kept, push = [axes[name] for name in ("shares", "kept", "push")]
    names = {"ur": "UR", "unsure": "unsure", "unsure_before": "unsure, Standard"}
    for name, label in names.items():
        style = ":" if name == "unsure_before" else ".-"
        shares.plot(steps, [now[name] for now in history], style, label=label)
    shares.axhline(wish, color="0.6", lw=1, ls="--", label="wish for UR")
    shares.set_title("share of the samples, %", fontsize=10)
    kept.plot(steps, [now["worst"] for now in history], ".-", label="worst kept class")
    kept.axhline(LEAST_KEPT, color="0.6", lw=1, ls="--", label="so much has to stay")
    kept.set_title("share of a class after / before", fontsize=10)
    for ax in (shares, kept):
        ax.set_ylim(0, 1.1 * ax.get_ylim()[1])
        ax.legend(fontsize=7)
    pushes = [now["kappa"] for now in history]
    if None in pushes:  # another method, or a flag fixes the push
        push.set_axis_off()
        return
    push.plot(steps, pushes, ".-")
    push.set_ylim(0, 1.1 * push.get_ylim()[1])
    push.set_title("push, kappa", fontsize=10)


def read_log(path):
    """Read from log.jsonl L_g and L_f of each step, (steps, 2), and the history of a Course."""
    losses = []
    history = []
    try:
        for line in common.read_text(path).splitlines():
            values = json.loads(line)
            both = (values["loss_g"], values["loss_f"])
            # JSON has no NaN: null stands for it.
            losses.append([math.nan if value is None else value for value in both])
            if "ur" in values:
                history.append(values)
    except (ValueError, KeyError, TypeError):
        common.exit_with_error(f"{path} is damaged; make the run again, without --redraw")
    return torch.tensor(losses), history


def draw_pictures(args, data, folder, before, after, losses, again, history=()):
    """Draw the pictures of a run into its folder; one that fails is a line on stderr.

    before, after  Samples, as for `before_after`
    losses         (steps, 2): L_g and L_f of each step
    again          the command that draws them again
    history        of a run with --until, see Course
    """
    title = common.plain_text(f"{args.method}, forget {' '.join(args.forget)}, {args.sde}")
    path = folder / "before_after.png"
    common.draw_picture(path, before_after, data, before, after, again=again)
    more = {"title": title, "history": history, "wish": args.until}
    common.draw_picture(folder / "curves.png", plot_curves, losses, again=again, **more)
    if args.animate:
        common.draw_picture(folder / "flow.gif", draw_flow, data, before, after, again=again)


def refuse_redraw(args, folder, recorded):
    """Exit with one line if the pictures of a folder cannot be drawn again by --redraw.

    recorded  "args" in the model.pt of the folder
    """
    needed = {"dataset", "forget", "method", "sde", "from_scratch", "n", "nfe", "seed", "quick"}
    is_run = isinstance(recorded, dict) and needed <= recorded.keys()
    if not is_run or recorded["sde"] not in common.SDES:
        common.exit_with_error(f"--redraw: {folder} is no run of 03, and has no such pictures")
    if set(recorded["forget"]) != set(args.forget):
        forgotten = " ".join(recorded["forget"])
        common.exit_with_error(f"{folder} has forgotten {forgotten}: give --forget {forgotten}")
    if recorded["quick"] != args.quick:
        verb = "give" if recorded["quick"] else "leave out"
        common.exit_with_error(f"{folder} is a run of another kind: {verb} --quick")


def redraw(args, data, judge, folder):
    """Draw the pictures of a finished run again (--redraw), from its files and without training.

    folder  of the run
    """
    command = common.run_command(args, folder / "model.pt", data.forget_names)
    checkpoint = common.load_checkpoint(folder / "model.pt", command, ("arch", "ema", "args"))
    refuse_redraw(args, folder, checkpoint["args"])
    # How the samples were drawn is known to the run. Where it lies, and on what, is known here.
    here = {name: getattr(args, name) for name in ("out", "data_dir", "device", "quick", "animate")}
    # What a run of an older version does not record was off.
    run_args = argparse.Namespace(**{"until": None, "bf16": False, **checkpoint["args"], **here})
    run_args.n = min(run_args.n, NUM_SHOWN)

    shape = data.images.shape[1:]
    base = load_base(run_args, shape)
    net = common.load_net(folder / "model.pt", command, args.device, shape)
    if base is not None:
        common.warn_of_other_base(folder / "model.pt", common.weights_digest(base), command)
    sde = common.SDES[run_args.sde]()
    before = None
    if base is not None:
        before = draw_samples(run_args, base, sde, judge, shape, "samples before")
    after = draw_samples(run_args, net, sde, judge, shape, "samples after")
    losses, history = read_log(folder / "log.jsonl")
    flags = ["--forget", *data.forget_names, "--redraw", folder]
    if args.animate:
        flags.append("--animate")
    again = common.command_line("03_unlearn.py", args, *flags)
    draw_pictures(run_args, data, folder, before, after, losses, again, history)
    common.say(f"wrote the pictures in {folder}/")


# ---- the story -----------------------------------------------------------------------------------


def main(argv=None):
    """Make a model forget, and measure what that has done and what it has cost."""
    args = arguments(argv)
    # 04 names it if model.pt is damaged, and so do the lines about a run that was stopped.
    plain_argv = common.leave_out(argv, "--resume", "--overwrite")
    args.command = common.own_command("03_unlearn.py", plain_argv)
    start = time.time()

    # ---- data: D_g to keep and D_f to forget, as indices into one tensor of bytes  # <-- 03
    train_set, test_set = common.load_train_and_test(
        args.dataset, args.data_dir, args.forget, common.cache_folders(args)
    )
    data = split_data(args, train_set, test_set)
    folder = output_folder(args, data.forget_names)  # by the flags: before alpha is computed
    if args.redraw is not None:
        judge = common.load_judge(args, train_set, data.forget_names)
        redraw(args, data, judge, Path(args.redraw or folder))
        return
    set_alpha(args, data)  # <-- 03

    # Beside the folder: that is written anew, as a whole.
    path = folder.with_name(f"{folder.name}.resume.pt")
    stopped = common.going_on_with(f"{args.command} --resume", path)
    with common.locked(folder), stopped:  # two runs must not write one folder
        base = load_base(args, data.images.shape[1:])  # <-- 03
        made_from = find_sources(base, train_set)
        check_resume(args, path, folder, made_from)

        # ---- model: a copy of the Standard model, which stays as obt-rel's reference  # <-- 03
        model = make_model(args, base, data.images.shape[1:], made_from, start)
        warn_of_base(args, model, train_set)
        judge = common.load_judge(args, train_set, data.forget_names)
        if args.resume:  # after the judge, whose network draws random numbers when it is made
            resume(path, model, args)
            refuse_other_run(args, folder, made_from)

        # fresh_folder: if this run fails, the folder of an earlier one stays as it was.
        with common.fresh_folder(folder) as out:
            before = None
            if model.base is not None:
                before = draw_samples(
                    args, model.base, model.sde, judge, model.shape, "samples before"
                )
                common.warn_if_unfit(args, before.verdict)

            # ---- loop
            with common.CtrlC() as ctrl_c:
                losses = train(args, data, model, path, ctrl_c, judge)

            # ---- outputs
            common.write_losses(out / "log.jsonl", losses, model.skipped, model.course.history)
            save(out / "model.pt", saved_step(model), model, args)
            after = draw_samples(
                args, model.ema.net, model.sde, judge, model.shape, "samples after"
            )
            real_g = common.reference_images(train_set.images[data.index_g.cpu()], args.quick)
            result = report(args, data, model, judge, real_g, before, after)
            common.write_json(out / "result.json", result)
            if before is not None:
                common.warn_if_unfit(args, before.verdict)  # again: nobody scrolls up
            place = set_apart_if_worse(result, out, folder)
        if common.is_first_process():
            path.unlink(missing_ok=True)  # only now: the run is in its place

    # ---- pictures: last, because the run is safe by now and none of them can harm it
    again = common.own_command("03_unlearn.py", plain_argv, "--redraw", place)
    draw_pictures(args, data, place, before, after, losses, again, model.course.history)
    if result["worse"] or (result["not_reached"] and not args.quick):
        raise SystemExit(1)
    picture = folder / "before_after.png"
    command = common.command_line("04_evaluate.py", args, "--forget", *data.forget_names)
    seconds = time.time() - start
    common.say(f"{seconds:.0f} s; wrote {folder}/; next: look at {picture}, then: {command}")


if __name__ == "__main__":
    common.run(main)
