"""Columns of `items.parquet`, of runs and of evaluations. No torch here: pages are made of them."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from loralab.run.files import write_atomic

ITEMS = pa.schema(
    [
        ("probe", pa.string()),
        ("item", pa.int64()),
        ("num_tokens", pa.float64()),
        ("base_loss_sum", pa.float64()),
        ("tuned_loss_sum", pa.float64()),
        ("skill", pa.string()),
        ("base_right", pa.float64()),
        ("tuned_right", pa.float64()),
        ("prompt", pa.string()),
    ]
)
"""Of a run: losses in nats, summed over an item's tokens; right is 1 or 0, or between where an item can be half right."""
JUDGED_ITEMS = pa.schema(
    [
        *ITEMS,
        ("label", pa.float64()),
        ("reward", pa.float64()),
        ("rejected_reward", pa.float64()),
        ("held_out", pa.float64()),
        ("length", pa.float64()),
        ("rejected_length", pa.float64()),
        ("claimed", pa.float64()),
        ("said", pa.float64()),
    ]
)
"""Of a run that judges, or is judged: those of a run, then what people said and what the tuned model's rewards are, of pairs the
chosen answer's first; tokens of the answers; the probability of what the model claims; the number of the class that it said.
"""
EVALUATED_ITEMS = pa.schema(
    [
        *ITEMS,
        ("model", pa.string()),
        ("reference", pa.string()),
        ("base_output", pa.string()),
        ("tuned_output", pa.string()),
    ]
)
"""Of an evaluation: those of a run, then the delta's name, the right answer, and what base and delta wrote."""


def write_table(path: Path, rows: Sequence[Mapping[str, Any]], columns: pa.Schema) -> None:
    """Write rows whole; columns that a row does not have are null. Raises Interrupted if the disk is full."""
    table = BytesIO()
    parquet.write_table(pa.Table.from_pylist([dict(row) for row in rows], schema=columns), table)
    write_atomic(path, table.getvalue())
