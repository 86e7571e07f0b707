#include "table.h"

#include <stdlib.h>

#define INITIAL_SLOTS 1024

/* Where a message is searched first. The constant is 2^64 divided by the golden ratio (Fibonacci hashing). */
static size_t preferred_position(const struct table *table, uint64_t id)
{
	return (size_t)((id * 0x9E3779B97F4A7C15ULL) >> 32) & (table->capacity - 1);
}

/* The slot of this message, or the free one for it. The table must have slots. */
static struct slot *find(const struct table *table, uint64_t id)
{
	size_t i = preferred_position(table, id);

	while(table->slots[i].id != 0 && table->slots[i].id != id){
		i = (i + 1) & (table->capacity - 1);
	}
	return &table->slots[i];
}

static bool grow(struct table *table)
{
	struct table larger = *table;

	larger.capacity = table->capacity ? 2 * table->capacity : INITIAL_SLOTS;
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

bool table_put(struct table *table, struct slot message)
{
	struct slot *slot;

	if(2 * (table->count + 1) > table->capacity && !grow(table)){
		return false;
	}
	slot = find(table, message.id);
	if(slot->id == 0){
		table->count++;
	}else{
		table->bytes -= slot->bytes;
	}
	*slot = message;
	table->bytes += message.bytes;
	return true;
}

struct slot table_remove(struct table *table, uint64_t id)
{
	struct slot removed = {0};
	size_t hole, i;

	if(!table_has(table, id)){
		return removed;
	}
	hole = (size_t)(find(table, id) - table->slots);
	removed = table->slots[hole];
	table->bytes -= removed.bytes;
	table->count--;
	/* Messages that were placed further on because of this one move up. */
	for(i = (hole + 1) & (table->capacity - 1); table->slots[i].id != 0; i = (i + 1) & (table->capacity - 1)){
		size_t preferred = preferred_position(table, table->slots[i].id);

		if(((i - preferred) & (table->capacity - 1)) >= ((i - hole) & (table->capacity - 1))){
			table->slots[hole] = table->slots[i];
			hole = i;
		}
	}
	table->slots[hole] = (struct slot){0};
	if(table->count == 0 && table->capacity > INITIAL_SLOTS){
		table_clear(table);
	}
	return removed;
}

struct slot table_get(const struct table *table, uint64_t id)
{
	return table->count > 0 ? *find(table, id) : (struct slot){0};
}

bool table_has(const struct table *table, uint64_t id)
{
	return id != 0 && table_get(table, id).id != 0;
}

uint64_t table_next_of(const struct table *table, uint32_t owner, size_t *position)
{
	for(; table->count > 0 && *position < table->capacity; ++*position){
		if(table->slots[*position].id != 0 && table->slots[*position].owner == owner){
			return table->slots[*position].id;
		}
	}
	return 0;
}

void table_clear(struct table *table)
{
	free(table->slots);
	*table = (struct table){0};
}
