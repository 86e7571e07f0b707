#!/bin/sh
# First start: makes the data folder, the user, the database and the extension. Every start: becomes the server, with the
# arguments given (as in `-c shared_buffers=1GB`). An interrupted first start leaves nothing that the next one would trust.
#
#   POSTGRES_PASSWORD or POSTGRES_PASSWORD_FILE   required on the first start
#   POSTGRES_USER, POSTGRES_DB (and _FILE)        default: postgres, and the user's name
#   PGDATA                                        default: /var/lib/postgresql/data/pgdata
set -eu

# setting NAME DEFAULT : the variable NAME, or the contents of the file that NAME_FILE names.
setting() {
  eval "value=\${$1:-} file=\${$1_FILE:-}"
  if [ -z "$value" ] && [ -n "$file" ]; then value=$(cat "$file"); fi
  printf '%s' "${value:-$2}"
}

initialise() {
  user=$(setting POSTGRES_USER postgres)
  database=$(setting POSTGRES_DB "$user")
  password=$(setting POSTGRES_PASSWORD '')
  if [ -z "$password" ]; then echo "POSTGRES_PASSWORD or POSTGRES_PASSWORD_FILE must be set" >&2; exit 1; fi

  new=$PGDATA.new
  rm -rf "$new"; mkdir -p "$new"; chmod 700 "$new"
  initdb --pgdata="$new" --username=postgres --auth-local=trust --auth-host=scram-sha-256 --encoding=UTF8 --locale=C.UTF-8 --data-checksums
  echo 'host all all all scram-sha-256' >>"$new/pg_hba.conf"
  pg_ctl --pgdata="$new" --wait start -o "-c listen_addresses='' -c unix_socket_directories=/tmp -c shared_preload_libraries=timescaledb -c timescaledb.telemetry_level=off"
  if [ "$user" != postgres ]; then
    psql -v ON_ERROR_STOP=1 -h /tmp -U postgres -v user="$user" <<'SQL'
CREATE ROLE :"user" LOGIN;
SQL
  fi
  # Through the environment, for a process's arguments can be read by others.
  PASSWORD=$password psql -v ON_ERROR_STOP=1 -h /tmp -U postgres -v user="$user" <<'SQL'
\getenv password PASSWORD
ALTER ROLE :"user" PASSWORD :'password';
SQL
  if [ "$database" != postgres ]; then
    psql -v ON_ERROR_STOP=1 -h /tmp -U postgres -v user="$user" -v database="$database" <<'SQL'
CREATE DATABASE :"database" OWNER :"user";
SQL
  fi
  psql -v ON_ERROR_STOP=1 -h /tmp -U postgres -d "$database" -c 'CREATE EXTENSION IF NOT EXISTS timescaledb'
  pg_ctl --pgdata="$new" --wait --mode=fast stop
  mv "$new" "$PGDATA"
}

# PostgreSQL requires a data folder that only its user can read. The root folder of the volume belongs to another user.
mkdir -p "$(dirname "$PGDATA")"
[ -s "$PGDATA/PG_VERSION" ] || initialise
chmod 700 "$PGDATA"      # a pod's fsGroup opens it to the group with every mount, and the server refuses that

exec postgres -D "$PGDATA" -c listen_addresses='*' -c unix_socket_directories=/var/run/postgresql,/tmp \
  -c shared_preload_libraries=timescaledb -c timescaledb.telemetry_level=off -c log_timezone=UTC -c timezone=UTC "$@"
