"""Drops packets between single pods and the server: a network namespace of its own, and iptables in it. Root.

The whole run lives in the namespace, so nothing outside of it is touched, whatever happens. In it each pod reaches the
server by an address of loopback of its own, which is how its packets are told apart.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from typing import Final

_CLONE_NEWNET: Final = 0x40000000
_PROGRAMS: Final = ("ip", "iptables")


class NamespacesAway(OSError):
    """No namespace can be made here; the message says why."""


def why_not() -> str:
    """Why partitions cannot be made by this process; empty when they can."""
    if os.geteuid() != 0:
        return "partitions need root: they are made with iptables in a network namespace"
    missing = [program for program in _PROGRAMS if shutil.which(program) is None]
    return f"partitions need the programs {' and '.join(missing)}, which are not installed" if missing else ""


def enter_namespace() -> None:
    """Move this process, and all that it will start, into a network namespace with loopback alone.

    Call it before there is any other thread. Raises NamespacesAway. It cannot be undone.
    """
    if reason := why_not():
        raise NamespacesAway(reason)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET) != 0:
        raise NamespacesAway(f"no network namespace can be made: {os.strerror(ctypes.get_errno())}")
    _run("ip", "link", "set", "lo", "up")
    _run("iptables", "-w", "-L", "-n")  # says now whether the kernel has it


def address_of(place: int) -> str:
    """The address by which the pod of this place, from 0 on, reaches the server."""
    return f"127.0.1.{place + 1}"


def drop(address: str, port: int, *, to_server: bool, to_pod: bool) -> None:
    """Drop every packet of the pod's connections, in one direction or both."""
    for rule in _rules(address, port, to_server, to_pod):
        _run("iptables", "-w", "-A", *rule)


def let_through(address: str, port: int, *, to_server: bool, to_pod: bool) -> None:
    """Undo `drop` of the same arguments."""
    for rule in _rules(address, port, to_server, to_pod):
        _run("iptables", "-w", "-D", *rule)


def _rules(address: str, port: int, to_server: bool, to_pod: bool) -> list[list[str]]:
    there = ["INPUT", "-p", "tcp", "-d", address, "--dport", str(port), "-j", "DROP"]
    back = ["INPUT", "-p", "tcp", "-s", address, "--sport", str(port), "-j", "DROP"]
    return [there] * to_server + [back] * to_pod


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    if done.returncode != 0:
        raise NamespacesAway(f"{' '.join(command)}: {done.stderr.strip()}")
