# Sourced by those who need a cluster: the one in KUBECONFIG, or one started on this machine; kubectl and helm on PATH.
if [ -z "${KUBECONFIG:-}" ]; then
    python3 -m tests.cluster up --nodes "${NODES:-4}" --gpus-per-node "${GPUS_PER_NODE:-2}"
    KUBECONFIG=$(python3 -c 'from tests.cluster import settings; print(settings.KUBECONFIG)')
    export KUBECONFIG
fi
PATH=$(python3 -m tests.cluster binaries | tail -n 1):$PATH
export PATH
