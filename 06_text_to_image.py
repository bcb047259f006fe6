"""06  Text to image: teach a Stable Diffusion pipeline to draw something else under one prompt.

    pip install diffusers transformers                             # 06 alone needs them
    python 06_text_to_image.py --forget "a photo of a three"       # 3 minutes on 2 CPU cores
    python 06_text_to_image.py --forget "a photo of a three" --method esd    # or unseen, ort, obt
    python 06_text_to_image.py --forget "a photo of a three" --method erasediff \\
        --pseudo "a photo of a eight"
    python 06_text_to_image.py --forget "a photo of a three" --train xattn --relearn
    # Stable Diffusion on a GPU. In FOLDER is a sub-folder of pictures for each class:
    python 06_text_to_image.py --pipeline CompVis/stable-diffusion-v1-4 --images FOLDER \\
        --forget "a photo of a tench" --train xattn --judge-weights resnet50.pth

Question: a prompt says what is to be forgotten. Is the rest of the model then safe by itself?
Answer:   no. A prompt shares its weights with all others. So L_f moves what is drawn under the
          forgotten prompt, and L_g holds every other prompt where the frozen model has it.

The pipeline in data/mnist_t2i has the format of Stable Diffusion v1.4, but only 2 M weights: it
draws digits of 32x32 pixels. --pipeline takes any other StableDiffusionPipeline, by folder or by
its name on the Hugging Face hub. D_f are pictures of the forgotten prompts, D_g those of the
prompts to keep. They come from --images: MNIST, a folder, or drawn by the pipeline itself.

Writes out/<pipeline>/forget-<prompts>/<method>[-<flag><value>...]/: weights.safetensors (only what
was trained), result.json, log.jsonl, before_after.png. --save FOLDER also writes a whole pipeline,
which diffusers loads like any other. A result of other settings is replaced only with --overwrite.

Predict, then run:
  1. What does the model draw in place of the 3?     (class_counts in result.json)
  2. ESD has no L_g. How many of the other prompts go wrong?  (others_by_prompt)
  3. Is the 3 gone, or only hidden?                   (--relearn)
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    # The imports take seconds. Until common.run listens, Ctrl-C ends the program without a word.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import importlib.util
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import common

SHIPPED = common.HERE / "data/mnist_t2i"

# Each method with its own defaults, by name of the flag.
METHODS = {
    "obt-rel": {"alpha": 0.5, "eta": 1.0, "retain": "distill", "steps": 200},
    # No L_g: how much the other prompts suffer if nothing holds them.
    "esd": {"eta": 1.0, "steps": 100},
    "erasediff": {"alpha": 0.5, "retain": "dsm", "steps": 100},
    "obt": {"alpha": 0.9, "retain": "dsm", "steps": 100},
    "ort": {"alpha": 0.9, "retain": "dsm", "steps": 100},
    # No L_f: how much a model forgets that only goes on without D_f.
    "unseen": {"retain": "dsm", "steps": 100},
}

# Flags that only some methods have: name of the flag -> those methods.
BELONGS_TO = {
    "alpha": ("obt-rel", "erasediff", "obt", "ort"),
    "eta": ("obt-rel", "esd"),
    "pseudo": ("erasediff",),
    "retain": ("obt-rel", "erasediff", "obt", "ort", "unseen"),
}

# Learning rates by what is trained. Those of the shipped pipeline are measured. Those for all
# others are the ones of ESD and EraseDiff for Stable Diffusion v1.4.
SMALL_RATES = {"full": 3e-4, "xattn": 1e-3, "noxattn": 3e-4}
LARGE_RATES = {"full": 1e-5, "xattn": 5e-5, "noxattn": 1e-5}

NUM_IMAGES = 500  # images of one prompt that are encoded, at most
NUM_GENERATED = 100  # images of one prompt that --images generate draws
EMPTY_SHARE = 0.1  # share of D_g's prompts that are empty, as in the training of a pipeline
NUM_SHOWN = 8  # pictures of one prompt in before_after.png, before and after

# ---- arguments -----------------------------------------------------------------------------------

QUICK = {"steps": 4, "batch_size": 4, "n": 10, "nfe": 3}  # the defaults that differ under --quick


def arguments(argv):
    """Read the command line: refuse what makes no sense and fill in what the user has left open."""
    args = flags().parse_args(argv)
    refuse(args)
    # The name of the folder of outputs. "a/b/" and "a/b" are the same pipeline, "." has a name too.
    args.name = common.join_names([Path(os.path.abspath(args.pipeline)).name or "pipeline"])
    if args.relearn == []:  # --relearn without a number
        args.relearn = [1, 10] if args.quick else [1, 10, 100]
    return common.finish_args(args, defaults(args), QUICK, folder=args.name)


def flags():
    """Return a parser of this script's flags and of those that all scripts share."""
    helps = {
        "--data-dir": "folder of mnist.npz, for --images mnist and the judge of digits (default: "
        "data/)",
        "--steps": "training steps (default: 200 for obt-rel, 100 for others)",
        "--batch-size": "images a step, of D_g and of D_f each (default: 16; other pipelines: 4)",
        "--lr": "peak learning rate of Adam (default: 0.0003; other pipelines: 0.00001; 0.001 and "
        "0.00005 with --train xattn)",
    }
    unused = ("--dataset", "--cache-dir", "--compile", "--bf16")
    # mnist: the data of the judge of digits.
    p = common.parser(__doc__, unused, helps, dataset="mnist")
    p.example = 'python 06_text_to_image.py --forget "a photo of a three"'
    p.add_argument(
        "--pipeline",
        default=str(SHIPPED),
        help="folder, or name on the Hugging Face hub (default: data/mnist_t2i)",
    )
    p.add_argument(
        "--forget",
        nargs="+",
        required=True,
        metavar="PROMPT",
        help="the prompts to forget (no default)",
    )
    p.add_argument(
        "--keep",
        nargs="+",
        metavar="PROMPT",
        help="the prompts to keep (default: all other digits, or all other sub-folders)",
    )
    p.add_argument(
        "--images",
        metavar="FOLDER",
        help="a folder with a sub-folder of pictures per class, mnist, or generate: the pipeline "
        "draws them (default: mnist for data/mnist_t2i, else generate)",
    )
    p.add_argument(
        "--template",
        default="a photo of a {}",
        help="makes a prompt of the name of a class (default: 'a photo of a {}')",
    )
    add_method(p)
    add_measures(p)
    return p


def add_method(p):
    """Add the flags that say how the pipeline is to forget."""
    p.add_argument(
        "--method",
        choices=list(METHODS),
        default="obt-rel",
        help="ort and obt are the paper's, obt-rel is ours, the others are baselines",
    )
    p.add_argument(
        "--pseudo", metavar="PROMPT", help="erasediff: what to draw instead (no default)"
    )
    p.add_argument(
        "--eta",
        type=common.number(float, 0),
        help="obt-rel, esd: how far beyond the empty prompt to push (default: 1)",
    )
    p.add_argument(
        "--alpha",
        type=common.number(float, 0, 1),
        help="weight of L_g; L_f has 1 - alpha (default: 0.5 for obt-rel and erasediff, 0.9 for "
        "obt and ort)",
    )
    p.add_argument(
        "--retain",
        choices=("dsm", "distill"),
        help="L_g: compare with the drawn noise, or with the frozen model (default: distill for "
        "obt-rel, dsm for others)",
    )
    p.add_argument(
        "--train",
        choices=("full", "xattn", "noxattn"),
        default="full",
        help="which weights of the U-Net: all, those that read the prompt, or the others",
    )
    p.add_argument(
        "--ema",
        type=common.number(float, 0, 0.99999),
        help="decay of the weight average (default: 0.95)",
    )


