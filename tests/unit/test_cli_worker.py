"""`toque worker`: its options become the pod's, and wrong ones are refused before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from toque import errors
from toque.cli import worker
from toque.workers.pod import PodOptions


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings of the machine that the tests run on."""
    for name in ("TOQUE_POD", "TOQUE_DATA", "TOQUE_ACCOUNT", "NATS_URL", "NATS_CONTEXT", "NATS_MONITOR_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def parsed(*arguments: str) -> PodOptions:
    return worker.pod_options(worker.parser().parse_args(["worker", "app.py", *arguments]))


def test_every_option_reaches_the_pod(tmp_path: Path) -> None:
    """Nothing that is said on the command line is dropped."""
    ca = tmp_path / "ca.pem"
    ca.touch()

    options = parsed("--pod", "blue", "--data", "/d", "--account", "shop", "--nats", "nats://h:1", "--tls-ca", str(ca),
                     "--monitor", "http://h:2", "--require-sync", "--grace", "90s", "--slots", "7", "--threads", "3",
                     "--log", "json", "--ttl", "4s", "--dev")

    assert options == PodOptions(
        pod="blue", data=Path("/d"), account="shop", nats=options.nats, grace_s=90.0, monitor_url="http://h:2",
        require_sync=True, slots_max=7, threads_max=3, ttl_s=4.0, log_json=True, dev=True)
    assert (options.nats.servers, options.nats.tls_ca) == (("nats://h:1",), ca)


def test_a_pod_has_a_name_and_a_directory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without options the host names the pod, and pods of two accounts never share a directory."""
    monkeypatch.setattr("socket.gethostname", lambda: "-web.example.org")

    options = parsed("--account", "shop")

    assert (options.pod, options.data) == ("web-example-org", Path("toque-data/shop/web-example-org"))


def test_containers_set_a_pod_by_their_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What differs between the pods of a deployment can stand in the environment."""
    for name, value in (("TOQUE_POD", "p"), ("TOQUE_DATA", "/data"), ("TOQUE_ACCOUNT", "shop"),
                        ("NATS_URL", "nats://n:1"), ("NATS_MONITOR_URL", "http://n:2")):
        monkeypatch.setenv(name, value)

    options = parsed()

    assert (options.pod, options.data, options.account) == ("p", Path("/data"), "shop")
    assert (options.nats.servers, options.monitor_url) == (("nats://n:1",), "http://n:2")


@pytest.mark.parametrize(("arguments", "message"), [
    (["--grace", "25"], "write \"25 seconds\""),
    (["--slots", "0"], "--slots must be at least 1"),
    (["--threads", "-1"], "--threads must be at least 1"),
    (["--account", "a.b"], "account 'a.b' has '.'"),
    (["--pod", "a b"], "pod 'a b' has ' '"),
    (["--log", "xml"], "invalid choice: 'xml'"),
    (["--nope"], "unrecognized arguments: --nope"),
])
def test_wrong_options_are_refused(arguments: list[str], message: str) -> None:
    """The error names the option and what is legal."""
    with pytest.raises(errors.UsageError, match=message.replace("(", r"\(")):
        parsed(*arguments)


def test_a_credentials_file_that_is_not_there_is_refused() -> None:
    """A pod does not connect without the credentials that it was given."""
    with pytest.raises(errors.UsageError, match=r"credentials file /no/such.creds"):
        parsed("--creds", "/no/such.creds")
