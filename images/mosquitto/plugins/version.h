/* The plugins use structures that Mosquitto may change in any release (mosquitto/broker.h). */
#ifndef FLEETWRIGHT_VERSION_H
#define FLEETWRIGHT_VERSION_H

#include <mosquitto.h>

/* By the Makefile, from the installed package description: the number in 2.1.2's own header is that of 2.1.0. */
#ifndef MOSQUITTO_IS_2_1_2
#error "The plugins are written for Mosquitto 2.1.2. For another version: compare mosquitto/broker.h with that of 2.1.2, rebase \
images/mosquitto/patches, run the tests, then change the version here and in images/mosquitto/source.sh."
#endif

#endif
