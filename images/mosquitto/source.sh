# shellcheck shell=bash disable=SC2034  # for build.sh, which reads it
# The source of the broker: Debian's package at this version, with these files (SHA-256).
MOSQUITTO_VERSION=2.1.2-3
MOSQUITTO_FILES='
a8e37cc4c1d4141e56c5a8729c5fa36b1f0b1ca95378a12131d68f0509de122a  mosquitto_2.1.2.orig.tar.gz
ae5bfab0779668eaa1566ef0f8b342be0f8e4006f3630bcb82cd914740c29687  mosquitto_2.1.2-3.debian.tar.xz
c63805a0498544c801b7f186718bf749f41525b01834d8a23e9405c2cd04d5df  mosquitto_2.1.2-3.dsc
'
