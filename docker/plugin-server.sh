#!/bin/sh
# Write what Kong's query command reads beside the socket, then serve. Arguments go to `serve`.
set -eu
SOCKET=${SOCKET:-/run/token-exchange/token-exchange.socket}
PATH=/opt/token-exchange/bin:$PATH
description=$(dirname "$SOCKET")/plugin.json
kong-token-exchange describe --output "$description.new"
# Kong runs under another user, which need not be in our group to read this.
chmod 644 "$description.new"
# Renamed, so that a Kong that starts at this moment reads the old one or the new one.
mv -f "$description.new" "$description"
exec kong-token-exchange serve --socket "$SOCKET" --socket-mode 660 "$@"