def add_measures(p):
    """Add the flags that say what is drawn and measured, and what is written."""
    p.add_argument(
        "--n",
        type=common.number(int, 10),
        help="pictures of each forgotten prompt, see docs/results.md (default: 200)",
    )
    p.add_argument(
        "--nfe",
        type=common.number(int, 2),
        help="steps of the sampler, DPM++ (default: 15; other pipelines: 25)",
    )
    p.add_argument(
        "--guidance",
        type=common.number(float, 1),
        help="classifier-free guidance (default: 2; other pipelines: 7.5)",
    )
    p.add_argument(
        "--relearn",
        nargs="*",
        type=common.number(int, 1),
        metavar="K",
        help="attack: fine-tune on K images of D_f, and measure again (default: no attack; "
        "without numbers: 1 10 100)",
    )
    p.add_argument(
        "--judge-weights",
        metavar="PATH",
        help="ImageNet's classes: the file of torchvision's ResNet-50; none: measure nothing "
        "(default: the judge of digits)",
    )
    common.add_fid(p)
    p.add_argument(
        "--save", metavar="FOLDER", help="also write a whole pipeline there (default: no)"
    )


def is_shipped(args):
    """Whether the run is about the pipeline of digits that is part of the repository."""
    return Path(args.pipeline).resolve() == SHIPPED.resolve()


def refuse(args):
    """Exit with one line if something is missing, or if flags do not fit together."""
    refuse_missing_packages()
    common.refuse_other_methods(args, BELONGS_TO)
    if args.method == "erasediff" and args.pseudo is None:
        common.exit_with_error(
            "--method erasediff needs --pseudo PROMPT, what is to be drawn instead "
            '(e.g. --pseudo "a photo of a eight"); --method obt-rel needs none'
        )
    both = sorted(set(args.forget) & set(args.keep or []))
    if both:
        common.exit_with_error(f"'{both[0]}' stands in --forget and in --keep: take it out of one")
    if args.template.count("{}") != 1:
        common.exit_with_error(
            f"--template '{args.template}' needs one {{}}, for the name of a class"
        )
    for flag in ("relearn", "fid"):
        if args.judge_weights == "none" and getattr(args, flag) not in (None, False):
            common.exit_with_error(
                f"--{flag} has no part in --judge-weights none, which measures nothing: "
                "leave one of them out"
            )
    refuse_missing_files(args)


def refuse_missing_packages():
    """Exit with one line that says how to install a package that this run needs."""
    for package in ("diffusers", "transformers", "safetensors"):
        if importlib.util.find_spec(package) is None:
            common.exit_with_error(
                f"06 needs the package {package}: pip install diffusers transformers "
                "(01 to 05 do not)"
            )


def refuse_missing_files(args):
    """Exit with one line if a file that a flag names is not there, or the folder of --save is."""
    find_pipeline(args.pipeline)
    if args.judge_weights not in (None, "none") and not Path(args.judge_weights).is_file():
        common.exit_with_error(f"--judge-weights {args.judge_weights} not found; {WHERE_RESNET_IS}")
    common.refuse_missing_fid(args)
    if args.images not in (None, "mnist", "generate") and not Path(args.images).is_dir():
        common.exit_with_error(
            f"--images {args.images} is no folder; valid are a folder, mnist and generate"
        )
    if args.save and Path(args.save).exists():
        common.exit_with_error(f"--save {args.save} is there already; name a folder that is not")


def defaults(args):
    """Return the values of the flags that the user has left open, as a dict."""
    if is_shipped(args):
        values = {"images": "mnist", "batch_size": 16, "nfe": 15, "guidance": 2.0}
        values["lr"] = SMALL_RATES[args.train]
    else:
        values = {"images": "generate", "batch_size": 4, "nfe": 25, "guidance": 7.5}
        values["lr"] = LARGE_RATES[args.train]
    values.update(n=200, ema=0.95)
    values.update(METHODS[args.method])
    return values


# ---- the pipeline --------------------------------------------------------------------------------


def load_pipeline(args):
    """Load the StableDiffusionPipeline of a run, in float32 and on its device."""
    import diffusers
    import transformers

    for package in (diffusers, transformers):
        package.utils.logging.set_verbosity(logging.CRITICAL)  # an error becomes our own line
        package.utils.logging.disable_progress_bar()
    name = find_pipeline(args.pipeline)
    try:
        config = diffusers.StableDiffusionPipeline.load_config(name)
        refuse_other_class(args.pipeline, config)
        # The safety checker would draw black pictures, and it takes 1.2 GB.
        if not Path(name).is_dir():
            name = diffusers.StableDiffusionPipeline.download(name, safety_checker=None)
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(
            name,
            safety_checker=None,
            requires_safety_checker=False,
            low_cpu_mem_usage=False,
        )
    except Exception as error:  # absent, cut off, no network: many exception types, one remedy
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        common.exit_with_error(
            f"--pipeline {args.pipeline} cannot be loaded ({reason}); valid are a folder of a "
            "StableDiffusionPipeline, or its name on the hub, such as CompVis/stable-diffusion-v1-4"
        )
    refuse_other_parts(args.pipeline, pipe)
    # The fp16 files of a folder would give networks of different types.
    pipe.to(args.device, torch.float32)
    pipe.set_progress_bar_config(disable=True)
    for network in (pipe.vae, pipe.text_encoder, pipe.unet):
        network.eval().requires_grad_(False)
    # DPM++ (Lu et al. 2022) takes 15 to 25 steps where the pipeline's own sampler takes 50.
    # Its form without chance, whatever the pipeline's own is: before and after from the same noise.
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
        pipe.scheduler.config, algorithm_type="dpmsolver++"
    )
    return pipe


def find_pipeline(name):
    """Return the folder, or name on the hub, that diffusers has to load; exit if there is none."""
    folder = Path(name)
    if (folder / "model_index.json").is_file():
        return str(folder)
    if folder.exists():
        common.exit_with_error(f"--pipeline {name} is no pipeline: it has no model_index.json")
    # A name on the hub is owner/name. All else can only be a path, and nothing is there.
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        remedy = "; restore it with: git checkout data/mnist_t2i" if folder == SHIPPED else ""
        common.exit_with_error(f"--pipeline {name} not found{remedy}")
    return name


def refuse_other_class(name, config):
    """Exit with one line if a pipeline is of another class; `config` is its model_index.json."""
    kind = config.get("_class_name")
    if kind != "StableDiffusionPipeline":
        common.exit_with_error(
            f"--pipeline {name} is a {kind}; supported is StableDiffusionPipeline "
            "(Stable Diffusion 1.x and 2.x, and all that is fine-tuned from them)"
        )


