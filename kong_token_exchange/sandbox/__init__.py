"""
Everything needed to try and to test the plugin without a Kong and without an identity provider.

- `gateway`: reads a `kong.yml`, starts the plugin server and drives it over the
  real socket as Kong 3.9.1 does, proxies HTTP/1.1.
- `issuer`: issuers that speak OpenID Connect discovery, RFC 8693 and RFC 7523,
  shaped like two Keycloak realms.
- `upstream`: an API that answers with what it received.

For trying and testing only: nothing here is hardened, tuned or meant to face
the internet. docs/sandbox.md lists how the gateway differs from Kong.
"""
