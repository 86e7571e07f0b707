#include "limit_report.h"

#include <stdio.h>
#include <string.h>

#include "version.h"

#define PREFIX "$SYS/broker/fleetwright/"
/* Clients that the broker remembers, and seconds for which one is reported. */
#define MAX_CLIENTS 16
#define REPORTED_SECONDS 60

bool limit_report_clients(char *text, size_t size)
{
	size_t length = strlen(text);
	bool found = false;

	for(int i = 0; i < MAX_CLIENTS; i++){
		int age = 0, added;
		const struct mosquitto_limit_offender *offender = mosquitto_limit_offender(i, &age);

		if(!offender || age > REPORTED_SECONDS){
			continue;
		}
		added = snprintf(text + length, size - length, "%s%s: %s", found ? ", " : "", offender->clientid, mosquitto_limit_name(offender->limit));
		if(added < 0 || (size_t)added >= size - length){
			text[length] = '\0';
			break;
		}
		length += (size_t)added;
		found = true;
	}
	return found;
}

void limit_report_publish(struct limit_report *report)
{
	char text[32], topic[64];
	const char *name;

	for(int limit = 0; limit < MAX_LIMITS && (name = mosquitto_limit_name(limit)); limit++){
		uint64_t count = mosquitto_limit_refusals(limit);

		if(!report->published || report->counts[limit] != count){
			snprintf(topic, sizeof(topic), PREFIX "exceeded/%s", name);
			snprintf(text, sizeof(text), "%llu", (unsigned long long)count);
			mosquitto_broker_publish_copy(NULL, topic, (int)strlen(text), text, 0, true, NULL);
			report->counts[limit] = count;
		}
	}
	report->published = true;
}
