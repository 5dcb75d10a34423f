"""Wire formats, sans-io: which endpoints exist, and how a body is read and changed without re-encoding it."""
