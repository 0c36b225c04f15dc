"""
Load kong.yml into Kong once more, with Kong's own `prometheus` plugin for all routes.

The file itself stays as it is: it is the example of this plugin and of nothing else. Kong forgets
what it was told here when it is restarted or reloaded.
"""

# ruff: noqa: INP001, T201 - a script in an image, beside no package
from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request

ADMIN = "http://kong:8001/config"
TIMEOUT_S = 30.0

# At top level of the file, which has no plugins there itself.
METRICS = """
plugins:
  - name: prometheus
    config:
      status_code_metrics: true
      latency_metrics: true
      upstream_health_metrics: false
      bandwidth_metrics: false
"""


def main() -> int:
    """Return 0 when Kong has taken it."""
    with open("/kong.yml", encoding="utf-8") as file:  # noqa: PTH123 - a mounted file
        body = json.dumps({"config": file.read() + METRICS}).encode()
    request = urllib.request.Request(ADMIN, body, {"Content-Type": "application/json"}, method="POST")
    # No proxy between two containers.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=TIMEOUT_S):
            print("Kong counts requests now")
    except urllib.error.HTTPError as error:
        print(f"{error.code} {error.read(2000).decode(errors='replace')}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
