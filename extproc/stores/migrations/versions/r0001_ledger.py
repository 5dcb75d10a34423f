"""The ledger: one row for each finished request."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """The column types are written out, not imported: a released revision must not change with the program."""
    started_at = sa.DateTime().with_variant(sa.DateTime(timezone=True), "postgresql")
    op.create_table(
        "ledger",
        sa.Column("request_id", sa.Text(), primary_key=True),
        sa.Column("started_at", started_at, nullable=False),
        *(sa.Column(name, sa.Text()) for name in ("team", "project", "user_id", "agent", "key_id")),
        *(sa.Column(name, sa.Text()) for name in ("dialect", "endpoint", "alias", "provider")),
        *(sa.Column(name, sa.Text()) for name in ("model_asked", "model_returned")),
        *(sa.Column(name, sa.BigInteger()) for name in ("input_tokens", "output_tokens", "cached_tokens")),
        *(sa.Column(name, sa.BigInteger()) for name in ("cache_write_tokens", "reasoning_tokens", "cost_nusd")),
        sa.Column("price_source", sa.Text()),
        sa.Column("status", sa.Integer(), nullable=False),
        sa.Column("code", sa.Text()),
        sa.Column("outcome", sa.Text(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("tried", sa.Text()),
        sa.Column("first_byte_s", sa.Double()),
        sa.Column("duration_s", sa.Double(), nullable=False),
        sa.Column("stream", sa.Boolean(), nullable=False),
        sa.Column("estimated", sa.Boolean(), nullable=False),
        sa.Column("request_bytes", sa.BigInteger(), nullable=False),
        sa.Column("response_bytes", sa.BigInteger(), nullable=False),
    )
    op.create_index("ledger_by_start", "ledger", ["started_at"])
    op.create_index("ledger_by_team_and_start", "ledger", ["team", "started_at"])
