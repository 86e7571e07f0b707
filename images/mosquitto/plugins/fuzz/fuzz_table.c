/* The table of messages, against a plain list. Each operation is two bytes: what is done, and to which of 256 identifiers. Identifiers
 * are spread so that many of them collide. */
#include <string.h>

#include "../table.h"
#include "input.h"

#define IDENTIFIERS 256
#define OWNERS 4

static uint64_t identifier(uint8_t number)
{
	return ((uint64_t)(number % 16) << 40) + number + 1;
}

static void expect_same(const struct table *table, const struct slot model[IDENTIFIERS])
{
	size_t count = 0, of_owners = 0;
	uint64_t bytes = 0;

	for(size_t i = 0; i < IDENTIFIERS; i++){
		count += model[i].id != 0;
		bytes += model[i].bytes;
		EXPECT(table_has(table, identifier((uint8_t)i)) == (model[i].id != 0));
		EXPECT(table_get(table, identifier((uint8_t)i)).bytes == model[i].bytes);
	}
	EXPECT(table->count == count && table->bytes == bytes);
	for(uint32_t owner = 0; owner < OWNERS; owner++){
		for(size_t position = 0; table_next_of(table, owner, &position) != 0; position++){
			of_owners++;
		}
	}
	EXPECT(of_owners == count);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct input input = {data, size};
	struct slot model[IDENTIFIERS] = {0};
	struct table table = {0};

	while(input.size > 0){
		uint8_t operation = input_byte(&input), number = input_byte(&input);
		struct slot message = {.id = identifier(number), .bytes = operation, .owner = operation % OWNERS};

		if(operation % 3 != 0){
			EXPECT(table_put(&table, message));
			model[number] = message;
		}else{
			EXPECT(table_remove(&table, message.id).id == model[number].id);
			model[number] = (struct slot){0};
		}
	}
	expect_same(&table, model);
	for(uint32_t owner = 0; owner < OWNERS; owner++){
		uint64_t id;

		for(size_t position = 0; (id = table_next_of(&table, owner, &position)) != 0; ){
			table_remove(&table, id);
		}
	}
	EXPECT(table.count == 0 && table.bytes == 0);
	table_clear(&table);
	return 0;
}
