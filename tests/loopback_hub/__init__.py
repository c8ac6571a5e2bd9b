"""A Hub on the loopback interface, which the real client talks to: people, repositories, large files, a log, and faults."""

from .faults import Fault
from .log import Request
from .server import LoopbackHub

__all__ = ["Fault", "LoopbackHub", "Request"]
