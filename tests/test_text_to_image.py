"""06: unlearning by prompts, on a tiny pipeline whose layers are called as in Stable Diffusion."""

import importlib.util
import json
import os
import shutil

import pytest
import t2i_table
import torch
from conftest import (
    ROOT,
    check_refusal,
    check_success,
    load_script,
    read_json,
    run_function,
    run_script,
)

import common

os.environ["HF_HUB_OFFLINE"] = "1"  # no test waits for a network

NAMES = load_script("06")
METHODS = list(NAMES["METHODS"])
FORGET = "a photo of a three"
KEEP = ("a photo of a one", "a photo of a two")
PSEUDO = "a photo of a eight"
NUM_LAYERS_OF_SD = 686  # tensors in the U-Net of Stable Diffusion v1.4


# ---- pipelines -----------------------------------------------------------------------------------


def make_tiny():
    """The names that tests/make_tiny_pipeline.py defines."""
    path = ROOT / "tests/make_tiny_pipeline.py"
    spec = importlib.util.spec_from_file_location("make_tiny_pipeline", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_random_pipeline(folder):
    """Save a pipeline of random weights: the blocks of Stable Diffusion v1.4, but 8 wide."""
    import diffusers

    tiny = make_tiny()
    torch.manual_seed(0)
    widths = (8, 16, 32, 32)  # of Stable Diffusion: 320, 640, 1280, 1280
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=widths,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=64,
    )
    tokenizer = tiny.make_tokenizer(folder.with_name("tokenizer"))
    text_encoder = tiny.make_text_encoder(len(tokenizer), tokenizer.eos_token_id, width=16)
    scheduler = tiny.make_scheduler()
    tiny.save_pipeline(folder, vae, unet, text_encoder, tokenizer, scheduler)
    return folder


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """The folder of a pipeline of random weights."""
    return write_random_pipeline(tmp_path_factory.mktemp("random") / "tiny")


def flags_of(pipeline, out, *more):
    """Flags of a short run on a pipeline of random weights."""
    argv = ["--pipeline", pipeline, "--forget", FORGET, "--keep", *KEEP, "--quick", "--out", out]
    return [*argv, "--nfe", 2, *more]


def run_06(pipeline, out, *more):
    """Make a short run -> (Run, the folder that it has written)."""
    run = run_script("06", *flags_of(pipeline, out, *more))
    check_success(run)
    (path,) = out.glob("quick/tiny/forget-a_photo_of_a_three/[!.]*/result.json")
    return run, path.parent


def prepared(pipeline, out, *more):
    """What `main` has made when the training begins -> (args, Model, D_g, D_f)."""
    argv = [str(value) for value in flags_of(pipeline, out, *more)]
    args = NAMES["arguments"](argv)
    pictures_of, known = NAMES["find_pictures"](args)
    NAMES["choose_prompts"](args, known)
    pipe = NAMES["load_pipeline"](args)
    torch.manual_seed(args.seed)
    texts = NAMES["embed"](pipe, ["", *args.forget, *args.keep, PSEUDO])
    part_f = NAMES["make_part"](args, pipe, texts, pictures_of, args.forget)
    part_g = NAMES["make_part"](args, pipe, texts, pictures_of, args.keep)
    return args, NAMES["make_model"](args, pipe, texts), part_g, part_f


