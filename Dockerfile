# The images of Fleetwright, one target each. All run as a user of their own with a read-only root and no capabilities
# (the "restricted" Pod Security Standard); what they write is a volume.
#
#   docker build --target mosquitto -t fleetwright/mosquitto .
#   cargo build --release && docker build --target fleetwright -t fleetwright/fleetwright .
#
# The base is Debian forky: the first with Mosquitto 2.1, whose SQLite persistence outlives a kill of the broker.
ARG BASE=docker.io/library/debian:forky-slim

FROM ${BASE} AS base

# The broker of a Gateway. The plugin stands at one path whatever the processor: Debian names its folder after that. Four
# further ones are our own, one of which is to be preloaded as well; what compiles them does not stay.
FROM base AS mosquitto
COPY images/mosquitto-*.c images/mosquitto-*.h /tmp/
RUN groupadd --system --gid 1883 mosquitto \
 && useradd --system --uid 1883 --gid 1883 --home-dir /var/lib/mosquitto --shell /usr/sbin/nologin mosquitto \
 && apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends mosquitto \
 && mkdir -p /usr/lib/mosquitto \
 && ln -s "$(find /usr/lib -name mosquitto_persist_sqlite.so)" /usr/lib/mosquitto/persist_sqlite.so \
 && test -e /usr/lib/mosquitto/persist_sqlite.so \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends gcc libc6-dev libmosquitto-dev libssl-dev libsqlite3-dev \
 && for plugin in previous-password certificate bounds acknowledge; do \
      gcc -std=gnu17 -O2 -Wall -Wextra -Werror -fPIC -shared -o "/usr/lib/mosquitto/$(echo $plugin | tr - _).so" "/tmp/mosquitto-$plugin.c" -Wl,--as-needed -lcrypto -lsqlite3 || exit 1; \
    done \
 && DEBIAN_FRONTEND=noninteractive apt-get purge -y --autoremove gcc libc6-dev libmosquitto-dev libssl-dev libsqlite3-dev \
 && rm -f /tmp/mosquitto-*.[ch] \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/*.log /var/log/apt
USER 1883:1883
EXPOSE 1883
ENTRYPOINT ["/usr/sbin/mosquitto"]
CMD ["-c", "/etc/mosquitto/mosquitto.conf"]

# The database that the chart can bring along. Data in PGDATA; needs writable /var/run/postgresql and /tmp.
FROM base AS timescaledb
RUN groupadd --system --gid 70 postgres \
 && useradd --system --uid 70 --gid 70 --home-dir /var/lib/postgresql --shell /bin/sh postgres \
 && mkdir -p /etc/postgresql-common \
 && echo 'create_main_cluster = false' >/etc/postgresql-common/createcluster.conf \
 && apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends postgresql-18 postgresql-18-timescaledb \
 && mkdir -p /var/lib/postgresql/data && chown 70:70 /var/lib/postgresql/data \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/*.log /var/log/apt
COPY --chmod=0755 images/timescaledb-entrypoint.sh /usr/local/bin/timescaledb-entrypoint
ENV PATH=/usr/lib/postgresql/18/bin:/usr/local/bin:/usr/bin:/bin \
    PGDATA=/var/lib/postgresql/data/pgdata \
    LANG=C.UTF-8
USER 70:70
EXPOSE 5432
STOPSIGNAL SIGINT
ENTRYPOINT ["/usr/local/bin/timescaledb-entrypoint"]

# The operator, the agent, the ingest worker and the simulator: one binary, built beforehand.
FROM base AS fleetwright
ARG BINARY=target/release/fleetwright
COPY --chmod=0755 ${BINARY} /usr/local/bin/fleetwright
# Memory that is free goes back to the kernel at once, and not within a second: a worker that drains a queue held 6 MiB more.
ENV MIMALLOC_PURGE_DELAY=0
USER 65532:65532
ENTRYPOINT ["/usr/local/bin/fleetwright"]
