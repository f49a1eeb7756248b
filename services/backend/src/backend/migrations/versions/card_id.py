"""Publications know their card, and go when it goes. The release before stores none: theirs is told later."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Expand: NULL where nobody has told it yet."""
    if op.get_context().dialect.name == "postgresql":
        op.execute("SET LOCAL lock_timeout = '2s'")
    op.add_column("publications", sa.Column("card_id", sa.BigInteger))
    op.create_index("publications_card_id", "publications", ["card_id"])
