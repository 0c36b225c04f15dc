"""The access pipeline of one plugin configuration: see `pipeline`."""

from kong_token_exchange.flow.pipeline import REUSE_MARGIN_S, Flow
from kong_token_exchange.flow.values import FlowResult

__all__ = ["REUSE_MARGIN_S", "Flow", "FlowResult"]
