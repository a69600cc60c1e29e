"""Pages of reinforced runs: reward beside the held-out one, the price, what was written, and whether the reward was gamed."""

import re

import pytest

from judged_world import PROMPTS, READS, make_policy
from loralab.evals.stats import Score
from loralab.report.compare import compare, difference
from loralab.report.page import write
from loralab.report.policy import against_kl, alike, figures, gamed, rewards, samples
from loralab.report.read import Run, runs_below
from loralab.report.verdict import verdict
from loralab.run.folder import RunFolder, keep_lines
from page_reader import Page
from report_world import STEPS


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("policy")
    make_policy(root / "two", "lora-r4", games=True)
    make_policy(root / "two", "full")
    make_policy(root / "proxy", held_out=False)
    make_policy(root / "scaled", scale=20.0)
    return root


@pytest.fixture(scope="module")
def html(root):
    return write(root / "two").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def comparison(root, name):
    (found,) = compare(runs_below(root / name))
    return found


def titles(html):
    return re.findall(r"<figcaption><strong>(.*?)</strong>", html)


def test_what_was_learned_is_the_paired_rise_of_the_held_out_reward(root, page):
    full = next(run for run in runs_below(root / "two") if run.method == "full")
    moved, base, after = (
        full.after["policy/held_out_change"],
        full.base["policy/held_out"],
        full.after["policy/held_out"],
    )
    said = f"Full learned most: +{moved.value:.3f}"
    assert said in page.words and moved.value == pytest.approx(after.value - base.value)
    assert f"of held-out reward on words ({base.value:.3f} → {after.value:.3f})" in page.words
    assert "0.100 ± 0.020 nats per token on the text of the old skills" in page.words, "forgetting is watched too"
    assert "Learning against forgetting" in page.words


def test_without_a_held_out_reward_the_proxy_is_named_as_such(root):
    told = verdict(comparison(root, "proxy"))
    assert "of reward trained on on words" not in told.learned
    assert re.match(r"LoRA r4 learned \+\d\.\d+\s±\s\d\.\d+ of the reward it was trained on, on words \(", told.learned)
    assert told.gamed == ""


def test_both_rewards_stand_on_one_plot_and_the_kl_on_a_second(html):
    found = titles(html)
    assert (
        found.index("Distance from the base: KL(policy‖base)")
        == found.index("Reward trained on, and held-out reward") + 1
    )
    for title in ("Entropy of the next token", "Length of answers", "Distinct answers to the same prompt"):
        assert found.count(title) == 1
    assert "Rewards against the distance from the base" in found
    assert "Old skills: loss on general text" in found, "forgetting over training"
    assert "Loss on the training data" not in found, "the loss of a policy is no distance from anything"


def test_every_evaluation_of_both_rewards_can_be_read(root, html):
    run = next(run for run in runs_below(root / "two") if run.method == "lora")
    figure = next(f for f in re.findall(r"<figure>.*?</figure>", html, flags=re.S) if "and held-out reward" in f)
    for name, what in (("policy/reward", "reward trained on"), ("policy/held_out", "held-out reward")):
        tips = re.findall(rf'data-tip="LoRA r4, {what}: (\S+)\s[^"]* after (\d+) steps"', figure)
        told = {int(step): value.replace("−", "-") for value, step in tips}
        assert told == {step: f"{score.value:.3f}" for step, score in run.history[name]}
    assert figure.count("stroke-dasharray") >= 2, "the held-out rewards are dashed"


def test_rewards_of_other_scales_are_told_in_spreads_of_the_base(root):
    found = comparison(root, "scaled")
    (run,) = found.runs
    drawn = rewards(found, "r")
    assert "rise, in spreads of the base" in drawn.svg and "mean reward of an answer" not in drawn.svg
    base, last = run.base["policy/reward"], run.history["policy/reward"][-1][1]
    expected = (last.value - base.value) / (base.standard_error * PROMPTS**0.5)
    tips = re.findall(rf'data-tip="LoRA r4, reward trained on: (\S+)\s[^"]* after {STEPS} steps"', drawn.svg)
    assert tips == [f"{expected:.3f}"]
    assert 1.5 < expected < 2.6
    assert "mean reward of an answer" in rewards(comparison(root, "two"), "r").svg


def test_rewards_are_drawn_against_the_root_of_the_kl(root):
    drawn = against_kl(comparison(root, "two"), "k")
    places = {float(x) for x in re.findall(r'data-tip="full, held-out reward: [^"]* at ([\d.]+)"', drawn.svg)}
    kl = {step: 8 * (step / STEPS) ** 2 for step in READS}
    assert places == {float(f"{value**0.5:.3g}") for value in kl.values()}


def test_gaming_is_said_in_the_verdict(page, root):
    run = next(run for run in runs_below(root / "two") if run.method == "lora")
    held = {step: score.value for step, score in run.history["policy/held_out"]}
    best = max(held, key=held.get)
    assert 0 < best < STEPS
    assert f"LoRA r4 gamed its reward: from step {best} to step {STEPS} the held-out reward fell" in page.words
    assert "full gamed" not in page.words


def test_two_policies_are_compared_prompt_by_prompt(root):
    found = comparison(root, "two")
    full, lora = found.runs
    apart = (full.items["held_out"] - lora.items["held_out"]).to_numpy(float)
    paired = difference(full, lora, found.views[0].learning)
    assert paired.value == pytest.approx(apart.mean()) and apart.mean() > 0.5
    assert paired.standard_error == pytest.approx(apart.std(ddof=1) / len(apart) ** 0.5, abs=1e-12)
    alone = Run("x", "done", lora.spec, base=lora.base, after=lora.after)
    unpaired = difference(full, alone, found.views[0].learning)
    assert unpaired.value == pytest.approx(paired.value) and unpaired.standard_error > paired.standard_error


