/* Values of options: a number that is accepted prints as it was written, and ports are ports. */
#include <inttypes.h>
#include <string.h>

#include "../identity.h"
#include "../options.h"
#include "input.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	char *text = strndup((const char *)data, size), printed[32];
	struct ports ports = {0};
	unsigned char digest[DIGEST_BYTES];
	uint64_t number;

	EXPECT(text);
	if(options_parse_number(text, &number)){
		snprintf(printed, sizeof(printed), "%" PRIu64, number);
		EXPECT(!strcmp(printed, text));
	}
	options_parse_ports(text, &ports);
	EXPECT(ports.count <= MAX_PORTS && !ports_contain(&ports, 0) && !ports_contain(&ports, 65536));
	EXPECT(identity_parse_digest(text, digest) == (strlen(text) == 64 && strspn(text, "0123456789abcdef") == 64));
	free(text);
	return 0;
}
