"""Reward functions that raise, say nonsense or hang: an exit code of 2 that names them, and a run that goes on."""

import json
from pathlib import Path

import pytest

from little_world import loralab, make_base, only_run, overrides, rows, same_bits, write_rows
from loralab.run.folder import RunFolder
from loralab.training.checkpoint import checkpoints

GOOD = "return [float(sum(c in 'abcdefghijklm' for c in answer)) for answer in answers]"
FAULTS = {
    "raises": ("raise RuntimeError('the judge is away')", "raised RuntimeError: the judge is away"),
    "nan": ("return [float('nan')] * len(answers)", "gave nan for the answer"),
    "wrong length": ("return [1.0]", "gave 1 values for 6 answers"),
    "hangs": ("time.sleep(600)", "did not answer within 2 s"),
}
RECIPE = """\
method: {name: lora, rank: 2}
objective: {name: policy, algorithm: rloo, samples: 3, max_tokens: 6, temperature: 3.0, reward: {path: REWARD, timeout: 2}}
schedule: {name: constant}
probes: {every: 6, tokens: 36, drift: false, spectra: false}
checkpoints: {every: 1}
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder: Path = tmp_path_factory.mktemp("faulty")
    make_base(folder / "base")
    write_rows(folder / "train.jsonl", rows(12, seed=1))
    write_rows(folder / "validation.jsonl", rows(4, seed=2))
    write_rows(folder / "general.jsonl", [{"text": "a text"}])
    return folder


def write_reward(folder: Path, body: str, after: int) -> Path:
    """Write a function that works so often, counted over processes, and then does something else."""
    file, calls = folder / "judge.py", folder / "calls"
    file.write_text(
        "import time\n\n\n"
        "def judge(prompts, answers, rows):\n"
        f"    with open({str(calls)!r}, 'a+') as calls:\n"
        "        calls.write('x')\n"
        "        number = calls.tell()\n"
        f"    if number > {after}:\n"
        f"        {body}\n"
        f"    {GOOD}\n"
    )
    calls.unlink(missing_ok=True)
    return file


def command(world: Path, folder: Path, runs: str, reward: Path) -> list[str]:
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.replace("REWARD", f"{reward}:judge"))
    return ["train", str(recipe), *overrides(world, train__steps=4), "--runs", str(folder / runs)]


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory) -> Path:
    """Return a run whose reward never failed."""
    folder: Path = tmp_path_factory.mktemp("whole")
    assert loralab(*command(world, folder, "runs", write_reward(folder, "pass", after=0))) == 0
    return only_run(folder / "runs")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_whose_reward_fails_says_so_and_goes_on_when_it_is_mended(world, whole, tmp_path, capsys, fault):
    body, said = FAULTS[fault]
    # One call is for the held-out answers of the base, one for those of the untrained policy, then one for each step.
    assert loralab(*command(world, tmp_path, "runs", write_reward(tmp_path, body, after=5))) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert said in shown and "judge.py:judge" in shown and "Traceback" not in shown
    folder = only_run(tmp_path / "runs")
    assert [path.name for path in checkpoints(RunFolder(folder).checkpoints)][-1] == "step-3"
    again = command(world, tmp_path, "runs", write_reward(tmp_path, body, after=10**6))
    assert loralab(*again) == 0
    same_bits(folder, whole)
    (mended,) = json.loads((folder / "environment.json").read_text())["mended"]
    assert mended["step"] == 3 and [key for key in mended if key.endswith("judge.py:judge")]


def test_a_reward_of_wrong_numbers_at_once_leaves_no_folder(world, tmp_path, capsys):
    (tmp_path / "judge.py").write_text("def jugde(prompts, answers, rows):\n    return []\n")
    assert loralab(*command(world, tmp_path, "runs", tmp_path / "judge.py")) == 2
    assert "did you mean" in capsys.readouterr().err
    assert not list((tmp_path / "runs").iterdir())
