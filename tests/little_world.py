"""A whole little world on disk for tests of the command line: a base, rows to learn, and the command itself."""

import json
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 =>:.\n"
TIMING = ("tokens_per_s", "wall_s", "peak_bytes")
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]


def make_base(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Save a tiny Llama with 64 positions and a tokenizer of single characters."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from tiny import tiny

    tiny("llama", seed=seed, **changes).save_pretrained(folder)
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *CHARACTERS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    return folder


def rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Make rows that can be learned: a word, and the same word backwards."""
    rng = random.Random(seed)
    words = ["".join(rng.choice("abcdef") for _ in range(rng.randint(3, 7))) for _ in range(count)]
    return [{"prompt": f"reverse {word} = ", "completion": word[::-1]} for word in words]


def write_rows(path: Path, found: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return path


def make_world(folder: Path, *, train: int = 48, held_out: int = 8) -> Path:
    """Write `base/`, `train.jsonl`, `validation.jsonl` and `general.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    make_base(folder / "base")
    write_rows(folder / "train.jsonl", rows(train, seed=1))
    write_rows(folder / "validation.jsonl", rows(held_out, seed=2))
    write_rows(
        folder / "general.jsonl", [{"text": f"{row['completion']} is {i}."} for i, row in enumerate(rows(held_out))]
    )
    return folder


def overrides(world: Path, **keys: Any) -> list[str]:
    """Give the overrides that name a world's files, and more: `train__steps=3` is `train.steps=3`."""
    data = {f"data.{name}": world / f"{name}.jsonl" for name in ("train", "validation", "general")}
    chosen = {"model.path": world / "base", "model.device": "cpu", **data, "data.max_length": 64, "train.steps": 6}
    chosen |= {"train.batch_size": 2, "optimizer.learning_rate": 0.01}
    chosen |= {name.replace("__", "."): value for name, value in keys.items()}
    return [f"{name}={value if isinstance(value, str | Path) else json.dumps(value)}" for name, value in chosen.items()]


def loralab(*words: Any) -> int:
    """Run the command line in this process and give its exit code; a traceback stays an exception."""
    from loralab.cli import main

    before = sys.argv
    sys.argv = ["loralab", *map(str, words)]
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before
    return 0


def only_run(root: Path) -> Path:
    """Give the one run folder below a root."""
    (found,) = [path for path in root.iterdir() if path.is_dir()]
    return found


def in_child(log: str, *words: str) -> None:
    """Be a process of its own that runs the command line, says everything into a file, and ends with its exit code."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.exit(loralab(*words))


def same_bits(run: Path, whole: Path) -> None:
    """Check that a run ended in the same bits as an uninterrupted one: delta, links, losses, scores, items, spectra."""
    import pandas as pd

    from loralab.run.folder import RunFolder

    status, expected = RunFolder(run).read_status(), RunFolder(whole).read_status()
    assert (status["state"], status["step"], status["end"]) == ("done", expected["step"], expected["end"])
    assert _tensor_files(run) == _tensor_files(whole)
    assert any(path.parts[0] == "delta" for path in _tensor_files(whole))
    for path in _tensor_files(whole):
        assert (run / path).read_bytes() == (whole / path).read_bytes(), path
    for name in ("metrics.jsonl", "scores.jsonl", "samples.jsonl"):
        assert untimed(run / name) == untimed(whole / name), name
    tables = sorted(path.name for path in whole.glob("*.parquet"))
    assert tables == sorted(path.name for path in run.glob("*.parquet")) and "items.parquet" in tables
    for name in tables:
        pd.testing.assert_frame_equal(pd.read_parquet(run / name), pd.read_parquet(whole / name), check_exact=True)
    assert not list(run.glob("spectra")) + list(run.glob("intruders")), "parts become one table"


def _tensor_files(run: Path) -> set[Path]:
    """Name the safetensors of a run, apart from its checkpoints."""
    return {path.relative_to(run) for path in run.rglob("*.safetensors") if "checkpoints" not in path.parts}


def stop_at(step: int) -> Any:
    """Give a display that asks the run to stop behind a step, as Ctrl+C does."""
    from loralab.lab.watch import Silent

    class Stop(Silent):
        def step(self, line: dict[str, Any], total_steps: int) -> None:
            if line["step"] == step:
                signal.raise_signal(signal.SIGINT)

    return Stop()


def untimed(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines without what differs from one machine and hour to another."""
    from loralab.run.folder import read_lines

    return [{key: value for key, value in line.items() if key not in TIMING} for line in read_lines(path)]
