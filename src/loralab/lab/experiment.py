"""Runs one spec: the composition root, and the only place where a spec becomes objects."""

from contextlib import suppress
from pathlib import Path

import torch

from loralab.base.device import peak_bytes
from loralab.base.targets import fused_weights
from loralab.errors import Diverged, Interrupted, LoralabError
from loralab.evals.probe import counting
from loralab.lab.objectives import prepare
from loralab.lab.prepare import Prepared
from loralab.lab.result import Result, result_of, save_delta, write_items
from loralab.lab.resume import resume, same_inputs_or_refuse
from loralab.lab.run_spectra import SpectraProbe
from loralab.lab.stop import Stop, interrupts_explained, stop_on_signals
from loralab.lab.watch import Display, RunWatch, Silent
from loralab.run.folder import RunFolder
from loralab.run.trackers import mirrors
from loralab.spec.recipes import dump
from loralab.spec.spec import RunSpec
from loralab.training.checkpoint import checkpoints, read_checkpoint
from loralab.training.loop import Loop
from loralab.training.optim import schedule, torch_optimizer


def train(spec: RunSpec, root: str | Path = "runs", *, display: Display | None = None) -> Result:
    """Run a spec in its folder below `root`, from the beginning or from where it stopped.

    Raises:
        LoralabError: bad input (exit code 2); nothing already written is lost.
        Diverged: NaN or a loss spike; the last good checkpoint is kept.
        Interrupted: a stop was requested or the disk is full; the same command goes on.
    """
    # Trackers are no part of the run's identity: another list of them resumes the same run.
    folder = RunFolder.create_or_open(root, spec.folder_name, dump(spec.model_copy(update={"trackers": []})))
    if folder.read_status()["state"] == "done":
        if display is not None:
            display.note(f"{folder.path} is done already")
        return result_of(folder)
    try:
        return _run_locked(spec, folder, display or Silent())
    except LoralabError:
        folder.remove_if_unused()
        raise


def _run_locked(spec: RunSpec, folder: RunFolder, display: Display) -> Result:
    with folder.lock(), stop_on_signals() as stop:
        try:
            with interrupts_explained():
                return _run(spec, folder, display, stop)
        except Interrupted as error:
            folder.write_status(state="interrupted", message=str(error))
            raise
        except Diverged as error:
            folder.write_status(state="diverged", message=str(error))
            raise
        except LoralabError as error:  # a reward function that fails, say: what is written goes on once it is mended
            if folder.read_status()["state"] == "running":
                folder.write_status(state="interrupted", message=str(error))
            raise


def _run(spec: RunSpec, folder: RunFolder, display: Display, stop: Stop) -> Result:
    prepared = prepare(spec)
    torch.manual_seed(spec.seed)  # of dropout; the methods draw their starts from generators of their own
    same_inputs_or_refuse(folder, prepared)
    loop = loop_of(spec, prepared)
    spectra = SpectraProbe(
        folder,
        prepared.base.model,
        prepared.method,
        look_for_intruders=spec.probes.spectra == "intruders",
        warn=lambda message, step: watch.on_warning(message, step),
    )
    watch = RunWatch(
        folder=folder,
        model=prepared.base.model,
        method=prepared.method,
        probes=[*prepared.probes, spectra] if spec.probes.spectra else prepared.probes,
        samples=prepared.samples,
        total_steps=prepared.total_steps,
        probe_every=spec.probes.every,
        checkpoint_every=spec.checkpoints.every,
        keep_last=spec.checkpoints.keep_last,
        keep_best=spec.checkpoints.keep_best,
        display=display,
        mirrors=mirrors(list(spec.trackers), folder.path, spec.folder_name, spec.model_dump(mode="json")),
        best=prepared.best,
        limits=prepared.limits,
        stop_requested=lambda: stop.requested,
    )
    goes_on = bool(checkpoints(folder.checkpoints))
    resume(folder, loop, watch, spec=spec, fingerprint=prepared.base.fingerprint)
    spectra.keep(loop.step if goes_on else 0)
    share = {
        "trained_parameters": prepared.attachment.trained_parameters,
        "all_parameters": prepared.attachment.all_parameters,
    }
    folder.write_status(state="running", message=None, step=loop.step, total_steps=loop.total_steps, **share)
    display.begin(
        {
            "folder": folder.path,
            "method": spec.method.name,
            "model": spec.model.path,
            "device": str(prepared.base.model.device),
            "dtype": str(prepared.base.model.dtype).removeprefix("torch."),
            "share": prepared.attachment.share,
            "step": loop.step,
            "total_steps": loop.total_steps,
            "data_report": prepared.data.report,
            **share,
        }
    )
    if spec.method.name != "full" and (fused := fused_weights(prepared.base.model)):
        display.note(f"warning: {sum(fused.values()):,} numbers in fused weights ({next(iter(fused))} …) are no target")
    try:
        loop.run(watch)
    except (Diverged, Interrupted):
        with suppress(Interrupted):  # a full disk is no news here
            spectra.gather(loop.step)
        raise
    finally:
        display.end()
        for mirror in watch.mirrors:
            mirror.close()
    best_step = _take_best(spec, folder, prepared, watch.best_step)
    delta_step = loop.step if best_step is None else best_step
    if delta_step == 0:
        watch.on_warning("nothing was better than the start, which is what is saved", loop.step)
    save_delta(folder, prepared)
    write_items(folder, watch.base_readings, watch.final_readings(delta_step))
    if spec.probes.spectra:
        with counting(prepared.base.model, watch.cost):
            left_out = spectra.finish(delta_step)
        if left_out:
            display.note(f"no spectrum of {len(left_out)} large matrices ({left_out[0]} …): it would take long")
    folder.write_status(
        state="done",
        step=loop.step,
        delta_step=delta_step,
        total_steps=loop.total_steps,
        tokens=loop.num_tokens,
        **watch.facts,
        peak_bytes=peak_bytes(),
        end=watch.end or ("all steps done" if loop.step == prepared.total_steps else "the chain ended early"),
    )
    return result_of(folder)


def _take_best(spec: RunSpec, folder: RunFolder, prepared: Prepared, best_step: int | None) -> int | None:
    """Put back the weights of the best checkpoint where a score chooses it (P5: the one of best validation accuracy).

    Returns:
        Its step; None where the last weights stay: no score chooses, or a chain would have to lose links.
    """
    if prepared.best is None or best_step is None or spec.method.name == "cola":
        return None
    state = read_checkpoint(folder.checkpoints / f"step-{best_step}")
    prepared.method.load_state(state.tensors["method"], state.facts["method"])
    return best_step


def loop_of(spec: RunSpec, prepared: Prepared, total_steps: int | None = None) -> Loop:
    """Make the loop of a spec; `total_steps` overrides its length."""
    chosen = spec.optimizer.model_dump(exclude={"learning_rate", "weight_decay"})
    assert spec.optimizer.learning_rate is not None
    is_policy = spec.objective.name == "policy"
    return Loop(
        model=prepared.base.model,
        method=prepared.method,
        objective=prepared.objective,
        make_optimizer=torch_optimizer(**chosen),
        learning_rate=spec.optimizer.learning_rate,
        weight_decay=spec.optimizer.weight_decay,
        schedule=schedule(**spec.schedule.model_dump()),
        total_steps=total_steps or prepared.total_steps,
        clip=spec.train.clip,
        spike=None if is_policy else spec.train.spike,  # its loss is no distance from anything
        may_rest=is_policy,
    )