def change_config(path, **entries):
    """Change entries of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def unet_weights(folder):
    """The weights of the U-Net of a saved pipeline, in float32."""
    from safetensors.torch import load_file

    weights = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    return {name: weight.float() for name, weight in weights.items()}


def method_flags(method):
    return ["--method", method, *(["--pseudo", PSEUDO] if method == "erasediff" else [])]


# ---- every method, every choice of weights -------------------------------------------------------


def test_the_layers_are_those_of_stable_diffusion(pipeline):
    names = unet_weights(pipeline)
    assert len(names) == NUM_LAYERS_OF_SD
    assert "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight" in names
    assert "up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_out.0.bias" in names


# Each method and each choice once; the other pairs take as long again, and run with --slow.
PAIRS = [(method, "full") for method in METHODS]
PAIRS += [("obt-rel", "xattn"), ("esd", "noxattn")]
for more in METHODS:
    for choice in ("xattn", "noxattn"):
        if (more, choice) not in PAIRS:
            PAIRS.append(pytest.param(more, choice, marks=pytest.mark.slow))


@pytest.mark.parametrize("method, train", PAIRS)
def test_every_method_trains_every_choice(method, train, pipeline, tmp_path, monkeypatch):
    from safetensors.torch import load_file

    # A picture takes a second of each run. The other tests draw it.
    monkeypatch.setattr(common, "draw_picture", lambda *_, **__: None)
    flags = [*method_flags(method), "--train", train, "--lr", 1e-2]
    _, folder = run_06(pipeline, tmp_path, *flags)
    written = {path.name for path in folder.iterdir()}
    assert written == {"weights.safetensors", "result.json", "log.jsonl"}

    before = unet_weights(pipeline)
    after = load_file(folder / "weights.safetensors")
    is_cross = {name: ".attn2." in name for name in before}
    wanted = {name for name in before if train == "full" or is_cross[name] == (train == "xattn")}
    assert set(after) == wanted
    assert any(not torch.equal(after[name], before[name]) for name in after)

    steps = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert len(steps) == 4
    assert all((step["loss_g"] == 0) == (method == "esd") for step in steps[1:])
    assert all((step["loss_f"] == 0) == (method == "unseen") for step in steps[1:])


def test_xattn_changes_attn2_alone(pipeline, tmp_path):
    """In the whole pipeline that is saved, not only in the list of what was trained."""
    saved = tmp_path / "saved"
    flags = ["--train", "xattn", "--lr", 1e-2, "--save", saved]
    run_06(pipeline, tmp_path / "out", *flags)
    before = unet_weights(pipeline)
    after = unet_weights(saved)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".attn2." in name for name in changed)
    assert set(after) == set(before)


# ---- what a run leaves ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(pipeline, tmp_path_factory):
    """A run with --save and --relearn -> (Run, its folder, the saved pipeline)."""
    out = tmp_path_factory.mktemp("finished")
    saved = out / "saved"
    run, folder = run_06(pipeline, out, "--save", saved, "--relearn", 1, "--lr", 1e-2)
    return run, folder, saved


def test_the_saved_pipeline_draws_the_same_picture(pipeline, finished, tmp_path):
    """diffusers alone, without 06, draws with the folder what 06 drew after the training."""
    import diffusers
    from safetensors.torch import load_file

    _, folder, saved = finished
    args, model, _, _ = prepared(pipeline, tmp_path)
    weights = load_file(folder / "weights.safetensors")
    NAMES["put_weights"](model, [weights[name] for name in model.names])
    ours = NAMES["draw_pictures"](args, model.pipe, model.texts, FORGET, 2, 0)

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(saved, low_cpu_mem_usage=False)
    pipe.to("cpu", torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pictures = pipe(
        [FORGET, FORGET],
        latents=torch.randn(2, 4, 8, 8, generator=common.rng(0, 0)),
        guidance_scale=args.guidance,
        num_inference_steps=args.nfe,
        output_type="pt",
    ).images
    theirs = (pictures * 255).round().byte()
    assert (ours.int() - theirs.int()).abs().max() <= 1


def test_the_saved_pipeline_differs_in_the_unet_alone(pipeline, finished):
    saved = finished[2]
    for path in pipeline.rglob("*"):
        if path.is_file() and path.parent.name != "unet":
            other = saved / path.relative_to(pipeline)
            if path.name == "model_index.json":
                assert read_json(other) == read_json(path)
            else:
                assert other.read_bytes() == path.read_bytes(), path


def test_the_saved_pipeline_holds_its_parts_and_nothing_else(pipeline, finished, tmp_path):
    """Beside the parts there may lie one file of the old weights, and parts that are missing."""
    import diffusers

    source = tmp_path / "source"
    shutil.copytree(pipeline, source)
    (source / "v1-4.ckpt").write_text("the old weights")
    change_config(source / "model_index.json", safety_checker=["diffusers", "Checker"])
    saved = tmp_path / "saved"
    NAMES["save_pipeline"](source, saved, finished[1] / "weights.safetensors")
    written = {path.name for path in saved.iterdir()}
    assert written == {path.name for path in pipeline.iterdir()}
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(saved, low_cpu_mem_usage=False)
    assert pipe.safety_checker is None


def test_result_holds_every_measure(finished):
    assert {path.name for path in finished[1].iterdir()} == set(NAMES["OUTPUTS"])
    result = read_json(finished[1] / "result.json")
    for moment in ("before", "after"):
        measures = result[moment]
        low, high = measures["cr_interval"]
        assert low <= measures["cr"] <= high
        assert sum(measures["class_counts"].values()) == result["n"]
        assert set(measures["others_by_prompt"]) == set(KEEP)
        assert measures["worst"] == min(measures["others_by_prompt"].values())
        assert list(measures["paraphrases"]) == ["three", "the digit three", "a handwritten 3"]
        assert {"unsure", "noise", "empty_prompt", "others", "fd"} <= set(measures)
    assert set(result["real"]) == {"right", "unsure"}
    assert set(result["relearn"]) == {"1"}
    assert set(result["relearn"]["1"]) == {"cr", "cr_interval", "unsure", "noise", "class_counts"}


def test_cr_is_never_printed_without_the_unsure_share(finished):
    lines = finished[0].out.splitlines()
    first = [i for i, line in enumerate(lines) if line.startswith("CR of what is forgotten")]
    assert "unsure" in lines[first[0] + 1]
    assert "noise" in lines[first[0] + 2]


def test_an_equal_seed_gives_equal_weights(pipeline, tmp_path):
    weights = []
    for seed in (1, 1, 2):
        flags = ("--seed", seed, "--steps", 2, "--lr", 1e-2)
        args, model, part_g, part_f = prepared(pipeline, tmp_path, *flags)
        NAMES["train"](args, model, part_g, part_f)
        weights.append(model.weights[0].detach())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_relearning_takes_the_parts_of_a_batch(pipeline, tmp_path, monkeypatch):
    """--grad-accum is there for a small memory, and the attack trains the same network."""
    args, model, _, part_f = prepared(pipeline, tmp_path, "--grad-accum", 2)
    noised = NAMES["noised"]
    seen = []

    def watched(model, x0):
        seen.append((len(x0), model.pipe.unet.training))
        return noised(model, x0)

    monkeypatch.setitem(NAMES["relearn"].__globals__, "noised", watched)
    NAMES["relearn"](args, model, part_f, 1)
    # Older versions of diffusers spare the memory of a network in training mode alone.
    assert seen == [(args.batch_size // 2, True)] * 4
    assert not model.pipe.unet.training


def test_each_attack_starts_from_the_unlearned_model(pipeline, tmp_path, monkeypatch):
    args, model, part_g, part_f = prepared(pipeline, tmp_path, "--relearn", 1, 5, "--lr", 1e-2)
    NAMES["train"](args, model, part_g, part_f)
    unlearned = [weight.detach().clone() for weight in model.weights]
    relearn = NAMES["relearn"]
    starts = []

    def watched(args, model, part_f, k):
        starts.append([weight.detach().clone() for weight in model.weights])
        relearn(args, model, part_f, k)
        assert not torch.equal(model.weights[0], unlearned[0])

    monkeypatch.setitem(NAMES["attack"].__globals__, "relearn", watched)
    judge = NAMES["load_judge"](args)
    NAMES["attack"](args, model, judge, part_f, judge.verdict(part_g.pictures))
    for start in [*starts, list(model.weights)]:
        assert all(torch.equal(a, b) for a, b in zip(start, unlearned))
    assert len(starts) == 2


def test_before_and_after_differ_by_the_weights_alone(pipeline, tmp_path):
    """Also if the pipeline's own sampler draws fresh noise in every step."""
    folder = tmp_path / "tiny"
    shutil.copytree(pipeline, folder)
    change_config(folder / "scheduler/scheduler_config.json", algorithm_type="sde-dpmsolver++")
    args, model, _, _ = prepared(folder, tmp_path)
    pictures = [
        NAMES["draw_pictures"](args, model.pipe, model.texts, FORGET, 2, 0) for _ in range(2)
    ]
    assert torch.equal(*pictures)


