"""The battery: every method × every promise."""

import pytest
import torch
from battery import CASES, OURS, STARTED, FixedFeed, NoWatch, begun, fresh_base, logits, loop_on, start, world
from safetensors.torch import load_file

from loralab.base import attention
from loralab.delta.layers import load_delta_
from loralab.delta.lowrank import Dense, LowRank
from loralab.delta.merge import merge_
from loralab.delta.store import check_base, load_lowrank
from loralab.errors import DeltaError

every_case = pytest.mark.parametrize("case", CASES)
ours = pytest.mark.parametrize("case", OURS)
MERGE_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 6e-2}


@every_case
def test_the_start_is_the_identity(case: str) -> None:
    torch.testing.assert_close(logits(world(case)), logits(begun(case)), rtol=1e-5, atol=2e-5)


@every_case
def test_only_announced_tensors_train(case: str) -> None:
    w = world(case)
    announced = {id(p) for g in w.method.param_groups(1e-3, 0.0) for p in g.tensors.values()}
    assert {id(p) for p in w.base.model.parameters() if p.requires_grad} == announced
    before = {n: p.detach().clone() for n, p in w.base.model.named_parameters() if id(p) not in announced}
    loop_on(w, steps=3).run(NoWatch())
    for name, value in before.items():
        assert torch.equal(w.base.model.get_parameter(name), value), name


@every_case
def test_every_target_receives_a_gradient_within_two_steps(case: str) -> None:
    w = world(case)
    seen: set[str] = set()
    loop = loop_on(w, steps=6)
    clip = loop.optimizer.clip

    def look(largest: float | None) -> float:
        seen.update(n for n, p in loop.optimizer.tensors.items() if p.grad is not None and bool(p.grad.any()))
        return clip(largest)

    loop.optimizer.clip = look  # type: ignore[method-assign]
    names = set(loop.optimizer.tensors)
    _two_steps(loop)
    assert seen == names


def _two_steps(loop) -> None:
    watch = NoWatch()
    batches = loop.objective.batches(loop.model)
    for _ in range(2):
        loop._one_step(next(batches), watch)


@every_case
def test_training_lowers_the_loss_on_one_batch(case: str) -> None:
    w = world(case)
    feed = FixedFeed()
    one = feed.next_step()
    feed.next_step = lambda: one  # type: ignore[method-assign]
    watch = NoWatch()
    loop_on(w, steps=12, feed=feed, lr=2e-2 if case != "full" else 5e-3).run(watch)
    assert watch.losses[-1] < watch.losses[0] - 0.02


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_base_plus_delta_is_the_merged_model(case: str, dtype: torch.dtype) -> None:
    if dtype is torch.bfloat16 and case == "peft-pissa":
        pytest.skip("peft computes PiSSA's start in float32 and refuses a bfloat16 base")
    w = world(case, dtype=dtype)
    loop_on(w, steps=4).run(NoWatch())
    tuned, delta = logits(w), w.method.delta()
    merged = begun(case, dtype).base
    merge_(merged.model, delta)
    w.carry(merged.model)
    torch.testing.assert_close(logits(w), tuned, rtol=MERGE_TOLERANCE[dtype], atol=MERGE_TOLERANCE[dtype])


@every_case
def test_without_restores_the_base_exactly(case: str) -> None:
    w, plain = world(case), logits(begun(case))
    with w.method.without():
        untrained = logits(w)
    loop_on(w, steps=3).run(NoWatch())
    tuned = logits(w)
    with w.method.without():
        assert torch.equal(logits(w), untrained)
    torch.testing.assert_close(untrained, plain, rtol=1e-5, atol=2e-5)
    assert torch.equal(logits(w), tuned)
    assert not torch.allclose(tuned, untrained, atol=1e-4)


@every_case
def test_plain_restores_the_base_exactly_without_a_delta_that_it_wore(case: str) -> None:
    w = world(case)
    with w.method.plain():
        untrained = logits(w)
    loop_on(w, steps=3).run(NoWatch())
    tuned = logits(w)
    with w.method.plain():
        assert torch.equal(logits(w), untrained)
    torch.testing.assert_close(untrained, logits(begun("full")), rtol=1e-5, atol=2e-5)
    assert torch.equal(logits(w), tuned)
    assert (case in STARTED) == (not torch.allclose(untrained, logits(begun(case)), atol=1e-2))


@every_case
def test_resume_equals_uninterrupted(case: str) -> None:
    """Every step's state, loaded into a fresh run, ends in the same bits: in the middle of links too."""
    whole = world(case)
    states = {}
    loop_on(whole, steps=6).run(NoWatch(lambda step, state: states.__setitem__(step, _copy(state()))))
    expected = whole.method.state()[0]
    for step in (1, 2, 3, 5):
        w = world(case)
        loop = loop_on(w, steps=6)
        loop.load_state(states[step])
        torch.manual_seed(step)  # the random state must come from the checkpoint
        loop.load_state(states[step])
        loop.run(NoWatch())
        found = w.method.state()[0]
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), (step, name)


