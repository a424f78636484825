"""The experiments' scripts answer a user's mistake in one line, like the command line."""

from importlib import import_module

import pytest

from experiments.script import run

WITH_WEIGHTS = ["--model", "resnet32", "--weights", __file__]
SCRIPTS = {
    "after_finetuning": WITH_WEIGHTS,
    "bench_search": WITH_WEIGHTS,
    "make_sample": [],
    "multi_budget": WITH_WEIGHTS,
    "proxy_fidelity": WITH_WEIGHTS,
    "search_agents": WITH_WEIGHTS,
    "train_baseline": [],
    "transfer": ["--policy", "resnet20-dyna", *WITH_WEIGHTS],
    "widths": WITH_WEIGHTS,
}
"""Those that read CIFAR-10 first of all, and what they are asked: a network without
rows in the tables.
"""


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_its_images_a_script_says_in_one_line_how_to_fetch_them(
    script, monkeypatch, capsys
):
    monkeypatch.setattr("sys.argv", [f"experiments/{script}.py", *SCRIPTS[script]])
    with pytest.raises(SystemExit) as stopped:
        run(import_module(f"experiments.{script}").main)
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2
    assert line.startswith(f"{script}.py: error: --data: CIFAR-10")
    assert "autoprune data cifar10" in line


def test_a_script_names_the_folder_that_it_cannot_use(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("sys.argv", ["experiments/transfer.py"])
    with pytest.raises(SystemExit) as stopped:
        run((tmp_path / "file" / "folder").mkdir)
    assert stopped.value.code == 2
    told = f"can't read or write '{tmp_path}/file/folder' (Not a directory)"
    assert capsys.readouterr().err == f"transfer.py: error: {told}\n"
