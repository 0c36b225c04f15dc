"""
A plugin server for Kong that speaks ProtoBuf:1.

It knows nothing of tokens: it runs any plugin class that names its facts
(`prefetch`), answers warm requests from memory (`warm`) and does the rest in
`access(kong)`. Why not the stock server: docs/adr/0002-own-plugin-server.md.
"""
