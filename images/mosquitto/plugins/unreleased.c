#include "unreleased.h"

#include <string.h>

/* FNV-1a, http://www.isthe.com/chongo/tech/comp/fnv/ */
#define FNV_OFFSET_BASIS 0xCBF29CE484222325ULL
#define FNV_PRIME 0x100000001B3ULL

static uint64_t hash_bytes(uint64_t hash, const void *bytes, size_t count)
{
	const unsigned char *byte = bytes;

	for(size_t i = 0; i < count; i++){
		hash = (hash ^ byte[i]) * FNV_PRIME;
	}
	return hash;
}

/* With the final NUL, so that two texts in a row differ from any other two. */
static uint64_t hash_text(uint64_t hash, const char *text)
{
	return hash_bytes(hash, text ? text : "", text ? strlen(text) + 1 : 1);
}

uint64_t fingerprint_message(const char *client, const char *topic, const void *payload, uint32_t bytes)
{
	return hash_bytes(hash_text(hash_text(FNV_OFFSET_BASIS, client), topic), payload, bytes) | 1;
}

uint32_t owner_connection(const struct mosquitto *connection)
{
	return (uint32_t)hash_bytes(FNV_OFFSET_BASIS, &connection, sizeof(connection)) | 1;
}

uint32_t owner_session(const char *client)
{
	return (uint32_t)hash_text(FNV_OFFSET_BASIS, client) & ~1U;
}

void unreleased_reserve(struct queues *queues, const char *topic, struct slot message)
{
	for(size_t i = 0; i < queues->count; i++){
		if(queue_receives(&queues->list[i], topic)){
			queues_count(queues, &queues->list[i].unreleased, message);
			queue_update(queues, &queues->list[i]);
		}
	}
}

void unreleased_free(struct queues *queues, uint64_t id)
{
	for(size_t i = 0; i < queues->count; i++){
		if(table_remove(&queues->list[i].unreleased, id).id != 0){
			queue_update(queues, &queues->list[i]);
		}
	}
}

void unreleased_free_all(struct queues *queues, uint32_t owner)
{
	for(size_t i = 0; i < queues->count; i++){
		struct table *unreleased = &queues->list[i].unreleased;
		uint64_t id;

		for(size_t position = 0; (id = table_next_of(unreleased, owner, &position)) != 0; ){
			table_remove(unreleased, id);
		}
		queue_update(queues, &queues->list[i]);
	}
}

void unreleased_store(struct queues *queues, uint64_t fingerprint, struct slot message)
{
	queues_count(queues, &queues->incoming, message);
	if(fingerprint == 0){
		return;
	}
	queues_count(queues, &queues->fingerprints, (struct slot){.id = message.id, .fingerprint = fingerprint});
	queues_count(queues, &queues->known, (struct slot){.id = fingerprint});
	for(size_t i = 0; i < queues->count; i++){
		if(table_remove(&queues->list[i].unreleased, fingerprint).id != 0){
			queues_count(queues, &queues->list[i].unreleased, message);
		}
	}
}

void unreleased_remove(struct queues *queues, uint64_t id)
{
	table_remove(&queues->incoming, id);
	table_remove(&queues->known, table_remove(&queues->fingerprints, id).fingerprint);
	unreleased_free(queues, id);
}

void unreleased_remove_all(struct queues *queues, uint32_t owner)
{
	uint64_t id;

	for(size_t position = 0; (id = table_next_of(&queues->incoming, owner, &position)) != 0; ){
		unreleased_remove(queues, id);
	}
}
