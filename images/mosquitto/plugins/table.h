/* Messages by identifier: a hash table with linear probing, at most half full. */
#ifndef FLEETWRIGHT_TABLE_H
#define FLEETWRIGHT_TABLE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* An identifier of 0 marks a free slot. Those of Mosquitto contain the time and are never 0. */
struct slot {
	uint64_t id;
	union {
		struct {
			uint32_t bytes;
			uint32_t owner; /* hash of its connection or session, where that matters */
		};
		uint64_t fingerprint; /* in a table of fingerprints, which counts no bytes */
	};
};

struct table {
	struct slot *slots;
	size_t capacity, count;
	uint64_t bytes;
};

/* Adds or replaces a message. False where memory is short: the table is unchanged. */
bool table_put(struct table *table, struct slot message);

/* Removes a message and gives it; its identifier is 0 where it was not there. */
struct slot table_remove(struct table *table, uint64_t id);

/* The message; its identifier is 0 where it is not there. */
struct slot table_get(const struct table *table, uint64_t id);

bool table_has(const struct table *table, uint64_t id);

/* The first message of this owner at or after slot `*position`; 0 after the last one. Removing it may move another into its slot:
 * `*position` stays the same. */
uint64_t table_next_of(const struct table *table, uint32_t owner, size_t *position);

void table_clear(struct table *table);

#endif
