"""The application of `lraee serve` as a deployment of Ray Serve, for more than one machine.

    serve run lraee.serving.ray_serve:app model=ViT-B-32__openai cpus=8 max_replicas=4

A replica is a process with its own copy of the weights and its own batcher: requests are spread
over replicas one by one, and each replica makes batches of those it gets. Ray starts replicas by
load, asks each for its health, replaces one that died or whose worker did, and answers where no
replica does. Replicas and `lraee serve` run the same code on the same weights: the same bits.

Every machine needs the same lraee, and weights and exits under the same paths. Ray listens on all
interfaces unless told otherwise, see lraee.serving.ray; its HTTP proxy listens on 127.0.0.1.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lraee.serving.encoder import ModelChoice
from lraee.serving.settings import LOOPBACK_NAMES, Settings, read_token

if TYPE_CHECKING:
    from starlette.applications import Starlette

_HEALTH_PERIOD_S = 5.0
_UPSCALE_S = 10.0
"""About what a replica takes to start: a peak that is shorter is over before it helps."""
_MAX_ONGOING = 1024
"""Requests of one replica, as of one `lraee serve`: below it the application's 429 decides."""


@dataclass(frozen=True)
class Plan:
    """What to deploy; the arguments of `app`.

    Args:
      model: names as `lraee serve --model` takes them; text separates them by commas.
      pretrained, scheme, exits, text: as there.
      cpus: of one replica: its threads, and what Ray reserves.
      min_replicas: that always run.
      max_replicas: under load.
      queue_s, deadline_s: as there, for each replica.
      allow_host: Host headers; none: those of loopback; "*": all.
    Raises: ValueError, one line.
    """

    model: tuple[str, ...] = ("lraee-tiny",)
    pretrained: str | None = None
    scheme: str | None = None
    exits: str | None = None
    text: str | None = None
    cpus: int = 1
    min_replicas: int = 1
    max_replicas: int = 1
    queue_s: float = 10.0
    deadline_s: float = 30.0
    allow_host: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """See the class."""
        if not self.model or (len(self.model) > 1 and (self.pretrained or self.exits)):
            raise ValueError(
                f"ray_serve: model must be one name with pretrained or exits, got {self.model}"
            )
        if not 1 <= self.min_replicas <= self.max_replicas or self.cpus < 1:
            raise ValueError(
                "ray_serve: 1 <= min_replicas <= max_replicas and cpus >= 1 must hold, got"
                f" {self.min_replicas}, {self.max_replicas} and {self.cpus}"
            )

    @classmethod
    def of(cls, args: Mapping[str, object]) -> "Plan":
        """The plan of `serve run`'s words or of a config file's values."""
        types: dict[str, Callable[[Any], object]] = {
            "model": _words, "allow_host": _words, "cpus": int, "min_replicas": int,
            "max_replicas": int, "queue_s": float, "deadline_s": float,
        }  # fmt: skip
        known = [field.name for field in fields(cls)]
        values: dict[str, Any] = {}
        for name, value in args.items():
            if name not in known:
                raise ValueError(
                    f"ray_serve: arguments must be of {', '.join(known)}, got {name!r}"
                )
            try:
                values[name] = types.get(name, str)(value)
            except (TypeError, ValueError):
                raise ValueError(f"ray_serve: {name} must be a number, got {value!r}") from None
        if "max_replicas" not in values:
            values["max_replicas"] = values.get("min_replicas", cls.min_replicas)
        return cls(**values)

    def choices(self) -> list[ModelChoice]:
        """The models."""
        exits = None if self.exits is None else Path(self.exits)
        return [
            ModelChoice(name, self.pretrained, self.scheme, exits, self.text) for name in self.model
        ]

    def settings(self, token: str | None) -> Settings:
        """Limits of one replica."""
        hosts = () if "*" in self.allow_host else (*LOOPBACK_NAMES, *self.allow_host)
        return Settings(
            queue_s=self.queue_s, deadline_s=self.deadline_s, cpus=self.cpus, token=token,
            allowed_hosts=hosts,
        )  # fmt: skip


def app(args: Mapping[str, object]) -> Any:
    """The deployment, for `serve run lraee.serving.ray_serve:app NAME=VALUE …` and config files.

    Args:
      args: fields of Plan. The token comes from the environment variable LRAEE_TOKEN.
    Raises: ValueError, one line; ImportError without Ray.
    """
    return deployment(Plan.of(args), token=read_token(None))


def deployment(plan: Plan, *, token: str | None = None) -> Any:
    """The deployment as `ray.serve.run` takes it. Raises: ImportError without Ray."""
    try:
        from ray import serve
    except ImportError as error:
        raise ImportError(
            "ray_serve: Ray Serve is not installed: pip install 'lraee[ray]'"
        ) from error
    choices, settings = plan.choices(), plan.settings(token)

    def build() -> "Starlette":
        """On a replica, when it starts."""
        from lraee.serving.server import create_app

        return create_app([choice.open() for choice in choices], settings)

    decorated = serve.deployment(
        name="lraee",
        ray_actor_options={"num_cpus": plan.cpus},
        autoscaling_config={
            "min_replicas": plan.min_replicas,
            "max_replicas": plan.max_replicas,
            # One full batch in the model; what comes beyond is worth another replica.
            "target_ongoing_requests": settings.max_batch,
            "upscale_delay_s": _UPSCALE_S,
        },
        max_ongoing_requests=_MAX_ONGOING,
        max_queued_requests=_MAX_ONGOING,
        health_check_period_s=_HEALTH_PERIOD_S,
        health_check_timeout_s=settings.stall_s,
        graceful_shutdown_timeout_s=settings.stall_s,
    )
    return decorated(serve.ingress(build)(Replica)).bind()


class Replica:
    """What Ray asks of a replica beside HTTP."""

    app: "Starlette"

    async def check_health(self) -> None:
        """Raises RuntimeError where a model's worker died or hangs: Ray replaces the replica."""
        if not self.app.state.service.is_ready:
            raise RuntimeError("ray_serve: a model's worker does not run")


def _words(value: object) -> tuple[str, ...]:
    """Comma-separated words, or a list of them."""
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list | tuple):
        raise TypeError
    return tuple(word for item in items if (word := str(item).strip()))