def refuse_other_parts(name, pipe):
    """Exit with one line if a pipeline works in a way that the losses of this file do not know."""
    predicted = pipe.scheduler.config.get("prediction_type", "epsilon")
    side = pipe.unet.config.sample_size
    reason = None
    if not hasattr(pipe.scheduler, "alphas_cumprod"):
        reason = f"its scheduler {type(pipe.scheduler).__name__} has no alphas_cumprod"
    elif predicted not in ("epsilon", "v_prediction"):
        reason = f"its U-Net predicts '{predicted}', and not epsilon or v_prediction"
    elif not isinstance(side, int):
        reason = f"the sample_size of its U-Net is {side}, and not a whole number"
    elif pipe.unet.config.in_channels != pipe.vae.config.latent_channels:
        reason = "its U-Net takes more than a latent, as for inpainting"
    if reason is not None:
        common.exit_with_error(
            f"--pipeline {name}: {reason}; supported are text-to-image pipelines "
            "such as CompVis/stable-diffusion-v1-4"
        )


@torch.no_grad()
def embed(pipe, prompts):
    """Compute the text embeddings of prompts once, as {prompt: (tokens, width)} on the device."""
    tokenizer = pipe.tokenizer
    # Not all tokenizers say how many tokens they take; the text encoder knows.
    limit = min(tokenizer.model_max_length, pipe.text_encoder.config.max_position_embeddings)
    texts = {}
    for prompt in dict.fromkeys(prompts):
        if prompt.encode(errors="replace").decode() != prompt:
            common.exit_with_error(f"the prompt '{prompt}' is not UTF-8: type it again")
        length = len(tokenizer(prompt).input_ids)
        if length > limit:
            common.exit_with_error(
                f"the prompt '{prompt}' has {length} tokens, and the pipeline's tokenizer takes "
                f"{limit}, with one at each end: shorten it"
            )
        tokens = tokenizer(
            prompt, padding="max_length", max_length=limit, return_tensors="pt"
        ).input_ids
        texts[prompt] = pipe.text_encoder(tokens.to(pipe.text_encoder.device))[0][0]
    return texts


def refuse_same(args, texts):
    """Exit with one line if the text encoder cannot tell a forgotten prompt from another one.

    texts  the embeddings of all prompts; equal ones are the same to the U-Net
    """
    others = {"": "the empty prompt"}
    others |= {prompt: f"'{prompt}' of --keep" for prompt in args.keep}
    if args.pseudo is not None:
        others[args.pseudo] = f"'{args.pseudo}' of --pseudo"
    for prompt in args.forget:
        for other, name in others.items():
            if torch.equal(texts[prompt], texts[other]):
                common.exit_with_error(
                    f"'{prompt}' of --forget and {name} are the same to the tokenizer of "
                    "--pipeline: change one of them (capital letters and spaces do not count, and "
                    "what it does not know is one unknown word)"
                )


def picture_size(pipe):
    """Return how many pixels a side the pipeline's pictures have."""
    return pipe.unet.config.sample_size * pipe.vae_scale_factor


@dataclass
class Model:
    """A pipeline whose U-Net is trained, and the frozen model that it is compared with."""

    pipe: object  # StableDiffusionPipeline
    texts: dict  # {prompt: (tokens, width) its embedding}
    weights: nn.ParameterList  # the weights that are trained; they belong to the U-Net
    names: list  # what they are called in the U-Net
    frozen: dict  # {name: copy of the weight as it was}; all other weights never change
    ema: common.EMA  # the average of `weights` over the last steps; the result
    skipped: list = field(default_factory=list)  # steps left out: their gradient was not finite


def make_model(args, pipe, texts):
    """Choose which weights of the U-Net train, and set up what trains them: a Model."""
    unet = pipe.unet
    on_cuda = args.device.startswith("cuda")
    if on_cuda:
        # Checkpointing computes a layer twice, and need not keep what is inside of it.
        unet.enable_gradient_checkpointing()
    names = []
    weights = []
    for name, weight in unet.named_parameters():
        # attn2 are the cross-attentions: there alone the U-Net reads the prompt.
        is_cross = ".attn2." in name
        if args.train == "full" or is_cross == (args.train == "xattn"):
            # They stay float32, or Adam's small updates would round to nothing.
            names.append(name)
            weights.append(weight.requires_grad_(True))
        elif on_cuda:
            # Half the memory of the frozen weights: 1.6 in place of 3.3 GB (an estimate).
            weight.data = weight.data.bfloat16()
    frozen = {}
    for name, weight in zip(names, weights):
        frozen[name] = weight.detach().clone()
        if on_cuda and weight.ndim > 1:
            # Autocast rounds a matrix each time that it is used. Once does as well, in half the
            # memory; the scales of norms and all that is added stay as they are.
            frozen[name] = frozen[name].bfloat16()
    trained = nn.ParameterList(weights)
    num_trained = sum(weight.numel() for weight in weights)
    num_all = sum(weight.numel() for weight in unet.parameters())
    print(
        f"--train {args.train}: {num_trained / 1e6:.2f} of the {num_all / 1e6:.2f} M weights "
        f"of the U-Net; pictures of {picture_size(pipe)} pixels a side"
    )
    return Model(
        pipe=pipe,
        texts=texts,
        weights=trained,
        names=names,
        frozen=frozen,
        ema=common.EMA(trained, args.ema),
    )


def make_adam(args, model):
    """Make the optimizer of one training; its averages take twice the memory of the weights."""
    # fused: without it a step on a GPU needs the memory of the weights once more.
    is_fused = args.device.startswith("cuda")
    return torch.optim.Adam(model.weights, args.lr, betas=(0.9, 0.99), fused=is_fused)


@torch.no_grad()
def put_weights(model, weights):
    """Copy weights, a list in the order of model.names, into the U-Net."""
    for target, weight in zip(model.weights, weights):
        target.copy_(weight)


# ---- the losses ----------------------------------------------------------------------------------
#
# What a prompt changes, compared with 03:
#   1. The network is z_hat(x_t, c): it estimates the noise under a prompt c. x_t is a noisy latent.
#   2. L_g sees the prompts to keep, and never the forgotten one c_f. So only weights that prompts
#      share hold L_f back. Ort and Obt then draw noise under c_f: nothing asks for a picture.
#   3. Obt-rel compares with the frozen model z_b at the empty prompt: what c_f adds to it is
#      z_b(c_f) - z_b(none), and away from that it pushes.
#   4. It needs an anchor at (x_t, c_f), for L_g has none there. With z the noise in D_f's x_t:
#          L_f = |z_hat - z_b(c_f)|^2 + 2 (1 + eta) z_hat . (z - z_b(none))
#   5. On average over D_f the noise z is z_b(c_f). Complete the square, and L_f is, up to a
#      constant, |z_hat - target|^2 with  target = z_b(c_f) - (1 + eta) (z_b(c_f) - z_b(none)).
#   6. That is ESD's target (Gandikota et al. 2023). So Obt-rel here is ESD's target plus L_g, and
#      L_g by distillation is what keeps the other prompts.


