/* Messages of QoS 2 that are accepted but not queued yet: they are queued when their publishers release them, and queues have to keep
 * room for them until then.
 *
 * Mosquitto reports a release by what it queues, and identifies a message only once it is stored. A message of a session that outlives
 * its connection is stored when it arrives. One of any other session is stored when it is queued; until then its fingerprint identifies
 * it. A message that a publisher sends again is the same message: where it is stored, it is accepted without being counted again. */
#ifndef FLEETWRIGHT_UNRELEASED_H
#define FLEETWRIGHT_UNRELEASED_H

#include <stdint.h>

#include "queue.h"

struct mosquitto;

/* Never 0. */
uint64_t fingerprint_message(const char *client, const char *topic, const void *payload, uint32_t bytes);

/* Owners: a connection, by its address in memory, or a session, by its client identifier. The two never have the same value. */
uint32_t owner_connection(const struct mosquitto *connection);
uint32_t owner_session(const char *client);

/* Keeps room for a message in each queue that will receive it. */
void unreleased_reserve(struct queues *queues, const char *topic, struct slot message);

/* Frees the room of a message that is queued now, or never will be. */
void unreleased_free(struct queues *queues, uint64_t id);
void unreleased_free_all(struct queues *queues, uint32_t owner);

/* A message is stored before its release: from now on its identifier stands for its fingerprint. */
void unreleased_store(struct queues *queues, uint64_t fingerprint, struct slot message);

/* The stored message is released or dropped. */
void unreleased_remove(struct queues *queues, uint64_t id);
void unreleased_remove_all(struct queues *queues, uint32_t owner);

#endif
