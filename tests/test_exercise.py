"""The exercises of the course: each test fails without the function, and passes with it."""

import shutil

import exercise
import pytest
from conftest import ROOT, check_refusal, run_function


def run(number, folder):
    """Run `python tests/exercise.py NUMBER --out FOLDER` in this process -> Run."""
    return run_function(exercise.main, [str(number), "--out", str(folder)])


@pytest.mark.parametrize("number", exercise.EXERCISES)
def test_the_test_of_an_exercise_fails_until_the_function_is_written(number, tmp_path, capfd):
    chosen = exercise.EXERCISES[number]
    folder = tmp_path / "copy"
    first = run(number, folder)
    assert first.status == 1, first.err
    assert chosen.function in first.out
    assert "NotImplementedError" in capfd.readouterr().out, "it failed for another reason"

    shutil.copy(ROOT / chosen.file, folder / chosen.file)
    second = run(number, folder)
    shown = capfd.readouterr().out
    assert second.status == 0, shown[-2000:]
    assert " passed" in shown, "no test has run"
    assert second.out.startswith(f"{chosen.function} in ")


@pytest.mark.parametrize("number", exercise.EXERCISES)
def test_only_the_body_of_the_function_is_taken_away(number):
    chosen = exercise.EXERCISES[number]
    before = (ROOT / chosen.file).read_text()
    after = exercise.without_body(before, chosen.function)
    head, rest = after.split("    raise NotImplementedError\n")
    assert before.startswith(head)
    assert before.endswith(rest)
    assert f"def {chosen.function}(" in head.rsplit("\n\n\n", 1)[1]
    removed = before[len(head) : len(before) - len(rest)]
    assert "def " not in removed
    assert "return" in removed


def test_the_copy_of_a_student_stays_as_it_is(tmp_path, monkeypatch):
    chosen = exercise.EXERCISES[4]
    (tmp_path / chosen.file).write_text("half an answer\n")
    (tmp_path / "exercise.txt").write_text("4\n")
    monkeypatch.setattr(exercise, "check", lambda *_: 1)
    again = run(4, tmp_path)
    assert again.status == 1
    assert "not yet" in again.out, "the student has written something"
    assert (tmp_path / chosen.file).read_text() == "half an answer\n"
    assert {path.name for path in tmp_path.iterdir()} == {chosen.file, "exercise.txt"}


def test_another_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    check_refusal(run(4, tmp_path), "exercise 4", "--out")
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_the_copy_of_another_exercise_does_not_pass(tmp_path):
    """It has the project's own solution of this one."""
    folder = tmp_path / "copy"
    exercise.copy_blanked(5, folder)
    check_refusal(run(4, folder), "exercise 4", "--out")


def test_an_exercise_that_is_not_there_is_one_line():
    check_refusal(run(7, "nowhere"), "7")
