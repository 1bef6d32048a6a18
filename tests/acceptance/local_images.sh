#!/usr/bin/env bash
# Images out of what this machine has, for one that reaches no registry of images:
#   toque-local-base   Debian with its Python and pip (debootstrap), and the wheels that Toque is built and run with
#   toque-local-nats   nothing but the nats-server that PYTHON's environment holds
# Needs root, debootstrap, a running Docker engine, and PYTHON: an interpreter whose pip finds packages.
set -eu
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-.venv/bin/python}
SUITE=${SUITE:-bookworm}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

server=$("$PYTHON" -c 'from toque._nats_server import find_server; print(find_server().path)')
cp "$server" "$work/nats-server"
tar -C "$work" -c nats-server | docker import --change 'ENTRYPOINT ["/nats-server"]' - toque-local-nats

debootstrap --variant=minbase --include=python3,python3-pip "$SUITE" "$work/base"
version=$(chroot "$work/base" python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
"$PYTHON" - > "$work/needs" <<'NEEDS'
import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))
print(*project["build-system"]["requires"], *project["project"]["dependencies"], sep="\n")
NEEDS
"$PYTHON" -m pip download --quiet --only-binary :all: --python-version "$version" --dest "$work/base/wheels" \
    --requirement "$work/needs"
printf '[global]\nno-index = true\nfind-links = /wheels\n' > "$work/base/etc/pip.conf"
rm -rf "$work/base/var/cache/apt" "$work/base/var/lib/apt/lists" "$work/base/usr/share/doc"
tar -C "$work/base" --one-file-system -c . | docker import - toque-local-base