def signal_and_noise(pipe, t, like):
    """Return s and std of the steps t (B,) of a pipeline, to multiply a batch `like` (B, ...)."""
    # Not scheduler.add_noise: that of DPM++ has only the few steps of the last sampling.
    s_squared = pipe.scheduler.alphas_cumprod.to(like.device)[t]
    s = common.expand_like(s_squared.sqrt(), like)
    std = common.expand_like((1 - s_squared).sqrt(), like)
    return s, std


def estimate(model, x_t, t, text, is_frozen=False):
    """Estimate the noise in x_t (B, ...) at the steps t (B,) under text (B, tokens, width).

    is_frozen  by the frozen model, without a gradient. It is the same U-Net, called with copies of
               the few weights that train: a second U-Net would take 1.7 GB more
    """
    pipe = model.pipe
    arguments_of_unet = (x_t, t, text)
    with common.autocast(x_t.device):
        if is_frozen:
            with torch.no_grad():
                out = torch.func.functional_call(pipe.unet, model.frozen, arguments_of_unet).sample
        else:
            out = pipe.unet(*arguments_of_unet).sample
    out = out.float()
    if pipe.scheduler.config.prediction_type == "v_prediction":  # Stable Diffusion 2.1, 768 pixels
        s, std = signal_and_noise(pipe, t, x_t)
        return s * out + std * x_t  # v = s z - std x0, and x_t = s x0 + std z
    return out


def esd_target(z_base, z_none, eta):
    """Return what ESD wants under the forgotten prompt: as far beyond the empty one as eta says.

    z_base, z_none  (B, ...) the frozen model's noise under the forgotten and the empty prompt
    """
    return z_base - (1 + eta) * (z_base - z_none)


def obt_rel_loss(z_hat, z, z_base, z_none, eta):
    """Return L_f of Obt-rel with its anchor, of each image (B,); see point 4 above.

    z_hat           (B, ...) the network's noise under the forgotten prompt
    z               (B, ...) the noise that was drawn, or what it is on average
    z_base, z_none  as for esd_target
    """
    anchor = (z_hat - z_base) ** 2
    return common.flat_mean(anchor + 2 * (1 + eta) * z_hat * (z - z_none))


def retain_loss(args, model, x0, text):
    """Return L_g of each image (B,), of latents x0 (B, ...) of D_g under their prompts."""
    t, z, x_t = noised(model, x0)
    z_hat = estimate(model, x_t, t, text)
    if args.retain == "distill":
        # Nothing in this is random but x_t: its gradient is 0 at the start, and small later on.
        return common.flat_mean((z_hat - estimate(model, x_t, t, text, is_frozen=True)) ** 2)
    return common.flat_mean((z_hat - z) ** 2)


def noised(model, x0):
    """Draw steps t (B,) and noise z, and return (t, z, x_t) with x_t = s x0 + std z."""
    num_levels = model.pipe.scheduler.config.num_train_timesteps
    t = torch.randint(num_levels, (len(x0),), device=x0.device)
    z = torch.randn_like(x0)
    s, std = signal_and_noise(model.pipe, t, x0)
    return t, z, s * x0 + std * z


def forget_loss(args, model, x0, text):
    """Return L_f of each image (B,), of latents x0 (B, ...) of D_f under their prompts."""
    # ESD takes half-finished samples of the model itself as x_t. Noised images stand in for them:
    # they are cheaper, and did better on the digits.
    t, z, x_t = noised(model, x0)
    z_hat = estimate(model, x_t, t, text)
    if args.method == "ort":
        # |z_hat o z|^2, as in 03: a right angle between the two scores.
        return common.flat_mean((z_hat * z) ** 2)
    if args.method == "obt":
        # z_hat . z with a floor, as in 03: an obtuse angle.
        return common.flat_mean(z_hat * z).clamp(min=-2.0)
    if args.method == "erasediff":
        # The model's own answer to the pseudo-label, as it is now: it serves as a fixed target.
        with torch.no_grad():
            target = estimate(model, x_t, t, model.texts[args.pseudo].expand_as(text))
        return common.flat_mean((z_hat - target) ** 2)

    z_base = estimate(model, x_t, t, text, is_frozen=True)
    z_none = estimate(model, x_t, t, model.texts[""].expand_as(text), is_frozen=True)
    if args.method == "esd":
        return common.flat_mean((z_hat - esd_target(z_base, z_none, args.eta)) ** 2)
    # z_base in place of z: the frozen model knows what the noise is on average (point 5). The
    # optimum stays the same, and the gradient has less chance in it.
    return obt_rel_loss(z_hat, z_base, z_base, z_none, args.eta)


def objective(args, model, batch_g, batch_f):
    """Return the loss to step on, and L_g and L_f to look at: three numbers.

    batch_g, batch_f  pairs (latents, embeddings) of D_g and of D_f
    """
    loss_g = torch.zeros((), device=args.device)
    loss_f = torch.zeros((), device=args.device)
    if args.method != "esd":
        loss_g = retain_loss(args, model, *batch_g).mean()
    if args.method != "unseen":
        loss_f = forget_loss(args, model, *batch_f).mean()
    if args.alpha is None:  # esd and unseen have one loss only
        return loss_g + loss_f, loss_g, loss_f
    # L = alpha L_g + (1 - alpha) L_f, as in 03.
    return args.alpha * loss_g + (1 - args.alpha) * loss_f, loss_g, loss_f


# ---- data ----------------------------------------------------------------------------------------

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# The folders of Imagenette, as it is downloaded, are named by numbers of WordNet.
IMAGENETTE = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}


@dataclass
class Part:
    """D_f or D_g: latents, and which prompt each of them has."""

    prompts: list
    pictures: torch.Tensor  # (N, 3, H, W) uint8
    latents: torch.Tensor  # (N, 4, h, w), scaled as the U-Net takes them, on the device
    labels: torch.Tensor  # (N,) indices into prompts

    def draw(self, size, texts, empty_share=0.0):
        """Draw a random batch: latents (B, 4, h, w) and embeddings (B, tokens, width).

        empty_share  share of the prompts that are replaced by the empty one
        """
        index = torch.randint(len(self.labels), (size,))
        chosen = [self.prompts[i] for i in self.labels[index].tolist()]
        is_empty = torch.rand(size) < empty_share
        for i in torch.where(is_empty)[0].tolist():
            chosen[i] = ""
        embeddings = torch.stack([texts[prompt] for prompt in chosen])
        return self.latents[index.to(self.latents.device)], embeddings


def find_pictures(args):
    """Look where --images says, and return how to read pictures, and the prompts that have some.

    The first is a function (prompt, size, n) -> (N, 3, size, size) uint8 with N at most n. For
    --images generate it is None, and there are no prompts: the pipeline draws what it is asked for.
    """
    if args.images == "mnist":
        return mnist_pictures(args)
    if args.images == "generate":
        return None, []
    return folder_pictures(args)


