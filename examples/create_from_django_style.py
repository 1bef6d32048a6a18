"""Creating instances from blocking code: Django and Flask views, Celery tasks, scripts.

    toque dev examples/hello.py                       # a server and two pods; leave it running
    python examples/create_from_django_style.py Ada   # in another terminal

One SyncClient for each process is enough: it is safe between threads and across forks (gunicorn, uwsgi), and connects
at its first call. The workflow is named by its name here, so the web application does not import its code.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any

from toque import InstanceExists, OwnerAway, QueueFull, ResultTimeout, SyncClient


@lru_cache(maxsize=1)
def toque_client() -> SyncClient:
    """The process's client: in Django, a function of the app that its views import."""
    return SyncClient.connect()


def greet_view(request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """A view: starts the work under an id of the request, and answers at once."""
    instance_id = f"greeting-{request['user']}"
    try:
        handle = toque_client().create("hello", request["user"], id=instance_id)
    except InstanceExists:  # the form was sent twice: there is one instance all the same
        handle = toque_client().handle("hello", instance_id)
    except QueueFull:
        return 503, {"error": "too busy, try again"}
    return 202, {"id": handle.id}


def result_view(instance_id: str) -> tuple[int, dict[str, Any]]:
    """A second view: the result when it is there, and the status until then."""
    handle = toque_client().handle("hello", instance_id)
    try:
        return 200, {"greeting": handle.result(timeout="5 seconds")}
    except (ResultTimeout, OwnerAway):
        return 202, {"id": instance_id}


def main(user: str) -> None:
    accepted, answer = greet_view({"user": user})
    print(accepted, answer["id"])
    done, answer = result_view(answer["id"])
    print(done, answer)
    again, _ = greet_view({"user": user})
    print(again, "sent twice, run once")
    toque_client().close()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "Ada")
