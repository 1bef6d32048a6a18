"""Promises about how the NATS server is found."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from toque.errors import SetupError, UsageError
from toque.storage.nats_options import NatsOptions, resolve_options

NO_PROCESS = 2**22 + 1  # above the kernel's largest process id


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    """No address from the machine that runs the test."""
    for name in ("NATS_URL", "NATS_CONTEXT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


@pytest.fixture
def project(tmp_path) -> Path:
    """An empty directory to resolve from."""
    directory = tmp_path / "project"
    directory.mkdir()
    return directory


def write_dev_state(directory: Path, *, url: str = "nats://127.0.0.1:21111", pid: int | None = None) -> None:
    (directory / ".toque").mkdir()
    (directory / ".toque" / "dev.json").write_text(json.dumps({"url": url, "pid": pid or os.getpid(), "more": 1}))


def write_context(tmp_path: Path, name: str, *, select: bool = False, **fields: object) -> None:
    directory = tmp_path / "config" / "nats"
    (directory / "context").mkdir(parents=True, exist_ok=True)
    (directory / "context" / f"{name}.json").write_text(json.dumps(fields))
    if select:
        (directory / "context.txt").write_text(f"{name}\n")


def test_the_default_is_the_local_server(project):
    """With nothing said anywhere, the address is NATS's own on this machine."""
    assert resolve_options(cwd=project).servers == ("nats://127.0.0.1:4222",)


def test_each_source_wins_over_the_later_ones(monkeypatch, project, tmp_path):
    """URL, then named context, NATS_URL, toque dev, NATS_CONTEXT, selected context."""
    write_context(tmp_path, "selected", select=True, url="nats://selected:1")
    found = [resolve_options(cwd=project)]
    write_context(tmp_path, "env", url="nats://env:1")
    monkeypatch.setenv("NATS_CONTEXT", "env")
    found.append(resolve_options(cwd=project))
    write_dev_state(project, url="nats://dev:1")
    found.append(resolve_options(cwd=project))
    monkeypatch.setenv("NATS_URL", "nats://url-env:1")
    found.append(resolve_options(cwd=project))
    write_context(tmp_path, "named", url="nats://named:1")
    found.append(resolve_options(cwd=project, context="named"))
    found.append(resolve_options("nats://given:1", cwd=project, context="named"))

    assert [options.servers for options in found] == [
        ("nats://selected:1",), ("nats://env:1",), ("nats://dev:1",), ("nats://url-env:1",), ("nats://named:1",),
        ("nats://given:1",)]


def test_toque_dev_is_found_from_a_directory_below(project):
    """The state file is looked for in the parents too."""
    write_dev_state(project)
    below = project / "a" / "b"
    below.mkdir(parents=True)

    assert resolve_options(cwd=below).servers == ("nats://127.0.0.1:21111",)


def test_a_dead_toque_dev_is_not_an_address(project):
    """A state file whose process is gone is passed over."""
    write_dev_state(project, pid=NO_PROCESS)

    assert resolve_options(cwd=project).source == "the default address"


def test_a_damaged_state_file_is_named(project):
    """A state file that is no JSON is an error with its path, not a silent default."""
    (project / ".toque").mkdir()
    (project / ".toque" / "dev.json").write_text("{")

    with pytest.raises(SetupError, match=r"dev\.json cannot be read"):
        resolve_options(cwd=project)


def test_a_context_gives_login_tls_inbox_and_domain(project, tmp_path):
    """Every field of a context that a connection needs is taken over."""
    files = {name: tmp_path / name for name in ("my.creds", "my.nk", "ca.pem", "cert.pem", "key.pem")}
    for path in files.values():
        path.write_text("-----BEGIN NATS USER JWT-----")
    write_context(
        tmp_path, "ngs", description="d", url="tls://a:4222, tls://b:4222", user="u", password="p", token="t",
        creds=str(files["my.creds"]), nkey=str(files["my.nk"]), ca=str(files["ca.pem"]), cert=str(files["cert.pem"]),
        key=str(files["key.pem"]), tls_first=True, inbox_prefix="_INBOX_me", jetstream_domain="hub")

    assert resolve_options(context="ngs", cwd=project) == NatsOptions(
        servers=("tls://a:4222", "tls://b:4222"), source="NATS context 'ngs'", user="u", password="p", token="t",
        credentials=files["my.creds"], nkey=files["my.nk"], tls_ca=files["ca.pem"], tls_cert=files["cert.pem"],
        tls_key=files["key.pem"], tls_first=True, inbox_prefix="_INBOX_me", api_prefix="$JS.hub.API")


