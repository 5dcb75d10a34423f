"""Alembic's migrations of the SQL stores, run when a store is opened (see `stores.sql`), never by hand."""
