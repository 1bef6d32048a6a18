"""What the pods of the local cluster inherit."""

from __future__ import annotations

from pathlib import Path

import pytest

from toque._cluster import DevCluster, pod_environment
from toque.errors import UsageError


def test_pods_import_the_same_toque_as_the_supervisor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths given come first, then this source, then what the user had set."""
    monkeypatch.setenv("PYTHONPATH", "/users/own")

    env = pod_environment({"MODE": "test"}, ["/given"])

    source = str(Path(__file__).resolve().parents[2] / "src")
    assert env["PYTHONPATH"].split(":") == ["/given", source, "/users/own"]
    assert (env["MODE"], env["PYTHONUNBUFFERED"]) == ("test", "1")


@pytest.mark.parametrize(("options", "message"), [
    ({"pods": 0}, "number of pods must be between 1 and 64, not 0"),
    ({"port": 0}, "--port must be between 1 and 65535, not 0"),
    ({"monitor_port": 65_536}, "--monitor-port must be between 1 and 65535"),
    ({"account": "a.b"}, "account 'a.b' has '.'"),
    ({"ttl_s": 0.001}, "ttl_s must be between 2.0 and 3,600.0"),
])
def test_wrong_options_are_refused_before_anything_is_made(
        options: dict[str, object], message: str, tmp_path: Path) -> None:
    """The error names the option; the directory is not even made."""
    with pytest.raises(UsageError, match=message):
        DevCluster("app.py", directory=tmp_path / "dev", on_line=lambda *line: None, **options)

    assert not (tmp_path / "dev").exists()
