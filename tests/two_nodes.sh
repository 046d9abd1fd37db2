#!/usr/bin/env bash
# Two machines on one: a command runs in each of two network namespaces, which see each other over one cable and nothing else.
#
#     unshare --net --mount-proc --pid --fork --kill-child bash tests/two_nodes.sh FOLDER COMMAND...
#
# The caller's namespace, made by unshare, is node 0; a second one, held by a file in FOLDER, is node 1. Nothing has a name
# outside of them, and all of it ends with unshare, however that ends: nothing is there to be cleaned up, or to collide.
# COMMAND is run by sh on both, with NODE (0 or 1) and ADDRESS (its own) set; node 0 is 10.77.0.1. FOLDER/0.log and 1.log hold
# what they say. The last line printed is the number of bytes that node 1 received over the cable.
set -euo pipefail
folder=$1
command=$2
other=$folder/node1.net

touch "$other"
unshare --net="$other" true
ip link add eth0 type veth peer name eth1
ip link set eth1 netns "$other"
on_other() { nsenter --net="$other" "$@"; }
on_other ip link set eth1 name eth0
ip address add 10.77.0.1/30 dev eth0
on_other ip address add 10.77.0.2/30 dev eth0
for device in lo eth0; do
    ip link set "$device" up
    on_other ip link set "$device" up
done

export GLOO_SOCKET_IFNAME=eth0
NODE=0 ADDRESS=10.77.0.1 sh -c "$command" >"$folder/0.log" 2>&1 &
first=$!
NODE=1 ADDRESS=10.77.0.2 on_other sh -c "$command" >"$folder/1.log" 2>&1 &
second=$!
status=0
wait "$first" || status=$?
wait "$second" || status=$?
# shellcheck disable=SC2016 # awk's own $
on_other awk '$1 == "eth0:" { print $2 }' /proc/net/dev
exit "$status"
