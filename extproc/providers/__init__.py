"""Providers as data: where each kind lives, what it speaks, and how it takes its credential."""
