"""The command `lraee index`: how well the search of `lraee serve` does on given photos."""

from pathlib import Path
from typing import Annotated

import typer

from lraee.cli.common import command, line


@command
def index(
    check: Annotated[
        Path, typer.Option("--check", exists=True, help="From `lraee embed`: prints recall@10.")
    ],
    queries: Annotated[int, typer.Option(min=1, help="Photos to search with.")] = 200,
) -> None:
    """Compare the search that `lraee serve` uses for these photos with the exact one.

    Example: `lraee index --check embeddings.parquet`
    """
    from lraee.serving.search.index import EXACT_UP_TO, Quantized, make_index, recall
    from lraee.serving.search.library import read_embeddings

    rows = read_embeddings(check).rows
    served = make_index(rows)
    line("photos", f"{len(rows)}, {rows.shape[1]} numbers")
    line("served by", f"{served.name} (faiss beyond {EXACT_UP_TO})")
    line("recall@10", f"{served.name}: {recall(served, rows, queries=queries):.4f}")
    if not isinstance(served, Quantized):
        try:
            other = Quantized(rows)
        except ImportError as error:
            line("recall@10", f"faiss SQ8: not measured, {error}")
            return
        line("recall@10", f"{other.name}: {recall(other, rows, queries=queries):.4f}")
