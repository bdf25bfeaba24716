"""The front door: validates, tokenizes, admits and routes requests, and streams what the workers make of them.

server     the gRPC generate API           call       one request from admission to its terminal result
text       detokenizing, stop strings      routing    which worker (pure policy)
admission  the bounded queue               links      connections to the workers
membership which workers there are
"""
