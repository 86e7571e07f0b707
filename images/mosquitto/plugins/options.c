#include "options.h"

#include <errno.h>
#include <stdlib.h>

bool options_parse_number(const char *text, uint64_t *number)
{
	char *end;

	errno = 0;
	*number = strtoull(text, &end, 10);
	return *text >= '1' && *text <= '9' && *end == '\0' && errno == 0;
}

bool options_parse_ports(const char *text, struct ports *ports)
{
	for(;;){
		char *end;
		long port = strtol(text, &end, 10);

		if(end == text || port < 1 || port > 65535 || ports->count == MAX_PORTS){
			return false;
		}
		ports->ports[ports->count++] = (int)port;
		if(*end == '\0'){
			return true;
		}
		if(*end != ','){
			return false;
		}
		text = end + 1;
	}
}

bool ports_contain(const struct ports *ports, int port)
{
	for(size_t i = 0; i < ports->count; i++){
		if(ports->ports[i] == port){
			return true;
		}
	}
	return false;
}
