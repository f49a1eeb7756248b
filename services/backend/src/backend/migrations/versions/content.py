"""Cards get ``content``, the new name of ``text``, and keep both: instances of the release before run beside this one.

They know ``text`` only, this release knows ``content`` only; triggers keep them the same. The release after the next
roll can drop ``text`` with the triggers, since nobody then knows it (docs/howto/roll.md).
"""

from alembic import op

revision = "0002"
down_revision = "0001"

_POSTGRES = (
    # Whoever waits for the table's lock holds up everybody behind: a start tries again instead.
    "SET LOCAL lock_timeout = '2s'",
    "ALTER TABLE cards ADD COLUMN content TEXT, ALTER COLUMN text DROP NOT NULL",
    # A database emptied by hand has its functions still.
    """
    CREATE OR REPLACE FUNCTION cards_content() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF TG_OP = 'INSERT' THEN
            NEW.content = coalesce(NEW.content, NEW.text);
            NEW.text = NEW.content;
        ELSIF NEW.content IS DISTINCT FROM OLD.content THEN
            NEW.text = NEW.content;
        ELSIF NEW.text IS DISTINCT FROM OLD.text THEN
            NEW.content = NEW.text;
        END IF;
        RETURN NEW;
    END $$
    """,
    "CREATE TRIGGER cards_content BEFORE INSERT OR UPDATE ON cards FOR EACH ROW EXECUTE FUNCTION cards_content()",
)

_SQLITE = (
    # SQLite drops no NOT NULL. A column made anew may be NULL, and no copy of the table has to keep its used ids.
    "ALTER TABLE cards ADD COLUMN content TEXT",
    "UPDATE cards SET content = text",
    "ALTER TABLE cards DROP COLUMN text",
    "ALTER TABLE cards ADD COLUMN text TEXT",
    "UPDATE cards SET text = content",
    """
    CREATE TRIGGER cards_inserted AFTER INSERT ON cards WHEN NEW.content IS NOT NEW.text BEGIN
        UPDATE cards SET content = coalesce(NEW.content, NEW.text), text = coalesce(NEW.content, NEW.text)
        WHERE id = NEW.id;
    END
    """,
    """
    CREATE TRIGGER cards_content_changed AFTER UPDATE OF content ON cards
    WHEN NEW.content IS NOT OLD.content AND NEW.text IS NOT NEW.content BEGIN
        UPDATE cards SET text = NEW.content WHERE id = NEW.id;
    END
    """,
    """
    CREATE TRIGGER cards_text_changed AFTER UPDATE OF text ON cards
    WHEN NEW.text IS NOT OLD.text AND NEW.content IS NOT NEW.text BEGIN
        UPDATE cards SET content = NEW.text WHERE id = NEW.id;
    END
    """,
)


def upgrade() -> None:
    """Expand: in a moment on Postgres, where the next step copies what is there."""
    for statement in _SQLITE if op.get_context().dialect.name == "sqlite" else _POSTGRES:
        op.execute(statement)
