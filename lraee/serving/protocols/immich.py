"""immich's machine-learning protocol: GET /ping, POST /predict for its task "clip".

Source: immich's server/src/repositories/machine-learning.repository.ts. A task that is not served
gets 404, upon which immich asks the next of its machine-learning URLs.
"""

import orjson
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from lraee.serving.errors import ServiceError, bad_request
from lraee.serving.http import Call, answer, fields, files, json_field, route
from lraee.serving.service import ServedModel, Service


def routes(service: Service) -> list[Route]:
    """All routes of this file."""
    return [
        route(service, "/ping", _ping),
        route(service, "/predict", _predict, ("POST",)),
    ]


async def _ping(call: Call) -> Response:
    if not call.service.is_ready:
        raise ServiceError(503, "a model's worker does not run", "not_ready", 10)
    return PlainTextResponse("pong")


async def _predict(call: Call) -> Response:
    form = await call.form()
    kind, model = _entry(call.service, fields(form, "entries"))
    images, texts = await files(form, "image"), fields(form, "text")
    if kind == "visual":
        if len(images) != 1:
            raise bad_request(f'"image" must be one file, got {len(images)}')
        with call.service.admission.work(call.service.cost_s(model, images=1)):
            result, picture = await call.service.embed_image(model, images[0])
        size = {"imageHeight": picture.height, "imageWidth": picture.width}
    else:
        if len(texts) != 1:
            raise bad_request(f'"text" must be one field, got {len(texts)}')
        with call.service.admission.work(call.service.cost_s(model, texts=1)):
            result = await call.service.embed(model, "text", texts[0])
        size = {}
    row = orjson.dumps(result.embedding, option=orjson.OPT_SERIALIZE_NUMPY).decode()
    return answer({"clip": row, **size})


def _entry(service: Service, entries: list[str]) -> tuple[str, ServedModel]:
    """visual or textual, and the model of immich's `entries`."""
    if len(entries) != 1:
        raise bad_request(f'"entries" must be one field, got {len(entries)}')
    tasks = json_field(entries[0], "entries")
    if not isinstance(tasks, dict) or not tasks:
        raise bad_request('"entries" must be an object of tasks')
    if list(tasks) != ["clip"]:
        raise ServiceError(404, 'only the task "clip" is served here', "task_not_found")
    kinds = tasks["clip"]
    if not isinstance(kinds, dict) or len(kinds) != 1:
        raise bad_request('"clip" must have one of "visual" and "textual"')
    ((kind, options),) = kinds.items()
    if kind not in ("visual", "textual") or not isinstance(options, dict):
        raise bad_request('"clip" must have one of "visual" and "textual"')
    name = options.get("modelName")
    return kind, service.model(name.rsplit("/", 1)[-1] if isinstance(name, str) else name)
