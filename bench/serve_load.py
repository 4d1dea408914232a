"""Load on `lraee serve` and its rivals, on loopback: throughput, latency, CPU a request; a soak.

    python -m bench.serve_load --seconds 10
    python -m bench.serve_load --soak-s 600
    python -m bench.serve_load --quota 1.5    # in a cgroup of 1.5 cores, as root
    pip install --target SITE litserve
    python -m bench.serve_load --server litserve --site SITE
    python -m bench.serve_clip FOLDER    # lraee-tiny for infinity-emb
    VENV/bin/pip install 'infinity-emb[torch,server,vision]' aiohttp
    python -m bench.serve_load --server infinity --python VENV/bin/python --model FOLDER

Each client is a connection that sends one image, waits for its answer and sends the next; a round
ends after --seconds or --requests. CPU is that of the server's whole process tree. Of `lraee serve`
it is split by clocks of its threads: "decode"; "server", which is the thread that speaks HTTP and
what the other threads spend beside their work; and "model", the rest, OpenMP's threads included.
Times of CPU hardly depend on how busy the machine is. The soak keeps 64 clients on a queue of 0.2 s
and counts every answer; a request without one is a failure.
"""

import asyncio
import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer

from bench import cpu_quota
from bench.cpu_quota import throttled
from lraee.measurement import machine

Server = Literal["lraee", "litserve", "infinity"]
SCHEMA = "lraee.serve_load/1"
_START_S = 180.0


@dataclass(frozen=True)
class Round:
    """One number of clients: answers, latencies in ms, CPU in ms a request, mean batch."""

    clients: int
    requests: int
    statuses: dict[int, int]
    lost: int
    per_s: float
    p50_ms: float
    p99_ms: float
    cpu_ms: float
    decode_ms: float | None = None
    server_ms: float | None = None
    model_ms: float | None = None
    batch: float | None = None


def main(
    server: Annotated[str, typer.Option(help="lraee, litserve or infinity.")] = "lraee",
    clients: Annotated[list[int] | None, typer.Option(min=1, help="[default: 1, 16, 64]")] = None,
    seconds: Annotated[float, typer.Option(min=0.1, max=120, help="Per round.")] = 10.0,
    requests: Annotated[int, typer.Option(min=1, help="Most requests of a round.")] = 20_000,
    model: Annotated[str, typer.Option(help="Name that the server knows.")] = "lraee-tiny",
    photo: Annotated[
        Path | None, typer.Option(exists=True, help="[default: scikit-image's coffee.png as JPEG]")
    ] = None,
    python: Annotated[str, typer.Option(help="Interpreter of the server.")] = sys.executable,
    site: Annotated[Path | None, typer.Option(help="Folder with the rival's packages.")] = None,
    quota: Annotated[float, typer.Option(min=0, help="CPU quota of the server in cores.")] = 0.0,
    soak_s: Annotated[float, typer.Option(max=3600, help="Instead: overload for so long.")] = 0.0,
    out: Annotated[Path | None, typer.Option(help="Where the JSON goes.")] = None,
) -> None:
    """Start the server, load it, stop it; print one line a round."""
    if server not in ("lraee", "litserve", "infinity"):
        raise typer.BadParameter(f"--server must be lraee, litserve or infinity, got {server!r}")
    data = _jpeg() if photo is None else photo.read_bytes()
    message = _message(model, data)
    options = ("--queue-s", "0.2") if soak_s else ()
    with ExitStack() as stack:
        group = stack.enter_context(cpu_quota.quota(quota)) if quota else None
        context = _running(server, model, python, site, options, group)
        port, pid = stack.enter_context(context)
        typer.echo(f"image           {len(data)} bytes; {machine.describe()['machine']}")
        warm = _round(port, pid, message, 4, min(2.0, seconds), requests, has_metrics=False)
        if 200 not in warm.statuses:
            raise OSError(f"serve_load: the server must embed an image, got {warm.statuses}")
        before = _rss_bytes(pid)
        rounds = []
        for count in [64] if soak_s else clients or [1, 16, 64]:
            most = 1 << 40 if soak_s else requests
            is_lraee = server == "lraee"
            row = _round(port, pid, message, count, soak_s or seconds, most, has_metrics=is_lraee)
            rounds.append(row)
            typer.echo(_line(row))
            if group is not None:
                typer.echo("quota           periods {}, throttled {}".format(*throttled(group)))
        after = _rss_bytes(pid)
        typer.echo(f"memory          {before >> 20} MB before, {after >> 20} MB after")
    if out is not None:
        value = {"schema": SCHEMA, **machine.describe(), "server": server, "soak_s": soak_s,
                 "image_bytes": len(data), "rss_before": before, "rss_after": after,
                 "rounds": [asdict(row) for row in rounds]}  # fmt: skip
        out.write_text(json.dumps(value, indent=2) + "\n")
    if any(row.lost for row in rounds):
        raise typer.Exit(1)