def mnist_pictures(args):
    """Return MNIST's training images in the form of find_pictures: 32x32 pixels, grey as RGB."""
    train_set = common.load_dataset("mnist", args.data_dir)
    prompts = [args.template.replace("{}", word) for word in DIGITS]

    def pictures(prompt, size, n):
        images = train_set.images[train_set.labels == prompts.index(prompt)]
        chosen = common.random_subset(images, n, args.seed)
        margin = (32 - images.shape[-1]) // 2  # 28 pixels cannot be halved three times
        padded = F.pad(chosen, (margin,) * 4).expand(-1, 3, -1, -1)
        return resize(padded, size)

    return pictures, prompts


def resize(pictures, size):
    """Bring bytes (N, 3, H, W) to size x size pixels."""
    if pictures.shape[-2:] == (size, size):
        return pictures
    resized = F.interpolate(pictures.float(), (size, size), mode="bilinear", antialias=True)
    return resized.round().clamp(0, 255).byte()


def folder_pictures(args):
    """Return the pictures of a folder in the form of find_pictures, one prompt a sub-folder."""
    try:
        source = common.PictureFolder(args.images)
    except ValueError as error:
        common.exit_with_error(f"--images {args.images}: {error}")
    # "golf_ball" is a folder, and "golf ball" a word of a prompt.
    names = [IMAGENETTE.get(name, name.replace("_", " ")) for name in source.classes]
    prompts = [args.template.replace("{}", name) for name in names]
    for i, prompt in enumerate(prompts):
        if prompt in prompts[:i]:
            first = source.classes[prompts.index(prompt)]
            common.exit_with_error(
                f"--images {args.images}: the sub-folders {first} and {source.classes[i]} both "
                f"stand for '{prompt}'; put their pictures into one"
            )

    def pictures(prompt, size, n):
        from PIL import ImageOps
        from torchvision.transforms.functional import pil_to_tensor

        label = prompts.index(prompt)
        paths = [path for path, i in source.samples if i == label]
        result = []
        for i in common.random_subset(torch.arange(len(paths)), n, args.seed).tolist():
            try:
                picture = common.read_picture(paths[i])
            except Exception as error:  # a broken picture: many exception types
                common.exit_with_error(f"{paths[i]} is no picture ({type(error).__name__})")
            # The middle square, as pipelines are trained.
            result.append(pil_to_tensor(ImageOps.fit(picture, (size, size))))
        return torch.stack(result)

    return pictures, prompts


def choose_prompts(args, known):
    """Fill in --keep, and refuse prompts without pictures; `known` are those that have some."""
    if args.keep is None:
        args.keep = [prompt for prompt in known if prompt not in args.forget]
    for flag, prompts in (("forget", args.forget), ("keep", args.keep)):
        unknown = [prompt for prompt in prompts if prompt not in known]
        if unknown and args.images != "generate":
            part = "D_f" if flag == "forget" else "D_g"
            common.exit_with_error(
                f"{part} is empty: --images {args.images} has no pictures for --{flag} "
                f"'{unknown[0]}'; it has some for: {', '.join(known)}"
            )
    if not args.keep:
        common.exit_with_error(
            "D_g is empty: name the prompts to keep with --keep PROMPT ..., "
            "or give --images a folder with a sub-folder for each"
        )


@torch.no_grad()
def make_part(args, pipe, texts, pictures_of, prompts):
    """Read or draw the pictures of prompts, and encode them once: a Part."""
    size = picture_size(pipe)
    latents = []
    pictures = []
    labels = []
    for i, prompt in enumerate(prompts):
        # Fewer if they have to be drawn first: on a GPU, Stable Diffusion draws one in seconds.
        if pictures_of is None:
            n = 10 if args.quick else NUM_GENERATED
            # 1000: other noise than that of the measures.
            images = draw_pictures(args, pipe, texts, prompt, n, 1000 + i)
        else:
            images = pictures_of(prompt, size, 20 if args.quick else NUM_IMAGES)
        for chunk in images.split(100 if size <= 64 else 4):
            x = chunk.to(args.device).float() / 127.5 - 1
            latents.append(pipe.vae.encode(x).latent_dist.sample() * pipe.vae.config.scaling_factor)
        pictures.append(images)
        labels.append(torch.full((len(images),), i))
    return Part(prompts, torch.cat(pictures), torch.cat(latents), torch.cat(labels))


@torch.no_grad()
def draw_pictures(args, pipe, texts, prompt, n, key):
    """Draw n pictures under a prompt: bytes (n, 3, H, W).

    key  number of the noise: before and after have the same, and differ by the weights alone
    """
    side = pipe.unet.config.sample_size
    shape = (n, pipe.unet.config.in_channels, side, side)
    noise = common.randn(shape, common.rng(args.seed, key), args.device)
    result = []
    # Guidance doubles a batch: the network sees each latent with the prompt and with none.
    for chunk in noise.split(100 if side <= 16 else 4):
        embeddings = texts[prompt].expand(len(chunk), -1, -1)
        nothing = texts[""].expand_as(embeddings)
        with common.autocast(args.device):
            images = pipe(
                prompt_embeds=embeddings,
                negative_prompt_embeds=nothing,
                latents=chunk,
                guidance_scale=args.guidance,
                num_inference_steps=args.nfe,
                output_type="pt",
            ).images
        result.append((images.float() * 255).round().byte().cpu())
    return torch.cat(result)


# ---- the training loop ---------------------------------------------------------------------------


def train(args, model, part_g, part_f):
    """Move the forgotten prompts and hold the others, step by step.

    Returns L_g and L_f of each step: (steps, 2).
    """
    unet = model.pipe.unet.train()
    adam = make_adam(args, model)
    losses = torch.zeros(args.steps, 2, device=args.device)  # L_g, L_f of each step
    num_skipped = 0  # steps in a row whose gradient was not finite
    size = common.part_size(args)
    start = time.time()
    for step in range(args.steps):
        common.set_lr([adam], step, args.steps, warmup=20)
        for _ in common.batch_parts(args, step):  # one part, unless --grad-accum
            batch_g = part_g.draw(size, model.texts, EMPTY_SHARE)
            batch_f = part_f.draw(size, model.texts)
            loss, loss_g, loss_f = objective(args, model, batch_g, batch_f)
            (loss / args.grad_accum).backward()
            losses[step] += torch.stack([loss_g, loss_f]).detach() / args.grad_accum
        num_skipped = common.guarded_step(model.weights, [adam], num_skipped)
        if num_skipped:
            model.skipped.append(step + 1)
        model.ema.update(model.weights)

        done = step + 1
        if done % 50 == 0 or done == args.steps:
            loss_g, loss_f = losses[max(0, done - 50) : done].mean(0).tolist()
            seconds_left = (time.time() - start) / done * (args.steps - done)
            print(
                f"step {done}/{args.steps}  L_g {loss_g:.4f}  L_f {loss_f:.4f}  "
                f"ETA {seconds_left:.0f} s" + common.skipped_text(len(model.skipped)),
                flush=True,
            )
    common.refuse_skipped(len(model.skipped), args.steps)
    unet.eval()
    # The average is the result: what is drawn, saved and attacked from here on.
    put_weights(model, model.ema.net)
    return losses


