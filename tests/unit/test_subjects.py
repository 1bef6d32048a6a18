"""subjects.md says what the code does: every subject, stream, header, record and request, and each example as built."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from toque import _accounts, _subjects
from toque._protocol import AccountRecord, Answer, InstanceView, Layout, PodView, SessionRecord
from toque._subjects import StationId
from toque.storage import records
from toque.workers.answers import Answers

PAGE = (Path(__file__).parents[2] / "subjects.md").read_text()
ACCOUNT = AccountRecord(name="main")
LAYOUT = Layout(generations=[(1, 8)])
STREAMS = {
    "queue_stream": _accounts.queue_config(ACCOUNT, LAYOUT, "census"),
    "journal_stream": _accounts.journal_config(ACCOUNT),
    "snapshot_stream": _accounts.snapshot_config(ACCOUNT),
    "control_stream": _accounts.control_config(ACCOUNT),
    "event_stream": _accounts.event_config(ACCOUNT, LAYOUT),
    "dead_stream": _accounts.dead_config(ACCOUNT),
}
BODIES = {"control_account": AccountRecord, "control_layout": Layout, "control_session": SessionRecord, "pods": PodView}


def sections() -> dict[str, str]:
    """The text under each `### `builder`` heading."""
    parts = re.split(r"^#{2,3} (.*)$", PAGE, flags=re.MULTILINE)
    return {title.strip("`"): text for title, text in zip(parts[1::2], parts[2::2], strict=True)
            if title.startswith("`")}


def builders() -> set[str]:
    return {name for name, value in vars(_subjects).items()
            if inspect.isfunction(value) and value.__module__ == _subjects.__name__}


def examples() -> list[tuple[str, str, str]]:
    """(heading, call, what the page says it builds)"""
    found = []
    for name, text in sections().items():
        for call, built in re.findall(r"^- \*\*example\*\* `(.+?)` → `(.+)`$", text, re.MULTILINE):
            found.append((name, call, built))
    return found


def json_block(name: str) -> str:
    (block,) = re.findall(r"^```json\n(.*?)\n```$", sections()[name], re.MULTILINE | re.DOTALL)
    return block


def rows(text: str) -> list[list[str]]:
    """The cells of every table row but headings and rulers."""
    lines = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line] for line in lines]


def as_text(value: Any) -> str:
    if isinstance(value, _subjects.QueueToken):
        return str((value.workflow, tuple(value.station), value.instance_id))
    if isinstance(value, _subjects.EventToken):
        return str((tuple(value.station), value.workflow, value.instance_id, value.type))
    if isinstance(value, _subjects.DeadToken | _subjects.Origin):
        return str(tuple(value))
    return str(value)


def test_the_page_describes_every_builder_and_nothing_else() -> None:
    """A new subject cannot be forgotten, nor an old one stay."""
    assert set(sections()) == builders()


def test_every_builder_has_an_example() -> None:
    """One call each, by the builder's own name."""
    assert {name for name, call, _ in examples() if call.startswith(f"{name}(")} == builders()


@pytest.mark.parametrize(("name", "call", "built"), examples(), ids=[name for name, _, _ in examples()])
def test_an_example_is_what_the_builder_builds(name: str, call: str, built: str) -> None:
    """The page's call, called."""
    value = eval(call, {name: getattr(_subjects, name), "StationId": StationId})

    assert as_text(value) == built


def test_the_page_lists_every_header() -> None:
    """Names in the table of headers are those of the module."""
    named = {value for name, value in vars(_subjects).items() if name.endswith("_HEADER")}
    listed = {row[0].strip("`") for row in rows(PAGE.split("## Headers")[1])} - {"header"}

    assert listed == named


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_is_configured_as_the_page_says(name: str) -> None:
    """All settings but description and metadata, which are for people."""
    config = msgspec.to_builtins(STREAMS[name])
    del config["description"], config["metadata"]

    assert json.loads(json_block(name)) == config


@pytest.mark.parametrize("name", BODIES)
def test_a_body_is_of_its_type(name: str) -> None:
    """Decoded and encoded again it is the same text: no unknown field, no default written out."""
    block = json_block(name).encode()

    assert msgspec.json.encode(msgspec.json.decode(block, type=BODIES[name])) == block


def test_the_answer_is_of_its_type() -> None:
    """The example answer holds an instance as owners send it."""
    answer = msgspec.json.decode(json_block("station_request").encode(), type=Answer)

    assert msgspec.json.encode(answer) == json_block("station_request").encode()
    assert msgspec.json.encode(msgspec.json.decode(answer.value, type=InstanceView)) == bytes(answer.value)


def operations() -> dict[str, type]:
    station = SimpleNamespace(context=SimpleNamespace(store=None))
    return {name: shape for name, (shape, _) in Answers(station)._operations.items()}  # type: ignore[arg-type]  # a stub


def test_the_page_lists_every_operation_with_a_request_that_fits() -> None:
    """The requests in the table are read by the type that the owner reads them with, without unknown fields."""
    listed = {row[0].strip("`"): row[1].strip("`") for row in rows(sections()["station_request"])
              if len(row) == 3 and row[1].startswith("`{")}

    assert set(listed) == set(operations())
    for operation, request in listed.items():
        shape = operations()[operation]
        assert set(json.loads(request)) <= {field.name for field in msgspec.structs.fields(shape)}
        msgspec.json.decode(request.encode(), type=shape)


def test_the_page_lists_every_code_of_an_answer() -> None:
    """The codes are those that `Answer` names."""
    named = set(re.findall(r"\w+", inspect.getsource(Answer).split('code: str = "ok"')[1].split("\n")[0]))
    listed = {row[0].strip("`") for row in rows(sections()["station_request"]) if len(row) == 2} - {"code"}

    assert listed - {"`code`"} == named


def test_the_page_lists_every_record() -> None:
    """Kind and name of each record type."""
    kinds = {cls.__struct_config__.tag: cls.__name__ for cls in records.AnyRecord.__args__}
    listed = {int(row[0]): row[1].strip("`") for row in rows(sections()["journal"]) if row[0].isdigit()}

    assert listed == kinds
