#!/bin/sh
# What the official image does with POSTGRES_USER, POSTGRES_PASSWORD_FILE and POSTGRES_DB, in short: set up once, then run.
set -eu
new=$PGDATA/new
if [ ! -s "$PGDATA/PG_VERSION" ]; then
    rm -rf "$PGDATA"/* # what an interrupted start has left
    initdb --username="$POSTGRES_USER" --pwfile="$POSTGRES_PASSWORD_FILE" --auth=scram-sha-256 --encoding=UTF8 --pgdata="$new"
    echo "host all all all scram-sha-256" >>"$new/pg_hba.conf"
    # Single-user mode: no server that others could take for ready.
    [ "$POSTGRES_DB" = postgres ] || echo "CREATE DATABASE \"$POSTGRES_DB\"" | postgres --single -D "$new" postgres >/dev/null
    mv "$new"/[!P]* "$PGDATA"
    mv "$new"/PG_VERSION "$PGDATA" # last: it says that everything is there
    rmdir "$new"
fi
[ "$1" = postgres ] && set -- "$@" -c "listen_addresses=*" -c unix_socket_directories=/run/postgresql
exec "$@"
