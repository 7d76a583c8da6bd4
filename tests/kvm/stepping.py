"""The machine that tests step in one process, under the name that they import."""

from __future__ import annotations

from cpu.core import GuestExit
from kvm.stepped import Body, Stepped, module, signing_key

__all__ = ["Body", "GuestExit", "Stepped", "module", "signing_key"]
