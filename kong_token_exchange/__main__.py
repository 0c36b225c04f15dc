"""`python -m kong_token_exchange` is the command `kong-token-exchange`."""

import sys

from kong_token_exchange.cli import main

if __name__ == "__main__":
    sys.exit(main())
