"""From an opened model and labelled photos to the report of the dose study."""

from datetime import UTC, datetime
from pathlib import Path

from lraee.data.classes import Classes
from lraee.measurement import machine
from lraee.storage.stages import Stages
from lraee.study.command import Prepared, Sides, prepared
from lraee.study.dose import schema
from lraee.study.dose.claims import claims
from lraee.study.dose.protocol import Doses
from lraee.study.dose.response import Response
from lraee.study.dose.schema import DoseReport
from lraee.study.dose.study import DoseStudy, settings
from lraee.study.protocol import PAPER_BUDGET, Protocol
from lraee.zoo.opening import Opened


def dose_study(
    opened: Opened,
    classes: Classes,
    both_sides: Sides,
    *,
    work: Path,
    protocol: Protocol,
    doses: Doses,
    prompts: int,
    progress: bool,
) -> DoseReport:
    """The report of a model at these doses; a run cut off goes on in `work`, cell by cell.

    Args:
      opened: the model.
      classes: names for its prompts, in the order of the photos' labels.
      both_sides: the photos.
      work: folder for finished cells.
      protocol: how exits are trained; its seeds are not used.
      doses: what is run.
      prompts: templates per class.
      progress: show bars.
    Raises: what lraee.accelerate and Photos raise; ValueError on a folder that is not of a run.
    """
    ready = prepared(opened, classes, both_sides, prompts=prompts, progress=progress)
    stages = Stages(work, ready.settings | settings(protocol, doses))
    study = DoseStudy(
        ready.model, ready.learn, ready.report, protocol=protocol, doses=doses, stages=stages,
        progress=progress,
    )  # fmt: skip
    cells, kept = study.run()
    response = Response(cells, doses.scales, doses.seeds, ready.model.depth)
    minutes = sum(float(cell["seconds"]) for cell in cells.values()) / 60.0
    return {
        **_head(ready, protocol, doses, minutes),
        "kept": kept,
        "noise": response.noise(),
        "systems": response.systems(),
        "rescue": response.rescue(),
        "claims": claims(response),
    }


def _head(ready: Prepared, protocol: Protocol, doses: Doses, minutes: float) -> DoseReport:
    """All that stands before the figures."""
    facts = machine.describe()
    return {
        "schema": schema.SCHEMA,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {key: str(value) for key, value in facts.items() if key != "command"},
        "command": str(facts["command"]),
        "model": ready.model.title,
        "blocks": ready.model.depth,
        "seeds": list(doses.seeds),
        "doses": list(doses.scales),
        "channels": doses.channels,
        "num_classes": len(ready.model.classes),
        "templates": ready.model.templates,
        "learned_from": len(ready.learn.images.names),
        "reported_on": len(ready.report.images.names),
        "minutes": minutes,
        "protocol": _in_words(protocol, doses),
        "kept": [], "noise": [], "systems": [], "rescue": [], "claims": [],
    }  # fmt: skip


def _in_words(p: Protocol, doses: Doses) -> dict[str, str]:
    return {
        "dose": f"{doses.channels} channels of each norm times the dose, the next weight's columns"
        " divided by it; each seed draws other channels, other splits and other heads",
        "our recipe": f"heads on class token and patch mean, {p.steps} steps, no labels, budget"
        f" {p.budget}",
        "as published": f"heads on the patch mean, 3 epochs, labels and distillation, budget"
        f" {PAPER_BUDGET}; the float control prunes none",
        "splits": ", ".join(f"{name} {100 * share:.1f} %" for name, share in p.splits.items())
        + " of the learning photos, drawn by the seed; nothing is chosen on report photos",
        "minutes": "of all cells, also those that an earlier run left",
        "float control": "heads and gates of the same seeds on the float backbone, computed once",
        "interval": "variance over photos of the mean over seeds, and variance over seeds",
    }