def test_the_page_says_why_a_policy_ended(tmp_path):
    path = make_policy(tmp_path)
    RunFolder(path).write_status(step=20, total_steps=60, end="policy/kl 12.5 is above objective.max_kl")
    words = Page(write(path).read_text(encoding="utf-8")).words
    assert "LoRA r4 ended after step 20 of 60: policy/kl 12.5 is above objective.max_kl." in words
    assert "were kept" not in words


def policy(held_out, trained, error=0.01, n=60):
    """Make a run by hand from levels at steps 0, 10, 20, …"""
    made = {}
    for name, values in (("policy/held_out", held_out), ("policy/reward", trained)):
        made[name] = [(10 * i, Score(name, value, "reward", n, error)) for i, value in enumerate(values)]
    base = {name: scores[0][1] for name, scores in made.items()}
    return Run("a", "done", {"objective": {"name": "policy"}}, base=base, history=made)


@pytest.mark.parametrize(
    ("held_out", "trained", "error", "is_gamed"),
    [
        ([0.4, 0.6, 0.3], [0.0, 1.0, 2.0], 0.01, True),
        ([0.4, 0.3, 0.2], [0.0, 1.0, 2.0], 0.01, True),
        ([0.4, 0.6, 0.3], [0.0, 1.0, 2.0], 0.2, False),
        ([0.4, 0.6, 0.3], [0.0, 2.0, 1.0], 0.01, False),
        ([0.4, 0.5, 0.6], [0.0, 1.0, 2.0], 0.01, False),
        ([0.4, 0.6, 0.3], [0.0, 1.0, 2.0], None, False),
    ],
    ids=["fell back", "fell from the start", "within chance", "both fell", "both rose", "no errors"],
)
def test_gaming_is_a_fall_beyond_chance_while_the_reward_rises(held_out, trained, error, is_gamed):
    assert bool(gamed(policy(held_out, trained, error), "x")) == is_gamed


@pytest.mark.parametrize(("algorithm", "end"), [("rloo", "alike, which taught nothing."), ("reinforce", "alike.")])
def test_prompts_whose_answers_were_rewarded_alike_are_counted(tmp_path, algorithm, end):
    objective = {"name": "policy", "reward": ["pocket:true"], "algorithm": algorithm}
    make_policy(tmp_path, held_out=False, objective=objective)
    (run,) = runs_below(tmp_path)
    assert run.at("train.batch_size") == 8
    assert alike(run, "x") == f"x: all answers to 25.0 % of the training prompts were rewarded {end}"
    assert alike(policy([0.4, 0.5], [0.0, 1.0]), "x") == ""


def test_the_table_holds_base_and_end(root, page):
    run = next(run for run in runs_below(root / "two") if run.method == "full")
    rows = page.table("run", "reward", "held-out reward", "KL", "entropy", "tokens", "distinct")
    shown = dict(zip(rows[0], next(row for row in rows if row[0] == "full"), strict=True))
    for head, name in {"held-out reward": "held_out", "entropy": "entropy", "tokens": "length"}.items():
        before, after = shown[head].split(" → ")
        assert before == f"{run.base[f'policy/{name}'].value:.3f}"
        assert after.split()[0] == f"{run.after[f'policy/{name}'].value:.3f}"
    assert shown["KL"].startswith("8.000"), "the base is no distance from itself"


def test_what_was_written_is_shown_over_time_as_text(root, html, page):
    assert "What it wrote, over time" in page.words and "Answers before and after" not in page.words
    assert "<script>alert" not in html and "<b>word</b>" not in html
    cards = samples(comparison(root, "two"))
    assert [card.prompt for card in cards] == ["Say <b>word</b> 0:", "Say <b>word</b> 1:"]
    for card in cards:
        assert [(run and run.method, when) for run, when, _, _ in card.rows] == [
            (None, "base"),
            *(("full", f"step {step}") for step in READS[1:]),
            *(("lora", f"step {step}") for step in READS[1:]),
        ], "the base wrote once, it is the same for both"
    (lora,) = (run for run in runs_below(root / "two") if run.method == "lora")
    line = next(line for line in lora.samples if line["step"] == STEPS and line["prompt"].endswith("0:"))
    worth = cards[0].rows[-1][3].replace("−", "-")
    assert worth == f"reward {line['reward']:.2f}, held out {line['held_out']:.2f}"


def test_training_lines_stand_in_where_nothing_was_evaluated(tmp_path):
    path = make_policy(tmp_path, held_out=False)
    keep_lines(path / "scores.jsonl", lambda line: not line["name"].startswith("policy/"))
    (found,) = compare(runs_below(tmp_path))
    drawn = {figure.title for figure in figures(found, "x")}
    assert drawn == {
        "Reward",
        "Distance from the base: KL(policy‖base)",
        "Entropy of the next token",
        "Length of answers",
    }
    assert "What was learned was not measured" in verdict(found).learned


def test_the_page_is_the_same_file_when_rebuilt(root, html, tmp_path):
    assert write(root / "two", tmp_path / "again.html").read_text(encoding="utf-8") == html


@pytest.mark.parametrize("missing", ["scores.jsonl", "samples.jsonl", "metrics.jsonl"])
def test_a_missing_file_leaves_its_section_out(tmp_path, missing):
    path = make_policy(tmp_path)
    (path / missing).unlink()
    words = Page(write(path).read_text(encoding="utf-8")).words
    assert ("What it wrote, over time" in words) == (missing != "samples.jsonl")
    assert ("Reward trained on, and held-out reward" in words) == (missing != "scores.jsonl")
