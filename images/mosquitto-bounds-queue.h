/* What waits for a session: which messages, how many bytes, and which others it would get. Part of mosquitto-bounds.c. */
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <mosquitto.h>

#include "mosquitto-bounds-table.h"

/* Once full, it is full until a sixteenth is free, so that it does not turn at every message. */
#define SLACK 16

/* What waits for a session. */
struct queue {
	char *client;
	struct table waiting;
	struct table unreleased; /* what it will get of messages of QoS 2 that are accepted already */
	char **filters;
	size_t filter_count;
	bool full;
};

static void clear(struct queue *queue)
{
	for(size_t i = 0; i < queue->filter_count; i++){
		free(queue->filters[i]);
	}
	free(queue->filters);
	clear_table(&queue->waiting);
	clear_table(&queue->unreleased);
	free(queue->client);
	memset(queue, 0, sizeof(*queue));
}

/* Whether something is full, given whether it was. */
static bool is_full(bool was, uint64_t used, uint64_t bound)
{
	return used >= (was ? bound - bound / SLACK : bound);
}

static void subscribe(struct queue *queue, const char *filter)
{
	char **filters;

	for(size_t i = 0; i < queue->filter_count; i++){
		if(!strcmp(queue->filters[i], filter)){
			return;
		}
	}
	filters = realloc(queue->filters, (queue->filter_count + 1) * sizeof(*filters));
	if(filters){
		queue->filters = filters;
		filters[queue->filter_count] = strdup(filter);
		queue->filter_count += filters[queue->filter_count] != NULL;
	}
}

static void unsubscribe(struct queue *queue, const char *filter)
{
	for(size_t i = 0; i < queue->filter_count; i++){
		if(!strcmp(queue->filters[i], filter)){
			free(queue->filters[i]);
			queue->filters[i] = queue->filters[--queue->filter_count];
			return;
		}
	}
}

static bool would_get(const struct queue *queue, const char *topic)
{
	for(size_t i = 0; i < queue->filter_count; i++){
		const char *filter = queue->filters[i];
		bool matches = false;

		/* $share/GROUP/FILTER */
		if(!strncmp(filter, "$share/", 7) && strchr(filter + 7, '/')){
			filter = strchr(filter + 7, '/') + 1;
		}
		if(mosquitto_topic_matches_sub(filter, topic, &matches) == MOSQ_ERR_SUCCESS && matches){
			return true;
		}
	}
	return false;
}

/* The queues of all sessions whose client identifier begins with `prefix`. */
struct queues {
	struct queue *list;
	size_t count, full;
	char *prefix;
	uint64_t most_bytes; /* of each */
	struct table incoming; /* stored messages of QoS 2 that are not released yet */
	struct table fingerprints; /* of these, by their identifiers */
	struct table known; /* these fingerprints */
	struct slot latest; /* the last message that was stored */
	uint64_t latest_fingerprint; /* 0 unless it is of QoS 2 */
};

static void judge(struct queues *queues, struct queue *queue)
{
	uint64_t bytes = queue->waiting.bytes + queue->unreleased.bytes;
	bool full = is_full(queue->full, bytes, queues->most_bytes);

	if(full != queue->full){
		queue->full = full;
		queues->full += full ? 1 : (size_t)-1;
		mosquitto_log_printf(MOSQ_LOG_NOTICE, "bounds: %llu bytes wait for %s, of %llu that may: publishers %s",
			(unsigned long long)bytes, queue->client, (unsigned long long)queues->most_bytes, full ? "are held up" : "may go on");
	}
}

/* The queue of a session, made where it is not there and `make` says so. NULL where its session is not bounded. */
static struct queue *queue_of(struct queues *queues, const char *client, bool make)
{
	struct queue *list;

	if(!client || strncmp(client, queues->prefix, strlen(queues->prefix))){
		return NULL;
	}
	for(size_t i = 0; i < queues->count; i++){
		if(!strcmp(queues->list[i].client, client)){
			return &queues->list[i];
		}
	}
	list = make ? realloc(queues->list, (queues->count + 1) * sizeof(*list)) : NULL;
	if(!list){
		return NULL;
	}
	queues->list = list;
	memset(&list[queues->count], 0, sizeof(*list));
	list[queues->count].client = strdup(client);
	return list[queues->count].client ? &list[queues->count++] : NULL;
}

static void forget(struct queues *queues, struct queue *queue)
{
	queues->full -= queue->full ? 1 : 0;
	clear(queue);
	*queue = queues->list[--queues->count];
}

/* Whether one that is full would get what is published there. */
static bool stand_in_the_way(const struct queues *queues, const char *topic)
{
	for(size_t i = 0; queues->full > 0 && i < queues->count; i++){
		if(queues->list[i].full && would_get(&queues->list[i], topic)){
			return true;
		}
	}
	return false;
}