def _copy(state):
    state.tensors = {group: {n: t.clone() for n, t in ts.items()} for group, ts in state.tensors.items()}
    return state


@every_case
def test_accumulation_does_not_change_the_result(case: str) -> None:
    results = []
    for micro in (8, 2, 1):
        w = world(case)
        loop_on(w, steps=3, feed=FixedFeed(sequences=8, micro=micro), lr=1e-3, optimizer="adamw").run(NoWatch())
        results.append(logits(w))
    torch.testing.assert_close(results[1], results[0], rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(results[2], results[0], rtol=2e-4, atol=2e-4)


@ours
def test_the_deltas_rank_is_at_most_the_promised_rank(case: str) -> None:
    w = world(case)
    loop_on(w, steps=6).run(NoWatch())
    links = w.method.links()[case in STARTED :]
    for name, layer in w.method.delta().items():
        assert isinstance(layer, LowRank)
        promised = sum(link[name].rank for link in links) if links else layer.rank
        assert layer.rank == promised
        assert int(torch.linalg.matrix_rank(layer.dense(torch.float64))) <= promised


@ours
def test_peft_loads_our_adapter_and_we_load_it_back(case: str, tmp_path) -> None:
    from peft import PeftModel

    w = world(case)
    loop_on(w, steps=6).run(NoWatch())
    tuned = logits(w)
    w.method.save(tmp_path)
    theirs = world("full")
    model = PeftModel.from_pretrained(fresh_base().model, str(tmp_path)).eval()
    theirs.carry(model.base_model.model)
    torch.testing.assert_close(logits(theirs), tuned, rtol=0, atol=1e-5)
    back = world("full")
    delta = load_lowrank(tmp_path)
    check_base(delta, back.base.model, "0" * 64)
    load_delta_(back.base.model, delta)
    torch.testing.assert_close(logits(back), tuned, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", [case for case in STARTED if case in OURS])
def test_what_a_run_from_a_delta_saves_is_the_sum_of_it_and_what_was_learned(case: str, tmp_path) -> None:
    w = world(case)
    loop_on(w, steps=4).run(NoWatch())
    w.method.save(tmp_path)
    first, learned, saved = start(), w.method.delta(), load_lowrank(tmp_path)
    assert set(saved) == {*first, *learned} > set(first) & set(learned) > set()
    for name, layer in saved.items():
        parts = [part[name].dense(torch.float64) for part in (first, learned) if name in part]
        torch.testing.assert_close(layer.dense(torch.float64), sum(parts), rtol=0, atol=1e-7)
    assert all(torch.equal(w.method.links()[0][name].dense(), layer.dense()) for name, layer in first.items())
    assert saved.whole.keys() == first.whole.keys() | learned.whole.keys()
    norm = (learned.whole or first.whole)["model.norm.weight"]
    assert torch.equal(saved.whole["model.norm.weight"], norm)


@ours
def test_save_load_save_changes_no_bit(case: str, tmp_path) -> None:
    from loralab.delta.store import save_lowrank

    w = world(case)
    loop_on(w, steps=3).run(NoWatch())
    w.method.save(tmp_path / "one")
    save_lowrank(tmp_path / "two", load_lowrank(tmp_path / "one"), "tiny")
    one = load_file(tmp_path / "one/adapter_model.safetensors")
    two = load_file(tmp_path / "two/adapter_model.safetensors")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)
    first, second = load_lowrank(tmp_path / "one"), load_lowrank(tmp_path / "two")
    for name, layer in first.items():
        other = second[name]
        assert isinstance(layer, LowRank) and isinstance(other, LowRank) and layer.scale == other.scale


def test_full_checkpoint_loads_in_transformers(tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    w = world("full")
    loop_on(w, steps=3).run(NoWatch())
    tuned = logits(w)
    w.method.save(tmp_path)
    delta = w.method.delta()
    w.carry(AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=attention.NAME))
    assert torch.equal(logits(w), tuned)
    assert all(isinstance(layer, Dense) for layer in delta.values())


def test_a_delta_of_another_base_is_refused() -> None:
    w = world("lora")
    delta = w.method.delta()
    with pytest.raises(DeltaError, match="other base weights"):
        check_base(delta, fresh_base().model, "1" * 64)
    with pytest.raises(DeltaError, match="belongs to another base"):
        check_base(delta, fresh_base("gpt2").model, None)
