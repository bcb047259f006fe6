"""The scripts through their command line: what they write, and what they say to bad input."""
import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SCRIPTS, arguments

import common as c

QUICK = ("--dataset", "mnist", "--quick")
KEYS = """method sde forget alpha steps n sampler nfe ur_before ur_after ur_interval ur_floor fd_before fd_after fd_floor
low_confidence_before low_confidence_after class_min_ratio class_counts seconds""".split()


def tree(path):
    return {p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file()}


METHODS = ["obt-rel", "obt", "ort", "unseen", "ascent", "erasediff", "siss"]


@pytest.mark.parametrize("method, sde", [*((m, "vp") for m in METHODS), ("obt-rel", "ve"), ("obt-rel", "subvp"), ("obt-rel", "ddpm")])
def test_unlearn_quick(script, tmp_path, small_base, method, sde):
    status, out, _ = script("03", *QUICK, "--forget", 3, 7, "--method", method, "--sde", sde, "--out", tmp_path)
    folder = tmp_path / f"mnist/forget-3-7/{method}-{sde}"
    assert status == 0 and "class 3 '3', class 7 '7': 12,396 images; keeping 47,604" in out
    assert ("ours, not the paper's" in out) == (method == "obt-rel")
    assert {p.name for p in folder.iterdir()} == {"model.pt", "result.json", "log.jsonl", "curves.png", "before_after.png"}
    r = json.loads((folder / "result.json").read_text())
    assert all(k in r for k in KEYS) and r["forget"] == ["3", "7"] and r["n"] == sum(r["class_counts"]["before"]) == sum(r["class_counts"]["after"])
    assert r["ur_before"] == pytest.approx(100 * sum(r["class_counts"]["before"][i] for i in (3, 7)) / r["n"])
    assert r["ur_interval"][0] <= r["ur_after"] <= r["ur_interval"][1]
    # The model that was saved is the one that was unlearned: it moved from the base, and it loads.
    base, net = c.load_net(*c.find_base(tmp_path, "mnist")), c.load_net(folder / "model.pt", "")
    assert net.arch == base.arch and any(not torch.equal(a, b) for a, b in zip(net.parameters(), base.parameters()))


@pytest.mark.slow
def test_every_method_with_every_sde_gives_other_weights(script, tmp_path, small_base):
    """Seven methods and Ort's second reading, four SDEs: 32 runs, 32 different models."""
    seen = {}
    for method in [*METHODS, "ort --ort inner"]:
        for sde in c.SDES:
            argv = ("--forget", 3, "--method", *method.split(), "--sde", sde, "--n", 10, "--nfe", 2, "--steps", 3)
            assert script("03", *QUICK, *argv, "--out", tmp_path)[0] == 0
            path = tmp_path / f"mnist/forget-3/{method.replace('ort --ort inner', 'ort-inner')}-{sde}/model.pt"
            weights = torch.load(path, weights_only=True)["ema"]
            seen[method, sde] = torch.cat([w.flatten() for w in weights.values()])
    names = list(seen)
    for i, a in enumerate(names):
        for b in names[:i]:
            assert not torch.equal(seen[a], seen[b]), (a, b)


@pytest.mark.parametrize("method", ["ort", "obt", "unseen", "siss"])
def test_from_scratch_quick(script, tmp_path, small_base, method):
    """A small network of its own, not the base; Standard is still what "before" means."""
    status, out, _ = script("03", *QUICK, "--forget", 3, "--method", method, "--from-scratch", "--n", 10, "--nfe", 2, "--out", tmp_path)
    folder = tmp_path / f"mnist/forget-3/{method}-vp-scratch"
    assert status == 0 and "from scratch" in out and (folder / "result.json").exists()
    assert c.load_net(folder / "model.pt", "").arch["width"] == 32


def test_train_without_a_class(script, tmp_path):
    """02 --without: the Unseen model goes where 04 looks, the base's place stays free."""
    status, out, _ = script("02", *QUICK, "--steps", 2, "--without", 3, 7, "--out", tmp_path)
    assert status == 0 and "47,604 images" in out and "--forget 3 7" in out and not (tmp_path / "mnist/base.pt").exists()
    content = torch.load(tmp_path / "mnist/forget-3-7/unseen-any-scratch/model.pt", weights_only=True)
    assert content["args"]["method"] == "unseen" and content["args"]["forget"] == ["3", "7"]


