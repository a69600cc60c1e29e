"""What is said of a run at its end, by result, index, board and page: of the weights that were kept, in the run's own measure."""

import json
import math
from io import StringIO

import pandas as pd
import pytest
from rich.console import Console

from judged_world import EVERY, make_judged, make_policy
from loralab.console.progress import Board, PlainDisplay, scores_text
from loralab.lab.index import index
from loralab.lab.result import result_of
from loralab.report.read import runs_below
from loralab.run.folder import RunFolder, append_line, keep_lines
from report_world import STEPS, make_run

BEST = 2 * EVERY


def at(path, name, step, model="tuned"):
    """Give a score as the file holds it."""
    lines = [json.loads(line) for line in (path / "scores.jsonl").read_text().splitlines()]
    (value,) = (one["value"] for one in lines if (one["name"], one["step"], one["model"]) == (name, step, model))
    return value


@pytest.mark.parametrize("put_back", [True, False])
def test_the_scores_at_the_end_are_those_of_the_weights_that_were_kept(tmp_path, put_back):
    path = make_judged(tmp_path, delta_step=BEST if put_back else None)
    step = BEST if put_back else STEPS
    result, (run,), (row,) = result_of(RunFolder(path)), runs_below(tmp_path), index(tmp_path).to_dict("records")
    names = ("target/loss", "target/accuracy", "target/majority_change", "target/margin_mean")
    for name in names:
        assert result.score(name).value == run.after[name].value == at(path, name, step)
    assert at(path, "target/loss", BEST) != at(path, "target/loss", STEPS)
    assert row["target_loss_end"] == at(path, "target/loss", step)
    assert run.history["target/loss"][-1][0] == STEPS, "curves go on to the last step"


@pytest.mark.parametrize("odd", [None, True, "20", 1.5])
def test_an_odd_step_of_the_delta_is_passed_over(tmp_path, odd):
    path = make_judged(tmp_path)
    RunFolder(path).write_status(delta_step=odd)
    (run,) = runs_below(tmp_path)
    assert run.after["target/loss"].value == at(path, "target/loss", STEPS)


def test_without_a_score_up_to_the_kept_step_nothing_is_known(tmp_path):
    make_judged(tmp_path, delta_step=EVERY - 1)
    (run,) = runs_below(tmp_path)
    assert run.after == {}, "what was measured later is of other weights"


def test_the_index_says_what_each_objective_learned_by(tmp_path):
    made = {kind: make_judged(tmp_path / kind, kind=kind) for kind in ("pairs", "thumbs", "classify", "regression")}
    made |= {"policy": make_policy(tmp_path / "policy"), "proxy": make_policy(tmp_path / "proxy", held_out=False)}
    made["text"] = make_run(tmp_path / "text", "lora-r4")
    found = {kind: index(tmp_path / kind).to_dict("records")[0] for kind in made}
    assert {kind: row["learned_by"] for kind, row in found.items()} == {
        "pairs": "accuracy over the baseline",
        "thumbs": "AUC over chance",
        "classify": "accuracy over the commonest label",
        "regression": "Pearson correlation",
        "policy": "held-out reward",
        "proxy": "reward",
        "text": "loss, nats per token",
    }
    for kind, name, against in (
        ("pairs", "target/accuracy", 0.5),
        ("thumbs", "target/auc", 0.5),
        ("classify", "target/accuracy", at(made["classify"], "target/majority", STEPS)),
        ("regression", "target/pearson", 0.0),
        ("policy", "policy/held_out", at(made["policy"], "policy/held_out", 0, "base")),
        ("proxy", "policy/reward", at(made["proxy"], "policy/reward", 0, "base")),
    ):
        assert found[kind]["learning"] == pytest.approx(at(made[kind], name, STEPS) - against), kind
        assert found[kind]["learning"] > 0.1, kind
    assert found["policy"]["forgetting"] == pytest.approx(0.1)


def test_a_run_without_its_measure_learned_nothing_that_is_known(tmp_path):
    path = make_policy(tmp_path)
    keep_lines(path / "scores.jsonl", lambda line: not line["name"].startswith("policy/"))
    (row,) = index(tmp_path).to_dict("records")
    assert math.isnan(row["learning"]) and row["learned_by"] is None
    assert row["forgetting"] == pytest.approx(0.1)


def test_a_damaged_folder_of_another_objective_is_still_a_row(tmp_path):
    path = make_judged(tmp_path)
    (path / "status.json").write_text('{"state": "do')
    assert isinstance(table := index(tmp_path), pd.DataFrame) and list(table["state"]) == ["damaged"]


def shown(line):
    out = StringIO()
    display = PlainDisplay(Console(file=out, width=200))
    display._every = 1
    facts = {"step": 1, "gradient_norm": 0.5, "learning_rate": {"a": 1e-3}, "tokens_per_s": 10.0, "peak_bytes": 2**20}
    display.step({**facts, **line}, 2)
    return out.getvalue()


def test_progress_tells_a_policy_by_its_reward_and_a_judge_by_loss_and_accuracy():
    policy = shown({"loss": -0.31, "reward": 0.5, "kl": 1.25, "entropy": 0.75, "length": 12.5})
    assert "reward 0.5000  KL 1.2500  entropy 0.7500  tokens 12.5000" in policy and "loss" not in policy
    assert "loss 0.6931  accuracy 0.7500  |g|" in shown({"loss": 0.6931, "accuracy": 0.75})
    assert "step 1/2  loss 2.0000  |g| 0.5" in shown({"loss": 2.0})


def test_the_screen_leaves_small_print_to_the_files():
    said = scores_text({"target/loss": 0.5, "target/auc": 0.75, "target/brier": 0.1, "target/up/accuracy": 0.2})
    assert said == "target/loss 0.5000  target/auc 0.7500"


def test_the_board_shows_reward_and_area(tmp_path):
    folders = [RunFolder(make_judged(tmp_path / "a", kind="thumbs")), RunFolder(make_policy(tmp_path / "b"))]
    append_line(folders[1].metrics, {"step": STEPS, "loss": -1.0, "reward": 0.25})
    out = StringIO()
    with Board(["judge", "policy"], Console(file=out, width=400)) as board:
        board.look(folders)
    judge, policy = out.getvalue().splitlines()
    assert "target/auc" in judge and "target/brier" not in judge and "accuracy 0.800" in judge
    assert "reward 0.250" in policy and "loss -1" not in policy and "policy/held_out" in policy
