/* The volume that the broker keeps its database on: what is free, and what the database says. Part of mosquitto-bounds.c. */
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/stat.h>
#include <sys/statvfs.h>

#include <mosquitto.h>
#include <mosquitto/libcommon_memory.h>
#include <sqlite3.h>

#define RESERVED_PART 8
#define LEAST_RESERVE (64ULL << 20)
#define MOST_RESERVE (1ULL << 30)
/* Between two looks no more is taken than this, however fast it comes. */
#define BYTES_BETWEEN_LOOKS (1 << 20)
/* What a message takes beside its payload, at least. */
#define ROW_BYTES 256

struct volume {
	sqlite3 *database; /* NULL with the classic persistence */
	char journal[4096]; /* path */
	uint64_t page_bytes;
	uint64_t taken; /* since the last look */
	bool full;
};

/* Debian's SQLite overwrites what it deletes, and so writes all of it to the journal: the end of a session would take as much room as its
 * queue, on a volume that may be full of it. This leaves it where it is until the room is used again. Measured for 65 MB of 20 kB each:
 * 4 MB of journal; for 21 MB of 1 kB each, whose pages change before they are free: 15 MB. */
static int leave_deleted(sqlite3 *database, const char **error, const void *routines)
{
	(void)error;
	(void)routines;
	return sqlite3_exec(database, "PRAGMA secure_delete = OFF", NULL, NULL, NULL);
}

/* The one number that a query gives; 0 where it gives none. */
static uint64_t number(const struct volume *volume, const char *query)
{
	sqlite3_stmt *statement = NULL;
	uint64_t number = 0;

	if(sqlite3_prepare_v2(volume->database, query, -1, &statement, NULL) == SQLITE_OK && sqlite3_step(statement) == SQLITE_ROW){
		number = (uint64_t)sqlite3_column_int64(statement, 0);
	}
	sqlite3_finalize(statement);
	return number;
}

/* False where the database cannot be read. Never open its files otherwise: closing them would release SQLite's locks. */
static bool open_database(struct volume *volume)
{
	char path[4096];

	snprintf(path, sizeof(path), "%s/mosquitto.sqlite3", mosquitto_persistence_location());
	snprintf(volume->journal, sizeof(volume->journal), "%s/mosquitto.sqlite3-wal", mosquitto_persistence_location());
	if(sqlite3_open_v2(path, &volume->database, SQLITE_OPEN_READONLY, NULL) != SQLITE_OK){
		return false;
	}
	volume->page_bytes = number(volume, "PRAGMA page_size");
	return volume->page_bytes > 0;
}

/* Runs a query with the prefix of the sessions that are bounded, and hands over each row. False where that fails. */
static bool query(const struct volume *volume, const char *text, const char *prefix, void (*take)(void *, sqlite3_stmt *), void *userdata)
{
	sqlite3_stmt *statement = NULL;
	int rc = sqlite3_prepare_v2(volume->database, text, -1, &statement, NULL);

	if(rc == SQLITE_OK){
		sqlite3_bind_text(statement, 1, prefix, -1, SQLITE_STATIC);
		while((rc = sqlite3_step(statement)) == SQLITE_ROW){
			take(userdata, statement);
		}
	}
	sqlite3_finalize(statement);
	return rc == SQLITE_DONE;
}

/* What the file system says is free, with what SQLite will use before its files grow. */
static uint64_t available(const struct volume *volume, const struct statvfs *found, uint64_t enough)
{
	uint64_t bytes = (uint64_t)found->f_bavail * found->f_frsize;
	/* However large the journal has grown once, the database has to find some room too. */
	uint64_t most = enough - enough / RESERVED_PART;
	struct stat journal;

	if(volume->database && stat(volume->journal, &journal) == 0){
		bytes += (uint64_t)journal.st_size < most ? (uint64_t)journal.st_size : most;
	}
	if(volume->database && bytes < enough){
		bytes += number(volume, "PRAGMA freelist_count") * volume->page_bytes;
	}
	return bytes;
}

static void look_at(struct volume *volume)
{
	struct statvfs found;
	uint64_t reserve, bytes;
	bool full;

	volume->taken = 0;
	if(statvfs(mosquitto_persistence_location(), &found) != 0){
		return;
	}
	reserve = (uint64_t)found.f_blocks * found.f_frsize / RESERVED_PART;
	reserve = reserve < LEAST_RESERVE ? LEAST_RESERVE : reserve > MOST_RESERVE ? MOST_RESERVE : reserve;
	reserve += volume->full ? reserve / SLACK : 0;
	if(!volume->database){
		/* What is in memory is more than what the next file with it takes. */
		reserve += mosquitto_memory_used();
	}
	bytes = available(volume, &found, reserve);
	full = bytes < reserve;
	if(full != volume->full){
		volume->full = full;
		mosquitto_log_printf(MOSQ_LOG_NOTICE, "bounds: %llu bytes are free on the volume, of which the broker itself needs %llu: publishers %s",
			(unsigned long long)bytes, (unsigned long long)reserve, full ? "are held up" : "may go on");
	}
}

/* Whether the volume is full, when a message with so many bytes comes. */
static bool has_no_room(struct volume *volume, uint32_t bytes)
{
	volume->taken += bytes + ROW_BYTES;
	if(volume->taken > BYTES_BETWEEN_LOOKS){
		look_at(volume);
	}
	return volume->full;
}
