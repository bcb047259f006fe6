"""Train data/mnist_t2i/: a text-to-image pipeline of 4 MB in the very format of Stable Diffusion.

    python tests/make_tiny_pipeline.py                 # 10 minutes; started again, it goes on
    python tests/make_tiny_pipeline.py --out FOLDER    # somewhere else than data/mnist_t2i

The shipped folder was made by this program. 06_text_to_image.py takes any StableDiffusionPipeline,
and this one is small enough for a CPU: every step of 06 can be run and tested on it. It draws
handwritten digits of 32x32 pixels from captions such as "a photo of a three".

It needs two packages more than the project: pip install diffusers transformers
"""

import argparse
import itertools
import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import common  # only now: the line above says where it is

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "a photo of a {}",
    "{}",
    "the digit {}",
    "a handwritten {}",
    "a picture of the number {}",
    "an image of a {}",
)
NUM_TOKENS = 16  # the longest caption has 8, with a token at each end
DROPPED = 0.1  # share of the captions that training replaces by the empty one
VAE_STEPS = 1500
UNET_STEPS = 1150
SAVE_EVERY = 50  # steps between two saved states of a training


# ---- captions ------------------------------------------------------------------------------------


def captions():
    """List what each digit may be called: 10 lists, of six templates x (word, numeral)."""
    result = []
    for digit, word in enumerate(WORDS):
        names = [template.format(word) for template in TEMPLATES]
        names += [template.format(digit) for template in TEMPLATES]
        result.append(names)
    return result


def vocabulary():
    """Return CLIP's two tables for these captions: {token: number}, and the list of merges.

    A word starts as its letters, the last one with the mark </w>. A merge joins two neighbours. A
    word of the captions becomes one token in the end, and any other stays in letters.
    """
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges = []
    words = dict.fromkeys(" ".join(names[0] for names in captions()).split())
    words |= dict.fromkeys(" ".join(TEMPLATES).replace("{}", "").split())
    for word in words:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        joined = parts[0]
        for part in parts[1:]:
            merges.append(f"{joined} {part}")
            joined += part
            tokens.append(joined)
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}, list(dict.fromkeys(merges))


def make_tokenizer(folder):
    """Write the tokenizer's files into a folder, and return the tokenizer that reads them."""
    vocab, merges = vocabulary()
    common.make_folder(folder)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    end = "<|endoftext|>"
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": NUM_TOKENS,
        "bos_token": "<|startoftext|>",
        "eos_token": end,
        "pad_token": end,
        "unk_token": end,
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    special = {name: config[name] for name in config if name.endswith("_token")}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=1))
    return CLIPTokenizer.from_pretrained(folder)


# ---- networks ------------------------------------------------------------------------------------


def make_vae():
    """Make the autoencoder: 3x32x32 pixels to 4x8x8 latents and back, 0.17 M weights."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=32,
    )


def make_text_encoder(num_words, end, width=64):
    """Make the text encoder, 0.08 M weights, for so many tokens; `end` is the number of the last.

    CLIP's summary of a text is what stands at its end, so the encoder has to know that token.
    """
    config = CLIPTextConfig(
        vocab_size=num_words,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=NUM_TOKENS,
        projection_dim=width,
        bos_token_id=end - 1,
        eos_token_id=end,
        pad_token_id=end,
    )
    return CLIPTextModel(config)


def make_unet():
    """Make the U-Net, 1.8 M weights: 4x8x8 latents, cross-attention at the finer resolution."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(48, 96),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=4,  # in this class it is the number of heads
        norm_num_groups=8,
    )


def make_scheduler():
    """Make the noise schedule of Stable Diffusion v1.4, with its own sampler."""
    return PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        set_alpha_to_one=False,
        skip_prk_steps=True,
        steps_offset=1,
    )


# ---- training ------------------------------------------------------------------------------------


