"""What the gateway costs, against bare Envoy in the same run: `python -m tests.bench` (`make bench`).

Beside the tests and never collected by pytest. Read `cases` first: what is measured; then `rounds`: how. The surprising
thing: nothing here fails on a time. Absolute figures drift by half on shared machines, so each is taken in short rounds
beside bare Envoy's and given as a ratio; what a run found is written into docs/performance.md.
"""
