#!/bin/sh
# For the tests of several machines, which are network namespaces; they skip where there are none.
set -eu

if command -v ip >/dev/null 2>&1 || [ "$(uname)" != Linux ]; then
    exit 0
fi
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends iproute2 >/dev/null
else
    echo "iproute2 is not installed: the tests of several machines are skipped" >&2
fi
