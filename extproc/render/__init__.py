"""Snapshot to Envoy configuration, typed with envoy-data-plane. Open `bootstrap` first."""
