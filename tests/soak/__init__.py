"""`python -m tests.soak`: mixed traffic while parts of the gateway die, hang and reload; not collected by pytest."""
