"""OAuth 2.0 token exchange for Kong Gateway."""

__version__ = "0.1.0"
