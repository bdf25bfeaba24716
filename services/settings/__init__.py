"""The settings of a process, one file a topic: `config.ServeConfig` is all of them together."""
