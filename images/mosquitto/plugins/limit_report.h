/* Reports which clients exceed their own limits. The broker enforces these (`client_limit_...`) and counts. How often a limit was exceeded
 * since the start is published retained in `$SYS/broker/fleetwright/exceeded/LIMIT`, once a second where it changes. */
#ifndef FLEETWRIGHT_LIMIT_REPORT_H
#define FLEETWRIGHT_LIMIT_REPORT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define MAX_LIMITS 16

/* As published last. */
struct limit_report {
	bool published;
	uint64_t counts[MAX_LIMITS];
};

void limit_report_publish(struct limit_report *report);

/* Adds the clients that exceeded a limit in the last minute to a text: `press-1: retained, press-2: rate`. False where there are none. */
bool limit_report_clients(char *text, size_t size);

#endif
