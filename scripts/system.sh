#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Sees to it that what pip cannot install is there: a compiler, Python's venv module and headers
# (torch.compile includes Python.h), and libnuma, which vLLM's CPU build links to. Installs what is
# missing where it may, else says what to install. Usage: scripts/system.sh [PYTHON]
set -euo pipefail
python="${1:-python3.11}"

has_headers='import os, sysconfig as s, sys; sys.exit(not os.path.exists(s.get_path("include") + "/Python.h"))'
missing=()
command -v make >/dev/null || missing+=(make)
command -v g++ >/dev/null || missing+=(g++)
if ! command -v "$python" >/dev/null; then
    if [ "$python" != python3.11 ]; then
        echo "error: there is no $python on this machine" >&2
        exit 1
    fi
    missing+=(python3.11 python3.11-venv python3.11-dev libnuma1)
else
    "$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3.11-venv)
    "$python" -c "$has_headers" || missing+=(python3.11-dev)
    "$python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null || missing+=(libnuma1)
fi
((${#missing[@]})) || exit 0

if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    echo "error: missing on this machine: ${missing[*]} (names of Debian's packages)" >&2
    exit 1
fi
echo "installing ${missing[*]}"
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${missing[@]}" >/dev/null
