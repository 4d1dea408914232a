"""What a run did, and how it ends: failures.parquet last, then FILE.parquet from the parts."""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from lraee.data.names import reason_counts
from lraee.data.sources import DataError
from lraee.serving.output import Finished, Output
from lraee.serving.parts import FailureFile, Part, PartHeader, Provenance


@dataclass
class Totals:
    """What a run did: `embedded` anew, `resumed` from earlier runs, `skipped` by reason."""

    embedded: int = 0
    resumed: int = 0
    parts: int = 0
    skipped: Counter[str] = field(default_factory=Counter)

    def note(self, failures: Iterable[tuple[str, str]]) -> None:
        """Count failures by their reasons."""
        self.skipped.update(reason_counts(reason for _, reason in failures))

    def about(self) -> dict[str, Any]:
        """What the last file of an output says of the whole."""
        return {
            "parts": self.parts,
            "rows": self.embedded + self.resumed,
            "failed": self.skipped.total(),
        }

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "schema": "lraee.embed/1",
            "embedded": self.embedded,
            "resumed": self.resumed,
            "skipped": self.skipped.total(),
            "skipped_reasons": dict(self.skipped.most_common()),
        }

    def line(self) -> str:
        """One line for people."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.skipped.most_common())
        return (
            f"{self.embedded} embedded, {self.resumed} resumed, {self.skipped.total()} skipped"
            f"{f' ({reasons})' if reasons else ''}"
        )


@dataclass(frozen=True)
class Account:
    """The counts of a run, and its failures as they come."""

    totals: Totals
    failures: FailureFile

    def add(self, part: Part, header: PartHeader, *, resumed: int) -> None:
        """A part that is written; so many of its rows are from earlier runs."""
        rows = [*((row.name, row.reason) for row in part.skipped), *header.failures]
        self.failures.add(rows)
        self.totals.note(rows)
        self.totals.parts += bool(part.candidates)
        self.totals.resumed += resumed
        self.totals.embedded += header.rows - resumed


@contextmanager
def account(
    output: Output, finished: Finished, provenance: Provenance, *, may_be_empty: bool
) -> Iterator[Account]:
    """The account of one run. At the end of the context the output is complete, in an order that
    a kill at any point leaves an output to go on with.

    Args:
      output: entered.
      finished: what earlier runs left in it.
      provenance: of this run.
      may_be_empty: whether a run without any candidate is no error.
    Raises: DataError, one line, where there was nothing to embed.
    """
    totals = Totals()
    output.failures.unlink(missing_ok=True)
    with output.failure_file() as failures:
        yield Account(totals, failures)
        if totals.parts == 0 and not may_be_empty:
            raise DataError(f"data: PHOTOS must hold one at least, got none ({totals.line()})")
        finished.retire(totals.parts)
        failures.close(provenance, totals.about())
    finished.forget()
    if output.is_file:
        output.join(provenance, totals.about())
