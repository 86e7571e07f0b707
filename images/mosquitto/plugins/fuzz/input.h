/* Reads values from the bytes of a fuzz input; zeros after its end. */
#ifndef FLEETWRIGHT_FUZZ_INPUT_H
#define FLEETWRIGHT_FUZZ_INPUT_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

struct input {
	const uint8_t *data;
	size_t size;
};

static inline uint8_t input_byte(struct input *input)
{
	if(input->size == 0){
		return 0;
	}
	input->size--;
	return *input->data++;
}

/* Ends the target, as a failed assertion does in every build. */
#define EXPECT(condition) \
	do{ \
		if(!(condition)){ \
			fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition); \
			abort(); \
		} \
	}while(0)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#endif
