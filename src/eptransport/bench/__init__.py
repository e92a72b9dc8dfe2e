"""What `eptransport bench` measures.

shapes.py     what a layer looks like, and the bytes and messages that it must cost
ranks.py      the processes (or threads) that take part, and how they meet
native.py     the loops in libept_bench
p2p.py        latency, bandwidth and rate beside a bare socket's
moe.py        dispatch and combine, beside gloo's and a bare mesh's
reference.py  dispatch and combine in plain torch, for the check before the clock starts
figures.py    percentiles, and the slowest rank of each iteration
report.py     tables, JSON, pictures
"""
