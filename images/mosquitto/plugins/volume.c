#include "volume.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>

#include <mosquitto.h>
#include <mosquitto/libcommon_memory.h>

#include "queue.h"
#include "version.h"

/* The reserve: this part of the volume, within these limits. */
#define RESERVED_PART 8
#define MIN_RESERVE (64ULL << 20)
#define MAX_RESERVE (1ULL << 30)
/* No more than this is accepted between two checks, however fast it arrives. */
#define MAX_BYTES_BETWEEN_CHECKS (1 << 20)
/* What a message takes besides its payload, at least. */
#define ROW_BYTES 256

/* Debian's SQLite overwrites what it deletes, and so writes it all to the journal: the end of a session would take as much room as its
 * queue, on a volume that may be full of it. This leaves deleted rows where they are until the room is used again. Measured for 65 MB of
 * 20 kB each: 4 MB of journal; for 21 MB of 1 kB each, whose pages change before they are free: 15 MB. */
int volume_keep_deleted(sqlite3 *database, const char **error, const void *routines)
{
	(void)error;
	(void)routines;
	return sqlite3_exec(database, "PRAGMA secure_delete = OFF", NULL, NULL, NULL);
}

/* The number that a query gives; 0 where it fails. */
static uint64_t query_number(const struct volume *volume, const char *query)
{
	sqlite3_stmt *statement = NULL;
	uint64_t number = 0;

	if(sqlite3_prepare_v2(volume->database, query, -1, &statement, NULL) == SQLITE_OK && sqlite3_step(statement) == SQLITE_ROW){
		number = (uint64_t)sqlite3_column_int64(statement, 0);
	}
	sqlite3_finalize(statement);
	return number;
}

/* Never open these files in another way: closing them would release SQLite's locks. */
bool volume_open(struct volume *volume)
{
	char path[4096];

	if(snprintf(path, sizeof(path), "%s/mosquitto.sqlite3", mosquitto_persistence_location()) >= (int)sizeof(path)
			|| snprintf(volume->journal, sizeof(volume->journal), "%s/mosquitto.sqlite3-wal", mosquitto_persistence_location())
				>= (int)sizeof(volume->journal)
			|| sqlite3_open_v2(path, &volume->database, SQLITE_OPEN_READONLY, NULL) != SQLITE_OK){
		return false;
	}
	volume->page_bytes = query_number(volume, "PRAGMA page_size");
	return volume->page_bytes > 0;
}

bool volume_query(const struct volume *volume, const char *text, const char *parameter, void (*take)(void *, sqlite3_stmt *),
	void *userdata)
{
	sqlite3_stmt *statement = NULL;
	int rc = sqlite3_prepare_v2(volume->database, text, -1, &statement, NULL);

	if(rc == SQLITE_OK){
		rc = sqlite3_bind_text(statement, 1, parameter, -1, SQLITE_STATIC);
	}
	if(rc == SQLITE_OK){
		while((rc = sqlite3_step(statement)) == SQLITE_ROW){
			take(userdata, statement);
		}
	}
	sqlite3_finalize(statement);
	return rc == SQLITE_DONE;
}

/* What the file system reports as free, and what SQLite will use before its files grow. */
static uint64_t available_bytes(const struct volume *volume, const struct statvfs *found, uint64_t enough)
{
	uint64_t bytes = (uint64_t)found->f_bavail * found->f_frsize;
	/* However large the journal once grew, the database needs some room too. */
	uint64_t most = enough - enough / RESERVED_PART;
	struct stat journal;

	if(volume->database && stat(volume->journal, &journal) == 0){
		bytes += (uint64_t)journal.st_size < most ? (uint64_t)journal.st_size : most;
	}
	if(volume->database && bytes < enough){
		bytes += query_number(volume, "PRAGMA freelist_count") * volume->page_bytes;
	}
	return bytes;
}

static void set_full(struct volume *volume, bool full, uint64_t bytes, uint64_t reserve)
{
	if(full != volume->full){
		volume->full = full;
		mosquitto_log_printf(MOSQ_LOG_NOTICE, "bounds: %llu bytes are free on the volume, and the broker itself needs %llu: publishers are %s",
			(unsigned long long)bytes, (unsigned long long)reserve, full ? "refused" : "accepted again");
	}
}

void volume_check(struct volume *volume)
{
	struct statvfs found;
	uint64_t reserve, bytes;

	volume->taken = 0;
	if(statvfs(mosquitto_persistence_location(), &found) != 0){
		if(!volume->full){
			mosquitto_log_printf(MOSQ_LOG_ERR, "bounds: cannot read the volume %s (%s): it counts as full", mosquitto_persistence_location(),
				strerror(errno));
		}
		set_full(volume, true, 0, 0);
		return;
	}
	reserve = (uint64_t)found.f_blocks * found.f_frsize / RESERVED_PART;
	reserve = reserve < MIN_RESERVE ? MIN_RESERVE : reserve > MAX_RESERVE ? MAX_RESERVE : reserve;
	reserve += volume->full ? reserve / HYSTERESIS : 0;
	if(!volume->database){
		/* The next snapshot is written beside the last one, and takes at most what is in memory. */
		reserve += mosquitto_memory_used();
	}
	bytes = available_bytes(volume, &found, reserve);
	set_full(volume, bytes < reserve, bytes, reserve);
}

bool volume_is_full_for(struct volume *volume, uint32_t bytes)
{
	volume->taken += bytes + ROW_BYTES;
	if(volume->taken > MAX_BYTES_BETWEEN_CHECKS){
		volume_check(volume);
	}
	return volume->full;
}
