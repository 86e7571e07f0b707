#!/usr/bin/env bash
# Builds the images of the Dockerfile without a container engine: buildah, on a base that debootstrap makes.
#
#   images.sh name IMAGE...      the full name; its tag stands for the contents, so that a change is a new name
#   images.sh archive IMAGE...   builds what is not there yet; prints the path of an OCI archive
#   images.sh push REGISTRY IMAGE...   builds and pushes; prints the names
#
#   IMAGE: fleetwright mosquitto timescaledb pause
#   BINARY=target/release/fleetwright   the binary of the fleetwright image
#   BASE=docker.io/library/debian:forky-slim   another base than the one that debootstrap makes
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

BINARY=${BINARY:-$ROOT/target/release/fleetwright}
KEEP_ARCHIVES=3

# Storage of its own: the machine's other images stay out of it. Chroot isolation needs no privileges beyond root's.
buildah_() { STORAGE_DRIVER=overlay BUILDAH_ISOLATION=chroot buildah --root "$CACHE/buildah" --runroot "$RUNROOT" "$@"; }

# alone COMMAND... : this script again, in a mount namespace of its own, for buildah leaves mounts behind.
alone() { FLEETWRIGHT_ALONE=1 unshare --mount --propagation private "$ROOT/e2e/images.sh" "$@"; }
if [ -n "${FLEETWRIGHT_ALONE:-}" ]; then
  RUNROOT=$(mktemp -d); export RUNROOT
  trap 'umount -l "$CACHE/buildah/overlay" 2>/dev/null || true; rm -rf --one-file-system "$RUNROOT"' EXIT
fi

base_name() { printf '%s\n' "${BASE:-localhost/fleetwright/base:$(base_hash)}"; }

# stage IMAGE : the lines of the Dockerfile that make it, on the base itself. Older buildah builds every stage before the one that
# is asked for, and forgets the containers of stages without a step. What another stage builds comes from the context.
stage() {
  awk -v stage="$1" '/^FROM/ {on = ($NF == stage); sub(/^FROM base /, "FROM ${BASE} ")} {sub(/^COPY --from=mosquitto-build \//, "COPY ")} /^ARG BASE/ || on' \
    "$ROOT/Dockerfile"
}

tag() {
  case $1 in
    pause) echo local ;;
    fleetwright) [ -e "$BINARY" ] || fail "no $BINARY: cargo build --release"
      { stage "$1"; base_name; cat "$BINARY"; } | short_hash ;;
    mosquitto) { stage "$1"; base_name; mosquitto_name; } | short_hash ;;
    timescaledb) { stage "$1"; base_name; cat "$ROOT"/images/timescaledb*; } | short_hash ;;
    *) fail "no image is called $1; there are: fleetwright mosquitto timescaledb" ;;
  esac
}

name() { local tag; tag=$(tag "$1"); printf 'localhost/fleetwright/%s:%s\n' "$1" "$tag"; }

# archive IMAGE
archive() {
  local image=$1 name file; name=$(name "$image"); file=image-$image-${name##*:}.tar
  if [ ! -e "$CACHE/$file" ]; then
    as_root "building images"
    [ -n "${FLEETWRIGHT_ALONE:-}" ] || { alone archive "$image"; return; }
    need buildah=buildah catatonit=catatonit flock=util-linux 1>&2
    [ "$image" = pause ] || base
    cached "$file" "image $name" "build_$([ "$image" = pause ] && echo pause || echo stage)" "$image" "$name"
    # shellcheck disable=SC2012  # our own names; the newest come first
    ls -1t "$CACHE"/image-"$image"-*.tar | tail -n +$((KEEP_ARCHIVES + 1)) | xargs -r rm -f
  fi
  touch "$CACHE/$file"
  printf '%s\n' "$CACHE/$file"
}

# base : makes the base image known to buildah. One at a time, as buildah's storage would have it anyway.
base() {
  [ -z "${BASE:-}" ] || return 0
  local folder; folder=$(debian_base)
  mkdir -p "$CACHE"
  ( flock 9
    buildah_ inspect --type image "$(base_name)" >/dev/null 2>&1 || step "base image" build_base "$folder" ) 9>"$CACHE/base-image.lock"
}

build_base() {
  local container; container=$(buildah_ from scratch)
  buildah_ add -q "$container" "$1" / >/dev/null
  buildah_ commit -q --rm "$container" "$(base_name)" >/dev/null
}

build_stage() {
  local image=$1 name=$2 out=$3 context log=$CACHE/image-$1.log
  context=$(mktemp -d)
  mkdir -p "$context/target/release"; cp -r "$ROOT/images" "$context/"
  [ "$image" != fleetwright ] || cp "$BINARY" "$context/target/release/fleetwright"
  if [ "$image" = mosquitto ]; then
    local build; build=$(mosquitto_build)
    mkdir "$context/built"; cp -a "$build/broker" "$context/built/"
  fi
  stage "$image" >"$context/Dockerfile"
  { buildah_ build --no-cache --force-rm --pull-never --build-arg BASE="$(base_name)" --target "$image" -t "$name" "$context" &&
    buildah_ push -q --disable-compression "$name" "oci-archive:$out:$name" &&
    buildah_ rmi "$name"; } >"$log" 2>&1 || { tail -n 20 "$log" >&2; rm -rf "$context"; return 1; }
  rm -rf "$context"
}

build_pause() {
  local name=$2 out=$3 context; context=$(mktemp -d)
  cp "$(command -v catatonit)" "$context/pause"
  printf 'FROM scratch\nCOPY pause /pause\nENTRYPOINT ["/pause", "-P"]\n' >"$context/Dockerfile"
  buildah_ build -q -t "$name" "$context" >/dev/null
  buildah_ push -q "$name" "oci-archive:$out:$name"
  rm -rf "$context"
}

push() {
  local registry=$1 image name archive; shift
  for image in "$@"; do
    name=$(name "$image"); archive=$(archive "$image")
    step "push $registry/$image:${name##*:}" buildah_ push -q "oci-archive:$archive" "docker://$registry/$image:${name##*:}" >&2
    printf '%s\n' "$registry/$image:${name##*:}"
  done
}

command=${1:-}; [ $# -eq 0 ] || shift
case $command in
  name|archive) for image in "$@"; do "$command" "$image"; done ;;
  push) if [ -n "${FLEETWRIGHT_ALONE:-}" ]; then push "$@"; else as_root "pushing images"; alone push "$@"; fi ;;
  *) sed -n '2,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//'; exit 2 ;;
esac
