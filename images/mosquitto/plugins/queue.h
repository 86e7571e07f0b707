/* The queues of workers' sessions: which messages wait, how many bytes, and which topics they receive. */
#ifndef FLEETWRIGHT_QUEUE_H
#define FLEETWRIGHT_QUEUE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "table.h"

/* A full resource stays full until a sixteenth of it is free, so that the state does not change with every message. */
#define HYSTERESIS 16

struct queue {
	char *client;
	struct table waiting;
	struct table unreleased; /* QoS 2: accepted, and queued once their publishers release them */
	char **filters;
	size_t filter_count;
	bool full;
};

/* The queues of all sessions whose client identifier begins with `prefix`. */
struct queues {
	struct queue *list;
	size_t count, full;
	char *prefix;
	uint64_t max_bytes; /* of each; 0: not bounded */
	struct table incoming; /* stored messages of QoS 2 that are not released yet */
	struct table fingerprints; /* of these, by their identifiers */
	struct table known; /* these fingerprints */
	struct slot latest; /* the last message that was stored */
	uint64_t latest_fingerprint; /* 0 unless it has QoS 2 */
	/* Memory was short while something was counted. From then on the counts are too low, and every message is refused. */
	bool incomplete;
};

/* Whether a resource is full, given whether it was. */
bool is_full(bool was, uint64_t used, uint64_t limit);

/* The queue of a session; NULL where it has none. `create`: makes one, if the session is a worker's. */
struct queue *queues_find(struct queues *queues, const char *client, bool create);

/* Removes a queue. */
void queues_remove(struct queues *queues, struct queue *queue);

void queues_clear(struct queues *queues);

/* Whether a full queue would receive what is published to this topic. */
bool queues_block(const struct queues *queues, const char *topic);

/* Counts a message in a table of these queues. */
void queues_count(struct queues *queues, struct table *table, struct slot message);

void queue_subscribe(struct queues *queues, struct queue *queue, const char *filter);
void queue_unsubscribe(struct queue *queue, const char *filter);
bool queue_receives(const struct queue *queue, const char *topic);

/* After a change of what waits. */
void queue_update(struct queues *queues, struct queue *queue);

#endif
