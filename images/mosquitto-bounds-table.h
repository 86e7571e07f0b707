/* Messages and their bytes, by identifier: a hash table with linear probing, at most half full. Part of mosquitto-bounds.c. */
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>

#include <mosquitto.h>

#define FIRST_SLOTS 1024

/* An identifier of 0 marks a free slot; Mosquitto's contain the time. */
struct slot {
	uint64_t id;
	union {
		struct {
			uint32_t bytes;
			uint32_t owner; /* whose it is, where that matters */
		};
		uint64_t fingerprint; /* in a table of these, which counts no bytes */
	};
};

struct table {
	struct slot *slots;
	size_t capacity, count;
	uint64_t bytes;
};

static size_t place(const struct table *table, uint64_t id)
{
	return (size_t)((id * 0x9E3779B97F4A7C15ULL) >> 32) & (table->capacity - 1);
}

/* The slot of this message, or the free one, all zero, where it would be. The table must have been put into. */
static struct slot *find(const struct table *table, uint64_t id)
{
	size_t i = place(table, id);

	while(table->slots[i].id != 0 && table->slots[i].id != id){
		i = (i + 1) & (table->capacity - 1);
	}
	return &table->slots[i];
}

static bool grow(struct table *table)
{
	struct table larger = *table;

	larger.capacity = table->capacity ? 2 * table->capacity : FIRST_SLOTS;
	larger.slots = calloc(larger.capacity, sizeof(*larger.slots));
	if(!larger.slots){
		return false;
	}
	for(size_t i = 0; i < table->capacity; i++){
		if(table->slots[i].id != 0){
			*find(&larger, table->slots[i].id) = table->slots[i];
		}
	}
	free(table->slots);
	*table = larger;
	return true;
}

static void put(struct table *table, struct slot message)
{
	struct slot *slot;

	if(2 * (table->count + 1) > table->capacity && !grow(table)){
		mosquitto_log_printf(MOSQ_LOG_ERR, "bounds: out of memory: a message of %u bytes is not counted", message.bytes);
		return;
	}
	slot = find(table, message.id);
	if(slot->id == 0){
		table->count++;
	}else{
		table->bytes -= slot->bytes;
	}
	*slot = message;
	table->bytes += message.bytes;
}

/* The message that was taken out; its identifier is 0 where it was not there. */
static struct slot take_out(struct table *table, uint64_t id)
{
	struct slot taken = {0};
	size_t hole, i;

	if(table->count == 0 || find(table, id)->id == 0){
		return taken;
	}
	hole = (size_t)(find(table, id) - table->slots);
	taken = table->slots[hole];
	table->bytes -= taken.bytes;
	table->count--;
	/* What was put further on because of this one moves up. */
	for(i = (hole + 1) & (table->capacity - 1); table->slots[i].id != 0; i = (i + 1) & (table->capacity - 1)){
		size_t wanted = place(table, table->slots[i].id);

		if(((i - wanted) & (table->capacity - 1)) >= ((i - hole) & (table->capacity - 1))){
			table->slots[hole] = table->slots[i];
			hole = i;
		}
	}
	table->slots[hole] = (struct slot){0};
	if(table->count == 0 && table->capacity > FIRST_SLOTS){
		free(table->slots);
		table->slots = NULL;
		table->capacity = 0;
	}
	return taken;
}

/* The next message of this owner from `*i` on; 0 after the last one. Where it is taken out, another may move up into its place: `*i` stays. */
static uint64_t next_of(const struct table *table, uint32_t owner, size_t *i)
{
	for(; table->count > 0 && *i < table->capacity; ++*i){
		if(table->slots[*i].id != 0 && table->slots[*i].owner == owner){
			return table->slots[*i].id;
		}
	}
	return 0;
}

static bool has(const struct table *table, uint64_t id)
{
	return table->count > 0 && find(table, id)->id != 0;
}

static void clear_table(struct table *table)
{
	free(table->slots);
	*table = (struct table){0};
}
