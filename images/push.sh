#!/usr/bin/env bash
# Push the images that images/build.sh has built: images/push.sh REGISTRY (with BUILDER and IMAGE_TAG as for build.sh)
set -euo pipefail
registry=${1:?images/push.sh: no registry; for instance images/push.sh registry.example.com/ml}
repository=${IMAGE_REPOSITORY:-localhost/pipelinejob}
tag=${IMAGE_TAG:-dev}
for builder in ${BUILDER:-buildah podman docker}; do
    command -v "$builder" > /dev/null && break
done
for name in operator worker; do
    "$builder" tag "$repository/$name:$tag" "$registry/pipelinejob/$name:$tag"
    "$builder" push "$registry/pipelinejob/$name:$tag"
done
