"""kvsluice."""
