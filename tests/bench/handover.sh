#!/usr/bin/env bash
# KV hand-over beside the machine's own copies: over loopback and through shared memory, then between two network namespaces
# joined by a veth with an MTU of 1500. The second needs root and iproute2. LINES and ROUNDS as benches/handover.rs says.
set -euo pipefail
cd "$(dirname "$0")/../.."
bench=$(cargo bench --locked -q -p baton-kv-transfer --bench handover --no-run --message-format=json |
    grep -o '"executable":"[^"]*"' | tail -n 1 | cut -d '"' -f 4)

echo "Loopback and shared memory"
"$bench"

if [ "$(id -u)" != 0 ] || ! command -v ip >/dev/null; then
    echo "No veth: that needs root and iproute2."
    exit 0
fi
near=baton-near-$$ far=baton-far-$$
trap 'ip netns delete $near 2>/dev/null; ip netns delete $far 2>/dev/null || true' EXIT
ip netns add "$near"
ip netns add "$far"
ip link add near netns "$near" mtu 1500 type veth peer name far netns "$far" mtu 1500
ip -n "$near" address add 10.77.0.1/24 dev near
ip -n "$far" address add 10.77.0.2/24 dev far
for each in "$near near" "$far far"; do
    read -r space link <<<"$each"
    ip -n "$space" link set lo up
    ip -n "$space" link set "$link" up
done
echo "veth, MTU 1500"
# shellcheck disable=SC2097,SC2098
FAR="ip netns exec $far" FAR_HOST=10.77.0.2 ip netns exec "$near" "$bench"
