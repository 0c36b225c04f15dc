# All in one: the stock Kong image with the plugin in a virtual environment; Kong starts the plugin
# server itself.
#
#   docker build -f docker/kong.Dockerfile -t kong-token-exchange/kong:dev .
#
# For a repeatable build name the base by digest: --build-arg KONG_IMAGE=kong@sha256:...
ARG KONG_IMAGE=kong:3.9

FROM ${KONG_IMAGE} AS build
USER root
# kong:3.9 stands on Ubuntu 24.04 (github.com/Kong/docker-kong), whose Python is 3.12.
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-venv && rm -rf /var/lib/apt/lists/*
ENV PIP_CONSTRAINT=/src/constraints.txt PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
ARG SOURCE_DATE_EPOCH=1735689600
WORKDIR /src
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY kong_token_exchange ./kong_token_exchange
# pip installs from outside, so that the environment which is shipped has none.
RUN python3 -m venv /tmp/pip && /tmp/pip/bin/pip install --upgrade pip \
 && python3 -m venv --without-pip /opt/token-exchange \
 && /tmp/pip/bin/pip --python /opt/token-exchange install --no-compile '.[redis]'
COPY docker/inventory.py /opt/token-exchange/libexec/
RUN /opt/token-exchange/bin/python /opt/token-exchange/libexec/inventory.py --format cyclonedx \
      > /opt/token-exchange/sbom.cdx.json

FROM ${KONG_IMAGE}
LABEL org.opencontainers.image.title="Kong with kong-token-exchange" \
      org.opencontainers.image.description="OAuth 2.0 token exchange at Kong Gateway: gateway and plugin server" \
      org.opencontainers.image.licenses="Apache-2.0"
USER root
RUN apt-get update && apt-get install -y --no-install-recommends python3 && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/token-exchange /opt/token-exchange
USER kong
ENV KONG_PLUGINS=bundled,token-exchange \
    KONG_PLUGINSERVER_NAMES=token-exchange \
    KONG_PLUGINSERVER_TOKEN_EXCHANGE_SOCKET=/usr/local/kong/token-exchange.socket \
    KONG_PLUGINSERVER_TOKEN_EXCHANGE_QUERY_CMD="/opt/token-exchange/bin/kong-token-exchange describe" \
    KONG_PLUGINSERVER_TOKEN_EXCHANGE_START_CMD="/opt/token-exchange/bin/kong-token-exchange serve --exit-with-parent --socket /usr/local/kong/token-exchange.socket"