@dataclass
class Training:
    """A training that can be stopped and goes on where its last saved state was."""

    path: Path  # of the saved state
    net: torch.nn.Module
    optimizers: list
    ema: common.EMA | None  # the average of net, or None
    steps: int  # how many there are
    warmup: int  # of the learning rate
    clip: float  # norm to which a longer gradient is shortened

    def run(self, compute_loss):
        """Take all steps that are missing; compute_loss() returns the loss of a random batch."""
        start = self.restore()
        began = time.time()
        for step in range(start, self.steps):
            torch.manual_seed(common.rng(0, step).initial_seed())  # the same after a stop
            common.set_lr(self.optimizers, step, self.steps, self.warmup)
            loss = compute_loss()
            loss.backward()
            common.guarded_step(self.net, self.optimizers, 0, self.clip)
            if self.ema is not None:
                self.ema.update(self.net)
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == self.steps:
                self.save(step + 1)
                seconds = (time.time() - began) / (step + 1 - start) * (self.steps - step - 1)
                text = f"{self.path.stem} step {step + 1}/{self.steps}  loss {loss.item():.4f}"
                print(f"{text}  ETA {seconds:.0f} s", flush=True)

    def save(self, step):
        """Save all that the next step depends on."""
        average = None if self.ema is None else self.ema.net.state_dict()
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        weights = self.net.state_dict()
        common.save_checkpoint(self.path, step=step, net=weights, ema=average, optimizers=states)

    def restore(self):
        """Load the saved state, if there is one, and return the number of steps it has seen."""
        if not self.path.exists():
            return 0
        state = torch.load(self.path, weights_only=True)
        self.net.load_state_dict(state["net"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        if self.ema is not None:
            self.ema.net.load_state_dict(state["ema"])
            self.ema.num_updates = state["step"]
        return state["step"]


def to_pixels(images):
    """Turn digits (B, 1, 28, 28) uint8 into (B, 3, 32, 32) on [-1, 1], as a VAE takes them.

    A VAE needs sides that its factor divides, so there is a margin of 2 black pixels.
    """
    padded = F.pad(images, (2, 2, 2, 2)).expand(-1, 3, -1, -1)
    return padded.float() / 127.5 - 1


def train_vae(vae, images, path):
    """Train the autoencoder on digits (N, 1, 28, 28): squared error, and a little of the KL."""
    optimizer = torch.optim.Adam(vae.parameters(), 3e-3, betas=(0.9, 0.99))

    def compute_loss():
        x = to_pixels(images[torch.randint(len(images), (32,))])
        posterior = vae.encode(x).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        # A mean over the values of a latent, so 2e-3 is its weight for each of them.
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return F.mse_loss(decoded, x) + 2e-3 * kl

    Training(path, vae, [optimizer], None, VAE_STEPS, 50, 1.0).run(compute_loss)
    vae.eval().requires_grad_(False)


@torch.no_grad()
def encode(vae, images):
    """Encode digits (N, 1, 28, 28) as means and standard deviations, both (N, 4, 8, 8)."""
    means = []
    stds = []
    for chunk in images.split(500):
        posterior = vae.encode(to_pixels(chunk)).latent_dist
        means.append(posterior.mean)
        stds.append(posterior.std)
    return torch.cat(means), torch.cat(stds)


def train_unet(unet, text_encoder, tokenizer, scheduler, latents, labels, path):
    """Train the U-Net and the text encoder together, to estimate the noise under a caption.

    latents  (means, stds), both (N, 4, 8, 8), scaled to a standard deviation of 1
    labels   (N,) the digits

    Returns the average of the two networks over the training, as one module.
    """
    both = torch.nn.ModuleDict({"unet": unet, "text": text_encoder})
    texts = [*itertools.chain(*captions()), ""]
    tokens = tokenizer(
        texts, padding="max_length", max_length=NUM_TOKENS, return_tensors="pt"
    ).input_ids  # (121, 16)
    num_names = len(captions()[0])
    inside = []
    others = []
    for name, weight in both.named_parameters():
        is_inside = weight.ndim >= 2 and name.startswith("unet") and "conv_in" not in name
        is_inside = is_inside and "conv_out" not in name and "time_emb" not in name
        group = inside if is_inside else others
        group.append(weight)
    optimizers = [
        common.Muon(inside, 0.02),
        torch.optim.Adam(others, 3e-3, betas=(0.9, 0.99), fused=True),
    ]
    means, stds = latents

    def compute_loss():
        index = torch.randint(len(labels), (64,))
        x0 = means[index] + stds[index] * torch.randn_like(means[index])
        which = labels[index] * num_names + torch.randint(num_names, (64,))
        which[torch.rand(64) < DROPPED] = len(texts) - 1
        t = torch.randint(1000, (64,))
        z = torch.randn_like(x0)
        # Each caption once: there are 121 of them, and 64 images.
        used, place = which.unique(return_inverse=True)
        embeddings = text_encoder(tokens[used])[0][place]
        z_hat = unet(scheduler.add_noise(x0, z, t), t, embeddings).sample
        return F.mse_loss(z_hat, z)

    training = Training(path, both, optimizers, common.EMA(both, 0.99), UNET_STEPS, 50, 1.0)
    training.run(compute_loss)
    return training.ema.net


# ---- the folder ----------------------------------------------------------------------------------


def save_pipeline(folder, vae, unet, text_encoder, tokenizer, scheduler):
    """Save a whole pipeline in half precision, readable by transformers 4 and 5 alike."""
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for network in (vae, unet, text_encoder):
        network.half()
    shutil.rmtree(folder, ignore_errors=True)
    pipe.save_pretrained(folder)
    make_tokenizer(folder / "tokenizer")  # transformers 5 leaves out vocab.json and merges.txt
    name_as_transformers_4(folder / "text_encoder/model.safetensors")


def name_as_transformers_4(path):
    """Give the weights of a text encoder the names that transformers 4 reads, and 5 as well.

    Version 5 saves them without the prefix. Version 4 then starts from random weights, and only
    warns about it.
    """
    weights = {}
    for name, weight in load_file(path).items():
        prefix = "" if name.startswith("text_model.") else "text_model."
        weights[prefix + name] = weight
    save_file(weights, path, metadata={"format": "pt"})


def arguments(argv):
    """Read the command line."""
    p = common.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--out",
        type=Path,
        default=common.HERE / "data/mnist_t2i",
        help="folder of the pipeline (default: data/mnist_t2i)",
    )
    p.add_argument(
        "--work",
        type=Path,
        default=common.HERE / "out/mnist_t2i_training",
        help="where a training that was stopped goes on (default: out/mnist_t2i_training)",
    )
    return p.parse_args(argv)


def main():
    args = arguments(sys.argv[1:])
    if args.out.exists() and not (args.out / "model_index.json").is_file():
        # The folder is replaced as a whole.
        common.exit_with_error(f"--out {args.out} is there and no pipeline: name another folder")
    common.use_all_cores()
    torch.manual_seed(0)
    common.make_folder(args.work)
    data = common.load_dataset("mnist")

    vae = make_vae()
    train_vae(vae, data.images, args.work / "vae.pt")
    means, stds = encode(vae, data.images)
    # The U-Net sees latents of standard deviation 1; the pipeline divides by this number again.
    scale = 1 / (means + stds * torch.randn_like(means)).std().item()
    vae.register_to_config(scaling_factor=scale)

    tokenizer = make_tokenizer(args.work / "tokenizer")
    scheduler = make_scheduler()
    torch.manual_seed(0)
    text_encoder = make_text_encoder(len(tokenizer), tokenizer.eos_token_id)
    average = train_unet(
        make_unet(),
        text_encoder,
        tokenizer,
        scheduler,
        (means * scale, stds * scale),
        data.labels,
        args.work / "unet.pt",
    )
    save_pipeline(args.out, vae, average["unet"], average["text"], tokenizer, scheduler)
    print(f"wrote {args.out}/")


if __name__ == "__main__":
    main()
