"""Starts a Hub by hand: python -m tests.loopback_hub [PORT], from the checkout. It ends with Ctrl-C, and forgets all."""

from __future__ import annotations

import sys
import threading

from .server import LoopbackHub


def main() -> None:
    """Prints what to export, then every request."""
    with LoopbackHub(port=int(sys.argv[1]) if len(sys.argv) > 1 else 8765) as hub:
        print("In another terminal:")
        print(f"  export HF_ENDPOINT={hub.url} HF_TOKEN={hub.token('write')} HF_HOME=$(mktemp -d)")
        print("Other tokens, all made up: " + ", ".join(f"{label} {account.token}" for label, account in hub.accounts.items()))
        shown = 0
        wait = threading.Event()
        while not wait.wait(0.2):
            for request in hub.log[shown:]:
                if not request.finished:
                    break
                print(request, flush=True)
                shown += 1


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print()
