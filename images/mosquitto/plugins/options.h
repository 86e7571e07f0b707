/* Values of plugin options. */
#ifndef FLEETWRIGHT_OPTIONS_H
#define FLEETWRIGHT_OPTIONS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define MAX_PORTS 16

struct ports {
	int ports[MAX_PORTS];
	size_t count;
};

/* A decimal number of at least 1. */
bool options_parse_number(const char *text, uint64_t *number);

/* Ports with commas between them; adds to those that are there. */
bool options_parse_ports(const char *text, struct ports *ports);

bool ports_contain(const struct ports *ports, int port);

#endif
