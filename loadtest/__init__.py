"""Load tests of a running service, over gRPC or HTTP: open-loop arrivals, traces, conversations, goals, reports.

Knows the service only through its doors: of the package it imports the client and the errors.
"""
