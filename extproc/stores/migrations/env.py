"""What alembic runs: the migrations on the connection that `stores.sql` holds, inside its transaction and lock.

The surprising thing: it never opens a connection of its own, so no second process can migrate at the same time.
"""

from __future__ import annotations

from alembic import context

from extproc.stores.sql import METADATA

context.configure(
    connection=context.config.attributes["connection"], target_metadata=METADATA, version_table="extproc_revision"
)
context.run_migrations()