def test_an_api_prefix_wins_over_the_domain(project, tmp_path):
    """A context's own API prefix is taken as it stands."""
    write_context(tmp_path, "x", jetstream_api_prefix="imported.api", jetstream_domain="hub")

    assert resolve_options(context="x", cwd=project).api_prefix == "imported.api"


def test_files_given_win_over_the_contexts(project, tmp_path):
    """Credentials of the call replace those of the context."""
    for name in ("a.creds", "b.creds"):
        (tmp_path / name).write_text("-----BEGIN NATS USER JWT-----")
    write_context(tmp_path, "x", creds=str(tmp_path / "a.creds"))

    options = resolve_options(context="x", credentials=tmp_path / "b.creds", cwd=project)

    assert options.credentials == tmp_path / "b.creds"


def test_a_context_that_is_not_there_is_named(monkeypatch, project):
    """The error says which name, who named it, and which file was looked for."""
    monkeypatch.setenv("NATS_CONTEXT", "nowhere")

    with pytest.raises(UsageError, match=r"NATS_CONTEXT is 'nowhere', but there is no .*context/nowhere\.json"):
        resolve_options(cwd=project)


@pytest.mark.parametrize("field", ["nsc", "user_jwt", "socks_proxy"])
def test_a_context_field_we_cannot_honour_is_refused(project, tmp_path, field):
    """A login that would silently be another one is refused."""
    write_context(tmp_path, "x", **{field: "something"})

    with pytest.raises(SetupError, match=f"uses {field}"):
        resolve_options(context="x", cwd=project)


@pytest.mark.parametrize("argument", ["credentials", "tls_ca"])
def test_a_missing_file_is_named(project, tmp_path, argument):
    """A file that is not there is an error before any connection."""
    with pytest.raises(UsageError, match=r"file .*nothing-here is not there"):
        resolve_options(cwd=project, **{argument: tmp_path / "nothing-here"})


def test_a_file_that_holds_no_credentials_is_refused(project, tmp_path):
    """A .creds file without a user JWT is an error before any connection (nats-py would read it for ever)."""
    (tmp_path / "my.creds").write_text("nothing")

    with pytest.raises(UsageError, match="holds no user JWT"):
        resolve_options(cwd=project, credentials=tmp_path / "my.creds")


def test_certificate_and_key_go_together(project, tmp_path):
    """Half of a client certificate is refused."""
    (tmp_path / "cert.pem").touch()

    with pytest.raises(UsageError, match="go together"):
        resolve_options(cwd=project, tls_cert=tmp_path / "cert.pem")


def test_a_file_that_is_no_certificate_is_a_setup_error(tmp_path):
    """TLS files are read before connecting, and a bad one is named."""
    (tmp_path / "ca.pem").write_text("no certificate")

    with pytest.raises(SetupError, match=r"ca\.pem cannot be used"):
        NatsOptions(tls_ca=tmp_path / "ca.pem").tls_context()


@pytest.mark.parametrize("url", ["http://a:1", "ws://a:1", "nats://", "nats://a:notaport", ",", "nats://user:hush@:x"])
def test_something_that_is_no_address_is_refused(project, url):
    """The error shows what an address looks like, and no password."""
    with pytest.raises(UsageError, match="one looks like nats://") as caught:
        resolve_options(url, cwd=project)

    assert "hush" not in str(caught.value)


def test_a_bare_host_is_an_address(project):
    """nats-py adds scheme and port."""
    assert resolve_options("broker:4223", cwd=project).servers == ("broker:4223",)


def test_secrets_are_not_shown():
    """Neither `repr` nor the text for messages holds a password or a token."""
    options = NatsOptions(servers=("nats://me:hush@a:1", "b:2"), password="hush", token="hush")

    assert options.shown == "nats://…@a:1, b:2"
    assert "hush" not in repr(options)