def test_ddpm_forget_loss_is_applied(script, tmp_path):
    """Ort on the discrete chain lowers what it minimises, on images it never saw; the released code drops the loss there."""
    test = c.load_dataset("mnist", train=False)
    x_f = c.dequantize(test.images[test.labels == 3][:500])
    value = {}
    for method in ("ort", "unseen"):
        argv = ("--forget", 3, "--method", method, "--sde", "ddpm", "--steps", 60, "--lr", 1e-3, "--ema", 0.9, "--n", 10, "--nfe", 2)
        argv += ("--out", tmp_path, *(("--alpha", 0.5, "--uniform-t") if method == "ort" else ()))
        assert script("03", *QUICK, *argv)[0] == 0
        net = c.load_net(tmp_path / f"mnist/forget-3/{method}-ddpm/model.pt", "")
        torch.manual_seed(0)
        with torch.no_grad():
            value[method] = c.ort_loss(net, c.DDPM(), x_f, c.uniform_t(500, c.DDPM())).mean().item()
    assert value["ort"] < 0.8 * value["unseen"]


def test_seed_names_a_folder_and_changes_the_run(script, tmp_path, small_base):
    for seed in (0, 1):
        assert script("03", *QUICK, "--forget", 3, "--seed", seed, "--out", tmp_path)[0] == 0
    a, b = (torch.load(tmp_path / f"mnist/forget-3/obt-rel-vp{s}/model.pt", weights_only=True)["ema"] for s in ("", "-s1"))
    assert any(not torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("flag", [("--alpha", 0.2), ("--lr", 1e-2), ("--steps", 3), ("--batch-size", 8), ("--log-sigma", 1, 1), ("--uniform-t",), ("--ema", 0), ("--retain", "dsm")])
def test_no_flag_of_03_is_ignored(script, tmp_path, small_base, flag):
    """A training flag that is changed changes the weights."""
    weights = []
    for extra in ((), flag):
        assert script("03", *QUICK, "--forget", 3, "--n", 10, "--nfe", 2, "--out", tmp_path, *extra)[0] == 0
        weights.append(torch.load(tmp_path / "mnist/forget-3/obt-rel-vp/model.pt", weights_only=True)["ema"])
    assert any(not torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_own_base_is_preferred_and_named(script, tmp_path):
    assert script("02", *QUICK, "--steps", 2, "--width", 16, "--out", tmp_path)[0] == 0
    status, out, _ = script("03", *QUICK, "--forget", 3, "--out", tmp_path)
    assert status == 0 and str(tmp_path / "mnist/base.pt") in out
    status, out, _ = script("03", *QUICK, "--forget", 3, "--out", tmp_path / "other")
    assert status == 0 and "data/mnist_base.pt" in out


def test_judge_quick(script, tmp_path):
    status, out, _ = script("02", *QUICK, "--judge", "--out", tmp_path)
    assert status == 0 and "test accuracy 9" in out and torch.load(tmp_path / "mnist/judge.pt", weights_only=True)["quick"]
    assert c.load_judge(arguments(tmp_path, quick=True), c.load_dataset("mnist")) is not None


@pytest.mark.parametrize("number", [n for n in SCRIPTS if n <= "03"])  # 04 and 05 need a run of 03: see their own test files
def test_each_script_as_a_process(number, tmp_path):
    extra = {"01": [], "03": ["--forget", "3"]}.get(number, ["--steps", "2"])
    run = subprocess.run([sys.executable, SCRIPTS[number], "--quick", "--out", tmp_path, *extra], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0 and not run.stderr, run.stderr
    assert "next: " in run.stdout


BAD = {
    "unknown class": (("--forget", "eleven"), "0, 1, 2"),
    "no forget": ((), "--forget"),
    "all classes": (("--forget", *"0123456789"), "all classes"),
    "alpha": (("--forget", 3, "--alpha", 1.5), "--alpha"),
    "steps": (("--forget", 3, "--steps", -5), "--steps"),
    "lr": (("--forget", 3, "--lr", 0), "--lr"),
    "batch": (("--forget", 3, "--batch-size", "many"), "--batch-size"),
    "method": (("--forget", 3, "--method", "hypnosis"), "obt-rel"),
    "sde": (("--forget", 3, "--sde", "xp"), "subvp"),
    "scratch distill": (("--forget", 3, "--method", "ort", "--from-scratch", "--retain", "distill"), "--retain dsm"),
    "scratch obt-rel": (("--forget", 3, "--from-scratch"), "--method ort | obt"),
    "alpha of siss": (("--forget", 3, "--method", "siss", "--alpha", 0.5), "--alpha has no part"),
    "alpha and kappa": (("--forget", 3, "--alpha", 0.6, "--kappa", 2), "give one of them"),
    "alpha and eta": (("--forget", 3, "--method", "erasediff", "--alpha", 0.6, "--eta", 0.1), "give one of them"),
    "two noises": (("--forget", 3, "--uniform-t", "--log-sigma", 0, 1), "--uniform-t and --log-sigma"),
    "noise of siss": (("--forget", 3, "--method", "siss", "--log-sigma", 0, 1), "--log-sigma has no part"),
    "noise of unseen": (("--forget", 3, "--method", "unseen", "--uniform-t"), "--uniform-t has no part"),
    "distilled unseen": (("--forget", 3, "--method", "unseen", "--retain", "distill"), "--retain has no part"),
    "eta of ort": (("--forget", 3, "--method", "ort", "--eta", 0.5), "erasediff"),
    "data set": (("--forget", 3, "--dataset", "imagenet"), "mnist"),
    "data dir": (("--forget", 3, "--data-dir", "nowhere"), "git checkout data/mnist.npz"),
    "unknown flag": (("--forget", 3, "--forgive"), "--forgive"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_input_is_one_line_and_touches_nothing(script, tmp_path, name):
    """Exit status 2, one line that names what is wrong or what is valid, and a finished run stays as it was."""
    argv, word = BAD[name]
    folder = tmp_path / "mnist/forget-3/obt-rel-vp"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text("{}")
    before = tree(tmp_path)
    status, _, err = script("03", "--quick", *argv, "--out", tmp_path)
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1 and word in err
    assert tree(tmp_path) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_cuda_without_cuda(script, tmp_path):
    status, _, err = script("03", *QUICK, "--forget", 3, "--device", "cuda", "--out", tmp_path)
    assert status == 2 and err.count("\n") == 1 and "--device cpu" in err


@pytest.mark.parametrize("content", [b"not a checkpoint", None, "other"])
def test_corrupt_base(script, tmp_path, content):
    """Bytes that are no checkpoint, half a checkpoint, another program's checkpoint: one line with the command that mends it."""
    path = tmp_path / "mnist/base.pt"
    path.parent.mkdir()
    shipped = c.HERE / "data/mnist_base.pt"
    if content == "other":
        torch.save(dict(weights=torch.zeros(2)), path)
    else:
        path.write_bytes(shipped.read_bytes()[:100000] if content is None else content)
    before = tree(tmp_path)
    status, _, err = script("03", *QUICK, "--forget", 3, "--out", tmp_path)
    assert status == 2 and err.count("\n") == 1 and "python 02_train_sde.py --dataset mnist" in err and tree(tmp_path) == before


def test_missing_base_names_the_command(tmp_path):
    """A copy of the project without the shipped model, as a process."""
    (tmp_path / "data").mkdir()
    for name in ("common.py", "03_unlearn.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "data/mnist.npz").symlink_to(ROOT / "data/mnist.npz")
    run = subprocess.run([sys.executable, "03_unlearn.py", "--quick", "--forget", "3"], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "python 02_train_sde.py --dataset mnist" in run.stderr


def test_unwritable_out(script, tmp_path):
    (tmp_path / "file").write_text("x")
    for number, extra in (("02", ()), ("03", ("--forget", 3))):
        status, _, err = script(number, *QUICK, *extra, "--out", tmp_path / "file")
        assert status == 2 and err.count("\n") == 1 and "--out" in err
    assert (tmp_path / "file").read_text() == "x"


def test_resume_without_a_checkpoint(script, tmp_path):
    status, _, err = script("02", *QUICK, "--resume", "--out", tmp_path)
    assert status == 2 and err.count("\n") == 1 and "not found" in err


def test_a_failed_run_leaves_the_finished_one(script, tmp_path, small_base, monkeypatch):
    assert script("03", *QUICK, "--forget", 3, "--out", tmp_path)[0] == 0
    before = tree(tmp_path)
    monkeypatch.setattr(c, "guarded_step", lambda *a: c.die("diverged"))
    assert script("03", *QUICK, "--forget", 3, "--out", tmp_path)[0] == 2
    assert tree(tmp_path) == before
