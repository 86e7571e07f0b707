#!/usr/bin/env bash
# A Python with Eclipse Paho, the MQTT client that most devices written in Python use: `paho.sh SCRIPT ARGS...`, or `paho.sh --prepare`.
exec "$(dirname "${BASH_SOURCE[0]}")/python.sh" paho-mqtt==2.1.0 "$@"
