/* Messages of QoS 2 that are accepted, but not in the queues yet: they come there when their publishers release them, and the queues
 * have to keep room for them until then. Part of mosquitto-bounds.c.
 *
 * Mosquitto tells of a release by what it queues, and names a message by an identifier that it has only once it is stored. A
 * message of a session that outlives its connection is stored when it comes; one of any other when it is queued. Until then its
 * fingerprint names it. What a publisher sends again is the same message: where it is stored, it is let in without being counted again.
 */
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "mosquitto-bounds-queue.h"

/* FNV-1a, http://www.isthe.com/chongo/tech/comp/fnv/ */
#define FNV_START 0xCBF29CE484222325ULL

static uint64_t fingerprint_of(uint64_t start, const void *bytes, size_t count)
{
	const unsigned char *byte = bytes;

	for(size_t i = 0; i < count; i++){
		start = (start ^ byte[i]) * 0x100000001B3ULL;
	}
	return start;
}

/* With the byte that ends it, so that no two texts in a row are like another two. */
static uint64_t fingerprint_of_text(uint64_t start, const char *text)
{
	return fingerprint_of(start, text ? text : "", text ? strlen(text) + 1 : 1);
}

static uint64_t fingerprint(const char *client, const char *topic, const void *payload, uint32_t bytes)
{
	uint64_t print = fingerprint_of_text(fingerprint_of_text(FNV_START, client), topic);

	return fingerprint_of(print, payload, bytes) | 1;
}

/* Whose a message is: of a connection, which is told by where Mosquitto keeps it, or of a session. */
static uint32_t owning_connection(const struct mosquitto *connection)
{
	return (uint32_t)fingerprint_of(FNV_START, &connection, sizeof(connection)) | 1;
}

static uint32_t owning_session(const char *client)
{
	return (uint32_t)fingerprint_of_text(FNV_START, client) & ~1U;
}

static void reserve(struct queues *queues, const char *topic, struct slot message)
{
	for(size_t i = 0; i < queues->count; i++){
		if(would_get(&queues->list[i], topic)){
			put(&queues->list[i].unreleased, message);
			judge(queues, &queues->list[i]);
		}
	}
}

/* A message that will not be released, or is and has been queued. */
static void drop_reserved(struct queues *queues, uint64_t id)
{
	for(size_t i = 0; i < queues->count; i++){
		if(take_out(&queues->list[i].unreleased, id).id != 0){
			judge(queues, &queues->list[i]);
		}
	}
}

static void drop_all_reserved(struct queues *queues, uint32_t owner)
{
	for(size_t i = 0; i < queues->count; i++){
		struct table *unreleased = &queues->list[i].unreleased;
		uint64_t id;

		for(size_t at = 0; (id = next_of(unreleased, owner, &at)) != 0; ){
			take_out(unreleased, id);
		}
		judge(queues, &queues->list[i]);
	}
}

/* A message is stored before its release: from now on its identifier names it. */
static void take_in(struct queues *queues, uint64_t print, struct slot message)
{
	put(&queues->incoming, message);
	if(print == 0){
		return;
	}
	put(&queues->fingerprints, (struct slot){.id = message.id, .fingerprint = print});
	put(&queues->known, (struct slot){.id = print});
	for(size_t i = 0; i < queues->count; i++){
		if(take_out(&queues->list[i].unreleased, print).id != 0){
			put(&queues->list[i].unreleased, message);
		}
	}
}

static void let_go(struct queues *queues, uint64_t id)
{
	take_out(&queues->incoming, id);
	take_out(&queues->known, take_out(&queues->fingerprints, id).fingerprint);
	drop_reserved(queues, id);
}

static void let_go_all(struct queues *queues, uint32_t owner)
{
	uint64_t id;

	for(size_t at = 0; (id = next_of(&queues->incoming, owner, &at)) != 0; ){
		let_go(queues, id);
	}
}