def test_another_concept_needs_no_judge(pipeline, tmp_path):
    out = tmp_path / "out"
    argv = ["--pipeline", pipeline, "--forget", "a cat", "--keep", "a dog", "--quick", "--nfe", 2]
    run = run_script("06", *argv, "--out", out, "--judge-weights", "none")
    check_success(run)
    (path,) = out.glob("quick/tiny/forget-a_cat/*/result.json")
    result = read_json(path)
    assert "after" not in result
    assert (path.parent / "before_after.png").exists()


def test_a_prompt_given_twice_counts_once(pipeline, tmp_path):
    """Its pictures are one sample: an interval of two would be too narrow."""
    argv = ["--pipeline", pipeline, "--forget", FORGET, FORGET, "--keep", *KEEP, KEEP[0]]
    args = NAMES["arguments"]([*map(str, argv), "--out", str(tmp_path)])
    assert args.forget == [FORGET]
    assert args.keep == list(KEEP)


def test_own_folders_of_pictures(pipeline, tmp_path):
    """A sub-folder is a prompt; those of Imagenette have numbers for names."""
    from PIL import Image

    root = tmp_path / "pictures"
    for name in ("n01440764", "church", "golf_ball"):
        (root / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (40, 30), (80 * i, 0, 0)).save(root / name / f"{i}.png")
    argv = ["--pipeline", pipeline, "--forget", "a photo of a tench", "--quick", "--nfe", 2]
    more = ["--images", root, "--judge-weights", "none", "--out", tmp_path / "out"]
    run = run_script("06", *argv, *more)
    check_success(run)
    assert "a photo of a tench: 3 images; keeping 2 prompts: 6 images" in run.out

    (root / "golf ball").mkdir()
    shutil.copy(root / "golf_ball/0.png", root / "golf ball/0.png")
    check_refusal(run_script("06", *argv, *more), "golf ball", "golf_ball", "into one")


# ---- the frozen model ----------------------------------------------------------------------------


@pytest.mark.parametrize("train", ["full", "xattn"])
def test_the_frozen_model_stays_as_it_was(train, pipeline, tmp_path):
    flags = ["--train", train, "--steps", 10, "--lr", 1e-2]
    args, model, part_g, part_f = prepared(pipeline, tmp_path, *flags)
    torch.manual_seed(1)
    x_t = torch.randn(3, 4, 8, 8)
    t = torch.tensor([10, 500, 990])
    text = model.texts[FORGET].expand(3, -1, -1)

    def both():
        with torch.no_grad():
            trained = NAMES["estimate"](model, x_t, t, text)
        return trained, NAMES["estimate"](model, x_t, t, text, is_frozen=True)

    trained, frozen = both()
    assert torch.equal(trained, frozen)
    NAMES["train"](args, model, part_g, part_f)
    trained_after, frozen_after = both()
    assert torch.equal(frozen_after, frozen)
    assert not torch.allclose(trained_after, frozen, atol=1e-4)


