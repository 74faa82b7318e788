"""Headroom: how much better than a constant rate any choice of retention over an answer could be, at equal cost.

`library` has the trajectories, `rankings` the orders in which tokens go, `measure` their teacher-forced losses, `frontier` what
a choice among them reaches at a budget, `confirm` the same on generated answers. `python -m study.headroom` runs them.
"""
