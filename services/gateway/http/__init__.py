"""The OpenAI API over HTTP: the gateway's second door. The only place where a web framework is imported.

door ──> app (routes) ──> schemas, translate ──> Intake ──> answers ──> shapes, sse ──> client

`translate` makes the messages that gRPC's clients send, so validator, limits, admission and engines are the same.
"""