@pytest.mark.parametrize("train", ["full", "xattn"])
def test_on_cuda_the_trained_weights_lose_no_digit(train, pipeline, tmp_path, monkeypatch):
    """What make_model does for a GPU can be seen on a CPU, since it moves nothing."""
    args, model, part_g, part_f = prepared(pipeline, tmp_path, "--train", train)
    unet = model.pipe.unet.requires_grad_(False)
    before = {name: weight.detach().clone() for name, weight in unet.named_parameters()}
    args.device = "cuda:0"
    model = NAMES["make_model"](args, model.pipe, model.texts)
    for name, weight in unet.named_parameters():
        if name in model.names:
            assert torch.equal(weight, before[name])  # of the same type, too
        else:
            assert weight.dtype == torch.bfloat16
    assert unet.is_gradient_checkpointing

    monkeypatch.setattr(common, "autocast", lambda device: torch.autocast("cpu", torch.bfloat16))
    args.device = "cpu"
    unet.train()
    text = model.texts[FORGET].expand(3, -1, -1)
    t, _, x_t = NAMES["noised"](model, torch.randn(3, 4, 8, 8))
    both = [NAMES["estimate"](model, x_t, t, text, is_frozen) for is_frozen in (False, True)]
    assert torch.equal(*both)
    batch_g = part_g.draw(2, model.texts)
    loss, _, _ = NAMES["objective"](args, model, batch_g, part_f.draw(2, model.texts))
    loss.backward()
    assert loss.dtype == torch.float32
    for weight in model.weights:
        assert weight.grad.dtype == torch.float32
        assert weight.grad.isfinite().all()


def test_l_g_never_sees_the_forgotten_prompt(pipeline, tmp_path, monkeypatch):
    _, model, part_g, _ = prepared(pipeline, tmp_path)
    _, embeddings = part_g.draw(200, model.texts, empty_share=0.1)
    allowed = torch.stack([model.texts[prompt] for prompt in ("", *KEEP)])
    is_one = (embeddings[:, None] == allowed[None]).flatten(2).all(2)  # (200, 3)
    assert is_one.any(1).all()
    share = is_one.float().mean(0)
    assert share[0] == pytest.approx(0.1, abs=0.08)


# ---- the target ----------------------------------------------------------------------------------


def test_obt_rel_with_its_anchor_wants_what_esd_wants():
    """On a mixture of two classes: the optimum of obt_rel_loss, by quadrature, is ESD's target."""
    kind = {"dtype": torch.float64}
    means = torch.tensor([[-1.0], [1.5]], **kind)
    covs = torch.tensor([[[0.3]], [[0.5]]], **kind)
    weights = torch.tensor([0.7, 0.3], **kind)
    of_all = common.GaussianMixture(means, covs, weights)
    of_f = common.GaussianMixture(means[1:], covs[1:], weights[1:])
    eta = 1.3
    x_t = torch.linspace(-3, 3, 13, **kind)[:, None]
    sigma = torch.full((13,), 0.8, **kind)
    z_base = of_f.z_hat(x_t, sigma)
    z_none = of_all.z_hat(x_t, sigma)

    # All x0 of D_f that can lie behind an x_t, each with its own z and its probability.
    x0 = torch.linspace(-6, 9, 6001, **kind)
    z = (x_t - x0) / 0.8  # (13, 6001)
    log_p = -0.5 * z**2 - 0.5 * (x0 - 1.5) ** 2 / 0.5
    share = log_p.softmax(1)

    z_hat = torch.zeros(13, 1, **kind, requires_grad=True)
    grown = [value.expand_as(z).reshape(-1, 1) for value in (z_hat, z_base, z_none)]
    losses = NAMES["obt_rel_loss"](grown[0], z.reshape(-1, 1), grown[1], grown[2], eta)
    assert losses.shape == (z.numel(),), "one number for each latent"
    (grad,) = torch.autograd.grad((share * losses.reshape(z.shape)).sum(), z_hat)
    optimum = z_hat - grad / 2  # the loss is |z_hat|^2 + ..., so one step of Newton ends at it

    target = NAMES["esd_target"](z_base, z_none, eta)
    assert torch.allclose(optimum, target, atol=1e-8)
    assert not torch.allclose(target, z_base, atol=0.1)
    # ESD's own definition: beyond the empty prompt, on the other side.
    assert torch.allclose(target, z_none - eta * (z_base - z_none))


def test_obt_rel_pushes_by_the_noise_itself():
    """Its mean over D_f is all that ESD's target needs. A single L_f has the noise z in it."""
    z_hat, z, z_base, z_none = torch.randn(4, 3, 4, 2, 2, generator=common.rng(0))
    losses = NAMES["obt_rel_loss"](z_hat, z, z_base, z_none, 1.3)
    moved = NAMES["obt_rel_loss"](z_hat, z + 1, z_base, z_none, 1.3)
    want = 2 * 2.3 * z_hat.flatten(1).mean(1)
    torch.testing.assert_close(moved - losses, want, rtol=1e-4, atol=1e-4)


def test_without_chance_obt_rel_is_esd_up_to_a_constant():
    torch.manual_seed(0)
    z_base = torch.randn(4, 3, 8, 8)
    z_none = torch.randn(4, 3, 8, 8)
    target = NAMES["esd_target"](z_base, z_none, 1.0)
    differences = []
    for _ in range(2):
        z_hat = torch.randn(4, 3, 8, 8)
        loss = NAMES["obt_rel_loss"](z_hat, z_base, z_base, z_none, 1.0)
        differences.append(loss - common.flat_mean((z_hat - target) ** 2))
    assert torch.allclose(*differences, atol=1e-5)


