"""Who looks on while the loop runs: takes the probes, writes metrics, scores and checkpoints, feeds the display."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from torch import nn

from loralab.base.device import peak_bytes
from loralab.errors import Diverged
from loralab.evals.probe import Cost, Probe, Reading, counting
from loralab.evals.samples import Samples
from loralab.evals.stats import Score
from loralab.methods.base import Knot, Method
from loralab.run.folder import RunFolder, append_line, read_lines
from loralab.run.trackers import Mirror
from loralab.training.checkpoint import State, prune, write_checkpoint
from loralab.training.loop import StepReport
from loralab.training.optim import steps_of


class Display(Protocol):
    """What a person sees while a run goes on."""

    def begin(self, facts: dict[str, Any]) -> None: ...

    def step(self, line: dict[str, Any], total_steps: int) -> None: ...

    def scores(self, step: int, scores: Sequence[Score]) -> None: ...

    def note(self, message: str) -> None: ...

    def end(self) -> None: ...


class Limits(Protocol):
    """Tells after an evaluation why the run should end, if it should."""

    def __call__(self, scores: Sequence[Score]) -> str | None: ...

    def state(self) -> dict[str, Any]: ...

    def load_state(self, state: dict[str, Any]) -> None: ...


class Silent:
    """A display that shows nothing."""

    def begin(self, facts: dict[str, Any]) -> None: ...

    def step(self, line: dict[str, Any], total_steps: int) -> None: ...

    def scores(self, step: int, scores: Any) -> None: ...

    def note(self, message: str) -> None: ...

    def end(self) -> None: ...


class RunWatch:
    """The loop's watch for a run in a folder."""

    def __init__(
        self,
        *,
        folder: RunFolder,
        model: nn.Module,
        method: Method,
        probes: list[Probe],
        samples: Samples | None = None,
        total_steps: int,
        probe_every: float,
        checkpoint_every: float,
        keep_last: int,
        keep_best: bool,
        display: Display,
        mirrors: Sequence[Mirror] = (),
        best: tuple[str, bool] | None = None,
        limits: Limits | None = None,
        stop_requested: Callable[[], bool] = lambda: False,
        wall_s: float = 0.0,
    ) -> None:
        self.folder, self.model, self.method, self.probes, self.samples = folder, model, method, probes, samples
        self.total_steps, self.display, self.mirrors = total_steps, display, mirrors
        self.probe_steps = max(1, steps_of(probe_every, total_steps))
        self.checkpoint_steps = max(1, steps_of(checkpoint_every, total_steps))
        self.keep_last, self.keep_best = keep_last, keep_best
        self.best, self.limits, self.end = best, limits, ""
        self.stop_requested = stop_requested
        self.base_readings: dict[str, Reading] = {}
        self.cost = Cost()
        self._readings: dict[str, tuple[int, Reading]] = {}
        self._recorded_at: int | None = None
        self._sampled_at: tuple[int, str] | None = None
        self._saved_at: int | None = None
        self._best: tuple[float, int] | None = None
        self._begin = time.perf_counter() - wall_s

    @property
    def wall_s(self) -> float:
        """Seconds of this run so far, those before a resume included."""
        return time.perf_counter() - self._begin

    @property
    def facts(self) -> dict[str, Any]:
        """What the run and its probes took so far, as the status tells it."""
        probes = {"probe_s": round(self.cost.seconds, 3), "probe_tokens": self.cost.tokens}
        return {"wall_s": round(self.wall_s, 3), **probes, "probe_forwards": self.cost.forwards}

    def read_base(self, step: int) -> None:
        """Read the base with every probe; its scores are recorded once, before the first step."""
        for probe in self.probes:
            with counting(self.model, self.cost):
                reading = probe.read_base(self.method.without())
            self.base_readings[probe.name] = reading
            if step == 0:
                self._record(0, "base", reading.scores)
        if step == 0:
            with self.method.without():
                self._sample(0, "base")

    def measure(self, step: int, *, last: bool = False) -> None:
        if step == 0:
            self.read_base(0)
        if (last or step % self.probe_steps == 0) and self.probes and self._recorded_at != step:
            before = self.cost.seconds
            readings = [self._read(probe, step) for probe in self.probes]
            scores = [score for reading in readings for score in reading.scores]
            self._record(step, "tuned", scores)
            self._mirror(step, {score.name: score.value for score in scores})
            self._mirror(step, {"probe_s": self.cost.seconds - before})
            if scores:
                self.display.scores(step, scores)
            self._recorded_at = step
            self.end = (self.limits(scores) if self.limits is not None and step else None) or ""
            if self.samples is not None and self.samples.is_often_taken and step:
                self._sample(step, "tuned")
        if last:
            self._sample(step, "tuned")

    def _sample(self, step: int, model: str) -> None:
        """Keep what the model writes behind the chosen prompts."""
        if self.samples is not None and self._sampled_at != (step, model):
            self._sampled_at = step, model
            with counting(self.model, self.cost):
                lines = self.samples.lines(step, model)
            for line in lines:
                append_line(self.folder.samples, line)

    def _read(self, probe: Probe, step: int) -> Reading:
        """Read a probe after `step` steps, once."""
        if self._readings.get(probe.name, (None,))[0] != step:
            with counting(self.model, self.cost):
                reading = probe.read(step)
            self._refuse_divergence(step, reading.scores)
            self._readings[probe.name] = step, reading
        return self._readings[probe.name][1]

    def _refuse_divergence(self, step: int, scores: Sequence[Score]) -> None:
        for score in scores:
            if not math.isfinite(score.value):
                raise Diverged(
                    f"training diverged: {score.name} is {score.value}",
                    where=f"step {step}",
                    fix="lower optimizer.learning_rate, or raise schedule.warmup",
                )

    def _record(self, step: int, model: str, scores: Sequence[Score]) -> None:
        self._refuse_divergence(step, scores)
        for score in scores:
            append_line(self.folder.scores, score.as_line(step, model))

    def final_readings(self, step: int) -> dict[str, Reading]:
        """Give the readings of the weights that are saved; a run that was stopped behind its last step takes them again.

        Those of a best checkpoint between two evaluations are recorded now, so that what stands in the folder is of its delta.
        """
        readings = {probe.name: self._read(probe, step) for probe in self.probes}
        if not any(line["step"] == step and line["model"] != "base" for line in read_lines(self.folder.scores)):
            self._record(step, "tuned", [score for reading in readings.values() for score in reading.scores])
        return readings

    def validation_loss(self, step: int) -> float | None:
        """Give the validation loss after `step` steps (nats per token), with one probe if it is not known yet."""
        for probe in self.probes:
            if probe.name == "target":
                return self._read(probe, step).scores[0].value
        return None

    @property
    def best_step(self) -> int | None:
        """Step of the best checkpoint, if one is kept."""
        return self._best[1] if self._best is not None else None

    def is_enough(self) -> bool:
        return bool(self.end)

    def _merit(self, step: int) -> float | None:
        """Give the lower the better what chooses the best checkpoint."""
        if self.best is None:
            return self.validation_loss(step)
        name, is_higher_better = self.best
        for probe in self.probes:
            if name.startswith(f"{probe.name}/"):
                value = next(score.value for score in self._read(probe, step).scores if score.name == name)
                return -value if is_higher_better else value
        return None

    def on_step(self, report: StepReport) -> None:
        line = {
            "step": report.step,
            "loss": report.loss,
            "gradient_norm": report.gradient_norm,
            "learning_rate": report.learning_rates,
            "tokens": report.num_tokens,
            "labelled": report.num_labelled,
            "tokens_per_s": report.num_tokens / report.seconds,
            "wall_s": round(self.wall_s, 3),
            "peak_bytes": peak_bytes(),
            **report.metrics,
        }
        append_line(self.folder.metrics, line)
        rates = {f"learning_rate/{name}": rate for name, rate in report.learning_rates.items()}
        self._mirror(report.step, {"loss": report.loss, "gradient_norm": report.gradient_norm, **rates})
        self.display.step(line, self.total_steps)

    def _mirror(self, step: int, metrics: dict[str, float]) -> None:
        for mirror in self.mirrors:
            mirror.log(step, metrics)

    def on_knot(self, knot: Knot, step: int) -> None:
        """Save the link that was tied and say so."""
        append_line(self.folder.metrics, {"step": step, "knot": knot.link, "gain": knot.gain, "ends": knot.ends})
        gain = "" if knot.gain is None else f", its loss gained {knot.gain:.4f}"
        end = "; the chain ends here" if knot.ends else ""
        self.display.note(f"knot: link {knot.link} tied after step {step}{gain}{end}")

    def on_warning(self, message: str, step: int) -> None:
        append_line(self.folder.metrics, {"step": step, "warning": message})
        self.display.note(f"warning: {message}")

    def save_if_due(self, step: int, state: Callable[[], State], *, now: bool = False) -> None:
        """Write a checkpoint if one is due, keep the last and the best, and note it in the status."""
        if self._saved_at == step or not (now or step % self.checkpoint_steps == 0):
            return  # a checkpoint that stands is not written again: it may be the only one
        merit = self._merit(step) if self.keep_best else None
        if merit is not None and (self._best is None or merit < self._best[0]):
            self._best = (merit, step)
        full = state()
        full.facts["watch"] = {"best": self._best, "wall_s": self.wall_s, "cost": asdict(self.cost), "end": self.end}
        if self.limits is not None:
            full.facts["watch"]["limits"] = self.limits.state()
        write_checkpoint(self.folder.checkpoints, full)
        self._saved_at = step
        prune(self.folder.checkpoints, self.keep_last, self._best[1] if self._best else None)
        self.folder.write_status(state="running", step=step, total_steps=self.total_steps, **self.facts)

    def load(self, facts: dict[str, Any], step: int) -> None:
        """Go on from the facts of the checkpoint of a step."""
        self._saved_at = step
        self._best = tuple(facts["best"]) if facts["best"] else None
        self._begin = time.perf_counter() - facts["wall_s"]
        self.cost, self.end = Cost(**facts.get("cost", {})), facts.get("end", "")
        if self.limits is not None and "limits" in facts:
            self.limits.load_state(facts["limits"])
