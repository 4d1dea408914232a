"""Header, result lines and JSON of a benchmark run."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bench import environment, harness


@pytest.fixture(autouse=True)
def _measured(request: pytest.FixtureRequest) -> Iterator[None]:
    """Seeded, without the bookkeeping of autograd that no server has either; prints its lines."""
    torch.manual_seed(0)
    with torch.inference_mode():
        yield
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        while harness.LINES:
            print(f"\n{harness.LINES.pop(0)}", end="", flush=True)


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """A benchmark that passed has its line; no dot is needed."""
    return ("passed", "", "PASSED") if report.when == "call" and report.passed else None


def pytest_configure(config: pytest.Config) -> None:
    """Our lines take the place of the table of pytest-benchmark."""
    config.option.benchmark_quiet = True
    config.option.benchmark_disable_gc = True


def pytest_report_header() -> list[str]:
    return [f"{key + ':':<11}{value}" for key, value in environment.describe().items()]


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info.pop("node", None)
    machine_info.update(environment.describe())
