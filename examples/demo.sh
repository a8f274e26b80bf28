#!/usr/bin/env bash
# Train examples/tiny-gpt.yaml: on the cluster in KUBECONFIG with the images in REGISTRY, or on one started here.
set -euo pipefail
cd "$(dirname "$0")/.."

repository=localhost/pipelinejob
if [ -n "${KUBECONFIG:-}" ] && [ -n "${REGISTRY:-}" ]; then
    images/build.sh operator worker
    images/push.sh "$REGISTRY"
    repository=$REGISTRY/pipelinejob
elif [ -n "${KUBECONFIG:-}" ]; then
    python3 -m tests.cluster load || {
        echo "error: KUBECONFIG names a cluster of yours: say where its nodes pull images from: make demo REGISTRY=..." >&2
        exit 1
    }
fi
source tests/cluster/use.sh

helm upgrade --install pipelinejob charts/pipelinejob --namespace pipelinejob-system --create-namespace --wait \
    --set "operator.image.repository=$repository/operator,operator.image.tag=${IMAGE_TAG:-dev}" \
    --set "worker.image.repository=$repository/worker,worker.image.tag=${IMAGE_TAG:-dev}" > /dev/null
# Where it ran before, the tag may name another image by now.
kubectl rollout restart deployment/pipelinejob --namespace pipelinejob-system > /dev/null
kubectl rollout status deployment/pipelinejob --namespace pipelinejob-system --timeout 120s > /dev/null

kubectl delete pipelinejob tiny-gpt --ignore-not-found
if kubectl get nodes -o jsonpath='{.items[*].status.allocatable}' | grep -q nvidia.com/gpu; then
    kubectl apply -f examples/tiny-gpt.yaml
else
    echo "no node offers nvidia.com/gpu: the stages run on CPUs"
    sed 's/^spec:$/&\n  gpu: {count: 0}/' examples/tiny-gpt.yaml | kubectl apply -f -
fi

kubectl get pipelinejob tiny-gpt --watch &
watch=$!
trap 'kill $watch 2> /dev/null || true' EXIT
finished() { kubectl get pipelinejob tiny-gpt -o jsonpath='{.status.conditions[?(@.type=="Succeeded")].status}'; }
until [ "$(finished)" = True ]; do
    if [ "$(finished)" = False ]; then
        kubectl describe pipelinejob tiny-gpt
        exit 1
    fi
    kubectl wait --for=condition=Succeeded pipelinejob/tiny-gpt --timeout=5s > /dev/null 2>&1 || true
done
kill $watch
wait $watch 2> /dev/null || true

echo
kubectl get pipelinejob tiny-gpt
echo
echo "How the loss fell:"
last=$(kubectl get pods -l pipelinejob.dev/job=tiny-gpt,pipelinejob.dev/stage=3 -o name)
kubectl logs "$last" | python3 -c '
import json, sys

steps = [line for text in sys.stdin if text.startswith("{") and (line := json.loads(text)).get("event") == "step"]
for line in steps[:: max(1, len(steps) // 10)] + steps[-1:]:
    print("step {step:>4}  loss {loss:6.3f}  {bar}".format(bar="#" * round(12 * line["loss"]), **line))
'
echo
echo "The cluster runs on; look around with: export KUBECONFIG=$KUBECONFIG"
