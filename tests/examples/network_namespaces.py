"""Two machines on this one: network namespaces, joined by a cable (a veth pair). Needs root."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from pyroute2 import IPRoute, NetlinkError, NetNS, netns


@dataclass(frozen=True, kw_only=True)
class Node:
    """A network namespace with one interface besides its own lo."""

    namespace: str
    interface: str
    address: str

    def enter(self, command: list[str]) -> list[str]:
        """The command that runs `command` in the namespace, in the same process."""
        return ["nsenter", f"--net=/run/netns/{self.namespace}", *command]


@contextlib.contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """Two namespaces that reach each other and nothing else; removed at the end.

    Skips the test, saying why, where namespaces must not be made.
    """
    suffix = f"{os.getpid() % 100_000:x}"
    nodes = tuple(
        Node(
            namespace=f"node{i}-{suffix}", interface=f"eth{i}-{suffix}", address=f"10.77.0.{i + 1}"
        )
        for i in range(2)
    )
    with contextlib.ExitStack() as stack:
        try:
            for node in nodes:
                netns.create(node.namespace)
                stack.callback(netns.remove, node.namespace)
            _connect(*nodes)
        except (PermissionError, NetlinkError) as error:
            pytest.skip(f"network namespaces cannot be made here (needs root): {error}")
        yield nodes


def _connect(first: Node, second: Node) -> None:
    with IPRoute() as here:
        here.link("add", ifname=first.interface, kind="veth", peer=second.interface)
        for node in (first, second):
            (index,) = here.link_lookup(ifname=node.interface)
            here.link("set", index=index, net_ns_fd=node.namespace)
    for node in (first, second):
        with NetNS(node.namespace) as there:
            for name in ("lo", node.interface):
                (index,) = there.link_lookup(ifname=name)
                there.link("set", index=index, state="up")
            there.addr("add", index=index, address=node.address, prefixlen=24)