def test_noise_is_added_as_the_pipeline_adds_it(pipeline, tmp_path):
    """Also after sampling, which leaves a scheduler with a few steps only."""
    import diffusers

    args, model, _, _ = prepared(pipeline, tmp_path)
    NAMES["draw_pictures"](args, model.pipe, model.texts, FORGET, 1, 0)
    own = diffusers.PNDMScheduler.from_pretrained(pipeline, subfolder="scheduler")
    x0 = torch.randn(3, 4, 8, 8)
    t, z, x_t = NAMES["noised"](model, x0)
    assert torch.allclose(x_t, own.add_noise(x0, z, t), atol=1e-5)


def test_v_prediction_is_turned_into_noise(pipeline, tmp_path):
    """Of a network that answers v = s z - std x0 the estimate is z."""
    _, model, _, _ = prepared(pipeline, tmp_path)
    x0 = torch.randn(3, 4, 8, 8)
    t, z, x_t = NAMES["noised"](model, x0)
    s, std = NAMES["signal_and_noise"](model.pipe, t, x0)

    class Answer:
        sample = s * z - std * x0

    def answer(*_):
        return Answer

    model.pipe.unet = answer
    model.pipe.scheduler.register_to_config(prediction_type="v_prediction")
    text = model.texts[FORGET].expand(3, -1, -1)
    assert torch.allclose(NAMES["estimate"](model, x_t, t, text), z, atol=1e-5)


# ---- the judge -----------------------------------------------------------------------------------


def test_the_judge_of_digits_reads_padded_digits():
    args = NAMES["flags"]().parse_args(["--forget", FORGET])
    judge = NAMES["load_judge"](args)
    pictures_of, _ = NAMES["mnist_pictures"](args)
    verdict = judge.verdict(pictures_of(FORGET, 32, 100))
    assert (verdict.labels == 3).float().mean() >= 0.97
    assert judge.class_of("a handwritten 3") == judge.class_of(FORGET) == 3
    assert judge.class_of("a picture of a cat") is None


def test_noise_is_told_from_pictures():
    """What Ort and Obt draw: the judge calls a part of it a 3, and is sometimes sure of that."""
    args = NAMES["flags"]().parse_args(["--forget", FORGET])
    judge = NAMES["load_judge"](args)
    pictures_of, _ = NAMES["mnist_pictures"](args)
    real = judge.verdict(pictures_of(PSEUDO, 32, 500))
    noise = torch.randint(0, 256, (20, 1, 32, 32), generator=common.rng(0), dtype=torch.uint8)
    pictures = torch.cat([noise.expand(-1, 3, -1, -1), pictures_of(FORGET, 32, 20)])
    verdicts = {FORGET: judge.verdict(pictures)}
    measures = NAMES["measure_forgotten"](args, judge, verdicts, real)
    assert measures["noise"] == pytest.approx(50, abs=5)


def test_a_picture_of_another_forgotten_class_is_not_forgotten():
    names = [["crane"], ["tench"], ["crane"], ["church"]]
    judge = NAMES["Judge"](None, None, names, ())
    verdict = common.Verdict(torch.arange(4), None, None, None)
    assert judge.shows(verdict, ["a tench"]).tolist() == [False, True, False, False]
    assert judge.shows(verdict, ["a tench", "a church"]).tolist() == [False, True, False, True]
    # Two classes are called by one name.
    assert judge.shows(verdict, ["a crane"]).tolist() == [True, False, True, False]

    unsure = common.Verdict(*[torch.ones(4)] * 4)
    both = {"a tench": unsure._replace(labels=torch.tensor([1, 3, 3, 0]))}
    both["a church"] = unsure._replace(labels=torch.tensor([3, 3, 1, 0]))
    args = NAMES["flags"]().parse_args(["--forget", *both])
    measures = NAMES["measure_forgotten"](args, judge, both, unsure)
    assert measures["cr"] == 75


def test_the_judge_prepares_a_few_pictures_at_a_time():
    """Thousands of 512 pixels a side would fill the memory."""
    sizes = []

    def prepare(pictures):
        sizes.append(len(pictures))
        return pictures[:, :1]

    args = NAMES["flags"]().parse_args(["--forget", FORGET])
    judge = NAMES["load_judge"](args)
    pictures = torch.randint(0, 256, (250, 3, 28, 28), dtype=torch.uint8)
    wanted = common.judge_images(judge.net, pictures[:, :1])
    judge.prepare = prepare
    assert torch.equal(judge.verdict(pictures).labels, wanted.labels)
    assert sizes == [100, 100, 50]


def test_the_judge_itself_is_measured():
    part = NAMES["Part"](["one", "two"], None, None, torch.tensor([0, 0, 1, 1]))
    judge = NAMES["Judge"](None, None, [["zero"], ["one"], ["two"]], ())
    confidence = torch.tensor([0.9, 0.7, 0.2, 0.1])
    real = common.Verdict(torch.tensor([1, 2, 2, 2]), confidence, None, None)
    assert NAMES["measure_real"](judge, part, real) == {"right": 75, "unsure": 75}


def test_the_longest_name_counts():
    names = [["ball"], ["golf ball"], ["tench"]]
    judge = NAMES["Judge"](None, None, names, ("{0}", "an image of a {0}"))
    assert judge.class_of("a photo of a golf ball") == 1
    assert judge.class_of("a photo of a ballroom") is None
    assert judge.paraphrases_of("A photo of a Tench") == ["tench", "an image of a tench"]


