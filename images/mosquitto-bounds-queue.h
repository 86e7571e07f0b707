/* What waits for a session: which messages, how many bytes, and which others it would get. Part of mosquitto-bounds.c. */
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <mosquitto.h>

#define FIRST_SLOTS 1024
/* Once full, it is full until a sixteenth is free, so that it does not turn at every message. */
#define SLACK 16

/* A message in a queue. An identifier of 0 marks a free slot; Mosquitto's contain the time. */
struct slot {
	uint64_t id;
	uint32_t bytes;
};

/* What waits for a session: a hash table with linear probing, at most half full. */
struct queue {
	char *client; /* NULL: not of a session, and not bounded */
	struct slot *slots;
	size_t capacity, count;
	uint64_t bytes;
	char **filters;
	size_t filter_count;
	bool full;
};

static size_t place(const struct queue *queue, uint64_t id)
{
	return (size_t)((id * 0x9E3779B97F4A7C15ULL) >> 32) & (queue->capacity - 1);
}

/* The slot of this message, or the free one where it would be. */
static struct slot *find(const struct queue *queue, uint64_t id)
{
	size_t i = place(queue, id);

	while(queue->slots[i].id != 0 && queue->slots[i].id != id){
		i = (i + 1) & (queue->capacity - 1);
	}
	return &queue->slots[i];
}

static bool grow(struct queue *queue)
{
	struct queue larger = *queue;

	larger.capacity = queue->capacity ? 2 * queue->capacity : FIRST_SLOTS;
	larger.slots = calloc(larger.capacity, sizeof(*larger.slots));
	if(!larger.slots){
		return false;
	}
	for(size_t i = 0; i < queue->capacity; i++){
		if(queue->slots[i].id != 0){
			*find(&larger, queue->slots[i].id) = queue->slots[i];
		}
	}
	free(queue->slots);
	*queue = larger;
	return true;
}

static void put(struct queue *queue, uint64_t id, uint32_t bytes)
{
	struct slot *slot;

	if(2 * (queue->count + 1) > queue->capacity && !grow(queue)){
		mosquitto_log_printf(MOSQ_LOG_ERR, "bounds: out of memory: a message of %u bytes is not counted", bytes);
		return;
	}
	slot = find(queue, id);
	if(slot->id == 0){
		queue->count++;
	}else{
		queue->bytes -= slot->bytes;
	}
	slot->id = id;
	slot->bytes = bytes;
	queue->bytes += bytes;
}

static void take_out(struct queue *queue, uint64_t id)
{
	size_t hole, i;

	if(queue->count == 0 || find(queue, id)->id == 0){
		return;
	}
	hole = (size_t)(find(queue, id) - queue->slots);
	queue->bytes -= queue->slots[hole].bytes;
	queue->count--;
	/* What was put further on because of this one moves up. */
	for(i = (hole + 1) & (queue->capacity - 1); queue->slots[i].id != 0; i = (i + 1) & (queue->capacity - 1)){
		size_t wanted = place(queue, queue->slots[i].id);

		if(((i - wanted) & (queue->capacity - 1)) >= ((i - hole) & (queue->capacity - 1))){
			queue->slots[hole] = queue->slots[i];
			hole = i;
		}
	}
	queue->slots[hole].id = 0;
	if(queue->count == 0 && queue->capacity > FIRST_SLOTS){
		free(queue->slots);
		queue->slots = NULL;
		queue->capacity = 0;
	}
}

static void clear(struct queue *queue)
{
	for(size_t i = 0; i < queue->filter_count; i++){
		free(queue->filters[i]);
	}
	free(queue->filters);
	free(queue->slots);
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
};

static void judge(struct queues *queues, struct queue *queue)
{
	bool full = queue->client && is_full(queue->full, queue->bytes, queues->most_bytes);

	if(full != queue->full){
		queue->full = full;
		queues->full += full ? 1 : (size_t)-1;
		mosquitto_log_printf(MOSQ_LOG_NOTICE, "bounds: %llu bytes wait for %s, of %llu that may: publishers %s",
			(unsigned long long)queue->bytes, queue->client, (unsigned long long)queues->most_bytes, full ? "are held up" : "may go on");
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
