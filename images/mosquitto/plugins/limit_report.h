/* Reports which clients exceed their own limits. The broker enforces these (`client_limit_...`) and counts.
 *
 * Retained messages, published once a second where they change:
 *   $SYS/broker/fleetwright/limited          one line for each client and limit that was exceeded in the last minute: `CLIENT LIMIT`
 *   $SYS/broker/fleetwright/exceeded/LIMIT   how often a limit was exceeded since the start */
#ifndef FLEETWRIGHT_LIMIT_REPORT_H
#define FLEETWRIGHT_LIMIT_REPORT_H

#include <stdint.h>

#define MAX_LIMITS 16

struct limit_report {
	char *clients; /* as published last */
	uint64_t counts[MAX_LIMITS];
};

void limit_report_publish(struct limit_report *report);
void limit_report_clear(struct limit_report *report);

#endif
