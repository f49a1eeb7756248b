#!/usr/bin/env bash
# A Docker engine where none answers, on Debian and as root: for CI and for closed networks.
#   tools/docker.sh start   installs (Debian's packages) and starts an engine and Compose, unless they are there
#   tools/docker.sh run COMMAND…   runs it with an engine, which is ended again if none answered before
#   tools/docker.sh stop    ends the engine that `start` started; one that was there before is left alone
set -euo pipefail

state=${REGISTRY_DOCKER_STATE:-/var/tmp/registry-docker}
pid_file=$state/dockerd.pid
log=$state/dockerd.log

answers() { timeout 10 docker version --format '{{.Server.Version}}' 2>/dev/null; } # Prints the engine's version.

ours() { # The pid of the engine that we started, if it still runs and still is one.
    local pid
    pid=$(cat "$pid_file" 2>/dev/null) && [[ $(cat "/proc/$pid/comm" 2>/dev/null) == dockerd ]] && echo "$pid"
}

has_compose() { docker compose version >/dev/null 2>&1 || command -v docker-compose >/dev/null; }

install() { # Debian's packages, only for what is missing.
    local packages=()
    answers >/dev/null || command -v dockerd >/dev/null || packages+=(docker.io containerd runc iptables)
    has_compose || packages+=(docker-compose)
    ((${#packages[@]})) || return 0
    apt-get update -qq
    # Newer releases of Debian have the client in a package of its own.
    command -v docker >/dev/null || ! apt-cache show docker-cli >/dev/null 2>&1 || packages+=(docker-cli)
    echo "Installing ${packages[*]}." >&2
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}" >&2
}

weigh() { # Where no systemd puts them elsewhere, all containers together count as one process of the host: not enough.
    local group=/sys/fs/cgroup/cpu/docker file=cpu.shares
    [[ -d ${group%/*} ]] || { group=/sys/fs/cgroup/docker file=cpu.weight; }
    if mkdir -p "$group" 2>/dev/null && [[ -w $group/$file ]]; then echo 10000 >"$group/$file"; fi
}

start() {
    install
    if version=$(answers); then
        echo "A Docker engine answers: $version."
        return
    fi
    mkdir -p "$state"
    weigh
    # Its own session, no inherited descriptors: it must neither end with us nor keep a pipe of ours open.
    setsid dockerd --pidfile "$pid_file" >"$log" 2>&1 </dev/null &
    local engine=$! deadline=$((SECONDS + 60))
    until version=$(answers); do
        if ! kill -0 "$engine" 2>/dev/null || ((SECONDS > deadline)); then
            echo "The Docker engine does not start. The end of its log $log:" >&2
            tail -n 20 "$log" >&2
            kill "$engine" 2>/dev/null || true
            exit 1
        fi
        sleep 0.2
    done
    echo "Docker engine $version runs, pid $(ours). Its log is $log. To end it: $0 stop"
}

stop() {
    local pid deadline=$((SECONDS + 30))
    if ! pid=$(ours); then
        echo "No Docker engine of ours runs."
        return
    fi
    kill "$pid" # It stops its containers, and its containerd.
    while [[ -d /proc/$pid ]] && ((SECONDS < deadline)); do sleep 0.2; done
    if [[ -d /proc/$pid ]]; then
        kill -9 "$pid"
        echo "The Docker engine did not end within 30 s and was killed."
    fi
    rm -f "$pid_file"
    echo "The Docker engine has ended."
}

run() {
    # Who can't install gets told by the command what is missing.
    if answers >/dev/null && has_compose || ((EUID != 0)) || ! command -v apt-get >/dev/null; then
        exec "$@"
    fi
    answers >/dev/null || trap stop EXIT
    start
    "$@"
}

case ${1-} in
start | stop) "$1" ;;
run) "$@" ;;
*) sed -n '2,5s/^# \?//p' "$0" >&2; exit 2 ;;
esac
