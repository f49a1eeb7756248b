# The first process of a node. Killed, it takes everything in the node with it. From node.py: NODE, ITS, ADDRESS, ZONE, KUBECONFIG, programs.
set -eu
mount --make-rprivate / && mount --make-rshared / # what pods mount is theirs alone, what the node mounts is theirs, too
mount -t tmpfs tmpfs /run
for folder in containerd kubelet cni; do mkdir -p "/var/lib/$folder" && mount --bind "$ITS/$folder" "/var/lib/$folder"; done
mount --bind "$ITS/log" /var/log
hostname "$NODE"
mkdir -p /run/netns /run/lock
"$CONTAINERD" --config "$ITS/containerd.toml" >>"$ITS/containerd.log" 2>&1 &
while [ ! -S /run/containerd/containerd.sock ]; do sleep 0.1; done
"$KUBELET" --config="$ITS/kubelet.json" --kubeconfig="$KUBECONFIG" --hostname-override="$NODE" --node-ip="$ADDRESS" \
  --node-labels="topology.kubernetes.io/zone=$ZONE" --root-dir=/var/lib/kubelet --cert-dir=/var/lib/kubelet/pki >>"$ITS/kubelet.log" 2>&1 &
"$PROXY" --config="$ITS/proxy.json" >>"$ITS/proxy.log" 2>&1 &
# Of what it can do, only NetworkPolicies. It ends while nobody knows its node.
while true; do
  "$ROUTER" --run-firewall --run-router=false --run-service-proxy=false --health-port=0 --kubeconfig="$ROUTER_KUBECONFIG" \
    --hostname-override="$NODE" >>"$ITS/router.log" 2>&1 || sleep 1
done &
while true; do wait -n || true; sleep 0.2; done # it reaps what loses its parent
