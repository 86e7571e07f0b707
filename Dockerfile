# The images of Fleetwright, one target each. Each image runs as its own user with a read-only root file system and without
# capabilities (Pod Security Standard "restricted"), and writes only to volumes.
#
#   docker build --target mosquitto -t fleetwright/mosquitto .
#   cargo build --release && docker build --target fleetwright -t fleetwright/fleetwright .
#
# The base is Debian forky, the first release with Mosquitto 2.1, whose SQLite persistence survives a kill of the broker.
ARG BASE=docker.io/library/debian:forky-slim

FROM ${BASE} AS base

# Mosquitto from Debian's source package, with the patches and plugins in images/mosquitto. Compilers stay in this stage.
# e2e/images.sh builds the same files once for the image and the component tests, and uses them instead of this stage.
FROM base AS mosquitto-build
COPY images/mosquitto /mosquitto
RUN /mosquitto/build.sh broker /built && /mosquitto/build.sh plugins /built

# The broker of a Gateway.
FROM base AS mosquitto
COPY --from=mosquitto-build /built/broker/ /
RUN groupadd --system --gid 1883 mosquitto \
 && useradd --system --uid 1883 --gid 1883 --home-dir /var/lib/mosquitto --shell /usr/sbin/nologin mosquitto \
 && apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends libssl3t64 libcjson1 libsqlite3-0 libpicohttpparser1 \
 && for file in /usr/sbin/mosquitto /usr/lib/mosquitto/*.so; do ! ldd "$file" | grep "not found" || exit 1; done \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/*.log /var/log/apt
USER 1883:1883
EXPOSE 1883
ENTRYPOINT ["/usr/sbin/mosquitto"]
CMD ["-c", "/etc/mosquitto/mosquitto.conf"]

# The database that the chart can deploy. Data is in PGDATA; /var/run/postgresql and /tmp must be writable.
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

# The operator, the agent, the ingest worker and the simulator: one binary, built before the image.
FROM base AS fleetwright
ARG BINARY=target/release/fleetwright
COPY --chmod=0755 ${BINARY} /usr/local/bin/fleetwright
# Returns free memory to the kernel at once. With the default delay of a second, a worker that drained a queue held 6 MiB more.
ENV MIMALLOC_PURGE_DELAY=0
USER 65532:65532
ENTRYPOINT ["/usr/local/bin/fleetwright"]
