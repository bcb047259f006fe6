"""tests/make_tables.py: chooses by the rule it states, keeps what is done, and interpolates right."""
import json
import math
import runpy
import shutil

import pytest
import torch
from conftest import ROOT


@pytest.fixture
def maker(tmp_path, monkeypatch):
    """The module's names, its table and folders in tmp_path, what it changes in common put back afterwards."""
    import common as c

    monkeypatch.setattr(c, "sample_images", c.sample_images)
    monkeypatch.setattr(c, "load_net", c.load_net)
    names = runpy.run_path(str(ROOT / "tests/make_tables.py"))
    space = names["run"].__globals__
    space.update(OUT=tmp_path / "runs", TABLE=tmp_path / "tables.json")
    return space


def test_choose_takes_the_best_rate_noise_and_weight(maker):
    """A made-up world in which lr 3e-4 with the paper's noise is best, and alpha 0.8 is nearest to UR 1 %."""
    asked = []

    def run(name, *argv, quick=False, dry=False):
        asked.append(name)
        flags = dict(zip(argv, argv[1:]))
        fd = 1 + abs(math.log(flags["--lr"] / 3e-4)) + (0.2 if "--uniform-t" not in argv else 0) + (0.5 if "distill" in argv else 0)
        return dict(ur_after={0.95: 4.0, 0.9: 2.0, 0.8: 0.9}[flags["--alpha"]], fd_after=fd, fd_before=1.0)

    maker["run"] = run
    picked = maker["choose"]("obt")
    assert picked["best"] == 0.8 and "--uniform-t" in picked["flags"] and "distill" not in picked["flags"]
    assert picked["flags"][picked["flags"].index("--lr") + 1] == 3e-4
    assert len(set(asked)) == 3 + 1 + 1 + 2  # rates, noise, retain loss, and the two other weights


def test_a_finished_run_is_kept_and_not_repeated(maker, tmp_path, capsys):
    argv = ("--forget", 3, "--method", "unseen", "--n", 10, "--nfe", 2)
    maker["save_time"]()
    (tmp_path / "runs").mkdir()
    first = maker["run"]("group/one", *argv, quick=True)
    table = json.loads((tmp_path / "tables.json").read_text())
    assert table["group/one"]["ur_after"] == first["ur_after"] and "03_unlearn.py --dataset mnist --forget 3" in first["command"]
    assert len(list((tmp_path / "runs").glob("before-*.pt"))) == 1
    maker["runpy"] = None  # a second run would need it
    assert maker["run"]("group/one", *argv, dry="look") == first
    assert maker["run"]("group/one", *argv, "--lr", 1e-3, dry="look") is None  # under this name, but not with these flags
    assert maker["run"]("group/one", *argv, quick=True) == first and "done    group/one" in capsys.readouterr().out


def test_a_model_whose_file_is_gone_is_made_again(maker, tmp_path):
    """The same weights from fewer samples, and the table stays as it was."""
    (tmp_path / "runs").mkdir()
    maker["run"]("group/one", "--forget", 3, "--method", "unseen", "--n", 12, "--nfe", 2, quick=True)
    table, net = (tmp_path / "tables.json").read_bytes(), maker["network"]("group/one")
    shutil.rmtree(tmp_path / "runs/group-one")
    again = maker["network"]("group/one")
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters()))
    assert (tmp_path / "tables.json").read_bytes() == table
    base = maker["network"]("standard")
    assert any(not torch.equal(a, b) for a, b in zip(base.parameters(), again.parameters()))


def test_likelihood_and_noise_measure_the_chosen_models(maker, tmp_path):
    """Of Standard and of the runs that were chosen, each once; 02's losses by noise level are the authority for those of Standard."""
    (tmp_path / "runs").mkdir()
    maker.update(choose=lambda method, dry=False: dict(best=None, name="vp/unseen") if method == "unseen" else None,
                 ve_weight=lambda method, dry=False: (None, None) if method == "unseen" else None,
                 test_images=lambda n: torch.rand(2, n, 1, 28, 28, generator=maker["c"].rng(0)) * 2 - 1)
    for name in ("ve/3/unseen/None", "vp/unseen"):
        maker["run"](name, "--forget", 3, "--method", "unseen", "--n", 10, "--nfe", 2, quick=True)
    for _ in range(2):
        maker["group_nll"](quick=True), maker["group_noise"](quick=True)
        maker["network"] = None  # what is kept is not measured again
    table = maker["load"]()
    assert {k for k in table if k[0] == "n"} == {f"{group}/{label}" for group in ("nll", "noise") for label in ("standard", "unseen/None")}
    assert table["nll/standard"]["bpd_g"] != table["nll/unseen/None"]["bpd_g"]
    net, x_f = maker["c"].load_net(*maker["c"].find_base(tmp_path, "mnist")), maker["test_images"](4)[1]
    want = runpy.run_path(str(ROOT / "02_train_sde.py"))["loss_by_noise"](net, x_f)
    assert [b[2] for b in table["noise/standard"]["f"]] == pytest.approx([b[2] for b in want], rel=1e-4)


