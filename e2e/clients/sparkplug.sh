#!/usr/bin/env bash
# A Python with pysparkplug, a public library for Sparkplug B: `sparkplug.sh SCRIPT ARGS...`, or `sparkplug.sh --prepare`.
exec "$(dirname "${BASH_SOURCE[0]}")/python.sh" pysparkplug==0.6.1 "$@"
