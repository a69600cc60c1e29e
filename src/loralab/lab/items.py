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
