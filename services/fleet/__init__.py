"""The fleet's policy, without Ray and torch: what is wanted, what there is, and what brings the one to the other.

wanted.py      the wanted state: groups with settings, resources, sizes and versions
reconcile.py   the steps from what there is to what is wanted: starts, drains, rolling upgrades
scaling.py     how many workers a group needs, by queue time and token pressure
report.py      what processes tell the controller of themselves
manager.py     the controller's logic: membership, leases, drains, over a runtime that starts and ends processes
"""