def _line(row: Round) -> str:
    parts = ""
    if row.server_ms is not None:
        parts = (
            f" (decode {row.decode_ms:.2f}, model {row.model_ms:.2f}, server {row.server_ms:.2f}),"
            f" {row.batch:.1f} images a call"
        )
    return (
        f"{row.clients:>3} clients     {row.per_s:.1f}/s, p50 {row.p50_ms:.1f} ms,"
        f" p99 {row.p99_ms:.1f} ms, CPU {row.cpu_ms:.2f} ms a request{parts};"
        f" {row.requests} requests {row.statuses}, {row.lost} lost"
    )


# The clients


def _jpeg() -> bytes:
    from io import BytesIO

    import skimage
    from PIL import Image

    buffer = BytesIO()
    path = Path(skimage.__file__).parent / "data" / "coffee.png"
    Image.open(path).convert("RGB").save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _message(model: str, data: bytes) -> bytes:
    uri = "data:image/jpeg;base64," + base64.b64encode(data).decode()
    body = json.dumps({"model": model, "input": uri, "modality": "image"}).encode()
    head = (
        "POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


@dataclass
class _Tally:
    deadline: float
    left: int
    statuses: Counter[int]
    latencies: list[float]
    lost: int = 0


def _round(
    port: int, pid: int, message: bytes, clients: int, seconds: float, requests: int, *,
    has_metrics: bool,
) -> Round:  # fmt: skip
    tally = _Tally(time.monotonic() + seconds, requests, Counter(), [])
    counted, cpu = _counted(port) if has_metrics else {}, _cpu_s(pid)
    started = time.monotonic()

    async def run() -> None:
        await asyncio.gather(*(_client(port, message, tally) for _ in range(clients)))

    asyncio.run(run())
    elapsed, count = time.monotonic() - started, max(1, len(tally.latencies))
    p50, p99 = np.percentile(tally.latencies or [0.0], [50, 99])
    cpu_ms = 1e3 * (_cpu_s(pid) - cpu) / count
    return Round(
        clients=clients, requests=len(tally.latencies), statuses=dict(tally.statuses),
        lost=tally.lost, per_s=tally.statuses[200] / elapsed, p50_ms=1e3 * float(p50),
        p99_ms=1e3 * float(p99), cpu_ms=cpu_ms,
        **(_split(counted, _counted(port), cpu_ms, count) if has_metrics else {}),
    )  # fmt: skip


def _split(
    before: dict[str, float], after: dict[str, float], cpu_ms: float, count: int
) -> dict[str, float]:
    """CPU in ms a request by part, and the mean size of a call of the model."""
    more = {name: value - before.get(name, 0.0) for name, value in after.items()}

    def total(start: str) -> float:
        return sum(value for name, value in more.items() if name.startswith(start))

    cpu = 'lraee_cpu_seconds_total{part="'
    decode_ms = 1e3 * total(cpu + "decode") / count
    server_ms = 1e3 * (total(cpu + "threads") + total("lraee_event_loop_cpu_seconds")) / count
    calls = max(1.0, total("lraee_batch_size_count"))
    return {
        "decode_ms": decode_ms, "server_ms": server_ms, "model_ms": cpu_ms - decode_ms - server_ms,
        "batch": total("lraee_batch_size_sum") / calls,
    }  # fmt: skip


async def _client(port: int, message: bytes, tally: _Tally) -> None:
    """One connection, which is opened anew where the server closed it after an answer."""
    reader = writer = None
    while tally.left > 0 and time.monotonic() < tally.deadline:
        tally.left -= 1
        started = time.monotonic()
        try:
            if writer is None:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
            assert reader is not None
            writer.write(message)
            status, closes = await asyncio.wait_for(_answer(reader), 120)
        except (OSError, asyncio.IncompleteReadError, TimeoutError, ValueError):
            tally.lost += 1
            writer = None
            continue
        tally.latencies.append(time.monotonic() - started)
        tally.statuses[status] += 1
        if closes:
            writer.close()
            writer = None
        if status == 429:
            await asyncio.sleep(0.05)
    if writer is not None:
        writer.close()


async def _answer(reader: asyncio.StreamReader) -> tuple[int, bool]:
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = next(row for row in head.split(b"\r\n") if row.startswith(b"content-length:"))
    await reader.readexactly(int(length.split(b":")[1]))
    return int(head.split()[1]), b"connection: close" in head


# The server


@contextmanager
def _running(
    server: str,
    model: str,
    python: str,
    site: Path | None,
    options: tuple[str, ...],
    group: Path | None,
) -> Iterator[tuple[int, int]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    commands = {
        "lraee": ["-m", "lraee", "serve", "--model", model, "--port", str(port), *options],
        "litserve": ["-m", "bench.serve_rivals", "litserve", str(port)],
        "infinity": ["-m", "infinity_emb.cli", "v2", "--model-id", model, "--port", str(port),
                     "--host", "127.0.0.1", "--engine", "torch", "--device", "cpu",
                     "--url-prefix", "/v1", "--served-model-name", model],
    }  # fmt: skip
    paths = [str(site)] if site else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, os.getcwd()]),
                   "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}  # fmt: skip
    joining = ["sh", "-c", f'echo $$ >{group}/cgroup.procs && exec "$@"', "sh"] if group else []
    process = subprocess.Popen(
        [*joining, python, *commands[server]], stdout=subprocess.DEVNULL, env=environment,
        start_new_session=True,
    )  # fmt: skip
    try:
        _wait_for(port, process)
        yield port, process.pid
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def _wait_for(port: int, process: subprocess.Popen[Any]) -> None:
    """Until the server answers anything but a refused connection or 5xx."""
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            if not _get(port, "/health/ready").split(b" ", 2)[1].startswith(b"5"):
                return
        except (OSError, IndexError):
            pass
        time.sleep(0.2)
    raise OSError(f"serve_load: the server must start in {_START_S:g} s, it did not")


def _get(port: int, path: str) -> bytes:
    answer = b""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        connection.sendall(head.encode())
        while chunk := connection.recv(1 << 16):
            answer += chunk
    return answer


def _counted(port: int) -> dict[str, float]:
    """The series of /metrics."""
    rows = _get(port, "/metrics").decode().partition("\r\n\r\n")[2].splitlines()
    pairs = (row.rsplit(" ", 1) for row in rows if row.startswith("lraee_"))
    return {name: float(value) for name, value in pairs}


def _tree(pid: int) -> list[int]:
    """The process and all below it."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return [pid]
    return [pid, *(each for child in text.split() for each in _tree(int(child)))]


def _cpu_s(pid: int) -> float:
    ticks = 0
    for each in _tree(pid):
        try:
            fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _rss_bytes(pid: int) -> int:
    pages = 0
    for each in _tree(pid):
        try:
            pages += int(Path(f"/proc/{each}/statm").read_text().split()[1])
        except OSError:
            continue
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    typer.run(main)
