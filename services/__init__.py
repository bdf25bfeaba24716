"""The processes of the service and what they share.

config · validation · lifecycle · telemetry · processes · rpc, status (gRPC as all of them use it) · api (what clients
see) · worker, model_shape, framing (what prefill and decode share) · cluster (the fleet on Ray) · serve, cli,
terminal; gateway/, prefill/ and decode/ are the processes.
"""