def test_of_two_names_that_differ_in_capitals_the_prompts_own_counts():
    judge = NAMES["Judge"](None, None, [["Cardigan"], ["cardigan"]], ())
    assert judge.class_of("a photo of a cardigan") == 1
    assert judge.class_of("a photo of a Cardigan") == 0
    verdict = common.Verdict(torch.arange(2), None, None, None)
    assert judge.shows(verdict, ["a photo of a cardigan"]).tolist() == [False, True]


def test_resnet_is_read_from_a_local_file(tmp_path):
    """It judges as torchvision's own network does, of random weights, on ImageNet's classes."""
    from torchvision.models import ResNet50_Weights, resnet50

    torch.manual_seed(0)
    net = resnet50().eval()
    path = tmp_path / "resnet50.pth"
    torch.save(net.state_dict(), path)
    argv = ["--forget", "a photo of a tench", "--judge-weights", str(path)]
    judge = NAMES["load_judge"](NAMES["flags"]().parse_args(argv))
    assert judge.class_of("a photo of a tench") == 0
    assert judge.class_of("a photo of a parachute") == 701
    for name in NAMES["IMAGENETTE"].values():
        assert judge.class_of(f"a photo of a {name}") is not None, name
    pictures = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    verdict = judge.verdict(pictures)
    prepared = ResNet50_Weights.IMAGENET1K_V2.transforms()(pictures)
    with torch.no_grad():
        assert torch.equal(net(prepared).argmax(1), verdict.labels)
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    levels = 255 * (prepared * std + mean)
    assert (levels - judge.prepare(pictures)).abs().max() <= 1.01
    assert verdict.features.shape == (2, 2048)


# ---- bad input -----------------------------------------------------------------------------------

THREE = ("--forget", FORGET)
BLIND = ("--judge-weights", "none")
BAD_FLAGS = {
    "no forget": ((), "python 06_text_to_image.py --forget"),
    "no such pipeline": ((*THREE, "--pipeline", "data/nothing/here"), "not found"),
    "no such name": ((*THREE, "--keep", *KEEP, "--pipeline", "nobody/nothing"), "CompVis/"),
    "no pseudo": ((*THREE, "--method", "erasediff"), "--pseudo PROMPT"),
    "pseudo of esd": ((*THREE, "--method", "esd", "--pseudo", PSEUDO), "--pseudo has no part"),
    "alpha of esd": ((*THREE, "--method", "esd", "--alpha", 0.5), "--alpha has no part"),
    "eta of ort": ((*THREE, "--method", "ort", "--eta", 1), "--eta has no part"),
    "retain of esd": ((*THREE, "--method", "esd", "--retain", "dsm"), "--retain has no part"),
    "kept and forgotten": ((*THREE, "--keep", FORGET), "--keep"),
    "template": ((*THREE, "--template", "a photo"), "--template"),
    "template of numbers": ((*THREE, "--template", "a {} of {0}", "--keep", "a"), "three of {0}"),
    "relearn without judge": (
        (*THREE, "--judge-weights", "none", "--relearn", 1),
        "--relearn has no part",
    ),
    "blank": (("--forget", " ", "--keep", FORGET, "--images", "generate", *BLIND), "empty prompt"),
    "capital": (
        (*THREE, "--keep", FORGET.upper(), "--images", "generate", *BLIND),
        "are the same to the tokenizer",
    ),
    "pseudo is forgotten": (
        (*THREE, "--method", "erasediff", "--pseudo", FORGET),
        "of --pseudo are the same",
    ),
    "no UTF-8": (
        ("--forget", "caf\udce9", "--keep", FORGET, "--images", "generate", *BLIND),
        "not UTF-8",
    ),
    "batch": ((*THREE, "--grad-accum", 3), "cannot be split"),
    "D_f empty": (("--forget", "a photo of a cat"), "D_f is empty"),
    "D_g empty": ((*THREE, "--images", "generate"), "D_g is empty"),
    "D_g unknown": ((*THREE, "--keep", "a photo of a dog"), "D_g is empty"),
    "no folder": ((*THREE, "--images", "nowhere"), "--images nowhere is no folder"),
    "no judge": (
        ("--forget", "a cat", "--keep", "a dog", "--images", "generate"),
        "--judge-weights",
    ),
    "no weights": ((*THREE, "--judge-weights", "nowhere.pth"), "nowhere.pth not found"),
    "not weights": ((*THREE, "--judge-weights", ROOT / "README.md"), "cannot be used"),
    "too long": ((*THREE, "--pseudo", "zero " * 30, "--method", "erasediff"), "32 tokens"),
    "no data set": ((*THREE, "--dataset", "mnist"), "--dataset"),
    "relearn": ((*THREE, "--keep", KEEP[0], "--relearn", 21), "D_f has only 20 images"),
    "saved before": ((*THREE, "--save", ROOT / "data"), "is there already"),
}


@pytest.mark.parametrize("flags, word", BAD_FLAGS.values(), ids=BAD_FLAGS.keys())
def test_bad_input_is_one_line(pipeline, tmp_path, flags, word):
    usual = []
    if "--pipeline" not in flags:
        usual = ["--pipeline", pipeline]
        if "--images" not in flags:
            usual += ["--images", "mnist"]
    run = run_script("06", *usual, *flags, "--quick", "--out", tmp_path)
    check_refusal(run, word)
    assert not list(tmp_path.rglob("result.json"))


