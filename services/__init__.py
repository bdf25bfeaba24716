"""The processes of the service and what they share.

config · validation · lifecycle · telemetry · rpc, status (gRPC as all of them use it) · api (what clients see) ·
framing (engine tensors <-> frames) · cluster (the fleet on Ray) · cli; gateway/, prefill/, decode/ are the processes.
"""