def test_fd_at_one_percent():
    """Halfway between 0.5 and 2 % on logarithmic axes; none without two neighbours around 1 %, and a broken run that comes back
    above 1 % is no neighbour of the first."""
    at = runpy.run_path(str(ROOT / "tests/make_tables.py"))["fd_at_one_percent"]
    assert at([(2.0, 1.0), (0.5, 4.0)]) == pytest.approx([2.0])
    assert at([(0.5, 4.0), (2.0, 1.0)]) == pytest.approx([2.0])
    assert at([(4.0, 9.0), (1.0, 3.0), (0.1, 8.0)]) == pytest.approx([3.0])
    assert at([(2.0, 1.0), (0.5, 4.0), (5.0, 9.0)]) == pytest.approx([2.0])
    assert at([(4.0, 1.0), (2.0, 2.0)]) == at([(4.0, 1.0)]) == []


def test_each_seed_has_its_own_line_to_one_percent(maker):
    """Seed 0 between kappa 2 and 2.5, seed 1 between 1.7 and 2, seed 2 only on one side: two numbers, in the order of the weights."""
    r = lambda ur, fd: dict(ur_after=ur, fd_after=fd, fd_before=2.0)
    table = {"x/2.5": r(0.5, 8.0), "x/2.0": r(2.0, 2.0), "x/2.0/s1": r(0.5, 4.0), "x/1.7/s1": r(2.0, 1.0), "x/2.5/s2": r(0.4, 2.0), "x/2.0/s2": r(0.9, 2.0)}
    assert maker["at_one"](table, "obt-rel", lambda v: f"x/{v}") == pytest.approx([2.0, 1.0])


@pytest.mark.parametrize("seeds_pass, order", [(2.2, [2.5, 2.0]), (2.7, [2.5, 3.0])])
def test_each_seed_walks_until_one_percent_lies_between_two(maker, seeds_pass, order):
    """Seed 0 chose kappa 2.5; the others start there and go towards 1 %.  A method that does not come there has one run a seed."""
    asked, picked = [], dict(flags=("--lr", 1e-3), best=2.5, tail="lr-0.001", name="vp/obt-rel/2.5/lr-0.001", reached=True)

    def run(name, *argv, **how):
        asked.append((argv[argv.index("--kappa") + 1], argv[argv.index("--seed") + 1]))
        return dict(ur_after=1.5 ** (4 * (seeds_pass - asked[-1][0])), fd_after=1.0, fd_before=1.0)

    maker.update(run=run, choose=lambda method, **how: picked)
    maker["group_vp"](("obt-rel",))
    assert asked == [(v, seed) for seed in (1, 2) for v in order]
    picked["reached"] = asked.clear()
    maker["group_vp"](("obt-rel",))
    assert asked == [(2.5, 1), (2.5, 2)]


@pytest.mark.parametrize("passes, order", [(1.8, [2.5, 2.0, 1.7]), (2.75, [2.5, 3.0]), (0.1, [2.5, 2.0, 1.7, 1.4, 1.2]), (9.0, [2.5, 3.0, 3.5, 4.0])])
def test_long_runs_stop_at_the_first_pair_around_one_percent(maker, passes, order):
    """A made-up world in which UR falls below 1 % at one weight: from the chosen weight towards it, no further, then seeds there."""
    asked = []

    def run(name, *argv, **how):
        asked.append((float(argv[argv.index("--kappa") + 1]), "--seed" in argv))
        return dict(ur_after=1.5 ** (4 * (passes - asked[-1][0])), fd_after=1.0, fd_before=1.0)

    maker.update(run=run, chosen=lambda method: dict(flags=("--lr", 1e-3), best=2.5, tail="lr-0.001"))
    maker["group_long"](("obt-rel",))
    assert [w for w, seeded in asked if not seeded] == order
    assert len(set(w for w, seeded in asked if seeded)) == 1 and sum(seeded for _, seeded in asked) == 2


def test_ve_table_shows_the_weight_found_with_standard_first(maker):
    """One line a method, the weight found, once it has all three sets of classes; FD is divided by the Standard model's."""
    r = lambda ur: dict(ur_before=10.5, fd_before=0.5, ur_after=ur, ur_interval=[ur / 2, 2 * ur], fd_after=0.6, class_min_ratio=0.8, seconds=100)
    rows = {f"{forget}/obt/0.9": r(4.0) for forget in ("3", "7", "3-7")} | {"3/obt/0.8": r(0.8), "7/obt/0.8": r(1.0), "3-7/obt/0.8": r(1.2), "3/ort/0.95": r(1.0)}
    maker["ve_weight"] = lambda method, dry: {"obt": (0.8, None), "ort": (0.95, None)}.get(method)
    _, standard, obt = maker["ve_lines"](rows)
    assert standard.startswith("| standard | 10.50, FD 0.50 |")
    assert obt == "| obt/0.8 | 0.80 [0.4, 1.6], x1.20, 0.80 | 1.00 [0.5, 2.0], x1.20, 0.80 | 1.20 [0.6, 2.4], x1.20, 0.80 | 300 |"


def test_walk_ends_where_the_network_breaks_down(maker):
    """UR 4 %, then 7 % at the stronger weight: no further, and of the two the cheaper one is taken, since neither comes near 1 %."""
    world = {0.9: (6.0, 2.0), 0.8: (4.0, 2.2), 0.7: (7.0, 9.0), 0.5: (1.5, 80.0)}
    found = maker["walk"]("obt", 0.9, lambda v: dict(ur_after=world[v][0], fd_after=world[v][1], fd_before=1.0))
    assert list(found) == [0.9, 0.8, 0.7] and maker["nearest"](found) == 0.8
