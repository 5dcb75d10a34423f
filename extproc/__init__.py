"""extproc: Envoy moves the bytes, this package decides. Read it in the order of a request's path.

1. `server`    the edge: gRPC streams from Envoy become events, actions become mutations
2. `decide`    once per request: who asks, for which model, served by whom, within which bounds
3. `adapt`     once per attempt, only where a target needs another body than the one decide left
4. `record`    once per finished request: usage, cost, one row in the ledger

What they share: `exchange` (events in, actions out), `decision` (the only thing that passes from moment to moment),
`errors` (refusals), `catalog` (prices), `dialects` (wire formats), `config` (gateway.yaml and its compiled snapshot).
Around them: `render` (snapshot to Envoy configuration), `stores` (SQL), `demo` (a provider to try it with), `cli`.
"""
