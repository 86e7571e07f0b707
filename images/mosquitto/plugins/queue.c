#include "queue.h"

#include <stdlib.h>
#include <string.h>

#include "version.h"

bool is_full(bool was, uint64_t used, uint64_t limit)
{
	return used >= (was ? limit - limit / HYSTERESIS : limit);
}

static void clear(struct queue *queue)
{
	for(size_t i = 0; i < queue->filter_count; i++){
		free(queue->filters[i]);
	}
	free(queue->filters);
	table_clear(&queue->waiting);
	table_clear(&queue->unreleased);
	free(queue->client);
	memset(queue, 0, sizeof(*queue));
}

void queue_subscribe(struct queues *queues, struct queue *queue, const char *filter)
{
	char **filters;

	for(size_t i = 0; i < queue->filter_count; i++){
		if(!strcmp(queue->filters[i], filter)){
			return;
		}
	}
	filters = realloc(queue->filters, (queue->filter_count + 1) * sizeof(*filters));
	if(!filters){
		queues->incomplete = true;
		return;
	}
	queue->filters = filters;
	filters[queue->filter_count] = strdup(filter);
	if(!filters[queue->filter_count]){
		queues->incomplete = true;
		return;
	}
	queue->filter_count++;
}

void queue_unsubscribe(struct queue *queue, const char *filter)
{
	for(size_t i = 0; i < queue->filter_count; i++){
		if(!strcmp(queue->filters[i], filter)){
			free(queue->filters[i]);
			queue->filters[i] = queue->filters[--queue->filter_count];
			return;
		}
	}
}

bool queue_receives(const struct queue *queue, const char *topic)
{
	for(size_t i = 0; i < queue->filter_count; i++){
		const char *filter = queue->filters[i], *group_end;
		bool matches = false;

		/* $share/GROUP/FILTER */
		if(!strncmp(filter, "$share/", 7) && (group_end = strchr(filter + 7, '/'))){
			filter = group_end + 1;
		}
		if(mosquitto_topic_matches_sub(filter, topic, &matches) == MOSQ_ERR_SUCCESS && matches){
			return true;
		}
	}
	return false;
}

void queue_update(struct queues *queues, struct queue *queue)
{
	uint64_t bytes = queue->waiting.bytes + queue->unreleased.bytes;
	bool full = is_full(queue->full, bytes, queues->max_bytes);

	if(full != queue->full){
		queue->full = full;
		queues->full += full ? 1 : (size_t)-1;
		mosquitto_log_printf(MOSQ_LOG_NOTICE, "bounds: %llu of %llu bytes are queued for %s: its publishers are %s",
			(unsigned long long)bytes, (unsigned long long)queues->max_bytes, queue->client, full ? "refused" : "accepted again");
	}
}

struct queue *queues_find(struct queues *queues, const char *client, bool create)
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
	if(!create){
		return NULL;
	}
	list = realloc(queues->list, (queues->count + 1) * sizeof(*list));
	if(!list){
		queues->incomplete = true;
		return NULL;
	}
	queues->list = list;
	memset(&list[queues->count], 0, sizeof(*list));
	list[queues->count].client = strdup(client);
	if(!list[queues->count].client){
		queues->incomplete = true;
		return NULL;
	}
	return &list[queues->count++];
}

void queues_remove(struct queues *queues, struct queue *queue)
{
	queues->full -= queue->full ? 1 : 0;
	clear(queue);
	*queue = queues->list[--queues->count];
}

void queues_clear(struct queues *queues)
{
	while(queues->count > 0){
		queues_remove(queues, queues->list);
	}
	free(queues->list);
	free(queues->prefix);
	table_clear(&queues->incoming);
	table_clear(&queues->fingerprints);
	table_clear(&queues->known);
	memset(queues, 0, sizeof(*queues));
}

bool queues_block(const struct queues *queues, const char *topic)
{
	for(size_t i = 0; queues->full > 0 && i < queues->count; i++){
		if(queues->list[i].full && queue_receives(&queues->list[i], topic)){
			return true;
		}
	}
	return false;
}

void queues_count(struct queues *queues, struct table *table, struct slot message)
{
	if(!table_put(table, message) && !queues->incomplete){
		queues->incomplete = true;
		mosquitto_log_printf(MOSQ_LOG_ERR, "bounds: out of memory: queues can no longer be counted, and every message is refused."
			" Restart the broker");
	}
}