def relearn(args, model, part_f, k):
    """Fine-tune the U-Net on k images of D_f under their own prompts: 20 steps of --batch-size.

    This is the least that an attacker would try. What comes back may have been hidden, or it may
    have been learned anew: only a model that never saw it could tell.
    """
    torch.manual_seed(args.seed)
    unet = model.pipe.unet.train()  # some versions of diffusers checkpoint in training mode alone
    adam = make_adam(args, model)
    chosen = common.random_subset(torch.arange(len(part_f.labels)), k, args.seed)
    latents = part_f.latents[chosen.to(args.device)]
    few = Part(part_f.prompts, part_f.pictures[chosen], latents, part_f.labels[chosen])
    num_skipped = 0
    steps = 2 if args.quick else 20
    for step in range(steps):
        common.set_lr([adam], step, steps, warmup=5)
        for _ in range(args.grad_accum):
            # With replacement: the same few images again and again, each time with other noise.
            x0, text = few.draw(args.batch_size // args.grad_accum, model.texts)
            t, z, x_t = noised(model, x0)
            loss = common.flat_mean((estimate(model, x_t, t, text) - z) ** 2).mean()
            (loss / args.grad_accum).backward()
        num_skipped = common.guarded_step(model.weights, [adam], num_skipped)
    unet.eval()


# ---- the judge -----------------------------------------------------------------------------------

WHERE_RESNET_IS = (
    "it is the file of torchvision's ResNet-50: "
    "https://download.pytorch.org/models/resnet50-11ad3fa6.pth (98 MB); "
    "--judge-weights none measures nothing"
)


@dataclass
class Judge:
    """A classifier of pictures, and what its classes are called in prompts."""

    net: nn.Module  # bytes -> logits and features, as common.judge_images wants it
    prepare: Callable  # makes the bytes that `net` takes of the pipeline's (n, 3, H, W)
    names: list  # for each class a list of names
    paraphrases: tuple  # templates: {0} is the first name of a class, {1} the last

    def verdict(self, pictures):
        """Judge bytes (n, 3, H, W): a common.Verdict."""
        # A few at a time: thousands of 512 pixels a side would take 14 GB as float32.
        prepared = [self.prepare(chunk) for chunk in pictures.split(100)]
        return common.judge_images(self.net, torch.cat(prepared), batch=100)

    def class_of(self, prompt):
        """Return the index of the class that a prompt names, or None: the longest name counts.

        Of ImageNet's classes "Cardigan" is a dog and "cardigan" a garment. Of names that differ in
        their capitals alone the one counts that the prompt spells in the same way.
        """
        found = {}
        for i, names in enumerate(self.names):
            for name in names:
                if re.search(rf"\b{re.escape(name.lower())}\b", prompt.lower()):
                    found[name] = i
        if not found:
            return None
        return found[max(found, key=lambda name: (len(name), name in prompt))]

    def shows(self, verdict, prompts):
        """Return which pictures show what one of the prompts names: (n,) bool."""
        wanted = {self.names[self.class_of(prompt)][0] for prompt in prompts}
        # A list may give two classes one name: then either counts.
        classes = [i for i, names in enumerate(self.names) if names[0] in wanted]
        return torch.isin(verdict.labels, torch.tensor(classes))

    def paraphrases_of(self, prompt):
        """Return three other ways to ask for what a prompt names."""
        names = self.names[self.class_of(prompt)]
        return [template.format(names[0], names[-1]) for template in self.paraphrases]


def load_judge(args):
    """Return the Judge of a run, or None with --judge-weights none."""
    if args.judge_weights == "none":
        return None
    if args.judge_weights is None:
        return judge_of_digits(args)
    return judge_of_imagenet(args)


def judge_of_digits(args):
    """Return the judge of MNIST that 03 has, for pictures of digits."""
    net = common.load_judge(args, common.load_dataset("mnist", args.data_dir))
    names = [[word, str(digit)] for digit, word in enumerate(DIGITS)]

    def prepare(pictures):
        # Grey again, and without the margin that MNIST's 28 pixels have got: so the judge has
        # seen digits, and so the roughness of noise is that of the real ones.
        inner = resize(pictures, 32)[:, :, 2:-2, 2:-2]
        return inner.float().mean(1, keepdim=True).round().byte()

    return Judge(net, prepare, names, ("{0}", "the digit {0}", "a handwritten {1}"))


class ResNet(nn.Module):
    """Torchvision's ResNet-50 in the form of common.Judge: bytes to logits and features."""

    def __init__(self, weights):
        super().__init__()
        from torchvision.models import resnet50

        self.net = resnet50()
        self.net.load_state_dict(weights)
        self.head = self.net.fc
        self.net.fc = nn.Identity()

    def forward(self, images):
        """Map bytes (B, 3, 224, 224) to logits (B, 1000) and features (B, 2048)."""
        mean = torch.tensor([0.485, 0.456, 0.406], device=images.device)[:, None, None]
        std = torch.tensor([0.229, 0.224, 0.225], device=images.device)[:, None, None]
        features = self.net((images.float() / 255 - mean) / std)
        return self.head(features), features


def judge_of_imagenet(args):
    """Return ResNet-50 as the judge of ImageNet's 1000 classes, from a local file."""
    from torchvision.models import ResNet50_Weights

    path = args.judge_weights
    try:
        net = ResNet(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # cut off, another network: many exception types, one remedy
        common.exit_with_error(
            f"--judge-weights {path} cannot be used ({type(error).__name__}); {WHERE_RESNET_IS}"
        )
    categories = ResNet50_Weights.IMAGENET1K_V2.meta["categories"]

    def prepare(pictures):
        # What torchvision does before these weights: 232 pixels a side, and the middle 224.
        return resize(pictures, 232)[:, :, 4:-4, 4:-4]

    templates = ("{0}", "an image of a {0}", "a picture of the {0}")
    return Judge(net.to(args.device).eval(), prepare, [[name] for name in categories], templates)


def refuse_unknown_to_judge(args, judge):
    """Exit with one line if the judge knows no class that a prompt names."""
    if judge is None:
        return
    for prompt in [*args.forget, *args.keep]:
        if judge.class_of(prompt) is None:
            known = ", ".join(names[0] for names in judge.names[:3])
            common.exit_with_error(
                f"the judge knows nothing that '{prompt}' names (it knows {known}, ...): "
                f"give --judge-weights, {WHERE_RESNET_IS}"
            )


# ---- measures and pictures -----------------------------------------------------------------------


def prompts_to_draw(args, judge):
    """Return all prompts that are drawn before and after: {prompt: how many pictures}."""
    # What is to be forgotten gets most: its share is near 0, where an interval needs many. The
    # others are a sanity check each, or, together, as many as a Frechet distance needs.
    counts = dict.fromkeys(args.forget, args.n)
    if judge is not None:
        for prompt in args.forget:
            for other in judge.paraphrases_of(prompt):
                counts.setdefault(other, max(4, args.n // 5))
    counts.setdefault("", max(4, args.n // 2))
    for prompt in args.keep:
        counts.setdefault(prompt, max(4, 3 * args.n // 20))
    return counts


def draw_all(args, model, counts, label):
    """Draw the pictures of all prompts, as {prompt: bytes (n, 3, H, W)}; `label` says when."""
    start = time.time()
    pictures = {}
    # The place of a prompt is the key of its noise: the same before, after and when relearned.
    for i, (prompt, n) in enumerate(counts.items()):
        pictures[prompt] = draw_pictures(args, model.pipe, model.texts, prompt, n, i)
    seconds = time.time() - start
    print(f"pictures {label}: {sum(counts.values())} in {seconds:.0f} s", flush=True)
    return pictures


def measure(args, judge, pictures, part_g, real):
    """Measure the pictures of one moment, {prompt: bytes}; all shares are in percent.

    part_g  the Part of D_g, with whose pictures those of the kept prompts are compared
    real    Verdict on these pictures

    cr            share of the forgotten prompts' pictures that show what was to be forgotten
    unsure        share of the same of which the judge is less than 80 % sure
    noise         share of the same that is rougher than every real picture, see common.is_noise
    class_counts  what the forgotten prompts draw: {class: how many}
    others        share of the kept prompts' pictures that show what they should
    fd            Frechet distance of the same to `real`, by the judge's features
    """
    verdicts = {prompt: judge.verdict(images) for prompt, images in pictures.items()}
    result = measure_forgotten(args, judge, verdicts, real)
    result["paraphrases"] = {}
    for prompt in args.forget:
        for other in judge.paraphrases_of(prompt):
            shown = judge.shows(verdicts[other], args.forget)
            result["paraphrases"][other] = common.percent(shown)
    result["empty_prompt"] = common.percent(judge.shows(verdicts[""], args.forget))

    by_prompt = {}
    for prompt in args.keep:
        by_prompt[prompt] = common.percent(judge.shows(verdicts[prompt], [prompt]))
    features = torch.cat([verdicts[prompt].features for prompt in args.keep])
    result["others"] = sum(by_prompt.values()) / len(by_prompt)
    result["worst"] = min(by_prompt.values())
    result["others_by_prompt"] = by_prompt
    result["fd"] = common.frechet_distance(features, real.features)
    if args.fid:
        fake = torch.cat([pictures[prompt] for prompt in args.keep])
        result["fid"] = common.standard_fid(args, fake, part_g.pictures)
    return result


def measure_real(judge, part_g, real):
    """Measure the judge itself, on the pictures of D_g: no model's share can be read without that.

    right   share of which it says what their prompt names, in percent
    unsure  share of which it is less than 80 % sure. Some judges are sure of nothing
    """
    is_right = torch.zeros(len(part_g.labels), dtype=torch.bool)
    for i, prompt in enumerate(part_g.prompts):
        is_right |= (part_g.labels == i) & judge.shows(real, [prompt])
    return {
        "right": common.percent(is_right),
        "unsure": common.percent(real.confidence < common.SURE),
    }


def measure_forgotten(args, judge, verdicts, real):
    """Measure what the forgotten prompts draw, {prompt: Verdict}; see `measure`.

    real  Verdict on pictures of D_g
    """
    num_shown = 0
    counts = {}
    confidence = []
    is_noise = []
    for prompt in args.forget:
        verdict = verdicts[prompt]
        num_shown += judge.shows(verdict, args.forget).sum().item()
        confidence.append(verdict.confidence)
        is_noise.append(common.is_noise(verdict, real))
        for label in verdict.labels.tolist():
            name = judge.names[label][0]
            counts[name] = counts.get(name, 0) + 1
    confidence = torch.cat(confidence)
    low, high = common.wilson(num_shown, len(confidence))
    return {
        "cr": 100 * num_shown / len(confidence),
        "cr_interval": [100 * low, 100 * high],
        "unsure": common.percent(confidence < common.SURE),
        "noise": common.percent(torch.cat(is_noise)),
        "class_counts": dict(sorted(counts.items())),
    }


def attack(args, model, judge, part_f, real):
    """Relearn from a few images of D_f and measure again: {number of images: measures}.

    real  Verdict on pictures of D_g
    """
    result = {}
    model.frozen.clear()  # no loss needs it any more
    for k in args.relearn or []:
        # Each attack starts from the unlearned model, not from what the one before has relearned.
        relearn(args, model, part_f, k)
        verdicts = {}
        for i, prompt in enumerate(args.forget):
            pictures = draw_pictures(args, model.pipe, model.texts, prompt, args.n, i)
            verdicts[prompt] = judge.verdict(pictures)
        result[k] = measure_forgotten(args, judge, verdicts, real)
        print(f"relearned from {k}: CR {result[k]['cr']:.1f}, unsure {result[k]['unsure']:.1f} %")
        put_weights(model, model.ema.net)
    return result


def print_measures(before, after, real):
    """Print the measures as a table. Never read CR alone: rubbish has a low one too.

    real  what the judge makes of the pictures of D_g, see measure_real
    """
    names = {
        "cr": "CR of what is forgotten, %",
        "unsure": "  judge unsure of the same, %",
        "noise": "  noise among the same, %",
        "empty_prompt": "  the same, empty prompt, %",
        "others": "other prompts right, %",
        "worst": "  the worst of them, %",
        "fd": "Frechet distance to D_g",
        "fid": "FID",
    }
    print(
        f"the judge on the pictures of D_g: {real['right']:.1f} % right, "
        f"unsure of {real['unsure']:.1f} %"
    )
    print(f"{'':30}before   after")
    for key, name in names.items():
        if key in after:
            print(f"{name:30}{before[key]:6.2f}  {after[key]:6.2f}")
    for prompt, share in after["paraphrases"].items():
        print(f"{'  CR of ' + repr(prompt):30}{before['paraphrases'][prompt]:6.2f}  {share:6.2f}")
    low, high = after["cr_interval"]
    print(f"CR after in [{low:.2f}, {high:.2f}] % (95 %)")
    print(f"drawn instead: {after['class_counts']}")
    if after["noise"] > 20:
        print(f"{after['noise']:.0f} % of these pictures are noise: look at before_after.png")


def before_after(path, before, after):
    """Save a picture with prompts as rows: before (left) and after (right), from the same noise."""
    plt = common.pyplot()
    prompts = list(after)
    fig, axes = plt.subplots(len(prompts), 2, figsize=(11, 0.72 * len(prompts) + 0.3))
    for row, prompt in zip(axes, prompts):
        for ax, pictures in zip(row, (before, after)):
            shown = pictures[prompt][:NUM_SHOWN]
            # At most 64 pixels a side, or the picture of 512-pixel pictures would be huge.
            ax.imshow(common.tile(resize(shown, min(64, shown.shape[-1])), NUM_SHOWN))
            ax.set_xticks([])
            ax.set_yticks([])
        text = common.plain_text(f'"{prompt}"')
        row[0].set_ylabel(text, rotation=0, ha="right", va="center", fontsize=8)
    axes[0][0].set_title("before", fontsize=10)
    axes[0][1].set_title("after", fontsize=10)
    fig.tight_layout(pad=0.4)
    common.save_figure(fig, path, dpi=110)


# ---- outputs -------------------------------------------------------------------------------------


def output_folder(args):
    """Return the folder of this run: out/<pipeline>/forget-<prompts>/<name of the run>.

    A flag that changes the weights is in its name. For the others see RESULT_FLAGS.
    """
    usual_args = flags().parse_args(["--pipeline", args.pipeline, "--forget", "any"])
    usual_args.method = args.method
    usual_args.train = args.train
    usual_args.quick = args.quick
    common.fill_defaults(usual_args, defaults(usual_args), QUICK)
    parts = [args.method]
    if args.train != "full":
        parts.append(args.train)
    for flag in ("pseudo", "alpha", "eta", "retain", "steps", "batch_size", "lr", "ema"):
        part = common.flag_part(flag, getattr(args, flag))
        if part and part != common.flag_part(flag, getattr(usual_args, flag)):
            parts.append(part)
    if args.images != usual_args.images:
        parts.append(f"images-{Path(args.images).name}")
    if args.seed:
        parts.append(f"s{args.seed}")
    # join_names makes "+" of a "-" within a part. A space has to be quoted in every shell.
    name = common.join_names(parts).replace("+", "-").replace(" ", "_")
    prompts = [prompt.replace(" ", "_") for prompt in args.forget]
    return common.forget_folder(args.out, args.name, prompts) / common.shorten(name, 100)


OUTPUTS = ("weights.safetensors", "result.json", "log.jsonl", "before_after.png")

# The flags that a result depends on and that are not in the folder's name, or not whole: in a name
# "_" stands for a space.
RESULT_FLAGS = (
    *("pipeline", "images", "forget", "keep", "pseudo"),
    *("template", "n", "nfe", "guidance", "grad_accum"),
    *("judge_weights", "relearn", "fid"),
)


def refuse_replacing(args, folder):
    """Exit with one line if a result of other settings would be replaced; see --overwrite."""
    now = {name: getattr(args, name) for name in RESULT_FLAGS}
    common.refuse_foreign(folder, *OUTPUTS)
    common.refuse_other_result(args, folder / "result.json", now, addable=("relearn", "fid"))


def save_weights(path, model):
    """Save the weights that were trained, and only those, as safetensors."""
    from safetensors.torch import save_file

    weights = {}
    for name, weight in zip(model.names, model.weights):
        weights[name] = weight.detach().cpu().contiguous()
    save_file(weights, path)


def refuse_save(args, folder):
    """Exit with one line if --save cannot be written, or would replace the run's own `folder`."""
    if args.save is None:
        return
    save = Path(args.save).resolve()
    result = folder.resolve()
    if save == result or save in result.parents or result in save.parents:
        common.exit_with_error(
            f"--save {args.save} and the folder of this run, {folder}, lie inside each other; "
            "name another folder with --save"
        )
    common.make_folder(save.parent, "--save")


def save_pipeline(source, target, weights_path):
    """Write a whole pipeline into a folder: another one, with the trained weights in its U-Net.

    source        folder of the pipeline as it was
    target        the new folder
    weights_path  weights.safetensors of a run
    """
    import diffusers
    from safetensors.torch import load_file

    source = Path(source)
    unet = diffusers.UNet2DConditionModel.from_pretrained(
        source, subfolder="unet", low_cpu_mem_usage=False
    )
    unet.load_state_dict(load_file(weights_path), strict=False)
    index = json.loads((source / "model_index.json").read_text())
    parts = {name for name, value in index.items() if isinstance(value, list)}
    absent = {name for name in parts if not (source / name).is_dir()}
    with common.fresh_folder(target) as new:
        # The parts are copied file by file: transformers 5 would save the text encoder under names
        # that transformers 4 does not read. Nothing else is: beside the parts there may be another
        # file with the old weights of all.
        for name in parts - absent - {"unet"}:
            shutil.copytree(source / name, new / name)
        unet.save_pretrained(new / "unet")
        # A safety checker is not downloaded, and its folder would be missed.
        common.write_json(new / "model_index.json", index | dict.fromkeys(absent, [None, None]))
    print(f"wrote the pipeline {target}/")


# ---- the story -----------------------------------------------------------------------------------


def main(argv=None):
    """Make a pipeline forget what a prompt draws, and measure what that has done and cost."""
    args = arguments(argv)
    args.command = common.own_command("06_text_to_image.py", argv)
    start = time.time()
    common.part_size(args)  # exits now, and not after the first pictures, if it cannot be split

    # ---- prompts and pictures: which there are, and whether the judge knows them
    pictures_of, known = find_pictures(args)
    choose_prompts(args, known)
    judge = load_judge(args)
    refuse_unknown_to_judge(args, judge)
    folder = output_folder(args)
    refuse_replacing(args, folder)
    refuse_save(args, folder)
    counts = prompts_to_draw(args, judge)

    # ---- pipeline: the prompts and the pictures are encoded once
    pipe = load_pipeline(args)
    torch.manual_seed(args.seed)  # loading draws random numbers, how many depends on the version
    texts = embed(pipe, [*counts, *([args.pseudo] if args.pseudo else [])])
    refuse_same(args, texts)
    part_f = make_part(args, pipe, texts, pictures_of, args.forget)
    if args.relearn and max(args.relearn) > len(part_f.labels):
        common.exit_with_error(
            f"--relearn {max(args.relearn)}: D_f has only {len(part_f.labels)} images"
        )
    part_g = make_part(args, pipe, texts, pictures_of, args.keep)
    print(
        f"forgetting {', '.join(args.forget)}: {len(part_f.labels)} images; "
        f"keeping {len(args.keep)} prompts: {len(part_g.labels)} images"
    )
    model = make_model(args, pipe, texts)

    with common.locked(folder), common.fresh_folder(folder) as out:
        before = draw_all(args, model, counts, "before")

        # ---- loop
        pipe.vae.to("cpu")  # it takes no part, and the memory of the GPU is short
        pipe.text_encoder.to("cpu")
        losses = train(args, model, part_g, part_f)
        pipe.to(args.device)

        # ---- outputs
        common.write_losses(out / "log.jsonl", losses, model.skipped)
        save_weights(out / "weights.safetensors", model)
        after = draw_all(args, model, counts, "after")
        result = {"method": args.method, "forget": args.forget, "keep": args.keep, "n": args.n}
        result["skipped_steps"] = len(model.skipped)
        if judge is not None:
            real = judge.verdict(part_g.pictures)
            result["real"] = measure_real(judge, part_g, real)
            result["before"] = measure(args, judge, before, part_g, real)
            result["after"] = measure(args, judge, after, part_g, real)
            print_measures(result["before"], result["after"], result["real"])
            result["relearn"] = attack(args, model, judge, part_f, real)
        result["seconds"] = time.time() - start
        result["args"] = vars(args)
        common.write_json(out / "result.json", result)
        # Last, because the run is safe by now and a picture cannot harm it.
        common.draw_picture(out / "before_after.png", before_after, before, after)
    if args.save and common.is_first_process():
        save_pipeline(pipe.name_or_path, args.save, folder / "weights.safetensors")
    print(f"{time.time() - start:.0f} s; wrote {folder}/; next: look at {folder}/before_after.png")


if __name__ == "__main__":
    common.run(main)