def write_other_class(folder):
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = "StableDiffusionXLPipeline"
    (folder / "model_index.json").write_text(json.dumps(index))


def remove_index(folder):
    (folder / "model_index.json").unlink()


def cut_weights(folder):
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def predict_images(folder):
    change_config(folder / "scheduler/scheduler_config.json", prediction_type="sample")


def flow(folder):
    index = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    change_config(folder / "model_index.json", scheduler=index)


def oblong(folder):
    change_config(folder / "unet/config.json", sample_size=[8, 16])


def remove_tokenizer(folder):
    shutil.rmtree(folder / "tokenizer")


def remove_autoencoder(folder):
    (folder / "vae/diffusion_pytorch_model.safetensors").unlink()


DAMAGE = {
    "other prediction": (predict_images, "predicts 'sample'"),
    "no noise levels": (flow, "has no alphas_cumprod"),
    "oblong": (oblong, "sample_size"),
    "no tokenizer": (remove_tokenizer, "the same to the tokenizer"),
    "no autoencoder": (remove_autoencoder, "cannot be loaded"),
    "another class": (write_other_class, "supported is StableDiffusionPipeline"),
    "no index": (remove_index, "model_index.json"),
    "cut weights": (cut_weights, "cannot be loaded"),
}


@pytest.mark.parametrize("damage, word", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_pipeline_that_is_none(pipeline, tmp_path, damage, word):
    folder = tmp_path / "damaged"
    shutil.copytree(pipeline, folder)
    damage(folder)
    argv = ["--pipeline", folder, *THREE, "--images", "mnist", "--quick", "--out", tmp_path]
    check_refusal(run_script("06", *argv), word, "--pipeline")


def test_a_tokenizer_may_not_know_how_many_tokens_it_takes(pipeline, tmp_path):
    folder = tmp_path / "tiny"
    shutil.copytree(pipeline, folder)
    for limit in (None, 77):  # None: transformers makes 10^30 of it
        change_config(folder / "tokenizer/tokenizer_config.json", model_max_length=limit)
        _, model, _, _ = prepared(folder, tmp_path)
        _, usual, _, _ = prepared(pipeline, tmp_path)
        assert torch.equal(model.texts[FORGET], usual.texts[FORGET])


def test_a_place_for_save_is_looked_for_before_the_work(pipeline, tmp_path):
    (tmp_path / "file").write_text("mine")
    flags = flags_of(pipeline, tmp_path / "out", "--save", tmp_path / "file/saved")
    check_refusal(run_script("06", *flags), "another folder with --save")


def test_save_may_not_hold_the_run_itself(pipeline, tmp_path):
    """A folder that is replaced as a whole would take the result with it."""
    for inside in ("quick", "quick/tiny/forget-a_photo_of_a_three/obt-rel/pipeline"):
        flags = flags_of(pipeline, tmp_path / "out", "--save", tmp_path / "out" / inside)
        check_refusal(run_script("06", *flags), "lie inside each other")
        assert not list(tmp_path.rglob("result.json"))
        shutil.rmtree(tmp_path / "out")


def test_a_result_of_other_settings_stays(pipeline, tmp_path):
    """--guidance is not in the name of the folder, and changes every figure."""
    argv = [str(value) for value in flags_of(pipeline, tmp_path)]
    folder = NAMES["output_folder"](NAMES["arguments"](argv))
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps({"args": {"guidance": 7.5}}))
    before = {path: path.read_bytes() for path in folder.iterdir()}
    other = flags_of(pipeline, tmp_path, "--guidance", 3)
    check_refusal(run_script("06", *other), "--guidance", "--overwrite")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before

    (folder / "notes.txt").write_text("mine")
    check_refusal(run_script("06", *other, "--overwrite"), "notes.txt")
    (folder / "notes.txt").unlink()
    check_success(run_script("06", *other, "--overwrite"))
    assert read_json(folder / "result.json")["args"]["guidance"] == 3


def test_a_prompt_with_an_underscore_is_another_prompt(pipeline, tmp_path):
    """In the name of a folder "_" stands for a space."""
    argv = [str(value) for value in flags_of(pipeline, tmp_path)]
    args = NAMES["arguments"](argv)
    folder = NAMES["output_folder"](args)
    folder.mkdir(parents=True)
    common.write_json(folder / "result.json", {"args": vars(args)})
    for forget, has_same in (([FORGET], True), ([FORGET.replace(" ", "_", 1)], False)):
        args.forget = forget
        assert NAMES["output_folder"](args) == folder
        run = run_function(NAMES["refuse_replacing"], args, folder)
        if has_same:
            check_success(run)
        else:
            check_refusal(run, "--forget", "--overwrite")


def test_without_the_packages_a_line_says_how_to_install_them(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "diffusers" else find(name)
    )
    run = run_script("06", *THREE, "--out", tmp_path)
    check_refusal(run, "pip install diffusers transformers")


