/* The volume of the broker's database: how much is free, and what the database contains. */
#ifndef FLEETWRIGHT_VOLUME_H
#define FLEETWRIGHT_VOLUME_H

#include <stdbool.h>
#include <stdint.h>

#include <sqlite3.h>

struct volume {
	sqlite3 *database; /* NULL with the classic persistence */
	char journal[4096]; /* path */
	uint64_t page_bytes;
	uint64_t taken; /* since the last check */
	bool full;
};

/* An SQLite extension that each new connection loads: see the definition. */
int volume_keep_deleted(sqlite3 *database, const char **error, const void *routines);

/* False where the database cannot be read. */
bool volume_open(struct volume *volume);

/* Runs a query with one text parameter, and hands over each row. False where that fails. */
bool volume_query(const struct volume *volume, const char *text, const char *parameter, void (*take)(void *, sqlite3_stmt *),
	void *userdata);

/* Looks how much is free. */
void volume_check(struct volume *volume);

/* Whether the volume is full when a message with so many bytes arrives. */
bool volume_is_full_for(struct volume *volume, uint32_t bytes);

#endif
