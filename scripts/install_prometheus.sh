#!/usr/bin/env bash
# For the tests of metrics: promtool and prometheus, where Debian's packages can be installed.
set -euo pipefail
if command -v promtool prometheus > /dev/null; then
    exit 0
fi
if ! command -v apt-get > /dev/null || [ "$(id -u)" -ne 0 ]; then
    echo "prometheus is not installed: its tests are skipped" >&2
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
{ apt-get update && apt-get install -y --no-install-recommends prometheus; } > /dev/null ||
    echo "prometheus cannot be installed: its tests are skipped" >&2