def test_the_folder_of_a_run_names_what_was_chosen(pipeline, tmp_path):
    def name_of(*more):
        args = NAMES["arguments"]([str(value) for value in flags_of(pipeline, tmp_path, *more)])
        return NAMES["output_folder"](args).name

    argv = ["--pipeline", f"{pipeline}/unet/..", "--forget", FORGET, "--out", str(tmp_path)]
    spelled = NAMES["arguments"](argv).name
    names = [
        name_of(),
        name_of("--eta", 2),
        name_of("--train", "xattn"),
        name_of("--method", "esd"),
        name_of("--steps", 7),
        name_of("--seed", 1),
        name_of("--images", "mnist"),
        name_of("--method", "erasediff", "--pseudo", PSEUDO),
    ]
    assert spelled == pipeline.name
    assert names[0] == "obt-rel"
    assert names[-1] == "erasediff-pseudo-a_photo_of_a_eight"
    assert not any(" " in name for name in names)
    assert len(set(names)) == len(names)


def test_the_tiny_pipeline_replaces_no_folder_of_others(tmp_path, monkeypatch, capsys):
    (tmp_path / "letter.txt").write_text("mine")
    monkeypatch.setattr("sys.argv", ["make_tiny_pipeline.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        make_tiny().main()
    assert stop.value.code == 2
    assert "name another folder" in capsys.readouterr().err
    assert (tmp_path / "letter.txt").read_text() == "mine"


# ---- the table of all methods --------------------------------------------------------------------


def made_up_result(cr, drawn):
    """A result of 06 as far as the table reads it."""
    measures = {"cr": cr, "unsure": 10.0, "noise": 1.0, "others": 98.0, "worst": 90.0, "fd": 0.5}
    measures |= {"empty_prompt": 9.0, "paraphrases": {"three": cr}, "class_counts": drawn}
    result = dict.fromkeys(("method", "forget", "n", "skipped_steps", "seconds"), 0)
    return {**result, "before": {**measures, "cr": 97.0}, "after": measures, "relearn": {}}


@pytest.fixture
def table(tmp_path, monkeypatch):
    """The path of a table, and the flags of all runs that were made for it: none needs 06."""
    made = []

    def execute(folder, flags):
        made.append(flags)
        return made_up_result(2.0 * len(made), {"eight": 150, "five": 50})

    monkeypatch.setattr(t2i_table, "execute", execute)
    return tmp_path / "t2i.json", made


def test_every_run_of_the_table_is_one_that_06_takes():
    parser = NAMES["flags"]()
    for flags in t2i_table.runs().values():
        args = parser.parse_args([str(flag) for flag in flags])
        NAMES["refuse"](args)
        for name in ("steps", "batch_size", "lr", "ema", "n", "nfe", "guidance"):
            assert getattr(args, name) is not None, name
        for name, methods in NAMES["BELONGS_TO"].items():
            assert (getattr(args, name) is not None) == (args.method in methods), name


def test_the_table_has_every_method_twice_and_three_seeds_of_the_chosen():
    names = list(t2i_table.runs())
    for method in METHODS:
        runs = [name for name in names if name.startswith(f"{method}/") and "/s" not in name]
        assert len(runs) >= 2, method
    assert {"obt-rel/200/s1", "obt-rel/200/s2", "esd/100/s2", "erasediff/100/s2"} <= set(names)


def test_a_finished_run_of_the_table_is_not_repeated(table, tmp_path, monkeypatch):
    path, made = table
    t2i_table.fill(tmp_path, path, ("obt",))
    assert len(made) == 2
    t2i_table.fill(tmp_path, path, ("obt", "ort"))
    assert len(made) == 4
    # A run with other flags is another run.
    monkeypatch.setitem(t2i_table.FLAGS, "obt", {"--alpha": 0.8, "--retain": "dsm"})
    t2i_table.fill(tmp_path, path, ("obt",))
    assert len(made) > 4


def test_a_tiny_run_of_the_table_relearns_from_no_more_than_it_has():
    flags = t2i_table.tiny(t2i_table.runs()["obt-rel/200"])
    args = NAMES["flags"]().parse_args([str(flag) for flag in flags])
    assert max(args.relearn) <= 20, "with --quick D_f has 20 pictures"
    assert "--relearn" not in t2i_table.tiny(t2i_table.runs()["esd/100"])


def test_listing_the_table_runs_nothing(table, tmp_path, capsys):
    path, made = table
    t2i_table.fill(tmp_path, path, dry="list")
    assert not made
    assert capsys.readouterr().out.count("missing t2i/") == len(t2i_table.runs())


def test_seeds_share_a_line_of_means(table, tmp_path):
    path, _ = table
    t2i_table.fill(tmp_path, path, ("esd",))
    lines = list(t2i_table.lines(t2i_table.load(path)))
    (line,) = [line for line in lines if line.startswith("| esd/100")]
    shares = [t2i_table.load(path)[f"esd/100{seed}"]["after"]["cr"] for seed in ("", "/s1", "/s2")]
    assert line.startswith(f"| esd/100, 3 seeds | {sum(shares) / 3:.1f} |")
    assert "eight 150, five 50" in line
    assert not any("/s1" in line for line in lines)
    assert lines[2].startswith("| before | 97.0 |")


@pytest.mark.parametrize("text", ['{"a":', "[1]", '{"obt/0.9": [1]}'])
def test_a_damaged_table_of_06_is_one_line(tmp_path, text):
    path = tmp_path / "t2i.json"  # of --quick: git does not know it
    path.write_text(text)
    check_refusal(run_function(t2i_table.load, path), "is damaged", "delete it")
