"""Publications know their time, so that old ones can go. The release before stores none: theirs is told later."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Expand: NULL where nobody knows."""
    if op.get_context().dialect.name == "postgresql":
        op.execute("SET LOCAL lock_timeout = '2s'")
    op.add_column("publications", sa.Column("published_at", sa.DateTime))
