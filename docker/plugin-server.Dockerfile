# The plugin server as a sidecar beside the stock Kong image; docker/README.md says how they meet.
#
#   docker build -f docker/plugin-server.Dockerfile -t kong-token-exchange/plugin-server:dev .
#
# For a repeatable build name the base by digest: --build-arg PYTHON_IMAGE=python@sha256:...
ARG PYTHON_IMAGE=python:3.13-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
# Wheels are built with the same pins as everything else.
ENV PIP_CONSTRAINT=/src/constraints.txt PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# Dates inside the wheel, so that two builds of one commit are equal.
ARG SOURCE_DATE_EPOCH=1735689600
WORKDIR /src
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY kong_token_exchange ./kong_token_exchange
RUN python3 -m venv --without-pip /opt/token-exchange \
 && python3 -m pip --python /opt/token-exchange install --no-compile '.[redis]'
COPY docker/inventory.py docker/healthcheck.py docker/plugin-server.sh /opt/token-exchange/libexec/
RUN /opt/token-exchange/bin/python /opt/token-exchange/libexec/inventory.py --format cyclonedx \
      > /opt/token-exchange/sbom.cdx.json \
 && chmod 755 /opt/token-exchange/libexec/plugin-server.sh

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="kong-token-exchange plugin server" \
      org.opencontainers.image.description="OAuth 2.0 token exchange at Kong Gateway: the plugin server" \
      org.opencontainers.image.licenses="Apache-2.0"
# Numbers, not names: Kong's container and a pod's security context refer to them.
RUN groupadd --gid 10001 token-exchange \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin token-exchange \
 && install -d -o 10001 -g 10001 -m 2770 /run/token-exchange
COPY --from=build /opt/token-exchange /opt/token-exchange
# Nothing is written outside the socket's folder, so the root file system may be read-only.
ENV PATH=/opt/token-exchange/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    SOCKET=/run/token-exchange/token-exchange.socket
USER 10001:10001
VOLUME /run/token-exchange
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=5s --timeout=5s --start-period=120s --retries=3 \
  CMD ["/opt/token-exchange/bin/python", "/opt/token-exchange/libexec/healthcheck.py"]
ENTRYPOINT ["/opt/token-exchange/libexec/plugin-server.sh"]
