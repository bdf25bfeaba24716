"""Metrics: what there is (`catalog`), what the gateway and the workers count, and how that is exported."""
