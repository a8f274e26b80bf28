#!/usr/bin/env bash
# Build the project's images: images/build.sh operator worker
# and images on top of the worker's, each from a directory of its own: images/build.sh examples/own-trainer
#
#   BUILDER           buildah, podman or docker (with BuildKit); default: the first of them that is installed
#   BASE              base image; default: the Containerfile's (python:3.13-slim-trixie)
#   IMAGE_REPOSITORY  default: localhost/pipelinejob
#   IMAGE_TAG         default: dev
#
# pip's settings (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_TRUSTED_HOST, PIP_DEFAULT_TIMEOUT) and the machine's
# certificate bundle (PIP_CERT, SSL_CERT_FILE or the system's) reach the build as secrets: no layer holds them.
set -euo pipefail
cd "$(dirname "$0")/.."

repository=${IMAGE_REPOSITORY:-localhost/pipelinejob}
tag=${IMAGE_TAG:-dev}

fail() {
    echo "error: $*" >&2
    exit 1
}

find_builder() {
    local candidate
    for candidate in buildah podman docker; do
        if command -v "$candidate" > /dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "no image builder: install buildah, podman or docker, or name one with BUILDER="
}

# Write the pip configuration and the certificate bundle that the build shall use into the directory $1.
write_secrets() {
    local directory=$1 bundle
    bundle=${PIP_CERT:-${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}}
    {
        echo "[global]"
        if [ -f "$bundle" ]; then echo "cert = /run/secrets/ca-bundle"; fi
        if [ -n "${PIP_INDEX_URL:-}" ]; then echo "index-url = $PIP_INDEX_URL"; fi
        if [ -n "${PIP_EXTRA_INDEX_URL:-}" ]; then echo "extra-index-url = $PIP_EXTRA_INDEX_URL"; fi
        if [ -n "${PIP_TRUSTED_HOST:-}" ]; then echo "trusted-host = $PIP_TRUSTED_HOST"; fi
        if [ -n "${PIP_DEFAULT_TIMEOUT:-}" ]; then echo "timeout = $PIP_DEFAULT_TIMEOUT"; fi
    } > "$directory/pip-configuration"
    if [ -f "$bundle" ]; then cp "$bundle" "$directory/ca-bundle"; else : > "$directory/ca-bundle"; fi
}

# Copy what the images are made of into the directory $1, without what a test run leaves between the sources.
write_context() {
    tar --create --exclude=__pycache__ --exclude='*.egg-info' locks operator worker | tar --extract --directory "$1"
}

build() {
    local name=$1 file=images/$1/Containerfile context=$work/context
    if [ -f "$1/Containerfile" ]; then name=$(basename "$1") file=$1/Containerfile context=$1; fi
    [ -f "$file" ] || fail "image $name: no $file; allowed: operator, worker, or a directory with a Containerfile"
    local arguments=(
        --file "$file" --tag "$repository/$name:$tag"
        --secret "id=pip-configuration,src=$work/secrets/pip-configuration"
        --secret "id=ca-bundle,src=$work/secrets/ca-bundle"
    )
    if [ "$context" = "$1" ]; then arguments+=(--build-arg "WORKER=$repository/worker:$tag"); fi
    if [ -n "${BASE:-}" ]; then arguments+=(--build-arg "BASE=$BASE"); fi
    case $builder in
        buildah | podman) "$builder" build --layers "${arguments[@]}" "$context" ;;
        docker) DOCKER_BUILDKIT=1 docker build "${arguments[@]}" "$context" ;;
        *) fail "BUILDER=$builder: allowed are buildah, podman and docker" ;;
    esac
    echo "built $repository/$name:$tag"
}

builder=${BUILDER:-$(find_builder)}
work=$(mktemp --directory)
trap 'rm -rf "$work"' EXIT
mkdir "$work/secrets" "$work/context"
write_secrets "$work/secrets"
write_context "$work/context"
if [ $# -eq 0 ]; then set -- operator worker; fi
for name in "$@"; do build "$name"; done
