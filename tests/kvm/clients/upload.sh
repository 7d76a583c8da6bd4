#!/bin/sh
# Upload a TDX module image through the firmware-upload class, as its ABI document describes.
# usage: upload.sh SYSFS NODE IMAGE SECONDS
# Prints "status: ..." lines as they change, then "error: ..." and "version: ...". Exit 0 updated, 1 failed, 2 timeout.
node=$1/class/firmware/$2
device=$1/devices/faux/tdx_host
deadline=$(($(date +%s) + $4))

echo 1 > "$node/loading" || exit 1
cat "$3" > "$node/data" || exit 1
echo 0 > "$node/loading" || exit 1

last=
while :; do
    status=$(cat "$node/status")
    [ "$status" = "$last" ] || echo "status: $status"
    last=$status
    [ "$status" = idle ] && break
    [ "$(date +%s)" -lt "$deadline" ] || exit 2
    sleep 0.05
done

error=$(cat "$node/error")
echo "error: $error"
if version=$(cat "$device/version" 2>/dev/null) && [ -n "$version" ]; then
    echo "version: $version"
else
    echo "version: none"
fi
[ -z "$error" ]
