"""
Ask the plugin server for its name over the socket; exit status 0 when it answers.

A socket that accepts proves only that the kernel is alive, so the loop itself must reply. The
frames are written out here so that a probe costs no imports: Kong's RpcCall with
`cmd_get_plugin_names`, behind a 4-byte little-endian length.
"""

# ruff: noqa: INP001, T201 - a script in an image, beside no package
from __future__ import annotations

import os
import socket
import sys

# sequence (field 1) = 1; cmd_get_plugin_names (field 31) = {}.
CALL = b"\x08\x01\xfa\x01\x00"
TIMEOUT_S = 2.0


def main() -> int:
    """Return 0 when the server answers with its name."""
    path = os.environ.get("SOCKET", "/run/token-exchange/token-exchange.socket")
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(TIMEOUT_S)
            connection.connect(path)
            connection.sendall(len(CALL).to_bytes(4, "little") + CALL)
            answer = connection.recv(4096)
    except OSError as error:
        print(f"{path}: {error}", file=sys.stderr)
        return 1
    return 0 if b"token-exchange" in answer else 1


if __name__ == "__main__":
    sys.exit(main())
