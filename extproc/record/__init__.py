"""The third moment: each finished request becomes usage, cost and one row of the ledger."""
